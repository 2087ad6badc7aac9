# SPDX-FileCopyrightText: blockgraph contributors
# SPDX-License-Identifier: MIT
"""`blockgraph demo`: a busy disk is backed up, and the backup is compared with the disk as it was at the start.

Exit status: 0 only if the proof holds; 1 else; 130, 143 after SIGINT or SIGTERM. Temporary files are removed in every
case, unless --keep names a folder for them.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import shutil
import signal
import tempfile
from argparse import Namespace, _SubParsersAction
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from rich.console import Console

from blockgraph.cli.text import size_argument
from blockgraph.create import FORMATS
from blockgraph.errors import IOFailure, NoSpace, OptionError
from blockgraph.text import format_size

_DEFAULT_SIZE = 512 << 20
_LEAST = 32 << 20


def register(subparsers: _SubParsersAction[Any]) -> None:
    """Add the command."""
    parser = subparsers.add_parser(
        "demo",
        help="back up a busy disk and prove that the backup is right",
        description="Make a disk, back it up while a guest overwrites it, and prove that the backup is the disk as it "
        "was at the start.",
    )
    parser.add_argument("--size", type=size_argument, default=_DEFAULT_SIZE, help="of the disk (default: 512M)")
    parser.add_argument("--format", choices=FORMATS, default="raw", help="of the backup (default: raw)")
    parser.add_argument("--seed", type=int, default=0, help="of everything random (default: 0)")
    parser.add_argument("--keep", metavar="DIR", type=Path, help="leave disk, backup and graph file in this folder")
    parser.add_argument("--json", action="store_true", help="print the figures as JSON")
    parser.set_defaults(run=run)


def run(args: Namespace) -> int:
    """Play it; the exit status."""
    if args.size < _LEAST or args.size % 4096:
        raise OptionError(
            "is less than 32M, or no multiple of 4k", path="--size", value=args.size, hint="try --size 512M"
        )
    terminated = False

    def terminate(*_: object) -> None:
        nonlocal terminated
        terminated = True
        signal.raise_signal(signal.SIGINT)

    before = signal.signal(signal.SIGTERM, terminate)
    try:
        with _folder(args.keep) as folder:
            _check_room(folder, args.size)
            return asyncio.run(_run(args, folder))
    except KeyboardInterrupt:
        if terminated:
            return 128 + signal.SIGTERM
        raise
    except OSError as error:
        raise IOFailure.from_oserror(error, node="demo", op="demo", hint="set TMPDIR to a place with room") from error
    finally:
        signal.signal(signal.SIGTERM, before)


async def _run(args: Namespace, folder: Path) -> int:
    from blockgraph.demo.report import show, to_json
    from blockgraph.demo.scenario import run_scenario

    console = Console(highlight=False)
    if not args.json:
        console.print(f"Backing up a disk of {format_size(args.size)} while a guest overwrites it ...")
    outcome = await run_scenario(folder, args.size, args.format, args.seed)
    if args.json:
        print(json.dumps(to_json(outcome), indent=2))
    else:
        show(outcome, console)
        if args.keep is not None:
            console.print(f"\nKept in {folder}: disk.img, reference.img, backup, graph.toml", soft_wrap=True)
    return 1 if outcome.failures() else 0


@contextlib.contextmanager
def _folder(keep: Path | None) -> Iterator[Path]:
    if keep is None:
        with tempfile.TemporaryDirectory(prefix="blockgraph-demo-") as name:
            yield Path(name)
        return
    keep.mkdir(parents=True, exist_ok=True)
    if any(keep.iterdir()):
        raise OptionError(f"'{keep}' is not empty", path="--keep", hint="name a new folder")
    yield keep


def _check_room(folder: Path, size: int) -> None:
    """Disk, reference and backup: dense at worst, usually half of that."""
    free, need = shutil.disk_usage(folder).free, 2 * size
    if free < need:
        raise NoSpace(
            f"{format_size(need)} of room needed in '{os.fspath(folder)}', {format_size(free)} free",
            node="demo",
            hint="choose a smaller --size, or set TMPDIR to a place with room",
        )

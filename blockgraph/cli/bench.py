# SPDX-FileCopyrightText: blockgraph contributors
# SPDX-License-Identifier: MIT
"""`blockgraph bench [GRAPH]`: how fast blockgraph is on this machine and this storage, beside the tools that are here.

Without GRAPH two disks are made, measured and removed. The disks of a GRAPH are only read, unless --write says that
what is on them may be lost. Exit status: 0; 1 for an error; 130, 143 after SIGINT or SIGTERM. Whatever it makes is
removed in every case.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import sys
import tempfile
from argparse import ArgumentTypeError, Namespace, _SubParsersAction
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn

from blockgraph.cli.text import size_argument
from blockgraph.errors import IOFailure, NoSpace, OptionError
from blockgraph.text import format_size

if TYPE_CHECKING:
    from blockgraph.bench.disks import Disk
    from blockgraph.bench.figures import Result
    from blockgraph.bench.plan import Step

_LEAST = 1 << 20

#: Longest path of a folder in which sockets have names that the kernel takes.
_SHORT = 80


def register(subparsers: _SubParsersAction[Any]) -> None:
    """Add the command."""
    parser = subparsers.add_parser(
        "bench",
        help="measure blockgraph on this machine, beside the tools that are installed",
        description="Measure blockgraph on this machine and this storage, beside dd, nbdkit, qemu-nbd, qemu-img and "
        "qemu-storage-daemon as far as they are installed: disks over NBD and in process, copies, and what backup-top "
        "costs a guest while clusters get copied. It takes about a minute.",
    )
    parser.add_argument(
        "graph",
        metavar="GRAPH",
        type=Path,
        nargs="?",
        help="graph file whose disks are measured: those it exports, else its topmost nodes; they are ONLY READ, "
        "unless --write is given (default: a raw and a qcow2 disk, made for it and removed)",
    )
    parser.add_argument("--node", metavar="NAME", help="measure this node of GRAPH only")
    parser.add_argument(
        "--write",
        action="store_true",
        help="measure writes to the disks of GRAPH too: this OVERWRITES them, what is on them is lost",
    )
    parser.add_argument(
        "--directory",
        metavar="DIR",
        type=Path,
        help="where disks and targets of copies are made, so what storage is measured (default: that of TMPDIR)",
    )
    parser.add_argument(
        "--size",
        type=size_argument,
        help="of the disks that are made; no more of a disk is copied (default: 256M, quick: 32M)",
    )
    parser.add_argument("--seconds", type=_seconds, help="for each run (default: 0.15, quick: 0.06)")
    parser.add_argument("--rounds", type=_rounds, help="how often the sides take turns (default: 2, quick: 1)")
    parser.add_argument("--quick", action="store_true", help="one round of the figures that say most, in ten seconds")
    parser.add_argument("--json", action="store_true", help="print the figures as JSON")
    parser.add_argument("--svg", metavar="FILE", type=Path, help="draw them there, too")
    parser.add_argument("-o", "--output", metavar="OUT", type=Path, help="write there instead of to the terminal")
    parser.set_defaults(run=run)


def _seconds(text: str) -> float:
    try:
        seconds = float(text)
    except ValueError:
        seconds = 0.0
    if not 0.001 <= seconds <= 3600:
        raise ArgumentTypeError(f"'{text}' is not a time from 0.001 to 3600 seconds")
    return seconds


def _rounds(text: str) -> int:
    if not text.isdecimal() or not 1 <= int(text) <= 1000:
        raise ArgumentTypeError(f"'{text}' is not a number from 1 to 1000")
    return int(text)


def run(args: Namespace) -> int:
    """Measure; the exit status."""
    _check(args)
    terminated = False

    def terminate(*_: object) -> None:
        nonlocal terminated
        terminated = True
        signal.raise_signal(signal.SIGINT)

    before = signal.signal(signal.SIGTERM, terminate)
    try:
        result = _measure(args)
        _tell(args, result)
    except KeyboardInterrupt:
        if terminated:
            return 128 + signal.SIGTERM
        raise
    except OSError as error:
        raise IOFailure.from_oserror(error, node="bench", op="bench") from error
    finally:
        signal.signal(signal.SIGTERM, before)
    return 0


def _check(args: Namespace) -> None:
    """Say what is wrong before anything is done."""
    defaults = {
        "size": 32 << 20 if args.quick else 256 << 20,
        "seconds": 0.06 if args.quick else 0.15,
        "rounds": 1 if args.quick else 2,
        "directory": Path(tempfile.gettempdir()),
    }
    for name, value in defaults.items():
        if getattr(args, name) is None:
            setattr(args, name, value)
    if args.size < _LEAST or args.size % 65536:
        raise OptionError("is less than 1M, or no multiple of 64k", path="--size", value=args.size, hint="try 256M")
    if not args.directory.is_dir():
        raise OptionError("is not a folder", path="--directory", value=str(args.directory))
    for name in ("node", "write"):
        if args.graph is None and getattr(args, name):
            raise OptionError("is about the disks of a GRAPH, and none is given", path=f"--{name}")
    for name in ("svg", "output"):
        path = getattr(args, name)
        if path is not None and not (path.parent.is_dir() and os.access(path.parent, os.W_OK) and not path.is_dir()):
            raise OptionError("can not be written", path=f"--{name}", value=str(path))
    free, need = shutil.disk_usage(args.directory).free, args.size * (1 if args.graph else 3)
    if free < need:
        raise NoSpace(
            f"{format_size(need)} of room needed in '{args.directory}', {format_size(free)} free",
            node="bench",
            hint="choose a smaller --size, or another --directory",
        )


def _measure(args: Namespace) -> Result:
    from blockgraph.bench.disks import graph_disks, make_disks
    from blockgraph.bench.figures import Result
    from blockgraph.bench.plan import Plan
    from blockgraph.bench.tools import Tools, describe

    tools = Tools.find()
    place = tempfile.gettempdir() if len(tempfile.gettempdir()) <= _SHORT else "/tmp"
    with (
        tempfile.TemporaryDirectory(prefix="blockgraph-bench-", dir=args.directory) as folder,
        tempfile.TemporaryDirectory(prefix="blockgraph-bench-", dir=place) as sockets,
    ):
        disks: Sequence[Disk]
        if args.graph is None:
            disks = make_disks(Path(folder).resolve(), args.size, ("raw",) if args.quick else ("raw", "qcow2"))
        else:
            disks = graph_disks(args.graph, args.node, writable=args.write)
        result = Result(
            {
                **describe(args.directory),
                "disks": ", ".join(f"{disk.label} ({format_size(disk.size)})" for disk in disks),
                "runs": f"{args.rounds} {'rounds' if args.rounds > 1 else 'round'} of {args.seconds:g} s",
                "load": "fio" if tools.fio else "our own client in Python",
            },
            notes=tools.notes(),
            missing=tools.missing,
        )
        if args.graph is not None and not args.write:
            result.notes.append("the disks were only read: no writes, no backup-top (--write overwrites them)")
        plan = Plan(result, disks, Path(folder).resolve(), Path(sockets), tools, args.seconds, args.size, args.quick)
        if not args.json and args.output is None:
            Console(highlight=False).print(f"Measuring {result.facts['disks']} ...\n", soft_wrap=True, markup=False)
        _play(plan.steps(args.rounds))
    return result


def _play(steps: Sequence[Step]) -> None:
    """Do them, and show on a terminal how far it is."""
    console = Console(stderr=True, highlight=False)
    columns = (BarColumn(bar_width=20), TextColumn("{task.completed}/{task.total}  {task.description}"))
    # Drawn between the runs only: a thread that draws would be measured too.
    with Progress(
        *columns, console=console, transient=True, auto_refresh=False, disable=not console.is_terminal
    ) as progress:
        task = progress.add_task("", total=len(steps))
        for title, step in steps:
            progress.update(task, description=title, refresh=True)
            step()
            progress.advance(task)


def _tell(args: Namespace, result: Result) -> None:
    from blockgraph.bench.report import show
    from blockgraph.bench.svg import draw

    if args.svg is not None:
        args.svg.write_text(draw(result), encoding="utf-8")
    with contextlib.ExitStack() as stack:
        file = stack.enter_context(args.output.open("w", encoding="utf-8")) if args.output else sys.stdout
        if args.json:
            print(json.dumps(result.to_json(), indent=2), file=file)
        else:
            show(result, Console(file=file, highlight=False))

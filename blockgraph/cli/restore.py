# SPDX-FileCopyrightText: blockgraph contributors
# SPDX-License-Identifier: MIT
"""`blockgraph restore CHAIN TARGET`: a disk as it was at a point in time, verified while it is written.

Exit status: 0 restored; 1 not, or (with --ignore) not all of it is what was backed up.
"""

from __future__ import annotations

import asyncio
import sys
from argparse import Namespace, _SubParsersAction
from typing import Any

from blockgraph.chains import Chain, restore
from blockgraph.cli.chains import AT_HELP, add_chain_arguments, progress
from blockgraph.text import format_size


def register(subparsers: _SubParsersAction[Any]) -> None:
    """Add the command."""
    parser = subparsers.add_parser(
        "restore",
        help="write a disk as it was at a point in time",
        description="Write a disk as it was at a point in time to a new image or a block device. What is read is "
        "compared with its checksums; where it differs nothing is left of a new image.",
    )
    add_chain_arguments(parser)
    parser.add_argument("--at", metavar="POINT", default="latest", help=f"{AT_HELP} (default: latest)")
    parser.add_argument("-O", "--format", choices=("raw", "qcow2"), default="raw", help="of TARGET (default: raw)")
    parser.add_argument("--force", action="store_true", help="overwrite a file that exists, or a block device")
    parser.add_argument("--ignore", action="store_true", help="go on where a backup is damaged, and tell the ranges")
    parser.add_argument("--direct", action="store_true", help="write past the page cache (O_DIRECT)")
    parser.add_argument("target", metavar="TARGET", help="new image, or block device")
    parser.set_defaults(run=run)


def run(args: Namespace) -> int:
    """Restore; the exit status."""
    chain = Chain.load(args.chain)
    point = chain.find(args.at, args.disk)
    with progress("restoring") as told:
        work = restore(
            chain,
            point,
            args.target,
            image_format=args.format,
            force=args.force,
            ignore=args.ignore,
            direct=args.direct,
            progress=told,
        )
        result = asyncio.run(work)
    info = point.manifest
    print(f"{args.target}: {info.disk.name} as of {info.time}, {format_size(result.bytes)} ({result.bytes} bytes)")
    for image, start, length in result.damaged:
        print(f"blockgraph: {image}: bytes {start} to {start + length} are not what was backed up", file=sys.stderr)
    return 1 if result.damaged else 0

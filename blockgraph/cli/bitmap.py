# SPDX-FileCopyrightText: blockgraph contributors
# SPDX-License-Identifier: MIT
"""`blockgraph bitmap IMAGE --add NAME`: change and list the persistent dirty bitmaps of an image that nobody uses.

Options as `qemu-img bitmap`. Several changes, in the order given, are made together or not at all:

    blockgraph bitmap disk.qcow2 --disable b0                        # stop recording
    blockgraph bitmap disk.qcow2 --add --merge b0 --merge b1 sum     # both together, in a new bitmap
    blockgraph bitmap disk.qcow2 --list
    blockgraph bitmap disk.img --sidecar disk.img.bitmaps --add b0   # a raw image's are in a file beside it

Backing files are not opened. A format that is not given is told by the image's magic, as for `info`: what a guest may
have planted in a raw disk reaches nothing but that disk.
"""

from __future__ import annotations

import argparse
import asyncio
import json
from argparse import Namespace, _SubParsersAction
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from typing import Any, NamedTuple

from blockgraph.bitmaps.actions import (
    AddBitmap,
    BitmapName,
    ClearBitmap,
    EnableBitmap,
    MergeBitmaps,
    RemoveBitmap,
)
from blockgraph.bitmaps.attach import AttachSidecar
from blockgraph.bitmaps.query import BitmapInfo
from blockgraph.cli.images import NODE, open_unused
from blockgraph.cli.text import size_argument
from blockgraph.graph.action import Action
from blockgraph.graph.graph import Graph
from blockgraph.graph.problem import printable

#: Name of the node that holds the file of -b.
SOURCE = "source"


class Step(NamedTuple):
    """One change, in the order of the command line.

    Attributes:
        verb: "add", "remove", "clear", "enable", "disable" or "merge".
        source: of "merge": name of the bitmap to merge.
    """

    verb: str
    source: str = ""


class _Step(argparse.Action):
    """Adds itself to `steps`."""

    def __init__(self, option_strings: Sequence[str], dest: str, *, takes: str | None = None, help: str) -> None:
        super().__init__(option_strings, "steps", nargs=1 if takes else 0, metavar=takes, help=help)
        self._verb = dest

    def __call__(self, parser: Any, namespace: Namespace, values: Any, option_string: str | None = None) -> None:
        namespace.steps = [*(namespace.steps or ()), Step(self._verb, *values)]


class _List(argparse.Action):
    """Needs no NAME."""

    def __init__(self, option_strings: Sequence[str], dest: str, *, name: argparse.Action, help: str) -> None:
        super().__init__(option_strings, dest, nargs=0, default=False, help=help)
        self._name = name

    def __call__(self, parser: Any, namespace: Namespace, values: Any, option_string: str | None = None) -> None:
        self._name.required = False
        setattr(namespace, self.dest, True)


def register(subparsers: _SubParsersAction[Any]) -> None:
    """Add the command."""
    parser = subparsers.add_parser(
        "bitmap",
        help="change and list the dirty bitmaps of an image",
        description="Change and list the persistent dirty bitmaps of an image that nobody uses. "
        "Several changes are made together, in the order given, or not at all.",
    )
    parser.add_argument("image", metavar="IMAGE", help="image file or block device")
    name = parser.add_argument("name", metavar="NAME", default=None, help="name of the bitmap")
    for verb, takes, text in (
        ("add", None, "a new, empty bitmap"),
        ("remove", None, "remove it"),
        ("clear", None, "nothing is marked any more"),
        ("enable", None, "record writes"),
        ("disable", None, "record no writes"),
        ("merge", "SRC", "mark what is marked in the bitmap SRC too; may be repeated"),
    ):
        parser.add_argument(f"--{verb}", action=_Step, takes=takes, help=text)
    parser.add_argument("-b", "--source-file", metavar="FILE", help="the image that has the bitmaps SRC of --merge")
    parser.add_argument("-F", "--source-format", choices=("raw", "qcow2"), help="format of FILE")
    parser.add_argument("-g", "--granularity", type=size_argument, metavar="BYTES", help="bytes per bit, for --add")
    parser.add_argument(
        "-f", "--format", choices=("raw", "qcow2"), help="format of IMAGE; told by its magic if omitted"
    )
    parser.add_argument(
        "--sidecar",
        metavar="PATH",
        help="file with the bitmaps of IMAGE; made if missing; default: IMAGE.bitmaps if it is there",
    )
    parser.add_argument("--list", action=_List, name=name, help="show the bitmaps of IMAGE, after the changes")
    parser.add_argument("--json", action="store_true", help="with --list: print JSON")
    parser.set_defaults(run=run, wrong=parser.error)


def run(args: Namespace) -> int:
    """Do it; the exit status."""
    steps: list[Step] = args.steps or []
    verbs = {step.verb for step in steps}
    if not steps and not args.list:
        args.wrong("give one of --add, --remove, --clear, --enable, --disable, --merge, --list")
    if steps and args.name is None:
        args.wrong("the following arguments are required: NAME")
    for option, given, verb in (("-g", args.granularity, "add"), ("-b", args.source_file, "merge")):
        if given is not None and verb not in verbs:
            args.wrong(f"{option} is of use with --{verb} only")
    if args.source_format and not args.source_file:
        args.wrong("-F is of use with -b only")
    if args.json and not args.list:
        args.wrong("--json is of use with --list only")
    asyncio.run(_run(args, steps))
    return 0


async def _run(args: Namespace, steps: list[Step]) -> None:
    async with _opened(args, writable=bool(steps)) as graph:
        await graph.act(*_actions(args, steps))
        found = graph.bitmaps(NODE)
    if args.list:
        print(as_json(found) if args.json else as_table(found))


@asynccontextmanager
async def _opened(args: Namespace, *, writable: bool) -> AsyncIterator[Graph]:
    """The image, and that of -b; nobody else may write them meanwhile. What was changed is durable at the end."""
    graph = Graph()
    try:
        await open_unused(graph, NODE, args.image, args.format, writable=writable)
        if args.sidecar is not None:
            await graph.act(AttachSidecar(NODE, args.sidecar, shared=True))
        if args.source_file:
            await open_unused(graph, SOURCE, args.source_file, args.source_format, writable=False)
        yield graph
    finally:
        await graph.close()


def _actions(args: Namespace, steps: list[Step]) -> list[Action]:
    bitmap = BitmapName(NODE, args.name)
    source = SOURCE if args.source_file else NODE
    made: list[Action] = []
    for step in steps:
        match step.verb:
            case "add":
                made.append(AddBitmap(bitmap, granularity=args.granularity, persistent=True))
            case "remove":
                made.append(RemoveBitmap(bitmap))
            case "clear":
                made.append(ClearBitmap(bitmap))
            case "enable" | "disable":
                made.append(EnableBitmap(bitmap, enabled=step.verb == "enable"))
            case "merge":
                made.append(MergeBitmaps(bitmap, [BitmapName(source, step.source)]))
    return made


def as_json(bitmaps: list[BitmapInfo]) -> str:
    """Members as QEMU's BlockDirtyInfo."""
    rows = []
    for bitmap in bitmaps:
        row: dict[str, Any] = {
            "name": bitmap.name,
            "count": bitmap.count,
            "granularity": bitmap.granularity,
            "recording": bitmap.recording,
            "busy": bool(bitmap.busy),
            "persistent": bitmap.persistent,
        }
        if bitmap.inconsistent:
            row |= {"inconsistent": True, "reason": bitmap.reason}
        rows.append(row)
    return json.dumps(rows, indent=2)


def as_table(bitmaps: list[BitmapInfo]) -> str:
    """For people."""
    rows = [("NAME", "DIRTY", "GRANULARITY", "STATE")]
    for bitmap in bitmaps:
        state = "recording" if bitmap.recording else "disabled"
        if bitmap.inconsistent:
            state = f"inconsistent: {bitmap.reason}"
        rows.append((printable(bitmap.name), str(bitmap.count), str(bitmap.granularity), state))
    widths = [max(len(row[column]) for row in rows) for column in range(3)]
    return "\n".join(
        f"{name:<{widths[0]}}  {count:>{widths[1]}}  {granularity:>{widths[2]}}  {state}"
        for name, count, granularity, state in rows
    )

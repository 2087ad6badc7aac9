# SPDX-FileCopyrightText: blockgraph contributors
# SPDX-License-Identifier: MIT
"""`blockgraph checkpoint IMAGE... --create NAME`: checkpoints of images that nobody uses.

A checkpoint is a named instant of one or many disks, since which what changes on each is known. It is kept in dirty
bitmaps, which QEMU's tools record in too:

    blockgraph checkpoint a.qcow2 b.qcow2 --create monday        # both, or none
    blockgraph checkpoint a.qcow2 b.qcow2 --list
    blockgraph checkpoint a.qcow2 --export monday --json         # what has changed since
    blockgraph checkpoint a.qcow2 --export monday --as changes   # the same as a bitmap, for qemu-nbd -B changes
    blockgraph checkpoint a.qcow2 --delete monday                # what changed since every other is still known
    blockgraph checkpoint a.img --sidecar --create monday        # a raw image's are in a file beside it, a.img.bitmaps

Checkpoints of disks in use are taken by `blockgraph run`: section `checkpoints` of a graph file.
"""

from __future__ import annotations

import asyncio
import json
import os
from argparse import Namespace, _SubParsersAction
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

from blockgraph.bitmaps.attach import AttachSidecar
from blockgraph.checkpoints import Checkpoints
from blockgraph.cli.images import open_unused
from blockgraph.cli.text import size_argument
from blockgraph.errors import BlockGraphError, GraphError
from blockgraph.graph.graph import Graph
from blockgraph.graph.problem import printable


def register(subparsers: _SubParsersAction[Any]) -> None:
    """Add the command."""
    parser = subparsers.add_parser(
        "checkpoint",
        help="make, list, delete and export checkpoints of images",
        description="Checkpoints of images that nobody uses: named instants, since which what changes is known. "
        "All images have one, or lose one, or none does.",
    )
    parser.add_argument("image", metavar="IMAGE", nargs="+", help="image file or block device")
    what = parser.add_mutually_exclusive_group()
    what.add_argument("--create", metavar="NAME", help="a new checkpoint of each IMAGE")
    what.add_argument("--delete", metavar="NAME", help="forget it; what changed since every other is still known")
    what.add_argument("--export", metavar="NAME", help="show what has changed on each IMAGE since")
    parser.add_argument("--list", action="store_true", help="show the checkpoints, after the change")
    parser.add_argument(
        "--as", dest="into", metavar="BITMAP", help="with --export: put it into a new bitmap of each IMAGE instead"
    )
    parser.add_argument("-g", "--granularity", type=size_argument, metavar="BYTES", help="bytes per bit, for --create")
    parser.add_argument(
        "--epochs", action="store_true", help="with --create: one bitmap for all checkpoints of an IMAGE (in a sidecar)"
    )
    parser.add_argument(
        "--sidecar",
        action="store_true",
        help="with --create: keep them in IMAGE.bitmaps, where IMAGE has no place",
    )
    parser.add_argument("--prefix", default="checkpoint", help="of the bitmaps' names (default: checkpoint)")
    parser.add_argument(
        "-f", "--format", choices=("raw", "qcow2"), help="format of each IMAGE; told by its magic if omitted"
    )
    parser.add_argument("--json", action="store_true", help="with --list or --export: print JSON")
    parser.set_defaults(run=run, wrong=parser.error)


def run(args: Namespace) -> int:
    """Do it; the exit status."""
    if args.create is args.delete is args.export is None and not args.list:
        args.wrong("give one of --create NAME, --delete NAME, --export NAME, --list")
    for option, given in (("-g", args.granularity), ("--epochs", args.epochs), ("--sidecar", args.sidecar)):
        if given and args.create is None:
            args.wrong(f"{option} is of use with --create only")
    if args.into is not None and args.export is None:
        args.wrong("--as is of use with --export only")
    if args.export is not None and args.list:
        args.wrong("--export shows what --list does not: give one of them")
    if args.json and not args.list and (args.export is None or args.into is not None):
        args.wrong("--json is of use with --list, and --export without --as")
    seen: dict[str, str] = {}
    for image in args.image:
        if seen.setdefault(os.path.realpath(image), image) is not image:
            args.wrong(f"'{image}' is given twice")
    asyncio.run(_run(args))
    return 0


async def _run(args: Namespace) -> None:
    async with _opened(args) as (graph, disks):
        checkpoints = Checkpoints(
            graph, prefix=args.prefix, granularity=args.granularity, epochs=args.epochs, persistent=True
        )
        if args.create is not None:
            await checkpoints.create(args.create, disks)
        if args.delete is not None:
            await checkpoints.delete(args.delete)
        if args.into is not None:
            await checkpoints.keep_changes(args.export, args.into, disks)
        elif args.export is not None:
            changed = {disks[disk]: list(checkpoints.since(args.export, disk).dirty_extents()) for disk in disks}
            print(extents_as_json(args.export, changed) if args.json else extents_as_table(changed))
        if args.list:
            rows = _rows(checkpoints, disks)
            print(json.dumps(rows, indent=2) if args.json else as_table(rows, len(disks) > 1))


@asynccontextmanager
async def _opened(args: Namespace) -> AsyncIterator[tuple[Graph, dict[str, str]]]:
    """The images, by the names of their nodes; nobody else may write them. What was changed is durable at the end."""
    disks = {f"image{number}": filename for number, filename in enumerate(args.image)}
    writable = args.create is not None or args.delete is not None or args.into is not None
    graph = Graph()
    try:
        for node, filename in disks.items():
            await open_unused(graph, node, filename, args.format, writable=writable)
            if args.create is not None and graph.node(node).bitmap_store is None:
                if not args.sidecar:
                    raise GraphError(
                        f"'{filename}' has no place for checkpoints",
                        op="checkpoint",
                        hint=f"give --sidecar to keep them in '{filename}.bitmaps'",
                    )
                await graph.act(AttachSidecar(node, shared=True))
        yield graph, disks
    except BlockGraphError as error:
        if error.node in disks:  # a name that users have not seen
            error.node, error.file = disks[error.node], None
        raise
    finally:
        await graph.close()


def _rows(checkpoints: Checkpoints, disks: dict[str, str]) -> list[dict[str, Any]]:
    """A row for each checkpoint of each disk."""
    rows = []
    for checkpoint in checkpoints.list():
        for disk, found in checkpoint.disks.items():
            row: dict[str, Any] = {
                "name": checkpoint.name,
                "number": checkpoint.number,
                "image": disks[disk],
                "bitmap": found.bitmap,
                "changed": None,
            }
            if found.problem is None:
                row["changed"] = checkpoints.since(checkpoint.name, disk).count()
            else:
                row["problem"] = found.problem
            rows.append(row)
    return rows


def as_table(rows: list[dict[str, Any]], images: bool) -> str:
    """For people.

    Args:
        images: say which, there are several.
    """
    table = [("NAME", "IMAGE", "CHANGED", "BITMAP")]
    for row in rows:
        changed = str(row["changed"]) if row["changed"] is not None else f"unknown: {printable(row['problem'])}"
        table.append((printable(row["name"]), printable(row["image"]), changed, printable(row["bitmap"])))
    columns = [column for column in range(4) if images or column != 1]
    widths = [max(len(line[column]) for line in table) for column in columns]
    return "\n".join(
        "  ".join(f"{line[column]:<{width}}" for column, width in zip(columns, widths, strict=True)).rstrip()
        for line in table
    )


def extents_as_json(name: str, changed: dict[str, list[tuple[int, int]]]) -> str:
    """Members of an extent as in `qemu-img map`."""
    images = [
        {"image": image, "extents": [{"start": start, "length": length} for start, length in extents]}
        for image, extents in changed.items()
    ]
    return json.dumps({"since": name, "images": images}, indent=2)


def extents_as_table(changed: dict[str, list[tuple[int, int]]]) -> str:
    """For people, and for awk."""
    lines = [f"{'OFFSET':>16}  {'LENGTH':>16}" + ("  IMAGE" if len(changed) > 1 else "")]
    for image, extents in changed.items():
        beside = f"  {printable(image)}" if len(changed) > 1 else ""
        lines += [f"{start:>16}  {length:>16}{beside}" for start, length in extents]
    return "\n".join(lines)

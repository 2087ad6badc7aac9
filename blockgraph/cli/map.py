# SPDX-FileCopyrightText: blockgraph contributors
# SPDX-License-Identifier: MIT
"""`blockgraph map IMAGE`: where the bytes of an image lie, layer by layer.

JSON has the members of `qemu-img map --output=json`:

    start, length   the range, bytes
    depth           layer that answered: 0 the image, 1 its backing file, ...
    present         that layer has it allocated (data, or explicit zeroes)
    zero            reads as zeroes
    data            occupies storage
    offset          where in the file of that layer; omitted where there is no such place

With `--bitmap NAME` it shows which ranges are dirty in a persistent dirty bitmap instead; members are start, length and
dirty.

Two differences: the end of a raw image is not rounded up to sectors; and the table for people shows compressed
clusters instead of ending with an error at the first.
"""

from __future__ import annotations

import asyncio
import os
from argparse import Namespace, _SubParsersAction
from collections.abc import AsyncIterator
from dataclasses import dataclass, replace
from typing import Any

from blockgraph.bitmaps.actions import find_on
from blockgraph.cli.images import add_image_arguments, looked_at
from blockgraph.cli.text import size_argument
from blockgraph.driver import Format
from blockgraph.extent import Extent, Status
from blockgraph.formats.qcow2 import Qcow2
from blockgraph.node import Node


@dataclass(frozen=True)
class MapEntry:
    """One range; see the module's text.

    Attributes:
        filename: of the file that `offset` is in.
    """

    start: int
    length: int
    depth: int
    present: bool
    zero: bool
    data: bool
    offset: int | None = None
    filename: str | None = None

    def follows(self, other: MapEntry) -> bool:
        """It goes on exactly where `other`, its neighbour, ends."""
        end = None if other.offset is None else other.offset + other.length
        return self.offset == end and (self.depth, self.present, self.zero, self.data, self.filename) == (
            other.depth,
            other.present,
            other.zero,
            other.data,
            other.filename,
        )

    def to_json(self) -> str:
        """One line, as qemu-img writes it."""
        words = {True: "true", False: "false"}
        text = (
            f'{{ "start": {self.start}, "length": {self.length}, "depth": {self.depth}, '
            f'"present": {words[self.present]}, "zero": {words[self.zero]}, "data": {words[self.data]}'
        )
        return text + (f', "offset": {self.offset}}}' if self.offset is not None else "}")

    def to_row(self) -> str:
        """A row of the table: what holds data."""
        mapped = "compressed" if self.offset is None else _hex(self.offset)
        return f"{_hex(self.start):<16}{_hex(self.length):<16}{mapped:<16}{self.filename or ''}".rstrip()


def _hex(number: int) -> str:
    return f"{number:#x}" if number else "0"


def register(subparsers: _SubParsersAction[Any]) -> None:
    """Add the command."""
    parser = subparsers.add_parser(
        "map", help="show where the bytes of an image lie", description="Show where the bytes of an image lie."
    )
    add_image_arguments(parser)
    parser.add_argument("--start-offset", type=size_argument, default=0, metavar="BYTES", help="begin here")
    parser.add_argument("--max-length", type=size_argument, metavar="BYTES", help="show no more than this")
    parser.add_argument("--bitmap", metavar="NAME", help="show what is dirty in this bitmap of the image instead")
    parser.set_defaults(run=run)


def run(args: Namespace) -> int:
    """Print it; the exit status."""
    asyncio.run(_run(args))
    return 0


async def _run(args: Namespace) -> None:
    async with looked_at(args) as backend:
        size = backend.size()
        end = size if args.max_length is None else min(size, args.start_offset + args.max_length)
        if args.bitmap is not None:
            print(_dirty(backend.node, args.bitmap, args.start_offset, end, as_json=args.json))
            return
        entries = image_map(backend.node, args.start_offset, end)
        if not args.json:
            print(f"{'Offset':<16}{'Length':<16}{'Mapped to':<16}File")
            async for entry in entries:
                if entry.data and not entry.zero:
                    print(entry.to_row())
            return
        opening = "["
        async for entry in entries:
            print(opening + entry.to_json(), end="")
            opening = ",\n"
        if opening == "[":  # an empty range is one empty entry
            print(opening + MapEntry(args.start_offset, 0, 0, False, False, False).to_json(), end="")
        print("]")


def _dirty(node: Node, name: str, start: int, end: int, *, as_json: bool) -> str:
    bitmap = find_on(node, name)
    bitmap.check_usable("map")
    extents = bitmap.contents().dirty_extents(min(start, end), end)
    if as_json:
        rows = [f'{{ "start": {offset}, "length": {length}, "dirty": true}}' for offset, length in extents]
        return "[" + ",\n".join(rows) + "]"
    head = f"{'Offset':<16}Length"
    return "\n".join([head, *(f"{_hex(offset):<16}{_hex(length)}" for offset, length in extents)])


async def image_map(top: Node, start: int, end: int) -> AsyncIterator[MapEntry]:
    """The range [start, end) of a node, equal neighbours merged."""
    last: MapEntry | None = None
    preallocated: dict[Node, bool] = {}
    while start < end:
        entry = await _entry(top, start, end - start, preallocated)
        start += entry.length
        if last is None:
            last = entry
        elif entry.follows(last):
            last = replace(last, length=last.length + entry.length)
        else:
            yield last
            last = entry
    if last is not None:
        yield last


async def _entry(node: Node, offset: int, length: int, preallocated: dict[Node, bool]) -> MapEntry:
    """What is known from `offset` on: down the layers until one answers.

    Args:
        preallocated: what `_preallocated` said of the nodes it was asked about.
    """
    depth = 0
    while True:
        driver = node.driver
        assert isinstance(driver, Format)
        if driver.transparent:
            found = await node.block_status(offset, length)
            name = found.host.driver.filename() if found.host is not None else None
            return MapEntry(offset, found.length, depth, True, found.zero, found.data, found.host_offset, name)
        extent = await _map(node, offset, length)
        if extent.status is not Status.UNALLOCATED:
            if extent.status is Status.DATA and node not in preallocated:
                preallocated[node] = await _preallocated(node)
            return await _allocated(extent, depth, ask_file=preallocated.get(node, False))
        length = extent.length
        cow = driver.cow()
        if cow is None or offset >= cow.node.size():
            return MapEntry(offset, length, depth, False, True, False)
        node = cow.node
        length = min(length, node.size() - offset)
        depth += 1


async def _map(node: Node, offset: int, length: int) -> Extent:
    request = await node.begin(offset, length)
    try:
        return (await node.map(offset, length)).clip(offset, length)
    finally:
        node.end(request)


async def _allocated(extent: Extent, depth: int, *, ask_file: bool) -> MapEntry:
    """What a format has allocated; `ask_file`: the file knows better whether its data are zeroes."""
    offset, length = extent.offset, extent.length
    zero = extent.status is Status.ZERO
    if extent.child is None:
        return MapEntry(offset, length, depth, True, zero, not zero)
    data = not zero
    if data and ask_file:
        below = await extent.child.block_status(extent.child_offset, length)
        length, zero = below.length, below.zero
    filename = extent.child.node.driver.filename()
    return MapEntry(offset, length, depth, True, zero, data, extent.child_offset, filename)


async def _preallocated(node: Node) -> bool:
    """Clusters were given room before they were written: only the file knows which of them hold data.

    As in QEMU this is told from the room that the file really takes: a tenth less than its clusters is suspicious.
    Otherwise a hole in the file is but a page of zeroes inside a cluster, and not worth an entry.
    """
    driver = node.driver
    if not isinstance(driver, Qcow2) or (fd := driver.file.node.driver.fd()) is None:
        return False
    real = os.fstat(fd).st_blocks * 512 // driver.image.cluster_size
    return await driver.refcounts.count_used() >= max(real * 10 // 9, real + 2)

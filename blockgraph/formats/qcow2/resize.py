# SPDX-FileCopyrightText: blockgraph contributors
# SPDX-License-Identifier: MIT
"""Resizing: a grown area reads as zeroes, whatever a longer backing file or an earlier, longer disk has there."""

from __future__ import annotations

from typing import TYPE_CHECKING

from blockgraph.errors import OutOfRange
from blockgraph.extent import Status
from blockgraph.flags import Flag
from blockgraph.formats.qcow2.header import MAX_L1_BYTES, l1_entries
from blockgraph.formats.qcow2.zeroes import Mode, rewrite

if TYPE_CHECKING:
    from blockgraph.formats.qcow2.driver import Qcow2


async def resize(driver: Qcow2, size: int) -> None:
    """Change the disk's size, durably.

    Raises:
        OutOfRange: `size` is no multiple of 512, or more than an L1 table reaches.
        NoSpace: no room for a larger L1 table; the size is as it was.
    """
    image = driver.image
    if size % 512:
        raise OutOfRange(f"{size} bytes are not a multiple of 512", node=image.node.name, op="truncate")
    entries = l1_entries(size, image.cluster_bits)
    if entries * 8 > MAX_L1_BYTES:
        raise OutOfRange(
            f"{size} bytes are too much for clusters of {image.cluster_size} bytes",
            node=image.node.name,
            op="truncate",
            hint="convert the image to a larger cluster size",
        )
    image.check_writable()
    old = driver.size()
    if size > old:
        await driver.mapping.grow_l1(entries)
        await _zero_grown(driver, old, size)
        await _set_size(driver, size)
    else:
        first, end = -(-size >> image.cluster_bits), driver.mapping.l1_size << image.l2_bits
        if image.header.version >= 3 or not driver.backed:
            # Nothing is left to come back when a crash, or another program, makes the disk longer again. Version 2 has
            # no zeroes to put over a backing file: emptied before the size is durable, its bytes would show.
            await rewrite(driver, first, end, Mode.EMPTY)
        await _set_size(driver, size)
        await rewrite(driver, first, end, Mode.CUT_OFF)
        await driver.mapping.drop_tables(entries)


async def _set_size(driver: Qcow2, size: int) -> None:
    """Put the size into the header, when the tables as they are now are durable: a crash never leaves the new size with
    what a backing file, or the longer disk of before, has in the area; nor the old size with a backing file's bytes."""
    header, old = driver.image.header, driver.size()
    header.size = size
    try:
        await driver.writeback.run()
    except BaseException:
        header.size = old
        raise
    driver.resized(size)


async def _zero_grown(driver: Qcow2, old: int, new: int) -> None:
    """Make [old, new) read as zeroes: nothing there may be left over, and no backing file may show through."""
    image = driver.image
    start = -(-old >> image.cluster_bits)
    boundary = min(start << image.cluster_bits, new)
    backing = driver.cow()
    if old < boundary:
        extent = (await driver.map(old, boundary - old)).clip(old, boundary - old)
        if extent.status in (Status.DATA, Status.SPECIAL) or (
            extent.status is Status.UNALLOCATED and backing is not None and backing.node.size() > old
        ):
            await driver.pwrite(old, memoryview(bytes(boundary - old)), Flag.NONE)
    await rewrite(driver, start, -(-new >> image.cluster_bits), Mode.CUT_OFF)
    end = new if backing is None else min(new, max(backing.node.size(), boundary))
    end = -(-end >> image.cluster_bits)
    if driver.backed and start < end:
        await _zero_clusters(driver, start, end)


async def _zero_clusters(driver: Qcow2, start: int, end: int) -> None:
    if driver.image.header.version >= 3:
        await rewrite(driver, start, end, Mode.ZERO_UNMAP)
        return
    bits = driver.image.cluster_bits
    step = max(1, (1 << 20) >> bits)
    zeroes = memoryview(bytes(step << bits))
    for first in range(start, end, step):
        last = min(first + step, end)
        await driver.pwrite(first << bits, zeroes[: (last - first) << bits], Flag.NONE)

# SPDX-FileCopyrightText: blockgraph contributors
# SPDX-License-Identifier: MIT
"""Allocation, the order of metadata writes, and when freed clusters may be used again."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from typing import Any, NamedTuple

import pytest
from helpers.harness import EVERYTHING, edge, hold, make_node, read, write
from helpers.held import Call, HeldMemory
from helpers.loop import in_loop
from helpers.qcow2 import memory_image, over

from blockgraph.errors import CorruptImage, IOFailure, NoSpace
from blockgraph.extent import Status
from blockgraph.flags import Flag
from blockgraph.formats.qcow2 import Qcow2, create_image
from blockgraph.formats.qcow2.header import AUTOCLEAR
from blockgraph.node import Child, Node

CLUSTER = 65536


class Disk(NamedTuple):
    """A qcow2 disk over memory."""

    edge: Child
    driver: Qcow2
    file: HeldMemory

    def data(self) -> tuple[list[Call], dict[int, str]]:
        """Calls so far, and what the clusters of the file are: by host offset."""
        kinds = {0: "header"}
        header = self.driver.image.header
        for at in range(-(-header.reftable_clusters * header.cluster_size // header.cluster_size)):
            kinds[header.reftable_offset + at * header.cluster_size] = "reftable"
        for at in range(header.l1_offset, header.l1_offset + header.l1_size * 8, header.cluster_size):
            kinds[at] = "l1"
        kinds |= dict.fromkeys(self.driver.refcounts.table_offsets(), "counts")
        kinds |= dict.fromkeys(self.driver.mapping.l1_offsets(), "l2")
        return self.file.calls, kinds

    def steps(self) -> list[str]:
        """Writes since the calls were last cleared, as words; the same word only once in a row."""
        calls, kinds = self.data()
        size = self.driver.image.cluster_size
        words: list[str] = []
        for call in calls:
            if call.op in ("pwrite", "flush"):
                word = call.op if call.op == "flush" else kinds.get(call.offset // size * size, "data")
                if not words or words[-1] != word:
                    words.append(word)
        return words


@asynccontextmanager
async def disk(size: int = 64 << 20, *, options: dict[str, Any] | None = None, **image: Any) -> AsyncIterator[Disk]:
    """A new image, opened."""
    file = await memory_image(size, driver=HeldMemory, **image)
    async with over(file, **(options or {})) as driver:
        assert isinstance(file.driver, HeldMemory)
        file.driver.calls.clear()
        yield Disk(edge(driver.node), driver, file.driver)


@in_loop
async def test_allocate_large_request_is_one_contiguous_extent() -> None:
    async with disk() as d:
        allocation = await d.driver.allocate(0, 16 << 20)
        assert allocation.extent.length == 16 << 20
        assert allocation.extent.child is d.driver.file
        await write(d.driver.file, allocation.extent.child_offset, b"a" * (16 << 20))
        assert (await d.driver.map(0, 1)).status is Status.UNALLOCATED
        await allocation.commit()
        extent = await d.driver.map(0, 1)
        assert (extent.offset, extent.length, extent.writable) == (0, 16 << 20, True)


@in_loop
async def test_allocate_abort_leaves_old_contents_and_gives_clusters_back() -> None:
    async with disk() as d:
        allocation = await d.driver.allocate(100, 3 * CLUSTER)
        host = allocation.extent.child_offset
        await allocation.abort()
        assert await read(d.edge, 0, 4096) == bytes(4096)
        again = await d.driver.allocate(100, 3 * CLUSTER)
        await again.abort()
        await d.edge.flush()
        third = await d.driver.allocate(100, 3 * CLUSTER)
        assert third.extent.child_offset == host
        await third.abort()


@in_loop
async def test_allocate_same_cluster_waits_other_cluster_does_not() -> None:
    async with disk() as d:
        first = await d.driver.allocate(0, 100)
        other = await asyncio.wait_for(d.driver.allocate(CLUSTER, 100), 10)
        same = asyncio.create_task(write(d.edge, 200, b"b" * 100))
        zero = asyncio.create_task(d.edge.pwrite_zeroes(0, CLUSTER))
        await write(d.edge, 5 * CLUSTER, b"x")
        await write(d.edge, 6 * CLUSTER, b"x")
        assert not same.done()
        assert not zero.done()
        await write(d.driver.file, first.extent.child_offset, b"a" * 100)
        await first.commit()
        await other.abort()
        await same
        await zero
        assert await read(d.edge, 0, 100) == bytes(100)


@in_loop
async def test_writes_to_one_new_cluster_at_once_all_arrive() -> None:
    async with disk() as d:
        await asyncio.gather(*(write(d.edge, i * 512, bytes([i + 1]) * 512) for i in range(128)))
        assert await read(d.edge, 0, CLUSTER) == b"".join(bytes([i + 1]) * 512 for i in range(128))
        assert d.driver.mapping.run((await d.driver.mapping.table(0)), 0, 1).clusters == 1  # type: ignore[arg-type]


@in_loop
async def test_write_in_place_touches_no_metadata() -> None:
    async with disk() as d:
        await write(d.edge, 0, b"a" * CLUSTER)
        await d.edge.flush()
        d.file.calls.clear()
        await write(d.edge, 4096, b"b" * 4096)
        await d.edge.flush()
        assert [call.op for call in d.file.calls] == ["pwrite", "flush"]
        assert d.file.calls[0].length == 4096


@in_loop
async def test_small_first_write_to_fresh_cluster_writes_only_the_data() -> None:
    async with disk() as d:
        await write(d.edge, 8192, b"a" * 4096)
        assert [call.length for call in d.file.calls if call.op == "pwrite"] == [4096]


@in_loop
async def test_flush_with_nothing_dirty_writes_nothing() -> None:
    async with disk() as d:
        await write(d.edge, 0, b"a" * 4096)
        await d.edge.flush()
        d.file.calls.clear()
        await d.edge.flush()
        await d.driver.flush()
        assert [call.op for call in d.file.calls if call.op == "pwrite"] == []


@in_loop
async def test_open_and_read_and_close_write_nothing() -> None:
    async with disk() as d:
        await read(d.edge, 0, 1 << 20)
        await d.edge.flush()
    assert [call.op for call in d.file.calls if call.op != "pread"] == []


@in_loop
async def test_write_back_order_is_counts_then_l2_then_l1() -> None:
    async with disk() as d:
        await write(d.edge, 0, b"a" * 4096)
        await d.edge.flush()
        assert d.steps() == ["data", "counts", "flush", "l2", "flush", "l1", "flush"]
        d.file.calls.clear()
        await write(d.edge, CLUSTER, b"a" * 4096)
        await d.edge.flush()
        assert d.steps() == ["data", "counts", "flush", "l2", "flush"]


@in_loop
async def test_write_back_order_with_new_refcount_block_and_larger_table() -> None:
    async with disk(20 << 20, cluster_size=512) as d:
        await write(d.edge, 0, b"a" * (100 << 10))
        await d.edge.flush()
        d.file.calls.clear()
        await write(d.edge, 1 << 20, b"a" * (64 << 10))  # passes 128 KiB of the file: one more block
        await d.edge.flush()
        assert d.steps() == ["data", "counts", "flush", "reftable", "flush", "l2", "flush", "l1", "flush"]
        for offset in range(2 << 20, 12 << 20, 128 << 10):
            await d.edge.flush()
            d.file.calls.clear()
            await write(d.edge, offset, b"a" * (128 << 10))
            if d.driver.image.header.reftable_clusters > 1:
                break
        await d.edge.flush()
        assert d.steps()[1:] == [
            "counts", "flush", "reftable", "flush", "header", "flush", "l2", "flush", "l1", "flush",
        ]  # fmt: skip


@in_loop
async def test_write_back_order_of_growth_writes_header_last() -> None:
    async with disk(1 << 20, cluster_size=512) as d:
        await write(d.edge, 0, b"a" * 512)
        await d.edge.truncate(20 << 20)
        steps = d.steps()
        assert steps[-6:] == ["l2", "flush", "l1", "flush", "header", "flush"]
        await write(d.edge, 10 << 20, b"a" * 512)
        await d.edge.flush()
        d.file.calls.clear()
        await d.edge.truncate(512)
        await d.edge.flush()
        steps = d.steps()
        assert steps.index("header") < steps.index("l1")


@in_loop
async def test_l1_table_left_behind_is_free_once_the_header_points_elsewhere_and_not_before() -> None:
    async with disk(1 << 20, cluster_size=512) as d:
        header = d.driver.image.header
        old = header.l1_offset
        await write(d.edge, 0, b"a" * 512)
        await d.edge.flush()
        await d.driver.mapping.grow_l1(1024)
        assert header.l1_offset != old
        for i in range(1, 40):
            await write(d.edge, i * 512, b"b" * 512)
            assert (await d.driver.map(i * 512, 1)).child_offset != old
        await d.edge.flush()
        places = set()
        for i in range(40, 80):
            await write(d.edge, i * 512, b"c" * 512)
            places.add((await d.driver.map(i * 512, 1)).child_offset)
        assert old in places


@in_loop
async def test_autoclear_bits_are_durably_gone_before_anything_else_is_written() -> None:
    file = await memory_image(1 << 20, driver=HeldMemory)
    await write(edge(file), AUTOCLEAR, (1 << 63 | 1).to_bytes(8, "big"))
    memory = file.driver
    assert isinstance(memory, HeldMemory)
    async with over(file) as driver:
        memory.calls.clear()
        await write(edge(driver.node), 0, b"a" * CLUSTER)
        changes = [call for call in memory.calls if call.op in ("pwrite", "flush")]
        assert [(call.op, call.offset, call.length) for call in changes[:2]] == [
            ("pwrite", AUTOCLEAR, 8),
            ("flush", 0, 0),
        ]


@in_loop
async def test_freed_cluster_not_reused_before_unlinking_is_durable() -> None:
    async with disk() as d:
        await write(d.edge, 0, b"a" * CLUSTER)
        await d.edge.flush()
        old = (await d.driver.map(0, 1)).child_offset
        await d.edge.discard(0, CLUSTER)
        await write(d.edge, CLUSTER, b"b" * CLUSTER)
        assert (await d.driver.map(CLUSTER, 1)).child_offset != old
        await d.edge.flush()
        await write(d.edge, 2 * CLUSTER, b"c" * CLUSTER)
        assert (await d.driver.map(2 * CLUSTER, 1)).child_offset == old


@in_loop
async def test_freed_cluster_not_reused_while_a_read_of_it_is_in_flight() -> None:
    async with disk() as d:
        await write(d.edge, 0, b"a" * CLUSTER)
        await d.edge.flush()
        old = (await d.driver.map(0, 1)).child_offset
        with d.file.hold(lambda call: call.op == "pread" and call.offset == old) as held:
            reading = asyncio.create_task(read(d.edge, 0, CLUSTER))
            await held.arrived.wait()
            await d.edge.discard(0, CLUSTER)
            await d.edge.flush()
            for i in range(1, 20):
                await write(d.edge, i * CLUSTER, b"b" * CLUSTER)
                await d.edge.flush()
            held.release()
            assert await reading == b"a" * CLUSTER
        await write(d.edge, 30 * CLUSTER, b"c" * CLUSTER)
        await d.edge.flush()
        await write(d.edge, 31 * CLUSTER, b"c" * CLUSTER)
        hosts = [(await d.driver.map(i * CLUSTER, 1)).child_offset for i in (30, 31)]
        assert old in hosts


@in_loop
async def test_freed_clusters_are_discarded_below_only_when_asked() -> None:
    for wanted in (True, False):
        async with disk(options={"pass_discard_request": wanted}) as d:
            await write(d.edge, 0, b"a" * (4 * CLUSTER))
            await d.edge.discard(0, 4 * CLUSTER)
            await d.edge.flush()
            await d.driver.flush()
            assert [call.length for call in d.file.calls if call.op == "discard"] == ([4 * CLUSTER] if wanted else [])


@pytest.mark.parametrize("failing", [False, True])
@in_loop
async def test_neighbours_freed_one_by_one_are_discarded_together_and_free_in_any_case(failing: bool) -> None:
    async with disk() as d:
        await write(d.edge, 0, b"a" * (6 * CLUSTER))
        await d.edge.flush()
        first = (await d.driver.map(0, 1)).child_offset
        for cluster in (3, 0, 2, 5, 1):
            await d.edge.discard(cluster * CLUSTER, CLUSTER)
        d.file.fail = lambda call: failing and call.op == "discard" and call.offset == first
        await d.edge.flush()
        discards = [call for call in d.file.calls if call.op == "discard"]
        assert discards == [("discard", first, 4 * CLUSTER), ("discard", first + 5 * CLUSTER, CLUSTER)]
        for cluster in range(10, 15):
            await write(d.edge, cluster * CLUSTER, b"b" * CLUSTER)
        hosts = set()
        for cluster in range(10, 15):
            extent = await d.driver.map(cluster * CLUSTER, 1)
            hosts.add(extent.child_offset + cluster * CLUSTER - extent.offset)
        assert hosts == {first + n * CLUSTER for n in (0, 1, 2, 3, 5)}
        assert await read(d.edge, 4 * CLUSTER, CLUSTER) == b"a" * CLUSTER


@in_loop
async def test_failed_write_back_is_repeated_by_the_next_flush() -> None:
    file = await memory_image(1 << 20, driver=HeldMemory)
    memory = file.driver
    assert isinstance(memory, HeldMemory)
    async with over(file) as driver:
        disk_edge = edge(driver.node)
        await write(disk_edge, 0, b"a" * 5000)
        for number in range(12):
            writes = [call for call in memory.calls if call.op in ("pwrite", "flush")]
            seen = 0

            def fail(call: Call, last: int = number) -> bool:
                nonlocal seen
                seen += call.op in ("pwrite", "flush")
                return seen == last + 1

            memory.fail = fail
            await write_or_fail(disk_edge, number * CLUSTER)
            memory.fail = lambda call: False
            assert writes
        await disk_edge.flush()
    async with over(file, read_only=True) as driver:
        assert (await read(edge(driver.node), 0, 10)) in (b"a" * 10, b"n" * 10)
        assert driver.image.damaged is None


async def write_or_fail(disk_edge: Child, offset: int) -> None:
    with suppress(IOFailure):
        await write(disk_edge, offset, b"n" * 100)
        await disk_edge.flush()


@in_loop
async def test_cancelled_write_gives_its_cluster_back() -> None:
    async with disk() as d:
        with d.file.hold(lambda call: call.op == "pwrite") as held:
            writing = asyncio.create_task(write(d.edge, 0, b"a" * 100))
            await held.arrived.wait()
            writing.cancel()
            with pytest.raises(asyncio.CancelledError):
                await writing
        await write(d.edge, 0, b"b" * 100)
        assert await read(d.edge, 0, 101) == b"b" * 100 + b"\0"


@in_loop
async def test_cancelled_flush_goes_on() -> None:
    async with disk() as d:
        await write(d.edge, 0, b"a" * 100)
        with d.file.hold(lambda call: call.op == "flush") as held:
            flushing = asyncio.create_task(d.edge.flush())
            await held.arrived.wait()
            flushing.cancel()
            with pytest.raises(asyncio.CancelledError):
                await flushing
            assert d.edge.node.busy
        await d.edge.node.wait_idle()
        assert d.steps()[-1] == "flush"
        assert "l1" in d.steps()


@in_loop
async def test_flush_that_began_before_a_write_does_not_count_for_it() -> None:
    async with disk() as d:
        await write(d.edge, 0, b"a" * 100)
        with d.file.hold(lambda call: call.op == "flush") as held:
            first = asyncio.create_task(d.driver.flush())
            await held.arrived.wait()
            await write(d.edge, CLUSTER, b"b" * 100)
            d.file.calls.clear()
            second, third = asyncio.create_task(d.driver.flush()), asyncio.create_task(d.driver.flush())
            await write(d.edge, 0, b"c")
            held.release()
            await asyncio.gather(first, second, third)
        steps = d.steps()
        assert steps[-1] == "flush"
        assert steps.count("l2") == 2
        assert steps.count("counts") == 1


class Fixed(HeldMemory):
    """Storage that can not grow."""

    growable = False

    async def truncate(self, size: int) -> None:
        raise self.unsupported("truncate")


async def fixed_image() -> Node:
    """A new image in room for its metadata and one cluster."""
    file = make_node(Fixed, "fixed", size=6 * CLUSTER)
    await file.driver.open()
    await hold(file, EVERYTHING)
    await create_image(edge(file), 1 << 20)
    return file


@in_loop
async def test_full_storage_waits_for_room_that_is_about_to_be_free() -> None:
    file = await fixed_image()
    memory = file.driver
    assert isinstance(memory, HeldMemory)
    async with over(file) as driver:
        disk_edge = edge(driver.node)
        await write(disk_edge, 0, b"a" * 100)
        await disk_edge.discard(0, CLUSTER)
        with memory.hold(lambda call: call.op == "discard") as held:
            flushing = asyncio.create_task(disk_edge.flush())
            await held.arrived.wait()
            writing = asyncio.create_task(write(disk_edge, CLUSTER, b"b" * 100))
            for _ in range(20):
                await asyncio.sleep(0)
            assert not writing.done()
            held.release()
            await writing
            await flushing
        assert await read(disk_edge, 0, CLUSTER + 100) == bytes(CLUSTER) + b"b" * 100
        with pytest.raises(NoSpace, match="can not grow"):
            await write(disk_edge, 2 * CLUSTER, b"c" * 100)


@in_loop
async def test_storage_full_fails_the_write_and_keeps_the_image_whole() -> None:
    file = await fixed_image()
    async with over(file) as driver:
        disk_edge = edge(driver.node)
        await write(disk_edge, 0, b"a" * 100)
        with pytest.raises(NoSpace, match="can not grow"):
            await write(disk_edge, CLUSTER, b"b" * 100)
        assert await read(disk_edge, 0, 100) == b"a" * 100
        await disk_edge.pwrite_zeroes(0, CLUSTER, Flag.MAY_UNMAP)
        await disk_edge.flush()
        await write(disk_edge, CLUSTER, b"b" * 100)
        assert await read(disk_edge, CLUSTER, 101) == b"b" * 100 + b"\0"


@in_loop
async def test_dirty_tables_stay_bounded_without_any_flush_of_the_guest() -> None:
    options = {"l2_cache_size": 16 * 512, "refcount_cache_size": 8 * 512}
    async with disk(16 << 20, cluster_size=512, options=options) as d:
        for offset in range(0, 16 << 20, 1 << 16):
            await write(d.edge, offset, b"a" * 512)
            assert d.driver.mapping.tables.size <= 20 * 512
            assert d.driver.refcounts.blocks.size <= 16 * 512
        assert await read(d.edge, (16 << 20) - 65536, 513) == b"a" * 512 + b"\0"


@in_loop
async def test_entry_that_leads_to_metadata_is_not_written_through() -> None:
    async with disk(1 << 20) as d:
        await write(d.edge, 0, b"a" * CLUSTER)
        l2 = d.driver.mapping.l1_offsets()[0]
    copied = (1 << 63) | d.driver.image.header.reftable_offset
    await write(edge(d.file.node), l2 + 8, copied.to_bytes(8, "big"))
    async with over(d.file.node) as driver:
        disk_edge = edge(driver.node)
        await read(disk_edge, CLUSTER, 10)
        await write(disk_edge, 0, b"b")
        with pytest.raises(CorruptImage, match="metadata"):
            await write(disk_edge, CLUSTER, b"b" * 10)
        await disk_edge.discard(CLUSTER, CLUSTER)
        await disk_edge.flush()
        await write(disk_edge, 2 * CLUSTER, b"c" * CLUSTER)
        assert await read(disk_edge, 2 * CLUSTER, CLUSTER) == b"c" * CLUSTER


@in_loop
async def test_metadata_counted_as_free_stops_all_writes_and_sets_the_corrupt_bit() -> None:
    async with disk(1 << 20) as d:
        await write(d.edge, 0, b"a" * 100)
        counts = d.driver.refcounts.table_offsets()[0]
    await write(edge(d.file.node), counts, bytes(2 * 6))
    async with over(d.file.node) as driver:
        disk_edge = edge(driver.node)
        with pytest.raises(CorruptImage, match="refcount of the metadata cluster"):
            await write(disk_edge, CLUSTER, b"b")
        with pytest.raises(CorruptImage, match="no longer written"):
            await write(disk_edge, 2 * CLUSTER, b"b")
        assert await read(disk_edge, 0, 100) == b"a" * 100
    with pytest.raises(CorruptImage, match="marked as corrupt"):
        async with over(d.file.node):
            pass
    async with over(d.file.node, read_only=True) as driver:
        assert await read(edge(driver.node), 0, 100) == b"a" * 100

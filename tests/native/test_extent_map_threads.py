# SPDX-FileCopyrightText: blockgraph contributors
# SPDX-License-Identifier: MIT
"""Native readers and writers on one extent map while its mappings move: every byte is checked.

native/tests/test_extent_map_threads.c does the same without Python's lock in between, under ThreadSanitizer.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from blockgraph.native import Bitmap, ExtentMap, MapExtent
from blockgraph.native.extent_map import MIN_MEMORY

REGION = 16 << 20
BLOCK = 4096


class Disk:
    """Blocks of two files behind a map: what a backend and its drivers do on a miss, under one lock."""

    BLOCKS = 64

    def __init__(self) -> None:
        # Half of the blocks are in the next region.
        self.base = REGION - self.BLOCKS // 2 * BLOCK
        self.map = ExtentMap(2 * REGION, MIN_MEMORY)
        self.bitmap = Bitmap(2 * REGION, BLOCK)
        self.map.settle_blocking(self.map.start_set_bitmaps([self.bitmap]))
        self.files = [os.memfd_create("blockgraph") for _ in range(2)]
        self.slots = [self.map.add_slot(file) for file in self.files]
        self.lock = threading.Lock()
        self.where = {block: (0, block * BLOCK) for block in range(self.BLOCKS)}
        self.ends = [self.BLOCKS * BLOCK, 0]
        self.versions = dict.fromkeys(range(self.BLOCKS), 0)
        for block in range(self.BLOCKS):
            self.write(block, 0)

    def extent(self, block: int) -> MapExtent:
        file, place = self.where[block]
        return MapExtent(self.base + block * BLOCK, BLOCK, self.slots[file], place, True)

    def write(self, block: int, version: int) -> None:
        data = (block.to_bytes(4, "little") + version.to_bytes(4, "little")) * (BLOCK // 8)
        offset = self.base + block * BLOCK
        if not self.map.pwrite(offset, data):
            with self.lock:
                file, place = self.where[block]
                os.pwrite(self.files[file], data, place)
                self.bitmap.set(offset, BLOCK)
                self.map.insert(self.map.generation(), [self.extent(block)])
        self.versions[block] = version

    def read(self, block: int) -> int:
        least, buf = self.versions[block], bytearray(BLOCK)
        if not self.map.pread_into(self.base + block * BLOCK, buf):
            with self.lock:
                file, place = self.where[block]
                os.preadv(self.files[file], [buf], place)
                self.map.insert(self.map.generation(), [self.extent(block)])
        words = {bytes(buf[i : i + 8]) for i in range(0, BLOCK, 8)}
        assert {word[:4] for word in words} == {block.to_bytes(4, "little")}
        versions = {int.from_bytes(word[4:], "little") for word in words}
        assert min(versions) >= least
        return max(versions)

    def move(self, blocks: range) -> None:
        with self.lock:
            self.map.settle_blocking(self.map.start_invalidate(self.base + blocks.start * BLOCK, len(blocks) * BLOCK))
            for block in blocks:
                file, place = self.where[block]
                data = os.pread(self.files[file], BLOCK, place)
                os.pwrite(self.files[file], b"\xde" * BLOCK, place)
                self.where[block] = (1 - file, self.ends[1 - file])
                os.pwrite(self.files[1 - file], data, self.ends[1 - file])
                self.ends[1 - file] += BLOCK

    def snapshot(self, blocks: range) -> None:
        """Nothing changes below a protected range before the lock is given back."""
        with self.lock:
            self.map.settle_blocking(self.map.start_protect(self.base + blocks.start * BLOCK, len(blocks) * BLOCK))
            for block in blocks:
                file, place = self.where[block]
                before = os.pread(self.files[file], BLOCK, place)
                assert len({before[i : i + 8] for i in range(0, BLOCK, 8)}) == 1
                assert os.pread(self.files[file], BLOCK, place) == before

    def close(self) -> None:
        for file in self.files:
            os.close(file)


class ConcurrentMachine(RuleBasedStateMachine):
    """Native writers and readers run while the rules move, protect, evict and copy; every byte is checked."""

    def __init__(self) -> None:
        super().__init__()
        self.disk, self.stop, self.failures = Disk(), False, list[BaseException]()
        self.mirror: dict[int, int] = {}
        self.threads = [threading.Thread(target=self.guard, args=(run,)) for run in (self.write_even, self.write_odd)]
        self.threads += [threading.Thread(target=self.guard, args=(self.read_all,)) for _ in range(2)]
        for thread in self.threads:
            thread.start()

    def guard(self, run: Callable[[], None]) -> None:
        try:
            run()
        except BaseException as error:  # shown by the machine's own thread
            self.failures.append(error)

    def write_some(self, blocks: range) -> None:
        version = 0
        while not self.stop:
            version += 1
            for block in blocks:
                self.disk.write(block, version)
                assert self.disk.read(block) == version

    def write_even(self) -> None:
        self.write_some(range(0, Disk.BLOCKS, 2))

    def write_odd(self) -> None:
        self.write_some(range(1, Disk.BLOCKS, 2))

    def read_all(self) -> None:
        while not self.stop:
            for block in range(Disk.BLOCKS):
                self.disk.read(block)

    @rule(first=st.integers(0, Disk.BLOCKS - 1), count=st.integers(1, 8))
    def move(self, first: int, count: int) -> None:
        self.disk.move(range(first, min(first + count, Disk.BLOCKS)))

    @rule(first=st.integers(0, Disk.BLOCKS - 1), count=st.integers(1, 8))
    def snapshot(self, first: int, count: int) -> None:
        self.disk.snapshot(range(first, min(first + count, Disk.BLOCKS)))

    @rule()
    def forget_everything(self) -> None:
        self.disk.map.start_invalidate(0, self.disk.map.size)

    @rule()
    def copy_what_is_dirty(self) -> None:
        while run := self.disk.bitmap.take(max_length=8 * BLOCK):
            first = (run[0] - self.disk.base) // BLOCK
            for block in range(first, first + run[1] // BLOCK):
                self.mirror[block] = self.disk.read(block)
            if len(self.mirror) == Disk.BLOCKS:
                break

    @invariant()
    def no_thread_has_failed(self) -> None:
        assert self.failures == []

    def teardown(self) -> None:
        self.stop = True
        for thread in self.threads:
            thread.join()
        self.no_thread_has_failed()
        self.mirror |= {block: -1 for block in range(Disk.BLOCKS) if block not in self.mirror}
        while run := self.disk.bitmap.take(max_length=BLOCK):
            block = (run[0] - self.disk.base) // BLOCK
            self.mirror[block] = self.disk.read(block)
        assert self.mirror == self.disk.versions
        self.disk.close()


TestConcurrent = ConcurrentMachine.TestCase
TestConcurrent.settings = settings(max_examples=15, stateful_step_count=20, deadline=None)

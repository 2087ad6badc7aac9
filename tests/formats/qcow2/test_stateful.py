# SPDX-FileCopyrightText: blockgraph contributors
# SPDX-License-Identifier: MIT
"""Any sequence of requests, mirrored in a bytearray; QEMU judges what was left on disk."""

from __future__ import annotations

import asyncio
import tempfile
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any

import pytest
from conftest import require_tool
from helpers.harness import EVERYTHING, edge, hold, make_node, read, write
from helpers.held import HeldMemory
from helpers.qcow2 import check, memory_image, over, qemu_img
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from blockgraph.flags import Flag
from blockgraph.node import Child, Node

DISK = 384 << 10
BASES = {"none": 0, "shorter": 250 << 10, "longer": 500 << 10}
SHM = "/dev/shm" if Path("/dev/shm").is_dir() else None

offsets = st.integers(0, 2 * DISK)
lengths = st.one_of(st.integers(1, 600), st.integers(1, 9000), st.integers(1, 200_000))


class Disk(RuleBasedStateMachine):
    """One image in memory; a discard may leave anything that was there, so its range is read back."""

    def __init__(self) -> None:
        super().__init__()
        self.runner = asyncio.Runner()
        self.stack = AsyncExitStack()

    def run(self, work: Any) -> Any:
        return self.runner.run(work)

    @initialize(
        cluster_size=st.sampled_from([512, 2048, 65536]),
        compat=st.sampled_from(["0.10", "1.1"]),
        base=st.sampled_from(list(BASES)),
        caches=st.booleans(),
    )
    def create(self, cluster_size: int, compat: str, base: str, caches: bool) -> None:
        self.run(self._create(cluster_size, compat, BASES[base], caches))

    async def _create(self, cluster_size: int, compat: str, base: int, caches: bool) -> None:
        self.options: dict[str, Any] = {"cache_size": 4 * cluster_size} if caches else {}
        names = {"backing_file": "base.raw", "backing_fmt": "raw"} if base else {}
        self.file = await memory_image(DISK, driver=HeldMemory, cluster_size=cluster_size, compat=compat, **names)
        self.base = bytes((i * 7 + i // 512) % 255 + 1 for i in range(base))
        self.base_node: Node | None = None
        if base:
            self.base_node = make_node("memory", "base", size=base)
            await self.base_node.driver.open()
            await hold(self.base_node, EVERYTHING)
            await write(edge(self.base_node), 0, self.base)
        self.model = bytearray(self.base[:DISK].ljust(DISK, b"\0"))
        await self._open()

    async def _open(self) -> None:
        backing = {"backing": self.base_node} if self.base_node else {}
        driver = await self.stack.enter_async_context(over(self.file, **backing, **self.options))
        self.disk: Child = edge(driver.node)

    def clip(self, offset: int, length: int) -> tuple[int, int]:
        offset %= len(self.model)
        return offset, min(length, len(self.model) - offset)

    @rule(offset=offsets, length=lengths, seed=st.integers(1, 255))
    def write(self, offset: int, length: int, seed: int) -> None:
        offset, length = self.clip(offset, length)
        data = bytes((seed + i // 100) % 256 for i in range(length))
        self.run(write(self.disk, offset, data))
        self.model[offset : offset + length] = data

    @rule(requests=st.lists(st.tuples(offsets, st.integers(1, 5000)), min_size=2, max_size=12))
    def write_at_once(self, requests: list[tuple[int, int]]) -> None:
        """Ranges that do not overlap, in flight together."""

        async def all_of_them() -> None:
            taken: list[tuple[int, int]] = []
            work = []
            for number, (offset, length) in enumerate(requests, 1):
                offset, length = self.clip(offset, length)
                if all(offset + length <= low or high <= offset for low, high in taken):
                    taken.append((offset, offset + length))
                    self.model[offset : offset + length] = bytes([number]) * length
                    work.append(write(self.disk, offset, bytes([number]) * length))
            await asyncio.gather(*work, self.disk.flush())

        self.run(all_of_them())

    @rule(offset=offsets, length=lengths, unmap=st.booleans())
    def write_zeroes(self, offset: int, length: int, unmap: bool) -> None:
        offset, length = self.clip(offset, length)
        self.run(self.disk.pwrite_zeroes(offset, length, Flag.MAY_UNMAP if unmap else Flag.NONE))
        self.model[offset : offset + length] = bytes(length)

    @rule(offset=offsets, length=lengths)
    def discard(self, offset: int, length: int) -> None:
        offset, length = self.clip(offset, length)
        self.run(self.disk.discard(offset, length))
        after = self.run(read(self.disk, offset, length))
        for i, (old, new) in enumerate(zip(self.model[offset : offset + length], after, strict=True)):
            assert new in (old, 0), f"byte {offset + i} became {new}"
        self.model[offset : offset + length] = after

    @rule(sectors=st.integers(1, 2 * DISK // 512))
    def truncate(self, sectors: int) -> None:
        size = sectors * 512
        self.run(self.disk.truncate(size))
        self.model = self.model[:size].ljust(size, b"\0")

    @rule()
    def flush(self) -> None:
        self.run(self.disk.flush())

    @rule()
    def reopen(self) -> None:
        self.run(self._reopen())

    async def _reopen(self) -> None:
        await self.stack.aclose()
        await self._open()

    @rule(offset=offsets, length=lengths)
    def read(self, offset: int, length: int) -> None:
        offset, length = self.clip(offset, length)
        assert self.run(read(self.disk, offset, length)) == self.model[offset : offset + length]

    @rule()
    def map_covers_the_disk_and_tells_the_truth(self) -> None:
        async def walk() -> None:
            offset = 0
            while offset < len(self.model):
                status = await self.disk.block_status(offset, len(self.model) - offset)
                assert status.offset == offset
                if status.zero:
                    assert not any(self.model[offset : offset + status.length])
                offset += status.length

        self.run(walk())

    @invariant()
    def bounded(self) -> None:
        assert not self.disk.node.in_flight

    def teardown(self) -> None:
        try:
            if hasattr(self, "disk"):
                assert self.run(read(self.disk, 0, len(self.model))) == self.model
                self.run(self.stack.aclose())
                self.judge()
        finally:
            self.runner.close()

    def judge(self) -> None:
        with tempfile.TemporaryDirectory(prefix="blockgraph-", dir=SHM) as directory:
            image, raw = Path(directory, "d.qcow2"), Path(directory, "d.raw")
            image.write_bytes(self.run(read(edge(self.file), 0, self.file.size())))
            Path(directory, "base.raw").write_bytes(self.base)
            raw.write_bytes(self.model)
            check(image)
            qemu_img("compare", "-f", "qcow2", "-F", "raw", image, raw)


TestDisk = pytest.mark.timeout(300)(Disk.TestCase)
TestDisk.settings = settings(
    max_examples=60, stateful_step_count=25, deadline=None, suppress_health_check=list(HealthCheck)
)


def setup_module() -> None:
    require_tool("qemu-img")

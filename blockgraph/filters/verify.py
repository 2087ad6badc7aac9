# SPDX-FileCopyrightText: blockgraph contributors
# SPDX-License-Identifier: MIT
"""verify (alias blkverify): a filter that keeps two children equal and compares everything it reads.

A new format under test beside one that is trusted: the first byte in which they differ fails the read, with its offset.

                      +--test--> qcow2 --> disk.qcow2
        guest --> verify
                      +--raw---> disk.raw

Options:

    test    the child under test
    raw     the child that is trusted: block status, and what the node is, come from it

Example:

    [[nodes]]
    node-name = "both"
    driver = "verify"
    test = {driver = "qcow2", file = {driver = "file", filename = "disk.qcow2"}}
    raw = {driver = "file", filename = "disk.raw"}

Both children must have the same size, and the same contents to begin with.

A write that fails on exactly one side, or with different error numbers, is a mismatch too. Discards are dropped: they
may leave different bytes. Overlapping requests go one after the other, or a read could see a write on one side only.

Limits: nothing is compared that is not read. Write-zeroes without fallback is never possible.
Source: QEMU BlockdevOptionsBlkverify.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Mapping

from blockgraph.driver import ChildSpec, Filter
from blockgraph.errors import GraphError, IOFailure
from blockgraph.filters.range_lock import RangeLock
from blockgraph.flags import Flag
from blockgraph.node import Child
from blockgraph.options import NodeOptions, NodeRef
from blockgraph.perm import Perm, Role, filtered_child

#: Bytes compared at a time.
_CHUNK = 64 << 10


class VerifyOptions(NodeOptions, kw_only=True, frozen=True):
    """See the module's text."""

    test: NodeRef
    raw: NodeRef


class Verify(Filter):
    """See the module's text."""

    name = "verify"
    aliases = ("blkverify",)
    children = {"test": ChildSpec(Role.DATA), "raw": ChildSpec(Role.FILTERED | Role.PRIMARY)}
    Options = VerifyOptions
    options: VerifyOptions

    test: Child
    raw: Child

    # Control path.

    async def open(self) -> None:
        self.file = self.raw
        self._ranges = RangeLock()

    async def attached(self) -> None:
        self.file = self.raw
        await super().attached()
        test, raw = self.test.node, self.file.node
        if test.size() != raw.size():
            raise GraphError(
                f"test '{test.name}' has {test.size()} bytes, raw '{raw.name}' has {raw.size()}",
                node=self.node.name,
                hint="make them the same size",
            )
        self.growable = self.growable and test.driver.growable

    @classmethod
    def known_size(cls, options: NodeOptions, sizes: Mapping[str, int]) -> int | None:
        if sizes.get("test", sizes.get("raw")) != sizes.get("raw", sizes.get("test")):
            raise GraphError(f"test has {sizes['test']} bytes, raw {sizes['raw']}", node="test")
        return sizes.get("raw")

    @classmethod
    def child_perm(
        cls, options: NodeOptions, name: str, need: Perm, share: Perm, *, read_only: bool
    ) -> tuple[Perm, Perm]:
        """Both sides alike; nobody may write behind the comparison."""
        need, share = filtered_child(need, share)
        return need, share & ~(Perm.WRITE | Perm.RESIZE)

    # Data path.

    async def pread(self, offset: int, buf: memoryview) -> None:
        other = memoryview(bytearray(len(buf)))
        async with self._ranges.hold(offset, len(buf), exclusive=False):
            await self._both("pread", offset, len(buf), self.test.pread(offset, other), self.file.pread(offset, buf))
        at = first_difference(other, buf)
        if at is not None:
            raise IOFailure(
                f"contents differ at offset {offset + at}: "
                f"test '{self.test.node.name}' has {other[at]:#04x}, raw '{self.file.node.name}' has {buf[at]:#04x}",
                node=self.node.name,
                op="pread",
                offset=offset,
                length=len(buf),
            )

    async def pwrite(self, offset: int, buf: memoryview, flags: Flag = Flag.NONE) -> None:
        async with self._ranges.hold(offset, len(buf)):
            await self._both(
                "pwrite", offset, len(buf), self.test.pwrite(offset, buf, flags), self.file.pwrite(offset, buf, flags)
            )

    async def pwrite_zeroes(self, offset: int, length: int, flags: Flag = Flag.NONE) -> None:
        if flags & Flag.NO_FALLBACK:
            raise self.unsupported("pwrite_zeroes")  # one side might have done it
        async with self._ranges.hold(offset, length):
            await self._both(
                "pwrite_zeroes",
                offset,
                length,
                self.test.pwrite_zeroes(offset, length, flags),
                self.file.pwrite_zeroes(offset, length, flags),
            )

    async def discard(self, offset: int, length: int) -> None:
        raise self.unsupported("discard")

    async def flush(self) -> None:
        await self._both("flush", 0, 0, self.test.flush(), self.file.flush())

    async def truncate(self, size: int) -> None:
        await self._both("truncate", size, 0, self.test.truncate(size), self.file.truncate(size))

    async def _both(self, op: str, offset: int, length: int, test: Awaitable[None], raw: Awaitable[None]) -> None:
        """Do it on both sides at once, and wait for both whatever happens.

        Raises:
            IOFailure: that of raw if both failed alike; a mismatch otherwise.
        """
        results = await asyncio.gather(test, raw, return_exceptions=True)
        for result in results:
            if isinstance(result, BaseException) and not isinstance(result, IOFailure):
                raise result
        failed_test, failed_raw = (result if isinstance(result, IOFailure) else None for result in results)
        if failed_test is None and failed_raw is None:
            return
        if failed_test is not None and failed_raw is not None and failed_test.errno == failed_raw.errno:
            raise failed_raw
        cause = failed_raw or failed_test
        raise IOFailure(
            f"test and raw disagree: test {_outcome(failed_test)}, raw {_outcome(failed_raw)}",
            node=self.node.name,
            op=op,
            offset=offset,
            length=length,
        ) from cause


def first_difference(one: memoryview, other: memoryview) -> int | None:
    """Index of the first byte in which two buffers of the same length differ; None when they are equal."""
    if one == other:
        return None
    for start in range(0, len(one), _CHUNK):
        if one[start : start + _CHUNK] != other[start : start + _CHUNK]:
            return next(i for i in range(start, len(one)) if one[i] != other[i])
    return None


def _outcome(error: IOFailure | None) -> str:
    return "succeeded" if error is None else f"failed ({error})"

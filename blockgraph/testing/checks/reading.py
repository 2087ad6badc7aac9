# SPDX-FileCopyrightText: blockgraph contributors
# SPDX-License-Identifier: MIT
"""Checks of reading; they need nothing but a node."""

from __future__ import annotations

from blockgraph.errors import OutOfRange, ReadOnly
from blockgraph.testing.checks.subject import DIRT, Subject, Violation, check


@check()
async def check_size(subject: Subject) -> None:
    """size() is the stated size, and the cluster size a power of two."""
    if subject.backend.size() != subject.size:
        raise Violation(f"size() is {subject.backend.size()}, expected {subject.size}")
    cluster = subject.node.driver.info().cluster_size
    if cluster is not None and (cluster < 1 or cluster & (cluster - 1)):
        raise Violation(f"info().cluster_size is {cluster}, not a power of two")


@check()
async def check_read_ranges(subject: Subject) -> None:
    """A range reads the same whether alone or as a part of the whole, at every alignment and length."""
    await subject.load()
    for offset, length in subject.ranges():
        await subject.expect(offset, length, f"read of {length} bytes at {offset}")


@check()
async def check_read_nothing(subject: Subject) -> None:
    """A read of no bytes succeeds anywhere, also at the end."""
    for offset in (0, 1, subject.size):
        if await subject.backend.pread(offset, 0):
            raise Violation(f"read of 0 bytes at {offset} gave bytes")


@check()
async def check_read_past_end(subject: Subject) -> None:
    """A root refuses to read past the end; a parent that reads past the end of its child gets zeroes."""
    size = subject.size
    for offset, length in ((size, 1), (size - 1, 2), (-1, 1), (0, size + 1)):
        what = f"read of {length} bytes at {offset} of {size}"
        await subject.expect_refused(OutOfRange, what, subject.backend.pread(offset, length))
    tail = await subject.read(size - min(size, 16), min(size, 16))
    buf = bytearray([DIRT]) * (len(tail) + 700)
    await subject.node.pread(size - len(tail), memoryview(buf))
    subject.compare(size - len(tail), buf, tail + bytes(700), "read across the end by a parent")


@check()
async def check_write_refused(subject: Subject) -> None:
    """Where a root has no write permission, every write fails with ReadOnly."""
    backend = subject.backend
    if backend.writable:
        return
    await subject.load()
    length = min(512, subject.size)
    await subject.expect_refused(ReadOnly, "write to a read-only root", backend.pwrite(0, bytes(length)))
    await subject.expect_refused(ReadOnly, "write-zeroes to a read-only root", backend.write_zeroes(0, length))
    await subject.expect_refused(ReadOnly, "discard to a read-only root", backend.discard(0, length))
    await subject.expect_all("refused writes")


@check()
async def check_flush(subject: Subject) -> None:
    """A flush succeeds after writes, twice, and where nothing was or can be written."""
    await subject.load()
    await subject.backend.flush()
    if subject.backend.writable:
        for offset in (0, subject.size - 1):
            await subject.write(offset, b"x")
            await subject.backend.flush()
    await subject.backend.flush()

# SPDX-FileCopyrightText: blockgraph contributors
# SPDX-License-Identifier: MIT
"""Checks of writing, one request at a time."""

from __future__ import annotations

from blockgraph.errors import OutOfRange, Unsupported
from blockgraph.flags import Flag
from blockgraph.testing.checks.subject import Subject, Violation, check

_ZERO_FLAGS = (
    Flag.NONE,
    Flag.MAY_UNMAP,
    Flag.FUA,
    Flag.NO_FALLBACK,
    Flag.MAY_UNMAP | Flag.FUA,
    Flag.MAY_UNMAP | Flag.NO_FALLBACK | Flag.FUA,
)


@check(writes=True)
async def check_round_trip(subject: Subject) -> None:
    """What is written is read back, and nothing beside it changes, at every alignment and length."""
    await subject.load()
    for offset, length in subject.ranges():
        await subject.write(offset, subject.fill(length))
        await subject.expect_around(offset, length, f"write of {length} bytes at {offset}")
    await subject.expect_all("writes at all alignments")


@check(writes=True)
async def check_write_flags(subject: Subject) -> None:
    """A write with FUA, or of unchanged data, writes like any other."""
    await subject.load()
    for offset, length in ((0, 4096), (513, 1000), (4095, 2)):
        if offset + length > subject.size:
            continue
        await subject.write(offset, subject.fill(length), Flag.FUA)
        same = bytes(subject.model[offset : offset + length])
        await subject.write(offset, same, Flag.WRITE_UNCHANGED)
        await subject.expect_around(offset, length, f"write with FUA of {length} bytes at {offset}")


@check(writes=True)
async def check_write_nothing(subject: Subject) -> None:
    """Requests of no bytes succeed and change nothing."""
    await subject.load()
    for offset in (0, 1, subject.size):
        await subject.write(offset, b"")
        await subject.zero(offset, 0)
        await subject.backend.discard(offset, 0)
    await subject.expect_all("requests of 0 bytes")


@check(writes=True)
async def check_write_past_end(subject: Subject) -> None:
    """A write past the end is refused by a root, and changes neither contents nor size."""
    await subject.load()
    size, backend = subject.size, subject.backend
    for offset, length in ((size, 1), (size - 1, 2), (-1, 1), (0, size + 1)):
        what = f"of {length} bytes at {offset} of {size}"
        await subject.expect_refused(OutOfRange, f"write {what}", backend.pwrite(offset, subject.fill(length)))
        await subject.expect_refused(OutOfRange, f"write-zeroes {what}", backend.write_zeroes(offset, length))
        await subject.expect_refused(OutOfRange, f"discard {what}", backend.discard(offset, length))
    if backend.size() != size:
        raise Violation(f"refused writes changed the size from {size} to {backend.size()}")
    await subject.expect_all("refused writes")


@check(writes=True)
async def check_write_zeroes(subject: Subject) -> None:
    """Zeroed ranges read as zeroes and nothing beside them changes, with every flag; a refusal changes nothing."""
    await subject.load()
    for flags in _ZERO_FLAGS:
        await subject.write(0, subject.fill(subject.size))
        for offset, length in [*subject.ranges()][:: 1 if flags is Flag.NONE else 3]:
            what = f"write-zeroes ({flags!r}) of {length} bytes at {offset}"
            try:
                await subject.zero(offset, length, flags)
            except Unsupported:
                if not flags & Flag.NO_FALLBACK:
                    raise Violation(f"{what} raised Unsupported; only NO_FALLBACK may") from None
            await subject.expect_around(offset, length, what)
            await subject.write(offset, subject.fill(length))
        await subject.expect_all(f"write-zeroes with {flags!r}")


@check(writes=True)
async def check_discard(subject: Subject) -> None:
    """Discarded bytes read as before or as zeroes, always the same, and nothing beside them changes."""
    await subject.load()
    await subject.write(0, subject.fill(subject.size))
    for offset, length in subject.ranges():
        await subject.discard(offset, length)
        await subject.expect_around(offset, length, f"discard of {length} bytes at {offset}")
        await subject.write(offset, subject.fill(length))
    await subject.expect_all("discards at all alignments")


@check(writes=True)
async def check_write_after_zero(subject: Subject) -> None:
    """A write into a zeroed or discarded range shows its bytes, and zeroes around them."""
    await subject.load()
    await subject.write(0, subject.fill(subject.size))
    for flags in (Flag.NONE, Flag.MAY_UNMAP):
        await subject.zero(0, subject.size, flags)
        for offset, length in subject.ranges():
            if length > 4097:
                continue
            await subject.write(offset, subject.fill(length))
            await subject.expect_around(offset, length, f"write of {length} bytes at {offset} into zeroes ({flags!r})")


@check(writes=True, resizes=True)
async def check_truncate(subject: Subject) -> None:
    """A grown area reads as zeroes, what stays keeps its bytes; a refused truncate changes nothing."""
    await subject.load()
    await subject.write(0, subject.fill(subject.size))
    old = subject.size
    for size in (old + 65536, old, max(512, old // 2), old, old + 513, old):
        before = subject.backend.size()
        try:
            await subject.backend.truncate(size)
        except (Unsupported, OutOfRange):  # not at all, or not to this size
            if subject.backend.size() != before:
                raise Violation(f"refused truncate to {size} made the size {subject.backend.size()}") from None
            continue
        if subject.backend.size() != size:
            raise Violation(f"after truncate to {size}, size() is {subject.backend.size()}")
        del subject.model[size:]
        subject.model += bytes(size - len(subject.model))
        await subject.expect_all(f"truncate from {before} to {size}")
        if size > before:
            await subject.write(size - 7, subject.fill(7))
            await subject.expect_all(f"write at the new end of {size} bytes")


@check(writes=True, again=True)
async def check_persistence(subject: Subject) -> None:
    """What was written and flushed is there after the node was closed and opened again."""
    await subject.load()
    for _ in range(30):
        offset, length = subject.some_range()
        await subject.write(offset, subject.fill(length))
    await subject.zero(*subject.some_range())
    await subject.discard(*subject.some_range())
    await subject.backend.flush()

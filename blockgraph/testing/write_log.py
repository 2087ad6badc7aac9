# SPDX-FileCopyrightText: blockgraph contributors
# SPDX-License-Identifier: MIT
"""Reading a write log, replaying it, and making the states that a crash could have left behind.

The log comes from a `log-writes` node (or dm-log-writes, or QEMU's blklogwrites):

    log = WriteLog(Path("writes.log").read_bytes())        # or: await WriteLog.read(graph.node("log"))
    image = log.replay(log.marks["snapshot taken"], base)   # the disk at that mark

    for crash in log.crash_states(base, seed=7):
        Path("crashed.qcow2").write_bytes(crash.image)      # the disk after power failed here
        check(..., crash.describe())

Which states are legal: a write, discard or change of size is *volatile* until a later FLUSH, unless it had FUA. Power
may fail at any entry; then every durable entry is on the disk, and of the volatile ones any subset, a write being cut
at any sector. Reordered writes to one sector are covered too: dropping the later one leaves the earlier.

    write A | write B | FLUSH | write C | write D | <- power fails     A, B surely; C, D each maybe, maybe in part
"""

from __future__ import annotations

import os
import random
from collections.abc import Iterator, Sequence
from functools import cached_property
from typing import TYPE_CHECKING, Literal, NamedTuple, Protocol, Self

from blockgraph.errors import CorruptImage
from blockgraph.filters.log_format import MIN_SECTOR, TRUNCATE_MARK, LogFlag, unpack_entry, unpack_super

if TYPE_CHECKING:
    from blockgraph.node import Node

#: What a replayed discard leaves: zeroes, or the bytes as they were.
Discarded = Literal["zero", "keep"]

_READ = 1 << 20


class LogEntry(NamedTuple):
    """One entry of a log.

    Attributes:
        number: from 0.
        flags: what it is; none of FLUSH, DISCARD, MARK: a write.
        offset, length: the range of the disk, bytes; 0 for flush and mark.
        data_at: where in the log its data start, bytes.
        mark: text of a mark.
        truncate: new size of the disk, bytes, where the entry records one; else None.
    """

    number: int
    flags: LogFlag
    offset: int
    length: int
    data_at: int
    mark: str = ""
    truncate: int | None = None

    @property
    def changes(self) -> bool:
        """It changes the disk."""
        return self.length > 0 or self.truncate is not None

    def __str__(self) -> str:
        if self.truncate is not None:
            return f"#{self.number} truncate {self.truncate}"
        if self.flags & LogFlag.MARK:
            return f"#{self.number} mark '{self.mark}'"
        if not self.length:
            return f"#{self.number} flush"
        op = "discard" if self.flags & LogFlag.DISCARD else "write"
        fua = " FUA" if self.flags & LogFlag.FUA else ""
        return f"#{self.number} {op}{fua} {self.offset}+{self.length}"


class CrashState(NamedTuple):
    """A disk as a power failure could have left it.

    Attributes:
        image: its bytes; the receiver's own.
        completed: entries that had completed.
        durable: of these, the first `durable` are surely there: everything up to the last flush.
        lost: volatile entries that are missing, by index.
        torn: volatile writes of which some sectors are missing, by index.
        discarded: what discards left.
    """

    image: bytearray
    completed: int
    durable: int
    lost: tuple[int, ...] = ()
    torn: tuple[int, ...] = ()
    discarded: Discarded = "zero"

    def describe(self) -> str:
        """One line for a failing test."""
        parts = [f"power fails after entry {self.completed}, durable up to {self.durable}"]
        if self.lost:
            parts.append(f"lost {list(self.lost)}")
        if self.torn:
            parts.append(f"torn {list(self.torn)}")
        if self.discarded == "keep":
            parts.append("discards without effect")
        return ", ".join(parts)


class Disk(Protocol):
    """What entries are applied to."""

    def write(self, offset: int, data: memoryview) -> None: ...
    def zero(self, offset: int, length: int) -> None: ...
    def resize(self, size: int) -> None: ...


class WriteLog:
    """A log in memory (or mapped).

    Args:
        raw: the whole log.
    Raises:
        CorruptImage: it is no write log, or damaged.

    Attributes:
        sector_size: bytes.
        entries: all of them, in order.
    """

    def __init__(self, raw: bytes | bytearray | memoryview) -> None:
        self._raw = memoryview(raw)
        count, self.sector_size = unpack_super(self._raw[:MIN_SECTOR])
        self.entries: list[LogEntry] = []
        at = self.sector_size
        for index in range(count):
            if at + self.sector_size > len(self._raw):
                raise CorruptImage(f"write log ends before entry {index} of {count}", offset=at)
            entry = unpack_entry(self._raw[at : at + self.sector_size])
            data_at = at + self.sector_size
            at = data_at + entry.data_sectors * self.sector_size
            if at > len(self._raw):
                raise CorruptImage(f"write log ends inside the data of entry {index} of {count}", offset=data_at)
            length = entry.sectors * self.sector_size
            if length - self.sector_size < entry.odd_length < length:
                length = entry.odd_length
            self.entries.append(
                LogEntry(
                    index,
                    entry.flags,
                    entry.sector * self.sector_size,
                    length,
                    data_at,
                    entry.mark.decode(errors="replace"),
                    _truncate_size(entry.mark),
                )
            )

    @classmethod
    async def read(cls, node: Node) -> Self:
        """The log stored in a node. Raises: IOFailure, CorruptImage."""
        raw = memoryview(bytearray(node.size()))
        for offset in range(0, len(raw), _READ):
            await node.pread(offset, raw[offset : offset + _READ])
        return cls(raw)

    def __len__(self) -> int:
        return len(self.entries)

    @cached_property
    def marks(self) -> dict[str, int]:
        """Number of entries before each mark (the first of that text)."""
        found: dict[str, int] = {}
        for entry in self.entries:
            if entry.flags & LogFlag.MARK and entry.truncate is None:
                found.setdefault(entry.mark, entry.number)
        return found

    def data(self, entry: LogEntry) -> memoryview:
        """What a write wrote; empty for anything else."""
        if entry.flags & LogFlag.DISCARD:
            return self._raw[:0]
        return self._raw[entry.data_at : entry.data_at + entry.length]

    # Replay.

    def apply(self, entry: LogEntry, disk: Disk, discarded: Discarded = "zero") -> None:
        """Do to `disk` what the entry did."""
        if entry.truncate is not None:
            disk.resize(entry.truncate)
        elif entry.flags & LogFlag.DISCARD:
            if discarded == "zero":
                disk.zero(entry.offset, entry.length)
        elif entry.length:
            disk.write(entry.offset, self.data(entry))

    def replay(self, count: int | None = None, base: bytes = b"", *, discarded: Discarded = "zero") -> bytearray:
        """The disk after the first `count` entries (None: all), which was `base` before; it grows as written."""
        disk = Image(base)
        for entry in self.entries[:count]:
            self.apply(entry, disk, discarded)
        return disk.raw

    def replay_file(
        self, path: str | os.PathLike[str], count: int | None = None, *, start: int = 0, discarded: Discarded = "zero"
    ) -> None:
        """Apply the entries [start, count) to a file, which holds the disk as it was after the first `start`."""
        with FileImage(path) as disk:
            for entry in self.entries[start:count]:
                self.apply(entry, disk, discarded)

    # Crashes.

    def durable_at(self, count: int) -> int:
        """Of the first `count` entries, how many lie before and at the last flush."""
        for index in range(min(count, len(self.entries)) - 1, -1, -1):
            if self.entries[index].flags & LogFlag.FLUSH:
                return index + 1
        return 0

    def epochs(self) -> list[range]:
        """Indices of the entries between flushes, each with the flush that ends it."""
        found, start = [], 0
        for entry in self.entries:
            if entry.flags & LogFlag.FLUSH:
                found.append(range(start, entry.number + 1))
                start = entry.number + 1
        if start < len(self.entries):
            found.append(range(start, len(self.entries)))
        return found

    def crash_states(
        self, base: bytes = b"", *, seed: int = 0, prefixes: bool = True, subsets: int = 4, torn: bool = True
    ) -> Iterator[CrashState]:
        """States a crash could have left, always the same ones for one log and seed.

        Args:
            base: the disk before the first entry.
            prefixes: after every entry that changes something, all before it are there; and the untouched base.
            subsets: random subsets of volatile entries tried in each epoch.
            torn: subsets may hold a part of a write's sectors.
        """
        rng = random.Random(seed)
        durable = Image(base)
        if prefixes:
            yield CrashState(bytearray(base), 0, 0)
        for epoch in self.epochs():
            if prefixes:
                yield from self._prefixes(durable, epoch)
            volatile = [i for i in epoch if self.entries[i].changes]
            for _ in range(subsets if volatile else 0):
                yield self._subset(durable, epoch.start, volatile, rng, torn)
            for index in epoch:
                self.apply(self.entries[index], durable)

    def _prefixes(self, durable: Image, epoch: range) -> Iterator[CrashState]:
        disk = Image(durable.raw)
        for index in epoch:
            entry = self.entries[index]
            if entry.changes:
                self.apply(entry, disk)
                yield CrashState(bytearray(disk.raw), index + 1, epoch.start)

    def _subset(
        self, durable: Image, start: int, volatile: Sequence[int], rng: random.Random, torn: bool
    ) -> CrashState:
        disk = Image(durable.raw)
        count = volatile[rng.randrange(len(volatile))] + 1
        discarded: Discarded = rng.choice(("zero", "keep"))
        keep = rng.random()  # from nearly nothing to nearly everything
        lost: list[int] = []
        partly: list[int] = []
        for index in volatile:
            entry = self.entries[index]
            if index >= count:
                break
            if entry.flags & LogFlag.FUA or rng.random() < keep:
                self.apply(entry, disk, discarded)
            elif torn and self.data(entry).nbytes > self.sector_size and rng.random() < 0.5:
                self._apply_torn(entry, disk, rng)
                partly.append(index)
            else:
                lost.append(index)
        return CrashState(disk.raw, count, start, tuple(lost), tuple(partly), discarded)

    def _apply_torn(self, entry: LogEntry, disk: Image, rng: random.Random) -> None:
        data = self.data(entry)
        for at in range(0, entry.length, self.sector_size):
            if rng.random() < 0.5:
                disk.write(entry.offset + at, data[at : at + self.sector_size])


class Image:
    """A disk in memory. Attribute `raw`: its bytes."""

    def __init__(self, raw: bytes | bytearray = b"") -> None:
        self.raw = bytearray(raw)

    def resize(self, size: int) -> None:
        """Cut, or extend by zeroes."""
        del self.raw[size:]
        self.raw.extend(bytes(size - len(self.raw)))

    def write(self, offset: int, data: memoryview) -> None:
        """Write, growing as needed."""
        if len(self.raw) < offset + len(data):
            self.resize(offset + len(data))
        self.raw[offset : offset + len(data)] = data

    def zero(self, offset: int, length: int) -> None:
        """Zero what of the range lies inside."""
        length = min(length, len(self.raw) - offset)
        if length > 0:
            self.raw[offset : offset + length] = bytes(length)


class FileImage:
    """A disk in a file, made when missing. A context manager."""

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self._fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        os.close(self._fd)

    def resize(self, size: int) -> None:
        """Cut, or extend by zeroes."""
        os.ftruncate(self._fd, size)

    def write(self, offset: int, data: memoryview) -> None:
        """Write, growing as needed."""
        while data:
            done = os.pwrite(self._fd, data, offset)
            offset += done
            data = data[done:]

    def zero(self, offset: int, length: int) -> None:
        """Zero what of the range lies inside."""
        end = min(offset + length, os.fstat(self._fd).st_size)
        for at in range(offset, end, _READ):
            self.write(at, memoryview(bytes(min(_READ, end - at))))


def _truncate_size(mark: bytes) -> int | None:
    if not mark.startswith(TRUNCATE_MARK):
        return None
    digits = mark.removeprefix(TRUNCATE_MARK)
    return int(digits) if digits.isdigit() and len(digits) < 20 else None

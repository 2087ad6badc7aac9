# SPDX-FileCopyrightText: blockgraph contributors
# SPDX-License-Identifier: MIT
"""An image and its sidecar in memory, with one log of both: what power failures could leave of the two.

A write is volatile until a later sync of its own file. At a failure each file has lost any subset of its volatile
writes, some of them in part; the order between the files is that of the log.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Literal, NamedTuple

from blockgraph.bitmaps.sidecar import Sidecar
from blockgraph.bitmaps.sidecar_file import SidecarFile
from blockgraph.errors import IOFailure
from blockgraph.flags import Flag
from blockgraph.protocols.memory import Memory
from blockgraph.testing.write_log import Image

SECTOR = 512

File = Literal["image", "sidecar"]


class Event(NamedTuple):
    """What happened to a file.

    Attributes:
        offset, data: of a write.
        size: of a change of size.
        covers: a sync made its writes among so many events durable; 0: it is none.
    """

    file: File
    offset: int = 0
    data: bytes | None = None
    size: int | None = None
    covers: int = 0


class Power:
    """The log.

    Args:
        seed: for the order in which requests go on, and for what a failure takes.

    Attributes:
        failing: how likely a write or sync of the sidecar fails.
    """

    def __init__(self, seed: int) -> None:
        self.rng = random.Random(seed)
        self.events: list[Event] = []
        self.base: dict[File, bytes] = {"image": b"", "sidecar": b""}
        self.failing = 0.0
        #: events that no sync makes durable any more
        self._dropped: set[int] = set()

    async def hesitate(self, file: File) -> None:
        """Let others go first, or not; an image may be much slower than its sidecar."""
        for _ in range(self.rng.choice((0, 0, 1, 3, 80 if file == "image" else 5))):
            await asyncio.sleep(0)

    @asynccontextmanager
    async def write(self, file: File, offset: int, data: bytes) -> AsyncIterator[None]:
        """Inside, without waiting, the write is done."""
        await self.hesitate(file)
        self.events.append(Event(file, offset, data))
        yield
        await self.hesitate(file)
        self._fail(file, "write")

    async def sync(self, file: File) -> None:
        """Makes durable what was complete when it began, once it has ended.

        After one that failed that may be durable or not, and no later one will change it: as the kernel has it.
        """
        began = len(self.events)
        await self.hesitate(file)
        try:
            self._fail(file, "flush")
        except IOFailure:
            self._dropped.update(range(self._synced(file), began))
            raise
        self.events.append(Event(file, covers=began))

    def _fail(self, file: File, op: str) -> None:
        if file == "sidecar" and self.rng.random() < self.failing:
            raise IOFailure("broken", node=file, op=op)

    def _synced(self, file: File, count: int | None = None) -> int:
        """Among how many events the writes are durable, but for the dropped."""
        return max((event.covers for event in self.events[:count] if event.file == file), default=0)

    def left(self, file: File, count: int, rng: random.Random) -> bytes:
        """The file, when power fails after `count` events."""
        disk = Image(self.base[file])
        durable = self._synced(file, count)
        keep = rng.choice((0.0, 0.5, 1.0, rng.random()))
        for number, event in enumerate(self.events[:count]):
            if event.file != file:
                continue
            if (number < durable and not (file == "sidecar" and number in self._dropped)) or rng.random() < keep:
                _apply(disk, event)
            elif event.data and rng.random() < 0.3:
                for at in range(0, len(event.data), SECTOR):
                    if rng.random() < 0.5:
                        _apply(disk, Event(file, event.offset + at, event.data[at : at + SECTOR]))
        return bytes(disk.raw)


def _apply(disk: Image, event: Event) -> None:
    if event.size is not None:
        disk.resize(event.size)
    elif event.data is not None:
        disk.write(event.offset, memoryview(event.data))


class LoggedDisk(Memory):
    """A memory disk whose changes are logged."""

    name = "logged-disk"
    power: Power

    async def pwrite(self, offset: int, buf: memoryview, flags: Flag = Flag.NONE) -> None:
        async with self.power.write("image", offset, bytes(buf)):
            await super().pwrite(offset, buf, flags)

    async def pwrite_zeroes(self, offset: int, length: int, flags: Flag = Flag.NONE) -> None:
        async with self.power.write("image", offset, bytes(length)):
            await super().pwrite_zeroes(offset, length, flags)

    async def discard(self, offset: int, length: int) -> None:
        async with self.power.write("image", offset, bytes(length)):
            await super().discard(offset, length)

    async def flush(self) -> None:
        await self.power.sync("image")

    async def truncate(self, size: int) -> None:
        await self.power.hesitate("image")
        self.power.events.append(Event("image", size=size))
        await super().truncate(size)


class LoggedFile(SidecarFile):
    """A sidecar in memory."""

    def __init__(self, power: Power, raw: bytes = b"") -> None:
        super().__init__("logged", "disk")
        self._power = power
        self.disk = Image(raw)

    @property
    def writable(self) -> bool:
        return self._fd >= 0

    def exists(self) -> bool:
        return bool(self.disk.raw)

    def open_locked(self) -> None:
        self._fd = 0

    def close(self) -> None:
        self._fd = -1

    def borrow(self) -> tuple[int, bool]:
        return 0, False

    def give_back(self, fd: int) -> None:
        pass

    def size(self, fd: int) -> int:
        return len(self.disk.raw)

    async def read(self, fd: int, offset: int, length: int) -> bytes:
        return bytes(self.disk.raw[offset : offset + length]).ljust(length, b"\0")

    async def write(self, parts: object) -> None:
        for offset, data in parts:  # type: ignore[attr-defined]
            async with self._power.write("sidecar", offset, data):
                self.disk.write(offset, memoryview(data))

    async def sync(self) -> None:
        await self._power.sync("sidecar")

    def cut(self, size: int) -> None:
        if len(self.disk.raw) > size:
            self._power.events.append(Event("sidecar", size=size))
            self.disk.resize(size)


def logged_sidecar(node: object, power: Power, raw: bytes = b"") -> Sidecar:
    """A sidecar in memory, of any node."""
    sidecar = Sidecar(node, "logged")  # type: ignore[arg-type]
    sidecar.file = LoggedFile(power, raw)
    return sidecar

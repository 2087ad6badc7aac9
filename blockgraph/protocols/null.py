# SPDX-FileCopyrightText: blockgraph contributors
# SPDX-License-Identifier: MIT
"""null-co (alias null-aio): a disk that swallows what is written, the base line of benchmarks.

Options (QEMU's BlockdevOptionsNull):

* `size`: bytes; default 1 GiB.
* `latency-ns`: every read, write and flush takes this long; default 0.
* `read-zeroes`: reads give zeroes. By default they leave the reader's buffer as it was, which costs nothing and
  may show the reader old memory of this process: never export such a node to somebody you do not trust.

Example:

    [[nodes]]
    node-name = "sink"
    driver = "null-co"
    size = 1099511627776
    read-zeroes = true

Limits: nothing is kept; a copy to it can not be verified.
"""

from __future__ import annotations

import asyncio
from typing import Annotated, ClassVar

from msgspec import Meta

from blockgraph.driver import Info, Protocol, fill_zero
from blockgraph.extent import Status
from blockgraph.flags import Flag
from blockgraph.options import NodeOptions

_LARGEST = (1 << 63) - 1


class NullOptions(NodeOptions, kw_only=True, frozen=True):
    """See the module's text."""

    size: Annotated[int, Meta(ge=0, le=_LARGEST)] = 1 << 30
    latency_ns: Annotated[int, Meta(ge=0, le=_LARGEST)] = 0
    read_zeroes: bool = False


class Null(Protocol):
    """See the module's text."""

    name = "null-co"
    aliases = ("null-aio",)
    Options: ClassVar[type[NodeOptions]] = NullOptions
    write_flags = Flag.FUA
    zero_flags = Flag.FUA | Flag.MAY_UNMAP | Flag.NO_FALLBACK
    options: NullOptions

    def size(self) -> int:
        return self.options.size

    def info(self) -> Info:
        return Info(zero_init=self.options.read_zeroes)

    async def storage_status(self, offset: int, length: int) -> tuple[int, Status]:
        return length, Status.ZERO if self.options.read_zeroes else Status.DATA

    async def pread(self, offset: int, buf: memoryview) -> None:
        await self._wait()
        if self.options.read_zeroes:
            fill_zero(buf)

    async def pwrite(self, offset: int, buf: memoryview, flags: Flag = Flag.NONE) -> None:
        await self._wait()

    async def pwrite_zeroes(self, offset: int, length: int, flags: Flag = Flag.NONE) -> None:
        await self._wait()

    async def discard(self, offset: int, length: int) -> None:
        await self._wait()

    async def flush(self) -> None:
        await self._wait()

    async def _wait(self) -> None:
        if self.options.latency_ns:
            await asyncio.sleep(self.options.latency_ns / 1e9)

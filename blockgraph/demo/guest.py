# SPDX-FileCopyrightText: blockgraph contributors
# SPDX-License-Identifier: MIT
"""The guest of the demo: writes all over its disk until it is told to stop.

    python -m blockgraph.demo.guest SOCKET EXPORT SEED

It first overwrites data at the end of the disk, where a backup that goes forward comes last; then everywhere: writes,
zeroes and trims of all sizes, many in flight. It talks in lines of JSON: "begun" after so many requests, the counters
for every line it reads, the last ones at the end of its input.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import random
import sys
from dataclasses import asdict, dataclass
from typing import IO

from blockgraph.testing.nbd_client import NbdClient

#: Requests in flight.
DEPTH = 16


def first_requests(size: int) -> int:
    """Requests before "begun", so many that a good part of a disk of `size` bytes is overwritten, but never all."""
    return max(64, size >> 17)


_LARGEST = 256 << 10
_SECTOR = 512
_HOLE = 1  # of base:allocation


@dataclass
class Counters:
    """What the guest has done, completed requests only.

    Attributes:
        written: bytes of data written.
    """

    writes: int = 0
    zeroes: int = 0
    trims: int = 0
    flushes: int = 0
    written: int = 0

    @property
    def requests(self) -> int:
        """That change the disk."""
        return self.writes + self.zeroes + self.trims


class Guest:
    """A client and its random choices.

    Attributes:
        counters: so far.
        begun: set after the first requests.
    """

    def __init__(self, client: NbdClient, seed: int) -> None:
        self.counters = Counters()
        self.begun = asyncio.Event()
        self._client = client
        self._rng = random.Random(seed)
        self._first = first_requests(client.size)
        self._data = self._rng.randbytes(2 * _LARGEST)

    async def first_writes(self) -> None:
        """Overwrite data, from the end of the disk on backwards."""
        offset = self._client.size
        places: list[int] = []
        for length, flags in reversed(await self._client.map()):
            offset -= length
            if not flags & _HOLE:
                places += range(offset + length - length % _LARGEST, offset, -_LARGEST)
        del places[self._first // 32 :]
        for start in range(0, len(places), DEPTH):
            chosen = places[start : start + DEPTH]
            await asyncio.gather(*(self._write(place - _SECTOR, _SECTOR) for place in chosen))

    async def forever(self) -> None:
        """Until cancelled, at the end of a request."""
        await asyncio.gather(*(self._worker() for _ in range(DEPTH)))

    async def _worker(self) -> None:
        while True:
            await asyncio.shield(asyncio.ensure_future(self._any_request()))
            if self.counters.requests >= self._first:
                self.begun.set()

    async def _any_request(self) -> None:
        rng, size = self._rng, self._client.size
        length = min(size, _SECTOR << rng.randrange(10))
        offset = rng.randrange(size - length + 1)
        if rng.random() < 0.9:
            offset -= offset % _SECTOR
        kind = rng.random()
        if kind < 0.70:
            await self._write(offset, length)
        elif kind < 0.84:
            await self._client.write_zeroes(offset, length)
            self.counters.zeroes += 1
        elif kind < 0.98:
            await self._client.trim(offset, length)
            self.counters.trims += 1
        else:
            await self._client.flush()
            self.counters.flushes += 1

    async def _write(self, offset: int, length: int) -> None:
        start = self._rng.randrange(_LARGEST)
        await self._client.pwrite(offset, self._data[start : start + length])
        self.counters.writes += 1
        self.counters.written += length


async def _main(path: str, export: str, seed: int) -> None:
    loop = asyncio.get_running_loop()
    reader = asyncio.StreamReader()
    await loop.connect_read_pipe(lambda: asyncio.StreamReaderProtocol(reader), sys.stdin)
    async with await NbdClient.connect_unix(path, export) as client:
        guest = Guest(client, seed)
        await guest.first_writes()
        work = asyncio.create_task(guest.forever())
        listen = asyncio.create_task(_listen(reader, guest))
        try:
            await asyncio.wait({work, listen}, return_when=asyncio.FIRST_COMPLETED)
            if work.done():
                await work
        finally:
            for task in (work, listen):
                task.cancel()
                with contextlib.suppress(asyncio.CancelledError):
                    await task
        # Disconnecting waits for what is in flight.
        _say(sys.stdout, "ended", guest)


async def _listen(reader: asyncio.StreamReader, guest: Guest) -> None:
    await guest.begun.wait()
    _say(sys.stdout, "begun", guest)
    while await reader.readline():
        _say(sys.stdout, "now", guest)


def _say(out: IO[str], event: str, guest: Guest) -> None:
    print(json.dumps({"event": event, **asdict(guest.counters)}), file=out, flush=True)


if __name__ == "__main__":
    asyncio.run(_main(sys.argv[1], sys.argv[2], int(sys.argv[3])))

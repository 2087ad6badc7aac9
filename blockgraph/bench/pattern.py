# SPDX-FileCopyrightText: blockgraph contributors
# SPDX-License-Identifier: MIT
"""A pattern of requests, and where they go."""

from __future__ import annotations

import random
from collections.abc import Iterator
from typing import Literal, NamedTuple

_MIB = 1 << 20


class Pattern(NamedTuple):
    """What a guest does.

    Attributes:
        rw: as fio names it.
        block: bytes of each request.
        depth: requests in flight.
    """

    rw: Literal["read", "write", "randread", "randwrite"]
    block: int
    depth: int

    @property
    def random(self) -> bool:
        """At random places."""
        return self.rw.startswith("rand")

    @property
    def writes(self) -> bool:
        """It writes."""
        return self.rw.endswith("write")

    @property
    def unit(self) -> str:
        """Of its rate."""
        return "IOPS" if self.random else "MiB/s"

    @property
    def name(self) -> str:
        """In words: "4 KiB random read"."""
        order = "random" if self.random else "sequential"
        return f"{self.block >> 10} KiB {order} {'write' if self.writes else 'read'}"

    @property
    def title(self) -> str:
        """`name`, and how many at a time."""
        return f"{self.name}, depth {self.depth}"

    def rate(self, requests: float) -> float:
        """Requests per second in its unit."""
        return requests if self.random else requests * self.block / _MIB

    def offsets(self, size: int) -> Iterator[int]:
        """Where its requests go, without end."""
        blocks = max(1, size // self.block)
        if self.random:
            pick = random.Random(4).random
            while True:
                yield int(pick() * blocks) * self.block
        while True:
            yield from range(0, blocks * self.block, self.block)


SEQUENTIAL_READ = Pattern("read", 256 << 10, 16)
SEQUENTIAL_WRITE = Pattern("write", 256 << 10, 16)
RANDOM_READ = Pattern("randread", 4 << 10, 16)
RANDOM_WRITE = Pattern("randwrite", 4 << 10, 16)
ONE_READ = RANDOM_READ._replace(depth=1)
ONE_WRITE = RANDOM_WRITE._replace(depth=1)

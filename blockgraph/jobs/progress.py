# SPDX-FileCopyrightText: blockgraph contributors
# SPDX-License-Identifier: MIT
"""Progress in bytes, with rate and time left; and the limit on a job's speed."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections import deque
from collections.abc import Callable

#: The rate is that of the last so many seconds.
_WINDOW = 5.0

#: Speed is given out in slices of this length, seconds.
_SLICE = 0.1


class Progress:
    """How far a job is.

    Attributes:
        current: bytes done; never falls.
        total: bytes there are to do, as known now; may move both ways.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self.current = 0
        self.total = 0
        self._clock = clock
        self._started = clock()
        self._samples: deque[tuple[float, int]] = deque([(self._started, 0)])

    def update(self, current: int, total: int) -> None:
        """Note where the job is now."""
        self.current = max(self.current, current)
        self.total = max(total, self.current)
        now = self._clock()
        if now - self._samples[-1][0] >= _SLICE:
            self._samples.append((now, self.current))
            while now - self._samples[0][0] > _WINDOW:
                self._samples.popleft()

    @property
    def elapsed(self) -> float:
        """Seconds since the start."""
        return self._clock() - self._started

    @property
    def rate(self) -> float:
        """Bytes per second, over the last seconds; 0.0 when nothing is known."""
        since, done = self._samples[0]
        seconds = self._clock() - since
        return (self.current - done) / seconds if seconds > 0 else 0.0

    @property
    def eta(self) -> float | None:
        """Seconds left at the present rate; None when that can not be told."""
        left = self.total - self.current
        if not left:
            return 0.0
        rate = self.rate
        return left / rate if rate > 0 else None


class RateLimit:
    """Lets `speed` bytes per second through, in slices; more at once lengthens the slice.

    Attributes:
        speed: bytes per second; 0: no limit. Raising it wakes whoever waits.
    """

    def __init__(self, speed: int = 0, clock: Callable[[], float] = time.monotonic) -> None:
        self.speed = speed
        self._clock = clock
        self._slice_start = -_SLICE
        self._used = 0
        self._changed = asyncio.Event()

    def set_speed(self, speed: int) -> None:
        """Change the limit."""
        self.speed = speed
        self._changed.set()

    def charge(self, length: int) -> None:
        """So many bytes were moved."""
        if self.speed:
            self._used += length

    def delay(self) -> float:
        """Seconds until more may be moved; 0.0: now."""
        if not self.speed:
            return 0.0
        now = self._clock()
        quota = max(1.0, self.speed * _SLICE)
        # A slice that took more than its quota lasts as many slices as it took.
        end = self._slice_start + max(1.0, self._used / quota) * _SLICE
        if now >= end:
            self._slice_start = now
            self._used = 0
            return 0.0
        return 0.0 if self._used < quota else end - now

    async def wait(self) -> None:
        """Until more may be moved."""
        while (seconds := self.delay()) > 0:
            self._changed.clear()
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._changed.wait(), seconds)

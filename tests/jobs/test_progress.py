# SPDX-FileCopyrightText: blockgraph contributors
# SPDX-License-Identifier: MIT
"""Progress and the speed limit, on a clock that the test turns."""

from __future__ import annotations

import asyncio

import pytest
from helpers.loop import in_loop

from blockgraph.jobs.progress import Progress, RateLimit


class Clock:
    """Seconds, as the test says."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def test_progress_never_falls_and_total_moves_both_ways() -> None:
    progress = Progress(Clock())
    progress.update(10, 100)
    progress.update(5, 200)
    assert (progress.current, progress.total) == (10, 200)
    progress.update(20, 50)
    assert (progress.current, progress.total) == (20, 50)
    progress.update(30, 7)
    assert (progress.current, progress.total) == (30, 30)


def test_progress_rate_and_eta_are_those_of_the_last_seconds() -> None:
    clock = Clock()
    progress = Progress(clock)
    assert (progress.rate, progress.eta) == (0.0, 0.0)
    progress.update(0, 1000)
    assert progress.eta is None
    for second in range(1, 21):
        clock.now += 1
        progress.update(10 * second if second <= 10 else 100 + 20 * (second - 10), 1000)
    assert progress.rate == pytest.approx(20)
    assert progress.eta == pytest.approx(700 / 20)
    assert progress.elapsed == 20
    progress.update(1000, 1000)
    assert progress.eta == 0.0


def test_limit_none_never_delays() -> None:
    limit = RateLimit(0, Clock())
    limit.charge(1 << 40)
    assert limit.delay() == 0.0


@in_loop
async def test_limit_lets_the_quota_of_a_slice_through() -> None:
    clock = Clock()
    limit = RateLimit(1000, clock)  # 100 bytes in 0.1 s
    assert limit.delay() == 0.0
    limit.charge(60)
    assert limit.delay() == 0.0
    limit.charge(40)
    assert limit.delay() == pytest.approx(0.1)
    clock.now += 0.1001
    assert limit.delay() == 0.0


@in_loop
async def test_limit_exceeded_lengthens_the_slice_in_proportion() -> None:
    clock = Clock()
    limit = RateLimit(1000, clock)
    limit.delay()
    limit.charge(1000)  # ten slices at once
    assert limit.delay() == pytest.approx(1.0)
    clock.now += 0.5
    assert limit.delay() == pytest.approx(0.5)  # however many workers ask
    assert limit.delay() == pytest.approx(0.5)
    clock.now += 0.5001
    assert limit.delay() == 0.0


@in_loop
async def test_limit_holds_over_a_long_time_with_many_askers() -> None:
    clock = Clock()
    limit = RateLimit(1 << 20, clock)
    moved = 0
    for step in range(1000):
        clock.now += 0.037
        if limit.delay() == 0.0:
            limit.charge(200_000 + step)
            moved += 200_000 + step
    assert moved <= (1 << 20) * 37 * 1.15
    assert moved >= (1 << 20) * 37 * 0.6


@in_loop
async def test_limit_raised_wakes_who_waits() -> None:
    limit = RateLimit(1, Clock())
    limit.delay()
    limit.charge(1 << 30)
    waiting = asyncio.ensure_future(limit.wait())
    await asyncio.sleep(0)
    assert not waiting.done()
    limit.set_speed(0)
    await waiting


@in_loop
async def test_limit_lowered_still_holds() -> None:
    clock = Clock()
    limit = RateLimit(1000, clock)
    limit.delay()
    limit.charge(90)
    limit.set_speed(100)
    assert limit.delay() == pytest.approx(0.9)

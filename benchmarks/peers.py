# SPDX-FileCopyrightText: blockgraph contributors
# SPDX-License-Identifier: MIT
"""Comparing with peers, run in turn with ours in one session.

These machines are noisy: the sides alternate, and what counts is the median of the ratios of each round. Comparisons
end as rows in pytest-benchmark's record (extra_info["rows"]), which `table.py` turns into the tables of README.rst.
BLOCKGRAPH_BENCH_ROUNDS says how often the sides alternate (5).
"""

from __future__ import annotations

import os
import shutil
import statistics
import time
from collections.abc import Callable, Sequence
from typing import NamedTuple, TypeVar

import pytest
from pytest_benchmark.fixture import BenchmarkFixture

T = TypeVar("T")


def need(*tools: str) -> None:
    """Skip the benchmark when a peer is not installed."""
    for tool in tools:
        if shutil.which(tool) is None:
            pytest.skip(f"needs {tool}")


def default_rounds() -> int:
    """How often the sides alternate."""
    return int(os.environ.get("BLOCKGRAPH_BENCH_ROUNDS", "5"))


def timed(run: Callable[[], object]) -> float:
    """Seconds that `run` takes."""
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def in_turn(sides: dict[str, Callable[[], T]], *, rounds: int | None = None) -> dict[str, list[T]]:
    """What every side returned, round by round. One round before does not count."""
    results: dict[str, list[T]] = {name: [] for name in sides}
    for _ in range((rounds or default_rounds()) + 1):
        for name, run in sides.items():
            results[name].append(run())
    return {name: values[1:] for name, values in results.items()}


class Compared(NamedTuple):
    """Two sides timed in turn.

    Attributes:
        ours, peer: median seconds.
        speed: median of peer / ours round by round: above 1.0 we are faster.
    """

    ours: float
    peer: float
    speed: float


def ratio(ours: Callable[[], float], peer: Callable[[], float], *, rounds: int | None = None) -> Compared:
    """Compare two sides, each of which does its work once and tells how many seconds of it count."""
    times = in_turn({"ours": ours, "peer": peer}, rounds=rounds)
    return Compared(
        statistics.median(times["ours"]),
        statistics.median(times["peer"]),
        statistics.median(b / a for a, b in zip(times["ours"], times["peer"], strict=True)),
    )


class Against(NamedTuple):
    """A peer's side of a row.

    Attributes:
        peer: its name.
        value: its median, in the row's unit; None: what is wanted is a bound on our own value.
        ratio: how many times better we are.
        wanted: the ratio to reach (the value, without a peer); None: nothing was promised.
    """

    peer: str
    value: float | None
    ratio: float | None
    wanted: float | None = None


def against(
    name: str, ours: Sequence[float], theirs: Sequence[float], wanted: float | None = None, *, lower: bool = False
) -> Against:
    """Compare values of the same rounds. `lower`: smaller ones are better."""
    pairs = zip(theirs, ours, strict=True) if lower else zip(ours, theirs, strict=True)
    return Against(name, statistics.median(theirs), statistics.median(a / b for a, b in pairs), wanted)


def add_row(benchmark: BenchmarkFixture, figure: str, what: str, unit: str, ours: float, *peers: Against) -> None:
    """Put a row into the record, and on the terminal.

    Args:
        figure: which promise it belongs to, "2.1": issue 2, the first.
        what: was measured.
        unit: of the values.
        ours: our median.
    """
    row = {"figure": figure, "what": what, "unit": unit, "ours": ours, "peers": [peer._asdict() for peer in peers]}
    benchmark.extra_info.setdefault("rows", []).append(row)
    told = [f"{peer.peer} {peer.value:.4g} (ratio {peer.ratio:.2f})" for peer in peers if peer.value is not None]
    print(f"\n{figure} {what}: ours {ours:.4g} {unit}", *told, sep="; ")


def report(benchmark: BenchmarkFixture, compared: Compared, ours: Callable[[], object], **facts: object) -> None:
    """Record a comparison of seconds, with one more run of ours under pytest-benchmark's clock.

    Args:
        facts: `figure`, `what`, `peer` and `wanted` go into the row, others beside it.
    """
    benchmark.extra_info["speed"] = round(compared.speed, 3)
    wanted = facts.pop("wanted", None)
    peer = Against(
        str(facts.pop("peer", "peer")),
        compared.peer,
        compared.speed,
        float(wanted) if isinstance(wanted, int | float) else None,
    )
    add_row(benchmark, str(facts.pop("figure", "")), str(facts.pop("what", benchmark.name)), "s", compared.ours, peer)
    benchmark.extra_info.update(facts)
    benchmark.pedantic(ours, rounds=1)

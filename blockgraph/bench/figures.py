# SPDX-FileCopyrightText: blockgraph contributors
# SPDX-License-Identifier: MIT
"""What was measured: samples of every side, round by round, and what follows from them."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

#: Our side in every figure; and where backup-top is measured, ourselves with no such filter.
OURS = "blockgraph"
WITHOUT_FILTER = "no backup-top"

#: Of latencies, with the names they are shown under.
PERCENTILES = {"p50": 50.0, "p95": 95.0, "p99": 99.0, "p99.9": 99.9}

#: Rounds that differ by more than this part of their median are told of: the machine was busy.
LARGE_SPREAD = 0.3


class Sample(NamedTuple):
    """One run of one side.

    Attributes:
        rate: in the figure's unit; more is better.
        latency: microseconds by the names of PERCENTILES; empty: not measured.
        series: rates of equal intervals, from the run's begin.
    """

    rate: float
    latency: dict[str, float]
    series: tuple[float, ...] = ()


def percentiles(nanoseconds: Sequence[int]) -> dict[str, float]:
    """Latencies as a Sample has them."""
    ordered = sorted(nanoseconds)
    last = len(ordered) - 1
    return {name: ordered[round(last * share / 100)] / 1000 for name, share in PERCENTILES.items()} if ordered else {}


def series(ends: Iterable[float], seconds: float, interval: float) -> tuple[float, ...]:
    """Requests a second in each of the equal intervals of a run.

    Args:
        ends: when requests ended, seconds since the run's begin.
        seconds, interval: how long the run was, and each interval is.
    """
    counts = [0] * max(1, round(seconds / interval))
    for end in ends:
        index = int(end / interval + 1e-6)
        if index < len(counts):
            counts[index] += 1
    return tuple(count / interval for count in counts)


@dataclass
class Figure:
    """One thing that was measured of several sides.

    Attributes:
        group: what was measured on: "NBD, raw".
        what: the work: "4 KiB random read, depth 16".
        unit: of the rates.
        interval: of series, seconds; 0: there are none.
        sides: samples of each, by name.
    """

    group: str
    what: str
    unit: str
    interval: float = 0.0
    sides: dict[str, list[Sample]] = field(default_factory=dict)

    def rate(self, side: str) -> float:
        """The median."""
        return statistics.median(sample.rate for sample in self.sides[side])

    def ratio(self, side: str) -> float | None:
        """How many times faster we are than this side: the median of the rounds' ratios. None for ourselves."""
        if side == OURS or OURS not in self.sides:
            return None
        pairs = zip(self.sides[OURS], self.sides[side], strict=False)
        return statistics.median(ours.rate / theirs.rate if theirs.rate else 0.0 for ours, theirs in pairs)

    def latency(self, side: str) -> dict[str, float]:
        """Medians of each percentile, microseconds."""
        samples = [sample.latency for sample in self.sides[side] if sample.latency]
        return {name: statistics.median(s[name] for s in samples) for name in PERCENTILES} if samples else {}

    def timed(self) -> bool:
        """Latencies were measured."""
        return any(sample.latency for samples in self.sides.values() for sample in samples)

    def spread(self, side: str) -> float:
        """Largest less smallest rate, as a part of the median."""
        rates = [sample.rate for sample in self.sides[side]]
        median = statistics.median(rates)
        return (max(rates) - min(rates)) / median if median else 0.0

    def series(self, side: str) -> list[float]:
        """Medians of each interval."""
        columns = zip(*(sample.series for sample in self.sides[side] if sample.series), strict=False)
        return [statistics.median(column) for column in columns]


@dataclass
class Result:
    """All that came out.

    Attributes:
        facts: of machine and run, by name.
        figures: in the order in which they were measured first.
        notes: what a reader of the figures has to know.
        missing: programs that are not installed.
        absent: those of them that would be sides of a figure, by its group, or "group, what".
    """

    facts: dict[str, Any]
    figures: list[Figure] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    missing: list[str] = field(default_factory=list)
    absent: dict[str, list[str]] = field(default_factory=dict)

    def missing_in(self, figure: Figure) -> list[str]:
        """Programs that would be sides of this figure, were they installed."""
        return self.absent.get(figure.group) or self.absent.get(f"{figure.group}, {figure.what}") or []

    def add(self, group: str, what: str, unit: str, side: str, sample: Sample, *, interval: float = 0.0) -> None:
        """Another run of a side."""
        found = next((f for f in self.figures if (f.group, f.what) == (group, what)), None)
        if found is None:
            found = Figure(group, what, unit, interval)
            self.figures.append(found)
        found.sides.setdefault(side, []).append(sample)

    def restless(self) -> list[str]:
        """Figures whose rounds differ much."""
        return [
            f"{figure.group}, {figure.what}, {side}: {100 * figure.spread(side):.0f} %"
            for figure in self.figures
            for side in figure.sides
            if figure.spread(side) > LARGE_SPREAD
        ]

    def all_notes(self) -> list[str]:
        """Notes, and one about the spread where it is large."""
        restless = self.restless()
        if not restless:
            return self.notes
        more = f" and {len(restless) - 3} more" if len(restless) > 3 else ""
        told = "; ".join(restless[:3]) + more
        return [*self.notes, f"rounds differ by more than {LARGE_SPREAD:.0%}, so the machine was busy: {told}"]

    def to_json(self) -> dict[str, Any]:
        """Everything: rates in the figure's unit, latencies in microseconds, intervals in seconds."""
        figures = [{**_plain(figure), "missing": self.missing_in(figure)} for figure in self.figures]
        return {"facts": self.facts, "missing": self.missing, "figures": figures, "notes": self.all_notes()}


def _plain(figure: Figure) -> dict[str, Any]:
    plain: dict[str, Any] = {"group": figure.group, "what": figure.what, "unit": figure.unit, "sides": []}
    if figure.interval:
        plain["interval"] = figure.interval
    for name, samples in figure.sides.items():
        ratio = figure.ratio(name)
        side: dict[str, Any] = {
            "name": name,
            "median": round(figure.rate(name), 2),
            "rounds": [round(sample.rate, 2) for sample in samples],
            "ratio": None if ratio is None else round(ratio, 3),
            "spread": round(figure.spread(name), 3),
            "latency-us": {key: round(value, 2) for key, value in figure.latency(name).items()},
        }
        if figure.interval:
            side["series"] = [round(rate, 1) for rate in figure.series(name)]
        plain["sides"].append(side)
    return plain

# SPDX-FileCopyrightText: blockgraph contributors
# SPDX-License-Identifier: MIT
"""Axes, and numbers as short as they can be read."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass


def format_number(number: float) -> str:
    """Three digits: "0.42", "38.5", "512", "25.1k", "1.25M"."""
    for factor, suffix in ((1e6, "M"), (1e3, "k")):
        if number >= factor * 0.9995:
            return f"{_three(number / factor)}{suffix}"
    return _three(number)


def format_rate(rate: float, unit: str) -> str:
    """ "25.1k IOPS", "1043 MiB/s"."""
    return f"{rate:.0f} {unit}" if unit == "MiB/s" and 999.5 <= rate < 1e5 else f"{format_number(rate)} {unit}"


def _three(number: float) -> str:
    digits = 2 if number < 9.995 else 1 if number < 99.95 else 0
    text = f"{number:.{digits}f}"
    return text.rstrip("0").rstrip(".") if digits else text


def format_latency(microseconds: float) -> str:
    """ "1.8 µs", "250 µs", "12 ms", "1.5 s"."""
    for factor, unit in ((1e6, "s"), (1e3, "ms")):
        if microseconds >= factor * 0.9995:
            return f"{_three(microseconds / factor)} {unit}"
    return f"{_three(microseconds)} µs"


def round_up(number: float) -> float:
    """The next round number, where an axis ends; never zero."""
    if number <= 0:
        return 1.0
    power = 10.0 ** math.floor(math.log10(number))
    return next(step * power for step in (1, 1.2, 1.6, 2, 3, 4, 5, 6, 8, 10) if number <= step * power * 1.000001)


@dataclass(frozen=True)
class Log:
    """A logarithmic axis from a power of ten to a power of ten.

    Attributes:
        low, high: their exponents; low < high.
    """

    low: int
    high: int

    @classmethod
    def around(cls, values: Iterable[float]) -> Log:
        """The smallest that shows these, which are positive, and at least one."""
        logs = [math.log10(value) for value in values]
        low = math.floor(min(logs))
        return cls(low, max(math.ceil(max(logs)), low + 1))

    def place(self, value: float) -> float:
        """0.0 at the low end, 1.0 at the high one."""
        return (math.log10(value) - self.low) / (self.high - self.low)

    def ticks(self) -> list[float]:
        """Every power of ten."""
        return [10.0**exponent for exponent in range(self.low, self.high + 1)]

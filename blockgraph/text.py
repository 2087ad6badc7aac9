# SPDX-FileCopyrightText: blockgraph contributors
# SPDX-License-Identifier: MIT
"""Sizes, rates and times as people read them: in drawings, reports and on the command line."""

from __future__ import annotations

_UNITS = ("B", "KiB", "MiB", "GiB", "TiB", "PiB", "EiB")


def format_size(size: float) -> str:
    """Three digits and a unit: "512 B", "1.5 GiB"."""
    unit = 0
    while size >= 1000 and unit < len(_UNITS) - 1:
        size /= 1024
        unit += 1
    return f"{size:.3g} {_UNITS[unit]}"


def format_rate(rate: float) -> str:
    """Bytes per second: "310 MiB/s"."""
    return f"{format_size(rate)}/s"


def format_seconds(seconds: float) -> str:
    """ "0.42 s", "12.0 s", "3:07", "1:02:45"."""
    if seconds < 60:
        return f"{seconds:.2f} s" if seconds < 1 else f"{seconds:.1f} s"
    whole = round(seconds)
    minutes, second = divmod(whole, 60)
    hours, minute = divmod(minutes, 60)
    return f"{hours}:{minute:02}:{second:02}" if hours else f"{minute}:{second:02}"

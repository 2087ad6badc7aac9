# SPDX-FileCopyrightText: blockgraph contributors
# SPDX-License-Identifier: MIT
"""Sizes, rates and times as people write and read them: in drawings, reports, options and on the command line."""

from __future__ import annotations

import re

_UNITS = ("B", "KiB", "MiB", "GiB", "TiB", "PiB", "EiB")
_SUFFIXES = "bkmgtpe"
_SIZE = re.compile(r"(\d+)(\.\d+)?([bkmgtpe]?)(?:ib)?", re.IGNORECASE | re.ASCII)

#: What `parse_size` takes, as a pattern for JSON Schema.
SIZE_PATTERN = r"^\s*[0-9]+(\.[0-9]+)?[bBkKmMgGtTpPeE]?([iI][bB])?\s*$"

#: Largest size of anything here, bytes.
MAX_SIZE = (1 << 63) - 512


def parse_size(text: str) -> int:
    """Bytes of "4096", "64k", "1.5G", "2TiB"; units are powers of 1024.

    Raises:
        ValueError: it is not a size, or too large; the text says what is allowed.
    """
    match = _SIZE.fullmatch(text.strip())
    if match is None:
        raise ValueError(f"'{text}' is not a size; write bytes, or a number with k, M, G, T, P or E")
    shift = 10 * _SUFFIXES.index(match[3].lower() or "b")
    size = int(match[1]) << shift
    if match[2]:
        digits = match[2][1:]
        size += (int(digits) << shift) // 10 ** len(digits)
    if size > MAX_SIZE:
        raise ValueError(f"'{text}' is more than {MAX_SIZE} bytes")
    return size


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

# SPDX-FileCopyrightText: blockgraph contributors
# SPDX-License-Identifier: MIT
"""Sizes as people write them, and two columns."""

from __future__ import annotations

import argparse
import re
from collections.abc import Iterable

_SUFFIXES = "bkmgtpe"
_SIZE = re.compile(r"(\d+)(\.\d+)?([bkmgtpe]?)(?:ib)?", re.IGNORECASE)

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


def size_argument(text: str) -> int:
    """`parse_size` for argparse, which shows the reason."""
    try:
        return parse_size(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def align(rows: Iterable[tuple[str, str]], indent: str = "") -> str:
    """Names and values in two columns."""
    rows = list(rows)
    width = max(len(name) for name, _ in rows) + 1
    return "\n".join(f"{indent}{name + ':':<{width}} {value}" for name, value in rows)

# SPDX-FileCopyrightText: blockgraph contributors
# SPDX-License-Identifier: MIT
"""Sizes as people write them, and two columns."""

from __future__ import annotations

import argparse
from collections.abc import Iterable

from blockgraph.text import parse_size


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

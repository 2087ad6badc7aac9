# SPDX-FileCopyrightText: blockgraph contributors
# SPDX-License-Identifier: MIT
"""Files in memory that are nothing but data (native/dense.h)."""

from __future__ import annotations

from blockgraph._native import lib


def is_dense(fd: int, offset: int, length: int) -> bool:
    """Whether a range of a file is in memory (tmpfs), and as good as all of it data. False: not so, or not known."""
    return bool(lib.bg_is_dense(fd, offset, length))

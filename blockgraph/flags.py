# SPDX-FileCopyrightText: blockgraph contributors
# SPDX-License-Identifier: MIT
"""Flags of a request."""

from __future__ import annotations

import enum


class Flag(enum.IntFlag):
    """How a write, write-zeroes or discard is to be done. A node handles what the driver does not declare."""

    NONE = 0
    FUA = 1  #: durable before it completes
    MAY_UNMAP = 2  #: write-zeroes may deallocate
    NO_FALLBACK = 4  #: write-zeroes fails with Unsupported rather than writing buffers of zeroes
    WRITE_UNCHANGED = 8  #: the data is what readers already see; filters that watch changes look away
    SERIALISING = 16  #: wait for every overlapping request, and make later ones wait

    def __and__(self, other: int) -> Flag:
        """As IntFlag's, which looks the result up anew each time: a tenth of what a request costs in Python."""
        return _ALL[int.__and__(self, other)]

    __rand__ = __and__
    __bool__ = int.__bool__


_ALL = [Flag(value) for value in range(2 * max(Flag))]

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

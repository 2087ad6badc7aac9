# SPDX-FileCopyrightText: blockgraph contributors
# SPDX-License-Identifier: MIT
"""Named dirty bitmaps: what they hold, who reads them, where they are kept."""

from blockgraph.bitmaps.bitmap import DirtyBitmap, View, check_granularity, check_name
from blockgraph.bitmaps.guard import GuardRun, WriteGuard
from blockgraph.bitmaps.query import BitmapInfo
from blockgraph.bitmaps.store import BitmapStore

__all__ = [
    "BitmapInfo",
    "BitmapStore",
    "DirtyBitmap",
    "GuardRun",
    "View",
    "WriteGuard",
    "check_granularity",
    "check_name",
]

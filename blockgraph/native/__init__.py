# SPDX-FileCopyrightText: blockgraph contributors
# SPDX-License-Identifier: MIT
"""The C of native/ with Python types: dirty bitmaps, zero detection, I/O on worker threads, copying, qcow2 tables,
extent maps, copy before write, first writes, checksums.

Everything here runs without the GIL and knows nothing about nodes or graphs. Offsets and lengths are bytes. Arguments
out of range raise ValueError; failed system calls raise OSError with `errno`.
"""

from blockgraph.native.allocator import Allocator, Link, count_links, unpack_links
from blockgraph.native.bitmap import MAX_BITS, Bitmap, fits, fitting
from blockgraph.native.copier import (
    ClaimedRun,
    CopiedRange,
    Copier,
    CopierLink,
    CopierMode,
    CopierSide,
    CopierStats,
    Runs,
)
from blockgraph.native.copy import (
    CopyCancelled,
    CopyError,
    CopyExtent,
    CopyFlag,
    CopyProgress,
    CopyResult,
    CopySide,
    offload,
)
from blockgraph.native.dense import is_dense
from blockgraph.native.extent_map import ExtentMap, MapExtent, MapStats, Zeroing
from blockgraph.native.l2 import (
    L2Kind,
    L2Parts,
    L2Places,
    L2Run,
    decode_few_l2,
    decode_l2,
    free_run_refcount16,
    link_l2,
    next_nonzero_u64,
)
from blockgraph.native.pool import Pool, close_pool, get_pool
from blockgraph.native.sums import SUM_BLOCK, Sums
from blockgraph.native.windows import Windows
from blockgraph.native.zero import ZeroRun, allocate_aligned, is_zero, zero_runs

__all__ = [
    "MAX_BITS",
    "SUM_BLOCK",
    "Allocator",
    "Bitmap",
    "ClaimedRun",
    "CopiedRange",
    "Copier",
    "CopierLink",
    "CopierMode",
    "CopierSide",
    "CopierStats",
    "CopyCancelled",
    "CopyError",
    "CopyExtent",
    "CopyFlag",
    "CopyProgress",
    "CopyResult",
    "CopySide",
    "ExtentMap",
    "L2Kind",
    "L2Parts",
    "L2Places",
    "L2Run",
    "Link",
    "MapExtent",
    "MapStats",
    "Pool",
    "Runs",
    "Sums",
    "Windows",
    "ZeroRun",
    "Zeroing",
    "allocate_aligned",
    "close_pool",
    "count_links",
    "decode_few_l2",
    "decode_l2",
    "fits",
    "fitting",
    "free_run_refcount16",
    "get_pool",
    "is_dense",
    "is_zero",
    "link_l2",
    "next_nonzero_u64",
    "offload",
    "unpack_links",
    "zero_runs",
]

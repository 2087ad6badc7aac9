# SPDX-FileCopyrightText: blockgraph contributors
# SPDX-License-Identifier: MIT
"""Which parts of a file have storage (SEEK_DATA, SEEK_HOLE), with the last data region remembered.

Only "data" is remembered: told of a region that has become a hole since, it costs a read of zeroes; "hole" told of a
region that has been written since would lose the data. Writes through native copies do not come past here, so holes
are always asked for.

In memory the end of a region is found by a walk over its pages, ten milliseconds for a GiB, for which the loop stands
still. There the range that is wanted is asked about first (native/dense.h).
"""

from __future__ import annotations

import asyncio
import errno
import os
import time

from blockgraph.extent import Status
from blockgraph.native import is_dense

#: After a look-up that took longer, seconds, the next is made in a thread: tmpfs walks every page of a region, a
#: network file system asks its server. (A thread costs about 60 microseconds, a look-up about one.)
_QUICK = 500e-6

#: The shortest range, bytes, for which it is quicker to ask whether all of it is data, and the longest that is asked
#: about at once.
_LONG = 16 << 20
_MOST = 256 << 20


class DataRegion:
    """The runs of one file."""

    def __init__(self) -> None:
        self._start = self._end = 0
        self._generation = 0
        self._quick = True

    def forget(self) -> None:
        """Holes may have been made."""
        self._start = self._end = 0
        self._generation += 1

    async def find(self, fd: int, offset: int, length: int) -> tuple[int, Status] | None:
        """Length and status of the run at `offset`, of which `length` bytes are wanted; None when it has no end before
        the end of the file.

        Raises: OSError.
        """
        if self._start <= offset < self._end:
            return self._end - offset, Status.DATA
        generation = self._generation
        start = time.perf_counter()
        if self._quick:
            found = find_run(fd, offset, length)
        else:
            found = await asyncio.to_thread(find_run, fd, offset, length)
        self._quick = time.perf_counter() - start < _QUICK
        if found is not None and found[1] is Status.DATA and generation == self._generation:
            self._start, self._end = offset, offset + found[0]
        return found


def find_run(fd: int, offset: int, length: int) -> tuple[int, Status] | None:
    """Length and status of the run at `offset`, which may be cut to `length` bytes; None: a hole up to the end of the
    file, or beyond it.

    Where the file system can not tell, everything is data. Moves the descriptor's position, which nobody uses.
    """
    try:
        data = os.lseek(fd, offset, os.SEEK_DATA)
        if data > offset:
            return data - offset, Status.ZERO
        size = min(length, _MOST, os.fstat(fd).st_size - offset) if length >= _LONG else 0
        if size >= _LONG and is_dense(fd, offset, size):
            return size, Status.DATA
        return os.lseek(fd, offset, os.SEEK_HOLE) - offset, Status.DATA
    except OSError as error:
        if error.errno == errno.ENXIO:
            return None
        if error.errno in (errno.EINVAL, errno.EOPNOTSUPP):
            return max(1, os.fstat(fd).st_size - offset), Status.DATA
        raise

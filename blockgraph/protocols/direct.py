# SPDX-FileCopyrightText: blockgraph contributors
# SPDX-License-Identifier: MIT
"""What O_DIRECT asks of offsets, lengths and memory.

The kernel says it (statx with STATX_DIOALIGN, Linux 6.1); where it does not, reads are tried.
"""

from __future__ import annotations

import ctypes
import errno
import functools
import mmap
import os
import sys
from typing import NamedTuple

from cffi import FFI  # type: ignore[import-untyped]

_ffi = FFI()

_AT_EMPTY_PATH = 0x1000
_STATX_DIOALIGN = 0x2000
#: struct statx: its size, and where stx_mask, stx_dio_mem_align and stx_dio_offset_align are.
_STATX_SIZE = 256
_MASK, _MEM_ALIGN, _OFFSET_ALIGN = 0, 152, 156

#: Tried in this order.
_CANDIDATES = (512, 1024, 2048, 4096)
#: More than a page can not be had from allocate_aligned.
_LARGEST = mmap.PAGESIZE


class DirectAlignment(NamedTuple):
    """Bytes, powers of two: `offset` for offsets and lengths in the file, `memory` for addresses."""

    offset: int
    memory: int


#: Without O_DIRECT.
BUFFERED = DirectAlignment(1, 1)


def direct_alignment(fd: int) -> DirectAlignment | None:
    """What a descriptor with O_DIRECT asks for; None when it refuses direct I/O."""
    return _ask(fd) or _probe(fd)


@functools.cache
def _libc() -> ctypes.CDLL:
    return ctypes.CDLL(None, use_errno=True)


def address_of(buf: memoryview) -> int:
    """Where the memory of a contiguous buffer starts."""
    return int(_ffi.cast("uintptr_t", _ffi.from_buffer(buf)))


def _ask(fd: int) -> DirectAlignment | None:
    statx = getattr(_libc(), "statx", None)
    if statx is None:
        return None
    answer = ctypes.create_string_buffer(_STATX_SIZE)
    if statx(fd, b"", _AT_EMPTY_PATH, _STATX_DIOALIGN, answer) != 0:
        return None
    raw = answer.raw
    mask, memory, offset = (
        int.from_bytes(raw[at : at + 4], sys.byteorder) for at in (_MASK, _MEM_ALIGN, _OFFSET_ALIGN)
    )
    if not mask & _STATX_DIOALIGN or not _sane(memory) or not _sane(offset):
        return None
    return DirectAlignment(offset, memory)


def _sane(align: int) -> bool:
    return 0 < align <= _LARGEST and not align & (align - 1)


def _probe(fd: int) -> DirectAlignment | None:
    """The smallest block whose read succeeds into memory aligned to that block alone.

    An empty file answers every read: it gets the most careful value.
    """
    if not os.lseek(fd, 0, os.SEEK_END):
        return DirectAlignment(_CANDIDATES[-1], _CANDIDATES[-1])
    with mmap.mmap(-1, 2 * _CANDIDATES[-1]) as memory, memoryview(memory) as view:
        for block in _CANDIDATES:
            # Starting one block into a page-aligned area: aligned to `block` and (4096 aside) to nothing larger.
            with view[block : 2 * block] as part:
                try:
                    os.preadv(fd, [part], 0)
                except OSError as error:
                    if error.errno != errno.EINVAL:
                        raise
                else:
                    return DirectAlignment(block, block)
    return None

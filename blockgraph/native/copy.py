# SPDX-FileCopyrightText: blockgraph contributors
# SPDX-License-Identifier: MIT
"""Copying jobs (native/copy.h): what is copied, how far it is, how it failed. `Pool.copy` runs them."""

from __future__ import annotations

import errno
import os
from collections.abc import Sequence
from enum import IntFlag
from typing import Any, Literal, NamedTuple

from blockgraph._native import ffi, lib
from blockgraph.native.check import check
from blockgraph.native.sums import Sums

CopySide = Literal["read", "write"]
_SIDES: dict[int, CopySide] = {lib.BG_COPY_READ: "read", lib.BG_COPY_WRITE: "write"}


class CopyFlag(IntFlag):
    """How one extent is copied. Without a flag all bytes are read and written.

    COPY_RANGE: try copy_file_range, which shares blocks on file systems that can; reads and writes where it is refused.
    CLONE: let source and target share blocks where the file system can do that and the range consists of whole blocks.
    DETECT_ZEROES: blocks of 4096 zero bytes are not copied but made zero, as the next two flags say.
    PUNCH_HOLES: what is zero is punched out of the target (which never grows by that).
    SKIP_ZEROES: what is zero is left alone, since the target is known to be zero there.
    ZERO: there is no source; the whole range is made zero.
    SUM: what was copied is added to the job's sums, at `sum_offset`. Not with COPY_RANGE or ZERO.
    READ_ONLY: with SUM; there is no target, the source is only read.
    """

    NONE = 0
    COPY_RANGE = lib.BG_COPY_RANGE
    CLONE = lib.BG_COPY_CLONE
    DETECT_ZEROES = lib.BG_COPY_DETECT_ZEROES
    PUNCH_HOLES = lib.BG_COPY_PUNCH_HOLES
    SKIP_ZEROES = lib.BG_COPY_SKIP_ZEROES
    ZERO = lib.BG_COPY_ZERO
    SUM = lib.BG_COPY_SUM
    READ_ONLY = lib.BG_COPY_READ_ONLY


#: File systems whose server copies by itself, as statfs(2) names them: NFS, CIFS, SMB2.
_SERVED = frozenset({0x6969, 0xFF534D42, 0xFE534D42})

#: File systems that share no blocks: tmpfs, ramfs, ext2 to ext4.
_UNSHARED = frozenset({0x01021994, 0x858458F6, 0xEF53})


def offload(source_fd: int, target_fd: int) -> CopyFlag:
    """How the bytes of two files need not pass through this machine's processor. May ask a server."""
    kind = lib.bg_copy_file_system(source_fd)
    if kind in _UNSHARED or kind != lib.bg_copy_file_system(target_fd):
        return CopyFlag.NONE
    return CopyFlag.CLONE | (CopyFlag.COPY_RANGE if kind in _SERVED else CopyFlag.NONE)


class CopyExtent(NamedTuple):
    """`length` bytes from one descriptor to another; what lies past the source's end counts as zero.

    The extents of one job must not overlap in their targets, nor a source with a target. With O_DIRECT, offsets and
    lengths are as aligned as the descriptors need it.
    """

    # In the order of bg_copy_extent: lists of these are handed to C as they are.
    source_fd: int
    source_offset: int
    target_fd: int
    target_offset: int
    length: int
    flags: CopyFlag = CopyFlag.NONE
    sum_offset: int = 0


class CopyResult(NamedTuple):
    """What a job did, bytes: all of its extents, and the part of them that was found or made zero."""

    bytes: int
    zeroes: int


class CopyProgress:
    """How far a copying job is; readable at any time from any thread. Used for several jobs in turn, it adds up."""

    __slots__ = ("_native",)

    def __init__(self) -> None:
        self._native = ffi.new("bg_copy_progress *")

    def __repr__(self) -> str:
        return f"<CopyProgress bytes={self.bytes} zeroes={self.zeroes}>"

    @property
    def bytes(self) -> int:
        """Bytes completed, zeroes included. Never falls."""
        return int(lib.bg_copy_bytes(self._native))

    @property
    def zeroes(self) -> int:
        """Bytes of these that were found or made zero."""
        return int(lib.bg_copy_zeroes(self._native))

    @property
    def shared(self) -> int:
        """Bytes of these whose blocks source and target share."""
        return int(self._native.shared)

    def cancel(self) -> None:
        """Begin no further chunk: the job ends with CopyCancelled, as does any later one that uses this object."""
        lib.bg_copy_cancel(self._native)


class CopyError(OSError):
    """A transfer failed; no further chunk was begun, those under way were completed.

    Attributes:
        errno: of the system call.
        extent: index in the list of extents.
        offset: bytes from the start of the file on that `side`, where the failed transfer began.
        side: "read" (the source) or "write" (the target).
        incomplete: indexes of the extents that are not completely copied, ascending.
    """

    extent: int
    offset: int
    side: CopySide
    incomplete: tuple[int, ...]

    def __str__(self) -> str:
        return f"{self.side} at offset {self.offset} (extent {self.extent}) failed: {self.strerror}"


class CopyCancelled(OSError):
    """CopyProgress.cancel stopped the job (errno ECANCELED); `incomplete` as in CopyError."""

    incomplete: tuple[int, ...]


class Job:
    """A native job and what it borrows: the progress it counts in, the sums it adds to, and the extents by which a
    failure is explained."""

    __slots__ = ("_extents", "_sums", "_zeroes_before", "native", "progress")

    def __init__(
        self, extents: Sequence[CopyExtent], threads: int, progress: CopyProgress | None, sums: Sums | None = None
    ) -> None:
        """Raises ValueError for an extent that makes no sense, OSError without memory."""
        self.progress = CopyProgress() if progress is None else progress
        self._extents = extents
        self._zeroes_before = self.progress.zeroes
        out = ffi.new("bg_copy **")
        try:
            array = ffi.new("bg_copy_extent[]", extents if isinstance(extents, list) else list(extents))
            code = lib.bg_copy_new(array, len(extents), threads, self.progress._native, out)
        except OverflowError:
            code = -errno.EINVAL
        if code == -errno.EINVAL:
            _refuse(extents, threads)
        check(code)
        self.native: Any = ffi.gc(out[0], lib.bg_copy_free)
        self._sums = sums
        if sums is not None:
            lib.bg_copy_set_sums(self.native, sums.native)

    def start(self, queue: Any, ticket: int) -> int:
        """For `Pool.run`."""
        return int(lib.bg_copy_start(self.native, queue, ticket))

    def finish(self, code: int) -> CopyResult:
        """The result of a job that ended with `code`, or its failure."""
        if code == 0:
            total = sum(extent.length for extent in self._extents)
            return CopyResult(total, self.progress.zeroes - self._zeroes_before)
        incomplete = tuple(
            index
            for index, extent in enumerate(self._extents)
            if lib.bg_copy_extent_bytes(self.native, index) < extent.length
        )
        if code == -errno.ECANCELED:
            cancelled = CopyCancelled(errno.ECANCELED, os.strerror(errno.ECANCELED))
            cancelled.incomplete = incomplete
            raise cancelled
        failure = ffi.new("bg_copy_failure *")
        lib.bg_copy_failed(self.native, failure)
        error = CopyError(failure.error, os.strerror(failure.error))
        error.extent = failure.extent
        error.side = _SIDES[failure.side]
        failed = self._extents[error.extent]
        error.offset = (failed.source_offset if error.side == "read" else failed.target_offset) + failure.offset
        error.incomplete = incomplete
        raise error


def _refuse(extents: Sequence[CopyExtent], threads: int) -> None:
    if not 1 <= threads <= lib.BG_POOL_MAX_THREADS:
        raise ValueError(f"threads must be between 1 and {lib.BG_POOL_MAX_THREADS}, not {threads}")
    out = ffi.new("bg_copy **")
    for index, extent in enumerate(extents):
        try:
            code = lib.bg_copy_new(ffi.new("bg_copy_extent[]", [extent]), 1, 1, ffi.NULL, out)
        except OverflowError:
            code = -errno.EINVAL
        if code < 0:
            raise ValueError(f"extents[{index}] has a bad descriptor, range or combination of flags: {extent}")
        lib.bg_copy_free(out[0])

# SPDX-FileCopyrightText: blockgraph contributors
# SPDX-License-Identifier: MIT
"""Dirty bitmaps (native/bitmap.h)."""

from __future__ import annotations

import errno
from array import array
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, NoReturn

from blockgraph._native import ffi, lib
from blockgraph.native.check import check

if TYPE_CHECKING:
    from typing_extensions import Buffer

_NO_LIMIT: int = lib.BG_BITMAP_NO_LIMIT
_EXTENT = ffi.typeof("bg_bitmap_extent *")
_EINVAL = -errno.EINVAL

RUNS_MIN: int = lib.BG_BITMAP_EXTENTS_MIN
"""Room that `Bitmap.read_dirty` needs at least, in runs."""


MAX_BITS: int = lib.BG_BITMAP_MAX_BITS
"""A bitmap has no more."""


def fits(size: int, granularity: int) -> bool:
    """A bitmap of `granularity` bytes a bit can have a disk of `size` bytes."""
    return -(-size // granularity) <= MAX_BITS


def fitting(size: int, granularity: int) -> int:
    """So many bytes a bit, or as often twice as many as it takes for a disk of `size` bytes."""
    while not fits(size, granularity):
        granularity *= 2
    return granularity


class Bitmap:
    """One bit for each `granularity` bytes of a disk of `size` bytes; a new bitmap is clean.

    A granule is one bit's range; the last may reach past the disk's end, and results are cut to it. Any thread may
    call any method at any time; each is atomic. Memory: nothing for areas never marked, at most size / granularity / 8
    bytes and a 63rd of that.

    Args:
        size: bytes, at least 0.
        granularity: bytes per bit, a power of two from 512 to 2 GiB.
        dense: most of it will be marked soon; only speed depends on it.
    Raises:
        ValueError: an argument is out of range, or the bitmap would have more than 2**38 bits.
        MemoryError: no address space.
    """

    __slots__ = ("_bitmap", "granularity")

    granularity: int
    """Bytes per bit."""

    def __init__(self, size: int, granularity: int, *, dense: bool = False) -> None:
        out = ffi.new("bg_bitmap **")
        try:
            code = (lib.bg_bitmap_new_dense if dense else lib.bg_bitmap_new)(size, granularity, out)
        except OverflowError:
            code = _EINVAL
        if code < 0:
            _refuse_new(code, size, granularity)
        self._own(out[0], granularity)

    def _own(self, native: Any, granularity: int) -> None:
        self._bitmap = ffi.gc(native, lib.bg_bitmap_free)
        self.granularity = granularity

    def __repr__(self) -> str:
        return f"<Bitmap size={self.size} granularity={self.granularity} dirty={self.count()}>"

    @property
    def size(self) -> int:
        """Bytes of the disk."""
        return int(lib.bg_bitmap_size(self._bitmap))

    def set(self, offset: int, length: int) -> None:
        """Mark every granule that [offset, offset + length) touches.

        Raises:
            ValueError: the range is not inside the disk.
        """
        if _call(lib.bg_bitmap_set, self._bitmap, offset, length) < 0:
            self._refuse_range(offset, length)

    def reset(self, offset: int, length: int) -> None:
        """Unmark [offset, offset + length). Never clears a granule that is covered in part only.

        Raises:
            ValueError: the range is not inside the disk, or not aligned to granules (its end may be the disk's end).
        """
        if _call(lib.bg_bitmap_reset, self._bitmap, offset, length) < 0:
            self._refuse_range(offset, length)
            self._refuse_alignment(offset, offset + length)

    def get(self, offset: int) -> bool:
        """Whether the granule of `offset` is dirty.

        Raises:
            ValueError: offset is not inside the disk.
        """
        code = _call(lib.bg_bitmap_get, self._bitmap, offset)
        if code < 0:
            raise ValueError(f"offset {offset} is not inside the disk of {self.size} bytes")
        return code == 1

    def fill(self) -> None:
        """Mark everything."""
        lib.bg_bitmap_fill(self._bitmap)

    def clear(self) -> None:
        """Unmark everything, and give the memory back."""
        lib.bg_bitmap_clear(self._bitmap)

    def count(self) -> int:
        """Dirty bytes: marked granules times granularity, the last cut to the disk's end. Takes no scan."""
        return int(lib.bg_bitmap_count(self._bitmap))

    def next_dirty(
        self, offset: int = 0, end: int | None = None, max_length: int | None = None
    ) -> tuple[int, int] | None:
        """(offset, length) of the first dirty run in [offset, end), cut to that range and to max_length; None: no more.

        Args:
            offset: where to begin, at most `end`; need not be aligned.
            end: where to stop, at most the disk's end; None: the disk's end.
            max_length: at least 1; None: no limit.
        Raises:
            ValueError: an argument is out of range.
        """
        return self._find(lib.bg_bitmap_next_dirty, offset, end, max_length)

    def next_clean(
        self, offset: int = 0, end: int | None = None, max_length: int | None = None
    ) -> tuple[int, int] | None:
        """The first clean run; arguments and result as in `next_dirty`."""
        return self._find(lib.bg_bitmap_next_clean, offset, end, max_length)

    def take(self, offset: int = 0, end: int | None = None, max_length: int | None = None) -> tuple[int, int] | None:
        """Find the first dirty run in [offset, end), unmark it and return it, in one step; None: no more.

        Of several callers each granule goes to exactly one.

        Args:
            offset: a multiple of the granularity.
            end: a multiple of the granularity or the disk's end.
            max_length: rounded down to granules, but at least one granule is taken.
        Raises:
            ValueError: an argument is out of range or not aligned.
        """
        return self._find(lib.bg_bitmap_take, offset, end, max_length, aligned=True)

    def _find(
        self, find: Any, offset: int, end: int | None, max_length: int | None, *, aligned: bool = False
    ) -> tuple[int, int] | None:
        out = ffi.new(_EXTENT)
        found = _call(
            find,
            self._bitmap,
            offset,
            _NO_LIMIT if end is None else end,
            _NO_LIMIT if max_length is None else max_length,
            out,
        )
        if found == 1:
            start: int = out.start
            return start, out.end - start
        if found < 0:
            stop = self._refuse_bounds(offset, end)
            if max_length is not None and max_length < 1:
                raise ValueError(f"max_length must be at least 1, not {max_length}")
            if aligned:
                self._refuse_alignment(offset, stop)
        return None

    def dirty_extents(self, offset: int = 0, end: int | None = None) -> Iterator[tuple[int, int]]:
        """Each (offset, length) that `next_dirty` would find in turn, but fetched in large batches.

        Changes made while iterating may be seen or not; a run that grows meanwhile may come in pieces.

        Raises:
            ValueError: an argument is out of range, or the disk shrank below `end` meanwhile.
        """
        runs = array("q", bytes(16 * RUNS_MIN))
        stop = self.size if end is None else end
        while True:
            count, offset = self.read_dirty(runs, offset, stop)
            values = iter(runs[: 2 * count].tolist())
            for start in values:
                yield start, next(values) - start
            if offset == stop:
                return

    def read_dirty(self, out: Buffer, offset: int = 0, end: int | None = None) -> tuple[int, int]:
        """Many dirty runs of [offset, end) in one call, for those who go through millions: best with 16 * RUNS_MIN.

        Args:
            out: writable int64[2 * n], n >= RUNS_MIN: gets the start of the first run, its end (the first byte after
                it), the start of the second and so on; values after those of the last run are undefined.
        Returns:
            (runs, next): how many runs there are in `out`, and where to go on: `end` once all has been seen. There may
            be no runs in `out` before that.
        Raises:
            ValueError: an argument is out of range, or `out` is too small or does not hold int64.
        """
        reached = ffi.new("int64_t *")
        with ffi.from_buffer(out, require_writable=True) as view, memoryview(out) as form:
            if form.format not in ("q", "l") or form.itemsize != 8 or len(view) < 16 * RUNS_MIN:
                raise ValueError(
                    f"out must hold {2 * RUNS_MIN} int64 or more, not {len(view)} bytes of {form.format!r}"
                )
            room = len(view) // 16
            runs = _call(
                lib.bg_bitmap_extents,
                self._bitmap,
                offset,
                _NO_LIMIT if end is None else end,
                ffi.cast(_EXTENT, view),
                room,
                reached,
            )
        if runs < 0:
            self._refuse_bounds(offset, end)
            return 0, offset  # the disk's size changed meanwhile, and fits again
        return runs, reached[0]

    def merge(self, other: Bitmap) -> None:
        """Mark whatever is marked in `other`, whose granularity may differ: granules are rounded out.

        Raises:
            ValueError: the sizes differ.
        """
        if lib.bg_bitmap_merge(self._bitmap, other._bitmap) < 0:
            raise ValueError(f"bitmaps of disks of {self.size} and {other.size} bytes can not be merged")

    def subtract(self, other: Bitmap) -> None:
        """Unmark whatever is marked in `other`.

        Raises:
            ValueError: sizes or granularities differ.
        """
        if lib.bg_bitmap_subtract(self._bitmap, other._bitmap) < 0:
            raise ValueError(
                f"bitmaps of {self.size} and {other.size} bytes with granularities {self.granularity} and "
                f"{other.granularity} can not be subtracted"
            )

    def copy(self) -> Bitmap:
        """A new bitmap, equal and independent."""
        out = ffi.new("bg_bitmap **")
        code = lib.bg_bitmap_copy(self._bitmap, out)
        if code < 0:
            _refuse_new(code, self.size, self.granularity)
        copy: Bitmap = Bitmap.__new__(Bitmap)
        copy._own(out[0], self.granularity)
        return copy

    def serialise(self, offset: int, length: int) -> bytes:
        """The bits of [offset, offset + length).

        Args:
            offset: a multiple of 8 granules.
            length: so that the range ends at a multiple of 8 granules or at the disk's end.
        Returns:
            uint8[ceil(length / granularity / 8)], bit 0 lowest; bits past the disk's end are 0.
        Raises:
            ValueError: the range is not inside the disk or not aligned.
        """
        size = self._serialised(offset, length)
        data = bytearray(size)
        if lib.bg_bitmap_serialise(self._bitmap, offset, length, ffi.from_buffer(data), size) < 0:
            raise ValueError("the bitmap was resized meanwhile")
        return bytes(data)

    def deserialise(self, offset: int, data: Buffer) -> None:
        """Replace the bits from `offset` on by `data`, in the form that `serialise` returns.

        The range is as long as the bits of `data`, or ends at the disk's end when that lies in its last byte;
        bits past the disk's end are ignored, they may come from an image.

        Raises:
            ValueError: offset is not a multiple of 8 granules, or the data reach past the disk's end.
        """
        with ffi.from_buffer(data) as view:  # released before an error leaves: see pool
            size = self.size
            length = min(len(view) * 8 * self.granularity, size - offset)
            if self._serialised(offset, length) != len(view):
                raise ValueError(f"{len(view)} bytes of bits at offset {offset} reach past the disk of {size} bytes")
            if lib.bg_bitmap_deserialise(self._bitmap, offset, length, view, len(view)) < 0:
                raise ValueError("the bitmap was resized meanwhile")

    def _serialised(self, offset: int, length: int) -> int:
        count = _call(lib.bg_bitmap_serialised, self._bitmap, offset, length)
        if count < 0:
            self._refuse_range(offset, length)
            raise ValueError(
                f"range {offset}+{length} is not aligned to {8 * self.granularity} bytes (8 granules); "
                f"only its end may instead be the disk's end, {self.size}"
            )
        return count

    def truncate(self, size: int) -> None:
        """Follow the disk to a new size. Grown area is clean, except for the rest of a last granule that was dirty.

        Raises:
            ValueError: size is negative or needs too many bits; the bitmap is unchanged.
            MemoryError: no address space; the bitmap is unchanged.
        """
        code = _call(lib.bg_bitmap_truncate, self._bitmap, size)
        if code < 0:
            _refuse_new(code, size, self.granularity)

    def _refuse_range(self, offset: int, length: int) -> None:
        size = self.size
        if offset < 0 or length < 0 or offset + length > size:
            raise ValueError(f"range {offset}+{length} is not inside the disk of {size} bytes")

    def _refuse_bounds(self, offset: int, end: int | None) -> int:
        size = self.size
        stop = size if end is None else end
        if not 0 <= offset <= stop <= size:
            raise ValueError(f"range from {offset} to {stop} is not inside the disk of {size} bytes")
        return stop

    def _refuse_alignment(self, offset: int, end: int) -> NoReturn:
        raise ValueError(
            f"range from {offset} to {end} is not aligned to the granularity of {self.granularity} bytes; "
            f"only its end may instead be the disk's end, {self.size}"
        )


def _call(function: Any, *args: Any) -> int:
    try:
        return int(function(*args))
    except OverflowError:
        # Beyond 64 bits: out of range for any disk.
        return _EINVAL


def _refuse_new(code: int, size: int, granularity: int) -> NoReturn:
    if code == -errno.EFBIG:
        raise ValueError(f"a bitmap of {size} bytes at {granularity} has more than 2**38 bits")
    if code == -errno.ENOMEM:
        raise MemoryError(f"no address space for a bitmap of {size} bytes at {granularity}")
    if code == _EINVAL:
        if not 0 <= size < 2**63:
            raise ValueError(f"size must be between 0 and 2**63 - 1, not {size}")
        raise ValueError(f"granularity must be a power of two from 512 to 2147483648, not {granularity}")
    check(code)
    raise AssertionError("unreachable")

# SPDX-FileCopyrightText: blockgraph contributors
# SPDX-License-Identifier: MIT
"""First writes to clusters without Python (native/allocator.h): a reserve of room, notes of what was placed where."""

from __future__ import annotations

import contextlib
import errno
import os
import struct
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

from blockgraph._native import ffi, lib
from blockgraph.native.check import check

_LINK = struct.Struct("=qqqq")
#: Links, or rooms, taken by one call.
_TAKE = 1024


class Reserved(NamedTuple):
    """Clusters in a row that nothing refers to.

    Attributes:
        host: host offset, bytes.
        clusters: how many.
        fresh: they read as zeroes.
    """

    host: int
    clusters: int
    fresh: bool


class Link(NamedTuple):
    """Guest clusters from offset `guest` on live at host offset `host` on now; `zero`: they did, and read as zeroes
    now."""

    guest: int
    host: int
    clusters: int
    zero: bool


def unpack_links(links: bytes | bytearray) -> Iterator[Link]:
    """What `Allocator.take_links` has given out."""
    for guest, host, clusters, zero in _LINK.iter_unpack(links):
        yield Link(guest, host, clusters, bool(zero))


def count_links(links: bytes | bytearray) -> int:
    """How many they are."""
    return len(links) // _LINK.size


class Allocator:
    """What an extent map's first writes use. Any thread may call any method, unless it says otherwise.

    Args:
        cluster_bits: 9 to 21.
        table_bits: a table has 2**table_bits clusters, 0 to 30.
        zeroes: tables can say that a cluster which keeps its place reads as zeroes.
    Raises:
        ValueError: a number is out of range.
    """

    def __init__(self, cluster_bits: int, table_bits: int, *, zeroes: bool) -> None:
        out = ffi.new("bg_allocator **")
        code = lib.bg_allocator_new(cluster_bits, table_bits, zeroes, out)
        if code == -errno.EINVAL:
            raise ValueError(f"clusters of 2**{cluster_bits} bytes, tables of 2**{table_bits} of them")
        check(code)
        self._native = ffi.gc(out[0], lib.bg_allocator_free)
        self._span_bits = cluster_bits + table_bits
        assert ffi.sizeof("bg_allocator_link") == _LINK.size

    @property
    def hook(self) -> Any:
        """The `bg_map_allocator *`, for ExtentMap; keep this object as long as it is used."""
        return lib.bg_allocator_hook(self._native)

    def bind(self, fd: int, memory_alignment: int, slot: int) -> None:
        """Where rooms are: a descriptor, the alignment that it asks of memory (bytes), and its slot in the map. No map
        uses the allocator yet, or any more."""
        lib.bg_allocator_bind(self._native, fd, memory_alignment, slot)

    def give(self, rooms: Sequence[tuple[int, int, bool]], low: int) -> None:
        """More room.

        Args:
            rooms: (host offset, clusters, fresh).
            low: with less than so many clusters left, `fileno` becomes readable once; so it does when many links wait.
        Raises:
            ValueError: a room has no clusters or lies before 0.
            MemoryError: no memory; nothing was given.
        """
        code = lib.bg_allocator_give(self._native, ffi.new("bg_allocator_room[]", list(rooms)), len(rooms), low)
        if code == -errno.EINVAL:
            raise ValueError("a room has no clusters or lies before 0")
        if code == -errno.ENOMEM:
            raise MemoryError("no memory for rooms")

    def take_rooms(self) -> list[Reserved]:
        """Take back all of the reserve."""
        rooms: list[Reserved] = []
        out = ffi.new("bg_allocator_room[]", _TAKE)
        while count := lib.bg_allocator_take_rooms(self._native, out, _TAKE):
            rooms += [Reserved(out[i].host, out[i].clusters, bool(out[i].fresh)) for i in range(count)]
        return rooms

    @property
    def reserve(self) -> int:
        """Clusters left."""
        return int(lib.bg_allocator_reserve(self._native))

    @property
    def has_links(self) -> bool:
        """There is something to take. Whoever has been told of the end of a write sees its links."""
        return bool(lib.bg_allocator_has_links(self._native))

    def take_links(self) -> tuple[list[tuple[int, bytes]], int]:
        """Take all links.

        Returns:
            Pairs of a table's number and links of it, packed, in order (a table may come more than once); the highest
            end of a place, host offset, or 0.
        """
        taken: list[tuple[int, bytes]] = []
        out, stop, end = ffi.new("bg_allocator_link[]", _TAKE), ffi.new("int64_t *"), 0
        while count := lib.bg_allocator_take_links(self._native, out, _TAKE, stop):
            end = max(end, stop[0])
            at = 0
            while at < count:
                some = lib.bg_allocator_same_table(self._native, out + at, count - at)
                taken.append((out[at].guest >> self._span_bits, bytes(ffi.buffer(out + at, some * _LINK.size))))
                at += some
        return taken, end

    def hold(self, first: int, end: int) -> bool:
        """Keep first writes from guest clusters [first, end): they miss. Pair with `release`.

        Returns:
            One is under way there, and ends with the map's requests that have begun.
        Raises:
            ValueError: the range is empty or begins before 0.
            MemoryError: no memory.
        """
        code = lib.bg_allocator_hold(self._native, first, end)
        if code == -errno.EINVAL:
            raise ValueError(f"clusters [{first}, {end})")
        if code == -errno.ENOMEM:
            raise MemoryError("no memory for a hold")
        return bool(code)

    def release(self, first: int, end: int) -> None:
        """End a hold of the same clusters.

        Raises:
            ValueError: there is none.
        """
        if lib.bg_allocator_release(self._native, first, end) < 0:
            raise ValueError(f"clusters [{first}, {end}) are not held")

    def fileno(self) -> int:
        """See `give`."""
        return int(lib.bg_allocator_eventfd(self._native))

    def acknowledge(self) -> None:
        """Make `fileno` unreadable; it becomes readable again after a `give` only."""
        with contextlib.suppress(BlockingIOError):
            os.read(self.fileno(), 8)

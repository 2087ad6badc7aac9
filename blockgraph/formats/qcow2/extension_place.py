# SPDX-FileCopyrightText: blockgraph contributors
# SPDX-License-Identifier: MIT
"""Putting the bitmaps extension into the first cluster, so that a crash in between, and a write of which only some
sectors arrive, leave either the old header or the new one.

```
    | header | ... | END | backing file name |            |
    | header | ... | END | backing file name | name again |       1. the name moves out of the way,
    | header | ... | END |                   | name again |       2. the header points to it: 8 bytes, one sector
    | header | ... | END | data | END        | name again |       3. what nobody looks at yet
    | header | ... | BITMAPS | data | END    | name again |       4. 8 bytes, one sector
                                                                  5. the autoclear bit says that it counts
```

An extension that is no longer wanted becomes the end mark when it is the last one, else an unknown extension that
everybody ignores and that is used again later: moving those behind it could not be done without a moment in which
half of them are lost.
"""

from __future__ import annotations

import struct
from typing import NamedTuple

from blockgraph.formats.qcow2.bitmap_directory import EXTENSION_LENGTH
from blockgraph.formats.qcow2.header import AUTOCLEAR, Autoclear, Extension, walk_extensions

_SECTOR = 512
_HEAD = 8
_LENGTH = struct.Struct(">I")
_NAME_PLACE = struct.Struct(">QI")
_NAME_AT = 8
_HEADER_LENGTH_AT = 100
_END = bytes(_HEAD)


class Write(NamedTuple):
    """Bytes for the first cluster, to be durable before the next write."""

    offset: int
    data: bytes


def plan_extension(cluster: bytes, data: bytes | None) -> list[Write]:
    """The writes, in order, that make the first cluster have the extension, or (None) not have it.

    Args:
        cluster: the first cluster of a version 3 image, as it is.
        data: of the extension, EXTENSION_LENGTH bytes.
    Raises:
        ValueError: there is no room for it.
    """
    plan = _Plan(cluster)
    if data is None:
        plan.remove()
    else:
        assert len(data) == EXTENSION_LENGTH
        plan.place(data)
    return plan.writes


class _Plan:
    def __init__(self, cluster: bytes) -> None:
        self._cluster = cluster
        self.writes: list[Write] = []
        self._name_at, self._name_length = _NAME_PLACE.unpack_from(cluster, _NAME_AT)
        self._autoclear = int.from_bytes(cluster[AUTOCLEAR : AUTOCLEAR + 8], "big")
        start = _LENGTH.unpack_from(cluster, _HEADER_LENGTH_AT)[0]
        limit = self._name_at if self._name_at else len(cluster)
        self._slots = list(walk_extensions(cluster, start, limit))
        self._end = start
        for _, at, length in self._slots:
            self._end = at + _HEAD + -(-length // 8) * 8

    def _find(self, kind: Extension) -> int | None:
        for found, at, length in self._slots:
            if (found, length) == (kind, EXTENSION_LENGTH):
                return at
        return None

    def _counts(self, counts: bool) -> None:
        """Set or clear the autoclear bit."""
        new = self._autoclear | Autoclear.BITMAPS if counts else self._autoclear & ~int(Autoclear.BITMAPS)
        if new != self._autoclear:
            self.writes.append(Write(AUTOCLEAR, new.to_bytes(8, "big")))
            self._autoclear = new

    def remove(self) -> None:
        """See plan_extension."""
        self._counts(False)
        for number, (kind, at, length) in reversed(list(enumerate(self._slots))):
            if kind != Extension.BITMAPS:
                continue
            if number == len(self._slots) - 1:
                self.writes.append(Write(at, _END))
                self._slots.pop()
                self._end = at
            else:
                self.writes.append(Write(at, struct.pack(">I", Extension.UNUSED)))
                self._slots[number] = (Extension.UNUSED, at, length)

    def place(self, data: bytes) -> None:
        """See plan_extension."""
        at = self._find(Extension.BITMAPS)
        if at is not None:
            if not _in_one_sector(at + _HEAD, len(data)):
                self._counts(False)
            self.writes.append(Write(at + _HEAD, data))
        else:
            self.remove()  # one of another length
            at = self._find(Extension.UNUSED)
            if at is not None:
                self._append(at, data)
            else:
                self._make_room(self._end + _HEAD + len(data) + _HEAD)
                self._append(self._end, data + _END)
        self._counts(True)

    def _append(self, at: int, data: bytes) -> None:
        head = struct.pack(">II", Extension.BITMAPS, EXTENSION_LENGTH)
        if _in_one_sector(at, _HEAD + len(data)):
            self.writes.append(Write(at, head + data))
        else:
            self.writes += [Write(at + _HEAD, data), Write(at, head)]

    def _make_room(self, end: int) -> None:
        """Have the extensions reach `end`."""
        name_end = self._name_at + self._name_length
        if not self._name_at or end <= self._name_at:
            if end > len(self._cluster):
                raise ValueError("no room in the first cluster")
            return
        name = self._cluster[self._name_at : name_end]
        to = max(end, name_end)
        if to + len(name) <= len(self._cluster):
            self.writes.append(Write(to, name))
            self.writes.append(Write(_NAME_AT, to.to_bytes(8, "big")))
        elif end + len(name) <= min(_SECTOR, len(self._cluster)):
            # All of it is one sector: header, end mark where it was, and the name behind the room.
            middle = self._cluster[_NAME_AT + 8 : self._end] + bytes(end - self._end)
            self.writes.append(Write(_NAME_AT, end.to_bytes(8, "big") + middle + name))
        else:
            raise ValueError("no room in the first cluster")


def _in_one_sector(offset: int, length: int) -> bool:
    return offset // _SECTOR == (offset + length - 1) // _SECTOR

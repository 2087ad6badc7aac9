# SPDX-FileCopyrightText: blockgraph contributors
# SPDX-License-Identifier: MIT
"""Persistent bitmaps of a qcow2 image (see bitmaps.store), as QEMU keeps them.

```
    load            nothing is written; a bitmap marked as in use is inconsistent
    first write     the flag in_use goes into every entry of the directory, in place, and is durable
    save            bits, tables, a new directory ──► refcounts, flush ──► header ──► flush ──► old clusters are freed
```

The flags of an entry lie in one sector, so marking needs no care; the header is changed as `extension_place` says. A
crash at any point leaves the bitmaps as they were loaded, marked as in use, or as they were saved; in the few steps
between, and only where the image must be given an extension or loses it, no bitmaps.

What can not be kept up to date: bitmaps of unknown types, with unknown flags or extra data are kept as they are, with
in_use where they would have to follow the disk. A bitmap whose table is damaged is inconsistent, and gets an empty
table. Other damage (of the extension, of the directory) makes an image read-only; `bitmaps = "drop"` is the way out.
"""

from __future__ import annotations

import logging
from array import array
from collections.abc import Iterator
from dataclasses import replace
from itertools import pairwise
from typing import TYPE_CHECKING

from blockgraph.bitmaps.bitmap import DirtyBitmap
from blockgraph.errors import BlockGraphError, CorruptImage, GraphError, IOFailure, NoSpace, OutOfRange, ReadOnly
from blockgraph.formats.qcow2.bitmap_directory import (
    EXTENSION_LENGTH,
    MAX_BITMAPS,
    MAX_BITS,
    MAX_DIRECTORY,
    DirectoryPlace,
    Entry,
    Flags,
    pack_directory,
    parse_directory,
    parse_extension,
    table_size,
)
from blockgraph.formats.qcow2.bitmap_tables import NewRoom, Stored, load_bits, read_stored, store_bits, store_table
from blockgraph.formats.qcow2.extension_place import plan_extension
from blockgraph.formats.qcow2.header import AUTOCLEAR, Autoclear, Extension, walk_extensions

if TYPE_CHECKING:
    from blockgraph.formats.qcow2.driver import Qcow2

log = logging.getLogger(__name__)

#: Bytes of bits and of tables that one image may make us hold or go through when it is opened.
MAX_LOADED = 4 << 30
MAX_TABLES = 1 << 30

_FULL_BACKUP = "make a full backup next"
_WAY_OUT = 'open it read-only, or with bitmaps = "drop" to do without them, and make a full backup next'


class StoredBitmaps:
    """See the module's text.

    Args:
        driver: has opened its tables.
        cluster: the first cluster of the image.
    """

    def __init__(self, driver: Qcow2, cluster: bytes) -> None:
        self._driver = driver
        self._image = driver.image
        self._node = driver.node
        self._place: DirectoryPlace | None = None
        self._stored: list[Stored] = []
        #: what may be on disk instead, after a failure that left it open
        self._before: tuple[DirectoryPlace | None, list[Stored]] | None = None
        #: and that may be nothing: the header was being changed
        self._switching = False
        self._known = False
        self._marked = False
        self._room = self._image.header.version >= 3 and _has_room(cluster)

    # Facts.

    @property
    def dropped(self) -> bool:
        """The user does without them."""
        return self._driver.options.bitmaps == "drop"

    @property
    def maintained(self) -> bool:
        """The image has bitmaps, and they stay right."""
        return self._place is not None

    def ranges(self) -> Iterator[tuple[int, int]]:
        """(host offset, clusters) of the directory, and of all tables and bits."""
        bits = self._image.cluster_bits
        if self._place is not None:
            yield self._place.offset, -(-self._place.size >> bits)
        for stored in self._stored:
            yield from stored.ranges(bits)

    def check_counted(self) -> None:
        """Before refcounts are made from what is known to refer to clusters.

        Raises:
            CorruptImage: it is not known of all bitmaps.
        """
        for stored in self._stored:
            if stored.problem is not None:
                raise self._corrupt(f"refcounts are stale, and bitmap '{stored.entry.text}' is damaged")

    def check(self, bitmap: DirtyBitmap) -> None:
        name, node = bitmap.name, self._node.name
        if self._image.header.version < 3:
            raise GraphError(
                f"bitmap '{name}' can not be persistent: images of version 2 (compat 0.10) have no place for bitmaps",
                node=node,
                op="add",
                hint="upgrade the image with 'qemu-img amend -o compat=1.1'",
            )
        problem = self._problem(bitmap, bitmap.size)
        others = [other for other in self._node.bitmaps.values() if other.persistent]
        if problem is None and not self._room:
            problem = "the image's first cluster has no room for the extension; convert it to larger clusters"
        if problem is None and any(stored.entry.text == name for stored in self._foreign()):
            problem = "the image has one of that name that only another program understands"
        if problem is None and len(others) >= MAX_BITMAPS // 2:
            names = [bitmap.name, *(other.name for other in others)]
            entries = [Entry(0, 0, 0, 0, name.encode("utf-8", "surrogateescape")) for name in names]
            entries += [stored.entry for stored in self._foreign()]
            if len(entries) > MAX_BITMAPS:
                problem = f"an image has at most {MAX_BITMAPS}"
            elif sum(entry.packed_size for entry in entries) > MAX_DIRECTORY:
                problem = f"the names of all bitmaps take more than the {MAX_DIRECTORY} bytes of a directory"
        if problem is not None:
            raise GraphError(f"bitmap '{name}' can not be persistent: {problem}", node=node, op="add")

    def _problem(self, bitmap: DirtyBitmap, size: int) -> str | None:
        """Why the bitmap of a disk of that size can not be stored."""
        entries = table_size(size, bitmap.granularity, self._image.cluster_size)
        if not entries:
            return "an empty disk has nothing to store"
        if entries << self._image.cluster_bits > MAX_BITS:
            return f"for {size} bytes it takes more than {MAX_BITS} bytes: use a larger granularity"
        return None

    def check_resize(self, size: int) -> None:
        """Refuse a size that the image's bitmaps can not follow.

        Raises:
            OutOfRange: names the bitmap.
        """
        for bitmap in self._node.bitmaps.values():
            problem = self._problem(bitmap, size) if bitmap.persistent else None
            if problem is not None:
                raise OutOfRange(
                    f"persistent bitmap '{bitmap.name}' can not follow: {problem}",
                    node=self._node.name,
                    op="truncate",
                    hint="remove the bitmap",
                )
        for stored in self._foreign():
            if not stored.entry.in_use:
                raise OutOfRange(
                    f"bitmap '{stored.entry.text}' {stored.entry.foreign}, and can not follow",
                    node=self._node.name,
                    op="truncate",
                )

    def _foreign(self) -> list[Stored]:
        return [stored for stored in self._stored if stored.entry.foreign is not None]

    def _corrupt(self, reason: str) -> CorruptImage:
        error = CorruptImage(f"persistent bitmaps: {reason}", node=self._node.name, op="open", hint=_WAY_OUT)
        error.file = self._driver.filename()
        return error

    # Looking.

    async def load(self) -> list[DirtyBitmap]:
        try:
            await self.look()
            return [await self._load(stored) for stored in self._stored if stored.entry.foreign is None]
        except BlockGraphError as error:
            if not self._node.read_only:
                raise
            log.warning("node '%s' is read-only, and its persistent bitmaps are not there: %s", self._node.name, error)
            return []

    async def _load(self, stored: Stored) -> DirtyBitmap:
        entry, node = stored.entry, self._node.name
        useless = stored.problem is not None or entry.in_use
        if stored.problem is not None:
            log.warning("node '%s': bitmap '%s' is damaged: %s; %s", node, entry.text, stored.problem, _FULL_BACKUP)
        elif useless:
            log.warning(
                "node '%s': bitmap '%s' was not saved by its last user, and may have missed writes; %s",
                node,
                entry.text,
                _FULL_BACKUP,
            )
        try:
            bitmap = DirtyBitmap(
                entry.text,
                self._driver.size(),
                entry.granularity,
                node=node,
                enabled=bool(entry.flags & Flags.AUTO),
                persistent=True,
                inconsistent=useless,
            )
        except MemoryError as error:
            raise IOFailure(f"no memory for bitmap '{entry.text}'", node=node, op="open") from error
        if not useless:
            await load_bits(self._image, stored, bitmap.recorder)
        stored.bitmap = bitmap
        return bitmap

    async def look(self) -> None:
        """Know what the image has; from the second time on, see that nobody else has changed it.

        Raises:
            CorruptImage: it contradicts its specification, or what was seen before.
        """
        if self.dropped or self._image.header.version < 3:
            return
        place = await self._find()
        entries = [] if place is None else await self._directory(place)
        if not self._known:
            await self._judge(place, entries)
            self._known = True
        elif not self._recognise(place, entries):
            raise CorruptImage(
                "the image's bitmaps are not those that it had when it was opened: somebody else has written it",
                node=self._node.name,
                hint="remove the node and add it again",
            )

    async def _find(self) -> DirectoryPlace | None:
        """What the header says now."""
        image, header = self._image, self._image.header
        cluster = bytes(await image.read(0, image.cluster_size))
        autoclear = int.from_bytes(cluster[AUTOCLEAR : AUTOCLEAR + 8], "big")
        name_at = int.from_bytes(cluster[8:16], "big") or len(cluster)
        found = [
            cluster[at + 8 : at + 8 + length]
            for kind, at, length in walk_extensions(cluster, header.length, name_at)
            if kind == Extension.BITMAPS
        ]
        if not autoclear & Autoclear.BITMAPS:
            if found and not self._known:
                log.warning(
                    "node '%s': a program that does not know bitmaps has written the image; its persistent bitmaps are "
                    "stale and left out; %s",
                    self._node.name,
                    _FULL_BACKUP,
                )
            return None
        if len(found) > 1:
            raise self._corrupt("there are several extensions")
        try:
            return parse_extension(found[0], image.cluster_size, image.file_end()) if found else None
        except ValueError as error:
            raise self._corrupt(str(error)) from None

    async def _directory(self, place: DirectoryPlace) -> list[Entry]:
        try:
            return parse_directory(bytes(await self._image.read(place.offset, place.size)), place.count)
        except ValueError as error:
            raise self._corrupt(str(error)) from None

    def _recognise(self, place: DirectoryPlace | None, entries: list[Entry]) -> bool:
        if self._before is None:
            return place == self._place and entries == [stored.entry for stored in self._stored]
        # A write of the directory or the header has failed: either form, marked as in use or not, may be there.
        for known, stored in ((self._place, self._stored), self._before):
            if place == known and [e.marked() for e in entries] == [s.entry.marked() for s in stored]:
                self._place = known
                self._stored = [replace(old, entry=entry) for old, entry in zip(stored, entries, strict=True)]
                return True
        if place is not None or not self._switching:
            return False
        self._place, self._stored = None, []
        return True

    async def _judge(self, place: DirectoryPlace | None, entries: list[Entry]) -> None:
        image, disk = self._image, self._driver.size()
        most = MAX_BITS >> image.cluster_bits
        self._place, self._stored = place, []
        tables = places = 0
        for entry in entries:
            if entry.foreign is None and table_size(disk, entry.granularity, image.cluster_size) > most:
                raise self._corrupt(f"bitmap '{entry.text}' is too fine for a disk of {disk} bytes")
            stored = await read_stored(image, entry, disk)
            tables += 0 if stored.problem else entry.table_size * 8
            places += len(stored.places)
            if tables > MAX_TABLES or places << image.cluster_bits > MAX_LOADED:
                raise self._corrupt(f"they are more than the {MAX_LOADED >> 30} GiB that are held in memory")
            self._stored.append(stored)
        if entries:
            self._find_overlaps()
        for stored in self._foreign():
            if stored.problem is not None:
                raise self._corrupt(f"bitmap '{stored.entry.text}' is damaged: {stored.problem}")
            log.warning(
                "node '%s': bitmap '%s' %s; it is kept, and not used",
                self._node.name,
                stored.entry.text,
                stored.entry.foreign,
            )

    def _find_overlaps(self) -> None:
        """A bitmap that shares a cluster with other metadata is damaged."""
        bits = self._image.cluster_bits
        used = array("Q", [offset >> bits for offset in self._driver.metadata()])
        for host, clusters in self.ranges():
            used.extend(range(host >> bits, (host >> bits) + clusters))
        twice = {low for low, high in pairwise(sorted(used)) if low == high}
        if not twice:
            return
        for stored in self._stored:
            for host, clusters in list(stored.ranges(bits)):
                shared = twice.intersection(range(host >> bits, (host >> bits) + clusters))
                if shared:
                    stored.problem = f"it shares the cluster at host offset {min(shared) << bits:#x}"
                    break

    # Beginning.

    async def begin(self) -> None:
        if self._node.read_only:
            raise ReadOnly("persistent bitmaps can not change", node=self._node.name, op="bitmap")
        await self._driver.begin_writing()

    async def mark(self) -> None:
        """For the driver: what is stored is out of date from now on; says so durably."""
        entries = [stored.entry.marked() for stored in self._stored]
        if self._place is not None and entries != [stored.entry for stored in self._stored]:
            self._before = self._place, self._stored
            await self._image.write(self._place.offset, pack_directory(entries))
            await self._image.file.flush()
            for stored, entry in zip(self._stored, entries, strict=True):
                stored.entry = entry
        self._before = None
        self._switching = False
        self._marked = True

    # Saving.

    async def save(self) -> None:
        """See BitmapStore. No request is in flight, and the next one begins anew."""
        if not self._marked or self._image.header.version < 3:
            return
        persistent = [bitmap for bitmap in self._node.bitmaps.values() if bitmap.persistent]
        extension = self._image.header.extension(Extension.BITMAPS)
        if not persistent and not self._stored and extension is None:
            return
        try:
            self._image.check_writable()
            async with self._driver.starting:
                await self._save(persistent)
        except BlockGraphError as error:
            kind = NoSpace if isinstance(error, NoSpace) else IOFailure
            what = "its persistent bitmaps could not be saved, and are out of date in the image"
            raise kind(
                f"{what}: {error.reason or error}",
                node=self._node.name,
                op="save",
                errno=error.errno,
                hint=_FULL_BACKUP if any(not bitmap.inconsistent for bitmap in persistent) else error.hint,
            ) from error

    async def _save(self, persistent: list[DirtyBitmap]) -> None:
        driver, image = self._driver, self._image
        room = NewRoom(image, driver.refcounts)
        names = {one.entry.text: one for one in self._stored if one.entry.foreign is None and one.problem is None}
        try:
            stored = [await self._store(bitmap, names.get(bitmap.name), room) for bitmap in persistent]
            stored += self._foreign()
            place = await self._store_directory([one.entry for one in stored], room) if stored else None
            await driver.writeback.run()
            cluster = bytes(await image.read(0, image.cluster_size))
            plan = plan_extension(cluster, None if place is None else place.pack())
        except ValueError:
            room.give_back()
            raise self._corrupt("the first cluster has no room for the extension") from None
        except BaseException:
            room.give_back()
            raise
        # From here on either directory may be the one on disk: both stay, and no write goes on without another look.
        self._before = self._place, self._stored
        old, self._place, self._stored = self._before, place, stored
        self._known, self._marked, self._switching = True, False, True
        driver.stop_writing()
        for write in plan:
            await image.write(write.offset, write.data)
            await image.file.flush()
        self._before, self._switching = None, False
        self._take_over(place)
        await self._free(*old)

    def _take_over(self, place: DirectoryPlace | None) -> None:
        header = self._image.header
        header.autoclear &= ~int(Autoclear.BITMAPS)
        header.extensions = [(kind, data) for kind, data in header.extensions if kind != Extension.BITMAPS]
        if place is not None:
            header.autoclear |= Autoclear.BITMAPS
            header.extensions.append((Extension.BITMAPS, place.pack()))

    async def _store(self, bitmap: DirtyBitmap, old: Stored | None, room: NewRoom) -> Stored:
        """Put a bitmap into new clusters, or (inconsistent, or empty as before) leave it in its `old` ones."""
        if old is not None and bitmap.inconsistent:
            return old
        image = self._image
        entry = Entry(
            0,
            table_size(bitmap.size, bitmap.granularity, image.cluster_size),
            (Flags.AUTO if bitmap.enabled else 0) | (Flags.IN_USE if bitmap.inconsistent else 0),
            bitmap.granularity.bit_length() - 1,
            bitmap.name.encode("utf-8", "surrogateescape"),
        )
        if old is not None and old.bitmap is bitmap and old.entry.extra:
            entry = replace(entry, flags=entry.flags | Flags.EXTRA_DATA_COMPATIBLE, extra=old.entry.extra)
        bits = None if bitmap.inconsistent else bitmap.contents()
        if bits is None or not bits.count():
            table = array("Q", bytes(8 * entry.table_size))
            if old is not None and not old.places and old.entry.table_size == entry.table_size:
                return Stored(replace(entry, table_offset=old.entry.table_offset), bitmap=bitmap)
        else:
            table = await store_bits(image, bits, room)
        entry = replace(entry, table_offset=await store_table(image, table, room))
        places = [(index, place) for index, place in enumerate(table) if place]
        return Stored(
            entry,
            array("I", [index for index, _ in places]),
            array("Q", [place for _, place in places]),
            bitmap=bitmap,
        )

    async def _store_directory(self, entries: list[Entry], room: NewRoom) -> DirectoryPlace:
        raw = pack_directory(entries)
        host = await room.bytes(len(raw))
        await self._image.write(host, raw)
        return DirectoryPlace(len(entries), len(raw), host)

    async def _free(self, place: DirectoryPlace | None, stored: list[Stored]) -> None:
        """The header no longer leads there."""
        kept = {one.entry.table_offset for one in self._stored}
        refcounts, bits = self._driver.refcounts, self._image.cluster_bits
        ranges = [] if place is None else [(place.offset, -(-place.size >> bits))]
        for one in stored:
            if one.entry.table_offset not in kept:
                ranges += one.ranges(bits)
        for host, clusters in ranges:
            refcounts.overlaps.remove(host, clusters)
            refcounts.reclaim.unused(host, clusters)
        await self._driver.writeback.close()

    def closing(self) -> None:
        """For the driver: tell when bitmaps stay behind that were not saved."""
        lost = [bitmap.name for bitmap in self._node.bitmaps.values() if bitmap.persistent and not bitmap.inconsistent]
        if self._marked and lost:
            log.error(
                "node '%s': the image keeps its bitmaps as in use, they can not be used any more: %s; %s",
                self._node.name,
                ", ".join(f"'{name}'" for name in lost),
                _FULL_BACKUP,
            )


def _has_room(cluster: bytes) -> bool:
    try:
        plan_extension(cluster, bytes(EXTENSION_LENGTH))
    except ValueError:
        return False
    return True

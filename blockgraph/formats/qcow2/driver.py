# SPDX-FileCopyrightText: blockgraph contributors
# SPDX-License-Identifier: MIT
"""qcow2: a disk in clusters of a file, allocated when first written, over an optional backing disk.

```
    guest      | A | B | C | D | E | ...           A data, B zero, C compressed, D and E not allocated
                 |       |
    file       | header | counts | L1 | L2 | A | C |
    backing    | . | . | . | D |                   D is read here; E lies past the backing's end: zeroes
```

Versions 2 and 3, clusters of 512 bytes to 2 MiB; compressed clusters (zlib, zstd) are read, and written as plain ones.

Options, under QEMU's names (BlockdevOptionsQcow2):

* `file`: the child with the image, required.
* `backing`: the backing node; `null`: none, whatever the image names; omitted: the one that the image names.
* `cache-size`, `l2-cache-size`, `refcount-cache-size`: bytes of tables kept in memory; defaults: 32 MiB for L2 tables
  (less where the whole disk needs less), 4 clusters or 1 MiB of refcount blocks. `cache-size` is the sum of the others.
* `lazy-refcounts`: accepted; refcounts are always written together with what needs them, at no extra cost per request.
* `pass-discard-request`: clusters that the guest discards or zeroes are discarded in the file too; default: when
  `discard` is "unmap".
* `pass-discard-other`: so are clusters that are freed for other reasons; default false.
* `bitmaps`: "drop": do without the persistent bitmaps that the image has; they are lost with the first write. Meant for
  images whose bitmap directory is damaged. Default: "keep".

Example:

    [[nodes]]
    node-name = "disk"
    driver = "qcow2"
    file = {driver = "file", filename = "disk.qcow2"}

Metadata is changed in memory and written back at a flush, at close, or when much is dirty, in an order that keeps the
image consistent through a crash at any point (see `writeback`). The dirty bit of an image with lazy refcounts that was
not closed makes the refcounts be rebuilt before the first write; with the corrupt bit it opens read-only only.

Persistent bitmaps of version 3 images are loaded when the node opens, marked as in use before the first write or change
of one, and saved when the node closes or becomes read-only (see `bitmaps`). Whoever is killed in between leaves them
inconsistent: they can be removed, and a full backup is needed. QEMU and blockgraph read what the other has saved.

First writes to clusters are native where one extent map leads here and the file is a plain one (see `first_writes`).

Limits: internal snapshots make an image read-only here. Extended L2 entries, external data files, refcounts of other
than 16 bits and encryption are refused by name.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Mapping as MappingABC
from collections.abc import Sequence
from typing import Annotated, ClassVar, Literal

from msgspec import UNSET, Meta, UnsetType

from blockgraph import debug
from blockgraph.driver import Allocation, ChildSpec, Format, ImpliedChild, Info, Lookup
from blockgraph.errors import CorruptImage, OptionError, ReadOnly
from blockgraph.extent import BlockStatus, Extent, Status
from blockgraph.flags import Flag
from blockgraph.formats.qcow2.allocation import BusyClusters, NewClusters, allocate
from blockgraph.formats.qcow2.bitmaps import StoredBitmaps
from blockgraph.formats.qcow2.compressed import CompressedClusters
from blockgraph.formats.qcow2.first_writes import FirstWrites
from blockgraph.formats.qcow2.header import AUTOCLEAR, MAX_CLUSTER_BITS, Autoclear, Incompatible, parse_header
from blockgraph.formats.qcow2.image import Image
from blockgraph.formats.qcow2.lookup import look_up
from blockgraph.formats.qcow2.mapping import Mapping
from blockgraph.formats.qcow2.rebuild import rebuild
from blockgraph.formats.qcow2.refcount import Refcounts
from blockgraph.formats.qcow2.resize import resize
from blockgraph.formats.qcow2.writeback import WriteBack
from blockgraph.formats.qcow2.zeroes import Mode, rewrite
from blockgraph.native import L2Kind, L2Places, L2Run
from blockgraph.node import Child
from blockgraph.options import NodeOptions, NodeRef
from blockgraph.perm import Role

log = logging.getLogger(__name__)

_L2_CACHE = 32 << 20
_REFCOUNT_CACHE = 1 << 20
_Size = Annotated[int, Meta(ge=0, le=(1 << 63) - 1)]

_STATUS = {
    L2Kind.UNALLOCATED: Status.UNALLOCATED,
    L2Kind.ZERO: Status.ZERO,
    L2Kind.ZERO_ALLOCATED: Status.ZERO,
    L2Kind.DATA: Status.DATA,
    L2Kind.COMPRESSED: Status.SPECIAL,
}


class Qcow2Options(NodeOptions, kw_only=True, frozen=True):
    """See the module's text."""

    file: NodeRef
    backing: NodeRef | UnsetType | None = UNSET
    lazy_refcounts: bool = False
    cache_size: _Size | None = None
    l2_cache_size: _Size | None = None
    refcount_cache_size: _Size | None = None
    pass_discard_request: bool | None = None
    pass_discard_other: bool = False
    bitmaps: Literal["keep", "drop"] = "keep"


class Qcow2(Format):
    """See the module's text.

    Attributes:
        image, refcounts, mapping, writeback, stored_bitmaps: the parts of an open image.
        starting: held while writing begins, or ends before the node does.
        busy: guest clusters that are being changed.
    """

    name = "qcow2"
    children: ClassVar[MappingABC[str, ChildSpec]] = {
        "file": ChildSpec(Role.PRIMARY | Role.DATA | Role.METADATA),
        "backing": ChildSpec(Role.COW, required=False, implied=True),
    }
    Options: ClassVar[type[NodeOptions]] = Qcow2Options
    bitmap_place = "image"
    revokes = True
    options: Qcow2Options
    zero_flags = Flag.MAY_UNMAP | Flag.NO_FALLBACK

    file: Child
    backing: Child | None

    image: Image
    refcounts: Refcounts
    mapping: Mapping
    writeback: WriteBack
    stored_bitmaps: StoredBitmaps
    starting: asyncio.Lock
    first_writes: FirstWrites | None = None

    # Control path.

    async def open(self) -> None:
        self._opened = False
        self._writing = False
        self.starting = asyncio.Lock()
        self.busy = BusyClusters()
        below = self.file.node
        first = bytearray(min(below.size(), 1 << MAX_CLUSTER_BITS))
        head = memoryview(first)[:4096]
        await self.file.pread(0, head)
        # The rest of the first cluster, which holds extensions and the backing file's name.
        bits = min(int.from_bytes(first[20:24], "big"), MAX_CLUSTER_BITS)
        length = min(len(first), max(4096, 1 << bits))
        if length > len(head):
            await self.file.pread(len(head), memoryview(first)[len(head) : length])
        header = parse_header(bytes(first[:length]), below.size(), self.node.name)
        self.image = Image(self.node, self.file, header)
        if not self.node.read_only:
            self.check_writable()
        l2_cache, refcount_cache = self._cache_sizes()
        self._size = header.size
        self.refcounts = Refcounts(self.image, refcount_cache)
        self.mapping = Mapping(self.image, self.refcounts, l2_cache)
        self.writeback = WriteBack(self.image, self.refcounts, self.mapping)
        self._compressed = CompressedClusters(self.image)
        self._span_bits = self.image.cluster_bits + self.image.l2_bits
        await self.refcounts.open()
        await self.mapping.open()
        self.stored_bitmaps = StoredBitmaps(self, bytes(first[: self.image.cluster_size]))
        self.node.bitmap_store = self.stored_bitmaps
        self._set_discard()
        self._opened = True

    def check_writable(self) -> None:
        header = self.image.header
        if header.incompatible & Incompatible.CORRUPT:
            raise CorruptImage(
                "the image is marked as corrupt",
                node=self.node.name,
                op="open",
                hint="open it read-only, or run 'qemu-img check -r all' on it",
            )
        if header.snapshots:
            raise self.unsupported_feature("internal snapshots")

    def unsupported_feature(self, feature: str) -> ReadOnly:
        """The error for an image that can be read but not written."""
        return ReadOnly(
            f"the image has {feature}, which can not be kept while it is written",
            node=self.node.name,
            op="open",
            hint="open it read-only",
        )

    def _cache_sizes(self) -> tuple[int, int]:
        """Bytes for L2 tables and for refcount blocks."""
        options = self.options
        total, l2, refcount = options.cache_size, options.l2_cache_size, options.refcount_cache_size
        if total is not None:
            for name, part in (("l2-cache-size", l2), ("refcount-cache-size", refcount)):
                if part is not None and part > total:
                    raise OptionError("is more than cache-size", path=name, value=part, node=self.node.name)
            if l2 is not None and refcount is not None:
                raise OptionError(
                    "follows from l2-cache-size and refcount-cache-size; give two of the three",
                    path="cache-size",
                    value=total,
                    node=self.node.name,
                )
        least = max(_REFCOUNT_CACHE, 4 * self.image.cluster_size)
        if total is not None:
            if l2 is not None:
                refcount = total - l2
            elif refcount is not None:
                l2 = total - refcount
            else:
                refcount = min(least, total // 2)
                l2 = total - refcount
        return _L2_CACHE if l2 is None else l2, least if refcount is None else refcount

    def _set_discard(self) -> None:
        wanted = self.options.pass_discard_request
        if wanted is None:
            wanted = self.options.discard == "unmap"
        self._discard_request = wanted
        self.refcounts.reclaim.discard = self.file.discard

    async def close(self) -> None:
        if getattr(self, "_opened", False):
            self._opened = False
            self.stored_bitmaps.closing()
            if self._writing and self.image.damaged is None:
                await self.writeback.close()

    def implied(self) -> MappingABC[str, ImpliedChild]:
        header = self.image.header
        if header.backing_file is None or self.options.backing is not UNSET:
            return {}
        return {"backing": ImpliedChild(header.backing_file, header.backing_format)}

    def reopen_check(self, options: NodeOptions) -> None:
        super().reopen_check(options)
        if options.read_only:
            return
        self.check_writable()
        if self.options.force_share:
            raise OptionError(
                "others may have written the image since it was opened",
                path="read-only",
                value=False,
                node=self.node.name,
                hint="remove the node and add it again",
            )

    def reopened(self, options: NodeOptions) -> None:
        super().reopened(options)
        self._set_discard()
        if options.read_only:
            self._writing = False

    async def begin_writing(self) -> None:
        """Before the first write: what the image promises to others who wrote it is withdrawn or put right."""
        async with self.starting:
            if self._writing:
                return
            image, header, bitmaps = self.image, self.image.header, self.stored_bitmaps
            await bitmaps.look()
            if header.incompatible & Incompatible.DIRTY:
                bitmaps.check_counted()
                await rebuild(image, self.refcounts, self.mapping, self.writeback, bitmaps.ranges())
            offsets = self.metadata()
            for at, clusters in bitmaps.ranges():
                offsets += range(at, at + (clusters << image.cluster_bits), image.cluster_size)
            twice = self.refcounts.overlaps.fill(offsets)
            if twice is not None:
                raise await image.damage(f"two tables share the cluster at host offset {twice:#x}")
            keep = header.autoclear & Autoclear.BITMAPS if bitmaps.maintained else 0
            if header.autoclear != keep:
                header.autoclear = keep
                await image.write(AUTOCLEAR, keep.to_bytes(8, "big"))
                await self.file.flush()
            await bitmaps.mark()
            if self.first_writes is None:
                self.first_writes = self.mapping.first_writes = FirstWrites(self)
            self._writing = True
            self.node.revoke(0, self._size)  # maps were told that nothing may be written

    def stop_writing(self) -> None:
        """The next write, of which none is in flight, begins anew."""
        self._writing = False
        self.node.revoke(0, self._size)

    def metadata(self) -> list[int]:
        """Host offsets of all clusters with the header, the L1 table, L2 tables, the refcount table and its blocks."""
        image, header = self.image, self.image.header
        offsets = [0, *self.refcounts.table_offsets(), *self.mapping.l1_offsets()]
        for at, clusters in (
            (header.l1_offset, -(-header.l1_size * 8 >> image.cluster_bits)),
            (header.reftable_offset, header.reftable_clusters),
        ):
            offsets += range(at, at + (clusters << image.cluster_bits), image.cluster_size)
        return offsets

    # Facts.

    def size(self) -> int:
        return self._size

    def resized(self, size: int) -> None:
        """The disk has that size now, bytes."""
        self._size = size

    def info(self) -> Info:
        return Info(self.image.cluster_size, zero_init=not self.backed)

    @property
    def backed(self) -> bool:
        """Unallocated clusters may show other bytes than zeroes, now or once the image's own backing file is used."""
        return self.backing is not None or self.image.header.backing_file is not None

    def cow(self) -> Child | None:
        return self.backing

    # Data path.

    async def map(self, offset: int, length: int) -> Extent:
        bits = self.image.cluster_bits
        index = offset >> self._span_bits
        table = self.mapping.tables.get(index) or await self.mapping.table(index)
        base = index << self._span_bits
        if table is None:
            # Without another table up to the L1 table's end, which lies behind the disk's.
            end = self.mapping.next_table(index + 1) << self._span_bits
            return Extent(base, end - base, Status.UNALLOCATED)
        want = ((offset + length - 1) >> bits) - (offset >> bits) + 1
        run = self.mapping.run(table, (offset - base) >> bits, want)
        start, length = base + (run.first << bits), run.clusters << bits
        kind = run.kind
        if kind == L2Kind.DATA:
            own = run.copied and self.mapping.is_own(index)  # else a table that a snapshot has would be changed
            writable = self._writing and own and self._may_write(run.host_offset, length)
            return Extent(start, length, Status.DATA, self.file, run.host_offset, writable)
        if kind == L2Kind.ZERO_ALLOCATED:
            return Extent(start, length, Status.ZERO, self.file, run.host_offset)
        first = self.first_writes if self._writing and kind != L2Kind.COMPRESSED else None
        allocate = first is not None and self.mapping.is_own(index) and first.offered()
        return Extent(start, length, _STATUS[kind], allocate=allocate)

    def places(self, offset: int) -> L2Places | None:
        index = offset >> self._span_bits
        table = self.mapping.tables.get(index)
        if table is None or not table.fragmented or self.image.damaged is not None:
            return None
        image, end = self.image, self.image.whole_end()
        metadata = self.refcounts.overlaps.clusters
        first, bits, version = index << self._span_bits, image.cluster_bits, image.header.version
        return L2Places(table.buf, first, bits, version, end, metadata, 0 if table.dirty else table.host)

    async def look_up(self, runs: Sequence[tuple[int, int]], *, write: bool = False) -> Lookup | None:
        return await look_up(self, runs, write=write)

    def writes_in_place(self, indexes: Sequence[int]) -> bool:
        """Data in clusters that are the image's alone may be overwritten, say the tables of these L1 indexes.

        A table that a snapshot has would be changed.
        """
        tables = (index for index in indexes if self.mapping.has_table(index))
        return self._writing and self.image.damaged is None and all(self.mapping.is_own(index) for index in tables)

    def _may_write(self, host: int, length: int) -> bool:
        return self.image.damaged is None and self.refcounts.overlaps.find(host, length) is None

    def check_overlap(self, host: int, length: int) -> None:
        """Refuse to write guest data over metadata.

        Raises:
            CorruptImage: an entry leads there.
        """
        at = self.refcounts.overlaps.find(host, length)
        if at is not None:
            raise self.image.corrupt(f"an L2 entry leads to the metadata cluster at host offset {at:#x}")

    async def allocate(self, offset: int, length: int) -> Allocation:
        if not self._writing:
            await self.begin_writing()
        return await allocate(self, offset, length)

    async def _pwrite_new(self, offset: int, buf: memoryview) -> Extent:
        allocation = await self.allocate(offset, len(buf))
        extent = allocation.extent
        if debug.enabled:
            await self.file.event("write_aio")
        if isinstance(allocation, NewClusters):
            await allocation.write(buf[: extent.length])
        else:
            await self.file.pwrite(extent.child_offset, buf[: extent.length])
        return extent

    async def read_special(self, extent: Extent, buf: memoryview) -> None:
        offset, bits = extent.offset, self.image.cluster_bits
        while buf:
            table = await self.mapping.table(offset >> self._span_bits)
            assert table is not None
            run = self.mapping.run(table, (offset >> bits) & (self.image.l2_entries - 1), 1)
            inside = offset & (self.image.cluster_size - 1)
            part = buf[: self.image.cluster_size - inside]
            if run.kind == L2Kind.COMPRESSED:
                part[:] = memoryview(await self._compressed.read(run))[inside : inside + len(part)]
            else:  # written in the meantime
                await self.pread(offset, part)
            offset += len(part)
            buf = buf[len(part) :]

    async def read_old(self, run: L2Run, offset: int, buf: memoryview) -> None:
        """Fill `buf` with the bytes of guest `offset`, inside one cluster of a DATA or COMPRESSED run."""
        inside = offset & (self.image.cluster_size - 1)
        if run.kind == L2Kind.COMPRESSED:
            buf[:] = memoryview(await self._compressed.read(run))[inside : inside + len(buf)]
        else:
            index = (offset >> self.image.cluster_bits) & (self.image.l2_entries - 1)
            host = run.host_offset + (index - run.first << self.image.cluster_bits)
            await self.file.pread(host + inside, buf)

    def unlink_run(self, run: L2Run, *, discard: bool = False) -> None:
        """Entries that said `run` no longer do: its clusters lose a user.

        Args:
            discard: at the guest's wish.
        """
        if run.kind in (L2Kind.DATA, L2Kind.ZERO_ALLOCATED):
            host, clusters = run.host_offset, run.clusters
        elif run.kind == L2Kind.COMPRESSED:
            bits = self.image.cluster_bits
            host = run.host_offset >> bits << bits
            clusters = ((run.host_offset + run.compressed_length - 1) >> bits) - (host >> bits) + 1
            self._compressed.forget()
        else:
            return
        if self.refcounts.overlaps.find(host, clusters * self.image.cluster_size) is not None:
            log.error("node '%s': an entry led to metadata at host offset %#x", self.node.name, host)
            return
        if run.kind == L2Kind.COMPRESSED:
            tell = False  # its neighbours in the cluster may still be in use
        else:
            tell = self._discard_request if discard else self.options.pass_discard_other
        self.refcounts.reclaim.unlink(host, clusters, discard=tell)

    async def block_status(self, offset: int, length: int) -> BlockStatus:
        extent = (await self.map(offset, length)).clip(offset, length)
        if extent.status is Status.ZERO and extent.child is not None:
            return BlockStatus(offset, extent.length, False, True, 0, self.node, extent.child.node, extent.child_offset)
        return await super().block_status(offset, length)

    @property
    def zero_unit(self) -> int:
        return self.image.cluster_size

    async def pwrite_zeroes(self, offset: int, length: int, flags: Flag = Flag.NONE) -> None:
        unmap = bool(flags & Flag.MAY_UNMAP)
        if self.image.header.version < 3 and (self.backed or not unmap):
            raise self.unsupported("pwrite_zeroes")
        if not self._writing:
            await self.begin_writing()
        first, last = self._whole_clusters(offset, offset + length)
        bits, end = self.image.cluster_bits, offset + length
        edges = [(offset, first << bits), (last << bits, end)] if first < last else [(offset, end)]
        edges = [(low, high) for low, high in edges if low < high and not await self._reads_zero(low, high - low)]
        if edges and flags & Flag.NO_FALLBACK:
            raise self.unsupported("pwrite_zeroes")
        await rewrite(self, first, last, Mode.ZERO_UNMAP if unmap else Mode.ZERO)
        for low, high in edges:
            await self.pwrite(low, memoryview(bytes(high - low)))

    def _whole_clusters(self, start: int, end: int) -> tuple[int, int]:
        """First and end of the clusters that lie inside the range; the disk's end may cut the last one."""
        bits = self.image.cluster_bits
        return -(-start >> bits), (-(-end >> bits) if end == self._size else end >> bits)

    async def _reads_zero(self, offset: int, length: int) -> bool:
        extent = (await self.map(offset, length)).clip(offset, length)
        if extent.length < length:
            return False
        if extent.status is Status.UNALLOCATED:
            return self.backing is None or offset >= self.backing.node.size()
        return extent.status is Status.ZERO

    async def discard(self, offset: int, length: int) -> None:
        if self.image.header.version < 3 and self.backed:
            raise self.unsupported("discard")
        if not self._writing:
            await self.begin_writing()
        await rewrite(self, *self._whole_clusters(offset, offset + length), Mode.DISCARD)

    @property
    def plain_flush(self) -> bool:
        return True

    async def flush(self) -> None:
        if self._writing:
            self.image.check_writable()
            await self.writeback.run()
        else:
            await super().flush()

    async def truncate(self, size: int) -> None:
        await self.begin_writing()
        self.stored_bitmaps.check_resize(size)
        await resize(self, size)

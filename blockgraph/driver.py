# SPDX-FileCopyrightText: blockgraph contributors
# SPDX-License-Identifier: MIT
"""What a driver is.

A driver serves the requests of one node. It talks to its children through its edges (`self.file`, `self.backing`,
...) and to nothing else, and trusts its arguments: `node` has checked, aligned and tracked every request.

* A *protocol* reaches bytes: derive from `Protocol`, give size, pread, pwrite, flush.
* A *format* lays bytes out: derive from `Format`, give `size` and `map`; `allocate` makes it writable.
* A *filter* shows its child's bytes: derive from `Filter`; what is not overridden forwards. Overriding `pread` or
  `pwrite` is enough to see every such request: `map` then withholds the range from whoever would bypass them.

Third parties register drivers through the entry-point group `blockgraph.drivers`.
"""

from __future__ import annotations

import errno
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, ClassVar, Literal, NamedTuple
from typing import Protocol as TypingProtocol

from blockgraph import debug
from blockgraph.errors import OptionError, Unsupported
from blockgraph.extent import BlockStatus, Extent, Status
from blockgraph.flags import Flag
from blockgraph.native import Zeroing
from blockgraph.options import NodeOptions
from blockgraph.perm import ALL, Perm, Role, cow_child, filtered_child, storage_child

if TYPE_CHECKING:
    from blockgraph.native import ExtentMap, L2Parts, L2Places, Windows
    from blockgraph.node import Child, Node


class ChildSpec(NamedTuple):
    """A child that a driver has.

    Attributes:
        role: why.
        required: the description must give it.
        implied: the image itself may name it when the description omits it (`Driver.implied`).
        stays: that very node is meant: a filter that is inserted above it does not come between.
    """

    role: Role
    required: bool = True
    implied: bool = False
    stays: bool = False


class ImpliedChild(NamedTuple):
    """A child that an image names in its own metadata; opened only through the graph's open policy.

    Attributes:
        filename: as stored: a path (relative to the image's own), "json:{...}" or a URL.
        format: driver name stored beside it, None when the image does not say.
    """

    filename: str
    format: str | None


class Info(NamedTuple):
    """Facts about a node that copying loops and tools ask for.

    Attributes:
        cluster_size: allocation unit, bytes; None when there is none.
        zero_init: a fresh instance reads as zeroes everywhere it has not been written since creation.
    """

    cluster_size: int | None = None
    zero_init: bool = False


class Allocation(TypingProtocol):
    """Room made for new data of [extent.offset, extent.offset + extent.length), not yet visible to readers.

    The holder writes the whole range at (extent.child, extent.child_offset), then calls `commit`; on failure it
    calls `abort`. Exactly one of them, once. `commit` fills what of a shared cluster lies outside the range (copy on
    write) before it links the new data in.
    """

    extent: Extent

    async def commit(self) -> None: ...
    async def abort(self) -> None: ...


class FirstWrites(TypingProtocol):
    """First writes to ranges without a place of their own, and zeroes that are only noted, made natively
    (native/allocator.h).

    Used by one extent map at a time. What was placed is in the node's tables before anybody looks at them.

    Attributes:
        storage: the node whose descriptor the data goes to.
    """

    @property
    def storage(self) -> Node: ...

    def offered(self) -> bool:
        """The node still stands by the extents that it marked `allocate`."""

    def attach(self, extents: ExtentMap, slot: int, *, writes: bool) -> None:
        """First writes into extents with `allocate` of that map are the node's, at offset 0; the storage is at `slot`.
        Without `writes` none of those is known yet, only what may be made zero. Offered just now. May be called
        again."""

    async def withdraw(self) -> None:
        """No map does them any more, and what maps know of the node is gone."""


class Lookup(NamedTuple):
    """What `Format.look_up` found.

    Attributes:
        parts: entries of tables, whose host offsets are the storage's.
        places: what they have in common.
        zeroes: what is unallocated reads as zeroes.
        storage: the node whose descriptor has the bytes.
        writable: they may be written there as far as the format is concerned, where the parts say so.
    """

    parts: L2Parts
    places: L2Places
    zeroes: bool
    storage: Node
    writable: bool


class Driver:
    """Base of all drivers. See the module's text; derive from Protocol, Format or Filter."""

    name: ClassVar[str]
    aliases: ClassVar[tuple[str, ...]] = ()
    kind: ClassVar[Literal["protocol", "format", "filter"]]
    children: ClassVar[Mapping[str, ChildSpec]] = {}
    Options: ClassVar[type[NodeOptions]] = NodeOptions
    #: members that are file names: relative ones in a graph file start at that file's directory
    paths: ClassVar[tuple[str, ...]] = ("filename",)
    #: extents' contents are the child's own: block status takes over the child's answer unchanged
    transparent: ClassVar[bool] = False
    #: where bytes live never changes while the node is open, or the driver calls `node.revoke` whenever it does; else
    #: every write, write-zeroes and discard counts as a change of where its range lives
    revokes: ClassVar[bool] = False

    #: requests reach the driver with offset and length multiples of this, bytes; only a write may end off it, at the
    #: node's end or where it makes the node longer
    request_alignment: int = 1
    #: transfers on `fd` want memory at multiples of this, bytes
    memory_alignment: int = 1
    #: requests reach the driver no longer than this, bytes
    max_transfer: int | None = None
    #: flags pwrite understands; node emulates FUA by a flush and drops the others
    write_flags: Flag = Flag.NONE
    #: flags pwrite_zeroes understands
    zero_flags: Flag = Flag.NONE
    #: a write past the end makes the node larger, if the edge has RESIZE
    growable: bool = False
    #: where persistent dirty bitmaps may be found when a node is opened: in the image (the driver then sets
    #: `node.bitmap_store`), in a sidecar file beside it, or nowhere
    bitmap_place: ClassVar[Literal["image", "sidecar", "nowhere"]] = "nowhere"
    #: see FirstWrites; None: the driver has none
    first_writes: FirstWrites | None = None

    def __init__(self, node: Node, options: NodeOptions) -> None:
        self.node = node
        self.options = options

    # Control path. The graph calls these; never concurrently with each other for one node.

    async def open(self) -> None:
        """Make the node usable. Children are attached (not the implied ones) and may be read.

        Raises: any BlockGraphError; `close` is then called too and must cope.
        """

    def check_writable(self) -> None:
        """Refuse an opened image that can be read but not written; for those who open read-only to look.

        Raises:
            IOFailure: why, and what to do.
        """

    async def close(self) -> None:
        """Write back what is pending and release everything. No request is in flight."""

    def implied(self) -> Mapping[str, ImpliedChild]:
        """Children that the opened image names itself, by child name. Asked once, after `open`."""
        return {}

    async def attached(self) -> None:
        """All children, implied ones too, are in place, the candidate graph is valid, affected nodes are drained.

        Check sizes against children here, and prepare what depends on them. Called again whenever a child of the
        node was replaced. Must not change what an abort of the transaction could not leave in place.

        Raises:
            GraphError: the children do not fit; the transaction is rolled back.
        """

    @classmethod
    def child_perm(
        cls, options: NodeOptions, name: str, need: Perm, share: Perm, *, read_only: bool
    ) -> tuple[Perm, Perm]:
        """What the edge `name` needs and shares, given what this node's parents together need and share. Pure.

        Args:
            read_only: the node is read-only.
        """
        role = cls.children[name].role
        if role & Role.FILTERED:
            return filtered_child(need, share)
        if role & Role.COW:
            return cow_child(need, share)
        return storage_child(need, share, role, not read_only)

    @classmethod
    def known_size(cls, options: NodeOptions, sizes: Mapping[str, int]) -> int | None:
        """Length of the node as far as its description tells it, bytes; None when it does not. Pure, nothing is open.

        Args:
            sizes: lengths of the children that are known, by child name.
        Raises:
            GraphError: the children do not fit each other; `node` is the name of the child at fault ("target").
            OptionError: a child does not fit an option; `path` names the option.
        """
        return None

    def committed(self) -> None:
        """The transaction that added the node has committed: requests come from now on. Must not fail."""

    async def prepare_perm(self, need: Perm, share: Perm) -> None:
        """Acquire what the node's parents will need (image locks, a writable descriptor), keeping what it has.

        Args:
            need, share: union of needs, intersection of shares over all parents after the change.
        Raises: BlockGraphError when it can not be had; `abort_perm` follows.
        """

    def commit_perm(self) -> None:
        """Give up what is no longer needed."""

    def abort_perm(self) -> None:
        """Return to what was held before `prepare_perm`."""

    def reopen_check(self, options: NodeOptions) -> None:
        """Refuse new options that can not be changed at run time.

        Raises:
            OptionError: naming the member.
        """
        for field in type(options).__struct_fields__:
            if field in COMMON_REOPEN or field.replace("_", "-") in type(self).children:
                continue
            if getattr(options, field) != getattr(self.options, field):
                raise OptionError(
                    f"can not be changed while the node is open (now {getattr(self.options, field)!r})",
                    path=field.replace("_", "-"),
                    value=getattr(options, field),
                    node=self.node.name,
                )

    def reopened(self, options: NodeOptions) -> None:
        """Take over new options (checked before). Called drained, in the commit phase: must not fail."""
        self.options = options

    # Facts.

    def size(self) -> int:
        """Length of the node, bytes."""
        raise NotImplementedError

    def info(self) -> Info:
        """See Info."""
        return Info()

    def filename(self) -> str | None:
        """Path of the file behind the node, for messages and for resolving relative names; None when there is none."""
        for child in self.node.children.values():
            if child.role & (Role.PRIMARY | Role.FILTERED):
                return child.node.driver.filename()
        return None

    def fd(self) -> int | None:
        """The descriptor whose bytes are this node's own storage, for native copies; None when there is none.

        The caller aligns offsets and lengths to `request_alignment`, and memory to `memory_alignment`.
        """
        return None

    def windows(self) -> Windows | None:
        """The file of `fd`, to be mapped, until the driver is closed; None when it does not live in memory."""
        return None

    @property
    def passes_zeroes(self) -> bool:
        """pwrite_zeroes and discard go to the child unchanged, wherever `map` says that it may be written."""
        return False

    @property
    def zero_unit(self) -> int | None:
        """Bytes, a power of two, or None. Where `map` says that it may be written, `pwrite_zeroes` of a range without
        a whole unit (the node's end is the end of one) is `pwrite` of zeroes; with NO_FALLBACK it need not be. And
        `discard` of it does nothing."""
        return None

    @property
    def plain_flush(self) -> bool:
        """When nothing but native writes in place has happened, making these durable at the storage is all that `flush`
        would do, and nobody needs to see it."""
        return type(self).flush is Driver.flush

    def zeroing(self) -> Zeroing:
        """What native code may do to the storage behind `fd` instead of `pwrite_zeroes` and `discard`."""
        return Zeroing.NONE

    def flush_failed(self, code: int) -> None:
        """Native code could not make the storage behind `fd` durable (errno): what was written may be lost."""

    def stored(self, offset: int, length: int) -> None:
        """Native code wrote [offset, offset + length) of the storage: the size may have grown, holes may be gone."""

    def reaches(self, end: int) -> None:
        """From now on native code may write anywhere before `end` without a word: the size is not less than that.

        What is not written there reads as zeroes. For storage that grows when written.
        """

    # Data path.

    async def map(self, offset: int, length: int) -> Extent:
        """The widest extent known from `offset`: it starts at or before `offset` and may pass offset + length.

        Native requests rely on the answer until it is revoked (see `revokes`): a driver that takes back a place, or
        the permission to write there, calls `node.revoke` in the same step.

        Costs at most one metadata read. Together with: any request.
        """
        raise NotImplementedError

    async def allocate(self, offset: int, length: int) -> Allocation:
        """Make room for new data from `offset`, of at most `length` bytes, at least one.

        Waits for allocations in flight for the same cluster.
        """
        raise self.unsupported("allocate")

    async def block_status(self, offset: int, length: int) -> BlockStatus:
        """What [offset, offset + length) contains, from `offset` on; the answer lies inside the range."""
        raise NotImplementedError

    async def storage_status(self, offset: int, length: int) -> tuple[int, Status]:
        """Length and status (DATA or ZERO) of the run of the node's own storage that starts at `offset`; ZERO means a
        hole. The length may pass the range."""
        return length, Status.DATA

    async def pread(self, offset: int, buf: memoryview) -> None:
        """Fill `buf` (writable, contiguous, itemsize 1) with the bytes at `offset`.

        Raises: IOFailure; `buf` is then unspecified.
        """
        raise NotImplementedError

    async def pwrite(self, offset: int, buf: memoryview, flags: Flag = Flag.NONE) -> None:
        """Write `buf` at `offset`. After an error the range is unspecified, the rest unchanged."""
        raise self.unsupported("pwrite")

    async def pwrite_zeroes(self, offset: int, length: int, flags: Flag = Flag.NONE) -> None:
        """Make the range read as zeroes.

        Raises:
            Unsupported: not possible cheaply; nothing was changed, node falls back to pwrite (or passes the error
                on, with NO_FALLBACK).
        """
        raise self.unsupported("pwrite_zeroes")

    async def discard(self, offset: int, length: int) -> None:
        """The contents are no longer needed. Advisory: afterwards the range may read as anything it ever held, or
        zeroes.

        Raises:
            Unsupported: node then ignores the request.
        """
        raise self.unsupported("discard")

    async def flush(self) -> None:
        """Make every completed write durable: the one chokepoint. Default: flush the children that are written."""
        for child in self.flushed_children():
            await child.flush()

    def flushed_children(self) -> list[Child]:
        """Those that may be written, but for COW."""
        return [
            child
            for child in self.node.children.values()
            if not child.role & Role.COW and child.need & (Perm.WRITE | Perm.WRITE_UNCHANGED)
        ]

    async def truncate(self, size: int) -> None:
        """Change the size, bytes; a grown area reads as zeroes."""
        raise self.unsupported("truncate")

    async def debug_event(self, name: str) -> None:
        """A parent has come to the point `name` of its work (blockgraph.debug). Default: whoever shows its child's
        bytes passes it on, others ignore it.

        Raises: nothing; a rule fails the I/O that follows, not the event.
        """
        if self.transparent:
            await self._primary_event(name)

    async def _primary_event(self, name: str) -> None:
        for child in self.node.children.values():
            if child.role & (Role.FILTERED | Role.PRIMARY):
                await child.event(name)

    # Helpers for drivers.

    def unsupported(self, op: str) -> Unsupported:
        """The error for an operation this driver does not have."""
        return Unsupported(f"not supported by driver '{self.name}'", node=self.node.name, op=op, errno=errno.ENOTSUP)


#: Members every node can change by a reopen.
COMMON_REOPEN = frozenset(
    {"driver", "node_name", "discard", "cache", "read_only", "auto_read_only", "force_share", "detect_zeroes"}
)


class Protocol(Driver):
    """Reaches bytes; has no children. Its storage is its own: `map` says so, contents come from `storage_status`."""

    kind = "protocol"
    revokes = True

    @classmethod
    def known_size(cls, options: NodeOptions, sizes: Mapping[str, int]) -> int | None:
        """The option `size`, of a driver that has one."""
        size = getattr(options, "size", None)
        return size if isinstance(size, int) else None

    async def map(self, offset: int, length: int) -> Extent:
        """Everything up to the end lies here, and may be written here."""
        return Extent(0, max(self.size(), offset + length), Status.DATA, None, 0, not self.node.read_only)

    async def block_status(self, offset: int, length: int) -> BlockStatus:
        run, status = await self.storage_status(offset, length)
        run = min(run, length)
        return BlockStatus(offset, run, status is Status.DATA, status is Status.ZERO, 0, self.node, self.node, offset)


class Format(Driver):
    """Lays bytes out over its children: `map` and `allocate` are all it needs; the I/O is built on them here."""

    kind = "format"

    def cow(self) -> Child | None:
        """The child that unallocated ranges are read from."""
        return self.node.children.get("backing")

    def places(self, offset: int) -> L2Places | None:
        """Where the neighbourhood of `offset` lives in the child that `map` has just named; None: its answers are not
        short ones. As with `map`, every change is revoked."""
        return None

    async def look_up(self, runs: Sequence[tuple[int, int]], *, write: bool = False) -> Lookup | None:
        """Where many short runs (offset, end) live, at once; None: `map` has to be asked about each.

        So it has to be about what is left out. Nothing is awaited between the answer's making and its return.

        Raises:
            IOFailure: the tables can not be read.
        """
        return None

    async def read_special(self, extent: Extent, buf: memoryview) -> None:
        """Fill `buf` with the bytes of a SPECIAL extent (compressed data). len(buf) == extent.length."""
        raise NotImplementedError

    async def pread(self, offset: int, buf: memoryview) -> None:
        while buf:
            extent = (await self.map(offset, len(buf))).clip(offset, len(buf))
            part = buf[: extent.length]
            if extent.status is Status.DATA:
                assert extent.child is not None
                if debug.enabled:
                    await extent.child.event("read_aio")
                await extent.child.pread(extent.child_offset, part)
            elif extent.status is Status.SPECIAL:
                await self.read_special(extent, part)
            elif extent.status is Status.UNALLOCATED and (cow := self.cow()) is not None:
                if debug.enabled:
                    await self._primary_event("read_backing_aio")
                await cow.pread(offset, part)  # zeroes past its end
            else:
                fill_zero(part)
            offset += extent.length
            buf = buf[extent.length :]

    async def pwrite(self, offset: int, buf: memoryview, flags: Flag = Flag.NONE) -> None:
        while buf:
            extent = (await self.map(offset, len(buf))).clip(offset, len(buf))
            if extent.writable and extent.status is Status.DATA:
                assert extent.child is not None
                if debug.enabled:
                    await extent.child.event("write_aio")
                await extent.child.pwrite(extent.child_offset, buf[: extent.length])
            else:
                extent = await self._pwrite_new(offset, buf[: extent.length])
            offset += extent.length
            buf = buf[extent.length :]

    async def _pwrite_new(self, offset: int, buf: memoryview) -> Extent:
        allocation = await self.allocate(offset, len(buf))
        extent = allocation.extent
        assert extent.offset == offset
        assert extent.child is not None
        try:
            if debug.enabled:
                await extent.child.event("write_aio")
            await extent.child.pwrite(extent.child_offset, buf[: extent.length])
        except BaseException:
            await allocation.abort()
            raise
        await allocation.commit()
        return extent

    async def block_status(self, offset: int, length: int) -> BlockStatus:
        extent = (await self.map(offset, length)).clip(offset, length)
        here = self.node
        if extent.status is Status.DATA:
            assert extent.child is not None
            below = await extent.child.block_status(extent.child_offset, extent.length)
            data = below.data if self.transparent else True
            return below._replace(offset=offset, data=data, depth=0, node=here)
        if extent.status is Status.SPECIAL:
            return BlockStatus(offset, extent.length, True, False, 0, here)
        if extent.status is Status.ZERO:
            return BlockStatus(offset, extent.length, False, True, 0, here)
        cow = self.cow()
        if cow is None:
            return BlockStatus(offset, extent.length, False, True, -1, None)
        if offset >= cow.node.size():
            # A shorter backing node hides whatever lies below it: zeroes, allocated in that layer.
            return BlockStatus(offset, extent.length, False, True, 1, cow.node)
        below = await cow.block_status(offset, min(extent.length, cow.node.size() - offset))
        return below._replace(depth=below.depth + 1 if below.depth >= 0 else -1)


class Filter(Driver):
    """Shows exactly its child's bytes. Every method forwards to `file` until overridden."""

    kind = "filter"
    transparent = True
    revokes = True
    children = {"file": ChildSpec(Role.FILTERED | Role.PRIMARY)}
    write_flags = Flag.FUA | Flag.WRITE_UNCHANGED
    zero_flags = Flag.FUA | Flag.WRITE_UNCHANGED | Flag.MAY_UNMAP | Flag.NO_FALLBACK

    file: Child

    @classmethod
    def known_size(cls, options: NodeOptions, sizes: Mapping[str, int]) -> int | None:
        """That of the child it shows."""
        return next((sizes.get(name) for name, spec in cls.children.items() if spec.role & Role.FILTERED), None)

    async def attached(self) -> None:
        # Not its alignment: what is read, changed and written back has to be tracked where everybody comes by.
        self.growable = self.file.node.driver.growable

    def size(self) -> int:
        return self.file.node.size()

    def info(self) -> Info:
        return self.file.node.driver.info()

    @property
    def intercepts_reads(self) -> bool:
        """Reads must come through `pread`."""
        return type(self).pread is not Filter.pread

    @property
    def intercepts_writes(self) -> bool:
        """Writes must come through `pwrite`."""
        return type(self).pwrite is not Filter.pwrite

    @property
    def passes_zeroes(self) -> bool:
        """Neither is overridden."""
        return type(self).pwrite_zeroes is Filter.pwrite_zeroes and type(self).discard is Filter.discard

    async def map(self, offset: int, length: int) -> Extent:
        if self.intercepts_reads:
            return Extent(offset, length, Status.SPECIAL)
        return Extent(0, self.size(), Status.DATA, self.file, 0, not self.intercepts_writes)

    async def block_status(self, offset: int, length: int) -> BlockStatus:
        return await self.file.block_status(offset, length)

    async def pread(self, offset: int, buf: memoryview) -> None:
        await self.file.pread(offset, buf)

    async def pwrite(self, offset: int, buf: memoryview, flags: Flag = Flag.NONE) -> None:
        await self.file.pwrite(offset, buf, flags)

    async def pwrite_zeroes(self, offset: int, length: int, flags: Flag = Flag.NONE) -> None:
        await self.file.pwrite_zeroes(offset, length, flags)

    async def discard(self, offset: int, length: int) -> None:
        await self.file.discard(offset, length)

    async def truncate(self, size: int) -> None:
        await self.file.truncate(size)


def fill_zero(buf: memoryview) -> None:
    """Set every byte of `buf` to zero."""
    length = len(buf)
    step = len(_ZEROES)
    for start in range(0, length, step):
        end = min(start + step, length)
        buf[start:end] = _ZEROES[: end - start]


_ZEROES = memoryview(bytes(1 << 20))

__all__ = [
    "ALL",
    "Allocation",
    "ChildSpec",
    "Driver",
    "Filter",
    "FirstWrites",
    "Format",
    "ImpliedChild",
    "Info",
    "Protocol",
    "fill_zero",
]

# SPDX-FileCopyrightText: blockgraph contributors
# SPDX-License-Identifier: MIT
"""inject-error (alias blkdebug): a filter that fails or holds requests at chosen points.

For tests of whatever lies above it: does a format survive ENOSPC in the middle of growing its refcount table? Does a
backup job do what its on-target-error says? It is QEMU's blkdebug, so rules written for QEMU mean the same here.

        qcow2 --"l2_update"--> inject-error --image--> file
          |                         ^
          +------ pwrite -----------+   fails, if "l2_update" has armed a rule

A rule is *armed* by an event and then fails the requests that fit it, until another event arms other rules. Events are
the points of a format's work (blockgraph.debug.FORMAT_EVENTS) and those of a request at this node: `preadv`,
`pwritev`, `pwritev_zero`, `discard`, `flush_to_disk`, `block_status`, `truncate` before the request goes down,
`preadv_done`, `pwritev_done`, `pwritev_zero_done`, `discard_done`, `flush_done` after it came back; `none` happens
when the node is opened. The machine has a state, 1 at first, which `set-state` changes.

Options:

    image                 the child (its name in QEMU; everywhere else a filter's child is `file`)
    align                 requests come in multiples of this power of two, bytes
    max-transfer          longest read or write, bytes, a multiple of align
    opt-write-zero        write-zeroes in multiples of this, bytes; the rest of a range is written as zeroes
    max-write-zero        longest write-zeroes, bytes
    opt-discard           discards in multiples of this, bytes; the rest of a range is kept
    max-discard           longest discard, bytes
    inject-error          list of {event, state, iotype, errno, sector, once, immediately}
    set-state             list of {event, state, new_state}
    take-child-perms      permissions to need on the child besides those that the parents need
    unshare-child-perms   permissions to deny everybody else on the child

iotype: read, write, write-zeroes, discard, flush, block-status; omitted: all but block-status. errno: number or name.

Example: the second L2 update of a qcow2 image finds the disk full.

    [[nodes]]
    node-name = "disk"
    driver = "qcow2"
    file = {driver = "inject-error", image = {driver = "file", filename = "disk.qcow2"},
            set-state = [{event = "l2_update", state = 1, new_state = 2}],
            inject-error = [{event = "l2_update", state = 2, iotype = "write", errno = "ENOSPC", once = true}]}

From a test, requests are held at an event, without sleeping:

    fault.break_at("pwritev_done", "A", offset=0)
    task = asyncio.ensure_future(backend.pwrite(0, data))
    await fault.wait_break("A")             # on the disk, not completed
    ...
    fault.resume("A")

Limits: rules can not be changed while the node is open, breakpoints can. QEMU's `config` file and its `vmstate` events
do not exist. A held request keeps a drain waiting.
Source: QEMU BlockdevOptionsBlkdebug.
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from typing import Annotated, Literal

import msgspec

from blockgraph import debug
from blockgraph.driver import ChildSpec, Filter
from blockgraph.errors import GraphError, IOFailure, OptionError
from blockgraph.extent import BlockStatus
from blockgraph.filters.fault_rules import FaultRules, InjectRule, IoType, StateRule, check_event
from blockgraph.flags import Flag
from blockgraph.node import Child
from blockgraph.options import NodeOptions, NodeRef
from blockgraph.perm import NONE, Perm, Role

PermName = Literal["consistent-read", "write", "write-unchanged", "resize"]
Bytes = Annotated[int, msgspec.Meta(ge=1, lt=1 << 31)]


class InjectErrorOptions(NodeOptions, kw_only=True, frozen=True):
    """See the module's text."""

    image: NodeRef
    align: Bytes | None = None
    max_transfer: Bytes | None = None
    opt_write_zero: Bytes | None = None
    max_write_zero: Bytes | None = None
    opt_discard: Bytes | None = None
    max_discard: Bytes | None = None
    inject_error: tuple[InjectRule, ...] = ()
    set_state: tuple[StateRule, ...] = ()
    take_child_perms: tuple[PermName, ...] = ()
    unshare_child_perms: tuple[PermName, ...] = ()


def _check_limits(options: InjectErrorOptions, alignment: int, node: str | None = None) -> None:
    """The limits must fit each other and the alignment of requests, bytes."""
    align = options.align or 1
    if align & (align - 1):
        raise OptionError("must be a power of two", path="align", value=align, node=node)
    for member, value, of in (
        ("max-transfer", options.max_transfer, alignment),
        ("opt-write-zero", options.opt_write_zero, alignment),
        ("max-write-zero", options.max_write_zero, max(options.opt_write_zero or 1, alignment)),
        ("opt-discard", options.opt_discard, alignment),
        ("max-discard", options.max_discard, max(options.opt_discard or 1, alignment)),
    ):
        if value is not None and value % of:
            raise OptionError(f"must be a multiple of {of}", path=member, value=value, node=node)


class _Breakpoint:
    __slots__ = ("event", "hit", "offset", "resumed")

    def __init__(self, event: str, offset: int | None) -> None:
        self.event = event
        self.offset = offset
        self.hit = asyncio.Event()
        self.resumed = asyncio.Event()

    def fits(self, event: str, offset: int, length: int) -> bool:
        if self.hit.is_set() or event != self.event:
            return False
        return self.offset is None or offset <= self.offset < offset + length


class InjectError(Filter):
    """See the module's text."""

    name = "inject-error"
    aliases = ("blkdebug",)
    children = {"image": ChildSpec(Role.FILTERED | Role.PRIMARY)}
    Options = InjectErrorOptions
    options: InjectErrorOptions

    image: Child
    rules: FaultRules
    _listening = False

    # Control path.

    async def open(self) -> None:
        self.file = self.image
        self.rules = FaultRules(self.options.inject_error, self.options.set_state)
        self._breaks: dict[str, _Breakpoint] = {}
        debug.listen()
        self._listening = True
        self.rules.reach("none")

    async def close(self) -> None:
        if self._listening:
            debug.unlisten()
            self._listening = False

    async def attached(self) -> None:
        self.file = self.image
        await super().attached()
        self.request_alignment = max(type(self).request_alignment, self.options.align or 1)
        self.max_transfer = self.options.max_transfer
        _check_limits(self.options, self.request_alignment, self.node.name)

    @classmethod
    def known_size(cls, options: NodeOptions, sizes: Mapping[str, int]) -> int | None:
        assert isinstance(options, InjectErrorOptions)
        _check_limits(options, options.align or 1)
        return super().known_size(options, sizes)

    @property
    def _zero_step(self) -> int:
        return max(self.options.opt_write_zero or 1, self.request_alignment)

    @property
    def _discard_step(self) -> int:
        return max(self.options.opt_discard or 1, self.request_alignment)

    @classmethod
    def child_perm(
        cls, options: NodeOptions, name: str, need: Perm, share: Perm, *, read_only: bool
    ) -> tuple[Perm, Perm]:
        assert isinstance(options, InjectErrorOptions)
        need, share = super().child_perm(options, name, need, share, read_only=read_only)
        return need | _perms(options.take_child_perms), share & ~_perms(options.unshare_child_perms)

    # Breakpoints.

    def break_at(self, event: str, tag: str, *, offset: int | None = None) -> None:
        """Hold the next request that comes to `event`, once.

        Args:
            tag: names the breakpoint; free again after `resume` or `remove_break`.
            offset: only a request of this node that contains this byte. A format's event names no range, so with
                an offset it never fits.
        Raises:
            OptionError: no such event.
            GraphError: the tag is in use.
        """
        try:
            check_event(event)
        except ValueError as error:
            raise OptionError(str(error), path="event", value=event, node=self.node.name) from None
        if tag in self._breaks:
            raise GraphError(f"breakpoint '{tag}' exists", node=self.node.name, op="break_at")
        self._breaks[tag] = _Breakpoint(event, offset)

    async def wait_break(self, tag: str) -> None:
        """Until a request is held at the breakpoint.

        Raises:
            GraphError: no such breakpoint.
        """
        await self._breakpoint("wait_break", tag).hit.wait()

    def held(self, tag: str) -> bool:
        """A request is held at the breakpoint now."""
        point = self._breaks.get(tag)
        return point is not None and point.hit.is_set()

    def resume(self, tag: str) -> None:
        """Let the held request go on; the breakpoint is gone.

        Raises:
            GraphError: nothing is held there.
        """
        if not self._breakpoint("resume", tag).hit.is_set():
            raise GraphError(f"no request is held at breakpoint '{tag}'", node=self.node.name, op="resume")
        self._breaks.pop(tag).resumed.set()

    def remove_break(self, tag: str) -> None:
        """Remove the breakpoint; a request held there goes on.

        Raises:
            GraphError: no such breakpoint.
        """
        self._breakpoint("remove_break", tag)
        self._breaks.pop(tag).resumed.set()

    def _breakpoint(self, op: str, tag: str) -> _Breakpoint:
        point = self._breaks.get(tag)
        if point is None:
            raise GraphError(f"no breakpoint '{tag}'", node=self.node.name, op=op)
        return point

    # Events.

    async def debug_event(self, name: str) -> None:
        await self._reach(name)
        await super().debug_event(name)

    async def _reach(self, event: str, offset: int = -1, length: int = 0) -> None:
        """`event` happens at a request of [offset, offset + length); offset -1: of no known range."""
        self.rules.reach(event)
        for tag, point in self._breaks.items():
            if point.fits(event, offset, length):
                point.hit.set()
                try:
                    await point.resumed.wait()
                except asyncio.CancelledError:
                    if self._breaks.get(tag) is point:
                        del self._breaks[tag]
                    raise
                return

    async def _begin(self, event: str, iotype: IoType, op: str, offset: int, length: int) -> None:
        await self._reach(event, offset, length)
        rule = self.rules.take_error(iotype, offset, length)
        if rule is None:
            return
        if not rule.immediately:
            await asyncio.sleep(0)
        raise IOFailure.from_oserror(
            OSError(rule.code, ""),
            node=self.node.name,
            op=op,
            offset=offset if length else None,
            length=length or None,
            hint=f"injected after event '{rule.event}'",
        )

    # Data path.

    async def block_status(self, offset: int, length: int) -> BlockStatus:
        await self._begin("block_status", "block-status", "block_status", offset, length)
        return await super().block_status(offset, length)

    async def pread(self, offset: int, buf: memoryview) -> None:
        await self._begin("preadv", "read", "pread", offset, len(buf))
        await super().pread(offset, buf)
        await self._reach("preadv_done", offset, len(buf))

    async def pwrite(self, offset: int, buf: memoryview, flags: Flag = Flag.NONE) -> None:
        await self._begin("pwritev", "write", "pwrite", offset, len(buf))
        await super().pwrite(offset, buf, flags)
        await self._reach("pwritev_done", offset, len(buf))

    async def pwrite_zeroes(self, offset: int, length: int, flags: Flag = Flag.NONE) -> None:
        start, stop = self._cut(offset, length, self._zero_step)
        end = offset + length
        if start >= stop or (flags & Flag.NO_FALLBACK and (start, stop) != (offset, end)):
            raise self.unsupported("pwrite_zeroes")
        await self._begin("pwritev_zero", "write-zeroes", "pwrite_zeroes", offset, length)
        keep = flags & type(self).write_flags
        if offset < start:
            await super().pwrite(offset, memoryview(bytes(start - offset)), keep)
        step = self.options.max_write_zero or length
        for at in range(start, stop, step):
            await super().pwrite_zeroes(at, min(step, stop - at), flags)
        if stop < end:
            await super().pwrite(stop, memoryview(bytes(end - stop)), keep)
        await self._reach("pwritev_zero_done", offset, length)

    async def discard(self, offset: int, length: int) -> None:
        start, stop = self._cut(offset, length, self._discard_step)
        await self._begin("discard", "discard", "discard", offset, length)
        step = self.options.max_discard or length
        for at in range(start, stop, step):
            await super().discard(at, min(step, stop - at))
        await self._reach("discard_done", offset, length)

    def _cut(self, offset: int, length: int, step: int) -> tuple[int, int]:
        """The part of a range that consists of whole steps; the node's last step may be a short one."""
        end = offset + length
        return offset + -offset % step, end if end >= self.size() else end - end % step

    async def flush(self) -> None:
        await self._begin("flush_to_disk", "flush", "flush", -1, 0)
        await super().flush()
        await self._reach("flush_done")

    async def truncate(self, size: int) -> None:
        await self._reach("truncate", size)
        await super().truncate(size)


def _perms(names: tuple[PermName, ...]) -> Perm:
    perm = NONE
    for name in names:
        perm |= Perm[name.upper().replace("-", "_")]
    return perm

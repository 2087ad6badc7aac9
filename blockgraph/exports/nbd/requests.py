# SPDX-FileCopyrightText: blockgraph contributors
# SPDX-License-Identifier: MIT
"""The requests of the transmission phase: which are refused, what each does, what each is answered with.

Source: NBD proto.md, "Request types", "Error values", "Structured reply types".
"""

from __future__ import annotations

import asyncio
import errno
import logging
import os
from typing import Any, NamedTuple, Protocol

from blockgraph.backend import Backend
from blockgraph.errors import BlockGraphError
from blockgraph.exports.eager import Request
from blockgraph.exports.nbd import protocol
from blockgraph.exports.nbd.context import MetaContext, align_extents
from blockgraph.exports.nbd.export import Negotiated
from blockgraph.exports.nbd.protocol import Chunk, Cmd, CmdFlag, Err
from blockgraph.flags import Flag
from blockgraph.native import is_zero

_log = logging.getLogger(__name__)

#: A read of zeroes at least this long is answered without them (structured replies), bytes.
_HOLE_WORTH = 32 << 10
#: NBD_CMD_CACHE reads this much at once, bytes.
CACHE_STEP = 1 << 20
#: Descriptors of one reply.
_MAX_DESCRIPTORS = 1024

# Plain numbers where every request passes: arithmetic on enum members costs ten times as much.
_FUA = int(CmdFlag.FUA)
_DF = int(CmdFlag.DF)
_READ = int(Cmd.READ)
_WRITE = int(Cmd.WRITE)
_FLUSH = int(Cmd.FLUSH)
_BLOCK_STATUS = int(Cmd.BLOCK_STATUS)
_OFFSET_DATA = int(Chunk.OFFSET_DATA)

#: Flags each command may have. Clients are known to set FUA on anything, and are right to.
_VALID_FLAGS: dict[int, int] = {
    _READ: _FUA,
    _WRITE: _FUA,
    _FLUSH: _FUA,
    int(Cmd.TRIM): _FUA,
    int(Cmd.CACHE): _FUA,
    int(Cmd.WRITE_ZEROES): int(CmdFlag.FUA | CmdFlag.NO_HOLE | CmdFlag.FAST_ZERO),
    _BLOCK_STATUS: int(CmdFlag.FUA | CmdFlag.REQ_ONE),
}
_CHANGES = frozenset(map(int, (Cmd.WRITE, Cmd.WRITE_ZEROES, Cmd.TRIM)))
_LIMITED = frozenset(map(int, (Cmd.READ, Cmd.WRITE, Cmd.CACHE)))

_NO_FLAGS = Flag.NONE
_EMPTY = memoryview(bytearray())


class Refusal(NamedTuple):
    """Why a request is not done."""

    error: Err
    reason: str


class Replies(Protocol):
    """Where replies go: the connection."""

    negotiated: Negotiated

    def reply(self, request: NbdRequest, head: bytes, payload: memoryview | None = None) -> None:
        """Queue the reply that ends `request`; the payload must not change before `request.sent`."""
        ...


def check(negotiated: Negotiated, command: int, flags: int, offset: int, length: int) -> Refusal | None:
    """None: the request may be done."""
    valid = _VALID_FLAGS.get(command)
    if valid is None:
        return Refusal(Err.INVAL, f"unknown command {command}")
    if flags & ~valid and not (command == _READ and negotiated.structured and not flags & ~(valid | _DF)):
        return Refusal(Err.INVAL, f"flags {flags:#x} are not valid for {Cmd(command).name}")
    if command in _CHANGES and not negotiated.export.writable:
        return Refusal(Err.PERM, "the export is read-only")
    if length > protocol.MAX_REQUEST and command in _LIMITED:
        return Refusal(Err.INVAL, f"{length} bytes at once; at most {protocol.MAX_REQUEST}")
    if command == _FLUSH:
        if offset or length:
            return Refusal(Err.INVAL, "a flush has no offset and no length")
    elif offset + length > negotiated.size:
        error = Err.NOSPC if command in (Cmd.WRITE, Cmd.WRITE_ZEROES) else Err.INVAL
        return Refusal(error, f"{length} bytes at {offset} pass the end of the disk ({negotiated.size} bytes)")
    if command == _BLOCK_STATUS:
        if not negotiated.contexts:
            return Refusal(Err.INVAL, "no metadata context was selected")
        if not length:
            return Refusal(Err.INVAL, "block status of an empty range")
    return None


class NbdRequest(Request):
    """A request that was admitted.

    Attributes:
        replies: where its reply goes.
        cookie: the client's name for it.
        cost: bytes of memory it holds until its reply is sent.
        buffer: taken from the pool, None when there is no payload; `view` is the part in use.
        failed: something may still write to the buffer.
    """

    __slots__ = ("buffer", "cookie", "cost", "failed", "flags", "length", "offset", "replies", "view")

    def __init__(self, replies: Replies, flags: int, cookie: int, offset: int, length: int) -> None:
        self.replies = replies
        self.flags = flags
        self.cookie = cookie
        self.offset = offset
        self.length = length
        self.cost = 0
        self.buffer: memoryview | None = None
        self.view = _EMPTY
        self.failed = False

    def use(self, buffer: memoryview) -> None:
        """Give it memory for its payload."""
        self.buffer = buffer
        self.cost = len(buffer)
        self.view = buffer if self.cost == self.length else buffer[: self.length]

    def begin(self, loop: asyncio.AbstractEventLoop, backend: Backend) -> None:
        """Start it; the reply may be queued before this returns."""
        raise NotImplementedError

    def finished(self, result: Any, error: BaseException | None) -> None:
        if error is None:
            self.succeeded(result)
        else:
            self.failed = True
            self.refuse(self._refusal(error))

    def succeeded(self, result: Any) -> None:
        """Queue the reply; here: one without payload, which may be simple even where replies are structured."""
        self.replies.reply(self, protocol.SIMPLE_REPLY.pack(protocol.SIMPLE_REPLY_MAGIC, 0, self.cookie))

    def refuse(self, refusal: Refusal) -> None:
        """Queue an error reply."""
        if self.replies.negotiated.structured:
            text = refusal.reason.encode()[: protocol.MAX_STRING]
            head = protocol.CHUNK_ERROR.pack(
                protocol.CHUNK_MAGIC,
                protocol.CHUNK_DONE,
                Chunk.ERROR,
                self.cookie,
                6 + len(text),
                refusal.error,
                len(text),
            )
            self.replies.reply(self, head + text)
        else:
            self.replies.reply(
                self, protocol.SIMPLE_REPLY.pack(protocol.SIMPLE_REPLY_MAGIC, refusal.error, self.cookie)
            )

    def _refusal(self, error: BaseException) -> Refusal:
        """What the client is told: the errno's text, for names of files and nodes are none of its business."""
        if isinstance(error, asyncio.CancelledError):
            return Refusal(Err.SHUTDOWN, "the server is being shut down")
        code = error.errno if isinstance(error, (BlockGraphError, OSError)) else None
        if code is None:
            _log.error("NBD export '%s': a bug", self.replies.negotiated.export.name, exc_info=error)
            code = errno.EIO
        found = protocol.wire_error(code)
        if found == Err.NOTSUP and not self.flags & CmdFlag.FAST_ZERO:
            found = Err.INVAL  # NOTSUP is reserved for fast zeroing
        _log.debug("NBD export '%s': %s", self.replies.negotiated.export.name, error)
        return Refusal(found, os.strerror(code))


class Refused(NbdRequest):
    """A request that is answered by an error only."""

    __slots__ = ()


class Read(NbdRequest):
    """NBD_CMD_READ."""

    __slots__ = ()

    def begin(self, loop: asyncio.AbstractEventLoop, backend: Backend) -> None:
        self.start(loop, backend.pread_into(self.offset, self.view))

    def succeeded(self, result: Any) -> None:
        length = self.length
        if not self.replies.negotiated.structured:
            head = protocol.SIMPLE_REPLY.pack(protocol.SIMPLE_REPLY_MAGIC, 0, self.cookie)
            self.replies.reply(self, head, self.view)
            return
        magic, done = protocol.CHUNK_MAGIC, protocol.CHUNK_DONE
        if not length:
            self.replies.reply(self, protocol.CHUNK.pack(magic, done, Chunk.NONE, self.cookie, 0))
        elif length >= _HOLE_WORTH and not self.flags & _DF and is_zero(self.view):
            hole = protocol.CHUNK_HOLE.pack(magic, done, Chunk.OFFSET_HOLE, self.cookie, 12, self.offset, length)
            self.replies.reply(self, hole)
        else:
            head = protocol.CHUNK_DATA.pack(magic, done, _OFFSET_DATA, self.cookie, length + 8, self.offset)
            self.replies.reply(self, head, self.view)


class Write(NbdRequest):
    """NBD_CMD_WRITE; begun when the payload is complete."""

    __slots__ = ()

    def begin(self, loop: asyncio.AbstractEventLoop, backend: Backend) -> None:
        self.start(loop, backend.pwrite(self.offset, self.view, Flag.FUA if self.flags & _FUA else _NO_FLAGS))


class Flush(NbdRequest):
    """NBD_CMD_FLUSH."""

    __slots__ = ()

    def begin(self, loop: asyncio.AbstractEventLoop, backend: Backend) -> None:
        self.start(loop, backend.flush())


class Trim(NbdRequest):
    """NBD_CMD_TRIM."""

    __slots__ = ()

    def begin(self, loop: asyncio.AbstractEventLoop, backend: Backend) -> None:
        self.start(loop, self._run(backend))

    async def _run(self, backend: Backend) -> None:
        await backend.discard(self.offset, self.length)
        if self.flags & CmdFlag.FUA:
            await backend.flush()


class WriteZeroes(NbdRequest):
    """NBD_CMD_WRITE_ZEROES."""

    __slots__ = ()

    def begin(self, loop: asyncio.AbstractEventLoop, backend: Backend) -> None:
        flags = Flag.NONE if self.flags & CmdFlag.NO_HOLE else Flag.MAY_UNMAP
        if self.flags & CmdFlag.FUA:
            flags |= Flag.FUA
        if self.flags & CmdFlag.FAST_ZERO:
            flags |= Flag.NO_FALLBACK
        self.start(loop, backend.write_zeroes(self.offset, self.length, flags))


class Cache(NbdRequest):
    """NBD_CMD_CACHE: reads the range, so that caches below fill, and forgets it."""

    __slots__ = ()

    def begin(self, loop: asyncio.AbstractEventLoop, backend: Backend) -> None:
        self.start(loop, self._run(backend))

    async def _run(self, backend: Backend) -> None:
        end = self.offset + self.length
        for offset in range(self.offset, end, CACHE_STEP):
            await backend.pread_into(offset, self.view[: end - offset])


class BlockStatus(NbdRequest):
    """NBD_CMD_BLOCK_STATUS: one chunk for each selected context."""

    __slots__ = ()

    def begin(self, loop: asyncio.AbstractEventLoop, backend: Backend) -> None:
        self.start(loop, self._run(backend, self.replies.negotiated))

    async def _run(self, backend: Backend, negotiated: Negotiated) -> list[bytes]:
        return [await self._chunk(backend, negotiated.alignment, *item) for item in negotiated.contexts.items()]

    async def _chunk(self, backend: Backend, alignment: int, number: int, context: MetaContext) -> bytes:
        limit = 1 if self.flags & CmdFlag.REQ_ONE else _MAX_DESCRIPTORS
        extents = await context.extents(backend, self.offset, self.length, limit)
        if alignment > 1 and not (self.offset | self.length) % alignment:
            extents = align_extents(extents, alignment, context.mixed)[:limit]
        return protocol.U32.pack(number) + b"".join(protocol.DESCRIPTOR.pack(*extent) for extent in extents)

    def succeeded(self, result: Any) -> None:
        reply = bytearray()
        for payload in result:
            done = protocol.CHUNK_DONE if payload is result[-1] else 0
            reply += protocol.CHUNK.pack(protocol.CHUNK_MAGIC, done, Chunk.BLOCK_STATUS, self.cookie, len(payload))
            reply += payload
        self.replies.reply(self, bytes(reply))


KINDS: dict[int, type[NbdRequest]] = {
    Cmd.READ: Read,
    Cmd.WRITE: Write,
    Cmd.FLUSH: Flush,
    Cmd.TRIM: Trim,
    Cmd.CACHE: Cache,
    Cmd.WRITE_ZEROES: WriteZeroes,
    Cmd.BLOCK_STATUS: BlockStatus,
}

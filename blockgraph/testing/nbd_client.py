# SPDX-FileCopyrightText: blockgraph contributors
# SPDX-License-Identifier: MIT
"""A small NBD client for tests, benchmarks and the demo.

`NbdClient` is well behaved and keeps many requests in flight:

    async with await NbdClient.connect_unix("/run/guest.sock", "disk") as disk:
        await asyncio.gather(disk.pwrite(0, b"x" * 4096), disk.pwrite(4096, b"y" * 4096))
        await disk.flush()

`NbdWire` is the layer below it: one connection on which any bytes can be sent, good or bad.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import ssl
from collections.abc import Iterable
from types import TracebackType
from typing import NamedTuple, Self

from blockgraph.errors import BlockGraphError, IOFailure, WireError
from blockgraph.exports.nbd import protocol
from blockgraph.exports.nbd.protocol import Chunk, Cmd, CmdFlag, HandshakeFlag, Info, Opt, Rep, TransmissionFlag

_BUFFER = 1 << 20
_ERROR_CHUNK = 1 << 15


class OptionReply(NamedTuple):
    """One reply to an option."""

    option: int
    reply: int
    data: bytes


class Reply(NamedTuple):
    """One simple reply (chunk None) or one chunk of a structured one."""

    cookie: int
    error: int
    chunk: int | None
    done: bool
    data: bytes


class Descriptor(NamedTuple):
    """A range and its status flags in a metadata context."""

    length: int
    flags: int


class OptionRefusedError(BlockGraphError):
    """The server refused an option.

    Attributes:
        reply: the error reply (protocol.Rep).
    """

    def __init__(self, option: int, reply: int, text: str) -> None:
        super().__init__(text or f"refused with {reply:#x}", op=f"option {option}")
        self.reply = reply


def string(text: str) -> bytes:
    """A string with its length before it."""
    data = text.encode()
    return protocol.U32.pack(len(data)) + data


class NbdWire:
    """One connection: messages of both phases, without any memory of what was negotiated."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.reader = reader
        self.writer = writer

    @classmethod
    async def unix(cls, path: str) -> Self:
        """Connect to a socket file."""
        return cls(*await asyncio.open_unix_connection(path, limit=_BUFFER))

    @classmethod
    async def tcp(cls, host: str, port: int) -> Self:
        """Connect to a port."""
        return cls(*await asyncio.open_connection(host, port, limit=_BUFFER))

    async def send(self, *data: bytes | memoryview) -> None:
        """Send bytes; waits while much is unsent."""
        for part in data:
            self.writer.write(part)
        await self.writer.drain()

    async def recv(self, length: int) -> bytes:
        """Exactly `length` bytes.

        Raises:
            asyncio.IncompleteReadError: the server closed the connection before.
        """
        return await self.reader.readexactly(length)

    async def closed_by_server(self) -> bool:
        """Read until the server's end of stream; False: it sent bytes before."""
        try:
            return not await self.reader.read()
        except ConnectionResetError:
            return True

    async def close(self) -> None:
        """Disconnect without a word."""
        self.writer.close()
        with contextlib.suppress(OSError):
            await self.writer.wait_closed()

    def abort(self) -> None:
        """Vanish, as a killed process does; unsent data is lost."""
        self.writer.transport.abort()

    # Handshake.

    async def greet(self, flags: int = HandshakeFlag.FIXED_NEWSTYLE | HandshakeFlag.NO_ZEROES) -> HandshakeFlag:
        """Read the greeting, answer it; returns the server's flags."""
        magic, option_magic, server = protocol.GREETING.unpack(await self.recv(protocol.GREETING.size))
        if (magic, option_magic) != (protocol.NBD_MAGIC, protocol.OPTION_MAGIC):
            raise WireError("the server does not speak newstyle NBD", op="greet")
        await self.send(protocol.CLIENT_FLAGS.pack(flags))
        return HandshakeFlag(server)

    async def send_option(self, option: int, data: bytes = b"", *, length: int | None = None) -> None:
        """Send an option; `length` lies about the length of `data`."""
        claimed = len(data) if length is None else length
        await self.send(protocol.OPTION.pack(protocol.OPTION_MAGIC, option, claimed), data)

    async def option_reply(self) -> OptionReply:
        """The next reply to an option."""
        magic, option, reply, length = protocol.OPTION_REPLY.unpack(await self.recv(protocol.OPTION_REPLY.size))
        if magic != protocol.OPTION_REPLY_MAGIC:
            raise WireError(f"wrong magic {magic:#x} of an option reply", op="option")
        return OptionReply(option, reply, await self.recv(length))

    async def option(self, option: int, data: bytes = b"") -> list[OptionReply]:
        """Send an option; its replies, the final ACK or error last."""
        await self.send_option(option, data)
        replies = [await self.option_reply()]
        while replies[-1].reply in (Rep.SERVER, Rep.INFO, Rep.META_CONTEXT):
            replies.append(await self.option_reply())
        return replies

    async def ask(self, option: int, data: bytes = b"") -> list[OptionReply]:
        """As `option`, without the ACK.

        Raises:
            OptionRefusedError: an error reply.
        """
        *replies, last = await self.option(option, data)
        if last.reply != Rep.ACK:
            raise OptionRefusedError(option, last.reply, last.data.decode(errors="replace"))
        return replies

    async def start_tls(self, context: ssl.SSLContext, server_hostname: str | None) -> None:
        """Ask for TLS and upgrade."""
        await self.ask(Opt.STARTTLS)
        await self.writer.start_tls(context, server_hostname=server_hostname or "")

    # Transmission.

    async def send_request(
        self, command: int, cookie: int, offset: int = 0, length: int = 0, *, flags: int = 0, data: bytes = b""
    ) -> None:
        """Send a request; `length` may lie about `data`."""
        header = protocol.REQUEST.pack(protocol.REQUEST_MAGIC, flags, command, cookie, offset, length)
        await self.send(header, data) if data else await self.send(header)

    async def reply(self, simple_data: dict[int, int] | None = None) -> Reply:
        """The next reply, or chunk of one.

        Args:
            simple_data: bytes that follow a successful simple reply, by cookie.
        """
        magic = protocol.U32.unpack(await self.recv(4))[0]
        if magic == protocol.SIMPLE_REPLY_MAGIC:
            rest = await self.recv(protocol.SIMPLE_REPLY.size - 4)
            error, cookie = int.from_bytes(rest[:4]), int.from_bytes(rest[4:])
            length = 0 if error or simple_data is None else simple_data.get(cookie, 0)
            return Reply(cookie, error, None, True, await self.recv(length))
        if magic != protocol.CHUNK_MAGIC:
            raise WireError(f"wrong magic {magic:#x} of a reply", op="reply")
        head = protocol.U32.pack(magic) + await self.recv(protocol.CHUNK.size - 4)
        _, flags, kind, cookie, length = protocol.CHUNK.unpack(head)
        data = await self.recv(length)
        error = int.from_bytes(data[:4]) if kind & _ERROR_CHUNK else 0
        return Reply(cookie, error, kind, bool(flags & protocol.CHUNK_DONE), data)


class _Pending:
    """A request that waits for its reply."""

    __slots__ = ("chunks", "done", "length", "offset")

    def __init__(self, offset: int, length: int) -> None:
        self.offset = offset
        self.length = length
        self.chunks: list[Reply] = []
        self.done: asyncio.Future[list[Reply]] = asyncio.get_running_loop().create_future()


class NbdClient:
    """A connection in the transmission phase. Any number of calls at once.

    Attributes:
        wire: for sending what this class would not.
        size: of the export, bytes.
        flags: transmission flags.
        structured: structured replies are on.
        contexts: names of the metadata contexts, by id.
        block_sizes: (minimum, preferred, maximum) in bytes, None when not told.
        description: of the export.
    """

    def __init__(self, wire: NbdWire) -> None:
        self.wire = wire
        self.size = 0
        self.flags = TransmissionFlag(0)
        self.structured = False
        self.contexts: dict[int, str] = {}
        self.block_sizes: tuple[int, int, int] | None = None
        self.description = ""
        self._cookie = 0
        self._pending: dict[int, _Pending] = {}
        self._simple_data: dict[int, int] = {}
        self._failure: Exception | None = None
        self._task: asyncio.Task[None] | None = None

    @classmethod
    async def connect_unix(
        cls,
        path: str,
        export: str,
        *,
        structured: bool = True,
        contexts: Iterable[str] = ("base:allocation",),
        tls: ssl.SSLContext | None = None,
        server_hostname: str | None = None,
    ) -> Self:
        """Connect to a socket file and negotiate.

        Raises:
            OptionRefusedError: no such export, or TLS is required.
            OSError: no server.
        """
        return await cls._open(await NbdWire.unix(path), export, structured, contexts, tls, server_hostname)

    @classmethod
    async def connect_tcp(
        cls,
        host: str,
        port: int,
        export: str,
        *,
        structured: bool = True,
        contexts: Iterable[str] = ("base:allocation",),
        tls: ssl.SSLContext | None = None,
        server_hostname: str | None = None,
    ) -> Self:
        """Connect to a port and negotiate; see connect_unix."""
        wire = await NbdWire.tcp(host, port)
        return await cls._open(wire, export, structured, contexts, tls, server_hostname)

    @classmethod
    async def _open(
        cls,
        wire: NbdWire,
        export: str,
        structured: bool,
        contexts: Iterable[str],
        tls: ssl.SSLContext | None,
        server_hostname: str | None,
    ) -> Self:
        client = cls(wire)
        try:
            await wire.greet()
            if tls is not None:
                await wire.start_tls(tls, server_hostname)
            await client._negotiate(export, structured, list(contexts))
        except BaseException:
            wire.abort()
            raise
        client._task = asyncio.create_task(client._receive(), name="nbd client")
        return client

    async def _negotiate(self, export: str, structured: bool, contexts: list[str]) -> None:
        wire = self.wire
        if structured:
            await wire.ask(Opt.STRUCTURED_REPLY)
            self.structured = True
            if contexts:
                queries = protocol.U32.pack(len(contexts)) + b"".join(string(query) for query in contexts)
                for _, _, data in await wire.ask(Opt.SET_META_CONTEXT, string(export) + queries):
                    self.contexts[int.from_bytes(data[:4])] = data[4:].decode()
        wanted = (Info.DESCRIPTION, Info.BLOCK_SIZE)
        request = string(export) + b"".join(map(protocol.U16.pack, (len(wanted), *wanted)))
        for _, _, data in await wire.ask(Opt.GO, request):
            match int.from_bytes(data[:2]):
                case Info.EXPORT:
                    _, self.size, flags = protocol.INFO_EXPORT_DATA.unpack(data)
                    self.flags = TransmissionFlag(flags)
                case Info.BLOCK_SIZE:
                    _, *sizes = protocol.INFO_BLOCK_SIZE_DATA.unpack(data)
                    self.block_sizes = (sizes[0], sizes[1], sizes[2])
                case Info.DESCRIPTION:
                    self.description = data[2:].decode()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.disconnect()

    # Requests. Errors of the server are raised as IOFailure (with its errno), loss of the connection as OSError.

    async def pread(self, offset: int, length: int, *, flags: int = 0) -> bytes:
        """The bytes of a range."""
        replies = await self._request(Cmd.READ, offset, length, flags=flags)
        if not self.structured:
            return replies[0].data
        data = bytearray(length)
        covered = 0
        for reply in replies:
            if reply.chunk not in (Chunk.OFFSET_DATA, Chunk.OFFSET_HOLE):
                continue
            start = int.from_bytes(reply.data[:8]) - offset
            hole = reply.chunk == Chunk.OFFSET_HOLE
            size = int.from_bytes(reply.data[8:12]) if hole else len(reply.data) - 8
            if start < 0 or start + size > length:
                raise WireError("a chunk lies outside of what was asked for", op="pread")
            if not hole:
                data[start : start + size] = memoryview(reply.data)[8:]
            covered += size
        if covered != length:
            raise WireError(f"{covered} of {length} bytes came", op="pread")
        return bytes(data)

    async def pwrite(self, offset: int, data: bytes, *, fua: bool = False) -> None:
        """Write."""
        await self._request(Cmd.WRITE, offset, len(data), flags=CmdFlag.FUA if fua else 0, data=data)

    async def write_zeroes(self, offset: int, length: int, *, flags: int = 0) -> None:
        """Make a range read as zeroes; flags: FUA, NO_HOLE, FAST_ZERO."""
        await self._request(Cmd.WRITE_ZEROES, offset, length, flags=flags)

    async def trim(self, offset: int, length: int, *, fua: bool = False) -> None:
        """A range is no longer needed."""
        await self._request(Cmd.TRIM, offset, length, flags=CmdFlag.FUA if fua else 0)

    async def cache(self, offset: int, length: int) -> None:
        """A range will soon be read."""
        await self._request(Cmd.CACHE, offset, length)

    async def flush(self) -> None:
        """Make durable what was written."""
        await self._request(Cmd.FLUSH, 0, 0)

    async def block_status(self, offset: int, length: int, *, one: bool = False) -> dict[str, list[Descriptor]]:
        """What is known from `offset` on, by context; may cover less than was asked for."""
        replies = await self._request(Cmd.BLOCK_STATUS, offset, length, flags=CmdFlag.REQ_ONE if one else 0)
        return {
            self.contexts[int.from_bytes(reply.data[:4])]: [
                Descriptor(*pair) for pair in protocol.DESCRIPTOR.iter_unpack(reply.data[4:])
            ]
            for reply in replies
            if reply.chunk == Chunk.BLOCK_STATUS
        }

    async def map(self, context: str = "base:allocation") -> list[Descriptor]:
        """Block status of the whole export, equal neighbours merged."""
        found: list[Descriptor] = []
        offset = 0
        while offset < self.size:
            status = await self.block_status(offset, min(self.size - offset, 1 << 31))
            for length, flags in status[context]:
                if found and found[-1].flags == flags:
                    found[-1] = Descriptor(found[-1].length + length, flags)
                else:
                    found.append(Descriptor(length, flags))
                offset += length
        return found

    async def _request(
        self, command: int, offset: int, length: int, *, flags: int = 0, data: bytes = b""
    ) -> list[Reply]:
        if self._failure is not None:
            raise self._failure
        self._cookie += 1
        cookie = self._cookie
        pending = self._pending[cookie] = _Pending(offset, length)
        if command == Cmd.READ and not self.structured:
            self._simple_data[cookie] = length
        try:
            await self.wire.send_request(command, cookie, offset, length, flags=flags, data=data)
        except BaseException:
            pending.done.cancel()  # if it failed already: nobody will ask for that error any more
            if pending.done.done() and not pending.done.cancelled():
                pending.done.exception()
            raise
        replies = await pending.done
        for reply in replies:
            if reply.error:
                raise _failure(command, offset, length, reply)
        return replies

    async def _receive(self) -> None:
        try:
            while True:
                reply = await self.wire.reply(self._simple_data)
                pending = self._pending.get(reply.cookie)
                if pending is None:
                    raise WireError(f"a reply to no request ({reply.cookie})", op="reply")
                pending.chunks.append(reply)
                if reply.done:
                    del self._pending[reply.cookie]
                    self._simple_data.pop(reply.cookie, None)
                    if not pending.done.done():
                        pending.done.set_result(pending.chunks)
        except asyncio.IncompleteReadError:
            self._fail(ConnectionResetError("the server closed the connection"))
        except (OSError, WireError) as error:
            self._fail(error)

    def _fail(self, error: Exception) -> None:
        self._failure = error
        for pending in self._pending.values():
            if not pending.done.done():
                pending.done.set_exception(error)
        self._pending.clear()

    # The end.

    async def disconnect(self) -> None:
        """Say goodbye and wait until the server has answered everything and closed the connection."""
        if self._failure is None:
            with contextlib.suppress(OSError):
                await self.wire.send_request(Cmd.DISC, 0)
        await self._stop(wait=True)
        await self.wire.close()

    async def abort(self) -> None:
        """Vanish in the middle of whatever is going on."""
        self.wire.abort()
        await self._stop(wait=False)

    async def _stop(self, *, wait: bool) -> None:
        if self._task is None:
            return
        task, self._task = self._task, None
        if not wait:
            task.cancel()
        await asyncio.wait([task])
        self._fail(ConnectionAbortedError("disconnected"))


def _failure(command: int, offset: int, length: int, reply: Reply) -> IOFailure:
    system = OSError(reply.error, os.strerror(reply.error))
    name = Cmd(command).name.lower()
    error = IOFailure.from_oserror(system, node="(NBD server)", op=name, offset=offset, length=length)
    if reply.chunk is not None:
        error.reason = reply.data[6 : 6 + int.from_bytes(reply.data[4:6])].decode(errors="replace") or error.reason
    return error

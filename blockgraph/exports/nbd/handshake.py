# SPDX-FileCopyrightText: blockgraph contributors
# SPDX-License-Identifier: MIT
"""The handshake phase: fixed newstyle negotiation of one connection.

A client sends options, each is answered; GO or EXPORT_NAME ends with a `Negotiated`, ABORT with nothing. Wrong data
in an option is answered by an error and the client may try again; only what breaks the framing ends the connection.

TLS modes (proto.md, "TLS support"): no context: NOTLS; a context: the client may upgrade; required: FORCEDTLS.
Source: NBD proto.md, "Fixed newstyle negotiation", "Option types".
"""

from __future__ import annotations

import ssl
from dataclasses import dataclass

from blockgraph.errors import WireError
from blockgraph.exports.nbd import protocol
from blockgraph.exports.nbd.context import MetaContext, wildcards
from blockgraph.exports.nbd.export import ExportTable, NbdExport, Negotiated
from blockgraph.exports.nbd.protocol import HandshakeFlag, Info, Opt, Rep
from blockgraph.exports.nbd.wire import Wire, recv_exactly, send_all, start_tls

#: Longest option data that is looked at, and that is skipped; a longer option ends the connection. Bytes.
_MAX_DATA = 64 << 10
_MAX_SKIPPED = 32 << 20


@dataclass(frozen=True, slots=True)
class TlsPolicy:
    """How TLS is offered.

    Attributes:
        context: for the server side; None: no TLS.
        required: nothing but STARTTLS and ABORT is answered in the clear.
    """

    context: ssl.SSLContext | None = None
    required: bool = False


class _OptionError(Exception):
    """The option is refused with this reply; the negotiation goes on."""

    def __init__(self, reply: Rep, reason: str) -> None:
        super().__init__(reason)
        self.reply = reply


class _Fields:
    """The fields of an option's data, in order."""

    def __init__(self, data: bytes) -> None:
        self._data = data
        self._at = 0

    def number(self, size: int) -> int:
        """An unsigned number of `size` bytes."""
        return int.from_bytes(self._take(size))

    def string(self) -> str:
        """A string with its length (32 bits) before it."""
        length = self.number(4)
        if length > protocol.MAX_STRING:
            raise _OptionError(Rep.ERR_TOO_BIG, f"a string of {length} bytes; at most {protocol.MAX_STRING}")
        return _text(self._take(length))

    def end(self) -> None:
        """Nothing is left."""
        if self._at != len(self._data):
            raise _OptionError(Rep.ERR_INVALID, f"{len(self._data) - self._at} bytes too many")

    def _take(self, length: int) -> bytes:
        end = self._at + length
        if end > len(self._data):
            raise _OptionError(Rep.ERR_INVALID, f"{end - len(self._data)} bytes missing")
        taken = self._data[self._at : end]
        self._at = end
        return taken


def _text(data: bytes) -> str:
    try:
        return data.decode()
    except UnicodeDecodeError:
        raise _OptionError(Rep.ERR_INVALID, "a string is not UTF-8") from None


class Handshake:
    """One client's negotiation.

    Args:
        wire: connected, nothing exchanged yet.
        exports: may change while it runs.
        tls: see TlsPolicy.

    Attributes:
        wire: current one; STARTTLS replaces it.
    """

    def __init__(self, wire: Wire, exports: ExportTable, tls: TlsPolicy) -> None:
        self.wire = wire
        self._exports = exports
        self._tls = tls
        self._client = HandshakeFlag(0)
        self._structured = False
        self._contexts_of: NbdExport | None = None
        self._contexts: dict[int, MetaContext] = {}

    async def run(self) -> Negotiated | None:
        """Negotiate.

        Returns: what was agreed; None: the client said goodbye.
        Raises:
            WireError: the client broke the protocol, or asked (by EXPORT_NAME, which has no error reply) for what
                there is not; the connection must be closed.
            OSError: the connection is lost, or TLS could not be started.
        """
        flags = HandshakeFlag.FIXED_NEWSTYLE | HandshakeFlag.NO_ZEROES
        await send_all(self.wire, protocol.GREETING.pack(protocol.NBD_MAGIC, protocol.OPTION_MAGIC, flags))
        answer = protocol.CLIENT_FLAGS.unpack(await recv_exactly(self.wire, protocol.CLIENT_FLAGS.size))[0]
        if answer & ~int(flags):  # the complement of an IntFlag has its known bits only
            raise WireError(f"unknown client flags {answer:#x}", op="handshake")
        self._client = HandshakeFlag(answer)
        while True:
            header = await recv_exactly(self.wire, protocol.OPTION.size)
            magic, option, length = protocol.OPTION.unpack(header)
            if magic != protocol.OPTION_MAGIC:
                raise WireError(f"wrong magic {magic:#x} of an option", op="handshake")
            if length > _MAX_SKIPPED:
                raise WireError(f"option {option} with {length} bytes of data", op="handshake")
            if option != Opt.EXPORT_NAME and not self._client & HandshakeFlag.FIXED_NEWSTYLE:
                raise WireError(f"option {option} from a client that is not fixed newstyle", op="handshake")
            data = await self._option_data(length)
            if option == Opt.ABORT:
                await self._reply(option, Rep.ACK)
                return None
            if option == Opt.EXPORT_NAME:
                return await self._export_name(data)
            try:
                negotiated = await self._option(option, data)
            except _OptionError as refused:
                await self._reply(option, refused.reply, str(refused).encode())
            else:
                if negotiated is not None:
                    return negotiated

    async def _option_data(self, length: int) -> bytes | None:
        """The data; None: too long to keep, skipped."""
        if length <= _MAX_DATA:
            return await recv_exactly(self.wire, length)
        while length:
            length -= len(await recv_exactly(self.wire, min(length, _MAX_DATA)))
        return None

    async def _reply(self, option: int, reply: Rep, data: bytes = b"") -> None:
        head = protocol.OPTION_REPLY.pack(protocol.OPTION_REPLY_MAGIC, option, reply, len(data))
        await send_all(self.wire, head + data)

    async def _option(self, option: int, data: bytes | None) -> Negotiated | None:
        """Answer one option; a result ends the negotiation."""
        if self._tls.required and not self.wire.encrypted and option != Opt.STARTTLS:
            raise _OptionError(Rep.ERR_TLS_REQD, "this server requires TLS")
        if data is None:
            raise _OptionError(Rep.ERR_TOO_BIG, f"more than {_MAX_DATA} bytes of data")
        match option:
            case Opt.STARTTLS:
                await self._starttls(data)
            case Opt.LIST:
                await self._list(data)
            case Opt.STRUCTURED_REPLY:
                _no_data(data)
                self._structured = True
                await self._reply(option, Rep.ACK)
            case Opt.LIST_META_CONTEXT | Opt.SET_META_CONTEXT:
                await self._meta_context(option, _Fields(data))
            case Opt.INFO | Opt.GO:
                return await self._info(option, _Fields(data))
            case _:
                raise _OptionError(Rep.ERR_UNSUP, f"option {option} is unknown")
        return None

    async def _starttls(self, data: bytes) -> None:
        _no_data(data)
        if self._tls.context is None:
            raise _OptionError(Rep.ERR_POLICY, "this server has no TLS credentials")
        if self.wire.encrypted:
            raise _OptionError(Rep.ERR_INVALID, "TLS is already on")
        await self._reply(Opt.STARTTLS, Rep.ACK)
        self.wire = await start_tls(self.wire, self._tls.context, server=True)
        # What was agreed in the clear may have been planted by a third party.
        self._structured = False
        self._contexts_of = None
        self._contexts = {}

    async def _list(self, data: bytes) -> None:
        _no_data(data)
        for export in list(self._exports):
            name = export.name.encode()
            await self._reply(Opt.LIST, Rep.SERVER, protocol.U32.pack(len(name)) + name + export.description.encode())
        await self._reply(Opt.LIST, Rep.ACK)

    def _find(self, name: str) -> NbdExport:
        export = self._exports.find(name)
        if export is None:
            raise _OptionError(Rep.ERR_UNKNOWN, f"no export is named '{name}'")
        return export

    async def _info(self, option: int, fields: _Fields) -> Negotiated | None:
        name = fields.string()
        wanted = {fields.number(2) for _ in range(fields.number(2))}
        fields.end()
        export = self._find(name)
        negotiated = self._negotiated(export)
        info = [protocol.INFO_EXPORT_DATA.pack(Info.EXPORT, negotiated.size, negotiated.flags)]
        if Info.NAME in wanted or name != export.name:
            info.append(protocol.U16.pack(Info.NAME) + export.name.encode())
        if Info.DESCRIPTION in wanted and export.description:
            info.append(protocol.U16.pack(Info.DESCRIPTION) + export.description.encode())
        # Sent unasked too, as other servers do: it is only advice.
        info.append(protocol.INFO_BLOCK_SIZE_DATA.pack(Info.BLOCK_SIZE, *export.block_sizes()))
        for item in info:
            await self._reply(option, Rep.INFO, item)
        await self._reply(option, Rep.ACK)
        return negotiated if option == Opt.GO else None

    async def _export_name(self, data: bytes | None) -> Negotiated:
        try:
            if data is None or len(data) > protocol.MAX_STRING:
                raise _OptionError(Rep.ERR_TOO_BIG, "the name is too long")
            if self._tls.required and not self.wire.encrypted:
                raise _OptionError(Rep.ERR_TLS_REQD, "this server requires TLS")
            negotiated = self._negotiated(self._find(_text(data)))
        except _OptionError as refused:
            raise WireError(f"EXPORT_NAME refused: {refused}", op="handshake") from None
        padding = b"" if self._client & HandshakeFlag.NO_ZEROES else protocol.EXPORT_NAME_PADDING
        await send_all(self.wire, protocol.EXPORT_NAME_REPLY.pack(negotiated.size, negotiated.flags) + padding)
        return negotiated

    def _negotiated(self, export: NbdExport) -> Negotiated:
        return Negotiated(
            export=export,
            size=export.backend.size(),
            flags=export.flags(structured=self._structured),
            structured=self._structured,
            # Contexts count only for the export they were selected for.
            contexts=self._contexts if self._contexts_of is export else {},
            alignment=export.block_sizes().minimum,
        )

    async def _meta_context(self, option: int, fields: _Fields) -> None:
        if option == Opt.SET_META_CONTEXT:  # replaces the selection even when it fails
            self._contexts_of = None
            self._contexts = {}
        if not self._structured:
            raise _OptionError(Rep.ERR_INVALID, "structured replies must be negotiated first")
        name = fields.string()
        queries = [fields.string() for _ in range(fields.number(4))]
        fields.end()
        export = self._find(name)
        if option == Opt.LIST_META_CONTEXT:
            for context in export.contexts:
                if not queries or any(query in (context.name, *wildcards(context)) for query in queries):
                    await self._reply(option, Rep.META_CONTEXT, protocol.U32.pack(0) + context.name.encode())
        else:
            self._contexts_of = export
            chosen = [context for context in export.contexts if context.name in queries]
            self._contexts = dict(enumerate(chosen, 1))
            for number, context in self._contexts.items():
                await self._reply(option, Rep.META_CONTEXT, protocol.U32.pack(number) + context.name.encode())
        await self._reply(option, Rep.ACK)


def _no_data(data: bytes) -> None:
    if data:
        raise _OptionError(Rep.ERR_INVALID, f"{len(data)} bytes of data where there are none")

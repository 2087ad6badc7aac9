# SPDX-FileCopyrightText: blockgraph contributors
# SPDX-License-Identifier: MIT
"""Wire: a connected socket as both phases of NBD see it, in the clear or under TLS.

Nothing here blocks: `recv_into` and `sendmsg` move what can be moved now and raise BlockingIOError when that is
nothing. The handshake waits with the coroutines at the end of this file, the transmission phase by callbacks.
"""

from __future__ import annotations

import asyncio
import contextlib
import socket
import ssl
from collections.abc import Callable, Sequence

Buffer = bytes | memoryview

_CIPHERTEXT = 256 << 10  # moved at once, bytes


class Wire:
    """A non-blocking connected stream socket, in the clear.

    Attributes:
        sock: to wait on, and to hand to another request loop.
        recv_into: fills part of a buffer, returns how many bytes; 0: the peer has ended its stream.
        sendmsg: sends part of the buffers, returns how many bytes were taken.
    """

    recv_into: Callable[[memoryview], int]
    sendmsg: Callable[[Sequence[Buffer]], int]

    def __init__(self, sock: socket.socket) -> None:
        self.sock = sock
        self.recv_into = sock.recv_into
        self.sendmsg = sock.sendmsg

    @property
    def encrypted(self) -> bool:
        """TLS is on."""
        return False

    @property
    def has_input(self) -> bool:
        """recv_into may have more even though the socket is not readable."""
        return False

    @property
    def has_output(self) -> bool:
        """Bytes that sendmsg took have not reached the socket."""
        return False

    def end(self) -> None:
        """Say goodbye, if the protocol has a word for it and it can be sent at once."""

    def close(self) -> None:
        """Close the socket."""
        self.sock.close()


class TlsWire(Wire):
    """The same under TLS. Made by `start_tls`."""

    def __init__(self, sock: socket.socket, context: ssl.SSLContext, server_hostname: str | None, *, server: bool):
        super().__init__(sock)
        self._incoming = ssl.MemoryBIO()
        self._outgoing = ssl.MemoryBIO()
        self._tls = context.wrap_bio(
            self._incoming, self._outgoing, server_side=server, server_hostname=server_hostname
        )
        self._unsent = memoryview(b"")
        self.recv_into = self._recv_into
        self.sendmsg = self._sendmsg

    @property
    def encrypted(self) -> bool:
        return True

    @property
    def has_input(self) -> bool:
        return bool(self._tls.pending() or self._incoming.pending)

    @property
    def has_output(self) -> bool:
        return bool(self._unsent or self._outgoing.pending)

    def end(self) -> None:
        with contextlib.suppress(OSError):
            self._tls.unwrap()
        with contextlib.suppress(OSError):
            self._push()

    def handshake(self) -> bool:
        """Go on with the TLS handshake as far as possible now; True: it is complete.

        Raises:
            ssl.SSLError: the peers do not agree. ConnectionError: the peer left.
        """
        while True:
            try:
                self._tls.do_handshake()
            except ssl.SSLWantReadError:
                self._push()
                if self.has_output or not self._pull():
                    return False
            except ssl.SSLError:
                with contextlib.suppress(OSError):
                    self._push()  # the alert tells the peer why
                raise
            else:
                self._push()
                return True

    def _pull(self) -> bool:
        """Take what the socket has; False: nothing now."""
        try:
            data = self.sock.recv(_CIPHERTEXT)
        except BlockingIOError:
            return False
        if data:
            self._incoming.write(data)
        else:
            self._incoming.write_eof()
        return True

    def _push(self) -> None:
        """Give the socket what it takes."""
        with contextlib.suppress(BlockingIOError):
            while self.has_output:
                if not self._unsent:
                    self._unsent = memoryview(self._outgoing.read())
                self._unsent = self._unsent[self.sock.send(self._unsent) :]

    def _recv_into(self, view: memoryview) -> int:
        while True:
            try:
                # typeshed: read(n, buffer) takes any writable buffer
                return self._tls.read(len(view), view)  # type: ignore[return-value]
            except ssl.SSLWantReadError:
                if not self._pull():
                    raise BlockingIOError from None
            except (ssl.SSLZeroReturnError, ssl.SSLEOFError):
                return 0

    def _sendmsg(self, buffers: Sequence[Buffer]) -> int:
        self._push()
        if self.has_output:
            raise BlockingIOError
        taken = 0
        for buffer in buffers:
            part = memoryview(buffer)[: _CIPHERTEXT - taken]
            if part:
                taken += self._tls.write(part)
            if taken >= _CIPHERTEXT:
                break
        self._push()
        return taken


# Waiting, for the handshake.


async def _ready(sock: socket.socket, *, read: bool = False, write: bool = False) -> None:
    """Until the socket is readable or writable, whichever is asked for."""
    loop = asyncio.get_running_loop()
    future = loop.create_future()

    def wake() -> None:
        if not future.done():
            future.set_result(None)

    try:
        if read:
            loop.add_reader(sock, wake)
        if write:
            loop.add_writer(sock, wake)
        await future
    finally:
        loop.remove_reader(sock)
        loop.remove_writer(sock)


async def recv_exactly(wire: Wire, length: int) -> bytes:
    """The next `length` bytes, and not one more out of the socket (in the clear).

    Raises:
        ConnectionError: the peer ended its stream before.
    """
    data = bytearray(length)
    view = memoryview(data)
    while view:
        try:
            count = wire.recv_into(view)
        except BlockingIOError:
            await _ready(wire.sock, read=True)
            continue
        if not count:
            raise ConnectionResetError("the peer closed the connection")
        view = view[count:]
    return bytes(data)


async def send_all(wire: Wire, data: bytes) -> None:
    """Send `data`, waiting as long as the peer does not read."""
    view = memoryview(data)
    while view or wire.has_output:
        try:
            view = view[wire.sendmsg([view]) :]
        except BlockingIOError:
            await _ready(wire.sock, write=True)


async def start_tls(
    wire: Wire, context: ssl.SSLContext, *, server: bool, server_hostname: str | None = None
) -> TlsWire:
    """Upgrade a wire to TLS; the old one must not be used again.

    Raises:
        ssl.SSLError, ConnectionError: it can not be; only closing is left.
    """
    tls = TlsWire(wire.sock, context, server_hostname, server=server)
    while not tls.handshake():
        await _ready(wire.sock, read=True, write=tls.has_output)
    return tls

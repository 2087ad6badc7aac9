# SPDX-FileCopyrightText: blockgraph contributors
# SPDX-License-Identifier: MIT
"""The transmission phase on native threads: what is left for Python is a fault.

    client ── socket ── native/nbd_loop.c ── extent map ── storage
                              │ fault   ▲ reply
                              ▼         │
                      NativeTransmission ── NbdRequest.begin ── Backend

Same rules and same bounds as in `transmission`, which serves TLS and is the oracle of the tests: the requests that
come here are run and answered by the same code. What the protocol forbids does not come here.
"""

from __future__ import annotations

import asyncio
import errno
import logging
import os
from collections.abc import Callable
from typing import Any

from blockgraph.backend import Backend
from blockgraph.errors import WireError
from blockgraph.exports.eager import Request
from blockgraph.exports.nbd.export import Negotiated
from blockgraph.exports.nbd.protocol import Cmd, CmdFlag, Err
from blockgraph.exports.nbd.requests import CACHE_STEP, KINDS, NbdRequest, Refusal, Refused
from blockgraph.exports.nbd.wire import Wire
from blockgraph.native import nbd_loop
from blockgraph.native.nbd_loop import NbdConnection, NbdLoop

_log = logging.getLogger(__name__)

assert CACHE_STEP == nbd_loop.CACHE_STEP

_CACHE = int(Cmd.CACHE)
_READ = int(Cmd.READ)
_WRITE = int(Cmd.WRITE)
_FUA = int(CmdFlag.FUA)

_BROKEN = {
    nbd_loop.BAD_MAGIC: "wrong magic of a request",
    nbd_loop.LEFT: "the client left in the middle of a request",
    nbd_loop.TOO_LONG: "a write longer than any server takes",
}


class _LookUp(Request):
    """Lets the extent map know where requests that missed find their bytes, and then gives them back to native code.

    Args:
        runs: (offset, end) of each, by ticket.
    """

    def __init__(self, transmission: NativeTransmission, runs: dict[int, tuple[int, int]]) -> None:
        self._transmission = transmission
        self._runs = runs

    def begin(self, loop: asyncio.AbstractEventLoop, backend: Backend) -> None:
        self.start(loop, backend.look_up(list(self._runs.values())))

    def finished(self, result: Any, error: BaseException | None) -> None:
        # Whatever it was that failed: they come back, and will tell.
        self._transmission.looked_up(self, list(self._runs))


class NativeTransmission:
    """One client's requests, from handshake to disconnection.

    Args:
        wire: after the handshake, in the clear; its socket is taken over.
        negotiated: the handshake's outcome.
        loop: serves the socket.
        peer: the client's name in messages.
        on_closed: called once, when the socket is closed and nothing is in flight any more.
    """

    def __init__(
        self, wire: Wire, negotiated: Negotiated, loop: NbdLoop, *, peer: str, on_closed: Callable[[], None]
    ) -> None:
        assert not wire.encrypted
        self.negotiated = negotiated
        self._wire = wire
        self._native = loop
        self._peer = peer
        self._on_closed = on_closed
        self._loop = asyncio.get_running_loop()
        self._backend = negotiated.export.backend
        self._connection: NbdConnection
        self._running: dict[NbdRequest, int] = {}
        self._scattered: dict[int, tuple[int, int]] = {}
        self._looking: set[_LookUp] = set()
        self._shutdown = self._cancelled = False

    # Life.

    def start(self) -> None:
        """Serve."""
        negotiated = self.negotiated
        root_map = self._backend.map
        self._connection = self._native.connect(
            self._wire.sock.fileno(),
            self,
            size=negotiated.size,
            structured=negotiated.structured,
            writable=negotiated.export.writable,
            contexts=bool(negotiated.contexts),
            extent_map=None if root_map is None else root_map.extents,
        )
        self._wire.sock.detach()

    def shutdown(self) -> None:
        """Let requests in flight end, refuse new ones, then disconnect."""
        self._shutdown = True
        self._connection.shutdown()

    def abort(self) -> None:
        """Disconnect now. Requests in flight go on; their results go nowhere."""
        self._connection.abort()

    def cancel(self) -> None:
        """Cancel the requests in flight; what native code gives back of those that are being looked up is refused."""
        self._cancelled = True
        for request in [*self._running, *self._looking]:
            request.cancel()

    def ended(self, error: int) -> None:
        """See nbd_loop.Handler."""
        if error > 0:
            self._say(logging.WARNING, WireError(_BROKEN[error], op="receive"))
        elif error:
            known = (-errno.EPIPE, -errno.ECONNRESET)
            level = logging.DEBUG if error in known else logging.WARNING
            self._say(level, OSError(-error, os.strerror(-error)))
        self._on_closed()

    def _say(self, level: int, error: Exception) -> None:
        _log.log(level, "NBD export '%s', client %s: %s", self.negotiated.export.name, self._peer, error)

    # Requests.

    def fault(
        self,
        ticket: int,
        address: int,
        cookie: int,
        offset: int,
        length: int,
        command: int,
        flags: int,
        retried: int,
    ) -> None:
        """See nbd_loop.Handler."""
        if self._cancelled or (self._shutdown and not retried):  # it was on its way
            refused = Refused(self, flags, cookie, offset, length)
            self._running[refused] = ticket
            refused.refuse(Refusal(Err.SHUTDOWN, "the server is being shut down"))
            return
        write = command == _WRITE
        if retried:
            self._backend.came_back(write=write)
        elif (
            (command == _READ or (write and not flags & _FUA))
            and length
            and self._backend.is_scattered(offset, write=write)
        ):
            if not self._scattered:
                self._native.when_taken(self._look_up)
            self._scattered[ticket] = offset, offset + length
            return
        self.negotiated.export.count(command, length)
        request = KINDS[command](self, flags, cookie, offset, length)
        if address:
            request.view = nbd_loop.payload_view(address, min(length, CACHE_STEP) if command == _CACHE else length)
        self._running[request] = ticket
        request.begin(self._loop, self._backend)

    def _look_up(self) -> None:
        request = _LookUp(self, self._scattered)
        self._scattered = {}
        self._looking.add(request)
        request.begin(self._loop, self._backend)

    def looked_up(self, request: _LookUp, tickets: list[int]) -> None:
        """The faults may be tried again."""
        self._looking.remove(request)
        self._connection.retry(tickets)

    def reply(self, request: NbdRequest, head: bytes, payload: memoryview | None = None) -> None:
        """See requests.Replies; a payload is the request's own memory."""
        keep = request.failed and request.view.nbytes > 0
        if keep:
            # Whatever still writes to it holds a view of it.
            nbd_loop.free_with(request.view)
        self._connection.reply(self._running.pop(request), head, payload=payload is not None, keep=keep)

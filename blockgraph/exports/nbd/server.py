# SPDX-FileCopyrightText: blockgraph contributors
# SPDX-License-Identifier: MIT
"""NbdServer: one listening address, many exports, many clients.

    server = NbdServer()
    await server.listen_unix("/run/guest.sock")
    server.add_export(NbdExport("disk", backend, writable=True))
    print(server.uri("disk"))  # nbd+unix:///disk?socket=/run/guest.sock
    ...
    await server.close()

A client can harm its own connection only: what breaks the protocol is logged, and that connection ends.
"""

from __future__ import annotations

import asyncio
import logging
import os
import socket
import ssl
import struct
from typing import Any
from urllib.parse import quote

from blockgraph.errors import BlockGraphError, GraphError, WireError
from blockgraph.exports.nbd.buffers import BufferPool
from blockgraph.exports.nbd.export import ExportTable, NbdExport, Negotiated
from blockgraph.exports.nbd.handshake import Handshake, TlsPolicy
from blockgraph.exports.nbd.listener import Listener, bind_tcp, bind_unix
from blockgraph.exports.nbd.native_transmission import NativeTransmission
from blockgraph.exports.nbd.tls import server_context
from blockgraph.exports.nbd.transmission import Transmission
from blockgraph.exports.nbd.wire import Wire
from blockgraph.exports.options import NbdServerOptions, UnixAddress
from blockgraph.native.nbd_loop import NbdLoop, NbdStats

_log = logging.getLogger(__name__)

#: More would take turns at the memory bus.
_MOST_THREADS = 8


class NbdServer:
    """Serves exports. Use it from one event loop: that of the graph.

    Args:
        tls: context of the server side; None: no TLS.
        tls_required: clients without TLS are refused.
        threads: native ones that serve connections in the clear; 0: the event loop serves them, as it does TLS;
            None: one for each processor that this process may use, at most 8.
        max_connections: at once; further clients wait until one leaves; 0: no limit.
        handshake_timeout: a client that has not chosen an export by then is disconnected, seconds.
        close_timeout: how long requests in flight and their replies may take when the server closes, seconds.
        accepting: False: clients wait in the kernel's queue until `accept`.
    """

    def __init__(
        self,
        *,
        tls: ssl.SSLContext | None = None,
        tls_required: bool = False,
        threads: int | None = None,
        max_connections: int = 0,
        handshake_timeout: float = 30.0,
        close_timeout: float = 10.0,
        accepting: bool = True,
    ) -> None:
        assert tls is not None or not tls_required
        self._tls = TlsPolicy(tls, tls_required)
        self._max_connections = max_connections
        self._handshake_timeout = handshake_timeout
        self._close_timeout = close_timeout
        self._exports = ExportTable()
        self._pool = BufferPool()
        self._threads = _processors() if threads is None else threads
        self._native: NbdLoop | None = None
        self._listeners: list[Listener] = []
        self._connections: set[_Connection] = set()
        self._host = ""  # as it was given: the name in the certificate
        self._accepting = accepting
        self._full = False
        self._closed = False

    @property
    def connections(self) -> int:
        """Clients connected, or with requests in flight."""
        return len(self._connections)

    @property
    def stats(self) -> NbdStats | None:
        """Of the native threads, all exports together; None: there are none."""
        return None if self._native is None else self._native.stats

    # Addresses.

    async def listen_unix(self, path: str) -> str:
        """Listen at a socket file; one left behind by a dead server is replaced.

        Returns: the path.
        Raises:
            BlockGraphError: it can not be; the hint says what to do.
        """
        self._listen([bind_unix(path)])
        return path

    async def listen_tcp(self, host: str, port: str | int) -> tuple[str, int]:
        """Listen at every address of `host`; port 0: any free one.

        Returns: the first address and its port.
        Raises:
            BlockGraphError: it can not be; the hint says what to do.
        """
        socks = await bind_tcp(host, port)
        if not self._listeners:
            self._host = host
        self._listen(socks)
        address, number = self._listeners[-1].address[:2]
        return address, number

    def _listen(self, socks: list[socket.socket]) -> None:
        if self._closed:
            for sock in socks:
                sock.close()
            raise BlockGraphError("the NBD server is closed", op="listen")
        if self._threads and self._native is None:
            self._native = NbdLoop(self._threads)
        for sock in socks:
            listener = Listener(sock, self._accepted)
            if self._full or not self._accepting:
                listener.pause()
            self._listeners.append(listener)

    def accept(self) -> None:
        """Serve clients from now on, if the server was made without `accepting`; call it once."""
        assert not self._accepting
        self._accepting = True
        for listener in self._listeners:
            listener.resume()

    def uri(self, name: str) -> str:
        """Where clients find the export, as libnbd and QEMU spell it.

        Raises:
            GraphError: no such export, or the server listens nowhere.
        """
        self._exports.get(name)
        if not self._listeners:
            raise GraphError("the NBD server listens nowhere yet")
        scheme = "nbd" if self._tls.context is None else "nbds"
        listener = self._listeners[0]
        if listener.is_unix:
            return f"{scheme}+unix:///{quote(name, safe='')}?socket={quote(listener.address, safe='/')}"
        host, port = listener.address[:2]
        host = {"0.0.0.0": "localhost", "::": "localhost"}.get(host, self._host or host)
        if ":" in host:
            host = f"[{host}]"
        return f"{scheme}://{host}:{port}/{quote(name, safe='')}"

    # Exports.

    def add_export(self, export: NbdExport) -> None:
        """Clients may ask for it from now on.

        Raises:
            GraphError: there is one of that name.
        """
        self._exports.add(export)
        if self._threads:
            export.backend.use_map()

    def reserve(self, name: str) -> None:
        """Keep the name free for an export that is about to be added: nobody else can take it before `release`.

        Raises:
            GraphError: there is one of that name.
        """
        self._exports.reserve(name)

    def release(self, name: str) -> None:
        """Undo `reserve`."""
        self._exports.release(name)

    async def remove_export(self, name: str, *, hard: bool = False) -> None:
        """Stop serving an export; afterwards its backend is not used any more.

        Args:
            hard: disconnect its clients; requests in flight are still waited for, then cancelled.
        Raises:
            GraphError: no such export, or it has clients and `hard` is not given; nothing was changed.
        """
        export = self._exports.get(name)
        self.withdraw(export, hard=hard)
        users = self._users(export)
        self.disconnect(export)
        await self._wait(users)

    def withdraw(self, export: NbdExport, *, hard: bool) -> None:
        """The first half of removing an export: no client finds it any more; `add_export` undoes it.

        Raises:
            GraphError: as remove_export.
        """
        self._exports.get(export.name)
        users = self._users(export)
        if users and not hard:
            raise GraphError(
                f"NBD export '{export.name}' has {len(users)} client(s)",
                hint="disconnect them, or remove it in mode 'hard'",
            )
        self._exports.remove(export)

    def disconnect(self, export: NbdExport) -> None:
        """The second half: its clients are disconnected; what is in flight goes on, its results go nowhere."""
        for connection in self._users(export):
            connection.abort()

    def _users(self, export: NbdExport) -> set[_Connection]:
        return {connection for connection in self._connections if connection.export is export}

    # Clients.

    def _accepted(self, sock: socket.socket) -> None:
        connection = _Connection(self, sock)
        self._connections.add(connection)
        if self._max_connections and len(self._connections) >= self._max_connections:
            self._full = True
            for listener in self._listeners:
                listener.pause()
        connection.start()

    def _ended(self, connection: _Connection) -> None:
        self._connections.discard(connection)
        if self._full and not self._closed:
            self._full = False
            for listener in self._listeners:
                listener.resume()

    # End.

    async def close(self) -> None:
        """Stop listening, let requests in flight end and their replies reach the clients, disconnect.

        New requests are answered by ESHUTDOWN. What has not ended in time is disconnected, then cancelled. May be
        called again, and by several tasks.
        """
        self._closed = True
        while self._listeners:
            self._listeners.pop().close()
        for connection in list(self._connections):
            connection.shutdown()
        await self._wait(set(self._connections))
        if self._native is not None:
            self._native.close()

    def abort(self) -> None:
        """Disconnect every client at once and cancel what is in flight; a `close` that waits for them then ends."""
        for connection in list(self._connections):
            connection.abort()
            connection.cancel()

    async def _wait(self, connections: set[_Connection]) -> None:
        """Until all have ended, by the hardest means at last."""
        if not connections:
            return
        waiting = [connection.ended for connection in connections]
        _, late = await asyncio.wait(waiting, timeout=self._close_timeout)
        if late:
            for connection in connections:
                connection.abort()
                connection.cancel()
            await asyncio.wait(waiting)


class _Connection:
    """One client, from accept to its last request's end.

    Attributes:
        export: what it has chosen; None: it still negotiates.
        ended: done when nothing of it is left.
    """

    def __init__(self, server: NbdServer, sock: socket.socket) -> None:
        self.export: NbdExport | None = None
        self.ended: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._server = server
        self._wire = Wire(sock)
        self._peer = _peer_name(sock)
        self._transmission: Transmission | NativeTransmission | None = None
        self._task: asyncio.Task[Negotiated | None]

    def start(self) -> None:
        """Negotiate, then serve; after the handshake the connection needs no task."""
        handshake = Handshake(self._wire, self._server._exports, self._server._tls)
        self._task = asyncio.create_task(self._negotiate(handshake), name=f"nbd handshake {self._peer}")
        # A callback, because a task cancelled before its first step runs none of its own clean-up.
        self._task.add_done_callback(lambda task: self._negotiated(handshake.wire, task))

    async def _negotiate(self, handshake: Handshake) -> Negotiated | None:
        timeout = self._server._handshake_timeout
        try:
            async with asyncio.timeout(timeout):
                return await handshake.run()
        except WireError as error:
            _log.warning("NBD client %s: %s", self._peer, error)
        except TimeoutError:
            _log.warning("NBD client %s: no export chosen in %g s", self._peer, timeout)
        except ConnectionError as error:
            _log.debug("NBD client %s: %s", self._peer, error)
        except OSError as error:
            _log.warning("NBD client %s: %s", self._peer, error)
        return None

    def _negotiated(self, wire: Wire, task: asyncio.Task[Negotiated | None]) -> None:
        server = self._server
        negotiated = None if task.cancelled() or task.exception() else task.result()
        if negotiated is None or server._closed or negotiated.export not in server._exports:
            if not task.cancelled() and (bug := task.exception()):
                _log.error("NBD client %s: a bug", self._peer, exc_info=bug)
            wire.end()
            wire.close()
            self._end()
            return
        self.export = negotiated.export
        if server._native is None or wire.encrypted:
            self._transmission = Transmission(wire, negotiated, server._pool, peer=self._peer, on_closed=self._end)
        else:
            self._transmission = NativeTransmission(
                wire, negotiated, server._native, peer=self._peer, on_closed=self._end
            )
        self._transmission.start()

    def _end(self) -> None:
        if not self.ended.done():
            self.ended.set_result(None)
            self._server._ended(self)

    def shutdown(self) -> None:
        """End it as soon as nothing is in flight."""
        if self._transmission is None:
            self._task.cancel()
        else:
            self._transmission.shutdown()

    def abort(self) -> None:
        """Disconnect."""
        if self._transmission is None:
            self._task.cancel()
        else:
            self._transmission.abort()

    def cancel(self) -> None:
        """Cancel what is in flight."""
        if self._transmission is not None:
            self._transmission.cancel()


def _peer_name(sock: socket.socket) -> str:
    if sock.family == socket.AF_UNIX:
        pid = struct.unpack("3i", sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12))[0]
        return f"pid {pid}"
    try:
        address: Any = sock.getpeername()
    except OSError:
        return "(gone)"
    return f"{address[0]}:{address[1]}"


def _processors() -> int:
    return min(len(os.sched_getaffinity(0)), _MOST_THREADS)


async def start_server(options: NbdServerOptions, *, accepting: bool = True) -> NbdServer:
    """The server of a graph's `nbd-server` section, listening.

    Args:
        accepting: as of `NbdServer`.
    Raises:
        OptionError, BlockGraphError: credentials or address can not be used.
    """
    credentials = options.tls_creds
    server = NbdServer(
        tls=None if credentials is None else server_context(credentials),
        tls_required=credentials is not None and credentials.required,
        max_connections=options.max_connections,
        threads=options.threads,
        accepting=accepting,
    )
    if isinstance(options.addr, UnixAddress):
        await server.listen_unix(options.addr.path)
    else:
        await server.listen_tcp(options.addr.host, options.addr.port)
    return server

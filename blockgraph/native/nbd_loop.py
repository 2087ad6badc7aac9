# SPDX-FileCopyrightText: blockgraph contributors
# SPDX-License-Identifier: MIT
"""The native loop of NBD's transmission phase (native/nbd_loop.h): what the extent map knows never comes here.

A *fault* is a request that Python has to do. Many are taken at one wake-up, and what they are answered with while they
are handed out leaves together.
"""

from __future__ import annotations

import asyncio
import struct
import weakref
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

from blockgraph._native import ffi, lib
from blockgraph.native.check import check
from blockgraph.native.ending import Ending
from blockgraph.native.pool import shared_threads

if TYPE_CHECKING:
    from blockgraph.native.extent_map import ExtentMap

BAD_MAGIC: int = lib.BG_NBD_BAD_MAGIC
LEFT: int = lib.BG_NBD_LEFT
TOO_LONG: int = lib.BG_NBD_TOO_LONG
#: As much of a request to NBD_CMD_CACHE as its buffer holds, bytes.
CACHE_STEP: int = lib.BG_NBD_CACHE_STEP
MAX_REQUESTS: int = lib.BG_NBD_MAX_REQUESTS
MAX_BYTES: int = lib.BG_NBD_MAX_BYTES

_TAKE = 256
_PAYLOAD: int = lib.BG_NBD_PAYLOAD
_KEEP: int = lib.BG_NBD_KEEP
#: bg_fault: ticket, source, buf, tag, offset, length, command, flags, error
_FAULT = struct.Struct("=QqQQQIHHq")


class NbdStats(NamedTuple):
    """What a loop has done since it began."""

    requests: int
    """taken"""
    hits: int
    """done by the extent map"""
    blocked: int
    """of these, on the pool's threads, at a device while the loop went on, or when they were retried"""
    piped: int
    """of the hits, long writes whose payload was copied once only, from the socket into a file in memory"""
    stored: int
    """of the hits, long writes whose place in such a file was mapped and in memory"""
    faults: int
    """done by Python"""
    refused: int
    """answered with an error by the loop: the protocol forbids them, or the server is being shut down"""
    received: int
    """bytes"""
    sent: int
    """bytes"""
    receives: int
    """system calls that received something"""
    sends: int
    wakeups: int
    """of the loop's threads"""
    moved: int
    """connections, to the thread whose processor their clients share"""


_NOTHING = NbdStats(*[0] * len(NbdStats._fields))


class Handler(Protocol):
    """Who does the faults of a connection."""

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
        """Begin a request, to be answered by `NbdConnection.reply`, or given back to `NbdConnection.retry`.

        Args:
            ticket: names it in the reply.
            address: of its payload's memory, 0 if it has none; valid until the reply. See payload_view.
            cookie, offset, length, command, flags: as the client sent them.
            retried: not 0: it was given back once.
        """
        ...

    def ended(self, error: int) -> None:
        """Nothing is in flight any more, the socket is closed.

        Args:
            error: 0, an errno negated, or BAD_MAGIC, LEFT, TOO_LONG.
        """
        ...


class NbdLoop:
    """Threads that serve NBD connections, and the event loop that does their faults.

    Args:
        threads: 1 to 64; each connection belongs to one. Requests that block go to the process's shared pool.
    Raises:
        ValueError: threads out of range.
        OSError: no thread could be started.
    """

    def __init__(self, threads: int) -> None:
        out = ffi.new("bg_nbd_loop **")
        if not 1 <= threads <= lib.BG_NBD_MAX_THREADS:
            raise ValueError(f"threads must be between 1 and {lib.BG_NBD_MAX_THREADS}, not {threads}")
        check(lib.bg_nbd_loop_new(threads, shared_threads(), out))
        self._ending: Ending[Any] = Ending(self, out[0], _end)
        self._last = _NOTHING
        self._loop = asyncio.get_running_loop()
        self._faults = ffi.new("bg_fault[]", _TAKE)
        assert ffi.sizeof("bg_fault") == _FAULT.size
        self._memory = memoryview(ffi.buffer(self._faults))
        self._connections: dict[int, NbdConnection] = {}
        self._last_id = 0
        self._replied: set[NbdConnection] = set()
        self._when_taken: list[Callable[[], None]] = []
        self._kick_scheduled = False
        self._loop.add_reader(lib.bg_nbd_loop_eventfd(self._native), self._collect)
        self._loop.add_reader(lib.bg_nbd_loop_pollfd(self._native), self._poll)

    @property
    def stats(self) -> NbdStats:
        """Counters so far; after `close` the last ones."""
        native = self._native
        return self._last if native is None else _stats(native)

    @property
    def _native(self) -> Any:
        return self._ending.native

    def connect(
        self,
        fd: int,
        handler: Handler,
        *,
        size: int,
        structured: bool,
        writable: bool,
        contexts: bool,
        extent_map: ExtentMap | None,
    ) -> NbdConnection:
        """Serve a connected non-blocking stream socket, and own it.

        Args:
            size: of the disk, bytes.
            structured: structured replies were negotiated.
            writable: the client may write.
            contexts: it has selected contexts of metadata.
            extent_map: of the backend, or None: every request faults.
        Raises:
            OSError: it can not be served; the socket is the caller's.
        """
        self._last_id += 1
        settings = ffi.new("bg_nbd_settings *", (size, structured, writable, contexts))
        out = ffi.new("bg_nbd_conn **")
        native_map = ffi.NULL if extent_map is None else extent_map._native
        check(lib.bg_nbd_conn_new(self._native, fd, self._last_id, settings, native_map, out))
        connection = self._connections[self._last_id] = NbdConnection(self, out[0], handler, extent_map)
        return connection

    def close(self) -> None:
        """Disconnect everyone and end the threads. Idempotent.

        Close it when all connections have ended. Else faults not replied to keep their memory for good.
        """
        native = self._native
        if native is not None and not self._ending.is_inherited:
            if not self._loop.is_closed():
                self._loop.remove_reader(lib.bg_nbd_loop_eventfd(native))
                self._loop.remove_reader(lib.bg_nbd_loop_pollfd(native))
            lib.bg_nbd_loop_stop(native)
            self._last = _stats(native)
        self._ending()

    def _poll(self) -> None:
        lib.bg_nbd_poll(self._native)
        self._collect()

    def _collect(self) -> None:
        count = lib.bg_nbd_take(self._native, self._faults, _TAKE)
        connections = self._connections
        self._kick_scheduled = True  # at the end of this
        try:
            for ticket, source, address, tag, offset, length, command, flags, error in _FAULT.iter_unpack(
                self._memory[: count * _FAULT.size]
            ):
                if ticket:
                    connections[source].handler.fault(ticket, address, tag, offset, length, command, flags, error)
                else:
                    connections.pop(source)._ended(error)
            while self._when_taken:
                self._when_taken.pop()()
        finally:
            self._kick()

    def when_taken(self, function: Callable[[], None]) -> None:
        """For `Handler.fault`: call it when all faults that are there have been handed out."""
        self._when_taken.append(function)

    def _reply_given(self, connection: NbdConnection) -> None:
        self._replied.add(connection)
        if not self._kick_scheduled:
            # Replies that become ready in the same turn of the loop leave together.
            self._kick_scheduled = True
            self._loop.call_soon(self._kick)

    def _kick(self) -> None:
        self._kick_scheduled = False
        while self._replied:
            connection = self._replied.pop()
            if connection._native is not None and self._native is not None:
                lib.bg_nbd_kick(connection._native)


class NbdConnection:
    """One client. Made by `NbdLoop.connect`; after `Handler.ended` nothing of it does anything."""

    def __init__(self, loop: NbdLoop, native: Any, handler: Handler, extent_map: ExtentMap | None) -> None:
        self.handler = handler
        self._loop = loop
        self._native = native
        self._extent_map = extent_map  # borrowed by the native connection

    def reply(self, ticket: int, head: bytes, *, payload: bool, keep: bool) -> None:
        """Answer a fault, whole.

        Args:
            head: at least 1 byte, with all that comes before the payload.
            payload: the fault's payload follows.
            keep: the payload's memory is the caller's now; see free_with.
        """
        check(lib.bg_nbd_reply(ticket, head, len(head), (_PAYLOAD if payload else 0) | (_KEEP if keep else 0)))
        self._loop._reply_given(self)

    def retry(self, tickets: Sequence[int]) -> None:
        """Reads and writes whose places have been looked up, so that they can be done natively instead of answered.

        What the map does not know all the same comes back.
        """
        lib.bg_nbd_retry(tickets, len(tickets))
        self._loop._reply_given(self)

    def shutdown(self) -> None:
        """All further requests are refused; disconnect when none is in flight."""
        if self._native is not None:
            lib.bg_nbd_shutdown(self._native)

    def abort(self) -> None:
        """Disconnect now; requests in flight go on."""
        if self._native is not None:
            lib.bg_nbd_abort(self._native)

    def _ended(self, error: int) -> None:
        native, self._native = self._native, None
        lib.bg_nbd_release(native)
        self.handler.ended(error)


def _end(native: Any) -> None:
    lib.bg_nbd_loop_stop(native)
    lib.bg_nbd_loop_free(native)


def _stats(native: Any) -> NbdStats:
    out = ffi.new("bg_nbd_stats *")
    lib.bg_nbd_loop_stats(native, out)
    return NbdStats(*(getattr(out, name) for name in NbdStats._fields))


def payload_view(address: int, length: int) -> memoryview:
    """The memory of a fault's payload, writable."""
    return memoryview(ffi.buffer(ffi.cast("char *", address), length))


def free_with(view: memoryview) -> None:
    """Free the memory of a `payload_view` whose reply keeps it, when nothing refers to it any more."""
    weakref.finalize(view.obj, lib.bg_buffer_free, ffi.cast("void *", ffi.from_buffer(view))).atexit = False

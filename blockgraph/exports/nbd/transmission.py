# SPDX-FileCopyrightText: blockgraph contributors
# SPDX-License-Identifier: MIT
"""The transmission phase of one connection: requests in, replies out, in the order in which they complete.

    readable ── receive ── parse ── admit ── NbdRequest.begin ── Backend
    writable ── flush ◄── reply queue ◄─────── reply ◄───────────────┘

Driven by callbacks of the loop: one receive and one gathered send for as many requests as the client has pipelined,
and no task for a request that need not wait.

Memory is bounded, whatever the client does: a request is admitted while requests and their payload, until their
replies have reached the socket, stay below a limit; the rest waits in the client's socket. Write payload is received
into the buffer that the backend gets.
"""

from __future__ import annotations

import asyncio
import errno
import logging
from collections import deque
from collections.abc import Callable

from blockgraph.errors import WireError
from blockgraph.exports.nbd import protocol
from blockgraph.exports.nbd.buffers import BufferPool, buffer_size
from blockgraph.exports.nbd.export import Negotiated
from blockgraph.exports.nbd.protocol import Cmd, Err
from blockgraph.exports.nbd.requests import CACHE_STEP, KINDS, NbdRequest, Refusal, Refused, Write, check
from blockgraph.exports.nbd.wire import Buffer, Wire

_log = logging.getLogger(__name__)

#: Requests and payload bytes in flight on one connection. One request is always admitted.
MAX_REQUESTS = 128
MAX_BYTES = protocol.MAX_REQUEST
#: Bytes received at once where they are not known to be payload.
_INPUT = 128 << 10
#: Requests begun in one turn of the loop: other connections want theirs too.
_TURN = 256
#: A refused write's payload is skipped up to this length; beyond, the connection ends.
_MAX_SKIPPED = 64 << 20

# Plain numbers: comparing with enum members costs more.
_READ, _WRITE, _DISC, _CACHE = map(int, (Cmd.READ, Cmd.WRITE, Cmd.DISC, Cmd.CACHE))

_HEADER = protocol.REQUEST.size
_unpack_header = protocol.REQUEST.unpack_from


class Transmission:
    """One client's requests, from handshake to disconnection.

    Args:
        wire: after the handshake; closed by this object.
        negotiated: the handshake's outcome.
        pool: memory for payloads, shared among connections.
        peer: the client's name in messages.
        on_closed: called once, when the socket is closed and nothing is in flight any more.
    """

    def __init__(
        self, wire: Wire, negotiated: Negotiated, pool: BufferPool, *, peer: str, on_closed: Callable[[], None]
    ) -> None:
        self.negotiated = negotiated
        self._wire = wire
        self._pool = pool
        self._peer = peer
        self._on_closed = on_closed
        self._loop = asyncio.get_running_loop()
        self._backend = negotiated.export.backend
        # Input: bytes [_start, _end) of _input are not parsed yet.
        self._input = bytearray(_INPUT)
        self._input_view = memoryview(self._input)
        self._start = 0
        self._end = 0
        self._write: Write | None = None  # its payload is being received
        self._missing = _NOTHING  # the part of it that is to come
        self._refused: tuple[NbdRequest, Refusal] | None = None  # its payload is being skipped
        self._skip = 0
        # Output: buffers to send, and whose they are: (bytes of the reply not sent yet, request).
        self._output: list[Buffer] = []
        self._owners: deque[tuple[int, NbdRequest]] = deque()
        self._output_bytes = 0
        # In flight: from admission until the reply has been sent.
        self._requests = 0
        self._bytes = 0
        self._running: set[NbdRequest] = set()
        self._stalled_by = -1  # cost of the request that waits for admission; -1: none
        # What the loop is asked for.
        self._reading = False
        self._writing = False
        self._turn_scheduled = False
        self._flush_scheduled = False
        self._in_turn = False
        # The end.
        self._ending = False  # no more input is wanted
        self._shutdown = False
        self._closed = False
        self._reported = False

    # Life.

    def start(self) -> None:
        """Serve."""
        self._set_reading(True)
        if self._wire.has_input:
            self._schedule(self._received)

    def shutdown(self) -> None:
        """Let requests in flight end, refuse new ones, then disconnect."""
        self._shutdown = True
        self._flush()

    def abort(self) -> None:
        """Disconnect now. Requests in flight go on; their results go nowhere."""
        self._close()

    def cancel(self) -> None:
        """Cancel the requests in flight."""
        for request in list(self._running):
            request.cancel()

    def _check_end(self) -> None:
        if (self._ending or self._shutdown) and not self._requests and not self._wire.has_output:
            self._close()

    def _close(self) -> None:
        if not self._closed:
            self._closed = self._ending = True
            self._set_reading(False)
            self._set_writing(False)
            self._wire.end()
            self._wire.close()
            self._output.clear()
            while self._owners:
                self._release(self._owners.popleft()[1])
            for request in (self._write, self._refused and self._refused[0]):
                if request:
                    self._release(request)
            self._write = self._refused = None
            self._start = self._end = 0
            self._input, self._input_view = bytearray(), _NOTHING  # not to wait for the garbage collector
        if not self._requests and not self._reported:
            self._reported = True
            self._on_closed()

    # Input.

    def _readable(self) -> None:
        if self._turn_scheduled:
            return  # what was received before comes first
        try:
            received = self._receive()
        except BlockingIOError:
            self._set_reading(True)
            return
        except OSError as error:
            self._lost(error)
            return
        if received:
            self._turn()
        else:
            self._input_ended()

    def _receive(self) -> int:
        if self._write is not None:
            received = self._wire.recv_into(self._missing)
            self._missing = self._missing[received:]
            return received
        if self._start == self._end:
            self._start = self._end = 0
        elif self._end == _INPUT:
            rest = self._input[self._start : self._end]
            self._input[: len(rest)] = rest
            self._start, self._end = 0, len(rest)
        received = self._wire.recv_into(self._input_view[self._end :])
        self._end += received
        return received

    def _input_ended(self) -> None:
        if self._write is not None or self._skip or self._start != self._end:
            self._broken(WireError("the client left in the middle of a request", op="receive"))
            return
        self._stop_input()
        self._flush()  # TLS may have words of its own to send

    def _stop_input(self) -> None:
        self._ending = True
        self._set_reading(False)

    def _turn(self) -> None:
        """Begin every request that is complete and may begin; then send the replies there are."""
        self._turn_scheduled = False
        if self._closed:
            return
        self._in_turn = True
        try:
            exhausted = self._parse()
        except WireError as error:
            self._broken(error)
            return
        finally:
            self._in_turn = False
        self._flush()
        if self._closed or self._ending:
            return
        if self._stalled_by >= 0:
            self._resume()
        elif not exhausted:
            self._schedule(self._turn)
        elif self._wire.has_input:
            self._schedule(self._received)
        else:
            self._set_reading(True)

    def _resume(self) -> None:
        """Go on with the request that was not admitted, if it now may be."""
        if self._admissible(self._stalled_by):
            self._stalled_by = -1
            self._schedule(self._turn)
        else:
            self._set_reading(False)

    def _schedule(self, turn: Callable[[], None]) -> None:
        if not self._turn_scheduled:
            self._turn_scheduled = True
            self._loop.call_soon(turn)

    def _received(self) -> None:
        """A turn that begins with what the wire has received already (TLS)."""
        self._turn_scheduled = False
        if not self._closed:
            self._readable()

    def _admissible(self, cost: int) -> bool:
        return not self._requests or (self._requests < MAX_REQUESTS and self._bytes + cost <= MAX_BYTES)

    def _parse(self) -> bool:
        """Begin requests out of the input.

        Returns: the input is used up (or the connection takes no more of it); False: the turn is over, or the next
            request is not admitted.
        """
        for _ in range(_TURN):
            if self._write is not None:
                if not self._take_payload(self._write):
                    return True
            elif self._skip and not self._skip_payload():
                return True
            if self._end - self._start < _HEADER or self._ending:
                return True
            magic, flags, command, cookie, offset, length = _unpack_header(self._input, self._start)
            if magic != protocol.REQUEST_MAGIC:
                raise WireError(f"wrong magic {magic:#x} of a request", op="receive")
            if command == _DISC:
                self._stop_input()
                return True
            if not self._admit(flags, command, cookie, offset, length):
                return False
        return False

    def _admit(self, flags: int, command: int, cookie: int, offset: int, length: int) -> bool:
        """Begin the request at the head of the input, or leave it there; True: it was taken."""
        refusal = check(self.negotiated, command, flags, offset, length)
        if self._shutdown:
            refusal = Refusal(Err.SHUTDOWN, "the server is being shut down")
        cost = 0
        if refusal is None and length:
            if command in (_READ, _WRITE):
                cost = buffer_size(length)
            elif command == _CACHE:
                cost = buffer_size(min(length, CACHE_STEP))
        if not self._admissible(cost):
            self._stalled_by = cost
            return False
        self._start += _HEADER
        self._requests += 1
        if refusal is not None:
            self._refuse(Refused(self, flags, cookie, offset, length), refusal, command)
            return True
        self.negotiated.export.count(command, length)
        request = KINDS[command](self, flags, cookie, offset, length)
        if cost:
            request.use(self._pool.take(cost))
            self._bytes += cost
        if command == _WRITE:
            assert isinstance(request, Write)
            self._write = request
            self._missing = request.view
        else:
            self._begin(request)
        return True

    def _refuse(self, request: NbdRequest, refusal: Refusal, command: int) -> None:
        if command != _WRITE or not request.length:
            request.refuse(refusal)
            return
        if request.length > _MAX_SKIPPED:
            self._requests -= 1
            raise WireError(f"a write of {request.length} bytes", op="receive")
        # The reply follows the payload: a client that only sends until it has sent all would otherwise be stuck.
        self._refused = request, refusal
        self._skip = request.length

    def _take_payload(self, request: Write) -> bool:
        """Move payload out of the input; True: it was complete, and the write has begun."""
        here = min(len(self._missing), self._end - self._start)
        if here:
            self._missing[:here] = self._input_view[self._start : self._start + here]
            self._start += here
            self._missing = self._missing[here:]
        if self._missing:
            return False
        self._write = None
        self._begin(request)
        return True

    def _skip_payload(self) -> bool:
        here = min(self._skip, self._end - self._start)
        self._start += here
        self._skip -= here
        if self._skip:
            return False
        assert self._refused is not None
        (request, refusal), self._refused = self._refused, None
        request.refuse(refusal)
        return True

    def _begin(self, request: NbdRequest) -> None:
        self._running.add(request)
        request.begin(self._loop, self._backend)

    # Output.

    def reply(self, request: NbdRequest, head: bytes, payload: memoryview | None = None) -> None:
        """See requests.Replies."""
        self._running.discard(request)
        if self._closed:
            self._release(request)
            self._close()
            return
        self._output.append(head)
        size = len(head)
        if payload:
            self._output.append(payload)
            size += len(payload)
        self._owners.append((size, request))
        self._output_bytes += size
        if not self._in_turn and not self._writing and not self._flush_scheduled:
            # Replies that become ready in the same turn of the loop leave together.
            self._flush_scheduled = True
            self._loop.call_soon(self._late_flush)

    def _late_flush(self) -> None:
        self._flush_scheduled = False
        if not self._closed and not self._writing:
            self._flush()
            if self._stalled_by >= 0 and not self._closed:
                self._resume()

    def _writable(self) -> None:
        self._set_writing(False)
        self._flush()
        if self._stalled_by >= 0 and not self._closed:
            self._resume()

    def _flush(self) -> None:
        """Send what the socket takes; ask to be called again for the rest. Disconnect when that was the last."""
        if self._writing or self._closed:
            return
        try:
            while self._output:
                sent = self._wire.sendmsg(self._output)
                if sent == self._output_bytes:
                    self._all_sent()
                else:
                    self._part_sent(sent)
            if self._wire.has_output:
                self._wire.sendmsg(())
                self._set_writing(self._wire.has_output)
        except BlockingIOError:
            self._set_writing(True)
        except OSError as error:
            self._lost(error)
            return
        self._check_end()

    def _all_sent(self) -> None:
        self._output.clear()
        self._output_bytes = 0
        owners, self._owners = self._owners, deque()
        for _, request in owners:
            self._release(request)

    def _part_sent(self, sent: int) -> None:
        self._output_bytes -= sent
        left = sent
        while left >= self._owners[0][0]:
            size, request = self._owners.popleft()
            left -= size
            self._release(request)
        size, request = self._owners[0]
        self._owners[0] = size - left, request
        whole = 0
        while sent >= len(self._output[whole]):
            sent -= len(self._output[whole])
            whole += 1
        del self._output[:whole]
        self._output[0] = memoryview(self._output[0])[sent:]

    def _release(self, request: NbdRequest) -> None:
        """The request holds nothing any more."""
        self._requests -= 1
        self._bytes -= request.cost
        if request.buffer is not None and not request.failed:
            self._pool.give(request.buffer)

    # Trouble.

    def _broken(self, error: WireError) -> None:
        _log.warning("NBD export '%s', client %s: %s", self.negotiated.export.name, self._peer, error)
        self._close()

    def _lost(self, error: OSError) -> None:
        known = {errno.EPIPE, errno.ECONNRESET}
        level = logging.DEBUG if error.errno in known else logging.WARNING
        _log.log(level, "NBD export '%s', client %s: %s", self.negotiated.export.name, self._peer, error)
        self._close()

    # What the loop is asked for.

    def _set_reading(self, on: bool) -> None:
        if on != self._reading:
            self._reading = on
            if on:
                self._loop.add_reader(self._wire.sock, self._readable)
            else:
                self._loop.remove_reader(self._wire.sock)

    def _set_writing(self, on: bool) -> None:
        if on != self._writing:
            self._writing = on
            if on:
                self._loop.add_writer(self._wire.sock, self._writable)
            else:
                self._loop.remove_writer(self._wire.sock)


_NOTHING = memoryview(b"")

# SPDX-FileCopyrightText: blockgraph contributors
# SPDX-License-Identifier: MIT
"""A blocking NBD client that keeps a number of requests in flight and times each. No TLS, simple replies only."""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Iterator

from blockgraph.bench.figures import Sample, percentiles, series
from blockgraph.bench.pattern import Pattern
from blockgraph.errors import IOFailure, WireError
from blockgraph.exports.nbd import protocol
from blockgraph.exports.nbd.protocol import Cmd, HandshakeFlag, Opt, Rep

_ROOM = 8 << 20
_PATIENCE = 30.0


def run_client(path: str, export: str, size: int, pattern: Pattern, seconds: float, interval: float) -> Sample:
    """Put the pattern on a server; see `load.run_load`.

    Args:
        path: of the server's socket.
    """
    with socket.socket(socket.AF_UNIX) as sock:
        sock.settimeout(_PATIENCE)
        try:
            sock.connect(path)
            _handshake(sock, export)
            return _Guest(sock, pattern, pattern.offsets(size)).run(seconds, interval)
        except OSError as error:
            raise IOFailure.from_oserror(error, node=export, op=pattern.name) from error


def _receive(sock: socket.socket, length: int) -> bytes:
    data = bytearray()
    while len(data) < length:
        part = sock.recv(length - len(data))
        if not part:
            raise ConnectionResetError("the server closed the connection")
        data += part
    return bytes(data)


def _handshake(sock: socket.socket, export: str) -> None:
    magic, option_magic, _ = protocol.GREETING.unpack(_receive(sock, protocol.GREETING.size))
    if (magic, option_magic) != (protocol.NBD_MAGIC, protocol.OPTION_MAGIC):
        raise WireError("the server does not speak newstyle NBD", op="greet")
    name = export.encode()
    data = protocol.U32.pack(len(name)) + name + protocol.U16.pack(0)
    sock.sendall(protocol.CLIENT_FLAGS.pack(HandshakeFlag.FIXED_NEWSTYLE | HandshakeFlag.NO_ZEROES))
    sock.sendall(protocol.OPTION.pack(protocol.OPTION_MAGIC, Opt.GO, len(data)) + data)
    while True:
        _, _, reply, length = protocol.OPTION_REPLY.unpack(_receive(sock, protocol.OPTION_REPLY.size))
        _receive(sock, length)
        if reply == Rep.ACK:
            return
        if reply != Rep.INFO:
            raise WireError(f"the server refused export '{export}' ({reply:#x})", op="go")


class _Guest:
    """Requests in flight: each has a slot, whose number is its cookie."""

    def __init__(self, sock: socket.socket, pattern: Pattern, offsets: Iterator[int]) -> None:
        self._sock = sock
        self._pattern = pattern
        self._offsets = offsets
        self._payload = os.urandom(pattern.block) if pattern.writes else b""
        self._answer = protocol.SIMPLE_REPLY.size + (0 if pattern.writes else pattern.block)
        self._begun = [0] * pattern.depth
        self._latencies: list[int] = []
        self._ends: list[int] = []

    def run(self, seconds: float, interval: float) -> Sample:
        clock = time.perf_counter_ns
        begin = clock()
        until = begin + int(seconds * 1e9)
        memory = memoryview(bytearray(_ROOM + self._answer))
        self._send(range(self._pattern.depth), begin)
        flying, have = self._pattern.depth, 0
        while flying:
            received = self._sock.recv_into(memory[have:])
            if not received:
                raise ConnectionResetError("the server closed the connection")
            now = clock()
            done, taken = self._take(memory, have + received, now)
            have += received - taken
            memory[:have] = memory[taken : taken + have]
            if now < until:
                self._send(done, clock())
            else:
                flying -= len(done)
        elapsed = (self._ends[-1] - begin) / 1e9
        self._sock.sendall(protocol.REQUEST.pack(protocol.REQUEST_MAGIC, 0, Cmd.DISC, 0, 0, 0))
        rates = series([(end - begin) / 1e9 for end in self._ends], seconds, interval) if interval else ()
        rate = self._pattern.rate(len(self._ends) / elapsed)
        return Sample(rate, percentiles(self._latencies), rates)

    def _send(self, slots: list[int] | range, now: int) -> None:
        if not slots:
            return
        command = Cmd.WRITE if self._pattern.writes else Cmd.READ
        length, magic, parts = self._pattern.block, protocol.REQUEST_MAGIC, []
        for slot in slots:
            self._begun[slot] = now
            parts.append(protocol.REQUEST.pack(magic, 0, command, slot, next(self._offsets), length))
            if self._payload:
                parts.append(self._payload)
        self._sock.sendall(b"".join(parts))

    def _take(self, memory: memoryview, end: int, now: int) -> tuple[list[int], int]:
        """Slots whose replies lie complete in memory[:end], and how many bytes these are."""
        done, position, size = [], 0, self._answer
        while end - position >= protocol.SIMPLE_REPLY.size:
            magic, error, slot = protocol.SIMPLE_REPLY.unpack_from(memory, position)
            if magic != protocol.SIMPLE_REPLY_MAGIC or slot >= len(self._begun):
                raise WireError("the server's reply makes no sense", op="reply")
            if error:
                raise OSError(error, os.strerror(error))
            if end - position < size:
                break
            position += size
            self._latencies.append(now - self._begun[slot])
            self._ends.append(now)
            done.append(slot)
        return done, position

# SPDX-FileCopyrightText: blockgraph contributors
# SPDX-License-Identifier: MIT
"""Listening sockets: bound with a remedy in every error, and accepted from without a task."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import logging
import os
import socket
import stat
from collections.abc import Callable

from blockgraph.errors import BlockGraphError

_log = logging.getLogger(__name__)

_BACKLOG = 256
#: Pause after accept failed for want of descriptors or memory, seconds.
_PAUSE = 0.5
_EXHAUSTED = {errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM}


def bind_unix(path: str) -> socket.socket:
    """A socket listening at `path`. A socket file that nobody listens at any more is replaced.

    Raises:
        BlockGraphError: it can not be; a file that is no dead socket is left alone.
    """
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_NONBLOCK)
    try:
        try:
            sock.bind(path)
        except OSError as error:
            if error.errno != errno.EADDRINUSE:
                raise
            _remove_dead(path)
            sock.bind(path)
        sock.listen(_BACKLOG)
    except OSError as error:
        sock.close()
        reason = os.strerror(error.errno) if error.errno else str(error)
        raise _unix_error(path, reason, error.errno) from error
    except BlockGraphError:
        sock.close()
        raise
    return sock


def _remove_dead(path: str) -> None:
    """Unlink a socket file without a listener.

    Raises:
        BlockGraphError: it is something else.
    """
    if not stat.S_ISSOCK(os.lstat(path).st_mode):
        raise _unix_error(path, "there is a file of another kind", errno.EEXIST)
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_NONBLOCK) as probe:
        result = probe.connect_ex(path)
    if result != errno.ECONNREFUSED:
        raise _unix_error(path, "another server listens there", errno.EADDRINUSE)
    os.unlink(path)


def _unix_error(path: str, reason: str, code: int | None) -> BlockGraphError:
    hints = {
        errno.EADDRINUSE: "stop that server or choose another path",
        errno.EEXIST: "choose another path, or remove the file if it is not needed",
        errno.ENOENT: "make the directory first",
        errno.EACCES: "choose a directory you may write to",
        None: "the path of a unix socket has at most 107 bytes: choose a shorter one",
    }
    return BlockGraphError(f"can not listen at '{path}': {reason}", errno=code, hint=hints.get(code))


async def bind_tcp(host: str, port: str | int) -> list[socket.socket]:
    """Sockets listening at every address of `host` (empty: of the machine), all at one port.

    Raises:
        BlockGraphError: one of them can not be.
    """
    loop = asyncio.get_running_loop()
    where = f"{host or '*'}:{port}"
    try:
        found = await loop.getaddrinfo(host or None, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    except socket.gaierror as error:
        raise BlockGraphError(
            f"can not listen at {where}: {error.strerror}", hint="check the host's name and the port"
        ) from error
    bound: list[socket.socket] = []
    try:
        for family, address in dict.fromkeys((family, address) for family, _, _, _, address in found):
            chosen = bound[0].getsockname()[1] if bound else address[1]
            bound.append(_bind_inet(family, (address[0], chosen, *address[2:])))
    except OSError as error:
        for sock in bound:
            sock.close()
        hints = {
            errno.EADDRINUSE: "stop the server that listens there, or choose another port (0: any free one)",
            errno.EADDRNOTAVAIL: "choose an address of this machine",
            errno.EACCES: "ports below 1024 need privileges: choose a higher one",
        }
        raise BlockGraphError(
            f"can not listen at {where}: {error.strerror}", errno=error.errno, hint=hints.get(error.errno or 0)
        ) from error
    return bound


def _bind_inet(family: int, address: tuple[object, ...]) -> socket.socket:
    sock = socket.socket(family, socket.SOCK_STREAM | socket.SOCK_NONBLOCK)
    try:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if family == socket.AF_INET6:
            sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
        sock.bind(address)
        sock.listen(_BACKLOG)
    except OSError:
        sock.close()
        raise
    return sock


class Listener:
    """Accepts connections from one listening socket.

    Args:
        sock: listening, non-blocking; closed by this object.
        accepted: gets every connected socket, non-blocking, tuned for NBD.
    """

    def __init__(self, sock: socket.socket, accepted: Callable[[socket.socket], None]) -> None:
        self._sock = sock
        self._accepted = accepted
        self._loop = asyncio.get_running_loop()
        self._paused = 1
        self._timer: asyncio.TimerHandle | None = None
        self.address = sock.getsockname()
        self._file: tuple[int, int] | None = None
        if sock.family == socket.AF_UNIX:
            found = os.stat(self.address)
            self._file = found.st_dev, found.st_ino
        self.resume()

    @property
    def is_unix(self) -> bool:
        """The address is a path."""
        return self._file is not None

    def pause(self) -> None:
        """Further clients wait in the kernel's queue; nests."""
        self._paused += 1
        self._loop.remove_reader(self._sock)

    def resume(self) -> None:
        """Undo one pause."""
        self._paused -= 1
        if not self._paused:
            self._loop.add_reader(self._sock, self._accept)

    def close(self) -> None:
        """Stop listening; remove the socket file, if it still is this one's."""
        self._loop.remove_reader(self._sock)
        if self._timer is not None:
            self._timer.cancel()
        self._sock.close()
        if self._file is not None:
            with contextlib.suppress(OSError):
                found = os.stat(self.address)
                if (found.st_dev, found.st_ino) == self._file:
                    os.unlink(self.address)

    def _accept(self) -> None:
        for _ in range(_BACKLOG):
            if self._paused:
                return
            try:
                sock, _ = self._sock.accept()
            except (BlockingIOError, ConnectionAbortedError):
                return
            except OSError as error:
                if error.errno not in _EXHAUSTED:
                    raise
                _log.warning("NBD: a client has to wait: %s", error)
                self.pause()
                self._timer = self._loop.call_later(_PAUSE, self.resume)
                return
            sock.setblocking(False)
            _tune(sock)
            self._accepted(sock)


def _tune(sock: socket.socket) -> None:
    if sock.family == socket.AF_UNIX:
        # Linux does not grow them by itself as it does TCP's; a 256 KiB reply should fit.
        for option in (socket.SO_SNDBUF, socket.SO_RCVBUF):
            sock.setsockopt(socket.SOL_SOCKET, option, 2 << 20)
    else:
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)

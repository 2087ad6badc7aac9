# SPDX-FileCopyrightText: blockgraph contributors
# SPDX-License-Identifier: MIT
"""NBD servers on unix sockets, each in a process of its own, as context managers that give a `load.Target`."""

from __future__ import annotations

import json
import select
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from blockgraph.bench.load import Target
from blockgraph.bench.programs import running
from blockgraph.errors import BlockGraphError

_PATIENCE = 30.0

Nodes = Sequence[dict[str, Any]]


def _failed(name: str, process: subprocess.Popen[str], what: str = "did not start") -> BlockGraphError:
    if process.poll() is None:
        process.kill()
        process.wait()
    said = process.stderr.read().strip().splitlines() if process.stderr is not None else []
    return BlockGraphError(f"{name} {what}: {said[-1] if said else 'it said nothing'}", op="bench")


@contextmanager
def ours(folder: Path, nodes: Nodes, node: str, size: int, *, writable: bool) -> Iterator[Target]:
    """`blockgraph run`."""
    path, address = folder / "graph.json", folder / "ours.sock"
    export = {"type": "nbd", "id": "guest", "node-name": node, "name": "disk", "writable": writable}
    server = {"addr": {"type": "unix", "path": str(address)}}
    path.write_text(json.dumps({"nodes": list(nodes), "exports": [export], "nbd-server": server}))
    argv = [sys.executable, "-P", "-m", "blockgraph", "run", str(path)]
    with running(argv, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout is not None
        while (line := process.stdout.readline()) != "ready\n":
            if not line:
                raise _failed("blockgraph run", process)
        yield Target(str(address), "disk", size)


@contextmanager
def _daemon(folder: Path, size: int, argv: Sequence[str]) -> Iterator[Target]:
    """A server that knows "SOCKET" and tells by the file "PIDFILE" that it listens."""
    address, pidfile = folder / "peer.sock", folder / "peer.pid"
    address.unlink(missing_ok=True)
    pidfile.unlink(missing_ok=True)
    words = {"SOCKET": str(address), "PIDFILE": str(pidfile)}
    argv = [words.get(word, word) for word in argv]
    with running(argv, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE) as process:
        deadline = time.monotonic() + _PATIENCE
        while not (pidfile.exists() and pidfile.stat().st_size):
            if process.poll() is not None or time.monotonic() > deadline:
                raise _failed(argv[0], process)
            time.sleep(0.005)
        yield Target(str(address), "", size)


@contextmanager
def nbdkit(folder: Path, path: Path, size: int, *, writable: bool) -> Iterator[Target]:
    """nbdkit's file plugin."""
    read_only = [] if writable else ["-r"]
    argv = ["nbdkit", "-f", *read_only, "-P", "PIDFILE", "-U", "SOCKET", "file", str(path)]
    with _daemon(folder, size, argv) as target:
        yield target


@contextmanager
def qemu_nbd(folder: Path, path: Path, driver: str, size: int, *, writable: bool) -> Iterator[Target]:
    """qemu-nbd as people call it: write-back cache, its own pool of threads."""
    read_only = [] if writable else ["-r"]
    argv = ["qemu-nbd", "-t", "-e", "16", *read_only, "--pid-file", "PIDFILE", "-k", "SOCKET", "-f", driver, str(path)]
    with _daemon(folder, size, argv) as target:
        yield target


class StorageDaemon:
    """A qemu-storage-daemon with a monitor; a context manager.

    Args:
        folder: for the sockets.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._input = b""
        self._events: list[dict[str, Any]] = []
        with ExitStack() as stack:
            # A pair, and not a path that it listens on: when a client comes before the monitor is there, QEMU may
            # greet it and never answer.
            self._socket, theirs = socket.socketpair()
            stack.enter_context(self._socket)
            with theirs:
                chardev = f"socket,id=qmp,fd={theirs.fileno()},server=off"
                argv = ["qemu-storage-daemon", "--chardev", chardev, "--monitor", "chardev=qmp"]
                daemon = running(argv, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, pass_fds=[theirs.fileno()])
                self._process = stack.enter_context(daemon)
            self._next()
            self.command("qmp_capabilities")
            self._stack = stack.pop_all()

    def _ended(self) -> BlockGraphError:
        return _failed("qemu-storage-daemon", self._process, "has ended")

    def _next(self) -> dict[str, Any]:
        while b"\n" not in self._input:
            if not select.select([self._socket], [], [], _PATIENCE)[0]:
                raise _failed("qemu-storage-daemon", self._process, "does not answer")
            try:
                part = self._socket.recv(65536)
            except ConnectionResetError:
                part = b""
            if not part:
                raise self._ended()
            self._input += part
        line, _, self._input = self._input.partition(b"\n")
        message: dict[str, Any] = json.loads(line)
        return message

    def command(self, name: str, /, **arguments: Any) -> None:
        """Run a QMP command. Member names with "_" for "-"."""
        given = {key.replace("_", "-"): value for key, value in arguments.items()}
        try:
            self._socket.sendall(json.dumps({"execute": name, "arguments": given}).encode() + b"\n")
        except (BrokenPipeError, ConnectionResetError):
            raise self._ended() from None
        while True:
            answer = self._next()
            if "event" in answer:
                self._events.append(answer)
            elif "error" in answer:
                raise BlockGraphError(f"qemu-storage-daemon: {name}: {answer['error']['desc']}", op="bench")
            else:
                return

    def add(self, nodes: Nodes) -> None:
        """Open nodes."""
        for description in nodes:
            self.command("blockdev-add", **description)

    def serve(self, node: str, size: int) -> Target:
        """Export a node, writable."""
        path = self._folder / "daemon.sock"
        path.unlink(missing_ok=True)
        self.command("nbd-server-start", addr={"type": "unix", "data": {"path": str(path)}}, max_connections=0)
        self.command("block-export-add", type="nbd", id="guest", node_name=node, name="disk", writable=True)
        return Target(str(path), "disk", size)

    def backup(self, device: str, target: str) -> None:
        """Run a blockdev-backup job to its end."""
        self.command("blockdev-backup", job_id="b", device=device, target=target, sync="full")
        while True:
            event = self._events.pop(0) if self._events else self._next()
            if event.get("event") == "BLOCK_JOB_COMPLETED":
                if "error" in event["data"]:
                    raise BlockGraphError(f"qemu-storage-daemon: {event['data']['error']}", op="bench")
                return

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._stack.close()

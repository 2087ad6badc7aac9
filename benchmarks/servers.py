# SPDX-FileCopyrightText: blockgraph contributors
# SPDX-License-Identifier: MIT
"""NBD servers on unix sockets, each in a process of its own, as context managers that give the export's URI."""

from __future__ import annotations

import json
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any, Self

Nodes = Sequence[dict[str, Any]]


def _uri(path: Path, name: str = "") -> str:
    return f"nbd+unix:///{name}?socket={path}"


def _end(process: subprocess.Popen[Any]) -> None:
    process.send_signal(signal.SIGTERM)
    process.wait(30)
    if process.stdout is not None:
        process.stdout.close()


def graph_file(directory: Path, nodes: Nodes, export: str, **options: Any) -> tuple[Path, str]:
    """A graph file that serves the node `export`, and the URI. `options` are more members of the export."""
    path, address = directory / "graph.json", directory / "ours.sock"
    path.write_text(
        json.dumps(
            {
                "nodes": list(nodes),
                "exports": [{"type": "nbd", "id": "guest", "node-name": export, "writable": True, **options}],
                "nbd-server": {"addr": {"type": "unix", "path": str(address)}},
            }
        )
    )
    return path, _uri(address, export)


@contextmanager
def ours(directory: Path, nodes: Nodes, export: str = "disk", **options: Any) -> Iterator[str]:
    """`blockgraph run`. `options` are more members of the export."""
    path, uri = graph_file(directory, nodes, export, **options)
    with _running(path):
        yield uri


@contextmanager
def ours_with_bitmaps(
    directory: Path, disks: dict[str, dict[str, Any]], counts: dict[str, int]
) -> Iterator[tuple[list[str], int]]:
    """`blockgraph run` with an export for each disk (name: node) and so many bitmaps on it; the URIs and its pid."""
    path, address = directory / "graph.json", directory / "ours.sock"
    exports = [{"type": "nbd", "id": name, "node-name": name, "writable": True} for name in disks]
    bitmaps = [{"node": name, "name": f"b{number}"} for name in disks for number in range(counts[name])]
    server = {"addr": {"type": "unix", "path": str(address)}}
    graph = {"nodes": list(disks.values()), "bitmaps": bitmaps, "exports": exports, "nbd-server": server}
    path.write_text(json.dumps(graph))
    with _running(path) as pid:
        yield [_uri(address, name) for name in disks], pid


def processor_time(pid: int) -> float:
    """Seconds that the threads of a process have run."""
    tasks = Path(f"/proc/{pid}/task").iterdir()
    return sum(int((task / "schedstat").read_text().split()[0]) for task in tasks) / 1e9


@contextmanager
def _running(path: Path) -> Iterator[int]:
    process = subprocess.Popen(
        [sys.executable, "-m", "blockgraph", "run", str(path)], stdout=subprocess.PIPE, text=True, cwd=path.parent
    )
    try:
        assert process.stdout is not None
        if not any(line == "ready\n" for line in process.stdout):
            raise RuntimeError("blockgraph run ended before it was ready")
        yield process.pid
    finally:
        _end(process)


@contextmanager
def _daemon(directory: Path, *argv: str) -> Iterator[str]:
    """A server that knows "SOCKET" and tells by the file "PIDFILE" that it listens."""
    address, pidfile = directory / "peer.sock", directory / "peer.pid"
    address.unlink(missing_ok=True)
    pidfile.unlink(missing_ok=True)
    words = {"SOCKET": str(address), "PIDFILE": str(pidfile)}
    process = subprocess.Popen([words.get(word, word) for word in argv], stderr=subprocess.DEVNULL)
    try:
        deadline = time.monotonic() + 10
        while not (pidfile.exists() and pidfile.stat().st_size):
            if process.poll() is not None or time.monotonic() > deadline:
                raise RuntimeError(f"{argv[0]} does not start")
            time.sleep(0.01)
        yield _uri(address)
    finally:
        _end(process)


def nbdkit(directory: Path, path: Path) -> Any:
    """nbdkit's file plugin."""
    return _daemon(directory, "nbdkit", "-f", "-P", "PIDFILE", "-U", "SOCKET", "file", str(path))


def qemu_nbd(directory: Path, path: Path, driver: str = "raw", *more: str) -> Any:
    """qemu-nbd as people call it: write-back cache, its own pool of threads. `more` options."""
    options = ["-t", "-e", "16", "--pid-file", "PIDFILE", "-k", "SOCKET", "-f", driver, *more]
    return _daemon(directory, "qemu-nbd", *options, str(path))


class StorageDaemon:
    """A qemu-storage-daemon with a monitor; a context manager.

    Args:
        directory: for the sockets.
    """

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._socket, theirs = socket.socketpair()  # see blockgraph/bench/servers.py
        with theirs:
            chardev = f"socket,id=qmp,fd={theirs.fileno()},server=off"
            argv = ["qemu-storage-daemon", "--chardev", chardev, "--monitor", "chardev=qmp"]
            self._process = subprocess.Popen(argv, pass_fds=[theirs.fileno()])
        self._file = self._socket.makefile("rw")
        self._events: list[dict[str, Any]] = []
        json.loads(self._file.readline())
        self.command("qmp_capabilities")

    def command(self, name: str, **arguments: Any) -> Any:
        """Run a QMP command. Member names with "_" for "-"."""
        given = {key.replace("_", "-"): value for key, value in arguments.items()}
        self._file.write(json.dumps({"execute": name, "arguments": given}) + "\n")
        self._file.flush()
        while True:
            answer = json.loads(self._file.readline())
            if "event" in answer:
                self._events.append(answer)
            elif "error" in answer:
                raise RuntimeError(f"{name}: {answer['error']['desc']}")
            else:
                return answer["return"]

    def wait_event(self, name: str) -> dict[str, Any]:
        """The next event of that name."""
        while True:
            event = self._events.pop(0) if self._events else json.loads(self._file.readline())
            if event.get("event") == name:
                data: dict[str, Any] = event.get("data", {})
                return data

    def add(self, nodes: Nodes) -> None:
        """Open nodes."""
        for description in nodes:
            self.command("blockdev-add", **description)

    def serve(self, export: str, *, writable: bool = True) -> str:
        """Export a node; the URI."""
        path = self._directory / "qsd.sock"
        path.unlink(missing_ok=True)
        self.command("nbd-server-start", addr={"type": "unix", "data": {"path": str(path)}}, max_connections=0)
        self.command("block-export-add", type="nbd", id="guest", node_name=export, writable=writable)
        return _uri(path, export)

    def backup(self, device: str, target: str, **options: str) -> None:
        """Run a blockdev-backup job to its end; a full one, if the options do not say otherwise."""
        self.command("blockdev-backup", **{"job_id": "b", "device": device, "target": target, "sync": "full"} | options)
        done = self.wait_event("BLOCK_JOB_COMPLETED")
        if "error" in done:
            raise RuntimeError(done["error"])

    def close(self) -> None:
        """End the daemon."""
        self._file.close()
        self._socket.close()
        _end(self._process)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()


@contextmanager
def storage_daemon(directory: Path, nodes: Nodes, export: str = "disk", *, writable: bool = True) -> Iterator[str]:
    """A qemu-storage-daemon that serves one of the nodes."""
    with StorageDaemon(directory) as daemon:
        daemon.add(nodes)
        yield daemon.serve(export, writable=writable)

# SPDX-FileCopyrightText: blockgraph contributors
# SPDX-License-Identifier: MIT
"""`blockgraph run`: from ready to a clean end, by itself or by signals."""

from __future__ import annotations

import asyncio
import contextlib
import os
import pty
import re
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from helpers.command import MAIN, PATIENCE, command, disk, graph_file

from blockgraph.cli import main
from blockgraph.errors import IOFailure
from blockgraph.testing.nbd_client import NbdClient

MIB = 1 << 20


def test_run_with_job_backs_up_and_ends_when_done(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    content = disk(tmp_path, 4 * MIB + 512)
    (tmp_path / "t").write_bytes(bytes(len(content)))
    assert main(["run", str(graph_file(tmp_path, job='sync = "full"')), "--exit-when-done"]) == 0
    assert (tmp_path / "t").read_bytes() == content
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "job 'b0': running"
    assert lines[1].startswith("export 'guest': nbd+unix:///disk?socket=")
    assert lines[2] == "ready"
    assert lines[-1] == "job 'b0': completed"
    assert not (tmp_path / "s.sock").exists()


def test_run_without_exports_ends_with_its_jobs(tmp_path: Path) -> None:
    content = disk(tmp_path, MIB)
    (tmp_path / "t").write_bytes(bytes(MIB))
    assert main(["run", str(graph_file(tmp_path, job='sync = "full"', export=False))]) == 0
    assert (tmp_path / "t").read_bytes() == content


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM], ids=["int", "term"])
def test_run_told_to_end_serves_what_is_in_flight_and_is_status_0(tmp_path: Path, number: signal.Signals) -> None:
    disk(tmp_path, MIB)
    with command(tmp_path, "run", str(graph_file(tmp_path))) as running:
        running.wait_line("ready")
        asyncio.run(write(str(tmp_path / "s.sock"), 4096, b"x" * 512))
        running.process.send_signal(number)
        assert running.end() == 0, running.errors
        assert running.errors == ""
    assert (tmp_path / "disk.img").read_bytes()[4096 : 4096 + 512] == b"x" * 512
    assert not (tmp_path / "s.sock").exists()


async def write(socket: str, offset: int, data: bytes) -> None:
    async with await NbdClient.connect_unix(socket, "disk") as client:
        await client.pwrite(offset, data)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM], ids=["int", "term"])
def test_run_told_to_end_before_its_job_has_tells_it_by_the_status(tmp_path: Path, number: signal.Signals) -> None:
    content = disk(tmp_path, 4 * MIB)
    (tmp_path / "t").write_bytes(bytes(4 * MIB))
    with command(tmp_path, "run", str(graph_file(tmp_path, job='sync = "full"\nspeed = 1'))) as running:
        running.wait_line("ready")
        running.process.send_signal(number)
        assert running.end() == 128 + number
        assert running.lines[-1] == "job 'b0': cancelled"
    assert (tmp_path / "disk.img").read_bytes() == content


def test_run_told_to_end_a_job_that_has_no_other_end_is_status_0(tmp_path: Path) -> None:
    disk(tmp_path, MIB)
    (tmp_path / "t").write_bytes(bytes(MIB))
    with command(tmp_path, "run", str(graph_file(tmp_path, job='sync = "none"'))) as running:
        running.wait_line("ready")
        running.process.send_signal(signal.SIGTERM)
        assert running.end() == 0


def test_run_told_twice_does_not_wait_for_clients(tmp_path: Path) -> None:
    """A request that never ends: the node below delays it by an hour."""
    disk(tmp_path, MIB)
    graph = graph_file(tmp_path)
    graph.write_text(
        graph.read_text().replace('node-name = "disk"\ndriver', 'node-name = "slow"\ndriver', 1)
        + '\n[[nodes]]\nnode-name = "disk"\ndriver = "delay"\nfile = "slow"\nread-ms = 3600000\n'
    )
    with command(tmp_path, "run", str(graph)) as running:
        running.wait_line("ready")
        asyncio.run(told_twice(running.process.pid, str(tmp_path / "s.sock"), lambda: running.wait_line("ending")))
        assert running.end() == 0, running.errors


async def told_twice(pid: int, socket: str, ending: Callable[[], object]) -> None:
    client = await NbdClient.connect_unix(socket, "disk")
    read = asyncio.ensure_future(client.pread(0, 512))
    await client.flush()  # the read, sent before, has arrived
    os.kill(pid, signal.SIGTERM)
    await asyncio.to_thread(ending)
    os.kill(pid, signal.SIGTERM)
    with pytest.raises((IOFailure, ConnectionError)):
        await read
    await client.abort()


def test_run_with_problems_prints_all_and_starts_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    graph = graph_file(tmp_path, job='sync = "ful"')
    graph.write_text(graph.read_text().replace('node-name = "disk"\nwritable', 'node-name = "dsk"\nwritable'))
    assert main(["run", str(graph)]) == 1
    errors = capsys.readouterr().err.splitlines()
    assert len([line for line in errors if "did you mean" in line]) == 2
    assert all(line.startswith(str(graph)) for line in errors)


def test_run_with_failing_job_goes_on_serving_and_is_status_1_at_the_end(tmp_path: Path) -> None:
    disk(tmp_path, MIB)
    (tmp_path / "t").write_bytes(bytes(MIB))
    graph = graph_file(tmp_path, job='sync = "full"')
    text = graph.read_text().replace('driver = "file", filename = "t"', 'driver = "bad", file = "t"')
    bad = '\n[[nodes]]\nnode-name = "t"\ndriver = "file"\nfilename = "t"\n'
    rule = 'inject-error = [{event = "pwritev", errno = 5}]'
    text = text.replace('file = {driver = "bad", file = "t"}', 'file = "broken"')
    text += f'{bad}[[nodes]]\nnode-name = "broken"\ndriver = "inject-error"\nimage = "t"\n{rule}\n'
    graph.write_text(text)
    with command(tmp_path, "run", str(graph)) as running:
        running.wait_line("ready")
        asyncio.run(write_when_over(str(tmp_path / "s.sock")))
        running.process.send_signal(signal.SIGINT)
        assert running.end() == 1
    (line,) = [line for line in running.errors.splitlines() if "failed" in line]
    assert "job 'b0' failed: node '" in line
    assert "Input/output error" in line


async def write_when_over(socket: str) -> None:
    """Writes fail while the snapshot is protected, and pass when the job has taken its filter away."""
    async with await NbdClient.connect_unix(socket, "disk") as client:
        while True:
            try:
                return await client.pwrite(0, b"x" * 512)
            except IOFailure:
                continue


def test_run_on_a_terminal_draws_bars_that_leave_room_for_an_echo(tmp_path: Path) -> None:
    disk(tmp_path, MIB)
    (tmp_path / "t").write_bytes(bytes(MIB))
    graph = graph_file(tmp_path, job='sync = "full"', export=False)
    terminal, side = pty.openpty()
    running = subprocess.Popen(
        [sys.executable, "-P", "-c", MAIN, "run", str(graph)],
        stdout=side,
        env={**os.environ, "TERM": "xterm", "COLUMNS": "80"},
    )
    os.close(side)
    shown = b""
    with contextlib.suppress(OSError):  # EIO: the other side has gone
        while part := os.read(terminal, 65536):
            shown += part
    os.close(terminal)
    assert running.wait(PATIENCE) == 0
    assert b"\x1b[" in shown
    assert b"100.0 %" in shown
    bars = [line for line in re.split(rb"[\r\n]+", re.sub(rb"\x1b\[[^a-zA-Z]*[a-zA-Z]", b"", shown)) if b" %" in line]
    assert bars
    assert max(len(line.decode()) for line in bars) <= 80 - len("^C")

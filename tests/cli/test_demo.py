# SPDX-FileCopyrightText: blockgraph contributors
# SPDX-License-Identifier: MIT
"""`blockgraph demo`: the proof holds, a wrong backup is noticed, and nothing is left behind."""

from __future__ import annotations

import json
import random
import signal
import subprocess
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from helpers.command import command

from blockgraph.cli import main
from blockgraph.demo.disk import Disk
from blockgraph.demo.guest import Counters, first_requests
from blockgraph.demo.proof import CLUSTER, Difference, compare, copy_file
from blockgraph.demo.scenario import Outcome


@pytest.fixture(autouse=True)
def temporary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where the demo puts its files."""
    folder = tmp_path / "tmp"
    folder.mkdir()
    monkeypatch.setenv("TMPDIR", str(folder))
    monkeypatch.setattr("tempfile.tempdir", None)
    return folder


@pytest.mark.parametrize("backup_format", ["raw", "qcow2"])
def test_demo_proves_the_backup(
    capsys: pytest.CaptureFixture[str],
    require_tool: Callable[[str], str],
    temporary: Path,
    tmp_path: Path,
    backup_format: str,
) -> None:
    kept = tmp_path / "kept"
    assert main(["demo", "--json", "--size", "64M", "--format", backup_format, "--keep", str(kept)]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["ok"]
    assert found["backup-equals-start"]
    assert found["backup"]["saved-clusters"] > 0
    assert found["guest"]["writes"] + found["guest"]["zeroes"] + found["guest"]["trims"] >= first_requests(64 << 20)
    assert found["live-clusters-changed"] > 0
    require_tool("e2fsck")
    assert found["e2fsck"] == 0
    # Checked by somebody else too.
    backup = kept / {"raw": "backup.img", "qcow2": "backup.qcow2"}[backup_format]
    for other, status in ((kept / "reference.img", 0), (kept / "disk.img", 1)):
        arguments = [require_tool("qemu-img"), "compare", "-f", backup_format, "-F", "raw", backup, other]
        assert subprocess.run(arguments, check=False, capture_output=True).returncode == status
    assert main(["check", str(kept / "graph.toml")]) == 0
    assert list(temporary.iterdir()) == []


def test_demo_in_a_pipe_reports_plainly_and_cleans_up(capsys: pytest.CaptureFixture[str], temporary: Path) -> None:
    assert main(["demo", "--size", "32M"]) == 0
    text = capsys.readouterr().out
    for part in ("backup-top", "export 'guest'", "saved before writes", "byte by byte"):
        assert part in text
    assert "\x1b" not in text
    assert list(temporary.iterdir()) == []


def test_demo_without_mke2fs_backs_up_a_pattern(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("blockgraph.demo.disk.find_tool", lambda name: None)
    assert main(["demo", "--size", "32M", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["disk"]["contents"] == "pattern"
    assert found["e2fsck"] is None


@pytest.mark.parametrize("number, status", [(signal.SIGINT, 130), (signal.SIGTERM, 143)], ids=["int", "term"])
def test_demo_interrupted_leaves_nothing(temporary: Path, number: signal.Signals, status: int) -> None:
    with command(temporary, "demo", "--size", "64M") as running:
        running.wait_line("Backing up")
        running.process.send_signal(number)
        assert running.end() == status, running.errors
        assert "Traceback" not in running.errors
    assert list(temporary.iterdir()) == []


@pytest.mark.parametrize(
    "arguments, expected",
    [(["--size", "1M"], "try --size 512M"), (["--size", "1E"], "free"), (["--keep", "."], "is not empty")],
    ids=["small", "huge", "keep"],
)
def test_demo_that_can_not_be_says_why(
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    arguments: list[str],
    expected: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["demo", *arguments]) == 1
    error = capsys.readouterr().err
    assert expected in error
    assert error.count("\n") == 1


SAME, OTHER = Difference(0, None, True), Difference(3, 4096, True)
GOOD = Outcome(
    disk=Disk(Path("disk.img"), 32 << 20, "ext4", 1),
    target_format="raw",
    graph_file=Path("graph.toml"),
    drawing="",
    bytes_for_guest=65536,
    bytes_background=65536,
    cluster_size=65536,
    guest=Counters(writes=1),
    guest_seconds=1.0,
    loose=Counters(),
    loose_seconds=1.0,
    loose_bytes=65536,
    backup=SAME,
    live=OTHER,
    fsck=0,
    fsck_output="",
)


@pytest.mark.parametrize(
    "bad, said",
    [
        (replace(GOOD, backup=OTHER), "offset 4096"),
        (replace(GOOD, backup=Difference(0, None, False)), "its size"),
        (replace(GOOD, bytes_for_guest=0), "nothing was proved"),
        (replace(GOOD, live=SAME), "did not change"),
        (replace(GOOD, fsck=4), "e2fsck"),
    ],
    ids=["content", "size", "no-overlap", "no-writes", "fsck"],
)
def test_outcome_that_breaks_a_promise_is_a_failure(bad: Outcome, said: str) -> None:
    assert GOOD.failures() == []
    (failure,) = bad.failures()
    assert said in failure


def test_compare_finds_every_changed_byte(tmp_path: Path) -> None:
    one, other = tmp_path / "one", tmp_path / "other"
    content = bytearray(random.Random(1).randbytes(5 * CLUSTER + 7))
    one.write_bytes(content)
    copy_file(one, other)
    assert compare(one, other) == Difference(0, None, True)
    for offset in (0, CLUSTER - 1, CLUSTER, 5 * CLUSTER + 6):
        changed = bytearray(content)
        changed[offset] ^= 1
        other.write_bytes(changed)
        assert compare(one, other) == Difference(1, offset, True)
    other.write_bytes(content[:-1])
    assert compare(one, other) == Difference(1, len(content) - 1, False)


def test_copy_keeps_holes(tmp_path: Path) -> None:
    one, other = tmp_path / "one", tmp_path / "other"
    with one.open("wb") as file:
        file.truncate(8 << 20)
        file.seek(4 << 20)
        file.write(b"x" * 4096)
    copy_file(one, other)
    assert compare(one, other).equal
    assert other.stat().st_blocks == one.stat().st_blocks

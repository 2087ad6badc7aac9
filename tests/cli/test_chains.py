# SPDX-FileCopyrightText: blockgraph contributors
# SPDX-License-Identifier: MIT
"""`run` with a chain in a graph file, `verify`, `restore`."""

from __future__ import annotations

import json
import os
import random
from pathlib import Path

import pytest

from blockgraph.chains import Chain
from blockgraph.cli import main

MIB = 1 << 20

GRAPH = """
[[nodes]]
node-name = "disk"
driver = "raw"
file = {driver = "file", filename = "disk.img"}

[[jobs]]
type = "backup"
job-id = "nightly"
device = "disk"
sync = "incremental"
chain = "backups"
"""


@pytest.fixture
def chain(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Path:
    """Two full backups: nothing keeps a raw disk's bitmap between two runs."""
    (tmp_path / "graph.toml").write_text(GRAPH)
    for seed in range(2):
        (tmp_path / "disk.img").write_bytes(random.Random(seed).randbytes(3 * MIB))
        assert main(["run", str(tmp_path / "graph.toml")]) == 0
    out = capsys.readouterr().out
    assert "makes a full backup: there is no backup of this disk in the chain" in out
    assert "makes a full backup: the disk has no bitmap of the changes since" in out
    return tmp_path / "backups"


def test_chain_of_graph_file_is_relative_to_it_and_checks(
    chain: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["check", str(tmp_path / "graph.toml")]) == 0
    assert len(Chain.load(str(chain)).points()) == 2


def test_verify_lists_and_tells_good_points(chain: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["verify", "--list", str(chain)]) == 0
    listed = capsys.readouterr().out
    assert main(["verify", str(chain)]) == 0
    verified = capsys.readouterr().out
    for point in Chain.load(str(chain)).points():
        assert point.manifest.short in listed
        assert point.manifest.short in verified
    assert "2 of 2 points in time are good" in verified
    assert main(["verify", "--json", "--at", "1", str(chain)]) == 0
    report = json.loads(capsys.readouterr().out)
    assert [point["good"] for point in report["points"]] == [True]
    assert (report["findings"], report["unfinished"]) == ([], [])


def test_verify_says_where_it_is_damaged(chain: Path, capsys: pytest.CaptureFixture[str]) -> None:
    image = Chain.load(str(chain)).points()[0].image
    with open(image, "r+b") as file:
        file.seek(-1000, os.SEEK_END)
        file.write(b"damage")
    assert main(["verify", str(chain)]) == 1
    told = capsys.readouterr().out
    assert f"{image}: has other bytes than were backed up" in told
    assert "bytes 2097152 to 3145728" in told
    assert "1 of 2 points in time are good" in told
    assert main(["verify", "--json", str(chain)]) == 1
    report = json.loads(capsys.readouterr().out)
    assert report["findings"][0]["ranges"] == [{"start": 2 * MIB, "length": MIB}]
    assert main(["verify", "--at", "2", str(chain)]) == 0


def test_restore_writes_the_point_and_refuses_damage(
    chain: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    target = tmp_path / "restored"
    assert main(["restore", "--at", "1", str(chain), str(target)]) == 0
    assert target.read_bytes() == random.Random(0).randbytes(3 * MIB)
    assert main(["restore", str(chain), str(target)]) == 1
    assert "--force" in capsys.readouterr().err
    assert main(["restore", "--force", str(chain), str(target)]) == 0
    assert target.read_bytes() == random.Random(1).randbytes(3 * MIB)
    image = Chain.load(str(chain)).points()[0].image
    with open(image, "r+b") as file:
        file.seek(-1000, os.SEEK_END)
        file.write(b"damage")
    assert main(["restore", "--at", "1", str(chain), str(tmp_path / "other")]) == 1
    assert "is damaged: bytes 2097152 to 3145728" in capsys.readouterr().err
    assert main(["restore", "--ignore", "--at", "1", str(chain), str(tmp_path / "other")]) == 1
    assert (tmp_path / "other").read_bytes()[: 2 * MIB] == random.Random(0).randbytes(3 * MIB)[: 2 * MIB]


def test_what_is_no_chain_is_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["verify", str(tmp_path / "nowhere")]) == 1
    assert "a chain is a directory" in capsys.readouterr().err
    assert main(["restore", str(tmp_path), str(tmp_path / "out")]) == 1
    assert "no complete backups" in capsys.readouterr().err

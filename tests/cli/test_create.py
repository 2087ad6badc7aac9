# SPDX-FileCopyrightText: blockgraph contributors
# SPDX-License-Identifier: MIT
"""`blockgraph create`."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from blockgraph.cli import main
from blockgraph.text import MAX_SIZE, format_seconds, format_size, parse_size


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def failure(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    """The one line that the failing command says."""
    capsys.readouterr()
    assert main(["create", *arguments]) == 1
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    return error


def info(capsys: pytest.CaptureFixture[str], image: str) -> dict[str, Any]:
    capsys.readouterr()
    assert main(["info", "--json", image]) == 0
    found: dict[str, Any] = json.loads(capsys.readouterr().out)
    return found


@pytest.mark.parametrize(
    "text, size", [("0", 0), ("4096", 4096), ("1k", 1024), ("2M", 2 << 20), ("1.5G", 3 << 29), ("7E", 7 << 60)]
)
def test_size_with_unit_is_bytes(text: str, size: int) -> None:
    assert parse_size(text) == size


@pytest.mark.parametrize("text", ["", "k", "-1", "1X", "8E", "1e3", "0x10", "9" * 30])
def test_size_that_is_none_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match=r"not a size|more than"):
        parse_size(text)


def test_sizes_and_times_read_well() -> None:
    assert [format_size(size) for size in (0, 999, 1000, 1536, 3 << 30)] == [
        "0 B",
        "999 B",
        "0.977 KiB",
        "1.5 KiB",
        "3 GiB",
    ]
    assert [format_seconds(s) for s in (0.5, 12, 187, 3765)] == ["0.50 s", "12.0 s", "3:07", "1:02:45"]
    assert parse_size(str(MAX_SIZE)) == MAX_SIZE


def test_create_raw_is_sparse_and_of_that_size(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["create", "a.raw", "1G"]) == 0
    assert info(capsys, "a.raw")["virtual-size"] == 1 << 30
    assert Path("a.raw").stat().st_blocks == 0


@pytest.mark.parametrize(
    "options", ["cluster_size=4k,compat=0.10", "cluster-size=2M,lazy_refcounts=on,compression-type=zstd"]
)
def test_create_qcow2_with_options_satisfies_qemu_img(
    require_tool: Callable[[str], str], capsys: pytest.CaptureFixture[str], options: str
) -> None:
    assert main(["create", "-f", "qcow2", "-o", options, "a.qcow2", "100M"]) == 0
    subprocess.run([require_tool("qemu-img"), "check", "-q", "a.qcow2"], check=True)
    found = info(capsys, "a.qcow2")
    assert found["cluster-size"] == parse_size(options.split(",")[0].split("=")[1])


def test_create_over_backing_file_takes_its_size(capsys: pytest.CaptureFixture[str]) -> None:
    Path("images").mkdir()
    main(["create", "-f", "qcow2", "images/base", "3M"])
    assert main(["create", "-f", "qcow2", "-b", "base", "-F", "qcow2", "images/top"]) == 0
    found = info(capsys, "images/top")
    assert (found["virtual-size"], found["backing-filename"], found["backing-filename-format"]) == (
        3 << 20,
        "base",
        "qcow2",
    )


def test_create_over_existing_file_needs_force(capsys: pytest.CaptureFixture[str]) -> None:
    Path("a.raw").write_bytes(b"precious")
    assert "a.raw" in failure(capsys, "a.raw", "1M")
    assert Path("a.raw").read_bytes() == b"precious"
    assert main(["create", "--force", "-f", "qcow2", "a.raw", "1M"]) == 0
    assert info(capsys, "a.raw")["format"] == "qcow2"


@pytest.mark.parametrize(
    "arguments, expected",
    [
        (["a"], "SIZE is missing"),
        (["-f", "qcow2", "-o", "clustersize=4k", "a", "1M"], "did you mean 'cluster-size'?"),
        (["-f", "qcow2", "-o", "cluster_size=5000", "a", "1M"], "power of two"),
        (["-f", "qcow2", "-o", "cluster_size", "a", "1M"], "has no value"),
        (["-f", "qcow2", "-o", "compat=2", "a", "1M"], "none of 0.10, 1.1"),
        (["-o", "compat=1.1", "a", "1M"], "raw images have no options"),
        (["-b", "x", "-F", "raw", "a", "1M"], "use -f qcow2"),
        (["-f", "qcow2", "-b", "x", "a", "1M"], "give it by -F"),
        (["-f", "qcow2", "-b", "missing", "-F", "raw", "a"], "No such file"),
        (["-f", "qcow2", "-F", "raw", "a", "1M"], "-F needs a backing file"),
        (["no/such/folder/a", "1M"], "no/such/folder/a"),
    ],
)
def test_create_of_what_can_not_be_says_why_and_leaves_nothing(
    capsys: pytest.CaptureFixture[str], arguments: list[str], expected: str
) -> None:
    assert expected in failure(capsys, *arguments)
    assert list(Path().iterdir()) == []

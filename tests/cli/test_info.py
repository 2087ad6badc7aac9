# SPDX-FileCopyrightText: blockgraph contributors
# SPDX-License-Identifier: MIT
"""`blockgraph info` beside `qemu-img info`."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from helpers.qcow2_bitmaps import entries_at, extension_at

from blockgraph.cli import main
from blockgraph.formats.qcow2.header import Incompatible

#: What blockgraph tells beyond qemu-img.
OWN = {"snapshot-count", "bitmaps-damaged", "unsupported"}
#: What QEMU tells in its own way: all snapshots, all bitmaps.
THEIRS = {"snapshots"}


def ours(capsys: pytest.CaptureFixture[str], *arguments: object) -> Any:
    capsys.readouterr()
    assert main(["info", "--json", *map(str, arguments)]) == 0
    return json.loads(capsys.readouterr().out)


def theirs(qemu_img: str, *arguments: object) -> Any:
    command = [qemu_img, "info", "--output=json", *map(str, arguments)]
    return json.loads(subprocess.run(command, capture_output=True, check=True).stdout)


def make(qemu_img: str, *arguments: object) -> None:
    subprocess.run([qemu_img, "create", "-q", *map(str, arguments)], check=True)


@pytest.mark.parametrize(
    "options",
    [
        "compat=1.1",
        "compat=0.10",
        "cluster_size=512",
        "cluster_size=2M,lazy_refcounts=on",
        "compression_type=zstd",
        "preallocation=metadata",
    ],
)
def test_info_of_qcow2_is_that_of_qemu_img(
    require_tool: Callable[[str], str], capsys: pytest.CaptureFixture[str], tmp_path: Path, options: str
) -> None:
    qemu_img, image = require_tool("qemu-img"), tmp_path / "a.qcow2"
    make(qemu_img, "-f", "qcow2", "-o", options, image, "24M")
    found = ours(capsys, image)
    assert {key: value for key, value in found.items() if key not in OWN} == theirs(qemu_img, image)


def test_info_of_raw_is_that_of_qemu_img(
    require_tool: Callable[[str], str], capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    image = tmp_path / "a.raw"
    with image.open("wb") as file:
        file.truncate(5 << 20)
        file.write(b"x" * 8192)
    assert ours(capsys, image) == theirs(require_tool("qemu-img"), "-f", "raw", image)


def test_info_of_chain_tells_every_image(
    require_tool: Callable[[str], str],
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    qemu_img = require_tool("qemu-img")
    monkeypatch.chdir(tmp_path)
    Path("images").mkdir()
    make(qemu_img, "-f", "raw", "images/base", "1M")
    make(qemu_img, "-f", "qcow2", "-b", "base", "-F", "raw", "images/middle", "2M")
    make(qemu_img, "-f", "qcow2", "-b", "images/middle", "-F", "qcow2", "top", "3M")
    chain = [{k: v for k, v in info.items() if k not in OWN} for info in ours(capsys, "--backing-chain", "top")]
    assert chain == theirs(qemu_img, "--backing-chain", "top")
    assert main(["info", "top"]) == 0
    text = capsys.readouterr().out
    assert "backing file:     images/middle\n" in text
    assert "\x1b" not in text


def test_info_counts_snapshots(
    require_tool: Callable[[str], str], capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    qemu_img, image = require_tool("qemu-img"), tmp_path / "a.qcow2"
    make(qemu_img, "-f", "qcow2", image, "1M")
    for name in ("one", "two"):
        subprocess.run([qemu_img, "snapshot", "-c", name, image], check=True)
    found = ours(capsys, image)
    assert found["snapshot-count"] == 2
    expected = theirs(qemu_img, image)
    assert {k: v for k, v in found.items() if k not in OWN} == {k: v for k, v in expected.items() if k not in THEIRS}


def test_info_lists_bitmaps_as_qemu_img_does(
    require_tool: Callable[[str], str], capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    qemu_img, image = require_tool("qemu-img"), tmp_path / "a.qcow2"
    make(qemu_img, "-f", "qcow2", image, "1M")
    for options in (["--add", "-g", "4096"], ["--add", "--disable"], ["--add", "-g", "1M"]):
        subprocess.run([qemu_img, "bitmap", *options, image, f"b{len(options)}{options[-1]}"], check=True)
    data = bytearray(image.read_bytes())
    data[entries_at(data)[2] + 15] |= 1
    image.write_bytes(data)
    found = ours(capsys, image)
    assert {key: value for key, value in found.items() if key not in OWN} == theirs(qemu_img, image)
    assert main(["info", str(image)]) == 0
    text = capsys.readouterr().out
    assert "'b34096', granularity 4 KiB, recording" in text
    assert "'b2--disable', granularity 64 KiB, disabled" in text
    assert "'b31M', granularity 1 MiB, in use, or not saved" in text
    data[extension_at(data) + 3] = 4
    image.write_bytes(data)
    assert "the header names 4" in ours(capsys, image)["bitmaps-damaged"]
    assert main(["info", str(image)]) == 0
    assert "bitmaps:          damaged: the directory has 3 bitmaps" in capsys.readouterr().out


def test_info_of_circular_chain_ends_with_an_error(
    require_tool: Callable[[str], str],
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    qemu_img = require_tool("qemu-img")
    monkeypatch.chdir(tmp_path)
    make(qemu_img, "-f", "qcow2", "b", "1M")
    make(qemu_img, "-f", "qcow2", "-b", "b", "-F", "qcow2", "a", "1M")
    subprocess.run([qemu_img, "rebase", "-u", "-b", "a", "-F", "qcow2", "b"], check=True)
    assert main(["info", "--backing-chain", "a"]) == 1
    assert "part of its own backing chain" in capsys.readouterr().err
    assert main(["map", "a"]) == 1
    assert "part of its own chain" in capsys.readouterr().err


@pytest.mark.parametrize(
    "options, feature",
    [
        ("extended_l2=on,cluster_size=128k", "extended L2 entries"),
        ("data_file=data", "external data file"),
        ("data_file=data,data_file_raw=on", "external data file"),
        ("refcount_bits=1", "refcounts of 1 bits"),
    ],
    ids=["extended-l2", "data-file", "raw-data-file", "refcount-bits"],
)
def test_info_of_a_feature_not_supported_shows_the_header_and_names_it(
    require_tool: Callable[[str], str],
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    options: str,
    feature: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    qemu_img = require_tool("qemu-img")
    make(qemu_img, "-f", "qcow2", "-o", options, "a.qcow2", "24M")
    found = ours(capsys, "a.qcow2")
    assert found["unsupported"] == [feature]
    assert {key: value for key, value in found.items() if key not in OWN} == theirs(qemu_img, "a.qcow2")
    assert main(["info", "a.qcow2"]) == 0
    assert f"not supported:    {feature}; it can not be opened here" in capsys.readouterr().out
    assert main(["map", "a.qcow2"]) == 1
    assert f"the image uses {feature}, which is not supported" in capsys.readouterr().err


def test_info_of_unknown_features_compression_and_encryption_names_them(
    require_tool: Callable[[str], str], capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    image = tmp_path / "a.qcow2"
    make(require_tool("qemu-img"), "-f", "qcow2", image, "1M")
    with image.open("r+b") as file:
        file.seek(32)
        file.write(bytes([0, 0, 0, 2]))
        file.seek(72)
        file.write((1 << 40 | Incompatible.COMPRESSION_TYPE).to_bytes(8, "big"))
        file.seek(104)
        file.write(b"\x07")
    found = ours(capsys, image)
    assert found["unsupported"] == ["unknown incompatible feature bit 40", "compression type 7", "LUKS encryption"]
    assert found["encrypted"] is True
    assert found["format-specific"]["data"]["compression-type"] == "7"

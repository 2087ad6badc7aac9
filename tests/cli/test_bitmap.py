# SPDX-FileCopyrightText: blockgraph contributors
# SPDX-License-Identifier: MIT
"""`blockgraph bitmap`, beside `qemu-img bitmap` where that can say something."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import blockgraph

MIB = 1 << 20
GRANULE = 64 << 10

Run = Callable[..., str]


def listed(ours: Run, image: str, *more: str) -> dict[str, dict[str, Any]]:
    """The bitmaps of an image by name."""
    found = json.loads(ours("bitmap", image, "--list", "--json", *more))
    return {bitmap.pop("name"): bitmap for bitmap in found}


def write(image: str, *offsets: int, driver: str = "qcow2") -> None:
    """One byte at each of them."""
    node = {"node-name": "disk", "driver": driver, "file": {"driver": "file", "filename": image}}
    with blockgraph.open({"nodes": [node]}) as graph, graph.backend("disk", writable=True) as disk:
        for offset in offsets:
            disk.pwrite(offset, b"x")


def state(count: int, granularity: int = GRANULE, *, recording: bool = True) -> dict[str, Any]:
    return {
        "count": count,
        "granularity": granularity,
        "recording": recording,
        "busy": False,
        "persistent": True,
    }


def test_every_change_of_a_qcow2_image(ours: Run) -> None:
    ours("create", "-f", "qcow2", "d", "4M")
    ours("bitmap", "d", "--add", "b0")
    ours("bitmap", "--add", "-g", "4k", "d", "fine")
    write("d", 0, 5 * GRANULE)
    assert listed(ours, "d") == {"b0": state(2 * GRANULE), "fine": state(8192, 4096)}
    ours("bitmap", "d", "fine", "--disable")
    write("d", 9 * GRANULE)
    assert listed(ours, "d") == {"b0": state(3 * GRANULE), "fine": state(8192, 4096, recording=False)}
    ours("bitmap", "d", "b0", "--clear")
    ours("bitmap", "d", "fine", "--enable")
    ours("bitmap", "d", "--add", "--disable", "--merge", "b0", "--merge", "fine", "sum")
    assert listed(ours, "d")["sum"] == state(2 * GRANULE, recording=False)
    ours("bitmap", "d", "--remove", "b0")
    assert list(listed(ours, "d")) == ["fine", "sum"]
    assert ours("bitmap", "d", "--list").splitlines()[1:] == [
        "fine    8192         4096  recording",
        "sum   131072        65536  disabled",
    ]


def test_changes_are_made_together_or_not_at_all(ours: Run) -> None:
    ours("create", "-f", "qcow2", "d", "4M")
    ours("bitmap", "d", "--add", "b0")
    write("d", 0)
    before = listed(ours, "d")
    error = ours("bitmap", "d", "--clear", "--disable", "--merge", "nothing", "b0", status=1)
    assert "there is no bitmap 'nothing' (there are: 'b0')" in error
    assert listed(ours, "d") == before
    ours("bitmap", "d", "--remove", "--add", "-g", "512", "b0")
    assert listed(ours, "d") == {"b0": state(0, 512)}


def test_bitmaps_of_another_file_are_merged(ours: Run) -> None:
    for image in ("d", "other"):
        ours("create", "-f", "qcow2", image, "4M")
        ours("bitmap", image, "--add", "b0")
    write("other", GRANULE)
    ours("bitmap", "d", "--merge", "b0", "-b", "other", "-F", "qcow2", "b0")
    assert listed(ours, "d") == {"b0": state(GRANULE)}
    ours("create", "-f", "qcow2", "small", "1M")
    ours("bitmap", "small", "--add", "b0")
    error = ours("bitmap", "d", "--merge", "b0", "-b", "small", "b0", status=1)
    assert "bitmap 'b0' covers 1048576 bytes, bitmap 'b0' 4194304; only bitmaps of disks of the same size" in error


def test_qemu_img_sees_what_ours_made_and_the_reverse(ours: Run, qemu: Run) -> None:
    ours("create", "-f", "qcow2", "d", "4M")
    ours("bitmap", "d", "--add", "b0")
    write("d", GRANULE)
    qemu("qemu-img", "bitmap", "d", "--add", "--merge", "b0", "-f", "qcow2", "theirs")
    qemu("qemu-img", "bitmap", "d", "--disable", "-f", "qcow2", "b0")
    assert listed(ours, "d") == {"b0": state(GRANULE, recording=False), "theirs": state(GRANULE)}
    ours("bitmap", "d", "--remove", "theirs")
    data = json.loads(qemu("qemu-img", "info", "--output=json", "d"))["format-specific"]["data"]
    assert data["bitmaps"] == [{"name": "b0", "granularity": GRANULE, "flags": []}]
    qemu("qemu-img", "check", "d")


def test_bitmaps_of_a_raw_image_are_in_a_sidecar(ours: Run, tmp_path: Path) -> None:
    ours("create", "d", "4M")
    content = (tmp_path / "d").read_bytes()
    error = ours("bitmap", "d", "--add", "b0", status=1)
    assert "driver 'raw' has no place for persistent bitmaps" in error
    assert "sidecar" in error
    assert not list(tmp_path.glob("*.bitmaps"))
    ours("bitmap", "d", "--sidecar", "d.bitmaps", "--add", "b0")
    write("d", GRANULE, driver="raw")
    assert listed(ours, "d") == {"b0": state(GRANULE)}  # the one beside the image is found
    ours("bitmap", "d", "--clear", "b0")
    assert listed(ours, "d") == {"b0": state(0)}
    ours("bitmap", "d", "--remove", "b0")
    assert listed(ours, "d") == {}
    assert len((tmp_path / "d").read_bytes()) == len(content)


@pytest.mark.parametrize(
    "arguments, message",
    [
        (("--add", "b0"), "there already is a bitmap 'b0'"),
        (("--add", "-g", "1000", "b1"), "granularity 1000 is not a power of two from 512 to 2147483648"),
        (("--add", "-g", "256", "b1"), "granularity 256 is not a power of two"),
        (("--add", "-g", "4G", "b1"), "granularity 4294967296 is not a power of two"),
        (("--add", "n" * 1024), "bitmap name of 1024 bytes; a name has 1 to 1023 bytes"),
        (("--add", ""), "bitmap name of 0 bytes"),
        (("--clear", "b1"), "there is no bitmap 'b1' (there are: 'b0')"),
        (("--merge", "b1", "b0"), "there is no bitmap 'b1'"),
        (("--merge", "b0", "-b", "none", "b0"), "No such file or directory"),
        (("-f", "raw", "--add", "b1"), "has no place for persistent bitmaps"),
    ],
    ids=[
        *("taken", "no-power", "small", "large", "long-name", "no-name", "missing", "missing-source", "no-file"),
        "no-place",
    ],
)
def test_what_can_not_be_is_told_and_changes_nothing(
    ours: Run, tmp_path: Path, arguments: tuple[str, ...], message: str
) -> None:
    ours("create", "-f", "qcow2", "d", "4M")
    ours("bitmap", "d", "--add", "b0")
    write("d", 0)
    before = listed(ours, "d")
    error = ours("bitmap", "d", *arguments, status=1)
    assert message in error
    assert error.startswith("blockgraph: node '")
    assert error.count("\n") == 1
    assert listed(ours, "d") == before


@pytest.mark.parametrize(
    "arguments",
    [
        ("d",),
        ("d", "b0"),
        ("d", "--add"),
        ("d", "--list", "--add"),
        ("d", "b0", "--clear", "-g", "64k"),
        ("d", "b0", "--add", "-b", "x"),
        ("d", "b0", "--merge", "b1", "-F", "raw"),
        ("d", "b0", "--add", "--json"),
        ("d", "b0", "--add", "-g", "many"),
        ("d", "b0", "--merge"),
        ("d", "b0", "b1", "--add"),
    ],
    ids=" ".join,
)
def test_wrong_command_lines_are_status_2(ours: Run, arguments: tuple[str, ...]) -> None:
    assert "usage: blockgraph " in ours("bitmap", *arguments, status=2)


def test_image_in_use_is_left_alone(ours: Run) -> None:
    ours("create", "-f", "qcow2", "d", "4M")
    node = {"node-name": "disk", "driver": "qcow2", "file": {"driver": "file", "filename": "d"}}
    with blockgraph.open({"nodes": [node]}) as graph, graph.backend("disk", writable=True):
        error = ours("bitmap", "d", "--add", "b0", status=1)
        assert "lock" in error
    assert listed(ours, "d") == {}


def test_bitmap_that_was_not_closed_can_only_be_removed(ours: Run, qemu: Run, tmp_path: Path) -> None:
    ours("create", "-f", "qcow2", "d", "4M")
    ours("bitmap", "d", "--add", "b0")
    node = {"node-name": "disk", "driver": "qcow2", "file": {"driver": "file", "filename": "d"}}
    with blockgraph.open({"nodes": [node]}) as graph, graph.backend("disk", writable=True) as disk:
        disk.pwrite(0, b"x")
        disk.flush()
        (tmp_path / "crashed").write_bytes((tmp_path / "d").read_bytes())
    told = listed(ours, "crashed")["b0"]
    assert (told["inconsistent"], told["recording"]) == (True, False)
    assert told["reason"]
    for change in (("--clear",), ("--enable",), ("--merge", "b0")):
        error = ours("bitmap", "crashed", *change, "b0", status=1)
        assert "bitmap 'b0' is inconsistent" in error
        assert "remove it, and make a full backup next" in error
    ours("bitmap", "crashed", "--remove", "--add", "b0")
    assert listed(ours, "crashed") == {"b0": state(0)}
    qemu("qemu-img", "check", "crashed")


def test_map_shows_what_is_dirty(ours: Run) -> None:
    ours("create", "-f", "qcow2", "d", "4M")
    ours("bitmap", "d", "--add", "b0")
    write("d", 0, 5 * GRANULE, 6 * GRANULE)
    rows = [(0, GRANULE), (5 * GRANULE, 2 * GRANULE)]
    expected = [{"start": start, "length": length, "dirty": True} for start, length in rows]
    assert json.loads(ours("map", "d", "--bitmap", "b0", "--json")) == expected
    assert ours("map", "d", "--bitmap", "b0").splitlines() == [
        "Offset          Length",
        "0               0x10000",
        "0x50000         0x20000",
    ]
    part = ("--start-offset", str(GRANULE), "--max-length", str(5 * GRANULE))
    assert json.loads(ours("map", "d", "--bitmap", "b0", "--json", *part)) == [
        {"start": 5 * GRANULE, "length": GRANULE, "dirty": True}
    ]
    assert json.loads(ours("map", "d", "--bitmap", "b0", "--json", "--start-offset", "5M")) == []
    assert "there is no bitmap 'b1' (there are: 'b0')" in ours("map", "d", "--bitmap", "b1", status=1)

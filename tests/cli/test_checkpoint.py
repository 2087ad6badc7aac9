# SPDX-FileCopyrightText: blockgraph contributors
# SPDX-License-Identifier: MIT
"""`blockgraph checkpoint`: made, listed, exported and deleted offline; what qemu-io writes in between has changed."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from helpers.qcow2_bitmaps import qemu_dirty

import blockgraph

MIB = 1 << 20
GRANULE = 64 << 10

Run = Callable[..., str]


def changed(ours: Run, image: str, since: str) -> set[int]:
    """Granules that `--export` tells."""
    (found,) = json.loads(ours("checkpoint", image, "--export", since, "--json"))["images"]
    assert found["image"] == image
    return {
        number
        for extent in found["extents"]
        for number in range(extent["start"] // GRANULE, -(-(extent["start"] + extent["length"]) // GRANULE))
    }


def listed(ours: Run, *images: str) -> list[tuple[str, str, int | None]]:
    rows = json.loads(ours("checkpoint", *images, "--list", "--json"))
    return [(row["name"], row["image"], row["changed"]) for row in rows]


def stored(qemu: Run, image: str) -> dict[str, list[str]]:
    """Flags of the bitmaps by name, as qemu-img tells them."""
    info = json.loads(qemu("qemu-img", "info", "--output=json", image))
    return {bitmap["name"]: bitmap["flags"] for bitmap in info["format-specific"]["data"].get("bitmaps", [])}


def test_changes_between_checkpoints_are_those_that_qemu_made(ours: Run, qemu: Run) -> None:
    """Several checkpoints with random writes of qemu-io in between, deletes among them; judged by a set of granules."""
    rng = random.Random(4)
    qemu("qemu-img", "create", "-q", "-f", "qcow2", "d", 16 * MIB)
    made: dict[str, set[int]] = {}
    for number in range(6):
        ours("checkpoint", "d", "--create", f"c{number}")
        made[f"c{number}"] = set()
        assert stored(qemu, "d")[f"checkpoint:{number + 1}:c{number}"] == ["auto"]
        commands = []
        for _ in range(rng.randint(0, 6)):
            granule = rng.randrange(16 * MIB // GRANULE)
            commands += ["-c", rng.choice(["write -P 3", "write -z", "discard"]) + f" {granule * GRANULE} {GRANULE}"]
            for since in made.values():
                since.add(granule)
        if commands:
            qemu("qemu-io", "-f", "qcow2", "-d", "unmap", *commands, "d")
        if number in (2, 4):
            gone = rng.choice(sorted(made))
            ours("checkpoint", "d", "--delete", gone)
            del made[gone]
        for name, granules in made.items():
            assert changed(ours, "d", name) == granules
    assert listed(ours, "d") == [(name, "d", len(made[name]) * GRANULE) for name in sorted(made)]
    qemu("qemu-img", "check", "d")
    names = list(stored(qemu, "d").values())
    assert names.count(["auto"]) == 1, "one records"


def test_export_as_a_bitmap_is_served_by_qemu_nbd(
    ours: Run, qemu: Run, require_tool: Callable[[str], str], tmp_path: Path
) -> None:
    qemu("qemu-img", "create", "-q", "-f", "qcow2", "d", 16 * MIB)
    ours("checkpoint", "d", "--create", "a")
    qemu("qemu-io", "-f", "qcow2", "-c", "write 1M 64k", "d")
    ours("checkpoint", "d", "--create", "b")
    qemu("qemu-io", "-f", "qcow2", "-c", "write 3M 128k", "d")
    ours("checkpoint", "d", "--export", "a", "--as", "since-a")
    ours("checkpoint", "d", "--export", "b", "--as", "since-b")
    assert stored(qemu, "d") == {
        "checkpoint:1:a": [],
        "checkpoint:2:b": ["auto"],
        "since-a": [],
        "since-b": [],
    }
    for tool in ("qemu-nbd", "nbdinfo"):
        require_tool(tool)
    assert qemu_dirty(tmp_path / "d", "since-a") == [(MIB, 65536), (3 * MIB, 131072)]
    assert qemu_dirty(tmp_path / "d", "since-b") == [(3 * MIB, 131072)]
    error = ours("checkpoint", "d", "--export", "a", "--as", "since-a", status=1)
    assert "there already is a bitmap 'since-a'" in error


@pytest.mark.parametrize("epochs", [False, True], ids=["bitmaps", "epochs"])
def test_raw_images_keep_theirs_in_sidecars(ours: Run, tmp_path: Path, epochs: bool) -> None:
    for name in ("a", "b"):
        ours("create", name, "16M")
    more = ["--epochs"] if epochs else []
    error = ours("checkpoint", "a", "b", "--create", "monday", *more, status=1)
    assert "'a' has no place for checkpoints; give --sidecar to keep them in 'a.bitmaps'" in error
    assert not list(tmp_path.glob("*.bitmaps"))
    ours("checkpoint", "a", "b", "--create", "monday", "--sidecar", *more)
    write("a", MIB)
    ours("checkpoint", "a", "--create", "tuesday", *more, "--sidecar")
    write("a", 2 * MIB)
    write("b", 3 * MIB)
    assert listed(ours, "a", "b") == [
        ("monday", "a", 2 * GRANULE),
        ("monday", "b", GRANULE),
        ("tuesday", "a", GRANULE),
    ]
    assert changed(ours, "a", "monday") == {16, 32}
    ours("checkpoint", "a", "b", "--delete", "monday")
    assert listed(ours, "a", "b") == [("tuesday", "a", GRANULE)]
    assert ours("checkpoint", "a", "--export", "tuesday").split() == ["OFFSET", "LENGTH", str(2 * MIB), str(GRANULE)]


def write(name: str, offset: int) -> None:
    node: dict[str, Any] = {"driver": "raw", "node-name": "d", "file": {"driver": "file", "filename": name}}
    with blockgraph.open({"nodes": [node]}) as graph, graph.backend("d", writable=True) as disk:
        disk.pwrite(offset, b"x")


def test_images_have_it_all_or_none(ours: Run) -> None:
    for name in ("a", "b"):
        ours("create", "-f", "qcow2", name, "16M")
    ours("checkpoint", "b", "--create", "monday")
    error = ours("checkpoint", "a", "b", "--create", "monday", status=1)
    assert "there already is a checkpoint 'monday'; delete it first" in error
    assert listed(ours, "a") == []
    ours("checkpoint", "a", "b", "--create", "tuesday", "--list")
    error = ours("checkpoint", "a", "b", "--export", "monday", status=1)
    assert "'a'" in error
    assert "what changed since checkpoint 'monday' is not known: the disk was not in checkpoint 'monday'" in error
    ours("checkpoint", "a", "b", "--export", "monday", "--as", "x", status=1)
    assert "x" not in ours("bitmap", "b", "--list")


def test_checkpoint_that_can_not_tell_says_why(ours: Run, qemu: Run) -> None:
    qemu("qemu-img", "create", "-q", "-f", "qcow2", "d", 16 * MIB)
    ours("checkpoint", "d", "--create", "a")
    qemu("qemu-img", "bitmap", "--disable", "d", "checkpoint:1:a")
    (row,) = json.loads(ours("checkpoint", "d", "--list", "--json"))
    assert row["changed"] is None
    assert "was disabled, and may have missed writes" in row["problem"]
    assert "unknown: bitmap 'checkpoint:1:a' was disabled" in ours("checkpoint", "d", "--list")
    assert "make a full backup" in ours("checkpoint", "d", "--export", "a", status=1)
    assert "enable it if nothing was written meanwhile" in ours("checkpoint", "d", "--create", "b", status=1)


@pytest.mark.parametrize(
    "arguments, status, text",
    [
        (("d",), 2, "give one of --create NAME, --delete NAME, --export NAME, --list"),
        (("--list",), 2, "required: IMAGE"),
        (("d", "--create", "a", "--delete", "b"), 2, "not allowed with"),
        (("d", "--list", "--sidecar"), 2, "--sidecar is of use with --create only"),
        (("d", "--delete", "a", "-g", "64k"), 2, "-g is of use with --create only"),
        (("d", "--list", "--as", "x"), 2, "--as is of use with --export only"),
        (("d", "--create", "a", "--json"), 2, "--json is of use with --list, and --export without --as"),
        (("d", "./d", "--list"), 2, "'./d' is given twice"),
        (("missing", "--list"), 1, "missing"),
        (("d", "--delete", "a"), 1, "there is no checkpoint 'a' (there are: none)"),
        (("d", "--export", "a"), 1, "there is no checkpoint 'a'"),
        (("d", "--create", "a", "-g", "100"), 1, "granularity 100 is not a power of two"),
        (("d", "--create", "a" * 1100), 1, "bitmap name of"),
        (("d", "--create", "a", "--epochs"), 1, "has no place for the epochs of a bitmap"),
        (("d", "--create", ""), 1, "a checkpoint needs a name"),
    ],
)
def test_wrong_use_is_told(ours: Run, arguments: tuple[str, ...], status: int, text: str) -> None:
    ours("create", "-f", "qcow2", "d", "16M")
    assert text in ours("checkpoint", *arguments, status=status)
    assert listed(ours, "d") == []

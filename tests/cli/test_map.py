# SPDX-FileCopyrightText: blockgraph contributors
# SPDX-License-Identifier: MIT
"""`blockgraph map` beside `qemu-img map`: the same text for the same image."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from blockgraph.cli import main

KIB = 1024
MIB = 1024 * KIB

Qemu = Callable[..., str]


@pytest.fixture(autouse=True)
def _in_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def ours(capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    capsys.readouterr()
    assert main(["map", *map(str, arguments)]) == 0
    return capsys.readouterr().out


def write_at_random(qemu: Qemu, image: str, size: int, rng: random.Random, *, compressed: bool, cluster: int) -> None:
    """Writes, zeroes and discards all over a new image."""
    commands: list[str] = []
    if compressed:  # only clusters that were never written take compressed data
        for number in rng.sample(range(size // cluster), 4):
            commands += ["-c", f"write -c -P 9 {number * cluster} {cluster}"]
    for _ in range(25):
        length = rng.randrange(512, size // 16, 512)
        offset = rng.randrange(0, size - length, 512)
        kind = rng.choice(["write -P 7", "write -P 7", "write -z", "write -z -u", "discard"])
        commands += ["-c", f"{kind} {offset} {length}"]
    qemu("qemu-io", "-d", "unmap", "-f", "qcow2", *commands, image)


@pytest.mark.parametrize("compat", ["0.10", "1.1"])
@pytest.mark.parametrize("cluster", [512, 4 * KIB, 64 * KIB, 2 * MIB], ids=["512", "4k", "64k", "2M"])
def test_map_of_qcow2_is_that_of_qemu_img(
    qemu: Qemu, capsys: pytest.CaptureFixture[str], cluster: int, compat: str
) -> None:
    size = 3 * MIB + 512 * 7 if cluster < MIB else 40 * MIB
    qemu("qemu-img", "create", "-f", "qcow2", "-o", f"cluster_size={cluster},compat={compat}", "a.qcow2", size)
    rng = random.Random(cluster)
    write_at_random(qemu, "a.qcow2", size, rng, compressed=True, cluster=cluster)
    assert ours(capsys, "--json", "a.qcow2") == qemu("qemu-img", "map", "--output=json", "a.qcow2")


@pytest.mark.parametrize("sizes", [(4, 2), (2, 4), (3, 1, 5), (5, 5, 5)], ids=lambda sizes: "-".join(map(str, sizes)))
@pytest.mark.parametrize("base_format", ["raw", "qcow2"])
def test_map_of_chain_is_that_of_qemu_img(
    qemu: Qemu, capsys: pytest.CaptureFixture[str], sizes: tuple[int, ...], base_format: str
) -> None:
    rng = random.Random(sizes[0])
    below: str | None = None
    for layer, megabytes in enumerate(sizes):
        image, size = f"layer{layer}", megabytes * MIB
        image_format = base_format if below is None else "qcow2"
        backing = ["-b", below, "-F", base_format if layer == 1 else "qcow2"] if below else []
        qemu("qemu-img", "create", "-f", image_format, *backing, image, size)
        if image_format == "raw":
            qemu("qemu-io", "-f", "raw", "-c", "write 64k 128k", "-c", "write 1M 4k", image)
        else:
            write_at_random(qemu, image, size, rng, compressed=False, cluster=64 * KIB)
        below = image
    theirs = qemu("qemu-img", "map", "--output=json", str(below))
    assert ours(capsys, "--json", below) == theirs
    start, length = 300 * KIB, 700 * KIB
    theirs = qemu("qemu-img", "map", "--output=json", f"--start-offset={start}", f"--max-length={length}", str(below))
    assert ours(capsys, "--json", "--start-offset", start, "--max-length", "700k", below) == theirs


def test_map_of_raw_is_that_of_qemu_img(qemu: Qemu, capsys: pytest.CaptureFixture[str]) -> None:
    with Path("a.raw").open("wb") as file:
        file.truncate(8 * MIB)
        for offset in (0, 2 * MIB, 8 * MIB - 4 * KIB):
            file.seek(offset)
            file.write(b"x" * 4 * KIB)
    assert ours(capsys, "--json", "a.raw") == qemu("qemu-img", "map", "-f", "raw", "--output=json", "a.raw")
    assert ours(capsys, "a.raw") == qemu("qemu-img", "map", "-f", "raw", "a.raw")


@pytest.mark.parametrize("size", [0, 512], ids=["empty", "one-sector"])
@pytest.mark.parametrize("start", [0, 512, 1 << 40], ids=["start", "end", "far"])
def test_map_of_nothing_is_that_of_qemu_img(
    qemu: Qemu, capsys: pytest.CaptureFixture[str], size: int, start: int
) -> None:
    Path("a.raw").write_bytes(bytes(size))
    theirs = qemu("qemu-img", "map", "-f", "raw", "--output=json", f"--start-offset={start}", "a.raw")
    assert ours(capsys, "--json", f"--start-offset={start}", "a.raw") == theirs


@pytest.mark.parametrize("preallocation", ["metadata", "falloc"])
def test_map_of_preallocated_qcow2_is_that_of_qemu_img(
    qemu: Qemu, capsys: pytest.CaptureFixture[str], preallocation: str
) -> None:
    qemu("qemu-img", "create", "-f", "qcow2", "-o", f"preallocation={preallocation}", "a.qcow2", "32M")
    qemu("qemu-io", "-f", "qcow2", "-c", "write 1M 64k", "-c", "write -z 4M 1M", "a.qcow2")
    assert ours(capsys, "--json", "a.qcow2") == qemu("qemu-img", "map", "--output=json", "a.qcow2")


def test_map_table_is_that_of_qemu_img_and_shows_compressed_clusters_too(
    qemu: Qemu, capsys: pytest.CaptureFixture[str]
) -> None:
    qemu("qemu-img", "create", "-f", "qcow2", "base.qcow2", "4M")
    qemu("qemu-io", "-f", "qcow2", "-c", "write 0 256k", "base.qcow2")
    qemu("qemu-img", "create", "-f", "qcow2", "-b", "base.qcow2", "-F", "qcow2", "top.qcow2", "4M")
    qemu("qemu-io", "-f", "qcow2", "-c", "write 64k 64k", "top.qcow2")
    assert ours(capsys, "top.qcow2") == qemu("qemu-img", "map", "top.qcow2")
    qemu("qemu-io", "-f", "qcow2", "-c", "write -c 2M 64k", "top.qcow2")
    assert ours(capsys, "top.qcow2").splitlines()[-1].split() == ["0x200000", "0x10000", "compressed"]


def test_map_of_huge_empty_qcow2_is_one_entry(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    image = tmp_path / "a.qcow2"
    assert main(["create", "-f", "qcow2", str(image), "16T"]) == 0
    entries: list[dict[str, Any]] = json.loads(ours(capsys, "--json", image))
    assert [(entry["start"], entry["length"], entry["present"]) for entry in entries] == [(0, 16 << 40, False)]


def test_map_follows_backing_file_without_format(qemu: Qemu, capsys: pytest.CaptureFixture[str]) -> None:
    qemu("qemu-img", "create", "-f", "qcow2", "base", "1M")
    qemu("qemu-io", "-f", "qcow2", "-c", "write 0 64k", "base")
    qemu("qemu-img", "create", "-f", "qcow2", "-b", "base", "-F", "qcow2", "top", "1M")
    content = bytearray(Path("top").read_bytes())
    at = content.index(bytes.fromhex("e2792aca"))  # the extension with the format becomes an unknown one
    content[at : at + 4] = b"none"
    Path("top").write_bytes(content)
    assert "not named" in info_text(capsys, "top")
    assert ours(capsys, "--json", "top") == qemu("qemu-img", "map", "--output=json", "top")


def info_text(capsys: pytest.CaptureFixture[str], image: str) -> str:
    assert main(["info", image]) == 0
    return capsys.readouterr().out

# SPDX-FileCopyrightText: blockgraph contributors
# SPDX-License-Identifier: MIT
"""Features, extensions and bits of the header; creation; options."""

from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import Any

import pytest
from helpers.harness import edge, make_node, read, write
from helpers.loop import graph_of, in_loop
from helpers.qcow2 import (
    QEMU,
    check,
    create,
    described,
    disk,
    get_field,
    memory_image,
    over,
    qcow2_of,
    qemu_img,
    qemu_io,
    set_field,
)

from blockgraph.errors import BlockGraphError, CorruptImage, GraphError, OptionError, ReadOnly, Unsupported


async def open_fails(path: Path, words: str, kind: type[BlockGraphError] = Unsupported, **options: Any) -> None:
    with pytest.raises(kind, match=words) as caught:
        async with disk(path, **options):
            pass
    assert "disk" in str(caught.value)


@QEMU
@pytest.mark.parametrize(
    "options, words",
    [
        ("extended_l2=on", "extended L2 entries"),
        ("data_file={}", "external data file"),
        ("refcount_bits=8", "refcounts of 8 bits"),
    ],
    ids=["extended-l2", "data-file", "refcount-bits"],
)
@in_loop
async def test_feature_not_supported_is_refused_by_name(tmpfs: Path, options: str, words: str) -> None:
    image = tmpfs / "d.qcow2"
    named = options.format(tmpfs / "data")
    qemu_img("create", "-q", "-f", "qcow2", "-o", named, image, "1M")
    await open_fails(image, words)


@pytest.mark.parametrize("method, words", [(1, "AES encryption"), (2, "LUKS encryption"), (3, "crypt_method 3")])
@in_loop
async def test_encrypted_image_is_refused_by_name(tmpfs: Path, method: int, words: str) -> None:
    image = tmpfs / "d.qcow2"
    await create(image, 1 << 20)
    set_field(image, "crypt_method", method)
    await open_fails(image, words)


@QEMU
@in_loop
async def test_unknown_feature_is_named_by_the_images_own_table(tmpfs: Path) -> None:
    image = tmpfs / "d.qcow2"
    qemu_img("create", "-q", "-f", "qcow2", image, "1M")
    data = bytearray(image.read_bytes())
    at = data.index(struct.pack(">I", 0x6803F857)) + 8
    data[at : at + 48] = bytes([0, 17]) + b"time travel".ljust(46, b"\0")
    set_field(data, "incompatible_features", 1 << 17 | 1 << 40)
    image.write_bytes(data)
    await open_fails(image, r"'time travel', unknown incompatible feature bit 40")


@QEMU
@in_loop
async def test_internal_snapshot_makes_an_image_read_only(tmpfs: Path) -> None:
    image = tmpfs / "d.qcow2"
    qemu_img("create", "-q", "-f", "qcow2", image, "1M")
    qemu_io(image, "write -P 1 0 1M")
    qemu_img("snapshot", "-c", "s", image)
    qemu_io(image, "write -P 2 0 64k")
    before = image.read_bytes()
    await open_fails(image, "internal snapshots", ReadOnly)
    async with disk(image, **{"read-only": True}) as backend:
        assert await backend.pread(65535, 2) == b"\2\1"
    assert image.read_bytes() == before


@QEMU
@in_loop
async def test_corrupt_image_opens_only_read_only(tmpfs: Path) -> None:
    image = tmpfs / "d.qcow2"
    qemu_img("create", "-q", "-f", "qcow2", image, "1M")
    set_field(image, "incompatible_features", 2)
    await open_fails(image, "marked as corrupt", CorruptImage)
    async with disk(image, **{"read-only": True}) as backend:
        assert await backend.pread(0, 4) == bytes(4)


@QEMU
@in_loop
async def test_unknown_autoclear_bits_go_before_the_first_write_and_not_by_opening(tmpfs: Path) -> None:
    image = tmpfs / "d.qcow2"
    qemu_img("create", "-q", "-f", "qcow2", image, "1M")
    qemu_img("bitmap", "--add", image, "b0")
    set_field(image, "autoclear_features", 1 | 1 << 9)
    async with disk(image) as backend:
        await backend.pread(0, 100)
    assert get_field(image, "autoclear_features") == 1 | 1 << 9
    async with disk(image) as backend:
        await backend.pwrite(0, b"x")
        assert get_field(image, "autoclear_features") == 1
    assert get_field(image, "autoclear_features") == 1
    check(image)


@QEMU
@in_loop
async def test_extensions_and_names_survive_writes_and_resizing(tmpfs: Path) -> None:
    base, image = tmpfs / "base.raw", tmpfs / "d.qcow2"
    base.write_bytes(bytes(1 << 20))
    await create(image, 1 << 20, backing_file="base.raw", backing_fmt="raw")
    data = bytearray(image.read_bytes())
    name = get_field(data, "backing_file_offset")
    unknown = struct.pack(">II", 0x12345678, 5) + b"hello\0\0\0" + bytes(8)
    data[name - 8 : name - 8 + len(unknown)] = unknown
    data[name + 40 : name + 48] = b"base.raw"
    set_field(data, "backing_file_offset", name + 40)
    image.write_bytes(data)
    head = slice(104, name + 60)
    async with disk(image) as backend:
        await backend.pwrite(1000, b"x" * 100_000)
        await backend.truncate(5 << 20)
    assert image.read_bytes()[head] == data[head]
    assert json.loads(qemu_img("info", "--output=json", image))["virtual-size"] == 5 << 20
    check(image)


@in_loop
async def test_backing_file_without_format_is_not_guessed(tmpfs: Path) -> None:
    (tmpfs / "base.raw").write_bytes(bytes(1 << 20))
    image = tmpfs / "d.qcow2"
    await create(image, 1 << 20, backing_file="base.raw")
    await open_fails(image, "has no format beside it", GraphError)
    async with disk(image, backing=None) as backend:
        assert qcow2_of(backend).image.header.backing_file == "base.raw"


# Reopening.


@in_loop
async def test_reopen_read_only_and_back_keeps_what_was_written(tmpfs: Path) -> None:
    image = tmpfs / "d.qcow2"
    await create(image, 1 << 20)
    async with graph_of(described(image)) as graph:
        backend = await graph.backend("disk", writable=True)
        await backend.pwrite(0, b"a" * 100_000)
        await backend.discard(0, 65536)
        await graph.close_backend(backend)
        await graph.reopen("disk", {"file": "#block0", "read-only": True})
        await graph.reopen("disk", {"file": "#block0"})
        backend = await graph.backend("disk", writable=True)
        assert await backend.pread(65530, 8) == bytes(6) + b"aa"
        await backend.pwrite(65530, b"bbbbbbbb")
        await graph.close_backend(backend)


@in_loop
async def test_reopen_writable_of_an_image_shared_with_writers_is_refused() -> None:
    async with over(await memory_image(1 << 20), read_only=True, force_share=True) as driver:
        wanted = make_node("qcow2", "disk", file="file").options
        with pytest.raises(OptionError, match="others may have written"):
            driver.reopen_check(wanted)


# Creation.


@QEMU
@pytest.mark.parametrize("compat", ["0.10", "1.1"])
@pytest.mark.parametrize("cluster_size", [512, 4096, 65536, 1 << 21])
@pytest.mark.parametrize("size", [0, 512, 1 << 20, (3 << 30) + 512])
@pytest.mark.parametrize("preallocation", ["off", "metadata"])
@in_loop
async def test_created_image_is_what_qemu_would_call_one(
    tmpfs: Path, compat: str, cluster_size: int, size: int, preallocation: str
) -> None:
    if preallocation == "metadata" and size > 1 << 20 > cluster_size:
        pytest.skip("many tables")
    image = tmpfs / "d.qcow2"
    await create(image, size, compat=compat, cluster_size=cluster_size, preallocation=preallocation)
    check(image)
    info = json.loads(qemu_img("info", "--output=json", image))
    assert info["virtual-size"] == size
    assert info["cluster-size"] == cluster_size
    assert info["format-specific"]["data"]["compat"] == compat
    if size:
        async with disk(image) as backend:
            await backend.pwrite(size - 512, b"e" * 512)
            assert await backend.pread(0, 512) == (b"e" * 512 if size == 512 else bytes(512))
        check(image)


@QEMU
@in_loop
async def test_created_features_are_seen_by_qemu(tmpfs: Path) -> None:
    image = tmpfs / "d.qcow2"
    await create(
        image, 1 << 20, backing_file="b.qcow2", backing_fmt="qcow2", lazy_refcounts=True, compression_type="zstd"
    )
    info = json.loads(qemu_img("info", "-U", "--output=json", image))
    data = info["format-specific"]["data"]
    assert (data["lazy-refcounts"], data["compression-type"]) == (True, "zstd")
    assert (info["backing-filename"], info["backing-filename-format"]) == ("b.qcow2", "qcow2")


@pytest.mark.parametrize(
    "path, arguments",
    [
        ("cluster-size", {"cluster_size": 1000}),
        ("cluster-size", {"cluster_size": 1 << 22}),
        ("size", {"size": 100}),
        ("size", {"size": 1 << 60, "cluster_size": 512}),
        ("compat", {"compat": "2.0"}),
        ("compression-type", {"compression_type": "zstd", "compat": "0.10"}),
        ("lazy-refcounts", {"lazy_refcounts": True, "compat": "0.10"}),
        ("backing-file", {"backing_file": "x" * 1024}),
        ("backing-file", {"backing_file": "x" * 600, "cluster_size": 512}),
        ("backing-fmt", {"backing_fmt": "raw"}),
        ("preallocation", {"preallocation": "metadata", "backing_file": "b"}),
    ],
)
@in_loop
async def test_create_with_wrong_argument_names_it(path: str, arguments: dict[str, Any]) -> None:
    with pytest.raises(OptionError) as caught:
        await memory_image(**{"size": 1 << 20, **arguments})
    assert caught.value.path == path


# Options and bounds.


@pytest.mark.parametrize(
    "options, l2, refcount",
    [
        ({}, 32 << 20, 1 << 20),
        ({"cache_size": 8 << 20}, 7 << 20, 1 << 20),
        ({"cache_size": 8 << 20, "l2_cache_size": 5 << 20}, 5 << 20, 3 << 20),
        ({"cache_size": 8 << 20, "refcount_cache_size": 5 << 20}, 3 << 20, 5 << 20),
        ({"l2_cache_size": 5 << 20}, 5 << 20, 1 << 20),
    ],
)
@in_loop
async def test_cache_sizes_follow_from_each_other(options: dict[str, int], l2: int, refcount: int) -> None:
    async with over(await memory_image(1 << 20), **options) as driver:
        assert driver._cache_sizes() == (l2, refcount)


@pytest.mark.parametrize(
    "options",
    [
        {"cache_size": 1 << 20, "l2_cache_size": 2 << 20},
        {"cache_size": 1 << 20, "refcount_cache_size": 2 << 20},
        {"cache_size": 3 << 20, "l2_cache_size": 1 << 20, "refcount_cache_size": 2 << 20},
    ],
)
@in_loop
async def test_cache_sizes_that_contradict_are_refused(options: dict[str, int]) -> None:
    with pytest.raises(OptionError):
        async with over(await memory_image(1 << 20), **options):
            pass


@in_loop
async def test_empty_disk_of_16_tib_maps_in_one_answer_and_opens_by_few_reads() -> None:
    file = await memory_image(16 << 40)
    async with over(file, read_only=True) as driver:
        extent = await driver.map(0, 1)
        assert (extent.offset, extent.length) == (0, 16 << 40)
        assert driver.mapping.tables.size == 0
        assert driver.refcounts.blocks.size == 0
        status = await edge(driver.node).block_status(0, 16 << 40)
        assert status.length == 16 << 40


@in_loop
async def test_map_of_a_nearly_empty_disk_skips_what_is_empty() -> None:
    file = await memory_image(16 << 40)
    async with over(file) as driver:
        disk_edge = edge(driver.node)
        await write(disk_edge, 9 << 40, b"x" * 65536)
        extents, offset = [], 0
        while offset < driver.size():
            extent = await driver.map(offset, driver.size() - offset)
            assert extent.offset <= offset
            extents.append(extent)
            offset = extent.offset + extent.length
        assert len(extents) <= 5
        assert await read(disk_edge, (9 << 40) + 65535, 2) == b"x\0"

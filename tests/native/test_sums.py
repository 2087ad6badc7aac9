# SPDX-FileCopyrightText: blockgraph contributors
# SPDX-License-Identifier: MIT
"""Checksums of disks against the xxhash package and a model of a dict."""

from __future__ import annotations

import asyncio
import itertools
import os
import random
from collections.abc import Iterator
from pathlib import Path

import pytest
import xxhash
from hypothesis import given, settings
from hypothesis import strategies as st

from blockgraph.native import (
    SUM_BLOCK,
    Bitmap,
    Copier,
    CopierMode,
    CopyExtent,
    CopyFlag,
    ExtentMap,
    MapExtent,
    Sums,
    get_pool,
)
from blockgraph.native.sums import MAX_CHUNKS, hash_block

MASK = (1 << 64) - 1
CHUNK = 16 << 10
SIZE = 9 * CHUNK + 5000


def model(data: bytes, offset: int = 0, chunk: int = CHUNK) -> dict[int, tuple[int, int]]:
    """Sums of the blocks of `data`, which begins at a block of the disk."""
    sums: dict[int, tuple[int, int]] = {}
    for at in range(0, len(data), SUM_BLOCK):
        block = data[at : at + SUM_BLOCK].ljust(SUM_BLOCK, b"\0")
        if any(block):
            number = (offset + at) // SUM_BLOCK
            value = xxhash.xxh3_128_intdigest(block, seed=number)
            low, high = sums.get(number * SUM_BLOCK // chunk, (0, 0))
            sums[number * SUM_BLOCK // chunk] = (low + value) & MASK, (high + (value >> 64)) & MASK
    return sums


def contents(sums: Sums) -> dict[int, tuple[int, int]]:
    """What is not zero, by chunk."""
    found: dict[int, tuple[int, int]] = {}
    for first, page in sums.pages():
        for i in range(0, len(page), 16):
            low, high = int.from_bytes(page[i : i + 8], "little"), int.from_bytes(page[i + 8 : i + 16], "little")
            if low or high:
                found[first + i // 16] = low, high
    return found


def disk(seed: int) -> bytes:
    """SIZE bytes, some blocks of them zero."""
    source = random.Random(seed)
    blocks = [source.choice([bytes(SUM_BLOCK), source.randbytes(SUM_BLOCK)]) for _ in range(-(-SIZE // SUM_BLOCK))]
    return b"".join(blocks)[:SIZE]


@pytest.fixture(params=range(3), ids=["best", "second", "third"])
def which(request: pytest.FixtureRequest) -> int:
    if hash_block(request.param, bytes(SUM_BLOCK), 0) is None:
        pytest.skip("this processor has no more implementations")
    number: int = request.param
    return number


def test_hash_of_block_is_that_of_xxhash(which: int) -> None:
    source = random.Random(1)
    for seed in (0, 1, MASK, *(source.getrandbits(64) for _ in range(100))):
        block = source.randbytes(SUM_BLOCK)
        assert hash_block(which, block, seed) == xxhash.xxh3_128_intdigest(block, seed=seed)


@given(
    st.integers(0, 5),
    st.lists(st.integers(0, SIZE // SUM_BLOCK), max_size=6),
    st.randoms(use_true_random=False),
)
def test_sums_do_not_depend_on_pieces_and_order(seed: int, cuts: list[int], order: random.Random) -> None:
    data = disk(seed)
    places = sorted({0, SIZE, *(cut * SUM_BLOCK for cut in cuts)})
    pieces = list(itertools.pairwise(places))
    order.shuffle(pieces)
    sums = Sums(SIZE, CHUNK)
    for start, end in pieces:
        sums.add(start, data[start:end])
    assert contents(sums) == model(data)
    assert list(sums.spoiled()) == []


@given(st.integers(0, SIZE), st.integers(0, SIZE))
def test_parts_of_blocks_spoil_their_chunks_and_no_others(a: int, b: int) -> None:
    start, end = min(a, b), max(a, b)
    data = disk(7)
    sums = Sums(SIZE, CHUNK)
    sums.add(start, data[start:end])
    partial = {at // CHUNK for at in (start, end) if at % SUM_BLOCK and at != SIZE and start != end}
    if end == SIZE and start != end and start % SUM_BLOCK:
        partial.add(start // CHUNK)
    spoiled = {chunk for at, size in sums.spoiled() for chunk in range(at // CHUNK, -(-(at + size) // CHUNK))}
    assert spoiled == partial
    whole = -(-start // SUM_BLOCK) * SUM_BLOCK, end if end == SIZE else end - end % SUM_BLOCK
    expected = model(data[whole[0] : whole[1]], whole[0]) if whole[0] < whole[1] else {}
    found = contents(sums)
    for chunk in range(sums.count):
        if chunk not in spoiled:
            assert found.get(chunk) == expected.get(chunk)


def test_spoiled_chunks_are_added_again_after_reset() -> None:
    data = disk(3)
    sums = Sums(SIZE, CHUNK)
    sums.add(0, data)
    sums.add(CHUNK, data[CHUNK : 3 * CHUNK])
    sums.spoil(CHUNK + 1, 2 * CHUNK - 2)
    assert list(sums.spoiled()) == [(CHUNK, 2 * CHUNK)]
    sums.reset(CHUNK, 2 * CHUNK)
    sums.add(CHUNK, data[CHUNK : 3 * CHUNK])
    assert contents(sums) == model(data)
    sums.spoil(SIZE - 1, 1)
    sums.reset(0, SIZE)
    assert (contents(sums), list(sums.spoiled())) == ({}, [])


def test_blocks_that_changed_places_change_the_sum() -> None:
    data = random.Random(2).randbytes(2 * SUM_BLOCK)
    one, other = Sums(CHUNK, CHUNK), Sums(CHUNK, CHUNK)
    one.add(0, data)
    other.add(0, data[SUM_BLOCK:] + data[:SUM_BLOCK])
    assert contents(one) != contents(other)


def test_huge_disk_costs_what_is_added() -> None:
    sums = Sums(64 << 40, 1 << 20)
    sums.add((64 << 40) - SUM_BLOCK, b"x" * SUM_BLOCK)
    assert list(contents(sums)) == [MAX_CHUNKS - 1]


@pytest.mark.parametrize(
    "size, chunk",
    [(-1, CHUNK), (1 << 64, CHUNK), (CHUNK, 2048), (CHUNK, 5000), (CHUNK, 1 << 32), ((64 << 40) + 1, 1 << 20)],
    ids=["negative", "past-64-bit", "small-chunk", "odd-chunk", "large-chunk", "too-many"],
)
def test_sizes_out_of_range_are_refused(size: int, chunk: int) -> None:
    with pytest.raises(ValueError, match=r"out of range|more than"):
        Sums(size, chunk)


def test_ranges_outside_the_disk_are_refused() -> None:
    sums = Sums(SIZE, CHUNK)
    for call in (
        lambda: sums.add(SIZE, b"x"),
        lambda: sums.add(-1, b"x"),
        lambda: sums.spoil(0, SIZE + 1),
        lambda: sums.reset(SIZE, 1),
        lambda: sums.read(0, sums.count + 1),
        lambda: sums.read(-1, 1),
    ):
        with pytest.raises(ValueError, match="not inside"):
            call()


@pytest.fixture
def files(tmp_path: Path) -> Iterator[tuple[int, int]]:
    """Descriptors of a source that holds disk(4), and of an empty target."""
    (tmp_path / "source").write_bytes(disk(4))
    source = os.open(tmp_path / "source", os.O_RDWR)
    target = os.open(tmp_path / "target", os.O_RDWR | os.O_CREAT)
    yield source, target
    os.close(source)
    os.close(target)


@settings(max_examples=20)
@given(flags=st.sampled_from([CopyFlag.SUM, CopyFlag.SUM | CopyFlag.DETECT_ZEROES, CopyFlag.SUM | CopyFlag.READ_ONLY]))
def test_copying_job_sums_what_it_copies(tmp_path_factory: pytest.TempPathFactory, flags: CopyFlag) -> None:
    directory = tmp_path_factory.mktemp("copy")
    (directory / "source").write_bytes(disk(4))
    with open(directory / "source", "rb") as source, open(directory / "target", "w+b") as target:
        sums = Sums(SIZE, CHUNK)
        half = 4 * CHUNK
        to = -1 if flags & CopyFlag.READ_ONLY else target.fileno()
        extents = [
            CopyExtent(source.fileno(), half, to, half, SIZE - half, flags, half),
            CopyExtent(source.fileno(), 0, to, 0, half, flags, 0),
        ]

        async def main() -> None:
            await get_pool().copy(extents, sums=sums)

        asyncio.run(main())
        assert contents(sums) == model(disk(4))
        target.seek(0)
        assert target.read() == (b"" if flags & CopyFlag.READ_ONLY else disk(4))


@pytest.mark.parametrize(
    "flags",
    [CopyFlag.SUM | CopyFlag.COPY_RANGE, CopyFlag.SUM | CopyFlag.ZERO, CopyFlag.READ_ONLY],
    ids=["copy-range", "zero", "read-only"],
)
def test_flags_that_contradict_are_refused(files: tuple[int, int], flags: CopyFlag) -> None:
    async def main() -> None:
        await get_pool().copy([CopyExtent(files[0], 0, files[1], 0, SIZE, flags)])

    with pytest.raises(ValueError, match="combination of flags"):
        asyncio.run(main())


def copier_over(source_fd: int, target_fd: int, cluster: int = 8192) -> tuple[Copier, Sums]:
    """A copier of everything from one file to another, which native writes may use, and its sums."""
    todo, done = Bitmap(SIZE, cluster), Bitmap(SIZE, cluster)
    todo.fill()
    maps = []
    for fd in (source_fd, target_fd):
        extents = ExtentMap(SIZE)
        extents.insert(extents.generation(), [MapExtent(0, SIZE, extents.add_slot(fd), 0, writable=True)])
        maps.append(extents)
    copier = Copier(todo, done, *maps)
    sums = Sums(SIZE, CHUNK)
    copier.set_sums(sums)
    copier.set_mode(CopierMode.ON)
    return copier, sums


def test_copier_sums_what_native_writes_copy(files: tuple[int, int]) -> None:
    copier, sums = copier_over(*files)
    for start in range(0, SIZE, 3 * 8192):
        assert copier.copy(start, min(start + 3 * 8192, SIZE)).whole
    assert contents(sums) == model(disk(4))
    with pytest.raises(ValueError, match="not of this disk"):
        copier.set_sums(Sums(SIZE + 1, CHUNK))


def test_copier_spoils_what_it_could_not_copy(files: tuple[int, int]) -> None:
    read_only = os.open(f"/proc/self/fd/{files[1]}", os.O_RDONLY)
    os.pwrite(files[0], b"x" * CHUNK, CHUNK)
    copier, sums = copier_over(files[0], read_only)
    assert not copier.copy(CHUNK, 2 * CHUNK).whole
    assert list(sums.spoiled()) == [(CHUNK, CHUNK)]
    os.close(read_only)

# SPDX-FileCopyrightText: blockgraph contributors
# SPDX-License-Identifier: MIT
"""The native structures beside what bounds them: reading the same memory once, dd, cp.

The bitmaps are those of a 64 TiB disk at 64 KiB (2**30 bits, 128 MiB). "Reading once" is `is_zero` over zeroed memory
of that size, which runs at memory bandwidth, the sharpest measure there is. `speed` in extra_info is peer / ours.
"""

from __future__ import annotations

import os
import random
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
from pytest_benchmark.fixture import BenchmarkFixture

from benchmarks.peers import need, ratio, report, timed
from blockgraph._native import ffi, lib
from blockgraph.native import Bitmap, CopyExtent, CopyFlag, Pool, allocate_aligned, is_zero, zero_runs

TIB, GIB, MIB = 1 << 40, 1 << 30, 1 << 20
GRANULARITY = 65536
DISK = 64 * TIB


@pytest.fixture(scope="module")
def zeroed() -> memoryview:
    """As much memory as the bitmap has, touched."""
    view = allocate_aligned(DISK // GRANULARITY // 8)
    for page in range(0, len(view), 4096):
        view[page] = 0
    return view


@pytest.fixture(scope="module")
def pool() -> Iterator[Pool]:
    pool = Pool(max(4, os.cpu_count() or 1))
    yield pool
    pool.close()


@pytest.fixture
def shm() -> Iterator[Path]:
    with TemporaryDirectory(dir="/dev/shm") as name:
        yield Path(name)


def compare(
    benchmark: BenchmarkFixture,
    ours: Callable[[], object],
    other: Callable[[], object],
    rounds: int = 5,
    **facts: object,
) -> None:
    compared = ratio(lambda: timed(ours), lambda: timed(other), rounds=rounds)
    report(benchmark, compared, ours, **facts)


def dirty(run: int) -> Bitmap:
    """1 % of the disk dirty, at random, in runs of so many granules."""
    bitmap = Bitmap(DISK, GRANULARITY)
    granules = DISK // GRANULARITY
    rng = random.Random(1)
    for _ in range(granules // 100 // run):
        bitmap.set(rng.randrange(granules - run) * GRANULARITY, run * GRANULARITY)
    return bitmap


def scan(bitmap: Bitmap) -> int:
    """Every dirty run of the bitmap, 64 Ki runs (1 MiB) a call, which is when calls cost least; returns how many."""
    batch = 16 * lib.BG_BITMAP_EXTENTS_MIN
    out, reached = ffi.new("bg_bitmap_extent[]", batch), ffi.new("int64_t *", 0)
    found = 0
    while reached[0] < DISK:
        found += lib.bg_bitmap_extents(bitmap._bitmap, reached[0], DISK, out, batch, reached)
    return found


def test_bitmap_scan_of_empty(benchmark: BenchmarkFixture, zeroed: memoryview) -> None:
    bitmap = Bitmap(DISK, GRANULARITY)
    assert bitmap.next_dirty() is None
    compare(benchmark, bitmap.next_dirty, lambda: is_zero(zeroed), peer="reading once")


@pytest.mark.parametrize("run", [64, 16, 1], ids=["4-MiB-runs", "1-MiB-runs", "single-granules"])
def test_bitmap_scan_of_random_one_percent(benchmark: BenchmarkFixture, zeroed: memoryview, run: int) -> None:
    bitmap = dirty(run)
    compare(benchmark, lambda: scan(bitmap), lambda: is_zero(zeroed), peer="reading once", runs_found=scan(bitmap))


def test_bitmap_scan_of_full(benchmark: BenchmarkFixture, zeroed: memoryview) -> None:
    bitmap = Bitmap(DISK, GRANULARITY)
    bitmap.fill()
    compare(benchmark, bitmap.next_dirty, lambda: is_zero(zeroed), peer="reading once")


def test_bitmap_iteration_in_python(benchmark: BenchmarkFixture) -> None:
    """dirty_extents beside next_dirty in turn, 1 TiB, 1 % in single granules."""
    bitmap = Bitmap(TIB, GRANULARITY)
    rng = random.Random(1)
    for _ in range(TIB // GRANULARITY // 100):
        bitmap.set(rng.randrange(TIB), 1)

    def in_turn() -> None:
        at = 0
        while found := bitmap.next_dirty(at):
            at = sum(found)

    compare(benchmark, lambda: sum(1 for _ in bitmap.dirty_extents()), in_turn, peer="next_dirty in turn")


def full() -> Bitmap:
    bitmap = Bitmap(DISK, GRANULARITY)
    bitmap.fill()
    return bitmap


def contents(bitmap: Bitmap) -> str:
    """What is dirty in it, of those below."""
    runs = scan(bitmap)
    return "all dirty" if runs == 1 else f"{100 * bitmap.count() / DISK:.1f} % dirty in {runs:,} runs"


CONTENTS = pytest.mark.parametrize(
    "make", [lambda: dirty(64), lambda: dirty(1), full], ids=["4-MiB-runs", "single-granules", "full"]
)


@CONTENTS
def test_bitmap_merge(benchmark: BenchmarkFixture, zeroed: memoryview, make: Callable[[], Bitmap]) -> None:
    """Two words are read and one is written: beside reading as much memory. Wanted: within a factor of 2, in 100 ms."""
    other, half = make(), Bitmap(DISK, GRANULARITY)
    half.set(0, DISK // 2)

    def ours() -> float:
        into = half.copy()
        return timed(lambda: into.merge(other))

    compared = ratio(ours, lambda: timed(lambda: [is_zero(zeroed) for _ in range(3)]))
    what = f"merge of 64 TiB bitmaps, {contents(other)}"
    report(benchmark, compared, ours, figure="4.2", what=what, peer="memory", wanted=0.5)


@pytest.mark.parametrize("granularity", [GRANULARITY // 2, 2 * GRANULARITY], ids=["finer", "coarser"])
@CONTENTS
def test_bitmap_merge_of_another_granularity(
    benchmark: BenchmarkFixture, zeroed: memoryview, make: Callable[[], Bitmap], granularity: int
) -> None:
    """Into a new bitmap, beside reading what is read and written: one is read, the other read and written."""
    other, per_word = make(), 2 * GRANULARITY // granularity

    def ours() -> float:
        into = Bitmap(DISK, granularity)
        return timed(lambda: into.merge(other))

    compared = ratio(ours, lambda: timed(lambda: [is_zero(zeroed) for _ in range(1 + per_word)]))
    finer = "half" if granularity < GRANULARITY else "twice"
    what = f"merge of 64 TiB bitmaps into {finer} the granularity, {contents(other)}"
    report(benchmark, compared, ours, figure="4.2", what=what, peer="memory", wanted=0.5)


@CONTENTS
def test_bitmap_count(benchmark: BenchmarkFixture, zeroed: memoryview, make: Callable[[], Bitmap]) -> None:
    bitmap = make()
    what = f"count of a 64 TiB bitmap, {contents(bitmap)}"
    compare(benchmark, bitmap.count, lambda: is_zero(zeroed), figure="4.2", what=what, peer="memory", wanted=0.5)


@pytest.mark.parametrize("size", [64 * 1024, 128 * MIB], ids=["cached", "memory"])
def test_zero_detection_of_zeroes(benchmark: BenchmarkFixture, size: int) -> None:
    """Beside memchr (bytes.find), which libc has in hand-written vector code and which reads the same bytes."""
    data = bytes(size)
    repeat = 128 * MIB // size
    compare(
        benchmark,
        lambda: [is_zero(data) for _ in range(repeat)],
        lambda: [data.find(b"\1") for _ in range(repeat)],
        peer="memchr",
    )


def test_zero_runs_of_mixed_blocks(benchmark: BenchmarkFixture, zeroed: memoryview) -> None:
    """Every fourth 64 KiB of 128 MiB is data."""
    mixed = bytearray(len(zeroed))
    for at in range(0, len(mixed), 4 * 65536):
        mixed[at : at + 65536] = b"x" * 65536
    compare(benchmark, lambda: list(zero_runs(mixed, 4096)), lambda: is_zero(zeroed), peer="reading once")


def write_dense(path: Path, size: int) -> None:
    block = random.Random(1).randbytes(16 * MIB)
    with path.open("wb") as file:
        for _ in range(size // len(block)):
            file.write(block)


def write_sparse(path: Path, size: int, percent: int) -> None:
    """So much of the file is data, in MiBs at random places."""
    rng = random.Random(2)
    block = rng.randbytes(MIB)
    with path.open("wb") as file:
        file.truncate(size)
        for index in rng.sample(range(size // MIB), size // MIB * percent // 100):
            file.seek(index * MIB)
            file.write(block)


def copy_file(pool: Pool, source: Path, target: Path, flags: CopyFlag) -> None:
    """Data extents by SEEK_DATA, as block status has them; the new target is zero elsewhere."""
    target.unlink(missing_ok=True)
    read, write = os.open(source, os.O_RDONLY), os.open(target, os.O_RDWR | os.O_CREAT, 0o600)
    size = os.fstat(read).st_size
    os.ftruncate(write, size)
    extents, at = [], 0
    while at < size:
        try:
            start = os.lseek(read, at, os.SEEK_DATA)
        except OSError:
            break
        at = os.lseek(read, start, os.SEEK_HOLE)
        extents.append(CopyExtent(read, start, write, start, at - start, flags))
    pool.copy_blocking(extents)
    os.close(read)
    os.close(write)


METHODS = pytest.mark.parametrize(
    "flags",
    [CopyFlag.NONE, CopyFlag.COPY_RANGE, CopyFlag.DETECT_ZEROES | CopyFlag.SKIP_ZEROES],
    ids=["read-write", "copy-range", "detect-zeroes"],
)


def run(*command: object) -> None:
    subprocess.run([str(part) for part in command], check=True)


@METHODS
def test_copy_of_dense_2_gib_beside_dd(benchmark: BenchmarkFixture, pool: Pool, shm: Path, flags: CopyFlag) -> None:
    need("dd")
    source, ours, theirs = shm / "source", shm / "ours", shm / "theirs"
    write_dense(source, 2 * GIB)

    def peer() -> None:
        theirs.unlink(missing_ok=True)
        run("dd", "bs=1M", "status=none", f"if={source}", f"of={theirs}")

    compare(benchmark, lambda: copy_file(pool, source, ours, flags), peer, peer="dd bs=1M")
    run("cmp", source, ours)


@METHODS
def test_copy_of_sparse_8_gib_beside_cp(benchmark: BenchmarkFixture, pool: Pool, shm: Path, flags: CopyFlag) -> None:
    need("cp")
    source, ours, theirs = shm / "source", shm / "ours", shm / "theirs"
    write_sparse(source, 8 * GIB, 20)

    def peer() -> None:
        theirs.unlink(missing_ok=True)
        run("cp", "--sparse=auto", source, theirs)

    compare(benchmark, lambda: copy_file(pool, source, ours, flags), peer, peer="cp --sparse=auto")
    assert ours.stat().st_blocks == source.stat().st_blocks

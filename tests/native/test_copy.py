# SPDX-FileCopyrightText: blockgraph contributors
# SPDX-License-Identifier: MIT
"""The extent copier against bytes put together in Python."""

from __future__ import annotations

import asyncio
import errno
import os
import random
import resource
import signal
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from blockgraph.native import (
    CopyCancelled,
    CopyError,
    CopyExtent,
    CopyFlag,
    CopyProgress,
    Pool,
    allocate_aligned,
    get_pool,
    offload,
)

MIB = 1 << 20
METHODS = [
    pytest.param(CopyFlag.NONE, id="read-write"),
    pytest.param(CopyFlag.COPY_RANGE, id="copy-range"),
    pytest.param(CopyFlag.CLONE, id="clone"),
    pytest.param(CopyFlag.DETECT_ZEROES, id="detect"),
    pytest.param(CopyFlag.DETECT_ZEROES | CopyFlag.PUNCH_HOLES, id="detect-punch"),
]


@pytest.fixture(scope="module")
def pool() -> Iterator[Pool]:
    pool = Pool(3)
    yield pool
    pool.close()


@pytest.fixture(params=["disk", "tmpfs"])
def make(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Callable[[bytes], int]]:
    """Makes an open file with these bytes."""
    directory = tmp_path if request.param == "disk" else request.getfixturevalue("tmpfs")
    opened: list[int] = []

    def make(content: bytes) -> int:
        fd = os.open(directory / str(len(opened)), os.O_RDWR | os.O_CREAT, 0o600)
        opened.append(fd)
        os.write(fd, content)
        return fd

    yield make
    for fd in opened:
        os.close(fd)


def content(fd: int) -> bytes:
    return os.pread(fd, os.fstat(fd).st_size, 0)


def holey(seed: int, blocks: int) -> bytes:
    """Blocks of 4096 bytes, about half of them zero, in runs."""
    rng = random.Random(seed)
    out = bytearray()
    while len(out) < blocks * 4096:
        length = rng.randrange(1, 12) * 4096
        out += bytes(length) if rng.random() < 0.5 else rng.randbytes(length)
    return bytes(out[: blocks * 4096])


@pytest.mark.parametrize("flags", METHODS)
@pytest.mark.parametrize("threads", [1, 3], ids=["one-thread", "three-threads"])
def test_copy_of_whole_file_with_holes_is_equal(
    pool: Pool, make: Callable[[bytes], int], flags: CopyFlag, threads: int
) -> None:
    data = holey(1, 1200) + b"odd tail"
    source, target = make(data), make(b"\xee" * len(data))
    progress = CopyProgress()
    result = pool.copy_blocking(
        [CopyExtent(source, 0, target, 0, len(data), flags)], threads=threads, progress=progress
    )
    assert content(target) == data
    zero_blocks = sum(not any(data[at : at + 4096]) for at in range(0, len(data), 4096))
    assert result.bytes == progress.bytes == len(data)
    assert result.zeroes == progress.zeroes == (zero_blocks * 4096 if flags & CopyFlag.DETECT_ZEROES else 0)


@given(data=st.data())
@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_copy_of_any_extents_equals_slices(data: st.DataObject, pool: Pool, tmp_path: Path) -> None:
    size = 3 * MIB
    before, after = bytearray(b"\xaa" * size), holey(2, 400)
    source = os.open(tmp_path / "source", os.O_RDWR | os.O_CREAT | os.O_TRUNC)
    target = os.open(tmp_path / "target", os.O_RDWR | os.O_CREAT | os.O_TRUNC)
    os.write(source, after)
    os.write(target, before)
    cuts = sorted(data.draw(st.lists(st.integers(0, size), min_size=2, max_size=12, unique=True)))
    kinds = st.sampled_from(
        [flag.values[0] for flag in METHODS] + [CopyFlag.ZERO, CopyFlag.ZERO | CopyFlag.PUNCH_HOLES]
    )
    extents = []
    for start, end in zip(cuts[::2], cuts[1::2], strict=False):
        flags, offset, length = data.draw(kinds), data.draw(st.integers(0, 2 * MIB)), end - start
        extents.append(CopyExtent(source, offset, target, start, length, flags))
        piece = b"" if flags & CopyFlag.ZERO else after[offset : offset + length]
        before[start:end] = piece + bytes(length - len(piece))
    data.draw(st.randoms()).shuffle(extents)
    pool.copy_blocking(extents)
    assert content(target) == before
    os.close(source)
    os.close(target)


@pytest.mark.parametrize("flags", METHODS)
def test_copy_past_source_end_makes_the_rest_zero(pool: Pool, make: Callable[[bytes], int], flags: CopyFlag) -> None:
    source, target = make(b"a" * 5000), make(b"b" * 3 * MIB)
    pool.copy_blocking([CopyExtent(source, 0, target, 0, 2 * MIB + 77, flags)])
    assert content(target) == b"a" * 5000 + bytes(2 * MIB + 77 - 5000) + b"b" * (MIB - 77)


def test_copy_detecting_zeroes_with_punch_leaves_holes(pool: Pool, tmpfs: Path) -> None:
    source = os.open(tmpfs / "source", os.O_RDWR | os.O_CREAT)
    target = os.open(tmpfs / "target", os.O_RDWR | os.O_CREAT)
    os.write(source, bytes(MIB) + b"a" * 8192 + bytes(MIB))
    os.write(target, b"b" * os.fstat(source).st_size)
    pool.copy_blocking(
        [CopyExtent(source, 0, target, 0, 2 * MIB + 8192, CopyFlag.DETECT_ZEROES | CopyFlag.PUNCH_HOLES)]
    )
    assert os.fstat(target).st_blocks * 512 == 8192
    os.close(source)
    os.close(target)


def test_copy_detecting_zeroes_with_skip_writes_data_only(pool: Pool, make: Callable[[bytes], int]) -> None:
    source, target = make(bytes(8192) + b"a" * 4096 + bytes(4096)), make(b"b" * 16384)
    flags = CopyFlag.DETECT_ZEROES | CopyFlag.SKIP_ZEROES
    result = pool.copy_blocking([CopyExtent(source, 0, target, 0, 16384, flags)])
    assert content(target) == b"b" * 8192 + b"a" * 4096 + b"b" * 4096
    assert result == (16384, 12288)


def test_copy_of_nothing_ends_at_once(pool: Pool, make: Callable[[bytes], int]) -> None:
    fd = make(b"")
    assert pool.copy_blocking([]) == (0, 0)
    assert pool.copy_blocking([CopyExtent(fd, 0, fd, 0, 0)] * 3) == (0, 0)


def test_copy_of_many_small_extents_is_complete(pool: Pool, make: Callable[[bytes], int]) -> None:
    data = holey(3, 500)
    source, target = make(data), make(bytes(len(data)))
    order = list(range(0, len(data), 512))
    random.Random(4).shuffle(order)
    pool.copy_blocking([CopyExtent(source, at, target, at, 512) for at in order])
    assert content(target) == data


def test_copy_with_direct_io_and_detection_is_equal(pool: Pool, tmp_path: Path) -> None:
    data = holey(5, 700)
    (tmp_path / "source").write_bytes(data)
    try:
        source = os.open(tmp_path / "source", os.O_RDONLY | os.O_DIRECT)
        target = os.open(tmp_path / "target", os.O_RDWR | os.O_DIRECT | os.O_CREAT, 0o600)
    except OSError:
        pytest.skip("no O_DIRECT on this file system")
    os.ftruncate(target, len(data))
    pool.copy_blocking([CopyExtent(source, 0, target, 0, len(data), CopyFlag.DETECT_ZEROES | CopyFlag.PUNCH_HOLES)])
    assert (tmp_path / "target").read_bytes() == data
    buf = allocate_aligned(4096)
    assert os.preadv(target, [buf], 0) == 4096
    os.close(source)
    os.close(target)


@pytest.mark.parametrize("flags", METHODS)
def test_copy_with_unreadable_source_names_extent_offset_and_side(
    pool: Pool, make: Callable[[bytes], int], tmp_path: Path, flags: CopyFlag
) -> None:
    good, target = make(b"a" * 8192), make(bytes(16384))
    write_only = os.open(tmp_path / "write-only", os.O_WRONLY | os.O_CREAT)
    extents = [
        CopyExtent(good, 0, target, 0, 4096, flags),
        CopyExtent(write_only, 300, target, 4096, 4096, flags),
        CopyExtent(good, 0, target, 8192, 4096, flags),
    ]
    with pytest.raises(CopyError) as caught:
        pool.copy_blocking(extents, threads=1)
    error = caught.value
    assert (error.errno, error.extent, error.offset, error.side) == (errno.EBADF, 1, 300, "read")
    assert error.incomplete == (1, 2)
    assert "read at offset 300 (extent 1)" in str(error)
    assert content(target)[:4096] == b"a" * 4096
    os.close(write_only)


@pytest.mark.parametrize("flags", [*METHODS, pytest.param(CopyFlag.ZERO, id="zero")])
def test_copy_to_read_only_target_names_the_write_side(
    pool: Pool, make: Callable[[bytes], int], tmp_path: Path, flags: CopyFlag
) -> None:
    source = make(b"a" * 8192)
    (tmp_path / "read-only").write_bytes(bytes(8192))
    read_only = os.open(tmp_path / "read-only", os.O_RDONLY)
    with pytest.raises(CopyError) as caught:
        pool.copy_blocking([CopyExtent(source, 0, read_only, 512, 4096, flags)])
    error = caught.value
    assert (error.errno, error.extent, error.offset, error.side) == (errno.EBADF, 0, 512, "write")
    assert error.incomplete == (0,)
    os.close(read_only)


def test_copy_to_full_file_system_fails_with_enospc(pool: Pool, small_tmpfs: Path, tmp_path: Path) -> None:
    (tmp_path / "source").write_bytes(b"a" * 3 * MIB)
    source = os.open(tmp_path / "source", os.O_RDONLY)
    target = os.open(small_tmpfs / "target", os.O_RDWR | os.O_CREAT)
    with pytest.raises(CopyError) as caught:
        pool.copy_blocking([CopyExtent(source, 0, target, 0, 3 * MIB)])
    os.close(source)
    os.close(target)
    assert (caught.value.errno, caught.value.side, caught.value.incomplete) == (errno.ENOSPC, "write", (0,))


def test_copy_past_file_size_limit_fails_with_efbig(pool: Pool, make: Callable[[bytes], int]) -> None:
    source, target = make(b"a" * 2 * MIB), make(b"")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (MIB, hard))
    try:
        with pytest.raises(CopyError) as caught:
            pool.copy_blocking([CopyExtent(source, 0, target, 0, 2 * MIB)], threads=1)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, handler)
    assert (caught.value.errno, caught.value.offset, caught.value.side) == (errno.EFBIG, MIB, "write")


def test_copy_with_cancelled_progress_copies_nothing(pool: Pool, make: Callable[[bytes], int]) -> None:
    source, target = make(b"a" * MIB), make(bytes(MIB))
    progress = CopyProgress()
    progress.cancel()
    with pytest.raises(CopyCancelled) as caught:
        pool.copy_blocking([CopyExtent(source, 0, target, 0, MIB)] * 2, progress=progress)
    assert caught.value.incomplete == (0, 1)
    assert progress.bytes == 0
    assert content(target) == bytes(MIB)


def test_copy_cancelled_while_running_stops_between_chunks(pool: Pool, tmpfs: Path) -> None:
    source = os.open(tmpfs / "source", os.O_RDWR | os.O_CREAT)
    target = os.open(tmpfs / "target", os.O_RDWR | os.O_CREAT)
    os.truncate(source, 1 << 40)
    progress = CopyProgress()
    outcome: list[BaseException] = []

    def work() -> None:
        try:
            # Sparse to nothing: it would take hours of reading zeroes.
            flags = CopyFlag.DETECT_ZEROES | CopyFlag.SKIP_ZEROES
            pool.copy_blocking([CopyExtent(source, 0, target, 0, 1 << 40, flags)], progress=progress)
        except BaseException as error:
            outcome.append(error)

    thread = threading.Thread(target=work)
    thread.start()
    while progress.bytes == 0:
        pass
    progress.cancel()
    thread.join()
    assert isinstance(outcome[0], CopyCancelled)
    assert 0 < progress.bytes < 1 << 40
    os.close(source)
    os.close(target)


@pytest.mark.parametrize(
    "extent",
    [
        pytest.param((-1, 0, 1, 0, 1), id="source-descriptor"),
        pytest.param((0, 0, -1, 0, 1), id="target-descriptor"),
        pytest.param((0, -1, 1, 0, 1), id="source-offset"),
        pytest.param((0, 0, 1, 2**63, 1), id="target-offset"),
        pytest.param((0, 0, 1, 2**63 - 1, 1), id="target-end"),
        pytest.param((0, 0, 1, 0, -1), id="length"),
        pytest.param((0, 0, 1, 0, 1, CopyFlag.PUNCH_HOLES | CopyFlag.SKIP_ZEROES), id="punch-and-skip"),
        pytest.param((0, 0, 1, 0, 1, 1024), id="unknown-flag"),
    ],
)
def test_copy_of_senseless_extent_is_refused_by_index(pool: Pool, extent: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"extents\[1\]"):
        pool.copy_blocking([CopyExtent(0, 0, 1, 0, 0), CopyExtent(*extent)])  # type: ignore[arg-type]


def test_copy_with_impossible_threads_is_refused(pool: Pool) -> None:
    with pytest.raises(ValueError, match="threads must be"):
        pool.copy_blocking([], threads=0)


def test_async_copy_returns_result_and_lets_other_requests_through(make: Callable[[bytes], int]) -> None:
    data = holey(6, 2000)
    source, target, other = make(data), make(bytes(len(data))), make(b"o" * 100_000)

    async def main() -> None:
        pool = get_pool()
        copy = asyncio.ensure_future(pool.copy([CopyExtent(source, 0, target, 0, len(data))], threads=pool.threads))
        buf = bytearray(100_000)
        assert await pool.pread(other, 0, buf) == 100_000
        assert await copy == (len(data), 0)

    asyncio.run(main())
    assert content(target) == data


def test_async_copy_that_fails_raises_copy_error(make: Callable[[bytes], int]) -> None:
    source = make(b"a")

    async def main() -> None:
        with pytest.raises(CopyError) as caught:
            await get_pool().copy([CopyExtent(source, 0, 999_999, 7, 1)])
        assert (caught.value.errno, caught.value.offset, caught.value.side) == (errno.EBADF, 7, "write")

    asyncio.run(main())


def test_async_copy_when_cancelled_stops_and_ends_before_the_await_does(tmpfs: Path) -> None:
    source = os.open(tmpfs / "source", os.O_RDWR | os.O_CREAT)
    target = os.open(tmpfs / "target", os.O_RDWR | os.O_CREAT)
    os.truncate(source, 1 << 40)
    progress = CopyProgress()

    async def main() -> None:
        flags = CopyFlag.DETECT_ZEROES | CopyFlag.SKIP_ZEROES
        pool = get_pool()
        task = asyncio.ensure_future(pool.copy([CopyExtent(source, 0, target, 0, 1 << 40, flags)], progress=progress))
        while progress.bytes == 0:  # noqa: ASYNC110 - the first chunk sets no event
            await asyncio.sleep(0)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert not pool._pending

    asyncio.run(main())
    assert 0 < progress.bytes < 1 << 40
    os.close(source)
    os.close(target)


def test_clone_shares_whole_blocks_and_copies_the_rest(pool: Pool, reflinks: Path) -> None:
    data = random.Random(3).randbytes(5 * MIB + 100)
    (reflinks / "source").write_bytes(data)
    (reflinks / "target").write_bytes(b"t" * MIB)
    with (reflinks / "source").open("rb") as source, (reflinks / "target").open("r+b") as target:
        extents = [
            CopyExtent(source.fileno(), 0, target.fileno(), MIB, 3 * MIB, CopyFlag.CLONE),
            CopyExtent(source.fileno(), 3 * MIB + 1, target.fileno(), 4 * MIB, 2 * MIB, CopyFlag.CLONE),
        ]
        progress = CopyProgress()
        assert pool.copy_blocking(extents, progress=progress).bytes == 5 * MIB
        assert progress.shared == 3 * MIB
        expected = data[: 3 * MIB] + data[3 * MIB + 1 : 5 * MIB + 1]
        assert content(target.fileno()) == b"t" * MIB + expected
        os.pwrite(target.fileno(), b"new", 2 * MIB)  # only the target's
    assert (reflinks / "source").read_bytes() == data


def test_clone_across_file_systems_is_a_copy(pool: Pool, tmp_path: Path, tmpfs: Path) -> None:
    data = random.Random(4).randbytes(3 * MIB)
    (tmp_path / "source").write_bytes(data)
    with (tmp_path / "source").open("rb") as source, (tmpfs / "target").open("w+b") as target:
        progress = CopyProgress()
        pool.copy_blocking(
            [CopyExtent(source.fileno(), 0, target.fileno(), 0, 3 * MIB, CopyFlag.CLONE)], progress=progress
        )
        assert content(target.fileno()) == data
        assert progress.shared == 0


def test_offload_is_worth_trying_where_files_can_share_blocks(reflinks: Path, tmpfs: Path) -> None:
    with (reflinks / "a").open("w+b") as a, (tmpfs / "b").open("w+b") as b, (tmpfs / "c").open("w+b") as c:
        assert offload(a.fileno(), a.fileno()) == CopyFlag.CLONE
        for source, target in ((a, b), (b, a), (b, c)):
            assert offload(source.fileno(), target.fileno()) == CopyFlag.NONE

# SPDX-FileCopyrightText: blockgraph contributors
# SPDX-License-Identifier: MIT
from __future__ import annotations

import asyncio
import errno
import gc
import os
import random
import subprocess
import sys
import threading
import warnings
import weakref
from collections.abc import Iterator
from pathlib import Path

import pytest

from blockgraph._native import lib
from blockgraph.native import Pool, allocate_aligned, close_pool, get_pool
from blockgraph.native import pool as pool_module


@pytest.fixture(params=["inline", "threads"])
def small_transfers(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Small transfers in the calling thread where that is possible, or always by the threads."""
    if request.param == "threads":
        monkeypatch.setattr(pool_module, "INLINE_MAX", -1)


@pytest.fixture(params=["disk", "tmpfs"])
def fd(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[int]:
    directory = tmp_path if request.param == "disk" else request.getfixturevalue("tmpfs")
    descriptor = os.open(directory / "file", os.O_RDWR | os.O_CREAT, 0o600)
    yield descriptor
    os.close(descriptor)


@pytest.mark.usefixtures("small_transfers")
@pytest.mark.parametrize("length", [0, 1, 4096, 65536, 1 << 20], ids=["empty", "byte", "page", "inline-max", "large"])
def test_pread_after_pwrite_returns_the_bytes(fd: int, length: int) -> None:
    data = random.Random(1).randbytes(length)

    async def main() -> None:
        pool = get_pool()
        assert await pool.pwrite(fd, 777, data) == length
        buf = bytearray(length)
        assert await pool.pread(fd, 777, buf) == length
        assert buf == data

    asyncio.run(main())


def test_device_may_have_to_be_waited_for_although_its_name_is_in_memory() -> None:
    fd = os.open("/dev/full", os.O_WRONLY)
    try:
        assert lib.bg_pwrite_now(fd, bytes(512), 512, 0) == -errno.EAGAIN
        assert lib.bg_pwrite(fd, bytes(512), 512, 0) == -errno.ENOSPC
    finally:
        os.close(fd)


@pytest.mark.usefixtures("small_transfers")
@pytest.mark.parametrize("length", [4096, 1 << 20], ids=["page", "large"])
def test_failed_transfer_kept_in_a_cycle_survives_garbage_collection(length: int) -> None:
    script = f"""
import asyncio, gc, os
from blockgraph.native import allocate_aligned, get_pool, pool
pool.INLINE_MAX = {pool_module.INLINE_MAX}

async def fail(fd, operation):
    buf = allocate_aligned({length})
    try:
        await operation(fd, 0, buf)
    except OSError as error:
        error.kept = error  # and with it the traceback, its frames and their buffers

async def main():
    await fail(os.open("/dev/full", os.O_WRONLY), get_pool().pwrite)
    await fail(os.open("/dev/full", os.O_WRONLY), get_pool().pread)
    gc.collect()

asyncio.run(main())
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.usefixtures("small_transfers")
def test_pread_past_end_zeroes_the_rest_and_counts(fd: int) -> None:
    os.pwrite(fd, b"abc", 0)

    async def main() -> None:
        buf = bytearray(b"x" * 10)
        assert await get_pool().pread(fd, 1, buf) == 2
        assert buf == b"bc" + bytes(8)
        buf = bytearray(b"x" * 10)
        assert await get_pool().pread(fd, 50, buf) == 0
        assert buf == bytes(10)

    asyncio.run(main())


@pytest.mark.usefixtures("small_transfers")
def test_transfers_with_bad_arguments_raise_oserror(fd: int, tmp_path: Path) -> None:
    read_only = os.open(tmp_path, os.O_RDONLY)
    closed = 999_999

    async def main() -> None:
        pool = get_pool()
        for call, code in [
            (lambda: pool.pread(closed, 0, bytearray(8)), errno.EBADF),
            (lambda: pool.pwrite(closed, 0, b"12345678"), errno.EBADF),
            (lambda: pool.pread(read_only, 0, bytearray(8)), errno.EISDIR),
            (lambda: pool.pread(fd, -1, bytearray(8)), errno.EINVAL),
            (lambda: pool.pwrite(fd, 2**63 - 4, b"12345678"), errno.EINVAL),
            (lambda: pool.fdatasync(closed), errno.EBADF),
            (lambda: pool.fallocate(fd, 0, 0, 0), errno.EINVAL),
        ]:
            with pytest.raises(OSError, match=r".+") as caught:
                await call()
            assert caught.value.errno == code

    asyncio.run(main())
    os.close(read_only)


def test_pread_into_read_only_buffer_is_refused(fd: int) -> None:
    async def main() -> None:
        with pytest.raises((ValueError, TypeError, BufferError)):
            await get_pool().pread(fd, 0, bytes(8))

    asyncio.run(main())


def test_fallocate_punches_a_hole(fd: int) -> None:
    os.pwrite(fd, b"x" * 16384, 0)

    async def main() -> None:
        pool = get_pool()
        await pool.fallocate(fd, 1 | 2, 4096, 8192)
        await pool.fdatasync(fd)

    asyncio.run(main())
    assert os.pread(fd, 16384, 0) == b"x" * 4096 + bytes(8192) + b"x" * 4096


def test_direct_io_reads_an_unaligned_file_end(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"y" * 5000)
    try:
        fd = os.open(path, os.O_RDONLY | os.O_DIRECT)
    except OSError:
        pytest.skip("no O_DIRECT on this file system")

    async def main() -> None:
        buf = allocate_aligned(8192)
        assert await get_pool().pread(fd, 0, buf) == 5000
        assert bytes(buf) == b"y" * 5000 + bytes(3192)

    asyncio.run(main())
    os.close(fd)


@pytest.mark.usefixtures("small_transfers")
def test_many_transfers_at_once_each_get_their_own_result(fd: int) -> None:
    async def main() -> None:
        pool = get_pool()
        await asyncio.gather(*(pool.pwrite(fd, i * 100, i.to_bytes(4, "big") * 25) for i in range(1000)))
        bufs = [bytearray(100) for _ in range(1000)]
        await asyncio.gather(*(pool.pread(fd, i * 100, buf) for i, buf in enumerate(bufs)))
        assert all(buf == i.to_bytes(4, "big") * 25 for i, buf in enumerate(bufs))

    asyncio.run(main())


def test_cancelled_pwrite_returns_only_after_the_native_write(fd: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pool_module, "INLINE_MAX", -1)
    data = random.Random(2).randbytes(8 << 20)

    async def main() -> None:
        pool = get_pool()
        task = asyncio.ensure_future(pool.pwrite(fd, 0, data))
        await asyncio.sleep(0)
        task.cancel()
        await asyncio.sleep(0)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert not pool._pending
        assert os.pread(fd, len(data), 0) == data

    asyncio.run(main())


def test_pool_serves_its_loop_only(fd: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pool_module, "INLINE_MAX", -1)
    pool = Pool(1)

    async def detached() -> None:
        with pytest.raises(RuntimeError, match="not attached"):
            await pool.pread(fd, 0, bytearray(8))

    async def attached() -> None:
        pool.attach()
        with pytest.raises(RuntimeError, match="is attached"):
            pool.attach()
        assert await pool.pread(fd, 0, bytearray(8)) == 0
        pool.close()
        pool.close()
        with pytest.raises(RuntimeError, match="closed"):
            await pool.pread(fd, 0, bytearray(8))

    asyncio.run(detached())
    asyncio.run(attached())


def test_get_pool_is_one_per_loop_and_goes_with_it() -> None:
    seen: list[weakref.ref[Pool]] = []

    async def main() -> None:
        assert get_pool() is get_pool(asyncio.get_running_loop())
        seen.append(weakref.ref(get_pool()))

    asyncio.run(main())
    asyncio.run(main())
    gc.collect()
    assert seen[0]() is None or seen[0]() is not seen[1]()
    assert seen[0]() is None


def test_pool_dropped_with_work_under_way_waits_for_it(fd: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pool_module, "INLINE_MAX", -1)
    data = random.Random(3).randbytes(4 << 20)
    loop = asyncio.new_event_loop()

    async def begin() -> None:
        await get_pool().pwrite(fd, 0, data)

    async def once() -> None:
        task = asyncio.ensure_future(begin())
        await asyncio.sleep(0)
        task.get_coro().close()  # type: ignore[union-attr]

    loop.run_until_complete(once())
    close_pool(loop)
    assert os.pread(fd, len(data), 0) == data
    loop.close()


@pytest.mark.parametrize("threads", [0, -1, 5000], ids=["none", "negative", "too-many"])
def test_pool_with_impossible_threads_is_refused(threads: int) -> None:
    with pytest.raises(ValueError, match="threads must be"):
        Pool(threads)


def test_pools_of_several_loops_in_threads_share_workers(fd: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pool_module, "INLINE_MAX", -1)
    failures: list[BaseException] = []

    async def main(seed: int) -> None:
        pool = get_pool()
        for i in range(50):
            block = bytes([seed]) * 512
            await pool.pwrite(fd, (seed * 50 + i) * 512, block)
            buf = bytearray(512)
            await pool.pread(fd, (seed * 50 + i) * 512, buf)
            assert buf == block
        close_pool(asyncio.get_running_loop())

    def work(seed: int) -> None:
        try:
            asyncio.run(main(seed))
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures


def test_pool_in_forked_child_starts_anew(fd: int) -> None:
    async def main() -> int:
        return await get_pool().pwrite(fd, 0, b"z" * 100_000)

    assert asyncio.run(main()) == 100_000
    with warnings.catch_warnings():
        # Python 3.12 warns of forking with threads: what comes of it is what is tested.
        warnings.simplefilter("ignore", DeprecationWarning)
        child = os.fork()
    if child == 0:
        code = 1
        try:
            code = 0 if asyncio.run(main()) == 100_000 else 2
        finally:
            os._exit(code)
    assert os.waitpid(child, 0)[1] == 0

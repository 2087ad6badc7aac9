# SPDX-FileCopyrightText: blockgraph contributors
# SPDX-License-Identifier: MIT
"""file: what it reads, writes and tells of holes; how it opens; how it fails."""

from __future__ import annotations

import asyncio
import errno
import gc
import os
import socket
from collections.abc import Iterator
from contextlib import AbstractAsyncContextManager
from pathlib import Path
from typing import Any

import pytest
from helpers.harness import EVERYTHING, READ, WRITE, extents, hold, make_node, opened, read, write
from helpers.limits import files_end_at
from helpers.loop import backend_over, in_loop
from hypothesis import given, settings
from hypothesis import strategies as st

from blockgraph.backend import Backend
from blockgraph.errors import BlockGraphError, GraphError, IOFailure, NoSpace, OptionError, ReadOnly, Unsupported
from blockgraph.flags import Flag
from blockgraph.node import Child
from blockgraph.perm import NONE
from blockgraph.protocols.file import File
from blockgraph.testing import check_driver

KIB = 1024
MIB = 1024 * KIB


@pytest.fixture(params=["tmpfs", "disk"])
def folder(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """A directory on tmpfs, and one wherever temporary files live."""
    return request.getfixturevalue("tmpfs") if request.param == "tmpfs" else tmp_path


@pytest.fixture
def image(folder: Path) -> Path:
    path = folder / "image"
    path.write_bytes(os.urandom(256 * KIB))
    return path


def sparse(path: Path, size: int, *data: tuple[int, bytes]) -> Path:
    with path.open("wb") as file:
        for offset, contents in data:
            file.seek(offset)
            file.write(contents)
        file.truncate(size)
    return path


# Reading and writing.


async def _roundtrip(path: Path, **options: Any) -> None:
    model = bytearray(path.read_bytes())
    async with opened("file", filename=str(path), **options) as child:
        for offset, length in ((0, 1), (511, 2), (4096, 8192), (100_000, 100_001), (len(model) - 3, 3)):
            data = os.urandom(length)
            await write(child, offset, data)
            model[offset : offset + length] = data
            assert (
                await read(child, max(0, offset - 7), length) == model[max(0, offset - 7) : max(0, offset - 7) + length]
            )
        await child.flush()
        assert await read(child, 0, len(model)) == model
        assert child.node.size() == len(model)
    assert path.read_bytes() == model


@pytest.mark.parametrize("direct", [False, True], ids=["buffered", "direct"])
@pytest.mark.parametrize("size", [256 * KIB, 256 * KIB + 512, 256 * KIB + 13], ids=["even", "sectors", "odd"])
def test_file_write_then_read_agrees_with_file(folder: Path, size: int, direct: bool) -> None:
    path = folder / "image"
    path.write_bytes(os.urandom(size))
    asyncio.run(_roundtrip(path, cache={"direct": direct}))


@pytest.mark.parametrize("direct", [False, True], ids=["buffered", "direct"])
def test_file_read_past_end_gives_zeroes(folder: Path, direct: bool) -> None:
    path = folder / "image"
    path.write_bytes(b"x" * 1000)

    async def run() -> None:
        async with opened("file", filename=str(path), cache={"direct": direct}, need=READ) as child:
            assert await read(child, 990, 30) == b"x" * 10 + bytes(20)
            assert await read(child, 5000, 10) == bytes(10)

    asyncio.run(run())


@pytest.mark.parametrize("direct", [False, True], ids=["buffered", "direct"])
def test_file_write_past_end_grows_exactly(folder: Path, direct: bool) -> None:
    path = folder / "image"
    path.write_bytes(b"x" * 1000)

    async def run() -> None:
        async with opened("file", filename=str(path), cache={"direct": direct}) as child:
            await write(child, 70_000, b"y" * 5001)
            assert child.node.size() == 75_001
            await child.pwrite_zeroes(80_000, 1001)
            assert child.node.size() == 81_001
            await child.pwrite_zeroes(90_000, 1001, Flag.MAY_UNMAP)
            assert child.node.size() == 91_001

    asyncio.run(run())
    assert path.read_bytes() == b"x" * 1000 + bytes(69_000) + b"y" * 5001 + bytes(16_000)


def test_file_direct_concurrent_small_writes_around_end_keep_all(folder: Path) -> None:
    path = folder / "image"
    path.write_bytes(bytes(5 * KIB + 77))
    model = bytearray(path.stat().st_size)

    async def run() -> None:
        async with opened("file", filename=str(path), cache={"direct": True}) as child:
            for turn in range(20):
                pieces = []
                for start in range(0, len(model), 331):
                    data = bytes([turn + start % 200]) * min(331, len(model) - start)
                    model[start : start + len(data)] = data
                    pieces.append(write(child, start, data))
                await asyncio.gather(*pieces)
            assert await read(child, 0, len(model)) == model

    asyncio.run(run())
    assert path.read_bytes() == model


def test_file_direct_buffer_in_any_memory_works(folder: Path) -> None:
    path = sparse(folder / "image", 64 * KIB)

    async def run() -> None:
        async with opened("file", filename=str(path), cache={"direct": True}) as child:
            data = os.urandom(16 * KIB + 3)
            for shift in range(3):
                await child.pwrite(8 * KIB, memoryview(data)[shift : shift + 16 * KIB])
                back = memoryview(bytearray(16 * KIB + 3))[shift : shift + 16 * KIB]
                await child.pread(8 * KIB, back)
                assert bytes(back) == data[shift : shift + 16 * KIB]

    asyncio.run(run())


@pytest.mark.parametrize("direct", [False, True], ids=["buffered", "direct"])
@in_loop
async def test_file_on_tmpfs_conforms(tmpfs: Path, direct: bool) -> None:
    path = sparse(tmpfs / "image", 70_001)
    node = {"node-name": "it", "driver": "file", "filename": str(path), "cache": {"direct": direct}}

    def make() -> AbstractAsyncContextManager[Backend]:
        sparse(path, 70_001)
        return backend_over(node)

    await check_driver(make, size=70_001)


class FileModel:
    """A file is a bytearray that grows."""

    def __init__(self, size: int) -> None:
        self.data = bytearray(size)

    def write(self, offset: int, data: bytes) -> None:
        self.data.extend(bytes(max(0, offset + len(data) - len(self.data))))
        self.data[offset : offset + len(data)] = data

    def truncate(self, size: int) -> None:
        del self.data[size:]
        self.data.extend(bytes(size - len(self.data)))


_RANGE = st.tuples(st.integers(0, 40_000), st.integers(1, 20_000))
_STEPS = st.lists(
    st.one_of(
        st.tuples(st.just("write"), _RANGE),
        st.tuples(st.just("zero"), _RANGE),
        st.tuples(st.just("unmap"), _RANGE),
        st.tuples(st.just("truncate"), _RANGE),
        st.tuples(st.just("flush"), _RANGE),
    ),
    max_size=12,
)


@pytest.mark.parametrize("direct", [False, True], ids=["buffered", "direct"])
@settings(max_examples=40, deadline=None)
@given(size=st.integers(0, 50_000), steps=_STEPS)
def test_file_any_sequence_of_requests_behaves_as_bytearray(
    tmp_path_factory: pytest.TempPathFactory, direct: bool, size: int, steps: list[tuple[str, tuple[int, int]]]
) -> None:
    path = sparse(tmp_path_factory.getbasetemp() / f"any-{direct}", size)
    model = FileModel(size)

    async def run() -> None:
        async with opened("file", filename=str(path), cache={"direct": direct}) as child:
            for number, (step, (offset, length)) in enumerate(steps):
                if step == "write":
                    data = bytes([number + 1]) * length
                    await write(child, offset, data)
                    model.write(offset, data)
                elif step in ("zero", "unmap"):
                    await child.pwrite_zeroes(offset, length, Flag.MAY_UNMAP if step == "unmap" else Flag.NONE)
                    model.write(offset, bytes(length))
                elif step == "truncate":
                    await child.truncate(offset)
                    model.truncate(offset)
                else:
                    await child.flush()
                assert child.node.size() == len(model.data)
                assert await read(child, 0, 60_000) == model.data + bytes(60_000 - len(model.data))
                for start, run_length, kind in await extents(child):
                    if kind == "zero":
                        assert not any(model.data[start : start + run_length])

    asyncio.run(run())
    assert path.read_bytes() == model.data


# Holes.


def test_file_status_tells_data_and_holes(folder: Path) -> None:
    path = sparse(folder / "image", 4 * MIB, (MIB, b"d" * MIB), (3 * MIB, b"e" * (64 * KIB)))

    async def run() -> None:
        async with opened("file", filename=str(path), need=READ) as child:
            assert await extents(child) == [
                (0, MIB, "zero"),
                (MIB, MIB, "data"),
                (2 * MIB, MIB, "zero"),
                (3 * MIB, 64 * KIB, "data"),
                (3 * MIB + 64 * KIB, MIB - 64 * KIB, "zero"),
            ]
            status = await child.block_status(MIB + 5, MIB)
            assert (status.host, status.host_offset, status.node) == (child.node, MIB + 5, child.node)

    asyncio.run(run())


def test_file_discard_and_unmap_make_holes_where_data_was_cached(folder: Path) -> None:
    path = folder / "image"
    path.write_bytes(b"d" * (4 * MIB))

    async def run() -> None:
        async with opened("file", filename=str(path)) as child:
            assert await extents(child) == [(0, 4 * MIB, "data")]
            await child.discard(MIB, MIB)
            assert await extents(child) == [(0, MIB, "data"), (MIB, MIB, "zero"), (2 * MIB, 2 * MIB, "data")]
            await child.pwrite_zeroes(3 * MIB, MIB, Flag.MAY_UNMAP)
            assert (await extents(child))[-1] == (3 * MIB, MIB, "zero")
            assert await read(child, MIB, MIB) == bytes(MIB)
            await child.truncate(5 * MIB)
            await child.truncate(3 * MIB)
            await child.truncate(4 * MIB)
            assert await read(child, 3 * MIB, MIB) == bytes(MIB)

    before = path.stat().st_blocks
    asyncio.run(run())
    assert path.stat().st_blocks <= before * 3 // 4


def test_file_write_into_hole_is_data_at_once(folder: Path) -> None:
    path = sparse(folder / "image", MIB)

    async def run() -> None:
        async with opened("file", filename=str(path)) as child:
            assert await extents(child) == [(0, MIB, "zero")]
            await write(child, 512 * KIB, b"d" * (64 * KIB))
            assert (512 * KIB, 64 * KIB, "data") in await extents(child)

    asyncio.run(run())


def test_file_zeroes_without_unmap_keep_storage(folder: Path) -> None:
    path = folder / "image"
    path.write_bytes(b"d" * MIB)
    before = path.stat().st_blocks

    async def run() -> None:
        async with opened("file", filename=str(path)) as child:
            await child.pwrite_zeroes(0, MIB)
            assert await read(child, 0, MIB) == bytes(MIB)

    asyncio.run(run())
    assert path.stat().st_blocks >= before


def take_fallocate_away(child: Child, monkeypatch: pytest.MonkeyPatch) -> None:
    async def refuse(fd: int, mode: int, offset: int, length: int) -> None:
        raise OSError(errno.EOPNOTSUPP, os.strerror(errno.EOPNOTSUPP))

    assert isinstance(child.node.driver, File)
    monkeypatch.setattr(child.node.driver._pool, "fallocate", refuse)


def test_file_without_fallocate_writes_zeroes_unless_forbidden(image: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async def run() -> None:
        async with opened("file", filename=str(image)) as child:
            take_fallocate_away(child, monkeypatch)
            before = await read(child, 0, 256 * KIB)
            for flags in (Flag.NO_FALLBACK, Flag.NO_FALLBACK | Flag.MAY_UNMAP):
                with pytest.raises(Unsupported):
                    await child.pwrite_zeroes(0, 64 * KIB, flags)
            assert await read(child, 0, 256 * KIB) == before
            await child.pwrite_zeroes(0, 64 * KIB, Flag.MAY_UNMAP)
            await child.discard(64 * KIB, 64 * KIB)  # advisory: ignored
            assert await read(child, 0, 256 * KIB) == bytes(64 * KIB) + before[64 * KIB :]
            await child.pwrite_zeroes(256 * KIB, 64 * KIB, Flag.MAY_UNMAP)
            assert child.node.size() == 320 * KIB

    asyncio.run(run())


def test_file_that_can_not_tell_holes_is_data(image: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def lseek(fd: int, offset: int, whence: int) -> int:
        raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))

    async def run() -> None:
        async with opened("file", filename=str(image), need=READ) as child:
            monkeypatch.setattr(os, "lseek", lseek)
            assert await extents(child) == [(0, 256 * KIB, "data")]

    asyncio.run(run())


# Failures.


@pytest.fixture
def largest_file() -> Iterator[int]:
    """A limit of 1 MiB on the size of files."""
    with files_end_at(MIB):
        yield MIB


def test_file_write_past_resource_limit_is_nospace_and_size_stays_true(folder: Path, largest_file: int) -> None:
    path = sparse(folder / "image", 64 * KIB)

    async def run() -> None:
        async with opened("file", name="disk", filename=str(path)) as child:
            with pytest.raises(NoSpace) as caught:
                await write(child, largest_file + 1, b"x")
            assert caught.value.errno == errno.EFBIG
            assert str(path) in str(caught.value)
            assert "node 'disk'" in str(caught.value)
            with pytest.raises(NoSpace):
                await write(child, largest_file - 8, b"y" * 16)
            assert child.node.size() == path.stat().st_size
            with pytest.raises(NoSpace):
                await child.truncate(largest_file + 1)
            assert child.node.size() == path.stat().st_size

    asyncio.run(run())


async def fill(child: Child) -> None:
    for offset in range(0, child.node.size(), 256 * KIB):
        await write(child, offset, b"x" * (256 * KIB))


def test_file_full_file_system_is_nospace_with_remedy(small_tmpfs: Path) -> None:
    path = sparse(small_tmpfs / "image", 4 * MIB)

    async def run() -> None:
        async with opened("file", name="disk", filename=str(path)) as child:
            with pytest.raises(NoSpace) as caught:
                await fill(child)
            assert "free space" in str(caught.value)
            assert caught.value.node == "disk"
            with pytest.raises(NoSpace):
                await child.pwrite_zeroes(0, 4 * MIB)
            await child.discard(0, 4 * MIB)
            await write(child, 0, b"x" * (256 * KIB))

    asyncio.run(run())


def test_file_failed_flush_stays_failed(image: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async def run() -> None:
        async with opened("file", filename=str(image)) as child:
            driver = child.node.driver
            assert isinstance(driver, File)

            async def fail(fd: int) -> None:
                raise OSError(errno.EIO, os.strerror(errno.EIO))

            await write(child, 0, b"x")
            with monkeypatch.context() as patch:
                patch.setattr(driver._pool, "fdatasync", fail)
                with pytest.raises(IOFailure, match="flush"):
                    await child.flush()
            with pytest.raises(IOFailure, match="flush"):
                await child.flush()

    asyncio.run(run())


def test_file_cancelled_write_leaves_true_size(folder: Path) -> None:
    path = sparse(folder / "image", KIB)

    async def run() -> None:
        async with opened("file", filename=str(path)) as child:
            task = asyncio.create_task(write(child, 0, b"x" * (32 * MIB)))
            await asyncio.sleep(0)
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)
            assert child.node.size() == path.stat().st_size

    asyncio.run(run())


def test_file_cancelled_truncate_has_happened(folder: Path) -> None:
    path = sparse(folder / "image", KIB)

    async def run() -> None:
        async with opened("file", filename=str(path)) as child:
            task = asyncio.create_task(child.truncate(MIB))
            await asyncio.sleep(0)
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)
            assert child.node.size() == path.stat().st_size

    asyncio.run(run())


# Opening.


async def _refused(path: Path | str, **options: Any) -> BlockGraphError:
    with pytest.raises(BlockGraphError) as caught:
        async with opened("file", name="disk", filename=str(path), **options):
            pass
    assert caught.value.node == "disk"
    assert len(str(caught.value).splitlines()) <= 2
    return caught.value


def test_file_missing_is_refused_with_name_and_remedy(tmp_path: Path) -> None:
    error = asyncio.run(_refused(tmp_path / "absent"))
    assert error.errno == errno.ENOENT
    assert str(tmp_path / "absent") in str(error)
    assert "check 'filename'" in str(error)


@pytest.mark.parametrize(
    "kind, says",
    [("directory", "a directory"), ("fifo", "a fifo"), ("socket", "a socket"), ("device", "host_device")],
)
def test_file_of_wrong_kind_is_refused(tmp_path: Path, kind: str, says: str) -> None:
    path = tmp_path / "odd"
    server = socket.socket(socket.AF_UNIX)
    if kind == "directory":
        path.mkdir()
    elif kind == "fifo":
        os.mkfifo(path)
    elif kind == "socket":
        server.bind(str(path))
    else:
        path = Path("/dev/null")
    server.close()
    error = asyncio.run(_refused(path))
    assert isinstance(error, GraphError)
    assert says in str(error)
    assert str(path) in str(error)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may open everything")
def test_file_without_permission_is_refused(image: Path) -> None:
    image.chmod(0o400)
    error = asyncio.run(_refused(image))
    assert error.errno == errno.EACCES
    assert "set read-only" in str(error)


def test_file_open_failure_of_the_system_names_file_and_remedy(image: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(path: str, flags: int) -> int:
        raise OSError(code, os.strerror(code), path)

    for code, says in ((errno.EACCES, "set read-only"), (errno.EROFS, "read-only"), (errno.EMFILE, "ulimit")):
        with monkeypatch.context() as patch:
            patch.setattr("blockgraph.protocols.descriptor.os.open", refuse)
            error = asyncio.run(_refused(image))
        assert error.errno == code
        assert says in str(error)
        assert str(image) in str(error)


def test_file_force_share_without_read_only_is_refused(image: Path) -> None:
    error = asyncio.run(_refused(image, force_share=True))
    assert isinstance(error, OptionError)
    assert error.path == "force-share"


def test_file_close_releases_descriptors(image: Path) -> None:
    async def run() -> None:
        async with opened("file", filename=str(image)):
            pass  # the pool's own descriptors appear
        gc.collect()  # those of graphs that other tests have left go
        before = os.listdir("/proc/self/fd")
        async with opened("file", filename=str(image), cache={"direct": True}) as child:
            await write(child, 256 * KIB - 1, b"xy")
            assert child.node.driver.fd() is not None
        assert child.node.driver.fd() is None
        assert os.listdir("/proc/self/fd") == before
        await _refused(image / "absent")
        assert os.listdir("/proc/self/fd") == before

    asyncio.run(run())


def test_file_cancelled_open_leaves_no_descriptor(image: Path) -> None:
    async def run() -> None:
        async with opened("file", filename=str(image)):
            pass  # the pool's own descriptors appear
        gc.collect()  # those of graphs that other tests have left go
        before = os.listdir("/proc/self/fd")
        for step in ("open", "hold"):
            node = make_node("file", filename=str(image))
            if step == "hold":
                await node.driver.open()
            task = asyncio.create_task(node.driver.open() if step == "open" else hold(node, EVERYTHING))
            await asyncio.sleep(0)
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
            await node.driver.close()
            assert os.listdir("/proc/self/fd") == before

    asyncio.run(run())


# Permissions.


def _mode(child: Child) -> int:
    fd = child.node.driver.fd()
    assert fd is not None
    return int(Path(f"/proc/self/fdinfo/{fd}").read_text().split("flags:")[1].split()[0], 8) & os.O_ACCMODE


def test_file_auto_read_only_writable_only_while_needed(image: Path) -> None:
    async def run() -> None:
        async with opened("file", filename=str(image), auto_read_only=True, need=READ) as child:
            node, fd = child.node, child.node.driver.fd()
            assert _mode(child) == os.O_RDONLY
            await hold(node, WRITE)
            assert _mode(child) == os.O_RDWR
            child.need = WRITE
            await write(child, 0, b"new")
            await child.flush()
            await hold(node, READ)
            assert _mode(child) == os.O_RDONLY
            assert await read(child, 0, 3) == b"new"
            assert node.driver.fd() == fd

    asyncio.run(run())


def test_file_auto_read_only_refused_upgrade_leaves_it_readable(image: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async def run() -> None:
        async with opened("file", name="disk", filename=str(image), auto_read_only=True, need=READ) as child:
            with monkeypatch.context() as patch:
                real = os.open

                def refuse(path: str, flags: int) -> int:
                    if flags & os.O_RDWR:
                        raise OSError(errno.EACCES, os.strerror(errno.EACCES), path)
                    return real(path, flags)

                patch.setattr("blockgraph.protocols.descriptor.os.open", refuse)
                with pytest.raises(IOFailure, match="write") as caught:
                    await hold(child.node, WRITE)
            assert str(image) in str(caught.value)
            assert _mode(child) == os.O_RDONLY
            assert len(await read(child, 0, 100)) == 100
            await hold(child.node, WRITE)
            assert _mode(child) == os.O_RDWR

    asyncio.run(run())


def test_file_upgrade_reaches_the_same_file_after_rename(image: Path) -> None:
    async def run() -> None:
        async with opened("file", filename=str(image), auto_read_only=True, need=READ) as child:
            image.rename(image.with_suffix(".old"))
            image.write_bytes(b"another file")
            await hold(child.node, EVERYTHING)
            child.need = EVERYTHING
            await write(child, 0, b"here")

    asyncio.run(run())
    assert image.read_bytes() == b"another file"
    assert image.with_suffix(".old").read_bytes()[:4] == b"here"


def test_file_read_only_refuses_writes(image: Path) -> None:
    async def run() -> None:
        async with opened("file", filename=str(image), read_only=True, need=READ) as child:
            child.need = EVERYTHING
            with pytest.raises(ReadOnly):
                await write(child, 0, b"x")
            assert _mode(child) == os.O_RDONLY

    asyncio.run(run())


@pytest.mark.parametrize("direct", [False, True], ids=["buffered", "direct"])
def test_file_reopen_changes_mode_and_cache(image: Path, direct: bool) -> None:
    async def run() -> None:
        async with opened("file", filename=str(image), read_only=True, cache={"direct": direct}, need=READ) as child:
            node, fd = child.node, child.node.driver.fd()
            new = make_node("file", filename=str(image), cache={"direct": not direct}).options
            node.driver.reopen_check(new)
            await node.driver.prepare_perm(EVERYTHING, EVERYTHING)
            node.options, node.read_only = new, False
            node.driver.reopened(new)
            node.driver.commit_perm()
            child.need = EVERYTHING
            assert _mode(child) == os.O_RDWR
            assert (node.driver.request_alignment == 1) is direct
            assert node.driver.fd() == fd
            await write(child, 1, b"reopened")
            assert await read(child, 1, 8) == b"reopened"
            with pytest.raises(OptionError, match="filename"):
                node.driver.reopen_check(make_node("file", filename="another").options)

    asyncio.run(run())


def test_file_without_parents_holds_nothing(image: Path) -> None:
    async def run() -> None:
        async with opened("file", filename=str(image), need=NONE) as first, opened("file", "m", filename=str(image)):
            assert first.node.size() == 256 * KIB

    asyncio.run(run())

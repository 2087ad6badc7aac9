# SPDX-FileCopyrightText: blockgraph contributors
# SPDX-License-Identifier: MIT
"""Image locks: the bytes that are locked, conflicts between opens, and what happens without lock support."""

from __future__ import annotations

import asyncio
import errno
import fcntl
import itertools
import os
import struct
import subprocess
from pathlib import Path

import pytest
from helpers.harness import EVERYTHING, READ, WRITE, hold, opened
from hypothesis import given, settings
from hypothesis import strategies as st

from blockgraph.errors import GraphError
from blockgraph.perm import ALL, NONE, Perm
from blockgraph.protocols.file import File
from blockgraph.protocols.locks import ImageLock, LockConflict

FLOCK = struct.Struct("hhqqi0q")
PERMS = [Perm(value) for value in range(16)]


@pytest.fixture
def image(tmp_path: Path) -> Path:
    path = tmp_path / "image"
    path.write_bytes(bytes(4096))
    return path


def locked_bytes(path: Path) -> set[int]:
    """Offsets of the bytes that somebody has locked."""
    fd = os.open(path, os.O_RDONLY)
    try:
        return {
            offset
            for offset in range(95, 215)
            if FLOCK.unpack(fcntl.fcntl(fd, fcntl.F_OFD_GETLK, FLOCK.pack(fcntl.F_WRLCK, 0, offset, 1, 0)))[0]
            != fcntl.F_UNLCK
        }
    finally:
        os.close(fd)


def expected_bytes(need: Perm, share: Perm) -> set[int]:
    """The layout, as QEMU documents it."""
    return {100 + bit for bit in range(4) if need >> bit & 1} | {200 + bit for bit in range(4) if not share >> bit & 1}


@pytest.mark.parametrize("read_only", [False, True], ids=["writable", "read-only"])
def test_locks_bytes_are_qemus(image: Path, read_only: bool) -> None:
    async def run() -> None:
        needs = [NONE, READ] if read_only else [NONE, READ, WRITE, EVERYTHING, ALL]
        for need, share in itertools.product(needs, [ALL, NONE, READ, ALL & ~Perm.RESIZE]):
            async with opened("file", filename=str(image), read_only=read_only, need=need, share=share):
                assert locked_bytes(image) == expected_bytes(need, share)
            assert locked_bytes(image) == set()

    asyncio.run(run())


def test_locks_follow_changes_of_permissions(image: Path) -> None:
    async def run() -> None:
        async with opened("file", filename=str(image), auto_read_only=True, need=READ) as child:
            node = child.node
            for need, share in ((EVERYTHING, READ), (WRITE, ALL), (READ, NONE), (NONE, ALL), (ALL, NONE)):
                await hold(node, need, share)
                assert locked_bytes(image) == expected_bytes(need, share)
            await node.driver.prepare_perm(READ, ALL & ~Perm.RESIZE)
            assert locked_bytes(image) == expected_bytes(ALL, NONE), "kept until commit"
            node.driver.abort_perm()
            assert locked_bytes(image) == expected_bytes(ALL, NONE)

    asyncio.run(run())


def test_locks_of_refused_upgrade_go_back(image: Path) -> None:
    async def run() -> None:
        async with (
            opened("file", "first", filename=str(image), need=READ, share=ALL & ~Perm.WRITE),
            opened("file", "second", filename=str(image), auto_read_only=True, need=READ) as child,
        ):
            before = locked_bytes(image)
            with pytest.raises(GraphError, match="does not share 'write'") as caught:
                await hold(child.node, EVERYTHING, READ)
            assert caught.value.node == "second"
            assert str(image) in str(caught.value)
            assert "force-share" in str(caught.value)
            assert locked_bytes(image) == before

    asyncio.run(run())


def test_locks_of_force_share_let_all_others_write(image: Path) -> None:
    async def run() -> None:
        async with (
            opened("file", "writer", filename=str(image), need=EVERYTHING, share=READ),
            opened("file", "reader", filename=str(image), read_only=True, force_share=True, need=READ, share=READ),
        ):
            assert 201 in locked_bytes(image)

    asyncio.run(run())


def test_locks_off_are_not_taken(image: Path) -> None:
    async def run() -> None:
        async with (
            opened("file", filename=str(image), locking="off", need=EVERYTHING, share=NONE),
            opened("file", "m", filename=str(image), locking="off", need=EVERYTHING, share=NONE),
        ):
            assert locked_bytes(image) == set()

    asyncio.run(run())


@pytest.mark.parametrize("code", [errno.ENOLCK, errno.EOPNOTSUPP, errno.EINVAL])
@pytest.mark.parametrize("locking", ["auto", "on"])
def test_locks_not_supported_warns_or_refuses(
    image: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, locking: str, code: int
) -> None:
    real = fcntl.fcntl

    def refuse(fd: int, command: int, argument: int | bytes = 0) -> int | bytes:
        if command == fcntl.F_OFD_SETLK:
            raise OSError(code, os.strerror(code))
        return real(fd, command, argument)

    monkeypatch.setattr(fcntl, "fcntl", refuse)

    async def run() -> None:
        async with opened("file", "disk", filename=str(image), locking=locking):
            pass

    if locking == "on":
        with pytest.raises(GraphError, match="locking to 'off'"):
            asyncio.run(run())
    else:
        asyncio.run(run())
        assert str(image) in caplog.text


def test_locks_write_locked_by_stranger_is_conflict(image: Path) -> None:
    fd = os.open(image, os.O_RDWR)
    fcntl.fcntl(fd, fcntl.F_OFD_SETLK, FLOCK.pack(fcntl.F_WRLCK, 0, 0, 0, 0))

    async def run() -> None:
        with pytest.raises(GraphError, match="is locked"):
            async with opened("file", filename=str(image)):
                pass

    try:
        asyncio.run(run())
    finally:
        os.close(fd)


def test_locks_survive_another_open_and_close_of_the_file(image: Path) -> None:
    """POSIX locks would be lost here."""

    async def run() -> None:
        async with opened("file", filename=str(image)):
            before = locked_bytes(image)
            image.read_bytes()
            assert locked_bytes(image) == before

    asyncio.run(run())


def test_locks_are_released_though_a_child_process_has_the_descriptor(image: Path) -> None:
    async def run() -> None:
        async with opened("file", filename=str(image), need=EVERYTHING, share=NONE) as child:
            driver = child.node.driver
            assert isinstance(driver, File)
            assert driver._lock is not None
            heir = await asyncio.create_subprocess_exec("cat", stdin=subprocess.PIPE, pass_fds=[driver._lock._fd])
            assert locked_bytes(image) == expected_bytes(EVERYTHING, NONE)
        assert locked_bytes(image) == set()
        await heir.communicate(b"")

    asyncio.run(run())


_CHANGE = st.tuples(st.integers(0, 2), st.sampled_from(PERMS), st.sampled_from(PERMS), st.booleans())


@settings(deadline=None, max_examples=60)
@given(changes=st.lists(_CHANGE, max_size=15))
def test_locks_of_several_opens_agree_with_permission_rules(
    tmp_path_factory: pytest.TempPathFactory, changes: list[tuple[int, Perm, Perm, bool]]
) -> None:
    path = tmp_path_factory.getbasetemp() / "shared"
    path.touch()
    locks = [ImageLock(os.open(path, os.O_RDONLY)) for _ in range(3)]
    held = [(NONE, ALL)] * 3
    try:
        for who, need, share, commit in changes:
            others = [held[other] for other in range(3) if other != who]
            gives_up_only = not need & ~held[who][0] and not held[who][1] & ~share
            allowed = gives_up_only or not any(need & ~theirs[1] or theirs[0] & ~share for theirs in others)
            try:
                locks[who].prepare(need, share)
            except LockConflict:
                assert not allowed
                locks[who].abort()
            else:
                assert allowed
                if commit:
                    locks[who].commit()
                    held[who] = (need, share)
                else:
                    locks[who].abort()
            assert locked_bytes(path) == set().union(*(expected_bytes(*each) for each in held))
    finally:
        for lock in locks:
            lock.release()
    assert locked_bytes(path) == set()

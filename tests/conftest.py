# SPDX-FileCopyrightText: blockgraph contributors
# SPDX-License-Identifier: MIT
"""Fixtures for every test."""

from __future__ import annotations

import faulthandler
import os
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Generator, Iterator
from pathlib import Path

import pytest
from _pytest.assertion import util
from hypothesis import settings

# What a test runs imports the package that is installed, as the test does, not the sources in the current directory.
os.environ["PYTHONSAFEPATH"] = "1"

# How long an example takes is the machine's business.
settings.register_profile("blockgraph", deadline=None)
settings.load_profile("blockgraph")

_stderr = pytest.StashKey[int]()


def pytest_configure(config: pytest.Config) -> None:
    """Output is not captured here."""
    config.stash[_stderr] = os.dup(2)


def pytest_unconfigure(config: pytest.Config) -> None:
    os.close(config.stash[_stderr])


@pytest.hookimpl(trylast=True)
def pytest_exception_interact(node: pytest.Item | pytest.Collector) -> None:
    """With a failure pytest and pytest-timeout give up their limits, for debuggers; but the teardown may hang too."""
    if isinstance(node, pytest.Item):
        limit = float(node.config.getini("faulthandler_timeout"))
        faulthandler.dump_traceback_later(limit, file=node.config.stash[_stderr], exit=True)


@pytest.hookimpl(wrapper=True, trylast=True)
def pytest_runtest_protocol(item: pytest.Item) -> Generator[None, object, object]:
    """Where CI is set pytest shows a full diff, which takes hours for the contents of two disks."""
    explain = util._reprcompare
    assert explain is not None

    def compare(op: str, left: object, right: object) -> str | None:
        kinds = (bytes, bytearray, memoryview)
        if op == "==" and isinstance(left, kinds) and isinstance(right, kinds) and max(len(left), len(right)) > 1000:
            return _difference(bytes(left), bytes(right)).replace("%", "%%")
        return explain(op, left, right)

    util._reprcompare = compare
    return (yield)


def _difference(left: bytes, right: bytes) -> str:
    """In sectors of 512 bytes."""
    text = f"{len(left)} bytes == {len(right)} bytes"
    length = min(len(left), len(right))
    left, right = left[:length], right[:length]
    sectors = [at for at in range(0, length, 512) if left[at : at + 512] != right[at : at + 512]]
    if sectors:
        first = next(at for at in range(sectors[0], length) if left[at] != right[at])
        ends = f"sector {sectors[0] // 512} to {sectors[-1] // 512}"
        here = f"at {first}: {left[first : first + 16]!r} != {right[first : first + 16]!r}"
        text += f"\n~{len(sectors)} sectors differ, {ends}, {here}"
    return text


def _missing(what: str) -> None:
    """Skip the test, or fail it where everything has to be there."""
    if os.environ.get("CI"):
        pytest.fail(f"{what} is missing; .ci/run must provide it")
    pytest.skip(f"{what} is missing")


def require_tool(name: str) -> str:
    """Path of an external program; skips without it, fails in CI. To be imported from tests.conftest."""
    found = shutil.which(name, path=os.environ.get("PATH", "") + ":/usr/sbin:/sbin")
    if found is None:
        _missing(f"program '{name}'")
    assert found is not None
    return found


@pytest.fixture(name="require_tool")
def _require_tool() -> Callable[[str], str]:
    """The same as a fixture."""
    return require_tool


@pytest.fixture
def tmpfs() -> Iterator[Path]:
    """A directory on a tmpfs."""
    if not Path("/dev/shm").is_dir():
        _missing("/dev/shm")
    with tempfile.TemporaryDirectory(prefix="blockgraph-", dir="/dev/shm") as directory:
        yield Path(directory)


@pytest.fixture
def small_tmpfs(tmp_path: Path) -> Iterator[Path]:
    """A tmpfs of 1 MiB of its own. Mounting needs root: skips without it, in CI too (containers may forbid it)."""
    directory = tmp_path / "small"
    directory.mkdir()
    mount = shutil.which("mount")
    if os.geteuid() or mount is None:
        pytest.skip("mounting needs root")
    done = subprocess.run([mount, "-t", "tmpfs", "-o", "size=1m", "tmpfs", directory], capture_output=True, check=False)
    if done.returncode:
        pytest.skip("mounting is forbidden here")
    try:
        yield directory
    finally:
        subprocess.run(["umount", directory], check=True)


@pytest.fixture
def loop_device(tmp_path: Path) -> Iterator[Callable[[int], str]]:
    """Makes loop devices of so many bytes. Needs root and the loop driver: skips without them, in CI too."""
    losetup = shutil.which("losetup", path=os.environ.get("PATH", "") + ":/usr/sbin:/sbin")
    if os.geteuid() or losetup is None:
        pytest.skip("loop devices need root")
    made: list[str] = []

    def make(size: int, *options: str) -> str:
        image = tmp_path / f"loop{len(made)}.img"
        with image.open("wb") as file:
            file.truncate(size)
        done = subprocess.run(
            [losetup, "--find", "--show", *options, image], capture_output=True, text=True, check=False
        )
        if done.returncode:
            pytest.skip(f"no loop device: {done.stderr.strip()}")
        made.append(done.stdout.strip())
        return made[-1]

    try:
        yield make
    finally:
        for device in made:
            subprocess.run([losetup, "--detach", device], check=True)


@pytest.fixture(params=["btrfs", "xfs"])
def reflinks(request: pytest.FixtureRequest, tmp_path: Path, loop_device: Callable[[int], str]) -> Iterator[Path]:
    """A directory on a file system whose files can share blocks. Mounting needs root: skips without it, in CI too."""
    make = require_tool(f"mkfs.{request.param}")
    device, directory = loop_device(512 << 20), tmp_path / "reflinks"
    directory.mkdir()
    subprocess.run([make, "-q", device], check=True)
    done = subprocess.run(["mount", device, directory], capture_output=True, text=True, check=False)
    if done.returncode:
        pytest.skip(f"no {request.param} here: {done.stderr.strip()}")
    try:
        yield directory
    finally:
        subprocess.run(["umount", directory], check=True)

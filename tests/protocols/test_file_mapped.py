# SPDX-FileCopyrightText: blockgraph contributors
# SPDX-License-Identifier: MIT
"""Files in memory, read and written where they are mapped: the same bytes, whatever becomes of the file meanwhile."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
from pathlib import Path

import pytest

import blockgraph
from blockgraph.api import SyncBackend, SyncGraph
from blockgraph.native import Windows

MIB = 1 << 20
SIZE = 4 * MIB

#: The shortest write that is worth it when nobody else writes.
LONG = 16 << 10


@pytest.fixture
def image(tmpfs: Path) -> Path:
    """Data, a hole, data."""
    path = tmpfs / "disk"
    path.write_bytes(random.Random(1).randbytes(SIZE))
    with path.open("r+b") as file:
        file.truncate(MIB)
        file.truncate(2 * SIZE)
        os.pwrite(file.fileno(), random.Random(2).randbytes(SIZE), SIZE)
    return path


def opened(path: Path, **options: object) -> SyncGraph:
    """A graph of it."""
    file = {"driver": "file", "node-name": "file", "filename": str(path), **options}
    return blockgraph.open({"nodes": [{"driver": "raw", "node-name": "disk", "file": file}]})


def mappings(path: Path) -> list[str]:
    """How what may be accessed of the file is mapped in this process: "rw-s"."""
    lines = Path("/proc/self/maps").read_text().splitlines()
    found = [line.split()[1] for line in lines if line.endswith(str(path))]
    return [how for how in found if how != "---s"]


def warm(disk: SyncBackend, offset: int = 0) -> None:
    """Have the place known, and tried although holes were found."""
    for _ in range(100):
        disk.pwrite(offset, disk.pread(offset, LONG))


def test_what_is_written_and_read_is_the_same_as_without(image: Path) -> None:
    model = bytearray(image.read_bytes())
    blocks = image.stat().st_blocks
    source = random.Random(3)
    with opened(image) as graph:
        disk = graph.backend("disk", writable=True)
        for _ in range(2000):
            length = source.choice([1, 512, 4096, 5000, 65536, 300_000])
            at = source.choice([0, SIZE]) + source.randrange(MIB - length)
            if source.random() < 0.5:
                model[at : at + length] = data = source.randbytes(length)
                disk.pwrite(at, data)
            assert disk.pread(at, length) == model[at : at + length]
        assert disk.pread(0, len(model)) == model
        assert mappings(image) == ["rw-s"]
    assert image.read_bytes() == model
    assert image.stat().st_blocks == blocks
    assert mappings(image) == []


def test_who_does_not_want_it_has_no_mapping(image: Path) -> None:
    with opened(image, mapped=False) as graph:
        warm(graph.backend("disk", writable=True))
        assert mappings(image) == []


def test_a_file_that_is_only_read_is_mapped_for_reading(image: Path) -> None:
    with opened(image, **{"read-only": True}) as graph:
        disk = graph.backend("disk")
        for _ in range(3):
            disk.pread(0, MIB)
        assert mappings(image) == ["r--s"]


def test_a_file_that_becomes_writable_is_mapped_for_that(image: Path) -> None:
    with opened(image, **{"auto-read-only": True}) as graph:
        reader = graph.backend("disk")
        for _ in range(3):
            reader.pread(0, MIB)
        assert mappings(image) == ["r--s"]
        warm(graph.backend("disk", writable=True))
        assert sorted(mappings(image)) == ["r--s", "rw-s"]
    assert mappings(image) == []


def test_the_file_tells_when_it_was_written_after_a_flush_and_at_the_end(image: Path) -> None:
    with opened(image) as graph:
        disk = graph.backend("disk", writable=True)
        warm(disk)
        disk.pwrite(0, b"w" * LONG)
        os.utime(image, (1, 1))
        disk.pwrite(0, b"x" * LONG)
        assert image.stat().st_mtime == 1  # else it was not written where it is mapped
        disk.flush()
        assert image.stat().st_mtime > 1
        os.utime(image, (1, 1))
        disk.flush()
        assert image.stat().st_mtime == 1
        disk.pwrite(0, b"y" * LONG)
        assert image.stat().st_mtime > 1
        os.utime(image, (1, 1))
        disk.pwrite(0, b"z" * LONG)
    assert image.stat().st_mtime > 1


def test_short_writes_that_meet_no_other_are_left_to_the_kernel(image: Path) -> None:
    with opened(image) as graph:
        disk = graph.backend("disk", writable=True)
        warm(disk)
        os.utime(image, (1, 1))
        disk.pwrite(0, b"w" * (LONG - 1))
        assert image.stat().st_mtime > 1
        os.utime(image, (1, 1))
        disk.pwrite(0, b"x" * LONG)
        assert image.stat().st_mtime == 1


def script(image: Path, then: str, first: str = "") -> int:
    """Run what opens the image as `disk`, in a process of its own. Returns its exit code."""
    node = {"driver": "raw", "node-name": "disk", "file": {"driver": "file", "filename": str(image)}}
    text = f"""
import mmap, os, signal, blockgraph
{first}
graph = blockgraph.open({{"nodes": [{node!r}]}})
disk = graph.backend("disk", writable=True)
for _ in range(100):
    disk.pread(0, {LONG})
{then}
"""
    return subprocess.run([sys.executable, "-c", text], check=False, timeout=60).returncode


def test_who_was_killed_right_after_a_write_has_changed_the_file_s_times(image: Path) -> None:
    """A bitmap's sidecar knows by them that somebody else has written."""
    before = image.stat()
    assert script(image, "os.kill(os.getpid(), signal.SIGKILL)") == -signal.SIGKILL
    assert (image.stat().st_mtime_ns, image.stat().st_ctime_ns) == (before.st_mtime_ns, before.st_ctime_ns)
    kill = "disk.pwrite(4096, b'new' * 10000); os.kill(os.getpid(), signal.SIGKILL)"
    assert script(image, kill) == -signal.SIGKILL
    assert image.read_bytes()[4096:34096] == b"new" * 10000
    assert image.stat().st_mtime_ns > before.st_mtime_ns
    assert image.stat().st_ctime_ns > before.st_ctime_ns


def test_a_signal_somebody_waits_for_is_still_his(image: Path) -> None:
    block = "signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGBUS])"
    wait = f"""
disk.pwrite(0, disk.pread(0, {LONG}))
os.kill(os.getpid(), signal.SIGBUS)
assert signal.sigwait([signal.SIGBUS]) == signal.SIGBUS
os._exit(5)
"""
    assert script(image, wait, first=block) == 5


def test_memory_of_the_caller_s_that_is_gone_is_an_error(image: Path) -> None:
    gone = image.with_name("gone")
    gone.write_bytes(b"x" * LONG)
    write = f"""
fd = os.open({str(gone)!r}, os.O_RDWR)
memory = mmap.mmap(fd, {LONG})
os.truncate(fd, 0)
try:
    disk.pwrite(0, memory)
except blockgraph.errors.IOFailure as error:
    assert "Bad address" in str(error), error
    os._exit(5)
"""
    assert script(image, write) == 5


def test_a_file_cut_off_by_somebody_else_is_written_anew(image: Path) -> None:
    with opened(image, locking="off") as graph:
        disk = graph.backend("disk", writable=True)
        warm(disk)
        for _ in range(200):
            os.truncate(image, 0)
            disk.pwrite(MIB // 2, b"x" * 100_000)
            assert disk.pread(0, 512) == bytes(512)
            assert disk.pread(MIB // 2, 100_000) == b"x" * 100_000
    assert image.stat().st_size == MIB // 2 + 100_000


def test_a_file_that_ends_inside_a_page_becomes_longer(image: Path) -> None:
    end = 3 * LONG + 4700
    os.truncate(image, end + 300)
    with opened(image, locking="off") as graph:
        disk = graph.backend("disk", writable=True)
        warm(disk)
        os.truncate(image, end - 200)
        disk.pwrite(end - LONG, b"x" * LONG)
        assert image.stat().st_size == end
        assert disk.pread(end - LONG, LONG + 300) == b"x" * LONG + bytes(300)
        disk.pwrite(end - LONG, b"y" * LONG)
    assert image.stat().st_size == end
    assert image.read_bytes()[end - LONG :] == b"y" * LONG


def test_a_full_file_system_is_an_error_and_not_a_signal(small_tmpfs: Path) -> None:
    """A hole is never filled through the mapping, which could only fail by a signal."""
    path = small_tmpfs / "disk"
    path.write_bytes(b"x" * 65536)
    os.truncate(path, 2 * MIB)
    with opened(path, locking="off") as graph:
        disk = graph.backend("disk", writable=True)
        warm(disk)

        def fill() -> None:
            for offset in range(65536, 2 * MIB, 65536):
                disk.pwrite(offset, b"y" * 65536)

        with pytest.raises(blockgraph.errors.NoSpace):
            fill()
        warm(disk)
        assert disk.pread(0, 65536) == b"x" * 65536


def test_windows_of_a_descriptor(image: Path) -> None:
    for flags, writable in ((os.O_RDONLY, False), (os.O_RDWR, True)):
        fd = os.open(image, flags)
        windows = Windows.of(fd)
        assert windows is not None
        assert windows.writable == writable
        windows.touch()
        windows.release()
        os.close(fd)

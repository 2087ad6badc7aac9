# SPDX-FileCopyrightText: blockgraph contributors
# SPDX-License-Identifier: MIT
"""Is it the image that the bitmaps were stored for, and has nobody else changed it since?

After a clean close the image must be what it was, to the nanosecond:

* A regular file is recognised by size, mtime, ctime and inode. ctime can not be set, so a copy, a file moved into
  place and one restored with its old mtime all count as changed; so do chmod, chown and rename, which only cost a
  full backup. The device number is left out: it changes with the order in which disks are found. Before the times are
  read the file is synced, so that a power failure after the close does not turn them back, and the close waits until
  the clock that the kernel stamps files with has moved on: no later change has the same times.
* A device, and anything that is no file here, is recognised by its size and a sample of its contents, 16 blocks of
  4 KiB. Changes elsewhere are not noticed.

After an unclean stop the times were meant to change. While anything may be written the sidecar has a heartbeat, at most
`BEAT` seconds old. The image is taken for untouched since the stop if

* its times lie at most `WINDOW` seconds behind the heartbeat: who writes it later, on this boot or another, is noticed,
* when the machine has been booted since, they also lie before that boot.

What can not be noticed: another writer within `WINDOW` seconds of the last heartbeat before a kill, on the same boot
(image locks keep out those who heed them); one whose machine's clock is behind; one that writes a device. An older
copy of the sidecar itself fits only an image unchanged since, and then has at least the bits of the later one, unless
bitmaps were merged or added meanwhile.
"""

from __future__ import annotations

import asyncio
import hashlib
import os
import stat
import time
from datetime import datetime
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

from blockgraph.bitmaps.sidecar_format import Identity, Slot, Times
from blockgraph.native import allocate_aligned
from blockgraph.perm import Role

if TYPE_CHECKING:
    from blockgraph.node import Node

#: Protocols of images with a name in the file system: in a header, or with a sidecar beside them.
FILES = frozenset({"file", "host_device"})

#: Seconds between heartbeats, while anything may be written.
BEAT = 5.0
#: A change so many seconds after the last heartbeat is somebody else's.
WINDOW = 15.0

#: Of <time.h>: what the kernel takes the times of files from, at least.
_CLOCK_REALTIME_COARSE = 5

_SAMPLES = 16
_SAMPLE = 4096
#: Longest wait for the clock to move on, seconds.
_PATIENCE = 0.1


def storage_of(node: Node) -> Node | None:
    """The node below that has the image's file or device as a whole; None: there is none."""
    while node.driver.fd() is None:
        below = [child for child in node.children.values() if child.role & Role.PRIMARY]
        if len(below) != 1 or (node.driver.name == "raw" and not whole(node)):
            return None
        node = below[0].node
    return node


def whole(node: Node) -> bool:
    """A raw node shows all of its child."""
    options = node.options
    return not getattr(options, "offset", 0) and getattr(options, "size", None) is None


def times_of(node: Node) -> Times | None:
    """Of the regular file that a node's bytes are in; None: they are in none."""
    storage = storage_of(node)
    fd = None if storage is None else storage.driver.fd()
    if fd is None:
        return None
    found = os.fstat(fd)
    return Times(found.st_mtime_ns, found.st_ctime_ns, found.st_ino) if stat.S_ISREG(found.st_mode) else None


async def identify(node: Node, *, final: bool = False) -> Identity:
    """What the node's image is recognised by now.

    Args:
        final: it is durable, and stays recognisable: any later change changes the times.
    Raises:
        IOFailure: it could not be read.
        OSError: it could not be synced.
    """
    if final:
        await node.flush()
    times = times_of(node)
    if times is None:
        return Identity(node.size(), None, await _sample(node))
    if final:
        storage = storage_of(node)
        assert storage is not None
        fd = storage.driver.fd()
        assert fd is not None
        await asyncio.to_thread(os.fsync, fd)
        await asyncio.to_thread(_tick, fd)
        times = times_of(node)
    return Identity(node.size(), times)


def _tick(fd: int) -> None:
    """Until a change of the file would get other times than it has."""
    ends = time.monotonic() + _PATIENCE
    while os.fstat(fd).st_ctime_ns >= time.clock_gettime_ns(_CLOCK_REALTIME_COARSE) and time.monotonic() < ends:
        time.sleep(0.001)


async def _sample(node: Node) -> bytes:
    size = node.size()
    digest = hashlib.blake2b(digest_size=32)
    buf = allocate_aligned(_SAMPLE)
    for number in range(_SAMPLES):
        offset = (size - _SAMPLE) * number // (_SAMPLES - 1) if size > _SAMPLE else 0
        offset -= offset % _SAMPLE
        inside = max(0, min(_SAMPLE, size - offset))
        # Not as a request: one that waits for us, to mark what it is about to change, would keep it waiting.
        await node.driver.pread(offset, buf[:inside])
        digest.update(buf[:inside])
        digest.update(bytes(_SAMPLE - inside))
    return digest.digest()


def why_changed(stored: Slot, image: Identity) -> str | None:
    """After a clean close: what is different; None: nothing."""
    was = stored.image
    if was.size != image.size:
        return f"the image has {image.size} bytes, they were stored for one of {was.size}"
    if (was.times is None) != (image.times is None) or was.sample != image.sample:
        return "the image is another one, or was changed by somebody else"
    if was.times is not None and image.times is not None and was.times != image.times:
        if was.times.inode != image.times.inode:
            return "the image is another file than the one they were stored for"
        return f"the image was changed by somebody else ({_moment(max(image.times[:2]))})"
    return None


def why_lost(stored: Slot, image: Identity, heartbeat: int) -> str | None:
    """After an unclean stop: why the image can not be what was left; None: it can."""
    if image.size not in (stored.image.size, stored.next_size):
        return f"the image has {image.size} bytes, they were stored for one of {stored.image.size}"
    was, now = stored.image.times, image.times
    if (was is None) != (now is None):
        return "the image is another one"
    if was is None or now is None:
        return None
    if was.inode != now.inode:
        return "the image is another file than the one they were stored for"
    last = max(now.mtime, now.ctime)
    rebooted = stored.boot != boot_id() and 0 < boot_time() + 10**9 <= last
    if rebooted or last > heartbeat + int(WINDOW * 1e9):
        return f"the image was changed by somebody else after an unclean stop ({_moment(last)})"
    return None


def now() -> int:
    """Nanoseconds, wall clock."""
    return time.time_ns()


@cache
def boot_id() -> bytes:
    """16 bytes that are new with every boot of the machine; zeroes where the kernel does not tell."""
    try:
        return bytes.fromhex(Path("/proc/sys/kernel/random/boot_id").read_text().strip().replace("-", ""))[:16].ljust(
            16
        )
    except (OSError, ValueError):
        return bytes(16)


@cache
def boot_time() -> int:
    """When the machine was booted, nanoseconds; before all time where the kernel does not tell."""
    try:
        lines = Path("/proc/stat").read_text().splitlines()
    except OSError:
        return -(10**18)
    return next((int(line.split()[1]) * 10**9 for line in lines if line.startswith("btime ")), -(10**18))


def _moment(when: int) -> str:
    return datetime.fromtimestamp(when / 1e9).isoformat(" ", "seconds")

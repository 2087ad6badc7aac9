# SPDX-FileCopyrightText: blockgraph contributors
# SPDX-License-Identifier: MIT
"""host_device: the bytes of a disk, partition, logical volume or loop device of this host.

Options: those of `file`, with the same meaning; see there for `locking`, `cache.direct`, `read-only`,
`auto-read-only` and `force-share`. `filename` is a path in /dev.

Example:

    [[nodes]]
    node-name = "lun"
    driver = "host_device"
    filename = "/dev/vg0/guest"
    cache = {direct = true}

What it can do: requests are aligned to the device's logical block. Discard is BLKDISCARD. Write-zeroes lets the
device zero (fallocate on a block device): with MAY_UNMAP it may deallocate, where that reads back as zeroes; else,
or where the device can not, the kernel writes the zeroes, unless NO_FALLBACK forbids it. After a discard the range
reads as whatever the device likes.

Limits: everything is data, a device does not tell its holes. The size is fixed while the node is open: truncate
accepts only the size the device has. Image locks on a device file hold between processes that open the same path
tree (not between containers with device files of their own). Character devices are accepted where they have a size
(UBI volumes); they know no discard and no write-zeroes.
"""

from __future__ import annotations

import array
import errno
import fcntl
import os
import stat
import struct

from blockgraph.driver import Info
from blockgraph.errors import GraphError, OutOfRange
from blockgraph.flags import Flag
from blockgraph.protocols.descriptor import (
    KEEP_SIZE,
    PUNCH_HOLE,
    ZERO_RANGE,
    DescriptorDriver,
    DescriptorOptions,
    in_thread,
)

#: ioctl requests of <linux/fs.h>.
BLKROGET = 0x125E
BLKSSZGET = 0x1268
BLKDISCARD = 0x1277
BLKGETSIZE64 = 0x80081272

_NO_DISCARD = frozenset({errno.EOPNOTSUPP, errno.ENOTTY, errno.EINVAL, errno.ENOSYS})


class HostDevice(DescriptorDriver):
    """See the module's text."""

    name = "host_device"
    Options = DescriptorOptions
    zero_flags = Flag.MAY_UNMAP | Flag.NO_FALLBACK

    _is_block = True
    _can_discard = True
    _can_unmap = True
    _can_zero = True

    def _check_kind(self, mode: int) -> None:
        self._is_block = stat.S_ISBLK(mode)
        if not self._is_block and not stat.S_ISCHR(mode):
            regular = stat.S_ISREG(mode)
            raise GraphError(
                f"'{self.options.filename}' is not a device",
                node=self.node.name,
                op="open",
                errno=errno.ENOTBLK,
                hint="use driver 'file'" if regular else "check 'filename'",
            )

    def _read_size(self) -> int:
        if self._is_block:
            return device_size(self._fd)
        try:
            size = os.lseek(self._fd, 0, os.SEEK_END)
        except OSError:
            size = 0
        if not size:
            raise GraphError(
                f"'{self.options.filename}' is a character device without a size",
                node=self.node.name,
                op="open",
                errno=errno.ENOTBLK,
                hint="name a disk",
            )
        return size

    def _base_alignment(self) -> int:
        return logical_block(self._fd) if self._is_block else 1

    def _open(self) -> None:
        super()._open()
        if self._is_block and self._writable and is_read_only(self._fd):
            raise self._open_error(OSError(errno.EACCES, os.strerror(errno.EACCES)), True)

    def info(self) -> Info:
        return Info(zero_init=False)

    async def pwrite_zeroes(self, offset: int, length: int, flags: Flag = Flag.NONE) -> None:
        if not self._is_block:
            raise self.unsupported("pwrite_zeroes")
        try:
            if flags & Flag.MAY_UNMAP and self._can_unmap:
                # Refused where the device would not zero without the kernel's writing.
                self._can_unmap = await self._fallocate(PUNCH_HOLE | KEEP_SIZE, offset, length)
                if self._can_unmap:
                    return
            if self._can_zero and not flags & Flag.NO_FALLBACK:
                self._can_zero = await self._fallocate(ZERO_RANGE | KEEP_SIZE, offset, length)
                if self._can_zero:
                    return
        except OSError as error:
            raise self._failure(error, "pwrite_zeroes", offset, length) from error
        raise self.unsupported("pwrite_zeroes")

    async def discard(self, offset: int, length: int) -> None:
        if not self._is_block or not self._can_discard:
            raise self.unsupported("discard")
        try:
            await in_thread(discard_range, self._fd, offset, length)
        except OSError as error:
            if error.errno in _NO_DISCARD:
                self._can_discard = False
                raise self.unsupported("discard") from error
            raise self._failure(error, "discard", offset, length) from error

    async def truncate(self, size: int) -> None:
        if size != self._size:
            raise OutOfRange(
                f"'{self.options.filename}' is a device of {self._size} bytes and can not become {size} bytes",
                node=self.node.name,
                op="truncate",
                hint="resize it with the tool that made it, then open it again",
            )


def device_size(fd: int) -> int:
    """Bytes of a block device."""
    value = array.array("Q", [0])
    fcntl.ioctl(fd, BLKGETSIZE64, value)
    return value[0]


def logical_block(fd: int) -> int:
    """The smallest unit a block device can address, bytes."""
    value = array.array("i", [0])
    fcntl.ioctl(fd, BLKSSZGET, value)
    return max(512, value[0])


def is_read_only(fd: int) -> bool:
    """The block device refuses writes (even if its file was opened for writing)."""
    value = array.array("i", [0])
    fcntl.ioctl(fd, BLKROGET, value)
    return bool(value[0])


def discard_range(fd: int, offset: int, length: int) -> None:
    """Tell the device that a range is no longer needed."""
    fcntl.ioctl(fd, BLKDISCARD, struct.pack("QQ", offset, length))

# SPDX-FileCopyrightText: blockgraph contributors
# SPDX-License-Identifier: MIT
"""raw: the bytes of a file as they are, or of a window into it.

```
    raw (offset 1 MiB, size 512 MiB)      0 ........ 512 MiB
                                          |             |
    file                        0 ... 1 MiB ........ 513 MiB ...
```

Options (QEMU's BlockdevOptionsRaw):

* `file`: the child, required.
* `offset`: where the disk starts in the child, bytes; default 0.
* `size`: length of the disk, bytes; default up to the child's end. Neither needs to be a multiple of a sector; a
  write to an end inside the child's block reads and writes back the rest of that block.

Example:

    [[nodes]]
    node-name = "partition-1"
    driver = "raw"
    offset = 1048576
    size = 536870912
    file = {driver = "file", filename = "disk.raw"}

Without a window, permissions pass as through a filter. With one, others may not resize the child. Without `size` the
disk grows and shrinks with its child; with it, truncate is refused.

Limits: the format has no header, so an image must be *named* raw: a probed one could be turned into another format
by what its guest writes into it.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, ClassVar

from msgspec import Meta
from msgspec.structs import replace

from blockgraph import debug
from blockgraph.driver import ChildSpec, Format, Info
from blockgraph.errors import GraphError, OptionError, Unsupported
from blockgraph.extent import Extent, Status
from blockgraph.flags import Flag
from blockgraph.node import Child
from blockgraph.options import NodeOptions, NodeRef
from blockgraph.perm import Perm, Role, filtered_child

_LARGEST = (1 << 63) - 1


class RawOptions(NodeOptions, kw_only=True, frozen=True):
    """See the module's text."""

    file: NodeRef
    offset: Annotated[int, Meta(ge=0, le=_LARGEST)] = 0
    size: Annotated[int, Meta(ge=0, le=_LARGEST)] | None = None


class Raw(Format):
    """See the module's text."""

    name = "raw"
    children: ClassVar = {"file": ChildSpec(Role.DATA | Role.PRIMARY)}
    Options: ClassVar[type[NodeOptions]] = RawOptions
    transparent = True
    bitmap_place = "sidecar"
    revokes = True
    write_flags = Flag.FUA | Flag.WRITE_UNCHANGED
    zero_flags = Flag.FUA | Flag.WRITE_UNCHANGED | Flag.MAY_UNMAP | Flag.NO_FALLBACK
    options: RawOptions

    file: Child

    _start = 0

    @classmethod
    def child_perm(
        cls, options: NodeOptions, name: str, need: Perm, share: Perm, *, read_only: bool
    ) -> tuple[Perm, Perm]:
        assert isinstance(options, RawOptions)
        need, share = filtered_child(need, share)
        if options.offset or options.size is not None:
            share &= ~Perm.RESIZE
        return need, share

    @classmethod
    def known_size(cls, options: NodeOptions, sizes: Mapping[str, int]) -> int | None:
        assert isinstance(options, RawOptions)
        below = sizes.get("file")
        end = options.offset + (options.size or 0)
        if below is not None and end > below:
            raise OptionError(
                f"the window ends at {end}, but its child at {below} bytes",
                path="offset" if options.offset > below or options.size is None else "size",
            )
        return options.size if options.size is not None or below is None else below - options.offset

    async def open(self) -> None:
        self._start = self.options.offset

    async def attached(self) -> None:
        self.growable = self.options.size is None and self.file.node.driver.growable
        self._check_window(self.options)

    def reopen_check(self, options: NodeOptions) -> None:
        assert isinstance(options, RawOptions)
        super().reopen_check(replace(options, offset=self.options.offset, size=self.options.size))
        self._check_window(options)
        if (options.offset, options.size) != (self.options.offset, self.options.size):
            self._check_unrecorded()

    def _check_unrecorded(self) -> None:
        """Another window shows other bytes, which is no write that a bitmap would hear of."""
        for node, bitmap in self.node.recorders():
            raise GraphError(
                f"another window would change everything that bitmap '{bitmap.name}' of node '{node.name}' records",
                node=self.node.name,
                op="reopen",
                hint="disable or remove the bitmap first, and make a full backup afterwards",
            )

    def reopened(self, options: NodeOptions) -> None:
        super().reopened(options)
        self._start = self.options.offset
        self.growable = self.options.size is None and self.file.node.driver.growable

    def _check_window(self, options: RawOptions) -> None:
        end = options.offset + (options.size or 0)
        below = self.file.node.size()
        if end > below:
            raise GraphError(
                f"the window ends at {end}, but node '{self.file.node.name}' at {below} bytes",
                node=self.node.name,
                hint="correct 'offset' or 'size', or use the right image",
            )

    @property
    def passes_zeroes(self) -> bool:
        return True

    def size(self) -> int:
        size = self.options.size
        return self.file.node.size() - self._start if size is None else size

    def info(self) -> Info:
        below = self.file.node.driver.info()
        # What lies around a window was written by others, and so may be what was in it.
        return below if not self._start and self.options.size is None else Info(below.cluster_size, False)

    async def map(self, offset: int, length: int) -> Extent:
        end = max(self.size(), offset + length)
        return Extent(0, end, Status.DATA, self.file, self._start, not self.node.read_only)

    async def pread(self, offset: int, buf: memoryview) -> None:
        if debug.enabled:
            await self.file.event("read_aio")
        await self.file.pread(self._start + offset, buf)

    async def pwrite(self, offset: int, buf: memoryview, flags: Flag = Flag.NONE) -> None:
        if debug.enabled:
            await self.file.event("write_aio")
        await self.file.pwrite(self._start + offset, buf, flags)

    async def pwrite_zeroes(self, offset: int, length: int, flags: Flag = Flag.NONE) -> None:
        await self.file.pwrite_zeroes(self._start + offset, length, flags)

    async def discard(self, offset: int, length: int) -> None:
        await self.file.discard(self._start + offset, length)

    async def truncate(self, size: int) -> None:
        if self.options.size is not None:
            raise Unsupported(
                f"the window is fixed at {self.options.size} bytes by option 'size'",
                node=self.node.name,
                op="truncate",
                hint="change the option by a reopen, or leave it out",
            )
        await self.file.truncate(self._start + size)

# SPDX-FileCopyrightText: blockgraph contributors
# SPDX-License-Identifier: MIT
"""snapshot-access: read the image that a backup-top below keeps.

```
    backup tool ──► snapshot-access ──file──► backup-top ──file──► disk     (not yet overwritten)
                                                   └──────target──► kept    (overwritten since)
```

Reads come from the target where the guest has overwritten, from the disk elsewhere, and guest writes to what is being
read wait for the read. A range outside backup-top's bitmap fails as a whole with EACCES. A discard says "I have read
this": those clusters are never copied and the target frees them. Writes are not supported.

Options:
    file: a backup-top node.

Example:
    [[nodes]]
    node-name = "fleece"
    driver = "snapshot-access"
    file = "top"
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from blockgraph.driver import ChildSpec, Filter
from blockgraph.errors import GraphError
from blockgraph.extent import BlockStatus
from blockgraph.filters.backup_top import BackupTop
from blockgraph.flags import Flag
from blockgraph.options import NodeOptions, NodeRef
from blockgraph.perm import ALL, NONE, Perm, Role

if TYPE_CHECKING:
    from blockgraph.driver import Driver


class SnapshotAccessOptions(NodeOptions, kw_only=True, frozen=True):
    """See the module's text."""

    file: NodeRef


class SnapshotAccess(Filter):
    """See the module's text."""

    name = "snapshot-access"
    children = {"file": ChildSpec(Role.FILTERED | Role.PRIMARY, stays=True)}
    Options = SnapshotAccessOptions

    @classmethod
    def child_perm(
        cls, options: NodeOptions, name: str, need: Perm, share: Perm, *, read_only: bool
    ) -> tuple[Perm, Perm]:
        """It asks backup-top for the kept image, never for the live bytes: no permissions at all."""
        return NONE, ALL

    async def attached(self) -> None:
        await super().attached()
        self._top()

    def _top(self) -> BackupTop:
        driver: Driver = self.file.node.driver
        if not isinstance(driver, BackupTop):
            raise GraphError(
                f"'{self.file.node.name}' is a {driver.name} node",
                node=self.node.name,
                hint="file must be a backup-top",
            )
        return driver

    async def pread(self, offset: int, buf: memoryview) -> None:
        top = self._top()
        top.snapshot_run(offset, len(buf))  # the whole request fails when any byte of it is not to be had
        while buf:
            length, kept = top.snapshot_run(offset, len(buf))
            part = buf[:length]
            if kept:
                await top.target.pread(offset, part)
            else:
                async with top.frozen(offset, length) as held:
                    if not held:
                        continue
                    await top.file.pread(offset, part)
            offset += length
            buf = buf[length:]
        top.snapshot_run(offset, 0)  # the snapshot may have been lost while we were reading

    async def block_status(self, offset: int, length: int) -> BlockStatus:
        """As the kept image would answer; cut where copied and not yet copied clusters meet."""
        top = self._top()
        status = None
        while status is None:
            length, kept = top.snapshot_run(offset, length)
            if kept:
                status = await top.target.block_status(offset, length)
            else:
                async with top.frozen(offset, length) as held:
                    if held:
                        status = await top.file.block_status(offset, length)
        top.snapshot_run(offset, 0)
        # Allocated here, or a caller would look below us, at the live disk.
        return status._replace(depth=0, node=self.node, host=None, host_offset=None)

    async def pwrite(self, offset: int, buf: memoryview, flags: Flag = Flag.NONE) -> None:
        raise self.unsupported("pwrite")

    async def pwrite_zeroes(self, offset: int, length: int, flags: Flag = Flag.NONE) -> None:
        raise self.unsupported("pwrite_zeroes")

    async def discard(self, offset: int, length: int) -> None:
        await self._top().forget(offset, length)

    async def flush(self) -> None:
        """Nothing is written here."""

    async def truncate(self, size: int) -> None:
        raise self.unsupported("truncate")

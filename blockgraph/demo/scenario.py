# SPDX-FileCopyrightText: blockgraph contributors
# SPDX-License-Identifier: MIT
"""The scenario: graph, guest and backup together.

```
    guest (a process) ──NBD──► top (backup-top) ──file──► disk     1. the graph opens: point in time
                                 │    ▲                            2. the guest overwrites data, which is saved first
                                 │    └── backup job               3. the job is let loose, the guest goes on
                                 └──target──► target               4. the job has ended: the guest stops
```

That writes hit clusters not copied yet is not left to chance: until the guest has overwritten a good part of the
disk, the job's speed is next to nothing (as the graph file says), and the guest begins at the end of the disk, where
the job comes last.
"""

from __future__ import annotations

import asyncio
import time
from dataclasses import dataclass
from pathlib import Path

from blockgraph.create import create_file
from blockgraph.demo.disk import Disk, make_disk
from blockgraph.demo.guest import Counters
from blockgraph.demo.guest_process import started
from blockgraph.demo.proof import Difference, compare, copy_file, restore
from blockgraph.demo.tools import find_tool, run_tool
from blockgraph.filters.backup_top import BackupTop
from blockgraph.graph.draw import picture, render
from blockgraph.graph.load import load
from blockgraph.jobs.states import VERBS, Verb
from blockgraph.session import Session

GRAPH = """\
# Written by `blockgraph demo`. The same by hand: blockgraph run graph.toml

[[nodes]]
node-name = "disk"
driver = "raw"
file = {{driver = "file", filename = "disk.img"}}

[[nodes]]
node-name = "target"
driver = "{format}"
file = {{driver = "file", filename = "backup.{suffix}"}}

[[nodes]]
node-name = "top"                # keeps the disk as it was when the graph was opened
driver = "backup-top"
file = "disk"
target = "target"

[nbd-server]
addr = {{type = "unix", path = "guest.sock"}}

[[exports]]
type = "nbd"
id = "guest"
node-name = "top"
name = "disk"
writable = true

[[jobs]]
type = "backup"
job-id = "backup"
device = "top"                   # completes the target of that backup-top
sync = "full"
speed = 65536                    # bytes per second; the demo lifts it once the guest writes
"""


@dataclass(frozen=True)
class Outcome:
    """What happened.

    Attributes:
        disk: that was backed up.
        target_format: of the backup.
        graph_file: path of the graph file.
        drawing: of the graph while it ran.
        bytes_for_guest: bytes saved because the guest was about to overwrite them.
        bytes_background: bytes of the rest, copied (or skipped as zeroes) by the job.
        cluster_size: unit of copying, bytes.
        guest: what the guest did while the job ran.
        guest_seconds: from the guest's start to the job's end.
        loose: of that, what it did while the job ran at full speed.
        loose_seconds: from letting the job loose to its end.
        loose_bytes: of bytes_background, what was copied in that time.
        backup: the backup beside the disk as it was at the start.
        live: the live disk beside the disk as it was at the start.
        fsck: exit status of `e2fsck -fn` on the backup; None: not run.
        fsck_output: what it printed.
    """

    disk: Disk
    target_format: str
    graph_file: Path
    drawing: str
    bytes_for_guest: int
    bytes_background: int
    cluster_size: int
    guest: Counters
    guest_seconds: float
    loose: Counters
    loose_seconds: float
    loose_bytes: int
    backup: Difference
    live: Difference
    fsck: int | None
    fsck_output: str

    def failures(self) -> list[str]:
        """What the demo promised and did not keep; empty when all is well."""
        failed = []
        if not self.backup.equal:
            where = "its size" if self.backup.first is None else f"offset {self.backup.first}"
            failed.append(f"the backup differs from the disk at the start, first in {where}")
        if self.bytes_for_guest == 0:
            failed.append("no guest write met a cluster that was not copied yet: nothing was proved")
        if self.live.equal:
            failed.append("the live disk did not change")
        if self.fsck:
            failed.append(f"e2fsck found errors in the backup (exit status {self.fsck})")
        return failed


async def run_scenario(folder: Path, size: int, target_format: str, seed: int) -> Outcome:
    """Play it in a folder, which then holds every file.

    Raises:
        BlockGraphError: something could not be done; a wrong backup is no error but an outcome.
        OSError: no room in the folder.
    """
    disk = await make_disk(folder / "disk.img", size, seed)
    reference = folder / "reference.img"
    await asyncio.to_thread(copy_file, disk.path, reference)
    suffix = {"raw": "img"}.get(target_format, target_format)
    backup = folder / f"backup.{suffix}"
    await create_file(str(backup), size, target_format, replace=False)
    graph_file = folder / "graph.toml"
    graph_file.write_text(GRAPH.format(format=target_format, suffix=suffix))

    async with await Session.start(load(graph_file)) as session:
        job = session.jobs[0]
        top = session.graph.node("top").driver
        assert isinstance(top, BackupTop)
        drawing = render(picture(session.graph.model), "text")
        async with started(folder / "guest.sock", "disk", seed) as guest:
            begun = time.monotonic()
            before = await guest.begun()
            loose = time.monotonic()
            background_before = top.copy.bytes_copied - top.copy.bytes_for_guest
            if job.state in VERBS[Verb.SET_SPEED]:  # it may have ended, where the guest is very slow
                job.set_speed(0)
            await guest.watch(job.wait())
            ended = time.monotonic()
            after = await guest.now()
        if job.error is not None:
            raise job.error
        for_guest, copied = top.copy.bytes_for_guest, top.copy.bytes_copied
        cluster_size = top.cluster_size

    restored = backup
    if target_format != "raw":
        restored = folder / "restored.img"
        await restore(backup, target_format, restored)
    fsck, fsck_output = await _fsck(disk, restored)
    return Outcome(
        disk=disk,
        target_format=target_format,
        graph_file=graph_file,
        drawing=drawing.replace(f"{folder}/", ""),
        bytes_for_guest=for_guest,
        bytes_background=copied - for_guest,
        cluster_size=cluster_size,
        guest=after,
        guest_seconds=ended - begun,
        loose=_minus(after, before),
        loose_seconds=ended - loose,
        loose_bytes=copied - for_guest - background_before,
        backup=await asyncio.to_thread(compare, restored, reference),
        live=await asyncio.to_thread(compare, disk.path, reference),
        fsck=fsck,
        fsck_output=fsck_output,
    )


async def _fsck(disk: Disk, image: Path) -> tuple[int | None, str]:
    e2fsck = find_tool("e2fsck")
    if e2fsck is None or disk.contents != "ext4":
        return None, ""
    return await run_tool([e2fsck, "-fn", str(image)])


def _minus(after: Counters, before: Counters) -> Counters:
    return Counters(
        after.writes - before.writes,
        after.zeroes - before.zeroes,
        after.trims - before.trims,
        after.flushes - before.flushes,
        after.written - before.written,
    )

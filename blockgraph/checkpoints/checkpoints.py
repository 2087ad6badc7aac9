# SPDX-FileCopyrightText: blockgraph contributors
# SPDX-License-Identifier: MIT
"""Checkpoints of the disks of a graph: make, list, delete, ask; see, export and back up what they show.

```
checkpoints = Checkpoints(graph)
monday = await checkpoints.create("monday", ["a", "b"])                  # both disks at one instant
checkpoints.since("monday", "a")                                         # what has changed on "a"

tuesday = await checkpoints.create("tuesday", ["a", "b", "c"], view={"a": kept_a, "b": kept_b, "c": kept_c})
tuesday.full                                                             # {"c": "the disk was not in checkpoint ..."}
await checkpoints.export("tuesday", server)                              # with the bitmap "monday..tuesday"
await checkpoints.close_view("tuesday")

wednesday = await checkpoints.backup("wednesday", jobs, {"a": target_a, "b": target_b})
await wednesday.wait()
```

Each call is one transaction: all disks, or none. They are libvirt's checkpoints: deleting one leaves what changed since
every other known. A backup that fails leaves its checkpoint; delete it, or the next backup would build on it.

Checkpoints live in bitmaps and are found again where those are kept. In a sidecar they survive a kill, which may bring
one back that was deleted a moment before. Whoever removes or clears such a bitmap by hand makes what is told wrong.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from blockgraph.bitmaps.actions import BitmapName, RemoveBitmap
from blockgraph.checkpoints.line import Keeping, Line
from blockgraph.checkpoints.model import Checkpoint, DiskCheckpoint, OpenDisk, PointInTime
from blockgraph.errors import GraphError, NodeInUse
from blockgraph.exports.nbd.actions import AddExport, RemoveExport
from blockgraph.exports.options import NbdExportOptions
from blockgraph.graph.action import Then
from blockgraph.jobs.group import JobGroup
from blockgraph.jobs.options import BackupOptions
from blockgraph.options import BitmapRef

if TYPE_CHECKING:
    from blockgraph.exports.nbd.server import NbdServer
    from blockgraph.graph.graph import Graph
    from blockgraph.graph.transaction import Transaction
    from blockgraph.jobs.backup import BackupJob
    from blockgraph.jobs.manager import JobManager
    from blockgraph.native import Bitmap
    from blockgraph.options import NodeRef


class Checkpoints:
    """See the module's text. A disk is the name of the node that has the bitmaps, below the filters over it.

    Args:
        prefix: of the bitmaps' names, before a colon.
        granularity: of new bitmaps, bytes; None: that of the disk's newest, or as AddBitmap chooses.
        epochs: one bitmap with epochs a disk, instead of one bitmap a checkpoint.
        persistent: None: where the node has a place for bitmaps.
        sidecar: as of AddBitmap, for disks that have no place for bitmaps.

    Attributes:
        views: points in time that are open, by checkpoint.
    """

    def __init__(
        self,
        graph: Graph,
        *,
        prefix: str = "checkpoint",
        granularity: int | None = None,
        epochs: bool = False,
        persistent: bool | None = None,
        sidecar: bool = False,
    ) -> None:
        self._graph = graph
        self._prefix = prefix
        self._keeping = Keeping(granularity, epochs, persistent, sidecar)
        self.views: dict[str, PointInTime] = {}

    # Looking.

    def line(self, disk: str) -> Line:
        """The checkpoints of one disk.

        Raises:
            GraphError: there is no such node.
        """
        return Line(self._graph.node(disk), self._prefix)

    def _lines(self) -> list[Line]:
        return [line for node in self._graph.nodes() if (line := Line(node, self._prefix)).marks]

    def list(self) -> Sequence[Checkpoint]:
        """All that some disk of the graph has, in order."""
        found: dict[str, Checkpoint] = {}
        for line in self._lines():
            for mark in line.marks:
                disk = DiskCheckpoint(line.node.name, mark.bitmap.name, line.problem(mark.name))
                known = found.get(mark.name)
                disks = {} if known is None else known.disks
                number = mark.number if known is None else max(mark.number, known.number)
                found[mark.name] = Checkpoint(mark.name, number, {**disks, disk.disk: disk})
        return sorted(found.values(), key=lambda each: each.number)

    def find(self, name: str) -> Checkpoint:
        """The checkpoint of that name.

        Raises:
            GraphError: there is none; tells those that there are.
        """
        known = self.list()
        for each in known:
            if each.name == name:
                return each
        told = ", ".join(f"'{each.name}'" for each in known) or "none"
        raise GraphError(f"there is no checkpoint '{name}' (there are: {told})", op="checkpoint")

    def since(self, name: str, disk: str) -> Bitmap:
        """What has changed on a disk since a checkpoint, up to now; a copy.

        Raises:
            GraphError: there is no such checkpoint; the disk was not in it; a bitmap that is needed is inconsistent.
        """
        self.find(name)
        return self.line(disk).since(name)

    # Changing.

    async def create(
        self,
        name: str,
        disks: Iterable[str],
        *,
        view: Mapping[str, NodeRef] | None = None,
        since: str | None = None,
    ) -> Checkpoint:
        """A new checkpoint of these disks, at one instant.

        Args:
            view: disks (some of these) that shall be seen as they are now, until `close_view`; each with the node, or
                its description, that keeps what is overwritten.
            since: the checkpoint since which the view has a bitmap of the changes; None: the newest.
        Raises:
            GraphError: there already is one of this name, or none named `since`; a disk or view can not be had.
        """
        async with self._graph.transaction() as change:
            checkpoint = self._begin(change, name, disks, since, changes=view or ())
            point = PointInTime(name)
            for disk, target in (view or {}).items():
                top = change.add({"driver": "backup-top", "file": disk, "target": target})
                change.insert(top, above=disk)
                access = change.add({"driver": "snapshot-access", "file": top})
                point.disks[disk] = OpenDisk(top, access, _changes(checkpoint, disk))
            if view:
                change.act(Then(lambda: self.views.update({name: point})))
        return self._told(checkpoint)

    def _begin(
        self, change: Transaction, name: str, disks: Iterable[str], since: str | None, changes: Iterable[str]
    ) -> Checkpoint:
        """Let the checkpoint begin with the transaction, and bitmaps with the changes of some disks."""
        disks = list(disks)
        if not name or not disks or len(set(disks)) < len(disks):
            raise GraphError("a checkpoint needs a name, and disks, each once", op="checkpoint")
        if strange := set(changes) - set(disks):
            raise GraphError("is not among the disks of the checkpoint", node=min(strange), op="checkpoint")
        known = self.list()
        if any(each.name == name for each in known):
            raise GraphError(f"there already is a checkpoint '{name}'", op="checkpoint", hint="delete it first")
        if since is not None:
            self.find(since)
        elif known:
            since = known[-1].name
        checkpoint = Checkpoint(name, known[-1].number + 1 if known else 1, {}, since)
        for disk in disks:
            line = self.line(disk)
            problem = "there is no checkpoint before this one" if since is None else line.problem(since)
            if problem is not None:
                checkpoint.full[disk] = problem
            elif disk in changes:
                assert since is not None
                for action in line.changes(since, f"{since}..{name}"):
                    change.act(action)
            for action in line.begin(name, checkpoint.number, self._keeping):
                change.act(action)
            checkpoint.disks[disk] = DiskCheckpoint(disk, "", None)
        return checkpoint

    def _told(self, begun: Checkpoint) -> Checkpoint:
        """With the bitmaps, once they are there."""
        return Checkpoint(begun.name, begun.number, self.find(begun.name).disks, begun.since, begun.full)

    async def delete(self, name: str) -> None:
        """Delete a checkpoint of all disks; what changed since any other is still known.

        Raises:
            GraphError: there is none.
            NodeInUse: its view is open, or a bitmap is in use.
        """
        async with self._graph.transaction() as change:
            self.find(name)
            if name in self.views:
                raise NodeInUse(f"the view of checkpoint '{name}' is open", op="delete", hint="close it first")
            for line in self._lines():
                if line.index(name) is not None:
                    for action in line.delete(name):
                        change.act(action)

    async def keep_changes(self, name: str, bitmap: str, disks: Iterable[str]) -> None:
        """Put what has changed since a checkpoint into a new bitmap of each disk, that records nothing and is kept as
        the checkpoints' are.

        Raises:
            GraphError: there is no such checkpoint, or the bitmap is there; as of `since`. No disk has one then.
        """
        async with self._graph.transaction() as change:
            self.find(name)
            for disk in disks:
                line = self.line(disk)
                line.check_known(name)
                for action in line.changes(name, bitmap, self._keeping):
                    change.act(action)

    # What a checkpoint shows.

    def view(self, name: str) -> PointInTime:
        """The open view of a checkpoint.

        Raises:
            GraphError: none is open.
        """
        if name not in self.views:
            raise GraphError(
                f"no view of checkpoint '{name}' is open",
                op="checkpoint",
                hint="create it with a view: it is too late now",
            )
        return self.views[name]

    async def export(
        self, name: str, server: NbdServer, /, *, disks: Iterable[str] | None = None, **options: Any
    ) -> Sequence[AddExport]:
        """Serve the view of a checkpoint over NBD: an export for each disk, named after it, with the bitmap
        "SINCE..NAME" (context qemu:dirty-bitmap:SINCE..NAME), unless only a full backup of the disk is possible.

        Args:
            disks: of the view; None: all.
            options: members of NbdExportOptions. `name` may have "{disk}" in it.
        Raises:
            GraphError: no view is open, or an export can not be had; none is added.
        """
        point = self.view(name)
        export_name = options.pop("name", "{disk}")
        added: list[AddExport] = []
        async with self._graph.transaction() as change:
            for disk in point.disks if disks is None else disks:
                if disk not in point.disks:
                    raise GraphError(f"is not in the view of checkpoint '{name}'", node=disk, op="export")
                shown = point.disks[disk]
                bitmaps = () if shown.bitmap is None else (BitmapRef(node=disk, name=shown.bitmap),)
                described = NbdExportOptions(
                    id=f"{name}-{disk}",
                    node_name=shown.access,
                    name=export_name.replace("{disk}", disk),
                    bitmaps=bitmaps,
                    **options,
                )
                added.append(AddExport(change, server, described))
            change.act(Then(lambda: point.exports.extend(added)))
        return added

    async def close_view(self, name: str, *, hard: bool = False) -> None:
        """End the exports of a view, then the view; the checkpoint stays.

        Args:
            hard: disconnect clients.
        Raises:
            GraphError: no view is open, or somebody uses it; what could not be ended is still there.
        """
        point = self.view(name)
        if point.exports:
            async with self._graph.transaction(forced=True) as change:
                for export in point.exports:
                    RemoveExport(change, export, hard=hard)
                change.act(Then(point.exports.clear))
        async with self._graph.transaction() as change:
            for disk, shown in point.disks.items():
                change.remove(shown.access)
                change.remove_filter(shown.top)
                if shown.bitmap is not None:
                    change.act(RemoveBitmap(BitmapName(disk, shown.bitmap)))
            change.act(Then(lambda: self.views.pop(name)))

    async def backup(
        self,
        name: str,
        jobs: JobManager,
        targets: Mapping[str, NodeRef],
        *,
        also: Iterable[str] = (),
        since: str | None = None,
        grouped: bool = False,
        **options: Any,
    ) -> Backups:
        """A new checkpoint, and backups of its disks at that instant: of what has changed since a checkpoint, and of
        everything where that is not known (`checkpoint.full`: disks that were added, and others with a problem).

        Args:
            targets: disk to target.
            also: further disks of the checkpoint, of which no backup is made.
            since: None: the newest.
            grouped: all backups succeed, or none.
            options: further members of BackupOptions, for all.
        Raises:
            BlockGraphError: one could not start: none has, and there is no checkpoint.
        Cancelled: nothing has happened, or all has begun, and the jobs are in `jobs.jobs`.
        """
        group = JobGroup() if grouped else None
        if grouped:
            options["completion_mode"] = "grouped"
        started: dict[str, BackupJob] = {}
        async with self._graph.transaction() as change:
            checkpoint = self._begin(change, name, dict.fromkeys([*targets, *also]), since, changes=targets)
            for disk, target in targets.items():
                bitmap = _changes(checkpoint, disk)
                what: dict[str, Any] = {"sync": "full"}
                if bitmap is not None:
                    what = {"sync": "differential", "bitmap": BitmapRef(node=disk, name=bitmap)}
                described = BackupOptions(device=disk, target=target, **what, **options)
                started[disk] = await jobs.add(change, described, group)
        return Backups(self._graph, self._told(checkpoint), started)


class Backups:
    """Backups of the disks of one checkpoint.

    Attributes:
        checkpoint: with `full`, why a disk is copied as a whole.
        jobs: by disk.
    """

    def __init__(self, graph: Graph, checkpoint: Checkpoint, jobs: dict[str, BackupJob]) -> None:
        self._graph = graph
        self.checkpoint = checkpoint
        self.jobs = jobs

    async def wait(self) -> None:
        """Until all have concluded; how is in their `error`. The bitmaps that they used are gone then.

        Raises:
            NodeInUse: somebody else uses one.
        """
        for job in self.jobs.values():
            await job.wait()
        async with self._graph.transaction() as change:
            for disk in self.jobs:
                bitmap = _changes(self.checkpoint, disk)
                if bitmap is not None and bitmap in self._graph.node(disk).bitmaps:
                    change.act(RemoveBitmap(BitmapName(disk, bitmap)))


def _changes(checkpoint: Checkpoint, disk: str) -> str | None:
    """Name of the bitmap of what changed on a disk between `since` and the checkpoint; None: that is not known."""
    return None if disk in checkpoint.full else f"{checkpoint.since}..{checkpoint.name}"

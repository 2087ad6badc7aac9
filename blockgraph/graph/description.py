# SPDX-FileCopyrightText: blockgraph contributors
# SPDX-License-Identifier: MIT
"""Description: a graph file that has been read and understood, nothing of it opened.

Sections of a graph file:

    nodes         list of node descriptions, with the member names of QEMU's BlockdevOptions
    exports       list of exports; `type` says of what kind
    jobs          list of jobs; `type` says of what kind
    bitmaps       list of dirty bitmaps that nodes have from the start
    checkpoints   list of checkpoints that are taken when the graph starts
    nbd-server    where the NBD exports are served

`throttle-groups`, `secrets` and `monitor` are known and refused: nothing asked for is silently left out.

A child is the name of a node or a node description inside its parent. Keys may be dotted ("cache.direct", and in the
manner of QEMU's command line "file.filename"). Nodes inside a parent take over its `read-only`, `auto-read-only`,
`force-share` and `cache` where they say nothing themselves; a COW child is read-only unless it says otherwise.

File names in a graph file are relative to the directory of the file, as includes are in most languages: a graph means
the same wherever it is started from. In a description that comes as a dict they are relative to the working
directory, as QEMU's are.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from blockgraph.driver import Driver
from blockgraph.exports.options import NbdExportOptions, NbdServerOptions
from blockgraph.graph.bitmaps import BitmapOptions
from blockgraph.graph.checkpoints import CheckpointOptions
from blockgraph.graph.model import ROOT_ROLE, Model
from blockgraph.graph.source import Source
from blockgraph.jobs.options import BackupOptions
from blockgraph.options import NodeOptions
from blockgraph.perm import ALL, Perm

#: Kinds of exports and jobs by `type`.
EXPORTS = {"nbd": NbdExportOptions}
JOBS = {"backup": BackupOptions}

SECTIONS = ("nodes", "bitmaps", "checkpoints", "exports", "jobs", "nbd-server")
#: Sections that this version knows and does not have.
NOT_YET = ("throttle-groups", "secrets", "monitor")


@dataclass(slots=True, kw_only=True)
class NodeDescription:
    """One node, flattened out of the description.

    Attributes:
        name: its node-name, or a generated one.
        driver: its driver; `UnknownDriver` when there is none of that name (then there is a problem).
        options: as described; child members hold the names of nodes.
        broken: the options could not be used, and are only those that every node has, at their defaults.
        children: child name -> name of the node, None for an explicit null; what was omitted is not in it.
        where: path ("nodes[2].file").
        inline: it was described inside its parent.
        description: its own description with dotted keys expanded, inherited members and full file names; nodes
            inside it as tables.
    """

    name: str
    driver: type[Driver]
    options: NodeOptions
    broken: bool = False
    children: dict[str, str | None] = field(default_factory=dict)
    where: str = ""
    inline: bool = False
    description: dict[str, Any] = field(default_factory=dict)

    @property
    def read_only(self) -> bool:
        """Writes are refused."""
        return self.options.read_only


@dataclass(slots=True, kw_only=True)
class BitmapDescription:
    """One dirty bitmap.

    Attributes:
        options: as described; a sidecar with its full file name.
        where: path ("bitmaps[0]").
    """

    options: BitmapOptions
    where: str


@dataclass(slots=True, kw_only=True)
class ExportDescription:
    """One export.

    Attributes:
        options: as described.
        where: path ("exports[0]").
    """

    options: NbdExportOptions
    where: str


@dataclass(slots=True, kw_only=True)
class JobDescription:
    """One job.

    Attributes:
        options: as described; a target described in place has full file names.
        id: its job-id, or the device's name.
        target: name of the node that is its target, in `Description.nodes` or `target_nodes`; None: it has none.
        target_nodes: the target described in place, flattened, the target first; the job opens them itself.
        where: path ("jobs[0]").
    """

    options: BackupOptions
    id: str
    target: str | None
    target_nodes: list[NodeDescription]
    where: str


@dataclass(slots=True, kw_only=True)
class CheckpointDescription:
    """One checkpoint.

    Attributes:
        options: as described; nodes described in place have full file names.
        filters: the backup-top filters that it will put over disks, described as the jobs that would do so.
        where: path ("checkpoints[0]").
    """

    options: CheckpointOptions
    filters: list[JobDescription]
    where: str


@dataclass(slots=True, kw_only=True)
class Description:
    """See the module's text.

    Attributes:
        source: the data, and the place of every member.
        nodes: every node of the section `nodes`; children before the nodes that use them, where there is no cycle.
        bitmaps, checkpoints, exports, jobs: in the order of the file.
        nbd_server: where NBD exports are served; None when the section is not there.
    """

    source: Source
    nodes: list[NodeDescription] = field(default_factory=list)
    bitmaps: list[BitmapDescription] = field(default_factory=list)
    checkpoints: list[CheckpointDescription] = field(default_factory=list)
    exports: list[ExportDescription] = field(default_factory=list)
    jobs: list[JobDescription] = field(default_factory=list)
    nbd_server: NbdServerOptions | None = None

    @property
    def filters(self) -> list[JobDescription]:
        """The jobs, and what checkpoints do as jobs do."""
        return [*self.jobs, *(each for checkpoint in self.checkpoints for each in checkpoint.filters)]

    def model(self) -> Model:
        """The graph described: nodes, and a root for each edge that an export or a job will hold."""
        model = Model()
        add_nodes(model, self.nodes)
        for export in self.exports:
            need = Perm.CONSISTENT_READ | (Perm.WRITE if export.options.writable else Perm(0))
            key = model.add_root(
                f"export:{export.options.id}",
                need,
                ALL & ~Perm.RESIZE,
                owner=f"export '{export.options.id}'",
                where=export.where,
            )
            model.set_edge(key, "root", export.options.node_name, ROOT_ROLE, where=f"{export.where}.node-name")
        for job in self.filters:
            add_nodes(model, job.target_nodes)
            _add_job(model, job)
        for checkpoint in self.checkpoints:
            _add_checkpoint(model, checkpoint)
        return model


def add_nodes(model: Model, nodes: list[NodeDescription]) -> None:
    """Add flattened nodes, and their edges, to a model. Their names must be free."""
    for node in nodes:
        model.add_node(node.name, node.driver, node.options, where=node.where, broken=node.broken)
    for node in nodes:
        for child, target in node.children.items():
            if target is not None:
                role = node.driver.children[child].role
                model.set_edge(node.name, child, target, role, where=f"{node.where}.{child}")


def _add_job(model: Model, job: JobDescription) -> None:
    owner = f"job '{job.id}'"
    key = model.add_root(f"job:{job.id}", Perm.CONSISTENT_READ, ALL, stays=True, owner=owner, where=job.where)
    model.set_edge(key, "root", job.options.device, ROOT_ROLE, where=f"{job.where}.device")
    if job.target is not None:
        need = Perm.CONSISTENT_READ | Perm.WRITE
        key = model.add_root(
            f"job:{job.id}:target",
            need,
            ALL & ~Perm.RESIZE,
            stays=True,
            owner=f"{owner} (target)",
            where=job.where,
        )
        model.set_edge(key, "root", job.target, ROOT_ROLE, where=f"{job.where}.target")


def _add_checkpoint(model: Model, checkpoint: CheckpointDescription) -> None:
    """A root over each disk, so that it is known and in use."""
    owner = f"checkpoint '{checkpoint.options.name}'"
    for index, disk in enumerate(dict.fromkeys(checkpoint.options.disks)):
        where = f"{checkpoint.where}.disks[{index}]"
        key = model.add_root(f"{checkpoint.where}:{disk}", Perm(0), ALL, stays=True, owner=owner, where=where)
        model.set_edge(key, "root", disk, ROOT_ROLE, where=where)

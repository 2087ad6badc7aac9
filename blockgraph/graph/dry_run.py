# SPDX-FileCopyrightText: blockgraph contributors
# SPDX-License-Identifier: MIT
"""Opening the images of a description read-only, to see whether it would run.

Told is what can be known without a write: images that are not there or damaged, sizes that do not fit each other
(those of jobs too), files that may not be written or that two nodes would lock against each other, targets to be
created that are there already. No lock is taken (an image in use can be looked at). Every node is tried: a node whose
child could not be opened is passed over, since its child's problem is the cause.
"""

from __future__ import annotations

import errno
import itertools
import os
from collections.abc import Iterator

import msgspec

from blockgraph.bitmaps.attach import AttachSidecar, find_sidecar
from blockgraph.bitmaps.store import LiveStore
from blockgraph.driver import Protocol
from blockgraph.errors import BlockGraphError, GraphError, IOFailure
from blockgraph.graph import bitmaps, jobs, sizes
from blockgraph.graph.description import Description, NodeDescription, add_nodes
from blockgraph.graph.load import flatten_node
from blockgraph.graph.model import Model, NodeVertex
from blockgraph.graph.policy import OpenPolicy
from blockgraph.graph.problem import Problem
from blockgraph.node import Child, Node
from blockgraph.options import NodeOptions
from blockgraph.perm import Perm


async def dry_run(description: Description, policy: OpenPolicy | None = None) -> list[Problem]:
    """The problems of opening everything described, which has no problems by itself."""
    run = _DryRun(description, policy or OpenPolicy())
    try:
        for name in run.model.ordered(children_first=True):
            await run.open(name)
        run.compare()
    finally:
        await run.close()
    return run.problems


class _DryRun:
    def __init__(self, description: Description, policy: OpenPolicy) -> None:
        self.model = description.model()
        self.problems: list[Problem] = []
        self._description = description
        created = (job for job in description.jobs if job.options.mode == "create")
        self._created = {node.name for job in created for node in _made(job.target_nodes)}
        self._policy = policy
        self._nodes: dict[str, Node] = {}
        self._opened: list[Node] = []
        self._chain: dict[str, frozenset[str]] = {}
        self._names = (f"#implied{number}" for number in itertools.count())

    async def open(self, name: str) -> None:
        """Open one node over those that could be opened."""
        vertex = self.model.get(name)
        edges = self.model.children(name)
        if not isinstance(vertex, NodeVertex):
            return
        if name in self._created:
            self._to_be_created(vertex)
            return
        if any(edge.child not in self._nodes for edge in edges.values()):
            return
        node = Node(name, vertex.driver, _read_only(vertex.options))
        for key, edge in edges.items():
            node.set_child(key, Child(name, key, edge.role, self._nodes[edge.child]))
        self._opened.append(node)
        try:
            await node.driver.open()
            if not vertex.options.read_only:
                node.driver.check_writable()
            await self._implied(node, vertex)
            await node.driver.attached()
            await self._load_bitmaps(node)
        except BlockGraphError as error:
            if error.node == name and error.file is None:
                error.file = node.driver.filename()
            self._tell(error, vertex)
        else:
            self._nodes[name] = node

    async def _implied(self, node: Node, vertex: NodeVertex) -> None:
        for key, wish in node.driver.implied().items():
            chain = self._chain.get(node.name, frozenset())
            allowed = self._policy.describe(node.name, node.driver.filename(), key, wish, chain)
            flat = flatten_node(allowed.description, lambda: next(self._names))
            for inner in flat:
                inner.where = vertex.where or ""
            add_nodes(self.model, flat)
            self._chain[flat[0].name] = chain | {allowed.real_path}
            for inner in reversed(flat):
                await self.open(inner.name)
            below = self._nodes.get(flat[0].name)
            if below is not None:
                node.set_child(key, Child(node.name, key, vertex.driver.children[key].role, below))

    async def _load_bitmaps(self, node: Node) -> None:
        if not await find_sidecar(node) and node.bitmap_store is not None:
            node.bitmaps = {bitmap.name: bitmap for bitmap in await node.bitmap_store.load()}
        for bitmap in self._description.bitmaps:
            options = bitmap.options
            if options.node == node.name and options.sidecar:
                path = None if options.sidecar is True else options.sidecar
                await AttachSidecar(node.name, path, crash_safe=options.crash_safe, shared=True).attach(node)

    def _tell(self, error: BlockGraphError, vertex: NodeVertex) -> None:
        self.problems.append(Problem(kind=type(error), message=str(error), path=vertex.where or "", node=vertex.name))

    def _to_be_created(self, vertex: NodeVertex) -> None:
        filename = getattr(vertex.options, "filename", None)
        if filename is None:
            return
        folder = os.path.dirname(filename) or "."
        if os.path.lexists(filename):
            self._refused(vertex, f"'{filename}' is to be created, but it exists", errno.EEXIST, "choose another name")
        elif not os.path.isdir(folder):
            self._refused(vertex, f"there is no folder '{folder}'", errno.ENOENT, "make the folder first")
        elif not _writable(folder):
            hint = "run as a user who may write it"
            self._refused(vertex, f"nothing may be created in '{folder}'", errno.EACCES, hint)

    def _refused(self, vertex: NodeVertex, message: str, number: int, hint: str) -> None:
        self._tell(IOFailure(message, node=vertex.name, errno=number, hint=hint), vertex)

    def compare(self) -> None:
        """What shows only when everything that can be opened is open."""
        candidate, _ = jobs.with_filters(self.model, self._description)
        candidate.validate()  # for what each edge needs and shares
        tried = {node.name for node in self._opened}
        found = sizes.check(candidate, {name: node.size() for name, node in self._nodes.items()})
        self.problems += (problem for problem in found if problem.node not in tried)
        files = [
            (candidate.node(name), node.driver)
            for name, node in self._nodes.items()
            if isinstance(node.driver, Protocol) and node.driver.filename() is not None
        ]
        held = {
            name: {bitmap.name: bitmap.granularity for bitmap in node.bitmaps.values()}
            for name, node in self._nodes.items()
        }
        self.problems += bitmaps.check_opened(self.model, self._description, held)
        self.problems += _not_writable(candidate, files)
        self.problems += _locked_against_each_other(candidate, files)

    async def close(self) -> None:
        for node in reversed(self._opened):
            if isinstance(node.bitmap_store, LiveStore):
                await node.bitmap_store.close()
            await node.driver.close()


def _made(target: list[NodeDescription]) -> Iterator[NodeDescription]:
    """The nodes of a target to be created: it and its file. What is below it as its backing file is there."""
    by_name = {node.name: node for node in target}
    node = target[0] if target else None
    while node is not None:
        yield node
        node = by_name.get(node.children.get("file") or "")


def _read_only(options: NodeOptions) -> NodeOptions:
    return msgspec.structs.replace(options, read_only=True, force_share=True)


#: An open file: its vertex, with the options as described, and the driver that has opened it.
_File = tuple[NodeVertex, Protocol]


def _writable(path: str) -> bool:
    return os.access(path, os.W_OK, effective_ids=os.access in os.supports_effective_ids)


def _not_writable(model: Model, files: list[_File]) -> Iterator[Problem]:
    """Files that a run would open for writing and may not."""
    for vertex, driver in files:
        options, filename = vertex.options, driver.filename()
        needed = not options.auto_read_only or model.cumulative(vertex.name)[0] & Perm.WRITE
        if filename is not None and needed and not options.read_only and not _writable(filename):
            yield Problem(
                kind=IOFailure,
                message=f"'{filename}' may not be written",
                path=vertex.where or "",
                node=vertex.name,
                hint="run as a user who may write it, or set read-only",
            )


def _locked_against_each_other(model: Model, files: list[_File]) -> Iterator[Problem]:
    """One file behind two nodes, where one needs what the other does not share: whichever opens later is refused."""
    locking = [
        (vertex, driver, os.fstat(fd))
        for vertex, driver in files
        if (fd := driver.fd()) is not None
        and getattr(vertex.options, "locking", "off") != "off"
        and not vertex.options.force_share
    ]
    groups: dict[tuple[int, int], list[tuple[NodeVertex, Protocol]]] = {}
    for vertex, driver, facts in locking:
        groups.setdefault((facts.st_dev, facts.st_ino), []).append((vertex, driver))
    for same in groups.values():
        for (first, _), (second, driver) in itertools.combinations(same, 2):
            needs, blocks = first, second
            permission = _conflict(model, needs, blocks)
            if not permission:
                needs, blocks = second, first
                permission = _conflict(model, needs, blocks)
            if permission:
                yield Problem(
                    kind=GraphError,
                    message=(
                        f"'{driver.filename()}' is opened by {_place(first)} too: {_place(needs)} needs "
                        f"'{permission.words}', which {_place(blocks)} does not share"
                    ),
                    path=second.where or "",
                    related=(first.where,) if first.where else (),
                    node=second.name,
                    hint="let both use one node for the file, or name another file",
                )


def _place(vertex: NodeVertex) -> str:
    return vertex.where or vertex.label


def _conflict(model: Model, needs: NodeVertex, blocks: NodeVertex) -> Perm:
    return model.cumulative(needs.name)[0] & ~model.cumulative(blocks.name)[1]

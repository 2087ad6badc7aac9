# SPDX-FileCopyrightText: blockgraph contributors
# SPDX-License-Identifier: MIT
"""Any sequence of changes, with I/O running, against a plain model: dicts of who points where, and the bytes.

Every root has a writer that goes on while the graph changes. A root's disk is the memory node at the end of its chain
of filters, so the model knows at any time what it must read.
"""

from __future__ import annotations

import asyncio
import contextlib
from typing import Any

import pytest
from helpers.loop import driver_of
from helpers.runtime import Stubborn, state
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

import blockgraph
from blockgraph.backend import Backend
from blockgraph.errors import GraphError, NodeInUse
from blockgraph.protocols.memory import Memory

SIZE = 1 << 16
BLOCK = 64


class Writer:
    """Writes a number that grows to one block of the disk, again and again, until told to stop."""

    def __init__(self, backend: Backend, offset: int) -> None:
        self.backend = backend
        self.offset = offset
        self.written = 0
        self.wrong: list[str] = []
        self._stop = False
        self._task = asyncio.ensure_future(self._run())

    async def _run(self) -> None:
        while not self._stop:
            number = self.written + 1
            data = number.to_bytes(8, "big") * (BLOCK // 8)
            await self.backend.pwrite(self.offset, data)
            self.written = number
            read = await self.backend.pread(self.offset, BLOCK)
            if read != data:
                self.wrong.append(f"wrote {number}, read {int.from_bytes(read[:8], 'big')}")
            await asyncio.sleep(0)

    async def stop(self) -> None:
        """End it."""
        self._stop = True
        await self._task


class GraphMachine(RuleBasedStateMachine):
    """See the module's text."""

    def __init__(self) -> None:
        super().__init__()
        self.loop = asyncio.new_event_loop()
        self.graph = self.run(blockgraph.aopen({"nodes": [self.memory("m0")]}))
        #: node -> its child, None for a disk
        self.nodes: dict[str, str | None] = {"m0": None}
        #: root -> node
        self.roots: dict[str, str] = {}
        self.stays: set[str] = set()
        self.writers: dict[str, Writer] = {}
        self.count = 0
        Stubborn.fail_at = ""

    def run(self, work: Any) -> Any:
        """Let everything go on until the work is done."""
        return self.loop.run_until_complete(work)

    @staticmethod
    def memory(name: str) -> dict[str, Any]:
        """A disk."""
        return {"driver": "memory", "node-name": name, "size": SIZE}

    def name(self, prefix: str) -> str:
        """A new one."""
        self.count += 1
        return f"{prefix}{self.count}"

    def base(self, node: str) -> str:
        """The disk below."""
        while (below := self.nodes[node]) is not None:
            node = below
        return node

    def chain(self, node: str) -> set[str]:
        """The node and everything below it."""
        found = {node}
        while (below := self.nodes[node]) is not None:
            found.add(node := below)
        return found

    def parents(self, node: str) -> list[str]:
        """Nodes and roots above, directly."""
        return [n for n, below in self.nodes.items() if below == node] + [
            r for r, below in self.roots.items() if below == node
        ]

    def move_parents(self, old: str, new: str) -> None:
        """As inserting `new` above `old`."""
        keep = self.chain(new)
        for node, below in self.nodes.items():
            if below == old and node not in keep:
                self.nodes[node] = new
        for root, below in self.roots.items():
            if below == old and root not in self.stays:
                self.roots[root] = new

    # Rules.

    @rule()
    def add_disk(self) -> None:
        name = self.name("m")
        self.run(self.graph.add_node(self.memory(name)))
        self.nodes[name] = None

    @rule(data=st.data())
    def add_filter(self, data: st.DataObject) -> None:
        below = data.draw(st.sampled_from(sorted(self.nodes)))
        name = self.name("f")
        self.run(self.graph.add_node({"driver": "stubborn", "node-name": name, "file": below}))
        self.nodes[name] = below

    @rule(data=st.data())
    def insert(self, data: st.DataObject) -> None:
        above = data.draw(st.sampled_from(sorted(self.nodes)))
        name = self.name("f")
        self.run(self.graph.insert_filter({"driver": "stubborn", "node-name": name, "file": above}, above=above))
        self.nodes[name] = above
        self.move_parents(above, name)

    @rule(data=st.data(), stage=st.sampled_from(["open", "attached", "prepare_perm"]))
    def insert_that_fails(self, data: st.DataObject, stage: str) -> None:
        above = data.draw(st.sampled_from(sorted(self.nodes)))
        before = state(self.graph)
        Stubborn.fail_at = stage
        with pytest.raises(GraphError, match="refused"):
            self.run(self.graph.insert_filter({"driver": "stubborn", "node-name": "x", "file": above}, above=above))
        Stubborn.fail_at = ""
        assert state(self.graph) == before

    @rule(data=st.data(), steps=st.integers(0, 12))
    def insert_cancelled(self, data: st.DataObject, steps: int) -> None:
        above = data.draw(st.sampled_from(sorted(self.nodes)))
        name = self.name("f")

        async def cancel() -> None:
            description = {"driver": "stubborn", "node-name": name, "file": above}
            task = asyncio.ensure_future(self.graph.insert_filter(description, above=above))
            for _ in range(steps):
                await asyncio.sleep(0)
            task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await task

        self.run(cancel())
        if self.graph.model.has(name):
            self.nodes[name] = above
            self.move_parents(above, name)

    @precondition(lambda self: any(below for below in self.nodes.values()))
    @rule(data=st.data())
    def remove_filter(self, data: st.DataObject) -> None:
        name = data.draw(st.sampled_from(sorted(n for n, below in self.nodes.items() if below)))
        if any(self.roots.get(root) == name for root in self.stays):
            with pytest.raises(NodeInUse):
                self.run(self.graph.remove_filter(name))
            return
        self.run(self.graph.remove_filter(name))
        below = self.nodes.pop(name)
        assert below is not None
        for node, child in self.nodes.items():
            if child == name:
                self.nodes[node] = below
        for root, child in self.roots.items():
            if child == name:
                self.roots[root] = below

    @rule(data=st.data())
    def remove_node(self, data: st.DataObject) -> None:
        name = data.draw(st.sampled_from(sorted(self.nodes)))
        if self.parents(name):
            with pytest.raises(NodeInUse):
                self.run(self.graph.remove_node(name))
        elif len(self.nodes) > 1:
            self.run(self.graph.remove_node(name))
            del self.nodes[name]

    @rule(data=st.data())
    def replace_in_one_chain(self, data: st.DataObject) -> None:
        """Only among nodes that show the same disk, so that writers go on meanwhile."""
        old = data.draw(st.sampled_from(sorted(self.nodes)))
        same = sorted(node for node in self.nodes if self.base(node) == self.base(old) and node != old)
        if not same:
            return
        new = data.draw(st.sampled_from(same))
        self.run(self.graph.replace_node(old, new))
        self.move_parents(old, new)

    @rule(data=st.data(), stays=st.booleans())
    def attach(self, data: st.DataObject, stays: bool) -> None:
        if len(self.roots) >= 4:
            return
        node = data.draw(st.sampled_from(sorted(self.nodes)))
        name = self.name("r")
        backend = self.run(self.graph.backend(node, name=name, writable=True, stays=stays))
        self.roots[name] = node
        if stays:
            self.stays.add(name)

        async def start() -> Writer:
            return Writer(backend, self.count * BLOCK % SIZE)

        self.writers[name] = self.run(start())

    @precondition(lambda self: bool(self.roots))
    @rule(data=st.data())
    def detach(self, data: st.DataObject) -> None:
        name = data.draw(st.sampled_from(sorted(self.roots)))
        writer = self.writers.pop(name)
        self.run(writer.stop())
        assert writer.wrong == []
        disk = driver_of(self.graph, self.base(self.roots[name]), Memory)
        seen = bytearray(8)
        self.run(disk.pread(writer.offset, memoryview(seen)))
        assert int.from_bytes(seen, "big") == writer.written
        self.run(self.graph.close_backend(writer.backend))
        del self.roots[name]
        self.stays.discard(name)

    @rule(data=st.data(), discard=st.sampled_from(["ignore", "unmap"]))
    def reopen(self, data: st.DataObject, discard: str) -> None:
        name = data.draw(st.sampled_from(sorted(self.nodes)))
        options = {"discard": discard, **({"size": SIZE} if self.nodes[name] is None else {})}
        self.run(self.graph.reopen(name, options))
        assert self.graph.node(name).options.discard == discard

    @rule(data=st.data())
    def drain(self, data: st.DataObject) -> None:
        name = data.draw(st.sampled_from(sorted(self.nodes)))

        async def hold() -> None:
            async with self.graph.drained([name]):
                assert not self.graph.node(name).busy
                before = {root: writer.written for root, writer in self.writers.items()}
                for _ in range(20):
                    await asyncio.sleep(0)
                for root, writer in self.writers.items():
                    if name in self.chain(self.roots[root]):
                        assert writer.written == before[root]

        self.run(hold())

    # What always holds.

    @invariant()
    def graph_is_the_model(self) -> None:
        edges = state(self.graph)["edges"]
        expected = {(node, "file"): below for node, below in self.nodes.items() if below is not None}
        expected |= {(f"@{root}", "root"): node for root, node in self.roots.items()}
        assert {key: value[0] for key, value in edges.items()} == expected
        assert {node.name for node in self.graph.nodes()} == set(self.nodes)
        assert not self.graph.drains

    @invariant()
    def writers_go_on(self) -> None:
        async def wait() -> None:
            for writer in self.writers.values():
                before = writer.written
                for _ in range(2000):
                    if writer.written > before:
                        break
                    await asyncio.sleep(0)
                else:
                    raise AssertionError(f"{writer.backend} is stuck")

        self.run(wait())
        for writer in self.writers.values():
            assert writer.wrong == []

    def teardown(self) -> None:
        for writer in self.writers.values():
            self.run(writer.stop())
        self.run(self.graph.close())
        assert asyncio.all_tasks(self.loop) == set()
        self.loop.close()


TestGraphMachine = GraphMachine.TestCase
TestGraphMachine.settings = settings(
    max_examples=60,
    stateful_step_count=25,
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow],
    derandomize=True,
)

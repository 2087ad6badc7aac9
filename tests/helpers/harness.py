# SPDX-FileCopyrightText: blockgraph contributors
# SPDX-License-Identifier: MIT
"""Nodes without a graph: one driver, or one over another, opened and given permissions by hand."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import msgspec

from blockgraph.driver import Driver
from blockgraph.node import Child, Node
from blockgraph.perm import ALL, Perm, Role
from blockgraph.registry import get_driver

READ = Perm.CONSISTENT_READ
WRITE = Perm.CONSISTENT_READ | Perm.WRITE
EVERYTHING = Perm.CONSISTENT_READ | Perm.WRITE | Perm.RESIZE


def make_node(driver: str | type[Driver], name: str = "n", **options: Any) -> Node:
    """A node that is not open. Options under their names in a description, with "_" for "-"."""
    cls = get_driver(driver) if isinstance(driver, str) else driver
    described = {key.replace("_", "-"): value for key, value in options.items()}
    return Node(name, cls, msgspec.convert({"driver": cls.name, **described}, cls.Options))


async def hold(node: Node, need: Perm, share: Perm = ALL) -> None:
    """Give the node's driver these permissions, as a committed transaction would."""
    try:
        await node.driver.prepare_perm(need, share)
    except BaseException:
        node.driver.abort_perm()
        raise
    node.driver.commit_perm()


def edge(node: Node, need: Perm = EVERYTHING, share: Perm = ALL, role: Role = Role.DATA | Role.PRIMARY) -> Child:
    """An edge of a test to the node."""
    child = Child("test", "file", role, node)
    child.need, child.share = need, share
    return child


def put_child(node: Node, name: str, below: Node, need: Perm = EVERYTHING, share: Perm = ALL) -> None:
    """Make `below` a child of `node`."""
    child = Child(node.name, name, node.driver.children[name].role, below)
    child.need, child.share = need, share
    node.set_child(name, child)


@asynccontextmanager
async def opened(
    driver: str | type[Driver],
    name: str = "n",
    *,
    need: Perm = EVERYTHING,
    share: Perm = ALL,
    children: dict[str, Node] | None = None,
    **options: Any,
) -> AsyncIterator[Child]:
    """An edge to an open node that holds the permissions; closed at the end."""
    node = make_node(driver, name, **options)
    for key, below in (children or {}).items():
        put_child(node, key, below, need, share)
    try:
        await node.driver.open()
        await node.driver.attached()
        await hold(node, need, share)
        yield edge(node, need, share)
    finally:
        await node.driver.close()


async def read(child: Child, offset: int, length: int) -> bytes:
    """The bytes of a range; the buffer is dirty before."""
    buf = bytearray(b"\xa5" * length)
    await child.pread(offset, memoryview(buf))
    return bytes(buf)


async def write(child: Child, offset: int, data: bytes) -> None:
    """Write through an edge."""
    await child.pwrite(offset, memoryview(data))


async def extents(child: Child, offset: int = 0, length: int | None = None) -> list[tuple[int, int, str]]:
    """Block status of a range as (offset, length, "data" | "zero" | "data+zero"), neighbours of a kind merged."""
    end = child.node.size() if length is None else offset + length
    found: list[tuple[int, int, str]] = []
    while offset < end:
        status = await child.block_status(offset, end - offset)
        assert status.offset == offset
        assert 0 < status.length <= end - offset
        kind = "+".join(word for word, given in (("data", status.data), ("zero", status.zero)) if given)
        if found and found[-1][2] == kind:
            found[-1] = (found[-1][0], found[-1][1] + status.length, kind)
        else:
            found.append((offset, status.length, kind))
        offset += status.length
    return found

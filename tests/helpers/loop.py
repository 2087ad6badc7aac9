# SPDX-FileCopyrightText: blockgraph contributors
# SPDX-License-Identifier: MIT
"""Tests that run in an event loop, over small graphs."""

from __future__ import annotations

import asyncio
import functools
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import asynccontextmanager
from typing import Any, ParamSpec, TypeVar

import blockgraph
from blockgraph.api import AsyncGraph
from blockgraph.backend import Backend
from blockgraph.driver import Driver

P = ParamSpec("P")
D = TypeVar("D", bound=Driver)


def in_loop(test: Callable[P, Coroutine[Any, Any, None]]) -> Callable[P, None]:
    """Run an async test; it fails when it leaves tasks behind."""

    @functools.wraps(test)
    def run(*args: P.args, **kwargs: P.kwargs) -> None:
        asyncio.run(_checked(test(*args, **kwargs)))

    return run


async def _checked(test: Coroutine[Any, Any, None]) -> None:
    await test
    left = asyncio.all_tasks() - {asyncio.current_task()}
    assert not left, f"tasks left behind: {left}"


@asynccontextmanager
async def graph_of(*nodes: dict[str, Any]) -> AsyncIterator[AsyncGraph]:
    """A graph of these nodes."""
    async with await blockgraph.aopen({"nodes": list(nodes)}) as graph:
        yield graph


@asynccontextmanager
async def backend_over(*nodes: dict[str, Any], resize: bool = True, writable: bool = True) -> AsyncIterator[Backend]:
    """A root over the last of these nodes."""
    async with graph_of(*nodes) as graph:
        backend = await graph.backend(nodes[-1]["node-name"], writable=writable, resize=resize)
        yield backend
        await graph.close_backend(backend)


def driver_of(graph: AsyncGraph, node: str, kind: type[D]) -> D:
    """The driver of a node, which is of that class."""
    driver = graph.node(node).driver
    assert isinstance(driver, kind)
    return driver

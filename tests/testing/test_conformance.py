# SPDX-FileCopyrightText: blockgraph contributors
# SPDX-License-Identifier: MIT
"""The conformance kit: it lets correct drivers pass and finds every planted bug."""

from __future__ import annotations

import asyncio
import sys
import textwrap
import types
from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from typing import Any

import pytest
from helpers.broken import BROKEN, FlushHangs, Good, GoodFilter, WrongError, describe
from helpers.loop import backend_over, in_loop

from blockgraph import registry, trace
from blockgraph.backend import Backend
from blockgraph.driver import Driver, Filter
from blockgraph.extent import BlockStatus
from blockgraph.flags import Flag
from blockgraph.node import Node
from blockgraph.options import NodeOptions, NodeRef
from blockgraph.testing import ConformanceError, check_driver, checks, conformance

SIZE = 300_000


@pytest.fixture
def one_node(monkeypatch: pytest.MonkeyPatch) -> Callable[..., Callable[[], AbstractAsyncContextManager[Backend]]]:
    """Makes factories for nodes of a driver that only this test knows."""
    monkeypatch.setattr(registry, "_loaded", dict(registry._loaded))

    def factory(driver: type[Driver], size: int = SIZE, writable: bool = True) -> Any:
        monkeypatch.setattr(driver, "name", driver.__name__.lower())
        registry.register(driver)
        return lambda: backend_over(describe(driver, size), writable=writable, resize=writable)

    return factory


@pytest.mark.parametrize("size", [1, 511, 512, 65536, SIZE, 1 << 20])
@pytest.mark.parametrize("driver", [Good, GoodFilter], ids=["protocol", "filter"])
@in_loop
async def test_kit_correct_driver_passes(one_node: Any, driver: type[Driver], size: int) -> None:
    await check_driver(one_node(driver, size), size=size)


@in_loop
async def test_kit_read_only_root_passes(one_node: Any) -> None:
    await check_driver(one_node(Good, writable=False), size=SIZE, writable=False, contents=bytes(SIZE))


@in_loop
async def test_kit_bare_node_passes() -> None:
    @asynccontextmanager
    async def bare() -> AsyncIterator[Node]:
        async with backend_over({"node-name": "it", "driver": "memory", "size": SIZE}) as backend:
            yield backend.node

    await check_driver(bare, size=SIZE)


@pytest.mark.parametrize("driver, check", BROKEN, ids=[driver.__name__ for driver, _ in BROKEN])
@in_loop
async def test_kit_planted_bug_found(one_node: Any, driver: type[Driver], check: str) -> None:
    # The root stays open behind a hanging flush, so a factory that ends without closing is needed for that one.
    make = _abandoned(driver, one_node(driver)) if driver is FlushHangs else one_node(driver)
    with pytest.raises(ConformanceError) as caught:
        await check_driver(make, size=SIZE, persistent=True, only={check}, seconds=0.2 if driver is FlushHangs else 60)
    assert [failure.check.name for failure in caught.value.failures] == [check]


def _abandoned(driver: type[Driver], make: Any) -> Any:
    @asynccontextmanager
    async def bare() -> AsyncIterator[Node]:
        node = Node("it", driver, driver.Options(driver=driver.name, size=SIZE))  # type: ignore[call-arg]
        await node.driver.open()
        yield node

    return bare


@in_loop
async def test_kit_without_only_reports_every_failure(one_node: Any) -> None:
    with pytest.raises(ConformanceError) as caught:
        await check_driver(one_node(WrongError), size=SIZE)
    names = {failure.check.name for failure in caught.value.failures}
    assert {"write_zeroes", "workload", "write_after_zero"} <= names
    assert "round_trip" not in names
    text = str(caught.value)
    assert "raised an error that is no BlockGraphError, OSError" in text
    assert "rule: Zeroed ranges read as zeroes" in text
    assert text.startswith(f"{len(names)} of {len(checks())} checks failed")


@in_loop
async def test_kit_other_contents_than_stated_fails(one_node: Any) -> None:
    with pytest.raises(ConformanceError, match=r"as it was made: byte 7 is 0x00, expected 0x01 \(1 wrong bytes"):
        await check_driver(one_node(Good), size=SIZE, contents=bytes(7) + b"\1" + bytes(SIZE - 8), only={"size"})


@in_loop
async def test_kit_same_seed_same_requests(one_node: Any) -> None:
    seen: list[list[tuple[str, int, int]]] = []
    for seed in (1, 1, 2):
        with trace.record() as events:
            await check_driver(one_node(Good), size=SIZE, only={"workload"}, seed=seed)
        seen.append([(event.op, event.offset, event.length) for event in events])
    assert seen[0] == seen[1] != seen[2]


def test_kit_example_in_manual_passes(monkeypatch: pytest.MonkeyPatch) -> None:
    manual = conformance.__doc__ or ""
    example = textwrap.dedent(manual[manual.index("    INVERTED") : manual.index("where `one_node`")])
    assert len(example.splitlines()) <= 36
    monkeypatch.setattr(registry, "_loaded", dict(registry._loaded))

    def one_node(driver: type[Driver], members: dict[str, Any]) -> AbstractAsyncContextManager[Backend]:
        registry.register(driver)
        return backend_over({"node-name": "it", "driver": driver.name, **members})

    module = types.ModuleType("example")
    vars(module).update(
        Filter=Filter,
        Flag=Flag,
        BlockStatus=BlockStatus,
        NodeOptions=NodeOptions,
        NodeRef=NodeRef,
        asyncio=asyncio,
        check_driver=check_driver,
        one_node=one_node,
        memory=lambda size: {"driver": "memory", "size": size},
    )
    monkeypatch.setitem(sys.modules, "example", module)
    exec(compile(example, "example", "exec", dont_inherit=True), vars(module))
    module.test_invert()

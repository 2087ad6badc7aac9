# SPDX-FileCopyrightText: blockgraph contributors
# SPDX-License-Identifier: MIT
"""A request behaves like a task to the coroutine it runs."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from contextvars import ContextVar
from typing import Any

import pytest

from blockgraph.exports.eager import Request
from tests.helpers.nbd import run_async

variable: ContextVar[str] = ContextVar("variable", default="outside")


class Recorded(Request):
    """Keeps its outcome."""

    def __init__(self) -> None:
        self.outcome: asyncio.Future[Any] = asyncio.get_running_loop().create_future()

    def finished(self, result: Any, error: BaseException | None) -> None:
        if error is None:
            self.outcome.set_result(result)
        elif isinstance(error, asyncio.CancelledError):
            self.outcome.set_exception(RuntimeError("cancelled"))
        else:
            self.outcome.set_exception(error)


async def begin(coro: Coroutine[Any, Any, Any]) -> Recorded:
    """Start it as a callback of the loop does: outside of any task."""
    request = Recorded()
    started = asyncio.get_running_loop().create_future()

    def start() -> None:
        request.start(asyncio.get_running_loop(), coro)
        started.set_result(request.outcome.done())

    asyncio.get_running_loop().call_soon(start)
    await started
    return request


@run_async
async def test_request_that_never_waits_is_finished_when_started() -> None:
    async def work() -> int:
        return 7

    request = await begin(work())
    assert request.outcome.result() == 7


@run_async
async def test_request_that_waits_goes_on_later() -> None:
    event = asyncio.Event()

    async def work() -> str:
        await asyncio.sleep(0)
        await event.wait()
        return "done"

    request = await begin(work())
    assert not request.outcome.done()
    event.set()
    assert await request.outcome == "done"


@run_async
async def test_request_error_of_awaited_future_reaches_coroutine() -> None:
    future: asyncio.Future[None] = asyncio.get_running_loop().create_future()

    async def work() -> None:
        await future

    request = await begin(work())
    future.set_exception(ValueError("x"))
    with pytest.raises(ValueError, match="x"):
        await request.outcome


@run_async
async def test_request_timeout_and_task_group_work_inside() -> None:
    async def work() -> str:
        try:
            async with asyncio.timeout(0.001):
                await asyncio.Event().wait()
        except TimeoutError:
            pass
        async with asyncio.TaskGroup() as group:
            task = group.create_task(asyncio.sleep(0, "inner"))
        return task.result()

    request = await begin(work())
    assert await request.outcome == "inner"
    assert request.cancelling() == 0


@run_async
async def test_request_failing_task_group_raises_its_group() -> None:
    async def fail() -> None:
        raise ValueError("inside")

    async def work() -> None:
        async with asyncio.TaskGroup() as group:
            group.create_task(fail())
            await asyncio.Event().wait()

    request = await begin(work())
    with pytest.raises(ExceptionGroup):
        await request.outcome


@run_async
async def test_request_cancelled_while_waiting_ends_cancelled() -> None:
    cleaned = []

    async def work() -> None:
        try:
            await asyncio.Event().wait()
        finally:
            cleaned.append(True)
            await asyncio.sleep(0)
            cleaned.append(True)

    request = await begin(work())
    request.cancel()
    with pytest.raises(RuntimeError, match="cancelled"):
        await request.outcome
    assert cleaned == [True, True]


@run_async
async def test_request_is_the_current_task_inside_only() -> None:
    seen = []

    async def work() -> None:
        seen.append(asyncio.current_task())
        await asyncio.sleep(0)
        seen.append(asyncio.current_task())

    mine = asyncio.current_task()
    request = await begin(work())
    await request.outcome
    assert seen == [request, request]
    assert asyncio.current_task() is mine


@run_async
async def test_request_context_variables_stay_inside() -> None:
    async def work() -> str:
        token = variable.set("inside")
        await asyncio.sleep(0)
        seen = variable.get()
        variable.reset(token)
        return seen

    request = await begin(work())
    assert await request.outcome == "inside"
    assert variable.get() == "outside"

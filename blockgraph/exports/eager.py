# SPDX-FileCopyrightText: blockgraph contributors
# SPDX-License-Identifier: MIT
"""Request: a task that starts at once.

`asyncio.Task` puts the first step of a coroutine off to the next turn of the loop, and costs several times what a
cached read does. Most requests of an export never wait. A `Request` therefore runs its coroutine where it is started;
only one that really waits is continued by the loop. To the coroutine it is the current task (`asyncio.timeout` and
`TaskGroup` work), by the calls that asyncio documents for task implementations of third parties.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from contextvars import Context, copy_context
from typing import Any, cast

_enter_task = asyncio.tasks._enter_task
_leave_task = asyncio.tasks._leave_task


def _call(function: Callable[..., Any], argument: object) -> Any:
    return function(argument)


class Request:
    """One request in flight. Derive from it and override `finished`.

    Use from the loop's thread, outside of any task.
    """

    __slots__ = ("__weakref__", "_cancel_requests", "_context", "_coro", "_done", "_loop", "_must_cancel", "_waits_for")

    def start(self, loop: asyncio.AbstractEventLoop, coro: Coroutine[Any, Any, Any]) -> None:
        """Run `coro` until it waits or ends; `finished` may be called before this returns."""
        self._loop = loop
        self._coro = coro
        self._context: Context = copy_context()
        self._waits_for: asyncio.Future[Any] | None = None
        self._must_cancel = False
        self._cancel_requests = 0
        self._done = False
        # Later steps are called by the loop, which enters the context itself.
        self._step(None, self._context.run)

    def finished(self, result: Any, error: BaseException | None) -> None:
        """The coroutine has returned `result`, or raised `error`."""
        raise NotImplementedError

    # What asyncio expects of the current task.

    def cancel(self, msg: object = None) -> bool:
        """Throw CancelledError into the coroutine where it waits, in a later turn of the loop."""
        self._cancel_requests += 1
        if self._waits_for is None or not self._waits_for.cancel(msg):
            self._must_cancel = True
        return True

    def done(self) -> bool:
        """The coroutine has ended."""
        return self._done

    def cancelling(self) -> int:
        """How many cancellations are pending."""
        return self._cancel_requests

    def uncancel(self) -> int:
        """One cancellation has been dealt with."""
        self._cancel_requests = max(0, self._cancel_requests - 1)
        return self._cancel_requests

    def get_loop(self) -> asyncio.AbstractEventLoop:
        """The loop that drives it."""
        return self._loop

    def get_name(self) -> str:
        """For debuggers."""
        return repr(self)

    def get_coro(self) -> Coroutine[Any, Any, Any]:
        """For debuggers."""
        return self._coro

    # Driving.

    def _step(self, error: BaseException | None, run: Callable[..., Any] = _call) -> None:
        if self._must_cancel:
            if not isinstance(error, asyncio.CancelledError):
                error = asyncio.CancelledError()
            self._must_cancel = False
        task = cast("asyncio.Task[Any]", self)
        _enter_task(self._loop, task)
        try:
            waits_for = run(self._coro.send, None) if error is None else run(self._coro.throw, error)
        except StopIteration as stop:
            result, error = stop.value, None
        except (KeyboardInterrupt, SystemExit) as stop:
            self._done = True
            self.finished(None, stop)
            raise
        except BaseException as failure:
            result, error = None, failure
        else:
            self._wait(waits_for)
            return
        finally:
            _leave_task(self._loop, task)
        self._done = True
        self.finished(result, error)

    def _wait(self, waits_for: asyncio.Future[Any] | None) -> None:
        if waits_for is None:  # asyncio.sleep(0)
            self._loop.call_soon(self._step, None, context=self._context)
            return
        # The mark by which a future tells a bare `yield` from `await`.
        assert waits_for._asyncio_future_blocking, f"{self._coro!r} waits for {waits_for!r}, which is no future"
        waits_for._asyncio_future_blocking = False
        self._waits_for = waits_for
        waits_for.add_done_callback(self._wake, context=self._context)
        if self._must_cancel and waits_for.cancel():
            self._must_cancel = False

    def _wake(self, future: asyncio.Future[Any]) -> None:
        self._waits_for = None
        try:
            future.result()
        except BaseException as error:
            self._step(error)
        else:
            self._step(None)

# SPDX-FileCopyrightText: blockgraph contributors
# SPDX-License-Identifier: MIT
"""The conformance kit: does a driver do what every driver promises?

`check_driver` takes a way to make the node under test, runs each rule on a fresh one and reports every rule that was
broken. It reads, writes, zeroes, discards, resizes, cancels and does many things at once, at every alignment, and
compares with a bytearray; it follows `map` down to storage and compares again. It needs no test framework.

A filter of a third party, and its whole test:

    INVERTED = bytes(range(255, -1, -1))

    class InvertOptions(NodeOptions, kw_only=True, frozen=True):
        file: NodeRef

    class Invert(Filter):
        name = "invert"
        Options = InvertOptions
        transparent = False

        async def pread(self, offset: int, buf: memoryview) -> None:
            await self.file.pread(offset, buf)
            buf[:] = bytes(buf).translate(INVERTED)

        async def pwrite(self, offset: int, buf: memoryview, flags: Flag = Flag.NONE) -> None:
            await self.file.pwrite(offset, memoryview(bytes(buf).translate(INVERTED)), flags)

        async def pwrite_zeroes(self, offset: int, length: int, flags: Flag = Flag.NONE) -> None:
            raise self.unsupported("pwrite_zeroes")     # the node then writes zeroes through pwrite

        async def discard(self, offset: int, length: int) -> None:
            raise self.unsupported("discard")           # zeroes below would be 0xff here; so with truncate

        async def truncate(self, size: int) -> None:
            raise self.unsupported("truncate")

        async def block_status(self, offset: int, length: int) -> BlockStatus:
            return BlockStatus(offset, length, True, False, 0, self.node)

    def test_invert():
        async def run():
            await check_driver(lambda: one_node(Invert, {"file": memory(1 << 20)}), size=1 << 20)
        asyncio.run(run())

where `one_node` is an asynchronous context manager that yields a `Backend` (from `graph.backend(..., writable=True)`)
or a `Node`. Each call must give a node of the stated size; its contents do not matter, unless `contents` states them.

Limits: a driver that does not keep what is written (null-co) can be checked with writable=False only. Crash safety is
the business of `blockgraph.testing.write_log`, behaviour under errors that of the inject-error filter.
"""

from __future__ import annotations

import asyncio
import traceback
from collections.abc import Callable, Collection
from contextlib import AbstractAsyncContextManager
from typing import NamedTuple

from blockgraph.backend import Backend
from blockgraph.errors import BlockGraphError
from blockgraph.node import Child, Node
from blockgraph.perm import ALL, Perm, Role
from blockgraph.testing.checks import CHECKS, Check, Subject, Violation

#: Makes the node under test. A Node is used with the permissions to read and, if writable, to write and resize.
Factory = Callable[[], AbstractAsyncContextManager[Backend | Node]]


class Failure(NamedTuple):
    """A rule that was broken.

    Attributes:
        check: which.
        error: how: a Violation, or what the driver raised and should not have.
    """

    check: Check
    error: Exception

    def __str__(self) -> str:
        text = f"{self.check.name}: {self.error}" if isinstance(self.error, Violation) else self._raised()
        return f"{text}\n    rule: {self.check.rule}"

    def _raised(self) -> str:
        kind = type(self.error).__name__
        frames = traceback.extract_tb(self.error.__traceback__)
        where = f" at {frames[-1].filename}:{frames[-1].lineno}" if frames else ""
        what = "raised" if isinstance(self.error, BlockGraphError) else "raised an error that is no BlockGraphError,"
        return f"{self.check.name}: {what} {kind}: {self.error}{where}"


class ConformanceError(AssertionError):
    """The driver broke rules.

    Attributes:
        failures: all of them.
    """

    def __init__(self, failures: list[Failure], total: int) -> None:
        lines = "\n".join(f"  {failure}" for failure in failures)
        super().__init__(f"{len(failures)} of {total} checks failed:\n{lines}")
        self.failures = failures


def checks(*, writable: bool = True, persistent: bool = False) -> list[Check]:
    """The checks that apply, for a test framework that wants one test for each (see `only`)."""
    return [check for check in CHECKS if (writable or not check.writes) and (persistent or not check.again)]


async def check_driver(
    make: Factory,
    *,
    size: int,
    writable: bool = True,
    contents: bytes | None = None,
    persistent: bool = False,
    only: Collection[str] = (),
    seed: int = 0,
    seconds: float = 60.0,
) -> None:
    """Run the kit.

    Args:
        make: called once for each check (twice to see whether contents persist).
        size: of the node, bytes, at least one; some MiB at most, since the kit keeps a copy.
        writable: run the checks that write, too; those that resize run if the root has RESIZE.
        contents: what the node contains at first; None: anything.
        persistent: what was written and flushed is there when `make` is called again.
        only: names of checks; empty: all that apply.
        seed: of the random parts.
        seconds: time that one check may take; longer counts as a hang.
    Raises:
        ConformanceError: names every rule that was broken.
    """
    chosen = [check for check in checks(writable=writable, persistent=persistent) if not only or check.name in only]
    failures = []
    for check in chosen:
        error = await _run(check, make, size, writable, contents, seed, seconds)
        if error is not None:
            failures.append(Failure(check, error))
    if failures:
        raise ConformanceError(failures, len(chosen)) from failures[0].error


async def _run(
    check: Check, make: Factory, size: int, writable: bool, contents: bytes | None, seed: int, seconds: float
) -> Exception | None:
    """Run one check on a fresh node; what went wrong."""
    try:
        async with asyncio.timeout(seconds) as limit:
            async with make() as made:
                backend = as_backend(made, writable=writable)
                if check.resizes and not backend.need & Perm.RESIZE:
                    return None
                subject = Subject(backend, size, seed)
                if contents is not None:
                    subject.compare(0, await subject.read(0, size), contents, "as it was made")
                await check.run(subject)
            if check.again:
                async with make() as made:
                    again = Subject(as_backend(made, writable=writable), size, seed)
                    subject.compare(0, await again.read(0, size), subject.model, "closed and opened again")
    except TimeoutError as error:
        return Violation(f"did not end within {seconds:g} seconds") if limit.expired() else error
    except Exception as error:
        return error
    return None


def as_backend(made: Backend | Node, *, writable: bool = True) -> Backend:
    """A root over a bare node, outside any graph; a root as it is."""
    if isinstance(made, Backend):
        return made
    need = Perm.CONSISTENT_READ | (Perm.WRITE | Perm.RESIZE if writable else Perm(0))
    backend = Backend("conformance", need=need)
    edge = Child("conformance", "root", Role.FILTERED | Role.PRIMARY, made)
    edge.need, edge.share = need, ALL
    backend.root = edge
    return backend

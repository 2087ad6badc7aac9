# SPDX-FileCopyrightText: blockgraph contributors
# SPDX-License-Identifier: MIT
"""Subject: the node under test, beside a bytearray that says what it has to contain."""

from __future__ import annotations

import random
from collections.abc import Awaitable, Callable, Iterator, Sequence
from typing import NamedTuple

from blockgraph.backend import Backend
from blockgraph.errors import BlockGraphError, IOFailure
from blockgraph.flags import Flag
from blockgraph.node import Node

#: What buffers hold before a read, and what lies around them.
DIRT = 0xA5
_GUARD = 64

#: Where layouts tend to have seams: sectors, pages, clusters of 64 KiB.
_SEAMS = (512, 4096, 65536)
_LENGTHS = (1, 2, 511, 512, 513, 4096, 4097, 65536, 65537, 131072)


class Violation(AssertionError):
    """The driver broke a rule; the text says which and where."""


class Check(NamedTuple):
    """One rule of the kit.

    Attributes:
        name: as in messages and for `only`.
        rule: what a driver promises, one line.
        run: raises Violation, or whatever the driver raised.
        writes: it needs a writable backend.
        resizes: it needs one that may resize.
        again: what it leaves must be there when the node is closed and opened again.
    """

    name: str
    rule: str
    run: Callable[[Subject], Awaitable[None]]
    writes: bool = False
    resizes: bool = False
    again: bool = False


#: All checks, in the order they run.
CHECKS: list[Check] = []


def check(
    *, writes: bool = False, resizes: bool = False, again: bool = False
) -> Callable[[Callable[[Subject], Awaitable[None]]], Callable[[Subject], Awaitable[None]]]:
    """Make a coroutine function `check_<name>` a part of the kit; the first line of its docstring is the rule."""

    def register(run: Callable[[Subject], Awaitable[None]]) -> Callable[[Subject], Awaitable[None]]:
        rule = (run.__doc__ or "").partition("\n")[0]
        CHECKS.append(Check(run.__name__.removeprefix("check_"), rule, run, writes, resizes, again))
        return run

    return register


class Subject:
    """What a check works on.

    Attributes:
        backend: a root over the node under test.
        size: bytes, as the caller of the kit stated.
        rng: seeded anew for each check.
        model: the expected contents; valid after `load`.
        initial: the contents at the start.
    """

    def __init__(self, backend: Backend, size: int, seed: int) -> None:
        self.backend = backend
        self.size = size
        self.rng = random.Random(seed)
        self.model = bytearray()
        self.initial = b""

    @property
    def node(self) -> Node:
        """The node under test."""
        return self.backend.node

    # Requests.

    async def read(self, offset: int, length: int) -> bytes:
        """The bytes of a range, read into a dirty buffer whose surroundings must stay untouched."""
        area = bytearray([DIRT]) * (length + 2 * _GUARD)
        view = memoryview(area)[_GUARD : _GUARD + length]
        await self.backend.pread_into(offset, view)
        if area[:_GUARD].strip(bytes([DIRT])) or area[_GUARD + length :].strip(bytes([DIRT])):
            raise Violation(f"read of {length} bytes at {offset} wrote outside its buffer")
        return bytes(view)

    async def load(self) -> None:
        """Take the present contents as the expected ones."""
        self.model = bytearray(await self.read(0, self.size))
        self.initial = bytes(self.model)

    async def write(self, offset: int, data: bytes, flags: Flag = Flag.NONE) -> None:
        """Write, and expect it to be there; the driver must not touch the caller's buffer."""
        source = bytearray(data)
        await self.backend.pwrite(offset, memoryview(source), flags)
        if source != data:
            raise Violation(f"write of {len(data)} bytes at {offset} changed the caller's buffer")
        self.model[offset : offset + len(data)] = data

    async def zero(self, offset: int, length: int, flags: Flag = Flag.NONE) -> None:
        """Write zeroes, and expect them."""
        await self.backend.write_zeroes(offset, length, flags)
        self.model[offset : offset + length] = bytes(length)

    async def discard(self, offset: int, length: int) -> None:
        """Discard; each byte then is what it was, what it was at the start, or zero, and stays that."""
        await self.backend.discard(offset, length)
        found = await self.read(offset, length)
        end = offset + length
        at = first_foreign(found, [self.model[offset:end], bytes(length), self.initial[offset:end]])
        if at is not None:
            raise Violation(
                f"after discard of {length} bytes at {offset}, byte {offset + at} is {found[at]:#04x}: "
                f"neither its old value {self.model[offset + at]:#04x} nor zero"
            )
        self.model[offset : offset + length] = found

    # Expectations.

    async def expect(self, offset: int, length: int, after: str) -> None:
        """The range reads as the model says."""
        start, end = max(0, offset), min(offset + length, len(self.model))
        self.compare(start, await self.read(start, end - start), self.model[start:end], after)

    async def expect_around(self, offset: int, length: int, after: str) -> None:
        """The range and a page on both sides read as the model says."""
        await self.expect(offset - 4096, length + 8192, after)

    async def expect_all(self, after: str) -> None:
        """Everything reads as the model says."""
        await self.expect(0, len(self.model), after)

    def compare(self, offset: int, found: bytes | bytearray, expected: bytes | bytearray, after: str) -> None:
        """Two readings of one range are equal."""
        if found == expected:
            return
        if len(found) != len(expected):
            raise Violation(f"{after}: {len(found)} bytes at {offset}, expected {len(expected)}")
        wrong = [i for i, (one, other) in enumerate(zip(found, expected, strict=True)) if one != other]
        first = wrong[0]
        raise Violation(
            f"{after}: byte {offset + first} is {found[first]:#04x}, expected {expected[first]:#04x} "
            f"({len(wrong)} wrong bytes from {offset + first} to {offset + wrong[-1]})"
        )

    async def expect_refused(self, kind: type[IOFailure], what: str, request: Awaitable[object]) -> None:
        """The request fails with that class and an errno."""
        try:
            await request
        except kind as error:
            if not isinstance(error.errno, int):
                raise Violation(f"{what}: {type(error).__name__} without an errno") from error
        except BlockGraphError as error:
            raise Violation(f"{what}: raised {type(error).__name__}, expected {kind.__name__}") from error
        else:
            raise Violation(f"{what}: succeeded, expected {kind.__name__}")

    # Ranges and data.

    def fill(self, length: int) -> bytes:
        """Random bytes, none of them zero, so that nothing passes for a hole."""
        piece = self.rng.randbytes(251).replace(b"\0", b"\1")
        return (piece * (length // len(piece) + 1))[:length]

    def ranges(self) -> Iterator[tuple[int, int]]:
        """Ranges inside the node whose ends lie on, before and after every seam of the usual layouts."""
        starts = {0, 1, self.size // 2, self.size - 1, self.size - 513}
        starts |= {seam + delta for seam in _SEAMS for delta in (-1, 0, 1)}
        for start in sorted(starts):
            if not 0 <= start < self.size:
                continue
            lengths = {min(length, self.size - start) for length in _LENGTHS}
            for length in sorted(lengths | {self.size - start}):
                yield start, length

    def some_range(self) -> tuple[int, int]:
        """A random range: any alignment, more often short than long."""
        unit = self.rng.choice((1, 1, 512, 4096, 65536))
        longest = self.rng.choice((1, 8, 64)) * max(unit, 512)
        offset = self.rng.randrange(self.size)
        offset -= offset % unit
        length = self.rng.randrange(1, longest + 1)
        length += -length % unit
        return offset, max(1, min(length, self.size - offset))


def first_foreign(found: bytes, allowed: Sequence[bytes | bytearray]) -> int | None:
    """Index of the first byte that none of the buffers, all of one length, has at its place; None: there is none."""
    for start in range(0, len(found), 512):
        part = found[start : start + 512]
        others = [one[start : start + 512] for one in allowed]
        if part in others:
            continue
        for i, byte in enumerate(part):
            if all(byte != one[i] for one in others):
                return start + i
    return None

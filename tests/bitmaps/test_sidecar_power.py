# SPDX-FileCopyrightText: blockgraph contributors
# SPDX-License-Identifier: MIT
"""Power failures while a disk with a sidecar is written, cleared, resized and so on: no change is ever missed.

After every event of the log several states of image and sidecar are made; in each the bitmaps are there, consistent,
and mark all that was written since their last clear, also writes that the failure took.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import Callable, Iterator
from contextlib import ExitStack

import pytest
from helpers.harness import EVERYTHING, edge, hold, make_node
from helpers.loop import in_loop
from helpers.power import Event, LoggedDisk, Power, logged_sidecar

from blockgraph.bitmaps import DirtyBitmap, write_ahead
from blockgraph.bitmaps.sidecar import Sidecar
from blockgraph.errors import IOFailure
from blockgraph.flags import Flag
from blockgraph.node import Node

GRANULE = 512
REGION = 4096
SIZE = 16 * REGION


@pytest.fixture(autouse=True)
def _small_regions(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(write_ahead, "_LEAST", REGION.bit_length() - 1)
    monkeypatch.setattr(write_ahead, "AHEAD", 1)


class Machine:
    """A disk, its sidecar, and what the bitmaps must have.

    Attributes:
        changes: event number -> what happened to a bitmap just before that event.
    """

    def __init__(self, power: Power, node: Node, sidecar: Sidecar) -> None:
        self.power = power
        self.node = node
        self.sidecar = sidecar
        self.disk = edge(node)
        self.changes: list[tuple[int, str, str, set[int]]] = []
        self.failures = 0

    def note(self, what: str, name: str, granules: set[int] | None = None) -> None:
        self.changes.append((len(self.power.events), what, name, granules or set()))

    async def writes(self) -> None:
        rng = self.power.rng
        works = []
        at = rng.randrange(self.node.size())
        for number in range(rng.randint(1, 5)):
            offset = at if number and rng.random() < 0.3 else rng.randrange(self.node.size())
            length = min(rng.choice([1, 300, 512, 3000, 9000]), self.node.size() - offset)
            at = (offset + length) % self.node.size()
            match rng.choice("wwwzd"):
                case "w":
                    works.append(self.disk.pwrite(offset, memoryview(rng.randbytes(length))))
                case "z":
                    works.append(self.disk.pwrite_zeroes(offset, length, Flag.NONE))
                case _:
                    works.append(self.disk.discard(offset, length))
        if rng.random() < 0.5:
            works += [self.sidecar.turn() for _ in range(rng.randint(1, 4))]
        if rng.random() < 0.3:
            works.append(self.disk.flush())
        for result in await asyncio.gather(*works, return_exceptions=True):
            if isinstance(result, BaseException):
                self.failed(result)

    def failed(self, error: BaseException) -> None:
        """It may have, when the sidecar does."""
        if not isinstance(error, IOFailure) or not self.power.failing:
            raise error
        self.failures += 1

    async def change(self) -> None:
        """As an action of a transaction would: the node is drained, but the clock turns."""
        rng = self.power.rng
        turning = asyncio.ensure_future(self.sidecar.turn()) if rng.random() < 0.5 else None
        name = rng.choice(["a", "b", "c"])
        try:
            await self._change(name)
        except IOFailure as error:
            self.failed(error)
        if turning is not None:
            try:
                await turning
            except IOFailure as error:
                self.failed(error)

    async def _change(self, name: str) -> None:
        bitmaps = self.node.bitmaps
        await self.sidecar.begin()
        if name not in bitmaps:
            bitmaps[name] = DirtyBitmap(name, self.node.size(), GRANULE, persistent=True)
            self.note("maybe", name)
            await self.store(lambda: bitmaps.pop(name))
            self.note("add", name)
        else:
            bitmap = bitmaps[name]
            with ExitStack() as stack:
                stack.callback(self.sidecar.keep(bitmap))
                await self._alter(name, bitmap)

    async def store(self, undo: Callable[[], object]) -> None:
        try:
            await self.sidecar.store()
        except IOFailure:
            undo()
            raise

    async def _alter(self, name: str, bitmap: DirtyBitmap) -> None:
        rng, bitmaps = self.power.rng, self.node.bitmaps
        match rng.choice(["clear", "clear", "undo", "disable", "enable", "remove", "merge"]):
            case "clear":
                bitmap.clear()
                self.note("clear", name)
            case "undo":
                undo = bitmap.clear()
                await self.store(undo)
                undo()
            case "disable":
                bitmap.enabled = False
                self.note("disable", name)
            case "enable":
                before, bitmap.enabled = bitmap.enabled, True
                await self.store(lambda: setattr(bitmap, "enabled", before))
                self.note("enable", name)
            case "remove":
                del bitmaps[name]
                self.note("remove", name)
            case _:
                source = rng.choice(list(bitmaps.values()))
                granules = {start // GRANULE for start in _granules(source)}
                await self.store(bitmap.merge([source.contents()]))
                self.note("merge", name, granules)

    def required(self, count: int) -> Iterator[tuple[str, bool, set[int]]]:
        """After `count` events: (name, it must be there, granules)."""
        there: dict[str, bool] = {}
        enabled: dict[str, bool] = {}
        needed: dict[str, set[int]] = {}
        size = SIZE
        changes = iter([*self.changes, (len(self.power.events) + 1, "end", "", set())])
        number, what, name, granules = next(changes)
        for at, event in enumerate([*self.power.events[:count], Event("sidecar")]):
            while number <= at:
                match what:
                    case "maybe":
                        there[name], enabled[name], needed[name] = False, True, set()
                    case "add":
                        there[name] = True
                    case "clear":
                        needed[name] = set()
                    case "merge":
                        needed[name] = needed[name] | granules
                    case "remove":
                        there[name] = False
                        enabled[name] = False
                        needed[name] = set()
                    case "enable" | "disable":
                        enabled[name] = what == "enable"
                number, what, name, granules = next(changes)
            if event.file == "image" and event.size is not None:
                grown = set(range(size // GRANULE, -(-event.size // GRANULE))) if event.size > size else set()
                size = event.size
                needed = {
                    held: {g for g in bits if g * GRANULE < size} | (grown if enabled[held] else set())
                    for held, bits in needed.items()
                }
            elif event.file == "image" and event.data is not None:
                end = min(event.offset + len(event.data), size)
                for held, on in enabled.items():
                    if on:
                        needed[held] |= set(range(event.offset // GRANULE, -(-end // GRANULE)))
        for name, must in there.items():
            yield name, must, needed[name]


def _granules(bitmap: DirtyBitmap) -> Iterator[int]:
    for start, length in bitmap.contents().dirty_extents():
        yield from range(start, start + length, GRANULE)


async def disk_of(power: Power, raw: bytes) -> Node:
    node = make_node(LoggedDisk, "disk", size=len(raw), discard="unmap")
    node.driver.power = power  # type: ignore[attr-defined]
    await node.driver.open()
    await hold(node, EVERYTHING)
    for at in range(0, len(raw), 1 << 16):
        await super(LoggedDisk, node.driver).pwrite(at, memoryview(raw[at : at + (1 << 16)]))  # type: ignore[misc]
    return node


async def judge(machine: Machine, states: int) -> int:
    """Every sampled state has what it must have. Returns in how many bitmaps were recovered."""
    power, recovered = machine.power, 0
    rng = random.Random(power.rng.random())
    for count in range(len(power.events) + 1):
        wanted = list(machine.required(count))
        for _ in range(states):
            image, raw = power.left("image", count, rng), power.left("sidecar", count, rng)
            quiet = Power(0)
            node = await disk_of(quiet, image)
            sidecar = logged_sidecar(node, quiet, raw)
            found = {bitmap.name: bitmap for bitmap in await sidecar.load()}
            recovered += sidecar.recovered
            for name, must, granules in wanted:
                where = f"bitmap '{name}' after event {count} of {len(power.events)}"
                assert name in found or not must, where
                if name in found:
                    assert not found[name].inconsistent, f"{where}: {found[name].reason}"
                    held = {start // GRANULE for start in _granules(found[name])}
                    missed = {granule for granule in granules - held if granule * GRANULE < len(image)}
                    assert not missed, f"{where} misses {sorted(missed)}"
    return recovered


async def run(power: Power, *, resizing: bool) -> Machine:
    """A session."""
    rng = power.rng
    power.base["image"] = rng.randbytes(SIZE)
    node = await disk_of(power, power.base["image"])
    machine = Machine(power, node, logged_sidecar(node, power))
    node.bitmap_store = machine.sidecar
    assert await machine.sidecar.load() == []
    for _ in range(25):
        try:
            match rng.choice(["write"] * 6 + ["change"] * 4 + ["turn", "turn", "save"] + ["resize"] * resizing):
                case "write":
                    await machine.writes()
                case "change":
                    await machine.change()
                case "turn":
                    await machine.sidecar.turn()
                case "save":
                    await node.flush()
                    await machine.sidecar.save()
                case _:
                    await machine.disk.truncate(rng.choice([SIZE, SIZE // 2, SIZE + 5 * REGION, SIZE - 700]))
                    await node.flush()  # else the first sidecar may come to be of a size that is lost again
        except IOFailure as error:
            machine.failed(error)
    await machine.sidecar.close()
    return machine


@pytest.mark.parametrize("resizing", [False, True], ids=["fixed", "resized"])
@pytest.mark.parametrize("seed", range(8))
@in_loop
async def test_power_failure_at_any_moment_misses_no_change(seed: int, resizing: bool) -> None:
    machine = await run(Power(seed), resizing=resizing)
    assert await judge(machine, 3)


@pytest.mark.parametrize("seed", range(8))
@in_loop
async def test_power_failure_after_failures_of_the_sidecar_misses_no_change(seed: int) -> None:
    """Nobody knows then what of it is durable."""
    power = Power(seed)
    power.failing = 0.1
    machine = await run(power, resizing=True)
    assert machine.failures
    assert await judge(machine, 3)

# SPDX-FileCopyrightText: blockgraph contributors
# SPDX-License-Identifier: MIT
"""Checkpoints kept in a sidecar, and a kill at any moment, also in the middle of creating or deleting one.

What is found afterwards has no problem, and misses no change since any checkpoint. A deleted one may be there again:
what is taken away is stored at the next turn of the sidecar's clock.
"""

from __future__ import annotations

import random
from pathlib import Path

import pytest
from helpers.backup import memory
from helpers.loop import in_loop
from helpers.sidecar import GRANULE, SIZE, after, new_disk, session

from blockgraph.bitmaps.sidecar import Sidecar
from blockgraph.checkpoints import Checkpoints
from blockgraph.errors import GraphError
from blockgraph.native import Bitmap


def granules(bits: Bitmap) -> set[int]:
    return {n for at, length in bits.dirty_extents() for n in range(at // GRANULE, -(-(at + length) // GRANULE))}


@pytest.mark.parametrize("epochs", [False, True], ids=["bitmaps", "epochs"])
@pytest.mark.parametrize("seed", range(6))
def test_no_change_is_missed_after_a_kill(
    tmpfs: Path, monkeypatch: pytest.MonkeyPatch, seed: int, epochs: bool
) -> None:
    rng = random.Random(seed)
    path = new_disk(tmpfs)

    @in_loop
    async def run() -> None:
        written: list[int] = []
        begun: dict[str, int] = {}
        known: set[str] = set()
        killed: list[tuple[Path, dict[str, set[int]], set[str]]] = []
        async with session(path) as (graph, kill):
            checkpoints = Checkpoints(graph, epochs=epochs, sidecar=True)
            await graph.add_node(memory("other", SIZE))
            guest = await graph.backend("disk", writable=True)
            extents = guest.use_map().extents
            under_way: set[str] = set()

            def killed_now() -> None:
                changed = {name: set(written[at:]) for name, at in begun.items()}
                killed.append((kill(), changed, known - under_way))

            store = Sidecar.store

            async def stored(sidecar: Sidecar) -> None:
                killed_now()
                await store(sidecar)
                killed_now()

            async def create(name: str) -> None:
                begun[name] = len(written)
                known.add(name)
                under_way.add(name)
                await checkpoints.create(name, ["disk"])
                under_way.clear()

            await create("c")
            monkeypatch.setattr(Sidecar, "store", stored)
            for number in range(14):
                what = rng.choice(["write", "write", "create", "delete", "refused"])
                if what == "write":
                    granule = rng.randrange(SIZE // GRANULE)
                    if not extents.pwrite(granule * GRANULE, b"x"):
                        await guest.pwrite(granule * GRANULE, b"x")
                    await guest.flush()
                    written.append(granule)
                elif what == "create":
                    await create(f"c{number}")
                elif what == "refused":  # by the second disk, which has no place for a sidecar
                    begun[f"r{number}"] = len(written)
                    with pytest.raises(GraphError, match="no file to put a sidecar beside"):
                        await checkpoints.create(f"r{number}", ["disk", "other"])
                elif known:
                    name = rng.choice(sorted(known))
                    under_way.add(name)
                    await checkpoints.delete(name)
                    under_way.clear()
                    known.remove(name)
                killed_now()
            monkeypatch.undo()
            for left, changed, there in killed:
                async with after(path, left) as other:
                    found = Checkpoints(other, epochs=epochs)
                    names = {each.name for each in found.list()}
                    assert there <= names <= set(changed)
                    for name in names:
                        assert found.find(name).disks["disk"].problem is None
                        assert changed[name] <= granules(found.since(name, "disk"))
        assert len(killed) > 14

    run()


@pytest.mark.parametrize("epochs", [False, True], ids=["bitmaps", "epochs"])
@in_loop
async def test_changes_that_are_kept_survive_a_kill_at_once(tmp_path: Path, epochs: bool) -> None:
    path = new_disk(tmp_path)
    async with session(path) as (graph, kill):
        checkpoints = Checkpoints(graph, epochs=epochs, granularity=GRANULE, sidecar=True)
        await checkpoints.create("c1", ["disk"])
        guest = await graph.backend("disk", writable=True)
        await guest.pwrite(5 * GRANULE, b"x")
        await checkpoints.create("c2", ["disk"])
        await guest.pwrite(9 * GRANULE, b"x")
        await checkpoints.keep_changes("c1", "changes", ["disk"])
        async with after(path, kill()) as other:
            assert granules(other.bitmap("disk", "changes").contents()) == {5, 9}

# SPDX-FileCopyrightText: blockgraph contributors
# SPDX-License-Identifier: MIT
"""kill -9 at random moments, again and again: `python kill_loop.py DIRECTORY KILLS [SEED] [qcow2]`.

This process imports everything, opens nothing and forks a child for each kill. A child opens the disk, recovers its
bitmaps, looks whether every byte that differs from the reference lies in a dirty granule, and then writes: two threads
natively, one through Python, with flushes, clears and other changes, while the clock turns as fast as it can. It tells
of each step through a pipe; after a random number of steps, and a random moment more, it is killed.
"""

from __future__ import annotations

import logging
import os
import random
import shutil
import signal
import subprocess
import sys
import threading
import time
import traceback
from contextlib import suppress
from pathlib import Path
from typing import Any, NoReturn

import blockgraph
from blockgraph.api import SyncBackend, SyncGraph
from blockgraph.bitmaps import identity, write_ahead
from blockgraph.errors import GraphError

SIZE = 1 << 20
GRANULE = 4096
BITMAPS = ("clears", "stays")


def describe(directory: Path, kind: str) -> dict[str, Any]:
    """The disk."""
    node = {"node-name": "disk", "driver": kind, "discard": "unmap"}
    return {"nodes": [{**node, "file": {"driver": "file", "filename": str(directory / "disk"), "discard": "unmap"}}]}


def contents(disk: SyncBackend) -> bytes:
    """All of it."""
    return disk.pread(0, SIZE)


def verify(graph: SyncGraph, disk: SyncBackend, directory: Path) -> None:
    """Every difference to a reference lies in a dirty granule."""
    now = contents(disk)
    for name in BITMAPS:
        bitmap = graph.graph.bitmap("disk", name)
        assert not bitmap.inconsistent, f"{name}: {bitmap.reason}"
        before, bits = (directory / name).read_bytes(), bitmap.contents()
        for at in range(0, SIZE, GRANULE):
            if not bits.get(at) and now[at : at + GRANULE] != before[at : at + GRANULE]:
                raise AssertionError(f"{name} misses the granule at {at}")


def refer(disk: SyncBackend, directory: Path, name: str) -> None:
    """The disk as it is now is what the bitmap is about to start from."""
    disk.flush()
    new = directory / "new"
    new.write_bytes(contents(disk))
    new.replace(directory / name)


def write(disk: SyncBackend, rng: random.Random, tell: int, count: int) -> None:
    """One thread's writes."""
    for _ in range(count):
        at = rng.randrange(SIZE // 512) * 512
        disk.pwrite(at, rng.randbytes(min(rng.choice([512, 4096, 20000]), SIZE - at)))
        os.write(tell, b".")


def meddle(graph: SyncGraph, disk: SyncBackend, rng: random.Random, tell: int, count: int) -> None:
    """Requests that always go through Python, and changes of another bitmap."""
    for _ in range(count):
        at = rng.randrange(SIZE // 512) * 512
        length = min(rng.choice([512, 4096, 100000]), SIZE - at)
        match rng.randrange(6):
            case 0:
                disk.discard(at, length)
            case 1:
                disk.write_zeroes(at, length)
            case 2:
                disk.flush()
            case 3:
                with suppress(GraphError):
                    graph.call(graph.graph.add_bitmap("disk", "more", persistent=True))
                graph.call(graph.graph.enable_bitmap("disk", "more", enabled=rng.random() < 0.5))
                graph.call(graph.graph.merge_bitmaps("disk", "more", [("disk", "clears")]))
            case 4:
                with suppress(GraphError):
                    graph.call(graph.graph.remove_bitmap("disk", "more"))
            case _:
                disk.pwrite(at, rng.randbytes(length))
        os.write(tell, b".")


def attach(graph: SyncGraph) -> None:
    """A format without a place for bitmaps does not look for a sidecar."""
    if graph.graph.node("disk").bitmap_store is None:
        graph.call(graph.graph.attach_sidecar("disk"))


def prepare(directory: Path, kind: str) -> None:
    """The disk with its bitmaps, closed."""
    with blockgraph.open(describe(directory, kind)) as graph:
        graph.call(graph.graph.attach_sidecar("disk"))
        with graph.backend("disk", writable=True) as disk:
            for name in BITMAPS:
                refer(disk, directory, name)
                graph.call(graph.graph.add_bitmap("disk", name, granularity=GRANULE, persistent=True))


def child(directory: Path, kind: str, seed: int, tell: int) -> None:
    """Until it is killed; ends by itself when something is wrong."""
    rng = random.Random(seed)
    with blockgraph.open(describe(directory, kind)) as graph:
        attach(graph)
        disk = graph.backend("disk", writable=True)
        verify(graph, disk, directory)
        os.write(tell, b"v")
        if rng.random() < 0.3:
            refer(disk, directory, "clears")
            graph.call(graph.graph.clear_bitmap("disk", "clears"))
        seeds = [rng.random() for _ in range(3)]
        threads = [threading.Thread(target=write, args=(disk, random.Random(seeds[n]), tell, 25)) for n in range(2)]
        threads.append(threading.Thread(target=meddle, args=(graph, disk, random.Random(seeds[2]), tell, 10)))
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        disk.close()
    os.write(tell, b"c")


def run_child(directory: Path, kind: str, seed: int, tell: int) -> NoReturn:
    code = 0
    try:
        child(directory, kind, seed, tell)
    except BaseException:
        os.write(tell, b"!" + traceback.format_exc().encode())
        code = 1
    os._exit(code)


def kill_once(directory: Path, kind: str, rng: random.Random) -> str:
    """Returns what the child said."""
    ours, theirs = os.pipe()
    pid = os.fork()
    if not pid:
        os.close(ours)
        run_child(directory, kind, rng.randrange(1 << 30), theirs)
    os.close(theirs)
    said = b""
    steps = rng.choice([1, 1 + rng.randrange(10), 1 + rng.randrange(60)])
    while len(said) < steps and b"!" not in said and (more := os.read(ours, 1000)):
        said += more
    until = time.perf_counter() + rng.random() * 0.002
    while b"!" not in said and time.perf_counter() < until:
        pass
    if b"!" in said:
        while more := os.read(ours, 1 << 16):
            said += more
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    os.close(ours)
    return said.decode()


def main(directory: Path, kills: int, seed: int, kind: str) -> int:
    """0: nothing was missed."""
    logging.disable()
    identity.BEAT = 0.0005
    write_ahead._LEAST = 14
    write_ahead.AHEAD = 2
    sys.setswitchinterval(0.0002)
    pid = os.fork()
    if not pid:
        prepare(directory, kind)
        os._exit(0)
    assert os.waitpid(pid, 0)[1] == 0
    rng = random.Random(seed)
    ends = {"killed": 0, "closed": 0}
    for number in range(kills):
        said = kill_once(directory, kind, rng)
        if "!" in said:
            print(f"after {number} kills, seed {seed}: {said[said.index('!') + 1 :]}")
            return 1
        ends["closed" if said.endswith("c") else "killed"] += 1
    print(f"{ends['killed']} killed, {ends['closed']} closed before")
    return 0


if __name__ == "__main__":
    base, kills, *rest = sys.argv[1:]
    kind = rest[1] if len(rest) > 1 else "raw"
    place = Path(base) / "killed"
    shutil.rmtree(place, ignore_errors=True)
    place.mkdir()
    subprocess.run([sys.executable, "-m", "blockgraph", "create", "-f", kind, place / "disk", str(SIZE)], check=True)
    sys.exit(main(place, int(kills), int(rest[0]) if rest else 0, kind))

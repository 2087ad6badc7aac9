# SPDX-FileCopyrightText: blockgraph contributors
# SPDX-License-Identifier: MIT
"""What is measured of which disk by whom, in rounds. The sides of a figure take turns, in the other order every
second round, so that what wears off during a round wears off for all of them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from blockgraph.bench import copying, inprocess, servers
from blockgraph.bench.disks import Disk, image_node
from blockgraph.bench.figures import OURS, WITHOUT_FILTER, Result, Sample
from blockgraph.bench.load import Target, run_load
from blockgraph.bench.pattern import (
    ONE_READ,
    ONE_WRITE,
    RANDOM_READ,
    RANDOM_WRITE,
    SEQUENTIAL_READ,
    SEQUENTIAL_WRITE,
    Pattern,
)
from blockgraph.bench.tools import DAEMON, DD, NBDKIT, QEMU_IMG, QEMU_NBD, Tools

_ALL = (SEQUENTIAL_READ, ONE_READ, RANDOM_READ, SEQUENTIAL_WRITE, ONE_WRITE, RANDOM_WRITE)
_QUICK = (RANDOM_READ, RANDOM_WRITE)

#: How much longer than other runs those for backup-top take, and into how many intervals they are cut.
_LONGER = 4
_INTERVALS = 40

#: Title, and the run.
Step = tuple[str, Callable[[], None]]


@dataclass(frozen=True)
class Plan:
    """All runs.

    Attributes:
        result: where samples go.
        disks: what is measured. Writable ones are overwritten.
        folder: for targets and everything else that is large, on the storage that is measured.
        sockets: for sockets and logs; its path is short.
        tools: beside which.
        seconds: of each run.
        most: bytes of a disk that are copied, and written under backup-top.
        quick: only what says most, of every disk; else of every disk but the first.
    """

    result: Result
    disks: Sequence[Disk]
    folder: Path
    sockets: Path
    tools: Tools
    seconds: float
    most: int
    quick: bool = False

    def steps(self, rounds: int) -> list[Step]:
        """Every run of every round, in order."""
        sides: list[list[Step]] = []
        for disk in self.disks:
            sides += [self._served(disk), self._in_process(disk)]
        parts = [disk.beginning(self.most) for disk in self.disks]
        for part in parts:
            sides += self._copied(part) if part.size else []
        first = parts[0]
        if first.writable and RANDOM_WRITE.block <= first.size:
            sides.append(self._under_filter(first))
        return [step for number in range(rounds) for each in sides for step in each[:: 1 if number % 2 == 0 else -1]]

    def _peer(self, group: str, tool: str, steps: list[Step], step: Step) -> None:
        """Add the step of a peer, or remember that it is not there."""
        if tool in self.tools.peers:
            steps.append(step)
        else:
            self.result.absent.setdefault(group, []).append(tool)

    def _patterns(self, disk: Disk) -> list[Pattern]:
        patterns = _ALL if disk is self.disks[0] and not self.quick else _QUICK
        return [each for each in patterns if each.block <= disk.size and (disk.writable or not each.writes)]

    # NBD.

    def _served(self, disk: Disk) -> list[Step]:
        size, writable = disk.size, disk.writable
        group = f"NBD, {disk.label}"

        def step(name: str, server: Callable[[], AbstractContextManager[Target]]) -> Step:
            def run() -> None:
                with server() as target:
                    for pattern in self._patterns(disk):
                        sample = run_load(self.tools.fio, self.sockets, target, pattern, self.seconds, 0)
                        self.result.add(group, pattern.title, pattern.unit, name, sample)

            return f"{group}: {name}", run

        steps = [step(OURS, lambda: servers.ours(self.sockets, disk.nodes, disk.node, size, writable=writable))]
        if disk.image is None:
            return steps
        path, driver = disk.image
        if driver == "raw":
            server = step(NBDKIT, lambda: servers.nbdkit(self.sockets, path, size, writable=writable))
            self._peer(group, NBDKIT, steps, server)
        server = step(QEMU_NBD, lambda: servers.qemu_nbd(self.sockets, path, driver, size, writable=writable))
        self._peer(group, QEMU_NBD, steps, server)
        return steps

    # In process.

    def _in_process(self, disk: Disk) -> list[Step]:
        group = f"Python API, {disk.label}"

        def step(name: str, measure: Callable[[Pattern], Sample]) -> Step:
            def run() -> None:
                for pattern in self._patterns(disk):
                    if not pattern.writes and pattern.depth > 1:
                        self.result.add(group, pattern.name, pattern.unit, name, measure(pattern))

            return f"{group}: {name}", run

        steps = [step(OURS, lambda pattern: inprocess.through_api(disk, pattern, self.seconds))]
        raw = next((each for each in (disk, *self.disks) if _is_raw(each) and each.size == disk.size), None)
        if raw is not None and raw.image is not None:
            path = raw.image[0]
            steps.append(step("preadv", lambda pattern: inprocess.plain(path, disk.size, pattern, self.seconds)))
        return steps

    # Copies.

    def _copied(self, disk: Disk) -> list[list[Step]]:
        """To raw and to qcow2; of a made qcow2 disk only the latter, as the former says nothing new."""
        drivers = ["raw", "qcow2"] if disk.image is None or _is_raw(disk) else ["qcow2"]
        return [self._copied_to(disk, driver) for driver in drivers]

    def _copied_to(self, disk: Disk, driver: str) -> list[Step]:
        target = self.folder / "target"
        group, what = "Copy", f"{disk.label} to {driver}"

        def step(name: str, copy: Callable[[], Sample]) -> Step:
            def run() -> None:
                try:
                    self.result.add(group, what, "MiB/s", name, copy())
                finally:
                    target.unlink(missing_ok=True)

            return f"{group} of {what}: {name}", run

        steps = [step(OURS, lambda: copying.by_blockgraph(disk, target, driver))]
        if disk.image is None:
            return steps
        path = disk.image[0]
        key = f"{group}, {what}"
        if _is_raw(disk) and driver == "raw":
            self._peer(key, DD, steps, step(DD, lambda: copying.by_dd(disk, path, target)))
            if DD not in self.tools.peers:
                steps.append(step("plain copy", lambda: copying.by_plain_copy(disk, path, target)))
        self._peer(key, QEMU_IMG, steps, step("qemu-img convert", lambda: copying.by_convert(disk, target, driver)))
        self._peer(key, DAEMON, steps, step(DAEMON, lambda: copying.by_daemon(self.sockets, disk, target, driver)))
        return steps

    # backup-top.

    def _under_filter(self, disk: Disk) -> list[Step]:
        seconds = self.seconds * _LONGER
        interval = max(round(seconds / _INTERVALS, 3), 0.01)  # fio tells time in milliseconds
        target = self.folder / "target"
        group = f"backup-top, {disk.label}"

        def step(name: str, server: Callable[[], AbstractContextManager[Target]]) -> Step:
            def run() -> None:
                try:
                    with server() as served:
                        sample = run_load(self.tools.fio, self.sockets, served, RANDOM_WRITE, seconds, interval)
                finally:
                    target.unlink(missing_ok=True)
                self.result.add(group, RANDOM_WRITE.title, RANDOM_WRITE.unit, name, sample, interval=interval)

            return f"{group}: {name}", run

        def nodes() -> list[dict[str, Any]]:
            copying.new_target(target, disk.size, "raw")
            top = {"driver": "copy-before-write", "node-name": "bench-top", "file": disk.node, "target": "bench-target"}
            return [*disk.nodes, image_node("bench-target", target, "raw"), top]

        @contextmanager
        def daemon() -> Iterator[Target]:
            with servers.StorageDaemon(self.sockets) as process:
                process.add(nodes())
                yield process.serve("bench-top", disk.size)

        steps = [
            step(OURS, lambda: servers.ours(self.sockets, nodes(), "bench-top", disk.size, writable=True)),
            step(WITHOUT_FILTER, lambda: servers.ours(self.sockets, disk.nodes, disk.node, disk.size, writable=True)),
        ]
        if disk.image is not None:
            self._peer(group, DAEMON, steps, step(DAEMON, daemon))
        return steps


def _is_raw(disk: Disk) -> bool:
    return disk.image is not None and disk.image[1] == "raw"

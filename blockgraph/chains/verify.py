# SPDX-FileCopyrightText: blockgraph contributors
# SPDX-License-Identifier: MIT
"""Verifying a chain: every image is read alone and compared with its checksums, so damage is told by file and range.

```
    monday     full          ......XX........      damaged: 6 MiB to 8 MiB of monday.raw
    tuesday    incremental   ......█.........      has half of it anew: affected
    wednesday  incremental   .......█........      has the other half: good again
```

What is found: files that are missing, too short, or of something else; manifests, tables and checksums that are
damaged; bytes that are not what was backed up, within a chunk (1 MiB, cut to what the backup has); data where the
backup has none; unreadable sectors. Checksums tell accidents, they do not keep a forger away.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field

from blockgraph.chains.chain import Backup, Chain
from blockgraph.chains.images import ImageReader, alone
from blockgraph.chains.sumsfile import SumsFile
from blockgraph.errors import BlockGraphError, GraphError
from blockgraph.extent import Status
from blockgraph.formats.patch import Patch
from blockgraph.formats.qcow2 import Qcow2
from blockgraph.formats.raw import Raw
from blockgraph.graph.graph import Graph
from blockgraph.graph.policy import OpenPolicy
from blockgraph.native import Bitmap, Sums
from blockgraph.node import Node
from blockgraph.perm import ALL, Perm
from blockgraph.resolve import Pins

#: Ranges of one finding that are kept.
_MAX_RANGES = 10_000


@dataclass(frozen=True)
class Finding:
    """Something is wrong with a file.

    Attributes:
        file: its path.
        backup: id; None: of no known backup.
        reason: what.
        ranges: (offset, length) of the disk that can not be trusted, ascending; empty: all that the backup has.
    """

    file: str
    backup: str | None
    reason: str
    ranges: Sequence[tuple[int, int]] = ()


@dataclass
class Report:
    """What a verification found.

    Attributes:
        findings: in the order of the chain.
        verified: ids of backups that were read, oldest first.
        affected: ids of the points in time that have damaged ranges, oldest first.
        good: ids of the others that were looked at.
        unfinished: manifests of backups that never ended; they are no damage.
    """

    findings: list[Finding] = field(default_factory=list)
    verified: list[str] = field(default_factory=list)
    affected: list[str] = field(default_factory=list)
    good: list[str] = field(default_factory=list)
    unfinished: list[str] = field(default_factory=list)


async def verify(
    chain: Chain,
    points: Sequence[Backup] | None = None,
    *,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Report:
    """Read the backups that `points` need, and compare.

    Args:
        points: None: all, and all manifests of the directory.
        progress: called with the bytes of disks done, and all of them.
    """
    report = Report()
    ways: dict[str, list[Backup]] = {}
    broken: dict[str, str] = {}
    for point in chain.points() if points is None else points:
        try:
            ways[point.manifest.id] = chain.way(point)
        except GraphError as error:
            broken[point.manifest.id] = str(error)
    wanted = {each.manifest.id for way in ways.values() for each in way} | broken.keys()
    if points is None:
        report.findings += [Finding(path, None, str(error)) for path, error in chain.damaged.items()]
        report.unfinished = [each.path for each in chain.backups.values() if each.manifest.state != "complete"]
    backups = [each for each in chain.backups.values() if each.manifest.id in wanted]
    counter = _Counter(sum(each.manifest.covered for each in backups), progress)
    damage: dict[str, Bitmap] = {}
    covered: dict[str, Bitmap] = {}
    for backup in backups:
        check = _Check(backup, chain)
        await check.run(counter)
        name = backup.manifest.id
        if reason := broken.get(name):
            check.findings.append(Finding(backup.path, name, reason))
        report.findings += check.findings
        report.verified.append(name)
        damage[name], covered[name] = check.damage, check.covered
    for name in [*ways, *broken]:
        bad = name in broken or _reaches(ways[name], damage, covered)
        (report.affected if bad else report.good).append(name)
    order = {backup.manifest.id: i for i, backup in enumerate(chain.backups.values())}
    report.affected.sort(key=order.__getitem__)
    report.good.sort(key=order.__getitem__)
    return report


def _reaches(way: list[Backup], damage: dict[str, Bitmap], covered: dict[str, Bitmap]) -> bool:
    """Some damage below is not hidden by what later backups have anew."""
    left: Bitmap | None = None
    for backup in way:
        name = backup.manifest.id
        if left is None:
            left = Bitmap(damage[name].size, damage[name].granularity)
        _subtract(left, covered[name])
        left.merge(damage[name])
    return left is not None and left.count() > 0


def _subtract(bits: Bitmap, other: Bitmap) -> None:
    """Clear what `other` has; granules are cleared when it has all of them."""
    if bits.granularity == other.granularity:
        bits.subtract(other)
        return
    unit = bits.granularity
    for offset, length in other.dirty_extents():
        start, end = offset + -offset % unit, offset + length
        end = end if end == bits.size else end - end % unit
        if start < end:
            bits.reset(start, end - start)


class _Counter:
    def __init__(self, total: int, told: Callable[[int, int], None]) -> None:
        self.total, self.done, self.told = total, 0, told

    def add(self, length: int) -> None:
        self.done += length
        self.told(min(self.done, self.total), self.total)


class _Check:
    """One backup.

    Attributes:
        findings: what is wrong.
        damage: what can not be trusted; granularity is the backup's cluster.
        covered: what it has; everything, when that can not be told.
    """

    def __init__(self, backup: Backup, chain: Chain) -> None:
        manifest = backup.manifest
        self.findings: list[Finding] = []
        self.damage = Bitmap(manifest.disk.size, manifest.cluster_size)
        self.covered = Bitmap(manifest.disk.size, manifest.cluster_size)
        self._backup = backup
        self._parent = None if manifest.parent is None else chain.backups.get(manifest.parent)

    async def run(self, counter: _Counter) -> None:
        before = counter.done
        try:
            expected = self._backup.sums()
            self.covered = expected.covered
            if self.covered.count() != self._backup.manifest.covered:
                raise GraphError("the file of checksums has not the ranges of the manifest", op="load")
        except BlockGraphError as error:
            self._all(self._backup.path, error)
        else:
            try:
                self._backup.check_image()
                await self._image(expected, counter)
            except BlockGraphError as error:
                self._all(self._backup.image, error)
        counter.add(max(0, before + self._backup.manifest.covered - counter.done))

    def _all(self, file: str, error: BlockGraphError) -> None:
        """Nothing of it can be trusted; what it should have had, at least that is known."""
        if not self.covered.count():
            self.covered.fill()
            self.damage.fill()
            self.covered.clear()
        else:
            self.damage.merge(self.covered)
        self.findings.append(Finding(file, self._backup.manifest.id, error.reason or str(error)))

    async def _image(self, expected: SumsFile, counter: _Counter) -> None:
        graph = Graph(OpenPolicy(follow=False))
        try:
            node = await graph.add_node({**alone(self._backup), "node-name": "image"})
            await graph.backend("image", share=ALL & ~(Perm.WRITE | Perm.RESIZE))
            self._same_disk(node)
            sums = Sums(expected.size, expected.chunk)
            reader = ImageReader(node, sums, counter.add)
            await reader.read(expected.covered.dirty_extents())
            await reader.complete(expected.covered)
            self._compare(expected, sums, reader.unreadable)
            await self._outside(node)
        finally:
            await graph.close()

    def _same_disk(self, node: Node) -> None:
        """The image is the one that was written: of this disk, over this parent, with this table."""
        manifest = self._backup.manifest
        if isinstance(node.driver, Raw) and manifest.image_format == "qcow2":
            node = node.driver.file.node
        size = manifest.disk.size + (-manifest.disk.size % 512 if manifest.image_format == "qcow2" else 0)
        if node.size() != size:
            raise GraphError(f"the image shows {node.size()} bytes, but the disk had {manifest.disk.size}", op="verify")
        if manifest.image_format == "qcow2":
            assert isinstance(node.driver, Qcow2)
            header = node.driver.image.header
            named = None if header.backing_file is None else (header.backing_file, header.backing_format)
            if self._parent is None and manifest.parent is not None:
                return  # told by whoever follows the way
            parent = None if self._parent is None else self._parent.manifest
            if named != (None if parent is None else (parent.image, parent.image_format)):
                raise GraphError(f"the image names {named} for its backing file and format", op="verify")
        elif isinstance(node.driver, Patch) and node.driver.extents() != list(self.covered.dirty_extents()):
            raise GraphError("the patch has other ranges than the backup", op="verify")

    def _compare(self, expected: SumsFile, sums: Sums, unreadable: Iterable[tuple[int, int, str]]) -> None:
        within = Bitmap(expected.size, expected.chunk)
        within.merge(expected.covered)
        reasons: dict[str, list[tuple[int, int]]] = {}
        for offset, length, why in unreadable:
            reasons.setdefault(f"can not be read: {why}", []).append((offset, length))
            within.reset(*_chunks(offset, length, expected.chunk, expected.size))
        wrong = list(expected.damaged(sums, within))
        if wrong:
            reasons["has other bytes than were backed up"] = wrong
        for reason, chunks in reasons.items():
            ranges: list[tuple[int, int]] = []
            for offset, length in _joined(chunks):
                ranges += self.covered.dirty_extents(offset, offset + length)
            self._ranges(reason, ranges)

    def _ranges(self, reason: str, ranges: list[tuple[int, int]]) -> None:
        for offset, length in ranges:
            self.damage.set(offset, length)
        told = list(_joined(ranges))[:_MAX_RANGES]
        self.findings.append(Finding(self._backup.image, self._backup.manifest.id, reason, told))

    async def _outside(self, node: Node) -> None:
        """qcow2: clusters where the backup has none hide the parent's."""
        if self._backup.manifest.image_format != "qcow2" or self._backup.manifest.kind == "full":
            return
        ranges: list[tuple[int, int]] = []
        pos, size = 0, node.size()
        while (clean := self.covered.next_clean(pos)) is not None and len(ranges) < _MAX_RANGES:
            pos, end = clean[0], sum(clean)
            while pos < end:
                async with Pins() as pins:
                    try:
                        leaf = await pins.read(node, pos, end - pos)
                    except BlockGraphError:
                        ranges.append((pos, min(end - pos, self.covered.granularity)))
                        pos += ranges[-1][1]
                        continue
                    if leaf.status is not Status.ZERO or leaf.depth >= 0:
                        ranges.append((pos, leaf.length))
                    pos += leaf.length
            if end >= size:
                break
        if ranges:
            self._ranges("has clusters that were not backed up, they hide those of the backup before", ranges)


def _chunks(offset: int, length: int, chunk: int, size: int) -> tuple[int, int]:
    start = offset - offset % chunk
    end = min(size, offset + length + -(offset + length) % chunk)
    return start, end - start


def _joined(runs: Iterable[tuple[int, int]]) -> Iterable[tuple[int, int]]:
    """Neighbours as one."""
    last: tuple[int, int] | None = None
    for offset, length in sorted(runs):
        if last is not None and offset <= sum(last):
            last = last[0], max(sum(last), offset + length) - last[0]
        else:
            if last is not None:
                yield last
            last = offset, length
    if last is not None:
        yield last

# SPDX-FileCopyrightText: blockgraph contributors
# SPDX-License-Identifier: MIT
"""Chain: a directory of backups, of one disk or of several, and how they hang together.

```
    full ◄── incremental ◄── incremental ◄── incremental      parents, by id; a point in time needs all on its way
      ▲             ▲
      │             └── differential
      └── differential
```
"""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from datetime import UTC, datetime

from blockgraph.chains import manifest as manifests
from blockgraph.chains import sumsfile
from blockgraph.chains.manifest import Manifest
from blockgraph.chains.sumsfile import SumsFile
from blockgraph.errors import BlockGraphError, GraphError, IOFailure
from blockgraph.formats.patch import digest

#: Longest way from a backup to its full one that is followed, and that is made.
MAX_DEPTH = 128

#: Most files of a directory that are looked at.
_MAX_FILES = 1 << 20

#: Longest file of checksums, bytes: all there can be, twice.
_MAX_SUMS = 2 << 30


@dataclass(frozen=True)
class Backup:
    """A backup in a directory.

    Attributes:
        manifest: what it says of itself.
        path: of the manifest.
    """

    manifest: Manifest
    path: str

    @property
    def image(self) -> str:
        """Path of the image."""
        return os.path.join(os.path.dirname(self.path), self.manifest.image)

    def check_image(self) -> None:
        """The image is a file of the directory, and no link that leads out of it.

        Raises:
            GraphError: it is something else, or missing.
        """
        if os.path.islink(self.image):
            raise GraphError(f"image '{self.image}' is a symbolic link", op="open", hint="put the image itself there")
        if not os.path.isfile(self.image):
            raise GraphError(
                f"image '{self.image}' is missing", op="open", hint="restore the file, or use another point"
            )

    def sums(self) -> SumsFile:
        """What it covers, and its checksums.

        Raises:
            GraphError, IOFailure: the file is missing, or not what the manifest says.
        """
        info, disk = self.manifest.sums, self.manifest.disk
        if info is None:
            raise GraphError("is not complete", node=self.manifest.image, op="load")
        path = os.path.join(os.path.dirname(self.path), info.file)
        data = manifests.read_small(path, min(info.length, _MAX_SUMS))
        if len(data) != info.length or digest(data).hex() != info.digest:
            raise GraphError(f"the file of checksums '{path}' is damaged", op="load")
        return sumsfile.decode(data, disk.size, self.manifest.chunk_size, self.manifest.cluster_size)


@dataclass
class Chain:
    """What a directory has.

    Attributes:
        directory: its path.
        backups: by id, oldest first; complete ones and running ones.
        damaged: path of each manifest that can not be used, and why.
        selected: the backup whose manifest was named instead of the directory.
    """

    directory: str
    backups: dict[str, Backup] = field(default_factory=dict)
    damaged: dict[str, BlockGraphError] = field(default_factory=dict)
    selected: Backup | None = None

    @classmethod
    def load(cls, path: str) -> Chain:
        """Read the manifests of a directory, or of that in which the manifest `path` is.

        Raises:
            IOFailure: the directory can not be read.
            GraphError: there are no backups in it.
        """
        one = not os.path.isdir(path) and path.endswith(".json")
        chain = cls(os.path.dirname(path) or "." if one else path)
        found: list[Backup] = []
        try:
            with os.scandir(chain.directory) as entries:
                names = sorted(entry.name for _, entry in zip(range(_MAX_FILES), entries, strict=False))
        except OSError as error:
            hint = "a chain is a directory, or a manifest in it"
            raise IOFailure.from_oserror(error, node=path, op="open", hint=hint) from error
        for name in names:
            if name.endswith(".json"):
                file = os.path.join(chain.directory, name)
                try:
                    found.append(Backup(manifests.read(file), file))
                except BlockGraphError as error:
                    chain.damaged[file] = error
        for backup in sorted(found, key=lambda each: (each.manifest.time, each.path)):
            if backup.manifest.id in chain.backups:
                chain.damaged[backup.path] = GraphError(f"manifest '{backup.path}' has the id of another", op="load")
            else:
                chain.backups[backup.manifest.id] = backup
        if one:
            chain.selected = next((each for each in chain.backups.values() if _same(each.path, path)), None)
            if chain.selected is None:
                raise chain.damaged.get(path) or GraphError(f"'{path}' is not the manifest of a backup", op="load")
        return chain

    @property
    def disks(self) -> list[str]:
        """Names of the disks, in the order of their first backups."""
        return list(dict.fromkeys(backup.manifest.disk.name for backup in self.backups.values()))

    def points(self, disk: str | None = None) -> list[Backup]:
        """Complete backups, oldest first; of all disks when none is named."""
        return [
            backup
            for backup in self.backups.values()
            if backup.manifest.state == "complete" and disk in (None, backup.manifest.disk.name)
        ]

    def way(self, backup: Backup) -> list[Backup]:
        """From its full backup to `backup`: all that the point in time needs.

        Raises:
            GraphError: a parent is missing, of another disk, or the way is endless.
        """
        way = [backup]
        while (parent := way[-1].manifest.parent) is not None:
            below, here = self.backups.get(parent), way[-1].manifest
            if below is None or below.manifest.state != "complete":
                raise GraphError(
                    f"backup {here.short} changes backup {parent[:8]}, which is missing",
                    node=here.image,
                    hint="restore its files to the directory, or use an older point",
                )
            if below.manifest.disk != here.disk:
                raise GraphError(f"backup {here.short} changes backup {below.manifest.short} of another disk or size")
            if below in way or len(way) > MAX_DEPTH:
                raise GraphError(f"backup {backup.manifest.short} hangs on itself, or on more than {MAX_DEPTH} others")
            way.append(below)
        return way[::-1]

    def find(self, at: str = "latest", disk: str | None = None) -> Backup:
        """A point in time.

        Args:
            at: "latest", the beginning of an id, a number as listed (1: the oldest), or a time: the newest point that
                is not later ("2026-11-29", "2026-11-29T01:02", with or without zone; without one it is local).
            disk: whose; may be omitted where there is one.
        Raises:
            GraphError: there is no such point.
        """
        if disk is None and self.selected is not None:
            if at == "latest":
                return self._complete(self.selected)
            disk = self.selected.manifest.disk.name
        if disk is None and len(self.disks) > 1:
            known = ", ".join(f"'{name}'" for name in self.disks)
            raise GraphError(f"there are backups of several disks: {known}", op="find", hint="name the disk")
        points = self.points(disk)
        if not points:
            raise GraphError(f"there are no complete backups in '{self.directory}'", op="find")
        if at == "latest":
            return points[-1]
        named = [each for each in points if len(at) >= 4 and each.manifest.id.startswith(at.lower())]
        if len(named) == 1:
            return named[0]
        if at.isdecimal() and 1 <= int(at) <= len(points):
            return points[int(at) - 1]
        return self._by_time(at, points)

    def _complete(self, backup: Backup) -> Backup:
        if backup.manifest.state != "complete":
            raise GraphError(f"backup {backup.manifest.short} is not complete", op="find")
        return backup

    def _by_time(self, at: str, points: list[Backup]) -> Backup:
        try:
            when = datetime.fromisoformat(at).astimezone(UTC)
        except (ValueError, OverflowError):
            raise GraphError(
                f"there is no point '{at}'",
                op="find",
                hint="give 'latest', the beginning of an id, a number as listed, or a time such as 2026-11-29T01:02",
            ) from None
        earlier = [each for each in points if each.manifest.when <= when]
        if not earlier:
            raise GraphError(f"the oldest point is {points[0].manifest.time}, later than {at}", op="find")
        return earlier[-1]


def _same(one: str, other: str) -> bool:
    return os.path.realpath(one) == os.path.realpath(other)

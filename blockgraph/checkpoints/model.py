# SPDX-FileCopyrightText: blockgraph contributors
# SPDX-License-Identifier: MIT
"""What is told of checkpoints."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from blockgraph.exports.nbd.actions import AddExport


class DiskCheckpoint(NamedTuple):
    """A checkpoint of one disk.

    Attributes:
        disk: name of the node that has the bitmaps.
        bitmap: the bitmap that tells of the checkpoint.
        problem: why nobody can say what has changed since it; None: `Checkpoints.since` can.
    """

    disk: str
    bitmap: str
    problem: str | None


@dataclass(frozen=True)
class Checkpoint:
    """An instant.

    Attributes:
        name: of the checkpoint.
        number: later ones have larger numbers.
        disks: those that have it.
        since: the checkpoint that `full`, and a view or backup made with it, refer to; None: there was none. Only of
            one that was just created.
        full: why only a full backup of a disk is possible: disk to reason. Only of one that was just created.
    """

    name: str
    number: int
    disks: dict[str, DiskCheckpoint]
    since: str | None = None
    full: dict[str, str] = field(default_factory=dict)


class OpenDisk(NamedTuple):
    """A disk of a point in time.

    Attributes:
        top: name of the backup-top over the disk.
        access: name of the snapshot-access node: reads there are reads of that instant.
        bitmap: a bitmap of the disk with what changed between `since` and the checkpoint; None: see `full`.
    """

    top: str
    access: str
    bitmap: str | None


@dataclass
class PointInTime:
    """The disks as they were at a checkpoint, while it is open.

    Attributes:
        checkpoint: its name.
        disks: by the names of the disks.
        exports: of them.
    """

    checkpoint: str
    disks: dict[str, OpenDisk] = field(default_factory=dict)
    exports: list[AddExport] = field(default_factory=list)

# SPDX-FileCopyrightText: blockgraph contributors
# SPDX-License-Identifier: MIT
"""Checkpoints: named instants of one or many disks, and what has changed on each disk since any of them."""

from blockgraph.checkpoints.checkpoints import Backups, Checkpoints
from blockgraph.checkpoints.line import Line
from blockgraph.checkpoints.model import Checkpoint, DiskCheckpoint, PointInTime

__all__ = ["Backups", "Checkpoint", "Checkpoints", "DiskCheckpoint", "Line", "PointInTime"]

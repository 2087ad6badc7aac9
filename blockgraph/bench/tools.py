# SPDX-FileCopyrightText: blockgraph contributors
# SPDX-License-Identifier: MIT
"""Programs beside which we are measured, as far as they are installed, and the machine they run on."""

from __future__ import annotations

import os
import platform
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from blockgraph import __version__
from blockgraph.bench.load import find_fio

DD = "dd"
NBDKIT = "nbdkit"
QEMU_NBD = "qemu-nbd"
QEMU_IMG = "qemu-img"
DAEMON = "qemu-storage-daemon"

_PEERS = (DD, NBDKIT, QEMU_NBD, QEMU_IMG, DAEMON)


@dataclass(frozen=True)
class Tools:
    """What is installed.

    Attributes:
        fio: the path of one that speaks NBD; None: the load comes from our own client.
        peers: names of programs.
    """

    fio: str | None
    peers: frozenset[str]

    @classmethod
    def find(cls) -> Tools:
        """Those in PATH."""
        return cls(find_fio(), frozenset(name for name in _PEERS if shutil.which(name)))

    @property
    def missing(self) -> list[str]:
        """Peers that are not installed."""
        return [name for name in _PEERS if name not in self.peers]

    def notes(self) -> list[str]:
        """What follows from what is missing."""
        notes = []
        if self.missing:
            notes.append(f"not installed, so not measured: {', '.join(self.missing)}")
        if self.fio is None:
            notes.append("no fio with its nbd engine: the requests come from a client in Python, a limit of its own")
        return notes


def describe(folder: Path) -> dict[str, Any]:
    """Facts about this machine, and about the storage that a folder lies on."""
    return {
        "blockgraph": __version__,
        "machine": f"{_processor()}, {len(os.sched_getaffinity(0))} CPUs, Linux {platform.release().partition('-')[0]}",
        "directory": str(folder),
        "storage": _file_system(folder),
    }


def _processor() -> str:
    for line in Path("/proc/cpuinfo").read_text(errors="replace").splitlines():
        name, _, value = line.partition(":")
        if name.strip() == "model name":
            return value.strip()
    return platform.machine()


def _file_system(folder: Path) -> str:
    """Type of the file system: of the longest mount point above the folder, the last one mounted there."""
    best = (-1, "unknown")
    real = folder.resolve()
    for line in Path("/proc/self/mounts").read_text(errors="replace").splitlines():
        _, point, kind, *_ = line.split(" ")
        place = Path(_unescape(point, {"\\040": " ", "\\011": "\t", "\\012": "\n", "\\134": "\\"}))
        if real.is_relative_to(place) and len(place.parts) >= best[0]:
            best = (len(place.parts), kind)
    return best[1]


def _unescape(text: str, words: Mapping[str, str]) -> str:
    for escaped, plain in words.items():
        text = text.replace(escaped, plain)
    return text

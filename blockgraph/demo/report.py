# SPDX-FileCopyrightText: blockgraph contributors
# SPDX-License-Identifier: MIT
"""What the demo tells: for people, and as JSON."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from rich.console import Console
from rich.text import Text

from blockgraph.demo.proof import CLUSTER
from blockgraph.demo.scenario import Outcome
from blockgraph.text import format_rate, format_seconds, format_size

_WIDTH = 24


def show(outcome: Outcome, console: Console) -> None:
    """Print the report; it reads the same without a terminal."""
    _heading(console, "The graph (graph.toml)")
    console.print(Text(outcome.drawing.rstrip("\n")), soft_wrap=True)
    for title, rows in _sections(outcome).items():
        _heading(console, title)
        for name, value in rows:
            console.print(Text(f"  {name:<{_WIDTH}} ") + Text(value, style="bold"), soft_wrap=True)
    _heading(console, "The proof")
    for kept, text in _proof(outcome):
        mark = Text("  ok    ", style="bold green") if kept else Text("  FAIL  ", style="bold red")
        console.print(mark + Text(text), soft_wrap=True)
    for failure in outcome.failures():
        console.print(Text(f"\nFAILED: {failure}", style="bold red"), soft_wrap=True)


def _heading(console: Console, text: str) -> None:
    console.print()
    console.print(Text(text, style="bold cyan"))


def _sections(outcome: Outcome) -> dict[str, list[tuple[str, str]]]:
    disk, guest, loose = outcome.disk, outcome.guest, outcome.loose
    contents = f"ext4, {disk.files} files" if disk.contents == "ext4" else "generated pattern (there is no mke2fs)"
    seconds = outcome.guest_seconds
    return {
        "The disk": [
            ("size", format_size(disk.size)),
            ("contents", contents),
        ],
        "The guest, while the backup ran": [
            ("requests", f"{guest.requests} ({guest.writes} writes, {guest.zeroes} zeroes, {guest.trims} trims)"),
            ("written", format_size(guest.written)),
            ("rate", f"{guest.requests / seconds:.0f} requests/s, {format_rate(guest.written / seconds)}"),
            ("clusters it changed", f"{outcome.live.clusters} of {disk.size // CLUSTER} (64 KiB)"),
        ],
        "The backup": [
            ("target", outcome.target_format),
            ("saved before writes", f"{format_size(outcome.bytes_for_guest)} ({_clusters(outcome)} clusters)"),
            ("in the background", format_size(outcome.bytes_background)),
            (
                "at full speed",
                f"{format_size(outcome.loose_bytes)} in {format_seconds(outcome.loose_seconds)}, "
                f"{format_rate(outcome.loose_bytes / outcome.loose_seconds)}, beside {loose.requests} requests",
            ),
        ],
    }


def _clusters(outcome: Outcome) -> int:
    return -(-outcome.bytes_for_guest // outcome.cluster_size)


def _proof(outcome: Outcome) -> list[tuple[bool, str]]:
    backup, live = outcome.backup, outcome.live
    lines = [
        (outcome.bytes_for_guest > 0, "writes met clusters that were not copied yet, and had to wait for the copy"),
        (not live.equal, f"the live disk has changed, first at offset {live.first}"),
        (backup.equal, "the backup is the disk as it was at the start, byte by byte"),
    ]
    if outcome.fsck is not None:
        said = outcome.fsck_output.strip() if outcome.fsck else "clean"
        lines.append((outcome.fsck == 0, f"e2fsck -fn on the backup: {said}"))
    return lines


def to_json(outcome: Outcome) -> dict[str, Any]:
    """Everything, sizes in bytes and times in seconds."""
    return {
        "ok": not outcome.failures(),
        "failures": outcome.failures(),
        "disk": {"size": outcome.disk.size, "contents": outcome.disk.contents, "files": outcome.disk.files},
        "guest": {**asdict(outcome.guest), "seconds": round(outcome.guest_seconds, 3)},
        "guest-at-full-speed": asdict(outcome.loose),
        "backup": {
            "format": outcome.target_format,
            "cluster-size": outcome.cluster_size,
            "saved-before-writes": outcome.bytes_for_guest,
            "saved-clusters": _clusters(outcome),
            "background": outcome.bytes_background,
            "full-speed-bytes": outcome.loose_bytes,
            "full-speed-seconds": round(outcome.loose_seconds, 3),
        },
        "backup-equals-start": outcome.backup.equal,
        "live-clusters-changed": outcome.live.clusters,
        "e2fsck": outcome.fsck,
    }

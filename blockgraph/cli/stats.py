# SPDX-FileCopyrightText: blockgraph contributors
# SPDX-License-Identifier: MIT
"""What the exports of a session have done, in words: on SIGUSR2, and at the end of `blockgraph run --stats`.

export 'guest':
  hits:          98304 (native, 99.9 %)
  faults:        16 (Python)
  read:          310 MiB
  written:       74 MiB
  extent map:    12 extents, 258 KiB of at most 64 MiB
  invalidations: 3, and 0 of writing only
  evictions:     0 regions, for want of memory
"""

from __future__ import annotations

from blockgraph.cli.text import align
from blockgraph.exports.nbd.export import ExportStats
from blockgraph.native.nbd_loop import NbdStats
from blockgraph.session import Session
from blockgraph.text import format_size


def describe(session: Session) -> str:
    """A block for each export, and one for the server; "no exports" without any."""
    blocks = [
        f"export '{running.options.id}':\n{align(export_rows(running.export.stats()), '  ')}"
        for running in session.exports.values()
    ]
    stats = None if session.server is None else session.server.stats
    if stats is not None:
        blocks.append(f"NBD server, all exports, connections without TLS:\n{align(server_rows(stats), '  ')}")
    return "\n".join(blocks) or "no exports"


def export_rows(stats: ExportStats) -> list[tuple[str, str]]:
    """Names and values."""
    rows = [
        ("hits", f"{stats.hits} (native, {_share(stats.hits, stats.hits + stats.faults)})"),
        ("faults", f"{stats.faults} (Python)"),
        ("read", format_size(stats.bytes_read)),
        ("written", format_size(stats.bytes_written)),
    ]
    found = stats.map
    if found is not None:
        held = f"{found.extents} extents, {format_size(found.bytes)} of at most {format_size(found.limit)}"
        rows += [
            ("extent map", held),
            ("invalidations", f"{found.invalidations}, and {found.protections} of writing only"),
            ("evictions", f"{found.evictions} regions, for want of memory"),
        ]
    return rows


def server_rows(stats: NbdStats) -> list[tuple[str, str]]:
    """Names and values."""
    return [
        ("requests", f"{stats.requests}, {stats.hits} native and {stats.faults} in Python"),
        ("refused", f"{stats.refused} that the protocol forbids"),
        ("blocked", f"{stats.blocked} of them waited for a device"),
        ("piped", f"{stats.piped} of them went from the socket into a file in memory"),
        ("stored", f"{stats.stored} of them were long writes into one, where it is mapped"),
        ("received", f"{format_size(stats.received)} by {stats.receives} system calls"),
        ("sent", f"{format_size(stats.sent)} by {stats.sends} system calls"),
    ]


def _share(part: int, whole: int) -> str:
    return f"{100 * part / whole:.1f} %" if whole else "no requests yet"

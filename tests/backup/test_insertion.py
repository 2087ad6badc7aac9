# SPDX-FileCopyrightText: blockgraph contributors
# SPDX-License-Identifier: MIT
"""The instant at which backup-top is put over a disk that threads write to natively.

Each writer stores 1 at A, then 1 at B, then 2 at A, ...; so at every instant A holds what B holds, or one more. A write
that slipped past the filter, or one that came to it twice, shows as a snapshot in which they differ by anything else.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import pytest
from helpers.backup import CLUSTER

import blockgraph
from blockgraph import SyncGraph
from blockgraph.cli import main

WRITERS = 4
SIZE = 4 * WRITERS * CLUSTER
TURNS = 6


def places(writer: int) -> tuple[int, int]:
    """Where A and B are, unaligned, B reaching into a second cluster."""
    start = 4 * writer * CLUSTER
    return start + 4000, start + 3 * CLUSTER - 300


@contextmanager
def writing(graph: SyncGraph) -> Iterator[list[int]]:
    """Writers in threads of their own; yields how often each has written both."""
    written = [0] * WRITERS
    stop = threading.Event()
    disk = graph.backend("disk", writable=True)

    def write(writer: int) -> None:
        while not stop.is_set():
            for place in places(writer):
                disk.pwrite(place, (written[writer] + 1).to_bytes(8, "big") * 64)
            written[writer] += 1

    with ThreadPoolExecutor(WRITERS) as pool:
        running = [pool.submit(write, writer) for writer in range(WRITERS)]
        try:
            yield written
        finally:
            stop.set()
        for each in running:
            each.result(60)


@pytest.mark.parametrize("form", ["raw", "qcow2"])
def test_inserted_under_load_every_write_is_before_or_after_it(tmp_path: Path, form: str) -> None:
    assert main(["create", "-f", form, str(tmp_path / "disk"), str(SIZE)]) == 0
    image = {"driver": form, "node-name": "disk", "file": {"driver": "file", "filename": str(tmp_path / "disk")}}
    top = {
        "driver": "backup-top",
        "node-name": "top",
        "file": "disk",
        "target": {"driver": "raw", "file": {"driver": "file", "filename": str(tmp_path / "kept")}},
    }
    with blockgraph.open({"nodes": [image]}) as graph, writing(graph) as written:
        for _ in range(TURNS):
            (tmp_path / "kept").write_bytes(bytes(SIZE))
            before = list(written)
            graph.call(graph.graph.insert_filter(top, above="disk"))
            graph.call(graph.graph.add_node({"driver": "snapshot-access", "node-name": "then", "file": "top"}))
            with graph.backend("then") as then:
                for writer in range(WRITERS):
                    a, b = (int.from_bytes(then.pread(place, 8), "big") for place in places(writer))
                    assert before[writer] <= b <= a <= b + 1
                    for place, value in zip(places(writer), (a, b), strict=True):  # no write is there in part
                        assert then.pread(place, 512) == value.to_bytes(8, "big") * 64
            graph.call(graph.graph.remove_node("then"))
            graph.call(graph.graph.remove_filter("top"))
    assert min(written) > 0

# SPDX-FileCopyrightText: blockgraph contributors
# SPDX-License-Identifier: MIT
"""A dirty bitmap of the file below an image, while native writes go there."""

from __future__ import annotations

from pathlib import Path

import pytest
from helpers.loop import in_loop

import blockgraph
from blockgraph.create import create_file

CLUSTER = 64 << 10
SIZE = 8 << 20


@pytest.mark.parametrize("cluster", range(3, 9))
@in_loop
async def test_clusters_that_live_where_the_guest_sees_them_are_no_exception(tmp_path: Path, cluster: int) -> None:
    """The first one written is at the file's cluster 5, and the file is shorter than the disk."""
    path = tmp_path / "disk"
    await create_file(str(path), SIZE, "qcow2", replace=True, cluster_size=CLUSTER)
    file = {"driver": "file", "node-name": "storage", "filename": str(path)}
    async with await blockgraph.aopen({"nodes": [{"driver": "qcow2", "node-name": "disk", "file": file}]}) as graph:
        guest = await graph.backend("disk", writable=True)
        guest.use_map()
        bitmap = await graph.add_bitmap("storage", "changes", granularity=CLUSTER)
        for data in (b"x", b"y"):
            await guest.pwrite(cluster * CLUSTER, data * CLUSTER)
        assert await guest.pread(cluster * CLUSTER, CLUSTER) == b"y" * CLUSTER
        await guest.flush()
        assert bitmap.count() >= CLUSTER

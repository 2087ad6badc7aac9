# SPDX-FileCopyrightText: blockgraph contributors
# SPDX-License-Identifier: MIT
"""Places to measure in. Benchmarks may take longer than tests."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """No time limit, where none is asked for."""
    for item in items:
        if item.get_closest_marker("timeout") is None and item.path.parent == Path(__file__).parent:
            item.add_marker(pytest.mark.timeout(0))


@pytest.fixture
def shm() -> Iterator[Path]:
    """A directory in memory."""
    if not Path("/dev/shm").is_dir():
        pytest.skip("needs /dev/shm")
    with TemporaryDirectory(prefix="blockgraph-bench-", dir="/dev/shm") as name:
        yield Path(name)


@pytest.fixture
def disk_directory(tmp_path: Path) -> Iterator[Path]:
    """A directory on a real file system: below BLOCKGRAPH_BENCH_DIR, else where pytest keeps its own."""
    with TemporaryDirectory(prefix="blockgraph-bench-", dir=os.environ.get("BLOCKGRAPH_BENCH_DIR", tmp_path)) as name:
        yield Path(name)

# SPDX-FileCopyrightText: blockgraph contributors
# SPDX-License-Identifier: MIT
"""Checking a graph file of 5,000 nodes: wanted in under 2 s, whatever the syntax, whether or not every part is
wrong."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from pytest_benchmark.fixture import BenchmarkFixture

from benchmarks.peers import Against, add_row
from blockgraph.graph.load import check_description

GROUPS = 1000


def big() -> dict[str, Any]:
    """1,000 disks, each below a backup-top with a target and exported: 5,000 nodes."""
    nodes: list[dict[str, Any]] = []
    for i in range(GROUPS):
        nodes += [
            {"node-name": f"disk{i}", "driver": "raw", "file": {"driver": "file", "filename": f"disk{i}.img"}},
            {"node-name": f"old{i}", "driver": "raw", "file": {"driver": "file", "filename": f"old{i}.img"}},
            {"node-name": f"top{i}", "driver": "backup-top", "file": f"disk{i}", "target": f"old{i}"},
        ]
    exports = [{"type": "nbd", "id": f"e{i}", "node-name": f"top{i}", "writable": True} for i in range(GROUPS)]
    return {"nodes": nodes, "exports": exports, "nbd-server": {"addr": {"type": "unix", "path": "nbd.sock"}}}


def toml(data: dict[str, Any]) -> str:
    """As people write it."""
    lines = []
    for section in ("nodes", "exports"):
        for table in data[section]:
            lines += [f"[[{section}]]", *(f"{key} = {_value(value)}" for key, value in table.items()), ""]
    lines += ["[nbd-server]", f"addr = {_value(data['nbd-server']['addr'])}", ""]
    return "\n".join(lines)


def _value(value: Any) -> str:
    if isinstance(value, dict):
        return "{" + ", ".join(f"{key} = {_value(item)}" for key, item in value.items()) + "}"
    return json.dumps(value)


def record(benchmark: BenchmarkFixture, what: str) -> None:
    """The median as a row."""
    add_row(benchmark, "2.5", what, "s", benchmark.stats.stats.median, Against("bound", None, None, 2))


WRITERS = {"toml": toml, "json": json.dumps, "yaml": yaml.safe_dump}


@pytest.mark.parametrize("syntax", WRITERS)
def test_check_of_a_good_file(benchmark: BenchmarkFixture, tmp_path: Path, syntax: str) -> None:
    path = tmp_path / f"g.{syntax}"
    path.write_text(WRITERS[syntax](big()))
    assert benchmark(check_description, path) == []
    record(benchmark, f"check of a good {syntax.upper()} file of 5,000 nodes")


@pytest.mark.parametrize("syntax", WRITERS)
def test_check_of_a_file_with_a_thousand_mistakes(benchmark: BenchmarkFixture, tmp_path: Path, syntax: str) -> None:
    data = big()
    for export in data["exports"]:
        export["writeable"] = export.pop("writable")
    path = tmp_path / f"g.{syntax}"
    path.write_text(WRITERS[syntax](data))
    assert len(benchmark(check_description, path)) == GROUPS
    record(benchmark, f"check of a {syntax.upper()} file of 5,000 nodes with 1,000 mistakes")

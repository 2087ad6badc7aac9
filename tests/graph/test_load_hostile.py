# SPDX-FileCopyrightText: blockgraph contributors
# SPDX-License-Identifier: MIT
"""Graph descriptions in three syntaxes, damaged at random, and very large."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from blockgraph.graph.load import check_description, examine
from blockgraph.graph.problem import errors
from tests.graph.test_load import MEMORY, good
from tests.helpers.toml import all_syntaxes

SERVER = {"addr": {"type": "unix", "path": "nbd.sock"}}


def messages(raw: bytes, syntax: str, directory: Path) -> list[tuple[str, str]]:
    path = directory / f"g.{syntax}"
    path.write_bytes(raw)
    return sorted((problem.path, problem.message) for problem in check_description(path))


words = st.sampled_from(["disk", "top", "memory", "raw", "file", "backup-top", "x", "1", "on", "off", "", "ünï"])
scalars = st.one_of(words, st.booleans(), st.integers(-3, 1 << 40))
member_names = st.sampled_from(
    ["driver", "node-name", "file", "target", "size", "offset", "cache", "direct", "read-only", "filename", "filname"]
)
node_values = st.recursive(
    scalars,
    lambda inner: st.one_of(st.lists(inner, max_size=2), st.dictionaries(member_names, inner, max_size=4)),
    max_leaves=6,
)
likely_nodes = st.fixed_dictionaries(
    {"driver": st.sampled_from(["memory", "raw", "backup-top", "file"])},
    optional={
        "node-name": words,
        "size": scalars,
        "filename": words,
        "file": node_values,
        "target": node_values,
        "cache": node_values,
        "read-only": scalars,
        "targte": node_values,
    },
)
descriptions = st.fixed_dictionaries(
    {"nodes": st.lists(likely_nodes, max_size=4)},
    optional={
        "exports": st.lists(st.dictionaries(st.sampled_from(["type", "id", "node-name"]), scalars), max_size=2),
        "jobs": st.lists(
            st.dictionaries(st.sampled_from(["type", "device", "target", "sync"]), node_values), max_size=2
        ),
        "nbd-server": st.dictionaries(st.sampled_from(["addr", "max-connections"]), node_values),
    },
)


@given(descriptions)
def test_three_syntaxes_give_the_same_problems_and_graph(
    tmp_path_factory: pytest.TempPathFactory, data: dict[str, Any]
) -> None:
    directory = tmp_path_factory.getbasetemp()
    found = {}
    for syntax, raw in all_syntaxes(data).items():
        told = messages(raw, syntax, directory)
        model = examine(directory / f"g.{syntax}")[0].model()
        found[syntax] = (
            [message for path, message in told if path != "exports" or "expected a list" not in message],
            sorted((edge.parent, edge.name, edge.child) for edge in model.edges()),
            [(node.name, node.driver.name, node.options) for node in model.nodes()],
        )
    assert repr(found["json"]) == repr(found["yaml"]) == repr(found["toml"])


@given(st.integers(), st.sampled_from(["toml", "json", "yaml"]), st.integers(1, 4))
def test_mutated_good_files_give_problems_never_other_exceptions(
    tmp_path_factory: pytest.TempPathFactory, seed: int, syntax: str, count: int
) -> None:
    draw = random.Random(seed)
    raw = bytearray(all_syntaxes(good())[syntax])
    for _ in range(count):
        at = draw.randrange(len(raw))
        match draw.randrange(4):
            case 0:
                raw[at] = draw.randrange(256)
            case 1:
                del raw[at : at + draw.randrange(1, 20)]
            case 2:
                raw[at:at] = draw.choice([b'"', b"[", b"{", b"nodes", b"\n", b"=", b": ", b"null", b"1", b"#", b"."])
            case 3:
                start = draw.randrange(len(raw))
                raw[at:at] = raw[start : start + draw.randrange(40)]
    path = tmp_path_factory.getbasetemp() / f"m.{syntax}"
    path.write_bytes(raw)
    for problem in check_description(path):
        assert str(problem)
        assert str(problem.to_error())
        json.dumps(problem.to_json(), default=repr)


@given(st.data())
def test_mutated_good_dicts_give_problems_never_other_exceptions(data: st.DataObject) -> None:
    description = good()
    for _ in range(data.draw(st.integers(1, 3))):
        spots = list(_spots(description))
        holder, key = data.draw(st.sampled_from(spots))
        value = data.draw(node_values | st.none() | st.floats() | st.binary(max_size=3))
        match data.draw(st.sampled_from(["set", "delete", "rename"])):
            case "set":
                holder[key] = value
            case "delete":
                del holder[key]
            case "rename" if isinstance(holder, dict):
                holder[data.draw(member_names)] = holder.pop(key)
    described, problems = examine(description)
    assert all(str(problem) for problem in problems)
    described.model().validate()


def _spots(value: Any) -> Any:
    for key in list(value) if isinstance(value, dict) else range(len(value)):
        yield value, key
        if isinstance(value[key], (dict, list)):
            yield from _spots(value[key])


def test_five_thousand_nodes_are_checked_without_recursion_or_quadratic_work() -> None:
    nodes: list[dict[str, Any]] = [{**MEMORY, "node-name": "n0"}]
    nodes += [{"driver": "raw", "node-name": f"n{i}", "file": f"n{i - 1}"} for i in range(1, 5000)]
    nodes += [{"driver": "raw", "node-name": f"m{i}", "file": f"missing{i}"} for i in range(1000)]
    data = {"nodes": nodes, "exports": [{"type": "nbd", "id": "e", "node-name": "n4999"}], "nbd-server": SERVER}
    problems = check_description(data)
    assert len(errors(problems)) == 1000

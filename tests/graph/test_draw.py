# SPDX-FileCopyrightText: blockgraph contributors
# SPDX-License-Identifier: MIT
"""Drawings: what is in them, and that nothing in a graph can break them."""

from __future__ import annotations

import io
import itertools
import json
import re
import shutil
import subprocess
from typing import Any
from xml.etree import ElementTree

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from blockgraph.graph.draw import FORMATS, Picture, picture, render
from blockgraph.graph.draw.layout import layered
from blockgraph.graph.draw.text import show
from blockgraph.graph.load import examine
from blockgraph.graph.model import Model

SVG = "{http://www.w3.org/2000/svg}"

BACKUP = {
    "nodes": [
        {"node-name": "disk", "driver": "raw", "file": {"driver": "file", "filename": "/images/disk.raw"}},
        {"node-name": "scratch", "driver": "memory", "size": 1 << 20},
        {"node-name": "top", "driver": "backup-top", "file": "disk", "target": "scratch"},
        {"node-name": "old", "driver": "snapshot-access", "file": "top"},
    ],
    "exports": [
        {"type": "nbd", "id": "guest", "node-name": "top", "writable": True},
        {"type": "nbd", "id": "snap", "node-name": "old"},
    ],
    "nbd-server": {"addr": {"type": "unix", "path": "s"}},
}


def drawn(data: dict[str, Any]) -> Picture:
    return picture(examine(data)[0].model())


def test_text_of_a_backup_graph_is_a_tree_with_each_node_once() -> None:
    assert render(drawn(BACKUP), "text") == (
        "graph                    driver             size   need   share   file\n"
        "export 'guest'\n"
        "└─ top                   backup-top                rw--   rwu-\n"
        "   ├─ file: disk         raw                       rw--   r-u-\n"
        "   │  └─ file: #block0   file                      rw--   r-u-    /images/disk.raw\n"
        "   └─ target: scratch    memory            1 MiB   rw--   rwu-\n"
        "export 'snap'\n"
        "└─ old                   snapshot-access           r---   rwu-\n"
        "   └─ file: top ↑                                  ----   rwus\n"
        "\n"
        "r consistent-read, w write, u write-unchanged, s resize\n"
    )


def test_json_has_nodes_roots_and_edges_with_roles_and_permissions() -> None:
    data = json.loads(render(drawn(BACKUP), "json"))
    assert {node["node-name"] for node in data["nodes"]} == {"disk", "#block0", "scratch", "top", "old"}
    assert {root["owner"] for root in data["roots"]} == {"export 'guest'", "export 'snap'"}
    scratch = next(node for node in data["nodes"] if node["node-name"] == "scratch")
    assert scratch == {
        "node-name": "scratch",
        "driver": "memory",
        "kind": "protocol",
        "read-only": False,
        "size": 1 << 20,
    }
    edge = next(edge for edge in data["edges"] if edge["name"] == "file" and edge["parent"] == "top")
    assert edge == {
        "parent": "top",
        "parent-kind": "node",
        "child": "disk",
        "name": "file",
        "roles": ["filtered", "primary"],
        "need": ["consistent-read", "write"],
        "share": ["consistent-read", "write-unchanged"],
    }


def test_svg_has_a_box_for_each_vertex_and_a_path_for_each_edge() -> None:
    root = ElementTree.fromstring(render(drawn(BACKUP), "svg"))
    boxes = [group.get("class") for group in root.iter(f"{SVG}g") if group.get("class")]
    assert sorted(filter(None, boxes)) == ["filter"] * 2 + ["format"] + ["protocol"] * 2 + ["root"] * 2
    paths = [path.get("class") for path in root.iter(f"{SVG}path") if path.get("class")]
    assert sorted(filter(None, paths)) == ["filtered"] * 4 + ["storage"] * 2
    texts = {text.text for text in root.iter(f"{SVG}text")}
    assert {"top", "export 'guest'", "/images/disk.raw", "memory, 1 MiB", "rw-- / r-u-"} <= texts


def test_svg_boxes_do_not_overlap_and_lie_inside() -> None:
    root = ElementTree.fromstring(render(drawn(BACKUP), "svg"))
    width, height = float(root.get("width", 0)), float(root.get("height", 0))
    boxes = []
    for group in root.iter(f"{SVG}g"):
        rect = group.find(f"{SVG}rect")
        if group.get("class") and rect is not None:
            boxes.append([float(rect.get(name, 0)) for name in ("x", "y", "width", "height")])
    assert len(boxes) == 7
    for x, y, w, h in boxes:
        assert 0 <= x <= x + w <= width
        assert 0 <= y <= y + h <= height
    for (ax, ay, aw, ah), (bx, by, bw, bh) in itertools.combinations(boxes, 2):
        assert ax + aw < bx or bx + bw < ax or ay + ah < by or by + bh < ay


def test_svg_labels_of_lines_that_meet_do_not_cover_each_other() -> None:
    fleecing = {
        "nodes": [
            {"node-name": "disk", "driver": "memory", "size": 1 << 20},
            {"node-name": "image", "driver": "file", "filename": "scratch.qcow2"},
            {"node-name": "scratch", "driver": "qcow2", "file": "image", "backing": "disk"},
            {"node-name": "top", "driver": "backup-top", "file": "disk", "target": "scratch"},
            {"node-name": "old", "driver": "snapshot-access", "file": "top"},
        ],
        "exports": [{"type": "nbd", "id": f"e{i}", "node-name": "old", "name": f"e{i}"} for i in range(3)],
        "nbd-server": {"addr": {"type": "unix", "path": "s"}},
    }
    root = ElementTree.fromstring(render(drawn(fleecing), "svg"))
    labels = [
        [float(rect.get(name, 0)) for name in ("x", "y", "width", "height")]
        for rect in root.iter(f"{SVG}rect")
        if rect.get("class") == "label"
    ]
    assert len(labels) == 8
    for (ax, ay, aw, ah), (bx, by, bw, bh) in itertools.combinations(labels, 2):
        assert ax + aw <= bx or bx + bw <= ax or ay + ah <= by or by + bh <= ay


def test_dot_and_mermaid_have_every_vertex_and_edge() -> None:
    dot = render(drawn(BACKUP), "dot")
    assert len(re.findall(r"^  n\d+ \[label=", dot, re.MULTILINE)) == 7
    assert len(re.findall(r"^  n\d+ -> n\d+ \[", dot, re.MULTILINE)) == 6
    assert '[label="file\\nrw-- / r-u-"' in dot
    mermaid = render(drawn(BACKUP), "mermaid")
    assert mermaid.startswith("flowchart TD\n")
    assert len(re.findall(r"^  n\d+ (==>|-->|-\.->)\|", mermaid, re.MULTILINE)) == 6
    assert '"scratch<br>memory#44; 1 MiB"' in mermaid


@pytest.mark.skipif(shutil.which("dot") is None, reason="Graphviz is not installed")
def test_dot_is_accepted_by_graphviz() -> None:
    subprocess.run(["dot", "-Tsvg"], input=render(drawn(BACKUP), "dot"), text=True, check=True, capture_output=True)


@pytest.mark.parametrize("form", FORMATS)
def test_drawings_of_an_empty_graph_a_cycle_and_a_missing_node(form: Any) -> None:
    cycle = {"nodes": [{"driver": "raw", "node-name": f"n{i}", "file": f"n{(i + 1) % 3}"} for i in range(3)]}
    own = {"nodes": [{"driver": "raw", "node-name": "n", "file": "n"}]}
    missing = {"nodes": [{"driver": "raw", "node-name": "n", "file": "gone"}]}
    assert render(picture(Model()), form)
    assert all(f"n{i}" in render(drawn(cycle), form) for i in range(3))
    assert render(drawn(own), form)
    assert "gone" in render(drawn(missing), form)


@pytest.mark.parametrize("form", FORMATS)
def test_hostile_names_are_escaped(form: Any) -> None:
    evil = 'a"b\\n<script>&]]>\x1b[31m\n#quot;|é'
    text = render(drawn({"nodes": [{"driver": "file", "node-name": "n", "filename": evil}]}), form)
    assert "\x1b" not in text
    if form == "svg":
        ElementTree.fromstring(text)
        assert "<script>" not in text
    elif form == "json":
        assert json.loads(text)["nodes"][0]["filename"] == evil
    elif form == "mermaid":
        assert "<script>" not in text
        assert text.count("\n") == 2
    elif form == "dot":
        label = re.search(r'label=("(?:[^"\\]|\\.)*"), shape', text)
        assert label is not None


def test_deep_chains_go_on_below_instead_of_leaving_the_terminal() -> None:
    nodes = [{"driver": "raw", "node-name": f"n{i}", "file": f"n{i + 1}"} for i in range(200)]
    text = render(drawn({"nodes": [*nodes, {"driver": "memory", "node-name": "n200", "size": 1}]}), "text")
    assert max(map(len, text.splitlines())) < 140
    assert all(len(re.findall(rf"n{i}\b(?! [↓↑])", text)) == 1 for i in range(201))


@pytest.mark.parametrize("width", [50, 66, 80, 100])
def test_text_on_a_narrow_terminal_keeps_permissions_and_files(width: int) -> None:
    base = {"driver": "qcow2", "node-name": "base-image-of-31-characters-----"[:31], "read-only": True}
    nodes = [
        {**base, "file": {"driver": "file", "filename": "/var/lib/images/a/long/way/to/the/base.qcow2"}},
        {"driver": "qcow2", "node-name": "over", "file": "bytes", "backing": base["node-name"]},
        {"driver": "file", "node-name": "bytes", "filename": "over.qcow2"},
    ]
    out = io.StringIO()
    show(drawn({"nodes": nodes}), Console(file=out, width=width, color_system=None, _environ={}))
    lines = out.getvalue().splitlines()
    assert max(map(len, lines[:-1])) <= width
    assert [line[-10:] for line in lines if "─ file:" in line] == ["rw-s  r-u-", "r---  r-u-"]
    assert sum(line.endswith(" over.qcow2") for line in lines) == 1
    assert sum(line.endswith("way/to/the/base.qcow2") for line in lines) == 1


@given(st.lists(st.tuples(st.integers(0, 9), st.integers(0, 9)), max_size=20))
def test_layout_points_down_and_leaves_room_whatever_the_edges(pairs: list[tuple[int, int]]) -> None:
    widths = {str(i): 10.0 * (i + 1) for i in range(10)}
    layout = layered(widths, [(str(a), str(b)) for a, b in pairs], 5.0)
    for route in layout.routes:
        layers = [layout.spots[key].layer for key in route]
        assert layers in (
            list(range(layers[0], layers[-1] + 1)),
            list(range(layers[0], layers[-1] - 1, -1)),
            layers[:1] * 2,
        )
    for layer in layout.layers:
        boxes = sorted(layout.spots[key].x for key in layer if layout.spots[key].box)
        spots = sorted((layout.spots[key] for key in layer), key=lambda spot: spot.x)
        assert len(boxes) == len(set(boxes))
        for left, right in itertools.pairwise(spots):
            assert right.x - left.x >= (left.width + right.width) / 2 + 5.0 - 1e-6

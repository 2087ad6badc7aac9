# SPDX-FileCopyrightText: blockgraph contributors
# SPDX-License-Identifier: MIT
"""What is measured: disks made for it, or the nodes of a user's graph."""

from __future__ import annotations

import asyncio
import os
import random
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import blockgraph
from blockgraph.create import create_file
from blockgraph.errors import OptionError
from blockgraph.graph.description import Description
from blockgraph.graph.load import load
from blockgraph.text import format_size

_MIB = 1 << 20


@dataclass(frozen=True)
class Disk:
    """A disk.

    Attributes:
        label: in reports.
        nodes: descriptions of the nodes it needs, with full file names.
        node: name of the one that shows the disk.
        size: bytes.
        image: path and format, when it is (the beginning of) one local image that other programs can open as well.
        writable: it may be overwritten.
        whole: not only the beginning of it.
    """

    label: str
    nodes: tuple[dict[str, Any], ...]
    node: str
    size: int
    image: tuple[Path, str] | None
    writable: bool
    whole: bool = True

    @property
    def source(self) -> dict[str, Any] | None:
        """Of a disk with an image: what it is, as one description that QEMU's tools read."""
        if self.image is None:
            return None
        path, driver = self.image
        image = {"driver": driver, "file": {"driver": "file", "filename": str(path)}}
        return image if self.whole else {"driver": "raw", "size": self.size, "file": image}

    def beginning(self, most: int) -> Disk:
        """Its first bytes, in whole sectors: the disk itself when it has no more than `most`."""
        most = min(most, self.size - self.size % 512)
        if self.size <= most:
            return self
        window = {"driver": "raw", "node-name": "bench-window", "size": most, "file": self.node}
        return replace(
            self,
            label=f"{self.label} (first {format_size(most)})",
            nodes=(*self.nodes, window),
            node="bench-window",
            size=most,
            whole=False,
        )


def image_node(name: str, path: Path, driver: str, **more: Any) -> dict[str, Any]:
    """The description of an image file, which QEMU reads alike."""
    return {"driver": driver, "node-name": name, "file": {"driver": "file", "filename": str(path)}, **more}


def make_disks(folder: Path, size: int, drivers: Sequence[str]) -> list[Disk]:
    """Images of these formats, all full of the same random bytes.

    Raises:
        OSError, NoSpace: there is no room.
    """
    return [_make(folder / f"disk.{driver}", driver, size) for driver in drivers]


def _make(path: Path, driver: str, size: int) -> Disk:
    asyncio.run(create_file(str(path), size, driver, replace=False))
    nodes = (image_node("disk", path, driver),)
    block = random.Random(1).randbytes(4 * _MIB)
    with blockgraph.open({"nodes": list(nodes)}) as graph:
        backend = graph.backend("disk", writable=True)
        for offset in range(0, size, len(block)):
            backend.pwrite(offset, block[: size - offset])
        backend.flush()
    return Disk(driver, nodes, "disk", size, (path, driver), True)


def graph_disks(graph: Path, wanted: str | None, *, writable: bool) -> list[Disk]:
    """The disks of a graph file: what it exports, else the nodes that no other node uses.

    Only what a disk needs is opened. Unless `writable`, every node is opened read-only.

    Args:
        wanted: the name of one node, instead of those.
    Raises:
        BlockGraphError: the graph has problems, or can not be opened.
    """
    description = load(graph.resolve())
    names = [node.name for node in description.nodes if not node.inline]
    if wanted is not None and wanted not in names:
        raise OptionError(f"'{graph}' has no node '{wanted}' (it has: {', '.join(names)})", path="--node", value=wanted)
    disks = []
    for name in [wanted] if wanted is not None else _shown(description):
        nodes = _needed(description, name)
        if not writable:
            nodes = [_read_only(node) for node in nodes]
        with blockgraph.open({"nodes": nodes}) as opened, opened.backend(name, writable=writable) as backend:
            disks.append(Disk(name, tuple(nodes), name, backend.size, _image(nodes, name), writable))
    if not disks:
        raise OptionError(f"'{graph}' has no nodes", path="nodes")
    return disks


def _shown(description: Description) -> list[str]:
    exported = [export.options.node_name for export in description.exports]
    used = {child for node in description.nodes for child in node.children.values()}
    roots = [node.name for node in description.nodes if not node.inline and node.name not in used]
    return list(dict.fromkeys(exported or roots))


def _needed(description: Description, name: str) -> list[dict[str, Any]]:
    """Descriptions of a node and all below it."""
    by_name = {node.name: node for node in description.nodes}
    found: set[str] = set()
    todo = [name]
    for each in todo:  # grows
        if each not in found:
            found.add(each)
            todo += [child for child in by_name[each].children.values() if child is not None]
    return [
        {**node.description, "node-name": node.name}
        for node in description.nodes
        if node.name in found and not node.inline
    ]


def _read_only(description: Any) -> Any:
    if not isinstance(description, dict) or "driver" not in description:
        return description
    return {name: _read_only(value) for name, value in description.items()} | {"read-only": True}


def _image(nodes: list[dict[str, Any]], name: str) -> tuple[Path, str] | None:
    """Where other programs find the same disk. What they would have to know beside format and file is none of it."""
    if len(nodes) != 1:
        return None
    (node,) = nodes
    below = node.get("file")
    plain = {"driver", "node-name", "file", "read-only", "discard", "cache", "auto-read-only"}
    if node["driver"] == "file" and isinstance(node.get("filename"), str):
        return Path(node["filename"]), "raw"
    if node["driver"] not in ("raw", "qcow2") or set(node) - plain or not isinstance(below, dict):
        return None
    if below.get("driver") != "file" or not os.path.isfile(below.get("filename", "")):
        return None
    return Path(below["filename"]), node["driver"]

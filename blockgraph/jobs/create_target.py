# SPDX-FileCopyrightText: blockgraph contributors
# SPDX-License-Identifier: MIT
"""Making the image that a job copies to.

A qcow2 image gets the backing file that it is going to have below it, by name and format, as `qemu-img create -b -F`
would put it there: without that it would be of no use once the job's graph is gone.

| target                    | backing file in the new image                                         |
|---------------------------|-----------------------------------------------------------------------|
| `backing` is a node       | that of the node (of what filters show)                               |
| `backing` is described    | as described                                                          |
| no `backing`, sync "top"  | that of the device: what the top layer does not have is below it, too |
| else                      | none                                                                  |
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

from blockgraph.bitmaps.identity import FILES, whole
from blockgraph.create import create_file
from blockgraph.errors import OptionError
from blockgraph.perm import Role

if TYPE_CHECKING:
    from blockgraph.graph.graph import Graph
    from blockgraph.jobs.options import BackupOptions
    from blockgraph.node import Node


class _Image(NamedTuple):
    """What a backing file is named by."""

    filename: str
    format: str


async def create_target(graph: Graph, options: BackupOptions) -> dict[str, Any]:
    """Create the file that `options.target` describes, as large as the device; returns the description to open.

    Raises:
        OptionError: the description is not of a file, or of raw or qcow2 over a file; its backing node is not of a
            kind that an image can name.
        GraphError: there is no such backing node.
        IOFailure: it exists already, or can not be made.
    """
    target = options.target
    device = graph.node(options.device)
    if not isinstance(target, Mapping):
        raise OptionError("mode 'create' needs a description of the image to make", path="target", value=target)
    image_format = "raw" if target.get("driver") == "file" else str(target.get("driver"))
    filename = created_file(options)
    target, more = dict(target), {}
    if image_format == "qcow2":
        target.setdefault("backing", _below(device) if options.sync == "top" else None)
        if target["backing"] is not None:
            backing = _image(graph, target["backing"])
            more = {"backing_file": _named_in(filename, backing.filename), "backing_fmt": backing.format}
    await create_file(filename, device.size(), image_format, replace=False, **more)
    return target


def created_file(options: BackupOptions) -> str:
    """Name of the file that `create_target` makes.

    Raises:
        OptionError: the description names none.
    """
    target = options.target
    assert isinstance(target, Mapping)
    file = target if target.get("driver") == "file" else target.get("file")
    if not isinstance(file, Mapping) or not isinstance(filename := file.get("filename"), str):
        raise OptionError("mode 'create' makes files: 'raw' or 'qcow2' over 'file'", path="target", value=dict(target))
    return filename


def _below(device: Node) -> str | None:
    """Name of the node that the device's top layer is over; None: it is over nothing."""
    cow = [child for child in device.shown().children.values() if child.role & Role.COW]
    return cow[0].node.name if cow else None


def _image(graph: Graph, backing: object) -> _Image:
    found = _of_description(graph, backing) if isinstance(backing, Mapping) else _of_node(graph.node(str(backing)))
    if found is None:
        raise OptionError(
            "a new image can not name this as its backing file",
            path="target.backing",
            value=backing if isinstance(backing, str) else None,
            hint="it names 'raw' and 'qcow2' images in files; make the image beforehand, and use mode 'existing'",
        )
    return found


def _of_description(graph: Graph, backing: Mapping[str, Any]) -> _Image | None:
    driver, file = backing.get("driver"), backing
    if driver in FILES:
        driver = "raw"
    else:
        below = backing.get("file")
        if driver not in ("raw", "qcow2") or "offset" in backing or "size" in backing:
            return None
        if isinstance(below, str):
            storage = graph.node(below)
            return _Image(name, str(driver)) if (name := _filename(storage)) is not None else None
        if not isinstance(below, Mapping):
            return None
        file = below
    filename = file.get("filename")
    return _Image(filename, str(driver)) if file.get("driver") in FILES and isinstance(filename, str) else None


def _of_node(node: Node) -> _Image | None:
    node = node.shown()
    driver = node.driver.name
    if driver in FILES:
        driver = "raw"
    elif driver not in ("raw", "qcow2") or (driver == "raw" and not whole(node)):
        return None
    else:
        node = node.children["file"].node
    name = _filename(node)
    return None if name is None else _Image(name, driver)


def _filename(storage: Node) -> str | None:
    return storage.driver.filename() if storage.driver.name in FILES else None


def _named_in(image: str, backing: str) -> str:
    """The backing file's name seen from the image: without a directory when both are in one, to be moved together."""
    directory, name = os.path.split(os.path.realpath(backing))
    if directory == os.path.dirname(os.path.realpath(image)):
        return name
    return os.path.join(directory, name)

# SPDX-FileCopyrightText: blockgraph contributors
# SPDX-License-Identifier: MIT
"""Making the image that a job copies to."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from blockgraph.create import create_file
from blockgraph.errors import OptionError

if TYPE_CHECKING:
    from blockgraph.graph.graph import Graph
    from blockgraph.jobs.options import BackupOptions


async def create_target(graph: Graph, options: BackupOptions) -> dict[str, Any]:
    """Create the file that `options.target` describes, as large as the device; returns the description to open.

    Raises:
        OptionError: the description is not of a file, or of raw or qcow2 over a file.
        IOFailure: it exists already, or can not be made.
    """
    target = options.target
    size = graph.node(options.device).size()
    if not isinstance(target, Mapping):
        raise OptionError("mode 'create' needs a description of the image to make", path="target", value=target)
    image_format = "raw" if target.get("driver") == "file" else str(target.get("driver"))
    await create_file(created_file(options), size, image_format, replace=False)
    return dict(target)


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

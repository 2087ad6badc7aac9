# SPDX-FileCopyrightText: blockgraph contributors
# SPDX-License-Identifier: MIT
"""Looking at one image: its format is told by its magic, and it is opened read-only.

A format is guessed here, and only here, because nothing is written: what a guest has put into a raw disk can make it
look like another format, and a writer that believed it would follow the guest's own header.
"""

from __future__ import annotations

import errno
import os
import stat
from argparse import ArgumentParser, Namespace
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace
from typing import Any

from blockgraph.backend import Backend
from blockgraph.driver import ImpliedChild
from blockgraph.errors import GraphError, IOFailure
from blockgraph.formats.qcow2.header import MAGIC
from blockgraph.graph.graph import Graph
from blockgraph.graph.policy import Allowed, OpenPolicy
from blockgraph.perm import ALL, Perm

#: Name of the node that holds the image.
NODE = "image"


def add_image_arguments(parser: ArgumentParser) -> None:
    """What `info` and `map` have in common."""
    parser.add_argument("image", metavar="IMAGE", help="image file or block device")
    parser.add_argument(
        "-f", "--format", choices=("raw", "qcow2"), help="format of the image; told by its magic if omitted"
    )
    parser.add_argument("--json", action="store_true", help="print JSON, with qemu-img's members")
    parser.add_argument(
        "-U", "--force-share", action="store_true", help="read an image that others are writing; it may look damaged"
    )


def probe(filename: str) -> str:
    """The format that the first bytes say: "qcow2", else "raw".

    Raises:
        IOFailure: the file can not be read.
    """
    try:
        # A fifo must not block; the file driver refuses it afterwards.
        fd = os.open(filename, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
        try:
            regular = stat.S_ISREG(os.fstat(fd).st_mode) or stat.S_ISBLK(os.fstat(fd).st_mode)
            return "qcow2" if regular and os.pread(fd, len(MAGIC), 0) == MAGIC else "raw"
        finally:
            os.close(fd)
    except OSError as error:
        hint = "check the name" if isinstance(error, FileNotFoundError) else "run as a user who may read it"
        raise IOFailure.from_oserror(error, node=filename, op="open", hint=hint) from error


def protocol(filename: str, *, force_share: bool) -> dict[str, Any]:
    """Description of the read-only node for the bytes of a file or block device."""
    try:
        device = stat.S_ISBLK(os.stat(filename).st_mode)
    except OSError:
        device = False  # the driver tells what is wrong
    driver = "host_device" if device else "file"
    return {"driver": driver, "filename": filename, "read-only": True, "force-share": force_share}


async def open_unused(graph: Graph, node: str, filename: str, image_format: str | None, *, writable: bool) -> None:
    """Open an image for what is stored in it beside the disk, without its backing file; nobody else may write it.

    Args:
        image_format: None: told by its magic. That is safe where no other file is opened, and no byte of the disk
            written.
    Raises:
        BlockGraphError: it can not be opened.
    """
    file = {**protocol(filename, force_share=False), "read-only": not writable}
    driver = image_format or probe(filename)
    description: dict[str, Any] = {"driver": driver, "node-name": node, "read-only": not writable, "file": file}
    await graph.add_node(description | ({"backing": None} if driver == "qcow2" else {}))
    await graph.backend(node, writable=writable, share=Perm.CONSISTENT_READ, name=node)


@dataclass(frozen=True)
class LookPolicy(OpenPolicy):
    """Follows backing files to look at them: also where the image does not name their format.

    Attributes:
        force_share: applies to them too.
    """

    force_share: bool = False

    def describe(self, node: str, image: str | None, name: str, wish: ImpliedChild, seen: frozenset[str]) -> Allowed:
        if wish.format is None:
            path = os.path.join(os.path.dirname(image or ""), wish.filename)
            wish = wish._replace(format=probe(path) if os.path.exists(path) else "raw")
        allowed = super().describe(node, image, name, wish, seen)
        file = protocol(allowed.description["file"]["filename"], force_share=self.force_share)
        return replace(allowed, description={**allowed.description, "file": file})


@asynccontextmanager
async def looked_at(args: Namespace, *, raw: bool = False) -> AsyncIterator[Backend]:
    """A root over the image that `add_image_arguments` named; nobody may write it meanwhile.

    Args:
        raw: show the file's own bytes, whatever their format.
    """
    force_share: bool = args.force_share
    description: dict[str, Any] = protocol(args.image, force_share=force_share)
    if not raw:
        image_format = args.format or probe(args.image)
        description = {"driver": image_format, "read-only": True, "file": description}
    graph = Graph(LookPolicy(force_share=force_share))
    try:
        yield await _root(graph, {**description, "node-name": NODE})
    finally:
        await graph.close()


async def _root(graph: Graph, description: dict[str, Any]) -> Backend:
    try:
        await graph.add_node(description)
        return await graph.backend(NODE, share=ALL & ~(Perm.WRITE | Perm.RESIZE))
    except GraphError as error:
        if error.errno == errno.EAGAIN:  # a lock; here nobody writes options, but a command line
            error.hint = "stop it, or give --force-share to read the image as it is being written"
        raise

# SPDX-FileCopyrightText: blockgraph contributors
# SPDX-License-Identifier: MIT
"""Making new image files."""

from __future__ import annotations

import asyncio
import os
from typing import Any

from blockgraph.durable import sync_directory
from blockgraph.errors import BlockGraphError, IOFailure, OptionError
from blockgraph.graph.graph import Graph

#: Formats that can be created.
FORMATS = ("raw", "qcow2")


async def create_file(filename: str, size: int, image_format: str, *, replace: bool, **options: Any) -> None:
    """Make an image of `size` bytes that reads as zeroes (or as its backing file), durably.

    Args:
        filename: of the new image.
        image_format: "raw" or "qcow2".
        replace: an existing file is emptied first; else it is an error.
        options: of the format, as `formats.qcow2.create_image` takes them; raw has none.
    Raises:
        IOFailure: it could not be made; a file that was made is removed again.
        OptionError: unknown format, or options it does not have.
    """
    if image_format not in FORMATS:
        raise OptionError(f"can not create '{image_format}' images, only {' and '.join(FORMATS)}", path="format")
    if image_format == "raw" and options:
        raise OptionError("raw images have no options", path=next(iter(options)))
    try:
        fd = os.open(filename, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | (0 if replace else os.O_EXCL), 0o666)
    except OSError as error:
        hint = "choose another name or remove it" if isinstance(error, FileExistsError) else None
        raise IOFailure.from_oserror(error, node=filename, op="create", hint=hint) from error
    os.close(fd)
    try:
        await _fill(filename, size, image_format, options)
        try:
            await asyncio.to_thread(sync_directory, os.path.dirname(filename))
        except OSError as error:
            raise IOFailure.from_oserror(error, node=filename, op="create") from error
    except BaseException:
        if not replace:
            os.unlink(filename)
        raise


async def _fill(filename: str, size: int, image_format: str, options: dict[str, Any]) -> None:
    graph = Graph()
    try:
        # The lock of an image somebody uses is noticed here, before anything is emptied.
        await graph.add_node({"driver": "file", "node-name": "image", "filename": filename})
        file = await graph.backend("image", writable=True, resize=True)
        await file.truncate(0)
        if image_format == "raw":
            await file.truncate(size)
        else:
            from blockgraph.formats.qcow2 import create_image  # costs start-up time, raw does without

            await create_image(file, size, **options)
        await file.flush()
    except BlockGraphError as error:
        error.node = filename
        raise
    finally:
        await graph.close()

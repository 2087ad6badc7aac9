# SPDX-FileCopyrightText: blockgraph contributors
# SPDX-License-Identifier: MIT
"""`blockgraph info IMAGE`: what an image is.

Reads its header and the directory of its bitmaps only, so damaged tables do not matter; features that blockgraph does
not have are named, and what the header says is shown all the same.
"""

from __future__ import annotations

import asyncio
import json
import os
import re
from argparse import Namespace, _SubParsersAction
from copy import copy
from typing import Any

from blockgraph.backend import Backend
from blockgraph.cli.images import NODE, add_image_arguments, looked_at, probe
from blockgraph.cli.text import align
from blockgraph.errors import BlockGraphError, GraphError
from blockgraph.formats.qcow2.bitmap_directory import Flags, parse_directory, parse_extension
from blockgraph.formats.qcow2.header import (
    MAX_CLUSTER_BITS,
    Autoclear,
    Compression,
    Extension,
    Header,
    Incompatible,
    parse_header,
)
from blockgraph.graph.policy import MAX_CHAIN
from blockgraph.text import format_size

#: Bit of the compatible features: refcounts may be stale while the image is open.
_LAZY_REFCOUNTS = 1

#: As QEMU calls the flags of a bitmap.
_FLAGS = {Flags.IN_USE: "in-use", Flags.AUTO: "auto"}

_URL = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*:")


def register(subparsers: _SubParsersAction[Any]) -> None:
    """Add the command."""
    parser = subparsers.add_parser(
        "info", help="show what an image is", description="Show format, sizes and backing file of an image."
    )
    add_image_arguments(parser)
    parser.add_argument("--backing-chain", action="store_true", help="also show its backing files, from top to base")
    parser.set_defaults(run=run)


def run(args: Namespace) -> int:
    """Print it; the exit status."""
    chain = _chain(args) if args.backing_chain else [asyncio.run(image_info(args))]
    if args.json:
        print(json.dumps(chain if args.backing_chain else chain[0], indent=4))
    else:
        print("\n\n".join(describe(info) for info in chain))
    return 0


def _chain(args: Namespace) -> list[dict[str, Any]]:
    """The image and its backing files. A damaged chain may be a circle."""
    chain: list[dict[str, Any]] = []
    seen: set[str] = set()
    while True:
        real = os.path.realpath(args.image)
        if real in seen or len(seen) > MAX_CHAIN:
            raise GraphError(
                f"'{args.image}' is part of its own backing chain, or the chain is longer than {MAX_CHAIN}",
                hint="look at its images one by one, without --backing-chain",
            )
        seen.add(real)
        info = asyncio.run(image_info(args))
        chain.append(info)
        backing = info.get("full-backing-filename")
        if backing is None:
            return chain
        if _URL.match(backing):
            raise GraphError(
                f"backing file '{backing}' of '{args.image}' is not a plain path", hint="leave --backing-chain out"
            )
        args = copy(args)
        args.image, args.format = backing, info.get("backing-filename-format")
        if args.format not in (None, "raw", "qcow2"):
            raise GraphError(f"backing file '{backing}' of '{info['filename']}' has the unknown format '{args.format}'")


async def image_info(args: Namespace) -> dict[str, Any]:
    """Facts about an image, under the names of `qemu-img info --output=json`.

    Raises:
        BlockGraphError: it can not be read, is locked, or its header is wrong.
    """
    image_format = args.format or probe(args.image)
    async with looked_at(args, raw=True) as file:
        fd = file.node.driver.fd()
        assert fd is not None
        info: dict[str, Any] = {
            "filename": args.image,
            "format": image_format,
            "virtual-size": file.size(),
            "actual-size": os.fstat(fd).st_blocks * 512,
            "dirty-flag": False,
        }
        if image_format == "qcow2":
            data = await file.pread(0, min(file.size(), 1 << MAX_CLUSTER_BITS))
            try:
                unsupported: list[str] = []
                header = parse_header(data, file.size(), NODE, unsupported)
            except BlockGraphError as error:
                error.node = args.image
                raise
            info |= _qcow2_info(header, args.image)
            try:
                bitmaps = await _bitmaps(file, header)
            except ValueError as error:
                info["bitmaps-damaged"] = str(error)
            else:
                if bitmaps:
                    info["format-specific"]["data"]["bitmaps"] = bitmaps
            if unsupported:
                info["unsupported"] = unsupported
    return info


async def _bitmaps(file: Backend, header: Header) -> list[dict[str, Any]]:
    """The image's persistent bitmaps; stale ones do not count.

    Raises:
        ValueError: what is wrong with their directory.
    """
    data = header.extension(Extension.BITMAPS)
    if data is None or not header.autoclear & Autoclear.BITMAPS:
        return []
    place = parse_extension(data, header.cluster_size, -(-file.size() // header.cluster_size) * header.cluster_size)
    inside = min(place.size, file.size() - place.offset)
    raw = (await file.pread(place.offset, inside)).ljust(place.size, b"\0")
    return [
        {
            "flags": [name for flag, name in _FLAGS.items() if entry.flags & flag],
            "name": entry.name.decode("utf-8", "replace"),
            "granularity": entry.granularity,
        }
        for entry in parse_directory(raw, place.count)
    ]


def _qcow2_info(header: Header, filename: str) -> dict[str, Any]:
    data: dict[str, Any] = {"compat": "1.1" if header.version >= 3 else "0.10"}
    known = header.compression in set(Compression)
    data["compression-type"] = Compression(header.compression).name.lower() if known else str(header.compression)
    if header.version >= 3:
        data |= {
            "lazy-refcounts": bool(header.compatible & _LAZY_REFCOUNTS),
            "refcount-bits": 1 << header.refcount_order,
        }
        if header.incompatible & Incompatible.DATA_FILE:
            names = [name for kind, name in header.extensions if kind == Extension.DATA_FILE]
            if names:
                data["data-file"] = names[0].decode("utf-8", "replace")
            data["data-file-raw"] = bool(header.autoclear & Autoclear.RAW_DATA_FILE)
        data |= {
            "corrupt": bool(header.incompatible & Incompatible.CORRUPT),
            "extended-l2": bool(header.incompatible & Incompatible.EXTENDED_L2),
        }
    else:
        data["refcount-bits"] = 16
    info: dict[str, Any] = {
        "virtual-size": header.size,
        "cluster-size": header.cluster_size,
        "dirty-flag": bool(header.incompatible & Incompatible.DIRTY),
        "format-specific": {"type": "qcow2", "data": data},
    }
    if header.encryption:
        info["encrypted"] = True
    # Not among qemu-img's members (nor are "bitmaps-damaged" and "unsupported"): it lists snapshots one by one.
    info["snapshot-count"] = header.snapshots
    if header.backing_file is not None:
        name = header.backing_file
        info["backing-filename"] = name
        plain = not _URL.match(name)
        info["full-backing-filename"] = os.path.join(os.path.dirname(filename), name) if plain else name
        if header.backing_format is not None:
            info["backing-filename-format"] = header.backing_format
    return info


def describe(info: dict[str, Any]) -> str:
    """The facts as text."""
    size = info["virtual-size"]
    rows = [
        ("image", info["filename"]),
        ("format", info["format"]),
        ("virtual size", f"{format_size(size)} ({size} bytes)"),
        ("disk size", format_size(info["actual-size"])),
    ]
    if "cluster-size" in info:
        rows.append(("cluster size", format_size(info["cluster-size"])))
    if "backing-filename" in info:
        name, full = info["backing-filename"], info["full-backing-filename"]
        rows.append(("backing file", name if name == full else f"{name} (actual path: {full})"))
        rows.append(("backing format", info.get("backing-filename-format", "not named (QEMU would guess it)")))
    if info.get("snapshot-count"):
        rows.append(("snapshots", str(info["snapshot-count"])))
    if "bitmaps-damaged" in info:
        rows.append(("bitmaps", f"damaged: {info['bitmaps-damaged']}"))
    if info.get("encrypted"):
        rows.append(("encrypted", "yes"))
    if info["dirty-flag"]:
        rows.append(("dirty", "yes: refcounts may be stale, a writer rebuilds them first"))
    for name, value in info.get("format-specific", {}).get("data", {}).items():
        if name == "bitmaps":
            rows += [("bitmap", _describe_bitmap(bitmap)) for bitmap in value]
            continue
        text = {True: "yes", False: "no"}[value] if isinstance(value, bool) else str(value)
        rows.append((name.replace("-", " "), text))
    if "unsupported" in info:
        note = "; it can not be opened here: convert it with 'qemu-img convert'"
        rows.append(("not supported", ", ".join(info["unsupported"]) + note))
    return align(rows)


def _describe_bitmap(bitmap: dict[str, Any]) -> str:
    state = "recording" if "auto" in bitmap["flags"] else "disabled"
    if "in-use" in bitmap["flags"]:
        state = "in use, or not saved by its last user: of no use"
    return f"'{bitmap['name']}', granularity {format_size(bitmap['granularity'])}, {state}"

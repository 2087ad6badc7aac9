# SPDX-FileCopyrightText: blockgraph contributors
# SPDX-License-Identifier: MIT
"""`blockgraph create FILE SIZE`: a new image that reads as zeroes, or as its backing file.

A file that exists is never overwritten without --force. The format of a backing file has to be given: an image that
does not name it would have to be probed by whoever opens it, and that is how a guest gets at the host's files.
"""

from __future__ import annotations

import asyncio
import os
import re
from argparse import Namespace, _SubParsersAction
from collections.abc import Callable
from typing import Any

from blockgraph.cli.images import LookPolicy, protocol
from blockgraph.cli.text import size_argument
from blockgraph.create import FORMATS, create_file
from blockgraph.errors import OptionError
from blockgraph.graph.convert import closest
from blockgraph.graph.graph import Graph
from blockgraph.text import format_size, parse_size

_SECTOR = 512
_URL = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*:")


def _on_off(text: str) -> bool:
    if text not in ("on", "off"):
        raise ValueError(f"'{text}' is neither 'on' nor 'off'")
    return text == "on"


def _one_of(*values: str) -> Callable[[str], str]:
    def check(text: str) -> str:
        if text not in values:
            raise ValueError(f"'{text}' is none of {', '.join(values)}")
        return text

    return check


#: Options of a qcow2 image by the name they have for qemu-img, which also takes '_' in them.
_OPTIONS: dict[str, Callable[[str], Any]] = {
    "cluster-size": parse_size,
    "compat": _one_of("0.10", "1.1"),
    "preallocation": _one_of("off", "metadata"),
    "lazy-refcounts": _on_off,
    "compression-type": _one_of("zlib", "zstd"),
}


def register(subparsers: _SubParsersAction[Any]) -> None:
    """Add the command."""
    parser = subparsers.add_parser(
        "create",
        help="make a new image",
        description="Make a new image. SIZE takes the suffixes k, M, G, T, P and E (powers of 1024).",
        epilog=f"Options of qcow2 images: {', '.join(sorted(_OPTIONS))}.",
    )
    parser.add_argument("-f", "--format", choices=FORMATS, default="raw", help="format of the image (default: raw)")
    parser.add_argument(
        "-o", "--options", action="append", default=[], metavar="KEY=VALUE,...", help="options of the format"
    )
    parser.add_argument("-b", "--backing", metavar="FILE", help="backing file, as it is to be named in the image")
    parser.add_argument("-F", "--backing-format", choices=FORMATS, help="format of the backing file")
    parser.add_argument("--force", action="store_true", help="empty a file that exists")
    parser.add_argument("file", metavar="FILE", help="the new image")
    parser.add_argument(
        "size", metavar="SIZE", nargs="?", type=size_argument, help="of the disk; the backing file's if omitted"
    )
    parser.set_defaults(run=run)


def run(args: Namespace) -> int:
    """Make it; the exit status."""
    options = _parse_options(args)
    if args.backing is None and args.backing_format is not None:
        raise OptionError("-F needs a backing file", hint="give it by -b")
    if args.backing is not None:
        options |= _backing_options(args)
    size = args.size
    if size is None:
        if args.backing is None:
            raise OptionError("SIZE is missing", hint="write it behind FILE, as 20G")
        size = asyncio.run(_backing_size(args))
    if args.format == "qcow2" and size % _SECTOR:
        size += -size % _SECTOR
    asyncio.run(create_file(args.file, size, args.format, replace=args.force, **options))
    print(f"{args.file}: {args.format}, {format_size(size)} ({size} bytes)")
    return 0


def _parse_options(args: Namespace) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for text in args.options:
        for item in text.split(","):
            name, equals, value = item.partition("=")
            name = name.strip().replace("_", "-")
            if args.format not in ("qcow2",):
                raise OptionError(f"{args.format} images have no options", path=f"-o {name}")
            if name not in _OPTIONS:
                near = closest(name, _OPTIONS)
                hint = None if near else f"allowed: {', '.join(sorted(_OPTIONS))}"
                raise OptionError("unknown option", path=f"-o {name}", value=value, closest=near, hint=hint)
            if not equals:
                raise OptionError("has no value", path=f"-o {name}", hint=f"write {name}=VALUE")
            try:
                found[name.replace("-", "_")] = _OPTIONS[name](value)
            except ValueError as error:
                raise OptionError(str(error), path=f"-o {name}", value=value) from None
    return found


def _backing_options(args: Namespace) -> dict[str, Any]:
    if args.format != "qcow2":
        raise OptionError(f"{args.format} images have no backing file", path="-b", hint="use -f qcow2")
    if args.backing_format is None:
        raise OptionError("the format of the backing file is missing", hint="give it by -F: formats are not guessed")
    if _URL.match(args.backing):
        raise OptionError(f"'{args.backing}' is not a plain path", path="-b")
    return {"backing_file": args.backing, "backing_fmt": args.backing_format}


async def _backing_size(args: Namespace) -> int:
    """Size of the backing file's disk; a relative name is relative to the new image, as it will be when opened."""
    path = os.path.join(os.path.dirname(args.file), args.backing)
    graph = Graph(LookPolicy())
    try:
        file = protocol(path, force_share=False)
        node = await graph.add_node(
            {"node-name": "backing", "driver": args.backing_format, "read-only": True, "file": file}
        )
        return node.size()
    finally:
        await graph.close()

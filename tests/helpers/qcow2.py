# SPDX-FileCopyrightText: blockgraph contributors
# SPDX-License-Identifier: MIT
"""qcow2 images for tests: described, made by QEMU or by us, looked at by QEMU, taken apart and damaged."""

from __future__ import annotations

import json
import shutil
import struct
import subprocess
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from blockgraph.backend import Backend
from blockgraph.formats.qcow2 import Qcow2, create_image
from blockgraph.node import Node
from blockgraph.protocols.memory import Memory
from helpers.harness import EVERYTHING, edge, hold, make_node, opened
from helpers.loop import backend_over

QEMU = pytest.mark.usefixtures("qemu")


def described(path: Path, name: str = "disk", **options: Any) -> dict[str, Any]:
    """The description of a qcow2 node over a file."""
    return {"driver": "qcow2", "node-name": name, "file": {"driver": "file", "filename": str(path)}, **options}


@asynccontextmanager
async def disk(path: Path, **options: Any) -> AsyncIterator[Backend]:
    """A root over a qcow2 file, writable unless read-only is given."""
    writable = not options.get("read-only", False)
    async with backend_over(described(path, **options), writable=writable, resize=writable) as backend:
        yield backend


def qcow2_of(backend: Backend) -> Qcow2:
    """The driver below a root."""
    driver = backend.node.driver
    assert isinstance(driver, Qcow2)
    return driver


async def create(path: Path, size: int, **options: Any) -> None:
    """create_image on a file."""
    path.touch()
    async with opened("file", filename=str(path)) as file:
        await create_image(file, size, **options)


async def memory_image(size: int, *, driver: str | type[Memory] = "memory", **options: Any) -> Node:
    """An open memory node with an empty image."""
    node = make_node(driver, "memory", size=0)
    await node.driver.open()
    await hold(node, EVERYTHING)
    await create_image(edge(node), size, **options)
    return node


@asynccontextmanager
async def over(file: Node, **options: Any) -> AsyncIterator[Qcow2]:
    """A qcow2 driver over an open node, closed at the end. Use its `node` for requests (see `edge`)."""
    children = {"file": file}
    if isinstance(options.get("backing"), Node):
        children["backing"] = options.pop("backing")
        options["backing"] = "backing"
    async with opened("qcow2", "disk", children=children, file="file", **options) as child:
        driver = child.node.driver
        assert isinstance(driver, Qcow2)
        yield driver


async def contents(backend: Backend, step: int = 1 << 20) -> bytes:
    """All bytes."""
    size = backend.size()
    return b"".join([await backend.pread(at, min(step, size - at)) for at in range(0, size, step)])


# What QEMU says.


def qemu_img(*arguments: object, status: int = 0) -> str:
    """Output of a qemu-img command that ends with `status`."""
    program = shutil.which("qemu-img")
    assert program is not None
    done = subprocess.run([program, *map(str, arguments)], capture_output=True, text=True, check=False)
    assert done.returncode == status, f"qemu-img {arguments}: {done.stdout}{done.stderr}"
    return done.stdout


def qemu_io(path: Path, *commands: str) -> None:
    """Run commands of qemu-io on a qcow2 image."""
    program = shutil.which("qemu-io")
    assert program is not None
    arguments = [word for command in commands for word in ("-c", command)]
    done = subprocess.run([program, "-f", "qcow2", *arguments, path], capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"{done.stdout}{done.stderr}"
    assert "failed" not in done.stdout, done.stdout


def check(path: Path, *, leaks: bool = False) -> None:
    """The image is consistent for qemu-img check; `leaks`: apart from leaked clusters."""
    program = shutil.which("qemu-img")
    assert program is not None
    done = subprocess.run([program, "check", "-f", "qcow2", path], capture_output=True, text=True, check=False)
    allowed = (0, 3) if leaks else (0,)
    assert done.returncode in allowed, f"{done.stdout}{done.stderr}"


def raw_of(path: Path) -> bytes:
    """What QEMU reads from a qcow2 image (with its backing chain)."""
    out = path.with_suffix(".converted")
    qemu_img("convert", "-f", "qcow2", "-O", "raw", path, out)
    return out.read_bytes()


class Mapped(NamedTuple):
    """A row of qemu-img map."""

    start: int
    length: int
    depth: int
    present: bool
    zero: bool
    data: bool
    offset: int | None


def qemu_map(path: Path) -> list[Mapped]:
    """qemu-img map of a qcow2 image, neighbours merged."""
    rows = json.loads(qemu_img("map", "-f", "qcow2", "--output=json", path))
    return merged(
        [Mapped(r["start"], r["length"], r["depth"], r["present"], r["zero"], r["data"], r.get("offset")) for r in rows]
    )


async def our_map(backend: Backend) -> list[Mapped]:
    """The same from block status. Offsets are those in the file of the layer that has the data."""
    rows, offset = [], 0
    while offset < backend.size():
        status = await backend.block_status(offset, backend.size() - offset)
        assert status.offset == offset
        depth = status.depth
        present = depth >= 0
        if depth < 0:
            depth = chain_length(backend.node) - 1
        rows.append(Mapped(offset, status.length, depth, present, status.zero, status.data, status.host_offset))
        offset += status.length
    return merged(rows)


def chain_length(node: Node) -> int:
    """Nodes of a backing chain."""
    return 1 + (chain_length(node.children["backing"].node) if "backing" in node.children else 0)


def merged(rows: list[Mapped]) -> list[Mapped]:
    """Neighbours that say the same as one row."""
    found: list[Mapped] = []
    for row in rows:
        last = found[-1] if found else None
        if (
            last is not None
            and last[2:6] == row[2:6]
            and (row.offset is None) == (last.offset is None)
            and (row.offset is None or last.offset is None or row.offset == last.offset + last.length)
        ):
            found[-1] = last._replace(length=last.length + row.length)
        else:
            found.append(row)
    return found


# Taking images apart.

#: Header fields: offset and struct format.
FIELDS = {
    "magic": (0, ">I"),
    "version": (4, ">I"),
    "backing_file_offset": (8, ">Q"),
    "backing_file_size": (16, ">I"),
    "cluster_bits": (20, ">I"),
    "size": (24, ">Q"),
    "crypt_method": (32, ">I"),
    "l1_size": (36, ">I"),
    "l1_table_offset": (40, ">Q"),
    "refcount_table_offset": (48, ">Q"),
    "refcount_table_clusters": (56, ">I"),
    "nb_snapshots": (60, ">I"),
    "snapshots_offset": (64, ">Q"),
    "incompatible_features": (72, ">Q"),
    "compatible_features": (80, ">Q"),
    "autoclear_features": (88, ">Q"),
    "refcount_order": (96, ">I"),
    "header_length": (100, ">I"),
    "compression_type": (104, ">B"),
}


def get_field(image: bytes | bytearray | Path, name: str) -> int:
    """A header field."""
    data = image.read_bytes() if isinstance(image, Path) else image
    offset, form = FIELDS[name]
    value: int = struct.unpack_from(form, data, offset)[0]
    return value


def set_field(image: bytearray | Path, name: str, value: int) -> None:
    """Change a header field."""
    offset, form = FIELDS[name]
    if isinstance(image, Path):
        with image.open("r+b") as file:
            file.seek(offset)
            file.write(struct.pack(form, value))
    else:
        struct.pack_into(form, image, offset, value)

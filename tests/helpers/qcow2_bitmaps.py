# SPDX-FileCopyrightText: blockgraph contributors
# SPDX-License-Identifier: MIT
"""Bitmaps in qcow2 images for tests: what QEMU makes of them, and the bytes they consist of."""

from __future__ import annotations

import json
import shutil
import struct
import subprocess
from collections.abc import AsyncIterator, Iterable
from contextlib import asynccontextmanager
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import blockgraph
from blockgraph.api import AsyncGraph
from blockgraph.backend import Backend
from blockgraph.formats.qcow2.header import Extension, walk_extensions
from blockgraph.node import Node
from helpers.qcow2 import described, get_field, qemu_img

Ranges = list[tuple[int, int]]


@asynccontextmanager
async def graph_over(path: Path, **options: Any) -> AsyncIterator[tuple[AsyncGraph, Backend]]:
    """A graph with the qcow2 node "disk" over a file, and a root over it (writable unless read-only is given)."""
    writable = not options.get("read-only", False)
    async with await blockgraph.aopen({"nodes": [described(path, **options)]}) as graph:
        root = await graph.backend("disk", writable=writable, resize=writable)
        yield graph, root
        await graph.close_backend(root)


def dirty(node: Node, name: str) -> Ranges:
    """(offset, length) of what a bitmap marks."""
    return list(node.bitmaps[name].contents().dirty_extents())


def all_dirty(node: Node) -> dict[str, Ranges]:
    """The same of all bitmaps of a node."""
    return {name: dirty(node, name) for name in node.bitmaps}


# QEMU's view.


def bitmap_info(path: Path) -> list[tuple[str, int, frozenset[str]]]:
    """(name, granularity, flags) of each bitmap, in qemu-img info."""
    data = json.loads(qemu_img("info", "--output=json", path))["format-specific"]["data"]
    return [(one["name"], one["granularity"], frozenset(one["flags"])) for one in data.get("bitmaps", [])]


def qemu_dirty(path: Path, name: str) -> Ranges:
    """What qemu-nbd and nbdinfo say that a bitmap marks."""
    program = shutil.which("qemu-nbd")
    info = shutil.which("nbdinfo")
    assert program is not None
    assert info is not None
    server = [program, "-r", "-f", "qcow2", "-B", name, str(path)]
    command = [info, "--json", f"--map=qemu:dirty-bitmap:{name}", "--", "[", *server, "]"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return merged((row["offset"], row["length"]) for row in json.loads(done.stdout) if row["type"])


def merged(ranges: Iterable[tuple[int, int]]) -> Ranges:
    """Sorted, neighbours as one."""
    found: Ranges = []
    for offset, length in sorted(ranges):
        if found and found[-1][0] + found[-1][1] == offset:
            found[-1] = (found[-1][0], found[-1][1] + length)
        else:
            found.append((offset, length))
    return found


class StorageDaemon:
    """qemu-storage-daemon with the qcow2 node "disk" over a file, exported over NBD, and its monitor.

    Use as a context manager: at the end it quits, in order.
    """

    def __init__(self, path: Path) -> None:
        program = shutil.which("qemu-storage-daemon")
        assert program is not None
        self._socket = path.with_suffix(".sock")
        self._process = subprocess.Popen(
            [
                program,
                *("--chardev", "stdio,id=monitor", "--monitor", "chardev=monitor"),
                *("--blockdev", f"file,node-name=file,filename={path}"),
                *("--blockdev", "qcow2,node-name=disk,file=file,discard=unmap"),
                *("--nbd-server", f"addr.type=unix,addr.path={self._socket}"),
                *("--export", "nbd,id=export,node-name=disk,writable=on,name="),
            ],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        self._answer("QMP")
        self.command("qmp_capabilities")

    def _answer(self, *wanted: str) -> Any:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            answer = json.loads(line)
            for key in wanted:
                if key in answer:
                    return answer[key]
        assert self._process.stderr is not None
        raise AssertionError(f"the daemon has ended: {self._process.stderr.read()}")

    def command(self, name: str, /, **arguments: Any) -> Any:
        """A QMP command ("_" in names of arguments stands for "-"); its answer, or its error."""
        assert self._process.stdin is not None
        message = {"execute": name, "arguments": {key.replace("_", "-"): value for key, value in arguments.items()}}
        self._process.stdin.write(json.dumps(message) + "\n")
        self._process.stdin.flush()
        return self._answer("return", "error")

    def add_bitmap(self, name: str, **arguments: Any) -> None:
        """A persistent bitmap."""
        answer = self.command("block-dirty-bitmap-add", node="disk", name=name, persistent=True, **arguments)
        assert answer == {}, answer

    def io(self, *commands: str) -> None:
        """qemu-io commands over NBD."""
        program = shutil.which("qemu-io")
        assert program is not None
        arguments = [word for command in commands for word in ("-c", command)]
        url = f"nbd+unix:///?socket={self._socket}"
        done = subprocess.run([program, "-f", "raw", *arguments, url], capture_output=True, text=True, check=False)
        assert done.returncode == 0, f"{done.stdout}{done.stderr}"
        assert "failed" not in done.stdout, done.stdout

    def kill(self) -> None:
        """As a crash would."""
        self._process.kill()
        self._process.wait()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._process.poll() is None:
            if kind is None:
                assert self.command("quit") == {}
            else:
                self._process.kill()
        self._process.communicate()


# The bytes.

#: Fields of a directory entry: offset in it and struct format.
ENTRY_FIELDS = {
    "bitmap_table_offset": (0, ">Q"),
    "bitmap_table_size": (8, ">I"),
    "flags": (12, ">I"),
    "type": (16, ">B"),
    "granularity_bits": (17, ">B"),
    "name_size": (18, ">H"),
    "extra_data_size": (20, ">I"),
}
#: Fields of the header extension.
EXTENSION_FIELDS = {
    "nb_bitmaps": (0, ">I"),
    "reserved": (4, ">I"),
    "bitmap_directory_size": (8, ">Q"),
    "bitmap_directory_offset": (16, ">Q"),
}


def extension_at(image: bytes | bytearray) -> int:
    """Offset of the data of the bitmaps extension."""
    end = get_field(image, "backing_file_offset") or 1 << get_field(image, "cluster_bits")
    for kind, at, _ in walk_extensions(bytes(image[:end]), get_field(image, "header_length"), end):
        if kind == Extension.BITMAPS:
            return at + 8
    raise AssertionError("the image has no bitmaps extension")


def entries_at(image: bytes | bytearray) -> list[int]:
    """Offsets of the entries of a directory that is right."""
    count, _, size, offset = struct.unpack_from(">IIQQ", image, extension_at(image))
    found, at = [], offset
    for _ in range(count):
        found.append(at)
        name, extra = struct.unpack_from(">HI", image, at + 18)
        at += 24 + -(-(name + extra) // 8) * 8
    assert at == offset + size
    return found


def get(image: bytes | bytearray, at: int, field: tuple[int, str]) -> int:
    """A field of the structure at `at`."""
    value: int = struct.unpack_from(field[1], image, at + field[0])[0]
    return value


def put(image: bytearray, at: int, field: tuple[int, str], value: int) -> None:
    """Change a field of the structure at `at`."""
    struct.pack_into(field[1], image, at + field[0], value)

# SPDX-FileCopyrightText: blockgraph contributors
# SPDX-License-Identifier: MIT
"""QEMU's tools (qemu-img, qemu-io, qemu-nbd) as clients."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest

from blockgraph.exports.nbd.tls import server_context
from blockgraph.exports.options import TlsCredentials
from blockgraph.testing.memory_backend import MemoryBackend
from tests.helpers.certificates import make_certificates
from tests.helpers.nbd import run_async, run_tool, serving

MIB = 1 << 20

Require = Callable[[str], str]


@run_async
async def test_qemu_img_info_map_convert_compare_over_unix(require_tool: Require, tmp_path: Path) -> None:
    qemu_img = require_tool("qemu-img")
    async with serving(size=16 * MIB) as served:
        await served.disk.pwrite(0, os.urandom(MIB))
        await served.disk.pwrite(5 * MIB, os.urandom(MIB))
        uri = served.uri()
        assert json.loads(await run_tool(qemu_img, "info", "--output=json", uri))["virtual-size"] == 16 * MIB
        found = json.loads(await run_tool(qemu_img, "map", "--output=json", "-f", "raw", uri))
        assert [(extent["start"], extent["data"], extent["zero"]) for extent in found] == [
            (0, True, False),
            (MIB, False, True),
            (5 * MIB, True, False),
            (6 * MIB, False, True),
        ]
        copy = str(tmp_path / "copy.qcow2")
        await run_tool(qemu_img, "convert", "-f", "raw", "-O", "qcow2", uri, copy)
        await run_tool(qemu_img, "compare", "-f", "raw", "-F", "qcow2", uri, copy)
        before = bytes(served.disk.data)
        served.disk.data[:] = os.urandom(MIB) * 16
        await run_tool(qemu_img, "convert", "-n", "-f", "qcow2", "-O", "raw", copy, uri)
        assert served.disk.data == before


@run_async
async def test_qemu_img_over_tcp_and_qemu_nbd_list(require_tool: Require, tmp_path: Path) -> None:
    qemu_img, qemu_nbd = require_tool("qemu-img"), require_tool("qemu-nbd")
    async with serving(MemoryBackend(4 * MIB, alignment=512), tcp=True) as served:
        await served.disk.pwrite(0, os.urandom(4 * MIB))
        copy = tmp_path / "copy"
        await run_tool(qemu_img, "convert", "-f", "raw", "-O", "raw", served.uri(), str(copy))
        assert copy.read_bytes() == served.disk.data
        port = served.uri().split(":")[2].partition("/")[0]
        listed = await run_tool(qemu_nbd, "--list", "-b", "127.0.0.1", "-p", port)
        for line in ("exports available: 1", "export: 'disk'", "a test disk", "min block: 512", "base:allocation"):
            assert line in listed


@run_async
async def test_qemu_io_writes_zeroes_discards_and_verifies(require_tool: Require) -> None:
    qemu_io = require_tool("qemu-io")
    async with serving(size=8 * MIB) as served:
        commands = (
            "write -P 0xab 0 1M",
            "write -f -P 0xcd 1M 64k",
            "write -z -u 4k 8k",
            "write -z 1M 4k",
            "discard 64k 64k",
            "flush",
            "read -P 0xab 0 4k",
            "read -P 0 4k 8k",
            "read -P 0xcd 1028k 60k",
            "aio_write -P 0x11 2M 1M",
            "aio_write -P 0x22 3M 1M",
            "aio_flush",
            "read -P 0x22 3M 1M",
        )
        output = await run_tool(
            qemu_io, "-f", "raw", served.uri(), *(part for command in commands for part in ("-c", command))
        )
        assert "verification failed" not in output
        assert "error" not in output.lower()
        assert served.disk.data[2 * MIB : 3 * MIB] == b"\x11" * MIB
        ops = {call.op for call in served.disk.calls}
        assert {"pread", "pwrite", "write_zeroes", "discard", "flush"} <= ops


@run_async
async def test_qemu_io_read_only_export_can_not_be_opened_writable(require_tool: Require) -> None:
    qemu_io = require_tool("qemu-io")
    async with serving(writable=False) as served:
        await run_tool(qemu_io, "-f", "raw", "-c", "write 0 1k", served.uri(), ok=False)
        assert "read 1024/1024" in await run_tool(qemu_io, "-r", "-f", "raw", "-c", "read 0 1k", served.uri())


@pytest.mark.parametrize("transport", ["inet", "unix"])
@run_async
async def test_qemu_img_over_tls_with_its_credentials(require_tool: Require, tmp_path: Path, transport: str) -> None:
    qemu_img = require_tool("qemu-img")
    directory = make_certificates(require_tool("openssl"), tmp_path / "tls")
    context = server_context(TlsCredentials(dir=str(directory)))
    async with serving(size=4 * MIB, tls=context, tls_required=True, tcp=transport == "inet") as served:
        await served.disk.pwrite(0, os.urandom(4 * MIB))
        if transport == "inet":
            server = {"type": "inet", "host": "localhost", "port": served.uri().split(":")[2].partition("/")[0]}
        else:
            server = {"type": "unix", "path": served.path}
        nbd = {"driver": "nbd", "server": server, "export": "disk", "tls-creds": "tls", "tls-hostname": "localhost"}
        credentials = f"tls-creds-x509,id=tls,endpoint=client,dir={directory}"
        copy = tmp_path / "copy"
        image = "json:" + json.dumps({"driver": "raw", "file": nbd})
        await run_tool(qemu_img, "convert", "--object", credentials, image, "-O", "raw", str(copy))
        assert copy.read_bytes() == served.disk.data

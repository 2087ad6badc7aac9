# SPDX-FileCopyrightText: blockgraph contributors
# SPDX-License-Identifier: MIT
"""libnbd's tools (nbdinfo, nbdcopy, nbdsh) as clients."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest

from blockgraph.exports.nbd import NbdExport
from blockgraph.exports.nbd.tls import server_context
from blockgraph.exports.options import TlsCredentials
from blockgraph.testing.memory_backend import MemoryBackend
from tests.helpers.certificates import make_certificates
from tests.helpers.nbd import Served, run_async, run_tool, serving

MIB = 1 << 20

#: nbdsh needs the system's Python, not that of a virtual environment.
SYSTEM = {"PATH": "/usr/bin:/bin"}

Require = Callable[[str], str]


async def sparse(served: Served) -> None:
    """Data, hole, data, hole."""
    await served.disk.pwrite(0, os.urandom(MIB))
    await served.disk.pwrite(5 * MIB + 4096, os.urandom(2 * MIB))


@run_async
async def test_nbdinfo_json_tells_everything(require_tool: Require) -> None:
    nbdinfo = require_tool("nbdinfo")
    async with serving(MemoryBackend(8 * MIB, alignment=512)) as served:
        await sparse(served)
        told = json.loads(await run_tool(nbdinfo, "--json", served.uri()))
        assert (told["protocol"], told["TLS"], told["structured"]) == ("newstyle-fixed", False, True)
        export = told["exports"][0]
        assert export["export-name"] == "disk"
        assert export["description"] == "a test disk"
        assert export["export-size"] == 8 * MIB
        assert (export["block_size_minimum"], export["block_size_preferred"], export["block_size_maximum"]) == (
            512,
            4096,
            32 * MIB,
        )
        assert export["contexts"] == ["base:allocation"]
        assert export["is_read_only"] is export["is_rotational"] is False
        for ability in ("cache", "df", "fast_zero", "flush", "fua", "multi_conn", "trim", "zero"):
            assert export[f"can_{ability}"] is True


@run_async
async def test_nbdinfo_read_only_is_told(require_tool: Require) -> None:
    nbdinfo = require_tool("nbdinfo")
    async with serving(writable=False) as served:
        export = json.loads(await run_tool(nbdinfo, "--json", served.uri()))["exports"][0]
        assert export["is_read_only"] is True
        assert export["can_trim"] is export["can_zero"] is export["can_fast_zero"] is False


@run_async
async def test_nbdinfo_map_shows_holes(require_tool: Require) -> None:
    nbdinfo = require_tool("nbdinfo")
    async with serving(size=16 * MIB) as served:
        await sparse(served)
        extents = json.loads(await run_tool(nbdinfo, "--json", "--map", served.uri()))
        assert [(extent["offset"], extent["length"], extent["type"]) for extent in extents] == [
            (0, MIB, 0),
            (MIB, 4 * MIB + 4096, 3),
            (5 * MIB + 4096, 2 * MIB, 0),
            (7 * MIB + 4096, 9 * MIB - 4096, 3),
        ]


@run_async
async def test_nbdinfo_list_names_all_exports(require_tool: Require) -> None:
    nbdinfo = require_tool("nbdinfo")
    async with serving() as served:
        for number in range(20):
            served.server.add_export(NbdExport(f"e{number}", MemoryBackend(4096).as_backend(), writable=False))
        told = json.loads(await run_tool(nbdinfo, "--json", "--list", f"nbd+unix:///?socket={served.path}"))
        assert [export["export-name"] for export in told["exports"]] == ["disk", *(f"e{n}" for n in range(20))]


@run_async
async def test_nbdinfo_unknown_export_fails(require_tool: Require) -> None:
    nbdinfo = require_tool("nbdinfo")
    async with serving() as served:
        output = await run_tool(nbdinfo, f"nbd+unix:///other?socket={served.path}", ok=False)
        assert "other" in output


@pytest.mark.parametrize("options", [(), ("--connections=4", "--requests=32"), ("--synchronous",)], ids=str)
@run_async
async def test_nbdcopy_both_directions_is_identical(
    require_tool: Require, tmp_path: Path, options: tuple[str, ...]
) -> None:
    nbdcopy = require_tool("nbdcopy")
    async with serving(size=40 * MIB) as served:
        await sparse(served)
        image, back = tmp_path / "image", bytes(served.disk.data)
        await run_tool(nbdcopy, *options, served.uri(), str(image))
        assert image.read_bytes() == back
        assert image.stat().st_blocks * 512 < 6 * MIB  # holes stay holes
        served.disk.data[:] = os.urandom(MIB) * 40
        await run_tool(nbdcopy, *options, "--flush", str(image), served.uri())
        assert served.disk.data == back
        assert served.disk.calls[-1].op == "flush"


async def nbdsh(program: str, uri: str, *lines: str) -> str:
    """Run lines of Python with `h` connected."""
    return await run_tool(program, "--base-allocation", "-u", uri, "-c", "\n".join(lines), env=SYSTEM)


@run_async
async def test_nbdsh_odd_commands_get_the_right_errors(require_tool: Require) -> None:
    program = require_tool("nbdsh")
    async with serving(size=40 * MIB) as served:
        output = await nbdsh(
            program,
            served.uri(),
            "import errno",
            "def error(call, *args):",
            "    try:",
            "        call(*args)",
            "    except nbd.Error as failure:",
            "        return errno.errorcode[failure.errnum]",
            "h.set_strict_mode(0)  # let everything out onto the wire",
            "size = h.get_size()",
            "print(error(h.pread, 1, size), error(h.pwrite, b'x', size), error(h.zero, 1, size))",
            "print(error(h.trim, 1, size), error(h.cache, 1, size), error(h.block_status, 1, size, lambda *a: 0))",
            "print(error(h.pread, 1, 0, 1 << 9), error(h.pread, (32 << 20) + 1, 0))",
            "print(error(h.pwrite, bytes(33 << 20), 0))",
            "print(h.pread(0, 0) == b'', h.pwrite(b'', 0), h.zero(0, 0), h.trim(0, 0), h.cache(0, 0))",
            "h.zero(4096, 0, nbd.CMD_FLAG_FAST_ZERO | nbd.CMD_FLAG_NO_HOLE | nbd.CMD_FLAG_FUA)",
            "h.trim(4096, 0, nbd.CMD_FLAG_FUA); h.cache(32 << 20, 0); h.flush()",
            "h.pwrite(b'abc', 7, nbd.CMD_FLAG_FUA)",
            "print(h.pread(5, 6, nbd.CMD_FLAG_DF))",
            "seen = []",
            "h.block_status(size, 0, lambda c, o, e, err: seen.append((c, o, e)), nbd.CMD_FLAG_REQ_ONE)",
            "print(seen)",
        )
        assert output.splitlines() == [
            "EINVAL ENOSPC ENOSPC",
            "EINVAL EINVAL EINVAL",
            "EINVAL EINVAL",
            "EINVAL",
            "True None None None None",
            "bytearray(b'\\x00abc\\x00')",
            "[('base:allocation', 0, [4096, 0])]",
        ]
        assert served.server.stats is not None
        assert served.server.stats.refused == 9


@run_async
async def test_nbdsh_read_only_export_refuses_with_eperm(require_tool: Require) -> None:
    program = require_tool("nbdsh")
    async with serving(writable=False) as served:
        output = await nbdsh(
            program,
            served.uri(),
            "h.set_strict_mode(0)",
            "for call in (lambda: h.pwrite(b'x', 0), lambda: h.zero(1, 0), lambda: h.trim(1, 0)):",
            "    try:",
            "        call()",
            "    except nbd.Error as failure:",
            "        print(failure.errnum)",
            "print(h.pread(2, 0))",
        )
        assert output.splitlines() == ["1", "1", "1", "bytearray(b'\\x00\\x00')"]


@run_async
async def test_nbdsh_chunks_and_asynchronous_requests(require_tool: Require) -> None:
    program = require_tool("nbdsh")
    async with serving(size=4 * MIB) as served:
        output = await nbdsh(
            program,
            served.uri(),
            "h.pwrite(b'x' * 4096, 0)",
            "chunks = []",
            "def chunk(data, offset, status, error): chunks.append((len(data), offset, status))",
            "h.pread_structured(65536, 0, chunk)",
            "h.pread_structured(65536, 1 << 20, chunk)",
            "h.pread_structured(65536, 1 << 20, chunk, nbd.CMD_FLAG_DF)",
            "print(chunks == [(65536, 0, nbd.READ_DATA), (65536, 1 << 20, nbd.READ_HOLE),",
            "                 (65536, 1 << 20, nbd.READ_DATA)], chunks)",
            "pieces = [(n, nbd.Buffer.from_bytearray(bytearray([n] * 512))) for n in range(100)]",
            "cookies = [h.aio_pwrite(piece, n * 512) for n, piece in pieces]",
            "while any(h.aio_in_flight() for _ in '1'): h.poll(-1)",
            "print(all(h.aio_command_completed(cookie) for cookie in cookies))",
        )
        lines = output.splitlines()
        assert lines[0].startswith("True")
        assert lines[1] == "True"
        assert served.disk.data[: 100 * 512] == b"".join(bytes([n]) * 512 for n in range(100))


@run_async
async def test_nbdsh_old_handshakes_are_served(require_tool: Require) -> None:
    # EXPORT_NAME with and without zeroes, simple replies, as old clients and the kernel do.
    program = require_tool("nbdsh")
    async with serving() as served:
        for flags in ("0", "nbd.HANDSHAKE_FLAG_FIXED_NEWSTYLE", "nbd.HANDSHAKE_FLAG_NO_ZEROES"):
            output = await run_tool(
                program,
                "-c",
                f"h.set_handshake_flags({flags}); h.set_export_name('disk'); h.set_request_structured_replies(False)",
                "-c",
                f"h.connect_unix({served.path!r}); print(h.get_structured_replies_negotiated(), h.pread(2, 0))",
                env=SYSTEM,
            )
            assert output == "False bytearray(b'\\x00\\x00')\n"


# TLS.


@pytest.mark.parametrize("transport", ["unix", "tcp"])
@run_async
async def test_nbdinfo_and_nbdcopy_over_tls(require_tool: Require, tmp_path: Path, transport: str) -> None:
    nbdinfo, nbdcopy = require_tool("nbdinfo"), require_tool("nbdcopy")
    directory = make_certificates(require_tool("openssl"), tmp_path / "tls")
    context = server_context(TlsCredentials(dir=str(directory)))
    async with serving(size=8 * MIB, tls=context, tls_required=True, tcp=transport == "tcp") as served:
        plain = served.uri().replace("nbds", "nbd", 1)
        uri = served.uri().replace("+unix:///", "+unix://localhost/").replace("127.0.0.1", "localhost")
        uri += f"{'?' if transport == 'tcp' else '&'}tls-certificates={directory}"
        told = json.loads(await run_tool(nbdinfo, "--json", uri))
        assert told["TLS"] is True
        image = tmp_path / "image"
        image.write_bytes(os.urandom(8 * MIB))
        await run_tool(nbdcopy, str(image), uri)
        assert served.disk.data == image.read_bytes()
        await run_tool(nbdcopy, uri, str(tmp_path / "back"))
        assert (tmp_path / "back").read_bytes() == served.disk.data
        assert "TLS" in await run_tool(nbdinfo, plain, ok=False)

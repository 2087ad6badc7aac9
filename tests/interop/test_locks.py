# SPDX-FileCopyrightText: blockgraph contributors
# SPDX-License-Identifier: MIT
"""Image locks against QEMU's tools: each refuses what the other holds, and allows what it shares."""

from __future__ import annotations

import asyncio
import subprocess
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path

import pytest
from helpers.harness import EVERYTHING, READ, WRITE, hold, opened, write

from blockgraph.errors import GraphError
from blockgraph.perm import ALL, NONE, Perm

Tool = Callable[..., subprocess.CompletedProcess[str]]
Holder = Callable[..., AbstractContextManager[None]]

NO_WRITERS = ALL & ~(Perm.WRITE | Perm.RESIZE)


@pytest.fixture
def image(tmp_path: Path, require_tool: Callable[[str], str]) -> Path:
    path = tmp_path / "image.qcow2"
    subprocess.run([require_tool("qemu-img"), "create", "-q", "-f", "qcow2", path, "1M"], check=True)
    return path


@pytest.fixture
def run_tool(require_tool: Callable[[str], str]) -> Tool:
    """Runs a tool of QEMU to its end."""

    def run(name: str, *arguments: str | Path) -> subprocess.CompletedProcess[str]:
        command = [require_tool(name), *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)

    return run


@pytest.fixture
def held_by_qemu(require_tool: Callable[[str], str]) -> Holder:
    """qemu-io with the image open, for the length of a block."""

    @contextmanager
    def hold_image(*arguments: str | Path) -> Iterator[None]:
        command = [require_tool("qemu-io"), *arguments]
        with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
            assert process.stdin is not None
            assert process.stdout is not None
            try:
                process.stdin.write("length\n")
                process.stdin.flush()
                assert "1 MiB" in process.stdout.readline()
                yield
            finally:
                process.communicate("quit\n", timeout=60)

    return hold_image


# need, share of ours; what QEMU may do: open writable, open read-only.
_OURS = [
    pytest.param(EVERYTHING, READ, False, False, id="exclusive-writer"),
    pytest.param(EVERYTHING, ALL, False, False, id="sharing-writer"),
    pytest.param(READ, NO_WRITERS, False, True, id="reader-of-stable-data"),
    pytest.param(READ, ALL, True, True, id="tolerant-reader"),
    pytest.param(READ, NONE, False, False, id="exclusive-reader"),
    pytest.param(NONE, ALL, True, True, id="nothing"),
]


@pytest.mark.parametrize("need, share, may_write, may_read", _OURS)
def test_image_held_by_us_opens_in_qemu_as_shared(
    image: Path, run_tool: Tool, need: Perm, share: Perm, may_write: bool, may_read: bool
) -> None:
    async def run() -> None:
        async with opened("file", filename=str(image), need=need, share=share):
            writer = run_tool("qemu-io", "-f", "qcow2", "-c", "write 0 512", image)
            assert (writer.returncode == 0) is may_write, writer.stderr
            reader = run_tool("qemu-io", "-r", "-f", "qcow2", "-c", "read 0 512", image)
            assert (reader.returncode == 0) is may_read, reader.stderr
            for refused in [t for t, may in ((writer, may_write), (reader, may_read)) if not may]:
                assert "lock" in refused.stderr
            forced = run_tool("qemu-io", "-r", "-U", "-f", "qcow2", "-c", "read 0 512", image)
            assert (forced.returncode == 0) is bool(share & Perm.CONSISTENT_READ), forced.stderr
        assert run_tool("qemu-io", "-f", "qcow2", "-c", "write 0 512", image).returncode == 0

    asyncio.run(run())


# how QEMU holds it; need, share of ours; does it open.
_THEIRS = [
    pytest.param((), EVERYTHING, READ, False, id="writer-against-writer"),
    pytest.param((), WRITE, ALL, False, id="sharing-writer-against-writer"),
    pytest.param((), READ, NO_WRITERS, False, id="reader-of-stable-data-against-writer"),
    pytest.param((), READ, ALL, True, id="tolerant-reader-against-writer"),
    pytest.param(("-r",), EVERYTHING, ALL, False, id="writer-against-reader"),
    pytest.param(("-r",), READ, NO_WRITERS, True, id="reader-against-reader"),
    pytest.param(("-r",), READ, NONE, False, id="exclusive-reader-against-reader"),
    pytest.param(("-r", "-U"), EVERYTHING, READ, True, id="writer-against-forced-reader"),
]


@pytest.mark.parametrize("mode, need, share, allowed", _THEIRS)
def test_image_held_by_qemu_opens_here_as_shared(
    image: Path,
    held_by_qemu: Holder,
    mode: tuple[str, ...],
    need: Perm,
    share: Perm,
    allowed: bool,
) -> None:
    async def run() -> None:
        read_only = not need & Perm.WRITE
        if not allowed:
            with pytest.raises(GraphError, match="is locked") as caught:
                async with opened("file", "disk", filename=str(image), read_only=read_only, need=need, share=share):
                    pass
            assert "node 'disk'" in str(caught.value)
            assert str(image) in str(caught.value)
        else:
            async with opened("file", filename=str(image), read_only=read_only, need=need, share=share):
                pass
        async with opened("file", filename=str(image), read_only=True, force_share=True, need=READ, share=NO_WRITERS):
            pass

    with held_by_qemu("-f", "qcow2", *mode, image):
        asyncio.run(run())


def test_image_let_go_by_qemu_opens_here(image: Path, held_by_qemu: Holder) -> None:
    async def run() -> None:
        async with opened("file", filename=str(image)):
            pass

    with held_by_qemu("-f", "qcow2", image), pytest.raises(GraphError):
        asyncio.run(run())
    asyncio.run(run())


def test_image_downgraded_by_us_opens_in_qemu(image: Path, run_tool: Tool) -> None:
    async def run() -> None:
        async with opened("file", filename=str(image), auto_read_only=True, need=EVERYTHING, share=READ) as child:
            await write(child, 512 * 1024, b"x")
            assert run_tool("qemu-img", "info", image).returncode != 0
            await hold(child.node, READ, NO_WRITERS)
            assert run_tool("qemu-img", "info", image).returncode == 0
            assert run_tool("qemu-io", "-f", "qcow2", "-c", "write 0 512", image).returncode != 0
            await hold(child.node, READ, ALL)
            assert run_tool("qemu-io", "-f", "qcow2", "-c", "write 0 512", image).returncode == 0

    asyncio.run(run())

# SPDX-FileCopyrightText: blockgraph contributors
# SPDX-License-Identifier: MIT
"""What goes wrong with `blockgraph run` and `blockgraph info`: one line that names node, file and remedy; status 1; the
source is untouched."""

from __future__ import annotations

import asyncio
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from helpers.command import command, disk, graph_file
from helpers.limits import files_end_at

from blockgraph.cli import main
from blockgraph.testing.nbd_client import NbdClient

MIB = 1 << 20
FULL = 'sync = "full"'


def one_line(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    """The error of a failing command."""
    capsys.readouterr()
    assert main(list(arguments)) == 1
    error = capsys.readouterr().err
    assert error.startswith(("blockgraph: ", "/"))
    assert error.count("\n") == 1, error
    return error


def names(error: str, *words: str) -> None:
    missing = [word for word in words if word not in error]
    assert not missing, f"{missing} not in: {error}"


def test_missing_graph_file_is_told(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    names(one_line(capsys, "run", str(tmp_path / "none.toml")), "none.toml", "No such file")


def test_missing_image_is_told(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    names(one_line(capsys, "run", str(graph_file(tmp_path))), "node '", "disk.img", "No such file", "check 'filename'")
    names(one_line(capsys, "info", str(tmp_path / "none")), "none", "No such file", "check the name")


def test_image_of_another_format_or_cut_short_is_told(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    content = disk(tmp_path, MIB)
    target = str(tmp_path / "t")
    disk(tmp_path, MIB, "t")
    graph = graph_file(tmp_path, job=FULL, target="qcow2")
    names(one_line(capsys, "run", str(graph)), "node 'target'", f"'{target}'", "not a qcow2 image", "check its format")
    assert main(["create", "-f", "qcow2", "--force", target, "1M"]) == 0
    os.truncate(target, 100)
    names(one_line(capsys, "run", str(graph)), "node 'target'", f"'{target}'", "inside the header", "restore")
    assert (tmp_path / "disk.img").read_bytes() == content


@contextmanager
def nobody() -> Iterator[None]:
    """Without root's power over files, where we have it."""
    if os.geteuid():
        yield
        return
    os.seteuid(65534)
    try:
        yield
    finally:
        os.seteuid(0)


@pytest.mark.parametrize("mode, verb", [(0o000, "write"), (0o444, "write")], ids=["no-access", "read-only"])
def test_image_without_permission_is_told(
    capsys: pytest.CaptureFixture[str], tmp_path_factory: pytest.TempPathFactory, mode: int, verb: str
) -> None:
    folder = tmp_path_factory.mktemp("permission")
    for part in (folder, *folder.parents[:2]):
        if part.owner() == Path(tmp_path_factory.getbasetemp()).owner():
            part.chmod(0o755)
    disk(folder, MIB)
    graph = graph_file(folder)
    (folder / "disk.img").chmod(mode)
    with nobody():
        error = one_line(capsys, "run", str(graph))
    names(error, "node '", "disk.img", "Permission denied", f"run as a user who may {verb} it, or set read-only")


def test_locked_image_is_told_and_force_share_reads_it(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    content = disk(tmp_path, MIB)
    with command(tmp_path, "run", str(graph_file(tmp_path))) as running:
        running.wait_line("ready")
        image = str(tmp_path / "disk.img")
        names(one_line(capsys, "info", image), "disk.img", "locked", "give --force-share")
        names(one_line(capsys, "map", image), "disk.img", "locked", "give --force-share")
        names(one_line(capsys, "create", "--force", image, "1M"), "disk.img", "locked")
        assert main(["info", "-U", image]) == 0
        assert main(["map", "-U", "--json", image]) == 0
    assert (tmp_path / "disk.img").read_bytes() == content


@pytest.mark.parametrize("length", [3, 100, 65536 + 100], ids=["magic", "header", "tables"])
def test_truncated_image_is_told(capsys: pytest.CaptureFixture[str], tmp_path: Path, length: int) -> None:
    image = tmp_path / "t"
    assert main(["create", "-f", "qcow2", str(image), "64M"]) == 0
    os.truncate(image, length)
    before = image.read_bytes()
    disk(tmp_path, MIB)
    names(one_line(capsys, "run", str(graph_file(tmp_path, job=FULL, target="qcow2"))), "node 'target'")
    names(one_line(capsys, "map", "-f", "qcow2", str(image)), "node 'image'")
    assert image.read_bytes() == before


@pytest.mark.parametrize("size", [MIB // 2, 2 * MIB], ids=["smaller", "larger"])
def test_target_of_another_size_is_told(capsys: pytest.CaptureFixture[str], tmp_path: Path, size: int) -> None:
    content = disk(tmp_path, MIB)
    target = disk(tmp_path, size, "t")
    error = one_line(capsys, "run", str(graph_file(tmp_path, job=FULL)))
    names(
        error,
        "node 'target'",
        f"'{tmp_path / 't'}'",
        "node 'disk'",
        f"{size} bytes",
        f"resize the target to {MIB} bytes",
    )
    assert (tmp_path / "disk.img").read_bytes() == content
    assert (tmp_path / "t").read_bytes() == target


def limited(limit: int, arguments: list[str]) -> int:
    """Run a command in this process, unable to make files longer than `limit`."""
    with files_end_at(limit):
        return main(arguments)


def test_target_that_can_not_grow_in_the_middle_is_told(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    content = disk(tmp_path, 8 * MIB)
    assert main(["create", "-f", "qcow2", str(tmp_path / "t"), "8M"]) == 0
    graph = graph_file(tmp_path, job=FULL, target="qcow2")
    capsys.readouterr()
    assert limited(3 * MIB, ["run", "--exit-when-done", str(graph)]) == 1
    (error,) = [line for line in capsys.readouterr().err.splitlines() if "job 'b0' failed" in line]
    names(error, "node '", f"'{tmp_path / 't'}'", "File too large", "limit forbids")
    assert (tmp_path / "disk.img").read_bytes() == content


def test_target_on_a_full_file_system_is_told(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, small_tmpfs: Path
) -> None:
    content = disk(tmp_path, 4 * MIB)
    with (small_tmpfs / "t").open("wb") as file:
        file.truncate(len(content))
    graph = graph_file(tmp_path, job=FULL, name=str(small_tmpfs / "t"))
    assert main(["run", "--exit-when-done", str(graph)]) == 1
    (error,) = [line for line in capsys.readouterr().err.splitlines() if "job 'b0' failed" in line]
    names(error, "node '", str(small_tmpfs / "t"), "No space left", "free space")
    assert (tmp_path / "disk.img").read_bytes() == content


@pytest.mark.parametrize("mode", ["create", "existing"])
def test_target_image_on_a_full_file_system_takes_two_lines(tmp_path: Path, small_tmpfs: Path, mode: str) -> None:
    content = disk(tmp_path, 4 * MIB)
    graph = graph_file(tmp_path)
    if mode == "existing":
        assert main(["create", "-f", "qcow2", str(small_tmpfs / "t"), "4M"]) == 0
    job = f'[[jobs]]\ntype = "backup"\njob-id = "b0"\ndevice = "disk"\nsync = "full"\nmode = "{mode}"\n'
    target = f'{{driver = "qcow2", file = {{driver = "file", filename = "{small_tmpfs / "t"}"}}}}'
    graph.write_text(f"{graph.read_text()}\n{job}target = {target}\n")
    with command(tmp_path, "run", "--exit-when-done", str(graph)) as running:
        assert running.end() == 1
        errors = running.errors.splitlines()
    assert len(errors) <= 2, errors  # the job, and what could not be written when its target was closed
    for error in errors:
        assert error.startswith("blockgraph: ")
        names(error, "node '", f"'{small_tmpfs / 't'}'", "No space left", "free space")
    assert "job 'b0' failed" in errors[-1]
    assert (tmp_path / "disk.img").read_bytes() == content


def test_socket_in_use_is_told(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    disk(tmp_path, MIB)
    earlier = disk(tmp_path, MIB, "t")[::-1]
    (tmp_path / "t").write_bytes(earlier)
    with socket.socket(socket.AF_UNIX) as other:
        other.bind(str(tmp_path / "s.sock"))
        other.listen()
        names(one_line(capsys, "run", str(graph_file(tmp_path, job=FULL))), "s.sock", "stop")
    assert (tmp_path / "s.sock").exists()
    assert (tmp_path / "t").read_bytes() == earlier  # the job did not begin


def test_port_in_use_is_told(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    disk(tmp_path, MIB)
    graph = graph_file(tmp_path)
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        text = graph.read_text()
        address = f'{{type = "inet", host = "127.0.0.1", port = {port}}}'
        graph.write_text(text.replace('{type = "unix", path = "s.sock"}', address))
        names(one_line(capsys, "run", str(graph)), str(port), "in use", "another port")


@pytest.mark.parametrize("dies", ["silently", "with-garbage"])
def test_client_that_dies_harms_nobody(tmp_path: Path, dies: str) -> None:
    disk(tmp_path, 4 * MIB)
    path = str(tmp_path / "s.sock")
    with command(tmp_path, "run", str(graph_file(tmp_path))) as running:
        running.wait_line("ready")
        asyncio.run(lives_and_dies(path, garbage=dies == "with-garbage"))
        running.process.terminate()
        assert running.end() == 0
        assert running.errors.count("\n") <= 1
        assert "Traceback" not in running.errors
    assert (tmp_path / "disk.img").read_bytes()[:3] == b"yes"


async def lives_and_dies(path: str, *, garbage: bool) -> None:
    other = await NbdClient.connect_unix(path, "disk")
    dying = await NbdClient.connect_unix(path, "disk")
    reads = [asyncio.ensure_future(dying.pread(0, 2 * MIB)) for _ in range(8)]
    await dying.flush()
    if garbage:
        await dying.wire.send(b"\0" * 28)
    await dying.abort()
    await asyncio.gather(*reads, return_exceptions=True)
    await other.pwrite(0, b"yes")
    await other.disconnect()


def test_existing_target_of_mode_create_is_told_and_kept(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    disk(tmp_path, MIB)
    target = disk(tmp_path, MIB, "t")
    graph = graph_file(tmp_path, job=f'{FULL}\nmode = "create"')
    text = graph.read_text()
    inline = '{driver = "raw", file = {driver = "file", filename = "t"}}'
    node = text.index('[[nodes]]\nnode-name = "target"')
    text = text[:node] + text[text.index("[[jobs]]") :].replace('target = "target"', f"target = {inline}")
    graph.write_text(text)
    names(one_line(capsys, "run", str(graph)), "File exists", str(tmp_path / "t"))
    assert (tmp_path / "t").read_bytes() == target

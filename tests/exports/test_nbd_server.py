# SPDX-FileCopyrightText: blockgraph contributors
# SPDX-License-Identifier: MIT
"""Addresses, exports, limits, the end."""

from __future__ import annotations

import asyncio
import errno
import os
import resource
import socket
from pathlib import Path

import pytest

from blockgraph.errors import BlockGraphError, GraphError, IOFailure, OptionError
from blockgraph.exports.nbd import NbdExport, NbdServer, listener, protocol, start_server
from blockgraph.exports.nbd.protocol import Cmd
from blockgraph.exports.options import InetAddress, NbdServerOptions, UnixAddress
from blockgraph.testing.memory_backend import MemoryBackend
from blockgraph.testing.nbd_client import NbdClient, OptionRefusedError
from tests.helpers.nbd import run_async, serving

pytestmark = pytest.mark.usefixtures("served_by")


def export(name: str, size: int = 4096) -> NbdExport:
    return NbdExport(name, MemoryBackend(size).as_backend(), writable=False)


def leave_dead_socket(path: str) -> None:
    with socket.socket(socket.AF_UNIX) as sock:
        sock.bind(path)


# Addresses.


@run_async
async def test_listen_unix_dead_socket_file_is_replaced(tmp_path: Path) -> None:
    path = str(tmp_path / "s")
    leave_dead_socket(path)
    server = NbdServer()
    assert await server.listen_unix(path) == path
    await server.close()
    assert not os.path.exists(path)


@run_async
async def test_listen_unix_live_server_is_left_alone(tmp_path: Path) -> None:
    path = str(tmp_path / "s")
    first, second = NbdServer(), NbdServer()
    await first.listen_unix(path)
    first.add_export(export("e"))
    with pytest.raises(BlockGraphError, match=r"another server listens there; stop that server or choose") as error:
        await second.listen_unix(path)
    assert error.value.errno == errno.EADDRINUSE
    await second.close()
    async with await NbdClient.connect_unix(path, "e") as client:
        assert await client.pread(0, 1) == b"\0"
    await first.close()


@pytest.mark.parametrize(
    "name, hint",
    [("file", "choose another path"), ("none/s", "make the directory"), ("x" * 200, "107 bytes")],
    ids=["plain-file", "no-directory", "too-long"],
)
@run_async
async def test_listen_unix_impossible_says_what_to_do(tmp_path: Path, name: str, hint: str) -> None:
    (tmp_path / "file").write_text("precious")
    server = NbdServer()
    with pytest.raises(BlockGraphError, match=hint):
        await server.listen_unix(str(tmp_path / name))
    assert (tmp_path / "file").read_text() == "precious"
    await server.close()


@run_async
async def test_accepting_later_first_clients_wait_until_then(tmp_path: Path) -> None:
    server = NbdServer(accepting=False)
    path = await server.listen_unix(str(tmp_path / "s"))
    early = asyncio.ensure_future(NbdClient.connect_unix(path, "disk"))
    for _ in range(20):
        await asyncio.sleep(0)
    assert (early.done(), server.connections) == (False, 0)
    server.add_export(export("disk"))
    server.accept()
    async with await early as client:
        assert await client.pread(0, 1) == b"\0"
    await server.close()


@run_async
async def test_close_socket_file_of_successor_is_kept(tmp_path: Path) -> None:
    path = tmp_path / "s"
    first, second = NbdServer(), NbdServer()
    await first.listen_unix(str(path))
    path.unlink()
    await second.listen_unix(str(path))
    await first.close()
    assert path.exists()
    await second.close()


@run_async
async def test_listen_tcp_any_port_is_reachable_and_in_uri() -> None:
    server = NbdServer()
    host, port = await server.listen_tcp("127.0.0.1", 0)
    server.add_export(export("with space/ü"))
    assert server.uri("with space/ü") == f"nbd://127.0.0.1:{port}/with%20space%2F%C3%BC"
    async with await NbdClient.connect_tcp(host, port, "with space/ü") as client:
        assert client.size == 4096
    await server.close()


@run_async
async def test_uri_names_the_host_as_it_was_given() -> None:
    for host, shown in (("localhost", "localhost"), ("", "localhost"), ("0.0.0.0", "localhost"), ("::1", "[::1]")):
        server = NbdServer()
        _, port = await server.listen_tcp(host, 0)
        server.add_export(export("e"))
        assert server.uri("e") == f"nbd://{shown}:{port}/e"
        await server.close()


@run_async
async def test_listen_tcp_port_in_use_says_what_to_do() -> None:
    first, second = NbdServer(), NbdServer()
    _, port = await first.listen_tcp("127.0.0.1", "0")
    with pytest.raises(BlockGraphError, match=rf"127\.0\.0\.1:{port}.*choose another port"):
        await second.listen_tcp("127.0.0.1", port)
    with pytest.raises(BlockGraphError, match="address of this machine"):
        await second.listen_tcp("192.0.2.1", 0)
    with pytest.raises(BlockGraphError, match="check the host's name"):
        await second.listen_tcp("nowhere.invalid", 0)
    await second.close()
    await first.close()


@run_async
async def test_uri_unix_escapes_path_and_name(tmp_path: Path) -> None:
    server = NbdServer()
    server.add_export(export("a b"))
    with pytest.raises(GraphError, match="listens nowhere"):
        server.uri("a b")
    await server.listen_unix(str(tmp_path / "s &"))
    assert server.uri("a b") == f"nbd+unix:///a%20b?socket={tmp_path}/s%20%26"
    with pytest.raises(GraphError, match=r"'other'.*'a b'"):
        server.uri("other")
    await server.close()


@run_async
async def test_start_server_from_options_listens(tmp_path: Path) -> None:
    path = str(tmp_path / "s")
    for addr in (UnixAddress(path=path), InetAddress(host="localhost", port=0)):
        server = await start_server(NbdServerOptions(addr=addr))
        server.add_export(export("e"))
        assert server.uri("e").startswith("nbd")
        await server.close()


# Exports.


@run_async
async def test_add_export_name_taken_is_refused() -> None:
    async with serving() as served:
        with pytest.raises(GraphError, match="already an NBD export named 'disk'"):
            served.server.add_export(export("disk"))


def test_export_bad_arguments_are_refused() -> None:
    backend = MemoryBackend(4096, writable=False).as_backend()
    with pytest.raises(GraphError, match="read-only"):
        NbdExport("e", backend, writable=True)
    with pytest.raises(OptionError, match="description: longer than 4096 bytes"):
        NbdExport("e", backend, description="ü" * 2049, writable=False)
    with pytest.raises(OptionError, match="name"):
        NbdExport("e" * 4097, backend, writable=False)


@run_async
async def test_remove_export_with_clients_safe_is_refused_hard_disconnects() -> None:
    async with serving() as served:
        served.server.add_export(export("other"))
        bystander = await served.client("other")
        client = await served.client()
        with served.disk.hold("pwrite") as held:
            write = asyncio.create_task(client.pwrite(0, b"x"))
            await held.arrived()
            with pytest.raises(GraphError, match=r"has 1 client\(s\); .*hard"):
                await served.server.remove_export("disk")
            removing = asyncio.create_task(served.server.remove_export("disk", hard=True))
            with pytest.raises(ConnectionError):
                await write
            assert not removing.done()  # the write still uses the backend
            held.release()
            await removing
        with pytest.raises(OptionRefusedError):
            await served.client(contexts=())
        assert await bystander.pread(0, 1) == b"\0"
        await bystander.disconnect()
        await client.disconnect()
        await served.server.remove_export("other")
        with pytest.raises(GraphError, match="no NBD export is named 'disk'"):
            await served.server.remove_export("disk")


@run_async
async def test_remove_export_hard_request_stuck_is_cancelled() -> None:
    async with serving(close_timeout=0.01) as served:
        client = await served.client()
        with served.disk.hold("pread") as held:
            read = asyncio.create_task(client.pread(0, 1))
            await held.arrived()
            await served.server.remove_export("disk", hard=True)
            with pytest.raises(ConnectionError):
                await read
        await client.disconnect()


# Limits.


@run_async
async def test_max_connections_further_clients_wait_for_a_place() -> None:
    async with serving(max_connections=2) as served:
        first, second = await served.client(), await served.client()
        third = asyncio.create_task(served.client())
        for _ in range(50):
            await first.pread(0, 1)
        assert not third.done()
        assert served.server.connections == 2
        await second.disconnect()
        async with await third as client:
            assert await client.pread(0, 1) == b"\0"
        await first.disconnect()


@run_async
async def test_accept_out_of_descriptors_client_is_served_later(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(listener, "_PAUSE", 0.01)
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    async with serving() as served:
        with socket.socket(socket.AF_UNIX) as sock:
            os.close(next_descriptor := os.dup(sock.fileno()))
            resource.setrlimit(resource.RLIMIT_NOFILE, (next_descriptor, limits[1]))
            try:
                sock.connect(served.path)
                while not caplog.records:  # noqa: ASYNC110  # the log is all there is to wait for
                    await asyncio.sleep(0)
            finally:
                resource.setrlimit(resource.RLIMIT_NOFILE, limits)
            assert "a client has to wait" in caplog.text
            sock.setblocking(False)
            assert (await asyncio.get_running_loop().sock_recv(sock, 8)) == b"NBDMAGIC"


# The end.


@run_async
async def test_close_requests_in_flight_end_and_new_ones_get_eshutdown() -> None:
    async with serving() as served:
        client = await served.client()
        with served.disk.hold("pwrite") as held:
            write = asyncio.create_task(client.pwrite(0, b"x" * 100))
            await held.arrived()
            closing = asyncio.create_task(served.server.close())
            await asyncio.sleep(0)  # its first steps need no waiting
            assert not os.path.exists(served.path)
            with pytest.raises(IOFailure) as failure:
                await client.pread(0, 1)
            assert failure.value.errno == errno.ESHUTDOWN
            assert not closing.done()
            held.release()
            await write  # its reply reaches the client
            await closing
        with pytest.raises(ConnectionError):
            await client.pread(0, 1)
        await client.disconnect()
        assert served.disk.data[:100] == b"x" * 100
        await served.server.close()


@run_async
async def test_close_request_that_never_ends_is_cancelled() -> None:
    async with serving(close_timeout=0.01) as served:
        client = await served.client()
        with served.disk.hold("pwrite") as held:
            writes = [asyncio.create_task(client.pwrite(n, b"x")) for n in range(3)]
            await held.arrived(3)
            await served.server.close()
            results = await asyncio.gather(*writes, return_exceptions=True)
            assert all(isinstance(result, OSError | IOFailure) for result in results)
            assert served.server.connections == 0
        assert not any(served.disk.data)
        await client.disconnect()


@run_async
async def test_close_client_that_reads_nothing_is_disconnected() -> None:
    async with serving(size=1 << 24, close_timeout=0.05) as served:
        served.disk.data[:] = os.urandom(1 << 20) * 16
        client = await served.client()
        assert client._task is not None
        client._task.cancel()
        for number in range(8):
            await client.wire.send_request(Cmd.READ, number, 0, 1 << 23)
        await served.server.close()
        assert served.server.connections == 0
        await client.abort()


@run_async
async def test_close_during_handshakes_and_twice_at_once_is_quiet() -> None:
    async with serving() as served:
        wires = [await served.wire() for _ in range(10)]
        for wire in wires[::2]:
            await wire.greet()
        await asyncio.gather(served.server.close(), served.server.close())
        for number, wire in enumerate(wires):
            await wire.closed_by_server()
            await wire.close()
            assert number < 10
        assert served.server.connections == 0
        with pytest.raises(BlockGraphError, match="closed"):
            await served.server.listen_tcp("127.0.0.1", 0)


@run_async
async def test_close_idle_clients_are_disconnected_at_once() -> None:
    async with serving() as served:
        clients = [await served.client() for _ in range(20)]
        await served.server.close()
        for client in clients:
            with pytest.raises((ConnectionError, OSError)):
                await client.pread(0, protocol.MAX_REQUEST)
            await client.disconnect()

# SPDX-FileCopyrightText: blockgraph contributors
# SPDX-License-Identifier: MIT
"""STARTTLS and everything under it."""

from __future__ import annotations

import asyncio
import contextlib
import os
import ssl
from collections.abc import Callable
from pathlib import Path

import pytest

from blockgraph.errors import BlockGraphError, OptionError
from blockgraph.exports.nbd import protocol
from blockgraph.exports.nbd.protocol import Cmd, Opt, Rep
from blockgraph.exports.nbd.tls import server_context
from blockgraph.exports.options import TlsCredentials
from blockgraph.testing.nbd_client import OptionRefusedError, string
from tests.helpers.certificates import make_certificates
from tests.helpers.nbd import raw_client, run_async, serving

MIB = 1 << 20


@pytest.fixture(scope="module")
def certificates(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_certificates("openssl", tmp_path_factory.mktemp("tls"))


@pytest.fixture(autouse=True)
def _openssl(require_tool: Callable[[str], str], request: pytest.FixtureRequest) -> None:
    require_tool("openssl")


def client_context(directory: Path, *, certificate: bool = True) -> ssl.SSLContext:
    context = ssl.create_default_context(cafile=str(directory / "ca-cert.pem"))
    if certificate:
        context.load_cert_chain(directory / "client-cert.pem", directory / "client-key.pem")
    return context


def context_for(directory: Path, **options: bool) -> ssl.SSLContext:
    return server_context(TlsCredentials(dir=str(directory), **options))


@pytest.mark.parametrize("version", [ssl.TLSVersion.TLSv1_2, ssl.TLSVersion.TLSv1_3], ids=["1.2", "1.3"])
@run_async
async def test_tls_requests_of_all_sizes_work(certificates: Path, version: ssl.TLSVersion) -> None:
    context = client_context(certificates)
    context.maximum_version = context.minimum_version = version
    async with serving(size=16 * MIB, tls=context_for(certificates), tls_required=True) as served:
        client = await served.client(tls=context, server_hostname="localhost")
        data = os.urandom(MIB) * 8
        await client.pwrite(5, data)
        await asyncio.gather(*(client.pwrite(9 * MIB + n * 4096, bytes([n]) * 4096) for n in range(200)))
        assert await client.pread(5, len(data)) == data
        parts = await asyncio.gather(*(client.pread(9 * MIB + n * 4096, 4096) for n in range(200)))
        assert all(part == bytes([n]) * 4096 for n, part in enumerate(parts))
        assert await client.map()
        await client.disconnect()
        await served.idle()


@run_async
async def test_tls_client_that_does_not_read_stops_only_itself(certificates: Path) -> None:
    context = client_context(certificates)
    async with serving(size=2 * MIB, tls=context_for(certificates)) as served:
        served.disk.data[:] = os.urandom(MIB) * 2
        lazy = await raw_client(served, tls=context, server_hostname="localhost")
        for number in range(100):
            await lazy.wire.send_request(Cmd.READ, number, number, MIB)
        async with await served.client() as other:
            assert len(await other.pread(0, MIB)) == MIB
        for number in range(100):
            reply = await lazy.wire.reply()
            assert reply.data[8:] == served.disk.data[reply.cookie : reply.cookie + MIB]
            assert reply.cookie == number
        await lazy.abort()
        await served.idle()


@run_async
async def test_tls_required_everything_else_is_refused(certificates: Path) -> None:
    async with serving(tls=context_for(certificates), tls_required=True) as served:
        wire = await served.greeted()
        for option in (Opt.LIST, Opt.INFO, Opt.GO, Opt.STRUCTURED_REPLY, Opt.SET_META_CONTEXT, 4711):
            assert (await wire.option(option, bytes(100_000)))[-1].reply == Rep.ERR_TLS_REQD
        await wire.send_option(Opt.EXPORT_NAME, b"disk")
        assert await wire.closed_by_server()
        await wire.close()
        wire = await served.greeted()
        assert (await wire.option(Opt.ABORT))[-1].reply == Rep.ACK
        await wire.close()


@run_async
async def test_tls_allowed_clients_without_are_served(certificates: Path) -> None:
    async with serving(tls=context_for(certificates)) as served, await served.client() as client:
        assert await client.pread(0, 1) == b"\0"


@run_async
async def test_starttls_forgets_what_was_agreed_in_the_clear(certificates: Path) -> None:
    async with serving(tls=context_for(certificates)) as served:
        wire = await served.greeted()
        await wire.ask(Opt.STRUCTURED_REPLY)
        await wire.start_tls(client_context(certificates), "localhost")
        query = string("disk") + b"\0\0\0\0"
        assert (await wire.option(Opt.SET_META_CONTEXT, query))[-1].reply == Rep.ERR_INVALID
        assert (await wire.option(Opt.STARTTLS))[-1].reply == Rep.ERR_INVALID
        await wire.ask(Opt.GO, string("disk") + b"\0\0")
        await wire.send_request(Cmd.READ, 4, 0, 4)
        assert (await wire.reply({4: 4})).chunk is None
        await wire.close()


@run_async
async def test_starttls_bytes_injected_behind_it_are_not_obeyed(certificates: Path) -> None:
    async with serving(tls=context_for(certificates)) as served:
        wire = await served.greeted()
        injected = protocol.OPTION.pack(protocol.OPTION_MAGIC, Opt.STRUCTURED_REPLY, 0)
        await wire.send(protocol.OPTION.pack(protocol.OPTION_MAGIC, Opt.STARTTLS, 0) + injected)
        assert (await wire.option_reply()).reply == Rep.ACK
        answer = b""
        with contextlib.suppress(ConnectionResetError):
            answer = await wire.reader.read()  # an alert of TLS, or nothing
        assert protocol.OPTION_REPLY_MAGIC.to_bytes(8) not in answer
        await wire.close()
        await served.idle()


@pytest.mark.parametrize("verify", [True, False], ids=["verified", "unverified"])
@run_async
async def test_tls_client_without_certificate_is_let_in_only_unverified(certificates: Path, verify: bool) -> None:
    async with serving(tls=context_for(certificates, verify_peer=verify), tls_required=True) as served:
        context = client_context(certificates, certificate=False)
        if verify:
            with pytest.raises((OSError, asyncio.IncompleteReadError)):
                await served.client(tls=context, server_hostname="localhost")
            await served.idle()
        else:
            async with await served.client(tls=context, server_hostname="localhost") as client:
                assert await client.pread(0, 1) == b"\0"


@run_async
async def test_starttls_client_leaves_or_hangs_in_tls_handshake(certificates: Path) -> None:
    async with serving(tls=context_for(certificates), handshake_timeout=0.05) as served:
        for leave in (True, False):
            wire = await served.greeted()
            await wire.ask(Opt.STARTTLS)
            if leave:
                await wire.close()
            await served.idle()
            await wire.close()


@run_async
async def test_tls_without_credentials_is_refused_by_policy() -> None:
    async with serving() as served:
        with pytest.raises(OptionRefusedError) as refused:
            await served.client(tls=ssl.create_default_context(), server_hostname="localhost")
        assert refused.value.reply == Rep.ERR_POLICY


def test_server_context_files_missing_or_wrong_are_named(certificates: Path, tmp_path: Path) -> None:
    with pytest.raises(OptionError, match=r"server-cert\.pem"):
        server_context(TlsCredentials(dir=str(tmp_path)))
    wrong = tmp_path / "wrong.pem"
    wrong.write_text("not a key")
    credentials = TlsCredentials(cert=str(certificates / "server-cert.pem"), key=str(wrong), verify_peer=False)
    with pytest.raises(BlockGraphError, match=r"wrong\.pem.*can not be used for TLS"):
        server_context(credentials)

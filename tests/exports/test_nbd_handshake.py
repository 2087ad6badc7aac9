# SPDX-FileCopyrightText: blockgraph contributors
# SPDX-License-Identifier: MIT
"""Option haggling, good and bad."""

from __future__ import annotations

import asyncio

import pytest

from blockgraph.exports.nbd import NbdExport, protocol
from blockgraph.exports.nbd.protocol import HandshakeFlag, Info, Opt, Rep
from blockgraph.exports.nbd.protocol import TransmissionFlag as Flag
from blockgraph.testing.memory_backend import MemoryBackend
from blockgraph.testing.nbd_client import NbdWire, OptionRefusedError, string
from tests.helpers.nbd import SIZE, run_async, serving


def info_request(name: str, *wanted: int) -> bytes:
    return string(name) + b"".join(map(protocol.U16.pack, (len(wanted), *wanted)))


def queries(name: str, *texts: str) -> bytes:
    return string(name) + protocol.U32.pack(len(texts)) + b"".join(map(string, texts))


async def still_negotiates(wire: NbdWire) -> None:
    assert [reply.reply for reply in await wire.option(Opt.LIST)] == [Rep.SERVER, Rep.ACK]


@run_async
async def test_greeting_fixed_newstyle_offers_no_zeroes() -> None:
    async with serving() as served:
        wire = await served.wire()
        assert await wire.greet() == HandshakeFlag.FIXED_NEWSTYLE | HandshakeFlag.NO_ZEROES
        await wire.close()


@pytest.mark.parametrize("flags", [4, 0x80000000, 0xFFFFFFFF])
@run_async
async def test_greeting_unknown_client_flag_disconnects(flags: int) -> None:
    async with serving() as served:
        wire = await served.wire()
        await wire.greet(flags)
        assert await wire.closed_by_server()
        await wire.close()


@pytest.mark.parametrize("flags, padding", [(1, 124), (3, 0), (0, 124)], ids=["zeroes", "no-zeroes", "not-fixed"])
@run_async
async def test_export_name_known_enters_transmission(flags: int, padding: int) -> None:
    async with serving() as served:
        wire = await served.wire()
        await wire.greet(flags)
        await wire.send_option(Opt.EXPORT_NAME, b"disk")
        size, export_flags = protocol.EXPORT_NAME_REPLY.unpack(await wire.recv(10))
        assert (size, bool(export_flags & Flag.SEND_DF)) == (SIZE, False)
        assert await wire.recv(padding) == bytes(padding)
        await wire.send_request(0, 77, 0, 8)
        reply = await wire.reply({77: 8})
        assert (reply.cookie, reply.error, reply.chunk, reply.data) == (77, 0, None, bytes(8))
        await wire.close()


@pytest.mark.parametrize("name", [b"other", b"\xff\xfe", b"x" * 5000, b"x" * 70_000], ids=lambda name: str(len(name)))
@run_async
async def test_export_name_unknown_disconnects(name: bytes) -> None:
    async with serving() as served:
        wire = await served.greeted()
        await wire.send_option(Opt.EXPORT_NAME, name)
        assert await wire.closed_by_server()
        await wire.close()


@run_async
async def test_not_fixed_newstyle_other_option_disconnects() -> None:
    async with serving() as served:
        wire = await served.wire()
        await wire.greet(0)
        await wire.send_option(Opt.LIST)
        assert await wire.closed_by_server()
        await wire.close()


@run_async
async def test_list_many_exports_names_all_with_descriptions() -> None:
    async with serving() as served:
        for number in range(100):
            export = NbdExport(f"e{number}", MemoryBackend(0).as_backend(), description="d" * number, writable=False)
            served.server.add_export(export)
        wire = await served.greeted()
        replies = await wire.ask(Opt.LIST)
        assert len(replies) == 101
        assert replies[8].data == string("e7") + b"d" * 7
        await wire.close()


@run_async
async def test_go_known_export_tells_flags_and_sizes() -> None:
    async with serving(MemoryBackend(SIZE, alignment=512)) as served, await served.client() as client:
        assert client.size == SIZE
        assert client.block_sizes == (512, 4096, 32 << 20)
        assert client.description == "a test disk"
        assert client.contexts == {1: "base:allocation"}
        assert client.flags == (
            Flag.HAS_FLAGS
            | Flag.SEND_FLUSH
            | Flag.SEND_FUA
            | Flag.SEND_TRIM
            | Flag.SEND_WRITE_ZEROES
            | Flag.SEND_DF
            | Flag.CAN_MULTI_CONN
            | Flag.SEND_CACHE
            | Flag.SEND_FAST_ZERO
        )


@run_async
async def test_go_read_only_export_offers_no_writes() -> None:
    async with serving(writable=False) as served, await served.client(structured=False) as client:
        assert client.flags == (
            Flag.HAS_FLAGS | Flag.READ_ONLY | Flag.SEND_FLUSH | Flag.SEND_FUA | Flag.CAN_MULTI_CONN | Flag.SEND_CACHE
        )


@run_async
async def test_go_size_no_multiple_of_alignment_allows_single_bytes() -> None:
    async with serving(MemoryBackend(1000, alignment=512)) as served, await served.client() as client:
        assert client.block_sizes == (1, 4096, 32 << 20)


@run_async
async def test_info_then_go_says_the_same() -> None:
    async with serving() as served:
        wire = await served.greeted()
        request = info_request("disk", Info.NAME, Info.DESCRIPTION, Info.BLOCK_SIZE, 4711)
        told = [reply.data for reply in await wire.ask(Opt.INFO, request)]
        assert {data[:2] for data in told} == {b"\0\0", b"\0\1", b"\0\2", b"\0\3"}
        assert b"\0\1disk" in told
        assert b"\0\2a test disk" in told
        assert [reply.data for reply in await wire.ask(Opt.GO, request)] == told
        await wire.close()


@run_async
async def test_default_export_only_one_is_that_one() -> None:
    async with serving() as served:
        async with await served.client("") as client:
            assert client.size == SIZE
            assert client.contexts
        wire = await served.greeted()
        assert b"\0\1disk" in [reply.data for reply in await wire.ask(Opt.INFO, info_request(""))]
        served.server.add_export(NbdExport("two", MemoryBackend(0).as_backend(), writable=False))
        assert (await wire.option(Opt.INFO, info_request("")))[-1].reply == Rep.ERR_UNKNOWN
        await wire.close()


@run_async
async def test_go_unknown_export_refused_and_goes_on() -> None:
    async with serving() as served:
        with pytest.raises(OptionRefusedError) as refused:
            await served.client("nothing", contexts=())
        assert refused.value.reply == Rep.ERR_UNKNOWN
        wire = await served.greeted()
        assert (await wire.option(Opt.GO, info_request("nothing")))[-1].reply == Rep.ERR_UNKNOWN
        await still_negotiates(wire)
        await wire.close()


@pytest.mark.parametrize(
    "option, data, expected",
    [
        pytest.param(Opt.LIST, b"x", Rep.ERR_INVALID, id="list-with-data"),
        pytest.param(Opt.STRUCTURED_REPLY, b"x", Rep.ERR_INVALID, id="structured-with-data"),
        pytest.param(Opt.STARTTLS, b"x", Rep.ERR_INVALID, id="starttls-with-data"),
        pytest.param(Opt.STARTTLS, b"", Rep.ERR_POLICY, id="starttls-without-credentials"),
        pytest.param(Opt.INFO, b"", Rep.ERR_INVALID, id="info-empty"),
        pytest.param(Opt.INFO, b"\0\0\0", Rep.ERR_INVALID, id="info-cut-length"),
        pytest.param(Opt.GO, b"\0\0\0\4disk", Rep.ERR_INVALID, id="go-without-count"),
        pytest.param(Opt.GO, b"\0\0\0\4disk\0\2\0\3", Rep.ERR_INVALID, id="go-fewer-requests-than-said"),
        pytest.param(Opt.GO, b"\0\0\0\4disk\0\0\0\0", Rep.ERR_INVALID, id="go-trailing-bytes"),
        pytest.param(Opt.GO, b"\xff\xff\xff\xffdisk\0\0", Rep.ERR_TOO_BIG, id="go-name-longer-than-data"),
        pytest.param(Opt.GO, b"\0\0\0\2\xff\xff\0\0", Rep.ERR_INVALID, id="go-name-not-utf8"),
        pytest.param(Opt.GO, b"\0\0\x20\0" + b"x" * 8192 + b"\0\0", Rep.ERR_TOO_BIG, id="go-long-name"),
        pytest.param(Opt.GO, bytes(100_000), Rep.ERR_TOO_BIG, id="go-long-data"),
        pytest.param(Opt.LIST_META_CONTEXT, queries("disk"), Rep.ERR_INVALID, id="list-context-not-structured"),
        pytest.param(Opt.SET_META_CONTEXT, queries("disk"), Rep.ERR_INVALID, id="set-context-not-structured"),
        pytest.param(4, b"", Rep.ERR_UNSUP, id="peek-export"),
        pytest.param(11, b"", Rep.ERR_UNSUP, id="extended-headers"),
        pytest.param(0, b"junk", Rep.ERR_UNSUP, id="option-0"),
        pytest.param(0xFFFFFFFF, b"j" * 60_000, Rep.ERR_UNSUP, id="option-max"),
    ],
)
@run_async
async def test_option_bad_is_refused_and_negotiation_goes_on(option: int, data: bytes, expected: Rep) -> None:
    async with serving() as served:
        wire = await served.greeted()
        last = (await wire.option(option, data))[-1]
        assert (last.option, last.reply) == (option, expected)
        assert last.data.decode()
        await still_negotiates(wire)
        await wire.close()


@pytest.mark.parametrize(
    "data, expected",
    [
        pytest.param(string("disk"), Rep.ERR_INVALID, id="no-count"),
        pytest.param(string("disk") + b"\0\0\0\2" + string("base:"), Rep.ERR_INVALID, id="fewer-than-said"),
        pytest.param(string("disk") + b"\xff\xff\xff\xff", Rep.ERR_INVALID, id="billions"),
        pytest.param(string("disk") + b"\0\0\0\1\0\0\0\x50x", Rep.ERR_INVALID, id="query-longer-than-data"),
        pytest.param(queries("disk", "base:allocation") + b"x", Rep.ERR_INVALID, id="trailing"),
        pytest.param(queries("nothing", "base:allocation"), Rep.ERR_UNKNOWN, id="unknown-export"),
        pytest.param(queries("disk", "x" * 5000), Rep.ERR_TOO_BIG, id="long-query"),
    ],
)
@run_async
async def test_set_meta_context_bad_clears_selection(data: bytes, expected: Rep) -> None:
    async with serving() as served:
        wire = await served.greeted()
        await wire.ask(Opt.STRUCTURED_REPLY)
        assert len(await wire.ask(Opt.SET_META_CONTEXT, queries("disk", "base:allocation"))) == 1
        assert (await wire.option(Opt.SET_META_CONTEXT, data))[-1].reply == expected
        await wire.ask(Opt.GO, info_request("disk"))
        await wire.send_request(7, 1, 0, 4096)
        assert (await wire.reply()).error == protocol.Err.INVAL
        await wire.close()


@pytest.mark.parametrize(
    "texts, listed, chosen",
    [
        pytest.param((), 1, 0, id="none"),
        pytest.param(("base:",), 1, 0, id="wildcard"),
        pytest.param(("base:allocation",), 1, 1, id="exact"),
        pytest.param(("base:allocation", "base:allocation", "base:"), 1, 1, id="twice"),
        pytest.param(("base:unknown", "qemu:dirty-bitmap:b", "nocolon", ""), 0, 0, id="unknown"),
    ],
)
@run_async
async def test_meta_context_queries_select(texts: tuple[str, ...], listed: int, chosen: int) -> None:
    async with serving() as served:
        wire = await served.greeted()
        await wire.ask(Opt.STRUCTURED_REPLY)
        assert [reply.data for reply in await wire.ask(Opt.LIST_META_CONTEXT, queries("disk", *texts))] == [
            b"\0\0\0\0base:allocation"
        ] * listed
        assert [reply.data for reply in await wire.ask(Opt.SET_META_CONTEXT, queries("disk", *texts))] == [
            b"\0\0\0\1base:allocation"
        ] * chosen
        await wire.close()


@run_async
async def test_meta_context_for_other_export_does_not_count() -> None:
    async with serving() as served:
        served.server.add_export(NbdExport("two", MemoryBackend(4096).as_backend(), writable=False))
        wire = await served.greeted()
        await wire.ask(Opt.STRUCTURED_REPLY)
        await wire.ask(Opt.SET_META_CONTEXT, queries("two", "base:allocation"))
        await wire.ask(Opt.GO, info_request("disk"))
        await wire.send_request(7, 1, 0, 4096)
        assert (await wire.reply()).error == protocol.Err.INVAL
        await wire.close()


@pytest.mark.parametrize("data", [b"", b"goodbye"])
@run_async
async def test_abort_acknowledged_then_closed(data: bytes) -> None:
    async with serving() as served:
        wire = await served.greeted()
        assert (await wire.option(Opt.ABORT, data))[-1].reply == Rep.ACK
        assert await wire.closed_by_server()
        await wire.close()
        await served.idle()


@pytest.mark.parametrize(
    "sent",
    [
        pytest.param(b"\0" * 16, id="wrong-magic"),
        pytest.param(protocol.OPTION.pack(protocol.OPTION_MAGIC, Opt.GO, (32 << 20) + 1), id="huge-length"),
        pytest.param(b"GET / HTTP/1.1\r\n\r\n", id="http"),
    ],
)
@run_async
async def test_framing_broken_ends_that_connection_only(sent: bytes, caplog: pytest.LogCaptureFixture) -> None:
    async with serving() as served, await served.client() as bystander:
        wire = await served.greeted()
        await wire.send(sent)
        assert await wire.closed_by_server()
        await wire.close()
        assert "handshake" in caplog.text
        assert await bystander.pread(0, 4) == bytes(4)


@run_async
async def test_option_too_long_to_keep_is_skipped() -> None:
    async with serving() as served:
        wire = await served.greeted()
        await wire.send_option(Opt.INFO, length=1 << 20)
        for _ in range(16):
            await wire.send(bytes(1 << 16))
        assert (await wire.option_reply()).reply == Rep.ERR_TOO_BIG
        await still_negotiates(wire)
        await wire.close()


@run_async
async def test_requests_pipelined_behind_export_name_are_served() -> None:
    # The handshake must not swallow what belongs to the transmission phase.
    async with serving() as served:
        wire = await served.greeted()
        option = protocol.OPTION.pack(protocol.OPTION_MAGIC, Opt.EXPORT_NAME, 4) + b"disk"
        request = protocol.REQUEST.pack(protocol.REQUEST_MAGIC, 0, 1, 5, 0, 3) + b"abc"
        await wire.send(option + request)
        await wire.recv(10)
        assert (await wire.reply()).cookie == 5
        assert served.disk.data[:3] == b"abc"
        await wire.close()


@run_async
async def test_client_silent_is_disconnected() -> None:
    async with serving(handshake_timeout=0.02) as served:
        wire = await served.greeted()
        assert await wire.closed_by_server()
        await wire.close()
        # A client that has chosen an export may be silent.
        async with serving(handshake_timeout=0.02) as other, await other.client() as client:
            await asyncio.sleep(0.05)
            assert await client.pread(0, 1) == b"\0"


@run_async
async def test_client_leaves_during_handshake_leaves_nothing() -> None:
    async with serving() as served:
        for cut in range(1, 40, 5):
            wire = await served.wire()
            good = protocol.CLIENT_FLAGS.pack(3) + protocol.OPTION.pack(protocol.OPTION_MAGIC, Opt.GO, 10) + b"\0\0\0\4"
            await wire.send(good[:cut])
            await wire.close()
        await served.idle()
        async with await served.client() as client:
            assert await client.pread(0, 1) == b"\0"

# SPDX-FileCopyrightText: blockgraph contributors
# SPDX-License-Identifier: MIT
"""Requests and replies: contents, errors, order, bounds."""

from __future__ import annotations

import asyncio
import errno
import os
from typing import Any

import pytest

from blockgraph.errors import CorruptImage, IOFailure, NoSpace, SnapshotBroken, Unsupported
from blockgraph.exports.nbd import protocol, transmission
from blockgraph.exports.nbd.protocol import Chunk, Cmd, CmdFlag, Err
from blockgraph.flags import Flag
from blockgraph.testing.memory_backend import Call, MemoryBackend
from blockgraph.testing.nbd_client import NbdClient
from tests.helpers.nbd import SIZE, raw_client, run_async, serving

pytestmark = pytest.mark.usefixtures("served_by")

HOLE_ZERO = protocol.STATE_HOLE | protocol.STATE_ZERO
MIB = 1 << 20
both_kinds = pytest.mark.parametrize("structured", [True, False], ids=["structured", "simple"])


# Contents.


@both_kinds
@pytest.mark.parametrize("length", [0, 1, 511, 4096, 4097, 65536, 300_000, MIB])
@run_async
async def test_write_any_length_is_read_back(structured: bool, length: int) -> None:
    async with serving(size=2 * MIB) as served, await served.client(structured=structured) as client:
        data = os.urandom(length)
        await client.pwrite(7, data)
        assert served.disk.data[7 : 7 + length] == data
        assert await client.pread(7, length) == data
        assert not any(served.disk.data[:7])
        assert not any(served.disk.data[7 + length :])


@both_kinds
@run_async
async def test_request_longest_allowed_is_served(structured: bool) -> None:
    size = protocol.MAX_REQUEST
    async with serving(size=size) as served, await served.client(structured=structured) as client:
        data = os.urandom(MIB) * 32
        await client.pwrite(0, data)
        assert await client.pread(0, size) == data


@run_async
async def test_read_of_zeroes_comes_as_hole_unless_df() -> None:
    async with serving() as served:
        client = await raw_client(served)
        wire = client.wire
        await wire.send_request(Cmd.READ, 1, 4096, 65536)
        reply = await wire.reply()
        assert (reply.chunk, reply.done, reply.data) == (
            Chunk.OFFSET_HOLE,
            True,
            (4096).to_bytes(8) + (65536).to_bytes(4),
        )
        await wire.send_request(Cmd.READ, 2, 4096, 65536, flags=CmdFlag.DF)
        reply = await wire.reply()
        assert (reply.chunk, len(reply.data)) == (Chunk.OFFSET_DATA, 8 + 65536)
        served.disk.data[4096 + 65535] = 1
        await wire.send_request(Cmd.READ, 3, 4096, 65536)
        assert (await wire.reply()).chunk == Chunk.OFFSET_DATA
        await client.disconnect()


@pytest.mark.parametrize(
    "flags, expected",
    [
        (0, Flag.MAY_UNMAP),
        (CmdFlag.NO_HOLE, Flag.NONE),
        (CmdFlag.FUA, Flag.MAY_UNMAP | Flag.FUA),
        (CmdFlag.FAST_ZERO | CmdFlag.NO_HOLE, Flag.NO_FALLBACK),
    ],
    ids=["plain", "no-hole", "fua", "fast"],
)
@run_async
async def test_write_zeroes_flags_reach_backend(flags: int, expected: Flag) -> None:
    async with serving() as served, await served.client() as client:
        await client.pwrite(0, b"x" * 8192)
        await client.write_zeroes(4096, 4096, flags=flags)
        assert served.disk.calls[-1] == Call("write_zeroes", 4096, 4096, expected)
        assert await client.pread(4095, 2) == b"x\0"


@run_async
async def test_write_zeroes_longer_than_a_write_may_be_is_served() -> None:
    async with serving(size=64 * MIB) as served, await served.client() as client:
        await client.write_zeroes(0, 64 * MIB)
        assert served.disk.calls[-1].length == 64 * MIB


@run_async
async def test_fast_zero_not_fast_is_refused_enotsup() -> None:
    async with serving(MemoryBackend(SIZE, fast_zero=False)) as served, await served.client() as client:
        with pytest.raises(IOFailure) as failure:
            await client.write_zeroes(0, 4096, flags=CmdFlag.FAST_ZERO)
        assert failure.value.errno == errno.ENOTSUP
        await client.write_zeroes(0, 4096)


@run_async
async def test_write_fua_trim_fua_and_flush_reach_backend_in_order() -> None:
    async with serving() as served, await served.client() as client:
        await client.pwrite(0, b"abc", fua=True)
        await client.trim(4096, 8192, fua=True)
        await client.trim(0, 4096)
        await client.flush()
        assert served.disk.calls == [
            Call("pwrite", 0, 3, Flag.FUA),
            Call("discard", 4096, 8192, Flag.NONE),
            Call("flush", 0, 0, Flag.NONE),
            Call("discard", 0, 4096, Flag.NONE),
            Call("flush", 0, 0, Flag.NONE),
        ]


@run_async
async def test_cache_reads_the_range_in_steps() -> None:
    async with serving(size=4 * MIB) as served, await served.client() as client:
        await client.cache(5, 2 * MIB + 7)
        await client.cache(9, 0)
        assert [(call.op, call.offset, call.length) for call in served.disk.calls] == [
            ("pread", 5, MIB),
            ("pread", 5 + MIB, MIB),
            ("pread", 5 + 2 * MIB, 7),
        ]


# Block status.


@run_async
async def test_block_status_merges_and_tells_hole_and_zero() -> None:
    async with serving() as served, await served.client() as client:
        await client.pwrite(8192, b"x" * 4096)
        await client.pwrite(12288, b"y" * 4096)
        found = await client.block_status(0, SIZE)
        assert found == {"base:allocation": [(8192, HOLE_ZERO), (8192, 0), (SIZE - 16384, HOLE_ZERO)]}
        assert await client.block_status(10_000, 5000, one=True) == {"base:allocation": [(5000, 0)]}
        assert await client.block_status(100, SIZE - 100, one=True) == {"base:allocation": [(8092, HOLE_ZERO)]}
        assert await client.map() == found["base:allocation"]


@run_async
async def test_block_status_fragmented_disk_answers_in_bounded_parts() -> None:
    blocks = 4000
    async with serving(size=blocks * 4096) as served, await served.client() as client:
        for block in range(0, blocks, 2):
            await served.disk.pwrite(block * 4096, b"x")
        first = (await client.block_status(0, client.size))["base:allocation"]
        assert len(first) == 1024
        assert len(await client.map()) == blocks


@run_async
async def test_block_status_without_context_or_length_is_refused() -> None:
    async with serving() as served:
        async with await served.client(contexts=()) as client:
            with pytest.raises(IOFailure, match="no metadata context"):
                await client.block_status(0, 4096)
        async with await served.client() as client:
            with pytest.raises(IOFailure, match="empty range"):
                await client.block_status(0, 0)


# Refused requests. The connection must stay in step afterwards.


@both_kinds
@pytest.mark.parametrize(
    "command, offset, length, flags, expected",
    [
        pytest.param(Cmd.READ, SIZE, 1, 0, Err.INVAL, id="read-past-end"),
        pytest.param(Cmd.READ, SIZE - 1, 2, 0, Err.INVAL, id="read-across-end"),
        pytest.param(Cmd.READ, 2**64 - 1, 2**32 - 1, 0, Err.INVAL, id="read-overflow"),
        pytest.param(Cmd.READ, 0, protocol.MAX_REQUEST + 1, 0, Err.INVAL, id="read-too-long"),
        pytest.param(Cmd.READ, 0, 1, CmdFlag.NO_HOLE, Err.INVAL, id="read-bad-flag"),
        pytest.param(Cmd.READ, 0, 1, 1 << 15, Err.INVAL, id="read-unknown-flag"),
        pytest.param(Cmd.WRITE, SIZE, 1, 0, Err.NOSPC, id="write-past-end"),
        pytest.param(Cmd.WRITE, SIZE - 1, 70_000, 0, Err.NOSPC, id="write-across-end"),
        pytest.param(Cmd.WRITE, 2**64 - 1, 300_000, 0, Err.NOSPC, id="write-overflow"),
        pytest.param(Cmd.WRITE, 0, 5, CmdFlag.DF, Err.INVAL, id="write-bad-flag"),
        pytest.param(Cmd.WRITE, 0, protocol.MAX_REQUEST + 1, 0, Err.INVAL, id="write-too-long"),
        pytest.param(Cmd.WRITE_ZEROES, SIZE - 1, 2, 0, Err.NOSPC, id="zeroes-across-end"),
        pytest.param(Cmd.WRITE_ZEROES, 0, 2, CmdFlag.DF, Err.INVAL, id="zeroes-bad-flag"),
        pytest.param(Cmd.TRIM, SIZE, 1, 0, Err.INVAL, id="trim-past-end"),
        pytest.param(Cmd.TRIM, 0, 1, CmdFlag.NO_HOLE, Err.INVAL, id="trim-bad-flag"),
        pytest.param(Cmd.CACHE, SIZE, 1, 0, Err.INVAL, id="cache-past-end"),
        pytest.param(Cmd.BLOCK_STATUS, SIZE - 1, 2, 0, Err.INVAL, id="status-across-end"),
        pytest.param(Cmd.FLUSH, 1, 0, 0, Err.INVAL, id="flush-with-offset"),
        pytest.param(Cmd.FLUSH, 0, 1, 0, Err.INVAL, id="flush-with-length"),
        pytest.param(8, 0, 0, 0, Err.INVAL, id="resize"),
        pytest.param(0xFFFF, 0, 0, 0, Err.INVAL, id="unknown-command"),
    ],
)
@run_async
async def test_request_bad_is_refused_and_stream_stays_in_step(
    structured: bool, command: int, offset: int, length: int, flags: int, expected: Err
) -> None:
    async with serving() as served:
        client = await raw_client(served, structured=structured)
        payload = bytes(length) if command == Cmd.WRITE else b""
        await client.wire.send_request(command, 1, offset, length, flags=flags, data=payload)
        reply = await client.wire.reply()
        assert (reply.cookie, reply.error, reply.done) == (1, expected, True)
        assert reply.chunk == (Chunk.ERROR if structured else None)
        await client.wire.send_request(Cmd.READ, 2, 0, 4)
        reply = await client.wire.reply({2: 4})
        assert (reply.cookie, reply.error, reply.data[-4:]) == (2, 0, bytes(4))
        assert [call.op for call in served.disk.calls] == ["pread"]
        await client.disconnect()


@run_async
async def test_read_df_without_structured_replies_is_refused() -> None:
    async with serving() as served, await served.client(structured=False) as client:
        with pytest.raises(IOFailure):
            await client.pread(0, 1, flags=CmdFlag.DF)
        assert await client.pread(0, 1, flags=CmdFlag.FUA) == b"\0"


@run_async
async def test_read_only_export_refuses_changes_with_eperm() -> None:
    async with serving(writable=False) as served, await served.client() as client:
        for change in (client.pwrite(0, b"x" * 100_000), client.write_zeroes(0, 1), client.trim(0, 1)):
            with pytest.raises(IOFailure) as failure:
                await change
            assert failure.value.errno == errno.EPERM
        await client.flush()
        assert await client.pread(0, 4) == bytes(4)
        assert [call.op for call in served.disk.calls] == ["flush", "pread"]


@both_kinds
@pytest.mark.parametrize(
    "error, expected",
    [
        (NoSpace(), errno.ENOSPC),
        (IOFailure(errno=errno.EDQUOT), errno.ENOSPC),
        (IOFailure(errno=errno.EFBIG), errno.ENOSPC),
        (IOFailure(errno=errno.EROFS), errno.EPERM),
        (IOFailure(errno=errno.ENOMEM), errno.ENOMEM),
        (IOFailure(errno=errno.EOVERFLOW), errno.EOVERFLOW),
        (IOFailure(errno=errno.ESHUTDOWN), errno.ESHUTDOWN),
        (IOFailure(errno=errno.EREMOTEIO), errno.EIO),
        (Unsupported(), errno.EINVAL),
        (CorruptImage(), errno.EIO),
        (SnapshotBroken(), errno.EIO),
        (OSError(errno.ENOSPC, "full"), errno.ENOSPC),
        (ZeroDivisionError(), errno.EIO),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, Exception) else str(value),
)
@run_async
async def test_backend_error_is_mapped_and_request_only_fails(
    structured: bool, error: Exception, expected: int
) -> None:
    async with serving() as served, await served.client(structured=structured) as client:
        for op, call in (
            ("pread", lambda: client.pread(0, 100_000)),
            ("pwrite", lambda: client.pwrite(0, bytes(100_000))),
            ("write_zeroes", lambda: client.write_zeroes(0, 1)),
            ("discard", lambda: client.trim(0, 1)),
            ("flush", client.flush),
            ("pread", lambda: client.cache(0, 1)),
        ):
            served.disk.errors = {op: error}
            with pytest.raises(IOFailure) as failure:
                await call()
            assert failure.value.errno == expected
        served.disk.errors = {}
        assert await client.pread(0, 4) == bytes(4)


@run_async
async def test_error_text_hides_names_of_the_host() -> None:
    async with serving() as served, await served.client() as client:
        served.disk.errors["pread"] = IOFailure("cannot read '/secret/path'", node="secret", errno=errno.EIO)
        with pytest.raises(IOFailure) as failure:
            await client.pread(0, 1)
        assert "secret" not in str(failure.value)


# Order, concurrency, bounds.


@run_async
async def test_replies_come_in_order_of_completion() -> None:
    async with serving() as served, await served.client() as client:
        with served.disk.hold("pwrite") as held:
            write = asyncio.create_task(client.pwrite(0, b"slow"))
            await held.arrived()
            assert await client.pread(0, 4) == bytes(4)
            await client.flush()
            assert not write.done()
            held.release()
            await write
        assert await client.pread(0, 4) == b"slow"


@run_async
async def test_many_requests_held_and_released_are_all_answered() -> None:
    async with serving() as served, await served.client() as client:
        with served.disk.hold("pwrite") as held:
            writes = [asyncio.create_task(client.pwrite(n * 512, bytes([n % 256]) * 512)) for n in range(500)]
            await held.arrived(transmission.MAX_REQUESTS)
            assert held.waiting == transmission.MAX_REQUESTS
            held.release()
            await asyncio.gather(*writes)
        assert all(served.disk.data[n * 512 + 511] == n % 256 for n in range(500))


@run_async
async def test_payload_in_flight_is_bounded_and_one_big_request_always_fits() -> None:
    size = protocol.MAX_REQUEST
    async with serving(size=size) as served, await served.client() as client:
        with served.disk.hold("pwrite") as held:
            writes = [asyncio.create_task(client.pwrite(n << 23, bytes([n]) * (8 * MIB))) for n in range(4)]
            await held.arrived(4)
            more = asyncio.create_task(client.pwrite(0, bytes(size)))
            other = await served.client()
            assert await other.pread(0, 4) == bytes(4)  # others go on
            assert held.waiting == 4
            held.release()
            await asyncio.gather(*writes, more)
            await other.disconnect()
        assert served.disk.calls[-1].length == size


@both_kinds
@run_async
async def test_client_that_does_not_read_stops_only_itself(structured: bool) -> None:
    requests = 400
    async with serving(size=2 * MIB) as served:
        served.disk.data[:] = os.urandom(MIB) * 2
        lazy = await raw_client(served, structured=structured)
        for number in range(requests):
            await lazy.wire.send_request(Cmd.READ, number, number, MIB, flags=0)
        other = await served.client()
        while len(served.disk.calls) < 30:
            await other.pread(0, 1)
        begun = sum(call.length == MIB for call in served.disk.calls)
        for _ in range(100):
            await other.pread(0, 1)
        # What was begun for it fits into its limit and the socket's buffers.
        limit = (transmission.MAX_BYTES // MIB) + 16
        assert begun <= sum(call.length == MIB for call in served.disk.calls) <= limit
        sizes = dict.fromkeys(range(requests), MIB)
        for number in range(requests):
            reply = await lazy.wire.reply(sizes)
            assert reply.cookie == number
            assert reply.data[-MIB:] == served.disk.data[number : number + MIB]
        await other.disconnect()
        await lazy.disconnect()


@run_async
async def test_many_connections_are_served_together() -> None:
    async with serving() as served:
        clients = await asyncio.gather(*(served.client() for _ in range(200)))

        async def work(number: int, client: NbdClient) -> None:
            data = number.to_bytes(2) * 1024
            await client.pwrite(number * 2048, data)
            await client.flush()
            assert await client.pread(number * 2048, 2048) == data

        await asyncio.gather(*(work(*item) for item in enumerate(clients)))
        assert served.server.connections == 200
        await asyncio.gather(*(client.disconnect() for client in clients))
        await served.idle()


@run_async
async def test_disc_outstanding_requests_are_answered_first() -> None:
    async with serving() as served:
        client = await served.client()
        with served.disk.hold("pwrite") as held:
            write = asyncio.create_task(client.pwrite(0, b"late"))
            await held.arrived()
            leaving = asyncio.create_task(client.disconnect())
            await client.wire.send()  # drained: the server may see DISC
            assert not leaving.done()
            held.release()
            await write
            await leaving
        assert served.disk.data[:4] == b"late"
        await served.idle()


# Clients that go wrong.


@pytest.mark.parametrize(
    "sent",
    [
        pytest.param(b"\0" * 28, id="wrong-magic"),
        pytest.param(protocol.SIMPLE_REPLY.pack(protocol.SIMPLE_REPLY_MAGIC, 0, 0) + bytes(12), id="a-reply"),
        pytest.param(protocol.REQUEST.pack(protocol.REQUEST_MAGIC, 0, 1, 9, 0, 2**32 - 1), id="write-of-4-gib"),
    ],
)
@run_async
async def test_garbage_ends_that_connection_only(sent: bytes, caplog: pytest.LogCaptureFixture) -> None:
    async with serving() as served, await served.client() as bystander:
        client = await raw_client(served)
        await client.wire.send(sent)
        assert await client.wire.closed_by_server()
        await client.wire.close()
        while served.server.connections > 1:
            await bystander.pread(0, 1)
        assert "NBD export 'disk', client pid" in caplog.text
        assert await bystander.pread(0, 4) == bytes(4)
        assert served.server.connections == 1


@pytest.mark.parametrize("received", [0, 10, 27, 28, 1000, 99_999])
@run_async
async def test_client_dies_in_a_request_nothing_is_written(received: int) -> None:
    async with serving() as served, await served.client() as bystander:
        client = await raw_client(served)
        request = protocol.REQUEST.pack(protocol.REQUEST_MAGIC, 0, 1, 9, 0, 100_000) + b"x" * 100_000
        await client.wire.send(request[:received])
        await client.wire.close()
        while served.server.connections > 1:
            await bystander.pread(0, 1)
        assert all(call.op == "pread" for call in served.disk.calls)


@run_async
async def test_client_dies_with_requests_in_flight_they_end() -> None:
    async with serving() as served:
        client = await served.client()
        with served.disk.hold("pwrite") as held:
            tasks = [asyncio.create_task(client.pwrite(n, b"x")) for n in range(5)]
            await held.arrived(5)
            await client.abort()
            results = await asyncio.gather(*tasks, return_exceptions=True)
            assert all(isinstance(result, ConnectionError) for result in results)
            async with await served.client() as other:
                await other.flush()
            held.release()
        await served.idle()
        assert served.disk.data[:5] == b"xxxxx"


@run_async
async def test_client_half_closes_and_still_gets_replies() -> None:
    async with serving() as served:
        client = await raw_client(served)
        await client.wire.send_request(Cmd.READ, 1, 0, 4)
        client.wire.writer.write_eof()
        reply = await client.wire.reply()
        assert reply.data[8:] == bytes(4)
        assert await client.wire.closed_by_server()
        await client.wire.close()


@run_async
async def test_header_arriving_byte_by_byte_is_understood() -> None:
    async with serving() as served:
        client = await raw_client(served)
        stream = protocol.REQUEST.pack(protocol.REQUEST_MAGIC, 0, Cmd.WRITE, 3, 8, 5) + b"hello"
        sock: Any = client.wire.writer.get_extra_info("socket")
        assert sock is not None
        for position in range(len(stream)):
            await client.wire.send(stream[position : position + 1])
            await asyncio.sleep(0)
        assert (await client.wire.reply()).cookie == 3
        assert served.disk.data[8:13] == b"hello"
        await client.disconnect()

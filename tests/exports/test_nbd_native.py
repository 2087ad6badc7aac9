# SPDX-FileCopyrightText: blockgraph contributors
# SPDX-License-Identifier: MIT
"""What native threads serve without Python: what, with which bytes, and that nothing else changes by it.

The same rules without anything mapped are tested in test_nbd_transmission.py.
"""

from __future__ import annotations

import asyncio
import errno
import os
import signal
import subprocess
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from blockgraph.errors import IOFailure
from blockgraph.exports.nbd import protocol, transmission
from blockgraph.exports.nbd.protocol import Chunk, Cmd, CmdFlag, Err
from blockgraph.flags import Flag
from blockgraph.native import MapExtent, Zeroing, nbd_loop
from blockgraph.testing.memory_backend import Call
from blockgraph.testing.nbd_client import NbdClient
from tests.helpers.mapped_disk import MappedDisk
from tests.helpers.nbd import Served, raw_client, run_async, serving

MIB = 1 << 20
SIZE = 4 * MIB
both_kinds = pytest.mark.parametrize("structured", [True, False], ids=["structured", "simple"])


@asynccontextmanager
async def serving_mapped(size: int = SIZE, **server_args: Any) -> AsyncIterator[tuple[Served, MappedDisk]]:
    disk = MappedDisk(size)
    async with serving(disk, **{"threads": 2, **server_args}) as served:
        yield served, disk
    disk.close()


def test_limits_are_those_of_the_python_transmission() -> None:
    assert (nbd_loop.MAX_REQUESTS, nbd_loop.MAX_BYTES) == (transmission.MAX_REQUESTS, transmission.MAX_BYTES)


# Hits and faults.


@both_kinds
@pytest.mark.parametrize("length", [1, 511, 4096, 65536, 300_000, MIB])
@run_async
async def test_mapped_read_and_write_never_reach_the_backend(structured: bool, length: int) -> None:
    async with serving_mapped() as (served, disk), await served.client(structured=structured) as client:
        disk.reveal()
        data = os.urandom(length)
        await client.pwrite(7, data)
        assert disk.data[7 : 7 + length] == data
        assert await client.pread(7, length) == data
        assert not any(disk.data[:7])
        assert not any(disk.data[7 + length :])
        assert disk.calls == []
        found = served.stats()
        assert (found.requests, found.hits, found.faults) == (2, 2, 0)


@run_async
async def test_mapped_only_in_part_whole_request_faults() -> None:
    async with serving_mapped() as (served, disk), await served.client() as client:
        disk.reveal(0, MIB)
        disk.data[:] = b"x" * SIZE
        assert await client.pread(MIB - 10, 20) == b"x" * 20
        await client.pwrite(MIB - 10, b"y" * 20)
        assert await client.pread(MIB - 10, 10) == b"y" * 10
        assert [(call.op, call.length) for call in disk.calls] == [("pread", 20), ("pwrite", 20)]
        assert (served.stats().hits, served.stats().faults) == (1, 2)


@run_async
async def test_mapped_not_writable_write_faults() -> None:
    async with serving_mapped() as (served, disk), await served.client() as client:
        disk.reveal(writable=False)
        await client.pwrite(5, b"abc")
        assert await client.pread(4, 5) == b"\0abc\0"
        assert disk.calls == [Call("pwrite", 5, 3, Flag.NONE)]


@run_async
async def test_mapped_commands_for_which_nothing_was_declared_reach_the_backend() -> None:
    async with serving_mapped() as (served, disk), await served.client() as client:
        disk.reveal()
        await client.pwrite(0, b"abc", fua=True)
        await client.flush()
        await client.trim(4096, 4096)
        await client.write_zeroes(8192, 4096)
        await client.block_status(0, 8192)
        ops = [call.op for call in disk.calls]
        assert ops[:5] == ["pwrite", "flush", "discard", "write_zeroes", "block_status"]
        assert disk.calls[0].flags == Flag.FUA
        assert served.stats().hits == 0


@both_kinds
@run_async
async def test_mapped_flush_fua_trim_and_zeroes_are_native(structured: bool) -> None:
    async with serving_mapped() as (served, disk), await served.client(structured=structured) as client:
        disk.reveal()
        disk.extents.set_zeroing(disk.slot, Zeroing.PUNCH)
        disk.extents.flushed(disk.extents.dirt())
        disk.data[:] = b"x" * SIZE
        await client.flush()
        assert (served.stats().hits, served.stats().blocked) == (1, 0)  # nothing to do
        await client.pwrite(5, b"abc", fua=True)
        assert not disk.extents.take_written(disk.slot)
        await client.pwrite(9, b"d" * 100_000)
        assert disk.extents.take_written(disk.slot)
        disk.extents.flushed(disk.extents.dirt())
        await client.pwrite(9, b"e" * 100_000)
        await client.flush()
        assert not disk.extents.take_written(disk.slot)
        await client.trim(MIB, 5, fua=True)
        await client.write_zeroes(MIB + 10, 3 * MIB - 10)
        await client.write_zeroes(20, 2, flags=CmdFlag.FUA | CmdFlag.FAST_ZERO)
        expected = bytearray(b"x" * SIZE)
        expected[5:8], expected[9:100_009] = b"abc", b"e" * 100_000
        expected[20:22], expected[MIB : MIB + 5], expected[MIB + 10 :] = bytes(2), bytes(5), bytes(3 * MIB - 10)
        assert disk.data[:] == expected
        assert disk.calls == []
        assert (served.stats().hits, served.stats().faults) == (8, 0)


@run_async
async def test_mapped_zeroes_that_need_their_space_are_not_punched() -> None:
    async with serving_mapped() as (served, disk), await served.client() as client:
        disk.reveal()
        disk.extents.set_zeroing(disk.slot, Zeroing.PUNCH)
        await client.write_zeroes(0, MIB, flags=CmdFlag.NO_HOLE)
        disk.extents.set_zeroing(disk.slot, Zeroing.ZERO_RANGE)
        await client.write_zeroes(0, MIB, flags=CmdFlag.NO_HOLE)  # not on tmpfs
        await client.trim(0, MIB)
        assert [(call.op, call.flags) for call in disk.calls] == [
            ("write_zeroes", Flag.NONE),
            ("write_zeroes", Flag.NONE),
            ("discard", Flag.NONE),
        ]
        assert served.stats().hits == 0


@run_async
async def test_mapped_flush_that_fails_is_pythons_to_tell() -> None:
    async with serving_mapped() as (served, disk), await served.client() as client:
        reading, writing = os.pipe()
        slot = disk.extents.add_slot(writing)
        disk.extents.insert(disk.extents.generation(), [MapExtent(0, SIZE, slot, 0, writable=True)])
        disk.extents.flushed(disk.extents.dirt())
        await client.pwrite(0, b"x", fua=True)  # a pipe can not be written at an offset
        assert [call.op for call in disk.calls] == ["pwrite"]
        await client.flush()
        assert [call.op for call in disk.calls] == ["pwrite", "flush"]
        assert disk.extents.take_flush_error(slot) == errno.EINVAL
        await disk.extents.remove_slot(slot)
        os.close(reading)
        os.close(writing)


@run_async
async def test_mapped_cache_is_native() -> None:
    async with serving_mapped() as (served, disk), await served.client() as client:
        disk.reveal()
        await client.cache(5, 3 * MIB)
        assert disk.calls == []
        assert served.stats().blocked == 1
        await disk.extents.invalidate(3 * MIB, 1)
        await client.cache(5, 3 * MIB)
        assert [call.length for call in disk.calls] == [MIB, MIB, MIB]


@run_async
async def test_mapped_zero_is_read_as_hole_and_not_written_through() -> None:
    async with serving_mapped() as (served, disk):
        disk.data[:] = b"x" * SIZE
        disk.reveal(zero=True)
        client = await served.client()
        assert client._task is not None
        client._task.cancel()
        await asyncio.wait([client._task])
        await client.wire.send_request(Cmd.READ, 1, 4096, 65536)
        reply = await client.wire.reply()
        assert (reply.chunk, reply.done, reply.data) == (
            Chunk.OFFSET_HOLE,
            True,
            (4096).to_bytes(8) + (65536).to_bytes(4),
        )
        await client.wire.send_request(Cmd.READ, 2, 4096, 65536, flags=CmdFlag.DF)
        reply = await client.wire.reply()
        assert (reply.chunk, reply.data) == (Chunk.OFFSET_DATA, (4096).to_bytes(8) + bytes(65536))
        assert disk.calls == []
        await client.wire.send_request(Cmd.WRITE, 3, 4096, 5, data=b"hello")
        assert (await client.wire.reply()).error == 0
        assert disk.data[4096:4101] == b"hello"
        assert [call.op for call in disk.calls] == ["pwrite"]
        await client.disconnect()


@run_async
async def test_mapped_storage_that_fails_is_asked_again_through_python() -> None:
    async with serving_mapped() as (served, disk), await served.client() as client:
        read_only = os.open(f"/proc/self/fd/{disk._fd}", os.O_RDONLY)
        slot = disk.extents.add_slot(read_only)
        disk.slot, slot = slot, disk.slot
        disk.reveal()
        disk.slot, slot = slot, disk.slot
        await client.pwrite(3, b"abc")  # EBADF natively
        assert await client.pread(3, 3) == b"abc"
        assert [call.op for call in disk.calls] == ["pwrite"]
        await disk.extents.remove_slot(slot)
        os.close(read_only)


@run_async
async def test_read_only_export_mapped_writable_refuses_changes() -> None:
    async with serving_mapped(writable=False) as (served, disk), await served.client() as client:
        disk.reveal()
        with pytest.raises(IOFailure):
            await client.pwrite(0, b"x" * 100_000)
        assert await client.pread(0, 4) == bytes(4)
        assert disk.calls == []


# Order, concurrency, bounds.


@run_async
async def test_hits_overtake_faults_of_the_same_connection() -> None:
    async with serving_mapped() as (served, disk), await served.client() as client:
        disk.reveal(0, MIB)
        with disk.hold("pwrite") as held:
            writes = [asyncio.create_task(client.pwrite(MIB + n, b"x")) for n in range(50)]
            await held.arrived(50)
            assert await client.pread(0, 4) == bytes(4)
            await client.pwrite(0, b"fast")
            assert not any(write.done() for write in writes)
            held.release()
            await asyncio.gather(*writes)
        assert disk.data[MIB : MIB + 50] == b"x" * 50


@both_kinds
@run_async
async def test_client_that_does_not_read_stops_only_itself_natively(structured: bool) -> None:
    requests = 400
    async with serving_mapped(threads=1) as (served, disk):
        disk.data[:] = os.urandom(MIB) * 4
        disk.reveal()
        lazy = await served.client(structured=structured)
        assert lazy._task is not None
        lazy._task.cancel()
        await asyncio.wait([lazy._task])
        for number in range(requests):
            await lazy.wire.send_request(Cmd.READ, number, number, MIB, flags=0)
        other = await served.client()
        started = 0
        while served.stats().requests - started < 30:
            await other.pread(0, 1)
            started += 1
        others = 0
        for _ in range(100):
            await other.pread(0, 1)
            others += 1
        # What was taken for it fits into its limit and the socket's buffers.
        assert served.stats().requests - others <= transmission.MAX_BYTES // MIB + 16 + started
        sizes = dict.fromkeys(range(requests), MIB)
        seen = set()
        for _ in range(requests):
            reply = await lazy.wire.reply(sizes)
            seen.add(reply.cookie)
            assert reply.data[-MIB:] == disk.data[reply.cookie : reply.cookie + MIB]
        assert seen == set(range(requests))
        assert disk.calls == []
        await other.disconnect()
        await lazy.disconnect()


@run_async
async def test_many_requests_at_once_leave_in_few_system_calls() -> None:
    requests = 2000
    async with serving_mapped(threads=1) as (served, disk):
        disk.reveal()
        client = await served.client()
        assert client._task is not None
        client._task.cancel()
        await asyncio.wait([client._task])
        one = b"".join(
            protocol.REQUEST.pack(protocol.REQUEST_MAGIC, 0, Cmd.WRITE, number, number * 512, 512) + b"z" * 512
            for number in range(requests)
        )
        before = served.stats()
        await client.wire.send(one)
        for number in range(requests):
            assert (await client.wire.reply()).cookie == number
        after = served.stats()
        assert after.hits - before.hits == requests
        assert after.receives - before.receives < requests / 4
        assert after.sends - before.sends < requests / 4
        await client.disconnect()


@pytest.mark.parametrize("command, sends", [(Cmd.WRITE, 2), (Cmd.READ, 1)], ids=["writes", "reads"])
@run_async
async def test_many_writes_are_answered_by_parts_while_the_rest_is_done(command: Cmd, sends: int) -> None:
    async with serving_mapped(threads=1) as (served, disk):
        disk.reveal()
        client = await raw_client(served)
        payload = b"z" * 512 if command is Cmd.WRITE else b""
        one = b"".join(
            protocol.REQUEST.pack(protocol.REQUEST_MAGIC, 0, command, number, number * 512, 512) + payload
            for number in range(16)
        )
        before = served.stats()
        await client.wire.send(one)
        for number in range(16):
            assert (await client.wire.reply({number: 512} if command is Cmd.READ else None)).cookie == number
        after = await served.counted(sends=before.sends + sends)
        assert after.receives - before.receives == 1
        assert after.sends - before.sends == sends
        await client.disconnect()


@run_async
async def test_connections_200_mapped_are_served_together() -> None:
    async with serving_mapped() as (served, disk):
        disk.reveal()
        clients = await asyncio.gather(*(served.client() for _ in range(200)))

        async def work(number: int, client: NbdClient) -> None:
            data = number.to_bytes(2) * 1024
            await asyncio.gather(*(client.pwrite(number * 16384 + part * 2048, data) for part in range(8)))
            assert await client.pread(number * 16384, 16384) == data * 8

        await asyncio.gather(*(work(*item) for item in enumerate(clients)))
        assert served.server.connections == 200
        assert (disk.calls, (await served.counted(hits=200 * 9)).hits) == ([], 200 * 9)
        await asyncio.gather(*(client.disconnect() for client in clients))
        await served.idle()


# Clients that go wrong.

KILLED = """
import socket, struct, sys
path, first = sys.argv[1], int(sys.argv[2])
sock = socket.socket(socket.AF_UNIX)
sock.connect(path)
def take(length):
    assert len(sock.recv(length, socket.MSG_WAITALL)) == length
take(18)
sock.sendall(struct.pack(">I", 3))
sock.sendall(b"IHAVEOPT" + struct.pack(">II", 1, 4) + b"disk")
take(10)
print("ready", flush=True)
number = 0
while True:
    number += 1
    for block in range(4):
        head = struct.pack(">IHHQQI", 0x25609513, 0, 1, number, first + block * 65536, 65536)
        sock.sendall(head + bytes([number % 255 + 1]) * 65536)
    take(4 * 16)
"""


@pytest.mark.parametrize("mapped", [True, False], ids=["hits", "faults"])
@run_async
async def test_clients_killed_in_the_middle_of_writes_leave_whole_writes(mapped: bool) -> None:
    async with serving_mapped() as (served, disk), await served.client() as bystander:
        if mapped:
            disk.reveal()
        for _ in range(3):
            processes = []
            before = served.stats().requests
            for number in range(4):
                process = await asyncio.create_subprocess_exec(
                    sys.executable, "-c", KILLED, served.path, str(number * 4 * 65536), stdout=subprocess.PIPE
                )
                assert process.stdout is not None
                await process.stdout.readline()
                processes.append(process)
            while served.stats().requests < before + 200:
                await bystander.pread(0, 1)
            for process in processes:
                process.send_signal(signal.SIGKILL)
                await process.wait()
            while served.server.connections > 1:
                await bystander.pread(0, 1)
        for block in range(16):
            data = disk.data[block * 65536 : (block + 1) * 65536]
            assert data.count(data[:1]) == 65536


@pytest.mark.parametrize("received", [0, 10, 27, 28, 1000, 99_999])
@run_async
async def test_client_dies_in_a_request_nothing_is_written_natively(received: int) -> None:
    async with serving_mapped() as (served, disk), await served.client() as bystander:
        disk.reveal()
        client = await served.client()
        request = protocol.REQUEST.pack(protocol.REQUEST_MAGIC, 0, 1, 9, 0, 100_000) + b"x" * 100_000
        await client.wire.send(request[:received])
        await client.abort()
        while served.server.connections > 1:
            await bystander.pread(0, 1)
        assert not any(disk.data[:])


@run_async
async def test_payload_of_a_failed_request_is_not_used_again_while_something_holds_it() -> None:
    async with serving() as served, await served.client() as client:
        kept: list[memoryview] = []

        async def fail(offset: int, buf: memoryview) -> None:
            kept.append(buf)
            raise IOFailure(errno=5)

        working = served.disk.pread_into
        served.disk.pread_into = fail  # type: ignore[method-assign]
        for _ in range(20):
            with pytest.raises(IOFailure):
                await client.pread(0, 4096)
        served.disk.pread_into = working  # type: ignore[method-assign]

        async def late(offset: int, buf: memoryview) -> None:
            await working(offset, buf)
            for view in kept:
                view[:] = b"!" * len(view)

        served.disk.pread_into = late  # type: ignore[method-assign]
        for _ in range(50):
            assert await client.pread(0, 4096) == bytes(4096)
        kept.clear()


# The end.


@run_async
async def test_close_while_hits_go_on_ends_every_connection() -> None:
    async with serving_mapped() as (served, disk):
        disk.reveal()
        clients = [await served.client() for _ in range(6)]

        async def work(client: NbdClient) -> int:
            done = 0
            try:
                while True:
                    await asyncio.gather(*(client.pread(part * 4096, 4096) for part in range(8)))
                    done += 1
            except (IOFailure, OSError):
                return done

        tasks = [asyncio.create_task(work(client)) for client in clients]
        while served.stats().hits < 500:  # noqa: ASYNC110  # the counter announces it to nobody
            await asyncio.sleep(0)
        await served.server.close()
        assert all(done > 0 for done in await asyncio.gather(*tasks))
        assert served.server.connections == 0
        await asyncio.gather(*(client.abort() for client in clients))


@run_async
async def test_invalidate_waits_for_nobody_that_came_later() -> None:
    async with serving_mapped() as (served, disk), await served.client() as client:
        disk.reveal()
        reading = True

        async def read() -> None:
            while reading:
                await asyncio.gather(*(client.pread(0, 65536) for _ in range(8)))

        task = asyncio.create_task(read())
        for _ in range(50):
            await disk.extents.invalidate(0, SIZE)
            disk.reveal()
        reading = False
        await task


# Any requests over any map.

ranges = st.tuples(st.integers(0, 63), st.integers(1, 24)).map(
    lambda pair: (pair[0] * 1021, min(pair[1] * 1500, 65536 - pair[0] * 1021))
)
steps = st.one_of(
    st.tuples(st.just("read"), ranges, st.just(0)),
    st.tuples(st.just("write"), ranges, st.integers(1, 255)),
    st.tuples(st.just("fua"), ranges, st.integers(1, 255)),
    st.tuples(st.sampled_from(["zero", "trim", "flush"]), ranges, st.just(0)),
    st.tuples(st.just("reveal"), ranges, st.integers(0, 1)),
    st.tuples(st.just("invalidate"), ranges, st.just(0)),
    st.tuples(st.just("bad"), ranges, st.just(0)),
)


@settings(max_examples=60, deadline=None)
@given(plan=st.lists(steps, max_size=40), structured=st.booleans())
def test_any_requests_over_any_map_read_what_was_written(
    plan: list[tuple[str, tuple[int, int], int]], structured: bool
) -> None:
    @run_async
    async def run() -> None:
        model = bytearray(65536)
        async with (
            serving_mapped(65536, threads=1) as (served, disk),
            await served.client(structured=structured) as client,
        ):
            disk.extents.set_zeroing(disk.slot, Zeroing.PUNCH)
            for what, (offset, length), value in plan:
                part = slice(offset, offset + length)
                match what:
                    case "read":
                        assert await client.pread(offset, length) == model[part]
                    case "write" | "fua":
                        model[part] = bytes([value]) * length
                        await client.pwrite(offset, bytes(model[part]), fua=what == "fua")
                    case "zero" | "trim":
                        model[part] = bytes(length)
                        await (client.trim if what == "trim" else client.write_zeroes)(offset, length)
                    case "flush":
                        await client.flush()
                        disk.extents.flushed(disk.extents.dirt())
                    case "reveal":
                        disk.reveal(offset, length, writable=bool(value))
                    case "invalidate":
                        await disk.extents.invalidate(offset, length)
                    case "bad":
                        with pytest.raises(IOFailure) as failure:
                            await client.pwrite(65536 - length + 1, bytes(length))
                        assert failure.value.errno == Err.NOSPC
            assert disk.data[:] == model

    run()

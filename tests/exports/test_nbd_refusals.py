# SPDX-FileCopyrightText: blockgraph contributors
# SPDX-License-Identifier: MIT
"""What the protocol forbids is answered by native code as Python's `check` says, and Python does not hear of it."""

from __future__ import annotations

import asyncio
import errno
import os
import socket
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any, NamedTuple, cast

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from blockgraph.errors import IOFailure, NoSpace
from blockgraph.exports.nbd import protocol, transmission
from blockgraph.exports.nbd.export import Negotiated
from blockgraph.exports.nbd.protocol import Cmd, Err
from blockgraph.exports.nbd.requests import check
from blockgraph.native import ExtentMap, MapExtent
from blockgraph.native.nbd_loop import NbdLoop
from blockgraph.testing.nbd_client import Reply
from tests.helpers.mapped_disk import MappedDisk
from tests.helpers.nbd import SIZE, raw_client, run_async, run_tool, serving

LIMIT = protocol.MAX_REQUEST


class Sent(NamedTuple):
    """A request on the wire."""

    command: int
    flags: int
    offset: int
    length: int

    def pack(self, cookie: int) -> bytes:
        head = protocol.REQUEST.pack(protocol.REQUEST_MAGIC, self.flags, self.command, cookie, self.offset, self.length)
        return head + (b"?" * self.length if self.command == Cmd.WRITE else b"")


def negotiated(*, structured: bool, writable: bool, contexts: bool) -> Negotiated:
    """As far as `check` looks at it."""
    export = SimpleNamespace(writable=writable)
    found = SimpleNamespace(export=export, size=SIZE, structured=structured, contexts={1: None} if contexts else {})
    return cast("Negotiated", found)


offsets = st.one_of(
    st.sampled_from([0, 1, 4095, SIZE - 4096, SIZE - 1, SIZE, SIZE + 1, 2**63, 2**64 - 1]), st.integers(0, SIZE)
)
lengths = st.one_of(st.sampled_from([0, 1, 4096, LIMIT, LIMIT + 1, 2**32 - 1]), st.integers(0, SIZE))
flag_bits = st.one_of(st.just(0), st.sampled_from([1 << bit for bit in range(16)]), st.integers(0, 31))
sent = st.one_of(
    st.builds(Sent, st.sampled_from([c for c in Cmd if c not in (Cmd.DISC, Cmd.WRITE)]), flag_bits, offsets, lengths),
    st.builds(Sent, st.just(Cmd.WRITE), flag_bits, offsets, st.integers(0, 9000)),
    st.builds(Sent, st.integers(8, 65535), flag_bits, offsets, lengths),
)


@settings(max_examples=80, deadline=None)
@given(
    plan=st.lists(sent, min_size=1, max_size=40),
    structured=st.booleans(),
    writable=st.booleans(),
    contexts=st.booleans(),
)
def test_any_requests_are_refused_as_python_would(
    plan: list[Sent], structured: bool, writable: bool, contexts: bool
) -> None:
    @run_async
    async def run() -> None:
        how = negotiated(structured=structured, writable=writable, contexts=structured and contexts)
        refusals = [check(how, s.command, s.flags, s.offset, s.length) for s in plan]
        async with serving(writable=writable) as served:
            names = ("base:allocation",) if contexts else ()
            client = await raw_client(served, structured=structured, contexts=names)
            await client.wire.send(b"".join(request.pack(cookie) for cookie, request in enumerate(plan)))
            sizes = {cookie: request.length for cookie, request in enumerate(plan) if request.command == Cmd.READ}
            last: dict[int, Reply] = {}
            while len(last) < len(plan):
                reply = await client.wire.reply(sizes)
                if reply.done:
                    last[reply.cookie] = reply
            for cookie, refusal in enumerate(refusals):
                assert last[cookie].error == (refusal.error if refusal else 0)
                if refusal and structured:
                    assert last[cookie].data[6:].decode() == refusal.reason
            found = served.stats()
            refused = sum(refusal is not None for refusal in refusals)
            assert (found.refused, found.faults) == (refused, len(plan) - refused)
            await client.disconnect()

    run()


@pytest.mark.parametrize("structured", [True, False], ids=["structured", "simple"])
@run_async
async def test_many_refused_at_once_never_wake_python(structured: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    async with serving() as served:
        client = await raw_client(served, structured=structured)

        def forbidden(*args: Any) -> None:
            raise AssertionError("Python was asked")

        with monkeypatch.context() as patch:
            patch.setattr(NbdLoop, "_collect", forbidden)
            batch = b"".join(
                Sent(number % 9 if number % 9 != Cmd.DISC else Cmd.WRITE, 0, SIZE, 1 + number).pack(number)
                for number in range(500)
            )
            sending = asyncio.create_task(client.wire.send(batch))
            replies = [await client.wire.reply() for _ in range(500)]
            await sending
        assert [reply.cookie for reply in replies] == list(range(500))
        assert {reply.error for reply in replies} == {Err.INVAL, Err.NOSPC}
        assert (served.stats().refused, served.stats().faults, served.disk.calls) == (500, 0, [])
        await client.disconnect()


@pytest.mark.parametrize("length", [1, 4096, 200_000, LIMIT + 1, 64 << 20], ids=lambda length: f"{length}-bytes")
@pytest.mark.parametrize("writable", [True, False], ids=["past-end", "read-only"])
@run_async
async def test_payload_of_a_refused_write_is_skipped_in_bounded_memory(length: int, writable: bool) -> None:
    async with serving(writable=writable) as served:
        client = await raw_client(served)
        for cookie in (1, 3):
            # What looks like a request inside of the payload is none.
            evil = Sent(Cmd.READ, 0, 0, 1).pack(99) * (length // 28 + 1)
            offset = SIZE if writable else 0
            await client.wire.send_request(Cmd.WRITE, cookie, offset, length, data=evil[:length])
            await client.wire.send_request(Cmd.READ, cookie + 1, 0, 4)
            refused, read = await client.wire.reply(), await client.wire.reply()
            expected = Err.PERM if not writable else Err.INVAL if length > LIMIT else Err.NOSPC
            assert (refused.cookie, refused.error) == (cookie, expected)
            assert (read.cookie, read.error, read.data[-4:]) == (cookie + 1, 0, bytes(4))
        assert [call.op for call in served.disk.calls] == ["pread"] * 2
        assert (served.stats().requests, served.stats().refused) == (4, 2)
        await client.disconnect()


@run_async
async def test_client_that_reads_no_errors_is_not_read_from_any_more() -> None:
    head = len(protocol.CHUNK_ERROR.pack(0, 0, 0, 0, 0, 0, 0)) + len("unknown command 9999")
    async with serving() as served:
        lazy = await raw_client(served)
        sock = socket.socket(fileno=os.dup(lazy.wire.writer.get_extra_info("socket").fileno()))
        sock.setblocking(False)
        batch, sent_bytes = Sent(9999, 0, 0, 0).pack(7) * 1000, 0
        lazy.wire.writer.transport.pause_reading()  # type: ignore[attr-defined]
        in_flight = vain = 0
        async with await served.client() as other:
            while not in_flight or vain < 50:
                assert sent_bytes < 64 << 20, "the server takes whatever comes"
                try:
                    sent_bytes += sock.send(batch[sent_bytes % 28 :])
                    vain = 0
                except BlockingIOError:
                    vain += 1
                await other.block_status(0, 1)
                found = served.stats()
                # What is not in the socket's buffers is in flight. A block status is answered with 32 bytes.
                in_flight = found.refused - (found.sent - 32 * found.faults) // head
        sock.close()
        assert in_flight <= transmission.MAX_REQUESTS
        assert found.refused < sent_bytes // 28
        await lazy.abort()


@run_async
async def test_refused_after_shutdown_without_python() -> None:
    async with serving() as served:
        client = await raw_client(served)
        with served.disk.hold("pread") as held:
            await client.wire.send_request(Cmd.READ, 1, 0, 4)
            await held.arrived()
            (connection,) = served.server._connections
            assert connection._transmission is not None
            connection._transmission.shutdown()
            before = served.stats().faults
            await client.wire.send_request(Cmd.WRITE, 2, 0, 4, data=b"late")
            reply = await client.wire.reply()
            assert (reply.cookie, reply.error, reply.data[6:]) == (2, Err.SHUTDOWN, b"the server is being shut down")
            assert (served.stats().faults, served.stats().refused) == (before, 1)
            held.release()
            assert (await client.wire.reply()).cookie == 1
        assert await client.wire.closed_by_server()
        assert bytes(served.disk.data[:4]) == bytes(4)
        await client.disconnect()


@pytest.mark.parametrize("structured", [True, False], ids=["structured", "simple"])
@pytest.mark.parametrize(
    "error, expected", [(NoSpace(), errno.ENOSPC), (IOFailure(errno=errno.EIO), errno.EIO)], ids=["ENOSPC", "EIO"]
)
@run_async
async def test_hit_that_fails_is_python_s_to_try_and_to_tell(structured: bool, error: IOFailure, expected: int) -> None:
    """Storage knows more ways than native code does, and a failure is counted, logged and answered in one place."""
    disk = MappedDisk(SIZE)
    async with serving(disk) as served, await served.client(structured=structured) as client:
        reading, writing = os.pipe()  # neither can be used at an offset
        extents: ExtentMap = disk.extents
        slot = extents.add_slot(writing)
        extents.insert(extents.generation(), [MapExtent(0, SIZE, slot, 0, writable=True)])
        disk.errors = {"pread": error, "pwrite": error}
        for call in (client.pread(0, 100_000), client.pwrite(0, bytes(100_000)), client.cache(5, 7)):
            with pytest.raises(IOFailure) as failure:
                await call
            assert failure.value.errno == expected
        assert [call.op for call in disk.calls] == ["pread", "pwrite", "pread"]
        assert (served.stats().hits, served.stats().faults, served.stats().refused) == (0, 3, 0)
        disk.errors = {}
        assert await client.pread(0, 4) == bytes(4)
        await extents.remove_slot(slot)
        os.close(reading)
        os.close(writing)
    disk.close()


@run_async
async def test_unaligned_to_the_minimum_block_size_is_served() -> None:
    """The sizes that clients are told are advice; see BlockSizes."""
    async with serving() as served:
        served.disk.node.driver.request_alignment = 512
        async with await served.client() as client:
            assert client.block_sizes is not None
            assert client.block_sizes[0] == 512
            await client.pwrite(3, b"abc")
            assert await client.pread(2, 5) == b"\0abc\0"
        assert served.stats().refused == 0


@run_async
async def test_qemu_io_goes_on_behind_what_was_refused(require_tool: Callable[[str], str]) -> None:
    qemu_io = require_tool("qemu-io")
    async with serving(writable=False) as served:
        commands = ["read -P 0 0 64k", "discard 0 64k", "write -z 0 64k", "write 0 1M", "read -P 0 0 1M"]
        args = [part for command in commands for part in ("-c", command)]
        output = await run_tool(qemu_io, "-f", "raw", "-r", *args, served.uri(), ok=False)
        assert output.count("read 65536/65536") == 1
        assert output.count("read 1048576/1048576") == 1
        assert served.disk.data == bytes(SIZE)

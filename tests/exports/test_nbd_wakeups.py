# SPDX-FileCopyrightText: blockgraph contributors
# SPDX-License-Identifier: MIT
"""Faults come to Python in bulk: what was queued before the event loop runs costs it one wake-up, not one for each.

The clients send while the event loop stands still, and it stands still until the native threads have taken everything;
so what is counted does not depend on who is fast.
"""

from __future__ import annotations

import os
import socket
from typing import Any

import pytest

from blockgraph.exports.nbd import protocol
from blockgraph.exports.nbd.native_transmission import NativeTransmission
from blockgraph.exports.nbd.protocol import Cmd
from blockgraph.native import nbd_loop
from blockgraph.native.nbd_loop import NbdLoop
from blockgraph.testing.nbd_client import NbdClient
from tests.helpers import nbd
from tests.helpers.nbd import raw_client, run_async, serving

#: Faults handed out at one wake-up, at most.
TAKEN = nbd_loop._TAKE
COMMANDS = [Cmd.READ, Cmd.WRITE, Cmd.TRIM, Cmd.FLUSH, Cmd.BLOCK_STATUS]


@pytest.fixture
def wakeups(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """One number for each time that the event loop calls native code's callbacks: of the faults it found."""
    found: list[int] = []
    collect, fault = NbdLoop._collect, NativeTransmission.fault

    def counted_collect(self: NbdLoop) -> None:
        found.append(0)
        collect(self)

    def counted_fault(self: NativeTransmission, *args: Any) -> None:
        found[-1] += 1
        fault(self, *args)

    monkeypatch.setattr(NbdLoop, "_collect", counted_collect)
    monkeypatch.setattr(NativeTransmission, "fault", counted_fault)
    return found


@pytest.fixture(params=["thread", "caller"])
def taken_by(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Who reads from the sockets: native threads, or native code in the event loop's thread."""
    monkeypatch.setattr(nbd, "served_by", request.param)
    return str(request.param)


def send_at_once(client: NbdClient, command: Cmd, count: int) -> None:
    """`count` requests by one system call, without the event loop."""
    length, payload = (0, b"") if command == Cmd.FLUSH else (512, b"!" * 512 if command == Cmd.WRITE else b"")
    requests = b"".join(
        protocol.REQUEST.pack(protocol.REQUEST_MAGIC, 0, command, number, length and number * 512, length) + payload
        for number in range(count)
    )
    with socket.socket(fileno=os.dup(client.wire.writer.get_extra_info("socket").fileno())) as sock:
        assert sock.send(requests) == len(requests)


async def replies(client: NbdClient, count: int) -> None:
    found = [await client.wire.reply() for _ in range(count)]
    assert sorted(reply.cookie for reply in found) == list(range(count))
    assert not any(reply.error for reply in found)


@pytest.mark.parametrize("connections", [1, 7], ids=["1-connection", "7-connections"])
@pytest.mark.parametrize("command", COMMANDS, ids=lambda command: command.name)
@run_async
async def test_faults_queued_cost_one_wakeup_for_hundreds(
    command: Cmd, connections: int, taken_by: str, wakeups: list[int]
) -> None:
    each = 100
    async with serving() as served:
        clients = [await raw_client(served) for _ in range(connections)]
        before = served.stats().sends
        wakeups.clear()
        for client in clients:
            send_at_once(client, command, each)
        while taken_by == "thread" and served.stats().requests < connections * each:
            os.sched_yield()
        for client in clients:
            await replies(client, each)
        full, rest = divmod(connections * each, TAKEN)
        assert [count for count in wakeups if count] == [TAKEN] * full + [rest]
        assert len(wakeups) <= full + 2
        assert len(wakeups) * 50 <= connections * each
        # A connection whose faults two wake-ups share is answered twice.
        assert connections <= served.stats().sends - before <= connections + full
        assert len(served.disk.calls) == connections * each
        for client in clients:
            await client.disconnect()


@run_async
async def test_faults_that_wait_and_end_together_are_answered_together(taken_by: str, wakeups: list[int]) -> None:
    async with serving() as served:
        client = await raw_client(served)
        wakeups.clear()
        with served.disk.hold("pread") as held:
            send_at_once(client, Cmd.READ, 100)
            while taken_by == "thread" and served.stats().requests < 100:
                os.sched_yield()
            await held.arrived(100)
            assert [count for count in wakeups if count] == [100]
            before = served.stats().sends
            held.release()
            await replies(client, 100)
            assert served.stats().sends - before == 1
        await client.disconnect()


@run_async
async def test_faults_more_than_are_taken_at_once_come_in_full_batches(taken_by: str, wakeups: list[int]) -> None:
    rounds = 20
    count = rounds * nbd_loop.MAX_REQUESTS
    async with serving(size=count * 512) as served:
        client = await raw_client(served)
        wakeups.clear()
        send_at_once(client, Cmd.READ, count)
        while taken_by == "thread" and served.stats().requests < nbd_loop.MAX_REQUESTS:
            os.sched_yield()
        await replies(client, count)
        batches = [count for count in wakeups if count]
        if taken_by == "thread":  # it may still be receiving when we come: then a batch is two
            assert sum(batches) == count
            assert len(batches) <= 2 * rounds
        else:
            assert batches == [nbd_loop.MAX_REQUESTS] * rounds
        await client.disconnect()

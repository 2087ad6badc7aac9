# SPDX-FileCopyrightText: blockgraph contributors
# SPDX-License-Identifier: MIT
"""Any bytes at all: the server survives, leaks nothing, and serves the others."""

from __future__ import annotations

import asyncio
import contextlib

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from blockgraph.exports.nbd import protocol
from blockgraph.exports.nbd.protocol import Opt
from blockgraph.testing.nbd_client import NbdWire, string
from tests.helpers.nbd import SIZE, Served, run_async, serving

numbers = st.one_of(
    st.sampled_from([0, 1, 2, 511, 512, SIZE - 1, SIZE, SIZE + 1, 1 << 25, (1 << 25) + 1, 2**31, 2**32 - 1]),
    st.integers(0, 2**32 - 1),
)
short = st.integers(0, 300)


@st.composite
def options(draw: st.DrawFn) -> bytes:
    """An option, well formed or nearly so."""
    data = draw(
        st.one_of(
            st.binary(max_size=40),
            st.just(string("disk") + b"\0\0"),
            st.just(string("disk") + b"\0\1\0\3"),
            st.just(string("disk") + b"\0\0\0\1" + string("base:allocation")),
            st.builds(lambda text: string(text) + b"\0\0\0\0", st.text(max_size=10)),
        )
    )
    length = draw(st.one_of(st.just(len(data)), short, numbers))
    option = draw(st.one_of(st.sampled_from(list(Opt)), numbers))
    return protocol.OPTION.pack(protocol.OPTION_MAGIC, option, length) + data


@st.composite
def requests(draw: st.DrawFn) -> bytes:
    """A request, well formed or nearly so."""
    command = draw(st.one_of(st.integers(0, 9), st.integers(0, 65535)))
    flags = draw(st.one_of(st.just(0), st.integers(0, 31), st.integers(0, 65535)))
    length = draw(st.one_of(short, numbers))
    data = bytes(length) if command == 1 and length < 4096 and draw(st.booleans()) else draw(st.binary(max_size=50))
    offset = draw(st.one_of(numbers, st.integers(0, 2**64 - 1)))
    cookie = draw(st.integers(0, 2**64 - 1))
    return protocol.REQUEST.pack(protocol.REQUEST_MAGIC, flags, command, cookie, offset, length) + data


def mutated(parts: st.SearchStrategy[bytes]) -> st.SearchStrategy[bytes]:
    """A stream of parts with a few bytes overwritten, and cut somewhere."""

    def damage(stream: bytes, changes: list[tuple[int, int]], cut: int | None) -> bytes:
        data = bytearray(stream)
        for position, value in changes:
            if data:
                data[position % len(data)] = value
        return bytes(data[: None if cut is None else cut % (len(data) + 1)])

    changes = st.lists(st.tuples(st.integers(0, 2000), st.integers(0, 255)), max_size=3)
    return st.builds(damage, st.lists(parts, max_size=8).map(b"".join), changes, st.none() | st.integers(0, 2000))


async def swallow(wire: NbdWire) -> None:
    with contextlib.suppress(OSError):
        while await wire.reader.read(1 << 16):
            pass


async def attack(served: Served, wire: NbdWire, stream: bytes, *, die: bool) -> None:
    """Send it, then leave; whatever the server answers is read, so that it never has to wait."""
    reading = asyncio.create_task(swallow(wire))
    with contextlib.suppress(OSError):
        await wire.send(stream)
        if die:
            wire.abort()
        else:
            wire.writer.write_eof()
    await reading
    await wire.close()
    async with await served.client() as bystander:
        assert len(await bystander.pread(0, 16)) == 16
    await served.idle()


@settings(max_examples=150, deadline=None)
@given(stream=mutated(options()), die=st.booleans())
def test_handshake_any_bytes_server_survives(stream: bytes, die: bool) -> None:
    @run_async
    async def run() -> None:
        async with serving() as served:
            wire = await served.greeted()
            await attack(served, wire, stream, die=die)

    run()


@pytest.mark.usefixtures("served_by")
@settings(max_examples=200, deadline=None)
@given(stream=mutated(requests()), die=st.booleans(), structured=st.booleans())
def test_transmission_any_bytes_server_survives(stream: bytes, die: bool, structured: bool) -> None:
    @run_async
    async def run() -> None:
        async with serving() as served:
            wire = await served.greeted()
            if structured:
                await wire.ask(Opt.STRUCTURED_REPLY)
                await wire.ask(Opt.SET_META_CONTEXT, string("disk") + b"\0\0\0\1" + string("base:allocation"))
            await wire.ask(Opt.GO, string("disk") + b"\0\0")
            await attack(served, wire, stream, die=die)

    run()


@settings(max_examples=50, deadline=None)
@given(stream=st.binary(max_size=200))
def test_connection_random_bytes_server_survives(stream: bytes) -> None:
    @run_async
    async def run() -> None:
        async with serving() as served:
            await attack(served, await served.wire(), stream, die=False)

    run()

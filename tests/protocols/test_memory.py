# SPDX-FileCopyrightText: blockgraph contributors
# SPDX-License-Identifier: MIT
"""memory against a bytearray and a set of pages."""

from __future__ import annotations

import asyncio

from helpers.harness import extents, opened, read, write
from hypothesis import given, settings
from hypothesis import strategies as st

from blockgraph.flags import Flag
from blockgraph.protocols.memory import PAGE, Memory

_OFFSET = st.one_of(st.integers(0, 6 * PAGE), st.integers(0, 6).map(lambda page: page * PAGE))
_STEP = st.tuples(
    st.sampled_from(["write", "zero", "unmap", "discard", "truncate"]), _OFFSET, st.integers(1, 2 * PAGE + 1)
)


class Model:
    """The bytes, and which pages have been written since they were last given up."""

    def __init__(self, size: int) -> None:
        self.data = bytearray(size)
        self.pages: set[int] = set()

    def put(self, offset: int, data: bytes) -> None:
        self.data.extend(bytes(max(0, offset + len(data) - len(self.data))))
        self.data[offset : offset + len(data)] = data

    def drop(self, offset: int, end: int) -> None:
        self.pages -= set(range(-(-offset // PAGE), end // PAGE))

    def kinds(self) -> list[str]:
        return ["data" if page in self.pages else "zero" for page in range(-(-len(self.data) // PAGE))]


@settings(deadline=None, max_examples=60)
@given(size=st.integers(0, 5 * PAGE), steps=st.lists(_STEP, max_size=12))
def test_memory_any_sequence_of_requests_behaves_as_bytearray(size: int, steps: list[tuple[str, int, int]]) -> None:
    model = Model(size)

    async def run() -> None:
        async with opened("memory", size=size) as child:
            for number, (step, offset, length) in enumerate(steps):
                if step == "write":
                    await write(child, offset, bytes([number + 1]) * length)
                    model.put(offset, bytes([number + 1]) * length)
                    model.pages |= set(range(offset // PAGE, -(-(offset + length) // PAGE)))
                elif step in ("zero", "unmap"):
                    await child.pwrite_zeroes(offset, length, Flag.MAY_UNMAP if step == "unmap" else Flag.NONE)
                    model.put(offset, bytes(length))
                    if step == "unmap":
                        model.drop(offset, offset + length)
                elif step == "discard" and offset + length <= len(model.data):
                    await child.discard(offset, length)
                    model.put(offset, bytes(length))
                    model.drop(offset, offset + length)
                elif step == "truncate":
                    await child.truncate(offset)
                    model.data.extend(bytes(max(0, offset - len(model.data))))
                    del model.data[offset:]
                    model.pages = {page for page in model.pages if page * PAGE < offset}
                assert child.node.size() == len(model.data)
                assert await read(child, 0, 10 * PAGE) == model.data + bytes(10 * PAGE - len(model.data))
                for start, run_length, kind in await extents(child):
                    assert set(model.kinds()[start // PAGE : -(-(start + run_length) // PAGE)]) == {kind}
            assert isinstance(child.node.driver, Memory)
            assert set(child.node.driver._pages) == model.pages == set(child.node.driver._order)

    asyncio.run(run())


def test_memory_status_of_huge_empty_disk_is_one_answer() -> None:
    async def run() -> None:
        async with opened("memory", size=1 << 62) as child:
            await write(child, 1 << 61, b"x")
            assert await extents(child) == [
                (0, 1 << 61, "zero"),
                (1 << 61, PAGE, "data"),
                ((1 << 61) + PAGE, (1 << 61) - PAGE, "zero"),
            ]

    asyncio.run(run())

# SPDX-FileCopyrightText: blockgraph contributors
# SPDX-License-Identifier: MIT
from __future__ import annotations

import ctypes
from itertools import groupby

import pytest
from hypothesis import given
from hypothesis import strategies as st

from blockgraph.native import ZeroRun, allocate_aligned, is_zero, zero_runs


@given(length=st.integers(0, 1500), start=st.integers(0, 64), where=st.one_of(st.none(), st.integers(0, 1499)))
def test_is_zero_sees_a_single_byte_anywhere(length: int, start: int, where: int | None) -> None:
    whole = bytearray(b"\xff" * start + bytes(length) + b"\xff")
    if where is not None and where < length:
        whole[start + where] = 0x80
    window = memoryview(whole)[start : start + length]
    assert is_zero(window) == (not any(window))


@given(
    pieces=st.lists(st.tuples(st.booleans(), st.integers(1, 40)), max_size=600),
    granularity=st.sampled_from([1, 7, 16, 64]),
)
def test_zero_runs_equal_grouping_of_blocks(pieces: list[tuple[bool, int]], granularity: int) -> None:
    data = b"".join(bytes(n) if zero else b"\1" * n for zero, n in pieces)
    blocks = [(at, not any(data[at : at + granularity])) for at in range(0, len(data), granularity)]
    expected = []
    for zero, group in groupby(blocks, key=lambda block: block[1]):
        members = [at for at, _ in group]
        expected.append(ZeroRun(members[0], min(members[-1] + granularity, len(data)) - members[0], zero))
    assert list(zero_runs(data, granularity)) == expected


def test_zero_runs_with_granularity_zero_is_refused() -> None:
    with pytest.raises(ValueError, match="granularity"):
        list(zero_runs(b"a", 0))


@pytest.mark.parametrize("length", [0, 1, 512, 4097], ids=["empty", "byte", "sector", "odd"])
def test_allocate_aligned_gives_zeroed_writable_page_aligned_memory(length: int) -> None:
    view = allocate_aligned(length)
    assert len(view) == length
    assert is_zero(view)
    if length:
        view[0] = 1
        assert ctypes.addressof(ctypes.c_char.from_buffer(view)) % 4096 == 0


@pytest.mark.parametrize("length, alignment", [(-1, 512), (1, 3), (1, 1 << 20)], ids=["length", "odd", "too-large"])
def test_allocate_aligned_out_of_range_is_refused(length: int, alignment: int) -> None:
    with pytest.raises(ValueError, match="must"):
        allocate_aligned(length, alignment)

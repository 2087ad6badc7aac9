# SPDX-FileCopyrightText: blockgraph contributors
# SPDX-License-Identifier: MIT
"""Rounding of block status to the minimum block size."""

from __future__ import annotations

from itertools import pairwise

from hypothesis import given
from hypothesis import strategies as st

from blockgraph.exports.nbd.context import align_extents

extents = st.lists(st.tuples(st.integers(1, 40), st.integers(0, 3)), min_size=1, max_size=12)


def model(given: list[tuple[int, int]], alignment: int) -> list[int]:
    """Flags of each block: what all its bytes agree on, else 0."""
    flat = [flags for length, flags in given for _ in range(length)]
    blocks = [flat[start : start + alignment] for start in range(0, len(flat), alignment)]
    return [block[0] if len(block) == alignment and len(set(block)) == 1 else 0 for block in blocks]


@given(extents, st.sampled_from([2, 4, 8, 16]))
def test_align_extents_any_says_no_more_than_it_knows(given: list[tuple[int, int]], alignment: int) -> None:
    aligned = align_extents(given, alignment, 0)
    assert all(length % alignment == 0 for length, _ in aligned)
    assert all(left[1] != right[1] for left, right in pairwise(aligned))
    found = [flags for length, flags in aligned for _ in range(length // alignment)]
    expected = model(given, alignment)
    # A block whose pieces agree although they are separate extents may be known or not: 0 is always true.
    assert len(found) == len(expected)
    assert all(flags in (wanted, 0) for flags, wanted in zip(found, expected, strict=True))


def test_align_extents_aligned_input_is_unchanged() -> None:
    assert align_extents([(512, 3), (1024, 0), (512, 3)], 512, 0) == [(512, 3), (1024, 0), (512, 3)]

# SPDX-FileCopyrightText: blockgraph contributors
# SPDX-License-Identifier: MIT
"""Flags of a request are IntFlag's in all but speed."""

from __future__ import annotations

from itertools import product

from blockgraph.flags import Flag

ALL = [Flag(value) for value in range(2 * max(Flag))]


def test_and_is_that_of_the_values_and_stays_a_flag() -> None:
    for a, b in product(ALL, ALL):
        for both in (a & b, a & int(b), int(a) & b):
            assert both == int(a) & int(b)
            assert type(both) is Flag
            assert bool(both) == bool(int(a) & int(b))
        assert a & ~b == int(a) & ~int(b)

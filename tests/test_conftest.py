# SPDX-FileCopyrightText: blockgraph contributors
# SPDX-License-Identifier: MIT
"""What a failing test says."""

from __future__ import annotations

import random

import pytest


def test_disks_that_differ_are_explained_by_where(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CI", "true")
    left = random.Random(1).randbytes(400_000)
    right = bytearray(left)
    right[5000] ^= 1
    right[300_000:301_000] = bytes(1000)
    with pytest.raises(AssertionError) as failure:
        assert left == right
    text = str(failure.value)
    assert "4 sectors differ, sector 9 to 587, at 5000: " in text
    assert len(text) < 1000
    with pytest.raises(AssertionError, match="400000 bytes == 399999 bytes"):
        assert left == memoryview(left)[:-1]
    with pytest.raises(AssertionError, match="Full diff"):
        assert [1, 2] == [1, 3]

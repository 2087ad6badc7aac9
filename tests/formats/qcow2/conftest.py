# SPDX-FileCopyrightText: blockgraph contributors
# SPDX-License-Identifier: MIT
"""Fixtures of the qcow2 tests."""

from __future__ import annotations

from collections.abc import Callable

import pytest


@pytest.fixture
def qemu(require_tool: Callable[[str], str]) -> None:
    """QEMU's tools are there."""
    require_tool("qemu-img")
    require_tool("qemu-io")

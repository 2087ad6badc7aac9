# SPDX-FileCopyrightText: blockgraph contributors
# SPDX-License-Identifier: MIT
"""Fixtures for exports."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.helpers import nbd


@pytest.fixture(scope="module", params=list(nbd.SERVED_BY))
def served_by(request: pytest.FixtureRequest) -> Iterator[str]:
    """Run a module's tests against each way to serve a connection; a module asks for it by usefixtures."""
    before = nbd.served_by
    nbd.served_by = request.param
    yield request.param
    nbd.served_by = before

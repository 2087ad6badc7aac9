# SPDX-FileCopyrightText: blockgraph contributors
# SPDX-License-Identifier: MIT
"""WriteGuard: what must be durable before a range of a node may change for the first time.

The node asks before every request that changes something. Native writes do not ask: extent maps hold a range as
writable only while the guard says that it is open, and a guard that closes a range calls `node.revoke` in the same
step.
"""

from __future__ import annotations

from typing import NamedTuple, Protocol


class GuardRun(NamedTuple):
    """A range of the node, bytes, that is open or closed as a whole."""

    start: int
    end: int
    open: bool


class WriteGuard(Protocol):
    """See the module's text."""

    async def before(self, offset: int, length: int) -> None:
        """Open the range, when it is not: returns when it may change.

        Raises:
            IOFailure: it may not; the request fails.
        """

    def run(self, offset: int) -> GuardRun:
        """The widest run around `offset`. Fast: asked at every fault."""

    async def before_resize(self, size: int) -> None:
        """The node is about to become `size` bytes long; `resized` follows, whether it did or not.

        Raises:
            IOFailure: it may not.
        """

    async def resized(self) -> None:
        """The node, and its bitmaps, have the size they have now. Must not fail."""

    async def touch(self) -> None:
        """The image is about to change, though no byte of the disk does: metadata is written back.

        Raises:
            IOFailure: it may not.
        """

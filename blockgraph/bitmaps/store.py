# SPDX-FileCopyrightText: blockgraph contributors
# SPDX-License-Identifier: MIT
"""BitmapStore: where the persistent bitmaps of a node are kept, in its image or beside it.

    load ──► bitmaps in memory ──► begin ──► writes and changes ──► save
             (node.bitmaps)      stored form says "in use"        stored form is right again

Between `begin` and `save` a crash leaves bitmaps that nobody may use, unless the store recovers them itself.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol, runtime_checkable

if TYPE_CHECKING:
    from collections.abc import Callable

    from blockgraph.bitmaps.bitmap import DirtyBitmap


class BitmapStore(Protocol):
    """See the module's text. Used on the graph's loop thread; a driver (or the graph) sets `node.bitmap_store`."""

    def check(self, bitmap: DirtyBitmap) -> None:
        """Refuse to keep a bitmap: the format has no place for it, or not for so many.

        Raises:
            GraphError: why, and what to do.
        """

    async def load(self) -> list[DirtyBitmap]:
        """What is stored, `persistent` set; called once, when the node has been opened and attached.

        What can not be trusted comes back `inconsistent`. Nothing is written.

        Raises:
            CorruptImage: the stored form contradicts its specification.
        """

    async def begin(self) -> None:
        """Before the first write to the node and before the first change of a persistent bitmap: the stored form
        says, durably, that it is out of date. Cheap when it says so already.

        Raises:
            IOFailure: it can not be said; nothing may be written.
        """

    async def save(self) -> None:
        """Make the stored form equal to `node.bitmaps` (the persistent ones), durably, and no longer in use.

        Called when the node closes or becomes read-only, after its last write, and whenever the user asks.

        Raises:
            IOFailure: it is as `begin` left it; the user needs a full backup next.
        """


@runtime_checkable
class LiveStore(BitmapStore, Protocol):
    """A store whose stored form is of use after a crash, too: what it says is a superset of what has changed.

    Whoever takes something away from a bitmap calls `keep` first, and gives up what it kept when the change can no
    longer be undone; whoever adds something calls `store` afterwards, and has not succeeded before that returns.
    """

    def keep(self, bitmap: DirtyBitmap) -> Callable[[], None]:
        """Whatever is stored from now on also has what the bitmap has now, until the returned function is called."""

    async def store(self) -> None:
        """What the bitmaps hold, beyond what is written to the node, is durable.

        Raises:
            IOFailure: it may not be.
        """

    async def close(self) -> None:
        """The node closes: nothing is written any more."""

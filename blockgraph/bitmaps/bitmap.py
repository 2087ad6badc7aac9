# SPDX-FileCopyrightText: blockgraph contributors
# SPDX-License-Identifier: MIT
"""Dirty bitmaps: which granules of a node may have changed since a moment.

Bits are set after a write, write-zeroes or discard, also when the request failed; they are rounded out to granules.

A reader (a job, an export) takes a *view*: what the bitmap held at one instant, which never changes. Recording goes on
in a new segment, so views cost nothing per write, and any number may be open at once:

```
    view of job 1 (taken at T1)    =  [ segment 0 ]
    view of job 2 (taken at T2)    =  [ segment 0 | segment 1 ]
    the bitmap                     =  [ segment 0 | segment 1 | recorder ]      writes mark the recorder only
                                               T1          T2         now
```

Whoever takes a view says whether it wants to clear: take away, when it has succeeded, what it has seen. The bitmap is
cleared when the last of those who want to has ended: it then holds what was written since the earliest view that
succeeded, so that a next incremental backup fits after any of them. While views are open nothing else is refused but
removing the bitmap and those changes of the node's size that the views' owners do not share.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal

from blockgraph.errors import GraphError, NodeInUse
from blockgraph.graph.bitmaps import NAME_HINT, granularity_problem, name_problem
from blockgraph.native import Bitmap

if TYPE_CHECKING:
    from blockgraph.bitmaps.epochs import Epochs

#: What a view's owner wants at its end: "never" clears nothing; "on-success" when it has succeeded; "always" also
#: when it has failed, but for what it had not done yet.
Mode = Literal["on-success", "never", "always"]


class DirtyBitmap:
    """A named bitmap of one node. Changed on the graph's loop thread only, but for what native writes mark.

    Attributes:
        name: unique on its node.
        node: name of the node, for messages.
        granularity: bytes per bit.
        recorder: what writes mark: uint8[ceil(size / granularity / 8)], bit 0 lowest. Another object after `take`.
        enabled: it records writes.
        persistent: its node's store keeps it.
        inconsistent: it missed writes, or may have: of no use but to be removed.
        reason: why it is inconsistent.
        version: grows with every change that is no write.
        epochs: what left the bitmap, and when; None: nobody asked for that.
    """

    def __init__(
        self,
        name: str,
        size: int,
        granularity: int = 64 << 10,
        *,
        node: str = "",
        enabled: bool = True,
        persistent: bool = False,
        inconsistent: bool = False,
        reason: str = "",
    ) -> None:
        self.name = name
        self.node = node
        self.granularity = granularity
        self.recorder = Bitmap(size, granularity)
        self.enabled = enabled
        self.persistent = persistent
        self.inconsistent = inconsistent
        self.reason = reason
        self.version = 0
        self.epochs: Epochs | None = None
        #: what was marked between the views; the first may be a view's bits, so they never change
        self._segments: list[Bitmap] = []
        self._views: list[View] = []
        self._ended: list[_Ended] = []

    def __repr__(self) -> str:
        return f"<DirtyBitmap {self.node}/{self.name} dirty={self.count()}>"

    @property
    def size(self) -> int:
        """Bytes of the disk."""
        return self.recorder.size

    @property
    def recording(self) -> bool:
        """Writes are marked."""
        return self.enabled and not self.inconsistent

    @property
    def holders(self) -> list[str]:
        """Who has a view: "job 'b0'"."""
        return [view.holder for view in self._views]

    def record(self, offset: int, length: int) -> None:
        """A request changed, or may have changed, the range."""
        if self.recording and length > 0:
            end = min(offset + length, self.size)
            if offset < end:
                self.recorder.set(offset, end - offset)

    def contents(self) -> Bitmap:
        """All that is marked; not to be changed. A copy while views are open."""
        return self._union() if self._segments else self.recorder

    def count(self) -> int:
        """Dirty bytes, the last granule cut to the disk's end."""
        return self.contents().count()

    def check_usable(self, op: str) -> None:
        """Refuse to use a bitmap that may have missed writes.

        Raises:
            GraphError: it is inconsistent.
        """
        if self.inconsistent:
            raise self.why_unusable(op)

    def why_unusable(self, op: str) -> GraphError:
        """What is told of an inconsistent bitmap."""
        return GraphError(
            f"bitmap '{self.name}' is inconsistent: {self.reason or 'it may have missed writes'}",
            node=self.node,
            op=op,
            hint="remove it, and make a full backup next",
        )

    def check_free(self, op: str) -> None:
        """Refuse what no view may be open for.

        Raises:
            NodeInUse: names the holders.
        """
        if self._views:
            raise NodeInUse(f"bitmap '{self.name}' is in use by {', '.join(self.holders)}", node=self.node, op=op)

    # Changes. The node is drained: no write is in flight.

    def take(self, holder: str, mode: Mode = "never") -> View:
        """What the bitmap holds at this instant."""
        self.check_usable("take")
        self._segments.append(self.recorder)
        self.recorder = Bitmap(self.size, self.granularity, dense=mode == "never")  # it gets back what is taken
        bits = self._segments[0] if len(self._segments) == 1 else self._union(recorder=False)
        view = View(self, bits, holder, mode, len(self._segments))
        self._views.append(view)
        return view

    def clear(self) -> Callable[[], None]:
        """Nothing is marked any more. Views keep what they have; what their owners leave at their end is added.

        Returns: what takes it back, while the node stays drained.
        """
        if self.epochs is not None:
            self.epochs.stamp(self.contents())
        return self._empty()

    def _empty(self) -> Callable[[], None]:
        undo = self._keep()
        self._segments = [Bitmap(self.size, self.granularity) for _ in self._segments]
        self.recorder = Bitmap(self.size, self.granularity)
        return undo

    def advance(self) -> Callable[[], None]:
        """A new checkpoint, `epochs.current`: what is marked now changed before it.

        Returns: as `clear`.
        Raises:
            GraphError: there are no more numbers; nothing has changed.
        """
        assert self.epochs is not None
        before = self.epochs.advance(self.contents())
        undo = self._empty()

        def back() -> None:
            undo()
            before()

        return back

    def since(self, checkpoint: int) -> Bitmap:
        """What has changed since a checkpoint. Those of a bitmap with epochs are 1, when it was added, to
        `epochs.current`.

        Raises:
            GraphError: it has no epochs, no such checkpoint, or is inconsistent.
        """
        self.check_usable("read")
        if self.epochs is None:
            raise GraphError(f"bitmap '{self.name}' has no epochs", node=self.node, hint="add one with epochs")
        if not 1 <= checkpoint <= self.epochs.current:
            raise GraphError(
                f"bitmap '{self.name}' has checkpoints 1 to {self.epochs.current}, not {checkpoint}", node=self.node
            )
        bits = self.epochs.since(checkpoint)
        bits.merge(self.contents())
        return bits

    def merge(self, sources: Sequence[Bitmap]) -> Callable[[], None]:
        """Mark whatever is marked in one of `sources`, whose granularities may differ; sizes are equal.

        Returns: as `clear`.
        """
        undo = self._keep()
        self.recorder = self.recorder.copy()
        for bits in sources:
            self.recorder.merge(bits)
        return undo

    def _keep(self) -> Callable[[], None]:
        before = list(self._segments), self.recorder
        self.version += 1

        def undo() -> None:
            self._segments, self.recorder = before
            self.version += 1

        return undo

    def replace(self, bits: Bitmap) -> None:
        """For stores and undo: hold exactly `bits`; no view is open."""
        assert not self._views
        assert bits.granularity == self.granularity
        self.recorder = bits
        self.version += 1

    def truncate(self, size: int) -> None:
        """Follow the disk to a new size. While it records, what is grown is marked: it reads as zeroes now, whatever
        was there before the disk was cut off.
        """
        self.version += 1
        before = self.size
        self._segments = [segment.copy() for segment in self._segments]
        for bits in (*self._segments, self.recorder):
            bits.truncate(size)
        for ended in self._ended:
            if ended.left is not None:
                ended.left.truncate(size)
        if self.epochs is not None:
            self.epochs.truncate(size)
        self.record(before, size - before)

    def _union(self, *, recorder: bool = True) -> Bitmap:
        bits = Bitmap(self.size, self.granularity)
        for segment in self._segments:
            bits.merge(segment)
        if recorder:
            bits.merge(self.recorder)
        return bits

    def _end(self, view: View, *, clears: bool, left: Bitmap | None) -> None:
        self._views.remove(view)
        if clears:
            self._ended.append(_Ended(view.segments, left))
        if self._ended and all(other.mode == "never" for other in self._views):
            self.version += 1
            first = min(ended.segments for ended in self._ended)
            if self.epochs is not None:
                for segment in self._segments[:first]:
                    self.epochs.stamp(segment)
            self._segments[:first] = [Bitmap(self.size, self.granularity) for _ in range(first)]
            for ended in self._ended:
                if ended.left is not None:
                    self.recorder.merge(ended.left)
            self._ended.clear()
        if not self._views:
            for segment in self._segments:
                self.recorder.merge(segment)
            self._segments.clear()


@dataclass(frozen=True)
class _Ended:
    """A view whose owner clears.

    Attributes:
        segments: how many the view had seen.
        left: what its owner had not done.
    """

    segments: int
    left: Bitmap | None


@dataclass(eq=False)
class View:
    """What a bitmap held at one instant. End it once.

    Attributes:
        bitmap: where it comes from.
        bits: never changes.
        holder: for messages.
        mode: see Mode.
        segments: for the bitmap.
    """

    bitmap: DirtyBitmap
    bits: Bitmap
    holder: str
    mode: Mode
    segments: int
    _open: bool = field(default=True, init=False)

    def end(self, *, succeeded: bool, left: Bitmap | None = None) -> None:
        """The owner has ended; the bitmap is cleared when the mode says so and nobody else waits to clear.

        Args:
            left: for mode "always", when it has failed: granules that it had not done; any granularity, same size.
                None: all of the view.
        """
        assert self._open, "a view ends once"
        self._open = False
        clears = self.mode == "always" or (self.mode == "on-success" and succeeded)
        if succeeded:
            left = None
        elif clears:
            left = (left or self.bits).copy()
            left.truncate(self.bitmap.size)
        self.bitmap._end(self, clears=clears, left=left)

    def drop(self) -> None:
        """It was never taken: nothing is cleared, whatever the mode says."""
        assert self._open, "a view ends once"
        self._open = False
        self.bitmap._end(self, clears=False, left=None)


def check_name(name: str, *, node: str) -> None:
    """Refuse a name that no store could keep.

    Raises:
        GraphError: it is empty, too long, or has a NUL.
    """
    if (wrong := name_problem(name)) is not None:
        raise GraphError(wrong, node=node, hint=NAME_HINT)


def check_granularity(granularity: int, *, node: str) -> None:
    """Refuse what is no granularity.

    Raises:
        GraphError: not a power of two from 512 to 2 GiB.
    """
    if (wrong := granularity_problem(granularity)) is not None:
        raise GraphError(wrong, node=node)

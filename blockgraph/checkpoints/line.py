# SPDX-FileCopyrightText: blockgraph contributors
# SPDX-License-Identifier: MIT
"""Line: the checkpoints of one disk, which are found again by the names of its bitmaps.

```
    without epochs       checkpoint:1:mon     checkpoint:2:tue     checkpoint:3:wed        wed records, the others are
                         [ mon .. tue )       [ tue .. wed )       [ wed .. now )          disabled
    since(tue)                                ╰──────────── merged ─────────────╯

    with epochs          checkpoint:1@1:mon   checkpoint:2@2:tue   checkpoint:3@3:wed      empty, disabled: only names
                         checkpoint:epochs@1                                               records, and has the epochs
```

A bitmap that may have missed writes spoils its checkpoint and all before it: what they would need was lost there.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, NamedTuple

from blockgraph.bitmaps.actions import (
    AddBitmap,
    AdvanceEpoch,
    BitmapAction,
    BitmapName,
    EnableBitmap,
    MergeBitmaps,
    RemoveBitmap,
    find_on,
)
from blockgraph.errors import GraphError
from blockgraph.graph.bitmaps import MAX_GRANULARITY
from blockgraph.native import Bitmap

if TYPE_CHECKING:
    from blockgraph.bitmaps import DirtyBitmap
    from blockgraph.graph.action import Action
    from blockgraph.graph.transaction import Transaction
    from blockgraph.node import Node


class Mark(NamedTuple):
    """A checkpoint of the disk.

    Attributes:
        number: orders them.
        epoch: number of the checkpoint in the bitmap with epochs; None: there is none of these.
        name: of the checkpoint.
        bitmap: what carries the name.
    """

    number: int
    epoch: int | None
    name: str
    bitmap: DirtyBitmap


class Keeping(NamedTuple):
    """How new bitmaps are kept; as of AddBitmap."""

    granularity: int | None
    epochs: bool
    persistent: bool | None
    sidecar: str | bool


_NOT = Keeping(None, epochs=False, persistent=False, sidecar=False)


class Line:
    """See the module's text. A look at the node's bitmaps as they are now.

    Attributes:
        node: has the bitmaps.
        marks: in order.
    """

    def __init__(self, node: Node, prefix: str) -> None:
        self.node = node
        self.marks: list[Mark] = []
        self._prefix = prefix
        recorders: list[tuple[int, DirtyBitmap]] = []
        mark = re.compile(rf"{re.escape(prefix)}:([0-9]+)(?:@([0-9]+))?:(.+)", re.DOTALL)
        recorder = re.compile(rf"{re.escape(prefix)}:epochs@([0-9]+)")
        for name, bitmap in node.bitmaps.items():
            if found := mark.fullmatch(name):
                epoch = None if found[2] is None else int(found[2])
                self.marks.append(Mark(int(found[1]), epoch, found[3], bitmap))
            elif found := recorder.fullmatch(name):
                recorders.append((int(found[1]), bitmap))
        self.marks.sort(key=lambda each: each.number)
        self._recorders = [bitmap for _, bitmap in sorted(recorders, key=lambda each: each[0])]
        self._spoiled, self._reason = self._find_spoiled()

    @property
    def epochs(self) -> bool:
        """Its checkpoints are those of a bitmap with epochs."""
        return any(mark.epoch is not None for mark in self.marks)

    def index(self, name: str) -> int | None:
        """Place of a checkpoint among `marks`; None: the disk does not have it."""
        return next((at for at, mark in enumerate(self.marks) if mark.name == name), None)

    def problem(self, name: str) -> str | None:
        """Why nobody can say what has changed on the disk since a checkpoint; None: `since` does."""
        at = self.index(name)
        if at is None:
            return f"the disk was not in checkpoint '{name}'"
        return self._reason if at <= self._spoiled else None

    def _find_spoiled(self) -> tuple[int, str]:
        """Index of the last mark that is of no use, and why; -1: all are."""
        if not self.marks:
            return -1, ""
        last = len(self.marks) - 1
        recorder = self.marks[last].bitmap
        if self.epochs:
            if not self._recorders or self._recorders[-1].epochs is None:
                return last, "the bitmap with the epochs is missing"
            recorder = self._recorders[-1]
        if recorder.inconsistent:
            return last, str(recorder.why_unusable("read"))
        if not recorder.enabled:
            return last, f"bitmap '{recorder.name}' was disabled, and may have missed writes"
        if not self.epochs:
            for at in range(last, -1, -1):
                bitmap = self.marks[at].bitmap
                if bitmap.inconsistent:
                    return at, str(bitmap.why_unusable("read"))
        return -1, ""

    def since(self, name: str) -> Bitmap:
        """What has changed on the disk since a checkpoint; a copy.

        Raises:
            GraphError: nobody can say.
        """
        at = self.check_known(name)
        epoch = self.marks[at].epoch
        if epoch is not None:
            return self._recorders[-1].since(epoch)
        bitmaps = [mark.bitmap for mark in self.marks[at:]]
        bits = Bitmap(bitmaps[0].size, min(bitmap.granularity for bitmap in bitmaps))
        for bitmap in bitmaps:
            bits.merge(bitmap.contents())
        return bits

    def check_known(self, name: str) -> int:
        """Place among `marks` of a checkpoint since which what has changed is known.

        Raises:
            GraphError: nobody can say what has.
        """
        if (problem := self.problem(name)) is not None:
            raise GraphError(
                f"what changed since checkpoint '{name}' is not known: {problem}",
                node=self.node.name,
                hint="make a full backup",
            )
        at = self.index(name)
        assert at is not None
        return at

    # What happens in a transaction: actions, in order.

    def begin(self, name: str, number: int, keeping: Keeping) -> list[Action]:
        """A new checkpoint. Where a bitmap with epochs is of no use any more, it and its checkpoints go.

        Raises:
            GraphError: the disk's checkpoints are kept otherwise, or its newest bitmap was disabled.
        """
        if self.marks and self.epochs != keeping.epochs:
            raise GraphError(
                f"its checkpoints are kept with{'' if self.epochs else 'out'} epochs",
                node=self.node.name,
                op="checkpoint",
                hint=f"go on with epochs={self.epochs}, or delete them first",
            )
        if keeping.epochs:
            return self._begin_epoch(name, number, keeping)
        bitmap = self._name(f"{number}:{name}")
        granularity = keeping.granularity
        actions: list[Action] = []
        if self.marks:
            last = self.marks[-1].bitmap
            granularity = granularity or last.granularity
            if not last.inconsistent:
                if not last.enabled:
                    raise GraphError(
                        self._reason,
                        node=self.node.name,
                        op="checkpoint",
                        hint="enable it if nothing was written meanwhile, else delete its checkpoint first",
                    )
                actions.append(EnableBitmap(BitmapName(self.node.name, last.name), enabled=False))
        return [*actions, self._add(bitmap, keeping, granularity=granularity)]

    def _begin_epoch(self, name: str, number: int, keeping: Keeping) -> list[Action]:
        usable = bool(self._recorders) and self._spoiled < 0
        actions: list[Action] = []
        recorders = self._recorders
        if usable and self.marks:
            current = recorders[-1]
            assert current.epochs is not None
            epoch = current.epochs.current + 1
            actions.append(AdvanceEpoch(BitmapName(self.node.name, current.name)))
        else:  # a new one, and whatever could not tell any more goes
            actions += [RemoveBitmap(self._at(bitmap)) for bitmap in (*recorders, *(m.bitmap for m in self.marks))]
            epoch = 1
            recorder = self._name(f"epochs@{number}")
            actions.append(self._add(recorder, keeping, granularity=keeping.granularity, epochs=True))
        mark = self._name(f"{number}@{epoch}:{name}")
        return [*actions, self._add(mark, keeping, granularity=MAX_GRANULARITY, enabled=False)]

    def _add(
        self,
        name: BitmapName,
        keeping: Keeping,
        *,
        granularity: int | None,
        enabled: bool = True,
        epochs: bool = False,
    ) -> AddBitmap:
        persistent = keeping.persistent
        if persistent is None:
            persistent = bool(keeping.sidecar) or self.node.bitmap_store is not None
        return AddBitmap(
            name,
            granularity=granularity,
            enabled=enabled,
            persistent=persistent,
            sidecar=keeping.sidecar,
            epochs=epochs,
        )

    def changes(self, since: str, into: str, keeping: Keeping = _NOT) -> list[Action]:
        """A new bitmap `into`, disabled, with what has changed since a checkpoint that has no problem.

        Args:
            keeping: how it is kept; default: it is not.
        """
        at = self.index(since)
        assert at is not None
        target = BitmapName(self.node.name, into)
        if self.epochs:
            recorder = self._recorders[-1]
            epoch = self.marks[at].epoch
            assert epoch is not None
            add = self._add(target, keeping, granularity=recorder.granularity, enabled=False)
            return [add, MergeEpochs(target, recorder.name, epoch)]
        bitmaps = [mark.bitmap for mark in self.marks[at:]]
        granularity = min(bitmap.granularity for bitmap in bitmaps)
        add = self._add(target, keeping, granularity=granularity, enabled=False)
        return [add, MergeBitmaps(target, [self._at(bitmap) for bitmap in bitmaps])]

    def delete(self, name: str) -> list[Action]:
        """The checkpoint is gone; what changed since any other one is still known.

        One that has a problem takes those before it along when without it nothing would tell that they have it, too.
        """
        at = self.index(name)
        assert at is not None
        mark = self.marks[at]
        gone: list[Action] = [RemoveBitmap(self._at(mark.bitmap))]
        if self.epochs:
            if len(self.marks) == 1:
                gone += [RemoveBitmap(self._at(bitmap)) for bitmap in self._recorders]
            return gone
        if at == self._spoiled:
            return [RemoveBitmap(self._at(each.bitmap)) for each in self.marks[: at + 1]]
        if at - 1 <= self._spoiled:  # no checkpoint before it needs its bits
            return gone
        before = self._at(self.marks[at - 1].bitmap)
        actions: list[Action] = [MergeBitmaps(before, [self._at(mark.bitmap)])]
        if at == len(self.marks) - 1:
            actions.append(EnableBitmap(before, enabled=True))
        return actions + gone

    def _name(self, name: str) -> BitmapName:
        return BitmapName(self.node.name, f"{self._prefix}:{name}")

    def _at(self, bitmap: DirtyBitmap) -> BitmapName:
        return BitmapName(self.node.name, bitmap.name)


class MergeEpochs(BitmapAction):
    """What has changed since a checkpoint of another bitmap of the node is marked in the bitmap, too."""

    def __init__(self, bitmap: BitmapName, source: str, checkpoint: int) -> None:
        super().__init__(bitmap)
        self._source = source
        self._checkpoint = checkpoint

    async def prepare(self, change: Transaction) -> None:
        node = change.node(self.bitmap.node)
        bits = find_on(node, self._source).since(self._checkpoint)
        bitmap = find_on(node, self.bitmap.name)
        await self._begin(node, bitmap)
        self._undo.append(bitmap.merge([bits]))
        await self._store(node, bitmap)

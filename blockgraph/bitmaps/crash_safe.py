# SPDX-FileCopyrightText: blockgraph contributors
# SPDX-License-Identifier: MIT
"""CrashSafeStore: the bitmaps stay in the image, in a form its other readers know; a sidecar helps after a crash.

```
                    clean              in use            after a crash             closed
    image           all bits           IN_USE            IN_USE ("of no use")      all bits
    disk.bitmaps    (of no interest)   bits | regions    bits + regions ──► the    (of no interest)
                                                         image's bitmaps
```

What the image says counts; only bitmaps that it calls inconsistent, or does not have yet, are taken from the sidecar,
and only while that fits the image (`identity`). So a program that knows nothing of sidecars can use the image at any
time: what it changes is noticed, within the limits that `identity` tells. Epochs are refused: the image has no place
for them.
"""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

from blockgraph.bitmaps.sidecar import Sidecar
from blockgraph.bitmaps.store import LiveStore
from blockgraph.errors import GraphError

if TYPE_CHECKING:
    from blockgraph.bitmaps.bitmap import DirtyBitmap
    from blockgraph.bitmaps.store import BitmapStore
    from blockgraph.node import Node

log = logging.getLogger(__name__)


class CrashSafeStore(Sidecar):
    """See the module's text.

    Args:
        inner: the image's own store.
    """

    def __init__(self, node: Node, path: str, inner: BitmapStore) -> None:
        super().__init__(node, path, crash_safe=True)
        self._inner = inner

    def check(self, bitmap: DirtyBitmap) -> None:
        if bitmap.epochs is not None:
            raise GraphError(
                f"driver '{self._node.driver.name}' has no place for the epochs of a bitmap",
                node=self._node.name,
                op="add",
                hint="leave out 'persistent'",
            )
        self._inner.check(bitmap)
        super().check(bitmap)

    async def load(self) -> list[DirtyBitmap]:
        bitmaps = await self._inner.load()
        found = {bitmap.name: bitmap for bitmap in await self._read(unfit=False) if not bitmap.inconsistent}
        for bitmap in bitmaps:
            kept = found.pop(bitmap.name, None)
            if not bitmap.inconsistent or kept is None or kept.granularity != bitmap.granularity:
                continue
            bitmap.replace(kept.contents())
            bitmap.enabled = kept.enabled
            bitmap.inconsistent = False
            bitmap.reason = ""
            self.recovered = True
            log.warning(
                "node '%s': bitmap '%s' was not closed; sidecar '%s' has it, with what may have changed",
                self._node.name,
                bitmap.name,
                self.path,
            )
        if found:  # added by the session that did not come to its end
            self.recovered = True
            bitmaps += found.values()
        self._versions.clear()
        if any(not bitmap.inconsistent for bitmap in bitmaps):
            self._watch()
        return bitmaps

    async def adopt(self) -> None:
        """Help with the bitmaps that the node has by now. The node is drained."""
        await self._read(unfit=False)
        self._versions.clear()
        if any(not bitmap.inconsistent for bitmap in self._persistent()):
            await self.begin()

    async def begin(self) -> None:
        # The sidecar first: as long as the image says that its bitmaps are right, they are.
        await super().begin()
        await self._inner.begin()

    async def save(self) -> None:
        if self.recovered and not self._begun:
            await self._inner.begin()
        await self._inner.save()
        if self._begun:
            await super().save()

    async def close(self) -> None:
        await super().close()
        if isinstance(self._inner, LiveStore):
            await self._inner.close()

    def _changed(self) -> bool:
        return self._begun and super()._changed()

# SPDX-FileCopyrightText: blockgraph contributors
# SPDX-License-Identifier: MIT
"""The end of what has native threads, in time.

When a cycle of objects is collected, the finalizers of all that is in it run in no order: a `__del__` that ends threads
would find what they are still using freed by ffi.gc already. Callbacks of weak references come before all of them
(PEP 442). Whoever in the cycle is finalized after that, and still uses the owner, finds `native` gone.
"""

from __future__ import annotations

import os
import weakref
from collections.abc import Callable
from typing import Generic, TypeVar

N = TypeVar("N")


class Ending(Generic[N]):
    """Calls `end` once: when it is called itself, or when `owner` is dropped. Never in a forked child, which has no
    native threads to end, and no right to its parent's descriptors; nor at exit, when other threads may be at work.

    Args:
        native: what is ended; must not lead to `owner`.
        end: called with it.
    """

    __slots__ = ("_end", "_pid", "native")

    native: N | None
    """None once it has ended."""

    def __init__(self, owner: object, native: N, end: Callable[[N], object]) -> None:
        self.native = native
        self._end = end
        self._pid = os.getpid()
        weakref.finalize(owner, self).atexit = False

    @property
    def is_inherited(self) -> bool:
        """This is a forked child."""
        return self._pid != os.getpid()

    def __call__(self) -> None:
        """End it now."""
        native, self.native = self.native, None
        if native is not None and not self.is_inherited:
            self._end(native)

# SPDX-FileCopyrightText: blockgraph contributors
# SPDX-License-Identifier: MIT
"""The end of what has native threads, in time.

When a cycle of objects is collected, the finalizers of all that is in it run in no order: a `__del__` that ends threads
would find what they are still using freed by ffi.gc already. Callbacks of weak references come before all of them
(PEP 442).
"""

from __future__ import annotations

import os
import weakref
from collections.abc import Callable
from typing import Any


class Ending:
    """Calls `end` once: when it is called itself, when `owner` is dropped, or at exit. Never in a forked child, which
    has no native threads to end, and no right to its parent's descriptors.

    Args:
        end: called with `natives`, which must not lead to `owner`.
    """

    __slots__ = ("_finalize", "_pid")

    def __init__(self, owner: object, end: Callable[..., object], *natives: Any) -> None:
        self._pid = os.getpid()
        self._finalize = weakref.finalize(owner, _end_here, self._pid, end, natives)

    @property
    def is_inherited(self) -> bool:
        """This is a forked child."""
        return self._pid != os.getpid()

    def __call__(self) -> None:
        """End it now."""
        self._finalize()


def _end_here(pid: int, end: Callable[..., object], natives: tuple[Any, ...]) -> None:
    if pid == os.getpid():
        end(*natives)

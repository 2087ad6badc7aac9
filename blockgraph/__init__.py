# SPDX-FileCopyrightText: blockgraph contributors
# SPDX-License-Identifier: MIT
"""blockgraph: an embeddable virtual-disk block layer.

`open` and `aopen` open a graph (see blockgraph.api); drivers derive from the classes of blockgraph.driver.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from blockgraph.api import AsyncGraph, SyncBackend, SyncGraph, aopen, open

__all__ = ["AsyncGraph", "SyncBackend", "SyncGraph", "__version__", "aopen", "open"]

__version__: str


def __getattr__(name: str) -> Any:
    """The API is imported when it is first used: a command that only prints its help stays fast."""
    if name == "__version__":
        from importlib.metadata import version

        return version("blockgraph")
    if name in __all__:
        from blockgraph import api

        return getattr(api, name)
    raise AttributeError(f"module 'blockgraph' has no attribute '{name}'")

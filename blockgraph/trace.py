# SPDX-FileCopyrightText: blockgraph contributors
# SPDX-License-Identifier: MIT
"""Trace events of the data path: one table, one boolean test when off.

```
with trace.record() as events:
    ...
assert [(e.op, e.node) for e in events] == [("pwrite", "top"), ("pread", "disk"), ("pwrite", "disk")]
```
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import NamedTuple

#: True while anybody listens; the data path tests this and nothing else.
enabled = False


class Event(NamedTuple):
    """A request entering a node: op "pread", "pwrite", "write_zeroes", "discard", "flush", "block_status", "map" or
    "truncate"; offset and length in bytes."""

    op: str
    node: str
    offset: int
    length: int


_sinks: list[Callable[[Event], None]] = []


def emit(op: str, node: str, offset: int = 0, length: int = 0) -> None:
    """Tell every listener. Call only when `enabled`."""
    event = Event(op, node, offset, length)
    for sink in _sinks:
        sink(event)


@contextmanager
def listen(sink: Callable[[Event], None]) -> Iterator[None]:
    """Call `sink` for every event until the block ends."""
    global enabled  # noqa: PLW0603 (one flag that the data path can test without a call)
    _sinks.append(sink)
    enabled = True
    try:
        yield
    finally:
        _sinks.remove(sink)
        enabled = bool(_sinks)


@contextmanager
def record() -> Iterator[list[Event]]:
    """A list that receives the events of the block."""
    events: list[Event] = []
    with listen(events.append):
        yield events

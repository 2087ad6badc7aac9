# SPDX-FileCopyrightText: blockgraph contributors
# SPDX-License-Identifier: MIT
"""Disks whose contents are computed when they are read: read-only by nature."""

from __future__ import annotations

import asyncio
from typing import Annotated

from msgspec import Meta

from blockgraph.driver import Protocol
from blockgraph.errors import GraphError
from blockgraph.options import NodeOptions
from blockgraph.perm import Perm

#: Bytes computed before other tasks of the loop get their turn.
_TURN = 1 << 20


class ComputedOptions(NodeOptions, kw_only=True, frozen=True):
    """Attributes:
    size: bytes.
    """

    size: Annotated[int, Meta(ge=0, le=(1 << 63) - 1)]


class ComputedDisk(Protocol):
    """A derived class gives `fill`."""

    options: ComputedOptions

    async def open(self) -> None:
        self.node.read_only = True

    def reopened(self, options: NodeOptions) -> None:
        super().reopened(options)
        self.node.read_only = True

    async def prepare_perm(self, need: Perm, share: Perm) -> None:
        writes = need & (Perm.WRITE | Perm.WRITE_UNCHANGED | Perm.RESIZE)
        if writes:
            raise GraphError(
                f"driver '{self.name}' is read-only, but a parent needs permission '{writes.words}'",
                node=self.node.name,
                hint="put a qcow2 overlay above it, or make the parent read-only",
            )

    def size(self) -> int:
        return self.options.size

    def fill(self, offset: int, buf: memoryview) -> None:
        """Compute the bytes at `offset`."""
        raise NotImplementedError

    async def pread(self, offset: int, buf: memoryview) -> None:
        for start in range(0, len(buf), _TURN):
            if start:
                await asyncio.sleep(0)
            self.fill(offset + start, buf[start : start + _TURN])

# SPDX-FileCopyrightText: blockgraph contributors
# SPDX-License-Identifier: MIT
"""Opening graphs from Python.

```
with blockgraph.open("graph.toml") as graph:
    disk = graph.backend("top", writable=True)          # usable from any thread
    disk.pwrite(0, b"hello")
    print(disk.pread(0, 5))

async with await blockgraph.aopen({"nodes": [...]}) as graph:   # in a running asyncio loop
    disk = await graph.backend("top", writable=True)
    await disk.pwrite(0, b"hello")
```

A description's nodes are opened, with their bitmaps; its exports and jobs are started by `blockgraph run`
(`blockgraph.session`).
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import errno
import threading
from collections.abc import Callable, Coroutine, Iterable, Iterator
from types import TracebackType
from typing import Any, Self, TypeVar, Unpack

from blockgraph import trace
from blockgraph.backend import Backend
from blockgraph.bitmaps import BitmapInfo
from blockgraph.bitmaps.actions import BitmapName, EnsureBitmap, NewBitmap
from blockgraph.bitmaps.attach import AttachSidecar
from blockgraph.errors import IOFailure
from blockgraph.extent import BlockStatus
from blockgraph.flags import Flag
from blockgraph.graph.action import Action
from blockgraph.graph.bitmaps import BitmapOptions, granularity_bytes
from blockgraph.graph.description import Description, NodeDescription
from blockgraph.graph.graph import Graph
from blockgraph.graph.load import Describable, load
from blockgraph.graph.policy import OpenPolicy
from blockgraph.native import MapStats, Zeroing
from blockgraph.native.extent_map import DEFAULT_MEMORY

T = TypeVar("T")

#: How long work that is cancelled at the very end may take, seconds.
_PATIENCE = 5.0


class AsyncGraph(Graph):
    """A graph in a running asyncio loop; an async context manager that closes it."""

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        await self.close()


async def aopen(source: Describable, *, policy: OpenPolicy | None = None) -> AsyncGraph:
    """Open the nodes of a graph description in the running loop.

    Args:
        source: path of a TOML, JSON or YAML file, or the same as a dict.
        policy: which files named inside images may be opened.
    Raises:
        OptionError, GraphError: the description is wrong (the first problem; `blockgraph check` shows all).
        IOFailure: an image could not be opened. Nothing stays open after an error.
    """
    return await open_description(load(source), policy=policy)


async def open_description(description: Description, *, policy: OpenPolicy | None = None) -> AsyncGraph:
    """`aopen` for a description that is loaded and valid."""
    graph = AsyncGraph(policy)
    first, rest = _with_bitmaps(description)
    try:
        async with graph.transaction() as change:
            change.add_nodes(first)
            for bitmap in description.bitmaps:
                for action in _bitmap_actions(bitmap.options):
                    change.act(action)
        if rest:  # among them filters that read these bitmaps when they are opened
            async with graph.transaction() as change:
                change.add_nodes(rest)
    except BaseException:
        await graph.close()
        raise
    return graph


def _with_bitmaps(description: Description) -> tuple[list[NodeDescription], list[NodeDescription]]:
    """The nodes whose bitmaps are described, with those below them, and the others; without bitmaps all and none."""
    if not description.bitmaps:
        return description.nodes, []
    model = description.model()
    names = {bitmap.options.node for bitmap in description.bitmaps}
    for name in tuple(names):
        names |= model.descendants(name)
    first = [node for node in description.nodes if node.name in names]
    return first, [node for node in description.nodes if node.name not in names]


def _bitmap_actions(options: BitmapOptions) -> Iterator[Action]:
    if options.sidecar:
        path = None if options.sidecar is True else options.sidecar
        yield AttachSidecar(options.node, path, crash_safe=options.crash_safe, shared=True)
    yield EnsureBitmap(
        BitmapName(options.node, options.name),
        granularity=granularity_bytes(options.granularity),
        enabled=not options.disabled,
        persistent=options.persistent or bool(options.sidecar),
        epochs=options.epochs,
    )


class SyncBackend:
    """A root for use from any thread; see `Backend` for what the methods do and raise.

    Reads and writes whose place is known go to the storage in the calling thread, past the loop thread (`RootMap`).
    """

    def __init__(self, graph: SyncGraph, backend: Backend) -> None:
        self._graph = graph
        self._backend = backend
        self._extents = backend.use_map().extents
        # What these do not do is done, and explained, in Python.
        requests = self._extents.requests
        self._pread, self._pread_into, self._pwrite = requests.pread, requests.pread_into, requests.pwrite

    @property
    def size(self) -> int:
        """Length of the disk, bytes."""
        return self._backend.size()

    @property
    def writable(self) -> bool:
        """Writes are permitted."""
        return self._backend.writable

    def pread(self, offset: int, length: int) -> bytes:
        """The bytes of [offset, offset + length)."""
        if not 0 < length <= self._backend.size() - offset:  # before a buffer is made of whatever length is asked for
            return self._graph.call(self._backend.pread(offset, length))
        if not trace.enabled and isinstance(data := self._pread(offset, length), bytes):
            return data
        buf = bytearray(length)
        self._pread_slowly(offset, buf)
        return bytes(buf)

    def pread_into(self, offset: int, buf: bytearray | memoryview) -> None:
        """Fill `buf`."""
        if trace.enabled or self._pread_into(offset, buf):
            self._pread_slowly(offset, buf)

    def _pread_slowly(self, offset: int, buf: bytearray | memoryview) -> None:
        """On the loop thread; or natively after all, if that only has to look up where the bytes are."""
        view = memoryview(buf).cast("B")
        if not trace.enabled:
            if self._graph.call(self._backend.pread_missed(offset, view)) or not self._pread_into(offset, view):
                return
            self._backend.came_back(write=False)
        self._graph.call(self._backend.pread_into(offset, view))

    def pwrite(self, offset: int, buf: bytes | bytearray | memoryview, *, flags: Flag = Flag.NONE) -> None:
        """Write `buf`."""
        # What has failed is done again in Python: writing the same bytes twice does no harm.
        if flags or trace.enabled or self._pwrite(offset, buf):
            self._graph.call(self._backend.pwrite(offset, memoryview(buf).cast("B"), flags))

    def write_zeroes(self, offset: int, length: int, *, flags: Flag = Flag.NONE) -> None:
        """Make the range read as zeroes."""
        how = Zeroing.ZERO_RANGE
        if flags & Flag.MAY_UNMAP:
            how |= Zeroing.PUNCH
        if not flags & Flag.NO_FALLBACK:
            how |= Zeroing.WRITE
        if flags & ~(Flag.MAY_UNMAP | Flag.NO_FALLBACK) or not self._zero(offset, length, how):
            self._graph.call(self._backend.write_zeroes(offset, length, flags))

    def discard(self, offset: int, length: int) -> None:
        """The range is no longer needed; advisory."""
        if not self._zero(offset, length, Zeroing.PUNCH):
            self._graph.call(self._backend.discard(offset, length))

    def _zero(self, offset: int, length: int, how: Zeroing) -> bool:
        """Whether it was done here; if not, Python does it, and deals with its errors."""
        if trace.enabled:
            return False
        try:
            return self._extents.zero(offset, length, how)
        except (OSError, ValueError):
            return False

    def flush(self) -> None:
        """Make every completed write durable."""
        self._graph.call(self._backend.flush())

    def block_status(self, offset: int, length: int) -> BlockStatus:
        """What the range contains from `offset` on."""
        return self._graph.call(self._backend.block_status(offset, length))

    def stats(self) -> MapStats:
        """Hits and misses of native requests, and what the extent map holds."""
        return self._extents.stats()

    def close(self) -> None:
        """Flush and give the root up."""
        self._graph.call(self._graph.graph.close_backend(self._backend))

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()


class SyncGraph:
    """A graph with a loop thread of its own; a context manager that closes both.

    Attributes:
        graph: the graph; touch it only by `call`.
    """

    def __init__(self, source: Describable, policy: OpenPolicy | None) -> None:
        self._loop = asyncio.new_event_loop()
        self._entry = threading.Lock()  # between asking whether the loop takes work and giving it some
        self._ending = False
        self._closing = threading.Lock()
        self._thread = threading.Thread(target=self._loop.run_forever, name="blockgraph", daemon=True)
        self._thread.start()
        try:
            self.graph = self.call(aopen(source, policy=policy))
        except BaseException:
            self._stop()
            raise

    def call(self, work: Coroutine[Any, Any, T]) -> T:
        """Run a coroutine on the loop thread and wait for it. Not from the loop thread itself.

        Raises:
            IOFailure: the graph has been closed (ESHUTDOWN); else what the coroutine raises.
        """
        assert threading.current_thread() is not self._thread, "would wait for itself"
        with self._entry:
            if self._ending:
                work.close()
                raise _closed()
            future = asyncio.run_coroutine_threadsafe(work, self._loop)
        try:
            return future.result()
        except concurrent.futures.CancelledError:
            if not self._ending:
                raise
            raise _closed() from None

    def backend(
        self, node: str, *, writable: bool = False, resize: bool = False, extent_map_size: int = DEFAULT_MEMORY
    ) -> SyncBackend:
        """A root over a node; see `Graph.backend`."""
        root = self.graph.backend(node, writable=writable, resize=resize, extent_map_size=extent_map_size)
        return SyncBackend(self, self.call(root))

    # Bitmaps; see the methods of `Graph`.

    def bitmaps(self, node: str | None = None) -> list[BitmapInfo]:
        """The bitmaps of a node, or of all nodes."""
        return self._ask(lambda: self.graph.bitmaps(node))

    def dirty_extents(self, node: str, name: str, offset: int = 0, length: int | None = None) -> list[tuple[int, int]]:
        """Offset and length of what is dirty in a range."""
        return self._ask(lambda: self.graph.dirty_extents(node, name, offset, length))

    def bitmap_digest(self, node: str, name: str) -> str:
        """SHA-256 of the bits."""
        return self.call(self.graph.bitmap_digest(node, name))

    def add_bitmap(self, node: str, name: str, **how: Unpack[NewBitmap]) -> None:
        """A new, empty bitmap."""
        self.call(self.graph.add_bitmap(node, name, **how))

    def attach_sidecar(self, node: str, path: str | None = None, *, crash_safe: bool | None = None) -> None:
        """Keep the persistent bitmaps of a node in a file beside its image, and take over those that are there."""
        self.call(self.graph.attach_sidecar(node, path, crash_safe=crash_safe))

    def remove_bitmap(self, node: str, name: str) -> None:
        """Remove a bitmap."""
        self.call(self.graph.remove_bitmap(node, name))

    def clear_bitmap(self, node: str, name: str) -> None:
        """Nothing is marked any more."""
        self.call(self.graph.clear_bitmap(node, name))

    def enable_bitmap(self, node: str, name: str, *, enabled: bool = True) -> None:
        """Record writes from now on, or no longer."""
        self.call(self.graph.enable_bitmap(node, name, enabled=enabled))

    def merge_bitmaps(self, node: str, name: str, sources: Iterable[tuple[str, str]]) -> None:
        """Mark in a bitmap what is marked in one of the sources (node and name)."""
        self.call(self.graph.merge_bitmaps(node, name, sources))

    def advance_epoch(self, node: str, name: str) -> int:
        """Begin a new checkpoint in a bitmap with epochs; returns its number, for `changed_since`."""
        return self.call(self.graph.advance_epoch(node, name))

    def changed_since(self, node: str, name: str, checkpoint: int) -> list[tuple[int, int]]:
        """Offset and length of what has changed since a checkpoint of a bitmap with epochs."""
        return self._ask(lambda: list(self.graph.bitmap(node, name).since(checkpoint).dirty_extents()))

    def act(self, *actions: Action) -> None:
        """All of these (blockgraph.bitmaps.actions) at one instant, or none."""
        self.call(self.graph.act(*actions))

    def _ask(self, question: Callable[[], T]) -> T:
        async def ask() -> T:
            return question()

        return self.call(ask())

    def close(self) -> None:
        """Wait for requests, write back, close; idempotent. Calls of other threads then fail, later ones too."""
        with self._closing:
            if self._ending:
                return
            try:
                self.call(self.graph.close())
            finally:
                self._stop()

    def _stop(self) -> None:
        with self._entry:
            self._ending = True
        asyncio.run_coroutine_threadsafe(_end_tasks(), self._loop).result()
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()


async def _end_tasks() -> None:
    """What came after the graph was closed: nobody may wait for a loop that has stopped."""
    tasks = asyncio.all_tasks() - {asyncio.current_task()}
    for task in tasks:
        task.cancel()
    if tasks:
        await asyncio.wait(tasks, timeout=_PATIENCE)
    await asyncio.get_running_loop().shutdown_asyncgens()


def _closed() -> IOFailure:
    return IOFailure("the graph has been closed", errno=errno.ESHUTDOWN)


def open(source: Describable, *, policy: OpenPolicy | None = None) -> SyncGraph:
    """Open a graph description; see `aopen`. The graph runs in a thread of its own."""
    return SyncGraph(source, policy)

# SPDX-FileCopyrightText: blockgraph contributors
# SPDX-License-Identifier: MIT
"""NbdExport: what clients see of one backend, and the state they negotiate with it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import NamedTuple

from blockgraph.backend import Backend
from blockgraph.errors import GraphError, OptionError
from blockgraph.exports.nbd.context import AllocationDepth, BaseAllocation, DirtyBitmapContext, MetaContext
from blockgraph.exports.nbd.protocol import MAX_REQUEST, MAX_STRING, Cmd, TransmissionFlag
from blockgraph.native import Bitmap, MapStats

_MIN_PREFERRED = 4096
_MAX_MINIMUM = 65536  # of the protocol
_READ, _WRITE = int(Cmd.READ), int(Cmd.WRITE)

# One backend serves all connections, so a flush on one covers the writes of all: CAN_MULTI_CONN.
_ALWAYS = (
    TransmissionFlag.HAS_FLAGS
    | TransmissionFlag.SEND_FLUSH
    | TransmissionFlag.SEND_FUA
    | TransmissionFlag.SEND_CACHE
    | TransmissionFlag.CAN_MULTI_CONN
)
_WRITABLE = TransmissionFlag.SEND_TRIM | TransmissionFlag.SEND_WRITE_ZEROES | TransmissionFlag.SEND_FAST_ZERO


class BlockSizes(NamedTuple):
    """What NBD_INFO_BLOCK_SIZE says, bytes. Only advice: the server serves any alignment."""

    minimum: int
    preferred: int
    maximum: int


class ExportStats(NamedTuple):
    """What an export has done since it was made.

    Attributes:
        hits: requests that native code served.
        faults: requests that Python served; those that were refused are not counted.
        bytes_read, bytes_written: by both.
        map: of the backend; None: it has no extent map.
    """

    hits: int
    faults: int
    bytes_read: int
    bytes_written: int
    map: MapStats | None


class NbdExport:
    """One backend under a name. The holder of the backend closes it, after the export was removed.

    Args:
        name: by which clients ask for it, at most 4096 bytes.
        backend: serves the requests; used from its graph's loop only.
        description: for people, at most 4096 bytes.
        writable: clients may write; the backend must be writable.
        bitmaps: shown as contexts qemu:dirty-bitmap:NAME: what each held at one instant, by name.
        allocation_depth: show the context qemu:allocation-depth.
    Raises:
        OptionError: a string is too long.
        GraphError: writable, and the backend is not; or a bitmap is that of a disk of another size.
    """

    def __init__(
        self,
        name: str,
        backend: Backend,
        *,
        description: str = "",
        writable: bool,
        bitmaps: Mapping[str, Bitmap] | None = None,
        allocation_depth: bool = False,
    ) -> None:
        for member, text in (("name", name), ("description", description)):
            if len(text.encode()) > MAX_STRING:
                raise OptionError(f"longer than {MAX_STRING} bytes", path=member, value=text)
        if writable and not backend.writable:
            raise GraphError(
                f"export '{name}' is to be writable, and its backend is read-only",
                node=backend.node.name,
                hint="open the node writable, or export it read-only",
            )
        for bitmap, bits in (bitmaps or {}).items():
            if bits.size != backend.size():
                raise GraphError(
                    f"bitmap '{bitmap}' covers {bits.size} bytes, and the export '{name}' has {backend.size()}",
                    node=backend.node.name,
                    hint="export the node that the bitmap belongs to, or a filter above it",
                )
        self.name = name
        self.backend = backend
        self.description = description
        self.writable = writable
        self.contexts: list[MetaContext] = [BaseAllocation()]
        self.contexts += [AllocationDepth()] if allocation_depth else []
        self.contexts += [DirtyBitmapContext(*item) for item in (bitmaps or {}).items()]
        self._faults = self._read = self._written = 0

    def count(self, command: int, length: int) -> None:
        """For connections: Python begins a request."""
        self._faults += 1
        if command == _READ:
            self._read += length
        elif command == _WRITE:
            self._written += length

    def stats(self) -> ExportStats:
        """Counters so far; cheap."""
        found = self.backend.stats()
        hits, read, written = (0, 0, 0) if found is None else (found.hits, found.bytes_read, found.bytes_written)
        return ExportStats(hits, self._faults, self._read + read, self._written + written, found)

    def flags(self, *, structured: bool) -> TransmissionFlag:
        """What a client is told that the export can do."""
        flags = _ALWAYS
        if structured:
            flags |= TransmissionFlag.SEND_DF
        return flags | (_WRITABLE if self.writable else TransmissionFlag.READ_ONLY)

    def block_sizes(self) -> BlockSizes:
        """Sizes at which requests are possible, and good."""
        driver = self.backend.node.driver
        minimum = driver.request_alignment
        # Clients keep to multiples of the minimum; a tail shorter than it would be out of their reach.
        if minimum > _MAX_MINIMUM or self.backend.size() % minimum:
            minimum = 1
        cluster = driver.info().cluster_size or 0
        if cluster & (cluster - 1) or cluster > MAX_REQUEST:
            cluster = 0
        return BlockSizes(minimum, max(minimum, cluster, _MIN_PREFERRED), MAX_REQUEST)


@dataclass(frozen=True, slots=True)
class Negotiated:
    """The outcome of a handshake: all that the transmission phase needs beside the wire.

    Attributes:
        export: the export chosen.
        size: as told to the client, bytes.
        flags: as told to the client.
        structured: structured replies are on.
        contexts: selected metadata contexts by id.
        alignment: descriptors of block status are multiples of this, bytes.
    """

    export: NbdExport
    size: int
    flags: TransmissionFlag
    structured: bool
    contexts: dict[int, MetaContext]
    alignment: int


class ExportTable:
    """The exports of a server, by name."""

    def __init__(self) -> None:
        self._exports: dict[str, NbdExport] = {}
        self._reserved: set[str] = set()

    def __iter__(self) -> Iterator[NbdExport]:
        return iter(self._exports.values())

    def __len__(self) -> int:
        return len(self._exports)

    def add(self, export: NbdExport) -> None:
        """Raises:
        GraphError: the name is taken.
        """
        self._check_free(export.name)
        self._exports[export.name] = export

    def reserve(self, name: str) -> None:
        """Nobody else can add an export of that name before `release`.

        Raises:
            GraphError: the name is taken.
        """
        self._check_free(name)
        self._reserved.add(name)

    def release(self, name: str) -> None:
        """Undo `reserve`."""
        self._reserved.discard(name)

    def _check_free(self, name: str) -> None:
        if name in self._exports or name in self._reserved:
            raise GraphError(f"there is already an NBD export named '{name}'", hint="give it another 'name'")

    def get(self, name: str) -> NbdExport:
        """Raises:
        GraphError: there is none of that name.
        """
        try:
            return self._exports[name]
        except KeyError:
            known = ", ".join(f"'{known}'" for known in self._exports) or "none"
            raise GraphError(f"no NBD export is named '{name}' (there are: {known})") from None

    def remove(self, export: NbdExport) -> None:
        """Clients no longer find it."""
        del self._exports[export.name]

    def find(self, name: str) -> NbdExport | None:
        """What a client gets that asks for `name`: the empty name means the only export, when there is one only."""
        if not name and len(self._exports) == 1:
            return next(iter(self._exports.values()))
        return self._exports.get(name)

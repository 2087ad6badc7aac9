# SPDX-FileCopyrightText: blockgraph contributors
# SPDX-License-Identifier: MIT
"""What a graph file may say about exports: sections `exports` and `nbd-server`.

Names follow QEMU's BlockExportOptions and NbdServerOptions.
"""

from __future__ import annotations

from typing import Annotated

import msgspec

from blockgraph.options import BitmapRef
from blockgraph.text import SIZE_PATTERN, parse_size

_MAX_STRING = 4096  # of the NBD protocol, bytes

#: Least memory of an extent map, and what it has unless told otherwise, bytes (native/extent_map.h).
MIN_EXTENT_MAP = 256 << 10
DEFAULT_EXTENT_MAP = 64 << 20

_Bytes = Annotated[int, msgspec.Meta(ge=MIN_EXTENT_MAP, le=(1 << 63) - 1)]
_Text = Annotated[str, msgspec.Meta(extra_json_schema={"pattern": SIZE_PATTERN})]


class NbdExportOptions(
    msgspec.Struct, kw_only=True, rename="kebab", forbid_unknown_fields=True, frozen=True, tag_field="type", tag="nbd"
):
    """A node served over NBD.

    Attributes:
        id: unique among exports.
        node_name: the node to serve.
        name: by which clients ask for it, at most 4096 bytes; the node's name when omitted.
        description: shown to clients, at most 4096 bytes.
        writable: clients may write.
        bitmaps: dirty bitmaps that clients can ask for, as contexts qemu:dirty-bitmap:NAME: what each holds at the
            instant at which the export starts, whatever is written later. A name is looked for on the node and on
            those below it that it shows (through filters and backing files); or a table of node and name.
        allocation_depth: clients can ask for the context qemu:allocation-depth: which layer of a backing chain has
            the bytes.
        extent_map_size: most memory for remembering where the disk's bytes live, which serves requests without Python;
            at least 256k. A fragmented disk needs 4 bytes for each of its clusters (8 where several images have them)
            or 20 for each run of them, whichever is less; others next to nothing. What has not been used for longest
            is forgotten. Bytes, or a string such as "64M", the default.
    """

    id: str
    node_name: str
    name: str | None = None
    description: str = ""
    writable: bool = False
    bitmaps: tuple[str | BitmapRef, ...] = ()
    allocation_depth: bool = False
    extent_map_size: _Bytes | _Text = DEFAULT_EXTENT_MAP

    @property
    def export_name(self) -> str:
        """The name clients ask for."""
        return self.node_name if self.name is None else self.name

    @property
    def extent_map_bytes(self) -> int:
        """`extent_map_size` as a number."""
        size = self.extent_map_size
        return size if isinstance(size, int) else parse_size(size)

    def __post_init__(self) -> None:
        try:
            size = self.extent_map_bytes
        except ValueError as error:
            raise ValueError(f"extent-map-size: {error}") from None
        if size < MIN_EXTENT_MAP:
            raise ValueError(f"extent-map-size is {size} bytes, and at least {MIN_EXTENT_MAP} are needed")
        names: set[str] = set()
        for wanted in self.bitmaps:
            name = wanted if isinstance(wanted, str) else wanted.name
            if name in names:
                raise ValueError(f"bitmaps: two are named '{name}', and clients could not tell them apart")
            names.add(name)
        for member, value in (("name", self.name or ""), ("description", self.description)):
            if len(value.encode()) > _MAX_STRING:
                raise ValueError(f"{member} is longer than {_MAX_STRING} bytes")
            if "\0" in value:
                raise ValueError(f"{member} contains a NUL character")


class UnixAddress(
    msgspec.Struct, kw_only=True, rename="kebab", forbid_unknown_fields=True, frozen=True, tag_field="type", tag="unix"
):
    """A socket in the file system.

    Attributes:
        path: of the socket file, made by the server and removed at its end.
    """

    path: str


class InetAddress(
    msgspec.Struct, kw_only=True, rename="kebab", forbid_unknown_fields=True, frozen=True, tag_field="type", tag="inet"
):
    """A TCP port.

    Attributes:
        host: name or address to listen at; empty: every address of the machine.
        port: number, or name of a service; 0: any free one.
    """

    host: str
    port: str | int = 10809

    def __post_init__(self) -> None:
        number = int(self.port) if isinstance(self.port, int) or self.port.isdecimal() else 0
        if not 0 <= number <= 65535:
            raise ValueError(f"port {self.port} is not in 0..65535")


class TlsCredentials(msgspec.Struct, kw_only=True, rename="kebab", forbid_unknown_fields=True, frozen=True):
    """Where the server's X.509 files are: `dir`, or each one; all PEM.

    Attributes:
        dir: holds server-cert.pem, server-key.pem, ca-cert.pem and perhaps ca-crl.pem (QEMU's tls-creds-x509).
        cert, key: certificate (chain) and private key of the server.
        ca: certificates of the authorities that sign clients.
        verify_peer: only clients with a certificate signed by `ca` are let in.
        required: clients without TLS are refused.
    """

    dir: str | None = None
    cert: str | None = None
    key: str | None = None
    ca: str | None = None
    verify_peer: bool = True
    required: bool = True

    def __post_init__(self) -> None:
        if self.dir is not None:
            if self.cert or self.key or self.ca:
                raise ValueError("give either 'dir' or 'cert', 'key' and 'ca'")
        elif not (self.cert and self.key):
            raise ValueError("give either 'dir' or 'cert' and 'key'")
        elif self.verify_peer and not self.ca:
            raise ValueError("'ca' is needed to verify clients; or set 'verify-peer' to false")


class NbdServerOptions(msgspec.Struct, kw_only=True, rename="kebab", forbid_unknown_fields=True, frozen=True):
    """The NBD server of a graph: one address, many exports.

    Attributes:
        addr: where it listens.
        tls_creds: encrypts; None: no TLS.
        max_connections: at once; further clients wait until one leaves; 0: no limit.
        threads: native ones that serve the connections in the clear, each its share of them; 0: the graph's thread
            serves them, as it does TLS. None: one for each processor the process may use, at most 8.
    """

    addr: UnixAddress | InetAddress
    tls_creds: TlsCredentials | None = None
    max_connections: Annotated[int, msgspec.Meta(ge=0)] = 0
    threads: Annotated[int, msgspec.Meta(ge=0, le=64)] | None = None

# SPDX-FileCopyrightText: blockgraph contributors
# SPDX-License-Identifier: MIT
"""The header of a qcow2 image and its extensions: parsed, every field judged, and packed again.

```
    cluster 0:  | header 72 (v2) or >= 104 (v3) | extension | extension | ... | end | backing file name |     |
```

Fields are updated in place, so what this code does not know (extensions, later fields) is kept as it is.
Source: qcow2 specification (QEMU, docs/interop/qcow2), "Header" to "Bitmaps extension".
"""

from __future__ import annotations

import enum
import struct
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import pairwise

from blockgraph.errors import CorruptImage, Unsupported

MAGIC = b"QFI\xfb"
MIN_CLUSTER_BITS = 9
MAX_CLUSTER_BITS = 21
#: Bounds on what one image may make us hold in memory, bytes; the same as QEMU's.
MAX_L1_BYTES = 32 << 20
MAX_REFTABLE_BYTES = 8 << 20
MAX_BACKING_NAME = 1023
MAX_SNAPSHOTS = 65536
#: L1 and L2 entries, refcount table entries: bits of a host offset.
OFFSET_MASK = 0x00FF_FFFF_FFFF_FE00
COPIED = 1 << 63

_V2 = struct.Struct(">4sIQIIQIIQQIIQ")
_V3 = struct.Struct(">QQQII")
V2_LENGTH = 72
V3_LENGTH = 104
#: What this code writes: up to the compression type, padded.
WRITTEN_LENGTH = 112

#: Where fields that change lie in the file: one pwrite each, inside one sector.
SIZE_AND_L1 = 24
REFTABLE = 48
INCOMPATIBLE = 72
AUTOCLEAR = 88


class Incompatible(enum.IntFlag):
    """Features without which an image can not be read right."""

    DIRTY = 1
    CORRUPT = 2
    DATA_FILE = 4
    COMPRESSION_TYPE = 8
    EXTENDED_L2 = 16


class Autoclear(enum.IntFlag):
    """Features whose bit must go before somebody who does not know them writes."""

    BITMAPS = 1
    RAW_DATA_FILE = 2


class Compression(enum.IntEnum):
    """How compressed clusters are compressed."""

    ZLIB = 0
    ZSTD = 1


class Extension(enum.IntEnum):
    """Types of header extensions."""

    END = 0
    BACKING_FORMAT = 0xE2792ACA
    FEATURE_NAMES = 0x6803F857
    BITMAPS = 0x23852875
    ENCRYPTION = 0x0537BE77
    DATA_FILE = 0x44415441
    #: Ours: room that a bitmaps extension left, and takes again. Nobody else knows it, so everybody ignores it.
    UNUSED = 0x62675F30


#: Compatible feature: refcount updates may be postponed.
LAZY_REFCOUNTS = 1
_KNOWN = Incompatible.DIRTY | Incompatible.CORRUPT | Incompatible.COMPRESSION_TYPE
_DEFINED = int(_KNOWN | Incompatible.DATA_FILE | Incompatible.EXTENDED_L2)  # an int: ~IntFlag drops the bits it lacks
_UNSUPPORTED = {Incompatible.DATA_FILE: "external data file", Incompatible.EXTENDED_L2: "extended L2 entries"}
_RESTORE = "the image is damaged: restore it from a backup"
_ENCRYPTION = {1: "AES encryption", 2: "LUKS encryption"}


@dataclass
class Header:
    """Fields of the header, in bytes, bits and clusters as the specification has them.

    Attributes:
        encryption: the crypt_method; never other than 0 in an image that is opened.
        extensions: (type, data) in the order of the file.
    """

    version: int
    cluster_bits: int
    size: int
    l1_size: int
    l1_offset: int
    reftable_offset: int
    reftable_clusters: int
    snapshots: int = 0
    snapshots_offset: int = 0
    incompatible: int = 0
    compatible: int = 0
    autoclear: int = 0
    refcount_order: int = 4
    length: int = V2_LENGTH
    compression: int = Compression.ZLIB
    backing_file: str | None = None
    encryption: int = 0
    extensions: list[tuple[int, bytes]] = field(default_factory=list)

    @property
    def cluster_size(self) -> int:
        """Bytes."""
        return 1 << self.cluster_bits

    @property
    def backing_format(self) -> str | None:
        """Driver name of the backing file, when the image says it."""
        for kind, data in self.extensions:
            if kind == Extension.BACKING_FORMAT and data:
                return data.decode("utf-8", "replace")
        return None

    def extension(self, kind: Extension) -> bytes | None:
        """Data of the header extension of that type; None: there is none."""
        return next((data for found, data in self.extensions if found == kind), None)

    def pack(self) -> bytes:
        """The header with extensions and backing file name, from byte 0 on; at most one cluster.

        Raises:
            ValueError: it does not fit into a cluster.
        """
        extensions = b"".join(
            struct.pack(">II", kind, len(data)) + data + bytes(-len(data) % 8)
            for kind, data in [*self.extensions, (int(Extension.END), b"")]
        )
        name = (self.backing_file or "").encode()
        name_at = self.length + len(extensions)
        if name_at + len(name) > self.cluster_size:
            raise ValueError("the header does not fit into a cluster")
        head = _V2.pack(
            MAGIC,
            self.version,
            name_at if name else 0,
            len(name),
            self.cluster_bits,
            self.size,
            0,
            self.l1_size,
            self.l1_offset,
            self.reftable_offset,
            self.reftable_clusters,
            self.snapshots,
            self.snapshots_offset,
        )
        if self.version >= 3:
            head += _V3.pack(self.incompatible, self.compatible, self.autoclear, self.refcount_order, self.length)
            head += bytes([self.compression])
        return head.ljust(self.length, b"\0") + extensions + name

    def pack_size_and_l1(self) -> bytes:
        """The bytes at SIZE_AND_L1 (no encryption)."""
        return struct.pack(">QIIQ", self.size, 0, self.l1_size, self.l1_offset)

    def pack_reftable(self) -> bytes:
        """The bytes at REFTABLE."""
        return struct.pack(">QI", self.reftable_offset, self.reftable_clusters)


def l1_entries(size: int, cluster_bits: int) -> int:
    """L1 entries that a disk of `size` bytes needs."""
    return -(-size >> (2 * cluster_bits - 3))


def walk_extensions(data: bytes, at: int, end: int) -> Iterator[tuple[int, int, int]]:
    """Type, offset (of its type and length, 8 bytes) and length of each extension from `at` up to the end mark, or to
    `end`, which a damaged one may pass."""
    while at + 8 <= end:
        kind, length = struct.unpack_from(">II", data, at)
        if kind == Extension.END:
            return
        yield kind, at, length
        at += 8 + length + -length % 8


def parse_header(data: bytes, file_size: int, node: str, unsupported: list[str] | None = None) -> Header:
    """Parse and judge the header.

    Args:
        data: the first cluster, or as much of it as the file has (at least the first 2 MiB or the whole file).
        file_size: bytes.
        node: for messages.
        unsupported: for who only wants to look: takes the names of features this code does not have, which then do
            not raise.
    Raises:
        CorruptImage: naming field and value.
        Unsupported: naming the feature, or the version (also with `unsupported`: its header is unknown).
    """
    return _Parser(data, file_size, node, unsupported).parse()


class _Parser:
    def __init__(self, data: bytes, file_size: int, node: str, unsupported: list[str] | None) -> None:
        self._data = data
        self._file_size = file_size
        self._node = node
        self._unsupported = unsupported

    def _bad(self, name: str, value: object, why: str) -> CorruptImage:
        return CorruptImage(f"header field {name} is {value}: {why}", node=self._node, op="open", hint=_RESTORE)

    def _missing(self, feature: str) -> Unsupported:
        return Unsupported(
            f"the image uses {feature}, which is not supported",
            node=self._node,
            op="open",
            hint="convert it with 'qemu-img convert'",
        )

    def _refuse(self, feature: str) -> None:
        if self._unsupported is None:
            raise self._missing(feature)
        self._unsupported.append(feature)

    def parse(self) -> Header:
        data = self._data
        if len(data) < V2_LENGTH or data[:4] != MAGIC:
            raise CorruptImage("is not a qcow2 image", node=self._node, op="open", hint="check its format and name")
        (
            _,
            version,
            name_at,
            name_length,
            cluster_bits,
            size,
            encryption,
            l1_size,
            l1_offset,
            reftable_offset,
            reftable_clusters,
            snapshots,
            snapshots_offset,
        ) = _V2.unpack_from(data)
        if version not in (2, 3):
            raise self._missing(f"qcow2 version {version}")
        if not MIN_CLUSTER_BITS <= cluster_bits <= MAX_CLUSTER_BITS:
            raise self._bad("cluster_bits", cluster_bits, f"not {MIN_CLUSTER_BITS} to {MAX_CLUSTER_BITS}")
        header = Header(
            version,
            cluster_bits,
            size,
            l1_size,
            l1_offset,
            reftable_offset,
            reftable_clusters,
            snapshots,
            snapshots_offset,
        )
        if version >= 3:
            self._parse_v3(header)
        self._parse_extensions(header, name_at)
        self._check_features(header)
        header.encryption = encryption
        if encryption:
            self._refuse(_ENCRYPTION.get(encryption, f"crypt_method {encryption}"))
        self._check_tables(header)
        header.backing_file = self._backing_name(header, name_at, name_length)
        return header

    def _parse_v3(self, header: Header) -> None:
        data = self._data
        if len(data) < V3_LENGTH:
            raise CorruptImage("the file ends inside the header", node=self._node, op="open", hint=_RESTORE)
        header.incompatible, header.compatible, header.autoclear, header.refcount_order, header.length = (
            _V3.unpack_from(data, V2_LENGTH)
        )
        if header.length < V3_LENGTH or header.length % 8:
            raise self._bad("header_length", header.length, f"not a multiple of 8 from {V3_LENGTH} on")
        if header.length > min(header.cluster_size, len(data)):
            raise self._bad("header_length", header.length, "past the end of the first cluster or of the file")
        if header.refcount_order > 6:
            raise self._bad("refcount_order", header.refcount_order, "above 6")
        if header.length > V3_LENGTH:
            header.compression = data[V3_LENGTH]

    def _parse_extensions(self, header: Header, name_at: int) -> None:
        """Up to the end mark, or the backing file's name, or the end of the cluster."""
        end = min(header.cluster_size, len(self._data))
        if header.length <= name_at < end:
            end = name_at
        for kind, at, length in walk_extensions(self._data, header.length, end):
            if at + 8 + length > end:
                raise CorruptImage(
                    f"header extension {kind:#010x} is {length} bytes long: past the end of the first cluster",
                    node=self._node,
                    op="open",
                    hint=_RESTORE,
                )
            header.extensions.append((kind, self._data[at + 8 : at + 8 + length]))

    def _check_features(self, header: Header) -> None:
        bits = header.incompatible
        names = [name for bit, name in _UNSUPPORTED.items() if bits & bit]
        unknown = bits & ~_DEFINED
        if unknown:
            table = dict(_feature_names(header))
            names += [
                f"'{table[bit]}'" if bit in table else f"unknown incompatible feature bit {bit}"
                for bit in range(64)
                if unknown >> bit & 1
            ]
        if names:
            self._refuse(", ".join(names))
        if header.refcount_order != 4:
            self._refuse(f"refcounts of {1 << header.refcount_order} bits")
        if bits & Incompatible.COMPRESSION_TYPE:
            if header.compression == Compression.ZLIB:
                raise self._bad("compression_type", 0, "the feature bit says that it is not zlib")
            if header.compression != Compression.ZSTD:
                self._refuse(f"compression type {header.compression}")
        elif header.compression != Compression.ZLIB:
            raise self._bad("compression_type", header.compression, "its feature bit is not set")

    def _check_tables(self, header: Header) -> None:
        if header.size > (MAX_L1_BYTES // 8) << (2 * header.cluster_bits - 3):
            raise self._bad("size", header.size, f"more than an L1 table of {MAX_L1_BYTES} bytes reaches")
        if header.l1_size > MAX_L1_BYTES // 8:
            raise self._bad("l1_size", header.l1_size, f"more than {MAX_L1_BYTES} bytes")
        needed = l1_entries(header.size, header.cluster_bits)
        if header.l1_size < needed:
            raise self._bad("l1_size", header.l1_size, f"a disk of {header.size} bytes needs {needed}")
        if header.reftable_clusters << header.cluster_bits > MAX_REFTABLE_BYTES:
            raise self._bad("refcount_table_clusters", header.reftable_clusters, f"over {MAX_REFTABLE_BYTES} bytes")
        if not header.reftable_clusters:
            raise self._bad("refcount_table_clusters", 0, "there is no refcount table")
        if header.snapshots > MAX_SNAPSHOTS:
            raise self._bad("nb_snapshots", header.snapshots, f"more than {MAX_SNAPSHOTS}")
        areas = [("refcount_table_offset", header.reftable_offset, header.reftable_clusters)]
        if header.l1_size:
            areas.append(("l1_table_offset", header.l1_offset, -(-header.l1_size * 8 >> header.cluster_bits)))
        if header.snapshots:
            areas.append(("snapshots_offset", header.snapshots_offset, 1))
        for name, offset, _ in areas:
            self._check_offset(header, name, offset)
        areas.sort(key=lambda area: area[1])
        for (_, low, clusters), (name, offset, _) in pairwise(areas):
            if low + (clusters << header.cluster_bits) > offset:
                raise self._bad(name, offset, "overlaps another table")

    def _check_offset(self, header: Header, name: str, offset: int) -> None:
        if offset & (header.cluster_size - 1):
            raise self._bad(name, offset, f"not aligned to clusters of {header.cluster_size} bytes")
        if not offset:
            raise self._bad(name, offset, "overlaps the header")
        if offset >= self._file_size:
            raise self._bad(name, offset, f"past the end of the file ({self._file_size} bytes)")

    def _backing_name(self, header: Header, at: int, length: int) -> str | None:
        if not at:
            return None
        if length > MAX_BACKING_NAME:
            raise self._bad("backing_file_size", length, f"more than {MAX_BACKING_NAME}")
        if at < header.length or at + length > min(header.cluster_size, len(self._data)):
            raise self._bad("backing_file_offset", at, "not inside the first cluster, behind the header")
        name = self._data[at : at + length]
        if b"\0" in name:
            raise self._bad("backing_file_offset", at, "the name has a zero byte")
        return name.decode("utf-8", "surrogateescape") or None


def _feature_names(header: Header) -> Iterator[tuple[int, str]]:
    """Incompatible bits that the image's own feature table names."""
    for kind, data in header.extensions:
        if kind == Extension.FEATURE_NAMES:
            for at in range(0, len(data) - 47, 48):
                if data[at] == 0:
                    name = data[at + 2 : at + 48].split(b"\0")[0].decode("utf-8", "replace")
                    yield data[at + 1], "".join(c if c.isprintable() else "?" for c in name)

# SPDX-FileCopyrightText: blockgraph contributors
# SPDX-License-Identifier: MIT
"""Manifest: what a backup is, in one small JSON file; the file's being there makes the backup one.

```
    vda-20261129T010203Z-1f0c9a7e.json      the manifest, written last, at once or not at all
    vda-20261129T010203Z-1f0c9a7e.qcow2     the image: qcow2, raw, or patch
    vda-20261129T010203Z-1f0c9a7e.sums      what it covers, and its checksums (blockgraph.chains.sumsfile)
```

A manifest with state "running" is written when the backup begins: after a crash it tells what the files were, and which
bitmap belongs to them.

Manifests are untrusted input: files are named without directories, and every number is checked here.
"""

from __future__ import annotations

import os
import re
import stat
from contextlib import suppress
from datetime import UTC, datetime
from typing import Annotated, Literal

import msgspec
from msgspec import Meta

from blockgraph.durable import sync_directory
from blockgraph.errors import GraphError, IOFailure
from blockgraph.formats.patch import digest
from blockgraph.native.sums import MAX_CHUNKS

FORMAT: Literal["blockgraph-backup"] = "blockgraph-backup"
VERSION = 1

#: Longest manifest, bytes.
MAX_BYTES = 64 << 10

#: Chunks are no smaller: 16 MiB of checksums for each TiB of data, and damage is told within 1 MiB.
MIN_CHUNK = 1 << 20
_MAX_CHUNK = 2 << 30

Kind = Literal["full", "incremental", "differential"]
ImageFormat = Literal["raw", "qcow2", "patch"]

_FILE = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._+-]{0,199}")
_Id = Annotated[str, Meta(pattern=r"^[0-9a-f]{32}$")]
_Size = Annotated[int, Meta(ge=0, le=(1 << 63) - 1)]
_Digest = Annotated[str, Meta(pattern=r"^[0-9a-f]{32}$")]
_Name = Annotated[str, Meta(min_length=1, max_length=1023)]


class _Part(msgspec.Struct, kw_only=True, rename="kebab", forbid_unknown_fields=True, frozen=True):
    pass


class Disk(_Part, kw_only=True, frozen=True):
    """What was backed up.

    Attributes:
        name: of the node.
        size: bytes.
    """

    name: _Name
    size: _Size


class BitmapInfo(_Part, kw_only=True, frozen=True):
    """The dirty bitmap that counts from this backup on.

    Attributes:
        name: of the disk's bitmap.
        granularity: bytes.
    """

    name: _Name
    granularity: Annotated[int, Meta(ge=512, le=2 << 30)]


class SumsInfo(_Part, kw_only=True, frozen=True):
    """The file with what is covered and the checksums.

    Attributes:
        file: its name, beside the manifest.
        length: bytes.
        digest: BLAKE2b of 16 bytes.
    """

    file: str
    length: _Size
    digest: _Digest


class Manifest(_Part, kw_only=True, frozen=True):
    """See the module's text.

    Attributes:
        format, version: "blockgraph-backup", 1.
        id: 32 hexadecimal digits, random.
        state: "running" until the image is complete and durable.
        time: the point in time, UTC, "2026-11-29T01:02:03.456789Z".
        kind: "full" has everything; "incremental" what changed since `parent`, the backup before; "differential" the
            same since `parent`, the last backup that is not differential.
        parent: id of the backup that this one changes; None for "full".
        disk: what was backed up.
        bitmap: what counts from this backup on; None: nothing does.
        image, image_format: the image's file, beside the manifest.
        cluster_size: what is covered are multiples of it, bytes.
        chunk_size: of the checksums, bytes.
        covered: bytes of the disk that the image has.
        sums: None while it is running.
        writer: "blockgraph 0.1.0".
        digest: of everything else, see `seal`.
    """

    format: Literal["blockgraph-backup"] = FORMAT
    version: Annotated[int, Meta(ge=1)] = VERSION
    id: _Id
    state: Literal["running", "complete"]
    time: str
    kind: Kind
    parent: _Id | None = None
    disk: Disk
    bitmap: BitmapInfo | None = None
    image: str
    image_format: ImageFormat
    cluster_size: Annotated[int, Meta(ge=512, le=2 << 30)]
    chunk_size: Annotated[int, Meta(ge=MIN_CHUNK, le=_MAX_CHUNK)]
    covered: _Size = 0
    sums: SumsInfo | None = None
    writer: str
    digest: str = ""

    @property
    def when(self) -> datetime:
        """The point in time."""
        return datetime.fromisoformat(self.time)

    @property
    def short(self) -> str:
        """The first eight digits of the id, as people write it."""
        return self.id[:8]


class _Header(msgspec.Struct, frozen=True):
    format: str
    version: int


def chunk_size(size: int) -> int:
    """Bytes of a chunk of a disk: MIN_CHUNK, more where there would be more than MAX_CHUNKS of them.

    Raises:
        GraphError: the disk is too large for checksums.
    """
    chunk = MIN_CHUNK
    while size > chunk * MAX_CHUNKS:
        chunk *= 2
    if chunk > _MAX_CHUNK:
        raise GraphError(f"a disk of {size} bytes is too large for checksums", op="backup")
    return chunk


def now() -> str:
    """This instant as manifests have it."""
    return datetime.now(UTC).isoformat(timespec="microseconds").replace("+00:00", "Z")


def check_file_name(name: str) -> bool:
    """It names a file beside the manifest, and nothing else."""
    return _FILE.fullmatch(name) is not None and ".." not in name


def seal(manifest: Manifest) -> Manifest:
    """With its digest: BLAKE2b of 16 bytes of its JSON with an empty digest."""
    blank = msgspec.structs.replace(manifest, digest="")
    return msgspec.structs.replace(manifest, digest=digest(msgspec.json.encode(blank)).hex())


def encode(manifest: Manifest) -> bytes:
    """The file's bytes."""
    return msgspec.json.format(msgspec.json.encode(seal(manifest)), indent=2) + b"\n"


def decode(data: bytes, path: str) -> Manifest:
    """Check and take a manifest.

    Raises:
        GraphError: what is wrong with it.
    """

    def wrong(reason: str, hint: str | None = None) -> GraphError:
        return GraphError(f"manifest '{path}' {reason}", op="load", hint=hint)

    try:
        head = msgspec.json.decode(data, type=_Header)
        if head.format != FORMAT:
            raise wrong("is not of a backup")
        if head.version > VERSION:
            raise wrong(f"has version {head.version}, only {VERSION} is known", "use a newer blockgraph")
        manifest = msgspec.json.decode(data, type=Manifest)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise wrong(f"is damaged: {error}") from error
    if seal(manifest).digest != manifest.digest:
        raise wrong("is damaged: it does not have its checksum")
    try:
        if manifest.when.tzinfo is None:
            raise ValueError("no time zone")
    except ValueError as error:
        raise wrong(f"has a wrong time: {error}") from error
    if (manifest.kind == "full") != (manifest.parent is None):
        raise wrong(f"is '{manifest.kind}', which does not go with its parent")
    if manifest.parent == manifest.id:
        raise wrong("is its own parent")
    if (manifest.state == "complete") != (manifest.sums is not None):
        raise wrong(f"is '{manifest.state}', which does not go with its checksums")
    for name in (manifest.image, *([manifest.sums.file] if manifest.sums else [])):
        if not check_file_name(name):
            raise wrong(f"names file '{name}', which is not a plain name beside it")
    cluster = manifest.cluster_size
    if cluster & (cluster - 1) or (manifest.chunk_size % cluster and cluster % manifest.chunk_size):
        raise wrong(f"has cluster size {cluster}, which is no power of two")
    if manifest.chunk_size != chunk_size(manifest.disk.size):
        raise wrong(f"has chunks of {manifest.chunk_size} bytes, which do not go with its disk")
    return manifest


def read(path: str) -> Manifest:
    """Read a manifest.

    Raises:
        IOFailure: it can not be read.
        GraphError: what is wrong with it.
    """
    return decode(read_small(path, MAX_BYTES), path)


def read_small(path: str, limit: int) -> bytes:
    """A regular file of at most `limit` bytes; symbolic links are not followed.

    Raises:
        IOFailure: it can not be read.
        GraphError: it is longer, or no regular file.
    """
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK)
        try:
            if not stat.S_ISREG(os.fstat(fd).st_mode):
                raise GraphError(f"'{path}' is not a regular file", op="load")
            with os.fdopen(fd, "rb", closefd=False) as file:
                data = file.read(limit + 1)
        finally:
            os.close(fd)
    except OSError as error:
        raise IOFailure.from_oserror(error, node=path, op="read") from error
    if len(data) > limit:
        raise GraphError(f"'{path}' has more than {limit} bytes", op="load")
    return data


def write_durably(path: str, data: bytes) -> None:
    """Make a file have these bytes, at once or not at all, and durably.

    Raises:
        IOFailure: it could not be written; a file of that name is as it was.
    """
    partial = path + ".new"
    try:
        with open(partial, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
        sync_directory(os.path.dirname(path))
    except OSError as error:
        with suppress(OSError):
            os.unlink(partial)
        raise IOFailure.from_oserror(error, node=path, op="write") from error

# SPDX-FileCopyrightText: blockgraph contributors
# SPDX-License-Identifier: MIT
"""Recorder: what makes a backup job's target the next link of a chain.

```
    plan      which backup can be the parent, or why a full one is needed
    create    image and manifest ("running"), before the transaction
    begin     in the transaction: a new bitmap counts from this instant; sums of what is copied
    record    all is copied and flushed: sums, then manifest ("complete"), durably
    commit    the parent's bitmap is not needed any more
```

Each backup that others can build on has a dirty bitmap of its own, named after it, on the disk. So a backup fits its
parent if, and only if, the parent's bitmap is there and trusted: another chain can not clear it. A bitmap goes when a
newer backup is durable. A crash leaves too many bitmaps, never too few; the next backup removes those left over.
"""

from __future__ import annotations

import asyncio
import logging
import os
import re
import uuid
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

from msgspec.structs import replace

import blockgraph
from blockgraph.bitmaps.actions import AddBitmap, BitmapName, RemoveBitmap
from blockgraph.block_copy import CopyFailed
from blockgraph.chains import manifest as manifests
from blockgraph.chains import sumsfile
from blockgraph.chains.chain import MAX_DEPTH, Backup, Chain
from blockgraph.chains.images import whole
from blockgraph.chains.manifest import BitmapInfo, Disk, Kind, Manifest, SumsInfo, chunk_size
from blockgraph.create import create_file
from blockgraph.durable import make_directory
from blockgraph.errors import GraphError, IOFailure
from blockgraph.filters.backup_top import MIN_CLUSTER, BackupTop
from blockgraph.finish import finish
from blockgraph.formats.patch import Patch, digest, empty_patch
from blockgraph.native import Bitmap

if TYPE_CHECKING:
    from blockgraph.graph.graph import Graph
    from blockgraph.graph.transaction import Transaction
    from blockgraph.node import Node

log = logging.getLogger(__name__)

ChainSync = Literal["full", "incremental", "differential"]
ChainFormat = Literal["qcow2", "raw"]

#: Bitmaps of chains are named so, with the id of the backup behind it.
_BITMAP = "backup-"


class Plan(NamedTuple):
    """What the next backup is to be.

    Attributes:
        kind: what it is.
        parent: what it changes; None: it is full.
        bitmap: name of the bitmap that has what changed since; None: everything is copied.
        reason: why it is full although another was asked for; None: it is what was asked for.
    """

    kind: Kind
    parent: Backup | None = None
    bitmap: str | None = None
    reason: str | None = None


def plan(chain: Chain, node: Node, disk: str, sync: ChainSync, image_format: ChainFormat) -> Plan:
    """Find the newest backup that this one can change.

    Args:
        node: has the bitmaps.
        disk: name of the disk in the chain.
    """
    if sync == "full":
        return Plan("full")
    points = chain.points(disk)
    if not points:
        return Plan("full", reason="there is no backup of this disk in the chain")
    reason = ""
    for backup in reversed(points):
        unfit = _unfit(chain, backup, node, image_format)
        if unfit is None and backup.manifest.bitmap is not None:
            return Plan(sync, backup, backup.manifest.bitmap.name)
        if backup.manifest.kind != "differential":
            reason = reason or unfit or ""
    return Plan("full", reason=reason)


def _unfit(chain: Chain, backup: Backup, node: Node, image_format: ChainFormat) -> str | None:
    """Why the next backup can not be over this one; None: it can."""
    info = backup.manifest
    if info.disk.size != node.size():
        return f"the disk has {node.size()} bytes, and had {info.disk.size} at the backup of {info.time}"
    if info.bitmap is None:
        return f"nothing counts the changes since the backup of {info.time}"
    bitmap = node.bitmaps.get(info.bitmap.name)
    if bitmap is None:
        return f"the disk has no bitmap of the changes since the backup of {info.time}"
    if bitmap.inconsistent:
        return f"the bitmap of the changes since the backup of {info.time} is inconsistent: it may have missed some"
    if not bitmap.recording:
        return f"the bitmap of the changes since the backup of {info.time} was disabled"
    if image_format == "qcow2" and info.image_format == "patch":
        return f"the backup of {info.time} is a patch, which can not be the backing file of a qcow2 image"
    try:
        way = chain.way(backup)
        for each in way:
            each.check_image()
    except GraphError as error:
        return str(error)
    if len(way) >= MAX_DEPTH:
        return f"the chain has {len(way)} links"
    return None


class Recorder:
    """One backup of a chain, for the job that makes it; see the module's text.

    Attributes:
        plan: what it is.
        node: name of the node with the bitmaps.
        target: description of the image's node.
        manifest: as it is now.
    """

    def __init__(
        self, graph: Graph, device: str, directory: str, sync: ChainSync, image_format: ChainFormat, cluster: int
    ) -> None:
        """Plan it.

        Raises:
            IOFailure: the directory can not be read or made.
        """
        self._graph = graph
        self._directory = directory
        self._known = _load(directory)
        node = graph.node(device).shown()
        size = graph.node(device).size()
        self.node = node.name
        self.plan = plan(self._known, node, device, sync, image_format)
        identity = uuid.uuid4().hex
        time = manifests.now()
        safe = re.sub(r"[^A-Za-z0-9._-]|\.\.+|^[.-]", "_", device)
        self._stem = f"{safe}-{re.sub('[-:]|[.][0-9]+', '', time)}-{identity[:8]}"
        kind: Literal["raw", "qcow2", "patch"] = image_format
        if image_format == "raw" and self.plan.parent is not None:
            kind = "patch"
        bitmap = None
        if self.plan.kind != "differential":
            bitmap = BitmapInfo(name=_BITMAP + identity, granularity=MIN_CLUSTER)
        self.manifest = Manifest(
            id=identity,
            state="running",
            time=time,
            kind=self.plan.kind,
            parent=None if self.plan.parent is None else self.plan.parent.manifest.id,
            disk=Disk(name=device, size=size),
            bitmap=bitmap,
            image=f"{self._stem}.{kind}",
            image_format=kind,
            cluster_size=max(MIN_CLUSTER, cluster),
            chunk_size=chunk_size(size),
            writer=f"blockgraph {blockgraph.__version__}",
        )
        self.target: dict[str, Any] = {}
        self._adding: AddBitmap | None = None
        self._covered: Bitmap | None = None
        self._top: BackupTop | None = None

    # Start.

    async def create(self) -> dict[str, Any]:
        """Make the image's file, and the manifest that tells whose it is; returns the description of its node.

        Raises:
            IOFailure: they can not be made; nothing is left.
        """
        info, parent = self.manifest, self.plan.parent
        image = self._path(info.image)
        size = info.disk.size
        if info.image_format == "patch":
            _write_new(image, empty_patch(size, info.cluster_size))
        elif info.image_format == "raw":
            await create_file(image, size, "raw", replace=False)
        else:
            options: dict[str, Any] = {}
            if parent is not None:
                options = {"backing_file": parent.manifest.image, "backing_fmt": parent.manifest.image_format}
            await create_file(image, size + -size % 512, "qcow2", replace=False, **options)
        try:
            await self._write(info)
        except BaseException:
            self.remove_files()
            raise
        self.target = {"driver": info.image_format, "file": {"driver": "file", "filename": image}}
        if info.image_format == "qcow2":
            self.target["backing"] = None if parent is None else whole(self._known.way(parent))
            if size % 512:
                self.target = {"driver": "raw", "size": size, "file": self.target}
        return self.target

    async def begin(self, change: Transaction, top: BackupTop) -> None:
        """In the transaction that is the point in time, with `top` in place and told what to keep.

        Raises:
            BlockGraphError: the transaction fails; call `undo`.
        """
        self._top = top
        self._covered = top.copy.bitmap.copy()
        if self.manifest.bitmap is not None:
            await self._add_bitmap(change, self.manifest.bitmap)
        driver = top.target.node.driver
        if isinstance(driver, Patch):
            await driver.lay_out(self._covered)
        top.copy.add_sums(self.manifest.chunk_size)
        self.manifest = replace(
            self.manifest,
            time=manifests.now(),
            cluster_size=self._covered.granularity,
            covered=self._covered.count(),
        )

    async def _add_bitmap(self, change: Transaction, info: BitmapInfo) -> None:
        store = change.node(self.node).bitmap_store
        for persistent in (True, False) if store is not None else (False,):
            name = BitmapName(self.node, info.name)
            self._adding = AddBitmap(name, granularity=info.granularity, persistent=persistent)
            try:
                await self._adding.prepare(change)
                return
            except GraphError as error:
                if not persistent:
                    raise
                log.warning("the bitmap of the chain will not be kept: %s", error)

    async def undo(self) -> None:
        """The transaction fails."""
        if self._adding is not None:
            await self._adding.abort()
            self._adding = None

    # End.

    async def record(self) -> None:
        """Everything is copied, and the target was flushed: make it a backup.

        Raises:
            BlockGraphError: it could not be; call `discard`.
        """
        assert self._top is not None
        assert self._covered is not None
        copy = self._top.copy
        assert copy.sums is not None
        try:
            await copy.complete_sums(self._covered)
        except CopyFailed as failure:
            raise failure.error from failure
        data = await asyncio.to_thread(sumsfile.encode, copy.sums, self._covered)
        name = f"{self._stem}.sums"
        await _write_durably(self._path(name), data)
        sums = SumsInfo(file=name, length=len(data), digest=digest(data).hex())
        self.manifest = replace(self.manifest, state="complete", sums=sums)
        await self._write(self.manifest)

    async def commit(self) -> None:
        """The job has succeeded: remove the chain's bitmaps that nothing needs any more.

        Raises:
            GraphError: one could not be removed; the backup is complete all the same.
        """
        if self.plan.kind != "differential":
            await self._remove_bitmaps(but=self.manifest.id)

    async def _remove_bitmaps(self, *, but: str) -> None:
        node = self._graph.node(self.node)
        known = {each.manifest.id for each in self._known.backups.values()} | {self.manifest.id}
        async with self._graph.transaction() as change:  # only now: another backup may be removing some
            for name, bitmap in node.bitmaps.items():
                if name.removeprefix(_BITMAP) in known - {but} and not bitmap.holders:
                    change.act(RemoveBitmap(BitmapName(self.node, name)))

    async def discard(self) -> None:
        """The job has failed: nothing of the backup is left.

        Raises:
            GraphError: its bitmap could not be removed.
        """
        self.remove_files()
        name = None if self.manifest.bitmap is None else self.manifest.bitmap.name
        async with self._graph.transaction() as change:
            if name in self._graph.node(self.node).bitmaps:  # else a later backup has removed it
                change.act(RemoveBitmap(BitmapName(self.node, str(name))))

    def remove_files(self) -> None:
        """Manifest first, so that no reader finds one without its files."""
        for name in (f"{self._stem}.json", f"{self._stem}.sums", self.manifest.image):
            try:
                os.unlink(self._path(name))
            except FileNotFoundError:
                pass
            except OSError as error:
                log.error("'%s' is of no use and could not be removed: %s", self._path(name), error)

    def _path(self, name: str) -> str:
        return os.path.join(self._directory, name)

    async def _write(self, manifest: Manifest) -> None:
        await _write_durably(self._path(f"{self._stem}.json"), manifests.encode(manifest))


def _load(directory: str) -> Chain:
    try:
        make_directory(directory)
    except OSError as error:
        raise IOFailure.from_oserror(error, node=directory, op="create") from error
    chain = Chain.load(directory)
    for path, problem in chain.damaged.items():
        log.warning("chain '%s': %s: %s", directory, path, problem)
    return chain


async def _write_durably(path: str, data: bytes) -> None:
    """Cancelled: it is written first, or it would be after the files have been removed."""
    await finish(asyncio.to_thread(manifests.write_durably, path, data))


def _write_new(path: str, data: bytes) -> None:
    try:
        with open(path, "xb") as file:
            file.write(data)
    except OSError as error:
        raise IOFailure.from_oserror(error, node=path, op="create") from error

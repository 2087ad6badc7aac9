# SPDX-FileCopyrightText: blockgraph contributors
# SPDX-License-Identifier: MIT
"""What a graph file may say about checkpoints: section `checkpoints`. Nothing here loads the native core.

Each is taken when the graph starts, before any client can write: disks at one instant, with backups of what has
changed since an earlier one, or with the disks kept as they are and served, for others to pull. See
blockgraph.checkpoints.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import TYPE_CHECKING, Annotated, Any

import msgspec

from blockgraph.errors import OptionError
from blockgraph.graph.bitmaps import MAX_NAME, Granularity, described_granularity_problem, name_problem
from blockgraph.graph.problem import Problem
from blockgraph.options import NodeRef

if TYPE_CHECKING:
    from blockgraph.graph.description import CheckpointDescription, Description
    from blockgraph.graph.model import Model

#: What `name` may have in it: the time of the start, UTC.
TIME = "{time}"

#: How long a name may be, bytes: bitmaps are named after two of them.
_MOST = MAX_NAME // 4
_Name = Annotated[str, msgspec.Meta(extra_json_schema={"minLength": 1, "maxLength": _MOST})]
_Disks = Annotated[tuple[str, ...], msgspec.Meta(extra_json_schema={"minItems": 1, "uniqueItems": True})]


class CheckpointOptions(msgspec.Struct, kw_only=True, rename="kebab", forbid_unknown_fields=True, frozen=True):
    """A checkpoint: a named instant of some disks, since which what changes on each is known.

    Attributes:
        name: unique among those of the disks, which keep them; "{time}" in it becomes the time of the start (UTC,
            20261129T010203Z), so that the same file can be run again.
        disks: names of the nodes, below their filters.
        since: the checkpoint that `backup` and `view` refer to; default: the newest there is. Of a disk that was not in
            it, or of which what changed is not known, everything is copied, and said why.
        backup: disk to target, a node or its description as of a job: what has changed since `since` is copied there
            by a job, named after the disk. When one fails, the checkpoint is deleted again, so that the next backups
            have what these were to copy.
        view: disk to the node, or its description, that keeps what is overwritten: the disk as it is at the checkpoint
            is served while the graph runs, read-only, as export "NAME-DISK" with the bitmap "SINCE..NAME".
        grouped: the backups all succeed, or none.
        granularity: bytes per bit of new bitmaps, a power of two, or a string such as "64k".
        epochs: one bitmap with epochs a disk, instead of one bitmap a checkpoint; needs a sidecar to be kept.
        sidecar: keep them beside the image (IMAGE.bitmaps), for disks that have no place for bitmaps.
        persistent: default: where the disk has a place for bitmaps.
        prefix: of the bitmaps' names, before a colon.
    """

    name: _Name
    disks: _Disks
    since: str | None = None
    backup: dict[str, NodeRef] = {}
    view: dict[str, NodeRef] = {}
    grouped: bool = False
    granularity: Granularity | None = None
    epochs: bool = False
    sidecar: bool = False
    persistent: bool | None = None
    prefix: _Name = "checkpoint"


def export_id(checkpoint: str, disk: str) -> str:
    """Id, and name, of the export of a view."""
    return f"{checkpoint}-{disk}"


def check(model: Model, description: Description) -> Iterator[Problem]:
    """What is wrong with the checkpoints of a description."""
    first: dict[str, str] = {}
    for checkpoint in description.checkpoints:
        yield from _check_one(model, description, checkpoint)
        where = f"{checkpoint.where}.name"
        name = checkpoint.options.name
        if first.setdefault(name, checkpoint.where) != checkpoint.where:
            yield Problem(
                kind=OptionError,
                message=f"checkpoint name '{name}' is taken by {first[name]}",
                path=where,
                value=name,
                related=(first[name],),
            )


def _check_one(model: Model, description: Description, checkpoint: CheckpointDescription) -> Iterator[Problem]:
    options, where = checkpoint.options, checkpoint.where

    def problem(message: str, member: str, value: Any = None, hint: str | None = None) -> Problem:
        return Problem(kind=OptionError, message=message, path=f"{where}.{member}", value=value, hint=hint)

    for member, name in (("name", options.name), ("prefix", options.prefix)):
        if (wrong := name_problem(name)) is not None or len(name.encode("utf-8", "surrogateescape")) > _MOST:
            yield problem(wrong or "is too long", member, name, f"it has 1 to {_MOST} bytes and no NUL character")
    for brace in re.findall(r"\{[^}]*\}?", options.name):
        if brace != TIME:
            yield problem(f"'{brace}' is no placeholder", "name", options.name, f"'{TIME}' is the only one")
    if not options.disks:
        yield problem("has no disks", "disks", hint="name at least one")
    for index, disk in enumerate(options.disks):
        if disk in options.disks[:index]:
            yield problem(f"disk '{disk}' is named twice", f"disks[{index}]", disk)
        elif model.has(disk):
            yield from _place(model, checkpoint, disk, f"disks[{index}]")
    for member, given in (("backup", options.backup), ("view", options.view)):
        for disk in given:
            if disk not in options.disks:
                yield problem(f"disk '{disk}' is not among 'disks'", f"{member}.{disk}", hint="add it there")
    if options.backup and options.view:
        hint = "leave one out, or describe two checkpoints"
        yield problem("the disks are backed up already, by 'backup'", "view", hint=hint)
    if options.grouped and not options.backup:
        yield problem("is of use with 'backup' only", "grouped")
    if options.view and description.nbd_server is None:
        yield problem("a view is served, and the section 'nbd-server' is missing", "view")
    if (wrong := described_granularity_problem(options.granularity)) is not None:
        yield problem(wrong, "granularity", options.granularity)


def _place(model: Model, checkpoint: CheckpointDescription, disk: str, member: str) -> Iterator[Problem]:
    """Whether the disk's driver can keep the bitmaps as they are wanted."""
    options, vertex = checkpoint.options, model.node(disk)
    if vertex.broken:
        return
    message = hint = ""
    if options.persistent and not options.sidecar and vertex.driver.bitmap_place == "nowhere":
        message, hint = "has no place for persistent bitmaps", "set sidecar = true"
    elif options.epochs and options.persistent is not False and vertex.driver.bitmap_place == "image":
        message = "keeps bitmaps in the image, which has no place for epochs"
        hint = "leave 'epochs' out, or set persistent = false"
    if message:
        yield Problem(
            kind=OptionError,
            message=f"driver '{vertex.driver.name}' of disk '{disk}' {message}",
            path=f"{checkpoint.where}.{member}",
            value=disk,
            hint=hint,
        )

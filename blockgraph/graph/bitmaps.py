# SPDX-FileCopyrightText: blockgraph contributors
# SPDX-License-Identifier: MIT
"""What a graph file may say about dirty bitmaps: section `bitmaps`, and whether what names a bitmap finds one.

Members have the names of QEMU's BlockDirtyBitmapAdd. A bitmap that the node's image keeps already is used as it is;
any other is added, empty, before a write can reach the node. Nothing here loads the native core.
"""

from __future__ import annotations

from collections.abc import Callable, Container, Iterable, Iterator, Mapping
from typing import TYPE_CHECKING, Annotated

import msgspec

from blockgraph.errors import GraphError, OptionError
from blockgraph.graph.convert import closest, quote
from blockgraph.graph.problem import Problem
from blockgraph.options import BitmapRef
from blockgraph.perm import Role
from blockgraph.text import SIZE_PATTERN, parse_size

if TYPE_CHECKING:
    from blockgraph.graph.description import BitmapDescription, Description
    from blockgraph.graph.model import Model

#: Edges through which a node shows bytes of nodes below it.
SHOWN = Role.FILTERED | Role.COW

#: Longest name, bytes of UTF-8 (qcow2's limit).
MAX_NAME = 1023
MIN_GRANULARITY = 512
MAX_GRANULARITY = 1 << 31

_POWERS = [1 << shift for shift in range(MIN_GRANULARITY.bit_length() - 1, MAX_GRANULARITY.bit_length())]
_Bytes = Annotated[int, msgspec.Meta(ge=MIN_GRANULARITY, le=MAX_GRANULARITY, extra_json_schema={"enum": _POWERS})]
_NAME = {"minLength": 1, "maxLength": MAX_NAME, "pattern": "^[^\\u0000]*$"}
_Name = Annotated[str, msgspec.Meta(extra_json_schema=_NAME)]
_File = Annotated[str, msgspec.Meta(extra_json_schema={"minLength": 1})]
_Text = Annotated[str, msgspec.Meta(extra_json_schema={"pattern": SIZE_PATTERN})]
#: As a file says it.
Granularity = _Bytes | _Text


class BitmapOptions(msgspec.Struct, kw_only=True, rename="kebab", forbid_unknown_fields=True, frozen=True):
    """A dirty bitmap: which parts of a node have been written since it was added or cleared.

    Attributes:
        node: name of the node.
        name: unique on its node, 1 to 1023 bytes.
        granularity: bytes per bit, a power of two from 512 to 2G, or a string such as "64k"; default: the node's
            cluster size within 4k to 64k, or 64k. One that is there already must agree with what is given here.
        persistent: the node's image keeps it when the node is closed.
        disabled: it does not record writes until it is enabled.
        sidecar: keep it in a file beside the image, for images that have no place for bitmaps: the file's name, or
            true for the image's name with ".bitmaps" behind it. A qcow2 image keeps its bitmaps itself: there true
            makes them crash-safe.
        crash_safe: every granule is marked durably before a write to it counts as flushed, so that the bitmap can be
            used after a crash; default: true with a sidecar, else false.
        epochs: remember for each granule the checkpoint in which it was last written; of a bitmap that is kept, in a
            sidecar only.
    """

    node: str
    name: _Name
    granularity: Granularity | None = None
    persistent: bool = False
    disabled: bool = False
    sidecar: bool | _File = False
    crash_safe: bool | None = None
    epochs: bool = False


def name_problem(name: str) -> str | None:
    """What is wrong with the name of a bitmap; None: nothing."""
    length = len(name.encode("utf-8", "surrogateescape"))
    if 1 <= length <= MAX_NAME and "\0" not in name:
        return None
    return f"bitmap name of {length} bytes" if "\0" not in name else "bitmap name with a NUL character"


#: What to do about it.
NAME_HINT = f"a name has 1 to {MAX_NAME} bytes and no NUL character"


def granularity_bytes(described: Granularity | None) -> int | None:
    """A granularity that a file gives, as a number.

    Raises:
        ValueError: it is no size.
    """
    return parse_size(described) if isinstance(described, str) else described


def described_granularity_problem(described: Granularity | None) -> str | None:
    """What is wrong with a granularity that a file gives; None: nothing."""
    try:
        granularity = granularity_bytes(described)
    except ValueError as error:
        return str(error)
    return None if granularity is None else granularity_problem(granularity)


def granularity_problem(granularity: int) -> str | None:
    """What is wrong with so many bytes per bit; None: nothing."""
    if MIN_GRANULARITY <= granularity <= MAX_GRANULARITY and not granularity & (granularity - 1):
        return None
    return f"granularity {granularity} is not a power of two from {MIN_GRANULARITY} to {MAX_GRANULARITY}"


def check(model: Model, description: Description) -> list[Problem]:
    """What is wrong with the bitmaps of a description, and with what refers to bitmaps."""
    problems: list[Problem] = []
    first: dict[tuple[str, str], str] = {}
    sidecars: dict[str, BitmapDescription] = {}
    for bitmap in description.bitmaps:
        problems += _check_one(model, bitmap)
        problems += _same_sidecar(sidecars.setdefault(bitmap.options.node, bitmap), bitmap)
        key = bitmap.options.node, bitmap.options.name
        if key in first:
            problems.append(
                Problem(
                    kind=OptionError,
                    message=f"bitmap {quote(key[1])} of node '{key[0]}' is taken by {first[key]}",
                    path=f"{bitmap.where}.name",
                    value=key[1],
                    related=(first[key],),
                )
            )
        first.setdefault(key, bitmap.where)
    return [*problems, *_references(model, description, _Known(model, first))]


def check_opened(model: Model, description: Description, found: Mapping[str, Mapping[str, int]]) -> list[Problem]:
    """What shows when images are open.

    Args:
        found: granularities of the bitmaps of each open node, by their names.
    """
    problems: list[Problem] = []
    for bitmap in description.bitmaps:
        options = bitmap.options
        granularity = found.get(options.node, {}).get(options.name)
        wanted = granularity_bytes(options.granularity)
        if granularity is not None and wanted not in (None, granularity):
            problems.append(
                Problem(
                    kind=GraphError,
                    message=f"bitmap {quote(options.name)} is there already, with granularity {granularity}",
                    path=f"{bitmap.where}.granularity",
                    node=options.node,
                    value=wanted,
                    hint="ask for that, or remove the bitmap first",
                )
            )
        elif granularity is None and options.persistent and model.node(options.node).read_only:
            problems.append(
                Problem(
                    kind=GraphError,
                    message=f"bitmap {quote(options.name)} can not be added: node '{options.node}' is read-only",
                    path=f"{bitmap.where}.persistent",
                    node=options.node,
                    hint="open the node writable",
                )
            )
    names = [(node, name) for node, bitmaps in found.items() for name in bitmaps]
    names += [(bitmap.options.node, bitmap.options.name) for bitmap in description.bitmaps]
    return [*problems, *_references(model, description, _Known(model, names, opened=found))]


class _Known:
    """Bitmaps that there will be.

    Args:
        names: of nodes and their bitmaps.
        opened: nodes that have been opened, so that no other bitmaps are in their images.
    """

    def __init__(self, model: Model, names: Iterable[tuple[str, str]], opened: Container[str] = ()) -> None:
        self.names: dict[str, list[str]] = {}
        for node, name in names:
            self.names.setdefault(node, []).append(name)
        self._model = model
        self._opened = opened

    def may_have(self, node: str, name: str) -> bool:
        """The node has the bitmap, or its image may have it."""
        vertex = self._model.node(node)
        return name in self.names.get(node, ()) or (
            node not in self._opened and (vertex.driver.bitmap_place != "nowhere" or vertex.broken)
        )


def _references(model: Model, description: Description, known: _Known) -> Iterator[Problem]:
    """References to bitmaps that nothing has."""
    for export in description.exports:
        for index, wanted in enumerate(export.options.bitmaps):
            yield from _refers(model, known, export.options.node_name, wanted, f"{export.where}.bitmaps[{index}]")
    for job in description.jobs:
        bitmap = job.options.bitmap
        if isinstance(bitmap, str) or (bitmap is not None and model.has(bitmap.node)):  # else told with the job
            yield from _refers(model, known, job.options.device, bitmap, f"{job.where}.bitmap", Role.FILTERED)
    for vertex in model.nodes():
        option = getattr(vertex.options, "bitmap", None)
        if isinstance(option, BitmapRef):
            yield from _refers(model, known, vertex.name, option, f"{vertex.where}.bitmap")


def _same_sidecar(first: BitmapDescription, other: BitmapDescription) -> Iterator[Problem]:
    """A node has one place for its bitmaps, and all that are there are crash-safe, or none is."""
    for member, one, two, free in (
        ("sidecar", first.options.sidecar, other.options.sidecar, (True, False)),
        ("crash-safe", first.options.crash_safe, other.options.crash_safe, (None,)),
    ):
        if one != two and one not in free and two not in free:
            yield Problem(
                kind=OptionError,
                message=f"the bitmaps of node '{other.options.node}' have one place, and {first.where} says otherwise",
                path=f"{other.where}.{member}",
                value=two,
                related=(first.where,),
            )


def _check_one(model: Model, bitmap: BitmapDescription) -> Iterator[Problem]:
    options, where = bitmap.options, bitmap.where

    def problem(message: str, member: str, hint: str | None = None, near: str | None = None) -> Problem:
        value = getattr(options, member.replace("-", "_"))
        return Problem(
            kind=OptionError, message=message, path=f"{where}.{member}", value=value, hint=hint, closest=near
        )

    if not model.has(options.node):
        yield _dangling(model, f"bitmap {quote(options.name)}", options.node, f"{where}.node")
    if (wrong := name_problem(options.name)) is not None:
        yield problem(wrong, "name", NAME_HINT)
    if (wrong := described_granularity_problem(options.granularity)) is not None:
        yield problem(wrong, "granularity")
    if options.sidecar == "":
        yield problem("a file needs a name", "sidecar", "give one, or true")
    if model.has(options.node) and not model.node(options.node).broken:
        driver = model.node(options.node).driver
        if options.persistent and not options.sidecar and driver.bitmap_place == "nowhere":
            message = f"driver '{driver.name}' has no place for persistent bitmaps"
            yield problem(message, "persistent", "set sidecar = true instead")
        if driver.bitmap_place == "image":
            yield from _crash_safe_image(options, driver.name, problem)
    if options.crash_safe is not None and not (options.persistent or options.sidecar):
        yield problem("is of use with bitmaps that are kept only", "crash-safe", "set sidecar = true, or leave it out")


def _crash_safe_image(
    options: BitmapOptions, driver: str, problem: Callable[[str, str, str], Problem]
) -> Iterator[Problem]:
    """An image that keeps bitmaps itself needs a sidecar to have them after a crash, and for nothing else."""
    if options.epochs and (options.persistent or options.sidecar):
        message = f"driver '{driver}' keeps bitmaps in the image, which has no place for epochs"
        yield problem(message, "epochs", "leave it out, or let the bitmap be neither persistent nor in a sidecar")
    if isinstance(options.sidecar, str):
        yield problem(f"driver '{driver}' looks for a sidecar beside the image only", "sidecar", "set it to true")
    if options.sidecar and options.crash_safe is False:
        message = f"driver '{driver}' keeps bitmaps in the image: a sidecar is of use only to make them crash-safe"
        yield problem(message, "crash-safe", "leave it out, or set persistent instead of sidecar")
    if options.crash_safe and not options.sidecar:
        message = f"bitmaps that driver '{driver}' keeps in the image are crash-safe only with a sidecar beside it"
        yield problem(message, "crash-safe", "set sidecar = true")


def _refers(
    model: Model, known: _Known, top: str, wanted: str | BitmapRef, path: str, roles: Role = SHOWN
) -> Iterator[Problem]:
    if isinstance(wanted, str):
        name, nodes = wanted, [node for node in shown_below(model, top, roles) if model.has(node)]
    else:
        name, nodes = wanted.name, [wanted.node]
        if not model.has(wanted.node):
            yield _dangling(model, f"bitmap {quote(name)}", wanted.node, f"{path}.node")
            return
    if any(known.may_have(node, name) for node in nodes) or not nodes:
        return
    names = [other for node in nodes for other in known.names.get(node, ())]
    where = f"node '{nodes[0]}'" if len(nodes) == 1 else "the nodes " + ", ".join(f"'{node}'" for node in nodes)
    yield Problem(
        kind=GraphError,
        message=f"there is no bitmap {quote(name)} on {where}",
        path=path if isinstance(wanted, str) else f"{path}.name",
        node=nodes[0],
        value=name,
        closest=closest(name, names),
        hint=None if closest(name, names) else "describe it in the section 'bitmaps'",
    )


def shown_below(model: Model, top: str, roles: Role = SHOWN) -> list[str]:
    """The node, and those below it whose bytes it shows: through filters, backing files, and raw.

    Args:
        roles: of the edges that are followed.
    """
    found = [top]
    while model.has(found[-1]):
        vertex = model.node(found[-1])
        edges = model.children(found[-1]).values()
        below = [edge for edge in edges if edge.role & roles]
        if not below and roles is SHOWN and vertex.driver.transparent:
            below = [edge for edge in edges if edge.role & Role.PRIMARY]
        if not below or below[0].child in found:
            break
        found.append(below[0].child)
    return found


def _dangling(model: Model, what: str, node: str, path: str) -> Problem:
    return Problem(
        kind=GraphError,
        message=f"{what} refers to node {quote(node)}, which does not exist",
        path=path,
        node=node,
        value=node,
        closest=closest(node, [vertex.name for vertex in model.nodes()]),
    )

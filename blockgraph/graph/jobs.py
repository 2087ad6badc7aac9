# SPDX-FileCopyrightText: blockgraph contributors
# SPDX-License-Identifier: MIT
"""What the jobs of a description will do to its graph, so that conflicts are told before anything runs.

A backup job puts a backup-top over its device. The conflicts that this makes (another node writes below the device;
the target has another size) belong to the description: they would stop the job the moment it starts.
"""

from __future__ import annotations

from blockgraph.errors import GraphError, OptionError
from blockgraph.graph import sizes
from blockgraph.graph.convert import closest, convert, quote
from blockgraph.graph.description import Description, JobDescription
from blockgraph.graph.model import Model, root_key
from blockgraph.graph.problem import Problem
from blockgraph.graph.validate import NODE_NAME
from blockgraph.jobs.sync import LATE_BITMAP, LATE_BITMAP_HINT, bitmap_use
from blockgraph.options import BitmapRef
from blockgraph.perm import Role
from blockgraph.registry import get_driver

_FILTER = "backup-top"


def with_filters(model: Model, description: Description) -> tuple[Model, list[Problem]]:
    """The model as it is when every job has started, and what is wrong with the jobs.

    Returns: the same model when there are no jobs that change it.
    """
    problems = _groups(description)
    candidate = model
    for job in description.filters:
        problems += _check(model, job)
        problems += _bitmap(model, job)
        if _inserts(model, job):
            if candidate is model:
                candidate = model.copy()
            problems += _insert(candidate, job)
    return candidate, problems


def _check(model: Model, job: JobDescription) -> list[Problem]:
    options = job.options
    ready = model.has(options.device) and model.node(options.device).driver.name == _FILTER
    if not model.has(options.device):
        return []  # told as a dangling reference
    if ready and options.target is not None:
        return [
            Problem(
                kind=OptionError,
                message=f"device '{options.device}' is a {_FILTER} node and has a target already",
                path=f"{job.where}.target",
                hint="leave 'target' out, or give the node below as 'device'",
            )
        ]
    if ready and options.chain is not None:
        return [
            Problem(
                kind=OptionError,
                message=f"device '{options.device}' is a {_FILTER} node and has a target already",
                path=f"{job.where}.chain",
                hint="leave 'chain' out, or give the node below as 'device'",
            )
        ]
    if not ready and options.target is None and options.chain is None:
        return [
            Problem(
                kind=OptionError,
                message="member 'target' of job 'backup' is missing",
                path=f"{job.where}.target",
                hint=f"it may be left out only if 'device' is a {_FILTER} node",
            )
        ]
    if job.target == options.device:
        return [Problem(kind=GraphError, message="device and target are the same node", path=f"{job.where}.target")]
    if options.sync == "top" and _shows(model, job.target or _child(model, options.device, "target"), options.device):
        return [
            Problem(
                kind=GraphError,
                message=(
                    f"the target shows the live disk '{options.device}' where nothing is copied: with sync 'top' it "
                    "would show what the guest writes there later"
                ),
                path=f"{job.where}.sync",
                hint="use sync 'full' or 'none', or give the target another backing node",
            )
        ]
    return []


def _groups(description: Description) -> list[Problem]:
    """Jobs of one group that do not fit each other, and groups of nobody."""
    problems: list[Problem] = []
    first: dict[str, JobDescription] = {}
    for job in description.jobs:
        options = job.options
        where = f"{job.where}.completion-mode"
        if options.completion_mode == "grouped" and options.group is None:
            problems.append(
                Problem(
                    kind=OptionError,
                    message="completion-mode 'grouped' needs member 'group'",
                    path=where,
                    hint="give the jobs that shall succeed or fail together the same 'group'",
                )
            )
        elif options.completion_mode == "grouped" and options.sync == "none":
            problems.append(
                Problem(
                    kind=OptionError,
                    message="with sync 'none' a job ends by being cancelled, and would cancel the rest of its group",
                    path=where,
                    hint="use completion-mode 'individual'",
                )
            )
        if options.group is None:
            continue
        other = first.setdefault(options.group, job)
        if other.options.completion_mode != options.completion_mode:
            problems.append(
                Problem(
                    kind=OptionError,
                    message=(
                        f"group {quote(options.group)} has completion-mode '{other.options.completion_mode}' in "
                        f"{other.where} and '{options.completion_mode}' here"
                    ),
                    path=where,
                    related=(other.where,),
                )
            )
    return problems


def _bitmap(model: Model, job: JobDescription) -> list[Problem]:
    """As far as a description tells: what a node's bitmaps are is known when it runs."""
    options = job.options
    try:
        use = bitmap_use(options)
    except OptionError as error:
        where = f"{job.where}.{error.path}"
        return [Problem(kind=OptionError, message=error.reason, path=where, value=error.value, hint=error.hint)]
    if use is None or not model.has(options.device):
        return []
    where = f"{job.where}.bitmap"
    if model.node(options.device).driver.name == _FILTER:
        return [Problem(kind=GraphError, message=LATE_BITMAP, path=where, hint=LATE_BITMAP_HINT)]
    if not isinstance(options.bitmap, BitmapRef):
        return []
    name = options.bitmap.node
    if not model.has(name):
        names = [vertex.name for vertex in model.nodes()]
        return [
            Problem(
                kind=GraphError,
                message=f"job '{job.id}' refers to node {quote(name)}, which does not exist",
                path=f"{where}.node",
                value=name,
                closest=closest(name, names),
            )
        ]
    known = sizes.known(model)
    if name in known and options.device in known and known[name] != known[options.device]:
        return [
            Problem(
                kind=GraphError,
                message=f"the bitmap's node has {known[name]} bytes but the device has {known[options.device]}",
                path=where,
            )
        ]
    return []


def _child(model: Model, name: str, child: str) -> str | None:
    edge = model.edge(name, child)
    return None if edge is None else edge.child


def _shows(model: Model, target: str | None, device: str) -> bool:
    """The disk, below its filters, is part of the target."""
    if target is None or not model.has(target):
        return False
    below = model.descendants(target)
    disk: str | None = device
    while disk is not None and disk not in below:
        edges = model.children(disk).values()
        disk = next((edge.child for edge in edges if edge.role & Role.FILTERED and model.has(edge.child)), None)
    return disk is not None


def _inserts(model: Model, job: JobDescription) -> bool:
    return (
        model.has(job.options.device)
        and model.node(job.options.device).driver.name != _FILTER
        and job.target is not None
        and model.has(job.target)
        and job.target != job.options.device
    )


def _insert(model: Model, job: JobDescription) -> list[Problem]:
    options = job.options
    driver = get_driver(_FILTER)
    name = options.filter_node_name or f"#{job.id}"[:31]
    if not options.filter_node_name and (model.has(name) or not NODE_NAME.fullmatch(name[1:])):
        name = next(new for i in range(len(model.graph) + 1) if not model.has(new := f"#job{i}"))
    if model.has(name):
        return [
            Problem(
                kind=OptionError,
                message=f"node name '{name}' is taken",
                path=f"{job.where}.filter-node-name",
                value=name,
            )
        ]
    assert job.target is not None
    members = {"driver": _FILTER, "file": options.device, "target": job.target}
    made, problems = convert(driver.Options, members, job.where, f"driver '{_FILTER}'")
    if made is None:
        return problems
    model.add_node(name, driver, made, where=job.where)
    for child, member in (("file", "device"), ("target", "target")):
        model.set_edge(name, child, str(members[child]), driver.children[child].role, where=f"{job.where}.{member}")
    model.move_parents(options.device, name)
    target_root = root_key(f"job:{job.id}:target")
    if model.has(target_root):  # the filter's edge stands for it
        model.remove(target_root)
    return problems

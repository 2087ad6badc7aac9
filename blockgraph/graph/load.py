# SPDX-FileCopyrightText: blockgraph contributors
# SPDX-License-Identifier: MIT
"""From plain data to a Description, telling every problem of it at once.

    file or dict --> Source --> sections, nodes flattened --> Model --> structure, permissions, sizes
                       |                  |                                  |
                       +-- problems ------+---------- problems --------------+--> sorted by place

`load` is for those who want to run a graph, `check_description` for those who want to know what is wrong
with it, `examine` for those who want both. Nothing is opened.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

from blockgraph.driver import Driver
from blockgraph.errors import OptionError
from blockgraph.exports.options import NbdServerOptions
from blockgraph.graph import bitmaps, checkpoints, jobs, sizes
from blockgraph.graph.bitmaps import BitmapOptions
from blockgraph.graph.checkpoints import CheckpointOptions, export_id
from blockgraph.graph.convert import closest, convert, quote
from blockgraph.graph.description import (
    EXPORTS,
    JOBS,
    NOT_YET,
    SECTIONS,
    BitmapDescription,
    CheckpointDescription,
    Description,
    ExportDescription,
    JobDescription,
    NodeDescription,
)
from blockgraph.graph.flatten import Flattener, check_children
from blockgraph.graph.model import Model
from blockgraph.graph.problem import Problem, errors
from blockgraph.graph.source import Source, SyntaxProblem, check_bounds, join, read_source
from blockgraph.graph.validate import unused, validate
from blockgraph.jobs.options import BackupOptions
from blockgraph.options import NodeOptions

#: A graph file, or what would be in one.
Describable = str | os.PathLike[str] | Mapping[str, Any]

#: Members of the section nbd-server that are file names.
_SERVER_PATHS = {"addr": ("path",), "tls-creds": ("dir", "cert", "key", "ca")}


def load(what: Describable) -> Description:
    """Read a description that is to be run.

    Raises:
        BlockGraphError: for the first problem; the text says how many there are.
    """
    description, problems = examine(what)
    wrong = errors(problems)
    if wrong:
        error = wrong[0].to_error()
        if len(wrong) > 1:
            more = f"(and {len(wrong) - 1} more; 'blockgraph check' lists them)"
            error.hint = f"{error.hint} {more}" if error.hint else more
        raise error
    return description


def check_description(what: Describable) -> list[Problem]:
    """Every problem of a description; none is an error if it can be run.

    Raises:
        IOFailure: the file can not be read.
    """
    return examine(what)[1]


def examine(what: Describable) -> tuple[Description, list[Problem]]:
    """What could be understood of a description, and every problem of it, in the order of the file.

    Raises:
        IOFailure: the file can not be read.
        OptionError: its name does not tell its syntax.
    """
    if isinstance(what, Mapping):
        return _examine_dict(dict(what))
    source, problems = read_source(what)
    if errors(problems) and not source.data:
        return Description(source=source), problems
    return _examine(source, problems)


def _examine_dict(data: dict[str, Any]) -> tuple[Description, list[Problem]]:
    source = Source(None, data)
    try:
        check_bounds(data)
    except SyntaxProblem as error:
        return Description(source=Source(None, {})), [Problem(kind=OptionError, message=error.message)]
    return _examine(source, [])


def _examine(source: Source, problems: list[Problem]) -> tuple[Description, list[Problem]]:
    reader = _Reader(source)
    reader.read()
    problems = problems + reader.problems
    model = reader.description.model()
    problems += validate(model)
    candidate, more = jobs.with_filters(model, reader.description)
    problems += more
    if candidate is not model:
        known = {(problem.kind, problem.message) for problem in problems}
        problems += [p for p in validate(candidate) if (p.kind, p.message) not in known]
    problems += sizes.check(candidate)
    problems += bitmaps.check(model, reader.description)
    problems += checkpoints.check(model, reader.description)
    if not errors(reader.problems) and not list(model.dangling()):  # else nodes may seem unused that are not
        problems += unused(model)
    _children_first(reader.description, model)
    return reader.description, placed(source, problems)


def placed(source: Source, problems: list[Problem]) -> list[Problem]:
    """Each problem once, with its place, in the order of the file."""
    placed: dict[tuple[str, str], Problem] = {}
    for problem in problems:
        if problem.where is None:
            problem = problem.at(source.where(problem.path), [source.where(path) for path in problem.related])
        placed.setdefault((problem.path, problem.message), problem)
    return sorted(placed.values(), key=lambda problem: problem.where[1:] if problem.where else (0, 0))


def _children_first(description: Description, model: Model) -> None:
    order = {name: index for index, name in enumerate(model.ordered(children_first=True))}
    description.nodes.sort(key=lambda node: order.get(node.name, len(order)))


def flatten_node(description: Mapping[str, Any], new_name: Callable[[], str]) -> list[NodeDescription]:
    """One node description and those inside it, the outer one first. File names are left as they are.

    Args:
        new_name: gives another name each time, for nodes that have none.
    Raises:
        OptionError: for the first problem; paths start at the node.
    """
    _refuse(_bounds(description))
    flattener = Flattener(new_name=new_name)
    flattener.add(dict(description), "")
    _refuse(flattener.problems)
    return flattener.nodes


def convert_options(driver: type[Driver], members: Mapping[str, Any]) -> tuple[NodeOptions, dict[str, str | None]]:
    """New options for an open node, and what they say of its children: a name, or None for null.

    Raises:
        OptionError: for the first problem; a node can not be described inside another here.
    """
    flattener = Flattener(new_name=lambda: "")
    _refuse(_bounds(members))
    node = flattener.single(driver, dict(members), "")
    _refuse(flattener.problems + check_children(driver, members))
    return node.options, node.children


def _bounds(data: Mapping[str, Any]) -> list[Problem]:
    try:
        check_bounds(dict(data))
    except SyntaxProblem as error:
        return [Problem(kind=OptionError, message=error.message)]
    return []


def _refuse(problems: list[Problem]) -> None:
    for problem in errors(problems):
        raise problem.to_error()


class _Reader:
    """Reads the sections of a description.

    Attributes:
        description: what was understood.
        problems: what was not; without places.
    """

    def __init__(self, source: Source) -> None:
        self.description = Description(source=source)
        self.problems: list[Problem] = []
        self._data = source.data
        directory = source.directory
        self._directory = None if directory is None or str(directory) == "." else os.fspath(directory)
        self._unnamed = 0
        self._names: dict[str, str] = {}
        #: ids of jobs, and ids and names of exports, with the paths of those that have them
        self._jobs_by_id: dict[str, str] = {}
        self._exports_by_id: dict[str, str] = {}
        self._exports_by_name: dict[str, str] = {}

    def read(self) -> None:
        """Read everything."""
        self._sections()
        flattener = self._flattener()
        for path, value in self._list("nodes"):
            flattener.add(value, path)
        self.problems += flattener.problems
        self.description.nodes = flattener.nodes
        self._bitmaps()
        self._exports()
        self._server()
        self._jobs()
        self._checkpoints()

    def _sections(self) -> None:
        if "driver" in self._data:  # a `-blockdev` object as it is; its other members are no mistakes of their own
            hint = 'nodes go into the list of that section: "nodes": [{"driver": ...}, ...]'
            self._problem("a node outside of the section 'nodes'", "driver", hint=hint)
            return
        for name in self._data:
            if name in NOT_YET:
                self._problem(f"section '{name}' is not available yet", name, hint="remove it")
            elif name not in SECTIONS:
                near = closest(name, SECTIONS + NOT_YET)
                self._problem(f"unknown section {quote(name)}", name, closest=near, allowed=SECTIONS)

    def _list(self, section: str) -> list[tuple[str, Any]]:
        value = self._data.get(section, [])
        if not isinstance(value, list):
            suffix = os.path.splitext(self.description.source.file or "")[1]
            example = {".toml": f"write [[{section}]]", ".json": "write [{...}]", "": None}
            hint = example.get(suffix, "write '- ' before each item")
            self._problem(f"expected a list, found {quote(value)}", section, hint=hint)
            return []
        return [(f"{section}[{index}]", item) for index, item in enumerate(value)]

    def _flattener(self) -> Flattener:
        return Flattener(new_name=self._new_name, names=self._names, directory=self._directory)

    def _new_name(self) -> str:
        name = f"#block{self._unnamed}"
        self._unnamed += 1
        return name

    def _typed(self, value: Any, path: str, kinds: Mapping[str, Any], what: str, references: tuple[str, ...]) -> Any:
        """The structure that `type` asks for; None, and problems told, when there is none.

        Args:
            references: members that name nodes. Those of a structure go into the model, which tells the ones that
                dangle; without a structure they are told here.
        """
        options = self._converted(value, path, kinds, what)
        if options is None and isinstance(value, dict):
            names = {node.name for node in self.description.nodes}
            for member in references:
                name = value.get(member)
                if isinstance(name, str) and name not in names:
                    message = f"{what} refers to node {quote(name)}, which does not exist"
                    self._problem(message, join(path, member), value=name, closest=closest(name, names))
        return options

    def _converted(self, value: Any, path: str, kinds: Mapping[str, Any], what: str) -> Any:
        if not isinstance(value, dict):
            self._problem(f"expected a table, found {quote(value)}", path)
            return None
        kind = value.get("type")
        if not isinstance(kind, str) or kind not in kinds:
            near = closest(kind, kinds) if isinstance(kind, str) else None
            missing = "type" not in value
            message = f"member 'type' of {what} is missing" if missing else f"unknown type of {what}: {quote(kind)}"
            self._problem(message, join(path, "type"), value=kind, closest=near, allowed=tuple(kinds))
            return None
        options, problems = convert(kinds[kind], value, path, f"{what} '{kind}'")
        self.problems += problems
        return options

    def _bitmaps(self) -> None:
        for path, value in self._list("bitmaps"):
            if not isinstance(value, dict):
                self._problem(f"expected a table, found {quote(value)}", path)
                continue
            if self._directory is not None:
                value = _resolved(value, ("sidecar",), self._directory)
            options, problems = convert(BitmapOptions, value, path, "bitmap")
            self.problems += problems
            if options is not None:
                self.description.bitmaps.append(BitmapDescription(options=options, where=path))

    def _exports(self) -> None:
        for path, value in self._list("exports"):
            options = self._typed(value, path, EXPORTS, "export", ("node-name",))
            if options is None or not self._unique(self._exports_by_id, options.id, path, "id", "export id"):
                continue
            self._unique(self._exports_by_name, options.export_name, path, "name", "NBD export name")
            self.description.exports.append(ExportDescription(options=options, where=path))

    def _unique(self, known: dict[str, str], name: str, path: str, member: str, what: str) -> bool:
        if name in known:
            self._problem(
                f"{what} {quote(name)} is taken by {known[name]}",
                join(path, member) if member else path,
                value=name,
                related=(known[name],),
            )
            return False
        known[name] = path
        return True

    def _server(self) -> None:
        section = "nbd-server"
        if section not in self._data:
            tables = [(path, item) for path, item in self._list("exports") if isinstance(item, dict)]
            served = [(path, item.get("id")) for path, item in tables if item.get("type") in tuple(EXPORTS)]
            if served and not any(closest(name, [section]) for name in self._data if name not in SECTIONS):
                path, name = served[0]
                owner = f"export {quote(name)}" if isinstance(name, str) else "an export"
                self._problem(
                    f"section '{section}' is missing, {owner} needs one",
                    path,
                    hint=f'add {section} with addr = {{type = "unix", path = "..."}}',
                )
            return
        value = self._data[section]
        if not isinstance(value, dict):
            self._problem(f"expected a table, found {quote(value)}", section)
            return
        for member, paths in _SERVER_PATHS.items():
            inner = value.get(member)
            if isinstance(inner, dict) and self._directory is not None:
                value = {**value, member: _resolved(inner, paths, self._directory)}
        self.description.nbd_server, problems = convert(NbdServerOptions, value, section, f"'{section}'")
        self.problems += problems

    def _target(self, described: Any, path: str) -> tuple[Any, Any, list[NodeDescription]]:
        """A target as the description of its node, its name, and the nodes that are described in place."""
        inner = self._flattener()
        if isinstance(described, dict):
            inner.add(described, path, inline=True)
            self.problems += inner.problems
            if inner.nodes:
                return inner.nodes[0].description, inner.nodes[0].name, inner.nodes
        return described, described, inner.nodes

    def _jobs(self) -> None:
        for path, value in self._list("jobs"):
            target: Any = None
            nodes: list[NodeDescription] = []
            if isinstance(value, dict) and "target" in value:
                described, target, nodes = self._target(value["target"], join(path, "target"))
                value = {**value, "target": described}
            if isinstance(value, dict) and self._directory is not None:
                value = _resolved(value, ("chain",), self._directory)
            options = self._typed(value, path, JOBS, "job", ("device", "target"))
            if options is None:
                continue
            job_id = options.job_id or options.device
            if self._unique(self._jobs_by_id, job_id, path, "job-id", "job id"):
                self.description.jobs.append(
                    JobDescription(
                        options=options,
                        id=job_id,
                        target=target if isinstance(target, str) else None,
                        target_nodes=nodes,
                        where=path,
                    )
                )

    def _checkpoints(self) -> None:
        known = {node.name for node in self.description.nodes}
        for path, value in self._list("checkpoints"):
            if not isinstance(value, dict):
                self._problem(f"expected a table, found {quote(value)}", path)
                continue
            filters = []
            for member in ("backup", "view"):
                targets = value.get(member)
                if not isinstance(targets, dict):
                    continue
                value = {**value, member: (full := dict(targets))}
                for disk, described in targets.items():
                    where = join(join(path, member), disk)
                    full[disk], target, nodes = self._target(described, where)
                    free = self._free(value.get("name"), member, disk, where)
                    if isinstance(target, str) and disk in known and free:
                        job = BackupOptions(device=disk, target=full[disk], sync="full")
                        id = disk if member == "backup" else where
                        filters.append(
                            JobDescription(options=job, id=id, target=target, target_nodes=nodes, where=where)
                        )
            options, problems = convert(CheckpointOptions, value, path, "checkpoint")
            self.problems += problems
            if options is not None:
                self.description.checkpoints.append(CheckpointDescription(options=options, filters=filters, where=path))

    def _free(self, name: Any, member: str, disk: str, where: str) -> bool:
        """Nothing else has the ids of the job, or the export, that a checkpoint makes for a disk."""
        if member == "backup":
            return self._unique(self._jobs_by_id, disk, where, "", "job id")
        taken = [self._exports_by_id, self._exports_by_name] if isinstance(name, str) else []
        return all(self._unique(known, export_id(name, disk), where, "", "export id") for known in taken)

    def _problem(self, message: str, path: str, **more: Any) -> None:
        self.problems.append(replace(Problem(kind=OptionError, message=message, path=path), **more))


def _resolved(table: dict[str, Any], paths: tuple[str, ...], directory: str) -> dict[str, Any]:
    names = {name: table[name] for name in paths if isinstance(table.get(name), str) and table[name]}
    return {**table, **{name: os.path.join(directory, value) for name, value in names.items()}}


__all__ = [
    "Describable",
    "Description",
    "check_description",
    "convert_options",
    "examine",
    "flatten_node",
    "load",
    "placed",
]

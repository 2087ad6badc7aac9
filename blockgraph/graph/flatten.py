# SPDX-FileCopyrightText: blockgraph contributors
# SPDX-License-Identifier: MIT
"""Flatten: node descriptions, with others inside them, to a list of nodes that refer to each other by name."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from typing import Any

from blockgraph.driver import Driver
from blockgraph.errors import OptionError
from blockgraph.graph.convert import closest, convert, members, quote, respell
from blockgraph.graph.description import NodeDescription
from blockgraph.graph.problem import Problem
from blockgraph.graph.source import MAX_DEPTH, join
from blockgraph.graph.validate import is_generated, name_problem
from blockgraph.options import NodeOptions
from blockgraph.perm import Role
from blockgraph.registry import driver_names, get_driver

#: Members that a node inside its parent takes over, and their types.
_INHERITED = {"read-only": bool, "auto-read-only": bool, "force-share": bool}
_INHERITED_CACHE = ("direct", "no-flush")


class Flattener:
    """See the module's text.

    Args:
        new_name: gives another name each time, for nodes that have none.
        names: names taken, with the path of who has them; grows.
        directory: where relative file names start; None leaves them alone.

    Attributes:
        nodes: each node before those inside it.
        problems: without places.
    """

    def __init__(
        self, *, new_name: Callable[[], str], names: dict[str, str] | None = None, directory: str | None = None
    ) -> None:
        self.nodes: list[NodeDescription] = []
        self.problems: list[Problem] = []
        self._new_name = new_name
        self._names = {} if names is None else names
        self._directory = directory
        self._depth = 0

    def add(
        self, value: Any, path: str, inherited: Mapping[str, Any] | None = None, *, inline: bool = False
    ) -> NodeDescription | None:
        """Take the node at `path`, and those inside it; None, and a problem told, when it is none.

        Args:
            inherited: members it takes over where it says nothing.
        """
        if not isinstance(value, dict):
            self._problem(f"expected a node description, found {quote(value)}", path, value=value)
            return None
        if self._depth >= MAX_DEPTH:  # dotted keys nest without the file being nested
            self._problem(f"nested deeper than {MAX_DEPTH} levels", path)
            return None
        driver = self._driver(value, path)
        name = self._name(value, path, required=not inline)
        node = NodeDescription(
            name=name, driver=driver, options=NodeOptions(driver=driver.name), broken=True, where=path, inline=inline
        )
        self.nodes.append(node)
        self._depth += 1
        if is_unknown(driver):
            # Whatever looks like a node inside it can still be checked.
            for key, item in value.items():
                if isinstance(item, dict) and "driver" in item:
                    self.add(item, join(path, key), inline=True)
        else:
            self._fill(node, value, inherited or {})
        self._depth -= 1
        return node

    def single(self, driver: type[Driver], value: dict[str, Any], path: str) -> NodeDescription:
        """A node of that driver by itself: nodes inside it are not taken."""
        options = NodeOptions(driver=driver.name)
        node = NodeDescription(name=str(value.get("node-name")), driver=driver, options=options, where=path)
        self._fill(node, value, {}, nested=False)
        return node

    def _driver(self, value: dict[str, Any], path: str) -> type[Driver]:
        name = value.get("driver")
        path = join(path, "driver")
        if "driver" not in value:
            self._problem("member 'driver' is missing", path, hint=f"drivers: {', '.join(driver_names())}")
        elif not isinstance(name, str):
            self._problem(f"expected the name of a driver, found {quote(name)}", path, value=name)
        else:
            try:
                return get_driver(name)
            except OptionError as error:
                near = closest(name, driver_names())
                hint = None if near else error.hint
                self._problem(f"unknown driver {quote(name)}", path, value=name, closest=near, hint=hint)
            except (ImportError, AttributeError) as error:
                self._problem(f"driver {quote(name)} can not be loaded: {error}", path, value=name)
        return unknown_driver(str(name))

    def _name(self, value: dict[str, Any], path: str, *, required: bool) -> str:
        name = value.get("node-name")
        path = join(path, "node-name")
        if name is None and required and "node-name" not in value and path != "node-name":
            self._problem("node has no name, nothing can refer to it", path, severity="warning", hint="add 'node-name'")
        if not isinstance(name, str):
            return self._free_name(path)
        if is_generated(name):
            self._problem(str(name_problem(name)), path, value=name)
        if name in self._names:
            taken = self._names[name]
            message = f"node name {quote(name)} is taken by {taken.removesuffix('.node-name')}"
            self._problem(message, path, value=name, related=(taken,))
            return self._free_name(path)
        self._names[name] = path
        return name

    def _free_name(self, path: str) -> str:
        while (name := self._new_name()) in self._names:
            pass
        self._names[name] = path
        return name

    def _fill(
        self, node: NodeDescription, value: dict[str, Any], inherited: Mapping[str, Any], *, nested: bool = True
    ) -> None:
        driver, path = node.driver, node.where
        owner = f"driver '{value.get('driver', driver.name)}'"
        known = {*members(driver.Options), *driver.children}
        before = len(self.problems)
        expanded = expand_dotted(value, known, path, self.problems)
        given, written = respell(expanded, known, path, owner, self.problems)
        _inherit(given, inherited)
        self._resolve(driver, given)
        node.description = dict(given)
        for child, spec in driver.children.items():
            if child not in given:
                continue
            item = given[child]
            if item == "" and not spec.required:
                # TOML has no null; QEMU, too, takes the empty string for it.
                item = given[child] = node.description[child] = None
            if isinstance(item, dict) and nested:
                passed = _passed_on(given, cow=bool(spec.role & Role.COW))
                below = self.add(item, join(path, written.get(child, child)), passed, inline=True)
                if below is None:
                    del given[child]
                    continue
                node.description[child] = below.description
                item = given[child] = below.name
            if isinstance(item, str):
                node.children[child] = item
            elif item is None and not spec.required:
                node.children[child] = None
            if child not in members(driver.Options):
                # A driver without options of its own need not list its children there.
                if not isinstance(item, str):
                    self._problem(
                        f"expected the name of a node or a table that describes one, found {quote(item)}", path
                    )
                del given[child]
        options, problems = convert(driver.Options, given, path, owner)
        self.problems += [_as_written(problem, path, written) for problem in problems]
        if options is not None:
            node.options = options
            node.broken = False
            if len(self.problems) == before:
                self._relations(node)

    def _resolve(self, driver: type[Driver], given: dict[str, Any]) -> None:
        if self._directory is None:
            return
        for member in driver.paths:
            name = given.get(member)
            if isinstance(name, str) and name:
                given[member] = os.path.join(self._directory, name)

    def _relations(self, node: NodeDescription) -> None:
        """Rules between the members that every node has."""
        options = node.options
        if options.force_share and not options.read_only:
            self._problem("'force-share' needs 'read-only'", join(node.where, "force-share"), value=True)
        if options.detect_zeroes == "unmap" and options.discard != "unmap":
            self._problem(
                "'detect-zeroes' can be 'unmap' only with 'discard' = 'unmap'",
                join(node.where, "detect-zeroes"),
                value="unmap",
            )

    def _problem(self, message: str, path: str, **more: Any) -> None:
        self.problems.append(Problem(kind=OptionError, message=message, path=path, **more))


def unknown_driver(name: str) -> type[Driver]:
    """Stands for a driver that does not exist, so that the rest of the description can be checked."""
    return type("UnknownDriver", (Driver,), {"name": name, "kind": "unknown"})


def is_unknown(driver: type[Driver]) -> bool:
    """It was made by `unknown_driver`."""
    return driver.__name__ == "UnknownDriver"


def check_children(driver: type[Driver], given: Mapping[str, Any]) -> list[Problem]:
    """Refuse nodes described in place."""
    return [
        Problem(
            kind=OptionError, message=f"{quote(given[child])} can not be opened here", path=child, hint="name a node"
        )
        for child in driver.children
        if isinstance(given.get(child), dict)
    ]


def expand_dotted(
    value: Mapping[str, Any], heads: Iterable[str] | None, path: str, problems: list[Problem]
) -> dict[str, Any]:
    """{"cache.direct": true} to {"cache": {"direct": true}}; {"a.0": x, "a.1": y} to {"a": [x, y]}.

    Args:
        heads: only keys that start with one of these and a dot; None: all.
    """
    if not any("." in key for key in value):
        return dict(value)
    heads = None if heads is None else set(heads)
    out: dict[str, Any] = {}
    dotted: dict[str, dict[str, Any]] = {}
    for key, item in value.items():
        head, _, rest = key.partition(".")
        if key.count(".") > MAX_DEPTH:
            problems.append(Problem(kind=OptionError, message=f"nested deeper than {MAX_DEPTH} levels", path=path))
        elif head and rest and key not in (heads or ()) and (heads is None or head in heads):
            dotted.setdefault(head, {})[rest] = item
        else:
            out[key] = item
    for head, inner in dotted.items():
        nested: Any = expand_dotted(inner, None, join(path, head), problems)
        if list(nested) == [str(index) for index in range(len(nested))]:
            nested = list(nested.values())
        given = out.get(head)
        twice = isinstance(given, dict) and isinstance(nested, dict) and given.keys() & nested.keys()
        if head in out and (twice or not isinstance(given, dict) or not isinstance(nested, dict)):
            member = next(iter(twice)) if twice else next(iter(inner))
            problems.append(
                Problem(
                    kind=OptionError,
                    message=f"given twice, as '{head}' and as '{head}.{member}'",
                    path=join(path, f"{head}.{member}"),
                )
            )
        out[head] = (
            {**nested, **given} if isinstance(given, dict) and isinstance(nested, dict) else out.get(head, nested)
        )
    return out


def _inherit(given: dict[str, Any], inherited: Mapping[str, Any]) -> None:
    for member, value in inherited.items():
        if member == "cache":
            cache = given.get("cache", {})
            if isinstance(cache, dict):
                given["cache"] = {**value, **cache}
        else:
            given.setdefault(member, value)


def _passed_on(given: Mapping[str, Any], *, cow: bool) -> dict[str, Any]:
    """What a node inside this one takes over. A COW child is only read."""
    passed = {key: given[key] for key, kind in _INHERITED.items() if isinstance(given.get(key), kind)}
    if cow:
        passed["read-only"] = True
        passed.pop("auto-read-only", None)
    cache = given.get("cache")
    if isinstance(cache, dict):
        inner = {key: cache[key] for key in _INHERITED_CACHE if isinstance(cache.get(key), bool)}
        if inner:
            passed["cache"] = inner
    return passed


def _as_written(problem: Problem, path: str, written: Mapping[str, str]) -> Problem:
    """A misspelt member keeps the name under which it is in the file."""
    for right, name in written.items():
        if right != name and problem.path == join(path, right):
            return replace(problem, path=join(path, name))
    return problem

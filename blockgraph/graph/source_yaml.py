# SPDX-FileCopyrightText: blockgraph contributors
# SPDX-License-Identifier: MIT
"""YAML graph files, built from the parser's events.

Only plain data can come out: the YAML 1.2 core schema (strings, true, false, null, numbers, lists, tables). Events
instead of PyYAML's constructors: they do not recurse, every one carries its place, and aliases can be counted before
they multiply.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import yaml

from blockgraph.graph.source import MAX_DEPTH, MAX_VALUES, Lines, Parsed, SyntaxProblem, join

#: libyaml's parser where PyYAML has it: ten times as fast.
_Loader: Any = getattr(yaml, "CSafeLoader", yaml.SafeLoader)

_PLAIN: list[tuple[re.Pattern[str], Callable[[str], Any]]] = [
    (re.compile(r"null|Null|NULL|~|"), lambda text: None),
    (re.compile(r"true|True|TRUE"), lambda text: True),
    (re.compile(r"false|False|FALSE"), lambda text: False),
    (re.compile(r"[-+]?[0-9]+"), int),
    (re.compile(r"0o[0-7]+"), lambda text: int(text[2:], 8)),
    (re.compile(r"0x[0-9a-fA-F]+"), lambda text: int(text[2:], 16)),
    (re.compile(r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?"), float),
]
_TAG = "tag:yaml.org,2002:"


def read_yaml(text: str) -> Parsed:
    """Parse one YAML document.

    Raises:
        SyntaxProblem: not YAML, several documents, a tag that is not plain data, too deep or too many values.
    """
    builder = _Builder()
    try:
        for event in yaml.parse(text, Loader=_Loader):
            builder.feed(event)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        place = (mark.line + 1, mark.column + 1) if mark else (0, 0)
        reason = ", ".join(part for part in (error.problem, error.context) if part)
        raise SyntaxProblem(f"not valid YAML: {reason}", *place) from None
    except yaml.YAMLError as error:
        bad = yaml.reader.Reader.NON_PRINTABLE.search(text)
        place = Lines(text).place(bad.start()) if bad else (0, 0)
        raise SyntaxProblem(f"not valid YAML: {str(error).splitlines()[0]}", *place) from None
    data = {} if builder.document is None else builder.document
    return Parsed(data, lambda: builder.positions, builder.duplicates)


class _Open:
    """A list or table that is being built.

    Attributes:
        value: its items so far.
        path: its path.
        key: the key that waits for its value, None when a key comes next (always None in a list).
        anchor: the name that aliases use.
        weight: number of values in it, aliases expanded.
    """

    __slots__ = ("anchor", "key", "path", "value", "weight")

    def __init__(self, value: list[Any] | dict[str, Any], path: str, anchor: str | None) -> None:
        self.value = value
        self.path = path
        self.key: str | None = None
        self.anchor = anchor
        self.weight = 1


class _Builder:
    """Data and places from events.

    Attributes:
        document: the finished data.
        positions: path -> line and column of its key (of the value, in a list); nothing below aliases.
        duplicates: path, line, column of keys that a table has already.
    """

    def __init__(self) -> None:
        self.document: Any = None
        self.positions: dict[str, tuple[int, int]] = {}
        self.duplicates: list[tuple[str, int, int]] = []
        self._documents = 0
        self._stack: list[_Open] = []
        self._anchors: dict[str, tuple[Any, int]] = {}
        self._weight = 0

    def feed(self, event: Any) -> None:
        """Take the next event."""
        if isinstance(event, yaml.ScalarEvent):
            value = _scalar(event)
            if event.anchor:
                self._anchors[event.anchor] = (value, 1)
            self._add(value, event, 1)
        elif isinstance(event, yaml.AliasEvent):
            if event.anchor not in self._anchors:
                raise _problem(f"alias '*{event.anchor}' has no (finished) anchor", event)
            value, weight = self._anchors[event.anchor]
            self._add(value, event, weight)
        elif isinstance(event, (yaml.MappingStartEvent, yaml.SequenceStartEvent)):
            self._start(event)
        elif isinstance(event, (yaml.MappingEndEvent, yaml.SequenceEndEvent)):
            done = self._stack.pop()
            if done.anchor:
                self._anchors[done.anchor] = (done.value, done.weight)
            if self._stack:
                self._stack[-1].weight += done.weight
        elif isinstance(event, yaml.DocumentStartEvent):
            self._documents += 1
            if self._documents > 1:
                raise _problem("several YAML documents in one file", event)

    def _start(self, event: Any) -> None:
        mapping = isinstance(event, yaml.MappingStartEvent)
        if event.tag not in (None, "!", _TAG + ("map" if mapping else "seq")):
            raise _problem(f"tag '{event.tag}' is not allowed", event)
        if len(self._stack) >= MAX_DEPTH:
            raise _problem(f"nested deeper than {MAX_DEPTH} levels", event)
        value: list[Any] | dict[str, Any] = {} if mapping else []
        path = self._add(value, event, 1)
        self._stack.append(_Open(value, path, event.anchor))

    def _add(self, value: Any, event: Any, weight: int) -> str:
        """Put a value where it belongs; returns its path."""
        self._weight += weight
        if self._weight > MAX_VALUES:
            raise _problem(f"more than {MAX_VALUES:,} values", event)
        if not self._stack:
            self.document = value
            return ""
        parent = self._stack[-1]
        if isinstance(parent.value, list):
            path = f"{parent.path}[{len(parent.value)}]"
            self.positions[path] = _place(event)
            parent.value.append(value)
        elif parent.key is None:
            if not isinstance(value, str) and not isinstance(event, yaml.ScalarEvent):
                raise _problem("a key must be a string", event)
            # `1:` or `true:` is a misspelt member, and is told as such.
            parent.key = value if isinstance(value, str) else event.value
            path = join(parent.path, parent.key)
            if parent.key in parent.value:
                self.duplicates.append((path, *_place(event)))
            else:
                self.positions[path] = _place(event)
            return path
        else:
            path = join(parent.path, parent.key)
            parent.value[parent.key] = value
            parent.key = None
        if not isinstance(value, (list, dict)) or isinstance(event, yaml.AliasEvent):
            parent.weight += weight
        return path


def _scalar(event: Any) -> Any:
    tag = (event.tag or "").removeprefix(_TAG)
    if tag not in ("", "!", "str", "int", "float", "bool", "null"):
        raise _problem(f"tag '{event.tag}' is not allowed", event)
    text: str = event.value
    if tag in ("!", "str") or (not tag and not event.implicit[0]):
        return text
    for pattern, convert in _PLAIN:
        if pattern.fullmatch(text):
            try:
                return convert(text)
            except ValueError:  # an integer of thousands of digits
                raise _problem("number too long", event) from None
    return text


def _place(event: Any) -> tuple[int, int]:
    return event.start_mark.line + 1, event.start_mark.column + 1


def _problem(message: str, event: Any) -> SyntaxProblem:
    return SyntaxProblem(message, *_place(event))

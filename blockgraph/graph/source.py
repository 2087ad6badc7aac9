# SPDX-FileCopyrightText: blockgraph contributors
# SPDX-License-Identifier: MIT
"""Source: a graph file as plain data, with the line and column of every member.

TOML, JSON and YAML give the same data. YAML is read by the 1.2 core schema, as JSON is: `off` and `no` are strings.

A graph file is untrusted: its size, its depth and the number of its values (YAML aliases multiply) are bounded, no
YAML tag constructs anything but plain data, and whatever is wrong with it is a Problem.
"""

from __future__ import annotations

import errno
import os
import re
import stat
from bisect import bisect_right
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from blockgraph.errors import BlockGraphError, IOFailure, OptionError
from blockgraph.graph.problem import Problem, Where

#: Largest graph file, bytes.
MAX_BYTES = 32 << 20
#: Deepest nesting of tables and lists: a chain of inline `backing` nodes of this length.
MAX_DEPTH = 200
#: Most values in a file, after aliases.
MAX_VALUES = 250_000

_HUGE = re.compile(r"(?:[0-9]_?){4300,}")

#: Path ("nodes[2].file.filename") -> line, column, both from 1.
Positions = Mapping[str, tuple[int, int]]


class SyntaxProblem(Exception):
    """The text can not be read at all.

    Attributes:
        message: without the place.
        line, column: from 1; 0 when not known.
    """

    def __init__(self, message: str, line: int = 0, column: int = 0) -> None:
        super().__init__(message)
        self.message = message
        self.line = line
        self.column = column


class Parsed(NamedTuple):
    """What a syntax's reader gives.

    Attributes:
        data: the document.
        positions: computes the place of every member.
        duplicates: paths that are given twice, with the place of the later one.
    """

    data: Any
    positions: Callable[[], Positions]
    duplicates: list[tuple[str, int, int]]


class Source:
    """A description's plain data and where it came from.

    Attributes:
        file: as the user named it, None for a dict.
        directory: relative file names start here; None: where the process runs.
        data: the top table; must not be changed.
    """

    def __init__(self, file: str | None, data: dict[str, Any], positions: Callable[[], Positions] = dict) -> None:
        self.file = file
        self.directory = Path(file).parent if file is not None else None
        self.data = data
        self._compute = positions
        self._positions: Positions | None = None

    def where(self, path: str) -> Where:
        """The place of the member, or of the nearest member around it."""
        if self._positions is None:
            self._positions = self._compute()
        while path:
            if (found := self._positions.get(path)) is not None:
                return Where(self.file, *found)
            path = path[: max(path.rfind("."), path.rfind("["), 0)]
        return Where(self.file)


def join(path: str, key: str) -> str:
    """Path of the member `key` of the table at `path`."""
    return f"{path}.{key}" if path else key


def read_source(path: str | os.PathLike[str]) -> tuple[Source, list[Problem]]:
    """Read a graph file; the syntax follows from the name: .toml, .json, .yaml or .yml.

    Returns: the data (empty when the syntax is broken) and the problems found so far.
    Raises:
        IOFailure: the file can not be read.
    """
    name = os.fspath(path)
    syntax = syntax_of(name)
    return parse(_read(name), syntax, name)


def syntax_of(name: str) -> str:
    """The syntax that a file name asks for: "toml", "json" or "yaml".

    Raises:
        OptionError: none of them.
    """
    suffix = os.path.splitext(name)[1].lower().removeprefix(".")
    if suffix in ("toml", "json", "yaml", "yml"):
        return suffix.replace("yml", "yaml")
    raise OptionError(
        f"can not tell the syntax of a file named '.{suffix}'" if suffix else "can not tell the syntax of the file",
        path=name,
        value=suffix,
        hint="name it .toml, .json, .yaml or .yml",
    )


def parse(raw: bytes, syntax: str, file: str | None = None) -> tuple[Source, list[Problem]]:
    """Parse the bytes of a graph file.

    Args:
        syntax: "toml", "json" or "yaml".
        file: its name, for messages and relative file names.
    """
    try:
        parsed = _reader(syntax)(_decode(raw))
        check_bounds(parsed.data)
        if not isinstance(parsed.data, dict):
            raise SyntaxProblem(f"a graph file is a table of sections, not {_kind(parsed.data)}", 1, 1)
    except SyntaxProblem as error:
        where = Where(file, error.line, error.column)
        return Source(file, {}), [Problem(kind=OptionError, message=error.message, where=where)]
    source = Source(file, parsed.data, parsed.positions)
    problems = [
        Problem(
            kind=OptionError,
            message=f"given twice, first in line {source.where(path).line}",
            path=path,
            where=Where(file, line, column),
        )
        for path, line, column in parsed.duplicates
    ]
    return source, problems


def check_bounds(data: Any) -> None:
    """Refuse what is too deep or too much to walk. Does not recurse, so that it can be asked about anything.

    Raises:
        SyntaxProblem: it is.
    """
    count = 0
    todo = [(data, 1)]
    while todo:
        value, depth = todo.pop()
        inner = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
        count += len(inner)
        if depth > MAX_DEPTH:
            raise SyntaxProblem(f"nested deeper than {MAX_DEPTH} levels")
        if count > MAX_VALUES:
            raise SyntaxProblem(f"more than {MAX_VALUES:,} values")
        todo.extend((item, depth + 1) for item in inner if isinstance(item, (dict, list)))


def _reader(syntax: str) -> Callable[[str], Parsed]:
    # Imported when needed: YAML alone costs as much start-up time as the rest.
    if syntax == "toml":
        from blockgraph.graph.source_toml import read_toml

        return read_toml
    if syntax == "json":
        from blockgraph.graph.source_json import read_json

        return read_json
    from blockgraph.graph.source_yaml import read_yaml

    return read_yaml


def _read(name: str) -> bytes:
    try:
        descriptor = os.open(name, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
        with open(descriptor, "rb") as file:
            if stat.S_ISDIR(os.fstat(descriptor).st_mode):
                raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR))
            os.set_blocking(descriptor, True)
            raw = file.read(MAX_BYTES + 1)
    except OSError as error:
        raise IOFailure(f"can not read '{name}': {error.strerror}", errno=error.errno) from None
    except ValueError as error:  # a NUL in the name
        raise BlockGraphError(f"can not read {name!r}: {error}") from None
    if len(raw) > MAX_BYTES:
        raise IOFailure(f"'{name}' is larger than {MAX_BYTES >> 20} MiB, too large for a graph file", errno=errno.EFBIG)
    return raw


def _decode(raw: bytes) -> str:
    try:
        text = raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        before = raw[: error.start]
        line = before.count(b"\n") + 1
        column = len(before[before.rfind(b"\n") + 1 :].decode("utf-8", "replace")) + 1
        raise SyntaxProblem(f"not UTF-8 text (byte 0x{raw[error.start]:02x})", line, column) from None
    return text.replace("\r\n", "\n")


def _kind(value: Any) -> str:
    return {list: "a list", str: "a string", type(None): "null"}.get(type(value), "a single value")


def huge_number(text: str) -> tuple[int, int]:
    """Line and column of the first number that Python refuses to read for its length; 0, 0 without one."""
    match = _HUGE.search(text)
    return Lines(text).place(match.start()) if match else (0, 0)


class Lines:
    """Line and column of an offset in a text."""

    def __init__(self, text: str) -> None:
        self._starts = [0]
        start = text.find("\n")
        while start >= 0:
            self._starts.append(start + 1)
            start = text.find("\n", start + 1)

    def place(self, offset: int) -> tuple[int, int]:
        """Line and column, from 1."""
        line = bisect_right(self._starts, offset)
        return line, offset - self._starts[line - 1] + 1

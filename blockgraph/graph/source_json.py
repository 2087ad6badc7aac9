# SPDX-FileCopyrightText: blockgraph contributors
# SPDX-License-Identifier: MIT
"""JSON graph files. The json module parses and judges the text; a walk over the tokens finds the places of members."""

from __future__ import annotations

import json
import re
from functools import partial
from typing import Any

from blockgraph.graph.source import MAX_DEPTH, Lines, Parsed, SyntaxProblem, huge_number, join

_STRING = re.compile(r'"[^"\\]*(?:\\.[^"\\]*)*"')
_SPACE = re.compile(r"[ \t\n\r]*")
#: a string, or (group 1) what JavaScript takes for a number and JSON does not
_CONSTANT = re.compile(r'"[^"\\]*(?:\\.[^"\\]*)*"|(NaN|-?Infinity)')
_SCALAR = re.compile(r"[^\s,\]}]+")


def read_json(text: str) -> Parsed:
    """Parse JSON (RFC 8259, without NaN and Infinity).

    Raises:
        SyntaxProblem: not JSON.
    """
    doubled = False

    def table(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        nonlocal doubled
        out = dict(pairs)
        doubled |= len(out) != len(pairs)
        return out

    try:
        data = json.loads(text, object_pairs_hook=table, parse_constant=partial(_constant, text))
    except json.JSONDecodeError as error:
        raise _broken(text, error) from None
    except RecursionError:
        raise SyntaxProblem(f"nested deeper than {MAX_DEPTH} levels") from None
    except ValueError:
        raise SyntaxProblem("not valid JSON: a number of thousands of digits", *huge_number(text)) from None
    walk: list[_Walk] = []

    def positions() -> dict[str, tuple[int, int]]:
        if not walk:
            walk.append(_Walk(text))
        return walk[0].positions

    if doubled:
        positions()
    return Parsed(data, positions, walk[0].duplicates if walk else [])


def _broken(text: str, error: json.JSONDecodeError) -> SyntaxProblem:
    before = text[: error.pos].rstrip()
    if before.endswith(",") and text[error.pos : error.pos + 1] in ("]", "}"):
        place = Lines(text).place(len(before) - 1)
        return SyntaxProblem("not valid JSON: a comma with nothing behind it", *place)
    # From Python 3.13 on the comma is told of as such, with its own place.
    reason = "a comma with nothing behind it" if error.msg.startswith("Illegal trailing comma") else error.msg.lower()
    return SyntaxProblem(f"not valid JSON: {reason}", error.lineno, error.colno)


def _constant(text: str, name: str) -> None:
    place = next((Lines(text).place(match.start()) for match in _CONSTANT.finditer(text) if match[1]), (0, 0))
    raise SyntaxProblem(f"not valid JSON: {name} is not a number", *place)


class _Walk:
    """Places of the members of a valid JSON text.

    Attributes:
        positions: path -> line and column of its key (of the value, in a list).
        duplicates: path, line, column of members that an object has already.
    """

    def __init__(self, text: str) -> None:
        self._text = text
        self._lines = Lines(text)
        self.positions: dict[str, tuple[int, int]] = {}
        self.duplicates: list[tuple[str, int, int]] = []
        self._run()

    def _run(self) -> None:
        """A loop over tokens: the text may be nested deeper than Python recurses."""
        text = self._text
        offset = 0
        #: open containers: path, and the next index of a list (None in an object)
        stack: list[tuple[str, int | None]] = []
        while (offset := self._skip(offset)) < len(text):
            char = text[offset]
            if char in "]}":
                stack.pop()
                offset += 1
                continue
            if char == ",":
                offset += 1
                continue
            path = ""
            if stack:
                parent, index = stack[-1]
                start = offset
                if index is None:
                    key, offset = self._string(offset)
                    path = join(parent, key)
                    offset = self._skip(self._skip(offset) + 1)  # the colon
                else:
                    path = f"{parent}[{index}]"
                    stack[-1] = (parent, index + 1)
                self._note(path, start)
                char = text[offset]
            if char in "[{":
                stack.append((path, 0 if char == "[" else None))
                offset += 1
            elif char == '"':
                offset = self._string(offset)[1]
            else:
                match = _SCALAR.match(text, offset)
                assert match
                offset = match.end()

    def _note(self, path: str, offset: int) -> None:
        place = self._lines.place(offset)
        if path in self.positions:
            self.duplicates.append((path, *place))
        else:
            self.positions[path] = place

    def _skip(self, offset: int) -> int:
        match = _SPACE.match(self._text, offset)
        assert match
        return match.end()

    def _string(self, offset: int) -> tuple[str, int]:
        match = _STRING.match(self._text, offset)
        assert match
        text = match.group()
        return json.loads(text) if "\\" in text else text[1:-1], match.end()

# SPDX-FileCopyrightText: blockgraph contributors
# SPDX-License-Identifier: MIT
"""TOML graph files. tomllib parses and judges the text; it tells no places, so a scanner of our own finds them.

The scanner runs only over text that tomllib has accepted, and only when a place is asked for. It knows just enough
of TOML to tell keys from values: headers, dotted and quoted keys, the four kinds of strings, arrays, inline tables.
"""

from __future__ import annotations

import re
import tomllib

from blockgraph.graph.source import MAX_DEPTH, Lines, Parsed, SyntaxProblem, check_bounds, huge_number, join

# No possessive quantifiers here: Python before 3.11.5, which Debian 12 has, gets those of groups wrong.
_AT = re.compile(r" \(at (?:line (\d+), column (\d+)|end of document)\)$")
_BLANK = re.compile(r"[ \t]*")
#: between statements, and between the items of an array
_FILLER = re.compile(r"[ \t\n]*(?:#[^\n]*[ \t\n]*)*")
_BARE_KEY = re.compile(r"[A-Za-z0-9_-]+")
_MEMBER = re.compile(r"[ \t]*([A-Za-z0-9_-][A-Za-z0-9_.-]*)[ \t]*=")
_BASIC = re.compile(r'"[^"\\]*(?:\\.[^"\\]*)*"')
_LITERAL = re.compile(r"'[^']*'")
# The closing quotes of a multi-line string may follow one or two quotes of its text.
_MULTI_BASIC = re.compile(r'"""[^"\\]*(?:(?:\\.|"(?!"")|"(?="""))[^"\\]*)*"""', re.DOTALL)
_MULTI_LITERAL = re.compile(r"'''[^']*(?:(?:'(?!'')|'(?='''))[^']*)*'''")
_SCALAR = re.compile(r"[^,\]}#\n]+")


def read_toml(text: str) -> Parsed:
    """Parse TOML 1.0.

    Raises:
        SyntaxProblem: not TOML (a member given twice, too).
    """
    try:
        data = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        message = str(error)
        match = _AT.search(message)
        place = Lines(text).place(len(text))
        if match and match[1]:
            place = (int(match[1]), int(match[2]))
        reason = message[: match.start()] if match else message
        if reason == "Cannot overwrite a value":
            reason, place = _given_twice(text, *place)
        raise SyntaxProblem(f"not valid TOML: {reason[:1].lower()}{reason[1:]}", *place) from None
    except RecursionError:
        raise SyntaxProblem(f"nested deeper than {MAX_DEPTH} levels") from None
    except ValueError:
        raise SyntaxProblem("not valid TOML: a number of thousands of digits", *huge_number(text)) from None
    check_bounds(data)
    return Parsed(data, lambda: scan(text), [])


def _given_twice(text: str, line: int, column: int) -> tuple[str, tuple[int, int]]:
    """Reason and place: the member's, where it begins the line at whose end tomllib has noticed it."""
    match = _MEMBER.match(text.split("\n")[line - 1][: column - 1])
    if match is None:
        return "a member is given twice", (line, column)
    return f"member {match[1]!r} is given twice", (line, match.start(1) + 1)


def scan(text: str) -> dict[str, tuple[int, int]]:
    """Line and column of every key, and of every item of an array, by path.

    Args:
        text: valid TOML with "\\n" line ends, nested no deeper than MAX_DEPTH.
    """
    scanner = _Scanner(text)
    scanner.run()
    lines = Lines(text)
    return {path: lines.place(offset) for path, offset in scanner.offsets.items()}


class _Scanner:
    """Offsets of the keys of a valid text.

    Attributes:
        offsets: path -> where its key (header, item) first begins.
    """

    def __init__(self, text: str) -> None:
        self._text = text
        self._at = 0
        self.offsets: dict[str, int] = {}
        #: arrays of tables: path -> number of its tables so far
        self._arrays: dict[str, int] = {}

    def run(self) -> None:
        """Scan the whole text."""
        prefix = ""
        while self._skip(_FILLER) < len(self._text):
            if self._text[self._at] == "[":
                prefix = self._header()
            else:
                self._pair(prefix)

    def _header(self) -> str:
        """`[a.b]` or `[[a.b]]`: returns the path of the table it opens."""
        start = self._at
        array = self._text.startswith("[[", start)
        self._at += 2 if array else 1
        keys = self._keys()
        self._at += 2 if array else 1
        path = ""
        for key, _ in keys[:-1]:
            path = self._note(join(path, key), start)
            if path in self._arrays:
                path = f"{path}[{self._arrays[path] - 1}]"
        path = self._note(join(path, keys[-1][0]), start)
        if array:
            index = self._arrays.get(path, 0)
            self._arrays[path] = index + 1
            path = self._note(f"{path}[{index}]", start)
        return path

    def _pair(self, prefix: str) -> None:
        """`key = value` in the table at `prefix`."""
        path = prefix
        for key, offset in self._keys():
            path = self._note(join(path, key), offset)
        self._at += 1  # the equals sign
        self._skip(_BLANK)
        self._value(path)

    def _keys(self) -> list[tuple[str, int]]:
        """A dotted key: its parts and where they begin. Stops before what follows the blanks after it."""
        keys = []
        while True:
            start = self._skip(_BLANK)
            char = self._text[start]
            if char == '"':
                quoted = self._take(_BASIC)
                keys.append((tomllib.loads(f"k = {quoted}")["k"], start))
            elif char == "'":
                keys.append((self._take(_LITERAL)[1:-1], start))
            else:
                keys.append((self._take(_BARE_KEY), start))
            self._skip(_BLANK)
            if self._text[self._at] != ".":
                return keys
            self._at += 1

    def _value(self, path: str) -> None:
        text, at = self._text, self._at
        if text.startswith('"""', at):
            self._take(_MULTI_BASIC)
        elif text.startswith("'''", at):
            self._take(_MULTI_LITERAL)
        elif text[at] == '"':
            self._take(_BASIC)
        elif text[at] == "'":
            self._take(_LITERAL)
        elif text[at] == "[":
            self._array(path)
        elif text[at] == "{":
            self._inline(path)
        else:
            self._take(_SCALAR)

    def _array(self, path: str) -> None:
        self._at += 1
        index = 0
        while self._text[self._skip(_FILLER)] != "]":
            self._note(f"{path}[{index}]", self._at)
            self._value(f"{path}[{index}]")
            index += 1
            if self._text[self._skip(_FILLER)] == ",":
                self._at += 1
        self._at += 1

    def _inline(self, path: str) -> None:
        self._at += 1
        while self._text[self._skip(_FILLER)] != "}":
            self._pair(path)
            if self._text[self._skip(_FILLER)] == ",":
                self._at += 1
        self._at += 1

    def _note(self, path: str, offset: int) -> str:
        self.offsets.setdefault(path, offset)
        return path

    def _skip(self, pattern: re.Pattern[str]) -> int:
        match = pattern.match(self._text, self._at)
        assert match
        self._at = match.end()
        return self._at

    def _take(self, pattern: re.Pattern[str]) -> str:
        match = pattern.match(self._text, self._at)
        assert match
        self._at = match.end()
        return match.group()

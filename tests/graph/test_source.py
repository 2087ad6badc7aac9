# SPDX-FileCopyrightText: blockgraph contributors
# SPDX-License-Identifier: MIT
"""Graph files as text: places of members, syntax errors, hostile input."""

from __future__ import annotations

import json
import os
import re
import tomllib
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import example, given
from hypothesis import strategies as st

from blockgraph.errors import IOFailure, OptionError
from blockgraph.graph.source import MAX_BYTES, Source, join, parse, read_source
from blockgraph.graph.source_toml import scan

TOML = """\
# a comment with = and [brackets]
title = "x"

[[nodes]]
node-name = "disk"    # another
driver = 'qcow2'
cache.direct = true
file = {driver = "file", filename = "a\\"b.qcow2", "odd key" = [1, {x = 2}]}

[nodes.server]
type = "unix"

[[nodes]]
"node-name" = \"\"\"
two
lines\"\"\"\"\"
list = [
  1, # one
  [2, 3],
  "]",
]

[[nodes.rules]]
a = 1979-05-27 07:32:00
[[nodes.rules]]
a = 1
"""


def paths(data: Any, path: str = "") -> list[str]:
    """Every path in the data."""
    found = [path] if path else []
    if isinstance(data, dict):
        for key, value in data.items():
            found += paths(value, join(path, key))
    elif isinstance(data, list):
        for index, value in enumerate(data):
            found += paths(value, f"{path}[{index}]")
    return found


def test_toml_places_of_every_kind_of_member() -> None:
    places = scan(TOML)
    assert set(places) == set(paths(tomllib.loads(TOML)))
    expected = {
        "title": (2, 1),
        "nodes": (4, 1),
        "nodes[0]": (4, 1),
        "nodes[0].driver": (6, 1),
        "nodes[0].cache.direct": (7, 7),
        "nodes[0].file.filename": (8, 26),
        "nodes[0].file.odd key": (8, 51),
        "nodes[0].file.odd key[1].x": (8, 68),
        "nodes[0].server": (10, 1),
        "nodes[0].server.type": (11, 1),
        "nodes[1].node-name": (14, 1),
        "nodes[1].list[1][1]": (19, 7),
        "nodes[1].rules[1].a": (26, 1),
    }
    assert {path: places[path] for path in expected} == expected


keys = st.one_of(
    st.sampled_from(["a", "b", "c", "node-name", "1", "-"]),
    st.text(st.characters(codec="utf-8", exclude_categories=["Cs", "Cc"]), min_size=1, max_size=4),
)
texts = st.text(st.sampled_from("ab '\"\\\n\t#=[]{},.é"), max_size=8)
leaves = st.one_of(
    st.booleans(), st.integers(-(2**63), 2**63 - 1), texts, st.floats(allow_nan=False, allow_infinity=False)
)
tables = st.dictionaries(
    keys,
    st.recursive(
        leaves, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(keys, inner, max_size=3), max_leaves=8
    ),
    max_size=4,
)


class Writer:
    """Writes data as TOML, choosing among the ways to say the same."""

    def __init__(self, draw: Any) -> None:
        self.draw = draw
        self.lines: list[str] = []

    def choose(self, *choices: str) -> str:
        return str(self.draw(st.sampled_from(choices)))

    def key(self, key: str) -> str:
        if re.fullmatch(r"[A-Za-z0-9_-]+", key) and self.choose("bare", "quoted") == "bare":
            return key
        if "'" not in key and "\n" not in key and self.choose("basic", "literal") == "literal":
            return f"'{key}'"
        return self.basic(key)

    def basic(self, text: str) -> str:
        return '"' + "".join(_escaped(char) for char in text) + '"'

    def text(self, text: str) -> str:
        style = self.choose("basic", "literal", "multi-basic", "multi-literal")
        if style == "literal" and "'" not in text and "\n" not in text:
            return f"'{text}'"
        if style == "multi-literal" and "'''" not in text and not text.startswith("\n"):
            end = len(text) - len(text.rstrip("'"))
            if end <= 2:
                return f"'''{text}'''"
        if style == "multi-basic":
            body = "".join(char if char in "\n\t" else _escaped(char) for char in text)
            body = body.replace('\\"', '"') if '""' not in text else body
            return f'"""\n{body}"""'
        return self.basic(text)

    def space(self) -> str:
        return self.choose("", " ", "\t")

    def value(self, value: Any) -> str:
        if isinstance(value, str):
            return self.text(value)
        if isinstance(value, bool):
            return str(value).lower()
        if isinstance(value, list):
            gap = self.choose("", "\n", " # ] comment\n  ")
            items = [f"{gap}{self.value(item)}{self.space()}" for item in value]
            trailing = "," if items and self.choose("", ",") else ""
            return f"[{','.join(items)}{trailing}{gap}]"
        if isinstance(value, dict):
            return "{" + ", ".join(f"{self.key(key)}{self.space()}= {self.value(v)}" for key, v in value.items()) + "}"
        return str(value)

    def table(self, prefix: str, table: dict[str, Any]) -> None:
        later: list[tuple[str, Any]] = []
        for key, value in table.items():
            if isinstance(value, dict):
                style = self.choose("inline", "header", "dotted")
                if style == "header" or (style == "dotted" and not value):
                    later.append((key, value))
                    continue
                if style == "dotted":
                    name = self.key(key)
                    self.lines += [f"{name}{self.space()}.{self.key(k)} = {self.value(v)}" for k, v in value.items()]
                    continue
            elif (
                isinstance(value, list)
                and value
                and all(isinstance(item, dict) for item in value)
                and self.choose("inline", "header") == "header"
            ):
                later.append((key, value))
                continue
            self.lines.append(f"{self.space()}{self.key(key)} = {self.value(value)}{self.choose('', ' # c')}")
        for key, value in later:
            name = f"{prefix}.{self.key(key)}" if prefix else self.key(key)
            for item in value if isinstance(value, list) else [value]:
                self.lines.append(f"[[ {name} ]]" if isinstance(value, list) else f"[{name}]")
                self.table(name, item)


def _escaped(char: str) -> str:
    return {"\n": "\\n", '"': '\\"', "\\": "\\\\", "\t": "\\t"}.get(char, char)


@given(st.data(), tables)
def test_toml_scanner_agrees_with_tomllib_on_written_files(data: st.DataObject, table: dict[str, Any]) -> None:
    writer = Writer(data.draw)
    writer.table("", table)
    text = "\n".join(writer.lines) + "\n"
    assert tomllib.loads(text) == table
    places = scan(text)
    assert set(places) == set(paths(table))
    lines = text.split("\n")
    for path, (line, column) in places.items():
        found = lines[line - 1][column - 1 :]
        if re.fullmatch(r"[a-c]|node-name", path) and not found.startswith("["):
            assert found.startswith((path, f'"{path}"', f"'{path}'"))


@given(st.integers(0, len(TOML)), st.integers(0, 3), st.text(st.sampled_from("\"'[]{}=,.# \na1\\"), max_size=3))
@example(0, 0, "")
def test_toml_scanner_agrees_with_tomllib_on_mutated_files(start: int, cut: int, put: str) -> None:
    text = TOML[:start] + put + TOML[start + cut :]
    try:
        data = tomllib.loads(text)
    except tomllib.TOMLDecodeError:
        return
    assert set(scan(text)) == set(paths(data))


@given(tables)
def test_json_and_yaml_places_cover_every_member(table: dict[str, Any]) -> None:
    for text, syntax in ((json.dumps(table, indent=1), "json"), (yaml.safe_dump(table, allow_unicode=True), "yaml")):
        source, problems = parse(text.encode("utf-8", "surrogatepass"), syntax)
        assert problems == []
        assert json.dumps(source.data) == json.dumps(table) or syntax == "yaml"
        if syntax == "json":
            assert all(source.where(path).line for path in paths(table))


def test_json_places_are_those_of_keys_and_items() -> None:
    source, _ = parse(b'{\n  "a": {"x": [10,\n   {"y": "s\\"]"}]},\n  "b" : -1.5e3 }', "json", "f.json")
    assert {path: source.where(path)[1:] for path in paths(source.data)} == {
        "a": (2, 3),
        "a.x": (2, 9),
        "a.x[0]": (2, 15),
        "a.x[1]": (3, 4),
        "a.x[1].y": (3, 5),
        "b": (4, 3),
    }
    assert str(source.where("a.x[1].unknown.deeper")) == "f.json:3:4"
    assert str(source.where("zzz")) == "f.json"


def test_yaml_places_are_those_of_keys_and_items() -> None:
    source, _ = parse(b"a:\n  - x: 1\n    y: {z: [1,2]}\n  - &t 5\nb: *t\n", "yaml")
    assert source.data == {"a": [{"x": 1, "y": {"z": [1, 2]}}, 5], "b": 5}
    assert {path: source.where(path)[1:] for path in paths(source.data)} == {
        "a": (1, 1),
        "a[0]": (2, 5),
        "a[0].x": (2, 5),
        "a[0].y": (3, 5),
        "a[0].y.z": (3, 9),
        "a[0].y.z[0]": (3, 13),
        "a[0].y.z[1]": (3, 15),
        "a[1]": (4, 5),
        "b": (5, 1),
    }


def test_yaml_is_the_core_schema_of_yaml_1_2() -> None:
    source, _ = parse(
        b"a: off\nb: no\nc: 2024-01-01\nd: 12:30\ne: 0x10\nf: 0o17\ng: ~\nh: 'true'\ni: !!str 5\nj: 1e3\nk: 010\n",
        "yaml",
    )
    assert source.data == {
        "a": "off",
        "b": "no",
        "c": "2024-01-01",
        "d": "12:30",
        "e": 16,
        "f": 15,
        "g": None,
        "h": "true",
        "i": "5",
        "j": 1000.0,
        "k": 10,
    }


@pytest.mark.parametrize("syntax", ["toml", "yaml"])
def test_empty_file_is_an_empty_description(syntax: str) -> None:
    source, problems = parse(b"", syntax)
    assert (source.data, problems) == ({}, [])


BROKEN = {
    "toml-value": ("toml", b"a = 1\nb = \n", "f:2:5: not valid TOML: invalid value"),
    "toml-key-twice": ("toml", b"a-b = 1\n  a-b = 2\n", "f:2:3: not valid TOML: member 'a-b' is given twice"),
    "toml-key-twice-quoted": ("toml", b'a = 1\n"a" = 2\n', "f:2:8: not valid TOML: a member is given twice"),
    "toml-end": ("toml", b'a = "\xc3\xa9', "f:1:7: not valid TOML: unterminated string"),
    "toml-digits": ("toml", b"a = " + b"9" * 5000, "f:1:5: not valid TOML: a number of thousands of digits"),
    "toml-deep": ("toml", b"a = " + b"[" * 5000 + b"]" * 5000, "f: nested deeper than 200 levels"),
    "toml-deep-keys": ("toml", b"a" + b".a" * 5000 + b" = 1", "f: nested deeper than 200 levels"),
    "json-comma": ("json", b'{"a": 1,\n "b": 2,\n}', "f:2:8: not valid JSON: a comma with nothing behind it"),
    "json-comma-list": ("json", b'{"a": [1 ,\n ]}', "f:1:10: not valid JSON: a comma with nothing behind it"),
    "json-digits": ("json", b'{"a":\n ' + b"9" * 5000 + b"}", "f:2:2: not valid JSON: a number of thousands"),
    "json-nan-behind-a-string": ("json", b'{"NaN":\n -Infinity}', "f:2:2: not valid JSON: -Infinity is not"),
    "json-nan": ("json", b'{"a": NaN}', "f:1:7: not valid JSON: NaN is not a number"),
    "json-deep": ("json", b"[" * 100_000 + b"]" * 100_000, "f: nested deeper than 200 levels"),
    "json-list": ("json", b"[]", "f:1:1: a graph file is a table of sections, not a list"),
    "json-latin1": ("json", b'{"a":\n "\xe9t\xe9"}', "f:2:3: not UTF-8 text (byte 0xe9)"),
    "yaml-quote": ("yaml", b'a: "b\n', "f:2:1: not valid YAML: "),
    "yaml-tab": ("yaml", b"a:\n\tb: 1\n", "f:2:1: not valid YAML: "),
    "yaml-python": ("yaml", b"a: !!python/object/apply:os.system [x]", "f:1:4: tag 'tag:yaml.org,2002:python/ob"),
    "yaml-documents": ("yaml", b"a: 1\n---\nb: 1\n", "f:2:1: several YAML documents"),
    "yaml-recursive": ("yaml", b"a: &x [*x]", "f:1:8: alias '*x' has no (finished) anchor"),
    "yaml-complex-key": ("yaml", b"? [a]\n: 1\n", "f:1:3: a key must be a string"),
    "yaml-control": ("yaml", b"b: 1\na: \x01\n", "f:2:4: not valid YAML: "),
    "yaml-deep": ("yaml", b"a: " + b"[" * 100_000, "f:1:"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_syntax_error_is_one_problem_with_its_place(name: str) -> None:
    syntax, raw, starts = BROKEN[name]
    source, (problem,) = parse(raw, syntax, "f")
    assert source.data == {}
    assert problem.kind is OptionError
    assert starts in str(problem)


def test_yaml_alias_bomb_is_refused_quickly() -> None:
    lines = ["a0: &a0 [x, x, x, x, x, x, x, x, x, x]"]
    lines += [f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 10)}]" for i in range(1, 40)]
    _, (problem,) = parse("\n".join(lines).encode(), "yaml", "f")
    assert "more than 250,000 values" in problem.message


def test_duplicate_keys_are_all_told_with_their_places() -> None:
    raw = {
        "json": b'{"a": 1,\n "a": 2, "b": {"c": 1,\n "c": 2}}',
        "yaml": b"a: 1\na: 2\nb:\n  c: 1\n  c: 2\n",
    }
    expected = {"json": ["f:2:2: a", "f:3:2: b.c"], "yaml": ["f:2:1: a", "f:5:3: b.c"]}
    for syntax, text in raw.items():
        _, problems = parse(text, syntax, "f")
        assert [str(problem).split(": given twice, first in line ")[0] for problem in problems] == expected[syntax]


@given(st.sampled_from(["toml", "json", "yaml"]), st.binary(max_size=60) | st.text(max_size=60).map(str.encode))
def test_any_bytes_are_data_or_a_problem(syntax: str, raw: bytes) -> None:
    source, problems = parse(raw, syntax, "f")
    assert isinstance(source.data, dict)
    assert isinstance(source.where("a.b[3]"), tuple)
    for problem in problems:
        assert str(problem).startswith("f")


def test_read_source_unknown_suffix_says_which_are_known(tmp_path: Path) -> None:
    with pytest.raises(OptionError, match=r"graph\.txt.*name it .toml, .json"):
        read_source(tmp_path / "graph.txt")


def test_read_source_missing_file_directory_or_huge_file_is_an_io_failure(tmp_path: Path) -> None:
    with pytest.raises(IOFailure, match="No such file"):
        read_source(tmp_path / "a.toml")
    (tmp_path / "d.toml").mkdir()
    with pytest.raises(IOFailure, match="Is a directory"):
        read_source(tmp_path / "d.toml")
    with open(tmp_path / "big.toml", "wb") as file:
        os.truncate(file.fileno(), MAX_BYTES + 1)
    with pytest.raises(IOFailure, match="larger than 32 MiB"):
        read_source(tmp_path / "big.toml")


def test_source_line_ends_and_byte_order_mark_of_other_systems(tmp_path: Path) -> None:
    (tmp_path / "g.toml").write_bytes(b"\xef\xbb\xbfa = 1\r\nb = 2\r\n")
    source, problems = read_source(tmp_path / "g.toml")
    assert problems == []
    assert isinstance(source, Source)
    assert source.where("b")[1:] == (2, 1)

# SPDX-FileCopyrightText: blockgraph contributors
# SPDX-License-Identifier: MIT
"""The JSON Schema agrees with what loads, and explains what it offers."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given

from blockgraph.graph.load import check_description
from blockgraph.graph.memberdocs import member_docs
from blockgraph.graph.problem import errors
from blockgraph.graph.schema import graph_schema
from blockgraph.options import NodeOptions
from blockgraph.registry import driver_names, get_driver
from tests.graph.test_load import BLOCKDEV, PROBLEMS, SECTION_PROBLEMS, good
from tests.graph.test_load_hostile import descriptions

jsonschema = pytest.importorskip("jsonschema")

SCHEMA = graph_schema()
#: At the same moment: other tests register drivers of their own.
NAMES = driver_names()
VALIDATOR = jsonschema.Draft202012Validator(SCHEMA)

#: Problems that only the whole graph shows, or a structure by itself.
BEYOND = {
    "alignment", "cycle", "dangling", "detect-zeroes", "dotted-twice", "force-share",
    "name-none", "name-twice", "read-only-file", "relation", "target-size", "window",
    "bitmap-dangling", "bitmap-name-long", "bitmap-no-place", "bitmap-twice", "bitmap-crash-safe",
    "bitmap-epochs", "bitmap-two-sidecars", "bitmap-two-promises", "job-bitmap",
    "bitmap-granularity-large", "export-bitmap", "export-bitmap-dangling", "export-bitmap-of-another",
    "export-bitmap-twice", "export-dangling", "export-id-twice", "export-name-twice", "job-filter-name", "job-id-twice",
    "job-target-is-device", "job-target-missing", "job-target-size", "server-missing", "server-port",
}  # fmt: skip


def test_schema_is_a_valid_schema() -> None:
    jsonschema.Draft202012Validator.check_schema(SCHEMA)
    assert json.loads(json.dumps(SCHEMA)) == SCHEMA


def test_good_description_is_valid() -> None:
    assert [error.message for error in VALIDATOR.iter_errors(good())] == []


@pytest.mark.parametrize("text", BLOCKDEV)
def test_blockdev_object_of_qemu_is_valid(text: str) -> None:
    assert [error.message for error in VALIDATOR.iter_errors({"nodes": [json.loads(text)]})] == []


@pytest.mark.parametrize("name", [name for name in PROBLEMS if name not in BEYOND])
def test_problem_of_a_node_is_one_for_the_schema_too(name: str) -> None:
    assert not VALIDATOR.is_valid({"nodes": PROBLEMS[name][0]})


@pytest.mark.parametrize("name", [name for name in SECTION_PROBLEMS if name not in BEYOND])
def test_problem_of_a_section_is_one_for_the_schema_too(name: str) -> None:
    assert not VALIDATOR.is_valid(SECTION_PROBLEMS[name][0])


@pytest.mark.parametrize("nothing", [None, ""])
def test_backing_may_be_null_and_file_may_not(nothing: object) -> None:
    node = {"driver": "qcow2", "node-name": "q", "file": "f", "backing": nothing}
    assert VALIDATOR.is_valid({"nodes": [node]})
    assert not VALIDATOR.is_valid({"nodes": [{**node, "file": nothing}]})


@given(descriptions)
def test_what_loads_without_errors_is_valid(data: dict[str, Any]) -> None:
    if not errors(check_description(data)):
        assert VALIDATOR.is_valid(data)


def test_every_driver_name_and_alias_is_offered() -> None:
    assert SCHEMA["$defs"]["node"]["properties"]["driver"]["enum"] == NAMES


def test_members_are_explained_in_the_words_of_the_manuals() -> None:
    members = SCHEMA["$defs"]["driver-backup-top"]["properties"]
    assert members["target"]["description"] == "gets the old bytes; same size as the disk."
    assert members["read-only"]["description"] == "refuse writes; the image is opened read-only."
    assert SCHEMA["$defs"]["NbdServerOptions"]["properties"]["addr"]["description"] == "where it listens."
    foreign = {f"driver-{name}" for name in driver_names() if not get_driver(name).__module__.startswith("blockgraph.")}
    without = [
        f"{name}.{member}"
        for name, schema in SCHEMA["$defs"].items()
        for member, described in schema.get("properties", {}).items()
        if not described.get("description") and name != "node" and name not in foreign
    ]
    assert without == []


class Documented(NodeOptions, frozen=True):
    """A structure.

    Attributes:
        one: the first
            in two lines.
        two, three: both.
        * `four_words`: with a star.
        five      in columns
        someone: else's.

    one: not any more.
    """

    one: int
    two: int
    three: int
    four_words: int
    five: int


def test_member_docs_are_read_in_every_way_they_are_written() -> None:
    docs = member_docs(Documented)
    assert {name: docs[name] for name in ("one", "two", "three", "four-words", "five")} == {
        "one": "the first in two lines.",
        "two": "both.",
        "three": "both.",
        "four-words": "with a star.",
        "five": "in columns",
    }
    assert docs["discard"].startswith('"unmap" passes discards on')

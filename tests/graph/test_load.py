# SPDX-FileCopyrightText: blockgraph contributors
# SPDX-License-Identifier: MIT
"""Descriptions: each kind of problem alone, many at once, the three syntaxes alike, inline nodes, hostile input."""

from __future__ import annotations

import copy
import itertools
import json
from pathlib import Path
from typing import Any

import pytest

from blockgraph.errors import CycleError, GraphError, OptionError, PermissionConflict, RoleError
from blockgraph.graph.load import check_description, convert_options, examine, flatten_node, load
from blockgraph.graph.problem import Problem, errors
from blockgraph.options import NodeOptions
from blockgraph.registry import get_driver
from tests.helpers.toml import all_syntaxes

SERVER = {"addr": {"type": "unix", "path": "nbd.sock"}}


def good() -> dict[str, Any]:
    """A description with every section and nothing wrong."""
    return {
        "nodes": [
            {"node-name": "disk", "driver": "raw", "file": {"driver": "file", "filename": "disk.img"}},
            {"node-name": "scratch", "driver": "memory", "size": 1 << 20},
            {"node-name": "top", "driver": "backup-top", "file": "disk", "target": "scratch"},
            {"node-name": "data", "driver": "null-co", "size": 4096},
        ],
        "exports": [{"type": "nbd", "id": "guest", "node-name": "top", "writable": True}],
        "jobs": [
            {"type": "backup", "device": "data", "sync": "full", "target": {"driver": "memory", "size": 4096}},
        ],
        "nbd-server": copy.deepcopy(SERVER),
    }


def check(*nodes: Any, **sections: Any) -> list[str]:
    """Problems of a few nodes, as text; a node that nothing uses is none here."""
    data = {"nodes": list(nodes), **{key.replace("_", "-"): value for key, value in sections.items()}}
    return [str(p) for p in check_description(data) if "is not used by" not in p.message]


MEMORY = {"driver": "memory", "size": 512}


def test_good_description_has_no_problems() -> None:
    assert check_description(good()) == []


def test_good_description_flattens_to_nodes_children_first() -> None:
    description = load(good())
    names = [node.name for node in description.nodes]
    assert sorted(names) == ["#block0", "data", "disk", "scratch", "top"]
    assert names.index("#block0") < names.index("disk") < names.index("top")
    top = next(node for node in description.nodes if node.name == "top")
    assert top.children == {"file": "disk", "target": "scratch"}
    assert (top.where, top.inline, top.read_only) == ("nodes[2]", False, False)
    assert next(node for node in description.nodes if node.name == "#block0").inline
    assert description.jobs[0].options.target == MEMORY | {"size": 4096}


PROBLEMS: dict[str, tuple[list[Any], str]] = {
    "unknown-member": (
        [{**MEMORY, "node-name": "m", "sizes": 5}],
        "nodes[0].sizes: unknown member 'sizes' of driver 'memory'; did you mean 'size'?",
    ),
    "unknown-member-nothing-like-it": (
        [{**MEMORY, "node-name": "m", "qqq": 5}],
        "nodes[0].qqq: unknown member 'qqq' of driver 'memory'; allowed: auto-read-only, cache, ",
    ),
    "underscore": (
        [{**MEMORY, "node-name": "m", "read_only": True}],
        "nodes[0].read_only: unknown member 'read_only' of driver 'memory'; did you mean 'read-only'?",
    ),
    "missing-member": (
        [{"driver": "memory", "node-name": "m"}],
        "nodes[0].size: member 'size' of driver 'memory' is missing; 'size' is an integer of at least 0",
    ),
    "missing-child": (
        [{"driver": "raw", "node-name": "r"}],
        "nodes[0].file: member 'file' of driver 'raw' is missing; "
        "'file' is the name of a node or a table that describes one",
    ),
    "wrong-type": (
        [{"driver": "memory", "node-name": "m", "size": "512"}],
        "nodes[0].size: expected an integer of at least 0, found '512'; write the number without quotes",
    ),
    "wrong-type-bool": (
        [{**MEMORY, "node-name": "m", "read-only": "true"}],
        "nodes[0].read-only: expected true or false, found 'true'; write true or false, without quotes",
    ),
    "bool-is-no-integer": (
        [{"driver": "memory", "node-name": "m", "size": True}],
        "nodes[0].size: expected an integer of at least 0, found true",
    ),
    "wrong-choice": (
        [{**MEMORY, "node-name": "m", "discard": "unmapp"}],
        "nodes[0].discard: expected 'ignore' or 'unmap', found 'unmapp'; did you mean 'unmap'?",
    ),
    "wrong-number": (
        [{"driver": "memory", "node-name": "m", "size": -1}],
        "nodes[0].size: expected an integer of at least 0, found -1",
    ),
    "nested-unknown": (
        [{**MEMORY, "node-name": "m", "cache": {"dirct": True}}],
        "nodes[0].cache.dirct: unknown member 'dirct' of 'cache'; did you mean 'direct'?",
    ),
    "dotted-unknown": (
        [{**MEMORY, "node-name": "m", "cahce.direct": True}],
        "nodes[0].cahce.direct: unknown member 'cahce.direct' of driver 'memory'; did you mean 'cache.direct'?",
    ),
    "dotted-twice": (
        [{**MEMORY, "node-name": "m", "cache.direct": True, "cache": {"direct": False}}],
        "nodes[0].cache.direct: given twice, as 'cache' and as 'cache.direct'",
    ),
    "list-item": (
        [
            {
                "driver": "inject-error",
                "node-name": "i",
                "image": MEMORY,
                "inject-error": [{"event": "none"}, {"even": "none"}],
            }
        ],
        "nodes[0].inject-error[1].even: unknown member 'even' of 'inject-error[1]'; did you mean 'event'?",
    ),
    "list-choice": (
        [{"driver": "inject-error", "node-name": "i", "image": MEMORY, "take-child-perms": ["write", "resiz"]}],
        "nodes[0].take-child-perms[1]: expected 'consistent-read', 'resize', 'write' or 'write-unchanged', "
        "found 'resiz'; did you mean 'resize'?",
    ),
    "relation": (
        [{"driver": "backup-top", "node-name": "t", "file": MEMORY, "target": MEMORY, "min-cluster-size": 3}],
        "nodes[0]: min-cluster-size 3 is not a power of two",
    ),
    "force-share": ([{**MEMORY, "node-name": "m", "force-share": True}], "nodes[0].force-share: 'force-share' needs"),
    "detect-zeroes": (
        [{**MEMORY, "node-name": "m", "detect-zeroes": "unmap", "discard": "ignore"}],
        "nodes[0].detect-zeroes: 'detect-zeroes' can be 'unmap' only with 'discard' = 'unmap'",
    ),
    "driver-missing": ([{"node-name": "m"}], "nodes[0].driver: member 'driver' is missing; drivers: backup-top, "),
    "driver-unknown": (
        [{"driver": "qcow3", "node-name": "m"}],
        "nodes[0].driver: unknown driver 'qcow3'; did you mean 'qcow2'?",
    ),
    "driver-type": ([{"driver": 3, "node-name": "m"}], "nodes[0].driver: expected the name of a driver, found 3"),
    "not-a-node": (["disk"], "nodes[0]: expected a node description, found 'disk'"),
    "child-type": (
        [{"driver": "raw", "node-name": "r", "file": 5}],
        "nodes[0].file: expected the name of a node or a table that describes one, found 5",
    ),
    "child-null": (
        [{"driver": "raw", "node-name": "r", "file": None}],
        "nodes[0].file: expected the name of a node or a table that describes one, found null",
    ),
    "inline-problem": (
        [{"driver": "raw", "node-name": "r", "file": {"driver": "raw", "file": {"driver": "fil"}}}],
        "nodes[0].file.file.driver: unknown driver 'fil'; did you mean 'file'?",
    ),
    "name-invalid": (
        [{**MEMORY, "node-name": "a b"}],
        "nodes[0].node-name: node name 'a b': only letters, digits, '-', '.' and '_' are allowed, not ' '",
    ),
    "name-generated": (
        [{**MEMORY, "node-name": "#block0"}],
        "nodes[0].node-name: node name '#block0': names that start with '#' are for generated names",
    ),
    "name-twice": (
        [{**MEMORY, "node-name": "m"}, {**MEMORY, "node-name": "m"}],
        "nodes[1].node-name: node name 'm' is taken by nodes[0]",
    ),
    "name-none": ([MEMORY], "nodes[0].node-name: warning: node has no name, nothing can refer to it; add 'node-name'"),
    "dangling": (
        [{**MEMORY, "node-name": "memory0"}, {"driver": "raw", "node-name": "r", "file": "memori0"}],
        "nodes[1].file: r.file refers to node 'memori0', which does not exist; did you mean 'memory0'?",
    ),
    "cycle": (
        [{"driver": "raw", "node-name": "a", "file": "b"}, {"driver": "raw", "node-name": "b", "file": "a"}],
        "nodes[0].file: nodes refer to each other in a cycle: a.file -> b.file -> a",
    ),
    "child-of-protocol": (
        [{**MEMORY, "node-name": "m", "file": MEMORY}],
        "nodes[0].file: unknown member 'file' of driver 'memory'; ",
    ),
    "backing-of-raw": (
        [{"driver": "raw", "node-name": "r", "file": MEMORY, "backing": MEMORY}],
        "nodes[0].backing: unknown member 'backing' of driver 'raw'; ",
    ),
    "read-only-file": (
        [{"driver": "qcow2", "node-name": "q", "file": {"driver": "file", "filename": "x", "read-only": True}}],
        "nodes[0].file: node '#block0' is read-only, but q.file needs permission 'write, resize' on it; "
        "make '#block0' writable or the parent read-only",
    ),
    "window": (
        [{"driver": "raw", "node-name": "r", "file": MEMORY, "offset": 256, "size": 512}],
        "nodes[0].size: the window ends at 768, but its child at 512 bytes",
    ),
    "target-size": (
        [{"driver": "backup-top", "node-name": "t", "file": MEMORY, "target": {"driver": "null-co", "size": 1024}}],
        "nodes[0].target: the disk has 512 bytes but the target has 1024; make the target 512 bytes large",
    ),
    "alignment": (
        [{"driver": "inject-error", "node-name": "i", "image": MEMORY, "align": 512, "max-transfer": 700}],
        "nodes[0].max-transfer: must be a multiple of 512",
    ),
}


@pytest.mark.parametrize("name", PROBLEMS)
def test_node_problem_alone_is_told_once_with_its_path(name: str) -> None:
    nodes, starts = PROBLEMS[name]
    told = check(*nodes)
    assert len(told) == 1, told
    assert told[0].startswith(starts)


SECTION_PROBLEMS: dict[str, tuple[dict[str, Any], str]] = {
    "section-unknown": ({"node": []}, "node: unknown section 'node'; did you mean 'nodes'?"),
    "section-is-a-node": (
        {"driver": "file", "node-name": "m", "filename": "x"},
        "driver: a node outside of the section 'nodes'; nodes go into the list of that section: ",
    ),
    "section-not-yet": ({"secrets": []}, "secrets: section 'secrets' is not available yet; remove it"),
    "section-type": ({"exports": {}}, "exports: expected a list, found a table"),
    "export-type": (
        {"exports": [{"type": "nbt", "id": "x", "node-name": "m"}]},
        "exports[0].type: unknown type of export: 'nbt'; did you mean 'nbd'?",
    ),
    "export-type-missing": ({"exports": [{"id": "x"}]}, "exports[0].type: member 'type' of export is missing"),
    "export-not-a-table": ({"exports": [3]}, "exports[0]: expected a table, found 3"),
    "export-id-missing": (
        {"exports": [{"type": "nbd", "node-name": "m"}], "nbd-server": SERVER},
        "exports[0].id: member 'id' of export 'nbd' is missing; 'id' is a string",
    ),
    "export-map-small": (
        {"exports": [{"type": "nbd", "id": "e", "node-name": "m", "extent-map-size": 4096}], "nbd-server": SERVER},
        "exports[0].extent-map-size: expected an integer of at least 262144 or a string, found 4096",
    ),
    "export-map-text": (
        {"exports": [{"type": "nbd", "id": "e", "node-name": "m", "extent-map-size": "64X"}], "nbd-server": SERVER},
        "exports[0]: extent-map-size: '64X' is not a size; write bytes, or a number with k, M, G, T, P or E",
    ),
    "export-dangling": (
        {"exports": [{"type": "nbd", "id": "e", "node-name": "n"}], "nbd-server": SERVER},
        "exports[0].node-name: export 'e' refers to node 'n', which does not exist",
    ),
    "export-id-twice": (
        {"exports": [{"type": "nbd", "id": "e", "node-name": "m", "name": str(i)} for i in "ab"], "nbd-server": SERVER},
        "exports[1].id: export id 'e' is taken by exports[0]",
    ),
    "export-name-twice": (
        {"exports": [{"type": "nbd", "id": i, "node-name": "m"} for i in "ab"], "nbd-server": SERVER},
        "exports[1].name: NBD export name 'm' is taken by exports[0]",
    ),
    "server-missing": (
        {"exports": [{"type": "nbd", "id": "e", "node-name": "m"}]},
        "exports[0]: section 'nbd-server' is missing, export 'e' needs one; ",
    ),
    "bitmap-dangling": (
        {"bitmaps": [{"node": "mm", "name": "b"}]},
        "bitmaps[0].node: bitmap 'b' refers to node 'mm', which does not exist; did you mean 'm'?",
    ),
    "bitmap-twice": (
        {"bitmaps": [{"node": "m", "name": "b"}, {"node": "t", "name": "b"}, {"node": "m", "name": "b"}]},
        "bitmaps[2].name: bitmap 'b' of node 'm' is taken by bitmaps[0]",
    ),
    "bitmap-name-empty": (
        {"bitmaps": [{"node": "m", "name": ""}]},
        "bitmaps[0].name: bitmap name of 0 bytes; a name has 1 to 1023 bytes and no NUL character",
    ),
    "bitmap-name-long": (
        {"bitmaps": [{"node": "m", "name": "é" * 512}]},
        "bitmaps[0].name: bitmap name of 1024 bytes; a name has 1 to 1023 bytes",
    ),
    "bitmap-name-nul": (
        {"bitmaps": [{"node": "m", "name": "a\0"}]},
        "bitmaps[0].name: bitmap name with a NUL character; ",
    ),
    "bitmap-name-missing": (
        {"bitmaps": [{"node": "m"}]},
        "bitmaps[0].name: member 'name' of bitmap is missing; 'name' is a string",
    ),
    "bitmap-not-a-table": ({"bitmaps": ["b"]}, "bitmaps[0]: expected a table, found 'b'"),
    "bitmap-member": (
        {"bitmaps": [{"node": "m", "name": "b", "granulrity": 512}]},
        "bitmaps[0].granulrity: unknown member 'granulrity' of bitmap; did you mean 'granularity'?",
    ),
    "bitmap-granularity-small": (
        {"bitmaps": [{"node": "m", "name": "b", "granularity": 256}]},
        "bitmaps[0].granularity: expected an integer from 512 to 2147483648 or a string, found 256",
    ),
    "bitmap-granularity-large": (
        {"bitmaps": [{"node": "m", "name": "b", "granularity": "4G"}]},
        "bitmaps[0].granularity: granularity 4294967296 is not a power of two from 512 to 2147483648",
    ),
    "bitmap-granularity-no-power": (
        {"bitmaps": [{"node": "m", "name": "b", "granularity": 65535}]},
        "bitmaps[0].granularity: granularity 65535 is not a power of two from 512 to 2147483648",
    ),
    "bitmap-granularity-text": (
        {"bitmaps": [{"node": "m", "name": "b", "granularity": "64X"}]},
        "bitmaps[0].granularity: '64X' is not a size; ",
    ),
    "bitmap-no-place": (
        {"bitmaps": [{"node": "m", "name": "b", "persistent": True}]},
        "bitmaps[0].persistent: driver 'memory' has no place for persistent bitmaps; set sidecar = true instead",
    ),
    "bitmap-crash-safe": (
        {"bitmaps": [{"node": "m", "name": "b", "crash-safe": True}]},
        "bitmaps[0].crash-safe: is of use with bitmaps that are kept only; set sidecar = true, or leave it out",
    ),
    "bitmap-epochs": (
        {
            "nodes": [{"node-name": "q", "driver": "qcow2", "file": {"driver": "memory", "size": 1 << 20}}],
            "bitmaps": [{"node": "q", "name": "b", "persistent": True, "epochs": True}],
        },
        "bitmaps[0].epochs: driver 'qcow2' keeps bitmaps in the image, which has no place for epochs; leave it out, or "
        "let the bitmap be neither persistent nor in a sidecar",
    ),
    "bitmap-two-sidecars": (
        {"bitmaps": [{"node": "m", "name": name, "sidecar": name} for name in "ab"]},
        "bitmaps[1].sidecar: the bitmaps of node 'm' have one place, and bitmaps[0] says otherwise",
    ),
    "bitmap-two-promises": (
        {"bitmaps": [{"node": "m", "name": str(how), "sidecar": True, "crash-safe": how} for how in (True, False)]},
        "bitmaps[1].crash-safe: the bitmaps of node 'm' have one place, and bitmaps[0] says otherwise",
    ),
    "job-bitmap": (
        {
            "jobs": [{"type": "backup", "device": "m", "target": MEMORY, "sync": "incremental", "bitmap": "b00"}],
            "bitmaps": [{"node": "m", "name": "b0"}],
        },
        "jobs[0].bitmap: there is no bitmap 'b00' on node 'm'; did you mean 'b0'?",
    ),
    "bitmap-sidecar-nameless": (
        {"bitmaps": [{"node": "m", "name": "b", "sidecar": ""}]},
        "bitmaps[0].sidecar: a file needs a name; give one, or true",
    ),
    "export-bitmap": (
        {
            "exports": [{"type": "nbd", "id": "e", "node-name": "m", "bitmaps": ["b00"]}],
            "bitmaps": [{"node": "m", "name": "b0"}],
            "nbd-server": SERVER,
        },
        "exports[0].bitmaps[0]: there is no bitmap 'b00' on node 'm'; did you mean 'b0'?",
    ),
    "export-bitmap-of-another": (
        {
            "exports": [{"type": "nbd", "id": "e", "node-name": "m", "bitmaps": [{"node": "t", "name": "b"}]}],
            "bitmaps": [{"node": "m", "name": "b"}],
            "nbd-server": SERVER,
        },
        "exports[0].bitmaps[0].name: there is no bitmap 'b' on node 't'; describe it in the section 'bitmaps'",
    ),
    "export-bitmap-dangling": (
        {
            "exports": [{"type": "nbd", "id": "e", "node-name": "m", "bitmaps": [{"node": "x", "name": "b"}]}],
            "nbd-server": SERVER,
        },
        "exports[0].bitmaps[0].node: bitmap 'b' refers to node 'x', which does not exist",
    ),
    "export-bitmap-twice": (
        {
            "exports": [
                {"type": "nbd", "id": "e", "node-name": "m", "bitmaps": ["b", {"node": "t", "name": "b"}]},
            ],
            "bitmaps": [{"node": "m", "name": "b"}, {"node": "t", "name": "b"}],
            "nbd-server": SERVER,
        },
        "exports[0]: bitmaps: two are named 'b', and clients could not tell them apart",
    ),
    "export-bitmap-kind": (
        {
            "exports": [{"type": "nbd", "id": "e", "node-name": "m", "bitmaps": [3]}],
            "nbd-server": SERVER,
        },
        "exports[0].bitmaps[0]: expected",
    ),
    "server-type": ({"nbd-server": 3}, "nbd-server: expected a table, found 3"),
    "server-address": (
        {"nbd-server": {"addr": {"type": "unixx", "path": "x"}}},
        "nbd-server.addr.type: member 'type' can not be 'unixx'; did you mean 'unix'?",
    ),
    "server-address-member": (
        {"nbd-server": {"addr": {"type": "unix", "path": "x", "host": "y"}}},
        "nbd-server.addr.host: unknown member 'host' of 'addr'; ",
    ),
    "server-port": (
        {"nbd-server": {"addr": {"type": "inet", "host": "", "port": 70000}}},
        "nbd-server.addr: port 70000 is not in 0..65535",
    ),
    "job-choice": (
        {"jobs": [{"type": "backup", "device": "m", "target": "t", "sync": "ful"}]},
        "jobs[0].sync: expected 'bitmap', 'differential', 'full', 'incremental', 'none' or 'top', found 'ful'; "
        "did you mean 'full'?",
    ),
    "job-target-size": (
        {"jobs": [{"type": "backup", "device": "m", "target": "t", "sync": "full"}]},
        "jobs[0].target: the disk has 512 bytes but the target has 1024; make the target 512 bytes large",
    ),
    "job-target-is-device": (
        {"jobs": [{"type": "backup", "device": "m", "target": "m", "sync": "full"}]},
        "jobs[0].target: device and target are the same node",
    ),
    "job-target-missing": (
        {"jobs": [{"type": "backup", "device": "m", "sync": "full"}]},
        "jobs[0].target: member 'target' of job 'backup' is missing; it may be left out only if",
    ),
    "job-target-inline": (
        {"jobs": [{"type": "backup", "device": "m", "target": {"driver": "memory", "siz": 512}, "sync": "full"}]},
        "jobs[0].target.siz: unknown member 'siz' of driver 'memory'; did you mean 'size'?",
    ),
    "job-id-twice": (
        {"jobs": [{"type": "backup", "device": "m", "target": MEMORY, "sync": "full"}] * 2},
        "jobs[1].job-id: job id 'm' is taken by jobs[0]",
    ),
    "job-filter-name": (
        {"jobs": [{"type": "backup", "device": "m", "target": MEMORY, "sync": "full", "filter-node-name": "t"}]},
        "jobs[0].filter-node-name: node name 't' is taken",
    ),
}


@pytest.mark.parametrize("name", SECTION_PROBLEMS)
def test_section_problem_alone_is_told_once_with_its_path(name: str) -> None:
    sections, starts = SECTION_PROBLEMS[name]
    told = check({**MEMORY, "node-name": "m"}, {"driver": "null-co", "size": 1024, "node-name": "t"}, **sections)
    assert len(told) == 1, told
    assert told[0].startswith(starts)


MANY = """\
# Ten mistakes in ten lines.
[[nodes]]
node-name = "disk"
driver = "raw"
file = {driver = "fil", filename = "x"}

[[nodes]]
node-name = "disk"
driver = "memory"
size = "12"

[[nodes]]
driver = "backup-top"
node-name = "1top"
file = "dsik"
targett = {driver = "memory"}
cache.dirct = true

[[exports]]
type = "nbd"
id = "guest"
node-name = "top"
writable = 1

[throttle-groups]
"""


def test_many_problems_in_one_file_are_all_told_in_order(tmp_path: Path) -> None:
    (tmp_path / "g.toml").write_text(MANY)
    told = [str(problem).removeprefix(f"{tmp_path}/") for problem in check_description(tmp_path / "g.toml")]
    assert told == [
        "g.toml:5:9: nodes[0].file.driver: unknown driver 'fil'; did you mean 'file'?",
        "g.toml:8:1: nodes[1].node-name: node name 'disk' is taken by nodes[0] (see line 3)",
        "g.toml:10:1: nodes[1].size: expected an integer of at least 0, found '12'; write the number without quotes",
        "g.toml:14:1: nodes[2].node-name: node name '1top' must start with a letter",
        "g.toml:15:1: nodes[2].file: 1top.file refers to node 'dsik', which does not exist; did you mean 'disk'?",
        "g.toml:16:1: nodes[2].targett: unknown member 'targett' of driver 'backup-top'; did you mean 'target'?",
        "g.toml:16:1: nodes[2].targett.size: member 'size' of driver 'memory' is missing; "
        "'size' is an integer of at least 0",
        "g.toml:17:7: nodes[2].cache.dirct: unknown member 'dirct' of 'cache'; did you mean 'direct'?",
        "g.toml:19:1: exports[0]: section 'nbd-server' is missing, export 'guest' needs one; "
        'add nbd-server with addr = {type = "unix", path = "..."}',
        "g.toml:22:1: exports[0].node-name: export 'guest' refers to node 'top', which does not exist; "
        "did you mean '1top'?",
        "g.toml:23:1: exports[0].writable: expected true or false, found 1",
        "g.toml:25:1: throttle-groups: section 'throttle-groups' is not available yet; remove it",
    ]


def test_problem_lines_are_right_in_every_syntax(tmp_path: Path) -> None:
    texts = {
        "g.toml": '[[nodes]]\nnode-name = "m"\ndriver = "memory"\nsizze = 5\n',
        "g.json": '{"nodes": [\n  {"node-name": "m",\n   "driver": "memory",\n   "sizze": 5}]}\n',
        "g.yaml": "nodes:\n- node-name: m\n  driver: memory\n  sizze: 5\n",
        "g.yml": "nodes:\n- {node-name: m,\n   driver: memory,\n   sizze: 5}\n",
    }
    columns = {"g.toml": 1, "g.json": 4, "g.yaml": 3, "g.yml": 4}
    for name, text in texts.items():
        (tmp_path / name).write_text(text)
        problem = errors(check_description(tmp_path / name))[0]
        assert problem.where is not None
        assert problem.where[1:] == (4, columns[name])
        assert problem.closest == "size"


def test_syntax_error_is_the_only_problem(tmp_path: Path) -> None:
    (tmp_path / "g.toml").write_text("[[nodes]\n")
    (problem,) = check_description(tmp_path / "g.toml")
    assert str(problem).startswith(f"{tmp_path}/g.toml:1:")


def test_load_raises_the_first_problem_and_counts_the_others(tmp_path: Path) -> None:
    (tmp_path / "g.toml").write_text(MANY)
    with pytest.raises(OptionError, match=r"g\.toml:5:9: nodes\[0\]\.file\.driver: .*'file'\? \(and 11 more;"):
        load(tmp_path / "g.toml")


@pytest.mark.parametrize(
    "problem, kind",
    [
        (Problem(kind=CycleError, message="m", hint="h"), CycleError),
        (Problem(kind=RoleError, message="m", hint="h"), RoleError),
        (Problem(kind=GraphError, message="m", hint="h"), GraphError),
        (Problem(kind=OptionError, message="m", path="nodes[0].x", closest="y"), OptionError),
        (Problem(kind=PermissionConflict, message="m", hint="h", needs="a.b", blocks="c.d"), PermissionConflict),
    ],
)
def test_problem_to_error_is_of_its_kind_and_says_the_same(problem: Problem, kind: type[Exception]) -> None:
    error = problem.to_error()
    assert type(error) is kind
    assert str(error) == str(problem).removeprefix("nodes[0].x: ") or str(error) == str(problem)


def test_backing_null_differs_from_omitted() -> None:
    omitted = {"driver": "qcow2", "node-name": "q", "file": {"driver": "file", "filename": "x"}}
    null = {**omitted, "backing": None}
    empty = {**omitted, "backing": ""}
    children = [load({"nodes": [node]}).nodes[-1].children for node in (omitted, null, empty)]
    assert children == [{"file": "#block0"}, *[{"file": "#block0", "backing": None}] * 2]


def test_empty_string_is_no_child_where_one_is_required(tmp_path: Path) -> None:
    (tmp_path / "g.toml").write_text('[[nodes]]\nnode-name = "q"\ndriver = "raw"\nfile = ""\n')
    with pytest.raises(GraphError, match=r"q\.file refers to node ''"):
        load(tmp_path / "g.toml")


def test_inline_children_inherit_and_cow_children_are_read_only() -> None:
    data = {
        "driver": "qcow2",
        "node-name": "q",
        "cache": {"direct": True},
        "auto-read-only": True,
        "file": {"driver": "file", "filename": "a", "cache": {"no-flush": True}},
        "backing": {"driver": "qcow2", "file": {"driver": "file", "filename": "b"}},
    }
    nodes = {node.where: node for node in examine({"nodes": [data]})[0].nodes}
    file, backing, inner = (nodes[f"nodes[0].{path}"].options for path in ("file", "backing", "backing.file"))
    assert (file.read_only, file.auto_read_only, file.cache.direct, file.cache.no_flush) == (False, True, True, True)
    assert (backing.read_only, backing.auto_read_only, backing.cache.direct) == (True, False, True)
    assert (inner.read_only, inner.cache.direct) == (True, True)


def test_file_names_are_relative_to_the_graph_file(tmp_path: Path) -> None:
    data = good()
    data["jobs"][0]["target"] = {"driver": "raw", "file": {"driver": "file", "filename": "t.img"}}
    data["nodes"][3] = {"node-name": "data", "driver": "file", "filename": "/abs.img"}
    data["nbd-server"]["tls-creds"] = {"dir": "tls"}
    for syntax, raw in all_syntaxes(data).items():
        path = tmp_path / f"g.{syntax}"
        path.write_bytes(raw)
        description = load(path)
        names = {getattr(node.options, "filename", None) for node in description.nodes}
        assert names == {None, f"{tmp_path}/disk.img", "/abs.img"}
        assert isinstance(description.jobs[0].options.target, dict)
        assert description.jobs[0].options.target["file"]["filename"] == f"{tmp_path}/t.img"
        assert description.nbd_server is not None
        assert description.nbd_server.addr.path == f"{tmp_path}/nbd.sock"  # type: ignore[union-attr]
        assert description.nbd_server.tls_creds is not None
        assert description.nbd_server.tls_creds.dir == f"{tmp_path}/tls"
    assert "disk.img" in {getattr(node.options, "filename", None) for node in load(data).nodes}


def test_job_conflict_below_its_device_is_told_before_it_runs() -> None:
    """iotest 283 as a graph file: another node writes what the job's filter must protect."""
    told = check(
        {**MEMORY, "node-name": "base"},
        {"driver": "raw", "node-name": "source", "file": "base"},
        {"driver": "inject-error", "node-name": "other", "image": "base", "take-child-perms": ["write"]},
        jobs=[{"type": "backup", "job-id": "b", "device": "source", "sync": "full", "target": MEMORY}],
    )
    assert told == [
        "nodes[2].image: permission conflict on node 'base': "
        "other.image needs 'write', which source.file does not share"
    ]


def test_job_beside_a_writer_of_the_same_device_is_no_conflict() -> None:
    told = check(
        {**MEMORY, "node-name": "disk"},
        exports=[{"type": "nbd", "id": "e", "node-name": "disk", "writable": True}],
        nbd_server=SERVER,
        jobs=[{"type": "backup", "device": "disk", "sync": "full", "target": MEMORY}],
    )
    assert told == []


def test_references_of_exports_and_jobs_with_other_errors_are_told_too() -> None:
    nodes = [{**MEMORY, "node-name": "disk"}]
    exports = [{"type": "nbdd", "id": "a", "node-name": "dsik"}, {"type": "nbd", "node-name": "disc"}]
    jobs = [{"type": "backup", "device": "dissk", "target": "nowhere", "sync": "al"}, {"type": [], "device": 1}]
    told = [str(problem) for problem in check_description({"nodes": nodes, "exports": exports, "jobs": jobs})]
    for wanted in (
        "exports[0].type: unknown type of export: 'nbdd'; did you mean 'nbd'?",
        "exports[0].node-name: export refers to node 'dsik', which does not exist; did you mean 'disk'?",
        "exports[1].id: member 'id' of export 'nbd' is missing; 'id' is a string",
        "exports[1].node-name: export refers to node 'disc', which does not exist; did you mean 'disk'?",
        "exports[1]: section 'nbd-server' is missing, an export needs one; "
        'add nbd-server with addr = {type = "unix", path = "..."}',
        "jobs[0].device: job refers to node 'dissk', which does not exist; did you mean 'disk'?",
        "jobs[0].target: job refers to node 'nowhere', which does not exist",
        "jobs[0].sync: expected 'bitmap', 'differential', 'full', 'incremental', 'none' or 'top', found 'al'; "
        "allowed: bitmap, differential, full, incremental, none, top",
        "jobs[1].type: unknown type of job: a list; allowed: backup",
    ):
        assert wanted in told
        told.remove(wanted)
    assert told == []  # a node that misspelt references mean is not told to be unused


@pytest.mark.parametrize(
    "syntax, text, hint",
    [("toml", "nodes = 5", "write [[nodes]]"), ("json", '{"nodes": 5}', "write [{...}]"), ("yaml", "nodes: 5", "'- '")],
)
def test_section_that_is_no_list_is_told_how_lists_are_written(
    tmp_path: Path, syntax: str, text: str, hint: str
) -> None:
    path = tmp_path / f"g.{syntax}"
    path.write_text(text)
    (problem,) = check_description(path)
    assert problem.hint is not None
    assert hint in problem.hint


def test_unused_node_is_a_warning() -> None:
    (problem,) = check_description({"nodes": [{**MEMORY, "node-name": "m"}]})
    assert problem.severity == "warning"
    assert str(problem) == "nodes[0]: warning: node 'm' is not used by any export, job or other node"


#: As QEMU's manuals and management tools write them: option names and shapes, with values made up.
BLOCKDEV = [
    '{"driver":"file","filename":"/images/disk.raw","node-name":"storage","auto-read-only":true,"discard":"unmap"}',
    '{"node-name":"format","read-only":false,"discard":"unmap","driver":"raw","file":"storage"}',
    '{"driver":"qcow2","node-name":"q","file":{"driver":"file","filename":"/images/q.qcow2","locking":"auto",'
    '"cache":{"direct":true,"no-flush":false}},"backing":null,"cache":{"direct":true,"no-flush":false},'
    '"lazy-refcounts":true,"pass-discard-request":true,"l2-cache-size":1048576}',
    '{"driver":"qcow2","node-name":"q","cache.direct":true,"file.driver":"file","file.filename":"/images/q.qcow2",'
    '"backing.driver":"raw","backing.file.driver":"file","backing.file.filename":"/images/base.raw"}',
    '{"node-name":"win","driver":"raw","offset":1048576,"size":512,"file":{"driver":"host_device","filename":"/dev/x"}}',
    '{"driver":"null-co","node-name":"n","size":1073741824,"read-zeroes":true,"latency-ns":1000}',
    '{"driver":"copy-before-write","node-name":"cbw","file":{"driver":"null-co"},"target":{"driver":"null-co"},'
    '"on-cbw-error":"break-snapshot","cbw-timeout":45}',
    '{"driver":"blkdebug","node-name":"b","image":{"driver":"null-co"},"inject-error":[{"event":"write_aio",'
    '"errno":28,"once":true,"immediately":false,"iotype":"write","sector":8,"state":1}],'
    '"set-state":[{"event":"l2_update","state":1,"new_state":2}],"take-child-perms":["write"],'
    '"unshare-child-perms":["resize"]}',
    '{"driver":"blkdebug","node-name":"b","image.driver":"null-co","inject-error.0.event":"pwritev",'
    '"inject-error.1.event":"flush_to_disk"}',
    '{"driver":"blkverify","node-name":"v","test":{"driver":"null-co"},"raw":{"driver":"null-co"}}',
    '{"driver":"blklogwrites","node-name":"l","file":{"driver":"null-co"},"log":{"driver":"file",'
    '"filename":"/tmp/log"},"log-sector-size":512,"log-super-update-interval":8}',
]


@pytest.mark.parametrize("text", BLOCKDEV)
def test_blockdev_object_of_qemu_pastes_in_unchanged(text: str) -> None:
    storage = {"driver": "file", "filename": "x", "node-name": "storage"}
    node = json.loads(text)
    assert check(*([storage] if node.get("file") == "storage" else []), node) == []


def test_dotted_lists_become_lists() -> None:
    description = load({"nodes": [json.loads(BLOCKDEV[8])]})
    node = next(node for node in description.nodes if node.name == "b")
    assert [rule.event for rule in node.options.inject_error] == ["pwritev", "flush_to_disk"]  # type: ignore[attr-defined]


def test_deep_inline_chain_is_bounded_but_a_long_one_works() -> None:
    def chain(length: int) -> dict[str, Any]:
        node: dict[str, Any] = dict(MEMORY)
        for _ in range(length):
            node = {"driver": "raw", "file": node}
        return {"nodes": [{**node, "node-name": "top"}]}

    assert not errors(check_description(chain(150)))
    (problem,) = check_description(chain(5000))
    assert problem.message == "nested deeper than 200 levels"


@pytest.mark.parametrize("dots", [150, 199, 300])
def test_deep_dotted_keys_are_bounded_too(dots: int) -> None:
    """Each table is nested no deeper than allowed, but its keys nest further tables in it."""
    node: dict[str, Any] = dict(MEMORY)
    for _ in range(3):
        drivers = {"file." * depth + "driver": "raw" for depth in range(dots + 1)}
        node = {**drivers, "file." * dots + "file": node}
    told = check({**node, "node-name": "top"})
    assert any("nested deeper than 200 levels" in text for text in told)


def test_dict_that_contains_itself_is_a_problem() -> None:
    node: dict[str, Any] = {"driver": "raw", "node-name": "a"}
    node["file"] = node
    (problem,) = check_description({"nodes": [node]})
    assert problem.message == "nested deeper than 200 levels"


def test_control_characters_of_a_file_do_not_reach_the_terminal() -> None:
    told = check({"driver": "memory", "size": 1, "node-name": "m", "\x1b[2J\u202e": 1})
    assert "\x1b" not in told[0]
    assert "\u202e" not in told[0]
    assert "\\x1b[2J" in told[0]


def test_flatten_node_gives_the_outer_node_first_and_names_the_inner() -> None:
    names = iter(["#block7"])
    flat = flatten_node(
        {"driver": "raw", "node-name": "r", "file": {"driver": "file", "filename": "x"}}, lambda: next(names)
    )
    assert [(node.name, node.driver.name, node.children) for node in flat] == [
        ("r", "raw", {"file": "#block7"}),
        ("#block7", "file", {}),
    ]


def test_flatten_node_raises_the_first_problem() -> None:
    with pytest.raises(OptionError, match=r"file\.filenam: unknown member .*did you mean 'filename'"):
        flatten_node(
            {"driver": "raw", "file": {"driver": "file", "filenam": "x"}}, map(str, itertools.count()).__next__
        )


def test_convert_options_takes_references_and_refuses_inline_nodes() -> None:
    driver = get_driver("qcow2")
    options, children = convert_options(driver, {"driver": "qcow2", "node-name": "q", "file": "f", "backing": None})
    assert isinstance(options, NodeOptions)
    assert children == {"file": "f", "backing": None}
    with pytest.raises(OptionError, match="name a node"):
        convert_options(driver, {"driver": "qcow2", "node-name": "q", "file": MEMORY})


# The three syntaxes say the same.

# SPDX-FileCopyrightText: blockgraph contributors
# SPDX-License-Identifier: MIT
"""Commands check, graph and schema."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from xml.etree import ElementTree

import pytest
from helpers.command import disk, graph_file

from blockgraph.cli import main

GOOD = """\
[[nodes]]
node-name = "disk"
driver = "raw"
file = {driver = "file", filename = "disk.img"}

[[exports]]
type = "nbd"
id = "guest"
node-name = "disk"

[nbd-server]
addr = {type = "unix", path = "nbd.sock"}
"""


@pytest.fixture
def good(tmp_path: Path) -> Path:
    path = tmp_path / "graph.toml"
    path.write_text(GOOD)
    return path


@pytest.fixture
def bad(tmp_path: Path) -> Path:
    path = tmp_path / "bad.toml"
    path.write_text(GOOD.replace('"raw"', '"rawx"').replace("nbd-server", "nbd-serve"))
    return path


def test_check_good_file_is_status_0_and_says_what_is_in_it(good: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["check", str(good)]) == 0
    assert capsys.readouterr() == (f"{good}: ok: 2 nodes, 1 export, 0 jobs\n", "")


def test_check_bad_file_is_status_1_with_every_problem_in_a_line(bad: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["check", str(bad)]) == 1
    out, err = capsys.readouterr()
    assert err.splitlines() == [
        f"{bad}:3:1: nodes[0].driver: unknown driver 'rawx'; did you mean 'raw'?",
        f"{bad}:11:1: nbd-serve: unknown section 'nbd-serve'; did you mean 'nbd-server'?",
    ]
    assert out == f"{bad}: 2 errors\n"


def test_check_warning_is_status_0(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "g.json").write_text('{"nodes": [{"driver": "memory", "size": 1, "node-name": "m"}]}')
    assert main(["check", str(tmp_path / "g.json")]) == 0
    out, err = capsys.readouterr()
    assert "g.json:1:12: nodes[0]: warning: node 'm' is not used" in out
    assert out.endswith("g.json: ok (1 warning): 1 node, 0 exports, 0 jobs\n")
    assert err == ""


def test_check_json_has_every_member_of_a_problem(bad: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["check", str(bad), "--json"]) == 1
    problems = json.loads(capsys.readouterr().out)["problems"]
    assert problems[0] == {
        "severity": "error",
        "error": "OptionError",
        "message": "unknown driver 'rawx'",
        "file": str(bad),
        "line": 3,
        "column": 1,
        "path": "nodes[0].driver",
        "found": "rawx",
        "closest": "raw",
    }


def test_check_missing_file_is_status_1_in_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["check", str(tmp_path / "none.toml")]) == 1
    assert capsys.readouterr().err == f"blockgraph: can not read '{tmp_path}/none.toml': No such file or directory\n"


def test_check_open_tells_missing_image_with_its_line(good: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["check", "--open", str(good)]) == 1
    err = capsys.readouterr().err
    assert err.startswith(f"{good}:4:1: nodes[0].file: ")
    assert "disk.img" in err
    os.truncate(os.open(good.parent / "disk.img", os.O_CREAT | os.O_WRONLY), 512)
    assert main(["check", "--open", str(good)]) == 0


def test_check_open_with_errors_in_the_file_opens_nothing(bad: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["check", "--open", str(bad)]) == 1
    assert capsys.readouterr().out == f"{bad}: 2 errors; images were not opened\n"


@pytest.mark.parametrize(
    "arguments, starts",
    [
        ([], "graph "),
        (["--format", "dot"], "digraph "),
        (["--format", "svg"], "<svg "),
        (["-f", "mermaid"], "flowchart TD"),
        (["-f", "json"], "{\n"),
    ],
)
def test_graph_prints_each_format(
    good: Path, arguments: list[str], starts: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["graph", str(good), *arguments]) == 0
    out, err = capsys.readouterr()
    assert out.startswith(starts)
    assert "disk" in out
    assert err == ""


def test_graph_writes_the_format_that_the_output_is_named_for(good: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = good.parent / "g.svg"
    assert main(["graph", str(good), "-o", str(out)]) == 0
    assert ElementTree.parse(out).getroot().tag.endswith("svg")
    assert capsys.readouterr().out == ""


def test_graph_output_named_for_no_format_is_told(good: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = good.parent / "g.png"
    assert main(["graph", str(good), "-o", str(out)]) == 1
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert ".svg" in error
    assert "--format" in error
    assert not out.exists()
    assert main(["graph", str(good), "-o", str(out), "-f", "svg"]) == 0
    assert ElementTree.parse(out).getroot().tag.endswith("svg")


def test_graph_with_problems_is_drawn_and_told(bad: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["graph", str(bad)]) == 0
    out, err = capsys.readouterr()
    assert "rawx" in out
    assert "unknown driver 'rawx'" in err
    assert "(and 1 more, see 'blockgraph check')" in err


def test_graph_with_broken_syntax_is_status_1(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "g.json").write_text("{")
    assert main(["graph", str(tmp_path / "g.json")]) == 1
    assert "g.json:1:2: not valid JSON" in capsys.readouterr().err


def test_graph_output_that_can_not_be_written_is_one_line(good: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["graph", str(good), "-o", str(good.parent / "no" / "g.svg")]) == 1
    assert capsys.readouterr().err.startswith("blockgraph: can not write '")


def test_graph_on_a_terminal_without_unicode_does_not_fail(good: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-P", "-m", "blockgraph", "graph", str(good)],
        env={**os.environ, "PYTHONIOENCODING": "ascii"},
        capture_output=True,
        check=True,
    )
    assert b"\\u2514\\u2500 disk" in done.stdout


def test_schema_prints_a_schema(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["schema"]) == 0
    assert json.loads(capsys.readouterr().out)["$schema"].endswith("2020-12/schema")


@pytest.fixture
def job(tmp_path: Path) -> Path:
    """A backup of disk.img (1 MiB) to the raw image t."""
    disk(tmp_path, 1 << 20)
    disk(tmp_path, 1 << 20, "t")
    return graph_file(tmp_path, job='sync = "full"')


def opened(capsys: pytest.CaptureFixture[str], path: Path, *, ok: bool = False) -> str:
    """What `check --open` tells beyond what `check` tells, which is nothing."""
    assert main(["check", str(path)]) == 0
    capsys.readouterr()
    assert main(["check", "--open", str(path)]) == (0 if ok else 1)
    return capsys.readouterr().err


def test_check_open_compares_the_sizes_of_device_and_target(job: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert opened(capsys, job, ok=True) == ""
    os.truncate(job.parent / "t", 1 << 19)
    error = opened(capsys, job)
    assert error.startswith(f"{job}:14:1: jobs[0].target: ")
    assert "the disk has 1048576 bytes but the target has 524288; make the target 1048576 bytes large" in error


def test_check_open_tells_what_may_not_be_written(
    job: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    refused = os.fspath(job.parent / "t")
    may = os.access
    monkeypatch.setattr(os, "access", lambda path, mode, **more: path != refused and may(path, mode))
    error = opened(capsys, job)
    assert error.startswith(f"{job}:9:1: nodes[1].file: ")
    assert f"'{refused}' may not be written; run as a user who may write it, or set read-only" in error


@pytest.mark.parametrize("read_only", [False, True], ids=["writable", "read-only"])
def test_check_open_tells_what_can_be_read_but_not_written(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], require_tool: Callable[[str], str], read_only: bool
) -> None:
    image = tmp_path / "disk.qcow2"
    for words in (["create", "-q", "-f", "qcow2", image, "1M"], ["snapshot", "-c", "then", image]):
        subprocess.run([require_tool("qemu-img"), *map(str, words)], check=True)
    options = "read-only = true\n" if read_only else ""
    file = tmp_path / "g.toml"
    file.write_text(
        f'[[nodes]]\nnode-name = "disk"\ndriver = "qcow2"\n{options}file = {{driver = "file", filename = "{image}"}}\n'
    )
    capsys.readouterr()
    assert main(["check", "--open", str(file)]) == (0 if read_only else 1)
    error = capsys.readouterr().err
    assert read_only or "internal snapshots, which can not be kept while it is written; open it read-only" in error


def test_check_open_tells_two_nodes_of_one_file(job: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (job.parent / "t").unlink()
    os.link(job.parent / "disk.img", job.parent / "t")
    error = opened(capsys, job)
    assert error.startswith(f"{job}:9:1: nodes[1].file: ")
    assert f"'{job.parent}/t' is opened by nodes[0].file too: nodes[1].file needs 'write', which" in error
    assert main(["run", str(job)]) == 1  # says the same
    assert "is locked" in capsys.readouterr().err


def test_check_open_of_a_target_to_be_created_wants_it_not_to_be_there(
    job: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text = job.read_text()
    inline = '{driver = "raw", file = {driver = "file", filename = "new/t"}}'
    node = text.index('[[nodes]]\nnode-name = "target"')
    text = text[:node] + text[text.index("[[jobs]]") :].replace('target = "target"', f"target = {inline}")
    job.write_text(text.replace('sync = "full"', 'sync = "full"\nmode = "create"'))
    assert f"there is no folder '{job.parent}/new'; make the folder first" in opened(capsys, job)
    (job.parent / "new").mkdir()
    assert opened(capsys, job, ok=True) == ""
    (job.parent / "new" / "t").touch()
    assert f"'{job.parent}/new/t' is to be created, but it exists; choose another name" in opened(capsys, job)


def test_check_open_names_the_file_of_a_format(job: Path, capsys: pytest.CaptureFixture[str]) -> None:
    job.write_text(
        job.read_text().replace('node-name = "target"\ndriver = "raw"', 'node-name = "target"\ndriver = "qcow2"')
    )
    assert f"node 'target' ('{job.parent}/t'): open: is not a qcow2 image" in opened(capsys, job)


def test_check_names_both_edges_of_a_conflict_and_both_lines(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "g.toml"
    nodes = ['[[nodes]]\nnode-name = "f"\ndriver = "file"\nfilename = "x"\n']
    nodes += [f'[[nodes]]\nnode-name = "{name}"\ndriver = "qcow2"\nfile = "f"\n' for name in ("q1", "q2")]
    for name in ("q1", "q2"):
        nodes.append(f'[[exports]]\ntype = "nbd"\nid = "{name}"\nnode-name = "{name}"\nwritable = true\n')
    path.write_text("".join(nodes) + '[nbd-server]\naddr = {type = "unix", path = "s"}\n')
    assert main(["check", str(path)]) == 1
    assert capsys.readouterr().err == (
        f"{path}:8:1: nodes[1].file: permission conflict on node 'f': q1.file needs 'write, resize', which q2.file "
        "does not share (see lines 12, 1)\n"
    )
    assert main(["check", "--json", str(path)]) == 1
    (problem,) = json.loads(capsys.readouterr().out)["problems"]
    assert (problem["needs"], problem["blocks"]) == ("q1.file", "q2.file")
    assert (problem["related"], problem["related-lines"]) == (["nodes[2].file", "nodes[0]"], [12, 1])

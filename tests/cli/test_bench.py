# SPDX-FileCopyrightText: blockgraph contributors
# SPDX-License-Identifier: MIT
"""`blockgraph bench`: every figure is there, a user's disks are only read, and nothing is left behind."""

from __future__ import annotations

import io
import json
import signal
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
from helpers.command import command, disk, graph_file
from rich.console import Console

from blockgraph.bench import load
from blockgraph.bench.disks import Disk
from blockgraph.bench.figures import OURS, WITHOUT_FILTER, Figure, Result, Sample, percentiles, series
from blockgraph.bench.load import run_load
from blockgraph.bench.pattern import RANDOM_READ, RANDOM_WRITE, SEQUENTIAL_READ, SEQUENTIAL_WRITE, Pattern
from blockgraph.bench.plan import Plan
from blockgraph.bench.report import show
from blockgraph.bench.scale import Log, format_latency, format_number, format_rate, round_up
from blockgraph.bench.servers import nbdkit
from blockgraph.bench.svg import draw
from blockgraph.bench.tools import Tools
from blockgraph.cli import main
from blockgraph.errors import BlockGraphError, IOFailure

_MIB = 1 << 20
TINY = ["--quick", "--size", "1M", "--seconds", "0.01"]
PEERS = ["dd", "nbdkit", "qemu-nbd", "qemu-img", "qemu-storage-daemon"]


@pytest.fixture(autouse=True)
def temporary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where the command puts its files."""
    folder = tmp_path / "tmp"
    folder.mkdir()
    monkeypatch.setenv("TMPDIR", str(folder))
    monkeypatch.setattr("tempfile.tempdir", None)
    return folder


@pytest.fixture
def alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No other program is installed."""
    monkeypatch.setenv("PATH", str(tmp_path / "none"))


def figures(found: dict[str, Any]) -> dict[tuple[str, str], dict[str, Any]]:
    """Those of a JSON report, by group and work."""
    return {(figure["group"], figure["what"]): figure for figure in found["figures"]}


def sides(figure: dict[str, Any]) -> list[str]:
    """Their names."""
    return [side["name"] for side in figure["sides"]]


@pytest.mark.usefixtures("alone")
def test_bench_without_peers_measures_us_and_names_what_is_missing(
    capsys: pytest.CaptureFixture[str], temporary: Path
) -> None:
    assert main(["bench", *TINY, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["missing"] == PEERS
    assert any("not installed" in note and "nbdkit" in note for note in found["notes"])
    assert found["facts"]["load"] == "our own client in Python"
    by_name = figures(found)
    assert list(by_name) == [
        ("NBD, raw", "4 KiB random read, depth 16"),
        ("NBD, raw", "4 KiB random write, depth 16"),
        ("Python API, raw", "4 KiB random read"),
        ("Copy", "raw to raw"),
        ("Copy", "raw to qcow2"),
        ("backup-top, raw", "4 KiB random write, depth 16"),
    ]
    nbd = by_name["NBD, raw", "4 KiB random read, depth 16"]
    assert (sides(nbd), nbd["missing"], nbd["unit"]) == ([OURS], ["nbdkit", "qemu-nbd"], "IOPS")
    (ours,) = nbd["sides"]
    assert min(ours["rounds"]) > 0
    assert list(ours["latency-us"]) == ["p50", "p95", "p99", "p99.9"]
    assert list(ours["latency-us"].values()) == sorted(ours["latency-us"].values())
    copy = by_name["Copy", "raw to raw"]
    assert (sides(copy), copy["missing"]) == ([OURS, "plain copy"], ["dd", "qemu-img", "qemu-storage-daemon"])
    assert sides(by_name["Python API, raw", "4 KiB random read"]) == [OURS, "preadv"]
    top = by_name["backup-top, raw", "4 KiB random write, depth 16"]
    assert sides(top) == [OURS, WITHOUT_FILTER]
    # On a busy machine no request may have ended within the intervals.
    assert [(len(side["series"]), min(side["rounds"]) > 0) for side in top["sides"]] == [(4, True)] * 2
    assert list(temporary.iterdir()) == []


def test_bench_beside_every_peer_has_their_rows(
    capsys: pytest.CaptureFixture[str],
    require_tool: Callable[[str], str],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    temporary: Path,
) -> None:
    # Our client measures, as fio takes long to start: it has a test of its own.
    programs = tmp_path / "bin"
    programs.mkdir()
    for name in PEERS:
        (programs / name).symlink_to(require_tool(name))
    monkeypatch.setenv("PATH", str(programs))
    picture = tmp_path / "bench.svg"
    assert main(["bench", *TINY, "--svg", str(picture)]) == 0
    text = capsys.readouterr().out
    for part in ("nbdkit", "qemu-nbd", "dd", "qemu-img convert", "qemu-storage-daemon", "preadv", WITHOUT_FILTER):
        assert f"\n  {part} " in text
    assert "not installed" not in text
    assert "\x1b" not in text
    texts = [element.text for element in ElementTree.parse(picture).iter("{http://www.w3.org/2000/svg}text")]
    for part in (OURS, "nbdkit", "qemu-img convert", "Copy", "raw to raw"):
        assert part in texts
    assert list(temporary.iterdir()) == []


@pytest.mark.usefixtures("alone")
def test_bench_of_graph_only_reads_it(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    content = disk(tmp_path, 2 * _MIB)
    assert main(["create", "-f", "qcow2", str(tmp_path / "t"), "1M"]) == 0
    image = (tmp_path / "t").read_bytes()
    graph = graph_file(tmp_path, job='sync = "full"', target="qcow2", export=False)
    before = graph.read_bytes()
    capsys.readouterr()
    assert main(["bench", str(graph), *TINY, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert [what for group, what in figures(found) if group == "Copy"] == [
        "disk (first 1 MiB) to raw",
        "disk (first 1 MiB) to qcow2",
        "target to qcow2",
    ]
    assert any(group == "NBD, target" for group, _ in figures(found))
    assert not any("write" in what for _, what in figures(found))
    assert any("only read" in note for note in found["notes"])
    assert (tmp_path / "disk.img").read_bytes() == content
    assert (tmp_path / "t").read_bytes() == image
    assert graph.read_bytes() == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["disk.img", "graph.toml", "t", "tmp"]


@pytest.mark.usefixtures("alone")
def test_bench_of_graph_told_to_write_overwrites_it(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    content = disk(tmp_path, 2 * _MIB)
    graph = graph_file(tmp_path)
    assert main(["bench", str(graph), "--node", "disk", "--write", *TINY, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert ("backup-top, disk (first 1 MiB)", "4 KiB random write, depth 16") in figures(found)
    written = (tmp_path / "disk.img").read_bytes()
    assert len(written) == len(content)
    assert written != content


@pytest.mark.usefixtures("alone")
@pytest.mark.parametrize("size, groups", [(0, 0), (4095, 1), (4097, 3)], ids=["empty", "small", "odd"])
def test_bench_of_disk_of_any_size_measures_what_fits(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, size: int, groups: int
) -> None:
    disk(tmp_path, size)
    assert main(["bench", str(graph_file(tmp_path)), *TINY, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert len({figure["group"] for figure in found["figures"]}) == groups
    assert (tmp_path / "disk.img").stat().st_size == size


@pytest.mark.parametrize("number, status", [(signal.SIGINT, 130), (signal.SIGTERM, 143)], ids=["int", "term"])
def test_bench_interrupted_leaves_nothing(temporary: Path, number: signal.Signals, status: int) -> None:
    with command(temporary, "bench", *TINY, "--rounds", "1000") as running:
        running.wait_line("Measuring")
        running.process.send_signal(number)
        assert running.end() == status, running.errors
        assert "Traceback" not in running.errors
    assert list(temporary.iterdir()) == []


@pytest.mark.parametrize(
    "arguments, expected",
    [
        (["--size", "1000"], "--size"),
        (["--size", "0"], "--size"),
        (["--size", "4E"], "free"),
        (["--directory", "nowhere"], "is not a folder"),
        (["--node", "disk"], "is about the disks of a GRAPH"),
        (["--write"], "is about the disks of a GRAPH"),
        (["--svg", "nowhere/x.svg"], "can not be written"),
        (["-o", "nowhere/x.json"], "can not be written"),
        (["nowhere.toml"], "nowhere.toml"),
        (["graph.toml", "--node", "dsk", *TINY], "it has: disk"),
    ],
    ids=["odd", "zero", "huge", "directory", "node", "write", "svg", "output", "graph", "no-such-node"],
)
def test_bench_that_can_not_be_says_why(
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    temporary: Path,
    monkeypatch: pytest.MonkeyPatch,
    arguments: list[str],
    expected: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    disk(tmp_path, _MIB)
    graph_file(tmp_path)
    assert main(["bench", *arguments]) == 1
    told = capsys.readouterr()
    assert expected in told.err
    assert told.err.count("\n") == 1
    assert told.out == ""
    assert list(temporary.iterdir()) == []


@pytest.mark.parametrize("arguments", [["--seconds", "0"], ["--seconds", "nan"], ["--rounds", "0"]], ids=" ".join)
def test_bench_with_numbers_out_of_range_shows_usage(capsys: pytest.CaptureFixture[str], arguments: list[str]) -> None:
    with pytest.raises(SystemExit) as error:
        main(["bench", *arguments])
    assert error.value.code == 2
    assert f"'{arguments[1]}' is not" in capsys.readouterr().err


# Its parts.


@pytest.mark.parametrize("program", ["fio", None], ids=["fio", "our-client"])
@pytest.mark.parametrize("pattern", [RANDOM_WRITE, SEQUENTIAL_READ], ids=["write", "read"])
def test_load_counts_what_the_server_did(
    require_tool: Callable[[str], str], tmpfs: Path, pattern: Pattern, program: str | None
) -> None:
    path = tmpfs / "disk"
    content = disk(tmpfs, _MIB, "disk")
    require_tool("nbdkit")
    with nbdkit(tmpfs, path, _MIB, writable=True) as target:
        sample = run_load(program and require_tool(program), tmpfs, target, pattern, 0.05, 0.01)
    assert sample.rate > 0
    assert list(sample.latency) == ["p50", "p95", "p99", "p99.9"]
    assert len(sample.series) == 5
    assert any(sample.series)
    assert (path.read_bytes() != content) == pattern.writes


def test_series_has_every_request_that_fio_counts(
    require_tool: Callable[[str], str], tmpfs: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ends: list[float] = []
    counted: list[int] = []

    def ended(times: list[float], seconds: float, interval: float) -> tuple[float, ...]:
        ends.extend(times)
        return series(times, seconds, interval)

    def parsed(output: str, pattern: Pattern) -> Sample | None:
        counted.append(json.loads(output[output.index("{") :])["jobs"][0]["write"]["total_ios"])
        return parse(output, pattern)

    parse = load._parse
    monkeypatch.setattr(load, "series", ended)
    monkeypatch.setattr(load, "_parse", parsed)
    disk(tmpfs, _MIB, "disk")
    require_tool("nbdkit")
    with nbdkit(tmpfs, tmpfs / "disk", _MIB, writable=True) as target:
        run_load(require_tool("fio"), tmpfs, target, RANDOM_WRITE, 0.05, 0.01)
    assert counted == [len(ends)]
    assert counted[0] > 0


def test_load_on_a_server_that_refuses_fails(require_tool: Callable[[str], str], tmpfs: Path) -> None:
    require_tool("nbdkit")
    disk(tmpfs, _MIB, "disk")
    with nbdkit(tmpfs, tmpfs / "disk", _MIB, writable=False) as target:
        for program in (None, require_tool("fio")):
            with pytest.raises(IOFailure):
                run_load(program, tmpfs, target, RANDOM_WRITE, 0.05, 0)


def test_server_that_can_not_start_says_why(require_tool: Callable[[str], str], tmp_path: Path) -> None:
    require_tool("nbdkit")
    with (
        pytest.raises(BlockGraphError, match=r"nbdkit did not start: .*nothing"),
        nbdkit(tmp_path, tmp_path / "nothing", _MIB, writable=False),
    ):
        raise AssertionError("it started")


def test_sides_take_turns_in_the_other_order_every_second_round(tmp_path: Path) -> None:
    made = Disk("raw", (), "disk", 64 * _MIB, (tmp_path / "disk", "raw"), True)
    tools = Tools(None, frozenset(PEERS))
    plan = Plan(Result({}), [made, replace(made, label="qcow2")], tmp_path, tmp_path, tools, 1.0, 64 * _MIB)
    titles = [title for title, _ in plan.steps(2)]
    first, second = titles[: len(titles) // 2], titles[len(titles) // 2 :]
    assert first[:3] == ["NBD, raw: blockgraph", "NBD, raw: nbdkit", "NBD, raw: qemu-nbd"]
    assert second[:3] == first[2::-1]
    assert sorted(first) == sorted(second)
    assert len(set(first)) == len(first)


# What is shown, of figures that are known.


def made() -> Result:
    """A result with one figure of each kind."""
    result = Result({"machine": "<m> & n"}, notes=["one"], missing=["nbdkit"], absent={"NBD, a<b": ["nbdkit"]})
    latency = {"p50": 10.0, "p95": 100.0, "p99": 500.0, "p99.9": 1000.0}
    for ours, theirs in ((300.0, 100.0), (100.0, 100.0), (200.0, 50.0)):
        result.add("NBD, a<b", "work", "IOPS", OURS, Sample(ours, latency))
        result.add("NBD, a<b", "work", "IOPS", "qemu-nbd", Sample(theirs, latency))
    for name in (OURS, WITHOUT_FILTER):
        result.add("backup-top", "work", "IOPS", name, Sample(50.0, {}, (0.0, 25.0, 100.0)), interval=0.5)
    return result


def test_figure_is_medians_of_rounds_and_of_their_ratios() -> None:
    figure = made().figures[0]
    assert (figure.rate(OURS), figure.rate("qemu-nbd")) == (200.0, 100.0)
    assert figure.ratio("qemu-nbd") == 3.0
    assert figure.ratio(OURS) is None
    assert figure.spread(OURS) == 1.0
    assert Figure("g", "w", "IOPS", sides={"dd": [Sample(1.0, {})]}).ratio("dd") is None


@pytest.mark.parametrize("encoding", ["utf-8", "ascii"])
def test_report_fits_80_columns_in_every_encoding(encoding: str) -> None:
    raw = io.BytesIO()
    file = io.TextIOWrapper(raw, encoding=encoding)
    show(made(), Console(file=file, width=80, highlight=False))
    file.flush()
    lines = raw.getvalue().decode(encoding).splitlines()
    assert max(len(line) for line in lines if "rounds differ" not in line) <= 80
    table = [line.split() for line in lines if line.startswith("  qemu-nbd ")]
    assert table[0][:3] == ["qemu-nbd", "100", "IOPS"]
    assert table[0][-6:] == ["3.00", "x", "10", table[0][-3], "500", table[0][-1]]
    assert any(line.split() == ["nbdkit", "not", "installed"] for line in lines)
    bar = "│" if encoding == "utf-8" else "|"
    strip = next(line.partition(bar)[2] for line in lines if line.startswith("  qemu-nbd ") and bar in line)
    # 10 us, 100 us and 1 ms are the begin, the middle and the end of the axis.
    assert [strip[0], strip[28], strip[-1]] == (["●", "┤", "·"] if encoding == "utf-8" else ["o", "|", "."])
    plots = [line.partition(bar)[2] for line in lines if WITHOUT_FILTER in line]
    assert plots[-1] == (" ██" if encoding == "utf-8" else " ##")


def test_picture_is_xml_whatever_names_hold() -> None:
    root = ElementTree.fromstring(draw(made()))
    space = "{http://www.w3.org/2000/svg}"
    texts = [element.text for element in root.iter(f"{space}text")]
    assert "machine: <m> & n" in texts
    assert "NBD, a<b" in texts
    assert "not installed" in texts
    widths = [float(element.attrib["width"]) for element in root.iter(f"{space}rect")]
    assert widths[:2] == [widths[0], widths[0] / 2]
    assert [len(line.attrib["points"].split()) for line in root.iter(f"{space}polyline")] == [3, 3]
    page = float(root.attrib["height"])
    assert all(0 < float(element.attrib["y"]) < page for element in root.iter(f"{space}text"))


def test_axes_and_numbers() -> None:
    assert [format_number(n) for n in (0.0, 0.42, 9.996, 99.96, 512, 999.7, 25_130, 1_250_000)] == [
        *("0", "0.42", "10", "100", "512", "1k", "25.1k", "1.25M"),
    ]
    assert [format_latency(us) for us in (1.84, 250, 999.8, 12_000, 1.5e6)] == [
        *("1.84 µs", "250 µs", "1 ms", "12 ms", "1.5 s"),
    ]
    assert [format_rate(1043.4, unit) for unit in ("MiB/s", "IOPS")] == ["1043 MiB/s", "1.04k IOPS"]
    assert [round_up(n) for n in (0, 1, 61, 10_200)] == [1, 1, 80, 12_000]
    assert Log.around([15, 900]).ticks() == pytest.approx([10, 100, 1000])
    assert Log.around([10]).ticks() == pytest.approx([10, 100])


def test_latencies_and_intervals_are_counted() -> None:
    assert percentiles(range(0, 1_001_000, 1000)) == {"p50": 500, "p95": 950, "p99": 990, "p99.9": 999}
    assert percentiles([]) == {}
    assert series([0.001, 0.009, 0.015, 0.029, 0.03], 0.03, 0.01) == pytest.approx([200, 100, 100])


def test_patterns_stay_inside_the_disk() -> None:
    size = 10 * SEQUENTIAL_WRITE.block + 4096
    for pattern, least in ((SEQUENTIAL_WRITE, 10), (RANDOM_READ, 200)):
        offsets = pattern.offsets(size)
        found = [next(offsets) for _ in range(1000)]
        assert all(offset % pattern.block == 0 and offset + pattern.block <= size for offset in found)
        assert len(set(found)) >= least

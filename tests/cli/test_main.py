# SPDX-FileCopyrightText: blockgraph contributors
# SPDX-License-Identifier: MIT
"""The root of the command line."""

from __future__ import annotations

import importlib
import subprocess
import sys
from argparse import Namespace

import pytest

from blockgraph import cli
from blockgraph.errors import GraphError


def test_help_lists_every_command_and_imports_none() -> None:
    code = (
        "import sys\nfrom blockgraph.cli import main\n"
        "try: main(['--help'])\nexcept SystemExit: pass\n"
        "print(sorted(name for name in sys.modules if name.startswith('blockgraph.')), file=sys.stderr)"
    )
    done = subprocess.run([sys.executable, "-P", "-c", code], capture_output=True, text=True, check=True)
    assert all(f"\n    {name} " in done.stdout for name in cli.COMMANDS)
    assert done.stderr.strip() == "['blockgraph.cli']"


@pytest.mark.parametrize("command", [name for name in cli.COMMANDS if name != "demo"])
def test_every_command_has_its_module_and_help(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        cli.main([command, "--help"])
    assert ended.value.code == 0
    assert capsys.readouterr().out.startswith(f"usage: blockgraph {command}")


def test_version_is_that_of_the_package(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        cli.main(["--version"])
    assert capsys.readouterr().out.startswith("blockgraph 0.")


@pytest.mark.parametrize("argv", [[], ["chekc"], ["check"], ["check", "--nonsense", "x"]])
def test_wrong_command_line_is_status_2(argv: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        cli.main(argv)
    assert ended.value.code == 2
    assert "usage: blockgraph" in capsys.readouterr().err


def raising(error: BaseException) -> object:
    def run(args: Namespace) -> int:
        raise error

    return run


@pytest.fixture
def failing(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    importlib.import_module("blockgraph.cli.schema")
    return monkeypatch


def test_error_is_one_line_without_control_characters_and_status_1(
    failing: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    failing.setattr("blockgraph.cli.schema.run", raising(GraphError("no \x1b[2J", node="top", hint="do this")))
    assert cli.main(["schema"]) == 1
    assert capsys.readouterr().err == "blockgraph: node 'top': no \\x1b[2J; do this\n"


def test_interrupt_is_status_130_without_a_traceback(
    failing: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    failing.setattr("blockgraph.cli.schema.run", raising(KeyboardInterrupt()))
    assert cli.main(["schema"]) == 130
    assert capsys.readouterr().err == ""


def test_reader_that_leaves_early_is_no_traceback() -> None:
    with subprocess.Popen(
        [sys.executable, "-P", "-m", "blockgraph", "schema"], stdout=subprocess.PIPE, stderr=subprocess.PIPE
    ) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        process.stdout.read(1)
        process.stdout.close()
        assert process.stderr.read() == b""


def test_full_device_is_told() -> None:
    with open("/dev/full", "w") as full:
        done = subprocess.run(
            [sys.executable, "-P", "-m", "blockgraph", "schema"],
            stdout=full,
            stderr=subprocess.PIPE,
            text=True,
            check=False,
        )
    assert done.returncode == 1
    assert done.stderr == "blockgraph: can not write the output: No space left on device\n"

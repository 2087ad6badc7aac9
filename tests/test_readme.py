# SPDX-FileCopyrightText: blockgraph contributors
# SPDX-License-Identifier: MIT
"""The README does what it says: its commands and programs are run."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
import textwrap
import tomllib
from pathlib import Path

import pytest

from blockgraph.graph.load import load

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.rst").read_text()


def blocks(language: str) -> list[str]:
    """The code blocks of a language."""
    found = re.findall(rf"^\.\. code-block:: {language}\n\n((?:    .*\n|\n)+)", README, re.MULTILINE)
    return [textwrap.dedent(block) for block in found]


def test_readme_begins_with_the_two_commands_that_ci_runs() -> None:
    start = README[: README.index("blockgraph is an")]
    assert "pip install . && blockgraph demo" in start
    assert "pip install '.[test]' && pytest" in start
    assert "test_command=\"pip install '.[test]' && pytest\"" in (ROOT / ".ci" / "run").read_text()


@pytest.mark.parametrize("number", range(len(blocks("python"))))
def test_readme_program_runs(number: int, tmp_path: Path) -> None:
    program = blocks("python")[number]
    done = subprocess.run(
        [sys.executable, "-P", "-c", program], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("number", range(len(blocks("toml"))))
def test_readme_tour_runs(number: int, tmp_path: Path) -> None:
    graph, commands = blocks("toml")[number], blocks("sh")[number]
    tomllib.loads(graph)
    file = tmp_path / graph.split(maxsplit=2)[1]
    file.write_text(graph)
    load(file)
    program = shutil.which("blockgraph", path=str(Path(sys.executable).parent))
    assert program is not None
    for line in commands.strip().splitlines():
        command = line.partition("#")[0].split()
        assert command.pop(0) == "blockgraph"
        done = subprocess.run([program, *command], cwd=tmp_path, capture_output=True, text=True, check=False)
        assert done.returncode == 0, f"{line}: {done.stdout}{done.stderr}"


def test_readme_names_every_driver() -> None:
    table = README[README.index("Drivers\n---") : README.index("Exports: NBD")]
    program = "from blockgraph.registry import driver_names; print(*driver_names())"  # without those of other tests
    done = subprocess.run([sys.executable, "-P", "-c", program], capture_output=True, text=True, check=True)
    assert [name for name in done.stdout.split() if name not in table and name != "null-aio"] == []


def test_readme_changelog_is_the_last_section() -> None:
    titles = re.findall(r"^(.+)\n-{4,}$", README, re.MULTILINE)
    assert titles[-1] == "Changelog"

# SPDX-FileCopyrightText: blockgraph contributors
# SPDX-License-Identifier: MIT
"""Our command and QEMU's tools, run in the test's folder."""

from __future__ import annotations

import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from blockgraph.cli import main

Run = Callable[..., str]


@pytest.fixture
def ours(capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Run:
    """Runs a command in the test's folder; its output, or its error with `status`."""
    monkeypatch.chdir(tmp_path)

    def run(*arguments: object, status: int = 0) -> str:
        capsys.readouterr()
        try:
            got = main([str(argument) for argument in arguments])
        except SystemExit as ended:
            got = int(str(ended.code))
        told = capsys.readouterr()
        assert got == status, told.err
        return told.err if status else told.out

    return run


@pytest.fixture
def qemu(require_tool: Callable[[str], str], tmp_path: Path) -> Run:
    """Runs one of QEMU's tools in the test's folder."""

    def run(tool: str, *arguments: object) -> str:
        command = [require_tool(tool), *map(str, arguments)]
        done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
        assert done.returncode == 0, f"{command}: {done.stdout}{done.stderr}"
        return done.stdout

    return run

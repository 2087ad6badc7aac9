# SPDX-FileCopyrightText: blockgraph contributors
# SPDX-License-Identifier: MIT
"""kill -9 of a process that writes, over and over: see kill_loop.py. BLOCKGRAPH_KILLS: how often (100)."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

KILLS = int(os.environ.get("BLOCKGRAPH_KILLS", "100"))


@pytest.mark.timeout(120 + 2 * KILLS)
@pytest.mark.parametrize("kind", ["raw", "qcow2"])
def test_kill_at_a_random_moment_misses_no_change(tmpfs: Path, kind: str) -> None:
    script = Path(__file__).parent / "kill_loop.py"
    seed = int.from_bytes(os.urandom(3))
    done = subprocess.run(
        [sys.executable, script, tmpfs, str(KILLS), str(seed), kind], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr

# SPDX-FileCopyrightText: blockgraph contributors
# SPDX-License-Identifier: MIT
"""The package's layers (blockgraph/README.rst): what stands below never imports what stands above."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

import blockgraph

PACKAGE = Path(blockgraph.__file__).parent

#: Folder -> folders that may import it, besides itself and modules of the top folder that start it.
IMPORTED_BY: dict[str, set[str]] = {
    "cli": {"__main__.py"},
    "bench": {"cli"},
    "demo": {"cli"},
    "checkpoints": {"cli", "session.py"},
    "chains": {"cli", "jobs"},
    "jobs": {"cli", "bench", "demo", "checkpoints", "session.py", "api.py", "graph", "testing"},
}


def imported(path: Path) -> set[str]:
    """Modules that a file names in imports, wherever they stand in it."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    return found


@pytest.mark.parametrize("layer", IMPORTED_BY)
def test_layer_is_imported_from_above_only(layer: str) -> None:
    importers = {
        path.relative_to(PACKAGE).parts[0]
        for path in PACKAGE.rglob("*.py")
        if any(f"{name}.".startswith(f"blockgraph.{layer}.") for name in imported(path))
    }
    assert importers, "nothing imports it: the test looks at the wrong place"
    assert importers <= IMPORTED_BY[layer] | {layer}

# SPDX-FileCopyrightText: blockgraph contributors
# SPDX-License-Identifier: MIT
"""`python -m benchmarks.table RESULT.json...`: pytest-benchmark's records as the tables of README.rst.

Of a row that several files have, the last counts.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

HEAD = ("Figure", "Measured", "blockgraph", "Peer", "Ratio", "Wanted")


def number(value: float) -> str:
    """Three digits that mean something."""
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"


def cells(row: dict[str, Any], peer: dict[str, Any]) -> tuple[str, ...]:
    """A line of the table."""
    ours = f"{number(row['ours'])} {row['unit']}"
    wanted = peer["wanted"]
    if peer["value"] is None:
        return row["figure"], row["what"], ours, "", "", f"at most {number(wanted)}" if wanted is not None else ""
    theirs = f"{peer['peer']}: {number(peer['value'])}"
    return row["figure"], row["what"], ours, theirs, f"{peer['ratio']:.2f}", f"{wanted:g}" if wanted is not None else ""


def lines(records: list[dict[str, Any]]) -> list[tuple[str, ...]]:
    """All lines, by figure."""
    found: dict[tuple[str, ...], tuple[str, ...]] = {}
    for record in records:
        for row in record["extra_info"].get("rows", ()):
            for peer in row["peers"] or [{"peer": "", "value": None, "ratio": None, "wanted": None}]:
                found[row["figure"], row["what"], row["unit"], peer["peer"]] = cells(row, peer)
    return sorted(found.values(), key=lambda line: line[0])


def rst(table: list[tuple[str, ...]]) -> str:
    """A simple table of reStructuredText."""
    widths = [max(len(line[column]) for line in [HEAD, *table]) for column in range(len(HEAD))]
    rule = "  ".join("=" * width for width in widths)
    # An empty first cell would continue the row above.
    body = ["  ".join((cell or "\\").ljust(width) for cell, width in zip(line, widths, strict=True)) for line in table]
    head = "  ".join(cell.ljust(width) for cell, width in zip(HEAD, widths, strict=True))
    return "\n".join(line.rstrip() for line in [rule, head, rule, *body, rule])


def main(paths: list[str]) -> None:
    """Print the table of these files."""
    print(rst(lines([record for path in paths for record in json.loads(Path(path).read_text())["benchmarks"]])))


if __name__ == "__main__":
    main(sys.argv[1:])

# SPDX-FileCopyrightText: blockgraph contributors
# SPDX-License-Identifier: MIT
"""`blockgraph check FILE`: everything that is wrong with a graph file, at once.

Each problem is one line, "FILE:LINE:COLUMN: member: what is wrong; what to do", as compilers write them, so that
editors can jump there. Nothing is opened, unless `--open` asks for it; then images are opened read-only.
"""

from __future__ import annotations

import asyncio
import json
import sys
from argparse import Namespace, _SubParsersAction
from typing import Any

from blockgraph.graph.load import Description, examine, placed
from blockgraph.graph.problem import Problem, errors


def register(subparsers: _SubParsersAction[Any]) -> None:
    """Add the command."""
    parser = subparsers.add_parser(
        "check",
        help="tell everything that is wrong with a graph file",
        description="Tell everything that is wrong with a graph file. Exit status: 0 nothing (or warnings), 1 errors.",
    )
    parser.add_argument("file", metavar="FILE", help="graph file: .toml, .json, .yaml")
    parser.add_argument("--open", action="store_true", help="also open the images, read-only, and check what they say")
    parser.add_argument("--json", action="store_true", help="print the problems as JSON")
    parser.set_defaults(run=run)


def run(args: Namespace) -> int:
    """Print the problems; the exit status."""
    description, problems = examine(args.file)
    passed_over = args.open and bool(errors(problems))
    if args.open and not passed_over:
        problems = placed(description.source, problems + asyncio.run(_opened(description)))
    if args.json:
        print(json.dumps({"problems": [problem.to_json() for problem in problems]}, indent=2, default=repr))
    else:
        for problem in problems:
            print(problem, file=sys.stderr if problem.severity == "error" else sys.stdout)
        print(summary(args.file, description, problems, passed_over=passed_over))
    return 1 if errors(problems) else 0


async def _opened(description: Description) -> list[Problem]:
    from blockgraph.graph.graph import Graph

    return await Graph.dry_run(description)


def summary(file: str, description: Description, problems: list[Problem], *, passed_over: bool) -> str:
    """The last line: how many problems, or that there are none."""
    wrong = len(errors(problems))
    warnings = len(problems) - wrong
    counts = [_count(wrong, "error")] * bool(wrong) + [_count(warnings, "warning")] * bool(warnings)
    if wrong:
        note = "; images were not opened" if passed_over else ""
        return f"{file}: {', '.join(counts)}{note}"
    parts = [_count(len(description.nodes), "node"), _count(len(description.exports), "export")]
    parts.append(_count(len(description.jobs), "job"))
    found = f" ({counts[0]})" if counts else ""
    return f"{file}: ok{found}: {', '.join(parts)}"


def _count(number: int, what: str) -> str:
    return f"{number} {what}{'' if number == 1 else 's'}"

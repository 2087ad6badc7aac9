# SPDX-FileCopyrightText: blockgraph contributors
# SPDX-License-Identifier: MIT
"""`blockgraph graph FILE`: draw a graph file, also one that has problems. Nothing is opened."""

from __future__ import annotations

import os
import sys
from argparse import Namespace, _SubParsersAction
from typing import Any

from blockgraph.errors import IOFailure, OptionError
from blockgraph.graph.draw import FORMATS, picture, render
from blockgraph.graph.load import examine
from blockgraph.graph.problem import errors

#: What a drawing is named -> its format.
_SUFFIXES = {
    "": "text",
    ".txt": "text",
    ".dot": "dot",
    ".gv": "dot",
    ".svg": "svg",
    ".mmd": "mermaid",
    ".mermaid": "mermaid",
    ".json": "json",
}


def register(subparsers: _SubParsersAction[Any]) -> None:
    """Add the command."""
    parser = subparsers.add_parser(
        "graph",
        help="draw a graph file",
        description="Draw a graph file: nodes, drivers, files, and on the edges what each needs and shares.",
    )
    parser.add_argument("file", metavar="FILE", help="graph file: .toml, .json, .yaml")
    parser.add_argument("-f", "--format", choices=FORMATS, default=None, help="default: what OUT ends with, else text")
    parser.add_argument("-o", "--output", metavar="OUT", help="write there instead of to the terminal")
    parser.set_defaults(run=run)


def run(args: Namespace) -> int:
    """Draw; 0 also when the graph has problems, which are told on stderr."""
    form = args.format or _format_of(args.output)
    description, problems = examine(args.file)
    wrong = errors(problems)
    if wrong:
        more = f" (and {len(wrong) - 1} more, see 'blockgraph check')" if len(wrong) > 1 else ""
        print(f"blockgraph: {wrong[0]}{more}", file=sys.stderr)
        if not description.source.data:
            return 1
    drawn = picture(description.model())
    if args.output is None and form == "text" and sys.stdout.isatty():
        from rich.console import Console

        from blockgraph.graph.draw.text import show

        show(drawn, Console())
        return 0
    text = render(drawn, form)
    if args.output is None:
        sys.stdout.write(text)
    else:
        _write(args.output, text)
    return 0


def _format_of(output: str | None) -> Any:
    output = output or ""
    suffix = os.path.splitext(output)[1].lower()
    if suffix not in _SUFFIXES:
        known = ", ".join(filter(None, _SUFFIXES))
        raise OptionError(
            f"can not draw a file named '{suffix}'", path=output, hint=f"name it {known}, or choose one by --format"
        )
    return _SUFFIXES[suffix]


def _write(output: str, text: str) -> None:
    try:
        with open(output, "w", encoding="utf-8") as file:
            file.write(text)
    except OSError as error:
        raise IOFailure(f"can not write '{output}': {error.strerror}", errno=error.errno) from None

# SPDX-FileCopyrightText: blockgraph contributors
# SPDX-License-Identifier: MIT
"""`blockgraph schema`: the JSON Schema of graph files, for editors. It knows the drivers installed here."""

from __future__ import annotations

import json
from argparse import Namespace, _SubParsersAction
from typing import Any

from blockgraph.graph.schema import graph_schema


def register(subparsers: _SubParsersAction[Any]) -> None:
    """Add the command."""
    parser = subparsers.add_parser(
        "schema",
        help="print the JSON Schema of graph files",
        description="Print the JSON Schema (draft 2020-12) of graph files. An editor that is given it completes and "
        "explains members, in JSON, YAML and TOML.",
    )
    parser.set_defaults(run=run)


def run(args: Namespace) -> int:
    """Print it."""
    print(json.dumps(graph_schema(), indent=2))
    return 0

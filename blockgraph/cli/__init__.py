# SPDX-FileCopyrightText: blockgraph contributors
# SPDX-License-Identifier: MIT
"""The command `blockgraph`.

Each subcommand is a module of this package with `register(subparsers)` and `run(args) -> int`. `COMMANDS` is the one
list of them; a module is imported only when its command is asked for.
"""

from __future__ import annotations

import argparse
import importlib
import io
import os
import sys
from collections.abc import Sequence

#: Subcommand (also its module here) -> what `blockgraph --help` says about it.
COMMANDS = {
    "run": "start the exports and jobs of a graph file",
    "check": "tell everything that is wrong with a graph file",
    "graph": "draw a graph file",
    "schema": "print the JSON Schema of graph files",
    "info": "show what an image is",
    "map": "show where the bytes of an image lie",
    "create": "make a new image",
    "bitmap": "change and list the dirty bitmaps of an image",
    "checkpoint": "make, list, delete and export checkpoints of images",
    "verify": "read the backups of a chain and compare them with their checksums",
    "restore": "write a disk as it was at a point in time",
    "bench": "measure blockgraph on this machine, beside the tools that are installed",
    "demo": "back up a busy disk and prove that the backup is right",
}

#: Exit status after Ctrl-C: 128 + SIGINT.
INTERRUPTED = 130


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command line (default: that of the process); returns the exit status.

    0: done. 1: an error, told in one or two lines on stderr. 2: the command line is wrong. 130: interrupted.
    """
    argv = list(sys.argv[1:] if argv is None else argv)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # a terminal that knows no box characters is no reason to fail
            stream.reconfigure(errors="backslashreplace")
    command = next((word for word in argv if not word.startswith("-")), None)
    try:
        status = _run(_parser(command).parse_args(argv))
        sys.stdout.flush()
    except KeyboardInterrupt:
        return INTERRUPTED
    except BrokenPipeError:
        # Whoever read our output has gone, as `head` does. Python must not complain about it at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except OSError as error:
        print(f"blockgraph: can not write the output: {error.strerror}", file=sys.stderr)
        return 1
    return status


def _run(args: argparse.Namespace) -> int:
    from blockgraph.errors import BlockGraphError
    from blockgraph.graph.problem import printable

    module = importlib.import_module(f"{__name__}.{args.command}")
    try:
        status: int = module.run(args)
    except BlockGraphError as error:
        print(f"blockgraph: {printable(str(error))}", file=sys.stderr)
        return 1
    return status


def _parser(command: str | None) -> argparse.ArgumentParser:
    """The parser, complete for `command` only."""
    parser = argparse.ArgumentParser(
        prog="blockgraph",
        formatter_class=_Formatter,
        description="Virtual disks as graphs of nodes, and point-in-time backups of live ones.",
        epilog="'blockgraph COMMAND --help' tells more about a command.",
    )
    parser.add_argument("--version", action=_Version)
    subparsers = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    for name, text in COMMANDS.items():
        if name == command:
            importlib.import_module(f"{__name__}.{name}").register(subparsers)
        else:
            subparsers.add_parser(name, help=text)
    return parser


class _Formatter(argparse.HelpFormatter):
    """Leaves room for the longest command: argparse forgets the indent of commands when it measures them."""

    def add_argument(self, action: argparse.Action) -> None:
        super().add_argument(action)
        if action.nargs == argparse.PARSER:
            self._action_max_length += self._indent_increment


class _Version(argparse.Action):
    """Looks the version up only when it is asked for."""

    def __init__(self, option_strings: Sequence[str], dest: str) -> None:
        super().__init__(option_strings, argparse.SUPPRESS, nargs=0, help="print the version")

    def __call__(self, parser: argparse.ArgumentParser, *_: object) -> None:
        from blockgraph import __version__

        print(f"{parser.prog} {__version__}")
        parser.exit()

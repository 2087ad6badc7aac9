# SPDX-FileCopyrightText: blockgraph contributors
# SPDX-License-Identifier: MIT
"""`blockgraph verify CHAIN`: read backups, compare them with their checksums, and say where they are damaged.

Exit status: 0 every point that was looked at is good; 1 something is damaged, or missing.
"""

from __future__ import annotations

import asyncio
import sys
from argparse import Namespace, _SubParsersAction
from typing import Any

import msgspec
from rich.console import Console

from blockgraph.chains import Chain, Finding, Report, verify
from blockgraph.cli.chains import AT_HELP, add_chain_arguments, describe, points_table, progress
from blockgraph.graph.problem import printable

#: Ranges of one finding that people are shown; JSON has all.
_SHOWN = 8


def register(subparsers: _SubParsersAction[Any]) -> None:
    """Add the command."""
    parser = subparsers.add_parser(
        "verify",
        help="read the backups of a chain and compare them with their checksums",
        description="Read the backups of a chain and compare them with their checksums. Damage is told by file and "
        "range, and by the points in time that have it.",
        epilog="Exit status: 0 all is good, 1 something is damaged or missing.",
    )
    add_chain_arguments(parser)
    parser.add_argument("--at", metavar="POINT", help=f"only what this point in time needs: {AT_HELP}")
    parser.add_argument("--list", action="store_true", help="list the points and read no image")
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.set_defaults(run=run)


def run(args: Namespace) -> int:
    """Verify; the exit status."""
    chain = Chain.load(args.chain)
    if args.list:
        return _list(chain, args)
    points = None
    if args.at is not None or chain.selected is not None:
        points = [chain.find(args.at or "latest", args.disk)]
    elif args.disk is not None:
        points = chain.points(args.disk)
    with progress("verifying") as told:
        report = asyncio.run(verify(chain, points, progress=told))
    if args.json:
        _print_json(_report_json(chain, report))
    else:
        _tell(chain, report, args.disk)
    return 1 if report.findings or report.affected else 0


def _list(chain: Chain, args: Namespace) -> int:
    if args.json:
        _print_json([describe(each) for each in chain.backups.values() if args.disk in (None, each.manifest.disk.name)])
    else:
        _console().print(points_table(chain, args.disk, {}))
    for path, error in chain.damaged.items():
        print(f"blockgraph: {printable(path)}: {printable(str(error))}", file=sys.stderr)
    return 1 if chain.damaged else 0


def _report_json(chain: Chain, report: Report) -> dict[str, Any]:
    return {
        "points": [
            {**describe(chain.backups[name]), "good": name in report.good}
            for name in sorted([*report.good, *report.affected], key=list(chain.backups).index)
        ],
        "findings": [
            {
                "file": finding.file,
                "backup": finding.backup,
                "reason": finding.reason,
                "ranges": [{"start": start, "length": length} for start, length in finding.ranges],
            }
            for finding in report.findings
        ],
        "unfinished": report.unfinished,
    }


def _print_json(value: object) -> None:
    print(msgspec.json.format(msgspec.json.encode(value), indent=2).decode())


def _console() -> Console:
    console = Console(highlight=False, markup=False)
    if not console.is_terminal:
        console.width = 160
    return console


def _tell(chain: Chain, report: Report, disk: str | None) -> None:
    states = dict.fromkeys(report.good, "good") | dict.fromkeys(report.affected, "DAMAGED")
    console = _console()
    console.print(points_table(chain, disk, states))
    for finding in report.findings:
        console.print(f"\n{printable(finding.file)}: {printable(finding.reason)}", soft_wrap=True)
        _tell_ranges(console, finding)
    for path in report.unfinished:
        console.print(f"\n{printable(path)}: the backup never ended, its files are of no use", soft_wrap=True)
    good, bad = len(report.good), len(report.affected)
    console.print(f"\n{good} of {good + bad} points in time are good")


def _tell_ranges(console: Console, finding: Finding) -> None:
    for start, length in finding.ranges[:_SHOWN]:
        console.print(f"  bytes {start} to {start + length} ({start:#x}, {length:#x})")
    if len(finding.ranges) > _SHOWN:
        console.print(f"  and {len(finding.ranges) - _SHOWN} more ranges, which --json has")

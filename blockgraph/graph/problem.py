# SPDX-FileCopyrightText: blockgraph contributors
# SPDX-License-Identifier: MIT
"""Problem: one thing that is wrong with a graph, told before anything is opened or changed.

Checks collect problems instead of raising, so that a user sees all of them at once. `to_error` turns one into the
exception that the same mistake raises at run time.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any, Literal, NamedTuple

from blockgraph.errors import BlockGraphError, GraphError, OptionError, PermissionConflict

#: Most further lines that a text names.
_MAX_SEE = 4

Severity = Literal["error", "warning"]


class Where(NamedTuple):
    """A place in a graph file.

    Attributes:
        file: as the user named it; None for a description that came as a dict.
        line, column: from 1; 0 when not known.
    """

    file: str | None
    line: int = 0
    column: int = 0

    def __str__(self) -> str:
        text = self.file or ""
        if self.line:
            text += f":{self.line}:{self.column}" if text else f"line {self.line}:{self.column}"
        return text


@dataclass(frozen=True, slots=True, kw_only=True)
class Problem:
    """What is wrong, where, and what to do.

    Attributes:
        severity: an "error" refuses the graph, a "warning" does not.
        kind: class of the error that the same mistake raises at run time.
        message: what is wrong, without the place and without a full stop.
        path: the member concerned, as "nodes[2].file.filename"; "" for the whole file.
        related: paths of the other members involved (the rest of a cycle, the other edge of a conflict).
        where: the place in the file.
        also: the places of `related`, in the same file.
        node: name of the node concerned.
        value: what was found; None when a value is not the point.
        allowed: what would have been accepted.
        closest: the closest accepted spelling.
        hint: what the user can do.
        needs, blocks, permission: of a permission conflict, see errors.PermissionConflict.
    """

    severity: Severity = "error"
    kind: type[BlockGraphError] = GraphError
    message: str
    path: str = ""
    related: tuple[str, ...] = ()
    where: Where | None = None
    also: tuple[Where, ...] = ()
    node: str | None = None
    value: Any = None
    allowed: tuple[str, ...] = ()
    closest: str | None = None
    hint: str | None = None
    needs: str = ""
    blocks: str = ""
    permission: str = ""

    @property
    def remedy(self) -> str | None:
        """The hint, or the closest spelling as a question, or a short list of what is allowed."""
        if self.hint:
            return self.hint
        if self.closest is not None:
            return f"did you mean '{self.closest}'?"
        if self.allowed:
            return f"allowed: {', '.join(self.allowed)}"
        return None

    def __str__(self) -> str:
        """`graph.toml:14:1: nodes[2].targett: unknown member 'targett' of driver 'x'; did you mean 'target'?`"""
        place = str(self.where) if self.where else ""
        parts = [part for part in (place, self.path) if part]
        if self.severity == "warning":
            parts.append("warning")
        text = ": ".join([*parts, self.message]) + self._see()
        return printable(f"{text}; {self.remedy}" if self.remedy else text)

    def _see(self) -> str:
        """Where the other members are: " (see line 12)"; empty when they are in the same line, or not in a file."""
        own = self.where.line if self.where is not None else 0
        lines = list(dict.fromkeys(str(place.line) for place in self.also if place.line not in (0, own)))
        if not lines:
            return ""
        more = ", ..." if len(lines) > _MAX_SEE else ""
        return f" (see line{'s' * (len(lines) > 1)} {', '.join(lines[:_MAX_SEE])}{more})"

    def to_error(self) -> BlockGraphError:
        """The exception for this problem; its text is the problem's."""
        place = f"{self.where}: " if self.where and str(self.where) else ""
        if issubclass(self.kind, PermissionConflict):
            return self.kind(
                self._reason(place),
                needs=self.needs,
                blocks=self.blocks,
                permission=self.permission,
                node=self.node or "",
            )
        if issubclass(self.kind, OptionError):
            error = self.kind(
                self.message + self._see(), path=self.path, value=self.value, closest=self.closest, hint=self.remedy
            )
            if place:
                error.path = f"{place}{self.path}" if self.path else place.removesuffix(": ")
            return error
        return self.kind(self._reason(place), hint=None)

    def _reason(self, place: str) -> str:
        path = f"{self.path}: " if self.path and place else ""
        text = f"{place}{path}{self.message}{self._see()}"
        return f"{text}; {self.remedy}" if self.remedy else text

    def to_json(self) -> dict[str, Any]:
        """A plain object, for `blockgraph check --json`; members that say nothing are left out."""
        out: dict[str, Any] = {"severity": self.severity, "error": self.kind.__name__, "message": self.message}
        if self.where is not None:
            out |= {"file": self.where.file, "line": self.where.line or None, "column": self.where.column or None}
        out |= {
            "path": self.path,
            "related": list(self.related),
            "related-lines": [place.line for place in self.also if place.line],
            "node": self.node,
            "found": self.value,
            "allowed": list(self.allowed),
            "closest": self.closest,
            "hint": self.hint,
            "needs": self.needs,
            "blocks": self.blocks,
            "permission": self.permission,
        }
        return {key: value for key, value in out.items() if value not in (None, "", [])}

    def at(self, where: Where, also: Iterable[Where] = ()) -> Problem:
        """The same problem at a place in a file; `also`: the places of `related`."""
        return replace(self, where=where, also=tuple(also))


def printable(text: str) -> str:
    """Text without control and formatting characters: names in a graph file must not write to a terminal."""
    return text if text.isprintable() else "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text)


def errors(problems: Iterable[Problem]) -> list[Problem]:
    """Those that refuse the graph."""
    return [problem for problem in problems if problem.severity == "error"]

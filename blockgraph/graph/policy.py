# SPDX-FileCopyrightText: blockgraph contributors
# SPDX-License-Identifier: MIT
"""OpenPolicy: whether and how a file named inside an image is opened.

An image is untrusted input, so the name of a backing file in its header is a wish, not an instruction. The policy
turns it into a node description, or refuses: only local files, only a format that the header names (nothing is ever
probed), only below the allowed directories where such are given, always read-only.
"""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from blockgraph.driver import ImpliedChild
from blockgraph.errors import GraphError, OptionError
from blockgraph.registry import get_driver

_URL = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*:")

#: Longest chain of backing files that is followed.
MAX_CHAIN = 256


@dataclass(frozen=True)
class OpenPolicy:
    """What images may name.

    Attributes:
        directories: a named file must lie below one of these; None: anywhere.
        follow: False refuses every named file.
    """

    directories: Sequence[str] | None = None
    follow: bool = True

    def describe(self, node: str, image: str | None, name: str, wish: ImpliedChild, seen: frozenset[str]) -> Allowed:
        """The description of the child `name` that the image behind `node` asks for.

        Args:
            image: path of the image, which relative names are relative to.
            seen: real paths of the image itself and of those above it in the chain.
        Raises:
            GraphError: refused; says what to put into the description instead.
        """
        remedy = f"give '{name}' in the description of '{node}' to open it, or null to leave it out"

        def refuse(reason: str, hint: str = remedy) -> GraphError:
            return GraphError(
                f"{name} file '{wish.filename}' named by the image {reason}", node=node, op="open", hint=hint
            )

        if not self.follow:
            raise refuse("is not opened here")
        if not wish.filename or "\0" in wish.filename:
            raise refuse("is not a file name")
        if _URL.match(wish.filename):
            raise refuse("is not a plain path")
        if wish.format is None:
            raise refuse("has no format beside it, and formats are not guessed")
        try:
            driver = get_driver(wish.format)
        except OptionError:
            raise refuse(f"has the unknown format '{wish.format}'") from None
        if driver.kind != "format":
            raise refuse(f"has '{wish.format}' for a format, which is a {driver.kind}")
        if image is None and not os.path.isabs(wish.filename):
            raise refuse("is relative, and the image has no path")
        path = os.path.join(os.path.dirname(image or ""), wish.filename)
        real = os.path.realpath(path)
        if self.directories is not None and not any(_below(real, d) for d in self.directories):
            raise refuse("lies outside the allowed directories")
        if real in seen:
            raise refuse("is already part of its own chain", "the image's header is damaged or was tampered with")
        if len(seen) >= MAX_CHAIN:
            raise refuse(f"makes a chain of more than {MAX_CHAIN}", "commit some layers into their backing files")
        inner = {"driver": "file", "filename": path, "read-only": True}
        return Allowed({"driver": wish.format, "read-only": True, "file": inner}, real)


@dataclass(frozen=True)
class Allowed:
    """What may be opened.

    Attributes:
        description: of the node to open.
        real_path: of its file, links resolved.
    """

    description: dict[str, Any]
    real_path: str


def _below(path: str, directory: str) -> bool:
    root = os.path.realpath(directory)
    return path == root or path.startswith(root.rstrip(os.sep) + os.sep)

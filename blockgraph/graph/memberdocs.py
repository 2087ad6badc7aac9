# SPDX-FileCopyrightText: blockgraph contributors
# SPDX-License-Identifier: MIT
"""What the docstrings say about the members of an options structure, for the JSON schema.

A driver's manual is its module's docstring and a structure's is its own: the schema quotes them instead of saying the
same a second time. Understood are lines that begin with the names of members, in the ways the docstrings here write
them:

    name: text                  * `name`, `other`: text                 name      text

with lines further indented as their continuation, in a section "Options" or "Attributes".
"""

from __future__ import annotations

import inspect
import re
import sys
from collections.abc import Iterable

import msgspec

_SECTION = re.compile(r"^(?:Options|Attributes)\b.*?(?=^Example|\Z)", re.DOTALL | re.MULTILINE)
_NAME = r"`?[a-z][a-z0-9_.-]*`?"
_ENTRY = re.compile(rf"(\s*)(?:\*\s+)?({_NAME}(?:,\s+{_NAME})*)(?::\s+|\s{{2,}})(\S.*)")


def member_docs(kind: type[msgspec.Struct], modules: Iterable[str] = ()) -> dict[str, str]:
    """Text for each member, by the name it has in a file.

    Args:
        modules: names of further modules whose docstrings describe the members; they count first.
    """
    names = {_folded(field.encode_name): field.encode_name for field in msgspec.structs.fields(kind)}
    docs: dict[str, str] = {}
    texts = [sys.modules[name].__doc__ for name in modules if name in sys.modules]
    texts += [base.__doc__ for base in kind.__mro__ if issubclass(base, msgspec.Struct)]
    for text in texts:
        for name, found in _entries(text or "", set(names)):
            docs.setdefault(names[name], found)
    return docs


def _folded(name: str) -> str:
    return name.replace("_", "-")


def summary(text: str | None) -> str:
    """The first sentence of a docstring's first line, without the "name: " of a driver's manual."""
    first = (text or "").strip().split("\n", 1)[0]
    return re.sub(r"^[a-z0-9_-]+(?: \(alias [^)]*\))?: ", "", first)


def _entries(text: str, names: set[str]) -> list[tuple[str, str]]:
    found: list[tuple[str, str]] = []
    current: list[str] = []
    words: list[str] = []
    indent = 0
    section = _SECTION.search(inspect.cleandoc(text))
    for line in [*(section[0].splitlines() if section else []), ""]:
        match = _ENTRY.fullmatch(line)
        listed = [_folded(name.strip("` ")) for name in match[2].split(",")] if match else []
        spaces = len(line) - len(line.lstrip())
        begins = bool(listed) and names.issuperset(listed)
        if current and (begins or not line.strip() or spaces <= indent):
            found += [(name, " ".join(words)) for name in current]
            current = []
        if begins and match:
            current, words, indent = listed, [match[3].strip()], spaces
        elif current:
            words.append(line.strip())
    return found

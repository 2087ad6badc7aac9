# SPDX-FileCopyrightText: blockgraph contributors
# SPDX-License-Identifier: MIT
"""Plain data to option structures, telling everything that is wrong with them instead of the first thing.

msgspec converts; when it refuses, `diagnose` walks the data beside the structure's type and tells each wrong member
with what was found, what is allowed and the closest valid spelling. A misspelt member is then used under its right
name, so that one typing error does not look like three.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Mapping
from functools import lru_cache
from typing import Any, TypeVar

import msgspec
import msgspec.inspect as mi

from blockgraph.errors import OptionError
from blockgraph.graph.problem import Problem
from blockgraph.graph.source import join

T = TypeVar("T", bound=msgspec.Struct)

_PLACE = re.compile(r" - at `(.*)`$", re.DOTALL)
_LONG = 40
#: A bound that only says "fits in 64 bits" is not worth telling.
_NO_LIMIT = (1 << 63) - 1


def convert(kind: type[T], value: Mapping[str, Any], path: str, owner: str) -> tuple[T | None, list[Problem]]:
    """The structure that the members describe, and every problem with them.

    Args:
        path: of the table, for messages.
        owner: what the members belong to: "driver 'qcow2'".
    Returns: the structure, made from the members that are right; None when a required one is not.
    """
    try:
        return msgspec.convert(value, kind), []
    except msgspec.ValidationError as error:
        problems: list[Problem] = []
        good = _struct(_info(kind), dict(value), path, owner, problems)
        try:
            return msgspec.convert(good, kind), problems or [_told_by_msgspec(error, path)]
        except msgspec.ValidationError as remaining:
            return None, problems or [_told_by_msgspec(remaining, path)]


def closest(name: str, names: Iterable[str]) -> str | None:
    """The valid name that `name` is most likely a misspelling of."""
    names = list(names)
    folded = {other.lower().replace("_", "-"): other for other in names}
    found = difflib.get_close_matches(name[:_LONG].lower().replace("_", "-"), folded, 1)
    return folded[found[0]] if found else None


def unknown_member(name: str, names: Iterable[str], path: str, owner: str, value: Any = None) -> Problem:
    """The problem of a member that does not exist."""
    names = sorted(names)
    head, dot, rest = name.partition(".")
    near = closest(head, names)
    if near is not None and dot:
        near += dot + rest
    return Problem(
        kind=OptionError,
        message=f"unknown member {quote(name)} of {owner}",
        path=join(path, name),
        value=value,
        allowed=tuple(names),
        closest=near,
    )


def respell(
    value: Mapping[str, Any], names: Iterable[str], path: str, owner: str, problems: list[Problem]
) -> tuple[dict[str, Any], dict[str, str]]:
    """Tell the members that do not exist, and use those that are clearly misspelt under their right names.

    Returns: the members that exist, and by their right names how they were written.
    """
    names = set(names)
    good = {name: item for name, item in value.items() if name in names}
    written = {name: name for name in good}
    for name, item in value.items():
        if name in names:
            continue
        problem = unknown_member(name, names, path, owner, item)
        problems.append(problem)
        if problem.closest in names and problem.closest not in good:
            good[problem.closest] = item
            written[problem.closest] = name
    return good, written


def quote(value: Any) -> str:
    """A value as messages show it: short."""
    if value is None:
        return "null"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, (dict, list)):
        return "a table" if isinstance(value, dict) else "a list"
    try:
        text = repr(value)
    except ValueError:  # an integer of thousands of digits
        text = "a huge number"
    return text if len(text) <= _LONG + 2 else text[:_LONG] + "..."


@lru_cache(maxsize=256)
def _info(kind: type[msgspec.Struct]) -> mi.StructType:
    info = mi.type_info(kind)
    assert isinstance(info, mi.StructType)
    return info


def members(kind: type[msgspec.Struct]) -> dict[str, mi.Field]:
    """The members of a structure by the names they have in a file."""
    return _members(kind)


@lru_cache(maxsize=256)
def _members(kind: type[msgspec.Struct]) -> dict[str, mi.Field]:
    return {field.encode_name: field for field in _info(kind).fields}


def _struct(
    info: mi.StructType, value: dict[str, Any], path: str, owner: str, problems: list[Problem]
) -> dict[str, Any]:
    """Check the members of a structure; returns those that are right, under their right names."""
    fields = {field.encode_name: field for field in info.fields}
    tag = {info.tag_field} if info.tag_field else set()
    value, written = respell(value, {*fields, *tag}, path, owner, problems)
    good: dict[str, Any] = {}
    for name, item in value.items():
        if name in tag:
            good[name] = item
            continue
        checked = _value(fields[name].type, item, join(path, written[name]), problems)
        if checked is not None or item is None:
            good[name] = checked
    for name, field in fields.items():
        if field.required and name not in good and name not in value:
            problems.append(
                Problem(
                    kind=OptionError,
                    message=f"member '{name}' of {owner} is missing",
                    path=join(path, name),
                    hint=f"'{name}' is {expected(field.type)}",
                )
            )
    return good


def _value(info: mi.Type, value: Any, path: str, problems: list[Problem]) -> Any:
    """Check a value; returns what of it can be used, None when nothing can."""
    options = _alternatives(info)
    if isinstance(value, dict):
        structs = [option for option in options if isinstance(option, mi.StructType)]
        if structs:
            return _table(structs, value, path, problems)
        if any(isinstance(option, (mi.DictType, mi.AnyType)) for option in options):
            return value
    elif isinstance(value, list):
        for option in options:
            item_type = getattr(option, "item_type", None)
            if item_type is not None:
                return _list(item_type, value, path, problems)
    elif any(_fits(option, value) for option in options):
        return value
    literals = _literals(options)
    near = closest(value, literals) if isinstance(value, str) else None
    problems.append(
        Problem(
            kind=OptionError,
            message=f"expected {expected(info)}, found {quote(value)}",
            path=path,
            value=value,
            allowed=tuple(literals),
            closest=near,
            hint=_kind_hint(options, value),
        )
    )
    return None


def _table(structs: list[mi.StructType], value: dict[str, Any], path: str, problems: list[Problem]) -> Any:
    chosen = structs[0]
    if chosen.tag_field is not None:
        tags = {str(struct.tag): struct for struct in structs}
        tag = value.get(chosen.tag_field)
        if not isinstance(tag, str) or tag not in tags:
            near = closest(tag, tags) if isinstance(tag, str) else None
            what = "is missing" if chosen.tag_field not in value else f"can not be {quote(tag)}"
            problems.append(
                Problem(
                    kind=OptionError,
                    message=f"member '{chosen.tag_field}' {what}",
                    path=join(path, chosen.tag_field),
                    value=tag,
                    allowed=tuple(tags),
                    closest=near,
                )
            )
            return None
        chosen = tags[tag]
    before = len(problems)
    good = _struct(chosen, value, path, f"'{path.rpartition('.')[2]}'", problems)
    try:
        msgspec.convert(good, chosen.cls)
    except msgspec.ValidationError as error:
        if len(problems) == before:
            problems.append(_told_by_msgspec(error, path))
        return None
    return good


def _list(item_type: mi.Type, value: list[Any], path: str, problems: list[Problem]) -> Any:
    before = len(problems)
    good = [_value(item_type, item, f"{path}[{index}]", problems) for index, item in enumerate(value)]
    return good if len(problems) == before else None


def _alternatives(info: mi.Type) -> tuple[mi.Type, ...]:
    if isinstance(info, mi.Metadata):
        return _alternatives(info.type)
    if isinstance(info, mi.UnionType):
        return tuple(inner for option in info.types for inner in _alternatives(option))
    return (info,)


def _fits(info: mi.Type, value: Any) -> bool:
    """Whether a scalar is of a scalar type."""
    match info:
        case mi.AnyType():
            return True
        case mi.NoneType():
            return value is None
        case mi.BoolType():
            return isinstance(value, bool)
        case mi.LiteralType(values):
            return not isinstance(value, bool) and value in values
        case mi.IntType():
            return isinstance(value, int) and not isinstance(value, bool) and _in_range(info, value)
        case mi.FloatType():
            return isinstance(value, (int, float)) and not isinstance(value, bool) and _in_range(info, value)
        case mi.StrType(least, most):
            return isinstance(value, str) and (least or 0) <= len(value) and (most is None or len(value) <= most)
    return False


def _in_range(info: mi.IntType | mi.FloatType, value: float) -> bool:
    return not (
        (info.ge is not None and value < info.ge)
        or (info.gt is not None and value <= info.gt)
        or (info.le is not None and value > info.le)
        or (info.lt is not None and value >= info.lt)
    )


def _literals(options: Iterable[mi.Type]) -> list[str]:
    return [str(value) for option in options if isinstance(option, mi.LiteralType) for value in option.values]


def _kind_hint(options: Iterable[mi.Type], value: Any) -> str | None:
    """What helps against the usual mix-ups of kinds."""
    options = list(options)
    if isinstance(value, str):
        if any(isinstance(option, mi.BoolType) for option in options):
            return "write true or false, without quotes" if value.lower() in ("true", "false") else None
        if any(isinstance(option, mi.IntType) for option in options) and value.lstrip("-").isdecimal():
            return "write the number without quotes"
    return None


def expected(info: mi.Type) -> str:
    """A type in words: "an integer from 1 to 64", "'on' or 'off'"."""
    options = _alternatives(info)
    if _is_reference(options):
        words = ["the name of a node", "a table that describes one"]
        words += ["null"] if any(isinstance(option, mi.NoneType) for option in options) else []
        return _or(words)
    words = []
    for option in options:
        match option:
            case mi.BoolType():
                words.append("true or false")
            case mi.LiteralType(values):
                words += [f"'{value}'" for value in values]
            case mi.IntType():
                words.append("an integer" + _range_words(option))
            case mi.FloatType():
                words.append("a number" + _range_words(option))
            case mi.StrType():
                words.append("a string")
            case mi.NoneType() if len(options) > 1:
                pass  # says no more than leaving the member out
            case mi.NoneType():
                words.append("null")
            case mi.StructType() | mi.DictType():
                words.append("a table")
            case _:
                words.append("a list" if hasattr(option, "item_type") else "a value")
    return _or(list(dict.fromkeys(words)))


def _is_reference(options: Iterable[mi.Type]) -> bool:
    kinds = {type(option) for option in options}
    return {mi.StrType, mi.DictType} <= kinds


def _or(words: list[str]) -> str:
    return words[0] if len(words) == 1 else f"{', '.join(words[:-1])} or {words[-1]}"


def _range_words(info: mi.IntType | mi.FloatType) -> str:
    low = info.ge if info.ge is not None else None if info.gt is None else info.gt + 1
    high = info.le if info.le is not None else None if info.lt is None else info.lt - 1
    if high is not None and high >= _NO_LIMIT:
        high = None
    if low is not None and high is not None:
        return f" from {low} to {high}"
    if low is not None:
        return f" of at least {low}"
    return f" of at most {high}" if high is not None else ""


def _told_by_msgspec(error: msgspec.ValidationError, path: str) -> Problem:
    """What only the structure itself knows (relations between members), in its words."""
    message = str(error)
    match = _PLACE.search(message)
    if match:
        message = message[: match.start()]
        path += match[1].removeprefix("$")
    return Problem(kind=OptionError, message=message, path=path.removeprefix("."))

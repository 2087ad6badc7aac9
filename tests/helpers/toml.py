# SPDX-FileCopyrightText: blockgraph contributors
# SPDX-License-Identifier: MIT
"""Writing graph descriptions in the three syntaxes, so that tests can compare what is read back."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import yaml


def toml_value(value: Any) -> str:
    """A value in one line; TOML has no null, so there must be none."""
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{json.dumps(key)} = {toml_value(item)}" for key, item in value.items()) + "}"
    if isinstance(value, list):
        return "[" + ", ".join(map(toml_value, value)) + "]"
    if isinstance(value, str):
        return json.dumps(value).replace("\x7f", "\\u007f")
    return str(value)


def to_toml(data: Mapping[str, Any]) -> str:
    """A description with arrays of tables as people write them."""
    out = []
    for section, value in data.items():
        if not isinstance(value, (list, dict)) or (isinstance(value, list) and not _tables(value)):
            out.append(f"{json.dumps(section)} = {toml_value(value)}")
    for section, value in data.items():
        for table in value if isinstance(value, list) and _tables(value) else []:
            out.append(f"\n[[{json.dumps(section)}]]")
            out += [f"{json.dumps(key)} = {toml_value(item)}" for key, item in table.items()]
        if isinstance(value, dict):
            out.append(f"\n[{json.dumps(section)}]")
            out += [f"{json.dumps(key)} = {toml_value(item)}" for key, item in value.items()]
    return "\n".join(out) + "\n"


def _tables(value: list[Any]) -> bool:
    return bool(value) and all(isinstance(item, dict) for item in value)


def all_syntaxes(data: Mapping[str, Any]) -> dict[str, bytes]:
    """The description as TOML, JSON and YAML."""
    return {
        "toml": to_toml(data).encode(),
        "json": json.dumps(data, indent=2).encode(),
        "yaml": yaml.safe_dump(data, sort_keys=False).encode(),
    }

# SPDX-FileCopyrightText: blockgraph contributors
# SPDX-License-Identifier: MIT
"""JSON Schema of graph files, so that editors complete and check them while they are written.

Made from the same structures that check a file at run time, for every driver that is registered here. TOML and YAML
files follow it too: editors apply JSON Schemas to them. It knows members, types and values; what belongs to the whole
graph (references, cycles, permissions, sizes) only `blockgraph check` knows.
"""

from __future__ import annotations

import json
import logging
import sys
from typing import Any

import msgspec
import msgspec.inspect

from blockgraph.driver import Driver
from blockgraph.exports.options import NbdServerOptions
from blockgraph.graph.bitmaps import BitmapOptions
from blockgraph.graph.checkpoints import CheckpointOptions
from blockgraph.graph.description import EXPORTS, JOBS
from blockgraph.graph.memberdocs import member_docs, summary
from blockgraph.graph.validate import NODE_NAME
from blockgraph.registry import driver_names, get_driver

log = logging.getLogger(__name__)

_REF = "#/$defs/{name}"
_NODE = {"$ref": "#/$defs/node"}
_CHILD = {"$ref": "#/$defs/child"}


def graph_schema() -> dict[str, Any]:
    """The schema, draft 2020-12."""
    drivers = _drivers()
    roots: list[type[msgspec.Struct]] = [BitmapOptions, CheckpointOptions, *EXPORTS.values(), *JOBS.values()]
    roots.append(NbdServerOptions)
    kinds = [*roots, *{driver.Options: None for driver in drivers}]
    _, components = msgspec.json.schema_components(kinds, ref_template=_REF)
    names = {kind: _component(kind, components) for kind in kinds}
    for kind in _structures(kinds):
        if kind not in {driver.Options for driver in drivers}:
            _describe(components[_component(kind, components)], kind)
    defs: dict[str, Any] = {
        "node": _node(drivers),
        "child": {
            "description": "The name of a node, or a description of one.",
            "anyOf": [{"type": "string", "minLength": 1}, _NODE],
        },
    }
    defs |= {f"driver-{driver.name}": _driver(driver, components[names[driver.Options]]) for driver in drivers}
    used = {names[driver.Options] for driver in drivers}
    defs |= {name: schema for name, schema in components.items() if name not in used}
    for kind in JOBS.values():
        defs[names[kind]]["properties"]["target"] = {
            **_CHILD,
            "description": defs[names[kind]]["properties"]["target"].get("description", ""),
        }
    checkpoint = defs[names[CheckpointOptions]]["properties"]
    for member in ("backup", "view"):
        checkpoint[member]["additionalProperties"] = _CHILD
    schema = {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": "blockgraph graph file",
        "description": "Virtual disks as a graph of nodes, and what is done with them.",
        "type": "object",
        "additionalProperties": False,
        "properties": {
            "$schema": {"type": "string", "description": "For editors."},
            "nodes": {"type": "array", "items": _NODE, "description": "The nodes of the graph."},
            "bitmaps": _typed_list("Dirty bitmaps that nodes have from the start.", [names[BitmapOptions]]),
            "checkpoints": _typed_list("Checkpoints that are taken at the start.", [names[CheckpointOptions]]),
            "exports": _typed_list("What is served, and how.", [names[kind] for kind in EXPORTS.values()]),
            "jobs": _typed_list("What is done with the disks.", [names[kind] for kind in JOBS.values()]),
            "nbd-server": {"$ref": _REF.format(name=names[NbdServerOptions])},
        },
        "$defs": defs,
    }
    plain: dict[str, Any] = json.loads(json.dumps(schema))  # defaults may be tuples
    return plain


def _drivers() -> list[type[Driver]]:
    found: dict[type[Driver], None] = {}
    for name in driver_names():
        try:
            found[get_driver(name)] = None
        except (ImportError, AttributeError) as error:  # of a third party: the others can still be described
            log.warning("driver '%s' can not be loaded and is left out: %s", name, error)
    return sorted(found, key=lambda driver: driver.name)


def _node(drivers: list[type[Driver]]) -> dict[str, Any]:
    names = {driver: sorted({driver.name, *driver.aliases} | _other_names(driver)) for driver in drivers}
    return {
        "type": "object",
        "description": "A node: a driver and its options.",
        "required": ["driver"],
        "properties": {"driver": {"enum": sorted(name for listed in names.values() for name in listed)}},
        "allOf": [
            {
                "if": {"properties": {"driver": {"enum": listed}}, "required": ["driver"]},
                "then": {"$ref": f"#/$defs/driver-{driver.name}"},
            }
            for driver, listed in names.items()
        ],
    }


def _other_names(driver: type[Driver]) -> set[str]:
    """Names under which the registry has a driver besides its own."""
    names = set()
    for name in driver_names():
        try:
            if get_driver(name) is driver:
                names.add(name)
        except (ImportError, AttributeError):
            continue
    return names


def _driver(driver: type[Driver], component: dict[str, Any]) -> dict[str, Any]:
    """The members of a node of one driver."""
    properties = {name: dict(schema) for name, schema in component["properties"].items()}
    docs = member_docs(driver.Options, (driver.__module__, driver.Options.__module__))
    properties["driver"] = {"description": docs.get("driver", "")}
    if "node-name" in properties:
        properties["node-name"] = {"type": "string", "pattern": f"^(?:{NODE_NAME.pattern})$"}
    required = [name for name in component.get("required", []) if name != "driver"]
    for child, spec in driver.children.items():
        null = [] if spec.required else [{"type": "null"}, {"const": "", "description": "As null, which TOML has not."}]
        properties[child] = {"anyOf": [_CHILD, *null]} if null else dict(_CHILD)
        if spec.required and child not in required:
            required.append(child)
    for name, schema in properties.items():
        if docs.get(name):
            schema["description"] = docs[name]
    tables = [name for name, schema in properties.items() if name in driver.children or _has_members(schema)]
    out: dict[str, Any] = {
        "type": "object",
        "title": driver.name,
        "description": summary(_manual(driver)),
        "properties": properties,
        "required": ["driver"],
        "additionalProperties": False,
        # QEMU's dotted form, {"file.driver": "file"}: its members are checked only when the file is loaded.
        "patternProperties": {f"^{name}\\.": True for name in tables},
    }
    needs = [
        {"anyOf": [{"required": [name]}, {"required": [f"{name}.driver"]}]}
        if name in driver.children
        else {"required": [name]}
        for name in required
    ]
    return {**out, "allOf": needs} if needs else out


def _has_members(schema: dict[str, Any]) -> bool:
    options = [schema, *schema.get("anyOf", ())]
    return any("$ref" in option or option.get("type") == "array" for option in options)


def _manual(driver: type[Driver]) -> str | None:
    return sys.modules[driver.__module__].__doc__ or driver.__doc__


def _typed_list(text: str, names: list[str]) -> dict[str, Any]:
    refs = [{"$ref": _REF.format(name=name)} for name in names]
    return {"type": "array", "description": text, "items": refs[0] if len(refs) == 1 else {"oneOf": refs}}


def _component(kind: type[msgspec.Struct], components: dict[str, Any]) -> str:
    """The name under which msgspec has put a structure: its own, with the module where that is not enough."""
    qualified = f"{kind.__module__}.{kind.__qualname__}".replace(".", "_")
    return next(name for name in (kind.__name__, qualified) if name in components)


def _describe(schema: dict[str, Any], kind: type[msgspec.Struct]) -> None:
    schema["description"] = summary(kind.__doc__)
    for name, text in member_docs(kind).items():
        schema["properties"][name]["description"] = text
    if kind.__struct_config__.tag_field is not None:
        schema["properties"][kind.__struct_config__.tag_field]["description"] = "of what kind it is."


def _structures(kinds: list[type[msgspec.Struct]]) -> list[type[msgspec.Struct]]:
    """These and every structure inside them."""
    found: dict[type[msgspec.Struct], None] = {}
    todo: list[Any] = list(msgspec.inspect.multi_type_info(kinds))
    for info in todo:  # grows
        if isinstance(info, msgspec.inspect.StructType):
            if info.cls in found:
                continue
            found[info.cls] = None
            todo += [field.type for field in info.fields]
        todo += getattr(info, "types", ())
        if hasattr(info, "item_type"):
            todo.append(info.item_type)
    return list(found)

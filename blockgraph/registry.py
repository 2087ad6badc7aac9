# SPDX-FileCopyrightText: blockgraph contributors
# SPDX-License-Identifier: MIT
"""Drivers by name: the built-in ones, and those of the entry-point group `blockgraph.drivers`.

Built-in modules are imported when a driver is first asked for, so that a program pays for what it uses.
"""

from __future__ import annotations

import difflib
import importlib
from importlib.metadata import entry_points

from blockgraph.driver import Driver
from blockgraph.errors import OptionError

#: name or alias -> "module:class" below blockgraph
_BUILTIN = {
    "file": "protocols.file:File",
    "host_device": "protocols.host_device:HostDevice",
    "null-co": "protocols.null:Null",
    "null-aio": "protocols.null:Null",
    "memory": "protocols.memory:Memory",
    "pattern": "protocols.pattern:Pattern",
    "sparse-random": "protocols.sparse_random:SparseRandom",
    "raw": "formats.raw:Raw",
    "qcow2": "formats.qcow2:Qcow2",
    "patch": "formats.patch:Patch",
    "backup-top": "filters.backup_top:BackupTop",
    "copy-before-write": "filters.backup_top:BackupTop",
    "snapshot-access": "filters.snapshot_access:SnapshotAccess",
    "inject-error": "filters.inject_error:InjectError",
    "blkdebug": "filters.inject_error:InjectError",
    "log-writes": "filters.log_writes:LogWrites",
    "blklogwrites": "filters.log_writes:LogWrites",
    "delay": "filters.delay:Delay",
    "verify": "filters.verify:Verify",
    "blkverify": "filters.verify:Verify",
}

_loaded: dict[str, type[Driver]] = {}
_external: dict[str, str] | None = None


def driver_names() -> list[str]:
    """Every name and alias that a description may use, sorted."""
    return sorted({*_BUILTIN, *_third_party(), *_loaded})


def get_driver(name: str) -> type[Driver]:
    """The driver class of that name or alias.

    Raises:
        OptionError: no such driver; names the closest one.
    """
    driver = _loaded.get(name)
    if driver is not None:
        return driver
    target = _BUILTIN.get(name)
    target = f"blockgraph.{target}" if target else _third_party().get(name)
    if target is None:
        closest = difflib.get_close_matches(name, driver_names(), 1)
        raise OptionError(
            f"unknown driver '{name}'",
            path="driver",
            value=name,
            closest=closest[0] if closest else None,
            hint=None if closest else f"drivers: {', '.join(driver_names())}",
        )
    module, _, attribute = target.partition(":")
    driver = getattr(importlib.import_module(module), attribute)
    assert isinstance(driver, type)
    assert issubclass(driver, Driver)
    _loaded[name] = driver
    return driver


def register(driver: type[Driver]) -> None:
    """Make a driver available in this process under its name and aliases (tests, embedding programs)."""
    for name in (driver.name, *driver.aliases):
        _loaded[name] = driver


def _third_party() -> dict[str, str]:
    global _external  # noqa: PLW0603 (read once, kept for the process)
    if _external is None:
        _external = {entry.name: entry.value for entry in entry_points(group="blockgraph.drivers")}
    return _external

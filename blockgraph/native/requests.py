# SPDX-FileCopyrightText: blockgraph contributors
# SPDX-License-Identifier: MIT
"""Requests of an extent map in one call each, without cffi (native/python/requests.c)."""

from __future__ import annotations

from importlib.machinery import ExtensionFileLoader
from importlib.util import module_from_spec, spec_from_loader
from typing import TYPE_CHECKING, Any, Protocol

from blockgraph import _native
from blockgraph._native import ffi

if TYPE_CHECKING:
    from typing_extensions import Buffer


class Requests(Protocol):
    """Native requests of one map. They return 0, lib.BG_MAP_MISS, or -errno, and do not hold the GIL meanwhile.

    Raises:
        TypeError, BufferError: the offset is no integer, or the buffer none, not contiguous, or not writable.
    """

    def pread(self, offset: int, length: int, /) -> bytes | int:
        """The `length` bytes from `offset` on, or the code. `length` is within what memory there is."""

    def pread_into(self, offset: int, buf: Buffer, /) -> int:
        """Fill `buf` from `offset` on."""

    def pwrite(self, offset: int, buf: Buffer, /) -> int:
        """Write `buf` at `offset`."""


def _load() -> Any:
    """The second module in the file of the first."""
    loader = ExtensionFileLoader("blockgraph._requests", _native.__file__)
    spec = spec_from_loader(loader.name, loader)
    assert spec is not None
    module = module_from_spec(spec)
    loader.exec_module(module)
    return module


_new = _load().Requests


def requests_of(native: Any) -> Requests:
    """Those of a `bg_map *` that `native` keeps as long as it lives; so do they."""
    requests: Requests = _new(int(ffi.cast("uintptr_t", native)), native)
    return requests

# SPDX-FileCopyrightText: blockgraph contributors
# SPDX-License-Identifier: MIT
"""Files in memory, mapped (native/windows.h): what is sent to a client from there is copied once."""

from __future__ import annotations

import errno
from typing import Any

from blockgraph._native import ffi, lib
from blockgraph.native.check import check


class Windows:
    """The mapping of a file; native code only looks into it, with the file's descriptor.

    Attributes:
        native: the `bg_windows *`.
    """

    def __init__(self, native: Any) -> None:
        self.native = native

    @classmethod
    def of(cls, fd: int) -> Windows | None:
        """The windows of a file that is open for reading; None when it does not live in memory (tmpfs)."""
        out = ffi.new("bg_windows **")
        code = lib.bg_windows_new(fd, out)
        if code == -errno.ENOTSUP:
            return None
        check(code)
        return cls(ffi.gc(out[0], lib.bg_windows_free))

    def release(self) -> None:
        """Unmap: takes some milliseconds for each GiB that was looked at. No request uses it any more."""
        ffi.release(self.native)

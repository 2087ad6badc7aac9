# SPDX-FileCopyrightText: blockgraph contributors
# SPDX-License-Identifier: MIT
"""Files in memory, mapped (native/windows.h): what is sent from there is copied once, and reading and writing take less
time than by system calls. For that the process gets a handler of SIGBUS (native/guard.h), which leaves what is not its
own to the one before."""

from __future__ import annotations

import errno
from typing import Any

from blockgraph._native import ffi, lib
from blockgraph.native.check import check


class Windows:
    """The mapping of a file, for native code that has the file's descriptor, too.

    Attributes:
        native: the `bg_windows *`.
        writable: native code may write there.
    """

    def __init__(self, native: Any) -> None:
        self.native = native
        self.writable = bool(lib.bg_windows_writable(native))

    @classmethod
    def of(cls, fd: int) -> Windows | None:
        """The windows of a file that is open for reading, or for both; None when it does not live in memory (tmpfs)."""
        out = ffi.new("bg_windows **")
        code = lib.bg_windows_new(fd, out)
        if code == -errno.ENOTSUP:
            return None
        check(code)
        return cls(ffi.gc(out[0], lib.bg_windows_free))

    def touch(self) -> None:
        """Let the file's times tell of what has been written so far."""
        lib.bg_windows_touch(self.native)

    def release(self) -> None:
        """Unmap: takes some milliseconds for each GiB that was looked at. No request uses it any more."""
        ffi.release(self.native)

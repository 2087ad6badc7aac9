# SPDX-FileCopyrightText: blockgraph contributors
# SPDX-License-Identifier: MIT
"""What the C functions return, as exceptions."""

from __future__ import annotations

import os


def check(code: int) -> int:
    """Return `code`, or raise OSError (or its subclass for that errno) when it is a negative errno."""
    if code < 0:
        raise OSError(-code, os.strerror(-code))
    return code

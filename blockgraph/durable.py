# SPDX-FileCopyrightText: blockgraph contributors
# SPDX-License-Identifier: MIT
"""Names that survive a power failure: a file that was flushed may still be in no directory."""

from __future__ import annotations

import os


def sync_directory(path: str) -> None:
    """Make the names in a directory ("": the current one) durable. Raises OSError."""
    fd = os.open(path or ".", os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def make_directory(path: str) -> None:
    """Make a directory, and those above it, where they are missing, durably. Raises OSError."""
    if os.path.isdir(path):
        return
    above = os.path.dirname(os.path.abspath(path))
    make_directory(above)
    os.makedirs(path, exist_ok=True)
    sync_directory(above)

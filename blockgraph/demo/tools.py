# SPDX-FileCopyrightText: blockgraph contributors
# SPDX-License-Identifier: MIT
"""External programs, ended with us."""

from __future__ import annotations

import asyncio
import os
import shutil


def find_tool(name: str) -> str | None:
    """Path of a program; those of e2fsprogs are often outside a user's PATH."""
    return shutil.which(name, path=os.environ.get("PATH", os.defpath) + ":/usr/sbin:/sbin")


async def run_tool(command: list[str]) -> tuple[int, str]:
    """Run a program to its end; its exit status, and what it printed.

    Cancelled: the program is killed.
    """
    process = await asyncio.create_subprocess_exec(
        *command,
        stdin=asyncio.subprocess.DEVNULL,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.STDOUT,
        start_new_session=True,
    )
    try:
        output, _ = await process.communicate()
    except asyncio.CancelledError:
        process.kill()
        await process.wait()
        raise
    assert process.returncode is not None
    return process.returncode, output.decode(errors="replace")

# SPDX-FileCopyrightText: blockgraph contributors
# SPDX-License-Identifier: MIT
"""`python backup_on_demand.py GRAPH DEVICE TARGET`: serve a graph file; back up at each line of standard input.

Prints "ready", then after every backup the seconds it took. Ends with its input.
"""

from __future__ import annotations

import asyncio
import sys
import time

from blockgraph.graph.load import load
from blockgraph.jobs.options import BackupOptions
from blockgraph.session import Session


async def main(graph: str, device: str, target: str) -> None:
    """See the module's text."""
    async with await Session.start(load(graph)) as session:
        print("ready", flush=True)
        while await asyncio.to_thread(sys.stdin.readline):
            start = time.perf_counter()
            job = await session.manager.backup(BackupOptions(device=device, target=target, sync="full"))
            await job.wait()
            if job.error is not None:
                raise job.error
            print(time.perf_counter() - start, flush=True)


if __name__ == "__main__":
    asyncio.run(main(*sys.argv[1:]))

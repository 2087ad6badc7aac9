# SPDX-FileCopyrightText: blockgraph contributors
# SPDX-License-Identifier: MIT
"""An NBD client that discards or zeroes every block of a disk once, at random, 16 requests in flight: libnbd's Python
module, which fio's engine has no zeroes beside.

    zero_client.py URI trim|zero|allocate BLOCK SIZE        prints requests per second

It is run by the system's Python, which has the module.
"""

from __future__ import annotations

import importlib
import random
import sys
import time
from typing import Any

DEPTH = 16


def main(uri: str, what: str, block: int, size: int) -> float:
    """Requests per second."""
    nbd: Any = importlib.import_module("nbd")
    client = nbd.NBD()
    client.connect_uri(uri)
    begin = client.aio_trim if what == "trim" else client.aio_zero
    flags = nbd.CMD_FLAG_NO_HOLE if what == "allocate" else 0
    offsets = list(range(0, size, block))
    random.Random(3).shuffle(offsets)
    waiting: set[int] = set()
    start = time.perf_counter()
    left = iter(offsets)
    more = True
    while more or waiting:
        while more and len(waiting) < DEPTH:
            offset = next(left, None)
            more = offset is not None
            if offset is not None:
                waiting.add(begin(block, offset, flags=flags))
        client.poll(-1)
        for cookie in list(waiting):
            if client.aio_command_completed(cookie):
                waiting.remove(cookie)
    return len(offsets) / (time.perf_counter() - start)


if __name__ == "__main__":
    print(main(sys.argv[1], sys.argv[2], int(sys.argv[3]), int(sys.argv[4])))

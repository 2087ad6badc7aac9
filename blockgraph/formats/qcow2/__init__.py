# SPDX-FileCopyrightText: blockgraph contributors
# SPDX-License-Identifier: MIT
"""The qcow2 format: the driver (see `driver`) and the creation of images.

```
driver ─┬─ zeroes, resize, allocation ── mapping ── refcount ─┬─ reclaim, overlaps
        ├─ compressed                                         └─ tables
        └─ writeback: the order in which all of it reaches the disk        header, image: below everything
```
"""

from blockgraph.formats.qcow2.create import create_image
from blockgraph.formats.qcow2.driver import Qcow2

__all__ = ["Qcow2", "create_image"]

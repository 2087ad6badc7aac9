# SPDX-FileCopyrightText: blockgraph contributors
# SPDX-License-Identifier: MIT
"""Named points in the work of drivers, where a test may fail or hold a request.

A format tells its child what it is about to do; an `inject-error` node below acts on it, anybody else ignores it:

```
await self.file.event("l2_update")        # then write the L2 entry
```

Nothing listens in production: an event then costs a call and one boolean test. On the hottest paths, test `enabled`
first and save the call.

The names are those of QEMU's BlkdebugEvent, so that its rules mean the same here, and a few of our own (OWN_EVENTS).
"""

from __future__ import annotations

#: True while an inject-error node is open; the data path tests this and nothing else.
enabled = False

#: Points of a format's work, told to its child that holds the metadata before the step that the name describes.
FORMAT_EVENTS = frozenset(
    {
        "l1_update",
        "l1_grow_alloc_table",
        "l1_grow_write_table",
        "l1_grow_activate_table",
        "l1_shrink_write_table",
        "l1_shrink_free_l2_clusters",
        "l2_load",
        "l2_update",
        "l2_update_compressed",
        "l2_alloc_cow_read",
        "l2_alloc_write",
        "read_aio",
        "read_backing_aio",
        "read_compressed",
        "write_aio",
        "write_compressed",
        "vmstate_load",
        "vmstate_save",
        "cow_read",
        "cow_write",
        "cor_write",
        "reftable_load",
        "reftable_grow",
        "reftable_update",
        "refblock_load",
        "refblock_update",
        "refblock_update_part",
        "refblock_alloc",
        "refblock_alloc_hookup",
        "refblock_alloc_write",
        "refblock_alloc_write_blocks",
        "refblock_alloc_write_table",
        "refblock_alloc_switch_table",
        "cluster_alloc",
        "cluster_alloc_bytes",
        "cluster_alloc_space",
        "cluster_free",
        "empty_image_prepare",
        "flush_to_os",
    }
)

#: Points of a request at the inject-error node itself; "none" happens once, when the node is opened.
IO_EVENTS = frozenset(
    {
        "none",
        "pwritev",
        "pwritev_done",
        "pwritev_zero",
        "pwritev_rmw_head",
        "pwritev_rmw_after_head",
        "pwritev_rmw_tail",
        "pwritev_rmw_after_tail",
        "flush_to_disk",
    }
)

#: Points of a request at the inject-error node for which QEMU has no name. "*_done": it was done below, and has not
#: completed yet.
OWN_EVENTS = frozenset(
    {
        "preadv",
        "preadv_done",
        "pwritev_zero_done",
        "discard",
        "discard_done",
        "flush_done",
        "block_status",
        "truncate",
    }
)

#: Every name a rule may use. Drivers of third parties add theirs with `declare`.
_events: set[str] = {*FORMAT_EVENTS, *IO_EVENTS, *OWN_EVENTS}
_listeners = 0


def events() -> frozenset[str]:
    """Every event name known."""
    return frozenset(_events)


def declare(*names: str) -> None:
    """Make event names known, so that rules may use them."""
    _events.update(names)


def listen() -> None:
    """Events are wanted from now on; nests. Pair with `unlisten`."""
    global enabled, _listeners  # noqa: PLW0603 - one attribute test for the data path
    _listeners += 1
    enabled = True


def unlisten() -> None:
    """Undo one `listen`."""
    global enabled, _listeners  # noqa: PLW0603 - one attribute test for the data path
    _listeners -= 1
    enabled = _listeners > 0

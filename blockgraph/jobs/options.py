# SPDX-FileCopyrightText: blockgraph contributors
# SPDX-License-Identifier: MIT
"""What a graph file may say about jobs: section `jobs`. Names follow QEMU's BlockdevBackup."""

from __future__ import annotations

from typing import Annotated, Literal

import msgspec

from blockgraph.options import NodeRef

#: What to do when a job's own I/O fails.
OnError = Literal["report", "ignore", "stop", "enospc"]


class BackupOptions(
    msgspec.Struct,
    kw_only=True,
    rename="kebab",
    forbid_unknown_fields=True,
    frozen=True,
    tag_field="type",
    tag="backup",
):
    """Copy a disk as it is when the job starts, while it is being written.

    Attributes:
        job_id: unique among jobs; the device's name when omitted.
        device: name of the node to back up. A backup-top node: its target is completed, `target` is omitted.
        target: name of the node to copy to, or a description of it; same size as the device.
        mode: "existing": the target is there. "create": make the image that `target` describes (raw or qcow2 over a
            file that does not exist yet), of the device's size.
        sync: "full" copies everything, "top" what the top layer has allocated, "none" only what the guest overwrites
            (until the job is cancelled).
        speed: bytes per second, 0: as fast as it goes. What guest writes copy is not slowed down.
        on_source_error, on_target_error: "report" fails the job, "ignore" tries again later, "stop" pauses the job
            until it is resumed, "enospc" stops when the target is full and reports everything else.
        on_cbw_error, cbw_timeout, min_cluster_size: of the backup-top that the job inserts; see that driver.
        filter_node_name: name for that backup-top.
        max_workers: copies in flight.
        max_chunk: bytes copied at a time; 0: the job chooses.
        auto_finalize: conclude without waiting for `finalize`.
        auto_dismiss: forget the job when it has concluded.
    """

    job_id: str | None = None
    device: str
    target: NodeRef | None = None
    mode: Literal["existing", "create"] = "existing"
    sync: Literal["full", "top", "none"]
    speed: Annotated[int, msgspec.Meta(ge=0)] = 0
    on_source_error: OnError = "report"
    on_target_error: OnError = "report"
    on_cbw_error: Literal["break-guest-write", "break-snapshot"] = "break-guest-write"
    cbw_timeout: Annotated[int, msgspec.Meta(ge=0)] = 0
    min_cluster_size: int | None = None
    filter_node_name: str | None = None
    max_workers: Annotated[int, msgspec.Meta(ge=1, le=64)] = 4
    max_chunk: Annotated[int, msgspec.Meta(ge=0)] = 0
    auto_finalize: bool = True
    auto_dismiss: bool = True

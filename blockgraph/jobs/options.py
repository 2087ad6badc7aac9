# SPDX-FileCopyrightText: blockgraph contributors
# SPDX-License-Identifier: MIT
"""What a graph file may say about jobs: section `jobs`. Names follow QEMU's BlockdevBackup."""

from __future__ import annotations

from typing import Annotated, Literal

import msgspec

from blockgraph.options import BitmapRef, NodeRef

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

    With a dirty bitmap (`sync`, `bitmap-mode`, `bitmap-use`; what it marks is what it marks when the job starts):

        full, top, no bitmap           everything; everything that the top layer has
        full, top, use "reset"         the same. What the bitmap marks at the end is what its mode says: this begins a
                                       chain of incremental backups. Mode "never" is refused, it would have no effect
        full, top, use "reduce"        of that, only what the bitmap marks; any mode
        none                           only what the guest overwrites
        none and a bitmap              of that, only what the bitmap marks. Modes "never" (the default) and "always":
                                       such a job never succeeds, it is cancelled
        bitmap                         what the bitmap marks; any mode
        incremental                    bitmap, with mode "on-success"
        differential                   bitmap, with mode "never"

        mode              bitmap after success         bitmap after failure, and after being cancelled
        on-success        what was written since       old marks, and what was written since
        never             old marks, and what was written since
        always            what was written since       what was not copied, and what was written since

    "Since" is since the start. Clusters of a target without a backing node are written whole, where they are larger
    than a bitmap's granules. Several jobs may use one bitmap at a time: it is cleared when the last of them that clears
    has ended, and then has what was written since the earliest start among those that succeeded.

    Attributes:
        job_id: unique among jobs; the device's name when omitted.
        device: name of the node to back up. A backup-top node: its target is completed, `target` is omitted.
        target: name of the node to copy to, or a description of it; same size as the device.
        mode: "existing": the target is there. "create": make the image that `target` describes (raw or qcow2 over a
            file that does not exist yet), of the device's size. A qcow2 image names its backing file, that of the
            target's `backing`; where that is left out, with sync "top" the device's.
        sync: "full" copies everything, "top" what the top layer has allocated, "none" only what the guest overwrites
            (until the job is cancelled), "bitmap", "incremental" and "differential" what `bitmap` marks; see above.
        bitmap: name of a dirty bitmap of the device (or of the nodes below it, when it is a filter), or {node, name}
            of a bitmap of a node of the same size.
        bitmap_mode: "on-success", "never" or "always"; see above. Required with sync "full", "top" and "bitmap".
        bitmap_use: with sync "full" or "top": "reset" (default, as in QEMU) copies what the bitmap does not mark, too;
            "reduce" does not.
        chain: directory of a chain of backups (blockgraph.chains), made if need be. The job makes the next one there:
            sync "full", "incremental" (what changed since the newest backup) or "differential" (since the newest that
            is not differential). It keeps bitmaps of its own, so `target`, `mode` and the `bitmap` members are left
            out. Where the bitmap of the changes is missing or can not be trusted, it makes a full backup and says why.
        chain_format: of the images there: "qcow2", each over the one before (default), or "raw": raw, then patches.
        group: jobs that name the same group start in one transaction, at one instant, or not at all.
        completion_mode: of the jobs of a group: "individual" (default): each ends for itself. "grouped": all succeed
            or none does. The first failure cancels the others; none clears its bitmap "on-success" unless all
            succeed; one with auto-finalize=false holds all; finalizing one finalizes all.
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
    sync: Literal["full", "top", "none", "bitmap", "incremental", "differential"]
    bitmap: str | BitmapRef | None = None
    bitmap_mode: Literal["on-success", "never", "always"] | None = None
    bitmap_use: Literal["reset", "reduce"] | None = None
    chain: str | None = None
    chain_format: Literal["qcow2", "raw"] = "qcow2"
    group: str | None = None
    completion_mode: Literal["individual", "grouped"] = "individual"
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

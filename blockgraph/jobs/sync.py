# SPDX-FileCopyrightText: blockgraph contributors
# SPDX-License-Identifier: MIT
"""What the members `sync`, `bitmap`, `bitmap-mode` and `bitmap-use` of a backup mean together; see BackupOptions."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal, NamedTuple

from blockgraph.errors import OptionError
from blockgraph.options import BitmapRef

if TYPE_CHECKING:
    from blockgraph.jobs.options import BackupOptions

#: Modes of syncs that stand for `bitmap` with a mode.
_IMPLIED = {"incremental": "on-success", "differential": "never"}

_MODES = (
    "'on-success': afterwards the bitmap has what changes from the start of this backup on; 'never': it stays as it "
    "is; 'always': also after a failure, it then keeps what was not copied"
)

LATE_BITMAP = (
    "a bitmap can not be used with a device that is a backup-top already: its point in time is over, and the bitmap "
    "has changes that came later"
)
LATE_BITMAP_HINT = "give the node below as 'device', or insert the backup-top with a 'bitmap' of its own"


class BitmapUse(NamedTuple):
    """How a backup uses a bitmap.

    Attributes:
        node: name of the node that the bitmap belongs to; None: the device, or the first node below its filters.
        name: of the bitmap.
        mode: what becomes of it at the end; see blockgraph.bitmaps.
        reduces: only what it marks is copied.
    """

    node: str | None
    name: str
    mode: Literal["on-success", "never", "always"]
    reduces: bool


def bitmap_use(options: BackupOptions) -> BitmapUse | None:
    """How the backup uses a bitmap; None: it uses none.

    Raises:
        OptionError: the members do not go together; its path is the member at fault.
    """
    if options.bitmap is None:
        _check_none(options)
        return None
    mode = _mode(options)
    reduces = _reduces(options)
    if not reduces and mode == "never":
        raise OptionError(
            f"sync '{options.sync}' copies whatever the bitmap marks, and bitmap-mode 'never' leaves the bitmap alone: "
            "it would have no effect",
            path="bitmap-mode",
            value=mode,
            hint="use 'on-success' or 'always', or copy only what it marks with bitmap-use 'reduce'",
        )
    if isinstance(options.bitmap, BitmapRef):
        return BitmapUse(options.bitmap.node, options.bitmap.name, mode, reduces)
    return BitmapUse(None, options.bitmap, mode, reduces)


def _check_none(options: BackupOptions) -> None:
    if options.sync in ("bitmap", "incremental", "differential"):
        raise OptionError(
            f"sync '{options.sync}' copies what a bitmap marks, and member 'bitmap' is missing",
            path="bitmap",
            hint="name a dirty bitmap of the device; without one, make a full backup",
        )
    for member, value in (("bitmap-mode", options.bitmap_mode), ("bitmap-use", options.bitmap_use)):
        if value is not None:
            raise OptionError("has no effect without member 'bitmap'", path=member, value=value)


def _mode(options: BackupOptions) -> Literal["on-success", "never", "always"]:
    sync, mode = options.sync, options.bitmap_mode
    if sync == "incremental" or sync == "differential":
        implied = _IMPLIED[sync]
        if mode is not None and mode != implied:
            raise OptionError(
                f"sync '{sync}' is sync 'bitmap' with bitmap-mode '{implied}'",
                path="bitmap-mode",
                value=mode,
                hint=f"leave 'bitmap-mode' out, or use sync 'bitmap' with '{mode}'",
            )
        return "on-success" if sync == "incremental" else "never"
    if sync == "none":
        if mode == "on-success":
            raise OptionError(
                "sync 'none' ends by being cancelled, which is no success: the bitmap would never be cleared",
                path="bitmap-mode",
                value=mode,
                hint="use 'never', or 'always' to keep only what was not copied",
            )
        return mode or "never"
    if mode is None:
        raise OptionError(
            f"sync '{sync}' with a bitmap needs member 'bitmap-mode'", path="bitmap-mode", hint=f"{_MODES}"
        )
    return mode


def _reduces(options: BackupOptions) -> bool:
    """QEMU's full and top copy everything, whatever the bitmap says: so do these, unless told otherwise."""
    if options.sync in ("full", "top"):
        return options.bitmap_use == "reduce"
    if options.bitmap_use == "reset":
        raise OptionError(
            f"sync '{options.sync}' copies no more than what the bitmap marks",
            path="bitmap-use",
            value=options.bitmap_use,
            hint="leave it out, or use sync 'full' or 'top'",
        )
    return True

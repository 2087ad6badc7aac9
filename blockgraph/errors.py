# SPDX-FileCopyrightText: blockgraph contributors
# SPDX-License-Identifier: MIT
"""Every error blockgraph raises, in one tree.

```
BlockGraphError            .node .file .op .offset .length .errno .hint; the text is derived from the fields
 +- GraphError             control path; the graph is unchanged
 |   +- PermissionConflict (names both edges)  RoleError  CycleError  NodeInUse
 +- OptionError            .path "nodes[2].file.filename", .value, .closest
 +- IOFailure              data path; errno always set
 |   +- NoSpace  ReadOnly  OutOfRange  Unsupported  CorruptImage  SnapshotBroken
 +- WireError              the peer broke the protocol: that connection dies, nothing else
 +- JobError               wrong verb for the state, or the cause
```

A user sees `str(error)`: one or two lines saying what failed, on which node, and what to do. A bug is an
assert, never one of these.
"""

from __future__ import annotations

import errno as _errno
import os


class BlockGraphError(Exception):
    """Base of all.

    Args:
        reason: what is wrong, one sentence without a full stop.
        node: name of the node concerned.
        op: the operation that failed ("pwrite", "open", ...).
        offset, length: the range concerned, bytes.
        errno: a value of the errno module.
        hint: what the user can do about it.

    Attributes:
        file: of the image that the node reads, where it is known and the reason does not name it.
    """

    default_errno: int | None = None
    file: str | None = None

    def __init__(
        self,
        reason: str = "",
        *,
        node: str | None = None,
        op: str | None = None,
        offset: int | None = None,
        length: int | None = None,
        errno: int | None = None,
        hint: str | None = None,
    ) -> None:
        super().__init__(reason)
        self.reason = reason
        self.node = node
        self.op = op
        self.offset = offset
        self.length = length
        self.errno = errno if errno is not None else self.default_errno
        self.hint = hint

    def __str__(self) -> str:
        file = f" ('{self.file}')" if self.file and self.file not in self.reason else ""
        where = f"node '{self.node}'{file}: " if self.node else ""
        what = self.op or ""
        if self.offset is not None:
            size = f"{self.length} bytes " if self.length is not None else ""
            what = f"{what} {size}at offset {self.offset}".strip()
        reason = self.reason or (os.strerror(self.errno) if self.errno else type(self).__name__)
        text = where + (f"{what}: " if what else "") + reason
        return f"{text}; {self.hint}" if self.hint else text


class GraphError(BlockGraphError):
    """A change of the graph was refused; the graph is as it was."""


class PermissionConflict(GraphError):
    """Two edges to one node ask for what the other does not share.

    Args:
        needs: "parent.child", the edge that needs the permission.
        blocks: "parent.child", the edge that does not share it.
        permission: its name ("write").
    """

    def __init__(self, reason: str, *, needs: str, blocks: str, permission: str, node: str) -> None:
        super().__init__(reason, node=node)
        self.needs = needs
        self.blocks = blocks
        self.permission = permission


class RoleError(GraphError):
    """A child is missing, unknown, doubled, or of a kind the role forbids."""


class CycleError(GraphError):
    """The change would make a node its own descendant."""


class NodeInUse(GraphError):
    """The node can not be removed: something still refers to it."""


class OptionError(BlockGraphError):
    """An option is unknown, missing, or has a wrong value.

    Args:
        path: where, as "nodes[2].file.filename".
        value: what was found.
        closest: the closest valid spelling, when there is one.
    """

    def __init__(
        self,
        reason: str,
        *,
        path: str = "",
        value: object = None,
        closest: str | None = None,
        node: str | None = None,
        hint: str | None = None,
    ) -> None:
        if hint is None and closest is not None:
            hint = f"did you mean '{closest}'?"
        super().__init__(reason, node=node, hint=hint)
        self.path = path
        self.value = value
        self.closest = closest

    def __str__(self) -> str:
        return f"{self.path}: {super().__str__()}" if self.path else super().__str__()


class IOFailure(BlockGraphError):
    """A request failed; errno is always set."""

    default_errno = _errno.EIO

    @classmethod
    def from_oserror(
        cls,
        error: OSError,
        *,
        node: str,
        op: str,
        offset: int | None = None,
        length: int | None = None,
        hint: str | None = None,
    ) -> IOFailure:
        """The IOFailure for an error of the system, of the subclass its errno asks for.

        `hint` replaces the remedy that the subclass proposes.
        """
        code = error.errno or _errno.EIO
        kind, remedy = _BY_ERRNO.get(code, (IOFailure, None))
        text = os.strerror(code)
        if error.filename:
            text = f"{text}: '{os.fsdecode(error.filename)}'"
        return kind(text, node=node, op=op, offset=offset, length=length, errno=code, hint=hint or remedy)


class NoSpace(IOFailure):
    """The storage is full."""

    default_errno = _errno.ENOSPC


class ReadOnly(IOFailure):
    """A write to something opened without write permission."""

    default_errno = _errno.EPERM


class OutOfRange(IOFailure):
    """The request reaches past the end, or is malformed."""

    default_errno = _errno.EINVAL


class Unsupported(IOFailure):
    """The node can not do this operation; the caller may fall back."""

    default_errno = _errno.ENOTSUP


class CorruptImage(IOFailure):
    """Metadata of an image contradicts its format's specification."""

    default_errno = _errno.EIO


class SnapshotBroken(IOFailure):
    """A point-in-time view lost data it needed (see backup-top, on-cbw-error), or never had the range."""

    default_errno = _errno.EACCES


class WireError(BlockGraphError):
    """A peer broke its protocol; its connection ends, nothing else does."""


class JobError(BlockGraphError):
    """A verb that the job's state does not allow, or the cause of a job's failure."""


_BY_ERRNO: dict[int, tuple[type[IOFailure], str | None]] = {
    _errno.ENOSPC: (NoSpace, "free space on the file system or choose a larger target"),
    _errno.EDQUOT: (NoSpace, "raise the quota or choose another target"),
    _errno.EFBIG: (NoSpace, "the file system or a resource limit forbids a file of this size"),
    _errno.EROFS: (ReadOnly, "the file system is read-only"),
    _errno.EOPNOTSUPP: (Unsupported, None),
    _errno.ENOSYS: (Unsupported, None),
}

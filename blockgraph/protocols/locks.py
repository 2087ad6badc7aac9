# SPDX-FileCopyrightText: blockgraph contributors
# SPDX-License-Identifier: MIT
"""Image locks: permissions told to other processes as byte locks on the image file.

The layout is QEMU's, so that neither corrupts an image the other uses. Perm bit `i` (blockgraph.perm has QEMU's
values) owns two bytes, which need not exist in the file:

```
byte 100 + i   read-locked: somebody holds permission i
byte 200 + i   read-locked: somebody does not share permission i
```

Only read locks are taken, so holders never block each other by locking; a conflict is found by asking (a probe for
a write lock) after one's own bytes are locked. Two processes that start together may both be refused, never both
accepted.

The locks are of the *open file description* kind: they belong to a descriptor opened for them alone, end when it is
closed, and are not lost when some library opens and closes the same file (as POSIX locks are). A forked child shares
the description: `release` unlocks explicitly, so that such a child does not keep the image locked.

Source: QEMU docs, "Image locking"; fcntl(2).
"""

from __future__ import annotations

import errno
import fcntl
import os
import struct

from blockgraph.perm import ALL, NONE, Perm

HELD = 100  #: first byte of the permissions held
UNSHARED = 200  #: first byte of the permissions not shared

#: struct flock: l_type, l_whence, l_start, l_len, l_pid (which must be 0), padded.
_FLOCK = struct.Struct("hhqqi0q")

#: The file system, or the kernel, has no such locks.
_NO_LOCKS = frozenset({errno.EINVAL, errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP})


class LockConflict(Exception):
    """Another open of the image holds, or does not share, a permission.

    Args:
        permission: the one in question.
        holds: True: the other holds it and we would not share it; False: we need it and the other does not share it.
    """

    def __init__(self, permission: Perm, *, holds: bool) -> None:
        super().__init__(permission, holds)
        self.permission = permission
        self.holds = holds


class LocksUnavailable(Exception):
    """Byte locks do not work on this file."""


class ImageLock:
    """The permissions that one open of an image has told the others.

    Args:
        fd: a readable descriptor with an open file description of its own; the lock owns it from now on.
    """

    def __init__(self, fd: int) -> None:
        self._fd = fd
        self._held = NONE
        self._unshared = NONE
        self._next = (NONE, NONE)

    def prepare(self, need: Perm, share: Perm) -> None:
        """Lock what `need` and `share` ask for, beside what is locked now. `commit` or `abort` follows.

        Raises:
            LockConflict: another open is in the way.
            LocksUnavailable: no byte locks here; nothing is locked.
        """
        unshared = ALL & ~share
        self._next = (need, unshared)
        if not need & ~self._held and not unshared & ~self._unshared:
            return  # only gives up: can not conflict
        self._set(HELD, need & ~self._held, fcntl.F_RDLCK)
        self._set(UNSHARED, unshared & ~self._unshared, fcntl.F_RDLCK)
        for permission in need:
            if self._locked_by_other(UNSHARED, permission):
                raise LockConflict(permission, holds=False)
        for permission in unshared:
            if self._locked_by_other(HELD, permission):
                raise LockConflict(permission, holds=True)

    def commit(self) -> None:
        """Give up what the last `prepare` did not ask for."""
        need, unshared = self._next
        self._set(HELD, ALL & ~need, fcntl.F_UNLCK)
        self._set(UNSHARED, ALL & ~unshared, fcntl.F_UNLCK)
        self._held, self._unshared = need, unshared

    def abort(self) -> None:
        """Return to what was locked before the last `prepare`."""
        self._next = (self._held, self._unshared)
        self.commit()

    def release(self) -> None:
        """Unlock everything and close the descriptor."""
        try:
            self._next = (NONE, NONE)
            self.commit()
        finally:
            os.close(self._fd)

    def _set(self, base: int, permissions: Perm, kind: int) -> None:
        for permission in permissions:
            start = base + _bit(permission)
            try:
                fcntl.fcntl(self._fd, fcntl.F_OFD_SETLK, _FLOCK.pack(kind, os.SEEK_SET, start, 1, 0))
            except OSError as error:
                if kind == fcntl.F_UNLCK:
                    continue  # closing the descriptor unlocks in any case
                if error.errno in _NO_LOCKS:
                    raise LocksUnavailable(os.strerror(error.errno)) from error
                # Somebody has a write lock on our byte: not this protocol, but in use all the same.
                raise LockConflict(permission, holds=base == UNSHARED) from error

    def _locked_by_other(self, base: int, permission: Perm) -> bool:
        probe = _FLOCK.pack(fcntl.F_WRLCK, os.SEEK_SET, base + _bit(permission), 1, 0)
        kind: int = _FLOCK.unpack(fcntl.fcntl(self._fd, fcntl.F_OFD_GETLK, probe))[0]
        return kind != fcntl.F_UNLCK


def _bit(permission: Perm) -> int:
    return permission.bit_length() - 1

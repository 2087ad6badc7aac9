# SPDX-FileCopyrightText: blockgraph contributors
# SPDX-License-Identifier: MIT
"""Words of the NBD protocol: numbers, message layouts, error values.

All numbers on the wire are big endian and unsigned. Shared by the server and by `blockgraph.testing.nbd_client`.

Source: NBD proto.md, sections "Values" and "Protocol phases".
"""

from __future__ import annotations

import enum
import errno
import struct
from typing import Final

# Handshake.

NBD_MAGIC: Final = 0x4E42444D41474943  #: "NBDMAGIC"
OPTION_MAGIC: Final = 0x49484156454F5054  #: "IHAVEOPT"
OPTION_REPLY_MAGIC: Final = 0x0003E889045565A9

GREETING: Final = struct.Struct(">QQH")  #: magic, option magic, handshake flags
CLIENT_FLAGS: Final = struct.Struct(">I")
OPTION: Final = struct.Struct(">QII")  #: magic, option, length of data
OPTION_REPLY: Final = struct.Struct(">QIII")  #: magic, option, reply type, length of data
EXPORT_NAME_REPLY: Final = struct.Struct(">QH")  #: size, transmission flags
EXPORT_NAME_PADDING: Final = bytes(124)

INFO_EXPORT_DATA: Final = struct.Struct(">HQH")  #: NBD_INFO_EXPORT, size, transmission flags
INFO_BLOCK_SIZE_DATA: Final = struct.Struct(">HIII")  #: NBD_INFO_BLOCK_SIZE, minimum, preferred, maximum
U16: Final = struct.Struct(">H")
U32: Final = struct.Struct(">I")

#: Longest string of the protocol (names, descriptions, queries), bytes.
MAX_STRING: Final = 4096


class HandshakeFlag(enum.IntFlag):
    """Of the server's greeting and, with the same numbers, of the client's answer."""

    FIXED_NEWSTYLE = 1
    NO_ZEROES = 2


class Opt(enum.IntEnum):
    """What a client asks for while it negotiates."""

    EXPORT_NAME = 1
    ABORT = 2
    LIST = 3
    STARTTLS = 5
    INFO = 6
    GO = 7
    STRUCTURED_REPLY = 8
    LIST_META_CONTEXT = 9
    SET_META_CONTEXT = 10


class Rep(enum.IntEnum):
    """Reply to an option. Errors have bit 31."""

    ACK = 1
    SERVER = 2
    INFO = 3
    META_CONTEXT = 4
    ERR_UNSUP = 2**31 + 1
    ERR_POLICY = 2**31 + 2
    ERR_INVALID = 2**31 + 3
    ERR_PLATFORM = 2**31 + 4
    ERR_TLS_REQD = 2**31 + 5
    ERR_UNKNOWN = 2**31 + 6
    ERR_SHUTDOWN = 2**31 + 7
    ERR_BLOCK_SIZE_REQD = 2**31 + 8
    ERR_TOO_BIG = 2**31 + 9


class Info(enum.IntEnum):
    """Kind of a REP_INFO."""

    EXPORT = 0
    NAME = 1
    DESCRIPTION = 2
    BLOCK_SIZE = 3


class TransmissionFlag(enum.IntFlag):
    """What an export can do."""

    HAS_FLAGS = 1 << 0
    READ_ONLY = 1 << 1
    SEND_FLUSH = 1 << 2
    SEND_FUA = 1 << 3
    ROTATIONAL = 1 << 4
    SEND_TRIM = 1 << 5
    SEND_WRITE_ZEROES = 1 << 6
    SEND_DF = 1 << 7
    CAN_MULTI_CONN = 1 << 8
    SEND_RESIZE = 1 << 9
    SEND_CACHE = 1 << 10
    SEND_FAST_ZERO = 1 << 11


# Transmission.

REQUEST_MAGIC: Final = 0x25609513
SIMPLE_REPLY_MAGIC: Final = 0x67446698
CHUNK_MAGIC: Final = 0x668E33EF

REQUEST: Final = struct.Struct(">IHHQQI")  #: magic, flags, command, cookie, offset, length
SIMPLE_REPLY: Final = struct.Struct(">IIQ")  #: magic, error, cookie
CHUNK: Final = struct.Struct(">IHHQI")  #: magic, flags, type, cookie, length of data
CHUNK_DATA: Final = struct.Struct(">IHHQIQ")  #: CHUNK, then the offset of OFFSET_DATA
CHUNK_HOLE: Final = struct.Struct(">IHHQIQI")  #: CHUNK, then offset and length of OFFSET_HOLE
CHUNK_ERROR: Final = struct.Struct(">IHHQIIH")  #: CHUNK, then error and length of message
DESCRIPTOR: Final = struct.Struct(">II")  #: length, status flags


class Cmd(enum.IntEnum):
    """What a client asks for after the handshake."""

    READ = 0
    WRITE = 1
    DISC = 2
    FLUSH = 3
    TRIM = 4
    CACHE = 5
    WRITE_ZEROES = 6
    BLOCK_STATUS = 7


class CmdFlag(enum.IntFlag):
    """Of a request."""

    FUA = 1 << 0
    NO_HOLE = 1 << 1
    DF = 1 << 2
    REQ_ONE = 1 << 3
    FAST_ZERO = 1 << 4


CHUNK_DONE: Final = 1  #: flag of a reply's last chunk


class Chunk(enum.IntEnum):
    """Type of a structured reply chunk. Errors have bit 15."""

    NONE = 0
    OFFSET_DATA = 1
    OFFSET_HOLE = 2
    BLOCK_STATUS = 5
    ERROR = 2**15 + 1
    ERROR_OFFSET = 2**15 + 2


#: Flags of context base:allocation.
STATE_HOLE: Final = 1
STATE_ZERO: Final = 2
#: Flag of contexts qemu:dirty-bitmap:NAME.
STATE_DIRTY: Final = 1

#: The maximum every client may rely on, bytes; also what the server announces.
MAX_REQUEST: Final = 32 << 20


class Err(enum.IntEnum):
    """The error values of the protocol; equal to Linux's errno, but a closed set."""

    PERM = 1
    IO = 5
    NOMEM = 12
    INVAL = 22
    NOSPC = 28
    OVERFLOW = 75
    NOTSUP = 95
    SHUTDOWN = 108


_BY_ERRNO: Final = {
    errno.EPERM: Err.PERM,
    errno.EROFS: Err.PERM,
    errno.ENOMEM: Err.NOMEM,
    errno.EINVAL: Err.INVAL,
    errno.ENOSPC: Err.NOSPC,
    errno.EDQUOT: Err.NOSPC,
    errno.EFBIG: Err.NOSPC,
    errno.EOVERFLOW: Err.OVERFLOW,
    errno.EOPNOTSUPP: Err.NOTSUP,
    errno.ESHUTDOWN: Err.SHUTDOWN,
}


def wire_error(code: int | None) -> Err:
    """The error value for an errno; IO for whatever the protocol has no word for."""
    return _BY_ERRNO.get(code or errno.EIO, Err.IO)

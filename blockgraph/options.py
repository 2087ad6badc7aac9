# SPDX-FileCopyrightText: blockgraph contributors
# SPDX-License-Identifier: MIT
"""Options common to every node, under the names of QEMU's BlockdevOptions.

A driver's `Options` extends `NodeOptions`; a member that holds a child is typed `NodeRef` (required),
`NodeRef | UnsetType` (may be omitted) or `NodeRef | None | UnsetType` (`null` differs from omitted). The same
structures give the validation, the JSON schema and the documentation.
"""

from __future__ import annotations

from typing import Any, Literal

import msgspec

#: A child in a description: the name of a node, or an inline description of one.
NodeRef = str | dict[str, Any]


class BitmapRef(msgspec.Struct, kw_only=True, forbid_unknown_fields=True, frozen=True):
    """A named dirty bitmap.

    Attributes:
        node: name of the node it belongs to.
        name: its name.
    """

    node: str
    name: str


class CacheOptions(msgspec.Struct, kw_only=True, rename="kebab", forbid_unknown_fields=True, frozen=True):
    """How the host caches.

    Attributes:
        direct: bypass the host's page cache (O_DIRECT).
        no_flush: ignore flushes. Data may be lost when the host fails.
    """

    direct: bool = False
    no_flush: bool = False


class NodeOptions(msgspec.Struct, kw_only=True, rename="kebab", forbid_unknown_fields=True, frozen=True):
    """Members every node description may have.

    Attributes:
        driver: name of the driver.
        node_name: letters, digits, '-', '.', '_', starting with a letter, at most 31; generated when omitted.
        discard: "unmap" passes discards on, "ignore" drops them. (QEMU's default is "ignore"; a silently dropped
            discard helps nobody, so here it is "unmap".)
        cache: how the host caches.
        read_only: refuse writes; the image is opened read-only.
        auto_read_only: open read-only where writing is not possible or not needed.
        force_share: read an image that others write (needs read-only).
        detect_zeroes: "on" turns writes of zeroes into write-zeroes, "unmap" lets those deallocate.
    """

    driver: str
    node_name: str | None = None
    discard: Literal["ignore", "unmap"] = "unmap"
    cache: CacheOptions = CacheOptions()
    read_only: bool = False
    auto_read_only: bool = False
    force_share: bool = False
    detect_zeroes: Literal["off", "on", "unmap"] = "off"

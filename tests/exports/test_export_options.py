# SPDX-FileCopyrightText: blockgraph contributors
# SPDX-License-Identifier: MIT
"""What graph files may say about exports."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest

from blockgraph.exports.options import (
    MIN_EXTENT_MAP,
    InetAddress,
    NbdExportOptions,
    NbdServerOptions,
    TlsCredentials,
    UnixAddress,
)


def test_export_shortest_description_has_defaults() -> None:
    options = msgspec.convert({"type": "nbd", "id": "guest", "node-name": "top"}, NbdExportOptions)
    assert (options.export_name, options.description, options.writable) == ("top", "", False)
    named = msgspec.convert({"type": "nbd", "id": "guest", "node-name": "top", "name": ""}, NbdExportOptions)
    assert named.export_name == ""


@pytest.mark.parametrize(
    "wrong",
    [
        {"type": "fuse"},
        {"writeable": True},
        {"writable": "yes"},
        {"description": "ü" * 2049},
        {"name": "n" * 4097},
        {"name": "a\0b"},
        {"extent-map-size": MIN_EXTENT_MAP - 1},
        {"extent-map-size": "255k"},
        {"extent-map-size": "64X"},
        {"extent-map-size": 1.5},
    ],
    ids=["type", "unknown", "kind", "long-text", "long-name", "nul", "map-small", "map-255k", "map-64X", "map-real"],
)
def test_export_wrong_member_is_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(msgspec.ValidationError):
        msgspec.convert({"type": "nbd", "id": "guest", "node-name": "top", **wrong}, NbdExportOptions)


@pytest.mark.parametrize(
    "given, size",
    [({}, 64 << 20), ({"extent-map-size": 1 << 20}, 1 << 20), ({"extent-map-size": "256KiB"}, MIN_EXTENT_MAP)],
    ids=["default", "bytes", "text"],
)
def test_export_extent_map_size_is_bytes_or_text(given: dict[str, Any], size: int) -> None:
    options = msgspec.convert({"type": "nbd", "id": "guest", "node-name": "top", **given}, NbdExportOptions)
    assert options.extent_map_bytes == size


@pytest.mark.parametrize(
    "addr, expected",
    [
        ({"type": "unix", "path": "/x"}, UnixAddress(path="/x")),
        ({"type": "inet", "host": "h", "port": 0}, InetAddress(host="h", port=0)),
        ({"type": "inet", "host": "h", "port": "nbd"}, InetAddress(host="h", port="nbd")),
        ({"type": "inet", "host": "h"}, InetAddress(host="h", port=10809)),
    ],
    ids=["unix", "any-port", "service", "default-port"],
)
def test_server_address_is_understood(addr: dict[str, Any], expected: object) -> None:
    options = msgspec.convert({"addr": addr, "max-connections": 3}, NbdServerOptions)
    assert options.addr == expected


@pytest.mark.parametrize(
    "wrong",
    [
        {"addr": {"type": "vsock"}},
        {"addr": {"type": "inet", "host": "h", "port": 65536}},
        {"addr": {"type": "inet", "host": "h", "port": "-1x", "to": 3}},
        {"addr": {"type": "unix", "path": "/x"}, "max-connections": -1},
        {"addr": {"type": "unix", "path": "/x"}, "tls-creds": {}},
        {"addr": {"type": "unix", "path": "/x"}, "tls-creds": {"dir": "d", "cert": "c"}},
        {"addr": {"type": "unix", "path": "/x"}, "tls-creds": {"cert": "c", "key": "k"}},
    ],
    ids=["vsock", "port", "unknown", "negative", "no-tls-files", "both-tls-forms", "no-ca"],
)
def test_server_wrong_is_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(msgspec.ValidationError):
        msgspec.convert(wrong, NbdServerOptions)


def test_tls_own_files_without_verification_need_no_ca() -> None:
    assert not TlsCredentials(cert="c", key="k", verify_peer=False).verify_peer


def test_options_have_a_json_schema() -> None:
    schema = msgspec.json.schema(list[NbdExportOptions] | NbdServerOptions)
    assert "node-name" in str(schema)

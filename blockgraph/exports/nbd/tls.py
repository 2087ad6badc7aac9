# SPDX-FileCopyrightText: blockgraph contributors
# SPDX-License-Identifier: MIT
"""The server's TLS context out of certificate files."""

from __future__ import annotations

import ssl
from collections.abc import Callable
from pathlib import Path

from blockgraph.errors import BlockGraphError, OptionError
from blockgraph.exports.options import TlsCredentials


def server_context(credentials: TlsCredentials) -> ssl.SSLContext:
    """A context for the server's side, TLS 1.2 and later.

    Raises:
        OptionError: a file is missing.
        BlockGraphError: a file is not what it should be.
    """
    cert, key, ca, crl = _files(credentials)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    _load(lambda: context.load_cert_chain(cert, key), f"'{cert}' with key '{key}'")
    if credentials.verify_peer:
        assert ca is not None
        _load(lambda: context.load_verify_locations(ca), f"'{ca}'")
        context.verify_mode = ssl.CERT_REQUIRED
        if crl is not None:
            _load(lambda: context.load_verify_locations(crl), f"'{crl}'")
            context.verify_flags |= ssl.VerifyFlags.VERIFY_CRL_CHECK_LEAF
    return context


def _files(credentials: TlsCredentials) -> tuple[Path, Path, Path | None, Path | None]:
    """Certificate, key, authorities, revocations; all exist."""
    if credentials.dir is not None:
        directory = Path(credentials.dir)
        revoked = directory / "ca-crl.pem"
        cert, key = directory / "server-cert.pem", directory / "server-key.pem"
        ca: Path | None = directory / "ca-cert.pem"
        crl = revoked if revoked.exists() else None
    else:
        assert credentials.cert is not None
        assert credentials.key is not None
        cert, key = Path(credentials.cert), Path(credentials.key)
        ca = None if credentials.ca is None else Path(credentials.ca)
        crl = None
    for file in (cert, key, ca if credentials.verify_peer else None):
        if file is not None and not file.is_file():
            raise OptionError(
                f"there is no file '{file}'",
                path="nbd-server.tls-creds",
                value=str(file),
                hint="make the certificates, or name the directory or files that hold them",
            )
    return cert, key, ca, crl


def _load(load: Callable[[], object], what: str) -> None:
    try:
        load()
    except (OSError, ssl.SSLError) as error:
        raise BlockGraphError(
            f"{what} can not be used for TLS: {error}",
            op="load",
            hint="both must be PEM, the key without a password and belonging to the certificate",
        ) from error

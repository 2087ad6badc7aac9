# SPDX-FileCopyrightText: blockgraph contributors
# SPDX-License-Identifier: MIT
"""X.509 files for a test, in the layout of QEMU's tls-creds-x509: one directory for both ends."""

from __future__ import annotations

import subprocess
from pathlib import Path

_EXTENSIONS = {
    "server": "subjectAltName=DNS:localhost,IP:127.0.0.1\nextendedKeyUsage=serverAuth\n",
    "client": "extendedKeyUsage=clientAuth\n",
}


def make_certificates(openssl: str, directory: Path) -> Path:
    """An authority, a server and a client signed by it; returns the directory."""

    def run(*args: str) -> None:
        subprocess.run([openssl, *args], cwd=directory, check=True, capture_output=True)

    directory.mkdir(parents=True, exist_ok=True)
    key = ("-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes")
    run(
        *("req", "-x509", *key, "-days", "2", "-subj", "/CN=test authority"),
        *("-keyout", "ca-key.pem", "-out", "ca-cert.pem"),
        *("-addext", "keyUsage=critical,keyCertSign,cRLSign"),
    )
    for who, extensions in _EXTENSIONS.items():
        (directory / f"{who}.ext").write_text(
            "basicConstraints=CA:FALSE\nkeyUsage=critical,digitalSignature\n" + extensions
        )
        run("req", *key, "-subj", f"/CN={who}", "-keyout", f"{who}-key.pem", "-out", f"{who}.csr")
        run(
            *("x509", "-req", "-in", f"{who}.csr", "-days", "2", "-extfile", f"{who}.ext"),
            *("-CA", "ca-cert.pem", "-CAkey", "ca-key.pem", "-CAcreateserial", "-out", f"{who}-cert.pem"),
        )
    return directory

# SPDX-FileCopyrightText: blockgraph contributors
# SPDX-License-Identifier: MIT
"""NBD: serves nodes to any NBD client.

    client ── socket ── Wire ── handshake ── Negotiated ─┬─ NativeTransmission ── extent map, or Backend
                        (TLS)   (options)                └─ Transmission ── Backend     (TLS)

The handshake reads not one byte too many, and its result (`Negotiated`) holds everything the transmission phase
needs: socket and result are handed to native threads, unless the connection is encrypted.
"""

from blockgraph.exports.nbd.actions import AddExport, RemoveExport
from blockgraph.exports.nbd.export import NbdExport
from blockgraph.exports.nbd.server import NbdServer, start_server

__all__ = ["AddExport", "NbdExport", "NbdServer", "RemoveExport", "start_server"]

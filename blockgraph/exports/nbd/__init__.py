# SPDX-FileCopyrightText: blockgraph contributors
# SPDX-License-Identifier: MIT
"""NBD: serves nodes to any NBD client.

    client ── socket ── Wire ── handshake ── Negotiated ── Transmission ── Backend
                        (TLS)   (options)                  (requests)

The handshake reads not one byte too many, and its result (`Negotiated`) holds everything the transmission phase
needs: socket and result can be handed to any other request loop.
"""

from blockgraph.exports.nbd.export import NbdExport
from blockgraph.exports.nbd.server import NbdServer, start_server

__all__ = ["NbdExport", "NbdServer", "start_server"]

# SPDX-FileCopyrightText: blockgraph contributors
# SPDX-License-Identifier: MIT
"""An embeddable virtual-disk block layer: graphs of nodes, and point-in-time backups of live disks."""

# SPDX-FileCopyrightText: blockgraph contributors
# SPDX-License-Identifier: MIT
"""blockgraph: an embeddable virtual-disk block layer."""

# SPDX-FileCopyrightText: blockgraph contributors
# SPDX-License-Identifier: MIT
"""Backups that build on each other: a directory of images and manifests; making, verifying and restoring them."""

from blockgraph.chains.chain import Backup, Chain
from blockgraph.chains.manifest import Manifest
from blockgraph.chains.restore import Restored, restore
from blockgraph.chains.verify import Finding, Report, verify

__all__ = ["Backup", "Chain", "Finding", "Manifest", "Report", "Restored", "restore", "verify"]

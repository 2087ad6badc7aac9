# SPDX-FileCopyrightText: blockgraph contributors
# SPDX-License-Identifier: MIT
"""The main job on real input, checked: a disk is backed up while a guest overwrites it.

disk.py       makes the disk: an ext4 file system with real files in it
guest.py      the guest, a process of its own: an NBD client that writes all over the disk
scenario.py   runs the graph, the guest and the backup together
proof.py      compares, byte by byte
report.py     what the user sees
"""

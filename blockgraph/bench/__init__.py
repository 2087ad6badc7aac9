# SPDX-FileCopyrightText: blockgraph contributors
# SPDX-License-Identifier: MIT
"""`blockgraph bench`: how fast blockgraph is on this machine and this storage, beside the tools that are installed.

    disks      what is measured: a raw and a qcow2 image made for it, or a graph of the user's
    servers    NBD servers in processes of their own: ours, nbdkit, qemu-nbd, qemu-storage-daemon
    programs   how these and others are run: none is left behind
    load       a pattern of requests against one of them: fio where it is installed, else `client`
    inprocess  reads through the Python API, beside preadv
    copying    copies, beside dd, qemu-img and qemu-storage-daemon
    tools      which of these are installed, and on what machine
    plan       all of it in rounds, in which the sides take turns
    figures    what came out: medians, ratios, spread; as JSON
    report     as tables and plots on a terminal; `svg`: as a picture; `scale`: their axes and numbers

Every side of a figure does the same on the same storage, in turn. Nothing here is imported by anything else.
"""

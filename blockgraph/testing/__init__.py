# SPDX-FileCopyrightText: blockgraph contributors
# SPDX-License-Identifier: MIT

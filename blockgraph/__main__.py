# SPDX-FileCopyrightText: blockgraph contributors
# SPDX-License-Identifier: MIT
"""`python -m blockgraph` is the command `blockgraph`."""

import sys

from blockgraph.cli import main

sys.exit(main())

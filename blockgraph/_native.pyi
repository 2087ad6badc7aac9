# SPDX-FileCopyrightText: blockgraph contributors
# SPDX-License-Identifier: MIT
"""The compiled module (native/build.py). Only blockgraph.native uses it, and gives it types there."""

from typing import Any

ffi: Any
lib: Any

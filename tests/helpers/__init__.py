# SPDX-FileCopyrightText: blockgraph contributors
# SPDX-License-Identifier: MIT
"""What several tests share. `tests` is on the path (pyproject.toml): `from helpers.harness import opened`."""

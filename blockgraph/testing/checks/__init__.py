# SPDX-FileCopyrightText: blockgraph contributors
# SPDX-License-Identifier: MIT
"""The rules that the conformance kit checks, by topic. Importing this registers all of them."""

from blockgraph.testing.checks import concurrency, mapping, reading, workload, writing
from blockgraph.testing.checks.subject import CHECKS, Check, Subject, Violation

__all__ = ["CHECKS", "Check", "Subject", "Violation", "concurrency", "mapping", "reading", "workload", "writing"]

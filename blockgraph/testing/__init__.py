# SPDX-FileCopyrightText: blockgraph contributors
# SPDX-License-Identifier: MIT
"""For tests of drivers, of this project and of others: the conformance kit, and write logs with their crash states.

The fault filters (inject-error, delay, log-writes, verify) are ordinary drivers in blockgraph.filters.
"""

from blockgraph.testing.checks import Check, Violation
from blockgraph.testing.conformance import ConformanceError, Failure, check_driver, checks
from blockgraph.testing.write_log import CrashState, LogEntry, WriteLog

__all__ = [
    "Check",
    "ConformanceError",
    "CrashState",
    "Failure",
    "LogEntry",
    "Violation",
    "WriteLog",
    "check_driver",
    "checks",
]

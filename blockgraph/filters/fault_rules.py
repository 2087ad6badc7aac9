# SPDX-FileCopyrightText: blockgraph contributors
# SPDX-License-Identifier: MIT
"""The rules of an inject-error node: which event arms which error, and which breakpoints hold a request.

A small state machine without I/O. `reach` tells it that an event happened, `take_error` asks whether a request now
fails. The options have the members of QEMU's BlkdebugInjectErrorOptions and BlkdebugSetStateOptions.
"""

from __future__ import annotations

import difflib
import errno as _errno
from typing import Annotated, Literal

import msgspec

from blockgraph import debug

SECTOR = 512

IoType = Literal["read", "write", "write-zeroes", "discard", "flush", "block-status"]

#: Requests that a rule without iotype fails: all that QEMU's default names.
_DEFAULT_IOTYPES = frozenset({"read", "write", "write-zeroes", "discard", "flush"})

#: A state of the machine; 0 in a rule means any.
State = Annotated[int, msgspec.Meta(ge=0)]


class InjectRule(msgspec.Struct, kw_only=True, rename="kebab", forbid_unknown_fields=True, frozen=True):
    """An error.

    Attributes:
        event: arms the rule; until then it does nothing. See blockgraph.debug.
        state: the machine must be in it when the event happens; 0: in any.
        iotype: requests that fail; omitted: all but block-status.
        errno: number, or name as "ENOSPC".
        sector: only requests that touch this sector of 512 bytes; omitted: all.
        once: the rule is gone after the first request it failed.
        immediately: the request fails at once, not after a turn of the event loop.
    """

    event: str
    state: State = 0
    iotype: IoType | None = None
    errno: int | str = _errno.EIO
    sector: Annotated[int, msgspec.Meta(ge=0)] | None = None
    once: bool = False
    immediately: bool = False

    def __post_init__(self) -> None:
        check_event(self.event)
        if isinstance(self.errno, str):
            if not (self.errno.startswith("E") and hasattr(_errno, self.errno)):
                raise ValueError(f"unknown errno name '{self.errno}'")
        elif self.errno not in _errno.errorcode:
            raise ValueError(f"errno {self.errno} is no error of this system")

    @property
    def code(self) -> int:
        """The errno as a number."""
        return self.errno if isinstance(self.errno, int) else int(getattr(_errno, self.errno))

    def fits(self, iotype: IoType, offset: int, length: int) -> bool:
        """The rule, once armed, fails this request."""
        if iotype != self.iotype if self.iotype else iotype not in _DEFAULT_IOTYPES:
            return False
        return self.sector is None or offset <= self.sector * SECTOR < offset + length


class StateRule(msgspec.Struct, kw_only=True, forbid_unknown_fields=True, frozen=True):
    """A change of state.

    Attributes:
        event: makes the change.
        state: the machine must be in it when the event happens; 0: in any.
        new_state: the state afterwards. (With an underscore, as QEMU has it.)
    """

    event: str
    new_state: Annotated[int, msgspec.Meta(ge=1)]
    state: State = 0

    def __post_init__(self) -> None:
        check_event(self.event)


class FaultRules:
    """The machine. It starts in state 1.

    Attributes:
        state: where it is.
    """

    def __init__(self, inject: tuple[InjectRule, ...], set_state: tuple[StateRule, ...]) -> None:
        self.state = 1
        self._inject = list(inject)
        self._set_state = set_state
        self._armed: list[InjectRule] = []

    def reach(self, event: str) -> None:
        """`event` happened. The rules it arms replace those armed before; an event that arms none changes nothing.

        All rules are judged by the state before the event; of several changes of state the first one listed counts.
        """
        armed = [rule for rule in self._inject if rule.event == event and rule.state in (0, self.state)]
        if armed:
            self._armed = armed
        for change in self._set_state:
            if change.event == event and change.state in (0, self.state):
                self.state = change.new_state
                break

    def take_error(self, iotype: IoType, offset: int, length: int) -> InjectRule | None:
        """The first armed rule that fails this request; None: it goes on."""
        for rule in self._armed:
            if rule.fits(iotype, offset, length):
                if rule.once:
                    self._armed.remove(rule)
                    self._inject.remove(rule)
                return rule
        return None


def check_event(name: str) -> None:
    """Refuse an unknown event.

    Raises:
        ValueError: naming the closest one.
    """
    known = debug.events()
    if name in known:
        return
    closest = difflib.get_close_matches(name, known, 1)
    raise ValueError(f"unknown event '{name}'" + (f", did you mean '{closest[0]}'?" if closest else ""))

# SPDX-FileCopyrightText: blockgraph contributors
# SPDX-License-Identifier: MIT
"""The life of a job, as two tables.

```
created ──► running ◄──► paused          every state up to pending may also go to aborting
               │                         running ──► ready ◄──► standby (jobs that follow a disk)
               ▼
            waiting ──► pending ──► concluded ──► null
                             aborting ──► concluded
```
Source: QEMU's JobStatus and JobVerb.
"""

from __future__ import annotations

import enum


class JobState(enum.StrEnum):
    """Where a job is."""

    CREATED = "created"
    RUNNING = "running"
    PAUSED = "paused"
    READY = "ready"
    STANDBY = "standby"
    WAITING = "waiting"
    PENDING = "pending"
    ABORTING = "aborting"
    CONCLUDED = "concluded"
    NULL = "null"


class Verb(enum.StrEnum):
    """What a user may ask of a job."""

    CANCEL = "cancel"
    PAUSE = "pause"
    RESUME = "resume"
    SET_SPEED = "set-speed"
    COMPLETE = "complete"
    FINALIZE = "finalize"
    DISMISS = "dismiss"


_S = JobState

#: State -> states it may go to.
TRANSITIONS: dict[JobState, frozenset[JobState]] = {
    _S.CREATED: frozenset({_S.RUNNING, _S.ABORTING, _S.NULL}),
    _S.RUNNING: frozenset({_S.PAUSED, _S.READY, _S.WAITING, _S.ABORTING}),
    _S.PAUSED: frozenset({_S.RUNNING}),
    _S.READY: frozenset({_S.STANDBY, _S.WAITING, _S.ABORTING}),
    _S.STANDBY: frozenset({_S.READY}),
    _S.WAITING: frozenset({_S.PENDING, _S.ABORTING}),
    _S.PENDING: frozenset({_S.ABORTING, _S.CONCLUDED}),
    _S.ABORTING: frozenset({_S.ABORTING, _S.CONCLUDED}),
    _S.CONCLUDED: frozenset({_S.NULL}),
    _S.NULL: frozenset(),
}

_ACTIVE = frozenset({_S.CREATED, _S.RUNNING, _S.PAUSED, _S.READY, _S.STANDBY})

#: Verb -> states in which it is allowed.
VERBS: dict[Verb, frozenset[JobState]] = {
    Verb.CANCEL: _ACTIVE | {_S.WAITING, _S.PENDING},
    Verb.PAUSE: _ACTIVE,
    Verb.RESUME: _ACTIVE,
    Verb.SET_SPEED: _ACTIVE,
    Verb.COMPLETE: frozenset({_S.READY, _S.STANDBY}),
    Verb.FINALIZE: frozenset({_S.PENDING}),
    Verb.DISMISS: frozenset({_S.CONCLUDED}),
}

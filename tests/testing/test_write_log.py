# SPDX-FileCopyrightText: blockgraph contributors
# SPDX-License-Identifier: MIT
"""WriteLog: replay, and crash states that are legal and cover what can happen."""

from __future__ import annotations

import struct
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from blockgraph.errors import CorruptImage
from blockgraph.filters.log_format import TRUNCATE_MARK, Entry, LogFlag, Super, pack_entry, pack_super
from blockgraph.testing import WriteLog

S = 512
SECTORS = 12
BASE = bytes([0xBB]) * S * SECTORS

#: (flags, first sector, sectors, byte written)
Op = tuple[LogFlag, int, int, int]


def made(*ops: Op | str | int, sector: int = S) -> WriteLog:
    """A log of these operations; a text is a mark, a number a truncate."""
    raw = pack_super(Super(len(ops), sector))
    for op in ops:
        if isinstance(op, int):
            raw += pack_entry(Entry(0, 0, LogFlag.MARK, TRUNCATE_MARK + str(op).encode()), sector)
        elif isinstance(op, str):
            raw += pack_entry(Entry(0, 0, LogFlag.MARK, op.encode()), sector)
        else:
            flags, first, count, byte = op
            raw += pack_entry(Entry(first, count, flags), sector)
            raw += b"" if flags & LogFlag.DISCARD else bytes([byte]) * sector * count
    return WriteLog(raw)


def write(first: int, count: int, byte: int) -> Op:
    return LogFlag.NONE, first, count, byte


FLUSH: Op = (LogFlag.FLUSH, 0, 0, 0)


@pytest.fixture
def log() -> WriteLog:
    return made(write(0, 2, 1), write(1, 2, 2), FLUSH, write(2, 2, 3), (LogFlag.DISCARD, 0, 1, 0), "end")


def sectors(image: bytes | bytearray) -> list[int]:
    """The byte that each sector is full of."""
    for at in range(0, len(image), S):
        assert len(set(image[at : at + S])) == 1
    return [image[at] for at in range(0, len(image), S)]


def test_replay_prefixes(log: WriteLog) -> None:
    assert sectors(log.replay(0, BASE[: 4 * S])) == [0xBB] * 4
    assert sectors(log.replay(1, BASE[: 4 * S])) == [1, 1, 0xBB, 0xBB]
    assert sectors(log.replay(3, BASE[: 4 * S])) == [1, 2, 2, 0xBB]
    assert sectors(log.replay(base=BASE[: 4 * S])) == [0, 2, 3, 3]
    assert sectors(log.replay(base=BASE[: 4 * S], discarded="keep")) == [1, 2, 3, 3]


def test_replay_grows_and_truncates() -> None:
    log = made(write(1, 1, 1), 4 * S, write(3, 1, 2), S)
    assert sectors(log.replay(1)) == [0, 1]
    assert sectors(log.replay(3)) == [0, 1, 0, 2]
    assert sectors(log.replay()) == [0]


def test_replay_file_in_steps_equals_replay(log: WriteLog, tmp_path: Path) -> None:
    disk = tmp_path / "disk"
    disk.write_bytes(BASE)
    for count in range(1, len(log) + 1):
        log.replay_file(disk, count, start=count - 1)
        assert disk.read_bytes() == log.replay(count, BASE)


def test_replay_file_grows_and_truncates(tmp_path: Path) -> None:
    log = made(write(1, 1, 1), 4 * S, (LogFlag.DISCARD, 1, 9, 0), write(3, 1, 2), 2 * S)
    log.replay_file(tmp_path / "disk", 4)
    assert (tmp_path / "disk").read_bytes() == log.replay(4)
    log.replay_file(tmp_path / "disk", start=4)
    assert (tmp_path / "disk").read_bytes() == log.replay() == bytes(2 * S)


def test_marks_epochs_and_durability(log: WriteLog) -> None:
    assert log.marks == {"end": 5}
    assert log.epochs() == [range(3), range(3, 6)]
    assert [log.durable_at(count) for count in range(7)] == [0, 0, 0, 3, 3, 3, 3]
    assert [str(entry) for entry in log.entries] == [
        "#0 write 0+1024",
        "#1 write 512+1024",
        "#2 flush",
        "#3 write 1024+1024",
        "#4 discard 0+512",
        "#5 mark 'end'",
    ]


def test_crash_prefixes_are_every_state_between_requests(log: WriteLog) -> None:
    states = list(log.crash_states(BASE, subsets=0))
    assert [(state.completed, state.durable) for state in states] == [(0, 0), (1, 0), (2, 0), (4, 3), (5, 3)]
    for state in states:
        assert state.image == log.replay(state.completed, BASE)


def test_crash_states_same_seed_same_states(log: WriteLog) -> None:
    assert list(log.crash_states(BASE, seed=3)) == list(log.crash_states(BASE, seed=3))
    assert list(log.crash_states(BASE, seed=3)) != list(log.crash_states(BASE, seed=4))


def test_crash_subsets_reach_every_combination() -> None:
    log = made(write(0, 1, 1), FLUSH, write(1, 1, 2), write(2, 1, 3), write(2, 1, 4), write(3, 2, 5))
    seen = {bytes(sectors(state.image)) for state in log.crash_states(bytes(5 * S), subsets=4000, prefixes=False)}
    second_epoch = {image for image in seen if image[0] == 1}
    # Sector 1 written or not; sector 2 old, first or second; sectors 3 and 4 each written or not (a torn write).
    wanted = {bytes([1, a, b, c, d]) for a in (0, 2) for b in (0, 3, 4) for c in (0, 5) for d in (0, 5)}
    assert second_epoch == wanted


def test_crash_fua_is_never_lost() -> None:
    log = made(write(0, 1, 1), (LogFlag.FUA, 1, 1, 2), write(2, 1, 3))
    for state in log.crash_states(bytes(3 * S), subsets=200):
        assert state.completed < 2 or state.image[S] == 2
        assert 1 not in state.lost


def test_crash_state_describes_itself() -> None:
    log = made(write(0, 1, 1), write(1, 4, 2))
    texts = {state.describe() for state in log.crash_states(subsets=100)}
    assert "power fails after entry 0, durable up to 0" in texts
    assert any("lost [0]" in text and "torn [1]" in text for text in texts)


OPS = st.lists(
    st.one_of(
        st.tuples(
            st.sampled_from([LogFlag.NONE, LogFlag.NONE, LogFlag.FUA, LogFlag.DISCARD]),
            st.integers(0, SECTORS - 4),
            st.integers(1, 4),
            st.integers(1, 100),
        ),
        st.just(FLUSH),
    ),
    max_size=12,
)


@given(OPS, st.integers(0, 1000))
def test_crash_states_are_legal(ops: list[Op], seed: int) -> None:
    """The oracle is slow and plain: a sector holds what it held at the last flush, or what was written since."""
    log = made(*ops)
    for state in log.crash_states(BASE, seed=seed, subsets=6):
        durable = log.replay(state.durable, BASE)
        assert state.durable == log.durable_at(state.completed)
        for sector, found in enumerate(sectors(state.image)):
            allowed = [durable[sector * S]]
            for flags, first, count, byte in ops[state.durable : state.completed]:
                if first <= sector < first + count:
                    if flags & LogFlag.FUA:
                        allowed = []  # whatever came before is gone for good
                    allowed.append(0 if flags & LogFlag.DISCARD else byte)
            assert found in allowed


@pytest.mark.parametrize(
    "raw, text",
    [
        (b"", "too short"),
        (bytes(512), "magic 0x0"),
        (struct.pack("<QQQI", 0x6A736677736872, 2, 0, 512), "version 2"),
        (struct.pack("<QQQI", 0x6A736677736872, 1, 0, 511), "sector size of 511"),
        (struct.pack("<QQQI", 0x6A736677736872, 1, 0, 1 << 31), "sector size of 2147483648"),
        (pack_super(Super(1 << 60, 512)), "ends before entry 0 of 1152921504606846976"),
        (pack_super(Super(1, 512)) + pack_entry(Entry(0, 1 << 50, LogFlag.NONE), 512), "inside the data of entry 0"),
        (pack_super(Super(1, 512)) + struct.pack("<QQQQ", 0, 0, 64, 0).ljust(512, b"\0"), "unknown flags 0x40"),
        (pack_super(Super(1, 512)) + struct.pack("<QQQQ", 0, 0, 8, 481).ljust(512, b"\0"), "mark of 481 bytes"),
    ],
    ids=["empty", "zeroes", "version", "odd-sector", "huge-sector", "entries", "data", "flags", "mark"],
)
def test_damaged_log_is_refused(raw: bytes, text: str) -> None:
    with pytest.raises(CorruptImage, match=text):
        WriteLog(raw)

# SPDX-FileCopyrightText: blockgraph contributors
# SPDX-License-Identifier: MIT
"""The bitmaps extension comes into the first cluster, changes and goes, whatever sectors of it reach the disk."""

from __future__ import annotations

import itertools
import random
import struct

import pytest
from hypothesis import given
from hypothesis import strategies as st

from blockgraph.formats.qcow2.extension_place import Write, plan_extension
from blockgraph.formats.qcow2.header import (
    AUTOCLEAR,
    Extension,
    Header,
    l1_entries,
    parse_header,
)

OLD, NEW = b"o" * 24, b"n" * 24
SECTOR = 512
SIZE = 1 << 20


def first_cluster(bits: int, extensions: list[tuple[int, bytes]], name: str | None, *, counts: bool) -> bytes:
    """A header that `parse_header` takes, padded to its cluster."""
    header = Header(3, bits, SIZE, l1_entries(SIZE, bits), 3 << bits, 1 << bits, 1, length=112)
    header.extensions = list(extensions)
    header.backing_file = name
    header.autoclear = int(counts)
    return header.pack().ljust(1 << bits, b"\0")


def parsed(cluster: bytes) -> tuple[list[tuple[int, bytes]], str | None, bytes | None]:
    """Other extensions, backing file name, and the bitmaps extension when it counts."""
    header = parse_header(cluster, 1 << 30, "n")
    others = [one for one in header.extensions if one[0] not in (Extension.BITMAPS, Extension.UNUSED)]
    data = header.extension(Extension.BITMAPS) if header.autoclear & 1 else None
    return others, header.backing_file, data


def applied(cluster: bytes, writes: list[Write]) -> bytes:
    image = bytearray(cluster)
    for offset, data in writes:
        image[offset : offset + len(data)] = data
    return bytes(image)


def torn(write: Write) -> list[list[Write]]:
    """What may arrive of it: any of its sectors."""
    pieces = []
    at = write.offset
    while at < write.offset + len(write.data):
        end = min(at - at % SECTOR + SECTOR, write.offset + len(write.data))
        pieces.append(Write(at, write.data[at - write.offset : end - write.offset]))
        at = end
    assert len(pieces) < 6
    return [list(some) for n in range(len(pieces) + 1) for some in itertools.combinations(pieces, n)]


def check_every_crash(cluster: bytes, data: bytes | None) -> bytes:
    """Whatever arrives of the plan, the rest is as it was, and the bitmaps extension the old one, the new one, or none.
    Returns the cluster at the end."""
    others, name, old = parsed(cluster)
    plan = plan_extension(cluster, data)
    for done in range(len(plan)):
        for some in torn(plan[done]):
            crashed = parsed(applied(cluster, [*plan[:done], *some]))
            assert crashed[:2] == (others, name)
            assert crashed[2] in (old, data, None)
    after = applied(cluster, plan)
    assert parsed(after) == (others, name, data)
    return after


extensions = st.lists(
    st.tuples(st.integers(1, (1 << 32) - 1).filter(lambda kind: kind not in set(Extension)), st.binary(max_size=300)),
    max_size=5,
    unique_by=lambda one: one[0],
)


@given(
    bits=st.sampled_from([9, 10, 11, 12, 16]),
    others=extensions,
    name=st.none() | st.text("abcdefgh/", min_size=1, max_size=900),
    place=st.integers(0, 5) | st.none(),
    counts=st.booleans(),
    seed=st.integers(0, 1000),
)
def test_extension_comes_changes_and_goes_through_any_crash(
    bits: int,
    others: list[tuple[int, bytes]],
    name: str | None,
    place: int | None,
    counts: bool,
    seed: int,
) -> None:
    if place is not None:
        others = [*others[:place], (int(Extension.BITMAPS), OLD), *others[place:]]
    try:
        cluster = first_cluster(bits, others, name, counts=counts and place is not None)
    except ValueError:
        return
    rng = random.Random(seed)
    for step in range(5):
        data = rng.choice([None, OLD, NEW, bytes([step]) * 24])
        try:
            cluster = check_every_crash(cluster, data)
        except ValueError:
            end = 112 + sum(8 + -(-len(value) // 8) * 8 for _, value in others) + 8
            assert end + 32 + 2 * len(name or "") > 1 << bits
            return


def test_extension_of_a_plain_image_is_one_write_and_the_bit() -> None:
    cluster = first_cluster(16, [], None, counts=False)
    assert [write.offset for write in plan_extension(cluster, NEW)] == [112, AUTOCLEAR]
    after = applied(cluster, plan_extension(cluster, NEW))
    assert [write.offset for write in plan_extension(after, OLD)] == [120]
    assert [(write.offset, len(write.data)) for write in plan_extension(after, None)] == [(AUTOCLEAR, 8), (112, 8)]
    assert applied(after, plan_extension(after, None))[:112] == cluster[:112]


def test_extension_in_front_of_another_leaves_its_room_and_takes_it_again() -> None:
    others = [(int(Extension.BITMAPS), OLD), (0x12345678, b"hello")]
    cluster = check_every_crash(first_cluster(16, others, "base.raw", counts=True), None)
    assert struct.unpack_from(">I", cluster, 112)[0] == Extension.UNUSED
    again = check_every_crash(cluster, NEW)
    assert cluster.rstrip(b"\0")[144:] == again.rstrip(b"\0")[144:]


@pytest.mark.parametrize("bits, length, fits", [(9, 335, True), (9, 361, False), (10, 421, True), (10, 480, False)])
def test_name_that_leaves_no_room_is_refused(bits: int, length: int, fits: bool) -> None:
    cluster = first_cluster(bits, [], "b" * length, counts=False)
    if fits:
        check_every_crash(cluster, NEW)
    else:
        with pytest.raises(ValueError, match="no room"):
            plan_extension(cluster, NEW)

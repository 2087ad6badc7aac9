# SPDX-FileCopyrightText: blockgraph contributors
# SPDX-License-Identifier: MIT
"""Permissions over a graph (semantics 3.6; the case of QEMU's iotest 283)."""

from __future__ import annotations

import functools
import itertools
import operator

from hypothesis import given
from hypothesis import strategies as st

from blockgraph.driver import ChildSpec, Driver, Filter, Format, Protocol
from blockgraph.errors import GraphError, PermissionConflict
from blockgraph.graph.model import Model
from blockgraph.options import NodeOptions
from blockgraph.perm import ALL, NONE, Perm, Role

READ, WRITE, RESIZE = Perm.CONSISTENT_READ, Perm.WRITE, Perm.RESIZE


class Store(Protocol):
    name = "store"


class Plain(Filter):
    name = "plain"


class Layout(Format):
    name = "layout"
    children = {
        "file": ChildSpec(Role.DATA | Role.METADATA | Role.PRIMARY),
        "backing": ChildSpec(Role.COW, required=False),
    }


class TakeWrite(Filter):
    """As blkdebug with take-child-perms = ["write"]."""

    name = "take-write"

    @classmethod
    def child_perm(
        cls, options: NodeOptions, name: str, need: Perm, share: Perm, *, read_only: bool
    ) -> tuple[Perm, Perm]:
        return need | WRITE, share


class Cbw(Filter):
    """As backup-top: once it has parents, nobody else may write its file."""

    name = "cbw"
    children = {**Filter.children, "target": ChildSpec(Role.DATA)}

    @classmethod
    def child_perm(
        cls, options: NodeOptions, name: str, need: Perm, share: Perm, *, read_only: bool
    ) -> tuple[Perm, Perm]:
        if name == "target":
            return WRITE, ALL & ~RESIZE
        return need | READ, share & ~(WRITE | RESIZE)


def node(
    model: Model, name: str, driver: type[Driver], auto: bool = False, read_only: bool = False, **children: str
) -> None:
    model.add_node(name, driver, NodeOptions(driver=driver.name, auto_read_only=auto, read_only=read_only))
    for child, target in children.items():
        model.set_edge(name, child, target, driver.children[child].role)


def root(model: Model, name: str, target: str, need: Perm, share: Perm = ALL) -> None:
    model.attach_root(model.add_root(name, need, share, owner=f"export '{name}'"), target)


def shared_base() -> Model:
    """base is used by source (a filter) and by other, which writes it."""
    model = Model()
    node(model, "base", Store)
    node(model, "target", Store)
    node(model, "source", Plain, file="base")
    node(model, "other", TakeWrite, file="base")
    return model


def test_backup_filter_over_shared_base_conflict_names_node_permission_and_both_edges() -> None:
    model = shared_base()
    assert model.validate() == []
    node(model, "top", Cbw, file="source", target="target")
    root(model, "guest", "top", READ)
    (problem,) = model.validate()
    assert problem.kind is PermissionConflict
    assert problem.message == (
        "permission conflict on node 'base': other.file needs 'write', which source.file does not share"
    )
    error = problem.to_error()
    assert isinstance(error, PermissionConflict)
    assert (error.node, error.needs, error.blocks, error.permission) == ("base", "other.file", "source.file", "write")


def test_conflict_between_two_roots_names_their_owners() -> None:
    model = Model()
    node(model, "disk", Store)
    root(model, "a", "disk", READ | WRITE)
    root(model, "b", "disk", READ, ALL & ~(WRITE | RESIZE))
    (problem,) = model.validate()
    assert (problem.needs, problem.blocks, problem.permission) == ("export 'a'", "export 'b'", "write")


def test_conflict_in_both_directions_is_told_once() -> None:
    model = Model()
    node(model, "store", Store)
    node(model, "a", Layout, file="store")
    node(model, "b", Layout, file="store")
    (problem,) = model.validate()
    assert problem.permission == "write, resize"


def test_conflict_among_thousands_of_parents_is_bounded() -> None:
    model = Model()
    node(model, "store", Store)
    for index in range(2000):
        node(model, f"n{index}", Layout, file="store")
    assert 1 <= len(model.validate()) <= 16


def test_backing_node_shared_by_two_overlays_is_no_conflict() -> None:
    model = Model()
    for name in ("s0", "s1", "s2"):
        node(model, name, Store)
    node(model, "base", Layout, file="s0", read_only=True)
    node(model, "one", Layout, file="s1", backing="base")
    node(model, "two", Layout, file="s2", backing="base")
    root(model, "a", "one", READ | WRITE)
    root(model, "b", "two", READ | WRITE)
    assert model.validate() == []
    edge = model.edge("one", "backing")
    assert edge is not None
    assert edge.need == READ
    assert model.cumulative("s0") == (READ, ALL & ~(WRITE | RESIZE))


def test_write_need_on_read_only_node_is_told_once_and_does_not_travel_on() -> None:
    model = Model()
    node(model, "store", Store, read_only=True)
    node(model, "filter", Plain, file="store", read_only=True)
    root(model, "guest", "filter", READ | WRITE)
    (problem,) = model.validate()
    assert problem.kind is GraphError
    assert problem.message == "node 'filter' is read-only, but export 'guest' needs permission 'write' on it"


def test_format_over_read_only_file_is_refused_unless_auto_read_only() -> None:
    for auto, count in ((False, 1), (True, 0)):
        model = Model()
        node(model, "store", Store, read_only=True)
        node(model, "disk", Layout, file="store", auto=auto)
        root(model, "guest", "disk", READ)
        assert len(model.validate()) == count


def test_auto_read_only_format_with_a_writer_takes_write() -> None:
    model = Model()
    node(model, "store", Store)
    node(model, "disk", Layout, file="store", auto=True)
    root(model, "guest", "disk", READ | WRITE)
    assert model.validate() == []
    assert model.cumulative("store")[0] & WRITE


def test_permissions_are_still_computed_beside_a_cycle() -> None:
    model = shared_base()
    node(model, "x", Plain, file="y")
    node(model, "y", Plain, file="x")
    root(model, "guest", "source", READ, ALL & ~WRITE)
    assert {problem.kind.__name__ for problem in model.validate()} == {"CycleError", "PermissionConflict"}


@given(
    st.lists(st.tuples(st.integers(0, 15), st.integers(0, 15)), max_size=4),
)
def test_conflicts_between_roots_agree_with_the_definition(edges: list[tuple[int, int]]) -> None:
    model = Model()
    node(model, "disk", Store)
    for index, (need, share) in enumerate(edges):
        root(model, str(index), "disk", Perm(need), Perm(share))
    pairs = {
        frozenset((f"export '{a}'", f"export '{b}'"))
        for (a, (need, _)), (b, (_, share)) in itertools.permutations(enumerate(edges), 2)
        if need & ~share
    }
    problems = model.validate()
    assert len(problems) == len(pairs)
    assert {frozenset((problem.needs, problem.blocks)) for problem in problems} == pairs
    assert model.cumulative("disk")[0] == functools.reduce(operator.or_, (Perm(need) for need, _ in edges), NONE)

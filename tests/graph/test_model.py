# SPDX-FileCopyrightText: blockgraph contributors
# SPDX-License-Identifier: MIT
"""The model: edits, questions, structural problems."""

from __future__ import annotations

import networkx as nx
import pytest

from blockgraph.driver import ChildSpec, Driver, Filter, Format, Protocol
from blockgraph.errors import CycleError, GraphError, OptionError, RoleError
from blockgraph.graph.model import Model, root_key
from blockgraph.options import NodeOptions
from blockgraph.perm import ALL, Perm, Role

STORAGE = Role.DATA | Role.METADATA | Role.PRIMARY


class Store(Protocol):
    name = "store"


class Layout(Format):
    name = "layout"
    children = {"file": ChildSpec(STORAGE), "backing": ChildSpec(Role.COW, required=False, implied=True)}


class Plain(Filter):
    name = "plain"


def add(model: Model, name: str, driver: type[Driver], **children: str) -> None:
    model.add_node(name, driver, NodeOptions(driver=driver.name), where=f"nodes.{name}")
    for child, target in children.items():
        role = driver.children[child].role if child in driver.children else Role.DATA
        model.set_edge(name, child, target, role, where=f"nodes.{name}.{child}")


@pytest.fixture
def chain() -> Model:
    """@guest -> disk -file-> store0, disk -backing-> base -file-> store1"""
    model = Model()
    add(model, "store0", Store)
    add(model, "store1", Store)
    add(model, "base", Layout, file="store1")
    model.update("base", read_only=True)
    add(model, "disk", Layout, backing="base", file="store0")
    model.attach_root(model.add_root("guest", Perm.CONSISTENT_READ | Perm.WRITE, ALL, owner="export 'guest'"), "disk")
    return model


def messages(model: Model) -> list[str]:
    return [problem.message for problem in model.validate()]


def test_model_sound_graph_has_no_problems(chain: Model) -> None:
    assert chain.validate() == []


def test_children_come_in_declared_order(chain: Model) -> None:
    assert list(chain.children("disk")) == ["file", "backing"]


def test_copy_edits_leave_the_original_alone(chain: Model) -> None:
    candidate = chain.copy()
    candidate.remove("base")
    candidate.update("disk", read_only=True)
    assert chain.has("base")
    assert chain.edge("base", "file") is not None
    assert not chain.node("disk").read_only


def test_remove_used_node_leaves_edges_dangling(chain: Model) -> None:
    chain.remove("base")
    assert [edge.parent for edge in chain.dangling()] == ["disk"]
    assert messages(chain) == ["disk.backing refers to node 'base', which does not exist"]


def test_remove_edge_to_missing_node_forgets_it(chain: Model) -> None:
    chain.remove("base")
    chain.remove_edge("disk", "backing")
    assert "base" not in chain.graph
    assert chain.validate() == []


def test_remove_then_add_again_reuses_the_edges(chain: Model) -> None:
    chain.remove("base")
    add(chain, "base", Store)
    assert [edge.parent for edge in chain.parents("base")] == ["disk"]
    assert chain.validate() == []


def test_add_node_name_taken_raises(chain: Model) -> None:
    with pytest.raises(GraphError, match="already is a node"):
        add(chain, "disk", Store)


def test_roots_and_nodes_are_separate_namespaces(chain: Model) -> None:
    key = chain.add_root("disk", Perm.CONSISTENT_READ, ALL)
    chain.attach_root(key, "disk")
    assert key == root_key("disk") != "disk"
    assert [root.name for root in chain.roots_above("store1")] == ["guest", "disk"]


def test_set_edge_without_role_keeps_it(chain: Model) -> None:
    add(chain, "other", Store)
    chain.set_edge("disk", "file", "other")
    edge = chain.edge("disk", "file")
    assert edge is not None
    assert (edge.child, edge.role) == ("other", STORAGE)


def test_move_parents_moves_all_but_own_subtree_and_staying_roots(chain: Model) -> None:
    chain.attach_root(chain.add_root("job", Perm.CONSISTENT_READ, ALL, stays=True), "disk")
    add(chain, "overlay", Layout, file="store1", backing="disk")
    add(chain, "top", Plain, file="disk")
    moved = chain.move_parents("disk", "top")
    assert {edge.parent for edge in moved} == {"@guest", "overlay"}
    assert {edge.parent for edge in chain.parents("disk")} == {"top", "@job"}
    assert {edge.parent for edge in chain.parents("top")} == {"@guest", "overlay"}


def test_move_parents_below_the_filter_stay(chain: Model) -> None:
    """The filter's target has the node as its backing: that edge must not move, or it would close a loop."""

    class Fleece(Filter):
        name = "fleece"
        children = {**Filter.children, "target": ChildSpec(Role.DATA)}

    add(chain, "scratch", Layout, file="store1", backing="disk")
    add(chain, "top", Fleece, file="disk", target="scratch")
    assert {edge.parent for edge in chain.move_parents("disk", "top")} == {"@guest"}
    assert nx.is_directed_acyclic_graph(chain.graph)


def test_validate_cycle_is_spelled_out(chain: Model) -> None:
    add(chain, "a", Plain, file="b")
    add(chain, "b", Plain, file="c")
    add(chain, "c", Plain, file="a")
    (problem,) = chain.validate()
    assert problem.kind is CycleError
    assert problem.message == "nodes refer to each other in a cycle: a.file -> b.file -> c.file -> a"
    assert (problem.path, problem.related) == ("nodes.a.file", ("nodes.b.file", "nodes.c.file"))


def test_validate_node_that_is_its_own_child_is_a_cycle(chain: Model) -> None:
    add(chain, "a", Plain, file="a")
    assert messages(chain) == ["nodes refer to each other in a cycle: a.file -> a"]


@pytest.mark.parametrize(
    "name, says",
    [
        ("1disk", "must start with a letter"),
        ("d isk", "not ' '"),
        ("d" * 32, "32 characters"),
        ("", "empty"),
        ("disk\n", "not '\\n'"),
    ],
)
def test_validate_node_name_invalid_is_told(name: str, says: str) -> None:
    model = Model()
    add(model, name, Store)
    (problem,) = model.validate()
    assert problem.kind is OptionError
    assert says in problem.message


def test_validate_generated_name_is_accepted() -> None:
    model = Model()
    add(model, "#block0", Store)
    assert model.validate() == []


def test_validate_roles_every_problem_is_told(chain: Model) -> None:
    class Twice(Filter):
        name = "twice"
        children = {"file": ChildSpec(Role.FILTERED), "other": ChildSpec(Role.FILTERED | Role.DATA)}

    add(chain, "p", Store, file="store1")
    add(chain, "f", Plain, file="store1", backing="store0")
    add(chain, "l", Layout)
    add(chain, "t", Twice, file="store1", other="store1")
    chain.set_edge("base", "file", "store1", Role.COW)
    problems = [problem for problem in chain.validate() if problem.kind is RoleError]
    assert [problem.message for problem in problems] == [
        "child 'file' of node 'base' has role COW, its driver declares DATA|METADATA|PRIMARY",
        "driver 'store' has no children, but node 'p' has 'file'",
        "driver 'plain' of node 'f' has no child 'backing'",
        "node 'l' (driver 'layout') needs a child 'file'",
        "node 't' has 2 children of role FILTERED: 'file' and 'other'",
        "child 'other' of node 't': role FILTERED excludes DATA, METADATA and COW",
    ]

"""Plans: ranks, owners, the store's place, and what may not be asked for."""

from __future__ import annotations

from dataclasses import replace

import pytest

from elastic.domain import Member, Plan, PlanKind, PlanNode
from recovery.plan import Candidate, make_plan


def candidate(name: str) -> Candidate:
    return Candidate(f"{name}/0.1", name, 0, f"{name}.host", f"{name}.host:7000")


def make(*names: str, kind: PlanKind = PlanKind.FENCE, before: Plan | None = None, slots: int = 6) -> Plan:
    return make_plan(
        generation=2,
        kind=kind,
        members=[candidate(name) for name in names],
        slots=slots,
        virtual_replicas=3,
        prepare_timeout_ms=2000,
        reason="because",
        before=before,
    )


def test_ranks_are_the_order_given_and_the_first_serves_the_store() -> None:
    plan = make("b", "a", kind=PlanKind.FOUND)
    assert plan.members == (
        Member("b/0.1", "b", 0, 0, "b.host"),
        Member("a/0.1", "a", 1, 0, "a.host"),
    )
    assert (plan.store_node, plan.store_address) == ("b", "b.host:7000")
    assert (plan.generation, plan.virtual_replicas, plan.prepare_timeout_ms, plan.reason) == (2, 3, 2000, "because")


def test_a_fence_continues_the_deal_before_it() -> None:
    before = make("a", "b", "c", kind=PlanKind.FOUND)
    assert before.owners == (0, 0, 1, 1, 2, 2)
    assert make("a", "c", before=before).owners == (0, 0, 0, 1, 1, 1)
    assert make("c", "a", before=before).owners == (1, 1, 0, 1, 0, 0)


def test_a_switch_begins_at_a_boundary_and_deals_afresh() -> None:
    before = replace(make("a", "b", "c"), owners=(2, 1, 0, 2, 1, 0))
    assert make("a", "b", "c", kind=PlanKind.SWITCH, before=before).owners == (0, 0, 1, 1, 2, 2)


def test_a_world_has_members_and_some_may_have_no_slot() -> None:
    with pytest.raises(ValueError, match="at least one member"):
        make()
    assert make("a", "b", "c", "d", slots=3).owners == (0, 1, 2)


def test_the_workers_of_an_island_are_a_crew() -> None:
    sites = [PlanNode("n0", island="x"), PlanNode("n1"), PlanNode("n2", island="x")]
    members = tuple(Member(worker, node) for worker, node in (("a", "n0"), ("b", "n1"), ("c", "n1"), ("d", "n2"), ("e", "n0")))
    assert Plan(members=members, nodes=tuple(sites)).crews() == [("a", "d", "e"), ("b",), ("c",)]

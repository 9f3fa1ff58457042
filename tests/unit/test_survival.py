"""Survival of snapshots in memory: the published table, brute force on few nodes, and what docs/redundancy.md says."""

from __future__ import annotations

import re
from fractions import Fraction
from itertools import combinations, product
from math import ceil, exp, floor, isclose, log10, prod
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from elastic.cadence import snapshot_interval_s
from recovery.placement import ProtectionGroup, Site, make_groups, warnings
from recovery.survival import groups_survive, independent_loss, loss_probability, pairs_survive, ring_survives

DOCUMENT = (Path(__file__).parents[2] / "docs" / "redundancy.md").read_text()
NODES = 64
FAILURES_PER_S = 0.0065 / 86400
SCHEMES = {  # name in the document: survival of f losses among 64 nodes
    "ring, one copy on the next node": lambda f: ring_survives(NODES, f),
    "pairs, one copy on the partner": lambda f: pairs_survive(NODES, f),
    "(7,1)": lambda f: groups_survive([8] * 8, 1, f),
    "(3,1)": lambda f: groups_survive([4] * 16, 1, f),
    "(6,2)": lambda f: groups_survive([8] * 8, 2, f),
    "(2,2)": lambda f: groups_survive([4] * 16, 2, f),
    "(4,4)": lambda f: groups_survive([8] * 8, 4, f),
}

sizes = st.lists(st.integers(1, 5), min_size=1, max_size=4).filter(lambda sizes: sum(sizes) <= 11)


def by_enumeration(sizes: list[int], m: int, losses: int) -> Fraction:
    home = [group for group, size in enumerate(sizes) for _ in range(size)]
    sets = list(combinations(home, losses))
    return Fraction(sum(all(lost.count(group) <= m for group in range(len(sizes))) for lost in sets), len(sets))


@pytest.mark.parametrize(
    ("scheme", "expected"),
    [
        ("ring, one copy on the next node", (1, 0.9683, 0.9063, 0.8186)),
        ("pairs, one copy on the partner", (1, 0.9841, 0.9524, 0.9055)),
        ("(7,1)", (1, 0.8889, 0.6882, 0.4513)),
        ("(3,1)", (1, 0.9524, 0.8602, 0.7333)),
        ("(6,2)", (1, 1, 0.9892, 0.9596)),
        ("(2,2)", (1, 1, 0.9985, 0.9939)),
        ("(4,4)", (1, 1, 1, 1)),
    ],
)
def test_survival_of_f_losses_among_64_nodes_is_what_was_published(scheme: str, expected: tuple[float, ...]) -> None:
    assert tuple(round(float(SCHEMES[scheme](f)), 4) for f in (1, 2, 3, 4)) == expected


@given(sizes, st.integers(0, 3), st.data())
def test_groups_survive_as_often_as_an_enumeration_says(sizes: list[int], m: int, data: st.DataObject) -> None:
    losses = data.draw(st.integers(0, sum(sizes)))
    assert groups_survive(sizes, m, losses) == by_enumeration(sizes, m, losses)


@pytest.mark.parametrize("nodes", range(1, 11))
def test_a_ring_survives_as_often_as_an_enumeration_says(nodes: int) -> None:
    for losses in range(nodes + 1):
        sets = [set(lost) for lost in combinations(range(nodes), losses)]
        survived = sum(all((node + 1) % nodes not in lost for node in lost) for lost in sets)
        assert ring_survives(nodes, losses) == Fraction(survived, len(sets))


@pytest.mark.parametrize("nodes", range(2, 11, 2))
def test_pairs_survive_as_often_as_an_enumeration_says(nodes: int) -> None:
    for losses in range(nodes + 1):
        sets = [set(lost) for lost in combinations(range(nodes), losses)]
        survived = sum(all(node ^ 1 not in lost for node in lost) for lost in sets)
        assert pairs_survive(nodes, losses) == Fraction(survived, len(sets))


@given(sizes.filter(lambda sizes: sum(sizes) <= 8), st.integers(0, 3), st.floats(0, 1))
def test_independent_loss_is_the_sum_over_all_outcomes(sizes: list[int], m: int, q: float) -> None:
    home = [group for group, size in enumerate(sizes) for _ in range(size)]
    total = 0.0
    for lost in product((False, True), repeat=len(home)):
        if any(sum(gone for gone, at in zip(lost, home, strict=True) if at == g) > m for g in range(len(sizes))):
            total += prod(q if gone else 1 - q for gone in lost)
    assert isclose(independent_loss(sizes, m, q), total, rel_tol=1e-9, abs_tol=1e-300)


def test_a_loss_that_nobody_expects_keeps_its_digits() -> None:
    assert isclose(independent_loss([8] * 8, 2, 1e-7), 8 * 56 * 1e-21, rel_tol=1e-5)
    assert independent_loss([3, 1], 1, 1.0) == 1
    assert isclose(loss_probability(1e-9, 1e-9), 1e-18)
    assert isclose(loss_probability(0.01, 100), 1 - exp(-1))


def test_what_cannot_be_lost_is_refused() -> None:
    with pytest.raises(ValueError, match="of 4 nodes 5"):
        groups_survive([2, 2], 1, 5)
    with pytest.raises(ValueError, match="of 4 nodes -1"):
        ring_survives(4, -1)
    with pytest.raises(ValueError, match="no pairs"):
        pairs_survive(3, 1)


costs = st.floats(0, 100)
rates = st.floats(1e-9, 1)
steps = st.floats(1e-3, 100)


@given(costs, rates, steps, st.floats(1e-3, 1))
def test_no_snapshot_comes_within_a_step_or_stalls_more_than_is_allowed(
    cost_s: float, failures_per_s: float, step_s: float, stall_max: float
) -> None:
    interval_s = snapshot_interval_s(cost_s, failures_per_s, step_s=step_s, stall_max=stall_max)
    assert interval_s >= step_s and cost_s <= stall_max * interval_s * (1 + 1e-12)


@given(st.floats(1e-3, 100), rates, st.floats(0.1, 10))
def test_between_its_bounds_the_interval_is_the_cheapest(cost_s: float, failures_per_s: float, factor: float) -> None:
    def expected_loss(interval_s: float) -> float:
        return cost_s / interval_s + failures_per_s * interval_s / 2

    best_s = snapshot_interval_s(cost_s, failures_per_s, step_s=1e-12, stall_max=1e12)
    assert expected_loss(best_s) <= expected_loss(best_s * factor) * (1 + 1e-12)


def test_snapshots_that_cost_nothing_are_taken_every_step() -> None:
    assert snapshot_interval_s(0, 1e-5, step_s=0.3) == 0.3


@pytest.mark.parametrize("wrong", [{"cost_s": -1}, {"failures_per_s": 0}, {"step_s": 0}, {"stall_max": 0}])
def test_a_cadence_of_nonsense_is_refused(wrong: dict[str, float]) -> None:
    with pytest.raises(ValueError, match="more than 0"):
        snapshot_interval_s(**{"cost_s": 1.0, "failures_per_s": 1.0, "step_s": 1.0, **wrong})


# ----------------------------------------------------------------------------------------------------
# docs/redundancy.md


def table(heading: str) -> dict[str, list[str]]:
    """The table below a heading: the cells of each row behind its first."""
    section = DOCUMENT.split(f"## {heading}\n")[1].split("\n## ")[0]
    rows = [line.strip("| ").split("|") for line in section.splitlines() if line.startswith("|")]
    return {row[0].strip(): [cell.strip() for cell in row[1:]] for row in rows[2:]}


def code_of(scheme: str) -> tuple[int, int]:
    """(k, m); a whole copy is (1,1)."""
    found = re.fullmatch(r"\((\d),(\d)\)", scheme)
    return (int(found[1]), int(found[2])) if found else (1, 1)


def test_the_documented_survival_and_memory_are_computed() -> None:
    documented = table("How many losses")
    assert documented.keys() == SCHEMES.keys()
    for scheme, (memory, *survival) in documented.items():
        k, m = code_of(scheme)
        assert memory == f"{m / k:.0%}".replace("%", " %")
        computed = [SCHEMES[scheme](losses) for losses in (1, 2, 3, 4)]
        assert survival == ["1" if value == 1 else f"{float(value):.4f}".lstrip("0") for value in computed]
    part_gb = 100 / NODES
    assert f"are {part_gb:.1f} GB each; three buffers with (6,2) take {3 * (1 + 2 / 6) * part_gb:.1f} GB" in DOCUMENT


def test_the_documented_stripes_are_those_of_the_code() -> None:
    group = ProtectionGroup(tuple("abcdef"), 4, 2)
    columns = [dict(stripe.data) | dict(zip(stripe.parity, "PQ", strict=True)) for stripe in group.stripes()]
    lines = [f"node {node}" + "".join(f"{column[node]:>4}" for column in columns) for node in group.nodes]
    head = "stripe" + "".join(f"{stripe.number:>4}" for stripe in group.stripes())
    picture = DOCUMENT.split("```\n")[1].splitlines()
    assert [line.split() for line in picture] == [line.split() for line in (head, *lines)]


def test_the_documented_odds_of_the_vulnerable_time_are_computed() -> None:
    """One node of a group is lost already, so the group of the others survives one loss less."""
    documented = table("The vulnerable time")
    for scheme, odds in documented.items():
        k, m = code_of(scheme)
        risks = [
            independent_loss([k + m - 1], m - 1, loss_probability(FAILURES_PER_S, window_s))
            for window_s in (10, 60, 600)
        ]
        one_in = [1 / risk for risk in risks]
        assert odds == [f"1 in {round(number, 1 - floor(log10(number))):,.0f}" for number in one_in]
    assert documented.keys() == SCHEMES.keys() - {"ring, one copy on the next node", "(4,4)"}


def test_the_documented_cadence_is_computed() -> None:
    interval_s = snapshot_interval_s(0.01, NODES * FAILURES_PER_S, step_s=0.5)
    assert f"every {interval_s:.0f} s, {ceil(interval_s / 0.5)} steps" in DOCUMENT


def test_the_documented_share_of_a_domain_is_what_a_warning_begins_at() -> None:
    assert "a\nquarter with (6,2)" in DOCUMENT
    for size, warned in ((16, False), (17, True)):
        sites = [Site(f"n{i}", "large" if i < size else f"rack{i % 8}") for i in range(NODES)]
        assert len(make_groups(sites, 6, 2)) == 8
        assert bool(warnings(sites, 6, 2)) == warned

"""Protection groups: every block in one stripe, any m nodes may go, and domains spread as well as can be."""

from __future__ import annotations

from collections import Counter
from itertools import combinations
from math import inf

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from elastic.errors import ConfigError
from recovery.codec import Codec
from recovery.placement import ProtectionGroup, Site, make_groups, warnings


@st.composite
def groups(draw: st.DrawFn) -> ProtectionGroup:
    k, m = draw(st.integers(1, 8)), draw(st.integers(1, 4))
    return ProtectionGroup(tuple(f"n{i}" for i in range(k + m)), k, m)


@st.composite
def clusters(draw: st.DrawFn) -> tuple[list[Site], int, int, float]:
    """Sites in any order, k, m, overhead_max."""
    domains = draw(st.lists(st.sampled_from(["", "a", "b", "c", "d"]), max_size=30))
    sites = [Site(f"n{i}", domain) for i, domain in enumerate(domains)]
    overhead_max = draw(st.sampled_from([0.1, 0.34, 0.5, 1.0, inf]))
    return draw(st.permutations(sites)), draw(st.integers(1, 6)), draw(st.integers(1, 3)), overhead_max


@given(groups())
def test_every_block_is_in_one_stripe_and_every_node_holds_m_parities(group: ProtectionGroup) -> None:
    stripes = group.stripes()
    assert [stripe.number for stripe in stripes] == list(range(group.k + group.m))
    blocks = Counter(block for stripe in stripes for block in stripe.data)
    assert blocks == Counter((node, block) for node in group.nodes for block in range(group.k))
    assert Counter(node for stripe in stripes for node in stripe.parity) == dict.fromkeys(group.nodes, group.m)


@given(groups(), st.data())
def test_whatever_m_nodes_are_lost_every_stripe_keeps_k_blocks(group: ProtectionGroup, data: st.DataObject) -> None:
    lost = data.draw(st.sets(st.sampled_from(group.nodes), max_size=group.m))
    for stripe in group.stripes():
        holders = [node for node, _ in stripe.data] + list(stripe.parity)
        assert sorted(holders) == sorted(group.nodes)
        assert sum(node not in lost for node in holders) >= group.k


def test_the_stripes_of_three_nodes_are_raid_5() -> None:
    first, second, third = ProtectionGroup(("a", "b", "c"), 2, 1).stripes()
    assert (first.parity, first.data) == (("a",), (("b", 0), ("c", 1)))
    assert (second.parity, second.data) == (("b",), (("c", 0), ("a", 1)))
    assert (third.parity, third.data) == (("c",), (("a", 0), ("b", 1)))


@given(groups(), st.integers(0, 1 << 40))
def test_the_blocks_hold_the_shard_and_little_more(group: ProtectionGroup, shard_bytes: int) -> None:
    block_bytes = group.block_bytes(shard_bytes)
    assert block_bytes % 64 == 0
    assert shard_bytes <= group.k * block_bytes < shard_bytes + group.k * 65


@pytest.mark.parametrize(("k", "m"), [(2, 1), (3, 2)])
def test_shards_of_lost_nodes_come_back_through_the_real_code(k: int, m: int) -> None:
    group, codec = ProtectionGroup(tuple(f"n{i}" for i in range(k + m)), k, m), Codec(k, m)
    size = group.block_bytes(130)
    generator = torch.Generator().manual_seed(7)
    memory = {  # (node, block) -> bytes
        (node, block): torch.randint(256, (size,), dtype=torch.uint8, generator=generator)
        for node in group.nodes
        for block in range(k)
    }
    stripes = {}  # number -> holder -> (shard of the code, bytes)
    for stripe in group.stripes():
        parity = [torch.zeros(size, dtype=torch.uint8) for _ in range(m)]
        codec.encode([memory[block] for block in stripe.data], parity)
        data = {node: (i, memory[node, block]) for i, (node, block) in enumerate(stripe.data)}
        stripes[stripe.number] = data | {node: (k + i, parity[i]) for i, node in enumerate(stripe.parity)}
    for lost in combinations(group.nodes, m):
        for stripe in group.stripes():
            left = dict(shard for node, shard in stripes[stripe.number].items() if node not in lost)
            for i, (node, block) in enumerate(stripe.data):
                if node in lost:
                    rebuilt = torch.zeros(size, dtype=torch.uint8)
                    codec.decode(left, {i: rebuilt})
                    assert torch.equal(rebuilt, memory[node, block])


@given(clusters())
def test_every_node_is_in_one_group_and_the_order_of_the_sites_changes_nothing(
    cluster: tuple[list[Site], int, int, float],
) -> None:
    sites, k, m, overhead_max = cluster
    made = make_groups(sites, k, m, overhead_max)
    assert made == make_groups(sorted(sites, key=lambda site: site.node), k, m, overhead_max)
    if made:
        assert sorted(node for group in made for node in group.nodes) == sorted(site.node for site in sites)
        assert list(made) == sorted(made, key=lambda group: group.nodes)
        assert all(list(group.nodes) == sorted(group.nodes) and group.m == m for group in made)
        assert all(group.m / group.k <= overhead_max for group in made)
        assert max(group.k for group in made) - min(group.k for group in made) <= 1
    else:
        assert len(sites) <= m or m / (len(sites) - m) > overhead_max
    assert bool(warnings(sites, k, m, overhead_max)) or (made and all(group.k >= k for group in made))


@given(clusters())
def test_a_group_has_no_more_nodes_of_a_domain_than_a_dealer_must_give_it(
    cluster: tuple[list[Site], int, int, float],
) -> None:
    sites, k, m, overhead_max = cluster
    made = make_groups(sites, k, m, overhead_max)
    domain_of = {site.node: site.domain for site in sites}
    for domain, size in Counter(site.domain for site in sites if site.domain).items():
        worst = max((sum(domain_of[node] == domain for node in group.nodes) for group in made), default=0)
        assert worst <= -(-size // max(1, len(made)))
        said = any(f"domain {domain} has {worst} nodes" in warning for warning in warnings(sites, k, m, overhead_max))
        assert said == (worst > m)


@pytest.mark.parametrize(
    ("nodes", "k", "m", "overhead_max", "sizes"),
    [
        (0, 4, 2, inf, []),
        (2, 4, 2, inf, []),  # nobody would be left to read the parity
        (3, 4, 2, inf, [3]),  # (1, 2): two copies
        (3, 4, 2, 1.0, []),
        (6, 4, 2, inf, [6]),
        (7, 4, 2, inf, [7]),  # nearer to six than four and three
        (9, 4, 2, inf, [5, 4]),  # as near as nine, and smaller
        (9, 4, 2, 0.5, [9]),
        (10, 4, 2, inf, [5, 5]),
        (10, 4, 2, 0.5, [10]),
        (13, 4, 2, inf, [7, 6]),
        (64, 6, 2, inf, [8] * 8),
        (300, 200, 55, inf, [150, 150]),  # 300 would be nearer, but no code has so many shards
        (4, 4, 0, inf, []),
    ],
)
def test_group_sizes(nodes: int, k: int, m: int, overhead_max: float, sizes: list[int]) -> None:
    made = make_groups([Site(f"n{i:02}") for i in range(nodes)], k, m, overhead_max)
    assert [len(group.nodes) for group in made] == sizes


def test_nodes_that_are_left_over_make_another_group_if_that_saves_a_domain() -> None:
    sites = [Site(f"n{i}", f"rack{i % 3}") for i in range(7)]
    assert [len(group.nodes) for group in make_groups(sites, 4, 2)] == [4, 3]
    assert warnings(sites, 4, 2) == (
        "7 nodes are no groups of 6: k is as low as 1, so parity takes 200% of a snapshot instead of 50%.",
    )
    assert [len(group.nodes) for group in make_groups(sites, 4, 2, overhead_max=0.5)] == [7]
    assert warnings(sites, 4, 2, overhead_max=0.5) == (
        "Failure domain rack0 has 3 nodes in one protection group, but a group survives the loss of 2: the snapshots "
        "do not survive that domain; use more domains, a larger m, or a smaller k.",
    )


def test_a_node_without_a_domain_does_not_stand_in_the_domain_of_its_name() -> None:
    sites = [Site("a"), Site("b", "a"), Site("c", "a"), Site("d", "b")]
    assert [group.nodes for group in make_groups(sites, 1, 1)] == [("a", "b"), ("c", "d")]


def test_why_nothing_is_protected_is_said() -> None:
    assert warnings([Site("a"), Site("b")], 4, 2) == (
        "Snapshots are not protected: 2 nodes cannot survive the loss of 2; use more nodes or a smaller m.",
    )
    assert warnings([Site(name) for name in "abc"], 4, 2, overhead_max=0.5) == (
        "Snapshots are not protected: even a group of 3 nodes needs 200% of a snapshot for parity, but 50% are allowed; "
        "allow more, or use a smaller m.",
    )
    assert "m is 0" in warnings([Site("a")], 4, 0)[0]


def test_what_cannot_be_is_refused() -> None:
    with pytest.raises(ConfigError):
        make_groups([Site("a")], 0, 1)
    with pytest.raises(ValueError, match="twice"):
        make_groups([Site("a"), Site("a", "rack")], 1, 1)
    with pytest.raises(ValueError, match="cannot carry"):
        ProtectionGroup(("a", "b"), 2, 1)

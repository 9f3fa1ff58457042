"""Who exchanges with whom: everybody with one other, each time somebody else, and what gamma does to a crowd of replicas."""

from __future__ import annotations

from collections import Counter

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from elastic.errors import ConfigError
from elastic.sync import NoLoCo
from elastic.sync.pairs import ALONE, partners_of


@given(st.integers(0, 2**63), st.integers(1, 10**9), st.integers(1, 10**9), st.integers(1, 40))
def test_each_rank_has_a_partner_that_has_it_and_at_most_one_is_alone(
    seed: int, generation: int, step: int, world_size: int
) -> None:
    partners = partners_of(seed, generation, step, world_size)
    assert len(partners) == world_size
    assert partners.count(ALONE) == world_size % 2
    for rank, partner in enumerate(partners):
        assert partner == ALONE or (partner != rank and partners[partner] == rank)
    assert partners == partners_of(seed, generation, step, world_size)


@pytest.mark.parametrize("world_size", [4, 5])
def test_every_pair_is_as_frequent_as_any_other(world_size: int) -> None:
    met: Counter[tuple[int, int]] = Counter()
    for step in range(1, 6001):
        met.update((rank, partner) for rank, partner in enumerate(partners_of(7, 3, step, world_size)) if rank < partner)
    pairs = world_size * (world_size - 1) // 2
    expected = 6000 * (world_size // 2) / pairs
    assert len(met) == pairs
    assert all(abs(count - expected) < 0.1 * expected for count in met.values())


def test_another_world_or_another_run_has_other_pairs() -> None:
    def drawn(seed: int, generation: int) -> list[tuple[int, ...]]:
        return [partners_of(seed, generation, step, 6) for step in range(1, 50)]

    assert drawn(0, 1) != drawn(0, 2) and drawn(0, 1) != drawn(1, 1)


def _spread(alpha: float, gamma: float, replicas: int = 64, rounds: int = 300) -> float:
    """How far replicas are apart, over that at the beginning, of which each takes steps of its own at random."""
    generator = torch.Generator().manual_seed(0)
    phi = torch.randn(replicas, 50, generator=generator, dtype=torch.float64)
    delta = torch.zeros_like(phi)
    begun = float(phi.std(0).mean())
    for step in range(1, rounds + 1):
        partners = torch.tensor(partners_of(0, 1, step, replicas))
        delta = alpha * delta + 0.1 * torch.randn(phi.shape, generator=generator, dtype=torch.float64)
        delta -= gamma * (phi - phi[partners]) / 2
        phi = phi + delta
    return float(phi.std(0).mean()) / begun


@pytest.mark.parametrize("alpha", [0.0, 0.5, 0.9])
def test_the_bound_of_gamma_is_where_replicas_drift_apart(alpha: float) -> None:
    bound = 2 * (1 - alpha**2)
    assert _spread(alpha, 0.85 * bound) < 5, "the noise of each round is there to stay, and no more"
    assert _spread(alpha, 1.3 * bound, rounds=900) > 1e3
    NoLoCo(alpha=alpha, gamma=0.99 * bound)
    with pytest.raises(ConfigError, match="differences grow"):
        NoLoCo(alpha=alpha, gamma=bound)

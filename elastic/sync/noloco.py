"""Rounds after which two and two replicas come nearer to each other, and nobody waits for a sum over all: NoLoCo.

A worker is a replica. Its slow parameters and their momentum are its own; the model's parameters, between rounds, are the mean
of all as of the last round in which it was made. Nothing of a pair is applied before the verdict on the round, which all
workers give together: so both sides take the step of the pair, or neither, also if one of them dies in between. A worker that
joins begins as a copy of another one.
"""

from __future__ import annotations

import contextlib
import math
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from elastic.engine import Slot
from elastic.errors import CollectiveAborted
from elastic.failpoints import FailPoint, reach
from elastic.group import Work
from elastic.memory import SnapshotMemory
from elastic.quantize import Code, decode, encode
from elastic.reduction import Reduced, Reducer
from elastic.snapshots import SnapshotId
from elastic.state import TrainingState
from elastic.sync import NoLoCo
from elastic.sync.local import LocalEngine
from elastic.sync.pairs import ALONE, partners_of

SLOW = "slow"
"""What a replica's slow parameters and their momentum are called where they are passed on."""
SPREAD = "elastic.spread"
"""The measure of how far apart replicas are: the mean square of phi less the mean of all."""
TAG_PHI, TAG_MOVED = range(0x05355000, 0x05355002)
"""Apart from the tags of anything else on the same group."""


class Slow(Optimizer):
    """A replica's slow parameters and momentum, float32 or wider, as something that can be passed on."""

    def __init__(self, parameters: Sequence[nn.Parameter]) -> None:
        super().__init__(parameters, {})
        for parameter in parameters:
            phi = parameter.detach().to(torch.promote_types(parameter.dtype, torch.float32), copy=True)
            self.state[parameter] = {"phi": phi, "momentum": torch.zeros_like(phi)}
        self._parameters = tuple(parameters)

    def of(self, key: str) -> list[Tensor]:
        """Return "phi" or "momentum" of each parameter, to be read and written in place."""
        return [self.state[parameter][key] for parameter in self._parameters]


@dataclass(slots=True)
class _Exchange:
    """What comes from the partner in one round of one world."""

    key: tuple[int, int]  # generation, step
    partner: int
    phi: Tensor
    phi_comes: Work | None
    is_done: bool = False


class PairEngine(LocalEngine):
    """Drives the rounds of NoLoCo."""

    sync: NoLoCo

    def _begin_agreement(self) -> Mapping[str, Optimizer]:
        parts = self.parts
        self.capture_every = self.sync.mean_every
        self._slow = Slow(parts.parameters)
        self._live = TrainingState(self._models, {SLOW: self._slow}, self._stateful, self.buffers.copies)
        # In most rounds nothing is summed but whether all was finite, with measures and buffers.
        self._pulse = nn.Parameter(torch.zeros(1, device=parts.parameters[0].device))
        self._mean_reducer, self._pulse_reducer = self.reducer, self._make_reducer([self._pulse])
        self._moved: dict[int, list[Tensor]] = {}  # slot -> theta - phi of its local steps
        self._exchange: _Exchange | None = None
        self._next: tuple[list[Tensor], list[Tensor]] | None = None  # phi and momentum after the round, if it is committed
        self._distance = math.nan
        return {}

    def _makes_mean(self, step: int) -> bool:
        return step % self.sync.mean_every == 0

    def _reducer_of(self, step: int) -> Reducer:
        return self._mean_reducer if self._makes_mean(step) else self._pulse_reducer

    # -- a replica's own -----------------------------------------------------------------------------------------------

    def _start_of(self, slot: int) -> Sequence[Tensor]:
        return self._slow.of("phi")

    def _open_slot(self, slot: Slot) -> Slot:
        opened = super()._open_slot(slot)
        if slot.counts:
            self.measures.give(SPREAD, self._distance)
            with contextlib.suppress(CollectiveAborted):  # it will be told where the round is reduced
                self._begin_exchange()
        return opened

    def _show(self) -> None:
        super()._show()
        if self._page is not None:
            self._page.spreads(math.sqrt(self.measures.mean(SPREAD)))

    def _contribute(self, slot: int, weight: float | None) -> None:
        phi, momentum = self._slow.of("phi"), self._slow.of("momentum")
        theta = self.parts.parameters
        self._moved[slot] = [own.to(start.dtype) - start for own, start in zip(theta, phi, strict=True)]
        if self._makes_mean(self.step):
            # The steps of pairs leave the mean of all where it is, so that it is the mean of what replicas do by themselves.
            alpha, beta, weight = self.sync.alpha, self.sync.beta, 1.0 if weight is None else weight
            for parameter, start, before, moved in zip(theta, phi, momentum, self._moved[slot], strict=True):
                parameter.grad = ((start + alpha * before + beta * moved) * weight).to(parameter.dtype)
        else:
            is_finite = all(bool(moved.isfinite().all()) for moved in self._moved[slot])
            self._pulse.grad = torch.full_like(self._pulse, 0.0 if is_finite else math.nan)

    def _weight_of(self, slot: Slot) -> float | None:
        """What was dealt to it, also if it has not come to all of that: so does its pair weigh it, and the mean stays."""
        return super()._weight_of(slot) if self._dealer is None else float(self.sampler.sizes(slot.step)[slot.slot])

    def _forget_replicas(self) -> None:
        self._moved, self._next = {}, None

    def _keep_replicas(self, own: set[int], again: set[int]) -> None:
        self._moved = {slot: moved for slot, moved in self._moved.items() if slot in own - again}

    # -- pairs ---------------------------------------------------------------------------------------------------------

    def _begin_exchange(self) -> _Exchange:
        """Send phi to the partner, which needs it at the end of the round; once in a round and a world."""
        plan, group = self.plan, self.group
        assert plan is not None and group is not None
        key = plan.generation, self.step
        if self._exchange is not None and self._exchange.key == key:
            return self._exchange
        partner = partners_of(self.sampler.seed, *key, plan.world_size)[self.rank]
        mine = _flat(self._slow.of("phi"))
        exchange = _Exchange(key, partner, torch.empty_like(mine), None)
        if partner != ALONE:
            exchange.phi_comes = group.take(exchange.phi, partner, TAG_PHI)
            group.post(mine, partner, TAG_PHI)
        self._exchange = exchange
        return exchange

    def _reduce(self) -> Reduced:
        exchange = self._begin_exchange()
        if not exchange.is_done:
            self._next = self._step_of(exchange)
            exchange.is_done = True
        return super()._reduce()

    def _step_of(self, exchange: _Exchange) -> tuple[list[Tensor], list[Tensor]]:
        """Return phi and momentum after the round. Raises CollectiveAborted."""
        sync, group = self.sync, self.group
        assert group is not None
        phi = self._slow.of("phi")
        moved = self._mean_moved()
        if exchange.partner == ALONE:
            share, their_moved, their_phi = 1.0, moved, phi
        else:
            share = self._share_of(exchange.partner)
            moved, their_moved = self._exchange_moved(_flat(moved), exchange.partner)
            assert exchange.phi_comes is not None
            exchange.phi_comes.wait()
            their_phi = _split(exchange.phi, phi)
        after: tuple[list[Tensor], list[Tensor]] = ([], [])
        with torch.no_grad():
            for start, momentum, my_move, their_start, their_move in zip(
                phi, self._slow.of("momentum"), moved, their_phi, their_moved, strict=True
            ):
                together = share * my_move + (1 - share) * their_move
                apart = (1 - share) * (start - their_start)
                delta = sync.alpha * momentum + sync.beta * together - sync.gamma * apart
                after[0].append(start + delta)
                after[1].append(delta)
        return after

    def _mean_moved(self) -> list[Tensor]:
        """Delta of this replica: the mean over its slots, weighted by samples."""
        sizes = self.sampler.sizes(self.step)
        total = [torch.zeros_like(start) for start in self._slow.of("phi")]
        weight = sum(sizes[slot] for slot in self._moved)
        for slot in sorted(self._moved):
            for mine, moved in zip(total, self._moved[slot], strict=True):
                mine.add_(moved, alpha=sizes[slot] / weight)
        return total

    def _share_of(self, partner: int) -> float:
        """What this worker weighs in the pair, by the samples of the round."""
        assert self.plan is not None
        sizes, mine, theirs = self.sampler.sizes(self.step), 0, 0
        for slot, owner in enumerate(self._owners(self.step, self.plan)):
            mine += sizes[slot] * (owner == self.rank)
            theirs += sizes[slot] * (owner == partner)
        return mine / (mine + theirs) if mine + theirs else 0.5

    def _exchange_moved(self, mine: Tensor, partner: int) -> tuple[list[Tensor], list[Tensor]]:
        """Return this worker's Delta and its partner's, as both read them."""
        group, like = self.group, self._slow.of("phi")
        assert group is not None
        code = Code(self.sync.quantize) if self.sync.quantize else None
        sent = mine if code is None else encode(code, mine)
        theirs = torch.empty_like(sent)
        comes = group.take(theirs, partner, TAG_MOVED)
        group.post(sent, partner, TAG_MOVED)
        reach(FailPoint.PAIR_EXCHANGING)
        comes.wait()
        if code is not None:
            mine, theirs = (decode(code, each, mine.numel()) for each in (sent, theirs))
        return _split(mine, like), _split(theirs, like)

    def _agree(self, ahead: list[list[Tensor]]) -> None:
        assert self._next is not None
        for key, values in zip(("phi", "momentum"), self._next, strict=True):
            for mine, value in zip(self._slow.of(key), values, strict=True):
                mine.copy_(value)
        if self._makes_mean(self.step):
            squares = count = 0.0
            for parameter, phi in zip(self.parts.parameters, self._slow.of("phi"), strict=True):
                assert parameter.grad is not None
                parameter.copy_(parameter.grad)
                squares += float((phi - parameter).square().sum())
                count += phi.numel()
            self._distance = squares / count
        self._moved, self._next = {}, None

    def _groups_hash(self) -> int:
        return zlib.crc32(repr(self.sync).encode())

    # -- the state -----------------------------------------------------------------------------------------------------

    def _donors(self, joiners: Sequence[int]) -> tuple[int, ...]:
        return super()._donors(joiners)[:1]  # no two replicas are the same

    def _living_state(self) -> TrainingState:
        return self._live

    def _read_snapshot(self, memory: SnapshotMemory, snapshot: SnapshotId) -> None:
        """All go on from the mean, and their momentum begins anew."""
        super()._read_snapshot(memory, snapshot)
        with torch.no_grad():
            for parameter, phi, momentum in zip(
                self.parts.parameters, self._slow.of("phi"), self._slow.of("momentum"), strict=True
            ):
                phi.copy_(parameter)
                momentum.zero_()


def _flat(tensors: Sequence[Tensor]) -> Tensor:
    """All numbers one behind the other, on the CPU: a copy."""
    return torch.cat([tensor.detach().reshape(-1) for tensor in tensors]).cpu()


def _split(flat: Tensor, like: Sequence[Tensor]) -> list[Tensor]:
    """The inverse of `_flat`."""
    parts = torch.split(flat, [tensor.numel() for tensor in like])
    return [part.view(tensor.shape).to(tensor.device, tensor.dtype) for part, tensor in zip(parts, like, strict=True)]

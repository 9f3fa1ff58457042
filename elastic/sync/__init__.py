"""How replicas agree on what they train, for `session.prepare(..., sync=...)`.

With `AllReduce` the gradient of every step is summed over all workers. With `DiLoCo` (arXiv 2311.08105) each replica trains by
itself for some steps, and then all agree on a step of an outer optimizer: so much less is sent, and so much more rarely. With
`StreamingDiLoCo` (arXiv 2501.18512) they agree on one part of the model after the other. With `NoLoCo` (arXiv 2506.10911) they
never all agree: two and two come nearer to each other. With `AsyncLocalSGD` (arXiv 2401.09135) they take turns.

With `dynamic=True` a round is dealt by speed. Each worker then is one replica, whatever the number of slots, and takes as many
local steps as fit beside the others; what a lost or a late one has not used is dealt with the next round. So nobody waits long
for a slow one, no round is computed twice, and each sample is used once; but the result depends on who was how fast.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from elastic.errors import ConfigError

Quantize = Literal["int8", "fp4"]


@dataclass(frozen=True, slots=True)
class AllReduce:
    """Every step: the gradient is the mean over the samples of all slots."""


@dataclass(frozen=True, slots=True)
class DiLoCo:
    """Every so many steps: the mean of what the replicas have moved, as the gradient of an outer SGD.

    A round begins with the same parameters phi everywhere. Each slot is a replica: it takes `every` steps of the prepared
    optimizer, each on a batch of the loader, and comes to theta. Then Delta is the mean of phi - theta over all slots, and

        v <- momentum v + Delta,    phi <- phi - outer_lr (Delta + momentum v)      (with nesterov; else outer_lr v)

    (sections 5 and 9 of arXiv 2311.08105, with torch's SGD). What the prepared optimizer has learnt stays with its replica.

    Attributes:
        every: local steps of a round. outer_lr, momentum, nesterov: of the outer SGD.
        quantize: what Delta is sent in: "int8" (a quarter of the bytes), "fp4" (an eighth); None: as it is.
        feedback: whether what that leaves out of a replica's Delta is sent with its next one.
        dynamic: whether rounds are dealt by speed; otherwise the bits are the same whoever computes what.
    """

    every: int = 100
    outer_lr: float = 0.7
    momentum: float = 0.9
    nesterov: bool = True
    quantize: Quantize | None = None
    feedback: bool = False
    dynamic: bool = False

    def __post_init__(self) -> None:
        _check(self)

    @property
    def local_steps(self) -> int:
        """Local steps from one agreement to the next."""
        return self.every

    @property
    def fragments(self) -> int:
        """Into how many parts the model is taken, of which one is agreed on at a time."""
        return 1

    @property
    def mixing(self) -> float:
        """How much a replica keeps of its own parameters when they are agreed on."""
        return 0.0

    @property
    def overlap(self) -> int:
        """Local steps of the next round that are taken while something is exchanged."""
        return 0


@dataclass(frozen=True, slots=True)
class StreamingDiLoCo:
    """As `DiLoCo`, but one part of the model after the other is agreed on, so that less is sent at a time.

    After every `every / fragments` local steps it is the next fragment's turn, so that each has its own every `every` steps. For
    it Delta is the mean of phi - theta over all slots, phi takes the outer step, and each replica goes on with

        theta <- mixing theta + (1 - mixing) phi

    while the other fragments stay local (section 2 of arXiv 2501.18512). Layers go to fragments in turns. With an overlap each
    worker goes on with so many local steps while the fragment is exchanged, and brings it up to date behind them: then keep
    something of what was learnt meanwhile (mixing=0.5).

    Attributes:
        every: local steps from one agreement on a fragment to its next; a multiple of `fragments`.
        fragments: how many. overlap: local steps during an exchange, fewer than a round has; the paper's runs have 1 to 5.
        mixing: how much of its own a replica keeps, from 0 to below 1.
        outer_lr, momentum, nesterov: of the outer SGD. quantize, feedback, dynamic: as of `DiLoCo`.
    """

    every: int = 100
    fragments: int = 4
    overlap: int = 0
    mixing: float = 0.0
    outer_lr: float = 0.4
    momentum: float = 0.9
    nesterov: bool = True
    quantize: Quantize | None = None
    feedback: bool = False
    dynamic: bool = False

    def __post_init__(self) -> None:
        _check(self)
        if self.dynamic and self.overlap:
            raise ConfigError(
                f"StreamingDiLoCo(overlap={self.overlap}, dynamic=True): a round is dealt by how fast the one before was, and "
                "with an overlap begins before that is known; leave one out"
            )
        if self.fragments < 2:
            raise ConfigError(f"StreamingDiLoCo(fragments={self.fragments}): give at least 2, or use DiLoCo")
        if self.every % self.fragments:
            raise ConfigError(
                f"StreamingDiLoCo(every={self.every}, fragments={self.fragments}): every has to be a multiple of fragments"
            )
        if not 0 <= self.overlap < self.local_steps:
            raise ConfigError(
                f"StreamingDiLoCo(every={self.every}, fragments={self.fragments}, overlap={self.overlap}): an exchange has to "
                f"end before the next one begins, {self.local_steps} local steps later: give 0 to {self.local_steps - 1}"
            )
        if not 0 <= self.mixing < 1:
            raise ConfigError(f"StreamingDiLoCo(mixing={self.mixing}): it is at least 0 and below 1, where nothing is agreed on")

    @property
    def local_steps(self) -> int:
        """Local steps from one agreement to the next."""
        return self.every // self.fragments


@dataclass(frozen=True, slots=True)
class NoLoCo:
    """Every so many steps two and two replicas come nearer to each other: nothing is ever summed over all of them.

    A worker is a replica i with slow parameters phi_i of its own. In a round each slot of it takes `every` steps of the prepared
    optimizer from phi_i to theta, and Delta_i is the mean of theta - phi_i over them. Then, with the mean over the pair,

        delta_i <- alpha delta_i + beta mean(Delta) - gamma (phi_i - mean(phi)),    phi_i <- phi_i + delta_i

    (equation 2, with the sign that descends). The partner is drawn for each round and world; an odd worker takes the step by
    itself. Means are weighted by samples, so that no pair moves the mean of all. phi is sent while the round is computed, and
    Delta at its end. After every `mean_every` rounds the mean of all phi is made, too: that is the model that user code sees
    between rounds, that is evaluated, captured and saved. No replica takes it over.

    Attributes:
        every: local steps of a round. alpha: what the outer momentum keeps. beta: the outer rate.
        gamma: how strongly the two come together; below 2 (1 - alpha^2), above which replicas drift apart without end.
        mean_every: rounds from one mean to the next. quantize: what Delta is sent in, as of `DiLoCo`. dynamic: as there.
    """

    every: int = 50
    alpha: float = 0.5
    beta: float = 0.7
    gamma: float = 0.7
    mean_every: int = 10
    quantize: Quantize | None = None
    dynamic: bool = False

    def __post_init__(self) -> None:
        _check_common(self)
        for name in ("alpha", "beta", "gamma"):
            if not math.isfinite(getattr(self, name)):
                raise ConfigError(f"NoLoCo({name}={getattr(self, name)}): give a finite number")
        if not 0 <= self.alpha < 1:
            raise ConfigError(f"NoLoCo(alpha={self.alpha}): it is at least 0 and below 1; the paper's is 0.5")
        if self.beta <= 0:
            raise ConfigError(f"NoLoCo(beta={self.beta}): give a rate above 0; the paper's is 0.7")
        bound = 2 * (1 - self.alpha**2)
        if not 0 < self.gamma < bound:
            raise ConfigError(
                f"NoLoCo(alpha={self.alpha}, gamma={self.gamma}): gamma is above 0, or replicas never come together, and below "
                f"2 (1 - alpha^2) = {bound:g}, from where their differences grow from round to round; the paper's is 0.7"
            )
        if self.mean_every < 1:
            raise ConfigError(f"NoLoCo(mean_every={self.mean_every}): give at least 1 round")

    @property
    def local_steps(self) -> int:
        """Local steps of a round."""
        return self.every


@dataclass(frozen=True, slots=True)
class AsyncLocalSGD:
    """Replicas take turns: after every `every / turns` local steps some of them give what they have moved, and all others go on.

    The one whose turn it is begins anew with what has been agreed on since, so that what it gave was made from older parameters.
    With Delta the mean of phi - theta over those whose turn it is, and m the momentum,

        b <- b + Delta
        in every `delay`-th turn:   m <- momentum m + b / delay,   b <- 0
                                    phi <- phi - outer_lr ((1 - share delay + share) momentum m + Delta / delay)
        in any other turn:          phi <- phi - outer_lr (share momentum m + Delta / delay)

    (delayed Nesterov, algorithm 3 of arXiv 2401.09135). Rounds are dealt by speed, as with `dynamic=True` elsewhere. A replica
    that is lost is lost with what it had not given, and the samples of that are dealt again. With an epoch all turns end.

    Attributes:
        every: local steps from a replica's turn to its next; a multiple of `turns`. turns: how many; slots take them in order.
        outer_lr, momentum: of the outer optimizer. delay: turns from one update of the momentum to the next; 0: `turns`.
        share: of the momentum that acts in other turns, too; from 0 to 1 / delay. quantize: as of `DiLoCo`.
    """

    every: int = 100
    turns: int = 2
    outer_lr: float = 0.7
    momentum: float = 0.9
    delay: int = 0
    share: float = 0.0
    quantize: Quantize | None = None

    def __post_init__(self) -> None:
        _check_outer(self)
        if self.turns < 1 or self.every % self.turns:
            raise ConfigError(f"AsyncLocalSGD(every={self.every}, turns={self.turns}): every has to be a multiple of turns")
        if self.delay < 0:
            raise ConfigError(f"AsyncLocalSGD(delay={self.delay}): give a number of turns, or 0 for as many as there are")
        if not 0 <= self.share * self.turns_of_momentum <= 1:
            raise ConfigError(
                f"AsyncLocalSGD(delay={self.turns_of_momentum}, share={self.share}): it is at least 0 and at most 1 / delay; the "
                "paper's is 0"
            )

    @property
    def turns_of_momentum(self) -> int:
        """Turns from one update of the momentum to the next."""
        return self.delay or self.turns

    @property
    def local_steps(self) -> int:
        """Local steps of a turn."""
        return self.every // self.turns

    @property
    def dynamic(self) -> bool:
        """Turns are always dealt by speed."""
        return True


Rounds = DiLoCo | StreamingDiLoCo | NoLoCo | AsyncLocalSGD
"""What has local steps."""
Sync = AllReduce | Rounds


def takes_crews(sync: Sync) -> bool:
    """Whether several workers of an island can train one replica between them."""
    return not isinstance(sync, AllReduce | NoLoCo) and sync.dynamic


def _check_common(sync: Rounds) -> None:
    name = type(sync).__name__
    if sync.every < 1:
        raise ConfigError(f"{name}(every={sync.every}): a round has at least one local step")
    if sync.quantize not in (None, "int8", "fp4"):
        raise ConfigError(f"{name}(quantize={sync.quantize!r}): choose int8 or fp4, or None")


def _check(sync: DiLoCo | StreamingDiLoCo) -> None:
    _check_outer(sync)
    name = type(sync).__name__
    if sync.feedback and sync.quantize is None:
        raise ConfigError(f"{name}(feedback=True, quantize=None): nothing is left out of what is sent as it is; choose a code")
    if sync.feedback and sync.dynamic:
        raise ConfigError(
            f"{name}(feedback=True, dynamic=True): what a replica leaves out weighs other than its next Delta; leave one out"
        )
    if sync.nesterov and not sync.momentum:
        raise ConfigError(f"{name}(nesterov=True, momentum=0): Nesterov's step needs a momentum; pass nesterov=False")


def _check_outer(sync: DiLoCo | StreamingDiLoCo | AsyncLocalSGD) -> None:
    _check_common(sync)
    name = type(sync).__name__
    if not (math.isfinite(sync.outer_lr) and sync.outer_lr > 0):
        raise ConfigError(f"{name}(outer_lr={sync.outer_lr}): give a rate above 0; the papers' are 0.7, and 0.4 for streaming")
    if not 0 <= sync.momentum < 1:
        raise ConfigError(f"{name}(momentum={sync.momentum}): it is at least 0 and below 1; the papers' is 0.9")

"""How replicas agree on what they train, for `session.prepare(..., sync=...)`.

With `AllReduce` the gradient of every step is summed over all workers. With `DiLoCo` (arXiv 2311.08105) each replica trains by
itself for some steps, and then all agree on a step of an outer optimizer: so much less is sent, and so much more rarely.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from elastic.errors import ConfigError


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
    """

    every: int = 100
    outer_lr: float = 0.7
    momentum: float = 0.9
    nesterov: bool = True

    def __post_init__(self) -> None:
        if self.every < 1:
            raise ConfigError(f"DiLoCo(every={self.every}): a round has at least one local step")
        if not (math.isfinite(self.outer_lr) and self.outer_lr > 0):
            raise ConfigError(f"DiLoCo(outer_lr={self.outer_lr}): give a rate above 0; the paper's is 0.7")
        if not 0 <= self.momentum < 1:
            raise ConfigError(f"DiLoCo(momentum={self.momentum}): it is at least 0 and below 1; the paper's is 0.9")
        if self.nesterov and not self.momentum:
            raise ConfigError("DiLoCo(nesterov=True, momentum=0): Nesterov's step needs a momentum; pass nesterov=False")


Sync = AllReduce | DiLoCo

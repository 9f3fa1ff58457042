"""What can go wrong, and when: at a time, or right after something has happened for the nth time."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from random import Random


@dataclass(frozen=True)
class Moment:
    """After something has happened for the nth time, and a delay."""

    what: str
    nth: int
    delay_s: float


@dataclass(frozen=True)
class Fault:
    """One thing that goes wrong; whom it hits is drawn when it does.

    Attributes:
        kind: One of WEIGHTS.
        when: Seconds from the start, or a moment.
        then: Seconds later, what follows.
    """

    kind: str
    when: float | Moment
    then: tuple[float, str] | None = None


@dataclass(frozen=True)
class Theme:
    """What a seed tries to hit: moments with how often they come, and kinds that are drawn besides the usual ones."""

    moments: Mapping[str, int]
    kinds: tuple[str, ...]


STARTING = {
    "agent connects": 4,
    "forked": 6,
    "said:Registered": 6,
    "said:Prepared": 6,
    "entered": 6,
    "sent:Prepare": 6,
    "sent:Commit": 6,
    "ledger:generation-openedFOUND": 1,
    "ledger:generation-committed": 1,
    "ledger:node-attached": 4,
    "ledger:worker-started": 6,
}
TRAINING = {
    "said:Resumed": 8,
    "said:CollectiveFailed": 2,
    "reduced": 30,
    "voted": 30,
    "applying": 30,
    "applied": 30,
    "ledger:generation-openedFENCE": 3,
    "ledger:workers-lost": 3,
    "ledger:node-lost": 2,
    "said:Prepared": 16,
    "said:Switched": 16,
    "entered": 16,
    "sent:Commit": 16,
}
MEMBERS = {
    "said:Warm": 3,
    "transfer": 8,
    "ledger:generation-openedSWITCH": 4,
    "ledger:generation-openedFENCE": 3,
    "ledger:generation-committed": 6,
    "ledger:generation-adopted": 3,
    "ledger:generation-abandoned": 1,
    "ledger:node-draining": 2,
    "said:Prepared": 24,
    "said:Switched": 24,
    "said:PrepareFailed": 2,
    "sent:Commit": 24,
}
RESTARTS = {
    "agent connects": 12,
    "ledger:controller-restarted": 2,
    "ledger:job-waits": 1,
    "ledger:generation-openedFENCE": 2,
    "ledger:generation-openedSWITCH": 2,
    "ledger:generation-committed": 3,
    "voted": 24,
    "applied": 24,
}
ENDING = {
    "said:Leaving": 4,
    "concluding": 2,
    "said:Concluded": 1,
    "ledger:concluding": 2,
    "left the loop": 4,
    "ledger:loop-ended": 1,
    "ledger:worker-finished": 2,
    "ledger:job-ended": 1,
    "agent connects": 6,
}
MEMORY = {
    "applied": 30,
    "voted": 30,
    "captured": 20,
    "restored": 4,
    "saved": 2,
    "forked": 12,
    "said:Warm": 6,
    "said:Prepared": 12,
    "entered": 12,
    "ledger:restoring": 2,
    "ledger:snapshot-chosen": 2,
    "ledger:generation-openedFENCE": 3,
    "ledger:generation-committed": 4,
}
KILLS = ("worker killed", "worker killed between effects", "agent killed", "node stopped")
THEMES = (
    Theme(STARTING, KILLS),
    Theme(TRAINING, KILLS),
    Theme(MEMBERS, ("drain", "drain", "node added", "worker killed", "worker killed between effects")),
    Theme(
        RESTARTS,
        ("controller killed", "controller killed between effects", "controller stopped", "controller partitioned"),
    ),
    Theme(ENDING, (*KILLS, "controller killed", "controller killed between effects", "stream cut")),
    Theme(
        MEMORY,
        ("all workers killed", "all workers killed", "all workers killed", "agent killed", "worker killed", "power lost"),
    ),
    Theme(STARTING | TRAINING | MEMBERS | RESTARTS | ENDING | MEMORY, ()),
)

# How often each kind is drawn, against the others.
WEIGHTS = {
    "worker killed": 5,
    "worker killed between effects": 6,
    "all workers killed": 2,
    "worker stopped": 3,
    "script ends early": 0.5,
    "agent killed": 2,
    "agent killed between effects": 2,
    "agent asked to end": 1,
    "agent stopped": 2,
    "power lost": 2,
    "node stopped": 3,
    "controller killed": 3,
    "controller killed between effects": 5,
    "controller stopped": 2,
    "stream cut": 3,
    "stream silent": 2,
    "stream deaf one way": 2,
    "node partitioned": 2,
    "controller partitioned": 1.5,
    "collectives glitch": 2,
    "link dead": 3,
    "drain": 3,
    "node added": 3,
    "job stopped": 0.2,
    "nodes return": 1,
}


def draw_faults(random: Random) -> tuple[Fault, ...]:
    """Draw none to seven faults of one theme, single or in bursts."""
    theme = random.choice(THEMES)
    count = random.choice((0, 1, 1, 2, 2, 3, 4, 5, 7))
    return tuple(_draw_fault(random, theme) for _ in range(count))


def _draw_fault(random: Random, theme: Theme) -> Fault:
    when: float | Moment
    if random.random() < 0.3:
        when = random.uniform(0.0, 6.0)
    else:
        what = random.choice(tuple(theme.moments))
        delay_s = random.choice((0.0, 0.0, random.uniform(0.0, 0.02), random.uniform(0.0, 0.2)))
        when = Moment(what, random.randint(1, theme.moments[what]), delay_s)
    then = (random.uniform(0.0, 0.4), _draw_kind(random, theme)) if random.random() < 0.3 else None
    return Fault(_draw_kind(random, theme), when, then)


def _draw_kind(random: Random, theme: Theme) -> str:
    if theme.kinds and random.random() < 0.5:
        return random.choice(theme.kinds)
    return random.choices(tuple(WEIGHTS), tuple(WEIGHTS.values()))[0]

"""What can go wrong, and when: at a time, or right after something has happened for the nth time."""

from __future__ import annotations

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
    """One thing that goes wrong; whom it hits is drawn when it does."""

    kind: str
    when: float | Moment


MOMENTS = {
    "forked": 6,
    "said:Registered": 6,
    "said:Warm": 2,
    "said:Prepared": 12,
    "said:Switched": 12,
    "said:Resumed": 8,
    "said:CollectiveFailed": 2,
    "said:Leaving": 4,
    "entered": 12,
    "transfer": 4,
    "voted": 16,
    "applying": 16,
    "applied": 16,
    "left the loop": 4,
    "sent:Prepare": 10,
    "sent:Commit": 10,
    "ledger:generation-openedFOUND": 1,
    "ledger:generation-openedFENCE": 3,
    "ledger:generation-openedSWITCH": 3,
    "ledger:generation-committed": 4,
    "ledger:generation-abandoned": 1,
    "ledger:node-attached": 4,
    "ledger:node-lost": 2,
    "ledger:node-draining": 1,
    "ledger:workers-lost": 3,
    "ledger:worker-started": 6,
    "ledger:controller-restarted": 2,
    "ledger:loop-ended": 1,
    "ledger:job-ended": 1,
}

# How often each kind is drawn, against the others.
WEIGHTS = {
    "worker killed": 5,
    "worker killed between effects": 6,
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
    "node partitioned": 2,
    "controller partitioned": 1.5,
    "collectives glitch": 2,
    "drain": 3,
    "node added": 3,
    "job stopped": 0.2,
    "nodes return": 1,
}


def draw_faults(random: Random) -> tuple[Fault, ...]:
    """Draw none to seven faults; related ones come in a burst."""
    count = random.choice((0, 1, 1, 1, 2, 2, 3, 4, 5, 7))
    kinds, weights = list(WEIGHTS), list(WEIGHTS.values())
    faults: list[Fault] = []
    for _ in range(count):
        when: float | Moment
        dice = random.random()
        if dice < 0.35:
            when = random.uniform(0.0, 6.0)
        elif dice < 0.5 and faults and isinstance(faults[-1].when, float):
            when = faults[-1].when + random.uniform(0.0, 0.4)
        else:
            what = random.choice(list(MOMENTS))
            when = Moment(what, random.randint(1, MOMENTS[what]), random.choice((0.0, 0.0, random.uniform(0.0, 0.2))))
        faults.append(Fault(random.choices(kinds, weights)[0], when))
    return tuple(faults)

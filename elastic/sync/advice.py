"""What a link costs each way of agreeing: predicted steps, from the bytes that are sent. A pure function of numbers.

Each worker gives every other one its share of the sum and gets theirs (reduce-scatter), and then all get all of it (all-gather):
2 P (N-1)/N numbers each way, of 4 bytes or in a code with a scale for each block, and two messages one after the other. With
local rounds that is once a round, and with fragments a part of it more often. In a pair each sends its P slow parameters while
the round is computed, and P numbers at its end; the mean of all is made after every so many rounds.
"""

from __future__ import annotations

from dataclasses import dataclass

from elastic.sync import NoLoCo

BYTES = {"": 4.0, "int8": 1 + 4 / 256, "fp4": 0.5 + 4 / 256}
"""Of each number: as it is, and in the codes of `elastic/quantize.py`."""


@dataclass(frozen=True, slots=True)
class Site:
    """What is trained over which link.

    Attributes:
        parameters: of the model. nodes: that agree. bytes_per_s: of a node's link, each way. latency_s: from one to another.
        step_s: what a step takes without any exchange.
    """

    parameters: float
    nodes: int
    bytes_per_s: float
    latency_s: float
    step_s: float


FRAGMENTS = 4
"""Of StreamingDiLoCo, as it is advised."""
MEAN_EVERY = NoLoCo().mean_every


@dataclass(frozen=True, slots=True)
class Advice:
    """What one way of agreeing costs.

    Attributes:
        name: in words. every: steps from one exchange to the next. exchange_s: what it takes. step_s: of a step, with its share.
        utilisation: share of the time in which nodes compute. bytes_per_step: that a node sends, on average.
    """

    name: str
    every: int
    exchange_s: float
    step_s: float
    utilisation: float
    bytes_per_step: float


def exchange_bytes(site: Site, code: str = "") -> float:
    """Bytes that each node sends, and as many that it receives, for one exchange of the whole model."""
    return 2 * site.parameters * BYTES[code] * (site.nodes - 1) / site.nodes


def exchange_s(site: Site, code: str = "") -> float:
    """Seconds of one exchange of the whole model."""
    return exchange_bytes(site, code) / site.bytes_per_s + 2 * site.latency_s if site.nodes > 1 else 0.0


def pair_bytes(site: Site) -> float:
    """Bytes that each node of a pair sends, and as many that it receives, for one exchange, whatever the number of nodes."""
    return 2 * site.parameters * BYTES[""] if site.nodes > 1 else 0.0


def pair_s(site: Site, every: int) -> float:
    """Seconds for which a node of a pair waits at the end of a round, its share in the mean of all included."""
    if site.nodes == 1:
        return 0.0
    one_s = site.parameters * BYTES[""] / site.bytes_per_s + site.latency_s
    return one_s + max(0.0, one_s - every * site.step_s) + exchange_s(site) / MEAN_EVERY


def every_for(site: Site, utilisation: float) -> int:
    """Return the fewest local steps between two exchanges that keep nodes computing for this share of the time."""
    waits_s = exchange_s(site)
    every = 1
    while every * site.step_s < utilisation * (every * site.step_s + waits_s):
        every *= 2
    low, high = every // 2, every
    while high - low > 1:
        middle = (low + high) // 2
        enough = middle * site.step_s >= utilisation * (middle * site.step_s + waits_s)
        low, high = (low, middle) if enough else (middle, high)
    return high


def advise(site: Site, every: int) -> list[Advice]:
    """Return what each way of agreeing costs: every step, every so many steps, and as rarely as it takes for 90 and 95 %."""
    ways = [("AllReduce", 1, ""), (f"DiLoCo({every})", every, "")]
    ways += [(f"DiLoCo({every}, {code})", every, code) for code in BYTES if code]
    ways += [(f"DiLoCo, for {share:.0%}", every_for(site, share), "") for share in (0.9, 0.95)]
    found = [_advice(site, name, steps, exchange_s(site, code), exchange_bytes(site, code)) for name, steps, code in ways]
    part = max(1, every // FRAGMENTS)
    sent = exchange_bytes(site) / FRAGMENTS
    waits_s = sent / site.bytes_per_s + 2 * site.latency_s if site.nodes > 1 else 0.0
    found.append(_advice(site, f"StreamingDiLoCo({every}, {FRAGMENTS})", part, waits_s, sent))
    sent = pair_bytes(site) + exchange_bytes(site) / MEAN_EVERY
    found.append(_advice(site, f"NoLoCo({every})", every, pair_s(site, every), sent))
    return found


def _advice(site: Site, name: str, steps: int, waits_s: float, sent: float) -> Advice:
    step_s = site.step_s + waits_s / steps
    return Advice(name, steps, waits_s, step_s, site.step_s / step_s, sent / steps)

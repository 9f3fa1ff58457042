"""What a seed means: how large and how fast the cluster is, how bad its network, and what goes wrong when."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from random import Random

from controller.state import JobSettings
from elastic.domain import LayerProfile, TrainingSpec
from tests.sim.faults import Fault, draw_faults
from tests.sim.links import LinkQuality

INITIAL_DIGEST = 12345
CHECKPOINT_DIGEST = 54321


@dataclass(frozen=True)
class WorkerSpeed:
    """Seconds that a worker takes to start, for a slot, and to write an update."""

    start_s: float
    slot_s: float
    apply_s: float


@dataclass(frozen=True)
class Scenario:
    """One simulated job.

    Attributes:
        nodes: Nodes at the start; more may join as a fault.
        nproc: Workers on each node.
        steps: Optimizer steps until the training loop ends.
        quiet_at_s: From here on nothing goes wrong any more, so the job must come to its end.
        raises_at: (step, slot) at which user code raises; None for never.
        raises_times: How often it does.
        quits_early: How many workers end with code 3 before they say anything.
        failed_forks: How many forks fail.
        never_prepares: Whether the script is one that never asks for a session.
        stops_at: From which step on the worker of rank 0 asks all to stop; 0 for never.
        concludes: Whether something must run once after the loop.
        buffers: For snapshots, of each worker.
        begins_after: Step of the checkpoint that the durable tier holds at the start; 0 for none.
        late_spec: What workers train that are started again; None for the same as the first.
    """

    seed: int
    nodes: int
    nproc: int
    steps: int
    settings: JobSettings
    spec: TrainingSpec
    network: LinkQuality
    local: LinkQuality
    slot_s: float
    faults: tuple[Fault, ...] = ()
    quiet_at_s: float = 0.0
    raises_at: tuple[int, int] | None = None
    raises_times: int = 0
    quits_early: int = 0
    failed_forks: int = 0
    never_prepares: bool = False
    late_spec: TrainingSpec | None = None
    stops_at: int = 0
    concludes: bool = False
    controller_timeout_s: float = 25.0
    buffers: int = 3
    begins_after: int = 0
    initial_digest: int = INITIAL_DIGEST
    user_error: str = field(default="ValueError: bad sample")

    @property
    def hostile(self) -> bool:
        return self.network.garbled > 0

    def worker_speed(self, random: Random) -> WorkerSpeed:
        slow = 6.0 if random.random() < 0.1 else 1.0
        return WorkerSpeed(random.uniform(0.05, 0.3) * slow, self.slot_s, random.uniform(0.001, 0.02) * slow)


def make_scenario(seed: int, *, hostile: bool | None = None) -> Scenario:
    """Return the scenario of a seed; `hostile` overrides what the seed says about the links."""
    random = Random(f"scenario {seed}")
    nodes = random.choice((1, 2, 2, 3, 3, 4))
    nproc = random.choice((1, 1, 2, 3)) if nodes < 4 else random.choice((1, 2))
    nodes_max = nodes + random.choice((0, 0, 1))
    nodes_min = random.randint(1, nodes) if random.random() < 0.4 else 1
    slots = random.choice((0, nodes * nproc, nodes_max * nproc, nodes_max * nproc + random.randint(1, 5)))
    replicas = 0 if slots == 0 else random.choice((0, random.randint(1, slots)))
    garbled = random.choice((0.002, 0.01, 0.03))
    if not (random.random() < 0.12 if hostile is None else hostile):
        garbled = 0.0
    network = LinkQuality(
        delay_s=random.choice((0.0005, 0.002, 0.01)), spike=random.choice((0.0, 0.01, 0.05)), garbled=garbled
    )
    scenario = Scenario(
        seed=seed,
        nodes=nodes,
        nproc=nproc,
        steps=random.choice((1, 2, random.randint(3, 9), random.randint(3, 9), random.randint(10, 30))),
        settings=JobSettings(
            job="sim",
            nodes_min=nodes_min,
            nodes_max=nodes_max,
            max_restarts=random.choice((1, 3)),
            start_timeout_s=40.0,
            join_timeout_s=random.choice((0.5, 2.0)),
        ),
        spec=TrainingSpec(
            slots=slots, virtual_replicas=replicas, dataset_size=1000, batch_size=1, layout_digest="l", state_digest="s"
        ),
        network=network,
        local=LinkQuality(delay_s=0.0005, spike=0.01, garbled=garbled),
        slot_s=random.choice((0.01, 0.03, 0.08)),
    )
    ends = Random(f"ends {seed}")
    scenario = replace(
        scenario,
        stops_at=ends.randint(1, scenario.steps) if ends.random() < 0.2 else 0,
        concludes=ends.random() < 0.3,
    )
    memory = Random(f"memory {seed}")
    data_shards, parity_shards = memory.choice(((0, 0), (0, 0), (1, 1), (2, 1), (3, 1), (2, 2)))
    scenario = replace(
        scenario,
        settings=replace(
            scenario.settings,
            snapshot_every=memory.choice((0, 1, 1, 1, 2, -1)),
            data_shards=data_shards,
            parity_shards=parity_shards,
        ),
        buffers=memory.choice((2, 3)),
    )
    if Random(f"alone {seed}").random() < 0.25:
        scenario = replace(scenario, spec=replace(scenario.spec, shard_optimizer=True))
    elif (layers := Random(f"pipeline, draw 12 {seed}")).random() < 0.25:
        costs = tuple(
            LayerProfile(layers.uniform(0.5, 2), layers.uniform(1, 3), 2**20, 2**16, 2**10, form)
            for form in (1, *[2] * 10, 3)
        )
        spec = replace(scenario.spec, layers=costs, schedule="1f1b", stages=layers.choice((0, 0, 2, 3)))
        scenario = replace(scenario, spec=spec, steps=layers.choice((scenario.steps, scenario.steps, 80)))
        if not spec.stages and nodes * nproc > 2 and layers.random() < 0.6:
            without = replace(scenario.settings, approximate=True, snapshot_every=layers.choice((0, 0, 1)))
            scenario = replace(scenario, settings=without, steps=80)
        if (ways := Random(f"ways {seed}")).random() < (0.6 if scenario.settings.approximate else 0.3):
            share = ways.choice((0.0, 0.0, 0.25))
            scenario = replace(scenario, settings=replace(scenario.settings, swap_ends=not share, skip_ratio=share))
    if memory.random() < 0.25 and (scenario.settings.snapshot_every or not scenario.settings.approximate):
        scenario = _with_durable_tier(scenario, memory)
    faults = draw_faults(random)
    scenario = replace(scenario, faults=faults, quiet_at_s=random.uniform(8.0, 14.0) if faults else 0.0)
    dice = random.random()
    if dice < 0.08:
        place = (random.randint(1, scenario.steps), random.randint(0, max(1, slots) - 1))
        scenario = replace(scenario, raises_at=place, raises_times=random.choice((1, 1, 99)))
    elif dice < 0.13:
        scenario = replace(scenario, quits_early=random.randint(1, 4))
    elif dice < 0.16:
        scenario = replace(scenario, failed_forks=random.randint(1, 2))
    elif dice < 0.18:
        scenario = replace(scenario, late_spec=replace(scenario.spec, layout_digest="other"))
    elif dice < 0.19:
        scenario = replace(scenario, never_prepares=True)
    return scenario


def _with_durable_tier(scenario: Scenario, random: Random) -> Scenario:
    settings = replace(scenario.settings, checkpoint_target="disk", checkpoint_every=random.randint(0, 4))
    begins_after = random.choice((0, 0, random.randint(1, 20)))
    return replace(
        scenario,
        settings=settings,
        begins_after=begins_after,
        steps=scenario.steps + begins_after,
        stops_at=scenario.stops_at + begins_after if scenario.stops_at else 0,
    )

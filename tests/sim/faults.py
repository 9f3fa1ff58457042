"""What can go wrong, and when: at a time, or right after something has happened for the nth time."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from random import Random
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from tests.sim.agent import Agent, Node
    from tests.sim.cluster import Cluster
    from tests.sim.worker import Worker


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


def draw_faults(random: Random) -> tuple[Fault, ...]:
    """Draw none to seven faults; related ones come in a burst."""
    count = random.choice((0, 1, 1, 1, 2, 2, 3, 4, 5, 7))
    kinds = list(FAULTS)
    weights = [FAULTS[kind][0] for kind in kinds]
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


def strike(cluster: Cluster, fault: Fault, worker: Worker | None) -> None:
    """Let a fault happen; `worker` is the one at whose moment it comes, if any."""
    if cluster.is_quiet():
        return
    cluster.note("FAULT %s", fault.kind)
    cluster.faults_struck.append(fault.kind)
    FAULTS[fault.kind][1](cluster, worker)


# -- whom ----------------------------------------------------------------------------------------------------------


def _some_worker(cluster: Cluster, worker: Worker | None) -> Worker | None:
    living = [w for w in cluster.workers if w.alive]
    if worker is not None and worker.alive and cluster.random.random() < 0.6:
        return worker
    return cluster.random.choice(living) if living else None


def _some_node(cluster: Cluster, worker: Worker | None) -> Node | None:
    if worker is not None and cluster.random.random() < 0.5:
        return worker.agent.node
    nodes = [n for n in cluster.nodes.values() if n.agent is not None and n.agent.alive]
    return cluster.random.choice(nodes) if nodes else None


def _some_agent(cluster: Cluster, worker: Worker | None) -> Agent | None:
    node = _some_node(cluster, worker)
    return node.agent if node is not None and node.agent is not None and node.agent.alive else None


# -- what ----------------------------------------------------------------------------------------------------------


def _kill_worker(cluster: Cluster, worker: Worker | None) -> None:
    victim = _some_worker(cluster, worker)
    if victim is not None:
        victim.die(cluster.random.choice((-9, -9, -9, -11, 1)))


def _kill_worker_between_effects(cluster: Cluster, worker: Worker | None) -> None:
    victim = _some_worker(cluster, worker)
    if victim is not None:
        victim.dies_after_effects = cluster.random.randint(0, 12)


def _stop_worker(cluster: Cluster, worker: Worker | None) -> None:
    victim = _some_worker(cluster, worker)
    if victim is not None:
        victim.stop()
        cluster.clock.after(cluster.random.choice((0.1, 0.5, 1.9, 2.1, 3.0, 6.0)), victim.go_on)


def _worker_script_ends(cluster: Cluster, worker: Worker | None) -> None:
    victim = _some_worker(cluster, worker)
    if victim is not None:
        victim.die(0)


def _kill_agent(cluster: Cluster, worker: Worker | None) -> None:
    agent = _some_agent(cluster, worker)
    if agent is not None:
        agent.node.abandoned = cluster.random.random() < 0.25
        agent.die(-9)


def _kill_agent_between_effects(cluster: Cluster, worker: Worker | None) -> None:
    agent = _some_agent(cluster, worker)
    if agent is not None:
        agent.dies_after_effects = cluster.random.randint(0, 15)


def _end_agent(cluster: Cluster, worker: Worker | None) -> None:
    agent = _some_agent(cluster, worker)
    if agent is not None:
        agent.ask_to_end()


def _stop_agent(cluster: Cluster, worker: Worker | None) -> None:
    agent = _some_agent(cluster, worker)
    if agent is not None:
        agent.stop()
        cluster.clock.after(cluster.random.choice((0.3, 1.5, 2.5, 5.0)), agent.go_on)


def _lose_power(cluster: Cluster, worker: Worker | None) -> None:
    agent = _some_agent(cluster, worker)
    if agent is not None:
        agent.node.abandoned = cluster.random.random() < 0.25
        agent.die(-9, silent=True)


def _stop_node(cluster: Cluster, worker: Worker | None) -> None:
    agent = _some_agent(cluster, worker)
    if agent is None:
        return
    seconds = cluster.random.choice((0.3, 1.5, 1.95, 2.5, 5.0, 8.0))
    for process in (agent, *(w for w in agent.workers.values() if w.alive)):
        process.stop()
        cluster.clock.after(seconds, process.go_on)


def _kill_controller(cluster: Cluster, worker: Worker | None) -> None:
    cluster.controller.die()


def _kill_controller_between_effects(cluster: Cluster, worker: Worker | None) -> None:
    cluster.controller.dies_after_effects = cluster.random.randint(0, 25)


def _stop_controller(cluster: Cluster, worker: Worker | None) -> None:
    controller = cluster.controller
    if controller.alive:
        controller.stop()
        cluster.clock.after(cluster.random.choice((0.3, 1.2, 2.5, 4.5, 7.0)), controller.go_on)


def _cut_stream(cluster: Cluster, worker: Worker | None) -> None:
    agent = _some_agent(cluster, worker)
    if agent is not None and agent.stream is not None:
        agent.stream.cut()


def _silence_stream(cluster: Cluster, worker: Worker | None) -> None:
    agent = _some_agent(cluster, worker)
    if agent is not None and agent.stream is not None:
        agent.stream.silence(cluster.random.choice((0.5, 3.0, 9.0)))


def _partition_node(cluster: Cluster, worker: Worker | None) -> None:
    node = _some_node(cluster, worker)
    if node is not None:
        cluster.partition(node, cluster.random.choice((0.3, 1.0, 2.2, 4.0, 7.0)))


def _partition_controller(cluster: Cluster, worker: Worker | None) -> None:
    seconds = cluster.random.choice((0.5, 1.5, 2.2, 4.0, 7.0))
    for node in cluster.nodes.values():
        cluster.partition(node, seconds)


def _glitch(cluster: Cluster, worker: Worker | None) -> None:
    groups = cluster.groups.all()
    if groups:
        groups[max(groups)].glitch()


def _drain(cluster: Cluster, worker: Worker | None) -> None:
    node = _some_node(cluster, worker)
    if node is not None and cluster.controller.alive:
        cluster.controller.ask_to_drain(node.name)


def _add_node(cluster: Cluster, worker: Worker | None) -> None:
    cluster.add_node()


def _stop_job(cluster: Cluster, worker: Worker | None) -> None:
    if cluster.controller.alive:
        cluster.controller.ask_to_stop()


def _return_abandoned_nodes(cluster: Cluster, worker: Worker | None) -> None:
    for node in cluster.nodes.values():
        if node.abandoned and node.exit_code:
            node.abandoned = False
            cluster.clock.after(cluster.random.uniform(0.0, 2.0), node.start_agent)


# Kind -> (weight, deed).
FAULTS: dict[str, tuple[float, Callable[[Cluster, Worker | None], None]]] = {
    "worker killed": (5, _kill_worker),
    "worker killed between effects": (6, _kill_worker_between_effects),
    "worker stopped": (3, _stop_worker),
    "script ends early": (0.5, _worker_script_ends),
    "agent killed": (2, _kill_agent),
    "agent killed between effects": (2, _kill_agent_between_effects),
    "agent asked to end": (1, _end_agent),
    "agent stopped": (2, _stop_agent),
    "power lost": (2, _lose_power),
    "node stopped": (3, _stop_node),
    "controller killed": (3, _kill_controller),
    "controller killed between effects": (5, _kill_controller_between_effects),
    "controller stopped": (2, _stop_controller),
    "stream cut": (3, _cut_stream),
    "stream silent": (2, _silence_stream),
    "node partitioned": (2, _partition_node),
    "controller partitioned": (1.5, _partition_controller),
    "collectives glitch": (2, _glitch),
    "drain": (3, _drain),
    "node added": (3, _add_node),
    "job stopped": (0.2, _stop_job),
    "nodes return": (1, _return_abandoned_nodes),
}

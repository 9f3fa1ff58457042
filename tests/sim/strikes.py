"""What the kinds of faults do to a cluster."""

from __future__ import annotations

from collections.abc import Callable

from tests.sim.agent import Agent, Node
from tests.sim.faults import WEIGHTS, Fault
from tests.sim.process import Process
from tests.sim.site import Site
from tests.sim.worker import Worker


def strike(site: Site, fault: Fault, process: Process | None) -> None:
    """Let a fault happen; `process` is the one at whose moment it comes, if any."""
    worker = process if isinstance(process, Worker) else None
    _do(site, fault.kind, worker)
    if fault.then is not None:
        delay_s, kind = fault.then
        site.clock.after(delay_s, _do, site, kind, worker)


def _do(site: Site, kind: str, worker: Worker | None) -> None:
    if site.is_quiet():
        return
    site.note("FAULT %s", kind)
    site.faults_struck.append(kind)
    DEEDS[kind](site, worker)


# -- whom ----------------------------------------------------------------------------------------------------------


def _some_worker(site: Site, worker: Worker | None) -> Worker | None:
    living = [w for w in site.workers if w.alive]
    if worker is not None and worker.alive and site.random.random() < 0.6:
        return worker
    return site.random.choice(living) if living else None


def _some_node(site: Site, worker: Worker | None) -> Node | None:
    if worker is not None and site.random.random() < 0.5:
        return site.node_of(worker)
    nodes = [n for n in site.nodes.values() if n.agent is not None and n.agent.alive]
    return site.random.choice(nodes) if nodes else None


def _some_agent(site: Site, worker: Worker | None) -> Agent | None:
    node = _some_node(site, worker)
    return node.agent if node is not None and node.agent is not None and node.agent.alive else None


# -- what ----------------------------------------------------------------------------------------------------------


def _kill_worker(site: Site, worker: Worker | None) -> None:
    victim = _some_worker(site, worker)
    if victim is not None:
        victim.die(site.random.choice((-9, -9, -9, -11, 1)))


def _kill_worker_between_effects(site: Site, worker: Worker | None) -> None:
    victim = _some_worker(site, worker)
    if victim is not None:
        victim.dies_after_effects = site.random.randint(0, 12)


def _kill_all_workers(site: Site, worker: Worker | None) -> None:
    for victim in site.workers:
        if victim.alive:
            site.clock.after(site.random.choice((0.0, 0.0, 0.01, 0.1)), victim.die, -9)


def _stop_worker(site: Site, worker: Worker | None) -> None:
    victim = _some_worker(site, worker)
    if victim is not None:
        victim.stop()
        site.clock.after(site.random.choice((0.1, 0.5, 1.9, 2.1, 3.0, 6.0)), victim.go_on)


def _worker_script_ends(site: Site, worker: Worker | None) -> None:
    victim = _some_worker(site, worker)
    if victim is not None:
        victim.die(0)


def _kill_agent(site: Site, worker: Worker | None) -> None:
    agent = _some_agent(site, worker)
    if agent is not None:
        agent.node.abandoned = site.random.random() < 0.25
        agent.die(-9)


def _kill_agent_between_effects(site: Site, worker: Worker | None) -> None:
    agent = _some_agent(site, worker)
    if agent is not None:
        agent.dies_after_effects = site.random.randint(0, 15)


def _end_agent(site: Site, worker: Worker | None) -> None:
    agent = _some_agent(site, worker)
    if agent is not None:
        agent.ask_to_end()


def _stop_agent(site: Site, worker: Worker | None) -> None:
    agent = _some_agent(site, worker)
    if agent is not None:
        agent.stop()
        site.clock.after(site.random.choice((0.3, 1.5, 2.5, 5.0)), agent.go_on)


def _lose_power(site: Site, worker: Worker | None) -> None:
    agent = _some_agent(site, worker)
    if agent is not None:
        agent.node.abandoned = site.random.random() < 0.25
        agent.die(-9, silent=True)


def _stop_node(site: Site, worker: Worker | None) -> None:
    agent = _some_agent(site, worker)
    if agent is None:
        return
    seconds = site.random.choice((0.3, 1.5, 1.95, 2.5, 5.0, 8.0))
    for process in (agent, *(w for w in agent.workers.values() if w.alive)):
        process.stop()
        site.clock.after(seconds, process.go_on)


def _kill_controller(site: Site, worker: Worker | None) -> None:
    site.controller.die()


def _kill_controller_between_effects(site: Site, worker: Worker | None) -> None:
    site.controller.dies_after_effects = site.random.randint(0, 25)


def _stop_controller(site: Site, worker: Worker | None) -> None:
    controller = site.controller
    if controller.alive:
        controller.stop()
        site.clock.after(site.random.choice((0.3, 1.2, 2.5, 4.5, 7.0)), controller.go_on)


def _cut_stream(site: Site, worker: Worker | None) -> None:
    agent = _some_agent(site, worker)
    if agent is not None and agent.stream is not None:
        agent.stream.cut()


def _silence_stream(site: Site, worker: Worker | None) -> None:
    agent = _some_agent(site, worker)
    if agent is not None and agent.stream is not None:
        agent.stream.silence(site.random.choice((0.5, 3.0, 9.0)))


def _deafen_stream(site: Site, worker: Worker | None) -> None:
    agent = _some_agent(site, worker)
    if agent is not None and agent.stream is not None:
        agent.stream.deafen(site.random.choice((0, 1)), site.random.choice((0.5, 3.0, 9.0)))


def _partition_node(site: Site, worker: Worker | None) -> None:
    node = _some_node(site, worker)
    if node is not None:
        site.partition(node, site.random.choice((0.3, 1.0, 2.2, 4.0, 7.0)))


def _partition_controller(site: Site, worker: Worker | None) -> None:
    seconds = site.random.choice((0.5, 1.5, 2.2, 4.0, 7.0))
    for node in site.nodes.values():
        site.partition(node, seconds)


def _glitch(site: Site, worker: Worker | None) -> None:
    groups = site.groups.all()
    if groups:
        groups[site.random.choice(sorted(groups)[-2:])].glitch()


def _part_link(site: Site, worker: Worker | None) -> None:
    nodes = sorted(name for name, node in site.nodes.items() if node.agent is not None and node.agent.alive)
    if len(nodes) > 1:
        link = frozenset(site.random.sample(nodes, 2))
        site.groups.part(link)
        site.clock.after(site.random.choice((0.3, 1.5, 3.0, 6.0, 15.0)), site.groups.mend, link)


def _drain(site: Site, worker: Worker | None) -> None:
    node = _some_node(site, worker)
    if node is not None and site.controller.alive:
        site.controller.ask_to_drain(node.name)


def _add_node(site: Site, worker: Worker | None) -> None:
    site.add_node()


def _stop_job(site: Site, worker: Worker | None) -> None:
    if site.controller.alive:
        site.controller.ask_to_stop()


def _return_abandoned_nodes(site: Site, worker: Worker | None) -> None:
    for node in site.nodes.values():
        if node.abandoned and node.exit_code:
            node.abandoned = False
            site.clock.after(site.random.uniform(0.0, 2.0), node.start_agent)


DEEDS: dict[str, Callable[[Site, Worker | None], None]] = {
    "worker killed": _kill_worker,
    "worker killed between effects": _kill_worker_between_effects,
    "all workers killed": _kill_all_workers,
    "worker stopped": _stop_worker,
    "script ends early": _worker_script_ends,
    "agent killed": _kill_agent,
    "agent killed between effects": _kill_agent_between_effects,
    "agent asked to end": _end_agent,
    "agent stopped": _stop_agent,
    "power lost": _lose_power,
    "node stopped": _stop_node,
    "controller killed": _kill_controller,
    "controller killed between effects": _kill_controller_between_effects,
    "controller stopped": _stop_controller,
    "stream cut": _cut_stream,
    "stream silent": _silence_stream,
    "stream deaf one way": _deafen_stream,
    "node partitioned": _partition_node,
    "controller partitioned": _partition_controller,
    "collectives glitch": _glitch,
    "link dead": _part_link,
    "drain": _drain,
    "node added": _add_node,
    "job stopped": _stop_job,
    "nodes return": _return_abandoned_nodes,
}
assert DEEDS.keys() == WEIGHTS.keys()

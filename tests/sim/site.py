"""The nodes, agents, workers and the controller of one simulated cluster."""

from __future__ import annotations

from typing import Any

from tests.sim.agent import Agent, Node
from tests.sim.controller import Controller
from tests.sim.links import End, Stream
from tests.sim.memory import Memory
from tests.sim.scenario import Scenario
from tests.sim.worker import Worker
from tests.sim.world import World


class _Nobody:
    """The other end of a connection to a process that is not there."""

    def run(self, call: Any, *args: Any) -> None:
        return

    def on_message(self, stream: Stream, message: Any) -> None:
        return

    def on_reset(self, stream: Stream, reason: str) -> None:
        return


class Site(World):
    """A world with processes in it."""

    def __init__(self, scenario: Scenario, *, verbose: bool = False) -> None:
        super().__init__(scenario, verbose=verbose)
        self.nodes: dict[str, Node] = {}
        self.controller = Controller(self, self.ledger)
        for _ in range(scenario.nodes):
            self.add_node()

    @property
    def agents(self) -> list[Agent]:
        """Every agent that ever ran."""
        return [agent for node in self.nodes.values() for agent in node.agents]

    @property
    def workers(self) -> list[Worker]:
        """Every worker that ever ran."""
        return [worker for agent in self.agents for worker in agent.forked]

    def memories(self, node: str) -> dict[str, Memory]:
        dead = self.groups.dead_links
        living = [n.agent for n in self.nodes.values() if n.agent is not None and n.agent.alive]
        return {a.node.name: a.memory for a in living if frozenset((node, a.node.name)) not in dead}

    def node_of(self, worker: Worker) -> Node:
        return next(node for node in self.nodes.values() if worker.parent in node.agents)

    def add_node(self) -> None:
        node = Node(self, f"n{len(self.nodes)}")
        self.nodes[node.name] = node
        self.clock.after(self.random.uniform(0.0, 0.3), node.start_agent)

    def partition(self, node: Node, seconds: float) -> None:
        """Cut a node off from the controller: TCP delivers late what it does not give up."""
        until_s = self.clock.now + seconds
        node.partitioned_until_s = max(node.partitioned_until_s, until_s)
        if node.agent is not None and node.agent.stream is not None:
            node.agent.stream.hold(until_s)

    def connect_controller(self, agent: End, partitioned_until_s: float) -> Stream:
        other: End = self.controller if self.controller.alive else _Nobody()
        stream = Stream(self.clock, self.random, self.scenario.network, agent, other)
        if not self.controller.alive:
            stream.silence(0.02)
        elif partitioned_until_s > self.clock.now:
            stream.hold(partitioned_until_s)
        return stream

    def controller_died(self) -> None:
        seconds = self.random.choice((0.1, 0.5, 2.0, 5.0)) if self.random.random() < 0.97 else 30.0
        self.clock.after(seconds, self._start_controller)

    def _start_controller(self) -> None:
        if not self.is_over():  # the daemon refuses the ledger of a job that has ended
            self.note("controller starts on its ledger of %d records", len(self.ledger))
            self.controller = Controller(self, self.ledger)

    def calm(self) -> None:
        """Undo what stands still, and let nobody die any more."""
        for process in (self.controller, *self.agents, *self.workers):
            process.dies_after_effects = None
            process.go_on()
        for link in tuple(self.groups.dead_links):
            self.groups.mend(link)
        self.note("QUIET: from here on nothing goes wrong")

    def all_ended(self) -> bool:
        """Whether the job is over and no process of it is left."""
        return (
            self.ended_at is not None
            and not any(agent.alive for agent in self.agents)
            and not any(worker.alive for worker in self.workers)
        )

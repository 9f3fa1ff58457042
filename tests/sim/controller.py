"""A controller process around the real `ControllerMachine`, and the ledger that outlives it."""

from __future__ import annotations

from typing import Any

from controller.events import (
    AgentAttached,
    AgentGone,
    AgentSaid,
    CloseAgent,
    ControllerEvent,
    DrainAsked,
    EndJob,
    KeepEvidence,
    Persist,
    StopAsked,
    Tick,
    ToAgent,
)
from controller.machine import ControllerMachine
from elastic.domain import AgentHello, Commit, Prepare, ToWorker
from tests.sim.links import Stream
from tests.sim.process import Process
from tests.sim.world import World

TICK_S = 0.05
END_LINGER_S = 5.0


class Controller(Process):
    """One controller process; the next one starts from the same ledger."""

    def __init__(self, world: World, ledger: list[tuple[str, Any]]) -> None:
        super().__init__(world.clock)
        self.world = world
        self.random = world.random
        self.ledger = ledger
        self.machine = ControllerMachine(world.scenario.settings)
        self.streams: dict[str, Stream] = {}
        self.said_hello: dict[Stream, str] = {}  # incarnation of the agent at the other end
        self.ending_since: float | None = None
        if ledger:
            self.machine.restore(list(ledger), self.clock.now)
        self.post(0.0, self._tick)

    # -- the process -----------------------------------------------------------------------------------------------

    def die(self) -> None:
        if not self.alive:
            return
        self.world.note("controller dies")
        self.alive = False
        for stream in self.streams.values():
            stream.die(self)
        self.world.controller_died()

    def die_between_effects(self) -> None:
        self.world.note("controller is killed between two effects")
        self.die()

    def handle(self, event: ControllerEvent) -> None:
        """Give the machine an event and perform its effects one by one. Raises Died."""
        for effect in self.machine.step(event, self.clock.now):
            self.spend_effect()
            match effect:
                case Persist(kind, text, data):
                    self.world.note("LEDGER %s: %s", kind, text)
                    self.ledger.append((kind, data))
                    self.world.observe("persisted", kind, data)
                    name = data["plan"].kind.name if kind == "generation-opened" else ""
                    self.world.moment(f"ledger:{kind}{name}", None)
                case ToAgent(incarnation, message):
                    self.world.observe("sent", incarnation, message)
                    stream = self.streams.get(incarnation)
                    if stream is not None:
                        stream.send(self, message)
                        if isinstance(message, ToWorker) and isinstance(message.command, Commit | Prepare):
                            self.world.moment(f"sent:{type(message.command).__name__}", None)
                case CloseAgent(incarnation):
                    stream = self.streams.pop(incarnation, None)
                    if stream is not None:
                        stream.close(self)
                case KeepEvidence(incident):
                    self.world.note("evidence of incident %d is kept", incident.number)
                case EndJob(outcome, reason):
                    self.world.note("JOB %s: %s", outcome, reason)
                    self.ending_since = self.clock.now

    def _tick(self) -> None:
        self.post(TICK_S, self._tick)
        self.handle(Tick())
        if self.ending_since is not None and (not self.streams or self.clock.now - self.ending_since > END_LINGER_S):
            self.die()

    # -- agents and people -----------------------------------------------------------------------------------------

    def on_message(self, stream: Stream, message: Any) -> None:
        incarnation = self.said_hello.get(stream)
        if incarnation is None:
            if not isinstance(message, AgentHello):
                return
            self.said_hello[stream] = message.incarnation
            old = self.streams.get(message.incarnation)
            if old is not None:
                old.close(self)
            self.streams[message.incarnation] = stream
            self.world.note("controller hears %s: %s", message.incarnation, message)
            self.handle(AgentAttached(message))
        elif self.streams.get(incarnation) is stream:
            self.handle(AgentSaid(incarnation, message))

    def on_reset(self, stream: Stream, reason: str) -> None:
        incarnation = self.said_hello.get(stream, "")
        if self.streams.get(incarnation) is stream:
            del self.streams[incarnation]
            self.handle(AgentGone(incarnation, reason))

    def ask_to_drain(self, node: str) -> None:
        self.run(self.handle, DrainAsked(node))

    def ask_to_stop(self) -> None:
        self.run(self.handle, StopAsked("a person wants it"))

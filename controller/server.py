"""The controller's shell: gRPC in and out, the clock, the ledger. Every decision is the machine's.

One asyncio task owns the machine: events are handled one after another, each with its effects performed before the
next is looked at, so the order of effects that the machine asks for is the order that happens.
"""

from __future__ import annotations

import asyncio
import contextlib
import hmac
import json
import os
import signal
import sys
import time
from collections.abc import AsyncIterator, Coroutine
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import grpc.aio

from controller.bundles import RECORDS_MAX, Bundles
from controller.events import (
    AgentAttached,
    AgentGone,
    AgentSaid,
    CloseAgent,
    ControllerEffect,
    ControllerEvent,
    DrainAsked,
    EndJob,
    KeepEvidence,
    Persist,
    SaveAsked,
    StopAsked,
    Tick,
    ToAgent,
)
from controller.ledger import Ledger
from controller.machine import ControllerMachine
from controller.metrics import job_metrics
from controller.state import JobSettings
from controller.views import present_plan, status
from elastic.domain import NO_STEP, AgentHello, Commit, ControllerMessage, Event, StatusReply, ToWorker
from elastic.errors import ConfigError
from elastic.failpoints import FailPoint, reach
from elastic.logs import Log
from elastic.v1 import runtime_pb2, runtime_pb2_grpc
from elastic.wire import channels
from elastic.wire.convert import to_plain, to_proto, unwrap, wrap
from monitoring.exporter import Exporter, ExporterConfig

TICK_S = 0.05
OUTBOX_LIMIT = 4096  # messages to one agent that does not read; beyond it the agent is given up
CALLS_LINGER_S = 1.0  # how long it waits for calls in progress, such as followers of the events
LOOK_AGAIN_S = 0.5
END_LINGER_S = 5.0  # how long the end waits for agents to say goodbye


@dataclass(frozen=True, slots=True)
class ControllerConfig:
    """What a controller daemon is started with."""

    settings: JobSettings
    ledger: Path
    host: str = "127.0.0.1"
    port: int = 29400
    port_file: Path | None = None
    summary: Path | None = None  # where the end of the job is written as JSON
    log_format: str = "text"
    metrics: ExporterConfig = field(default_factory=ExporterConfig)


class AgentStream:
    """The outgoing half of one agent's stream."""

    def __init__(self) -> None:
        self.queue: asyncio.Queue[ControllerMessage | None] = asyncio.Queue(OUTBOX_LIMIT)
        self.closed = False

    def put(self, message: ControllerMessage | None) -> None:
        """Queue a message; None ends the stream."""
        if self.closed:
            return
        try:
            self.queue.put_nowait(message)
        except asyncio.QueueFull:
            self.closed = True
        if message is None:
            self.closed = True


class ControllerServer(runtime_pb2_grpc.ControllerServicer, runtime_pb2_grpc.PeopleServicer):
    """Serves agents and people from one machine and one ledger."""

    def __init__(self, config: ControllerConfig) -> None:
        self.config = config
        self.ledger = Ledger(config.ledger, config.settings.job)
        self.log = Log("controller", config.settings.job, as_json=config.log_format == "json", where=self._where)
        self.bundles = Bundles(config.ledger.with_name(f"{config.ledger.stem}-incidents"))
        self.machine = ControllerMachine(config.settings, unix_offset_s=time.time() - time.monotonic())
        self.streams: dict[str, AgentStream] = {}
        self.news = asyncio.Condition()
        self.newest_event = 0
        self.over = asyncio.Event()
        self.fault: BaseException | None = None
        self.tasks: set[asyncio.Task[None]] = set()
        if not self.ledger.is_new():
            self.machine.restore(self.ledger.records(), time.monotonic())

    def _where(self) -> tuple[int, int]:
        plan = self.machine.plan
        return plan.generation if plan is not None else 0, self.machine.step_committed

    # -- the machine -----------------------------------------------------------------------------------------------

    def handle(self, event: ControllerEvent) -> None:
        """Give the machine one event and perform its effects in order."""
        effects = self.machine.step(event, time.monotonic())
        records = [effect for effect in effects if isinstance(effect, Persist)]
        if records:
            # All records of a step are made durable before any of its messages leave.
            self._publish(self.ledger.append(records))
        for effect in effects:
            match effect:
                case ToAgent(incarnation, message):
                    stream = self.streams.get(incarnation)
                    if stream is not None:
                        stream.put(message)
                case CloseAgent(incarnation, _):
                    stream = self.streams.pop(incarnation, None)
                    if stream is not None:
                        stream.put(None)
                case EndJob():
                    self._write_summary(effects)
                    self._spawn(self._end_when_empty())
                case KeepEvidence():
                    self._spawn(self._keep(effect, status(self.machine, time.monotonic())))
                case Persist():
                    pass

    async def _keep(self, evidence: KeepEvidence, seen: StatusReply) -> None:
        """Write a bundle, beside everything else; one that cannot be written costs nothing but itself."""
        records = self.ledger.newest_events(RECORDS_MAX)
        try:
            path = await asyncio.to_thread(self.bundles.write, evidence, seen, records)
            said = f"is in {path}"
        except OSError as error:
            said = f"could not be written: {error}"
        self.log.say(f"evidence of incident {evidence.incident.number} {said}")

    def _write_summary(self, effects: list[ControllerEffect]) -> None:
        if self.config.summary is None:
            return
        summary = to_plain(status(self.machine, time.monotonic()))
        summary["goodput"] = summary["productive_s"] / summary["elapsed_s"] if summary["elapsed_s"] else 0.0
        for effect in effects:
            if isinstance(effect, Persist) and effect.kind == "job-ended":
                summary |= {key: effect.data[key] for key in ("traceback", "sample_ids") if key in effect.data}
        partial = self.config.summary.with_suffix(".part")
        partial.write_text(json.dumps(summary, indent=2) + "\n")
        partial.replace(self.config.summary)

    def _publish(self, events: list[Event]) -> None:
        for event in events:
            self.newest_event = event.sequence
            self.log.say(event.text, kind=event.kind, sequence=event.sequence)
        self._spawn(self._wake_followers())

    def _spawn(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.get_running_loop().create_task(work)
        self.tasks.add(task)  # the loop itself keeps no reference
        task.add_done_callback(self.tasks.discard)

    async def _wake_followers(self) -> None:
        async with self.news:
            self.news.notify_all()

    async def _next_event(self) -> None:
        """Wait until the ledger has more, or for a moment: one may have come just before."""
        async with self.news:
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self.news.wait(), LOOK_AGAIN_S)

    async def _end_when_empty(self) -> None:
        deadline = time.monotonic() + END_LINGER_S
        while self.streams and time.monotonic() < deadline:
            await asyncio.sleep(0.02)
        self.over.set()
        await self._wake_followers()  # they read the last event, and end

    async def tick_forever(self) -> None:
        """Give the machine the time; end the daemon if the machine itself fails."""
        try:
            while not self.over.is_set():
                self.handle(Tick())
                await asyncio.sleep(TICK_S)
        except Exception as error:
            self.fault = error
            self.over.set()

    # -- agents ----------------------------------------------------------------------------------------------------

    async def Attach(
        self, request_iterator: AsyncIterator[runtime_pb2.AgentMessage], context: channels.Context
    ) -> AsyncIterator[runtime_pb2.ControllerMessage]:
        """One agent's stream."""
        first = await asyncio.wait_for(anext(request_iterator), self.config.settings.failure_timeout_s)
        hello = unwrap(first)
        if not isinstance(hello, AgentHello):
            await context.abort(grpc.StatusCode.INVALID_ARGUMENT, "the first message must be the Hello")
        token = self.config.settings.token
        if token and hmac.compare_digest(hello.token.encode(), token.encode()):
            hello = replace(hello, token=token)
        stream = AgentStream()
        self.streams[hello.incarnation] = stream
        self.handle(AgentAttached(hello))
        reader = asyncio.create_task(self._read(hello.incarnation, request_iterator))
        try:
            while True:
                message = await stream.queue.get()
                if message is None:
                    return
                yield wrap("ControllerMessage", message)
                if isinstance(message, ToWorker) and isinstance(message.command, Commit):
                    reach(FailPoint.COMMIT_HALF_SENT)
                if stream.closed and stream.queue.empty():
                    return
        finally:
            reader.cancel()
            if self.streams.get(hello.incarnation) is stream:
                del self.streams[hello.incarnation]
                self.handle(AgentGone(hello.incarnation, "the connection closed"))

    async def _read(self, incarnation: str, messages: AsyncIterator[runtime_pb2.AgentMessage]) -> None:
        reason = "the agent closed it"
        try:
            async for message in messages:
                self.handle(AgentSaid(incarnation, unwrap(message)))
        except grpc.aio.AioRpcError as error:
            reason = error.details() or "reset"
        except asyncio.CancelledError:
            return
        except Exception as error:
            self.fault = error
            self.over.set()
            raise
        stream = self.streams.pop(incarnation, None)
        if stream is not None:
            self.handle(AgentGone(incarnation, reason))
            stream.put(None)

    # -- people ----------------------------------------------------------------------------------------------------

    async def Status(
        self, request: runtime_pb2.StatusRequest, context: channels.Context
    ) -> runtime_pb2.StatusReply:
        """What `elastic status` shows."""
        reply: runtime_pb2.StatusReply = to_proto(replace(status(self.machine, time.monotonic()), controller_pid=os.getpid()))
        return reply

    async def Events(
        self, request: runtime_pb2.EventsRequest, context: channels.Context
    ) -> AsyncIterator[runtime_pb2.Event]:
        """The ledger, and what is added to it while the caller follows."""
        after = request.after
        while True:
            events = self.ledger.events_after(after)
            for event in events:
                after = event.sequence
                yield to_proto(event)
            if events:
                continue
            if not request.follow or self.over.is_set():
                return
            await self._next_event()

    async def Plan(self, request: runtime_pb2.PlanRequest, context: channels.Context) -> runtime_pb2.PlanReply:
        """What `elastic plan` begins with."""
        machine = self.machine
        present = present_plan(machine)
        if present is None:
            await context.abort(grpc.StatusCode.FAILED_PRECONDITION, "this job has no pipeline that is cut by now")
        reply: runtime_pb2.PlanReply = to_proto(present)
        return reply

    async def Evidence(
        self, request: runtime_pb2.EvidenceRequest, context: channels.Context
    ) -> runtime_pb2.EvidenceReply:
        """What `elastic incidents show` shows."""
        try:
            reply: runtime_pb2.EvidenceReply = to_proto(self.bundles.read(request.incident, self.machine.incidents.total))
        except ConfigError as error:
            await context.abort(grpc.StatusCode.FAILED_PRECONDITION, str(error))
        return reply

    async def Drain(
        self, request: runtime_pb2.DrainRequest, context: channels.Context
    ) -> runtime_pb2.DrainReply:
        """Ask a node to leave."""
        refusal = self.machine.drain_refusal(request.node)
        if refusal:
            await context.abort(grpc.StatusCode.FAILED_PRECONDITION, refusal)
        self.handle(DrainAsked(request.node))
        return runtime_pb2.DrainReply(text=f"node {request.node} leaves after the step in progress")

    async def Checkpoint(
        self, request: runtime_pb2.CheckpointRequest, context: channels.Context
    ) -> runtime_pb2.CheckpointReply:
        """Have a checkpoint written, and wait until it is."""
        refusal = self.machine.save_refusal()
        if refusal:
            await context.abort(grpc.StatusCode.FAILED_PRECONDITION, refusal)
        self.handle(SaveAsked())
        saving = self.machine.saving
        while saving is not None and self.machine.saving == saving and not self.over.is_set():
            await self._next_event()  # as long as the caller's deadline allows
        if self.machine.save_fault or self.machine.saved_step == NO_STEP:
            await context.abort(grpc.StatusCode.ABORTED, f"no checkpoint was written: {self.machine.save_fault}")
        return runtime_pb2.CheckpointReply(text=f"step {self.machine.saved_step} is at {self.machine.saved_path}")

    async def Stop(
        self, request: runtime_pb2.StopRequest, context: channels.Context
    ) -> runtime_pb2.StopReply:
        """End the job."""
        self.handle(StopAsked(request.reason))
        return runtime_pb2.StopReply(text="the job is stopping")


async def serve(config: ControllerConfig) -> int:
    """Run a controller until its job is over; returns the exit code (0 succeeded, 1 failed, 130 stopped)."""
    controller = ControllerServer(config)
    if controller.machine.outcome:
        outcome = controller.machine.outcome
        controller.ledger.close()
        print(
            f"elastic controller: the job in {config.ledger} has {outcome} already ({controller.machine.reason}); "
            "name another --ledger to begin a new one",
            file=sys.stderr,
        )
        return 1
    exporter = None
    if config.metrics.port is not None:
        exporter = Exporter(config.metrics, lambda: job_metrics(controller.machine, time.monotonic()))
        controller.log.say(f"metrics at http://{exporter.address}/metrics")
    server = channels.server()
    runtime_pb2_grpc.add_ControllerServicer_to_server(controller, server)
    runtime_pb2_grpc.add_PeopleServicer_to_server(controller, server)
    port = channels.listen(server, config.host, config.port, what="the controller")
    await server.start()
    loop = asyncio.get_running_loop()
    for signum in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(signum, controller.handle, StopAsked(f"{signum.name} received"))
    if config.port_file is not None:
        partial = config.port_file.with_suffix(".part")
        partial.write_text(f"{port}\n")
        partial.replace(config.port_file)
    controller.log.say(f"job {config.settings.job} at {channels.join_address(config.host, port)}")
    ticker = asyncio.create_task(controller.tick_forever())
    await controller.over.wait()
    ticker.cancel()
    await server.stop(CALLS_LINGER_S)
    if exporter is not None:
        await asyncio.to_thread(exporter.close)  # a scrape in progress still reads in this loop
    controller.ledger.close()
    if controller.fault is not None:
        raise controller.fault
    return {"succeeded": 0, "stopped": 130}.get(controller.machine.outcome, 1)

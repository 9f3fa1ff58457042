"""The agent's shell: the link to the controller, the workers' local API, processes, the clock.

Every decision is the machine's; this file turns what happens into events and effects into deeds. One asyncio loop owns
everything, so events are handled one at a time and their effects in order.
"""

from __future__ import annotations

import asyncio
import os
import signal
import tempfile
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from pathlib import Path

import grpc
import grpc.aio
from prometheus_client.core import Metric

from agent import evidence
from agent.console import OutputPipe, log_folder, open_outputs
from agent.events import (
    AgentEvent,
    Answer,
    CarriedOut,
    CarryOut,
    Connected,
    Disconnected,
    DropConnection,
    EndAgent,
    EndAsked,
    Fork,
    Forked,
    ForkFailed,
    Forward,
    Heard,
    Looked,
    OpenGeneration,
    Order,
    ProcessEnded,
    Report,
    Signal,
    Tick,
    WorkerSaid,
)
from agent.keys import make_keys
from agent.machine import AgentMachine, AgentSettings
from agent.metering import WorkerMeter, put_node
from agent.processes import ForkedDaemon, Script, Standby, WorkerProcess, worker_environment
from agent.snapshots import NodeSnapshots
from agent.store import StoreService
from elastic import config
from elastic.domain import (
    AgentHello,
    AgentMessage,
    AssembleSnapshot,
    CollectEvidence,
    Commit,
    EvidenceCollected,
    FindCheckpoint,
    FindSnapshots,
    PeersProbed,
    Prepare,
    ProbePeers,
    SaveCheckpoint,
    StartWorker,
    WorkerCommand,
)
from elastic.logs import Log, nowhere
from elastic.progress import ProgressPage
from elastic.v1 import runtime_pb2, runtime_pb2_grpc
from elastic.wire import channels
from elastic.wire.convert import unwrap, wrap
from monitoring import metrics
from monitoring.exporter import Exporter, ExporterConfig
from monitoring.metrics import Page

TICK_S = 0.05
RECONNECT_S = 0.1
QUEUE_LIMIT = 4096
WORKER_HELLO_TIMEOUT_S = 30.0


@dataclass(frozen=True, slots=True)
class AgentConfig:
    """What an agent daemon is started with."""

    controller: str
    job: str
    node: str
    script: Script
    nproc: int
    log_dir: Path
    local_addr: str = "127.0.0.1"
    token: str = field(default="", repr=False)
    quiet: bool = False
    record_dir: str = ""
    seed: int = 0
    share_memory: bool = True
    gc_every: int = 0
    snapshot_memory_bytes: int = 0
    connect_timeout_s: float = 30.0
    controller_timeout_s: float = 600.0
    labels: tuple[tuple[str, str], ...] = ()
    log_format: str = "text"
    metrics: ExporterConfig = field(default_factory=ExporterConfig)


class _Worker:
    """What the shell holds for one worker."""

    def __init__(self) -> None:
        self.process: WorkerProcess | None = None
        self.outputs: tuple[OutputPipe, OutputPipe] | None = None
        self.commands: asyncio.Queue[WorkerCommand | None] = asyncio.Queue(QUEUE_LIMIT)

    def release(self) -> None:
        if self.outputs is not None:
            for pipe in self.outputs:
                pipe.drain()
        if self.process is not None:
            self.process.close()
        self.commands.put_nowait(None)


class AgentServer(runtime_pb2_grpc.WorkerServicer):
    """One node's agent."""

    def __init__(
        self,
        settings: AgentConfig,
        socket_path: Path,
        peer_address: str,
        store: StoreService,
        snapshots: NodeSnapshots,
        standby: Standby,
        log: Log,
    ) -> None:
        self.config = settings
        self.log = log
        self.socket_path = socket_path
        self.store = store
        self.snapshots = snapshots
        hello = AgentHello(
            job=settings.job,
            node=settings.node,
            incarnation=f"{settings.node}:{os.getpid()}:{time.monotonic_ns()}",
            token=settings.token,
            pid=os.getpid(),
            nproc=settings.nproc,
            peer_address=peer_address,
            worker_address=settings.local_addr,
            labels=settings.labels,
            data_key=snapshots.public_key,
        )
        self.machine = AgentMachine(
            AgentSettings(
                hello,
                connect_timeout_s=settings.connect_timeout_s,
                controller_timeout_s=settings.controller_timeout_s,
            )
        )
        self.standby = standby
        self.warm = asyncio.Event()
        self.ending = asyncio.Event()
        self.workers: dict[str, _Worker] = {}
        self.outgoing: asyncio.Queue[AgentMessage | None] | None = None
        self.over = asyncio.Event()
        self.exit_code = 0
        self.reason = ""
        self.tasks: set[asyncio.Task[None]] = set()
        self.base_environment = config.worker_base_environment()
        self.meter = WorkerMeter()

    def where(self) -> tuple[int, int]:
        """Return the newest generation and step that any worker of this node shows."""
        found = [self._where_is(worker) for worker in self.workers.values()]
        return max((generation for generation, _ in found), default=0), max((step for _, step in found), default=0)

    def _where_is(self, worker: _Worker) -> tuple[int, int]:
        if worker.process is None:
            return nowhere()
        shown = worker.process.progress()
        return shown.generation, shown.committed

    # -- the machine -----------------------------------------------------------------------------------------------

    def handle(self, event: AgentEvent) -> None:
        """Give the machine one event and perform its effects in order."""
        for effect in self.machine.step(event, time.monotonic()):
            match effect:
                case Fork(order):
                    self._spawn(self._fork(order))
                case Signal(worker_id, signum, _):
                    worker = self.workers.get(worker_id)
                    if worker is not None and worker.process is not None:
                        worker.process.signal_group(signum)
                case Report(message):
                    self._send(message)
                case Forward(worker_id, command):
                    self._note_world(command)
                    worker = self.workers.get(worker_id)
                    if worker is not None:
                        worker.commands.put_nowait(command)
                case OpenGeneration(generation):
                    self.store.open_generation(generation)
                case CarryOut(order):
                    self._spawn(self._carry_out(order))
                case DropConnection():
                    self._send(None)
                case EndAgent(code, reason):
                    self.exit_code, self.reason = code, reason
                    self._send(None)
                    self.over.set()
        if self.machine.ending is not None:
            self.ending.set()

    def _note_world(self, command: WorkerCommand) -> None:
        match command:
            case Prepare(plan):
                self.snapshots.world_prepared(plan)
            case Commit(generation):
                self.snapshots.world_committed(generation)

    def _send(self, message: AgentMessage | None) -> None:
        if self.outgoing is not None:
            self.outgoing.put_nowait(message)

    def _spawn(self, work) -> None:  # type: ignore[no-untyped-def]
        task = asyncio.get_running_loop().create_task(work)
        self.tasks.add(task)
        task.add_done_callback(self._task_done)

    def _task_done(self, task: asyncio.Task[None]) -> None:
        self.tasks.discard(task)
        if not task.cancelled() and task.exception() is not None:
            self.log.say(f"fault: {task.exception()!r}")
            self.exit_code = 1
            self.over.set()

    async def _carry_out(self, order: Order) -> None:
        match order:
            case ProbePeers():
                answer: Answer = await self._probe(order)
            case FindSnapshots():
                answer = await self.snapshots.find(order)
            case AssembleSnapshot():
                answer = await self.snapshots.assemble(order)
            case FindCheckpoint():
                answer = await self.snapshots.look(order)
            case SaveCheckpoint():
                answer = await self.snapshots.save(order)
            case CollectEvidence():
                answer = await self._collect(order)
        self.handle(CarriedOut(answer))

    async def _collect(self, order: CollectEvidence) -> EvidenceCollected:
        """Look at this node's workers. What cannot be had is left out: no loss waits for it, and none is caused by it."""
        now = time.monotonic()
        subjects = {}
        for worker_id, worker in self.workers.items():
            if worker.process is not None:
                moved_at = self.machine.workers[worker_id].moved_at
                folder = log_folder(self.config.log_dir, worker_id)
                subjects[worker_id] = evidence.Subject(worker.process, folder, now - (moved_at or now))
        try:
            return await evidence.collect(order, subjects)
        except Exception as error:
            self.log.say(f"no evidence was collected: {error!r}")
            return EvidenceCollected(order.inquiry)

    async def _probe(self, order: ProbePeers) -> PeersProbed:
        timeout_s = order.timeout_ms / 1000
        reached = await asyncio.gather(*(self.store.reaches(p.node, p.address, timeout_s) for p in order.peers))
        silent = tuple(peer.node for peer, answered in zip(order.peers, reached, strict=True) if not answered)
        return PeersProbed(order.generation, silent)

    # -- processes -------------------------------------------------------------------------------------------------

    async def _warm_up(self) -> None:
        try:
            await self.standby.start(self.base_environment)
        except (OSError, TimeoutError) as error:
            self.handle(EndAsked(f"the warm standby did not start: {error}"))
            return
        if self.config.share_memory and self.standby.memory_obstacle:
            self.log.say(
                "workers of this node send gradients to each other instead of sharing memory: "
                f"{self.standby.memory_obstacle} (--no-share-memory says so from the start)"
            )
        self.warm.set()

    async def _is_warm(self) -> bool:
        """Wait for the standby; returns False when the agent is ending instead."""
        waits = [asyncio.ensure_future(event.wait()) for event in (self.warm, self.ending)]
        await asyncio.wait(waits, return_when=asyncio.FIRST_COMPLETED)
        for wait in waits:
            wait.cancel()
        return not self.ending.is_set()

    async def _fork(self, order: StartWorker) -> None:
        if not await self._is_warm():
            self.handle(ForkFailed(order.worker, "the agent is ending"))
            return
        worker = _Worker()
        self.workers[order.worker] = worker
        progress_fd = ProgressPage.create(order.worker.replace("/", "-"))
        stacks_fd = os.memfd_create("elastic-stacks")
        try:
            worker.outputs = open_outputs(
                *(self.config.log_dir, order.worker, order.rank_hint, self.log, lambda: self._where_is(worker)),
                quiet=self.config.quiet,
            )
            environment = worker_environment(
                self.base_environment,
                agent_socket=self.socket_path,
                worker=order.worker,
                local_rank=order.local_rank,
                nproc=self.config.nproc,
                rank=order.rank_hint,
                world_size=order.world_size_hint,
                record_dir=self.config.record_dir,
                seed=self.config.seed,
                gc_every=self.config.gc_every,
                shares_memory=self.config.share_memory and not self.standby.memory_obstacle,
                memory_socket=self.snapshots.socket_path,
            )
            out, err = worker.outputs
            pid = await self.standby.fork(
                order.worker, self.config.script, environment, (out.write_fd, err.write_fd, progress_fd, stacks_fd)
            )
            worker.process = WorkerProcess(
                order.worker, pid, ProgressPage(progress_fd), os.dup(stacks_fd), self._process_ended
            )
        except (OSError, TimeoutError) as error:
            del self.workers[order.worker]
            self.handle(ForkFailed(order.worker, str(error)))
            self._spawn(self._revive_standby())
            return
        finally:
            os.close(progress_fd)
            os.close(stacks_fd)
            for pipe in worker.outputs or ():
                pipe.handed_over()
        self.snapshots.worker_started(order.worker, pid)
        self.handle(Forked(order.worker, pid))

    def _process_ended(self, worker_id: str) -> None:
        self._spawn(self._reap(worker_id))

    async def _reap(self, worker_id: str) -> None:
        worker = self.workers[worker_id]
        assert worker.process is not None
        try:
            code, detected_by = await self.standby.reap(worker.process.pid), "pidfd"
        except (OSError, TimeoutError):
            code, detected_by = -signal.SIGKILL, "pidfd, with its fork server"
        self._look(worker_id, worker)
        self.snapshots.worker_ended(worker_id)
        worker.process.signal_group(signal.SIGKILL)  # whatever it started must not outlive it
        self.handle(ProcessEnded(worker_id, code, detected_by))
        self.meter.ended(worker_id)
        worker.release()
        del self.workers[worker_id]
        await self._revive_standby()

    async def _revive_standby(self) -> None:
        """Start another standby if it was found dead; its workers have died with it."""
        if not self.standby.lives and self.warm.is_set():
            self.warm.clear()
            await self.standby.stop()
            await self._warm_up()

    def _look(self, worker_id: str, worker: _Worker) -> None:
        if worker.process is None:
            return
        shown = worker.process.progress()
        self.meter.look(worker_id, worker.process)
        self.handle(
            Looked(
                worker_id,
                worker.process.state(),
                shown.generation,
                shown.committed,
                shown.progress,
                shown.loss,
                shown.samples,
                shown.busy_until_s,
                shown.waits,
                self.snapshots.stable,
                shown.compute_s or self.meter.compute_s(worker_id),
                shown.gradient_norm,
                shown.operation,
                shown.evaluated_s,
                shown.busy_s,
            )
        )

    async def tick_forever(self) -> None:
        """Look at every worker and give the machine the time."""
        while not self.over.is_set():
            for worker_id, worker in list(self.workers.items()):
                self._look(worker_id, worker)
            self.handle(Tick())
            self.snapshots.tick()
            await asyncio.sleep(TICK_S)

    # -- workers ---------------------------------------------------------------------------------------------------

    async def Attach(
        self, request_iterator: AsyncIterator[runtime_pb2.WorkerUp], context: channels.Context
    ) -> AsyncIterator[runtime_pb2.WorkerCommand]:
        """One worker's stream."""
        first = await asyncio.wait_for(anext(request_iterator), WORKER_HELLO_TIMEOUT_S)
        if first.WhichOneof("body") != "hello" or first.hello.worker not in self.workers:
            await context.abort(grpc.StatusCode.PERMISSION_DENIED, "this agent did not start that worker")
        worker_id = first.hello.worker
        worker = self.workers[worker_id]
        reader = asyncio.create_task(self._read_worker(worker_id, request_iterator))
        try:
            while True:
                command = await worker.commands.get()
                if command is None:
                    return
                yield wrap("WorkerCommand", command)
        finally:
            reader.cancel()

    async def _read_worker(self, worker_id: str, messages: AsyncIterator[runtime_pb2.WorkerUp]) -> None:
        try:
            async for message in messages:
                self.handle(WorkerSaid(worker_id, unwrap(message.message)))
        except grpc.aio.AioRpcError:
            return  # the process ended; its pidfd says how

    # -- the controller --------------------------------------------------------------------------------------------

    async def link_forever(self) -> None:
        """Keep one stream to the controller open."""
        channel = channels.client(self.config.controller)
        stub = runtime_pb2_grpc.ControllerStub(channel)
        try:
            while not self.over.is_set():
                self.outgoing = asyncio.Queue(QUEUE_LIMIT)
                reason = "the controller closed the stream"
                try:
                    call = stub.Attach(self._outgoing_messages(self.outgoing))
                    self.handle(Connected())
                    async for message in call:
                        self.handle(Heard(unwrap(message)))
                except grpc.aio.AioRpcError as error:
                    reason = error.details() or "reset"
                self.outgoing = None
                if self.over.is_set():
                    return
                self.handle(Disconnected(reason))
                await asyncio.sleep(RECONNECT_S)
        finally:
            await channel.close()

    async def _outgoing_messages(
        self, queue: asyncio.Queue[AgentMessage | None]
    ) -> AsyncIterator[runtime_pb2.AgentMessage]:
        while True:
            message = await queue.get()
            if message is None:
                return
            yield wrap("AgentMessage", message)

    def metrics(self) -> list[Metric]:
        """Return the values of all of the agent's metrics."""
        page = Page(self.config.job)
        node = self.config.node
        page.put(metrics.CONNECTED, self.machine.connected, node)
        page.put(metrics.WORKERS, len(self.workers), node)
        self.meter.put(page, node)
        page.put(metrics.SNAPSHOT_STEP, max(0, self.snapshots.stable), node)
        page.put(metrics.SNAPSHOT_BYTES, self.snapshots.used_bytes, node)
        page.put(metrics.SNAPSHOT_BUDGET, self.config.snapshot_memory_bytes, node)
        put_node(page, node, self.config.log_dir)
        return page.families()

    async def close(self) -> None:
        """Release what is left."""
        await self.snapshots.close()
        await self.standby.stop()
        await self.store.close()


async def serve(settings: AgentConfig) -> int:
    """Run an agent until its controller lets it go; returns the exit code."""
    # A short path: that of a unix socket has 107 bytes.
    with tempfile.TemporaryDirectory(prefix="elastic-agent-", ignore_cleanup_errors=True) as folder:
        return await _serve(settings, Path(folder) / "agent.sock")


async def _serve(settings: AgentConfig, socket_path: Path) -> int:
    store = StoreService(settings.node)
    peers, local = channels.server(), channels.server()
    runtime_pb2_grpc.add_StoreServicer_to_server(store, peers)
    port = channels.listen(peers, settings.local_addr, 0, what="the agent's peer service")
    standby = Standby()
    log = Log("agent", settings.job, settings.node, settings.log_format == "json")

    async def launch_keeper(fd: int) -> ForkedDaemon:
        return ForkedDaemon(standby, await standby.fork_daemon("keeper", fd))

    snapshots = NodeSnapshots(
        settings.job,
        settings.node,
        settings.local_addr,
        socket_path.with_name("memory.sock"),
        settings.snapshot_memory_bytes,
        store,
        launch_keeper,
        make_keys() if settings.token else None,
        log,
    )
    await snapshots.start()
    peer_address = channels.join_address(settings.local_addr, port)
    agent = AgentServer(settings, socket_path, peer_address, store, snapshots, standby, log)
    log.where = agent.where
    runtime_pb2_grpc.add_WorkerServicer_to_server(agent, local)
    runtime_pb2_grpc.add_StoreServicer_to_server(store, local)
    local.add_insecure_port(f"unix:{socket_path}")
    exporter = None
    if settings.metrics.port is not None:
        exporter = Exporter(settings.metrics, agent.metrics)
        log.say(f"metrics at http://{exporter.address}/metrics")
    await peers.start()
    await local.start()
    loop = asyncio.get_running_loop()
    for signum in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(signum, agent.handle, EndAsked(f"{signum.name} received"))
    link = asyncio.create_task(agent.link_forever())
    background = [asyncio.create_task(agent._warm_up()), asyncio.create_task(agent.tick_forever())]
    for task in background:
        task.add_done_callback(agent._task_done)
    await agent.over.wait()
    await asyncio.wait([link], timeout=2.0)  # the goodbye leaves before the process does
    for task in (*background, link):
        task.cancel()
    if exporter is not None:
        await asyncio.to_thread(exporter.close)  # a scrape in progress still reads in this loop
    await agent.close()
    await local.stop(0)
    await peers.stop(0)
    if agent.exit_code:
        log.say(agent.reason)
    return agent.exit_code



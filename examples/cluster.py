"""Several nodes on one machine: a controller and agents, made to be killed, stopped and started again.

For the demo and the benchmarks. Nothing of it outlives the process that made it, however that ends: daemons
die with their parent, and their workers with them.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import FrameType, TracebackType
from typing import Any

import psutil

from elastic.cli.people import People
from elastic.domain import NodeView, Plan, StatusReply, WorkerView
from elastic.errors import Unreachable

ROOT = Path(__file__).resolve().parents[1]
POLL_S = 0.05
START_TIMEOUT_S = 60.0
STOP_TIMEOUT_S = 10.0
LOG_TAIL_LINES = 12


class ClusterError(Exception):
    """What was waited for did not happen; the message says what that was, and what was said last."""


def ignore(reply: StatusReply) -> None:
    """Take no notice of a status."""


class Cluster:
    """One job on this machine.

    Args:
        folder: For ledger, logs and sockets; its path must be short (a socket's path has 107 bytes).
        script: The script and its arguments, as for `elastic agent`; ("-m", module, ...) for a module.
        nodes_min, nodes_max: Nodes that the job may have; it begins as soon as the most are there.
        controller_options, agent_options: More options for `elastic controller`, and for each `elastic agent`.
    """

    def __init__(
        self,
        folder: Path,
        script: Sequence[str],
        *,
        nodes_min: int = 1,
        nodes_max: int = 1,
        controller_options: Sequence[str] = (),
        agent_options: Sequence[str] = (),
    ) -> None:
        self.folder = folder
        self.summary_file = folder / "summary.json"
        self.on_status: Callable[[StatusReply], None] = ignore  # sees every answer of the controller
        self._script = tuple(script)
        self._nodes = (nodes_min, nodes_max)
        self._controller_options = tuple(controller_options)
        self._agent_options = tuple(agent_options)
        self._controller: subprocess.Popen[bytes] | None = None
        self._agents: dict[str, subprocess.Popen[bytes]] = {}
        self._port = 0
        self._host = "127.0.0.1"  # of the controller
        self._people: People | None = None

    def __enter__(self) -> Cluster:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    # -- daemons ---------------------------------------------------------------------------------------------

    def start_controller(self) -> None:
        """Start the controller, or start it again on its ledger and its port; returns when it listens."""
        port_file = self.folder / "controller.port"
        port_file.unlink(missing_ok=True)
        low, high = self._nodes
        self._controller = self._start(
            "controller", "controller", "--nnodes", f"{low}:{high}", "--port", str(self._port),
            "--ledger", str(self.folder / "ledger.sqlite"), "--port-file", str(port_file),
            "--summary", str(self.summary_file), "--host", self._host, *self._controller_options,
        )  # fmt: skip
        self.wait("the controller listens", port_file.exists, START_TIMEOUT_S)
        self._port = int(port_file.read_text())
        if self._people is None:
            self._people = People(self._door())

    def start_agent(self, node: str, workers: int = 1) -> None:
        """Start a node's agent; returns at once."""
        module = self._script[0] == "-m"
        self._agents[node] = self._start(
            node, "agent", "--controller", f"{self._host}:{self._port}", "--node-id", node,
            "--nproc-per-node", str(workers), "--log-dir", str(self.folder / "logs"), *self._agent_options,
            *(("--module", "--", *self._script[1:]) if module else ("--", *self._script)),
        )  # fmt: skip

    def _start(self, name: str, command: str, *arguments: str) -> subprocess.Popen[bytes]:
        # Not by preexec_fn: that runs gRPC's handlers of a fork, which break this process's connection.
        code = (
            "import sys; from elastic.lifeline import die_with_parent; die_with_parent(int(sys.argv.pop(1)));"
        )
        code += "from elastic.cli import main; main()"
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "TMPDIR": str(self.folder)}
        with (self.folder / f"{name}.log").open("ab") as log:
            return subprocess.Popen(
                [*self._inside(name), sys.executable, "-c", code, str(os.getpid()), command, *arguments],
                cwd=ROOT,
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,  # Ctrl-C reaches this process only, which then ends all in order
            )

    def _inside(self, name: str) -> Sequence[str]:
        """Return what a daemon's command line begins with, where it runs on a host of its own."""
        return ()

    def _door(self) -> str:
        """Return HOST:PORT at which this process reaches the controller."""
        return f"{self._host}:{self._port}"

    # -- what people see -------------------------------------------------------------------------------------

    def status(self) -> StatusReply:
        """Return the job's status. Raises Unreachable while there is no controller."""
        assert self._people is not None, "the controller was not started"
        reply = self._people.status(timeout_s=2.0)
        self.on_status(reply)
        return reply

    def node(self, name: str) -> NodeView:
        """Return one node's part of the status."""
        for view in self.status().nodes:
            if view.id == name:
                return view
        raise ClusterError(f"there is no node {name}")

    def members(self) -> list[WorkerView]:
        """Return the workers of the present world."""
        return [worker for node in self.status().nodes for worker in node.workers if worker.state == "member"]

    def plan(self) -> Plan:
        """Return how the job's pipeline is cut at present."""
        assert self._people is not None, "the controller was not started"
        return self._people.plan().plan

    def newest_event(self, kind: str) -> str:
        """Return what the newest event of a kind says."""
        assert self._people is not None, "the controller was not started"
        texts = [event.text for event in self._people.events(0, follow=False) if event.kind == kind]
        if not texts:
            raise ClusterError(f"the job has had no event {kind!r}")
        return texts[-1]

    def summary(self) -> dict[str, Any]:
        """Return what the controller wrote at the end of the job."""
        summary: dict[str, Any] = json.loads(self.summary_file.read_text())
        return summary

    def wait(self, what: str, holds: Callable[[], bool], timeout_s: float) -> None:
        """Wait until something holds.

        Raises:
            ClusterError: it does not hold in time, or the job ended.
        """
        deadline = time.monotonic() + timeout_s
        silence = ""
        while True:
            try:
                if holds():
                    return
                silence = ""
            except Unreachable as error:
                silence = f" ({error})"
            if self._controller is not None and (code := self._controller.poll()) is not None and code >= 0:
                raise ClusterError(f"the job ended while waiting until {what}{self.last_words()}")
            if time.monotonic() > deadline:
                raise ClusterError(
                    f"waited {timeout_s:.0f} s in vain until {what}{silence}{self.last_words()}"
                )
            time.sleep(POLL_S)

    def wait_for_world(self, size: int, timeout_s: float, *, steps: int = 3, beyond_step: int = 0) -> StatusReply:
        """Wait until a world of this size has committed a few steps, and all up to one; returns the status then."""
        seen: dict[int, int] = {}
        last: list[StatusReply] = []

        def trains() -> bool:
            reply = self.status()
            last[:] = [reply]
            workers = (worker for node in reply.nodes for worker in node.workers)
            # Members say themselves in which generation they are; the controller says it a moment sooner.
            here = [w for w in workers if (w.state, w.generation) == ("member", reply.generation)]
            if not reply.world_size == len(here) == size:
                return False
            return reply.step >= max(seen.setdefault(reply.generation, reply.step), beyond_step) + steps

        self.wait(f"a world of {size} trains", trains, timeout_s)
        return last[0]

    def wait_for_end(self, timeout_s: float) -> int:
        """Wait until the job is over; returns the controller's exit code."""
        assert self._controller is not None
        deadline = time.monotonic() + timeout_s
        while (code := self._controller.poll()) is None:
            if time.monotonic() > deadline:
                raise ClusterError(f"the job did not end within {timeout_s:.0f} s{self.last_words()}")
            with contextlib.suppress(Unreachable):
                self.status()
            time.sleep(10 * POLL_S)
        return code

    def last_words(self) -> str:
        """Return the end of the controller's log, to go on with an error message."""
        log = self.folder / "controller.log"
        lines = log.read_text(errors="replace").splitlines()[-LOG_TAIL_LINES:] if log.exists() else []
        return ". What the controller said last:" + "".join(f"\n  {line}" for line in lines) if lines else ""

    def processes(self, name: str) -> list[psutil.Process]:
        """Return everything that runs on a node, its agent first."""
        return _tree(self._agents[name].pid)

    # -- harm ------------------------------------------------------------------------------------------------

    def kill_controller(self) -> None:
        """SIGKILL the controller."""
        assert self._controller is not None
        self._controller.kill()
        self._controller.wait()

    def kill_node(self, name: str) -> None:
        """SIGKILL a node's agent; its workers die with it."""
        self._agents[name].kill()
        self._agents[name].wait()

    def kill_workers(self, *lost_nodes: str) -> None:
        """SIGKILL every worker of the present world, and the agents of these nodes in the same moment."""
        lost = [self._agents[name] for name in lost_nodes]
        for pid in [*(agent.pid for agent in lost), *(worker.pid for worker in self.members())]:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        for agent in lost:
            agent.wait()

    def stop_node(self, name: str) -> None:
        """SIGSTOP everything on a node."""
        for process in self.processes(name):
            process.send_signal(signal.SIGSTOP)

    def continue_node(self, name: str) -> None:
        """SIGCONT everything on a node."""
        for process in self.processes(name):
            with contextlib.suppress(psutil.NoSuchProcess):
                process.send_signal(signal.SIGCONT)

    # -- the end ---------------------------------------------------------------------------------------------

    def close(self) -> None:
        """End what still runs: first in order, then by force."""
        deadline = time.monotonic() + STOP_TIMEOUT_S
        if self._controller is not None and self._controller.poll() is None:
            self._controller.terminate()
        daemons = [daemon for daemon in (self._controller, *self._agents.values()) if daemon is not None]
        while time.monotonic() < deadline and any(daemon.poll() is None for daemon in daemons):
            time.sleep(POLL_S)
        for daemon in daemons:
            if daemon.poll() is None:
                for process in _tree(daemon.pid):
                    with contextlib.suppress(psutil.NoSuchProcess):
                        process.kill()
            daemon.wait()
        if self._people is not None:
            self._people.close()
            self._people = None


def _tree(pid: int) -> list[psutil.Process]:
    """Return a process and all that descend from it."""
    try:
        process = psutil.Process(pid)
        return [process, *process.children(recursive=True)]
    except psutil.NoSuchProcess:
        return []


@contextlib.contextmanager
def temporary_folder() -> Iterator[Path]:
    """Give a folder with a short path, and remove it at the end."""
    folder = Path(tempfile.mkdtemp(prefix="elastic-", dir="/tmp" if os.access("/tmp", os.W_OK) else None))
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def end_on_signals() -> None:
    """Let SIGTERM and SIGHUP end this program as Ctrl-C does, so that it tidies up behind itself."""

    def interrupt(signum: int, frame: FrameType | None) -> None:
        raise KeyboardInterrupt

    if threading.current_thread() is threading.main_thread():
        for signum in (signal.SIGTERM, signal.SIGHUP):
            signal.signal(signum, interrupt)


def run_undisturbed(
    folder: Path,
    script: Sequence[str],
    workers: int,
    timeout_s: float,
    on_status: Callable[[StatusReply], None] = ignore,
) -> dict[str, Any]:
    """Train a script with nothing done to it; returns the job's summary.

    Args:
        folder, script, workers: As for `Cluster`; one node has all workers.
        on_status: Sees the job's status now and then.

    Raises:
        ClusterError: the job failed or did not end in time.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with Cluster(folder, script) as cluster:
        cluster.start_controller()
        cluster.start_agent("node", workers)
        cluster.on_status = on_status
        if cluster.wait_for_end(timeout_s) != 0:
            raise ClusterError(f"the undisturbed run failed{cluster.last_words()}")
        return cluster.summary()

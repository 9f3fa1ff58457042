"""Whole jobs for tests: start the daemons as a person would, ask, hurt, wait with a deadline, and leave nothing behind."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import uuid
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from benchmarks.netlab import Lab
from elastic.cli.people import People
from elastic.config import ENV_FAIL_POINTS, ENV_TOKEN
from elastic.errors import Unreachable
from elastic.wire.convert import to_plain

ELASTIC = Path(sys.executable).parent / "elastic"
TRAIN = Path(__file__).with_name("train.py")
DEADLINE_S = 45.0
"""For things that should take a second or two, on a machine that is busy with other things."""
POLL_S = 0.02
MARK = "ELASTIC_E2E_JOB"

Status = dict[str, Any]
T = TypeVar("T")


@dataclass(frozen=True)
class Done:
    """What a command that ended has left."""

    code: int
    out: str
    err: str


class Job:
    """One job in a directory of its own; as a context manager, it ends all of its processes.

    Every process that descends from it carries a mark in its environment, by which it is found wherever it went.
    """

    def __init__(self) -> None:
        self.token = ""  # what all its agents show
        # A short path: the agent's unix socket lies below it, and such a path has 107 bytes.
        self.folder = Path(tempfile.mkdtemp(prefix="e2e-"))
        self.fail_points = self.folder / "fail-points"  # once it exists, processes may be asked to die
        self.mark = uuid.uuid4().hex
        self.address = ""
        self.started: dict[str, subprocess.Popen[bytes]] = {}
        self._people: People | None = None

    def __enter__(self) -> Job:
        return self

    def __exit__(self, *_: object) -> None:
        self.end()

    # -- starting --------------------------------------------------------------------------------------------------

    @property
    def environment(self) -> dict[str, str]:
        """What every process of the job is started with."""
        ours = {name: value for name, value in os.environ.items() if not name.startswith("ELASTIC_")}
        ours |= {ENV_TOKEN: self.token} if self.token else {}
        ours |= {ENV_FAIL_POINTS: str(self.fail_points)} if self.fail_points.exists() else {}
        return ours | {MARK: self.mark, "TMPDIR": str(self.folder), "OMP_NUM_THREADS": "1", "COLUMNS": "200"}

    def start(self, name: str, *command: object) -> subprocess.Popen[bytes]:
        """Start a process; what it says goes to NAME.out and NAME.err."""
        with (self.folder / f"{name}.out").open("ab") as out, (self.folder / f"{name}.err").open("ab") as err:
            process = subprocess.Popen(
                [str(part) for part in command],
                cwd=self.folder,
                env=self.environment,
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=err,
                start_new_session=True,
            )
        self.started[name] = process
        return process

    def elastic(self, *arguments: object, timeout_s: float = DEADLINE_S) -> Done:
        """Run one `elastic` command to its end."""
        return self.call(ELASTIC, *arguments, timeout_s=timeout_s)

    def call(self, *command: object, timeout_s: float = DEADLINE_S) -> Done:
        """Run a command to its end."""
        name = f"call{len(self.started)}"
        process = self.start(name, *command)
        return self.ended(process, timeout_s)

    def ask(self, command: str, *arguments: object) -> Done:
        """Run one of the commands that ask the controller."""
        return self.elastic(command, "--controller", self.address, *arguments)

    def run(
        self,
        workers: int,
        *options: object,
        train: Sequence[object] = (),
        script: Path = TRAIN,
        name: str = "run",
    ) -> subprocess.Popen[bytes]:
        """Start `elastic run` with these workers; `train` are the script's arguments."""
        folder = self.folder / "run"
        process = self.start(
            name,
            *(ELASTIC, "run", "--nproc-per-node", workers, "--port", 0, "--run-dir", folder, "--node-id", "a"),
            *("--summary", self.folder / "summary.json"),
            *options,
            script,
            *train,
        )
        self._wait_for_port(folder / "controller.port", process)
        return process

    def controller(self, *options: object, name: str = "controller", port: int = 0) -> subprocess.Popen[bytes]:
        """Start a controller on the job's ledger."""
        port_file = self.folder / "controller.port"
        port_file.unlink(missing_ok=True)
        process = self.start(
            name,
            *(ELASTIC, "controller", "--port", port, "--port-file", port_file),
            *("--ledger", self.folder / "ledger.sqlite", "--summary", self.folder / "summary.json"),
            *options,
        )
        self._wait_for_port(port_file, process)
        return process

    def agent(
        self,
        node: str,
        workers: int,
        *options: object,
        train: Sequence[object] = (),
        script: Path = TRAIN,
        verb: str = "agent",
        name: str = "",
    ) -> subprocess.Popen[bytes]:
        """Start a node's agent, as `elastic agent` or as `elastic run --controller`."""
        return self.start(
            name or f"agent-{node}",
            *(ELASTIC, verb, "--controller", self.address, "--node-id", node, "--nproc-per-node", workers),
            *("--log-dir", self.folder / "logs" / node),
            *options,
            script,
            *train,
        )

    def lab_start(
        self, lab: Lab, host: str, port: int, nodes: Sequence[str], *options: object, train: Sequence[object] = ()
    ) -> None:
        """Start a controller on one host of a lab, and an agent with one worker on each of the others."""
        port_file = self.folder / "controller.port"
        process = self.start(
            "controller",
            *lab.inside(host),
            *(ELASTIC, "controller", "--host", lab.address(host), "--port", port, "--port-file", port_file),
            *("--ledger", self.folder / "ledger.sqlite", "--summary", self.folder / "summary.json"),
            *options,
        )
        for node in nodes:
            self.start(
                f"agent-{node}",
                *lab.inside(node),
                *(ELASTIC, "agent", "--controller", f"{lab.address(host)}:{port}", "--node-id", node),
                *("--local-addr", lab.address(node), "--log-dir", self.folder / "logs" / node),
                TRAIN,
                *train,
            )
        self.eventually(lambda: port_file.exists() or process.poll() is not None, "a controller that listens")
        self.connect(lab.door(host, port))

    def _wait_for_port(self, port_file: Path, process: subprocess.Popen[bytes]) -> None:
        def ready() -> bool:
            assert process.poll() is None, f"it ended with code {process.returncode} before it listened"
            return port_file.exists()

        self.eventually(ready, "a controller that listens")
        self.connect(int(port_file.read_text()))

    def connect(self, port: int) -> None:
        """Ask the controller at this port from now on."""
        self.address = f"127.0.0.1:{port}"
        if self._people is not None:
            self._people.close()
        self._people = People(self.address)

    # -- the switches of the training script -----------------------------------------------------------------------

    @property
    def held(self) -> tuple[object, ...]:
        """Arguments with which the script is slow, and does not end, until `let_go`."""
        return "--go", self.folder / "go", "--out", self.folder / "out"

    def let_go(self) -> None:
        """Let the script run on at full speed, to its end."""
        (self.folder / "go").touch()

    # -- asking ----------------------------------------------------------------------------------------------------

    def status(self) -> Status | None:
        """Return the status as `elastic status --json` shows it; None while nobody answers."""
        assert self._people is not None
        try:
            return dict(to_plain(self._people.status(timeout_s=2.0)))
        except Unreachable:
            return None

    def wait_for(self, settled: Callable[[Status], T | None], what: str, timeout_s: float = DEADLINE_S) -> T:
        """Return the first true answer of `settled` to a status."""

        def look() -> T | None:
            status = self.status()
            return settled(status) if status is not None else None

        return self.eventually(look, what, timeout_s)

    def eventually(self, settled: Callable[[], T | None], what: str, timeout_s: float = DEADLINE_S) -> T:
        """Return the first true answer of `settled`; fail with what the job said when the time is up."""
        deadline = time.monotonic() + timeout_s
        while True:
            answer = settled()
            if answer:
                return answer
            if time.monotonic() > deadline:
                raise AssertionError(f"waited {timeout_s:.0f} s in vain for {what}; status: {brief(self.status())}")
            time.sleep(POLL_S)

    def wait_for_world(self, size: int, beyond_step: int = 0, timeout_s: float = DEADLINE_S) -> Status:
        """Wait until a world of this size trains, beyond a step."""

        def there(status: Status) -> Status | None:
            members = members_of(status)
            trains = status["state"] == "running" and status["world_size"] == len(members) == size
            return status if trains and all(m["committed"] > beyond_step for m in members.values()) else None

        return self.wait_for(there, f"a world of {size} beyond step {beyond_step}", timeout_s)

    def wait_for_steps(self, count: int) -> int:
        """Wait until so many more steps are committed; returns the step then."""
        first = self.wait_for(lambda status: (status["step"],), "a status")[0]
        return self.wait_for(lambda status: status["step"] if status["step"] >= first + count else None, f"{count} steps")

    def ended(self, process: subprocess.Popen[bytes], timeout_s: float = DEADLINE_S) -> Done:
        """Wait for the end of a process that was started here."""
        name = next(name for name, started in self.started.items() if started is process)
        try:
            code = process.wait(timeout_s)
        except subprocess.TimeoutExpired:
            raise AssertionError(f"{name} did not end within {timeout_s:.0f} s; status: {brief(self.status())}") from None
        return Done(code, self.said(name, "out"), self.said(name, "err"))

    def said(self, name: str, stream: str = "err") -> str:
        """Return what a process has said so far."""
        return (self.folder / f"{name}.{stream}").read_text(errors="replace")

    def summary(self) -> Status:
        """Return the summary that the job has left."""
        return dict(json.loads((self.folder / "summary.json").read_text()))

    def results(self) -> list[Status]:
        """Return what the workers that came to the end of the script ended with."""
        return [json.loads(path.read_text()) for path in sorted((self.folder / "out").glob("*.json"))]

    def lines(self) -> list[Status]:
        """Return the JSON lines that workers wrote under log/; the last one of a worker that was killed may not be whole."""
        texts = (text for log in (self.folder / "log").glob("*.jsonl") for text in log.read_text().splitlines(keepends=True))
        return [json.loads(text) for text in texts if text.endswith("\n")]

    def fingerprint(self) -> str:
        """Return the one fingerprint of all workers that came to the end."""
        prints = {result["fingerprint"] for result in self.results()}
        assert len(prints) == 1, f"the workers ended with {len(prints)} different states"
        return str(prints.pop())

    # -- hurting ---------------------------------------------------------------------------------------------------

    def kill(self, pid: int, signum: int = signal.SIGKILL) -> None:
        """Signal one process of this job, and no other."""
        assert pid in self.processes(), f"process {pid} is not of this job"
        os.kill(pid, signum)

    def kill_node(self, node: str) -> list[int]:
        """Kill an agent and its workers at once, as a power cut would; returns the workers' pids."""
        view = next(n for n in self.wait_for(lambda s: s["nodes"], "nodes") if n["id"] == node)
        pids = [worker["pid"] for worker in view["workers"]]
        for pid in (view["agent_pid"], *pids):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        return pids

    def kill_everything(self) -> dict[int, str]:
        """Kill every process of the job; returns what could not be ended."""
        deadline = time.monotonic() + DEADLINE_S
        while (alive := self.processes()) and time.monotonic() < deadline:
            for pid in alive:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            time.sleep(POLL_S)
        return alive

    # -- the end ---------------------------------------------------------------------------------------------------

    def processes(self) -> dict[int, str]:
        """Return pid and command line of every live process that descends from this job."""
        found = {}
        needle = f"{MARK}={self.mark}".encode()
        for entry in Path("/proc").iterdir():
            if not entry.name.isdigit():
                continue
            try:
                if needle not in (entry / "environ").read_bytes().split(b"\0"):
                    continue
                if (entry / "stat").read_text().rpartition(")")[2].split()[0] in ("Z", "X"):
                    continue
                command = (entry / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
            except OSError:
                continue  # it ended while we looked
            found[int(entry.name)] = command
        return found

    def assert_nothing_is_left(self, timeout_s: float = 3.0) -> None:
        """Fail if a process of the job still lives (the kernel may take a moment)."""
        self.eventually(lambda: not self.processes(), f"the end of all processes, of {self.processes()}", timeout_s)

    def end(self) -> None:
        """Kill every process of the job and remove its directory; what it said is shown if the test failed."""
        alive = self.kill_everything()
        for process in self.started.values():
            process.wait(DEADLINE_S)
        if self._people is not None:
            self._people.close()
        for path in sorted(self.folder.glob("*.err")):
            print(f"----- {path.name}\n{path.read_text(errors='replace')[-40000:]}")
        shutil.rmtree(self.folder, ignore_errors=True)
        assert not alive, f"could not end {alive}"


def members_of(status: Status) -> Mapping[str, Status]:
    """Return the workers that are members of the present world, by id."""
    return {
        worker["worker"]: worker
        for node in status["nodes"]
        for worker in node["workers"]
        if worker["state"] == "member"
    }


def pids_of(status: Status) -> set[int]:
    """Return the pids of the present world's members."""
    return {worker["pid"] for worker in members_of(status).values()}


def brief(status: Status | None) -> str:
    """Return what matters of a status, in one line."""
    if status is None:
        return "no controller answers"
    workers = [f"{w['worker']}={w['state']}@{w['committed']}" for n in status["nodes"] for w in n["workers"]]
    return (
        f"{status['state']} ({status['reason']}), generation {status['generation']}, step {status['step']}, "
        f"world {status['world_size']}, {', '.join(workers)}"
    )

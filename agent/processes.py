"""Worker processes: forked from the warm standby, watched by pidfd and process state, signalled as a group."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import socket
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

from elastic import config
from elastic.progress import Progress, ProgressPage, StepTimes

STANDBY_READY_TIMEOUT_S = 120.0
ANSWER_TIMEOUT_S = 10.0
_LETTERS = {psutil.STATUS_STOPPED: "T", psutil.STATUS_TRACING_STOP: "t", psutil.STATUS_ZOMBIE: "X"}


@dataclass(frozen=True, slots=True)
class Script:
    """What every worker runs: argv[0] is a path, or a module's name."""

    argv: tuple[str, ...]
    module: bool
    cwd: Path


class Standby:
    """The agent's end of a warm standby process.

    Attributes:
        memory_obstacle: Why the workers of this node cannot read each other's memory; "" if they can.
    """

    def __init__(self) -> None:
        self.memory_obstacle = ""
        self._process: asyncio.subprocess.Process | None = None
        self._channel: socket.socket | None = None
        self._lock = asyncio.Lock()

    @property
    def lives(self) -> bool:
        """Whether it has not been found dead (only asking it something finds that)."""
        return self._channel is not None

    async def start(self, environment: Mapping[str, str]) -> None:
        """Start the process and wait until it is warm. Raises OSError or TimeoutError."""
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        ours.setblocking(False)
        try:
            self._process = await asyncio.create_subprocess_exec(
                sys.executable,
                "-P",
                "-m",
                "elastic.standby",
                str(theirs.fileno()),
                pass_fds=(theirs.fileno(),),
                stdin=asyncio.subprocess.DEVNULL,
                env=dict(environment),
                start_new_session=True,
            )
        finally:
            theirs.close()
        try:
            ready = await _receive(ours, STANDBY_READY_TIMEOUT_S)
        except OSError:
            ours.close()
            raise
        self.memory_obstacle = str(ready["memory_obstacle"])
        self._channel = ours  # not before it is ready: nobody is to wait for its imports

    async def fork(
        self, worker: str, script: Script, environment: Mapping[str, str], fds: Sequence[int]
    ) -> int:
        """Return the pid of a new worker; `fds` are its stdout, stderr, progress page and where it writes its stacks."""
        request = {
            "worker": worker,
            "env": dict(environment),
            "argv": list(script.argv),
            "module": script.module,
            "cwd": str(script.cwd),
        }
        data = json.dumps(request).encode()
        answer = await self._ask(lambda channel: socket.send_fds(channel, [data], list(fds)), "forked", worker)
        return int(answer["pid"])

    async def fork_daemon(self, name: str, fd: int) -> int:
        """Return the pid of a daemon (of `elastic.launch`) that has torch from the start, and this descriptor."""
        data = json.dumps({"daemon": name}).encode()
        answer = await self._ask(lambda channel: socket.send_fds(channel, [data], [fd]), "forked", name)
        return int(answer["pid"])

    async def reap(self, pid: int) -> int:
        """Return the exit code of a worker whose pidfd has said that it ended."""
        data = json.dumps({"reap": pid}).encode()
        answer = await self._ask(lambda channel: channel.send(data), "reaped", pid)
        return int(answer["code"])

    async def _ask(self, send: Callable[[socket.socket], int], key: str, value: object) -> dict[str, Any]:
        """Return the answer to a request; one to a request that was given up is dropped, with its process."""
        async with self._lock:
            try:
                channel = self._live_channel()
                send(channel)
                while (answer := await _receive(channel, ANSWER_TIMEOUT_S)).get(key) != value:
                    if "forked" in answer:
                        os.kill(answer["pid"], signal.SIGKILL)
            except TimeoutError:
                raise  # it is slow, not gone
            except OSError:
                self._hang_up()
                raise
        return answer

    def _hang_up(self) -> None:
        if self._channel is not None:
            self._channel.close()
            self._channel = None

    def _live_channel(self) -> socket.socket:
        if self._channel is None:
            raise OSError("the warm standby is not running")
        return self._channel

    async def stop(self) -> None:
        """End the process."""
        self._hang_up()
        if self._process is not None and self._process.returncode is None:
            self._process.kill()
            await self._process.wait()


async def _receive(channel: socket.socket, timeout_s: float) -> dict[str, Any]:
    data = await asyncio.wait_for(asyncio.get_running_loop().sock_recv(channel, 65536), timeout_s)
    if not data:
        raise OSError("the warm standby has ended")
    answer: dict[str, Any] = json.loads(data)
    return answer


class ForkedDaemon:
    """A daemon that the standby has forked."""

    def __init__(self, standby: Standby, pid: int) -> None:
        self.pid = pid
        self._standby = standby
        self._pidfd = os.pidfd_open(pid)

    def kill(self) -> None:
        """Send SIGKILL."""
        os.kill(self.pid, signal.SIGKILL)

    async def wait(self) -> int:
        """Return its exit code once it has ended."""
        loop, ended = asyncio.get_running_loop(), asyncio.Event()
        loop.add_reader(self._pidfd, ended.set)
        try:
            await ended.wait()
        finally:
            loop.remove_reader(self._pidfd)
            os.close(self._pidfd)
        try:
            return await self._standby.reap(self.pid)
        except OSError:
            return -signal.SIGKILL  # it went with the standby


class WorkerProcess:
    """One worker's process as its agent holds it: pidfd, progress page, console."""

    def __init__(self, worker: str, pid: int, page: ProgressPage, stacks_fd: int, on_end: Callable[[str], None]) -> None:
        self.worker = worker
        self.pid = pid
        self.stacks_fd = stacks_fd  # to which it writes where it is, when asked; this end's own
        self._page = page
        self._process = psutil.Process(pid)
        self._pidfd = os.pidfd_open(pid)
        self._loop = asyncio.get_running_loop()
        self._on_end = on_end
        self._loop.add_reader(self._pidfd, self._ended)

    def _ended(self) -> None:
        self._loop.remove_reader(self._pidfd)
        self._on_end(self.worker)

    def signal_group(self, signum: int) -> None:
        """Signal the worker and what it started (it leads its own session)."""
        try:
            os.killpg(self.pid, signum)
        except ProcessLookupError:
            return
        if signum != signal.SIGKILL:
            os.killpg(self.pid, signal.SIGCONT)  # a stopped process would never see it

    def state(self) -> str:
        """Return the process's state in one letter, as /proc has it: T stopped, t traced, R otherwise, X gone."""
        try:
            return _LETTERS.get(self._process.status(), "R")
        except psutil.NoSuchProcess:
            return "X"

    def progress(self) -> Progress:
        """Return what the worker's progress page shows."""
        return self._page.read()

    def steps(self, after: int) -> tuple[int, list[StepTimes]]:
        """Return how many steps the worker has timed, and those behind the first `after` (`ProgressPage.steps`)."""
        return self._page.steps(after)

    def usage(self) -> tuple[float, int] | None:
        """Return processor seconds and bytes of resident memory; None where the process is gone."""
        try:
            times = self._process.cpu_times()
            return times.user + times.system, self._process.memory_info().rss
        except psutil.Error:
            return None

    def close(self) -> None:
        """Release everything that is held for this process."""
        self._loop.remove_reader(self._pidfd)
        os.close(self._pidfd)
        os.close(self.stacks_fd)
        self._page.close()


def worker_environment(
    base: Mapping[str, str],
    *,
    agent_socket: Path,
    worker: str,
    local_rank: int,
    nproc: int,
    rank: int,
    world_size: int,
    record_dir: str,
    seed: int,
    gc_every: int,
    shares_memory: bool,
    memory_socket: Path,
) -> dict[str, str]:
    """Return the environment of one worker; the names are torchrun's where it has them."""
    environment = dict(base)
    environment.update(
        {
            config.ENV_AGENT: str(agent_socket),
            config.ENV_WORKER: worker,
            config.ENV_RECORD_DIR: record_dir,
            config.ENV_SEED: str(seed),
            config.ENV_GC_EVERY: str(gc_every),
            config.ENV_SHARES_MEMORY: str(int(shares_memory)),
            config.ENV_MEMORY: str(memory_socket),
            "RANK": str(rank),
            "WORLD_SIZE": str(world_size),
            "LOCAL_RANK": str(local_rank),
            "LOCAL_WORLD_SIZE": str(nproc),
        }
    )
    return environment

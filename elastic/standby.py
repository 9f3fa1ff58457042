"""The warm standby: a process with torch already imported, from which workers are forked in milliseconds.

It is started by the agent (`python -P -m elastic.standby FD`), speaks small JSON messages over one inherited socket,
stays single-threaded so that forking is safe, never touches CUDA, and dies with its agent. What DDP and the optimizers
import lazily is imported here too, since a first `optimizer.step()` would otherwise pay two seconds for it.
"""

from __future__ import annotations

import gc
import importlib
import json
import os
import signal
import socket
import sys
from collections.abc import Callable
from typing import Any

from elastic.lifeline import die_with_parent, let_look
from elastic.shared import obstacle
from elastic.stacks import answer_with_stacks

MESSAGE_SIZE_BYTES_MAX = 1024 * 1024
PRELOADED = (
    "torch",
    "torch.distributed",
    "torch.nn.functional",
    "torch.optim.lr_scheduler",
    "torch.utils.data",
    "torch._dynamo",
    "numpy",
    "grpc",
    "elastic.session",
    "elastic.control",
)
OPTIONAL = ("numpy",)
Become = Callable[[dict[str, Any], list[int]], int]
"""What a new process is from now on: a request and its descriptors -> its exit code."""


def preload() -> None:
    """Import what workers need; a missing optional module is left out."""
    for name in PRELOADED:
        try:
            importlib.import_module(name)
        except ImportError:
            if name not in OPTIONAL:
                raise
    gc.collect()
    gc.freeze()  # shared pages stay shared: a worker's collector does not write to what it inherited


def serve(channel: socket.socket) -> None:
    """Fork a worker for each request; reap those that the agent asks about. Returns when the agent is gone."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole terminal group; the agent decides
    channel.send(json.dumps({"ready": os.getpid(), "memory_obstacle": obstacle()}).encode())
    while True:
        data, fds, _, _ = socket.recv_fds(channel, MESSAGE_SIZE_BYTES_MAX, 8)
        if not data:
            return
        request = json.loads(data)
        if "reap" in request:
            _reap(channel, request["reap"])
            continue
        name = request.get("daemon") or request["worker"]
        pid = _fork(channel, _become_daemon if "daemon" in request else _become_worker, request, fds)
        for fd in fds:
            os.close(fd)
        channel.send(json.dumps({"forked": name, "pid": pid}).encode())


def _reap(channel: socket.socket, pid: int) -> None:
    # The agent's pidfd has said that the process ended, so this does not block.
    try:
        _, status = os.waitpid(pid, 0)
        code = os.waitstatus_to_exitcode(status)
    except ChildProcessError:
        code = -signal.SIGKILL
    channel.send(json.dumps({"reaped": pid, "code": code}).encode())


def _fork(channel: socket.socket, become: Become, request: dict[str, Any], fds: list[int]) -> int:
    agent, parent = os.getppid(), os.getpid()
    pid = os.fork()
    if pid:
        return pid
    code = 1
    try:
        os.setsid()
        die_with_parent(parent)
        let_look(agent)
        channel.close()
        code = become(request, fds)
    except BaseException:
        import traceback

        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def _become_worker(request: dict[str, Any], fds: list[int]) -> int:
    stdout_fd, stderr_fd, progress_fd, stacks_fd = fds
    os.dup2(stdout_fd, 1)
    os.dup2(stderr_fd, 2)
    os.close(stdout_fd)
    os.close(stderr_fd)
    os.set_inheritable(progress_fd, True)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    answer_with_stacks(stacks_fd)
    from elastic.worker import run_worker

    return run_worker(request, progress_fd)


def _become_daemon(request: dict[str, Any], fds: list[int]) -> int:
    """Be a daemon of this node's agent that needs torch too, which is here already."""
    from elastic.launch import main as launch

    return launch([request["daemon"], *(str(fd) for fd in fds)])


def main() -> None:
    """Entry point: the one argument is the inherited socket's descriptor."""
    channel = socket.socket(fileno=int(sys.argv[1]))
    die_with_parent(os.getppid())
    preload()
    serve(channel)


if __name__ == "__main__":
    main()

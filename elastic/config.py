"""The only place that reads the environment: what an agent tells a worker, and the daemons' settings files.

Flags beat the environment, which beats the file, which beats the default; click applies that rule to the commands
(`elastic.cli`), from the file that `load_defaults` reads.
"""

from __future__ import annotations

import os
import tempfile
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from elastic.errors import ConfigError

ENV_AGENT = "ELASTIC_AGENT"  # path of the agent's unix socket
ENV_WORKER = "ELASTIC_WORKER"  # worker id that the agent gave
ENV_PROGRESS_FD = "ELASTIC_PROGRESS_FD"
ENV_RECORD_DIR = "ELASTIC_RECORD_SAMPLES"
ENV_SEED = "ELASTIC_SEED"
ENV_SHARES_MEMORY = "ELASTIC_SHARES_MEMORY"
ENV_MEMORY = "ELASTIC_MEMORY"  # path of the agent's socket for snapshot memory
ENV_GC_EVERY = "ELASTIC_GC_EVERY"
ENV_FAIL_POINTS = "ELASTIC_FAIL_POINTS"  # for tests; see elastic.failpoints
ENV_TOKEN = "ELASTIC_TOKEN"  # join token, kept out of command lines


@dataclass(frozen=True, slots=True)
class WorkerConfig:
    """What a worker's agent tells it.

    Attributes:
        agent: Path of the agent's unix socket; "" in a world of one without an agent.
        worker: This process's id.
        rank, world_size: Hints that hold until the first world forms.
        local_rank: Number on this node.
        progress_fd: Descriptor of the progress page; -1 without an agent.
        record_dir: Directory for the record of consumed samples; "" for none.
        seed: Seed for everything; the script may override it in prepare().
        shares_memory: Whether the workers of this node read each other's gradients; alike on all of them.
        gc_every: Steps from one collection of garbage to the next, on all workers alike; 0: Python decides.
        memory: Path of the agent's socket for snapshot memory; "" where there is none.
    """

    agent: str = ""
    worker: str = "alone"
    rank: int = 0
    world_size: int = 1
    local_rank: int = 0
    progress_fd: int = -1
    record_dir: str = ""
    seed: int = 0
    shares_memory: bool = False
    memory: str = ""
    gc_every: int = 0

    @classmethod
    def from_environ(cls, environ: Mapping[str, str] | None = None) -> WorkerConfig:
        """Read the environment that an agent gives its workers. Raises ConfigError for what is not a number."""
        source = os.environ if environ is None else environ
        return cls(
            agent=source.get(ENV_AGENT, ""),
            worker=source.get(ENV_WORKER, "alone"),
            rank=_number(source, "RANK", 0) if source.get(ENV_AGENT) else 0,
            world_size=_number(source, "WORLD_SIZE", 1) if source.get(ENV_AGENT) else 1,
            local_rank=_number(source, "LOCAL_RANK", 0) if source.get(ENV_AGENT) else 0,
            progress_fd=_number(source, ENV_PROGRESS_FD, -1),
            record_dir=source.get(ENV_RECORD_DIR, ""),
            seed=_number(source, ENV_SEED, 0),
            shares_memory=bool(_number(source, ENV_SHARES_MEMORY, 0)),
            memory=source.get(ENV_MEMORY, ""),
            gc_every=_number(source, ENV_GC_EVERY, 0),
        )


def _number(source: Mapping[str, str], name: str, default: int) -> int:
    text = source.get(name, "")
    if not text:
        return default
    try:
        return int(text)
    except ValueError:
        raise ConfigError(f"environment variable {name}={text!r} is not a whole number: unset it or correct it") from None


def join_token() -> str:
    """Return the job's join token; "" where none is required."""
    return os.environ.get(ENV_TOKEN, "")


def fail_points() -> str:
    """Return the folder in which tests ask for deaths; "" for none."""
    return os.environ.get(ENV_FAIL_POINTS, "")


def current_environment() -> dict[str, str]:
    """Return a copy of this process's environment, for a child process."""
    return dict(os.environ)


def worker_base_environment() -> dict[str, str]:
    """Return what the environment of every worker begins with."""
    environment = current_environment()
    # Workers share the cores, and the number of threads is part of a kernel's bits: it must be the same on every node,
    # however many workers each of them runs.
    environment.setdefault("OMP_NUM_THREADS", "1")
    environment.setdefault("PYTHONUNBUFFERED", "1")
    environment["GRPC_ENABLE_FORK_SUPPORT"] = "0"  # workers fork data loaders, which never use the channel
    return environment


def replace_environment(environ: Mapping[str, str]) -> None:
    """Make this process's environment exactly this one (in a freshly forked worker)."""
    os.environ.clear()
    os.environ.update(environ)


def default_run_dir(job: str) -> Path:
    """Return where a job keeps its ledger, logs and sockets unless told otherwise."""
    return Path(tempfile.gettempdir()) / f"elastic-{os.getuid()}" / job


def load_defaults(path: Path) -> dict[str, Any]:
    """Return the settings in a TOML file, one table per command. Raises ConfigError when it cannot be read."""
    try:
        return tomllib.loads(path.read_text())
    except OSError as error:
        raise ConfigError(f"cannot read the settings file {path}: {error.strerror}; check --config") from error
    except tomllib.TOMLDecodeError as error:
        raise ConfigError(f"the settings file {path} is not valid TOML: {error}") from error

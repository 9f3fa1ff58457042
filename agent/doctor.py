"""What `elastic doctor` looks at: `python -m elastic.launch doctor SETTINGS` prints what it finds on this machine, as JSON.

It tries everything as workers, agents and keepers will, in a process like theirs: what is installed need not work. It must
never allocate the memory that it asks about, change anything, or reach another machine.
"""

from __future__ import annotations

import json
import math
import mmap
import os
import platform
import shutil
import sys
from dataclasses import asdict, dataclass
from pathlib import Path, PurePosixPath

import psutil
import torch

from elastic.agreement import numerics
from elastic.checksum import engine
from elastic.errors import ConfigError
from elastic.shared import obstacle
from recovery.choosing import choose_engine, describe
from recovery.isal import IsalEngine

FAST = "pip install 'elastic-runtime[fast]' brings ISA-L, which is many times faster"


@dataclass(frozen=True, slots=True)
class Finding:
    """One thing that was looked at.

    Attributes:
        check: what, in a few words.
        result: what was found.
        advice: what to do about it; "" for nothing.
        hinders: whether a job with default settings cannot do all that it should until that is done.
    """

    check: str
    result: str
    advice: str = ""
    hinders: bool = False


@dataclass(frozen=True, slots=True)
class Memory:
    """What the system has to give, in bytes; infinite where nothing limits it.

    Attributes:
        machine: what is built in.
        group: what the control group (a container, a batch job) may use.
        available: what is free now, or would be.
        promisable: what the kernel still lets processes ask for; it limits only where overcommitting is forbidden.
    """

    machine: float
    group: float
    available: float
    promisable: float


def examine(snapshot_bytes: int) -> list[Finding]:
    """Look at this machine.

    Args:
        snapshot_bytes: what snapshots may take, as `--snapshot-memory` says.
    """
    shared = _shared_memory()  # forks, so it comes before anything that starts a thread
    return [
        Finding("python", f"{platform.python_version()} ({sys.executable})"),
        Finding("torch", f"{torch.__version__}, {torch.get_num_threads()} thread(s) a worker, {_cores()} core(s)"),
        Finding("same bits", f"{numerics()}; nodes that all say this can compute the same weights"),
        _processes(),
        shared,
        judge_memory(snapshot_bytes, measure_memory(), memory_file_obstacle(snapshot_bytes)),
        _erasure_code(),
        _checksums(),
        _network_tools(),
    ]


def judge_memory(wanted_bytes: int, memory: Memory, file_obstacle: str) -> Finding:
    """Say whether snapshots can have so much memory; `file_obstacle` says why no file of that size can be made."""
    wanted = f"snapshots may take {_size(wanted_bytes)}"
    for limit_bytes, owner, remedy in (
        (memory.machine, "this machine has", ""),
        (memory.group, "the control group of this process may use", "raise the container's or batch job's, or "),
        (memory.promisable, "the kernel (vm.overcommit_memory = 2) still promises", "raise vm.overcommit_ratio, or "),
    ):
        if wanted_bytes > limit_bytes:
            advice = f"{remedy}give less --snapshot-memory than that"
            return Finding("snapshot memory", f"{wanted}, but {owner} {_size(limit_bytes)}", advice, hinders=True)
    if file_obstacle:
        advice = "raise the limits of this shell (ulimit -f, ulimit -v), or give less --snapshot-memory"
        result = f"{wanted}, but no memory file can be so large: {file_obstacle}"
        return Finding("snapshot memory", result, advice, hinders=True)
    result = f"{wanted}, {_size(memory.available)} are free now"
    if wanted_bytes > memory.available:
        advice = "free some before a job needs all of it, or give less --snapshot-memory"
        return Finding("snapshot memory", result, advice)
    return Finding("snapshot memory", result)


def measure_memory() -> Memory:
    """Return what this system has to give."""
    machine = psutil.virtual_memory()
    promisable = math.inf
    if Path("/proc/sys/vm/overcommit_memory").read_text().strip() == "2":
        lines = (line.split() for line in Path("/proc/meminfo").read_text().splitlines())
        kib = {fields[0]: int(fields[1]) for fields in lines}
        promisable = 1024.0 * (kib["CommitLimit:"] - kib["Committed_AS:"])
    return Memory(machine.total, group_limit_bytes(), machine.available, promisable)


def group_limit_bytes(proc: Path = Path("/proc/self/cgroup"), mounted: Path = Path("/sys/fs/cgroup")) -> float:
    """Return the least of the memory limits of this process's control groups, of version 1 or 2; infinite without one."""
    limits = [math.inf]
    for line in proc.read_text().splitlines() if proc.exists() else ():
        _, controllers, group = line.split(":", 2)
        if controllers not in ("", "memory"):
            continue
        path = PurePosixPath(group.lstrip("/"))
        for above in (path, *path.parents):  # what limits a group above limits this one; a container sees its own only
            file = mounted / controllers / above / ("memory.limit_in_bytes" if controllers else "memory.max")
            text = file.read_text().strip() if file.exists() else "max"
            limits.append(math.inf if text == "max" else int(text))
    return min(limits)


def memory_file_obstacle(size_bytes: int) -> str:
    """Return why no memory file of this size can be made and mapped, or ""; nothing in it is allocated."""
    try:
        fd = os.memfd_create("elastic-doctor", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        try:
            os.ftruncate(fd, max(size_bytes, 1))
            mmap.mmap(fd, max(size_bytes, 1), mmap.MAP_SHARED, mmap.PROT_READ).close()
        finally:
            os.close(fd)
    except OSError as error:
        return str(error.strerror)
    except OverflowError:
        return "it is beyond what a file can be"
    return ""


def _processes() -> Finding:
    system = f"{platform.system()} {platform.release()}"
    try:
        os.close(os.pidfd_open(os.getpid()))
    except OSError as error:
        result = f"{system} gives no pidfd, by which workers are watched: {error.strerror}"
        return Finding("processes", result, "use Linux 5.3 or newer, and no sandbox that forbids it", hinders=True)
    return Finding("processes", f"{system}, workers are watched by pidfd")


def _shared_memory() -> Finding:
    reason = obstacle()
    if reason:
        advice = "let processes of one user open each other's /proc/PID/fd; it works without, slower"
        return Finding("shared memory", f"workers of this node send each other their gradients: {reason}", advice)
    return Finding("shared memory", "workers of this node read each other's gradients")


def _erasure_code() -> Finding:
    try:
        return Finding("erasure code", describe(), "" if isinstance(choose_engine(), IsalEngine) else FAST)
    except ConfigError as error:
        return Finding("erasure code", str(error), "without it, run jobs with --redundancy off", hinders=True)


def _checksums() -> Finding:
    name, _ = engine()
    return Finding("checksums", f"CRC-32 is computed by {name}", FAST if name == "zlib" else "")


def _network_tools() -> Finding:
    missing = [tool for tool in ("ip", "tc") if shutil.which(tool) is None]
    if missing:
        result = f"no {' and no '.join(missing)}: tests of failing networks are skipped"
        return Finding("network tools", result, "only to run those tests, install iproute2")
    return Finding("network tools", "ip and tc are there, for tests of failing networks only")


def _cores() -> int:
    return len(os.sched_getaffinity(0))


def _size(size_bytes: float) -> str:
    unit, name = (2**30, "GiB") if size_bytes >= 2**30 else (2**20, "MiB")
    return f"{round(size_bytes / unit, 1):.12g} {name}"


def main() -> int:
    """Print the findings as one line of JSON."""
    settings = json.loads(sys.argv[1])
    print(json.dumps([asdict(finding) for finding in examine(settings["snapshot_memory_bytes"])]))
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""Where the workers of this node are: the stacks of their process trees, what they began last, the end of their output.

py-spy reads a process from outside, without stopping it, so that it also sees one that is stopped by a signal; where it is not
installed or not allowed to, the worker itself is asked (`elastic/stacks.py`). All within a deadline: what has not been found by
then is left out, and said. Nothing here may harm a worker, nor raise because one has ended meanwhile.
"""

from __future__ import annotations

import asyncio
import json
import linecache
import os
import platform
import shutil
import sys
import sysconfig
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import psutil

import elastic
from agent.processes import WorkerProcess
from elastic.domain import CollectEvidence, EvidenceCollected, StackFrame, ThreadStack, WorkerEvidence
from elastic.progress import Progress
from elastic.stacks import ask_for_stacks, catches_signal, parse_dump

PROCESSES_MAX = 32  # of one worker's tree
THREADS_MAX = 64  # of one process
FRAMES_MAX = 64  # of one stack
TEXT_MAX = 300  # characters of a name or a line of code
LOG_TAIL_BYTES = 4096
DUMP_BYTES_MAX = 256 * 1024
ANSWER_S = 0.3  # how long a worker that was asked may take to begin to write
POLL_S = 0.01
PACKAGES = ("elastic-runtime", "torch", "grpcio", "py-spy")


@dataclass(frozen=True, slots=True)
class Subject:
    """A worker to look at, and for how long it has not moved."""

    process: WorkerProcess
    log_folder: Path
    since_s: float


async def collect(order: CollectEvidence, subjects: Mapping[str, Subject]) -> EvidenceCollected:
    """Look at all workers side by side, and answer within the order's time and size."""
    deadline = time.monotonic() + 0.8 * order.timeout_ms / 1000
    found = await asyncio.gather(*(_look(name, subject, deadline) for name, subject in subjects.items()))
    share = order.size_bytes_max // max(1, len(found))
    return EvidenceCollected(order.inquiry, tuple(trim(each, share) for each in found), tuple(versions().items()))


async def _look(worker: str, subject: Subject, deadline: float) -> WorkerEvidence:
    process = subject.process
    shown: Progress = process.progress()
    evidence = WorkerEvidence(
        worker=worker,
        pid=process.pid,
        process_state=process.state(),
        operation=shown.operation.words,
        step=shown.step,
        slot=shown.slot,
        waits=shown.waits,
        since_s=subject.since_s,
        log_tail=_log_tail(subject.log_folder),
    )
    stacks: list[ThreadStack] = []
    sources, faults = set(), []
    for pid in _tree(process.pid):
        here, source, fault = await _stacks_of(pid, process, evidence.process_state, deadline)
        stacks += (stack if pid == process.pid else replace(stack, is_main=False) for stack in here)
        sources |= {source} if here else set()
        faults += [f"process {pid}: {fault}"] if fault else []
    main_first = sorted(stacks, key=lambda stack: not stack.is_main)
    return replace(
        evidence,
        stacks=tuple(replace(stack, frames=_explained(stack.frames)) for stack in main_first),
        source=", ".join(sorted(sources)),
        fault="; ".join(faults),
    )


def _tree(pid: int) -> list[int]:
    """The process and its descendants."""
    try:
        children = psutil.Process(pid).children(recursive=True)
    except psutil.Error:
        children = []
    return [pid, *(child.pid for child in children)][:PROCESSES_MAX]


async def _stacks_of(
    pid: int, worker: WorkerProcess, state: str, deadline: float
) -> tuple[tuple[ThreadStack, ...], str, str]:
    """The stacks of one process, how they were found, and why they were not."""
    stacks, fault = await _spy(pid, deadline)
    if stacks:
        return stacks, "py-spy", ""
    if state == "T":
        return (), "", f"{fault}; it is stopped, so that it cannot say itself where it is"
    stacks = await _ask(pid, worker.stacks_fd, deadline)
    return (stacks, "faulthandler", "") if stacks else ((), "", f"{fault}; it did not say itself where it is")


async def _spy(pid: int, deadline: float) -> tuple[tuple[ThreadStack, ...], str]:
    """Read a process with py-spy; returns its stacks, or why there are none."""
    beside = Path(sys.executable).with_name("py-spy")
    program = str(beside) if beside.exists() else shutil.which("py-spy")
    if program is None:
        return (), "py-spy is not installed (pip install 'elastic-runtime[hangs]')"
    # Without --nonblocking it would stop the process by ptrace, and a healthy worker with it.
    spy = await asyncio.create_subprocess_exec(
        *(program, "dump", "--json", "--nonblocking", "--pid", str(pid)),
        stdin=asyncio.subprocess.DEVNULL,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
    )
    try:
        out, err = await asyncio.wait_for(spy.communicate(), max(0.0, deadline - time.monotonic()))
        if spy.returncode != 0:
            return (), f"py-spy could not read it ({err.decode(errors='replace').strip().splitlines()[-1:]})"
        return _parse_spy(out, pid), ""
    except TimeoutError:
        return (), "py-spy took too long"
    except ValueError as error:
        return (), f"py-spy said what nobody understands ({error})"
    finally:
        if spy.returncode is None:
            spy.kill()
            await spy.wait()


def _parse_spy(text: bytes, pid: int) -> tuple[ThreadStack, ...]:
    """Raises ValueError for what is not the expected JSON."""
    stacks = []
    for thread in json.loads(text)[:THREADS_MAX]:
        try:
            frames = tuple(StackFrame(f["name"], f["filename"], max(0, f["line"])) for f in thread["frames"])
            is_main = thread["os_thread_id"] == pid
            stacks.append(ThreadStack(pid, thread["thread_name"] or "", is_main, frames))
        except (KeyError, TypeError) as error:
            raise ValueError(f"without {error}") from error
    return tuple(stacks)


async def _ask(pid: int, fd: int, deadline: float) -> tuple[ThreadStack, ...]:
    """Have a process write its stacks, which none does that does not expect to be asked."""
    try:
        if not catches_signal(Path(f"/proc/{pid}/status").read_text()):
            return ()
        os.ftruncate(fd, 0)
        os.lseek(fd, 0, os.SEEK_SET)  # the worker's descriptor is a copy of this one, and has the same position
        ask_for_stacks(pid)
    except OSError:
        return ()  # it has ended
    deadline = min(deadline, time.monotonic() + ANSWER_S)
    size = 0
    while time.monotonic() < deadline:
        await asyncio.sleep(POLL_S)
        before, size = size, os.fstat(fd).st_size
        if size and size == before:
            break
    return parse_dump(os.pread(fd, DUMP_BYTES_MAX, 0).decode(errors="replace"), pid)[:THREADS_MAX]


def _explained(frames: Sequence[StackFrame]) -> tuple[StackFrame, ...]:
    """Say which frames are the user's, and what stands in their lines."""
    result = []
    for frame in frames[:FRAMES_MAX]:
        of_user = is_of_user(frame.file, NOT_THE_USERS)
        code = linecache.getline(frame.file, frame.line).strip() if of_user else ""
        result.append(
            StackFrame(frame.function[:TEXT_MAX], frame.file[-TEXT_MAX:], frame.line, code[:TEXT_MAX], of_user)
        )
    linecache.checkcache()
    return tuple(result)


NOT_THE_USERS = (
    *(f"{sysconfig.get_path(name)}{os.sep}" for name in ("stdlib", "platstdlib", "purelib", "platlib")),
    f"{Path(elastic.__file__).parent}{os.sep}",
)


def is_of_user(file: str, others: Sequence[str]) -> bool:
    """Whether a file of source code lies in none of these folders."""
    return file.startswith(os.sep) and not any(file.startswith(folder) for folder in others)


def _log_tail(folder: Path) -> str:
    """The end of what a worker has said."""
    parts = []
    for name in ("stderr.log", "stdout.log"):
        try:
            with (folder / name).open("rb") as file:
                file.seek(max(0, (folder / name).stat().st_size - LOG_TAIL_BYTES))
                text = file.read(LOG_TAIL_BYTES).decode(errors="replace")
        except OSError as error:
            text = f"(unreadable: {error.strerror})"
        parts.append(f"--- {name}\n{text}")
    return "\n".join(parts)


def size_bytes(evidence: WorkerEvidence) -> int:
    """About what it takes on the wire."""
    frames = [frame for stack in evidence.stacks for frame in stack.frames]
    text = sum(len(frame.function) + len(frame.file) + len(frame.code) + 16 for frame in frames)
    return text + len(evidence.log_tail.encode()) + len(evidence.fault.encode()) + 200 + 40 * len(evidence.stacks)


def trim(evidence: WorkerEvidence, size_bytes_max: int) -> WorkerEvidence:
    """Leave out what matters least until the rest fits: the log first, then the last threads, then the outer frames."""
    evidence = replace(evidence, fault=evidence.fault[:2000])
    if size_bytes(evidence) > size_bytes_max:
        evidence = replace(evidence, log_tail=evidence.log_tail[-256:])
    while size_bytes(evidence) > size_bytes_max and len(evidence.stacks) > 1:
        evidence = replace(evidence, stacks=evidence.stacks[:-1])
    while size_bytes(evidence) > size_bytes_max and evidence.stacks and len(evidence.stacks[0].frames) > 1:
        main = evidence.stacks[0]
        evidence = replace(evidence, stacks=(replace(main, frames=main.frames[: len(main.frames) // 2]),))
    return evidence


def versions() -> dict[str, str]:
    """Of what runs on this node."""
    found = {"python": platform.python_version(), "kernel": platform.release()}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found

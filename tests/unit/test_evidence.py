"""What an agent finds out about live processes: with py-spy, without it, about stopped ones, and within its bounds."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from agent import evidence
from agent.processes import WorkerProcess
from elastic.domain import CollectEvidence, EvidenceCollected, StackFrame, ThreadStack, WorkerEvidence
from elastic.progress import Operation, ProgressPage
from elastic.stacks import DUMP_SIGNAL, catches_signal

SCRIPT = """
import multiprocessing, os, sys, threading, time
from elastic.stacks import answer_with_stacks
answer_with_stacks(int(sys.argv[1]))
lock = threading.Lock()
lock.acquire()
def stuck():
    lock.acquire()
def announce():
    while sys._current_frames()[threading.main_thread().ident].f_code is not stuck.__code__:
        time.sleep(0.001)
    os.write(1, b"ready\\n")
def main():
    threading.Thread(target=announce).start()
    stuck()
multiprocessing.get_context("fork").Process(target=main).start()
main()
"""
LOCKED = SCRIPT.splitlines().index("    lock.acquire()") + 1
DEADLINE_S = 30.0


class Stuck:
    """A process that is stuck, with a child that is, too."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.script = folder / "stuck.py"
        self.script.write_text(SCRIPT)
        (folder / "stderr.log").write_text("x" * 10_000 + "the end")
        self.stacks_fd = os.memfd_create("stacks")
        self.process = subprocess.Popen(
            [sys.executable, str(self.script), str(self.stacks_fd)],
            pass_fds=(self.stacks_fd,),
            stdout=subprocess.PIPE,
            start_new_session=True,
        )
        assert self.process.stdout is not None
        assert [self.process.stdout.readline() for _ in range(2)] == [b"ready\n"] * 2, "it and its child"

    def look(self, size_bytes_max: int = 1 << 20, timeout_ms: int = 20_000) -> EvidenceCollected:
        async def collect() -> EvidenceCollected:
            page = ProgressPage(ProgressPage.create("stuck"))
            page.place(7, 3)
            page.doing(Operation.BACKWARD)
            worker = WorkerProcess("w", self.process.pid, page, os.dup(self.stacks_fd), lambda _: None)
            order = CollectEvidence(1, timeout_ms, size_bytes_max)
            found = await evidence.collect(order, {"w": evidence.Subject(worker, self.folder, 4.0)})
            worker.close()
            return found

        return asyncio.run(collect())

    def stop(self) -> None:
        os.kill(self.process.pid, signal.SIGSTOP)
        deadline = time.monotonic() + DEADLINE_S
        while "T (stopped)" not in Path(f"/proc/{self.process.pid}/status").read_text():
            assert time.monotonic() < deadline
            time.sleep(0.01)

    def end(self) -> None:
        os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait(DEADLINE_S)
        os.close(self.stacks_fd)
        assert self.process.stdout is not None
        self.process.stdout.close()


@pytest.fixture
def stuck(tmp_path: Path) -> Iterator[Stuck]:
    process = Stuck(tmp_path)
    yield process
    process.end()


def without_py_spy(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(sys, "executable", str(tmp_path / "bin" / "python"))
    monkeypatch.setenv("PATH", str(tmp_path))


@pytest.mark.parametrize("source", ["py-spy", "faulthandler"])
def test_a_stuck_process_and_its_child_are_seen(
    stuck: Stuck, source: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    if source == "faulthandler":
        without_py_spy(monkeypatch, tmp_path)
    found = stuck.look()
    (worker,) = found.workers
    assert (worker.operation, worker.step, worker.slot, worker.since_s) == ("backward", 7, 3, 4.0)
    assert worker.source == source and worker.fault == "", worker.fault
    main, child = worker.stacks[0], next(stack for stack in worker.stacks if stack.pid != worker.pid)
    assert main.is_main and not child.is_main
    for stack in (main, child):
        assert StackFrame("stuck", str(stuck.script), LOCKED, "lock.acquire()", True) in stack.frames[:2], stack
    assert worker.log_tail.startswith("--- stderr.log\nxxx") and "the end" in worker.log_tail
    assert dict(found.versions)["python"] and stuck.process.poll() is None


def test_a_stopped_process_is_seen_by_py_spy_alone(stuck: Stuck, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    stuck.stop()
    (worker,) = stuck.look().workers
    assert worker.process_state == "T" and worker.stacks[0].frames[0].line == LOCKED
    without_py_spy(monkeypatch, tmp_path)
    (worker,) = stuck.look().workers
    assert worker.stacks == () and "hangs" in worker.fault and "it is stopped" in worker.fault


def test_an_answer_comes_within_its_time_and_size(stuck: Stuck) -> None:
    (worker,) = stuck.look(size_bytes_max=2000).workers
    assert evidence.size_bytes(worker) <= 2000 and worker.stacks[0].frames[0].line == LOCKED
    began = time.monotonic()
    (worker,) = stuck.look(timeout_ms=1).workers
    assert time.monotonic() - began < 5 and stuck.process.poll() is None
    assert worker.stacks or worker.fault, "either is said"


def test_a_process_that_does_not_expect_it_is_not_asked() -> None:
    assert not catches_signal(Path("/proc/self/status").read_text())
    before = signal.signal(DUMP_SIGNAL, lambda *_: None)
    assert catches_signal(Path("/proc/self/status").read_text())
    signal.signal(DUMP_SIGNAL, before)


def test_what_matters_least_is_left_out_first() -> None:
    frames = tuple(StackFrame("f" * 20, "/a/file.py", n) for n in range(40))
    stacks = (ThreadStack(1, "", True, frames), *(ThreadStack(1, "", False, frames) for _ in range(9)))
    whole = WorkerEvidence("w", stacks=stacks, log_tail="l" * 4000)
    assert evidence.trim(whole, 1 << 20) == whole
    shorter = evidence.trim(whole, evidence.size_bytes(whole) - 1)
    assert shorter == replace(whole, log_tail="l" * 256)
    least = evidence.trim(whole, 900)
    assert [len(stack.frames) for stack in least.stacks] == [5] and least.stacks[0].is_main


def test_whose_a_file_is() -> None:
    assert evidence.is_of_user("/home/me/train.py", evidence.NOT_THE_USERS)
    for file in (asyncio.__file__, pytest.__file__, evidence.elastic.__file__, "<frozen runpy>"):
        assert not evidence.is_of_user(file, evidence.NOT_THE_USERS), file

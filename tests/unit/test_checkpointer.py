"""The process that writes and reads checkpoints, and the agent's end of it: real children, real disks, real kills."""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import functools
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator, Sequence
from pathlib import Path

import psutil
import pytest
import torch
from torch import Tensor, nn

from agent.catalog import newest_checkpoint
from agent.checkpointer import NICENESS
from agent.checkpoints import write_checkpoint
from agent.durable import Durable
from agent.rotation import MARKER
from elastic.errors import CheckpointError
from elastic.snapshots import Slice, numbers_of
from elastic.state import TrainingState
from tests.unit.captured import captured

DEADLINE_S = 60.0
"""For what takes seconds, most of them for importing torch."""


def asynchronous(test: Callable[..., Coroutine[None, None, None]]) -> Callable[..., None]:
    """A test in an event loop of its own, with a deadline."""

    @functools.wraps(test)
    def run(*given: object, **named: object) -> None:
        asyncio.run(asyncio.wait_for(test(*given, **named), DEADLINE_S))

    return run


def a_state(side: int = 3) -> TrainingState:
    torch.manual_seed(side)
    model = nn.Linear(side, side)
    return TrainingState({"model": model}, {"optimizer": torch.optim.SGD(model.parameters())}, {})


@contextlib.contextmanager
def in_memory_files(slices: Sequence[tuple[Slice, Tensor]]) -> Iterator[list[tuple[Slice, int]]]:
    """Slices as an agent holds them."""
    stored = []
    for each, memory in slices:
        fd = os.memfd_create("slice")
        os.write(fd, memory.numpy().tobytes())
        os.ftruncate(fd, each.stored_bytes + 4096)  # a buffer is rather longer than what it holds
        stored.append((each, fd))
    yield stored
    for _, fd in stored:
        os.close(fd)


def durable(target: Path, keep: int = 2, **timeouts: float) -> Durable:
    return Durable(str(target), job="j", keep=keep, **timeouts)


@asynchronous
async def test_a_snapshot_goes_through_a_child_to_the_disk_and_back(tmp_path: Path) -> None:
    slices, store = captured(a_state(), 7, count=3), durable(tmp_path / "deep" / "target")
    assert (await store.newest()).found is None
    with in_memory_files(slices) as stored:
        path = await store.write(stored)
    newest = await store.newest()
    assert newest.found is not None and (newest.found.path, newest.found.step) == (path, 7)
    assert (await store.newest(before=7)).found is None
    fd = os.memfd_create("whole")
    ((expected, memory),) = captured(a_state(), 7)
    assert await store.read(newest.found, fd) == expected
    assert os.pread(fd, 1 << 20, 0) == memory.numpy().tobytes()
    os.close(fd)


@asynchronous
async def test_of_the_writes_that_wait_only_the_newest_is_done(tmp_path: Path) -> None:
    store = durable(tmp_path)
    with contextlib.ExitStack() as stack:
        steps = [stack.enter_context(in_memory_files(captured(a_state(), step))) for step in (1, 2, 3, 4)]
        writes = [asyncio.create_task(store.write(stored)) for stored in steps]
        assert await asyncio.gather(writes[1], writes[2]) == [None, None]
        assert not writes[0].done()  # nobody waited for it to learn that
        paths = await asyncio.gather(writes[0], writes[3])
    assert paths == [str(tmp_path / "step-00000001"), str(tmp_path / "step-00000004")]
    assert store.skipped == 2 and store.progress is None


@asynchronous
async def test_a_write_whose_caller_gives_up_makes_room_for_the_next(tmp_path: Path) -> None:
    store = durable(tmp_path)
    with in_memory_files(captured(a_state(), 1)) as stored:
        running, waiting = (asyncio.create_task(store.write(stored)) for _ in range(2))
        child = await a_child()
        waiting.cancel()
        running.cancel()
        await asyncio.wait([running, waiting], timeout=DEADLINE_S)
        assert running.cancelled() and waiting.cancelled() and not child.is_running()
        assert await store.write(stored) is not None


@asynchronous
async def test_a_full_disk_and_damaged_memory_are_sentences(small_disk: Path) -> None:
    store = durable(small_disk)
    with in_memory_files(captured(a_state(1000), 1)) as stored:
        with pytest.raises(CheckpointError, match=r"step 1 cannot be written to .* \(No space left on device\)"):
            await store.write(stored)
        os.pwrite(stored[0][1], b"\xff", 0)
        with pytest.raises(CheckpointError, match=r"Slice 0 .* is damaged in memory"):
            await store.write(stored)
    assert list(small_disk.iterdir()) == []


def test_a_writer_that_is_killed_midway_leaves_the_last_good_checkpoint_and_is_passed_over(tmp_path: Path) -> None:
    good = write_checkpoint(str(tmp_path), captured(a_state(), 1), job="j", keep=1)
    # Its output is full after the first line, so it cannot come to its end.
    reader, writer = os.pipe()
    fcntl.fcntl(writer, fcntl.F_SETPIPE_SZ, 4096)
    os.write(writer, b" " * 4030)
    with in_memory_files(captured(a_state(300), 2)) as stored:
        settings = {
            "task": "write",
            "parent": os.getpid(),
            "target": str(tmp_path),
            "job": "j",
            "keep": 1,
            "slices": [(numbers_of(each), fd) for each, fd in stored],
        }
        command = [sys.executable, "-P", "-m", "elastic.launch", "checkpointer", json.dumps(settings)]
        child = subprocess.Popen(command, pass_fds=[fd for _, fd in stored], stdout=writer)
        half = tmp_path / f".step-00000002.part-{child.pid}"
        until(lambda: (half / "__0_0.distcp").exists())
        child.kill()
        assert child.wait(DEADLINE_S) == -signal.SIGKILL
    os.close(reader)
    os.close(writer)

    newest = newest_checkpoint(str(tmp_path), "j")
    assert newest.found is not None and newest.found.path == good
    assert newest.passed_over == (f"{half} is half-written: its writer is at work or has died.",)
    write_checkpoint(str(tmp_path), captured(a_state(), 3), job="j", keep=1)
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000003"]


# ----------------------------------------------------------------------------------------------------
# File systems that do not answer


@pytest.fixture
def hanging(tmp_path: Path) -> Path:
    """A target at which a child hangs: the marker of its checkpoint is a pipe into which nobody writes."""
    (tmp_path / "step-00000001").mkdir()
    os.mkfifo(tmp_path / "step-00000001" / MARKER)
    return tmp_path


@contextlib.asynccontextmanager
async def a_child_that_hangs_at(target: Path) -> AsyncIterator[psutil.Process]:
    """The child, once it reads from the pipe."""
    while True:
        try:  # only when there is somebody at its other end can a pipe be opened like this
            pipe = os.open(target / "step-00000001" / MARKER, os.O_WRONLY | os.O_NONBLOCK)
            break
        except OSError:
            await asyncio.sleep(0.01)
    try:
        (child,) = psutil.Process().children()
        yield child
    finally:
        os.close(pipe)


@asynchronous
async def test_what_hangs_is_given_up_at_its_deadline(hanging: Path) -> None:
    with pytest.raises(CheckpointError, match=r"\(newest\) took longer than 1 s and was given up"):
        await durable(hanging, look_timeout_s=1.0).newest()
    assert psutil.Process().children() == []


@asynchronous
async def test_a_child_gives_way_to_training_and_its_death_is_a_sentence(hanging: Path) -> None:
    looking = asyncio.create_task(durable(hanging).newest())
    async with a_child_that_hangs_at(hanging) as child:
        assert child.nice() == NICENESS
        assert child.ionice() == (psutil.IOPRIO_CLASS_BE, 7)
        child.kill()
        with pytest.raises(CheckpointError, match=r"\(newest\) ended with code -9 before it was done"):
            await looking


@asynchronous
async def test_who_no_longer_wants_an_answer_leaves_no_child_behind(hanging: Path) -> None:
    looking = asyncio.create_task(durable(hanging).newest())
    async with a_child_that_hangs_at(hanging) as child:
        looking.cancel()
        await asyncio.wait([looking])
        assert looking.cancelled() and not child.is_running()


@asynchronous
async def test_a_child_ends_with_its_agent(hanging: Path) -> None:
    code = "import asyncio, sys; from agent.durable import Durable; asyncio.run(Durable(sys.argv[1], job='j', keep=1).newest())"
    agent = subprocess.Popen([sys.executable, "-c", code, str(hanging)])
    pipe = hanging / "step-00000001" / MARKER
    while True:
        with contextlib.suppress(OSError):
            fd = os.open(pipe, os.O_WRONLY | os.O_NONBLOCK)
            break
        await asyncio.sleep(0.01)
    (child,) = psutil.Process(agent.pid).children()
    agent.kill()
    agent.wait(DEADLINE_S)
    child.wait(DEADLINE_S)
    os.close(fd)


async def a_child() -> psutil.Process:
    """This process's child, once it is there."""
    while not (children := psutil.Process().children()):
        await asyncio.sleep(0.01)
    return children[0]


def until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + DEADLINE_S
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)

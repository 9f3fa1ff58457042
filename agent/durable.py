"""The agent's end of the durable tier: children that write and read checkpoints, and never a file touched here.

Training never waits for a disk. At most one checkpoint is being written, a newer one that is asked for meanwhile waits,
and takes the place of one that was waiting, which is counted as skipped. Every child has a deadline.
"""

from __future__ import annotations

import asyncio
import json
import os
import sys
from collections.abc import Sequence
from typing import Any

from agent.catalog import Found, Newest
from agent.rotation import Marker
from elastic.errors import CheckpointError
from elastic.snapshots import Slice, numbers_of, slice_of

ANSWER_SIZE_BYTES_MAX = 16 * 2**20
KILL_TIMEOUT_S = 5.0


class Durable:
    """Checkpoints of one job.

    Args:
        target: directory, or an address of fsspec. job: whose they are. keep: how many to keep, at least 1.
        transfer_timeout_s: longest time that writing or reading one may take. look_timeout_s: the same for looking
            for the newest.

    Attributes:
        skipped: how many writes were given up for a newer one.
        progress: bytes written and bytes to write, of the write that is under way; None if there is none.
    """

    def __init__(
        self, target: str, *, job: str, keep: int, transfer_timeout_s: float = 1800.0, look_timeout_s: float = 60.0
    ) -> None:
        self.skipped = 0
        self.progress: tuple[int, int] | None = None
        self._target, self._job, self._keep = target, job, keep
        self._transfer_timeout_s, self._look_timeout_s = transfer_timeout_s, look_timeout_s
        self._writing = asyncio.Lock()
        self._waiting: asyncio.Task[bool] | None = None
        self._stuck: asyncio.subprocess.Process | None = None

    async def write(self, slices: Sequence[tuple[Slice, int]]) -> str | None:
        """Write a snapshot, after the one that is being written.

        Args:
            slices: all of one snapshot, each with the descriptor of the memory file that begins with it. The memory
                must stay as it is until this returns.

        Returns:
            The path of the checkpoint; None if a newer one was asked for before this one's turn came.

        Raises:
            CheckpointError: it was not written; the older ones are as they were.
        """
        if not await self._turn():
            self.skipped += 1
            return None
        try:
            answer = await self._run(
                "write",
                {
                    "target": self._target,
                    "job": self._job,
                    "keep": self._keep,
                    "slices": [(numbers_of(each), fd) for each, fd in slices],
                },
                [fd for _, fd in slices],
                self._transfer_timeout_s,
            )
            return str(answer["path"])
        finally:
            self.progress = None
            self._writing.release()

    async def newest(self, before: int | None = None) -> Newest:
        """Look for the newest whole checkpoint, of a step less than `before` if that is given.

        Raises:
            CheckpointError: the target cannot be read in time, or holds another job's checkpoints.
        """
        given = {"target": self._target, "job": self._job, "before": before}
        answer = await self._run("newest", given, [], self._look_timeout_s)
        found = answer["found"] and Found(answer["found"]["path"], Marker.from_json(answer["found"]["marker"]))
        return Newest(found, tuple(answer["passed_over"]))

    async def read(self, found: Found, fd: int) -> Slice:
        """Read a checkpoint into a memory file, which is given the length that it takes.

        Returns:
            The slice that the memory file then holds: the whole snapshot.

        Raises:
            CheckpointError: it cannot be read, or is damaged: ask for the newest before this one.
        """
        os.ftruncate(fd, found.marker.snapshot.stored_bytes)
        answer = await self._run("read", {"path": found.path, "fd": fd}, [fd], self._transfer_timeout_s)
        return slice_of(answer["slice"])

    async def _turn(self) -> bool:
        """Wait until nothing is being written; False if a newer write has taken this one's place."""
        if self._waiting is not None:
            self._waiting.cancel()
        elif not self._writing.locked():
            return await self._writing.acquire()
        waiting = self._waiting = asyncio.create_task(self._writing.acquire())
        try:
            await asyncio.wait([waiting])  # as long as the one before takes, which has a deadline
        except asyncio.CancelledError:
            if not waiting.cancel() and not waiting.cancelled():
                self._writing.release()
            raise
        finally:
            if self._waiting is waiting:
                self._waiting = None
        return not waiting.cancelled()

    async def _run(self, task: str, given: dict[str, Any], fds: Sequence[int], timeout_s: float) -> dict[str, Any]:
        """Have a child do something, and return its answer."""
        if self._stuck is not None and self._stuck.returncode is None:
            raise CheckpointError(
                f"Process {self._stuck.pid} has not come back from the file system of {self._target}: no other is sent there "
                "until it has; mend the file system."
            )
        settings = json.dumps({"task": task, "parent": os.getpid(), **given})
        try:
            process = await asyncio.create_subprocess_exec(
                *(sys.executable, "-P", "-m", "elastic.launch", "checkpointer", settings),
                pass_fds=fds,
                stdin=asyncio.subprocess.DEVNULL,
                stdout=asyncio.subprocess.PIPE,
                limit=ANSWER_SIZE_BYTES_MAX,
            )
        except OSError as error:
            raise CheckpointError(f"No process for a checkpoint ({task}) can be started: {error.strerror}.") from error
        try:
            async with asyncio.timeout(timeout_s):
                answer = await self._last_line(process)
        except TimeoutError:
            raise CheckpointError(
                f"A checkpoint at {self._target} ({task}) took longer than {timeout_s:g} s and was given up: the file system is "
                "slow or does not answer."
            ) from None
        finally:
            await self._end(process)
        if "error" in answer:
            raise CheckpointError(answer["error"])
        if process.returncode != 0:
            raise CheckpointError(
                f"The process for a checkpoint at {self._target} ({task}) ended with code {process.returncode} before it was "
                "done: what it said last is in this agent's own output."
            )
        return answer

    async def _last_line(self, process: asyncio.subprocess.Process) -> dict[str, Any]:
        """What a child that has ended said last; before that it says how far it is."""
        assert process.stdout is not None
        said: dict[str, Any] = {}
        async for line in process.stdout:
            if not line.endswith(b"\n"):
                break  # it died in the middle of it
            said = json.loads(line)
            if "done_bytes" in said:
                self.progress = (said["done_bytes"], said["total_bytes"])
        await process.wait()
        return said

    async def _end(self, process: asyncio.subprocess.Process) -> None:
        """See to it that a child is gone, or remember that it cannot be ended: it waits inside the kernel."""
        if process.returncode is None:
            process.kill()
            try:
                await asyncio.wait_for(process.wait(), KILL_TIMEOUT_S)
            except TimeoutError:
                self._stuck = process

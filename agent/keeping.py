"""The agent's end of its keeper: starts the process, tells it what it must know, and starts another if it dies.

The agent's slices are held here too, as duplicates of their descriptors, until they are forgotten: a keeper that was
started again is told everything once more. What the keeper held itself, the parity, it then writes again from the other
nodes. This file must never import torch, and never waits without a deadline.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import sys
from collections import deque
from collections.abc import Awaitable, Callable, Mapping
from typing import Any, Protocol

from agent import channel
from agent.orders import AssemblyOrder, KeeperSettings, world_to_json
from agent.protection import World
from agent.tables import slice_from_json, slice_to_json
from elastic.errors import TransferError, Unreachable
from elastic.snapshots import Slice, SnapshotId

START_TIMEOUT_S = 60.0
FORGET_TIMEOUT_S = 10.0
RESTARTS_MAX, RESTARTS_WITHIN_S = 5, 60.0
"""A keeper that dies more often than this is not started again."""


class AssemblyError(TransferError):
    """A snapshot cannot be assembled.

    Attributes:
        lost: the nodes whose slices are lost.
    """

    def __init__(self, reason: str, lost: tuple[str, ...]) -> None:
        super().__init__(reason)
        self.lost = lost


class Listener(Protocol):
    """What an agent wants to hear. Each is called inside the loop, and returns at once."""

    def keeper_bound(self, address: str) -> None:
        """It listens here now: tell the other nodes. Said again, with another address, after a restart."""

    def slice_held(self, part: Slice) -> None:
        """It holds a slice, whose checksums are known now."""

    def protected(self, snapshot: SnapshotId) -> None:
        """This node's shard of the snapshot survives whatever its group survives."""

    def covered(self, snapshot: SnapshotId, is_covered: bool) -> None:
        """Whether all parity of the snapshot that this node is to hold is complete; it is dropped when it is outdated."""

    def vulnerable(self, snapshot: SnapshotId, reason: str) -> None:
        """This node's shard of the snapshot is not protected, or not any more."""

    def keeper_progress(self, counted: Mapping[str, int]) -> None:
        """The counters of `agent.shards.Traffic`."""

    def keeper_gone(self, reason: str) -> None:
        """It cannot be started: snapshots are not protected."""


class Launched(Protocol):
    """A process that was started."""

    @property
    def pid(self) -> int: ...

    def kill(self) -> None:
        """Send SIGKILL."""

    async def wait(self) -> int:
        """Return its exit code once it has ended."""


Launch = Callable[[int], Awaitable[Launched]]
"""Starts a keeper (`agent.keeper.run_keeper`) whose end of the line is this descriptor; raises OSError."""


def launcher(environment: Mapping[str, str]) -> Launch:
    """Return what starts a keeper in an interpreter of its own."""

    async def launch(fd: int) -> Launched:
        return await asyncio.create_subprocess_exec(
            sys.executable,
            "-P",
            "-m",
            "elastic.launch",
            "keeper",
            str(fd),
            pass_fds=(fd,),
            stdin=asyncio.subprocess.DEVNULL,
            env=dict(environment),
        )

    return launch


class KeeperProcess:
    """A node's keeper as its agent has it."""

    def __init__(self, settings: KeeperSettings, listener: Listener, launch: Launch) -> None:
        """Prepare; `start` starts it."""
        self._settings = settings
        self._listener = listener
        self._launch = launch
        self._process: Launched | None = None
        self._channel: channel.Channel | None = None
        self._bound: asyncio.Future[str] | None = None
        self._worlds: dict[int, tuple[World, Mapping[str, str]]] = {}
        self._held: dict[SnapshotId, dict[int, tuple[Slice, int]]] = {}
        self._forgetting: list[tuple[int, asyncio.Future[None]]] = []
        self._orders: dict[int, _Ordered] = {}
        self._number = 0
        self._restarting: asyncio.Task[None] | None = None
        self._restarted_at: deque[float] = deque(maxlen=RESTARTS_MAX)
        self._is_stopping = False

    @property
    def pid(self) -> int:
        """Of the present process; 0 if there is none."""
        return self._process.pid if self._process is not None else 0

    async def start(self) -> None:
        """Start the process and wait until it listens.

        Raises:
            Unreachable: it did not start.
        """
        loop = asyncio.get_running_loop()
        ours, theirs = channel.pair()
        bound = self._bound = loop.create_future()
        try:
            self._process = await self._launch(theirs.fileno())
        except OSError as error:
            ours.close()
            raise Unreachable(f"The keeper could not be started ({error}); snapshots are not protected.") from error
        finally:
            theirs.close()
        self._channel = channel.Channel(ours, self._hear, self._ended)
        self._channel.send({"settings": self._settings.to_json()})
        try:
            address = await asyncio.wait_for(bound, START_TIMEOUT_S)
        except TimeoutError as error:
            await self._kill()
            raise Unreachable(f"The keeper did not start within {START_TIMEOUT_S:.0f} s.") from error
        except Unreachable:
            await self._kill()
            raise
        self._tell_all()
        self._listener.keeper_bound(address)

    def hold(self, part: Slice, fd: int) -> None:
        """Give it a slice of this node, whose memory must not change until it is forgotten; `fd` stays the caller's."""
        slices = self._held.setdefault(part.snapshot, {})
        if part.index in slices:
            os.close(slices[part.index][1])
        slices[part.index] = (part, os.dup(fd))
        self._tell_slice(*slices[part.index])

    def enter(self, world: World, public_keys: Mapping[str, str] | None = None) -> None:
        """Tell it the world; `public_keys` are those of the peers, where the settings have keys."""
        self._worlds[world.generation] = (world, public_keys or {})
        self._tell_world(world, public_keys or {})

    async def forget(self, before_step: int) -> None:
        """Let go of all snapshots before this step; when it returns, their memory may be used again.

        Raises:
            Unreachable: the keeper does not answer.
        """
        for snapshot in [snapshot for snapshot in self._held if snapshot.step < before_step]:
            for _, fd in self._held.pop(snapshot).values():
                os.close(fd)
        needed = {max(self._worlds, default=0), *(snapshot.generation for snapshot in self._held)}
        self._worlds = {number: world for number, world in self._worlds.items() if number in needed}
        if self._channel is None:
            return
        forgotten: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._forgetting.append((before_step, forgotten))
        self._channel.send({"say": "forget", "before_step": before_step})
        try:
            await asyncio.wait_for(forgotten, FORGET_TIMEOUT_S)
        except TimeoutError as error:
            raise Unreachable(f"The keeper does not let go of snapshots before step {before_step}; end it.") from error

    async def assemble(self, order: AssemblyOrder, timeout_s: float) -> list[tuple[Slice, int]]:
        """Have it assemble what it does not hold; returns each such slice with a memfd, which is the caller's.

        Raises:
            AssemblyError: something is lost, or a later order took its place.
            Unreachable: the keeper died or did not end within `timeout_s`; order again.
        """
        if self._channel is None:
            raise Unreachable("The keeper is not running; order again when it is.")
        self._number += 1
        number = self._number
        ordered = self._orders[number] = _Ordered()
        self._channel.send({"say": "assemble", "number": number, "order": order.to_json()})
        try:
            await asyncio.wait_for(ordered.done, timeout_s)
        except TimeoutError as error:
            ordered.close()
            raise Unreachable(
                f"Step {order.snapshot.step} was not assembled within {timeout_s:.0f} s; order again, or another step."
            ) from error
        except BaseException:
            ordered.close()
            raise
        finally:
            del self._orders[number]
        return ordered.slices

    async def stop(self) -> None:
        """End the process, and let go of everything."""
        self._is_stopping = True
        if self._restarting is not None:
            self._restarting.cancel()
        await self._kill()
        for slices in self._held.values():
            for _, fd in slices.values():
                os.close(fd)
        self._held.clear()

    # -- telling ---------------------------------------------------------------------------------------------------

    def _tell_all(self) -> None:
        """Everything again, world by world: a new world ends what is unfinished of the one before."""
        for generation, (world, public_keys) in sorted(self._worlds.items()):
            self._tell_world(world, public_keys)
            for snapshot in sorted(self._held):
                if snapshot.generation == generation:
                    for part, fd in self._held[snapshot].values():
                        self._tell_slice(part, fd)

    def _tell_world(self, world: World, public_keys: Mapping[str, str]) -> None:
        if self._is_up:
            self._send({"say": "world", "world": world_to_json(world), "public_keys": dict(public_keys)})

    def _tell_slice(self, part: Slice, fd: int) -> None:
        if self._is_up:
            self._send({"say": "hold", "slice": slice_to_json(part)}, fd)

    @property
    def _is_up(self) -> bool:
        return self._channel is not None and self._bound is not None and self._bound.done()

    def _send(self, message: Mapping[str, Any], *fds: int) -> None:
        assert self._channel is not None
        self._channel.send(message, fds)

    # -- hearing ---------------------------------------------------------------------------------------------------

    def _hear(self, message: dict[str, Any], fds: list[int]) -> None:
        match message.pop("say"):
            case "bound":
                if self._bound is not None and not self._bound.done():
                    self._bound.set_result(message["address"])
            case "held":
                self._listener.slice_held(slice_from_json(message["slice"]))
            case "protected":
                self._listener.protected(SnapshotId(**message["snapshot"]))
            case "covered":
                self._listener.covered(SnapshotId(**message["snapshot"]), message["is_covered"])
            case "vulnerable":
                self._listener.vulnerable(SnapshotId(**message["snapshot"]), message["reason"])
            case "progress":
                self._listener.keeper_progress(message)
            case "forgotten":
                self._forgotten(message["before_step"])
            case "assembled":
                ordered = self._orders.get(message["number"])
                if ordered is None:
                    os.close(fds[0])  # nobody waits for it any more
                else:
                    ordered.slices.append((slice_from_json(message["slice"]), fds[0]))
            case "complete":
                self._finish(message["number"], None)
            case "failed":
                self._finish(message["number"], AssemblyError(message["reason"], tuple(message["lost"])))

    def _forgotten(self, before_step: int) -> None:
        for _, future in [entry for entry in self._forgetting if entry[0] <= before_step]:
            if not future.done():
                future.set_result(None)
        self._forgetting = [entry for entry in self._forgetting if entry[0] > before_step]

    def _finish(self, number: int, error: Exception | None) -> None:
        ordered = self._orders.get(number)
        if ordered is None or ordered.done.done():
            return
        if error is None:
            ordered.done.set_result(None)
        else:
            ordered.done.set_exception(error)

    # -- its end ---------------------------------------------------------------------------------------------------

    def _ended(self) -> None:
        """It has hung up. What it was doing is lost; what it held, others still hold."""
        self._channel = None
        for number in list(self._orders):
            self._finish(number, Unreachable("The keeper died while it assembled; order again."))
        for _, future in self._forgetting:
            if not future.done():
                future.set_result(None)  # a process that is gone holds nothing
        self._forgetting.clear()
        if self._bound is not None and not self._bound.done():
            self._bound.set_exception(Unreachable("The keeper died while it started; see its last words."))
        elif not self._is_stopping:
            self._restarting = asyncio.get_running_loop().create_task(self._restart())

    async def _restart(self) -> None:
        await self._kill()
        now = asyncio.get_running_loop().time()
        if len(self._restarted_at) == RESTARTS_MAX and now - self._restarted_at[0] < RESTARTS_WITHIN_S:
            self._listener.keeper_gone(
                f"The keeper died {RESTARTS_MAX + 1} times within {RESTARTS_WITHIN_S:.0f} s; snapshots are not protected."
            )
            return
        self._restarted_at.append(now)
        try:
            await self.start()
        except Unreachable as error:
            self._listener.keeper_gone(str(error))

    async def _kill(self) -> None:
        if self._channel is not None:
            self._channel.close()
            self._channel = None
        if self._process is not None:
            with contextlib.suppress(ProcessLookupError):
                self._process.kill()
            await self._process.wait()
            self._process = None


class _Ordered:
    """An assembly that somebody waits for."""

    def __init__(self) -> None:
        self.done: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self.slices: list[tuple[Slice, int]] = []

    def close(self) -> None:
        for _, fd in self.slices:
            os.close(fd)
        self.slices.clear()

"""The keeper's decisions, as a pure machine: which parity to write, whom to ask for what, and when a snapshot is protected.

Events in, commands out; `now` is an argument. Everything is pulled: a node that has all slices of a snapshot asks the
others of its protection group for their tables, writes the parities that are its own from the others' blocks, and says
so to whoever gave them. Asking again is always harmless, so a lost message, a restarted keeper or a late one costs only
another question. This file must never see bytes, nor how they travel.

Snapshots are protected in order. One is given up only when it can no longer be completed: a node of the group says that
it will never have its slices, or the world has changed. Parity of a snapshot that was protected is kept until the agent
says that it may go, or a newer world needs its memory and it is not the stable one. At most SETS_MAX snapshots have parity
at a time, the stable one and the one being written.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from enum import Enum

from agent.tables import Table, make_table, shard_bytes
from elastic.snapshots import Slice, SnapshotId
from recovery.placement import ProtectionGroup, Stripe

SETS_MAX = 2
SNAPSHOTS_MAX = 16
POLL_S = 0.1
ANSWER_TIMEOUT_S = 10.0
"""When a question is asked again although the shell has not said what became of it."""


class Standing(Enum):
    """What this node says of a snapshot when asked."""

    READY = "ready"
    NOT_YET = "not yet"
    GONE = "gone"
    """It does not have it, and never will."""


@dataclass(frozen=True, slots=True)
class World:
    """One generation as its keepers need it.

    Attributes:
        generation: its number.
        node: this one.
        peers: node -> address of its keeper; only those that this node may have to ask.
        slices: node -> indices of the slices that its workers capture.
        groups: the protection groups of those nodes.
    """

    generation: int
    node: str
    peers: Mapping[str, str]
    slices: Mapping[str, tuple[int, ...]]
    groups: tuple[ProtectionGroup, ...]

    def group(self) -> ProtectionGroup | None:
        """This node's group, if it is in one."""
        return next((group for group in self.groups if self.node in group.nodes), None)


# Events -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class SliceHeld:
    """A slice of this node is in memory, and its checksums are right."""

    slice: Slice


@dataclass(frozen=True, slots=True)
class WorldCame:
    """There is a new world, or the present one has another address for a node whose keeper was started again."""

    world: World


@dataclass(frozen=True, slots=True)
class Forgotten:
    """The snapshot of this step is stable everywhere: none before it is needed, and of worlds that are over no other."""

    before_step: int


@dataclass(frozen=True, slots=True)
class TableCame:
    """A node has all its slices of a snapshot: its table, and the stripes whose parity it has written."""

    node: str
    snapshot: SnapshotId
    table: Table
    written: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class TableWithheld:
    """A node did not give its table; `gone` if it never will."""

    node: str
    snapshot: SnapshotId
    gone: bool
    reason: str


@dataclass(frozen=True, slots=True)
class PeerAsked:
    """A node asked for this node's table, so it has its own."""

    node: str
    snapshot: SnapshotId


@dataclass(frozen=True, slots=True)
class ParityHeld:
    """A node says that it holds the parity of a stripe."""

    node: str
    snapshot: SnapshotId
    stripe: int


@dataclass(frozen=True, slots=True)
class ParityWritten:
    """This node's parity of a stripe is complete."""

    snapshot: SnapshotId
    stripe: int


@dataclass(frozen=True, slots=True)
class ParityFailed:
    """This node's parity of a stripe could not be completed; `gone` if a node will never give its blocks."""

    snapshot: SnapshotId
    stripe: int
    gone: bool
    reason: str


@dataclass(frozen=True, slots=True)
class Tick:
    """Time has passed."""


Event = (
    SliceHeld
    | WorldCame
    | Forgotten
    | TableCame
    | TableWithheld
    | PeerAsked
    | ParityHeld
    | ParityWritten
    | ParityFailed
    | Tick
)


# Commands ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class AskTable:
    """Ask a node for its table; then say TableCame or TableWithheld."""

    node: str
    snapshot: SnapshotId


@dataclass(frozen=True, slots=True)
class WriteParity:
    """Pull the blocks of a stripe and write its parity `row`; then say ParityWritten or ParityFailed."""

    snapshot: SnapshotId
    group: ProtectionGroup
    stripe: Stripe
    row: int
    block_bytes: int
    shards_bytes: Mapping[str, int]


@dataclass(frozen=True, slots=True)
class Notify:
    """Tell a node that this one holds the parity of a stripe; no matter if that fails, since it asks."""

    node: str
    snapshot: SnapshotId
    stripe: int


@dataclass(frozen=True, slots=True)
class StopWriting:
    """End what WriteParity began; what is complete stays."""

    snapshot: SnapshotId


@dataclass(frozen=True, slots=True)
class DropParity:
    """Free a snapshot's parity."""

    snapshot: SnapshotId


@dataclass(frozen=True, slots=True)
class DropSlices:
    """Let go of a snapshot's slices."""

    snapshot: SnapshotId


@dataclass(frozen=True, slots=True)
class Protected:
    """This node's shard of a snapshot survives whatever its group survives."""

    snapshot: SnapshotId


@dataclass(frozen=True, slots=True)
class Covered:
    """All parity of a snapshot that this node holds is complete."""

    snapshot: SnapshotId


@dataclass(frozen=True, slots=True)
class Vulnerable:
    """This node's shard of a snapshot is not protected, or not any more, and why."""

    snapshot: SnapshotId
    reason: str


Command = AskTable | WriteParity | Notify | StopWriting | DropParity | DropSlices | Protected | Covered | Vulnerable


@dataclass(slots=True)
class _Kept:
    """What is known of one snapshot."""

    id: SnapshotId
    slices: dict[int, Slice] = field(default_factory=dict)
    tables: dict[str, Table] = field(default_factory=dict)  # of the others in the group
    ask_at: dict[str, float] = field(default_factory=dict)
    block_bytes: int | None = None  # known once its parity has memory
    write_at: float = 0.0
    writing: set[int] = field(default_factory=set)
    written: set[int] = field(default_factory=set)
    held: set[tuple[int, str]] = field(default_factory=set)  # (stripe, node) of parities over this node's blocks
    is_protected: bool = False
    was_protected: bool = False
    given_up: bool = False
    told: str = ""


class ProtectionMachine:
    """State of one node's keeper; see the module's docstring."""

    def __init__(self, parity_bytes_max: int) -> None:
        """Begin with nothing.

        Args:
            parity_bytes_max: the most memory that parity may take on this node, in bytes.
        """
        self.parity_bytes_max = parity_bytes_max
        self.worlds: dict[int, World] = {}
        self.before_step = 0
        self._kept: dict[SnapshotId, _Kept] = {}
        self._out: list[Command] = []

    # -- what others may ask ---------------------------------------------------------------------------------------

    def standing(self, snapshot: SnapshotId, *, to_restore: bool = False) -> Standing:
        """Whether this node has all its slices of a snapshot, or ever will.

        Args:
            to_restore: the asker was told that this node's agent holds them, so that they are on their way to the keeper
                even if their world is over: none of them are too late but those that the agent lets go of.
        """
        kept = self._kept.get(snapshot)
        if kept is not None and self._is_complete(kept):
            return Standing.READY
        # Workers report in order: who has a newer snapshot of a world complete will not get an older one any more.
        is_past = any(
            other.id.generation == snapshot.generation and other.id.step > snapshot.step and self._is_complete(other)
            for other in self._kept.values()
        )
        is_over = (is_past or snapshot.generation < self._newest()) and not to_restore
        return Standing.GONE if is_over or snapshot.step < self.before_step else Standing.NOT_YET

    def table(self, snapshot: SnapshotId) -> Table:
        """This node's own table of a snapshot that is ready."""
        kept = self._kept[snapshot]
        return make_table(kept.slices[index] for index in self._indices(kept, self._node(kept)))

    def tables(self, snapshot: SnapshotId) -> Mapping[str, Table]:
        """The tables of the others in the group, as far as they are known."""
        return self._kept[snapshot].tables

    def written(self, snapshot: SnapshotId) -> tuple[int, ...]:
        """The stripes whose parity this node has written."""
        return tuple(sorted(self._kept[snapshot].written))

    # -- events ----------------------------------------------------------------------------------------------------

    def step(self, event: Event, now: float) -> list[Command]:
        """Take one event in and return what must be done, in order."""
        self._out = []
        match event:
            case SliceHeld(part):
                self._hold(part)
            case WorldCame(world):
                self._enter(world)
            case Forgotten(before_step):
                self._forget(before_step)
            case Tick():
                pass
            case _:
                kept = self._kept.get(event.snapshot)
                if kept is not None:
                    self._learn(kept, event, now)
        self._advance(now)
        return self._out

    def _hold(self, part: Slice) -> None:
        if part.snapshot.step < self.before_step:
            self._emit(DropSlices(part.snapshot))
            return
        if part.snapshot not in self._kept and len(self._kept) >= SNAPSHOTS_MAX:
            self._drop_spent()
        if part.snapshot not in self._kept and len(self._kept) >= SNAPSHOTS_MAX:
            self._emit(Vulnerable(part.snapshot, f"{SNAPSHOTS_MAX} snapshots are kept already: forget the old ones"))
            self._emit(DropSlices(part.snapshot))
            return
        kept = self._kept.setdefault(part.snapshot, _Kept(part.snapshot))
        kept.slices[part.index] = part

    def _enter(self, world: World) -> None:
        if world.generation < self._newest():
            self.worlds.setdefault(world.generation, world)  # to give what was captured in it: nothing of it is protected
            return
        before = self.worlds.get(world.generation)
        is_new = before is None
        self.worlds[world.generation] = world
        if before is not None:
            moved = {node for node, address in before.peers.items() if world.peers.get(node) != address}
            for kept in self._in_order():
                if kept.id.generation == world.generation:
                    self._distrust(kept, moved)
        for kept in self._in_order():
            if is_new and kept.id.generation < world.generation:
                self._give_up(kept, f"the world changed to generation {world.generation} before it was protected")
        self._forget_worlds()

    def _distrust(self, kept: _Kept, nodes: set[str]) -> None:
        """The keepers of these nodes were started again: what they held is gone until they say otherwise."""
        kept.held = {(stripe, node) for stripe, node in kept.held if node not in nodes}
        for node in nodes:
            kept.ask_at.pop(node, None)
        if kept.is_protected and nodes:
            kept.is_protected = False
            self._tell(kept, f"the keeper of {', '.join(sorted(nodes))} was started again, and its parity with it")

    def _forget(self, before_step: int) -> None:
        self.before_step = max(self.before_step, before_step)
        for kept in self._in_order():
            if kept.id.step < self.before_step:
                self._drop(kept)
        self._forget_worlds()

    def _drop_spent(self) -> None:
        """Make room for a new snapshot where nothing has become stable for long."""
        spent = next((kept for kept in self._in_order() if self._is_spent(kept)), None)
        if spent is not None:
            self._drop(spent)

    def _drop(self, kept: _Kept) -> None:
        self._drop_parity(kept)
        self._emit(DropSlices(kept.id))
        del self._kept[kept.id]

    def _forget_worlds(self) -> None:
        needed = {self._newest(), *(kept.id.generation for kept in self._kept.values())}
        self.worlds = {number: world for number, world in self.worlds.items() if number in needed}

    def _learn(self, kept: _Kept, event: Event, now: float) -> None:
        """Take in what is said about a snapshot that is kept."""
        match event:
            case TableCame(node, _, table, written):
                kept.ask_at[node] = now + POLL_S
                if tuple(part.index for part in table) == self._indices(kept, node):
                    kept.tables[node] = table
                    kept.held |= {(stripe, node) for stripe in written}
                else:
                    self._tell(kept, f"the table of {node} does not name the slices that its workers capture")
            case TableWithheld(node, _, gone, reason):
                kept.ask_at[node] = now + POLL_S
                if gone:
                    self._give_up(kept, reason)
            case PeerAsked(node):
                if node not in kept.tables and kept.ask_at.get(node, now) <= now + POLL_S:
                    kept.ask_at[node] = now  # it was asked too early; a question on its way is not repeated
            case ParityHeld(node, _, stripe):
                kept.held.add((stripe, node))
            case ParityWritten(_, stripe):
                if stripe in kept.writing:
                    kept.writing.remove(stripe)
                    kept.written.add(stripe)
                    self._notify(kept, stripe)
                    group = self._group(kept)
                    if group is not None and len(kept.written) == group.m:
                        self._emit(Covered(kept.id))
            case ParityFailed(_, stripe, gone, reason):
                kept.writing.discard(stripe)
                kept.write_at = now + POLL_S
                if gone:
                    self._give_up(kept, reason)
        kept.held &= self._guards(kept)

    def _notify(self, kept: _Kept, number: int) -> None:
        group = self._group(kept)
        assert group is not None
        for node, _ in group.stripes()[number].data:
            self._emit(Notify(node, kept.id, number))

    # -- decisions -------------------------------------------------------------------------------------------------

    def _advance(self, now: float) -> None:
        """Do what can be done next for each snapshot, the oldest first."""
        for kept in self._in_order():
            if kept.id.generation != self._newest() or kept.given_up or not self._is_complete(kept):
                continue
            group = self._group(kept)
            if group is None:
                self._tell(kept, "its node is in no protection group of its generation")
                continue
            self._ask(kept, group, now)
            self._judge(kept, group)
            if len(kept.written) < group.m:
                self._write(kept, group, now)
                return  # in order: the next one has to wait

    def _ask(self, kept: _Kept, group: ProtectionGroup, now: float) -> None:
        wanted = {node for _, node in self._guards(kept) - kept.held}
        for node in group.nodes:
            is_needed = node in wanted or node not in kept.tables
            if node != self._node(kept) and is_needed and now >= kept.ask_at.get(node, now):
                kept.ask_at[node] = now + ANSWER_TIMEOUT_S
                self._emit(AskTable(node, kept.id))

    def _judge(self, kept: _Kept, group: ProtectionGroup) -> None:
        if not kept.is_protected and self._guards(kept) <= kept.held:
            kept.is_protected = kept.was_protected = True
            kept.told = ""
            self._emit(Protected(kept.id))

    def _write(self, kept: _Kept, group: ProtectionGroup, now: float) -> None:
        if len(kept.tables) < len(group.nodes) - 1 or now < kept.write_at:
            return
        shards = {node: shard_bytes(table) for node, table in kept.tables.items()}
        shards[self._node(kept)] = shard_bytes(self.table(kept.id))
        block_bytes = group.block_bytes(max(shards.values()))
        if kept.block_bytes is None and not self._make_room(kept, group.m * block_bytes):
            return
        kept.block_bytes = block_bytes
        for stripe in group.stripes():
            if self._node(kept) in stripe.parity and stripe.number not in kept.written | kept.writing:
                kept.writing.add(stripe.number)
                row = stripe.parity.index(self._node(kept))
                self._emit(WriteParity(kept.id, group, stripe, row, block_bytes, shards))

    def _make_room(self, kept: _Kept, size_bytes: int) -> bool:
        """Free what no restore needs, oldest first, until a snapshot's parity fits; False if it cannot yet."""
        sets = [other for other in self._in_order() if other.block_bytes is not None]

        def taken_bytes() -> int:
            return sum(self._set_bytes(other) for other in sets)

        while len(sets) >= SETS_MAX or taken_bytes() + size_bytes > self.parity_bytes_max:
            useless = next((other for other in sets if self._is_spent(other)), None)
            if useless is None:
                break
            self._drop_parity(useless)
            sets.remove(useless)
        if len(sets) >= SETS_MAX:
            return False  # the usual wait: a set is free once the newer of them is stable
        if taken_bytes() + size_bytes > self.parity_bytes_max:
            self._tell(
                kept,
                f"its parity takes {size_bytes} bytes beside the {taken_bytes()} in use, more than the "
                f"{self.parity_bytes_max} allowed: allow more, or use a larger k",
            )
            return False
        return True

    def _is_spent(self, kept: _Kept) -> bool:
        """Whether nobody will restore a snapshot: it was given up, or its world is over and it is not the stable one.

        What this node alone saw protected in a world that is over never becomes stable, however long it is waited for.
        """
        stable = max(
            (other.id for other in self._kept.values() if other.was_protected and other.id.step == self.before_step),
            default=None,
        )
        return kept.given_up or (kept.id.generation < self._newest() and kept.id != stable)

    def _set_bytes(self, kept: _Kept) -> int:
        group = self._group(kept)
        return group.m * kept.block_bytes if group is not None and kept.block_bytes is not None else 0

    def _give_up(self, kept: _Kept, reason: str) -> None:
        """Stop working at a snapshot; one that was protected once may be the stable one, so its parity stays."""
        if kept.writing:
            kept.writing.clear()
            self._emit(StopWriting(kept.id))
        if not kept.was_protected and not kept.given_up:
            kept.given_up = True
            self._tell(kept, reason)

    def _drop_parity(self, kept: _Kept) -> None:
        if kept.block_bytes is not None:
            kept.block_bytes = None
            kept.writing.clear()
            kept.written.clear()
            self._emit(StopWriting(kept.id))
            self._emit(DropParity(kept.id))

    def _tell(self, kept: _Kept, reason: str) -> None:
        if kept.told != reason:
            kept.told = reason
            self._emit(Vulnerable(kept.id, reason))

    # -- reading the state -----------------------------------------------------------------------------------------

    def _in_order(self) -> Iterator[_Kept]:
        return iter(sorted(self._kept.values(), key=lambda kept: kept.id))

    def _node(self, kept: _Kept) -> str:
        return self.worlds[kept.id.generation].node

    def _group(self, kept: _Kept) -> ProtectionGroup | None:
        world = self.worlds.get(kept.id.generation)
        return world.group() if world is not None else None

    def _newest(self) -> int:
        return max(self.worlds, default=-1)

    def _indices(self, kept: _Kept, node: str) -> tuple[int, ...]:
        """The slices of a node, in order."""
        return tuple(sorted(self.worlds[kept.id.generation].slices.get(node, ())))

    def _is_complete(self, kept: _Kept) -> bool:
        if kept.id.generation not in self.worlds:
            return False
        own = self._indices(kept, self._node(kept))
        return bool(own) and kept.slices.keys() >= set(own)

    def _guards(self, kept: _Kept) -> set[tuple[int, str]]:
        """(stripe, node) of every parity that has to be held for this node's shard to be protected."""
        group = self._group(kept)
        return {
            (stripe.number, node)
            for stripe in (group.stripes() if group is not None else ())
            if any(owner == self._node(kept) for owner, _ in stripe.data)
            for node in stripe.parity
        }

    def _emit(self, command: Command) -> None:
        self._out.append(command)

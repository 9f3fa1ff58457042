"""Snapshots in memory, as a worker takes them and restores them.

Taking one copies this worker's share of the state into memory that its agent owns, at the speed of a plain copy: what
lies where is worked out once, and again only when the state no longer consists of the same tensors. Restoring one reads
all its slices out of the agent's memory. This file never decides when, whether or which; taking never writes to the
state, and never waits for anything on a device but its own copies.
"""

from __future__ import annotations

import mmap
import os
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import reduce
from typing import Any

import torch
from torch import Tensor

from elastic.checksum import crc32, joined
from elastic.domain import NO_STEP
from elastic.encoding import flat_bytes, raw_view, tensor_over
from elastic.errors import ConfigError, ProtocolError, TransferError
from elastic.memory import (
    BUFFERS_MAX,
    SnapshotMemory,
    SnapshotPage,
    StoredSlice,
    populate,
)
from elastic.payload import (
    Description,
    Layout,
    Section,
    SnapshotLayout,
    Unpacker,
    clipped,
    describe,
    manifest_of,
    manifest_text,
    read_description,
)
from elastic.sharding import Cut
from elastic.snapshots import Slice, SnapshotId, is_spent, share_of
from elastic.state import Entry, TrainingState, Watch

PIECE_SIZE_BYTES = 2**20
"""Of a payload that is checked and copied at a time: it stays in a processor's second cache in between."""

PART_SIZE_BYTES_MIN = 16 * 2**20
"""Of a slice that one thread reads while others read the rest: one alone is bound by the kernel's copying."""
THREADS_MAX = 4


class Capturer:
    """Takes snapshots of one worker's share of the state: an equal one of what all hold, and all that it holds alone.

    Args:
        state: to read. Its tensors stay as they are from `capture` until `finish` has returned.
        memory: the link to the agent.
        buffers: how many slices to keep; a snapshot of every step needs `BUFFERS_MAX`.

    Attributes:
        cost_s: how long the last `capture`, and the `finish` after it, held up their caller.
        captured_step: of the newest complete slice; NO_STEP for none.
    """

    def __init__(self, state: TrainingState, memory: SnapshotMemory, *, buffers: int = BUFFERS_MAX) -> None:
        if not 1 <= buffers <= BUFFERS_MAX:
            raise ValueError(f"snapshots are kept in 1 to {BUFFERS_MAX} buffers, not {buffers}")
        self.cost_s = 0.0
        self.captured_step = NO_STEP
        self._state = state
        self._section: Section | None = None
        self._memory = memory
        self._buffers = [_Buffer(number) for number in range(buffers)]
        self._stable = NO_STEP
        self._plan: _Plan | None = None
        self._streams: dict[torch.device, torch.cuda.Stream] = {}
        self._begun: tuple[_Buffer, Slice] | None = None  # copies that are under way on a device

    def turn_to(self, state: TrainingState, section: Section) -> None:
        """Capture a part of the job's state from now on, of which other workers have no copy or the same one."""
        self.finish()
        self._state, self._section, self._plan = state, section, None

    @property
    def protected(self) -> SnapshotId | None:
        """The newest snapshot of which the agent has protected this worker's slice."""
        return None if self._memory.page is None else self._memory.page.protected

    def has_room(self, generation: int, stable: int) -> bool:
        """Whether there is a buffer that no restore needs; shows the agent what is stable, too.

        Args:
            generation: of the present world. stable: the newest step that is protected everywhere, -1 for none.
        """
        self.show_stable(stable)
        page = self._memory.page
        return bool(self._free(generation)) and not (page is not None and page.paused)

    def show_stable(self, step: int) -> None:
        """Show the agent the newest step that is protected everywhere: it and its keeper let go of older ones."""
        self._stable = step
        if self._memory.page is not None:
            self._memory.page.stable = step

    def capture(self, step: int, generation: int, index: int, count: int) -> bool:
        """Copy this worker's share of the state after `step` to a buffer that, by `has_room`, nobody needs.

        The first use of a buffer takes longer, since its memory has to be mapped. On the CPU the slice is complete when
        this returns, otherwise when `finish` has.

        Args:
            step: the last step whose effects the state contains. generation: of the world that captures it.
            index, count: the share: which part, of how many.

        Returns:
            False if nothing was captured, since there is no memory yet: the agent is still making it, or slices of dead
            workers are in the way.

        Raises:
            ConfigError: the node's memory is too small, or something in the state cannot be stored.
            Unreachable, ProtocolError: the agent gave no room, see `SnapshotMemory.room`.
        """
        self.finish()
        began_s = time.perf_counter()
        plan = self._planned(index, count)
        description = describe(plan.manifest, self._state.small())
        piece = Slice(
            snapshot=SnapshotId(step, generation),
            index=index,
            count=count,
            begin=plan.share.start,
            end=plan.share.stop,
            total_bytes=plan.total_bytes,
            description_bytes=len(description),
            description_crc=crc32(description),
        )
        room = self._roomy(piece)
        if room is not None:
            buffer, mapping = room
            on_device = any(device.type == "cuda" for device in plan.groups)
            mapping.populate(piece.stored_bytes, pinned=on_device)
            self._page().begin(buffer.number)
            buffer.snapshot = None  # after an error from here on it is free
            self._copy(plan, mapping)
            mapping.write(piece.description_at, description)
            self._begun = buffer, piece
            if not on_device:
                self._publish(buffer, piece)
        self.cost_s = time.perf_counter() - began_s
        return room is not None

    def discard(self, snapshot: SnapshotId) -> None:
        """Forget a slice: its snapshot will never be whole."""
        for buffer in self._buffers:
            if buffer.snapshot == snapshot:
                self._page().begin(buffer.number)
                buffer.snapshot = None

    def finish(self) -> None:
        """Complete the slice that `capture` began. To be called before the state is next written to.

        It waits for the copies alone, and they have had the forward and backward passes to run beside.
        """
        if self._begun is not None:
            began_s = time.perf_counter()
            for stream in self._streams.values():
                stream.synchronize()
            self._publish(*self._begun)
            self.cost_s += time.perf_counter() - began_s

    def close(self) -> None:
        """Let go of the memory. What it holds stays with the agent."""
        self.finish()
        for buffer in self._buffers:
            buffer.close()

    def _page(self) -> SnapshotPage:
        if self._memory.page is None:
            raise ProtocolError("The agent gave room for a snapshot without a page: use one version everywhere.")
        return self._memory.page

    def _free(self, generation: int) -> list[_Buffer]:
        return [b for b in self._buffers if b.snapshot is None or is_spent(b.snapshot, generation, self._stable)]

    def _planned(self, index: int, count: int) -> _Plan:
        """What to copy; the last capture's plan if it still holds."""
        plan = self._plan
        if plan is None or (plan.index, plan.count) != (index, count) or not plan.watch.unchanged():
            plan = self._plan = _Plan(self._state, index, count, self._section)
        return plan

    def _roomy(self, piece: Slice) -> tuple[_Buffer, _Mapping] | None:
        """A free buffer for the slice, if possible one that needs no more memory."""
        free = self._free(piece.snapshot.generation)
        for buffer in sorted(free, key=lambda buffer: not buffer.holds(piece)):
            mapping = buffer.mapping_for(piece, self._memory, len(self._buffers))
            if mapping is not None:
                return buffer, mapping
        return None

    def _copy(self, plan: _Plan, mapping: _Mapping) -> None:
        targets = mapping.targets_of(plan)
        for device, group in plan.groups.items():
            with self._beside(device):
                if group.sources:
                    torch._foreach_copy_(targets[device], group.sources, non_blocking=True)
                for run in group.strided:
                    source = flat_bytes(run.tensor)[run.in_tensor]
                    mapping.target[run.in_share].copy_(source, non_blocking=True)

    @contextmanager
    def _beside(self, device: torch.device) -> Iterator[None]:
        """On an accelerator, work behind what its present stream has been given, but not in front of what it is given next."""
        if device.type != "cuda":
            yield
            return
        if device not in self._streams:
            self._streams[device] = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        stream = self._streams[device]
        stream.wait_stream(torch.cuda.current_stream(device))
        with torch.cuda.stream(stream):
            yield

    def _publish(self, buffer: _Buffer, piece: Slice) -> None:
        self._begun = None
        self._page().filled(buffer.number, piece)
        buffer.snapshot = piece.snapshot
        self.captured_step = piece.snapshot.step


@dataclass(frozen=True, slots=True)
class _StridedRun:
    """Bytes of a tensor that is not row-major in memory, so that they have to be gathered each time."""

    tensor: Tensor
    in_tensor: slice
    in_share: slice


@dataclass(slots=True)
class _Group:
    """What is copied from one device: views of live memory and where in the share they go, and what must be gathered."""

    sources: list[Tensor] = field(default_factory=list)
    places: list[slice] = field(default_factory=list)
    strided: list[_StridedRun] = field(default_factory=list)


class _Plan:
    """What a worker copies as part `index` of `count`, for as long as the state consists of the same tensors."""

    def __init__(self, state: TrainingState, index: int, count: int, section: Section | None) -> None:
        self.index, self.count = index, count
        self.watch = Watch(state)
        entries, tensors = state.described_tensors()
        if state.shards is not None and state.cut != Cut(index, count):
            raise ProtocolError(f"The state is cut as {state.cut}, and part {index} of {count} was to be captured.")
        extents = state.extents(entries)
        if section is not None:
            index, count = section.members.index(index), len(section.members)
        layout = SnapshotLayout(entries, count)
        self.manifest = manifest_text(entries, section)
        self.total_bytes = layout.size_bytes
        self.share = layout.share(index)
        self.groups: dict[torch.device, _Group] = {}
        for whole in layout.runs(self.share):
            (run, _), tensor = next(clipped(whole, extents[whole.tensor])), tensors[whole.tensor]
            group = self.groups.setdefault(tensor.device, _Group())
            if tensor.is_contiguous() and not tensor.is_conj() and not tensor.is_neg():
                group.sources.append(flat_bytes(tensor)[run.in_tensor])
                group.places.append(run.in_piece)
            else:
                group.strided.append(_StridedRun(tensor, run.in_tensor, run.in_piece))


class _Mapping:
    """Memory of the agent, mapped here to be written.

    Attributes:
        target: all of it, uint8.
    """

    def __init__(self, memory: mmap.mmap) -> None:
        self.target = tensor_over(memory)
        self._memory = memory
        self._populated_bytes = 0
        self._is_pinned = False
        self._views: tuple[_Plan, dict[torch.device, list[Tensor]]] | None = None

    def populate(self, size_bytes: int, *, pinned: bool) -> None:
        """Have the pages of the first bytes; for an accelerator locked in place, so that it can write by itself."""
        if size_bytes > self._populated_bytes:
            populate(self._memory, self._populated_bytes, size_bytes)
            self._populated_bytes = size_bytes
        if pinned and not self._is_pinned:
            _check_cuda(_cudart().cudaHostRegister(self.target.data_ptr(), len(self.target), 0))
            self._is_pinned = True

    def targets_of(self, plan: _Plan) -> dict[torch.device, list[Tensor]]:
        """Where in it each of the plan's sources goes."""
        if self._views is None or self._views[0] is not plan:
            views = {device: [self.target[p] for p in group.places] for device, group in plan.groups.items()}
            self._views = plan, views
        return self._views[1]

    def write(self, offset: int, data: bytes) -> None:
        self._memory[offset : offset + len(data)] = data

    def close(self) -> None:
        """Undo the locking; the memory itself is unmapped with the last tensor over it."""
        if self._is_pinned:
            _check_cuda(_cudart().cudaHostUnregister(self.target.data_ptr()))
            self._is_pinned = False


@dataclass(slots=True)
class _Buffer:
    """One of this worker's buffers.

    Attributes:
        snapshot: of which it holds a slice; None if it holds none.
        mapping: its memory; None until there is room.
    """

    number: int
    snapshot: SnapshotId | None = None
    mapping: _Mapping | None = None

    def holds(self, piece: Slice) -> bool:
        """Whether the slice fits."""
        return self.mapping is not None and len(self.mapping.target) >= piece.stored_bytes

    def mapping_for(self, piece: Slice, memory: SnapshotMemory, buffers: int) -> _Mapping | None:
        """Its memory, larger if need be; None if there is no room for now."""
        if not self.holds(piece):
            # A description may become a little longer from step to step.
            mapped = memory.room(self.number, piece.stored_bytes + piece.description_bytes, buffers)
            if mapped is None:
                return None
            self.close()
            self.mapping = _Mapping(mapped)
        return self.mapping

    def close(self) -> None:
        if self.mapping is not None:
            self.mapping.close()
            self.mapping = None


def restore(state: TrainingState, memory: SnapshotMemory, snapshot: SnapshotId) -> int:
    """Make `state` that of the snapshot, and return the last step that it contains.

    What is missing, and what does not belong together, is found before anything of `state` is changed. The payload is
    read once only, and checked where it has been copied to: a pass over it beforehand would cost half as much again, and
    miss what is damaged afterwards. So after an error about a payload nothing of `state` can be relied on; an agent that
    wants to know beforehand has its slices read again while the survivors regroup.

    Args:
        state: of the same structure as that which was captured; optimizer state is made as needed.
        memory: the link to an agent that holds all slices.

    Raises:
        TransferError: a slice is missing or damaged, or they do not belong together; names it.
        ConfigError: the snapshot is that of another model or optimizer.
        Unreachable, ProtocolError: the agent did not answer, see `SnapshotMemory`.
    """
    slices = [memory.slice(snapshot, 0)]
    try:
        count = slices[0].slice.count
        slices += [memory.slice(snapshot, index) for index in range(1, count)]
        for index, stored in enumerate(slices):
            if (stored.slice.snapshot, stored.slice.index, stored.slice.count) != (snapshot, index, count):
                raise TransferError(f"{_named(stored.slice)} is not slice {index} of {count}: take an older snapshot.")
        sections = _sections(slices)
        entries, small = sections[0].entries, sections[0].small
        if sections[0].is_part:
            entries, small = state.chosen([(section.entries, section.small) for section in sections])
        tensors = state.adopt(entries, small)
        places = {entry: (tensor, extent) for entry, tensor, extent in zip(entries, tensors, state.extents(entries), strict=True)}
        for section in sections:
            section.read(places)
    finally:
        for stored in slices:
            stored.close()
    return snapshot.step


class _Section:
    """The slices of a section, which is whole."""

    def __init__(self, described: Description, slices: Sequence[StoredSlice]) -> None:
        self.is_part = described.section is not None
        self.entries, self.small = described.entries, described.small
        self._slices = slices
        self._layout = SnapshotLayout(self.entries, len(slices))
        first = slices[0].slice
        if self._layout.size_bytes != first.total_bytes:
            raise TransferError(
                f"{_named(first)} describes {self._layout.size_bytes} bytes, not {first.total_bytes}: ask anew."
            )
        manifest = manifest_of(slices[0].description())
        for index, stored in enumerate(slices):
            piece = stored.slice
            if range(piece.begin, piece.end) != self._layout.share(index) or piece.total_bytes != first.total_bytes:
                raise TransferError(
                    f"{_named(piece)} does not go with slice {first.index} ({piece}, {first}): take an older snapshot."
                )
            if manifest_of(stored.description()) != manifest:
                raise TransferError(
                    f"{_named(piece)} describes another state than slice {first.index}: take an older snapshot."
                )

    def read(self, places: Mapping[Entry, tuple[Tensor, range]]) -> None:
        """Copy what is wanted of it to where it belongs. Raises TransferError for what is damaged."""
        wanted = [places.get(entry, (_NOTHING, range(0))) for entry in self.entries]
        if not any(entry in places for entry in self.entries):
            return
        target = _Target(self._layout, [tensor for tensor, _ in wanted], [extent for _, extent in wanted])
        for stored in self._slices:
            if target.unpack(stored) != stored.slice.payload_crc:
                raise TransferError(
                    f"{_named(stored.slice)} is damaged (its payload's CRC differs): take another snapshot."
                )


_NOTHING = torch.empty(0, dtype=torch.uint8)


def _sections(slices: Sequence[StoredSlice]) -> list[_Section]:
    """What the slices of a snapshot make up."""
    first = read_description(slices[0].description())
    if first.section is None:
        return [_Section(first, slices)]
    sections: dict[int, _Section] = {}
    members: list[int] = []
    for stored in slices:
        if stored.slice.index in members:
            continue
        described = read_description(stored.description())
        section = described.section
        if section is None or section.number in sections or stored.slice.index != min(section.members):
            raise TransferError(f"{_named(stored.slice)} does not go with slice 0: take an older snapshot.")
        if not all(0 <= member < len(slices) for member in section.members) or set(section.members) & set(members):
            raise TransferError(f"{_named(stored.slice)} names members that there are not: take an older snapshot.")
        members += section.members
        sections[section.number] = _Section(described, [slices[member] for member in section.members])
    return [sections[number] for number in sorted(sections)]


class _Target:
    """The tensors that a snapshot is read into."""

    def __init__(self, layout: Layout, tensors: Sequence[Tensor], extents: Sequence[range]) -> None:
        self._layout, self._tensors, self._extents = layout, tensors, extents
        self._unpacker = Unpacker(layout, tensors, extents)
        # What is not contiguous is gathered from several pieces, which one thread does.
        can_share = all(tensor.is_contiguous() for tensor in tensors)
        self._threads = min(THREADS_MAX, len(os.sched_getaffinity(0))) if can_share else 1

    def unpack(self, stored: StoredSlice) -> int:
        """Copy a slice's payload to where it belongs, if anything of it does; returns the CRC of all that was read."""
        size_bytes = stored.slice.end - stored.slice.begin
        count = max(1, min(self._threads, size_bytes // PART_SIZE_BYTES_MIN))
        parts = [share_of(size_bytes, index, count) for index in range(count)]
        with ThreadPoolExecutor(count) as pool:  # the others of this node's processors wait for the same
            crcs = list(pool.map(lambda part: self._unpack(stored, part), parts))
        return reduce(lambda crc, part: joined(crc, part[0], len(part[1])), zip(crcs, parts, strict=True), 0)

    def _unpack(self, stored: StoredSlice, part: range) -> int:
        """Copy some bytes of a slice's payload; returns their CRC."""
        begin, crc = stored.slice.begin + part.start, 0
        staging = torch.empty(PIECE_SIZE_BYTES, dtype=torch.uint8)
        for whole in self._layout.runs(range(begin, stored.slice.begin + part.stop)):
            tensor = self._tensors[whole.tensor]
            can_be_direct = tensor.device.type == "cpu" and tensor.is_contiguous()
            for run, is_here in clipped(whole, self._extents[whole.tensor]):
                is_direct = is_here and can_be_direct
                memory = raw_view(tensor)[run.in_tensor] if is_direct else raw_view(staging)
                for start in range(run.in_piece.start, run.in_piece.stop, PIECE_SIZE_BYTES):
                    stop = min(start + PIECE_SIZE_BYTES, run.in_piece.stop)
                    at = start - run.in_piece.start if is_direct else 0
                    piece = memory[at : at + stop - start]
                    stored.read(part.start + start, piece)
                    crc = crc32(piece, crc)
                    if is_here and not is_direct:
                        self._unpacker.unpack(range(begin + start, begin + stop), staging)
        return crc


def _named(piece: Slice) -> str:
    """A slice in words, to begin a sentence."""
    return f"Slice {piece.index} of {piece.count} of the snapshot of step {piece.snapshot.step}"


def _cudart() -> Any:
    return torch.cuda.cudart()  # type: ignore[no-untyped-call]


def _check_cuda(code: Any) -> None:
    """Translate what the CUDA runtime returns."""
    if int(code) != 0:
        raise ConfigError(
            f"CUDA cannot lock snapshot memory in place (error {int(code)}): raise the limit of locked memory "
            "(ulimit -l), or train without snapshots in memory."
        )

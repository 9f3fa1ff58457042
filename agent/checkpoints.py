"""Checkpoints: a snapshot from memory into a directory in torch.distributed.checkpoint's format, and back.

It runs in a process of its own (`agent.checkpointer`), never in the agent nor in a training process. It holds no
second copy of the state: tensors are written from where they lie in memory and read to where they will lie, one at a
time. A checkpoint is whole or it is not there; nothing of an older one is touched before the new one is whole.
"""

from __future__ import annotations

import importlib
import warnings
import zlib
from bisect import bisect_right
from collections.abc import Callable, Iterator, Mapping, Sequence
from operator import itemgetter
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner, DefaultSavePlanner
from torch.distributed.checkpoint.filesystem import FileSystemReader, FileSystemWriter
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, Metadata, MetadataIndex, TensorStorageMetadata
from torch.distributed.checkpoint.planner import LoadPlan, ReadItem
from torch.distributed.checkpoint.planner_helpers import create_read_items_for_chunk_list
from torch.distributed.checkpoint.state_dict_saver import save

import elastic
from agent import catalog, rotation
from agent.places import Bucket, Place, open_place
from agent.plain import DESCRIPTION, PlainForm, plain_form
from agent.rotation import MARKER, METADATA, Marker
from elastic.checksum import joined
from elastic.encoding import TENSOR_DTYPES, flat_bytes, raw_view
from elastic.errors import CheckpointError
from elastic.payload import Description, Section, SnapshotLayout, describe, manifest_text, read_description
from elastic.snapshots import Slice
from elastic.state import Entry, joined_small

Progress = Callable[[int, int], None]
"""Is told how many bytes of how many have been written."""
T = TypeVar("T")


def write_checkpoint(
    target: str,
    slices: Sequence[tuple[Slice, Tensor]],
    *,
    job: str,
    keep: int,
    progress: Progress | None = None,
) -> str:
    """Write a snapshot, and remove what is outdated by it.

    Args:
        target: directory, or an address of fsspec; made if it is not there.
        slices: all of one snapshot, each with its memory (uint8, at least `stored_bytes` long), which must not change
            meanwhile.
        job: whose it is. keep: how many whole checkpoints to keep, at least 1.
        progress: told after each tensor.

    Returns:
        The path of the checkpoint.

    Raises:
        CheckpointError: a slice is damaged or missing, the target is another job's or cannot be written: then what was
            written is removed, and older checkpoints are as they were. Or it is whole, and older ones cannot be removed.
    """
    if keep < 1:
        raise ValueError(f"of {keep} checkpoints none is the newest")
    memory = _Memory(slices)
    step = memory.whole.snapshot.step
    place = open_place(target)
    path = _in_a_sentence(
        lambda: _write(place, memory, job, progress),
        f"The checkpoint of step {step} cannot be written to {target}",
        "make room there or name another directory; older checkpoints are untouched",
    )
    _in_a_sentence(
        lambda: catalog.remove_outdated(place, job, step, keep),
        f"The checkpoint of step {step} is whole, but what it outdates at {target} cannot be removed",
        "remove it by hand",
    )
    return path


def read_checkpoint(path: str, memory: Tensor) -> Slice:
    """Read a checkpoint as the one slice that holds the whole snapshot.

    Args:
        path: of the checkpoint. memory: uint8, at least as long as the `stored_bytes` of its marker's snapshot.

    Returns:
        The slice that `memory` now holds.

    Raises:
        CheckpointError: it cannot be read, is damaged, or half-written. What is in `memory` is then of no use.
    """
    target, slash, name = path.rstrip("/").rpartition("/")
    place = open_place(target or slash or ".")
    return _in_a_sentence(
        lambda: _read(place, name, memory), f"The checkpoint {path} cannot be read", "take an older one"
    )


def _write(place: Place, memory: _Memory, job: str, progress: Progress | None) -> str:
    catalog.look(place, job)  # before anything is written where another job's checkpoints are
    step = memory.whole.snapshot.step
    path = place.begin(rotation.step_name(step))
    try:
        planner = _FromMemory(memory, progress)
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="torch.distributed is")  # that this process is alone, as is meant
            save(planner.form.state_dict, storage_writer=_writer(place, path), planner=planner)
        if progress is not None:
            progress(planner.size_bytes, planner.size_bytes)
        marker = Marker(
            job=job,
            snapshot=memory.whole,
            files=place.sizes(path),
            metadata_crc=zlib.crc32(place.read(path, METADATA) or b""),
            made_with={"elastic": elastic.__version__, "torch": torch.__version__},
        )
        place.finish(path, rotation.step_name(step), marker.to_json())
    except BaseException:
        place.abandon(path)
        raise
    return place.path(rotation.step_name(step))


def _read(place: Place, name: str, memory: Tensor) -> Slice:
    path = place.path(name)
    text = place.read(path, MARKER)
    if text is None:
        raise CheckpointError(f"{path} is half-written or gone, as it has no {MARKER}: take an older one.")
    marker = Marker.from_json(text)
    whole = marker.snapshot
    if fault := catalog.damage(place, name, marker):
        raise CheckpointError(f"{path} is damaged ({fault}): take an older one.")
    if len(memory) < whole.stored_bytes:
        raise ValueError(f"{whole.stored_bytes} bytes do not fit into {len(memory)} bytes of memory")
    reader = _reader(place, path)
    metadata = reader.read_metadata()
    reader.set_up_storage_reader(metadata, is_coordinator=True)

    def fill(places: Mapping[str, tuple[int, torch.dtype]]) -> None:
        planner = _IntoMemory(memory, places)
        reader.read_data(planner.plan_for(metadata), planner)

    memory[whole.end : whole.description_at].zero_()
    fill({DESCRIPTION: (whole.description_at, torch.uint8)})
    described = memory[whole.description_at : whole.stored_bytes]
    if zlib.crc32(raw_view(described)) != whole.description_crc:
        raise CheckpointError(f"{path} is damaged (the CRC of its description differs): take an older one.")
    said = read_description(raw_view(described))
    manifest, small = said.entries, said.small
    keys = plain_form(manifest, small, len(described)).keys()
    places, _ = _places(manifest, whole.count)
    begins = [place[0].start if place else 0 for place in places]
    fill({keys[i]: (begin, TENSOR_DTYPES[manifest[i].dtype]) for i, begin in enumerate(begins)})
    if zlib.crc32(raw_view(memory[: whole.end])) != whole.payload_crc:
        raise CheckpointError(f"{path} is damaged (the CRC of its tensors differs): take an older one.")
    return whole


class _Memory:
    """A snapshot as it lies in slices. Raises CheckpointError unless they are all there and sound.

    Attributes:
        whole: the slice that would hold all of it. description: its description, uint8. manifest, small: what it says.
    """

    def __init__(self, slices: Sequence[tuple[Slice, Tensor]]) -> None:
        ordered = sorted(slices, key=lambda each: each[0].index)
        indices = [each.index for each, _ in ordered]
        if not ordered or indices != list(range(ordered[0][0].count)):
            found = ", ".join(map(str, indices)) or "none"
            raise CheckpointError(f"A checkpoint needs every slice of its snapshot, and these are there: {found}.")
        self._payloads: list[Tensor] = []
        self._ends: list[int] = []
        self._places: list[list[range]] = []
        self.manifest: list[Entry] = []
        whole_crc, sections = 0, _sections(ordered)
        for described, members in sections:
            whole_crc = self._take(described, members, whole_crc)
        first, memory = ordered[0]
        if len(sections) == 1 and sections[0][0].section is None:
            self.description = memory[first.description_at : first.stored_bytes]
            self.small = sections[0][0].small
        else:
            self.small = joined_small([described.small for described, _ in sections])
            text = describe(manifest_text(self.manifest, Section(0, (0,))), self.small)
            self.description = torch.frombuffer(bytearray(text), dtype=torch.uint8)
        if len(sections) > 1 or any(entry.sharding is not None for entry in self.manifest):
            whole_crc = self._crc_in_one_slice()
        self.whole = rotation.whole_slice(
            first.snapshot,
            total_bytes=self._ends[-1] if self._ends else 0,
            payload_crc=whole_crc,
            description_bytes=len(self.description),
            description_crc=zlib.crc32(raw_view(self.description)),
        )

    def _take(self, described: Description, members: Sequence[tuple[Slice, Tensor]], crc: int) -> int:
        """Take in the slices of a section; returns the CRC of all payloads so far, one behind the other."""
        _check_that_all_are_there([each for each, _ in members])
        first, begin = members[0][0], self._ends[-1] if self._ends else 0
        for each, memory in members:
            payload = memory[: each.end - each.begin]
            description = memory[each.description_at : each.stored_bytes]
            crcs = zlib.crc32(raw_view(payload)), zlib.crc32(raw_view(description))
            if crcs != (each.payload_crc, each.description_crc):
                raise CheckpointError(
                    f"Slice {each.index} of the snapshot of step {first.snapshot.step} is damaged in memory (its CRC "
                    "differs): take another snapshot."
                )
            crc = joined(crc, each.payload_crc, len(payload))
            self._payloads.append(payload)
            self._ends.append(begin + each.end)
        places, size_bytes = _places(described.entries, len(members))
        if size_bytes != first.total_bytes:
            raise CheckpointError(
                f"The snapshot of step {first.snapshot.step} has {first.total_bytes} bytes and describes "
                f"{size_bytes}: take another one."
            )
        self.manifest += described.entries
        self._places += [[range(r.start + begin, r.stop + begin) for r in each] for each in places]
        return crc

    def tensor(self, number: int) -> Tensor:
        """Bytes of a tensor of the manifest: uint8, a view where they lie together, which cannot be written to otherwise."""
        pieces = [piece for place in self._places[number] for piece in self._read(place)]
        return pieces[0] if len(pieces) == 1 else torch.cat([*pieces, torch.empty(0, dtype=torch.uint8)])

    def _read(self, place: range) -> Iterator[Tensor]:
        position, index = place.start, bisect_right(self._ends, place.start)
        while position < place.stop:
            payload, stop = self._payloads[index], min(place.stop, self._ends[index])
            at = self._ends[index] - len(payload)
            yield payload[position - at : stop - at]
            position, index = stop, index + 1

    def _crc_in_one_slice(self) -> int:
        """The CRC of the payload as one worker alone would have captured it."""
        layout, crc = SnapshotLayout(self.manifest, 1), 0
        for run in layout.runs(range(layout.size_bytes)):
            data = self.tensor(run.tensor)
            crc = zlib.crc32(raw_view(data), crc)
        return crc


class _FromMemory(DefaultSavePlanner):
    """Hands out each tensor when it is its turn to be written.

    Attributes:
        form: what is to be saved. size_bytes: of its tensors.
    """

    def __init__(self, memory: _Memory, progress: Progress | None) -> None:
        super().__init__()
        self.form: PlainForm = plain_form(memory.manifest, memory.small, len(memory.description))
        self._memory, self._progress = memory, progress
        self.size_bytes = sum(memory.manifest[index].size_bytes for index in self.form.entries.values())
        self._done_bytes = 0

    def lookup_object(self, index: MetadataIndex) -> Any:
        if index.fqn == DESCRIPTION:
            return _alone(self._memory.description)
        if index.fqn not in self.form.entries:
            return super().lookup_object(index)
        if self._progress is not None:
            self._progress(self._done_bytes, self.size_bytes)
        number = self.form.entries[index.fqn]
        entry = self._memory.manifest[number]
        self._done_bytes += entry.size_bytes
        return _alone(self._memory.tensor(number)).view(TENSOR_DTYPES[entry.dtype]).view(entry.shape)


class _IntoMemory(DefaultLoadPlanner):
    """Has tensors read to where they belong in memory.

    Args:
        memory: uint8. places: key -> where in memory, and as what.
    """

    def __init__(self, memory: Tensor, places: Mapping[str, tuple[int, torch.dtype]]) -> None:
        super().__init__()
        self._memory, self._places = memory, places

    def plan_for(self, metadata: Metadata) -> LoadPlan:
        """What is to be read. Raises CheckpointError if the checkpoint does not have it."""
        items = []
        for key, (_, dtype) in self._places.items():
            stored = metadata.state_dict_metadata.get(key)
            if not isinstance(stored, TensorStorageMetadata) or stored.properties.dtype != dtype:
                raise CheckpointError(f"It holds no {dtype} called {key!r}, of which its description speaks.")
            everything = ChunkStorageMetadata(offsets=torch.Size([0] * len(stored.size)), sizes=stored.size)
            items += create_read_items_for_chunk_list(key, stored, [everything])
        return LoadPlan(items)

    def resolve_tensor(self, read_item: ReadItem) -> Tensor:
        dtype = self._places[read_item.dest_index.fqn][1]
        target = self._target(read_item)
        if target.storage_offset() % dtype.itemsize:  # behind a tensor of smaller elements: no tensor can lie there
            return torch.empty(read_item.lengths, dtype=dtype)
        return target.view(dtype).view(read_item.lengths)

    def commit_tensor(self, read_item: ReadItem, tensor: Tensor) -> None:
        if tensor.untyped_storage().data_ptr() != self._memory.untyped_storage().data_ptr():
            self._target(read_item).copy_(flat_bytes(tensor))

    def _target(self, read_item: ReadItem) -> Tensor:
        begin, dtype = self._places[read_item.dest_index.fqn]
        return self._memory[begin : begin + read_item.lengths.numel() * dtype.itemsize]


def _sections(ordered: Sequence[tuple[Slice, Tensor]]) -> list[tuple[Description, list[tuple[Slice, Tensor]]]]:
    """The slices of a snapshot by section, each in the order of its members; raises CheckpointError if they contradict it."""
    found: dict[int, tuple[Description, list[tuple[Slice, Tensor]]]] = {}
    for each, memory in ordered:
        described = read_description(raw_view(memory[each.description_at : each.stored_bytes]))
        if described.section is None:
            return [(described, list(ordered))]
        members = described.section.members
        if any(not 0 <= member < len(ordered) for member in members) or each.index not in members:
            raise CheckpointError(f"Slice {each.index} of step {each.snapshot.step} names members that there are not.")
        if described.section.number not in found:
            found[described.section.number] = described, [ordered[member] for member in members]
    if sum(len(slices) for _, slices in found.values()) != len(ordered):
        raise CheckpointError(f"The slices of step {ordered[0][0].snapshot.step} contradict each other: take another one.")
    return [found[number] for number in sorted(found)]


def _check_that_all_are_there(slices: Sequence[Slice]) -> None:
    """Slices in order make up one section of a snapshot, of which nothing is missing."""
    first, end = slices[0], 0
    for each in slices:
        shared = (each.snapshot, each.count, each.total_bytes, each.description_bytes, each.description_crc)
        if each.begin != end or shared != (
            *(first.snapshot, first.count, first.total_bytes),
            *(first.description_bytes, first.description_crc),
        ):
            raise CheckpointError(
                f"Slices {first.index} and {each.index} are not of one snapshot of step {first.snapshot.step}: take another one."
            )
        end = each.end
    if end != first.total_bytes:
        raise CheckpointError(f"The slices of step {first.snapshot.step} end at byte {end} of {first.total_bytes}.")


def _alone(data: Tensor) -> Tensor:
    """The same bytes as a tensor with no others in its storage, since torch.save writes a storage as a whole."""
    if data.nbytes in (0, data.untyped_storage().nbytes()):
        return data.clone() if not data.nbytes else data
    return torch.frombuffer(raw_view(data), dtype=torch.uint8)


def _places(manifest: Sequence[Entry], count: int) -> tuple[list[list[range]], int]:
    """Where in the payload of `count` workers the bytes of each tensor lie, in their order; and the payload's size."""
    layout = SnapshotLayout(manifest, count)
    found: list[list[tuple[int, range]]] = [[] for _ in manifest]
    for run in layout.runs(range(layout.size_bytes)):
        found[run.tensor].append((run.in_tensor.start, range(run.in_piece.start, run.in_piece.stop)))
    return [[place for _, place in sorted(each, key=itemgetter(0))] for each in found], layout.size_bytes


def _writer(place: Place, path: str) -> FileSystemWriter:
    # Nothing is copied ahead: that is for memory of an accelerator, and would wake one.
    if not isinstance(place, Bucket):
        return FileSystemWriter(path, per_thread_copy_ahead=0)
    # It cannot sync a file of an object store, and would sync every disk of the machine instead.
    writer: FileSystemWriter = _fsspec().FsspecWriter(path, per_thread_copy_ahead=0, sync_files=False)
    return writer


def _reader(place: Place, path: str) -> FileSystemReader:
    reader: FileSystemReader = _fsspec().FsspecReader(path) if isinstance(place, Bucket) else FileSystemReader(path)
    return reader


def _fsspec() -> Any:
    """torch's own bridge to fsspec, which has no public name yet; it imports fsspec, which is optional."""
    return importlib.import_module("torch.distributed.checkpoint._fsspec_filesystem")


def _in_a_sentence(action: Callable[[], T], what: str, remedy: str) -> T:
    """Do something with files, whose errors come in many types and layers, and say the innermost of them."""
    try:
        return action()
    except CheckpointError:
        raise
    except (Exception, CheckpointException) as error:
        cause = _innermost(error)
        if isinstance(cause, CheckpointError):
            raise cause from error
        raise CheckpointError(f"{what} ({catalog.said(cause)}): {remedy}.") from error


def _innermost(error: BaseException) -> BaseException:
    """The operating system's error that began it, if one did: torch raises others on top of it."""
    if isinstance(error, CheckpointException):
        error = next(iter(error.failures.values()))[0]
    inner: BaseException | None = error
    while inner is not None and not isinstance(inner, OSError | CheckpointError):
        inner = inner.__cause__ or inner.__context__
    return inner or error

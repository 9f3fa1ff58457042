"""The training state as one string of bytes, cut into pieces, and the description that goes with it.

The payload is the manifest's tensors, each in row-major order, with nothing in between; in which order, a `Layout` says.
The description is the manifest and the small state as JSON. Peers that send state, snapshots and checkpoints share this
form. This file must never communicate, and never decides who copies what.
"""

from __future__ import annotations

import itertools
import json
import struct
from bisect import bisect_right
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from elastic.encoding import flat_bytes
from elastic.errors import ConfigError, TransferError
from elastic.sharding import Cut
from elastic.snapshots import share_of
from elastic.state import Entry

DESCRIPTION_SIZE_BYTES_MAX = 128 * 2**20
_LENGTH = struct.Struct("<Q")


@dataclass(frozen=True, slots=True)
class Section:
    """A part of the state that some workers hold, and others do not.

    Attributes:
        number: in the order of the state. members: the indices of their slices, of which each has its share of the part.
    """

    number: int
    members: tuple[int, ...]


def manifest_text(entries: Sequence[Entry], section: Section | None = None) -> bytes:
    """The manifest as JSON: equal for equal manifests.

    Args:
        section: what it describes; None for the whole state, of which every worker of the world has its share.
    """
    manifest: Any = [entry.to_json() for entry in entries]
    if section is not None:
        manifest = {"section": section.number, "members": section.members, "entries": manifest}
    return json.dumps(manifest, separators=(",", ":")).encode("ascii")


def describe(manifest: bytes, small: str) -> bytes:
    """The description of a state, from its manifest's text and `TrainingState.small()`.

    Raises:
        ConfigError: it is too long.
    """
    description = _LENGTH.pack(len(manifest)) + manifest + small.encode("ascii")
    if len(description) > DESCRIPTION_SIZE_BYTES_MAX:
        raise ConfigError(
            f"The description of the state has {len(description)} bytes, more than {DESCRIPTION_SIZE_BYTES_MAX}: "
            "train with fewer, larger tensors."
        )
    return description


def manifest_of(description: memoryview) -> memoryview:
    """The manifest's text in a description.

    Raises:
        TransferError: there is none.
    """
    size_bytes = _LENGTH.unpack_from(description)[0] if len(description) >= _LENGTH.size else len(description)
    if size_bytes > len(description) - _LENGTH.size:
        raise TransferError("The description of the state is cut off: ask for it again.")
    return description[_LENGTH.size : _LENGTH.size + size_bytes]


@dataclass(frozen=True, slots=True)
class Description:
    """What a description says.

    Attributes:
        section: of what; None for the whole state.
        entries: the manifest. small: the small state.
    """

    section: Section | None
    entries: list[Entry]
    small: str


def read_description(description: memoryview) -> Description:
    """The inverse of `describe`.

    Raises:
        TransferError: `description` is not what `describe` can return.
    """
    manifest = manifest_of(description)
    try:
        fields = json.loads(bytes(manifest))
        small = str(description[_LENGTH.size + len(manifest) :], "ascii")
        section = None
        if isinstance(fields, dict):
            section = Section(int(fields["section"]), tuple(int(member) for member in fields["members"]))
            fields = fields["entries"]
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise TransferError(f"The description of the state is malformed ({error}): ask for it again.") from error
    if not isinstance(fields, list):
        raise TransferError("The description of the state holds no list of tensors: ask for it again.")
    return Description(section, [Entry.from_json(entry) for entry in fields], small)


@dataclass(frozen=True, slots=True)
class Segment:
    """Consecutive bytes of one tensor, as a part of a string of such.

    Attributes:
        tensor: its number in the manifest. begin, end: bytes of it, in row-major order.
    """

    tensor: int
    begin: int
    end: int


@dataclass(frozen=True, slots=True)
class Run:
    """Consecutive bytes of one tensor inside a piece of the payload."""

    tensor: int
    in_tensor: slice
    in_piece: slice


class Layout:
    """Where the bytes of each tensor lie in the payload.

    Args:
        segments: what the payload consists of, in order.

    Attributes:
        size_bytes: of all of it.
    """

    def __init__(self, segments: Iterable[Segment]) -> None:
        self._segments = [segment for segment in segments if segment.end > segment.begin]
        self._ends = list(itertools.accumulate(segment.end - segment.begin for segment in self._segments))
        self.size_bytes = self._ends[-1] if self._ends else 0

    def runs(self, piece: range) -> Iterator[Run]:
        """The tensors' bytes in `piece`, in order."""
        position = piece.start
        number = bisect_right(self._ends, position)
        while position < piece.stop:
            segment, end = self._segments[number], self._ends[number]
            stop = min(end, piece.stop)
            shift = segment.end - end
            in_tensor = slice(position + shift, stop + shift)
            yield Run(segment.tensor, in_tensor, slice(position - piece.start, stop - piece.start))
            position, number = stop, number + 1


class SnapshotLayout(Layout):
    """The payload of a section of a snapshot, of which each of `count` workers has copied its share.

    Behind each other, by worker: its equal share of what all hold, and its part of each tensor that is cut. Where none is
    cut, these are simply the tensors in the manifest's order.
    """

    def __init__(self, entries: Sequence[Entry], count: int) -> None:
        segments = [
            Segment(number, 0, entry.size_bytes) for number, entry in enumerate(entries) if entry.sharding is None
        ]
        cut = [number for number, entry in enumerate(entries) if entry.sharding is not None]
        alike = Layout(segments)
        self._shares = [share_of(alike.size_bytes, index, count) for index in range(count)]
        if cut:
            shares: list[range] = []
            segments = []
            for index, share in enumerate(self._shares):
                own = [Segment(run.tensor, run.in_tensor.start, run.in_tensor.stop) for run in alike.runs(share)]
                extents = [(number, entries[number].extent(Cut(index, count))) for number in cut]
                own += [Segment(number, extent.start, extent.stop) for number, extent in extents]
                begin = shares[-1].stop if shares else 0
                shares.append(range(begin, begin + sum(segment.end - segment.begin for segment in own)))
                segments += own
            self._shares = shares
        super().__init__(segments)

    def share(self, index: int) -> range:
        """The bytes of the payload that a worker copies."""
        return self._shares[index]


def clipped(run: Run, extent: range) -> Iterator[tuple[Run, bool]]:
    """Cut a run where a tensor that has only these bytes of the whole begins and ends.

    Yields runs in order, and whether they lie in that tensor; if so, `in_tensor` counts from its first byte.
    """
    start, stop = run.in_tensor.start, run.in_tensor.stop
    first = min(max(extent.start, start), stop)
    last = max(min(extent.stop, stop), first)
    shift = run.in_piece.start - start
    for begin, end, is_here in ((start, first, False), (first, last, True), (last, stop, False)):
        if end > begin:
            at = extent.start if is_here else 0
            yield Run(run.tensor, slice(begin - at, end - at), slice(begin + shift, end + shift)), is_here


def cut_up(span: range, size_bytes: int) -> list[range]:
    """Cut bytes into pieces of a size, the last one perhaps shorter."""
    cuts = [*range(span.start, span.stop, size_bytes), span.stop]
    return [range(start, stop) for start, stop in itertools.pairwise(cuts)]


class Packer:
    """Copies tensors into pieces of the payload.

    Args:
        extents: which bytes of each whole tensor `tensors` has; None for all of all.
    """

    def __init__(self, layout: Layout, tensors: Sequence[Tensor], extents: Sequence[range] | None = None) -> None:
        self.layout = layout
        self._tensors = tensors
        self._extents = extents
        self._last: tuple[int, Tensor] = (-1, torch.empty(0, dtype=torch.uint8))

    def pack(self, piece: range, staging: Tensor) -> None:
        """Write the bytes of `piece` to the front of `staging` (uint8, one dimension)."""
        for run in self.layout.runs(piece):
            begin = 0 if self._extents is None else self._extents[run.tensor].start
            source = self._flat(run.tensor)[run.in_tensor.start - begin : run.in_tensor.stop - begin]
            staging[run.in_piece].copy_(source)

    def _flat(self, index: int) -> Tensor:
        """The bytes of a tensor; kept, since they may fill many pieces and be a copy."""
        if self._last[0] != index:
            self._last = (index, flat_bytes(self._tensors[index]))
        return self._last[1]


class Unpacker:
    """Copies pieces of the payload into tensors, each byte once; those that are not contiguous are gathered first.

    Args:
        extents: which bytes of each whole tensor `tensors` has, the others being passed over; None for all of all.
    """

    def __init__(self, layout: Layout, tensors: Sequence[Tensor], extents: Sequence[range] | None = None) -> None:
        self.layout = layout
        self._tensors = tensors
        self._extents = extents
        self._gathered: dict[int, tuple[Tensor, int]] = {}

    def unpack(self, piece: range, staging: Tensor) -> None:
        """Write the bytes of `piece`, which are at the front of `staging`, to where they belong."""
        for whole in self.layout.runs(piece):
            parts = [(whole, True)] if self._extents is None else clipped(whole, self._extents[whole.tensor])
            for run, is_here in parts:
                if is_here:
                    self._write(run, staging[run.in_piece])

    def _write(self, run: Run, source: Tensor) -> None:
        tensor = self._tensors[run.tensor]
        if tensor.is_contiguous():
            flat_bytes(tensor)[run.in_tensor].copy_(source)
        else:
            self._gather(run, tensor, source)

    def _gather(self, run: Run, tensor: Tensor, source: Tensor) -> None:
        if run.tensor not in self._gathered:
            whole = torch.empty(tensor.shape, dtype=tensor.dtype, device=tensor.device)
            self._gathered[run.tensor] = (whole, 0)
        whole, done_bytes = self._gathered[run.tensor]
        flat = flat_bytes(whole)
        flat[run.in_tensor].copy_(source)
        done_bytes += len(source)
        self._gathered[run.tensor] = (whole, done_bytes)
        if done_bytes == len(flat):
            tensor.copy_(whole)
            del self._gathered[run.tensor]

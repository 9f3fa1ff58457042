"""The training state as one string of bytes, cut into pieces, and the description that goes with it.

The payload is the manifest's tensors in its order, each in row-major order, with nothing in between. The description
is the manifest and the small state as JSON. Peers that send state, snapshots and checkpoints share this form. This
file must never communicate, and never decides who copies what.
"""

from __future__ import annotations

import itertools
import json
import struct
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from elastic.encoding import flat_bytes
from elastic.errors import ConfigError, TransferError
from elastic.state import Entry

DESCRIPTION_SIZE_BYTES_MAX = 128 * 2**20
_LENGTH = struct.Struct("<Q")


def manifest_text(entries: Sequence[Entry]) -> bytes:
    """The manifest as JSON: equal for equal manifests."""
    return json.dumps([entry.to_json() for entry in entries], separators=(",", ":")).encode("ascii")


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


def read_description(description: memoryview) -> tuple[list[Entry], str]:
    """The inverse of `describe`: manifest and small state.

    Raises:
        TransferError: `description` is not what `describe` can return.
    """
    manifest = manifest_of(description)
    try:
        fields = json.loads(bytes(manifest))
        small = str(description[_LENGTH.size + len(manifest) :], "ascii")
    except (ValueError, RecursionError) as error:
        raise TransferError(f"The description of the state is malformed ({error}): ask for it again.") from error
    if not isinstance(fields, list):
        raise TransferError("The description of the state holds no list of tensors: ask for it again.")
    return [Entry.from_json(entry) for entry in fields], small


@dataclass(frozen=True, slots=True)
class Run:
    """Consecutive bytes of one tensor inside a piece of the payload."""

    tensor: int
    in_tensor: slice
    in_piece: slice


class Layout:
    """Where each tensor lies in the payload.

    Attributes:
        size_bytes: of all of it.
    """

    def __init__(self, entries: Sequence[Entry]) -> None:
        self._sizes = [entry.size_bytes for entry in entries]
        self._ends = list(itertools.accumulate(self._sizes))
        self.size_bytes = self._ends[-1] if self._ends else 0

    def runs(self, piece: range) -> Iterator[Run]:
        """The tensors' bytes in `piece`, in order."""
        position = piece.start
        tensor = bisect_right(self._ends, position)
        while position < piece.stop:
            start = self._ends[tensor] - self._sizes[tensor]
            stop = min(self._ends[tensor], piece.stop)
            if stop > position:
                yield Run(
                    tensor,
                    slice(position - start, stop - start),
                    slice(position - piece.start, stop - piece.start),
                )
            position = max(position, stop)
            tensor += 1


class Packer:
    """Copies tensors into pieces of the payload."""

    def __init__(self, layout: Layout, tensors: Sequence[Tensor]) -> None:
        self._layout = layout
        self._tensors = tensors
        self._last: tuple[int, Tensor] = (-1, torch.empty(0, dtype=torch.uint8))

    def pack(self, piece: range, staging: Tensor) -> None:
        """Write the bytes of `piece` to the front of `staging` (uint8, one dimension)."""
        for run in self._layout.runs(piece):
            staging[run.in_piece].copy_(self._flat(run.tensor)[run.in_tensor])

    def _flat(self, index: int) -> Tensor:
        """The bytes of a tensor; kept, since they may fill many pieces and be a copy."""
        if self._last[0] != index:
            self._last = (index, flat_bytes(self._tensors[index]))
        return self._last[1]


class Unpacker:
    """Copies pieces of the payload into tensors, each byte once; those that are not contiguous are gathered first."""

    def __init__(self, layout: Layout, tensors: Sequence[Tensor]) -> None:
        self._layout = layout
        self._tensors = tensors
        self._gathered: dict[int, tuple[Tensor, int]] = {}

    def unpack(self, piece: range, staging: Tensor) -> None:
        """Write the bytes of `piece`, which are at the front of `staging`, to where they belong."""
        for run in self._layout.runs(piece):
            tensor, source = self._tensors[run.tensor], staging[run.in_piece]
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

"""What a snapshot is: the training state after one committed step, in slices that lie in the memory of the nodes' agents.

The state is one string of bytes (`elastic.transfer`): the manifest's tensors in its order. Of replicated state each of the
`count` workers of a world copies the share with its own rank as `index`. A slice as it is stored is its payload and behind
it, at `description_at`, the description: the manifest and the small state as JSON, the same in every slice of a snapshot.
Nothing is ever pickled. This file holds values only, and knows neither memory nor messages.
"""

from __future__ import annotations

from dataclasses import dataclass

from elastic.domain import NO_STEP

ALIGNMENT_BYTES = 64
NO_OPINION = 1 << 62
"""A step above every other: a worker that has captured nothing does not hold back what is stable."""


@dataclass(frozen=True, slots=True, order=True)
class SnapshotId:
    """Which snapshot: two attempts at the same step are never mixed.

    Attributes:
        step: the last step whose effects it contains.
        generation: the world whose workers captured it.
    """

    step: int = 0
    generation: int = 0


@dataclass(frozen=True, slots=True)
class Slice:
    """One worker's part of a snapshot.

    Attributes:
        snapshot: of which it is a part.
        index, count: which part, of how many.
        begin, end: its bytes of the whole state.
        total_bytes: of the whole state.
        description_bytes: length of the description.
        payload_crc, description_crc: CRC-32 (zlib's) of both; 0 where not known yet.
    """

    snapshot: SnapshotId
    index: int
    count: int
    begin: int
    end: int
    total_bytes: int
    description_bytes: int
    payload_crc: int = 0
    description_crc: int = 0

    @property
    def description_at(self) -> int:
        """Where the description begins in the stored slice, in bytes; the payload begins at 0."""
        return aligned(self.end - self.begin)

    @property
    def stored_bytes(self) -> int:
        """Length of the stored slice."""
        return self.description_at + self.description_bytes


@dataclass(frozen=True, slots=True)
class Ballot:
    """What a worker's vote on a step, or the verdict on all of them, says of snapshots.

    Attributes:
        protected: the newest step whose snapshot is safe, as far as this worker or everybody goes; `NO_OPINION` for none.
        captures: whether this worker can and wants to capture the step, or all do.
        missed: whether the last one that all had agreed to capture is not here, or not everywhere.
        stable: the newest step that is known to be safe everywhere; NO_STEP for none. Not everybody sees every verdict.
    """

    protected: int = NO_OPINION
    captures: bool = False
    missed: bool = False
    stable: int = NO_STEP


def is_spent(snapshot: SnapshotId, generation: int, stable: int) -> bool:
    """Whether no restore needs the snapshot any more.

    Args:
        generation: of the world that trains now. stable: the newest step that is protected everywhere.

    Older than the stable one; or of a world that is over, which nobody will protect any more.
    """
    return snapshot.step < stable or (snapshot.generation != generation and snapshot.step != stable)


def aligned(size_bytes: int) -> int:
    """The least multiple of the alignment that holds so many bytes."""
    return -(-size_bytes // ALIGNMENT_BYTES) * ALIGNMENT_BYTES


def share_of(total_bytes: int, index: int, count: int) -> range:
    """The bytes of replicated state that the worker `index` of `count` copies."""
    return range(total_bytes * index // count, total_bytes * (index + 1) // count)


def numbers_of(piece: Slice) -> tuple[int, ...]:
    """A slice as ten numbers, for pages and messages."""
    return (
        *(piece.snapshot.step, piece.snapshot.generation),
        *(piece.index, piece.count, piece.begin, piece.end, piece.total_bytes),
        *(piece.description_bytes, piece.payload_crc, piece.description_crc),
    )


def slice_of(numbers: object) -> Slice:
    """The inverse of `numbers_of`.

    Raises:
        ValueError: these are not the numbers of any slice.
    """
    if not isinstance(numbers, list) or len(numbers) != 10 or any(type(n) is not int or n < 0 for n in numbers):
        raise ValueError(f"{numbers!r} does not describe a slice")
    step, generation, *rest = numbers
    piece = Slice(SnapshotId(step, generation), *rest)
    if not (piece.index < piece.count and piece.begin <= piece.end <= piece.total_bytes):
        raise ValueError(f"{piece} cannot be")
    return piece

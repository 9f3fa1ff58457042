"""The table of a node's shard: which slices lie in it, and where. Values and their JSON, checked when it is read.

A node's shard of a snapshot is the stored slices of its workers in order of their indices, each at the next multiple of
the alignment. Its table goes to every node of the protection group, so that a lost node's shard can be cut again. This
file must never see the bytes themselves.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import asdict, fields
from typing import Any

from elastic.errors import ProtocolError
from elastic.snapshots import Slice, SnapshotId, aligned

Table = tuple[Slice, ...]
"""The slices of one node of one snapshot, in order of their indices."""

SIZE_BYTES_MAX = 1 << 48
"""Of the whole state: far more than any machine has, and far from where sums overflow."""


def make_table(slices: Iterable[Slice]) -> Table:
    """Put a node's slices in order."""
    return tuple(sorted(slices, key=lambda part: part.index))


def shard_bytes(table: Table) -> int:
    """Length of the shard."""
    return sum(aligned(part.stored_bytes) for part in table)


def placed(table: Table) -> Iterator[tuple[int, Slice]]:
    """Each slice with where it begins in the shard, in bytes."""
    offset = 0
    for part in table:
        yield offset, part
        offset += aligned(part.stored_bytes)


def slice_to_json(part: Slice) -> dict[str, Any]:
    """A slice as an object of JSON, its snapshot as an object inside."""
    return asdict(part)


def slice_from_json(value: Any) -> Slice:
    """The inverse of `slice_to_json`.

    Raises:
        ProtocolError: it is no slice, or one that cannot be.
    """
    try:
        part = Slice(**{**value, "snapshot": SnapshotId(**value["snapshot"])})
    except (TypeError, KeyError) as error:
        raise ProtocolError(f"What should be a slice is none ({error}): the sender must be replaced.") from error
    counts = [getattr(part, field.name) for field in fields(part) if field.name != "snapshot"]
    counts += [part.snapshot.step, part.snapshot.generation]
    if not all(type(count) is int and 0 <= count <= SIZE_BYTES_MAX for count in counts):
        raise ProtocolError("A slice has a field that is no sensible number: the sender must be replaced.")
    if not (part.index < part.count and part.begin <= part.end <= part.total_bytes):
        raise ProtocolError(
            f"Slice {part.index} of {part.count} lies outside its own state: the sender must be replaced."
        )
    return part


def table_to_json(table: Table) -> list[dict[str, Any]]:
    """A table as a list of JSON."""
    return [slice_to_json(part) for part in table]


def table_from_json(value: Any, snapshot: SnapshotId) -> Table:
    """The inverse of `table_to_json`.

    Raises:
        ProtocolError: it is no table of this snapshot.
    """
    if not isinstance(value, list):
        raise ProtocolError("What should be a table of slices is none: the sender must be replaced.")
    table = tuple(slice_from_json(entry) for entry in value)
    indices = [part.index for part in table]
    if indices != sorted(set(indices)) or any(part.snapshot != snapshot for part in table):
        raise ProtocolError(
            f"The table of a node is not one of the snapshot of step {snapshot.step}, generation {snapshot.generation}: "
            "the sender must be replaced."
        )
    return table

"""Which checkpoints a place holds: the newest whole one, why others were passed over, and removing what is outdated.

It reads markers and lengths of files, never a tensor, and imports no torch, so that asking costs nothing.
"""

from __future__ import annotations

import zlib
from dataclasses import dataclass, field

from agent import rotation
from agent.places import Place, open_place
from agent.rotation import MARKER, METADATA, Marker
from elastic.errors import CheckpointError


@dataclass(frozen=True, slots=True)
class Found:
    """A checkpoint that is whole by its marker. `path` is its directory or address."""

    path: str
    marker: Marker

    @property
    def step(self) -> int:
        """The last step that it contains."""
        return self.marker.snapshot.snapshot.step


@dataclass(frozen=True, slots=True)
class Newest:
    """The answer to the question for the newest checkpoint.

    Attributes:
        found: None if there is none.
        passed_over: a sentence for each newer thing that is no whole checkpoint.
    """

    found: Found | None
    passed_over: tuple[str, ...]


@dataclass(slots=True)
class Catalog:
    """What lies in a place, by name. What is damaged is left to people: it may be all there is."""

    whole: dict[str, Marker] = field(default_factory=dict)
    half_written: dict[str, str] = field(default_factory=dict)
    damaged: dict[str, str] = field(default_factory=dict)


def look(place: Place, job: str) -> Catalog:
    """Read all markers.

    Raises:
        CheckpointError: there are another job's checkpoints.
    """
    catalog = Catalog()
    for name in rotation.newest_first(place.names()):
        if rotation.is_part(name):
            catalog.half_written[name] = f"{place.path(name)} is half-written: its writer is at work or has died."
        elif (text := place.read(place.path(name), MARKER)) is None:
            catalog.half_written[name] = f"{place.path(name)} is half-written: it has no {MARKER}."
        else:
            try:
                catalog.whole[name] = Marker.from_json(text)
            except ValueError as error:
                catalog.damaged[name] = f"{place.path(name)} is damaged: {error}."
    rotation.refuse_other_jobs(catalog.whole, job, place.target)
    return catalog


def newest_checkpoint(target: str, job: str, before: int | None = None) -> Newest:
    """Return the newest whole checkpoint of a job.

    Args:
        target: directory, or an address of fsspec. job: whose checkpoints must lie there.
        before: a step; it and what is newer is not looked at, such as when it turned out to be damaged.

    Raises:
        CheckpointError: the target cannot be read, or holds another job's checkpoints.
    """
    try:
        return _newest(open_place(target), job, before)
    except CheckpointError:
        raise
    except Exception as error:  # of whichever file system it is
        raise CheckpointError(f"The checkpoints at {target} cannot be looked at ({said(error)}): mend that.") from error


def remove_outdated(place: Place, job: str, step: int, keep: int) -> None:
    """Remove what `rotation.outdated` names."""
    catalog = look(place, job)
    for name in rotation.outdated(catalog.whole, catalog.half_written, step, keep):
        place.remove(name)


def damage(place: Place, name: str, marker: Marker) -> str:
    """What can be seen to be wrong with a checkpoint without reading its tensors, in words; "" for nothing."""
    there = place.sizes(place.path(name))
    for file, size_bytes in marker.files.items():
        if there.get(file) != size_bytes:
            has = f"has {there[file]} bytes" if file in there else "is missing"
            return f"its {file} {has}, and {size_bytes} bytes were written"
    if zlib.crc32(place.read(place.path(name), METADATA) or b"") != marker.metadata_crc:
        return f"its {METADATA} is not what was written (its CRC differs)"
    return ""


def said(error: BaseException) -> str:
    """What an error says, or else what it is."""
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    return str(error).strip() or type(error).__name__


def _newest(place: Place, job: str, before: int | None) -> Newest:
    catalog = look(place, job)
    passed_over: list[str] = []
    for name in rotation.newest_first([*catalog.whole, *catalog.half_written, *catalog.damaged]):
        if before is not None and (rotation.step_of(name) or 0) >= before:
            continue
        marker = catalog.whole.get(name)
        if marker is None:
            passed_over.append((catalog.half_written | catalog.damaged)[name])
        elif fault := damage(place, name, marker):
            passed_over.append(f"{place.path(name)} is damaged: {fault}.")
        else:
            return Newest(Found(place.path(name), marker), tuple(passed_over))
    return Newest(None, tuple(passed_over))

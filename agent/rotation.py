"""Which checkpoints there are, which of them are whole, and which may go: names and markers, and no file is touched here.

    TARGET/step-00000123/                a checkpoint
    TARGET/step-00000123/elastic.json    its marker, written last: without it the checkpoint is half-written
    TARGET/.step-00000123.part-PID/      one that a process is writing, or that it left behind when it died

This file is pure: it must never read a directory or a clock. It never lets go of the newest whole checkpoint, nor of
anything newer than the one that has just been written.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from elastic.errors import CheckpointError
from elastic.snapshots import Slice, SnapshotId

MARKER = "elastic.json"
METADATA = ".metadata"
"""The file in which torch.distributed.checkpoint keeps what lies where."""
FORMAT = 1
_NAME = re.compile(r"(?P<whole>step-(?P<step>\d{8,}))|\.step-(?P<part_step>\d{8,})\.part-\d+")


@dataclass(frozen=True, slots=True)
class Marker:
    """What is written into a checkpoint when everything else of it has been.

    Attributes:
        job: whose it is.
        snapshot: what it holds, as the one slice that reading it gives.
        files: every other file of the checkpoint, and its length in bytes.
        metadata_crc: CRC-32 of `METADATA`, checked before anything is believed that it says.
        made_with: versions of elastic and torch, for people.
    """

    job: str
    snapshot: Slice
    files: Mapping[str, int]
    metadata_crc: int
    made_with: Mapping[str, str]

    def to_json(self) -> str:
        """As the text of the marker file."""
        fields = {
            "format": FORMAT,
            "job": self.job,
            "step": self.snapshot.snapshot.step,
            "generation": self.snapshot.snapshot.generation,
            "payload_bytes": self.snapshot.total_bytes,
            "payload_crc": self.snapshot.payload_crc,
            "description_bytes": self.snapshot.description_bytes,
            "description_crc": self.snapshot.description_crc,
            "files": dict(self.files),
            "metadata_crc": self.metadata_crc,
            "made_with": dict(self.made_with),
        }
        return json.dumps(fields, indent=1) + "\n"

    @classmethod
    def from_json(cls, text: str | bytes) -> Marker:
        """The inverse of `to_json`.

        Raises:
            ValueError: the text is no marker that this version can read; says why.
        """
        try:
            fields: Any = json.loads(text)
            if fields["format"] != FORMAT:
                raise ValueError(
                    f"its {MARKER} is of format {fields['format']}, and this version reads format {FORMAT}"
                )
            return cls(
                job=str(fields["job"]),
                snapshot=whole_slice(
                    SnapshotId(_size(fields["step"]), _size(fields["generation"])),
                    total_bytes=_size(fields["payload_bytes"]),
                    payload_crc=_size(fields["payload_crc"]),
                    description_bytes=_size(fields["description_bytes"]),
                    description_crc=_size(fields["description_crc"]),
                ),
                files={str(name): _size(size_bytes) for name, size_bytes in fields["files"].items()},
                metadata_crc=_size(fields["metadata_crc"]),
                made_with=dict(fields["made_with"]),
            )
        except (KeyError, TypeError, AttributeError, RecursionError, json.JSONDecodeError) as error:
            raise ValueError(f"its {MARKER} is malformed ({error})") from error


def whole_slice(
    snapshot: SnapshotId, *, total_bytes: int, payload_crc: int, description_bytes: int, description_crc: int
) -> Slice:
    """A snapshot as the one slice that holds all of it."""
    return Slice(snapshot, 0, 1, 0, total_bytes, total_bytes, description_bytes, payload_crc, description_crc)


def step_name(step: int) -> str:
    """The name of the checkpoint of a step."""
    return f"step-{step:08d}"


def part_name(name: str, pid: int) -> str:
    """The name under which the process `pid` writes the checkpoint `name`."""
    return f".{name}.part-{pid}"


def step_of(name: str) -> int | None:
    """The step of the name of a checkpoint, or of one that is being written; None for any other name."""
    match = _NAME.fullmatch(name)
    return int(match["step"] or match["part_step"]) if match else None


def is_part(name: str) -> bool:
    """Whether it is the name of a checkpoint that is being written."""
    match = _NAME.fullmatch(name)
    return match is not None and not match["whole"]


def newest_first(names: Iterable[str]) -> list[str]:
    """Those that name a checkpoint; of the same step the whole one first."""
    steps = [(step, not is_part(name), name) for name in names if (step := step_of(name)) is not None]
    return [name for _, _, name in sorted(steps, reverse=True)]


def refuse_other_jobs(markers: Mapping[str, Marker], job: str, target: str) -> None:
    """Raise CheckpointError if a checkpoint is another job's: it must neither be taken up here nor removed."""
    for name, marker in sorted(markers.items()):
        if marker.job != job:
            raise CheckpointError(
                f"{target} holds checkpoints of the job {marker.job!r} ({name}), and this is the job {job!r}: name another "
                f"directory for its checkpoints, or start it as --job {marker.job} to go on with that one."
            )


def outdated(whole: Iterable[str], half_written: Iterable[str], step: int, keep: int) -> list[str]:
    """What may be removed now that the checkpoint of a step is whole, newest first.

    The whole ones before the `keep` newest, counted from that step down. And what is half-written and not newer than
    it: a writer of that is dead, or so late that nobody waits for it.

    Args:
        whole, half_written: names. step: of the one that has just been written. keep: at least 1.
    """
    older = [name for name in newest_first(whole) if (step_of(name) or 0) <= step]
    late = [name for name in newest_first(half_written) if (step_of(name) or 0) <= step]
    return older[keep:] + late


def _size(value: object) -> int:
    if not isinstance(value, int) or value < 0:
        raise TypeError(f"{value!r} is no number of bytes or the like")
    return value

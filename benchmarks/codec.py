"""How fast the erasure code of snapshots is, beside a plain copy of the same bytes.

    python -m benchmarks.codec [--quick] [--json]

The code (4,2) over 256 MB of data, with the engine that a job takes here, on one thread. In each round a flat warm
copy of as many bytes, an encode (or a decode, of the two data shards that are lost, which is the most work) and another
flat copy follow each other; the round's ratio is that of the throughputs, 1 being as fast as the copy. Reported are the
median ratio and its 95 % interval (distribution-free). What is decoded is held against the data.

The table has the other codes and every engine that works here, in GB/s of data: medians, on less data where an engine
is slow.
"""

from __future__ import annotations

import argparse
import statistics
from pathlib import Path
from typing import Any

import torch
from rich.table import Table
from torch import Tensor

from benchmarks.paired import beside_copies, ratio, timed_s
from benchmarks.report import Reporter, command, main_of
from recovery.choosing import candidates
from recovery.codec import Codec
from recovery.engines import Engine, ReedsoloEngine
from recovery.galois import parity_matrix

CODE = (4, 2)
CODES = ((3, 1), (4, 2), (6, 2), (8, 3), (10, 4))
DATA_BYTES = 256 * 10**6
TABLE_BYTES = 64 * 10**6
SLOW_BYTES = 2 * 10**6


class Trial:
    """One code over random data, with shards that were lost and where they are decoded to."""

    def __init__(self, k: int, m: int, data_bytes: int, engine: Engine | None = None) -> None:
        self.codec = Codec(k, m, engine)
        self.size_bytes = data_bytes // k * k
        self._data = [torch.randint(256, (data_bytes // k,), dtype=torch.uint8) for _ in range(k)]
        self._parity = [torch.ones_like(self._data[0]) for _ in range(m)]  # not zeros, so that the pages are there
        self._decoded = {lost: torch.ones_like(self._data[0]) for lost in range(m)}

    def encode(self) -> float:
        """Write the parity; returns the seconds."""
        return timed_s(lambda: self.codec.encode(self._data, self._parity))

    def decode(self) -> float:
        """Decode the first m data shards from the others and the parity; returns the seconds."""
        left: dict[int, Tensor] = dict(enumerate([*self._data, *self._parity]))
        for lost in self._decoded:
            del left[lost]
        return timed_s(lambda: self.codec.decode(left, self._decoded))

    def is_right(self) -> bool:
        """Whether what was decoded is what was lost."""
        return all(torch.equal(self._data[lost], decoded) for lost, decoded in self._decoded.items())


def measure_ratios(rounds: int) -> tuple[dict[str, Any], bool]:
    """Return both ratios of the one code that has a target, and whether it decoded rightly."""
    trial = Trial(*CODE, DATA_BYTES)
    flat = torch.ones(trial.size_bytes, dtype=torch.uint8), torch.ones(trial.size_bytes, dtype=torch.uint8)
    beside_copies(trial.encode, flat, 1)
    found: dict[str, Any] = {"k": CODE[0], "m": CODE[1], "data_bytes": trial.size_bytes, "rounds": rounds}
    found["engine"] = trial.codec.engine.name
    everything_s: list[float] = []
    for name, deed in (("encode", trial.encode), ("decode", trial.decode)):
        deeds_s, copies_s = beside_copies(deed, flat, rounds)
        found[f"{name}_over_memcpy"], found[f"{name}_over_memcpy_ci"] = ratio(copies_s, deeds_s)
        found[f"{name}_gbps"] = round(trial.size_bytes / 1e9 / statistics.median(deeds_s), 2)
        everything_s += copies_s
    found["memcpy_gbps"] = round(trial.size_bytes / 1e9 / statistics.median(everything_s), 2)
    return found, trial.is_right()


def measure_engine(k: int, m: int, engine: Engine, rounds: int) -> tuple[dict[str, Any], bool]:
    """Return one row of the table, and whether the engine decoded rightly."""
    trial = Trial(k, m, SLOW_BYTES if isinstance(engine, ReedsoloEngine) else TABLE_BYTES, engine)
    row: dict[str, Any] = {"k": k, "m": m, "engine": engine.name, "data_bytes": trial.size_bytes}
    for name, deed in (("encode", trial.encode), ("decode", trial.decode)):
        deed()
        row[f"{name}_gbps"] = round(trial.size_bytes / 1e9 / statistics.median(deed() for _ in range(rounds)), 4)
    return row, trial.is_right()


def measure(arguments: argparse.Namespace, folder: Path, reporter: Reporter) -> tuple[dict[str, Any], bool]:
    """Measure the code that has a target, then the table; returns the report."""
    torch.set_num_threads(1)
    engines = [trial.engine for trial in candidates() if trial.engine is not None and not trial.obstacle]
    rounds = 8 if arguments.quick else 40
    reporter.say(f"{CODE} over {DATA_BYTES // 10**6} MB and flat copies in turns, {rounds} rounds each")
    report, is_sound = measure_ratios(rounds)
    report["codes"] = []
    for k, m in CODES:
        reporter.say(f"({k},{m})")
        for engine in engines:
            if engine.carries(parity_matrix(k, m)):
                row, is_right = measure_engine(k, m, engine, 3 if arguments.quick else 7)
                report["codes"].append(row)
                is_sound = is_sound and is_right
    report["decoded_is_right"] = is_sound
    return report, is_sound


def tabulate(report: dict[str, Any]) -> Table:
    """Return the report for people."""
    table = Table("code", "engine", "MB", "encode", "decode", title="GB/s of data, one thread")
    for row in report["codes"]:
        rates = (f"{row['encode_gbps']:.3g}", f"{row['decode_gbps']:.3g}")
        table.add_row(f"({row['k']},{row['m']})", row["engine"], f"{row['data_bytes'] / 1e6:.0f}", *rates)
    lines = [f"({report['k']},{report['m']}) over {report['data_bytes'] / 1e6:.0f} MB, {report['engine']}:"]
    for name in ("encode", "decode"):
        low, high = report[f"{name}_over_memcpy_ci"]
        lines.append(
            f"{name} {report[f'{name}_gbps']:.1f} GB/s, {report[f'{name}_over_memcpy']:.2f} of a copy's "
            f"{report['memcpy_gbps']:.1f} GB/s ({low:.2f} .. {high:.2f})"
        )
    table.caption = "\n".join(lines if report["decoded_is_right"] else [*lines, "DECODED WRONG BYTES"])
    return table


def main() -> int:
    return main_of(command(__doc__), measure, tabulate)


if __name__ == "__main__":
    raise SystemExit(main())

"""How fast a snapshot comes back from memory: by a worker from its own agent, and of a lost node from parity.

    python -m benchmarks.restore [--quick] [--json]

    local_gbps   a worker reads 1.2 GB of state (100 million parameters with AdamW) from its agent's memory into live
                 tensors, checksums and all; flat warm copies of as many bytes between the reads
    decode_gbps  a node that replaces a lost one decodes its shard, and that alone, from the keepers of the two nodes
                 that are left of a group (2,1), over TCP on loopback; bytes of the shard per second, for which
                 twice as many are read (`benchmarks.exchange` has other codes, and how fast they protect)

Medians. All processes share this machine's cores.
"""

from __future__ import annotations

import argparse
import asyncio
from pathlib import Path
from typing import Any

from rich.table import Table

from benchmarks.exchange import MIB, SHARD_MIB, measure_code
from benchmarks.one_worker import measure_restores, one_worker
from benchmarks.report import Reporter, command, main_of

CODE = (2, 1)


def measure(arguments: argparse.Namespace, folder: Path, reporter: Reporter) -> tuple[dict[str, Any], bool]:
    """Measure both; returns the report."""
    reporter.say("one worker: restores and flat copies in turns")
    with one_worker(folder) as worker:
        report = measure_restores(worker, 5 if arguments.quick else 20)
    reporter.say(f"{CODE}: keepers protect and decode shards of {SHARD_MIB} MiB")
    code = asyncio.run(measure_code(*CODE, SHARD_MIB * MIB, 3 if arguments.quick else 10))
    report |= {"k": CODE[0], "m": CODE[1], "shard_bytes": SHARD_MIB * MIB}
    report |= {name: code[name] for name in ("decode_gbps", "decode_gbps_best")}
    return report, True


def tabulate(report: dict[str, Any]) -> Table:
    """Return the report for people."""
    table = Table("", "GB/s", "best", title="back from memory")
    table.add_row("from the own agent", f"{report['local_gbps']:.2f}", f"{report['local_gbps_best']:.2f}")
    table.add_row("a lost node's shard, decoded", f"{report['decode_gbps']:.2f}", f"{report['decode_gbps_best']:.2f}")
    low, high = report["local_over_memcpy_ci"]
    table.caption = (
        f"{report['state_gb']} GB from the own agent take {report['local_over_memcpy']:.2f} times as long as a flat copy "
        f"({low:.2f} .. {high:.2f})"
    )
    return table


def main() -> int:
    return main_of(command(__doc__), measure, tabulate)


if __name__ == "__main__":
    raise SystemExit(main())

"""How long a snapshot in memory holds up training, beside a plain copy of the same bytes and what torch offers.

    python -m benchmarks.snapshot_blocked [--quick] [--json] [--layers N]

One worker with the GPT of the examples, made large (100 million parameters, with AdamW 1.2 GB of state), and a
memory service in a process of its own, as an agent's. In each round a flat warm copy of as many bytes, a capture
and another flat copy follow each other; the round's ratio is that of the capture to the mean of its two copies.
Reported are the median ratio and its 95 % interval (distribution-free), so that the drift of a busy machine cancels.
Restores over the live state are measured in the same way. Beside them: how long torch.save, dcp.save and
dcp.async_save (until it returns) block, to a local disk. All on as many threads as a worker has by default: one.
"""

from __future__ import annotations

import argparse
import asyncio
import multiprocessing as mp
import os
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from rich.table import Table

from agent.memory import MemoryService
from benchmarks.overhead import median_interval
from benchmarks.report import Reporter, command, main_of
from elastic.capture import Capturer, restore
from elastic.errors import Unreachable
from elastic.memory import SnapshotMemory
from elastic.snapshots import SnapshotId
from elastic.state import TrainingState
from examples.gpt import GPT

WORKER = "worker"
BUDGET_BYTES = 4 * 2**30
START_S = 60.0
OTHERS = ("torch.save", "dcp.save", "dcp.async_save")


def serve(path: Path, pid: int, over: Connection) -> None:
    """An agent's memory service, until the other end of `over` says something or is gone."""

    async def run() -> None:
        service = MemoryService(path, BUDGET_BYTES)
        await service.start()
        service.expect(WORKER, pid)
        over.send("ready")
        ended = asyncio.Event()
        asyncio.get_running_loop().add_reader(over.fileno(), ended.set)
        await ended.wait()
        await service.close()

    asyncio.run(run())


@contextmanager
def agent(folder: Path) -> Iterator[SnapshotMemory]:
    """A worker's link to a memory service in another process."""
    context = mp.get_context("spawn")
    ours, theirs = context.Pipe()
    path = folder / "memory.sock"
    process = context.Process(target=serve, args=(path, os.getpid(), theirs), daemon=True)
    process.start()
    theirs.close()
    try:
        if not ours.poll(START_S):
            raise Unreachable(f"the memory service did not start within {START_S:g} s: look at what it printed")
        ours.recv()
        memory = SnapshotMemory(path, WORKER)
        yield memory
        memory.close()
    finally:
        ours.close()
        process.join(START_S)
        process.kill()


def make_state(layers: int) -> TrainingState:
    """Return a model and its optimizer, with an optimizer state."""
    model = GPT(dim=768, layers=layers)
    optimizer = torch.optim.AdamW(model.parameters())
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    optimizer.zero_grad()
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 1000)
    return TrainingState({"model": model}, {"optimizer": optimizer}, {"scheduler": scheduler})


def timed_s(deed: Callable[[], object]) -> float:
    """Return how long it takes."""
    began_s = time.perf_counter()
    deed()
    return time.perf_counter() - began_s


def beside_copies(
    deed: Callable[[], float], flat: tuple[torch.Tensor, torch.Tensor], rounds: int
) -> tuple[list[float], list[float]]:
    """Return how long a deed took (what it returns), and the mean time of the flat copies before and after it."""
    source, target = flat
    deeds_s, copies_s = [], []
    for _ in range(rounds):
        before_s = timed_s(lambda: target.copy_(source))
        deeds_s.append(deed())
        copies_s.append((before_s + timed_s(lambda: target.copy_(source))) / 2)
    return deeds_s, copies_s


def ratio(deeds_s: list[float], copies_s: list[float]) -> tuple[float, list[float]]:
    """Return the median of the paired ratios, and its interval."""
    ratios = [deed_s / copy_s for deed_s, copy_s in zip(deeds_s, copies_s, strict=True)]
    low, high = median_interval(ratios)
    return round(statistics.median(ratios), 3), [round(low, 3), round(high, 3)]


def first_captures(capturer: Capturer) -> float:
    """Fill every buffer once; returns the longest that a step was held up, by captures that found no room too."""
    deadline_s = time.monotonic() + START_S
    longest_s, step = 0.0, 0
    while step < 2:
        capturer.has_room(1, step - 1)
        if capturer.capture(step, 1, 0, 1):
            step += 1
        elif time.monotonic() > deadline_s:
            raise Unreachable(f"the memory service made no room within {START_S:g} s: is there memory left?")
        else:
            time.sleep(0.02)  # a step
        longest_s = max(longest_s, capturer.cost_s)
    return longest_s


def saves(state: TrainingState, folder: Path, rounds: int) -> dict[str, list[float]]:
    """Return how long each of torch's ways blocks."""
    model, optimizer = state.models["model"], state.optimizers["optimizer"]
    times: dict[str, list[float]] = {name: [] for name in OTHERS}
    for number in range(rounds):
        values = {"model": model.state_dict(), "optimizer": optimizer.state_dict()}
        times["torch.save"].append(timed_s(lambda v=values: torch.save(v, folder / "state.pt")))  # type: ignore[misc]
        times["dcp.save"].append(timed_s(lambda v=values: dcp.save(v, checkpoint_id=folder / "dcp")))  # type: ignore[misc]
        began_s = time.perf_counter()
        written = dcp.async_save(values, checkpoint_id=folder / f"async-{number % 2}")
        times["dcp.async_save"].append(time.perf_counter() - began_s)
        written.result(START_S)
    return times


def measure_worker(layers: int, rounds: int, folder: Path, reporter: Reporter) -> dict[str, Any]:
    """Measure one worker; returns the report."""
    torch.set_num_threads(1)
    state = make_state(layers)
    tensors = state.tensors()
    size_bytes = sum(tensor.numel() * tensor.element_size() for tensor in tensors)
    reporter.say(f"{len(tensors)} tensors, {size_bytes / 1e9:.2f} GB; {rounds} rounds")
    flat = torch.ones(size_bytes, dtype=torch.uint8), torch.ones(size_bytes, dtype=torch.uint8)
    with agent(folder) as memory:
        capturer = Capturer(state, memory, buffers=2)
        first_s = first_captures(capturer)

        def capture_next() -> float:
            step = capturer.captured_step + 1
            if not capturer.has_room(1, step - 1) or not capturer.capture(step, 1, 0, 1):
                raise Unreachable("the memory service gave no room for a snapshot, which it had before")
            return capturer.cost_s

        reporter.say("captures and flat copies in turns")
        captures_s, copies_s = beside_copies(capture_next, flat, rounds)
        reporter.say("restores and flat copies in turns")
        newest = SnapshotId(capturer.captured_step, 1)
        restores_s, more_copies_s = beside_copies(
            lambda: timed_s(lambda: restore(state, memory, newest)), flat, max(rounds // 2, 4)
        )
        capturer.close()
    del flat
    reporter.say(", ".join(OTHERS))
    others_s = saves(state, folder, max(rounds // 8, 1))
    report: dict[str, Any] = {"tensors": len(tensors), "size_gb": round(size_bytes / 1e9, 3), "rounds": rounds}
    report["memcpy_ms"] = round(1e3 * statistics.median([*copies_s, *more_copies_s]), 1)
    report["capture_ms"] = round(1e3 * statistics.median(captures_s), 1)
    report["capture_over_memcpy"], report["capture_over_memcpy_ci"] = ratio(captures_s, copies_s)
    report["first_capture_ms"] = round(1e3 * first_s, 1)
    for name in OTHERS:
        report[f"{name.replace('.', '_')}_ms"] = round(1e3 * statistics.median(others_s[name]), 1)
    report["restore_ms"] = round(1e3 * statistics.median(restores_s), 1)
    report["restore_over_memcpy"], report["restore_over_memcpy_ci"] = ratio(restores_s, more_copies_s)
    report["restore_gb_per_s"] = round(size_bytes / 1e9 / statistics.median(restores_s), 2)
    report["restore_gb_per_s_max"] = round(size_bytes / 1e9 / min(restores_s), 2)
    return report


def measure(arguments: argparse.Namespace, folder: Path, reporter: Reporter) -> tuple[dict[str, Any], bool]:
    """Return the report of one worker."""
    return measure_worker(arguments.layers, 8 if arguments.quick else 40, folder, reporter), True


def tabulate(report: dict[str, Any]) -> Table:
    """Return the report for people."""
    title = f"a snapshot of {report['size_gb']} GB in {report['tensors']} tensors, {report['rounds']} rounds"
    table = Table("", "blocks, ms", "over memcpy", "95 %", title=title)
    memcpy_ms = report["memcpy_ms"]

    def row(label: str, name: str) -> None:
        blocked_ms = report[f"{name}_ms"]
        low, high = report.get(f"{name}_over_memcpy_ci", ("", ""))
        over = report.get(f"{name}_over_memcpy", blocked_ms / memcpy_ms)
        table.add_row(label, f"{blocked_ms:.1f}", f"{over:.2f}", f"{low:.2f} .. {high:.2f}" if low else "")

    row("warm memcpy", "memcpy")
    row("capture", "capture")
    row("capture, first of a buffer", "first_capture")
    for name in OTHERS:
        row(name, name.replace(".", "_"))
    row(f"restore ({report['restore_gb_per_s']:.1f} GB/s)", "restore")
    return table


def main() -> int:
    parser = command(__doc__)
    parser.add_argument("--layers", type=int, default=14, help="of 7.1 million parameters each [14]")
    return main_of(parser, measure, tabulate)


if __name__ == "__main__":
    raise SystemExit(main())

"""The training script of the benchmarks: the GPT of the examples, and a log of every step by every worker.

Each worker appends to a file of its own, one JSON object per line:

    {"event": "prepare", "clock_s", "pid", "startup_s"}
    {"event": "commit", "clock_s", "step", "generation", "world_size", "rank"}
    {"event": "digest", "step", "digest"}

`startup_s` goes from the process's start until it calls prepare(); a digest is of the parameters and the
optimizer's state. Clocks are CLOCK_MONOTONIC, so that lines of different processes can be compared. A job
that must go on for as long as something is measured gets `--until FILE`: it ends after the step whose number
is written there, which must lie ahead. One that takes turns with others gets `--pauses FILE`: it stands still after
the step whose number is written there, between `optimizer.step()` and the end of the step, until a greater one is.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import time
from pathlib import Path
from typing import IO, Any

import torch
from torch.utils.data import DataLoader

import elastic
from examples.gpt import GPT, Windows

CLOCK_TICKS_PER_S = os.sysconf("SC_CLK_TCK")
PAUSE_S_MAX = 600.0
POLL_S = 0.02


def process_age_s() -> float:
    """Return for how long this process has run."""
    text = Path("/proc/self/stat").read_text()
    ticks = int(text[text.rindex(")") + 2 :].split()[19])
    return time.clock_gettime(time.CLOCK_BOOTTIME) - ticks / CLOCK_TICKS_PER_S


def digest_of(model: torch.nn.Module, optimizer: torch.optim.Optimizer) -> str:
    """Return a hash of all bits that training has changed."""
    whole = hashlib.sha256()
    for parameter in model.parameters():
        state = optimizer.state[parameter]
        for tensor in (parameter, *(state[name] for name in sorted(state))):
            whole.update(tensor.detach().contiguous().view(-1).view(torch.uint8).numpy().tobytes())
    return whole.hexdigest()[:32]


def parse_arguments() -> argparse.Namespace:
    """Return the flags."""
    parser = argparse.ArgumentParser(description="Train and log every step.")
    parser.add_argument("--dim", type=int, default=256)
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--context", type=int, default=64)
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--slots", type=int, default=12)
    parser.add_argument("--virtual-replicas", type=int, default=4)
    parser.add_argument("--reduction", default="ordered")
    parser.add_argument("--log", type=Path, required=True, help="folder for the workers' logs")
    parser.add_argument("--until", type=Path, help="file that will hold the last step's number")
    parser.add_argument("--pauses", type=Path, help="file that holds the step to stand still after")
    parser.add_argument("--digest-at", type=int, nargs="*", default=[], help="steps to log a digest after; "
                        "without --until the greatest is the last step")  # fmt: skip
    parser.add_argument("--pause", type=float, default=0.0, help="seconds to sleep in each step")
    return parser.parse_args()


def stand_still(session: elastic.Session, pauses: Path) -> None:
    """Wait until there is a step to go on to."""
    deadline_s = time.monotonic() + PAUSE_S_MAX
    while session.step >= int(pauses.read_text()):
        if time.monotonic() > deadline_s:
            raise TimeoutError(f"{pauses} said for {PAUSE_S_MAX:.0f} s to stand still after step {session.step}")
        session.heartbeat()
        time.sleep(POLL_S)


class Log:
    """One worker's file."""

    def __init__(self, folder: Path, pid: int) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self._file: IO[str] = (folder / f"{pid}-{time.monotonic_ns()}.jsonl").open("a", buffering=1)

    def write(self, event: str, **values: Any) -> None:
        """Append one line."""
        self._file.write(json.dumps({"event": event, **values}) + "\n")


def main() -> None:
    arguments = parse_arguments()
    session = elastic.join()
    log = Log(arguments.log, os.getpid())
    model = GPT(arguments.dim, arguments.layers, arguments.context)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-4, weight_decay=0.1)
    loader = DataLoader(Windows(arguments.context), batch_size=arguments.batch, shuffle=True)
    log.write("prepare", clock_s=time.monotonic(), pid=os.getpid(), startup_s=process_age_s())
    model, optimizer, loader = session.prepare(
        model, optimizer, loader,
        slots=arguments.slots, virtual_replicas=arguments.virtual_replicas, reduction=arguments.reduction,
    )  # fmt: skip
    last_step = max(arguments.digest_at, default=0) if arguments.until is None else 0
    for _ in session.epochs(10**9):
        for inputs, targets in loader:
            loss = model(inputs, targets)
            session.log(loss=loss)
            optimizer.zero_grad()
            loss.backward()
            session.clip_grad_norm_(1.0)
            optimizer.step()
            if not session.committed:
                continue
            log.write("commit", clock_s=time.monotonic(), step=session.step, generation=session.generation,
                      world_size=session.world_size, rank=session.rank)  # fmt: skip
            if arguments.pause:
                time.sleep(arguments.pause)
            if arguments.pauses is not None:
                stand_still(session, arguments.pauses)
            if arguments.until is not None and not last_step and arguments.until.exists():
                last_step = int(arguments.until.read_text())
            if session.step in arguments.digest_at or session.step == last_step:
                log.write("digest", step=session.step, digest=digest_of(model, optimizer))
            if last_step and session.step >= last_step:
                break


if __name__ == "__main__":
    main()

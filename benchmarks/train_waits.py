"""The training script of `benchmarks.reshard` and `benchmarks.slow_stage`: blocks that take a known time without a processor.

Between a first and a last linear layer lie blocks that compute something small and then wait until their time is over,
forward and backward each: so four workers take the times of four machines, also on two cores. Waiting changes no bit. With
`--uneven F` the blocks' times go evenly from 1-F to 1+F times those given, in an order that repeats after three blocks. With
`--running` a block's time passes only while its process runs: one that is stopped now and then falls behind, as if it computed.

Each worker appends to a file of its own, one JSON object per line:

    {"event": "commit", "clock_s", "step", "generation", "world_size", "rank"}

Clocks are CLOCK_MONOTONIC, so that lines of different processes can be compared. The job ends after `--steps`, or after the
step whose number is written in the file of `--until`, which must lie ahead.
"""

from __future__ import annotations

import argparse
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import elastic
from benchmarks.train_gpt import Log

FEATURES, SAMPLES, BATCH_SIZE = 16, 4096, 4
UNEVEN_PERIOD = 3
SLICE_S, SLICE_S_MAX = 0.001, 0.002
"""Of a wait in a process's own time; a slice that took more than the second was stopped, and counts as the first."""

Wait = Callable[[float], None]
"""Waits until a moment of perf_counter."""


def sleep_until(clock_s: float) -> None:
    """Sleep until a moment of perf_counter, if it lies ahead."""
    time.sleep(max(0.0, clock_s - time.perf_counter()))


def run_until(clock_s: float) -> None:
    """Sleep until a moment of perf_counter that is put off by as long as this process is stopped meanwhile."""
    began_s = time.perf_counter()
    while began_s < clock_s:
        time.sleep(min(SLICE_S, clock_s - began_s))
        ended_s = time.perf_counter()
        if ended_s - began_s > SLICE_S_MAX:
            clock_s += ended_s - began_s - SLICE_S
        began_s = ended_s


class _BackwardEnds(torch.autograd.Function):
    """Passes a block's input on; the gradient leaves the block here, and not before its time is over."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, ends: list[float], wait: Wait) -> Tensor:
        ctx.ends, ctx.wait = ends, wait
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        ctx.wait(ctx.ends[-1])
        return gradients[0], None, None


class _BackwardBegins(torch.autograd.Function):
    """Passes a block's output on; the gradient enters the block here."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, ends: list[float], wait_s: float) -> Tensor:
        ctx.ends, ctx.wait_s = ends, wait_s
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        ctx.ends.append(time.perf_counter() + ctx.wait_s)
        return gradients[0], None, None


class WaitingBlock(nn.Module):
    """A residual layer whose forward and backward take as long as they are told, what they compute included."""

    def __init__(self, width: int, forward_s: float, backward_s: float, wait: Wait) -> None:
        super().__init__()
        self.inner = nn.Linear(width, width)
        self.forward_s, self.backward_s, self.wait = forward_s, backward_s, wait

    def forward(self, x: Tensor) -> Tensor:
        over_s = time.perf_counter() + self.forward_s
        ends: list[float] = []  # of the backward, written down where it begins
        entered = _BackwardEnds.apply(x, ends, self.wait)  # type: ignore[no-untyped-call]
        computed = entered + torch.tanh(self.inner(entered))
        y: Tensor = _BackwardBegins.apply(computed, ends, self.backward_s)  # type: ignore[no-untyped-call]
        self.wait(over_s)
        return y


def layers_of(
    width: int, blocks: int, forward_s: float, backward_s: float, uneven: float, wait: Wait
) -> list[nn.Module]:
    """Return the model."""
    factors = [1 + uneven * (number % UNEVEN_PERIOD - 1) for number in range(blocks)]
    waiting = (WaitingBlock(width, factor * forward_s, factor * backward_s, wait) for factor in factors)
    return [nn.Linear(FEATURES, width), *waiting, nn.Linear(width, FEATURES)]


def optimizer_of(parameters: list[nn.Parameter]) -> torch.optim.Optimizer:
    """Return a layer's optimizer."""
    return torch.optim.AdamW(parameters, lr=1e-3)


def parse_arguments() -> argparse.Namespace:
    """Return the flags."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--width", type=int, default=256)
    parser.add_argument("--blocks", type=int, default=12)
    parser.add_argument("--slots", type=int, default=8)
    parser.add_argument("--forward-ms", type=float, default=4.0, help="of a block, for one slot")
    parser.add_argument("--backward-ms", type=float, default=8.0)
    parser.add_argument("--uneven", type=float, default=0.0, help="how much the blocks' times differ, from 0 to 1")
    parser.add_argument("--running", action="store_true", help="blocks' times pass only while the process runs")
    parser.add_argument("--log", type=Path, required=True, help="folder for the workers' logs")
    parser.add_argument("--until", type=Path, help="file that will hold the last step's number")
    parser.add_argument("--steps", type=int, default=0, help="the last step, without --until")
    return parser.parse_args()


def main() -> None:
    arguments = parse_arguments()
    session = elastic.join()
    log = Log(arguments.log, os.getpid())
    values = torch.randn(SAMPLES, 2 * FEATURES, generator=torch.Generator().manual_seed(7))
    dataset = TensorDataset(values[:, :FEATURES], values[:, FEATURES:])
    times_s = (arguments.forward_ms / 1000, arguments.backward_ms / 1000)
    wait = run_until if arguments.running else sleep_until
    pipeline = session.pipeline(
        layers_of(arguments.width, arguments.blocks, *times_s, arguments.uneven, wait),
        F.mse_loss,
        optimizer_of,
        DataLoader(dataset, batch_size=BATCH_SIZE, shuffle=True),
        slots=arguments.slots,
        virtual_replicas=1,
    )
    last_step = arguments.steps
    for _ in session.epochs(10**9):
        for _ in pipeline:
            pipeline.step()
            log.write("commit", clock_s=time.monotonic(), step=session.step, generation=session.generation,
                      world_size=session.world_size, rank=session.rank)  # fmt: skip
            if arguments.until is not None and not last_step and arguments.until.exists():
                last_step = int(arguments.until.read_text())
            if last_step and session.step >= last_step:
                break


if __name__ == "__main__":
    main()

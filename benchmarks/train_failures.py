"""The training script of `benchmarks.failures`: a byte-level GPT as a pipeline, which begins where another left off.

Each worker appends a JSON line per step to DIR/<pid>.jsonl: {"clock_s", "step", "generation"}; with the first layer's
{"embedding": CRC-32, "is_owner"} where it is held, and every --eval-every steps {"loss"}: on windows that are never trained
on, all slots straight.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import time
import zlib
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Subset

import elastic
from benchmarks.lone_gpt import CONTEXT, HELD_OUT, RATE, modules_of
from examples.gpt import Windows
from examples.gpt_pipeline import loss_of

BATCH, SLOTS = 2, 4


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--weights", type=Path, required=True, help="state_dicts of the layers to begin with")
    parser.add_argument("--steps", type=int, required=True)
    parser.add_argument("--eval-every", type=int, default=20)
    parser.add_argument("--log", type=Path, required=True)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--hold-after", type=int, default=0, help="the step after which the file of --go is waited for")
    parser.add_argument("--go", type=Path)
    arguments = parser.parse_args()

    session = elastic.join()
    layers = modules_of()
    for layer, values in zip(layers, torch.load(arguments.weights, weights_only=True), strict=True):
        layer.load_state_dict(values)
    text = Windows(CONTEXT)
    train = Subset(text, range(len(text) - HELD_OUT))
    pipeline = session.pipeline(
        layers,
        loss_of,
        lambda parameters: torch.optim.Adam(parameters, lr=RATE / 4),
        DataLoader(train, batch_size=BATCH, shuffle=True),
        slots=SLOTS,
        stages=6,
        clip_grad_norm=1.0,
        seed=arguments.seed,
    )
    tests = [_batch(text, first) for first in range(len(text) - HELD_OUT, len(text), 4 * BATCH)]
    arguments.log.mkdir(exist_ok=True)
    with (arguments.log / f"{os.getpid()}.jsonl").open("a") as log:
        for _ in session.epochs(arguments.steps):
            for batch in pipeline:
                while session.step == arguments.hold_after and arguments.go is not None and not arguments.go.exists():
                    session.heartbeat()
                    time.sleep(0.02)
                pipeline.step()
                line: dict[str, Any] = {"clock_s": time.monotonic(), "step": batch.step, "generation": session.generation}
                embedding = next(layers[0].parameters())
                if not embedding.is_meta:
                    crc = zlib.crc32(embedding.detach().numpy().tobytes())
                    line |= {"embedding": crc, "is_owner": 0 in pipeline.layers}
                if batch.step % arguments.eval_every == 0:
                    loss = math.fsum(pipeline.eval(each) for each in tests) / len(tests)
                    line |= {"loss": loss} if math.isfinite(loss) else {}
                log.write(json.dumps(line) + "\n")
                log.flush()
                if session.step >= arguments.steps:
                    break
            if session.step >= arguments.steps:
                break


def _batch(text: Windows, first: int) -> tuple[Tensor, Tensor]:
    pairs = [text[index] for index in range(first, first + BATCH)]
    return torch.stack([inputs for inputs, _ in pairs]), torch.stack([targets for _, targets in pairs])


if __name__ == "__main__":
    main()

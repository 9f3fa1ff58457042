"""Snapshots of small trainings as the agents' memory holds them: for tests of what is done with snapshots."""

from __future__ import annotations

import json
import struct
import zlib
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from elastic.encoding import flat_bytes, raw_view
from elastic.snapshots import Slice, SnapshotId, share_of
from elastic.state import TrainingState

MakeOptimizer = Callable[[list[nn.Parameter]], Optimizer]
OPTIMIZERS: dict[str, MakeOptimizer] = {
    "adamw": lambda parameters: torch.optim.AdamW(parameters, lr=0.01),
    "adamw-tensor-lr": lambda parameters: torch.optim.AdamW(parameters, lr=torch.tensor(0.01), foreach=False),
    "sgd": lambda parameters: torch.optim.SGD(parameters, lr=0.1),
    "momentum": lambda parameters: torch.optim.SGD(parameters, lr=0.1, momentum=0.9),
    "adafactor": lambda parameters: torch.optim.Adafactor(parameters, lr=0.01),
    "groups": lambda parameters: torch.optim.AdamW(
        [{"params": parameters[:1], "weight_decay": 0.0}, {"params": parameters[1:], "lr": 0.02}]
    ),
}


class Odd(nn.Module):
    """All that makes a state dict differ from a list of tensors: a tied weight, bfloat16, buffers of which one is not saved."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.embed = nn.Embedding(11, 6)
        self.flag = nn.Buffer(torch.tensor([True, False, True]))  # what lies behind three bytes is not aligned
        self.narrow = nn.Linear(6, 5, dtype=torch.bfloat16)
        self.norm = nn.BatchNorm1d(5)
        self.back = nn.Linear(5, 6)
        self.head = nn.Linear(6, 11, bias=False)
        self.head.weight = self.embed.weight
        self.mask = nn.Buffer(torch.rand(3), persistent=False)
        self.empty = nn.Buffer(torch.empty(0, 4))

    def forward(self, tokens: Tensor) -> Tensor:
        hidden = self.norm(self.narrow(self.embed(tokens).bfloat16()).float())
        return self.head(self.back(hidden)) * self.mask.sum()


def train(model: nn.Module, optimizers: list[Optimizer], steps: int, seed: int) -> None:
    """Some steps on data that are a function of the seed."""
    generator = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        tokens, targets = (torch.randint(11, (16,), generator=generator) for _ in range(2))
        nn.functional.cross_entropy(model(tokens), targets).backward()
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()


def captured(state: TrainingState, step: int, count: int = 1, generation: int = 1) -> list[tuple[Slice, Tensor]]:
    """The slices of a snapshot of a state, each in memory of its own."""
    manifest = json.dumps([entry.to_json() for entry in state.manifest()], separators=(",", ":")).encode()
    description = struct.pack("<Q", len(manifest)) + manifest + state.small().encode()
    payload = torch.cat([flat_bytes(tensor) for tensor in state.tensors()])
    slices = []
    for index in range(count):
        share = share_of(len(payload), index, count)
        blank = Slice(
            SnapshotId(step, generation), index, count, share.start, share.stop, len(payload), len(description)
        )
        memory = torch.zeros(blank.stored_bytes, dtype=torch.uint8)
        memory[: len(share)] = payload[share.start : share.stop]
        memory[blank.description_at :] = torch.frombuffer(bytearray(description), dtype=torch.uint8)
        slices.append((signed(blank, memory), memory))
    return slices


def signed(slice_: Slice, memory: Tensor) -> Slice:
    """The slice with the CRCs of what lies in memory."""
    fields = {name: getattr(slice_, name) for name in Slice.__dataclass_fields__}
    payload, description = memory[: slice_.end - slice_.begin], memory[slice_.description_at :]
    crcs = {"payload_crc": zlib.crc32(raw_view(payload)), "description_crc": zlib.crc32(raw_view(description))}
    return Slice(**fields | crcs)

"""What workers say about themselves when they register, so that those that would not compute the same are found at once."""

from __future__ import annotations

import hashlib
from typing import Any

import torch
from torch import Tensor

from elastic.encoding import flat_bytes, raw_view
from elastic.seeding import preserved, seed_everything


def digest_of_sample(dataset: Any, seed: int) -> str:
    """Digest of the tensors and numbers in the first sample; workers that read other data differ in it."""
    digest = hashlib.sha256()

    def take(value: Any) -> None:
        if isinstance(value, dict):
            for key in value:
                digest.update(repr(key).encode())
                take(value[key])
        elif isinstance(value, list | tuple):
            for item in value:
                take(item)
        elif isinstance(value, Tensor):
            flat = flat_bytes(value.detach()).cpu()
            digest.update(raw_view(flat))
        elif hasattr(value, "tobytes"):  # numpy's
            digest.update(value.tobytes())
        elif isinstance(value, str | bytes | bool | int | float):
            digest.update(repr(value).encode())

    with preserved():  # a sample may be augmented at random
        seed_everything(seed, 0, 0, "first sample")
        take(dataset[0])
    return digest.hexdigest()[:16]


def numerics() -> str:
    """What the bits of a kernel depend on besides the program."""
    capability = torch.backends.cpu.get_cpu_capability()
    return f"torch {torch.__version__}, {torch.get_num_threads()} threads, {capability}"

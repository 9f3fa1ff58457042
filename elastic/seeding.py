"""Randomness as a function of logical coordinates: (seed, step, slot, purpose), never of rank or call order.

Called before every slot, so it is built to cost a few microseconds. It must never synchronise with an
accelerator, initialise one, or import numpy on its own account.
"""

from __future__ import annotations

import hashlib
import random
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch


def seed_of(seed: int, *coordinates: int | str) -> int:
    """A 64-bit seed for one logical place, the same on every platform.

    Args:
        seed: the job's seed, any integer. coordinates: what tells this place from others, such as step, slot
            and purpose. `1` and `"1"` differ, and so do
            ("ab", "c") and ("a", "bc").

    Returns:
        An integer in [0, 2**64), the BLAKE2b-64 of the framed arguments.
    """
    # ascii() frames a string: it quotes and escapes it, line breaks included, alike in every version.
    words = [ascii(place) if isinstance(place, str) else str(int(place)) for place in (seed, *coordinates)]
    return int.from_bytes(hashlib.blake2b("\n".join(words).encode(), digest_size=8).digest(), "little")


def seed_everything(seed: int, step: int, slot: int, purpose: str = "slot") -> int:
    """Seed torch, `random` and numpy (only if the program has imported it) for one slot of one step.

    CUDA generators are seeded only if CUDA is initialised; that writes host memory and waits for nothing.

    Args:
        seed: the job's seed.
        step: step of the job, from 1.
        slot: slot of the step, from 0.
        purpose: keeps places of one slot apart, such as "slot" for its forward and "fetch" for its data.

    Returns:
        The 64-bit seed that torch was given.
    """
    value = seed_of(seed, step, slot, purpose)
    # Not torch.manual_seed: it goes through torch._dynamo and formats a stack at each call.
    torch.default_generator.manual_seed(value)
    for generator in torch.cuda.default_generators:  # Empty until CUDA is initialised.
        generator.manual_seed(value)
    random.seed(value)
    numpy = sys.modules.get("numpy")
    if numpy is not None:
        # torch's CPU generator and numpy's are the same Mersenne Twister, and torch keeps only the low 32
        # bits of a seed: with the same bits, both would draw the same words. The high ones are independent of
        # them.
        numpy.random.seed(value >> 32)
    return value


@contextmanager
def preserved() -> Iterator[None]:
    """Leave the global generators afterwards as they were before, whatever the block draws or seeds.

    For work between slots (evaluation, warming up) that must not change what follows. Costs about 100 us on a
    CPU. Generators that come into being inside the block (numpy imported, CUDA initialised) keep their state.
    """
    torch_state = torch.default_generator.get_state()
    cuda_states = [generator.get_state() for generator in torch.cuda.default_generators]
    random_state = random.getstate()
    numpy: Any = sys.modules.get("numpy")
    numpy_state = None if numpy is None else numpy.random.get_state()
    try:
        yield
    finally:
        torch.default_generator.set_state(torch_state)
        for generator, state in zip(torch.cuda.default_generators, cuda_states, strict=False):
            generator.set_state(state)
        random.setstate(random_state)
        if numpy_state is not None:
            numpy.random.set_state(numpy_state)

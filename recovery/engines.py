"""Who multiplies stripes of shards by a small matrix over GF(2^8): the seam, and the engines that need no foreign library.

An engine knows nothing of codes, losses or offsets; it gets a matrix and equally long pieces of memory. All engines
write the same bytes. It must never keep a piece, or allocate more than a few times one piece.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from functools import cache
from typing import Protocol

import reedsolo
import torch
from torch import Tensor

from recovery.galois import POLYNOMIAL, Matrix


class Engine(Protocol):
    """Matrix times stripes.

    Attributes:
        name: the word for it in a sentence.
        any_device: whether it works on tensors of an accelerator too.
    """

    name: str
    any_device: bool

    def carries(self, matrix: Matrix) -> bool:
        """Whether it can multiply by this matrix."""
        ...

    def multiply(self, matrix: Matrix, inputs: Sequence[Tensor], outputs: Sequence[Tensor], accumulate: bool) -> None:
        """Write matrix times inputs into outputs, or add (XOR) it to what they hold.

        Args:
            matrix: [len(outputs), len(inputs)].
            inputs: each uint8, [n], contiguous, n < 2^31; not empty.
            outputs: each uint8, [n], contiguous; no two share memory with each other or with an input. Not empty.
        """
        ...


class XorEngine:
    """For matrices of zeros and ones, which are all that a code with one parity shard needs."""

    name = "XOR"
    any_device = True

    def carries(self, matrix: Matrix) -> bool:
        return all(factor in (0, 1) for row in matrix for factor in row)

    def multiply(self, matrix: Matrix, inputs: Sequence[Tensor], outputs: Sequence[Tensor], accumulate: bool) -> None:
        for row, output in zip(matrix, outputs, strict=True):
            _xor_into(output, [part for factor, part in zip(row, inputs, strict=True) if factor], accumulate)


class TorchEngine:
    """Torch's element-wise operations: runs wherever torch does, accelerators included.

    Horner's rule over the bits of the coefficients: from the highest bit down, an output is doubled and takes the sum
    of the inputs whose coefficient has that bit. Doubling a byte is a shift and, where a bit fell out, an XOR with the
    polynomial (H. P. Anvin, The mathematics of RAID-6, section 4).
    """

    name = "torch"
    any_device = True

    def carries(self, matrix: Matrix) -> bool:
        return True

    def multiply(self, matrix: Matrix, inputs: Sequence[Tensor], outputs: Sequence[Tensor], accumulate: bool) -> None:
        carry = torch.empty_like(inputs[0], dtype=torch.int8)
        scratch = torch.empty_like(inputs[0]) if accumulate else None
        for row, output in zip(matrix, outputs, strict=True):
            total = output if scratch is None else scratch
            total.zero_()
            for bit in reversed(range(max(row).bit_length())):
                _double(total.view(torch.int8), carry)
                for factor, part in zip(row, inputs, strict=True):
                    if factor >> bit & 1:
                        total.bitwise_xor_(part)
            if scratch is not None:
                output.bitwise_xor_(scratch)


class ReedsoloEngine:
    """reedsolo's own arithmetic on Python's bytes: the last resort, and not shared with `recovery.galois`.

    Memory is read and written through ctypes, since torch makes bytes of a tensor only where numpy is installed.
    """

    name = "reedsolo"
    any_device = False

    def carries(self, matrix: Matrix) -> bool:
        return True

    def multiply(self, matrix: Matrix, inputs: Sequence[Tensor], outputs: Sequence[Tensor], accumulate: bool) -> None:
        length = inputs[0].numel()
        for row, output in zip(matrix, outputs, strict=True):
            total = int.from_bytes(ctypes.string_at(output.data_ptr(), length), "little") if accumulate else 0
            for factor, part in zip(row, inputs, strict=True):
                if factor:
                    # Copied again for each row: that costs little beside the rest, and one copy at a time is held.
                    copy = ctypes.string_at(part.data_ptr(), length)
                    total ^= int.from_bytes(copy.translate(_reedsolo_products(factor)), "little")
            ctypes.memmove(output.data_ptr(), total.to_bytes(length, "little"), length)


@cache
def _reedsolo_products(factor: int) -> bytes:
    """The products of `factor` with 0..255, as reedsolo multiplies without tables."""
    return bytes(reedsolo.gf_mult_noLUT(factor, value, prim=POLYNOMIAL, field_charac_full=256) for value in range(256))


def _double(values: Tensor, carry: Tensor) -> None:
    """Multiply int8 values by 2 in the field, in place; `carry` is scratch of the same shape and dtype."""
    torch.bitwise_right_shift(values, 7, out=carry)  # signed: -1, all ones, where the highest bit is set
    carry.bitwise_and_(POLYNOMIAL & 0xFF)
    values.add_(values).bitwise_xor_(carry)


def _xor_into(output: Tensor, parts: Sequence[Tensor], accumulate: bool) -> None:
    if not accumulate and len(parts) > 1:
        torch.bitwise_xor(parts[0], parts[1], out=output)
        parts = parts[2:]
    elif not accumulate:
        output.zero_()
    for part in parts:
        output.bitwise_xor_(part)

"""Numbers in eight or in four bits, for what is sent over slow links: blocks with a scale each.

    int8    code = round(x / scale) to even, scale = absmax / 127            4 times less than float32
    fp4     E3M0: a sign and one of 0, 2^-6 .. 2^0, times scale = absmax     8 times less

A block has BLOCK numbers; of a last, shorter one the rest counts as zero. Scales are float32. The nearest value is taken; of two
that are as near, in fp4, the larger one. A block with a number that is not finite decodes to NaN. The same bits on any device
(section 6 of arXiv 2501.18512 uses E3M0, and says nothing of scales and rounding).
"""

from __future__ import annotations

import enum

import torch
from torch import Tensor

BLOCK = 256
SCALE_BYTES = 4
_SMALLEST = -6
"""Exponent of the smallest number in fp4 that is not 0."""


class Code(enum.StrEnum):
    """How numbers are written."""

    INT8 = "int8"
    FP4 = "fp4"


def encoded_bytes(code: Code, numel: int) -> int:
    """Bytes of so many numbers: codes, and behind them the scales."""
    blocks = -(-numel // BLOCK)
    return blocks * (BLOCK // (1 if code is Code.INT8 else 2) + SCALE_BYTES)


def encode(code: Code, values: Tensor) -> Tensor:
    """Return numbers, [numel] of any floating dtype, as uint8 [encoded_bytes], on the same device."""
    blocks = -(-values.numel() // BLOCK)
    padded = torch.zeros(blocks * BLOCK, dtype=torch.float32, device=values.device)
    padded[: values.numel()] = values
    padded = padded.view(blocks, BLOCK)
    largest = padded.abs().amax(1)  # NaN where a number is
    scales = largest / 127 if code is Code.INT8 else largest
    scales = torch.where(scales.isfinite(), scales, torch.nan)
    scaled = (padded / scales[:, None]).nan_to_num(0.0, 0.0, 0.0)  # a block of zeros has a scale of 0
    codes = _int8(scaled) if code is Code.INT8 else _fp4(scaled)
    return torch.cat([codes.view(-1), scales.contiguous().view(torch.uint8)])


def decode(code: Code, data: Tensor, numel: int) -> Tensor:
    """Return the numbers of `encode`, float32 [numel].

    Raises:
        ValueError: the data are not as long as they have to be.
    """
    if data.numel() != encoded_bytes(code, numel):
        raise ValueError(f"{numel} numbers in {code} take {encoded_bytes(code, numel)} bytes, and there are {data.numel()}")
    blocks = -(-numel // BLOCK)
    at = data.numel() - blocks * SCALE_BYTES
    scales = data[at:].clone().view(torch.float32)
    if code is Code.INT8:
        values = data[:at].view(torch.int8).to(torch.float32)
    else:
        nibbles = torch.stack([data[:at] & 15, data[:at] >> 4], 1).view(-1)
        magnitude = (nibbles & 7).to(torch.float32)
        power = torch.exp2(magnitude - 1 + _SMALLEST)
        values = torch.where(magnitude > 0, power, 0.0) * torch.where(nibbles > 7, -1.0, 1.0)
    return (values.view(blocks, BLOCK) * scales[:, None]).view(-1)[:numel]


def _int8(scaled: Tensor) -> Tensor:
    return scaled.round().clamp(-127, 127).to(torch.int8).view(torch.uint8)


def _fp4(scaled: Tensor) -> Tensor:
    """Two codes a byte, the first one in the low bits."""
    mantissa, exponent = torch.frexp(scaled.abs())  # x = mantissa 2^exponent, from 1/2 to 1
    nearest = exponent - 1 + (mantissa >= 0.75)
    is_zero = scaled.abs() < 2.0 ** (_SMALLEST - 1)
    magnitude = torch.where(is_zero, 0, nearest.clamp(_SMALLEST, 0) - _SMALLEST + 1)
    codes = (magnitude + 8 * (scaled < 0)).to(torch.uint8).view(-1, 2)
    return codes[:, 0] | (codes[:, 1] << 4)

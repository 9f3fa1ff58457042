"""Numbers in few bits: golden vectors, how far they are off, and what becomes of what is not finite."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from elastic.quantize import BLOCK, Code, decode, encode, encoded_bytes

both = pytest.mark.parametrize("code", list(Code))
GOLDEN = torch.tensor([1.0, -0.5, 0.3, 0.75, -0.374, 2.0**-6, 2.0**-7, 0.0078, -1e-9, 0.0])


def test_int8_has_the_bytes_that_are_written_down() -> None:
    data = encode(Code.INT8, GOLDEN)
    assert data[:10].view(torch.int8).tolist() == [127, -64, 38, 95, -47, 2, 1, 1, 0, 0]
    assert not data[10:BLOCK].any() and data[BLOCK:].view(torch.float32).tolist() == [torch.tensor(1.0) / 127]


def test_fp4_has_the_bytes_that_are_written_down() -> None:
    data = encode(Code.FP4, GOLDEN)
    codes = [7, 8 + 6, 5, 7, 8 + 5, 1, 1, 0, 8, 0]  # of 0.75, as near to 0.5 as to 1, the larger; 2^-7 likewise
    assert data[:5].tolist() == [low | high << 4 for low, high in zip(codes[::2], codes[1::2], strict=True)]
    assert data[BLOCK // 2 :].view(torch.float32).tolist() == [1.0]
    expected = [1.0, -0.5, 0.25, 1.0, -0.25, 2.0**-6, 2.0**-6, 0.0, 0.0, 0.0]
    assert decode(Code.FP4, data, 10).tolist() == expected


@both
@settings(deadline=None)
@given(st.integers(1, 3 * BLOCK), st.floats(1e-20, 1e20), st.integers(0, 99))
def test_what_is_decoded_is_as_near_as_the_code_can_be_and_encodes_to_itself(
    code: Code, numel: int, size: float, seed: int
) -> None:
    values = torch.randn(numel, generator=torch.Generator().manual_seed(seed)) * size
    data = encode(code, values)
    assert data.numel() == encoded_bytes(code, numel) and data.dtype == torch.uint8
    back = decode(code, data, numel)
    for begin in range(0, numel, BLOCK):
        mine, theirs = values[begin : begin + BLOCK], back[begin : begin + BLOCK]
        largest = mine.abs().max()
        off = (mine - theirs).abs()
        bound = largest / 254 if code is Code.INT8 else torch.maximum(mine.abs() / 3, largest * 2.0**-7)
        assert bool((off <= bound * 1.0001).all())
    torch.testing.assert_close(decode(code, encode(code, back), numel), back)


@pytest.mark.parametrize(("code", "low", "high"), [(Code.INT8, 0.005, 0.02), (Code.FP4, 0.17, 0.20)])
def test_the_relative_error_is_that_of_the_literature(code: Code, low: float, high: float) -> None:
    generator = torch.Generator().manual_seed(0)
    values = torch.randn(1 << 16, generator=generator) * torch.exp(0.5 * torch.randn(1 << 16, generator=generator))
    error = (decode(code, encode(code, values), len(values)) - values).norm() / values.norm()
    assert low < float(error) < high


@both
def test_zeros_stay_zeros_and_what_is_not_finite_spoils_its_block_only(code: Code) -> None:
    assert not decode(code, encode(code, torch.zeros(300)), 300).any()
    assert decode(code, encode(code, torch.empty(0)), 0).numel() == 0
    for bad in (float("nan"), float("inf"), float("-inf")):
        values = torch.ones(2 * BLOCK)
        values[3] = bad
        back = decode(code, encode(code, values), 2 * BLOCK)
        assert bool(back[:BLOCK].isnan().all()) and torch.equal(back[BLOCK:], torch.ones(BLOCK))


@both
def test_data_of_another_length_are_refused(code: Code) -> None:
    with pytest.raises(ValueError, match="take"):
        decode(code, torch.zeros(7, dtype=torch.uint8), 300)

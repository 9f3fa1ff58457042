"""The erasure codec: reedsolo's bytes from every engine, every loss pattern, and refusals before a byte is written."""

from __future__ import annotations

import itertools
import random
from collections.abc import Iterator, Sequence

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from reedsolo import RSCodec
from torch import Tensor

from elastic.errors import ConfigError
from recovery import codec as codec_module
from recovery import galois
from recovery.choosing import candidates
from recovery.codec import Codec
from recovery.engines import TorchEngine, XorEngine
from recovery.galois import Matrix

CODES = ((1, 1), (1, 2), (3, 1), (4, 2), (6, 2), (8, 3), (10, 4))
ENGINES = {trial.engine.name: trial.engine for trial in candidates() if trial.engine is not None}


def carried(codes: Sequence[tuple[int, int]]) -> list[tuple[str, int, int]]:
    """Each engine of this machine with those of the codes that it carries."""
    return [(name, k, m) for name, e in ENGINES.items() for k, m in codes if e.carries(galois.parity_matrix(k, m))]


# ----------------------------------------------------------------------------------------------------
# The dumb twin: one byte of each shard at a time, by reedsolo itself and by school multiplication


def dumb_product(a: int, b: int) -> int:
    """Carry-less long multiplication, then long division by 0x11d."""
    total = 0
    for bit in range(8):
        if b >> bit & 1:
            total ^= a << bit
    for bit in range(14, 7, -1):
        if total >> bit & 1:
            total ^= 0x11D << (bit - 8)
    return total


def dumb_parity(k: int, m: int, data: Sequence[bytes]) -> list[bytes]:
    """Each column of bytes is one code word."""
    if not m:
        return []
    twin = RSCodec(m, nsize=k + m)
    words = [bytes(twin.encode(bytes(column)))[k:] for column in zip(*data, strict=True)]
    return [bytes(word[i] for word in words) for i in range(m)]


def dumb_decode(k: int, m: int, shards: dict[int, bytes]) -> list[bytes]:
    """reedsolo's own erasure decoder, column by column: all k + m shards."""
    twin, length = RSCodec(m, nsize=k + m), len(next(iter(shards.values())))
    lost = [index for index in range(k + m) if index not in shards]
    words = [
        twin.decode(bytes(shards[i][at] if i in shards else 0 for i in range(k + m)), erase_pos=lost)[1]
        for at in range(length)
    ]
    return [bytes(word[i] for word in words) for i in range(k + m)]


def noise(length: int, seed: int) -> bytes:
    return random.Random(seed).randbytes(length)


def tensor(content: bytes, unaligned_by: int = 0) -> Tensor:
    return torch.frombuffer(bytearray(bytes(unaligned_by) + content + b"\0"), dtype=torch.uint8)[unaligned_by:-1]


def content(shard: Tensor) -> bytes:
    return bytes(shard.tolist())


def blank(length: int, unaligned_by: int = 0) -> Tensor:
    """Not zeroes: what is not written must be seen."""
    return tensor(b"\xa5" * length, unaligned_by)


def encoded(codec: Codec, length: int, seed: int = 0) -> list[Tensor]:
    """All k + m shards of random data."""
    data = [tensor(noise(length, seed + i)) for i in range(codec.k)]
    parity = [blank(length) for _ in range(codec.m)]
    codec.encode(data, parity)
    return [*data, *parity]


def losses(k: int, m: int) -> Iterator[tuple[int, ...]]:
    """Every pattern of at most m lost shards."""
    return itertools.chain.from_iterable(itertools.combinations(range(k + m), count) for count in range(m + 1))


# ----------------------------------------------------------------------------------------------------
# The field and the matrix


def test_products_are_those_of_long_multiplication() -> None:
    assert all(galois.product(a, b) == dumb_product(a, b) for a in range(256) for b in range(256))
    assert all(galois.product(a, galois.inverse(a)) == 1 for a in range(1, 256))


@pytest.mark.parametrize(("k", "m"), CODES)
def test_any_k_shards_are_enough(k: int, m: int) -> None:
    # A systematic code is MDS exactly if every square part of its parity matrix has an inverse (MacWilliams and
    # Sloane, The Theory of Error-Correcting Codes, chapter 11, theorem 8); matrix_inverse refuses one that has none.
    parity = galois.parity_matrix(k, m)
    for size in range(1, min(k, m) + 1):
        for rows in itertools.combinations(parity, size):
            for columns in itertools.combinations(range(k), size):
                galois.matrix_inverse(tuple(tuple(row[column] for column in columns) for row in rows))


def test_a_matrix_times_its_inverse_is_the_identity() -> None:
    matrix: Matrix = ((0, 2, 3), (1, 0, 7), (9, 200, 0))  # zeros on the diagonal: rows must be exchanged
    assert galois.matrix_product(matrix, galois.matrix_inverse(matrix)) == ((1, 0, 0), (0, 1, 0), (0, 0, 1))


def test_a_matrix_without_inverse_is_refused() -> None:
    with pytest.raises(ConfigError, match="no erasure code"):
        galois.matrix_inverse(((1, 2), (2, 4)))


@pytest.mark.parametrize(("k", "m"), [(0, 1), (-1, 2), (3, -1), (200, 56), (256, 0)])
def test_a_code_that_cannot_be_is_refused(k: int, m: int) -> None:
    with pytest.raises(ConfigError, match=f"{k} data and {m} parity"):
        Codec(k, m)


def test_the_largest_code_loses_as_much_as_it_may() -> None:
    codec = Codec(235, 20)
    shards = encoded(codec, 8)
    assert [content(shard) for shard in shards[235:]] == dumb_parity(235, 20, [content(s) for s in shards[:235]])
    wanted = {index: blank(8) for index in range(50, 70)}
    codec.decode({i: shard for i, shard in enumerate(shards) if i not in wanted}, wanted)
    assert all(content(wanted[index]) == content(shards[index]) for index in wanted)


# ----------------------------------------------------------------------------------------------------
# Encode and decode


@pytest.mark.parametrize(("name", "k", "m"), carried(CODES))
def test_every_engine_writes_the_parity_of_reedsolo(name: str, k: int, m: int) -> None:
    shards = encoded(Codec(k, m, ENGINES[name]), 333)
    assert [content(shard) for shard in shards[k:]] == dumb_parity(k, m, [content(shard) for shard in shards[:k]])


@pytest.mark.parametrize(("name", "k", "m"), carried([(1, 1), (1, 2), (3, 1), (4, 2), (3, 3)]))
def test_every_loss_is_made_good_by_every_engine(name: str, k: int, m: int) -> None:
    codec = Codec(k, m, ENGINES[name])
    shards = encoded(codec, 37)
    for lost in losses(k, m):
        wanted = {index: blank(37) for index in lost}
        codec.decode({i: shard for i, shard in enumerate(shards) if i not in lost}, wanted)
        assert [content(wanted[i]) for i in lost] == [content(shards[i]) for i in lost], lost


def test_one_parity_shard_is_the_xor_of_the_data() -> None:
    for k in (1, 2, 3, 7, 254):
        assert galois.parity_matrix(k, 1) == ((1,) * k,)
        assert XorEngine().carries(galois.parity_matrix(k, 1))
    assert not XorEngine().carries(galois.parity_matrix(4, 2))


@settings(max_examples=150, deadline=None)
@given(st.data())
def test_whatever_is_lost_comes_back_as_the_dumb_twin_has_it(data: st.DataObject) -> None:
    k, m = data.draw(st.integers(1, 12), "k"), data.draw(st.integers(0, 6), "m")
    length, seed = data.draw(st.integers(0, 40), "length"), data.draw(st.integers(0, 999), "seed")
    # Small stripes, so that lengths fall short of, on and beyond their ends.
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(codec_module, "STRIPE_BYTES", data.draw(st.sampled_from([1, 7, 16, 1 << 20]), "stripe"))
        codec, by = Codec(k, m), data.draw(st.integers(0, 17), "unaligned by")
        plain = [noise(length, seed + i) for i in range(k)]
        parity = [blank(length, by) for _ in range(m)]
        codec.encode([tensor(part, by) for part in plain], parity)
        if length:
            assert [content(part) for part in parity] == dumb_parity(k, m, plain)
        everything = [*plain, *map(content, parity)]
        lost = data.draw(st.sets(st.integers(0, k + m - 1), max_size=m), "lost")
        left = {i: part for i, part in enumerate(everything) if i not in lost}
        if length and m:
            assert dumb_decode(k, m, left) == everything
        wanted = (
            {i: blank(length, by) for i in data.draw(st.sets(st.sampled_from(sorted(lost))), "wanted")} if lost else {}
        )
        codec.decode({i: tensor(part, by) for i, part in left.items()}, wanted)
        assert {i: content(part) for i, part in wanted.items()} == {i: everything[i] for i in wanted}


@pytest.mark.parametrize("length", [0, 1, 2, 15, 31, 33, 63, 65, (1 << 20) - 1, 1 << 20, (1 << 20) + 1, 5 * (1 << 19)])
def test_lengths_and_addresses_need_be_multiples_of_nothing(length: int) -> None:
    codec = Codec(4, 2)
    data = [tensor(noise(length, i), unaligned_by=2 * i + 1) for i in range(4)]
    parity = [blank(length, unaligned_by=3) for _ in range(2)]
    codec.encode(data, parity)
    matrix = galois.parity_matrix(4, 2)
    assert [bytes(part.numpy()) for part in parity] == galois.combine(matrix, [bytes(part.numpy()) for part in data])
    wanted = {0: blank(length, unaligned_by=5), 3: blank(length)}
    codec.decode({1: data[1], 2: data[2], 4: parity[0], 5: parity[1]}, wanted)
    assert torch.equal(wanted[0], data[0]) and torch.equal(wanted[3], data[3])


def test_a_single_shard_is_rebuilt_and_the_others_are_left_alone() -> None:
    codec = Codec(4, 2)
    shards = encoded(codec, 100)
    before = [content(shard) for shard in shards]
    for index in range(6):
        wanted = blank(100)
        codec.decode({i: shard for i, shard in enumerate(shards) if i != index}, {index: wanted})
        assert content(wanted) == before[index]
    assert [content(shard) for shard in shards] == before


def test_a_shard_at_hand_can_be_wanted_into_another_buffer() -> None:
    codec = Codec(3, 1)
    shards, wanted = encoded(codec, 20), {1: blank(20), 3: blank(20)}
    codec.decode(dict(enumerate(shards)), wanted)
    assert content(wanted[1]) == content(shards[1]) and content(wanted[3]) == content(shards[3])


def test_without_parity_there_is_nothing_to_do() -> None:
    codec = Codec(3, 0)
    shards = encoded(codec, 10)
    codec.encode(shards, [])
    codec.update(0, shards[0], shards[1], [])
    codec.decode(dict(enumerate(shards)), {})


def test_ranges_in_any_order_make_the_whole_and_touch_nothing_else() -> None:
    codec = Codec(4, 2)
    shards = encoded(codec, 300)
    parity = [blank(300), blank(300)]
    for start, stop in ((200, 300), (0, 77), (77, 78), (120, 120)):
        codec.encode(shards[:4], parity, start, stop)
    assert content(parity[0])[78:200] == b"\xa5" * 122
    codec.encode(shards[:4], parity, 78, 200)
    assert [content(part) for part in parity] == [content(shard) for shard in shards[4:]]
    wanted = {2: blank(300)}
    codec.decode({i: shards[i] for i in (0, 1, 3, 5)}, wanted, start=50, stop=250)
    assert content(wanted[2]) == b"\xa5" * 50 + content(shards[2])[50:250] + b"\xa5" * 50


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_shards_on_an_accelerator_get_the_same_bytes() -> None:
    here, there = Codec(4, 2), Codec(4, 2, TorchEngine())
    shards = encoded(here, 1001)
    moved = [shard.cuda() for shard in shards]
    parity, wanted = [torch.empty_like(shard) for shard in moved[4:]], {0: torch.empty_like(moved[0])}
    there.encode(moved[:4], parity)
    there.decode({1: moved[1], 2: moved[2], 4: parity[0], 5: parity[1]}, wanted)
    assert all(torch.equal(a.cpu(), b) for a, b in zip([*parity, wanted[0]], [*shards[4:], shards[0]], strict=True))


# ----------------------------------------------------------------------------------------------------
# Update and fold


@pytest.mark.parametrize(("name", "k", "m"), carried([(3, 1), (4, 2)]))
def test_an_update_equals_a_fresh_encode(name: str, k: int, m: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(codec_module, "STRIPE_BYTES", 64)
    codec = Codec(k, m, ENGINES[name])
    for index in range(k):
        shards = encoded(codec, 150)
        old, new = shards[index], tensor(noise(150, 77))
        codec.update(index, old, new, shards[k:], start=0, stop=90)
        codec.update(index, old, new, shards[k:], start=90)
        shards[index], parity = new, [blank(150) for _ in range(m)]
        codec.encode(shards[:k], parity)
        assert [content(part) for part in parity] == [content(shard) for shard in shards[k:]]


@pytest.mark.parametrize(("name", "k", "m"), carried([(3, 1), (4, 2)]))
def test_a_fold_in_any_order_equals_a_decode(name: str, k: int, m: int) -> None:
    codec, order = Codec(k, m, ENGINES[name]), random.Random(1)
    shards = encoded(codec, 100)
    for lost in filter(None, losses(k, m)):
        wanted = {index: blank(100) for index in lost}
        survivors = [index for index in range(k + m) if index not in lost][-k:]
        order.shuffle(survivors)
        fold = codec.fold(survivors, wanted)
        pieces = [(index, start) for index in survivors for start in (0, 30, 60, 90)]
        order.shuffle(pieces)
        for index, start in pieces:
            assert not fold.is_complete
            fold.add(index, shards[index][start : start + 30], start)
        assert fold.is_complete and fold.missing == {}
        assert [content(wanted[i]) for i in lost] == [content(shards[i]) for i in lost], lost


def test_a_fold_says_what_it_waits_for_and_takes_no_byte_twice() -> None:
    codec = Codec(2, 1)
    shards, wanted = encoded(codec, 50), {0: blank(50)}
    fold = codec.fold([1, 2], wanted)
    fold.add(1, shards[1][10:30], 10)
    fold.add(1, shards[1][:10])
    assert fold.missing == {1: 20, 2: 50}
    for offset in (0, 5, 29):
        with pytest.raises(ConfigError, match="of shard 1 were added before"):
            fold.add(1, shards[1][offset : offset + 5], offset)
    with pytest.raises(ConfigError, match="none of the survivors"):
        fold.add(0, shards[0])
    with pytest.raises(ConfigError, match="not within the shards' 50 bytes"):
        fold.add(2, shards[2], 1)
    with pytest.raises(ConfigError, match=r"chunk of shard 2 is torch.float32"):
        fold.add(2, torch.zeros(50))
    fold.add(2, shards[2])
    fold.add(1, shards[1][30:], 30)
    assert fold.is_complete and content(wanted[0]) == content(shards[0])


# ----------------------------------------------------------------------------------------------------
# Refusals


def test_too_few_shards_are_refused() -> None:
    codec = Codec(3, 2)
    shards = encoded(codec, 10)
    with pytest.raises(ConfigError, match=r"Shards \[0, 4\] are 2, .* needs any 3; find more survivors"):
        codec.decode({0: shards[0], 4: shards[4]}, {1: blank(10)})
    with pytest.raises(ConfigError, match="has 3 data shards, but 2 were given"):
        codec.encode(shards[:2], shards[3:])
    with pytest.raises(ConfigError, match="has 2 parity shards, but 1 were given"):
        codec.update(0, shards[0], shards[1], shards[3:4])
    with pytest.raises(ConfigError, match="not 3 different shards"):
        codec.fold([0, 1, 1], {2: blank(10)})
    with pytest.raises(ConfigError, match="nothing is wanted; name at least one shard"):
        codec.fold([0, 1, 2], {})


def test_numbers_of_no_shard_are_refused() -> None:
    codec = Codec(2, 1)
    shards = encoded(codec, 10)
    for wrong in (-1, 3):
        with pytest.raises(ConfigError, match=f"no shard {wrong}; its shards are 0..2"):
            codec.decode(dict(enumerate(shards)), {wrong: blank(10)})
        with pytest.raises(ConfigError, match=f"no shard {wrong}"):
            codec.fold([0, wrong], {1: blank(10)})
    with pytest.raises(ConfigError, match=r"Shard 2 is no data shard .* name 0..1"):
        codec.update(2, shards[0], shards[1], shards[2:])


@pytest.mark.parametrize(
    ("wrong", "sentence"),
    [
        (torch.zeros(9, dtype=torch.uint8), r"data\[1\] has 9 bytes but data\[0\] has 10; pad all"),
        (torch.zeros(10, dtype=torch.int8), r"data\[1\] is torch.int8 of 1 .* pass flat.view"),
        (torch.zeros(10, 1, dtype=torch.uint8), r"data\[1\] is torch.uint8 of 2 dimensions"),
        (torch.zeros(20, dtype=torch.uint8)[::2], r"data\[1\] is not contiguous; pass the buffer itself"),
        (torch.zeros(10, dtype=torch.uint8, device="meta"), r"data\[1\] is on meta"),
    ],
)
def test_buffers_that_cannot_work_are_refused_before_a_byte_is_written(wrong: Tensor, sentence: str) -> None:
    for engine in ENGINES.values():
        if engine.carries(galois.parity_matrix(3, 1)):
            parity = blank(10)
            with pytest.raises(ConfigError, match=sentence):
                Codec(3, 1, engine).encode([blank(10), wrong, blank(10)], [parity])
            assert content(parity) == b"\xa5" * 10


def test_an_output_that_shares_memory_is_refused() -> None:
    codec, memory = Codec(2, 1), blank(100)
    with pytest.raises(ConfigError, match=r"parity\[0\] shares memory with data\[1\]"):
        codec.encode([memory[:30], memory[30:60]], [memory[59:89]])
    with pytest.raises(ConfigError, match=r"data\[1\] shares memory with parity\[0\]"):
        codec.encode([memory[:30], memory[59:89]], [memory[30:60]])
    codec.encode([memory[:30], memory[:30]], [memory[30:60]])  # two inputs may be one


def test_a_range_beyond_the_shards_is_refused() -> None:
    codec = Codec(2, 1)
    shards = encoded(codec, 10)
    for start, stop in ((-1, 5), (6, 5), (0, 11)):
        with pytest.raises(ConfigError, match=rf"range {start}\.\.{stop} is not within the shards' 10 bytes"):
            codec.encode(shards[:2], shards[2:], start, stop)

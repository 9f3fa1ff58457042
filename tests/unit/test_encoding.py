"""What a state_dict holds besides large tensors comes back with its types and bits, or is refused by name."""

from __future__ import annotations

import contextlib
import functools
import json
import math
import struct
import warnings
from collections import Counter, OrderedDict, namedtuple
from collections.abc import Callable
from typing import Any

import numpy
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.optim import SGD, Adam, Optimizer, lr_scheduler, swa_utils

from elastic.encoding import ENCODED_SIZE_BYTES_MAX, decode, encode, flat_bytes, raw_view
from elastic.errors import ConfigError, TransferError


def same(one: Any, other: Any) -> bool:
    """Equal, of the same types, to the last bit, in the same order."""
    if type(one) is not type(other):
        return False
    if isinstance(one, torch.Tensor):
        return one.dtype == other.dtype and one.shape == other.shape and bits(one) == bits(other)
    if isinstance(one, numpy.ndarray | numpy.generic):
        return one.dtype == other.dtype and one.shape == other.shape and one.tobytes() == other.tobytes()
    if isinstance(one, float):
        return (math.isnan(one) and math.isnan(other)) or struct.pack("<d", one) == struct.pack("<d", other)
    if isinstance(one, dict):
        return len(one) == len(other) and all(
            same(a, b) and same(one[a], other[b]) for a, b in zip(one, other, strict=True)
        )
    if isinstance(one, list | tuple):
        return len(one) == len(other) and all(map(same, one, other))
    return bool(one == other)


def bits(tensor: torch.Tensor) -> bytes:
    data = flat_bytes(tensor)
    return bytes(raw_view(data))


SCALARS = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.floats(),
    st.text(),
    st.binary(),
    st.sampled_from([torch.float32, torch.bfloat16, torch.device("cpu"), torch.device("cuda", 1)]),
)
KEYS = st.one_of(st.none(), st.booleans(), st.integers(), st.floats(allow_nan=False), st.text(), st.binary())
VALUES = st.recursive(
    SCALARS,
    lambda inner: st.one_of(
        st.lists(inner, max_size=4),
        st.lists(inner, max_size=4).map(tuple),
        st.dictionaries(st.one_of(KEYS, st.tuples(KEYS, KEYS)), inner, max_size=4),
        st.dictionaries(KEYS, inner, max_size=4).map(OrderedDict),
        st.dictionaries(KEYS, st.integers(), max_size=4).map(Counter),
        st.frozensets(KEYS, max_size=3),
        st.sets(KEYS, max_size=3),
    ),
    max_leaves=12,
)


@given(VALUES)
def test_every_value_comes_back_as_it_was(value: Any) -> None:
    text = encode(value)
    assert text.isascii()
    assert same(decode(text), value)


@pytest.mark.parametrize(
    "value",
    [
        -0.0,
        5e-324,
        0.1 + 0.2,
        1,
        1.0,
        True,
        -(2**4000),
        "\ud800 lone surrogate",
        torch.Size([2, 3]),
        torch.tensor(True),
        torch.tensor(3),
        torch.tensor(float("nan"), dtype=torch.bfloat16),
        torch.empty(0, 3),
        torch.arange(6, dtype=torch.float64).reshape(2, 3).t(),
        torch.tensor([1 + 2j]).conj(),
        torch.nn.functional.one_hot(torch.arange(3)).to(torch.float8_e4m3fn),
        numpy.float64(1.5),
        numpy.float32("inf"),
        numpy.int8(-3),
        numpy.bool_(True),
        numpy.str_("text"),
        numpy.datetime64("2024-01-01T00:00:00", "ns"),
        numpy.arange(6).reshape(2, 3).T,
        numpy.empty((0, 2), dtype="<f2"),
        numpy.random.RandomState(5).get_state(),
    ],
    ids=lambda value: repr(value)[:40],
)
def test_types_and_bits_are_kept(value: Any) -> None:
    assert same(decode(encode(value)), value)


def test_decoded_tensors_share_nothing_with_the_source() -> None:
    source = {"lr": torch.tensor(0.5), "list": [1]}
    copy = decode(encode(source))
    copy["lr"].fill_(9)
    copy["list"].append(2)
    assert source == {"lr": torch.tensor(0.5), "list": [1]}


class Custom:
    """An object that only its own program knows."""


class Stateful:
    """A callable that carries state, which must not be lost in silence."""

    def __call__(self) -> None: ...


Pair = namedtuple("Pair", "a b")


@pytest.mark.parametrize(
    ("value", "words"),
    [
        (
            {"hook": [1, Custom()]},
            ("state['hook'][1]", "test_encoding.Custom", "keep it out of the state_dict"),
        ),
        ({"f": Stateful()}, ("state['f']", "Stateful")),
        ({"a": Pair(1, 2)}, ("state['a']", "Pair")),
        ({Pair(1, 2): 3}, ("a key of state", "Pair")),
        ({"z": 1j}, ("state['z']", "builtins.complex")),
        ({"w": torch.zeros(100_000)}, ("state['w']", "400000 bytes", "parameter or buffer of a model")),
        ({"w": numpy.zeros(100_000)}, ("state['w']", "800000 bytes")),
        ({"s": torch.zeros(2, 2).to_sparse()}, ("state['s']", "sparse")),
        ({"m": torch.zeros(2, device="meta")}, ("state['m']", "meta")),
        ({"o": numpy.array([Custom()])}, ("state['o']", "object")),
        ({"i": 1 << 5000}, ("state['i']", "5001 bits")),
    ],
    ids=lambda value: repr(value)[:30],
)
def test_what_cannot_be_sent_is_named_by_path_and_type(value: Any, words: tuple[str, ...]) -> None:
    with pytest.raises(ConfigError) as caught:
        encode(value)
    for word in words:
        assert word in str(caught.value)


def test_a_value_that_contains_itself_is_refused() -> None:
    loop: list[Any] = []
    loop.append(loop)
    with pytest.raises(ConfigError, match="contains itself"):
        encode(loop)


def test_functions_stay_with_the_receiver() -> None:
    def mine(x: float) -> float:
        return x

    theirs = {
        "gamma": 0.5,
        "fn": math.sin,
        "fns": [math.cos, 2],
        "part": functools.partial(pow, 2),
        "cls": dict,
    }
    own = {"gamma": 0.1, "fn": mine, "fns": [mine, 7], "part": mine, "cls": list}
    assert decode(encode(theirs), own) == {
        "gamma": 0.5,
        "fn": mine,
        "fns": [mine, 2],
        "part": mine,
        "cls": list,
    }
    # An entry of a dict may be missing; a list would otherwise come out with a hole.
    assert decode(encode({"gamma": 0.5, "fn": math.sin}), {}) == {"gamma": 0.5}
    for value, own in (([math.sin], []), ((1, math.sin), None), (math.sin, None)):
        with pytest.raises(ConfigError, match="function"):
            decode(encode(value), *([own] if own is not None else []))


@pytest.mark.parametrize(
    "text",
    [
        "",
        "{",
        "NaN",
        "Infinity",
        "{}",
        '{"tuple":[1],"dict":[]}',
        '{"pickle":"gASVAA=="}',
        '{"tuple":3}',
        '{"dict":[[1]]}',
        '{"dict":[[1,2],[1,3]]}',
        '{"dict":[[[],2]]}',
        '{"dict":3}',
        '{"set":[[1]]}',
        '{"bytes":"*"}',
        '{"bytes":3}',
        '{"float":"1.0"}',
        '{"float":[]}',
        '{"dtype":"os"}',
        '{"device":"nowhere"}',
        '{"size":["a"]}',
        '{"tensor":["float32",[2],"AAAA"]}',
        '{"tensor":["float32",[-1],"AAAAAA=="]}',
        '{"tensor":["float32",[1e3],""]}',
        '{"tensor":["system",[1],""]}',
        '{"tensor":7}',
        '{"numpy":["|O",[],"AAAAAAAAAAA="]}',
        '{"array":["<f8",[2],"AAAA"]}',
        '{"array":["<f8",[-1],"AAAAAAAAAAA="]}',
        "9" * 5000,
        "[" * 5000 + "]" * 5000,
        "[" * 100_000,
        " " * (ENCODED_SIZE_BYTES_MAX + 1),
    ],
    ids=lambda text: repr(text)[:40],
)
def test_malformed_text_is_one_clear_error(text: str) -> None:
    with pytest.raises(TransferError):
        decode(text)


@given(VALUES, st.data())
def test_damaged_text_is_an_error_of_ours_or_another_value(value: Any, data: st.DataObject) -> None:
    text = encode(value)
    place = data.draw(st.integers(0, len(text) - 1))
    damaged = text[:place] + data.draw(st.sampled_from('"[]{}:,019aN\\')) + text[place + 1 :]
    with contextlib.suppress(TransferError, ConfigError):
        decode(damaged)


def scale(x: float) -> float:
    return 0.5**x


class Warmup:
    """A callable object, whose attributes LambdaLR ships."""

    def __init__(self, steps: int) -> None:
        self.steps = steps

    def __call__(self, epoch: int) -> float:
        return min(1.0, (epoch + 1) / self.steps)


SCHEDULERS: dict[str, Callable[[Optimizer], Any]] = {
    "LambdaLR": lambda o: lr_scheduler.LambdaLR(o, lambda epoch: 0.9**epoch),
    "LambdaLR with an object": lambda o: lr_scheduler.LambdaLR(o, Warmup(4)),
    "MultiplicativeLR": lambda o: lr_scheduler.MultiplicativeLR(o, lambda epoch: 0.9),
    "StepLR": lambda o: lr_scheduler.StepLR(o, 2, 0.5),
    "MultiStepLR": lambda o: lr_scheduler.MultiStepLR(o, [2, 4, 4], 0.5),
    "ConstantLR": lambda o: lr_scheduler.ConstantLR(o, 0.5, 3),
    "LinearLR": lambda o: lr_scheduler.LinearLR(o, 0.1, 1.0, 5),
    "ExponentialLR": lambda o: lr_scheduler.ExponentialLR(o, 0.9),
    "PolynomialLR": lambda o: lr_scheduler.PolynomialLR(o, 8, 2.0),
    "CosineAnnealingLR": lambda o: lr_scheduler.CosineAnnealingLR(o, 6),
    "CosineAnnealingWarmRestarts": lambda o: lr_scheduler.CosineAnnealingWarmRestarts(o, 3, 2),
    "OneCycleLR": lambda o: lr_scheduler.OneCycleLR(o, 0.2, 12),
    "OneCycleLR linear": lambda o: lr_scheduler.OneCycleLR(
        o, 0.2, 12, anneal_strategy="linear", three_phase=True, cycle_momentum=False
    ),
    "CyclicLR": lambda o: lr_scheduler.CyclicLR(o, 0.01, 0.1, 3, mode="triangular2", cycle_momentum=False),
    "CyclicLR with a function": lambda o: lr_scheduler.CyclicLR(o, 0.01, 0.1, 3, scale_fn=scale),
    "ReduceLROnPlateau": lambda o: lr_scheduler.ReduceLROnPlateau(o, patience=1),
    "SequentialLR": lambda o: lr_scheduler.SequentialLR(
        o, [lr_scheduler.ConstantLR(o, 0.1, 3), lr_scheduler.ExponentialLR(o, 0.9)], [3]
    ),
    "ChainedScheduler": lambda o: lr_scheduler.ChainedScheduler(
        [lr_scheduler.ConstantLR(o, 0.1, 3), lr_scheduler.LambdaLR(o, lambda epoch: 0.9)], o
    ),
    "SWALR": lambda o: swa_utils.SWALR(o, 0.05, anneal_epochs=4),
}


def optimizer_with(lr: float | torch.Tensor) -> Optimizer:
    groups = [{"params": [torch.nn.Parameter(torch.ones(2))]} for _ in range(2)]
    # OneCycleLR and CyclicLR turn the momentum too. A tensor as learning rate is Adam's way (capturable).
    return Adam(groups, lr=lr) if isinstance(lr, torch.Tensor) else SGD(groups, lr=lr, momentum=0.9)


def advance(optimizer: Optimizer, scheduler: Any, steps: int) -> list[list[Any]]:
    """Steps of a schedule, and the settings after each."""
    history = []
    for step in range(steps):
        optimizer.step()
        if isinstance(scheduler, lr_scheduler.ReduceLROnPlateau):
            scheduler.step(1.0 + 0.1 * (step % 2))
        else:
            scheduler.step()
        history.append(
            [{k: v for k, v in group.items() if k != "params"} for group in optimizer.param_groups]
        )
        history[-1] = decode(encode(history[-1]))  # A copy: tensors change in place.
    return history


def test_the_table_knows_every_scheduler_of_torch() -> None:
    covered = {type(make(optimizer_with(0.1))).__name__ for make in SCHEDULERS.values()}
    exported = {name for name in lr_scheduler.__all__ if name != "LRScheduler"} | {"SWALR"}
    assert exported <= covered


@pytest.mark.parametrize("lr_is_tensor", [False, True], ids=["float", "tensor"])
@pytest.mark.parametrize("name", SCHEDULERS)
def test_every_scheduler_goes_on_as_if_it_had_never_moved(name: str, lr_is_tensor: bool) -> None:
    if lr_is_tensor and name.startswith("CyclicLR with"):
        pytest.skip("cycles the momentum, which Adam has under another name")
    make = SCHEDULERS[name]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Some schedulers warn on their own account.
        mine, theirs = (optimizer_with(torch.tensor(0.1) if lr_is_tensor else 0.1) for _ in range(2))
        old, new = make(theirs), make(mine)
        advance(theirs, old, 5)
        sent = old.state_dict()
        received = decode(encode(sent), new.state_dict())
        assert same({k: v for k, v in received.items() if k in sent}, sent)
        new.load_state_dict(received)
        for group, source in zip(mine.param_groups, theirs.param_groups, strict=True):
            settings = decode(encode({k: v for k, v in source.items() if k != "params"}))
            for key, value in settings.items():
                # In place: groups made from one default share its tensor, and torch's plateau scheduler then
                # reduces it once for each of them.
                group[key] = group[key].copy_(value) if isinstance(value, torch.Tensor) else value
        assert same(advance(mine, new, 6), advance(theirs, old, 6))


def test_the_text_is_ordinary_json() -> None:
    assert json.loads(encode({"a": (1, 2.5)})) == {"dict": [["a", {"tuple": [1, 2.5]}]]}


@pytest.mark.parametrize(
    "tensor",
    [
        torch.zeros(()),
        torch.zeros(0, 4),
        torch.tensor([True, False]),
        torch.arange(12.0).reshape(3, 4).t(),
        torch.arange(3, dtype=torch.bfloat16),
    ],
    ids=lambda tensor: f"{tensor.dtype}{tuple(tensor.shape)}",
)
def test_flat_bytes_are_the_row_major_bytes(tensor: torch.Tensor) -> None:
    assert bits(tensor) == bytes(tensor.clone(memory_format=torch.contiguous_format).untyped_storage())
    assert flat_bytes(tensor).is_cpu
    if tensor.is_contiguous() and tensor.numel():
        assert flat_bytes(tensor).data_ptr() == tensor.data_ptr()

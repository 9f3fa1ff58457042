"""A replica's state, read and written as bytes: whoever adopts it trains on with the same bits."""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn, optim
from torch.optim import Optimizer, lr_scheduler

from elastic.encoding import flat_bytes
from elastic.errors import ConfigError, TransferError
from elastic.state import Entry, EntryKind, TrainingState


class Net(nn.Module):
    """Tied weights, batch norm, channels-last memory, a frozen and an unused parameter."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(2, 4, 3).to(memory_format=torch.channels_last)
        self.norm = nn.BatchNorm2d(4)
        self.up = nn.Linear(16, 6, bias=False)
        self.down = nn.Linear(6, 3)
        self.again = nn.Linear(6, 3, bias=False)
        self.again.weight = self.down.weight
        self.scale = nn.Parameter(torch.randn(()))
        self.unused = nn.Parameter(torch.randn(3))
        self.frozen = nn.Parameter(torch.randn(2).bfloat16(), requires_grad=False)
        self.empty = nn.Parameter(torch.randn(0, 3))
        self.register_buffer("mask", torch.tensor([True, False]), persistent=False)

    def forward(self, images: Tensor) -> Tensor:
        features = self.up(self.norm(self.conv(images)).mean(1).flatten(1)).tanh()
        return (self.down(features) + self.again(features)) * self.scale


def trained_parameters(net: Net) -> list[nn.Parameter]:
    return [parameter for parameter in net.parameters() if parameter.requires_grad]


def two_groups(net: Net) -> list[dict[str, Any]]:
    parameters = trained_parameters(net)
    return [{"params": parameters[:3], "weight_decay": 0.01, "name": "first"}, {"params": parameters[3:]}]


def matrices(net: Net) -> list[nn.Parameter]:
    return [parameter for parameter in net.parameters() if parameter.ndim == 2 and parameter.numel()]


OPTIMIZERS: dict[str, Callable[[Net], Optimizer]] = {
    "SGD": lambda net: optim.SGD(two_groups(net), lr=0.1),
    "SGD momentum": lambda net: optim.SGD(two_groups(net), lr=0.1, momentum=0.9, dampening=0.1),
    "SGD nesterov": lambda net: optim.SGD(two_groups(net), lr=0.1, momentum=0.9, nesterov=True),
    "Adam": lambda net: optim.Adam(two_groups(net), lr=0.1),
    "Adam tensor lr": lambda net: optim.Adam(two_groups(net), lr=torch.tensor(0.1), foreach=False),
    "Adam fused": lambda net: optim.Adam(two_groups(net), lr=0.1, fused=True),
    "Adam foreach": lambda net: optim.Adam(two_groups(net), lr=0.1, foreach=True),
    "AdamW": lambda net: optim.AdamW(trained_parameters(net), lr=0.1),
    "AdamW amsgrad": lambda net: optim.AdamW(two_groups(net), lr=0.1, amsgrad=True),
    "Adagrad": lambda net: optim.Adagrad(
        two_groups(net), lr=0.1, lr_decay=0.1, initial_accumulator_value=0.5
    ),
    "Adadelta": lambda net: optim.Adadelta(two_groups(net), lr=1.0),
    "Adamax": lambda net: optim.Adamax(two_groups(net), lr=0.1),
    "NAdam": lambda net: optim.NAdam(two_groups(net), lr=0.1),
    "RAdam": lambda net: optim.RAdam(two_groups(net), lr=0.1),
    "RMSprop": lambda net: optim.RMSprop(two_groups(net), lr=0.01, momentum=0.9, centered=True),
    "Rprop": lambda net: optim.Rprop(trained_parameters(net), lr=0.01),
    "ASGD": lambda net: optim.ASGD(two_groups(net), lr=0.1, t0=2),
    "Adafactor": lambda net: optim.Adafactor(two_groups(net), lr=0.1),
}
if hasattr(optim, "Muon"):  # Since torch 2.9.
    OPTIMIZERS["Muon"] = lambda net: optim.Muon(matrices(net), lr=0.1)
NOT_MOVED = {"LBFGS", "SparseAdam", "Optimizer"}


def no_schedule(optimizer: Optimizer) -> dict[str, Any]:
    return {}


def warmup(optimizer: Optimizer) -> dict[str, Any]:
    first = lr_scheduler.LambdaLR(optimizer, lambda epoch: (epoch + 1) / 4)
    second = lr_scheduler.CosineAnnealingLR(optimizer, 8)
    plateau = lr_scheduler.ReduceLROnPlateau(optimizer, patience=0)
    return {"main": lr_scheduler.SequentialLR(optimizer, [first, second], [3]), "plateau": plateau}


def build(
    seed: int,
    make_optimizer: Callable[[Net], Optimizer] = OPTIMIZERS["Adam"],
    make_schedulers: Callable[[Optimizer], dict[str, Any]] = no_schedule,
) -> TrainingState:
    torch.manual_seed(seed)
    net = Net()
    optimizer = make_optimizer(net)
    return TrainingState({"main": net}, {"main": optimizer}, make_schedulers(optimizer))


def train(state: TrainingState, first_step: int, steps: int) -> None:
    optimizer = state.optimizers["main"]
    for step in range(first_step, first_step + steps):
        images = torch.randn(3, 2, 6, 6, generator=torch.Generator().manual_seed(step))
        optimizer.zero_grad()
        loss = state.models["main"](images).square().mean()
        loss.backward()
        optimizer.step()
        for name, scheduler in state.stateful.items():
            scheduler.step(*([1.0] if name == "plateau" else []))


def hand_over(donor: TrainingState, joiner: TrainingState) -> None:
    """What a transfer does, without the network."""
    text = json.dumps([entry.to_json() for entry in donor.manifest()])
    destinations = joiner.adopt([Entry.from_json(fields) for fields in json.loads(text)], donor.small())
    for destination, source in zip(destinations, donor.tensors(), strict=True):
        destination.copy_(source)


def assert_same(one: TrainingState, other: TrainingState) -> None:
    assert one.manifest() == other.manifest()
    assert one.small() == other.small()
    assert one.digest_model() == other.digest_model()
    for entry, mine, theirs in zip(one.manifest(), one.tensors(), other.tensors(), strict=True):
        assert torch.equal(flat_bytes(mine), flat_bytes(theirs)), entry.label


@pytest.fixture(autouse=True)
def quiet() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.filterwarnings(
            "ignore", message=".*lr_scheduler.step.*|.*epoch parameter.*|.*zero-element.*"
        )
        yield


def test_the_table_knows_every_optimizer_of_torch() -> None:
    exported = {
        name
        for name in optim.__all__
        if isinstance(getattr(optim, name), type) and issubclass(getattr(optim, name), Optimizer)
    }
    assert exported - NOT_MOVED <= {name.partition(" ")[0] for name in OPTIMIZERS}


@pytest.mark.parametrize("joiner_steps", [0, 2], ids=["fresh joiner", "joiner with a past"])
@pytest.mark.parametrize("make_schedulers", [no_schedule, warmup])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_joiner_trains_on_with_the_same_bits(
    name: str, make_schedulers: Callable[[Optimizer], dict[str, Any]], joiner_steps: int
) -> None:
    donor, joiner = (build(seed, OPTIMIZERS[name], make_schedulers) for seed in (1, 2))
    train(donor, 1, 4)
    train(joiner, 50, joiner_steps)
    assert joiner.digest_model() != donor.digest_model()
    hand_over(donor, joiner)
    assert_same(donor, joiner)
    for state in (donor, joiner):
        train(state, 5, 3)
    assert_same(donor, joiner)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_state_before_the_first_step_can_be_moved_too(name: str) -> None:
    donor, joiner = (build(seed, OPTIMIZERS[name], warmup) for seed in (1, 2))
    train(joiner, 50, 2)  # What the joiner has learnt must be gone.
    hand_over(donor, joiner)
    for state in (donor, joiner):
        train(state, 1, 2)
    assert_same(donor, joiner)


def test_who_joined_hands_on_exactly_what_it_was_given() -> None:
    first, second, third = (build(seed, OPTIMIZERS["AdamW amsgrad"], warmup) for seed in (1, 2, 3))
    train(first, 1, 3)
    hand_over(first, second)
    hand_over(second, third)
    assert_same(first, third)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_reading_changes_nothing(name: str) -> None:
    state = build(1, OPTIMIZERS[name], warmup)
    optimizer = state.optimizers["main"]

    def picture() -> tuple[Any, ...]:
        return (
            [list(group.items()) for group in optimizer.param_groups],
            [[(key, id(value)) for key, value in values.items()] for values in optimizer.state.values()],
            [tensor._version for tensor in state.tensors()],
            [parameter.grad is None for parameter in state.models["main"].parameters()],
        )

    for steps in (0, 2):
        train(state, 1, steps)
        with torch.no_grad():
            before, digest = picture(), state.digest_model()
        state.manifest(), state.small(), state.tensors(), state.described_tensors()
        assert str(picture()) == str(before)
        assert state.digest_model() == digest


def test_the_small_part_is_no_alias_of_live_state() -> None:
    donor = build(1, OPTIMIZERS["Adam tensor lr"], warmup)
    train(donor, 1, 2)
    text, joiner = donor.small(), build(2, OPTIMIZERS["Adam tensor lr"], warmup)
    joiner.adopt(donor.manifest(), text)
    lr = joiner.optimizers["main"].param_groups[0]["lr"]
    train(donor, 3, 3)
    assert joiner.small() == text
    assert lr is joiner.optimizers["main"].param_groups[0]["lr"]


def test_settings_changed_by_hand_and_initial_lr_survive() -> None:
    donor, joiner = build(1, make_schedulers=warmup), build(2, make_schedulers=warmup)
    train(donor, 1, 2)
    group = donor.optimizers["main"].param_groups[0]
    group.update(lr=0.123, initial_lr=0.456, betas=(0.8, 0.9), note="by hand")
    joiner.optimizers["main"].param_groups[0]["stale"] = 1
    hand_over(donor, joiner)
    adopted = joiner.optimizers["main"].param_groups[0]
    assert {key: value for key, value in adopted.items() if key != "params"} == {
        key: value for key, value in group.items() if key != "params"
    }
    assert adopted["params"][0] is next(joiner.models["main"].parameters())


def test_learning_rates_that_share_a_tensor_still_do() -> None:
    donor, joiner = build(1, OPTIMIZERS["Adam tensor lr"]), build(2, OPTIMIZERS["Adam tensor lr"])
    hand_over(donor, joiner)
    first, second = joiner.optimizers["main"].param_groups
    assert first["lr"] is second["lr"]


def test_state_is_addressed_by_place_and_parameters_without_state_have_none() -> None:
    state = build(1)
    train(state, 1, 1)
    entries = [entry for entry in state.manifest() if entry.kind is EntryKind.OPTIMIZER]
    optimizer = state.optimizers["main"]
    for entry in entries:
        assert entry.name == "main" and entry.address is not None
        group, index, key = entry.address
        parameter = optimizer.param_groups[group]["params"][index]
        assert tuple(optimizer.state[parameter][key].shape) == entry.shape
    places = {
        id(parameter): (group, index)
        for group, values in enumerate(optimizer.param_groups)
        for index, parameter in enumerate(values["params"])
    }
    net = state.models["main"]
    assert places[id(net.unused)] not in {entry.address[:2] for entry in entries if entry.address}
    moment = next(entry for entry in entries if entry.address == (*places[id(net.conv.weight)], "exp_avg"))
    assert moment.stride == (18, 1, 6, 2)  # As the channels-last weight that it belongs to.


def test_a_manifest_lists_parameters_then_buffers_then_optimizer_state_each_tensor_once() -> None:
    state = build(1)
    train(state, 1, 1)
    entries = state.manifest()
    names = [entry.name for entry in entries if entry.address is None]
    assert "main.down.weight" in names and "main.again.weight" not in names
    assert names.index("main.norm.running_mean") > names.index("main.down.bias")
    kinds = [entry.kind for entry in entries]
    assert kinds == sorted(kinds, key=list(EntryKind).index)
    by_name = {entry.name: entry for entry in entries if entry.address is None}
    assert by_name["main.frozen"] == Entry(EntryKind.PARAMETER, "main.frozen", "bfloat16", (2,), "cpu")
    assert by_name["main.frozen"].size_bytes == 4
    assert by_name["main.norm.num_batches_tracked"].shape == ()
    assert by_name["main.empty"].size_bytes == 0


def test_the_order_of_insertion_does_not_reach_the_manifest() -> None:
    state = build(1)
    train(state, 1, 1)
    before = state.manifest()
    optimizer = state.optimizers["main"]
    for parameter, values in list(optimizer.state.items())[::-1]:
        del optimizer.state[parameter]
        optimizer.state[parameter] = dict(reversed(values.items()))
    assert state.manifest() == before


class Counting(optim.SGD):
    """An optimizer with plain numbers in its state, per parameter and for all."""

    def step(self, closure: Any = None) -> Any:
        loss = super().step(closure)
        self.state["calls"] = self.state.get("calls", 0) + 1
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    seen = self.state[parameter].get("seen", (0, None))
                    self.state[parameter]["seen"] = (seen[0] + 1, torch.tensor([seen[0]]))
                    parameter.data.mul_(1 - 0.01 * seen[0] - 0.001 * self.state["calls"])
        return loss


def test_plain_values_in_an_optimizers_state_travel_in_the_small_part() -> None:
    def counting(net: Net) -> Optimizer:
        return Counting(trained_parameters(net), lr=0.1, momentum=0.9)

    donor, joiner = build(1, counting), build(2, counting)
    train(donor, 1, 3)
    hand_over(donor, joiner)
    for state in (donor, joiner):
        train(state, 4, 2)
    assert_same(donor, joiner)
    assert joiner.optimizers["main"].state["calls"] == 5


def test_several_models_and_optimizers_with_shared_parameters() -> None:
    def pair(seed: int) -> TrainingState:
        torch.manual_seed(seed)
        left, right = nn.Linear(3, 3), nn.Linear(3, 3)
        right.weight = left.weight
        optimizers = {"b": optim.Adam(left.parameters()), "a": optim.SGD([right.bias], momentum=0.9)}
        sum((p * p).sum() for p in [*left.parameters(), right.bias]).backward()
        for optimizer in optimizers.values():
            optimizer.step()
        return TrainingState({"right": right, "left": left}, optimizers, {})  # type: ignore[arg-type]

    donor, joiner = pair(1), pair(2)
    hand_over(donor, joiner)
    assert_same(donor, joiner)
    names = [entry.name for entry in donor.manifest() if entry.kind is EntryKind.PARAMETER]
    assert names == ["left.weight", "left.bias", "right.bias"]
    assert joiner.models["left"].weight is joiner.models["right"].weight


def test_a_copy_of_buffers_is_read_and_written_in_place_of_the_modules() -> None:
    def with_copy(seed: int) -> TrainingState:
        state = build(seed)
        train(state, 1, 1)
        net = state.models["main"]
        copies = {
            f"main.{name}": buffer.clone()
            for name, buffer in net.named_buffers()
            if buffer.is_floating_point()
        }
        return TrainingState(state.models, state.optimizers, {}, copies)

    donor, joiner = with_copy(1), with_copy(2)
    committed = donor.digest_model()
    with torch.no_grad():
        donor.models["main"].norm.running_mean.fill_(77)  # A slot in progress.
    assert donor.digest_model() == committed
    own = joiner.models["main"].norm.running_mean.clone()
    hand_over(donor, joiner)
    assert joiner.digest_model() == committed
    assert torch.equal(joiner.models["main"].norm.running_mean, own)
    assert torch.equal(joiner.buffers["main.norm.running_mean"], donor.buffers["main.norm.running_mean"])
    with pytest.raises(ConfigError, match=r"no buffer 'main.nothing'"):
        TrainingState(joiner.models, {}, {}, {"main.nothing": torch.zeros(1)}).manifest()


def test_the_digest_compares_names_dtypes_shapes_and_bits() -> None:
    class Holder(nn.Module):
        def __init__(self, name: str, tensor: Tensor) -> None:
            super().__init__()
            self.register_buffer(name, tensor)

    def digest(name: str, tensor: Tensor) -> str:
        return TrainingState({"m": Holder(name, tensor)}, {}, {}).digest_model()

    zero = torch.zeros(2, 2)
    digests = [
        digest("a", zero),
        digest("b", zero),
        digest("a", zero.view(4)),
        digest("a", zero.to(torch.int32)),
        digest("a", -zero),
        digest("a", torch.tensor([[0, 0], [0, float("nan")]])),
    ]
    assert len(set(digests)) == len(digests)
    assert all(len(value) == 32 and int(value, 16) >= 0 for value in digests)
    matrix = torch.arange(6.0).reshape(2, 3)
    assert digest("a", matrix) == digest("a", matrix.t().contiguous().t())


def test_the_digest_ignores_the_order_in_which_modules_were_made() -> None:
    one, two = nn.Linear(2, 2), nn.Linear(2, 3)
    forward = TrainingState({"m": nn.ModuleDict({"a": one, "b": two})}, {}, {})
    backward = TrainingState({"m": nn.ModuleDict({"b": two, "a": one})}, {}, {})
    assert forward.digest_model() == backward.digest_model()


def linear(*sides: int, **options: Any) -> TrainingState:
    model = nn.Linear(*sides, **options)
    return TrainingState({"m": model}, {"o": optim.SGD(model.parameters(), lr=0.1)}, {})


def two_step_lr() -> TrainingState:
    state = linear(2, 3)
    scheduler = lr_scheduler.StepLR(state.optimizers["o"], 1)
    return TrainingState(state.models, state.optimizers, {"s": scheduler})


def split_groups() -> TrainingState:
    state = linear(2, 3)
    groups = [{"params": [parameter]} for parameter in state.models["m"].parameters()]
    return TrainingState(state.models, {"o": optim.SGD(groups, lr=0.1)}, {})


@pytest.mark.parametrize(
    ("joiner", "sentence"),
    [
        (
            linear(2, 4),
            "The parameter 'm.weight' is float32 of shape (4, 2) on cpu here and float32 of shape (3, 2)",
        ),
        (linear(2, 3, dtype=torch.float64), "The parameter 'm.weight' is float64"),
        (
            linear(2, 3, bias=False),
            "The model has parameter 'm.bias' on the donors only: start every worker with",
        ),
        (
            TrainingState({"n": nn.Linear(2, 3)}, {}, {}),
            "The model has parameter 'n.weight' where the donors have",
        ),
        (TrainingState({"m": nn.Linear(2, 3)}, {}, {}), "The optimizers are [] here and ['o'] on the donors"),
        (two_step_lr(), "The schedulers, scalers and extra states are ['s'] here and [] on the donors"),
        (
            split_groups(),
            "The parameters in the groups of optimizer 'o' are [1, 1] here and [2] on the donors",
        ),
    ],
    ids=lambda value: value[:40] if isinstance(value, str) else "",
)
def test_the_first_difference_is_named_and_nothing_is_changed(joiner: TrainingState, sentence: str) -> None:
    donor = linear(2, 3)
    before = joiner.digest_model(), joiner.small()
    with pytest.raises(ConfigError) as caught:
        joiner.adopt(donor.manifest(), donor.small())
    assert str(caught.value).startswith(sentence)
    assert (joiner.digest_model(), joiner.small()) == before


def test_what_cannot_be_moved_is_refused_in_words() -> None:
    model = nn.Linear(2, 2)
    stranger = nn.Parameter(torch.zeros(1))
    lazy = nn.LazyLinear(3)
    expanded = nn.Module()
    expanded.register_buffer("wide", torch.zeros(1, 3).expand(2, 3))
    cases: list[tuple[Callable[[], Any], str]] = [
        (lambda: TrainingState({}, {"o": optim.LBFGS(model.parameters())}, {}), "'o' is LBFGS"),
        (lambda: TrainingState({}, {"o": optim.SparseAdam(model.parameters())}, {}), "'o' is SparseAdam"),
        (lambda: TrainingState({}, {}, {"s": object()}), "'s' .object. has no state_dict"),
        (
            lambda: TrainingState(
                {"m": model}, {"o": optim.SGD([*model.parameters(), stranger])}, {}
            ).manifest(),
            "Parameter 2 in group 0 of optimizer 'o' belongs to none of the models",
        ),
        (lambda: TrainingState({"m": lazy}, {}, {}).manifest(), "'m.weight' is a UninitializedParameter"),
        (
            lambda: TrainingState({"m": expanded}, {}, {}).adopt(
                TrainingState({"m": expanded}, {}, {}).manifest(),
                TrainingState({"m": expanded}, {}, {}).small(),
            ),
            "'m.wide' is an expanded tensor",
        ),
        (
            lambda: TrainingState(
                {"a": nn.ModuleDict({"b": model}), "a.b": nn.Linear(2, 2)}, {}, {}
            ).manifest(),
            "Two tensors of the models are called 'a.b.weight'",
        ),
    ]
    for act, words in cases:
        with pytest.raises(ConfigError, match=words):
            act()


GOOD = ["optimizer", "main", "float32", [2, 3], "cpu", [0, 1, "exp_avg"], None, None]


@pytest.mark.parametrize(
    "change",
    [
        {0: "gradient"},
        {0: "parameter"},
        {1: 7},
        {2: "float31"},
        {3: [2, -3]},
        {3: [2.0]},
        {3: "23"},
        {3: [1] * 100},
        {4: None},
        {5: None},
        {5: [0, 1]},
        {5: [0, -1, "exp_avg"]},
        {6: [9, 9]},
        {6: [1]},
        {7: "halved"},
    ],
    ids=str,
)
def test_a_malformed_manifest_is_refused(change: dict[int, Any]) -> None:
    assert Entry.from_json(GOOD).address == (0, 1, "exp_avg")
    fields = [change.get(place, value) for place, value in enumerate(GOOD)]
    for bad in (fields, GOOD[:-1], None, "abcdefg"):
        with pytest.raises(TransferError):
            Entry.from_json(bad)


def test_a_manifest_that_contradicts_the_optimizers_is_refused() -> None:
    state = build(1)
    train(state, 1, 1)
    model = [entry for entry in state.manifest() if entry.address is None]
    for name, address in (
        ("other", (0, 0, "exp_avg")),
        ("main", (0, 99, "exp_avg")),
        ("main", (9, 0, "exp_avg")),
    ):
        stray = Entry(EntryKind.OPTIMIZER, name, "float32", (2,), "cpu", address)
        with pytest.raises(TransferError, match="unknown"):
            state.adopt([*model, stray], state.small())

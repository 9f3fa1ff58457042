"""Snapshots are what the state was, whoever copied which share of it, and damage is found before it is believed."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn, optim

from elastic.capture import PIECE_SIZE_BYTES, Capturer, restore
from elastic.errors import ConfigError, TransferError
from elastic.snapshots import SnapshotId
from elastic.state import TrainingState, Watch
from tests.unit.nodes import Node, node
from tests.unit.test_transfer import Holder, content, make_state

OPTIMIZERS: dict[str, Callable[[nn.Module], optim.Optimizer]] = {
    "AdamW": lambda model: optim.AdamW(model.parameters(), lr=0.01),
    "Adam with amsgrad": lambda model: optim.Adam(model.parameters(), amsgrad=True),
    "SGD": lambda model: optim.SGD(model.parameters(), lr=0.1),
    "SGD with momentum": lambda model: optim.SGD(model.parameters(), lr=0.1, momentum=0.9, nesterov=True),
    "Adafactor": lambda model: optim.Adafactor(model.parameters()),
    "RMSprop": lambda model: optim.RMSprop(model.parameters(), centered=True, momentum=0.5),
    "Rprop": lambda model: optim.Rprop(model.parameters()),
}


def train(state: TrainingState, steps: int = 1) -> None:
    (model,), (optimizer,) = state.models.values(), state.optimizers.values()
    for _ in range(steps):
        optimizer.zero_grad()
        sum(parameter.float().square().sum() for parameter in model.parameters()).backward()  # type: ignore[union-attr]
        optimizer.step()


def fresh(name: str, seed: int) -> TrainingState:
    model = Holder(seed, 50)
    model.empty.requires_grad_(name != "Adafactor")  # which divides by the number of elements
    return TrainingState({"main": model}, {"main": OPTIMIZERS[name](model)}, {})


def capture_all(place: Node, state: TrainingState, step: int, count: int, generation: int = 1) -> list[Capturer]:
    """Have `count` workers take one snapshot."""
    capturers = []
    for index in range(count):
        capturers.append(Capturer(state, place.link(f"w{step}.{generation}.{index}"), buffers=1))
        assert capturers[-1].has_room(generation, -1)
        assert capturers[-1].capture(step, generation, index, count)
    return capturers


def flip(place: Node, index: int, offset: int) -> None:
    """Change one bit of one slice in the agent's memory."""
    (fd,) = [held.fd for held in place.do(lambda s: s.held()) if held.slice.index == index]
    (byte,) = os.pread(fd, 1, offset)
    os.pwrite(fd, bytes([byte ^ 4]), offset)


@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize("count", [1, 3])
def test_a_snapshot_restores_the_bits_of_any_optimizer(tmp_path: Path, name: str, count: int) -> None:
    with node(tmp_path) as place:
        state = fresh(name, 1)
        train(state, 3)
        before = content(state)
        capture_all(place, state, 3, count)
        train(state)
        assert content(state) != before
        for target in (state, fresh(name, 2)):
            assert restore(target, place.link("reader"), SnapshotId(3, 1)) == 3
            assert content(target) == before


@settings(max_examples=15, deadline=None)
@given(st.integers(1, 7), st.integers(1, 90), st.integers(0, 2), st.integers(0, 2))
def test_shares_of_any_number_of_workers_make_the_whole(
    tmp_path_factory: pytest.TempPathFactory, count: int, width: int, steps: int, target_steps: int
) -> None:
    with node(tmp_path_factory.mktemp("node")) as place:
        source, target = make_state(1, steps, width), make_state(2, target_steps, width)
        capturers = capture_all(place, source, 9, count)
        assert {capturer.captured_step for capturer in capturers} == {9}
        held = sorted((h.slice.begin, h.slice.end) for h in place.do(lambda s: s.held()))
        assert [begin for begin, _ in held] == [0, *(end for _, end in held[:-1])]
        assert restore(target, place.link("reader"), SnapshotId(9, 1)) == 9
        assert content(target) == content(source)


def test_slices_larger_than_a_piece_are_restored(tmp_path: Path) -> None:
    with node(tmp_path) as place:
        source, target = make_state(1, 1, 12_000), make_state(2, 0, 12_000)
        assert sum(entry.size_bytes for entry in source.manifest()) > 5 * PIECE_SIZE_BYTES
        capture_all(place, source, 1, 2)
        restore(target, place.link("reader"), SnapshotId(1, 1))
        assert content(target) == content(source)


def test_a_model_without_a_single_byte_has_snapshots_too(tmp_path: Path) -> None:
    with node(tmp_path) as place:
        states = [TrainingState({"m": nn.Identity()}, {}, {}) for _ in range(2)]
        capture_all(place, states[0], 1, 2)
        assert restore(states[1], place.link("reader"), SnapshotId(1, 1)) == 1


def test_capturing_only_reads(tmp_path: Path) -> None:
    with node(tmp_path) as place:
        state = make_state(1)
        versions = [tensor._version for tensor in state.tensors()]
        capture_all(place, state, 1, 1)
        assert [tensor._version for tensor in state.tensors()] == versions


def test_each_snapshot_is_of_its_own_step_whatever_the_state_became(tmp_path: Path) -> None:
    """Optimizer state that springs into being, replaced tensors, another share: nothing old is copied."""
    with node(tmp_path) as place:
        state = fresh("AdamW", 1)
        capturer = Capturer(state, place.link("w0"))
        model, optimizer = state.models["main"], state.optimizers["main"]
        assert isinstance(model, Holder)

        def replace_data() -> None:
            model.weight.data = model.weight.data * 2

        def replace_moment() -> None:
            optimizer.state[model.weight]["exp_avg"] = torch.ones_like(model.weight)

        def replace_buffer() -> None:
            model.mask = ~model.mask

        def turn() -> None:
            model.weight.data = torch.randn(40, 50).t()

        def add_group() -> None:
            model.more = nn.Linear(3, 3)
            optimizer.add_param_group({"params": list(model.more.parameters())})

        def forget_state() -> None:
            optimizer.state.clear()

        acts = [train, train, replace_data, replace_moment, replace_buffer, turn, add_group, train, forget_state]
        for step, act in enumerate([lambda s: None, *(a if a is train else lambda s, a=a: a() for a in acts)]):
            act(state)
            assert capturer.has_room(1, step)
            assert capturer.capture(step, 1, 0, 1)
            before = content(state)
            train(state)
            restore(state, place.link("reader"), SnapshotId(step, 1))
            assert content(state) == before, step


def test_an_unchanged_state_is_recognised() -> None:
    state = make_state(1)
    of_weight = state.optimizers["main"].state[state.models["main"].get_parameter("weight")]
    of_weight["note"] = 3
    watch = Watch(state)
    assert watch.unchanged()
    of_weight["note"] = 4  # It belongs to the small state.
    train(state)
    assert watch.unchanged()
    of_weight["note"] = torch.ones(2)
    assert not watch.unchanged()


def test_a_buffer_is_used_again_only_when_nobody_needs_it(tmp_path: Path) -> None:
    with node(tmp_path) as place:
        capturer = Capturer(make_state(1), place.link("w0"))
        for step in (1, 2, 3):
            assert capturer.has_room(1, -1 if step < 3 else 1)
            assert capturer.capture(step, 1, 0, 1)
        assert not capturer.has_room(1, 1)
        assert not capturer.capture(4, 1, 0, 1)
        assert capturer.captured_step == 3
        assert capturer.has_room(1, 2)  # 1 is older than the stable snapshot,
        assert capturer.has_room(2, 1)  # 2 and 3 are of a world that is over,
        assert place.do(lambda s: s.stable) == 1
        assert not capturer.has_room(1, 1)
        assert capturer.has_room(2, 1) and capturer.capture(3, 2, 0, 1) and capturer.capture(4, 2, 0, 1)
        steps = {(h.slice.snapshot.step, h.slice.snapshot.generation) for h in place.do(lambda s: s.held())}
        assert steps == {(1, 1), (3, 2), (4, 2)}  # and the stable one stays.
        assert capturer.protected is None
        place.do(lambda s: s.show_protected(SnapshotId(4, 1)))
        assert capturer.protected == SnapshotId(4, 1)
        assert capturer.cost_s > 0


def test_a_larger_share_gets_larger_buffers_and_what_is_stable_stays(tmp_path: Path) -> None:
    with node(tmp_path) as place:
        state = make_state(1)
        capturer = Capturer(state, place.link("w0"))
        for step in range(3):
            assert capturer.has_room(1, 0) and capturer.capture(step, 1, 0, 3)
        used_bytes = place.do(lambda s: s.used_bytes)
        assert capturer.has_room(2, 0) and capturer.capture(3, 2, 0, 1)
        assert place.do(lambda s: s.used_bytes) > used_bytes
        assert {h.slice.snapshot.step for h in place.do(lambda s: s.held())} >= {0, 3}
        target = make_state(2)
        restore(target, place.link("reader"), SnapshotId(3, 2))
        assert content(target) == content(state)


def test_a_budget_that_is_too_small_is_refused_at_the_first_capture(tmp_path: Path) -> None:
    with node(tmp_path, 2**18) as place:
        capturer = Capturer(make_state(1), place.link("w0"))
        assert capturer.has_room(1, -1)
        with pytest.raises(ConfigError, match=r"snapshots of worker w0 need \d+ MiB of memory.*--snapshot-memory"):
            capturer.capture(1, 1, 0, 1)
        assert capturer.has_room(1, -1) and capturer.captured_step == -1


def test_a_dead_workers_slices_are_restored_by_another(tmp_path: Path) -> None:
    with node(tmp_path) as place:
        source, target = make_state(1), make_state(2)
        capture_all(place, source, 4, 2)
        place.do(lambda s: [s.worker_gone(f"w4.1.{index}") for index in range(2)])
        restore(target, place.link("reader"), SnapshotId(4, 1))
        assert content(target) == content(source)


def test_attempts_at_the_same_step_are_never_mixed(tmp_path: Path) -> None:
    with node(tmp_path) as place:
        source, target = make_state(1), make_state(2)
        capture_all(place, source, 4, 2, generation=1)
        train(source)
        Capturer(source, place.link("other"), buffers=1).capture(4, 2, 0, 2)
        before = content(target)
        with pytest.raises(TransferError, match=r"slice 1 of the snapshot of step 4 \(generation 2\)"):
            restore(target, place.link("reader"), SnapshotId(4, 2))
        with pytest.raises(TransferError, match="slice 0 of the snapshot of step 5"):
            restore(target, place.link("reader"), SnapshotId(5, 1))
        assert content(target) == before


@pytest.mark.parametrize("index", [0, 1])
@pytest.mark.parametrize("where", ["first byte", "last byte", "description"])
def test_a_flipped_bit_is_found_by_the_reader(tmp_path: Path, index: int, where: str) -> None:
    with node(tmp_path) as place:
        source, target = make_state(1), make_state(2)
        capture_all(place, source, 4, 2)
        place.run(place.service.check())
        (piece,) = [held.slice for held in place.do(lambda s: s.held()) if held.slice.index == index]
        before = content(target)
        size_bytes = piece.end - piece.begin
        flip(
            place,
            index,
            {"first byte": 0, "last byte": size_bytes - 1, "description": piece.description_at + 30}[where],
        )
        link = place.link("reader")
        if where == "description":
            with pytest.raises(TransferError, match="description of a slice is damaged"):
                restore(target, link, SnapshotId(4, 1))
        else:
            with pytest.raises(TransferError, match=f"Slice {index} of 2 of the snapshot of step 4 is damaged"):
                restore(target, link, SnapshotId(4, 1))
        if where == "description":
            assert content(target) == before
        place.run(place.service.check(again=True))  # The agent, once asked to look, knows it beforehand.
        before = content(target)
        with pytest.raises(TransferError, match="no longer undamaged"):
            restore(target, link, SnapshotId(4, 1))
        assert content(target) == before


def test_slices_of_different_states_are_not_put_together(tmp_path: Path) -> None:
    with node(tmp_path) as place:
        for index, width in enumerate((30, 31)):
            capturer = Capturer(make_state(1, 1, width), place.link(f"w{index}"), buffers=1)
            assert capturer.capture(4, 1, index, 2)
        with pytest.raises(TransferError, match=r"Slice 1 of 2 .* does not go with slice 0"):
            restore(make_state(2, 1, 30), place.link("reader"), SnapshotId(4, 1))
        for index, steps in enumerate((0, 1)):
            model = nn.Linear(2, 2)
            optimizer = optim.SGD(model.parameters(), lr=0.1, momentum=0.9 if steps else 0.0)
            spare = {} if steps else {"spare": nn.Linear(2, 2)}
            state = TrainingState({"main": model, **spare}, {"main": optimizer}, {})
            for parameter in model.parameters():
                parameter.grad = torch.ones_like(parameter)
            optimizer.step()
            assert Capturer(state, place.link(f"v{index}"), buffers=1).capture(5, 1, index, 2)
        with pytest.raises(TransferError, match=r"Slice 1 of 2 .* describes another state than slice 0"):
            restore(make_state(2), place.link("reader"), SnapshotId(5, 1))


def test_the_snapshot_of_another_model_is_refused_before_anything_is_changed(tmp_path: Path) -> None:
    with node(tmp_path) as place:
        capture_all(place, make_state(1, 1, 30), 4, 1)
        target = make_state(2, 1, 31)
        before = content(target)
        with pytest.raises(ConfigError, match=r"'main.weight' is float32 of shape \(31, 40\)"):
            restore(target, place.link("reader"), SnapshotId(4, 1))
        assert content(target) == before


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_on_an_accelerator_the_copies_run_beside_and_are_complete_when_finished(tmp_path: Path) -> None:
    with node(tmp_path, 2**30) as place:

        def make(seed: int) -> TrainingState:
            torch.manual_seed(seed)
            model = nn.Sequential(
                nn.Linear(1000, 2000), nn.Conv2d(3, 8, 3).to(memory_format=torch.channels_last)
            ).cuda()
            return TrainingState({"main": model}, {"main": optim.AdamW(model.parameters())}, {})

        source, target = make(1), make(2)
        train(source, 2)
        before = content(source)
        capturer = Capturer(source, place.link("w0"), buffers=2)
        for step in (1, 2):
            assert capturer.has_room(1, step)
            assert capturer.capture(step, 1, 0, 1)
            assert capturer.captured_step == step - 1 if step > 1 else -1
            torch.randn(2000, 2000, device="cuda") @ torch.randn(2000, 2000, device="cuda")
            capturer.finish()
            assert capturer.captured_step == step
        train(source)
        restore(target, place.link("reader"), SnapshotId(2, 1))
        assert content(target) == before
        capturer.close()

"""Donors send, joiners receive, and whatever goes wrong on the way is found before it is believed.

The processes of the last tests run this file as a program.
"""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn, optim

from elastic.encoding import flat_bytes, raw_view
from elastic.errors import CollectiveAborted, ConfigError, TransferError
from elastic.state import TrainingState
from elastic.transfer import (
    PIECE_SIZE_BYTES_MAX,
    TAG_HEADER,
    TAG_PIECE,
    TAG_PREAMBLE,
    receive_state,
    send_state,
)
from tests.unit.net import Link, Net, run

PROCESSES_DEADLINE_S = 90.0  # three interpreters that import torch on a busy machine


class Holder(nn.Module):
    """Tensors of every awkward kind."""

    def __init__(self, seed: int, width: int = 300) -> None:
        super().__init__()
        random = torch.Generator().manual_seed(seed)

        def numbers(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=random)

        self.scalar = nn.Parameter(numbers(1)[0])
        self.empty = nn.Parameter(numbers(0, 3))
        self.weight = nn.Parameter(numbers(width, 40))
        self.image = nn.Parameter(numbers(4, 3, 5, 5).to(memory_format=torch.channels_last))
        self.brief = nn.Parameter(numbers(7, 3).bfloat16())
        self.register_buffer("count", torch.randint(0, 2**62, (), generator=random))
        self.register_buffer("mask", numbers(5, 5) > 0)
        self.register_buffer("turned", numbers(width, 17).t())
        self.register_buffer("wave", torch.view_as_complex(numbers(3, 2)))


def make_state(seed: int, steps: int = 2, width: int = 300) -> TrainingState:
    model = Holder(seed, width)
    optimizer = optim.Adam(model.parameters(), lr=0.01)
    for _ in range(steps):
        optimizer.zero_grad()
        sum(parameter.float().square().sum() for parameter in model.parameters()).backward()  # type: ignore[union-attr]
        optimizer.step()
    scheduler = optim.lr_scheduler.StepLR(optimizer, seed + 1)
    return TrainingState({"main": model}, {"main": optimizer}, {"main": scheduler})


def content(state: TrainingState) -> str:
    digest = hashlib.sha256(state.small().encode())
    for entry, tensor in zip(*state.described_tensors(), strict=True):
        data = flat_bytes(tensor)
        digest.update(json.dumps(entry.to_json()).encode() + bytes(raw_view(data)))
    return digest.hexdigest()


def move(
    donors: dict[int, TrainingState],
    joiners: dict[int, TrainingState],
    *,
    net: Net | None = None,
    step: int = 7,
    donor_steps: dict[int, int] | None = None,
    piece_size_bytes: int = 4096,
) -> dict[int, Exception]:
    def sender(state: TrainingState, its_step: int) -> Callable[[Link], None]:
        return lambda link: send_state(
            link, state, tuple(donors), tuple(joiners), its_step, piece_size_bytes=piece_size_bytes
        )

    def receiver(state: TrainingState) -> Callable[[Link], None]:
        return lambda link: receive_state(link, state, tuple(donors), step)

    steps = donor_steps or {}
    tasks = {rank: sender(state, steps.get(rank, step)) for rank, state in donors.items()}
    tasks |= {rank: receiver(state) for rank, state in joiners.items()}
    return run(net or Net(), tasks)


@settings(max_examples=25, deadline=None)
@given(
    st.integers(1, 4),
    st.integers(1, 3),
    st.integers(1, 120),
    st.sampled_from([1009, 4096, 100_000, PIECE_SIZE_BYTES_MAX]),
    st.integers(0, 2),
)
def test_joiners_end_with_the_donors_bits(
    donors: int, joiners: int, width: int, piece_size_bytes: int, joiner_steps: int
) -> None:
    sources = {rank: make_state(1, 2, width) for rank in range(donors)}
    targets = {rank: make_state(2, joiner_steps, width) for rank in range(10, 10 + joiners)}
    before = content(sources[0])
    assert move(sources, targets, piece_size_bytes=piece_size_bytes) == {}
    assert {content(state) for state in [*sources.values(), *targets.values()]} == {before}


def test_every_donor_sends_an_equal_share_in_bounded_pieces_from_two_buffers() -> None:
    net = Net()
    sources = {rank: make_state(1) for rank in (3, 1, 2)}
    assert move(sources, {0: make_state(2)}, net=net, piece_size_bytes=5000) == {}
    total = sum(entry.size_bytes for entry in sources[3].manifest())
    for donor in sources:
        pieces = [message for message in net.sent if message[0] == donor and message[2] == TAG_PIECE]
        payload = sum(size - 32 for *_, size, _ in pieces)
        assert abs(payload - total / 3) <= 1
        assert max(size for *_, size, _ in pieces) == 5032
        assert len({address for *_, address in pieces}) == 2
        headers = [message for message in net.sent if message[0] == donor and message[2] == TAG_HEADER]
        assert len(headers) == (donor == 3)


def test_a_model_without_a_single_byte_can_be_moved() -> None:
    states = [TrainingState({"m": nn.Identity()}, {}, {}) for _ in range(3)]
    assert move({0: states[0], 1: states[1]}, {2: states[2]}) == {}


def test_donors_are_only_read() -> None:
    source = make_state(1)
    versions = [tensor._version for tensor in source.tensors()]
    assert move({0: source}, {1: make_state(2)}) == {}
    assert [tensor._version for tensor in source.tensors()] == versions


@pytest.mark.parametrize("place", ["payload", "step stamp", "number", "checksum"])
def test_a_damaged_piece_is_found_and_the_link_stays_usable(place: str) -> None:
    damaged: list[int] = []

    def tamper(src: int, dst: int, tag: int, tensor: Tensor) -> None:
        if tag == TAG_PIECE and src == 1 and not damaged:
            damaged.append(src)
            tensor[{"payload": 100, "step stamp": -24, "number": -16, "checksum": -8}[place]] ^= 1

    net = Net(tamper)
    sources, target = {rank: make_state(1) for rank in (0, 1)}, make_state(2)
    errors = move(sources, {2: target}, net=net)
    assert set(errors) == {2}  # The donors have done their part.
    assert isinstance(errors[2], TransferError)
    assert "piece 0 of rank 1" in str(errors[2]) and "ask for it again" in str(errors[2])
    assert move(sources, {2: target}, net=net) == {}
    assert content(target) == content(sources[0])


@pytest.mark.parametrize("place", [0, 20, -1])
def test_a_damaged_header_is_found_before_anything_is_changed(place: int) -> None:
    def tamper(src: int, dst: int, tag: int, tensor: Tensor) -> None:
        if tag == TAG_HEADER:
            tensor[place] ^= 1

    target = make_state(2)
    before = content(target)
    errors = move({0: make_state(1), 1: make_state(1)}, {2: target}, net=Net(tamper))
    assert {rank: type(error) for rank, error in errors.items()} == dict.fromkeys(range(3), TransferError)
    assert "CRC differs" in str(errors[2]) and "rank 2" in str(errors[0]) and "CRC differs" in str(errors[1])
    assert content(target) == before


def refused(
    donors: dict[int, TrainingState], joiner: TrainingState, **options: Any
) -> tuple[dict[int, Exception], Net]:
    net = Net()
    before = content(joiner)
    errors = move(donors, {9: joiner}, net=net, **options)
    assert content(joiner) == before
    assert set(errors) == {*donors, 9}
    assert not [message for message in net.sent if message[2] == TAG_PIECE]
    return errors, net


def test_the_state_of_another_step_is_refused_by_everybody() -> None:
    errors, _ = refused({0: make_state(1), 1: make_state(1)}, make_state(2), donor_steps={1: 6})
    assert str(errors[9]).startswith("Rank 1 offers the state of step 6, not of step 7")
    assert str(errors[9]) in str(errors[0])


def test_donors_that_disagree_are_refused() -> None:
    errors, _ = refused({0: make_state(1), 1: make_state(1, 0)}, make_state(2))
    assert "Ranks 0 and 1 describe different states of step 7" in str(errors[9])


def test_a_joiner_with_another_model_is_refused_and_the_others_are_served() -> None:
    errors, _ = refused({0: make_state(1)}, make_state(2, width=5))
    assert isinstance(errors[9], ConfigError)
    assert "'main.weight' is float32 of shape (5, 40)" in str(errors[9])
    assert isinstance(errors[0], TransferError) and str(errors[9]) in str(errors[0])
    source, good, bad = make_state(1), make_state(2), make_state(3, width=5)
    errors = move({0: source}, {1: bad, 2: good})
    assert set(errors) == {0, 1} and "rank 1" in str(errors[0]) and "rank 2" not in str(errors[0])
    assert content(good) == content(source)


def test_something_that_is_no_announcement_is_refused() -> None:
    net = Net()
    Link(net, 0).send(torch.zeros(80, dtype=torch.uint8), 1, TAG_PREAMBLE)
    with pytest.raises(TransferError, match="Rank 0 sent no valid announcement"):
        receive_state(Link(net, 1), make_state(2), (0,), 7)


def test_a_piece_may_not_be_larger_than_allowed() -> None:
    for size_bytes in (0, PIECE_SIZE_BYTES_MAX + 1):
        with pytest.raises(ValueError, match="a piece has 1 to"):
            send_state(Link(Net(), 0), make_state(1), (0,), (1,), 7, piece_size_bytes=size_bytes)


# Real processes over gloo.


def connect(rank: int, size: int, store: str, generation: int) -> Any:
    from torch.distributed import FileStore

    from elastic.building import build_group

    return build_group(
        FileStore(store, size),
        rank,
        size,
        generation=generation,
        address="127.0.0.1",
        connect_timeout_s=PROCESSES_DEADLINE_S,
        operation_timeout_s=2 * PROCESSES_DEADLINE_S,
    )


def attempt(act: Callable[[], None]) -> str:
    try:
        act()
    except (TransferError, ConfigError, CollectiveAborted) as error:
        return type(error).__name__
    return "done"


def play(rank: int, store: str) -> dict[str, str]:
    """One of three processes: all scenarios in a row, the last of which kills rank 1."""
    results: dict[str, str] = {}
    group = connect(rank, 3, store, 1)

    def scenario(
        name: str, donors: Sequence[int], state: TrainingState, piece_size_bytes: int = 65536
    ) -> None:
        joiners = tuple({0, 1, 2} - set(donors))
        if rank in donors:
            outcome = attempt(
                lambda: send_state(group, state, donors, joiners, 5, piece_size_bytes=piece_size_bytes)
            )
        else:
            outcome = attempt(lambda: receive_state(group, state, donors, 5))
        results[name] = outcome + " " + (content(state) if outcome == "done" else "")

    scenario("two donors, one joiner", (0, 1), make_state(1 if rank < 2 else 2, 2, width=3000))
    scenario(
        "one donor, two joiners", (2,), make_state(1 if rank == 2 else 2, 0 if rank == 1 else 2, width=3000)
    )
    scenario("a joiner with another model", (0, 2), make_state(1, width=10 if rank == 1 else 20))
    scenario("the same group again", (1, 0), make_state(1 if rank < 2 else 2))
    if rank == 1:  # It announces its share, and dies with the answer in its hands.
        from elastic import transfer

        transfer._send_pieces = lambda *_: os._exit(0)  # type: ignore[assignment]
        print(json.dumps(results), flush=True)
    scenario("a donor dies", (0, 1), make_state(1 if rank < 2 else 2, width=30_000))
    group.close()
    return results


def test_state_moves_between_real_processes_and_a_dying_donor_leaves_nobody_waiting(tmp_path: Path) -> None:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).parents[2])}
    start_s = time.monotonic()
    processes = [
        subprocess.Popen(
            [sys.executable, __file__, str(rank), str(tmp_path / "store")],
            env=environment,
            stdout=subprocess.PIPE,
            text=True,
        )
        for rank in range(3)
    ]
    try:
        outputs = [process.communicate(timeout=PROCESSES_DEADLINE_S)[0] for process in processes]
    finally:
        for process in processes:
            process.kill()
            process.wait()
    assert time.monotonic() - start_s < PROCESSES_DEADLINE_S  # No survivor waited for a timeout.
    results = [json.loads(output) for output in outputs]
    for name in ("two donors, one joiner", "one donor, two joiners", "the same group again"):
        assert len({result[name] for result in results}) == 1
        assert results[0][name].startswith("done ")
    assert [result["a joiner with another model"].strip() for result in results] == [
        "TransferError",
        "ConfigError",
        "TransferError",
    ]
    assert results[2]["a donor dies"].strip() == "CollectiveAborted"


if __name__ == "__main__":
    print(json.dumps(play(int(sys.argv[1]), sys.argv[2])), flush=True)
    os._exit(0)  # What is left of a broken group must not hold up the test.

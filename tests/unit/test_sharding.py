"""Optimizer state that is cut over the workers has the bits of state that is not, wherever it has been."""

from __future__ import annotations

import mmap
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn, optim

from agent.checkpoints import read_checkpoint, write_checkpoint
from agent.memory import HeldSlice, MemoryService
from elastic.capture import Capturer, restore
from elastic.encoding import flat_bytes, raw_view, tensor_over
from elastic.errors import CollectiveAborted, ConfigError, ProtocolError, TransferError
from elastic.payload import SnapshotLayout, Unpacker, read_description
from elastic.resharding import Move, ParameterGather, move_shards
from elastic.sharding import BLOCK, ELEMENTWISE, Cut, OptimizerShards, Sharding, owned
from elastic.snapshots import SnapshotId
from elastic.state import Entry, TrainingState
from tests.unit.captured import signed
from tests.unit.net import Link, Net, run
from tests.unit.nodes import Node, node

OPTIMIZERS: dict[str, Callable[[nn.Module], optim.Optimizer]] = {
    "SGD": lambda m: optim.SGD(m.parameters(), lr=0.1),
    "SGD, Nesterov": lambda m: optim.SGD(m.parameters(), lr=0.1, momentum=0.9, nesterov=True, weight_decay=0.01),
    "Adam, amsgrad": lambda m: optim.Adam(m.parameters(), lr=0.01, amsgrad=True),
    "AdamW": lambda m: optim.AdamW(m.parameters(), lr=0.01),
    "AdamW, foreach": lambda m: optim.AdamW(m.parameters(), lr=0.01, foreach=True),
    "AdamW, fused": lambda m: optim.AdamW(m.parameters(), lr=0.01, fused=True),
    "Adagrad": lambda m: optim.Adagrad(m.parameters(), lr=0.01, initial_accumulator_value=0.1),
    "Adadelta": lambda m: optim.Adadelta(m.parameters()),
    "Adamax": lambda m: optim.Adamax(m.parameters()),
    "ASGD": lambda m: optim.ASGD(m.parameters()),
    "NAdam": lambda m: optim.NAdam(m.parameters()),
    "RAdam": lambda m: optim.RAdam(m.parameters()),
    "RMSprop": lambda m: optim.RMSprop(m.parameters(), momentum=0.9, centered=True),
    "Rprop": lambda m: optim.Rprop(m.parameters()),
}


class Network(nn.Module):
    """Parameters of every awkward kind: no number, one, an odd number, columns first, half as long, never used."""

    def __init__(self, seed: int, width: int = 1001) -> None:
        super().__init__()
        random = torch.Generator().manual_seed(seed)

        def numbers(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=random)

        self.scalar = nn.Parameter(numbers(1)[0])
        self.weight = nn.Parameter(numbers(width, 7))
        self.bias = nn.Parameter(numbers(5))
        self.image = nn.Parameter(numbers(4, 3, 5, 5).to(memory_format=torch.channels_last))
        self.brief = nn.Parameter(numbers(71, 9).bfloat16())
        self.unused = nn.Parameter(numbers(300))
        self.register_buffer("mask", numbers(5, 5) > 0)


class Replica:
    """One worker's model and optimizer; all of it, or a part."""

    def __init__(self, name: str = "AdamW", seed: int = 1, cut: Cut | None = None, width: int = 1001) -> None:
        self.model = Network(seed, width)
        self.optimizer = OPTIMIZERS[name](self.model)
        self.shards = None if cut is None else OptimizerShards({"optimizer": self.optimizer})
        self.state = TrainingState({"main": self.model}, {"optimizer": self.optimizer}, {}, shards=self.shards)
        self.step: Callable[[], object] = self.optimizer.step
        if self.shards is not None and cut is not None:
            self.step = self.shards.stepping(self.optimizer, self.optimizer.step)
            self.shards.recut(cut)

    def give_gradients(self, step: int) -> None:
        random = torch.Generator().manual_seed(step)
        for parameter in self.model.parameters():
            parameter.grad = torch.empty_like(parameter)
            parameter.grad.copy_(torch.randn(parameter.shape, generator=random))
        self.model.unused.grad = None


def gather(replicas: Sequence[Replica]) -> None:
    """Let all have what each has updated."""

    def task(replica: Replica) -> Callable[[Link], None]:
        assert replica.shards is not None
        return ParameterGather(replica.shards).run

    assert run(Net(), {rank: task(replica) for rank, replica in enumerate(replicas)}) == {}


def train(replicas: Sequence[Replica], steps: range) -> None:
    for step in steps:
        for replica in replicas:
            replica.give_gradients(step)
            replica.step()
        if replicas[0].shards is not None:
            gather(replicas)


def world(count: int, name: str = "AdamW", seed: int = 1, width: int = 1001) -> list[Replica]:
    return [Replica(name, seed, Cut(index, count), width) for index in range(count)]


def contents(replicas: Sequence[Replica]) -> dict[str, bytes]:
    """The bytes of every tensor, put together from what each of them has, and the small state."""
    found: dict[str, bytes] = {"small": replicas[0].state.small().encode()}
    assert {replica.state.small() for replica in replicas} == {replicas[0].state.small()}
    entries = replicas[0].state.manifest()
    for number, entry in enumerate(entries):
        whole = bytearray(entry.size_bytes)
        covered = 0
        for replica in replicas:
            mine, tensors = replica.state.described_tensors()
            assert mine == entries
            (extent,) = replica.state.extents([entry])
            flat = flat_bytes(tensors[number])
            data = bytes(raw_view(flat))
            assert len(data) == len(extent)
            if entry.sharding is None:
                assert covered == 0 or bytes(whole) == data, entry.label
                covered = entry.size_bytes
            else:
                covered += len(data)
            whole[extent.start : extent.stop] = data
        assert covered == entry.size_bytes, entry.label
        found[f"{entry.label} {entry.description} {entry.stride}"] = bytes(whole)
    return found


# -- the cut ---------------------------------------------------------------------------------------------------------


@given(st.sampled_from(Sharding), st.integers(0, 5000), st.integers(0, 9), st.integers(1, 12))
def test_every_element_has_one_owner_and_runs_begin_at_blocks(
    sharding: Sharding, size: int, turn: int, count: int
) -> None:
    runs = [owned(sharding, size, turn, Cut(index, count)) for index in range(count)]
    assert sorted(element for run in runs for element in run) == list(range(size))
    assert all(run.start % BLOCK == 0 for run in runs if len(run))
    assert owned(None, size, turn, Cut(0, count)) == range(size)


def test_small_parameters_do_not_all_go_to_the_same_worker() -> None:
    holders = {
        next(i for i in range(4) if len(owned(Sharding.SPLIT, 5, turn, Cut(i, 4)))) for turn in range(4)
    }
    assert holders == {0, 1, 2, 3}


@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize("count", [1, 2, 5])
def test_workers_with_a_part_each_compute_the_bits_of_one_with_all(name: str, count: int) -> None:
    alone, together = Replica(name), world(count, name)
    train([alone], range(4))
    train(together, range(4))
    assert contents(together) == contents([alone])


def test_every_elementwise_optimizer_of_torch_is_tried() -> None:
    assert {type(make(Network(1))) for make in OPTIMIZERS.values()} == set(ELEMENTWISE)


def test_state_is_there_once() -> None:
    train(together := world(3, width=9001), range(2))
    sizes = [
        sum(t.nbytes for e, t in zip(*r.state.described_tensors(), strict=True) if e.sharding is not None)
        for r in together
    ]
    whole = sum(entry.size_bytes for entry in together[0].state.manifest() if entry.sharding is not None)
    assert sum(sizes) == whole and max(sizes) < whole / 2.5


def test_the_groups_show_the_whole_parameters_but_for_the_step() -> None:
    (replica,) = world(1)
    before = [id(parameter) for parameter in replica.optimizer.param_groups[0]["params"]]
    replica.give_gradients(1)
    replica.step()
    assert [id(parameter) for parameter in replica.optimizer.param_groups[0]["params"]] == before
    assert replica.model.weight.grad is not None


@pytest.mark.parametrize("make", [optim.Adafactor, optim.LBFGS])
def test_an_optimizer_that_is_not_elementwise_is_refused(make: Callable[..., optim.Optimizer]) -> None:
    with pytest.raises(ConfigError, match="not known to update each element by itself"):
        OptimizerShards({"main": make(Network(1).parameters())})


def test_an_optimizer_of_ones_own_may_say_that_it_is_elementwise() -> None:
    class Own(optim.SGD):
        elementwise = True

    OptimizerShards({"main": Own(Network(1).parameters(), lr=0.1)})
    with pytest.raises(ConfigError, match="is Other"):
        OptimizerShards({"main": type("Other", (optim.SGD,), {})(Network(1).parameters(), lr=0.1)})


def test_state_of_a_strange_shape_is_refused() -> None:
    (replica,) = world(1)
    train([replica], range(1))
    piece = replica.state.shards.piece(replica.model.weight)  # type: ignore[union-attr]
    replica.optimizer.state[piece.stand_in]["rows"] = torch.zeros(3)
    with pytest.raises(ConfigError, match="leave shard_optimizer=True out"):
        replica.state.manifest()


def test_a_parameter_that_comes_later_is_refused() -> None:
    (replica,) = world(1)
    replica.optimizer.add_param_group({"params": [nn.Parameter(torch.zeros(3))]})
    with pytest.raises(ConfigError, match="since prepare"):
        replica.step()


# -- moving ----------------------------------------------------------------------------------------------------------


def reshard(old: Sequence[Replica], new: Sequence[Replica], net: Net | None = None) -> dict[int, Exception]:
    """Move from the cut of `old` to that of `new`; who is in neither list at a place has no part there."""
    ranks = {id(replica): rank for rank, replica in enumerate(dict.fromkeys([*old, *new]))}
    move = Move(tuple(ranks[id(replica)] for replica in old), tuple(ranks[id(replica)] for replica in new))

    def task(replica: Replica) -> Callable[[Link], None]:
        def body(link: Link) -> None:
            if replica in old and replica in new:
                entries, sources, targets = replica.state.recut(Cut(new.index(replica), len(new)))
                move_shards(link, 7, entries, move, sources, targets)
            elif replica in old:
                move_shards(link, 7, replica.state.manifest(), move, replica.state.tensors(), None)
            else:
                move_shards(link, 7, replica.state.manifest(), move, None, replica.state.tensors())

        return body

    tasks = {rank: task(replica) for replica in [*old, *new] for rank in [ranks[id(replica)]]}
    return run(net or Net(), tasks)


def joiner(index: int, count: int, like: Replica, name: str) -> Replica:
    """A worker that has been given everything but its part."""
    new = Replica(name, seed=9, cut=Cut(index, count))
    assert new.shards is not None
    entries, tensors = like.state.described_tensors()
    for entry, source, target in zip(entries, tensors, new.state.adopt(entries, like.state.small()), strict=True):
        if entry.sharding is None:
            target.copy_(source)
    return new


@settings(max_examples=12, deadline=None)
@given(st.integers(1, 4), st.integers(0, 3), st.integers(0, 3), st.sampled_from(sorted(OPTIMIZERS)), st.randoms())
def test_moving_to_another_cut_changes_no_bit(before: int, leave: int, join: int, name: str, random: object) -> None:
    alone, old = Replica(name), world(before, name)
    train([alone], range(2))
    train(old, range(2))
    staying = list(old)
    random.shuffle(staying)  # type: ignore[attr-defined]
    staying = staying[: max(1, before - leave)]
    assert reshard(old, staying) == {}
    assert contents(staying) == contents([alone])
    size = len(staying) + join
    new = [*staying, *(joiner(index, size, staying[0], name) for index in range(len(staying), size))]
    assert reshard(staying, new) == {}
    train([alone], range(2, 4))
    train(new, range(2, 4))
    assert contents(new) == contents([alone])


def test_a_damaged_piece_is_found_and_everybody_gets_through() -> None:
    def tamper(src: int, dst: int, tag: int, tensor: Tensor) -> None:
        if dst == 1:
            tensor[3] ^= 4

    old = world(3)
    train(old, range(2))
    errors = reshard(old, old[:2], Net(tamper))
    assert set(errors) == {1} and isinstance(errors[1], TransferError) and "damaged" in str(errors[1])


def test_a_peer_that_is_gone_is_no_endless_wait() -> None:
    class Gone(Link):
        def recv(self, tensor: Tensor, src: int, tag: int) -> object:
            raise CollectiveAborted("rank 1 is gone")

    old = world(2)
    train(old, range(1))
    entries, sources, targets = old[0].state.recut(Cut(0, 1))
    with pytest.raises(CollectiveAborted):
        move_shards(Gone(Net(), 0, 2), 1, entries, Move((0, 1), (0,)), sources, targets)


# -- snapshots and checkpoints ---------------------------------------------------------------------------------------


def capture(place: Node, replicas: Sequence[Replica], step: int) -> None:
    for index, replica in enumerate(replicas):
        capturer = Capturer(replica.state, place.link(f"w{step}.{index}"), buffers=1)
        assert capturer.has_room(1, -1) and capturer.capture(step, 1, index, len(replicas))


@pytest.mark.parametrize("name", ["AdamW", "SGD, Nesterov", "Adagrad", "NAdam"])
@pytest.mark.parametrize(("before", "after"), [(1, 1), (3, 3), (3, 2), (2, 5)])
def test_a_snapshot_of_a_cut_state_is_restored_to_any_other_cut(
    tmp_path: Path, name: str, before: int, after: int
) -> None:
    with node(tmp_path) as place:
        train(old := world(before, name), range(3))
        capture(place, old, 3)
        kept = contents(old)
        held = sorted((h.slice.begin, h.slice.end) for h in place.do(lambda s: s.held()))
        assert [begin for begin, _ in held] == [0, *(end for _, end in held[:-1])]
        new = world(after, name, seed=5)
        train(new, range(1))
        for index, replica in enumerate(new):
            assert restore(replica.state, place.link(f"reader{index}"), SnapshotId(3, 1)) == 3
        assert contents(new) == kept


def test_cut_and_whole_states_restore_each_others_snapshots(tmp_path: Path) -> None:
    with node(tmp_path) as place:
        alone, together = Replica(), world(3)
        train([alone], range(3))
        train(together, range(3))
        capture(place, together, 3)
        capture(place, [alone], 4)
        whole = Replica(seed=5)
        restore(whole.state, place.link("reader"), SnapshotId(3, 1))
        assert contents([whole]) == contents([alone])
        parts = world(2, seed=5)
        for index, replica in enumerate(parts):
            restore(replica.state, place.link(f"reader{index}"), SnapshotId(4, 1))
        assert contents(parts) == contents([alone])


def test_a_part_that_is_not_ones_own_is_not_captured(tmp_path: Path) -> None:
    with node(tmp_path) as place:
        train(old := world(2), range(1))
        capturer = Capturer(old[0].state, place.link("w"), buffers=1)
        with pytest.raises(ProtocolError, match="part 1 of 2"):
            capturer.has_room(1, -1)
            capturer.capture(1, 1, 1, 2)


@pytest.mark.filterwarnings("ignore:torch.distributed is")
def test_a_checkpoint_of_a_cut_state_is_what_plain_torch_loads(tmp_path: Path) -> None:
    with node(tmp_path) as place:
        alone, together = Replica(), world(3)
        train([alone], range(3))
        train(together, range(3))
        capture(place, together, 3)
        memories = [(h.slice, tensor_over(mmap.mmap(h.fd, 0))[: h.slice.stored_bytes]) for h in place.do(held)]
        path = write_checkpoint(str(tmp_path), [(signed(s, m), m) for s, m in memories], job="j", keep=1)
    loaded = Replica(seed=5)
    train([loaded], range(1))
    values = {"main": loaded.model.state_dict(), "optimizer": loaded.optimizer.state_dict()}
    dcp.load(values, checkpoint_id=path)
    loaded.model.load_state_dict(values["main"])
    loaded.optimizer.load_state_dict(values["optimizer"])
    assert contents([loaded]) == contents([alone])
    memory = torch.empty(sum(len(m) for _, m in memories), dtype=torch.uint8)
    read = read_checkpoint(path, memory)
    again = Replica(seed=5, cut=Cut(0, 1))
    described = read_description(raw_view(memory)[read.description_at : read.stored_bytes])
    entries, small = described.entries, described.small
    tensors = again.state.adopt(entries, small)
    Unpacker(SnapshotLayout(entries, 1), tensors, again.state.extents(entries)).unpack(range(read.end), memory)
    assert contents([again]) == contents([alone])


def held(service: MemoryService) -> Sequence[HeldSlice]:
    return service.held()


@settings(deadline=None, max_examples=50)
@given(st.lists(st.tuples(st.integers(0, 700), st.booleans()), max_size=6), st.integers(1, 6))
def test_shares_of_a_layout_tile_it_and_hold_each_byte_once(tensors: list[tuple[int, bool]], count: int) -> None:
    entries = [
        Entry("optimizer", "o", "float32", (size,), "cpu", (0, i, "k"), None, Sharding.SPLIT if cut else None)  # type: ignore[arg-type]
        for i, (size, cut) in enumerate(tensors)
    ]
    layout = SnapshotLayout(entries, count)
    assert layout.size_bytes == sum(entry.size_bytes for entry in entries)
    shares = [layout.share(index) for index in range(count)]
    assert [share.start for share in shares] == [0, *(share.stop for share in shares[:-1])]
    assert shares[-1].stop == layout.size_bytes
    seen = [bytearray(entry.size_bytes) for entry in entries]
    for index, share in enumerate(shares):
        for run_ in layout.runs(share):
            own = entries[run_.tensor].extent(Cut(index, count))
            assert own.start <= run_.in_tensor.start and run_.in_tensor.stop <= own.stop
            for byte in range(run_.in_tensor.start, run_.in_tensor.stop):
                seen[run_.tensor][byte] += 1
    assert all(set(each) <= {1} for each in seen)



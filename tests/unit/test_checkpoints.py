"""Checkpoints: written from memory, loaded by plain PyTorch, read back; and everything that can go wrong on a disk."""

from __future__ import annotations

import copy
import json
import re
import struct
import subprocess
import sys
import zlib
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.optim import Optimizer

from agent import rotation
from agent.catalog import newest_checkpoint
from agent.checkpoints import read_checkpoint, write_checkpoint
from agent.rotation import Marker
from elastic.checksum import joined
from elastic.errors import CheckpointError
from elastic.snapshots import Slice
from elastic.state import Entry, TrainingState
from tests.unit.captured import OPTIMIZERS, Odd, captured, signed, train

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled")


def state_of(model: nn.Module, optimizer: Optimizer, **stateful: Any) -> TrainingState:
    return TrainingState({"model": model}, {"optimizer": optimizer}, stateful)


def a_small_state(seed: int = 0) -> TrainingState:
    torch.manual_seed(seed)
    model = nn.Linear(3, 2)
    return state_of(model, torch.optim.SGD(model.parameters(), lr=0.1))


def read_back(path: str) -> tuple[Slice, Tensor]:
    marker = Marker.from_json((Path(path) / rotation.MARKER).read_bytes())
    memory = torch.full((marker.snapshot.stored_bytes,), 255, dtype=torch.uint8)
    return read_checkpoint(path, memory), memory


DOCUMENTED = re.findall(
    r"```python\n(.*?)```", (Path(__file__).parents[2] / "docs/checkpoints.md").read_text(), re.DOTALL
)


@pytest.mark.parametrize("snippet", DOCUMENTED, ids=["into-objects", "into-a-file"])
@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_plain_pytorch_loads_it_as_documented_and_trains_on_with_the_same_bits(
    snippet: str, kind: str, tmp_path: Path
) -> None:
    model, other = Odd(seed=1), Odd(seed=2)
    other.mask.copy_(model.mask)  # it is in no state dict
    optimizer, other_optimizer = (OPTIMIZERS[kind](list(each.parameters())) for each in (model, other))
    train(model, [optimizer], 3, seed=1)
    path = write_checkpoint(str(tmp_path), captured(state_of(model, optimizer), 3, count=3), job="j", keep=1)

    exec(snippet, {"model": other, "optimizer": other_optimizer, "path": path, "file": str(tmp_path / "file.pt")})
    assert other.head.weight is other.embed.weight
    for steps in (0, 1, 3):
        train(model, [optimizer], steps, seed=4)
        train(other, [other_optimizer], steps, seed=4)
        assert state_of(model, optimizer).digest_model() == state_of(other, other_optimizer).digest_model()


def test_keys_that_a_hook_of_the_model_changes_are_those_of_the_checkpoint(tmp_path: Path) -> None:
    def renamed(model: nn.Module, state: dict[str, Any], prefix: str, metadata: Any) -> None:
        state["kernel"] = state.pop("weight")

    model = nn.Linear(3, 2)
    model.register_state_dict_post_hook(renamed)
    path = write_checkpoint(
        str(tmp_path), captured(state_of(model, torch.optim.SGD(model.parameters())), 1), job="j", keep=1
    )
    loaded = {"model": {key: torch.zeros_like(value) for key, value in model.state_dict().items()}}
    dcp.load(loaded, checkpoint_id=path)
    assert list(loaded["model"]) == ["bias", "kernel"] and torch.equal(loaded["model"]["kernel"], model.weight)
    read_back(path)


def test_several_models_optimizers_and_extra_modules_are_called_by_their_names(tmp_path: Path) -> None:
    models = {"model0": Odd(1), "model1": nn.Linear(2, 2), "ema": nn.Linear(2, 2)}
    optimizers = {
        "optimizer0": torch.optim.AdamW(models["model0"].parameters()),
        "optimizer1": torch.optim.SGD(models["model1"].parameters(), momentum=0.9),
    }
    models["model1"](torch.ones(1, 2)).sum().backward()
    train(models["model0"], list(optimizers.values()), 1, seed=1)
    path = write_checkpoint(str(tmp_path), captured(TrainingState(models, optimizers, {}), 1), job="j", keep=1)

    expected = {name: thing.state_dict() for name, thing in {**models, **optimizers}.items()}
    state = copy.deepcopy(expected)
    for each in state.values():
        for value in each.values():
            if isinstance(value, Tensor):
                value.zero_()
    dcp.load(state, checkpoint_id=path)
    assert str(state) == str(expected)


@pytest.mark.parametrize("count", [1, 2, 7])
def test_what_is_read_back_is_the_snapshot_as_one_slice(count: int, tmp_path: Path) -> None:
    model = Odd(seed=1)
    optimizer = OPTIMIZERS["adamw"](list(model.parameters()))
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 10)
    train(model, [optimizer], 2, seed=1)
    state = state_of(model, optimizer, scheduler=scheduler)
    path = write_checkpoint(str(tmp_path), captured(state, 2, count, generation=7), job="j", keep=1)

    ((expected, memory),) = captured(state, 2, generation=7)
    assert expected.description_at % 64 == 0
    found, read = read_back(path)
    assert found == expected
    assert torch.equal(read, memory)


def test_paths_may_be_relative(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert write_checkpoint(".", captured(a_small_state(), 1), job="j", keep=1) == "step-00000001"
    assert read_back("step-00000001")[0].snapshot.step == 1


def test_a_worker_restores_a_checkpoint_as_it_restores_a_snapshot(tmp_path: Path) -> None:
    def made(seed: int) -> TrainingState:
        model = Odd(seed)
        optimizer = OPTIMIZERS["adafactor"](list(model.parameters()))
        return state_of(model, optimizer, scheduler=torch.optim.lr_scheduler.StepLR(optimizer, 2))

    donor, joiner = made(1), made(2)
    train(donor.models["model"], [donor.optimizers["optimizer"]], 3, seed=1)
    donor.stateful["scheduler"].step()
    found, memory = read_back(write_checkpoint(str(tmp_path), captured(donor, 3, 2), job="j", keep=1))

    description = bytes(memory[found.description_at :].tolist())
    (length,) = struct.unpack_from("<Q", description)
    entries = [Entry.from_json(fields) for fields in json.loads(description[8 : 8 + length])]
    at = 0
    for entry, tensor in zip(entries, joiner.adopt(entries, description[8 + length :].decode()), strict=True):
        data = memory[at : at + entry.size_bytes].clone().view(tensor.dtype).view(tensor.shape)
        tensor.copy_(data)
        at += entry.size_bytes
    assert joiner.small() == donor.small()
    assert all(torch.equal(a, b) for a, b in zip(joiner.tensors(), donor.tensors(), strict=True))


def test_schedulers_with_functions_in_their_state_are_no_obstacle(tmp_path: Path) -> None:
    class Stateful:
        def state_dict(self) -> dict[str, Any]:
            return {"functions": [print]}

        def load_state_dict(self, state: dict[str, Any]) -> None:
            raise NotImplementedError

    model = nn.Linear(2, 2)
    state = state_of(model, torch.optim.SGD(model.parameters()), odd=Stateful())
    found, _ = read_back(write_checkpoint(str(tmp_path), captured(state, 1), job="j", keep=1))
    assert found.snapshot.step == 1


def test_progress_is_told_in_bytes(tmp_path: Path) -> None:
    told: list[tuple[int, int]] = []
    write_checkpoint(
        str(tmp_path), captured(a_small_state(), 1), job="j", keep=1, progress=lambda *each: told.append(each)
    )
    assert told == [(0, 32), (24, 32), (32, 32)]


@given(first=st.binary(max_size=300), second=st.binary(max_size=300), times=st.integers(0, 50))
def test_crcs_are_joined_as_if_the_bytes_had_been(first: bytes, second: bytes, times: int) -> None:
    second = second * times
    assert joined(zlib.crc32(first), zlib.crc32(second), len(second)) == zlib.crc32(first + second)


# ----------------------------------------------------------------------------------------------------
# Rotation, and what is passed over


def test_the_newest_ones_are_kept(tmp_path: Path) -> None:
    for step in (1, 2, 10, 11):
        write_checkpoint(str(tmp_path), captured(a_small_state(step), step), job="j", keep=2)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-00000010", "step-00000011"]
    newest = newest_checkpoint(str(tmp_path), "j")
    assert newest.found is not None and newest.found.step == 11 and newest.passed_over == ()
    older = newest_checkpoint(str(tmp_path), "j", before=11).found
    assert older is not None and older.step == 10


def test_nothing_newer_than_what_was_written_is_removed(tmp_path: Path) -> None:
    for step in (5, 6, 3):
        write_checkpoint(str(tmp_path), captured(a_small_state(), step), job="j", keep=1)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-00000003", "step-00000006"]


@given(
    whole=st.sets(st.integers(0, 30)), half=st.sets(st.integers(0, 30)), step=st.integers(0, 30), keep=st.integers(1, 4)
)
def test_the_newest_whole_checkpoint_always_stays(whole: set[int], half: set[int], step: int, keep: int) -> None:
    names = [rotation.step_name(each) for each in sorted(whole | {step})]
    parts = [rotation.part_name(rotation.step_name(each), 7) for each in sorted(half)]
    gone = rotation.outdated(names, parts, step, keep)
    left = [rotation.step_of(name) for name in names if name not in gone]
    assert left == sorted(whole | {step})[-len(left) :]
    assert sum(each <= step for each in left if each is not None) == min(
        keep, sum(each <= step for each in whole | {step})
    )
    assert [name for name in parts if name not in gone] == [
        name for name in parts if (rotation.step_of(name) or 0) > step
    ]


def test_the_same_step_of_another_attempt_takes_the_place_of_the_first(tmp_path: Path) -> None:
    for generation in (1, 2):
        state = a_small_state(generation)
        path = write_checkpoint(str(tmp_path), captured(state, 4, generation=generation), job="j", keep=3)
    found, memory = read_back(path)
    assert found.snapshot.generation == 2
    assert torch.equal(memory, captured(state, 4)[0][1])
    assert len(list(tmp_path.iterdir())) == 1


def test_an_empty_or_missing_target_has_no_checkpoint(tmp_path: Path) -> None:
    assert newest_checkpoint(str(tmp_path), "j").found is None
    assert newest_checkpoint(str(tmp_path / "nowhere"), "j").found is None


@pytest.fixture
def two(tmp_path: Path) -> tuple[Path, Path]:
    """The checkpoints of steps 1 and 2."""
    paths = [write_checkpoint(str(tmp_path), captured(a_small_state(), step), job="j", keep=2) for step in (1, 2)]
    return Path(paths[0]), Path(paths[1])


def lose_the_marker(path: Path) -> str:
    (path / rotation.MARKER).unlink()
    return "half-written"


def cut_the_tensors_off(path: Path) -> str:
    with open(path / "__0_0.distcp", "r+b") as file:
        file.truncate(100)
    return "100 bytes"


def lose_the_tensors(path: Path) -> str:
    (path / "__0_0.distcp").unlink()
    return "missing"


def change_the_metadata(path: Path) -> str:
    flip(path / ".metadata", 60)
    return "CRC"


def break_the_marker(path: Path) -> str:
    (path / rotation.MARKER).write_text("{")
    return "malformed"


def come_from_the_future(path: Path) -> str:
    (path / rotation.MARKER).write_text('{"format": 2}')
    return "format 2"


def flip(path: Path, at: int) -> None:
    data = bytearray(path.read_bytes())
    data[at] ^= 1
    path.write_bytes(data)


@pytest.mark.parametrize(
    "break_it",
    [
        lose_the_marker,
        cut_the_tensors_off,
        lose_the_tensors,
        change_the_metadata,
        break_the_marker,
        come_from_the_future,
    ],
)
def test_a_newer_one_that_is_not_whole_is_passed_over_with_the_reason(break_it: Any, two: tuple[Path, Path]) -> None:
    words = break_it(two[1])
    newest = newest_checkpoint(str(two[0].parent), "j")
    assert newest.found is not None and newest.found.path == str(two[0])
    (reason,) = newest.passed_over
    assert words in reason and str(two[1]) in reason
    with pytest.raises(CheckpointError, match=words):
        read_checkpoint(str(two[1]), torch.empty(100_000, dtype=torch.uint8))


def test_a_tensor_that_rotted_on_the_disk_is_found_when_it_is_read(two: tuple[Path, Path]) -> None:
    file = two[1] / "__0_0.distcp"
    weight = captured(a_small_state(), 2)[0][1][:24].numpy().tobytes()
    flip(file, file.read_bytes().index(weight) + 5)
    with pytest.raises(CheckpointError, match=r"step-00000002 is damaged \(the CRC of its tensors differs\)"):
        read_back(str(two[1]))


def test_another_jobs_checkpoints_are_neither_taken_nor_removed(two: tuple[Path, Path]) -> None:
    target = str(two[0].parent)
    sentence = "of the job 'j' .* this is the job 'mine': name another directory .* or start it as --job j"
    with pytest.raises(CheckpointError, match=sentence):
        newest_checkpoint(target, "mine")
    with pytest.raises(CheckpointError, match=sentence):
        write_checkpoint(target, captured(a_small_state(), 9), job="mine", keep=1)
    assert sorted(path.name for path in two[0].parent.iterdir()) == ["step-00000001", "step-00000002"]


# ----------------------------------------------------------------------------------------------------
# Disks and memory that fail


def test_what_dead_writers_left_is_ignored_and_removed_by_the_next_checkpoint(two: tuple[Path, Path]) -> None:
    target = two[0].parent
    for left in (".step-00000003.part-77", ".step-00000002.part-1"):
        (target / left).mkdir()
        (target / left / "__0_0.distcp").write_bytes(b"half")
    lose_the_marker(two[1])
    (target / "notes.txt").write_text("a person's")
    newest = newest_checkpoint(str(target), "j")
    assert newest.found is not None and newest.found.step == 1
    assert len(newest.passed_over) == 3
    write_checkpoint(str(target), captured(a_small_state(), 3), job="j", keep=1)
    assert sorted(path.name for path in target.iterdir()) == ["notes.txt", "step-00000003"]


def test_a_full_disk_is_one_sentence_and_the_last_good_checkpoint_stays(small_disk: Path) -> None:
    path = write_checkpoint(str(small_disk), captured(a_small_state(), 1), job="j", keep=1)
    model = nn.Linear(1000, 1000)
    large = captured(state_of(model, torch.optim.SGD(model.parameters())), 2)
    with pytest.raises(CheckpointError) as error:
        write_checkpoint(str(small_disk), large, job="j", keep=1)
    assert str(error.value) == (
        f"The checkpoint of step 2 cannot be written to {small_disk} (No space left on device): make room there or name "
        "another directory; older checkpoints are untouched."
    )
    assert [path.name for path in small_disk.iterdir()] == ["step-00000001"]
    assert read_back(path)[0].snapshot.step == 1


def test_a_target_that_is_a_file_is_one_sentence(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    for target in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(CheckpointError, match=r"step 1 cannot be written to .* \(Not a directory\)"):
            write_checkpoint(str(target), captured(a_small_state(), 1), job="j", keep=1)
        with pytest.raises(CheckpointError, match="Not a directory"):
            newest_checkpoint(str(target), "j")


def test_what_cannot_be_removed_is_said_of_a_checkpoint_that_is_whole(tmp_path: Path) -> None:
    (tmp_path / "step-00000001").write_text("a file")
    with pytest.raises(CheckpointError, match=r"step 2 is whole, but .* cannot be removed \(Not a directory\)"):
        write_checkpoint(str(tmp_path), captured(a_small_state(), 2), job="j", keep=1)
    newest = newest_checkpoint(str(tmp_path), "j")
    assert newest.found is not None and newest.found.step == 2


def test_slices_that_are_damaged_missing_or_of_two_snapshots_are_refused(tmp_path: Path) -> None:
    slices = captured(a_small_state(), 1, count=3)
    mixed = captured(a_small_state(), 1, count=3, generation=2)
    rotten = slices[1][1].clone()
    rotten[0] ^= 1
    gap = replace(slices[1][0], begin=slices[1][0].begin + 1)
    for bad, words in (
        (slices[:2], "these are there: 0, 1"),
        ([], "these are there: none"),
        ([slices[0], mixed[1], slices[2]], "Slices 0 and 1 are not of one snapshot"),
        ([slices[0], (signed(gap, slices[1][1]), slices[1][1]), slices[2]], "Slices 0 and 1 are not"),
        ([slices[0], (slices[1][0], rotten), slices[2]], "Slice 1 of the snapshot of step 1 is damaged in memory"),
    ):
        with pytest.raises(CheckpointError, match=words):
            write_checkpoint(str(tmp_path / "target"), bad, job="j", keep=1)
    assert not (tmp_path / "target").exists()
    write_checkpoint(str(tmp_path / "target"), slices[::-1], job="j", keep=1)


def test_names_that_would_meet_in_a_state_dict_are_refused(tmp_path: Path) -> None:
    model = nn.Linear(2, 2)
    state = TrainingState(
        {"model": model, "optimizer": nn.Linear(2, 2)}, {"optimizer": torch.optim.SGD(model.parameters())}, {}
    )
    with pytest.raises(CheckpointError, match="rename an extra state"):
        write_checkpoint(str(tmp_path), captured(state, 1), job="j", keep=1)


# ----------------------------------------------------------------------------------------------------
# Addresses


@pytest.fixture(params=["memory", "file"])
def address(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    pytest.importorskip("fsspec")
    return f"memory:/{tmp_path}/checkpoints" if request.param == "memory" else f"file://{tmp_path}/checkpoints"


def test_an_address_of_fsspec_is_written_read_rotated_and_loaded_by_plain_pytorch(address: str) -> None:
    assert newest_checkpoint(address, "j").found is None
    state = a_small_state()
    for step in (1, 2, 3, 3):
        path = write_checkpoint(address, captured(state, step, count=2), job="j", keep=2)
    newest, older = newest_checkpoint(address, "j"), newest_checkpoint(address, "j", before=3)
    assert newest.found is not None and older.found is not None
    assert (newest.found.path, newest.found.step, older.found.step) == (path, 3, 2)
    assert newest_checkpoint(address, "j", before=2).found is None
    memory = torch.empty(newest.found.marker.snapshot.stored_bytes, dtype=torch.uint8)
    assert read_checkpoint(path, memory) == captured(state, 3)[0][0]
    assert torch.equal(memory, captured(state, 3)[0][1])

    loaded = {"model": a_small_state(seed=5).models["model"].state_dict()}
    dcp.load(loaded, checkpoint_id=path)
    assert torch.equal(loaded["model"]["weight"], state.models["model"].weight)


def test_at_an_address_what_has_no_marker_is_half_written(address: str) -> None:
    import fsspec

    files, _ = fsspec.core.url_to_fs(address)
    paths = [write_checkpoint(address, captured(a_small_state(), step), job="j", keep=2) for step in (1, 2)]
    files.rm(f"{paths[1]}/{rotation.MARKER}")
    newest = newest_checkpoint(address, "j")
    assert newest.found is not None and newest.found.step == 1
    assert newest.passed_over == (f"{paths[1]} is half-written: it has no elastic.json.",)
    write_checkpoint(address, captured(a_small_state(), 3), job="j", keep=1)
    assert [path.rpartition("/")[2] for path in files.ls(address, detail=False)] == ["step-00000003"]


def test_an_address_of_an_unknown_kind_is_one_sentence() -> None:
    pytest.importorskip("fsspec")
    with pytest.raises(CheckpointError, match=r"nowhere://x .*: install elastic-runtime\[fsspec\]"):
        newest_checkpoint("nowhere://x", "j")


def test_the_agents_part_imports_no_torch() -> None:
    code = "import sys, agent.catalog, agent.places; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], timeout=30, check=False).returncode == 0

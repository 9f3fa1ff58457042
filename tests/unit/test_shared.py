"""Memory that is read by others: the right bytes, for as long as anybody needs them, and nobody else's."""

from __future__ import annotations

import gc
import multiprocessing as mp
import os
from multiprocessing.connection import Connection

import pytest
import torch

from elastic.errors import CollectiveAborted
from elastic.shared import Neighbours, Region, obstacle, place
from tests.unit.worlds import open_files


def own_a_region(channel: Connection) -> None:
    region = Region(8192)
    region.memory.view(torch.float32).copy_(torch.arange(2048))
    channel.send(region.token(4096).tolist())
    channel.recv()
    region.memory.view(torch.float32)[1024:].fill_(7.0)
    channel.send("written")
    channel.recv()


def test_what_the_owner_writes_is_read_and_outlives_it() -> None:
    context = mp.get_context("spawn")
    ours, theirs = context.Pipe()
    owner = context.Process(target=own_a_region, args=(theirs,), daemon=True)
    owner.start()
    neighbours = Neighbours()
    token = torch.tensor(ours.recv())
    seen = neighbours.read(token, 4, torch.float32)
    assert seen.tolist() == [1024.0, 1025.0, 1026.0, 1027.0]
    ours.send("go on")
    assert ours.recv() == "written"
    assert seen.tolist() == [7.0] * 4
    owner.kill()
    owner.join()
    assert seen.tolist() == [7.0] * 4
    neighbours.forget_dead()
    with pytest.raises(CollectiveAborted, match="cannot be read"):
        neighbours.read(token, 4, torch.float32)


def test_pieces_lie_on_pages_of_their_own() -> None:
    region, offsets = place([1, 4096, 4097, 0])
    assert offsets == [0, 4096, 8192, 16384]
    assert region.memory.numel() == 16384


def test_memory_outlives_its_region_and_descriptors_go_with_it() -> None:
    gc.collect()  # what other tests have left
    before = open_files()
    region = Region(64)
    memory = region.memory
    memory.fill_(3)
    del region
    gc.collect()
    assert memory.tolist() == [3] * 64
    del memory
    gc.collect()
    assert open_files() == before


def test_a_token_that_names_no_region_is_refused() -> None:
    region = Region(64)
    right = region.token(0).tolist()
    for field, wrong in ((0, 2**22 + 1), (1, 0), (2, 1), (3, 128), (4, 65), (4, -8)):
        token = list(right)
        token[field] = wrong
        with pytest.raises(CollectiveAborted, match=str(token[0])):
            Neighbours().read(torch.tensor(token), 8, torch.uint8)
    with pytest.raises(CollectiveAborted, match="does not have"):
        Neighbours().read(region.token(60), 8, torch.uint8)
    assert Neighbours().read(region.token(56), 8, torch.uint8).tolist() == [0] * 8


def test_other_files_of_a_process_cannot_be_read() -> None:
    fd = os.memfd_create("something-else")
    try:
        os.write(fd, b"secret!!")
        status = os.fstat(fd)
        token = torch.tensor([os.getpid(), fd, status.st_ino, status.st_size, 0])
        with pytest.raises(CollectiveAborted, match="does not have"):
            Neighbours().read(token, 8, torch.uint8)
    finally:
        os.close(fd)


def test_this_machine_lets_processes_read_each_other() -> None:
    assert obstacle() == ""

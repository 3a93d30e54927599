"""The processes of a sweep: one, or as many as torchrun started, on one machine or several.

Ranks divide the plan between them and need each other only at the ends: rank 0 tells what is there already, and waits
for all before it writes what is made of everything. In between they count their UNet calls together, for the progress
bar. A rank that fails stays until the others are done, so that torchrun does not end them.
"""

import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist

FOR_EVER = timedelta(days=365)  # ranks wait for each other as long as the largest part takes
LOOK_AGAIN, GIVE_UP = 0.1, 10  # seconds


class Elsewhere(Exception):
    """What ends the other ranks when rank 0, which tells of it, cannot begin."""


@dataclass(frozen=True)
class Ranks:
    """This process among all.

    Attributes:
        rank, world: its number, and how many there are.
        store: what they count in.
    """

    rank: int
    world: int
    store: dist.Store

    def from_first(self, make: Callable[[], object]) -> object:
        """What `make` returns on rank 0, on every rank. Raises what it raises there, and Elsewhere on the others."""
        if self.world == 1:
            return make()
        error, told = None, [None, False]
        if self.rank == 0:
            try:
                told = [make(), True]
            except (ValueError, OSError) as raised:
                error = raised
        dist.broadcast_object_list(told, src=0)
        value, is_there = told
        if not is_there:
            raise error or Elsewhere()
        return value

    def add(self, name: str, number: int) -> int:
        """Adds to a number that all ranks share; returns the sum."""
        return self.store.add(name, number)

    def wait(self, name: str, meanwhile: Callable[[], None]) -> None:
        """Waits until every rank has come here."""
        self.add(name, 1)
        while self.add(name, 0) < self.world:
            meanwhile()
            time.sleep(LOOK_AGAIN)

    def leave(self) -> None:
        """Rank 0, which may hold what all count in, goes last; it does not wait for ranks that are dead."""
        if self.rank > 0:
            self.add("gone", 1)
            return
        limit = time.monotonic() + GIVE_UP
        while self.add("gone", 0) < self.world - 1 and time.monotonic() < limit:
            time.sleep(LOOK_AGAIN)


def is_first() -> bool:
    """Whether this is the process that speaks to the user."""
    return os.environ.get("RANK", "0") == "0"


def join(device: str) -> Ranks:
    """Joins the ranks that torchrun has started, over nccl where each has a GPU and gloo otherwise; alone where it has
    started none."""
    if "RANK" not in os.environ or "WORLD_SIZE" not in os.environ:
        return Ranks(0, 1, dist.HashStore())
    backend = "gloo"
    if torch.cuda.is_available() and (device == "auto" or device.startswith("cuda")):
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")) % torch.cuda.device_count())
        backend = "nccl"
    store, rank, world = next(dist.rendezvous("env://", timeout=FOR_EVER))
    dist.init_process_group(backend, store=store, rank=rank, world_size=world, timeout=FOR_EVER)
    return Ranks(rank, world, dist.PrefixStore("sweep", store))

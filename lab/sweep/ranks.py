"""The processes of a sweep: one, or as many as torchrun started, on one machine or several.

Ranks divide the plan between them and need each other only at the ends: rank 0 tells what is there already, and waits
for all before it writes what is made of everything. In between they count their UNet calls together, for the progress
bar. A rank that fails stays until all is done and said, since torchrun ends all ranks when one ends with an error.
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

    def together(self, make: Callable[[], object]) -> tuple[object, Exception | None]:
        """What `make` returns on this rank, or, where it fails on any, None and this rank's error, or the first one's
        reason."""
        made, error = None, None
        try:
            made = make()
        except (ValueError, OSError) as raised:
            error = raised
        reasons = [str(error) if error else None] * self.world
        if self.world > 1:
            dist.all_gather_object(reasons, reasons[0])
        failed = [reason for reason in reasons if reason is not None]
        return (None, error or ValueError(failed[0])) if failed else (made, None)

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
        """Ranks leave when all have said what they have to say, since torchrun ends all when one ends with an error.
        Rank 0, which may hold what all count in, goes last. None waits long for ranks that are dead."""
        self.add("have spoken", 1)
        self.wait_for("have spoken", self.world)
        self.add("are gone", 1)
        if self.rank == 0:
            self.wait_for("are gone", self.world)

    def wait_for(self, name: str, number: int) -> None:
        """Waits until a number that all ranks share is so large, but not longer than GIVE_UP."""
        limit = time.monotonic() + GIVE_UP
        while self.add(name, 0) < number and time.monotonic() < limit:
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
        local, gpus = int(os.environ.get("LOCAL_RANK", "0")), torch.cuda.device_count()
        torch.cuda.set_device(local % gpus)
        # nccl takes one rank per GPU.
        backend = "nccl" if int(os.environ.get("LOCAL_WORLD_SIZE", "1")) <= gpus else "gloo"
    store, rank, world = next(dist.rendezvous("env://", timeout=FOR_EVER))
    dist.init_process_group(backend, store=store, rank=rank, world_size=world, timeout=FOR_EVER)
    return Ranks(rank, world, dist.PrefixStore("sweep", store))

"""A `torch.distributed` process group for ranks on one machine: tensors pass through shared memory, without a socket.

    shared_memory.start_ranks(work, ranks)  # forks, joins a process group, calls work(rank)

Gloo sleeps until the other rank's packet arrives: 400 to 1500 us for two ranks on two cores. Ranks that keep looking
need about 10 us.

The functional collectives (`torch.ops._c10d_functional`) work in eager code, in torch.export and in ahead-of-time
compiled code. The latter would wait for gloo forever: it holds Python's lock, which gloo's threads need.
"""

from __future__ import annotations

import mmap
import os
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from multiprocessing.synchronize import Semaphore

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor

from launch.ranks import fork

SLOT = 1 << 20  # bytes that a rank can show the others at one time


@dataclass(frozen=True)
class Shared:
    """What the ranks share. Fork hands it down to them."""

    slots: Tensor  # uint8 [2, ranks, SLOT]
    posts: list[list[Semaphore]]  # posts[writer][reader] counts what the writer has shown and the reader has not seen


def allocate(ranks: int) -> Shared:
    """Memory (2 MiB for each rank) and semaphores. Call it before the ranks are forked. Only the semaphores need
    /dev/shm, 4 KiB for each pair of ranks. Raises OSError if it has no room for them, or cannot be written."""
    memory = mmap.mmap(-1, 2 * ranks * SLOT)  # without a file, for forked processes only
    slots = torch.frombuffer(memory, dtype=torch.uint8).view(2, ranks, SLOT)
    fork = mp.get_context("fork")
    try:
        posts = [[fork.Semaphore(0) for _ in range(ranks)] for _ in range(ranks)]
    except OSError as error:
        size = f"{4 * ranks**2} KiB of /dev/shm for semaphores"
        raise OSError(f"{ranks} ranks need {size} ({error}): give a container its own with --shm-size 1g") from None
    return Shared(slots, posts)


def register(shared: Shared) -> str:
    """Registers the process group with torch in this process; returns its name for `dist.init_process_group`."""

    def create(store: dist.Store, rank: int, ranks: int, timeout: object) -> SharedMemoryGroup:
        return SharedMemoryGroup(rank, shared)

    dist.Backend.register_backend("shared_memory", create, devices=["cpu"])
    return "shared_memory"


def start_ranks(work: Callable[[int], None], ranks: int, timeout: float = 60.0) -> None:
    """Calls work(rank) in `ranks` forked processes of one group, which share the threads of this one, and waits.

    Call it before anything is computed: threads are not forked. If a rank fails, the others are ended. Raises what it
    raised, or ChildProcessError, as `ranks.fork` does.
    """
    fork(partial(run_rank, work, ranks, allocate(ranks)), ranks, timeout)


def run_rank(work: Callable[[int], None], ranks: int, shared: Shared, rank: int) -> None:
    """One of the processes of `start_ranks`."""
    torch.set_num_threads(max(1, torch.get_num_threads() // ranks))
    store = dist.HashStore()  # torch asks for one, though nothing is left to agree on
    dist.init_process_group(register(shared), store=store, rank=rank, world_size=ranks)
    work(rank)
    dist.destroy_process_group()


class Done(dist.Work):
    """The handle that a collective returns. Nothing is left to wait for."""

    def wait(self, timeout: object = None) -> bool:
        return True


class SharedMemoryGroup(dist.ProcessGroup):
    """The collectives, under the names by which torch calls them.

    all_reduce, all_gather, all_gather_into_tensor, broadcast and barrier, for CPU tensors of any size, dtype and
    strides. As in torch, all ranks call the same collectives in the same order, with equal shapes and dtypes.
    """

    def __init__(self, rank: int, shared: Shared) -> None:
        ranks = range(len(shared.posts))
        super().__init__(rank, len(ranks))
        self.me = rank
        self.slots = shared.slots
        self.half = 0
        self.outgoing = [shared.posts[rank][reader] for reader in ranks if reader != rank]
        self.incoming = [shared.posts[writer][rank] for writer in ranks if writer != rank]
        self.views: dict[tuple, tuple[Tensor, Tensor]] = {}  # making them anew would take as long as all the rest
        self.done = Done()

    def setGroupName(self, name: str) -> None:
        self.name_in_graphs = name

    def getGroupName(self) -> str:
        return self.name_in_graphs

    def show(self, x: Tensor) -> Tensor:
        """x [...], at most SLOT bytes -> the x of every rank, [ranks, ...], to be read before the next exchange.

        There are two halves, because a rank may be one exchange ahead: it writes into one half while others still read
        the other. It gets no further, for it waits until they have read that too.
        """
        self.half ^= 1
        key = self.half, x.shape, x.dtype
        if key not in self.views:
            everyone = self.slots[self.half, :, : x.nbytes].view(x.dtype).view(-1, *x.shape)
            self.views[key] = everyone, everyone[self.me]
        everyone, own = self.views[key]
        own.copy_(x)
        for post in self.outgoing:
            post.release()
        for post in self.incoming:
            while not post.acquire(block=False):
                os.sched_yield()
        return everyone

    def exchange(self, x: Tensor) -> Tensor:
        """x [...] -> the x of every rank, [ranks, ...], to be read before the next exchange."""
        if x.nbytes <= SLOT:
            return self.show(x)
        everyone = x.new_empty(self.size(), x.numel())
        length = SLOT // x.itemsize
        for piece, pieces in zip(x.flatten().split(length), everyone.split(length, dim=1), strict=True):
            pieces.copy_(self.show(piece))
        return everyone.view(-1, *x.shape)

    def allreduce(self, tensors: list[Tensor], opts: dist.AllreduceOptions) -> Done:
        """Sums; every rank adds in the order of ranks, and so gets the same bits. Narrow floats add up in float32."""
        if opts.reduceOp != dist.ReduceOp.SUM:
            raise NotImplementedError(f"ranks that share memory can add up tensors, not {opts.reduceOp}")
        for x in tensors:
            if x.nbytes <= SLOT or not x.is_contiguous():
                torch.sum(self.exchange(x), 0, out=x)
            else:  # each piece in place: 0.4 to 0.5 x the time of gathering all first
                for piece in x.view(-1).split(SLOT // x.itemsize):
                    torch.sum(self.show(piece), 0, out=piece)
        return self.done

    def allgather(self, outputs: list[list[Tensor]], inputs: list[Tensor], opts: object) -> Done:
        for rows, x in zip(outputs, inputs, strict=True):
            for row, everyones in zip(rows, self.exchange(x), strict=True):
                row.copy_(everyones)
        return self.done

    def all_gather_single(self, output: Tensor, x: Tensor, opts: object) -> Done:
        everyone = self.exchange(x)
        output.view(everyone.shape).copy_(everyone)
        return self.done

    def all_gather_single_coalesced(self, outputs: list[Tensor], inputs: list[Tensor], opts: object) -> Done:
        for output, x in zip(outputs, inputs, strict=True):
            self.all_gather_single(output, x, opts)
        return self.done

    _allgather_base = all_gather_single  # the names of both up to torch 2.9, which NxD needs
    allgather_into_tensor_coalesced = all_gather_single_coalesced

    def broadcast(self, tensors: list[Tensor], opts: dist.BroadcastOptions) -> Done:
        for x in tensors:
            x.copy_(self.exchange(x)[opts.rootRank])
        return self.done

    def barrier(self, opts: object) -> Done:
        """Sleeps until all ranks are here, unlike an exchange: what they wait for (a compiler) may take long."""
        for post in self.outgoing:
            post.release()
        for post in self.incoming:
            post.acquire()
        return self.done

"""Runs another port's own modules on a CPU: one forked process a rank, gloo between them, hooks on the modules.

A port is imported from where it is installed, else from a checkout that an environment variable names (`SOURCES`).
AWS's closed packages are answered by `tools.ports.closed` where they are not installed. The ports need transformers 4:
NxD's core imports a module that transformers 5 dropped.
"""

from __future__ import annotations

import logging
import os
import sys
import tempfile
import traceback
import warnings
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor, nn

from checkpoint.config import llama_config, read_config
from checkpoint.tensors import open_checkpoint
from launch.ranks import fork
from llama_neuron import UsageError
from tools.ports.closed import stand_in
from tools.ports.common import Numbers, find_heads, join_calls, join_heads, write_capture

# which environment variable names the folder of a package, and what that folder must be
SOURCES = {
    "neuronx_distributed": ("NXD_SRC", "src of a checkout of github.com/aws-neuron/neuronx-distributed"),
    "neuronx_distributed_inference": (
        "NXDI_SRC",
        "src of a checkout of github.com/aws-neuron/neuronx-distributed-inference",
    ),
    "optimum.neuron": ("OPTIMUM_SRC", "a checkout of github.com/huggingface/optimum-neuron"),
    "model": ("EXAMPLE_SRC", "examples/inference/llama of a checkout of github.com/aws-neuron/neuronx-distributed"),
}
QUERY = ("q_proj", "q", "heads")  # a rank has some query heads of these,
KEY = ("k_proj", "k", "v")  # and some KV heads of these
Pick = Callable[[object], Tensor]


def find_sources(*packages: str) -> None:
    """Makes packages importable. Raises UsageError, naming the variable, if one is neither installed nor there."""
    for package in packages:
        variable, holds = SOURCES[package]
        sys.path[:0] = filter(None, os.environ.get(variable, "").split(os.pathsep))
        try:
            found = find_spec(package)
        except ModuleNotFoundError:  # of the package above it
            found = None
        if found is None:
            raise UsageError(f"{package} is not installed: set {variable} to {holds}")


def pad_prompts(prompts: list[list[int]], length: int = 0) -> tuple[Tensor, Tensor]:
    """ids and mask, int64 [B,S]: prompts and ones, then zeros. S is the longest prompt, or `length`."""
    length = max(length, *map(len, prompts))
    ids = torch.zeros(len(prompts), length, dtype=torch.long)
    mask = torch.zeros_like(ids)
    for row, prompt in enumerate(prompts):
        ids[row, : len(prompt)] = torch.tensor(prompt)
        mask[row, : len(prompt)] = 1
    return ids, mask


class Taps:
    """What the modules of one rank compute: by the names of `tools.capture`, a tensor of each call."""

    def __init__(self) -> None:
        self.calls: dict[str, list[Tensor]] = {}

    def keep(self, name: str, x: Tensor) -> None:
        self.calls.setdefault(name, []).append(x.detach().clone())

    def output(self, module: nn.Module, name: str, pick: Pick = lambda output: output) -> None:
        """Keeps what `module` returns; `pick` takes the tensor from it."""
        module.register_forward_hook(lambda module, args, output: self.keep(name, pick(output)))

    def input(self, module: nn.Module, name: str) -> None:
        """Keeps the first argument of `module`."""
        module.register_forward_pre_hook(lambda module, args: self.keep(name, args[0]))

    def join(self, prompts: list[list[int]]) -> dict[str, Tensor]:
        """[B,P+M-1,...] of each name, as `join_calls` joins them."""
        return {name: join_calls(calls, prompts) for name, calls in self.calls.items()}


def heads_of(attention: nn.Module, hf: Path) -> tuple[Numbers, Numbers]:
    """HF's numbers of the query and KV heads on this rank, by the weights of NxDI's or Optimum's layer 0."""
    projection = attention.qkv_proj
    size = attention.head_dim
    sizes = attention.num_heads * size, attention.num_key_value_heads * size
    if hasattr(projection, "Wqkv"):
        rows = projection.Wqkv.weight.split((*sizes, sizes[1]))
    else:
        rows = projection.q_proj.weight, projection.k_proj.weight
    weights = open_checkpoint(hf, llama_config(read_config(hf)))
    query = find_heads(rows[0], weights.get("model.layers.0.self_attn.q_proj.weight"), size)
    key = find_heads(rows[1], weights.get("model.layers.0.self_attn.k_proj.weight"), size)
    return query, key


def join_ranks(ranks: list[dict[str, Tensor]], numbers: list[tuple[Numbers, Numbers]]) -> tuple[dict, list[str]]:
    """The tensors of all ranks as one, and for each that differs between ranks a line that says so.

    `ranks`: what `Taps.join` returns on each, heads as [B,P,n,D] or [B,P,n*D]. `numbers`: HF's numbers of each rank's
    query and KV heads. Of a tensor that every rank has whole, rank 0's counts.
    """
    joined, lines = {}, []
    for name, first in ranks[0].items():
        kind = name.rpartition(".")[2]
        shards = [rank[name] for rank in ranks]
        if kind in QUERY + KEY:
            own = [query if kind in QUERY else key for query, key in numbers]
            joined[name], heads = join_heads(shards, own)
            if heads:
                lines.append(f"{name}: copies of head {', '.join(map(str, heads))} differ between ranks")
        else:
            joined[name] = first
            if not all(torch.equal(first, shard) for shard in shards):
                lines.append(f"{name}: ranks differ, rank 0's is kept")
    return joined, lines


def capture_ranks(
    out: Path, packages: tuple[str, ...], capture_rank: Callable[[int], tuple], *, tp: int, **facts: object
) -> None:
    """Calls capture_rank(rank) in `tp` processes that can import `packages`, and writes what they return.

    That is a rank's tensors, HF's numbers of its query and KV heads, and the new ids. `facts` are more arguments of
    `write_capture`. Raises UsageError, in one line with the place in the port, if the port fails.
    """

    def work(rank: int) -> None:
        os.environ["NXD_CPU_MODE"] = "1"
        torch.set_num_threads(1)
        warnings.simplefilter("ignore")
        logging.disable(logging.WARNING)
        stand_in()
        find_sources(*packages)
        dist.init_process_group("gloo", store=dist.FileStore(store, tp), rank=rank, world_size=tp)
        results = [None] * tp if rank == 0 else None
        try:
            dist.gather_object(capture_rank(rank), results)
        except Exception as error:
            raise described(error) from error
        if rank == 0:
            tensors, numbers, new_ids = zip(*results, strict=True)
            joined, differing = join_ranks([*tensors], [*numbers])
            write_capture(out, joined, new_ids=new_ids[0], tp=tp, differing=differing, **facts)
        dist.barrier()
        dist.destroy_process_group()

    with tempfile.TemporaryDirectory() as folder:
        store = f"{folder}/store"
        fork(work, tp)


def described(error: Exception) -> Exception:
    """UsageError that says what a port raised, and where; an error of this project's own code as it is."""
    if isinstance(error, UsageError):
        return error
    if isinstance(error, ImportError):
        return UsageError(f"the port cannot be imported: {error}; docs/ports.md lists the packages that it needs")
    own = str(Path(__file__).parent)
    for frame in reversed(traceback.extract_tb(error.__traceback__)):
        if frame.filename.startswith(own):
            return error
        if "/torch/" not in frame.filename:
            text = str(error).partition("\n")[0]
            return UsageError(f"the port raises {type(error).__name__}: {text} ({frame.filename}:{frame.lineno})")
    return error

"""From what the ranks of a port compute to the file that `python -m tools.audit --captured FILE` reads: for the drivers
of this folder, and for a port of your own.

Tensors have the names and shapes of `tools.capture`, which HF's own order of heads gives: B prompts, the longest of P
tokens, M new tokens each, so P+M-1 positions that were fed; n heads on a rank, H query and K key/value heads in all, D
head_dim, E hidden size, V vocabulary. A place that was not captured is left out of the file.

A driver is a function

    capture(hf: Path, out: Path, *, prompts: list[list[int]], new_tokens: int, tp: int, device: str, dtype: str)

that runs a port of the checkpoint `hf` on `prompts`, and ends by calling `write_capture(out, ...)` once. `dtype` is one
of checkpoint.config.DTYPES. It raises UsageError if the port cannot run as asked, and says why.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from checkpoint.output import replacing, write_tensors
from tools.audit.chain import halves_from_pairs as halves_from_pairs  # for drivers, and for a port of your own
from tools.audit.chain import pairs_from_halves as pairs_from_halves
from tools.capture import versions

Numbers = list[int | None]  # HF's number of each head that a rank has, in the rank's order; None is a head of zeros

PACKAGES = (
    "torch",
    "transformers",
    "torch-xla",
    "torch-neuronx",
    "neuronx-cc",
    "neuronx-distributed",
    "neuronx-distributed-inference",
    "optimum-neuron",
)


# ---- heads


def find_heads(shard: Tensor, weight: Tensor, head_dim: int) -> Numbers:
    """HF's numbers of the heads that a rank has, found by their weights.

    `shard`: the rows [n*D,E] of q_proj, k_proj or v_proj on a rank, in the port's dtype. `weight`: HF's whole weight of
    the same layer. Raises ValueError if HF has no such head: the port changed the rows (`halves_from_pairs`
    undoes Meta's order), or it is another layer.
    """
    size = head_dim, weight.shape[-1]
    known = weight.to(shard.device, shard.dtype).unflatten(0, (-1, head_dim)).view(-1, *size)
    numbers: Numbers = []
    for place, rows in enumerate(shard.detach().view(-1, *size)):
        if not rows.any():
            numbers.append(None)
            continue
        same = [number for number, head in enumerate(known) if torch.equal(head, rows)]
        if not same:
            raise ValueError(f"head {place} of the shard has rows that no head of HF's weight has")
        numbers.append(same[0])
    return numbers


def join_heads(shards: list[Tensor], numbers: list[Numbers]) -> tuple[Tensor, list[int]]:
    """The heads of all ranks, in HF's order, and the numbers of those whose copies on two ranks differ.

    `shards`: each rank's [B,P,n,D], or [B,P,n*D]. `numbers`: of each rank, as `find_heads` or
    `llama_neuron.shard_heads` gives them. The first copy counts. Raises ValueError if a head is on no rank.
    """
    found: dict[int, Tensor] = {}
    differing = set()
    for shard, own in zip(shards, numbers, strict=True):
        heads = shard if shard.dim() == 4 else shard.unflatten(-1, (len(own), -1))
        for place, number in enumerate(own):
            if number is None:
                continue
            x = heads[:, :, place]
            first = found.setdefault(number, x)
            if not torch.allclose(first, x, rtol=0, atol=0, equal_nan=True):
                differing.add(number)
    missing = sorted({*range(max(found) + 1)} - {*found})
    if missing:
        raise ValueError(f"head {missing[0]} is on no rank")
    return torch.stack([found[number] for number in sorted(found)], dim=2), sorted(differing)


# ---- calls and texts


def join_calls(calls: list[Tensor], prompts: list[list[int]]) -> Tensor:
    """What a module returned in M calls, as [B,P+M-1,...]: each row its prompt, then its new tokens, then zeros.

    `calls`: the first is [B,S,...] of the prompts, each padded at its end to S, the others [B,1,...].
    """
    rows = []
    for row, prompt in enumerate(prompts):
        decoded = [call[row] for call in calls[1:]]
        rows.append(torch.cat((calls[0][row, : len(prompt)], *decoded)))
    return pad_sequence(rows, batch_first=True)


def join_texts(prompts: list[list[int]], new_ids: list[list[int]]) -> Tensor:
    """`ids` int64 [B,P+M] of the file: each row its prompt, then its new tokens, then zeros."""
    texts = [torch.tensor(prompt + new) for prompt, new in zip(prompts, new_ids, strict=True)]
    return pad_sequence(texts, batch_first=True)


# ---- the file


def write_capture(
    out: Path,
    tensors: dict[str, Tensor],
    *,
    prompts: list[list[int]],
    new_ids: list[list[int]],
    dtype: str,
    tp: int,
    device: str,
    differing: Iterable[str] = (),
    notes: Iterable[str] = (),
    name: str = "capture.safetensors",
) -> Path:
    """Writes `out`/capture.safetensors, and returns its path. The folder is made if it does not exist.

    `tensors`: what `tools.capture` lists, without `ids`, on any device; some of them will do. `logits` may be those
    that chose the new tokens alone, [B,M,V]. `differing`: lines such as "layers.0.k: ...", one for each tensor that
    ranks should have alike and do not; they fail the audit. `notes` are for whoever reads it.
    """
    facts = {
        "versions": versions(PACKAGES),
        "dtype": dtype,
        "tp": str(tp),
        "device": device,
        "prompt_tokens": json.dumps([len(prompt) for prompt in prompts]),
        "differing": json.dumps([*differing]),
        "notes": json.dumps([*notes]),
    }
    everything = {"ids": join_texts(prompts, new_ids)}  # of the widest dtype, so it comes first
    for key, x in sorted(tensors.items(), key=lambda item: -item[1].element_size()):
        everything[key] = x.detach().cpu()
    out.mkdir(parents=True, exist_ok=True)
    path = out / name
    with replacing(path) as file:
        write_tensors(file, everything.items(), len(everything), facts)
    return path

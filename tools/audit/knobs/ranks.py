"""What ranks hold. Ports have been seen to be wrong on one rank alone, and to exchange the shares of two."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from llama_neuron import shard_heads
from tools.audit.chain import Step
from tools.audit.knobs.knob import Compute, Knob
from tools.audit.knobs.linear import product_of
from tools.audit.rounding import equal_shares

if TYPE_CHECKING:
    from tools.audit.causes import Case

BY_QUERY_HEADS = ("q_proj", "q", "heads")
BY_KV_HEADS = ("k_proj", "k", "v")
BY_COLUMNS = ("gate_proj", "up_proj", "inner", "logits")
NORM_PRODUCTS = {
    "input_layernorm": ("q_proj", "k_proj", "v"),
    "post_attention_layernorm": ("gate_proj", "up_proj"),
}


def on_rank(case: Case, knob: Knob, rank: int, meaning: str = "") -> Knob:
    """A knob that is turned on one rank only: for the outputs that the rank holds."""

    def limited(at: Step, kind: str, compute: Compute) -> Tensor:
        right = getattr(at, kind)()
        return torch.where(held_by(case, right, kind, rank), compute(at), right)

    steps = {}
    for kind, compute in knob.steps.items():
        if kind in BY_QUERY_HEADS + BY_KV_HEADS + BY_COLUMNS:
            steps[kind] = partial(limited, kind=kind, compute=compute)
        for product in NORM_PRODUCTS.get(kind, ()):  # a rank does not hold a part of a norm
            with_norm = partial(product_of, kind=product, compute=compute)
            steps[product] = partial(limited, kind=product, compute=with_norm)
    return Knob(meaning or f"{knob.meaning}, on rank {rank}", steps)


def held_by(case: Case, x: Tensor, kind: str, rank: int) -> Tensor:
    """bool [1,n,1...]: which heads or columns of x [P,n,...] a rank holds."""
    num_heads = case.chain.config.num_attention_heads
    num_kv_heads = case.chain.config.num_key_value_heads
    query_heads, kv_heads = shard_heads(num_heads, num_kv_heads, case.tp)[rank]
    chosen = torch.zeros(x.shape[1], dtype=torch.bool)
    if kind in BY_QUERY_HEADS:
        chosen[[head for head in query_heads if head is not None]] = True
    elif kind in BY_KV_HEADS:
        chosen[[head for head in kv_heads if head is not None]] = True
    else:
        chosen[equal_shares(x.shape[1], case.tp)[rank]] = True
    return chosen.view(1, -1, *[1] * (x.dim() - 2))


def pairs(tp: int) -> list[tuple[int, int]]:
    """All pairs of ranks."""
    found = []
    for first in range(tp):
        for second in range(first + 1, tp):
            found.append((first, second))
    return found


def swapped_ranks(x: Tensor, tp: int, first: int, second: int) -> Tensor:
    """x [P,n,...] whose equal slices of n for two ranks are exchanged."""
    slices = list(x.chunk(tp, dim=1))
    slices[first], slices[second] = slices[second], slices[first]
    return torch.cat(slices, dim=1)

"""q_proj, k_proj, v_proj and o_proj. Ports swap them, leave their rows in the layout of Meta's checkpoints, norm q and
k, rotate v, cut a fused Wqkv across ranks, and give o_proj its heads in another order."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from tools.audit.chain import LINEAR, Step, halves_from_pairs, pairs_from_halves, rms_norm, rotate
from tools.audit.knobs.knob import Compute, Knob, Knobs, changing
from tools.audit.knobs.linear import QKV, weights, with_weight
from tools.audit.knobs.ranks import pairs, swapped_ranks
from tools.audit.knobs.sums import partial_sums

if TYPE_CHECKING:
    from tools.audit.causes import Case

Order = Callable[[list[Tensor]], Tensor]  # q, k and v's rows -> the rows of Wqkv


def projections(case: Case, kind: str) -> Knobs:
    """One of q, k and v."""
    yield from weights(case, kind)
    parameters = case.chain.weights.parameters
    letter = kind.removesuffix("_proj")
    own = parameters[f"model.layers.0.{LINEAR[kind]}.weight"]
    for other in ("q", "k", "v"):
        path = f"self_attn.{other}_proj"
        its = parameters[f"model.layers.0.{path}.weight"]
        if other != letter and its.shape == own.shape:
            swapped = {kind: lambda at, path=path: at.heads_of(at.linear(path, at.get("input_layernorm")))}
            yield Knob(f"{letter} holds {other}: the parts of Wqkv are swapped", swapped)
    if kind == "v":
        turned = {"v": lambda at: rotate(at.v(), at.angles(), at.chain.attention_scaling)}
        yield Knob("v is rotated, as q and k are", turned)


# ---- q_proj and k_proj together


def query_and_key(case: Case) -> Knobs:
    to_meta = partial(pairs_from_halves, dim=1)
    from_meta = partial(halves_from_pairs, dim=1)
    name = "the rows of q_proj and k_proj are in the layout of Meta's checkpoints"
    yield Knob(name, with_rows(case, to_meta))
    name = "the rows of q_proj and k_proj are converted from Meta's layout twice"
    yield Knob(name, with_rows(case, from_meta))
    both = {kind: partial(normed, kind=kind) for kind in ("q_proj", "k_proj")}
    yield Knob("q and k are normed by heads (as Qwen3 does)", changing(case, both))
    if case.tp > 1:
        yield from fused_rows(case)


def with_rows(case: Case, change: Callable[[Tensor], Tensor]) -> dict[str, Compute]:
    """q_proj and k_proj whose rows [n,D,E] are in another order."""

    def changed(at: Step, weight: Tensor) -> Tensor:
        by_heads = weight.unflatten(0, (-1, case.chain.head_dim))
        return change(by_heads).flatten(0, 1)

    both = {**with_weight("q_proj", changed), **with_weight("k_proj", changed)}
    return changing(case, both)


def normed(at: Step, kind: str) -> Tensor:
    x = getattr(at, kind)()
    return rms_norm(x, 1.0, at.chain.eps)


# ---- Wqkv


def fused_rows(case: Case) -> Knobs:
    """Wqkv as ranks may cut it or read it."""
    config = case.chain.config
    for heads in (config.num_attention_heads, config.num_key_value_heads):
        if heads % case.tp:
            return
    if config.attention_bias:
        return

    def by_groups(parts: list[Tensor]) -> Tensor:
        cut_by_group = [part.unflatten(0, (config.num_key_value_heads, -1)) for part in parts]
        return torch.cat(cut_by_group, dim=1).flatten(0, 1)

    ways: dict[str, Order] = {
        "the rows of Wqkv are cut across ranks before they are put together by rank": torch.cat,
        "Wqkv is written by groups of heads (q .. q k v) and read as q, k, v": by_groups,
    }
    for name, order in ways.items():
        steps = {kind: partial(read_by_ranks, kind=kind, order=order, tp=case.tp) for kind in QKV}
        yield Knob(name, steps)


def read_by_ranks(at: Step, kind: str, order: Order, tp: int) -> Tensor:
    """q, k or v where each rank reads its share of Wqkv as its own q, k and v."""
    parts = [at.weight(LINEAR[part]) for part in QKV]
    sizes = [len(part) // tp for part in parts]
    found = []
    for own in order(parts).chunk(tp):
        pieces = own.split(sizes)
        found.append(pieces[QKV.index(kind)])
    product = F.linear(at.get("input_layernorm"), torch.cat(found))
    return at.heads_of(product)


# ---- o_proj


def outputs(case: Case) -> Knobs:
    """o_proj."""
    yield from weights(case, "attention")
    name = "o_proj takes the heads by head_dim, not by heads"
    yield from_heads(name, lambda heads: heads.transpose(1, 2))
    num_heads = case.chain.config.num_attention_heads
    for shift in range(1, num_heads):
        name = f"o_proj takes heads that are off by {shift}"
        yield from_heads(name, lambda heads, shift=shift: heads.roll(shift, dims=1))
    if num_heads % case.tp == 0 and case.tp > 1:
        yield from heads_on_ranks(case)
    yield from partial_sums(case, "attention")


def from_heads(name: str, change: Callable[[Tensor], Tensor]) -> Knob:
    """o_proj of other heads [P,H,D]."""

    def compute(at: Step) -> Tensor:
        heads = change(at.get("heads"))
        return at.linear(LINEAR["attention"], heads.flatten(1))

    return Knob(name, {"attention": compute})


def heads_on_ranks(case: Case) -> Knobs:
    """o_proj of heads that are in another order on each rank, or on another rank."""
    tp = case.tp

    def rolled(heads: Tensor, shift: int) -> Tensor:
        ranks = [own.roll(shift, dims=1) for own in heads.chunk(tp, dim=1)]
        return torch.cat(ranks, dim=1)

    for shift in range(1, case.chain.config.num_attention_heads // tp):
        yield from_heads(f"o_proj takes each rank's heads off by {shift}", partial(rolled, shift=shift))
    for first, second in pairs(tp):
        name = f"the columns of o_proj are exchanged between ranks {first} and {second}"
        yield from_heads(name, partial(swapped_ranks, tp=tp, first=first, second=second))

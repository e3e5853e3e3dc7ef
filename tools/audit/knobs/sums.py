"""The layer's input, the residual stream and sums over ranks. Ports skip and repeat layers, leave terms out, add them
twice or scale them, and lose all-reduces or make them twice."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING

import torch.nn.functional as F
from torch import Tensor

from tools.audit.chain import LINEAR, Step, rms_norm
from tools.audit.knobs.knob import Compute, Knob, Knobs, beside
from tools.audit.knobs.ranks import on_rank
from tools.audit.knobs.search import fitted, told
from tools.audit.rounding import columns_of_ranks, equal_shares, row_parallel

if TYPE_CHECKING:
    from tools.audit.causes import Case
    from tools.audit.judge import Text

IN_LAYER = (
    "input_layernorm",
    "q_proj",
    "k_proj",
    "v",
    "attention",
    "post_attention_layernorm",
    "gate_proj",
    "up_proj",
    "mlp",
)
SCALES = [0.1, 0.25, 0.5, 0.7, 0.9, 1.1, 1.4, 2.0, 4.0, 10.0]


# ---- the layer's input


def streams(case: Case) -> Knobs:
    for number in range(case.chain.layers):
        if len(case.layers) == 1 and number != case.number:
            other = {"stream": lambda at, number=number: at.arrived(f"hidden_states.{number}")}
            yield Knob(f"the layer gets what layer {number} gets: a layer is skipped or repeated", other)
            yield whole_layer(number)
    yield from stream_of_a_rank(case)
    root = case.chain.config.hidden_size**0.5
    scaled = {"stream": lambda at: at.stream() * root}
    yield Knob("the layer gets a residual stream that is scaled by the root of the hidden size", scaled)


def whole_layer(number: int) -> Knob:
    """All weights of another layer."""

    def as_layer(at: Step, kind: str) -> Tensor:
        def arrived(name: str) -> Tensor:
            return at.arrived(name.replace(f"layers.{number}.", f"layers.{at.number}."))

        its = Step(at.chain, number, arrived)
        return getattr(its, kind)()

    steps = {kind: partial(as_layer, kind=kind) for kind in IN_LAYER}
    return Knob(f"norms and weights are those of layer {number}: layers are in another order", steps)


# ---- the residual stream after attention


def middles(case: Case) -> Knobs:
    """What is added to attention's output."""
    root = case.chain.config.hidden_size**0.5
    sums: dict[str, Compute] = {
        "the layer's input alone, attention is not added": lambda at: at.get("stream"),
        "attention's output alone": lambda at: at.get("attention"),
        "attention's output added twice": lambda at: at.get("stream") + 2 * at.get("attention"),
        "a residual stream that is scaled by the root of the hidden size (as Gemma does)": (
            lambda at: root * at.get("stream") + at.get("attention")
        ),
    }
    for name, compute in sums.items():
        yield Knob(f"the MLP gets {name}", {"middle": compute})
        norm = {"post_attention_layernorm": partial(norm_of, compute=compute)}
        yield Knob(f"the MLP gets {name}; the residual does not", norm)
    yield from fitted(case, SCALES, attention_scaled)
    yield from fitted(case, SCALES, both_scaled)
    normed = {"middle": lambda at: at.get("input_layernorm") + at.get("attention")}
    yield Knob("the residual is taken after input_layernorm", normed)
    parallel = {"post_attention_layernorm": lambda at: at.get("input_layernorm")}
    yield Knob("the MLP runs beside attention, from the same norm (as GPT-J does)", parallel)


def attention_scaled(value: float) -> Knob:
    steps = {"middle": lambda at: at.get("stream") + value * at.get("attention")}
    return Knob(f"attention's output is scaled by {told(value)} before it is added", steps)


def both_scaled(value: float) -> Knob:
    steps: dict[str, Compute] = {
        "middle": lambda at: at.get("stream") + value * at.get("attention"),
        "residual": lambda at: at.get("middle") + value * at.get("mlp"),
    }
    return Knob(f"the outputs of attention and of the MLP are scaled by {told(value)} (as Granite does)", steps)


def norm_of(at: Step, compute: Compute) -> Tensor:
    return rms_norm(compute(at), at.weight("post_attention_layernorm"), at.chain.eps)


# ---- the layer's output

OUTPUTS: dict[str, Compute] = {
    "the residual around attention is left out": lambda at: at.get("attention") + at.get("mlp"),
    "the residual around the MLP is left out": lambda at: at.get("mlp"),
    "attention's output is not added": lambda at: at.get("stream") + at.get("mlp"),
    "the MLP's output is not added": lambda at: at.get("middle"),
    "attention's output is added twice": lambda at: at.residual() + at.get("attention"),
    "the MLP's output is added twice": lambda at: at.residual() + at.get("mlp"),
    "the residual is taken after post_attention_layernorm": (
        lambda at: at.get("post_attention_layernorm") + at.get("mlp")
    ),
    "the residual is taken after input_layernorm": (
        lambda at: at.get("input_layernorm") + at.get("attention") + at.get("mlp")
    ),
    "the layer is skipped: its output is its input": lambda at: at.get("stream"),
}


def residuals(case: Case) -> Knobs:
    """The layer's output."""
    for name, compute in OUTPUTS.items():
        yield Knob(name, {"residual": compute})

    def of_row(at: Step, other: Text) -> Tensor:
        its = Step(at.chain, at.number, other.flow.arrived)
        return beside(case, at.residual(), its.residual(), other)

    for other in case.others:
        row = partial(of_row, other=other)
        yield Knob("the layer's output is that of another row of the batch", {"residual": row})


# ---- sums over ranks


def partial_sums(case: Case, kind: str) -> Knobs:
    """A row-parallel product whose sum has other terms than one from each rank."""
    tp = case.tp
    if tp == 1:
        return

    def knob(name: str, combine: Callable[[list[Tensor]], Tensor]) -> Knob:
        def compute(at: Step) -> Tensor:
            parts = parts_of_ranks(at, kind, tp)
            path, _ = row_parallel(at, kind)
            bias = at.bias(path)
            return combine(parts) + (0.0 if bias is None else bias)

        return Knob(name, {kind: compute})

    for rank in range(tp):
        name = f"only rank {rank} is in the sum: the all-reduce is missing"
        yield knob(name, lambda parts, rank=rank: parts[rank])
        if tp > 2:
            yield knob(f"rank {rank} is missing in the sum", lambda parts, rank=rank: sum(parts) - parts[rank])
        yield knob(f"rank {rank} is in the sum twice", lambda parts, rank=rank: sum(parts) + parts[rank])
    for times in sorted({2, tp}):
        yield knob(f"the sum over ranks is made {times} times", lambda parts, times=times: sum(parts) * times)
    yield knob("the sum over ranks is a mean", lambda parts: sum(parts) / tp)


def parts_of_ranks(at: Step, kind: str, tp: int) -> list[Tensor]:
    """What each rank adds to the sum of a row-parallel product, without the bias."""
    return [part_of_rank(at, kind, own) for own in columns_of_ranks(at, kind, tp)]


def part_of_rank(at: Step, kind: str, own: Tensor) -> Tensor:
    path, x = row_parallel(at, kind)
    weight = at.weight(path)
    return F.linear(x[:, own], weight[:, own])


def partial_stream(case: Case) -> Knobs:
    """Ranks that did not get the sum over ranks after attention: their MLP sees another residual stream."""
    tp = case.tp
    if tp == 1:
        return

    def normed(at: Step, rank: int) -> Tensor:
        own = columns_of_ranks(at, "attention", tp)[rank]
        hidden = at.get("stream") + part_of_rank(at, "attention", own)
        return rms_norm(hidden, at.weight("post_attention_layernorm"), at.chain.eps)

    def product(at: Step, kind: str, rank: int) -> Tensor:
        changed = at.linear(LINEAR[kind], normed(at, rank))
        result = getattr(at, kind)()
        own = equal_shares(result.shape[1], tp)[rank]
        result[:, own] = changed[:, own]
        return result

    for rank in range(tp):
        steps = {kind: partial(product, kind=kind, rank=rank) for kind in ("gate_proj", "up_proj")}
        yield Knob(f"rank {rank} did not get the sum after attention: the all-reduce is missing there", steps)


def stream_of_a_rank(case: Case) -> Knobs:
    """Ranks that did not get a sum over ranks of the layer before."""
    if case.tp == 1 or not case.number:
        return
    before = case.number - 1

    def normed(at: Step, rank: int, kind: str) -> Tensor:
        its = Step(at.chain, before, at.arrived)
        own = columns_of_ranks(its, kind, case.tp)[rank]
        part = part_of_rank(its, kind, own)
        hidden = at.get("stream") - its.get(kind) + part
        return rms_norm(hidden, at.weight("input_layernorm"), at.chain.eps)

    sums = {"mlp": "the MLP", "attention": "attention"}
    for rank in range(case.tp):
        for kind, words in sums.items():
            name = f"rank {rank} did not get the sum after {words} of layer {before}: the all-reduce is missing there"
            everywhere = Knob(name, {"input_layernorm": partial(normed, rank=rank, kind=kind)})
            yield on_rank(case, everywhere, rank, name)

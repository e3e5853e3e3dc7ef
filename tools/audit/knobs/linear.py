"""Linear layers. Ports round their weights, transpose them, take another layer's, and leave biases out or add them once
per rank."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING

import torch.nn.functional as F
from torch import Tensor

from tools.audit.chain import LINEAR, Step
from tools.audit.knobs.knob import Compute, Knob, Knobs
from tools.audit.knobs.quantization import Round, through, ways_to_round
from tools.audit.rounding import row_parallel

if TYPE_CHECKING:
    from tools.audit.causes import Case

QKV = ("q_proj", "k_proj", "v")


def arriving(at: Step, kind: str) -> Tensor:
    """What goes into the product of a step."""
    if kind in ("attention", "mlp"):
        _, x = row_parallel(at, kind)
        return x
    if kind == "logits":
        return at.arrived("final_norm")
    if kind in QKV:
        return at.get("input_layernorm")
    return at.get("post_attention_layernorm")


def shaped(at: Step, kind: str, product: Tensor) -> Tensor:
    """A product in the shape of its step: q, k and v are by heads."""
    if kind in QKV:
        return at.heads_of(product)
    return product


def product_of(at: Step, kind: str, compute: Compute) -> Tensor:
    """A step's product with another input."""
    return shaped(at, kind, at.linear(LINEAR[kind], compute(at)))


def with_weight(kind: str, change: Callable[[Step, Tensor], Tensor]) -> dict[str, Compute]:
    """A step whose weight is another one."""

    def compute(at: Step) -> Tensor:
        weight = change(at, at.weight(LINEAR[kind]))
        product = F.linear(arriving(at, kind), weight, at.bias(LINEAR[kind]))
        return shaped(at, kind, product)

    return {kind: compute}


def with_bias(kind: str, times: float) -> dict[str, Compute]:
    """A step whose bias is added several times, or a part of it."""

    def compute(at: Step) -> Tensor:
        product = F.linear(arriving(at, kind), at.weight(LINEAR[kind]))
        return shaped(at, kind, product + times * at.bias(LINEAR[kind]))

    return {kind: compute}


def weights(case: Case, kind: str) -> Knobs:
    """The weight and the bias of a linear layer in other ways."""
    path = LINEAR[kind]
    prefix = "" if kind == "logits" else f"model.layers.{case.number or 0}."
    parameters = case.chain.weights.parameters
    stored = parameters[f"{prefix}{path}.weight"]
    yield from weights_in_fewer_bits(case, kind, stored.shape[1])
    if stored.shape[0] == stored.shape[1]:
        yield Knob(f"the weight of {path} is transposed", with_weight(kind, lambda at, weight: weight.T))
    if f"{prefix}{path}.bias" in parameters:
        yield from biases(case, kind)
    if kind != "logits" and len(case.layers) == 1:
        yield from weights_of_layers(case, kind)


def weights_in_fewer_bits(case: Case, kind: str, width: int) -> Knobs:
    dtype = case.text.dtype

    def rounded(at: Step, weight: Tensor, round_weight: Round) -> Tensor:
        return round_weight(through(weight, dtype))

    for name, round_weight in ways_to_round(width, dtype):
        change = partial(rounded, round_weight=round_weight)
        yield Knob(f"the weight of {LINEAR[kind]} is rounded to {name}", with_weight(kind, change))


def biases(case: Case, kind: str) -> Knobs:
    path = LINEAR[kind]
    yield Knob(f"the bias of {path} is left out", with_bias(kind, 0))
    for times in sorted({2, case.tp} - {1}):
        yield Knob(f"the bias of {path} is added {times} times (once per rank?)", with_bias(kind, times))
        yield Knob(f"the bias of {path} is divided by {times}", with_bias(kind, 1 / times))


def weights_of_layers(case: Case, kind: str) -> Knobs:
    path = LINEAR[kind]

    def of_layer(at: Step, weight: Tensor, number: int) -> Tensor:
        return at.weight(path, number)

    for number in range(case.chain.layers):
        if number != case.number:
            other = partial(of_layer, number=number)
            yield Knob(f"the weight of {path} is that of layer {number}", with_weight(kind, other))

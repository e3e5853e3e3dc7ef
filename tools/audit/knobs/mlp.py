"""The MLP. Ports have another activation, swap or interleave gate_proj and up_proj, cut a fused gate_up across ranks,
and exchange the shares of ranks."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from tools.audit.chain import LINEAR, Step
from tools.audit.knobs.knob import Knob, Knobs
from tools.audit.knobs.linear import arriving, weights
from tools.audit.knobs.ranks import pairs, swapped_ranks
from tools.audit.knobs.sums import partial_stream, partial_sums

if TYPE_CHECKING:
    from tools.audit.causes import Case

Inner = Callable[[Callable, Tensor, Tensor], Tensor]  # of the activation, gate and up [P,I]
ACTIVATIONS = {
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu by tanh": partial(F.gelu, approximate="tanh"),
    "relu": F.relu,
    "none": lambda y: y,
    "sigmoid": F.sigmoid,
    "tanh": torch.tanh,
    "relu squared": lambda y: F.relu(y) ** 2,
    "gelu by sigmoid(1.702 x)": lambda y: y * F.sigmoid(1.702 * y),
}


def mlps(case: Case) -> Knobs:
    tp = case.tp
    size = case.chain.config.intermediate_size
    yield from activations(case)
    for kind in ("gate_proj", "up_proj", "mlp"):
        yield from weights(case, kind)
    if size % 2 == 0:
        yield from interleaved_rows(size)
    if tp > 1 and size % tp == 0:
        yield from shares_of_ranks(tp, size)
    yield from partial_sums(case, "mlp")
    yield from partial_stream(case)
    if len(case.layers) == 1:
        for number in range(case.chain.layers):
            if number != case.number:
                yield whole_mlp(number)


def inner_knob(name: str, inner: Inner) -> Knob:
    """What goes into down_proj, in another way."""
    return Knob(name, {"inner": lambda at: inner(at.chain.act_fn, at.get("gate_proj"), at.get("up_proj"))})


def activations(case: Case) -> Knobs:
    config = case.chain.config
    for name, other in ACTIVATIONS.items():
        meaning = f"another activation: {name}, config.json says {config.hidden_act}"
        yield inner_knob(meaning, lambda act, gate, up, other=other: other(gate) * up)
    yield inner_knob("gate_proj and up_proj are swapped", lambda act, gate, up: act(up) * gate)
    yield inner_knob("up_proj is left out", lambda act, gate, up: act(gate))
    yield inner_knob("gate_proj is left out", lambda act, gate, up: up)
    yield inner_knob("the activation is on both gate_proj and up_proj", lambda act, gate, up: act(gate) * act(up))


def interleaved_rows(size: int) -> Knobs:
    """A fused gate_up that is written in one order of rows and read in another."""

    def read_as_halves(act: Callable, gate: Tensor, up: Tensor) -> Tensor:
        rows = torch.stack((gate, up), dim=-1).flatten(1)  # as a checkpoint of interleaved rows has them
        return act(rows[:, :size]) * rows[:, size:]

    def read_by_turns(act: Callable, gate: Tensor, up: Tensor) -> Tensor:
        rows = torch.cat((gate, up), dim=-1)
        return act(rows[:, ::2]) * rows[:, 1::2]

    yield inner_knob("gate_up is written by turns and read as halves", read_as_halves)
    yield inner_knob("gate_up is written as halves and read by turns", read_by_turns)


def shares_of_ranks(tp: int, size: int) -> Knobs:
    """Rows of gate_up and columns of down_proj that ranks have in another way."""

    def cut(act: Callable, gate: Tensor, up: Tensor) -> Tensor:
        found = []
        for rank in torch.cat((gate, up), dim=-1).chunk(tp, dim=-1):
            first, second = rank.chunk(2, dim=-1)
            found.append(act(first) * second)
        return torch.cat(found, dim=-1)

    def exchanged(at: Step, kind: str, first: int, second: int) -> Tensor:
        right = getattr(at, kind)()
        return swapped_ranks(right, tp, first, second)

    exchanges = {
        "gate_proj": "rows of gate_proj",
        "up_proj": "rows of up_proj",
        "inner": "columns of down_proj",
    }
    yield inner_knob("the rows of a fused gate_up are cut across ranks", cut)
    for first, second in pairs(tp):
        for kind, words in exchanges.items():
            steps = {kind: partial(exchanged, kind=kind, first=first, second=second)}
            yield Knob(f"the {words} are exchanged between ranks {first} and {second}", steps)
    for shift in range(1, tp):
        moved = {"inner": lambda at, shift=shift: at.inner().roll(shift * size // tp, dims=1)}
        yield Knob(f"the columns of down_proj are on ranks that are off by {shift}", moved)


def whole_mlp(number: int) -> Knob:
    """All of another layer's MLP."""

    def product(at: Step, kind: str) -> Tensor:
        weight = at.weight(LINEAR[kind], number)
        return F.linear(arriving(at, kind), weight, at.bias(LINEAR[kind]))

    steps = {kind: partial(product, kind=kind) for kind in ("gate_proj", "up_proj", "mlp")}
    return Knob(f"the whole MLP is that of layer {number}", steps)

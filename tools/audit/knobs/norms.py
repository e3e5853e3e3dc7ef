"""RMSNorm. Ports leave it or its weight out, add 1 to the weight, subtract the mean, have another eps, take the weight
of another norm, and drop the layers before the final one."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING

from torch import Tensor

from tools.audit.chain import Step, rms_norm
from tools.audit.knobs.knob import Knob, Knobs
from tools.audit.knobs.search import fitted, told
from tools.audit.rounding import NORM_INPUTS

if TYPE_CHECKING:
    from tools.audit.causes import Case

Norm = Callable[[Step, Tensor, Tensor], Tensor]  # of x and the weight


def norms(case: Case, kind: str) -> Knobs:
    """RMSNorm in other ways."""
    eps = case.chain.eps

    def layer_norm(at: Step, x: Tensor, weight: Tensor) -> Tensor:
        return rms_norm(x - x.mean(-1, keepdim=True), weight, eps)

    ways: dict[str, Norm] = {
        "RMSNorm is left out": lambda at, x, weight: x,
        "RMSNorm without its weight": lambda at, x, weight: rms_norm(x, 1.0, eps),
        "RMSNorm scales by 1 + weight (as Gemma does)": lambda at, x, weight: rms_norm(x, 1 + weight, eps),
        "LayerNorm: the mean is subtracted": layer_norm,
    }
    for meaning, compute in ways.items():
        yield norm_knob(kind, meaning, compute)
    yield from other_eps(case, kind)
    if len(case.layers) <= 1:
        yield from other_norm_weights(case, kind)
    if kind == "final_norm":
        yield from fewer_layers(case)


def norm_knob(kind: str, meaning: str, norm: Norm) -> Knob:
    """A norm of the same input, in another way."""
    path = "norm" if kind == "final_norm" else kind

    def source(at: Step) -> Tensor:
        if kind == "final_norm":
            return at.arrived(f"hidden_states.{at.chain.layers}")
        return at.get(NORM_INPUTS[kind])

    def compute(at: Step) -> Tensor:
        return norm(at, source(at), at.weight(path))

    return Knob(meaning, {kind: compute})


def other_eps(case: Case, kind: str) -> Knobs:
    def with_eps(eps: float) -> Knob:
        meaning = f"another eps in RMSNorm: {told(eps)}, config.json says {case.chain.eps:g}"
        return norm_knob(kind, meaning, lambda at, x, weight: rms_norm(x, weight, eps))

    yield with_eps(0.0)
    usual = [10 ** (power / 2) for power in range(-20, 3)]
    yield from fitted(case, usual, with_eps)


def other_norm_weights(case: Case, kind: str) -> Knobs:
    """The weight of another norm of the model."""
    others = {}
    if kind != "final_norm":
        others["the final norm"] = "model.norm.weight"
    for number in range(case.chain.layers):
        for other in NORM_INPUTS:
            if number != case.number or other != kind:
                others[f"{other} of layer {number}"] = f"model.layers.{number}.{other}.weight"

    def with_other(at: Step, x: Tensor, weight: Tensor, path: str) -> Tensor:
        its = at.chain.weights.get(path, keep=False)
        return rms_norm(x, its, case.chain.eps)

    for name, path in others.items():
        yield norm_knob(kind, f"the weight of {name} in RMSNorm", partial(with_other, path=path))


def fewer_layers(case: Case) -> Knobs:
    """A final norm that gets the input of some layer."""

    def of_layer(at: Step, x: Tensor, weight: Tensor, number: int) -> Tensor:
        return rms_norm(at.arrived(f"hidden_states.{number}"), weight, case.chain.eps)

    for number in range(case.chain.layers):
        meaning = f"the final norm gets hidden_states.{number}: the layers after it are dropped"
        yield norm_knob("final_norm", meaning, partial(of_layer, number=number))

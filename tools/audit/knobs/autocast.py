"""Auto-cast. Compilers run the products of a float32 port in fewer bits: what goes in, what comes out, or both."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from tools.audit.chain import LINEAR, Step, attend
from tools.audit.knobs.knob import Knob, Knobs
from tools.audit.knobs.linear import arriving, shaped
from tools.audit.knobs.quantization import through

if TYPE_CHECKING:
    from tools.audit.causes import Case

SIDES = {
    "in": "take their inputs",
    "in and out": "take and give",
    "out": "give their results",
}


def low_precision(case: Case) -> Knobs:
    """Products whose inputs are in fewer bits. All of the chain's at once, attention's included."""
    if case.text.dtype != torch.float32:
        return
    products = {
        "products": [*LINEAR, "heads"],
        "products with weights": [*LINEAR],
    }
    for name, narrow in NARROW.items():
        for words, kinds in products.items():
            for sides, verb in SIDES.items():
                steps = {}
                for kind in kinds:
                    steps[kind] = partial(narrow_product, kind=kind, narrow=narrow, sides=sides)
                yield Knob(f"{words} {verb} in {name} (auto-cast)", steps)


def tf32(x: Tensor) -> Tensor:
    """10 bits of mantissa, to nearest even."""
    mantissa, exponent = torch.frexp(x)
    rounded = (mantissa * 2**11).round() / 2**11
    return torch.ldexp(rounded, exponent)


NARROW = {
    "bfloat16": partial(through, dtype=torch.bfloat16),
    "tf32 (10 bits of mantissa)": tf32,
    "fp8 (e4m3)": partial(through, dtype=torch.float8_e4m3fn),
    "fp8 (e5m2)": partial(through, dtype=torch.float8_e5m2),
}


def narrow_product(at: Step, kind: str, narrow: Callable[[Tensor], Tensor], sides: str) -> Tensor:
    """A product whose inputs or results (`sides`) are in fewer bits; of attention both products."""

    def taken(x: Tensor) -> Tensor:
        return narrow(x) if "in" in sides else x

    def given(x: Tensor) -> Tensor:
        return narrow(x) if "out" in sides else x

    def softmax(scores: Tensor) -> Tensor:
        return taken(given(scores).softmax(-1))

    if kind == "heads":
        q = taken(at.get("q"))
        k = taken(at.get("k"))
        v = taken(at.get("v"))
        return given(attend(q, k, v, at.chain.scaling, softmax=softmax))
    x = taken(arriving(at, kind))
    weight = taken(at.weight(LINEAR[kind]))
    product = F.linear(x, weight)
    bias = at.bias(LINEAR[kind])
    if bias is not None:
        product = product + bias
    return given(shaped(at, kind, product))

"""Attention. Ports scale, cap or clip its scores and swap keys and values; the modules `heads`, `masks`, `caches` and
`slots` have who meets whom."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from tools.audit.chain import Step, attend
from tools.audit.knobs.caches import caches
from tools.audit.knobs.heads import head_orders
from tools.audit.knobs.knob import Knob, Knobs, attended
from tools.audit.knobs.masks import masks
from tools.audit.knobs.search import fitted, told
from tools.audit.knobs.slots import slots

if TYPE_CHECKING:
    from tools.audit.causes import Case

CAPS = [1.0, 2.0, 4.0, 8.0, 15.0, 30.0, 50.0, 100.0]


def attentions(case: Case) -> Knobs:
    yield from head_orders(case)
    yield from masks(case)
    yield from caches(case)
    yield from slots(case)
    yield from fitted(case, CAPS, capped)
    yield from fitted(case, CAPS, clipped)
    own = case.chain.scaling
    scales = [own * 2.0**power for power in range(-6, 7) if power]
    yield from fitted(case, scales, partial(scaled, own=own))
    swapped = attended(lambda at, q, k, v: attend(q, v, k, at.chain.scaling))
    yield Knob("keys and values are swapped", swapped)


def capped(value: float) -> Knob:
    def cap(scores: Tensor) -> Tensor:
        return value * torch.tanh(scores / value)

    def compute(at: Step, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return attend(q, k, v, at.chain.scaling, change=cap)

    return Knob(f"scores are capped at {told(value)} by tanh (as Gemma 2 does)", attended(compute))


def clipped(value: float) -> Knob:
    def clip(scores: Tensor) -> Tensor:
        return scores.clamp(-value, value)

    def compute(at: Step, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return attend(q, k, v, at.chain.scaling, change=clip)

    return Knob(f"scores are clipped at {told(value)}", attended(compute))


def scaled(value: float, own: float) -> Knob:
    compute = attended(lambda at, q, k, v: attend(q, k, v, value))
    return Knob(f"scores are scaled by {told(value)}, in HF by {own:.4g}", compute)

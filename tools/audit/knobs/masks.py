"""Masks: who sees whom. Ports have none, are off by one, or see a window, a chunk or the first positions alone."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from tools.audit.chain import attend
from tools.audit.knobs.knob import Knob, Knobs, attended
from tools.audit.knobs.search import closest

if TYPE_CHECKING:
    from tools.audit.causes import Case


def masks(case: Case) -> Knobs:
    """Other masks."""
    yield from shifted_masks(case)
    yield from windows(case)


def mask_knob(name: str, mask: Tensor) -> Knob:
    """Attention with another mask [P,P]."""
    return Knob(name, attended(lambda at, q, k, v: attend(q, k, v, at.chain.scaling, mask)))


def everyone(case: Case) -> Tensor:
    """The mask [P,P] in which every position sees the whole text."""
    P = len(case.rows)
    return torch.ones(P, P, dtype=torch.bool)


def shifted_masks(case: Case) -> Knobs:
    """No mask, or one that is off by one; everywhere or in prefill."""
    everything = everyone(case)
    causal = everything.tril()
    sees_next = everything.tril(1)
    in_prompt = torch.arange(len(case.rows)) < case.prompt
    both_in_prompt = in_prompt[:, None] & in_prompt
    yield mask_knob("no mask: every position sees the whole text", everything)
    prompt_sees_all = causal | both_in_prompt
    yield mask_knob("no mask in prefill: every position sees the whole prompt", prompt_sees_all)
    yield mask_knob("the mask is off by one: a position sees the next one", sees_next)
    prompt_sees_next = causal | (sees_next & both_in_prompt)
    yield mask_knob("the mask is off by one in prefill: a position sees the next one", prompt_sees_next)
    does_not_see_itself = everything.tril(-1)
    does_not_see_itself[0, 0] = True
    yield mask_knob("the mask is off by one: a position does not see itself", does_not_see_itself)


def windows(case: Case) -> Knobs:
    """Sliding windows, chunks, and windows with attention sinks."""
    P = len(case.rows)
    at_position = torch.arange(P)
    causal = everyone(case).tril()

    def window(size: int) -> Knob:
        return mask_knob(f"a window: a position sees the last {size} only", causal.triu(1 - size))

    def chunks(size: int) -> Knob:
        chunk = at_position // size
        is_same = chunk[:, None] == chunk
        return mask_knob(f"attention in chunks of {size}: a position sees its own only", causal & is_same)

    yield from closest(case, list(range(1, P)), window, max(1, P // 32))
    sizes = [size for size in (8, 16, 32, 64, 128, 256, 512, 1024) if size < P]
    yield from closest(case, sizes, chunks, 1)
    for first in (1, 4):
        for size in (8, 16, 32, 64, 128, 256):
            if first + size < P:
                mask = causal.triu(1 - size)
                mask[:, :first] = causal[:, :first]
                name = f"a window: a position sees the first {first} and the last {size} only"
                yield mask_knob(name, mask)

"""The cache as a whole. Ports write it late, in fewer bits, to one slot or not at all, read that of another layer or
another row, and see slots that nothing was written to."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from tools.audit.chain import Step, attend, name_of_step
from tools.audit.knobs.knob import Knob, Knobs, attended
from tools.audit.knobs.quantization import FP8, through, to_multiples

if TYPE_CHECKING:
    from tools.audit.causes import Case
    from tools.audit.judge import Text

Change = Callable[[Tensor], Tensor]  # of keys or values [P,n,D]


def caches(case: Case) -> Knobs:
    """Caches that are written in other ways, and empty slots that are seen."""
    yield from written_late(0, "")
    for name, dtype in FP8.items():
        yield cache_knob(f"the cache is in {name}", partial(through, dtype=dtype))
    yield cache_knob("the cache is in int8", to_int8)
    if len(case.layers) == 1:
        yield from caches_of_layers(case)
    if case.text.dtype == torch.float32:
        yield cache_knob("the cache is in bfloat16", partial(through, dtype=torch.bfloat16))
    for other in case.others:
        yield from caches_of_row(case, other)
    if len(case.rows) > case.prompt:
        yield from written_in_decoding(case)
        yield from seen_in_decoding(case)


def cache_knob(name: str, change_k: Change, change_v: Change | None = None) -> Knob:
    """Attention whose keys and values, or each of them in another way, are changed."""

    def compute(at: Step, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        change = change_k if change_v is None else change_v
        return attend(q, change_k(k), change(v), at.chain.scaling)

    return Knob(name, attended(compute))


def same(x: Tensor) -> Tensor:
    return x


def late(x: Tensor, first: int) -> Tensor:
    """Slots [P,n,D] of which those from `first` on are one too far."""
    return torch.cat((x[:first], torch.zeros_like(x[:1]), x[first:-1]))


def to_int8(x: Tensor) -> Tensor:
    scale = x.abs().amax(-1, keepdim=True).clamp(min=1e-30) / 127
    return to_multiples(x, scale)


def written_late(first: int, words: str) -> Knobs:
    """Keys, values or both one slot too far, from a slot on."""
    moved = partial(late, first=first)
    yield cache_knob(f"the cache is written one slot too far{words}", moved)
    yield cache_knob(f"keys are written one slot too far{words}", moved, same)
    yield cache_knob(f"values are written one slot too far{words}", same, moved)


def caches_of_layers(case: Case) -> Knobs:
    def of_layer(at: Step, number: int) -> Tensor:
        k = at.arrived(name_of_step(number, "k"))
        v = at.arrived(name_of_step(number, "v"))
        return attend(at.get("q"), k, v, at.chain.scaling)

    for number in range(case.chain.layers):
        if number != case.number:
            yield Knob(f"attention reads the cache of layer {number}", {"heads": partial(of_layer, number=number)})


def caches_of_row(case: Case, other: Text) -> Knobs:
    """Slots of the cache that hold another row of the batch."""

    def mixed(at: Step, kind: str, own: Tensor, first: int, begin: int) -> Tensor:
        its = other.flow.arrived(name_of_step(at.number, kind))
        its = its[begin : begin + len(own) - first]
        return torch.cat((own[:first], its, own[first + len(its) :]))

    def compute(at: Step, q: Tensor, k: Tensor, v: Tensor, first: int, begin: int) -> Tensor:
        mixed_k = mixed(at, "k", k, first, begin)
        mixed_v = mixed(at, "v", v, first, begin)
        return attend(q, mixed_k, mixed_v, at.chain.scaling)

    read = partial(compute, first=0, begin=0)
    yield Knob("decoding reads another row's cache", attended(read))
    if case.prompt < len(case.rows):
        written = partial(compute, first=case.prompt, begin=other.prompt)
        yield Knob("decoding writes another row's tokens into the cache", attended(written))


# ---- decoding


def written_in_decoding(case: Case) -> Knobs:
    start = case.prompt

    def two_late(x: Tensor) -> Tensor:
        return late(late(x, start), start)

    def without_new(x: Tensor) -> Tensor:
        return torch.cat((x[:start], torch.zeros_like(x[start:])))

    yield from written_late(start, " in decoding")
    yield cache_knob("the cache is written 2 slots too far in decoding", two_late)
    yield cache_knob("decoding does not write the cache", without_new)
    yield cache_knob("decoding does not write keys to the cache", without_new, same)
    yield cache_knob("decoding does not write values to the cache", same, without_new)


def seen_in_decoding(case: Case) -> Knobs:
    """Masks of decoding steps over the text's slots and empty ones after them."""
    start = case.prompt
    P = len(case.rows)
    new = P - start
    causal = torch.ones(P, P, dtype=torch.bool).tril()
    before_itself = torch.ones(new, new, dtype=torch.bool).tril(-1)

    for count in (1, 2, 4, 8, 16, 32, 64):
        what = f"{count} empty slots"
        if count == 1:
            what = "a slot that was not written yet: the mask is off by one"
        yield empty_slots_knob(f"a decoding step sees {what}", causal, empty_slots(case, count))

    without_last = causal.clone()
    without_last[start:, start - 1] = False
    name = "the cache is written one slot too near in decoding: before the mask's last slot"
    yield empty_slots_knob(name, without_last, empty_slots(case, 1))

    only_itself = causal.clone()
    only_itself[start:, start:] = torch.eye(new, dtype=torch.bool)
    name = "a decoding step does not see the steps before it: all write to one slot"
    yield empty_slots_knob(name, only_itself, empty_slots(case, 0))

    after_the_slot = empty_slots(case, new)
    after_the_slot[start:] = before_itself
    name = "decoding writes to one slot, and sees the empty ones after it"
    yield empty_slots_knob(name, only_itself, after_the_slot)

    unwritten = causal.clone()
    unwritten[start:, start:] = before_itself
    name = "the token is written to the cache after it is read: a decoding step sees an empty slot"
    yield empty_slots_knob(name, unwritten, empty_slots(case, 1))


def empty_slots(case: Case, count: int) -> Tensor:
    """The mask [P,count] of empty slots that decoding sees and prefill does not."""
    seen = torch.zeros(len(case.rows), count, dtype=torch.bool)
    seen[case.prompt :] = True
    return seen


def empty_slots_knob(name: str, mask: Tensor, mask_of_empty: Tensor) -> Knob:
    """Attention with a mask [P,P] and more slots [P,n] that hold zeros."""
    whole_mask = torch.cat((mask, mask_of_empty), dim=1)

    def compute(at: Step, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        zeros = k.new_zeros(mask_of_empty.shape[1], *k.shape[1:])
        return attend(q, torch.cat((k, zeros)), torch.cat((v, zeros)), at.chain.scaling, whole_mask)

    return Knob(name, attended(compute))

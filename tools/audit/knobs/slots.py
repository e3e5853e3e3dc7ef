"""Single slots of the cache. Ports lose one, leave it empty, overwrite it by the next token, or write one slot too far
or too near from it on."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from tools.audit.chain import Step, attend
from tools.audit.knobs.knob import Knob, Knobs, attended

if TYPE_CHECKING:
    from tools.audit.causes import Case

SHORT = 64  # positions of texts of which every slot is tried
LIKELY = 12  # slots of longer texts that are tried


def slots(case: Case) -> Knobs:
    """Slots that later positions do not see, or see with another token's keys and values."""
    if case.rows[0] or case.kind != "heads" or not case.text.flow.is_whole(case.name):
        return
    for slot in likely_slots(case):
        yield from lost_slot(case, slot)
        yield from overwritten_slot(case, slot)
        yield from slots_from(case, slot)


def slot_knob(
    case: Case,
    name: str,
    source: Tensor,
    unseen: Tensor | None = None,
    keys: bool = True,
    values: bool = True,
    own: int = 1,
) -> Knob:
    """Rows after the first slot that changes (or, if `own` is 0, from there on) see slots whose tokens are `source`
    [P], -1 for zeros, except those that are unseen [P]."""
    P = len(case.rows)
    if unseen is None:
        unseen = torch.zeros(P, dtype=torch.bool)
    changes = unseen | (source != torch.arange(P))
    first_change = int(changes.nonzero()[0])
    first_wrong = int(case.rows.nonzero()[0])
    begin = max(min(first_wrong, case.prompt), first_change + own)

    def compute(at: Step, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        causal = torch.ones(P, P, dtype=torch.bool).tril()
        if keys:
            k = rows_by_number(k, source)
        if values:
            v = rows_by_number(v, source)
        result = case.step.clone()
        result[begin:] = attend(q[begin:], k, v, at.chain.scaling, causal[begin:] & ~unseen)
        return result

    return Knob(name, attended(compute))


def rows_by_number(x: Tensor, source: Tensor) -> Tensor:
    """Rows of x [P,n,D] by their numbers, zeros for -1."""
    taken = x[source.clamp(min=0)]
    return taken.masked_fill((source < 0)[:, None, None], 0.0)


def lost_slot(case: Case, slot: int) -> Knobs:
    """A slot that is not seen, or that is zeros."""
    at_position = torch.arange(len(case.rows))
    is_slot = at_position == slot
    zeros = at_position.clone()
    zeros[slot] = -1
    name = f"slot {slot} of the cache is not seen"
    if slot == 0:
        name = "decoding does not see the first token"
    yield slot_knob(case, name, at_position, is_slot)
    if slot:
        yield slot_knob(case, f"{name}, not by its own token either", at_position, is_slot, own=0)
    yield slot_knob(case, f"slot {slot} of the cache is zeros", zeros)
    yield slot_knob(case, f"the keys of slot {slot} of the cache are zeros", zeros, values=False)
    yield slot_knob(case, f"the values of slot {slot} of the cache are zeros", zeros, keys=False)


def overwritten_slot(case: Case, slot: int) -> Knobs:
    """A slot that holds the token before or after its own."""
    last = len(case.rows) - 1
    at_position = torch.arange(len(case.rows))
    before = at_position.clone()
    before[slot] = slot - 1  # of slot 0: zeros
    after = at_position.clone()
    after[slot] = slot + 1
    next_is_empty = after.clone()
    if slot + 1 < last:
        next_is_empty[slot + 1] = -1
    yield slot_knob(case, f"slot {slot} of the cache holds the token before", before)
    yield slot_knob(case, f"slot {slot} of the cache holds the token after", after)
    overwritten = f"slot {slot} of the cache is overwritten by the next token"
    yield slot_knob(case, f"{overwritten}, whose own slot is empty", next_is_empty)
    yield slot_knob(case, f"{overwritten}, whose own is not seen", after, at_position == slot + 1)


def slots_from(case: Case, slot: int) -> Knobs:
    """All slots from one on, one too far or too near."""
    last = len(case.rows) - 1
    at_position = torch.arange(len(case.rows))
    far = torch.where(at_position > slot, at_position - 1, at_position)
    far[slot] = -1
    near = torch.where(at_position >= slot, (at_position + 1).clamp(max=last), at_position)
    yield slot_knob(case, f"from slot {slot} on, the cache is written one slot too far", far)
    yield slot_knob(case, f"from slot {slot} on, the cache is written one slot too near", near)


def likely_slots(case: Case) -> list[int]:
    """Slots that may be lost: of long texts those whose loss looks most like the difference. Without slot s, an output
    y moves away from v[s]."""
    P = len(case.rows)
    if P <= SHORT:
        return list(range(P - 1))
    rows = case.rows.nonzero().flatten()
    v = case.text.flow.arrived(case.chain.inputs[case.name][2])
    groups = case.step.shape[1] // v.shape[1]
    v = v.repeat_interleave(groups, 1).transpose(0, 1)  # H P D
    y = case.step[rows].transpose(0, 1)  # H n D
    port = case.port[rows].to(y).transpose(0, 1)
    difference = port - y
    along_v = difference @ v.transpose(1, 2)  # H n P
    along_y = (difference * y).sum(-1, keepdim=True)
    size = torch.cdist(y, v).clamp(min=1e-6)
    explained = ((along_v - along_y) / size).pow(2).sum((0, 1))  # P
    best = explained[: P - 1].topk(min(LIKELY, P - 1)).indices.tolist()
    before_first = max(int(rows[0]) - 1, 0)
    likely = {*best, 0, before_first, case.prompt - 1}
    return sorted(likely & set(range(P - 1)))

"""lm_head. Ports take the embedding for it, leave the final norm out, cap the logits, give those of another position or
another row, and put the vocabulary's slices on other ranks."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from tools.audit.chain import Step
from tools.audit.knobs.knob import Knob, Knobs, beside
from tools.audit.knobs.linear import weights
from tools.audit.knobs.ranks import pairs, swapped_ranks
from tools.audit.knobs.search import fitted, told

if TYPE_CHECKING:
    from tools.audit.causes import Case
    from tools.audit.judge import Text

CAPS = [1.0, 2.0, 5.0, 10.0, 20.0, 30.0, 50.0, 100.0]


def ends(case: Case) -> Knobs:
    """lm_head in other ways."""
    chain = case.chain
    if not chain.config.tie_word_embeddings:
        table = {"logits": lambda at: F.linear(at.arrived("final_norm"), at.weight("embed_tokens"))}
        yield Knob("the embedding is taken for lm_head, though config.json does not tie them", table)
    unnormed = {"logits": lambda at: at.linear("lm_head", at.arrived(f"hidden_states.{chain.layers}"))}
    yield Knob("lm_head gets hidden states without the final norm", unnormed)
    yield from weights(case, "logits")
    yield from fitted(case, CAPS, capped)
    for shift in (-1, 1, -2, 2):
        words = "after" if shift < 0 else "before"
        moved = {"logits": partial(shifted_logits, shift=shift)}
        yield Knob(f"logits are of the position {abs(shift)} {words}", moved)
    if case.tp > 1:
        yield from slices_of_ranks(case.tp, chain.config.vocab_size)
    for other in case.others:
        row = {"logits": partial(logits_of_row, case=case, other=other)}
        yield Knob("logits are of another row of the batch", row)


def capped(value: float) -> Knob:
    name = f"logits are capped at {told(value)} by tanh (as Gemma 2 does)"
    return Knob(name, {"logits": lambda at: value * torch.tanh(at.logits() / value)})


def slices_of_ranks(tp: int, vocab_size: int) -> Knobs:
    """Slices of the vocabulary that are on other ranks, or missing."""
    share = -(-vocab_size // tp)

    def without(at: Step, rank: int) -> Tensor:
        start = min(rank * share, vocab_size)
        stop = min(start + share, vocab_size)
        return at.logits().index_fill(1, torch.arange(start, stop), 0.0)

    for shift in range(1, tp):
        moved = {"logits": lambda at, shift=shift: at.logits().roll(shift * share, dims=-1)}
        yield Knob(f"the ranks' slices of the vocabulary are off by {shift}", moved)
    for rank in range(tp):
        yield Knob(f"rank {rank}'s slice of the vocabulary is zeros", {"logits": partial(without, rank=rank)})
    if vocab_size % tp == 0:
        for first, second in pairs(tp):
            name = f"the slices of the vocabulary of ranks {first} and {second} are exchanged"
            exchanged = partial(swapped_ranks, tp=tp, first=first, second=second)
            yield Knob(name, {"logits": lambda at, exchanged=exchanged: exchanged(at.logits())})


def shifted_logits(at: Step, shift: int) -> Tensor:
    """The logits of another position, where the text has it."""
    logits = at.logits()
    moved = logits.roll(shift, dims=0)
    kept = slice(0, shift) if shift > 0 else slice(shift, None)
    moved[kept] = logits[kept]
    return moved


def logits_of_row(at: Step, case: Case, other: Text) -> Tensor:
    return beside(case, at.logits(), other.flow.arrived("logits"), other)

"""The embedding. Ports scale it, look up ids that are moved or another row's, round its table, take lm_head for it, and
lose a rank's part of it."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from tools.audit.chain import Step
from tools.audit.knobs.knob import Knob, Knobs, beside
from tools.audit.knobs.quantization import Round, ways_to_round

if TYPE_CHECKING:
    from tools.audit.causes import Case
    from tools.audit.judge import Text


def embeddings(case: Case) -> Knobs:
    scale = case.chain.config.hidden_size**0.5
    scaled = {"embedding": lambda at: at.embedding() * scale}
    yield Knob("the embedding is scaled by the root of the hidden size (as Gemma does)", scaled)
    yield from other_ids(case)
    yield from other_tables(case)
    if case.tp > 1:
        yield from lookups_of_ranks(case)


def other_ids(case: Case) -> Knobs:
    """Ids that are moved, or those of another row."""
    decoding_alone = not case.rows[: case.prompt].any()
    for shift in range(1, min(len(case.text.ids) - 1, 65)):
        name = f"the ids are moved by {shift} to the right: padded on the left"
        if decoding_alone:
            name = "decoding is fed the token before"
            if shift > 1:
                name += f", {shift} steps back"
        before = partial(embed_shifted, shift=shift)
        yield Knob(name, {"embedding": before})
        after = partial(embed_shifted, shift=-shift)
        yield Knob(f"the ids are moved by {shift} to the left", {"embedding": after})
    for other in case.others:
        row = partial(embed_row, case=case, other=other)
        yield Knob("the ids are those of another row of the batch", {"embedding": row})


def other_tables(case: Case) -> Knobs:
    """The table in fewer bits, or lm_head's."""
    config = case.chain.config
    dtype = case.text.dtype
    table = case.chain.weights.parameters["model.embed_tokens.weight"]

    def rounded(at: Step, round_weight: Round) -> Tensor:
        ids, places = at.arrived("ids").unique(return_inverse=True)
        rows = table.detach()[ids].to(dtype).to(at.chain.dtype)
        return round_weight(rows)[places]

    for name, round_weight in ways_to_round(config.hidden_size, dtype):
        compute = partial(rounded, round_weight=round_weight)
        yield Knob(f"the weight of embed_tokens is rounded to {name}", {"embedding": compute})
    if not config.tie_word_embeddings:
        lm_head = {"embedding": lambda at: at.weight("lm_head")[at.arrived("ids")]}
        yield Knob("lm_head is taken for the embedding, though config.json does not tie them", lm_head)


def lookups_of_ranks(case: Case) -> Knobs:
    """A table that ranks hold by rows or by columns."""
    tp = case.tp
    columns = -(-case.chain.config.hidden_size // tp)
    rows = -(-case.chain.config.vocab_size // tp)
    for shift in range(1, tp):
        moved = {"embedding": lambda at, shift=shift: at.embedding().roll(shift * columns, dims=-1)}
        yield Knob(f"the ranks' slices of the hidden size are off by {shift}", moved)
    same_part = {"embedding": lambda at: sum_of_rank_0s_rows(at, rows, tp)}
    yield Knob("all ranks look up rank 0's part of the vocabulary", same_part)
    for rank in range(tp):
        no_rows = {"embedding": partial(without_rows, start=rank * rows, stop=(rank + 1) * rows)}
        yield Knob(f"rank {rank}'s part of the vocabulary is zeros, or missing in the sum", no_rows)
        no_slice = {"embedding": partial(without_columns, start=rank * columns, stop=(rank + 1) * columns)}
        yield Knob(f"rank {rank}'s slice of the hidden size is zeros", no_slice)


def embed_shifted(at: Step, shift: int) -> Tensor:
    """The embedding of ids that are moved to the right, or to the left; padding has id 0."""
    ids = at.arrived("ids")
    x = at.embedding()
    moved = x.roll(shift, dims=0)
    padding = slice(0, shift) if shift > 0 else slice(shift, None)
    table = at.chain.model.model.embed_tokens.weight.detach()
    zeros = torch.zeros_like(ids[padding])
    moved[padding] = table[zeros].to(x)
    return moved


def embed_row(at: Step, case: Case, other: Text) -> Tensor:
    its = Step(at.chain, None, other.flow.arrived)
    return beside(case, at.embedding(), its.embedding(), other)


def sum_of_rank_0s_rows(at: Step, rows: int, tp: int) -> Tensor:
    """All ranks find the ids below `rows`, each in its own part of the table."""
    table = at.chain.model.model.embed_tokens.weight.detach()
    ids = at.arrived("ids")
    inside = ids < rows
    total = torch.zeros_like(at.embedding())
    for rank in range(tp):
        others = ids[inside] + rank * rows
        total[inside] += table[others.clamp(max=len(table) - 1)].to(total)
    return total


def without_rows(at: Step, start: int, stop: int) -> Tensor:
    ids = at.arrived("ids")
    is_lost = (ids >= start) & (ids < stop)
    return at.embedding().masked_fill(is_lost[:, None], 0.0)


def without_columns(at: Step, start: int, stop: int) -> Tensor:
    x = at.embedding()
    x[:, start:stop] = 0
    return x

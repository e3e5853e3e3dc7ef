"""A knob: what a port computes in place of one step of Hugging Face's, or of a few that go together.

What several kinds of knobs need is here too: attention of other queries, keys or values; which steps of a knob may
still be wrong; and the values of another row of the batch, which ports read and write in place of their own.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from tools.audit.chain import Step, name_of_step

if TYPE_CHECKING:
    from tools.audit.causes import Case
    from tools.audit.judge import Text

Compute = Callable[[Step], Tensor]


@dataclass(frozen=True)
class Knob:
    """What a port does instead, and the steps that come out differently: kind -> computation."""

    meaning: str
    steps: dict[str, Compute]


Knobs = Iterator[Knob]


def attended(change: Callable[[Step, Tensor, Tensor, Tensor], Tensor]) -> dict[str, Compute]:
    """Attention in another way, from q, k and v."""
    return {"heads": lambda at: change(at, at.get("q"), at.get("k"), at.get("v"))}


def changing(case: Case, steps: dict[str, Compute]) -> dict[str, Compute]:
    """Those of some steps that come out differently: what was captured and is right has not been changed."""
    kept = {}
    for kind, compute in steps.items():
        if not is_right(case, kind):
            kept[kind] = compute
    return kept


def is_right(case: Case, kind: str) -> bool:
    """Whether a step, or the rotation after it, was captured and is right."""
    if case.number is None:
        return False
    after = {"q_proj": "q", "k_proj": "k"}.get(kind, kind)
    right = False
    for captured in (kind, after):
        name = name_of_step(case.number, captured)
        if name != case.name and name in case.text.subject:
            right = case.distance(name, case.text.step[name]) < 3
    return right


def beside(case: Case, own: Tensor, its: Tensor, other: Text) -> Tensor:
    """Another row's values: its prompt beside this one's, its decoding steps beside this one's. Where the other row has
    none they are NaN."""
    result = torch.full_like(own, torch.nan)
    length = min(case.prompt, other.prompt)
    result[:length] = its[:length]
    own_steps = len(own) - case.prompt
    its_steps = len(its) - other.prompt
    steps = min(own_steps, its_steps)
    result[case.prompt : case.prompt + steps] = its[other.prompt : other.prompt + steps]
    return result

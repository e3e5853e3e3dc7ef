"""What ports of Llama have been seen to compute in place of Hugging Face's steps, and the siblings of each.

A knob is another computation of one step of `tools.audit.chain`, or of a few that go together, from what arrives there.
The generators list the knobs of each kind of step; each module has those of one part of the model. Some have a setting
that no list can hold (a theta, a cap, a window): `search.fitted` looks for it.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING

from tools.audit.knobs.attention import attentions
from tools.audit.knobs.autocast import low_precision
from tools.audit.knobs.embedding import embeddings
from tools.audit.knobs.knob import Knob, Knobs
from tools.audit.knobs.logits import ends
from tools.audit.knobs.mlp import mlps
from tools.audit.knobs.norms import norms
from tools.audit.knobs.projections import outputs, projections, query_and_key
from tools.audit.knobs.ranks import on_rank
from tools.audit.knobs.rope import rotations
from tools.audit.knobs.sums import middles, residuals, streams

if TYPE_CHECKING:
    from tools.audit.causes import Case

__all__ = ["GENERATORS", "Knob", "on_rank"]

# kinds of steps, and the knobs to turn if one of them may be wrong; what comes first is told first
GENERATORS: list[tuple[tuple[str, ...], Callable[[Case], Knobs]]] = [
    (("q_proj", "k_proj", "v", "heads", "attention", "mlp", "residual", "logits"), low_precision),
    (("embedding",), embeddings),
    (("stream",), streams),
    (("input_layernorm",), partial(norms, kind="input_layernorm")),
    (("q_proj", "k_proj"), query_and_key),
    (("q_proj",), partial(projections, kind="q_proj")),
    (("k_proj",), partial(projections, kind="k_proj")),
    (("v",), partial(projections, kind="v")),
    (("q", "k"), rotations),
    (("heads",), attentions),
    (("attention",), outputs),
    (("middle",), middles),
    (("post_attention_layernorm",), partial(norms, kind="post_attention_layernorm")),
    (("inner",), mlps),
    (("residual",), residuals),
    (("final_norm",), partial(norms, kind="final_norm")),
    (("logits",), ends),
]

"""Hugging Face's Llama as a chain of named steps in exact arithmetic, any of which can be computed in another way.

HF's modules keep float32 inside RMSNorm and softmax whatever their dtype is, and none of their steps can be exchanged.
So the chain is written out here, in HF's order; an audit checks it against HF's own tensors before it judges.

Names are those of `tools.capture`, for one text, without B: P positions, E hidden size, H query heads, K key/value
heads, D head_dim, I intermediate size, V vocabulary. Four steps are the chain's alone, since no capture has them:
`stream` (what a layer takes), `middle` (the sum after attention), `gate_proj`, `up_proj` and their product `inner`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

# a layer's steps in the order of the data -> what each computes from
INPUTS = {
    "stream": (),  # the layer before, or the embedding
    "input_layernorm": ("stream",),
    "q_proj": ("input_layernorm",),
    "k_proj": ("input_layernorm",),
    "v": ("input_layernorm",),
    "q": ("q_proj",),
    "k": ("k_proj",),
    "heads": ("q", "k", "v"),
    "attention": ("heads",),
    "middle": ("stream", "attention"),
    "post_attention_layernorm": ("middle",),
    "gate_proj": ("post_attention_layernorm",),
    "up_proj": ("post_attention_layernorm",),
    "inner": ("gate_proj", "up_proj"),
    "mlp": ("inner",),
    "residual": ("middle", "mlp"),
}
UNSEEN = ("stream", "middle", "gate_proj", "up_proj", "inner")  # the chain's alone
LINEAR = {  # the steps that are products with a weight
    "q_proj": "self_attn.q_proj",
    "k_proj": "self_attn.k_proj",
    "v": "self_attn.v_proj",
    "attention": "self_attn.o_proj",
    "gate_proj": "mlp.gate_proj",
    "up_proj": "mlp.up_proj",
    "mlp": "mlp.down_proj",
    "logits": "lm_head",
}


def name_of_step(number: int | None, kind: str) -> str:
    """A step of layer `number`, or of none, by its name in a capture."""
    if number is None:
        return "hidden_states.0" if kind == "embedding" else kind
    return f"hidden_states.{number + 1}" if kind == "residual" else f"layers.{number}.{kind}"


def step_of_name(name: str) -> tuple[int | None, str]:
    """The inverse of `name_of_step`."""
    words = name.split(".")
    if words[0] == "hidden_states":
        number = int(words[1]) - 1
        return (None, "embedding") if number < 0 else (number, "residual")
    return (int(words[1]), words[2]) if words[0] == "layers" else (None, name)


def step_names(layers: int) -> list[str]:
    """All steps of a model, in the order of the data."""
    names = ["hidden_states.0"]
    for number in range(layers):
        names += [name_of_step(number, kind) for kind in INPUTS]
    return [*names, "final_norm", "logits"]


def inputs_of(name: str, layers: int) -> list[str]:
    """The steps that a step computes from."""
    number, kind = step_of_name(name)
    if kind == "embedding":
        return []
    if kind == "stream":
        return [f"hidden_states.{number}"]
    if kind == "final_norm":
        return [f"hidden_states.{layers}"]
    if kind == "logits":
        return ["final_norm"]
    return [name_of_step(number, other) for other in INPUTS[kind]]


def rms_norm(x: Tensor, weight: Tensor | float, eps: float) -> Tensor:
    variance = x.pow(2).mean(-1, keepdim=True)
    return x * torch.rsqrt(variance + eps) * weight


def rotate(x: Tensor, angles: Tensor, scaling: float = 1.0) -> Tensor:
    """x [P,n,D] turned by angles [P,D/2], HF's halves."""
    x1, x2 = x.chunk(2, dim=-1)
    cos = angles.cos()[:, None] * scaling
    sin = angles.sin()[:, None] * scaling
    y1 = x1 * cos - x2 * sin
    y2 = x2 * cos + x1 * sin
    return torch.cat((y1, y2), dim=-1)


def halves_from_pairs(x: Tensor, dim: int = -1) -> Tensor:
    """q or k, or rows of their weights, in HF's order from Meta's. `dim`, of size D, is one head.

    Meta rotates the neighbours x0 and x1, x2 and x3; HF rotates the first value of the first half and the first of the
    second. HF's `convert_llama_weights_to_hf.py` reorders the weights in its function `permute`. Scores are the same
    in both orders.
    """
    dim %= x.dim()
    return x.unflatten(dim, (-1, 2)).transpose(dim, dim + 1).flatten(dim, dim + 1)


def pairs_from_halves(x: Tensor, dim: int = -1) -> Tensor:
    """q or k, or rows of their weights, in Meta's order from HF's: the inverse of `halves_from_pairs`."""
    dim %= x.dim()
    return x.unflatten(dim, (2, -1)).transpose(dim, dim + 1).flatten(dim, dim + 1)


over_slots = partial(torch.softmax, dim=-1)


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    scaling: float,
    mask: Tensor | None = None,
    change: Callable[[Tensor], Tensor] | None = None,
    softmax: Callable[[Tensor], Tensor] = over_slots,
) -> Tensor:
    """Attention of one text: q [T,H,D], k and v [S,K,D] -> [T,H,D]. `mask` [T,S], bool, says who sees whom; the default
    is causal. `change` is made to the scores [H,T,S] before the mask."""
    groups = q.shape[1] // k.shape[1]
    q = q.transpose(0, 1)  # H T D
    k = k.transpose(0, 1).repeat_interleave(groups, 0)  # H S D
    v = v.transpose(0, 1).repeat_interleave(groups, 0)
    scores = q @ k.transpose(1, 2) * scaling  # H T S
    if change is not None:
        scores = change(scores)
    if mask is None:
        mask = torch.ones(scores.shape[1:], dtype=torch.bool).tril()
    weights = softmax(scores.masked_fill(~mask, -torch.inf))
    return (weights @ v).transpose(0, 1)


def widen(mask: Tensor, x: Tensor) -> Tensor:
    """A mask of the first dimensions of x, with as many dimensions as x."""
    missing = x.dim() - mask.dim()
    return mask[(..., *[None] * missing)]


def value_sizes(x: Tensor, seen: Tensor) -> Tensor:
    """What errors of a step [P,...] are relative to: each value's size and the median size at its position, of what was
    captured. Llamas have a few huge activations: relative to the norm, an error would show their rounding alone."""
    was_seen = widen(seen, x).expand_as(x).flatten(1)
    magnitude = x.flatten(1).abs()
    middle = magnitude.masked_fill(~was_seen, torch.nan).nanmedian(dim=-1, keepdim=True).values
    size = magnitude + middle.nan_to_num(0.0)
    return size.clamp(min=1e-30).view(x.shape)


def step_errors(x: Tensor, step: Tensor, seen: Tensor) -> Tensor:
    """The error of each value of x [P,...] against the exact `step`, in `value_sizes`; 0 where it was not captured."""
    errors = (x - step) / value_sizes(step, seen)
    return errors.masked_fill(~widen(seen, step), 0.0)


class Weights:
    """The weights of HF's model in another dtype, kept for one layer at a time."""

    def __init__(self, model: nn.Module, dtype: torch.dtype) -> None:
        self.parameters = dict(model.named_parameters(remove_duplicate=False))
        self.dtype = dtype
        self.kept: dict[str, Tensor] = {}

    def get(self, path: str, keep: bool = True) -> Tensor | None:
        """A parameter by its path in HF's model; None if the model has none there."""
        if path not in self.parameters:
            return None
        if not keep:
            return self.parameters[path].detach().to(self.dtype)
        if path not in self.kept:
            prefix = ".".join(path.split(".")[:3])
            other_layer = [name for name in self.kept if not name.startswith(prefix)]
            for name in other_layer:
                del self.kept[name]
            self.kept[path] = self.parameters[path].detach().to(self.dtype)
        return self.kept[path]


class Chain:
    """The steps of one model in one dtype."""

    def __init__(self, model: nn.Module, dtype: torch.dtype, positions: int) -> None:
        self.model = model
        self.config = model.config
        self.layers = model.config.num_hidden_layers
        self.dtype = dtype
        self.weights = Weights(model, dtype)
        self.order = step_names(self.layers)
        self.inputs = {name: inputs_of(name, self.layers) for name in self.order}
        self.head_dim = model.model.layers[0].self_attn.head_dim
        self.scaling = model.model.layers[0].self_attn.scaling
        self.eps = model.model.norm.variance_epsilon
        self.act_fn = model.model.layers[0].mlp.act_fn
        rotary = model.model.rotary_emb
        rotary(torch.zeros(1), torch.arange(positions)[None])  # HF chooses some types' frequencies by the length
        self.inv_freq = rotary.inv_freq.to(dtype)  # D/2
        self.attention_scaling = rotary.attention_scaling

    def compute(self, name: str, arrived: Callable[[str], Tensor]) -> Tensor:
        """A step from what arrives at it."""
        step = self.step(name, arrived)
        _, kind = step_of_name(name)
        return getattr(step, kind)()

    def step(self, name: str, arrived: Callable[[str], Tensor]) -> Step:
        number, _ = step_of_name(name)
        return Step(self, number, arrived)


@dataclass(frozen=True)
class Step:
    """A place in the chain: what arrives there, the weights, and HF's computation of each kind of step."""

    chain: Chain
    number: int | None  # of the layer
    arrived: Callable[[str], Tensor]  # by the names of `step_names`

    def get(self, kind: str) -> Tensor:
        """What arrives from another step of this layer; of other layers by their whole names."""
        name = kind if "." in kind or self.number is None else name_of_step(self.number, kind)
        return self.arrived(name)

    def weight(self, path: str, number: int | None = None) -> Tensor:
        """A weight of this layer, or of layer `number`; lm_head, norm and embed_tokens of the model."""
        return self.parameter(f"{path}.weight", self.number if number is None else number)

    def bias(self, path: str) -> Tensor | None:
        return self.parameter(f"{path}.bias", self.number)

    def parameter(self, path: str, number: int | None) -> Tensor | None:
        if path.startswith("lm_head"):
            return self.chain.weights.get(path)
        prefix = "model." if path.startswith(("embed_tokens", "norm.")) else f"model.layers.{number}."
        return self.chain.weights.get(prefix + path, keep=number == self.number)

    def linear(self, path: str, x: Tensor) -> Tensor:
        return F.linear(x, self.weight(path), self.bias(path))

    def heads_of(self, x: Tensor) -> Tensor:
        """[P,n*D] -> [P,n,D]"""
        return x.unflatten(-1, (-1, self.chain.head_dim))

    def positions(self) -> Tensor:
        """[P,1]"""
        count = len(self.arrived("ids"))
        return torch.arange(count, dtype=self.chain.dtype)[:, None]

    def angles(self) -> Tensor:
        """The angles of the rotary embedding, [P,D/2]."""
        return self.positions() * self.chain.inv_freq

    # ---- HF's steps

    def embedding(self) -> Tensor:
        return self.chain.model.model.embed_tokens.weight.detach()[self.arrived("ids")].to(self.chain.dtype)  # P E

    def stream(self) -> Tensor:
        return self.arrived(f"hidden_states.{self.number}")

    def input_layernorm(self) -> Tensor:
        return rms_norm(self.get("stream"), self.weight("input_layernorm"), self.chain.eps)

    def q_proj(self) -> Tensor:
        return self.heads_of(self.linear("self_attn.q_proj", self.get("input_layernorm")))  # P H D

    def k_proj(self) -> Tensor:
        return self.heads_of(self.linear("self_attn.k_proj", self.get("input_layernorm")))  # P K D

    def v(self) -> Tensor:
        return self.heads_of(self.linear("self_attn.v_proj", self.get("input_layernorm")))

    def q(self) -> Tensor:
        return rotate(self.get("q_proj"), self.angles(), self.chain.attention_scaling)

    def k(self) -> Tensor:
        return rotate(self.get("k_proj"), self.angles(), self.chain.attention_scaling)

    def heads(self) -> Tensor:
        return attend(self.get("q"), self.get("k"), self.get("v"), self.chain.scaling)

    def attention(self) -> Tensor:
        return self.linear("self_attn.o_proj", self.get("heads").flatten(1))  # P E

    def middle(self) -> Tensor:
        return self.get("stream") + self.get("attention")

    def post_attention_layernorm(self) -> Tensor:
        return rms_norm(self.get("middle"), self.weight("post_attention_layernorm"), self.chain.eps)

    def gate_proj(self) -> Tensor:
        return self.linear("mlp.gate_proj", self.get("post_attention_layernorm"))  # P I

    def up_proj(self) -> Tensor:
        return self.linear("mlp.up_proj", self.get("post_attention_layernorm"))

    def inner(self) -> Tensor:
        return self.chain.act_fn(self.get("gate_proj")) * self.get("up_proj")

    def mlp(self) -> Tensor:
        return self.linear("mlp.down_proj", self.get("inner"))  # P E

    def residual(self) -> Tensor:
        return self.get("middle") + self.get("mlp")

    def final_norm(self) -> Tensor:
        return rms_norm(self.arrived(f"hidden_states.{self.chain.layers}"), self.weight("norm"), self.chain.eps)

    def logits(self) -> Tensor:
        return self.linear("lm_head", self.arrived("final_norm"))  # P V


@dataclass
class Flow:
    """One text on its way through a chain. Each step starts from what a subject has of the steps before it, and where
    it has nothing, from those steps' own results: with nothing given it is HF's model."""

    chain: Chain
    ids: Tensor  # int64 [P]
    given: dict[str, Tensor]  # a subject's tensors [P,...]
    seen: dict[str, Tensor]  # where it has them, bool [P] or [P,heads]
    own: dict[str, Tensor] = field(default_factory=dict)  # each step's result
    values: dict[str, Tensor] = field(default_factory=dict)  # what goes on to the next ones

    def fill(self, name: str, own: Tensor) -> Tensor:
        """The subject's values, and the step's own where it has none."""
        if name not in self.given:
            return own
        return torch.where(widen(self.seen[name], own), self.given[name].to(own), own)

    def is_whole(self, name: str) -> bool:
        """Whether the subject has all of a step, so that nothing passes it by."""
        return name in self.given and bool(self.seen[name].all())

    def arrived(self, name: str) -> Tensor:
        """What goes on from a step, computed when it is asked for."""
        if name == "ids":
            return self.ids
        if name not in self.values:
            self.take(name)
        return self.values[name]

    def take(self, name: str) -> None:
        self.values[name] = self.fill(name, self.result(name))

    def result(self, name: str) -> Tensor:
        """A step's own result from what arrives there, computed once."""
        if name not in self.own:
            self.own[name] = self.chain.compute(name, self.arrived)
        return self.own[name]

    def forget(self, number: int) -> None:
        """Drops what no capture has of a layer; it is computed again if it is asked for."""
        for kind in UNSEEN:
            self.own.pop(name_of_step(number, kind), None)
            self.values.pop(name_of_step(number, kind), None)

    def changed(self, steps: dict[str, Callable[[Step], Tensor]], last: str) -> dict[str, Tensor]:
        """The results of all steps, up to `last`, that come out differently if some steps are computed in another way.
        `steps`: name -> its computation."""
        own: dict[str, Tensor] = {}
        values: dict[str, Tensor] = {}

        def arrived(name: str) -> Tensor:
            return values[name] if name in values else self.arrived(name)

        chain = self.chain
        first = min(chain.order.index(name) for name in steps)
        for name in chain.order[first : chain.order.index(last) + 1]:
            if name in steps:
                result = steps[name](chain.step(name, arrived))
            elif any(source in values for source in chain.inputs[name]):
                result = chain.compute(name, arrived)
            else:
                continue
            own[name] = result
            if not self.is_whole(name):
                values[name] = self.fill(name, result)
        return own


@torch.inference_mode()
def run_through(chain: Chain, flows: list[Flow]) -> None:
    """Computes all steps of some flows, layer by layer, so that a layer's weights are converted once."""
    for name in chain.order:
        number, kind = step_of_name(name)
        for flow in flows:
            flow.arrived(name)
            if kind == "residual":
                flow.forget(number)

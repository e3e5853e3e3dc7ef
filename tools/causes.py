"""Why a step of a port differs from Hugging Face's: what ports have been seen to compute instead, tried on the port's
own inputs to that step.

Each alternative is a line: what a port does, and what the step would then give. The one whose result is as close to the
port's as rounding allows is the cause. If there is none, `pattern` says where the difference lies: that it is a scale,
zeros, a rotation, other heads, a few rows of the weight.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from llama_neuron import compute_llama3_parameters, shard_heads
from tools.oracle import attend, in_dtype

Alternatives = Iterator[tuple[str, Tensor]]  # what a port does instead, and the step's result [P,...]
THETAS = (1e4, 5e4, 1e5, 1.3e5, 2.5e5, 5e5, 1e6, 2e6, 3e6, 5e6, 8e6, 1e7, 1e8)
FP8 = {"fp8 (e4m3)": torch.float8_e4m3fn, "fp8 (e5m2)": torch.float8_e5m2}


@dataclass(frozen=True)
class Case:
    """A step that is out of bounds, in one text of P positions."""

    model: nn.Module  # HF's; the modules of this step are in the exact dtype
    number: int | None  # of the layer
    kind: str  # q, heads, mlp, ...
    tp: int
    dtype: torch.dtype  # the audited one
    ids: Tensor  # [P]
    prompt: int  # its tokens; the other positions were decoded
    has: dict[str, Tensor]  # the port's tensors, exact steps from them where it has none
    step: Tensor  # the exact step from the port's inputs [P,...]
    port: Tensor  # what the port has instead
    wrong: Tensor  # bool [P] or, of heads, [P,n]: where the two differ by more than rounding

    @property
    def layer(self) -> nn.Module:
        return self.model.model.layers[self.number]

    def others(self) -> Iterator[tuple[int, nn.Module]]:
        """The other layers, with their numbers."""
        for number, layer in enumerate(self.model.model.layers):
            if number != self.number:
                yield number, layer

    def get(self, kind: str) -> Tensor:
        """What the port has of this layer; `hidden` is what the layer gets."""
        name = f"hidden_states.{self.number}" if kind == "hidden" else f"layers.{self.number}.{kind}"
        return self.has[name].to(self.step)

    def distance(self, other: Tensor) -> float:
        """Of the port's result from another one, where it is wrong: 1 is its distance from the exact step."""
        wrong, mine = self.wrong, self.port.to(self.step)
        return float((mine - other)[wrong].norm() / (mine - self.step)[wrong].norm())


# ---- ingredients


def normed(x: Tensor, weight: Tensor | float, eps: float) -> Tensor:
    return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + eps) * weight


def norms(x: Tensor, norm: nn.Module, others: dict[str, nn.Module]) -> Alternatives:
    """RMSNorm of x [P,E] in other ways."""
    weight, eps = norm.weight, norm.variance_epsilon
    yield "RMSNorm is left out", x
    yield "RMSNorm without its weight", normed(x, 1.0, eps)
    yield "RMSNorm scales by 1 + weight (as Gemma does)", normed(x, 1 + weight, eps)
    yield "LayerNorm: the mean is subtracted", normed(x - x.mean(-1, keepdim=True), weight, eps)
    for other in (0.0, 1e-8, 1e-6, 1e-5, 1e-4, 1e-3, 1e-2):
        if other != eps:
            yield f"another eps in RMSNorm: {other:g}, config.json says {eps:g}", normed(x, weight, other)
    for name, module in others.items():
        yield f"the weight of {name} in RMSNorm", normed(x, module.weight, eps)


def rounded_weights(weight: Tensor, path: str) -> Alternatives:
    """A quantized weight [N,E]; rows have scales, or the whole has none."""
    largest = weight.abs().amax(-1, keepdim=True)
    for name, dtype in FP8.items():
        yield f"the weight of {path} is rounded to {name}", weight.to(dtype).to(weight)
        scale = largest / torch.finfo(dtype).max
        yield (
            f"the weight of {path} is rounded to {name}, scaled by rows",
            (weight / scale).to(dtype).to(weight) * scale,
        )
    scale = largest / 127
    yield f"the weight of {path} is rounded to int8, scaled by rows", (weight / scale).round() * scale


def weights(case: Case, path: str) -> Alternatives:
    """The weight of a linear layer in other ways; `path` leads to it from a decoder layer."""
    own = case.layer.get_submodule(path).weight
    yield from rounded_weights(own.to(case.dtype).to(own), path)
    if own.shape[0] == own.shape[1]:
        yield f"the weight of {path} is transposed", own.T
    for number, layer in case.others():
        yield f"the weight of {path} is that of layer {number}", layer.get_submodule(path).weight.to(own)


def biases(case: Case, path: str, product: Tensor) -> Alternatives:
    """A product [P,N] without its bias, in other ways."""
    bias = case.layer.get_submodule(path).bias
    if bias is None:
        return
    yield f"the bias of {path} is left out", product
    for times in sorted({2, case.tp} - {1}):
        yield f"the bias of {path} is added {times} times (once per rank?)", product + times * bias


def partial_sums(case: Case, linear: nn.Module, x: Tensor, columns: list[Tensor]) -> Alternatives:
    """A row-parallel product [P,E] with other ranks than all in its sum; `columns` are the inputs of each rank."""
    if case.tp == 1:
        return
    whole, bias = linear(x), 0 if linear.bias is None else linear.bias
    for rank, own in enumerate(columns):
        part = F.linear(x[:, own], linear.weight[:, own])
        yield f"only rank {rank} is in the sum: the all-reduce is missing", part + bias
        if case.tp > 2:
            yield f"rank {rank} is missing in the sum", whole - part
        yield f"rank {rank} is in the sum twice", whole + part
    for times in sorted({2, case.tp}):
        yield f"the sum over ranks is made {times} times", (whole - bias) * times + bias


# ---- the embedding


def embeddings(case: Case) -> Alternatives:
    table, step, P = case.model.model.embed_tokens.weight, case.step, len(case.ids)
    yield "the embedding is scaled by the root of the hidden size (as Gemma does)", step * table.shape[1] ** 0.5
    for shift in range(1, min(P, 65)):
        ids = F.pad(case.ids[:-shift], (shift, 0))
        yield f"the ids are moved by {shift} to the right: padded on the left", table[ids]
        ids = F.pad(case.ids[shift:], (0, shift))
        yield f"the ids are moved by {shift} to the left", table[ids]
    share = -(-table.shape[1] // case.tp)
    for shift in range(1, case.tp):
        yield f"the ranks' slices of the hidden size are off by {shift}", step.roll(shift * share, dims=-1)
    rows = -(-table.shape[0] // case.tp)
    total, inside = torch.zeros_like(step), case.ids < rows
    for rank in range(case.tp):
        total[inside] += table[(case.ids[inside] + rank * rows).clamp(max=len(table) - 1)]
    yield "all ranks look up rank 0's part of the vocabulary", total


def looked_up(case: Case) -> str:
    """The ids whose embeddings these are."""
    table = case.model.model.embed_tokens.weight
    found = torch.cdist(case.port.to(table), table)  # P V
    nearest = found.argmin(-1)
    exact = found.gather(-1, nearest[:, None])[:, 0] < 0.05 * table[nearest].norm(dim=-1)
    if not exact[case.wrong].all():
        return ""
    return f"{nearest[:8].tolist()} for {case.ids[:8].tolist()}"


# ---- q, k and v


def rotate(x: Tensor, angles: Tensor, scaling: float = 1.0) -> Tensor:
    """x [P,n,D] by angles [P,D/2], HF's halves."""
    x1, x2 = x.chunk(2, dim=-1)
    cos, sin = angles.cos()[:, None] * scaling, angles.sin()[:, None] * scaling
    return torch.cat((x1 * cos - x2 * sin, x2 * cos + x1 * sin), dim=-1)


def frequencies(case: Case, D: int) -> Iterator[tuple[str, Tensor]]:
    """Other rotary frequencies [D/2]."""
    config, halves = case.model.config, torch.arange(0, D, 2).to(case.step) / D
    rope = dict(getattr(config, "rope_parameters", None) or getattr(config, "rope_scaling", None) or {})
    own = getattr(config, "rope_theta", None) or rope["rope_theta"]  # transformers 4, 5
    kind = rope.get("rope_type", "default")
    if kind != "default":
        yield "the rope scaling of config.json is left out", 1 / own**halves
    for theta in THETAS:
        if theta != own:
            inv_freq = 1 / theta**halves
            if kind == "llama3":
                inv_freq = compute_llama3_parameters(inv_freq, rope)
            yield f"another theta in the rotary embedding: {theta:g}, config.json says {own:g}", inv_freq
    for factor in (2.0, 4.0, 8.0, 16.0, 32.0):
        inv_freq = 1 / own**halves
        if kind == "llama3" and factor != rope["factor"]:
            name = f"another factor of llama3's rope scaling: {factor:g}, config.json says {rope['factor']:g}"
            yield name, compute_llama3_parameters(inv_freq, rope | {"factor": factor})
        yield f"the rotary embedding is slowed down by {factor:g} everywhere", inv_freq / factor


def rotations(case: Case, x: Tensor) -> Alternatives:
    """The rotary embedding of x [P,n,D] in other ways."""
    rotary, D = case.model.model.rotary_emb, x.shape[-1]
    inv_freq, scaling = rotary.inv_freq.to(x), rotary.attention_scaling
    positions = torch.arange(len(x)).to(x)[:, None]  # P 1
    angles = positions * inv_freq  # P D/2
    yield "the rotary embedding is left out", x
    yield "the rotary embedding turns the other way", rotate(x, -angles, scaling)
    pairs = rotate(x.unflatten(-1, (-1, 2)).transpose(-1, -2).flatten(-2), angles, scaling)
    pairs = pairs.unflatten(-1, (2, -1)).transpose(-1, -2).flatten(-2)
    yield "the rotary embedding turns neighbours, not halves", pairs
    both = torch.cat((angles, angles), dim=-1)[:, None]  # P 1 D
    odd = torch.stack((-x[..., 1::2], x[..., ::2]), dim=-1).flatten(-2)
    mixed = (x * both.cos() + odd * both.sin()) * scaling
    yield "rotate_half takes neighbours, cos and sin are for halves", mixed
    if scaling != 1:
        yield "the attention scaling of the rotary embedding is left out", rotate(x, angles)
    for name, other in frequencies(case, D):
        yield name, rotate(x, positions * other, scaling)
    for dtype in (torch.bfloat16, torch.float16):
        rounded = positions.to(dtype) * inv_freq.to(dtype)
        yield f"positions and frequencies of the rotary embedding in {dtype}", rotate(x, rounded.to(x), scaling)
        yield f"the angles of the rotary embedding in {dtype}", rotate(x, angles.to(dtype).to(x), scaling)
    for shift in sorted(range(-64, 65), key=abs)[1:]:
        turned = rotate(x, (positions + shift) * inv_freq, scaling)
        yield f"the rotary embedding is at positions that are off by {shift:+d}", turned


def meta_layouts(weight: Tensor, D: int) -> Alternatives:
    """Rows of q_proj or k_proj [nD,E] in the order of Meta's checkpoints, which rotate neighbours."""
    split = weight.unflatten(0, (-1, 2, D // 2))  # n 2 D/2 E
    yield "the rows are in the layout of Meta's checkpoints", split.transpose(1, 2).flatten(0, 2)
    split = weight.unflatten(0, (-1, D // 2, 2))
    yield "the rows are converted from Meta's layout twice", split.transpose(1, 2).flatten(0, 2)


def projections(case: Case) -> Alternatives:
    """q, k and v, from the hidden states that the layer gets."""
    kind, attention, D = case.kind.removesuffix("_proj"), case.layer.self_attn, case.layer.self_attn.head_dim
    path, turns, norm = f"self_attn.{kind}_proj", case.kind in ("q", "k"), case.layer.input_layernorm
    linear, hidden, x = case.layer.get_submodule(path), case.get("hidden"), case.get("input_layernorm")  # P E
    rotary = case.model.model.rotary_emb
    angles = torch.arange(len(x)).to(x)[:, None] * rotary.inv_freq.to(x)

    def finish(product: Tensor) -> Tensor:
        heads = product.unflatten(-1, (-1, D))  # P n D
        return rotate(heads, angles, rotary.attention_scaling) if turns else heads

    for name, weight in weights(case, path):
        yield name, finish(F.linear(x, weight, linear.bias))
    for name, product in biases(case, path, F.linear(x, linear.weight)):
        yield name, finish(product)
    others = {"post_attention_layernorm": case.layer.post_attention_layernorm}
    for name, y in norms(hidden, norm, others):
        yield name, finish(F.linear(y, linear.weight, linear.bias))
    for number, layer in case.others():
        its = layer.get_submodule(path)
        with in_dtype(its, x.dtype):
            product = its(normed(hidden, layer.input_layernorm.weight.to(x), norm.variance_epsilon))
        yield f"norm and weights are those of layer {number}: layers are in another order", finish(product)
    for number in range(len(case.model.model.layers)):
        if number != case.number:
            y = normed(case.has[f"hidden_states.{number}"].to(x), norm.weight, norm.variance_epsilon)
            name = f"the layer gets what layer {number} gets: a layer is skipped or repeated"
            yield name, finish(F.linear(y, linear.weight, linear.bias))
    for other in ("q", "k", "v"):
        its = getattr(attention, f"{other}_proj")
        if other != kind and its.weight.shape == linear.weight.shape:
            yield f"{kind} holds {other}: the parts of Wqkv are swapped", finish(its(x))
    if turns:
        for name, weight in meta_layouts(linear.weight, D):
            yield name, finish(F.linear(x, weight, linear.bias))
        yield from rotations(case, linear(x).unflatten(-1, (-1, D)))
    elif kind == "v":
        yield "v is rotated, as q and k are", rotate(case.step, angles, rotary.attention_scaling)


# ---- attention


def attentions(case: Case) -> Alternatives:
    """What the heads give, from the port's q, k and v."""
    yield from masks(case)
    yield from caches(case)
    q, k, v, attention = case.get("q"), case.get("k"), case.get("v"), case.layer.self_attn
    G = q.shape[1] // k.shape[1]
    orders = {"every query head attends to the first KV head": torch.zeros(q.shape[1], dtype=torch.long)}
    if G > 1:
        orders["KV heads are tiled (0 1 0 1), HF repeats them (0 0 1 1)"] = torch.arange(k.shape[1]).repeat(G)
        orders["KV heads are tiled on each rank, HF repeats them"] = tiled_on_ranks(case)
    for shift in range(1, k.shape[1]):
        order = torch.arange(k.shape[1]).roll(shift).repeat_interleave(G)
        orders[f"query heads attend to KV heads that are off by {shift}"] = order
    for name, order in orders.items():
        yield name, attend_heads(attention, q, k[:, order], v[:, order])
    yield "keys and values are swapped", attend(attention, q, v, k)
    best, step = attention.scaling, 2.0
    for _ in range(8):  # a search by factors of 2, then finer ones
        around = [best * step**power for power in range(-4, 5)]
        results = [attend(attention, q, k, v, scaling=scaling) for scaling in around]
        distances = [case.distance(result) for result in results]
        nearest = distances.index(min(distances))
        best, step = around[nearest], step**0.4
    yield f"scores are scaled by {best:.4g}, in HF by {attention.scaling:.4g}", results[nearest]


def masks(case: Case) -> Alternatives:
    """Other masks: who sees whom."""
    q, k, v = case.get("q"), case.get("k"), case.get("v")
    P, run = len(q), partial(attend, case.layer.self_attn)
    everything = torch.ones(P, P, dtype=torch.bool)
    causal, prompt = everything.tril(), torch.arange(P) < case.prompt
    yield "no mask: every position sees the whole text", run(q, k, v, everything)
    yield "no mask in prefill: every position sees the whole prompt", run(q, k, v, causal | (prompt[:, None] & prompt))
    yield "the mask is off by one: a position sees the next one", run(q, k, v, everything.tril(1))
    yield "the mask is off by one: a position does not see itself", run(q, k, v, everything.tril(-1))
    for size in range(1, min(P, 64)):
        yield f"a window: a position sees the last {size} only", run(q, k, v, causal.triu(1 - size))


def caches(case: Case) -> Alternatives:
    """Caches that are written in other ways, and empty slots that are seen."""
    q, k, v = case.get("q"), case.get("k"), case.get("v")
    P, start, run = len(q), case.prompt, partial(attend, case.layer.self_attn)
    causal = torch.ones(P, P, dtype=torch.bool).tril()

    def late(x: Tensor, first: int) -> Tensor:
        return torch.cat((x[:first], torch.zeros_like(x[:1]), x[first:-1]))

    yield "the cache is written one slot too far", run(q, late(k, 0), late(v, 0))
    for name, dtype in FP8.items():
        yield f"the cache is in {name}", run(q, k.to(dtype).to(k), v.to(dtype).to(v))
    if start == P:
        return
    yield "the cache is written one slot too far in decoding", run(q, late(k, start), late(v, start))
    empty = torch.zeros_like(k[start:])
    no_k, no_v = torch.cat((k[:start], empty)), torch.cat((v[:start], empty))
    yield "decoding does not write the cache", run(q, no_k, no_v)
    yield "decoding does not write keys to the cache", run(q, no_k, v)
    yield "decoding does not write values to the cache", run(q, k, no_v)
    for seen in (1, 2, 4, 8, 16, 32, 64):  # slots that nothing was written to
        more = torch.zeros(P, seen, dtype=torch.bool)
        more[start:] = True
        zeros = k.new_zeros(seen, *k.shape[1:])
        what = "a slot that was not written yet: the mask is off by one" if seen == 1 else f"{seen} empty slots"
        mask = torch.cat((causal, more), dim=1)
        yield f"a decoding step sees {what}", run(q, torch.cat((k, zeros)), torch.cat((v, zeros)), mask)
    only = causal.clone()
    only[start:, start:] = torch.eye(P - start, dtype=torch.bool)
    yield "a decoding step does not see the steps before it: all write to one slot", run(q, k, v, only)
    mask = torch.cat((only, torch.zeros(P, P - start, dtype=torch.bool)), dim=1)
    mask[start:, P:] = torch.ones(P - start, P - start, dtype=torch.bool).tril(-1)
    zeros = torch.cat((k, empty)), torch.cat((v, empty))
    yield "decoding writes to one slot, and sees the empty ones after it", run(q, *zeros, mask)


def attend_heads(attention: nn.Module, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Attention with the KV head of each query head written out: k and v [P,H,D]."""
    groups, attention.num_key_value_groups = attention.num_key_value_groups, 1
    y = attend(attention, q, k, v)
    attention.num_key_value_groups = groups
    return y


def tiled_on_ranks(case: Case) -> Tensor:
    """The KV head of each query head if every rank tiles its own, in HF's numbers."""
    numbers = [0] * case.get("q").shape[1]
    for query, key in shard_heads(len(numbers), case.get("k").shape[1], case.tp):
        for place, head in enumerate(query):
            other = key[place % len(key)]
            if head is not None and other is not None:
                numbers[head] = other
    return torch.tensor(numbers)


def other_kv_heads(case: Case, limit: float) -> str:
    """Query heads that attend to another KV head than HF's, or to zeros, each found by its output."""
    q, k, v = case.get("q"), case.get("k"), case.get("v")
    H, group, found = q.shape[1], q.shape[1] // k.shape[1], []
    outputs = []
    for head in range(k.shape[1]):
        order = torch.full((H,), head)
        outputs.append(attend_heads(case.layer.self_attn, q, k[:, order], v[:, order]))
    for head in range(H):
        rows = case.wrong[:, head]
        if not rows.any():
            continue
        mine = case.port[rows, head].to(q)  # n D
        distances = torch.stack([(output[rows, head] - mine).norm() for output in outputs])
        nearest = int(distances.argmin())
        if not mine.any():
            found.append(f"{head} meets zeros")
        elif distances[nearest] < limit * distances[head // group]:
            found.append(f"{head} meets {nearest}")
        else:
            return ""
    return ", ".join(found)


def outputs(case: Case) -> Alternatives:
    """o_proj, from the port's heads."""
    heads, linear, path = case.get("heads"), case.layer.self_attn.o_proj, "self_attn.o_proj"
    x, H = heads.flatten(-2), heads.shape[1]
    for name, weight in weights(case, path):
        yield name, F.linear(x, weight, linear.bias)
    yield from biases(case, path, F.linear(x, linear.weight))
    yield "o_proj takes the heads by head_dim, not by heads", linear(heads.transpose(1, 2).flatten(-2))
    for shift in range(1, H):
        yield f"o_proj takes heads that are off by {shift}", linear(heads.roll(shift, dims=1).flatten(-2))
    numbers, columns = torch.arange(x.shape[1]).view(H, -1), []
    for query, _ in shard_heads(H, case.get("k").shape[1], case.tp):
        columns.append(numbers[[head for head in query if head is not None]].flatten())
    yield from partial_sums(case, linear, x, columns)


# ---- the MLP, sums, the end


def mlps(case: Case) -> Alternatives:
    """The MLP, from the residual stream after attention."""
    mlp, norm, x = case.layer.mlp, case.layer.post_attention_layernorm, case.get("post_attention_layernorm")
    gate, up, down, act_fn = mlp.gate_proj, mlp.up_proj, mlp.down_proj, mlp.act_fn
    acts = {"silu": F.silu, "gelu": F.gelu, "gelu by tanh": partial(F.gelu, approximate="tanh"), "relu": F.relu}
    acts |= {"none": lambda y: y, "sigmoid": F.sigmoid, "relu squared": lambda y: F.relu(y) ** 2}
    acts |= {"gelu by sigmoid(1.702 x)": lambda y: y * F.sigmoid(1.702 * y)}
    for name, act in acts.items():
        yield f"another activation: {name}, config.json says {case.model.config.hidden_act}", down(act(gate(x)) * up(x))
    yield "gate_proj and up_proj are swapped", down(act_fn(up(x)) * gate(x))
    yield "up_proj is left out", down(act_fn(gate(x)))
    hidden, attention = case.get("hidden"), case.get("attention")
    for name, y in norms(hidden + attention, norm, {"input_layernorm": case.layer.input_layernorm}):
        yield name, mlp(y)
    root = case.model.config.hidden_size**0.5
    sums = {"the layer's input alone, attention is not added": hidden, "attention's output alone": attention}
    sums |= {"attention's output added twice": hidden + 2 * attention}
    sums["a residual stream that is scaled by the root of the hidden size (as Gemma does)"] = root * hidden + attention
    for name, total in sums.items():
        yield f"the MLP gets {name}", mlp(norm(total))
    inner = act_fn(gate(x)) * up(x)  # P I
    for name, weight in weights(case, "mlp.gate_proj"):
        yield name, down(act_fn(F.linear(x, weight, gate.bias)) * up(x))
    for name, weight in weights(case, "mlp.up_proj"):
        yield name, down(act_fn(gate(x)) * F.linear(x, weight, up.bias))
    for name, weight in weights(case, "mlp.down_proj"):
        yield name, F.linear(inner, weight, down.bias)
    for number, layer in case.others():
        with in_dtype(layer.mlp, x.dtype):
            its = layer.mlp(x)
        yield f"the whole MLP is that of layer {number}", its
    for name, product in biases(case, "mlp.gate_proj", F.linear(x, gate.weight)):
        yield name, down(act_fn(product) * up(x))
    for name, product in biases(case, "mlp.up_proj", F.linear(x, up.weight)):
        yield name, down(act_fn(gate(x)) * product)
    yield from biases(case, "mlp.down_proj", F.linear(inner, down.weight))
    share = -(-inner.shape[1] // case.tp)
    yield from partial_sums(case, down, inner, list(torch.arange(inner.shape[1]).split(share)))


def residuals(case: Case) -> Alternatives:
    hidden, attention, mlp = case.get("hidden"), case.get("attention"), case.get("mlp")
    yield "the residual around attention is left out", attention + mlp
    yield "the residual around the MLP is left out", mlp
    yield "attention's output is not added", hidden + mlp
    yield "the MLP's output is not added", hidden + attention
    yield "attention's output is added twice", hidden + 2 * attention + mlp
    yield "the MLP's output is added twice", hidden + attention + 2 * mlp
    middle = case.layer.post_attention_layernorm(hidden + attention)
    yield "the residual is taken after post_attention_layernorm", middle + mlp
    yield "the residual is taken after input_layernorm", case.layer.input_layernorm(hidden) + attention + mlp
    yield "the layer is skipped: its output is its input", hidden


def final_norms(case: Case) -> Alternatives:
    hidden = case.has[f"hidden_states.{len(case.model.model.layers)}"].to(case.step)
    last = {"the last layer's input_layernorm": case.model.model.layers[-1].input_layernorm}
    yield from norms(hidden, case.model.model.norm, last)


def logits(case: Case) -> Alternatives:
    x, weight = case.has["final_norm"].to(case.step), case.model.lm_head.weight
    hidden = case.has[f"hidden_states.{len(case.model.model.layers)}"].to(case.step)
    table = case.model.model.embed_tokens.weight
    if table is not weight:
        yield "the embedding is taken for lm_head, though config.json does not tie them", F.linear(x, table.to(x))
    yield "lm_head gets hidden states without the final norm", F.linear(hidden, weight)
    for name, rounded in rounded_weights(weight.to(case.dtype).to(x), "lm_head"):
        yield name, F.linear(x, rounded)
    for cap in (5.0, 10.0, 15.0, 20.0, 30.0, 50.0, 100.0):
        yield f"logits are capped at {cap:g} by tanh (as Gemma 2 does)", cap * torch.tanh(case.step / cap)
    share = -(-weight.shape[0] // case.tp)
    for shift in range(1, case.tp):
        yield f"the ranks' slices of the vocabulary are off by {shift}", case.step.roll(shift * share, dims=-1)


STEPS = {"embedding": embeddings, "heads": attentions, "attention": outputs, "mlp": mlps, "residual": residuals}
STEPS |= dict.fromkeys(("q", "k", "v", "q_proj", "k_proj"), projections)
STEPS |= {"final_norm": final_norms, "logits": logits}


# ---- what the difference looks like


def explain(case: Case, rounding: float) -> tuple[str, str]:
    """What the port does instead, and the evidence. `rounding`: HF's own rounding as a share of the difference."""
    wrong = case.port[case.wrong]
    if not torch.isfinite(wrong).all():
        share = 1 - torch.isfinite(wrong).float().mean()
        meaning = "NaN or infinity: masked scores near finfo.min, an overflow, or slots that were never written"
        return meaning, f"{share:.0%} of the numbers are not finite"
    best, distance = "", 1.0
    for name, result in STEPS[case.kind](case) if case.kind in STEPS else ():
        other = case.distance(result)
        if other < distance:
            best, distance = name, other
    # what is left is rounding, or small beside the difference
    if distance < min(0.5, max(2 * rounding, 0.1)):
        return best, f"computed so, the difference falls to {distance:.1%} of what it is"
    return pattern(case, rounding)


def pattern(case: Case, rounding: float) -> tuple[str, str]:
    """The same where no alternative fits."""
    limit = max(3 * rounding, 0.05)
    right, wrong = case.step[case.wrong], case.port[case.wrong].to(case.step)  # n ...
    difference = (wrong - right).norm()
    if not wrong.any():
        return "zeros: this part was not computed, not written, or its weights are padding", "all its numbers are 0"
    scale = float((right * wrong).sum() / right.pow(2).sum())
    if (wrong - scale * right).norm() < limit * difference:
        return f"a scale: the right values times {scale:.4g}", "the difference is proportional to the values"
    if case.kind == "embedding" and looked_up(case):
        return "other ids are looked up", looked_up(case)
    if case.port.dim() == 3:
        moved = moved_heads(case, limit)
        if moved:
            return f"heads in another order: {moved}", "each of these heads has the numbers of another one of HF's"
    if case.kind == "heads":
        return pattern_of_attention(case, limit)
    if case.kind in ("q", "k"):
        lengths = [x.unflatten(-1, (2, -1)).norm(dim=-2) for x in (right, wrong)]
        if (lengths[0] - lengths[1]).norm() < limit * difference:
            return pattern_of_rotation(case)
    own = (right * wrong).sum(-1, keepdim=True) / right.pow(2).sum(-1, keepdim=True)  # n 1
    if case.kind in ("q", "k", "v", "mlp", "final_norm") and (wrong - own * right).norm() < limit * difference:
        scales = f"each position is a multiple of HF's, {float(own.min()):.4g} to {float(own.max()):.4g}"
        return "RMSNorm's statistics: another eps, or another mean of the squares", scales
    features = few_features(wrong - right)
    if case.kind in ("attention", "mlp", "residual", "final_norm", "logits") and features:
        return f"a few rows of the weight: output features {features}", "the others are right"
    weight = "another weight or another revision of it (a stale shard, a wrong conversion, quantization)"
    what = {"mlp": f"{weight}, or another activation", "residual": "another sum"}
    cosine = float(F.cosine_similarity(right.flatten(), wrong.flatten(), dim=0))
    return what.get(case.kind, weight), f"no known alternative fits; cosine with HF's step {cosine:.4f}"


def few_features(difference: Tensor) -> str:
    """The output features that hold nearly all of a difference [n,E], if they are few."""
    energy = difference.flatten(1).pow(2).sum(0)
    order = energy.argsort(descending=True)
    count = int((energy[order].cumsum(0) < 0.99 * energy.sum()).sum()) + 1
    if count > len(energy) / 8:
        return ""
    numbers = sorted(order[:count].tolist())
    return f"{numbers[0]} to {numbers[-1]}, {count} in all" if count > 4 else ", ".join(map(str, numbers))


def moved_heads(case: Case, limit: float) -> str:
    """Heads of the port that are other heads of HF's."""
    found = []
    for place in range(case.port.shape[1]):
        rows = case.wrong[:, place]
        if not rows.any():
            continue
        mine = case.port[rows, place].to(case.step)  # n D
        distances = (case.step[rows] - mine[:, None]).norm(dim=(0, 2)) / mine.norm()  # heads
        nearest = int(distances.argmin())
        if nearest != place and distances[nearest] < limit * distances[place]:
            found.append(f"head {place} has {nearest}'s")
    if len(found) > 4:
        found[4:] = ["..."]
    return ", ".join(found)


def pattern_of_attention(case: Case, limit: float) -> tuple[str, str]:
    """Where attention's weights may have gone: its output as a multiple of the right one plus something else."""
    others = other_kv_heads(case, limit)
    if others:
        return f"query heads attend to other KV heads: {others}", "each output is that of another KV head of the port"
    decoded = not case.wrong[: case.prompt].any()
    where = "a decoding step" if decoded else "a position"
    right, wrong = case.step[case.wrong], case.port[case.wrong].to(case.step)  # n D
    scale = (right * wrong).sum(-1, keepdim=True) / right.pow(2).sum(-1, keepdim=True)
    if (wrong - scale * right).norm() < limit * (wrong - right).norm():
        share = 1 - float(scale.mean())
        return f"{where} sees empty slots too: they take {share:.0%} of the weight", "each head is a multiple of HF's"
    if decoded:
        meaning = "the cache: a decoding step sees slots that are not the text's (padding, stale or misplaced ones)"
        return meaning, "prefill is right and decoding wrong"
    if case.wrong[0].any():
        return (
            "what is written to the cache, or a mask: position 0 is wrong, and sees itself alone",
            "no known one fits",
        )
    return "another mask, clipped scores, or another softmax", "position 0 is right, and sees itself alone"


def pattern_of_rotation(case: Case) -> tuple[str, str]:
    """Which positions the rotary embedding took, or how its error grows."""
    turns = []
    for x in (case.step, case.port.to(case.step)):
        real, imaginary = x.chunk(2, dim=-1)  # P n D/2
        turns.append(torch.complex(real.contiguous(), imaginary.contiguous()))
    relative = (turns[1] * turns[0].conj()).sum(1)  # P D/2: by how much further each pair is turned
    P, inv_freq = len(relative), case.model.model.rotary_emb.inv_freq.to(case.step)
    shifts = torch.arange(-P, P + 1)
    fits = (relative[:, None] * torch.polar(torch.ones(1), -(shifts[:, None] * inv_freq))).real.sum(-1)  # P shifts
    best = fits.max(-1)
    taken = torch.arange(P) + shifts[best.indices]
    rows = case.wrong.any(1)
    if (best.values[rows] > 0.99 * relative[rows].abs().sum(-1)).all():
        asked, got = torch.arange(P)[rows][:6].tolist(), taken[rows][:6].tolist()
        return "the rotary embedding takes other positions", f"{got} ... where they are {asked} ..."
    errors = relative.angle().abs().mean(-1)  # P
    evidence = f"mean error of the angle {errors[1]:.3g} at position 1, {errors[-1]:.3g} at position {P - 1}"
    return "another rotation: the pairs have the right length and other angles", evidence

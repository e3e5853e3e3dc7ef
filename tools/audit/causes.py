"""Why a step of a port differs from Hugging Face's: what ports have been seen to compute instead, tried on the port's
own inputs to that step.

Each alternative says what a port does, and what the step would then give. The one whose result is as close to the
port's as rounding allows is the cause. If there is none, `pattern` says what the difference looks like: a scale, zeros,
a rotation, other heads, a few rows of the weight.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from llama_neuron import compute_llama3_parameters, shard_heads
from tools.audit.oracle import attend, in_dtype

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
        """How far the port's result is from another one, where it is wrong: 1 is its distance from the exact step."""
        mine = self.port.to(self.step)
        from_other = (mine - other)[self.wrong]
        from_step = (mine - self.step)[self.wrong]
        return float(from_other.norm() / from_step.norm())


# ---- ingredients


def normed(x: Tensor, weight: Tensor | float, eps: float) -> Tensor:
    variance = x.pow(2).mean(-1, keepdim=True)
    return x * torch.rsqrt(variance + eps) * weight


def norms(x: Tensor, norm: nn.Module, others: dict[str, nn.Module]) -> Alternatives:
    """RMSNorm of x [P,E] in other ways."""
    weight = norm.weight
    eps = norm.variance_epsilon
    mean = x.mean(-1, keepdim=True)
    yield "RMSNorm is left out", x
    yield "RMSNorm without its weight", normed(x, 1.0, eps)
    yield "RMSNorm scales by 1 + weight (as Gemma does)", normed(x, 1 + weight, eps)
    yield "LayerNorm: the mean is subtracted", normed(x - mean, weight, eps)
    for other in (0.0, 1e-8, 1e-6, 1e-5, 1e-4, 1e-3, 1e-2):
        if other != eps:
            yield f"another eps in RMSNorm: {other:g}, config.json says {eps:g}", normed(x, weight, other)
    for name, module in others.items():
        yield f"the weight of {name} in RMSNorm", normed(x, module.weight, eps)


def rounded_weights(weight: Tensor, path: str) -> Alternatives:
    """A quantized weight [N,E]; rows have scales, or the whole has none."""
    largest = weight.abs().amax(-1, keepdim=True)
    for name, dtype in FP8.items():
        rounded = weight.to(dtype)
        yield f"the weight of {path} is rounded to {name}", rounded.to(weight)
        scale = largest / torch.finfo(dtype).max
        rounded = (weight / scale).to(dtype)
        yield f"the weight of {path} is rounded to {name}, scaled by rows", rounded.to(weight) * scale
    scale = largest / 127
    rounded = (weight / scale).round()
    yield f"the weight of {path} is rounded to int8, scaled by rows", rounded * scale


def weights(case: Case, path: str) -> Alternatives:
    """The weight of a linear layer in other ways; `path` leads to it from a decoder layer."""
    own = case.layer.get_submodule(path).weight
    in_audited_dtype = own.to(case.dtype).to(own)
    yield from rounded_weights(in_audited_dtype, path)
    rows, columns = own.shape
    if rows == columns:
        yield f"the weight of {path} is transposed", own.T
    for number, layer in case.others():
        its = layer.get_submodule(path).weight
        yield f"the weight of {path} is that of layer {number}", its.to(own)


def biases(case: Case, path: str, product: Tensor) -> Alternatives:
    """A product [P,N] without its bias, in other ways."""
    bias = case.layer.get_submodule(path).bias
    if bias is None:
        return
    yield f"the bias of {path} is left out", product
    for times in sorted({2, case.tp} - {1}):
        yield f"the bias of {path} is added {times} times (once per rank?)", product + times * bias


def partial_sums(case: Case, linear: nn.Module, x: Tensor, columns: list[Tensor]) -> Alternatives:
    """A row-parallel product [P,E] whose sum has other terms than one from each rank; `columns` are the inputs of each
    rank."""
    if case.tp == 1:
        return
    whole = linear(x)
    bias = 0 if linear.bias is None else linear.bias
    for rank, own in enumerate(columns):
        weight = linear.weight[:, own]
        part = F.linear(x[:, own], weight)
        yield f"only rank {rank} is in the sum: the all-reduce is missing", part + bias
        if case.tp > 2:
            yield f"rank {rank} is missing in the sum", whole - part
        yield f"rank {rank} is in the sum twice", whole + part
    for times in sorted({2, case.tp}):
        yield f"the sum over ranks is made {times} times", (whole - bias) * times + bias


# ---- the embedding


def embeddings(case: Case) -> Alternatives:
    table = case.model.model.embed_tokens.weight
    step = case.step
    vocab_size, hidden_size = table.shape
    yield "the embedding is scaled by the root of the hidden size (as Gemma does)", step * hidden_size**0.5
    for shift in range(1, min(len(case.ids), 65)):
        ids = F.pad(case.ids[:-shift], (shift, 0))
        yield f"the ids are moved by {shift} to the right: padded on the left", table[ids]
        ids = F.pad(case.ids[shift:], (0, shift))
        yield f"the ids are moved by {shift} to the left", table[ids]
    share = -(-hidden_size // case.tp)
    for shift in range(1, case.tp):
        yield f"the ranks' slices of the hidden size are off by {shift}", step.roll(shift * share, dims=-1)
    rows = -(-vocab_size // case.tp)
    inside = case.ids < rows
    total = torch.zeros_like(step)
    for rank in range(case.tp):
        ids = case.ids[inside] + rank * rows
        total[inside] += table[ids.clamp(max=vocab_size - 1)]
    yield "all ranks look up rank 0's part of the vocabulary", total


def looked_up(case: Case) -> str:
    """The ids whose embeddings these are."""
    table = case.model.model.embed_tokens.weight
    distances = torch.cdist(case.port.to(table), table)  # P V
    nearest = distances.argmin(-1)
    smallest = distances.gather(-1, nearest[:, None])[:, 0]
    is_exact = smallest < 0.05 * table[nearest].norm(dim=-1)
    if not is_exact[case.wrong].all():
        return ""
    return f"{nearest[:8].tolist()} for {case.ids[:8].tolist()}"


# ---- q, k and v


def rotate(x: Tensor, angles: Tensor, scaling: float = 1.0) -> Tensor:
    """x [P,n,D] by angles [P,D/2], HF's halves."""
    x1, x2 = x.chunk(2, dim=-1)
    cos = angles.cos()[:, None] * scaling
    sin = angles.sin()[:, None] * scaling
    y1 = x1 * cos - x2 * sin
    y2 = x2 * cos + x1 * sin
    return torch.cat((y1, y2), dim=-1)


def frequencies(case: Case, D: int) -> Iterator[tuple[str, Tensor]]:
    """Other rotary frequencies [D/2]."""
    config = case.model.config
    exponent = torch.arange(0, D, 2).to(case.step) / D
    rope = getattr(config, "rope_parameters", None)  # transformers 5
    if not rope:
        rope = getattr(config, "rope_scaling", None) or {}  # transformers 4
    own = getattr(config, "rope_theta", None) or rope["rope_theta"]
    kind = rope.get("rope_type", "default")
    unscaled = 1 / own**exponent
    if kind != "default":
        yield "the rope scaling of config.json is left out", unscaled
    for theta in THETAS:
        if theta != own:
            inv_freq = 1 / theta**exponent
            if kind == "llama3":
                inv_freq = compute_llama3_parameters(inv_freq, rope)
            yield f"another theta in the rotary embedding: {theta:g}, config.json says {own:g}", inv_freq
    for factor in (2.0, 4.0, 8.0, 16.0, 32.0):
        if kind == "llama3" and factor != rope["factor"]:
            changed = {**rope, "factor": factor}
            name = f"another factor of llama3's rope scaling: {factor:g}, config.json says {rope['factor']:g}"
            yield name, compute_llama3_parameters(unscaled, changed)
        yield f"the rotary embedding is slowed down by {factor:g} everywhere", unscaled / factor


def rotations(case: Case, x: Tensor) -> Alternatives:
    """The rotary embedding of x [P,n,D] in other ways."""
    rotary = case.model.model.rotary_emb
    inv_freq = rotary.inv_freq.to(x)
    scaling = rotary.attention_scaling
    positions = torch.arange(len(x)).to(x)[:, None]  # P 1
    angles = positions * inv_freq  # P D/2
    yield "the rotary embedding is left out", x
    yield "the rotary embedding turns the other way", rotate(x, -angles, scaling)
    halves = x.unflatten(-1, (-1, 2)).transpose(-1, -2).flatten(-2)
    turned = rotate(halves, angles, scaling)
    neighbours = turned.unflatten(-1, (2, -1)).transpose(-1, -2).flatten(-2)
    yield "the rotary embedding turns neighbours, not halves", neighbours
    both = torch.cat((angles, angles), dim=-1)[:, None]  # P 1 D
    even = x[..., ::2]
    odd = x[..., 1::2]
    half = torch.stack((-odd, even), dim=-1).flatten(-2)
    mixed = (x * both.cos() + half * both.sin()) * scaling
    yield "rotate_half takes neighbours, cos and sin are for halves", mixed
    if scaling != 1:
        yield "the attention scaling of the rotary embedding is left out", rotate(x, angles)
    for name, other in frequencies(case, x.shape[-1]):
        yield name, rotate(x, positions * other, scaling)
    for dtype in (torch.bfloat16, torch.float16):
        rounded = positions.to(dtype) * inv_freq.to(dtype)
        yield f"positions and frequencies of the rotary embedding in {dtype}", rotate(x, rounded.to(x), scaling)
        rounded = angles.to(dtype)
        yield f"the angles of the rotary embedding in {dtype}", rotate(x, rounded.to(x), scaling)
    nearest_first = sorted(range(-64, 65), key=abs)
    for shift in nearest_first[1:]:
        moved = (positions + shift) * inv_freq
        yield f"the rotary embedding is at positions that are off by {shift:+d}", rotate(x, moved, scaling)


def meta_layouts(weight: Tensor, D: int) -> Alternatives:
    """Rows of q_proj or k_proj [nD,E] in the order of Meta's checkpoints, which rotate neighbours."""
    split = weight.unflatten(0, (-1, 2, D // 2))  # n 2 D/2 E
    yield "the rows are in the layout of Meta's checkpoints", split.transpose(1, 2).flatten(0, 2)
    split = weight.unflatten(0, (-1, D // 2, 2))
    yield "the rows are converted from Meta's layout twice", split.transpose(1, 2).flatten(0, 2)


def projections(case: Case) -> Alternatives:
    """q, k and v, from the hidden states that the layer gets."""
    kind = case.kind.removesuffix("_proj")
    is_rotated = case.kind in ("q", "k")
    path = f"self_attn.{kind}_proj"
    attention = case.layer.self_attn
    linear = case.layer.get_submodule(path)
    norm = case.layer.input_layernorm
    eps = norm.variance_epsilon
    hidden = case.get("hidden")  # P E
    x = case.get("input_layernorm")
    rotary = case.model.model.rotary_emb
    positions = torch.arange(len(x)).to(x)[:, None]  # P 1
    angles = positions * rotary.inv_freq.to(x)

    def finish(product: Tensor) -> Tensor:
        heads = product.unflatten(-1, (-1, attention.head_dim))  # P n D
        return rotate(heads, angles, rotary.attention_scaling) if is_rotated else heads

    for name, weight in weights(case, path):
        yield name, finish(F.linear(x, weight, linear.bias))
    for name, product in biases(case, path, F.linear(x, linear.weight)):
        yield name, finish(product)
    others = {"post_attention_layernorm": case.layer.post_attention_layernorm}
    for name, y in norms(hidden, norm, others):
        yield name, finish(F.linear(y, linear.weight, linear.bias))
    for number, layer in case.others():
        its_linear = layer.get_submodule(path)
        its_norm = layer.input_layernorm
        with in_dtype(its_linear, x.dtype):
            its_normed = normed(hidden, its_norm.weight.to(x), eps)
            product = its_linear(its_normed)
        yield f"norm and weights are those of layer {number}: layers are in another order", finish(product)
    for number, _ in case.others():
        its_hidden = case.has[f"hidden_states.{number}"].to(x)
        y = normed(its_hidden, norm.weight, eps)
        name = f"the layer gets what layer {number} gets: a layer is skipped or repeated"
        yield name, finish(F.linear(y, linear.weight, linear.bias))
    for other in ("q", "k", "v"):
        its_linear = getattr(attention, f"{other}_proj")
        if other != kind and its_linear.weight.shape == linear.weight.shape:
            yield f"{kind} holds {other}: the parts of Wqkv are swapped", finish(its_linear(x))
    if is_rotated:
        for name, weight in meta_layouts(linear.weight, attention.head_dim):
            yield name, finish(F.linear(x, weight, linear.bias))
        unrotated = linear(x).unflatten(-1, (-1, attention.head_dim))
        yield from rotations(case, unrotated)
    elif kind == "v":
        yield "v is rotated, as q and k are", rotate(case.step, angles, rotary.attention_scaling)


# ---- attention


def attentions(case: Case) -> Alternatives:
    """What the heads give, from the port's q, k and v."""
    yield from masks(case)
    yield from caches(case)
    yield from head_orders(case)
    q = case.get("q")
    k = case.get("k")
    v = case.get("v")
    attention = case.layer.self_attn
    yield "keys and values are swapped", attend(attention, q, v, k)
    best = attention.scaling
    step = 2.0
    for _ in range(8):  # a search by factors of 2, then finer ones
        around = [best * step**power for power in range(-4, 5)]
        results = [attend(attention, q, k, v, scaling=scaling) for scaling in around]
        distances = [case.distance(result) for result in results]
        nearest = distances.index(min(distances))
        best = around[nearest]
        step = step**0.4
    yield f"scores are scaled by {best:.4g}, in HF by {attention.scaling:.4g}", results[nearest]


def head_orders(case: Case) -> Alternatives:
    """Query heads that attend to other KV heads."""
    q = case.get("q")
    k = case.get("k")
    v = case.get("v")
    num_heads = q.shape[1]
    num_kv_heads = k.shape[1]
    group = num_heads // num_kv_heads
    orders = {"every query head attends to the first KV head": torch.zeros(num_heads, dtype=torch.long)}
    if group > 1:
        tiled = torch.arange(num_kv_heads).repeat(group)
        orders["KV heads are tiled (0 1 0 1), HF repeats them (0 0 1 1)"] = tiled
        orders["KV heads are tiled on each rank, HF repeats them"] = tiled_on_ranks(case)
    for shift in range(1, num_kv_heads):
        moved = torch.arange(num_kv_heads).roll(shift)
        orders[f"query heads attend to KV heads that are off by {shift}"] = moved.repeat_interleave(group)
    for name, order in orders.items():
        yield name, attend_heads(case.layer.self_attn, q, k[:, order], v[:, order])


def masks(case: Case) -> Alternatives:
    """Other masks: who sees whom."""
    q = case.get("q")
    k = case.get("k")
    v = case.get("v")
    P = len(q)
    everything = torch.ones(P, P, dtype=torch.bool)
    causal = everything.tril()
    in_prompt = torch.arange(P) < case.prompt
    both_in_prompt = in_prompt[:, None] & in_prompt

    def run(mask: Tensor) -> Tensor:
        return attend(case.layer.self_attn, q, k, v, mask)

    yield "no mask: every position sees the whole text", run(everything)
    yield "no mask in prefill: every position sees the whole prompt", run(causal | both_in_prompt)
    yield "the mask is off by one: a position sees the next one", run(everything.tril(1))
    yield "the mask is off by one: a position does not see itself", run(everything.tril(-1))
    for size in range(1, min(P, 64)):
        yield f"a window: a position sees the last {size} only", run(causal.triu(1 - size))


def caches(case: Case) -> Alternatives:
    """Caches that are written in other ways, and empty slots that are seen."""
    q = case.get("q")
    k = case.get("k")
    v = case.get("v")
    P = len(q)
    start = case.prompt
    new = P - start
    causal = torch.ones(P, P, dtype=torch.bool).tril()
    run = partial(attend, case.layer.self_attn, q)

    def late(x: Tensor, first: int) -> Tensor:
        return torch.cat((x[:first], torch.zeros_like(x[:1]), x[first:-1]))

    def with_zeros(x: Tensor, slots: int) -> Tensor:
        return torch.cat((x, x.new_zeros(slots, *x.shape[1:])))

    yield "the cache is written one slot too far", run(late(k, 0), late(v, 0))
    for name, dtype in FP8.items():
        yield f"the cache is in {name}", run(k.to(dtype).to(k), v.to(dtype).to(v))
    if new == 0:
        return
    yield "the cache is written one slot too far in decoding", run(late(k, start), late(v, start))
    prompt_k = with_zeros(k[:start], new)
    prompt_v = with_zeros(v[:start], new)
    yield "decoding does not write the cache", run(prompt_k, prompt_v)
    yield "decoding does not write keys to the cache", run(prompt_k, v)
    yield "decoding does not write values to the cache", run(k, prompt_v)
    for seen in (1, 2, 4, 8, 16, 32, 64):  # slots that nothing was written to
        what = "a slot that was not written yet: the mask is off by one" if seen == 1 else f"{seen} empty slots"
        empty = torch.zeros(P, seen, dtype=torch.bool)
        empty[start:] = True
        mask = torch.cat((causal, empty), dim=1)
        yield f"a decoding step sees {what}", run(with_zeros(k, seen), with_zeros(v, seen), mask)
    only_itself = causal.clone()
    only_itself[start:, start:] = torch.eye(new, dtype=torch.bool)
    yield "a decoding step does not see the steps before it: all write to one slot", run(k, v, only_itself)
    empty = torch.zeros(P, new, dtype=torch.bool)
    empty[start:] = torch.ones(new, new, dtype=torch.bool).tril(-1)
    mask = torch.cat((only_itself, empty), dim=1)
    result = run(with_zeros(k, new), with_zeros(v, new), mask)
    yield "decoding writes to one slot, and sees the empty ones after it", result


def attend_heads(attention: nn.Module, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Attention with the KV head of each query head written out: k and v [P,H,D]."""
    groups = attention.num_key_value_groups
    attention.num_key_value_groups = 1
    y = attend(attention, q, k, v)
    attention.num_key_value_groups = groups
    return y


def tiled_on_ranks(case: Case) -> Tensor:
    """The KV head of each query head if every rank tiles its own, in HF's numbers."""
    num_heads = case.get("q").shape[1]
    num_kv_heads = case.get("k").shape[1]
    order = [0] * num_heads
    for query_heads, kv_heads in shard_heads(num_heads, num_kv_heads, case.tp):
        for place, head in enumerate(query_heads):
            kv_head = kv_heads[place % len(kv_heads)]
            if head is not None and kv_head is not None:
                order[head] = kv_head
    return torch.tensor(order)


def other_kv_heads(case: Case, limit: float) -> str:
    """Query heads that attend to another KV head than HF's, or to zeros, each found by its output."""
    q = case.get("q")
    k = case.get("k")
    v = case.get("v")
    num_heads = q.shape[1]
    num_kv_heads = k.shape[1]
    group = num_heads // num_kv_heads
    outputs = []  # [P,H,D] of each KV head, if all query heads attend to it
    for kv_head in range(num_kv_heads):
        order = torch.full((num_heads,), kv_head)
        outputs.append(attend_heads(case.layer.self_attn, q, k[:, order], v[:, order]))
    found = []
    for head in range(num_heads):
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
    path = "self_attn.o_proj"
    linear = case.layer.self_attn.o_proj
    heads = case.get("heads")  # P H D
    num_heads = heads.shape[1]
    num_kv_heads = case.get("k").shape[1]
    x = heads.flatten(-2)  # P H*D
    for name, weight in weights(case, path):
        yield name, F.linear(x, weight, linear.bias)
    yield from biases(case, path, F.linear(x, linear.weight))
    yield "o_proj takes the heads by head_dim, not by heads", linear(heads.transpose(1, 2).flatten(-2))
    for shift in range(1, num_heads):
        moved = heads.roll(shift, dims=1)
        yield f"o_proj takes heads that are off by {shift}", linear(moved.flatten(-2))
    columns = torch.arange(x.shape[1]).view(num_heads, -1)  # H D
    columns_of_ranks = []
    for query_heads, _ in shard_heads(num_heads, num_kv_heads, case.tp):
        own = [head for head in query_heads if head is not None]
        columns_of_ranks.append(columns[own].flatten())
    yield from partial_sums(case, linear, x, columns_of_ranks)


# ---- the MLP, sums, the end

ACTIVATIONS = {
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu by tanh": partial(F.gelu, approximate="tanh"),
    "relu": F.relu,
    "none": lambda y: y,
    "sigmoid": F.sigmoid,
    "relu squared": lambda y: F.relu(y) ** 2,
    "gelu by sigmoid(1.702 x)": lambda y: y * F.sigmoid(1.702 * y),
}


def mlps(case: Case) -> Alternatives:
    """The MLP, from the residual stream after attention."""
    mlp = case.layer.mlp
    gate = mlp.gate_proj
    up = mlp.up_proj
    down = mlp.down_proj
    act_fn = mlp.act_fn
    x = case.get("post_attention_layernorm")
    for name, act in ACTIVATIONS.items():
        changed = down(act(gate(x)) * up(x))
        yield f"another activation: {name}, config.json says {case.model.config.hidden_act}", changed
    yield "gate_proj and up_proj are swapped", down(act_fn(up(x)) * gate(x))
    yield "up_proj is left out", down(act_fn(gate(x)))
    yield from mlp_inputs(case)
    inner = act_fn(gate(x)) * up(x)  # P I
    for name, weight in weights(case, "mlp.gate_proj"):
        changed = F.linear(x, weight, gate.bias)
        yield name, down(act_fn(changed) * up(x))
    for name, weight in weights(case, "mlp.up_proj"):
        changed = F.linear(x, weight, up.bias)
        yield name, down(act_fn(gate(x)) * changed)
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
    size = inner.shape[1]
    share = -(-size // case.tp)
    columns_of_ranks = torch.arange(size).split(share)
    yield from partial_sums(case, down, inner, list(columns_of_ranks))


def mlp_inputs(case: Case) -> Alternatives:
    """The MLP of other sums, and after other norms."""
    mlp = case.layer.mlp
    norm = case.layer.post_attention_layernorm
    hidden = case.get("hidden")
    attention = case.get("attention")
    others = {"input_layernorm": case.layer.input_layernorm}
    for name, y in norms(hidden + attention, norm, others):
        yield name, mlp(y)
    scaled = case.model.config.hidden_size**0.5 * hidden
    sums = {
        "the layer's input alone, attention is not added": hidden,
        "attention's output alone": attention,
        "attention's output added twice": hidden + 2 * attention,
        "a residual stream that is scaled by the root of the hidden size (as Gemma does)": scaled + attention,
    }
    for name, total in sums.items():
        yield f"the MLP gets {name}", mlp(norm(total))


def residuals(case: Case) -> Alternatives:
    """The layer's output, from what the port has of its parts."""
    hidden = case.get("hidden")
    attention = case.get("attention")
    mlp = case.get("mlp")
    yield "the residual around attention is left out", attention + mlp
    yield "the residual around the MLP is left out", mlp
    yield "attention's output is not added", hidden + mlp
    yield "the MLP's output is not added", hidden + attention
    yield "attention's output is added twice", hidden + 2 * attention + mlp
    yield "the MLP's output is added twice", hidden + attention + 2 * mlp
    normed_middle = case.layer.post_attention_layernorm(hidden + attention)
    yield "the residual is taken after post_attention_layernorm", normed_middle + mlp
    normed_hidden = case.layer.input_layernorm(hidden)
    yield "the residual is taken after input_layernorm", normed_hidden + attention + mlp
    yield "the layer is skipped: its output is its input", hidden


def last_hidden(case: Case) -> Tensor:
    """What the final norm gets."""
    layers = len(case.model.model.layers)
    return case.has[f"hidden_states.{layers}"].to(case.step)


def final_norms(case: Case) -> Alternatives:
    """The final norm, from the last layer's output."""
    others = {"the last layer's input_layernorm": case.model.model.layers[-1].input_layernorm}
    yield from norms(last_hidden(case), case.model.model.norm, others)


def logits(case: Case) -> Alternatives:
    """lm_head, from the final norm."""
    x = case.has["final_norm"].to(case.step)
    weight = case.model.lm_head.weight
    table = case.model.model.embed_tokens.weight
    if table is not weight:
        yield "the embedding is taken for lm_head, though config.json does not tie them", F.linear(x, table.to(x))
    yield "lm_head gets hidden states without the final norm", F.linear(last_hidden(case), weight)
    in_audited_dtype = weight.to(case.dtype).to(x)
    for name, rounded in rounded_weights(in_audited_dtype, "lm_head"):
        yield name, F.linear(x, rounded)
    for cap in (5.0, 10.0, 15.0, 20.0, 30.0, 50.0, 100.0):
        capped = cap * torch.tanh(case.step / cap)
        yield f"logits are capped at {cap:g} by tanh (as Gemma 2 does)", capped
    vocab_size = weight.shape[0]
    share = -(-vocab_size // case.tp)
    for shift in range(1, case.tp):
        yield f"the ranks' slices of the vocabulary are off by {shift}", case.step.roll(shift * share, dims=-1)


STEPS = {
    "embedding": embeddings,
    "q_proj": projections,
    "k_proj": projections,
    "q": projections,
    "k": projections,
    "v": projections,
    "heads": attentions,
    "attention": outputs,
    "mlp": mlps,
    "residual": residuals,
    "final_norm": final_norms,
    "logits": logits,
}


# ---- what the difference looks like


def explain(case: Case, rounding: float) -> tuple[str, str]:
    """What the port does instead, and the evidence. `rounding`: HF's own rounding as a share of the difference."""
    is_finite = torch.isfinite(case.port[case.wrong])
    if not is_finite.all():
        share = 1 - is_finite.float().mean()
        meaning = "NaN or infinity: masked scores near finfo.min, an overflow, or slots that were never written"
        return meaning, f"{share:.0%} of the numbers are not finite"
    best = ""
    distance = 1.0
    alternatives = STEPS[case.kind](case) if case.kind in STEPS else ()
    for name, result in alternatives:
        other = case.distance(result)
        if other < distance:
            best = name
            distance = other
    # what is left is rounding, or small beside the difference
    if distance < min(0.5, max(2 * rounding, 0.1)):
        return best, f"computed so, the difference falls to {distance:.1%} of what it is"
    return pattern(case, rounding)


def pattern(case: Case, rounding: float) -> tuple[str, str]:
    """The same where no alternative fits."""
    limit = max(3 * rounding, 0.05)
    right = case.step[case.wrong]  # n ...
    wrong = case.port[case.wrong].to(case.step)
    difference = (wrong - right).norm()
    if not wrong.any():
        return "zeros: this part was not computed, not written, or its weights are padding", "all its numbers are 0"
    scale = float((right * wrong).sum() / right.pow(2).sum())
    if (wrong - scale * right).norm() < limit * difference:
        return f"a scale: the right values times {scale:.4g}", "the difference is proportional to the values"
    if case.kind == "embedding":
        ids = looked_up(case)
        if ids:
            return "other ids are looked up", ids
    if case.port.dim() == 3:
        moved = moved_heads(case, limit)
        if moved:
            return f"heads in another order: {moved}", "each of these heads has the numbers of another one of HF's"
    if case.kind == "heads":
        return pattern_of_attention(case, limit)
    if case.kind in ("q", "k"):
        length_error = (pair_lengths(right) - pair_lengths(wrong)).norm()
        if length_error < limit * difference:
            return pattern_of_rotation(case)
    if case.kind in ("q", "k", "v", "mlp", "final_norm"):
        scales = own_scales(right, wrong)
        if (wrong - scales * right).norm() < limit * difference:
            smallest = float(scales.min())
            largest = float(scales.max())
            evidence = f"each position is a multiple of HF's, {smallest:.4g} to {largest:.4g}"
            return "RMSNorm's statistics: another eps, or another mean of the squares", evidence
    if case.kind in ("attention", "mlp", "residual", "final_norm", "logits"):
        features = few_features(wrong - right)
        if features:
            return f"a few rows of the weight: output features {features}", "the others are right"
    meaning = "another weight or another revision of it (a stale shard, a wrong conversion, quantization)"
    if case.kind == "mlp":
        meaning += ", or another activation"
    if case.kind == "residual":
        meaning = "another sum"
    cosine = float(F.cosine_similarity(right.flatten(), wrong.flatten(), dim=0))
    return meaning, f"no known alternative fits; cosine with HF's step {cosine:.4f}"


def own_scales(right: Tensor, wrong: Tensor) -> Tensor:
    """The scale of each row that brings `right` [n,...,E] closest to `wrong`: [n,...,1]."""
    return (right * wrong).sum(-1, keepdim=True) / right.pow(2).sum(-1, keepdim=True)


def pair_lengths(x: Tensor) -> Tensor:
    """The lengths of the pairs that the rotary embedding turns: [n,D] -> [n,D/2]."""
    return x.unflatten(-1, (2, -1)).norm(dim=-2)


def few_features(difference: Tensor) -> str:
    """The output features that hold nearly all of a difference [n,E], if they are few."""
    energy = difference.flatten(1).pow(2).sum(0)
    order = energy.argsort(descending=True)
    cumulated = energy[order].cumsum(0)
    is_not_enough = cumulated < 0.99 * energy.sum()
    count = int(is_not_enough.sum()) + 1
    if count > len(energy) / 8:
        return ""
    numbers = sorted(order[:count].tolist())
    if count > 4:
        return f"{numbers[0]} to {numbers[-1]}, {count} in all"
    return ", ".join(map(str, numbers))


def moved_heads(case: Case, limit: float) -> str:
    """Heads of the port that are other heads of HF's."""
    found = []
    for place in range(case.port.shape[1]):
        rows = case.wrong[:, place]
        if not rows.any():
            continue
        mine = case.port[rows, place].to(case.step)  # n D
        differences = case.step[rows] - mine[:, None]  # n heads D
        distances = differences.norm(dim=(0, 2)) / mine.norm()  # heads
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
    right = case.step[case.wrong]  # n D
    wrong = case.port[case.wrong].to(case.step)
    scale = own_scales(right, wrong)
    if (wrong - scale * right).norm() < limit * (wrong - right).norm():
        where = "a decoding step" if decoded else "a position"
        share = 1 - float(scale.mean())
        return f"{where} sees empty slots too: they take {share:.0%} of the weight", "each head is a multiple of HF's"
    if decoded:
        meaning = "the cache: a decoding step sees slots that are not the text's (padding, stale or misplaced ones)"
        return meaning, "prefill is right and decoding wrong"
    if case.wrong[0].any():
        meaning = "what is written to the cache, or a mask: position 0 is wrong, and sees itself alone"
        return meaning, "no known one fits"
    return "another mask, clipped scores, or another softmax", "position 0 is right, and sees itself alone"


def as_complex(x: Tensor) -> Tensor:
    """The pairs that the rotary embedding turns, as complex numbers: [P,n,D] -> [P,n,D/2]."""
    real, imaginary = x.chunk(2, dim=-1)
    return torch.complex(real.contiguous(), imaginary.contiguous())


def pattern_of_rotation(case: Case) -> tuple[str, str]:
    """Which positions the rotary embedding took, or how its error grows."""
    right = as_complex(case.step)
    wrong = as_complex(case.port.to(case.step))
    relative = (wrong * right.conj()).sum(1)  # P D/2: by how much further each pair is turned
    P = len(relative)
    inv_freq = case.model.model.rotary_emb.inv_freq.to(case.step)
    shifts = torch.arange(-P, P + 1)
    turned_back = torch.polar(torch.ones(1), -(shifts[:, None] * inv_freq))  # shifts D/2
    fits = (relative[:, None] * turned_back).real.sum(-1)  # P shifts
    best = fits.max(-1)
    positions = torch.arange(P)
    taken = positions + shifts[best.indices]
    rows = case.wrong.any(1)
    perfect = relative[rows].abs().sum(-1)
    if (best.values[rows] > 0.99 * perfect).all():
        asked = positions[rows][:6].tolist()
        got = taken[rows][:6].tolist()
        return "the rotary embedding takes other positions", f"{got} ... where they are {asked} ..."
    errors = relative.angle().abs().mean(-1)  # P
    evidence = f"mean error of the angle {errors[1]:.3g} at position 1, {errors[-1]:.3g} at position {P - 1}"
    return "another rotation: the pairs have the right length and other angles", evidence

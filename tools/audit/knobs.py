"""What ports of Llama have been seen to compute in place of Hugging Face's steps, and the siblings of each.

A knob is another computation of one step of `tools.audit.chain`, or of a few that go together, from what arrives there.
The generators list the knobs of each kind of step. Some have a setting that no list can hold (a theta, a cap, a
window): `fitted` looks for it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from llama_neuron import compute_llama3_parameters, shard_heads
from tools.audit.chain import LINEAR, Step, attend, name_of_step, rms_norm, rotate
from tools.audit.rounding import NORM_INPUTS, columns_of_ranks, row_parallel

Compute = Callable[[Step], Tensor]


@dataclass(frozen=True)
class Knob:
    """What a port does instead, and the steps that come out differently: kind -> computation."""

    meaning: str
    steps: dict[str, Compute]


Knobs = Iterator[Knob]
FP8 = {"fp8 (e4m3)": torch.float8_e4m3fn, "fp8 (e5m2)": torch.float8_e5m2}
ROWS = ("q_proj", "k_proj", "v", "gate_proj", "up_proj", "logits")  # column-parallel: a rank has some of the outputs


def fitted(case: object, settings: list[float], make: Callable[[float], Knob]) -> Knobs:
    """The knob whose setting brings the port closest, from a list of settings and then between its neighbours."""

    def distance(setting: float) -> float:
        results = case.run(make(setting), case.layers)
        if case.name not in results:
            return math.inf
        found = case.distance(case.name, results[case.name], case.rows)
        return found if math.isfinite(found) else math.inf

    settings = sorted(settings)
    distances = [distance(setting) for setting in settings]
    best = min(range(len(settings)), key=distances.__getitem__)
    if distances[best] == math.inf:
        return
    low = settings[max(best - 1, 0)]
    high = settings[min(best + 1, len(settings) - 1)]
    found = settings[best]
    least = distances[best]
    for _ in range(60):
        if high < 1.0002 * low:
            break
        for setting in ((low * found) ** 0.5, (found * high) ** 0.5):
            other = distance(setting)
            if other < least:
                low, high = (low, found) if setting < found else (found, high)
                least = other
                found = setting
                break
        else:
            low = (low * found) ** 0.5
            high = (found * high) ** 0.5
    # a usual or a round number, if it is as good; what is left may be rounding alone
    slack = 2 if least < 2 else 1
    usual = min(settings, key=lambda setting: abs(math.log(setting / found)))
    candidates = [(float(f"{found:.{digits}e}"), tolerance) for digits, tolerance in enumerate((0.05, 0.02, 0.003))]
    if abs(math.log(usual / found)) < 0.1:
        candidates.insert(0, (usual, 0.05))
    for candidate, tolerance in candidates:
        if distance(candidate) <= (1 + slack * tolerance) * least:
            found = candidate
            break
    yield make(found)


def told(value: float) -> str:
    """A fitted setting in four digits."""
    return f"{float(f'{value:.4g}'):g}"


def closest(case: object, settings: list[int], make: Callable[[int], Knob], step: int) -> Knobs:
    """The knob whose whole-numbered setting brings the port closest: every `step`-th is tried, then those around the
    best two."""

    def distance(setting: int) -> float:
        results = case.run(make(setting), case.layers)
        if case.name not in results:
            return math.inf
        return case.distance(case.name, results[case.name], case.rows)

    if not settings:
        return
    coarse = sorted(settings[::step], key=distance)
    around = set()
    for setting in coarse[:2]:
        around.update(other for other in settings if abs(other - setting) < step)
    best = min(around | set(coarse[:1]), key=distance)
    yield make(best)


# ---- weights


def rounded_weights(weight: Tensor, audited: torch.dtype) -> Iterator[tuple[str, Tensor]]:
    """A weight [N,E] in fewer bits than `dtype` has."""
    largest = weight.abs().amax(-1, keepdim=True)
    for name, dtype in (("bfloat16", torch.bfloat16), ("float16", torch.float16)):
        if audited == torch.float32:
            yield name, weight.to(dtype).to(weight)
    for name, dtype in FP8.items():
        yield name, weight.to(dtype).to(weight)
        for words, size in (("by rows", largest), ("as a whole", largest.max())):
            scale = size / torch.finfo(dtype).max
            yield f"{name}, scaled {words}", (weight / scale).to(dtype).to(weight) * scale
    for bits, most in ((8, 127), (4, 7)):
        for words, scale in (("by rows", largest / most), ("as a whole", largest.max() / most)):
            yield f"int{bits}, scaled {words}", (weight / scale).round() * scale
        for size in (8, 16, 32, 64, 128):
            if weight.shape[1] % size == 0 and weight.shape[1] > size:
                groups = weight.unflatten(1, (-1, size))
                scale = groups.abs().amax(-1, keepdim=True) / most
                yield f"int{bits}, scaled by groups of {size}", ((groups / scale).round() * scale).flatten(1)


def arriving(at: Step, kind: str) -> Tensor:
    """What goes into the product of a step."""
    if kind in ("attention", "mlp"):
        return row_parallel(at, kind)[1]
    if kind == "logits":
        return at.arrived("final_norm")
    return at.get("input_layernorm" if kind in ("q_proj", "k_proj", "v") else "post_attention_layernorm")


def shaped(at: Step, kind: str, product: Tensor) -> Tensor:
    return at.heads_of(product) if kind in ("q_proj", "k_proj", "v") else product


def with_weight(kind: str, change: Callable[[Step, Tensor], Tensor]) -> dict[str, Compute]:
    """A step whose weight is another one."""

    def compute(at: Step) -> Tensor:
        weight = change(at, at.weight(LINEAR[kind]))
        return shaped(at, kind, F.linear(arriving(at, kind), weight, at.bias(LINEAR[kind])))

    return {kind: compute}


def with_bias(kind: str, times: float) -> dict[str, Compute]:
    def compute(at: Step) -> Tensor:
        product = F.linear(arriving(at, kind), at.weight(LINEAR[kind]))
        return shaped(at, kind, product + times * at.bias(LINEAR[kind]))

    return {kind: compute}


def weights(case: object, kind: str) -> Knobs:
    """The weight and the bias of a linear layer in other ways."""
    path = LINEAR[kind]
    chain = case.chain
    prefix = "" if kind == "logits" else f"model.layers.{case.number or 0}."
    stored = chain.weights.parameters[f"{prefix}{path}.weight"]
    names = [name for name, _ in rounded_weights(torch.ones(1, stored.shape[1]), case.text.dtype)]
    for index, name in enumerate(names):

        def rounded(at: Step, weight: Tensor, index: int = index) -> Tensor:
            in_audited_dtype = weight.to(case.text.dtype).to(weight)
            return list(rounded_weights(in_audited_dtype, case.text.dtype))[index][1]

        yield Knob(f"the weight of {path} is rounded to {name}", with_weight(kind, rounded))
    if stored.shape[0] == stored.shape[1]:
        yield Knob(f"the weight of {path} is transposed", with_weight(kind, lambda at, weight: weight.T))
    if f"{prefix}{path}.bias" in chain.weights.parameters:
        yield Knob(f"the bias of {path} is left out", with_bias(kind, 0))
        for times in sorted({2, case.tp} - {1}):
            yield Knob(f"the bias of {path} is added {times} times (once per rank?)", with_bias(kind, times))
            yield Knob(f"the bias of {path} is divided by {times}", with_bias(kind, 1 / times))
    if kind == "logits" or len(case.layers) != 1:
        return
    for number in range(chain.layers):
        if number != case.number:
            other = with_weight(kind, lambda at, weight, number=number: at.weight(path, number))
            yield Knob(f"the weight of {path} is that of layer {number}", other)


def low_precision(case: object) -> Knobs:
    """Products whose inputs are in fewer bits: auto-cast. All of the chain's at once, attention's included."""
    if case.text.dtype != torch.float32:
        return
    ways = {
        "bfloat16": lambda x: x.to(torch.bfloat16).to(x),
        "tf32 (10 bits of mantissa)": tf32,
        "fp8 (e4m3)": lambda x: x.to(torch.float8_e4m3fn).to(x),
        "fp8 (e5m2)": lambda x: x.to(torch.float8_e5m2).to(x),
    }
    for name, narrow in ways.items():
        for words, kinds in (("products", [*LINEAR, "heads"]), ("products with weights", [*LINEAR])):
            for sides, verb in (
                ("in", "take their inputs"),
                ("in and out", "take and give"),
                ("out", "give their results"),
            ):
                steps = {kind: partial(narrow_product, kind=kind, narrow=narrow, sides=sides) for kind in kinds}
                yield Knob(f"{words} {verb} in {name} (auto-cast)", steps)


def tf32(x: Tensor) -> Tensor:
    """10 bits of mantissa, to nearest even."""
    mantissa, exponent = torch.frexp(x)
    return torch.ldexp((mantissa * 2**11).round() / 2**11, exponent)


def narrow_product(at: Step, kind: str, narrow: Callable[[Tensor], Tensor], sides: str) -> Tensor:
    """A product whose inputs or results (`sides`) are in fewer bits; of attention both products."""

    def taken(x: Tensor) -> Tensor:
        return narrow(x) if "in" in sides else x

    def given(x: Tensor) -> Tensor:
        return narrow(x) if "out" in sides else x

    if kind == "heads":

        def softmax(scores: Tensor) -> Tensor:
            return taken(given(scores).softmax(-1))

        y = attend(taken(at.get("q")), taken(at.get("k")), taken(at.get("v")), at.chain.scaling, weights=softmax)
        return given(y)
    product = F.linear(taken(arriving(at, kind)), taken(at.weight(LINEAR[kind])))
    bias = at.bias(LINEAR[kind])
    return given(shaped(at, kind, product if bias is None else product + bias))


# ---- the embedding


def embeddings(case: object) -> Knobs:
    hidden_size = case.chain.config.hidden_size
    vocab_size = case.chain.config.vocab_size
    tp = case.tp
    yield Knob(
        "the embedding is scaled by the root of the hidden size (as Gemma does)",
        {"embedding": lambda at: at.embedding() * hidden_size**0.5},
    )
    for shift in range(1, min(len(case.text.ids) - 1, 65)):
        before = partial(embed_shifted, shift=shift)
        name = f"the ids are moved by {shift} to the right: padded on the left"
        if not case.rows[: case.prompt].any():
            name = "decoding is fed the token before" + (f", {shift} steps back" if shift > 1 else "")
        yield Knob(name, {"embedding": before})
        after = partial(embed_shifted, shift=-shift)
        yield Knob(f"the ids are moved by {shift} to the left", {"embedding": after})
    for other in case.others:
        row = partial(embed_row, case=case, other=other)
        yield Knob("the ids are those of another row of the batch", {"embedding": row})
    table = case.chain.weights.parameters["model.embed_tokens.weight"]
    names = [name for name, _ in rounded_weights(torch.ones(1, hidden_size), case.text.dtype)]
    for index, name in enumerate(names):

        def rounded(at: Step, index: int = index) -> Tensor:
            ids, places = at.arrived("ids").unique(return_inverse=True)
            rows = table.detach()[ids].to(case.text.dtype).to(at.chain.dtype)
            return list(rounded_weights(rows, case.text.dtype))[index][1][places]

        yield Knob(f"the weight of embed_tokens is rounded to {name}", {"embedding": rounded})
    if not case.chain.config.tie_word_embeddings:
        lm_head = {"embedding": lambda at: at.weight("lm_head")[at.arrived("ids")]}
        yield Knob("lm_head is taken for the embedding, though config.json does not tie them", lm_head)
    share = -(-hidden_size // tp)
    for shift in range(1, tp):
        moved = {"embedding": lambda at, shift=shift: at.embedding().roll(shift * share, dims=-1)}
        yield Knob(f"the ranks' slices of the hidden size are off by {shift}", moved)
    rows = -(-vocab_size // tp)
    if tp > 1:
        same_part = {"embedding": lambda at: sum_of_rank_0s_rows(at, rows, tp)}
        yield Knob("all ranks look up rank 0's part of the vocabulary", same_part)
    for rank in range(tp if tp > 1 else 0):
        no_rows = {"embedding": lambda at, rank=rank: without_rows(at, rank * rows, (rank + 1) * rows)}
        yield Knob(f"rank {rank}'s part of the vocabulary is zeros, or missing in the sum", no_rows)
        no_slice = {"embedding": lambda at, rank=rank: without_columns(at, rank * share, (rank + 1) * share)}
        yield Knob(f"rank {rank}'s slice of the hidden size is zeros", no_slice)


def embed_shifted(at: Step, shift: int) -> Tensor:
    ids = at.arrived("ids")
    x = at.embedding()
    moved = x.roll(shift, dims=0)
    padding = slice(0, shift) if shift > 0 else slice(shift, None)
    moved[padding] = at.chain.model.model.embed_tokens.weight.detach()[torch.zeros_like(ids[padding])].to(x)
    return moved


def embed_row(at: Step, case: object, other: object) -> Tensor:
    return beside(case, at.embedding(), Step(at.chain, None, other.flow.arrived).embedding(), other)


def beside(case: object, own: Tensor, its: Tensor, other: object) -> Tensor:
    """Another row's values: its prompt beside this one's, its decoding steps beside this one's. Where the other row has
    none they are NaN."""
    result = torch.full_like(own, torch.nan)
    length = min(case.prompt, other.prompt)
    result[:length] = its[:length]
    new = min(len(own) - case.prompt, len(its) - other.prompt)
    result[case.prompt : case.prompt + new] = its[other.prompt : other.prompt + new]
    return result


def sum_of_rank_0s_rows(at: Step, rows: int, tp: int) -> Tensor:
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
    return at.embedding().masked_fill(((ids >= start) & (ids < stop))[:, None], 0.0)


def without_columns(at: Step, start: int, stop: int) -> Tensor:
    x = at.embedding()
    x[:, start:stop] = 0
    return x


# ---- norms


def norms(case: object, kind: str) -> Knobs:
    """RMSNorm in other ways."""
    path = "norm" if kind == "final_norm" else kind
    own_eps = case.chain.eps

    def source(at: Step) -> Tensor:
        if kind == "final_norm":
            return at.arrived(f"hidden_states.{at.chain.layers}")
        return at.get(NORM_INPUTS[kind])

    def knob(meaning: str, compute: Callable[[Step, Tensor, Tensor], Tensor]) -> Knob:
        return Knob(meaning, {kind: lambda at: compute(at, source(at), at.weight(path))})

    yield knob("RMSNorm is left out", lambda at, x, weight: x)
    yield knob("RMSNorm without its weight", lambda at, x, weight: rms_norm(x, 1.0, own_eps))
    yield knob("RMSNorm scales by 1 + weight (as Gemma does)", lambda at, x, weight: rms_norm(x, 1 + weight, own_eps))

    def layer_norm(at: Step, x: Tensor, weight: Tensor) -> Tensor:
        return rms_norm(x - x.mean(-1, keepdim=True), weight, own_eps)

    yield knob("LayerNorm: the mean is subtracted", layer_norm)

    def with_eps(eps: float) -> Knob:
        meaning = f"another eps in RMSNorm: {told(eps)}, config.json says {own_eps:g}"
        return knob(meaning, lambda at, x, weight: rms_norm(x, weight, eps))

    yield with_eps(0.0)
    yield from fitted(case, [10 ** (power / 2) for power in range(-20, 3)], with_eps)
    others = {"the final norm": "norm.weight"} if kind != "final_norm" else {}
    for number in range(case.chain.layers):
        for other in NORM_INPUTS:
            if (number, other) != (case.number, kind):
                others[f"{other} of layer {number}"] = f"layers.{number}.{other}.weight"
    if len(case.layers) <= 1:
        for name, other in others.items():

            def with_other(at: Step, x: Tensor, weight: Tensor, other: str = other) -> Tensor:
                return rms_norm(x, at.chain.weights.get(f"model.{other}", keep=False), own_eps)

            yield knob(f"the weight of {name} in RMSNorm", with_other)
    if kind == "final_norm":
        for number in range(case.chain.layers):

            def of_layer(at: Step, x: Tensor, weight: Tensor, number: int = number) -> Tensor:
                return rms_norm(at.arrived(f"hidden_states.{number}"), weight, own_eps)

            yield knob(f"the final norm gets hidden_states.{number}: the layers after it are dropped", of_layer)


# ---- the layer's input, and its sums


def streams(case: object) -> Knobs:
    for number in range(case.chain.layers):
        if len(case.layers) == 1 and number != case.number:
            other = {"stream": lambda at, number=number: at.arrived(f"hidden_states.{number}")}
            yield Knob(f"the layer gets what layer {number} gets: a layer is skipped or repeated", other)
            yield whole_layer(number)
    yield from stream_of_a_rank(case)
    hidden_size = case.chain.config.hidden_size
    scaled = {"stream": lambda at: at.stream() * hidden_size**0.5}
    yield Knob("the layer gets a residual stream that is scaled by the root of the hidden size", scaled)


def whole_layer(number: int) -> Knob:
    """All weights of another layer."""

    def as_layer(at: Step, kind: str) -> Tensor:
        def arrived(name: str) -> Tensor:
            return at.arrived(name.replace(f"layers.{number}.", f"layers.{at.number}."))

        return getattr(Step(at.chain, number, arrived), kind)()

    kinds = (
        "input_layernorm",
        "q_proj",
        "k_proj",
        "v",
        "attention",
        "post_attention_layernorm",
        "gate_proj",
        "up_proj",
        "mlp",
    )
    steps = {kind: partial(as_layer, kind=kind) for kind in kinds}
    return Knob(f"norms and weights are those of layer {number}: layers are in another order", steps)


def middles(case: object) -> Knobs:
    """What is added to attention's output."""
    root = case.chain.config.hidden_size**0.5
    sums: dict[str, Compute] = {
        "the layer's input alone, attention is not added": lambda at: at.get("stream"),
        "attention's output alone": lambda at: at.get("attention"),
        "attention's output added twice": lambda at: at.get("stream") + 2 * at.get("attention"),
        "a residual stream that is scaled by the root of the hidden size (as Gemma does)": (
            lambda at: root * at.get("stream") + at.get("attention")
        ),
    }
    for name, compute in sums.items():
        yield Knob(f"the MLP gets {name}", {"middle": compute})
        norm = {"post_attention_layernorm": partial(norm_of, compute=compute)}
        yield Knob(f"the MLP gets {name}; the residual does not", norm)

    def scaled(value: float) -> Knob:
        steps = {"middle": lambda at: at.get("stream") + value * at.get("attention")}
        return Knob(f"attention's output is scaled by {told(value)} before it is added", steps)

    def both_scaled(value: float) -> Knob:
        steps = {
            "middle": lambda at: at.get("stream") + value * at.get("attention"),
            "residual": lambda at: at.get("middle") + value * at.get("mlp"),
        }
        return Knob(f"the outputs of attention and of the MLP are scaled by {told(value)} (as Granite does)", steps)

    scales = [0.1, 0.25, 0.5, 0.7, 0.9, 1.1, 1.4, 2.0, 4.0, 10.0]
    yield from fitted(case, scales, scaled)
    yield from fitted(case, scales, both_scaled)
    normed = {"middle": lambda at: at.get("input_layernorm") + at.get("attention")}
    yield Knob("the residual is taken after input_layernorm", normed)
    parallel = {"post_attention_layernorm": lambda at: at.get("input_layernorm")}
    yield Knob("the MLP runs beside attention, from the same norm (as GPT-J does)", parallel)


def norm_of(at: Step, compute: Compute) -> Tensor:
    return rms_norm(compute(at), at.weight("post_attention_layernorm"), at.chain.eps)


def residuals(case: object) -> Knobs:
    """The layer's output."""
    sums: dict[str, Compute] = {
        "the residual around attention is left out": lambda at: at.get("attention") + at.get("mlp"),
        "the residual around the MLP is left out": lambda at: at.get("mlp"),
        "attention's output is not added": lambda at: at.get("stream") + at.get("mlp"),
        "the MLP's output is not added": lambda at: at.get("middle"),
        "attention's output is added twice": lambda at: at.residual() + at.get("attention"),
        "the MLP's output is added twice": lambda at: at.residual() + at.get("mlp"),
        "the residual is taken after post_attention_layernorm": (
            lambda at: at.get("post_attention_layernorm") + at.get("mlp")
        ),
        "the residual is taken after input_layernorm": (
            lambda at: at.get("input_layernorm") + at.get("attention") + at.get("mlp")
        ),
        "the layer is skipped: its output is its input": lambda at: at.get("stream"),
    }
    for name, compute in sums.items():
        yield Knob(name, {"residual": compute})
    for other in case.others:

        def of_row(at: Step, other: object = other) -> Tensor:
            its = Step(at.chain, at.number, other.flow.arrived).residual()
            return beside(case, at.residual(), its, other)

        yield Knob("the layer's output is that of another row of the batch", {"residual": of_row})


# ---- q, k and v


def projections(case: object, kind: str) -> Knobs:
    yield from weights(case, kind)
    letter = kind.removesuffix("_proj")
    own = case.chain.weights.parameters[f"model.layers.0.{LINEAR[kind]}.weight"]
    for other in ("q", "k", "v"):
        path = f"self_attn.{other}_proj"
        its = case.chain.weights.parameters[f"model.layers.0.{path}.weight"]
        if other != letter and its.shape == own.shape:
            swapped = {kind: lambda at, path=path: at.heads_of(at.linear(path, at.get("input_layernorm")))}
            yield Knob(f"{letter} holds {other}: the parts of Wqkv are swapped", swapped)
    if kind == "v":
        turned = {"v": lambda at: rotate(at.v(), at.angles(), at.chain.attention_scaling)}
        yield Knob("v is rotated, as q and k are", turned)


def query_and_key(case: object) -> Knobs:
    """q_proj and k_proj together."""
    D = case.chain.head_dim

    def rows(change: Callable[[Tensor], Tensor]) -> dict[str, Compute]:
        def changed(at: Step, weight: Tensor) -> Tensor:
            return change(weight.unflatten(0, (-1, D))).flatten(0, 1)

        return changing(case, {**with_weight("q_proj", changed), **with_weight("k_proj", changed)})

    def to_meta(weight: Tensor) -> Tensor:  # n D E
        return weight.unflatten(1, (2, D // 2)).transpose(1, 2).flatten(1, 2)

    def from_meta(weight: Tensor) -> Tensor:
        return weight.unflatten(1, (D // 2, 2)).transpose(1, 2).flatten(1, 2)

    yield Knob("the rows of q_proj and k_proj are in the layout of Meta's checkpoints", rows(to_meta))
    yield Knob("the rows of q_proj and k_proj are converted from Meta's layout twice", rows(from_meta))

    def normed(at: Step, kind: str) -> Tensor:
        return rms_norm(getattr(at, kind)(), 1.0, at.chain.eps)

    both = {kind: partial(normed, kind=kind) for kind in ("q_proj", "k_proj")}
    yield Knob("q and k are normed by heads (as Qwen3 does)", changing(case, both))
    if case.tp > 1:
        yield from fused_rows(case)


def changing(case: object, steps: dict[str, Compute]) -> dict[str, Compute]:
    """Those of some steps that come out differently: what was captured and is right has not been changed."""
    kept = {}
    for kind, compute in steps.items():
        after = {"q_proj": "q", "k_proj": "k"}.get(kind, kind)
        names = [name_of_step(case.number, name) for name in (kind, after) if case.number is not None]
        right = False
        for name in names:
            if name != case.name and name in case.text.subject:
                right = case.distance(name, case.text.step[name]) < 3
        if not right:
            kept[kind] = compute
    return kept


def fused_rows(case: object) -> Knobs:
    """Wqkv as ranks may cut it or read it."""

    def whole(at: Step) -> tuple[list[Tensor], list[int]]:
        parts = [at.weight(LINEAR[kind]) for kind in ("q_proj", "k_proj", "v")]
        return parts, [len(part) for part in parts]

    def read(at: Step, kind: str, order: Callable[[list[Tensor], int], Tensor]) -> Tensor:
        parts, sizes = whole(at)
        rows = order(parts, case.tp)
        share = len(rows) // case.tp
        found = []
        for rank in range(case.tp):
            own = rows[rank * share : (rank + 1) * share]
            pieces = own.split([size // case.tp for size in sizes])
            found.append(pieces[("q_proj", "k_proj", "v").index(kind)])
        return at.heads_of(F.linear(at.get("input_layernorm"), torch.cat(found)))

    def cut(parts: list[Tensor], tp: int) -> Tensor:
        return torch.cat(parts)

    def by_groups(parts: list[Tensor], tp: int) -> Tensor:
        groups = case.chain.config.num_key_value_heads
        cut_by_group = [part.unflatten(0, (groups, -1)) for part in parts]
        return torch.cat(cut_by_group, dim=1).flatten(0, 1)

    sizes = [case.chain.config.num_attention_heads, case.chain.config.num_key_value_heads]
    if any(size % case.tp for size in sizes) or case.chain.config.attention_bias:
        return
    ways = {
        "the rows of Wqkv are cut across ranks before they are put together by rank": cut,
        "Wqkv is written by groups of heads (q .. q k v) and read as q, k, v": by_groups,
    }
    for name, order in ways.items():
        yield Knob(name, {kind: partial(read, kind=kind, order=order) for kind in ("q_proj", "k_proj", "v")})


# ---- the rotary embedding


def rope_of(config: object) -> dict:
    rope = getattr(config, "rope_parameters", None)  # transformers 5
    if not rope:
        rope = getattr(config, "rope_scaling", None) or {}  # transformers 4
    theta = getattr(config, "rope_theta", None) or rope["rope_theta"]
    return {"rope_type": "default", **rope, "rope_theta": theta}


def rotations(case: object) -> Knobs:
    """q and k turned in other ways."""

    def both(turn: Callable[[Step, Tensor], Tensor]) -> dict[str, Compute]:
        steps = {
            "q": lambda at: turn(at, at.get("q_proj")),
            "k": lambda at: turn(at, at.get("k_proj")),
        }
        return changing(case, steps)

    def turned(change: Callable[[Step], Tensor], scaling: float | None = None) -> dict[str, Compute]:
        def turn(at: Step, x: Tensor) -> Tensor:
            return rotate(x, change(at), at.chain.attention_scaling if scaling is None else scaling)

        return both(turn)

    chain = case.chain
    own_scaling = chain.attention_scaling
    D = chain.head_dim
    yield Knob("the rotary embedding is left out", both(lambda at, x: x))
    yield Knob("the rotary embedding turns the other way", turned(lambda at: -at.angles()))

    def neighbours(at: Step, x: Tensor) -> Tensor:
        halves = x.unflatten(-1, (-1, 2)).transpose(-1, -2).flatten(-2)
        return rotate(halves, at.angles(), own_scaling).unflatten(-1, (2, -1)).transpose(-1, -2).flatten(-2)

    def mixed(at: Step, x: Tensor) -> Tensor:
        angles = torch.cat((at.angles(), at.angles()), dim=-1)[:, None]  # P 1 D
        half = torch.stack((-x[..., 1::2], x[..., ::2]), dim=-1).flatten(-2)
        return (x * angles.cos() + half * angles.sin()) * own_scaling

    def cos_for_sin(at: Step, x: Tensor) -> Tensor:
        return rotate(x, math.pi / 2 - at.angles(), own_scaling)

    yield Knob("the rotary embedding turns neighbours, not halves", both(neighbours))
    yield Knob("rotate_half takes neighbours, cos and sin are for halves", both(mixed))
    yield Knob("cos and sin are swapped", both(cos_for_sin))
    for share in (4, 2):
        part = D // share

        def partly(at: Step, x: Tensor, part: int = part) -> Tensor:
            exponent = torch.arange(0, part, 2, dtype=x.dtype) / part
            inv_freq = 1 / rope_of(chain.config)["rope_theta"] ** exponent
            return torch.cat((rotate(x[..., :part], at.positions() * inv_freq, own_scaling), x[..., part:]), dim=-1)

        def own_frequencies(at: Step, x: Tensor, part: int = part) -> Tensor:
            angles = at.angles()[:, : part // 2]
            return torch.cat((rotate(x[..., :part], angles, own_scaling), x[..., part:]), dim=-1)

        def fewer_pairs(at: Step, part: int = part) -> Tensor:
            angles = at.angles()
            angles[:, part // 2 :] = 0
            return angles

        yield Knob(f"only the first {part // 2} of {D // 2} pairs are rotated", turned(fewer_pairs))
        if part % 2 == 0:
            yield Knob(f"only the first {part} of {D} dimensions are rotated", both(partly))
            yield Knob(f"only the first {part} of {D} dimensions are rotated, HF's frequencies", both(own_frequencies))
    if own_scaling != 1:
        yield Knob("the attention scaling of the rotary embedding is left out", turned(lambda at: at.angles(), 1.0))
    for name, inv_freq, scaling in frequencies(case):

        def other(at: Step, inv_freq: Tensor = inv_freq) -> Tensor:
            return at.positions() * inv_freq

        yield Knob(name, turned(other, scaling))
    theta = rope_of(chain.config)["rope_theta"]

    def with_theta(value: float) -> Knob:
        return Knob(
            f"another theta in the rotary embedding: {told(value)}, config.json says {theta:g}",
            turned(lambda at: at.positions() * scaled_frequencies(case, value)),
        )

    rope = rope_of(chain.config)

    def slowed(value: float) -> Knob:
        name = f"the rotary embedding is slowed down by {told(value)} everywhere"
        if rope["rope_type"] == "linear":
            factor = rope["factor"]
            name = f"another factor of linear rope scaling: {told(value * factor)}, config.json says {factor:g}"
        return Knob(name, turned(lambda at: at.angles() / value))

    twice = Knob("the rotary embedding is applied twice", turned(lambda at: 2 * at.angles(), own_scaling**2))

    def with_factor(value: float) -> Knob:
        name = f"another factor of llama3's rope scaling: {told(value)}, config.json says {rope['factor']:g}"
        return Knob(name, turned(lambda at: at.positions() * scaled_frequencies(case, theta, factor=value)))

    yield from fitted(case, [10 ** (3 + power / 16) for power in range(100)], with_theta)
    if rope["rope_type"] != "linear":
        yield twice
    yield from fitted(case, [1.04**power for power in range(-60, 91) if power], slowed)
    if rope["rope_type"] == "llama3":
        yield from fitted(case, [1.5, 2.0, 4.0, 8.0, 16.0, 32.0, 64.0], with_factor)
    for dtype in (torch.bfloat16, torch.float16):
        name = str(dtype).removeprefix("torch.")
        ways: dict[str, Callable[[Step], Tensor]] = {
            f"inv_freq of the rotary embedding in {name}": (
                lambda at, dtype=dtype: at.positions() * chain.inv_freq.to(dtype).to(chain.dtype)
            ),
            f"positions of the rotary embedding in {name}": (
                lambda at, dtype=dtype: at.positions().to(dtype).to(chain.dtype) * chain.inv_freq
            ),
            f"the angles of the rotary embedding in {name}": (
                lambda at, dtype=dtype: at.angles().to(dtype).to(chain.dtype)
            ),
            f"positions and frequencies of the rotary embedding in {name}": (
                lambda at, dtype=dtype: (at.positions().to(dtype) * chain.inv_freq.to(dtype)).to(chain.dtype)
            ),
        }
        for meaning, angles in ways.items():
            yield Knob(meaning, turned(angles))
    for shift in sorted(range(-64, 65), key=abs)[1:]:
        moved = turned(lambda at, shift=shift: (at.positions() + shift) * chain.inv_freq)
        yield Knob(f"the rotary embedding is at positions that are off by {shift:+d}", moved)
    P = len(case.rows)
    first = int(case.rows.nonzero()[0])
    for size in sorted({first, *(2**power for power in range(3, 17) if 2**power < P)} - {0}):
        wrapped = turned(lambda at, size=size: (at.positions() % size) * chain.inv_freq)
        yield Knob(f"positions of the rotary embedding start again at {size}", wrapped)
        held = turned(lambda at, size=size: at.positions().clamp(max=size - 1) * chain.inv_freq)
        yield Knob(f"positions of the rotary embedding stop at {size - 1}", held)
    for position in sorted({0, case.prompt - 1, case.prompt}):
        constant = turned(lambda at, position=position: position * chain.inv_freq.expand(P, -1))
        yield Knob(f"all positions of the rotary embedding are {position}", constant)


def scaled_frequencies(case: object, theta: float, **changed: float) -> Tensor:
    """inv_freq [D/2] with another theta, and config.json's llama3 or linear scaling."""
    rope = {**rope_of(case.chain.config), **changed}
    D = case.chain.head_dim
    inv_freq = 1 / theta ** (torch.arange(0, D, 2, dtype=case.chain.dtype) / D)
    if rope["rope_type"] == "llama3":
        return compute_llama3_parameters(inv_freq, rope)
    return inv_freq / rope["factor"] if rope["rope_type"] == "linear" else inv_freq


def frequencies(case: object) -> Iterator[tuple[str, Tensor, float | None]]:
    """Other rotary frequencies [D/2], and the scaling of cos and sin; None: HF's."""
    chain = case.chain
    rope = rope_of(chain.config)
    kind = rope["rope_type"]
    theta = rope["rope_theta"]
    D = chain.head_dim
    unscaled = 1 / theta ** (torch.arange(0, D, 2, dtype=chain.dtype) / D)
    if kind == "default":
        return
    yield "the rope scaling of config.json is left out", unscaled, 1.0
    if chain.attention_scaling != 1:
        yield "the rope scaling of config.json is left out, its attention factor is not", unscaled, None
    if kind in ("yarn", "dynamic", "longrope", "llama3"):
        factor = rope.get("factor") or 1.0
        yield f"rope_type {kind} is read as linear, by {factor:g}", unscaled / factor, 1.0
        yield f"rope_type {kind} is read as linear, by {factor:g}, with its attention factor", unscaled / factor, None
    if kind != "llama3":
        return
    low = rope["low_freq_factor"]
    high = rope["high_freq_factor"]
    original = rope["original_max_position_embeddings"]

    def changed(name: str, **values: float) -> tuple[str, Tensor, None]:
        told = ", ".join(f"{key} {value:g} for {rope[key]:g}" for key, value in values.items())
        return f"{name} of llama3's rope scaling: {told}", compute_llama3_parameters(unscaled, {**rope, **values}), None

    for value in (0.5, 2.0, 4.0, 8.0):
        if value not in (low, high):
            yield changed("another band", low_freq_factor=value)
            yield changed("another band", high_freq_factor=value)
    yield changed("the bands", low_freq_factor=high, high_freq_factor=low)
    for power in range(4, 14):
        if 2**power != original:
            yield changed("another length", original_max_position_embeddings=2**power)
    longest = chain.config.max_position_embeddings
    if longest != original:
        yield changed("another length", original_max_position_embeddings=longest)


# ---- attention


def attentions(case: object) -> Knobs:
    yield from head_orders(case)
    yield from masks(case)
    yield from caches(case)
    yield from slots(case)
    yield from softmaxes(case)
    own = case.chain.scaling

    def scaled(value: float) -> Knob:
        compute = {"heads": lambda at: attend(at.get("q"), at.get("k"), at.get("v"), value)}
        return Knob(f"scores are scaled by {told(value)}, in HF by {own:.4g}", compute)

    yield from fitted(case, [own * 2.0**power for power in range(-6, 7) if power], scaled)
    swapped = {"heads": lambda at: attend(at.get("q"), at.get("v"), at.get("k"), at.chain.scaling)}
    yield Knob("keys and values are swapped", swapped)


def attended(change: Callable[[Step, Tensor, Tensor, Tensor], Tensor]) -> dict[str, Compute]:
    return {"heads": lambda at: change(at, at.get("q"), at.get("k"), at.get("v"))}


def softmaxes(case: object) -> Knobs:
    def capped(value: float) -> Knob:
        def compute(at: Step, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            return attend(q, k, v, at.chain.scaling, scores=lambda scores: value * torch.tanh(scores / value))

        return Knob(f"scores are capped at {told(value)} by tanh (as Gemma 2 does)", attended(compute))

    def clipped(value: float) -> Knob:
        def compute(at: Step, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            return attend(q, k, v, at.chain.scaling, scores=lambda scores: scores.clamp(-value, value))

        return Knob(f"scores are clipped at {told(value)}", attended(compute))

    caps = [1.0, 2.0, 4.0, 8.0, 15.0, 30.0, 50.0, 100.0]
    yield from fitted(case, caps, capped)
    yield from fitted(case, caps, clipped)


def head_orders(case: object) -> Knobs:
    """Query heads that attend to other KV heads."""
    num_heads = case.chain.config.num_attention_heads
    num_kv_heads = case.chain.config.num_key_value_heads
    group = num_heads // num_kv_heads
    ranks = shard_heads(num_heads, num_kv_heads, case.tp)
    orders = {"every query head attends to the first KV head": [0] * num_heads}
    if group > 1:
        orders["KV heads are tiled (0 1 0 1), HF repeats them (0 0 1 1)"] = list(range(num_kv_heads)) * group
        orders["KV heads are tiled on each rank, HF repeats them"] = tiled_on_ranks(ranks, num_heads)
    for shift in range(1, num_kv_heads):
        moved = [(head // group - shift) % num_kv_heads for head in range(num_heads)]
        orders[f"query heads attend to KV heads that are off by {shift}"] = moved
    for shift in range(1, case.tp):
        moved = on_other_ranks(ranks, num_heads, shift)
        if moved:
            orders[f"KV heads are on ranks that are off by {shift}"] = moved
    if case.tp > num_kv_heads and case.tp % num_kv_heads == 0:
        wrapped = [0] * num_heads
        for rank, (query_heads, _) in enumerate(ranks):
            for head in query_heads:
                if head is not None:
                    wrapped[head] = rank % num_kv_heads
        orders["KV heads are copied to ranks in turn (0 1 0 1), NxD repeats them (0 0 1 1)"] = wrapped
    seen = {tuple(head // group for head in range(num_heads))}
    for name, order in orders.items():
        if tuple(order) not in seen:
            seen.add(tuple(order))

            def compute(at: Step, q: Tensor, k: Tensor, v: Tensor, order: list[int] = order) -> Tensor:
                return attend(q, k[:, order], v[:, order], at.chain.scaling)

            yield Knob(name, attended(compute))
    yield from found_orders(case, group)


def tiled_on_ranks(ranks: list, num_heads: int) -> list[int]:
    order = [0] * num_heads
    for query_heads, kv_heads in ranks:
        for place, head in enumerate(query_heads):
            kv_head = kv_heads[place % len(kv_heads)]
            if head is not None and kv_head is not None:
                order[head] = kv_head
    return order


def on_other_ranks(ranks: list, num_heads: int, shift: int) -> list[int] | None:
    """The KV head of each query head if ranks had each other's KV heads."""
    order = [0] * num_heads
    for rank, (query_heads, _) in enumerate(ranks):
        its = ranks[(rank + shift) % len(ranks)][1]
        for place, head in enumerate(query_heads):
            if head is None:
                continue
            kv_head = its[place * len(its) // len(query_heads)]
            if kv_head is None:
                return None
            order[head] = kv_head
    return order


def found_orders(case: object, group: int) -> Knobs:
    """Each wrong query head attends to the KV head, or the zeros, whose output is nearest to the port's."""
    if case.kind != "heads":
        return
    q, k, v = (case.text.flow.arrived(source) for source in case.chain.inputs[case.name])
    num_kv_heads = k.shape[1]
    outputs = [
        attend(q, k[:, [head] * q.shape[1]], v[:, [head] * q.shape[1]], case.chain.scaling)
        for head in range(num_kv_heads)
    ]
    order: list[int | None] = []
    for head in range(q.shape[1]):
        rows = case.wrong[:, head]
        mine = case.port[rows, head].to(q)
        if not rows.any():
            order.append(head // group)
        elif not mine.any():
            order.append(None)
        else:
            distances = [float((output[rows, head] - mine).norm()) for output in outputs]
            order.append(distances.index(min(distances)))

    def compute(at: Step) -> Tensor:
        result = torch.zeros_like(case.step)
        for head, kv_head in enumerate(order):
            if kv_head is not None:
                result[:, head] = outputs[kv_head][:, head]
        return result

    changed = [head for head, kv_head in enumerate(order) if kv_head != head // group]
    told = [f"{head} meets {'zeros' if order[head] is None else order[head]}" for head in changed]
    if changed:
        yield Knob(f"query heads attend to other KV heads: {', '.join(told)}", {"heads": compute})


def masks(case: object) -> Knobs:
    """Other masks: who sees whom."""
    P = len(case.rows)
    everything = torch.ones(P, P, dtype=torch.bool)
    causal = everything.tril()
    at_position = torch.arange(P)
    in_prompt = at_position < case.prompt

    def knob(name: str, mask: Tensor) -> Knob:
        return Knob(name, attended(lambda at, q, k, v: attend(q, k, v, at.chain.scaling, mask)))

    yield knob("no mask: every position sees the whole text", everything)
    both_in_prompt = in_prompt[:, None] & in_prompt
    yield knob("no mask in prefill: every position sees the whole prompt", causal | both_in_prompt)
    yield knob("the mask is off by one: a position sees the next one", everything.tril(1))
    next_of_prompt = causal | (everything.tril(1) & both_in_prompt)
    yield knob("the mask is off by one in prefill: a position sees the next one", next_of_prompt)
    does_not_see_itself = everything.tril(-1)
    does_not_see_itself[0, 0] = True
    yield knob("the mask is off by one: a position does not see itself", does_not_see_itself)

    def window(size: int) -> Knob:
        return knob(f"a window: a position sees the last {size} only", causal.triu(1 - size))

    def chunks(size: int) -> Knob:
        same = at_position[:, None] // size == at_position // size
        return knob(f"attention in chunks of {size}: a position sees its own only", causal & same)

    sizes = list(range(1, P))
    yield from closest(case, sizes, window, max(1, P // 32))
    yield from closest(case, [size for size in (8, 16, 32, 64, 128, 256, 512, 1024) if size < P], chunks, 1)
    sinks = [(first, size) for first in (1, 4) for size in (8, 16, 32, 64, 128, 256) if first + size < P]
    for first, size in sinks:
        mask = causal.triu(1 - size)
        mask[:, :first] = causal[:, :first]
        yield knob(f"a window: a position sees the first {first} and the last {size} only", mask)


FIRST_IS_UNSEEN = "decoding does not see the first token"


def caches(case: object) -> Knobs:
    """Caches that are written in other ways, and empty slots that are seen."""
    P = len(case.rows)
    start = case.prompt
    new = P - start
    causal = torch.ones(P, P, dtype=torch.bool).tril()

    def knob(name: str, change: Callable[[Tensor], Tensor], change_v: Callable[[Tensor], Tensor] | None = None) -> Knob:
        def compute(at: Step, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            return attend(q, change(k), (change_v or change)(v), at.chain.scaling)

        return Knob(name, attended(compute))

    def same(x: Tensor) -> Tensor:
        return x

    def late(x: Tensor, first: int) -> Tensor:
        return torch.cat((x[:first], torch.zeros_like(x[:1]), x[first:-1]))

    yield knob("the cache is written one slot too far", partial(late, first=0))
    yield knob("keys are written one slot too far", partial(late, first=0), same)
    yield knob("values are written one slot too far", same, partial(late, first=0))
    for name, dtype in FP8.items():
        yield knob(f"the cache is in {name}", lambda x, dtype=dtype: x.to(dtype).to(x))

    def int8(x: Tensor) -> Tensor:
        scale = x.abs().amax(-1, keepdim=True).clamp(min=1e-30) / 127
        return (x / scale).round() * scale

    yield knob("the cache is in int8", int8)
    for number in range(case.chain.layers):
        if len(case.layers) == 1 and number != case.number:

            def of_layer(at: Step, number: int = number) -> Tensor:
                k = at.arrived(name_of_step(number, "k"))
                return attend(at.get("q"), k, at.arrived(name_of_step(number, "v")), at.chain.scaling)

            yield Knob(f"attention reads the cache of layer {number}", {"heads": of_layer})
    if case.text.dtype == torch.float32:
        yield knob("the cache is in bfloat16", lambda x: x.to(torch.bfloat16).to(x))
    for number, other in enumerate(case.others):
        yield from other_rows(case, number, other)
    if new <= 0:
        return

    def without_new(x: Tensor) -> Tensor:
        return torch.cat((x[:start], torch.zeros_like(x[start:])))

    yield knob("the cache is written one slot too far in decoding", partial(late, first=start))
    yield knob("keys are written one slot too far in decoding", partial(late, first=start), same)
    yield knob("values are written one slot too far in decoding", same, partial(late, first=start))
    two_late = partial(late, first=start)
    yield knob("the cache is written 2 slots too far in decoding", lambda x: two_late(two_late(x)))
    yield knob("decoding does not write the cache", without_new)
    yield knob("decoding does not write keys to the cache", without_new, same)
    yield knob("decoding does not write values to the cache", same, without_new)

    def with_mask(name: str, mask: Tensor, empty: int) -> Knob:
        def compute(at: Step, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            zeros = k.new_zeros(empty, *k.shape[1:])
            return attend(q, torch.cat((k, zeros)), torch.cat((v, zeros)), at.chain.scaling, mask)

        return Knob(name, attended(compute))

    for seen in (1, 2, 4, 8, 16, 32, 64):  # slots that nothing was written to
        what = "a slot that was not written yet: the mask is off by one" if seen == 1 else f"{seen} empty slots"
        empty = torch.zeros(P, seen, dtype=torch.bool)
        empty[start:] = True
        yield with_mask(f"a decoding step sees {what}", torch.cat((causal, empty), dim=1), seen)
    without_last = causal.clone()
    without_last[start:, start - 1] = False
    empty = torch.zeros(P, 1, dtype=torch.bool)
    empty[start:] = True
    mask = torch.cat((without_last, empty), dim=1)
    yield with_mask("the cache is written one slot too near in decoding: before the mask's last slot", mask, 1)
    only_itself = causal.clone()
    only_itself[start:, start:] = torch.eye(new, dtype=torch.bool)
    yield with_mask("a decoding step does not see the steps before it: all write to one slot", only_itself, 0)
    empty = torch.zeros(P, new, dtype=torch.bool)
    empty[start:] = torch.ones(new, new, dtype=torch.bool).tril(-1)
    mask = torch.cat((only_itself, empty), dim=1)
    yield with_mask("decoding writes to one slot, and sees the empty ones after it", mask, new)
    unwritten = causal.clone()
    unwritten[start:, start:] = torch.ones(new, new, dtype=torch.bool).tril(-1)
    empty = torch.zeros(P, 1, dtype=torch.bool)
    empty[start:] = True
    mask = torch.cat((unwritten, empty), dim=1)
    yield with_mask("the token is written to the cache after it is read: a decoding step sees an empty slot", mask, 1)


def other_rows(case: object, number: int, other: object) -> Knobs:
    """Slots of the cache that hold another row of the batch."""
    start = case.prompt
    P = len(case.rows)

    def compute(at: Step, q: Tensor, k: Tensor, v: Tensor, first: int, from_new: bool) -> Tensor:
        mixed = []
        for kind, own in (("k", k), ("v", v)):
            its = other.flow.arrived(name_of_step(at.number, kind))
            begin = other.prompt if from_new else first
            its = its[begin : begin + len(own) - first]
            mixed.append(torch.cat((own[:first], its, own[first + len(its) :])))
        return attend(q, mixed[0], mixed[1], at.chain.scaling)

    name = "decoding reads another row's cache"
    yield Knob(name, attended(partial(compute, first=0, from_new=False)))
    if start < P:
        name = "decoding writes another row's tokens into the cache"
        yield Knob(name, attended(partial(compute, first=start, from_new=True)))


def slots(case: object) -> Knobs:
    """Single slots of the cache that later positions do not see, or see with another token's keys and values."""
    first_row = int(case.rows.nonzero()[0])
    P = len(case.rows)
    if first_row == 0 or case.kind != "heads" or not case.text.flow.is_whole(case.name):
        return
    from_row = first_row if first_row < case.prompt else case.prompt
    at_position = torch.arange(P)
    causal = torch.ones(P, P, dtype=torch.bool).tril()

    def knob(name: str, source: Tensor, unseen: Tensor, keys: bool = True, values: bool = True, own: int = 1) -> Knob:
        """Rows after the first slot that changes (or, if `own` is 0, from there on) see slots whose tokens are `source`
        [P], -1 for zeros, except those that are unseen [P]."""
        changes = unseen | (source != at_position)
        begin = max(from_row, int(changes.nonzero()[0]) + own)

        def gathered(x: Tensor, change: bool) -> Tensor:
            return widen_rows(x, source) if change else x

        def compute(at: Step, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            result = case.step.clone()
            mask = causal[begin:] & ~unseen
            result[begin:] = attend(q[begin:], gathered(k, keys), gathered(v, values), at.chain.scaling, mask)
            return result

        return Knob(name, attended(compute))

    nothing = torch.zeros(P, dtype=torch.bool)
    last = P - 1
    for slot in likely_slots(case, from_row):
        one = at_position == slot
        before = at_position.clone()
        before[slot] = slot - 1 if slot else -1
        after = at_position.clone()
        after[slot] = slot + 1
        zeros = at_position.clone()
        zeros[slot] = -1
        moved = torch.where(at_position > slot, at_position - 1, at_position)
        moved[slot] = -1
        moved_back = torch.where(at_position >= slot, (at_position + 1).clamp(max=last), at_position)
        name = FIRST_IS_UNSEEN if slot == 0 else f"slot {slot} of the cache is not seen"
        yield knob(name, at_position, one)
        if slot:
            yield knob(f"{name}, not by its own token either", at_position, one, own=0)
        yield knob(f"slot {slot} of the cache is zeros", zeros, nothing)
        yield knob(f"the keys of slot {slot} of the cache are zeros", zeros, nothing, values=False)
        yield knob(f"the values of slot {slot} of the cache are zeros", zeros, nothing, keys=False)
        yield knob(f"slot {slot} of the cache holds the token before", before, nothing)
        yield knob(f"slot {slot} of the cache holds the token after", after, nothing)
        overwritten = after.clone()
        if slot + 1 < last:
            overwritten[slot + 1] = -1
        yield knob(
            f"slot {slot} of the cache is overwritten by the next token, whose own slot is empty", overwritten, nothing
        )
        yield knob(
            f"slot {slot} of the cache is overwritten by the next token, whose own is not seen",
            after,
            at_position == slot + 1,
        )
        yield knob(f"from slot {slot} on, the cache is written one slot too far", moved, nothing)
        yield knob(f"from slot {slot} on, the cache is written one slot too near", moved_back, nothing)


def likely_slots(case: object, from_row: int) -> list[int]:
    """Slots that may be lost: of long texts those whose loss looks most like the difference. Without slot s, an output
    y moves away from v[s]."""
    P = len(case.rows)
    if P <= 64:
        return list(range(P - 1))
    rows = case.rows.nonzero().flatten()
    v = case.text.flow.arrived(case.chain.inputs[case.name][2])
    v = v.repeat_interleave(case.step.shape[1] // v.shape[1], 1).transpose(0, 1)  # H P D
    y = case.step[rows].transpose(0, 1)  # H n D
    difference = case.port[rows].to(y).transpose(0, 1) - y
    along = (difference @ v.transpose(1, 2)) - (difference * y).sum(-1, keepdim=True)  # H n P
    size = torch.cdist(y, v).clamp(min=1e-6)
    explained = (along / size).pow(2).sum((0, 1))
    best = explained[: P - 1].topk(min(12, P - 1)).indices.tolist()
    first = int(rows[0])
    return sorted({*best, 0, max(first - 1, 0), case.prompt - 1} & set(range(P - 1)))


def widen_rows(x: Tensor, source: Tensor) -> Tensor:
    """Rows of x [P,n,D] by their numbers, zeros for -1."""
    taken = x[source.clamp(min=0)]
    return taken.masked_fill((source < 0)[:, None, None], 0.0)


# ---- o_proj, the MLP and sums over ranks


def outputs(case: object) -> Knobs:
    """o_proj."""
    yield from weights(case, "attention")
    path = LINEAR["attention"]

    def from_heads(name: str, change: Callable[[Tensor], Tensor]) -> Knob:
        return Knob(name, {"attention": lambda at: at.linear(path, change(at.get("heads")).flatten(1))})

    yield from_heads("o_proj takes the heads by head_dim, not by heads", lambda heads: heads.transpose(1, 2))
    num_heads = case.chain.config.num_attention_heads
    for shift in range(1, num_heads):
        yield from_heads(
            f"o_proj takes heads that are off by {shift}", lambda heads, shift=shift: heads.roll(shift, dims=1)
        )
    if num_heads % case.tp == 0 and case.tp > 1:
        for shift in range(1, num_heads // case.tp):

            def rolled(heads: Tensor, shift: int = shift) -> Tensor:
                return torch.cat([own.roll(shift, dims=1) for own in heads.chunk(case.tp, dim=1)], dim=1)

            yield from_heads(f"o_proj takes each rank's heads off by {shift}", rolled)
        by_rank = partial(swapped_ranks, tp=case.tp)
        for a, b in pairs(case.tp):
            yield from_heads(
                f"the columns of o_proj are exchanged between ranks {a} and {b}", partial(by_rank, a=a, b=b)
            )
    yield from partial_sums(case, "attention")


def pairs(tp: int) -> list[tuple[int, int]]:
    return [(a, b) for a in range(tp) for b in range(a + 1, tp)]


def swapped_ranks(x: Tensor, tp: int, a: int, b: int) -> Tensor:
    """x [P,n,...] whose equal slices of n for ranks a and b are exchanged."""
    slices = list(x.chunk(tp, dim=1))
    slices[a], slices[b] = slices[b], slices[a]
    return torch.cat(slices, dim=1)


def partial_sums(case: object, kind: str) -> Knobs:
    """A row-parallel product whose sum has other terms than one from each rank."""
    tp = case.tp
    if tp == 1:
        return

    def parts(at: Step) -> tuple[list[Tensor], Tensor | float]:
        path, x = row_parallel(at, kind)
        weight = at.weight(path)
        bias = at.bias(path)
        found = [F.linear(x[:, own], weight[:, own]) for own in columns_of_ranks(at, kind, tp)]
        return found, 0.0 if bias is None else bias

    def knob(name: str, combine: Callable[[list[Tensor]], Tensor]) -> Knob:
        def compute(at: Step) -> Tensor:
            found, bias = parts(at)
            return combine(found) + bias

        return Knob(name, {kind: compute})

    for rank in range(tp):
        name = f"only rank {rank} is in the sum: the all-reduce is missing"
        yield knob(name, lambda found, rank=rank: found[rank])
        if tp > 2:
            yield knob(f"rank {rank} is missing in the sum", lambda found, rank=rank: sum(found) - found[rank])
        yield knob(f"rank {rank} is in the sum twice", lambda found, rank=rank: sum(found) + found[rank])
    for times in sorted({2, tp}):
        yield knob(f"the sum over ranks is made {times} times", lambda found, times=times: sum(found) * times)
    yield knob("the sum over ranks is a mean", lambda found: sum(found) / tp)


def partial_stream(case: object) -> Knobs:
    """Ranks that did not get the sum over ranks after attention: their MLP sees another residual stream."""
    tp = case.tp
    if tp == 1:
        return
    for rank in range(tp):

        def normed(at: Step, rank: int = rank) -> Tensor:
            path, x = row_parallel(at, "attention")
            own = columns_of_ranks(at, "attention", tp)[rank]
            attention = F.linear(x[:, own], at.weight(path)[:, own])
            return rms_norm(at.get("stream") + attention, at.weight("post_attention_layernorm"), at.chain.eps)

        def product(at: Step, kind: str, normed: Compute = normed, rank: int = rank) -> Tensor:
            changed = at.linear(LINEAR[kind], normed(at))
            result = getattr(at, kind)()
            own = columns_of_ranks_of(result, tp)[rank]
            result[:, own] = changed[:, own]
            return result

        steps = {kind: partial(product, kind=kind) for kind in ("gate_proj", "up_proj")}
        yield Knob(f"rank {rank} did not get the sum after attention: the all-reduce is missing there", steps)


def stream_of_a_rank(case: object) -> Knobs:
    """Ranks that did not get a sum over ranks of the layer before."""
    if case.tp == 1 or not case.number:
        return
    before = case.number - 1
    for rank in range(case.tp):
        for kind, words in (("mlp", "the MLP"), ("attention", "attention")):

            def normed(at: Step, rank: int = rank, kind: str = kind) -> Tensor:
                its = Step(at.chain, before, at.arrived)
                path, x = row_parallel(its, kind)
                own = columns_of_ranks(its, kind, case.tp)[rank]
                part = F.linear(x[:, own], its.weight(path)[:, own])
                hidden = at.get("stream") - its.get(kind) + part
                return rms_norm(hidden, at.weight("input_layernorm"), at.chain.eps)

            name = f"rank {rank} did not get the sum after {words} of layer {before}: the all-reduce is missing there"
            yield on_rank(case, Knob(name, {"input_layernorm": normed}), rank, name)


def columns_of_ranks_of(x: Tensor, tp: int) -> list[Tensor]:
    """The equal shares of x [P,n] that ranks hold."""
    size = x.shape[1]
    return list(torch.arange(size).split(-(-size // tp)))


ACTIVATIONS = {
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu by tanh": partial(F.gelu, approximate="tanh"),
    "relu": F.relu,
    "none": lambda y: y,
    "sigmoid": F.sigmoid,
    "tanh": torch.tanh,
    "relu squared": lambda y: F.relu(y) ** 2,
    "gelu by sigmoid(1.702 x)": lambda y: y * F.sigmoid(1.702 * y),
}


def mlps(case: object) -> Knobs:
    config = case.chain.config
    tp = case.tp
    for name, act in ACTIVATIONS.items():
        changed = {"inner": lambda at, act=act: act(at.get("gate_proj")) * at.get("up_proj")}
        yield Knob(f"another activation: {name}, config.json says {config.hidden_act}", changed)

    def inner(name: str, compute: Callable[[Callable, Tensor, Tensor], Tensor]) -> Knob:
        return Knob(name, {"inner": lambda at: compute(at.chain.act_fn, at.get("gate_proj"), at.get("up_proj"))})

    yield inner("gate_proj and up_proj are swapped", lambda act, gate, up: act(up) * gate)
    yield inner("up_proj is left out", lambda act, gate, up: act(gate))
    yield inner("gate_proj is left out", lambda act, gate, up: up)
    yield inner("the activation is on both gate_proj and up_proj", lambda act, gate, up: act(gate) * act(up))
    for kind in ("gate_proj", "up_proj", "mlp"):
        yield from weights(case, kind)
    size = config.intermediate_size
    if size % 2 == 0:

        def interleaved(act: Callable, gate: Tensor, up: Tensor) -> Tensor:
            rows = torch.stack((gate, up), dim=-1).flatten(1)  # as a checkpoint of interleaved rows has them
            return act(rows[:, :size]) * rows[:, size:]

        def halves(act: Callable, gate: Tensor, up: Tensor) -> Tensor:
            rows = torch.cat((gate, up), dim=-1)
            return act(rows[:, ::2]) * rows[:, 1::2]

        yield inner("gate_up is written by turns and read as halves", interleaved)
        yield inner("gate_up is written as halves and read by turns", halves)
    if tp > 1 and size % tp == 0:

        def cut(act: Callable, gate: Tensor, up: Tensor) -> Tensor:
            ranks = torch.cat((gate, up), dim=-1).chunk(tp, dim=-1)
            halves = [rank.chunk(2, dim=-1) for rank in ranks]
            return torch.cat([act(first) * second for first, second in halves], dim=-1)

        yield inner("the rows of a fused gate_up are cut across ranks", cut)
        for a, b in pairs(tp):
            for kind in ("gate_proj", "up_proj"):
                moved = {kind: lambda at, a=a, b=b, kind=kind: swapped_ranks(getattr(at, kind)(), tp, a, b)}
                yield Knob(f"the rows of {kind} are exchanged between ranks {a} and {b}", moved)
            moved = {"inner": lambda at, a=a, b=b: swapped_ranks(at.inner(), tp, a, b)}
            yield Knob(f"the columns of down_proj are exchanged between ranks {a} and {b}", moved)
        for shift in range(1, tp):
            moved = {"inner": lambda at, shift=shift: at.inner().roll(shift * size // tp, dims=1)}
            yield Knob(f"the columns of down_proj are on ranks that are off by {shift}", moved)
    yield from partial_sums(case, "mlp")
    yield from partial_stream(case)
    if len(case.layers) == 1:
        for number in range(case.chain.layers):
            if number != case.number:
                yield whole_mlp(number)


def whole_mlp(number: int) -> Knob:
    def product(at: Step, kind: str) -> Tensor:
        return F.linear(arriving(at, kind), at.weight(LINEAR[kind], number), at.bias(LINEAR[kind]))

    steps = {kind: partial(product, kind=kind) for kind in ("gate_proj", "up_proj", "mlp")}
    return Knob(f"the whole MLP is that of layer {number}", steps)


# ---- the end


def ends(case: object) -> Knobs:
    """lm_head."""
    chain = case.chain
    tp = case.tp
    vocab_size = chain.config.vocab_size
    share = -(-vocab_size // tp)
    if not chain.config.tie_word_embeddings:
        table = {"logits": lambda at: F.linear(at.arrived("final_norm"), at.weight("embed_tokens"))}
        yield Knob("the embedding is taken for lm_head, though config.json does not tie them", table)
    unnormed = {"logits": lambda at: at.linear("lm_head", at.arrived(f"hidden_states.{chain.layers}"))}
    yield Knob("lm_head gets hidden states without the final norm", unnormed)
    yield from weights(case, "logits")

    def capped(value: float) -> Knob:
        name = f"logits are capped at {told(value)} by tanh (as Gemma 2 does)"
        return Knob(name, {"logits": lambda at: value * torch.tanh(at.logits() / value)})

    yield from fitted(case, [1.0, 2.0, 5.0, 10.0, 20.0, 30.0, 50.0, 100.0], capped)
    for shift in (-1, 1, -2, 2):
        words = "after" if shift < 0 else "before"
        moved = {"logits": lambda at, shift=shift: shifted_logits(at, shift)}
        yield Knob(f"logits are of the position {abs(shift)} {words}", moved)
    for shift in range(1, tp):
        moved = {"logits": lambda at, shift=shift: at.logits().roll(shift * share, dims=-1)}
        yield Knob(f"the ranks' slices of the vocabulary are off by {shift}", moved)
    for rank in range(tp if tp > 1 else 0):
        zeros = {"logits": lambda at, rank=rank: at.logits().index_fill(1, share_of(vocab_size, share, rank), 0.0)}
        yield Knob(f"rank {rank}'s slice of the vocabulary is zeros", zeros)
    for a, b in pairs(tp):
        if vocab_size % tp == 0:
            moved = {"logits": lambda at, a=a, b=b: swapped_ranks(at.logits(), tp, a, b)}
            yield Knob(f"the slices of the vocabulary of ranks {a} and {b} are exchanged", moved)
    for other in case.others:
        moved = {"logits": partial(logits_of_row, case=case, other=other)}
        yield Knob("logits are of another row of the batch", moved)


def share_of(size: int, share: int, rank: int) -> Tensor:
    return torch.arange(min(rank * share, size), min((rank + 1) * share, size))


def shifted_logits(at: Step, shift: int) -> Tensor:
    logits = at.logits()
    moved = logits.roll(shift, dims=0)
    kept = slice(0, shift) if shift > 0 else slice(shift, None)
    moved[kept] = logits[kept]  # of which the text has no other
    return moved


def logits_of_row(at: Step, case: object, other: object) -> Tensor:
    return beside(case, at.logits(), other.flow.arrived("logits"), other)


GENERATORS: list[tuple[str, Callable[[object], Knobs]]] = [
    ("logits", low_precision),
    ("residual", low_precision),
    ("mlp", low_precision),
    ("attention", low_precision),
    ("heads", low_precision),
    ("v", low_precision),
    ("k_proj", low_precision),
    ("q_proj", low_precision),
    ("embedding", embeddings),
    ("stream", streams),
    ("input_layernorm", partial(norms, kind="input_layernorm")),
    ("q_proj", query_and_key),
    ("k_proj", query_and_key),
    ("q_proj", partial(projections, kind="q_proj")),
    ("k_proj", partial(projections, kind="k_proj")),
    ("v", partial(projections, kind="v")),
    ("q", rotations),
    ("k", rotations),
    ("heads", attentions),
    ("attention", outputs),
    ("middle", middles),
    ("post_attention_layernorm", partial(norms, kind="post_attention_layernorm")),
    ("inner", mlps),
    ("residual", residuals),
    ("final_norm", partial(norms, kind="final_norm")),
    ("logits", ends),
]


# ---- one rank


def on_rank(case: object, knob: Knob, rank: int, meaning: str = "") -> Knob:
    """A knob that is turned on one rank only: for the outputs that the rank holds."""
    num_heads = case.chain.config.num_attention_heads
    num_kv_heads = case.chain.config.num_key_value_heads
    query_heads, kv_heads = shard_heads(num_heads, num_kv_heads, case.tp)[rank]

    def mask(x: Tensor, kind: str) -> Tensor:
        chosen = torch.zeros(x.shape[1], dtype=torch.bool)
        if kind in ("q_proj", "q", "heads"):
            chosen[[head for head in query_heads if head is not None]] = True
        elif kind in ("k_proj", "k", "v"):
            chosen[[head for head in kv_heads if head is not None]] = True
        else:
            chosen[columns_of_ranks_of(x, case.tp)[rank]] = True
        return chosen.view(1, -1, *[1] * (x.dim() - 2))

    def limited(at: Step, kind: str, compute: Compute) -> Tensor:
        right = getattr(at, kind)()
        return torch.where(mask(right, kind), compute(at), right)

    steps = {}
    for kind, compute in knob.steps.items():
        if kind in ("q_proj", "q", "heads", "k_proj", "k", "v", "gate_proj", "up_proj", "inner", "logits"):
            steps[kind] = partial(limited, kind=kind, compute=compute)
        for norm, products in NORM_PRODUCTS.items():
            if kind == norm:
                for product in products:
                    with_norm = partial(product_of, kind=product, compute=compute)
                    steps[product] = partial(limited, kind=product, compute=with_norm)
    return Knob(meaning or f"{knob.meaning}, on rank {rank}", steps)


NORM_PRODUCTS = {
    "input_layernorm": ("q_proj", "k_proj", "v"),
    "post_attention_layernorm": ("gate_proj", "up_proj"),
}


def product_of(at: Step, kind: str, compute: Compute) -> Tensor:
    return shaped(at, kind, at.linear(LINEAR[kind], compute(at)))

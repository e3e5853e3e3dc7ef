"""Roundings: Hugging Face's own, those that any port on several ranks makes, and those that a port should not make but
whose errors are no larger than HF's.

Every step is computed in the audited dtype from the port's own inputs, once as HF rounds it and once in another way.
Least squares then tell how much of the other way is in the port's errors.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from llama_neuron import shard_heads
from tools.audit.chain import (
    LINEAR,
    Chain,
    Flow,
    Step,
    attend,
    name_of_step,
    rms_norm,
    rotate,
    step_errors,
    step_of_name,
    widen,
)

if TYPE_CHECKING:
    from tools.audit.judge import Text

Compute = Callable[[Step], Tensor]


class RoundedStep(Step):
    """A step in the audited dtype, with float32 inside where HF has it."""

    def norm(self, x: Tensor, path: str) -> Tensor:
        normed = rms_norm(x.float(), 1.0, self.chain.eps)
        return self.weight(path) * normed.to(x.dtype)

    def turn(self, x: Tensor, angles: Tensor) -> Tensor:
        """x [P,n,D] by float32 angles [P,D/2]; HF rounds cos and sin, and each product."""
        both = torch.cat((angles, angles), dim=-1)[:, None]
        cos = (both.cos() * self.chain.attention_scaling).to(x.dtype)
        sin = (both.sin() * self.chain.attention_scaling).to(x.dtype)
        x1, x2 = x.chunk(2, dim=-1)
        half = torch.cat((-x2, x1), dim=-1)
        return x * cos + half * sin

    def attend(self, softmax: Callable[[Tensor], Tensor]) -> Tensor:
        """HF's eager attention with a softmax of its scores [H,P,P], whose result is in the audited dtype."""
        return attend(self.get("q"), self.get("k"), self.get("v"), self.chain.scaling, softmax=softmax)

    def angles(self) -> Tensor:
        count = len(self.arrived("ids"))
        return torch.arange(count)[:, None].float() * self.chain.exact_inv_freq

    def input_layernorm(self) -> Tensor:
        return self.norm(self.get("stream"), "input_layernorm")

    def post_attention_layernorm(self) -> Tensor:
        return self.norm(self.get("middle"), "post_attention_layernorm")

    def final_norm(self) -> Tensor:
        hidden = self.arrived(f"hidden_states.{self.chain.layers}")
        return self.norm(hidden, "norm")

    def q(self) -> Tensor:
        return self.turn(self.get("q_proj"), self.angles())

    def k(self) -> Tensor:
        return self.turn(self.get("k_proj"), self.angles())

    def heads(self) -> Tensor:
        return self.attend(softmax_in_float32)


class RoundedChain(Chain):
    """HF's steps as they round in the audited dtype."""

    def __init__(self, model: nn.Module, dtype: torch.dtype, positions: int) -> None:
        super().__init__(model, dtype, positions)
        self.exact_inv_freq = model.model.rotary_emb.inv_freq.float()

    def step(self, name: str, arrived: Callable[[str], Tensor]) -> Step:
        number, _ = step_of_name(name)
        return RoundedStep(self, number, arrived)


def softmax_in_float32(scores: Tensor) -> Tensor:
    return scores.float().softmax(-1).to(scores.dtype)


# ---- other roundings


def norm_in_dtype(at: RoundedStep) -> Tensor:
    return rms_norm(at.get("stream"), at.weight("input_layernorm"), at.chain.eps)


def norm_rounded_late(at: RoundedStep) -> Tensor:
    x = at.get("stream")
    weight = at.weight("input_layernorm").float()
    normed = rms_norm(x.float(), weight, at.chain.eps)
    return normed.to(x.dtype)


def turned_in_float32(at: RoundedStep, x: Tensor) -> Tensor:
    turned = rotate(x.float(), at.angles(), at.chain.attention_scaling)
    return turned.to(x.dtype)


def divided_late(at: RoundedStep) -> Tensor:
    """Attention whose weights are divided by their sum after the product with v."""
    q = at.get("q")
    k = at.get("k")
    v = at.get("v")
    groups = q.shape[1] // k.shape[1]
    k = k.repeat_interleave(groups, 1)
    v = v.repeat_interleave(groups, 1)
    scores = torch.einsum("thd,shd->hts", q, k) * at.chain.scaling
    future = torch.ones(scores.shape[1:], dtype=torch.bool).triu(1)
    scores = scores.masked_fill(future, -torch.inf).float()
    weights = torch.exp(scores - scores.amax(-1, keepdim=True))
    rounded_weights = weights.to(q.dtype).float()
    product = torch.matmul(rounded_weights, v.transpose(0, 1).float())
    divided = product / weights.sum(-1, keepdim=True)
    return divided.transpose(0, 1).to(q.dtype)


def angles_in_dtype(at: RoundedStep, x: Tensor) -> Tensor:
    positions = torch.arange(len(x))[:, None].to(x.dtype)
    angles = positions * at.chain.inv_freq
    return at.turn(x, angles.float())


def frequencies_in_dtype(at: RoundedStep, x: Tensor) -> Tensor:
    positions = torch.arange(len(x))[:, None].float()
    angles = positions * at.chain.inv_freq.float()
    return at.turn(x, angles)


def softmax_in_dtype(scores: Tensor) -> Tensor:
    largest = scores.amax(-1, keepdim=True)
    weights = torch.exp(scores - largest)
    return weights / weights.sum(-1, keepdim=True)


def equal_shares(size: int, tp: int) -> list[Tensor]:
    """The columns that each rank holds, the last ones fewer if tp does not divide them."""
    share = -(-size // tp)
    return list(torch.arange(size).split(share))


def columns_of_ranks(at: Step, kind: str, tp: int) -> list[Tensor]:
    """Which inputs of o_proj or down_proj each rank holds."""
    if kind == "mlp":
        return equal_shares(at.get("inner").shape[1], tp)
    num_heads = at.get("heads").shape[1]
    num_kv_heads = at.get("k").shape[1]
    columns = torch.arange(num_heads * at.chain.head_dim)
    columns = columns.view(num_heads, -1)  # H D
    found = []
    for query_heads, _ in shard_heads(num_heads, num_kv_heads, tp):
        own = [head for head in query_heads if head is not None]
        found.append(columns[own].flatten())
    return found


def row_parallel(at: Step, kind: str) -> tuple[str, Tensor]:
    """The path of o_proj or down_proj, and what goes into it."""
    if kind == "mlp":
        return "mlp.down_proj", at.get("inner")
    return "self_attn.o_proj", at.get("heads").flatten(1)


def sums_in_dtype(at: Step, kind: str, tp: int) -> Tensor:
    """A row-parallel product whose parts are rounded, and their sum after each term."""
    path, x = row_parallel(at, kind)
    return sum_in_dtype(at, path, x, columns_of_ranks(at, kind, tp))


def tiles_in_dtype(at: Step, path: str, x: Tensor, size: int) -> Tensor:
    """A product that is accumulated in the audited dtype, tile by tile of its inputs."""
    columns = torch.arange(x.shape[1])
    return sum_in_dtype(at, path, x, columns.split(size))


def sum_in_dtype(at: Step, path: str, x: Tensor, parts: Iterable[Tensor]) -> Tensor:
    """A product that is the sum of its parts, each of some columns, rounded after each term."""
    weight = at.weight(path)
    total = torch.zeros((), dtype=x.dtype)
    for own in parts:
        total = total + F.linear(x[:, own], weight[:, own])
    return with_bias(total, at.bias(path))


def with_bias(product: Tensor, bias: Tensor | None) -> Tensor:
    """A product after its bias, if it has one, is added."""
    if bias is None:
        return product
    return product + bias


def bias_after_sum(at: Step, kind: str) -> Tensor:
    path, x = row_parallel(at, kind)
    product = F.linear(x, at.weight(path))
    return with_bias(product, at.bias(path))


def bias_after_rounding(at: Step, path: str) -> Tensor:
    product = F.linear(at.get("input_layernorm"), at.weight(path))
    return at.heads_of(product + at.bias(path))


@dataclass(frozen=True)
class Rounding:
    """A step that rounds differently; it shows at the first of `kinds` that was captured."""

    kinds: tuple[str, ...]
    what: str
    steps: dict[str, Compute]  # kind -> its computation
    is_wrong: bool = True  # HF's float32 is missing; else a clean port may do so
    grows: bool = False  # with the position: it is told, and fails once it is out of bounds


def roundings(dtype: torch.dtype, tp: int, has_bias: bool) -> Iterator[Rounding]:
    """What is looked for in each layer."""
    name = str(dtype).removeprefix("torch.")
    yield from roundings_of_norms(name)
    yield from roundings_of_rotations(name)
    yield from roundings_of_attention(name)
    if tp > 1:
        yield from roundings_of_sums(name, tp)
    if has_bias:
        yield from roundings_of_biases(tp)


def roundings_of_norms(name: str) -> Iterator[Rounding]:
    kinds = ("input_layernorm", "v")
    in_dtype = {"input_layernorm": norm_in_dtype}
    yield Rounding(kinds, f"RMSNorm in {name}", in_dtype)
    late = {"input_layernorm": norm_rounded_late}
    yield Rounding(kinds, "a norm that is rounded after its weight", late, is_wrong=False)


def roundings_of_rotations(name: str) -> Iterator[Rounding]:
    kinds = ("q",)
    angles = {"q": lambda at: angles_in_dtype(at, at.get("q_proj"))}
    yield Rounding(kinds, f"rotary angles in {name}", angles)
    frequencies = {"q": lambda at: frequencies_in_dtype(at, at.get("q_proj"))}
    yield Rounding(kinds, f"inv_freq in {name}", frequencies, grows=True)
    turned = {"q": lambda at: turned_in_float32(at, at.get("q_proj"))}
    yield Rounding(kinds, "a rotary embedding in float32", turned, is_wrong=False)


def roundings_of_attention(name: str) -> Iterator[Rounding]:
    kinds = ("heads",)
    softmax = {"heads": lambda at: at.attend(softmax_in_dtype)}
    yield Rounding(kinds, f"softmax in {name}", softmax)
    divided = {"heads": divided_late}
    yield Rounding(kinds, "softmax divided after the product", divided, is_wrong=False)


def roundings_of_sums(name: str, tp: int) -> Iterator[Rounding]:
    for kind in ("attention", "mlp"):
        summed = {kind: partial(sums_in_dtype, kind=kind, tp=tp)}
        yield Rounding((kind,), f"sums over {tp} ranks in {name}", summed, is_wrong=False)


def roundings_of_biases(tp: int) -> Iterator[Rounding]:
    what = "a bias that is added after the product was rounded"
    if tp == 1:  # on several ranks it is added after their sum, which is looked for
        for kind in ("attention", "mlp"):
            late = {kind: partial(bias_after_sum, kind=kind)}
            yield Rounding((kind,), what, late, is_wrong=False)
    for kind in ("q_proj", "k_proj", "v"):
        kinds = (kind, kind.removesuffix("_proj"))
        late = {kind: partial(bias_after_rounding, path=LINEAR[kind])}
        yield Rounding(kinds, what, late, is_wrong=False)


# ---- how much of them is in a port


class Shares:
    """How much of other roundings is in a port's errors: least squares of (port - exact) over (HF - exact) and, for
    each of them, (other - exact), all from the port's inputs. 0: none of it; 1: all of it.

    The errors of one position go together (they share a norm, or the scores of a head), so standard errors are taken
    over positions, not over values.
    """

    def __init__(self) -> None:
        self.products: list[Tensor] = []  # of each text and layer, [P,k,k]
        self.targets: list[Tensor] = []  # [P,k]
        self.positions = 0  # that had values, once it is solved

    def add(self, port: Tensor, exact: Tensor, others: list[Tensor], seen: Tensor) -> None:
        """`others`: HF's rounding, and the other ones."""
        exact = exact.flatten(1).double()
        scale = exact.norm(dim=-1, keepdim=True).clamp(min=1e-30)
        was_seen = widen(seen, port).expand_as(port).flatten(1)

        def errors(x: Tensor) -> Tensor:
            difference = x.flatten(1).double() - exact
            relative = difference / scale
            return relative.masked_fill(~was_seen, 0.0)  # P n

        y = errors(port)
        if not torch.isfinite(y).all():  # there is worse to report
            return
        x = torch.stack([errors(other) for other in others], dim=1)  # P k n
        product = x @ x.transpose(1, 2)
        target = (x @ y[..., None])[..., 0]
        self.products.append(product)
        self.targets.append(target)

    def solve(self) -> tuple[list[float], list[float]] | None:
        """The share of each, and its standard error; None if they cannot be told apart, or there are too few
        positions."""
        if not self.products:
            return None
        products = torch.cat(self.products)
        targets = torch.cat(self.targets)
        has_values = products.diagonal(dim1=1, dim2=2).sum(-1) > 0
        count = int(has_values.sum())
        self.positions = count
        whole = products.sum(0)
        sizes = whole.diagonal().sqrt()
        if count <= len(sizes) + 1 or not (sizes > 0).all():
            return None
        scaled = whole / sizes / sizes[:, None]
        if float(torch.linalg.eigvalsh(scaled)[0]) < 1e-4:
            return None
        inverse = torch.linalg.inv(whole)
        shares = inverse @ targets.sum(0)
        rest = targets - products @ shares  # P k
        spread = inverse @ (rest.T @ rest) @ inverse
        variances = spread.diagonal() * count / (count - len(sizes))
        standard_errors = variances.clamp(min=0).sqrt()
        return shares.tolist(), standard_errors.tolist()


@dataclass
class Found:
    """What was measured of the texts' steps in the audited dtype."""

    shares: dict[tuple[str, tuple[str, ...]], Shares] = field(default_factory=dict)  # (kind, roundings)
    eps: dict[tuple, Shares] = field(default_factory=dict)  # (layer, norm); None: all of them
    # (layer, norm, eps) -> of the values that another eps rounds differently: how many the port has so, and as HF
    eps_votes: dict[tuple, list[int]] = field(default_factory=dict)
    allowed: dict[tuple[str, str], float] = field(default_factory=dict)  # (name, rounding) -> its squared errors
    harmless: set[str] = field(default_factory=set)  # roundings that a clean port may have
    growing: set[str] = field(default_factory=set)  # those that grow with the position


NORM_INPUTS = {"input_layernorm": "stream", "post_attention_layernorm": "middle"}
# of the mean square: what eps is changed by, so that the effect is far above float32's and still proportional
EPS_SHARE = 1e-3
USUAL_EPS = (1e-5, 1e-6)  # of Llama 3 and Llama 2: taken for each other, and hardly different


def measure_roundings(model: nn.Module, dtype: torch.dtype, tp: int, texts: list[Text]) -> Found:
    """Looks for the roundings of `roundings` and for another eps, in all layers of all texts."""
    found = Found()
    longest = max(len(text.ids) for text in texts)
    chain = RoundedChain(model, dtype, longest)
    has_bias = chain.weights.get("model.layers.0.self_attn.q_proj.bias") is not None
    wanted = list(roundings(dtype, tp, has_bias))
    if dtype == torch.float32:  # which HF has too
        wanted = [rounding for rounding in wanted if not rounding.is_wrong]
    found.harmless = {rounding.what for rounding in wanted if not rounding.is_wrong}
    found.growing = {rounding.what for rounding in wanted if rounding.grows}
    for number in range(chain.layers):
        for text in texts:
            flow = flow_of_layer(chain, text, number)
            for kind, its in captured_kinds(wanted, text, number).items():
                add_roundings(found, text, flow, number, kind, its)
            add_eps(found, text, flow, number, "v", "input_layernorm")
            add_eps(found, text, flow, number, "mlp", "post_attention_layernorm")
            text.flow.forget(number)
    return found


def captured_kinds(wanted: list[Rounding], text: Text, number: int) -> dict[str, list[Rounding]]:
    """The roundings that show in a layer, by the first of their kinds that was captured."""
    by_kind: dict[str, list[Rounding]] = {}
    for rounding in wanted:
        for kind in rounding.kinds:
            if name_of_step(number, kind) in text.subject:
                by_kind.setdefault(kind, []).append(rounding)
                break
    return by_kind


def flow_of_layer(chain: RoundedChain, text: Text, number: int) -> Flow:
    """The port's tensors of a layer, and what the layer gets, in the audited dtype."""
    flow = Flow(chain, text.ids[:-1], text.subject, text.seen)
    names = [f"hidden_states.{number}"]
    names += [name for name in text.subject if name.startswith(f"layers.{number}.")]
    for name in names:
        if name in text.has:
            flow.values[name] = text.has[name].to(chain.dtype)
    return flow


def add_roundings(found: Found, text: Text, flow: Flow, number: int, kind: str, its: list[Rounding]) -> None:
    """Adds what a place of a layer tells of the roundings that show there."""
    name = name_of_step(number, kind)
    step = text.step[name]
    seen = text.seen[name]
    results = [flow.result(name)]
    whats = []
    for rounding in its:
        steps = {name_of_step(number, source): compute for source, compute in rounding.steps.items()}
        other = flow.changed(steps, name).get(name)
        if other is None:  # what it would change was captured itself
            continue
        results.append(other)
        whats.append(rounding.what)
        if not rounding.is_wrong:
            key = (name, rounding.what)
            before = found.allowed.get(key, 0.0)
            squares = step_errors(other, step, seen).pow(2)
            found.allowed[key] = before + float(squares.sum(dtype=torch.float64))
    shares = found.shares.setdefault((kind, tuple(whats)), Shares())
    shares.add(text.subject[name], step, results, seen)


def add_eps(found: Found, text: Text, flow: Flow, number: int, kind: str, norm: str) -> None:
    """How far another eps is in the port's errors, from the first place after a norm that was captured."""
    after = norm if name_of_step(number, norm) in text.subject else kind
    name = name_of_step(number, after)
    if name not in text.subject:
        return
    steps = {name_of_step(number, norm): partial(other_eps, norm=norm)}
    step = text.step[name]
    change = text.flow.changed(steps, name)[name] - step
    x = text.flow.arrived(name_of_step(number, NORM_INPUTS[norm]))
    other = step + change * text.flow.chain.eps / eps_change(x)  # as if eps were twice as large
    hf = flow.result(name)
    scaled = 1.01 * step  # of which another weight may look like another eps
    keys = ((None, None), (None, norm), (number, norm))
    for key in keys:
        shares = found.eps.setdefault(key, Shares())
        shares.add(text.subject[name], step, [hf, other, scaled], text.seen[name])
    port = text.subject[name].to(hf)
    was_seen = widen(text.seen[name], hf)
    for eps in USUAL_EPS:
        if eps == flow.chain.eps:
            continue
        rounded = flow.changed({name_of_step(number, norm): partial(norm_with_eps, norm=norm, eps=eps)}, name)[name]
        differs = (rounded != hf) & was_seen
        with_other = int((differs & (port == rounded)).sum())
        with_hf = int((differs & (port == hf)).sum())
        for key in keys:
            votes = found.eps_votes.setdefault((*key, eps), [0, 0])
            votes[0] += with_other
            votes[1] += with_hf


def norm_with_eps(at: RoundedStep, norm: str, eps: float) -> Tensor:
    x = at.get(NORM_INPUTS[norm])
    normed = rms_norm(x.float(), 1.0, eps)
    return at.weight(norm) * normed.to(x.dtype)


def other_eps(at: Step, norm: str) -> Tensor:
    x = at.get(NORM_INPUTS[norm])
    return rms_norm(x, at.weight(norm), at.chain.eps + eps_change(x))


def eps_change(x: Tensor) -> float:
    return EPS_SHARE * float(x.pow(2).mean())


def name_of_tiles(text: Text, name: str) -> str:
    """A product that is accumulated in the audited dtype, found in the errors of the place after it; or nothing."""
    chain = RoundedChain(text.flow.chain.model, text.dtype, len(text.ids))
    number, kind = step_of_name(name)
    source = {"q": "q_proj", "k": "k_proj"}.get(kind, kind)
    path = LINEAR.get(source)
    if path is None or number is None:
        return ""
    flow = flow_of_layer(chain, text, number)
    hf = chain.compute(name, flow.arrived)
    columns = chain.weights.get(f"model.layers.{number}.{path}.weight").shape[1]
    dtype = str(text.dtype).removeprefix("torch.")
    found = ""
    most = 0.0
    for size in (8, 16, 32, 64, 128, 256, 512, 1024):
        if size >= columns:
            break
        steps = {name_of_step(number, source): partial(tiled_product, kind=source, size=size)}
        other = flow.changed(steps, name).get(name)
        if other is None:
            continue
        shares = Shares()
        shares.add(text.subject[name], text.step[name], [hf, other], text.seen[name])
        solved = shares.solve()
        if solved is None:
            continue
        shares_found, standard_errors = solved
        share = shares_found[1]
        standard_error = standard_errors[1]
        if share > max(most, 0.6 + 2 * standard_error):
            most = share
            found = f"products are accumulated in {dtype}, by tiles of {size}"
    return found


def tiled_product(at: Step, kind: str, size: int) -> Tensor:
    """The product of a step, accumulated in the audited dtype by tiles."""
    if kind in ("attention", "mlp"):
        path, x = row_parallel(at, kind)
        return tiles_in_dtype(at, path, x, size)
    x = at.get("input_layernorm")
    return at.heads_of(tiles_in_dtype(at, LINEAR[kind], x, size))

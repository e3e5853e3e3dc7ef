"""Roundings: Hugging Face's own, those that any port on several ranks makes, and those that a port should not make but
whose errors are no larger than HF's.

Every step is computed in the audited dtype from the port's own inputs, once as HF rounds it and once in another way.
Least squares then tell how much of the other way is in the port's errors.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from llama_neuron import shard_heads
from tools.audit.chain import LINEAR, Chain, Flow, Step, name_of_step, rms_norm, rotate, step_of_name, widen

Knob = Callable[[Step], Tensor]


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
        q = self.get("q")
        k = self.get("k")
        v = self.get("v")
        groups = q.shape[1] // k.shape[1]
        q = q.transpose(0, 1)  # H P D
        k = k.transpose(0, 1).repeat_interleave(groups, 0)
        v = v.transpose(0, 1).repeat_interleave(groups, 0)
        scores = torch.matmul(q, k.transpose(1, 2)) * self.chain.scaling
        future = torch.ones(scores.shape[1:], dtype=torch.bool).triu(1)
        weights = softmax(scores.masked_fill(future, -torch.inf))
        return torch.matmul(weights, v).transpose(0, 1)

    def angles(self) -> Tensor:
        count = len(self.arrived("ids"))
        return torch.arange(count)[:, None].float() * self.chain.exact_inv_freq

    def input_layernorm(self) -> Tensor:
        return self.norm(self.get("stream"), "input_layernorm")

    def post_attention_layernorm(self) -> Tensor:
        return self.norm(self.get("middle"), "post_attention_layernorm")

    def final_norm(self) -> Tensor:
        return self.norm(self.arrived(f"hidden_states.{self.chain.layers}"), "norm")

    def q(self) -> Tensor:
        return self.turn(self.get("q_proj"), self.angles())

    def k(self) -> Tensor:
        return self.turn(self.get("k_proj"), self.angles())

    def heads(self) -> Tensor:
        return self.attend(lambda scores: scores.float().softmax(-1).to(scores.dtype))


class RoundedChain(Chain):
    """HF's steps as they round in the audited dtype."""

    def __init__(self, model: nn.Module, dtype: torch.dtype, positions: int) -> None:
        super().__init__(model, dtype, positions)
        self.exact_inv_freq = model.model.rotary_emb.inv_freq.float()

    def step(self, name: str, arrived: Callable[[str], Tensor]) -> Step:
        number, _ = step_of_name(name, self.layers)
        return RoundedStep(self, number, arrived)


# ---- other roundings


def norm_in_dtype(at: RoundedStep) -> Tensor:
    return rms_norm(at.get("stream"), at.weight("input_layernorm"), at.chain.eps)


def norm_rounded_late(at: RoundedStep) -> Tensor:
    x = at.get("stream")
    return rms_norm(x.float(), at.weight("input_layernorm").float(), at.chain.eps).to(x.dtype)


def turned_in_float32(at: RoundedStep, x: Tensor) -> Tensor:
    return rotate(x.float(), at.angles(), at.chain.attention_scaling).to(x.dtype)


def divided_late(at: RoundedStep) -> Tensor:
    """Attention whose weights are divided by their sum after the product with v."""
    q = at.get("q")
    k = at.get("k").repeat_interleave(q.shape[1] // at.get("k").shape[1], 1)
    v = at.get("v").repeat_interleave(q.shape[1] // at.get("v").shape[1], 1)
    scores = torch.einsum("thd,shd->hts", q, k) * at.chain.scaling
    future = torch.ones(scores.shape[1:], dtype=torch.bool).triu(1)
    scores = scores.masked_fill(future, -torch.inf).float()
    weights = torch.exp(scores - scores.amax(-1, keepdim=True))
    product = torch.matmul(weights.to(q.dtype).float(), v.transpose(0, 1).float())
    return (product / weights.sum(-1, keepdim=True)).transpose(0, 1).to(q.dtype)


def angles_in_dtype(at: RoundedStep, x: Tensor) -> Tensor:
    positions = torch.arange(len(x))[:, None].to(x.dtype)
    return at.turn(x, (positions * at.chain.inv_freq).float())


def frequencies_in_dtype(at: RoundedStep, x: Tensor) -> Tensor:
    positions = torch.arange(len(x))[:, None].float()
    return at.turn(x, positions * at.chain.inv_freq.float())


def softmax_in_dtype(scores: Tensor) -> Tensor:
    largest = scores.amax(-1, keepdim=True)
    weights = torch.exp(scores - largest)
    return weights / weights.sum(-1, keepdim=True)


def columns_of_ranks(at: Step, kind: str, tp: int) -> list[Tensor]:
    """Which inputs of o_proj or down_proj each rank holds."""
    if kind == "mlp":
        size = at.get("inner").shape[1]
        return list(torch.arange(size).split(-(-size // tp)))
    num_heads = at.get("heads").shape[1]
    num_kv_heads = at.get("k").shape[1]
    columns = torch.arange(num_heads * at.chain.head_dim).view(num_heads, -1)  # H D
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
    weight = at.weight(path)
    total = torch.zeros((), dtype=x.dtype)
    for own in columns_of_ranks(at, kind, tp):
        total = total + F.linear(x[:, own], weight[:, own])
    bias = at.bias(path)
    return total if bias is None else total + bias


def tiles_in_dtype(at: Step, path: str, x: Tensor, size: int) -> Tensor:
    """A product that is accumulated in the audited dtype, tile by tile of its inputs."""
    weight = at.weight(path)
    total = torch.zeros((), dtype=x.dtype)
    for own in torch.arange(x.shape[1]).split(size):
        total = total + F.linear(x[:, own], weight[:, own])
    bias = at.bias(path)
    return total if bias is None else total + bias


def bias_after_sum(at: Step, kind: str) -> Tensor:
    path, x = row_parallel(at, kind)
    product = F.linear(x, at.weight(path))
    bias = at.bias(path)
    return product if bias is None else product + bias


def bias_after_rounding(at: Step, path: str) -> Tensor:
    return at.heads_of(F.linear(at.get("input_layernorm"), at.weight(path)) + at.bias(path))


@dataclass(frozen=True)
class Rounding:
    """A step that rounds differently; it shows at the first of `kinds` that was captured."""

    kinds: tuple[str, ...]
    what: str
    steps: dict[str, Knob]  # kind -> its computation
    is_wrong: bool = True  # HF's float32 is missing; else a clean port may do so
    grows: bool = False  # with the position: it is told, and fails once it is out of bounds


def roundings(dtype: torch.dtype, tp: int, has_bias: bool) -> Iterator[Rounding]:
    """What is looked for in each layer."""
    name = str(dtype).removeprefix("torch.")
    normed = ("input_layernorm", "v")
    yield Rounding(normed, f"RMSNorm in {name}", {"input_layernorm": norm_in_dtype})
    late = "a norm that is rounded after its weight"
    yield Rounding(normed, late, {"input_layernorm": norm_rounded_late}, is_wrong=False)
    yield Rounding(("q",), f"rotary angles in {name}", {"q": lambda at: angles_in_dtype(at, at.get("q_proj"))})
    frequencies = {"q": lambda at: frequencies_in_dtype(at, at.get("q_proj"))}
    yield Rounding(("q",), f"inv_freq in {name}", frequencies, grows=True)
    turned = {"q": lambda at: turned_in_float32(at, at.get("q_proj"))}
    yield Rounding(("q",), "a rotary embedding in float32", turned, is_wrong=False)
    yield Rounding(("heads",), f"softmax in {name}", {"heads": lambda at: at.attend(softmax_in_dtype)})
    yield Rounding(("heads",), "softmax divided after the product", {"heads": divided_late}, is_wrong=False)
    if tp > 1:
        for kind in ("attention", "mlp"):
            what = f"sums over {tp} ranks in {name}"
            summed = {kind: lambda at, kind=kind: sums_in_dtype(at, kind, tp)}
            yield Rounding((kind,), what, summed, is_wrong=False)
    elif has_bias:
        for kind in ("attention", "mlp"):
            late = {kind: lambda at, kind=kind: bias_after_sum(at, kind)}
            yield Rounding((kind,), "a bias that is added after the product was rounded", late, is_wrong=False)
    if has_bias:
        projections = {"q_proj": "self_attn.q_proj", "k_proj": "self_attn.k_proj", "v": "self_attn.v_proj"}
        for source, path in projections.items():
            after = (source, source.removesuffix("_proj"))
            knob = {source: lambda at, path=path: bias_after_rounding(at, path)}
            yield Rounding(after, "a bias that is added after the product was rounded", knob, is_wrong=False)


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
            return (difference / scale).masked_fill(~was_seen, 0.0)  # P n

        y = errors(port)
        if not torch.isfinite(y).all():  # there is worse to report
            return
        x = torch.stack([errors(other) for other in others], dim=1)  # P k n
        self.products.append(x @ x.transpose(1, 2))
        self.targets.append((x @ y[..., None])[..., 0])

    def solve(self) -> tuple[list[float], list[float]] | None:
        """The share of each, and its standard error; None if they cannot be told apart, or there are too few
        positions."""
        if not self.products:
            return None
        products = torch.cat(self.products)
        targets = torch.cat(self.targets)
        has_values = products.diagonal(dim1=1, dim2=2).sum(-1) > 0
        self.positions = count = int(has_values.sum())
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
        spread = inverse @ (rest.T @ rest) @ inverse * count / (count - len(sizes))
        return shares.tolist(), spread.diagonal().clamp(min=0).sqrt().tolist()


@dataclass
class Found:
    """What was measured of the texts' steps in the audited dtype."""

    shares: dict[tuple[str, tuple[str, ...]], Shares] = field(default_factory=dict)  # (kind, roundings)
    eps: dict[tuple, Shares] = field(default_factory=dict)  # (layer, norm); None: all of them
    allowed: dict[tuple[str, str], float] = field(default_factory=dict)  # (name, rounding) -> its squared errors
    harmless: set[str] = field(default_factory=set)  # roundings that a clean port may have
    growing: set[str] = field(default_factory=set)  # those that grow with the position


NORM_INPUTS = {"input_layernorm": "stream", "post_attention_layernorm": "middle"}
# of the mean square: what eps is changed by, so that the effect is far above float32's and still proportional
EPS_SHARE = 1e-3


def measure_roundings(model: nn.Module, dtype: torch.dtype, tp: int, texts: list) -> Found:
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
            by_kind: dict[str, list[Rounding]] = {}
            for rounding in wanted:
                kind = next((kind for kind in rounding.kinds if name_of_step(number, kind) in text.subject), None)
                if kind is not None:
                    by_kind.setdefault(kind, []).append(rounding)
            for kind, its in by_kind.items():
                add_roundings(found, text, flow, number, kind, its)
            for kind, norm in (("v", "input_layernorm"), ("mlp", "post_attention_layernorm")):
                add_eps(found, text, flow, number, kind, norm)
            text.flow.forget(number)
    return found


def flow_of_layer(chain: RoundedChain, text: object, number: int) -> Flow:
    """The port's tensors of a layer, and what the layer gets, in the audited dtype."""
    flow = Flow(chain, text.ids[:-1], text.subject, text.seen)
    for name in (f"hidden_states.{number}", *(name for name in text.subject if name.startswith(f"layers.{number}."))):
        if name in text.has:
            flow.values[name] = text.has[name].to(chain.dtype)
    return flow


def add_roundings(found: Found, text: object, flow: Flow, number: int, kind: str, its: list[Rounding]) -> None:
    name = name_of_step(number, kind)
    step = text.step[name]
    results = [flow.chain.compute(name, flow.arrived)]
    whats = []
    for rounding in its:
        steps = {name_of_step(number, source): knob for source, knob in rounding.steps.items()}
        other = flow.changed(steps, name).get(name)
        if other is None:  # what it would change was captured itself
            continue
        results.append(other)
        whats.append(rounding.what)
        if not rounding.is_wrong:
            key = (name, rounding.what)
            found.allowed[key] = found.allowed.get(key, 0.0) + text.squared_errors(other, step, text.seen[name])
    shares = found.shares.setdefault((kind, tuple(whats)), Shares())
    shares.add(text.subject[name], step, results, text.seen[name])


def add_eps(found: Found, text: object, flow: Flow, number: int, kind: str, norm: str) -> None:
    """How far another eps is in the port's errors, from the first place after a norm that was captured."""
    after = norm if name_of_step(number, norm) in text.subject else kind
    name = name_of_step(number, after)
    if name not in text.subject:
        return
    steps = {name_of_step(number, norm): lambda at: other_eps(at, norm)}
    step = text.step[name]
    change = text.flow.changed(steps, name)[name] - step
    x = text.flow.arrived(name_of_step(number, NORM_INPUTS[norm]))
    other = step + change * text.flow.chain.eps / (EPS_SHARE * float(x.pow(2).mean()))  # as if eps were twice as large
    hf = flow.chain.compute(name, flow.arrived)
    scaled = 1.01 * step  # of which another weight may look like another eps
    for key in ((None, None), (None, norm), (number, norm)):
        shares = found.eps.setdefault(key, Shares())
        shares.add(text.subject[name], step, [hf, other, scaled], text.seen[name])


def other_eps(at: Step, norm: str) -> Tensor:
    x = at.get(NORM_INPUTS[norm])
    return rms_norm(x, at.weight(norm), at.chain.eps + EPS_SHARE * float(x.pow(2).mean()))


def name_of_tiles(text: object, name: str) -> str:
    """A product that is accumulated in the audited dtype, found in the errors of the place after it; or nothing."""
    chain = RoundedChain(text.flow.chain.model, text.dtype, len(text.ids))
    number, kind = step_of_name(name, chain.layers)
    path = LINEAR.get({"q": "q_proj", "k": "k_proj"}.get(kind, kind))
    if path is None or number is None:
        return ""
    source = {"q": "q_proj", "k": "k_proj"}.get(kind, kind)
    flow = flow_of_layer(chain, text, number)
    hf = chain.compute(name, flow.arrived)
    best = ("", 0.0)
    for size in (8, 16, 32, 64, 128, 256, 512, 1024):
        if size >= chain.weights.get(f"model.layers.{number}.{path}.weight").shape[1]:
            break

        def tiled(at: Step, size: int = size) -> Tensor:
            x = row_parallel(at, kind)[1] if kind in ("attention", "mlp") else at.get("input_layernorm")
            product = tiles_in_dtype(at, path, x, size)
            return product if kind in ("attention", "mlp") else at.heads_of(product)

        other = flow.changed({name_of_step(number, source): tiled}, name).get(name)
        shares = Shares()
        if other is not None:
            shares.add(text.subject[name], text.step[name], [hf, other], text.seen[name])
        solved = shares.solve()
        if solved is not None and solved[0][1] > max(best[1], 0.6 + 2 * solved[1][1]):
            best = (
                f"products are accumulated in {str(text.dtype).removeprefix('torch.')}, by tiles of {size}",
                solved[0][1],
            )
    return best[0]

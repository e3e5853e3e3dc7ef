"""An audit's numbers and its verdict: a subject beside Hugging Face, place by place.

R and own R are defined in `tools.audit`. The bounds come from clean runs (docs/audit.md lists them), with room for the
scatter of a small sample. Nothing is tuned to a model, a text or a layer.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from llama_neuron import shard_heads
from tools.audit.causes import Case, explain
from tools.audit.oracle import EXACT, OPTIONAL, STEPS, Seen, exact_steps, in_dtype, widen
from tools.audit.rounding import rounding_shares

# A bound is one of these plus 4 / sqrt(n), because the ratio of two roots of n squares scatters by about 1 / sqrt(n).
# For R, n counts positions, since the errors of one position go together.
R_BOUND = {torch.bfloat16: 2.0, torch.float16: 2.0, torch.float32: 3.0}
# For own R, n counts values. A row: kinds of place, the bound at one place, and the bound of the kind in all layers
# without the largest errors. The first row that matches counts.
HALF = [(r"heads|mlp", 2.5, 1.15), (r".*", 2.5, 1.1)]
SINGLE = [(r".*", 3.0, 2.0)]
OWN_BOUNDS = {torch.bfloat16: HALF, torch.float16: HALF, torch.float32: SINGLE}
# Ranks round their parts of o_proj and down_proj before adding them, and a part may be larger than the sum.
RANKS = [(r"attention", 4.0, 2.5), (r"mlp", 2.5, 1.3)]
HEADS = ("q_proj", "k_proj", "q", "k", "v", "heads")
STREAM = ("embedding", "residual", "final_norm", "logits")
MODULES = {
    "embedding": "embed_tokens",
    "residual": "the layer's sum",
    "final_norm": "norm",
    "logits": "lm_head",
    "q_proj": "self_attn",
    "k_proj": "self_attn",
    "q": "self_attn",
    "k": "self_attn",
    "v": "self_attn",
    "heads": "self_attn",
    "attention": "self_attn",
    "input_layernorm": "self_attn",
    "post_attention_layernorm": "mlp",
    "mlp": "mlp",
}


def squares(x: Tensor) -> Tensor:
    """[P,...] -> sums of squares [P]."""
    return x.flatten(1).pow(2).sum(-1)


def step_errors(x: Tensor, step: Tensor) -> Tensor:
    """The error of each value of x [P,...] against the exact `step`, relative to its size and the median size at its
    position. Llamas have a few huge activations: relative to the norm, an error would show the rounding of those
    alone."""
    flat = step.flatten(1)
    magnitude = flat.abs()
    size = magnitude + magnitude.median(dim=-1, keepdim=True).values
    errors = (x.flatten(1) - flat) / size.clamp(min=1e-30)
    return errors.view(step.shape)


@dataclass(frozen=True)
class Errors:
    """Squared errors of one place of one text, [P]: against HF exact, and of the step alone. HF's are at least half a
    rounding: where HF is exact (an embedding), a subject has to be exact too."""

    numbers: Tensor  # int [P], how many were captured
    subject: Tensor
    hf: Tensor
    own_subject: Tensor
    own_hf: Tensor
    clipped: tuple[float, float]  # own_subject and own_hf in all, errors beyond five times HF's median counting as that


@dataclass
class Text:
    """One text of an audit: tensors [P,...] by tools.capture's names, at the P positions that were fed."""

    ids: Tensor  # int64 [P+1]
    prompt: int  # its tokens
    subject: dict[str, Tensor]
    seen: dict[str, Tensor]  # where the subject was captured, bool [P] or [P,heads]
    hf: dict[str, Tensor]  # in the audited dtype
    dtype: torch.dtype
    greedy: Tensor | None = None  # int32 [P], the subject's own choices
    has: dict[str, Tensor] = field(default_factory=dict)  # the subject's, exact steps where it was not captured
    exact: dict[str, Tensor] = field(default_factory=dict)
    step: dict[str, Tensor] = field(default_factory=dict)  # exact, from the subject's inputs to each step
    hf_step: dict[str, Tensor] = field(default_factory=dict)  # exact, from HF's
    known: dict[str, Errors] = field(default_factory=dict)

    def run(self, model: nn.Module) -> None:
        """Fills in the exact tensors. What was not captured becomes zero in all of them, and counts nowhere."""
        exact_dtype = EXACT[self.dtype]
        nothing = Seen({}, {})
        subject = Seen(self.subject, self.seen)
        hf = Seen({name: self.hf[name] for name in self.subject}, self.seen)
        steps = exact_steps(model, self.ids[:-1], [nothing, subject, hf], exact_dtype)
        self.exact, self.step, self.hf_step = steps
        self.has = {name: subject.fill(name, value) for name, value in self.step.items()}
        for name, seen in self.seen.items():
            for tensors in (self.subject, self.hf, *steps):
                x = tensors[name].to(exact_dtype)
                tensors[name] = torch.where(widen(seen, x), x, 0)

    def errors(self, name: str) -> Errors:
        """Errors at a place. Computed once."""
        if name not in self.known:
            self.known[name] = self.measure(name)
        return self.known[name]

    def measure(self, name: str) -> Errors:
        subject = self.subject[name]
        hf = self.hf[name]
        exact = self.exact[name]
        mine = step_errors(subject, self.step[name])
        theirs = step_errors(hf, self.hf_step[name])
        was_seen = widen(self.seen[name], subject).expand_as(subject)
        numbers = was_seen.flatten(1).sum(-1)  # P
        least = (torch.finfo(self.dtype).eps / 8) ** 2
        errors = theirs[theirs != 0].abs()
        limit = 5 * float(errors.median()) if len(errors) else 0.0

        def clipped(x: Tensor) -> float:
            x = x.clamp(-limit, limit)
            return float(x.pow(2).sum(dtype=torch.float64))

        return Errors(
            numbers=numbers,
            subject=squares(subject - exact),
            hf=squares(hf - exact).maximum(least * squares(exact)),
            own_subject=squares(mine),
            own_hf=squares(theirs).maximum(least / 4 * numbers),
            clipped=(clipped(mine), clipped(theirs)),
        )

    def phase(self, name: str) -> slice:
        if name == "prefill":
            return slice(0, self.prompt)
        return slice(self.prompt, len(self.ids) - 1)


def place_names(layers: int) -> dict[str, str]:
    """A report's places -> tools.capture's names, in the order of the data."""
    names = {"embedding": "hidden_states.0"}
    for number in range(layers):
        for step in STEPS:
            names[f"layers.{number}.{step}"] = f"layers.{number}.{step}"
        names[f"layers.{number}.residual"] = f"hidden_states.{number + 1}"
    names["final_norm"] = "final_norm"
    names["logits"] = "logits"
    return names


def layer_and_kind(place: str) -> tuple[int | None, str]:
    if not place.startswith("layers."):
        return None, place
    _, number, kind = place.split(".")
    return int(number), kind


# ---- measures


def ratio(parts: list[tuple[Tensor, Tensor]]) -> float:
    """The root of the ratio of two sums. A part holds the squares of one text, at its positions."""
    above = sum(float(x.sum()) for x, _ in parts)
    below = sum(float(y.sum()) for _, y in parts)
    if above == 0:
        return 1.0 if below == 0 else 0.0
    if below == 0:
        return float("inf")
    return (above / below) ** 0.5


def ulps(subject: Tensor, hf: Tensor, dtype: torch.dtype) -> float:
    """The largest difference, in units in the last place of HF's value, or of the mean size at its position if that
    is larger: near zero an ulp says nothing."""
    mean_size = hf.pow(2).mean(-1, keepdim=True).sqrt()
    size = torch.maximum(hf.abs(), mean_size).clamp(min=1e-30)
    power = size.log2().floor()
    ulp = torch.exp2(power) * torch.finfo(dtype).eps
    difference = (subject - hf).abs()
    return float((difference / ulp).max())


@dataclass(frozen=True)
class Bounds:
    """The bounds of an audit; `given`: (regular expression of places, bound) that come before the built-in ones."""

    dtype: torch.dtype
    tp: int
    given: list[tuple[str, float]]

    def of(self, place: str, positions: int, numbers: int) -> tuple[float, float, float]:
        """The bounds of R at a place, of own R there, and of own R of the kind in all layers."""
        r, own, kind = self.without_scatter(place)
        by_position = 4 / positions**0.5
        by_number = 4 / numbers**0.5
        return r + by_position, own + by_number, kind + by_number

    def without_scatter(self, place: str) -> tuple[float, float, float]:
        for pattern, limit in self.given:
            if re.fullmatch(pattern, place):
                return limit, limit, limit
        table = OWN_BOUNDS[self.dtype]
        if self.tp > 1 and self.dtype != torch.float32:
            table = RANKS + table
        step = place.rpartition(".")[2]
        _, own, kind = next(row for row in table if re.fullmatch(row[0], step))
        return R_BOUND[self.dtype], own, kind


def measure(texts: list[Text], place: str, name: str, phase: str, bounds: Bounds) -> dict | None:
    """A row of the report; None if nothing was captured there."""
    numbers = 0
    positions = 0
    far = []
    own = []
    subjects = []
    hfs = []
    for text in texts:
        part = text.phase(phase)
        errors = text.errors(name)
        captured = errors.numbers[part]
        numbers += int(captured.sum())
        positions += int((captured > 0).sum())
        far.append((errors.subject[part], errors.hf[part]))
        own.append((errors.own_subject[part], errors.own_hf[part]))
        subjects.append(text.subject[name][part].flatten(1))
        hfs.append(text.hf[name][part].flatten(1))
    if numbers == 0:
        return None
    subject = torch.cat(subjects)
    hf = torch.cat(hfs)
    difference = (subject - hf).abs()
    size = hf.norm().clamp(min=1e-30)
    cosine = F.cosine_similarity(subject.flatten(), hf.flatten(), dim=0)
    own_r = ratio(own)
    r_bound, own_bound, _ = bounds.of(place, positions, numbers)
    layer, kind = layer_and_kind(place)
    return {
        "place": place,
        "layer": layer,
        "kind": kind,
        "phase": phase,
        "max_abs": float(difference.max()),
        "mean_abs": float(difference.sum() / numbers),
        "rel_l2": float(difference.norm() / size),
        "cosine": float(cosine),
        "max_ulp": ulps(subject, hf, bounds.dtype),
        "r": ratio(far),
        "own_r": own_r,
        "r_bound": r_bound,
        "own_bound": own_bound,
        "ok": own_r <= own_bound,  # NaN is not
    }


def measure_kind(texts: list[Text], kind: str, names: list[str], bounds: Bounds) -> dict:
    """own R of a kind of place in all layers, without the largest errors: those scatter, and `measure` finds them. So
    the bound can be tight enough to show a rounding that HF does not make."""
    numbers = 0
    above = 0.0
    below = 0.0
    for text in texts:
        for name in names:
            errors = text.errors(name)
            captured = int(errors.numbers.sum())
            numbers += captured
            if kind == "heads":  # the values of a head share the errors of its scores
                head_dim = text.hf[name].shape[-1]
                numbers -= captured * (head_dim - 1) // head_dim
            subject_errors, hf_errors = errors.clipped
            above += subject_errors
            below += hf_errors
    own_r = (above / below) ** 0.5 if below else 1.0
    _, _, bound = bounds.of(f"layers.*.{kind}", 1, numbers)
    return {"kind": kind, "own_r": own_r, "own_bound": bound, "ok": own_r <= bound}


def mark_lasting(rows: list[dict]) -> None:
    """R out of bounds counts if it stays so to the end. A spike that goes away comes from rounding a few large
    values."""
    for row in reversed(rows):
        inside = row["r"] <= row["r_bound"]
        if row["kind"] in STREAM and inside:
            return
        row["ok"] = row["ok"] and inside


# ---- the first place out of bounds


def find_wrong(text: Text, name: str, heads: bool, typical: float) -> Tensor:
    """bool [P], or [P,n] of heads: where the mean square of the step's errors is nine times HF's `typical` one."""
    errors = step_errors(text.subject[name], text.step[name])
    if not heads:
        errors = errors.flatten(1)
    return ~(errors.pow(2).mean(-1) <= 9 * typical)  # NaN is wrong


def find_first(texts: list[Text], row: dict, name: str, tp: int) -> tuple[dict, Tensor]:
    """The report's `first` for a row, and where its text is wrong, bool [P] or [P,n]."""
    heads = row["kind"] in HEADS
    typical = typical_error(texts, name)
    masks = []
    for text in texts:
        wrong = find_wrong(text, name, heads, typical)
        if row["phase"] == "decode":
            wrong[: text.prompt] = False
        masks.append(wrong)
    counts = [int(wrong.sum()) for wrong in masks]
    most = max(counts)
    best = counts.index(most)
    text = texts[best]
    wrong = masks[best]
    if most == 0 or row["ok"]:  # more rounding everywhere, and nowhere much
        wrong = torch.ones_like(wrong)
    by_position = wrong.any(1) if heads else wrong
    positions = by_position.nonzero().flatten().tolist()
    wrong_heads = []
    if heads and not wrong.any(0).all():
        wrong_heads = wrong.any(0).nonzero().flatten().tolist()
    confined = []
    if len(texts) > 1 and most > 0 and 0 in counts:
        rows = [number for number, count in enumerate(counts) if count]
        confined.append(f"rows {rows} of the batch")
    start = text.prompt if row["phase"] == "decode" else 0
    length = len(by_position) - start
    if positions[0] > start or len(positions) < length:
        confined.append(f"positions {positions[0]} to {positions[-1]}, {len(positions)} of {length}")
    first = {
        "place": row["place"],
        "layer": row["layer"],
        "phase": row["phase"],
        "module": MODULES[row["kind"]],
        "row": best,
        "position": positions[0],
        "heads": wrong_heads,
        "step": step_number(text, positions[0]),
        "ranks": confined_ranks(text, row["kind"], wrong_heads, tp),
        "confined": confined,
    }
    return first, wrong


def typical_error(texts: list[Text], name: str) -> float:
    """The mean square of HF's own errors at a place."""
    errors = [text.errors(name) for text in texts]
    numbers = sum(int(error.numbers.sum()) for error in errors)
    return sum(float(error.own_hf.sum()) for error in errors) / numbers


def step_number(text: Text, position: int) -> int:
    """The call of the model that computes a position: 0 is prefill."""
    return max(0, position - text.prompt + 1)


def confined_ranks(text: Text, kind: str, numbers: list[int], tp: int) -> list[int]:
    """The ranks that hold these heads, if they hold no others."""
    num_heads = text.hf["layers.0.q"].shape[1]
    num_kv_heads = text.hf["layers.0.k"].shape[1]
    wanted = set(numbers)
    found = []
    covered = set()
    for rank, (query_heads, kv_heads) in enumerate(shard_heads(num_heads, num_kv_heads, tp)):
        heads = kv_heads if kind in ("k", "k_proj", "v") else query_heads
        own = set(heads) - {None}
        if own and own <= wanted:
            found.append(rank)
            covered |= own
    return found if covered == wanted else []


def find_cause(text: Text, first: dict, wrong: Tensor, model: nn.Module, dtype: torch.dtype, tp: int) -> dict:
    """An entry of the report's `causes`."""
    name = place_names(model.config.num_hidden_layers)[first["place"]]
    step = text.step[name]
    subject = text.subject[name]
    hf_step = text.hf_step[name]
    layer, kind = layer_and_kind(first["place"])
    case = Case(
        model=model,
        number=layer,
        kind=kind,
        tp=tp,
        dtype=dtype,
        ids=text.ids[:-1],
        prompt=text.prompt,
        has=text.has,
        step=step,
        port=subject,
        wrong=wrong,
    )
    rounding = (text.hf[name] - hf_step).norm() / hf_step.norm()  # as a share of the size
    difference = (subject - step)[wrong].norm() / step[wrong].norm()
    if layer is None:
        modules = nn.ModuleList([model.model.embed_tokens, model.model.norm, model.lm_head])
    else:
        modules = model.model.layers[layer]
    with in_dtype(modules, EXACT[dtype]), torch.inference_mode():
        meaning, evidence = explain(case, float(rounding / difference))
    return {"name": kind, "meaning": meaning, "evidence": evidence}


def rounding_causes(texts: list[Text], model: nn.Module, dtype: torch.dtype, kinds: list[dict]) -> list[dict]:
    """RMSNorm, rotary angles or softmax in the audited dtype, where HF computes in float32. Adds the shares to
    `kinds`."""
    found = []
    for kind, (what, share, error) in rounding_shares(model, dtype, texts).items():
        for row in kinds:
            if row["kind"] == kind:
                row["of"] = what
                row["share"] = share
                row["share_error"] = error
        if 0.25 + 3 * error < share < 1.3:
            meaning = f"{what}, HF computes it in float32"
            evidence = f"its rounding is in the errors of {kind}: share {share:.2f} +- {error:.2f}, HF's is 0"
            found.append({"name": kind, "meaning": meaning, "evidence": evidence})
    return found


# ---- the verdict


def judge(texts: list[Text], model: nn.Module, dtype: torch.dtype, tp: int, given: list[tuple[str, float]]) -> dict:
    """The part of a report that is computed. `model` is HF's, in any dtype; for the bounds in `given` see `Bounds`."""
    bounds = Bounds(dtype, tp, given)
    names = place_names(model.config.num_hidden_layers)
    for text in texts:
        text.run(model)
    seen = {}
    not_seen = []
    for place, name in names.items():
        if all(name in text.subject for text in texts):
            seen[place] = name
        elif layer_and_kind(place)[1] not in OPTIONAL:
            not_seen.append(place)
    rows = measure_places(texts, seen, bounds)
    kinds = measure_kinds(texts, seen, rows, bounds)
    causes = []
    if dtype != torch.float32:
        causes = rounding_causes(texts, model, dtype, kinds)
    first = None
    row = first_failure(rows, kinds, causes)
    if row is not None:
        first, wrong = find_first(texts, row, names[row["place"]], tp)
        if not causes or not row["own_r"] <= row["own_bound"]:
            cause = find_cause(texts[first["row"]], first, wrong, model, dtype, tp)
            causes.insert(0, cause)
    choice = find_wrong_choice(texts)
    if first is None and choice is not None:
        first, cause = choice
        causes = [cause]
    return {
        "passed": first is None,
        "bitwise": all(same_bits(text, name) for text in texts for name in seen.values()),
        "bounds": [{"places": pattern, "r": limit, "own_r": limit} for pattern, limit in given],
        "places": rows,
        "kinds": kinds,
        "not_seen": not_seen,
        "strip": {"places": list(seen), "r": [position_ratios(texts, name) for name in seen.values()]},
        "first": first,
        "causes": causes,
    }


def measure_places(texts: list[Text], seen: dict[str, str], bounds: Bounds) -> list[dict]:
    """The report's `places`: a place's prefill and its decoding beside each other, in the order of the data."""
    rows = []
    for phase in ("prefill", "decode"):
        found = []
        for place, name in seen.items():
            row = measure(texts, place, name, phase, bounds)
            if row is not None:
                found.append(row)
        mark_lasting(found)
        rows += found
    order = list(seen)
    return sorted(rows, key=lambda row: order.index(row["place"]))


def measure_kinds(texts: list[Text], seen: dict[str, str], rows: list[dict], bounds: Bounds) -> list[dict]:
    """The report's `kinds`."""
    kinds = []
    for kind in dict.fromkeys(row["kind"] for row in rows):
        if kind != "embedding":
            names = [name for place, name in seen.items() if layer_and_kind(place)[1] == kind]
            kinds.append(measure_kind(texts, kind, names, bounds))
    return kinds


def first_failure(rows: list[dict], kinds: list[dict], causes: list[dict]) -> dict | None:
    """The row that an audit fails at: the first that is out of bounds by itself, if there is one. Where no row failed,
    all layers together may still be out of bounds, or a rounding was found."""
    failed = [row for row in rows if not row["ok"]]
    if not failed:
        guilty = {row["kind"] for row in kinds if not row["ok"]}
        guilty.update(cause["name"] for cause in causes)
        failed = [row for row in rows if row["kind"] in guilty]
    for row in failed:
        if not row["own_r"] <= row["own_bound"]:
            return row
    return failed[0] if failed else None


def find_wrong_choice(texts: list[Text]) -> tuple[dict, dict] | None:
    """The first greedy choice that is not the largest of the subject's own logits, with its cause."""
    for row, text in enumerate(texts):
        if text.greedy is None or "logits" not in text.subject:
            return None
        logits = text.subject["logits"]
        greedy = text.greedy.long()
        size = logits.shape[-1]
        inside = greedy.clamp(0, size - 1)
        chosen = logits.gather(-1, inside[:, None])[:, 0]
        is_largest = chosen >= logits.amax(-1)
        is_wrong = (greedy != inside) | ~is_largest
        wrong = is_wrong.nonzero().flatten().tolist()
        if not wrong:
            continue
        position = wrong[0]
        token = int(greedy[position])
        first = {
            "place": "logits",
            "layer": None,
            "module": "the greedy choice",
            "row": row,
            "position": position,
            "phase": "prefill" if position < text.prompt else "decode",
            "heads": [],
            "ranks": [],
            "step": step_number(text, position),
            "confined": [f"{len(wrong)} positions"],
        }
        meaning = "the greedy choice is not the largest logit: ranks are combined in another order"
        if token >= size:
            meaning = "lm_head's padding is not masked: the greedy choice is beyond the vocabulary"
        cause = {"name": "greedy", "meaning": meaning, "evidence": f"token {token} of {size} was chosen"}
        return first, cause
    return None


def same_bits(text: Text, name: str) -> bool:
    return torch.equal(text.subject[name], text.hf[name])


def position_ratios(texts: list[Text], name: str) -> list[list[float | None]]:
    """R at each position of each text; None where nothing was captured."""
    found = []
    for text in texts:
        errors = text.errors(name)
        ratios = (errors.subject / errors.hf.clamp(min=1e-30)).sqrt()
        row: list[float | None] = ratios.tolist()
        for position, numbers in enumerate(errors.numbers.tolist()):
            if numbers == 0:
                row[position] = None
        found.append(row)
    return found

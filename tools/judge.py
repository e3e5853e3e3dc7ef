"""An audit's numbers and its verdict: a subject beside Hugging Face, place by place.

R and own R are defined in `tools.audit`. Bounds are those of clean runs (docs/audit.md says which), with room for the
scatter of few numbers. Nothing is tuned to a model, a text or a layer.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from llama_neuron import shard_heads
from tools.causes import Case, explain
from tools.oracle import EXACT, OPTIONAL, STEPS, Seen, exact_steps, in_dtype, widen
from tools.rounding import rounding_shares

# Bounds are these and room for scatter, 4 / sqrt(n): a ratio of two roots of n squares scatters by about 1 / sqrt(n).
R_BOUND = {torch.bfloat16: 2.0, torch.float16: 2.0, torch.float32: 3.0}  # n: positions, since a position errs as one
# of own R: at a place, and of its kind in all layers, without the largest errors; n: numbers. The first match counts
HALF = [(r"heads|mlp", 2.5, 1.15), (r".*", 2.5, 1.1)]
OWN_BOUNDS = {torch.bfloat16: HALF, torch.float16: HALF, torch.float32: [(r".*", 3.0, 2.0)]}
# ranks round their parts of o_proj and down_proj before they are added, and parts may be larger than their sum
RANKS = [(r"attention", 4.0, 2.5), (r"mlp", 2.5, 1.3)]
HEADS = ("q_proj", "k_proj", "q", "k", "v", "heads")
STREAM = ("embedding", "residual", "final_norm", "logits")
MODULES = {"embedding": "embed_tokens", "residual": "the layer's sum", "final_norm": "norm", "logits": "lm_head"}
MODULES |= dict.fromkeys((*HEADS, "attention", "input_layernorm"), "self_attn")
MODULES |= dict.fromkeys(("post_attention_layernorm", "mlp"), "mlp")


def squares(x: Tensor) -> Tensor:
    """[P,...] -> sums of squares [P]."""
    return x.flatten(1).pow(2).sum(-1)


def step_errors(x: Tensor, step: Tensor) -> Tensor:
    """Of a step [P,...]: each number's error, relative to its size and the median size at its position. A norm would
    be that of the few huge activations that Llamas have, and tell their rounding alone."""
    flat = step.flatten(1)
    size = flat.abs() + flat.abs().median(dim=-1, keepdim=True).values
    return ((x.flatten(1) - flat) / size.clamp(min=1e-30)).view(step.shape)


@dataclass(frozen=True)
class Errors:
    """Squares of errors of one place of one text, [P]: from HF exact, and of the step alone. HF's are at least those of
    half a rounding: where HF is exact (an embedding), a subject has to be."""

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
        nothing, subject = Seen({}, {}), Seen(self.subject, self.seen)
        hf = Seen({name: self.hf[name] for name in self.subject}, self.seen)
        self.exact, self.step, self.hf_step = exact_steps(
            model, self.ids[:-1], [nothing, subject, hf], EXACT[self.dtype]
        )
        self.has = {name: subject.fill(name, value) for name, value in self.step.items()}
        for name, seen in self.seen.items():
            for tensors in (self.subject, self.hf, self.exact, self.step, self.hf_step):
                x = tensors[name].to(EXACT[self.dtype])
                tensors[name] = torch.where(widen(seen, x), x, 0)

    def errors(self, name: str) -> Errors:
        """Errors at a place. Computed once."""
        if name not in self.known:
            self.known[name] = self.measure(name)
        return self.known[name]

    def measure(self, name: str) -> Errors:
        subject, hf, exact = self.subject[name], self.hf[name], self.exact[name]
        mine, theirs = step_errors(subject, self.step[name]), step_errors(hf, self.hf_step[name])
        numbers = widen(self.seen[name], subject).expand_as(subject).flatten(1).sum(-1)  # P
        least = (torch.finfo(self.dtype).eps / 8) ** 2
        errors = theirs[theirs != 0].abs()
        limit = 5 * float(errors.median()) if len(errors) else 0.0
        clipped = [float(x.clamp(-limit, limit).pow(2).sum(dtype=torch.float64)) for x in (mine, theirs)]
        return Errors(
            numbers=numbers,
            subject=squares(subject - exact),
            hf=squares(hf - exact).maximum(least * squares(exact)),
            own_subject=squares(mine),
            own_hf=squares(theirs).maximum(least / 4 * numbers),
            clipped=(clipped[0], clipped[1]),
        )

    def phase(self, name: str) -> slice:
        return slice(0, self.prompt) if name == "prefill" else slice(self.prompt, len(self.ids) - 1)


def place_names(layers: int) -> dict[str, str]:
    """A report's places -> tools.capture's names, in the order of the data."""
    names = {"embedding": "hidden_states.0"}
    for number in range(layers):
        for step in STEPS:
            names[f"layers.{number}.{step}"] = f"layers.{number}.{step}"
        names[f"layers.{number}.residual"] = f"hidden_states.{number + 1}"
    return names | {"final_norm": "final_norm", "logits": "logits"}


def layer_and_kind(place: str) -> tuple[int | None, str]:
    if not place.startswith("layers."):
        return None, place
    _, number, kind = place.split(".")
    return int(number), kind


# ---- measures


def ratio(parts: list[tuple[Tensor, Tensor]]) -> float:
    """The root of the ratio of two sums, of squares at positions."""
    above, below = sum(float(x.sum()) for x, _ in parts), sum(float(y.sum()) for _, y in parts)
    if above == 0:
        return 1.0 if below == 0 else 0.0
    return (above / below) ** 0.5 if below else float("inf")


def ulps(subject: Tensor, hf: Tensor, dtype: torch.dtype) -> float:
    """The largest difference, in units in the last place of HF's number, or of the mean size at its position if that
    is larger: near zero an ulp says nothing."""
    size = torch.maximum(hf.abs(), hf.pow(2).mean(-1, keepdim=True).sqrt()).clamp(min=1e-30)
    ulp = torch.exp2(size.log2().floor()) * torch.finfo(dtype).eps
    return float(((subject - hf).abs() / ulp).max())


@dataclass(frozen=True)
class Bounds:
    """The bounds of an audit; `given`: (regular expression of places, bound) that come before the built-in ones."""

    dtype: torch.dtype
    tp: int
    given: list[tuple[str, float]]

    def of(self, place: str, positions: int, numbers: int) -> tuple[float, float, float]:
        """R's bound at a place, own R's, and that of own R of the kind in all layers."""
        table = OWN_BOUNDS[self.dtype]
        if self.tp > 1 and self.dtype != torch.float32:
            table = RANKS + table
        _, own, kind = next(row for row in table if re.fullmatch(row[0], place.rpartition(".")[2]))
        r = R_BOUND[self.dtype]
        for pattern, limit in self.given:
            if re.fullmatch(pattern, place):
                r = own = kind = limit
                break
        return r + 4 / positions**0.5, own + 4 / numbers**0.5, kind + 4 / numbers**0.5


def measure(texts: list[Text], place: str, name: str, phase: str, bounds: Bounds) -> dict | None:
    """A row of the report; None if nothing was captured there."""
    numbers, positions, far, own, subjects, hfs = 0, 0, [], [], [], []
    for text in texts:
        part, errors = text.phase(phase), text.errors(name)
        numbers += int(errors.numbers[part].sum())
        positions += int((errors.numbers[part] > 0).sum())
        far.append((errors.subject[part], errors.hf[part]))
        own.append((errors.own_subject[part], errors.own_hf[part]))
        subjects.append(text.subject[name][part].flatten(1))
        hfs.append(text.hf[name][part].flatten(1))
    if numbers == 0:
        return None
    subject, hf = torch.cat(subjects), torch.cat(hfs)
    difference, own_r = (subject - hf).abs(), ratio(own)
    r_bound, own_bound, _ = bounds.of(place, positions, numbers)
    layer, kind = layer_and_kind(place)
    return {
        "place": place,
        "layer": layer,
        "kind": kind,
        "phase": phase,
        "max_abs": float(difference.max()),
        "mean_abs": float(difference.sum() / numbers),
        "rel_l2": float(difference.norm() / hf.norm().clamp(min=1e-30)),
        "cosine": float(torch.nn.functional.cosine_similarity(subject.flatten(), hf.flatten(), dim=0)),
        "max_ulp": ulps(subject, hf, bounds.dtype),
        "r": ratio(far),
        "own_r": own_r,
        "r_bound": r_bound,
        "own_bound": own_bound,
        "ok": own_r <= own_bound,  # NaN is not
    }


def measure_kind(texts: list[Text], kind: str, names: list[str], bounds: Bounds) -> dict:
    """own R of a kind of place in all layers, without the largest errors: those scatter, and are for `measure` to find.
    So the bound is tight, and a rounding that HF does not make shows."""
    numbers, above, below = 0, 0.0, 0.0
    for text in texts:
        for name in names:
            errors = text.errors(name)
            numbers += int(errors.numbers.sum())
            if kind == "heads":  # the numbers of a head share the errors of its scores
                numbers -= int(errors.numbers.sum()) * (text.hf[name].shape[-1] - 1) // text.hf[name].shape[-1]
            above, below = above + errors.clipped[0], below + errors.clipped[1]
    own_r = (above / below) ** 0.5 if below else 1.0
    _, _, bound = bounds.of(f"layers.*.{kind}", 1, numbers)
    return {"kind": kind, "own_r": own_r, "own_bound": bound, "ok": own_r <= bound}


def mark_lasting(rows: list[dict]) -> None:
    """R out of bounds counts if it stays so to the end. A spike that goes away is rounding of a few large numbers."""
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
    numbers = sum(int(text.errors(name).numbers.sum()) for text in texts)
    typical = sum(float(text.errors(name).own_hf.sum()) for text in texts) / numbers
    masks = []
    for text in texts:
        wrong = find_wrong(text, name, heads, typical)
        if row["phase"] == "decode":
            wrong[: text.prompt] = False
        masks.append(wrong)
    counts = [int(wrong.sum()) for wrong in masks]
    best = counts.index(max(counts))
    wrong = masks[best]
    if not counts[best] or row["ok"]:  # more rounding everywhere, and nowhere much
        wrong = torch.ones_like(wrong)
    by_position = wrong.any(1) if heads else wrong
    positions = by_position.nonzero().flatten().tolist()
    which = []
    if heads and not wrong.any(0).all():
        which = wrong.any(0).nonzero().flatten().tolist()
    prompt, fed = texts[best].prompt, len(by_position)
    first = {key: row[key] for key in ("place", "layer", "phase")}
    first |= {"module": MODULES[row["kind"]], "row": best, "position": positions[0], "heads": which}
    first["step"] = max(0, positions[0] - prompt + 1)  # 0 is prefill
    first["ranks"] = confined_ranks(texts[best], row["kind"], which, tp)
    confined = []
    if len(texts) > 1 and 0 in counts and max(counts):
        confined.append(f"rows {[number for number, count in enumerate(counts) if count]} of the batch")
    start = prompt if row["phase"] == "decode" else 0
    if positions[0] > start or len(positions) < fed - start:
        confined.append(f"positions {positions[0]} to {positions[-1]}, {len(positions)} of {fed - start}")
    return first | {"confined": confined}, wrong


def confined_ranks(text: Text, kind: str, numbers: list[int], tp: int) -> list[int]:
    """The ranks whose heads these are, and all of whose heads these are."""
    query, key = text.hf["layers.0.q"].shape[1], text.hf["layers.0.k"].shape[1]
    found, covered = [], set()
    for rank, (queries, keys) in enumerate(shard_heads(query, key, tp)):
        own = {head for head in (keys if kind in ("k", "k_proj", "v") else queries) if head is not None}
        if own and own <= set(numbers):
            found.append(rank)
            covered |= own
    return found if covered == set(numbers) else []


def find_cause(text: Text, first: dict, wrong: Tensor, model: nn.Module, dtype: torch.dtype, tp: int) -> dict:
    """An entry of the report's `causes`."""
    name = place_names(model.config.num_hidden_layers)[first["place"]]
    step, subject = text.step[name], text.subject[name]
    layer, kind = layer_and_kind(first["place"])
    case = Case(model, layer, kind, tp, dtype, text.ids[:-1], text.prompt, text.has, step, subject, wrong)
    rounding = (text.hf[name] - text.hf_step[name]).norm() / text.hf_step[name].norm()  # as a share of the size
    difference = (subject - step)[wrong].norm() / step[wrong].norm()
    ends = [model.model.embed_tokens, model.model.norm, model.lm_head]
    modules = nn.ModuleList(ends if layer is None else [model.model.layers[layer]])
    with in_dtype(modules, EXACT[dtype]), torch.inference_mode():
        meaning, evidence = explain(case, float(rounding / difference))
    return {"name": kind, "meaning": meaning, "evidence": evidence}


def rounding_causes(texts: list[Text], model: nn.Module, dtype: torch.dtype, kinds: list[dict]) -> list[dict]:
    """RMSNorm or softmax that rounds in the audited dtype, where HF computes in float32. Tells `kinds` the shares."""
    found = []
    for kind, (what, share, error) in rounding_shares(model, dtype, texts).items():
        for row in kinds:
            if row["kind"] == kind:
                row |= {"of": what, "share": share, "share_error": error}
        if 0.25 + 3 * error < share < 1.3:
            evidence = f"its rounding is in the errors of {kind}: share {share:.2f} +- {error:.2f}, HF's is 0"
            found.append({"name": kind, "meaning": f"{what}, HF computes it in float32", "evidence": evidence})
    return found


# ---- the verdict


def judge(texts: list[Text], model: nn.Module, dtype: torch.dtype, tp: int, given: list[tuple[str, float]]) -> dict:
    """The part of a report that numbers decide. `model` is HF's, in any dtype; `given` bounds: see `Bounds`."""
    bounds = Bounds(dtype, tp, given)
    names = place_names(model.config.num_hidden_layers)
    for text in texts:
        text.run(model)
    seen = {place: name for place, name in names.items() if all(name in text.subject for text in texts)}
    rows = []
    for phase in ("prefill", "decode"):
        found = [measure(texts, place, name, phase, bounds) for place, name in seen.items()]
        found = [row for row in found if row is not None]
        mark_lasting(found)
        rows += found
    order = list(seen)
    rows.sort(key=lambda row: order.index(row["place"]))  # prefill and decode beside each other
    kinds = []
    for kind in dict.fromkeys(row["kind"] for row in rows if row["kind"] != "embedding"):
        own = [name for place, name in seen.items() if layer_and_kind(place)[1] == kind]
        kinds.append(measure_kind(texts, kind, own, bounds))
    causes = []
    if dtype != torch.float32:
        causes = rounding_causes(texts, model, dtype, kinds)
    first, failed = None, [row for row in rows if not row["ok"]]
    if not failed:  # all layers together may still be out of bounds, or a rounding was found
        guilty = {row["kind"] for row in kinds if not row["ok"]} | {cause["name"] for cause in causes}
        failed = [row for row in rows if row["kind"] in guilty]
    if failed:
        row = next((row for row in failed if not row["own_r"] <= row["own_bound"]), failed[0])
        first, wrong = find_first(texts, row, names[row["place"]], tp)
        if not causes or not row["own_r"] <= row["own_bound"]:
            causes.insert(0, find_cause(texts[first["row"]], first, wrong, model, dtype, tp))
    choice = find_wrong_choice(texts)
    if first is None and choice is not None:
        first, causes = choice[0], [choice[1]]
    strip = {"places": order, "r": [position_ratios(texts, name) for name in seen.values()]}
    return {
        "passed": first is None,
        "bitwise": all(same_bits(text, name) for text in texts for name in seen.values()),
        "bounds": [{"places": pattern, "r": limit, "own_r": limit} for pattern, limit in given],
        "places": rows,
        "kinds": kinds,
        "not_seen": [place for place in names if place not in seen and layer_and_kind(place)[1] not in OPTIONAL],
        "strip": strip,
        "first": first,
        "causes": causes,
    }


def find_wrong_choice(texts: list[Text]) -> tuple[dict, dict] | None:
    """The first greedy choice that is not the largest of the subject's own logits, with its cause."""
    for row, text in enumerate(texts):
        if text.greedy is None or "logits" not in text.subject:
            return None
        logits, greedy = text.subject["logits"], text.greedy.long()
        size = logits.shape[-1]
        inside = greedy.clamp(0, size - 1)
        largest = logits.gather(-1, inside[:, None])[:, 0] >= logits.amax(-1)
        wrong = ((greedy != inside) | ~largest).nonzero().flatten().tolist()
        if wrong:
            position, token = wrong[0], int(greedy[wrong[0]])
            first = {"place": "logits", "layer": None, "module": "the greedy choice", "row": row, "position": position}
            first |= {"phase": "prefill" if position < text.prompt else "decode", "heads": [], "ranks": []}
            first |= {"step": max(0, position - text.prompt + 1), "confined": [f"{len(wrong)} positions"]}
            meaning = "the greedy choice is not the largest logit: ranks are combined in another order"
            if token >= size:
                meaning = "lm_head's padding is not masked: the greedy choice is beyond the vocabulary"
            return first, {"name": "greedy", "meaning": meaning, "evidence": f"token {token} of {size} was chosen"}
    return None


def same_bits(text: Text, name: str) -> bool:
    return torch.equal(text.subject[name], text.hf[name])


def position_ratios(texts: list[Text], name: str) -> list[list[float | None]]:
    """R at each position of each text; None where nothing was captured."""
    found = []
    for text in texts:
        errors = text.errors(name)
        ratios = (errors.subject / errors.hf.clamp(min=1e-30)).sqrt().tolist()
        found.append([r if here else None for r, here in zip(ratios, errors.numbers.tolist(), strict=True)])
    return found

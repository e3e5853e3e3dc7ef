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
from tools.audit.chain import Chain, Flow, halves_from_pairs, run_through, step_errors, widen
from tools.audit.oracle import EXACT, OPTIONAL, STEPS
from tools.audit.rounding import Found, measure_roundings

# A bound is one of these plus 4 / sqrt(n), because the ratio of two roots of n squares scatters by about 1 / sqrt(n).
# For R, n counts positions, since the errors of one position go together.
R_BOUND = {torch.bfloat16: 2.0, torch.float16: 2.0, torch.float32: 3.0}
# For own R, n counts values. A row: kinds of place, the bound at one place, the bound there if errors beyond five times
# HF's median count as that, and the bound of the kind in all layers, clipped in the same way. The first row that
# matches counts. Where a clean port rounds more than HF, in sums over ranks or before a bias is added, all of them are
# multiplied by how much that is.
HALF = [(r"heads|mlp", 2.5, 1.35, 1.15), (r".*", 2.5, 1.3, 1.1)]
SINGLE = [(r".*", 3.0, 2.5, 2.0)]
OWN_BOUNDS = {torch.bfloat16: HALF, torch.float16: HALF, torch.float32: SINGLE}
# No position of a clean step is further from exact than this many times HF's own error there, or its mean error.
AT_ONE_POSITION = 4.0
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


@dataclass(frozen=True)
class Errors:
    """Squared errors of one place of one text, [P]: against HF exact, and of the step alone. HF's are at least half a
    rounding: where HF is exact (an embedding), a subject has to be exact too."""

    numbers: Tensor  # int [P], how many were captured
    subject: Tensor
    hf: Tensor
    own_subject: Tensor
    own_hf: Tensor
    clipped_subject: Tensor  # own_subject and own_hf, errors beyond five times HF's median counting as that
    clipped_hf: Tensor


@dataclass
class Text:
    """One text of an audit: tensors [P,...] by tools.capture's names, at the P positions that were fed."""

    ids: Tensor  # int64 [P+1]
    prompt: int  # its tokens
    subject: dict[str, Tensor]
    seen: dict[str, Tensor]  # where the subject was captured, bool [P] or [P,heads]
    hf: dict[str, Tensor]  # in the audited dtype
    dtype: torch.dtype
    greedy: Tensor | None = None  # int32 [P], the subject's own choices; -1 where they are not known
    has: dict[str, Tensor] = field(default_factory=dict)  # the subject's, exact steps where it was not captured
    exact: dict[str, Tensor] = field(default_factory=dict)
    step: dict[str, Tensor] = field(default_factory=dict)  # exact, from the subject's inputs to each step
    hf_step: dict[str, Tensor] = field(default_factory=dict)  # exact, from HF's
    known: dict[str, Errors] = field(default_factory=dict)

    def flows(self, chain: Chain) -> list[Flow]:
        """HF exact, the subject's steps and HF's steps, to be run through the chain."""
        ids = self.ids[:-1]
        hf = {name: self.hf[name] for name in self.subject}
        self.flow = Flow(chain, ids, self.subject, self.seen)
        self.all_flows = [Flow(chain, ids, {}, {}), self.flow, Flow(chain, ids, hf, self.seen)]
        return self.all_flows

    def finish(self) -> None:
        """Takes over what the flows computed. What was not captured becomes zero in all tensors, and counts nowhere."""
        self.exact, _, self.hf_step = (dict(flow.own) for flow in self.all_flows)
        self.step = dict(self.flow.own)
        self.has = dict(self.flow.values)
        exact_dtype = EXACT[self.dtype]
        for name, seen in self.seen.items():
            for tensors in (self.subject, self.hf, self.exact, self.step, self.hf_step):
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
        seen = self.seen[name]
        mine = step_errors(subject, self.step[name], seen)
        theirs = step_errors(hf, self.hf_step[name], seen)
        numbers = widen(seen, subject).expand_as(subject).flatten(1).sum(-1)  # P
        least = (torch.finfo(self.dtype).eps / 8) ** 2
        errors = theirs[theirs != 0].abs()
        limit = 5 * float(errors.median()) if len(errors) else 0.0
        return Errors(
            numbers=numbers,
            subject=squares(subject - exact),
            hf=squares(hf - exact).maximum(least * squares(exact)),
            own_subject=squares(mine),
            own_hf=squares(theirs).maximum(least / 4 * numbers),
            clipped_subject=squares(mine.clamp(-limit, limit)),
            clipped_hf=squares(theirs.clamp(-limit, limit)),
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
    given: list[tuple[str, float]]
    allowed: dict[str, float]  # place -> how much a clean port may round there, in multiples of HF's own errors

    def of(self, place: str) -> tuple[float, float, float, float]:
        """The bounds of R at a place; of own R there, of clipped own R, and of the kind in all layers, to which
        `scatter` is to be added."""
        for pattern, limit in self.given:
            if re.fullmatch(pattern, place):
                return limit, limit, limit, limit
        kind = place.rpartition(".")[2]
        _, own, clipped, whole = next(row for row in OWN_BOUNDS[self.dtype] if re.fullmatch(row[0], kind))
        times = self.allowed.get(place, 1.0)
        return R_BOUND[self.dtype], own * times, clipped * times, whole * times


def scatter(numbers: int) -> float:
    """How far a ratio of two roots of `numbers` squares may be from 1 by chance."""
    return 4 / max(numbers, 1) ** 0.5


def independent_values(kind: str, numbers: int, hf: Tensor) -> int:
    """How many of a place's values have errors of their own: those of a head share the errors of its scores."""
    return max(1, numbers // hf.shape[-1]) if kind == "heads" else numbers


def measure(texts: list[Text], place: str, name: str, phase: str, bounds: Bounds) -> dict | None:
    """A row of the report; None if nothing was captured there."""
    numbers = 0
    positions = 0
    far = []
    own = []
    clipped = []
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
        clipped.append((errors.clipped_subject[part], errors.clipped_hf[part]))
        subjects.append(text.subject[name][part].flatten(1))
        hfs.append(text.hf[name][part].flatten(1))
    if numbers == 0:
        return None
    subject = torch.cat(subjects)
    hf = torch.cat(hfs)
    difference = (subject - hf).abs()
    size = hf.norm().clamp(min=1e-30)
    cosine = F.cosine_similarity(subject.flatten(), hf.flatten(), dim=0)
    layer, kind = layer_and_kind(place)
    r_bound, own_bound, clipped_bound, _ = bounds.of(place)
    own_r = ratio(own)
    own_bound += scatter(numbers)
    clipped_r = ratio(clipped)
    clipped_bound += scatter(independent_values(kind, numbers, texts[0].hf[name]))
    largest = max(float(F.pad(at_positions(text, name)[text.phase(phase)], (0, 1)).max()) for text in texts)
    at_one = AT_ONE_POSITION * own_bound / 2.5 + scatter(
        independent_values(kind, numbers // positions, texts[0].hf[name])
    )
    is_given = any(re.fullmatch(pattern, place) for pattern, _ in bounds.given)
    inside = own_r <= own_bound and (is_given or (clipped_r <= clipped_bound and largest <= at_one))
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
        "clipped_r": clipped_r,
        "position_r": largest,
        "r_bound": r_bound + scatter(positions),
        "own_bound": own_bound,
        "clipped_bound": clipped_bound,
        "position_bound": at_one,
        "own_ok": inside,  # NaN is not
        "ok": inside,
    }


def at_positions(text: Text, name: str) -> Tensor:
    """own R at each position [P]: beside HF's own error there, or its mean over the text if that is larger."""
    errors = text.errors(name)
    numbers = errors.numbers.clamp(min=1)
    mine = errors.own_subject / numbers
    theirs = errors.own_hf / numbers
    return (mine / theirs.clamp(min=typical_error([text], name))).sqrt()


def measure_kind(texts: list[Text], kind: str, names: list[str], bound: float) -> dict:
    """own R of a kind of place in all layers, without the largest errors: those scatter, and `measure` finds them. So
    the bound can be tight enough to show a rounding that HF does not make."""
    numbers = 0
    parts = []
    for text in texts:
        for name in names:
            errors = text.errors(name)
            numbers += independent_values(kind, int(errors.numbers.sum()), text.hf[name])
            parts.append((errors.clipped_subject, errors.clipped_hf))
    own_r = ratio(parts)
    bound += scatter(numbers)
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


def find_wrong(text: Text, name: str, heads: bool, times: float) -> Tensor:
    """bool [P], or [P,n] of heads: where the step's error is more than a clean step's at any position."""
    errors = step_errors(text.subject[name], text.step[name], text.seen[name])
    if not heads:
        errors = errors.flatten(1)
    limit = AT_ONE_POSITION * times + scatter(1 if name.endswith(".heads") else errors.shape[-1])
    return ~(errors.pow(2).mean(-1) <= limit**2 * typical_error([text], name))  # NaN is wrong


def find_first(texts: list[Text], row: dict, name: str, tp: int) -> tuple[dict, Tensor]:
    """The report's `first` for a row, and where its text is wrong, bool [P] or [P,n]."""
    heads = row["kind"] in HEADS
    masks = []
    for text in texts:
        wrong = find_wrong(text, name, heads, row["own_bound"] / 2.5)
        outside = torch.ones(len(wrong), dtype=torch.bool)
        outside[text.phase(row["phase"])] = False
        wrong[outside] = False
        masks.append(wrong)
    counts = [int(wrong.sum()) for wrong in masks]
    most = max(counts)
    best = counts.index(most)
    text = texts[best]
    wrong = masks[best]
    if most == 0 or row["ok"]:  # more rounding everywhere, and nowhere much
        wrong = widen(text.seen[name], text.subject[name]).flatten(2 if heads else 1).any(-1)
        wrong = wrong.clone()
        wrong[: text.phase(row["phase"]).start] = False
    confined = []
    if len(texts) > 1 and most > 0 and 0 in counts:
        rows = [number for number, count in enumerate(counts) if count]
        confined.append(f"row{'s' if len(rows) > 1 else ''} {', '.join(map(str, rows))} of the batch")
    return describe(text, row, wrong, best, tp, confined), wrong


def describe(text: Text, row: dict, wrong: Tensor, number: int, tp: int, confined: list[str]) -> dict:
    """The report's `first`: the place of a row, and what of its text is wrong there."""
    heads = wrong.dim() == 2
    by_position = wrong.any(1) if heads else wrong
    positions = by_position.nonzero().flatten().tolist()
    wrong_heads = []
    if heads and not wrong.any(0).all():
        wrong_heads = wrong.any(0).nonzero().flatten().tolist()
    part = text.phase(row["phase"])
    length = part.stop - part.start
    in_phase = [position for position in positions if part.start <= position < part.stop]
    confined = list(confined)
    if len(in_phase) == 1 and length > 1:
        confined.append(f"position {in_phase[0]} alone")
    elif 0 < len(in_phase) < length:
        confined.append(f"positions {in_phase[0]} to {in_phase[-1]}, {len(in_phase)} of {length}")
    return {
        "place": row["place"],
        "layer": row["layer"],
        "phase": row["phase"],
        "module": MODULES[row["kind"]],
        "row": number,
        "position": positions[0],
        "heads": wrong_heads,
        "step": step_number(text, positions[0]),
        "ranks": confined_ranks(text, row["kind"], wrong_heads, tp),
        "confined": confined,
    }


def typical_error(texts: list[Text], name: str) -> float:
    """The mean square of HF's own errors at a place."""
    errors = [text.errors(name) for text in texts]
    numbers = sum(int(error.numbers.sum()) for error in errors)
    return sum(float(error.own_hf.sum()) for error in errors) / max(numbers, 1)


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


def find_cause(
    texts: list[Text],
    row: dict,
    first: dict,
    wrong: Tensor,
    tp: int,
    seen: dict[str, str],
) -> tuple[dict, dict, bool]:
    """An entry of the report's `causes`, `first` as the cause shows it, and whether a known alternative fits."""
    text = texts[first["row"]]
    name = seen[first["place"]]
    size = {place_name: typical_error(texts, place_name) ** 0.5 for place_name in seen.values()}
    case = Case(
        text=text,
        others=[other for other in texts if other is not text],
        name=name,
        kind=row["kind"],
        tp=tp,
        wrong=wrong,
        sizes=size,
        is_rounding=row["own_r"] < 2 * row["own_bound"],
        clipped_bound=row["clipped_bound"],
    )
    with torch.inference_mode():
        meaning, evidence, touched = explain(case)
    if touched is not None and touched.any() and not row["own_ok"]:
        first = describe(text, row, touched, first["row"], tp, first["confined"][:-1])
    return {"name": row["kind"], "meaning": meaning, "evidence": evidence}, first, touched is not None


def rounding_causes(found: Found, kinds: list[dict]) -> list[dict]:
    """Roundings that HF does not make. Adds the shares to `kinds`."""
    causes = []
    rows = {row["kind"]: row for row in kinds}
    for (kind, whats), shares in found.shares.items():
        solved = shares.solve()
        if solved is None or kind not in rows:
            continue
        fits = list(zip(whats, solved[0][1:], solved[1][1:], strict=True))
        wrong = [fit for fit in fits if fit[0] not in found.harmless]
        what, share, error = max(wrong or fits, key=lambda fit: fit[1])
        rows[kind] |= {"of": what, "share": share, "share_error": error}
        if wrong and what not in found.growing and 0.25 + 3 * error < share < 1.3:
            meaning = f"{what}, HF computes it in float32"
            evidence = f"its rounding is in the errors of {kind}: share {share:.2f} +- {error:.2f}, HF's is 0"
            causes.append({"name": kind, "meaning": meaning, "evidence": evidence})
    return causes


def voted_eps(found: Found) -> dict[tuple, tuple[float, float, str]]:
    """(layer, norm) -> how sure another of the usual eps is, in standard errors, that eps, and the evidence: of the
    values that it rounds differently the port has most as it gives them."""
    voted = {}
    for (number, norm, eps), (with_other, with_hf) in found.eps_votes.items():
        total = with_other + with_hf
        sigmas = (with_other - with_hf) / max(total, 1) ** 0.5
        if sigmas > 8 and with_other > 3 * with_hf:
            which = f"of {total} values that the two round differently"
            voted[number, norm] = (sigmas, eps, f"{which}, the port has {with_other} as {eps:g} gives them")
    return voted


def fitted_eps(found: Found, eps: float) -> dict[tuple, tuple[float, float, str]]:
    """The same of an eps that is fitted to the port's errors."""
    fits = {}
    for key, shares in found.eps.items():
        solved = shares.solve()
        if solved is None or solved[1][1] == 0:
            continue
        own = eps * (1 + solved[0][1])
        error = eps * solved[1][1]
        sigmas = abs(own - eps) / error
        limit = (6.5 if key[0] is None else 9) * (1 + 10 / shares.positions)  # there are many layers, and few positions
        if sigmas > limit and abs(own - eps) > 0.3 * eps and own > -3 * error:
            evidence = f"a fit of the errors gives {own:.2g} +- {error:.2g}; HF's are of {eps:g}"
            fits[key] = (sigmas, max(own, 0), evidence)
    return fits


def eps_causes(found: Found, kinds: list[dict], eps: float) -> list[dict]:
    """RMSNorm with another eps whose effect is smaller than rounding, in all layers or in one."""
    fits = voted_eps(found) or fitted_eps(found, eps)
    if not fits:
        return []
    layers = {number for number, _ in fits} - {None}
    of_all = [key for key in fits if key[0] is None]
    candidates = of_all if of_all and len(layers) != 1 else [key for key in fits if key[0] is not None]
    number, norm = max(candidates or fits, key=lambda key: fits[key][0])
    _, own, evidence = fits[number, norm]
    where = "" if number is None else f" of layer {number}"
    meaning = f"another eps in {norm or 'RMSNorm'}{where}: {own:.2g}, config.json says {eps:g}"
    known = [row["kind"] for row in kinds]
    shown = ("post_attention_layernorm", "mlp") if norm == "post_attention_layernorm" else ("input_layernorm", "v")
    kind = next(kind for kind in (*shown, "v", "mlp", *known) if kind in known)
    return [{"name": kind, "layer": number, "meaning": meaning, "evidence": evidence}]


# ---- the verdict


def judge(
    texts: list[Text],
    model: nn.Module,
    dtype: torch.dtype,
    tp: int,
    given: list[tuple[str, float]],
    differing: list[str] | None = None,
) -> dict:
    """The part of a report that is computed. `model` is HF's, in any dtype; for the bounds in `given` see `Bounds`;
    `differing` says which copies of a head are not the same on two ranks."""
    names = place_names(model.config.num_hidden_layers)
    notes = [note for text in texts for note in undo_meta_order(text)]
    longest = max(len(text.ids) for text in texts)
    chain = Chain(model, EXACT[dtype], longest)
    run_through(chain, [flow for text in texts for flow in text.flows(chain)])
    for text in texts:
        text.finish()
    seen = {}
    not_seen = []
    for place, name in names.items():
        if all(name in text.subject for text in texts):
            seen[place] = name
        elif layer_and_kind(place)[1] not in OPTIONAL:
            not_seen.append(place)
    bitwise = all(same_bits(text, name) for text in texts for name in seen.values())
    found = Found() if bitwise else measure_roundings(model, dtype, tp, texts)
    bounds = Bounds(dtype, given, allowances(texts, seen, found))
    rows = measure_places(texts, seen, bounds)
    kinds = measure_kinds(texts, seen, rows, bounds)
    causes = rounding_causes(found, kinds)
    for kind in kinds:
        if kind.get("of") in found.growing and kind["share"] > 0.25 + 3 * kind["share_error"]:
            notes.append(f"{kind['of']}, HF has it in float32: the error grows with the position, audit a long prompt")
    if all(row["own_ok"] for row in rows):
        causes += eps_causes(found, kinds, chain.eps)
    first = None
    row = None if bitwise else first_failure(rows, kinds, causes)
    if row is not None:
        first, wrong = find_first(texts, row, names[row["place"]], tp)
        rounds = any("share" in cause["evidence"] for cause in causes)
        if not causes or not row["own_r"] <= row["own_bound"] or not (row["own_ok"] or rounds):
            cause, first, is_known = find_cause(texts, row, first, wrong, tp, seen)
            causes.insert(0 if is_known or rounds else len(causes), cause)
    if first is None and differing:
        first, cause = differing_copies(texts[0], differing)
        causes = [cause]
    choice = find_wrong_choice(texts)
    if first is None and choice is not None:
        first, cause = choice
        causes = [cause]
    if first is None:
        causes = []
    return {
        "passed": first is None,
        "bitwise": bitwise,
        "bounds": [{"places": pattern, "r": limit, "own_r": limit} for pattern, limit in given],
        "places": rows,
        "kinds": kinds,
        "not_seen": not_seen,
        "strip": {"places": list(seen), "r": [position_ratios(texts, name) for name in seen.values()]},
        "first": first,
        "causes": causes,
        "notes": notes,
    }


def allowances(texts: list[Text], seen: dict[str, str], found: Found) -> dict[str, float]:
    """How much a clean port may round at a place, in multiples of HF's own errors there, if that is more than once.
    `layers.*.KIND` is a kind in all layers."""
    sums: dict[tuple[str, str], list[float]] = {}
    places = {name: place for place, name in seen.items()}
    for (name, what), squares_of_other in found.allowed.items():
        hf = sum(float(text.errors(name).own_hf.sum()) for text in texts)
        for place in (places[name], whole_kind(places[name])):
            both = sums.setdefault((place, what), [0.0, 0.0])
            both[0] += squares_of_other
            both[1] += hf
    allowed: dict[str, float] = {}
    for (place, _), (above, below) in sums.items():
        times = (above / below) ** 0.5 if below else 1.0
        # ranks may be added in another order than here, which the 5% are for
        allowed[place] = max(1.0, 1.05 * times, allowed.get(place, 1.0))
    return allowed


def whole_kind(place: str) -> str:
    return re.sub(r"\d+", "*", place)


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
            places = [place for place in seen if layer_and_kind(place)[1] == kind]
            names = [seen[place] for place in places]
            *_, bound = bounds.of(whole_kind(places[0]))
            kinds.append(measure_kind(texts, kind, names, bound))
    return kinds


def first_failure(rows: list[dict], kinds: list[dict], causes: list[dict]) -> dict | None:
    """The row that an audit fails at: the first that is out of bounds by itself, if there is one, and of those the
    first in prefill, which runs first. Where no row failed, all layers together may still be out of bounds, or a
    rounding was found."""
    failed = [row for row in rows if not row["ok"]]
    if not failed:
        guilty = {row["kind"] for row in kinds if not row["ok"]}
        failed = [row for row in rows if row["kind"] in guilty]
        for cause in causes:
            layer = cause.pop("layer", None)
            failed += [row for row in rows if row["kind"] == cause["name"] and layer in (None, row["layer"])]
        failed.sort(key=rows.index)
    failed.sort(key=lambda row: (row["own_ok"], row["phase"] != "prefill"))  # stable
    return failed[0] if failed else None


def undo_meta_order(text: Text) -> list[str]:
    """Puts q and k into HF's order if they are in Meta's, where neighbours are rotated and not halves. Attention is the
    same in both, as q and k are permuted alike."""
    numbers = [name for name in ("layers.0.q", "layers.0.k") if name in text.subject]
    if not numbers:
        return []
    for name in numbers:
        seen = widen(text.seen[name], text.hf[name])
        right = torch.where(seen, text.hf[name].float(), 0.0)
        given = torch.where(seen, text.subject[name].float(), 0.0)
        moved = halves_from_pairs(given)
        if not (moved - right).norm() < 0.1 * right.norm() < 0.5 * (given - right).norm():
            return []
    for name in list(text.subject):
        if name.rpartition(".")[2] in ("q", "k", "q_proj", "k_proj"):
            text.subject[name] = halves_from_pairs(text.subject[name])
    return ["q and k are in Meta's order, neighbours are rotated; they were put into HF's order of halves"]


def differing_copies(text: Text, differing: list[str]) -> tuple[dict, dict]:
    """Copies of a head that are not the same on two ranks, where the copy that was compared is right."""
    words = re.search(r"layers\.(\d+)\.(\w+)", differing[0])
    layer, kind = (int(words[1]), words[2]) if words else (None, "logits")
    row = {"place": words[0] if words else "logits", "layer": layer, "phase": "prefill", "kind": kind}
    everywhere = torch.ones(len(text.ids) - 1, dtype=torch.bool)
    first = describe(text, row, everywhere, 0, 1, [])
    meaning = f"ranks hold different copies: {differing[0]}"
    return first, {"name": kind, "meaning": meaning, "evidence": f"{len(differing)} in all"}


def find_wrong_choice(texts: list[Text]) -> tuple[dict, dict] | None:
    """The first greedy choice that is not the largest of the subject's own logits, with its cause."""
    for row, text in enumerate(texts):
        if text.greedy is None or "logits" not in text.subject:
            continue
        logits = text.subject["logits"]
        greedy = text.greedy.long()
        is_known = (greedy >= 0) & text.seen["logits"]
        size = logits.shape[-1]
        inside = greedy.clamp(0, size - 1)
        chosen = logits.gather(-1, inside[:, None])[:, 0]
        # ids of a folder may have been forced by HF, whose choice between two logits may be another by rounding
        slack = 0.0 if (greedy >= 0).all() else 4 * float((text.hf["logits"] - text.exact["logits"]).abs().max())
        is_largest = chosen >= logits.amax(-1) - slack
        is_wrong = ((greedy != inside) | ~is_largest) & is_known
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

"""Why a port differs from Hugging Face at a place: what ports have been seen to compute instead, tried on its tensors.

Between the places that were captured and the place that is wrong lie the steps of one segment of the chain. A knob is
another computation of one of them, or of a few that go together; `tools.audit.knobs` lists them. Each is run through
the segment to where it shows. It is the cause if it gives the port's values where the port is wrong and changes nothing
where the port is right, at every place that it reaches. If none does, `pattern` says what the difference looks like,
and if that is not known either, between which places it arises.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property

import torch
import torch.nn.functional as F
from torch import Tensor

from llama_neuron import shard_heads
from tools.audit.chain import UNSEEN, Chain, name_of_step, step_errors, step_of_name, value_sizes, widen
from tools.audit.knobs import GENERATORS, Knob, on_rank
from tools.audit.rounding import name_of_tiles

# how much work the trials of one layer at a time may be: positions x parameters x trials
WORK = 2e12


@dataclass
class Case:
    """A place that is out of bounds, in one text."""

    text: object  # tools.audit.judge's Text
    others: list  # the other texts of the batch
    name: str  # the place's name in a capture
    kind: str  # q, heads, mlp, ...
    tp: int
    wrong: Tensor  # bool [P] or, of heads, [P,n]: where the port is wrong
    sizes: dict[str, float]  # name -> HF's own error, root mean square, in the units of `errors`
    is_rounding: bool  # the error is little larger than HF's own
    clipped_bound: float
    fits: list = field(default_factory=list)

    @property
    def chain(self) -> Chain:
        return self.text.flow.chain

    @cached_property
    def number(self) -> int | None:
        return step_of_name(self.name)[0]

    @property
    def prompt(self) -> int:
        return self.text.prompt

    @property
    def port(self) -> Tensor:
        return self.text.subject[self.name]

    @property
    def step(self) -> Tensor:
        return self.text.step[self.name]

    @cached_property
    def segment(self) -> list[str]:
        """The steps that may be wrong: from the place back to what was captured whole, in the order of the data."""
        found = {self.name}
        for name in reversed(self.chain.order):
            if name in found:
                found.update(source for source in self.chain.inputs[name] if not self.text.flow.is_whole(source))
        return [name for name in self.chain.order if name in found]

    @cached_property
    def sources(self) -> list[str]:
        """The places that the segment starts from."""
        found = []
        for name in self.segment:
            found += [source for source in self.chain.inputs[name] if source not in self.segment]
        return list(dict.fromkeys(found))

    @cached_property
    def layers(self) -> list[int]:
        """The layers of the segment."""
        numbers = {step_of_name(name)[0] for name in self.segment}
        return sorted(numbers - {None})

    @cached_property
    def last(self) -> str:
        """Where trials end: at the end of the place's layer."""
        return self.name if self.number is None else name_of_step(self.number, "residual")

    @cached_property
    def rows(self) -> Tensor:
        """bool [P]: the positions that are wrong."""
        return self.wrong.any(1) if self.wrong.dim() == 2 else self.wrong

    @cached_property
    def scopes(self) -> list[tuple[str, Tensor]]:
        """Where a knob may be turned: everywhere, in one phase, from some position on, or for some heads."""
        P = len(self.rows)
        everywhere = torch.ones_like(self.wrong)
        positions = self.rows.nonzero().flatten().tolist()
        found = [("", everywhere)]
        first = positions[0]
        at = torch.arange(P)
        if first >= self.prompt:
            found.append((" in decoding alone", at >= self.prompt))
        elif positions[-1] < self.prompt < P:
            found.append((" in prefill alone", at < self.prompt))
        if first not in (0, self.prompt) and P - first > 2:
            found.append((f" from position {first} on", at >= first))
        if self.wrong.dim() == 2 and not self.wrong.any(0).all():
            found.append(("", self.wrong.any(0)[None].expand_as(self.wrong)))
        return [(words, widen(mask, everywhere) & everywhere) for words, mask in found]

    def errors(self, name: str, other: Tensor) -> Tensor:
        """The port's errors against another result of a step, relative to its size or the right one's, in multiples of
        HF's own."""
        seen = self.text.seen[name]
        size = torch.maximum(value_sizes(self.text.step[name], seen), value_sizes(other, seen))
        errors = (self.text.subject[name].to(other) - other) / (size * max(self.sizes[name], 1e-30))
        errors = errors.masked_fill(~widen(seen, other), 0.0)
        return errors.clamp(-5, 5) if self.is_rounding else errors

    def distance(self, name: str, other: Tensor, rows: Tensor | None = None) -> float:
        """How far the port is from another result of a step, in multiples of HF's own error; at all positions, or at
        some."""
        errors = self.errors(name, other)
        seen = widen(self.text.seen[name], other).expand_as(other)
        if rows is not None:
            errors = errors[rows]
            seen = seen[rows]
        return float((errors.pow(2).sum() / seen.sum().clamp(min=1)).sqrt())

    def run(self, knob: Knob, layers: list[int]) -> dict[str, Tensor]:
        """The results of the steps that come out differently with a knob turned in some layers."""
        steps = {}
        for kind, compute in knob.steps.items():
            if kind in ("embedding", "final_norm", "logits"):
                steps[name_of_step(None, kind)] = compute
            else:
                steps |= {name_of_step(number, kind): compute for number in layers}
        if not any(name in self.segment for name in steps):
            return {}
        return self.text.flow.changed(steps, self.last)

    def try_knob(self, knob: Knob, layers: list[int]) -> None:
        """Remembers a knob that fits."""
        results = self.run(knob, layers)
        if self.name not in results:
            return
        changed = results[self.name]
        is_known = torch.isfinite(changed.flatten(1)).all(1)  # P; of another row of the batch some positions are not
        if is_known[self.rows].float().mean() < 0.5:
            return
        changed = torch.where(widen(is_known, changed), changed, self.step)
        for words, mask in self.scopes:
            scoped = torch.where(widen(mask, changed), changed, self.step)
            share = self.fit(scoped, is_known)
            if share is not None and self.fits_elsewhere(results, mask):
                self.fits.append((share, len(self.fits), knob.meaning + words, scoped))
                return

    def fit(self, other: Tensor, is_known: Tensor) -> float | None:
        """The share of the difference that another result of the step leaves where the port is wrong; None if that is
        more than rounding, or if it is further from the port where the port is right."""
        wrong = self.rows & is_known
        right = ~self.rows & is_known
        before = self.distance(self.name, self.step, wrong)
        after = self.distance(self.name, other, wrong)
        enough = max(1.3, self.clipped_bound, 0.1 * before, min(2.0, 0.35 * before))
        if not after <= min(enough, 0.85 * before):
            return None
        if right.any():
            most = max(1.3 * self.clipped_bound, 1.05 * self.distance(self.name, self.step, right))
            if not self.distance(self.name, other, right) <= most:
                return None
        return after / before

    def fits_elsewhere(self, results: dict[str, Tensor], mask: Tensor) -> bool:
        """Whether the other places that a knob reaches do not speak against it."""
        rows = mask if mask.dim() == 1 else mask.any(1)
        for name, changed in results.items():
            if name == self.name or name not in self.text.subject:
                continue
            step = self.text.step[name]
            scoped = torch.where(widen(rows, changed), changed, step)
            before = self.distance(name, step)
            if not self.distance(name, scoped) <= max(3.0, 1.05 * before):
                return False
        return True


# ---- trials


def explain(case: Case) -> tuple[str, str, Tensor | None]:
    """What the port does instead, the evidence, and where that differs from HF: bool [P] or [P,heads]."""
    is_finite = torch.isfinite(case.port[case.wrong])
    if not is_finite.all():
        share = 1 - is_finite.float().mean()
        meaning = "NaN or infinity: an overflow, or values that were never written"
        if case.kind == "heads":
            meaning = "NaN or infinity: masked scores near finfo.min, an overflow, or slots that were never written"
        return meaning, f"{share:.0%} of the numbers are not finite", None
    for layers, knobs in trials(case):
        for knob in knobs:
            case.try_knob(knob, layers)
        if case.fits:
            break
    if case.fits:
        best = min(case.fits)
        near = [fit for fit in case.fits if fit[0] <= 1.03 * best[0] + 1e-5]  # equal but for rounding: the first
        share, _, meaning, changed = min(near, key=lambda fit: fit[1])
        return meaning, f"computed so, the difference falls to {share:.1%} of what it is", touched(case, changed)
    meaning, evidence = pattern(case)
    return meaning, evidence, None


def trials(case: Case) -> Iterator[tuple[list[int], Iterator[Knob]]]:
    """Layers, and the knobs to turn in all of them: first everywhere, then on one rank, then in one layer."""
    yield case.layers, list_knobs(case)
    if case.tp > 1 and case.number is not None:
        yield case.layers, (on_rank(case, knob, rank) for knob in list_knobs(case) for rank in range(case.tp))
    if len(case.layers) > 1:
        knobs = list(list_knobs(case))
        parameters = sum(x.numel() for x in case.chain.weights.parameters.values())
        if len(knobs) * len(case.layers) * parameters * len(case.rows) < WORK:
            for number in case.layers:
                in_layer = [Knob(f"{knob.meaning}, in layer {number}", knob.steps) for knob in knobs]
                yield [number], iter(in_layer)


def list_knobs(case: Case) -> Iterator[Knob]:
    """The knobs of all steps of the segment."""
    kinds = {step_of_name(name)[1] for name in case.segment}
    for turned, generator in GENERATORS:
        if kinds.intersection(turned):
            yield from generator(case)


def touched(case: Case, changed: Tensor) -> Tensor:
    """Where a cause changes a step by more than rounding."""
    change = step_errors(changed, case.step, case.text.seen[case.name]) / max(case.sizes[case.name], 1e-30)
    if case.wrong.dim() == 1:
        change = change.flatten(1)
    return change.pow(2).mean(-1) > 1


# ---- what the difference looks like


def pattern(case: Case) -> tuple[str, str]:
    """What can be said where no knob fits."""
    right = case.step[case.wrong]  # n ...
    wrong = case.port[case.wrong].to(case.step)
    difference = (wrong - right).norm()
    rounding = 1 / max(case.distance(case.name, case.step), 1e-30)  # HF's, as a share of the difference
    limit = min(max(3 * rounding, 0.05), 0.3)
    if not wrong.any():
        return "zeros: this part was not computed, not written, or its weights are padding", "all its numbers are 0"
    scale = float((right * wrong).sum() / right.pow(2).sum())
    if (wrong - scale * right).norm() < limit * difference:
        return f"a scale: the right values times {scale:.4g}", "the difference is proportional to the values"
    if case.kind == "embedding":
        ids = looked_up(case)
        if ids:
            return ids
    if case.port.dim() == 3:
        moved = moved_heads(case, limit)
        if moved:
            what = "KV heads" if case.kind in ("k", "k_proj", "v") else "heads"
            return f"{what} in another order: {moved}", "each of these heads has the numbers of another one of HF's"
    if case.kind == "heads":
        found = pattern_of_attention(case, limit)
        if found:
            return found
    if case.kind in ("q", "k"):
        length_error = (pair_lengths(right) - pair_lengths(wrong)).norm()
        if length_error < limit * difference:
            return pattern_of_rotation(case)
    if case.kind in ("input_layernorm", "post_attention_layernorm", "v", "q_proj", "k_proj", "final_norm"):
        scales = own_scales(right, wrong)
        if (wrong - scales * right).norm() < limit * difference:
            evidence = f"each position is a multiple of HF's, {float(scales.min()):.4g} to {float(scales.max()):.4g}"
            return "RMSNorm's statistics: another mean of the squares", evidence
    if case.kind in ("attention", "mlp", "residual", "final_norm", "logits"):
        features = few_features(wrong - right)
        if features:
            return f"a few output features: {features}", "the others are right"
    return between(case)


def between(case: Case) -> tuple[str, str]:
    """Where a difference arises that no known alternative explains."""
    right = case.step[case.wrong]
    wrong = case.port[case.wrong].to(case.step)
    cosine = float(F.cosine_similarity(right.flatten(), wrong.flatten(), dim=0))
    evidence = f"no known alternative fits; cosine with HF's step {cosine:.4f}"
    if case.is_rounding:
        tiles = name_of_tiles(case.text, case.name)
        if tiles:
            return tiles, "its rounding is in the errors"
        times = case.distance(case.name, case.step)
        meaning = f"it rounds more than HF: {case.kind} is {times:.2f} times as far from exact"
        return meaning, "no known rounding fits: quantized weights, another revision, or products of less precision"
    may_be = possible(case)
    hidden = [name for name in case.segment if name != case.name and not is_internal(case, name)]
    if not hidden:
        return may_be, evidence
    start = ", ".join(case.sources[:3]) or "the ids"
    meaning = f"it arises between {start} and {case.name}, not seen in between: {may_be}"
    return meaning, f"{evidence}; capture {', '.join(hidden[:4])} to say where"


def is_internal(case: Case, name: str) -> bool:
    return step_of_name(name)[1] in UNSEEN


def possible(case: Case) -> str:
    """What the steps of the segment may do, less what the places that are right rule out."""
    found = []
    for name in case.segment:
        number, kind = step_of_name(name)
        if kind in MAY_BE and not is_right_elsewhere(case, number, kind):
            found.append(MAY_BE[kind])
    return ", or ".join(dict.fromkeys(found)) or "another computation"


def is_right_elsewhere(case: Case, number: int | None, kind: str) -> bool:
    """Whether a step is ruled out: other places that follow from a norm are right where this one is wrong; or pairs
    have other lengths, and a rotation keeps them."""
    if kind in ("q", "k"):
        right = pair_lengths(case.step[case.wrong])
        wrong = pair_lengths(case.port[case.wrong].to(case.step))
        difference = (case.step[case.wrong] - case.port[case.wrong]).norm()
        return bool(case.rows[0]) and float((right - wrong).norm()) > 0.3 * float(difference)
    if kind != "input_layernorm":
        return False
    if case.wrong.dim() == 2 and not case.wrong[case.rows].all():
        return True
    for other in ("q", "k", "v"):
        name = name_of_step(number, other)
        if name != case.name and name in case.text.subject and case.distance(name, case.text.step[name]) < 2:
            return True
    return False


WEIGHT = "another weight or another revision of it (a stale shard, a wrong conversion, quantization)"
MAY_BE = {
    "embedding": "another revision of the table, or one that is rounded",
    "input_layernorm": "another norm",
    "q_proj": WEIGHT,
    "k_proj": WEIGHT,
    "v": WEIGHT,
    "q": "another rotary embedding",
    "k": "another rotary embedding",
    "heads": "another mask, another cache or another softmax",
    "attention": f"{WEIGHT}, or another sum over ranks",
    "post_attention_layernorm": "another norm",
    "mlp": f"{WEIGHT}, another activation, or another sum over ranks",
    "residual": "another sum",
    "final_norm": "another norm",
    "logits": f"{WEIGHT}, or another order of the vocabulary",
}


def looked_up(case: Case) -> tuple[str, str] | None:
    """The ids whose embeddings these are."""
    table = case.chain.model.model.embed_tokens.weight.to(case.step)
    mine = case.port[case.rows].to(table)
    distances = torch.cdist(mine, table)  # n V
    nearest = distances.argmin(-1)
    smallest = distances.gather(-1, nearest[:, None])[:, 0]
    positions = case.rows.nonzero().flatten()
    asked = case.text.ids[positions]
    if not (smallest < 0.05 * table[nearest].norm(dim=-1)).all() or (nearest == asked).any():
        return None
    shown = [f"{got} for {want}" for got, want in zip(nearest.tolist(), asked.tolist(), strict=True)]
    where = ", ".join(map(str, positions[:6].tolist()))
    more = " ..." if len(shown) > 6 else ""
    return f"other ids are looked up at positions {where}{more}", f"{', '.join(shown[:6])}{more}"


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
    """Heads of the port that are other heads of HF's; empty unless that is true of every wrong head."""
    found = []
    for place in range(case.port.shape[1]):
        rows = case.wrong[:, place]
        if not rows.any():
            continue
        mine = case.port[rows, place].to(case.step)  # n D
        differences = case.step[rows] - mine[:, None]  # n heads D
        distances = differences.norm(dim=(0, 2)) / mine.norm().clamp(min=1e-30)  # heads
        nearest = int(distances.argmin())
        if nearest == place or not distances[nearest] < limit * distances[place]:
            return ""
        found.append(f"head {place} has {nearest}'s")
    if len(found) > 4:
        found[4:] = ["..."]
    return ", ".join(found)


def pattern_of_attention(case: Case, limit: float) -> tuple[str, str] | None:
    """Where attention's weights may have gone: its output as a multiple of the right one."""
    decoded = not case.rows[: case.prompt].any()
    right = case.step[case.wrong]  # n D
    wrong = case.port[case.wrong].to(case.step)
    scale = own_scales(right, wrong)
    if (wrong - scale * right).norm() < limit * (wrong - right).norm() and (scale < 1).all():
        where = "a decoding step" if decoded else "a position"
        share = 1 - float(scale.mean())
        meaning = f"{where} sees empty slots too, or softmax has a sink: they take {share:.0%} of the weight"
        return meaning, "each head is a multiple of HF's"
    copies = other_copies(case)
    if copies:
        return copies
    if len([name for name in case.segment if not is_internal(case, name)]) > 1:
        return None
    if decoded:
        meaning = "the cache: a decoding step sees slots that are not the text's (padding, stale or misplaced ones)"
        return meaning, "prefill is right and decoding wrong"
    if case.wrong[0].any():
        meaning = "what is written to the cache, or a mask: position 0 is wrong, and sees itself alone"
        return meaning, "no known one fits"
    return "another mask, clipped scores, or another softmax", "position 0 is right, and sees itself alone"


def other_copies(case: Case) -> tuple[str, str] | None:
    """A rank whose query heads are wrong, while the heads of another rank with a copy of the same KV head are right."""
    config = case.chain.config
    ranks = shard_heads(config.num_attention_heads, config.num_key_value_heads, case.tp)
    wrong_heads = set(case.wrong.any(0).nonzero().flatten().tolist())
    for rank, (query_heads, kv_heads) in enumerate(ranks):
        own = set(query_heads) - {None}
        if not own or own != wrong_heads:
            continue
        for other, (_, its_kv_heads) in enumerate(ranks):
            both = set(kv_heads) & set(its_kv_heads) - {None}
            if other != rank and both:
                meaning = f"rank {rank}'s copies of KV heads differ from those of rank {other}"
                evidence = f"both have KV head {min(both)}; the query heads of rank {rank} are wrong, the others right"
                return meaning, evidence
    return None


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
    shifts = torch.arange(-P, P + 1)
    turned_back = torch.polar(torch.ones((), dtype=case.step.dtype), -(shifts[:, None] * case.chain.inv_freq))
    fits = (relative[:, None] * turned_back).real.sum(-1)  # P shifts
    best = fits.max(-1)
    positions = torch.arange(P)
    taken = positions + shifts[best.indices]
    perfect = relative[case.rows].abs().sum(-1)
    asked = positions[case.rows]
    got = taken[case.rows]
    if (best.values[case.rows] > 0.99 * perfect).all() and (asked != got).float().mean() > 0.5:
        return (
            "the rotary embedding takes other positions",
            f"{got[:6].tolist()} ... where they are {asked[:6].tolist()} ...",
        )
    errors = relative.angle().abs().mean(-1)  # P
    evidence = f"mean error of the angle {errors[1]:.3g} at position 1, {errors[-1]:.3g} at position {P - 1}"
    return "another rotation: the pairs have the right length and other angles", evidence

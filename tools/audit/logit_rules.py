"""What an audit says about logits: agreement of greedy tokens, KL divergence, and the verdicts of two other tools, for
people who have to report them."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

# of the k largest logits -> the relative error that is allowed; None is all of them
Tolerances = dict[int | None, float]
NXDI_TOLERANCES: Tolerances = {5: 0.01, 50: 0.02, 1000: 0.03, None: 0.05}
VLLM_NEURON_TOLERANCES: Tolerances = {5: 0.011, 50: 0.02, 1000: 0.03, None: 0.05}
ABSOLUTE = 1e-5  # what both subtract from an error
NXDI_GAP = 0.001
BINS = 100


def ulp(value: float, dtype: torch.dtype) -> float:
    """The distance from a value to the next one that the dtype can represent."""
    size = torch.tensor(abs(value), dtype=torch.float64).clamp(min=torch.finfo(dtype).tiny)
    return float(torch.exp2(size.log2().floor()) * torch.finfo(dtype).eps)


def first_other_token(subject: Tensor, hf: Tensor, dtype: torch.dtype) -> dict | None:
    """The first position at which the greedy tokens of logits [P,V] differ, and whether HF's two are within an ulp."""
    subject_tokens = subject.argmax(-1)
    hf_tokens = hf.argmax(-1)
    other = (subject_tokens != hf_tokens).nonzero().flatten()
    if not len(other):
        return None
    position = int(other[0])
    subject_token = int(subject_tokens[position])
    hf_token = int(hf_tokens[position])
    hf_logits = hf[position]
    gap = float(hf_logits[hf_token] - hf_logits[subject_token])
    gap_ulp = gap / ulp(float(hf_logits.max()), dtype)
    return {
        "position": position,
        "subject": subject_token,
        "hf": hf_token,
        "gap_ulp": gap_ulp,
        "tie": gap_ulp <= 1,
    }


def kl_divergence(exact: Tensor, other: Tensor) -> Tensor:
    """KL(exact || other) of logits [P,V], in nats [P]."""
    p = F.log_softmax(exact.double(), dim=-1)
    q = F.log_softmax(other.double(), dim=-1)
    return (p.exp() * (p - q)).sum(-1)


# ---- what both rules do first


class Token(NamedTuple):
    """What is compared of one token: logits [n] of the subject, without their shift, and of HF; `kept` [V] says which
    of the vocabulary they are, since logits of -inf are left out."""

    mine: Tensor
    theirs: Tensor
    kept: Tensor


def without_shift(mine: Tensor, theirs: Tensor) -> Tensor:
    """Logits [n] of one token, less the constant of their linear fit to the other ones."""
    columns = torch.stack((theirs, torch.ones_like(theirs)), dim=1)
    fit = torch.linalg.lstsq(columns, mine[:, None], driver="gelsd").solution  # a slope and the constant
    return mine - fit[1]


def tokens_of(subject: Tensor, reference: Tensor) -> list[Token]:
    """The tokens of logits [M,V]."""
    tokens = []
    for mine, theirs in zip(subject.double(), reference.double(), strict=True):
        kept = (mine != -torch.inf) & (theirs != -torch.inf)
        mine = mine[kept]
        theirs = theirs[kept]
        tokens.append(Token(without_shift(mine, theirs), theirs, kept))
    return tokens


def static_errors(token: Token, tolerances: Tolerances) -> Tolerances:
    """For each k in `tolerances`, the largest error among HF's k largest logits, less ABSOLUTE, relative to the largest
    of them by absolute value."""
    count = len(token.theirs)
    differences = (token.mine - token.theirs).abs()
    errors = {}
    for k in tolerances:
        largest = token.theirs.topk(min(k or count, count)).indices
        relative = (differences[largest] - ABSOLUTE) / token.theirs[largest].abs().max()
        errors[k] = float(relative.max())
    return errors


def static_route(tokens: list[Token], tolerances: Tolerances, decimals: int | None) -> tuple[bool, str]:
    """Whether all errors are within the tolerances, and in words how far. Errors count as rounded to so many decimals,
    or as they are."""
    failures = []
    worst = 0.0
    for position, token in enumerate(tokens):
        for k, error in static_errors(token, tolerances).items():
            worst = max(worst, error / tolerances[k])
            counts = error if decimals is None else round(error, decimals)
            if not counts <= tolerances[k]:
                failures.append(f"top {k or 'all'} of new token {position + 1}")
    note = f"the largest error is {worst:.2f} of its tolerance"
    if failures:
        note += f"; out of tolerance: {failures[0]}, {len(failures)} in all"
    return not failures, note


def other_choices(tokens: list[Token]) -> list[tuple[float, float]]:
    """Where the greedy tokens differ: how far the subject's two logits are apart, and the larger of their sizes."""
    found = []
    for token in tokens:
        chosen = token.mine.max()
        wanted = token.mine[token.theirs.argmax()]
        if chosen > wanted:
            size = torch.maximum(chosen.abs(), wanted.abs())
            found.append((float(chosen - wanted), float(size)))
    return found


# ---- the two rules


def nxdi_logit_matching(subject: Tensor, exact: Tensor, dtype: torch.dtype) -> dict:
    """NxDI's `logit_validation` (torch_neuronx.testing.validation) with its defaults, on logits [M,V] of M new tokens,
    against HF in float32.

    For each token, a constant shift is removed (found by a linear fit of the subject's logits to HF's). Among HF's 5,
    50, 1000 and all largest logits, the largest error less 1e-5 is divided by the largest of them, and rounded to the
    decimals of its tolerance. Other greedy tokens pass if the subject's two logits differ by less than 0.001.
    """
    tokens = tokens_of(subject, exact)
    passed, note = static_route(tokens, NXDI_TOLERANCES, decimals=2)
    gaps = [gap for gap, _ in other_choices(tokens)]
    if gaps:
        step = ulp(float(exact.max()), dtype)
        note += f"; {len(gaps)} other greedy tokens, by up to {max(gaps):.3g}, {NXDI_GAP} is allowed"
        if step > NXDI_GAP:
            note += f", which cannot be met: an ulp of the largest logit is {step:.3g}"
    gaps_are_small = all(gap < NXDI_GAP for gap in gaps)
    return {"passed": passed and gaps_are_small, "note": note}


def overlap(mine: Tensor, theirs: Tensor) -> float:
    """The Bhattacharyya coefficient of two samples: their histograms have BINS bins over the range of both."""
    low = float(torch.minimum(mine.min(), theirs.min()))
    high = float(torch.maximum(mine.max(), theirs.max()))
    my_shares = torch.histc(mine, bins=BINS, min=low, max=high) / len(mine)
    their_shares = torch.histc(theirs, bins=BINS, min=low, max=high) / len(theirs)
    return float((my_shares * their_shares).sqrt().sum())


def vllm_neuron_verdict(subject: list[Tensor], hf: list[Tensor], exact: list[Tensor]) -> dict:
    """vLLM Neuron's `multi_prompt_logit_validation` in its three-way form, with its defaults, on logits [M,V] of each
    text: it expects HF in the audited dtype, and HF exact is its baseline.

    For each token, a constant shift of the subject's logits to HF's is removed. The verdict passes by any of three
    routes:

    - static: errors against HF in the audited dtype are within 0.011, 0.02, 0.03 and 0.05, as in NxDI's rule but not
      rounded, and where greedy tokens differ, the subject's two logits do by at most an ulp in bfloat16 of the larger;
    - sigma ratio: the root mean square of all errors against HF exact is at most HF's;
    - Bhattacharyya: for each new token, the absolute errors of all texts are distributed as HF's are, 0.99 or more.
    """
    tokens = []
    my_errors: list[list[Tensor]] = []  # of each text and token
    hf_errors: list[list[Tensor]] = []
    for my_logits, hf_logits, exact_logits in zip(subject, hf, exact, strict=True):
        found = tokens_of(my_logits, hf_logits)
        baselines = [row[token.kept] for row, token in zip(exact_logits.double(), found, strict=True)]
        my_errors.append([(token.mine - baseline).abs() for token, baseline in zip(found, baselines, strict=True)])
        hf_errors.append([(token.theirs - baseline).abs() for token, baseline in zip(found, baselines, strict=True)])
        tokens += found
    within, static_note = static_route(tokens, VLLM_NEURON_TOLERANCES, decimals=None)
    far = [gap for gap, size in other_choices(tokens) if not gap <= ulp(size, torch.bfloat16)]
    if far:
        static_note += f"; {len(far)} other greedy tokens, by up to {max(far):.3g}, where a bfloat16 ulp is allowed"

    def mean_square(errors: list[list[Tensor]]) -> float:
        return float(torch.cat([x for text in errors for x in text]).pow(2).mean())

    hf_square = mean_square(hf_errors)
    sigma = (mean_square(my_errors) / hf_square) ** 0.5 if hf_square else float("inf")
    overlaps = []
    for number in range(max(len(errors) for errors in my_errors)):  # the new tokens
        mine = [errors[number] for errors in my_errors if number < len(errors)]
        theirs = [errors[number] for errors in hf_errors if number < len(errors)]
        overlaps.append(overlap(torch.cat(mine), torch.cat(theirs)))
    routes = {
        f"static: {static_note}": within and not far,
        f"sigma ratio {sigma:.3f} (at most 1)": sigma <= 1.0,
        f"Bhattacharyya {min(overlaps):.4f} at its worst token (at least 0.99)": min(overlaps) >= 0.99,
    }
    words = [f"{name}: {'passes' if passed else 'fails'}" for name, passed in routes.items()]
    return {"passed": any(routes.values()), "note": f"one of three routes is enough; {'; '.join(words)}"}


def summary(texts: list, dtype: torch.dtype) -> dict | None:
    """The report's `logits`, of the positions at which all that is compared was seen; None if the subject has none."""
    if any("logits" not in text.subject for text in texts):
        return None
    divergences = []
    hf_divergences = []
    agreements = []
    subjects = []
    hfs = []
    exacts = []
    first = None
    for row, text in enumerate(texts):
        seen = text.seen["logits"].nonzero().flatten()  # P'
        subject = text.subject["logits"][seen]
        hf = text.hf["logits"][seen]
        exact = text.exact["logits"][seen]
        divergences.append(kl_divergence(exact, subject))
        hf_divergences.append(kl_divergence(exact, hf))
        agreements.append(subject.argmax(-1) == hf.argmax(-1))
        other = first_other_token(subject, hf, dtype)
        if first is None and other is not None:
            first = {"row": row, **other, "position": int(seen[other["position"]])}
        chose_new_tokens = seen >= text.prompt - 1
        subjects.append(subject[chose_new_tokens])
        hfs.append(hf[chose_new_tokens])
        exacts.append(exact[chose_new_tokens])
    agreement = torch.cat(agreements)
    if not len(agreement):
        return None
    divergence = torch.cat(divergences)
    new_subject = torch.cat(subjects)
    is_usable = (new_subject < torch.inf).all() and torch.isfinite(new_subject).any(-1).all()  # NaN is not
    if not len(new_subject) or not is_usable:
        note = "NaN or infinity" if len(new_subject) else "no logits that chose a new token were seen"
        nxdi = {"passed": False, "note": note}
        vllm_neuron = dict(nxdi)
    else:
        nxdi = nxdi_logit_matching(new_subject, torch.cat(exacts), dtype)
        vllm_neuron = vllm_neuron_verdict(subjects, hfs, exacts)
    return {
        "positions": len(agreement),
        "top1_agreement": float(agreement.float().mean()),
        "first_other": first,
        "mean_kl": float(divergence.mean()),
        "max_kl": float(divergence.max()),
        "hf_mean_kl": float(torch.cat(hf_divergences).mean()),
        "nxdi": nxdi,
        "vllm_neuron": vllm_neuron,
    }

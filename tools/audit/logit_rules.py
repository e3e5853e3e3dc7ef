"""What an audit says about logits: agreement of greedy tokens, KL divergence, and the verdicts of two other tools, for
people who have to report them."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

TOLERANCES = {5: 0.01, 50: 0.02, 1000: 0.03, None: 0.05}  # NxDI's: of the k largest logits -> relative error


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


def without_shift(mine: Tensor, theirs: Tensor) -> Tensor:
    """Logits [V] of one token, less the constant of their linear fit to the other ones."""
    my_mean = mine.mean()
    their_mean = theirs.mean()
    deviation = theirs - their_mean
    slope = (deviation * (mine - my_mean)).sum() / deviation.pow(2).sum()
    return mine - (my_mean - slope * their_mean)


def nxdi_logit_matching(subject: Tensor, exact: Tensor, dtype: torch.dtype) -> dict:
    """NxDI's `logit_validation` with its defaults, on logits [M,V] of M new tokens, against HF in float32.

    For each token, a constant shift is removed (found by a linear fit of the subject's logits to HF's). Among HF's 5,
    50, 1000 and all largest logits, the largest error less 1e-5 is divided by the largest of them, and rounded to the
    decimals of its tolerance. Other greedy tokens pass if the subject's two logits differ by less than 0.001.
    """
    failures = []
    gaps = []
    worst = 0.0
    for position, (mine, theirs) in enumerate(zip(subject.double(), exact.double(), strict=True)):
        mine = without_shift(mine, theirs)
        differences = (mine - theirs).abs()
        for count, tolerance in TOLERANCES.items():
            vocabulary = len(theirs)
            largest = theirs.topk(min(count or vocabulary, vocabulary)).indices
            errors = (differences[largest] - 1e-5) / theirs[largest].abs().max()
            error = errors.max()
            worst = max(worst, float(error) / tolerance)
            if not float(error.round(decimals=2)) <= tolerance:
                failures.append(f"top {count or 'all'} of new token {position + 1}")
        if mine.argmax() != theirs.argmax():
            gaps.append(float(mine.max() - mine[theirs.argmax()]))
    note = f"the largest error is {worst:.2f} of its tolerance"
    if failures:
        note += f"; out of tolerance: {failures[0]}, {len(failures)} in all"
    if gaps:
        step = ulp(float(exact.max()), dtype)
        note += f"; {len(gaps)} other greedy tokens, by up to {max(gaps):.3g}, 0.001 is allowed"
        if step > 0.001:
            note += f", which cannot be met: an ulp of the largest logit is {step:.3g}"
    gaps_are_small = all(gap < 0.001 for gap in gaps)
    return {"passed": not failures and gaps_are_small, "note": note}


def vllm_neuron_verdict(subject: Tensor, hf: Tensor, exact: Tensor) -> dict:
    """vLLM Neuron's three-way verdict on logits [M,V]: it passes if the root mean square of the errors is at most HF's
    (sigma ratio 1.0), or if their distribution is HF's (Bhattacharyya coefficient 0.99), or by fixed tolerances, which
    are left out here. This follows its documentation, which does not give the number of bins: here there are 100 over
    the range of both."""
    mine = (subject - exact).flatten().double()
    theirs = (hf - exact).flatten().double()
    my_size = mine.pow(2).mean().sqrt()
    their_size = theirs.pow(2).mean().sqrt()
    sigma = float(my_size / their_size.clamp(min=1e-30))
    low = float(torch.minimum(mine.min(), theirs.min()))
    high = float(torch.maximum(mine.max(), theirs.max()))
    my_shares = torch.histc(mine, bins=100, min=low, max=high) / len(mine)
    their_shares = torch.histc(theirs, bins=100, min=low, max=high) / len(theirs)
    overlap = float((my_shares * their_shares).sqrt().sum())
    note = f"sigma ratio {sigma:.3f} (at most 1), Bhattacharyya {overlap:.4f} (at least 0.99): one of them is enough"
    return {"passed": sigma <= 1.0 or overlap >= 0.99, "note": note}


def summary(texts: list, dtype: torch.dtype) -> dict | None:
    """The report's `logits`; None if the subject has none."""
    if any("logits" not in text.subject for text in texts):
        return None
    divergences = []
    hf_divergences = []
    agreements = []
    new_subject = []
    new_hf = []
    new_exact = []
    first = None
    for row, text in enumerate(texts):
        subject = text.subject["logits"]
        hf = text.hf["logits"]
        exact = text.exact["logits"]
        divergences.append(kl_divergence(exact, subject))
        hf_divergences.append(kl_divergence(exact, hf))
        agreements.append(subject.argmax(-1) == hf.argmax(-1))
        other = first_other_token(subject, hf, dtype)
        if first is None and other is not None:
            first = {"row": row, **other}
        chose_new_tokens = slice(text.prompt - 1, None)
        new_subject.append(subject[chose_new_tokens])
        new_hf.append(hf[chose_new_tokens])
        new_exact.append(exact[chose_new_tokens])
    divergence = torch.cat(divergences)
    hf_divergence = torch.cat(hf_divergences)
    agreement = torch.cat(agreements)
    subject = torch.cat(new_subject)
    hf = torch.cat(new_hf)
    exact = torch.cat(new_exact)
    if torch.isfinite(subject).all():
        nxdi = nxdi_logit_matching(subject, exact, dtype)
        vllm_neuron = vllm_neuron_verdict(subject, hf, exact)
    else:
        nxdi = {"passed": False, "note": "NaN or infinity"}
        vllm_neuron = dict(nxdi)
    return {
        "positions": len(agreement),
        "top1_agreement": float(agreement.float().mean()),
        "first_other": first,
        "mean_kl": float(divergence.mean()),
        "max_kl": float(divergence.max()),
        "hf_mean_kl": float(hf_divergence.mean()),
        "nxdi": nxdi,
        "vllm_neuron": vllm_neuron,
    }

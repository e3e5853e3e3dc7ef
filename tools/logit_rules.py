"""What an audit says of logits: agreement of greedy tokens, KL divergence, and the verdicts of two other tools for
those who have to report them."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

TOLERANCES = {5: 0.01, 50: 0.02, 1000: 0.03, None: 0.05}  # NxDI's: of the k largest logits -> relative error


def ulp(value: float, dtype: torch.dtype) -> float:
    """The distance to the next number of a dtype, at this size."""
    size = torch.tensor(abs(value), dtype=torch.float64).clamp(min=torch.finfo(dtype).tiny)
    return float(torch.exp2(size.log2().floor()) * torch.finfo(dtype).eps)


def first_other_token(subject: Tensor, hf: Tensor, dtype: torch.dtype) -> dict | None:
    """The first position at which the greedy tokens of logits [P,V] differ, and whether HF's two are within an ulp."""
    mine, theirs = subject.argmax(-1), hf.argmax(-1)
    other = (mine != theirs).nonzero().flatten()
    if not len(other):
        return None
    position = int(other[0])
    here = hf[position]
    gap = float(here[theirs[position]] - here[mine[position]])
    steps = gap / ulp(float(here.max()), dtype)
    found = {"position": position, "subject": int(mine[position]), "hf": int(theirs[position])}
    return found | {"gap_ulp": steps, "tie": steps <= 1}


def kl_divergence(exact: Tensor, other: Tensor) -> Tensor:
    """KL(exact || other) of logits [P,V], in nats [P]."""
    p, q = F.log_softmax(exact.double(), dim=-1), F.log_softmax(other.double(), dim=-1)
    return (p.exp() * (p - q)).sum(-1)


def nxdi_logit_matching(subject: Tensor, exact: Tensor, dtype: torch.dtype) -> dict:
    """NxDI's `logit_validation` with its defaults, on logits [M,V] of M new tokens, against HF in float32.

    Of each token: a constant shift is removed (that of a linear fit of the subject's logits to HF's). Of HF's 5, 50,
    1000 and all largest logits the largest error, less 1e-5, is divided by the largest of them and rounded to the
    decimals of its tolerance. Other greedy tokens pass if the subject's two logits differ by less than 0.001.
    """
    failures, worst, gaps = [], 0.0, []
    for position, (mine, theirs) in enumerate(zip(subject.double(), exact.double(), strict=True)):
        slope = ((theirs - theirs.mean()) * (mine - mine.mean())).sum() / (theirs - theirs.mean()).pow(2).sum()
        mine = mine - (mine.mean() - slope * theirs.mean())
        for count, tolerance in TOLERANCES.items():
            largest = theirs.topk(min(count or len(theirs), len(theirs))).indices
            errors = ((mine - theirs)[largest].abs() - 1e-5) / theirs[largest].abs().max()
            worst = max(worst, float(errors.max()) / tolerance)
            if not float(errors.max().round(decimals=2)) <= tolerance:
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
    return {"passed": not failures and all(gap < 0.001 for gap in gaps), "note": note}


def vllm_neuron_verdict(subject: Tensor, hf: Tensor, exact: Tensor) -> dict:
    """vLLM Neuron's three-way verdict on logits [M,V]: it passes if the root mean square of the errors is at most HF's
    (sigma ratio 1.0), or if their distribution is HF's (Bhattacharyya coefficient 0.99), or by fixed tolerances, which
    are left out here. From its documentation; 100 bins over the range of both, since the number is not documented."""
    mine, theirs = (subject - exact).flatten().double(), (hf - exact).flatten().double()
    sigma = float(mine.pow(2).mean().sqrt() / theirs.pow(2).mean().sqrt().clamp(min=1e-30))
    low, high = float(torch.minimum(mine.min(), theirs.min())), float(torch.maximum(mine.max(), theirs.max()))
    counts = [torch.histc(x, bins=100, min=low, max=high) / len(x) for x in (mine, theirs)]
    overlap = float((counts[0] * counts[1]).sqrt().sum())
    note = f"sigma ratio {sigma:.3f} (at most 1), Bhattacharyya {overlap:.4f} (at least 0.99): one of them is enough"
    return {"passed": sigma <= 1.0 or overlap >= 0.99, "note": note}


def summary(texts: list, dtype: torch.dtype) -> dict | None:
    """The report's `logits`; None if the subject has none."""
    if any("logits" not in text.subject for text in texts):
        return None
    divergence, own, agreeing, first = [], [], [], None
    new: dict[str, list[Tensor]] = {"subject": [], "hf": [], "exact": []}
    for row, text in enumerate(texts):
        logits = {name: getattr(text, name)["logits"] for name in new}
        divergence.append(kl_divergence(logits["exact"], logits["subject"]))
        own.append(kl_divergence(logits["exact"], logits["hf"]))
        agreeing.append(logits["subject"].argmax(-1) == logits["hf"].argmax(-1))
        other = first_other_token(logits["subject"], logits["hf"], dtype)
        if first is None and other is not None:
            first = {"row": row} | other
        for name, parts in new.items():
            parts.append(logits[name][text.prompt - 1 :])
    divergence, agreeing = torch.cat(divergence), torch.cat(agreeing)
    subject, hf, exact = (torch.cat(parts) for parts in new.values())
    found = {"positions": len(agreeing), "top1_agreement": float(agreeing.float().mean()), "first_other": first}
    found |= {
        "mean_kl": float(divergence.mean()),
        "max_kl": float(divergence.max()),
        "hf_mean_kl": float(torch.cat(own).mean()),
    }
    finite = bool(torch.isfinite(subject).all())
    broken = {"passed": False, "note": "NaN or infinity"}
    found["nxdi"] = nxdi_logit_matching(subject, exact, dtype) if finite else broken
    found["vllm_neuron"] = vllm_neuron_verdict(subject, hf, exact) if finite else broken
    return found

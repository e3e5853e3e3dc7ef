"""tools.audit.logit_rules: worked out by hand, where a shift is removed and where two tools have other numbers."""

from __future__ import annotations

import re

import pytest
import torch
from torch import Tensor

from tools.audit.logit_rules import (
    first_other_token,
    kl_divergence,
    nxdi_logit_matching,
    static_route,
    tokens_of,
    vllm_neuron_verdict,
)

# Logits, and an error that a linear fit to them takes for no shift and no scale: the sum of the error is 0, and so is
# its product with the logits. The largest error is 2 of 4, the largest of the logits.
LOGITS = torch.tensor([[4.0, 3.0, 2.0, -4.0]])
ERROR = torch.tensor([[1.0, -2.0, 1.0, 0.0]])
THREE_ROUTES = re.compile(
    r"one of three routes is enough; static: .*: (passes|fails); "
    r"sigma ratio ([\d.]+|inf) \(at most 1\): (passes|fails); "
    r"Bhattacharyya ([\d.]+) at its worst token \(at least 0.99\): (passes|fails)"
)


def routes(subject: Tensor, hf: Tensor, exact: Tensor) -> dict[str, object]:
    """vLLM Neuron's verdict on one text, and what its three routes are said to be."""
    verdict = vllm_neuron_verdict([subject], [hf], [exact])
    static, sigma, sigma_passes, overlap, overlap_passes = THREE_ROUTES.fullmatch(verdict["note"]).groups()
    passes = {"static": static, "sigma": sigma_passes, "overlap": overlap_passes}
    assert verdict["passed"] == ("passes" in passes.values())
    return {name: word == "passes" for name, word in passes.items()} | {"ratio": float(sigma), "bc": float(overlap)}


@pytest.mark.parametrize(
    ("largest", "nxdi", "vllm_neuron"),
    [
        (0.0090, True, True),
        (0.0109, True, True),  # 0.01 if rounded
        (0.0112, True, False),  # vLLM Neuron does not round, and allows 0.011
        (0.0149, True, False),
        (0.0151, False, False),  # 0.02 if rounded
    ],
)
def test_each_rule_has_its_own_tolerance_for_the_largest_logits(largest: float, nxdi: bool, vllm_neuron: bool) -> None:
    subject = LOGITS + ERROR * (4 * largest / 2)
    assert nxdi_logit_matching(subject, LOGITS, torch.bfloat16)["passed"] == nxdi
    assert routes(subject, LOGITS, LOGITS)["static"] == vllm_neuron


def test_tolerances_widen_with_the_logits_that_are_looked_at() -> None:
    """Of 1200 logits, an error of 1.5% of the largest is too much in the first 5, and one of 2.5% in the first 50."""
    logits = torch.linspace(10, -10, 1200)[None]
    tolerances = {5: 0.01, 50: 0.02, 1000: 0.03, None: 0.05}
    for place, error, passes in ((40, 0.15, True), (40, 0.25, False), (500, 0.25, True), (500, 0.35, False)):
        subject = logits.clone()
        subject[0, place] += error * (1 if place < 600 else -1)
        passed, note = static_route(tokens_of(subject, logits), tolerances, decimals=None)
        assert passed == passes, (place, error, note)


def test_a_constant_shift_is_removed() -> None:
    assert nxdi_logit_matching(LOGITS + 7, LOGITS, torch.bfloat16)["passed"]
    found = routes(LOGITS - 1, LOGITS + 1, LOGITS)  # HF is off by 1, and the shift to HF is what counts
    assert (found["static"], found["ratio"], found["bc"]) == (True, 1.0, 1.0)


@pytest.mark.parametrize(
    ("size", "gap", "nxdi", "vllm_neuron"),
    [(16.0, 0.0004, True, True), (16.0, 0.1, False, True), (16.0, 0.15, False, False), (4.0, 0.1, False, False)],
)
def test_other_greedy_tokens_may_be_an_ulp_apart_for_vllm_neuron(
    size: float, gap: float, nxdi: bool, vllm_neuron: bool
) -> None:
    """In bfloat16 an ulp is 0.125 from 16 on, and 0.03125 from 4 on; NxDI allows 0.001."""
    hf = torch.linspace(-size, size, 2001)[None]
    hf = torch.cat((hf[:, :-2], torch.tensor([[size - 0.0001, size]])), dim=-1)
    subject = hf.clone()
    subject[0, -2] = size + gap / 2
    subject[0, -1] = size - gap / 2
    verdict = nxdi_logit_matching(subject, hf, torch.bfloat16)
    assert verdict["passed"] == nxdi
    assert routes(subject, hf, hf)["static"] == vllm_neuron
    if not nxdi and size == 16:
        assert "cannot be met: an ulp of the largest logit is 0.125" in verdict["note"]


def test_errors_are_compared_by_size_and_by_distribution() -> None:
    """HF's errors are 0, 0, 1, 1 by absolute value, the subject's 1, 1, 1, 1: the root mean squares are as sqrt(2), and
    the histograms share sqrt(1/2 * 1)."""
    exact = torch.zeros(2, 4)
    hf = torch.tensor([[0.0, 0.0, 1.0, -1.0], [0.0, 0.0, 1.0, -1.0]])
    same = torch.tensor([[1.0, -1.0, 0.0, 0.0], [0.0, 0.0, 1.0, -1.0]])
    assert routes(same, hf, exact) == {"static": False, "sigma": True, "overlap": True, "ratio": 1.0, "bc": 1.0}
    other = torch.tensor([[1.0, -1.0, 0.0, 0.0], [1.0, -1.0, 1.0, -1.0]])  # at the second token
    found = routes(other, hf, exact)
    assert found["ratio"] == pytest.approx((6 / 4) ** 0.5, abs=1e-3)
    assert found["bc"] == pytest.approx(0.5**0.5, abs=1e-4)
    assert not found["sigma"] and not found["overlap"]


def test_the_errors_of_all_texts_at_one_token_are_one_distribution() -> None:
    exact = torch.zeros(1, 4)
    hf = torch.tensor([[0.0, 0.0, 1.0, -1.0]])
    large = torch.tensor([[1.0, -1.0, 1.0, -1.0]])
    none = torch.zeros(1, 4)
    verdict = vllm_neuron_verdict([large, none], [hf, hf], [exact, exact])  # four errors of 1, and four of 0
    assert "Bhattacharyya 1.0000" in verdict["note"] and "sigma ratio 1.000" in verdict["note"]


def test_logits_of_minus_infinity_are_left_out() -> None:
    subject = torch.cat((LOGITS, torch.tensor([[-torch.inf]])), dim=-1)
    hf = torch.cat((LOGITS, torch.tensor([[1.0]])), dim=-1)
    assert nxdi_logit_matching(subject, hf, torch.bfloat16)["passed"]
    assert routes(subject, hf, hf)["static"]


def test_logits_that_are_all_the_same_have_a_verdict() -> None:
    """As those of a checkpoint whose lm_head is zero."""
    zeros = torch.zeros(1, 4)
    assert not nxdi_logit_matching(LOGITS, zeros, torch.bfloat16)["passed"]
    assert not routes(LOGITS, zeros, zeros)["static"]
    assert routes(zeros, zeros, zeros)["overlap"]


def test_nothing_to_compare_with_is_no_ratio() -> None:
    """HF is exact: only the same distribution is left."""
    found = routes(LOGITS + 0.1 * ERROR, LOGITS, LOGITS)
    assert (found["ratio"], found["sigma"], found["static"]) == (float("inf"), False, False)


def test_a_tie_is_said_to_be_one() -> None:
    hf = torch.tensor([[1.0, 18.0, 17.875, 0.0]])
    subject = torch.tensor([[1.0, 17.875, 18.0, 0.0]])
    found = first_other_token(subject, hf, torch.bfloat16)
    assert found == {"position": 0, "subject": 2, "hf": 1, "gap_ulp": 1.0, "tie": True}
    assert not first_other_token(subject, hf, torch.float16)["tie"]
    expected = torch.nn.functional.kl_div(subject.log_softmax(-1), hf.log_softmax(-1), log_target=True, reduction="sum")
    assert float(kl_divergence(hf, subject)) == pytest.approx(float(expected), rel=1e-5)

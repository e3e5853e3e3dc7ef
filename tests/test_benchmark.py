"""`tools.benchmark`: what its tables say of given samples, and that the processes of its cases time what they name."""

import json
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers.models.llama.modeling_llama import rotate_half

import test_llama_neuron
from convert_weights import convert
from llama_neuron import LlamaConfig, NeuronConfig
from test_llama_neuron import command
from tools.benchmark import GROUPS, Case, cases, interleaved, process_table, table

hf_checkpoint = test_llama_neuron.hf_checkpoint  # a fixture


def samples(*steps_and_prefills: tuple[float, float]) -> list[dict[str, float]]:
    return [{"step_s": step, "prefill_s": prefill} for step, prefill in steps_and_prefills]


def test_ratios_are_medians_of_the_ratios_within_a_round() -> None:
    # the second round is on a machine three times as slow: by medians of each, the ratios would be 2 and 0.8
    ours, hf = samples((0.01, 0.3), (0.03, 0.9), (0.02, 0.4)), samples((0.04, 0.4), (0.09, 1.2), (0.04, 0.5))
    rows = table("bf16", [(Case("llama_neuron eager"), ours), (Case("HF sdpa"), hf)]).splitlines()
    setting = "bfloat16, batch 1, prompt 128, cache 512"
    assert rows[2] == f"| llama_neuron eager, {setting} | 50.0 (33.3-100.0) | 3.00 | 400 (300-900) | 0.75 |"
    assert rows[3] == f"| HF sdpa, {setting} | 25.0 (11.1-25.0) | 1.00 | 500 (400-1200) | 1.00 |"


def test_a_batch_makes_as_many_tokens_in_a_step_as_it_has_rows() -> None:
    both = [(Case(system, batch=8), samples((0.1, 1.0))) for system in ("llama_neuron sdpa", "HF sdpa")]
    assert table("batch", both).splitlines()[2].split(" | ")[1] == "80.0 (80.0-80.0)"


def test_rates_of_conversion_are_set_against_cp() -> None:
    found = {"first token, llama_neuron, s": [1.0], "first token, HF, s": [4.0], "conversion, tp 1, GB/s": [0.3]}
    rows = process_table(found | {"cp -r, GB/s": [0.5]}).splitlines()
    assert "| first token, llama_neuron / first token, HF | 0.25 |" in rows
    assert "| conversion, tp 1 / cp -r | 0.60 |" in rows


@pytest.mark.parametrize("group", [group for group in GROUPS if group not in ("cache", "process")])
def test_every_case_has_hf_at_its_setting(group: str) -> None:
    todo = cases(group, ["llama.cpp"])
    assert len(todo) == len(set(todo))
    assert all(replace(case, system="HF sdpa", tp=1) in todo for case in todo)


def test_interleaved_heads_rotate_as_hfs(hf_checkpoint: Callable[[str], Path]) -> None:
    """llama.cpp and gpt-fast rotate neighbours, as complex numbers; HF rotates halves."""
    path = hf_checkpoint("llama-3")
    config = LlamaConfig.from_pretrained(path)
    hfs, theirs = load_file(path / "model.safetensors"), dict(interleaved(path, config))
    x, angle = torch.randn(config.hidden_size), torch.rand(config.head_dim // 2) * 3
    for name, heads in (("q_proj", config.num_attention_heads), ("k_proj", config.num_key_value_heads)):
        name = f"model.layers.1.self_attn.{name}.weight"
        q = (hfs[name].float() @ x).view(heads, -1)
        both = angle.repeat(2)
        rotated = (q * both.cos() + rotate_half(q) * both.sin()).view(heads, 2, -1).transpose(1, 2).flatten(1)
        pairs = torch.view_as_complex((theirs[name].float() @ x).view(heads, -1, 2))
        turned = torch.view_as_real(pairs * torch.polar(torch.ones_like(angle), angle)).flatten(1)
        torch.testing.assert_close(turned, rotated)


@pytest.mark.parametrize("case", [Case("llama_neuron eager"), Case("llama_neuron eager", tp=2), Case("HF static")])
def test_a_case_prints_its_seconds(case: Case, hf_checkpoint: Callable[[str], Path], tmp_path: Path) -> None:
    path = hf_checkpoint("llama-3")
    neuron = NeuronConfig(tp_degree=case.tp, sequence_length=64)
    convert(path, tmp_path / f"bfloat16-tp{case.tp}", LlamaConfig.from_pretrained(path), neuron)
    case = replace(case, prompt=8, new=4, cache=64)
    flags = ("--hf", path, "--folder", tmp_path, "--threads", 2, "--case", json.dumps(asdict(case)))
    ran = command("-m", "tools.benchmark", *flags)
    assert ran.returncode == 0, ran.stderr
    found = json.loads(ran.stdout)
    assert sorted(found) == ["prefill_s", "step_s"]
    assert 0 < found["step_s"] < 5
    assert 0 < found["prefill_s"] < 5


def test_a_chart_of_what_is_not_measured_is_refused(hf_checkpoint: Callable[[str], Path]) -> None:
    ran = command("-m", "tools.benchmark", "--hf", hf_checkpoint("llama-3"), "--groups", "cache", "--chart", "x.png")
    assert (ran.returncode, ran.stderr.count("\n")) == (2, 1)
    assert ran.stderr.endswith("error: --chart draws bf16 and length: add both groups\n")

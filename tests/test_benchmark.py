"""`python -m tools.benchmark`: its tables against figures worked out by hand, its cases as processes of their own."""

import json
import sys
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import LlamaForCausalLM
from transformers.models.llama.modeling_llama import rotate_half

from conftest import command, hf_model
from convert_weights import llama_config, read_config
from llama_neuron import run_command
from tools.benchmark import SETTINGS, cases, main, process_table, table
from tools.competitors import BASELINE, COMPETITORS, Case, Files, interleaved


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


def test_a_long_cache_is_set_against_a_short_one() -> None:
    short, long = Case("llama_neuron sdpa", cache=512), Case("llama_neuron sdpa", cache=8192)
    rows = table("cache", [(short, samples((0.02, 0.1))), (long, samples((0.025, 0.11)))]).splitlines()
    assert rows[0] == "| case | decode tokens/s | x cache 512 | prefill ms | x cache 512 |"
    assert rows[3].endswith("cache 8192 | 40.0 (40.0-40.0) | 0.80 | 110 (110-110) | 1.10 |")


def test_rates_of_conversion_are_set_against_cp() -> None:
    one = {"first token, llama_neuron, s": 1.0, "first token, HF, s": 4.0}
    rows = process_table([one | {"conversion, tp 1, GB/s": 0.3, "cp -r, GB/s": 0.5}]).splitlines()
    assert "| conversion, tp 1 | 0.30 (0.30-0.30) GB/s |" in rows
    assert "| first token, llama_neuron / first token, HF | 0.25 |" in rows
    assert "| conversion, tp 1 / cp -r | 0.60 |" in rows


@pytest.mark.parametrize("group", SETTINGS)
def test_every_case_has_what_its_ratios_are_taken_against(group: str) -> None:
    todo = cases(group, {"gpt-fast eager": "no --gpt-fast"})
    assert len(todo) == len(set(todo))
    assert "gpt-fast eager" not in {case.system for case in todo}
    for case in todo:
        other = replace(case, cache=512) if group == "cache" else replace(case, system=BASELINE)
        assert other in todo


def test_interleaved_heads_rotate_as_hfs(hf_checkpoint: Callable[[str], Path]) -> None:
    """llama.cpp and gpt-fast rotate neighbours, as complex numbers; HF rotates halves."""
    path = hf_checkpoint("llama-3")
    config = llama_config(read_config(path))
    hfs, theirs = load_file(path / "model.safetensors"), dict(interleaved(path, config))
    assert set(hfs) == set(theirs)
    x, angle = torch.randn(config.hidden_size), torch.rand(config.head_dim // 2) * 3
    for name, heads in (("q_proj", config.num_attention_heads), ("k_proj", config.num_key_value_heads)):
        name = f"model.layers.1.self_attn.{name}.weight"
        q = (hfs[name].float() @ x).view(heads, -1)
        both = angle.repeat(2)
        rotated = (q * both.cos() + rotate_half(q) * both.sin()).view(heads, 2, -1).transpose(1, 2).flatten(1)
        pairs = torch.view_as_complex((theirs[name].float() @ x).view(heads, -1, 2))
        turned = torch.view_as_real(pairs * torch.polar(torch.ones_like(angle), angle)).flatten(1)
        torch.testing.assert_close(turned, rotated)


def test_transformers_reads_the_checkpoint_back_from_the_file_for_llama_cpp(
    hf_checkpoint: Callable[[str], Path], tmp_path: Path
) -> None:
    pytest.importorskip("gguf")
    path = hf_checkpoint("llama-3")
    file = COMPETITORS["llama.cpp"].source(Case("llama.cpp", "float32"), Files(path, tmp_path, None))
    read = LlamaForCausalLM.from_pretrained(tmp_path, gguf_file=file.name, dtype=torch.float32).state_dict()
    for name, tensor in hf_model(path, torch.float32).state_dict().items():
        assert torch.equal(read[name], tensor), name


@pytest.mark.parametrize("name", ["llama_neuron flash", "llama_neuron eager, tp 2", "HF static"])
def test_a_case_prints_its_seconds(name: str, hf_checkpoint: Callable[[str], Path], tmp_path: Path) -> None:
    path = hf_checkpoint("llama-3")
    case = Case(name, batch=2, prompt=8, new=4, cache=64)
    COMPETITORS[name].source(case, Files(path, tmp_path, None))
    flags = ("--hf", path, "--folder", tmp_path, "--threads", 2, "--case", json.dumps(asdict(case)))
    ran = command("-m", "tools.benchmark", *flags)
    assert ran.returncode == 0, ran.stderr
    found = json.loads(ran.stdout)
    assert sorted(found) == ["prefill_s", "step_s"]
    assert 0 < found["step_s"] < 5
    assert 0 < found["prefill_s"] < 5


@pytest.mark.parametrize(
    "flags, message",
    [
        (["--groups", "cache", "--chart", "x.png"], "--chart draws bf16 and length: add both groups"),
        (["--gpt-fast", "docs"], "--gpt-fast docs holds no model.py: name a checkout"),
        (["--hf", "nowhere"], "nowhere/config.json not found: name a directory that holds a Llama checkpoint"),
    ],
)
def test_what_cannot_be_measured_is_refused_in_one_line(
    flags: list[str],
    message: str,
    hf_checkpoint: Callable[[str], Path],
    capsys: pytest.CaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(sys, "argv", ["benchmark.py", "--hf", str(hf_checkpoint("llama-3")), *flags])
    with pytest.raises(SystemExit) as refused:
        run_command(main)
    assert refused.value.code == 2
    assert capsys.readouterr() == ("", f"benchmark.py: error: {message}\n")

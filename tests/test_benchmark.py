"""`python -m tools.benchmark`: its tables against figures worked out by hand, its cases as processes of their own."""

import json
import math
import sys
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import LlamaForCausalLM
from transformers.models.llama.modeling_llama import rotate_half

from checkpoint.config import expected_shapes, llama_config, read_config
from launch.command import run_command
from llama_neuron import generate, load_model
from tests.helpers import command, hf_model
from tools.benchmark.command import (
    SETTINGS,
    cases,
    draw,
    main,
    numbers_read,
    process_table,
    run_process,
    table,
    with_share,
)
from tools.benchmark.competitors import BASELINE, COMPETITORS, Case, Files, interleaved, open_llama_cpp
from tools.benchmark.random_checkpoint import COMMON, SHAPES, make_random

PEAK = "import resource; print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)"  # kB


def samples(*steps_and_prefills: tuple[float, float]) -> list[dict[str, float]]:
    both = [{"step_s": step, "prefill_s": prefill} for step, prefill in steps_and_prefills]
    return [with_share(Case("HF sdpa"), seconds, numbers=10**8, read_gb_s=40.0) for seconds in both]


def test_ratios_are_medians_of_the_ratios_within_a_round() -> None:
    # the second round is on a machine three times as slow: by medians of each, the ratios would be 2 and 0.8
    ours, hf = samples((0.01, 0.3), (0.03, 0.9), (0.02, 0.4)), samples((0.04, 0.4), (0.09, 1.2), (0.04, 0.5))
    rows = table("bf16", [(Case("llama_neuron eager"), ours), (Case("HF sdpa"), hf)]).splitlines()
    setting = "bfloat16, batch 1, prompt 128, cache 512"
    # 1e8 weights of 2 bytes in 0.02 s are 10 GB/s, a quarter of 40
    assert rows[2] == f"| llama_neuron eager, {setting} | 50.0 (33.3-100.0) | 3.00 | 0.25 | 400 (300-900) | 0.75 |"
    assert rows[3] == f"| HF sdpa, {setting} | 25.0 (11.1-25.0) | 1.00 | 0.12 | 500 (400-1200) | 1.00 |"
    assert rows[5] == "Read bandwidth: 40.0 (40.0-40.0) GB/s."


def test_without_the_baseline_there_are_no_ratios() -> None:
    row = table("bf16", [(Case("llama.cpp"), samples((0.02, 0.4)))]).splitlines()[2]
    assert row.endswith(" | 50.0 (50.0-50.0) | - | 0.25 | 400 (400-400) | - |")


def test_a_batch_makes_as_many_tokens_in_a_step_as_it_has_rows() -> None:
    both = [(Case(system, batch=8), samples((0.1, 1.0))) for system in ("llama_neuron sdpa", "HF sdpa")]
    assert table("batch", both).splitlines()[2].split(" | ")[1] == "80.0 (80.0-80.0)"


def test_a_long_cache_is_set_against_a_short_one() -> None:
    short, long = Case("llama_neuron sdpa", cache=512), Case("llama_neuron sdpa", cache=8192)
    rows = table("cache", [(short, samples((0.02, 0.1))), (long, samples((0.025, 0.11)))]).splitlines()
    assert rows[0] == "| case | decode tokens/s | x cache 512 | share of read bandwidth | prefill ms | x cache 512 |"
    assert rows[3].endswith("cache 8192 | 40.0 (40.0-40.0) | 0.80 | 0.20 | 110 (110-110) | 1.10 |")


def test_rates_of_conversion_are_set_against_cp() -> None:
    one = {"first token, llama_neuron, s": 1.0, "first token, HF, s": 4.0}
    rows = process_table([one | {"conversion, tp 1, GB/s": 0.3, "cp -r, GB/s": 0.5}]).splitlines()
    assert "| conversion, tp 1 | 0.30 (0.30-0.30) GB/s |" in rows
    assert "| first token, llama_neuron / first token, HF | 0.25 |" in rows
    assert "| conversion, tp 1 / cp -r | 0.60 |" in rows


@pytest.mark.parametrize("group", SETTINGS)
def test_every_case_has_what_its_ratios_are_taken_against(group: str) -> None:
    todo = cases(group, [name for name in COMPETITORS if name != "gpt-fast eager"])
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


@pytest.mark.parametrize("family", ["tinyllama", "head_dim"])
def test_a_batch_of_llama_cpp_makes_the_tokens_of_this_model(
    family: str, hf_checkpoint: Callable[[str], Path], converted: Callable[..., Path], tmp_path: Path
) -> None:
    pytest.importorskip("llama_cpp")
    pytest.importorskip("gguf")
    path, case = hf_checkpoint(family), Case("llama.cpp", "float32", batch=3, prompt=8, new=5, cache=64)
    model = load_model(converted(family), batch_size=3, sequence_length=64)
    prompts = case.prompts(model.config.vocab_size)
    expected, ticks = generate(model, prompts, case.new + 1, []), []
    run = open_llama_cpp(COMPETITORS["llama.cpp"].source(case, Files(path, tmp_path, None)), case)
    for _ in range(2):  # the second time without what the first left in the cache
        assert run(prompts, lambda: ticks.append(None)) == expected
    assert len(ticks) == 2 * (case.new + 1)


@pytest.mark.parametrize(
    "shape, parameters, read",
    [("1b", 1_235_814_400, 1_235_814_400), ("8b", 8_030_261_248, 8_030_261_248 - 128256 * 4096)],
)
def test_shapes_have_as_many_parameters_as_the_models_they_are_named_after(
    shape: str, parameters: int, read: int, tmp_path: Path
) -> None:
    (tmp_path / "config.json").write_text(json.dumps(COMMON | SHAPES[shape]))
    config = llama_config(read_config(tmp_path))
    assert sum(map(math.prod, expected_shapes(config).values())) == parameters
    assert numbers_read(config) == read


@pytest.mark.parametrize("tied", [True, False])
def test_transformers_loads_a_random_checkpoint(tied: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tiny = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "vocab_size": 512}
    tiny |= {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 32, "tie_word_embeddings": tied}
    monkeypatch.setitem(SHAPES, "tiny", tiny)
    make_random(tmp_path / "one", "tiny")
    make_random(tmp_path / "two", "tiny")
    files = sorted(file.name for file in (tmp_path / "one").glob("*.safetensors"))
    assert len(files) == (4 if tied else 5)  # two layers, the embedding, the last norm, lm_head
    for file in files:
        assert (tmp_path / "one" / file).read_bytes() == (tmp_path / "two" / file).read_bytes()
    model, info = LlamaForCausalLM.from_pretrained(tmp_path / "one", output_loading_info=True)
    assert not any(info.values()), info
    assert {key: getattr(model.config, key) for key in tiny} == tiny
    assert model.config.rope_parameters == {"rope_type": "default", "rope_theta": 500000.0}
    for name, tensor in model.state_dict().items():
        assert tensor.dtype == torch.bfloat16
        if name.endswith("norm.weight"):
            assert (tensor == 1).all()
        else:
            assert abs(tensor.float().mean()) < 0.002
            assert 0.019 < tensor.float().std() < 0.021


def test_the_peak_memory_of_a_command_is_its_own() -> None:
    ballast = bytearray(b"x") * 200_000_000
    _, answer = run_process(sys.executable, "-c", PEAK)
    assert int(answer) * 1024 < len(ballast) / 2


def test_charts_are_two_pictures(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    bf16, length = ([(case, samples((0.1, 1.0))) for case in cases(group, COMPETITORS)] for group in ("bf16", "length"))
    draw(bf16, length, "a title", tmp_path / "speed.png")
    assert sorted(file.name for file in tmp_path.iterdir()) == ["speed-length.png", "speed.png"]


def test_chosen_competitors_alone_are_measured(hf_checkpoint: Callable[[str], Path]) -> None:
    name = "llama_neuron sdpa"
    flags = ("--hf", hf_checkpoint("llama-3"), "--threads", 1, "--rounds", 1, "--groups", "bf16", "--only", name)
    ran = command("-m", "tools.benchmark", *flags, "--json")
    assert ran.returncode == 0, ran.stderr
    answer = json.loads(ran.stdout)
    (case,) = answer["groups"]["bf16"]
    (sample,) = case["samples"]
    assert case["system"] == name
    assert "HF sdpa (--only)" in answer["not_measured"]
    assert 0 < sample["share"] < 1
    assert sample["read_gb_s"] > 1


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

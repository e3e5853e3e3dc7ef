"""tools.capture: every tensor of its file against what Hugging Face's own modules compute at the same positions."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor, nn

from convert_weights import convert
from llama_neuron import UsageError, backend_for, load_model, shard_path
from tests.helpers import command, hf_model
from tools.audit.oracle import OPTIONAL, run_hf
from tools.capture import CaptureModel, capture, main

PROMPTS, NEW_TOKENS = [[5, 11, 2, 60, 33, 47, 3], [7, 1, 40]], 5
# heads/KV heads 8/2, 9/3, 6/3 (with biases, and sizes that tp does not divide), 6/2 (of another size), 8/1 (biases)
FAMILIES = ["llama-3", "smollm2", "odd sizes", "head_dim", "granite-code"]


def hf_capture(model: nn.Module, prompt: list[int], new_tokens: int) -> dict[str, Tensor]:
    """What HF's modules compute for a prompt and each greedy new token fed back; the file's names, without B."""
    tensors = run_hf(model, prompt, new_tokens)
    for name in [name for name in tensors if name.rpartition(".")[2] in OPTIONAL]:
        del tensors[name]
    return tensors | {"greedy": tensors["logits"].argmax(-1)}


def assert_is_hfs(captured: dict[str, Tensor], expected: list[dict[str, Tensor]], bound: float) -> None:
    """Row by row: HF's names, shapes and values within `bound` of the largest, HF's ids, and zeros after the text."""
    for row, tensors in enumerate(expected):
        assert captured.keys() == tensors.keys()
        for name, hfs in tensors.items():
            mine, rest = torch.as_tensor(captured[name][row]).split((len(hfs), len(captured[name][row]) - len(hfs)))
            assert (mine - hfs).abs().max() <= (0 if name == "ids" else bound * hfs.abs().max()), name
            assert not rest.any(), name


def run_capture(rank: int, ckpt: Path, prompts: list, forced: list | None) -> dict:
    """In numpy's arrays, which go from process to process as bytes."""
    tensors = capture(ckpt, prompts, NEW_TOKENS, rank=rank, forced=forced)
    return {name: tensor.float().numpy() for name, tensor in tensors.items()}


@pytest.mark.parametrize("tp", [1, 2, 4])
@pytest.mark.parametrize("family", FAMILIES)
def test_float32_tensors_are_hfs(
    family: str, tp: int, hf_checkpoint: Callable, converted: Callable, on_ranks: Callable
) -> None:
    results = on_ranks(tp, run_capture, converted(family, tp), PROMPTS, None)
    hf = hf_model(hf_checkpoint(family), torch.float32)
    expected = [hf_capture(hf, prompt, NEW_TOKENS) for prompt in PROMPTS]
    for captured in results:
        assert_is_hfs(captured, expected, bound=2e-5)


@pytest.mark.skipif(not torch.cpu._is_avx512_bf16_supported(), reason="products round differently on this CPU")
@pytest.mark.parametrize("family", FAMILIES)
def test_bfloat16_tensors_have_hfs_bits(family: str, hf_checkpoint: Callable, converted: Callable) -> None:
    captured = capture(converted(family, dtype="bfloat16"), PROMPTS[:1], NEW_TOKENS)
    hf = hf_model(hf_checkpoint(family), torch.bfloat16)
    assert_is_hfs(captured, [hf_capture(hf, PROMPTS[0], NEW_TOKENS)], bound=0)
    with torch.inference_mode():
        ids, positions = captured["ids"][:, :7], slice(0, 7)
        theirs = hf(ids, output_hidden_states=True).hidden_states
    names = [f"hidden_states.{number}" for number in range(3)] + ["final_norm"]  # HF shows the last one normed only
    for name, hidden_states in zip(names, theirs, strict=True):
        assert torch.equal(captured[name][:, positions], hidden_states)
    dtypes = {name: tensor.dtype for name, tensor in captured.items()}
    known = dtypes.pop("ids"), dtypes.pop("greedy"), dtypes.pop("logits")
    assert known == (torch.int64, torch.int32, torch.float32)
    assert set(dtypes.values()) == {torch.bfloat16}


@pytest.mark.parametrize("tp", [2, 4])
@pytest.mark.parametrize("family", ["llama-3", "odd sizes"])
def test_bfloat16_ranks_are_as_far_from_float32_as_hf_is(
    family: str, tp: int, hf_checkpoint: Callable, converted: Callable, on_ranks: Callable
) -> None:
    prompt = PROMPTS[0]
    theirs = hf_capture(hf_model(hf_checkpoint(family), torch.bfloat16), prompt, NEW_TOKENS)
    ids = theirs.pop("ids").tolist()
    del theirs["greedy"]  # of logits that differ
    exact = hf_capture(hf_model(hf_checkpoint(family), torch.float32), ids[:-1], 1)
    forced = [ids[len(prompt) :]]
    ours, *_ = on_ranks(tp, run_capture, converted(family, tp, dtype="bfloat16"), [prompt], forced)
    for name, tensor in theirs.items():
        distance = (torch.from_numpy(ours[name][0]) - exact[name]).norm()
        assert distance < 1.5 * (tensor - exact[name]).norm(), name


@pytest.mark.parametrize("chunk", [None, 4])
def test_forced_ids_are_fed_and_kept(chunk: int | None, hf_checkpoint: Callable, converted: Callable) -> None:
    """Also if a prompt ends chunks before the longest one."""
    prompts, forced = [list(range(20)), [7, 1, 40]], [[9, 8, 7, 6, 5], [1, 2, 3, 4, 90]]
    captured = capture(converted("llama-3", prefill_chunk_size=chunk), prompts, NEW_TOKENS, forced=forced)
    hf = hf_model(hf_checkpoint("llama-3"), torch.float32)
    expected = []
    for prompt, new in zip(prompts, forced, strict=True):
        tensors = hf_capture(hf, prompt + new[:-1], 1)
        expected.append(tensors | {"ids": torch.tensor(prompt + new)})
    assert_is_hfs(captured, expected, bound=2e-5)


def test_a_captures_text_goes_on_after_eos_and_ends_with_the_prompt_if_one_token_is_asked_for(
    hf_checkpoint: Callable, tmp_path: Path
) -> None:
    hf, ckpt = tmp_path / "hf", tmp_path / "ckpt"
    expected = hf_capture(hf_model(hf_checkpoint("llama-3"), torch.float32), PROMPTS[0], NEW_TOKENS)
    shutil.copytree(hf_checkpoint("llama-3"), hf)
    (hf / "generation_config.json").write_text(json.dumps({"eos_token_id": expected["ids"][7:9].tolist()}))
    convert(hf, ckpt)
    assert load_model(ckpt).config.eos_token_id == expected["ids"][7:9].tolist()
    assert_is_hfs(capture(ckpt, PROMPTS[:1], NEW_TOKENS), [expected], bound=2e-5)
    short = {name: tensor[: 8 if name == "ids" else 7] for name, tensor in expected.items()}
    assert_is_hfs(capture(ckpt, PROMPTS[:1], 1), [short], bound=2e-5)


# ---- graphs


def test_one_graph_without_a_break_returns_all(converted: Callable) -> None:
    """As TorchNeuron compiles it: static shapes, the whole cache, and no Python between the graph's pieces."""
    ckpt = converted("odd sizes", sequence_length=32)
    model = load_model(ckpt, backend=backend_for("neuron"), model_class=CaptureModel)
    ids, positions = torch.tensor([PROMPTS[0]]).int(), torch.arange(7)[None].int()
    with torch.no_grad():
        eager = model(ids, positions, torch.zeros(1).int())
        model.compile(backend="aot_eager", fullgraph=True, dynamic=False)
        compiled = model(ids, positions, torch.zeros(1).int())
    assert len(compiled) == 3 + 4 + 3 * 6
    for mine, theirs in zip(compiled, eager, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=0, atol=1e-5)


@pytest.mark.skipif(
    find_spec("neuronx_distributed") is None or os.environ.get("NXD_CPU_MODE") == "1",
    reason="needs neuronx_distributed, which traces graphs outside of its CPU mode",
)
def test_nxds_graphs_return_what_the_reference_computes(converted: Callable) -> None:
    ckpt = converted("odd sizes", sequence_length=32)
    expected = capture(ckpt, PROMPTS, NEW_TOKENS)
    for _ in range(2):  # compiled, then read from the file
        captured = capture(ckpt, PROMPTS, NEW_TOKENS, device="nxd")
        assert captured.keys() == expected.keys()
        for name, tensor in expected.items():
            torch.testing.assert_close(captured[name], tensor, rtol=0, atol=4e-6 * float(tensor.abs().max()))


# ---- the command


def test_the_command_writes_the_tensors_of_two_ranks(
    hf_checkpoint: Callable, converted: Callable, tmp_path: Path
) -> None:
    out = tmp_path / "capture.safetensors"
    prompts = [f"--prompt-ids={','.join(map(str, prompt))}" for prompt in PROMPTS]
    flags = ["--ckpt", converted("smollm2", 2), "--tp", 2, "--device", "cpu", *prompts, "--out", out]
    done = command("-m", "tools.capture", *flags, "--max-new-tokens", NEW_TOKENS)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    hf = hf_model(hf_checkpoint("smollm2"), torch.float32)
    assert_is_hfs(load_file(out), [hf_capture(hf, prompt, NEW_TOKENS) for prompt in PROMPTS], bound=2e-5)
    facts = safe_open(out, "pt").metadata()
    assert facts.pop("versions").startswith(f"torch {version('torch')}")
    assert facts == {"dtype": "float32", "tp": "2", "device": "cpu", "prompt_tokens": "[7, 3]"}
    assert list(tmp_path.iterdir()) == [out]


def test_the_command_and_the_file_name_a_copy_of_a_head_that_differs(converted: Callable, tmp_path: Path) -> None:
    ckpt = tmp_path / "ckpt"
    shutil.copytree(converted("granite-code", 2), ckpt)  # both ranks hold its only KV head
    file = shard_path(ckpt, 1)
    bias = load_file(file)["model.layers.2.self_attn.Wqkv.bias"].numpy()
    before = bias.tobytes()
    bias[-1] += 1.0  # the last number of v
    file.write_bytes(file.read_bytes().replace(before, bias.tobytes()))
    done = command("-m", "tools.capture", "--ckpt", ckpt, "--device", "cpu", "--prompt-ids=1,2", "--out", ckpt / "out")
    assert done.returncode == 0
    line = "layers.2.v: the copies of head 0 differ, rank 1 from rank 0"
    assert done.stderr == f"capture.py: {line} (first of 1)\n"
    assert json.loads(safe_open(ckpt / "out", "pt").metadata()["differing"]) == [line]


def test_the_command_refuses_what_is_not_there_in_one_line(tmp_path: Path) -> None:
    done = command("-m", "tools.capture", "--ckpt", tmp_path / "none", "--out", tmp_path / "out", "--device", "cpu")
    assert (done.returncode, done.stdout) == (2, "")
    (line,) = done.stderr.splitlines()
    assert line.startswith(f"capture.py: error: --ckpt {tmp_path / 'none'}: it is not a complete conversion")


MISTAKES = {
    "a directory": (["--out", "."], r"--out \. cannot be written: name a file"),
    "no file": (["--out", os.devnull], "--out /dev/null cannot be written: name a file"),
    "no folder": (["--out", "none/capture"], "--out none/capture cannot be written: .* in a directory that exists"),
    "another tp": (["--tp", "2"], "--tp 2, but .* --tp 1: convert it again"),
    "text": (["--prompt", "Hi"], "has no tokenizer.json: give --prompt-ids"),
    "too long": (["--prompt-ids", "1,2,3", "--max-new-tokens", "30"], "--max-new-tokens 30: .* --sequence-length 33$"),
    "no token": (["--prompt-ids", "1,96"], "prompt 1.*95"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_mistakes_name_the_flag(
    mistake: str, converted: Callable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    flags, message = MISTAKES[mistake]
    monkeypatch.chdir(tmp_path)
    ckpt = str(converted("llama-3", sequence_length=32))
    out = [] if "--out" in flags else ["--out", "capture.safetensors"]
    monkeypatch.setattr("sys.argv", ["capture.py", "--ckpt", ckpt, "--device", "cpu", *out, *flags])
    with pytest.raises(UsageError, match=message):
        main()
    assert list(tmp_path.iterdir()) == []

"""tools.ports: HF's own file on a device, and what turns a port's tensors into a file that the audit reads.

What a command writes is audited, as its user does it. The parts of `common.py` are checked against formulas of HF and
Meta, written out here, and against heads listed by hand.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor

from checkpoint.config import llama_config, read_config
from llama_neuron import UsageError, shard_path
from tests.helpers import command, hf_model
from tests.test_neuron_device import STAND_IN, stand_in  # noqa: F401, a fixture
from tools.audit.command import audit
from tools.audit.command import parse_args as audit_args
from tools.ports.command import parse_args, run
from tools.ports.common import (
    find_heads,
    halves_from_pairs,
    join_calls,
    join_heads,
    join_texts,
    pairs_from_halves,
    write_capture,
)
from tools.ports.meta import metas_weights

PROMPTS, NEW_TOKENS = [[5, 11, 2, 60, 33, 47, 3, 21, 8, 17, 40, 52], [7, 1, 40, 29, 16]], 5
FAMILY = "odd sizes"  # 6 query and 3 KV heads, with biases

# as NxD's gqa.py shards: query heads, KV heads of each rank
HEADS = {
    ("smollm2", 2): [([0, 1, 2, 3, 4], [0, 0, 0, 1, 1]), ([5, 6, 7, 8, None], [1, 2, 2, 2, None])],
    ("llama-3", 2): [([0, 1, 2, 3], [0]), ([4, 5, 6, 7], [1])],
    ("head_dim", 4): [([0, 1], [0]), ([2, None], [0]), ([3, 4], [1]), ([5, None], [1])],
}


def captured(hf: Path, out: Path, *flags: str) -> Path:
    """The file of `python -m tools.ports hf` with PROMPTS."""
    words = ["hf", "--hf", str(hf), "--out", str(out), "--max-new-tokens", str(NEW_TOKENS), *flags]
    for prompt in PROMPTS:
        words += ["--prompt-ids", ",".join(map(str, prompt))]
    run(parse_args(words))
    return out / "capture.safetensors"


def audited(hf: Path, file: Path) -> dict:
    return audit(audit_args(["--hf", str(hf), "--captured", str(file)]))


def with_settings(hf: Path, folder: Path, **settings: object) -> Path:
    """A copy of a checkpoint whose config.json says otherwise."""
    shutil.copytree(hf, folder)
    file = folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | settings))
    return folder


def one_layer(hf: Path, folder: Path) -> Path:
    """A checkpoint's first layer."""
    model = hf_model(hf, torch.float32)
    model.config.num_hidden_layers = 1
    del model.model.layers[1:]
    model.save_pretrained(folder)
    return folder


# ---- HF's own file


def test_hfs_file_on_a_cpu_passes_bitwise_as_the_docs_say(hf_checkpoint: Callable, tmp_path: Path) -> None:
    hf = hf_checkpoint(FAMILY)
    ran = command("-m", "tools.ports", "hf", "--hf", hf, "--device", "cpu", "--out", tmp_path / "new" / "out")
    assert (ran.returncode, ran.stdout, ran.stderr) == (0, "", "")
    report = audited(hf, tmp_path / "new" / "out" / "capture.safetensors")
    # embedding, final norm and logits; in each of 3 layers 11 places
    assert report["verdict"] == "passed: bitwise equal to Hugging Face in float32 at 36 places"
    assert [(text["prompt_tokens"], len(text["ids"])) for text in report["texts"]] == [(64, 72)]


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
def test_prompts_of_unequal_length_pass_bitwise(dtype: str, hf_checkpoint: Callable, tmp_path: Path) -> None:
    hf = hf_checkpoint(FAMILY)
    file = captured(hf, tmp_path, "--dtype", dtype)
    report = audited(hf, file)
    assert report["bitwise"]
    assert report["not_seen"] == []
    assert [(text["prompt_tokens"], len(text["ids"])) for text in report["texts"]] == [(12, 17), (5, 10)]
    tensors = load_file(file)
    assert tensors["hidden_states.1"].dtype == getattr(torch, dtype)
    for row, prompt in enumerate(PROMPTS):  # the new tokens are its own choices
        end = len(prompt) + NEW_TOKENS
        choices = tensors["logits"][row].argmax(-1)
        assert tensors["ids"][row, len(prompt) : end].tolist() == choices[len(prompt) - 1 : end - 1].tolist()
        assert torch.equal(tensors["greedy"][row].long(), choices)


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_another_attention_rounds_otherwise_and_passes(dtype: str, hf_checkpoint: Callable, tmp_path: Path) -> None:
    hf = hf_checkpoint(FAMILY)
    report = audited(hf, captured(hf, tmp_path, "--attn", "sdpa", "--dtype", dtype))
    assert report["passed"]
    assert not report["bitwise"]
    assert report["not_seen"] == []


def test_another_model_fails_and_the_cause_is_named(hf_checkpoint: Callable, tmp_path: Path) -> None:
    hf = hf_checkpoint("smollm2")
    rope = {"rope_theta": 5e5, "rope_parameters": {"rope_type": "default", "rope_theta": 5e5}}
    file = captured(with_settings(hf, tmp_path / "hf", **rope), tmp_path / "out", "--dtype", "bfloat16")
    report = audited(hf, file)
    assert not report["passed"]
    assert report["first"]["place"] in ("layers.0.q", "layers.0.k")
    assert "theta" in report["causes"][0]["meaning"]


def test_settings_that_belong_to_generate_change_nothing(hf_checkpoint: Callable, tmp_path: Path) -> None:
    hf = hf_checkpoint(FAMILY)
    settings = {"use_cache": False, "return_dict": False, "num_beams": 4, "output_hidden_states": True}
    other = with_settings(hf, tmp_path / "hf", **settings)
    file = captured(other, tmp_path / "out")
    assert audited(hf, file)["bitwise"]


@pytest.mark.slow
def test_compiled_graphs_pass_with_taps_and_without(hf_checkpoint: Callable, tmp_path: Path, code: Path) -> None:
    hf = one_layer(hf_checkpoint("head_dim"), tmp_path / "hf")  # to compile sooner
    file = captured(hf, tmp_path, "--compile", "--attn", "sdpa", "--dtype", "bfloat16")
    report = audited(hf, file)
    assert report["passed"]
    assert not report["bitwise"]
    assert report["not_seen"] == []
    untapped = tmp_path / "untapped.safetensors"
    assert audited(hf, untapped)["passed"]
    with safe_open(file, "pt") as opened:
        notes = json.loads(opened.metadata()["notes"])
    tensors = load_file(untapped)
    assert torch.equal(tensors["ids"], load_file(file)["ids"])
    change = (tensors["logits"] - load_file(file)["logits"]).abs().max()
    assert notes[1].endswith(f"change by up to {change:.2g}")


@pytest.mark.slow
def test_hfs_file_runs_on_a_neuron_device(
    stand_in: None,  # noqa: F811
    hf_checkpoint: Callable,
    tmp_path: Path,
) -> None:
    """The device is a stand-in that computes as the CPU does: what is shown is that no tensor is on the wrong side."""
    hf = hf_checkpoint(FAMILY)
    words = ["--hf", hf, "--device", "neuron", "--out", tmp_path, "--prompt-ids", "5,11,2,60"]
    environment = {"PYTHONPATH": str(STAND_IN), "STAND_IN_REPORT": str(tmp_path)}
    ran = command("-m", "tools.ports", "hf", *words, **environment)
    assert ran.returncode == 0, ran.stderr
    assert "aten::mm" in str(json.loads((tmp_path / "0.json").read_text())["eager"])
    assert audited(hf, tmp_path / "capture.safetensors")["passed"]


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--tp", "2"], "--tp 2: HF's file runs on one device here, leave --tp out"),
        (["--attn", "nosuch"], "--attn nosuch: transformers refuses it: .*nosuch"),
        (["--device", "tpu"], "--device tpu is not available here"),
        (["--prompt-ids", "5,67"], "--prompt-ids must be from 0 to 66"),
        (["--prompt", "text"], "has no tokenizer that can be read"),
        (["--hf", "/nowhere"], "/nowhere"),
    ],
)
def test_what_cannot_run_is_a_usage_error(
    flags: list[str], message: str, hf_checkpoint: Callable, tmp_path: Path
) -> None:
    with pytest.raises(UsageError, match=message):
        captured(hf_checkpoint(FAMILY), tmp_path / "out", *flags)
    assert not (tmp_path / "out").exists()


def test_out_is_a_folder(hf_checkpoint: Callable, tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.touch()
    with pytest.raises(UsageError, match=f"--out {file} is not a folder"):
        captured(hf_checkpoint(FAMILY), file)


@pytest.mark.parametrize("port", ["nxdi", "optimum", "example", "experimental"])
def test_flags_of_hf_are_refused_for_other_ports(port: str, capsys: pytest.CaptureFixture) -> None:
    with pytest.raises(SystemExit) as ended:
        parse_args([port, "--hf", "DIR", "--out", "OUT", "--attn", "sdpa"])
    assert ended.value.code == 2
    assert "unrecognized arguments: --attn sdpa" in capsys.readouterr().err


# ---- for a port of your own


@pytest.mark.parametrize(("family", "tp"), HEADS)
def test_heads_are_found_by_their_weights(family: str, tp: int, hf_checkpoint: Callable, converted: Callable) -> None:
    hf = load_file(hf_checkpoint(family) / "model.safetensors")
    config = json.loads((hf_checkpoint(family) / "config.json").read_text())
    size = config["head_dim"]
    for rank, (query, key) in enumerate(HEADS[family, tp]):
        shard = load_file(shard_path(converted(family, tp), rank))
        names = [name for name in shard if name.endswith("layers.1.self_attn.Wqkv.weight")]
        assert len(names) == 1, [*shard]
        rows = shard[names[0]].split([len(query) * size, len(key) * size, len(key) * size])
        for kind, part, numbers in zip("qkv", rows, (query, key, key), strict=True):
            weight = hf[f"model.layers.1.self_attn.{kind}_proj.weight"]
            assert find_heads(part, weight, size) == numbers
            assert find_heads(part.bfloat16(), weight, size) == numbers
            in_pairs = pairs_from_halves(part.view(len(numbers), size, -1), dim=1).reshape(part.shape)
            with pytest.raises(ValueError, match="head 0 of the shard has rows that no head of HF's weight has"):
                find_heads(in_pairs, weight, size)


@pytest.mark.parametrize("layout", HEADS.values(), ids=map(str, HEADS))
@pytest.mark.parametrize("side", [0, 1], ids=["query", "key"])
def test_heads_of_ranks_are_joined_in_hfs_order(layout: list, side: int) -> None:
    numbers = [rank[side] for rank in layout]
    count = 1 + max(number for rank in numbers for number in rank if number is not None)
    whole = torch.randn(2, 5, count, 4)
    zeros = torch.full((2, 5, 4), torch.nan)  # heads of zeros hold anything
    shards = []
    for rank in numbers:
        heads = [zeros if number is None else whole[:, :, number] for number in rank]
        shards.append(torch.stack(heads, dim=2))
    for given in (shards, [shard.flatten(2) for shard in shards]):
        joined, differing = join_heads(given, numbers)
        assert torch.equal(joined, whole)
        assert differing == []


def test_copies_that_differ_and_heads_on_no_rank_are_found() -> None:
    numbers = [[0, 0, 1], [1, 2, None]]
    shards = [torch.zeros(1, 2, 3, 4), torch.zeros(1, 2, 3, 4)]
    shards[1][0, 1, 0, 2] = 1
    joined, differing = join_heads(shards, numbers)
    assert differing == [1]
    assert not joined.any()  # the first copy counts
    with pytest.raises(ValueError, match="head 1 is on no rank"):
        join_heads(shards, [[0, 0, None], [None, 2, None]])


def test_rows_in_metas_order_are_what_hfs_script_permutes() -> None:
    meta = torch.randn(4 * 16, 24)  # 4 heads of 16
    # `permute` of transformers/models/llama/convert_llama_weights_to_hf.py
    theirs = meta.view(4, 16 // 2, 2, 24).transpose(1, 2).reshape(4 * 16, 24)
    halves = halves_from_pairs(meta.view(4, 16, 24), dim=1)
    assert torch.equal(halves.reshape(64, 24), theirs)
    assert torch.equal(pairs_from_halves(halves, dim=1).reshape(64, 24), meta)


def test_q_that_meta_rotates_in_pairs_is_hfs() -> None:
    modeling_llama = pytest.importorskip("transformers.models.llama.modeling_llama")
    x = torch.randn(2, 7, 3, 16, dtype=torch.float64)  # B T n D, in Meta's order
    inv_freq = 1e4 ** (-torch.arange(0, 16, 2, dtype=torch.float64) / 16)
    angles = torch.arange(7)[:, None] * inv_freq  # T D/2
    # `apply_rotary_emb` of Meta's llama/model.py: neighbours are a complex number
    turns = torch.polar(torch.ones_like(angles), angles)[:, None]
    pairs = torch.view_as_real(torch.view_as_complex(x.unflatten(-1, (-1, 2))) * turns).flatten(-2)
    both = torch.cat((angles, angles), dim=-1)[None]
    halves, _ = modeling_llama.apply_rotary_pos_emb(
        halves_from_pairs(x), halves_from_pairs(x), both.cos(), both.sin(), unsqueeze_dim=2
    )
    torch.testing.assert_close(halves_from_pairs(pairs), halves, rtol=0, atol=1e-12)
    assert torch.equal(pairs_from_halves(halves_from_pairs(pairs)), pairs)


def test_calls_become_rows_of_prompt_and_new_tokens() -> None:
    prompts = [[10, 11, 12], [20]]
    prefill = torch.tensor([[10, 11, 12, 99], [20, 99, 99, 99]])  # padded to a bucket
    calls = [prefill, torch.tensor([[13], [21]]), torch.tensor([[14], [22]])]
    rows = join_calls([call[..., None] for call in calls], prompts)
    assert rows[..., 0].tolist() == [[10, 11, 12, 13, 14], [20, 21, 22, 0, 0]]
    new_ids = [[13, 14, 15], [21, 22, 23]]
    assert join_texts(prompts, new_ids).tolist() == [[10, 11, 12, 13, 14, 15], [20, 21, 22, 23, 0, 0]]


def of_ranks(x: Tensor, side: int, layout: list) -> list[Tensor]:
    """What each rank has of heads [B,P,n,D]."""
    return [torch.stack([x[:, :, number or 0] for number in rank[side]], dim=2) for rank in layout]


def test_a_port_of_ones_own_is_audited(hf_checkpoint: Callable, tmp_path: Path) -> None:
    """HF's own tensors, taken apart as a port with two ranks, Meta's order and logits of new tokens would have them."""
    hf = hf_checkpoint("smollm2")
    layout = HEADS["smollm2", 2]
    whole = load_file(captured(hf, tmp_path / "hf"))
    tensors = {}
    for name, x in whole.items():
        kind = name.rpartition(".")[2]
        if kind in ("q", "k"):
            side = "qk".index(kind)
            shards = of_ranks(pairs_from_halves(x), side, layout)
            tensors[name], differing = join_heads(shards, [rank[side] for rank in layout])
            tensors[name] = halves_from_pairs(tensors[name])
            assert differing == []
            assert torch.equal(tensors[name], x)
        elif kind == "logits":
            starts = [len(prompt) - 1 for prompt in PROMPTS]
            tensors[name] = torch.stack([x[row, at : at + NEW_TOKENS] for row, at in enumerate(starts)])
        elif kind not in ("ids", "greedy"):
            tensors[name] = x
    ids = whole["ids"].tolist()
    new_ids = [row[len(prompt) : len(prompt) + NEW_TOKENS] for row, prompt in zip(ids, PROMPTS, strict=True)]
    facts = {"prompts": PROMPTS, "dtype": "float32", "tp": 2, "device": "mine"}
    file = write_capture(tmp_path / "mine", tensors, new_ids=new_ids, notes=["a port of my own"], **facts)
    report = audited(hf, file)
    assert report["passed"]
    assert report["bitwise"]
    assert report["setting"]["subject"].endswith("tp 2)")
    # copies that differ are said in the file, and fail
    file = write_capture(tmp_path / "mine", tensors, new_ids=new_ids, differing=["layers.0.k: copies differ"], **facts)
    assert not audited(hf, file)["passed"]
    # a wrong logit among the few is found
    tensors["logits"][1, 2] = tensors["logits"][1, 2].flip(-1)
    file = write_capture(tmp_path / "mine", tensors, new_ids=new_ids, **facts)
    report = audited(hf, file)
    assert not report["passed"]
    assert report["first"]["place"] == "logits"


def test_metas_weights_are_the_checkpoints_with_rows_of_q_and_k_in_pairs(hf_checkpoint: Callable) -> None:
    """What AWS's two Llamas are given. Row 2i of a head is HF's row i, row 2i+1 its row i + D/2."""
    hf = hf_checkpoint("llama-3")
    config = llama_config(read_config(hf))
    weights = metas_weights(hf, config, torch.float32)
    model = hf_model(hf, torch.float32)
    attention = model.model.layers[1].self_attn
    half = config.head_dim // 2
    pairs = torch.stack((torch.arange(half), torch.arange(half) + half), dim=1).flatten()  # 0 4 1 5 2 6 3 7
    for name, linear in (("wq", attention.q_proj), ("wk", attention.k_proj)):
        heads = linear.weight.detach().view(-1, config.head_dim, config.hidden_size)
        assert torch.equal(weights[f"layers.1.attention.{name}.weight"], heads[:, pairs].flatten(0, 1))
    assert torch.equal(weights["layers.2.feed_forward.w2.weight"], model.model.layers[2].mlp.down_proj.weight)
    assert torch.equal(weights["output.weight"], model.lm_head.weight)
    assert len(weights) == 3 + 9 * 3

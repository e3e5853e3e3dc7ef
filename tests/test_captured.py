"""tools.audit.captured: folders as NxDI and vLLM Neuron write them, made from HF's modules, give HF's tensors again."""

from __future__ import annotations

import json
import os
import random
import re
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from checkpoint.config import llama_config, read_config
from llama_neuron import LlamaConfig, UsageError
from tests.helpers import hf_model
from tools.audit.captured import Captured, read_captured
from tools.audit.command import as_json, audit, parse_args, table
from tools.audit.oracle import run_hf

PROMPTS, NEW_TOKENS, BUCKET = [[5, 11, 2, 60, 33, 47, 3], [7, 1, 40]], 4, 16
ENDS = [len(prompt) + NEW_TOKENS - 1 for prompt in PROMPTS]
# Each rank's query heads and KV heads, by hand from NxD's three rules; None is a head of zeros.
LAYOUTS = {
    ("llama-3", 1): [([0, 1, 2, 3, 4, 5, 6, 7], [0, 1])],
    ("llama-3", 2): [([0, 1, 2, 3], [0]), ([4, 5, 6, 7], [1])],
    ("llama-3", 4): [([0, 1], [0]), ([2, 3], [0]), ([4, 5], [1]), ([6, 7], [1])],  # each KV head twice
    ("head_dim", 4): [([0, 1], [0]), ([2, None], [0]), ([3, 4], [1]), ([5, None], [1])],  # and padded groups
    ("smollm2", 1): [([0, 1, 2, 3, 4, 5, 6, 7, 8], [0, 1, 2])],
    ("smollm2", 2): [([0, 1, 2, 3, 4], [0, 0, 0, 1, 1]), ([5, 6, 7, 8, None], [1, 2, 2, 2, None])],  # one each
}
LAYOUTS["odd sizes", 2] = [([0, 1, 2], [0, 0, 1]), ([3, 4, 5], [1, 2, 2])]  # and a vocabulary of 67
LAYOUTS["smollm2", 4] = [([0, 1, 2], [0] * 3), ([3, 4, 5], [1] * 3), ([6, 7, 8], [2] * 3), ([None] * 3, [None] * 3)]
QUERY, KEY = ("q", "q_proj", "heads"), ("k", "k_proj", "v")
WHOLE = ("input_layernorm", "attention", "post_attention_layernorm", "mlp")


def hf_tensors(model: nn.Module, prompt: list[int]) -> dict[str, Tensor]:
    """HF's tensors of one text by the names of tools.capture, [positions,...], and the cosines of the positions."""
    tensors = run_hf(model, prompt, NEW_TOKENS)
    positions = torch.arange(len(tensors["final_norm"]))[None]
    return tensors | {"cos": model.model.rotary_emb(tensors["final_norm"], positions)[0][0]}


@pytest.fixture(scope="module")
def texts(hf_checkpoint: Callable) -> Callable[[str], list[dict[str, Tensor]]]:
    """texts(family): hf_tensors of each of PROMPTS."""
    made: dict[str, list] = {}

    def make(family: str) -> list[dict[str, Tensor]]:
        if family not in made:
            model = hf_model(hf_checkpoint(family), torch.float32)
            made[family] = [hf_tensors(model, prompt) for prompt in PROMPTS]
        return made[family]

    return make


@pytest.fixture(scope="module")
def config_of(hf_checkpoint: Callable) -> Callable[[str], LlamaConfig]:
    return lambda family: llama_config(read_config(hf_checkpoint(family)))


def rank_part(name: str, x: Tensor, layout: list, rank: int) -> Tensor:
    """What a rank has of x [T,...], as [T,W]: its heads, of its slice of the logits, or the whole."""
    kind = name.rpartition(".")[2]
    if kind in QUERY + KEY:
        zeros = torch.zeros_like(x[:, 0])
        return torch.cat([zeros if head is None else x[:, head] for head in layout[rank][kind in KEY]], dim=-1)
    if name == "logits":
        width = -(-x.shape[1] // len(layout))
        return nn.functional.pad(x, (0, width * len(layout) - x.shape[1]))[:, width * rank : width * (rank + 1)]
    return x


# ---- NxDI


def nxdi_modules(layers: int) -> dict[str, tuple[str | None, list[str]]]:
    """NxDI's Llama: what each module takes, and what its hook gets to see first of what it returns."""
    modules = {"embed_tokens": ("ids", ["hidden_states.0"]), "norm": (f"hidden_states.{layers}", ["final_norm"])}
    modules["lm_head"] = ("final_norm", ["logits"])
    for n in range(layers):
        layer = f"layers.{n}"
        normed, qkv = f"{layer}.input_layernorm", [f"{layer}.{kind}" for kind in ("q_proj", "k_proj", "v")]
        modules[layer] = (f"hidden_states.{n}", [f"hidden_states.{n + 1}"])
        modules[normed] = (f"hidden_states.{n}", [normed])
        modules[f"{layer}.self_attn"] = (normed, ["cos"])  # of its fields the first by name
        modules[f"{layer}.self_attn.qkv_proj"] = (normed, qkv[:1])  # of its tuple the first
        modules[f"{layer}.self_attn.qkv_proj.Wqkv"] = (normed, qkv)
        modules[f"{layer}.self_attn.o_proj"] = (f"{layer}.heads", [f"{layer}.attention"])
        modules[f"{layer}.self_attn.o_proj.o_proj"] = (f"{layer}.heads", [f"{layer}.attention"])
        modules[f"{layer}.post_attention_layernorm"] = (None, [f"{layer}.post_attention_layernorm"])
        modules[f"{layer}.mlp"] = (f"{layer}.post_attention_layernorm", [f"{layer}.mlp"])
    return modules


def nxdi_folder(folder: Path, texts: list[dict[str, Tensor]], layout: list, modules: dict) -> Path:
    """As NxDI names and shapes it: rank 0's part, prompts padded to a bucket, then one file a step."""
    folder.mkdir()
    for module, (taken, returned) in modules.items():
        for side, names in (("input", [taken]), ("output", returned)):
            for step in range(1, NEW_TOKENS + 1):
                rows = []
                for text, prompt in zip(texts, PROMPTS, strict=False):
                    first, stop = (0, len(prompt)) if step == 1 else (len(prompt) + step - 2, len(prompt) + step - 1)
                    if module == "lm_head":
                        first = stop - 1
                    parts = [text[name][first:stop] if name else torch.zeros(stop - first, 8) for name in names]
                    if names[0] != "ids":
                        parts = [rank_part(name or "", x, layout, 0) for name, x in zip(names, parts, strict=True)]
                    row = torch.cat(parts, dim=-1)
                    if step == 1 and module != "lm_head":  # what padding computes is not zero
                        row = torch.cat((row, torch.full((BUCKET - len(row), *row.shape[1:]), 77).to(row.dtype)))
                    rows.append(row)
                phase = "cte" if step == 1 else "tkg"
                torch.save(
                    torch.stack(rows), folder / f"captured_tensors_{phase}_step_{step}_module_{module}_{side}.pt"
                )
    (folder / "capture_metadata.json").write_text("{}")
    return folder


def generated(folder: Path, texts: list[dict[str, Tensor]]) -> None:
    """What the one who captures adds: ids, lengths and logits, which `generate` returned."""
    last = [text["logits"][len(prompt) - 1 :] for text, prompt in zip(texts, PROMPTS, strict=True)]
    tensors = {"ids": pad_sequence([text["ids"] for text in texts], batch_first=True), "logits": torch.stack(last)}
    tensors["prompt_tokens"] = torch.tensor([len(prompt) for prompt in PROMPTS])
    save_file(tensors, folder / "generated.safetensors")


def assert_is_hfs(captured: Captured, texts: list[dict[str, Tensor]], name: str, parts: list | None = None) -> None:
    """HF's values, bit for bit, at all positions of a text and in the heads that are listed; NaN elsewhere."""
    x, seen = captured.tensors[name], captured.seen[name]
    assert seen.shape == x.shape[:-1]
    for row, text in enumerate(texts):
        hfs = text[name][: ENDS[row]]
        assert x[row, : len(hfs)].shape == hfs.shape, name
        expected = torch.full_like(x[row], torch.nan)
        known = torch.zeros_like(seen[row])
        first = len(PROMPTS[row]) - 1 if name == "logits" else 0
        here = slice(first, len(hfs)) if parts is None else (slice(first, len(hfs)), parts)
        expected[here], known[here] = hfs[first:] if parts is None else hfs[:, parts], True
        torch.testing.assert_close(x[row], expected, rtol=0, atol=0, equal_nan=True)
        assert torch.equal(seen[row], known), name


@pytest.mark.parametrize("family, tp", LAYOUTS)
def test_nxdis_folder_becomes_hfs_tensors(
    family: str, tp: int, texts: Callable, config_of: Callable, tmp_path: Path
) -> None:
    layout, config = LAYOUTS[family, tp], config_of(family)
    folder = nxdi_folder(tmp_path / "nxdi", texts(family), layout, nxdi_modules(config.num_hidden_layers))
    generated(folder, texts(family))
    captured = read_captured(folder, config, tp=tp)
    assert captured.prompt_tokens == [7, 3]
    assert [row[: end + 1].tolist() for row, end in zip(captured.ids, ENDS, strict=True)] == [
        text["ids"].tolist() for text in texts(family)
    ]
    assert captured.facts == {"stack": "NxDI", "tp": str(tp), "dtype": "float32"}
    names = {f"hidden_states.{n}" for n in range(4)} | {"final_norm", "logits"}
    for kind in (*WHOLE, "q_proj", "k_proj", "v", "heads"):
        names |= {f"layers.{n}.{kind}" for n in range(3)}
    assert captured.tensors.keys() == captured.seen.keys() == names
    for name in names:
        kind = name.rpartition(".")[2]
        parts = sorted({*layout[0][kind in KEY]} - {None}) if kind in QUERY + KEY else None
        assert_is_hfs(captured, texts(family), name, parts)


def test_ids_alone_do_for_nxdi_if_prompts_have_one_length(texts: Callable, config_of: Callable, tmp_path: Path) -> None:
    """They tell how long the prompts are: NxDI's steps are as many as the new tokens."""
    one, modules = texts("llama-3")[:1], {"embed_tokens": ("ids", ["hidden_states.0"])}
    folder = nxdi_folder(tmp_path / "nxdi", one, LAYOUTS["llama-3", 1], modules)
    captured = read_captured(folder, config_of("llama-3"), ids=one[0]["ids"][None])
    assert (captured.prompt_tokens, captured.notes) == ([7], [])
    assert_is_hfs(captured, one, "hidden_states.0")
    with pytest.raises(UsageError, match=r"does not tell the ids: add generated\.safetensors"):
        read_captured(folder, config_of("llama-3"))
    with pytest.raises(UsageError, match="has 4 steps, more than these ids have new tokens"):
        read_captured(folder, config_of("llama-3"), ids=one[0]["ids"][None, :4])
    with pytest.raises(UsageError, match="embed_tokens was fed other ids than those given"):
        read_captured(folder, config_of("llama-3"), ids=one[0]["ids"][None, 1:])


def test_logits_alone_are_a_capture(texts: Callable, config_of: Callable, tmp_path: Path) -> None:
    """Of any stack that has no capture, such as Optimum Neuron."""
    generated(tmp_path, texts("llama-3"))
    captured = read_captured(tmp_path, config_of("llama-3"))
    assert (captured.facts, captured.prompt_tokens) == ({"stack": "generate", "tp": "1"}, [7, 3])
    assert captured.notes == ["logits: has 8 of 16 positions"]
    assert_is_hfs(captured, texts("llama-3"), "logits")


def test_what_nxdi_has_besides_becomes_notes(texts: Callable, config_of: Callable, tmp_path: Path) -> None:
    modules = nxdi_modules(3)
    folder = nxdi_folder(tmp_path / "nxdi", texts("llama-3"), LAYOUTS["llama-3", 2], modules)
    generated(folder, texts("llama-3"))
    prefix = folder / "captured_tensors_tkg_step_3_"
    torch.save(torch.zeros(2, 1, 64), f"{prefix}manual_tensor_0.pt")
    torch.save(torch.zeros(2, 1, 8), f"{prefix}module_layers.1.self_attn.rotary_emb_output.pt")
    torch.save(torch.zeros(1, dtype=torch.bfloat16), f"{prefix}module_layers.2.input_layernorm_output.pt")
    Path(f"{prefix}module_layers.0.mlp_output.pt").unlink()
    torch.save(torch.load(f"{prefix}module_norm_output.pt") + 1, f"{prefix}module_lm_head_input.pt")
    captured = read_captured(folder, config_of("llama-3"), tp=2)
    assert set(captured.notes) == {
        "layers.0.attention: left out, 8 wide, and 64 are expected at tp 2 (first of 12)",  # self_attn's cosines
        "layers.0.post_attention_layernorm input: left out, it has no place in the audit (first of 12)",
        "captured_tensors_tkg_step_3_manual_tensor_0.pt: not read, its name says no module: NxDI only numbers what it "
        "captures by hand",
        "layers.1.self_attn.rotary_emb output: left out, it has no place in the audit",
        "layers.2.input_layernorm output: the module did not run",
        "final_norm: the copies differ",
        "layers.0.mlp: has 14 of 16 positions",
        "logits: has 8 of 16 positions",
        *(f"layers.0.{kind}: has 4 of 8 heads or slices (first of 3)" for kind in ("q_proj", "heads")),
        *(f"layers.0.{kind}: has 1 of 2 heads or slices (first of 3)" for kind in ("k_proj", "v")),
    }
    assert_is_hfs(captured, texts("llama-3"), "final_norm")  # the module's own output is kept
    for row, prompt in enumerate(PROMPTS):
        assert not captured.seen["layers.0.mlp"][row, len(prompt) + 1]


# ---- vLLM Neuron

VLLM = {"model.embed_tokens": "hidden_states.0", "model.norm": "final_norm", "lm_head": "logits"}
for N in range(3):
    VLLM[f"model.layers.{N}"] = f"hidden_states.{N + 1}"
    VLLM[f"model.layers.{N}.self_attn"] = f"layers.{N}.attention"
    for kind in ("input_layernorm", "post_attention_layernorm", "mlp"):
        VLLM[f"model.layers.{N}.{kind}"] = f"layers.{N}.{kind}"
    for kind in ("q", "k", "v", "heads"):  # capture_tensor("layers.0.q", ...)
        VLLM[f"manual.layers.{N}.{kind}"] = f"layers.{N}.{kind}"


def vllm_folder(
    folder: Path, texts: list[dict[str, Tensor]], layout: list, wider: int = 0, shared: bool = True
) -> Path:
    """As vLLM Neuron lays it out: a prefill of each request, padded to a bucket and, but for heads and logits, `shared`
    out to the ranks by tokens; then decoding of both requests, padded to four. Hidden sizes are `wider`."""
    tp = len(layout)
    passes = []
    for row, prompt in enumerate(PROMPTS):
        length = len(prompt)
        positions = [*range(length), *[length - 1] * (BUCKET - length)]
        passes.append((f"prefill_s{BUCKET}_{row}", [str(row + 9)], positions, [(row, slice(0, length))]))
    for step in range(NEW_TOKENS - 1):
        places = [len(prompt) + step for prompt in PROMPTS]
        rows = [(row, slice(place, place + 1)) for row, place in enumerate(places)]
        passes.append((f"decode_b4_{step}", ["9", "10"], [*places, 0, 0], rows))
    for name, requests, positions, rows in passes:
        at = folder / "dp0" / name
        at.mkdir(parents=True)
        (at / f"{name}_meta.json").write_text(json.dumps({"req_ids": requests, "positions": positions, "dp_rank": 0}))
        is_prefill = name.startswith("prefill")
        for module, ours in VLLM.items():
            (at / module).mkdir()
            for rank in range(tp):
                x = torch.cat([rank_part(ours, texts[row][ours][here], layout, rank) for row, here in rows])
                if ours == "logits" and is_prefill:
                    x = x[-1:]
                else:
                    x = torch.cat((x, torch.full((len(positions) - len(x), x.shape[1]), 77.0)))
                if ours.rpartition(".")[2] not in QUERY + KEY and ours != "logits":
                    x = nn.functional.pad(x, (0, wider))
                    if is_prefill and shared:
                        x = x.chunk(tp)[rank].clone()
                torch.save(x, at / module / f"rank{rank}.pt")
    return folder


@pytest.mark.parametrize("family, tp", LAYOUTS)
def test_vllm_neurons_folder_becomes_hfs_tensors(
    family: str, tp: int, texts: Callable, config_of: Callable, tmp_path: Path
) -> None:
    wider = 0 if tp == 1 else 8
    folder = vllm_folder(tmp_path, texts(family), LAYOUTS[family, tp], wider)
    captured = read_captured(folder, config_of(family))
    assert (captured.ids, captured.prompt_tokens) == (None, [7, 3])
    assert captured.facts == {"stack": "vLLM Neuron", "tp": str(tp), "dtype": "float32"}
    assert captured.tensors.keys() == captured.seen.keys() == {*VLLM.values()}
    for name in VLLM.values():
        assert_is_hfs(captured, texts(family), name)
    hidden = config_of(family).hidden_size
    cut = [note for note in captured.notes if f"{hidden + wider} wide, cut to {hidden}" in note]
    assert len(captured.notes) == 1 + len(cut) and bool(cut) == bool(wider)  # and the logits' gaps
    generated(folder, texts(family))
    assert read_captured(folder, config_of(family)).ids.tolist()[0] == texts(family)[0]["ids"].tolist()


def test_a_nan_that_was_captured_is_told_from_a_gap(texts: Callable, config_of: Callable, tmp_path: Path) -> None:
    folder = vllm_folder(tmp_path, texts("llama-3"), LAYOUTS["llama-3", 1])
    torch.save(torch.full((4, 64), torch.nan), folder / "dp0" / "decode_b4_1" / "model.norm" / "rank0.pt")
    captured = read_captured(folder, config_of("llama-3"))
    assert captured.tensors["final_norm"][0].isnan().all(-1).nonzero().flatten().tolist() == [8]
    assert captured.seen["final_norm"][0].all()


def test_copies_that_differ_between_ranks_are_named(texts: Callable, config_of: Callable, tmp_path: Path) -> None:
    folder = vllm_folder(tmp_path, texts("llama-3"), LAYOUTS["llama-3", 4], shared=False)
    assert len(read_captured(folder, config_of("llama-3")).notes) == 1  # the logits' gaps
    for module, rank in (("model.layers.1.mlp", 3), ("manual.layers.2.v", 1)):  # whole, and a copy of KV head 0
        file = folder / "dp0" / "decode_b4_2" / module / f"rank{rank}.pt"
        torch.save(torch.load(file) * 1.01, file)
    captured = read_captured(folder, config_of("llama-3"))
    assert set(captured.differing) == {
        "layers.1.mlp: the copies differ, rank 3 from rank 0",
        "layers.2.v: the copies of head 0 differ, rank 1 from rank 0",
    }
    assert_is_hfs(captured, texts("llama-3"), "layers.1.mlp")  # rank 0's


def test_ranks_that_are_elsewhere_leave_gaps(texts: Callable, config_of: Callable, tmp_path: Path) -> None:
    folder = vllm_folder(tmp_path, texts("llama-3"), LAYOUTS["llama-3", 4])
    for file in folder.glob("dp0/*/*/rank[23].pt"):
        file.unlink()
    captured = read_captured(folder, config_of("llama-3"), tp=4)
    assert_is_hfs(captured, texts("llama-3"), "layers.0.q", [0, 1, 2, 3])
    seen = captured.seen["layers.0.mlp"]
    assert seen[0].tolist() == [True] * 10 and seen[1, :6].all()  # two ranks hold the first 8 of the bucket's 16 tokens
    assert "logits" not in captured.tensors  # half of the vocabulary is nowhere


# ---- tools.capture's file, or a port's own


def test_a_file_by_our_names_is_read(texts: Callable, config_of: Callable, tmp_path: Path) -> None:
    path, names = tmp_path / "port.safetensors", ["hidden_states.1", "layers.0.q", "layers.2.mlp", "final_norm"]
    tensors = {
        name: pad_sequence([text[name] for text in texts("llama-3")], batch_first=True) for name in [*names, "ids"]
    }
    facts = {"dtype": "float32", "tp": "2", "device": "nxd", "versions": "torch 2.9.0"}
    extra = {"my.tensor": torch.zeros(3), "layers.1.mlp": torch.zeros(2, 10, 7), "layers.1.v": torch.ones(2, 5, 2, 8)}
    save_file(tensors | extra, path, facts | {"prompt_tokens": "[7, 3]"})
    captured = read_captured(path, config_of("llama-3"))
    assert captured.prompt_tokens == [7, 3] and captured.facts == facts | {"stack": "tools.capture"}
    assert torch.equal(captured.ids, tensors["ids"]) and captured.tensors.keys() == {*names}
    for name in names:
        assert_is_hfs(captured, texts("llama-3"), name)
    assert set(captured.notes) == {
        "my.tensor: left out, it has no place in the audit",
        "layers.1.v: left out, its shape [2, 5, 2, 8] does not fit ids of [2, 11]",
        "layers.1.mlp: left out, 7 wide, and 64 are expected at tp 1",
    }
    save_file(tensors, path)
    with pytest.raises(UsageError, match="does not tell where prompts end: write prompt_tokens into its metadata"):
        read_captured(path, config_of("llama-3"))


# ---- flags, lengths, ids: what a capture says of itself, and what the caller says


@pytest.fixture
def own_file(texts: Callable, tmp_path: Path) -> Callable[..., Path]:
    """own_file(changes, facts): a port's own file of all that HF computes for PROMPTS, with these tensors (None leaves
    one out) and these metadata in place of its own."""

    def write(changes: dict[str, Tensor | None] | None = None, facts: dict[str, str] | None = None) -> Path:
        tensors = {}
        for name in texts("llama-3")[0]:
            if name != "cos":
                tensors[name] = pad_sequence([text[name] for text in texts("llama-3")], batch_first=True)
        tensors |= changes or {}
        path = tmp_path / "port.safetensors"
        kept = {name: x.contiguous() for name, x in tensors.items() if x is not None}
        save_file(kept, path, {"prompt_tokens": "[7, 3]", **(facts or {})})
        return path

    return write


def test_the_tp_that_is_given_comes_before_the_one_in_a_file(own_file: Callable, config_of: Callable) -> None:
    """And a file's heads are HF's, whatever tp is."""
    for facts, tp, expected in (({}, None, "1"), ({}, 4, "4"), ({"tp": "2"}, None, "2"), ({"tp": "2"}, 16, "16")):
        captured = read_captured(own_file(facts=facts), config_of("llama-3"), tp=tp)
        assert (captured.facts["tp"], captured.notes) == (expected, [])
        assert captured.tensors["layers.0.q"].shape == (2, 10, 8, 8)
    for told in ("two", "0", "-1", "1.5", "", "4097", "9" * 30):
        with pytest.raises(UsageError, match=r"its metadata say tp .*: give --tp"):
            read_captured(own_file(facts={"tp": told}), config_of("llama-3"))
    with pytest.raises(UsageError, match="--tp 5000: it must be at most 4096"):
        read_captured(own_file(), config_of("llama-3"), tp=5000)


def test_a_file_may_hold_logits_of_new_tokens_only(own_file: Callable, texts: Callable, config_of: Callable) -> None:
    new = [text["logits"][len(prompt) - 1 :] for text, prompt in zip(texts("llama-3"), PROMPTS, strict=True)]
    captured = read_captured(own_file({"logits": torch.stack(new)}), config_of("llama-3"))
    assert_is_hfs(captured, texts("llama-3"), "logits")
    assert_is_hfs(captured, texts("llama-3"), "layers.1.mlp")
    nothing_else = {name: None for name in texts("llama-3")[0] if name != "ids"}
    captured = read_captured(own_file(nothing_else | {"logits": torch.stack(new)}), config_of("llama-3"))
    assert captured.ends == ENDS
    assert_is_hfs(captured, texts("llama-3"), "logits")


def test_a_file_of_one_text_may_lack_the_batch(texts: Callable, config_of: Callable, tmp_path: Path) -> None:
    text = {name: x.contiguous() for name, x in texts("llama-3")[0].items() if name != "cos"}
    path = tmp_path / "port.safetensors"
    save_file(text, path, {"prompt_tokens": "[7]"})
    captured = read_captured(path, config_of("llama-3"))
    assert (captured.notes, captured.ids.tolist()) == ([], [text["ids"].tolist()])
    for name in captured.tensors:
        assert torch.equal(captured.tensors[name][0], text[name]), name


WRONG_FILES = {
    "no list": ({}, {"prompt_tokens": "7"}, r"prompt_tokens must be a list of 2, each from 1 to 10, .* got 7"),
    "no json": ({}, {"prompt_tokens": "[7,"}, "prompt_tokens in its metadata is no JSON"),
    "too deep": ({}, {"prompt_tokens": "[" * 10000}, "prompt_tokens in its metadata is no JSON"),
    "too few": ({}, {"prompt_tokens": "[7]"}, "prompt_tokens must be a list of 2"),
    "negative": ({}, {"prompt_tokens": "[-7, 3]"}, "prompt_tokens must be a list of 2"),
    "no tokens": ({}, {"prompt_tokens": "[7, 0]"}, "prompt_tokens must be a list of 2"),
    "fractions": ({}, {"prompt_tokens": "[7.0, 3]"}, "prompt_tokens must be a list of 2"),
    "truth": ({}, {"prompt_tokens": "[true, 3]"}, "prompt_tokens must be a list of 2"),
    "beyond the text": ({}, {"prompt_tokens": "[11, 3]"}, "prompt_tokens must be a list of 2"),
    "differing": ({}, {"differing": "[1]"}, "differing in its metadata is no list of texts"),
    "float ids": ({"ids": torch.zeros(2, 11)}, {}, "ids are float32 of shape .2, 11.: write int64"),
    "NaN ids": ({"ids": torch.full((2, 11), torch.nan)}, {}, "ids are float32"),
    "empty ids": ({"ids": torch.zeros(2, 0).long()}, {}, "ids are int64 of shape .2, 0."),
    "negative ids": ({"ids": torch.full((2, 11), -1)}, {}, "row 0 of ids holds -1, --hf has ids from 0 to 95"),
    "ids of a larger model": ({"ids": torch.full((2, 11), 96)}, {}, "row 0 of ids holds 96, --hf has ids from 0 to 95"),
    "other ids": ({"ids": torch.zeros(2, 40).long()}, {}, "no tensor of the model that --hf names .*does not fit ids"),
    "no ids": ({"ids": None}, {}, "does not tell its ids: give them by --prompt-ids"),
}


@pytest.mark.parametrize("mistake", WRONG_FILES)
def test_a_wrong_file_is_refused_in_one_line(mistake: str, own_file: Callable, config_of: Callable) -> None:
    changes, facts, message = WRONG_FILES[mistake]
    with pytest.raises(UsageError, match=message) as error:
        read_captured(own_file(changes, facts), config_of("llama-3"))
    assert "\n" not in str(error.value)


WRONG_TENSORS = {
    "whole numbers": (torch.zeros(2, 10, 64).long(), "left out, it holds int64"),
    "complex": (torch.zeros(2, 10, 64, dtype=torch.complex64), "left out, it holds complex64"),
    "bits": (torch.zeros(2, 10, 64, dtype=torch.bool), "left out, it holds bool"),
    "narrow": (torch.zeros(2, 10, 48), "left out, 48 wide, and 64 are expected at tp 1"),
    "another model's": (torch.ones(2, 10, 96), "left out, 96 wide, and 64 are expected: what is beyond is no padding"),
    "one text": (torch.zeros(1, 10, 64), "left out, its shape .1, 10, 64. does not fit ids of .2, 11."),
    "empty": (torch.zeros(2, 0, 64), "left out, its shape .2, 0, 64. does not fit"),
    "a number": (torch.tensor(3.0), "left out, its shape .. does not fit"),
}


@pytest.mark.parametrize("kind", WRONG_TENSORS)
def test_a_wrong_tensor_is_left_out_with_a_reason(kind: str, own_file: Callable, config_of: Callable) -> None:
    x, reason = WRONG_TENSORS[kind]
    captured = read_captured(own_file({"layers.1.mlp": x}), config_of("llama-3"))
    assert "layers.1.mlp" not in captured.tensors and "layers.0.mlp" in captured.tensors
    (note,) = captured.notes
    assert re.match(f"layers.1.mlp: {reason}", note)


def test_another_models_capture_is_refused(own_file: Callable, config_of: Callable) -> None:
    with pytest.raises(UsageError, match=r"no tensor of the model that --hf names \(.* wide, and .* are expected"):
        read_captured(own_file({"ids": torch.zeros(2, 11).long(), "logits": None}), config_of("head_dim"))


def test_layers_that_the_model_does_not_have_are_left_out(own_file: Callable, config_of: Callable) -> None:
    extra = {"layers.3.mlp": torch.zeros(2, 10, 64), "hidden_states.4": torch.zeros(2, 10, 64)}
    captured = read_captured(own_file(extra), config_of("llama-3"))
    assert {note.partition(":")[0] for note in captured.notes} == set(extra)


# ---- whose choices the ids are


def test_new_tokens_of_a_run_are_the_ports_own_choices(texts: Callable, config_of: Callable, tmp_path: Path) -> None:
    generated(tmp_path, texts("llama-3"))
    greedy = read_captured(tmp_path, config_of("llama-3")).greedy
    for row, (text, prompt) in enumerate(zip(texts("llama-3"), PROMPTS, strict=True)):
        expected = [-1] * (len(prompt) - 1) + text["ids"][len(prompt) :].tolist()
        assert greedy[row, : ENDS[row]].tolist() == expected
    file = tmp_path / "generated.safetensors"
    save_file(load_file(file), file, {"forced": "true"})
    assert read_captured(tmp_path, config_of("llama-3")).greedy is None


def test_what_follows_an_eos_token_is_nobodys_choice(texts: Callable, config_of: Callable, tmp_path: Path) -> None:
    """`generate` pads the rows that end before the others."""
    generated(tmp_path, texts("llama-3"))
    ids = texts("llama-3")[0]["ids"].tolist()
    config = replace(config_of("llama-3"), eos_token_id=[ids[8]])
    assert ids[7] != ids[8]
    greedy = read_captured(tmp_path, config).greedy
    assert greedy[0].tolist() == [-1] * 6 + ids[7:9] + [-1] * 2


def test_vllm_neurons_tokens_are_its_own_choices(texts: Callable, config_of: Callable, tmp_path: Path) -> None:
    folder = vllm_folder(tmp_path, texts("llama-3"), LAYOUTS["llama-3", 1])
    assert read_captured(folder, config_of("llama-3")).greedy is None
    generated(folder, texts("llama-3"))
    greedy = read_captured(folder, config_of("llama-3")).greedy
    assert greedy[0].tolist() == [-1] * 6 + texts("llama-3")[0]["ids"][7:].tolist()
    ids = pad_sequence([text["ids"][:-1] for text in texts("llama-3")], batch_first=True)
    save_file({"ids": ids}, folder / "generated.safetensors")  # without the last one
    assert read_captured(folder, config_of("llama-3")).greedy[0].tolist() == [*greedy[0].tolist()[:-1], -1]


# ---- folders as they come


def test_names_that_vllm_neuron_repeats_are_the_layers(texts: Callable, config_of: Callable, tmp_path: Path) -> None:
    """It calls the second tensor of a name in a pass NAME_1, and so on: one name in the code of all layers."""
    folder = vllm_folder(tmp_path, texts("llama-3"), LAYOUTS["llama-3", 2])
    for at in folder.glob("dp0/*"):
        for number, repeated in enumerate(("manual.q", "manual.q_1", "manual.q_2")):
            (at / f"manual.layers.{number}.q").rename(at / repeated)
        shutil.copytree(at / "manual.layers.1.v", at / "manual.layers.1.v_1")
    captured = read_captured(folder, config_of("llama-3"))
    for number in range(3):
        assert_is_hfs(captured, texts("llama-3"), f"layers.{number}.q")
    assert "manual.layers.1.v_1: left out, one more tensor of its name in the same pass (first of 5)" in captured.notes
    for at in folder.glob("dp0/*"):
        shutil.copytree(at / "manual.q_1", at / "manual.q_3")  # four in three layers
    captured = read_captured(folder, config_of("llama-3"))
    assert "layers.0.q" not in captured.tensors


@pytest.mark.parametrize(
    "name, tp, message",
    [
        ("rank7", None, "has files of 3 ranks, the last of them rank 7: give --tp"),
        ("rank99999999999", None, "rank99999999999.pt is of no rank: remove it"),
        ("rank-1", None, "rank-1.pt is of no rank"),
        ("rankx", None, "rankx.pt is of no rank"),
        ("rank2", 2, "has files of rank 2, but --tp 2: give the tp that was captured"),
    ],
)
def test_files_of_ranks_that_cannot_be_are_refused(
    name: str, tp: int | None, message: str, texts: Callable, config_of: Callable, tmp_path: Path
) -> None:
    folder = vllm_folder(tmp_path, texts("llama-3"), LAYOUTS["llama-3", 2])
    at = next(folder.glob("dp0/decode_b*_1/model.norm"))
    shutil.copy(at / "rank1.pt", at / f"{name}.pt")
    with pytest.raises(UsageError, match=message):
        read_captured(folder, config_of("llama-3"), tp=tp)


def test_slices_of_a_padded_vocabulary_are_put_together(texts: Callable, config_of: Callable, tmp_path: Path) -> None:
    """67 logits, padded to 2 times 40: rank 1 begins with the 40th."""
    folder = vllm_folder(tmp_path, texts("odd sizes"), LAYOUTS["odd sizes", 2])
    for folder_of_pass in folder.glob("dp0/*/lm_head"):
        parts = [torch.load(folder_of_pass / f"rank{rank}.pt") for rank in range(2)]
        whole = nn.functional.pad(torch.cat(parts, dim=-1)[:, :67], (0, 13), value=-77.0)
        for rank, part in enumerate(whole.chunk(2, dim=-1)):
            torch.save(part.clone(), folder_of_pass / f"rank{rank}.pt")
    assert_is_hfs(read_captured(folder, config_of("odd sizes")), texts("odd sizes"), "logits")


def test_requests_may_end_at_different_steps(texts: Callable, config_of: Callable, tmp_path: Path) -> None:
    folder = vllm_folder(tmp_path, texts("llama-3"), LAYOUTS["llama-3", 1])
    for file in folder.glob("dp0/decode_b4_2/*_meta.json"):
        told = json.loads(file.read_text())
        file.write_text(json.dumps(told | {"req_ids": told["req_ids"][:1]}))
    captured = read_captured(folder, config_of("llama-3"))
    assert captured.ends == [ENDS[0], ENDS[1] - 1]
    assert captured.seen["final_norm"].sum(1).tolist() == captured.ends


@pytest.mark.parametrize("change", ["positions", "negative", "texts", "requests", "far away"])
def test_a_pass_that_does_not_tell_its_tokens_is_refused(
    change: str, texts: Callable, config_of: Callable, tmp_path: Path
) -> None:
    folder = vllm_folder(tmp_path, texts("llama-3"), LAYOUTS["llama-3", 1])
    file = next(folder.glob("dp0/decode_b4_1/*_meta.json"))
    told = json.loads(file.read_text())
    changes = {
        "positions": {"positions": [7]},
        "negative": {"positions": [-7, 3, 0, 0]},
        "texts": {"positions": ["7", "3", "0", "0"]},
        "requests": {"req_ids": 9},
        "far away": {"positions": [10**12, 4, 0, 0]},
    }
    file.write_text(json.dumps(told | changes[change]))
    with pytest.raises(UsageError, match=r"decode_b4_1_meta.json cannot be read|holds position 1000000000000"):
        read_captured(folder, config_of("llama-3"))


GENERATED = {
    "no ids": (lambda known: known.pop("ids"), "has no ids"),
    "logits of fewer tokens": (
        lambda known: known.update(logits=known["logits"][:, 1:].clone()),
        "has logits of 3 tokens for 4",
    ),
    "logits of one text": (lambda known: known.update(logits=known["logits"][:1].clone()), "write them as"),
    "wrong lengths": (
        lambda known: known.update(prompt_tokens=torch.tensor([7, 30])),
        "prompt_tokens must be a list of 2, each from 1 to 10",
    ),
    "lengths by text": (
        lambda known: known.update(prompt_tokens=torch.tensor([7])),
        "prompt_tokens must be a list of 2",
    ),
    "no whole lengths": (lambda known: known.update(prompt_tokens=torch.tensor([7.5, 3])), "prompt_tokens must be"),
    "unknown ids": (lambda known: known["ids"].fill_(96), "row 0 of ids holds 96"),
}


@pytest.mark.parametrize("mistake", GENERATED)
def test_a_wrong_generated_file_is_refused(mistake: str, texts: Callable, config_of: Callable, tmp_path: Path) -> None:
    change, message = GENERATED[mistake]
    generated(tmp_path, texts("llama-3"))
    file = tmp_path / "generated.safetensors"
    known = load_file(file)
    change(known)
    save_file(known, file)
    with pytest.raises(UsageError, match=message):
        read_captured(tmp_path, config_of("llama-3"))


# ---- the command


def report_of(hf: Path, captured: Path, *flags: object) -> dict:
    return audit(parse_args(["--hf", str(hf), "--captured", str(captured), *map(str, flags)]))


@pytest.mark.parametrize("missing", ["prefill", "decode", "step"])
def test_a_pass_that_is_missing_is_not_called_bitwise_equal(
    missing: str, texts: Callable, hf_checkpoint: Callable, tmp_path: Path
) -> None:
    folder = vllm_folder(tmp_path, texts("llama-3"), LAYOUTS["llama-3", 1])
    generated(folder, texts("llama-3"))
    whole = report_of(hf_checkpoint("llama-3"), folder)
    assert whole["verdict"].startswith("passed: bitwise equal to Hugging Face in float32 at 30 places")
    patterns = {"prefill": "dp0/prefill_s*", "decode": "dp0/decode_b*", "step": "dp0/decode_b4_1"}
    for at in folder.glob(patterns[missing]):
        if missing == "prefill":
            for module in at.glob("*/rank0.pt"):
                module.unlink()
        elif missing == "decode":
            shutil.rmtree(at)
        else:
            for module in at.glob("*/rank0.pt"):
                module.unlink()
    part = report_of(hf_checkpoint("llama-3"), folder)
    if missing == "decode":  # nothing says that there were more tokens
        assert part["not_seen"] == []
        assert [len(text["ids"]) for text in part["texts"]] == [8, 4]
        return
    assert "passed: bitwise" not in part["verdict"]
    step = {"prefill": "prefill of row 0", "step": "decoding step 2 of row 1"}[missing]
    assert step in part["not_seen"]
    assert ("layers.0.q in prefill" in part["not_seen"]) == (missing == "prefill")


def test_nxdis_ids_that_its_logits_did_not_choose_fail(
    texts: Callable, hf_checkpoint: Callable, tmp_path: Path
) -> None:
    """The text goes on with another id than the largest logit's, and all tensors are HF's for that text."""
    model = hf_model(hf_checkpoint("llama-3"), torch.float32)
    prompt = PROMPTS[0]
    chosen = texts("llama-3")[0]["ids"][len(prompt) :].tolist()
    other = [chosen[0], (chosen[1] + 1) % 96]
    rest = run_hf(model, prompt + other, NEW_TOKENS - 2)["ids"][len(prompt) + 2 :].tolist()  # own choices again
    text = run_hf(model, prompt, NEW_TOKENS, other + rest)
    known = {"ids": text["ids"][None], "prompt_tokens": torch.tensor([len(prompt)])}
    known["logits"] = text["logits"][None, len(prompt) - 1 :].contiguous()
    save_file(known, tmp_path / "generated.safetensors")
    report = report_of(hf_checkpoint("llama-3"), tmp_path)
    assert not report["passed"]
    assert (report["first"]["module"], report["first"]["position"]) == ("the greedy choice", len(prompt))
    save_file(known, tmp_path / "generated.safetensors", {"forced": "true"})
    assert report_of(hf_checkpoint("llama-3"), tmp_path)["passed"]


@pytest.mark.parametrize("prompt_tokens", [1, 2, 5])
@pytest.mark.parametrize("new_tokens", [1, 3])
def test_short_texts_are_audited(prompt_tokens: int, new_tokens: int, hf_checkpoint: Callable, tmp_path: Path) -> None:
    model = hf_model(hf_checkpoint("llama-3"), torch.float32)
    text = run_hf(model, PROMPTS[0][:prompt_tokens], new_tokens)
    path = tmp_path / "port.safetensors"
    save_file({name: x[None].contiguous() for name, x in text.items()}, path, {"prompt_tokens": f"[{prompt_tokens}]"})
    report = report_of(hf_checkpoint("llama-3"), path)
    assert report["verdict"] == "passed: bitwise equal to Hugging Face in float32 at 36 places"
    assert report["not_seen"] == []


@pytest.mark.parametrize(
    "dtype, flags, audited",
    [
        ("float32", ["--prompt-ids", "5,11,2", "--new", "3", "--dtype", "bfloat16"], "bfloat16"),  # auto-cast
        ("bfloat16", ["--prompt-ids", "5", "--new", "1"], "bfloat16"),
    ],
)
def test_a_conversion_is_audited_in_a_coarser_dtype_and_on_one_token(
    dtype: str, flags: list[str], audited: str, hf_checkpoint: Callable, converted: Callable
) -> None:
    words = ["--hf", str(hf_checkpoint("llama-3")), "--ckpt", str(converted("llama-3", 1, dtype=dtype))]
    report = audit(parse_args([*words, "--device", "cpu", *flags]))
    assert (report["passed"], report["setting"]["dtype"]) == (True, audited), report["verdict"]


@pytest.mark.parametrize("tp", [1, 2, 4, 16])
def test_a_ports_own_file_passes_at_any_tp(tp: int, own_file: Callable, hf_checkpoint: Callable) -> None:
    report = report_of(hf_checkpoint("llama-3"), own_file(), "--tp", tp)
    assert report["passed"], report["verdict"]
    assert f"tp {tp})" in report["setting"]["subject"]


def test_a_float32_capture_is_audited_as_bfloat16_if_asked(own_file: Callable, hf_checkpoint: Callable) -> None:
    hf = hf_checkpoint("llama-3")
    for facts in ({}, {"dtype": "float32"}, {"dtype": "torch.float32"}):
        assert report_of(hf, own_file(facts=facts))["setting"]["dtype"] == "float32"
        report = report_of(hf, own_file(facts=facts), "--dtype", "bfloat16")
        assert (report["passed"], report["setting"]["dtype"]) == (True, "bfloat16")
    with pytest.raises(UsageError, match=r"--dtype float32: --captured .* is in bfloat16"):
        report_of(hf, own_file(facts={"dtype": "bfloat16"}), "--dtype", "float32")


def test_copies_that_differ_reach_the_judge(own_file: Callable, hf_checkpoint: Callable) -> None:
    line = "layers.0.k: the copies of head 1 differ, rank 3 from rank 2"
    path = own_file(facts={"differing": json.dumps([line])})
    report = report_of(hf_checkpoint("llama-3"), path)
    assert not report["passed"]
    assert "rank 3 from rank 2" in json.dumps(as_json(report))


MEANINGLESS = {
    "text": (["--prompt", "Hi"], "--prompt means nothing beside --captured"),
    "new tokens": (["--new", "4"], "--new means nothing beside --captured"),
    "random ids": (["--tokens", "4"], "--tokens means nothing beside --captured"),
    "device": (["--device", "cpu"], "--device means nothing beside --captured"),
    "ids twice": (["--prompt-ids", "1,2,3"], "port.safetensors holds its ids: leave out --prompt-ids"),
    "page": (["--html", "none/audit.html"], "--html none/audit.html cannot be written: name a file in a directory"),
    "picture": (["--plot", "none/audit.png"], "--plot none/audit.png cannot be written"),
    "a directory": (["--html", "."], r"--html \. cannot be written"),
}


@pytest.mark.parametrize("mistake", MEANINGLESS)
def test_flags_that_mean_nothing_are_refused_first(
    mistake: str, own_file: Callable, hf_checkpoint: Callable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    flags, message = MEANINGLESS[mistake]
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UsageError, match=message):
        report_of(hf_checkpoint("llama-3"), own_file(), *flags)


@pytest.mark.parametrize(
    "file, settings",
    [
        ("config.json", {"use_cache": False, "return_dict": False, "output_attentions": True, "num_beams": 4}),
        ("generation_config.json", {"num_beams": 4, "do_sample": True, "use_cache": False, "max_length": 2}),
        ("generation_config.json", {"repetition_penalty": 3.0, "suppress_tokens": [5], "forced_bos_token_id": 3}),
        ("generation_config.json", {"min_new_tokens": 9, "cache_implementation": "static", "compile_config": {}}),
    ],
)
def test_settings_of_a_checkpoint_change_nothing(
    file: str, settings: dict, own_file: Callable, hf_checkpoint: Callable, tmp_path: Path
) -> None:
    hf = tmp_path / "hf"
    shutil.copytree(hf_checkpoint("llama-3"), hf)
    path = hf / file
    before = json.loads(path.read_text()) if path.exists() else {}
    path.write_text(json.dumps(before | settings))
    report = report_of(hf, own_file())
    assert report["verdict"] == "passed: bitwise equal to Hugging Face in float32 at 36 places"


# ---- whatever else may be in a file


def broken(x: Tensor, draw: random.Random) -> Tensor:
    """x with one thing wrong."""
    dtypes = (torch.int64, torch.float16, torch.complex64, torch.float64, torch.bool, torch.float8_e4m3fn)
    changes: list[Callable[[Tensor], Tensor]] = [
        lambda x: x.to(draw.choice(dtypes)),
        lambda x: x[:0],
        lambda x: x[:1],
        lambda x: torch.cat((x, x)),
        lambda x: x.flatten(),
        lambda x: x[None],
        lambda x: x[..., :-1],
        lambda x: torch.cat((x, x), dim=-1),
        lambda x: x.transpose(0, -1),
        lambda x: torch.full(x.shape, torch.nan),
        lambda x: torch.full(x.shape, -torch.inf),
        lambda x: -x - 1,
        lambda x: x * 1_000_000,
    ]
    return draw.choice(changes)(x).contiguous()


def spoil(path: Path, draw: random.Random) -> None:
    """Breaks one thing of a file, at random: bytes, JSON, or a tensor; or the file is gone, or a directory."""
    how = draw.random()
    if how < 0.1:
        path.unlink()
    elif how < 0.2:
        path.unlink()
        path.mkdir()
    elif how < 0.4:
        content = bytearray(path.read_bytes())
        content[draw.randrange(len(content))] = draw.randrange(256)
        path.write_bytes(content[: draw.randrange(len(content))] if how < 0.3 else content)
    elif path.suffix == ".json":
        told = json.loads(path.read_text())
        told[draw.choice(("req_ids", "positions"))] = draw.choice((None, [], {}, "9", [0.5], [-1], [10**30], [[1]]))
        path.write_text(json.dumps(told))
    elif path.suffix == ".pt":
        torch.save(broken(torch.load(path), draw), path)
    else:
        tensors = load_file(path)
        name = draw.choice(sorted(tensors))
        tensors[name] = broken(tensors[name], draw)
        lengths = draw.choice(("[7, 3]", "[7, 3]", "[3, 7]", "[]", "{", "null", "[1e999, 1]", '["7"]', "[10, 10]"))
        save_file(tensors, path, {"prompt_tokens": lengths})


@pytest.mark.parametrize("stack", ["file", "nxdi", "vllm"])
def test_no_damage_ends_in_a_traceback(
    stack: str, own_file: Callable, texts: Callable, hf_checkpoint: Callable, tmp_path: Path
) -> None:
    """An audit of a damaged capture ends in a report or in one line."""
    folder = tmp_path / stack
    layout = LAYOUTS["llama-3", 2]
    if stack == "nxdi":
        nxdi_folder(folder, texts("llama-3"), layout, nxdi_modules(3))
    elif stack == "vllm":
        vllm_folder(folder, texts("llama-3"), layout)
    else:
        folder.mkdir()
        shutil.copy(own_file(), folder)
    if stack != "file":
        generated(folder, texts("llama-3"))
    draw = random.Random(stack)
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    refused = 0
    for _ in range(12):
        file = draw.choice(files if draw.random() < 0.7 else files[-1:])  # or the one with the ids
        content = file.read_bytes()
        spoil(file, draw)
        try:
            table(report_of(hf_checkpoint("llama-3"), file if stack == "file" else folder, "--tp", 2))
        except UsageError as error:
            assert "\n" not in str(error)
            refused += 1
        if file.is_dir():
            file.rmdir()
        file.write_bytes(content)
    assert 0 < refused < 12


# ---- what is no capture


class Evil:
    def __reduce__(self) -> tuple:
        return os.mkdir, ("was_run",)


def damage(folder: Path, how: str) -> Path:
    """A path that cannot be read."""
    file = folder / "captured_tensors_cte_step_1_module_norm_output.pt"
    if how == "no path":
        return folder / "none"
    if how == "text":
        file = folder / "notes.txt"
        file.write_text("hello")
        return file
    if how == "other tensors":
        save_file({"model.norm.weight": torch.zeros(3)}, folder / "model.safetensors")
        return folder / "model.safetensors"
    if how == "cut":
        torch.save(torch.zeros(1, 16, 64), file)
        file.write_bytes(file.read_bytes()[:300])
    if how == "no tensor":
        torch.save({"x": 1}, file)
    if how == "code":
        torch.save(Evil(), file)
    if how in ("meta", "no meta"):
        at = folder / "dp0" / "prefill_s16_0"
        at.mkdir(parents=True)
        if how == "meta":
            (at / "prefill_s16_0_meta.json").write_text('{"positions": [0]}')
    return folder


@pytest.mark.parametrize(
    "how, message",
    {
        "no path": "none is no capture: expected a file of tools.capture, or a folder of .* docs/captures.md says how",
        "empty": "is no capture",
        "text": "notes.txt cannot be read .*: capture it again",
        "other tensors": "model.safetensors has no tensor by a name of tools.capture",
        "cut": "norm_output.pt cannot be read .*: capture it again",
        "no tensor": "norm_output.pt cannot be read .*: capture it again",
        "code": "norm_output.pt cannot be read .*: capture it again",
        "meta": "prefill_s16_0_meta.json cannot be read .*: capture it again",
        "no meta": "prefill_s16_0_meta.json cannot be read .*: capture it again",
    }.items(),
)
def test_what_is_no_capture_is_refused(
    how: str, message: str, config_of: Callable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    path = damage(tmp_path, how)
    with pytest.raises(UsageError, match=message) as error:
        read_captured(path, config_of("llama-3"), ids=torch.zeros(1, 8).long())
    assert "\n" not in str(error.value) and not Path("was_run").exists()

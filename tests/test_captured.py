"""tools.audit.captured: folders as NxDI and vLLM Neuron write them, made from HF's modules, give HF's tensors again."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from checkpoint.config import llama_config, read_config
from llama_neuron import LlamaConfig, UsageError
from tests.helpers import hf_model
from tools.audit.captured import Captured, read_captured
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
        "captured_tensors_tkg_step_3_manual_tensor_0.pt: left out, it carries no module's name",
        "layers.1.self_attn.rotary_emb output: left out, it has no place in the audit",
        "layers.2.input_layernorm output: the module did not run",
        "final_norm: copies differ",
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


def test_copies_that_differ_between_ranks_become_notes(texts: Callable, config_of: Callable, tmp_path: Path) -> None:
    folder = vllm_folder(tmp_path, texts("llama-3"), LAYOUTS["llama-3", 4], shared=False)
    assert len(read_captured(folder, config_of("llama-3")).notes) == 1  # the logits' gaps
    for module, rank in (("model.layers.1.mlp", 3), ("manual.layers.2.v", 1)):  # whole, and a copy of KV head 0
        file = folder / "dp0" / "decode_b4_2" / module / f"rank{rank}.pt"
        torch.save(torch.load(file) * 1.01, file)
    captured = read_captured(folder, config_of("llama-3"))
    assert {"layers.1.mlp: copies differ", "layers.2.v: copies of head 0 differ"} <= {*captured.notes}
    assert_is_hfs(captured, texts("llama-3"), "layers.1.mlp")  # rank 0's


def test_ranks_that_are_elsewhere_leave_gaps(texts: Callable, config_of: Callable, tmp_path: Path) -> None:
    folder = vllm_folder(tmp_path, texts("llama-3"), LAYOUTS["llama-3", 4])
    for file in folder.glob("dp0/*/*/rank[23].pt"):
        file.unlink()
    captured = read_captured(folder, config_of("llama-3"), tp=4)
    assert_is_hfs(captured, texts("llama-3"), "layers.0.q", [0, 1, 2, 3])
    seen = captured.seen["layers.0.mlp"]
    assert seen[0].tolist() == [True] * 10 and seen[1, :6].all()  # two ranks hold the first 8 of the bucket's 16 tokens
    assert not captured.seen["logits"].any()


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
        "layers.1.v: left out, it has no place in the audit",
        "layers.1.mlp: left out, 7 wide, and 64 are expected at tp 1",
    }
    save_file(tensors, path)  # as long as no lengths are told, all positions count
    captured = read_captured(path, config_of("llama-3"))
    assert captured.prompt_tokens is None and captured.seen["layers.0.q"].all()


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

"""The model on `neuronx_distributed` itself: its layers, its checkpoint sharding, its ModelBuilder.

Skipped if that is not installed. The layers are compared over gloo, which NxD takes with NXD_CPU_MODE=1 in the
environment; the ModelBuilder needs torch_xla and NXD_CPU_MODE unset or 0, and more than one rank needs NeuronCores.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

pytest.importorskip("neuronx_distributed")

import torch
import torch.distributed as dist
from neuronx_distributed import NxDModel, NxDParallelState, shard_checkpoint
from neuronx_distributed.parallel_layers import layers, parallel_state
from safetensors.torch import load_file
from torch import Tensor

from conftest import command, hf_greedy, hf_model
from llama_neuron import (
    LlamaConfig,
    LlamaForCausalLM,
    NeuronConfig,
    Parts,
    compile_nxd,
    generate,
    load_model,
    read_shard,
)

over_gloo = pytest.mark.skipif(
    os.environ.get("NXD_CPU_MODE") != "1", reason="NxD's layers run over gloo in its CPU mode"
)
traced = pytest.mark.skipif(
    os.environ.get("NXD_CPU_MODE") == "1", reason="NxD mocks its process group only outside of CPU mode"
)
# every way to spread heads, tied and untied, rounded sizes, biases
FAMILIES = ["llama-2", "llama-3.2", "smollm2", "granite-code", "head_dim", "odd sizes"]
PROMPT, LENGTH, NEW = [5, 11, 2, 60, 33, 47, 3], 32, 10
families = pytest.mark.parametrize("family", FAMILIES)
embeddings = pytest.mark.parametrize("vocab_parallel", [False, True], ids=["hidden", "vocabulary"])


# ---- layers


@contextmanager
def nxd_ranks(tp: int) -> Iterator[None]:
    """NxD's process groups. Two and more ranks have a default group already."""
    if tp == 1:
        dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    parallel_state.initialize_model_parallel(tensor_model_parallel_size=tp)
    yield
    parallel_state.destroy_model_parallel()
    if tp == 1:
        dist.destroy_process_group()


@torch.inference_mode()
def run_both(rank: int, tp: int, ckpt: Path) -> list[list]:
    """Hidden states, logits and choice that NxD's layers compute, and those of the layers in `llama_neuron.py`."""
    ids = torch.tensor([PROMPT], dtype=torch.int32)
    positions = torch.arange(len(PROMPT), dtype=torch.int32)[None]
    last = torch.tensor([len(PROMPT) - 1], dtype=torch.int32)
    results = []
    with nxd_ranks(tp):
        for parts in (Parts(layers=layers), Parts()):
            model = load_model(ckpt, rank, parts=parts)
            assert isinstance(model.lm_head, parts.layers.ColumnParallelLinear)
            outputs = model.model(ids, positions), model(ids, positions), model(ids, positions, last)
            results.append([output.numpy() for output in outputs])
    return results


@over_gloo
@families
@embeddings
@pytest.mark.parametrize("tp", [1, 2, 4])
def test_nxds_layers_compute_what_the_reference_does_and_hf(
    tp: int, vocab_parallel: bool, family: str, hf_checkpoint: Callable, converted: Callable, on_ranks: Callable
) -> None:
    ckpt = converted(family, tp, sequence_length=LENGTH, vocab_parallel=vocab_parallel)
    logits, ids = hf_greedy(hf_model(hf_checkpoint(family), torch.float32), PROMPT, 1)
    for theirs, ours in on_ranks(tp, run_both, tp, ckpt):
        for a, b in zip(theirs, ours, strict=True):
            assert a.dtype == b.dtype
            assert abs(a - b).max() <= 2e-6 * abs(a).max()
        assert abs(theirs[1][0] - logits.numpy()).max() <= 4e-6 * logits.abs().max()
        assert theirs[2].tolist() == ids


# ---- checkpoint sharding


def whole_checkpoint(hf: Path, config: LlamaConfig, tp: int) -> tuple[dict[str, Tensor], int, int]:
    """What NxD's `shard_checkpoint` is given: heads repeated and padded as NxDI does it, q, k and v in one tensor.

    Not through `shard_heads`: heads are repeated by `repeat_interleave` and padded group by group or at the end.
    """
    state = load_file(hf / "model.safetensors")
    if config.tie_word_embeddings:
        state["lm_head.weight"] = state["model.embed_tokens.weight"].clone()
    H, K, D = config.num_attention_heads, config.num_key_value_heads, config.head_dim

    def pad(heads: Tensor, groups: int) -> Tensor:  # heads [n, D, ...] in groups, zeros at the end of each
        grouped = heads.unflatten(0, (groups, -1))
        missing = -len(heads) % tp // groups
        return torch.cat((grouped, grouped.new_zeros(groups, missing, *grouped.shape[2:])), dim=1).flatten(0, 1)

    def query(tensor: Tensor) -> Tensor:
        return pad(tensor.unflatten(0, (H, D)), K if tp % K == 0 else 1)

    def key(tensor: Tensor) -> Tensor:
        heads = tensor.unflatten(0, (K, D))
        if tp % K == 0:
            return heads.repeat_interleave(tp // K, dim=0)
        return pad(heads.repeat_interleave(H // K, dim=0), 1) if K % tp else heads

    for prefix in [name.removesuffix("q_proj.weight") for name in state if name.endswith("q_proj.weight")]:
        for kind in ("weight", "bias") if config.attention_bias else ("weight",):
            q, k, v = (state.pop(f"{prefix}{name}_proj.{kind}") for name in "qkv")
            q, k, v = query(q), key(k), key(v)
            state[f"{prefix}Wqkv.{kind}"] = torch.cat((q, k, v)).flatten(0, 1)
        columns = state[f"{prefix}o_proj.weight"].T
        state[f"{prefix}o_proj.weight"] = query(columns).flatten(0, 1).T.contiguous()
    return state, len(q), len(k)


@traced
@families
@embeddings
@pytest.mark.parametrize("tp", [1, 2, 4, 8])
def test_nxd_shards_this_model_as_the_converter_does(
    tp: int, vocab_parallel: bool, family: str, hf_checkpoint: Callable, converted: Callable
) -> None:
    ckpt = converted(family, tp, sequence_length=LENGTH, vocab_parallel=vocab_parallel)
    config = LlamaConfig.from_pretrained(ckpt)
    state, query_heads, kv_heads = whole_checkpoint(hf_checkpoint(family), config, tp)
    ranks = torch.arange(tp, dtype=torch.int32)
    state |= {"rank_util.rank": ranks, "model.embed_tokens.rank_util.rank": ranks.clone()}
    with NxDParallelState(world_size=tp, tensor_model_parallel_size=tp):
        model = LlamaForCausalLM(config, NeuronConfig.from_pretrained(ckpt), Parts.of_device("nxd"))
        for layer in model.model.layers:
            for parameter in layer.self_attn.Wqkv.parameters():  # how NxDI tells NxD that q, k and v are in one
                parameter.fused_qkv, parameter.head_dim = True, config.head_dim
                parameter.num_attention_heads, parameter.num_key_value_heads = query_heads, kv_heads
        shards = shard_checkpoint(state, model)
    names = dict(model.named_parameters()).keys()
    for rank, theirs in enumerate(shards):
        ours = read_shard(ckpt, rank)
        assert ours.keys() == theirs.keys() == names
        for name, tensor in theirs.items():
            assert ours[name].dtype == tensor.dtype and torch.equal(ours[name], tensor), name


# ---- ModelBuilder


class Logits(LlamaForCausalLM):
    """Graphs of logits. `last` is ignored: `compile_nxd` gives it to every graph."""

    def forward(self, input_ids: Tensor, position_ids: Tensor, last: Tensor | None = None) -> Tensor:
        return super().forward(input_ids, position_ids)


@pytest.fixture(autouse=True)
def code(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where compiled graphs are kept: nothing of another test is used."""
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "code"))
    return tmp_path / "code"


def kept(code: Path) -> dict[str, int]:
    """The files of compiled graphs, and when each was written, in ns."""
    return {path.name: path.stat().st_mtime_ns for path in code.iterdir()}


def with_cores(tp: int) -> object:
    return pytest.param(tp, marks=pytest.mark.skipif(not Path("/dev/neuron0").exists(), reason="needs NeuronCores"))


@traced
@families
@embeddings
@pytest.mark.parametrize("tp", [1, with_cores(2), with_cores(8)])
def test_model_builder_makes_hfs_ids_and_logits(
    tp: int, vocab_parallel: bool, family: str, hf_checkpoint: Callable, converted: Callable
) -> None:
    settings = {"vocab_parallel": vocab_parallel, "context_encoding_buckets": [8, 16]}
    ckpt = converted(family, tp, sequence_length=LENGTH, **settings)
    expected, expected_ids = hf_greedy(hf_model(hf_checkpoint(family), torch.float32), PROMPT, NEW)
    model = compile_nxd(ckpt, parts=Parts.of_device("nxd"))
    assert isinstance(model, NxDModel)
    assert model.get_available_keys() == {"decode", "prefill_8", "prefill_16", "prefill_32"}
    assert generate(model, [PROMPT], NEW, []) == [expected_ids]

    model = compile_nxd(ckpt, parts=Parts.of_device("nxd"), model_class=Logits)
    logits, tokens, start = [], [*PROMPT, 0], 0  # a prompt of 7 in a bucket of 8
    for token in expected_ids:
        ids = torch.tensor([tokens], dtype=torch.int32)
        positions = torch.arange(start, start + len(tokens), dtype=torch.int32)[None]
        rows = model(ids, positions, torch.zeros(1, dtype=torch.int32))[0]
        logits.append(rows[: len(PROMPT)])
        start, tokens = len(torch.cat(logits)), [token]
    worst = float((torch.cat(logits) - expected).abs().max() / expected.abs().max())
    print(f"off by {worst:.1e} of the largest logit")
    assert worst <= 4e-6


@traced
@pytest.mark.parametrize("attn", ["sdpa", "flash"])
def test_other_forms_of_attention_are_traced_too(attn: str, hf_checkpoint: Callable, converted: Callable) -> None:
    ckpt = converted("odd sizes", sequence_length=1100, prefill_chunk_size=8)
    _, ids = hf_greedy(hf_model(hf_checkpoint("odd sizes"), torch.float32), PROMPT, NEW)
    assert generate(compile_nxd(ckpt, parts=Parts.of_device("nxd", attn)), [PROMPT], NEW, []) == [ids]


@traced
def test_what_was_compiled_is_used_again_until_something_else_is_asked_for(
    hf_checkpoint: Callable, converted: Callable, code: Path
) -> None:
    ckpt = converted("odd sizes", sequence_length=LENGTH, prefill_chunk_size=4)
    _, ids = hf_greedy(hf_model(hf_checkpoint("odd sizes"), torch.float32), PROMPT, NEW)
    model = compile_nxd(ckpt, parts=Parts.of_device("nxd"))
    assert model.get_available_keys() == {"decode", "prefill_4"}
    first = kept(code)
    assert len(first) == 1
    model = compile_nxd(ckpt, parts=Parts.of_device("nxd"))
    assert kept(code) == first
    assert generate(model, [PROMPT], NEW, []) == [ids]
    compile_nxd(ckpt, parts=Parts.of_device("nxd", "sdpa"))
    compile_nxd(ckpt, batch_size=2, parts=Parts.of_device("nxd"))
    assert len(kept(code)) == 3
    assert first.items() <= kept(code).items()


@traced
def test_the_command_runs_it_and_keeps_stdout_for_the_result(hf_checkpoint: Callable, converted: Callable) -> None:
    ckpt = converted("odd sizes", sequence_length=LENGTH)
    _, ids = hf_greedy(hf_model(hf_checkpoint("odd sizes"), torch.float32), PROMPT, NEW)
    prompt = ",".join(map(str, PROMPT))
    result = command("llama_neuron.py", "--ckpt", ckpt, "--prompt-ids", prompt, "--max-new-tokens", NEW, "--json")
    assert result.returncode == 0, result.stderr
    answer = json.loads(result.stdout)
    assert answer["completions"][0]["ids"] == ids
    assert answer["config"]["device"] == "nxd"

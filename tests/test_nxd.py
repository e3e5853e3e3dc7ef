"""The model on `neuronx_distributed` itself: its layers, its checkpoint sharding, its ModelBuilder.

    NXD_SRC=neuronx-distributed/src python -m pytest tests/test_nxd.py                 # sharding and ModelBuilder
    NXD_SRC=neuronx-distributed/src NXD_CPU_MODE=1 python -m pytest tests/test_nxd.py  # layers, over gloo

Skipped without NxD or torch_xla. On a machine without Neuron's closed packages those in `tests/nxd` stand in for them:
a graph that NxD traced runs on XLA's CPU backend, for all ranks. With the real ones, NeuronCores are needed.

As on Neuron, torch-xla runs without functionalization (XLA_DISABLE_FUNCTIONALIZATION=1) unless the environment says 0;
a slow test runs two families under the other value.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest

import tests.nxd  # first: it sets what torch_xla and NxD read when they are imported

pytest.importorskip("torch_xla")
pytest.importorskip("neuronx_distributed", reason="set NXD_SRC to the src folder of a checkout of neuronx-distributed")

import torch
import torch.distributed as dist
from neuronx_distributed import NxDModel, NxDParallelState, shard_checkpoint
from neuronx_distributed.parallel_layers import parallel_state
from safetensors.torch import load_file
from torch import Tensor

from convert_weights import convert
from llama_neuron import (
    REFERENCE,
    KVCache,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaRMSNorm,
    NeuronConfig,
    backend_for,
    generate,
    load_model,
    load_nxd,
    nxd_backend,
    read_shard,
)
from tests import helpers
from tests.helpers import command, hf_greedy, hf_model
from tests.nxd.one_layer import one_layer

over_gloo = pytest.mark.skipif(
    os.environ.get("NXD_CPU_MODE") != "1", reason="NxD's layers run over gloo in its CPU mode"
)
traced = pytest.mark.skipif(
    os.environ.get("NXD_CPU_MODE") == "1", reason="NxD mocks its process group only outside of CPU mode"
)
with_cores = pytest.mark.skipif(
    tests.nxd.CLOSED is None and not Path("/dev/neuron0").exists(), reason="without the stand-ins it needs NeuronCores"
)
# every way to spread heads, tied and untied, rounded sizes, biases
FAMILIES = ["llama-2", "llama-3.2", "smollm2", "granite-code", "head_dim", "odd sizes"]
PROMPTS, LENGTH, NEW = [[5, 11, 2, 60, 33, 47, 3], [7, 1, 40], [64, 9, 13, 21, 8]], 32, 6
PROMPT = PROMPTS[0]
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
        plain = {"RMSNorm": LlamaRMSNorm, "KVCache": KVCache, "static_shapes": False}
        for backend in (replace(nxd_backend(), **plain), REFERENCE):
            model = load_model(ckpt, rank, backend=backend)
            assert isinstance(model.lm_head, backend.ColumnParallelLinear)
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
        model = LlamaForCausalLM(config, NeuronConfig.from_pretrained(ckpt), backend_for("nxd"))
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
    """Graphs of logits. `last` is ignored: `load_nxd` gives it to every graph."""

    def forward(self, input_ids: Tensor, position_ids: Tensor, last: Tensor | None = None) -> Tensor:
        return super().forward(input_ids, position_ids)


@pytest.fixture(autouse=True)
def code(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where compiled graphs are kept: nothing of another test is used. Commands find NxD where this process does."""
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "code"))
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(tests.nxd.PATHS), prepend=os.pathsep)
    return tmp_path / "code"


def kept(code: Path) -> dict[str, int]:
    """The files of compiled graphs, and when each was written, in ns."""
    return {path.name: path.stat().st_mtime_ns for path in code.iterdir()}


@torch.no_grad()
def logits_by_steps(model: NxDModel, prompts: list[list[int]], new: list[list[int]]) -> list[Tensor]:
    """Each prompt's logits [P+M-1,V], with its M new ids fed back. A prompt of 7 tokens is padded to 8."""
    ids = torch.tensor([prompt + [0] * (8 - len(prompt)) for prompt in prompts], dtype=torch.int32)
    positions = torch.arange(8, dtype=torch.int32).expand_as(ids).contiguous()
    last = torch.zeros(len(prompts), dtype=torch.int32)
    steps = [model(ids, positions, last)]
    lengths = torch.tensor([[len(prompt)] for prompt in prompts], dtype=torch.int32)
    for number in range(len(new[0]) - 1):
        tokens = torch.tensor([[answer[number]] for answer in new], dtype=torch.int32)
        steps.append(model(tokens, lengths + number, last))
    rows = zip(prompts, *steps, strict=True)
    return [torch.cat((first[: len(prompt)], *rest)) for prompt, first, *rest in rows]


@traced
@with_cores
@pytest.mark.parametrize("family", helpers.FAMILIES)
@pytest.mark.parametrize("batch", [1, 2, 3])
@pytest.mark.parametrize("tp", [1, 2, 4, 8])
def test_model_builder_makes_hfs_ids(tp: int, batch: int, family: str, hf_checkpoint: Callable, tmp_path: Path) -> None:
    hf, ckpt, prompts = one_layer(hf_checkpoint(family)), tmp_path / "weights", PROMPTS[:batch]
    convert(hf, ckpt, tp_degree=tp, sequence_length=LENGTH, prefill_chunk_size=4, vocab_parallel=batch == 2)
    model = load_nxd(ckpt, batch_size=batch, backend=backend_for("nxd"))
    assert isinstance(model, NxDModel)
    assert model.get_available_keys() == {"decode", "prefill_4"}
    oracle = hf_model(hf, torch.float32)
    assert generate(model, prompts, NEW, []) == [hf_greedy(oracle, prompt, NEW)[1] for prompt in prompts]


@traced
@with_cores
@pytest.mark.parametrize("family", helpers.FAMILIES)
@pytest.mark.parametrize("tp", [1, 2, 3, 4, 6, 8])
def test_model_builder_makes_hfs_logits_in_a_batch(
    tp: int, family: str, hf_checkpoint: Callable, tmp_path: Path
) -> None:
    hf, ckpt = one_layer(hf_checkpoint(family)), tmp_path / "weights"
    convert(hf, ckpt, tp_degree=tp, batch_size=3, sequence_length=LENGTH, prefill_chunk_size=8)
    oracle = hf_model(hf, torch.float32)
    expected, ids = zip(*(hf_greedy(oracle, prompt, NEW) for prompt in PROMPTS), strict=True)
    model = load_nxd(ckpt, backend=backend_for("nxd"), model_class=Logits)
    logits = logits_by_steps(model, PROMPTS, ids)
    worst = max(float((a - b).abs().max() / b.abs().max()) for a, b in zip(logits, expected, strict=True))
    print(f"off by {worst:.1e} of the largest logit")
    assert worst <= 4e-6


@traced
@with_cores
@pytest.mark.parametrize("tp", [1, 2])
@pytest.mark.parametrize("attn", ["sdpa", "flash"])
def test_other_forms_of_attention_and_chunks_are_traced_too(
    attn: str, tp: int, hf_checkpoint: Callable, tmp_path: Path
) -> None:
    hf, ckpt = one_layer(hf_checkpoint("odd sizes")), tmp_path / "weights"
    convert(hf, ckpt, tp_degree=tp, batch_size=3, sequence_length=1100, prefill_chunk_size=4)
    oracle = hf_model(hf, torch.float32)
    model = load_nxd(ckpt, backend=backend_for("nxd", attn))
    assert generate(model, PROMPTS, NEW, []) == [hf_greedy(oracle, prompt, NEW)[1] for prompt in PROMPTS]


@traced
def test_what_was_compiled_is_used_again_until_something_else_is_asked_for(
    hf_checkpoint: Callable, converted: Callable, code: Path
) -> None:
    ckpt = converted("odd sizes", sequence_length=LENGTH, prefill_chunk_size=4)
    _, ids = hf_greedy(hf_model(hf_checkpoint("odd sizes"), torch.float32), PROMPT, NEW)
    model = load_nxd(ckpt, backend=backend_for("nxd"))
    assert model.get_available_keys() == {"decode", "prefill_4"}
    first = kept(code)
    assert len(first) == 1
    model = load_nxd(ckpt, backend=backend_for("nxd"))
    assert kept(code) == first
    assert generate(model, [PROMPT], NEW, []) == [ids]
    load_nxd(ckpt, backend=backend_for("nxd", "sdpa"))
    load_nxd(ckpt, batch_size=2, backend=backend_for("nxd"))
    assert len(kept(code)) == 3
    assert first.items() <= kept(code).items()


@traced
@with_cores
def test_the_command_runs_it_and_keeps_stdout_for_the_result(hf_checkpoint: Callable, converted: Callable) -> None:
    ckpt = converted("odd sizes", 2, sequence_length=LENGTH)
    oracle = hf_model(hf_checkpoint("odd sizes"), torch.float32)
    flags = ["--ckpt", ckpt, "--max-new-tokens", NEW, "--json"]
    for prompt in PROMPTS:
        flags += ["--prompt-ids", ",".join(map(str, prompt))]
    result = command("llama_neuron.py", *flags)
    assert result.returncode == 0, result.stderr
    answer = json.loads(result.stdout)
    expected = [hf_greedy(oracle, prompt, NEW)[1] for prompt in PROMPTS]
    assert [completion["ids"] for completion in answer["completions"]] == expected
    assert answer["config"]["device"] == "nxd"


@traced
@with_cores
@pytest.mark.slow
def test_two_families_are_right_under_the_other_value_too() -> None:
    other = str(1 - int(os.environ["XLA_DISABLE_FUNCTIONALIZATION"]))
    chosen = "model_builder and (smollm2 or odd)"
    result = command("-m", "pytest", __file__, "-q", "-k", chosen, XLA_DISABLE_FUNCTIONALIZATION=other)
    assert result.returncode == 0, result.stdout

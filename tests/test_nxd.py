"""The model on `neuronx_distributed` itself: its layers, its checkpoint sharding, its ModelBuilder.

Skipped where that is not installed. The layers are compared over gloo, which NxD takes with NXD_CPU_MODE=1 in the
environment; the ModelBuilder needs torch_xla and NXD_CPU_MODE unset or 0, and more than one rank needs NeuronCores.
"""

import json
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

pytest.importorskip("neuronx_distributed")

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from neuronx_distributed import NxDModel, NxDParallelState, shard_checkpoint
from neuronx_distributed.parallel_layers import parallel_state
from safetensors.torch import load_file, save_file
from torch import Tensor

import llama_neuron
from convert_weights import convert, expected_shapes
from llama_neuron import (
    LlamaConfig,
    LlamaForCausalLM,
    NeuronConfig,
    UsageError,
    compile_nxd,
    greedy_steps,
    load_model,
    read_state,
    shard_path,
)

over_gloo = pytest.mark.skipif(
    os.environ.get("NXD_CPU_MODE") != "1", reason="NxD's layers run over gloo in its CPU mode"
)
traced = pytest.mark.skipif(
    os.environ.get("NXD_CPU_MODE") == "1", reason="NxD mocks its process group only outside of CPU mode"
)

TINY = {"vocab_size": 96, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 8}
TINY |= {"num_key_value_heads": 8, "max_position_embeddings": 128}
MODELS: dict[str, dict] = {
    "mha": {},
    "tied": {"num_key_value_heads": 4, "tie_word_embeddings": True},
    "padded heads": {"num_attention_heads": 6, "num_key_value_heads": 2, "hidden_size": 48, "head_dim": 16},
    "9/3 heads": {"num_attention_heads": 9, "num_key_value_heads": 3, "hidden_size": 72, "tie_word_embeddings": True},
    "odd sizes": {"num_key_value_heads": 2, "vocab_size": 67, "intermediate_size": 91},
    "biases": {"num_key_value_heads": 1, "attention_bias": True, "mlp_bias": True, "intermediate_size": 91},
}
PROMPT, LENGTH, NEW = [5, 11, 2, 60, 33, 47, 3], 32, 10


@pytest.fixture(params=MODELS)
def hf(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """A random float32 HF checkpoint."""
    folder = tmp_path / "hf"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(TINY | MODELS[request.param]))
    torch.manual_seed(1)
    shapes = expected_shapes(LlamaConfig.from_pretrained(folder))
    weights = {name: torch.randn(shape) * 0.2 + float(name.endswith("norm.weight")) for name, shape in shapes.items()}
    save_file(weights, folder / "model.safetensors")
    return folder


def converted(hf: Path, tp: int, vocab_parallel: bool, **settings: object) -> tuple[Path, LlamaConfig, NeuronConfig]:
    config, out = LlamaConfig.from_pretrained(hf), hf.with_name(f"tp{tp}")
    flags = {"tp_degree": tp, "sequence_length": LENGTH, "vocab_parallel": vocab_parallel}
    convert(hf, out, config, NeuronConfig.for_checkpoint(hf, config, **flags))
    file = out / "neuron_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | settings))
    return out, config, NeuronConfig.for_checkpoint(out, config)


def expected(hf: Path) -> tuple[list[int], Tensor]:
    """The oracle, compared with HF elsewhere: the reference layers on one rank."""
    logits: list[Tensor] = []
    ids = [token for (token,) in greedy_steps(load_model(hf, sequence_length=LENGTH), [PROMPT], NEW, (), logits)]
    return ids, torch.cat([rows[0] for rows in logits])


# -------------------------------------------------------------------------------------------------------------- layers


def nxd_rank(rank: int, tp: int, folder: Path, hf: Path, vocab_parallel: bool) -> None:
    """A rank over gloo: hidden states, logits and choices of NxD's layers, beside those of the reference."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=tp)
    parallel_state.initialize_model_parallel(tensor_model_parallel_size=tp)
    out = hf.with_name(f"tp{tp}")
    config = LlamaConfig.from_pretrained(out)
    neuron = NeuronConfig.for_checkpoint(out, config)
    reference = load_model(out, tp_degree=tp, tp_rank=rank)
    model = LlamaForCausalLM(config, neuron, backend="nxd").eval()
    model.load_state_dict(dict(model.named_buffers()) | dict(read_state(out, config, neuron, rank)), assign=True)
    assert type(model.lm_head).__module__.startswith("neuronx_distributed")
    ids = torch.tensor([PROMPT], dtype=torch.int32)
    positions, last = torch.arange(len(PROMPT), dtype=torch.int32)[None], torch.tensor([len(PROMPT) - 1]).int()
    with torch.no_grad():
        results = [(m.model(ids, positions), m(ids, positions), m(ids, positions, last)) for m in (model, reference)]
    torch.save(results, folder / f"rank{rank}.pt")
    dist.destroy_process_group()


@over_gloo
@pytest.mark.parametrize("vocab_parallel", [False, True], ids=["hidden", "vocabulary"])
@pytest.mark.parametrize("tp", [1, 2, 4])
def test_the_reference_layers_compute_what_nxds_do(tp: int, vocab_parallel: bool, hf: Path) -> None:
    converted(hf, tp, vocab_parallel)
    with tempfile.TemporaryDirectory() as folder:
        mp.start_processes(nxd_rank, (tp, Path(folder), hf, vocab_parallel), nprocs=tp, start_method="fork")
        ranks = [torch.load(Path(folder) / f"rank{rank}.pt") for rank in range(tp)]
    for theirs, ours in ranks:
        for a, b in zip(theirs, ours, strict=True):
            assert a.dtype == b.dtype
            torch.testing.assert_close(b, a, rtol=0, atol=2e-6 * float(a.abs().max()))


# ------------------------------------------------------------------------------------------------ checkpoint sharding


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
        zeros = grouped.new_zeros(groups, (-(-len(heads) // tp) * tp - len(heads)) // groups, *grouped.shape[2:])
        return torch.cat((grouped, zeros), dim=1).flatten(0, 1)

    def query(tensor: Tensor) -> Tensor:
        return pad(tensor.unflatten(0, (H, D)), K if tp % K == 0 else 1)

    def key(tensor: Tensor) -> Tensor:
        heads = tensor.unflatten(0, (K, D))
        if tp % K == 0:
            return heads.repeat_interleave(tp // K, dim=0)
        return pad(heads.repeat_interleave(H // K, dim=0), 1) if K % tp else heads

    for prefix in [name.removesuffix("q_proj.weight") for name in state if name.endswith("q_proj.weight")]:
        for kind in ["weight"] + ["bias"] * config.attention_bias:
            q, k, v = (state.pop(f"{prefix}{name}_proj.{kind}") for name in "qkv")
            q, k, v = query(q), key(k), key(v)
            state[f"{prefix}Wqkv.{kind}"] = torch.cat((q, k, v)).flatten(0, 1)
        columns = state[f"{prefix}o_proj.weight"].T
        state[f"{prefix}o_proj.weight"] = query(columns).flatten(0, 1).T.contiguous()
    return state, len(q), len(k)


@traced
@pytest.mark.parametrize("vocab_parallel", [False, True], ids=["hidden", "vocabulary"])
@pytest.mark.parametrize("tp", [1, 2, 4, 8])
def test_nxd_shards_this_model_as_the_converter_does(tp: int, vocab_parallel: bool, hf: Path) -> None:
    out, config, neuron = converted(hf, tp, vocab_parallel)
    state, query_heads, kv_heads = whole_checkpoint(hf, config, tp)
    ranks = torch.arange(tp, dtype=torch.int32)
    state |= {"rank_util.rank": ranks, "model.embed_tokens.rank_util.rank": ranks.clone()}
    with NxDParallelState(world_size=tp, tensor_model_parallel_size=tp):
        model = LlamaForCausalLM(config, neuron, backend="nxd").eval()
        for layer in model.model.layers:
            for parameter in layer.self_attn.Wqkv.parameters():  # how NxDI tells NxD that q, k and v are in one
                parameter.fused_qkv, parameter.head_dim = True, config.head_dim
                parameter.num_attention_heads, parameter.num_key_value_heads = query_heads, kv_heads
        shards = shard_checkpoint(state, model)
    for rank, theirs in enumerate(shards):
        ours = dict(read_state(out, config, neuron, rank))
        assert ours.keys() == theirs.keys() == dict(model.named_parameters()).keys()
        for name, tensor in theirs.items():
            assert ours[name].dtype == tensor.dtype and torch.equal(ours[name], tensor), name
        assert load_file(shard_path(out, rank)).keys() <= ours.keys()


# -------------------------------------------------------------------------------------------------------- ModelBuilder


@pytest.fixture
def compilations(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[tuple[str, str]]]:
    """(tag, flags) of all that is compiled."""
    from neuronx_distributed.trace import model_builder_v2

    seen, compile = [], model_builder_v2.compile

    def spy(hlo, metaneff, workdir, flags, key):
        seen.append((key, flags))
        return compile(hlo, metaneff, workdir, flags, key)

    monkeypatch.setattr(model_builder_v2, "compile", spy)
    yield seen


def tensor_parallel(tp: int) -> object:
    return pytest.param(tp, marks=pytest.mark.skipif(not Path("/dev/neuron0").exists(), reason="needs NeuronCores"))


@traced
@pytest.mark.parametrize("vocab_parallel", [False, True], ids=["hidden", "vocabulary"])
@pytest.mark.parametrize("tp", [1, tensor_parallel(2), tensor_parallel(8)])
def test_model_builder_makes_the_ids_and_logits_of_the_reference(
    tp: int, vocab_parallel: bool, hf: Path, compilations: list
) -> None:
    out, config, neuron = converted(hf, tp, vocab_parallel, context_encoding_buckets=[8, 16])
    ids, logits = expected(hf)
    got: list[Tensor] = []
    model = compile_nxd(out, config, neuron, "eager", output_logits=True)
    assert isinstance(model, NxDModel)
    assert [token for (token,) in greedy_steps(model, [PROMPT], NEW, (), got)] == ids
    ours = torch.cat([rows[0] for rows in (got[0][:, : len(PROMPT)], *got[1:])])
    torch.testing.assert_close(ours, logits, rtol=0, atol=4e-6 * float(logits.abs().max()))
    model = compile_nxd(out, config, neuron, "eager", output_logits=False)
    assert [token for (token,) in greedy_steps(model, [PROMPT], NEW, ())] == ids
    tags, flags = zip(*compilations, strict=True)
    assert sorted(tags) == sorted(["decode", "prefill_8", "prefill_16"] * 2)
    assert all(flag.startswith("--auto-cast=none --model-type=transformer --lnc=") for flag in flags)


@traced
@pytest.mark.parametrize("hf", ["odd sizes"], indirect=True)
def test_what_was_compiled_is_used_again_until_something_else_is_asked_for(hf: Path, compilations: list) -> None:
    out, config, neuron = converted(hf, 1, False, prefill_chunk_size=4)
    ids, _ = expected(hf)
    for _ in range(2):
        model = compile_nxd(out, config, neuron, "eager", output_logits=False)
        assert [token for (token,) in greedy_steps(model, [PROMPT], NEW, ())] == ids
        assert sorted(tag for tag, _ in compilations) == ["decode", "prefill_4"]
    compile_nxd(out, config, neuron, "sdpa", output_logits=False)
    assert len(compilations) == 4
    names = [path.name.rpartition("-")[0] for path in out.glob("*.pt")]
    assert names == [f"nxd-tp1-b1-s{LENGTH}-p4-ids"] * 2


@traced
@pytest.mark.parametrize("hf", ["odd sizes"], indirect=True)
def test_the_command_runs_it_and_keeps_stdout_for_the_result(hf: Path, monkeypatch, capfd) -> None:
    out, _, _ = converted(hf, 1, False)
    ids, _ = expected(hf)
    prompt = ",".join(map(str, PROMPT))
    command = ["llama_neuron.py", "--ckpt", str(out), "--prompt-ids", prompt, "--max-new-tokens", str(NEW), "--json"]
    monkeypatch.setattr("sys.argv", command)
    llama_neuron.main()
    answer = json.loads(capfd.readouterr().out)
    assert answer["completions"][0]["ids"] == ids
    assert (answer["config"]["backend"], answer["config"]["device"]) == ("nxd", "neuron")
    monkeypatch.setattr("sys.argv", [*command, "--ckpt", str(hf)])
    with pytest.raises(UsageError, match=r"--backend nxd needs shards: convert .* with convert_weights.py"):
        llama_neuron.main()

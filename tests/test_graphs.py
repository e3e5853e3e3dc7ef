"""The graphs that a Neuron compiler would be given: which ops, how many graphs, and one graph for all ranks.

Nothing here needs Neuron packages. A graph is exported under torch's `fake` process group as rank 0 of two, as it is
traced for Neuron, and then executed for both ranks side by side, with collectives computed over the two.
"""

import json
import os
import sys
import tempfile
import time
from argparse import Namespace
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from safetensors.torch import save_file
from torch import Tensor
from torch.testing._internal.distributed.fake_pg import FakeStore

import llama_neuron
from convert_weights import convert, expected_shapes
from llama_neuron import (
    KVCache,
    LlamaConfig,
    LlamaForCausalLM,
    NeuronConfig,
    UsageError,
    choose_backend,
    generate,
    greedy_steps,
    load_model,
    read_state,
)

# Odd sizes: vocabulary and intermediate features are padded at tp 2, and 3 KV heads are turned into 6.
TINY = {"model_type": "llama", "vocab_size": 67, "hidden_size": 48, "intermediate_size": 91, "num_hidden_layers": 2}
TINY |= {"num_attention_heads": 6, "num_key_value_heads": 3, "max_position_embeddings": 128}
PROMPT, LENGTH = [5, 11, 2, 60, 33, 47, 3], 96

# What prefill and decode are made of, once exported. An op that is not here has not been looked at: before it is added,
# see that neuronx-cc compiles it, and that it is none of those that torch-xla or TorchNeuron hand back to the host.
OPS = {
    *("aten.embedding", "aten.mm", "aten.bmm", "aten.sigmoid", "aten._softmax", "aten.rsqrt", "aten.cos", "aten.sin"),
    *("aten.add.Tensor", "aten.mul.Tensor", "aten.neg", "aten.pow.Tensor_Scalar", "aten.mean.dim"),
    *("aten.view", "aten.expand", "aten.permute", "aten.unsqueeze", "aten.squeeze.dims", "aten.alias"),
    *("aten.cat", "aten.slice.Tensor", "aten.split_with_sizes", "aten.clone", "aten._to_copy"),
    *("aten.arange.start_step", "aten.full_like", "aten.scalar_tensor"),
    *("aten.le.Tensor", "aten.lt.Tensor", "aten.where.self"),
    *("aten.scatter.src", "aten.gather", "aten.max.dim", "aten.argmax"),
}
SHARDED_OPS = OPS | {
    *(
        "aten.sub.Tensor",
        "aten.ge.Scalar",
        "aten.lt.Scalar",
        "aten.bitwise_and.Tensor",
    ),  # which rows of the vocabulary a rank has
    *("_c10d_functional.all_reduce", "_c10d_functional.all_gather_into_tensor", "_c10d_functional.wait_tensor"),
}
INT64_OPS = {"aten._to_copy", "aten.max.dim", "aten.argmax"}  # indices, made and used as such


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random HF checkpoint, and its conversions `tp2` and `tp2v` (embedding sharded by vocabulary)."""
    folder = tmp_path_factory.mktemp("hf")
    (folder / "config.json").write_text(json.dumps(TINY))
    config = LlamaConfig.from_pretrained(folder)
    torch.manual_seed(1)
    shapes = expected_shapes(config)
    weights = {name: torch.randn(shape) * 0.2 + float(name.endswith("norm.weight")) for name, shape in shapes.items()}
    save_file(weights, folder / "model.safetensors")
    for name, vocab_parallel in (("tp2", False), ("tp2v", True)):
        flags = {"tp_degree": 2, "sequence_length": LENGTH, "vocab_parallel": vocab_parallel}
        convert(folder, folder / name, config, NeuronConfig.for_checkpoint(folder, config, **flags))
    return folder


@pytest.fixture
def as_rank_0_of_2():
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=2)
    yield
    dist.destroy_process_group()


def inputs(tokens: list[int], start: int = 0) -> tuple[Tensor, Tensor]:
    ids = torch.tensor([tokens], dtype=torch.int32)
    return ids, torch.arange(start, start + len(tokens), dtype=torch.int32)[None]


def export(model: LlamaForCausalLM, tokens: int, choose: bool) -> torch.export.ExportedProgram:
    """As on a Neuron device, but with the caches written in place: strict export drops a re-assigned buffer."""
    last = (torch.zeros(1, dtype=torch.int32),) * choose

    def update(cache: KVCache, k: Tensor, v: Tensor, position_ids: Tensor, length: int) -> tuple[Tensor, Tensor]:
        index = position_ids[:, None, :, None].expand_as(k).long()
        return cache.k.scatter_(2, index, k)[:, :, :length], cache.v.scatter_(2, index, v)[:, :, :length]

    with torch.no_grad(), pytest.MonkeyPatch.context() as patch:
        patch.setattr(llama_neuron, "HOST", ())
        patch.setattr(KVCache, "update", update)
        return torch.export.export(model, (*inputs([0] * tokens), *last), strict=True).run_decompositions()


def calls(program: torch.export.ExportedProgram) -> list[torch.fx.Node]:
    return [node for node in program.graph.nodes if node.op == "call_function"]


def op_name(node: torch.fx.Node) -> str:
    return str(node.target).removesuffix(".default")


def ops(program: torch.export.ExportedProgram) -> dict[str, set[torch.dtype]]:
    """The ops of a graph that compute something, with the dtypes of what comes out; only the caches may be written."""
    found: dict[str, set[torch.dtype]] = {}
    for node in calls(program):
        if isinstance(node.target, torch._ops.OpOverload) and "val" in node.meta:
            values = torch.utils._pytree.tree_leaves(node.meta["val"])
            found.setdefault(op_name(node), set()).update(value.dtype for value in values)
    caches = {f"model.layers.{layer}.self_attn.kv_cache.{name}" for layer in range(2) for name in "kv"}
    assert set(program.graph_signature.buffers_to_mutate.values()) == caches
    wide = {op for op, dtypes in found.items() if dtypes & {torch.int64, torch.float64}}
    assert wide <= INT64_OPS, f"ops that compute in 64 bits: {sorted(wide - INT64_OPS)}"
    return found


def test_export_is_strict_and_made_of_known_ops(checkpoint: Path) -> None:
    model = load_model(checkpoint, sequence_length=LENGTH)
    found = {op for tokens in (8, 1) for choose in (False, True) for op in ops(export(model, tokens, choose))}
    assert not found - OPS, f"ops that no one has looked at, see OPS: {sorted(found - OPS)}"
    assert not OPS - found, f"ops that are not used any more, take them out of OPS: {sorted(OPS - found)}"


def run_on_all_ranks(
    program: torch.export.ExportedProgram, states: list[dict[str, Tensor]], arguments: tuple[Tensor, ...]
) -> list[Tensor]:
    """One graph, executed node by node for every rank on its own `states`, which it updates; the ranks' outputs."""
    signature, ranks, given = program.graph_signature, range(len(states)), iter(arguments)
    env: dict[torch.fx.Node, list] = {}
    for node, spec in zip(program.graph.find_nodes(op="placeholder"), signature.input_specs, strict=True):
        constant = program.constants.get(spec.target)
        argument = next(given) if spec.target is None else constant
        env[node] = [argument if argument is not None else state[spec.target] for state in states]
    for node in calls(program):
        args = [torch.fx.node.map_arg((node.args, node.kwargs), lambda arg, r=r: env[arg][r]) for r in ranks]
        name = op_name(node)
        if name == "_c10d_functional.all_reduce":
            env[node] = [sum(args[r][0][0] for r in ranks)] * len(states)
        elif name == "_c10d_functional.all_gather_into_tensor":
            env[node] = [torch.cat([args[r][0][0] for r in ranks])] * len(states)
        elif name == "_c10d_functional.wait_tensor":
            env[node] = [args[r][0][0] for r in ranks]
        else:
            env[node] = [node.target(*args[r][0], **args[r][1]) for r in ranks]
    outputs = dict(
        zip([spec.arg.name for spec in signature.output_specs], program.graph.output_node().args[0], strict=True)
    )
    for name, buffer in signature.buffers_to_mutate.items():
        for r in ranks:
            states[r][buffer] = env[outputs[name]][r]
    return env[outputs[signature.user_outputs[0]]]


@pytest.mark.parametrize("weights", ["tp2", "tp2v"])
def test_one_graph_traced_as_rank_0_serves_both_ranks(weights: str, checkpoint: Path, as_rank_0_of_2) -> None:
    config = LlamaConfig.from_pretrained(checkpoint)
    neuron = NeuronConfig.for_checkpoint(checkpoint / weights, config)
    model = load_model(checkpoint / weights, tp_degree=2, tp_rank=0)
    graphs = {(tokens, choose): export(model, tokens, choose) for tokens in (8, 1) for choose in (False, True)}
    new = {op for program in graphs.values() for op in ops(program)} - SHARDED_OPS
    assert not new, f"ops that no one has looked at, see SHARDED_OPS: {sorted(new)}"

    def serve(ranks: list[int]) -> tuple[list[int], Tensor]:
        """Ids and logits of PROMPT and 12 tokens; `ranks` is what each shard says that its rank is."""
        buffers = dict(model.named_buffers())
        states = [{**buffers, **dict(read_state(checkpoint / weights, config, neuron, shard))} for shard in (0, 1)]
        for state, rank in zip(states, ranks, strict=True):
            state |= {
                name: torch.tensor([rank], dtype=torch.int32) for name in state if name.endswith("rank_util.rank")
            }
        both = [[dict(state) for state in states] for _ in range(2)]  # caches of the logits' and of the ids' graphs
        ids, logits, tokens, start, last = [], [], [*PROMPT, 0], 0, len(PROMPT) - 1
        for _ in range(12):
            arguments, length = inputs(tokens, start), len(tokens)
            rows = run_on_all_ranks(graphs[length, False], both[0], arguments)
            assert torch.equal(rows[0], rows[1])
            logits.append(rows[1][0, : last + 1])
            chosen = run_on_all_ranks(graphs[length, True], both[1], (*arguments, torch.tensor([last]).int()))
            assert torch.equal(chosen[0], chosen[1])
            ids.append(int(chosen[1]))
            tokens, start, last = ids[-1:], len(PROMPT) + len(ids) - 1, 0
        return ids, torch.cat(logits)

    ids, logits = serve([0, 1])
    expected_ids, expected = on_one_rank(checkpoint, 12)
    assert ids == expected_ids
    torch.testing.assert_close(logits, expected, rtol=0, atol=2e-6 * float(expected.abs().max()))
    # and the rank was read from the shard: where both say that they are rank 0, what comes out is wrong
    assert serve([0, 0])[0] != expected_ids


def on_one_rank(checkpoint: Path, new_tokens: int) -> tuple[list[int], Tensor]:
    """The oracle: eager, on one rank, without a process group. Compared with HF elsewhere."""
    sizes, llama_neuron.get_tensor_model_parallel_size = llama_neuron.get_tensor_model_parallel_size, lambda: 1
    try:
        logits: list[Tensor] = []
        model = load_model(checkpoint, sequence_length=LENGTH)
        ids = [token for (token,) in greedy_steps(model, [PROMPT], new_tokens, (), logits)]
    finally:
        llama_neuron.get_tensor_model_parallel_size = sizes
    return ids, torch.cat([rows[0] for rows in logits])


# ------------------------------------------------------------------------------------------------------- torch.compile


def compiled_rank(rank: int, folder: Path, checkpoint: Path) -> None:
    """One of two ranks over gloo: two prompts of 64 tokens each, with a backend that counts the graphs it is given."""
    from torch._dynamo.backends.common import aot_autograd

    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    llama_neuron.HOST = ()  # as on a Neuron device
    graphs: list[torch.fx.GraphModule] = []

    def count(graph: torch.fx.GraphModule, example_inputs: list) -> Callable:
        graphs.append(graph)
        return graph.forward

    model = load_model(checkpoint / "tp2", tp_degree=2, tp_rank=rank)
    model.neuron_config = model.neuron_config.with_buckets()
    model.compile(backend=aot_autograd(fw_compiler=count), fullgraph=True, dynamic=False)
    ids = [generate(model, [prompt], 64, ()) for prompt in (PROMPT, PROMPT[:3])]
    (folder / f"rank{rank}.json").write_text(json.dumps({"graphs": len(graphs), "ids": ids}))
    while len(list(folder.glob("rank*.json"))) < 2:  # neither leaves while the other may still be in a collective
        time.sleep(0.01)
    os._exit(0)  # in about one of forty runs torch aborts while an interpreter that compiled over gloo is torn down


def test_compiled_at_tp_2_there_are_two_graphs_and_64_tokens_compile_no_other(checkpoint: Path) -> None:
    with tempfile.TemporaryDirectory() as folder:
        mp.start_processes(compiled_rank, (Path(folder), checkpoint), nprocs=2, start_method="spawn")
        ranks = [json.loads((Path(folder) / f"rank{rank}.json").read_text()) for rank in range(2)]
    model = load_model(checkpoint, sequence_length=LENGTH)
    expected = [generate(model, [prompt], 64, ()) for prompt in (PROMPT, PROMPT[:3])]
    assert ranks == [{"graphs": 2, "ids": expected}] * 2


# ---------------------------------------------------------------------------------------------- prefill: bucket, chunks


class Counted:
    """A model that keeps the shapes it was called with."""

    def __init__(self, model: LlamaForCausalLM) -> None:
        self.inner, self.shapes = model, []

    def __getattr__(self, name: str) -> object:
        return getattr(self.__dict__["inner"], name)

    def __call__(self, *arguments: Tensor, **slots: Tensor) -> Tensor:
        self.shapes.append(arguments[0].shape[1])
        return self.inner(*arguments, **slots)


@pytest.mark.parametrize("with_logits", [False, True], ids=["ids", "logits"])
@pytest.mark.parametrize(
    "settings, prefill",
    [
        ({"context_encoding_buckets": [32, 8, 16]}, [8]),
        ({"context_encoding_buckets": [4, 16]}, [16]),
        ({"context_encoding_buckets": [128]}, [128]),  # more than the cache has
        ({"prefill_chunk_size": 3}, [3, 3, 3]),
        ({"prefill_chunk_size": 7}, [7]),
        ({"prefill_chunk_size": 4, "context_encoding_buckets": [16]}, [4, 4]),
    ],
)
def test_a_prompt_takes_the_smallest_bucket_or_chunks_and_gives_the_same(
    settings: dict, prefill: list[int], with_logits: bool, checkpoint: Path, tmp_path: Path
) -> None:
    prompts = [PROMPT, [7, 1]]
    expected_logits: list[Tensor] = []
    plain = load_model(checkpoint, sequence_length=LENGTH, batch_size=2)
    expected = list(greedy_steps(plain, prompts, 6, (), expected_logits))
    for file in checkpoint.glob("*.*"):
        (tmp_path / file.name).symlink_to(file)
    convert(tmp_path, tmp_path / "w", plain.config, plain.neuron_config)
    file = tmp_path / "w" / "neuron_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | settings))
    model = Counted(load_model(tmp_path / "w", batch_size=2))
    logits: list[Tensor] = []
    assert list(greedy_steps(model, prompts, 6, (), logits if with_logits else None)) == expected
    assert model.shapes == prefill + [1] * 5
    if with_logits:
        for row, prompt in enumerate(prompts):
            ours, theirs = logits[0][row, : len(prompt)], expected_logits[0][row, : len(prompt)]
            torch.testing.assert_close(ours, theirs, rtol=0, atol=2e-6 * float(theirs.abs().max()))


def test_buckets_are_powers_of_two_up_to_the_cache() -> None:
    assert NeuronConfig(sequence_length=1000).with_buckets().context_encoding_buckets == (128, 256, 512, 1000)
    assert NeuronConfig(sequence_length=512).with_buckets().context_encoding_buckets == (128, 256, 512)
    assert NeuronConfig(sequence_length=96).with_buckets().context_encoding_buckets == (96,)
    given = NeuronConfig(sequence_length=512, context_encoding_buckets=(64,))
    assert given.with_buckets() == given


@pytest.mark.parametrize("buckets", ["16", [0], [1.5], [True], 16])
def test_buckets_that_are_no_list_of_lengths_are_refused(buckets: object, checkpoint: Path, tmp_path: Path) -> None:
    config = LlamaConfig.from_pretrained(checkpoint)
    (tmp_path / "neuron_config.json").write_text(json.dumps({"context_encoding_buckets": buckets}))
    with pytest.raises(UsageError, match=r"neuron_config\.json: context_encoding_buckets must be"):
        NeuronConfig.for_checkpoint(tmp_path, config)


def test_a_prompt_beyond_the_buckets_is_refused(checkpoint: Path, tmp_path: Path) -> None:
    config = LlamaConfig.from_pretrained(checkpoint)
    (tmp_path / "neuron_config.json").write_text(json.dumps({"context_encoding_buckets": [8], "sequence_length": 64}))
    neuron = NeuronConfig.for_checkpoint(tmp_path, config)
    llama_neuron.check_prompts([[1] * 8], config, neuron)
    with pytest.raises(UsageError, match=r"prompt 1 has 9 tokens, .*end at 8: add one to neuron_config.json, or set"):
        llama_neuron.check_prompts([[1] * 9], config, neuron)


# ------------------------------------------------------------------------------------------------------ what is picked

STACKS = {
    "nothing": (),
    "torch-xla": ("torch_xla",),
    "NxD": ("torch_xla", "torch_neuronx", "neuronx_distributed"),
    "TorchNeuron": ("torch_neuronx",),
    "placeholders": ("neuronx_distributed",),
}


@pytest.mark.parametrize(
    "stack, backend, device, picked",
    [
        ("nothing", "auto", None, ("torch", "cpu", "neither neuronx_distributed nor TorchNeuron is installed")),
        ("nothing", "torch", None, ("torch", "cpu", None)),
        ("torch-xla", "auto", None, ("torch", "cpu", "neither neuronx_distributed nor TorchNeuron is installed")),
        ("placeholders", "auto", None, ("torch", "cpu", "neither neuronx_distributed nor TorchNeuron is installed")),
        ("NxD", "auto", None, ("nxd", "neuron", "neuronx_distributed is installed")),
        ("NxD", "auto", "neuron", ("nxd", "neuron", "neuronx_distributed is installed")),
        ("NxD", "nxd", None, ("nxd", "neuron", None)),
        ("NxD", "torch", None, ("torch", "cpu", None)),
        ("NxD", "auto", "cpu", ("torch", "cpu", "as asked")),
        (
            "TorchNeuron",
            "auto",
            None,
            ("torch", "neuron", "TorchNeuron is installed (torch_neuronx without torch_xla)"),
        ),
        ("TorchNeuron", "torch", None, ("torch", "neuron", None)),
        ("TorchNeuron", "torch", "cpu", ("torch", "cpu", None)),
        ("nothing", "auto", "neuron", "neither neuronx_distributed nor TorchNeuron is installed: see `On Neuron`"),
        ("nothing", "nxd", None, "neither neuronx_distributed nor TorchNeuron is installed: see `On Neuron`"),
        ("TorchNeuron", "nxd", None, "--backend nxd on a Neuron device is not to be had here"),
        ("NxD", "torch", "neuron", "--backend torch on a Neuron device is not to be had here"),
        ("NxD", "nxd", "cpu", "leave out --device cpu"),
    ],
)
def test_the_backend_is_picked_by_what_is_installed(stack, backend, device, picked, monkeypatch) -> None:
    monkeypatch.setattr(llama_neuron, "find_spec", lambda name: name in STACKS[stack] or None)
    args = Namespace(backend=backend, device=device)
    if isinstance(picked, str):
        with pytest.raises(UsageError, match=picked):
            choose_backend(args)
    else:
        choose_backend(args)
        assert (args.backend, args.device, args.why) == picked


def test_a_package_that_only_has_nxds_name_is_refused(checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "neuronx_distributed", ModuleType("neuronx_distributed"))
    monkeypatch.setitem(sys.modules, "torch_neuronx", ModuleType("torch_neuronx"))
    config = LlamaConfig.from_pretrained(checkpoint)
    with pytest.raises(
        UsageError, match=r"--backend nxd: cannot import name 'ModelBuilder'.*see `On Neuron` in README"
    ):
        llama_neuron.compile_nxd(str(checkpoint), config, NeuronConfig(), "eager", False)

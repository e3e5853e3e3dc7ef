"""The graphs that a Neuron compiler would be given: which ops, how many graphs, and one graph for all ranks.

Nothing here needs Neuron packages. A graph is exported under torch's `fake` process group as rank 0 of two, as it is
traced for Neuron, and then executed for both ranks side by side, with collectives computed over the two. The oracle is
Hugging Face's own Llama.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.export import ExportedProgram
from torch.testing._internal.distributed.fake_pg import FakeStore

from llama_neuron import (
    LlamaConfig,
    LlamaForCausalLM,
    NeuronConfig,
    UsageError,
    backend_for,
    choose_device,
    generate,
    load_model,
    read_shard,
)
from tests.helpers import command, hf_greedy, hf_model

FAMILY = "odd sizes"  # at tp 2 vocabulary and intermediate features are padded, and 3 KV heads become 6
PROMPT, LENGTH = [5, 11, 2, 60, 33, 47, 3], 96

# ---- ops
#
# What prefill and decode are made of, once exported. An op that is not here has not been looked at: before it is added,
# see that neuronx-cc compiles it, and that it is none of those that torch-xla or TorchNeuron hand back to the host.

OPS = {
    *("aten.embedding", "aten.mm", "aten.addmm", "aten.bmm", "aten.sigmoid", "aten.gelu", "aten._softmax"),
    *("aten.add.Tensor", "aten.mul.Tensor", "aten.neg", "aten.pow.Tensor_Scalar", "aten.mean.dim", "aten.rsqrt"),
    *("aten.cos", "aten.sin"),
    *("aten.view", "aten.expand", "aten.permute", "aten.unsqueeze", "aten.squeeze.dims", "aten.alias"),
    *("aten.cat", "aten.slice.Tensor", "aten.select.int", "aten.clone", "aten._to_copy"),
    *("aten.arange.start_step", "aten.full_like", "aten.scalar_tensor"),
    *("aten.le.Tensor", "aten.lt.Tensor", "aten.where.self"),
    *("aten.index_put", "aten.gather", "aten.max.dim", "aten.argmax"),
}
MORE_OPS = {
    "flash": {*("aten.amax", "aten.maximum", "aten.sub.Tensor", "aten.exp", "aten.sum.dim_IntList", "aten.div.Tensor")}
}
COLLECTIVES = {
    *("_c10d_functional.all_reduce", "_c10d_functional.all_gather_into_tensor", "_c10d_functional.wait_tensor")
}
VOCAB_PARALLEL_OPS = {  # which rows of the embedding a rank has
    *("aten.sub.Tensor", "aten.ge.Scalar", "aten.lt.Scalar", "aten.bitwise_and.Tensor")
}
INT64_OPS = {"aten._to_copy", "aten.max.dim", "aten.argmax"}  # indices, made and used as such


def inputs(tokens: list[int], start: int = 0) -> tuple[Tensor, Tensor]:
    ids = torch.tensor([tokens], dtype=torch.int32)
    return ids, torch.arange(start, start + len(tokens), dtype=torch.int32)[None]


def export(model: LlamaForCausalLM, tokens: int, choose: bool) -> ExportedProgram:
    """The graph that reads `tokens` tokens and gives logits, or the choice of the next token."""
    arguments = inputs([0] * tokens)
    if choose:
        arguments += (torch.zeros(1, dtype=torch.int32),)
    with torch.no_grad():
        return torch.export.export(model, arguments, strict=True).run_decompositions()


def calls(program: ExportedProgram) -> list[torch.fx.Node]:
    return [node for node in program.graph.nodes if node.op == "call_function"]


def op_name(node: torch.fx.Node) -> str:
    return str(node.target).removesuffix(".default")


def ops(program: ExportedProgram, model: LlamaForCausalLM) -> set[str]:
    """The ops that compute something. Asserts that every size is known, that the caches are written, all of them and
    nothing else, and that nothing is computed in 64 bits."""
    found: dict[str, set[torch.dtype]] = {}
    for node in calls(program):
        if isinstance(node.target, torch._ops.OpOverload) and "val" in node.meta:  # assertions return no value
            for value in torch.utils._pytree.tree_leaves(node.meta["val"]):
                assert all(type(size) is int for size in value.shape), f"{node} has a size that is not known"
                found.setdefault(op_name(node), set()).add(value.dtype)
    caches = {name for name, _ in model.named_buffers() if ".kv_cache." in name}
    assert set(program.graph_signature.buffers_to_mutate.values()) == caches
    wide = {op for op, dtypes in found.items() if dtypes & {torch.int64, torch.float64}}
    assert wide <= INT64_OPS, f"ops that compute in 64 bits: {sorted(wide - INT64_OPS)}"
    return set(found)


def one_layer(ckpt: Path, attn: str, length: int) -> LlamaForCausalLM:
    """A model with one layer and no weights: which ops there are depends on neither."""
    config = replace(LlamaConfig.from_pretrained(ckpt), num_hidden_layers=1)
    neuron = replace(NeuronConfig.from_pretrained(ckpt), sequence_length=length)
    return LlamaForCausalLM(config, neuron, backend_for("neuron", attn)).eval()


def test_export_is_strict_and_made_of_known_ops(converted: Callable) -> None:
    with_biases = one_layer(converted(FAMILY), "eager", LENGTH)  # and with GELU
    usual = one_layer(converted("llama-3.1"), "eager", LENGTH)
    found: set[str] = set()
    for tokens in (8, 1):
        for choose in (True, False):
            found |= ops(export(with_biases, tokens, choose), with_biases)
    found |= ops(export(usual, 8, choose=True), usual)
    assert not found - OPS, f"ops that no one has looked at, see OPS: {sorted(found - OPS)}"
    assert not OPS - found, f"ops that are not used any more, take them out of OPS: {sorted(OPS - found)}"


@pytest.mark.parametrize("attn", MORE_OPS)
def test_other_forms_of_attention_need_a_few_more_ops(attn: str, converted: Callable) -> None:
    model = one_layer(converted(FAMILY), attn, 1100)  # three blocks of flash attention, the last of them shorter
    found: set[str] = set()
    for tokens in (8, 1):
        found |= ops(export(model, tokens, choose=True), model)
    assert found - OPS == MORE_OPS[attn]


# ---- one graph for all ranks


@pytest.fixture
def as_rank_0_of_2() -> Iterator[None]:
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=2)
    yield
    dist.destroy_process_group()


def run_on_all_ranks(
    program: ExportedProgram, states: list[dict[str, Tensor]], arguments: tuple[Tensor, ...]
) -> list[Tensor]:
    """Runs a graph node by node, each node for every rank, on the rank's own state, which is updated; the results."""
    signature, ranks = program.graph_signature, range(len(states))
    given = iter(arguments)
    values: dict[torch.fx.Node, list] = {}  # a node's value on each rank
    for node, spec in zip(program.graph.find_nodes(op="placeholder"), signature.input_specs, strict=True):
        if spec.target is None:
            values[node] = [next(given)] * len(states)
        elif spec.target in program.constants:
            values[node] = [program.constants[spec.target]] * len(states)
        else:
            values[node] = [state[spec.target] for state in states]
    for node in calls(program):
        args = []
        for rank in ranks:
            args.append(torch.fx.node.map_arg((node.args, node.kwargs), lambda arg, rank=rank: values[arg][rank]))
        name = op_name(node)
        if name == "_c10d_functional.all_reduce":
            values[node] = [sum(positional[0] for positional, _ in args)] * len(states)
        elif name == "_c10d_functional.all_gather_into_tensor":
            values[node] = [torch.cat([positional[0] for positional, _ in args])] * len(states)
        elif name == "_c10d_functional.wait_tensor":
            values[node] = [positional[0] for positional, _ in args]
        else:
            values[node] = [node.target(*positional, **named) for positional, named in args]
    results = program.graph.output_node().args[0]
    outputs = {spec.arg.name: result for spec, result in zip(signature.output_specs, results, strict=True)}
    for output, buffer in signature.buffers_to_mutate.items():
        for rank in ranks:
            states[rank][buffer] = values[outputs[output]][rank]
    return values[outputs[signature.user_outputs[0]]]


# each of the two reads the rank: the choice over sharded logits, and an embedding sharded by vocabulary
@pytest.mark.parametrize(("choose", "vocab_parallel"), [(True, False), (False, True)], ids=["choice", "logits"])
def test_one_graph_traced_as_rank_0_serves_both_ranks(
    choose: bool, vocab_parallel: bool, hf_checkpoint: Callable, converted: Callable, as_rank_0_of_2: None
) -> None:
    ckpt = converted(FAMILY, 2, sequence_length=LENGTH, vocab_parallel=vocab_parallel)
    model = load_model(ckpt, rank=0, backend=backend_for("neuron"))
    graphs = {tokens: export(model, tokens, choose) for tokens in (8, 1)}
    found = ops(graphs[8], model) | ops(graphs[1], model)
    assert found - OPS == COLLECTIVES | (VOCAB_PARALLEL_OPS if vocab_parallel else set())
    expected, expected_ids = hf_greedy(hf_model(hf_checkpoint(FAMILY), torch.float32), PROMPT, 12)

    def serve(ranks: list[int]) -> tuple[list[int], Tensor | None]:
        """12 new ids of PROMPT, and logits if the graphs give them; `ranks` is what each shard says its rank is."""
        states = []
        for shard, rank in enumerate(ranks):
            state = dict(model.named_buffers()) | read_shard(ckpt, shard)
            for name in state:
                if name.endswith("rank_util.rank"):
                    state[name] = torch.tensor([rank], dtype=torch.int32)
            states.append(state)
        ids, logits, tokens, start, last = [], [], [*PROMPT, 0], 0, len(PROMPT) - 1  # a prompt of 7 in a bucket of 8
        for _ in range(12):
            arguments = inputs(tokens, start)
            if choose:
                arguments += (torch.tensor([last], dtype=torch.int32),)
            rows = run_on_all_ranks(graphs[len(tokens)], states, arguments)
            assert torch.equal(rows[0], rows[1])
            if choose:
                ids.append(int(rows[0]))
            else:
                logits.append(rows[0][0, : last + 1])
                ids.append(int(logits[-1][-1].argmax()))
            tokens, start, last = ids[-1:], len(PROMPT) + len(ids) - 1, 0
        return ids, torch.cat(logits) if logits else None

    ids, logits = serve([0, 1])
    assert ids == expected_ids
    if not choose:
        torch.testing.assert_close(logits, expected, rtol=0, atol=4e-6 * float(expected.abs().max()))
    # and the rank is read from the shard: if both say that they are rank 0, the ids are wrong
    assert serve([0, 0])[0] != expected_ids


# ---- torch.compile


def count_graphs(rank: int, ckpt: Path, prompts: list[list[int]]) -> tuple[int, list]:
    """How many graphs a rank's compiler is given for prompts that come one after the other; their 64 new ids each."""
    from torch._dynamo.backends.common import aot_autograd

    graphs: list[torch.fx.GraphModule] = []

    def count(graph: torch.fx.GraphModule, example_inputs: list) -> Callable:
        graphs.append(graph)
        return graph.forward

    model = load_model(ckpt, rank, backend=backend_for("neuron"))
    # as `load_model` does on a Neuron device, which has a backend of its own
    model.compile(backend=aot_autograd(fw_compiler=count), fullgraph=True, dynamic=False)
    ids = [generate(model, [prompt], 64, []) for prompt in prompts]
    return len(graphs), ids


def test_compiled_at_tp_2_there_are_two_graphs_and_64_tokens_compile_no_other(
    hf_checkpoint: Callable, converted: Callable, on_ranks: Callable
) -> None:
    prompts = [PROMPT, PROMPT[:3]]
    ranks = on_ranks(2, count_graphs, converted(FAMILY, 2, sequence_length=LENGTH), prompts)
    hf = hf_model(hf_checkpoint(FAMILY), torch.float32)
    expected = [[hf_greedy(hf, prompt, 64)[1]] for prompt in prompts]
    assert ranks == [(2, expected)] * 2


# ---- prefill: buckets, chunks


@pytest.mark.parametrize(
    ("settings", "prefill"),
    [
        ({}, [96]),  # the default buckets start at 128, so there is only the whole cache
        ({"context_encoding_buckets": [32, 8, 16]}, [8]),
        ({"context_encoding_buckets": [4, 16]}, [16]),
        ({"context_encoding_buckets": [4]}, [96]),
        ({"prefill_chunk_size": 3}, [3, 3, 3]),
        ({"prefill_chunk_size": 7}, [7]),
        ({"prefill_chunk_size": 4, "context_encoding_buckets": [16]}, [4, 4]),
    ],
)
def test_a_prompt_takes_the_smallest_bucket_or_chunks_and_has_hfs_ids(
    settings: dict, prefill: list[int], hf_checkpoint: Callable, converted: Callable
) -> None:
    prompts = [PROMPT, [7, 1]]
    ckpt = converted(FAMILY, sequence_length=LENGTH, **settings)
    model = load_model(ckpt, batch_size=2, backend=backend_for("neuron"))
    lengths: list[int] = []
    model.register_forward_pre_hook(lambda module, inputs: lengths.append(inputs[0].shape[1]))
    hf = hf_model(hf_checkpoint(FAMILY), torch.float32)
    assert generate(model, prompts, 6, []) == [hf_greedy(hf, prompt, 6)[1] for prompt in prompts]
    assert lengths == prefill + [1] * 5


def test_buckets_are_powers_of_two_up_to_the_cache() -> None:
    assert NeuronConfig(sequence_length=1000).prefill_lengths() == [128, 256, 512, 1000]
    assert NeuronConfig(sequence_length=512).prefill_lengths() == [128, 256, 512]
    assert NeuronConfig(sequence_length=96).prefill_lengths() == [96]


def test_given_buckets_replace_those_and_a_chunk_replaces_all() -> None:
    neuron = NeuronConfig(sequence_length=512, context_encoding_buckets=[64, 2048])
    assert neuron.prefill_lengths() == [64, 512]
    assert replace(neuron, prefill_chunk_size=32).prefill_lengths() == [32]


# ---- what is picked


PACKAGES = ("torch_xla", "torch_neuronx", "neuronx_distributed")
STACKS = {
    "nothing": (),
    "torch-xla": ("torch_xla",),
    "NxD alone": ("neuronx_distributed",),
    "NxD": PACKAGES,
    "TorchNeuron": ("torch_neuronx",),
}


@pytest.fixture
def install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable:
    """install(stack): makes Python find empty packages for those of the stack, and none of the others."""

    def make(stack: str) -> Path:
        monkeypatch.syspath_prepend(tmp_path)
        for package in PACKAGES:
            monkeypatch.setitem(sys.modules, package, None)  # Python's own sign for what cannot be imported
            if package in STACKS[stack]:
                (tmp_path / package).mkdir()
                (tmp_path / package / "__init__.py").touch()
                monkeypatch.delitem(sys.modules, package)
        return tmp_path

    return make


@pytest.mark.parametrize(
    ("stack", "asked", "device"),
    [
        ("nothing", "auto", "cpu"),
        ("torch-xla", "auto", "cpu"),
        ("NxD alone", "auto", "cpu"),
        ("NxD", "auto", "nxd"),
        ("NxD", "nxd", "nxd"),
        ("NxD", "cpu", "cpu"),
        ("TorchNeuron", "auto", "neuron"),
        ("TorchNeuron", "neuron", "neuron"),
        ("TorchNeuron", "cpu", "cpu"),
    ],
)
def test_the_device_is_picked_by_what_is_installed(stack: str, asked: str, device: str, install: Callable) -> None:
    install(stack)
    assert choose_device(asked) == device


@pytest.mark.parametrize(
    ("stack", "asked"),
    [("nothing", "nxd"), ("nothing", "neuron"), ("NxD alone", "nxd"), ("NxD", "neuron"), ("TorchNeuron", "nxd")],
)
def test_a_device_that_is_not_installed_is_refused(stack: str, asked: str, install: Callable) -> None:
    install(stack)
    with pytest.raises(UsageError, match=rf"--device {asked} is not available here: see docs/neuron\.md"):
        choose_device(asked)


def test_a_broken_neuron_installation_shows_its_import_error_whole(install: Callable, converted: Callable) -> None:
    """As with the placeholders that the public index has. The traceback is the information there."""
    folder = install("NxD")
    result = command("llama_neuron.py", "--ckpt", converted(FAMILY), "--prompt-ids", "5,11", PYTHONPATH=str(folder))
    assert (result.returncode, result.stdout) == (1, "")
    assert result.stderr.startswith("Traceback")
    assert "from neuronx_distributed.parallel_layers import layers" in result.stderr
    assert result.stderr.endswith("ModuleNotFoundError: No module named 'neuronx_distributed.parallel_layers'\n")

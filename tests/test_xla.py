"""Every op of the model on torch-xla's CPU device, each against the same op on CPU tensors. Skipped without torch_xla.

torch-neuronx turns torch-xla's functionalization off (XLA_DISABLE_FUNCTIONALIZATION=1), and then a view is whatever
torch-xla makes of strides that it keeps no memory for: `split` returns wrong data there. So these tests run under AWS's
value unless the environment has another one, and the last of them runs two families under the other value.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from importlib.util import find_spec
from pathlib import Path

import pytest

# Code that is not optimized compiles in a third of the time. It is too inexact for tests/test_nxd.py: gelu of the
# smallest number is -3e31, and NxD pads biases with that number
os.environ.setdefault("XLA_FLAGS", "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true")

import tests.nxd  # noqa: F401  it sets the rest of the environment that torch_xla reads when it is imported

pytest.importorskip("torch_xla")

import torch
import torch_xla
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map, tree_map_only

from convert_weights import convert
from llama_neuron import ATTENTION, REFERENCE, Backend, KVCache, NeuronKVCache, backend_for, generate, load_model
from tests.helpers import FAMILIES, command, hf_greedy, hf_model
from tests.nxd.one_layer import one_layer

PROMPTS, NEW = [[5, 11, 2, 60, 33, 47, 3], [7, 1, 40], [64, 9, 13, 21, 8]], 2
TOLERANCE = 1e-5  # of the largest number of a tensor, in float32


@dataclass
class Call:
    """An op, copies of its arguments, and copies of what it returned and what it wrote into."""

    op: torch._ops.OpOverload
    given: tuple[tuple, dict]
    got: tuple[object, tuple]


@dataclass
class Comparison:
    """How far the ops of a run are from a CPU's."""

    ops: set[str] = field(default_factory=set)
    calls: int = 0
    worst: float = 0.0
    wrong: list[str] = field(default_factory=list)


class Recorder(TorchDispatchMode):
    """Records each op of torch-xla. The copies are lazy, like the ops: nothing runs before the graph is whole, and a
    view is still a view when the next op reads it, as in a graph that is traced."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[Call] = []
        self.kept: dict[tuple[int, int], tuple[Tensor, Tensor]] = {}  # a tensor before each write: itself and its copy

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        given = self.copies((args, kwargs))
        result = op(*args, **kwargs)
        written = tree_map_only(Tensor, torch.clone, args) if op._schema.is_mutable else ()
        leaves = tree_flatten((args, kwargs, result))[0]
        on_device = all(leaf.device.type == "xla" for leaf in leaves if isinstance(leaf, Tensor))
        if on_device and op is not torch.ops.aten._propagate_xla_data.default:  # bookkeeping that a CPU has not
            self.calls.append(Call(op, given, (() if written else self.copies(result), written)))
        return result

    def copies(self, tree: object) -> object:
        def copy(tensor: Tensor) -> Tensor:
            key = id(tensor), tensor._version
            if key not in self.kept:
                self.kept[key] = tensor, tensor.clone()
            return self.kept[key][1]

        return tree_map_only(Tensor, copy, tree)

    def compare(self, total: Comparison) -> None:
        """Repeats every call on CPU tensors, and adds it to `total`."""
        torch_xla.sync()
        for call in self.calls:
            args, kwargs = on_cpu(call.given)
            result = call.op(*args, **kwargs)
            expected = ((), args) if call.op._schema.is_mutable else (result, ())
            compare_tensors(call, tree_flatten(expected)[0], tree_flatten(on_cpu(call.got))[0], total)


def on_cpu(tree: object) -> object:
    def move(leaf: object) -> object:
        if isinstance(leaf, Tensor):
            return leaf.cpu()
        return torch.device("cpu") if isinstance(leaf, torch.device) else leaf

    return tree_map(move, tree)


def error(expected: Tensor, got: Tensor) -> float:
    """The largest difference, relative to the largest number. Whole numbers and truth values are equal or not."""
    if not expected.is_floating_point():
        return 0.0 if torch.equal(expected, got) else float("inf")
    if torch.equal(expected, got):
        return 0.0
    finite = expected.isfinite()
    if not torch.equal(expected[~finite], got[~finite]):  # sdpa masks with -inf
        return float("inf")
    largest = expected[finite].double().abs().max().clamp(min=1e-30)
    return float((expected[finite].double() - got[finite].double()).abs().max() / largest)


def compare_tensors(call: Call, expected: list, got: list, total: Comparison) -> None:
    total.ops.add(str(call.op))
    total.calls += 1
    for one, other in zip(expected, got, strict=True):
        if not isinstance(one, Tensor):
            continue
        if (one.shape, one.dtype) != (other.shape, other.dtype):
            total.wrong.append(f"{call.op}: {one.dtype}{list(one.shape)} is {other.dtype}{list(other.shape)}")
            continue
        off = error(one, other)
        total.worst = max(total.worst, off)
        if not off <= TOLERANCE:
            total.wrong.append(f"{call.op} of {list(one.shape)} is off by {off:.1e}")


# ---- the tests


@torch.no_grad()
def run_and_compare(hf: Path, ckpt: Path, backend: Backend, prompts: list[list[int]], total: Comparison) -> None:
    """Greedy decoding of unequal prompts, and their logits at once: ids are HF's, logits and caches a CPU's."""
    settings = {"batch_size": len(prompts), "sequence_length": None}
    on_device = load_model(ckpt, backend=backend, device=torch_xla.device(), **settings)
    reference = load_model(ckpt, backend=REFERENCE, **settings)
    ids = torch.tensor([row + [0] * (len(PROMPTS[0]) - len(row)) for row in prompts], dtype=torch.int32)
    positions = torch.arange(ids.shape[1], dtype=torch.int32).expand_as(ids).contiguous()
    with Recorder() as recorder:
        answers = generate(on_device, prompts, NEW, [])
        logits = on_device(ids.to(torch_xla.device()), positions.to(torch_xla.device()))
    recorder.compare(total)
    assert not total.wrong, "\n".join(total.wrong)
    oracle = hf_model(hf, torch.float32)
    assert answers == [hf_greedy(oracle, prompt, NEW)[1] for prompt in prompts]
    assert generate(reference, prompts, NEW, []) == answers
    assert error(reference(ids, positions), logits.cpu()) <= TOLERANCE
    for (name, expected), (_, got) in zip(reference.named_buffers(), on_device.named_buffers(), strict=True):
        assert error(expected, got.cpu()) <= TOLERANCE, name


@pytest.fixture(scope="module")
def nxd_backend() -> Iterator[Backend]:
    """What NxD's path is made of; this file's layers and norm where NxD is not installed."""
    if find_spec("neuronx_distributed") is None:
        yield replace(REFERENCE, KVCache=NeuronKVCache, static_shapes=True)
        return
    from neuronx_distributed import NxDParallelState
    from neuronx_distributed.parallel_layers import parallel_state

    with NxDParallelState(world_size=1, tensor_model_parallel_size=1):
        parallel_state.set_aot_mode(False)  # in it a layer lists its weight twice
        yield backend_for("nxd")


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(
    ("attn", "kv_cache", "vocab_parallel"),
    [
        ("eager", NeuronKVCache, False),
        ("eager", KVCache, True),
        ("sdpa", NeuronKVCache, True),
        ("flash", NeuronKVCache, False),
    ],
)
def test_every_op_computes_what_a_cpu_does(
    attn: str,
    kv_cache: type,
    vocab_parallel: bool,
    family: str,
    hf_checkpoint: Callable,
    nxd_backend: Backend,
    tmp_path: Path,
) -> None:
    """Batches of one, two and three; chunks of a prompt, tokens, and a whole prompt."""
    length = 600 if attn == "flash" else 16  # of two of its blocks
    settings = {"sequence_length": length, "prefill_chunk_size": 4, "vocab_parallel": vocab_parallel}
    hf = one_layer(hf_checkpoint(family))
    convert(hf, tmp_path, tp_degree=1, **settings)
    backend = replace(nxd_backend, KVCache=kv_cache, attention=ATTENTION[attn])
    total = Comparison()
    for batch in (1, 2, 3):
        run_and_compare(hf, tmp_path, backend, PROMPTS[:batch], total)
    print(f"{total.calls} calls of {len(total.ops)} ops, off by {total.worst:.1e}: {' '.join(sorted(total.ops))}")


def test_a_split_of_a_batch_is_found() -> None:
    """The fault that this file is for: a view of a view, and torch-xla takes the strides of the second wrongly."""
    qkv = torch.arange(2.0 * 5 * 6 * 4).view(2, 5, 6, 4).to(torch_xla.device())
    with Recorder() as recorder:
        qkv.transpose(1, 2).split((4, 2), dim=1)
    recorder.compare(total := Comparison())
    if os.environ["XLA_DISABLE_FUNCTIONALIZATION"] == "1":
        assert [text.split(" of ")[0] for text in total.wrong] == ["aten.split_with_sizes.default"] * 2
    else:
        assert not total.wrong


@pytest.mark.slow
def test_two_families_are_right_under_the_other_value_too() -> None:
    other = str(1 - int(os.environ["XLA_DISABLE_FUNCTIONALIZATION"]))
    chosen = "every_op and (smollm2 or odd)"
    result = command("-m", "pytest", __file__, "-q", "-k", chosen, XLA_DISABLE_FUNCTIONALIZATION=other)
    assert result.returncode == 0, result.stdout

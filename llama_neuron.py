"""Llama inference as AWS Neuron computes it, in one file, to be read beside Hugging Face's `modeling_llama.py`.

What a Neuron port changes, and nothing else: `nn.Linear` and `nn.Embedding` become tensor-parallel layers, the KV cache
is a tensor of fixed size, every shape is known before the first token, and what depends on the rank is read from the
checkpoint. `convert_weights.py` writes that checkpoint, one shard a rank; an HF directory is read as it is, too.

The order follows the data: configs, parallel layers, RMSNorm, rotary embedding, KV cache, attention, MLP, decoder
layer, model, loading, generation, backends, plan, command line. Letters in shapes: B batch, T new tokens, S cache slots
attended to, E hidden size, H query heads and K key/value heads of one rank, G = H/K, D head_dim, V vocabulary.
"""

from __future__ import annotations

import argparse
import gc
import hashlib
import json
import os
import resource
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import MISSING, asdict, dataclass, fields, replace
from functools import partial
from importlib.util import find_spec
from multiprocessing.synchronize import Semaphore
from pathlib import Path
from shutil import which
from types import ModuleType

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}

# torch's own functions under HF's names (transformers.activations.ACT2FN)
ACT2FN = {"silu": F.silu, "swish": F.silu, "gelu": F.gelu, "relu": F.relu}
ACT2FN["gelu_pytorch_tanh"] = partial(F.gelu, approximate="tanh")

# transformers' rope types that Llama checkpoints use, with the parameters that they cannot do without
ROPE_PARAMETERS: dict[str, tuple[str, ...]] = {"default": (), "linear": ("factor",), "dynamic": ("factor",)}
ROPE_PARAMETERS["llama3"] = ("factor", "low_freq_factor", "high_freq_factor")
ROPE_PARAMETERS |= {"yarn": ("factor",), "longrope": ("short_factor", "long_factor")}


class UsageError(ValueError):
    """A mistake in a flag or a file: the message names it and the way out, and the commands exit with code 2."""


def require(condition: object, message: str) -> None:
    if not condition:
        raise UsageError(message)


# -------------------------------------------------------------------------------------------------------------- configs


def read_json(path: Path) -> dict:
    """The object in a JSON file. Raises UsageError where the file is absent or holds something else."""
    try:
        value = json.loads(path.read_text())
    except FileNotFoundError:
        raise UsageError(f"{path} not found: name a directory that holds a Llama checkpoint") from None
    except (OSError, ValueError) as error:
        raise UsageError(f"{path} cannot be read as JSON: {error}") from None
    require(isinstance(value, dict), f"{path} holds no JSON object")
    return value


def to_json(value: object) -> str:
    return json.dumps(value, indent=2, default=lambda dtype: str(dtype).removeprefix("torch."))


def read_fields(cls: type, raw: dict, path: Path) -> dict:
    """What `raw` holds for the fields of a dataclass, null counting as absent. Raises UsageError for a wrong value."""
    types = {"int": int, "int | None": int, "float": (int, float), "bool": bool, "str": str}
    dtype = raw.get("torch_dtype") or raw.get("dtype") or "float32"  # transformers 4 and 5
    require(dtype in list(DTYPES), f"{path}: dtype {dtype!r} is not supported, {', '.join(DTYPES)} are")
    values: dict = {"torch_dtype": DTYPES[dtype]}
    for field in fields(cls):
        name, value = field.name, raw.get(field.name)
        if field.type in types and (value is not None or (field.type == "int" and field.default is MISSING)):
            kind = "positive integer" if field.type.startswith("int") else field.type
            fits = isinstance(value, types[field.type])
            fits = fits and (kind in ("bool", "str") or value > 0 or value == field.default)
            require(fits, f"{path}: {name} must be a {kind}, it is {value!r}")
            values[name] = value
    return values


@dataclass(frozen=True, kw_only=True)
class LlamaConfig:
    """HF's `LlamaConfig`, read from `config.json` as transformers 4 or 5 writes it, with HF's defaults.

    Differs: holds only what inference reads, and refuses by name what this file cannot compute.
    """

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int | None  # absent: num_attention_heads
    head_dim: int | None  # absent: hidden_size / num_attention_heads
    hidden_act: str = "silu"
    max_position_embeddings: int = 2048
    rms_norm_eps: float = 1e-6
    rope_parameters: dict  # transformers 5's form: rope_type, rope_theta, and what the type needs
    attention_bias: bool = False  # on q, k, v and o_proj, as in HF
    mlp_bias: bool = False
    tie_word_embeddings: bool = False
    eos_token_id: tuple[int, ...]  # generation_config.json's where it has any, as HF's generate() does
    torch_dtype: torch.dtype

    @classmethod
    def from_pretrained(cls, directory: str | Path) -> LlamaConfig:
        """Reads `config.json`, and `generation_config.json` where there is one.

        Raises UsageError, naming file and key, for another architecture, a quantized checkpoint, keys that are missing,
        head counts that do not divide, and dtypes, activations and rope types that are not known here.
        """
        path = Path(directory) / "config.json"
        raw = read_json(path)
        names = raw.get("architectures") or ["LlamaForCausalLM"]
        known = names == ["LlamaForCausalLM"] and raw.get("model_type", "llama") == "llama"
        require(known, f"{path}: {names} of model_type {raw.get('model_type')!r} is not supported, LlamaForCausalLM is")
        quantized = raw.get("quantization_config")
        require(not quantized, f"{path}: quantization_config is not supported, dequantize it first")
        values = read_fields(cls, raw, path)
        heads, hidden, act = values["num_attention_heads"], values["hidden_size"], values.get("hidden_act", "silu")
        kv_heads = values.setdefault("num_key_value_heads", heads)
        whole = "head_dim" in values or hidden % heads == 0
        require(whole, f"{path}: no head_dim, and hidden_size {hidden} is no multiple of {heads} heads")
        values.setdefault("head_dim", hidden // heads)
        require(heads % kv_heads == 0, f"{path}: {heads} attention heads are no multiple of {kv_heads} key/value heads")
        require(act in ACT2FN, f"{path}: hidden_act {act!r} is not supported, {', '.join(ACT2FN)} are")
        generation = path.with_name("generation_config.json")
        eos = read_json(generation).get("eos_token_id") if generation.exists() else None
        eos = raw.get("eos_token_id") if eos is None else eos
        eos = tuple(eos) if isinstance(eos, list) else () if eos is None else (eos,)
        require(all(isinstance(token, int) for token in eos), f"{path}: eos_token_id {eos!r} must be token ids")
        return cls(**values, rope_parameters=standardize_rope_parameters(raw, path), eos_token_id=eos)

    @property
    def rope_limit(self) -> int | None:
        """The most positions that a static graph can serve; None where the rotary embedding sets no limit.

        Beyond it `dynamic` and `longrope` take other frequencies (HF's `dynamic_rope_update`), while the keys in the
        cache stay rotated by the old ones. A compiled graph has one set, chosen before any length is known.
        """
        original = self.rope_parameters.get("original_max_position_embeddings")
        return {"dynamic": self.max_position_embeddings, "longrope": original}.get(self.rope_parameters["rope_type"])


def standardize_rope_parameters(raw: dict, path: Path) -> dict:
    """Rope parameters in transformers 5's form, from either form (HF: `standardize_rope_params`). Raises UsageError."""
    given = raw.get("rope_parameters") or raw.get("rope_scaling") or {}
    require(isinstance(given, dict), f"{path}: the rope parameters must be an object, they are {given!r}")
    rope = dict(given)
    rope["rope_type"] = kind = rope.get("rope_type") or rope.pop("type", "default")
    rope.setdefault("rope_theta", raw.get("rope_theta") or 10000.0)
    known = list(ROPE_PARAMETERS)
    require(kind in known, f"{path}: rope_type {kind!r} is not supported, {', '.join(known)} are")
    missing = ", ".join(key for key in ROPE_PARAMETERS[kind] if rope.get(key) is None)
    require(not missing, f"{path}: rope_type {kind!r} needs {missing}")
    texts = ", ".join(key for key, value in rope.items() if isinstance(value, str) and key != "rope_type")
    require(not texts, f"{path}: rope parameters that must be numbers are not: {texts}")
    part = rope.get("partial_rotary_factor") or raw.get("partial_rotary_factor") or 1.0
    require(part == 1.0, f"{path}: partial_rotary_factor {part} is not supported, Llama rotates whole heads")
    if kind in ("llama3", "yarn", "longrope"):
        original = raw.get("original_max_position_embeddings") or rope.get("original_max_position_embeddings")
        rope["original_max_position_embeddings"] = original or raw.get("max_position_embeddings", 2048)
    return rope


@dataclass(frozen=True)
class NeuronConfig:
    """What is fixed before anything is compiled: `neuron_config.json`, with the keys of Optimum's `NxDNeuronConfig`."""

    tp_degree: int = 1  # ranks that the weights are sharded over
    batch_size: int = 1  # rows of the KV cache
    sequence_length: int = 2048  # slots of the KV cache: prompt and new tokens together
    torch_dtype: torch.dtype = torch.bfloat16
    fused_qkv: bool = True  # one Wqkv for q, k and v: the only layout here
    prefill_chunk_size: int = 0  # 0: the whole prompt at once
    output_logits: bool = False  # whether a compiled graph returns logits beside the ids
    on_device_sampling: bool = True  # ranks exchange one (value, index) pair for a token, not their logits
    vocab_parallel: bool = False  # embed_tokens sharded by vocabulary instead of by hidden size
    # lengths that a prompt is padded to (NxDI's key); none: as it is, or `with_buckets` where each costs a compilation
    context_encoding_buckets: tuple[int, ...] = ()

    def with_buckets(self) -> NeuronConfig:
        """The configuration for a Neuron device: where there are no buckets, powers of two up to sequence_length."""
        powers = [1 << n for n in range(7, 32) if 1 << n < self.sequence_length]  # from 128
        return replace(self, context_encoding_buckets=self.context_encoding_buckets or (*powers, self.sequence_length))

    def prefill_length(self, tokens: int) -> int:
        """What prompts of up to `tokens` are padded to: whole chunks, else the smallest bucket that holds them."""
        chunk = self.prefill_chunk_size
        if chunk:
            return -(-tokens // chunk) * chunk
        return min((bucket for bucket in self.context_encoding_buckets if bucket >= tokens), default=tokens)

    @classmethod
    def for_checkpoint(cls, ckpt: str | Path, config: LlamaConfig, **flags: int | torch.dtype | None) -> NeuronConfig:
        """`neuron_config.json`, or the defaults for an HF directory, under those flags that are not None.

        Raises UsageError for a file that is not right, for shards made for another tp_degree, and for a sequence_length
        that exceeds `rope_limit`. Keys of Optimum's that mean nothing here are left alone.
        """
        flags = {key: value for key, value in flags.items() if value is not None}
        limit = config.rope_limit
        if is_converted(ckpt):
            path = Path(ckpt) / "neuron_config.json"
            raw = read_json(path)
            buckets = raw.get("context_encoding_buckets") or []
            known = isinstance(buckets, list) and all(type(bucket) is int and bucket > 0 for bucket in buckets)
            require(known, f"{path}: context_encoding_buckets must be a list of positive integers, it is {buckets!r}")
            neuron = cls(**read_fields(cls, raw, path), context_encoding_buckets=tuple(buckets))
            require(neuron.fused_qkv, f"{path}: fused_qkv is not true, convert again with convert_weights.py")
            made, asked = neuron.tp_degree, flags.get("tp_degree", neuron.tp_degree)
            way_out = f"use that, or convert again with --tp {asked}"
            require(made == asked, f"{ckpt} was converted for --tp {made}: {way_out}")
        else:
            length = min(2048, config.max_position_embeddings, limit or 2048)
            neuron = cls(sequence_length=length, torch_dtype=config.torch_dtype)
        neuron = replace(neuron, **flags)
        require(
            limit is None or neuron.sequence_length <= limit,
            f"--sequence-length {neuron.sequence_length} exceeds {limit}, where {config.rope_parameters['rope_type']}"
            f" rope takes other frequencies as the text grows, which a static graph cannot: use {limit} or less",
        )
        return neuron


def is_converted(ckpt: str | Path) -> bool:
    """Whether `convert_weights.py` wrote (and finished) this directory; an HF directory has no `neuron_config.json`."""
    return (Path(ckpt) / "neuron_config.json").exists()


Heads = list[int | None]  # HF's numbers of the heads that a rank holds, in its order; None is a head of zeros


def shard_heads(num_attention_heads: int, num_key_value_heads: int, tp_degree: int) -> list[tuple[Heads, Heads]]:
    """Which query heads and which KV heads each rank holds: NxD's rules (`get_shardable_head_counts` in `gqa.py`).

    - tp % kv_heads == 0, REPLICATE_TO_TP_DEGREE: a rank has one KV head, each KV head stands on tp/kv_heads ranks, and
      the query heads of a KV group are padded until its ranks divide them.
    - otherwise CONVERT_TO_MHA: where tp divides kv_heads, both are simply dealt out; where not, each query head gets a
      copy of its KV head, and query and KV heads are padded at the tail until tp divides them.

    Returns (query heads, KV heads) of each rank. A rank's query head i attends to its KV head i // G.
    """
    group = num_attention_heads // num_key_value_heads
    padding: Heads = [None] * (-num_attention_heads % tp_degree)
    if tp_degree % num_key_value_heads == 0:
        slots = (num_attention_heads + len(padding)) // num_key_value_heads  # query heads of a KV group, with padding
        query = [k * group + i if i < group else None for k in range(num_key_value_heads) for i in range(slots)]
        key = [k for k in range(num_key_value_heads) for _ in range(tp_degree // num_key_value_heads)]
    else:
        query = [*range(num_attention_heads), *padding]
        key = [*range(num_key_value_heads)]
        if num_key_value_heads % tp_degree:
            key = [head // group for head in range(num_attention_heads)] + padding
    h, k = len(query) // tp_degree, len(key) // tp_degree
    return [(query[r * h : (r + 1) * h], key[r * k : (r + 1) * k]) for r in range(tp_degree)]


# ------------------------------------------------------------------------------------------------------ parallel layers
#
# The part of `neuronx_distributed.parallel_layers.layers` that Llama uses, on `torch.distributed`, with the arguments
# and tensor names of the originals. Weights are shards from the start: nothing here ever holds a whole matrix.


def get_tensor_model_parallel_size() -> int:
    """Ranks in the default process group; 1 where there is none."""
    return dist.get_world_size() if dist.is_initialized() else 1


def gather_from_tensor_model_parallel_region(x: Tensor) -> Tensor:
    """All ranks' x side by side on the last dimension: [..., n] -> [..., tp * n]."""
    tp = get_tensor_model_parallel_size()
    if tp == 1:
        return x
    if SharedMemory.joined:
        return torch.cat(torch.ops.llama_neuron.exchange(x).unbind(), dim=-1)
    # functional collectives, here and below: the only ones that are ops of a graph, for torch.export and torch.compile
    gathered = torch.ops._c10d_functional.all_gather_into_tensor(x.contiguous(), tp, dist.group.WORLD.group_name)
    return torch.cat(torch.ops._c10d_functional.wait_tensor(gathered).chunk(tp), dim=-1)


def reduce_from_tensor_model_parallel_region(x: Tensor) -> Tensor:
    """The sum of all ranks' x, in x's dtype."""
    if get_tensor_model_parallel_size() == 1:
        return x
    if SharedMemory.joined:
        return torch.ops.llama_neuron.exchange(x).sum(0)
    summed = torch.ops._c10d_functional.all_reduce(x.contiguous(), "sum", dist.group.WORLD.group_name)
    return torch.ops._c10d_functional.wait_tensor(summed)


class SharedMemory:
    """How the ranks that `--tp` starts on a CPU exchange tensors: through memory, without a socket.

    Gloo sleeps until the other rank's packet is there: 400 to 1500 us for two ranks on two cores. Ranks that keep
    looking for it take 6 us.
    """

    SIZE = 1 << 20  # bytes that a rank shows at a time
    joined = False  # whether this process exchanges in this way

    @classmethod
    def allocate(cls, ranks: int) -> tuple[Tensor, list[list[Semaphore]]]:
        """What all ranks share, made before they are forked: memory, and a semaphore for each writer and reader."""
        memory = torch.empty(2, ranks, cls.SIZE, dtype=torch.uint8).share_memory_()
        return memory, [[mp.Semaphore(0) for _ in range(ranks)] for _ in range(ranks)]

    def __init__(self, rank: int, memory: Tensor, posts: list[list[Semaphore]]) -> None:
        """Makes this process rank `rank`, and registers the op `llama_neuron::exchange`: x [...] -> [tp, ...]."""
        self.rank, self.memory, self.turn = rank, memory, 0
        self.outgoing = [post for reader, post in enumerate(posts[rank]) if reader != rank]
        self.incoming = [post[rank] for writer, post in enumerate(posts) if writer != rank]
        self.views: dict[tuple, tuple[Tensor, Tensor]] = {}  # making them anew would take as long as all the rest
        self.library = torch.library.Library("llama_neuron", "DEF")  # an op, because a compiled graph can have one
        self.library.define("exchange(Tensor x) -> Tensor")
        self.library.impl("exchange", self.exchange, "CPU")
        torch.library.register_fake("llama_neuron::exchange", lambda x: x.new_empty(len(posts), *x.shape))
        SharedMemory.joined = True

    def exchange(self, x: Tensor) -> Tensor:
        """x [...] -> every rank's x [tp, ...]."""
        if x.nbytes <= self.SIZE:
            return self.exchange_piece(x)
        pieces = [self.exchange_piece(piece) for piece in x.flatten().split(self.SIZE // x.itemsize)]
        return torch.cat(pieces, dim=1).unflatten(1, x.shape)

    def exchange_piece(self, x: Tensor) -> Tensor:
        self.turn ^= 1  # a rank may be one exchange ahead of another, which then still reads the other half
        key = self.turn, x.shape, x.dtype
        if key not in self.views:
            all_ranks = self.memory[self.turn, :, : x.nbytes].view(x.dtype).unflatten(1, x.shape)
            self.views[key] = all_ranks, all_ranks[self.rank]
        all_ranks, own = self.views[key]
        own.copy_(x)
        for post in self.outgoing:
            post.release()
        for post in self.incoming:
            while not post.acquire(block=False):
                os.sched_yield()
        return all_ranks.clone()


def divide(size: int, pad: bool) -> int:
    """A rank's share of `size`, rounded up where `pad` allows; ValueError where tp has to divide and does not."""
    tp = get_tensor_model_parallel_size()
    if size % tp and not pad:
        raise ValueError(f"size {size} is not divisible by tensor-parallel degree {tp}, and pad=False")
    return -(-size // tp)


HOST = ("cpu",)  # devices whose kernels are torch's own; elsewhere Neuron's compiler makes them


def compiled_on_host(x: Tensor) -> bool:
    """Whether `--compile` is tracing: what follows is for the loops that Inductor makes of it, not for Neuron."""
    return torch.compiler.is_compiling() and x.device.type in HOST


def linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """`F.linear`, also of a packed weight; in a compiled step of one row the same as multiply and sum, in float32."""
    if weight.is_mkldnn:
        # the bits of F.linear, which packs the weight itself at each call: 36 -> 30 ms for a token of SmolLM2
        return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")
    if not (compiled_on_host(x) and x.numel() == x.shape[-1]):
        return F.linear(x, weight, bias)
    # one pass over the weights at 27-31 GB/s where F.linear reads 12-17, with norm and activation in the same loops.
    # Inductor adds up more than 4096 numbers by cascades, at half the rate: a longer row is summed in pieces. Of long
    # rows, two halves of the weight are read at one time. Both: 67 -> 52 ms for a token of Llama-3.2-1B's shape
    size = x.shape[-1]
    pieces = next(n for n in range(1, size + 1) if size % n == 0 and size <= 4096 * n)
    halves = weight.chunk(2 if size >= 2048 else 1)
    products = [(x[..., None, :].float() * half.float()).unflatten(-1, (pieces, -1)) for half in halves]
    y = torch.cat([product.sum(-1).sum(-1) for product in products], dim=-1)
    return (y if bias is None else y + bias).to(x.dtype)


def empty_parameter(*shape: int, dtype: torch.dtype) -> nn.Parameter:
    return nn.Parameter(torch.empty(*shape, dtype=dtype), requires_grad=False)


class SPMDRank(nn.Module):
    """NxD's `SPMDRank`: the rank as a tensor, int32 [1], from the shard.

    Why: one graph is traced, as rank 0, and runs on every rank; `dist.get_rank()` in a forward would be traced as 0.
    """

    def __init__(self, world_size: int) -> None:
        super().__init__()
        self.rank = empty_parameter(1, dtype=torch.int32)  # world_size is for NxD's own checkpoint sharding

    def get_rank(self) -> Tensor:
        return self.rank


class ColumnParallelLinear(nn.Module):
    """Beside HF's `nn.Linear`: each rank computes a slice of the output features.

    weight [output_size / tp, input_size], bias [output_size / tp]; `pad` rounds output_size up. The output stays
    sharded. Differs from NxD's in that bias is added inside the product, as in HF; NxD adds it to the rounded product.
    """

    def __init__(
        self, input_size: int, output_size: int, bias=True, gather_output=True, dtype=torch.float32, pad=False
    ) -> None:
        super().__init__()
        if gather_output:
            raise ValueError(
                "ColumnParallelLinear: only gather_output=False is here, Llama gathers once, after lm_head"
            )
        self.weight = empty_parameter(divide(output_size, pad), input_size, dtype=dtype)
        self.bias = empty_parameter(divide(output_size, pad), dtype=dtype) if bias else None

    def forward(self, x: Tensor) -> Tensor:
        return linear(x, self.weight, self.bias)


class RowParallelLinear(nn.Module):
    """Beside HF's `nn.Linear`: each rank multiplies its slice of the input features, and the ranks' products are
    summed.

    weight [output_size, input_size / tp]; bias [output_size], on every rank, added once, after the sum. The input has
    to be sharded already. The sum is in `reduce_dtype`; in float32 more ranks do not mean more rounding.
    """

    def __init__(
        self,
        input_size: int,
        output_size: int,
        bias=True,
        input_is_parallel=False,
        dtype=torch.float32,
        pad=False,
        reduce_dtype=torch.float32,
    ) -> None:
        super().__init__()
        if not input_is_parallel:
            raise ValueError("RowParallelLinear: only input_is_parallel=True is here, Llama needs no other")
        self.reduce_dtype = reduce_dtype
        self.weight = empty_parameter(output_size, divide(input_size, pad), dtype=dtype)
        self.bias = empty_parameter(output_size, dtype=dtype) if bias else None

    def forward(self, x: Tensor) -> Tensor:
        if get_tensor_model_parallel_size() == 1:
            return linear(x, self.weight, self.bias)
        y = reduce_from_tensor_model_parallel_region(linear(x, self.weight, None).to(self.reduce_dtype)).to(x.dtype)
        return y if self.bias is None else y + self.bias


class ParallelEmbedding(nn.Module):
    """Beside HF's `nn.Embedding`: each rank holds a slice of every row, or all of some rows.

    `shard_across_embedding`: weight [num_embeddings, embedding_dim / tp], and the slices are gathered. Otherwise weight
    [num_embeddings / tp, embedding_dim]: a rank looks up the rows it has, takes zeros for others, and the ranks are
    summed. Which rows those are follows from `rank_util.rank` (`use_spmd_rank`: without it NxD's traced graph takes
    every rank for rank 0).
    """

    def __init__(
        self,
        num_embeddings: int,
        embedding_dim: int,
        dtype=torch.float32,
        shard_across_embedding=False,
        pad=False,
        use_spmd_rank=False,
    ) -> None:
        super().__init__()
        self.embedding_dim, self.shard_across_embedding = embedding_dim, shard_across_embedding
        if shard_across_embedding:
            self.weight = empty_parameter(num_embeddings, divide(embedding_dim, pad), dtype=dtype)
        elif use_spmd_rank:
            self.weight = empty_parameter(divide(num_embeddings, pad), embedding_dim, dtype=dtype)
            self.rank_util = SPMDRank(get_tensor_model_parallel_size())
        else:
            raise ValueError("ParallelEmbedding: sharding by vocabulary needs use_spmd_rank=True")

    def forward(self, input_ids: Tensor) -> Tensor:
        if self.shard_across_embedding:
            x = F.embedding(input_ids, self.weight)
            return gather_from_tensor_model_parallel_region(x)[..., : self.embedding_dim]
        row = input_ids - self.rank_util.get_rank() * self.weight.shape[0]
        here = (row >= 0) & (row < self.weight.shape[0])
        x = F.embedding(torch.where(here, row, 0), self.weight)
        return reduce_from_tensor_model_parallel_region(torch.where(here[..., None], x, 0))


# -------------------------------------------------------------------------------------------- RMSNorm, rotary embedding


class LlamaRMSNorm(nn.Module):
    """HF's `LlamaRMSNorm` (Zhang and Sennrich 2019, arXiv:1910.07467), unchanged: x / sqrt(mean(x^2) + eps) * weight.

    Whole on every rank. Statistics in float32, cast back before the weight is applied.
    """

    def __init__(self, hidden_size: int, eps: float, dtype: torch.dtype) -> None:
        super().__init__()
        self.weight = empty_parameter(hidden_size, dtype=dtype)
        self.variance_epsilon = eps

    def forward(self, hidden_states: Tensor) -> Tensor:
        x = hidden_states.to(torch.float32)
        if x.device.type == "xla":  # under NxD: one kernel of the compiler's, which weighs before it casts back
            from torch_neuronx.xla_impl.ops import RmsNorm

            return RmsNorm.apply(x, self.weight, self.variance_epsilon, x.dim() - 1).to(hidden_states.dtype)
        x = x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.variance_epsilon)
        return self.weight * x.to(hidden_states.dtype)


class RotaryEmbedding(nn.Module):
    """Beside HF's `LlamaRotaryEmbedding` (Su et al. 2021, arXiv:2104.09864): cos and sin of position * inv_freq.

    inv_freq[i] = theta^(-2i/D), divided by `factor` where the type is `linear`. Float32 to the end, then x's dtype.
    Differs: the frequencies never change, because a compiled graph holds them as constants (`LlamaConfig.rope_limit`).
    """

    def __init__(self, inv_freq: Tensor, attention_scaling: float = 1.0) -> None:
        super().__init__()
        self.register_buffer("inv_freq", inv_freq)  # D/2; persistent, as the KV cache is
        self.attention_scaling = attention_scaling

    @classmethod
    def from_config(cls, config: LlamaConfig) -> RotaryEmbedding:
        """The rotary embedding of the config's rope_type. Raises UsageError where transformers is needed and absent."""
        rope = config.rope_parameters
        exponent = torch.arange(0, config.head_dim, 2, dtype=torch.float32) / config.head_dim
        inv_freq = 1.0 / rope["rope_theta"] ** exponent
        if rope["rope_type"] == "default":
            return cls(inv_freq)
        if rope["rope_type"] == "linear":
            return cls(inv_freq / rope["factor"])
        if rope["rope_type"] == "llama3":
            return Llama3RotaryEmbedding(inv_freq, rope)
        return cls(*transformers_rope(config))

    def forward(self, x: Tensor, position_ids: Tensor) -> tuple[Tensor, Tensor]:
        freqs = position_ids[..., None].float() * self.inv_freq  # B T D/2
        emb = torch.cat((freqs, freqs), dim=-1)  # B T D
        cos, sin = emb.cos() * self.attention_scaling, emb.sin() * self.attention_scaling
        return cos.to(x.dtype), sin.to(x.dtype)


class Llama3RotaryEmbedding(RotaryEmbedding):
    """Beside HF's `_compute_llama3_parameters` (Llama 3.1), under Optimum's and NxDI's name: frequencies whose waves
    are longer than the original context / low_freq_factor are divided by `factor`, those of waves shorter than it /
    high_freq_factor are kept, and those between are blended."""

    def __init__(self, inv_freq: Tensor, rope: dict) -> None:
        low, high = rope["low_freq_factor"], rope["high_freq_factor"]
        original = rope["original_max_position_embeddings"]
        wavelen = 2 * torch.pi / inv_freq
        divided = inv_freq / rope["factor"]
        smooth = (original / wavelen - low) / (high - low)
        blended = (1 - smooth) * divided + smooth * inv_freq
        kept_or_blended = torch.where(wavelen < original / high, inv_freq, blended)
        super().__init__(torch.where(wavelen > original / low, divided, kept_or_blended))


def transformers_rope(config: LlamaConfig) -> tuple[Tensor, float]:
    """inv_freq float32 [D/2] and attention scaling of the other types, from transformers' `ROPE_INIT_FUNCTIONS`.

    Raises UsageError where transformers is not installed.
    """
    rope = dict(config.rope_parameters)
    try:
        from transformers import LlamaConfig as HFLlamaConfig
        from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS
    except ImportError:
        reason = f"rope_type {rope['rope_type']!r} is computed by transformers: pip install transformers"
        raise UsageError(f"config.json: {reason}") from None
    hf_config = HFLlamaConfig(
        hidden_size=config.hidden_size,
        num_attention_heads=config.num_attention_heads,
        head_dim=config.head_dim,
        max_position_embeddings=config.max_position_embeddings,
        rope_theta=rope.pop("rope_theta"),
        rope_scaling=rope,
    )
    return ROPE_INIT_FUNCTIONS[rope["rope_type"]](hf_config, torch.device("cpu"))


def rotate_half(x: Tensor) -> Tensor:
    """HF's `rotate_half`: the two halves of each head, swapped, the new first one negated."""
    x1, x2 = x.chunk(2, dim=-1)
    return torch.cat((-x2, x1), dim=-1)


def apply_rotary_pos_emb(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """HF's `apply_rotary_pos_emb`, on query and key heads at once: x [B,H+K,T,D], rotated by cos and sin [B,1,T,D]."""
    return (x * cos) + (rotate_half(x) * sin)


# -------------------------------------------------------------------------------------------------- KV cache, attention


class KVCache(nn.Module):
    """Beside HF's `StaticLayer`: keys and values of one layer on one rank, [B, K, sequence_length, D] each.

    Differs: every row of the batch writes at its own positions, and attention reads the first `length` slots only.
    Why: Neuron compiles one graph for one shape, so that the cache cannot grow with the text. Slots written by padding
    are written again before a query of their row comes far enough to see them.
    """

    def __init__(self, batch_size: int, kv_heads: int, sequence_length: int, head_dim: int, dtype: torch.dtype) -> None:
        super().__init__()
        shape = (batch_size, kv_heads, sequence_length, head_dim)
        # persistent: whether a tracer finds its state by state_dict() or by named_buffers(), it finds these
        self.register_buffer("k", torch.zeros(shape, dtype=dtype))
        self.register_buffer("v", torch.zeros(shape, dtype=dtype))

    def update(self, k: Tensor, v: Tensor, position_ids: Tensor, length: int) -> tuple[Tensor, Tensor]:
        """Writes k and v [B,K,T,D] at position_ids [B,T]; returns the first `length` slots of both, [B,K,S,D]."""
        if self.k.device.type in HOST:  # scatter would copy the whole cache for every token
            row = torch.arange(k.shape[0])[:, None]  # B 1
            self.k[row, :, position_ids], self.v[row, :, position_ids] = k.transpose(1, 2), v.transpose(1, 2)
        else:  # a buffer re-assigned is what ModelBuilder makes a graph's state; one written in place keeps its zeros
            index = position_ids[:, None, :, None].expand_as(k).long()  # B K T D
            self.k, self.v = self.k.scatter(2, index, k), self.v.scatter(2, index, v)
        return self.k[:, :, :length], self.v[:, :, :length]


def eager_attention_forward(q: Tensor, k: Tensor, v: Tensor, mask: Tensor, scaling: float) -> Tensor:
    """HF's `eager_attention_forward`, op by op: q [B,H,T,D], k and v [B,K,S,D], mask [B,1,G*T,S] -> [B,H,T,D].

    Differs: the query heads of a KV head lie side by side, so that k and v are not copied G times (`repeat_kv`); the
    mask puts -1e9 in the place of a score, where HF adds finfo.min: exp() so near the end of bfloat16's range gives NaN
    on Neuron.
    """
    scores = torch.matmul(group(q, k), k.transpose(2, 3)) * scaling  # B K G*T S
    scores = torch.where(mask, scores.float(), -1e9)
    return torch.matmul(F.softmax(scores, dim=-1).to(q.dtype), v).reshape(q.shape)


def sdpa_attention_forward(q: Tensor, k: Tensor, v: Tensor, mask: Tensor, scaling: float) -> Tensor:
    """HF's `sdpa_attention_forward`: torch's fused kernel, on the shapes of `eager_attention_forward`."""
    if q.shape[2] == k.shape[2] and q.device.type in HOST:
        # a text from its start, and nothing else: without a mask the half that it hides is left out, 0.8 x the time of
        # a prefill of 1024 tokens
        return F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scaling, enable_gqa=True)
    return F.scaled_dot_product_attention(group(q, k), k, v, attn_mask=mask, scale=scaling).reshape(q.shape)


def compiled_attention_forward(q: Tensor, k: Tensor, v: Tensor, mask: Tensor, scaling: float) -> Tensor:
    """What a compiled step takes for one new token (G*T is G): both products as multiply and sum, in float32."""
    scores = (group(q, k)[:, :, :, None].float() * k[:, :, None]).sum(-1) * scaling  # B K G S
    weights = F.softmax(torch.where(mask, scores, -1e9), dim=-1)
    return (weights[..., None] * v[:, :, None]).sum(-2).to(q.dtype).reshape(q.shape)  # B H 1 D


def group(q: Tensor, k: Tensor) -> Tensor:
    """Query heads [B,H,T,D] beside those of the same KV head: [B,K,G*T,D]."""
    return q.reshape(*k.shape[:2], -1, k.shape[-1])


ATTENTION = {"eager": eager_attention_forward, "sdpa": sdpa_attention_forward}


class LlamaAttention(nn.Module):
    """Beside HF's `LlamaAttention` (in Optimum and NxDI: `NeuronAttentionBase`).

    Differs: q_proj, k_proj and v_proj are one `Wqkv`, sharded by heads (`shard_heads`), a rank's rows in the order q,
    k, v; o_proj is sharded over its input; the cache is static.
    Why: one large product keeps a NeuronCore busier than three small ones, and no head looks at another, so that the
    whole of attention takes one all-reduce, after o_proj.
    """

    def __init__(self, config: LlamaConfig, neuron: NeuronConfig, attn: str, parallel: ModuleType) -> None:
        super().__init__()
        hidden, bias, dtype, tp = config.hidden_size, config.attention_bias, neuron.torch_dtype, neuron.tp_degree
        query, key = shard_heads(config.num_attention_heads, config.num_key_value_heads, tp)[0]  # as many on every rank
        self.num_heads, self.num_kv_heads, self.head_dim = len(query), len(key), config.head_dim  # H, K, D
        self.scaling = self.head_dim**-0.5
        self.attention = ATTENTION[attn]
        q_size, kv_size = tp * self.num_heads * self.head_dim, tp * self.num_kv_heads * self.head_dim
        kwargs = {"bias": bias, "dtype": dtype}
        self.Wqkv = parallel.ColumnParallelLinear(hidden, q_size + 2 * kv_size, gather_output=False, **kwargs)
        kwargs |= {"input_is_parallel": True, "reduce_dtype": torch.float32}
        self.o_proj = parallel.RowParallelLinear(q_size, hidden, **kwargs)
        self.kv_cache = KVCache(neuron.batch_size, self.num_kv_heads, neuron.sequence_length, self.head_dim, dtype)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, mask: Tensor, position_ids: Tensor) -> Tensor:
        B, T, _ = x.shape
        H, K, D = self.num_heads, self.num_kv_heads, self.head_dim
        qk, v = self.Wqkv(x).view(B, T, H + 2 * K, D).transpose(1, 2).split((H + K, K), dim=1)  # B H+K|K T D
        q, k = apply_rotary_pos_emb(qk, cos, sin).split((H, K), dim=1)  # B H|K T D
        k, v = self.kv_cache.update(k, v, position_ids, length=mask.shape[-1])  # B K S D
        attention = compiled_attention_forward if T == 1 and compiled_on_host(x) else self.attention
        y = attention(q, k, v, mask, self.scaling)  # B H T D
        return self.o_proj(y.transpose(1, 2).reshape(B, T, H * D))


# --------------------------------------------------------------------------------------------------- MLP, layers, model


class LlamaMLP(nn.Module):
    """Beside HF's `LlamaMLP` (SwiGLU: Shazeer 2020, arXiv:2002.05202).

    Differs: gate_proj and up_proj are sharded over their output and down_proj over its input, so that intermediate
    features stay on their rank; intermediate_size is padded until tp divides it, which adds zero columns to down_proj.
    """

    def __init__(self, config: LlamaConfig, neuron: NeuronConfig, parallel: ModuleType) -> None:
        super().__init__()
        hidden, inner = config.hidden_size, config.intermediate_size
        kwargs = {"bias": config.mlp_bias, "dtype": neuron.torch_dtype, "pad": True}
        self.gate_proj = parallel.ColumnParallelLinear(hidden, inner, gather_output=False, **kwargs)
        self.up_proj = parallel.ColumnParallelLinear(hidden, inner, gather_output=False, **kwargs)
        kwargs |= {"input_is_parallel": True, "reduce_dtype": torch.float32}
        self.down_proj = parallel.RowParallelLinear(inner, hidden, **kwargs)
        self.act_fn = ACT2FN[config.hidden_act]

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x))


class LlamaDecoderLayer(nn.Module):
    """HF's `LlamaDecoderLayer`, unchanged: two residual blocks, each normed before."""

    def __init__(self, config: LlamaConfig, neuron: NeuronConfig, attn: str, parallel: ModuleType) -> None:
        super().__init__()
        self.self_attn = LlamaAttention(config, neuron, attn, parallel)
        self.mlp = LlamaMLP(config, neuron, parallel)
        self.input_layernorm = LlamaRMSNorm(config.hidden_size, config.rms_norm_eps, neuron.torch_dtype)
        self.post_attention_layernorm = LlamaRMSNorm(config.hidden_size, config.rms_norm_eps, neuron.torch_dtype)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, mask: Tensor, position_ids: Tensor) -> Tensor:
        x = x + self.self_attn(self.input_layernorm(x), cos, sin, mask, position_ids)
        return x + self.mlp(self.post_attention_layernorm(x))


class LlamaModel(nn.Module):
    """Beside HF's `LlamaModel`.

    Differs: embed_tokens is sharded, and the causal mask compares cache slots with positions, so that prefill, chunked
    prefill and decode are this one forward at different T.
    """

    def __init__(self, config: LlamaConfig, neuron: NeuronConfig, attn: str, parallel: ModuleType) -> None:
        super().__init__()
        self.embed_tokens = parallel.ParallelEmbedding(
            config.vocab_size,
            config.hidden_size,
            dtype=neuron.torch_dtype,
            shard_across_embedding=not neuron.vocab_parallel,
            pad=True,
            use_spmd_rank=neuron.vocab_parallel,
        )
        layers = (LlamaDecoderLayer(config, neuron, attn, parallel) for _ in range(config.num_hidden_layers))
        self.layers = nn.ModuleList(layers)
        self.norm = LlamaRMSNorm(config.hidden_size, config.rms_norm_eps, neuron.torch_dtype)
        self.rotary_emb = RotaryEmbedding.from_config(config)
        self.sequence_length = neuron.sequence_length
        self.groups = self.layers[0].self_attn.num_heads // self.layers[0].self_attn.num_kv_heads  # G

    def forward(self, input_ids: Tensor, position_ids: Tensor, slots: Tensor | None = None) -> Tensor:
        """input_ids and position_ids [B,T] int32 -> hidden states after the last norm [B,T,E]."""
        x = self.embed_tokens(input_ids)  # B T E
        cos, sin = (table[:, None] for table in self.rotary_emb(x, position_ids))  # B 1 T D
        if slots is None:
            slots = torch.arange(self.sequence_length, dtype=torch.int32, device=x.device)  # S
        queries = position_ids[:, None].expand(-1, self.groups, -1).flatten(1)  # B G*T: the query heads of a KV head
        mask = (slots <= queries[..., None])[:, None]  # B 1 G*T S: a token sees itself and what came before
        for layer in self.layers:
            x = layer(x, cos, sin, mask, position_ids)
        return self.norm(x)


class LlamaForCausalLM(nn.Module):
    """Beside HF's `LlamaForCausalLM`.

    Differs: lm_head is sharded by vocabulary, padded until tp divides it; the greedy choice takes one (value, index)
    pair from each rank instead of its logits.
    """

    def __init__(self, config: LlamaConfig, neuron_config: NeuronConfig, attn="eager", backend="torch") -> None:
        super().__init__()
        self.config, self.neuron_config = config, neuron_config
        parallel = sys.modules[__name__]  # where parallel layers come from: this file, or NxD, by the same five names
        if backend == "nxd":
            from neuronx_distributed.parallel_layers import layers as parallel
        self.model = LlamaModel(config, neuron_config, attn, parallel)
        kwargs = {"bias": False, "gather_output": False, "dtype": neuron_config.torch_dtype, "pad": True}
        self.lm_head = parallel.ColumnParallelLinear(config.hidden_size, config.vocab_size, **kwargs)
        self.gather = parallel.gather_from_tensor_model_parallel_region
        self.rank_util = parallel.SPMDRank(neuron_config.tp_degree)
        self.packs = False  # whether decoding begins with `pack_weights`

    def forward(
        self, input_ids: Tensor, position_ids: Tensor, last: Tensor | None = None, slots: Tensor | None = None
    ) -> Tensor:
        """input_ids and position_ids [B,T] int32 -> float32 logits [B,T,V] of every position, the same on every rank;
        with `last` [B] int32 -> int32 [B], the greedy choice at position `last` of each row. `slots` int32 [S] counts
        the first slots of the cache, to which attention keeps (`cache_slots`); without it, it reads the whole cache."""
        hidden_states = self.model(input_ids, position_ids, slots)  # B T E
        if last is None:
            return self.gather(self.lm_head(hidden_states))[..., : self.config.vocab_size].float()
        index = last[:, None, None].expand(-1, 1, hidden_states.shape[-1]).long()  # B 1 E
        return self.greedy(hidden_states.gather(1, index).squeeze(1))

    def greedy(self, hidden_states: Tensor) -> Tensor:
        """[B,E] -> int32 [B]: the first index of the largest logit, as argmax over gathered logits finds it."""
        logits = self.lm_head(hidden_states).float()  # B V/tp
        first = self.rank_util.get_rank() * logits.shape[-1]
        vocabulary = first + torch.arange(logits.shape[-1], dtype=torch.int32, device=logits.device)  # V/tp
        inside = vocabulary < torch.full_like(vocabulary, self.config.vocab_size)  # torch-xla takes a number as int64
        # the padding's logits are 0, which would win where all others are negative
        value, index = torch.where(inside, logits, -1e9).max(dim=-1)  # B
        # float32 holds every index below 2^24, so that one collective carries both
        pair = torch.stack((value, (index.int() + first).float()), dim=-1)  # B 2
        values, indices = self.gather(pair).unflatten(-1, (-1, 2)).unbind(-1)  # B tp
        return indices.gather(-1, values.argmax(-1, keepdim=True)).squeeze(-1).int()


# -------------------------------------------------------------------------------------------------------------- loading


def shares_embedding(config: LlamaConfig, neuron: NeuronConfig) -> bool:
    """Whether a rank's embed_tokens.weight serves as its lm_head.weight: tied, and sharded in the same way."""
    return config.tie_word_embeddings and (neuron.tp_degree == 1 or neuron.vocab_parallel)


def shard_path(ckpt: str | Path, rank: int) -> Path:
    """A rank's file, under NxD's name."""
    return Path(ckpt) / f"tp{rank}_sharded_checkpoint.safetensors"


def open_shard(path: Path) -> safe_open:
    """A safetensors file, memory-mapped. Raises UsageError where it is absent or damaged."""
    rule = "convert again with convert_weights.py"
    require(path.exists(), f"{path} not found: {rule}")
    try:
        return safe_open(path, "pt")
    except (OSError, SafetensorError) as error:
        raise UsageError(f"{path} cannot be read, {rule}: {error}") from None


def read_state(
    ckpt: str | Path, config: LlamaConfig, neuron: NeuronConfig, rank: int, apart: bool = False
) -> Iterator[tuple[str, Tensor]]:
    """Yields a rank's tensors in `neuron.torch_dtype`, by the names of `LlamaForCausalLM`; memory-mapped where that is
    the file's, with `apart` each by a mapping of its own, whose pages go with it.

    Raises UsageError for what is wrong with the files.
    """
    embedding, shared = "model.embed_tokens.weight", shares_embedding(config, neuron)
    if is_converted(ckpt):
        path = shard_path(ckpt, rank)
        file = open_shard(path)
        tensors = ((n, (open_shard(path) if apart else file).get_tensor(n)) for n in file.keys())
    else:
        from convert_weights import open_checkpoint, shard_checkpoint  # here, because it imports this file

        tensors = shard_checkpoint(open_checkpoint(ckpt, config), config, neuron, rank)
    for name, tensor in tensors:
        tensor = tensor.to(neuron.torch_dtype) if tensor.is_floating_point() else tensor
        yield name, tensor
        if shared and name == embedding:
            yield "lm_head.weight", tensor


def pack_weights(model: LlamaForCausalLM) -> None:
    """Puts the layers' bfloat16 weights, one after another, into the layout that oneDNN's kernels read.

    Not before there is a first token, for which it would not pay. lm_head stays as it is: its copy, the largest of all,
    would have to be made while all the rest is in memory. The seconds count as loading.
    """
    start = time.perf_counter()
    for module in model.model.layers.modules():
        if isinstance(module, (ColumnParallelLinear, RowParallelLinear)):
            packed = torch.ops.mkldnn._reorder_linear_weight(module.weight.data, 1)
            module.weight = nn.Parameter(packed, requires_grad=False)
    model.packs, model.pack_s = False, time.perf_counter() - start


def load_model(
    ckpt: str | Path,
    *,
    tp_degree: int = 1,
    tp_rank: int = 0,
    dtype: torch.dtype | None = None,
    batch_size: int = 1,
    sequence_length: int | None = None,
    device: str = "cpu",
    attn: str = "eager",
) -> LlamaForCausalLM:
    """One rank's model, from what `convert_weights.py` wrote or from an HF directory, of which it reads its slices.

    With tp_degree > 1 the default process group has to have as many ranks. dtype and sequence_length default to those
    of `neuron_config.json`, else to the checkpoint's dtype and 2048 or `rope_limit`. On another device than the CPU the
    model is compiled when it is called: one graph for each prefill bucket in use, and one for decoding. On a CPU that
    has bfloat16 kernels, the layers' bfloat16 weights are packed before the first decoding (`pack_weights`), unless
    `compile_decode` takes them as they are. Raises UsageError for what is wrong with the files, ValueError where the
    process group does not fit.
    """
    config = LlamaConfig.from_pretrained(ckpt)
    flags = {"tp_degree": tp_degree, "batch_size": batch_size, "sequence_length": sequence_length, "torch_dtype": dtype}
    neuron = NeuronConfig.for_checkpoint(ckpt, config, **flags)
    if get_tensor_model_parallel_size() != tp_degree:
        raise ValueError(f"tp_degree {tp_degree}, but the process group has {get_tensor_model_parallel_size()} ranks")
    model = LlamaForCausalLM(config, neuron if device == "cpu" else neuron.with_buckets(), attn)
    if device == "cpu" and neuron.torch_dtype == torch.bfloat16 and torch.backends.mkldnn.is_available():
        model.packs = torch.ops.mkldnn._is_mkldnn_bf16_supported()  # mkldnn: torch's name for oneDNN
    state = dict(read_state(ckpt, config, neuron, tp_rank, apart=model.packs))
    try:
        model.load_state_dict(dict(model.named_buffers()) | state, assign=True)
    except RuntimeError as error:
        reason = " ".join(str(error).split())
        raise UsageError(f"{shard_path(ckpt, tp_rank)} does not fit config.json, convert again: {reason}") from None
    model = model.eval().to(device)
    if device == "cpu":
        # a block of nearly 32 MiB, made and freed: from then on glibc keeps blocks of that size instead of getting them
        # from the system page by page each time. 1.11 -> 0.99 s (sdpa), 2.4 -> 1.8 s (eager) for 1024 tokens of prompt
        torch.empty(31 << 20, dtype=torch.uint8)
    else:
        model.compile(backend=device, fullgraph=True, dynamic=False)
    return model


# ----------------------------------------------------------------------------------------------------------- generation


def check_prompts(prompts: list[list[int]], config: LlamaConfig, neuron: NeuronConfig) -> None:
    """Raises UsageError for prompts that the static batch or the cache cannot take, or ids outside the vocabulary."""
    fits = 0 < len(prompts) <= neuron.batch_size
    require(fits, f"{len(prompts)} prompts do not fit --batch-size {neuron.batch_size}: raise it to {len(prompts)}")
    for number, prompt in enumerate(prompts, start=1):
        room = f"which leaves no room in --sequence-length {neuron.sequence_length}: raise it, or shorten the prompt"
        require(prompt, f"prompt {number} is empty: give it at least one token")
        require(len(prompt) < neuron.sequence_length, f"prompt {number} has {len(prompt)} tokens, {room}")
        largest = max(neuron.context_encoding_buckets, default=len(prompt))
        fits = neuron.prefill_chunk_size or len(prompt) <= largest
        rule = f"context_encoding_buckets end at {largest}: add one to neuron_config.json, or set prefill_chunk_size"
        require(fits, f"prompt {number} has {len(prompt)} tokens, {rule}")
        wrong = [token for token in prompt if not 0 <= token < config.vocab_size]
        require(not wrong, f"prompt {number}: token id {wrong[:1]} is outside the vocabulary of {config.vocab_size}")


def cache_slots(tokens: int, sequence_length: int) -> Tensor:
    """As many cache slots as decoding reads for a text of `tokens`: a power of two, 128 at least, but not past the
    cache.

    Cost follows the text and not the cache. Fewer than 16 slots are taken as they are: torch adds up a softmax shorter
    than a vector register in another order, and here HF's bits are kept.
    """
    bucket = tokens if tokens < 16 else max(128, 1 << (tokens - 1).bit_length())
    return torch.arange(min(bucket, sequence_length), dtype=torch.int32)


def next_tokens(
    model: LlamaForCausalLM, ids: Tensor, positions: Tensor, last: Tensor, logits: list[Tensor] | None, **slots: Tensor
) -> list[int]:
    """The greedy choice at `last` [B] of ids and positions [B,T]: prefill at T > 1, in chunks if so configured, decode
    at T = 1. A list given as `logits` receives float32 [B,T,V]."""
    size = model.neuron_config.prefill_chunk_size or ids.shape[1]
    device = next(model.parameters(), ids).device  # an NxDModel shows no parameters, and takes what is on the host
    outputs: list[Tensor] = []
    # inference_mode is faster, but makes a KV cache of another kind than the first, for which a graph was compiled
    with torch.no_grad() if model.neuron_config.context_encoding_buckets else torch.inference_mode():
        for chunk, at in zip(ids.split(size, dim=1), positions.split(size, dim=1), strict=True):
            here = [] if logits is not None else [(last - len(outputs) * size).clamp(0, size - 1).int().to(device)]
            outputs.append(model(chunk.to(device), at.to(device), *here, **slots).cpu())
    rows = torch.arange(len(ids))
    if logits is None:  # of the choices made in each chunk, the one of the chunk where the row ends
        return torch.stack(outputs, dim=1)[rows, last // size].tolist()
    logits.append(torch.cat(outputs, dim=1))
    return logits[-1][rows, last].argmax(-1).tolist()


def greedy_steps(
    model: LlamaForCausalLM,
    prompts: list[list[int]],
    max_new_tokens: int,
    eos_token_ids: tuple[int, ...] | list[int],
    logits: list[Tensor] | None = None,
) -> Iterator[list[int | None]]:
    """Greedy decoding: at each step the new id of each prompt, None where it has ended.

    A text ends with an EOS id, with max_new_tokens, or where prompt and new ids fill the cache. Prompts are padded on
    the right to the longest, and on to a prefill bucket or whole chunks where there are such. The batch is static: rows
    that ended, and rows without a prompt, are computed and not looked at. A list given as `logits` receives what was
    computed: float32 [B,P,V] for the prompts, padding and all, then [B,1,V] for each token. Raises UsageError for
    prompts that `check_prompts` refuses.
    """
    neuron = model.neuron_config
    check_prompts(prompts, model.config, neuron)
    rows = prompts + [[0]] * (neuron.batch_size - len(prompts))
    room = [min(max_new_tokens, neuron.sequence_length - len(prompt)) for prompt in prompts]
    longest = max(map(len, rows))
    length = neuron.prefill_length(longest)
    ids = torch.tensor([row + [0] * (length - len(row)) for row in rows], dtype=torch.int32)  # B P
    positions = torch.arange(length, dtype=torch.int32).clamp(max=neuron.sequence_length - 1).expand_as(ids)  # B P
    last = torch.tensor([len(row) - 1 for row in rows])  # B, then zeros: T is 1 while decoding
    ends = (last + 1).int()  # B: the first free slot of each row
    slots, fixed = torch.arange(min(length, neuron.sequence_length), dtype=torch.int32), neuron.context_encoding_buckets
    step = 0
    while step < max(room):
        if step == 1 and getattr(model, "packs", False):  # an NxDModel does not know of it
            pack_weights(model)
        # graphs of fixed shape (buckets tell) attend to the whole cache
        new = next_tokens(model, ids, positions, last, logits, **{} if fixed else {"slots": slots})
        yield [token if step < left else None for token, left in zip(new, room, strict=False)]
        room = [min(left, step + 1) if token in eos_token_ids else left for token, left in zip(new, room, strict=False)]
        ids, last = torch.tensor(new, dtype=torch.int32)[:, None], torch.zeros_like(last)  # B 1
        positions = (ends + step).clamp(max=neuron.sequence_length - 1)[:, None]  # B 1: an ended row stays in the cache
        step += 1
        slots = cache_slots(longest + step, neuron.sequence_length)


def generate(
    model: LlamaForCausalLM, prompts: list[list[int]], max_new_tokens: int, eos_token_ids: tuple[int, ...] | list[int]
) -> list[list[int]]:
    """The new ids of each prompt, the EOS id included where one ended it: `greedy_steps`, collected."""
    steps = greedy_steps(model, prompts, max_new_tokens, eos_token_ids)
    return [[token for token in row if token is not None] for row in zip(*steps, strict=True)]


# ------------------------------------------------------------------------------------------------------------- backends


def digest(*depends: object) -> str:
    """Twelve digits, for a file's name, that change with what compiled code depends on; this file is a part of it."""
    return hashlib.sha256(to_json([*depends, Path(__file__).read_text()]).encode()).hexdigest()[:12]


class Stateless(nn.Module):
    """A module as a function of its weights and buffers too, for `torch.export`."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.call = partial(torch.func.functional_call, module)  # kept in here, it is no submodule that has weights

    def forward(self, state: dict[str, Tensor], inputs: tuple[Tensor, ...]) -> Tensor:
        return self.call(state, inputs)


def compile_module(number: int, jobs: list[tuple[nn.Module, tuple, Path]], scratch: str) -> None:
    """Compiles a module for such inputs into a file, in a process of its own, with which the memory for it goes."""
    module, inputs, file = jobs[number]
    options = {
        # a normed row is kept, not computed again for every row of Wqkv, gate and up: 0.9 x the time of a token
        "realize_reads_threshold": 1,
        "realize_opcount_threshold": 8,
        "cpp.threads": torch.get_num_threads(),
        "cpp.vec_isa_ok": True,  # what the CPU says of its vectors is believed, not tried in six processes
        "aot_inductor.precompile_headers": False,  # which would pay from the third file on
        "aot_inductor.output_path": scratch,
    }
    torch.set_num_threads(1)  # the other threads were not forked
    warnings.simplefilter("ignore", FutureWarning)  # torch's, about itself
    weights, any_number = dict(module.named_parameters()), torch.export.Dim.AUTO
    # of more slots than the mask's two, which torch would take for all there are, and than one, which it would not vary
    caches = {name: F.pad(cache, (0, 0, 0, 2)) for name, cache in module.named_buffers()}
    state_shapes = {name: {2: any_number} if name in caches else None for name in weights | caches}
    input_shapes = tuple({3: any_number} if x.dtype == torch.bool else None for x in inputs)  # the mask
    arguments = weights | caches, inputs
    with torch.no_grad():
        exported = torch.export.export(Stateless(module), arguments, dynamic_shapes=(state_shapes, input_shapes))
        made = Path(torch._inductor.aot_compile(exported.module(), arguments, options=options))
    if made.with_suffix(".json").exists():  # of the ops in it that are not torch's: `exchange`
        os.replace(made.with_suffix(".json"), file.with_suffix(".json"))
    os.replace(made, file)  # the last: where it is, all is


def compile_decode(model: LlamaForCausalLM) -> None:
    """--compile on a CPU: from here on decoder layers and lm_head are Inductor's where they get one token of each row;
    prefill stays eager.

    They are compiled ahead of time, as for Neuron; one layer's code serves all layers, and every length of text and of
    cache. It is kept in TORCHINDUCTOR_CACHE_DIR, or ~/.cache/llama_neuron; where it is there already, nothing of the
    compiler is imported. Raises UsageError where that directory cannot be written, ValueError where weights are packed
    or ranks exchange through gloo.
    """
    start = time.perf_counter()
    config, neuron, layers, lm_head = model.config, model.neuron_config, model.model.layers, model.lm_head
    if layers[0].mlp.down_proj.weight.is_mkldnn:
        raise ValueError("compile_decode reads weights as they are: call it before the model has decoded anything")
    if neuron.tp_degree > 1 and not SharedMemory.joined:
        # compiled code holds Python's lock while it waits for gloo, whose threads wait for that lock
        raise ValueError("compile_decode needs ranks that exchange through memory: start them with start_ranks")
    x = torch.zeros(neuron.batch_size, 1, config.hidden_size, dtype=neuron.torch_dtype)  # B 1 E
    # lm_head gets one row in float32, and gives what it adds up: rounding the logits would double the divergence
    head_x = x.float() if neuron.batch_size == 1 else x
    position_ids = torch.zeros(neuron.batch_size, 1, dtype=torch.int32)  # B 1
    cos, sin = (table[:, None] for table in model.model.rotary_emb(x, position_ids))  # B 1 1 D
    mask = torch.ones(neuron.batch_size, 1, model.model.groups, 2, dtype=torch.bool)  # B 1 G S
    machine = torch.__version__, sorted(torch.cpu.get_capabilities().items()), torch.get_num_threads()
    name = digest(asdict(config), asdict(replace(neuron, sequence_length=1)), *machine)
    folder = Path(os.environ.get("TORCHINDUCTOR_CACHE_DIR", "~/.cache/llama_neuron")).expanduser()
    files = [folder / f"decode-{name}-{module}.so" for module in ("layer", "lm_head")]
    if model.rank_util.get_rank() == 0 and not all(file.exists() for file in files):
        jobs = [(layers[0], (x, cos, sin, mask, position_ids), files[0]), (lm_head, (head_x,), files[1])]
        try:
            folder.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryDirectory(dir=folder) as scratch:
                mp.start_processes(compile_module, (jobs, scratch), nprocs=len(jobs), start_method="fork")
        except OSError as error:
            raise UsageError(f"--compile keeps code in {folder}, set TORCHINDUCTOR_CACHE_DIR: {error}") from None
    if neuron.tp_degree > 1:
        dist.barrier()
    # the class beneath torch._inductor.aoti_load_package, which would import the compiler: 2 s and 120 MB
    layer_code, head_code = (torch._C._aoti.AOTIModelContainerRunnerCpu(str(file), 1).run for file in files)
    for module, code, one in (*((layer, layer_code, x) for layer in layers), (lm_head, head_code, head_x)):
        state = [*module.parameters(), *module.buffers()]
        module.forward = partial(compiled_forward, code, state, one, module.forward)
    model.packs, model.compile_s = False, time.perf_counter() - start


def compiled_forward(
    code: Callable, state: list[Tensor], one: Tensor, eager: Callable, x: Tensor, *inputs: Tensor
) -> Tensor:
    """What a module's forward becomes: compiled where x has one token of each row, [B,1,E] or [B,E], else as it was."""
    if x.numel() > one.numel():
        return eager(x, *inputs)
    return code([*state, x.to(one.dtype).view(one.shape), *inputs])[0].view(*x.shape[:-1], -1)


def choose_backend(args: argparse.Namespace) -> None:
    """Makes `backend` and `device` definite, by what is installed; `why` tells the reason if backend is auto.

    `nxd` is neuronx-distributed on torch-xla (Trn1, Inf2). `torch` is plain torch, on a CPU or on TorchNeuron (Trn2,
    Trn3), whose package is named torch_neuronx like the one that NxD builds on, but comes without torch_xla.
    """
    nxd, xla, neuronx = (find_spec(name) for name in ("neuronx_distributed", "torch_xla", "torch_neuronx"))
    found = "nxd" if nxd and xla else "torch" if neuronx and not xla else None
    why = "neither neuronx_distributed nor TorchNeuron is installed"
    if found:
        native = "TorchNeuron is installed (torch_neuronx without torch_xla)"
        why = "neuronx_distributed is installed" if nxd else native
    usable = found and args.backend in ("auto", found)
    args.device = args.device or ("neuron" if usable or args.backend == "nxd" else "cpu")
    reason = "as asked" if found and args.device == "cpu" else why
    args.why = reason if args.backend == "auto" else None
    if args.device == "cpu":
        require(args.backend != "nxd", "--backend nxd compiles for Neuron devices: leave out --device cpu")
        args.backend = "torch"
    else:
        way_out = "see `On Neuron` in README.md for what to install, or take --device cpu"
        require(usable, f"--backend {args.backend} on a Neuron device is not to be had here, {why}: {way_out}")
        args.backend = found


@contextmanager
def stdout_to_stderr() -> Iterator[None]:
    """Stdout belongs to the result: what gloo, NxD or the compiler reports there meanwhile goes to stderr."""
    sys.stdout.flush()
    stdout = os.dup(1)
    os.dup2(2, 1)
    try:
        yield
    finally:
        sys.stdout.flush()
        os.dup2(stdout, 1)
        os.close(stdout)


@stdout_to_stderr()
def compile_nxd(ckpt: str, config: LlamaConfig, neuron: NeuronConfig, attn: str, output_logits: bool) -> nn.Module:
    """All ranks' model on this host's NeuronCores; called as `LlamaForCausalLM`, without `last` if `output_logits`.

    One process traces each graph once, as rank 0: decoding, and the prefill buckets or the chunk. The compiled graphs
    are kept beside the shards, under a name that tells their shapes and a digest of what they depend on.
    """
    try:
        import torch_neuronx
        from neuronx_distributed import ModelBuilder, NxDModel, NxDParallelState
    except ImportError as error:  # such as from a placeholder of that name
        raise UsageError(f"--backend nxd: {error}: see `On Neuron` in README.md for what to install") from None
    neuron = neuron.with_buckets()
    start, tp, B = time.perf_counter(), neuron.tp_degree, neuron.batch_size
    lengths = (neuron.prefill_chunk_size,) if neuron.prefill_chunk_size else neuron.context_encoding_buckets
    with NxDParallelState(world_size=tp, tensor_model_parallel_size=tp) as state:
        compiler_args = f"--auto-cast=none --model-type=transformer --lnc={state.lnc_size}"
        platform = torch_neuronx.utils.get_platform_target(), torch_neuronx.__version__
        depends = digest(asdict(config), asdict(neuron), attn, output_logits, compiler_args, *platform)
        shapes = f"tp{tp}-b{B}-s{neuron.sequence_length}-p{'.'.join(map(str, lengths))}"
        path = Path(ckpt) / f"nxd-{shapes}-{'logits' if output_logits else 'ids'}-{depends}.pt"
        if path.exists():
            compiled = NxDModel.load(str(path))
        else:
            builder = ModelBuilder(LlamaForCausalLM(config, neuron, attn, backend="nxd").eval())
            for T in sorted({1, *lengths}):
                inputs = {name: torch.zeros(B, T, dtype=torch.int32) for name in ("input_ids", "position_ids")}
                inputs |= {} if output_logits else {"last": torch.zeros(B, dtype=torch.int32)}
                builder.trace(kwargs=inputs, tag=f"prefill_{T}" if T > 1 else "decode")
            compiled = builder.compile(compiler_args=compiler_args)
            compiled.save(str(path))
    compiled.config, compiled.neuron_config, compiled.compile_s = config, neuron, time.perf_counter() - start
    # to a graph, inv_freq and a tied lm_head are weights of their own
    inv_freq = {"model.rotary_emb.inv_freq": RotaryEmbedding.from_config(config).inv_freq}
    compiled.set_weights([dict(read_state(ckpt, config, neuron, rank)) | inv_freq for rank in range(tp)])
    compiled.to_neuron()
    return compiled


# ----------------------------------------------------------------------------------------------------------------- plan

# gigabytes of a NeuronCore (of trn2: a logical one, LNC 2), and the tp_degrees whose collectives the instances have
INSTANCES = {"trn1": (16, (1, 2, 8, 16, 32)), "inf2": (16, (1, 2, 4, 8, 24)), "trn2": (24, (1, 2, 4, 8, 16, 32, 64))}


def count_numbers(config: LlamaConfig, neuron: NeuronConfig) -> tuple[int, int, int]:
    """How many numbers a rank holds: in its weights, in its embedding table (one of them), and in its KV cache."""
    tp, hidden, head_dim, layers = neuron.tp_degree, config.hidden_size, config.head_dim, config.num_hidden_layers
    query, key = map(len, shard_heads(config.num_attention_heads, config.num_key_value_heads, tp)[0])
    inner, vocabulary = -(-config.intermediate_size // tp), -(-config.vocab_size // tp)
    table = vocabulary * hidden if neuron.vocab_parallel else config.vocab_size * -(-hidden // tp)
    head = 0 if shares_embedding(config, neuron) else vocabulary * hidden
    biases = config.attention_bias * ((query + 2 * key) * head_dim + hidden) + config.mlp_bias * (2 * inner + hidden)
    layer = 2 * (query + key) * head_dim * hidden + 3 * inner * hidden + 2 * hidden + biases
    cache = 2 * layers * neuron.batch_size * key * neuron.sequence_length * head_dim
    return table + layers * layer + hidden + head, table, cache


def plan(config: LlamaConfig, neuron: NeuronConfig) -> dict:
    """What --plan tells of one tp_degree: heads and bytes of a rank, but zero heads, padding (bytes of all zeros) and
    replicated bytes (of copies) of all ranks. `fits` is None where an instance has no such tp_degree."""
    tp, hidden, layers = neuron.tp_degree, config.hidden_size, config.num_hidden_layers
    heads, kv_heads = config.num_attention_heads, config.num_key_value_heads
    query, key = (sum(map(len, ranks)) for ranks in zip(*shard_heads(heads, kv_heads, tp), strict=True))
    zero_kv_heads = query - heads if tp % kv_heads and kv_heads % tp else 0
    weights, _, cache = count_numbers(config, neuron)
    whole = (2 + config.attention_bias + config.mlp_bias) * hidden  # of a layer: norms, biases added after a reduction
    copies = (tp - 1) * (layers * whole + hidden)
    copies += layers * (key - zero_kv_heads - kv_heads) * 2 * config.head_dim * (hidden + config.attention_bias)
    copies += config.vocab_size * hidden * (config.tie_word_embeddings and not shares_embedding(config, neuron))
    padding = tp * weights - count_numbers(config, replace(neuron, tp_degree=1))[0] - copies
    size = neuron.torch_dtype.itemsize
    total = (weights + cache) * size
    return {
        "tp_degree": tp,
        "strategy": "CONVERT_TO_MHA" if tp % kv_heads else "REPLICATE_TO_TP_DEGREE",
        "query_heads": query // tp,
        "kv_heads": key // tp,
        "zero_heads": query - heads + zero_kv_heads,
        "weight_bytes": weights * size,
        "kv_cache_bytes": cache * size,
        "replicated_bytes": copies * size,
        "padding_bytes": padding * size,
        "fits": {name: total <= gb * 1e9 if tp in degrees else None for name, (gb, degrees) in INSTANCES.items()},
    }


def show_plan(args: argparse.Namespace) -> None:
    """--plan: from config.json alone, a line for each tp_degree, or with --json a list of objects."""
    config = LlamaConfig.from_pretrained(args.ckpt)
    flags = {"batch_size": args.batch_size, "sequence_length": args.sequence_length}
    neuron = NeuronConfig.for_checkpoint(args.ckpt, config, torch_dtype=DTYPES.get(args.dtype), **flags)
    every = sorted({tp for _, degrees in INSTANCES.values() for tp in degrees})
    rows = [plan(config, replace(neuron, tp_degree=tp)) for tp in args.tp or every]
    if args.json:
        return print(to_json(rows))
    instances = [f"{name} {gb} GB" for name, (gb, _) in INSTANCES.items()]
    print("tp_degree               strategy" + "".join(f"{key:>18}" for key in [*rows[0]][2:-1] + instances))
    for row in rows:
        cells = [f"{row[key] / 1e9:.3f} GB" if "bytes" in key else row[key] for key in [*row][2:-1]]
        cells += [{True: "fits", False: "too large", None: "-"}[fit] for fit in row["fits"].values()]
        print(f"{row['tp_degree']:9}{row['strategy']:>23}" + "".join(f"{cell:>18}" for cell in cells))


# --------------------------------------------------------------------------------------------------------- command line


def positive(text: str) -> int:
    """argparse type of a count."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a positive integer")
    return int(text)


def degrees(text: str) -> list[int]:
    """argparse type of --tp."""
    return [positive(degree) for degree in text.split(",")]


def token_ids(text: str) -> list[int]:
    """argparse type of --prompt-ids."""
    try:
        return [int(token) for token in text.split(",")]
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not a list of token ids like 1,2,3") from None


class ArgumentParser(argparse.ArgumentParser):
    def error(self, message: str) -> None:
        raise UsageError(f"{message}; --help tells more")  # one line, without argparse's usage


def parse_args() -> argparse.Namespace:
    parser = ArgumentParser(description="Llama, greedy, computed as on AWS Neuron.")
    add = parser.add_argument
    add("--ckpt", required=True, metavar="DIR", help="what convert_weights.py wrote, or an HF directory as it is")
    add("--tp", type=degrees, metavar="N", help="tensor-parallel ranks (default: as converted, else 1)")
    add("--prompt", dest="prompts", action="append", metavar="TEXT", help="repeat for a batch; default: standard input")
    add("--prompt-ids", dest="prompts", action="append", type=token_ids, metavar="1,2,3", help="instead of text")
    add("--max-new-tokens", type=positive, default=64, metavar="M", help="default: %(default)s")
    add("--batch-size", type=positive, metavar="B", help="rows of the static batch (default: enough for the prompts)")
    add("--sequence-length", type=positive, metavar="S", help="prompt and new tokens (default: as converted, or 2048)")
    add("--dtype", choices=DTYPES, help="default: as converted, else the checkpoint's")
    add("--attn", choices=ATTENTION, default="eager", help="default: %(default)s, HF's order of operations")
    add("--compile", action="store_true", help="on a CPU: decode by Inductor's code, several times as fast")
    add("--backend", choices=("auto", "torch", "nxd"), default="auto", help="default: by what is installed, else torch")
    add("--device", choices=("cpu", "neuron"), help="default: neuron where its packages are installed, else cpu")
    add("--ignore-eos", action="store_true", help="go on to --max-new-tokens")
    add("--json", action="store_true", help="print one JSON object instead of text")
    add("--output-logits", metavar="FILE", help="write the logits of every position and the ids to a safetensors file")
    add("--plan", action="store_true", help="of config.json alone: what each --tp (8,16,32) takes of a NeuronCore")
    args = parser.parse_args()
    if not args.plan and args.tp:
        require(len(args.tp) == 1, "--tp takes more than one number with --plan only: name one")
        args.tp = args.tp[0]
    return args


class Text:
    """Ids to text and back with DIR/tokenizer.json; without one, ids are shown as they are."""

    def __init__(self, ckpt: str) -> None:
        self.tokenizer, path = None, Path(ckpt) / "tokenizer.json"
        if path.exists():
            from tokenizers import Tokenizer

            try:
                self.tokenizer = Tokenizer.from_file(str(path))
            except Exception as error:  # the class that it raises
                raise UsageError(f"{path} cannot be read, save it again with transformers: {error}") from None

    def encode(self, prompt: str | list[int]) -> list[int]:
        if isinstance(prompt, list):
            return prompt
        way_out = "give --prompt-ids, or save one with transformers"
        require(self.tokenizer, f"no tokenizer.json beside config.json: {way_out}")
        return self.tokenizer.encode(prompt).ids

    def decode(self, ids: list[int]) -> str:
        return self.tokenizer.decode(ids) if self.tokenizer else " ".join(map(str, ids))

    def stream(self) -> Callable[[int], None]:
        """A function that prints a text token by token; bytes of an unfinished character wait for the rest."""
        if self.tokenizer is None:
            return lambda token: print(token, end=" ", flush=True)
        from tokenizers.decoders import DecodeStream

        decoder = DecodeStream(skip_special_tokens=True)
        return lambda token: print(decoder.step(self.tokenizer, token) or "", end="", flush=True)


def read_prompts(args: argparse.Namespace) -> list[list[int]]:
    """Token ids of --prompt and --prompt-ids, else of piped standard input, else of a built-in sentence.

    Leaves the `Text` that it read in `args.text`, for the rank that shows the result.
    """
    try:
        piped = "" if args.prompts or sys.stdin is None or sys.stdin.isatty() else sys.stdin.read().strip()
    except UnicodeDecodeError as error:
        raise UsageError(f"standard input is no text, give --prompt or --prompt-ids: {error}") from None
    args.text = Text(args.ckpt)
    return [args.text.encode(prompt) for prompt in args.prompts or [piped or "The capital of France is"]]


def prepare(args: argparse.Namespace) -> None:
    """Checks what can be wrong with flags and files before any rank starts, and fills in what was left open."""
    config = LlamaConfig.from_pretrained(args.ckpt)
    flags = {"tp_degree": args.tp, "sequence_length": args.sequence_length, "batch_size": args.batch_size}
    neuron = NeuronConfig.for_checkpoint(args.ckpt, config, torch_dtype=DTYPES.get(args.dtype), **flags)
    if args.batch_size is None:
        neuron = replace(neuron, batch_size=max(neuron.batch_size, len(args.prompts)))
    if args.device == "neuron":
        neuron = neuron.with_buckets()
    if args.backend == "nxd":
        require(is_converted(args.ckpt), f"--backend nxd needs shards: convert {args.ckpt} with convert_weights.py")
        half = neuron.vocab_parallel and neuron.torch_dtype == torch.float16
        require(not half, f"{args.ckpt}: NxD's embedding sharded by vocabulary has no float16: --dtype bfloat16")
    args.config, args.neuron = config, neuron
    check_prompts(args.prompts, config, neuron)
    args.tp, args.batch_size = neuron.tp_degree, neuron.batch_size
    if is_converted(args.ckpt):
        for rank in range(args.tp):
            open_shard(shard_path(args.ckpt, rank))
    else:
        from convert_weights import open_checkpoint

        open_checkpoint(args.ckpt, config)
    if args.compile:
        require(args.device == "cpu", "--compile is for the CPU, a Neuron device has all compiled: leave it out")
        require(torch.__version__ >= "2.13", f"--compile needs torch 2.13, this is {torch.__version__}: leave it out")
        compiler = os.environ.get("CXX", "g++")
        require(which(compiler), f"--compile needs a C++ compiler, {compiler} is not there: install g++, or set CXX")
        alone = args.tp == 1 or not dist.is_initialized()
        require(alone, "--compile needs ranks that exchange through memory: start them with --tp, without torchrun")
    output = Path(args.output_logits or "logits.safetensors").resolve()
    require(
        output.parent.is_dir(),
        f"--output-logits {args.output_logits}: {output.parent} is not a directory, make it first",
    )
    require(not output.is_dir(), f"--output-logits {args.output_logits} is a directory, name a file")


def run(args: argparse.Namespace) -> None:
    """One rank's work, once its process group is there: load, generate, and on rank 0 show what came out."""
    clock = [time.perf_counter()]
    rank = dist.get_rank() if dist.is_initialized() else 0
    if args.backend == "nxd":
        model = compile_nxd(args.ckpt, args.config, args.neuron, args.attn, bool(args.output_logits))
    else:
        flags = {"dtype": DTYPES.get(args.dtype), "sequence_length": args.sequence_length, "device": args.device}
        flags |= {"tp_degree": args.tp, "batch_size": args.batch_size, "attn": args.attn}
        model = load_model(args.ckpt, tp_rank=rank, **flags)
        if args.compile:
            compile_decode(model)
    if args.why and rank == 0 and not args.json:
        print(f"backend {args.backend} on {args.device}: {args.why}", file=sys.stderr)
    eos = () if args.ignore_eos else args.config.eos_token_id
    # one text is shown as it is made; several would mix, and are shown at the end
    streams = rank == 0 and not args.json and len(args.prompts) == 1
    show = args.text.stream() if streams else lambda token: None
    for token in args.prompts[0]:
        show(token)
    logits: list[Tensor] | None = [] if args.output_logits else None
    completions: list[list[int]] = [[] for _ in args.prompts]
    clock.append(time.perf_counter())  # and the end of each step
    for step in greedy_steps(model, args.prompts, args.max_new_tokens, eos, logits):
        clock.append(time.perf_counter())
        for ids, token in zip(completions, step, strict=True):
            if token is not None:
                ids.append(token)
        show(completions[0][-1])
    timings = measure(model, args.prompts, completions, clock)
    del model  # and with it its memory
    timings["read_gb_per_s"] = read_bandwidth(args.tp) if args.device == "cpu" else None  # on all ranks at one time
    if rank != 0:
        return
    text = args.text
    if logits is not None:
        save_logits(args.output_logits, args.prompts, completions, logits)
    if args.json:
        rows = [
            {
                "prompt": text.decode(prompt),
                "prompt_ids": prompt,
                "ids": ids,
                "text": text.decode(ids),
                "finish_reason": "eos" if ids[-1] in eos else "length",
            }
            for prompt, ids in zip(args.prompts, completions, strict=True)
        ]
        config = {"backend": args.backend, "device": args.device, "attn": args.attn} | asdict(args.config)
        config |= asdict(args.neuron)
        print(to_json({"completions": rows, "timings": timings, "config": config}))
        return
    print(
        "" if streams else "\n\n".join(text.decode(p + ids) for p, ids in zip(args.prompts, completions, strict=True))
    )
    read, readable = timings["weight_gb_per_s"], timings["read_gb_per_s"]
    share = f" ({read / readable:.0%} of what it can read)" if readable else ""
    print(
        f"load {timings['load_s']:.2f} s, compile {timings['compile_s']:.2f} s,"
        f" prefill {timings['prefill_tokens']} tokens in {timings['prefill_s'] * 1e3:.0f} ms,"
        f" decode {timings['decode_tokens']} at {timings['decode_tokens_per_s']:.1f} tokens/s,"
        f" {read:.1f} GB/s of weights{share},"
        f" peak memory {timings['peak_rss_bytes'] / 1e9:.2f} GB",
        file=sys.stderr,
    )


def measure(
    model: LlamaForCausalLM, prompts: list[list[int]], completions: list[list[int]], clock: list[float]
) -> dict:
    """The `timings` of --json, in seconds and bytes; `clock` holds start, loaded, and the end of each step.

    A step reads every weight once, except an embedding table of which it only looks up rows.
    """
    neuron, (weights, table, _) = model.neuron_config, count_numbers(model.config, model.neuron_config)
    read = weights if shares_embedding(model.config, neuron) else weights - table
    pack_s = getattr(model, "pack_s", 0.0)  # a part of loading that waits for the first token
    weight_bytes = read * neuron.torch_dtype.itemsize * neuron.tp_degree
    compile_s = getattr(model, "compile_s", 0.0)
    tokens, decode_s = sum(len(ids) - 1 for ids in completions), clock[-1] - clock[2] - pack_s
    return {
        "load_s": clock[1] - clock[0] - compile_s + pack_s,
        "compile_s": compile_s,
        "prefill_s": clock[2] - clock[1],
        "prefill_tokens": sum(map(len, prompts)),
        "decode_s": decode_s,
        "decode_tokens": tokens,
        "decode_tokens_per_s": tokens / decode_s if tokens else 0.0,
        "weight_bytes_per_token": weight_bytes,
        "weight_gb_per_s": weight_bytes * (len(clock) - 3) / decode_s / 1e9 if tokens else 0.0,
        "peak_rss_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,  # of rank 0; Linux counts in KiB
    }


def read_bandwidth(ranks: int) -> float:
    """GB/s at which all ranks together add up numbers in memory: what bounds decoding on a CPU."""
    numbers, seconds = torch.ones((1 << 25) // ranks), []  # 128 MiB: several times what a cache holds
    for _ in range(3):
        start = time.perf_counter()
        numbers.sum()
        seconds.append(time.perf_counter() - start)
    return ranks * numbers.nbytes / min(seconds) / 1e9


def save_logits(file: str, prompts: list[list[int]], completions: list[list[int]], logits: list[Tensor]) -> None:
    """--output-logits: float32 `logits` [B,P+M-1,V], row p computed at position p, and `ids` [B,P+M]; zeros after."""
    from safetensors.torch import save_file

    texts = list(zip(prompts, completions, strict=True))
    rows = [
        torch.cat([logits[0][row, : len(prompt)], *(step[row] for step in logits[1 : len(ids)])])
        for row, (prompt, ids) in enumerate(texts)
    ]
    pad = partial(nn.utils.rnn.pad_sequence, batch_first=True)
    save_file({"logits": pad(rows), "ids": pad([torch.tensor(prompt + ids) for prompt, ids in texts])}, file)


def init_process_group(device: str, local_rank: int, **kwargs: str | int) -> None:
    """Joins the group: gloo, and on a Neuron device also that device's own backend, on this rank's core."""
    if device != "cpu":
        torch.accelerator.set_device_index(local_rank)
    with stdout_to_stderr():
        dist.init_process_group("gloo" if device == "cpu" else f"cpu:gloo,{device}:{device}", **kwargs)


def run_rank(
    rank: int, work: Callable[[], None], ranks: int, device: str, store: str, threads: int, *shared: object
) -> None:
    """One of the processes of `start_ranks`."""
    torch.set_num_threads(max(1, threads // ranks))
    if device == "cpu":
        SharedMemory(rank, *shared)
    init_process_group(device, rank, init_method=f"file://{store}", rank=rank, world_size=ranks)
    work()
    dist.destroy_process_group()


def start_ranks(work: Callable[[], None], ranks: int, device: str) -> None:
    """Does `work` in as many processes of one group, which share this process's threads, and waits for them."""
    with tempfile.TemporaryDirectory() as folder:
        # fork: torch is imported once; nothing has been computed yet, so that no thread gets lost
        job = (work, ranks, device, f"{folder}/store", torch.get_num_threads(), *SharedMemory.allocate(ranks))
        mp.start_processes(run_rank, job, nprocs=ranks, start_method="fork")


def run_torchrun(args: argparse.Namespace) -> None:
    """One of the processes that torchrun started."""
    require(args.backend != "nxd", "--backend nxd runs all ranks from one process: start it without torchrun")
    init_process_group(args.device, int(os.environ["LOCAL_RANK"]))
    ranks = dist.get_world_size()
    require(args.tp in (None, ranks), f"--tp {args.tp}, but torchrun started {ranks} ranks: make them equal")
    args.tp = ranks
    prompts = [read_prompts(args) if dist.get_rank() == 0 else None]  # standard input can be read once
    dist.broadcast_object_list(prompts, device=torch.device("cpu"))
    args.prompts = prompts[0]
    prepare(args)
    run(args)
    dist.destroy_process_group()


def main() -> None:
    """The command: here, in the processes that --tp starts here, or in those of torchrun."""
    args = parse_args()
    if args.plan:
        return show_plan(args)
    choose_backend(args)
    if "TORCHELASTIC_RUN_ID" in os.environ:
        return run_torchrun(args)
    args.prompts = read_prompts(args)
    prepare(args)
    if args.tp == 1 or args.backend == "nxd":
        return run(args)
    try:
        start_ranks(partial(exit_on_usage_error, partial(run, args)), args.tp, args.device)
    except mp.ProcessExitedException as error:
        sys.exit(error.exit_code)


def exit_on_usage_error(command: Callable[[], None]) -> None:
    """Runs a command; a user's mistake ends it with one line on stderr and exit code 2."""
    try:
        command()
    except UsageError as error:
        print(f"{Path(sys.argv[0]).name}: error: {error}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    sys.modules["llama_neuron"] = sys.modules["__main__"]  # convert_weights imports this file: not a second time
    exit_on_usage_error(main)
    gc.freeze()  # at exit Python would look through all that torch imports: 0.3 s

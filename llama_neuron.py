"""Llama inference as AWS Neuron computes it, in one file. Read it beside Hugging Face's `modeling_llama.py`.

A port to Neuron changes four things: layers are split over ranks (tensor parallelism), the KV cache has a fixed size,
every shape is known before the first token, and the rank is read from the checkpoint. Each class says which HF class it
stands beside, what differs, and why.

Shapes: B batch, T new tokens, S cache slots, E hidden size, H query heads and K key/value heads of one rank, G = H/K,
D head_dim, V vocabulary.
"""

from __future__ import annotations

import argparse
import hashlib
import inspect
import json
import os
import resource
import sys
import time
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, fields, replace
from functools import partial
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor, nn

# ---- configs


class UsageError(ValueError):
    """A user's mistake: names the file or flag, and says how to fix it."""


class ConfigFile:
    """A dataclass read from a JSON file that `convert_weights.py` has checked and completed."""

    @classmethod
    def from_pretrained(cls, directory: str | Path) -> ConfigFile:
        raw = json.loads(Path(directory, cls.file_name).read_text())
        return cls(**{field.name: raw[field.name] for field in fields(cls)})


@dataclass(frozen=True, kw_only=True)
class LlamaConfig(ConfigFile):
    """The keys of HF's `LlamaConfig` that inference reads."""

    file_name = "config.json"
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    hidden_act: str
    rms_norm_eps: float
    rope_parameters: dict  # in transformers 5's form
    attention_bias: bool  # on q, k, v and o_proj
    mlp_bias: bool
    tie_word_embeddings: bool
    eos_token_id: list[int]


@dataclass(frozen=True, kw_only=True)
class NeuronConfig(ConfigFile):
    """What a compiled graph fixes, by the keys of Optimum Neuron's `NxDNeuronConfig`."""

    file_name = "neuron_config.json"
    tp_degree: int = 1  # ranks
    batch_size: int = 1  # rows of the KV cache
    sequence_length: int = 2048  # slots of the KV cache: prompt and new tokens
    torch_dtype: str = "bfloat16"
    fused_qkv: bool = True  # always
    vocab_parallel: bool = False  # embed_tokens sharded by vocabulary, not hidden size
    context_encoding_buckets: list[int] | None = None  # None: powers of two from 128
    prefill_chunk_size: int | None = None  # tokens of a prompt read at a time; None: all
    max_sequence_length: int | None = None  # beyond it the model is another graph

    @property
    def dtype(self) -> torch.dtype:
        return getattr(torch, self.torch_dtype)

    def with_shape(self, batch_size: int | None, sequence_length: int | None) -> NeuronConfig:
        """With another cache. Raises UsageError beyond max_sequence_length."""
        length, limit = sequence_length or self.sequence_length, self.max_sequence_length
        if limit is not None and length > limit:
            raise UsageError(f"--sequence-length {length}: beyond {limit} this is another graph, use that")
        return replace(self, batch_size=batch_size or self.batch_size, sequence_length=length)

    def prefill_lengths(self) -> list[int]:
        """The lengths in which static graphs read prompts."""
        if self.prefill_chunk_size is not None:
            return [self.prefill_chunk_size]
        sizes = self.context_encoding_buckets or [128, 256, 512, 1024, 2048, 4096, 8192, 16384, 32768, 65536]
        return [*(size for size in sizes if size < self.sequence_length), self.sequence_length]


# ---- RMSNorm, rotary embedding


def empty_parameter(*shape: int, dtype: torch.dtype) -> nn.Parameter:
    return nn.Parameter(torch.empty(*shape, dtype=dtype), requires_grad=False)


class LlamaRMSNorm(nn.Module):
    """HF's `LlamaRMSNorm`, unchanged, whole on every rank (Zhang and Sennrich 2019, arXiv:1910.07467): x /
    sqrt(mean(x^2) + eps) * weight, cast back from float32 before the weight."""

    def __init__(self, hidden_size: int, eps: float, dtype: torch.dtype):
        super().__init__()
        self.weight = empty_parameter(hidden_size, dtype=dtype)
        self.variance_epsilon = eps

    def forward(self, hidden_states: Tensor) -> Tensor:
        x = hidden_states.to(torch.float32)
        x = x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.variance_epsilon)
        return self.weight * x.to(hidden_states.dtype)


class NeuronRMSNorm(LlamaRMSNorm):
    """The same as a kernel of Neuron's compiler, for NxD, which casts back after the weight."""

    def forward(self, hidden_states: Tensor) -> Tensor:
        from torch_neuronx.xla_impl.ops import RmsNorm

        x = hidden_states.to(torch.float32)
        return RmsNorm.apply(x, self.weight, self.variance_epsilon, x.dim() - 1).to(hidden_states.dtype)


class RotaryEmbedding(nn.Module):
    """Beside HF's `LlamaRotaryEmbedding` (Su et al. 2021, arXiv:2104.09864): cos and sin of position * inv_freq, in
    float32; inv_freq[i] = theta^(-2i/D), changed as rope_type says. Differs: one set, as a graph has; that of yarn,
    longrope and dynamic comes with the shard."""

    def __init__(self, config: LlamaConfig):
        super().__init__()
        rope = config.rope_parameters
        exponent = torch.arange(0, config.head_dim, 2, dtype=torch.float32) / config.head_dim
        inv_freq = 1.0 / rope["rope_theta"] ** exponent  # D/2
        if rope["rope_type"] == "linear":
            inv_freq = inv_freq / rope["factor"]
        if rope["rope_type"] == "llama3":
            inv_freq = compute_llama3_parameters(inv_freq, rope)
        self.register_buffer("inv_freq", inv_freq)
        self.register_buffer("attention_scaling", torch.ones(1))

    def forward(self, x: Tensor, position_ids: Tensor) -> tuple[Tensor, Tensor]:
        freqs = position_ids[..., None].float() * self.inv_freq  # B T D/2
        emb = torch.cat((freqs, freqs), dim=-1)[:, None]  # B 1 T D
        return (emb.cos() * self.attention_scaling).to(x.dtype), (emb.sin() * self.attention_scaling).to(x.dtype)


def compute_llama3_parameters(inv_freq: Tensor, rope: dict) -> Tensor:
    """HF's `_compute_llama3_parameters`, in its order: waves longer than the original context / low_freq_factor are
    slowed down by `factor`, those shorter than it / high_freq_factor kept, others blended."""
    low, high, factor = rope["low_freq_factor"], rope["high_freq_factor"], rope["factor"]
    original = rope["original_max_position_embeddings"]
    wavelen = 2 * torch.pi / inv_freq
    is_long, is_short = wavelen > original / low, wavelen < original / high
    slowed = torch.where(is_long, inv_freq / factor, inv_freq)
    smooth = (original / wavelen - low) / (high - low)
    blended = (1 - smooth) * slowed / factor + smooth * slowed
    return torch.where(is_long | is_short, slowed, blended)


def rotate_half(x: Tensor) -> Tensor:
    """HF's `rotate_half`: [x1, x2] -> [-x2, x1]."""
    x1 = x[..., : x.shape[-1] // 2]
    x2 = x[..., x.shape[-1] // 2 :]
    return torch.cat((-x2, x1), dim=-1)


def apply_rotary_pos_emb(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """HF's `apply_rotary_pos_emb`, for q and k at once: x [B,H+K,T,D], cos and sin [B,1,T,D]."""
    return (x * cos) + (rotate_half(x) * sin)


# ---- KV cache, attention


class KVCache(nn.Module):
    """Beside HF's `StaticLayer`: keys and values of a layer on one rank, both of `shape` [B,K,sequence_length,D].
    Differs: each row writes at its own positions; padding too, to be overwritten before a query of its row can see it.
    Why: one graph has one shape, so the cache cannot grow with the text."""

    def __init__(self, shape: tuple[int, ...], dtype: torch.dtype):
        super().__init__()
        self.register_buffer("k", torch.zeros(shape, dtype=dtype))
        self.register_buffer("v", torch.zeros(shape, dtype=dtype))

    def update(self, k: Tensor, v: Tensor, position_ids: Tensor, length: int) -> tuple[Tensor, Tensor]:
        """Writes k and v [B,K,T,D] at position_ids [B,T]; returns the first `length` slots of both, [B,K,S,D]."""
        row = torch.arange(k.shape[0], dtype=torch.int32, device=k.device)[:, None]  # B 1
        self.k[row, :, position_ids] = k.transpose(1, 2)
        self.v[row, :, position_ids] = v.transpose(1, 2)
        return self.k[:, :, :length], self.v[:, :, :length]


class NeuronKVCache(KVCache):
    """The same out of place, for NxD alone: its ModelBuilder keeps a buffer only if it is assigned again. On a CPU that
    would copy the cache for every token; TorchNeuron, which makes an aliased output of a write in place, would hold a
    second cache."""

    def update(self, k: Tensor, v: Tensor, position_ids: Tensor, length: int) -> tuple[Tensor, Tensor]:
        index = position_ids[:, None, :, None].expand_as(k).long()  # B K T D
        self.k = self.k.scatter(2, index, k)
        self.v = self.v.scatter(2, index, v)
        return self.k[:, :, :length], self.v[:, :, :length]


def eager_attention_forward(q: Tensor, k: Tensor, v: Tensor, mask: Tensor, scaling: float) -> Tensor:
    """HF's `eager_attention_forward`, op by op: q [B,H,T,D], k and v [B,K,S,D], mask [B,T,S] -> [B,H,T,D]. Differs:
    query heads are grouped against their KV head, where HF copies k and v (`repeat_kv`); masked scores become -1e9,
    where HF adds finfo.min. Why: exp() near the end of bfloat16's range gives NaN on Neuron."""
    B, K, S, D = k.shape
    hidden = max(-1e9, torch.finfo(q.dtype).min / 2)  # float16 ends at -65504
    scores = torch.matmul(q.reshape(B, K, -1, D), k.transpose(2, 3)) * scaling  # B K G*T S
    scores = torch.where(mask[:, None, None], scores.view(B, K, -1, q.shape[2], S), hidden)  # B K G T S
    # softmax converts to float32: the bits of masking in float32, in 0.6 of the time
    weights = F.softmax(scores, dim=-1, dtype=torch.float32).to(q.dtype)
    return torch.matmul(weights.view(B, K, -1, S), v).view(q.shape)


def sdpa_attention_forward(q: Tensor, k: Tensor, v: Tensor, mask: Tensor, scaling: float) -> Tensor:
    """HF's `sdpa_attention_forward`, torch's kernel, on the same shapes."""
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask[:, None], scale=scaling, enable_gqa=True)


def flash_attention_forward(q: Tensor, k: Tensor, v: Tensor, mask: Tensor, scaling: float) -> Tensor:
    """FlashAttention (Dao et al. 2022, arXiv:2205.14135, algorithm 1) on the same shapes: blocks of the cache with a
    running maximum, sum and output in float32. Why: a long prefill has no [T,S] scores; NxDI calls an NKI kernel."""
    if q.shape[2] == 1:  # one row of scores is small
        return eager_attention_forward(q, k, v, mask, scaling)
    B, K, S, D = k.shape
    queries = q.reshape(B, K, -1, D).float() * scaling  # B K G*T D
    output, total = torch.zeros_like(queries), torch.zeros_like(queries[..., :1])  # B K G*T D, B K G*T 1
    largest = torch.full_like(total, -1e9)
    for start in range(0, S, 512):
        block = slice(start, start + 512)
        scores = torch.matmul(queries, k[:, :, block].float().transpose(2, 3))  # B K G*T 512
        scores = scores.unflatten(2, (-1, q.shape[2]))  # B K G T 512
        scores = torch.where(mask[:, None, None, :, block], scores, -1e9).flatten(2, 3)
        larger = torch.maximum(largest, scores.amax(-1, keepdim=True))
        shrink, weights = torch.exp(largest - larger), torch.exp(scores - larger)
        total = total * shrink + weights.sum(-1, keepdim=True)
        output = output * shrink + torch.matmul(weights, v[:, :, block].float())
        largest = larger
    return (output / total).view(q.shape).to(q.dtype)


ATTENTION = {"eager": eager_attention_forward, "sdpa": sdpa_attention_forward, "flash": flash_attention_forward}

# ---- tensor parallelism
#
# What Llama needs of NxD's `parallel_layers.layers`, by its names: either can supply it. Weights are shards.

Heads = list[int | None]  # HF's numbers of a rank's heads, in order; None is a head of zeros


def shard_heads(num_heads: int, num_kv_heads: int, tp_degree: int) -> list[tuple[Heads, Heads]]:
    """Each rank's query heads and KV heads, by NxD's rules (`gqa.py`).

    - tp is a multiple of the KV heads (REPLICATE_TO_TP_DEGREE): each KV head goes to tp/kv_heads ranks, and the query
      heads of a KV group are padded until its ranks divide them.
    - tp divides the KV heads: both are dealt out in order.
    - otherwise (CONVERT_TO_MHA): each query head gets a copy of its KV head, and both are padded at the end.
    """
    group = num_heads // num_kv_heads
    padding: Heads = [None] * (-num_heads % tp_degree)
    query, key = [*range(num_heads), *padding], [*range(num_kv_heads)]
    if tp_degree % num_kv_heads == 0:
        query, key = [], []
        for kv_head in range(num_kv_heads):
            query += [*range(kv_head * group, (kv_head + 1) * group), *padding[::num_kv_heads]]
            key += [kv_head] * (tp_degree // num_kv_heads)
    elif num_kv_heads % tp_degree != 0:
        key = [head // group for head in range(num_heads)] + padding
    H, K = len(query) // tp_degree, len(key) // tp_degree
    return [(query[rank * H : (rank + 1) * H], key[rank * K : (rank + 1) * K]) for rank in range(tp_degree)]


def tp_size() -> int:
    """NxD's `get_tensor_model_parallel_size`."""
    return dist.get_world_size() if dist.is_initialized() else 1


def gather_from_tensor_model_parallel_region(x: Tensor) -> Tensor:
    """The x of all ranks, side by side: [..., n] -> [..., tp * n]."""
    tp = tp_size()
    if tp == 1:
        return x
    # functional collectives become ops of a graph
    gathered = torch.ops._c10d_functional.all_gather_into_tensor(x.contiguous(), tp, dist.group.WORLD.group_name)
    gathered = torch.ops._c10d_functional.wait_tensor(gathered).view(tp, *x.shape)
    return gathered.movedim(0, -2).flatten(-2)


def reduce_from_tensor_model_parallel_region(x: Tensor) -> Tensor:
    """The sum of the x of all ranks."""
    if tp_size() == 1:
        return x
    summed = torch.ops._c10d_functional.all_reduce(x.contiguous(), "sum", dist.group.WORLD.group_name)
    return torch.ops._c10d_functional.wait_tensor(summed)


def divide(size: int, pad: bool) -> int:
    """A rank's share of `size`, rounded up with `pad`."""
    assert pad or size % tp_size() == 0
    return -(-size // tp_size())


class SPMDRank(nn.Module):
    """NxD's `SPMDRank`: the rank, int32 [1], from the shard. Why: one graph, traced as rank 0, serves all ranks."""

    def __init__(self, world_size: int):
        super().__init__()
        self.rank = empty_parameter(1, dtype=torch.int32)

    def get_rank(self) -> Tensor:
        return self.rank


class ColumnParallelLinear(nn.Module):
    """Beside HF's `nn.Linear`: weight [output_size / tp, input_size], bias [output_size / tp]. Each rank keeps a slice
    of the output, rounded up with `pad`. NxD rounds before it adds the bias, HF after."""

    def __init__(self, input_size, output_size, bias=True, gather_output=True, dtype=torch.float32, pad=False):
        super().__init__()
        assert not gather_output
        self.weight = empty_parameter(divide(output_size, pad), input_size, dtype=dtype)
        self.bias = empty_parameter(divide(output_size, pad), dtype=dtype) if bias else None

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight, self.bias)


class RowParallelLinear(nn.Module):
    """Beside HF's `nn.Linear`: weight [output_size, input_size / tp], bias [output_size]. Each rank holds a slice of
    the input; products are summed in float32 (NxD's `reduce_dtype`)."""

    def __init__(self, input_size, output_size, bias=True, input_is_parallel=False, dtype=torch.float32, pad=False):
        super().__init__()
        assert input_is_parallel
        self.weight = empty_parameter(output_size, divide(input_size, pad), dtype=dtype)
        self.bias = empty_parameter(output_size, dtype=dtype) if bias else None

    def forward(self, x: Tensor) -> Tensor:
        if tp_size() == 1:
            return F.linear(x, self.weight, self.bias)
        y = reduce_from_tensor_model_parallel_region(F.linear(x, self.weight).float()).to(x.dtype)
        return y if self.bias is None else y + self.bias


class ParallelEmbedding(nn.Module):
    """Beside HF's `nn.Embedding`: each rank holds a slice of every row [num_embeddings, embedding_dim / tp], and they
    are gathered; or all of some rows [num_embeddings / tp, embedding_dim], and the ranks are summed."""

    def __init__(self, num_embeddings, embedding_dim, dtype, shard_across_embedding, pad, use_spmd_rank):
        super().__init__()
        self.embedding_dim, self.shard_across_embedding = embedding_dim, shard_across_embedding
        if shard_across_embedding:
            self.weight = empty_parameter(num_embeddings, divide(embedding_dim, pad), dtype=dtype)
        else:
            assert use_spmd_rank, "without it NxD's traced graph takes every rank for rank 0"
            self.weight = empty_parameter(divide(num_embeddings, pad), embedding_dim, dtype=dtype)
            self.rank_util = SPMDRank(tp_size())

    def forward(self, input_ids: Tensor) -> Tensor:
        if self.shard_across_embedding:
            x = F.embedding(input_ids, self.weight)
            return gather_from_tensor_model_parallel_region(x)[..., : self.embedding_dim]
        row = input_ids - self.rank_util.get_rank() * self.weight.shape[0]
        here = (row >= 0) & (row < self.weight.shape[0])
        x = F.embedding(torch.where(here, row, 0), self.weight)
        return reduce_from_tensor_model_parallel_region(torch.where(here[..., None], x, 0))


@dataclass(frozen=True)
class Parts:
    """What the model is made of. Where it runs is decided here, in no forward."""

    layers: object = sys.modules[__name__]  # this section's, or NxD's
    norm: type[LlamaRMSNorm] = LlamaRMSNorm
    cache: type[KVCache] = KVCache
    attention: Callable[[Tensor, Tensor, Tensor, Tensor, float], Tensor] = eager_attention_forward
    static: bool = False  # every shape is known: attention reads all slots, prompts have few lengths

    @classmethod
    def of_device(cls, device: str, attn: str = "eager") -> Parts:
        """Those of a device. Raises UsageError for sdpa on TorchNeuron."""
        if device == "nxd":
            from neuronx_distributed.parallel_layers import layers

            return cls(layers, NeuronRMSNorm, NeuronKVCache, ATTENTION[attn], static=True)
        if device == "neuron" and attn == "sdpa":  # says its source of 2025
            raise UsageError("--attn sdpa: TorchNeuron's masks with -inf and copies KV heads, take eager or flash")
        return cls(attention=ATTENTION[attn], static=device == "neuron")


# ---- MLP, attention, layers, model

ACT2FN = {"silu": F.silu, "swish": F.silu, "gelu": F.gelu, "relu": F.relu}
ACT2FN["gelu_pytorch_tanh"] = partial(F.gelu, approximate="tanh")


class LlamaMLP(nn.Module):
    """Beside HF's `LlamaMLP` (SwiGLU: Shazeer 2020, arXiv:2002.05202). Differs: gate_proj and up_proj are sharded by
    output, down_proj by input: intermediate features, padded until tp divides them, stay on their rank."""

    def __init__(self, config: LlamaConfig, neuron: NeuronConfig, parts: Parts):
        super().__init__()
        hidden, inner, bias, dtype = config.hidden_size, config.intermediate_size, config.mlp_bias, neuron.dtype
        column, row = parts.layers.ColumnParallelLinear, parts.layers.RowParallelLinear
        self.gate_proj = column(hidden, inner, bias=bias, gather_output=False, dtype=dtype, pad=True)
        self.up_proj = column(hidden, inner, bias=bias, gather_output=False, dtype=dtype, pad=True)
        self.down_proj = row(inner, hidden, bias=bias, input_is_parallel=True, dtype=dtype, pad=True)
        self.act_fn = ACT2FN[config.hidden_act]

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x))


class LlamaAttention(nn.Module):
    """Beside HF's `LlamaAttention` (NxDI's and Optimum's `NeuronAttentionBase`). Differs: q_proj, k_proj and v_proj are
    one `Wqkv`, sharded by heads: a rank's q, k, v. Why: one large product keeps a NeuronCore busier than three."""

    def __init__(self, config: LlamaConfig, neuron: NeuronConfig, parts: Parts):
        super().__init__()
        hidden, bias, dtype, tp = config.hidden_size, config.attention_bias, neuron.dtype, neuron.tp_degree
        query, key = shard_heads(config.num_attention_heads, config.num_key_value_heads, tp)[0]
        H, K, D = self.num_heads, self.num_kv_heads, self.head_dim = len(query), len(key), config.head_dim
        self.attention, self.scaling = parts.attention, D**-0.5
        column, row = parts.layers.ColumnParallelLinear, parts.layers.RowParallelLinear
        self.Wqkv = column(hidden, tp * (H + 2 * K) * D, bias=bias, gather_output=False, dtype=dtype)
        self.o_proj = row(tp * H * D, hidden, bias=bias, input_is_parallel=True, dtype=dtype)
        self.kv_cache = parts.cache((neuron.batch_size, K, neuron.sequence_length, D), dtype)

    def forward(self, hidden_states: Tensor, cos: Tensor, sin: Tensor, mask: Tensor, position_ids: Tensor) -> Tensor:
        B, T, _ = hidden_states.shape
        H, K, D = self.num_heads, self.num_kv_heads, self.head_dim
        qkv = self.Wqkv(hidden_states).view(B, T, H + 2 * K, D).transpose(1, 2)  # B H+2K T D
        # never `split`: where torch-neuronx turns functionalization off (XLA_DISABLE_FUNCTIONALIZATION=1, its default)
        # torch-xla returns wrong data for it in a batch (pytorch/xla 8640; NxDI's NAPP-3145)
        qk, v = qkv.tensor_split((H + K,), dim=1)
        q, k = apply_rotary_pos_emb(qk, cos, sin).tensor_split((H,), dim=1)  # B H T D, B K T D
        k, v = self.kv_cache.update(k, v, position_ids, length=mask.shape[-1])  # B K S D
        y = self.attention(q, k, v, mask, self.scaling)  # B H T D
        return self.o_proj(y.transpose(1, 2).reshape(B, T, H * D))


class LlamaDecoderLayer(nn.Module):
    """HF's `LlamaDecoderLayer`, unchanged."""

    def __init__(self, config: LlamaConfig, neuron: NeuronConfig, parts: Parts):
        super().__init__()
        hidden, eps, dtype = config.hidden_size, config.rms_norm_eps, neuron.dtype
        self.self_attn = LlamaAttention(config, neuron, parts)
        self.mlp = LlamaMLP(config, neuron, parts)
        self.input_layernorm = parts.norm(hidden, eps, dtype)
        self.post_attention_layernorm = parts.norm(hidden, eps, dtype)

    def forward(self, hidden_states: Tensor, cos: Tensor, sin: Tensor, mask: Tensor, position_ids: Tensor) -> Tensor:
        residual = hidden_states
        hidden_states = self.input_layernorm(hidden_states)
        hidden_states = residual + self.self_attn(hidden_states, cos, sin, mask, position_ids)
        residual = hidden_states
        hidden_states = self.post_attention_layernorm(hidden_states)
        return residual + self.mlp(hidden_states)


class LlamaModel(nn.Module):
    """Beside HF's `LlamaModel`. Differs: embed_tokens is sharded. The mask compares cache slots with positions, so that
    prefill, chunks and decode are one forward."""

    def __init__(self, config: LlamaConfig, neuron: NeuronConfig, parts: Parts):
        super().__init__()
        shape, dtype, rows = (config.vocab_size, config.hidden_size), neuron.dtype, neuron.vocab_parallel
        across = {"shard_across_embedding": not rows, "use_spmd_rank": rows}
        self.embed_tokens = parts.layers.ParallelEmbedding(*shape, dtype=dtype, pad=True, **across)
        self.layers = nn.ModuleList(LlamaDecoderLayer(config, neuron, parts) for _ in range(config.num_hidden_layers))
        self.norm = parts.norm(config.hidden_size, config.rms_norm_eps, dtype)
        self.rotary_emb = RotaryEmbedding(config)
        self.sequence_length = neuron.sequence_length

    def forward(self, input_ids: Tensor, position_ids: Tensor, length: int | None = None) -> Tensor:
        """input_ids, position_ids [B,T] int32 -> hidden states after the last norm [B,T,E]."""
        hidden_states = self.embed_tokens(input_ids)  # B T E
        cos, sin = self.rotary_emb(hidden_states, position_ids)  # B 1 T D
        slots = torch.arange(length or self.sequence_length, dtype=torch.int32, device=input_ids.device)  # S
        mask = slots <= position_ids[..., None]  # B T S: a token sees itself and what came before it
        for layer in self.layers:
            hidden_states = layer(hidden_states, cos, sin, mask, position_ids)
        return self.norm(hidden_states)


class LlamaForCausalLM(nn.Module):
    """Beside HF's `LlamaForCausalLM`. Differs: lm_head is sharded by vocabulary, padded until tp divides it. To choose
    a token, ranks exchange a (value, index) pair, not logits."""

    def __init__(self, config: LlamaConfig, neuron: NeuronConfig, parts: Parts):
        super().__init__()
        self.config, self.neuron_config, self.static = config, neuron, parts.static
        self.model = LlamaModel(config, neuron, parts)
        column, shape = parts.layers.ColumnParallelLinear, (config.hidden_size, config.vocab_size)
        self.lm_head = column(*shape, bias=False, gather_output=False, dtype=neuron.dtype, pad=True)
        self.gather = parts.layers.gather_from_tensor_model_parallel_region
        self.rank_util = parts.layers.SPMDRank(neuron.tp_degree)

    def forward(
        self, input_ids: Tensor, position_ids: Tensor, last: Tensor | None = None, length: int | None = None
    ) -> Tensor:
        """input_ids, position_ids [B,T] int32 -> float32 logits [B,T,V] on every rank; with `last` [B] int32, the
        greedy choice at column `last` of each row, int32 [B]. Attention reads `length` slots, or all."""
        hidden_states = self.model(input_ids, position_ids, length)  # B T E
        if last is None:
            return self.gather(self.lm_head(hidden_states))[..., : self.config.vocab_size].float()
        index = last[:, None, None].expand(-1, 1, hidden_states.shape[-1]).long()  # B 1 E
        return self.greedy(hidden_states.gather(1, index).squeeze(1))

    def greedy(self, hidden_states: Tensor) -> Tensor:
        """[B,E] -> int32 [B]: the first index of the largest logit."""
        logits = self.lm_head(hidden_states).float()  # B V/tp
        first = self.rank_util.get_rank() * logits.shape[-1]
        vocabulary = first + torch.arange(logits.shape[-1], dtype=torch.int32, device=logits.device)  # V/tp
        inside = vocabulary < torch.full_like(vocabulary, self.config.vocab_size)  # a number would be int64
        value, index = torch.where(inside, logits, -1e9).max(dim=-1)  # B: padding's 0 would win over negative ones
        # float32 holds an index below 2^24: one collective carries both
        pair = torch.stack((value, (index.int() + first).float()), dim=-1)  # B 2
        values, indices = self.gather(pair).unflatten(-1, (-1, 2)).unbind(-1)  # B tp
        return indices.gather(-1, values.argmax(-1, keepdim=True)).squeeze(-1).int()


# ---- loading


def shard_path(ckpt: str | Path, rank: int) -> Path:
    """A rank's file, NxD's name."""
    return Path(ckpt, f"tp{rank}_sharded_checkpoint.safetensors")


def sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def check_seal(ckpt: str | Path, ranks: Iterable[int]) -> None:
    """Raises UsageError if JSON files, or shards of `ranks`, are not as a conversion wrote them."""
    path = Path(ckpt, "neuron_config.json")
    try:
        for file in path.parent.iterdir():
            if not (file.is_file() or file.is_dir()) or (file.suffix == ".json" and file.stat().st_size > 2**26):
                raise OSError(f"{file} is no regular file, or too long")
        settings = path.read_bytes()
        for rank in ranks:
            path = shard_path(ckpt, rank)
            shard = safe_open(path, "pt")
            table = []
            for name in shard.offset_keys():
                x = shard.get_slice(name)
                table.append((name, x.get_dtype(), x.get_shape(), name.endswith("rank") and x[:].tolist()))
            if shard.metadata()["seal"] != sha256(settings + f"{rank}{table}".encode()):
                raise ValueError("it does not fit neuron_config.json")
        for name, digest in json.loads(settings)["sha256"].items():
            path = Path(ckpt, name)
            if sha256(path.read_bytes()) != digest:
                raise ValueError("its digest differs")
    except Exception as error:
        hf = "HF_DIR" if any(path.parent.glob("*tp0*")) else ckpt
        make = f"convert again, `python convert_weights.py --hf {hf} --out ./weights --tp 1`"
        raise UsageError(f"--ckpt {ckpt} is no finished conversion, or was changed ({path}: {error}): {make}") from None


def read_shard(ckpt: str | Path, rank: int) -> dict[str, Tensor]:
    """One rank's tensors by name, memory-mapped."""
    state = load_file(shard_path(ckpt, rank))
    return {"lm_head.weight": state["model.embed_tokens.weight"]} | state  # the first is for tied ones


def load_model(
    ckpt: str | Path,
    rank: int = 0,
    *,
    batch_size=None,
    sequence_length=None,
    device="cpu",
    parts: Parts | None = None,
    model_class=LlamaForCausalLM,
) -> LlamaForCausalLM:
    """One rank's model, from a conversion for as many ranks as the process group has. batch_size and sequence_length
    default to the conversion's, `parts` to the device's. Raises UsageError if files or ranks do not fit."""
    check_seal(ckpt, [rank])
    neuron = NeuronConfig.from_pretrained(ckpt).with_shape(batch_size, sequence_length)
    if tp_size() != neuron.tp_degree:
        raise UsageError(f"{ckpt} is for --tp {neuron.tp_degree}, here are {tp_size()} ranks: convert it again")
    try:
        model = model_class(LlamaConfig.from_pretrained(ckpt), neuron, parts or Parts.of_device(device))
    except (RuntimeError, TypeError):  # of torch's allocator
        shape = f"--batch-size {neuron.batch_size} --sequence-length {neuron.sequence_length}"
        raise UsageError(f"{shape}: the cache does not fit in memory") from None
    model.load_state_dict(dict(model.named_buffers()) | read_shard(ckpt, rank), assign=True)
    model.eval().to(device)
    if device == "neuron":  # a graph for decode and one for each length of a prompt, where torch stops at 8
        graphs = 1 + len(neuron.prefill_lengths())
        model.compile(backend="neuron", fullgraph=True, dynamic=False, recompile_limit=graphs)
    return model


# ---- generation


def check_prompts(prompts: list[list[int]], config: LlamaConfig, neuron: NeuronConfig) -> None:
    """Raises UsageError if they do not fit batch, cache or vocabulary."""
    if not 0 < len(prompts) <= neuron.batch_size:
        raise UsageError(f"{len(prompts)} prompts do not fit --batch-size {neuron.batch_size}: raise it")
    longest, largest = neuron.sequence_length - 1, config.vocab_size - 1
    for number, ids in enumerate(prompts, start=1):
        if not 0 < len(ids) <= longest:
            raise UsageError(f"prompt {number} has {len(ids)} tokens, 1 to {longest} fit: raise --sequence-length")
        if not 0 <= min(ids) <= max(ids) <= largest:
            raise UsageError(f"prompt {number}: token ids must be from 0 to {largest}")


@torch.no_grad()
def generate(
    model: LlamaForCausalLM, prompts: list[list[int]], max_new_tokens: int, eos_token_ids: list[int], on_step=None
) -> list[list[int]]:
    """Greedy decoding: the new tokens of each prompt. After each step `on_step` gets those so far. A text ends with an
    EOS token, after max_new_tokens, or when the cache is full. The batch is static: rows that have ended, or have no
    prompt, are computed and ignored. Raises UsageError if prompts do not fit."""
    neuron = model.neuron_config
    check_prompts(prompts, model.config, neuron)
    rows = prompts + [[0]] * (neuron.batch_size - len(prompts))
    ends = torch.tensor([len(row) for row in rows])  # B: the first free slot of each row
    left = [min(max_new_tokens, neuron.sequence_length - len(prompt)) for prompt in prompts]
    completions: list[list[int]] = [[] for _ in prompts]
    new = prefill(model, rows, ends)  # B
    while True:
        for number, token in enumerate(new.tolist()[: len(prompts)]):
            if left[number] > 0:
                completions[number].append(token)
                left[number] = 0 if token in eos_token_ids else left[number] - 1
        if on_step is not None:
            on_step(completions)
        if not any(left):
            return completions
        new = choose(model, new[:, None], ends[:, None], torch.zeros_like(ends), length=int(ends.max()) + 1)
        ends = ends + 1


def prefill(model: LlamaForCausalLM, rows: list[list[int]], ends: Tensor) -> Tensor:
    """The first new token of each row [B]. Prompts are padded on the right to one length, and read at once or in
    chunks: that with a row's end chooses."""
    neuron, longest = model.neuron_config, int(ends.max())
    chunk = neuron.prefill_chunk_size or longest
    if model.static:
        chunk = min((size for size in neuron.prefill_lengths() if size >= longest), default=chunk)
    new = torch.zeros_like(ends)
    for start in range(0, longest, chunk):
        stop = start + chunk
        ids = torch.tensor([(row + [0] * stop)[start:stop] for row in rows])  # B T
        last = (ends - 1 - start).clamp(0, chunk - 1)
        choice = choose(model, ids, torch.arange(start, stop).expand_as(ids), last, length=stop)
        new = torch.where(ends > start, choice, new)
    return new


def choose(model: LlamaForCausalLM, ids: Tensor, positions: Tensor, last: Tensor, length: int) -> Tensor:
    """One call of the model, with `length` slots of the cache, or all if it is static."""
    slots = model.neuron_config.sequence_length
    positions = positions.clamp(max=slots - 1)  # of padding, and of rows that have ended
    device = next(model.parameters(), ids).device  # an NxDModel takes the host's tensors
    inputs = [tensor.int().to(device) for tensor in (ids, positions, last)]
    if model.static:
        return model(*inputs).cpu()
    return model(*inputs, length=min(length, slots)).cpu()


# ---- graphs made ahead of time


def compile_nxd(
    ckpt: str | Path, *, batch_size=None, sequence_length=None, parts: Parts, model_class=LlamaForCausalLM
) -> nn.Module:
    """All ranks on this host's NeuronCores (Trn1, Inf2), in one process. Call it like the model, with `last`. NxD's
    ModelBuilder traces each graph (decoding, each length of prefill) once, as rank 0; `cpu/kept.py` keeps them, under a
    digest of all they depend on."""
    import torch_neuronx
    from neuronx_distributed import ModelBuilder, NxDModel, NxDParallelState

    from cpu.kept import Kept

    config = LlamaConfig.from_pretrained(ckpt)
    neuron = NeuronConfig.from_pretrained(ckpt).with_shape(batch_size, sequence_length)
    tp, B = neuron.tp_degree, neuron.batch_size
    with NxDParallelState(world_size=tp, tensor_model_parallel_size=tp) as state:
        flags = f"--auto-cast=none --model-type=transformer --lnc={state.lnc_size}"
        platform = torch_neuronx.utils.get_platform_target(), torch_neuronx.__version__
        depends = config, neuron, parts.attention.__name__, inspect.getsource(model_class), flags, platform
        kept = Kept(f"nxd-{sha256((repr(depends) + Path(__file__).read_text()).encode())[:12]}")
        file = kept.find()
        if file:
            compiled = NxDModel.load(str(file))
        else:
            builder = ModelBuilder(model_class(config, neuron, parts).eval())
            for T in sorted({1, *neuron.prefill_lengths()}):
                ids, last = torch.zeros(B, T, dtype=torch.int32), torch.zeros(B, dtype=torch.int32)
                inputs = {"input_ids": ids, "position_ids": ids.clone(), "last": last}
                builder.trace(kwargs=inputs, tag=f"prefill_{T}" if T > 1 else "decode")
            compiled = builder.compile(compiler_args=flags)
            kept.save(compiled.save)
    compiled.config, compiled.neuron_config, compiled.static = config, neuron, True
    rotary = dict(RotaryEmbedding(config).named_buffers(prefix="model.rotary_emb"))  # weights to a graph
    compiled.set_weights([rotary | read_shard(ckpt, rank) for rank in range(tp)])
    compiled.to_neuron()
    return compiled


def compile_decode(model: LlamaForCausalLM) -> None:
    """--compile: single tokens go through compiled code from here on. Raises OSError without g++."""
    from cpu.compiled import compile_one_row

    token, layers = torch.zeros(model.neuron_config.batch_size, 1, dtype=torch.int32), model.model.layers
    key = repr((model.config, replace(model.neuron_config, sequence_length=1), layers[0].self_attn.attention.__name__))
    compile_one_row(partial(model, token, token, length=1), layers, key, heads=[model.lm_head])


# ---- command line


def positive_int(text: str) -> int:
    """argparse type of a count."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a positive integer")
    return int(text)


def integers(text: str) -> list[int]:
    """argparse type of a list such as 1,2,3."""
    return list(map(int, text.split(",")))


def run_command(main: Callable[[], None]) -> None:
    """One line says what ends a command: a mistake (exit code 2), a file or rank that fails (1), Ctrl-C (130)."""
    try:
        if sys.stdout is None:  # and what is opened next would be taken for it
            raise OSError("stdout is closed: redirect it, to /dev/null if need be")
        main()
        print(end="", flush=True)
    except (UsageError, ImportError, OSError, KeyboardInterrupt) as error:
        if not find_spec("cpu") or import_module("cpu.torchrun").may_speak():
            text = "".join(c if c.isprintable() else "?" for c in str(error) or "interrupted")  # files may say anything
            print(f"{Path(sys.argv[0]).name}: error: {text}", file=sys.stderr)
        if isinstance(error, OSError):
            sys.stdout = None  # exit would flush it, and fail again
            sys.exit(1)
        sys.exit(130 if isinstance(error, KeyboardInterrupt) else 2)


class ArgumentParser(argparse.ArgumentParser):
    """It says what is wrong by `run_command`: once, however many ranks torchrun has started."""

    def error(self, message: str) -> None:
        raise UsageError(message)


def parse_args() -> argparse.Namespace:
    parser = ArgumentParser(description="Llama as AWS Neuron computes it, greedy.", usage=argparse.SUPPRESS)
    add = parser.add_argument
    add("--ckpt", required=True, help="from convert_weights.py")
    add("--tp", type=positive_int, help="ranks, as converted")
    add("--prompt", dest="prompts", action="append", metavar="TEXT", help="repeat for a batch; default: stdin")
    add("--prompt-ids", dest="prompts", action="append", type=integers, metavar="1,2,3", help="instead of text")
    add("--max-new-tokens", type=positive_int, default=64, help="default: %(default)s")
    add("--batch-size", type=positive_int, help="as converted")
    add("--sequence-length", type=positive_int, help="as converted")
    add("--device", default="auto", help="auto, cpu, nxd, neuron, cuda, ...; default: what is installed")
    add("--attn", choices=ATTENTION, help="default: eager, as HF; with --compile sdpa")
    add("--compile", action="store_true", help="on a CPU: compiled decoding")
    add("--ignore-eos", action="store_true", help="go on to --max-new-tokens")
    add("--json", action="store_true", help="print JSON instead of text")
    add("--timeout", type=positive_int, default=60, help="seconds of silence that end a run")
    return parser.parse_args()


def choose_device(asked: str) -> str:
    """What --device means here; NxD needs torch-xla, TorchNeuron has none. Raises UsageError if it is absent."""
    xla, neuronx, nxd = (find_spec(name) for name in ("torch_xla", "torch_neuronx", "neuronx_distributed"))
    available = {"nxd": nxd and xla, "neuron": neuronx and not xla, "cpu": True}
    if asked == "auto":
        return next(device for device in available if available[device])
    accelerator = torch.accelerator.current_accelerator(check_available=True)  # cuda, or another that torch knows
    if not available.get(asked, accelerator is not None and asked == accelerator.type):
        raise UsageError(f"--device {asked} is not available here: see docs/neuron.md")
    return asked


def run(args: argparse.Namespace, rank: int) -> None:
    """One rank's work: load, generate; rank 0 prints."""
    args.attn = args.attn or ("sdpa" if args.compile else "eager")  # a prompt of 2048 takes sdpa 0.19 of eager's time
    began, parts = time.perf_counter(), Parts.of_device(args.device, args.attn)
    shape = {"batch_size": args.batch_size, "sequence_length": args.sequence_length}
    if args.device == "nxd":
        stdout = os.dup(1)
        os.dup2(2, 1)  # what NxD and the compiler print
        model, loaded = compile_nxd(args.ckpt, parts=parts, **shape), began
        sys.stdout.flush()
        os.dup2(stdout, 1)
    else:
        model = load_model(args.ckpt, rank, device=args.device, parts=parts, **shape)
        loaded = time.perf_counter()
        if args.compile:
            compile_decode(model)
    compile_s = time.perf_counter() - loaded  # by NxD with loading
    eos = [] if args.ignore_eos else model.config.eos_token_id
    decode = args.tokenizer.decode if args.tokenizer else str
    streams = rank == 0 and not args.json and args.tokenizer and len(args.prompts) == 1
    streamed, clock = "", [time.perf_counter()]

    def on_step(completions: list[list[int]]) -> None:
        nonlocal streamed
        clock.append(time.perf_counter())
        text = decode(args.prompts[0] + completions[0]) if streams else ""
        if not text.endswith("\ufffd"):  # an unfinished character waits for the rest
            print(text[len(streamed) :], end="", flush=True)
            streamed = text

    completions = generate(model, args.prompts, args.max_new_tokens, eos, on_step)
    if rank != 0:
        return
    tokens, decode_s = sum(map(len, completions)) - len(completions), clock[-1] - clock[1] + 1e-9
    weights = read_shard(args.ckpt, 0)
    read = sum(tensor.nbytes for tensor in weights.values()) - weights["model.embed_tokens.weight"].nbytes
    timings = {
        "load_s": clock[0] - began - compile_s,
        "compile_s": compile_s,
        "prefill_s": clock[1] - clock[0],
        "prefill_tokens": sum(map(len, args.prompts)),
        "decode_s": decode_s,
        "decode_tokens": tokens,
        "decode_tokens_per_s": tokens / decode_s,
        "weight_gb_per_s": args.tp * read * (len(clock) - 2) / decode_s / 1e9,  # a step reads all
        "peak_rss_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
    }
    rows, texts = [], []
    for prompt, ids in zip(args.prompts, completions, strict=True):
        row = {"prompt": decode(prompt), "prompt_ids": prompt, "ids": ids, "text": decode(ids)}
        rows.append(row | {"finish_reason": "eos" if ids[-1] in eos else "length"})
        texts.append(decode(prompt + ids))
    if args.json:
        config = {"device": args.device, "attn": args.attn} | asdict(model.config) | asdict(model.neuron_config)
        print(json.dumps({"completions": rows, "timings": timings, "config": config}, indent=2))
    else:
        print("\n\n".join(texts)[len(streamed) :])
        print(f"on {args.device}:", *(f"{name} {value:.4g}" for name, value in timings.items()), file=sys.stderr)


def init_process_group(device: str) -> None:
    """torchrun's ranks in one group: prompts go over gloo, the device's tensors over its own backend. The group comes
    before the device, since TorchNeuron's group is what gives each process its NeuronCore."""
    if device == "cpu":
        dist.init_process_group("gloo")
    else:
        dist.init_process_group(f"cpu:gloo,{device}:{dist.get_default_backend_for_device(device)}")
        torch.accelerator.set_device_index(int(os.environ["LOCAL_RANK"]))


def start(args: argparse.Namespace, work: Callable[[argparse.Namespace, int], None]) -> None:
    """Calls work(args, rank) on --tp ranks: by cpu/ on a CPU if it is there, else by torchrun."""
    args.device, args.tokenizer, rank = choose_device(args.device), None, int(os.environ.get("RANK", 0))
    torchrun, has_cpu = "TORCHELASTIC_RUN_ID" in os.environ, args.device == "cpu" and find_spec("cpu")
    if args.compile and (torchrun or not has_cpu):
        raise UsageError("--compile is for a CPU, with cpu/ and without torchrun: leave it out")
    check_seal(args.ckpt, [rank])
    config, neuron = LlamaConfig.from_pretrained(args.ckpt), NeuronConfig.from_pretrained(args.ckpt)
    if args.tp not in (None, neuron.tp_degree):
        raise UsageError(f"--tp {args.tp}, but {args.ckpt} is for --tp {neuron.tp_degree}: convert it again")
    args.tp = neuron.tp_degree
    check_seal(args.ckpt, [] if torchrun else range(args.tp))  # a host may have its shards only
    alone = torchrun or args.tp == 1 or args.device == "nxd"
    if not alone and not has_cpu:
        os.environ.setdefault("OMP_NUM_THREADS", str(max(1, torch.get_num_threads() // args.tp)))
        torchrun = [sys.executable, "-m", "torch.distributed.run", f"--nproc-per-node={args.tp}"]
        os.execv(sys.executable, torchrun + sys.orig_argv[1:])
    if torchrun:
        if has_cpu:
            import_module("cpu.torchrun").join(args.timeout)
        else:
            init_process_group(args.device)
    if not args.prompts and rank == 0:  # piped stdin, else a built-in sentence
        piped = "" if sys.stdin is None or sys.stdin.isatty() else sys.stdin.buffer.read().decode(errors="replace")
        args.prompts = [piped.strip() or "The capital of France is"]
    if torchrun:
        args.prompts = args.prompts or [None]
        dist.broadcast_object_list(args.prompts, device=torch.device("cpu"))  # of rank 0's stdin
    tokenizer = Path(args.ckpt, "tokenizer.json")
    if tokenizer.exists():
        from tokenizers import Tokenizer

        args.tokenizer = Tokenizer.from_file(str(tokenizer))
    elif any(isinstance(prompt, str) for prompt in args.prompts):
        raise UsageError(f"{args.ckpt} has no tokenizer.json: give --prompt-ids")
    for number, text in enumerate(args.prompts):
        if isinstance(text, str):
            args.prompts[number] = args.tokenizer.encode(os.fsencode(text).decode(errors="replace")).ids
    args.batch_size = args.batch_size or max(neuron.batch_size, len(args.prompts))
    check_prompts(args.prompts, config, neuron.with_shape(args.batch_size, args.sequence_length))
    if alone:
        work(args, rank)
        if torchrun:
            dist.destroy_process_group()  # else gloo's threads may abort at exit
    else:
        from cpu.shared_memory import start_ranks

        start_ranks(partial(work, args), args.tp, args.timeout)


if __name__ == "__main__":
    run_command(lambda: start(parse_args(), run))

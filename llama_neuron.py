"""Llama inference as AWS Neuron computes it, in one file, in the order of Hugging Face's `modeling_llama.py`.

Running Llama on Neuron changes four things above all: layers are split across ranks (tensor parallelism), the KV cache
has a fixed size, every shape is known when a graph is compiled, and a rank reads its own number from its shard. Each
docstring names the HF class it corresponds to, what differs, and why. The model comes first, then what Neuron puts
underneath it, loading, generation and the command.

Shapes: B batch, T new tokens, S cache slots that are read, E hidden size, H query heads and K key/value heads per rank,
G = H/K, D head_dim, V vocabulary.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from datetime import timedelta
from functools import partial
from importlib.util import find_spec
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor, nn

# ---- configs


@dataclass(frozen=True, kw_only=True)
class LlamaConfig:
    """The keys of HF's `LlamaConfig` that inference reads. None may be missing: `convert_weights.py` fills them in."""

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    hidden_act: str
    rms_norm_eps: float
    rope_parameters: dict  # in the transformers 5 format
    attention_bias: bool  # on q, k, v and o_proj
    mlp_bias: bool
    tie_word_embeddings: bool
    eos_token_id: list[int]

    @classmethod
    def from_pretrained(cls, ckpt: str | Path) -> LlamaConfig:
        """Reads config.json of a converted checkpoint."""
        return cls(**read_fields(cls, Path(ckpt, "config.json")))


@dataclass(frozen=True, kw_only=True)
class NeuronConfig:
    """What a compiled graph fixes. The names are those of Optimum Neuron's `NxDNeuronConfig`."""

    tp_degree: int = 1  # ranks
    batch_size: int = 1  # rows of the KV cache
    sequence_length: int = 2048  # slots of the KV cache, for a prompt and its new tokens
    torch_dtype: str = "bfloat16"
    vocab_parallel: bool = False  # shard embed_tokens by vocabulary, not by hidden size
    context_encoding_buckets: list[int] | None = None  # prompt lengths that get a graph; None: powers of two from 128
    prefill_chunk_size: int | None = None  # prompt tokens per call; None: the whole prompt
    max_sequence_length: int | None = None  # the longest sequence one graph can serve

    @classmethod
    def from_pretrained(cls, ckpt: str | Path) -> NeuronConfig:
        """Reads neuron_config.json of a converted checkpoint."""
        return cls(**read_fields(cls, Path(ckpt, "neuron_config.json")))

    @property
    def dtype(self) -> torch.dtype:
        return getattr(torch, self.torch_dtype)

    def with_cache(self, batch_size: int | None, sequence_length: int | None) -> NeuronConfig:
        """A copy with another cache; None keeps a size. Raises UsageError beyond max_sequence_length."""
        length = sequence_length or self.sequence_length
        if self.max_sequence_length is not None and length > self.max_sequence_length:
            limit = self.max_sequence_length
            raise UsageError(f"--sequence-length {length}: this model needs another graph beyond {limit}; use {limit}")
        return replace(self, batch_size=batch_size or self.batch_size, sequence_length=length)

    def prefill_lengths(self) -> list[int]:
        """The prompt lengths that get a compiled graph: one chunk, or buckets up to the whole cache."""
        if self.prefill_chunk_size is not None:
            return [self.prefill_chunk_size]
        buckets = self.context_encoding_buckets or [2**power for power in range(7, 24)]
        return [*(length for length in buckets if length < self.sequence_length), self.sequence_length]


def read_fields(config_class: type, path: Path) -> dict:
    """The fields of a config class, from a JSON file that may hold more."""
    values = json.loads(path.read_text())
    return {field.name: values[field.name] for field in fields(config_class)}


# ---- model, in HF's order


class LlamaRMSNorm(nn.Module):
    """Counterpart of HF's `LlamaRMSNorm`, with the same arithmetic (Zhang and Sennrich 2019, arXiv:1910.07467): the
    mean is taken in float32, and the result is cast back before it is multiplied by the weight. Every rank has the
    whole of it, because every rank has the whole hidden state."""

    def __init__(self, hidden_size: int, eps: float, dtype: torch.dtype):
        super().__init__()
        self.weight = empty_parameter(hidden_size, dtype=dtype)
        self.variance_epsilon = eps

    def forward(self, hidden_states: Tensor) -> Tensor:
        input_dtype = hidden_states.dtype
        hidden_states = hidden_states.to(torch.float32)
        variance = hidden_states.pow(2).mean(-1, keepdim=True)
        hidden_states = hidden_states * torch.rsqrt(variance + self.variance_epsilon)
        return self.weight * hidden_states.to(input_dtype)


class LlamaRotaryEmbedding(nn.Module):
    """Counterpart of HF's `LlamaRotaryEmbedding` (Su et al. 2021, arXiv:2104.09864): cos and sin of position * inv_freq
    in float32, where inv_freq[i] = theta^(-2i/D), rescaled according to rope_type. HF may change the frequencies as a
    text grows; a compiled graph has one fixed set. For yarn, longrope and dynamic that set is stored in the shard, and
    replaces what is computed here."""

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
        emb = torch.cat((freqs, freqs), dim=-1)  # B T D
        cos = emb.cos() * self.attention_scaling
        sin = emb.sin() * self.attention_scaling
        return cos.to(x.dtype), sin.to(x.dtype)


def compute_llama3_parameters(inv_freq: Tensor, rope: dict) -> Tensor:
    """HF's `_compute_llama3_parameters`, in the same order of operations: wavelengths above the original context /
    low_freq_factor have their frequency divided by `factor`, those below the original context / high_freq_factor are
    kept, and the rest are interpolated."""
    low = rope["low_freq_factor"]
    high = rope["high_freq_factor"]
    original = rope["original_max_position_embeddings"]
    wavelen = 2 * torch.pi / inv_freq
    is_long = wavelen > original / low
    is_short = wavelen < original / high
    slowed = torch.where(is_long, inv_freq / rope["factor"], inv_freq)
    smooth = (original / wavelen - low) / (high - low)
    interpolated = (1 - smooth) * slowed / rope["factor"] + smooth * slowed
    return torch.where(is_long | is_short, slowed, interpolated)


def rotate_half(x: Tensor) -> Tensor:
    """HF's `rotate_half`: [x1, x2] -> [-x2, x1]."""
    x1 = x[..., : x.shape[-1] // 2]
    x2 = x[..., x.shape[-1] // 2 :]
    return torch.cat((-x2, x1), dim=-1)


def apply_rotary_pos_emb(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    """HF's `apply_rotary_pos_emb`: q [B,H,T,D] and k [B,K,T,D], rotated by cos and sin [B,T,D]."""
    cos = cos.unsqueeze(1)  # B 1 T D
    sin = sin.unsqueeze(1)
    q_embed = (q * cos) + (rotate_half(q) * sin)
    k_embed = (k * cos) + (rotate_half(k) * sin)
    return q_embed, k_embed


def gelu_new(x: Tensor) -> Tensor:
    """HF's `NewGELUActivation`, op by op: in bfloat16 it rounds more often than `F.gelu`."""
    return 0.5 * x * (1.0 + torch.tanh((2 / torch.pi) ** 0.5 * (x + 0.044715 * torch.pow(x, 3.0))))


def gelu_fast(x: Tensor) -> Tensor:
    """HF's `FastGELUActivation`, op by op."""
    return 0.5 * x * (1.0 + torch.tanh(x * 0.7978845608 * (1.0 + 0.044715 * x * x)))


ACT2FN = {
    "silu": F.silu,
    "swish": F.silu,
    "gelu": F.gelu,
    "gelu_pytorch_tanh": partial(F.gelu, approximate="tanh"),
    "relu": F.relu,
    "relu2": lambda x: torch.square(F.relu(x)),
    "gelu_new": gelu_new,
    "gelu_fast": gelu_fast,
    "quick_gelu": lambda x: x * torch.sigmoid(1.702 * x),
}


class LlamaMLP(nn.Module):
    """Counterpart of HF's `LlamaMLP` (SwiGLU: Shazeer 2020, arXiv:2002.05202). gate_proj and up_proj are sharded by
    output and down_proj by input, so that a rank keeps its intermediate features to itself and the block needs a single
    all-reduce. The intermediate size is padded until tp divides it."""

    def __init__(self, config: LlamaConfig, neuron: NeuronConfig, backend: Backend):
        super().__init__()
        hidden_size = config.hidden_size
        intermediate_size = config.intermediate_size
        options = {"bias": config.mlp_bias, "dtype": neuron.dtype, "pad": True}
        self.gate_proj = backend.ColumnParallelLinear(hidden_size, intermediate_size, gather_output=False, **options)
        self.up_proj = backend.ColumnParallelLinear(hidden_size, intermediate_size, gather_output=False, **options)
        self.down_proj = backend.RowParallelLinear(intermediate_size, hidden_size, input_is_parallel=True, **options)
        self.act_fn = ACT2FN[config.hidden_act]

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x))


def eager_attention_forward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor,
    scaling: float,
) -> Tensor:
    """Counterpart of HF's `eager_attention_forward`, op by op: query [B,H,T,D], key and value [B,K,S,D], mask [B,T,S],
    true where a token may look -> [B,H,T,D]. Query heads are grouped against their KV head, where HF copies the KV
    heads (`repeat_kv`): a graph would have to move the copies through memory. Masked scores become -1e9, where HF adds
    finfo.min: Optimum Neuron reports that exp() near finfo(bfloat16).min gives NaN on Neuron (not verified here)."""
    B, H, T, D = query.shape
    _, K, S, _ = key.shape
    query = query.reshape(B, K, -1, D)  # B K G*T D
    attn_weights = torch.matmul(query, key.transpose(2, 3)) * scaling  # B K G*T S
    attn_weights = attn_weights.view(B, K, -1, T, S)  # B K G T S
    hidden = max(-1e9, torch.finfo(query.dtype).min / 2)  # float16's minimum is -65504
    attn_weights = torch.where(mask[:, None, None], attn_weights, hidden)
    attn_weights = F.softmax(attn_weights, dim=-1, dtype=torch.float32).to(query.dtype)
    attn_output = torch.matmul(attn_weights.view(B, K, -1, S), value)  # B K G*T D
    return attn_output.view(B, H, T, D)


def sdpa_attention_forward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor,
    scaling: float,
) -> Tensor:
    """Counterpart of HF's `sdpa_attention_forward`: PyTorch's fused kernel, with the arguments above."""
    return F.scaled_dot_product_attention(query, key, value, attn_mask=mask[:, None], scale=scaling, enable_gqa=True)


def flash_attention_forward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor,
    scaling: float,
) -> Tensor:
    """FlashAttention (Dao et al. 2022, arXiv:2205.14135, algorithm 1) in plain tensor operations, with the arguments
    above. It goes through the cache in blocks, with a running maximum, sum and output in float32, so that a long
    prefill never has its [T,S] scores in memory. NxDI calls an NKI kernel for this."""
    B, H, T, D = query.shape
    _, K, S, _ = key.shape
    if T == 1:  # decoding: one row of scores is small
        return eager_attention_forward(query, key, value, mask, scaling)
    block_size = 512  # cache slots
    query_states = query.reshape(B, K, -1, D)  # B K G*T D
    query_states = query_states.float() * scaling
    output = torch.zeros_like(query_states)  # B K G*T D
    total = torch.zeros_like(query_states[..., :1])  # B K G*T 1
    largest = torch.full_like(total, -1e9)  # every query sees slot 0, so the first block replaces it
    for start in range(0, S, block_size):
        block = slice(start, start + block_size)
        key_block = key[:, :, block].float()
        value_block = value[:, :, block].float()
        scores = torch.matmul(query_states, key_block.transpose(2, 3))  # B K G*T block
        scores = scores.unflatten(2, (-1, T))  # B K G T block
        scores = torch.where(mask[:, None, None, :, block], scores, -1e9)
        scores = scores.flatten(2, 3)  # B K G*T block
        larger = torch.maximum(largest, scores.amax(-1, keepdim=True))
        rescale = torch.exp(largest - larger)
        weights = torch.exp(scores - larger)
        total = total * rescale + weights.sum(-1, keepdim=True)
        output = output * rescale + torch.matmul(weights, value_block)
        largest = larger
    output = output / total
    return output.view(B, H, T, D).to(query.dtype)


ATTENTION = {"eager": eager_attention_forward, "sdpa": sdpa_attention_forward, "flash": flash_attention_forward}


class LlamaAttention(nn.Module):
    """Counterpart of HF's `LlamaAttention`, and of NxDI's and Optimum's `NeuronAttentionBase`. q_proj, k_proj and
    v_proj are fused into `Wqkv`, one matmul instead of three, and sharded by head: a rank holds the query heads and KV
    heads that `shard_heads` gives it, so attention itself needs no communication."""

    def __init__(self, config: LlamaConfig, neuron: NeuronConfig, backend: Backend):
        super().__init__()
        tp = neuron.tp_degree
        query_heads, kv_heads = shard_heads(config.num_attention_heads, config.num_key_value_heads, tp)[0]
        self.num_heads = len(query_heads)  # per rank, padding included; the same on every rank
        self.num_key_value_heads = len(kv_heads)
        self.head_dim = config.head_dim
        self.scaling = self.head_dim**-0.5
        self.attention = backend.attention
        query_size = tp * self.num_heads * self.head_dim
        kv_size = tp * self.num_key_value_heads * self.head_dim
        qkv_size = query_size + 2 * kv_size
        options = {"bias": config.attention_bias, "dtype": neuron.dtype}
        self.Wqkv = backend.ColumnParallelLinear(config.hidden_size, qkv_size, gather_output=False, **options)
        self.o_proj = backend.RowParallelLinear(query_size, config.hidden_size, input_is_parallel=True, **options)
        cache_shape = (neuron.batch_size, self.num_key_value_heads, neuron.sequence_length, self.head_dim)
        self.kv_cache = backend.KVCache(cache_shape, neuron.dtype)

    def forward(
        self,
        hidden_states: Tensor,
        cos: Tensor,
        sin: Tensor,
        mask: Tensor,
        position_ids: Tensor,
    ) -> Tensor:
        B, T, _ = hidden_states.shape
        H = self.num_heads
        K = self.num_key_value_heads
        qkv = self.Wqkv(hidden_states)  # B T (H+2K)*D
        qkv = qkv.view(B, T, H + 2 * K, self.head_dim).transpose(1, 2)  # B H+2K T D
        # Never `split`. AWS runs torch-xla with XLA_DISABLE_FUNCTIONALIZATION=1, where a split of a batch returns wrong
        # data (pytorch/xla issue 8640; NxDI and Optimum name it NAPP-3145).
        query_states, key_states, value_states = qkv.tensor_split((H, H + K), dim=1)  # B H T D, B K T D, B K T D
        query_states, key_states = apply_rotary_pos_emb(query_states, key_states, cos, sin)
        kv_length = mask.shape[-1]
        key_states, value_states = self.kv_cache.update(key_states, value_states, position_ids, kv_length)  # B K S D
        attn_output = self.attention(query_states, key_states, value_states, mask, self.scaling)  # B H T D
        attn_output = attn_output.transpose(1, 2).reshape(B, T, -1)  # B T H*D
        return self.o_proj(attn_output)


class LlamaDecoderLayer(nn.Module):
    """Counterpart of HF's `LlamaDecoderLayer`, with the same arithmetic."""

    def __init__(self, config: LlamaConfig, neuron: NeuronConfig, backend: Backend):
        super().__init__()
        self.self_attn = LlamaAttention(config, neuron, backend)
        self.mlp = LlamaMLP(config, neuron, backend)
        self.input_layernorm = backend.RMSNorm(config.hidden_size, config.rms_norm_eps, neuron.dtype)
        self.post_attention_layernorm = backend.RMSNorm(config.hidden_size, config.rms_norm_eps, neuron.dtype)

    def forward(
        self,
        hidden_states: Tensor,
        cos: Tensor,
        sin: Tensor,
        mask: Tensor,
        position_ids: Tensor,
    ) -> Tensor:
        residual = hidden_states
        hidden_states = self.input_layernorm(hidden_states)
        hidden_states = self.self_attn(hidden_states, cos, sin, mask, position_ids)
        hidden_states = residual + hidden_states

        residual = hidden_states
        hidden_states = self.post_attention_layernorm(hidden_states)
        hidden_states = self.mlp(hidden_states)
        return residual + hidden_states


class LlamaModel(nn.Module):
    """Counterpart of HF's `LlamaModel`. The embedding is sharded, because it is one of the largest weights. The mask is
    made of positions alone, since a token sees the slots up to its own position, so that prefill, chunked prefill and
    decoding are one forward with other shapes."""

    def __init__(self, config: LlamaConfig, neuron: NeuronConfig, backend: Backend):
        super().__init__()
        self.sequence_length = neuron.sequence_length
        self.embed_tokens = backend.ParallelEmbedding(
            config.vocab_size,
            config.hidden_size,
            dtype=neuron.dtype,
            shard_across_embedding=not neuron.vocab_parallel,
            pad=True,
            use_spmd_rank=neuron.vocab_parallel,
        )
        self.layers = nn.ModuleList(LlamaDecoderLayer(config, neuron, backend) for _ in range(config.num_hidden_layers))
        self.norm = backend.RMSNorm(config.hidden_size, config.rms_norm_eps, neuron.dtype)
        self.rotary_emb = LlamaRotaryEmbedding(config)

    def forward(self, input_ids: Tensor, position_ids: Tensor, kv_length: int | None = None) -> Tensor:
        """input_ids and position_ids [B,T] int32 -> hidden states after the last norm [B,T,E]."""
        hidden_states = self.embed_tokens(input_ids)  # B T E
        cos, sin = self.rotary_emb(hidden_states, position_ids)  # B T D
        slots = torch.arange(kv_length or self.sequence_length, dtype=torch.int32, device=input_ids.device)  # S
        mask = slots <= position_ids[..., None]  # B T S
        for layer in self.layers:
            hidden_states = layer(hidden_states, cos, sin, mask, position_ids)
        return self.norm(hidden_states)


class LlamaForCausalLM(nn.Module):
    """Counterpart of HF's `LlamaForCausalLM`. lm_head is sharded by vocabulary, padded until tp divides it. For greedy
    decoding the ranks exchange one (logit, id) pair per row instead of their logits, because a large vocabulary has too
    many logits to send for every token."""

    def __init__(self, config: LlamaConfig, neuron: NeuronConfig, backend: Backend):
        super().__init__()
        self.config = config
        self.neuron_config = neuron
        self.static_shapes = backend.static_shapes
        self.model = LlamaModel(config, neuron, backend)
        self.lm_head = backend.ColumnParallelLinear(
            config.hidden_size,
            config.vocab_size,
            bias=False,
            gather_output=False,
            dtype=neuron.dtype,
            pad=True,
        )
        self.gather = backend.gather_from_tensor_model_parallel_region
        self.rank_util = backend.SPMDRank(neuron.tp_degree)

    @property
    def device(self) -> torch.device:
        return self.lm_head.weight.device

    def forward(
        self,
        input_ids: Tensor,
        position_ids: Tensor,
        last: Tensor | None = None,
        kv_length: int | None = None,
    ) -> Tensor:
        """input_ids and position_ids [B,T] int32 -> float32 logits [B,T,V] on every rank; with `last` [B] int32, the
        token after column `last` of each row, int32 [B]. Attention reads the first `kv_length` cache slots, or all."""
        hidden_states = self.model(input_ids, position_ids, kv_length)  # B T E
        if last is None:
            logits = self.gather(self.lm_head(hidden_states))  # B T V, padded
            return logits[..., : self.config.vocab_size].float()
        index = last[:, None, None].expand(-1, 1, hidden_states.shape[-1]).long()  # B 1 E
        last_hidden_state = hidden_states.gather(1, index).squeeze(1)  # B E
        return self.greedy(last_hidden_state)

    def greedy(self, hidden_states: Tensor) -> Tensor:
        """Hidden states [B,E] -> the tokens of the largest logits, int32 [B]; ties go to the lowest id, as in HF."""
        logits = self.lm_head(hidden_states).float()  # B V/tp: this rank's columns
        columns = torch.arange(logits.shape[-1], dtype=torch.int32, device=logits.device)  # V/tp
        first_id = self.rank_util.get_rank() * logits.shape[-1]
        ids = first_id + columns
        # columns beyond the vocabulary are padding, whose logit of 0 would beat negative ones
        is_real = ids < torch.full_like(ids, self.config.vocab_size)  # comparing with a Python int adds int64 ops
        best_logit, best_column = torch.where(is_real, logits, -1e9).max(dim=-1)  # B, B
        best_id = first_id + best_column.int()
        # rank 0's (logit, id), rank 1's, ...: one all-gather; float32 holds every id below 2^24 exactly
        pair = torch.stack((best_logit, best_id.float()), dim=-1)  # B 2
        pairs = self.gather(pair).unflatten(-1, (-1, 2))  # B tp 2
        winner = pairs[..., 0].argmax(-1, keepdim=True)  # B 1: the lowest of equal ranks, so the lowest id
        token = pairs[..., 1].gather(-1, winner).squeeze(-1)  # B
        return token.int()


# ---- what Neuron puts underneath: the static cache


class KVCache(nn.Module):
    """Counterpart of HF's `StaticLayer`: one layer's keys and values on one rank, each [B,K,sequence_length,D]. Its
    size is fixed, because a compiled graph has one shape. HF writes every row at the same slots; here row b writes
    token t to slot position_ids[b,t], so that prompts of different lengths share a batch. Prompts are padded on the
    right, and padding is written too:

        slot       0  1  2  3  4      A query at position p sees the slots 0..p. The first new token of row 1 goes to
        prompt 0   a  b  c  d  e      slot 2, and overwrites the padding there before a query of row 1 gets to position
        prompt 1   f  g  -  -  -      2. So padding is never seen, and needs no mask of its own.
    """

    def __init__(self, shape: tuple[int, ...], dtype: torch.dtype):
        super().__init__()
        self.register_buffer("k", torch.zeros(shape, dtype=dtype))
        self.register_buffer("v", torch.zeros(shape, dtype=dtype))

    def update(
        self,
        k: Tensor,
        v: Tensor,
        position_ids: Tensor,
        kv_length: int,
    ) -> tuple[Tensor, Tensor]:
        """Writes k and v [B,K,T,D] at position_ids [B,T]; returns the first `kv_length` slots of both, [B,K,S,D]."""
        row = torch.arange(k.shape[0], dtype=torch.int32, device=k.device)[:, None]  # B 1
        # indices around a slice come first: self.k[row, :, position_ids] is [B,T,K,D]
        self.k[row, :, position_ids] = k.transpose(1, 2)
        self.v[row, :, position_ids] = v.transpose(1, 2)
        return self.k[:, :, :kv_length], self.v[:, :, :kv_length]


class NeuronKVCache(KVCache):
    """The same, out of place, for NxD alone: its ModelBuilder carries a buffer over to the next call only if it is
    assigned again. On a CPU this would copy the cache for every token, and TorchNeuron, which turns a write in place
    into an aliased output, would need room for a second one."""

    def update(
        self,
        k: Tensor,
        v: Tensor,
        position_ids: Tensor,
        kv_length: int,
    ) -> tuple[Tensor, Tensor]:
        index = position_ids[:, None, :, None].expand_as(k).long()  # B K T D
        self.k = self.k.scatter(2, index, k)
        self.v = self.v.scatter(2, index, v)
        return self.k[:, :, :kv_length], self.v[:, :, :kv_length]


class NeuronRMSNorm(LlamaRMSNorm):
    """The same norm as one call into Neuron's compiler, for NxD. It casts back after multiplying by the weight."""

    def forward(self, hidden_states: Tensor) -> Tensor:
        from torch_neuronx.xla_impl.ops import RmsNorm

        dim = hidden_states.dim() - 1
        normed = RmsNorm.apply(hidden_states.float(), self.weight, self.variance_epsilon, dim)
        return normed.to(hidden_states.dtype)


# ---- what Neuron puts underneath: tensor parallelism
#
# The part of NxD's `parallel_layers.layers` that Llama uses, under the same names, so that the model can be built from
# either. Each weight is one rank's shard.


def get_tensor_model_parallel_size() -> int:
    """The number of ranks."""
    return dist.get_world_size() if dist.is_initialized() else 1


def gather_from_tensor_model_parallel_region(x: Tensor) -> Tensor:
    """Concatenates the x of all ranks along the last dimension: [..., n] -> [..., tp * n]."""
    tp = get_tensor_model_parallel_size()
    if tp == 1:
        return x
    group = dist.group.WORLD.group_name
    # unlike dist.all_gather, functional collectives can be traced into a graph
    gathered = torch.ops._c10d_functional.all_gather_into_tensor(x.contiguous(), tp, group)
    gathered = torch.ops._c10d_functional.wait_tensor(gathered)
    gathered = gathered.view(tp, *x.shape).movedim(0, -2)  # ... tp n
    return gathered.flatten(-2)  # ... tp*n


def reduce_from_tensor_model_parallel_region(x: Tensor) -> Tensor:
    """Sums the x of all ranks."""
    if get_tensor_model_parallel_size() == 1:
        return x
    group = dist.group.WORLD.group_name
    summed = torch.ops._c10d_functional.all_reduce(x.contiguous(), "sum", group)
    return torch.ops._c10d_functional.wait_tensor(summed)


def empty_parameter(*shape: int, dtype: torch.dtype) -> nn.Parameter:
    """A weight without values: `load_model` assigns them."""
    return nn.Parameter(torch.empty(*shape, dtype=dtype), requires_grad=False)


def rank_share(size: int, pad: bool) -> int:
    """The size of one rank's share, rounded up if `pad`. Raises ValueError if the ranks cannot share it evenly."""
    tp = get_tensor_model_parallel_size()
    if not pad and size % tp != 0:
        raise ValueError(f"{tp} ranks cannot share a size of {size} evenly: pass pad=True")
    return -(-size // tp)


class SPMDRank(nn.Module):
    """NxD's `SPMDRank`: the rank as a tensor, int32 [1], loaded from the shard. One graph, traced as rank 0, runs on
    all ranks, so the rank has to be data."""

    def __init__(self, world_size: int):
        super().__init__()
        self.rank = empty_parameter(1, dtype=torch.int32)

    def get_rank(self) -> Tensor:
        return self.rank


class ColumnParallelLinear(nn.Module):
    """Counterpart of HF's `nn.Linear`, sharded by output so that ranks share the work: weight [output_size / tp,
    input_size], bias [output_size / tp], rounded up if `pad`. The bias is added before the product is rounded, as in
    HF; NxD adds it after."""

    def __init__(
        self,
        input_size: int,
        output_size: int,
        *,
        bias: bool,
        gather_output: bool,
        dtype: torch.dtype,
        pad: bool = False,
    ):
        super().__init__()
        if gather_output:
            raise ValueError("ColumnParallelLinear keeps its outputs on their rank here: pass gather_output=False")
        share = rank_share(output_size, pad)
        self.weight = empty_parameter(share, input_size, dtype=dtype)
        self.bias = empty_parameter(share, dtype=dtype) if bias else None

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight, self.bias)


class RowParallelLinear(nn.Module):
    """Counterpart of HF's `nn.Linear`, sharded by input so that it takes what a `ColumnParallelLinear` left on its
    rank: weight [output_size, input_size / tp], bias [output_size]. The ranks' partial results are summed in float32
    (NxD's `reduce_dtype`), because rounding each of them first adds error with every rank."""

    def __init__(
        self,
        input_size: int,
        output_size: int,
        *,
        bias: bool,
        input_is_parallel: bool,
        dtype: torch.dtype,
        pad: bool = False,
    ):
        super().__init__()
        if not input_is_parallel:
            raise ValueError("RowParallelLinear takes inputs that lie on their rank here: pass input_is_parallel=True")
        share = rank_share(input_size, pad)
        self.weight = empty_parameter(output_size, share, dtype=dtype)
        self.bias = empty_parameter(output_size, dtype=dtype) if bias else None

    def forward(self, x: Tensor) -> Tensor:
        if get_tensor_model_parallel_size() == 1:
            return F.linear(x, self.weight, self.bias)
        partial_result = F.linear(x, self.weight).float()
        y = reduce_from_tensor_model_parallel_region(partial_result).to(x.dtype)
        return y if self.bias is None else y + self.bias


class ParallelEmbedding(nn.Module):
    """Counterpart of HF's `nn.Embedding`, sharded because the table is large. By hidden size, a rank holds
    [num_embeddings, embedding_dim / tp], and the slices are gathered. By vocabulary, it holds [num_embeddings / tp,
    embedding_dim], looks up its own rows, and the results are summed; then a tied lm_head can use the same shard."""

    def __init__(
        self,
        num_embeddings: int,
        embedding_dim: int,
        *,
        dtype: torch.dtype,
        shard_across_embedding: bool,
        pad: bool,
        use_spmd_rank: bool,
    ):
        super().__init__()
        self.embedding_dim = embedding_dim
        self.shard_across_embedding = shard_across_embedding
        if shard_across_embedding:
            share = rank_share(embedding_dim, pad)
            self.weight = empty_parameter(num_embeddings, share, dtype=dtype)
        else:
            if not use_spmd_rank:
                raise ValueError("a traced graph would take every rank for rank 0: pass use_spmd_rank=True")
            share = rank_share(num_embeddings, pad)
            self.weight = empty_parameter(share, embedding_dim, dtype=dtype)
            self.rank_util = SPMDRank(get_tensor_model_parallel_size())

    def forward(self, input_ids: Tensor) -> Tensor:
        if self.shard_across_embedding:
            x = F.embedding(input_ids, self.weight)  # B T E/tp
            return gather_from_tensor_model_parallel_region(x)[..., : self.embedding_dim]
        rows = self.weight.shape[0]
        row = input_ids - self.rank_util.get_rank() * rows  # B T: outside of 0..rows-1 if another rank has it
        is_here = (row >= 0) & (row < rows)
        x = F.embedding(torch.where(is_here, row, 0), self.weight)  # B T E
        return reduce_from_tensor_model_parallel_region(torch.where(is_here[..., None], x, 0))


Heads = list[int | None]  # HF head indices on one rank, in order; None is an all-zero padding head


def shard_heads(num_heads: int, num_kv_heads: int, tp: int) -> list[tuple[Heads, Heads]]:
    """Each rank's query heads and KV heads, by the rules of NxD's `gqa.py`. They let any number of heads run on any
    number of ranks, and every query head find its KV head on its own rank."""
    group = num_heads // num_kv_heads
    if tp % num_kv_heads == 0:
        # REPLICATE_TO_TP_DEGREE: each KV head is copied to tp/kv_heads ranks, and the query heads of its group are
        # padded to a multiple of that. 6 query heads, 2 KV heads, tp 4:
        #     rank 0: q0 q1 | k0    rank 1: q2 -- | k0    rank 2: q3 q4 | k1    rank 3: q5 -- | k1
        ranks_per_kv_head = tp // num_kv_heads
        padding = [None] * (-group % ranks_per_kv_head)
        query_heads: Heads = []
        kv_heads: Heads = []
        for kv_head in range(num_kv_heads):
            query_heads += [*range(kv_head * group, (kv_head + 1) * group), *padding]
            kv_heads += [kv_head] * ranks_per_kv_head
    elif num_kv_heads % tp == 0:
        # Both are split evenly, in order. 8 query heads, 2 KV heads, tp 2:
        #     rank 0: q0 q1 q2 q3 | k0    rank 1: q4 q5 q6 q7 | k1
        query_heads = [*range(num_heads)]
        kv_heads = [*range(num_kv_heads)]
    else:
        # CONVERT_TO_MHA: each query head gets a copy of its KV head, and both are padded at the end. 9 query heads,
        # 3 KV heads, tp 2:
        #     rank 0: q0 q1 q2 q3 q4 | k0 k0 k0 k1 k1    rank 1: q5 q6 q7 q8 -- | k1 k2 k2 k2 --
        padding = [None] * (-num_heads % tp)
        query_heads = [*range(num_heads), *padding]
        kv_heads = [*(head // group for head in range(num_heads)), *padding]
    H = len(query_heads) // tp
    K = len(kv_heads) // tp
    ranks = []
    for rank in range(tp):
        query_shard = query_heads[rank * H : (rank + 1) * H]
        kv_shard = kv_heads[rank * K : (rank + 1) * K]
        ranks.append((query_shard, kv_shard))
    return ranks


# ---- what Neuron puts underneath: backends


@dataclass(frozen=True)
class Backend:
    """The implementations that the model is built from. This alone depends on the device; no forward does."""

    ColumnParallelLinear: type[nn.Module]
    RowParallelLinear: type[nn.Module]
    ParallelEmbedding: type[nn.Module]
    SPMDRank: type[nn.Module]
    gather_from_tensor_model_parallel_region: Callable[[Tensor], Tensor]
    RMSNorm: type[LlamaRMSNorm]
    KVCache: type[KVCache]
    attention: Callable[[Tensor, Tensor, Tensor, Tensor, float], Tensor] = eager_attention_forward
    static_shapes: bool = False  # True: attention reads every cache slot, and prompts are padded to a few lengths


REFERENCE = Backend(
    ColumnParallelLinear=ColumnParallelLinear,
    RowParallelLinear=RowParallelLinear,
    ParallelEmbedding=ParallelEmbedding,
    SPMDRank=SPMDRank,
    gather_from_tensor_model_parallel_region=gather_from_tensor_model_parallel_region,
    RMSNorm=LlamaRMSNorm,
    KVCache=KVCache,
)


def nxd_backend() -> Backend:
    """NxD's own layers, with the norm and the cache that its tracer wants."""
    from neuronx_distributed.parallel_layers import layers

    return Backend(
        ColumnParallelLinear=layers.ColumnParallelLinear,
        RowParallelLinear=layers.RowParallelLinear,
        ParallelEmbedding=layers.ParallelEmbedding,
        SPMDRank=layers.SPMDRank,
        gather_from_tensor_model_parallel_region=layers.gather_from_tensor_model_parallel_region,
        RMSNorm=NeuronRMSNorm,
        KVCache=NeuronKVCache,
        static_shapes=True,
    )


def backend_for(device: str, attn: str = "eager") -> Backend:
    """The backend of a device, with a form of attention. Raises UsageError if they do not go together."""
    if device == "nxd":
        return replace(nxd_backend(), attention=ATTENTION[attn])
    if device == "neuron" and attn == "sdpa":  # says the source of 2025
        raise UsageError("--attn sdpa: TorchNeuron's version masks with -inf and copies KV heads; use eager or flash")
    return replace(REFERENCE, attention=ATTENTION[attn], static_shapes=device == "neuron")


# ---- loading


class UsageError(ValueError):
    """An error the user can fix. The message names the file or flag and the remedy."""


def shard_path(ckpt: str | Path, rank: int) -> Path:
    """A rank's shard file, named as NxD names it."""
    return Path(ckpt, f"tp{rank}_sharded_checkpoint.safetensors")


def read_shard(ckpt: str | Path, rank: int) -> dict[str, Tensor]:
    """One rank's tensors by name, memory-mapped. Raises UsageError if the shard says that it belongs to another
    conversion or rank. NxD's own shards do not say."""
    path = shard_path(ckpt, rank)
    settings = json.loads(Path(ckpt, "neuron_config.json").read_text())
    expected = {"conversion_id": settings.get("conversion_id"), "rank": str(rank)}
    try:
        path.open("rb").close()  # safetensors calls every failure to open a file "not found"
        with safe_open(path, "pt") as shard:
            facts = shard.metadata() or {}
    except (SafetensorError, FileNotFoundError) as error:
        raise UsageError(f"{path} is damaged or missing ({error}): convert again") from None
    if any(facts.get(key, value) != value for key, value in expected.items()):
        raise UsageError(f"{path} is of another conversion, or of another rank: convert again")
    state = load_file(path)
    state.setdefault("lm_head.weight", state["model.embed_tokens.weight"])  # tied
    return state


def load_model(
    ckpt: str | Path,
    rank: int = 0,
    *,
    batch_size: int | None = None,
    sequence_length: int | None = None,
    device: str = "cpu",
    backend: Backend | None = None,
    model_class: type[LlamaForCausalLM] = LlamaForCausalLM,
) -> LlamaForCausalLM:
    """One rank of a converted checkpoint. batch_size and sequence_length default to the conversion's, `backend` to
    the device's. Raises UsageError if shard, ranks or cache do not fit, RuntimeError if a weight is missing or has
    another shape."""
    config = LlamaConfig.from_pretrained(ckpt)
    neuron = NeuronConfig.from_pretrained(ckpt).with_cache(batch_size, sequence_length)
    ranks = get_tensor_model_parallel_size()
    if ranks != neuron.tp_degree:
        raise UsageError(f"{ckpt} was converted for --tp {neuron.tp_degree}, but this run has {ranks} ranks")
    model = model_class(config, neuron, backend or backend_for(device))
    state = read_shard(ckpt, rank)
    # a shard has no caches, and rotary frequencies only for yarn, longrope and dynamic: these stay as they were built
    for name, buffer in model.named_buffers():
        state.setdefault(name, buffer)
    model.load_state_dict(state, assign=True)
    model.eval().to(device)
    if device == "neuron":
        # one graph for decoding and one per prompt length: torch would stop at 8, and count those of other models too
        graphs = 1 + len(neuron.prefill_lengths())
        options = {"fullgraph": True, "dynamic": False, "recompile_limit": graphs, "isolate_recompiles": True}
        model.compile(backend="neuron", **options)
    return model


def compile_nxd(
    config: LlamaConfig, neuron: NeuronConfig, backend: Backend, model_class: type[nn.Module], compiler_args: str
) -> nn.Module:
    """NxD's ModelBuilder traces each graph (decoding, and each length of a prompt) once, as rank 0, and compiles it."""
    from neuronx_distributed import ModelBuilder

    builder = ModelBuilder(model_class(config, neuron, backend).eval())
    last = torch.zeros(neuron.batch_size, dtype=torch.int32)
    for length in sorted({1, *neuron.prefill_lengths()}):
        ids = torch.zeros(neuron.batch_size, length, dtype=torch.int32)
        inputs = {"input_ids": ids, "position_ids": ids.clone(), "last": last}
        builder.trace(kwargs=inputs, tag="decode" if length == 1 else f"prefill_{length}")
    return builder.compile(compiler_args=compiler_args)


def load_nxd(
    ckpt: str | Path,
    *,
    batch_size: int | None = None,
    sequence_length: int | None = None,
    backend: Backend | None = None,
    model_class: type[LlamaForCausalLM] = LlamaForCausalLM,
) -> nn.Module:
    """All ranks, on this host's NeuronCores (Trn1, Inf2), in one process. The result is called like the model, always
    with `last`. Graphs that an earlier run has compiled are used again where launch/ is there."""
    from neuronx_distributed import NxDParallelState

    config = LlamaConfig.from_pretrained(ckpt)
    neuron = NeuronConfig.from_pretrained(ckpt).with_cache(batch_size, sequence_length)
    backend = backend or backend_for("nxd")
    tp = neuron.tp_degree
    with NxDParallelState(world_size=tp, tensor_model_parallel_size=tp) as state:
        compiler_args = f"--auto-cast=none --model-type=transformer --lnc={state.lnc_size}"
        arguments = (config, neuron, backend, model_class, compiler_args)
        if HAS_LAUNCH:
            from launch.kept import compile_once

            model = compile_once(compile_nxd, arguments)
        else:
            model = compile_nxd(*arguments)
    model.config = config
    model.neuron_config = neuron
    model.static_shapes = True
    model.device = torch.device("cpu")  # it takes and returns the host's tensors
    rotary = dict(LlamaRotaryEmbedding(config).named_buffers(prefix="model.rotary_emb"))  # a graph has them as weights
    model.set_weights([rotary | read_shard(ckpt, rank) for rank in range(tp)])
    model.to_neuron()
    return model


# ---- generation


def check_prompts(prompts: list[list[int]], config: LlamaConfig, neuron: NeuronConfig) -> None:
    """Raises UsageError if a prompt does not fit the batch, the cache or the vocabulary."""
    if not 0 < len(prompts) <= neuron.batch_size:
        raise UsageError(f"{len(prompts)} prompts do not fit --batch-size {neuron.batch_size}: raise it")
    longest = neuron.sequence_length - 1
    for number, ids in enumerate(prompts, start=1):
        if not ids:
            raise UsageError(f"prompt {number} is empty: give it at least one token")
        if len(ids) > longest:
            is_limit = neuron.sequence_length == neuron.max_sequence_length
            remedy = "This model computes no more" if is_limit else "Raise --sequence-length"
            raise UsageError(f"prompt {number} has {len(ids)} tokens; {longest} fit. {remedy}")
        for place, token in enumerate(ids, start=1):
            if not 0 <= token < config.vocab_size:
                found = f"prompt {number} holds token id {token} at place {place}"
                raise UsageError(f"{found}: this model has 0 to {config.vocab_size - 1}, and needs its own tokenizer")


@torch.no_grad()
def generate(
    model: LlamaForCausalLM,
    prompts: list[list[int]],
    max_new_tokens: int,
    eos_token_ids: list[int],
    on_step: Callable[[list[list[int]]], None] | None = None,
) -> list[list[int]]:
    """Greedy decoding: the new tokens of each prompt. A row stops at an EOS token, after max_new_tokens, or when the
    cache is full. The batch is static: finished and unused rows are still computed, and ignored. `on_step` is called
    after every step with the tokens generated so far. Raises UsageError if the prompts do not fit."""
    neuron = model.neuron_config
    check_prompts(prompts, model.config, neuron)
    rows = prompts + [[0]] * (neuron.batch_size - len(prompts))
    completions: list[list[int]] = [[] for _ in prompts]
    remaining = [min(max_new_tokens, neuron.sequence_length - len(prompt)) for prompt in prompts]

    # 1. read the prompts, which gives each row its first new token
    next_position = torch.tensor([len(row) for row in rows])  # B: the first free slot of each row
    new_tokens = prefill(model, rows, next_position)  # B
    while True:
        # 2. keep what was chosen for rows that go on
        for row, token in enumerate(new_tokens.tolist()[: len(prompts)]):
            if remaining[row] > 0:
                completions[row].append(token)
                remaining[row] = 0 if token in eos_token_ids else remaining[row] - 1
        if on_step is not None:
            on_step(completions)
        if not any(remaining):
            return completions
        # 3. feed it back, each row at its own position
        first_column = torch.zeros_like(next_position)
        kv_length = int(next_position.max()) + 1
        new_tokens = choose(model, new_tokens[:, None], next_position[:, None], first_column, kv_length)
        next_position = next_position + 1


def prefill(model: LlamaForCausalLM, rows: list[list[int]], lengths: Tensor) -> Tensor:
    """The first new token of each row [B]. Prompts are padded on the right to one length, and processed at once or in
    chunks; a row's token comes from the chunk that contains the end of its prompt."""
    neuron = model.neuron_config
    longest = int(lengths.max())
    if neuron.prefill_chunk_size is not None:
        chunk_size = neuron.prefill_chunk_size
    elif model.static_shapes:
        chunk_size = min(bucket for bucket in neuron.prefill_lengths() if bucket >= longest)
    else:
        chunk_size = longest
    new_tokens = torch.zeros_like(lengths)
    for start in range(0, longest, chunk_size):
        stop = start + chunk_size
        ids = torch.tensor([(row + [0] * stop)[start:stop] for row in rows])  # B T
        positions = torch.arange(start, stop).expand_as(ids)
        last = (lengths - 1 - start).clamp(0, chunk_size - 1)
        chosen = choose(model, ids, positions, last, kv_length=stop)
        new_tokens = torch.where(lengths > start, chosen, new_tokens)
    return new_tokens


def choose(model: LlamaForCausalLM, ids: Tensor, positions: Tensor, last: Tensor, kv_length: int) -> Tensor:
    """One call of the model: the token after column `last` of each row, int32 [B]. Attention reads `kv_length` slots of
    the cache, or all of them where shapes are static."""
    slots = model.neuron_config.sequence_length
    positions = positions.clamp(max=slots - 1)  # padding and finished rows may point beyond the cache
    inputs = [tensor.int().to(model.device) for tensor in (ids, positions, last)]
    if model.static_shapes:
        return model(*inputs).cpu()
    return model(*inputs, kv_length=min(kv_length, slots)).cpu()


# ---- command

HAS_LAUNCH = Path(__file__).with_name("launch").is_dir()  # else this file is alone, which is enough to run it
DEFAULT_PROMPT = "Photosynthesis is the process by which"
# torchrun sets all of these; a scheduler, another launcher or a notebook may set some, which then mean nothing here
TORCHRUN = {"TORCHELASTIC_RUN_ID", "TORCHELASTIC_RESTART_COUNT", "RANK", "WORLD_SIZE", "LOCAL_RANK"}
TORCHRUN |= {"LOCAL_WORLD_SIZE", "GROUP_RANK", "MASTER_ADDR", "MASTER_PORT"}


def is_under_torchrun() -> bool:
    """Whether torchrun started this process."""
    return os.environ.keys() >= TORCHRUN


def positive_int(text: str) -> int:
    """argparse type of a count. float32 represents integers exactly only up to 2^24."""
    if not text.isdecimal() or not 1 <= int(text) <= 2**24:
        raise argparse.ArgumentTypeError(f"{text!r} is not a positive integer up to 2^24")
    return int(text)


def integers(text: str) -> list[int]:
    """argparse type of a list such as 1,2,3."""
    return [int(number) for number in text.split(",")]


class ArgumentParser(argparse.ArgumentParser):
    """A wrong flag is a UsageError like any other, so that one of torchrun's ranks says so, and not all."""

    def error(self, message: str) -> None:
        raise UsageError(message)


def parse_args() -> argparse.Namespace:
    parser = ArgumentParser(description="Greedy Llama generation as AWS Neuron computes it.", usage=argparse.SUPPRESS)
    folder = "directory written by convert_weights.py"
    parser.add_argument("--ckpt", required=True, type=os.path.expanduser, help=folder)
    parser.add_argument("--tp", type=positive_int, help="number of ranks (must match the conversion)")
    stdin = "repeat for a batch; default: standard input, one line without its newline, several as they are"
    parser.add_argument("--prompt", dest="prompts", action="append", metavar="TEXT", help=stdin)
    parser.add_argument("--prompt-ids", dest="prompts", action="append", type=integers, metavar="1,2,3")
    parser.add_argument("--max-new-tokens", type=positive_int, default=64, help="default: %(default)s")
    parser.add_argument("--batch-size", type=positive_int, help="default: the conversion's")
    parser.add_argument("--sequence-length", type=positive_int, help="default: the conversion's")
    parser.add_argument("--device", default="auto", help="auto (what is installed), cpu, nxd, neuron, cuda, ...")
    parser.add_argument("--attn", choices=ATTENTION, help="default: eager, as HF; with --compile sdpa")
    parser.add_argument("--compile", action="store_true", help="on a CPU: compiled decoding")
    parser.add_argument("--ignore-eos", action="store_true", help="do not stop at EOS")
    parser.add_argument("--json", action="store_true", help="print JSON instead of text")
    parser.add_argument("--timeout", type=positive_int, default=60, help="end if a rank is silent for so many seconds")
    args = parser.parse_args()
    if (args.json or args.compile) and not HAS_LAUNCH:
        raise UsageError("--json and --compile need the folders launch/ and cpu/ beside llama_neuron.py")
    args.attn = args.attn or ("sdpa" if args.compile else "eager")
    return args


def choose_device(asked: str) -> str:
    """Resolves --device on this machine. NxD runs on torch-xla, TorchNeuron does not. Raises UsageError if the device
    is not available."""
    has_xla = find_spec("torch_xla")
    available = {
        "nxd": has_xla and find_spec("neuronx_distributed"),
        "neuron": find_spec("torch_neuronx") and not has_xla,
        "cpu": True,
    }
    if asked == "auto":
        return next(device for device in available if available[device])
    accelerator = torch.accelerator.current_accelerator(check_available=True)  # cuda, or another that torch knows
    if not available.get(asked, accelerator is not None and asked == accelerator.type):
        raise UsageError(f"--device {asked} is not available here: see docs/neuron.md")
    return asked


def start(args: argparse.Namespace, work: Callable[[argparse.Namespace, int], None]) -> None:
    """Calls work(args, rank) on every rank, with token ids for args.prompts. The ranks are torchrun's if it started
    this process, else this process if it is enough, else processes that share memory (CPU, launch/), else torchrun's
    again. Raises UsageError if --ckpt, --tp or the prompts are wrong."""
    args.device = choose_device(args.device)
    under_torchrun = is_under_torchrun()
    if under_torchrun and args.device == "nxd":
        raise UsageError("--device nxd runs all ranks in one process: start it without torchrun")
    rank = int(os.environ["RANK"]) if under_torchrun else 0
    if HAS_LAUNCH:
        from checkpoint.seal import check_seal

        check_seal(args.ckpt, [rank] if under_torchrun else None)
    neuron = NeuronConfig.from_pretrained(args.ckpt)
    tp = neuron.tp_degree
    if args.tp not in (None, tp):
        raise UsageError(f"--tp {args.tp}, but {args.ckpt} was converted for --tp {tp}: convert it again")
    args.tp = tp
    can_fork = args.device == "cpu" and sys.platform == "linux"  # on macOS a fork after torch's import may crash
    if args.compile and (under_torchrun or not can_fork):
        raise UsageError("--compile is for a CPU, on Linux, without torchrun: leave it out")
    in_this_process = under_torchrun or tp == 1 or args.device == "nxd"
    if not in_this_process and not (HAS_LAUNCH and can_fork):
        os.environ.setdefault("OMP_NUM_THREADS", str(max(1, torch.get_num_threads() // tp)))
        # not by this host's name, which may not resolve; as it was called, with the interpreter's own flags
        launcher = ["-m", "torch.distributed.run", f"--nproc-per-node={tp}", "--local-addr=127.0.0.1", "--no-python"]
        os.execv(sys.executable, [sys.executable, *launcher, sys.executable, *sys.orig_argv[1:]])
    if under_torchrun:
        join_torchrun(args.device, args.timeout)
    args.prompts, args.tokenizer = read_prompts(args, rank)
    args.batch_size = args.batch_size or max(neuron.batch_size, len(args.prompts))
    neuron = neuron.with_cache(args.batch_size, args.sequence_length)
    check_prompts(args.prompts, LlamaConfig.from_pretrained(args.ckpt), neuron)
    if in_this_process:
        work(args, rank)
    else:
        from launch.shared_memory import start_ranks

        start_ranks(partial(work, args), tp, args.timeout)
    if under_torchrun:
        dist.destroy_process_group()  # else gloo's threads may abort at exit


def join_torchrun(device: str, timeout: int) -> None:
    """Makes torchrun's ranks one process group: prompts go over gloo, the device's tensors over its own backend. The
    group comes before the device, because TorchNeuron's group is what gives a process its NeuronCore."""
    if device == "cpu" and HAS_LAUNCH:
        from launch.torchrun import join  # ranks that end together

        join(timeout)
    elif device == "cpu":
        dist.init_process_group("gloo", timeout=timedelta(seconds=timeout))
    else:
        backend = dist.get_default_backend_for_device(device)
        dist.init_process_group(f"cpu:gloo,{device}:{backend}", timeout=timedelta(seconds=timeout))
        torch.accelerator.set_device_index(int(os.environ["LOCAL_RANK"]))


def read_prompts(args: argparse.Namespace, rank: int) -> tuple[list[list[int]], object]:
    """The ids of --prompt and --prompt-ids, else of piped standard input, else of a built-in sentence; and the
    tokenizer, if the checkpoint has one. Raises UsageError if text needs one and there is none."""
    prompts = args.prompts or []
    if not prompts and rank == 0:
        is_piped = sys.stdin is not None and not sys.stdin.isatty()
        text = (os.fsdecode(sys.stdin.buffer.read()) if is_piped else "") or DEFAULT_PROMPT
        # one line loses the newline that `echo` adds; the last newline of a chat template is part of it
        prompts = [text.removesuffix("\n") if text.count("\n") == 1 else text]
    if dist.is_initialized():  # rank 0 alone has read standard input
        prompts = prompts or [None]
        dist.broadcast_object_list(prompts, device=torch.device("cpu"))
    tokenizer = None
    path = Path(args.ckpt, "tokenizer.json")
    if path.exists():
        from tokenizers import Tokenizer

        tokenizer = Tokenizer.from_file(str(path))
        settings = path.with_name("tokenizer_config.json")
        if settings.exists():  # the one key of it that changes ids and is not in tokenizer.json
            tokenizer.encode_special_tokens = json.loads(settings.read_text()).get("split_special_tokens") is True
    ids = []
    for prompt in prompts:
        if isinstance(prompt, str):
            if tokenizer is None:
                raise UsageError(f"{args.ckpt} has no tokenizer.json: give --prompt-ids")
            text = os.fsencode(prompt).decode(errors="replace")  # it may hold bytes that are not UTF-8
            prompt = tokenizer.encode(text).ids
        ids.append(prompt)
    return ids, tokenizer


def run(args: argparse.Namespace, rank: int) -> None:
    """One rank's work: load and generate. Rank 0 prints."""
    began = time.perf_counter()
    cache = {"batch_size": args.batch_size, "sequence_length": args.sequence_length}
    backend = backend_for(args.device, args.attn)
    if args.device == "nxd":
        stdout = os.dup(1)
        os.dup2(2, 1)  # NxD and its compiler print to stdout; send that to stderr
        model = load_nxd(args.ckpt, backend=backend, **cache)
        sys.stdout.flush()
        os.dup2(stdout, 1)
    else:
        model = load_model(args.ckpt, rank, device=args.device, backend=backend, **cache)
    loaded = time.perf_counter()
    if args.compile:
        from launch.compiled import compile_decode

        compile_decode(model)
    eos_token_ids = [] if args.ignore_eos else model.config.eos_token_id
    if HAS_LAUNCH:
        from launch.report import Report  # streamed text, timings, --json

        report = Report(args, rank, began, loaded)
        completions = generate(model, args.prompts, args.max_new_tokens, eos_token_ids, report.on_step)
        report.print(model, completions)
    else:
        completions = generate(model, args.prompts, args.max_new_tokens, eos_token_ids)
        for prompt, new_tokens in zip(args.prompts, completions, strict=True):
            if rank == 0:
                print(args.tokenizer.decode(prompt + new_tokens) if args.tokenizer else new_tokens)


def main() -> None:
    start(parse_args(), run)


if __name__ == "__main__":
    if HAS_LAUNCH:
        # launch/ imports llama_neuron: that has to be this module, not a second copy of it
        sys.modules.setdefault("llama_neuron", sys.modules[__name__])
        import llama_neuron
        from launch.command import run_command  # one line for whatever ends a command, and an exit code

        run_command(llama_neuron.main)
    else:
        if sys.stdout is not None:
            sys.stdout.reconfigure(errors="replace")  # it may be ASCII
        try:
            main()
        except UsageError as error:
            print(f"llama_neuron.py: error: {error}", file=sys.stderr)
            sys.exit(2)

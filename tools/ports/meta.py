"""Two Llamas of AWS's that take Meta's checkpoints: NxD's example, and NxDI's experimental one, captured.

    python -m tools.ports example ...       examples/inference/llama of neuronx-distributed
    python -m tools.ports experimental ...  neuronx_distributed_inference/experimental/models/llama3

Neither can capture on a device. On a CPU it is their own `model.py` and `load_llama_checkpoint`, which reads the HF
checkpoint written in Meta's format, and with more than one rank NxD's `shard_checkpoint`. The experimental one's MLP is
for one rank on a CPU; with more, torch does what its branch for a device does by a kernel of AWS's.
"""

from __future__ import annotations

import tempfile
from functools import partial
from pathlib import Path
from types import ModuleType

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from checkpoint.config import llama_config, read_config
from checkpoint.tensors import open_checkpoint
from llama_neuron import LlamaConfig, UsageError
from tools.ports.common import Numbers, find_heads, halves_from_pairs, pairs_from_halves
from tools.ports.cpu_mode import KEY, QUERY, Taps, capture_ranks, pad_prompts

PACKAGES = {
    "example": ("neuronx_distributed", "model"),
    "experimental": ("neuronx_distributed", "neuronx_distributed_inference"),
}
# Meta's names of HF's
NAMES = {
    "model.": "",
    "embed_tokens": "tok_embeddings",
    "lm_head": "output",
    "self_attn.q_proj": "attention.wq",
    "self_attn.k_proj": "attention.wk",
    "self_attn.v_proj": "attention.wv",
    "self_attn.o_proj": "attention.wo",
    "mlp.gate_proj": "feed_forward.w1",
    "mlp.up_proj": "feed_forward.w3",
    "mlp.down_proj": "feed_forward.w2",
    "input_layernorm": "attention_norm",
    "post_attention_layernorm": "ffn_norm",
}


def capture(
    port: str, hf: Path, out: Path, *, prompts: list[list[int]], new_tokens: int, tp: int, device: str, dtype: str
) -> None:
    """Writes `out`/capture.safetensors. `port`: "example" or "experimental". For the rest see `tools.ports.common`."""
    if device != "cpu":
        raise UsageError(f"--device {device}: the {port} Llama cannot capture on a device, use --device cpu")
    config = llama_config(read_config(hf))
    length = max(map(len, prompts)) + new_tokens
    length = -(-length // tp) * tp  # the experimental one cuts prompts, padded to this, into one share a rank

    def capture_rank(rank: int) -> tuple:
        from neuronx_distributed.parallel_layers import parallel_state

        parallel_state.initialize_model_parallel(tensor_model_parallel_size=tp, skip_collective_init=True)
        weights = metas_weights(hf, config, getattr(torch, dtype))
        load = {"example": load_example, "experimental": load_experimental}[port]
        module, model = load(config, weights, len(prompts), length, rank, tp, getattr(torch, dtype))
        taps = watch(module, model, port, config.head_dim)
        logits, new_ids = generate(model, prompts, new_tokens, length)
        for name, calls in taps.calls.items():
            calls[0] = whole(calls[0], name, length)
        return {**taps.join(prompts), "logits": logits}, heads_of(model, weights, config.head_dim), new_ids

    facts = {"prompts": prompts, "dtype": dtype, "device": f"cpu, AWS's {port} Llama"}
    capture_ranks(out, PACKAGES[port], capture_rank, tp=tp, **facts)


capture_example = partial(capture, "example")
capture_experimental = partial(capture, "experimental")


# ---- weights


def metas_weights(hf: Path, config: LlamaConfig, dtype: torch.dtype) -> dict[str, Tensor]:
    """The tensors of Meta's consolidated.00.pth."""
    checkpoint = open_checkpoint(hf, config)
    weights = {}
    for name in checkpoint.slices:
        meta = name
        for theirs, metas in NAMES.items():
            meta = meta.replace(theirs, metas)
        weight = checkpoint.get(name, dtype)
        if ".wq.weight" in meta or ".wk.weight" in meta:
            heads = weight.unflatten(0, (-1, config.head_dim))
            weight = pairs_from_halves(heads, dim=1).flatten(0, 1)
        weights[meta] = weight.contiguous()
    weights.setdefault("output.weight", weights["tok_embeddings.weight"])
    return weights


def sizes_of(config: LlamaConfig, dtype: torch.dtype) -> dict[str, object]:
    """What both ports' configs hold: there is no place for a rope scaling, biases or an untied lm_head."""
    return {
        "vocab_size": config.vocab_size,
        "hidden_size": config.hidden_size,
        "n_layers": config.num_hidden_layers,
        "n_heads": config.num_attention_heads,
        "n_kv_heads": config.num_key_value_heads,
        "head_dim": config.head_dim,
        "intermediate_size": config.intermediate_size,
        "dtype": dtype,
        "rms_norm_eps": config.rms_norm_eps,
        "rope_theta": config.rope_parameters["rope_theta"],
        "pad_token": 0,
    }


def load_example(
    config: LlamaConfig, weights: dict, batch_size: int, length: int, rank: int, tp: int, dtype: torch.dtype
) -> tuple[ModuleType, nn.Module]:
    """The example's module, and its model with this rank's weights."""
    import config as config_module
    import model as module

    settings = config_module.Config(**sizes_of(config, dtype))
    with tempfile.NamedTemporaryFile(suffix=".pth") as file:
        torch.save(weights, file.name)
        converted = module.load_llama_checkpoint(settings, file.name, tp)
    model = module.Transformer(settings, batch_size, length)
    load_shard(model, converted, rank, tp)
    return module, model


def load_experimental(
    config: LlamaConfig, weights: dict, batch_size: int, length: int, rank: int, tp: int, dtype: torch.dtype
) -> tuple[ModuleType, nn.Module]:
    """The same for the experimental one."""
    import neuronx_distributed_inference.experimental.models.llama3.model as module
    from neuronx_distributed_inference.experimental.core.config import AttentionConfig, BuildConfig

    sizes = module.Llama3ModelConfig(**sizes_of(config, dtype))
    settings = module.Llama3Config(sizes, AttentionConfig(cp_degree=1), BuildConfig(batch_size, length, tp))
    with tempfile.NamedTemporaryFile(suffix=".pth") as file:
        torch.save(weights, file.name)
        converted = module.load_llama_checkpoint(settings, file.name)
    model = module.Llama3Transformer(settings, batch_size, length)
    load_shard(model, converted, rank, tp)
    if tp > 1:
        replace_mlp(module)
    return module, model


def load_shard(model: nn.Module, weights: dict, rank: int, tp: int) -> None:
    """As their scripts load it: on one rank whole, on more by NxD."""
    from neuronx_distributed.trace.functions import shard_checkpoint

    if tp > 1:
        weights = shard_checkpoint(weights, model, start_rank=rank, end_rank=rank)[0]
    model.load_state_dict(weights, strict=False)
    model.eval()


def replace_mlp(module: ModuleType) -> None:
    """On a CPU each rank would run the MLP on its own share of a prompt's positions, and add up different ones."""

    def gated_mlp(w_up, w_gate, w_down, hidden, tensor_parallel_group):
        is_share = hidden.shape[1] > 1
        if is_share:
            hidden = module.gather_from_tensor_model_parallel_region_with_dim(
                hidden, gather_dim=1, process_group=tensor_parallel_group
            )
        partial_sum = F.linear(F.silu(w_gate(hidden)) * w_up(hidden), w_down.weight)
        if is_share:
            return module.reduce_scatter_to_tensor_model_parallel_region_with_dim(
                partial_sum, partition_dim=1, process_group=tensor_parallel_group
            )
        return module.reduce_from_tensor_model_parallel_region(partial_sum, process_group=tensor_parallel_group)

    module.NF.gated_mlp = gated_mlp


def heads_of(model: nn.Module, weights: dict[str, Tensor], size: int) -> tuple[Numbers, Numbers]:
    """HF's numbers of the query and KV heads on this rank, by the weights of layer 0."""
    attention = model.layers[0].attention
    if hasattr(attention, "wqkv"):
        query, key = attention.n_heads * size, attention.n_kv_heads * size
        rows = attention.wqkv.weight.split((query, key, key))
    else:
        rows = attention.wq.weight, attention.wk.weight
    query = find_heads(rows[0], weights["layers.0.attention.wq.weight"], size)
    return query, find_heads(rows[1], weights["layers.0.attention.wk.weight"], size)


# ---- a run


def watch(module: ModuleType, model: nn.Module, port: str, head_dim: int) -> Taps:
    """Hooks on the modules of either model. No module returns q and k, [B,T,n,D]: each layer calls `rope` with q, then
    with k."""
    taps = Taps()
    rotate = module.rope
    kinds: list[str] = []  # what `rope` will be called with in the layer that runs

    def rotate_and_keep(x, *args):
        rotated = rotate(x, *args)
        name = kinds.pop(0)
        taps.keep(f"{name}_proj", halves_from_pairs(x))
        taps.keep(name, halves_from_pairs(rotated))
        return rotated

    def starts(place: str) -> None:
        kinds[:] = [f"{place}.q", f"{place}.k"]

    module.rope = rotate_and_keep
    taps.input(model.layers[0], "hidden_states.0")
    if port == "experimental":  # the example's norm sees the last position of a prompt alone
        taps.output(model.norm, "final_norm")
    for number, layer in enumerate(model.layers):
        place = f"layers.{number}"
        attention = layer.attention
        attention.register_forward_pre_hook(lambda module, args, place=place: starts(place))
        taps.output(layer, f"hidden_states.{number + 1}")
        taps.output(layer.attention_norm, f"{place}.input_layernorm")
        taps.output(attention, f"{place}.attention")
        taps.input(attention.wo, f"{place}.heads")
        taps.output(layer.mlp_norm, f"{place}.post_attention_layernorm")
        taps.output(layer.mlp, f"{place}.mlp")
        if hasattr(attention, "wqkv"):
            width = attention.n_kv_heads * head_dim
            taps.output(attention.wqkv, f"{place}.v", lambda output, width=width: output[..., -width:])
        else:
            taps.output(attention.wv, f"{place}.v")
    return taps


def whole(x: Tensor, name: str, length: int) -> Tensor:
    """[B,length,...] of a prompt: the experimental model spreads its positions over the ranks, but not in attention."""
    if name.rpartition(".")[2] in QUERY + KEY or x.shape[1] == length:
        return x
    shares = [torch.empty_like(x) for _ in range(dist.get_world_size())]
    dist.all_gather(shares, x.contiguous())
    return torch.cat(shares, dim=1)


@torch.inference_mode()
def generate(
    model: nn.Module, prompts: list[list[int]], new_tokens: int, length: int
) -> tuple[Tensor, list[list[int]]]:
    """The logits [B,M,V] that the model returns, and the largest of each as the next id. It is called as their own
    scripts call it, with prompts padded to `length`."""
    ids, mask = pad_prompts(prompts, length)
    rows = torch.arange(len(prompts))
    last = mask.sum(-1) - 1
    steps = [model(ids.int(), last.int(), mask.int())]
    for _ in range(new_tokens - 1):
        last = last + 1
        mask[rows, last] = 1
        steps.append(model(steps[-1].argmax(-1).int(), last.int(), mask.int()))
    logits = torch.cat(steps, dim=1)
    return logits, logits.argmax(-1).tolist()

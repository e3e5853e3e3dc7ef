"""Optimum Neuron's Llama (github.com/huggingface/optimum-neuron), captured: `python -m tools.ports optimum`.

Optimum has neither a CPU mode nor a capture. What runs here are its own modules, converter, cache and wrappers, and the
shards of NxD, with the settings of its export except that it samples on the host. Three things are in place of a
device's: its traced graphs are called as modules, its norm is torch's, and so are the two slice updates of its cache
that are XLA's.
"""

from __future__ import annotations

from pathlib import Path
from types import ModuleType

import torch
from torch import Tensor, nn

from llama_neuron import UsageError
from tools.ports.cpu_mode import Taps, capture_ranks, heads_of, pad_prompts

PACKAGES = ("neuronx_distributed", "optimum.neuron")


def capture(
    hf: Path, out: Path, *, prompts: list[list[int]], new_tokens: int, tp: int, device: str, dtype: str
) -> None:
    """Writes `out`/capture.safetensors. For arguments and errors see `tools.ports.common`."""
    if device != "cpu":
        raise UsageError(f"--device {device}: Optimum Neuron cannot capture on a device, use --device cpu")

    def capture_rank(rank: int) -> tuple:
        taps = Taps()
        application, model = load(hf, prompts, new_tokens, rank, tp, dtype, taps)
        logits, new_ids = generate(application, prompts, new_tokens)
        # with more than one prompt Optimum batches continuously: the prompts are read one by one
        count = len(prompts)
        taps.calls = {name: [torch.cat(calls[:count]), *calls[count:]] for name, calls in taps.calls.items()}
        return {**taps.join(prompts), "logits": logits}, heads_of(model.layers[0].self_attn, hf), new_ids

    facts = {"prompts": prompts, "dtype": dtype, "device": "cpu, Optimum Neuron's modules"}
    capture_ranks(out, PACKAGES, capture_rank, tp=tp, **facts)


class Graphs(nn.Module):
    """In place of the traced graphs: chooses a module by the shape of its input, and keeps the caches, which the graphs
    share."""

    def __init__(self, prefill: nn.Module, decode: nn.Module) -> None:
        super().__init__()
        self.prefill = prefill
        self.decode = decode

    def forward(self, input_ids: Tensor, *args: Tensor) -> Tensor:
        model = self.decode if input_ids.shape[-1] == 1 else self.prefill
        logits, *caches = model(input_ids, *args)
        for module in (self.prefill, self.decode):
            for parameter, cache in zip(module.kv_mgr.past_key_values, caches, strict=True):
                parameter.data = cache
        return logits


def load(
    hf: Path, prompts: list[list[int]], new_tokens: int, rank: int, tp: int, dtype: str, taps: Taps
) -> tuple[nn.Module, nn.Module]:
    """Optimum's application, and its model of the prompts, with this rank's weights and with hooks."""
    import optimum.neuron.models.inference.backend.modules.kvcache.kv_cache_manager as cache_manager
    from neuronx_distributed.parallel_layers import parallel_state
    from neuronx_distributed.trace.trace import get_sharded_checkpoint
    from optimum.neuron.models.inference.backend.config import NxDNeuronConfig
    from optimum.neuron.models.inference.llama.modeling_llama import LlamaNxDModelForCausalLM
    from transformers import AutoConfig

    parallel_state.initialize_model_parallel(tensor_model_parallel_size=tp, skip_collective_init=True)
    replace_slice_updates(cache_manager)
    config = AutoConfig.from_pretrained(hf)
    neuron_config = NxDNeuronConfig(
        batch_size=len(prompts),
        sequence_length=max(map(len, prompts)) + new_tokens,
        tp_degree=tp,
        torch_dtype=getattr(torch, dtype),
        fused_qkv=True,
        on_device_sampling=False,  # else it returns ids alone
        continuous_batching=len(prompts) > 1,
        target="trn1",
    )
    builders = LlamaNxDModelForCausalLM.create_graph_builders(config, neuron_config)
    models = []
    for name in ("context_encoding", "token_generation"):
        instance = builders["model"][name].get_model_instance()
        instance.load_module()
        model, _ = instance.get(0)
        model.config.torch_dtype = neuron_config.torch_dtype
        weights = LlamaNxDModelForCausalLM.checkpoint_loader_fn(LlamaNxDModelForCausalLM, hf, config, neuron_config)
        get_sharded_checkpoint(weights, model, rank, tp)
        model.load_state_dict(weights, strict=False)
        watch(taps, model)
        models.append(model)
    return LlamaNxDModelForCausalLM(config, neuron_config, {"model": Graphs(*models)}, builders), models[0]


def replace_slice_updates(cache_manager: ModuleType) -> None:
    """XLA's DynamicUpdateSlice in torch: a start is clamped so that the update fits."""

    def update_slice(tensor: Tensor, update: Tensor, starts: list[Tensor]) -> Tensor:
        index = []
        for start, size, width in zip(starts, tensor.shape, update.shape, strict=True):
            first = min(max(int(start), 0), size - width)
            index.append(slice(first, first + width))
        updated = tensor.clone()
        updated[tuple(index)] = update
        return updated

    cache_manager.dynamic_update_slice = update_slice
    cache_manager.fill_prefix = lambda tensor, update: update_slice(tensor, update, [0] * tensor.dim())


def watch(taps: Taps, model: nn.Module) -> None:
    """Hooks on the modules of one of Optimum's models."""
    taps.output(model.embed_tokens, "hidden_states.0")
    taps.output(model.norm, "final_norm")
    for number, layer in enumerate(model.layers):
        place = f"layers.{number}"
        taps.output(layer, f"hidden_states.{number + 1}", lambda output: output[0])
        taps.output(layer.input_layernorm, f"{place}.input_layernorm")
        taps.output(layer.self_attn, f"{place}.attention", lambda output: output[0])
        taps.input(layer.self_attn.o_proj, f"{place}.heads")
        taps.output(layer.post_attention_layernorm, f"{place}.post_attention_layernorm")
        taps.output(layer.mlp, f"{place}.mlp")
        watch_attention(taps, layer.self_attn, place)


def watch_attention(taps: Taps, attention: nn.Module, place: str) -> None:
    """q, k and v are no module's output: methods of the attention are given them, [B,T,n,D] before the rotation and
    [B,n,T,D] after it."""
    rotate = attention.rotate_qkv_tensors

    def rotate_and_keep(position_ids, q, k, **settings):
        taps.keep(f"{place}.q_proj", q)
        taps.keep(f"{place}.k_proj", k)
        return rotate(position_ids, q, k, **settings)

    def keeping(attend):
        def attend_and_keep(q, k, v, *args):
            for kind, x in zip("qkv", (q, k, v), strict=True):
                taps.keep(f"{place}.{kind}", x.transpose(1, 2))
            return attend(q, k, v, *args)

        return attend_and_keep

    attention.rotate_qkv_tensors = rotate_and_keep
    attention.perform_prefill = keeping(attention.perform_prefill)
    attention.compute_for_token_gen = keeping(attention.compute_for_token_gen)


@torch.inference_mode()
def generate(application: nn.Module, prompts: list[list[int]], new_tokens: int) -> tuple[Tensor, list[list[int]]]:
    """The logits [B,M,V] that Optimum returns, and the largest of each as the next id."""
    ids, mask = pad_prompts(prompts)
    positions = (mask.cumsum(-1) - 1).masked_fill(mask == 0, 1)  # as Optimum's own generate gives them
    lengths = mask.sum(-1, keepdim=True)
    rows = torch.arange(len(prompts))
    sampling = torch.ones(len(prompts), 3)  # unused, as Optimum returns logits
    steps = [application(ids, positions, rows, sampling)]
    for number in range(new_tokens - 1):
        steps.append(application(steps[-1][:, -1:].argmax(-1), lengths + number, rows, sampling))
    logits = torch.cat(steps, dim=1)
    return logits, logits.argmax(-1).tolist()

"""NxDI's Llama (github.com/aws-neuron/neuronx-distributed-inference), captured: `python -m tools.ports nxdi`.

On a CPU it is NxDI's own CPU mode, `to_cpu`: its converter, its shards and modules, gloo between the ranks. All ranks
are captured, by hooks. What a device does otherwise: the norms there are a custom call of AWS's, which rounds in its
own way; NxDI replaces it by HF's module on a CPU. On a device it is NxDI's compiled model and its own tensor capture,
as docs/captures.md describes, of rank 0 alone. Nobody of this project has seen that on hardware.
"""

from __future__ import annotations

import tempfile
from copy import copy
from importlib.util import find_spec
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import nn

from checkpoint.config import llama_config, read_config
from llama_neuron import UsageError
from tools.ports.common import join_texts
from tools.ports.cpu_mode import Taps, capture_ranks, find_sources, heads_of, pad_prompts

PACKAGES = ("neuronx_distributed", "neuronx_distributed_inference")
BUCKET = 128  # a prompt is padded to a multiple of this


def capture(
    hf: Path, out: Path, *, prompts: list[list[int]], new_tokens: int, tp: int, device: str, dtype: str
) -> None:
    """Writes `out`/capture.safetensors, or on a device NxDI's own files into `out`. For arguments and errors see
    `tools.ports.common`."""
    if device != "cpu":
        capture_on_device(hf, out, prompts, new_tokens, tp, dtype)
        return

    def capture_rank(rank: int) -> tuple:
        application = load_on_cpu(hf, prompts, new_tokens, tp, dtype)
        model = application.context_encoding_model.model  # the one that decodes, too
        taps = watch(model)
        generated = run(application, prompts, new_tokens)
        logits = torch.stack(generated.logits, dim=1)
        new_ids = generated.sequences[:, -new_tokens:].tolist()
        return {**taps.join(prompts), "logits": logits}, heads_of(model.layers[0].self_attn, hf), new_ids

    facts = {"prompts": prompts, "dtype": dtype, "device": "cpu, NxDI's to_cpu"}
    capture_ranks(out, PACKAGES, capture_rank, tp=tp, **facts)


def application_of(
    hf: Path, prompts: list[list[int]], new_tokens: int, tp: int, dtype: str, **settings: object
) -> nn.Module:
    """NxDI's application of a checkpoint, without its weights. `settings` are more of NeuronConfig's."""
    from neuronx_distributed_inference.models.config import NeuronConfig
    from neuronx_distributed_inference.models.llama.modeling_llama import LlamaInferenceConfig, NeuronLlamaForCausalLM
    from neuronx_distributed_inference.utils.hf_adapter import load_pretrained_config

    longest = max(map(len, prompts)) + new_tokens
    length = -(-longest // BUCKET) * BUCKET
    neuron_config = NeuronConfig(
        tp_degree=tp,
        batch_size=len(prompts),
        seq_len=length,
        max_context_length=length,
        torch_dtype=getattr(torch, dtype),
        fused_qkv=not has_bias(hf),
        **settings,
    )
    config = LlamaInferenceConfig(neuron_config, load_config=load_pretrained_config(str(hf)))
    return NeuronLlamaForCausalLM(str(hf), config)


def has_bias(hf: Path) -> bool:
    """Whether there is a bias: NxDI loses it if it fuses q, k and v (`modeling_llama.py:191-206`)."""
    return llama_config(read_config(hf)).attention_bias


def load_on_cpu(hf: Path, prompts: list[list[int]], new_tokens: int, tp: int, dtype: str) -> nn.Module:
    """The application with its weights: this rank's share."""
    application = application_of(hf, prompts, new_tokens, tp, dtype, on_cpu=tp == 1)
    neuron_config = application.neuron_config
    if tp > 1 and dtype == "bfloat16":
        # to_cpu refuses it, since gloo could not add bfloat16 once. It looks at its own settings, not the model's
        application.neuron_config = copy(neuron_config)
        application.neuron_config.torch_dtype = torch.float32
    application.to_cpu()
    application.neuron_config = neuron_config
    application.context_encoding_model.model.to(getattr(torch, dtype))
    return application


def run(application: nn.Module, prompts: list[list[int]], new_tokens: int, **settings: object) -> object:
    """What the `generate` of NxDI's HF adapter returns: `sequences` [B,S+M], prompts padded to S, and the `logits`
    [B,V] of each new token, which is NxDI's greedy choice. No id ends a text."""
    from neuronx_distributed_inference.utils.hf_adapter import HuggingFaceGenerationAdapter
    from transformers import GenerationConfig

    ids, mask = pad_prompts(prompts)
    no_end = application.config.vocab_size  # with None, generate would take the checkpoint's
    greedy = GenerationConfig(do_sample=False, pad_token_id=0, eos_token_id=no_end)
    wanted = {"max_new_tokens": new_tokens, "return_dict_in_generate": True, "output_logits": True}
    adapter = HuggingFaceGenerationAdapter(application)
    with torch.inference_mode():
        return adapter.generate(ids, attention_mask=mask, generation_config=greedy, **wanted, **settings)


def watch(model: nn.Module) -> Taps:
    """Hooks on the modules of NxDI's model."""
    taps = Taps()
    taps.output(model.embed_tokens, "hidden_states.0")
    taps.output(model.norm, "final_norm")
    for number, layer in enumerate(model.layers):
        place = f"layers.{number}"
        taps.output(layer, f"hidden_states.{number + 1}", lambda output: output[0])
        taps.output(layer.input_layernorm, f"{place}.input_layernorm")
        taps.output(layer.self_attn, f"{place}.attention", lambda output: output.hidden_states)
        taps.input(layer.self_attn.o_proj, f"{place}.heads")
        taps.output(layer.post_attention_layernorm, f"{place}.post_attention_layernorm")
        taps.output(layer.mlp, f"{place}.mlp", lambda output: output[0])
        watch_attention(taps, layer.self_attn, place)
    return taps


def watch_attention(taps: Taps, attention: nn.Module, place: str) -> None:
    """q, k and v are no module's output: two methods of the attention are given them as [B,n,T,D], and return them."""
    prepare = attention.prep_qkv_tensors
    rotate = attention.apply_rotary_embedding

    def rotate_and_keep(q, k, v, *args, **settings):
        taps.keep(f"{place}.q_proj", q.transpose(1, 2))
        taps.keep(f"{place}.k_proj", k.transpose(1, 2))
        return rotate(q, k, v, *args, **settings)

    def prepare_and_keep(*args, **settings):
        outputs = prepare(*args, **settings)
        for kind, x in zip("qkv", outputs[:3], strict=True):
            taps.keep(f"{place}.{kind}", x.transpose(1, 2))
        return outputs

    attention.apply_rotary_embedding = rotate_and_keep
    attention.prep_qkv_tensors = prepare_and_keep


# ---- on a device


def capture_on_device(hf: Path, out: Path, prompts: list[list[int]], new_tokens: int, tp: int, dtype: str) -> None:
    """Compiles the model with its tensor capture, and runs it on the host's NeuronCores. Raises UsageError if this is
    not a Neuron host."""
    if find_spec("torch_neuronx") is None:
        raise UsageError("NxDI's compiled model needs torch-neuronx, which is not installed: use --device cpu")
    find_sources(*PACKAGES)
    from neuronx_distributed_inference.models.config import OnDeviceSamplingConfig, TensorCaptureConfig

    modules = modules_of(hf)
    application = application_of(
        hf,
        prompts,
        new_tokens,
        tp,
        dtype,
        on_device_sampling_config=OnDeviceSamplingConfig(do_sample=False),  # capture requires it
        tensor_capture_config=TensorCaptureConfig(modules_to_capture=modules, capture_inputs=True),
    )
    with tempfile.TemporaryDirectory() as compiled:
        application.compile(compiled)
        application.load(compiled)
        save_generated(application, out, prompts, new_tokens)


def modules_of(hf: Path) -> list[str]:
    """The modules that NxDI captures the inputs and outputs of."""
    modules = ["embed_tokens", "norm"]
    kinds = ["qkv_proj.q_proj", "qkv_proj.k_proj", "qkv_proj.v_proj"] if has_bias(hf) else ["qkv_proj.Wqkv"]
    for number in range(llama_config(read_config(hf)).num_hidden_layers):
        layer = f"layers.{number}"
        modules += [layer, f"{layer}.input_layernorm", f"{layer}.self_attn.o_proj"]
        modules += [f"{layer}.post_attention_layernorm", f"{layer}.mlp"]
        modules += [f"{layer}.self_attn.{kind}" for kind in kinds]
    return modules


def save_generated(application: nn.Module, out: Path, prompts: list[list[int]], new_tokens: int) -> None:
    """Runs an application that captures, and writes what NxDI does not: ids, lengths and logits."""
    from neuronx_distributed_inference.utils.tensor_capture_utils import get_tensor_capture_hook

    hook = get_tensor_capture_hook(capture_indices=None, tensor_capture_save_dir=str(out))
    generated = run(application, prompts, new_tokens, tensor_capture_hook=hook)
    new_ids = generated.sequences[:, -new_tokens:].tolist()
    told = {
        "ids": join_texts(prompts, new_ids),
        "prompt_tokens": torch.tensor([len(prompt) for prompt in prompts]),
        "logits": torch.stack(generated.logits, dim=1),
    }
    save_file({name: x.contiguous() for name, x in told.items()}, out / "generated.safetensors")

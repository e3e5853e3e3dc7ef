"""Hugging Face's Llama as the oracle of an audit: what it computes on the way to the logits, and what each of its
steps would give from other inputs.

Names are those of `tools.capture`, for one text, without B: P positions, E hidden size, H query heads, K key/value
heads, D head_dim, V vocabulary.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor, nn

from checkpoint.config import llama_config, read_config
from checkpoint.files import read_json, reason
from checkpoint.tensors import open_checkpoint
from llama_neuron import UsageError

EXACT = {
    torch.bfloat16: torch.float32,
    torch.float16: torch.float32,
    torch.float32: torch.float64,
}
# a layer's steps in the order of the data; the optional ones are compared if a capture has them
STEPS = ("input_layernorm", "q_proj", "k_proj", "q", "k", "v", "heads", "attention", "post_attention_layernorm", "mlp")
OPTIONAL = ("input_layernorm", "q_proj", "k_proj", "post_attention_layernorm")


def stored_dtype(hf: Path) -> torch.dtype:
    """The dtype of a checkpoint's tensors."""
    config = llama_config(read_config(hf))
    checkpoint = open_checkpoint(hf, config)
    first_name = next(iter(checkpoint.slices))
    return checkpoint.get(first_name, stop=1).dtype


def load_hf(hf: Path, dtype: torch.dtype) -> nn.Module:
    """HF's `LlamaForCausalLM` of a checkpoint, with eager attention. Weights that have this dtype in the file are
    mapped, not read; generation_config.json is not read. Raises UsageError if HF cannot load it."""
    import transformers

    transformers.logging.disable_progress_bar()
    is_new = read_json(Path(hf, "config.json")).keys() & {"rope_parameters", "rope_theta"} == {"rope_parameters"}
    if is_new and int(transformers.__version__.split(".")[0]) < 5:
        old = f"transformers {transformers.__version__} takes rope_theta 10000 and no rope scaling for it"
        raise UsageError(f"--hf {hf}: its config.json is of transformers 5, and {old}: pip install 'transformers>=5'")
    settings = transformers.GenerationConfig()
    try:
        model, found = transformers.LlamaForCausalLM.from_pretrained(
            hf,
            dtype=dtype,
            attn_implementation="eager",
            generation_config=settings,
            output_loading_info=True,
        )
    except Exception as error:  # transformers raises nearly all kinds
        raise UsageError(f"--hf {hf}: transformers cannot load it: {reason(error)}") from None
    if found["missing_keys"]:  # transformers takes random numbers for them
        name = sorted(found["missing_keys"])[0]
        raise UsageError(f"--hf {hf}: transformers does not find {name}: save the model without what is around it")
    return model.eval()


@contextmanager
def tapped(model: nn.Module) -> Iterator[dict[str, list[Tensor]]]:
    """What the modules of HF's model return while it runs: name -> one tensor [1,T,...] of each call."""
    seen: dict[str, list[Tensor]] = defaultdict(list)
    hooks = []

    def record(name: str, module: nn.Module, part: int | None = None) -> None:
        def keep(module: nn.Module, args: tuple, output: object) -> None:
            seen[name].append(output if part is None else output[part])

        hooks.append(module.register_forward_hook(keep))

    def record_input(name: str, module: nn.Module) -> None:
        def keep(module: nn.Module, args: tuple) -> None:
            seen[name].append(args[0])

        hooks.append(module.register_forward_pre_hook(keep))

    record("cos", model.model.rotary_emb, 0)
    record("sin", model.model.rotary_emb, 1)
    record("hidden_states.0", model.model.embed_tokens)
    record("final_norm", model.model.norm)
    for number, layer in enumerate(model.model.layers):
        prefix = f"layers.{number}."
        attention = layer.self_attn
        record(f"hidden_states.{number + 1}", layer)
        record(prefix + "input_layernorm", layer.input_layernorm)
        record(prefix + "q_proj", attention.q_proj)
        record(prefix + "k_proj", attention.k_proj)
        record(prefix + "v", attention.v_proj)
        record_input(prefix + "heads", attention.o_proj)
        record(prefix + "attention", attention, 0)
        record(prefix + "post_attention_layernorm", layer.post_attention_layernorm)
        record(prefix + "mlp", layer.mlp)
    try:
        yield seen
    finally:
        for hook in hooks:
            hook.remove()


@torch.inference_mode()
def run_hf(
    model: nn.Module,
    prompt: list[int],
    new_tokens: int,
    forced: list[int] | None = None,
) -> dict[str, Tensor]:
    """HF's forward with HF's cache: the prompt, then each new token fed back; greedy, or the tokens of `forced`. HF's
    `generate` computes the same, but obeys the checkpoint's config.json and generation_config.json (`use_cache`,
    `num_beams`, penalties), which belong to no port.

    `ids` int64 [P+M]; at the P+M-1 positions that were fed: logits, and all that `tapped` sees, with heads apart
    [P+M-1,H,D] and q, k after the rotary embedding, in the model's dtype.
    """
    from transformers import DynamicCache
    from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

    ids = list(prompt)
    logits = []
    cache = DynamicCache()
    fed = torch.tensor([prompt])
    with tapped(model) as seen:
        for step in range(new_tokens):
            position_ids = torch.arange(len(ids) - fed.shape[1], len(ids))[None]
            # the cache by its place: transformers 4 and 5 have other names for it
            model.model(fed, None, position_ids, cache, use_cache=True)
            normed = seen["final_norm"][-1]
            logits.append(model.lm_head(normed)[0])
            chosen = int(logits[-1][-1].argmax()) if forced is None else forced[step]
            ids.append(chosen)
            fed = torch.tensor([[chosen]])
    tensors = {}
    for name, outputs in seen.items():
        tensors[name] = torch.cat(outputs, dim=1)[0]  # P+M-1 ...
        if name.endswith((".q_proj", ".k_proj", ".v", ".heads")):
            tensors[name] = tensors[name].unflatten(-1, (-1, model.config.head_dim))  # P+M-1 n D
    cos = tensors.pop("cos")
    sin = tensors.pop("sin")
    for number in range(len(model.model.layers)):
        prefix = f"layers.{number}."
        q = tensors[prefix + "q_proj"]
        k = tensors[prefix + "k_proj"]
        q, k = apply_rotary_pos_emb(q, k, cos, sin)
        tensors[prefix + "q"] = q
        tensors[prefix + "k"] = k
    tensors["logits"] = torch.cat(logits).float()
    tensors["ids"] = torch.tensor(ids)
    return tensors

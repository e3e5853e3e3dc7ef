"""What the names of a checkpoint's tensors tell: what wraps the model, what else it may be, and what would help."""

from __future__ import annotations

import json
import re
from dataclasses import replace

from checkpoint.config import expected_shapes
from checkpoint.files import show
from llama_neuron import LlamaConfig

# parts of a name that training leaves there, and who puts them there; they may be anywhere in it, and repeat
WRAPPERS = {
    "_orig_mod": "torch.compile",
    "module": "DataParallel or DeepSpeed",
    "_forward_module": "Lightning",
    "_fsdp_wrapped_module": "FSDP",
    "_checkpoint_wrapped_module": "activation checkpointing",
}

# tensors that no logit depends on: HF leaves them out as well
WITHOUT_EFFECT = re.compile(r"\.rotary_emb\.|original_inv_freq$|(^|\.)v_head\.|(^|\.)medusa_head\.")

# what names say about a checkpoint that is not a LlamaForCausalLM, and what helps
OTHER_MODELS = {
    r"base_model\.model\.|\.base_layer\.|\blora_|\.modules_to_save\.": (
        "PEFT's adapter is around the model: merge it first, `merge_and_unload()`, and save the result"
    ),
    r"\.(qweight|qzeros|scales|g_idx|SCB|weight_format|absmax|quant_map|W_q|codes|codebooks|Qidxs)$"
    r"|\.quant_state\.|\.nested_\w+$|_scale(_inv)?$|\.weight_(packed|zero_point|shape|g_idx)$": (
        "the model is quantized, though config.json has no quantization_config: dequantize it first"
    ),
    r"\bexperts\.|block_sparse_moe|\.router\.|\.mlp\.gate\.": "this is a mixture of experts, and Llama has one MLP",
    r"(^|\.)(language_model|vision\w*|visual|image_\w+|audio\w*|mm_projector|multi_modal_projector)\.": (
        "this is a multimodal model: save its language model alone, as a LlamaForCausalLM"
    ),
    r"^(score|classifier|qa_outputs|v_head|value_head|reward_head|regression_head)\.": (
        "this is a reward, value or classification model, which makes no text"
    ),
    r"^(linear|dense|pooler|projection)\.": "this is an embedding model, such as ColBERT, which makes no text",
    r"qkv_proj|gate_up_proj|\bW_pack\b|\b[Ww]qkv\b|query_key_value": (
        "projections are fused: split them, and give them HF's names"
    ),
    r"\btok_embeddings\.|\.attention\.w[qkvo]\.|\.feed_forward\.w[123]\.": (
        "these are Meta's names: convert it with transformers' convert_llama_weights_to_hf.py"
    ),
    r"^blk\.\d+\.|^token_embd\.": "these are llama.cpp's names: use the checkpoint that it was made of",
}

# the keys of config.json that give a tensor its shape; of norms it is hidden_size alone
SHAPE_KEYS = {
    "embed_tokens": ("vocab_size", "hidden_size"),
    "lm_head": ("vocab_size", "hidden_size"),
    "q_proj": ("num_attention_heads", "head_dim", "hidden_size"),
    "o_proj": ("num_attention_heads", "head_dim", "hidden_size"),
    "k_proj": ("num_key_value_heads", "head_dim", "hidden_size"),
    "v_proj": ("num_key_value_heads", "head_dim", "hidden_size"),
    "gate_proj": ("intermediate_size", "hidden_size"),
    "up_proj": ("intermediate_size", "hidden_size"),
    "down_proj": ("intermediate_size", "hidden_size"),
}


def wrappers_in(name: str) -> set[str]:
    return WRAPPERS.keys() & set(name.split("."))


def hf_name(name: str) -> str:
    """The name in a `LlamaForCausalLM`: without wrappers, and with one `model.`, where a file may have none or two."""
    name = ".".join(part for part in name.split(".") if part not in WRAPPERS)
    name = name.removeprefix("model.").removeprefix("model.")
    return name if name.startswith("lm_head.") else f"model.{name}"


def show_names(names: list[str]) -> str:
    """The first three names, and how many more there are."""
    shown = ", ".join(show(name) for name in names[:3])
    more = len(names) - 3
    return f"{shown} and {more} more" if more > 0 else shown


def what_helps(given: list[str], missing: list[str], unknown: list[str], config: LlamaConfig, raw: dict) -> str:
    """What to do about a checkpoint that has tensors of the names `given`, without HF's `missing` and with `unknown`
    ones that HF has not. `raw` is its config.json."""
    for pattern, advice in OTHER_MODELS.items():
        if any(re.search(pattern, name) for name in unknown):
            return advice
    architecture = show(raw.get("architectures"))
    if missing == ["lm_head.weight"] and "CausalLM" not in architecture:
        other = "makes no text; if lm_head is the embedding, set tie_word_embeddings to true"
        return f"the architecture in config.json is {architecture}, which {other}"
    key = other_key(given, config)
    if key is not None:
        return key
    prefix = prefix_of(given, config) if missing else None
    if prefix is not None:
        return f"names begin with {show(prefix)}: save the model without what is around it"
    if unknown:
        return f"save it as a LlamaForCausalLM (the architecture in config.json is {architecture})"
    return "download it again"


def other_key(given: list[str], config: LlamaConfig) -> str | None:
    """What to set in config.json, if another value of one key would ask for just the tensors that are there."""
    found = {hf_name(name) for name in given}
    layers = [int(number) for name in found for number in re.findall(r"^model\.layers\.(\d{1,4})\.", name)]
    values = {
        "num_hidden_layers": max(layers, default=0) + 1,
        "tie_word_embeddings": not config.tie_word_embeddings,
        "attention_bias": not config.attention_bias,
        "mlp_bias": not config.mlp_bias,
    }
    for key, value in values.items():
        expected = expected_shapes(replace(config, **{key: value})).keys()
        different = [name for name in expected ^ found if not WITHOUT_EFFECT.search(name)]
        if all(name.endswith("o_proj.bias") for name in different):  # HF takes zeros for one that is missing
            return f"set {key} to {json.dumps(value)} in config.json, where it is {json.dumps(getattr(config, key))}"
    return None


def prefix_of(given: list[str], config: LlamaConfig) -> str | None:
    """What stands before HF's names, if that is all that is wrong with them."""
    embedding = "embed_tokens.weight"
    prefixes = [name.partition(embedding)[0].removesuffix("model.") for name in given if embedding in name]
    names = {hf_name(name.removeprefix(prefixes[0])) for name in given} if prefixes else set()
    return prefixes[0] if expected_shapes(config).keys() <= names else None


def keys_of(name: str, config: LlamaConfig) -> str:
    """The keys of config.json, and their values, that give a tensor its shape."""
    kind = name.split(".")[-2]
    keys = SHAPE_KEYS.get(kind, ("hidden_size",))
    return ", ".join(f"{key} {getattr(config, key)}" for key in keys)

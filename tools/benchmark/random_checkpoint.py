"""A random checkpoint with the shape of a known Llama: speed depends on the shapes of weights, not on their values."""

from __future__ import annotations

import json
from itertools import groupby
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from checkpoint.config import expected_shapes, llama_config, read_config

# Llama-3.2-1B and Llama-3.1-8B, without the scaling of their rotary frequencies
SHAPES = {
    "1b": {
        "hidden_size": 2048,
        "intermediate_size": 8192,
        "num_hidden_layers": 16,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "head_dim": 64,
        "vocab_size": 128256,
        "tie_word_embeddings": True,
    },
    "8b": {
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "vocab_size": 128256,
        "tie_word_embeddings": False,
    },
}
COMMON = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "dtype": "bfloat16",
    "hidden_act": "silu",
    "max_position_embeddings": 8192,
    "rms_norm_eps": 1e-5,
    "rope_theta": 500000.0,
}


def make_random(directory: Path, shape: str) -> None:
    """Writes a new HF directory in bfloat16: config.json, and a safetensors file for each layer, with an index. Memory
    holds one layer or one table of embeddings at a time. The values are the same each time."""
    directory.mkdir()
    (directory / "config.json").write_text(json.dumps(COMMON | SHAPES[shape], indent=2))
    shapes = expected_shapes(llama_config(read_config(directory)))
    generator = torch.Generator().manual_seed(0)

    def tensor(name: str) -> Tensor:
        new = torch.ones(shapes[name], dtype=torch.bfloat16)
        return new if name.endswith("norm.weight") else new.normal_(0, 0.02, generator=generator)

    files = {}
    for number, (_, names) in enumerate(groupby(shapes, key=lambda name: name.split(".")[:3]), start=1):
        tensors = {name: tensor(name) for name in names}
        file = f"model-{number:05}.safetensors"
        save_file(tensors, directory / file, metadata={"format": "pt"})
        files |= dict.fromkeys(tensors, file)
        del tensors  # before the next ones are made
    (directory / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": files}))

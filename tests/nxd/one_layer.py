"""Checkpoints of one layer: others run the same ops and graphs again, which XLA compiles slowly."""

from __future__ import annotations

from functools import cache
from pathlib import Path

import torch

from tests.helpers import hf_model


@cache
def one_layer(hf: Path) -> Path:
    """A checkpoint without its other layers, made beside it."""
    model = hf_model(hf, torch.float32)
    model.model.layers = model.model.layers[:1]
    model.config.num_hidden_layers = 1
    folder = hf.with_name(f"{hf.name}-one-layer")
    model.save_pretrained(folder)
    return folder

"""`--compile`: decoder layers run compiled code for single tokens. `cpu/` makes the code, `kept.py` keeps it."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import torch
import torch.distributed as dist

from cpu.compiled import compile_one_row
from launch.kept import find_or_make
from llama_neuron import LlamaForCausalLM


def compile_decode(model: LlamaForCausalLM) -> None:
    """From here on, single-token steps of `model` run compiled code. Every rank of a group calls this.

    Raises what `find_or_make` raises, and OSError if nothing can be compiled here.
    """
    group = ()
    if dist.is_initialized():
        group = (dist.get_world_size(), dist.group.WORLD.group_name)  # constants in the code
    layers = model.model.layers
    any_length = replace(model.neuron_config, sequence_length=1)  # the code serves every length of the cache
    depends_on = (model.config, any_length, layers[0].self_attn.attention.__name__, group)
    token = torch.zeros(model.neuron_config.batch_size, 1, dtype=torch.int32)
    run = partial(model, token, token, kv_length=1)
    compile_one_row(run, layers, repr(depends_on), find_or_make, heads=[model.lm_head])

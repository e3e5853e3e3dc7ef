"""Stand-in for torch-neuronx: it traces and runs graphs on torch-xla's CPU device.

It proves nothing about the compiler, the runtime or speed. What it does with state follows AWS's documentation of
ModelBuilder V2: a buffer is kept if `forward` assigns it again, and starts as zeros.
"""

from __future__ import annotations

import os
import sys
from contextlib import contextmanager
from types import ModuleType, SimpleNamespace

from tools.ports.closed import inert

os.environ.setdefault("XLA_DISABLE_FUNCTIONALIZATION", "1")  # AWS's default; torch_xla reads it when it is imported
os.environ.setdefault("PJRT_DEVICE", "CPU")

import torch
import torch_xla
from torch import Tensor

__version__ = "2.9+stand.in"

from torch_neuronx import saving, utils  # noqa: F401
from torch_neuronx.runtime import SPMDModel

inert.answer_for(__name__)  # after them: it has an answer for their names, too

# ---- memory of NeuronCores: NxD asks for "privateuseone:RANK", and all ranks share torch-xla's one CPU device


def empty(size: list[int], *, dtype: torch.dtype | None = None, device: torch.device, **settings: object) -> Tensor:
    return torch.empty(size, dtype=dtype, device=torch_xla.device())


def parallel_load(shards: list[dict[str, Tensor]]) -> list[dict[str, Tensor]]:
    return [{name: tensor.to(torch_xla.device()) for name, tensor in shard.items()} for shard in shards]


device_module = ModuleType("torch.privateuseone")  # torch asks it before it makes a tensor
device_module._is_in_bad_fork = lambda: False
device_module._lazy_init = lambda: None
sys.modules[device_module.__name__] = device_module
kernels = torch.library.Library("aten", "IMPL", "PrivateUse1")
kernels.impl("empty.memory_format", empty)
torch.ops.neuron._parallel_load = parallel_load
torch.classes.neuron = SimpleNamespace(SPMDModel=SPMDModel, LayoutTransformation=inert.Inert)


@contextmanager
def disable_nrt_load():
    with saving.scripting():
        yield


contexts = SimpleNamespace(disable_nrt_load=disable_nrt_load)

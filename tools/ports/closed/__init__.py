"""Stand-ins for AWS's closed packages: as much of them as the CPU modes of ports call.

NxD's core, NxDI and Optimum Neuron import the compiler, its kernels and torch-xla. On a CPU they call next to nothing
of these. What they call is below; every other name is inert. A package that is installed is left alone.
"""

from __future__ import annotations

from importlib.util import find_spec

import torch
from torch import Tensor

from tools.ports.closed import inert

PACKAGES = ("libneuronxla", "neuronxcc", "nki", "nkilib", "torch_neuronx", "torch_xla")


class RmsNorm:
    """Plain ops in place of AWS's custom call AwsNeuronRmsNorm. How that one rounds was not seen."""

    @staticmethod
    def apply(x: Tensor, weight: Tensor, eps: float, dim: int) -> Tensor:
        return x * torch.rsqrt(x.pow(2).mean(dim, keepdim=True) + eps) * weight


def get_platform_target(compiler_args: object = None) -> str:
    return "trn1"


KNOWN = {
    "torch_neuronx.utils": {"get_platform_target": get_platform_target},
    "torch_neuronx.utils.utils": {"get_platform_target": get_platform_target},
    "torch_neuronx.xla_impl.ops": {"RmsNorm": RmsNorm},
    "torch_xla.core.xla_model": {"REDUCE_SUM": "sum", "REDUCE_MAX": "max", "REDUCE_MIN": "min"},  # keys of a dict
}


def stand_in() -> list[str]:
    """Lets the packages be imported that are not installed, and returns their names."""
    missing = [package for package in PACKAGES if find_spec(package) is None]
    for package in missing:
        inert.answer_for(package, KNOWN)
    if "torch_neuronx" in missing:
        torch.classes.neuron = inert.Inert  # what its library of C++ would register
    return missing

"""Tracing: runs a module on torch-xla's lazy tensors and takes their graph."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch_xla
from torch import Tensor, nn

from tools.ports.closed.inert import attribute as __getattr__  # noqa: F401
from torch_neuronx.proto import MetaNeff, MetaTensor, Type
from torch_neuronx.pyhlo import hlo_pb2
from torch_neuronx.xla_impl.structure import Flattener, Packer


@dataclass
class HloArtifacts:
    hlo_module: object
    metaneff: MetaNeff
    flattener: Flattener
    packer: Packer
    weight_name_to_idx: dict[str, int]


def get_torch_dtype(data_type: torch.dtype) -> torch.dtype:
    return data_type


@dataclass
class Slot:
    """Where a module keeps a parameter or buffer."""

    holder: dict[str, Tensor]
    leaf: str
    original: Tensor


def find_slots(model: nn.Module) -> dict[str, Slot]:
    slots = {}
    for prefix, module in model.named_modules():
        for holder in (module._parameters, module._buffers):
            for leaf, tensor in holder.items():
                if tensor is not None:
                    slots[f"{prefix}.{leaf}".lstrip(".")] = Slot(holder, leaf, tensor)
    return slots


@torch.no_grad()
def generate_hlo(model: nn.Module, example_inputs: dict[str, Tensor], **settings: object) -> HloArtifacts:
    """The graph of model(**example_inputs). Its outputs: what forward returns, then the buffers that it assigned again.
    Inputs that nothing depends on are not in the graph. The model is left as it was."""
    device = torch_xla.device()
    slots = find_slots(model)
    weights = {name: slot.original.to(device) for name, slot in slots.items()}
    inputs = {name: tensor.to(device) for name, tensor in example_inputs.items()}
    torch_xla.sync()
    try:
        for name, slot in slots.items():
            slot.holder[slot.leaf] = weights[name]
        output = model(**inputs)
        after = {name: slot.holder[slot.leaf] for name, slot in slots.items()}
    finally:
        for slot in slots.values():
            slot.holder[slot.leaf] = slot.original
    states = [name for name in slots if after[name] is not weights[name]]
    context = torch_xla._XLAC.lowering.LoweringContext("traced")
    context.build([output, *(after[name] for name in states)])

    metaneff, unused = MetaNeff(), []
    weight_indices = {}
    for index, (name, tensor) in enumerate([*inputs.items(), *weights.items()]):
        number = context.tensor_parameter_id(tensor)
        is_input = index < len(inputs)
        if number < 0:
            unused += [index] if is_input else []
            continue
        kind = Type.USER_INPUT if is_input else Type.INPUT_STATE if name in states else Type.INPUT_WEIGHT
        if not is_input:
            weight_indices[name] = len(metaneff.parameters)
        metaneff.parameters.append(number)
        key = b"" if is_input else name.encode()
        metaneff.input_tensors.append(MetaTensor(name, list(tensor.shape), tensor.dtype, kind, key))
    metaneff.output_tensors.append(MetaTensor("output", list(output.shape), output.dtype, Type.OUTPUT))
    for name in states:
        before, new = weights[name], after[name]
        assert (new.shape, new.dtype) == (before.shape, before.dtype), f"{name} is assigned another kind of tensor"
        assert name in weight_indices, f"{name} is assigned without being read: there is no input to alias"
        metaneff.output_aliases_to[len(metaneff.output_tensors)] = weight_indices[name]
        metaneff.output_tensors.append(MetaTensor(name, list(new.shape), new.dtype, Type.OUTPUT, name.encode()))
    for number, tensor in context.parameter_id_tensor_mapping().items():
        if number not in metaneff.parameters:
            metaneff.constants[number] = tensor.cpu()
    hlo = hlo_pb2.HloModuleProto.FromString(context.hlo())
    flattener = Flattener(tuple(range(len(inputs))), unused or None)
    return HloArtifacts(hlo, metaneff, flattener, Packer(), weight_indices)

"""Running: all ranks of one SPMD graph in one process, on XLA's CPU backend.

A graph is traced once, as rank 0. If it has that rank baked in, the other ranks compute wrong numbers here, as they
would on NeuronCores.
"""

from __future__ import annotations

import itertools
import pickle
from functools import cached_property

import torch_xla
from torch import Tensor

from torch_neuronx.proto import MetaNeff, Type
from torch_neuronx.pyhlo import TUPLE, hlo_pb2


class SPMDModel:
    """AWS's `SPMDModel`: a compiled graph with the weights and the state of every rank."""

    def __init__(self, neff: bytes, metaneff: bytes, local_ranks: int, ranks: int) -> None:
        self.neff, self.ranks = neff, ranks
        self.metaneff: MetaNeff = pickle.loads(metaneff)

    def __reduce__(self) -> tuple:
        return SPMDModel, (self.neff, self.metaneff.SerializeToString(), self.ranks, self.ranks)

    def initialize(self, states: list[dict[str, Tensor]], weights: list[dict[str, Tensor]], start_rank: int) -> None:
        self.states, self.weights = states, weights

    @cached_property
    def program(self) -> object:
        return torch_xla._XLAC._xla_op_computation_from_module_proto("spmd", merge_ranks(self.neff, self.ranks))

    def forward(self, inputs: list[Tensor]) -> list[Tensor]:
        """What rank 0 returns. The state of every rank becomes what the graph says."""
        outputs = torch_xla._XLAC._xla_user_computation("xla::spmd", self.arguments(inputs), self.program)
        torch_xla.sync()
        each = len(self.metaneff.output_tensors)
        for rank in range(self.ranks):
            for output in self.metaneff.output_aliases_to:
                name = self.metaneff.output_tensors[output].name
                self.states[rank][name] = outputs[rank * each + output]
        returned = each - len(self.metaneff.output_aliases_to)
        return [output.cpu() for output in outputs[:returned]]

    def arguments(self, inputs: list[Tensor]) -> list[Tensor]:
        """The program's parameters: each of the graph's, for every rank."""
        device = torch_xla.device()
        values = {number: [tensor.to(device)] * self.ranks for number, tensor in self.metaneff.constants.items()}
        given = iter(inputs)
        for tensor, number in zip(self.metaneff.input_tensors, self.metaneff.parameters, strict=True):
            if tensor.type == Type.USER_INPUT:
                values[number] = [next(given).to(device)] * self.ranks
            else:
                held = self.states if tensor.type == Type.INPUT_STATE else self.weights
                values[number] = [shard[tensor.name] for shard in held]
            for value in values[number]:
                has, expected = (list(value.shape), value.dtype), (tensor.shape, tensor.data_type)
                assert has == expected, f"{tensor.name} is {has}, the graph takes {expected}"
        return [value for number in range(len(values)) for value in values[number]]


def merge_ranks(hlo: bytes, ranks: int) -> bytes:
    """One graph that computes what `ranks` copies of a graph do: a collective becomes arithmetic between the copies.
    Parameter i of rank r becomes parameter i * ranks + r; results are those of rank 0, then of rank 1, and so on."""
    module = hlo_pb2.HloModuleProto.FromString(hlo)
    computations = {computation.id: computation for computation in module.computations}
    entry = computations[module.entry_computation_id]
    merged = hlo_pb2.HloComputationProto(name=entry.name, id=entry.id)
    largest = max(instruction.id for computation in module.computations for instruction in computation.instructions)
    new_ids = itertools.count((largest + 1) * (ranks + 1))

    def copy_id(instruction_id: int, rank: int) -> int:
        return largest + 1 + instruction_id * ranks + rank

    def add(opcode: str, shape: object, operands: list[int], new_id: int | None = None) -> object:
        number = next(new_ids) if new_id is None else new_id
        merged.instructions.add(name=f"{opcode}.{number}", opcode=opcode, shape=shape, id=number, operand_ids=operands)
        return merged.instructions[-1]

    def add_reduction(instruction: object) -> None:
        (reduction_id,) = instruction.called_computation_ids
        reduction = computations[reduction_id]
        (opcode,) = (step.opcode for step in reduction.instructions if step.id == reduction.root_id)
        shapes = list(instruction.shape.tuple_shapes) or [instruction.shape]
        totals = []
        for operand, shape in zip(instruction.operand_ids, shapes, strict=True):
            total = copy_id(operand, 0)
            for rank in range(1, ranks):
                total = add(opcode, shape, [total, copy_id(operand, rank)]).id
            totals.append(total)
        for rank in range(ranks):
            opcode = "tuple" if instruction.shape.tuple_shapes else "copy"
            add(opcode, instruction.shape, totals, copy_id(instruction.id, rank))

    def add_gather(instruction: object) -> None:
        (operand,) = instruction.operand_ids
        parts = [copy_id(operand, rank) for rank in range(ranks)]
        for rank in range(ranks):
            gathered = add("concatenate", instruction.shape, parts, copy_id(instruction.id, rank))
            gathered.dimensions.extend(instruction.dimensions)

    def add_copies(instruction: object) -> None:
        assert instruction.opcode not in ("reduce-scatter", "all-to-all", "collective-permute"), instruction.opcode
        for rank in range(ranks):
            copy = merged.instructions.add()
            copy.CopyFrom(instruction)
            copy.id, copy.name = copy_id(instruction.id, rank), f"{instruction.name}.rank{rank}"
            copy.operand_ids[:] = [copy_id(operand, rank) for operand in instruction.operand_ids]
            if instruction.opcode == "parameter":
                copy.parameter_number = instruction.parameter_number * ranks + rank

    for instruction in entry.instructions:
        if instruction.opcode == "all-reduce":
            add_reduction(instruction)
        elif instruction.opcode == "all-gather":
            add_gather(instruction)
        else:
            add_copies(instruction)

    (root,) = (instruction for instruction in entry.instructions if instruction.id == entry.root_id)
    assert root.opcode == "tuple"
    shapes = list(root.shape.tuple_shapes) * ranks
    result = hlo_pb2.ShapeProto(element_type=TUPLE, tuple_shapes=shapes)
    results = [copy_id(operand, rank) for rank in range(ranks) for operand in root.operand_ids]
    merged.root_id = add("tuple", result, results).id
    for number, shape in enumerate(entry.program_shape.parameters):
        for rank in range(ranks):
            merged.program_shape.parameters.append(shape)
            merged.program_shape.parameter_names.append(f"parameter{number}.rank{rank}")
    merged.program_shape.result.CopyFrom(result)
    module.host_program_shape.CopyFrom(merged.program_shape)
    entry.CopyFrom(merged)
    return module.SerializeToString()

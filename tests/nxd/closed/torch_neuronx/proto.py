"""What NxD reads of a graph's metaneff: its inputs and outputs. Serialized by pickle, where AWS has protobuf."""

from __future__ import annotations

import pickle
from dataclasses import dataclass, field
from types import SimpleNamespace

import torch
from torch import Tensor


class Type:
    USER_INPUT, INPUT_WEIGHT, INPUT_STATE, OUTPUT = range(1, 5)


@dataclass
class MetaTensor:
    name: str
    shape: list[int]
    data_type: torch.dtype
    type: int
    checkpoint_key: bytes = b""
    user_input_key: bytes = b""

    Type = Type


@dataclass
class MetaNeff:
    input_tensors: list[MetaTensor] = field(default_factory=list)
    output_tensors: list[MetaTensor] = field(default_factory=list)
    output_aliases_to: dict[int, int] = field(default_factory=dict)  # an output is the next value of an input
    parameters: list[int] = field(default_factory=list)  # the graph's number of each input
    constants: dict[int, Tensor] = field(default_factory=dict)  # the graph's other parameters

    def SerializeToString(self) -> bytes:
        return pickle.dumps(self)


metaneff_pb2 = SimpleNamespace(MetaNeff=MetaNeff, MetaTensor=MetaTensor)

"""The `torch.compile` backend `neuron`. Each graph is checked for what AWS documents, then run operator by operator."""

import operator
from collections.abc import Callable
from pathlib import Path

import torch
from torch._dynamo.backends.common import aot_autograd
from torch.utils._pytree import tree_leaves

from torch_neuronx import DEVICE, graphs, native

LINES = Path(__file__).with_name("operators.txt").read_text().splitlines()
OPERATORS = {word for line in LINES for word in line.partition("#")[0].split()}


def check(node: torch.fx.Node) -> None:
    """Raises RuntimeError for a value that has no static shape, or is not on the device."""
    for value in tree_leaves(node.meta.get("val")):
        # "dynamic=True is rejected during compilation" ("torch.compile backend reference")
        sizes = value.shape if isinstance(value, torch.Tensor) else [value]
        if any(isinstance(size, torch.SymInt) for size in sizes):
            raise RuntimeError(f"neuron: shapes must be static, {node} has {value}")
        if isinstance(value, torch.Tensor) and value.device.type != DEVICE:
            raise RuntimeError(f"neuron: {node} is on {value.device}, all of a graph is on the device")


def compile_functional(graph: torch.fx.GraphModule, inputs: list) -> Callable:
    """Runs what AOTAutograd made functional. TorchNeuron makes a NEFF of it ("How torch.compile works on Neuron")."""
    operators, aliased = set(), 0
    for node in graph.graph.nodes:
        check(node)
        if node.op == "call_function" and node.target is not operator.getitem:  # which takes one of several results
            name = str(node.target)
            # a write to an input is an output that aliases it ("Aliasing output rewrite pass")
            if name == "aten.copy_.default" and node.args[0].op == "placeholder":
                aliased += 1
            else:
                operators.add(name)
    if not operators <= OPERATORS:
        raise RuntimeError(
            f"neuron: operators that are not in operators.txt: {', '.join(sorted(operators - OPERATORS))}"
        )
    ids = next(list(x.shape) for x in inputs if x.dtype == torch.int32 and x.dim() == 2)
    graphs.append({"operators": sorted(operators), "aliased": aliased, "ids": ids})

    def run(*arguments: torch.Tensor) -> tuple:
        native.set_in_graph(True)
        try:
            return graph.forward(*arguments)
        finally:
            native.set_in_graph(False)

    return run


compile_graph = aot_autograd(fw_compiler=compile_functional, keep_inference_input_mutations=True)

"""How inputs and outputs of a forward become lists and come back. NxD restores both from these attributes."""

from __future__ import annotations

from torch import Tensor, nn


class Flattener(nn.Module):
    """The inputs that the graph uses."""

    def __init__(self, layout: tuple[int, ...], exclude: list[int] | None) -> None:
        super().__init__()
        self.layout, self.exclude = layout, exclude

    def forward(self, inputs: list[Tensor]) -> list[Tensor]:
        return [inputs[index] for index in self.layout if index not in (self.exclude or [])]


class Packer(nn.Module):
    """The one tensor that a forward returns."""

    def __init__(self, layout: object = None, identifiers: object = None, constants: object = None) -> None:
        super().__init__()
        self.layout, self.identifiers, self.constants = layout, identifiers, constants

    def forward(self, outputs: list[Tensor]) -> Tensor:
        (output,) = outputs
        return output

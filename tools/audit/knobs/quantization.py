"""Weights and caches in fewer bits. Ports store them in fp8, or in integers with a scale for each row, for each group
of a row, or for the whole weight."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

FP8 = {
    "fp8 (e4m3)": torch.float8_e4m3fn,
    "fp8 (e5m2)": torch.float8_e5m2,
}
INTEGERS = {8: 127, 4: 7}  # bits -> the largest value
GROUPS = (8, 16, 32, 64, 128)


def rounded_weights(weight: Tensor, audited: torch.dtype) -> Iterator[tuple[str, Tensor]]:
    """A weight [N,E] in fewer bits than the audited dtype has: names and values."""
    if audited == torch.float32:
        yield "bfloat16", through(weight, torch.bfloat16)
        yield "float16", through(weight, torch.float16)
    for name, dtype in FP8.items():
        yield from in_fp8(weight, name, dtype)
    for bits, most in INTEGERS.items():
        yield from in_integers(weight, bits, most)


def through(x: Tensor, dtype: torch.dtype) -> Tensor:
    """Values after a way through another dtype, in their own one."""
    return x.to(dtype).to(x)


def in_fp8(weight: Tensor, name: str, dtype: torch.dtype) -> Iterator[tuple[str, Tensor]]:
    largest = weight.abs().amax(-1, keepdim=True)
    yield name, through(weight, dtype)
    by_rows = largest / torch.finfo(dtype).max
    as_a_whole = largest.max() / torch.finfo(dtype).max
    yield f"{name}, scaled by rows", (weight / by_rows).to(dtype).to(weight) * by_rows
    yield f"{name}, scaled as a whole", (weight / as_a_whole).to(dtype).to(weight) * as_a_whole


def in_integers(weight: Tensor, bits: int, most: int) -> Iterator[tuple[str, Tensor]]:
    largest = weight.abs().amax(-1, keepdim=True)
    yield f"int{bits}, scaled by rows", to_multiples(weight, largest / most)
    yield f"int{bits}, scaled as a whole", to_multiples(weight, largest.max() / most)
    width = weight.shape[1]
    for size in GROUPS:
        if width % size == 0 and width > size:
            groups = weight.unflatten(1, (-1, size))
            scale = groups.abs().amax(-1, keepdim=True) / most
            rounded = to_multiples(groups, scale)
            yield f"int{bits}, scaled by groups of {size}", rounded.flatten(1)


def to_multiples(x: Tensor, scale: Tensor) -> Tensor:
    """Values rounded to multiples of a scale."""
    return (x / scale).round() * scale

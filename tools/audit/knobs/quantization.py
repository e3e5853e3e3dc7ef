"""Weights and caches in fewer bits. Ports store them in fp8, or in integers with a scale for each row, for each group
of a row, or for the whole weight."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial

import torch
from torch import Tensor

FP8 = {
    "fp8 (e4m3)": torch.float8_e4m3fn,
    "fp8 (e5m2)": torch.float8_e5m2,
}
INTEGERS = {8: 127, 4: 7}  # bits -> the largest value
GROUPS = (8, 16, 32, 64, 128)


Round = Callable[[Tensor], Tensor]  # a weight [N,E] -> the same in fewer bits


def ways_to_round(width: int, audited: torch.dtype) -> Iterator[tuple[str, Round]]:
    """Ways to put a weight with rows of `width` into fewer bits than the audited dtype has, and their names."""
    if audited == torch.float32:
        yield "bfloat16", partial(through, dtype=torch.bfloat16)
        yield "float16", partial(through, dtype=torch.float16)
    for name, dtype in FP8.items():
        yield name, partial(through, dtype=dtype)
        yield f"{name}, scaled by rows", partial(in_fp8, dtype=dtype, by_rows=True)
        yield f"{name}, scaled as a whole", partial(in_fp8, dtype=dtype, by_rows=False)
    for bits, most in INTEGERS.items():
        yield f"int{bits}, scaled by rows", partial(in_integers, most=most, by_rows=True)
        yield f"int{bits}, scaled as a whole", partial(in_integers, most=most, by_rows=False)
        for size in GROUPS:
            if width % size == 0 and width > size:
                yield f"int{bits}, scaled by groups of {size}", partial(by_groups, most=most, size=size)


def through(x: Tensor, dtype: torch.dtype) -> Tensor:
    """Values after a way through another dtype, in their own one."""
    return x.to(dtype).to(x)


def largest_values(weight: Tensor, by_rows: bool) -> Tensor:
    """The largest size in each row, or in the whole weight."""
    largest = weight.abs().amax(-1, keepdim=True)
    return largest if by_rows else largest.max()


def in_fp8(weight: Tensor, dtype: torch.dtype, by_rows: bool) -> Tensor:
    scale = largest_values(weight, by_rows) / torch.finfo(dtype).max
    return through(weight / scale, dtype) * scale


def in_integers(weight: Tensor, most: int, by_rows: bool) -> Tensor:
    return to_multiples(weight, largest_values(weight, by_rows) / most)


def by_groups(weight: Tensor, most: int, size: int) -> Tensor:
    groups = weight.unflatten(1, (-1, size))
    return in_integers(groups, most, by_rows=True).flatten(1)


def to_multiples(x: Tensor, scale: Tensor) -> Tensor:
    """Values rounded to multiples of a scale."""
    return (x / scale).round() * scale

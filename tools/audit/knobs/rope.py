"""The rotary embedding. Ports turn neighbours for halves, swap cos and sin, rotate a part of a head, have another theta
or another scaling, compute angles in fewer bits, and take other positions."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from functools import partial
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from llama_neuron import compute_llama3_parameters
from tools.audit.chain import Step, halves_from_pairs, pairs_from_halves, rotate
from tools.audit.knobs.knob import Compute, Knob, Knobs, changing
from tools.audit.knobs.search import fitted, told

if TYPE_CHECKING:
    from transformers import PretrainedConfig

    from tools.audit.causes import Case

Turn = Callable[[Step, Tensor], Tensor]  # of x [P,n,D]
Angles = Callable[[Step], Tensor]  # [P,D/2]
THETAS = [10 ** (3 + power / 16) for power in range(100)]
SLOWER = [1.04**power for power in range(-60, 91) if power]
FACTORS = [1.5, 2.0, 4.0, 8.0, 16.0, 32.0, 64.0]


def rotations(case: Case) -> Knobs:
    """q and k turned in other ways."""
    yield Knob("the rotary embedding is left out", both(case, lambda at, x: x))
    yield Knob("the rotary embedding turns the other way", turned(case, lambda at: -at.angles()))
    yield from other_pairs(case)
    yield from parts_of_heads(case)
    yield from other_frequencies(case)
    yield from other_settings(case)
    yield from angles_in_fewer_bits(case)
    yield from other_positions(case)


def both(case: Case, turn: Turn) -> dict[str, Compute]:
    """q and k in another way."""
    steps: dict[str, Compute] = {
        "q": lambda at: turn(at, at.get("q_proj")),
        "k": lambda at: turn(at, at.get("k_proj")),
    }
    return changing(case, steps)


def turned(case: Case, angles: Angles, scaling: float | None = None) -> dict[str, Compute]:
    """q and k turned by other angles, and scaled as in HF or by something else."""

    def turn(at: Step, x: Tensor) -> Tensor:
        own = at.chain.attention_scaling if scaling is None else scaling
        return rotate(x, angles(at), own)

    return both(case, turn)


# ---- which dimensions are turned


def other_pairs(case: Case) -> Knobs:
    scaling = case.chain.attention_scaling

    def neighbours(at: Step, x: Tensor) -> Tensor:
        return pairs_from_halves(rotate(halves_from_pairs(x), at.angles(), scaling))

    def mixed(at: Step, x: Tensor) -> Tensor:
        angles = torch.cat((at.angles(), at.angles()), dim=-1)[:, None]  # P 1 D
        half = torch.stack((-x[..., 1::2], x[..., ::2]), dim=-1).flatten(-2)
        return (x * angles.cos() + half * angles.sin()) * scaling

    def cos_for_sin(at: Step, x: Tensor) -> Tensor:
        return rotate(x, math.pi / 2 - at.angles(), scaling)

    yield Knob("the rotary embedding turns neighbours, not halves", both(case, neighbours))
    yield Knob("rotate_half takes neighbours, cos and sin are for halves", both(case, mixed))
    yield Knob("cos and sin are swapped", both(case, cos_for_sin))


def parts_of_heads(case: Case) -> Knobs:
    """The first half or the first quarter of a head alone."""
    head_dim = case.chain.head_dim
    scaling = case.chain.attention_scaling
    theta = rope_of(case.chain.config)["rope_theta"]

    def first_turned(x: Tensor, angles: Tensor, part: int) -> Tensor:
        first = rotate(x[..., :part], angles, scaling)
        return torch.cat((first, x[..., part:]), dim=-1)

    def partly(at: Step, x: Tensor, part: int) -> Tensor:
        exponent = torch.arange(0, part, 2, dtype=x.dtype) / part
        inv_freq = 1 / theta**exponent
        return first_turned(x, at.positions() * inv_freq, part)

    def hf_frequencies(at: Step, x: Tensor, part: int) -> Tensor:
        return first_turned(x, at.angles()[:, : part // 2], part)

    def fewer_pairs(at: Step, part: int) -> Tensor:
        angles = at.angles()
        angles[:, part // 2 :] = 0
        return angles

    for part in (head_dim // 4, head_dim // 2):
        name = f"only the first {part // 2} of {head_dim // 2} pairs are rotated"
        yield Knob(name, turned(case, partial(fewer_pairs, part=part)))
        if part % 2 == 0:
            name = f"only the first {part} of {head_dim} dimensions are rotated"
            yield Knob(name, both(case, partial(partly, part=part)))
            yield Knob(f"{name}, HF's frequencies", both(case, partial(hf_frequencies, part=part)))


# ---- how fast they are turned


def rope_of(config: PretrainedConfig) -> dict:
    """The settings of the rotary embedding in config.json, wherever they are there."""
    rope = getattr(config, "rope_parameters", None)  # transformers 5
    if not rope:
        rope = getattr(config, "rope_scaling", None) or {}  # transformers 4
    theta = getattr(config, "rope_theta", None) or rope["rope_theta"]
    return {"rope_type": "default", **rope, "rope_theta": theta}


def unscaled_frequencies(case: Case, theta: float) -> Tensor:
    """inv_freq [D/2] of a theta."""
    head_dim = case.chain.head_dim
    exponent = torch.arange(0, head_dim, 2, dtype=case.chain.dtype) / head_dim
    return 1 / theta**exponent


def scaled_frequencies(case: Case, theta: float, **changed: float) -> Tensor:
    """inv_freq [D/2] with another theta, and config.json's llama3 or linear scaling."""
    rope = {**rope_of(case.chain.config), **changed}
    inv_freq = unscaled_frequencies(case, theta)
    if rope["rope_type"] == "llama3":
        return compute_llama3_parameters(inv_freq, rope)
    if rope["rope_type"] == "linear":
        return inv_freq / rope["factor"]
    return inv_freq


def other_frequencies(case: Case) -> Knobs:
    """Scalings that are left out, or taken for another kind."""
    if case.chain.attention_scaling != 1:
        unscaled = turned(case, lambda at: at.angles(), 1.0)
        yield Knob("the attention scaling of the rotary embedding is left out", unscaled)
    for name, inv_freq, scaling in frequencies(case):
        other = turned(case, lambda at, inv_freq=inv_freq: at.positions() * inv_freq, scaling)
        yield Knob(name, other)


def frequencies(case: Case) -> Iterator[tuple[str, Tensor, float | None]]:
    """Other rotary frequencies [D/2], and the scaling of cos and sin; None: HF's."""
    rope = rope_of(case.chain.config)
    kind = rope["rope_type"]
    unscaled = unscaled_frequencies(case, rope["rope_theta"])
    if kind == "default":
        return
    yield "the rope scaling of config.json is left out", unscaled, 1.0
    if case.chain.attention_scaling != 1:
        yield "the rope scaling of config.json is left out, its attention factor is not", unscaled, None
    if kind in ("yarn", "dynamic", "longrope", "llama3"):
        factor = rope.get("factor") or 1.0
        linear = unscaled / factor
        yield f"rope_type {kind} is read as linear, by {factor:g}", linear, 1.0
        yield f"rope_type {kind} is read as linear, by {factor:g}, with its attention factor", linear, None
    if kind == "llama3":
        yield from llama3_frequencies(case, rope, unscaled)


def llama3_frequencies(case: Case, rope: dict, unscaled: Tensor) -> Iterator[tuple[str, Tensor, None]]:
    """llama3's scaling with other bands and other lengths."""

    def changed(name: str, **values: float) -> tuple[str, Tensor, None]:
        changes = [f"{key} {value:g} for {rope[key]:g}" for key, value in values.items()]
        inv_freq = compute_llama3_parameters(unscaled, {**rope, **values})
        return f"{name} of llama3's rope scaling: {', '.join(changes)}", inv_freq, None

    low = rope["low_freq_factor"]
    high = rope["high_freq_factor"]
    for value in (0.5, 2.0, 4.0, 8.0):
        if value not in (low, high):
            yield changed("another band", low_freq_factor=value)
            yield changed("another band", high_freq_factor=value)
    yield changed("the bands", low_freq_factor=high, high_freq_factor=low)
    original = rope["original_max_position_embeddings"]
    lengths = [2**power for power in range(4, 14)]
    lengths.append(case.chain.config.max_position_embeddings)
    for length in lengths:
        if length != original:
            yield changed("another length", original_max_position_embeddings=length)


def other_settings(case: Case) -> Knobs:
    """Another theta, another factor, or a rotation that is slower everywhere."""
    rope = rope_of(case.chain.config)
    kind = rope["rope_type"]
    theta = rope["rope_theta"]

    def at_frequencies(name: str, inv_freq: Tensor) -> Knob:
        return Knob(name, turned(case, lambda at: at.positions() * inv_freq))

    def with_theta(value: float) -> Knob:
        name = f"another theta in the rotary embedding: {told(value)}, config.json says {theta:g}"
        return at_frequencies(name, scaled_frequencies(case, value))

    def with_factor(value: float) -> Knob:
        name = f"another factor of llama3's rope scaling: {told(value)}, config.json says {rope['factor']:g}"
        return at_frequencies(name, scaled_frequencies(case, theta, factor=value))

    def slowed(value: float) -> Knob:
        name = f"the rotary embedding is slowed down by {told(value)} everywhere"
        if kind == "linear":
            factor = rope["factor"]
            name = f"another factor of linear rope scaling: {told(value * factor)}, config.json says {factor:g}"
        return Knob(name, turned(case, lambda at: at.angles() / value))

    yield from fitted(case, THETAS, with_theta)
    if kind != "linear":
        twice = turned(case, lambda at: 2 * at.angles(), case.chain.attention_scaling**2)
        yield Knob("the rotary embedding is applied twice", twice)
    yield from fitted(case, SLOWER, slowed)
    if kind == "llama3":
        yield from fitted(case, FACTORS, with_factor)


# ---- how exact the angles are


def angles_in_fewer_bits(case: Case) -> Knobs:
    inv_freq = case.chain.inv_freq

    def of_frequencies(at: Step, dtype: torch.dtype) -> Tensor:
        return at.positions() * inv_freq.to(dtype).to(at.chain.dtype)

    def of_positions(at: Step, dtype: torch.dtype) -> Tensor:
        return at.positions().to(dtype).to(at.chain.dtype) * inv_freq

    def of_angles(at: Step, dtype: torch.dtype) -> Tensor:
        return at.angles().to(dtype).to(at.chain.dtype)

    def of_both(at: Step, dtype: torch.dtype) -> Tensor:
        angles = at.positions().to(dtype) * inv_freq.to(dtype)
        return angles.to(at.chain.dtype)

    ways = {
        "inv_freq": of_frequencies,
        "positions": of_positions,
        "the angles": of_angles,
        "positions and frequencies": of_both,
    }
    for dtype in (torch.bfloat16, torch.float16):
        for what, angles in ways.items():
            name = str(dtype).removeprefix("torch.")
            steps = turned(case, partial(angles, dtype=dtype))
            yield Knob(f"{what} of the rotary embedding in {name}", steps)


# ---- where they are


def other_positions(case: Case) -> Knobs:
    """Positions that are off, start again, stop or stay."""

    def knob(name: str, change: Callable[[Tensor], Tensor]) -> Knob:
        return Knob(name, turned(case, lambda at: change(at.positions()) * case.chain.inv_freq))

    for shift in sorted(range(-64, 65), key=abs)[1:]:
        name = f"the rotary embedding is at positions that are off by {shift:+d}"
        yield knob(name, lambda positions, shift=shift: positions + shift)
    count = len(case.rows)
    sizes = {2**power for power in range(3, 17) if 2**power < count}
    sizes.add(int(case.rows.nonzero()[0]))
    for size in sorted(sizes - {0}):
        name = f"positions of the rotary embedding start again at {size}"
        yield knob(name, lambda positions, size=size: positions % size)
        name = f"positions of the rotary embedding stop at {size - 1}"
        yield knob(name, lambda positions, size=size: positions.clamp(max=size - 1))
    for position in sorted({0, case.prompt - 1, case.prompt}):
        name = f"all positions of the rotary embedding are {position}"
        yield knob(name, lambda positions, position=position: torch.full_like(positions, position))

"""Roundings that Hugging Face does not make, found in a port's errors where the errors are no larger than HF's own."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from tools.audit.oracle import attend, in_dtype


class Shares:
    """How much of another rounding is in a port's errors: least squares of (port - exact) over (HF - exact) and
    (other - exact), all three from the port's inputs. 0: none of it; 1: all of it."""

    def __init__(self) -> None:
        self.products = torch.zeros(2, 2, dtype=torch.float64)
        self.targets = torch.zeros(2, dtype=torch.float64)
        self.squares = 0.0
        self.count = 0

    def add(self, port: Tensor, exact: Tensor, hf: Tensor, other: Tensor) -> None:
        exact = exact.flatten(1).double()
        norm = exact.norm(dim=-1, keepdim=True)
        scale = norm.clamp(min=1e-30)

        def errors(x: Tensor) -> Tensor:
            difference = x.flatten(1).double() - exact
            return (difference / scale).flatten()

        port_errors = errors(port)
        if not torch.isfinite(port_errors).all():  # there is worse to report
            return
        x = torch.stack((errors(hf), errors(other)))  # 2 n
        self.products += x @ x.T
        self.targets += x @ port_errors
        self.squares += float(port_errors @ port_errors)
        self.count += len(port_errors)

    def solve(self) -> tuple[float, float]:
        """The share, and its standard error."""
        inverse = torch.linalg.pinv(self.products)
        shares = inverse @ self.targets
        explained = float(shares @ self.targets)
        noise = max(self.squares - explained, 0.0) / self.count
        share = float(shares[1])
        standard_error = float((noise * inverse[1, 1]).sqrt())
        return share, standard_error


def rounded_norm(x: Tensor, norm: nn.Module) -> Tensor:
    """RMSNorm in the dtype of x from end to end."""
    variance = x.pow(2).mean(-1, keepdim=True)
    scaled = x * torch.rsqrt(variance + norm.variance_epsilon)
    return norm.weight * scaled


def rotated_twice(model: nn.Module, projected: Tensor) -> tuple[Tensor, Tensor]:
    """q of one text [P,H,D] after HF's rotary embedding, and after one whose angles are in the dtype of q."""
    dtype = projected.dtype
    rotary = model.model.rotary_emb
    positions = torch.arange(len(projected))
    positions = positions[:, None]  # P 1
    exact = positions * rotary.inv_freq.float()  # P D/2
    rounded = positions.to(dtype) * rotary.inv_freq.to(dtype)

    def rotate(angles: Tensor) -> Tensor:
        both = torch.cat((angles, angles), dim=-1)
        both = both[:, None]  # P 1 D
        cos = both.cos() * rotary.attention_scaling
        sin = both.sin() * rotary.attention_scaling
        x1, x2 = projected.chunk(2, dim=-1)
        half = torch.cat((-x2, x1), dim=-1)
        return projected * cos.to(dtype) + half * sin.to(dtype)

    return rotate(exact), rotate(rounded.float())


def rounded_softmax(module: nn.Module, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Attention of one text whose softmax is in the dtype of q from end to end: q [P,H,D], k and v [P,K,D]."""
    groups = q.shape[1] // k.shape[1]
    q = q.transpose(0, 1)  # H P D
    k = k.transpose(0, 1).repeat_interleave(groups, 0)
    v = v.transpose(0, 1).repeat_interleave(groups, 0)
    scores = torch.matmul(q, k.transpose(1, 2))  # H P P
    scores = scores * module.scaling
    future = torch.ones(scores.shape[1:], dtype=torch.bool).triu(1)
    scores = scores.masked_fill(future, -torch.inf)
    largest = scores.amax(-1, keepdim=True)
    weights = torch.exp(scores - largest)
    total = weights.sum(-1, keepdim=True)
    weights = weights / total
    return torch.matmul(weights, v).transpose(0, 1)


def was_seen(text: object, name: str) -> bool:
    """Whether a text's tensor was captured, at every position."""
    return name in text.subject and bool(text.seen[name].all())


def add_norm(shares: Shares, text: object, layer: nn.Module, number: int, dtype: torch.dtype) -> None:
    """RMSNorm in `dtype` shows in v, which is not rotated. The layer is in `dtype`."""
    name = f"layers.{number}.v"
    if not was_seen(text, name):
        return
    port = text.subject[name]
    norm = layer.input_layernorm
    v_proj = layer.self_attn.v_proj
    hidden = text.has[f"hidden_states.{number}"].to(dtype)
    hf = v_proj(norm(hidden))
    hf = hf.view(port.shape)
    other = v_proj(rounded_norm(hidden, norm))
    other = other.view(port.shape)
    shares.add(port, text.step[name], hf, other)


def add_angles(
    shares: Shares,
    text: object,
    layer: nn.Module,
    number: int,
    dtype: torch.dtype,
    model: nn.Module,
) -> None:
    """Rotary angles in `dtype` show in q."""
    name = f"layers.{number}.q"
    if not was_seen(text, name):
        return
    port = text.subject[name]
    hidden = text.has[f"hidden_states.{number}"].to(dtype)
    normed = layer.input_layernorm(hidden)
    projected = layer.self_attn.q_proj(normed)
    projected = projected.view(port.shape)
    hf, other = rotated_twice(model, projected)
    shares.add(port, text.step[name], hf, other)


def add_softmax(shares: Shares, text: object, layer: nn.Module, number: int, dtype: torch.dtype) -> None:
    """A softmax in `dtype` shows in what the heads give."""
    prefix = f"layers.{number}."
    name = prefix + "heads"
    if not was_seen(text, name):
        return
    q = text.has[prefix + "q"].to(dtype)
    k = text.has[prefix + "k"].to(dtype)
    v = text.has[prefix + "v"].to(dtype)
    attention = layer.self_attn
    hf = attend(attention, q, k, v)
    other = rounded_softmax(attention, q, k, v)
    shares.add(text.subject[name], text.step[name], hf, other)


@torch.inference_mode()
def rounding_shares(
    model: nn.Module,
    dtype: torch.dtype,
    texts: list,
) -> dict[str, tuple[str, float, float]]:
    """Whether RMSNorm, rotary angles and softmax are in the audited dtype: kind -> (what, share, its standard
    error)."""
    norm = Shares()
    angles = Shares()
    softmax = Shares()
    for number, layer in enumerate(model.model.layers):
        with in_dtype(layer, dtype):
            for text in texts:
                add_norm(norm, text, layer, number, dtype)
                add_angles(angles, text, layer, number, dtype, model)
                add_softmax(softmax, text, layer, number, dtype)
    rows = [
        ("v", "RMSNorm", norm),
        ("q", "rotary angles", angles),
        ("heads", "softmax", softmax),
    ]
    found = {}
    name = str(dtype).removeprefix("torch.")
    for kind, what, shares in rows:
        if shares.count:
            share, error = shares.solve()
            found[kind] = (f"{what} in {name}", share, error)
    return found

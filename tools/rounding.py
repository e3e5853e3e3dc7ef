"""Roundings that Hugging Face does not make, found in a port's errors where the errors are no larger than HF's own."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from tools.oracle import attend, in_dtype


class Shares:
    """How much of another rounding is in a port's errors: least squares of (port - exact) over (HF - exact) and
    (other - exact), all three from the port's inputs. 0: none of it; 1: all of it."""

    def __init__(self) -> None:
        self.products, self.targets = torch.zeros(2, 2, dtype=torch.float64), torch.zeros(2, dtype=torch.float64)
        self.squares, self.count = 0.0, 0

    def add(self, port: Tensor, exact: Tensor, hf: Tensor, other: Tensor) -> None:
        exact = exact.flatten(1).double()
        scale = exact.norm(dim=-1, keepdim=True).clamp(min=1e-30)
        errors = []
        for x in (port, hf, other):
            errors.append(((x.flatten(1).double() - exact) / scale).flatten())
        if not torch.isfinite(errors[0]).all():  # there are worse things to tell
            return
        x = torch.stack(errors[1:])  # 2 n
        self.products += x @ x.T
        self.targets += x @ errors[0]
        self.squares += float(errors[0] @ errors[0])
        self.count += len(errors[0])

    def solve(self) -> tuple[float, float]:
        """The share, and its standard error."""
        inverse = torch.linalg.pinv(self.products)
        shares = inverse @ self.targets
        noise = max(self.squares - float(shares @ self.targets), 0.0) / self.count
        return float(shares[1]), float((noise * inverse[1, 1]).sqrt())


def rounded_norm(x: Tensor, norm: nn.Module) -> Tensor:
    """RMSNorm in the dtype of x from end to end."""
    return norm.weight * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + norm.variance_epsilon))


def rotated_twice(model: nn.Module, projected: Tensor) -> tuple[Tensor, Tensor]:
    """q of one text [P,H,D] after HF's rotary embedding, and after one whose angles are in the dtype of q."""
    inv_freq, positions = model.model.rotary_emb.inv_freq, torch.arange(len(projected))[:, None]
    scaling = model.model.rotary_emb.attention_scaling
    rounded = (positions.to(projected.dtype) * inv_freq.to(projected.dtype)).float()
    results = []
    for angles in (positions * inv_freq.float(), rounded):
        both = torch.cat((angles, angles), dim=-1)[:, None]  # P 1 D
        cos, sin = ((y * scaling).to(projected.dtype) for y in (both.cos(), both.sin()))
        x1, x2 = projected.chunk(2, dim=-1)
        results.append(projected * cos + torch.cat((-x2, x1), dim=-1) * sin)
    return results[0], results[1]


def rounded_softmax(module: nn.Module, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Attention of one text whose softmax is in the dtype of q from end to end: q [P,H,D], k and v [P,K,D]."""
    q, k, v = (x.transpose(0, 1) for x in (q, k, v))  # n P D
    groups = len(q) // len(k)
    k, v = k.repeat_interleave(groups, 0), v.repeat_interleave(groups, 0)
    scores = torch.matmul(q, k.transpose(1, 2)) * module.scaling  # H P P
    future = torch.ones(scores.shape[1:], dtype=torch.bool).triu(1)
    scores = scores.masked_fill(future, -torch.inf)
    weights = torch.exp(scores - scores.amax(-1, keepdim=True))
    weights = weights / weights.sum(-1, keepdim=True)
    return torch.matmul(weights, v).transpose(0, 1)


@torch.inference_mode()
def rounding_shares(model: nn.Module, dtype: torch.dtype, texts: list) -> dict[str, tuple[str, float, float]]:
    """Of RMSNorm and softmax in the audited dtype: kind -> (what, share, its standard error)."""
    norm, rotary, softmax = Shares(), Shares(), Shares()
    for number, layer in enumerate(model.model.layers):
        attention, names = layer.self_attn, {kind: f"layers.{number}.{kind}" for kind in ("q", "k", "v", "heads")}
        with in_dtype(layer, dtype):
            for text in texts:
                port, step, has = text.subject, text.step, text.has
                if names["v"] in port and text.seen[names["v"]].all():
                    x = has[f"hidden_states.{number}"].to(dtype)
                    products = []
                    for y in (layer.input_layernorm(x), rounded_norm(x, layer.input_layernorm)):
                        products.append(attention.v_proj(y).view(port[names["v"]].shape))
                    norm.add(port[names["v"]], step[names["v"]], *products)
                if names["q"] in port and text.seen[names["q"]].all():
                    x = layer.input_layernorm(has[f"hidden_states.{number}"].to(dtype))
                    projected = attention.q_proj(x).view(port[names["q"]].shape)
                    rotary.add(port[names["q"]], step[names["q"]], *rotated_twice(model, projected))
                if names["heads"] in port and text.seen[names["heads"]].all():
                    q, k, v = (has[names[kind]].to(dtype) for kind in ("q", "k", "v"))
                    other = rounded_softmax(attention, q, k, v)
                    softmax.add(port[names["heads"]], step[names["heads"]], attend(attention, q, k, v), other)
    found = {}
    for kind, what, shares in (("v", "RMSNorm", norm), ("q", "rotary angles", rotary), ("heads", "softmax", softmax)):
        if shares.count:
            found[kind] = (f"{what} in {str(dtype).removeprefix('torch.')}", *shares.solve())
    return found

"""HF's own `LlamaForCausalLM` on a device: whether its file computes there what it computes on a CPU.

    python -m tools.ports hf --hf ./Llama-3.2-1B --device cuda --out ./hf-on-cuda
    python -m tools.audit --hf ./Llama-3.2-1B --captured ./hf-on-cuda/capture.safetensors

Prompts run one after the other, each as a batch of one. HF would pad a batch on the left, and mask the padding: a
prompt would then be computed in other shapes and round otherwise than the same prompt does in the audit.

With --compile, the whole forward is one graph for each prompt's length and one for decoding, around HF's `StaticCache`;
HF's `generate` would compile decoding alone. What is captured are further outputs of these graphs, and because of them
a compiler may fuse less, and round otherwise. So the model runs twice: first without taps, which chooses the new
tokens, and whose logits are OUT/untapped.safetensors.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from checkpoint.files import reason
from llama_neuron import UsageError, choose_device
from tools.audit.oracle import load_hf, tapped
from tools.ports.common import write_capture

HEADS = (".q_proj", ".k_proj", ".v", ".heads")  # what `tapped` gives as [1,T,n*D]

Forward = Callable[[Tensor, Tensor, object], dict[str, Tensor]]  # ids [1,T], positions [1,T] and HF's cache


def load(hf: Path, device: str, dtype: torch.dtype, attn: str) -> nn.Module:
    """HF's model on a device. Raises UsageError if it is not available, or if HF has no such attention here."""
    device = choose_device(device)
    if device == "nxd":
        raise UsageError("--device nxd runs graphs of NxD, not HF's file: name neuron, cuda or cpu")
    model = load_hf(hf, dtype)
    model.config.return_dict = True  # whatever config.json says
    try:
        model.set_attn_implementation(attn)
    except Exception as error:  # transformers raises nearly all kinds
        raise UsageError(f"--attn {attn}: transformers refuses it: {reason(error)}") from None
    return model.to(device)


@contextmanager
def rotations() -> Iterator[list[tuple[Tensor, Tensor]]]:
    """What HF's function for the rotary embedding returns to each layer while the model runs: q [1,H,T,D], k [1,K,T,D].
    It returns to no module, so no hook sees it; and every attention implementation is called after it."""
    from transformers.models.llama import modeling_llama

    apply_rotary_pos_emb = modeling_llama.apply_rotary_pos_emb
    seen = []

    def keep(*args: object, **kwargs: object) -> tuple[Tensor, Tensor]:
        q, k = apply_rotary_pos_emb(*args, **kwargs)
        seen.append((q, k))
        return q, k

    modeling_llama.apply_rotary_pos_emb = keep
    try:
        yield seen
    finally:
        modeling_llama.apply_rotary_pos_emb = apply_rotary_pos_emb


def untapped_forward(model: nn.Module) -> Forward:
    """logits [1,T,V], and greedy [1,T]."""

    def forward(input_ids: Tensor, position_ids: Tensor, cache: object) -> dict[str, Tensor]:
        # the cache by its place: transformers 4 and 5 have other names for it
        logits = model(input_ids, None, position_ids, cache, use_cache=True).logits
        return {"logits": logits, "greedy": logits.argmax(-1)}

    return forward


def tapped_forward(model: nn.Module, seen: dict[str, list[Tensor]], rotated: list[tuple[Tensor, Tensor]]) -> Forward:
    """These and what was `seen` on the way, [1,T,...]."""
    untapped = untapped_forward(model)

    def forward(input_ids: Tensor, position_ids: Tensor, cache: object) -> dict[str, Tensor]:
        tensors = untapped(input_ids, position_ids, cache)
        for name, outputs in seen.items():
            tensors[name] = outputs[0]
            if name.endswith(HEADS):
                tensors[name] = outputs[0].unflatten(-1, (-1, model.config.head_dim))
        for number, (q, k) in enumerate(rotated):
            tensors[f"layers.{number}.q"] = q.transpose(1, 2)
            tensors[f"layers.{number}.k"] = k.transpose(1, 2)
        seen.clear()
        rotated.clear()
        return tensors

    return forward


@torch.inference_mode()
def run(
    model: nn.Module,
    forward: Forward,
    prompts: list[list[int]],
    new_tokens: int,
    compiled: bool,
    forced: list[list[int]] | None = None,
) -> tuple[dict[str, Tensor], list[list[int]]]:
    """What `forward` returns, on the CPU as [B,P+M-1,...], and the new tokens: greedy, or those of `forced` [B][M]."""
    from transformers import DynamicCache, StaticCache

    if compiled:
        options = {"fullgraph": True, "dynamic": False}
        # one graph for decoding and one for each prompt's length: torch would stop at 8
        options |= {"recompile_limit": 1 + len(prompts), "isolate_recompiles": True}
        forward = torch.compile(forward, backend="neuron" if model.device.type == "neuron" else "inductor", **options)
    slots = max(map(len, prompts)) + new_tokens
    rows = defaultdict(list)
    new_ids = []
    for row, prompt in enumerate(prompts):
        cache = DynamicCache()
        if compiled:
            cache = StaticCache(config=model.config, max_cache_len=slots)
            # not in the graph of the first prompt, where HF would otherwise do it
            heads = model.config.num_key_value_heads
            cache.early_initialization(1, heads, model.config.head_dim, model.dtype, model.device)
        calls = defaultdict(list)
        ids = list(prompt)
        start = 0
        for step in range(new_tokens):
            fed = torch.tensor([ids[start:]])
            position_ids = torch.arange(start, len(ids))[None]
            tensors = forward(fed.to(model.device), position_ids.to(model.device), cache)
            for name, x in tensors.items():
                calls[name].append(x[0].cpu())
            chosen = int(calls["greedy"][-1][-1])
            start = len(ids)
            ids.append(chosen if forced is None else forced[row][step])
        new_ids.append(ids[len(prompt) :])
        for name, outputs in calls.items():
            rows[name].append(torch.cat(outputs))
    tensors = {name: pad_sequence(x, batch_first=True) for name, x in rows.items()}
    tensors["logits"] = tensors["logits"].float()
    tensors["greedy"] = tensors["greedy"].int()
    return tensors, new_ids


def capture(
    hf: Path,
    out: Path,
    *,
    prompts: list[list[int]],
    new_tokens: int,
    tp: int,
    device: str,
    dtype: str,
    attn: str = "eager",
    compiled: bool = False,
) -> None:
    """Writes `out`/capture.safetensors and, if compiled, `out`/untapped.safetensors: see above. Raises UsageError as
    `load` does, and for more than one rank."""
    if tp != 1:
        raise UsageError(f"--tp {tp}: HF's file runs on one device here, leave --tp out")
    model = load(hf, device, getattr(torch, dtype), attn)
    facts = {"prompts": prompts, "dtype": dtype, "tp": 1, "device": device}
    notes = [f"HF's file, {attn} attention, {'compiled' if compiled else 'not compiled'}"]
    new_ids = None
    if compiled:
        untapped, new_ids = run(model, untapped_forward(model), prompts, new_tokens, compiled)
        write_capture(out, untapped, new_ids=new_ids, notes=notes, name="untapped.safetensors", **facts)
    with tapped(model) as seen, rotations() as rotated:
        forward = tapped_forward(model, seen, rotated)
        tensors, new_ids = run(model, forward, prompts, new_tokens, compiled, new_ids)
    for name in ("cos", "sin"):  # [B,P+M-1,D]: no place of the audit
        del tensors[name]
    if compiled:
        difference = (tensors["logits"] - untapped["logits"]).abs().max()
        largest = untapped["logits"].abs().max()
        notes.append(f"with taps, compiled logits of up to {largest:.3g} change by up to {difference:.2g}")
    write_capture(out, tensors, new_ids=new_ids, notes=notes, **facts)

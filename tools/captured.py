"""Reads what was captured elsewhere by the names of tools.capture: `python -m tools.audit --captured PATH`. PATH is

- a file of tools.capture, or one that a port wrote by the same names and shapes;
- NxDI's folder (`TensorCaptureConfig`): captured_tensors_{cte,tkg}_step_N_module_NAME_{output,input}.pt, of rank 0
  alone. Step 1 reads the prompts, padded to a bucket; step N feeds new token N-1;
- vLLM Neuron's folder (`tensor_capture`): dp0/{prefill_sT,decode_bB}_N/NAME/rankR.pt, and a JSON file of requests and
  positions. In a prefill a rank may hold T/tp of the tokens.

What these two do not write may lie beside their files, or alone, in generated.safetensors: ids [B,P+M], each row a
prompt and M new tokens; prompt_tokens [B]; and, but for vLLM Neuron, the logits [B,M,V] that chose the new tokens.
"""

from __future__ import annotations

import json
import pickle
import re
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from operator import itemgetter
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor

from llama_neuron import LlamaConfig, UsageError, shard_heads

# What modules take and return: N is a layer's number, L the number of layers, qkv is q_proj, k_proj and v side by side
PLACES = {
    "embed_tokens": ("ids", "hidden_states.0"),
    "layers.N": ("hidden_states.N", "hidden_states.N+1"),
    "layers.N.input_layernorm": ("hidden_states.N", "layers.N.input_layernorm"),
    "layers.N.self_attn": ("layers.N.input_layernorm", "layers.N.attention"),
    "layers.N.self_attn.qkv_proj": ("layers.N.input_layernorm", "layers.N.qkv"),
    "layers.N.self_attn.Wqkv": ("layers.N.input_layernorm", "layers.N.qkv"),
    "layers.N.self_attn.q_proj": ("layers.N.input_layernorm", "layers.N.q_proj"),
    "layers.N.self_attn.k_proj": ("layers.N.input_layernorm", "layers.N.k_proj"),
    "layers.N.self_attn.v_proj": ("layers.N.input_layernorm", "layers.N.v"),
    "layers.N.self_attn.o_proj": ("layers.N.heads", "layers.N.attention"),
    "layers.N.post_attention_layernorm": (None, "layers.N.post_attention_layernorm"),
    "layers.N.mlp": ("layers.N.post_attention_layernorm", "layers.N.mlp"),
    "norm": ("hidden_states.L", "final_norm"),
    "lm_head": ("final_norm", "logits"),
}
NAMES = {"layers.N.q", "layers.N.k", *(name for names in PLACES.values() for name in names)}
QUERY, KEY = (".q", ".q_proj", ".heads"), (".k", ".k_proj", ".v")  # tensors of which a rank has some heads
NXDI = re.compile(r"captured_tensors_(?:cte|tkg)_step_(\d+)_module_(.+)_(output|input)\.pt")
EXPECTED = "a file of tools.capture, or a folder of NxDI's (captured_tensors_*.pt) or vLLM Neuron's (dp0/prefill_s*)"


@dataclass(frozen=True)
class Captured:
    """What a capture holds. Tensors are NaN where nothing was captured; `seen` tells that from a NaN that was."""

    tensors: dict[str, Tensor]  # [B,positions,...] by the names of tools.capture
    seen: dict[str, Tensor]  # bool, each [B,positions], or [B,positions,heads]
    ids: Tensor | None  # int64 [B,positions] or [B,positions+1]; shorter rows end in zeros
    prompt_tokens: list[int] | None  # of each row
    facts: dict[str, str]  # what the capture says of itself
    notes: list[str]  # what an auditor should know
    greedy: Tensor | None = None  # int32 [B,positions], the port's own choices


def name_of(module: str, side: str, layers: int) -> str | None:
    """Where a module's input or output belongs, or what was captured by a name of ours; None if there is no place."""
    module = module.removeprefix("manual.").removeprefix("model.")
    module = re.sub(r"(qkv_proj|o_proj)\.(\w+)$", r"\2", module)  # NxDI's qkv_proj.Wqkv, o_proj.o_proj
    pattern, number = re.sub(r"\d+", "N", module), int((re.findall(r"\d+", module) or [0])[0])
    name = pattern if pattern in NAMES else None
    if side and pattern in PLACES:
        name = PLACES[pattern][side == "output"]
    return name and name.replace("N+1", str(number + 1)).replace("N", str(number)).replace("L", str(layers))


def load(path: Path, function: Callable[[Path], Any]) -> Any:
    """function(path). Raises UsageError if it fails."""
    known = (EOFError, LookupError, OSError, RuntimeError, SafetensorError, TypeError, ValueError, pickle.PickleError)
    try:
        return function(path)
    except known as error:
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise UsageError(f"{path} cannot be read ({reason}): capture it again") from None


class Sheets:
    """Tensors as they fill up: each [B*P,n,w], where n counts heads, slices of the logits, or the one whole."""

    def __init__(self, path: Path, config: LlamaConfig, tp: int, ends: list[int]) -> None:
        self.path, self.config, self.ends, self.P = path, config, ends, max(ends)  # ends: of each row its positions
        self.ranks = shard_heads(config.num_attention_heads, config.num_key_value_heads, tp)
        self.values: dict[str, Tensor] = {}
        self.seen: dict[str, Tensor] = {}
        self.remarks: dict[tuple[str, str], list[str]] = defaultdict(list)

    def remark(self, name: str, text: str) -> None:
        self.remarks[re.sub(r"\d+", "N", name), text].append(name)

    def layout(self, name: str, rank: int, width: int) -> tuple[list[int | None], int, int]:
        """What lies side by side in a rank's tensor: HF's numbers, how many there are in all, and the width of each."""
        config, (query, key), tp = self.config, self.ranks[rank], len(self.ranks)
        if name.endswith(QUERY):
            return query, config.num_attention_heads, config.head_dim
        if name.endswith(KEY):
            return key, config.num_key_value_heads, config.head_dim
        if name == "logits":  # sharded by vocabulary, or gathered
            return [rank] if width < config.vocab_size else [*range(tp)], tp, -(-config.vocab_size // tp)
        return [0], 1, 1 if name == "ids" else config.hidden_size

    def write(self, name: str, rank: int, x: Tensor, at: Tensor) -> None:
        """Writes x [T,W] of one rank to its places, `at` [T]: row * P + position, or -1 for padding. What is there
        already stays, and is compared."""
        if name.endswith(".qkv"):
            sizes = [len(heads) * self.config.head_dim for heads in (*self.ranks[rank], self.ranks[rank][1])]
            pieces = x.split(sizes, dim=-1) if x.shape[-1] == sum(sizes) else [x]  # NxDI's qkv_proj shows q alone
            for kind, piece in zip(("q_proj", "k_proj", "v"), pieces, strict=False):
                self.write(name.replace("qkv", kind), rank, piece, at)
            return
        if name == "logits" and x.shape[-1] >= self.config.vocab_size:
            x = F.pad(x[:, : self.config.vocab_size], (0, -self.config.vocab_size % len(self.ranks)))
        numbers, count, size = self.layout(name, rank, x.shape[-1])
        width, is_heads = len(numbers) * size, name.endswith(QUERY + KEY)
        if x.shape[-1] < width or (x.shape[-1] > width and is_heads):
            self.remark(name, f"left out, {x.shape[-1]} wide, and {width} are expected at tp {len(self.ranks)}")
            return
        if x.shape[-1] > width:
            self.remark(name, f"{x.shape[-1]} wide, cut to {width}")
        if name not in self.values:
            shape = (len(self.ends) * self.P, count, size)
            self.values[name] = torch.full(shape, torch.nan if x.is_floating_point() else 0, dtype=x.dtype)
            self.seen[name] = torch.zeros(shape[:-1], dtype=torch.bool)
        values, seen = self.values[name], self.seen[name]
        x, at = x[at >= 0, :width].unflatten(-1, (len(numbers), size)).to(values.dtype), at[at >= 0]  # T n w
        for place, number in enumerate(numbers):
            if number is None:  # a head of zeros
                continue
            old, new, again = values[at, number], x[:, place], seen[at, number]
            if not torch.allclose(old[again], new[again], 0, 0, equal_nan=True):
                self.remark(name, f"copies of head {number} differ" if is_heads else "copies differ")
            values[at, number] = torch.where(again[:, None], old, new)
            seen[at, number] = True

    def read(
        self, file: Path, module: str, side: str, rank: int, place: Callable[[str, Tensor], Tensor | None]
    ) -> None:
        """Writes a file's tensor where `place` says that its tokens belong; None if they do not."""
        x = load(file, lambda file: torch.as_tensor(torch.load(file, map_location="cpu", weights_only=True)))
        name = name_of(module, side, self.config.num_hidden_layers)
        if x.dim() == 1:  # what NxDI writes in its place
            return self.remark(f"{module} {side}", "the module did not run")
        x = x[..., None] if name == "ids" else x
        at = place(name, x) if name else None
        if at is None or len(at) > x.shape[:-1].numel():
            return self.remark(f"{module} {side}", "left out, it has no place in the audit")
        self.write(name, rank, x.flatten(0, -2)[: len(at)], at)

    def finish(self, stack: str, ids: Tensor | None, prompt_tokens: list[int] | None) -> Captured:
        facts, tensors, seen, notes = {"stack": stack, "tp": str(len(self.ranks))}, {}, {}, []
        texts = torch.cat([torch.arange(end) + row * self.P for row, end in enumerate(self.ends)])
        for name, x in sorted(self.values.items()):
            x, known = x.unflatten(0, (-1, self.P)), self.seen[name].unflatten(0, (-1, self.P))  # B P n w, B P n
            if name == "ids":
                if (x[..., 0, 0] != ids[:, : self.P])[known[..., 0]].any():
                    raise UsageError(f"{self.path}: embed_tokens was fed other ids than those given, of another run")
                continue
            here = self.seen[name][texts]
            if not here.any(1).all():
                self.remark(name, f"has {int(here.any(1).sum())} of {len(here)} positions")
            if not here.any(0).all():
                self.remark(name, f"has {int(here.any(0).sum())} of {here.shape[1]} heads or slices")
            if not name.endswith(QUERY + KEY):
                x, known = x.flatten(2), known.all(-1)
            if name == "logits":
                x = x[..., : self.config.vocab_size]
            else:
                facts["dtype"] = str(x.dtype).removeprefix("torch.")
            tensors[name], seen[name] = x, known
        for (_, text), names in self.remarks.items():
            notes.append(f"{names[0]}: {text}" + (f" (first of {len(names)})" if len(names) > 1 else ""))
        return Captured(tensors, seen, None if ids is None else ids.long(), prompt_tokens, facts, notes)


# ---- the three forms


def load_generated(path: Path) -> dict[str, Tensor]:
    file = path / "generated.safetensors"
    return load(file, load_file) if file.exists() else {}


def read_file(path: Path, config: LlamaConfig, ids: Tensor | None) -> Captured:
    tensors = load(path, load_file)
    facts = load(path, lambda path: safe_open(path, "pt").metadata()) or {}
    ids, prompt_tokens = tensors.pop("ids", ids), json.loads(facts.pop("prompt_tokens", "null"))
    greedy = tensors.pop("greedy", None)  # [B,P]: no numbers to compare, but choices to look at
    known = {name for name, x in tensors.items() if name_of(name, "", 0) == name and x.dim() > 2}
    if not known:
        raise UsageError(f"{path} has no tensor by a name of tools.capture: expected {EXPECTED}")
    B, P = max(tensors[name].shape[:2] for name in known)
    lengths = torch.tensor(prompt_tokens or [P] * B)
    ends = P - lengths.max() + lengths  # B
    at = torch.where(torch.arange(P) < ends[:, None], torch.arange(B * P).view(B, P), -1).flatten()
    sheets = Sheets(path, config, 1, ends.tolist())
    for name, x in tensors.items():
        if name in known and x.shape[:2] == (B, P):
            sheets.write(name, 0, x.flatten(2).flatten(0, 1), at)
        else:
            sheets.remark(name, "left out, it has no place in the audit")
    captured = sheets.finish("tools.capture", ids, prompt_tokens)
    return replace(captured, facts=captured.facts | facts, greedy=greedy)


def read_nxdi(path: Path, config: LlamaConfig, ids: Tensor | None, tp: int) -> Captured:
    matches = {file: NXDI.fullmatch(file.name) for file in sorted(path.glob("captured_tensors_*.pt"))}
    steps = max((int(match[1]) for match in matches.values() if match), default=1)
    generated = load_generated(path)
    ids = generated.get("ids", ids)
    if ids is None:
        raise UsageError(f"{path} does not tell the ids: add generated.safetensors, docs/captures.md says how")
    prompt_tokens = generated.get("prompt_tokens", torch.full((len(ids),), ids.shape[1] - steps)).tolist()
    new_tokens = ids.shape[1] - max(prompt_tokens)
    if min(prompt_tokens) < 1 or new_tokens < 1:
        raise UsageError(f"{path} has {steps} steps, more than these ids have new tokens: give those of this run")
    sheets = Sheets(path, config, tp, [prompt + new_tokens - 1 for prompt in prompt_tokens])
    if "logits" in generated:
        first = torch.tensor(prompt_tokens) - 1 + torch.arange(len(ids)) * sheets.P
        at = first[:, None] + torch.arange(new_tokens)  # B M
        sheets.write("logits", 0, generated["logits"].flatten(0, 1), at.flatten())

    def place(step: int, name: str, x: Tensor) -> Tensor | None:
        rows, length = x.shape[:2]
        if step > new_tokens or (step > 1 and length > 1):
            return None
        at = torch.full((rows, length), -1)
        for row, prompt in enumerate(prompt_tokens[:rows]):
            if length == 1:  # a new token, or the end of the prompt, which is all that lm_head gets
                at[row] = row * sheets.P + prompt + step - 2
            else:
                at[row, :prompt] = row * sheets.P + torch.arange(min(prompt, length))
        return at.flatten()

    for side in ("output", "input"):
        for file, match in matches.items():
            if match and match[3] == side:
                sheets.read(file, match[2], side, 0, partial(place, int(match[1])))
    for file, match in matches.items():
        if not match:
            sheets.remark(file.name, "left out, it carries no module's name")
    return sheets.finish("NxDI" if matches else "generate", ids, prompt_tokens)


def read_vllm(path: Path, config: LlamaConfig, ids: Tensor | None, tp: int) -> Captured:
    passes, prompts, ends = [], {}, {}
    for folder in sorted((*path.glob("dp*/prefill_s*"), *path.glob("dp*/decode_b*"))):
        told = folder / f"{folder.name}_meta.json"
        requests, positions = load(told, lambda file: itemgetter("req_ids", "positions")(json.loads(file.read_text())))
        if folder.name.startswith("prefill"):  # of one request, whose positions rise until the padding begins
            falls = (at for at in range(1, len(positions)) if positions[at] <= positions[at - 1])
            requests = requests[:1] * next(falls, len(positions))
            prompts[requests[0]] = max(prompts.get(requests[0], 1), positions[len(requests) - 1] + 1)
        passes.append((folder, requests, positions))
        for request, position in zip(requests, positions, strict=False):
            ends[request] = max(ends.get(request, 1), position + 1)
    order = sorted(ends, key=lambda request: ([int(part) for part in re.findall(r"\d+", request)], request))
    ids = load_generated(path).get("ids", ids)
    if ids is not None and (len(ids) != len(ends) or ids.shape[1] < max(ends.values())):
        raise UsageError(f"{path} holds {len(ends)} requests of up to {max(ends.values())} tokens: give their ids")
    ranks = {file: int(file.stem.removeprefix("rank")) for file in sorted(path.glob("dp*/*/*/rank*.pt"))}
    tp = max(tp, 1 + max(ranks.values(), default=0))
    sheets = Sheets(path, config, tp, [ends[request] for request in order])

    def place(at: Tensor, last: Tensor, rank: int, name: str, x: Tensor) -> Tensor | None:
        T = x.shape[:-1].numel()
        if name == "logits":
            return last
        if T * tp == len(at):  # the rank's share of the tokens
            return at[rank * T : (rank + 1) * T]
        return at if len(at) == T else None

    for folder, requests, positions in passes:
        at = torch.full((len(positions),), -1)
        for token, request in enumerate(requests):
            at[token] = order.index(request) * sheets.P + positions[token]
        last = at[len(requests) - 1 : len(requests)] if folder.name.startswith("prefill") else at[: len(requests)]
        for file in sorted(folder.glob("*/rank*.pt")):
            sheets.read(file, file.parent.name, "output", ranks[file], partial(place, at, last, ranks[file]))
    return sheets.finish("vLLM Neuron", ids, [prompts.get(request, 1) for request in order])


def read_captured(path: Path, config: LlamaConfig, ids: Tensor | None = None, tp: int | None = None) -> Captured:
    """Reads a capture of the model that `config` describes.

    `ids`: int64 [B,P+M], prompts of one length and as many new tokens as NxDI's capture has steps; for captures that
    come without. `tp`: ranks of an NxDI port (1), or of vLLM Neuron's if some ranks' files are elsewhere. Raises
    UsageError if PATH is no capture, is damaged, or belongs to other ids.
    """
    if path.is_file():
        return read_file(path, config, ids)
    if any(path.glob("dp*/prefill_s*")) or any(path.glob("dp*/decode_b*")):
        return read_vllm(path, config, ids, tp or 1)
    if any(path.glob("captured_tensors_*.pt")) or path.joinpath("generated.safetensors").exists():
        return read_nxdi(path, config, ids, tp or 1)
    raise UsageError(f"{path} is no capture: expected {EXPECTED}, docs/captures.md says how to make one")

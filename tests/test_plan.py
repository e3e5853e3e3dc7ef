"""`--plan` against figures worked out by hand, and against the shards that the converter writes.

The parameter counts of the three models are those of their published checkpoints; what a rank holds is added up below
from the shapes of the model cards. All in bfloat16, two bytes a number.
"""

import json
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from convert_weights import convert, expected_shapes
from llama_neuron import LlamaConfig, NeuronConfig, exit_on_usage_error, main, plan, shard_path

LLAMA3 = {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "vocab_size": 128256, "torch_dtype": "bfloat16"}
SIZES = {
    "8B": {"hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32},
    "70B": {"hidden_size": 8192, "intermediate_size": 28672, "num_hidden_layers": 80, "num_attention_heads": 64},
    "405B": {"hidden_size": 16384, "intermediate_size": 53248, "num_hidden_layers": 126, "num_attention_heads": 128},
}
PARAMETERS = {"8B": 8_030_261_248, "70B": 70_553_706_496, "405B": 405_853_388_800}


def write_config(folder: Path, **settings: object) -> Path:
    (folder / "config.json").write_text(json.dumps(LLAMA3 | {"num_key_value_heads": 8} | settings))
    return folder


def planned(capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch, *arguments: object) -> list[dict]:
    """What the command prints for `--plan --json`."""
    monkeypatch.setattr(sys, "argv", ["llama_neuron.py", "--plan", "--json", *map(str, arguments)])
    exit_on_usage_error(main)
    return json.loads(capsys.readouterr().out)


# a layer of one rank: Wqkv and o_proj, then gate, up and down, then two norms
BY_HAND = {
    # 4 query heads and 1 KV head of 128: (4 + 1 + 1 + 4) * 128 * 4096 = 5,242,880; MLP 3 * 1792 * 4096 = 22,020,096;
    # 32 * (5,242,880 + 22,020,096 + 8,192) + 4,096; embed 128256 * 512 and lm_head 16032 * 4096, 65,667,072 each
    ("8B", 8): {
        "query_heads": 4,
        "kv_heads": 1,
        "zero_heads": 0,
        "weight_bytes": 2 * (872_677_376 + 4_096 + 2 * 65_667_072),
        "kv_cache_bytes": 2 * 2 * 32 * 8192 * 128,
        "replicated_bytes": 2 * 7 * (32 * 8_192 + 4_096),  # norms
        "padding_bytes": 0,
        "fits": {"trn1": True, "inf2": True, "trn2": True},
    },
    # 24 is 3 ranks to a KV head: the 4 query heads of its group become 6, 2 to a rank, so that 16 of 48 are zeros;
    # intermediate 14336 / 24 -> 598 (16 features over), hidden 4096 / 24 -> 171 (8 columns of the table over)
    ("8B", 24): {
        "query_heads": 2,
        "kv_heads": 1,
        "zero_heads": 16,
        "weight_bytes": 2 * (32 * (6 * 128 * 4096 + 3 * 598 * 4096 + 8_192) + 4_096 + 128256 * 171 + 5344 * 4096),
        "kv_cache_bytes": 2 * 2 * 32 * 8192 * 128,
        "replicated_bytes": 2 * (23 * (32 * 8_192 + 4_096) + 32 * 16 * 2 * 128 * 4096),  # norms, 16 more KV heads
        "padding_bytes": 2 * (32 * (16 * 2 * 128 * 4096 + 16 * 3 * 4096) + 8 * 128256),
        "fits": {"trn1": None, "inf2": True, "trn2": None},
    },
    # 8 query heads and 1 KV head: 18 * 128 * 8192 = 18,874,368; MLP 3 * 3584 * 8192 = 88,080,384;
    # 80 * (18,874,368 + 88,080,384 + 16,384) + 8,192; embed and lm_head 16032 * 8192 = 131,334,144 each: 17.6 GB
    ("70B", 8): {
        "query_heads": 8,
        "kv_heads": 1,
        "zero_heads": 0,
        "weight_bytes": 2 * (8_557_690_880 + 8_192 + 2 * 131_334_144),
        "kv_cache_bytes": 2 * 2 * 80 * 8192 * 128,
        "replicated_bytes": 2 * 7 * (80 * 16_384 + 8_192),
        "padding_bytes": 0,
        "fits": {"trn1": False, "inf2": False, "trn2": True},
    },
    # 32 is 4 ranks to a KV head, 24 heads more than the 8 that there are
    ("70B", 32): {
        "query_heads": 2,
        "kv_heads": 1,
        "zero_heads": 0,
        "weight_bytes": 2 * (80 * (6 * 128 * 8192 + 3 * 896 * 8192 + 16_384) + 8_192 + 2 * 4008 * 8192),
        "kv_cache_bytes": 2 * 2 * 80 * 8192 * 128,
        "replicated_bytes": 2 * (31 * (80 * 16_384 + 8_192) + 80 * 24 * 2 * 128 * 8192),
        "padding_bytes": 0,
        "fits": {"trn1": True, "inf2": None, "trn2": True},
    },
    # 25.6 GB
    ("405B", 32): {
        "query_heads": 4,
        "kv_heads": 1,
        "zero_heads": 0,
        "weight_bytes": 2 * (126 * (10 * 128 * 16384 + 3 * 1664 * 16384 + 32_768) + 16_384 + 2 * 4008 * 16384),
        "kv_cache_bytes": 2 * 2 * 126 * 8192 * 128,
        "replicated_bytes": 2 * (31 * (126 * 32_768 + 16_384) + 126 * 24 * 2 * 128 * 16384),
        "padding_bytes": 0,
        "fits": {"trn1": False, "inf2": None, "trn2": False},
    },
    ("405B", 64): {
        "query_heads": 2,
        "kv_heads": 1,
        "zero_heads": 0,
        "weight_bytes": 2 * (126 * (6 * 128 * 16384 + 3 * 832 * 16384 + 32_768) + 16_384 + 2 * 2004 * 16384),
        "kv_cache_bytes": 2 * 2 * 126 * 8192 * 128,
        "replicated_bytes": 2 * (63 * (126 * 32_768 + 16_384) + 126 * 56 * 2 * 128 * 16384),
        "padding_bytes": 0,
        "fits": {"trn1": None, "inf2": None, "trn2": True},
    },
}


@pytest.mark.parametrize("size, tp", BY_HAND)
def test_plan_is_what_is_worked_out_by_hand(size, tp, tmp_path, capsys, monkeypatch):
    folder = write_config(tmp_path, **SIZES[size], max_position_embeddings=131072)
    one, row = planned(capsys, monkeypatch, "--ckpt", folder, "--tp", f"1,{tp}", "--sequence-length", 8192)
    assert one["weight_bytes"] == 2 * PARAMETERS[size]
    assert row == {"tp_degree": tp, "strategy": "REPLICATE_TO_TP_DEGREE"} | BY_HAND[size, tp]


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("vocab_parallel", [False, True], ids=["hidden", "vocabulary"])
@pytest.mark.parametrize("heads, kv_heads", [(6, 2), (9, 3), (6, 3)])
@pytest.mark.parametrize("tp", [1, 2, 3, 4, 8])
def test_plan_counts_what_the_converter_writes(tp, heads, kv_heads, vocab_parallel, tied, tmp_path):
    """Weights from the files; zeros and copies from the values in them, none of which are zero or alike at first."""
    settings = {"hidden_size": 10, "head_dim": 4, "num_attention_heads": heads, "num_key_value_heads": kv_heads}
    settings |= {"vocab_size": 13, "intermediate_size": 11, "num_hidden_layers": 2, "tie_word_embeddings": tied}
    config = LlamaConfig.from_pretrained(write_config(tmp_path, **settings, attention_bias=True, torch_dtype="float32"))
    tensors, first = {}, 1
    for name, shape in expected_shapes(config).items():
        count = torch.Size(shape).numel()
        tensors[name] = torch.arange(first, first + count, dtype=torch.float32).view(shape)
        first += count
    save_file(tensors, tmp_path / "model.safetensors")
    flags = {"tp_degree": tp, "torch_dtype": torch.float32, "vocab_parallel": vocab_parallel, "sequence_length": 64}
    neuron = NeuronConfig.for_checkpoint(tmp_path, config, **flags)
    convert(tmp_path, tmp_path / "out", config, neuron)
    shards = [load_file(shard_path(tmp_path / "out", rank)) for rank in range(tp)]
    numbers = [torch.cat([t.flatten() for t in shard.values() if t.is_floating_point()]) for shard in shards]
    everything = torch.cat(numbers)
    zeros = int((everything == 0).sum())
    row = plan(config, neuron)
    assert {4 * len(rank) for rank in numbers} == {row["weight_bytes"]}
    assert row["padding_bytes"] == 4 * zeros
    assert row["replicated_bytes"] == 4 * (len(everything) - zeros - len(everything[everything != 0].unique()))
    assert row["strategy"] == ("CONVERT_TO_MHA" if tp % kv_heads else "REPLICATE_TO_TP_DEGREE")


def test_plan_as_text_has_a_line_for_every_degree_and_needs_no_weights(tmp_path, capsys, monkeypatch):
    folder = write_config(tmp_path, **SIZES["8B"])
    monkeypatch.setattr(sys, "argv", ["llama_neuron.py", "--ckpt", str(folder), "--plan"])
    exit_on_usage_error(main)
    head, *lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == ["1", "2", "4", "8", "16", "24", "32", "64"]
    assert head.endswith("trn1 16 GB        inf2 16 GB        trn2 24 GB")
    # 16.06 GB of weights; at tp 2 half of that; Trn1 has no collectives for 4 ranks, Inf2 none for 16
    assert lines[0].split()[-5:] == ["too", "large", "too", "large", "fits"]
    everywhere = ["fits"] * 3
    fits = [line.split()[-3:] for line in lines[1:5]]
    assert fits == [everywhere, ["-", "fits", "fits"], everywhere, ["fits", "-", "fits"]]
    assert len({len(line) for line in [head, *lines]}) == 1


def test_more_than_one_degree_is_for_plans_only(tmp_path, capsys, monkeypatch):
    folder = write_config(tmp_path, **SIZES["8B"])
    monkeypatch.setattr(sys, "argv", ["llama_neuron.py", "--ckpt", str(folder), "--tp", "2,4"])
    with pytest.raises(SystemExit) as stop:
        exit_on_usage_error(main)
    assert stop.value.code == 2
    assert capsys.readouterr().err.count("\n") == 1

"""`python -m tools.plan`: figures worked out by hand, and shards counted that the converter writes."""

import json
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from checkpoint.config import expected_shapes, llama_config, read_config
from convert_weights import convert
from launch.command import run_command
from llama_neuron import NeuronConfig, shard_path
from tools.plan import main, plan, sharding_strategy

LLAMA3 = {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "vocab_size": 128256, "torch_dtype": "bfloat16"}
LLAMA3 |= {"num_key_value_heads": 8, "max_position_embeddings": 131072}
SIZES = {
    "8B": {"hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32},
    "70B": {"hidden_size": 8192, "intermediate_size": 28672, "num_hidden_layers": 80, "num_attention_heads": 64},
    "405B": {"hidden_size": 16384, "intermediate_size": 53248, "num_hidden_layers": 126, "num_attention_heads": 128},
}
PARAMETERS = {"8B": 8_030_261_248, "70B": 70_553_706_496, "405B": 405_853_388_800}


def write_config(folder: Path, **settings: object) -> Path:
    (folder / "config.json").write_text(json.dumps(LLAMA3 | settings))
    return folder


@pytest.fixture
def command(capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch):
    """Runs `python -m tools.plan` with these arguments and returns what it prints."""

    def run(*arguments: object) -> str:
        monkeypatch.setattr(sys, "argv", ["plan.py", *map(str, arguments)])
        run_command(main)
        return capsys.readouterr().out

    return run


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
        "fits": {"trn1": True, "inf2": True, "trn2": True, "trn3": True},
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
        "fits": {"trn1": None, "inf2": True, "trn2": None, "trn3": None},
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
        "fits": {"trn1": False, "inf2": False, "trn2": True, "trn3": True},
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
        "fits": {"trn1": True, "inf2": None, "trn2": True, "trn3": True},
    },
    # 25.6 GB: more than trn2 has, less than trn3
    ("405B", 32): {
        "query_heads": 4,
        "kv_heads": 1,
        "zero_heads": 0,
        "weight_bytes": 2 * (126 * (10 * 128 * 16384 + 3 * 1664 * 16384 + 32_768) + 16_384 + 2 * 4008 * 16384),
        "kv_cache_bytes": 2 * 2 * 126 * 8192 * 128,
        "replicated_bytes": 2 * (31 * (126 * 32_768 + 16_384) + 126 * 24 * 2 * 128 * 16384),
        "padding_bytes": 0,
        "fits": {"trn1": False, "inf2": None, "trn2": False, "trn3": True},
    },
    ("405B", 64): {
        "query_heads": 2,
        "kv_heads": 1,
        "zero_heads": 0,
        "weight_bytes": 2 * (126 * (6 * 128 * 16384 + 3 * 832 * 16384 + 32_768) + 16_384 + 2 * 2004 * 16384),
        "kv_cache_bytes": 2 * 2 * 126 * 8192 * 128,
        "replicated_bytes": 2 * (63 * (126 * 32_768 + 16_384) + 126 * 56 * 2 * 128 * 16384),
        "padding_bytes": 0,
        "fits": {"trn1": None, "inf2": None, "trn2": True, "trn3": True},
    },
}


@pytest.mark.parametrize("size, tp", BY_HAND)
def test_a_plan_is_what_is_worked_out_by_hand(size, tp, tmp_path, command):
    folder = write_config(tmp_path, **SIZES[size])
    one, row = json.loads(command("--hf", folder, "--tp", f"1,{tp}", "--sequence-length", 8192, "--json"))
    assert one["weight_bytes"] == 2 * PARAMETERS[size]
    assert {key: row[key] for key in BY_HAND[size, tp]} == BY_HAND[size, tp]
    assert (row["tp_degree"], row["strategy"]) == (tp, "REPLICATE_TO_TP_DEGREE")


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("vocab_parallel", [False, True], ids=["hidden", "vocabulary"])
@pytest.mark.parametrize("heads, kv_heads", [(6, 2), (9, 3), (6, 3)])
@pytest.mark.parametrize("tp", [1, 2, 3, 4, 8])
def test_a_plan_counts_what_the_converter_writes(tp, heads, kv_heads, vocab_parallel, tied, tmp_path):
    """Weights from the files; padding and copies from the values in them, none of which are zero or alike at first."""
    settings = {"hidden_size": 10, "head_dim": 4, "num_attention_heads": heads, "num_key_value_heads": kv_heads}
    settings |= {"vocab_size": 13, "intermediate_size": 11, "num_hidden_layers": 2, "tie_word_embeddings": tied}
    folder = write_config(tmp_path, **settings, attention_bias=True, mlp_bias=True, torch_dtype="float32")
    config = llama_config(read_config(folder))
    tensors, first = {}, 1
    for name, shape in expected_shapes(config).items():
        count = torch.Size(shape).numel()
        tensors[name] = torch.arange(first, first + count, dtype=torch.float32).view(shape)
        first += count
    save_file(tensors, folder / "model.safetensors")
    convert(folder, tmp_path / "out", tp_degree=tp, vocab_parallel=vocab_parallel)
    shards = [load_file(shard_path(tmp_path / "out", rank)) for rank in range(tp)]
    numbers = [torch.cat([t.flatten() for t in shard.values() if t.is_floating_point()]) for shard in shards]
    everything = torch.cat(numbers)
    padded = (everything == 0) | (everything == torch.finfo(torch.float32).min)  # NxD's padding of gate and up biases
    padding = int(padded.sum())
    row = plan(config, NeuronConfig.from_pretrained(tmp_path / "out"), limit=64)
    assert {4 * len(rank) for rank in numbers} == {row["weight_bytes"]}
    assert row["padding_bytes"] == 4 * padding
    assert row["replicated_bytes"] == 4 * (len(everything) - padding - len(everything[~padded].unique()))


def test_strategies_have_the_names_of_nxd_unless_those_mislead(tmp_path, command):
    # Llama-3-8B has 8 KV heads: 1, 2 and 4 divide them, 8 to 64 are multiples of them, 6 is neither
    rows = json.loads(command("--hf", write_config(tmp_path, **SIZES["8B"]), "--tp", "1,2,4,6,8,16,24", "--json"))
    assert {row["tp_degree"]: row["strategy"] for row in rows} == {
        1: "EVEN_SPLIT",
        2: "EVEN_SPLIT",
        4: "EVEN_SPLIT",
        6: "CONVERT_TO_MHA",
        8: "REPLICATE_TO_TP_DEGREE",
        16: "REPLICATE_TO_TP_DEGREE",
        24: "REPLICATE_TO_TP_DEGREE",
    }
    for row in rows[:3]:
        # nothing but the norms is copied: (tp - 1) * (32 * 2 + 1) of 4096 numbers
        assert row["replicated_bytes"] == 2 * (row["tp_degree"] - 1) * 65 * 4096
        assert row["padding_bytes"] == row["zero_heads"] == 0
    # 32 query heads on 6 ranks: each rank has 6 of 36, with a KV head each; 4 query and 4 KV heads are zeros
    assert (rows[3]["query_heads"], rows[3]["kv_heads"], rows[3]["zero_heads"]) == (6, 6, 8)
    # SmolLM2-135M has 3 KV heads
    assert sharding_strategy(3, 2) == sharding_strategy(3, 4) == "CONVERT_TO_MHA"


def test_without_tp_all_degrees_are_planned_that_an_instance_has_collectives_for(tmp_path, command):
    rows = json.loads(command("--hf", write_config(tmp_path, **SIZES["70B"]), "--json"))
    assert [row["tp_degree"] for row in rows] == [1, 2, 4, 8, 16, 24, 32, 64]
    # 141 GB of weights: 70.6, 35.3, 17.6, 9.0, 6.2 (with copies of KV heads), 4.7 and 2.5 GB a rank
    families = ("trn1", "inf2", "trn2", "trn3")
    fitting = {name: [row["tp_degree"] for row in rows if row["fits"][name]] for name in families}
    # 36 GB of trn3 hold 35.3 GB of weights and 0.17 GB of cache
    assert fitting == {"trn1": [16, 32], "inf2": [24], "trn2": [8, 16, 32, 64], "trn3": [4, 8, 16, 32, 64]}
    missing = {name: [row["tp_degree"] for row in rows if row["fits"][name] is None] for name in fitting}
    assert missing == {"trn1": [4, 24, 64], "inf2": [16, 32, 64], "trn2": [24], "trn3": [24]}


def test_a_plan_says_what_length_and_batch_cost_and_how_far_they_go(tmp_path, command):
    folder = write_config(tmp_path, **SIZES["70B"])
    arguments = ("--hf", folder, "--tp", 8, "--sequence-length", 8192, "--json")
    # a token of one row: K and V of 80 layers, 1 head of 128, 2 bytes each
    token = 2 * 80 * 128 * 2  # 40,960
    # 24 GB of trn2 less 17,640,734,720 bytes of weights leave 6,359,265,280, and 36 GB of trn3 leave 18,359,265,280;
    # the weights alone exceed trn1 and inf2
    (row,) = json.loads(command(*arguments))
    assert row["kv_cache_bytes_per_1000_tokens"] == 1000 * token
    assert row["kv_cache_bytes_per_row"] == 8192 * token  # 335,544,320
    assert row["largest_batch"] == {"trn1": 0, "inf2": 0, "trn2": 18, "trn3": 54}  # 18.95 and 54.7
    # memory for 155,255 tokens and more, the model ends before
    assert row["longest_sequence"] == {"trn1": 0, "inf2": 0, "trn2": 131_072, "trn3": 131_072}
    (row,) = json.loads(command(*arguments, "--batch-size", 16))
    assert row["kv_cache_bytes"] == 16 * 8192 * token
    assert row["kv_cache_bytes_per_1000_tokens"] == 16_000 * token
    assert row["kv_cache_bytes_per_row"] == 8192 * token
    assert row["largest_batch"]["trn2"] == 18
    assert row["longest_sequence"]["trn2"] == 9_703  # 155,255 / 16
    assert row["fits"]["trn2"]
    # at these limits it still fits, one step further it does not
    for flag, last in (("--sequence-length", 9_703), ("--batch-size", 18)):
        for value, fits in ((last, True), (last + 1, False)):
            (row,) = json.loads(command(*arguments, "--batch-size", 16, flag, value))
            assert row["fits"]["trn2"] == fits


def test_a_longer_text_than_the_frequencies_hold_for_is_neither_planned_nor_accepted(tmp_path, command, capsys):
    rope = {"rope_type": "dynamic", "factor": 2.0}
    folder = write_config(tmp_path, **SIZES["8B"], rope_scaling=rope, max_position_embeddings=1024)
    (row,) = json.loads(command("--hf", folder, "--tp", 8, "--json"))
    assert row["kv_cache_bytes"] == row["kv_cache_bytes_per_row"] == 1024 * 2 * 32 * 128 * 2
    assert row["longest_sequence"]["trn2"] == 1024
    with pytest.raises(SystemExit) as stop:
        command("--hf", folder, "--sequence-length", 1025)
    assert stop.value.code == 2
    assert "--sequence-length 1025" in capsys.readouterr().err


@pytest.mark.parametrize("dtype, size", [("float32", 4), ("float16", 2), (None, 2), ("float64", 2)])
def test_weights_and_cache_have_the_dtype_of_the_config_or_bfloat16(dtype, size, tmp_path, command):
    folder = write_config(tmp_path, **SIZES["8B"], torch_dtype=dtype)
    (row,) = json.loads(command("--hf", folder, "--tp", 1, "--json"))
    assert row["weight_bytes"] == size * PARAMETERS["8B"]
    assert row["kv_cache_bytes"] == 2048 * 2 * 32 * 8 * 128 * size
    assert command("--hf", folder, "--tp", 1).startswith(
        f"In {'bfloat16' if dtype in (None, 'float64') else dtype}, batch_size 1, sequence_length 2,048."
    )


def test_a_small_instance_takes_no_more_ranks_than_it_has_cores(tmp_path, command):
    rows = json.loads(command("--hf", write_config(tmp_path, **SIZES["8B"]), "--sequence-length", 8192, "--json"))
    fitting = {row["tp_degree"]: row["fits_sizes"] for row in rows}
    # 16.06 GB of weights are more than one core of trn1 and inf2 has, half of it is not: 2 cores, 4 and more
    small = ["trn1.2xlarge", "inf2.xlarge", "inf2.8xlarge"]
    assert [tp for tp in fitting if set(small) & set(fitting[tp])] == [2]
    assert set(small) <= set(fitting[2])
    assert {name: [tp for tp in fitting if name in fitting[tp]] for name in ("inf2.24xlarge", "trn2.3xlarge")} == {
        "inf2.24xlarge": [2, 4, 8],  # 12 cores; AWS lists no degree between 8 and 24
        "trn2.3xlarge": [1, 2, 4],  # 24 GB a core hold all of it
    }
    assert [tp for tp in fitting if "trn3 Gen2 server" in fitting[tp]] == [1, 2, 4, 8, 16]  # 4 chips of 4 logical cores


def test_a_plan_as_text_fits_120_columns_and_answers_the_three_questions(tmp_path, command):
    folder = write_config(tmp_path, **SIZES["405B"])
    lines = command("--hf", folder, "--sequence-length", 8192, "--batch-size", 4).splitlines()
    assert max(map(len, lines)) <= 120
    assert len(lines) <= 45
    needs, costs = (index for index, line in enumerate(lines) if line.split()[:1] == ["tp"])
    for table in (lines[needs : needs + 9], lines[costs : costs + 9]):
        assert [line.split()[0] for line in table[1:]] == ["1", "2", "4", "8", "16", "24", "32", "64"]
        assert len({len(line) for line in table}) == 1
    # what it takes: the figures of 405B at tp 64 above, and 4 * 2 * 2 * 126 * 8192 * 128 bytes of cache
    figures = "13.616 GB 2.114 GB 59.712 GB 0.000 GB"
    assert " ".join(lines[needs + 8].split()) == f"64 REPLICATE_TO_TP_DEGREE 2 1 0 {figures}"
    # which degrees: 25.6 GB a rank at tp 32 are too much for trn2, not for trn3, whose smaller server has 16 cores
    instances = [" ".join(line.split()) for line in lines[needs + 9 : costs]]
    assert "trn1.2xlarge 2 16 32 documented none" in instances
    assert "trn2.3xlarge 4 24 ? worked out none" in instances
    assert "trn2.48xlarge 64 24 2,048 documented 64" in instances
    assert "trn3 Gen2 server 16 36 768 worked out none" in instances
    assert "trn3 Gen1 server 64 36 2,048 worked out 32, 64" in instances
    # what more costs: a token takes 126 * 2 * 128 * 2 = 64,512 bytes in each of 4 rows, a row 8192 times as many;
    # 24,000,000,000 - 13,615,923,200 bytes of room are 40,240 times the former and 19 times the latter, and
    # 36,000,000,000 - 13,615,923,200 bytes 86,743 and 42 times
    assert " ".join(lines[costs + 8].split()) == "64 258.0 MB 528.5 MB - - 40,240 86,743 - - 19 42"
    assert "Activations, compiled graphs and the runtime need memory too" in lines[-1]


@pytest.mark.parametrize(
    "arguments, named",
    [
        (["--tp", "8,0"], "--tp"),
        (["--tp", "all"], "--tp"),
        (["--batch-size", "0"], "--batch-size"),
        (["--sequence-length", "8k"], "--sequence-length"),
        (["--hf", "nowhere"], "nowhere"),
    ],
)
def test_a_mistake_ends_in_one_line_and_code_2(arguments, named, tmp_path, command, capsys):
    folder = write_config(tmp_path, **SIZES["8B"])
    with pytest.raises(SystemExit) as stop:
        command("--hf", folder, *arguments)
    assert stop.value.code == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert named in error


def test_a_config_that_is_no_llama_ends_in_one_line_and_code_2(tmp_path, command, capsys):
    folder = write_config(tmp_path, **SIZES["8B"] | {"hidden_size": "4096"})
    with pytest.raises(SystemExit) as stop:
        command("--hf", folder)
    assert stop.value.code == 2
    assert "hidden_size" in capsys.readouterr().err

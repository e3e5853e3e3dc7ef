"""Checkpoints as they are found: old names, two spellings of one thing, left-overs, damage.

Each is converted by the command and gives the numbers and the token ids of HF's own classes on the same directory, or
one line that says why not. Some spellings can be read by one version of transformers only; under the other, HF reads
the same model from a `twin`, spelled in a way that it knows.
"""

import json
import os
import re
import shutil
import socket
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import NamedTuple

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from torch import Tensor
from transformers import AutoTokenizer, LlamaForCausalLM
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

import checkpoint.files
import checkpoint.tensors
import convert_weights
import llama_neuron
from launch.command import run_command
from tests.helpers import command, hf_model

TRANSFORMERS_5 = int(transformers.__version__.split(".")[0]) >= 5

CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": 320,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "rms_norm_eps": 1e-6,
    "hidden_act": "silu",
    "tie_word_embeddings": False,
    "bos_token_id": 1,
    "eos_token_id": 318,
}
IDS = [3, 109, 27, 217, 51, 25, 311, 33, 135, 41, 59, 249]
NEW_TOKENS = 12


# ---- checkpoints, the command, the oracle


@pytest.fixture(scope="module")
def tensors() -> dict[str, Tensor]:
    """The weights of a random Llama of `CONFIG`, float32, under HF's names."""
    torch.manual_seed(0)
    config = transformers.LlamaConfig(**CONFIG, initializer_range=0.3)  # with HF's 0.02 it repeats one token for ever
    return LlamaForCausalLM(config).state_dict()


@pytest.fixture
def write(tmp_path: Path, tensors: dict[str, Tensor], monkeypatch: pytest.MonkeyPatch) -> Callable[..., Path]:
    """Writes a checkpoint into the working directory: `CONFIG` with changes, and the random weights or others."""
    monkeypatch.chdir(tmp_path)

    def write_checkpoint(name: str = "hf", weights: dict[str, Tensor] | None = None, **changes: object) -> Path:
        folder = Path(name)
        folder.mkdir()
        write_json(folder / "config.json", CONFIG | changes)
        save_file(weights or tensors, folder / "model.safetensors", metadata={"format": "pt"})
        return folder

    return write_checkpoint


def write_json(file: Path, content: object) -> None:
    file.write_text(json.dumps(content))


class Ran(NamedTuple):
    """What a command left behind: exit code, standard output, standard error."""

    code: int
    out: str
    err: str


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> Callable[..., Ran]:
    """Runs a command in this process, which has imported torch and transformers already."""
    mains = {
        convert_weights: convert_weights.main,
        llama_neuron: lambda: llama_neuron.start(llama_neuron.parse_args(), llama_neuron.run),
    }

    def run_in_this_process(script: ModuleType, *arguments: object) -> Ran:
        monkeypatch.setattr(sys, "argv", [Path(script.__file__).name, *map(str, arguments)])
        capsys.readouterr()  # what transformers may have said before
        code = 0
        try:
            run_command(mains[script])
        except SystemExit as stop:
            code = stop.code
        return Ran(code, *capsys.readouterr())

    return run_in_this_process


@pytest.fixture
def convert(run: Callable[..., Ran]) -> Callable[..., Ran]:
    """`convert_weights.py --hf hf --out out --tp 1` with more flags, which must go well."""

    def convert_hf(*flags: object) -> Ran:
        ran = run(convert_weights, "--hf", "hf", "--out", "out", "--tp", 1, *flags)
        assert ran.code == 0, ran.err
        return ran

    return convert_hf


@pytest.fixture
def refuse(run: Callable[..., Ran]) -> Callable[..., str]:
    """The same, refused: exit code 2, one line on stderr that holds `says` and is returned, and nothing written."""

    def refuse_hf(*says: str, flags: tuple = ()) -> str:
        ran = run(convert_weights, "--hf", "hf", "--out", "out", "--tp", 1, *flags)
        assert (ran.code, ran.out) == (2, "")
        note, _, line = ran.err.rpartition("convert_weights.py: error: ")
        assert line.count("\n") == 1 and (note == "" or "no tokenizer" in note), ran.err
        for text in says:
            assert text in ran.err
        assert not Path("out").exists()
        return line

    return refuse_hf


@pytest.fixture
def answer(run: Callable[..., Ran]) -> Callable[..., dict]:
    """The completion that `llama_neuron.py --ckpt out --json` prints for one prompt."""

    def answer_prompt(*flags: object) -> dict:
        ran = run(llama_neuron, "--ckpt", "out", "--device", "cpu", "--json", *flags)
        assert ran.code == 0, ran.err
        return json.loads(ran.out)["completions"][0]

    return answer_prompt


@torch.no_grad()
def model_logits(model: LlamaForCausalLM) -> Tensor:
    return model(torch.tensor([IDS])).logits


def hf_logits(folder: Path) -> Tensor:
    return model_logits(hf_model(folder, torch.float32))


@torch.no_grad()
def our_logits() -> Tensor:
    positions = torch.arange(len(IDS), dtype=torch.int32)
    return llama_neuron.load_model("out")(torch.tensor([IDS], dtype=torch.int32), positions[None])


def hf_generate(folder: Path) -> list[int]:
    """What HF's `generate` adds to IDS as the checkpoint's own files tell it to."""
    model = hf_model(folder, torch.float32)
    new = model.generate(torch.tensor([IDS]), do_sample=False, max_new_tokens=NEW_TOKENS, pad_token_id=0)
    return new[0, len(IDS) :].tolist()


def comma(ids: list[int]) -> str:
    return ",".join(map(str, ids))


def assert_close(ours: Tensor, theirs: Tensor) -> None:
    assert (ours - theirs).abs().max() <= 2e-5 * theirs.abs().max()


def rotation(config: transformers.LlamaConfig, length: int) -> tuple[Tensor, Tensor]:
    """cos and sin that HF computes for a text of `length` tokens, [1, length, head_dim] each."""
    return LlamaRotaryEmbedding(config)(torch.zeros(1), torch.arange(length)[None])


# ---- config.json: rope

LLAMA3 = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 32}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16}
LONG = {"short_factor": [1.0, 1.1, 1.2, 1.3], "long_factor": [2.0, 2.2, 2.4, 2.6], "factor": 4.0}
LONGROPE = {"rope_type": "longrope", **LONG, "original_max_position_embeddings": 16}


def old(theta: float = 10000.0, **rope_scaling: object) -> dict:
    """transformers 4's form."""
    return {"rope_theta": theta, "rope_scaling": rope_scaling}


def new(theta: float = 10000.0, **rope_parameters: object) -> dict:
    """transformers 5's form, which transformers 4 takes no notice of."""
    return {"rope_parameters": {"rope_theta": theta, **rope_parameters}}


def rope(name: str, source: dict, twin: dict | None = None) -> object:
    """A case; `twin` is how transformers 4 is told the same where it cannot read `source`."""
    return pytest.param(source, source if twin is None or TRANSFORMERS_5 else twin, id=name)


ROPES = [
    rope("default", {}),
    rope("default of theta 500", {"rope_theta": 500.0}),
    rope("theta as an integer", {"rope_theta": 500}),
    rope("default of 5", new(500.0, rope_type="default"), {"rope_theta": 500.0}),
    rope("linear", old(500.0, type="linear", factor=2.0)),
    rope("linear of 5", new(500.0, rope_type="linear", factor=2.0), old(500.0, rope_type="linear", factor=2.0)),
    rope("llama3", old(500.0, rope_type="llama3", **LLAMA3)),
    rope("llama3 of 5", new(500.0, rope_type="llama3", **LLAMA3), old(500.0, rope_type="llama3", **LLAMA3)),
    rope("yarn", old(500.0, **YARN)),
    rope("yarn of 5", new(500.0, **YARN), old(500.0, **YARN)),
    rope("yarn without the original length", old(500.0, type="yarn", factor=4.0)),
    rope("yarn with mscale", old(500.0, **YARN, mscale=0.7, mscale_all_dim=0.9, beta_fast=8, beta_slow=2)),
    rope("yarn with an attention_factor", old(500.0, **YARN, attention_factor=0.5)),
    rope("yarn with nulls", old(500.0, **YARN, attention_factor=None, mscale=None, beta_fast=None)),
    rope("yarn with factor null", old(500.0, **YARN | {"factor": None}), old(500.0, **YARN)),
    rope("longrope", old(500.0, type="longrope", **LONG) | {"original_max_position_embeddings": 16}),
    rope(
        "longrope with the original length inside",
        old(500.0, **LONGROPE),
        old(500.0, type="longrope", **LONG) | {"original_max_position_embeddings": 16},
    ),
    rope(
        "longrope with a factor that is not the ratio of the lengths",
        old(500.0, **LONGROPE | {"factor": 16.0}),
        # 2**0.5: sqrt(1 + ln(factor) / ln(original length))
        old(500.0, **LONGROPE, attention_factor=2**0.5) | {"original_max_position_embeddings": 16},
    ),
    rope("dynamic", old(500.0, type="dynamic", factor=2.0)),
    rope("dynamic of 5", new(500.0, rope_type="dynamic", factor=2.0), old(500.0, type="dynamic", factor=2.0)),
    rope(
        "rope_scaling beside another rope_parameters", old(type="linear", factor=2.0) | new(500.0, rope_type="default")
    ),
    rope(
        "rope_scaling beside rope_parameters of another factor",
        {"rope_scaling": {"type": "linear", "factor": 2.0}} | new(500.0, rope_type="linear", factor=4.0),
    ),
    rope("rope_scaling null beside rope_parameters", {"rope_scaling": None} | new(500.0), {"rope_theta": 500.0}),
    rope("type and rope_type, linear", old(500.0, type="linear", rope_type="linear", factor=2.0)),
    rope("type and rope_type, llama3", old(500.0, type="llama3", rope_type="llama3", **LLAMA3)),
    rope("type and rope_type, yarn", old(500.0, type="yarn", **YARN)),
    rope("a note in words", old(500.0, type="linear", factor=2.0, note="as in the paper")),
    rope("a note in words, llama3", old(500.0, rope_type="llama3", **LLAMA3, note="as in the paper")),
    rope("whole numbers", old(500.0, rope_type="llama3", **LLAMA3 | {"factor": 8, "low_freq_factor": 1})),
]


@pytest.mark.parametrize("source, twin", ROPES)
def test_rope_is_computed_as_hf_reads_it(write, convert, source, twin):
    write(**source)
    convert("--dtype", "float32", "--sequence-length", 16)
    assert_close(our_logits(), hf_logits(write("twin", **twin)))


def without(config: dict, *keys: str) -> transformers.LlamaConfig:
    return transformers.LlamaConfig(**{key: value for key, value in config.items() if key not in keys})


@pytest.mark.parametrize("source, twin", ROPES)
def test_hf_reads_the_source_s_model_from_the_completed_config(write, convert, source, twin):
    hf = write(**source)
    convert("--dtype", "float32", "--sequence-length", 16)
    expected = transformers.LlamaConfig.from_pretrained(write("twin", **twin))
    completed = json.loads(Path("out/config.json").read_text())
    assert None not in completed.get("rope_scaling", {}).values()
    readings = [transformers.LlamaConfig.from_pretrained("out"), without(completed, "rope_parameters")]
    if TRANSFORMERS_5:  # its own form by itself
        readings.append(without(completed, "rope_theta", "rope_scaling", "original_max_position_embeddings"))
    for config in readings:
        for length in (12, 16, 17, 64, 80):  # up to and beyond the lengths at which longrope and dynamic change
            for ours, theirs in zip(rotation(config, length), rotation(expected, length), strict=True):
                assert torch.equal(ours, theirs)
    shutil.copy("out/config.json", hf / "config.json")
    assert torch.equal(hf_logits(hf), hf_logits(Path("twin")))


def test_the_completed_config_tells_transformers_4_what_it_infers_otherwise_for_longrope(write, convert):
    write(**old(500.0, **LONGROPE | {"factor": 16.0}))
    convert("--sequence-length", 16)
    completed = json.loads(Path("out/config.json").read_text())
    # 4 looks for the length here only, and would take max_position_embeddings / length for the factor
    assert completed["original_max_position_embeddings"] == 16
    # sqrt(1 + ln(factor) / ln(original length))
    assert completed["rope_scaling"]["attention_factor"] == pytest.approx(2**0.5, rel=1e-15)


def test_the_completed_config_has_hf_s_defaults_and_no_null(tmp_path):
    sizes = ("model_type", "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
    given = {key: CONFIG[key] for key in sizes}
    write_json(tmp_path / "config.json", given | {"head_dim": None, "pad_token_id": None, "rope_scaling": None})
    completed = convert_weights.read_config(tmp_path)
    source = transformers.LlamaConfig.from_pretrained(tmp_path).to_dict()
    assert None not in completed.values()
    for key in (*sizes, *("num_key_value_heads", "head_dim", "hidden_act", "max_position_embeddings", "rms_norm_eps")):
        assert completed[key] == source[key], key
    for key in ("attention_bias", "mlp_bias", "tie_word_embeddings"):
        assert completed[key] is source[key] is False, key


@pytest.mark.parametrize("factor", [2.0, 3.0, 4.0, 5.0, 6.0, 8.0, 10.0, 20.0, 32.0])
def test_llama3_frequencies_have_the_bits_of_hf_s(tmp_path, factor):
    sizes = {"hidden_size": 16, "num_attention_heads": 1, "num_key_value_heads": 1, "head_dim": 128}
    for original in (2048, 4096, 8192, 16384, 32768):
        for low, high in ((1.0, 2.0), (1.0, 4.0), (1.0, 8.0), (1.5, 6.0), (2.0, 4.0)):
            scaling = {"factor": factor, "low_freq_factor": low, "high_freq_factor": high}
            scaling |= {"rope_type": "llama3", "original_max_position_embeddings": original}
            write_json(
                tmp_path / "config.json", CONFIG | sizes | {"max_position_embeddings": 131072} | old(5e5, **scaling)
            )
            theirs = LlamaRotaryEmbedding(transformers.LlamaConfig.from_pretrained(tmp_path))
            config = convert_weights.llama_config(convert_weights.read_config(tmp_path))
            neuron = llama_neuron.NeuronConfig(sequence_length=1)
            ours = llama_neuron.LlamaForCausalLM(config, neuron, llama_neuron.REFERENCE).model.rotary_emb
            assert torch.equal(ours.inv_freq, theirs.inv_freq), (original, low, high)


def test_yarn_needs_no_hidden_size_that_heads_divide(write, convert):
    rope = {"head_dim": 8, **old(500.0, **YARN)}
    config = transformers.LlamaConfig(**CONFIG, **rope, initializer_range=0.3, attn_implementation="eager")
    config.hidden_size = 30  # transformers 5 takes it when the config is there, but not from a file
    model = LlamaForCausalLM(config).eval()
    write(weights=model.state_dict(), hidden_size=30, **rope)
    convert("--dtype", "float32")
    assert_close(our_logits(), model_logits(model))


@pytest.mark.parametrize(
    "changes, says",
    [
        pytest.param({"head_dim": 7}, ["head_dim", "7"], id="an odd head_dim"),
        pytest.param({"hidden_size": 28}, ["head_dim", "7"], id="an odd head_dim by division"),
        pytest.param(old(**LONGROPE | {"short_factor": [1.0] * 3}), ["short_factor"], id="short_factor of 3"),
        pytest.param(old(**LONGROPE | {"short_factor": [1.0]}), ["short_factor"], id="short_factor of 1"),
        pytest.param(old(**LONGROPE | {"long_factor": [1.0] * 5}), ["long_factor"], id="long_factor of 5"),
        pytest.param(old(**LONGROPE | {"long_factor": ["1"] * 4}), ["long_factor"], id="long_factor in quotes"),
        pytest.param(old(**LONGROPE | {"long_factor": 2.0}), ["long_factor"], id="long_factor that is no list"),
        pytest.param(old(type="linear", factor=[4]), ["factor", "[4]"], id="a factor in a list"),
        pytest.param(old(type="linear", factor="4"), ["factor", "'4'"], id="a factor in quotes"),
        pytest.param(old(type="linear", factor=None), ["factor"], id="a factor that is null"),
        pytest.param(old(type="dynamic", factor=[4]), ["factor", "[4]"], id="a factor in a list, dynamic"),
        pytest.param(old(**YARN | {"factor": [4]}), ["factor", "[4]"], id="a factor in a list, yarn"),
        pytest.param(old(**YARN, beta_fast=[32]), ["beta_fast", "[32]"], id="beta_fast in a list"),
        pytest.param(old(**YARN, attention_factor="1"), ["attention_factor", "'1'"], id="attention_factor in quotes"),
        pytest.param(old(rope_type="llama3", **LLAMA3 | {"factor": [8]}), ["factor", "[8]"], id="a list, llama3"),
        pytest.param(
            old(type="linear", rope_type="default", factor=2.0), ["type 'linear'"], id="type against rope_type"
        ),
        pytest.param(old(theta=[1e4]), ["rope_theta"], id="theta in a list"),
        pytest.param({"is_causal": False}, ["is_causal"], id="attention in both directions"),
        pytest.param({"architectures": ["MistralForCausalLM"], "model_type": "mistral"}, ["mistral"], id="Mistral"),
    ],
)
def test_a_config_that_cannot_be_computed_is_refused_by_key(write, refuse, changes, says):
    write(**changes)
    refuse("hf/config.json", *says)


# ---- config.json: windows, names, dtype


@pytest.mark.parametrize("key", ["sliding_window", "attention_chunk_size"])
def test_a_window_is_refused_once_a_text_can_be_longer(write, convert, refuse, answer, key):
    hf = write(**{key: 24})
    refuse(key, "24", flags=("--sequence-length", 25))
    assert f"hf/config.json: {key} ends sequences after 24 tokens here, prompts included" in convert().err
    convert("--dtype", "float32", "--sequence-length", 24)
    ours = answer("--prompt-ids", comma(IDS), "--max-new-tokens", NEW_TOKENS, "--ignore-eos")
    assert ours["ids"] == hf_generate(hf)


@pytest.mark.parametrize(
    "changes",
    [
        {"architectures": ["LLaMAForCausalLM"]},
        {"architectures": ["LlamaModel"]},
        {"architectures": ["MyLlamaForCausalLM"]},
        {"architectures": ["LlamaForCausalLM", "LlamaForCausalLM"]},
        {"architectures": []},
        {"architectures": None},
        {"sliding_window": None},
        {"is_causal": True},
    ],
    ids=str,
)
def test_what_changes_nothing_for_hf_changes_nothing_here(write, convert, changes):
    hf = write(**changes)
    convert("--dtype", "float32")
    assert_close(our_logits(), hf_logits(hf))


@pytest.mark.parametrize(
    "changes",
    [
        {"model_type": None},
        {"dtype": "half"},
        {"torch_dtype": "float"},
        {"dtype": "double"},
        {"original_max_position_embeddings": "unread by this rope_type"},
        old(500.0, **YARN | {"original_max_position_embeddings": 16.0}),
        old(500.0, **YARN) | {"original_max_position_embeddings": 16.0},
        old(500.0, rope_type="llama3", **LLAMA3 | {"original_max_position_embeddings": 32.0}),
        old(500.0, **YARN, mscale=0.7, mscale_all_dim=0),
        old(500.0, **YARN, mscale=0, mscale_all_dim=0.9),
    ],
    ids=str,
)
def test_values_that_hf_takes_are_taken(write, convert, changes):
    hf = write(**changes)
    convert("--dtype", "float32", "--sequence-length", 16)
    assert_close(our_logits(), hf_logits(hf))


def test_a_vocab_size_that_is_absent_is_hf_s(write, convert, refuse, tensors):
    wide = {name: torch.randn(32000, 32) for name in ("model.embed_tokens.weight", "lm_head.weight")}
    hf = write(weights=tensors | wide)
    write_json(hf / "config.json", {key: value for key, value in CONFIG.items() if key != "vocab_size"})
    convert("--dtype", "float32")
    assert_close(our_logits(), hf_logits(hf))
    save_file(tensors, hf / "model.safetensors")
    shutil.rmtree("out")
    refuse("has shape [320, 32], hf/config.json asks for [32000, 32] (vocab_size 32000, hidden_size 32)")


TAKEN = {"silu", "swish", "gelu", "gelu_pytorch_tanh", "relu", "relu2", "gelu_new", "gelu_fast", "quick_gelu"}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", sorted(TAKEN))
def test_an_activation_has_the_bits_of_hf_s(name, dtype):
    x = torch.cat((torch.linspace(-12, 12, 4001), torch.tensor([torch.finfo(dtype).min]))).to(dtype)
    assert torch.equal(llama_neuron.ACT2FN[name](x), transformers.activations.ACT2FN[name](x))


@pytest.mark.parametrize("name", sorted(transformers.activations.ACT2CLS.keys() - TAKEN))
def test_every_other_activation_of_hf_is_refused_by_name(write, refuse, name):
    write(hidden_act=name)
    refuse(f"hf/config.json: hidden_act {name!r} is not supported")


FLOAT16, BFLOAT16, FLOAT32 = torch.float16, torch.bfloat16, torch.float32


@pytest.mark.parametrize(
    "keys, file",
    [
        ({}, BFLOAT16),
        ({}, FLOAT16),
        ({}, FLOAT32),
        ({"torch_dtype": None}, BFLOAT16),
        ({"torch_dtype": "float32"}, BFLOAT16),
        ({"dtype": "float16"}, FLOAT32),
        ({"dtype": "float16", "torch_dtype": "bfloat16"}, FLOAT32),
        ({"dtype": "bfloat16", "torch_dtype": "float32"}, FLOAT32),
    ],
    ids=str,
)
def test_shards_have_the_dtype_that_hf_takes(write, convert, tensors, keys, file):
    hf = write(weights={name: tensor.to(file) for name, tensor in tensors.items()}, **keys)
    convert()
    expected = LlamaForCausalLM.from_pretrained(hf, dtype="auto").dtype
    assert llama_neuron.NeuronConfig.from_pretrained("out").dtype == expected
    shard = load_file("out/tp0_sharded_checkpoint.safetensors")
    assert shard["model.norm.weight"].dtype == shard["model.layers.0.mlp.gate_proj.weight"].dtype == expected


OTHER_DTYPES = {"F8_E4M3": torch.float8_e4m3fn, "I8": torch.int8, "BOOL": torch.bool}


@pytest.mark.parametrize("dtype", OTHER_DTYPES)
@pytest.mark.parametrize("flags", [(), ("--dtype", "float32")], ids=str)
@pytest.mark.parametrize("said", [{}, {"dtype": "float32"}], ids=str)
def test_a_tensor_of_another_dtype_is_refused_by_name_whatever_is_asked_for(write, refuse, tensors, dtype, flags, said):
    name = "model.layers.1.mlp.up_proj.weight"
    write(weights=tensors | {name: tensors[name].to(OTHER_DTYPES[dtype])}, **said)
    refuse(f"hf: {name} is of dtype {dtype}", "bfloat16, float16, float32", flags=flags)


@pytest.mark.parametrize("names", ["all", "one", "a .bin"])
@pytest.mark.parametrize("said", [{}, {"dtype": "float64"}, {"dtype": "float32"}], ids=str)
def test_float64_is_converted_to_the_dtype_that_is_asked_for_as_by_hf(write, convert, tensors, names, said):
    wide = {name: tensor.double() for name, tensor in tensors.items() if names != "one" or name == "model.norm.weight"}
    wide["model.norm.weight"] *= 1 + 1e-12  # which float32 cannot tell from 1
    hf = write(weights=tensors | wide, **said)
    if names == "a .bin":
        save_bin(tensors | wide, zipped=True)
    convert("--dtype", "float32")
    assert_close(our_logits(), hf_logits(hf))


def test_float64_is_not_a_dtype_of_shards(write, refuse, tensors):
    write(weights={name: tensor.double() for name, tensor in tensors.items()})
    refuse("hf: its tensors are float64: give --dtype bfloat16, float16, float32")


def test_a_float64_beyond_float32_is_refused_by_name(write, refuse, tensors):
    name = "model.norm.weight"
    write(weights=tensors | {name: torch.full((32,), 1e300, dtype=torch.float64)})
    refuse(f"hf: {name} holds numbers beyond float32: scale them", flags=("--dtype", "float32"))


def test_so_is_a_tied_one_that_no_arithmetic_is_there_for(write, refuse, tensors):
    embedding = tensors["model.embed_tokens.weight"].view(torch.float8_e8m0fnu)
    both = {"lm_head.weight": embedding.clone(), "model.embed_tokens.weight": embedding}
    write(weights=tensors | both, tie_word_embeddings=True)
    refuse("is of dtype F8_E8M0")


def test_so_is_one_of_a_bin_file(write, refuse, tensors):
    write()
    save_bin(tensors | {"model.norm.weight": tensors["model.norm.weight"].long()}, zipped=True)
    refuse("hf: model.norm.weight is of dtype int64")


# ---- numbers that are not finite


@pytest.mark.parametrize("number", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("stored", [FLOAT32, FLOAT16, BFLOAT16], ids=str)
@pytest.mark.parametrize(
    "name, place", [("model.norm.weight", 31), ("model.layers.1.self_attn.k_proj.weight", (15, 31))]
)
def test_a_number_that_is_not_finite_is_refused_by_name_and_kept_if_allowed(
    write, refuse, convert, run, tensors, stored, name, place, number
):
    weights = {key: tensor.to(stored) for key, tensor in tensors.items()}
    weights[name] = weights[name].clone()
    weights[name][place] = number
    write(weights=weights)
    refuse(f"hf: {name} holds NaN or infinite numbers", "--allow-non-finite")
    notes = convert("--allow-non-finite").err.splitlines()
    assert f"convert_weights.py: hf: {name} holds NaN or infinite numbers, converted as it is" in notes
    shard = load_file("out/tp0_sharded_checkpoint.safetensors")
    assert sum(int((~tensor.isfinite()).sum()) for tensor in shard.values()) == 1


@pytest.mark.parametrize("narrow, number", [("float16", 65520.0), ("float16", -1e30), ("bfloat16", 3.4e38)])
def test_a_number_that_a_narrower_dtype_makes_infinite_is_refused_by_name(
    write, refuse, convert, tensors, narrow, number
):
    name = "model.layers.0.self_attn.o_proj.weight"
    weights = tensors | {name: tensors[name].clone()}
    weights[name][0, 31] = number
    write(weights=weights)
    says = f"hf: {name} holds numbers beyond {narrow}: --dtype float32 keeps them, --allow-non-finite"
    refuse(says, flags=("--dtype", narrow))
    convert("--dtype", "float32")
    assert load_file("out/tp0_sharded_checkpoint.safetensors")[name][0, 31] == number
    assert f"hf: {name} holds numbers beyond {narrow}" in convert("--dtype", narrow, "--allow-non-finite").err


def test_the_largest_numbers_of_a_dtype_and_the_padding_of_biases_are_finite(write, convert, run, tensors):
    """Padding is finfo.min of the shard's dtype, which a file's dtype may not reach."""
    weights = {name: tensor.half() for name, tensor in tensors.items()}
    weights["model.norm.weight"] = torch.full((32,), 65504.0, dtype=FLOAT16)
    for layer in range(2):
        for name, size in (("gate_proj", 48), ("up_proj", 48), ("down_proj", 32)):
            weights[f"model.layers.{layer}.mlp.{name}.bias"] = torch.full((size,), -65504.0, dtype=FLOAT16)
    write(weights=weights, mlp_bias=True)
    ran = run(convert_weights, "--hf", "hf", "--out", "out", "--tp", 5, "--dtype", "bfloat16")
    assert ran.code == 0, ran.err
    shard = load_file("out/tp4_sharded_checkpoint.safetensors")
    assert shard["model.layers.0.mlp.gate_proj.bias"][-1] == torch.finfo(BFLOAT16).min
    assert all(tensor.isfinite().all() for tensor in shard.values())


# ---- a config.json that was edited after the conversion


def edit(folder: str, **changes: object) -> None:
    file = Path(folder, "config.json")
    write_json(file, json.loads(file.read_text()) | changes)


LINEAR = {"rope_type": "linear", "factor": 2.0}
THETA = {"rope_theta": 500.0}


@pytest.mark.parametrize(
    ("ours", "theirs"),
    [
        ({"rms_norm_eps": 0.1}, {"rms_norm_eps": 0.1}),
        ({"hidden_act": "relu"}, {"hidden_act": "relu"}),
        ({"rope_parameters": THETA | {"rope_type": "default"}} | THETA, THETA),
        ({"rope_parameters": LINEAR | {"rope_theta": 10000.0}, "rope_scaling": LINEAR}, {"rope_scaling": LINEAR}),
    ],
    ids=["rms_norm_eps", "hidden_act", "theta", "rope_type"],
)
def test_an_edited_config_is_said_and_gives_the_logits_of_hf_with_the_same_edit(write, convert, run, ours, theirs):
    hf = write()
    convert("--dtype", "float32")
    before = our_logits()
    edit("out", **ours)
    ran = run(llama_neuron, "--ckpt", "out", "--device", "cpu", "--prompt-ids", comma(IDS), "--max-new-tokens", 1)
    assert ran.code == 0
    assert ran.err.splitlines()[0] == "llama_neuron.py: edited after the conversion, and used: config.json"
    edit("hf", **theirs)
    assert_close(our_logits(), hf_logits(hf))
    assert (our_logits() - before).abs().max() > 1e-2 * before.abs().max()


@pytest.mark.parametrize("changes", [THETA, {"rope_scaling": LINEAR}, {"rope_parameters": LINEAR | THETA}], ids=str)
def test_an_edit_of_one_of_the_rope_keys_alone_is_refused(write, convert, run, changes):
    write()
    convert("--dtype", "float32")
    edit("out", **changes)
    ran = run(llama_neuron, "--ckpt", "out", "--device", "cpu", "--prompt-ids", "7", "--max-new-tokens", 1)
    assert (ran.code, ran.out, ran.err.count("\n")) == (2, "", 1)
    assert "out/config.json: rope_parameters, rope_scaling and rope_theta contradict each other: edit all" in ran.err


@pytest.mark.parametrize("source", [old(500.0, **YARN), old(500.0, **LONGROPE), old(500.0, type="dynamic", factor=2.0)])
def test_stored_frequencies_are_compared_with_an_edited_config(write, convert, run, source):
    write(**source)
    convert("--dtype", "float32", "--sequence-length", 16)
    edit("out", rms_norm_eps=0.1)
    flags = ("--ckpt", "out", "--device", "cpu", "--prompt-ids", "7", "--max-new-tokens", 1)
    assert run(llama_neuron, *flags).code == 0  # and so a completed config gives the same frequencies again
    rope = json.loads(Path("out/config.json").read_text())["rope_parameters"] | {"rope_theta": 1000.0}
    edit("out", rope_parameters=rope)
    ran = run(llama_neuron, *flags)
    assert ran.code == 2 and "rope_parameters, rope_scaling and rope_theta contradict each other" in ran.err
    edit("out", rope_theta=1000.0)
    ran = run(llama_neuron, *flags)
    assert ran.code == 2 and "rotary frequencies are not those of config.json's rope_parameters" in ran.err


# ---- tensors


def save_bin(weights: dict, zipped: bool) -> None:
    """Puts pytorch_model.bin in place of model.safetensors, as torch writes it, or wrote it before 1.6."""
    Path("hf/model.safetensors").unlink()
    torch.save(weights, "hf/pytorch_model.bin", _use_new_zipfile_serialization=zipped)


@pytest.mark.parametrize("zipped", [False, True], ids=["before torch 1.6", "since torch 1.6"])
def test_a_bin_file_is_read(write, convert, tensors, zipped):
    hf = write()
    save_bin(tensors, zipped)
    convert("--dtype", "float32")
    assert_close(our_logits(), hf_logits(hf))


def test_a_bin_file_of_parameters_with_a_counter_beside_them_is_read(write, convert, tensors):
    hf = write()
    parameters = {name: torch.nn.Parameter(tensor) for name, tensor in tensors.items()}
    save_bin(parameters | {"global_step": 1000}, zipped=True)
    convert("--dtype", "float32")
    assert_close(our_logits(), hf_logits(hf))


@pytest.mark.parametrize("kept", ["lm_head.weight", "model.embed_tokens.weight"])
def test_of_tied_weights_either_name_is_enough(write, convert, tensors, kept):
    both = {"lm_head.weight", "model.embed_tokens.weight"}
    weights = {name: tensor for name, tensor in tensors.items() if name == kept or name not in both}
    hf = write(weights=weights, tie_word_embeddings=True)
    convert("--dtype", "float32")
    if not TRANSFORMERS_5:  # transformers 4 finds the tied tensor under the embedding's name only
        weights["model.embed_tokens.weight"] = weights.pop(kept)
        hf = write("twin", weights, tie_word_embeddings=True)
    assert_close(our_logits(), hf_logits(hf))


@pytest.mark.parametrize("tied", [False, True])
def test_names_without_model_are_understood(write, convert, tensors, tied):
    weights = {name.removeprefix("model."): tensor for name, tensor in tensors.items()}
    if tied:
        del weights["lm_head.weight"]
    hf = write(weights=weights, tie_word_embeddings=tied, architectures=["LlamaModel"])
    convert("--dtype", "float32")
    if not TRANSFORMERS_5 and not tied:  # transformers 4 calls these names beside lm_head.weight corrupted
        hf = write("twin")
    assert_close(our_logits(), hf_logits(hf))


def in_layers(name: str, *wrappers: str) -> str:
    """A name with wrappers around each layer."""
    return re.sub(r"(layers\.\d+)", r"\1." + ".".join(wrappers), name) if wrappers else name


@pytest.mark.parametrize(
    ("before", "inside"),
    [
        (["_orig_mod"], []),
        (["module"], []),
        (["module", "_orig_mod"], []),
        (["_orig_mod", "module", "module"], []),
        (["_forward_module"], []),
        (["_fsdp_wrapped_module"], ["_fsdp_wrapped_module", "_checkpoint_wrapped_module"]),
        ([], ["_orig_mod"]),
    ],
    ids=str,
)
def test_what_a_wrapper_puts_into_names_is_taken_off_and_said(write, convert, tensors, before, inside):
    hf = write("twin")
    write(weights={".".join([*before, in_layers(name, *inside)]): tensor for name, tensor in tensors.items()})
    err = convert("--dtype", "float32").err
    assert_close(our_logits(), hf_logits(hf))
    for wrapper in {*before, *inside}:
        assert f"hf: {wrapper!r}, of " in err


@pytest.mark.skipif(not TRANSFORMERS_5, reason="transformers 4 takes random weights instead")
@pytest.mark.parametrize("name", ["model.", "lm_head."])
def test_one_model_too_many_is_understood_as_by_hf(write, convert, tensors, name):
    hf = write(weights={f"model.{key}" if key.startswith(name) else key: tensors[key] for key in tensors})
    convert("--dtype", "float32")
    assert_close(our_logits(), hf_logits(hf))


@pytest.mark.parametrize("name", ["v_head.summary.weight", "medusa_head.0.0.linear.weight"])
def test_heads_that_no_logit_depends_on_are_named_and_left_out(write, convert, tensors, name):
    hf = write(weights=tensors | {name: torch.ones(1, 32)})
    assert f"no effect: [{name!r}]" in convert("--dtype", "float32").err
    assert_close(our_logits(), hf_logits(hf))


def renamed(*changes: tuple[str, str], drop: str = "(?!)", **more: Tensor) -> Callable:
    """Makes other weights out of `tensors`: names changed by regular expressions, some left out, some added."""

    def make(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        weights = {}
        for name, tensor in tensors.items():
            for pattern, replacement in changes:
                name = re.sub(pattern, replacement, name)
            if not re.search(drop, name):
                weights[name] = tensor
        return weights | {name.replace("__", "."): tensor.clone() for name, tensor in more.items()}

    return make


def quantized(dtype: torch.dtype | None, *suffixes: str) -> Callable:
    """Projections in another dtype (None: left out), and other tensors beside them."""

    def make(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        weights = {}
        for name, tensor in tensors.items():
            if "_proj" not in name:
                weights[name] = tensor
                continue
            if dtype is not None:
                weights[name] = torch.ones(tensor.shape, dtype=dtype)
            weights |= {name.removesuffix(".weight") + suffix: torch.ones(2) for suffix in suffixes}
        return weights

    return make


PEFT, QUANTIZED = "merge_and_unload", "the model is quantized, though config.json has no quantization_config"
NO_TEXT = "makes no text"
NO_HEAD = r"^lm_head"
ONE = torch.ones(1, 32)
REMEDIES = [
    ("a prefix", renamed(("^", "net.")), {}, ["'net.model.embed_tokens.weight'", "names begin with 'net.'"]),
    ("a prefix of a LlamaModel", renamed(("^model", "encoder")), {}, ["names begin with 'encoder.'"]),
    ("PEFT", renamed(("^", "base_model.model.")), {}, [PEFT, "'base_model.model.lm_head.weight'"]),
    ("PEFT's base_layer", renamed(("q_proj", "q_proj.base_layer")), {}, [PEFT, "q_proj.base_layer.weight'"]),
    ("LoRA beside weights", renamed(model__layers__0__lora_A__weight=ONE), {}, [PEFT]),
    ("GPTQ", quantized(None, ".qweight", ".qzeros", ".scales", ".g_idx"), {}, [QUANTIZED, ".g_idx'"]),
    ("AWQ", quantized(None, ".qweight", ".qzeros", ".scales"), {}, [QUANTIZED, ".qweight'"]),
    ("bitsandbytes, 8 bits", quantized(torch.int8, ".SCB"), {}, [QUANTIZED, ".SCB'"]),
    ("bitsandbytes, 4 bits", quantized(torch.uint8, ".weight.absmax"), {}, [QUANTIZED, ".weight.absmax'"]),
    ("fp8", quantized(torch.float8_e4m3fn, ".weight_scale"), {}, [QUANTIZED, ".weight_scale'"]),
    ("fp8 by blocks", quantized(torch.float8_e4m3fn, ".weight_scale_inv"), {}, [QUANTIZED]),
    ("compressed-tensors", quantized(None, ".weight_packed", ".weight_scale", ".weight_shape"), {}, [QUANTIZED]),
    ("HQQ", quantized(None, ".W_q", ".meta"), {}, [QUANTIZED]),
    ("quanto", quantized(None, ".weight._data", ".weight._scale"), {}, [QUANTIZED]),
    ("a lost tie", renamed(drop=NO_HEAD), {}, ["set tie_word_embeddings to true in config.json, where it is false"]),
    ("LlamaModel", renamed(drop=NO_HEAD), {"architectures": ["LlamaModel"]}, [NO_TEXT, "['LlamaModel']", "tie_word_"]),
    ("a reward model", renamed(drop=NO_HEAD, score__weight=ONE), {}, [NO_TEXT, "'score.weight'"]),
    ("TRL's", renamed(drop=NO_HEAD, v_head__summary__bias=ONE), {}, [NO_TEXT, "'v_head.summary.bias'"]),
    ("ColBERT", renamed(("^model.", ""), drop=NO_HEAD, linear__weight=ONE), {}, [NO_TEXT, "'linear.weight'"]),
    ("fewer layers", renamed(), {"num_hidden_layers": 1}, ["set num_hidden_layers to 2 in config.json, where it is 1"]),
    ("more layers", renamed(), {"num_hidden_layers": 9}, ["set num_hidden_layers to 2 in config.json, where it is 9"]),
    ("biases that are not there", renamed(), {"attention_bias": True}, ["set attention_bias to false in config.json"]),
    ("no MLP biases", renamed(), {"mlp_bias": True}, ["set mlp_bias to false in config.json, where it is true"]),
    ("Qwen's biases", None, {}, ["set attention_bias to true in config.json, where it is false", "q_proj.bias'"]),
    ("Qwen's norms", renamed(model__layers__0__self_attn__q_norm__weight=ONE), {}, ["as a LlamaForCausalLM"]),
    ("a vision model", renamed(("^", "language_model."), vision_tower__x=ONE), {}, ["multimodal"]),
    ("Mixtral", renamed(("mlp.gate_proj", "block_sparse_moe.experts.0.w1")), {}, ["mixture of experts"]),
    ("fused projections", renamed(("q_proj", "qkv_proj"), drop=r"\.[kv]_proj"), {}, ["projections are fused"]),
    ("Meta's names", renamed(("model.embed_tokens", "tok_embeddings")), {}, ["these are Meta's names"]),
    ("llama.cpp's names", renamed(("model.embed_tokens", "token_embd")), {}, ["these are llama.cpp's names"]),
]


@pytest.mark.parametrize(("change", "config", "says"), [pytest.param(*case, id=name) for name, *case in REMEDIES])
def test_names_that_do_not_fit_are_shown_with_what_helps(write, refuse, tensors, change, config, says):
    """A new download would bring the same names."""
    if change is None:
        change = renamed(**{f"model__layers__{n}__self_attn__{x}_proj__bias": ONE for n in (0, 1) for x in "qkv"})
    write(weights=change(tensors), **config)
    assert "download" not in refuse("hf: ", *says)


@pytest.mark.parametrize("drop", [r"^model.norm", r"layers.0"])
def test_where_names_are_missing_and_nothing_else_is_wrong_a_new_download_may_help(write, refuse, tensors, drop):
    write(weights=renamed(drop=drop)(tensors))
    refuse("hf: missing tensors: ", "; download it again")


@pytest.mark.parametrize(
    ("key", "value"), [("vocab_size", 300), ("intermediate_size", 40), ("num_key_value_heads", 4), ("hidden_size", 64)]
)
def test_a_shape_that_does_not_fit_is_shown_with_the_keys_that_ask_for_it(write, refuse, key, value):
    write(**{key: value})
    refuse(", hf/config.json asks for ", f"{key} {value}")


# ---- files that are there instead of a checkpoint


def test_the_weights_that_config_json_names_are_read_as_by_hf(write, convert, tensors):
    """And not model.safetensors, which lies beside them."""
    doubled = {name: 2 * tensor for name, tensor in tensors.items()}
    hf = write(transformers_weights="other.safetensors")
    save_file(doubled, hf / "other.safetensors", metadata={"format": "pt"})
    convert("--dtype", "float32")
    assert_close(our_logits(), hf_logits(hf))
    assert_close(our_logits(), hf_logits(write("twin", weights=doubled)))
    edit("hf", transformers_weights="other.safetensors.index.json")
    weight_map = dict.fromkeys(doubled, "other.safetensors")
    write_json(hf / "other.safetensors.index.json", {"metadata": {}, "weight_map": weight_map})
    convert("--dtype", "float32")
    assert_close(our_logits(), hf_logits(hf))


@pytest.mark.parametrize("named", ["../x.safetensors", "/x.safetensors", "x.bin", "", 7, ["x.safetensors"]], ids=str)
def test_weights_that_config_json_may_not_name_are_refused(write, refuse, named):
    write(transformers_weights=named)
    refuse("hf/config.json: transformers_weights must hold names of files beside it")


def test_weights_that_config_json_names_in_vain_are_refused(write, refuse):
    write(transformers_weights="x.safetensors")
    refuse("hf has no x.safetensors, which config.json names: correct transformers_weights")


LFS = b"version https://git-lfs.github.com/spec/v1\noid sha256:" + b"a" * 64 + b"\nsize 269060552\n"
PAGE = b"\r\n<!DOCTYPE html>\n<html><title>Sign in</title></html>\n"
DENIED = b'<?xml version="1.0"?><Error><Code>AccessDenied</Code></Error>'
LINK = "'../../blobs/a'"
NOT_FILES = {
    "a git LFS pointer": (lambda path: path.write_bytes(LFS), "a git LFS pointer, not the file itself: run `git lfs"),
    "a page": (lambda path: path.write_bytes(PAGE), "a web page, not the file itself"),
    "a server's answer": (lambda path: path.write_bytes(DENIED), "a web page, not the file itself"),
    "a directory": (Path.mkdir, "a directory: remove it"),
    "a link to nothing": (lambda path: path.symlink_to("../../blobs/a"), f"missing, a link to {LINK} is left"),
    "a link to itself": (lambda path: path.symlink_to(path.name), "Too many levels of symbolic links"),
}


@pytest.mark.parametrize("kind", NOT_FILES)
@pytest.mark.parametrize("name", ["model.safetensors", "pytorch_model.bin", "config.json", "tokenizer.json"])
def test_what_is_there_in_the_place_of_a_file_is_named(write, refuse, name, kind):
    make, says = NOT_FILES[kind]
    hf = write()
    if name == "pytorch_model.bin":
        (hf / "model.safetensors").unlink()
    (hf / name).unlink(missing_ok=True)
    make(hf / name)
    refuse(f"hf/{name} ", says)


@pytest.mark.parametrize("name", ["model.safetensors", "pytorch_model.bin"])
def test_json_in_the_place_of_weights_is_named(write, refuse, name):
    hf = write()
    (hf / "model.safetensors").unlink()
    (hf / name).write_text('{"error": "Access to this model is restricted"}')
    refuse(f"hf/{name} is JSON, not weights: download it again")


def test_a_bin_of_other_bytes_is_not_said_to_hold_code(write, refuse):
    hf = write()
    (hf / "model.safetensors").rename(hf / "pytorch_model.bin")
    with (hf / "pytorch_model.bin").open("r+b") as file:
        file.write(bytes(range(60, 124)))
    refuse("hf/pytorch_model.bin cannot be read", "it was not written by torch.save")


@pytest.mark.parametrize(
    ("files", "says"),
    [
        (["adapter_config.json", "adapter_model.safetensors"], ["hf/config.json not found", PEFT]),
        (["snapshots/"], ["hf/config.json not found, but snapshots: name the folder in snapshots/"]),
        (["params.json", "consolidated.00.pth"], ["hf/config.json not found", "convert_llama_weights_to_hf.py"]),
        (["config.json", "adapter_model.safetensors"], ["hf has no model.safetensors", PEFT]),
        (["config.json", "model-00001-of-00002.safetensors"], ["hf has no model.safetensors", "download the index"]),
        (["config.json", "model.gguf"], ["hf has no model.safetensors", "['model.gguf']", "save_pretrained"]),
    ],
    ids=str,
)
def test_a_folder_of_something_else_is_named(write, refuse, files, says):
    hf = write()
    (hf / "model.safetensors").unlink()
    if "config.json" not in files:
        (hf / "config.json").unlink()
    for name in files:
        if name.endswith("/"):
            (hf / name).mkdir()
        elif name != "config.json":
            (hf / name).write_text("{}")
    refuse(*says)


@pytest.mark.parametrize("name", ["x" * 300, "hf/config.json", "loop"], ids=["long", "file", "loop"])
@pytest.mark.parametrize("flag", ["--hf", "--out"])
def test_a_path_that_leads_nowhere_is_refused_by_name(write, run, flag, name):
    hf = write()
    Path("loop").symlink_to("loop")
    paths = {"--hf": hf, "--out": "out"} | {flag: f"{name}/x" if flag == "--out" else name}
    ran = run(convert_weights, "--tp", 1, *(part for item in paths.items() for part in item))
    assert ran.code == 2 and name in ran.err.splitlines()[-1]


def test_a_demo_that_cannot_be_put_there_is_refused_before_it_is_fetched(write, run):
    write()
    ran = run(convert_weights, "--demo", "--hf", "hf/config.json/x/y", "--out", "out", "--tp", 1)
    assert (ran.code, ran.err.count("\n")) == (2, 1)
    assert "--hf hf/config.json/x/y: Not a directory, name another directory" in ran.err


def test_a_home_is_found_behind_an_equals_sign(write, run, monkeypatch, tmp_path):
    write()
    monkeypatch.setenv("HOME", str(tmp_path))
    assert run(convert_weights, "--hf=~/hf", "--out=~/out", "--tp", 1).code == 0
    assert Path("out/neuron_config.json").exists() and not Path("~").exists()


def test_files_beside_a_checkpoint_that_nobody_opens_are_not_checked(write, convert, tensors):
    hf = write()
    for name in ("trainer_state.json", "train.log", "my_tokenizer.json", "vocab_statistics.txt", "merges_old.txt"):
        (hf / name).touch()
        os.truncate(hf / name, 70 * 2**20)
    for name in ("notes.txt", "tokenizer.model", "special_tokens_map.json", "generation_config.json"):
        (hf / name).symlink_to("nowhere")
    (hf / "loop").symlink_to("loop")
    (hf / "tokenizer").mkdir()
    os.mkfifo(hf / "pipe")
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(str(hf / "socket"))
    convert("--dtype", "float32")
    assert_close(our_logits(), hf_logits(hf))


def test_why_a_tokenizer_cannot_be_read_is_said_whole(write, convert):
    hf = write()
    try:
        AutoTokenizer.from_pretrained(hf)
    except Exception as error:
        why = " ".join(str(error).split())
    assert f"({why}): give prompts by --prompt-ids" in convert().err


def test_a_tensor_under_both_names_is_refused(write, refuse, tensors):
    write(weights=tensors | {"norm.weight": torch.zeros_like(tensors["model.norm.weight"])})
    refuse("hf", "'model.norm.weight'", "'norm.weight'")


def test_an_absent_o_proj_bias_is_zero(write, convert, tensors):
    torch.manual_seed(1)
    weights = dict(tensors)
    for layer in range(CONFIG["num_hidden_layers"]):
        for name in ("q_proj", "k_proj", "v_proj"):
            rows = tensors[f"model.layers.{layer}.self_attn.{name}.weight"].shape[0]
            weights[f"model.layers.{layer}.self_attn.{name}.bias"] = torch.randn(rows)
    hf = write(weights=weights, attention_bias=True)
    convert("--dtype", "float32")
    assert_close(our_logits(), hf_logits(hf))


@pytest.mark.parametrize(
    "name",
    [
        "model.layers.0.self_attn.rotary_emb.inv_freq",
        "model.layers.1.self_attn.rotary_emb.cos_cached",
        "model.layers.1.self_attn.rotary_emb.sin_cached",
        "model.rotary_emb.original_inv_freq",
    ],
)
def test_left_overs_that_compute_nothing_are_named_and_left_out(write, convert, tensors, name):
    hf = write(weights=tensors | {name: torch.full((4,), 7.0)})
    assert name in convert("--dtype", "float32").err
    assert name not in load_file("out/tp0_sharded_checkpoint.safetensors")
    assert_close(our_logits(), hf_logits(hf))


# ---- generation_config.json


@pytest.fixture(scope="module")
def greedy_ids(tensors: dict[str, Tensor]) -> list[int]:
    """What greedy search makes of IDS if nothing ends it; the fourth token is new there."""
    model = LlamaForCausalLM(transformers.LlamaConfig(**CONFIG, attn_implementation="eager")).eval()
    model.load_state_dict(tensors)
    config = transformers.GenerationConfig(do_sample=False, max_new_tokens=NEW_TOKENS, pad_token_id=0)
    new = model.generate(torch.tensor([IDS]), config)[0, len(IDS) :].tolist()
    assert len(new) == NEW_TOKENS and new[3] not in new[:3]
    return new


@pytest.mark.parametrize(
    "generation, by_config",
    [
        pytest.param(None, "fourth", id="absent"),
        pytest.param("{broken", "fourth", id="broken"),
        pytest.param("", "fourth", id="empty"),
        pytest.param("{}", "fourth", id="without an EOS"),
        pytest.param('{"eos_token_id": null}', "fourth", id="EOS null"),
        pytest.param('{"eos_token_id": [318, "fourth"]}', 318, id="a list"),
        pytest.param('{"eos_token_id": "fourth"}', 318, id="a number"),
        pytest.param(None, [318, "fourth"], id="absent, a list in config.json"),
        pytest.param(None, None, id="absent, null in config.json"),
    ],
)
def test_a_text_ends_where_hf_ends_it(write, convert, answer, greedy_ids, generation, by_config):
    fourth = str(greedy_ids[3])
    hf = write(eos_token_id=json.loads(json.dumps(by_config).replace('"fourth"', fourth)))
    if generation is not None:
        (hf / "generation_config.json").write_text(generation.replace('"fourth"', fourth))
    convert("--dtype", "float32")
    expected = hf_generate(hf)
    assert expected in (greedy_ids, greedy_ids[:4])
    assert answer("--prompt-ids", comma(IDS), "--max-new-tokens", NEW_TOKENS)["ids"] == expected


@pytest.mark.parametrize("content", ["{broken", "", "[]"])
def test_a_broken_generation_config_is_named(write, convert, content):
    hf = write()
    (hf / "generation_config.json").write_text(content)
    assert "hf/generation_config.json" in convert().err


@pytest.mark.parametrize(
    "settings",
    [
        {"repetition_penalty": 5.0},
        {"no_repeat_ngram_size": 1},
        {"suppress_tokens": ["first"]},
        {"begin_suppress_tokens": ["first"]},
        {"bad_words_ids": [["first"]]},
        {"min_new_tokens": 8, "eos_token_id": "fourth"},
        {"min_length": len(IDS) + 8, "eos_token_id": "fourth"},
        {"forced_eos_token_id": 7},
        {"sequence_bias": [[["first"], -50.0]]},
        {"exponential_decay_length_penalty": [1, 9.0], "eos_token_id": 318},
        {"encoder_repetition_penalty": 50.0},
        {"guidance_scale": 3.0},
        {"num_beams": 3},
    ],
    ids=str,
)
def test_settings_that_hf_obeys_in_greedy_search_are_named_as_ignored(write, convert, answer, greedy_ids, settings):
    hf = write()
    text = json.dumps(settings).replace('"first"', str(greedy_ids[0])).replace('"fourth"', str(greedy_ids[3]))
    (hf / "generation_config.json").write_text(text)
    ignored = next(iter(settings))
    assert f"hf/generation_config.json asks for {ignored}: ignored" in convert("--dtype", "float32").err
    plain = greedy_ids[:4] if settings.get("eos_token_id") == "fourth" else greedy_ids
    assert hf_generate(hf) != plain
    assert answer("--prompt-ids", comma(IDS), "--max-new-tokens", NEW_TOKENS)["ids"] == plain


def test_settings_of_config_json_count_if_there_is_no_generation_config(write, convert, greedy_ids):
    hf = write(repetition_penalty=5.0)
    assert hf_generate(hf) != greedy_ids
    assert "hf/config.json asks for repetition_penalty: ignored" in convert().err
    write_json(hf / "generation_config.json", {})
    assert hf_generate(hf) == greedy_ids
    assert "ignored" not in convert().err


def test_settings_that_change_no_greedy_search_are_not_mentioned(write, convert):
    hf = write()
    sampling = {"do_sample": True, "temperature": 0.6, "top_p": 0.9, "top_k": 50, "max_length": 4096}
    neutral = {"repetition_penalty": 1.0, "no_repeat_ngram_size": 0, "min_length": 0, "num_beams": 1}
    write_json(hf / "generation_config.json", sampling | neutral | {"bad_words_ids": None, "eos_token_id": 318})
    assert "ignored" not in convert().err


# ---- tokenizers

TEXT = "the capital of france is  paris\n"
TAGGED = f"<|im_start|>user {TEXT}<|im_end|>"
FAST = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<|begin|>", "eos_token": "<|end|>"}


def byte_level() -> Tokenizer:
    """A byte-level BPE tokenizer like Llama 3's, of fewer than 300 tokens."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    special = list(FAST.values())[1:]
    trainer = trainers.BpeTrainer(
        vocab_size=290, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator([TEXT] * 4, trainer)
    return tokenizer


def with_tokenizer(folder: Path, tokenizer: Tokenizer, **files: dict) -> None:
    """Adds tokenizer.json, and other JSON files by their names without `.json`."""
    tokenizer.save(str(folder / "tokenizer.json"))
    for name, content in ({"tokenizer_config": FAST} | files).items():
        write_json(folder / f"{name}.json", content)


def assert_tokenized_as_by_hf(answer: Callable[..., dict], hf: Path) -> None:
    """Ids of a prompt and text of ids, special ones among them, are those of HF's tokenizer for `hf`."""
    tokenizer = AutoTokenizer.from_pretrained(hf)
    for text in (TEXT, TAGGED, "naïve ☃"):
        expected = tokenizer(text).input_ids
        row = answer("--prompt", text, "--max-new-tokens", 1)
        assert row["prompt_ids"] == expected
        assert row["prompt"] == tokenizer.decode(expected, skip_special_tokens=True)


@pytest.mark.parametrize("truncated, padded", [(True, False), (False, True), (True, True)])
def test_a_prompt_is_whole_though_tokenizer_json_truncates_or_pads(write, convert, answer, truncated, padded):
    hf = write()
    tokenizer = byte_level()
    if truncated:
        tokenizer.enable_truncation(4)
    if padded:
        tokenizer.enable_padding(direction="left", length=40)
    with_tokenizer(hf, tokenizer)
    convert("--dtype", "float32")
    assert_tokenized_as_by_hf(answer, hf)


def test_a_prompt_is_whole_though_a_padded_call_was_saved(write, convert, answer):
    hf = write()
    with_tokenizer(hf, byte_level(), tokenizer_config=FAST | {"pad_token": "<|end|>", "padding_side": "left"})
    tokenizer = AutoTokenizer.from_pretrained(hf)
    tokenizer(TEXT, padding="max_length", truncation=True, max_length=4)
    tokenizer.save_pretrained(hf)
    saved = json.loads((hf / "tokenizer.json").read_text())
    assert saved["truncation"] and saved["padding"]
    convert("--dtype", "float32")
    assert_tokenized_as_by_hf(answer, hf)


def added(*tokens: str, special: bool) -> dict:
    """`added_tokens_decoder` of a tokenizer_config.json, for tokens after those of `byte_level`."""
    flags = {"lstrip": False, "rstrip": False, "normalized": False, "single_word": False, "special": special}
    first = byte_level().get_vocab_size()
    return {str(first + number): {"content": token, **flags} for number, token in enumerate(tokens)}


START, END = "<|im_start|>", "<|im_end|>"


@pytest.mark.parametrize(
    "files",
    [
        {"tokenizer_config": FAST | {"added_tokens_decoder": added(START, END, special=True)}},
        {"tokenizer_config": FAST | {"added_tokens_decoder": added(START, END, special=False)}},
        {"tokenizer_config": FAST | {"additional_special_tokens": [START, END]}},
        {"tokenizer_config": FAST | {"eos_token": END}},
        {"added_tokens": {START: byte_level().get_vocab_size(), END: byte_level().get_vocab_size() + 1}},
        {
            "tokenizer_config": {"tokenizer_class": "PreTrainedTokenizerFast"},
            "special_tokens_map": {"eos_token": END, "additional_special_tokens": [START]},
        },
    ],
    ids=[
        "added_tokens_decoder",
        "not special",
        "additional",
        "eos_token",
        "added_tokens.json",
        "special_tokens_map.json",
    ],
)
def test_tokens_that_stand_beside_tokenizer_json_are_whole_and_hidden_as_by_hf(write, convert, answer, files):
    hf = write()
    with_tokenizer(hf, byte_level(), **files)
    alone = Tokenizer.from_file("hf/tokenizer.json").encode(TAGGED).ids
    assert alone != AutoTokenizer.from_pretrained(hf)(TAGGED).input_ids
    convert("--dtype", "float32")
    assert_tokenized_as_by_hf(answer, hf)


@pytest.mark.parametrize("adds_bos", [False, True])
def test_a_bos_is_put_in_front_where_hf_does(write, convert, answer, adds_bos):
    hf = write()
    tokenizer = byte_level()
    if adds_bos:
        bos = ("<|begin|>", tokenizer.token_to_id("<|begin|>"))
        tokenizer.post_processor = processors.TemplateProcessing(single="<|begin|> $A", special_tokens=[bos])
    with_tokenizer(hf, tokenizer)
    convert("--dtype", "float32")
    assert_tokenized_as_by_hf(answer, hf)


@pytest.mark.parametrize("adds_bos", [False, True])
def test_a_tokenizer_model_alone_is_enough(write, convert, answer, adds_bos):
    sentencepiece = pytest.importorskip("sentencepiece", reason="transformers reads tokenizer.model with it")
    pytest.importorskip("google.protobuf", reason="transformers reads tokenizer.model with it")
    hf = write()
    Path("text").write_text(TEXT * 8)
    ids = {"unk_id": 0, "bos_id": 1, "eos_id": 2, "pad_id": -1}
    kind = {"model_type": "bpe", "vocab_size": 290, "hard_vocab_limit": False, "byte_fallback": True}
    sentencepiece.SentencePieceTrainer.train(input="text", model_prefix="tokenizer", minloglevel=2, **kind, **ids)
    shutil.move("tokenizer.model", hf)
    write_json(hf / "tokenizer_config.json", {"tokenizer_class": "LlamaTokenizer", "add_bos_token": adds_bos})
    convert("--dtype", "float32")
    assert_tokenized_as_by_hf(answer, hf)


def test_nothing_of_a_checkpoint_is_executed_to_read_its_tokenizer(write, convert, answer):
    hf = write(auto_map={"AutoConfig": "code.Config", "AutoModelForCausalLM": "code.Model"})
    with_tokenizer(hf, byte_level(), tokenizer_config=FAST | {"auto_map": {"AutoTokenizer": ["code.Tokenizer", None]}})
    (hf / "code.py").write_text("raise RuntimeError('executed')")
    convert("--dtype", "float32")
    expected = Tokenizer.from_file("hf/tokenizer.json").encode(TEXT).ids
    assert answer("--prompt", TEXT, "--max-new-tokens", 1)["prompt_ids"] == expected


def test_every_file_that_is_opened_for_a_tokenizer_is_checked_first(write, convert, monkeypatch):
    """Each might be a FIFO, or never end. transformers decides which it opens; a hook of Python sees them."""
    hf = write()
    with_tokenizer(hf, byte_level(), special_tokens_map={}, added_tokens={}, vocab={}, tekken={}, trace={})
    for name in ("merges.txt", "chat_template.jinja", "additional_chat_templates/tools.jinja", "notes.txt"):
        (hf / name).parent.mkdir(exist_ok=True)
        (hf / name).write_text("")
    checked, opened = set(), []

    def check(path: Path, is_weights: bool = False) -> None:
        checked.add(path.resolve())

    def hook(event: str, arguments: tuple) -> None:
        if event == "open" and isinstance(arguments[0], str) and arguments[0].startswith("hf/"):
            opened.append((Path(arguments[0]).resolve(), set(checked)))

    monkeypatch.setattr(checkpoint.files, "check_file", check)
    monkeypatch.setattr(checkpoint.tensors, "check_file", check)
    sys.addaudithook(hook)  # which stays, and is silent elsewhere: other tests have another working directory
    convert("--dtype", "float32")
    assert {"tokenizer_config.json", "chat_template.jinja", "config.json"} <= {path.name for path, _ in opened}
    assert [path for path, before in opened if path not in before] == []
    assert {hf.resolve() / "notes.txt", hf.resolve() / "trace.json"} & checked == set()


def test_a_broken_tokenizer_json_is_refused(write, refuse):
    hf = write()
    (hf / "tokenizer.json").write_text("{broken")
    refuse("hf/tokenizer.json")


def test_streamed_text_ends_with_what_an_unfinished_character_leaves(write, convert, run, tensors):
    tokenizer = byte_level()
    half = tokenizer.encode("☃").ids[0]  # the first of three bytes
    weights = tensors | {"lm_head.weight": torch.zeros_like(tensors["lm_head.weight"])}
    weights["model.embed_tokens.weight"] = torch.ones_like(tensors["model.embed_tokens.weight"])
    for name in weights:
        if "o_proj" in name or "down_proj" in name:
            weights[name] = torch.zeros_like(weights[name])
    weights["lm_head.weight"][half] = 1.0  # whatever the text, this token comes next
    hf = write(weights=weights)
    with_tokenizer(hf, tokenizer)
    convert("--dtype", "float32")
    ran = run(llama_neuron, "--ckpt", "out", "--device", "cpu", "--prompt", "☃ is", "--max-new-tokens", 2)
    hf_tokenizer = AutoTokenizer.from_pretrained(hf)
    expected = hf_tokenizer.decode([*hf_tokenizer("☃ is").input_ids, half, half], skip_special_tokens=True)
    assert expected.endswith("\ufffd")
    assert (ran.code, ran.out) == (0, expected + "\n"), ran.err


# ---- as a user runs it


def test_the_two_commands_as_processes_give_hf_s_ids(write, greedy_ids):
    hf = write(torch_dtype="float32", **old(type="linear", rope_type="linear", factor=1.0)).resolve()
    with_tokenizer(hf, byte_level())
    out = hf.with_name("out")
    converted = command("convert_weights.py", "--hf", hf, "--out", out, "--tp", 1)
    assert (converted.returncode, converted.stdout) == (0, ""), converted.stderr
    flags = ("--prompt-ids", comma(IDS), "--max-new-tokens", NEW_TOKENS, "--json")
    ran = command("llama_neuron.py", "--ckpt", out, *flags)
    assert ran.returncode == 0, ran.stderr
    assert json.loads(ran.stdout)["completions"][0]["ids"] == greedy_ids

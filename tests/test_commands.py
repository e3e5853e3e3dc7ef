"""Both commands as a user runs them: what they print and where, which files they write, and how they refuse.

Numerics are tested elsewhere; here the checkpoints are tiny and random, and the ids a command prints have to be those
of HF's own `generate` on the same checkpoint. A new process spends its time on `import torch`, so most calls execute
the script in this one, by `runpy` and under the name `__main__`: `python llama_neuron.py` defines its classes a second
time, beside those of `import llama_neuron`, and so does a test. Where ranks are started, and for an example of each
other kind of call, there is a real process.
"""

import io
import json
import os
import re
import runpy
import shutil
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import NamedTuple

import pytest
import safetensors.torch
import torch
import transformers
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace

ROOT = Path(__file__).resolve().parent.parent
LLAMA, CONVERT = "llama_neuron.py", "convert_weights.py"

WORDS = ["<unk>", "The", "capital", "of", "France", "is", *(f"w{number}" for number in range(6, 64))]
BUILT_IN = [1, 2, 3, 4, 5]  # the sentence that is there for those who give none
SHORT, MIDDLE, LONG = [7, 8], [40, 41, 42, 43], [21, 22, 23, 24, 33, 26, 27, 28, 29]
EOS = [31, 25]  # of generation_config.json: one that ends SHORT and one that ends MIDDLE, LONG goes on
CONFIG_EOS = 51  # of config.json, which counts only where generation_config.json says nothing

COPIED = ["config.json", "generation_config.json", "special_tokens_map.json", "tokenizer.json", "tokenizer_config.json"]
WIDTH, INNER, LAYERS, HEADS, KV_HEADS, HEAD_DIM, POSITIONS = 32, 48, 2, 4, 2, 8, 128

# what neuron_config.json and the `config` of --json hold of it where no flag says otherwise
NEURON_CONFIG = {
    "tp_degree": 1,
    "batch_size": 1,
    "sequence_length": POSITIONS,
    "torch_dtype": "float32",
    "fused_qkv": True,
    "prefill_chunk_size": 0,
    "output_logits": False,
    "on_device_sampling": True,
    "vocab_parallel": False,
    "context_encoding_buckets": [],
}


# ----------------------------------------------------------------------------------------------- checkpoints and oracle


@pytest.fixture(scope="session")
def originals(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with `hf`, a checkpoint by transformers, and its conversions `weights1` (--tp 1) and `weights2`."""
    folder = tmp_path_factory.mktemp("originals")
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=len(WORDS),
        hidden_size=WIDTH,
        intermediate_size=INNER,
        num_hidden_layers=LAYERS,
        num_attention_heads=HEADS,
        num_key_value_heads=KV_HEADS,
        max_position_embeddings=POSITIONS,
        tie_word_embeddings=False,
        eos_token_id=CONFIG_EOS,
        initializer_range=0.4,  # with HF's 0.02 a tiny model repeats one token for ever
    )
    transformers.LlamaForCausalLM(config).save_pretrained(folder / "hf")
    edit_json(folder / "hf" / "generation_config.json", eos_token_id=EOS)
    tokenizer = Tokenizer(WordLevel({word: number for number, word in enumerate(WORDS)}, unk_token=WORDS[0]))
    tokenizer.pre_tokenizer = Whitespace()
    tokenizer.add_special_tokens([WORDS[token] for token in EOS])
    tokenizer.save(str(folder / "hf" / "tokenizer.json"))
    for name in ("tokenizer_config.json", "special_tokens_map.json", "README.md"):
        (folder / "hf" / name).write_text(f'{{"this is": "{name}"}}\n')
    for tp in ("1", "2"):
        with pytest.MonkeyPatch.context() as patch:
            execute(patch, CONVERT, "--hf", folder / "hf", "--out", folder / f"weights{tp}", "--tp", tp)
    return folder


@pytest.fixture(autouse=True)
def checkpoints(originals: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Copies of `hf`, `weights1` and `weights2` in the working directory, for a test to spoil."""
    shutil.copytree(originals, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture(scope="session")
def hf_model(originals: Path) -> transformers.LlamaForCausalLM:
    return transformers.LlamaForCausalLM.from_pretrained(originals / "hf", dtype=torch.float32)


@pytest.fixture(scope="session")
def hf_ids(hf_model: transformers.LlamaForCausalLM) -> Callable[..., list[int]]:
    """The oracle: what HF's `generate` adds to a prompt, greedily."""

    def continuation(prompt: list[int], max_new_tokens: int, eos: list[int] | None = EOS) -> list[int]:
        hf_model.generation_config = transformers.GenerationConfig(
            do_sample=False, max_new_tokens=max_new_tokens, eos_token_id=eos, pad_token_id=0
        )
        return hf_model.generate(torch.tensor([prompt]))[0, len(prompt) :].tolist()

    return continuation


def words(ids: list[int]) -> str:
    """The text of ids, as a WordLevel tokenizer writes it; the two EOS tokens are special, and not shown."""
    return " ".join(WORDS[token] for token in ids if token not in EOS)


def comma(ids: list[int]) -> str:
    return ",".join(map(str, ids))


def edit_json(file: Path, drop: str = "", **changes: object) -> None:
    old = json.loads(file.read_text())
    file.write_text(json.dumps({key: value for key, value in (old | changes).items() if key != drop}))


# ---------------------------------------------------------------------------------------------------- calling a command


class Ran(NamedTuple):
    """What a command left behind: exit code, standard output, standard error."""

    code: int
    out: str
    err: str


def execute(monkeypatch: pytest.MonkeyPatch, command: str, *arguments: object) -> int:
    """Executes a script in this process as `python SCRIPT` does; returns its exit code."""
    monkeypatch.setattr(sys, "argv", [command, *map(str, arguments)])
    # a new process has imported neither of the two yet
    imported = {name: sys.modules.pop(name, None) for name in ("llama_neuron", "convert_weights")}
    try:
        runpy.run_path(str(ROOT / command), run_name="__main__")
    except SystemExit as stop:
        return 0 if stop.code is None else stop.code
    finally:
        for name, module in imported.items():
            sys.modules.pop(name, None)
            if module:
                sys.modules[name] = module
    return 0


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> Callable[..., Ran]:
    def run_in_this_process(command: str, *arguments: object, stdin: io.TextIOBase | None = None) -> Ran:
        monkeypatch.setattr(sys, "stdin", stdin)
        capsys.readouterr()  # what transformers may have said before
        return Ran(execute(monkeypatch, command, *arguments), *capsys.readouterr())

    return run_in_this_process


def run_process(*command: object, stdin: str = "") -> Ran:
    """`python COMMAND ...` in a process of its own."""
    environment = os.environ | {"OMP_NUM_THREADS": "1"}  # else torchrun prints a notice about it
    ran = subprocess.run(
        [sys.executable, *map(str, command)], input=stdin, capture_output=True, text=True, env=environment, timeout=60
    )
    # gloo of torch 2.9 says on stderr that it is connected
    err = "".join(line for line in ran.stderr.splitlines(keepends=True) if not line.startswith("[Gloo]"))
    return Ran(ran.returncode, ran.stdout, err)


def result(ran: Ran) -> dict:
    """The JSON object of a --json call that went well and said nothing else."""
    assert (ran.code, ran.err) == (0, "")
    return json.loads(ran.out)


def new_ids(ran: Ran) -> list[list[int]]:
    return [row["ids"] for row in result(ran)["completions"]]


def timings_line(prefill: int, decode: int) -> re.Pattern[str]:
    return re.compile(
        r"backend torch on cpu: neither neuronx_distributed nor TorchNeuron is installed\n"
        rf"load \d+\.\d\d s, compile 0\.00 s, prefill {prefill} tokens in \d+ ms, decode {decode} at \d+\.\d tokens/s,"
        r" \d+\.\d GB/s of weights \(\d+% of what it can read\), peak memory \d+\.\d\d GB\n"
    )


# ------------------------------------------------------------------------------------------ llama_neuron.py: its output


def test_the_oracle_ends_two_prompts_by_different_eos_ids_and_the_third_by_length(hf_ids):
    """What the tests below rest upon."""
    short, middle, long = (hf_ids(prompt, 16) for prompt in (SHORT, MIDDLE, LONG))
    assert (short[-1], middle[-1]) == tuple(EOS)
    assert 2 < len(short) < 16 and 2 < len(middle) < 16 and len(short) != len(middle)
    assert len(long) == 16 and not {*EOS} & {*long}


def test_json_is_one_object_on_stdout_with_every_key_of_the_design_and_nothing_else_is_printed(hf_ids):
    ran = run_process(
        *(ROOT / LLAMA, "--ckpt", "hf", "--json", "--max-new-tokens", 16),
        *("--prompt", words(SHORT), "--prompt-ids", comma(LONG), "--prompt", words(MIDDLE)),
    )
    answer = result(ran)
    assert ran.out.startswith("{") and ran.out.endswith("}\n")
    assert list(answer) == ["completions", "timings", "config"]
    assert answer["completions"] == [
        {
            "prompt": words(prompt),
            "prompt_ids": prompt,
            "ids": hf_ids(prompt, 16),
            "text": words(hf_ids(prompt, 16)),
            "finish_reason": reason,
        }
        for prompt, reason in ((SHORT, "eos"), (LONG, "length"), (MIDDLE, "eos"))
    ]
    assert set(answer["timings"]) == {
        *("load_s", "compile_s", "prefill_s", "prefill_tokens", "decode_s", "decode_tokens", "decode_tokens_per_s"),
        *("weight_bytes_per_token", "weight_gb_per_s", "read_gb_per_s", "peak_rss_bytes"),
    }
    assert answer["config"] == {
        "backend": "torch",
        "device": "cpu",
        "attn": "eager",
        **NEURON_CONFIG,
        "batch_size": 3,
        "vocab_size": len(WORDS),
        "hidden_size": WIDTH,
        "intermediate_size": INNER,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": HEADS,
        "num_key_value_heads": KV_HEADS,
        "head_dim": HEAD_DIM,
        "hidden_act": "silu",
        "max_position_embeddings": POSITIONS,
        "rms_norm_eps": 1e-6,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
        "attention_bias": False,
        "mlp_bias": False,
        "tie_word_embeddings": False,
        "eos_token_id": EOS,
    }


def test_piped_standard_input_is_the_prompt_and_text_goes_to_stdout_and_timings_to_stderr(hf_ids):
    ran = run_process(ROOT / LLAMA, "--ckpt", "weights1", "--max-new-tokens", 16, stdin=words(SHORT) + "\n")
    ids = hf_ids(SHORT, 16)
    assert (ran.code, ran.out) == (0, words(SHORT + ids) + "\n")
    assert timings_line(prefill=len(SHORT), decode=len(ids) - 1).fullmatch(ran.err)


def test_one_text_is_flushed_after_every_token(run, monkeypatch, hf_ids):
    class Screen(io.StringIO):
        shown = ()

        def flush(self) -> None:
            self.shown += (self.getvalue(),)

    screen = Screen()
    monkeypatch.setattr(sys, "stdout", screen)
    assert run(LLAMA, "--ckpt", "hf", "--prompt-ids", comma(LONG), "--max-new-tokens", 5).code == 0
    ids = LONG + hf_ids(LONG, 5)
    assert screen.shown[: len(ids)] == tuple(words(ids[:end]) for end in range(1, len(ids) + 1))
    assert screen.getvalue() == words(ids) + "\n"


def test_texts_of_a_batch_are_shown_one_after_the_other(run, hf_ids):
    ran = run(LLAMA, "--ckpt", "hf", "--prompt", words(SHORT), "--prompt-ids", comma(LONG), "--max-new-tokens", 4)
    short, long = hf_ids(SHORT, 4), hf_ids(LONG, 4)
    assert ran.out == f"{words(SHORT + short)}\n\n{words(LONG + long)}\n"
    assert timings_line(prefill=len(SHORT + LONG), decode=len(short + long) - 2).fullmatch(ran.err)


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize(
    "stdin", [None, io.StringIO(), Terminal("not to be read")], ids=["closed", "empty", "a terminal"]
)
def test_without_prompt_and_piped_text_the_built_in_sentence_is_continued(run, hf_ids, stdin):
    ran = run(LLAMA, "--ckpt", "hf", "--max-new-tokens", 3, stdin=stdin)
    assert (ran.code, ran.out) == (0, words(BUILT_IN + hf_ids(BUILT_IN, 3)) + "\n")


def test_a_prompt_flag_leaves_standard_input_unread(run, hf_ids):
    piped = io.StringIO("w9 w9")
    ran = run(LLAMA, "--ckpt", "hf", "--prompt", words(MIDDLE), "--max-new-tokens", 3, "--json", stdin=piped)
    assert new_ids(ran) == [hf_ids(MIDDLE, 3)]
    assert piped.read() == "w9 w9"


def test_without_a_tokenizer_ids_are_shown_as_they_are(run, hf_ids):
    Path("hf/tokenizer.json").unlink()
    flags = ("--ckpt", "hf", "--prompt-ids", comma(MIDDLE), "--max-new-tokens", 4)
    ids = hf_ids(MIDDLE, 4)
    assert run(LLAMA, *flags).out.split() == [str(token) for token in MIDDLE + ids]
    row = result(run(LLAMA, *flags, "--json"))["completions"][0]
    assert (row["prompt"], row["text"]) == (" ".join(map(str, MIDDLE)), " ".join(map(str, ids)))


# ------------------------------------------------------------------------------------------- llama_neuron.py: its flags


@pytest.mark.parametrize("attn", ["eager", "sdpa"])
@pytest.mark.parametrize("ckpt", ["hf", "weights1"])
def test_prompts_of_different_lengths_share_a_batch_and_each_gets_the_ids_of_hf(run, hf_ids, ckpt, attn):
    prompts = [MIDDLE, LONG, SHORT, BUILT_IN]
    flags = [flag for prompt in prompts for flag in ("--prompt-ids", comma(prompt))]
    ran = run(LLAMA, "--ckpt", ckpt, "--attn", attn, "--max-new-tokens", 24, "--json", *flags)
    assert new_ids(ran) == [hf_ids(prompt, 24) for prompt in prompts]
    assert result(ran)["config"]["attn"] == attn


@pytest.mark.parametrize("count", [1, 2, 7])
def test_max_new_tokens_is_the_number_of_new_tokens_where_nothing_ends_the_text(run, hf_ids, count):
    ran = run(LLAMA, "--ckpt", "hf", "--prompt-ids", comma(LONG), "--max-new-tokens", count, "--json")
    assert new_ids(ran) == [hf_ids(LONG, count)]
    assert len(new_ids(ran)[0]) == count
    assert result(ran)["completions"][0]["finish_reason"] == "length"


def test_without_max_new_tokens_there_are_64(run, hf_ids):
    ran = run(LLAMA, "--ckpt", "hf", "--prompt-ids", comma(LONG), "--ignore-eos", "--json")
    assert new_ids(ran) == [hf_ids(LONG, 64, eos=None)]
    assert len(new_ids(ran)[0]) == 64


def test_ignore_eos_goes_on_to_max_new_tokens(run, hf_ids):
    flags = ("--prompt-ids", comma(SHORT), "--prompt-ids", comma(MIDDLE), "--max-new-tokens", 16)
    rows = result(run(LLAMA, "--ckpt", "hf", *flags, "--ignore-eos", "--json"))["completions"]
    assert [row["ids"] for row in rows] == [hf_ids(SHORT, 16, eos=None), hf_ids(MIDDLE, 16, eos=None)]
    assert [(len(row["ids"]), row["finish_reason"]) for row in rows] == [(16, "length")] * 2


def test_the_eos_id_of_config_json_counts_where_there_is_no_generation_config(run, hf_ids):
    token = hf_ids(LONG, 16)[6]
    edit_json(Path("hf/config.json"), eos_token_id=token)
    flags = ("--ckpt", "hf", "--prompt-ids", comma(LONG), "--max-new-tokens", 16, "--json")
    assert new_ids(run(LLAMA, *flags)) == [hf_ids(LONG, 16)]
    Path("hf/generation_config.json").unlink()
    row = result(run(LLAMA, *flags))["completions"][0]
    assert (row["ids"], row["finish_reason"]) == (hf_ids(LONG, 16, eos=[token]), "eos")
    assert row["ids"][-1] == token and len(row["ids"]) < 16


@pytest.mark.parametrize("length", [len(LONG) + 1, len(LONG) + 5])
def test_texts_stop_where_prompt_and_new_tokens_fill_the_sequence_length(run, hf_ids, length):
    prompts = [LONG, MIDDLE]
    flags = [flag for prompt in prompts for flag in ("--prompt-ids", comma(prompt))]
    ran = run(LLAMA, "--ckpt", "hf", *flags, "--sequence-length", length, "--ignore-eos", "--json")
    rows, config = result(ran)["completions"], result(ran)["config"]
    assert [row["ids"] for row in rows] == [hf_ids(prompt, length - len(prompt), eos=None) for prompt in prompts]
    assert [len(row["prompt_ids"] + row["ids"]) for row in rows] == [length, length]
    assert [row["finish_reason"] for row in rows] == ["length", "length"]
    assert config["sequence_length"] == length


def test_a_batch_larger_than_the_prompts_changes_nothing(run, hf_ids):
    ran = run(LLAMA, "--ckpt", "hf", "--prompt-ids", comma(SHORT), "--batch-size", 5, "--max-new-tokens", 16, "--json")
    assert new_ids(ran) == [hf_ids(SHORT, 16)]
    assert result(ran)["config"]["batch_size"] == 5


@pytest.mark.parametrize("prompts, rows", [(1, 2), (2, 2), (3, 3)])
def test_the_batch_is_as_converted_unless_there_are_more_prompts(run, prompts, rows):
    assert run(CONVERT, "--hf", "hf", "--out", "out", "--tp", 1, "--batch-size", 2).code == 0
    flags = ["--prompt-ids", comma(SHORT)] * prompts
    ran = run(LLAMA, "--ckpt", "out", *flags, "--max-new-tokens", 1, "--json")
    assert (len(new_ids(ran)), result(ran)["config"]["batch_size"]) == (prompts, rows)


@pytest.mark.parametrize("ckpt", ["hf", "weights1"])
def test_the_config_of_json_names_the_dtype_that_was_computed_in(run, ckpt):
    ran = run(LLAMA, "--ckpt", ckpt, "--prompt-ids", "7,8", "--dtype", "bfloat16", "--max-new-tokens", 1, "--json")
    assert result(ran)["config"]["torch_dtype"] == "bfloat16"


def test_dtype_halves_the_weights_that_are_read(run):
    flags = ("--ckpt", "hf", "--prompt-ids", "7,8", "--max-new-tokens", 1, "--json")
    sizes = [
        result(run(LLAMA, *flags, "--dtype", dtype))["timings"]["weight_bytes_per_token"]
        for dtype in ("float32", "bfloat16", "float16")
    ]
    assert sizes == [sizes[0], sizes[0] // 2, sizes[0] // 2]


@pytest.mark.parametrize("tied", [False, True])
def test_timings_count_the_tokens_and_the_weights(run, hf_ids, hf_model, tied):
    if tied:
        tie(Path("hf"))
    flags = (
        "--prompt-ids",
        comma(LONG),
        "--prompt-ids",
        comma(MIDDLE),
        "--max-new-tokens",
        6,
        "--ignore-eos",
        "--json",
    )
    timings = result(run(LLAMA, "--ckpt", "hf", *flags))["timings"]
    # an untied embedding is not read but looked up in; a tied one is read as lm_head
    weights = sum(tensor.numel() for name, tensor in hf_model.named_parameters() if "embed_tokens" not in name)
    assert timings["weight_bytes_per_token"] == 4 * weights
    assert (timings["prefill_tokens"], timings["decode_tokens"]) == (len(LONG + MIDDLE), 2 * 5)
    assert timings["decode_tokens_per_s"] == pytest.approx(10 / timings["decode_s"])
    assert timings["weight_gb_per_s"] == pytest.approx(5 * 4 * weights / timings["decode_s"] / 1e9)
    assert timings["compile_s"] == 0
    assert 0 < timings["load_s"] < 60 and 0 < timings["prefill_s"] < 60
    assert 0 < timings["read_gb_per_s"] < 1e4
    assert 50e6 < timings["peak_rss_bytes"] < 50e9


def test_timings_of_a_single_new_token_have_no_rate(run):
    timings = result(run(LLAMA, "--ckpt", "hf", "--prompt-ids", "7,8", "--max-new-tokens", 1, "--json"))["timings"]
    rate = ("decode_tokens", "decode_s", "decode_tokens_per_s", "weight_gb_per_s")
    assert [timings[key] for key in rate] == [0, 0, 0, 0]


def assert_logits_are_those_of_hf(file: str, model: transformers.LlamaForCausalLM, texts: list[list[int]]) -> None:
    """Names, dtypes, shapes, zeros on the right, and the logits of every position but the last of each text."""
    saved = load_file(file)
    assert set(saved) == {"logits", "ids"}
    logits, ids = saved["logits"], saved["ids"]
    longest = max(map(len, texts))
    assert (logits.dtype, logits.shape) == (torch.float32, (len(texts), longest - 1, len(WORDS)))
    assert (ids.dtype, ids.shape) == (torch.int64, (len(texts), longest))
    for row, text in enumerate(texts):
        assert ids[row].tolist() == text + [0] * (longest - len(text))
        assert not logits[row, len(text) - 1 :].any()
        with torch.inference_mode():
            wanted = model(torch.tensor([text[:-1]])).logits[0]
        torch.testing.assert_close(logits[row, : len(text) - 1], wanted, atol=1e-3, rtol=0)


def test_output_logits_has_a_row_for_every_position_and_its_argmax_is_the_next_id(run, hf_ids, hf_model):
    prompts = [SHORT, LONG, MIDDLE]
    flags = [flag for prompt in prompts for flag in ("--prompt-ids", comma(prompt))]
    flags += ["--batch-size", 4, "--max-new-tokens", 16, "--json"]
    with_logits = run(LLAMA, "--ckpt", "hf", *flags, "--output-logits", "logits.safetensors")
    texts = [prompt + hf_ids(prompt, 16) for prompt in prompts]
    assert [prompt + ids for prompt, ids in zip(prompts, new_ids(with_logits), strict=True)] == texts
    assert_logits_are_those_of_hf("logits.safetensors", hf_model, texts)
    logits = load_file("logits.safetensors")["logits"]
    for row, (prompt, text) in enumerate(zip(prompts, texts, strict=True)):
        assert logits[row, len(prompt) - 1 : len(text) - 1].argmax(-1).tolist() == text[len(prompt) :]


# ------------------------------------------------------------------------------------------- llama_neuron.py: its ranks

BATCH = ("--prompt-ids", comma(SHORT), "--prompt-ids", comma(LONG), "--max-new-tokens", "16", "--json")


def test_two_ranks_print_what_one_prints_from_a_conversion_as_from_the_hf_directory(hf_ids, hf_model, run):
    texts = [prompt + hf_ids(prompt, 16) for prompt in (SHORT, LONG)]
    assert run(CONVERT, "--hf", "hf", "--out", "vocab", "--tp", 2, "--vocab-parallel").code == 0
    for ckpt, tp in (("weights2", ()), ("hf", ("--tp", 2)), ("vocab", ("--tp", 2))):
        ran = run_process(ROOT / LLAMA, "--ckpt", ckpt, *tp, *BATCH, "--output-logits", f"{ckpt}.safetensors")
        assert [SHORT + new_ids(ran)[0], LONG + new_ids(ran)[1]] == texts
        config = result(ran)["config"]
        assert (config["tp_degree"], config["vocab_parallel"]) == (2, ckpt == "vocab")
        assert_logits_are_those_of_hf(f"{ckpt}.safetensors", hf_model, texts)


def test_torchrun_starts_the_ranks_and_only_the_first_reads_its_input_and_prints(hf_ids):
    torchrun = ("-m", "torch.distributed.run", "--nproc-per-node", 2)
    ran = run_process(
        *torchrun, ROOT / LLAMA, "--ckpt", "weights2", "--max-new-tokens", 16, "--json", stdin=words(LONG)
    )
    assert ran.code == 0
    answer = json.loads(ran.out)
    assert [row["ids"] for row in answer["completions"]] == [hf_ids(LONG, 16)]
    assert answer["config"]["tp_degree"] == 2


# --------------------------------------------------------------------------------------------------- convert_weights.py


def tie(hf: Path) -> None:
    """Makes a checkpoint whose lm_head is its embedding, and stands in the file all the same."""
    edit_json(hf / "config.json", tie_word_embeddings=True)
    with_tensors(lambda tensors: tensors | {"lm_head.weight": tensors["model.embed_tokens.weight"].clone()})(hf)


def with_tensors(change: Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]]) -> Callable[[Path], None]:
    def spoil(hf: Path) -> None:
        save_file(change(load_file(hf / "model.safetensors")), hf / "model.safetensors")

    return spoil


def shards(tp: int) -> list[str]:
    return [f"tp{rank}_sharded_checkpoint.safetensors" for rank in range(tp)]


def listing(folder: str) -> list[str]:
    return sorted(path.name for path in Path(folder).iterdir())


def test_the_converter_copies_config_and_tokenizer_writes_the_shards_and_prints_nothing():
    assert run_process(ROOT / CONVERT, "--hf", "hf", "--out", "new/out", "--tp", 2) == (0, "", "")
    assert listing("new/out") == sorted([*COPIED, "neuron_config.json", *shards(2)])
    for name in COPIED:
        assert Path("new/out", name).read_bytes() == Path("hf", name).read_bytes()
    assert {path.name: path.read_bytes() for path in Path("new/out").iterdir()} == {
        path.name: path.read_bytes() for path in Path("weights2").iterdir()
    }


def test_progress_is_shown_on_a_terminal_only(run, monkeypatch):
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    assert run(CONVERT, "--hf", "hf", "--out", "out", "--tp", 2)[:2] == (0, "")
    assert "rank 0 of 2" in terminal.getvalue() and "rank 1 of 2" in terminal.getvalue()


@pytest.mark.parametrize(
    "flags, changes",
    [
        ((), {}),
        (("--dtype", "bfloat16"), {"torch_dtype": "bfloat16"}),
        (("--dtype", "float16", "--batch-size", 3), {"torch_dtype": "float16", "batch_size": 3}),
        (("--sequence-length", 512, "--vocab-parallel"), {"sequence_length": 512, "vocab_parallel": True}),
    ],
    ids=["defaults", "bfloat16", "float16, batch", "length, vocabulary"],
)
def test_neuron_config_holds_optimums_keys_with_the_values_of_the_flags(run, flags, changes):
    assert run(CONVERT, "--hf", "hf", "--out", "out", "--tp", 2, *flags) == (0, "", "")
    assert json.loads(Path("out/neuron_config.json").read_text()) == NEURON_CONFIG | {"tp_degree": 2} | changes


def test_the_default_sequence_length_is_2048_where_the_model_goes_on(run):
    edit_json(Path("hf/config.json"), max_position_embeddings=131072)
    assert run(CONVERT, "--hf", "hf", "--out", "out", "--tp", 1).code == 0
    assert json.loads(Path("out/neuron_config.json").read_text())["sequence_length"] == 2048


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("vocab_parallel", [False, True])
def test_a_shard_has_hf_names_one_wqkv_a_layer_and_the_dtype_that_was_asked_for(run, dtype, vocab_parallel):
    flags = ["--vocab-parallel"] * vocab_parallel
    assert run(CONVERT, "--hf", "hf", "--out", "out", "--tp", 2, "--dtype", dtype, *flags) == (0, "", "")
    layer = {
        "self_attn.Wqkv.weight": ((HEADS + 2 * KV_HEADS) * HEAD_DIM // 2, WIDTH),
        "self_attn.o_proj.weight": (WIDTH, HEADS * HEAD_DIM // 2),
        "mlp.gate_proj.weight": (INNER // 2, WIDTH),
        "mlp.up_proj.weight": (INNER // 2, WIDTH),
        "mlp.down_proj.weight": (WIDTH, INNER // 2),
        "input_layernorm.weight": (WIDTH,),
        "post_attention_layernorm.weight": (WIDTH,),
    }
    shapes = {f"model.layers.{number}.{name}": shape for number in range(LAYERS) for name, shape in layer.items()}
    shapes |= {"model.norm.weight": (WIDTH,), "lm_head.weight": (len(WORDS) // 2, WIDTH)}
    shapes["model.embed_tokens.weight"] = (len(WORDS) // 2, WIDTH) if vocab_parallel else (len(WORDS), WIDTH // 2)
    ranks = ["rank_util.rank"] + ["model.embed_tokens.rank_util.rank"] * vocab_parallel
    for rank, name in enumerate(shards(2)):
        shard = load_file(Path("out", name))
        assert [shard.pop(key).tolist() for key in ranks] == [[rank]] * len(ranks)
        assert {key: tuple(tensor.shape) for key, tensor in shard.items()} == shapes
        assert {tensor.dtype for tensor in shard.values()} == {getattr(torch, dtype)}


def test_a_single_shard_is_the_hf_checkpoint_with_q_k_and_v_stacked():
    shard, hf = load_file("weights1/tp0_sharded_checkpoint.safetensors"), load_file("hf/model.safetensors")
    for layer in range(LAYERS):
        prefix = f"model.layers.{layer}.self_attn."
        hf[prefix + "Wqkv.weight"] = torch.cat([hf.pop(f"{prefix}{name}_proj.weight") for name in "qkv"])
    hf["rank_util.rank"] = torch.zeros(1, dtype=torch.int32)
    assert set(shard) == set(hf)
    assert all(torch.equal(shard[name], hf[name]) for name in hf)


def test_converting_again_for_fewer_ranks_leaves_no_shard_of_the_first_conversion(run):
    for tp in (4, 2):
        assert run(CONVERT, "--hf", "hf", "--out", "out", "--tp", tp).code == 0
        assert listing("out") == sorted([*COPIED, "neuron_config.json", *shards(tp)])


def test_converting_another_model_leaves_no_tokenizer_or_eos_of_the_first(run):
    for name in COPIED[1:]:
        Path("hf", name).unlink()
    assert run(CONVERT, "--hf", "hf", "--out", "weights2", "--tp", 2).code == 0
    assert listing("weights2") == sorted(["config.json", "neuron_config.json", *shards(2)])


@pytest.mark.parametrize(
    "failure", [OSError(28, "No space left on device"), KeyboardInterrupt()], ids=["disk", "Ctrl-C"]
)
def test_a_conversion_that_breaks_off_leaves_no_temporary_file_and_nothing_that_looks_complete(
    run, monkeypatch, failure
):
    def save_until_the_last(tensors: dict, path: Path, **options: object) -> None:
        save_file(tensors, path, **options)
        if "tp1" in Path(path).name:
            Path(path).write_bytes(Path(path).read_bytes()[:1000])  # half written
            raise failure

    assert "neuron_config.json" in listing("weights2")  # complete, until it is converted again
    monkeypatch.setattr(safetensors.torch, "save_file", save_until_the_last)
    convert = partial(run, CONVERT, "--hf", "hf", "--out", "weights2", "--tp", 2)
    if isinstance(failure, OSError):
        assert_refused(convert(), CONVERT, f"weights2/{shards(2)[1]} cannot be written", "No space left on device")
    else:
        with pytest.raises(KeyboardInterrupt):
            convert()
    assert listing("weights2") == sorted([*COPIED, shards(1)[0]])


def as_sharded_safetensors(hf: Path) -> None:
    model = transformers.LlamaForCausalLM.from_pretrained(hf, dtype=torch.float32)
    (hf / "model.safetensors").unlink()
    model.save_pretrained(hf, max_shard_size="20KB")
    assert len(list(hf.glob("model-0000*-of-0000*.safetensors"))) > 2


def as_pytorch_bin(hf: Path) -> None:
    torch.save(load_file(hf / "model.safetensors"), hf / "pytorch_model.bin")
    (hf / "model.safetensors").unlink()


def as_sharded_pytorch_bin(hf: Path) -> None:
    tensors = load_file(hf / "model.safetensors")
    (hf / "model.safetensors").unlink()
    weight_map = {name: f"pytorch_model-{number % 2}.bin" for number, name in enumerate(tensors)}
    for file in {*weight_map.values()}:
        torch.save({name: tensors[name] for name in tensors if weight_map[name] == file}, hf / file)
    (hf / "pytorch_model.bin.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


def as_link_into_a_cache(hf: Path) -> None:
    (hf / "model.safetensors").rename("blob")
    (hf / "model.safetensors").symlink_to(Path("blob").resolve())


def with_old_inv_freq(hf: Path) -> None:
    old = {f"model.layers.{layer}.self_attn.rotary_emb.inv_freq": torch.ones(4) for layer in range(LAYERS)}
    with_tensors(lambda tensors: tensors | old)(hf)


@pytest.mark.parametrize(
    "layout", [as_sharded_safetensors, as_pytorch_bin, as_sharded_pytorch_bin, as_link_into_a_cache, with_old_inv_freq]
)
def test_every_layout_of_a_checkpoint_gives_the_same_shards(run, hf_ids, layout):
    layout(Path("hf"))
    edit_json(Path("hf/generation_config.json"), eos_token_id=EOS)  # save_pretrained rewrites it
    assert run(CONVERT, "--hf", "hf", "--out", "out", "--tp", 2) == (0, "", "")
    for name in shards(2):
        assert Path("out", name).read_bytes() == Path("weights2", name).read_bytes()
    ran = run(LLAMA, "--ckpt", "hf", "--prompt-ids", comma(MIDDLE), "--max-new-tokens", 16, "--json")
    assert new_ids(ran) == [hf_ids(MIDDLE, 16)]


@pytest.mark.parametrize("tp, vocab_parallel", [(1, False), (1, True), (2, True), (2, False)])
def test_a_tied_lm_head_is_stored_only_where_it_is_not_the_shard_of_the_embedding(run, tp, vocab_parallel):
    tie(Path("hf"))
    embedding = load_file("hf/model.safetensors")["model.embed_tokens.weight"]
    flags = ["--vocab-parallel"] * vocab_parallel
    assert run(CONVERT, "--hf", "hf", "--out", "out", "--tp", tp, *flags) == (0, "", "")
    for rank, name in enumerate(shards(tp)):
        shard = load_file(Path("out", name))
        rows = embedding.chunk(tp)[rank]
        if (tp, vocab_parallel) == (2, False):
            assert torch.equal(shard["lm_head.weight"], rows)
        else:
            assert "lm_head.weight" not in shard
            assert torch.equal(shard["model.embed_tokens.weight"], rows)


# ---------------------------------------------------------------------------------------- refusals: what is on the disk


def assert_refused(ran: Ran, command: str, *says: str) -> None:
    """One line on stderr that says all of `says`, exit code 2, and nothing on stdout."""
    assert (ran.code, ran.out) == (2, "")
    assert ran.err.startswith(f"{command}: error: ") and ran.err.endswith("\n") and ran.err.count("\n") == 1
    assert [part for part in says if part not in ran.err] == []


def snapshot() -> dict[Path, bytes | None]:
    """Every file and folder in the working directory."""
    return {path: path.read_bytes() if path.is_file() else None for path in Path().rglob("*")}


def fault(name: str, spoil: Callable[[Path], object], *says: str) -> object:
    """A way to spoil a checkpoint directory, and what the refusal has to say."""
    return pytest.param(spoil, says, id=name)


def config(drop: str = "", **changes: object) -> Callable[[Path], None]:
    return lambda hf: edit_json(hf / "config.json", drop, **changes)


def rope(kind: str, **parameters: object) -> Callable[[Path], None]:
    return config(rope_parameters={"rope_type": kind, "rope_theta": 10000.0, **parameters})


def overwrite(file: str, content: bytes) -> Callable[[Path], object]:
    return lambda folder: (folder / file).write_bytes(content)


def truncate(file: str) -> Callable[[Path], object]:
    return lambda folder: (folder / file).write_bytes((folder / file).read_bytes()[:-100])


def remove(file: str) -> Callable[[Path], object]:
    return lambda folder: (folder / file).unlink()


def index(weight_map: object) -> Callable[[Path], None]:
    """An index in the place of model.safetensors, which is there still, under two other names."""

    def spoil(hf: Path) -> None:
        shutil.copyfile(hf / "model.safetensors", "outside.safetensors")
        (hf / "model.safetensors").rename(hf / "inside.safetensors")
        content = weight_map() if callable(weight_map) else weight_map
        (hf / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": content}))

    return spoil


def pickled(make: Callable[[dict[str, torch.Tensor]], object]) -> Callable[[Path], None]:
    """A pytorch_model.bin in the place of model.safetensors."""

    def spoil(hf: Path) -> None:
        torch.save(make(load_file(hf / "model.safetensors")), hf / "pytorch_model.bin")
        (hf / "model.safetensors").unlink()

    return spoil


CONFIG_FAULTS = [
    fault("no config.json", remove("config.json"), "hf/config.json not found", "name a directory that holds a Llama"),
    fault("config.json is no JSON", overwrite("config.json", b"{"), "hf/config.json cannot be read as JSON"),
    fault("config.json is no text", overwrite("config.json", b"\xff"), "hf/config.json cannot be read as JSON"),
    fault("config.json is no object", overwrite("config.json", b"[]"), "hf/config.json holds no JSON object"),
    fault(
        "another architecture",
        config(architectures=["MistralForCausalLM"], model_type="mistral"),
        *("hf/config.json", "MistralForCausalLM", "not supported, LlamaForCausalLM is"),
    ),
    fault(
        "another model_type",
        config(model_type="mllama"),
        "hf/config.json",
        "mllama",
        "not supported, LlamaForCausalLM is",
    ),
    fault(
        "quantized",
        config(quantization_config={"quant_method": "awq", "bits": 4}),
        *("hf/config.json", "quantization_config is not supported", "dequantize it first"),
    ),
    fault(
        "an unknown activation",
        config(hidden_act="tanh"),
        *("hf/config.json", "hidden_act 'tanh' is not supported", "silu, swish, gelu, relu, gelu_pytorch_tanh are"),
    ),
    fault(
        "an unknown rope_type",
        rope("spiral"),
        *(
            "hf/config.json",
            "rope_type 'spiral' is not supported",
            "default, linear, dynamic, llama3, yarn, longrope are",
        ),
    ),
    fault("a rope without its factor", rope("linear"), "hf/config.json", "rope_type 'linear' needs factor"),
    fault(
        "partial rotation", rope("default", partial_rotary_factor=0.5), "hf/config.json", "partial_rotary_factor 0.5"
    ),
    fault("an unknown dtype", config(dtype="int8"), "hf/config.json", "'int8'", "bfloat16, float16, float32 are"),
    *(
        fault(f"no {key}", config(drop=key), f"hf/config.json: {key} must be a positive integer, it is None")
        for key in ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
    ),
    fault(
        "a negative size",
        config(num_hidden_layers=-1),
        "hf/config.json: num_hidden_layers",
        "positive integer, it is -1",
    ),
    fault(
        "heads that KV heads do not divide",
        config(num_key_value_heads=3),
        *("hf/config.json", "4 attention heads are no multiple of 3 key/value heads"),
    ),
    fault(
        "a width that heads do not divide",
        config(head_dim=None, num_attention_heads=5),
        *("hf/config.json", "no head_dim", "hidden_size 32 is no multiple of 5 heads"),
    ),
    fault("a width in quotes", config(hidden_size="32", head_dim=None), "hf/config.json", "hidden_size"),
    fault("an epsilon in quotes", config(rms_norm_eps="1e-6"), "hf/config.json", "rms_norm_eps"),
    fault("a list of activations", config(hidden_act=["silu"]), "hf/config.json", "hidden_act"),
    fault("rope in one word", config(rope_parameters="linear"), "hf/config.json", "rope"),
    fault("a rope factor that is null", rope("linear", factor=None), "hf/config.json", "factor"),
]

NORM, EXTRA = "model.norm.weight", "model.layers.0.self_attn.q_norm.weight"
TENSOR_FAULTS = [
    fault(
        "a missing tensor",
        with_tensors(lambda tensors: {name: tensors[name] for name in tensors if name != NORM}),
        *("hf: missing tensors, download it again:", NORM),
    ),
    fault("many missing tensors", config(num_hidden_layers=3), "model.layers.2.input_layernorm.weight", "and 5 more"),
    fault(
        "a misshapen tensor",
        with_tensors(lambda tensors: tensors | {NORM: torch.ones(31)}),
        f"hf: {NORM} has shape [31], config.json asks for [32]",
    ),
    fault(
        "an unknown tensor",
        with_tensors(lambda tensors: tensors | {EXTRA: torch.ones(8)}),
        f"hf: tensors that a Llama does not have: {EXTRA}",
    ),
    fault("layers left over", config(num_hidden_layers=1), "tensors that a Llama does not have", "and 5 more"),
    fault(
        "a tied lm_head that is not the embedding",
        config(tie_word_embeddings=True),
        *("hf: lm_head.weight is not model.embed_tokens.weight", "set tie_word_embeddings to false"),
    ),
    fault(
        "an index that goes up",
        index({NORM: "../outside.safetensors"}),
        *("hf/model.safetensors.index.json", "'../outside.safetensors' points outside its directory"),
    ),
    fault(
        "an index with an absolute path",
        index(lambda: {NORM: str(Path("outside.safetensors").resolve())}),
        *("hf/model.safetensors.index.json", "outside.safetensors' points outside its directory"),
    ),
    fault(
        "an index of an absent file",
        index({"model.norm.weight": "inside.safetensors", "lm_head.weight": "model-00002-of-00002.safetensors"}),
        *("hf/model-00002-of-00002.safetensors not found", "download it again"),
    ),
    fault("an index of nothing", index({}), "hf has no neuron_config.json, model.safetensors, pytorch_model.bin"),
    fault("an index that is null", index(None), "hf/model.safetensors.index.json"),
    fault("an index of a number", index({NORM: 1}), "hf/model.safetensors.index.json"),
    fault("a truncated file", truncate("model.safetensors"), "hf/model.safetensors cannot be read"),
    fault("an empty file", overwrite("model.safetensors", b""), "hf/model.safetensors cannot be read"),
    fault(
        "no weights", remove("model.safetensors"), "hf has no neuron_config.json, model.safetensors, pytorch_model.bin"
    ),
    fault("a .bin file of something else", pickled(lambda tensors: {"state": tensors}), "missing tensors"),
    fault(
        "a .bin file with code in it",
        pickled(lambda tensors: tensors | {"code": Path("code")}),
        "hf/pytorch_model.bin cannot be read",
    ),
]


@pytest.mark.parametrize("spoil, says", CONFIG_FAULTS + TENSOR_FAULTS)
def test_the_converter_refuses_a_faulty_checkpoint_and_writes_nothing(run, spoil, says):
    spoil(Path("hf"))
    before = snapshot()
    assert_refused(run(CONVERT, "--hf", "hf", "--out", "out", "--tp", 2), CONVERT, *says)
    assert snapshot() == before


@pytest.mark.parametrize("spoil, says", CONFIG_FAULTS)
def test_llama_neuron_refuses_a_faulty_config(run, spoil, says):
    spoil(Path("hf"))
    assert_refused(run(LLAMA, "--ckpt", "hf", "--prompt-ids", "7,8", "--max-new-tokens", 1), LLAMA, *says)


@pytest.mark.parametrize("spoil, says", TENSOR_FAULTS)
def test_llama_neuron_refuses_an_hf_directory_with_faulty_tensors(run, spoil, says):
    spoil(Path("hf"))
    assert_refused(run(LLAMA, "--ckpt", "hf", "--prompt-ids", "7,8", "--max-new-tokens", 1), LLAMA, *says)


SHARD = "weights1/tp0_sharded_checkpoint.safetensors"


@pytest.mark.parametrize(
    "spoil, says",
    [
        fault("an absent shard", remove(shards(1)[0]), f"{SHARD} not found", "convert again with convert_weights.py"),
        fault("a truncated shard", truncate(shards(1)[0]), f"{SHARD} cannot be read", "convert again"),
        fault("an empty shard", overwrite(shards(1)[0], b""), f"{SHARD} cannot be read", "convert again"),
        fault(
            "a shard short of a layer", config(num_hidden_layers=3), SHARD, "does not fit config.json, convert again"
        ),
        fault("a misshapen shard", config(intermediate_size=64), SHARD, "does not fit config.json, convert again"),
        fault(
            "a neuron_config.json that is no JSON",
            overwrite("neuron_config.json", b"tp_degree: 2"),
            "weights1/neuron_config.json cannot be read as JSON",
        ),
        fault(
            "a tp_degree that is no number",
            overwrite("neuron_config.json", b'{"tp_degree": "one"}'),
            "weights1/neuron_config.json: tp_degree must be a positive integer, it is 'one'",
        ),
        fault(
            "q, k and v apart",
            overwrite("neuron_config.json", b'{"fused_qkv": false}'),
            *("weights1/neuron_config.json: fused_qkv", "convert again with convert_weights.py"),
        ),
        pytest.param(remove("neuron_config.json"), ["weights1 has no neuron_config.json"], id="incomplete"),
    ],
)
def test_llama_neuron_refuses_a_faulty_conversion(run, spoil, says):
    spoil(Path("weights1"))
    assert_refused(run(LLAMA, "--ckpt", "weights1", "--prompt-ids", "7,8", "--max-new-tokens", 1), LLAMA, *says)


def test_a_conversion_that_broke_off_is_no_hf_checkpoint_either(run):
    Path("weights2/neuron_config.json").unlink()
    ran = run(CONVERT, "--hf", "weights2", "--out", "out", "--tp", 2)
    assert_refused(ran, CONVERT, "weights2 has no neuron_config.json, model.safetensors")


@pytest.mark.parametrize("damaged", [[1], [0, 1]], ids=["the last", "both"])
def test_damaged_shards_of_two_ranks_are_refused_in_one_line(damaged):
    names = [shards(2)[rank] for rank in damaged]
    for name in names:
        truncate(name)(Path("weights2"))
    ran = run_process(ROOT / LLAMA, "--ckpt", "weights2", "--prompt-ids", "7,8")
    assert_refused(ran, LLAMA, "cannot be read, convert again")
    assert any(f"weights2/{name}" in ran.err for name in names)


# ----------------------------------------------------------------------------- refusals: flags, and what goes with them


def wrong_flag(name: str, command: str, arguments: str, *says: str, **spoils: Callable) -> object:
    """Arguments that are refused once `spoils` were applied to the directories of these names."""
    return pytest.param(command, arguments.split(), spoils, says, id=name)


DYNAMIC = rope("dynamic", factor=2.0)
STATIC = ("--sequence-length 129 exceeds 128", "dynamic rope", "which a static graph cannot", "use 128 or less")
LONGROPE = rope(
    "longrope", short_factor=[1.0] * 4, long_factor=[2.0] * 4, factor=2.0, original_max_position_embeddings=64
)


@pytest.mark.parametrize(
    "command, arguments, spoils, says",
    [
        wrong_flag(
            "another --tp than that of the conversion",
            *(LLAMA, "--ckpt weights2 --tp 4 --prompt-ids 7,8"),
            *("weights2 was converted for --tp 2: use that", "convert again with --tp 4"),
        ),
        wrong_flag(
            "one rank for a conversion to two",
            *(LLAMA, "--ckpt weights2 --tp 1 --prompt-ids 7,8", "weights2 was converted for --tp 2"),
        ),
        wrong_flag(
            "a deleted shard of two",
            *(LLAMA, "--ckpt weights2 --prompt-ids 7,8"),
            *(f"weights2/{shards(2)[1]} not found", "convert again with convert_weights.py"),
            weights2=remove(shards(2)[1]),
        ),
        wrong_flag(
            "an absent directory",
            *(LLAMA, "--ckpt nowhere --prompt-ids 7,8"),
            *("nowhere/config.json not found", "name a directory that holds a Llama checkpoint"),
        ),
        wrong_flag(
            "a prompt as long as the cache",
            *(LLAMA, "--ckpt hf --sequence-length 3 --prompt-ids 7,8 --prompt-ids 7,8,9"),
            *("prompt 2 has 3 tokens", "no room in --sequence-length 3", "raise it, or shorten the prompt"),
        ),
        wrong_flag("an empty prompt", LLAMA, "--ckpt hf --prompt=", "prompt 1 is empty", "give it at least one token"),
        wrong_flag(
            "an id beyond the vocabulary",
            *(LLAMA, "--ckpt hf --prompt-ids 7 --prompt-ids 7,64"),
            "prompt 2: token id [64] is outside the vocabulary of 64",
        ),
        wrong_flag(
            "a negative id",
            *(LLAMA, "--ckpt hf --prompt-ids=7,-1", "prompt 1: token id [-1] is outside the vocabulary of 64"),
        ),
        wrong_flag(
            "text without a tokenizer",
            *(LLAMA, "--ckpt hf --prompt w7"),
            *("no tokenizer.json beside config.json", "give --prompt-ids", "save one with transformers"),
            hf=remove("tokenizer.json"),
        ),
        wrong_flag(
            "a damaged tokenizer",
            *(LLAMA, "--ckpt hf --prompt w7", "hf/tokenizer.json"),
            hf=overwrite("tokenizer.json", b"{}"),
        ),
        wrong_flag(
            "a batch smaller than the prompts",
            *(LLAMA, "--ckpt hf --batch-size 2 --prompt-ids 7 --prompt-ids 8 --prompt-ids 9"),
            *("3 prompts do not fit --batch-size 2", "raise it to 3"),
        ),
        wrong_flag("dynamic rope beyond its limit", LLAMA, "--ckpt hf --sequence-length 129", *STATIC, hf=DYNAMIC),
        wrong_flag(
            "dynamic rope beyond its limit, converted",
            *(CONVERT, "--hf hf --out out --tp 1 --sequence-length 129", *STATIC),
            hf=DYNAMIC,
        ),
        wrong_flag(
            "longrope beyond its limit",
            *(LLAMA, "--ckpt hf --sequence-length 65 --prompt-ids 7,8"),
            *("--sequence-length 65 exceeds 64", "longrope rope", "which a static graph cannot", "use 64 or less"),
            hf=LONGROPE,
        ),
        wrong_flag(
            "logits into an absent folder",
            *(LLAMA, "--ckpt hf --prompt-ids 7,8 --output-logits nowhere/logits.safetensors"),
            *("--output-logits nowhere/logits.safetensors", "nowhere is not a directory, make it first"),
        ),
        wrong_flag(
            "logits into a folder's name",
            *(
                LLAMA,
                "--ckpt hf --prompt-ids 7,8 --max-new-tokens 1 --output-logits weights1",
                "--output-logits weights1",
            ),
        ),
        wrong_flag(
            "the HF directory as --out",
            *(CONVERT, "--hf hf --out weights1/../hf --tp 1"),
            *("--out weights1/../hf is the HF directory itself", "name another one"),
        ),
        wrong_flag(
            "--hf that is converted already",
            *(CONVERT, "--hf weights2 --out out --tp 2"),
            *("--hf weights2 is converted already", "name the HF checkpoint"),
        ),
        wrong_flag(
            "--out that is a file", CONVERT, "--hf hf --out hf/README.md --tp 1", "--out hf/README.md cannot be written"
        ),
        wrong_flag(
            "--prompt-ids that are none",
            *(LLAMA, "--ckpt hf --prompt-ids 7,x", "--prompt-ids: '7,x' is not a list of token ids like 1,2,3"),
        ),
        wrong_flag("no --ckpt", LLAMA, "--prompt-ids 7,8", "--ckpt"),
        wrong_flag("--tp 0", LLAMA, "--ckpt hf --tp 0", "--tp: '0' is not a positive integer"),
        wrong_flag("an unknown --dtype", CONVERT, "--hf hf --out out --tp 1 --dtype int8", "--dtype", "float16"),
        wrong_flag("no --hf", CONVERT, "--out out --tp 1", "--hf DIR or --demo is needed"),
    ],
)
def test_a_wrong_flag_is_refused_and_nothing_is_written(run, command, arguments, spoils, says):
    for folder, spoil in spoils.items():
        spoil(Path(folder))
    before = snapshot()
    assert_refused(run(command, *arguments, stdin=io.StringIO(words(SHORT))), command, *says)
    assert snapshot() == before


@pytest.mark.parametrize("kind", ["yarn", "dynamic", "longrope"])
def test_a_rope_that_transformers_computes_is_refused_where_transformers_is_absent(run, monkeypatch, kind):
    {"yarn": rope("yarn", factor=2.0), "dynamic": DYNAMIC, "longrope": LONGROPE}[kind](Path("hf"))
    flags = (LLAMA, "--ckpt", "hf", "--prompt-ids", "7,8", "--max-new-tokens", 1)
    assert run(*flags).code == 0
    monkeypatch.setitem(sys.modules, "transformers", None)
    assert_refused(run(*flags), LLAMA, f"config.json: rope_type '{kind}' is computed by transformers: pip install")


def test_a_rope_that_is_computed_here_needs_no_transformers(run, monkeypatch, hf_ids):
    monkeypatch.setitem(sys.modules, "transformers", None)
    assert new_ids(run(LLAMA, "--ckpt", "hf", "--prompt-ids", "7,8", "--json")) == [hf_ids([7, 8], 64)]


def test_piped_bytes_that_are_no_text_are_refused(run):
    piped = io.TextIOWrapper(io.BytesIO(b"w7 \xff\xfe"), encoding="utf-8")
    assert_refused(run(LLAMA, "--ckpt", "hf", stdin=piped), LLAMA, "standard input")


@pytest.mark.parametrize(
    "command, arguments, says",
    [
        (LLAMA, ["--ckpt", "hf", "--prompt-ids", "64"], "token id [64] is outside the vocabulary of 64"),
        (CONVERT, ["--hf", "weights2", "--out", "out", "--tp", "2"], "--hf weights2 is converted already"),
    ],
    ids=[LLAMA, CONVERT],
)
def test_a_refusal_in_a_process_of_its_own_is_one_line_and_exit_code_2(command, arguments, says):
    assert_refused(run_process(ROOT / command, *arguments), command, says)

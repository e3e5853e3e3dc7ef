"""Both commands as a user runs them: what they print and where, which files they write, and how they refuse.

Numerics are tested elsewhere, and variants of real checkpoints in `test_checkpoints.py`. Here the checkpoint is tiny
and random, and the ids that a command prints have to be those of HF's own `generate`. Importing torch takes most of the
time of a new process, so most calls execute the script in this one, by `runpy` and under the name `__main__`. Where
ranks are started, and for one example of each other kind of call, there is a real process.
"""

import io
import json
import os
import re
import resource
import runpy
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer
from tokenizers.decoders import Fuse
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Split, Whitespace
from torch import Tensor

from tests.helpers import ROOT, hf_greedy, hf_model

LLAMA, CONVERT = "llama_neuron.py", "convert_weights.py"

WORDS = ["<unk>", "Photosynthesis", "is", "the", "process", "by", "which", *(f"w{number}" for number in range(7, 96))]
BUILT_IN = [1, 2, 3, 4, 5, 6]  # the sentence for those who give none
SHORT, MIDDLE, LONG = [7, 8], [40, 41, 42, 43], [21, 22, 23, 24, 33, 26, 27, 28, 29]
EOS = [11, 10]  # of generation_config.json: one ends SHORT, the other MIDDLE; LONG goes on
CONFIG_EOS = 4  # of config.json, which counts only if there is no generation_config.json: both have it in their middle

# neuron_config.json if no flag says otherwise; `fused_qkv` is for other readers
SETTINGS = {"tp_degree": 1, "batch_size": 1, "sequence_length": 256, "torch_dtype": "float32"}
SETTINGS |= {"vocab_parallel": False, "context_encoding_buckets": None, "prefill_chunk_size": None}
TIMINGS = ["load_s", "compile_s", "prefill_s", "prefill_tokens", "decode_s", "decode_tokens", "decode_tokens_per_s"]
TIMINGS += ["weight_gb_per_s", "peak_rss_bytes"]


# ---- checkpoints and oracle


@pytest.fixture(scope="session")
def originals(hf_checkpoint: Callable, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with `hf`, a checkpoint by transformers, and its conversions `weights1` (--tp 1) and `weights2`."""
    folder = tmp_path_factory.mktemp("originals")
    hf = shutil.copytree(hf_checkpoint("llama-3"), folder / "hf")
    edit_json(hf / "config.json", eos_token_id=CONFIG_EOS)
    edit_json(hf / "generation_config.json", eos_token_id=EOS)
    tokenizer = Tokenizer(WordLevel({word: number for number, word in enumerate(WORDS)}, unk_token=WORDS[0]))
    tokenizer.pre_tokenizer = Whitespace()
    tokenizer.add_special_tokens([WORDS[token] for token in EOS])
    # transformers leaves both behind in what it saves after a padded call: they may not cut or pad a prompt
    tokenizer.enable_truncation(2)
    tokenizer.enable_padding(length=7)
    tokenizer.save(str(hf / "tokenizer.json"))
    (hf / "tokenizer_config.json").write_text('{"tokenizer_class": "PreTrainedTokenizerFast"}')
    (hf / "README.md").write_text("No part of a conversion.\n")
    for tp in (1, 2):
        with pytest.MonkeyPatch.context() as patch:
            assert execute(patch, CONVERT, "--hf", hf, "--out", folder / f"weights{tp}", "--tp", tp) == 0
    return folder


@pytest.fixture(autouse=True)
def checkpoints(originals: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Copies of `hf`, `weights1` and `weights2` in the working directory, for a test to spoil."""
    shutil.copytree(originals, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)


@pytest.fixture(scope="session")
def hf_ids(hf_checkpoint: Callable) -> Callable[..., list[int]]:
    """The oracle: what HF's model adds to a prompt, greedily, up to the first EOS."""
    model = hf_model(hf_checkpoint("llama-3"), torch.float32)

    def continuation(prompt: list[int], max_new_tokens: int, eos: list[int] = EOS) -> list[int]:
        _, ids = hf_greedy(model, prompt, max_new_tokens)
        ends = [number for number, token in enumerate(ids, start=1) if token in eos]
        return ids[: min(ends, default=None)]

    return continuation


def words(ids: list[int]) -> str:
    """The text of ids, as a WordLevel tokenizer writes it; the two EOS tokens are special, and not shown."""
    return " ".join(WORDS[token] for token in ids if token not in EOS)


def by_ids(*prompts: list[int]) -> list[str]:
    """A flag for each prompt."""
    return ["--prompt-ids=" + ",".join(map(str, prompt)) for prompt in prompts]


def edit_json(file: Path, drop: str = "", **changes: object) -> None:
    content = json.loads(file.read_text()) | changes
    content.pop(drop, None)
    file.write_text(json.dumps(content))


def shards(tp: int) -> list[str]:
    return [f"tp{rank}_sharded_checkpoint.safetensors" for rank in range(tp)]


def listing(folder: str) -> set[str]:
    return {path.name for path in Path(folder).iterdir()}


def shell(line: str) -> Callable[[Path], object]:
    return lambda folder: subprocess.run(line, shell=True, cwd=folder, check=True)


def with_tensors(change: Callable[[dict[str, Tensor]], dict[str, Tensor]]) -> Callable[[Path], None]:
    return lambda hf: save_file(change(load_file(hf / "model.safetensors")), hf / "model.safetensors")


def pickled(change: Callable[[dict[str, Tensor]], object]) -> Callable[[Path], None]:
    """A pytorch_model.bin in place of model.safetensors."""

    def spoil(hf: Path) -> None:
        torch.save(change(load_file(hf / "model.safetensors")), hf / "pytorch_model.bin")
        (hf / "model.safetensors").unlink()

    return spoil


# ---- calling a command


class Ran(NamedTuple):
    """What a command left behind: exit code, standard output, standard error."""

    code: int
    out: str
    err: str


def execute(monkeypatch: pytest.MonkeyPatch, command: str, *arguments: object) -> int:
    """Executes a script in this process as `python SCRIPT` does; returns its exit code."""
    monkeypatch.setattr(sys, "argv", [command, *map(str, arguments)])
    handler, stdout = signal.getsignal(signal.SIGTERM), sys.stdout
    try:
        runpy.run_path(str(ROOT / command), run_name="__main__")
    except SystemExit as stop:
        return stop.code or 0
    finally:
        signal.signal(signal.SIGTERM, handler)
        sys.stdout = stdout
    return 0


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> Callable[..., Ran]:
    def run_in_this_process(command: str, *arguments: object, stdin: io.TextIOBase | None = None) -> Ran:
        monkeypatch.setattr(sys, "stdin", stdin)
        capsys.readouterr()  # what transformers may have said before
        return Ran(execute(monkeypatch, command, *arguments), *capsys.readouterr())

    return run_in_this_process


@pytest.fixture
def convert(run: Callable[..., Ran]) -> Callable[..., None]:
    """convert(tp, *flags): `convert_weights.py --hf hf --out out`, which must go well and say nothing."""

    def convert_hf(tp: int, *flags: object) -> None:
        assert run(CONVERT, "--hf", "hf", "--out", "out", "--tp", tp, *flags) == (0, "", "")

    return convert_hf


def run_process(*command: object, stdin: str = "", **environment: str) -> Ran:
    """`python COMMAND ...` in a process of its own."""
    line = [sys.executable, *map(str, command)]
    environment = os.environ | {"OMP_NUM_THREADS": "1"} | environment
    ran = subprocess.run(line, input=stdin, capture_output=True, text=True, env=environment, timeout=100)
    return Ran(ran.returncode, ran.stdout, ran.stderr)


def result(ran: Ran) -> dict:
    """The JSON object of a --json call that went well."""
    assert ran.code == 0, ran.err
    return json.loads(ran.out)


@pytest.fixture
def ask(run: Callable[..., Ran]) -> Callable[..., dict]:
    """ask(ckpt, prompts, *flags): what `llama_neuron.py --json` prints."""

    def ask_here(ckpt: str, prompts: list[list[int]], *flags: object) -> dict:
        return result(run(LLAMA, "--ckpt", ckpt, *by_ids(*prompts), *flags, "--json"))

    return ask_here


def new_ids(answer: dict) -> list[list[int]]:
    return [row["ids"] for row in answer["completions"]]


def assert_refused(ran: Ran, command: str, *says: str) -> None:
    """One line on stderr that says all of `says`, exit code 2, and nothing on stdout."""
    assert (ran.code, ran.out) == (2, ""), ran.err
    assert ran.err.startswith(f"{command}: error: ") and ran.err.count("\n") == 1, ran.err
    assert [part for part in says if part not in ran.err] == [], ran.err


# ---- llama_neuron.py


def assert_timings(err: str, prefill: int, decode: int) -> None:
    """The last line on stderr says which device `auto` took, and all timings, with these numbers of tokens."""
    line = err.splitlines()[-1]
    assert [name for name in ("cpu", *TIMINGS) if name not in line] == []
    assert re.search(rf"\bprefill_tokens {prefill}\b", line) and re.search(rf"\bdecode_tokens {decode}\b", line)


def test_json_is_one_object_on_stdout_with_every_key_of_the_design(hf_ids):
    prompts = ("--prompt", words(SHORT), *by_ids(LONG), "--prompt", words(MIDDLE))
    answer = result(run_process(ROOT / LLAMA, "--ckpt", "weights1", *prompts, "--max-new-tokens", 16, "--json"))
    assert list(answer) == ["completions", "timings", "config"]
    rows = []
    for prompt, reason in ((SHORT, "eos"), (LONG, "length"), (MIDDLE, "eos")):
        ids = hf_ids(prompt, 16)
        row = {"prompt": words(prompt), "prompt_ids": prompt, "ids": ids, "text": words(ids), "finish_reason": reason}
        rows.append(row)
    assert answer["completions"] == rows
    assert list(answer["timings"]) == TIMINGS
    expected = SETTINGS | {"device": "cpu", "attn": "eager", "batch_size": 3, "eos_token_id": EOS, "vocab_size": 96}
    assert answer["config"] | expected == answer["config"]


class Screen(io.StringIO):
    """A terminal that remembers what it showed after each flush."""

    shown = ()

    def isatty(self) -> bool:
        return True

    def flush(self) -> None:
        self.shown += (self.getvalue(),)


def pipe(content: bytes) -> io.TextIOWrapper:
    return io.TextIOWrapper(io.BytesIO(content), encoding="utf-8")


def test_piped_text_is_continued_on_stdout_token_by_token_and_timings_go_to_stderr(run, monkeypatch, hf_ids):
    screen = Screen()
    monkeypatch.setattr(sys, "stdout", screen)
    ran = run(LLAMA, "--ckpt", "weights1", "--max-new-tokens", 16, stdin=pipe(words(MIDDLE).encode() + b"\n"))
    ids = hf_ids(MIDDLE, 16)
    assert screen.shown[: len(ids)] == tuple(words(MIDDLE + ids[:end]) for end in range(1, len(ids) + 1))
    assert screen.getvalue() == words(MIDDLE + ids) + "\n"
    assert_timings(ran.err, prefill=len(MIDDLE), decode=len(ids) - 1)


def test_texts_of_a_batch_are_shown_one_after_the_other_and_piped_text_is_left_unread(run, hf_ids):
    piped = pipe(b"w9 w9")
    prompts = ("--prompt", words(SHORT), *by_ids(LONG))
    ran = run(LLAMA, "--ckpt", "weights1", *prompts, "--max-new-tokens", 4, stdin=piped)
    short, long = hf_ids(SHORT, 4), hf_ids(LONG, 4)
    assert ran.out == f"{words(SHORT + short)}\n\n{words(LONG + long)}\n"
    assert_timings(ran.err, prefill=len(SHORT + LONG), decode=len(short + long) - 2)
    assert piped.read() == "w9 w9"


@pytest.mark.parametrize("stdin", [None, pipe(b""), Screen("not to be read")], ids=["closed", "empty", "a terminal"])
def test_without_prompt_and_piped_text_the_built_in_sentence_is_continued(run, hf_ids, stdin):
    ran = run(LLAMA, "--ckpt", "weights1", "--max-new-tokens", 3, stdin=stdin)
    assert (ran.code, ran.out) == (0, words(BUILT_IN + hf_ids(BUILT_IN, 3)) + "\n")


def test_bytes_that_are_no_utf_8_count_as_an_unknown_character(run, ask):
    flags = ("--ckpt", "weights1", "--max-new-tokens", 1, "--json")
    piped = result(run(LLAMA, *flags, stdin=pipe(b"w7 \xff")))
    for answer in (piped, ask("weights1", [], "--prompt", os.fsdecode(b"w7 \xff"), "--max-new-tokens", 1)):
        assert answer["completions"][0]["prompt_ids"] == [7, WORDS.index("<unk>")]


@pytest.fixture
def letters() -> Callable[[str], list[int]]:
    """`hf` gets a token for every character, one of them special. letters(text): the ids of HF's AutoTokenizer."""
    tokens = ["\n", "é", *map(chr, range(32, 125)), "<end>"]
    tokenizer = Tokenizer(WordLevel({token: number for number, token in enumerate(tokens)}, unk_token="?"))
    tokenizer.pre_tokenizer = Split("", "isolated")
    tokenizer.decoder = Fuse()
    tokenizer.add_special_tokens(["<end>"])
    tokenizer.save("hf/tokenizer.json")
    return lambda text: transformers.AutoTokenizer.from_pretrained("hf")(text).input_ids


TEMPLATE = "<end>user\nHi<end>\n<end>assistant\n"


@pytest.mark.parametrize(
    ("piped", "prompt"),
    [
        ("one line\n", "one line"),  # as `echo` writes it
        ("one line", "one line"),
        (TEMPLATE, TEMPLATE),
        ("    if x:\n        y\n", "    if x:\n        y\n"),
        ("    x\n", "    x"),
        ("two\n\n", "two\n\n"),
        ("   ", "   "),
        ("\n\n", "\n\n"),
    ],
    ids=repr,
)
def test_piped_text_is_taken_as_it_is_but_for_the_newline_of_a_single_line(run, convert, letters, piped, prompt):
    convert(1)
    answer = result(run(LLAMA, "--ckpt", "out", "--max-new-tokens", 1, "--json", stdin=pipe(piped.encode())))
    assert answer["completions"][0]["prompt_ids"] == letters(prompt)


def test_an_empty_line_is_an_empty_prompt(run):
    assert_refused(run(LLAMA, "--ckpt", "weights1", stdin=pipe(b"\n")), LLAMA, "prompt 1 is empty")


@pytest.mark.parametrize("split", [True, False])
def test_special_tokens_in_a_text_are_split_if_the_tokenizer_says_so(convert, ask, letters, split):
    edit_json(Path("hf/tokenizer_config.json"), split_special_tokens=split)
    convert(1)
    answer = ask("out", [], "--prompt", TEMPLATE, "--max-new-tokens", 1)
    assert answer["completions"][0]["prompt_ids"] == letters(TEMPLATE)
    assert (95 in letters(TEMPLATE)) == (not split)


def test_a_home_is_found_where_the_shell_does_not_look(ask, monkeypatch, hf_ids):
    monkeypatch.setenv("HOME", str(Path.cwd()))
    answer = result(run_process(ROOT / LLAMA, "--ckpt=~/weights1", *by_ids(MIDDLE), "--json"))
    assert new_ids(answer) == [hf_ids(MIDDLE, 64)]


@pytest.mark.parametrize(
    "variables",
    [
        {"RANK": "0"},
        {"RANK": "1", "WORLD_SIZE": "2"},
        {"RANK": "one", "WORLD_SIZE": ""},
        {"LOCAL_RANK": "1"},
        {"MASTER_ADDR": "nowhere", "MASTER_PORT": "x"},
        {"SLURM_PROCID": "1", "SLURM_NTASKS": "2", "OMPI_COMM_WORLD_RANK": "1", "PMI_RANK": "1"},
        {"TORCHELASTIC_RUN_ID": "none"},
        {"TORCHELASTIC_RUN_ID": "none", "RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "1"},
    ],
    ids=str,
)
def test_half_of_a_launchers_variables_mean_nothing(run, ask, monkeypatch, hf_ids, variables):
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert new_ids(ask("weights1", [MIDDLE])) == [hf_ids(MIDDLE, 64)]
    assert_refused(run(LLAMA, "--ckpt", "weights1", "--tp", 2), LLAMA, "--tp 2")


def test_half_of_a_launchers_variables_mean_nothing_to_several_ranks(hf_ids):
    variables = {"TORCHELASTIC_RUN_ID": "none", "RANK": "1", "WORLD_SIZE": "3", "LOCAL_RANK": "0", "MASTER_ADDR": "x"}
    answer = result(run_process(ROOT / LLAMA, "--ckpt", "weights2", *by_ids(MIDDLE), "--json", **variables))
    assert new_ids(answer) == [hf_ids(MIDDLE, 64)]


@pytest.mark.parametrize("script", [ROOT / LLAMA, Path("alone", LLAMA)], ids=["whole", "alone"])
@pytest.mark.parametrize(
    "variables",
    [{"PYTHONIOENCODING": "ascii"}, {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}],
    ids=lambda variables: next(iter(variables)),
)
def test_characters_that_standard_output_lacks_are_replaced(convert, letters, script, variables):
    convert(1)
    Path("alone").mkdir()
    shutil.copy(ROOT / LLAMA, "alone")
    for prompts, stdin in ((("--prompt", "né"), ""), ((), "né\n")):
        ran = run_process(script, "--ckpt", "out", *prompts, "--max-new-tokens", 1, stdin=stdin, **variables)
        assert ran.code == 0 and ran.out.startswith("n?"), ran.err


LONGER = [7] * 1100


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        ((), ["prompt of 1,100 tokens", "eager attention", "--attn sdpa"]),
        (("--attn", "sdpa"), []),
        (("--attn", "flash"), []),
    ],
    ids=str,
)
def test_a_long_prompt_with_eager_attention_is_said_to_be_slow(run, flags, says):
    edit_json(Path("weights1/config.json"), max_position_embeddings=2048)
    flags = ("--sequence-length", 2048, *by_ids(LONGER), "--max-new-tokens", 1, "--json", *flags)
    ran = run(LLAMA, "--ckpt", "weights1", *flags)
    _, *lines = ran.err.splitlines()  # the first says that config.json was edited
    assert ran.code == 0 and len(lines) == bool(says)
    assert [part for part in says if part not in lines[0]] == []


def test_more_slots_than_positions_are_said_and_used(run, hf_ids):
    flags = ("--sequence-length", 4096, *by_ids(MIDDLE), "--json")
    ran = run(LLAMA, "--ckpt", "weights1", *flags)
    assert new_ids(result(ran)) == [hf_ids(MIDDLE, 64)]
    assert ran.err.count("\n") == 1 and "4,096 slots" in ran.err and "256 positions" in ran.err
    assert run(LLAMA, "--ckpt", "weights1", "--sequence-length", 256, *flags[2:]).err == ""


def test_without_a_tokenizer_ids_are_shown_as_they_are_and_text_is_refused(run, hf_ids):
    for name in ("tokenizer.json", "tokenizer_config.json"):
        Path("hf", name).unlink()
    ran = run(CONVERT, "--hf", "hf", "--out", "out", "--tp", 1)
    assert ran.code == 0 and "--prompt-ids" in ran.err
    ran = run(LLAMA, "--ckpt", "out", *by_ids(MIDDLE), "--max-new-tokens", 4)
    assert json.loads(ran.out) == MIDDLE + hf_ids(MIDDLE, 4)
    assert_refused(run(LLAMA, "--ckpt", "out", "--prompt", "w7"), LLAMA, "out has no tokenizer.json", "--prompt-ids")


@pytest.mark.parametrize("attn", ["eager", "sdpa", "flash"])
def test_prompts_of_different_lengths_share_a_batch_and_each_gets_the_ids_of_hf(ask, hf_ids, attn):
    prompts = [MIDDLE, LONG, SHORT, BUILT_IN]
    answer = ask("weights1", prompts, "--attn", attn, "--max-new-tokens", 24)
    assert new_ids(answer) == [hf_ids(prompt, 24) for prompt in prompts]
    assert answer["config"]["attn"] == attn


@pytest.mark.parametrize(
    ("flags", "counts"),
    [
        ((), (64, 64)),
        (("--max-new-tokens", 7), (7, 7)),
        (("--max-new-tokens", 1), (1, 1)),
        (("--sequence-length", 14), (5, 10)),  # prompts of 9 and 4 tokens leave room for 5 and 10
        (("--sequence-length", 10), (1, 6)),
    ],
    ids=str,
)
def test_without_eos_texts_go_on_to_max_new_tokens_or_until_the_cache_is_full(ask, hf_ids, flags, counts):
    answer = ask("weights1", [LONG, MIDDLE], *flags, "--ignore-eos")
    for row, prompt, count in zip(answer["completions"], (LONG, MIDDLE), counts, strict=True):
        assert (len(row["ids"]), row["finish_reason"]) == (count, "length")
        assert row["ids"] == hf_ids(prompt, count, eos=[])
    assert answer["timings"]["decode_tokens"] == sum(counts) - 2
    assert (answer["timings"]["decode_tokens_per_s"] > 0) == (sum(counts) > 2)


def test_the_batch_is_as_converted_unless_a_flag_says_otherwise_or_there_are_more_prompts(ask, convert, hf_ids):
    convert(1, "--batch-size", 2)
    for prompts, flags, rows in (([SHORT], (), 2), ([SHORT] * 3, (), 3), ([SHORT], ("--batch-size", 5), 5)):
        answer = ask("out", prompts, *flags)
        assert new_ids(answer) == [hf_ids(SHORT, 64) for _ in prompts]
        assert answer["config"]["batch_size"] == rows


def gigabytes_per_step(tp: int) -> float:
    """What all ranks read, by HF's tensors: an embedding is looked up in, not read; every rank has all norms."""
    total = 0
    for name, tensor in load_file("hf/model.safetensors").items():
        if "embed_tokens" not in name:
            total += tensor.nbytes * (tp if name.endswith("norm.weight") else 1)
    return total / 1e9


def tie(hf: Path) -> None:
    """Makes a checkpoint whose lm_head is its embedding, and is in the file all the same."""
    edit_json(hf / "config.json", tie_word_embeddings=True)
    with_tensors(lambda tensors: tensors | {"lm_head.weight": tensors["model.embed_tokens.weight"].clone()})(hf)


@pytest.mark.parametrize("change", [lambda hf: None, tie], ids=["untied", "tied"])
def test_timings_count_the_tokens_and_the_weights(ask, convert, change):
    change(Path("hf"))
    convert(1)
    timings = ask("out", [LONG, MIDDLE], "--max-new-tokens", 6, "--ignore-eos")["timings"]
    assert (timings["prefill_tokens"], timings["decode_tokens"]) == (len(LONG + MIDDLE), 2 * 5)
    assert timings["decode_tokens_per_s"] == pytest.approx(10 / timings["decode_s"])
    assert timings["weight_gb_per_s"] == pytest.approx(5 * gigabytes_per_step(1) / timings["decode_s"], rel=1e-3)
    assert 0 <= timings["compile_s"] < 0.1
    assert 0 < timings["load_s"] < 60 and 0 < timings["prefill_s"] < 60
    assert 50e6 < timings["peak_rss_bytes"] < 50e9


def test_two_ranks_print_what_one_prints(run, hf_ids):
    flags = (*by_ids(SHORT, LONG), "--max-new-tokens", 16)
    one, two = run(LLAMA, "--ckpt", "weights1", *flags), run_process(ROOT / LLAMA, "--ckpt", "weights2", *flags)
    assert (two.code, two.out) == (0, one.out), two.err
    assert_timings(two.err, prefill=len(SHORT + LONG), decode=len(hf_ids(SHORT, 16) + hf_ids(LONG, 16)) - 2)


def test_ranks_that_share_the_vocabulary_read_piped_input_and_report_the_weights_of_both(convert, hf_ids):
    convert(2, "--vocab-parallel")
    flags = ("--ckpt", "out", "--tp", 2, "--max-new-tokens", 16, "--json")
    answer = result(run_process(ROOT / LLAMA, *flags, stdin=words(LONG)))
    assert new_ids(answer) == [hf_ids(LONG, 16)]
    assert (answer["config"]["tp_degree"], answer["config"]["vocab_parallel"]) == (2, True)
    rate = 15 * gigabytes_per_step(2) / answer["timings"]["decode_s"]
    assert answer["timings"]["weight_gb_per_s"] == pytest.approx(rate, rel=1e-3)


def test_torchrun_starts_the_ranks_and_only_the_first_reads_its_input_and_prints(hf_ids):
    torchrun = ("-m", "torch.distributed.run", "--nproc-per-node", 2)
    answer = result(run_process(*torchrun, ROOT / LLAMA, "--ckpt", "weights2", "--json", stdin=words(LONG)))
    assert new_ids(answer) == [hf_ids(LONG, 64)]
    assert answer["config"]["tp_degree"] == 2


@pytest.fixture
def alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """A folder with llama_neuron.py and nothing else of this project, and two conversions."""
    for name in ("weights1", "weights2"):
        shutil.copytree(name, f"alone/{name}")
    shutil.copy(ROOT / LLAMA, "alone")
    monkeypatch.chdir("alone")
    monkeypatch.delenv("PYTHONPATH", raising=False)


@pytest.mark.parametrize("tp", [1, 2])
def test_the_file_alone_in_a_folder_gives_the_ids_of_hf(alone, hf_ids, tp):
    ran = run_process(LLAMA, "--ckpt", f"./weights{tp}", "--tp", tp)
    assert (ran.code, ran.out) == (0, words(BUILT_IN + hf_ids(BUILT_IN, 64)) + "\n"), ran.err


@pytest.mark.parametrize("flag", ["--json", "--compile"])
def test_the_file_alone_refuses_what_the_folders_do(alone, flag):
    assert_refused(run_process(LLAMA, "--ckpt", "weights1", flag), LLAMA, "--json and --compile need", "launch/")


def test_the_file_alone_refuses_a_damaged_shard_by_name(alone):
    damaged = Path("weights1", shards(1)[0])
    os.truncate(damaged, 1000)
    assert_refused(run_process(LLAMA, "--ckpt", "./weights1"), LLAMA, str(damaged), "convert again")


@pytest.fixture
def foreign(monkeypatch: pytest.MonkeyPatch) -> None:
    """Packages that others have put on sys.path under the names of our folders."""
    for name in ("checkpoint", "cpu", "launch", "tests", "tools"):
        package = Path("foreign", name)
        package.mkdir(parents=True)
        (package / "__init__.py").write_text("raise RuntimeError('foreign code was imported')\n")
    monkeypatch.setenv("PYTHONPATH", str(Path("foreign").resolve()))


@pytest.mark.parametrize("tp", [1, 2])
def test_foreign_packages_with_the_names_of_our_folders_do_not_break_the_file_alone(foreign, hf_ids, tp):
    shutil.copytree(f"weights{tp}", "alone/weights")
    shutil.copy(ROOT / LLAMA, "alone")
    ran = run_process("alone/llama_neuron.py", "--ckpt", "alone/weights", "--tp", tp)
    assert (ran.code, ran.out) == (0, words(BUILT_IN + hf_ids(BUILT_IN, 64)) + "\n"), ran.err


def test_foreign_packages_with_the_names_of_our_folders_do_not_break_the_commands(foreign, monkeypatch, hf_ids):
    here = Path().resolve()
    assert run_process(ROOT / CONVERT, "--hf", "hf", "--out", "out", "--tp", 2) == (0, "", "")
    flags = (ROOT / LLAMA, "--ckpt", "out", *by_ids(MIDDLE), "--json")
    for launcher in ((), ("-m", "torch.distributed.run", "--nproc-per-node", 2)):
        assert new_ids(result(run_process(*launcher, *flags))) == [hf_ids(MIDDLE, 64)]
    monkeypatch.chdir(ROOT)  # as `python -m tools.NAME` is called
    verified = run_process("-m", "tools.verify", here / "out")
    assert verified.code == 0 and "2 of 2 shards" in verified.out, verified.err


# ---- convert_weights.py


def assert_shards_of_weights2(folder: str) -> None:
    """The tensors in `folder` are those of the conversion that the tests start with."""
    for name in shards(2):
        ours, expected = load_file(Path(folder, name)), load_file(Path("weights2", name))
        assert set(ours) == set(expected)
        for key, tensor in expected.items():
            assert torch.equal(ours[key], tensor), key


def test_the_converter_writes_shards_config_and_tokenizer_and_prints_nothing():
    assert run_process(ROOT / CONVERT, "--hf", "hf", "--out", "new/out", "--tp", 2) == (0, "", "")
    copied = {"config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json"}
    written = listing("new/out") - {"special_tokens_map.json"}  # which transformers 4 writes too
    assert written == {*copied, "neuron_config.json", ".conversion", *shards(2)}
    assert Path("new/out/generation_config.json").read_bytes() == Path("hf/generation_config.json").read_bytes()
    assert_shards_of_weights2("new/out")
    ran = run_process(ROOT / CONVERT, "--hf", "new/out", "--out", "out", "--tp", 2)
    assert_refused(ran, CONVERT, "--hf new/out is already a conversion")


@pytest.mark.parametrize(
    ("flags", "settings"),
    [
        (("--batch-size", 2), {"batch_size": 2}),
        (("--sequence-length", 512, "--vocab-parallel"), {"sequence_length": 512, "vocab_parallel": True}),
        (("--buckets", "8,32"), {"context_encoding_buckets": [8, 32]}),
        (("--buckets", "5"), {"context_encoding_buckets": [5]}),  # too short for some prompts
        (("--prefill-chunk-size", 4), {"prefill_chunk_size": 4}),
        (("--prefill-chunk-size", 64), {"prefill_chunk_size": 64}),
        # 11 tokens are two chunks, of which the second would end beyond the cache
        (("--prefill-chunk-size", 8, "--sequence-length", 14), {"prefill_chunk_size": 8, "sequence_length": 14}),
    ],
    ids=str,
)
def test_flags_of_the_converter_are_settings_that_keep_the_ids_of_hf(ask, convert, hf_ids, flags, settings):
    convert(1, *flags)
    written = json.loads(Path("out/neuron_config.json").read_text())
    assert written | SETTINGS | {"fused_qkv": True} | settings == written
    prompts = [SHORT, LONG, MIDDLE, LONG + SHORT]
    assert new_ids(ask("out", prompts, "--max-new-tokens", 3)) == [hf_ids(prompt, 3) for prompt in prompts]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_all_tensors_have_the_dtype_of_the_flag_and_the_cache_has_2048_slots_if_the_model_goes_on(convert, dtype):
    edit_json(Path("hf/config.json"), max_position_embeddings=131072)
    convert(1, "--dtype", dtype)
    written = json.loads(Path("out/neuron_config.json").read_text())
    assert (written["torch_dtype"], written["sequence_length"]) == (dtype, 2048)
    tensors = load_file(f"out/{shards(1)[0]}")
    assert {str(tensor.dtype) for name, tensor in tensors.items() if name != "rank_util.rank"} == {f"torch.{dtype}"}


@pytest.mark.parametrize(("tp", "vocab_parallel"), [(1, False), (1, True), (2, True), (2, False)])
def test_a_tied_lm_head_is_stored_only_if_it_is_not_the_shard_of_the_embedding(convert, tp, vocab_parallel):
    tie(Path("hf"))
    convert(tp, *["--vocab-parallel"] * vocab_parallel)
    rows = load_file("hf/model.safetensors")["model.embed_tokens.weight"].chunk(tp)
    for rank, name in enumerate(shards(tp)):
        shard = load_file(Path("out", name))
        stored = tp == 2 and not vocab_parallel
        assert ("lm_head.weight" in shard) == stored
        assert torch.equal(shard["lm_head.weight" if stored else "model.embed_tokens.weight"], rows[rank])


def as_sharded_safetensors(hf: Path) -> None:
    model = transformers.LlamaForCausalLM.from_pretrained(hf, dtype=torch.float32)
    (hf / "model.safetensors").unlink()
    model.save_pretrained(hf, max_shard_size="20KB")
    assert len(list(hf.glob("model-*.safetensors"))) > 2


def as_sharded_pytorch_bin(hf: Path) -> None:
    tensors = load_file(hf / "model.safetensors")
    (hf / "model.safetensors").unlink()
    weight_map = {name: f"pytorch_model-{number % 2}.bin" for number, name in enumerate(tensors)}
    for file in {*weight_map.values()}:
        torch.save({name: tensors[name] for name in tensors if weight_map[name] == file}, hf / file)
    (hf / "pytorch_model.bin.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


LAYOUTS = {
    "sharded safetensors": as_sharded_safetensors,
    "sharded .bin": as_sharded_pytorch_bin,
    "one .bin": pickled(lambda tensors: tensors),
    "a link into a cache": shell("mv model.safetensors ../blob && ln -s ../blob model.safetensors"),
}


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
def test_every_layout_of_a_checkpoint_gives_the_same_shards(run, layout):
    layout(Path("hf"))
    assert run(CONVERT, "--hf", "hf", "--out", "out", "--tp", 2).code == 0
    assert_shards_of_weights2("out")


def test_converting_again_leaves_nothing_of_the_conversion_before(run, convert):
    convert(4)
    before = listing("out")
    convert(2)
    assert listing("out") == before - {*shards(4)[2:]}
    for name in ("generation_config.json", "tokenizer.json", "tokenizer_config.json"):
        Path("hf", name).unlink()
    assert run(CONVERT, "--hf", "hf", "--out", "out", "--tp", 2).code == 0
    assert listing("out") == {"config.json", "neuron_config.json", ".conversion", *shards(2)}


def assert_gone(run: Callable[..., Ran]) -> None:
    """weights2 was complete until it was converted again."""
    assert listing("weights2") == {".conversion"}
    ran = run(LLAMA, "--ckpt", "weights2")
    assert_refused(ran, LLAMA, "--ckpt weights2", "not a complete conversion", "convert again")
    assert_refused(run(CONVERT, "--hf", "weights2", "--out", "out", "--tp", 1), CONVERT, "--hf weights2 is already")


@pytest.mark.parametrize(
    ("limit", "file"), [(1000, "weights2"), (100_000, f"weights2/{shards(2)[0]} cannot be written")]
)
def test_a_conversion_that_fills_the_disk_ends_in_one_line_and_leaves_nothing(run, limit, file):
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, before[1]))  # less than tokenizer.json, less than a shard
    try:
        ran = run(CONVERT, "--hf", "hf", "--out", "weights2", "--tp", 2)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert (ran.code, ran.out, ran.err.count("\n")) == (1, "", 1)
    assert file in ran.err and "File too large" in ran.err
    assert_gone(run)


def test_progress_is_shown_on_a_terminal_and_an_interruption_ends_in_one_line_and_leaves_nothing(run, monkeypatch):
    class Impatient(Screen):
        interrupted = False

        def write(self, text: str) -> int:
            if re.search(r"\b[1-9]\d*/1000\b", text) and not self.interrupted:
                self.interrupted = True
                raise KeyboardInterrupt
            return super().write(text)

    with monkeypatch.context() as patch:
        patch.setattr(sys, "stderr", Impatient())
        ran = run(CONVERT, "--hf", "hf", "--out", "weights2", "--tp", 1000)
        line = sys.stderr.getvalue().splitlines()[-1]
    assert (ran.code, line) == (130, "convert_weights.py: error: interrupted")
    assert_gone(run)


# ---- refusals


def snapshot() -> dict[Path, bytes | None]:
    """Every file and folder in the working directory."""
    return {path: path.read_bytes() if path.is_file() else None for path in Path().rglob("*")}


def fault(name: str, spoil: Callable[[Path], object], *says: str) -> object:
    """A way to spoil a directory, and what the refusal has to say."""
    return pytest.param(spoil, says, id=name)


def edited(file: str, drop: str = "", **changes: object) -> Callable[[Path], None]:
    return lambda folder: edit_json(folder / file, drop, **changes)


config, settings = partial(edited, "config.json"), partial(edited, "neuron_config.json")


def rope(kind: str, **parameters: object) -> Callable[[Path], None]:
    return config(rope_parameters={"rope_type": kind, "rope_theta": 10000.0, **parameters})


def index(weight_map: object) -> Callable[[Path], None]:
    """An index in place of model.safetensors, which is still there under two other names."""

    def spoil(hf: Path) -> None:
        shutil.copyfile(hf / "model.safetensors", "outside.safetensors")
        (hf / "model.safetensors").rename(hf / "inside.safetensors")
        (hf / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))

    return spoil


def wrong_key(key: str, value: object, *says: str) -> object:
    return fault(f"{key} {value!r}", config(**{key: value}), "hf/config.json", key, *says)


SIZES = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
CONFIG_FAULTS = [
    fault("no config.json", shell("rm config.json"), "hf/config.json not found", "directory that holds a Llama"),
    fault("no JSON", shell("echo { > config.json"), "hf/config.json cannot be read as JSON"),
    fault("no text", shell(r"printf '\377' > config.json"), "hf/config.json cannot be read as JSON"),
    fault("no object", shell("echo [] > config.json"), "hf/config.json does not hold a JSON object"),
    *(fault(f"no {key}", config(drop=key), "hf/config.json", key) for key in SIZES),
    wrong_key("model_type", "mllama", "'mllama'", "'llama'"),
    wrong_key("quantization_config", {"quant_method": "awq"}, "dequantize it first"),
    wrong_key("hidden_act", "tanh", "'tanh'", "silu, swish, gelu, gelu_pytorch_tanh, relu"),
    wrong_key("hidden_act", ["silu"]),
    wrong_key("dtype", "int8", "'int8'", "bfloat16, float16, float32"),
    wrong_key("num_hidden_layers", -1, "-1"),
    wrong_key("num_hidden_layers", 10**6, "1000000", "from 1 to 10,000"),
    wrong_key("num_hidden_layers", 10**30, "from 1 to 10,000"),
    wrong_key("vocab_size", True, "True"),
    wrong_key("vocab_size", 2**24 + 1, "from 1 to 2^24"),
    wrong_key("rms_norm_eps", 1e30, "1e+30"),
    wrong_key("rms_norm_eps", float("nan"), "nan"),
    wrong_key("rope_theta", 0, "0"),
    wrong_key("num_attention_heads", True, "True"),
    wrong_key("hidden_size", "32", "'32'"),
    wrong_key("rms_norm_eps", "1e-6", "'1e-6'"),
    wrong_key("tie_word_embeddings", 1),
    fault("8 heads for 3 KV heads", config(num_key_value_heads=3), "hf/config.json", "multiple of 3"),
    fault("5 heads", config(drop="head_dim", num_attention_heads=5), "hf/config.json", "head_dim", "multiple of 5"),
    fault("rope in one word", config(rope_parameters="linear"), "hf/config.json", "'linear'"),
    fault("unknown rope", rope("spiral"), "hf/config.json", "'spiral'", "default, linear, dynamic, llama3, yarn, long"),
    fault("rope without its factor", rope("linear"), "hf/config.json", "linear", "factor"),
    fault("half a rotation", rope("default", partial_rotary_factor=0.5), "hf/config.json", "partial_rotary_factor"),
    fault("a nest", shell("python3 -c 'print(9**5 * chr(91))' > config.json"), "hf/config.json", "as JSON"),
    fault("a deep list", config(note=json.loads(40 * "[" + 40 * "]")), "hf/config.json is nested too deeply"),
    fault("a long JSON", shell("truncate -s 5G config.json"), "hf/config.json has 5,368,709,120 bytes"),
    fault("a device", shell("rm config.json && ln -s /dev/zero config.json"), "hf/config.json is not a regular file"),
    fault("a FIFO", shell("rm config.json && mkfifo config.json"), "hf/config.json is not a regular file"),
    fault("a FIFO of templates", shell("mkfifo chat_template.jinja"), "hf/chat_template.jinja is not a regular file"),
    fault("a long tokenizer", shell("truncate -s 5G tokenizer.json"), "hf/tokenizer.json has 5,368,709,120 bytes"),
    fault("EOS in words", edited("generation_config.json", eos_token_id="end"), "hf/generation_config.json"),
]

NORM, EXTRA = "model.norm.weight", "model.layers.0.self_attn.q_norm.weight"
INDEX, SECOND_FILE = "hf/model.safetensors.index.json", "model-00002-of-00002.safetensors"
ABSENT = ("hf has no model.safetensors, pytorch_model.bin or index", "download it again")
DAMAGED = ("hf/model.safetensors cannot be read", "download it")
UNKNOWN = "hf: unexpected tensors"
TENSOR_FAULTS = [
    fault("a missing tensor", with_tensors(lambda t: {NORM: t[NORM]}), "hf: missing tensors", "download it again"),
    fault("a missing layer", config(num_hidden_layers=4), "model.layers.3.input_layernorm.weight"),
    fault("a short norm", with_tensors(lambda t: t | {NORM: torch.ones(63)}), f"hf: {NORM}", "[63]", "asks for [64]"),
    fault("a tensor too many", with_tensors(lambda t: t | {EXTRA: torch.ones(8)}), UNKNOWN, EXTRA),
    fault("a layer too many", config(num_hidden_layers=2), UNKNOWN),
    fault("tied to another lm_head", config(tie_word_embeddings=True), "lm_head.weight", "tie_word_embeddings"),
    fault("an index that goes up", index({NORM: "../outside.safetensors"}), INDEX, "'../outside.safetensors'"),
    fault("an index with an absolute path", index({NORM: "/outside.safetensors"}), INDEX, "'/outside.safetensors'"),
    fault("an index of an absent file", index({NORM: SECOND_FILE}), f"hf/{SECOND_FILE} not found", "download it again"),
    fault("an index of nothing", index({}), *ABSENT),
    fault("an index that is null", index(None), INDEX),
    fault("an index of a number", index({NORM: 1}), INDEX),
    fault("a truncated file", shell("truncate -s -100 model.safetensors"), *DAMAGED),
    fault("an empty file", shell("truncate -s 0 model.safetensors"), *DAMAGED),
    fault("no weights", shell("rm model.safetensors"), *ABSENT),
    fault("weights that are a FIFO", shell("rm model.safetensors && mkfifo model.safetensors"), "not a regular file"),
    fault("a .bin of other things", pickled(lambda t: {"state": t}), "hf/pytorch_model.bin holds no tensors by name"),
    fault("a .bin of numbers", pickled(lambda t: dict(enumerate(t.values()))), "hf/pytorch_model.bin holds no tensors"),
    fault("a .bin of a list", pickled(lambda t: [1]), "hf/pytorch_model.bin cannot be read"),
    fault("a .bin with code in it", pickled(lambda t: t | {"x": Path()}), "hf/pytorch_model.bin", "is never run"),
    fault("a .bin of one number", pickled(lambda t: t | {NORM: torch.ones(1).expand(64)}), NORM, "larger than what is"),
    fault("a sparse .bin", pickled(lambda t: t | {NORM: torch.ones(64).to_sparse()}), NORM, "not a plain tensor"),
    fault("a .bin of shapes", pickled(lambda t: t | {NORM: torch.ones(64, device="meta")}), NORM, "not a plain tensor"),
]


@pytest.mark.parametrize(("spoil", "says"), CONFIG_FAULTS + TENSOR_FAULTS)
def test_the_converter_refuses_a_faulty_checkpoint_and_writes_nothing(run, spoil, says):
    spoil(Path("hf"))
    before = snapshot()
    assert_refused(run(CONVERT, "--hf", "hf", "--out", "out", "--tp", 2), CONVERT, *says)
    assert snapshot() == before


def test_an_hf_directory_is_refused_with_the_command_that_converts_it(run, ask, hf_ids):
    ran = run(LLAMA, "--ckpt", "hf", "--tp", 1)
    assert_refused(ran, LLAMA, "--ckpt hf", "python convert_weights.py --hf hf --out ./weights --tp 1")
    _, command, _ = ran.err.split("`")
    assert run(*command.split()[1:]).code == 0
    assert new_ids(ask("./weights", [MIDDLE])) == [hf_ids(MIDDLE, 64)]


def convert_again(folder: Path) -> None:
    """Two shards, one of each of two conversions of the same checkpoint."""
    older = (folder / shards(2)[0]).read_bytes()
    with pytest.MonkeyPatch.context() as patch:
        assert execute(patch, CONVERT, "--hf", "hf", "--out", folder, "--tp", 2) == 0
    (folder / shards(2)[0]).write_bytes(older)


FIRST, SECOND = shards(2)


CONFIG, CONVERSION, TOKENIZER = "config.json", "neuron_config.json", "tokenizer.json"
NEST = "python3 -c 'print(9**5 * chr(91))'"
CONVERSION_FAULTS = [
    fault("an eps in words", config(rms_norm_eps="abc"), CONFIG, "rms_norm_eps must be a number", "'abc'"),
    fault("no head_dim", config(drop="head_dim"), CONFIG, "has no head_dim"),
    fault("no eps", config(drop="rms_norm_eps"), CONFIG, "has no rms_norm_eps"),
    fault("an EOS id that is no list", config(eos_token_id=4), CONFIG, "eos_token_id must be a list"),
    fault("EOS in words", config(eos_token_id=["end"]), CONFIG, "eos_token_id must be a list"),
    fault("another hidden_size", config(hidden_size=32), FIRST, "(48, 64)", "(48, 32)"),
    fault("a layer more", config(num_hidden_layers=4), FIRST, "model.layers.3.input_layernorm.weight is 'missing'"),
    fault("a layer less", config(num_hidden_layers=2), FIRST, "model.layers.2.input_layernorm.weight is (64,)"),
    fault("biases", config(mlp_bias=True), FIRST, "down_proj.bias is 'missing'"),
    fault("another number of heads", config(num_key_value_heads=4), FIRST, "Wqkv.weight"),
    fault("another rope in one of two places", config(rope_scaling={"type": "linear", "factor": 2.0}), CONFIG, "rope_"),
    fault("frequencies that are not there", rope("yarn", factor=2.0), CONFIG, "rope_parameters"),
    fault("a config.json that is no JSON", shell("echo { > config.json"), CONFIG, "cannot be read as JSON"),
    fault("an absent config.json", shell("rm config.json"), CONFIG, "is missing"),
    fault("a tokenizer that is no JSON", shell("echo { > tokenizer.json"), TOKENIZER, "cannot be read"),
    fault("an absent tokenizer", shell("rm tokenizer.json"), TOKENIZER, "is missing"),
    fault("a length in words", settings(sequence_length="long"), CONVERSION, "sequence_length", "'long'"),
    fault("buckets in words", settings(context_encoding_buckets="128"), CONVERSION, "context_encoding_buckets"),
    fault("a bucket in words", settings(context_encoding_buckets=["128"]), CONVERSION, "context_encoding_buckets"),
    fault("a limit in words", settings(max_sequence_length="long"), CONVERSION, "max_sequence_length"),
    fault("a chunk that is too long", settings(prefill_chunk_size=257), CONVERSION, "prefill_chunk_size 257", "256"),
    fault("a dtype of none", settings(torch_dtype="int8"), CONVERSION, "torch_dtype", "'int8'"),
    fault("another dtype", settings(torch_dtype="bfloat16"), FIRST, "is of dtype F32", "asks for BF16"),
    fault("another way to split", settings(vocab_parallel=True), FIRST, "embed_tokens"),
    fault("an edited tp_degree", settings(tp_degree=1), FIRST, "its tp_degree is not that of neuron_config.json"),
    fault("a tp_degree in words", settings(tp_degree="two"), CONVERSION, "tp_degree", "'two'"),
    *(fault(f"no {key}", settings(drop=key), CONVERSION, key) for key in SETTINGS),
    fault(
        "no conversion_id", settings(drop="conversion_id"), FIRST, "its conversion_id is not that of neuron_config.json"
    ),
    fault("digests in words", settings(sha256="none"), CONVERSION, "sha256"),
    fault("a digest of another file", settings(sha256={"../hf/config.json": ""}), CONVERSION, "sha256"),
    fault("settings that are no JSON", shell("echo tp_degree: 2 > neuron_config.json"), CONVERSION, "as JSON"),
    fault("settings that are no object", shell("echo [] > neuron_config.json"), CONVERSION, "does not hold"),
    fault("nested settings", shell(f"{NEST} > neuron_config.json"), CONVERSION, "cannot be read as JSON"),
    fault("long settings", shell("truncate -s 5G neuron_config.json"), CONVERSION, "5,368,709,120 bytes"),
    fault("a long config", shell("truncate -s 5G config.json"), CONFIG, "5,368,709,120 bytes"),
    fault("a FIFO for a config", shell("rm config.json && mkfifo config.json"), f"{CONFIG} is not a regular file"),
    fault("a device", shell("ln -sf /dev/zero tokenizer.json"), f"{TOKENIZER} is not a regular file"),
    fault("a FIFO for a shard", shell(f"rm {SECOND} && mkfifo {SECOND}"), f"{SECOND} is not a regular file"),
    fault("swapped shards", shell(f"mv {FIRST} first && mv {SECOND} {FIRST} && mv first {SECOND}"), FIRST, "its rank"),
    fault("a shard copied over another", shell(f"cp {FIRST} {SECOND}"), SECOND, "its rank"),
    fault("a shard of another conversion", convert_again, FIRST, "its conversion_id"),
    fault("a shard of another tp degree", shell(f"cp ../weights1/{FIRST} ."), FIRST, "does not belong here"),
    fault("a missing shard", shell(f"rm {SECOND}"), f"{SECOND} is missing"),
    fault("a link to no shard", shell(f"ln -sf nowhere {SECOND}"), f"{SECOND} is missing"),
    fault("a truncated shard", shell(f"truncate -s -100 {SECOND}"), f"{SECOND} is damaged"),
    fault("an empty shard", shell(f"truncate -s 0 {FIRST}"), f"{FIRST} is damaged"),
    fault("an HF checkpoint for a shard", shell(f"cp ../hf/model.safetensors {SECOND}"), SECOND, "ask for"),
]


@pytest.mark.parametrize(("spoil", "says"), CONVERSION_FAULTS)
def test_a_conversion_that_cannot_be_computed_or_is_a_mixture_is_refused(run, spoil, says):
    spoil(Path("weights2"))
    assert_refused(run(LLAMA, "--ckpt", "weights2"), LLAMA, "--ckpt weights2: weights2/", *says, "convert again")


def answer_after_edit(run: Callable[..., Ran], *says: str, prompt: str = words(LONG)) -> dict:
    """The completion of weights1 after an edit, which has to be said in one line."""
    ran = run(LLAMA, "--ckpt", "weights1", "--prompt", prompt, "--max-new-tokens", 12, "--json")
    assert ran.err == f"{LLAMA}: edited after the conversion, {' '.join(says)}\n"
    return result(ran)["completions"][0]


def test_edited_eos_ids_are_said_and_used(run, hf_ids):
    ids = hf_ids(LONG, 12, eos=[])
    end = ids[2]
    edit_json(Path("weights1/config.json"), eos_token_id=[end])
    assert answer_after_edit(run, "and used: config.json")["ids"] == ids[: ids.index(end) + 1]


def test_an_edited_length_of_the_cache_is_said_and_used(run, hf_ids):
    edit_json(Path("weights1/neuron_config.json"), sequence_length=len(LONG) + 5)
    assert answer_after_edit(run, "and used: neuron_config.json")["ids"] == hf_ids(LONG, 5)


def test_an_edited_tokenizer_is_said_and_used(run):
    file = Path("weights1/tokenizer.json")
    tokenizer = json.loads(file.read_text())
    vocabulary = tokenizer["model"]["vocab"]
    vocabulary["w21"], vocabulary["w22"] = vocabulary["w22"], vocabulary["w21"]
    file.write_text(json.dumps(tokenizer))
    assert answer_after_edit(run, "and used: tokenizer.json", prompt="w21 w22 w23")["prompt_ids"] == [22, 21, 23]


def test_all_edited_files_are_said_in_one_line(run, hf_ids):
    edit_json(Path("weights1/neuron_config.json"), sequence_length=len(LONG) + 5)
    edit_json(Path("weights1/config.json"), eos_token_id=[])
    assert answer_after_edit(run, "and used: config.json, neuron_config.json")["ids"] == hf_ids(LONG, 5, eos=[])


def test_without_its_digests_a_conversion_is_used(run, hf_ids):
    edit_json(Path("weights1/neuron_config.json"), drop="sha256")
    assert answer_after_edit(run, "and used: neuron_config.json")["ids"] == hf_ids(LONG, 12)


def test_an_edited_generation_config_is_said_not_to_be_read(run, hf_ids):
    edit_json(Path("weights1/generation_config.json"), eos_token_id=hf_ids(LONG, 1))
    assert answer_after_edit(run, "but config.json is read: generation_config.json")["ids"] == hf_ids(LONG, 12)


def test_two_ranks_say_once_what_was_edited(hf_ids):
    edit_json(Path("weights2/config.json"), eos_token_id=[])
    flags = (ROOT / LLAMA, "--ckpt", "weights2", *by_ids(SHORT), "--json")
    for launcher in ((), ("-m", "torch.distributed.run", "--nproc-per-node", 2)):
        ran = run_process(*launcher, *flags)
        assert new_ids(result(ran)) == [hf_ids(SHORT, 64, eos=[])]
        assert ran.err.count(f"{LLAMA}: edited after the conversion, and used: config.json\n") == 1


@pytest.mark.parametrize("folder", ["hf", "weights2"])
def test_files_that_nobody_opens_are_not_checked(run, ask, hf_ids, folder):
    for name in ("train.log", "notes.txt", "trace.json", "tp2_sharded_checkpoint.safetensors.tmp"):
        Path(folder, name).touch()
        os.truncate(Path(folder, name), 70 * 2**20)
    for name in (".config.json.swp", "link", "readme.txt", "tp9_sharded_checkpoint.safetensors", "lock.json"):
        Path(folder, name).symlink_to("nowhere")
    for name in ("fifo", "fifo.json", "fifo.txt"):
        os.mkfifo(Path(folder, name))
    assert run(CONVERT, "--hf", "hf", "--out", "out", "--tp", 1) == (0, "", "")
    assert new_ids(ask("out", [MIDDLE])) == [hf_ids(MIDDLE, 64)]
    two = run_process(ROOT / LLAMA, "--ckpt", "weights2", *by_ids(MIDDLE), "--json")
    assert new_ids(result(two)) == [hf_ids(MIDDLE, 64)]
    assert run("tools/verify.py", "weights2").code == 0


def without_privileges() -> tuple[str, ...]:
    """What a command starts with that may not read what modes forbid: root may, unless it drops its capabilities."""
    if os.geteuid() != 0:
        return ()
    if shutil.which("setpriv") is None:
        pytest.skip("root reads everything, and setpriv, which could change that, is not installed")
    return ("setpriv", "--inh-caps=-all", "--bounding-set=-all")


@pytest.mark.parametrize(
    ("file", "command"),
    [
        ("hf/model.safetensors", (CONVERT, "--hf", "hf", "--out", "out", "--tp", "1")),
        ("hf/config.json", (CONVERT, "--hf", "hf", "--out", "out", "--tp", "1")),
        ("hf/tokenizer.json", (CONVERT, "--hf", "hf", "--out", "out", "--tp", "1")),
        (f"weights1/{shards(1)[0]}", (LLAMA, "--ckpt", "weights1")),
        ("weights1/config.json", (LLAMA, "--ckpt", "weights1")),
        ("weights1/neuron_config.json", (LLAMA, "--ckpt", "weights1")),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_file_that_may_not_be_read_is_not_said_to_be_missing(file, command):
    Path(file).chmod(0)
    script, *flags = command
    line = [*without_privileges(), sys.executable, ROOT / script, *flags]
    ran = subprocess.run(line, capture_output=True, text=True, timeout=100)
    assert (ran.returncode, ran.stdout, ran.stderr.count("\n")) == (1, "", 1), ran.stderr
    assert ran.stderr.startswith(f"{script}: error: ") and file in ran.stderr
    assert "Permission denied, make it readable" in ran.stderr
    assert "missing" not in ran.stderr and "not found" not in ran.stderr


LLAMA1, CONVERT1 = f"{LLAMA} --ckpt weights1", f"{CONVERT} --hf hf --out out --tp 1"
HERE = {
    "nxd": find_spec("neuronx_distributed"),
    "neuron": find_spec("torch_neuronx"),
    "cuda": torch.cuda.is_available(),
}
WRONG_FLAGS = [
    (f"{LLAMA} --prompt-ids 7,8", "--ckpt"),
    (f"{LLAMA} --ckpt nowhere", "--ckpt nowhere"),
    (f"{LLAMA} --ckpt weights2 --tp 4", "--tp 4", "weights2", "--tp 2", "convert"),
    (f"{LLAMA} --ckpt weights2 --tp 1", "--tp 1", "weights2", "--tp 2", "convert"),
    (f"{LLAMA1} --tp 0", "--tp", "positive", "'0'"),
    (f"{LLAMA1} --max-new-tokens x", "--max-new-tokens", "positive", "'x'"),
    (f"{LLAMA1} --prompt-ids 7,x", "--prompt-ids", "'7,x'"),
    (f"{LLAMA1} --prompt-ids 7,96,97", "prompt 1", "token id 96 at place 2", "95"),
    (f"{LLAMA1} --prompt-ids 7 --prompt-ids=7,-1", "prompt 2", "token id -1 at place 2", "95"),
    (f"{LLAMA1} --prompt=", "prompt 1 is empty"),
    (f"{LLAMA1} --sequence-length 2 --prompt-ids 7,8", "prompt 1", "2 tokens", "--sequence-length"),
    (f"{LLAMA1} --batch-size 1 --prompt-ids 7 --prompt-ids 8", "2 prompts", "--batch-size 1"),
    (f"{LLAMA1} --batch-size {2**24}", "does not fit in memory", "--batch-size", "--sequence-length"),
    (f"{LLAMA1} --batch-size {10**4} --sequence-length {2**24}", "does not fit in memory", "--sequence-length"),
    (f"{LLAMA1} --batch-size {10**12}", f"--batch-size: '{10**12}'", "up to 2^24"),
    (f"{LLAMA1} --sequence-length {10**30}", f"--sequence-length: '{10**30}'", "up to 2^24"),
    (f"{LLAMA1} --device tpu", "--device tpu is not available", "docs/neuron.md"),
    *((f"{LLAMA1} --device {name}", f"--device {name} is not available") for name, here in HERE.items() if not here),
    (f"{LLAMA1} --attn fast", "--attn", "'fast'", "sdpa"),
    (f"{LLAMA1} --dtype float32", "--dtype"),
    (f"{CONVERT} --out out --tp 1", "--hf", "--demo"),
    (f"{CONVERT} --hf hf --out out", "--tp"),
    (f"{CONVERT1} --dtype int8", "--dtype", "float16"),
    (f"{CONVERT1} --buckets 8,x", "--buckets", "'8,x'"),
    (f"{CONVERT1} --buckets 0,8", "--buckets", "0"),
    (f"{CONVERT1} --buckets 8,257", "--buckets", "257", "--sequence-length 256"),
    (f"{CONVERT1} --prefill-chunk-size 0", "--prefill-chunk-size", "positive", "'0'"),
    (f"{CONVERT1} --prefill-chunk-size 257", "--prefill-chunk-size 257", "--sequence-length 256"),
    (f"{CONVERT1} --prefill-chunk-size {10**30}", "--prefill-chunk-size", "up to 2^24"),
    (f"{CONVERT1} --sequence-length {10**30}", "--sequence-length", "up to 2^24"),
    (f"{CONVERT1} --batch-size {10**6}", "--batch-size", "from 1 to 10,000"),
    (f"{CONVERT} --hf hf --out out --tp {10**6}", "--tp", "from 1 to 10,000"),
    (f"{CONVERT} --hf hf --out weights1/../hf --tp 1", "--out weights1/../hf", "HF directory itself"),
    (f"{CONVERT} --hf weights2 --out out --tp 2", "--hf weights2 is already a conversion"),
    (f"{CONVERT} --hf hf --out hf/README.md --tp 1", "hf/README.md"),
]


@pytest.mark.parametrize(("line", "says"), [(line, says) for line, *says in WRONG_FLAGS])
def test_a_wrong_flag_is_refused_and_nothing_is_written(run, line, says):
    before = snapshot()
    assert_refused(run(*line.split()), line.split()[0], *says)
    assert snapshot() == before


DYNAMIC = rope("dynamic", factor=2.0)
LONG_FACTORS = {"short_factor": [1.0] * 4, "long_factor": [2.0] * 4, "factor": 2.0}
LONGROPE = rope("longrope", **LONG_FACTORS, original_max_position_embeddings=64)


@pytest.mark.parametrize(("spoil", "limit"), [(DYNAMIC, 256), (LONGROPE, 64)], ids=["dynamic", "longrope"])
def test_a_length_beyond_the_rope_is_refused_by_both_commands(run, convert, spoil, limit):
    spoil(Path("hf"))
    convert(1)
    flag = ("--sequence-length", limit + 1)
    assert_refused(run(LLAMA, "--ckpt", "out", *flag), LLAMA, f"--sequence-length {limit + 1}", f"{limit}")
    ran = run(CONVERT, "--hf", "hf", "--out", "out", "--tp", 1, *flag)
    assert_refused(ran, CONVERT, f"--sequence-length {limit + 1}", f"{limit}")


def test_only_rare_ropes_need_transformers(run, ask, monkeypatch, hf_ids):
    expected = [hf_ids(LONG, 64)]
    monkeypatch.setitem(sys.modules, "transformers", None)
    assert run(CONVERT, "--hf", "hf", "--out", "out", "--tp", 1).code == 0
    assert new_ids(ask("out", [], "--prompt", words(LONG))) == expected
    for spoil in (DYNAMIC, LONGROPE, rope("yarn", factor=2.0)):
        spoil(Path("hf"))
        ran = run(CONVERT, "--hf", "hf", "--out", "out", "--tp", 1)
        assert_refused(ran, CONVERT, "rope_type", "transformers", "pip install")

"""Files that go wrong: every fault ends in one line, and nothing wrong is computed in silence.

Faults that somebody thought of have their tests beside what they are about (`test_commands.py`,
`test_checkpoints.py`). Here they are drawn by the thousand: values and bytes of every JSON file and safetensors header,
mixtures of files, conversions that are killed, stopped, or two at once.
"""

import contextlib
import io
import json
import multiprocessing
import os
import resource
import shutil
import signal
import stat
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import fields
from itertools import product
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer
from tokenizers.models import WordLevel

import convert_weights
import llama_neuron
import tools.capture
import tools.verify
from checkpoint.seal import check_seal
from convert_weights import convert as convert_here
from launch.command import run_command
from tests.helpers import ROOT

CONFIG = {
    "model_type": "llama",
    "vocab_size": 40,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 4,
    "max_position_embeddings": 64,
    "rms_norm_eps": 1e-6,
    "hidden_act": "silu",
    "tie_word_embeddings": False,
    "attention_bias": False,
    "mlp_bias": False,
    "torch_dtype": "float32",
    "eos_token_id": 3,
}
ROPES = {
    "default": {"rope_type": "default", "rope_theta": 1e4},
    "linear": {"rope_type": "linear", "factor": 2.0},
    "llama3": {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0},
    "yarn": {"rope_type": "yarn", "factor": 4.0, "beta_fast": 32, "beta_slow": 1, "mscale": 1.0, "mscale_all_dim": 0.5},
    "longrope": {"rope_type": "longrope", "short_factor": [1.0, 1.1], "long_factor": [2.0, 2.2], "factor": 4.0},
    "dynamic": {"rope_type": "dynamic", "factor": 2.0},
}
ROPE_KEYS = sorted({key for rope in ROPES.values() for key in rope} | {"original_max_position_embeddings", "type"})
RECORD, FIRST, SECOND = ".conversion", *(f"tp{rank}_sharded_checkpoint.safetensors" for rank in range(2))
# whose digests a conversion keeps
SMALL_FILES = ("config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json")


# ---- checkpoints


def write_checkpoint(folder: Path, seed: int, **changes: object) -> Path:
    """A random HF checkpoint with a tokenizer. No file is that of another seed."""
    config = CONFIG | {"eos_token_id": seed} | changes
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": seed}))
    tokenizer = Tokenizer(WordLevel({f"{seed}w{number}": number for number in range(40)}, unk_token=f"{seed}w0"))
    tokenizer.save(str(folder / "tokenizer.json"))
    kind = {"tokenizer_class": "PreTrainedTokenizerFast", "model_max_length": 100 + seed}
    (folder / "tokenizer_config.json").write_text(json.dumps(kind))
    torch.manual_seed(seed)
    shapes = convert_weights.expected_shapes(convert_weights.llama_config(convert_weights.read_config(folder)))
    save_file({name: torch.randn(shape) for name, shape in shapes.items()}, folder / "model.safetensors")
    return folder


@pytest.fixture(scope="module")
def originals(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The checkpoints `hf` and `other`, their conversions for two ranks, `weights` and `other_weights`, and one of `hf`
    for one rank, `one`."""
    folder = tmp_path_factory.mktemp("originals")
    for seed, name in ((3, "hf"), (4, "other")):
        hf = write_checkpoint(folder / name, seed)
        convert_weights.convert(hf, folder / f"{name}_weights", tp_degree=2)
    (folder / "hf_weights").rename(folder / "weights")
    convert_weights.convert(folder / "hf", folder / "one", tp_degree=1)
    return folder


@pytest.fixture(autouse=True)
def here(originals: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Copies of `originals` in the working directory, for a test to spoil."""
    shutil.copytree(originals, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def numbers(folder: str | Path) -> dict[str, torch.Tensor]:
    """All tensors of a conversion."""
    tensors = {}
    for file in sorted(Path(folder).glob("*.safetensors")):
        tensors |= {f"{file.name} {name}": tensor.clone() for name, tensor in load_file(file).items()}
    return tensors


def assert_is_conversion(folder: str | Path, reference: str | Path) -> None:
    """Complete, with the tensors of the reference, and nothing beside them."""
    found, expected = numbers(folder), numbers(reference)
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    assert listing(folder) == listing(reference)
    check_seal(folder, range(2))


def listing(folder: str | Path) -> set[str]:
    return {path.name for path in Path(folder).iterdir()}


# ---- commands, in this process


class Ran(NamedTuple):
    """What a command left behind: exit code, standard output, standard error."""

    code: int
    out: str
    err: str


MAINS = {
    "convert_weights.py": convert_weights.main,
    "llama_neuron.py": llama_neuron.main,
    "capture.py": tools.capture.main,
    "verify.py": tools.verify.main,
}


def run(command: str, *arguments: object) -> Ran:
    out, err, code = io.StringIO(), io.StringIO(), 0
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        patch.setattr(sys, "argv", [command, *map(str, arguments)])
        try:
            run_command(MAINS[command])
        except SystemExit as stop:
            code = stop.code
    return Ran(code, out.getvalue(), err.getvalue())


def convert(*flags: object, hf: str = "hf", out: str = "out") -> Ran:
    return run("convert_weights.py", "--hf", hf, "--out", out, "--tp", 2, *flags)


def load(ckpt: str) -> Ran:
    """All that `llama_neuron.py` does before it starts a rank, on two: a prompt of no token stops it."""
    return run("llama_neuron.py", "--ckpt", ckpt, "--device", "cpu", "--prompt-ids", 40)


EDITED = "llama_neuron.py: edited after the conversion, "


def assert_refused(ran: Ran, *says: str, code: int = 2) -> None:
    """One line that says what it should, beside notes of the converter and of transformers."""
    assert (ran.code, ran.out) == (code, ""), ran
    *notes, line = [note for note in ran.err.splitlines() if not note.startswith(EDITED)]
    assert ": error: " in line and "weights_only" not in line, line
    assert all(note.startswith(("convert_weights.py: hf", "[transformers] ")) for note in notes), notes
    assert [part for part in says if part not in line] == [], line


def said_edited(ran: Ran) -> set[str]:
    """The files that were said to have been edited."""
    lines = [line for line in ran.err.splitlines() if line.startswith(EDITED)]
    return {name for line in lines for name in line.rpartition(": ")[2].split(", ")}


def assert_intact(ckpt: str, edited: set[str] | None = None) -> None:
    ran = load(ckpt)
    assert said_edited(ran) == (edited or set())
    assert_refused(ran, "prompt 1 holds token id 40 at place 1: this model has 0 to 39")


# ---- values and bytes

ODD = [None, True, False, 0, 1, -1, 3, 2**31, 10**9, 10**30, 0.0, 0.5, -0.5, 1e-30, 1e30, float("nan"), float("inf")]
ODD += ["", "1", "linear", "x" * 1000, [], [1], ["1"], [[1]], [1.0, 1.0], [True, 1], {}, {"factor": 2}, 10**4000]
VALUES = st.sampled_from(ODD) | st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda parts: st.lists(parts, max_size=3) | st.dictionaries(st.text(max_size=5), parts, max_size=3),
    max_leaves=4,
)
UNUSUAL = ["sliding_window", "is_causal", "quantization_config", "dtype", "transformers_weights"]
DEEP = "[" * 50_000 + "]" * 50_000
FAST = settings(
    max_examples=150, deadline=5000, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


@pytest.fixture(scope="module", autouse=True)
def bounded_memory(originals: Path) -> Iterator[None]:
    """A gigabyte more than what is taken already."""
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    before = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + 10**9, before[1]))
    yield
    resource.setrlimit(resource.RLIMIT_AS, before)


@contextlib.contextmanager
def spoilt(file: str, content: bytes) -> Iterator[None]:
    """A file with another content, and no `out` before and after."""
    before = Path(file).read_bytes() if Path(file).exists() else None
    Path(file).write_bytes(content)
    try:
        yield
    finally:
        Path(file).unlink()
        if before is not None:
            Path(file).write_bytes(before)
        shutil.rmtree("out", ignore_errors=True)


def assert_ends_well(says: str = "") -> None:
    """The conversion of `hf` for one rank is refused, or the model computes numbers."""
    ran = run("convert_weights.py", "--hf", "hf", "--out", "out", "--tp", 1)
    if ran.code != 0:
        assert_refused(ran, says)
        assert not Path("out").exists()
        return
    model = llama_neuron.load_model("out")
    ids = torch.arange(min(3, model.neuron_config.sequence_length), dtype=torch.int32)[None]
    assert model(ids, ids).isfinite().all()


@st.composite
def damaged(draw: Callable, content: bytes) -> bytes:
    """A file that was cut, or has some other bytes."""
    if draw(st.booleans()):
        return content[: draw(st.integers(0, len(content) - 1))]
    for _ in range(draw(st.integers(1, 3))):
        place = draw(st.integers(0, len(content) - 1))
        removed = draw(st.integers(0, 4))
        content = content[:place] + draw(st.binary(max_size=4)) + content[place + removed :]
    return content


@FAST
@given(key=st.sampled_from([*CONFIG, *UNUSUAL]), value=VALUES)
def test_a_config_of_odd_values_is_refused_or_computed(key, value):
    with spoilt("hf/config.json", json.dumps(CONFIG | {key: value}).encode()):
        assert_ends_well("hf")


@FAST
@given(
    rope=st.sampled_from(list(ROPES.values())),
    name=st.sampled_from(["rope_scaling", "rope_parameters"]),
    key=st.sampled_from(ROPE_KEYS),
    value=VALUES,
)
def test_rope_parameters_of_odd_values_are_refused_or_computed(rope, name, key, value):
    with spoilt("hf/config.json", json.dumps(CONFIG | {name: rope | {key: value}}).encode()):
        assert_ends_well("hf/config.json")


@FAST
@given(data=st.data(), name=st.sampled_from(["config.json", "tokenizer.json", "tokenizer_config.json"]))
def test_a_damaged_json_file_is_refused_or_computed(data, name):
    with spoilt(f"hf/{name}", data.draw(damaged(Path("hf", name).read_bytes()))):
        assert_ends_well("hf")


@FAST
@given(data=st.data(), key=st.sampled_from(["eos_token_id", "num_beams", "suppress_tokens"]), value=VALUES)
def test_an_odd_generation_config_is_refused_or_computed(data, key, value):
    content = json.dumps({key: value}).encode()
    with spoilt("hf/generation_config.json", data.draw(st.just(content) | damaged(content))):
        assert_ends_well("generation_config.json")


@FAST
@given(data=st.data(), value=VALUES)
def test_an_odd_index_is_refused(data, value):
    index = json.dumps({"weight_map": value}).encode()
    Path("hf/model.safetensors").unlink(missing_ok=True)
    with spoilt("hf/model.safetensors.index.json", data.draw(st.just(index) | damaged(index))):
        ran = convert()
        assert_refused(ran, "hf")


@pytest.mark.parametrize("name", ["config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json"])
def test_a_file_nested_a_thousand_levels_deep_is_refused_or_left_out(name):
    with spoilt(f"hf/{name}", DEEP.encode()):
        assert_ends_well("hf")


def header(content: bytes) -> tuple[dict, bytes]:
    """Of a safetensors file: its header, and the numbers."""
    end = 8 + int.from_bytes(content[:8], "little")
    return json.loads(content[8:end]), content[end:]


def with_header(changed: dict | list | str, data: bytes) -> bytes:
    text = json.dumps(changed).encode()
    return len(text).to_bytes(8, "little") + text + data


@st.composite
def odd_header(draw: Callable, content: bytes) -> bytes:
    """A safetensors file whose header says something else."""
    table, data = header(content)
    names = [name for name in table if name != "__metadata__"]
    one, other = draw(st.sampled_from(names)), draw(st.sampled_from(names))
    entry = table[one]
    kind = draw(st.sampled_from(["bytes", "size", "entry", "key", "dtype", "shape", "swap", "rename", "drop", "meta"]))
    if kind == "bytes":
        size = 8 + int.from_bytes(content[:8], "little")
        return draw(damaged(content[:size])) + content[size:]
    if kind == "size":
        return draw(st.integers(0, 2**64 - 1)).to_bytes(8, "little") + content[8:]
    if kind == "entry":
        table[one] = draw(VALUES)
    if kind == "key":
        entry[draw(st.sampled_from(["dtype", "shape", "data_offsets", "more"]))] = draw(VALUES)
    if kind == "dtype":
        entry["dtype"] = draw(st.sampled_from(["I32", "U32", "F16", "BF16", "F64", "I64", "BOOL", "F8_E4M3", "C64"]))
    if kind == "shape":
        entry["shape"] = draw(st.permutations(entry["shape"]) | st.lists(st.integers(-1, 2**63), max_size=4))
    if kind == "swap":
        table[one], table[other] = table[other], table[one]
    if kind == "rename":
        table[draw(st.sampled_from(["", "model.", "x" * 10_000, other, "\x1b[2J"]))] = table.pop(one)
    if kind == "drop":
        del table[one]
    if kind == "meta":
        table["__metadata__"] = draw(VALUES)
    return with_header(table, data)


@FAST
@given(data=st.data())
def test_an_odd_header_of_an_hf_checkpoint_is_refused_or_computed(data):
    with spoilt("hf/model.safetensors", data.draw(odd_header(Path("hf/model.safetensors").read_bytes()))):
        assert_ends_well("hf")


@FAST
@given(data=st.data(), name=st.sampled_from([FIRST, SECOND]))
def test_a_shard_whose_header_was_changed_is_refused_or_has_the_same_tensors(data, name):
    original = numbers("weights")
    with spoilt(f"weights/{name}", data.draw(odd_header(Path("weights", name).read_bytes()))):
        ran = load("weights")
        if "convert again" in ran.err:
            assert_refused(ran, f"weights/{name}")
        else:
            assert_intact("weights")
            changed = numbers("weights")
            assert changed.keys() == original.keys()
            assert all(torch.equal(changed[key], original[key]) for key in original)


@FAST
@given(data=st.data(), name=st.sampled_from([*SMALL_FILES, "neuron_config.json"]))
def test_a_small_file_of_a_conversion_that_was_changed_in_any_byte_is_said_or_refused(data, name):
    original = Path("weights", name).read_bytes()
    changed = data.draw(damaged(original))
    with spoilt(f"weights/{name}", changed):
        ran = load("weights")
        if changed == original:
            assert_intact("weights")
        elif "convert again" in ran.err:
            assert said_edited(ran) == set()
            assert_refused(ran, "--ckpt weights: weights/")
        else:
            said = said_edited(ran)
            assert name in said
            assert said == {name} or name == "neuron_config.json"  # which holds the digests of the others
            assert_refused(ran, "prompt 1")


# ---- files that do not belong together


def mixture(parts: dict[str, str]) -> str:
    """A directory `mixed` of files by their names there, each a link to where it comes from."""
    shutil.rmtree("mixed", ignore_errors=True)
    Path("mixed").mkdir()
    for name, source in parts.items():
        Path("mixed", name).symlink_to(Path(source).resolve())
    return "mixed"


def test_of_the_files_of_two_conversions_only_json_files_may_be_mixed():
    same = {name: f"weights/{name}" for name in listing("weights")}  # transformers 4 writes one that says nothing
    names = [name for name in same if Path("weights", name).read_bytes() != Path("other_weights", name).read_bytes()]
    assert {*names} == {*SMALL_FILES, "neuron_config.json", FIRST, SECOND}
    for folders in product(("weights", "other_weights"), repeat=len(names)):
        chosen = dict(zip(names, folders, strict=True))
        ckpt = mixture(same | {name: f"{folder}/{name}" for name, folder in chosen.items()})
        conversion = chosen["neuron_config.json"]
        if chosen[FIRST] == chosen[SECOND] == conversion:
            assert_intact(ckpt, {name for name in SMALL_FILES if chosen[name] != conversion})
        else:
            wrong = FIRST if chosen[FIRST] != conversion else SECOND
            assert_refused(load(ckpt), f"--ckpt mixed: mixed/{wrong}", "its conversion_id", "convert again")


def test_every_mixture_of_the_shards_of_two_ranks_of_two_conversions_is_refused():
    """The second is of the same checkpoint with the same flags."""
    convert_here("hf", "again", tp_degree=2)
    shards = [f"{folder}/{name}" for folder in ("weights", "again") for name in (FIRST, SECOND)]
    files = {name: f"weights/{name}" for name in listing("weights")}
    for first, second in product(shards, repeat=2):
        ckpt = mixture(files | {FIRST: first, SECOND: second})
        if first != f"weights/{FIRST}":
            assert_refused(load(ckpt), f"mixed/{FIRST}", "convert again")
        elif second != f"weights/{SECOND}":
            assert_refused(load(ckpt), f"mixed/{SECOND}", "convert again")
        else:
            assert_intact(ckpt)


def save_as_nxd(ckpt: str, tp: int) -> None:
    """The shards of a conversion as NxD's `shard_checkpoint` saves them: the same tensors, and no metadata."""
    for rank in range(tp):
        file = Path(ckpt, f"tp{rank}_sharded_checkpoint.safetensors")
        save_file(load_file(file), file)


def ids_of(ckpt: str) -> list[int]:
    ran = run("llama_neuron.py", "--ckpt", ckpt, "--device", "cpu", "--prompt-ids=5,7", "--ignore-eos", "--json")
    assert (ran.code, ran.err) == (0, "")
    return json.loads(ran.out)["completions"][0]["ids"]


def drop_what_only_a_conversion_writes(ckpt: str) -> None:
    """Leaves neuron_config.json with what `NeuronConfig` reads, as a user of NxD's shards would write it."""
    file = Path(ckpt, "neuron_config.json")
    settings_file = json.loads(file.read_text())
    file.write_text(json.dumps({field.name: settings_file[field.name] for field in fields(llama_neuron.NeuronConfig)}))


@pytest.mark.parametrize("by_hand", [False, True], ids=["neuron_config.json of a conversion", "one by hand"])
def test_shards_of_nxd_itself_give_the_same_ids(by_hand):
    expected = ids_of("one")
    save_as_nxd("one", 1)
    save_as_nxd("weights", 2)
    if by_hand:
        for ckpt in ("one", "weights"):
            drop_what_only_a_conversion_writes(ckpt)
            Path(ckpt, "generation_config.json").unlink()
    assert ids_of("one") == expected
    assert_intact("weights")
    assert_refused(run("verify.py", "weights"), FIRST, "has no digest of its values")


@pytest.mark.parametrize("metadata", [None, {}, "absent"], ids=str)
def test_a_shard_without_metadata_is_read_and_has_no_digest(metadata):
    for name in (FIRST, SECOND):
        table, data = header(Path("weights", name).read_bytes())
        del table["__metadata__"]
        more = {} if metadata == "absent" else {"__metadata__": metadata}
        Path("weights", name).write_bytes(with_header(table | more, data))
    assert_intact("weights")
    assert_refused(run("verify.py", "weights"), FIRST, "has no digest of its values")


LFS = b"version https://git-lfs.github.com/spec/v1\noid sha256:" + b"a" * 64 + b"\nsize 269060552\n"
NOT_FILES = {
    "a git LFS pointer": (lambda path: path.write_bytes(LFS), "is a git LFS pointer, not the file itself"),
    "a page": (lambda path: path.write_text("<!DOCTYPE html><html></html>"), "is a web page, not the file itself"),
    "a directory": (Path.mkdir, "is a directory"),
    "a link to nothing": (lambda path: path.symlink_to("nowhere"), "is missing, a link to 'nowhere' is left"),
    "a link to itself": (lambda path: path.symlink_to(path.name), "cannot be read: Too many levels of symbolic links"),
}


@pytest.mark.parametrize("kind", NOT_FILES)
@pytest.mark.parametrize("name", [SECOND, *SMALL_FILES, "neuron_config.json"])
def test_what_is_there_in_the_place_of_a_file_of_a_conversion_is_named(name, kind):
    make, says = NOT_FILES[kind]
    Path("weights", name).unlink()
    make(Path("weights", name))
    assert_refused(load("weights"), f"weights/{name} {says}", "--out ./weights --tp 2`")


def test_a_damaged_tokenizer_config_is_refused():
    Path("weights/tokenizer_config.json").write_text("{damaged")
    assert_refused(load("weights"), "weights/tokenizer_config.json cannot be read as JSON", "convert again")


def test_files_beside_shards_that_nobody_opens_are_not_checked():
    for name in ("trace.json", "tp9_sharded_checkpoint.safetensors", "vocab.json", "special_tokens_map.json"):
        with Path("weights", name).open("w") as file:
            file.truncate(70 * 2**20)
    for name in ("notes.txt", "merges.txt", "added_tokens.json", "model.safetensors"):
        Path("weights", name).symlink_to("nowhere")
    Path("weights/loop").symlink_to("loop")
    os.mkfifo("weights/pipe")
    Path("weights/tokenizer").mkdir()
    assert_intact("weights")


# ---- what may not be read


def run_unprivileged(script: str, *flags: object) -> Ran:
    """A command that may not read what modes forbid: root may, unless it drops its capabilities."""
    line = [sys.executable, ROOT / script, *map(str, flags)]
    if os.geteuid() == 0:
        if shutil.which("setpriv") is None:
            pytest.skip("root reads everything, and setpriv, which could change that, is not installed")
        line = ["setpriv", "--inh-caps=-all", "--bounding-set=-all", *line]
    ran = subprocess.run(line, capture_output=True, text=True, timeout=100)
    return Ran(ran.returncode, ran.stdout, ran.stderr)


@pytest.fixture
def closed() -> Iterator[Path]:
    """A folder that may not be searched, with two files in it."""
    folder = Path("closed")
    folder.mkdir()
    shutil.move("hf/tokenizer.json", folder)
    shutil.move(f"weights/{SECOND}", folder)
    folder.chmod(0)
    yield folder
    folder.chmod(0o700)


@pytest.mark.slow
def test_a_file_in_a_folder_that_may_not_be_searched_is_not_said_to_be_missing(closed):
    Path("hf/tokenizer.json").symlink_to("../closed/tokenizer.json")
    ran = run_unprivileged("convert_weights.py", "--hf", "hf", "--out", "out", "--tp", 1)
    assert_refused(ran, "Permission denied", "'hf/tokenizer.json'", code=1)
    Path(f"weights/{SECOND}").symlink_to(f"../closed/{SECOND}")
    ran = run_unprivileged("llama_neuron.py", "--ckpt", "weights", "--device", "cpu", "--prompt-ids", 1)
    assert_refused(ran, "Permission denied", f"'weights/{SECOND}'", code=1)
    assert "missing" not in ran.err and "convert again" not in ran.err


@pytest.mark.slow
def test_a_link_beside_a_checkpoint_into_such_a_folder_is_not_followed(closed):
    Path("hf/notes.txt").symlink_to("../closed/notes.txt")
    ran = run_unprivileged("convert_weights.py", "--hf", "hf", "--out", "out", "--tp", 1)
    assert ran.code == 0, ran.err


@pytest.mark.slow
@pytest.mark.parametrize("out", ["closed/out", "closed"])
def test_a_folder_that_may_not_be_written_is_refused_by_name(closed, out):
    ran = run_unprivileged("convert_weights.py", "--hf", "other", "--out", out, "--tp", 1)
    assert_refused(ran, f"--out {out}", "Permission denied, name another directory")


@pytest.mark.parametrize("settings_file", [None, {"tp_degree": 2, "fused_qkv": True}], ids=["none", "Optimum's"])
def test_shards_without_all_settings_are_refused_with_the_command_that_converts(settings_file):
    save_as_nxd("weights", 2)
    Path("weights/neuron_config.json").unlink()
    if settings_file:
        Path("weights/neuron_config.json").write_text(json.dumps(settings_file))
    ran = load("weights")
    assert_refused(ran, "neuron_config.json", "`python convert_weights.py --hf HF_DIR --out ./weights --tp 2`")


def swap(ckpt: str) -> None:
    Path(ckpt, FIRST).rename(f"{ckpt}/first")
    Path(ckpt, SECOND).rename(f"{ckpt}/{FIRST}")
    Path(ckpt, "first").rename(f"{ckpt}/{SECOND}")


def test_shards_of_nxd_that_have_changed_places_are_refused():
    save_as_nxd("weights", 2)
    swap("weights")
    assert_refused(load("weights"), f"weights/{FIRST} is the shard of rank 1", "convert again")


@pytest.mark.parametrize("name", ["model.norm.weight", "lm_head.weight", "model.layers.1.mlp.down_proj.weight"])
@pytest.mark.parametrize("change", ["missing", "narrower", "in bfloat16", "beside another"])
def test_shards_of_nxd_that_do_not_fit_the_config_are_refused(name, change):
    save_as_nxd("weights", 2)
    tensors = load_file(f"weights/{SECOND}")
    if change == "missing":
        del tensors[name]
    if change == "narrower":
        tensors[name] = tensors[name][..., 1:].contiguous()
    if change == "in bfloat16":
        tensors[name] = tensors[name].bfloat16()
    if change == "beside another":
        name = "model.layers.2.mlp.down_proj.weight"
        tensors[name] = torch.zeros(16, 12)
    save_file(tensors, f"weights/{SECOND}")
    assert_refused(load("weights"), f"weights/{SECOND}: {name} is", "neuron_config.json ask", "convert again")


@pytest.mark.parametrize(("key", "value"), [("conversion_id", "0" * 32), ("rank", "1")])
def test_load_model_refuses_a_shard_of_another_conversion_or_rank(key, value):
    file = Path("one", FIRST)
    with safe_open(file, "pt") as shard:
        metadata = shard.metadata()
    save_file(load_file(file), file, metadata=metadata)
    llama_neuron.load_model("one")
    save_file(load_file(file), file, metadata=metadata | {key: value})
    with pytest.raises(llama_neuron.UsageError, match=f"^{file} is of another conversion, or of another rank"):
        llama_neuron.load_model("one")


@pytest.mark.parametrize("rank", [-1, 1, 2, 2**31 - 1])
@pytest.mark.parametrize("name", ["rank_util.rank", "model.embed_tokens.rank_util.rank"])
def test_a_shard_that_holds_another_rank_is_refused(name, rank):
    convert("--vocab-parallel")
    file = Path("out", FIRST)
    table, data = header(file.read_bytes())
    start, end = table[name]["data_offsets"]
    data = data[:start] + rank.to_bytes(4, "little", signed=True) + data[end:]
    file.write_bytes(file.read_bytes()[: -len(data)] + data)
    assert_refused(load("out"), f"out/{FIRST}", "convert again")


# ---- tools.verify


def test_verify_reads_all_that_is_here():
    size = sum(Path("weights", name).stat().st_size for name in (FIRST, SECOND))
    ran = run("verify.py", "weights")
    assert ran.code == 0 and ran.out.startswith(f"weights: 2 of 2 shards are here, {size / 1e9:.3f} GB, as converted (")
    Path("weights", FIRST).unlink()
    assert "weights: 1 of 2 shards are here" in run("verify.py", "weights").out
    Path("weights", SECOND).unlink()
    assert_refused(run("verify.py", "weights"), FIRST, "convert again")


def test_verify_says_once_what_was_edited():
    edited = json.loads(Path("weights/config.json").read_text()) | {"rms_norm_eps": 0.1}
    Path("weights/config.json").write_text(json.dumps(edited))
    ran = run("verify.py", "weights")
    assert ran.code == 0
    assert ran.err == "verify.py: edited after the conversion, and used: config.json\n"


@FAST
@given(data=st.data(), name=st.sampled_from([FIRST, SECOND]))
def test_verify_finds_a_bit_that_was_turned_over_in_any_shard(data, name):
    content = bytearray(Path("weights", name).read_bytes())
    place = data.draw(st.integers(len(content) - len(header(content)[1]), len(content) - 1))
    content[place] ^= 1 << data.draw(st.integers(0, 7))
    with spoilt(f"weights/{name}", content):
        assert_refused(run("verify.py", "weights"), f"weights/{name}", "convert again")


# ---- what a conversion may write, and remove


def snapshot(folder: str | Path) -> dict[Path, bytes | str | None]:
    """Every file with its content, every link with its target, every other thing."""
    found = {}
    for path in Path(folder).rglob("*"):
        found[path] = os.readlink(path) if path.is_symlink() else path.read_bytes() if path.is_file() else None
    return found


@pytest.mark.parametrize("name", ["config.json", "tokenizer.json", FIRST, "nxd-0.pt", "notes.txt", "folder"])
def test_a_directory_that_holds_anything_else_is_refused_and_left_as_it_is(name):
    Path("out").mkdir()
    Path("out", name).mkdir() if name == "folder" else Path("out", name).write_text("mine")
    before = snapshot(".")
    assert_refused(convert(), "--out out holds files that are not a conversion", "an empty directory")
    assert snapshot(".") == before


def test_a_second_conversion_removes_what_the_first_wrote_and_nothing_else():
    for name in ("notes.txt", "nxd-0.pt", "tp7_sharded_checkpoint.safetensors", ".notes.txt.01234567.tmp"):
        Path("weights", name).write_text("mine")
    Path("weights/folder").mkdir()
    mine = {path: content for path, content in snapshot("weights").items() if content in (b"mine", None)}
    ran = run("convert_weights.py", "--hf", "hf", "--out", "weights", "--tp", 1)
    assert ran.code == 0, ran.err
    after = snapshot("weights")
    assert mine.items() <= after.items()
    assert {path.name for path in after.keys() - mine.keys()} == listing("other_weights") - {SECOND}


def test_a_file_of_one_s_own_under_a_name_that_is_needed_is_refused_and_left_as_it_is():
    third = Path("weights/tp2_sharded_checkpoint.safetensors")
    third.write_text("mine")
    before = snapshot(".")
    ran = run("convert_weights.py", "--hf", "hf", "--out", "weights", "--tp", 3)
    assert_refused(ran, f"--out {third} is not from a conversion", "move it")
    assert snapshot(".") == before


def test_links_in_a_conversion_are_replaced_and_what_they_point_to_is_left_as_it_is():
    for name in ("config.json", "tokenizer.json", FIRST):
        shutil.move(f"weights/{name}", f"hf/kept-{name}")
        Path("weights", name).symlink_to(Path(f"hf/kept-{name}").resolve())
    before = snapshot("hf")
    assert convert(out="weights").code == 0
    assert snapshot("hf") == before
    shutil.copytree("weights", "copy")
    assert_is_conversion("weights", "copy")
    assert not any(path.is_symlink() for path in Path("weights").iterdir())


@pytest.mark.parametrize("link", [os.symlink, os.link], ids=["symlinks", "hard links"])
def test_a_source_that_lies_in_the_directory_is_never_removed(link):
    """`links` is a checkpoint whose files are those of `source`, which once was a conversion."""
    Path("links").mkdir()
    shutil.move("hf", "source")
    Path("source", RECORD).write_text("config.json\nmodel.safetensors\ntokenizer.json\n")
    for name in listing("source") - {RECORD}:
        link(Path("source", name).resolve(), Path("links", name))
    before = snapshot(".")
    assert_refused(convert(hf="links", out="source"), "--out source/", "is a file of links")
    assert snapshot(".") == before


def test_links_to_the_source_are_no_conversion():
    Path("out").mkdir()
    for name in listing("hf"):
        Path("out", name).symlink_to(Path("hf", name).resolve())
    before = snapshot(".")
    assert_refused(convert(), "--out out holds files that are not a conversion")
    assert snapshot(".") == before


@pytest.mark.parametrize("target", ["outside", "/dev/null"])
def test_a_record_that_is_a_link_is_not_followed(target):
    Path("outside").write_text("mine")
    Path("out").mkdir()
    Path("out", RECORD).symlink_to(Path(target).resolve())
    before = snapshot(".")
    ran = convert()
    assert (ran.code, ran.err.count("\n")) == (1, 1) and f"out/{RECORD}" in ran.err
    assert snapshot(".") == before


def test_a_record_names_files_in_its_directory_only():
    Path("outside").write_text("mine")
    with Path("weights", RECORD).open("a") as record:
        record.write("\n../outside\n/outside\n..\n.\n\n")
    assert convert(out="weights").code == 0
    assert Path("outside").read_text() == "mine"


@pytest.mark.parametrize("mask", [0o022, 0o077, 0o002])
def test_every_file_has_the_mode_of_the_umask(mask):
    before = os.umask(mask)
    try:
        assert convert().code == 0
        assert run("capture.py", *CAPTURE).code == 0
    finally:
        os.umask(before)
    assert {stat.S_IMODE(path.stat().st_mode) for path in (Path("capture"), *Path("out").iterdir())} == {0o666 & ~mask}


# ---- what else is written

CAPTURE = ("--ckpt", "one", "--device", "cpu", "--prompt-ids=1,2", "--max-new-tokens", 1, "--out", "capture")


@pytest.mark.parametrize("kind", ["symlink", "dangling symlink", "FIFO", "directory", "device"])
def test_a_capture_replaces_no_other_thing_than_a_file(kind):
    Path("outside").write_text("mine")
    if kind == "symlink":
        Path("capture").symlink_to("outside")
    if kind == "dangling symlink":
        Path("capture").symlink_to("nowhere")
    if kind == "FIFO":
        os.mkfifo("capture")
    if kind == "directory":
        Path("capture").mkdir()
    if kind == "device":
        try:
            os.mknod("capture", stat.S_IFCHR | 0o666, os.makedev(1, 3))  # /dev/null
        except PermissionError:
            pytest.skip("only root makes devices")
    before = os.lstat("capture")
    assert_refused(run("capture.py", *CAPTURE), "--out capture cannot be written")
    after = os.lstat("capture")
    assert (after.st_ino, after.st_mode, after.st_rdev) == (before.st_ino, before.st_mode, before.st_rdev)
    assert Path("outside").read_text() == "mine" and not Path("nowhere").exists()


def test_a_capture_replaces_a_file_by_a_new_one():
    Path("capture").write_text("older")
    os.link("capture", "another name of it")
    assert run("capture.py", *CAPTURE).code == 0
    assert "logits" in load_file("capture")
    assert Path("another name of it").read_text() == "older"
    assert not [name for name in listing(".") if name.endswith(".tmp")]


def test_a_capture_that_fills_the_disk_ends_in_one_line_and_leaves_the_older_file():
    Path("capture").write_text("older")
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, before[1]))
    try:
        ran = run("capture.py", *CAPTURE)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert_refused(ran, "capture cannot be written", "File too large", code=1)
    assert Path("capture").read_text() == "older"
    assert not [name for name in listing(".") if name.endswith(".tmp")]


@pytest.mark.parametrize("flags", [(), ("--json",)], ids=str)
def test_a_stdout_that_is_full_ends_in_one_line(flags):
    line = [sys.executable, ROOT / "llama_neuron.py", "--ckpt", "one", "--prompt-ids=1,2", "--ignore-eos", *flags]
    with open("/dev/full", "w") as full:
        ran = subprocess.run(line, stdout=full, stderr=subprocess.PIPE, text=True, timeout=100)
    assert (ran.returncode, ran.stderr) == (1, "llama_neuron.py: error: [Errno 28] No space left on device\n")


def test_a_stdout_that_is_closed_from_the_start_ends_in_one_line():
    line = [sys.executable, ROOT / "llama_neuron.py", "--ckpt", "one", "--prompt-ids=1,2"]
    ran = subprocess.run(["sh", "-c", '"$@" >&-', "sh", *line], stderr=subprocess.PIPE, text=True, timeout=100)
    says = "llama_neuron.py: error: stdout is closed: redirect it, to /dev/null if need be\n"
    assert (ran.returncode, ran.stderr) == (1, says)


def test_a_stdout_that_is_closed_ends_in_one_line_after_the_text_that_was_read():
    line = [sys.executable, ROOT / "llama_neuron.py", "--ckpt", "one", "--prompt", "3w1", "--ignore-eos"]
    line += ["--sequence-length", "20000", "--max-new-tokens", "20000"]
    with subprocess.Popen(line, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as ran:
        assert ran.stdout.read(3) == "3w1"
        ran.stdout.close()
        note, *lines = ran.stderr.read().splitlines()
    assert "20,000 slots" in note
    assert (ran.returncode, lines) == (1, ["llama_neuron.py: error: [Errno 32] Broken pipe"])


# ---- conversions that are ended from outside, or two at once

EVENTS = ("open", "os.rename", "os.remove", "os.mkdir")


SERVER = multiprocessing.get_context("forkserver")  # a fork of this process might wait for threads that it has not


def convert_until(event: int, number: int, count: object = None) -> None:
    """Converts `hf` to `weights`, and sends itself a signal before its so-many-th operation there. `count` gets the
    number of operations, if nothing ends it."""
    seen = 0

    def hook(name: str, arguments: tuple) -> None:
        nonlocal seen
        if name in EVENTS and str(arguments[0]).startswith("weights"):
            seen += 1
            if seen == event:
                os.kill(os.getpid(), number)

    sys.addaudithook(hook)
    torch.set_num_threads(1)
    convert_here("hf", "weights", tp_degree=2)
    if count:
        count.value = seen


@pytest.fixture(scope="module")
def child() -> Iterator[Callable[..., multiprocessing.Process]]:
    """child(function, *args): a process that calls a function. All are gone in the end."""
    started = []

    def start(function: Callable, *args: object) -> multiprocessing.Process:
        started.append(SERVER.Process(target=function, args=args, daemon=True))
        started[-1].start()
        return started[-1]

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", str(ROOT))  # where the server finds what it imports once for all
        modules = ["hypothesis", "pytest", "transformers.modeling_utils", "tests.helpers", "tools.capture"]
        SERVER.set_forkserver_preload(modules)
        yield start
    for process in started:
        process.kill()
        process.join()


@pytest.fixture(scope="module")
def operations(child: Callable, originals: Path, tmp_path_factory: pytest.TempPathFactory) -> int:
    """How many operations `convert_until` counts if nothing ends it."""
    folder, count = tmp_path_factory.mktemp("counted"), SERVER.Value("i", 0)
    shutil.copytree(originals, folder, dirs_exist_ok=True)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        child(convert_until, 0, 0, count).join(60)
    assert count.value > 20
    return count.value


@pytest.mark.parametrize("moment", range(20))
def test_a_conversion_that_was_killed_is_refused_and_the_next_one_leaves_no_trace_of_it(
    moment, child, operations, originals
):
    event = 1 + moment * (operations - 1) // 19  # from the first to the last
    process = child(convert_until, event, signal.SIGKILL)
    process.join(60)
    assert process.exitcode == -signal.SIGKILL
    if Path("weights/neuron_config.json").exists():  # the older one was not touched yet, or the new one is complete
        assert_intact("weights")
    else:
        assert_refused(load("weights"), "--ckpt weights: it is not a complete conversion", "convert again")
    assert convert(out="weights").code == 0
    assert_is_conversion("weights", originals / "weights")


def wait_until_stopped(process: multiprocessing.Process) -> None:
    status = Path(f"/proc/{process.pid}/stat")
    for _ in range(600):
        if status.read_text().rpartition(")")[2].split()[0] == "T":
            return
        time.sleep(0.1)
    raise AssertionError("it has not stopped")


@pytest.mark.parametrize("ends", [False, True], ids=["is killed", "goes on"])
def test_a_second_conversion_is_refused_while_the_first_lives(ends, child, operations, originals):
    first = child(convert_until, operations // 2, signal.SIGSTOP)
    wait_until_stopped(first)
    before = snapshot("weights")
    assert_refused(convert(out="weights"), "--out weights: another conversion is writing there")
    assert snapshot("weights") == before
    os.kill(first.pid, signal.SIGCONT if ends else signal.SIGKILL)
    first.join(60)
    assert first.exitcode == (0 if ends else -signal.SIGKILL)
    if not ends:
        assert convert(out="weights").code == 0
    assert_is_conversion("weights", originals / "weights")


def convert_at_once(barrier: object, out: str, refused: object) -> None:
    torch.set_num_threads(1)
    for number in range(len(refused)):
        barrier.wait(60)
        try:
            convert_here("hf", f"{out}{number}", tp_degree=2)
        except llama_neuron.UsageError as error:
            assert "another conversion is writing there" in str(error)
            with refused.get_lock():
                refused[number] += 1


@pytest.mark.parametrize("out", ["weights", "new"])
def test_of_conversions_that_start_at_once_those_that_are_not_refused_are_whole(out, child, originals):
    barrier, refused = SERVER.Barrier(4), SERVER.Array("i", 10)
    if out == "weights":
        for number in range(10):
            shutil.copytree("weights", f"weights{number}")
    processes = [child(convert_at_once, barrier, out, refused) for _ in range(4)]
    for process in processes:
        process.join(100)
        assert process.exitcode == 0
    for number in range(10):
        assert refused[number] < 4
        assert_is_conversion(f"{out}{number}", originals / "weights")


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_a_conversion_in_one_line_and_nothing_of_it_is_left(number):
    line = [sys.executable, ROOT / "convert_weights.py", "--hf", "hf", "--out", "weights", "--tp", "1000"]
    with subprocess.Popen(line, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as ran:
        third = Path("weights/tp2_sharded_checkpoint.safetensors")
        while not third.exists() and ran.poll() is None:
            time.sleep(0.01)
        ran.send_signal(number)
        out, err = ran.communicate(timeout=60)
    assert (ran.returncode, out, err) == (130, "", "convert_weights.py: error: interrupted\n")
    assert listing("weights") == {RECORD}

"""`--device neuron`, as whole commands on a stand-in for TorchNeuron (`tests/neuron_device/`), and what it refuses.

The oracle is Hugging Face's own Llama in float32. The stand-in is no Neuron device: what is shown here is that a run
starts, that its graphs are few, static and made of known operators, that caches are written in place, and that ids are
HF's. FAULTS are planted one at a time in a copy of the source, and each has to end a run or change what it gives.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace

from convert_weights import convert
from tests.helpers import ROOT, command, hf_greedy, hf_model

STAND_IN = ROOT / "tests/neuron_device"
COMMAND = "llama_neuron.py"
TORCHRUN = ("-m", "torch.distributed.run", "--nproc-per-node", 2)
FAMILY = "odd sizes"  # with biases; at tp 2 everything is padded
PROMPTS, NEW_TOKENS = [[5, 11, 2, 60, 33, 47, 3], [7, 1]], 8
LENGTH, BUCKETS = 48, [4, 16]


class Fault(NamedTuple):
    """An edit of COMMAND: `text`, which is there once, becomes `planted`; what is wrong then has `ended_by` in it."""

    text: str
    planted: str
    ended_by: str
    tp: int = 1
    device: str = "neuron"
    is_slow: bool = False


FAULTS = {
    "a CPU tensor made in a forward": Fault(
        "dtype=torch.int32, device=input_ids.device)  # S",
        "dtype=torch.int32)  # S",
        "found at least two devices, cpu and neuron:0",
    ),
    "a CPU tensor made in a forward that is not compiled": Fault(
        "dtype=torch.int32, device=input_ids.device)  # S",
        "dtype=torch.int32)  # S",
        "found at least two devices, other:0 and cpu",
        device="other",
    ),
    "a CPU tensor as an index": Fault(
        "dtype=torch.int32, device=k.device)[:, None]", "dtype=torch.int32)[:, None]", "is on cpu, all of a graph is on"
    ),
    "a process group without a backend": Fault(
        'dist.init_process_group(f"cpu:gloo,{device}:{backend}", timeout=timedelta(seconds=timeout))',
        "dist.init_process_group()",
        "No backend type associated with device type cpu",
        tp=2,
    ),
    "the device chosen before the group": Fault(
        'dist.init_process_group(f"',
        'torch.accelerator.set_device_index(int(os.environ["LOCAL_RANK"])); dist.init_process_group(f"',
        "the device is used before the process group exists",
        tp=2,
    ),
    "the device not chosen": Fault(
        'torch.accelerator.set_device_index(int(os.environ["LOCAL_RANK"]))',
        "pass",
        "rank 1 is on device 0",
        tp=2,
        is_slow=True,
    ),
    "a number read in a forward": Fault(
        "first_id = self.rank_util.get_rank() *",
        "first_id = self.rank_util.get_rank().item() *",
        "static, _local_scalar_dense has u0",
    ),
    "dynamic shapes": Fault('"dynamic": False', '"dynamic": True', "RuntimeError: neuron: shapes must be static"),
    "a shape that depends on the text": Fault(
        "return model(*inputs).cpu()",
        "return model(*inputs, kv_length=min(kv_length, slots)).cpu()",
        "recompile limit exceeded",
    ),
    "an operator off the list": Fault(
        "pairs[..., 0].argmax(-1, keepdim=True)",
        "pairs[..., 0].sort(-1, descending=True).indices[..., :1]",
        "operators that are not in operators.txt: aten.sort.default",
    ),
    "a cache update that is not carried over": Fault(
        "self.v[row, :, position_ids] = ", "self.v.clone()[row, :, position_ids] = ", "other ids than HF's"
    ),
    "a second cache": Fault(
        "self.k[row, :, position_ids] = ",
        "self.k = self.k.clone(); self.k[row, :, position_ids] = ",
        "1 aliased outputs, not those of k and v",
    ),
}


# ---- runs


class Run(NamedTuple):
    """How a command ended, and by rank what the stand-in reports: {"device", "graphs", "eager"}."""

    code: int
    out: str
    err: str
    ranks: list[dict]

    def ids(self) -> list[list[int]]:
        return [row["ids"] for row in json.loads(self.out)["completions"]]

    def read(self) -> list[list[int]]:
        """The shape of the ids that each graph of rank 0 reads."""
        return [graph["ids"] for graph in self.ranks[0]["graphs"]]


@pytest.fixture(scope="module")
def stand_in() -> None:
    """The stand-in's library is compiled, once for a version of torch; the first process that imports torch does it."""
    if shutil.which(os.environ.get("CXX", "g++")) is None:
        pytest.skip("no C++ compiler for the stand-in")
    if not Path(sysconfig.get_path("include"), "Python.h").exists():
        pytest.skip("no headers of Python for the stand-in")
    built = command("-c", "import torch; print(torch.ones(2, device='neuron:1').device)", PYTHONPATH=str(STAND_IN))
    assert built.stdout == "neuron:1\n", built.stderr


@pytest.fixture
def run(stand_in: None, tmp_path: Path) -> Callable[..., Run]:
    """run(*ARGS, stdin, ENVIRONMENT): `python ARGS` at the top of the repository, with the stand-in."""

    def start(*args: object, stdin: str = "", **environment: str) -> Run:
        reports = tmp_path / "reports"
        shutil.rmtree(reports, ignore_errors=True)
        reports.mkdir()
        own = {"PYTHONPATH": str(STAND_IN), "STAND_IN_REPORT": str(reports)}
        # ranks meet at a free port, whatever else runs here
        own |= {"PET_STANDALONE": "1", "OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE"}
        line = [sys.executable, *map(str, args)]
        ended = subprocess.run(
            line, cwd=ROOT, input=stdin, capture_output=True, text=True, timeout=300, env=os.environ | own | environment
        )
        ranks = [json.loads(path.read_text()) for path in sorted(reports.iterdir())]
        return Run(ended.returncode, ended.stdout, ended.stderr, ranks)

    return start


@pytest.fixture(scope="module")
def hf(hf_checkpoint: Callable, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One layer of a checkpoint, to compile sooner, with a tokenizer: w5 is token 5."""
    model, folder = hf_model(hf_checkpoint(FAMILY), torch.float32), tmp_path_factory.mktemp("hf")
    model.config.num_hidden_layers = 1
    del model.model.layers[1:]
    model.save_pretrained(folder)
    tokenizer = Tokenizer(WordLevel({f"w{token}": token for token in range(67)}, unk_token="w0"))
    tokenizer.pre_tokenizer = Whitespace()
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text('{"tokenizer_class": "PreTrainedTokenizerFast"}')
    return folder


@pytest.fixture(scope="module")
def weights(hf: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """weights(tp, **settings): a conversion of `hf`."""
    made: dict[str, Path] = {}

    def make(tp: int = 1, **settings: object) -> Path:
        key = repr((tp, settings))
        if key not in made:
            made[key] = tmp_path_factory.mktemp("weights")
            convert(hf, made[key], tp_degree=tp, **{"sequence_length": LENGTH} | settings)
        return made[key]

    return make


@pytest.fixture(scope="module")
def hf_ids(hf: Path) -> Callable[..., list[list[int]]]:
    """hf_ids(prompts, new_tokens): what HF adds to each, alone."""
    model = hf_model(hf, torch.float32)

    def answer(prompts: list[list[int]] = PROMPTS, new_tokens: int = NEW_TOKENS) -> list[list[int]]:
        return [hf_greedy(model, prompt, new_tokens)[1] for prompt in prompts]

    return answer


def flags(prompts: list[list[int]] = PROMPTS) -> list[object]:
    """Flags for ids as JSON, without an end."""
    given = ["--max-new-tokens", NEW_TOKENS, "--ignore-eos", "--json"]
    for prompt in prompts:
        given += ["--prompt-ids", ",".join(map(str, prompt))]
    return given


def wrong(ran: Run, expected: list[list[int]], tp: int) -> str:
    """What is wrong with a run on the device; nothing if it is right."""
    if ran.code != 0:
        return ran.err
    if ran.ids() != expected:
        return "other ids than HF's"
    if len(ran.ranks) != tp:
        return f"{len(ran.ranks)} ranks used a device"
    layers = json.loads(ran.out)["config"]["num_hidden_layers"]
    for rank, report in enumerate(ran.ranks):
        if report["device"] != rank:
            return f"rank {rank} is on device {report['device']}"
        if report["eager"]:
            return f"operators ran outside of graphs: {report['eager']}"
        if report["graphs"] != ran.ranks[0]["graphs"]:
            return f"rank {rank} has other graphs than rank 0"
        for graph in report["graphs"]:
            if graph["aliased"] != 2 * layers:
                return f"a graph has {graph['aliased']} aliased outputs, not those of k and v in {layers} layers"
    return ""


# ---- the command


def test_auto_takes_neuron_and_chunks_of_a_batch_share_a_graph(
    run: Callable, weights: Callable, hf_ids: Callable
) -> None:
    ran = run(COMMAND, "--ckpt", weights(prefill_chunk_size=3), *flags())
    assert not wrong(ran, hf_ids(), tp=1)
    assert json.loads(ran.out)["config"]["device"] == "neuron"
    assert ran.read() == [[2, 3], [2, 1]]  # one of the prompts ends in the third chunk, the other in the first


def test_flash_attention_and_another_activation_are_made_of_known_operators(
    run: Callable, converted: Callable, hf_checkpoint: Callable
) -> None:
    ckpt = converted("llama-3.1", sequence_length=LENGTH)
    ran = run(COMMAND, "--ckpt", ckpt, "--attn", "flash", *flags(PROMPTS[:1]))
    expected = hf_greedy(hf_model(hf_checkpoint("llama-3.1"), torch.float32), PROMPTS[0], NEW_TOKENS)[1]
    assert not wrong(ran, [expected], tp=1)
    assert ran.read() == [[1, LENGTH], [1, 1]]


def test_torchruns_ranks_have_a_device_each_and_a_batch_shares_a_bucket(
    run: Callable, weights: Callable, hf_ids: Callable
) -> None:
    ckpt = weights(2, context_encoding_buckets=BUCKETS)
    ran = run(*TORCHRUN, COMMAND, "--ckpt", ckpt, "--device", "neuron", *flags())
    assert not wrong(ran, hf_ids(), tp=2)
    assert ran.read() == [[2, 16], [2, 1]]


def test_two_ranks_that_share_the_vocabulary_read_a_piped_prompt_in_chunks(
    run: Callable, weights: Callable, hf_ids: Callable
) -> None:
    ckpt = weights(2, prefill_chunk_size=4, vocab_parallel=True)
    stdin = " ".join(f"w{token}" for token in PROMPTS[0])
    ran = run(COMMAND, "--ckpt", ckpt, "--tp", 2, *flags([]), stdin=stdin)
    assert not wrong(ran, hf_ids(PROMPTS[:1]), tp=2)
    assert ran.read() == [[1, 4], [1, 1]]


def test_sdpa_is_refused_in_one_line(run: Callable, weights: Callable) -> None:
    ran = run(COMMAND, "--ckpt", weights(), "--attn", "sdpa", *flags())
    assert (ran.code, ran.out, ran.ranks) == (2, "", [])
    assert ran.err.startswith("llama_neuron.py: error: --attn sdpa: TorchNeuron")
    assert ran.err.count("\n") == 1


EVERY_BUCKET = """
import json, sys
from llama_neuron import generate, load_model
model, completions = load_model(sys.argv[1], device="neuron"), []
for prompt in json.loads(sys.argv[2]):
    completions += generate(model, [prompt], 2, [])
completions, config = [{"ids": ids} for ids in completions], {"num_hidden_layers": model.config.num_hidden_layers}
print(json.dumps({"completions": completions, "config": config}))
"""


@pytest.mark.slow
@pytest.mark.parametrize("limited", [False, True], ids=["as it is", "by torch's own limit"])
def test_there_may_be_more_buckets_than_torch_compiles_anew(
    limited: bool, run: Callable, weights: Callable, hf_ids: Callable, tmp_path: Path
) -> None:
    buckets = [*range(2, 10), LENGTH]  # torch stops at 8 graphs
    prompts = [list(range(1, 1 + length)) for length in (*buckets[:-1], 20)]
    text = '"recompile_limit": graphs, '
    plant(text, "" if limited else text, tmp_path)
    (tmp_path / "every_bucket.py").write_text(EVERY_BUCKET)
    ran = run(tmp_path / "every_bucket.py", weights(context_encoding_buckets=buckets), json.dumps(prompts))
    found = wrong(ran, hf_ids(prompts, 2), tp=1)
    if limited:
        assert "recompile limit exceeded" in found
    else:
        assert not found
        assert ran.read() == [[1, 2], [1, 1], *([1, length] for length in buckets[1:])]


TWO_MODELS = """
import json, sys
from llama_neuron import generate, load_model
completions = []
for length in (48, 32):
    model = load_model(sys.argv[1], sequence_length=length, device="neuron")
    completions += generate(model, json.loads(sys.argv[2]), 2, [])
completions, config = [{"ids": ids} for ids in completions], {"num_hidden_layers": model.config.num_hidden_layers}
print(json.dumps({"completions": completions, "config": config}))
"""


@pytest.mark.slow
def test_two_models_of_one_process_have_graphs_of_their_own(
    run: Callable, weights: Callable, hf_ids: Callable, tmp_path: Path
) -> None:
    """torch counts graphs by the code that they come from, unless they are isolated."""
    (tmp_path / "two_models.py").write_text(TWO_MODELS)
    ran = run(tmp_path / "two_models.py", weights(), json.dumps(PROMPTS[:1]), PYTHONPATH=f"{STAND_IN}:{ROOT}")
    assert not wrong(ran, hf_ids(PROMPTS[:1] * 2, 2), tp=1)
    assert ran.read() == [[1, 48], [1, 1], [1, 32], [1, 1]]


# ---- captures


@pytest.mark.parametrize("tp", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_an_audit_passes_what_is_captured_on_the_device(
    tp: int, run: Callable, weights: Callable, hf: Path, tmp_path: Path
) -> None:
    file = tmp_path / "captured.safetensors"
    prompts = ("--prompt-ids", "5,11,2,60,33,47,3", "--prompt-ids", "7,1")
    ckpt = weights(tp, context_encoding_buckets=BUCKETS)
    ran = run("-m", "tools.capture", "--ckpt", ckpt, "--device", "neuron", *prompts, "--out", file)
    assert ran.code == 0, ran.err
    assert [rank["device"] for rank in ran.ranks] == list(range(tp))
    assert ran.read() == [[2, 16], [2, 1]]
    audited = command("-m", "tools.audit", "--hf", hf, "--captured", file)
    assert audited.returncode == 0, audited.stdout + audited.stderr


# ---- a device of another name
#
# The code that `--device cuda` takes: no compiler, as many slots as the text has, and between ranks a process group
# whose name is not the device's.


@pytest.mark.parametrize("tp", [1, 2])
def test_a_device_that_torch_knows_by_name_runs_eagerly_and_has_hfs_ids(
    tp: int, run: Callable, weights: Callable, hf_ids: Callable
) -> None:
    ran = run(COMMAND, "--ckpt", weights(tp), "--tp", tp, "--device", "other", *flags(), STAND_IN_DEVICE="other")
    assert ran.code == 0, ran.err
    assert ran.ids() == hf_ids()
    assert [(rank["device"], rank["graphs"]) for rank in ran.ranks] == [(number, []) for number in range(tp)]
    assert all(rank["eager"]["aten::mm.out"] > 0 for rank in ran.ranks)


# ---- faults


def plant(text: str, planted: str, folder: Path) -> Path:
    """A copy of COMMAND in which `text`, which is there once, is `planted`."""
    source = (ROOT / COMMAND).read_text()
    assert source.count(text) == 1, f"{text!r} is {source.count(text)} times in {COMMAND}: bring FAULTS up to date"
    copy = folder / COMMAND
    copy.write_text(source.replace(text, planted))
    for name in ("launch", "checkpoint", "cpu"):
        shutil.copytree(ROOT / name, folder / name)
    return copy


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.slow if FAULTS[name].is_slow else ()) for name in FAULTS]
)
def test_a_planted_fault_is_found(
    name: str, run: Callable, weights: Callable, hf_ids: Callable, tmp_path: Path
) -> None:
    fault = FAULTS[name]
    copy = plant(fault.text, fault.planted, tmp_path)
    ran = run(copy, "--ckpt", weights(fault.tp), "--device", fault.device, *flags(), STAND_IN_DEVICE=fault.device)
    assert fault.ended_by in wrong(ran, hf_ids(), fault.tp)

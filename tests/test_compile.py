"""`--compile`: what compiled code decodes, against Hugging Face. What `cpu/` does on its own is in `test_cpu.py`."""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from tokenizers import Tokenizer
from torch import Tensor

from convert_weights import convert
from launch.compiled import compile_decode
from llama_neuron import LlamaForCausalLM, backend_for, generate, load_model
from test_llama_neuron import NEW_TOKENS, PROMPTS, TOLERANCE, greedy_logits
from tests.helpers import ROOT, command, hf_greedy, hf_model
from tests.test_ranks import mounting

# biases, gelu_pytorch_tanh and no even size; llama3 rope, tied embeddings and three query heads for a KV head
ODD, LLAMA3 = "odd sizes", "llama-3.2"
LENGTH = 512
COMMAND = "llama_neuron.py"


@pytest.fixture(scope="module", autouse=True)
def keep(code: Path) -> None:
    """All tests keep code, and use what others have kept."""


def compiled_model(ckpt: Path, batch_size: int = 1, length: int = LENGTH, attn: str = "eager") -> LlamaForCausalLM:
    """As `--compile` makes it."""
    backend = backend_for("cpu", attn)
    model = load_model(ckpt, batch_size=batch_size, sequence_length=length, backend=backend)
    compile_decode(model)
    return model


def random_prompt(tokens: int) -> list[int]:
    return torch.randint(96, (tokens,), generator=torch.Generator().manual_seed(0)).tolist()


def token_by_token(model: LlamaForCausalLM, ids: Tensor) -> Tensor:
    """float32 logits [B,T,V] of ids [B,T], each token in a call of its own."""
    logits = []
    with torch.inference_mode():
        for position, token in enumerate(ids.int().split(1, dim=1)):
            positions = torch.full_like(token, position)
            logits.append(model(token, positions, kv_length=position + 1))
    return torch.cat(logits, dim=1)


# ---- ids, against HF


@pytest.mark.parametrize(("family", "attn"), [(ODD, "eager"), (LLAMA3, "eager"), (LLAMA3, "sdpa")])
def test_ids_are_hfs(family: str, attn: str, hf_checkpoint: Callable, converted: Callable) -> None:
    _, expected = hf_greedy(hf_model(hf_checkpoint(family), torch.float32), PROMPTS[0], NEW_TOKENS)
    assert generate(compiled_model(converted(family), attn=attn), PROMPTS[:1], NEW_TOKENS, []) == [expected]


@pytest.mark.parametrize(
    ("prompt", "new", "length"),
    [
        (1, NEW_TOKENS, LENGTH),  # a prompt of one token is read by compiled code
        (120, 20, LENGTH),
        (240, 99, LENGTH),  # a text that grows beyond the example that was compiled
        (470, 99, LENGTH),  # and fills the cache
        (40, 99, 64),  # which is smaller than the example
        (1, 99, 3),
    ],
)
def test_one_code_serves_every_length_of_text_and_cache(
    prompt: int, new: int, length: int, hf_checkpoint: Callable, converted: Callable, code: Path
) -> None:
    ids = random_prompt(prompt)
    _, expected = hf_greedy(hf_model(hf_checkpoint(LLAMA3), torch.float32), ids, min(new, length - prompt))
    ckpt = converted(LLAMA3)
    compiled_model(ckpt)
    files = sorted(code.glob("*.so"))
    assert generate(compiled_model(ckpt, length=length), [ids], new, []) == [expected]
    assert sorted(code.glob("*.so")) == files


RUN_KEPT = """
import sys, torch
from launch.compiled import compile_decode
from llama_neuron import generate, load_model
torch.set_num_threads(1)
model = load_model(sys.argv[1])
compile_decode(model)
print(generate(model, [[7]], int(sys.argv[2]), []), "torch._inductor" in sys.modules)
"""


def test_code_that_was_kept_is_used_without_the_compiler(hf_checkpoint: Callable, converted: Callable) -> None:
    ckpt = converted(LLAMA3)
    compiled_model(ckpt)
    ran = command("-c", RUN_KEPT, ckpt, NEW_TOKENS)
    _, expected = hf_greedy(hf_model(hf_checkpoint(LLAMA3), torch.float32), [7], NEW_TOKENS)
    assert (ran.stdout, ran.returncode) == (f"{[expected]} False\n", 0), ran.stderr


def test_a_second_model_of_a_process_is_compiled_for_itself(
    hf_checkpoint: Callable, converted: Callable, tmp_path: Path
) -> None:
    """The two differ in nothing but their activation, so that a graph of the one can run with the other's weights."""
    silu, relu = hf_checkpoint(LLAMA3), tmp_path / "relu"
    shutil.copytree(silu, relu)
    config = json.loads((relu / "config.json").read_text())
    (relu / "config.json").write_text(json.dumps(config | {"hidden_act": "relu"}))
    convert(relu, tmp_path / "converted")
    ours, expected = [], []
    for path, ckpt in ((silu, converted(LLAMA3)), (relu, tmp_path / "converted")):
        expected.append(hf_greedy(hf_model(path, torch.float32), PROMPTS[0], NEW_TOKENS)[1])
        ours += generate(compiled_model(ckpt), PROMPTS[:1], NEW_TOKENS, [])
    assert expected[0] != expected[1]
    assert ours == expected


# ---- logits, against HF


def assert_logits_and_ids_are_hfs(model: LlamaForCausalLM, hf: object, prompts: list[list[int]]) -> None:
    for prompt, (logits, ids) in zip(prompts, greedy_logits(model, prompts, NEW_TOKENS), strict=True):
        theirs, expected = hf_greedy(hf, prompt, NEW_TOKENS)
        assert ids == expected
        torch.testing.assert_close(logits, theirs, rtol=0, atol=TOLERANCE * float(theirs.abs().max()))


def test_logits_are_hfs(hf_checkpoint: Callable, converted: Callable) -> None:
    model, hf = compiled_model(converted(LLAMA3)), hf_model(hf_checkpoint(LLAMA3), torch.float32)
    assert_logits_and_ids_are_hfs(model, hf, PROMPTS[:1])


def test_logits_and_ids_of_a_batch_are_hfs(hf_checkpoint: Callable, converted: Callable) -> None:
    """With flash attention, whose single rows are eager's: it is the code of both."""
    model, hf = compiled_model(converted(ODD), 2, attn="flash"), hf_model(hf_checkpoint(ODD), torch.float32)
    assert_logits_and_ids_are_hfs(model, hf, PROMPTS)
    for prompts in (PROMPTS, [[5], [40]]):  # prompts of one token are read by compiled code
        assert generate(model, prompts, NEW_TOKENS, []) == [hf_greedy(hf, prompt, NEW_TOKENS)[1] for prompt in prompts]


def test_a_batch_in_bfloat16_is_as_near_to_float32_as_hf(hf_checkpoint: Callable, converted: Callable) -> None:
    path, ids = hf_checkpoint(LLAMA3), torch.tensor(random_prompt(20)).view(2, 10)
    with torch.inference_mode():
        truth, hfs = (hf_model(path, dtype)(ids).logits.float() for dtype in (torch.float32, torch.bfloat16))
    logits = token_by_token(compiled_model(converted(LLAMA3, dtype="bfloat16"), 2), ids)
    assert (logits - truth).abs().mean() < 1.1 * (hfs - truth).abs().mean()


# ---- the command


@pytest.mark.parametrize("tp", [1, 2])
def test_the_command_has_hfs_ids(tp: int, hf_checkpoint: Callable, converted: Callable) -> None:
    prompt = ",".join(map(str, PROMPTS[0]))
    flags = ("--compile", "--max-new-tokens", NEW_TOKENS, "--json", "--prompt-ids", prompt)
    ran = command(COMMAND, "--ckpt", converted(ODD, tp), *flags, OMP_NUM_THREADS=str(tp))  # a thread for each rank
    assert ran.returncode == 0, ran.stderr
    result = json.loads(ran.stdout)
    _, expected = hf_greedy(hf_model(hf_checkpoint(ODD), torch.float32), PROMPTS[0], NEW_TOKENS)
    assert result["completions"][0]["ids"] == expected
    assert result["timings"]["compile_s"] > 0


def refusal(*args: object, **environment: str) -> str:
    """The one line on stderr with which the command refuses."""
    ran = command(COMMAND, "--compile", "--prompt-ids", "1,2", *args, **environment)
    assert (ran.returncode, ran.stdout, ran.stderr.count("\n")) == (1, "", 1), ran.stderr
    return ran.stderr.removeprefix(f"{COMMAND}: error: ").rstrip("\n")


def test_without_a_compiler_one_line_says_what_to_install(converted: Callable, tmp_path: Path) -> None:
    line = refusal("--ckpt", converted(ODD), CXX="no-such-compiler", TORCHINDUCTOR_CACHE_DIR=str(tmp_path))
    assert line.endswith("needs a C++ compiler, no-such-compiler is not there: install g++ or set CXX")


def test_if_code_cannot_be_kept_one_line_names_the_folder(converted: Callable) -> None:
    file = converted(ODD) / "config.json"
    line = refusal("--ckpt", converted(ODD), TORCHINDUCTOR_CACHE_DIR=str(file))
    assert "File exists" in line and str(file) in line


NAMELESS = ("setpriv", "--reuid=54321", "--regid=54321", "--clear-groups")
# what root can read, this user can too: the checkout and Python may be in root's home
NAMELESS += ("--inh-caps=+dac_read_search", "--ambient-caps=+dac_read_search")


@pytest.mark.slow
@pytest.mark.parametrize("home", [(), ("HOME=/",), ("HOME=/nonexistent",)], ids=str)
def test_without_a_home_one_line_names_the_variable(home: tuple[str, ...], converted: Callable) -> None:
    if os.geteuid() != 0 or shutil.which("setpriv") is None:
        pytest.skip("only root can be a user without a name, by setpriv")
    prefix = (*NAMELESS, "env", "-u", "HOME", "-u", "TORCHINDUCTOR_CACHE_DIR", *home)
    assert "name a folder of your own by TORCHINDUCTOR_CACHE_DIR" in refusal_of(prefix, converted(ODD))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("options", "says"),
    [
        ("size=64k", "No space left on device"),  # for the library
        ("size=1m", "No space left on device"),  # for the layer
        ("size=200m,nr_inodes=6", "No space left on device"),
        ("size=200m,noexec", "compiled code cannot be executed"),
        ("ro", "Read-only file system"),
    ],
)
def test_a_disk_that_cannot_hold_code_is_named_in_one_line(
    options: str, says: str, converted: Callable, tmp_path: Path
) -> None:
    prefix = (*mounting(options, str(tmp_path)), "env", f"TORCHINDUCTOR_CACHE_DIR={tmp_path}/code")
    line = refusal_of(prefix, converted(ODD))
    assert says in line and "TORCHINDUCTOR_CACHE_DIR" in line


@pytest.mark.slow
def test_a_compiler_that_fails_is_named_in_one_line(converted: Callable, tmp_path: Path) -> None:
    line = refusal("--ckpt", converted(ODD), CXX="false", TORCHINDUCTOR_CACHE_DIR=str(tmp_path))
    assert "the C++ compiler false failed" in line and "CXX" in line


def refusal_of(prefix: tuple[str, ...], ckpt: Path) -> str:
    """The one line on stderr with which the command refuses that starts with `prefix`."""
    line = (*prefix, sys.executable, str(ROOT / COMMAND), "--compile", "--prompt-ids", "1,2", "--ckpt", str(ckpt))
    ran = subprocess.run(line, capture_output=True, text=True, timeout=300)
    assert (ran.returncode, ran.stdout, ran.stderr.count("\n")) == (1, "", 1), ran.stderr
    return ran.stderr


def test_ranks_of_torchrun_are_refused(converted: Callable) -> None:
    torchrun = ("-m", "torch.distributed.run", "--nproc-per-node", 2, ROOT / COMMAND)
    ran = command(*torchrun, "--ckpt", converted(ODD, 2), "--compile", "--prompt-ids", "1,2")
    assert ran.returncode != 0
    (line,) = {line for line in ran.stderr.splitlines() if line.startswith("llama_neuron.py: error: ")}
    assert "--compile" in line and line.endswith("without torchrun: leave it out")


# ---- the real SmolLM2


def divergence(truth: Tensor, logits: Tensor) -> float:
    """KL(softmax(truth) || softmax(logits)) of [T,V], the mean over T."""
    expected, got = (F.log_softmax(x.double(), dim=-1) for x in (truth, logits))
    return float(F.kl_div(got, expected, log_target=True, reduction="batchmean"))


@pytest.mark.slow
def test_smollm2_in_bfloat16_is_as_near_to_float32_as_hf(smollm2: Path, smollm2_converted: Callable) -> None:
    tokenizer = Tokenizer.from_file(str(smollm2 / "tokenizer.json"))
    ids = torch.tensor([tokenizer.encode((ROOT / "LICENSE").read_text()).ids[:500]])
    assert ids.shape == (1, 500)
    with torch.inference_mode():
        truth, hfs = (hf_model(smollm2, dtype)(ids).logits[0] for dtype in (torch.float32, torch.bfloat16))
    model = compiled_model(smollm2_converted(1, "bfloat16"), length=1024)
    ours, theirs = divergence(truth, token_by_token(model, ids)[0]), divergence(truth, hfs)
    print(f"from HF's float32 logits: compiled {ours:.3e} nats, HF in bfloat16 {theirs:.3e}")
    assert ours <= 1.1 * theirs


@pytest.mark.slow
def test_smollm2_as_a_user_compiles_it_has_hfs_ids(smollm2_converted: Callable, smollm2_answer: Callable) -> None:
    """On all threads: code for one is other code."""
    flags = ("--compile", "--json", "--max-new-tokens", 24, "--ignore-eos", "--prompt", "The capital of France is")
    ran = command(COMMAND, "--ckpt", smollm2_converted(1, "float32"), *flags)
    assert ran.returncode == 0, ran.stderr
    (completion,) = json.loads(ran.stdout)["completions"]
    assert (completion["prompt_ids"], completion["ids"]) == smollm2_answer("float32")

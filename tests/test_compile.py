"""`--compile`: decoding through Inductor against Hugging Face, and the shared memory between ranks against torch.

Nothing here is compared with what eager decoding gives, which has tests of its own.
"""

import json
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
import torch.nn.functional as F
from tokenizers import Tokenizer
from torch import Tensor
from torch._inductor.utils import run_and_get_code
from torch.torch_version import TorchVersion

import test_llama_neuron
from llama_neuron import (
    LlamaForCausalLM,
    SharedMemory,
    cache_slots,
    compile_decode,
    exit_on_usage_error,
    gather_from_tensor_model_parallel_region,
    generate,
    greedy_steps,
    linear,
    load_model,
    main,
    next_tokens,
    reduce_from_tensor_model_parallel_region,
)
from test_llama_neuron import NEW_TOKENS, PROMPTS, ROOT, TOLERANCE, command, hf_greedy, hf_model

hf_checkpoint, smollm2 = test_llama_neuron.hf_checkpoint, test_llama_neuron.smollm2  # fixtures

# biases, gelu_pytorch_tanh and no even size; llama3 rope, tied embeddings and three query heads for a KV head
ODD, LLAMA3 = "odd sizes", "llama-3.2"
LENGTH = 512
COMMAND = "llama_neuron.py"


@pytest.fixture(scope="module", autouse=True)
def code(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Where compiled code is kept: nothing of an earlier run is used."""
    folder = tmp_path_factory.mktemp("code")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TORCHINDUCTOR_CACHE_DIR", str(folder))
        yield folder


def compiled_model(path: Path, dtype: torch.dtype, batch_size: int = 1, length: int = LENGTH) -> LlamaForCausalLM:
    """As `--compile` makes it."""
    model = load_model(path, dtype=dtype, batch_size=batch_size, sequence_length=length)
    compile_decode(model)
    return model


def random_prompt(tokens: int) -> list[int]:
    return torch.randint(96, (tokens,), generator=torch.Generator().manual_seed(0)).tolist()


# --------------------------------------------------------------------------------------------------- ids, against HF


@pytest.mark.parametrize("family", [ODD, LLAMA3])
def test_ids_are_hfs(family: str, hf_checkpoint: Callable) -> None:
    path = hf_checkpoint(family)
    _, expected = hf_greedy(hf_model(path, torch.float32), PROMPTS[0], NEW_TOKENS)
    assert generate(compiled_model(path, torch.float32), PROMPTS[:1], NEW_TOKENS, ()) == [expected]


@pytest.mark.parametrize(
    ("prompt", "limit", "length", "buckets"),
    [
        (1, NEW_TOKENS, LENGTH, [1, 128]),  # a prompt of one token is read by the compiled layer
        (120, 20, LENGTH, [128, 256]),  # a text that outgrows its bucket
        (250, 999, LENGTH, [256, LENGTH]),  # and fills the cache
        (40, 99, 64, [64]),  # which is smaller than any bucket
        (1, 99, 3, [1, 3]),  # or than the example that was compiled
    ],
)
def test_one_code_serves_every_length_of_text_and_cache(
    prompt: int, limit: int, length: int, buckets: list[int], hf_checkpoint: Callable, code: Path
) -> None:
    path, ids, new = hf_checkpoint(LLAMA3), random_prompt(prompt), min(limit, length - prompt)
    assert {len(cache_slots(tokens, length)) for tokens in (prompt, prompt + new)} == {*buckets}
    _, expected = hf_greedy(hf_model(path, torch.float32), ids, new)
    compiled_model(path, torch.float32)
    files = sorted(code.glob("*.so"))
    assert generate(compiled_model(path, torch.float32, length=length), [ids], limit, ()) == [expected]
    assert sorted(code.glob("*.so")) == files


RUN_KEPT = """
import sys, torch
from llama_neuron import compile_decode, generate, load_model
torch.set_num_threads(1)
model = load_model(sys.argv[1], dtype=torch.float32)
compile_decode(model)
print(generate(model, [[7]], int(sys.argv[2]), ()), "torch._inductor" in sys.modules)
"""


def test_code_that_was_kept_is_used_without_the_compiler(hf_checkpoint: Callable) -> None:
    path = hf_checkpoint(LLAMA3)
    compiled_model(path, torch.float32)
    ran = command("-c", RUN_KEPT, path, NEW_TOKENS)
    _, expected = hf_greedy(hf_model(path, torch.float32), [7], NEW_TOKENS)
    assert (ran.stdout, ran.returncode) == (f"{[expected]} False\n", 0), ran.stderr


@pytest.mark.parametrize(("rows", "columns"), [(5, 2048), (6, 8192), (3, 4100)])
@pytest.mark.parametrize(("dtype", "bound"), [(torch.bfloat16, 2**-8), (torch.float32, 1e-6)])  # one rounding; sums
def test_a_product_of_long_rows_is_summed_plainly(rows: int, columns: int, dtype: torch.dtype, bound: float) -> None:
    torch.manual_seed(0)
    x, weight, bias = (torch.randn(shape, dtype=dtype) for shape in ((1, 1, columns), (rows, columns), (rows,)))
    torch._dynamo.reset()
    y, code = run_and_get_code(torch.compile(linear, fullgraph=True), x, weight, bias)
    assert "Cascade" not in "".join(code)  # the sum that takes twice the time
    expected = F.linear(x.double(), weight.double(), bias.double())
    assert (y.double() - expected).abs().max() < bound * expected.abs().max()


def test_a_second_model_of_a_process_is_compiled_for_itself(hf_checkpoint: Callable, tmp_path: Path) -> None:
    """The two differ in nothing but their activation, so that a graph of the one can run with the other's weights."""
    paths = [hf_checkpoint("llama-3"), tmp_path / "relu"]
    shutil.copytree(*paths)
    config = paths[1] / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"hidden_act": "relu"}))
    expected = [hf_greedy(hf_model(path, torch.float32), PROMPTS[0], NEW_TOKENS)[1] for path in paths]
    assert expected[0] != expected[1]
    models = [compiled_model(path, torch.float32) for path in paths]
    assert [generate(model, PROMPTS[:1], NEW_TOKENS, ())[0] for model in models] == expected


# ------------------------------------------------------------------------------------------------ logits, against HF


@pytest.mark.parametrize(("family", "prompts"), [(ODD, PROMPTS), (LLAMA3, PROMPTS[:1])], ids=["batch", "one"])
def test_logits_are_hfs(family: str, prompts: list[list[int]], hf_checkpoint: Callable) -> None:
    """Of a batch too, whose products are torch's own."""
    path = hf_checkpoint(family)
    model, hf = compiled_model(path, torch.float32, len(prompts)), hf_model(path, torch.float32)
    logits: list[Tensor] = []
    ids = list(zip(*greedy_steps(model, prompts, NEW_TOKENS, (), logits), strict=True))
    for row, prompt in enumerate(prompts):
        ours = torch.cat([logits[0][row, : len(prompt)], *(step[row] for step in logits[1:])])
        theirs, expected = hf_greedy(hf, prompt, NEW_TOKENS)
        assert list(ids[row]) == expected
        torch.testing.assert_close(ours, theirs, rtol=0, atol=TOLERANCE * float(theirs.abs().max()))


def test_a_batch_in_bfloat16_is_as_near_to_float32_as_hf(hf_checkpoint: Callable) -> None:
    path = hf_checkpoint(LLAMA3)
    ids = torch.tensor([random_prompt(20)[:10], random_prompt(20)[10:]])
    with torch.inference_mode():
        truth, hfs = (hf_model(path, dtype)(ids).logits.float() for dtype in (torch.float32, torch.bfloat16))
        model, logits = compiled_model(path, torch.bfloat16, batch_size=2), []
        for token in range(ids.shape[1]):
            at = torch.full((2, 1), token, dtype=torch.int32)
            logits.append(model(ids[:, token : token + 1].int(), at, slots=cache_slots(token + 1, LENGTH)))
    assert (torch.cat(logits, dim=1) - truth).abs().mean() < 1.1 * (hfs - truth).abs().mean()


# ------------------------------------------------------------------------------------------------------------- ranks


def test_two_ranks_have_hfs_ids(hf_checkpoint: Callable) -> None:
    path, (prompt, *_) = hf_checkpoint(ODD), PROMPTS
    flags = ("--tp", 2, "--dtype", "float32", "--compile", "--max-new-tokens", NEW_TOKENS, "--json")
    ran = command(COMMAND, "--ckpt", path, *flags, "--prompt-ids", ",".join(map(str, prompt)))
    assert ran.returncode == 0, ran.stderr
    result = json.loads(ran.stdout)
    _, expected = hf_greedy(hf_model(path, torch.float32), prompt, NEW_TOKENS)
    assert result["completions"][0]["ids"] == expected
    assert result["timings"]["compile_s"] > 0


RANKS, TURNS = 3, 200
LARGE = ((3, 240_007), torch.float32)  # of three pieces, the last of them short
FULL = ((SharedMemory.SIZE // 2,), torch.bfloat16)  # just one piece
EXCHANGED = [((1, 1, 7), torch.float32), ((2, 5), torch.bfloat16), FULL, LARGE]


def numbers(rank: int, turn: int, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """What a rank sends in a turn: whole numbers so small that sums of them are exact in bfloat16."""
    values = torch.arange(torch.Size(shape).numel()) + 31 * rank + 7 * turn
    return (values % 85 - 42).to(dtype).view(shape)


def exchange_rank(rank: int, store: str, memory: Tensor, posts: list) -> None:
    torch.set_num_threads(1)
    shared, received = SharedMemory(rank, memory, posts), []
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=RANKS)
    for turn in range(TURNS):
        if (turn + rank) % 10 == 0:
            time.sleep(0.002)  # so that each rank is late at some time, and the others a turn ahead of it
        for shape, dtype in EXCHANGED:
            if turn % 20 == 0 or (shape, dtype) not in (FULL, LARGE):
                x = torch.ops.llama_neuron.exchange(numbers(rank, turn, shape, dtype))
                received.append((x, turn, shape, dtype))
    for x, *what in received:  # after all turns: what was received stays as it was
        assert torch.equal(x, torch.stack([numbers(sender, *what) for sender in range(RANKS)])), what
    for shape, dtype in EXCHANGED:
        x = numbers(rank, 0, shape, dtype)
        for own in (x, x.T) if x.dim() == 2 else (x[..., None],):  # x.T is not contiguous
            turn, summed, rows = shared.turn, own.clone().contiguous(), [torch.empty_like(own) for _ in range(RANKS)]
            pieces = -(-own.nbytes // SharedMemory.SIZE)
            reduced = reduce_from_tensor_model_parallel_region(own)
            assert shared.turn == (turn + pieces) % 2  # it was not gloo
            gathered = gather_from_tensor_model_parallel_region(own)
            dist.all_reduce(summed)
            dist.all_gather(rows, own.contiguous())
            assert torch.equal(reduced, summed), (shape, dtype)
            assert torch.equal(gathered, torch.cat(rows, dim=-1)), (shape, dtype)
    dist.destroy_process_group()


def exchange_ranks(process: int, store: str) -> None:
    """Forks the ranks, as the command does: from a process that has computed nothing."""
    mp.start_processes(exchange_rank, (store, *SharedMemory.allocate(RANKS)), nprocs=RANKS, start_method="fork")


def test_ranks_exchange_through_memory_what_torch_stacks_sums_and_gathers() -> None:
    with tempfile.TemporaryDirectory() as folder:
        parent = mp.start_processes(exchange_ranks, (f"{folder}/store",), join=False, start_method="spawn")
        done = parent.join(100)
        if not done:
            parent.processes[0].kill()  # and with it the ranks, see torch.multiprocessing
        assert done, "a rank waits for ever"


# --------------------------------------------------------------------------------------------------------- refusals


@pytest.mark.parametrize("compiler", ["no-such-compiler", None])
def test_without_a_compiler_one_line_tells_what_to_install(
    compiler: str | None, hf_checkpoint: Callable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if compiler:
        monkeypatch.setenv("CXX", compiler)
    else:
        monkeypatch.delenv("CXX", raising=False)
        monkeypatch.setenv("PATH", str(tmp_path))
    ran = command(COMMAND, "--ckpt", hf_checkpoint(ODD), "--compile", "--prompt-ids", "1,2")
    line = f"--compile needs a C++ compiler, {compiler or 'g++'} is not there: install g++, or set CXX"
    assert (ran.returncode, ran.stdout, ran.stderr) == (2, "", f"llama_neuron.py: error: {line}\n")


def test_where_code_cannot_be_kept_one_line_tells_so(hf_checkpoint: Callable, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(hf_checkpoint(ODD) / "config.json"))
    ran = command(COMMAND, "--ckpt", hf_checkpoint(ODD), "--compile", "--prompt-ids", "1,2")
    assert (ran.returncode, ran.stdout, ran.stderr.count("\n")) == (2, "", 1)
    assert "config.json, set TORCHINDUCTOR_CACHE_DIR: [Errno 17] File exists: " in ran.stderr


def test_ranks_that_exchange_through_gloo_are_refused(hf_checkpoint: Callable) -> None:
    torchrun = ("-m", "torch.distributed.run", "--nproc-per-node", 2, ROOT / COMMAND)
    ran = command(*torchrun, "--ckpt", hf_checkpoint(ODD), "--compile", "--prompt-ids", "1,2")
    assert ran.returncode != 0
    line = "--compile needs ranks that exchange through memory: start them with --tp, without torchrun"
    assert f"llama_neuron.py: error: {line}\n" in ran.stderr


def test_packed_weights_are_refused(hf_checkpoint: Callable) -> None:
    model = load_model(hf_checkpoint(ODD), dtype=torch.bfloat16)
    if not model.packs:
        pytest.skip("oneDNN has no bfloat16 kernels for this CPU")
    generate(model, [[1, 2]], 2, ())
    with pytest.raises(ValueError, match="call it before the model has decoded anything"):
        compile_decode(model)


def test_an_older_torch_is_refused(hf_checkpoint: Callable, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    monkeypatch.setattr(torch, "__version__", TorchVersion("2.9.1+cpu"))
    monkeypatch.setattr(sys, "argv", [COMMAND, "--ckpt", str(hf_checkpoint(ODD)), "--compile", "--prompt-ids", "1,2"])
    with pytest.raises(SystemExit, match="2"):
        exit_on_usage_error(main)
    line = "llama_neuron.py: error: --compile needs torch 2.13, this is 2.9.1+cpu: leave it out\n"
    assert capsys.readouterr() == ("", line)


# -------------------------------------------------------------------------------------------------- the real SmolLM2


@pytest.fixture
def all_threads(one_thread: None) -> Iterator[None]:
    """As a user runs it."""
    threads = torch.get_num_threads()
    torch.set_num_threads(len(os.sched_getaffinity(0)))
    yield
    torch.set_num_threads(threads)


def divergence(truth: Tensor, logits: Tensor) -> float:
    """KL(softmax(truth) || softmax(logits)) of [T,V], the mean over T."""
    expected, got = (F.log_softmax(x.double(), dim=-1) for x in (truth, logits))
    return float(F.kl_div(got, expected, log_target=True, reduction="batchmean"))


@pytest.mark.slow
def test_smollm2_in_bfloat16_is_as_near_to_float32_as_hf(smollm2: tuple[Path, Path], all_threads: None) -> None:
    path, text = smollm2[0], (ROOT / "README.md").read_text()
    ids = torch.tensor([Tokenizer.from_file(str(path / "tokenizer.json")).encode(text).ids[:500]])
    assert ids.shape == (1, 500)
    with torch.inference_mode():
        truth, hfs = (hf_model(path, dtype)(ids).logits[0] for dtype in (torch.float32, torch.bfloat16))
    model, logits = compiled_model(path, torch.bfloat16, length=1024), []
    last = torch.zeros(1, dtype=torch.long)
    for start, stop in [(0, 2), *((token, token + 1) for token in range(2, 500))]:  # token by token, two of them eager
        token, position = ids[0, start:stop].int()[None], torch.arange(start, stop, dtype=torch.int32)[None]
        next_tokens(model, token, position, last, logits, slots=cache_slots(stop, 1024))
    ours, theirs = divergence(truth, torch.cat(logits, dim=1)[0]), divergence(truth, hfs)
    print(f"from HF's float32 logits: compiled {ours:.3e} nats, HF in bfloat16 {theirs:.3e}")
    assert ours <= 1.1 * theirs


@pytest.mark.slow
def test_smollm2_in_float32_has_hfs_ids(smollm2: tuple[Path, Path], all_threads: None) -> None:
    path = smollm2[0]
    prompt = Tokenizer.from_file(str(path / "tokenizer.json")).encode("The capital of France is").ids
    _, expected = hf_greedy(hf_model(path, torch.float32), prompt, 24)
    assert generate(compiled_model(path, torch.float32), [prompt], 24, ()) == [expected]

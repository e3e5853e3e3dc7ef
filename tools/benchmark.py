"""Speed of `llama_neuron.py` beside Hugging Face, llama.cpp and gpt-fast: `python -m tools.benchmark --hf DIR`.

A case is a process of its own that warms up and then measures. The cases of a group run one after the other, and
the group `--rounds` times over, because a shared machine changes its speed from minute to minute: ratios are taken
within a round, and what is printed is the median (and the range) of the rounds. llama.cpp joins where `llama_cpp` can
be imported, gpt-fast where `--gpt-fast` names a checkout of it. What is not measured is named.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass, replace
from datetime import date
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path
from statistics import median

import torch
import torch.distributed as dist
from torch import Tensor

from convert_weights import open_checkpoint
from llama_neuron import (
    DTYPES,
    LlamaConfig,
    NeuronConfig,
    compile_decode,
    count_numbers,
    exit_on_usage_error,
    greedy_steps,
    load_model,
    positive,
    require,
    start_ranks,
)

ROOT = Path(__file__).parent.parent
GROUPS = ("bf16", "fp32", "batch", "length", "cache", "process")
BASELINE = "HF sdpa"  # what ratios are taken against


@dataclass(frozen=True)
class Case:
    """One thing to time: `system` at one setting; decoding starts after `prompt` tokens and makes `new` more."""

    system: str
    dtype: str = "bfloat16"
    batch: int = 1
    tp: int = 1
    prompt: int = 128
    new: int = 64
    cache: int = 512

    @property
    def name(self) -> str:
        return self.system + (f", tp {self.tp}" if self.tp > 1 else "")

    def prompts(self, vocab_size: int) -> list[list[int]]:
        generator = torch.Generator().manual_seed(0)
        return torch.randint(vocab_size, (self.batch, self.prompt), generator=generator).tolist()


# ------------------------------------------------------------------------------------- in the process of a case: timing


def seconds(clock: list[float]) -> dict[str, float]:
    """Of prefill and of a decoding step (the mean), from the times of the start and of each token."""
    return {"prefill_s": clock[1] - clock[0], "step_s": (clock[-1] - clock[1]) / (len(clock) - 2)}


def timed(steps: Callable[[], Iterable]) -> dict[str, float]:
    """The seconds of steps that make a token each, after a warm-up."""
    for _ in range(2):
        clock = [time.perf_counter()]
        clock.extend(time.perf_counter() for _ in steps())
    return seconds(clock)


def time_llama_neuron(case: Case, folder: Path) -> dict[str, float]:
    rank = dist.get_rank() if dist.is_initialized() else 0
    flags = {"tp_degree": case.tp, "tp_rank": rank, "batch_size": case.batch, "sequence_length": case.cache}
    attn = "sdpa" if "sdpa" in case.system else "eager"
    model = load_model(folder / f"{case.dtype}-tp{case.tp}", attn=attn, **flags)
    if "compile" in case.system:
        compile_decode(model)
    return timed(partial(greedy_steps, model, case.prompts(model.config.vocab_size), case.new + 1, ()))


def time_ranks(case: Case, folder: Path) -> dict[str, float]:
    """The same with tp > 1; rank 0 leaves its seconds in a file."""
    with tempfile.TemporaryDirectory() as scratch:
        file = Path(scratch, "seconds")

        def work() -> None:
            found = time_llama_neuron(case, folder)
            if dist.get_rank() == 0:
                file.write_text(json.dumps(found))

        start_ranks(work, case.tp, "cpu")
        return json.loads(file.read_text())


def time_hf(case: Case, hf: Path) -> dict[str, float]:
    """`generate`, with its dynamic cache unless the case says static."""
    from transformers import LlamaForCausalLM
    from transformers.generation.streamers import BaseStreamer

    attn = "eager" if "eager" in case.system else "sdpa"
    model = LlamaForCausalLM.from_pretrained(hf, dtype=DTYPES[case.dtype], attn_implementation=attn).eval()
    if "compile" in case.system:
        model.forward = torch.compile(model.forward)
    ids = torch.tensor(case.prompts(model.config.vocab_size))
    lengths = {"min_new_tokens": case.new + 1, "max_new_tokens": case.new + 1}
    lengths |= {"cache_implementation": "static"} if "static" in case.system else {}

    class Clock(BaseStreamer):
        def __init__(self) -> None:
            self.times: list[float] = []

        def put(self, value: Tensor) -> None:
            self.times.append(time.perf_counter())

        def end(self) -> None:
            pass

    for _ in range(3 if "compile" in case.system else 2):  # a second run may compile once more
        clock, start = Clock(), time.perf_counter()
        model.generate(ids, do_sample=False, pad_token_id=0, streamer=clock, **lengths)
    return seconds([start, *clock.times[1:]])  # the first time is the prompt's


def time_llama_cpp(case: Case, folder: Path) -> dict[str, float]:
    import llama_cpp
    import numpy as np

    threads = {"n_threads": torch.get_num_threads(), "n_threads_batch": torch.get_num_threads()}
    model = llama_cpp.Llama(str(folder / f"{case.dtype}.gguf"), n_ctx=case.cache, n_batch=512, verbose=False, **threads)
    (prompt,) = case.prompts(model.n_vocab())

    def steps() -> Iterator[None]:
        model.reset()
        tokens = prompt
        for _ in range(case.new + 1):
            model.eval(tokens)
            tokens = [int(np.ctypeslib.as_array(model._ctx.get_logits(), shape=(model.n_vocab(),)).argmax())]
            yield

    return timed(steps)


@torch.inference_mode()
def time_gpt_fast(case: Case, hf: Path, checkout: Path) -> dict[str, float]:
    """Its `Transformer`, and its way of decoding: prefill and one token as two functions, of which `--compile` compiles
    the second."""
    sys.path.insert(0, str(checkout))
    from model import ModelArgs, Transformer

    config = LlamaConfig.from_pretrained(hf)
    rope = config.rope_parameters
    args = ModelArgs(
        block_size=case.cache,
        vocab_size=config.vocab_size,
        n_layer=config.num_hidden_layers,
        n_head=config.num_attention_heads,
        n_local_heads=config.num_key_value_heads,
        dim=config.hidden_size,
        intermediate_size=config.intermediate_size,
        rope_base=rope["rope_theta"],
        norm_eps=config.rms_norm_eps,
        rope_scaling=rope if rope["rope_type"] == "llama3" else None,
    )
    names = {f"self_attn.{x}_proj": f"attention.w{x}" for x in "qkvo"}
    names |= {"mlp.gate_proj": "feed_forward.w1", "mlp.up_proj": "feed_forward.w3", "mlp.down_proj": "feed_forward.w2"}
    names |= {"input_layernorm": "attention_norm", "post_attention_layernorm": "ffn_norm", "model.": ""}
    names |= {"embed_tokens": "tok_embeddings", "lm_head": "output"}
    state = {}
    for name, tensor in interleaved(hf, config):
        for theirs, its in names.items():
            name = name.replace(theirs, its)
        state[name] = tensor.to(DTYPES[case.dtype])
    state.setdefault("output.weight", state["tok_embeddings.weight"])
    with torch.device("meta"):
        model = Transformer(args)
    model.load_state_dict(state, assign=True)
    model.setup_caches(case.batch, case.cache)
    ids = torch.tensor(case.prompts(config.vocab_size))

    def one_token(tokens: Tensor, positions: Tensor) -> Tensor:
        return model(tokens, positions)[:, -1].argmax(-1, keepdim=True)

    decode = torch.compile(one_token, fullgraph=True) if "compile" in case.system else one_token

    def steps() -> Iterator[None]:
        tokens = one_token(ids, torch.arange(case.prompt))
        yield
        for position in range(case.prompt, case.prompt + case.new):
            tokens = decode(tokens.clone(), torch.tensor([position]))
            yield

    return timed(steps)


def interleaved(hf: Path, config: LlamaConfig) -> Iterator[tuple[str, Tensor]]:
    """HF's tensors, with the rows of q and k in the order of llama.cpp's and gpt-fast's rotary embedding, which rotates
    neighbours where HF rotates halves."""
    heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}
    checkpoint = open_checkpoint(hf, config)
    for name in checkpoint.slices:
        tensor = checkpoint.get(name)
        for key, count in heads.items():
            if key in name:
                tensor = tensor.unflatten(0, (count, 2, -1)).transpose(1, 2).flatten(0, 2)
        yield name, tensor


def write_gguf(hf: Path, file: Path, dtype: str) -> None:
    """llama.cpp's file of an HF checkpoint, for its speed: without tokenizer and rope scaling."""
    import gguf

    config = LlamaConfig.from_pretrained(hf)
    writer = gguf.GGUFWriter(file, "llama")
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(config.vocab_size)
    writer.add_tokenizer_model("none")
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, config.num_hidden_layers)
    for name, tensor in interleaved(hf, config):
        its = names.get_name(name, try_suffixes=(".weight", ".bias"))
        if tensor.ndim == 1 or dtype == "float32":
            writer.add_tensor(its, tensor.float().numpy())
        else:
            raw = tensor.bfloat16().contiguous().view(torch.uint8).numpy()
            writer.add_tensor(its, raw, raw_dtype=gguf.GGMLQuantizationType.BF16)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def run_case(case: Case, hf: Path, folder: Path, gpt_fast: Path | None) -> dict[str, float]:
    if case.system.startswith("HF"):
        return time_hf(case, hf)
    if case.system.startswith("llama.cpp"):
        return time_llama_cpp(case, folder)
    if case.system.startswith("gpt-fast"):
        return time_gpt_fast(case, hf, gpt_fast)
    return time_llama_neuron(case, folder) if case.tp == 1 else time_ranks(case, folder)


# ---------------------------------------------------------------------------------------------------- cases, in rounds


def cases(group: str, others: list[str]) -> list[Case]:
    """What a group times, this project and HF next to each other."""
    ours = [Case(f"llama_neuron {how}") for how in ("eager", "sdpa", "compile")]
    ours += [Case(f"llama_neuron {how}", tp=2) for how in ("eager", "compile")]
    hf = [Case("HF sdpa"), Case("HF eager"), Case("HF static"), Case("HF static compile")]
    if group == "bf16":
        return ours + hf + [Case(system) for system in others]
    if group == "fp32":
        return [replace(case, dtype="float32") for case in ours + hf[:2] + [Case(o) for o in others if "cpp" in o]]
    if group == "batch":
        both = [replace(case, batch=8, new=32) for case in ours + hf[:2]]
        return both + [replace(case, dtype="float32") for case in both]
    if group == "length":
        lengths = [Case("", prompt=prompt, new=16, cache=4096) for prompt in (128, 256, 512, 1024, 2048)]
        return [replace(case, system=other.system) for case in lengths for other in (*ours[:3], hf[0])]
    caches = [Case("", prompt=200, new=32, cache=cache) for cache in (512, 8192)]
    return [replace(case, system=other.system) for other in ours[:3] for case in caches]


def run_in_turn(todo: list[Case], rounds: int, command: list[str]) -> list[tuple[Case, list[dict[str, float]]]]:
    """Every case once a round, each in a process of its own."""
    samples: list[list[dict[str, float]]] = [[] for _ in todo]
    for number in range(rounds):
        for case, found in zip(todo, samples, strict=True):
            print(f"round {number + 1}: {describe(case)}", file=sys.stderr)
            ran = subprocess.run([*command, "--case", json.dumps(asdict(case))], stdout=subprocess.PIPE, check=True)
            found.append(json.loads(ran.stdout.splitlines()[-1]))
    return list(zip(todo, samples, strict=True))


def describe(case: Case) -> str:
    return f"{case.name}, {case.dtype}, batch {case.batch}, prompt {case.prompt}, cache {case.cache}"


# --------------------------------------------------------------------------------------- whole processes, files, memory


def seconds_of(command: list[str | Path], **environment: str) -> tuple[float, str]:
    """Wall time and standard output of a command."""
    start = time.perf_counter()
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL, "text": True}
    ran = subprocess.run(list(map(str, command)), check=True, cwd=ROOT, env=os.environ | environment, **pipes)
    return time.perf_counter() - start, ran.stdout


HF_FIRST_TOKEN = """
import sys, torch
from transformers import AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained(sys.argv[1], dtype=torch.bfloat16)
ids = torch.tensor([[int(token) for token in sys.argv[2].split(",")]])
print(model.generate(ids, max_new_tokens=1, do_sample=False, pad_token_id=0)[0, -1].item())
"""


CONVERSION = """
import time
import convert_weights
start = time.perf_counter()
convert_weights.main()
print(time.perf_counter() - start)
"""


def run_processes(hf: Path, folder: Path, rounds: int) -> dict[str, list[float]]:
    """Samples of what only a whole process shows, by name; seconds, bytes, or bytes a second."""
    config, ckpt = LlamaConfig.from_pretrained(hf), folder / "bfloat16-tp1"
    prompt = ",".join(map(str, Case("").prompts(config.vocab_size)[0]))
    ours = [sys.executable, "llama_neuron.py", "--ckpt", ckpt, "--prompt-ids", prompt, "--ignore-eos", "--json"]
    ours += ["--sequence-length", "512"]
    numbers, _, cache = count_numbers(config, NeuronConfig(sequence_length=512))
    held = 2 * (numbers + cache)
    found: dict[str, list[float]] = {}

    def note(name: str, value: float) -> None:
        found.setdefault(name, []).append(value)

    def peak(answer: str) -> int:
        return json.loads(answer)["timings"]["peak_rss_bytes"] - held

    for number in range(rounds):
        print(f"round {number + 1}: whole processes", file=sys.stderr)
        wall, _ = seconds_of([*ours, "--max-new-tokens", "1"])
        note("first token, llama_neuron, s", wall)
        wall, _ = seconds_of([sys.executable, "-c", HF_FIRST_TOKEN, hf, prompt])
        note("first token, HF, s", wall)
        _, answer = seconds_of([*ours, "--max-new-tokens", "64"])
        note("peak memory over weights and cache, eager, MB", peak(answer) / 1e6)
        with tempfile.TemporaryDirectory() as inductor:
            for state in ("cold", "warm"):
                command = [*ours, "--max-new-tokens", "64", "--compile"]
                wall, answer = seconds_of(command, TORCHINDUCTOR_CACHE_DIR=inductor)
                note(f"--compile {state}, compilation, s", json.loads(answer)["timings"]["compile_s"])
                note(f"--compile {state}, whole process, s", wall)
            note("peak memory over weights and cache, --compile, MB", peak(answer) / 1e6)
        with tempfile.TemporaryDirectory(dir=folder) as scratch:
            for tp in (1, 2):
                flags = ["--hf", hf, "--dtype", "bfloat16", "--tp", str(tp), "--out", Path(scratch, f"whole{tp}")]
                wall, _ = seconds_of([sys.executable, "convert_weights.py", *flags])
                written = size_of(flags[-1]) / 1e9
                note(f"conversion, tp {tp}, GB/s", written / wall)
                flags[-1] = Path(scratch, f"own{tp}")
                _, own = seconds_of([sys.executable, "-c", CONVERSION, *flags])
                note(f"conversion without imports, tp {tp}, GB/s", written / float(own))
            wall, _ = seconds_of(["cp", "-r", hf, Path(scratch, "copy")])
            note("cp -r, GB/s", size_of(Path(scratch, "copy")) / wall / 1e9)
    return found


def size_of(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.rglob("*.safetensors"))


# ------------------------------------------------------------------------------------------------------ tables, chart


def spread(values: list[float], form: str) -> str:
    return f"{median(values):{form}} ({min(values):{form}}-{max(values):{form}})"


def against(samples: list[dict[str, float]], others: list[dict[str, float]], key: str) -> float:
    """Median over the rounds of this case's seconds over those of the other, measured in the same round."""
    return median(mine[key] / other[key] for mine, other in zip(samples, others, strict=True))


def table(group: str, results: list[tuple[Case, list[dict[str, float]]]]) -> str:
    """Markdown. Ratios: speed of decoding and time of prefill against BASELINE at the same setting, else (`cache`)
    against the first line of the same system."""
    other = "cache 512" if group == "cache" else BASELINE
    lines = [f"| case | decode tokens/s | x {other} | prefill ms | x {other} |", "| --- | --- | --- | --- | --- |"]
    for case, samples in results:
        wanted = replace(case, system=BASELINE, tp=1) if group != "cache" else replace(case, cache=512)
        others = dict(results)[wanted]
        rates = spread([case.batch / sample["step_s"] for sample in samples], ".1f")
        prefill = spread([sample["prefill_s"] * 1e3 for sample in samples], ".0f")
        faster, longer = 1 / against(samples, others, "step_s"), against(samples, others, "prefill_s")
        lines.append(f"| {describe(case)} | {rates} | {faster:.2f} | {prefill} | {longer:.2f} |")
    return "\n".join(lines)


def process_table(found: dict[str, list[float]]) -> str:
    lines = ["| whole processes | median (range) |", "| --- | --- |"]
    for name, values in found.items():
        what, _, unit = name.rpartition(", ")
        lines.append(f"| {what} | {spread(values, '.2f')} {unit} |")
    pairs = [("first token, llama_neuron, s", "first token, HF, s")]
    pairs += [(name, "cp -r, GB/s") for name in found if name.startswith("conversion")]
    for one, other in pairs:
        ratio = median(a / b for a, b in zip(found[one], found[other], strict=True))
        lines.append(f"| {one.rpartition(', ')[0]} / {other.rpartition(', ')[0]} | {ratio:.2f} |")
    return "\n".join(lines)


def draw(results: dict[str, list[tuple[Case, list[dict[str, float]]]]], title: str, file: Path) -> None:
    """Tokens/s of every system (group bf16), and milliseconds against the length of the text (group length)."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, (bars, decode, prefill) = plt.subplots(1, 3, figsize=(15, 4.6), layout="constrained")
    figure.suptitle(title)
    rates = [(case.name, median(1 / sample["step_s"] for sample in samples)) for case, samples in results["bf16"]]
    rates.sort(key=lambda pair: pair[1])
    colors = ["tab:blue" if name.startswith("llama_neuron") else "tab:gray" for name, _ in rates]
    drawn = bars.barh([name for name, _ in rates], [rate for _, rate in rates], color=colors)
    bars.bar_label(drawn, fmt="%.0f", padding=3)
    bars.margins(x=0.12)
    bars.set(title="decoding after 128 tokens", xlabel="tokens/s")
    for axes, key, name in ((decode, "step_s", "decoding one token"), (prefill, "prefill_s", "prefill")):
        for system in dict.fromkeys(case.system for case, _ in results["length"]):
            points = [
                (case.prompt, median(sample[key] for sample in samples) * 1e3)
                for case, samples in results["length"]
                if case.system == system
            ]
            axes.plot(*zip(*points, strict=True), marker="o", label=system)
        axes.set(title=name, xlabel="tokens of the text", ylabel="ms", ylim=(0, None))
        axes.legend()
    file.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(file, dpi=110)


# --------------------------------------------------------------------------------------------------------- command line


def installed(package: str) -> str:
    try:
        return f"{package} {version(package)}"
    except PackageNotFoundError:
        return f"{package} absent"


def prepare(args: argparse.Namespace, folder: Path) -> None:
    """Converts the checkpoint into what the cases read."""
    tp2 = any(group in args.groups for group in ("bf16", "fp32", "batch"))
    for dtype in ["bfloat16", *["float32"] * any(group in args.groups for group in ("fp32", "batch"))]:
        for tp in (1, 2) if tp2 else (1,):
            flags = ["--hf", args.hf, "--dtype", dtype, "--tp", str(tp), "--out", folder / f"{dtype}-tp{tp}"]
            seconds_of([sys.executable, "convert_weights.py", *flags])
        if "llama.cpp" in args.others:
            write_gguf(args.hf, folder / f"{dtype}.gguf", dtype)


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m tools.benchmark", description="Speed beside HF and others.")
    add = parser.add_argument
    add("--hf", type=Path, required=True, metavar="DIR", help="HF checkpoint")
    add("--groups", nargs="+", choices=GROUPS, default=GROUPS, metavar="GROUP", help=f"default: {' '.join(GROUPS)}")
    add("--rounds", type=positive, default=3, metavar="N", help="default: %(default)s")
    add("--threads", type=positive, default=torch.get_num_threads(), metavar="N", help="default: %(default)s")
    add("--gpt-fast", type=Path, metavar="DIR", help="a checkout of gpt-fast, to measure it as well")
    add("--json", action="store_true", help="print all samples as one JSON object instead of tables")
    add("--chart", type=Path, metavar="FILE.png", help="draw the groups bf16 and length")
    add("--case", help=argparse.SUPPRESS)  # in the process of a case
    add("--folder", type=Path, help=argparse.SUPPRESS)
    return parser.parse_args()


def main() -> None:
    args = parse_args()
    torch.set_num_threads(args.threads)
    if args.case:
        print(json.dumps(run_case(Case(**json.loads(args.case)), args.hf, args.folder, args.gpt_fast)))
        return
    os.environ["OMP_NUM_THREADS"] = str(args.threads)
    args.hf = args.hf.resolve()
    require((args.hf / "config.json").exists(), f"--hf {args.hf} holds no config.json: name an HF checkpoint")
    require(not args.chart or {"bf16", "length"} <= {*args.groups}, "--chart draws bf16 and length: add both groups")
    args.others, missing = [], ["llama.cpp and gpt-fast at batch 8, gpt-fast in float32 (left out here)"]
    if find_spec("llama_cpp") and find_spec("gguf"):
        args.others.append("llama.cpp")
    else:
        missing.append("llama.cpp (llama_cpp or gguf cannot be imported)")
    if args.gpt_fast:
        require((args.gpt_fast / "model.py").exists(), f"--gpt-fast {args.gpt_fast} holds no model.py: name a checkout")
        args.others += ["gpt-fast eager", "gpt-fast compile"]
    else:
        missing.append("gpt-fast (no --gpt-fast)")
    results, processes = {}, {}
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        prepare(args, folder)
        command = [sys.executable, "-m", "tools.benchmark", "--hf", str(args.hf), "--folder", scratch]
        command += ["--threads", str(args.threads)]
        command += ["--gpt-fast", str(args.gpt_fast.resolve())] if args.gpt_fast else []
        for group in args.groups:
            if group == "process":
                processes = run_processes(args.hf, folder, args.rounds)
            else:
                results[group] = run_in_turn(cases(group, args.others), args.rounds, command)
    packages = ("torch", "transformers", "llama_cpp_python")
    setting = f"{date.today()}, {args.hf.name}, {args.threads} threads, {platform.machine()}, {args.rounds} rounds, "
    setting += ", ".join(map(installed, packages))
    if args.chart:
        draw(results, setting, args.chart)
    if args.json:
        rows = {name: [asdict(case) | {"samples": found} for case, found in rows] for name, rows in results.items()}
        print(json.dumps({"setting": setting, "not_measured": missing, "groups": rows, "process": processes}, indent=2))
        return
    print(f"{setting}; medians (ranges)\n\nNot measured: {'; '.join(missing)}.")
    for group, found in results.items():
        print(f"\n{table(group, found)}")
    if processes:
        print(f"\n{process_table(processes)}")


if __name__ == "__main__":
    exit_on_usage_error(main)

"""Speed of `llama_neuron.py` beside Hugging Face, llama.cpp and gpt-fast: `python -m tools.benchmark --hf DIR`, or with
a random checkpoint, `--shape 1b`.

A case is a competitor (`competitors.py`) at one setting, in a process of its own that warms up and then measures.
The cases of a group run one after the other, and the group `--rounds` times over, because a shared machine changes its
speed from minute to minute: ratios are taken within a round, and what is printed is the median (and the range) of the
rounds. The output says which competitors are missing here, and why.

Decoding a large model waits for memory, so each round also measures how fast this machine reads: the share of that rate
which a case reaches says how much could still be gained.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import platform
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, replace
from datetime import date
from importlib.metadata import version
from pathlib import Path
from statistics import median
from textwrap import fill
from typing import TYPE_CHECKING

import torch

from checkpoint.config import expected_shapes, llama_config, read_config
from checkpoint.output import replacing
from convert_weights import convert, user_path
from llama_neuron import LlamaConfig, UsageError, positive_int
from tools.benchmark.competitors import BASELINE, COMPETITORS, Case, Files, Seconds
from tools.benchmark.random_checkpoint import SHAPES, make_random

if TYPE_CHECKING:
    from matplotlib.figure import Figure

SETTINGS = {  # of each group: what differs from the defaults of Case
    "bf16": [{}],
    "fp32": [{"dtype": "float32"}],
    "batch": [{"batch": 8, "new": 32}, {"dtype": "float32", "batch": 8, "new": 32}],
    "length": [{"prompt": prompt, "new": 16, "cache": 4096} for prompt in (128, 256, 512, 1024, 2048)],
    "cache": [{"prompt": 200, "new": 32, "cache": cache} for cache in (512, 8192)],
}
GROUPS = (*SETTINGS, "process")

Sample = dict[str, float]  # Seconds of a case in a round, with read_gb_s of the round, and the share of it
Results = list[tuple[Case, list[Sample]]]  # each case of a group, with its samples in every round


# ---- cases, in rounds


def run_process(*command: object, **environment: str) -> tuple[float, str]:
    """Wall time and standard output of a command. A shell starts it: Linux counts the peak memory of the process that
    becomes a command as the command's own, and this one's is large."""
    line = ["sh", "-c", '"$@"; exit $?', "sh", *map(str, command)]  # without exit, sh itself would become the command
    start = time.perf_counter()
    ran = subprocess.run(line, env=os.environ | environment, stdout=subprocess.PIPE, text=True, check=True)
    return time.perf_counter() - start, ran.stdout


def cases(group: str, chosen: list[str]) -> list[Case]:
    """What a group times of the chosen competitors; nothing in `process`. Those that its table compares are neighbours:
    competitors at one setting, or in `cache` the settings of one competitor."""
    names = [name for name, entry in COMPETITORS.items() if group in entry.groups and name in chosen]
    if group == "cache":
        return [Case(name, **setting) for name in names for setting in SETTINGS[group]]
    return [Case(name, **setting) for setting in SETTINGS.get(group, []) for name in names]


def read_bandwidth() -> float:
    """GB/s that all threads read of memory: the best of five sums over 2 GiB."""
    numbers = torch.ones(2**29)
    best = math.inf
    for _ in range(5):
        start = time.perf_counter()
        numbers.sum()
        best = min(best, time.perf_counter() - start)
    return numbers.nbytes / best / 1e9


def numbers_read(config: LlamaConfig) -> int:
    """How many weights decoding reads for a token: all but the embedding table, unless lm_head is that table."""
    shapes = expected_shapes(config)
    if not config.tie_word_embeddings:
        del shapes["model.embed_tokens.weight"]
    return sum(map(math.prod, shapes.values()))


def with_share(case: Case, seconds: Seconds, numbers: int, read_gb_s: float) -> Sample:
    """A sample: `share` is the rate at which a case reads `numbers` weights, over that of the machine."""
    gigabytes = numbers * getattr(torch, case.dtype).itemsize / 1e9
    return seconds | {"read_gb_s": read_gb_s, "share": gigabytes / seconds["step_s"] / read_gb_s}


def run_in_turn(todo: list[Case], rounds: int, files: Files) -> Results:
    """Every case once a round, each in a process of its own."""
    for case in todo:
        COMPETITORS[case.system].source(case, files)
    numbers = numbers_read(llama_config(read_config(files.hf)))
    results: Results = [(case, []) for case in todo]
    command = [sys.executable, "-m", "tools.benchmark", "--hf", files.hf, "--folder", files.folder]
    command += ["--threads", torch.get_num_threads()]
    command += ["--gpt-fast", files.gpt_fast] if files.gpt_fast else []
    for number in range(rounds):
        read_gb_s = read_bandwidth()
        for case, samples in results:
            print(f"round {number + 1}: {describe(case)}", file=sys.stderr)
            _, answer = run_process(*command, "--case", json.dumps(asdict(case)))
            samples.append(with_share(case, json.loads(answer.splitlines()[-1]), numbers, read_gb_s))
    return results


def describe(case: Case) -> str:
    return f"{case.system}, {case.dtype}, batch {case.batch}, prompt {case.prompt}, cache {case.cache}"


# ---- whole processes, files, memory

HF_FIRST_TOKEN = """
import sys, torch
from transformers import AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained(sys.argv[1], dtype=torch.bfloat16)
ids = torch.tensor([[int(token) for token in sys.argv[2].split(",")]])
print(model.generate(ids, max_new_tokens=1, do_sample=False, pad_token_id=0)[0, -1].item())
"""


def size_of(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.rglob("*.safetensors"))


def measure_processes(files: Files) -> dict[str, float]:
    """One round of what only a whole process shows, in bfloat16. Each name ends in its unit."""
    case = Case("llama_neuron eager")
    ckpt = COMPETITORS[case.system].source(case, files)
    config = LlamaConfig.from_pretrained(ckpt)
    found = {}
    prompt = ",".join(map(str, case.prompts(config.vocab_size)[0]))
    cache = 2 * config.num_hidden_layers * config.num_key_value_heads * case.cache * config.head_dim  # keys, values
    held_bytes = size_of(ckpt) + 2 * cache
    run = [sys.executable, "llama_neuron.py", "--ckpt", ckpt, "--prompt-ids", prompt, "--ignore-eos", "--json"]
    run += ["--device", "cpu", "--sequence-length", case.cache, "--max-new-tokens"]

    found["first token, llama_neuron, s"], _ = run_process(*run, 1)
    found["first token, HF, s"], _ = run_process(sys.executable, "-c", HF_FIRST_TOKEN, files.hf, prompt)
    _, answer = run_process(*run, case.new)
    peak_bytes = json.loads(answer)["timings"]["peak_rss_bytes"]
    found["peak memory over weights and cache, eager, MB"] = (peak_bytes - held_bytes) / 1e6
    with tempfile.TemporaryDirectory() as compiled:
        for state in ("cold", "warm"):
            wall, answer = run_process(*run, case.new, "--compile", TORCHINDUCTOR_CACHE_DIR=compiled)
            timings = json.loads(answer)["timings"]
            found[f"--compile {state}, compilation, s"] = timings["compile_s"]
            found[f"--compile {state}, whole process, s"] = wall
    found["peak memory over weights and cache, --compile, MB"] = (timings["peak_rss_bytes"] - held_bytes) / 1e6
    with tempfile.TemporaryDirectory(dir=files.folder) as scratch:
        for tp in (1, 2):
            out = Path(scratch, f"tp{tp}")
            again = Path(scratch, f"tp{tp}-again")
            flags = ["--hf", files.hf, "--out", out, "--tp", tp, "--dtype", "bfloat16"]
            wall, _ = run_process(sys.executable, "convert_weights.py", *flags)
            found[f"conversion, tp {tp}, GB/s"] = size_of(out) / wall / 1e9
            start = time.perf_counter()
            convert(files.hf, again, tp_degree=tp, dtype="bfloat16")
            wall = time.perf_counter() - start
            found[f"conversion without imports, tp {tp}, GB/s"] = size_of(again) / wall / 1e9
        copy = Path(scratch, "copy")
        wall, _ = run_process("cp", "-r", files.hf, copy)
        found["cp -r, GB/s"] = size_of(copy) / wall / 1e9
    return found


# ---- tables, chart


def spread(values: list[float], form: str) -> str:
    return f"{median(values):{form}} ({min(values):{form}}-{max(values):{form}})"


def against(samples: list[Sample], others: list[Sample], key: str) -> float:
    """Median over the rounds of this case's seconds over those of the other, measured in the same round."""
    return median(mine[key] / other[key] for mine, other in zip(samples, others, strict=True))


def table(group: str, results: Results) -> str:
    """Markdown. Ratios: speed of decoding and time of prefill against BASELINE at the same setting, or in `cache`
    against the same competitor with 512 slots; "-" if that was not measured."""
    other = "cache 512" if group == "cache" else BASELINE
    measured = dict(results)
    lines = [f"| case | decode tokens/s | x {other} | share of read bandwidth | prefill ms | x {other} |"]
    lines.append("| --- " * 6 + "|")
    for case, samples in results:
        wanted = replace(case, cache=512) if group == "cache" else replace(case, system=BASELINE)
        faster = longer = "-"
        if wanted in measured:
            faster = f"{1 / against(samples, measured[wanted], 'step_s'):.2f}"
            longer = f"{against(samples, measured[wanted], 'prefill_s'):.2f}"
        rates = spread([case.batch / sample["step_s"] for sample in samples], ".1f")
        share = median(sample["share"] for sample in samples)
        prefill = spread([sample["prefill_s"] * 1e3 for sample in samples], ".0f")
        lines.append(f"| {describe(case)} | {rates} | {faster} | {share:.2f} | {prefill} | {longer} |")
    bandwidths = spread([sample["read_gb_s"] for sample in results[0][1]], ".1f")
    return "\n".join([*lines, "", f"Read bandwidth: {bandwidths} GB/s."])


def process_table(samples: list[dict[str, float]]) -> str:
    lines = ["| whole processes | median (range) |", "| --- | --- |"]
    pairs = [("first token, llama_neuron, s", "first token, HF, s")]
    for name in samples[0]:
        what, _, unit = name.rpartition(", ")
        lines.append(f"| {what} | {spread([sample[name] for sample in samples], '.2f')} {unit} |")
        if name.startswith("conversion"):
            pairs.append((name, "cp -r, GB/s"))
    for one, other in pairs:
        ratio = median(sample[one] / sample[other] for sample in samples)
        lines.append(f"| {one.rpartition(', ')[0]} / {other.rpartition(', ')[0]} | {ratio:.2f} |")
    return "\n".join(lines)


def draw(bf16: Results, length: Results, title: str, file: Path) -> None:
    """Tokens/s of every competitor; and in FILE-length.png, milliseconds against the length of the prompt."""
    pictures = {file: draw_rates(bf16), file.with_stem(f"{file.stem}-length"): draw_lengths(length)}
    for path, figure in pictures.items():
        figure.suptitle(fill(title, 12 * int(figure.get_figwidth())), fontsize=9)
        with replacing(path) as stream:
            figure.savefig(stream, dpi=110, format="png")


def draw_rates(results: Results) -> Figure:
    """A bar for every competitor."""
    from matplotlib.figure import Figure

    rates = {}
    for case, samples in results:
        rates[case.system] = median(1 / sample["step_s"] for sample in samples)
    names = sorted(rates, key=rates.get)
    figure = Figure(figsize=(8, 1.6 + 0.32 * len(names)), layout="constrained")
    axes = figure.subplots()
    bars = axes.barh(names, [rates[name] for name in names], color=[COMPETITORS[name].color for name in names])
    axes.bar_label(bars, fmt="%.1f", padding=3)
    axes.margins(x=0.12)
    axes.set(title="decoding after 128 tokens", xlabel="tokens/s")
    return figure


def draw_lengths(results: Results) -> Figure:
    """A line for every competitor, for decoding and for prefill."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 5.4), layout="constrained")
    decode, prefill = figure.subplots(1, 2)
    prompts = sorted({case.prompt for case, _ in results})
    for axes, key, title in ((decode, "step_s", "decoding one token"), (prefill, "prefill_s", "prefill")):
        for name in dict.fromkeys(case.system for case, _ in results):
            found = [(case.prompt, samples) for case, samples in results if case.system == name]
            lengths = [prompt for prompt, _ in found]
            milliseconds = [median(sample[key] for sample in samples) * 1e3 for _, samples in found]
            axes.plot(lengths, milliseconds, "o-", color=COMPETITORS[name].color, label=name)
        axes.set(title=title, xlabel="prompt tokens", xticks=prompts, ylabel="ms", ylim=(0, None))
        axes.tick_params(axis="x", labelsize=8)  # 128 and 256 are close
        axes.grid(axis="y", alpha=0.3)
    figure.legend(*decode.get_legend_handles_labels(), loc="outside lower center", ncols=4, frameon=False)
    return figure


# ---- command line


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Speed beside HF and others.", usage=argparse.SUPPRESS)
    model = parser.add_mutually_exclusive_group(required=True)
    model.add_argument("--hf", type=user_path, metavar="DIR", help="HF checkpoint")
    model.add_argument(
        "--shape",
        choices=SHAPES,
        help="random weights in the shape of Llama-3.2-1B or Llama-3.1-8B. Files in TMPDIR: 1b, 12 GB for the groups "
        "bf16 and length, 40 GB for all; 8b, 50 GB for bf16 with --only 'llama_neuron compile' llama.cpp",
    )
    parser.add_argument(
        "--groups",
        nargs="+",
        choices=GROUPS,
        default=GROUPS,
        metavar="GROUP",
        help=f"default: {' '.join(GROUPS)}",
    )
    parser.add_argument("--rounds", type=positive_int, default=3, metavar="N", help="default: %(default)s")
    parser.add_argument(
        "--threads",
        type=positive_int,
        default=torch.get_num_threads(),
        metavar="N",
        help="default: %(default)s",
    )
    parser.add_argument(
        "--only",
        nargs="+",
        choices=COMPETITORS,
        default=COMPETITORS,
        metavar="NAME",
        help=f"these competitors alone (not in the group process): {'; '.join(COMPETITORS)}",
    )
    parser.add_argument(
        "--gpt-fast", type=user_path, metavar="DIR", help="a checkout of gpt-fast, to measure it as well"
    )
    parser.add_argument("--json", action="store_true", help="print all samples as one JSON object instead of tables")
    parser.add_argument(
        "--chart",
        type=Path,
        metavar="FILE.png",
        help="draw the group bf16, and length as FILE-length.png",
    )
    parser.add_argument("--case", type=json.loads, help=argparse.SUPPRESS)  # in the process of a case
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    return parser.parse_args()


def main() -> None:
    args = parse_args()
    torch.set_num_threads(args.threads)
    files = Files(args.hf, args.folder, args.gpt_fast)
    if args.case:
        case = Case(**args.case)
        print(json.dumps(COMPETITORS[case.system].time(case, files)))
        return
    if args.hf:
        read_config(args.hf)  # raises UsageError now, not in the first case
    if args.gpt_fast is not None and not (args.gpt_fast / "model.py").exists():
        raise UsageError(f"--gpt-fast {args.gpt_fast} holds no model.py: name a checkout")
    reasons = {name: COMPETITORS[name].missing(files) for name in args.only}
    missing = {name: reason for name, reason in reasons.items() if reason}
    chosen = [name for name in args.only if name not in missing]
    todo = {group: cases(group, chosen) for group in args.groups}
    if args.chart is not None and not (todo.get("bf16") and todo.get("length")):
        raise UsageError("--chart draws bf16 and length: add both groups")
    os.environ["OMP_NUM_THREADS"] = str(args.threads)

    results = {}
    processes = []
    with tempfile.TemporaryDirectory() as scratch:
        files = replace(files, hf=args.hf or Path(scratch, f"random-{args.shape}"), folder=Path(scratch))
        if args.shape:
            make_random(files.hf, args.shape)
        for group in args.groups:
            if group == "process":
                processes = [measure_processes(files) for _ in range(args.rounds)]
            elif todo[group]:
                results[group] = run_in_turn(todo[group], args.rounds, files)

    not_measured = ["gpt-fast in other groups than bf16 (left out here)"]
    not_measured += [f"{name} (--only)" for name in COMPETITORS if name not in args.only]
    not_measured += [f"{name} ({reason})" for name, reason in missing.items()]
    setting = describe_setting(args, files.hf.resolve().name, chosen)
    if args.chart:
        draw(results["bf16"], results["length"], setting, args.chart)
    if args.json:
        print_json(setting, not_measured, results, processes)
        return
    print(f"{setting}; medians (ranges)\n\nNot measured: {'; '.join(not_measured)}.")
    for group, found in results.items():
        print(f"\n{table(group, found)}")
    if processes:
        print(f"\n{process_table(processes)}")


def describe_setting(args: argparse.Namespace, model: str, chosen: list[str]) -> str:
    """When, of what, on what and with which versions it was measured."""
    parts = [f"{date.today()}", model, f"{args.threads} threads", platform.machine(), f"{args.rounds} rounds"]
    parts += [f"torch {torch.__version__}", f"transformers {version('transformers')}"]
    if "llama.cpp" in chosen:
        parts.append(f"llama_cpp_python {version('llama_cpp_python')}")
    return ", ".join(parts)


def print_json(
    setting: str,
    not_measured: list[str],
    results: dict[str, Results],
    processes: list[dict[str, float]],
) -> None:
    groups = {}
    for group, found in results.items():
        groups[group] = [asdict(case) | {"samples": samples} for case, samples in found]
    answer = {"setting": setting, "not_measured": not_measured, "groups": groups, "process": processes}
    print(json.dumps(answer, indent=2))

"""Speed of `llama_neuron.py` beside Hugging Face, llama.cpp and gpt-fast: `python -m tools.benchmark --hf DIR`.

A case is a competitor (`tools/competitors.py`) at one setting, in a process of its own that warms up and then measures.
The cases of a group run one after the other, and the group `--rounds` times over, because a shared machine changes its
speed from minute to minute: ratios are taken within a round, and what is printed is the median (and the range) of the
rounds. The output says which competitors are missing here, and why.
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
from dataclasses import asdict, replace
from datetime import date
from importlib.metadata import version
from pathlib import Path
from statistics import median

import torch

from convert_weights import convert, read_config, require
from llama_neuron import LlamaConfig, positive_int, run_command
from tools.competitors import BASELINE, COMPETITORS, Case, Files, LlamaNeuron, Seconds
from tools.output import replacing

SETTINGS = {  # of each group: what differs from the defaults of Case
    "bf16": [{}],
    "fp32": [{"dtype": "float32"}],
    "batch": [{"batch": 8, "new": 32}, {"dtype": "float32", "batch": 8, "new": 32}],
    "length": [{"prompt": prompt, "new": 16, "cache": 4096} for prompt in (128, 256, 512, 1024, 2048)],
    "cache": [{"prompt": 200, "new": 32, "cache": cache} for cache in (512, 8192)],
}
GROUPS = (*SETTINGS, "process")

Results = list[tuple[Case, list[Seconds]]]  # each case of a group, with its seconds in every round


# ---- cases, in rounds


def run_process(*command: object, **environment: str) -> tuple[float, str]:
    """Wall time and standard output of a command."""
    line = [str(word) for word in command]
    start = time.perf_counter()
    ran = subprocess.run(line, env=os.environ | environment, stdout=subprocess.PIPE, text=True, check=True)
    return time.perf_counter() - start, ran.stdout


def cases(group: str, missing: dict[str, str]) -> list[Case]:
    """What a group times. Those that its table compares are neighbours: competitors at one setting, or in `cache` the
    settings of one competitor."""
    names = [name for name, entry in COMPETITORS.items() if group in entry.groups and name not in missing]
    if group == "cache":
        return [Case(name, **setting) for name in names for setting in SETTINGS[group]]
    return [Case(name, **setting) for setting in SETTINGS[group] for name in names]


def run_in_turn(todo: list[Case], rounds: int, files: Files) -> Results:
    """Every case once a round, each in a process of its own."""
    for case in todo:
        COMPETITORS[case.system].source(case, files)
    results: Results = [(case, []) for case in todo]
    command = [sys.executable, "-m", "tools.benchmark", *sys.argv[1:], "--folder", files.folder, "--case"]
    for number in range(rounds):
        for case, samples in results:
            print(f"round {number + 1}: {describe(case)}", file=sys.stderr)
            _, answer = run_process(*command, json.dumps(asdict(case)))
            samples.append(json.loads(answer.splitlines()[-1]))
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
    config, found = LlamaConfig.from_pretrained(ckpt), {}
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
            out, again = Path(scratch, f"tp{tp}"), Path(scratch, f"tp{tp}-again")
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


def against(samples: list[Seconds], others: list[Seconds], key: str) -> float:
    """Median over the rounds of this case's seconds over those of the other, measured in the same round."""
    return median(mine[key] / other[key] for mine, other in zip(samples, others, strict=True))


def table(group: str, results: Results) -> str:
    """Markdown. Ratios: speed of decoding and time of prefill against BASELINE at the same setting, or in `cache`
    against the same competitor with 512 slots."""
    other = "cache 512" if group == "cache" else BASELINE
    lines = [f"| case | decode tokens/s | x {other} | prefill ms | x {other} |", "| --- | --- | --- | --- | --- |"]
    for case, samples in results:
        wanted = replace(case, cache=512) if group == "cache" else replace(case, system=BASELINE)
        others = dict(results)[wanted]
        rates = spread([case.batch / sample["step_s"] for sample in samples], ".1f")
        prefill = spread([sample["prefill_s"] * 1e3 for sample in samples], ".0f")
        faster, longer = 1 / against(samples, others, "step_s"), against(samples, others, "prefill_s")
        lines.append(f"| {describe(case)} | {rates} | {faster:.2f} | {prefill} | {longer:.2f} |")
    return "\n".join(lines)


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
    """Tokens/s of every competitor, and milliseconds against the length of the text."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(15, 4.6), layout="constrained")
    figure.suptitle(title)
    bars, decode, prefill = figure.subplots(1, 3)
    rates = {case.system: median(1 / sample["step_s"] for sample in samples) for case, samples in bf16}
    names = sorted(rates, key=rates.get)
    colors = ["tab:blue" if isinstance(COMPETITORS[name], LlamaNeuron) else "tab:gray" for name in names]
    drawn = bars.barh(names, [rates[name] for name in names], color=colors)
    bars.bar_label(drawn, fmt="%.0f", padding=3)
    bars.margins(x=0.12)
    bars.set(title="decoding after 128 tokens", xlabel="tokens/s")
    for axes, key, what in ((decode, "step_s", "decoding one token"), (prefill, "prefill_s", "prefill")):
        for name in dict.fromkeys(case.system for case, _ in length):
            found = [(case.prompt, samples) for case, samples in length if case.system == name]
            milliseconds = [median(sample[key] for sample in samples) * 1e3 for _, samples in found]
            axes.plot([prompt for prompt, _ in found], milliseconds, marker="o", label=name)
        axes.set(title=what, xlabel="tokens of the text", ylabel="ms", ylim=(0, None))
        axes.legend()
    with replacing(file) as stream:
        figure.savefig(stream, dpi=110, format="png")


# ---- command line


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Speed beside HF and others.", usage=argparse.SUPPRESS)
    add = parser.add_argument
    add("--hf", type=Path, required=True, metavar="DIR", help="HF checkpoint")
    add("--groups", nargs="+", choices=GROUPS, default=GROUPS, metavar="GROUP", help=f"default: {' '.join(GROUPS)}")
    add("--rounds", type=positive_int, default=3, metavar="N", help="default: %(default)s")
    add("--threads", type=positive_int, default=torch.get_num_threads(), metavar="N", help="default: %(default)s")
    add("--gpt-fast", type=Path, metavar="DIR", help="a checkout of gpt-fast, to measure it as well")
    add("--json", action="store_true", help="print all samples as one JSON object instead of tables")
    add("--chart", type=Path, metavar="FILE.png", help="draw the groups bf16 and length")
    add("--case", type=json.loads, help=argparse.SUPPRESS)  # in the process of a case
    add("--folder", type=Path, help=argparse.SUPPRESS)
    return parser.parse_args()


def main() -> None:
    args = parse_args()
    torch.set_num_threads(args.threads)
    files = Files(args.hf, args.folder, args.gpt_fast)
    if args.case:
        case = Case(**args.case)
        print(json.dumps(COMPETITORS[case.system].time(case, files)))
        return
    read_config(args.hf)  # raises UsageError now, not in the first case
    drawn = {"bf16", "length"} <= set(args.groups)
    require(args.chart is None or drawn, "--chart draws bf16 and length: add both groups")
    checkout = args.gpt_fast is None or (args.gpt_fast / "model.py").exists()
    require(checkout, f"--gpt-fast {args.gpt_fast} holds no model.py: name a checkout")
    os.environ["OMP_NUM_THREADS"] = str(args.threads)
    reasons = {name: entry.missing(files) for name, entry in COMPETITORS.items()}
    missing = {name: reason for name, reason in reasons.items() if reason}
    results, processes = {}, []
    with tempfile.TemporaryDirectory() as scratch:
        files = replace(files, folder=Path(scratch))
        for group in args.groups:
            if group == "process":
                processes = [measure_processes(files) for _ in range(args.rounds)]
            else:
                results[group] = run_in_turn(cases(group, missing), args.rounds, files)
    not_measured = ["llama.cpp and gpt-fast at batch 8, gpt-fast in float32 (left out here)"]
    not_measured += [f"{name} ({reason})" for name, reason in missing.items()]
    setting = f"{date.today()}, {args.hf.resolve().name}, {args.threads} threads, {platform.machine()}, "
    setting += f"{args.rounds} rounds, torch {torch.__version__}, transformers {version('transformers')}"
    if "llama.cpp" not in missing:
        setting += f", llama_cpp_python {version('llama_cpp_python')}"
    if args.chart:
        draw(results["bf16"], results["length"], setting, args.chart)
    if args.json:
        rows = {name: [asdict(case) | {"samples": found} for case, found in rows] for name, rows in results.items()}
        answer = {"setting": setting, "not_measured": not_measured, "groups": rows, "process": processes}
        print(json.dumps(answer, indent=2))
        return
    print(f"{setting}; medians (ranges)\n\nNot measured: {'; '.join(not_measured)}.")
    for group, found in results.items():
        print(f"\n{table(group, found)}")
    if processes:
        print(f"\n{process_table(processes)}")


if __name__ == "__main__":
    run_command(main)

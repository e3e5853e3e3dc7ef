"""Where a Neuron port leaves Hugging Face, and why: `python -m tools.audit`.

    python -m tools.audit --hf ./Llama-3.2-1B --ckpt ./weights --prompt "The capital of France is" --html audit.html

HF's Llama runs twice on the same ids: exactly (in float32, or in float64 to audit float32) and in the audited dtype.
The subject is this repository's model, or tensors that were captured elsewhere. At each place from the embedding to the
logits, in prefill and in decoding with forced ids,

    R = ||subject - HF exact|| / ||HF in the audited dtype - HF exact||

is near 1 if the subject rounds as HF does, whatever the model, the text or the layer. `own R` is the same of one step
alone: the exact step starts from the subject's own inputs, so errors that were made before it do not count. A place is
out of bounds if its own R is, or if its R is and stays so to the end.
"""

from __future__ import annotations

import argparse
import json
import math
import re
import shlex
import subprocess
import sys
import tempfile
import time
from datetime import date
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path

import torch
from torch import Tensor, nn

from checkpoint.config import DTYPES, llama_config, read_config
from checkpoint.files import reason
from checkpoint.output import write
from checkpoint.seal import check_seal
from convert_weights import user_path
from launch.report import peak_memory
from llama_neuron import NeuronConfig, UsageError, integers, positive_int
from tools.audit import logit_rules
from tools.audit.captured import Captured, read_captured
from tools.audit.judge import Text, judge, place_names
from tools.audit.oracle import EXACT, load_hf, run_hf, stored_dtype

TOKENS = 64  # without a prompt
NEW_TOKENS = 8

# ---- Hugging Face and the subject


def read_prompts(args: argparse.Namespace, vocab_size: int) -> list[list[int]]:
    """The ids of --prompt and --prompt-ids, or as many random ones as --tokens says."""
    if not args.prompts:
        generator = torch.Generator().manual_seed(0)
        return [torch.randint(vocab_size, (args.tokens or TOKENS,), generator=generator).tolist()]
    prompts = []
    for prompt in args.prompts:
        if isinstance(prompt, str):
            from transformers import AutoTokenizer

            try:
                prompt = AutoTokenizer.from_pretrained(args.hf, local_files_only=True)(prompt)["input_ids"]
            except Exception as error:  # transformers raises nearly all kinds
                why = reason(error)
                raise UsageError(f"{args.hf} has no tokenizer that can be read: give --prompt-ids ({why})") from None
        if not prompt:
            raise UsageError("--prompt holds no token: give some text")
        if min(prompt) < 0 or max(prompt) >= vocab_size:
            raise UsageError(f"--prompt-ids must be from 0 to {vocab_size - 1}")
        prompts.append(prompt)
    return prompts


def capture_subject(args: argparse.Namespace, texts: list[list[int]], prompts: list[list[int]]) -> Captured:
    """Runs tools.capture on --ckpt with HF's ids forced, in a process of its own, as on a Neuron host."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder, "capture.safetensors")
        command = [sys.executable, "-m", "tools.capture", "--ckpt", Path(args.ckpt).resolve(), "--out", out]
        command += ["--device", args.device or "auto"]
        if args.tp:
            command += ["--tp", args.tp]
        for text, prompt in zip(texts, prompts, strict=True):
            forced = text[len(prompt) :]
            command += ["--prompt-ids", ",".join(map(str, prompt)), "--forced-ids", ",".join(map(str, forced))]
        command += ["--max-new-tokens", args.new or NEW_TOKENS]
        ran = subprocess.run([str(word) for word in command], cwd=Path(__file__).parents[2], check=False)
        if ran.returncode:  # it has said why
            sys.exit(ran.returncode)
        return read_captured(out, llama_config(read_config(args.hf)))


def audited_dtype(args: argparse.Namespace, captured: Captured | None) -> str:
    """--dtype, else the subject's, else the checkpoint's. Raises UsageError if --dtype is another one than the
    subject's and that is not float32, as it is if products alone are in bfloat16 (auto-cast)."""
    if args.ckpt:
        source = f"--ckpt {args.ckpt}"
        own = NeuronConfig.from_pretrained(args.ckpt).torch_dtype
    else:
        source = f"--captured {args.captured}"
        own = captured.facts.get("dtype")
    if own not in DTYPES:
        own = str(stored_dtype(args.hf)).removeprefix("torch.")
        return args.dtype or own
    if own != "float32" and args.dtype not in (None, own):
        raise UsageError(f"--dtype {args.dtype}: {source} is in {own}")
    return args.dtype or own


def make_texts(captured: Captured, hf_runs: list[dict], prompts: list[list[int]], dtype: torch.dtype) -> list[Text]:
    """Each row of a capture beside HF's run; shorter rows end in padding."""
    texts = []
    for row, (hf, prompt) in enumerate(zip(hf_runs, prompts, strict=True)):
        fed = len(hf["ids"]) - 1
        subject = {name: x[row, :fed] for name, x in captured.tensors.items() if name in hf}
        seen = {name: captured.seen[name][row, :fed] for name in subject}
        for name, x in subject.items():
            if x.shape != hf[name].shape:
                raise UsageError(f"{name} of the capture has shape {list(x.shape)}, HF's {list(hf[name].shape)}")
        greedy = captured.greedy
        chosen = None if greedy is None else greedy[row, :fed]
        texts.append(Text(hf["ids"], len(prompt), subject, seen, hf, dtype, chosen))
    return texts


def audit_hf_itself(model: nn.Module, hf_runs: list[dict], prompts: list[list[int]], exact: nn.Module) -> None:
    """Audits HF itself, run again with its own ids forced. Raises UsageError unless it gives the same bits: no
    verdict about others could be trusted then."""
    texts = []
    for run, prompt in zip(hf_runs, prompts, strict=True):
        forced = run["ids"][len(prompt) :].tolist()
        again = run_hf(model, prompt, len(forced), forced)
        subject = {name: x for name, x in again.items() if name != "ids"}
        seen = {name: torch.ones(len(x), dtype=torch.bool) for name, x in subject.items()}
        texts.append(Text(run["ids"], len(prompt), subject, seen, dict(run), model.dtype))
    found = judge(texts, exact, model.dtype, 1, [])
    limit = 16 * torch.finfo(model.dtype).eps
    for text in texts:
        for name, x in text.hf.items():
            if name in text.hf_step:  # each step follows from those before it, except for rounding
                step = text.hf_step[name]
                error = (x - step).norm()
                if not error <= limit * step.norm():
                    share = error / step.norm()
                    raise UsageError(f"HF's own {name} does not follow from the steps before it: {share:.2g}")
    if not found["bitwise"]:
        raise UsageError("HF does not repeat itself here, its bits differ from run to run: set OMP_NUM_THREADS=1")


def audit(args: argparse.Namespace) -> dict:
    """The report."""
    began = time.perf_counter()
    check_flags(args)
    config = llama_config(read_config(args.hf))
    captured = None
    prompts = None
    forced = None
    tp = args.tp or 1
    if args.ckpt:
        check_seal(args.ckpt, [0])
        tp = NeuronConfig.from_pretrained(args.ckpt).tp_degree
    if args.captured:
        captured = read_captured(args.captured, config, captured_ids(args, config.vocab_size), args.tp)
        tp = int(captured.facts["tp"])
        prompts, forced = ids_of(captured, args.captured)
    dtype = getattr(torch, audited_dtype(args, captured))
    model = load_hf(args.hf, dtype)
    prompts = prompts or read_prompts(args, config.vocab_size)
    stored = stored_dtype(args.hf)
    exact = model if stored == dtype else load_hf(args.hf, stored)
    hf_runs = []
    for row, prompt in enumerate(prompts):
        if forced is None:
            hf_runs.append(run_hf(model, prompt, args.new or NEW_TOKENS))
        else:
            hf_runs.append(run_hf(model, prompt, len(forced[row]), forced[row]))
    audit_hf_itself(model, hf_runs, prompts, exact)
    if captured is None:
        captured = capture_subject(args, [run["ids"].tolist() for run in hf_runs], prompts)
    texts = make_texts(captured, hf_runs, prompts, dtype)
    report = judge(texts, exact, dtype, tp, args.bounds, differing=captured.differing)
    report["not_seen"] += gaps(texts, config.num_hidden_layers)
    report["whole"] = is_whole(texts)
    report["logits"] = logit_rules.summary(texts, dtype)
    if args.ckpt:
        subject = f"{args.ckpt}, tp {tp}, {args.device or 'auto'}"
    else:
        subject = f"{args.captured} ({captured.facts['stack']}, tp {tp})"
    report["setting"] = {
        "hf": args.hf.resolve().name,
        "subject": subject,
        "dtype": str(dtype).removeprefix("torch."),
        "exact": str(EXACT[dtype]).removeprefix("torch."),
        "layers": config.num_hidden_layers,
        "versions": f"torch {torch.__version__}, transformers {version('transformers')}",
        "date": str(date.today()),
        "seconds": round(time.perf_counter() - began, 1),
        "peak_gb": round(peak_memory() / 1e9, 2),
    }
    report["notes"] = captured.notes + report["notes"]
    report["texts"] = [{"ids": text.ids.tolist(), "prompt_tokens": text.prompt} for text in texts]
    report["command"] = "python -m tools.audit " + shlex.join(sys.argv[1:])
    report["verdict"] = verdict(report)
    report["next"] = what_next(report)
    return report


def captured_ids(args: argparse.Namespace, vocab_size: int) -> Tensor | None:
    """The whole texts, from --prompt-ids, for captures that do not hold their ids."""
    if not args.prompts:
        return None
    rows = read_prompts(args, vocab_size)
    if len({len(row) for row in rows}) != 1:
        raise UsageError("--prompt-ids beside --captured: give rows of one length")
    return torch.tensor(rows)


def ids_of(captured: Captured, path: Path) -> tuple[list[list[int]], list[list[int]]]:
    """Each row's prompt, and its new tokens: those that were fed back and the one after them."""
    if captured.ids is None:
        raise UsageError(f"--captured {path} does not tell its ids: give them by --prompt-ids, new ones too")
    prompts = []
    forced = []
    for row, length, fed in zip(captured.ids.tolist(), captured.prompt_tokens, captured.ends, strict=True):
        prompts.append(row[:length])
        forced.append([*row, 0][length : fed + 1])  # the last one is fed to nobody, and may be missing
    return prompts, forced


def steps_of(text: Text) -> dict[str, slice]:
    """A text's calls of the model, in words, and their positions: the prompt's, then those of new tokens."""
    steps = {"prefill": text.phase("prefill")}
    for number, position in enumerate(range(text.prompt, len(text.ids) - 1)):
        steps[f"decoding step {number + 1}"] = slice(position, position + 1)
    return steps


def gaps(texts: list[Text], layers: int) -> list[str]:
    """What was not seen of places that were seen: whole steps, and places in a whole phase."""
    found = []
    for row, text in enumerate(texts):
        for step, positions in steps_of(text).items():
            if not any(seen[positions].any() for seen in text.seen.values()):
                found.append(f"{step} of row {row}")
    for place, name in place_names(layers).items():
        for phase in ("prefill", "decode"):
            parts = [text.seen[name][text.phase(phase)] for text in texts if name in text.seen]
            if sum(len(part) for part in parts) and not any(part.any() for part in parts):
                found.append(f"{place} in {phase}")
    return found


def is_whole(texts: list[Text]) -> bool:
    """Whether all places that are compared were seen everywhere, but for logits before the end of a prompt."""
    for text in texts:
        for name, seen in text.seen.items():
            start = text.prompt - 1 if name == "logits" else 0
            if not seen[start:].all():
                return False
    return True


# ---- words


def where(first: dict) -> str:
    """A report's `first` in words."""
    layer = "" if first["layer"] is None else f"layer {first['layer']}, "
    step = "prefill" if first["step"] == 0 else f"decoding step {first['step']}"
    words = [f"{layer}{first['module']} ({first['place']}), {step}, position {first['position']}"]
    for name in ("heads", "ranks"):
        if first[name]:
            words.append(f"{name} {', '.join(map(str, first[name]))}")
    return ", ".join(words + first["confined"])


def verdict(report: dict) -> str:
    """The last line of an audit."""
    count = len({row["place"] for row in report["places"]})
    if not report["passed"]:
        return f"FAILED at {where(report['first'])}: {report['causes'][0]['meaning']}"
    unseen = f", {len(report['not_seen'])} not seen" if report["not_seen"] else ""
    if report["bitwise"]:
        what = "" if report["whole"] else "what was captured is "
        return f"passed: {what}bitwise equal to Hugging Face in {report['setting']['dtype']} at {count} places{unseen}"
    worst = max(row["own_r"] for row in report["places"])
    return f"passed: rounds as Hugging Face does at {count} places{unseen}; largest own R {worst:.2f}"


def what_next(report: dict) -> list[str]:
    """Advice to whoever reads the report."""
    first = report["first"]
    advice = []
    if first is not None:
        advice.append(f"Read the code of {first['place']} beside HF's: python -m tools.side_by_side OUT.html.")
        also = {row["place"] for row in report["places"] if not row["own_r"] <= row["own_bound"]}
        also.discard(first["place"])
        kinds = ", ".join(sorted({place.rpartition(".")[2] for place in also}))
        if also:
            advice.append(f"{len(also)} more places are out by themselves ({kinds}): one cause may be behind all.")
        else:
            advice.append("No other step is out by itself: what differs after this one is its consequence.")
    for row in report["kinds"]:
        error = row.get("share_error", 0)
        if first is None and error > 0.08:
            advice.append(f"Give more tokens to decide about {row['of']}: its share is known to +- {error:.2f}.")
    if report["not_seen"]:
        advice.append(f"Capture {', '.join(report['not_seen'][:4])} too: what is not seen has not passed.")
    return advice


def table(report: dict) -> str:
    """The report as text."""
    setting = report["setting"]
    tokens = []
    for text in report["texts"]:
        new_tokens = len(text["ids"]) - text["prompt_tokens"]
        tokens.append(f"{text['prompt_tokens']}+{new_tokens}")
    what = f"{setting['subject']} against {setting['hf']} in {setting['dtype']}, exact in {setting['exact']}"
    lines = [
        f"{what}; {', '.join(tokens)} tokens; {setting['versions']}",
        f"{'place':34}{'phase':8} {'max':>9}{'mean':>9}{'rel L2':>9}{'cosine':>9}{'ulp':>10}{'R':>9}{'own R':>9}",
    ]
    for row in report["places"]:
        differences = f"{row['max_abs']:9.2g}{row['mean_abs']:9.2g}{row['rel_l2']:9.2g}"
        others = f"{row['cosine']:9.5f}{row['max_ulp']:10.3g}{row['r']:9.3g}{row['own_r']:9.3g}"
        mark = "" if row["ok"] else f"  out of bounds ({row['r_bound']:.2f}, own {row['own_bound']:.2f})"
        lines.append(f"{row['place']:34}{row['phase']:8} {differences}{others}{mark}")
    lines.append("\nown R of all layers together")
    for row in report["kinds"]:
        mark = "" if row["ok"] else "  out of bounds"
        share = ""
        if "share" in row:
            share = f"; share of {row['of']} {round(row['share'], 2) + 0.0:.2f} +- {row['share_error']:.2f}"
        lines.append(f"{row['kind']:34}{row['own_r']:8.3f} of {row['own_bound']:.2f}{mark}{share}")
    if report["not_seen"]:
        lines.append(f"\nnot seen: {', '.join(report['not_seen'])}")
    lines += [f"note: {note}" for note in report["notes"]]
    if report["logits"]:
        lines += ["", *logit_lines(report["logits"])]
    for cause in report["causes"]:
        lines.append(f"\ncause: {cause['meaning']}\n       {cause['evidence']}")
    lines += [f"next: {advice}" for advice in report["next"]]
    lines += ["", report["verdict"]]
    return "\n".join(lines)


def logit_lines(logits: dict) -> list[str]:
    lines = [f"logits: the same greedy token at {logits['top1_agreement']:.1%} of {logits['positions']} positions"]
    first = logits["first_other"]
    if first:
        kind = "a tie" if first["tie"] else "no tie"
        lines.append(
            f"first other token: row {first['row']}, position {first['position']}, {first['subject']} for HF's "
            f"{first['hf']}, whose logits are {first['gap_ulp']:.2g} ulp apart: {kind}"
        )
    subject = f"mean {logits['mean_kl']:.3g}, largest {logits['max_kl']:.3g}"
    lines.append(f"KL from HF exact: {subject}; HF's own mean {logits['hf_mean_kl']:.3g} nats")
    for name, key in (("NxDI's logit matching", "nxdi"), ("vLLM Neuron's three-way verdict", "vllm_neuron")):
        rule = logits[key]
        lines.append(f"{name}: {'passes' if rule['passed'] else 'fails'}; {rule['note']}")
    return lines


def as_json(value: object) -> object:
    """NaN and infinity as text: JSON has no such numbers."""
    if isinstance(value, dict):
        return {key: as_json(item) for key, item in value.items()}
    if isinstance(value, list):
        return [as_json(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    return value


# ---- command line


def bound(text: str) -> tuple[str, float]:
    """argparse type of REGEX=NUMBER."""
    pattern, _, number = text.rpartition("=")
    try:
        re.compile(pattern)
        limit = float(number)
    except (re.error, ValueError) as error:
        raise argparse.ArgumentTypeError(f"{text!r} is not REGEX=NUMBER: {error}") from None
    if not pattern or not limit > 0:
        raise argparse.ArgumentTypeError(f"{text!r} is not REGEX=NUMBER with a number above 0")
    return pattern, limit


def parse_args(words: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Where a port leaves Hugging Face, and why.", usage=argparse.SUPPRESS)
    add = parser.add_argument
    add("--hf", type=user_path, required=True, metavar="DIR", help="the HF checkpoint")
    subject = parser.add_mutually_exclusive_group(required=True)
    subject.add_argument("--ckpt", metavar="DIR", help="audit this repository's model: what convert_weights.py wrote")
    captured = "audit tensors of tools.capture (a file), NxDI or vLLM Neuron (a folder)"
    subject.add_argument("--captured", type=user_path, metavar="PATH", help=captured)
    add("--tp", type=positive_int, metavar="N", help="tensor-parallel ranks, as converted or captured")
    add("--device", choices=("auto", "cpu", "cuda", "neuron", "nxd"), help="of --ckpt (auto)")
    add("--prompt", dest="prompts", action="append", metavar="TEXT", help="repeat for a batch")
    add("--prompt-ids", dest="prompts", action="append", type=integers, metavar="1,2,3", help="instead of text")
    add("--tokens", type=positive_int, metavar="N", help=f"without a prompt: random ids ({TOKENS})")
    add("--new", type=positive_int, metavar="M", help=f"tokens to decode ({NEW_TOKENS})")
    add("--dtype", choices=DTYPES, help="what HF's rounding is taken from (default: the subject's dtype)")
    bounds = "bound of R and own R at places that match, before the built-in ones"
    add("--bound", dest="bounds", action="append", type=bound, default=[], metavar="REGEX=R", help=bounds)
    add("--json", action="store_true", help="print the report as one JSON object")
    add("--plot", type=user_path, metavar="FILE.png", help="draw R by layer")
    add("--html", type=user_path, metavar="FILE.html", help="write the report as a page")
    return parser.parse_args(words)


def check_flags(args: argparse.Namespace) -> None:
    """Raises UsageError for flags that mean nothing together, and for files that could not be written in the end."""
    if args.captured:
        texts = [prompt for prompt in args.prompts or [] if isinstance(prompt, str)]
        meaningless = {"--prompt": texts, "--new": args.new, "--tokens": args.tokens, "--device": args.device}
        for flag, value in meaningless.items():
            if value:
                raise UsageError(f"{flag} means nothing beside --captured, which was made already: leave it out")
    if args.prompts and args.tokens:
        raise UsageError("--tokens means nothing beside a prompt: leave one of them out")
    for flag, path in (("--html", args.html), ("--plot", args.plot)):
        if path and (not path.parent.is_dir() or (path.exists() and not path.is_file())):
            raise UsageError(f"{flag} {path} cannot be written: name a file in a directory that exists")
    if args.plot and find_spec("matplotlib") is None:
        raise UsageError("--plot needs matplotlib: pip install matplotlib")


def main() -> None:
    args = parse_args()
    report = audit(args)
    data = as_json(report)
    if args.plot or args.html:
        from tools.audit.page import page, plot

        if args.plot:
            write(args.plot, lambda path: plot(data, path))
        if args.html:
            write(args.html, lambda path: path.write_text(page(data)))
    print(json.dumps(data, indent=1) if args.json else table(report))
    sys.exit(0 if report["passed"] else 1)

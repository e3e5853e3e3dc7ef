"""What to run first on a Neuron host, and to paste into a bug report: `python -m tools.doctor`.

It says which versions and settings decide what is computed here, and which of the two paths to Neuron can run. Then it
makes a random Llama of two layers and runs it on the CPU and on the device, with a verdict for each step.

Whatever imports torch runs in a child process with a time limit, so that a runtime that crashes or hangs ends a step
and not the doctor. Steps on the CPU do not load TorchNeuron. Graphs are kept in a temporary folder, so the first start
compiles them. No NeuronCore has been seen by this file yet.

Exit code: 0 if every step that ran is right, 1 if one is not, 2 for a wrong flag.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path
from tempfile import TemporaryDirectory, TemporaryFile
from typing import NamedTuple

ROOT = Path(__file__).parents[1]
PACKAGES = ["torch", "torch-neuronx", "torch-xla", "neuronx-distributed", "neuronx-cc", "libneuronxla", "nki"]
PACKAGES += ["transformers", "safetensors", "tokenizers", "numpy"]
INSTRUCTIONS = ["avx2", "avx512f", "avx512_bf16", "amx_bf16", "bf16"]  # they decide whether HF's bits can be had
VARIABLES = {  # a name that ends in _ is for all that begin with it
    "XLA_DISABLE_FUNCTIONALIZATION": "1, as torch-neuronx sets it: torch-xla writes in place, and its split is wrong",
    "XLA_USE_BF16": "1: torch-xla computes float32 in bfloat16",
    "XLA_DOWNCAST_BF16": "1: torch-xla computes float32 in bfloat16",
    "XLA_": "torch-xla's",
    "NEURON_CC_FLAGS": "the compiler's; --auto-cast changes float32 products",
    "NEURON_LOGICAL_NC_CONFIG": "physical cores in a logical one",
    "NEURON_PLATFORM_TARGET_OVERRIDE": "graphs are made for this chip, whichever is here",
    "NEURON_RT_STOCHASTIC_ROUNDING_EN": "1: rounds at random, so that results do not repeat",
    "NEURON_RT_VISIBLE_CORES": "cores that a process may take",
    "NEURON_RT_NUM_CORES": "how many cores a process takes",
    "NEURON_RT_": "the Neuron runtime's",
    "NEURON_": "Neuron's",
    "TORCH_NEURONX_DISABLE_FALLBACK_EXECUTION": "0: a graph that does not compile runs eagerly instead of failing",
    "TORCH_NEURONX_": "TorchNeuron's",
    "TORCH_DEVICE_BACKEND_AUTOLOAD": "0: `import torch` does not load TorchNeuron",
    "TORCHDYNAMO_": "torch.compile's",
    "TORCHINDUCTOR_CACHE_DIR": "where --compile and --device nxd keep code, but not the doctor's",
    "NXD_CPU_MODE": "1: NxD on the CPU, without graphs",
    "PJRT_DEVICE": "the device that torch-xla takes",
    "ONEDNN_MAX_CPU_ISA": "newest instructions in a CPU's products; decides bits",
    "OMP_NUM_THREADS": "threads on a CPU; can change bits",
}
NEEDS = {"nxd": ["torch_xla", "torch_neuronx", "neuronx_distributed"], "neuron": ["torch_neuronx"]}

PROMPTS, NEW_TOKENS = [[5, 11, 2, 60, 33, 47, 3], [7, 1, 40]], 8
BOUND = 2e-5  # of the largest logit: what the tests allow in float32 on a CPU
# 6 query heads on 2 KV heads, scaled rotary frequencies, a vocabulary that no tp divides
CONFIG = {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "torch_dtype": "float32", "rms_norm_eps": 1e-5}
CONFIG |= {"hidden_size": 96, "intermediate_size": 160, "num_hidden_layers": 2, "vocab_size": 131, "head_dim": 16}
CONFIG |= {"num_attention_heads": 6, "num_key_value_heads": 2, "hidden_act": "silu", "tie_word_embeddings": False}
CONFIG |= {"max_position_embeddings": 128, "rope_theta": 500000.0, "eos_token_id": None}
CONFIG["rope_scaling"] = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
CONFIG["rope_scaling"]["original_max_position_embeddings"] = 32
LAYER = {"self_attn.q_proj": (96, 96), "self_attn.k_proj": (32, 96), "self_attn.v_proj": (32, 96)}
LAYER |= {"self_attn.o_proj": (96, 96), "mlp.gate_proj": (160, 96), "mlp.up_proj": (160, 96)}
LAYER |= {"mlp.down_proj": (96, 160), "input_layernorm": (96,), "post_attention_layernorm": (96,)}
SHAPES = {f"model.layers.{number}.{name}": shape for number in range(2) for name, shape in LAYER.items()}
SHAPES |= {"model.embed_tokens": (131, 96), "model.norm": (96,), "lm_head": (131, 96)}
# Hugging Face's greedy texts, without a cache, and the logits of all that was fed
HUGGING_FACE = f"""
import json, sys, torch
from transformers import LlamaForCausalLM
model = LlamaForCausalLM.from_pretrained(sys.argv[1], attn_implementation="eager").float().eval()
ids, logits = {PROMPTS}, []
for row in ids:
    for _ in range({NEW_TOKENS}):
        with torch.no_grad():
            out = model(torch.tensor([row]), use_cache=False).logits[0]
        row.append(int(out[-1].argmax()))
    logits.append(out.tolist())
print(json.dumps({{"ids": ids, "logits": logits}}, indent=1))
"""
ACCELERATOR = """
import torch
if found := torch.accelerator.current_accelerator(check_available=True):
    print(found.type, torch.accelerator.device_count())
"""


# ---- child processes


def one_line(text: str) -> str:
    """Others' text, fit for a terminal."""
    return "".join(c if c.isprintable() else " " for c in text).strip()[:200]


class Failed(Exception):
    """A command ended otherwise than it should, and why."""


class Ran(NamedTuple):
    """A command that has ended, or was ended after its time: then `code` is None."""

    code: int | None
    out: str
    err: str
    seconds: float

    def error(self) -> str:
        """Why it failed, or nothing: the last line of stderr that names an error, or the last of all."""
        if self.code is None:
            return f"no end after {self.seconds:.0f} s"
        lines = [line for line in self.err.splitlines() if line.strip()] or ["nothing on stderr"]
        names_error = re.compile(r"(\[rank\d+\]: *)?[\w.]+(Error|Exception|Failed)\b|.*: error: ")
        errors = [line for line in lines if names_error.match(line) and "ChildFailedError" not in line]  # torchrun's
        ended = f"exit code {self.code}" if self.code >= 0 else f"ended by {signal.Signals(-self.code).name}"
        return one_line(f"{(errors or lines)[-1]} ({ended})") if self.code else ""


def execute(words: list[object], seconds: float = 120, **variables: str) -> Ran:
    """A command at the top of the repository. Files take its output: what it leaves behind would keep pipes open."""
    began = time.perf_counter()
    with TemporaryFile("w+", errors="replace") as out, TemporaryFile("w+", errors="replace") as err:
        streams = {"stdin": subprocess.DEVNULL, "stdout": out, "stderr": err, "start_new_session": True}
        process = subprocess.Popen(list(map(str, words)), cwd=ROOT, env=os.environ | variables, **streams)
        try:
            code = process.wait(seconds)
        except subprocess.TimeoutExpired:
            code = None
        finally:  # on Ctrl-C too; torchrun ends its ranks on SIGTERM
            for number in (signal.SIGTERM, signal.SIGKILL):
                if process.poll() is None:
                    os.killpg(process.pid, number)
                    with suppress(subprocess.TimeoutExpired):
                        process.wait(20)
        out.seek(0)
        err.seek(0)
        return Ran(code, out.read(), err.read(), time.perf_counter() - began)


def python(statements: str, **variables: str) -> Ran:
    return execute([sys.executable, "-c", statements], **variables)


def run(step: dict, words: Iterable[object], seconds: float = 120, may_fail: bool = False, **variables: str) -> str:
    """What Python prints as a step of the report. Raises Failed, unless exit code 1 is a result too."""
    ran = execute([sys.executable, *words], seconds, **variables)
    step |= {"seconds": ran.seconds, "stderr": ran.err[-4000:]}
    if ran.error() and not (may_fail and ran.code == 1 and ran.out):
        raise Failed(ran.error())
    return ran.out


def last_json(out: str) -> dict:
    """The object at the end of stdout, after what others may have printed there."""
    return json.loads(out[out.rfind("\n{\n") + 1 :])


# ---- what is here


def read(path: str, pattern: str = "().*") -> str | None:
    """The line of a file of the kernel that matches a pattern, after the pattern's group."""
    with suppress(OSError):
        found = re.search(pattern, Path(path).read_text(errors="replace"))
        return found and found[0][len(found[1]) :].strip()
    return None


def versions() -> dict[str, str | None]:
    """Of Python, packages, Neuron's driver and runtime; None for what is absent."""
    found: dict[str, str | None] = {"python": platform.python_version()} | dict.fromkeys(PACKAGES)
    for name in PACKAGES:
        with suppress(PackageNotFoundError):
            found[name] = version(name)
    found["driver"], found["runtime"] = read("/sys/module/neuron/version"), None
    if shutil.which("dpkg-query"):
        query = ["dpkg-query", "-W", "-f", "${Version}", "aws-neuronx-runtime-lib"]
        found["runtime"] = execute(query).out.strip() or None
    return found


def host() -> dict[str, str | None]:
    """System, CPU and memory: the compiler is killed where memory is short."""
    flags = (read("/proc/cpuinfo", r"((?:flags|Features)\s*:).*") or "").split()
    cpu = read("/proc/cpuinfo", r"(model name\s*:).*") or platform.machine()
    found = {"system": platform.platform(), "cpu": f"{cpu} with {os.cpu_count()} cores"}
    found["instructions"] = " ".join(name for name in INSTRUCTIONS if name in flags) or None
    for name in ("MemTotal", "MemAvailable"):
        kilobytes = read("/proc/meminfo", rf"({name}:\s*)\d+")
        found[name] = kilobytes and f"{int(kilobytes) / 1e6:.1f} GB"
    return found | {"memory limit": read("/sys/fs/cgroup/memory.max")}


def environment() -> dict[str, str]:
    """The variables that are set, with what they do."""
    found = {}
    for name in sorted(os.environ):
        known = [key for key in VARIABLES if name == key or (key[-1] == "_" and name.startswith(key))]
        if known:
            found[name] = f"{one_line(os.environ[name])} ({VARIABLES[max(known, key=len)]})"
    return found


def neuron_cores() -> int | None:
    """The NeuronCores that a process may take, by the environment or neuron-ls; None if neither tells."""
    number, visible = os.environ.get("NEURON_RT_NUM_CORES", "0"), os.environ.get("NEURON_RT_VISIBLE_CORES")
    neuron_ls = shutil.which("neuron-ls") or shutil.which("/opt/aws/neuron/bin/neuron-ls")
    with suppress(ValueError, KeyError, TypeError):  # whatever they say
        if int(number) > 0:
            return int(number)
        if visible:  # such as 0,2-3
            ranges = [part.split("-") for part in visible.split(",")]
            return sum(int(part[-1]) - int(part[0]) + 1 for part in ranges)
        if neuron_ls:
            return sum(device["nc_count"] for device in json.loads(execute([neuron_ls, "-j"]).out))
    return None


def paths(files: list[str], accelerator: str) -> dict[str, str]:
    """Whether each of the two paths to Neuron can run, and if not, what is missing."""
    missing, found = {}, {}
    for name in NEEDS["nxd"]:
        missing[name] = f"no {name}"
        if find_spec(name):  # imported by itself: while torch loads it, another error hides its own
            error = python(f"import torch, {name}", TORCH_DEVICE_BACKEND_AUTOLOAD="0").error()
            missing[name] = error and f"import {name}: {error}"
    for path, names in NEEDS.items():
        reasons = [missing[name] for name in names if missing[name]]
        if path == "nxd" and not files:
            reasons.append("no /dev/neuron*")
        if path == "neuron" and find_spec("torch_xla"):
            reasons.append("torch_xla is installed, which TorchNeuron does without")
        if path == "neuron" and not accelerator.startswith("neuron "):
            reasons.append("torch has no device neuron")
        found[f"--device {path}"] = f"cannot run here: {'; '.join(reasons)}" if reasons else "can run here"
    return found


# ---- report


class Report:
    """What is found: text, line by line, or one JSON object."""

    def __init__(self, as_json: bool) -> None:
        self.as_json, self.found, self.steps = as_json, {}, []

    def say(self, text: str) -> None:
        if not self.as_json:
            print(text, flush=True)

    def facts(self, title: str, facts: dict, apart: bool = False) -> None:
        self.found[title] = facts
        lines = [f"{name} {'absent' if fact is None else fact}" for name, fact in facts.items()]
        for line in lines if apart else [", ".join(lines)]:
            self.say(f"{title}: {line}")

    @contextmanager
    def step(self, name: str) -> Iterator[dict]:
        """A step, good unless the block raises or changes `ok`; None is for what cannot be tried."""
        step = {"name": name, "ok": True, "says": "", "seconds": None}
        try:
            yield step
        except Exception as error:  # a command's, or that of reading what it has written
            step |= {"ok": False, "says": one_line(str(error) if type(error) is Failed else repr(error))}
        if step["ok"]:
            step.pop("stderr", None)
        self.steps.append(step)
        verdict = {True: "ok", False: "FAILED", None: "not run"}[step["ok"]]
        took = f" ({step['seconds']:.1f} s)" if step["seconds"] else ""
        self.say(": ".join(filter(None, (name, verdict, step["says"]))) + took)

    def end(self) -> int:
        """The verdict, as the exit code."""
        failed = [step["name"] for step in self.steps if step["ok"] is False]
        self.say(f"verdict: FAILED: {'; '.join(failed)}" if failed else "verdict: all that ran is right")
        if self.as_json:
            print(json.dumps(self.found | {"steps": self.steps, "passed": not failed}, indent=1))
        return 1 if failed else 0


def look(report: Report, asked: str) -> tuple[str, int]:
    """Reports what is here. Returns the device to try, and for how many ranks it has room."""
    report.facts("versions", versions())
    report.facts("host", host())
    report.facts("environment", environment(), apart=True)
    found, cores = python(ACCELERATOR), neuron_cores()
    accelerator, files = one_line(found.out), sorted(map(str, Path("/dev").glob("neuron[0-9]*")))
    devices = {"/dev/neuron*": " ".join(files) or None, "NeuronCores": cores}
    report.facts("devices", devices | {"torch.accelerator": found.error() or accelerator or None})
    report.facts("paths", paths(files, accelerator), apart=True)
    device = "cpu"  # where the steps go on if there is no other
    with report.step(f"--device {asked}") as step:
        device = one_line(run(step, ["-c", f"from llama_neuron import choose_device\nprint(choose_device({asked!r}))"]))
        step["says"] = f"{device} is tried"
    report.found["device"] = device
    if device == "cpu":
        return device, os.cpu_count() or 1
    return device, cores or int(accelerator.rpartition(" ")[2] or 0) or 2 * len(files)  # each has two cores or more


# ---- a Llama of two layers


def make_checkpoint(folder: Path) -> None:
    """A random HF checkpoint in float32, always the same: with this seed no two best tokens of HF's are closer than 3%
    of the largest logit, so rounding does not change the ids."""
    import numpy
    from safetensors.numpy import save_file

    generator, tensors = numpy.random.default_rng(18), {}
    for name, shape in SHAPES.items():
        mean = 1.0 if "norm" in name else 0.0
        tensors[f"{name}.weight"] = generator.normal(mean, 0.2, shape).astype(numpy.float32)
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(CONFIG))
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


class Checkup:
    """The steps with this model. `ids` and `logits` are the oracle's: Hugging Face, or else the CPU's capture."""

    def __init__(self, report: Report, folder: Path, seconds: float) -> None:
        self.report, self.folder, self.seconds = report, folder, seconds
        self.oracle, self.ids, self.logits = "the CPU", None, None

    def run(self, step: dict, device: str, *words: object, may_fail: bool = False) -> str:
        folders = {"TORCHINDUCTOR_CACHE_DIR": "code", "TORCH_NEURONX_NEFF_CACHE_DIR": "neff"}
        variables = {name: str(self.folder / folder) for name, folder in folders.items()}
        if device == "cpu":
            variables |= {"TORCH_DEVICE_BACKEND_AUTOLOAD": "0", "OMP_NUM_THREADS": "1"}
        return run(step, words, self.seconds, may_fail, **variables)

    def everything(self, device: str, ranks: int) -> None:
        """All steps, the CPU's first."""
        hf, degrees = self.folder / "hf", (1, 2) if ranks > 1 else (1,)
        with self.report.step("Hugging Face") as step:
            make_checkpoint(hf)
            if find_spec("transformers"):
                found = last_json(self.run(step, "cpu", "-c", HUGGING_FACE, hf))
                self.oracle, self.ids, self.logits = "Hugging Face", found["ids"], found["logits"]
            else:
                step |= {"ok": None, "says": "no transformers: compared with the CPU instead, and not audited"}
        for tp in degrees:
            with self.report.step(f"convert, tp {tp}") as step:
                words = ["--hf", hf, "--out", self.folder / f"tp{tp}", "--tp", tp, "--batch-size", len(PROMPTS)]
                self.run(step, "cpu", "convert_weights.py", *words, "--sequence-length", 64)
        for where in dict.fromkeys(("cpu", device)):
            started = self.generate("run", where, 1)
            self.capture(where)
        self.audit(device)
        if device != "cpu" and started:
            self.generate("second start", device, 1)
        if ranks > 1:
            self.generate("run", device, 2)

    def words(self, device: str, tp: int) -> list[object]:
        """Flags that commands share: where, and a batch of two unequal prompts."""
        prompts = [f"--prompt-ids={','.join(map(str, prompt))}" for prompt in PROMPTS]
        return ["--ckpt", self.folder / f"tp{tp}", "--device", device, "--max-new-tokens", NEW_TOKENS, *prompts]

    def generate(self, name: str, device: str, tp: int) -> bool:
        """The ids, and seconds; with TorchNeuron those of a token include the start of its graph. Returns `ok`."""
        with self.report.step(f"{name} on {device}, tp {tp}") as step:
            found = last_json(self.run(step, device, "llama_neuron.py", *self.words(device, tp), "--json"))
            timings, ids = found["timings"], [row["prompt_ids"] + row["ids"] for row in found["completions"]]
            first, token = timings["compile_s"] + timings["prefill_s"], timings["decode_s"] / (NEW_TOKENS - 1)
            same = "the same ids as" if ids == self.ids else "other ids than"
            says = f"{same} {self.oracle}" if self.ids else "nothing to compare with"
            step["ok"] = self.ids in (None, ids)
            step["says"] = f"{says}; first call {first:.3g} s, a token {token:.3g} s"
        return step["ok"]

    def capture(self, device: str) -> None:
        """The logits that follow the oracle's ids."""
        file, words = self.folder / f"{device}.safetensors", self.words(device, 1)
        with self.report.step(f"logits on {device}, tp 1") as step:
            from safetensors.numpy import load_file

            for prompt, text in zip(PROMPTS, self.ids or [], strict=self.ids is not None):
                words.append(f"--forced-ids={','.join(map(str, text[len(prompt) :]))}")
            self.run(step, device, "-m", "tools.capture", *words, "--out", file)
            captured, ends = load_file(file), [len(prompt) + NEW_TOKENS for prompt in PROMPTS]
            logits = [row[: end - 1] for row, end in zip(captured["logits"], ends, strict=True)]
            if self.ids is None:
                self.ids = [row[:end].tolist() for row, end in zip(captured["ids"], ends, strict=True)]
                self.logits, step["says"] = logits, "nothing to compare with"
                return
            pairs = zip(logits, self.logits, strict=True)
            error = max(abs(mine - theirs).max() for mine, theirs in pairs) / max(abs(row).max() for row in logits)
            step["ok"] = bool(error <= BOUND)
            step["says"] = f"within {error:.2g} of the largest of {self.oracle}'s; {BOUND:g} is allowed"

    def audit(self, device: str) -> None:
        file = self.folder / f"{device}.safetensors"
        with self.report.step(f"audit of {device}, tp 1") as step:
            if file.exists() and find_spec("transformers"):
                words = ["tools.audit", "--hf", self.folder / "hf", "--captured", file, "--json"]
                found = last_json(self.run(step, "cpu", "-m", *words, may_fail=True))
                step |= {"ok": found["passed"], "says": re.sub("^(passed:|FAILED) ", "", found["verdict"])}
            else:
                step |= {"ok": None, "says": "no transformers" if file.exists() else "there is no capture"}


def main() -> int:
    parser = argparse.ArgumentParser(description="What is here, and whether a small Llama runs right.")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda", "neuron", "nxd"), default="auto")
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of text")
    parser.add_argument("--timeout", type=float, default=1200, metavar="SECONDS", help="of a step (%(default)s)")
    args = parser.parse_args()
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # the steps end with the doctor
    report = Report(args.json)
    with TemporaryDirectory(prefix="llama_neuron_doctor_") as folder:
        Checkup(report, Path(folder), args.timeout).everything(*look(report, args.device))
    return report.end()


if __name__ == "__main__":
    try:
        sys.exit(main())
    except (KeyboardInterrupt, OSError) as error:
        sys.exit(f"doctor.py: error: {str(error) or 'interrupted'}")

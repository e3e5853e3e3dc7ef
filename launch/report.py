"""What the command prints: text as it is made and a line of timings, or one JSON object."""

from __future__ import annotations

import argparse
import gc
import json
import resource
import sys
import time
from dataclasses import asdict
from pathlib import Path

from torch import nn

from launch.torchrun import program
from llama_neuron import NeuronConfig, read_shard

LONG_PROMPT = 1024  # tokens, from which on a CPU eager attention takes a multiple of sdpa's time


class Report:
    """Follows a run from the moment its model is ready. The text of a single prompt is streamed, a batch is printed at
    its end. `began` and `loaded` are times of `time.perf_counter`, in seconds."""

    def __init__(self, args: argparse.Namespace, rank: int, began: float, loaded: float) -> None:
        self.args = args
        self.rank = rank
        self.decode = args.tokenizer.decode if args.tokenizer else str
        self.streams = rank == 0 and not args.json and args.tokenizer is not None and len(args.prompts) == 1
        if rank == 0:
            for notice in notices(args):
                print(f"{program()}: {notice}", file=sys.stderr)
        self.streamed = ""
        self.began = began
        self.loaded = began if args.device == "nxd" else loaded  # NxD compiles while it loads: all is compile_s
        gc.freeze()  # else one collection, of everything that was imported, takes 95 ms in the first prompt
        self.compiled = time.perf_counter()
        self.steps: list[float] = []  # when each step ended

    def on_step(self, completions: list[list[int]]) -> None:
        """Takes the time of a step, and prints what it added to the text."""
        self.steps.append(time.perf_counter())
        if not self.streams:
            return
        text = self.decode(self.args.prompts[0] + completions[0])
        if not text.endswith("\ufffd"):  # hold back an incomplete UTF-8 character
            print(text[len(self.streamed) :], end="", flush=True)
            self.streamed = text

    def timings(self, completions: list[list[int]]) -> dict[str, float]:
        """Seconds, counts and rates of the run."""
        decode_s = self.steps[-1] - self.steps[0]
        decode_tokens = sum(map(len, completions)) - len(completions)
        weights = read_shard(self.args.ckpt, 0)
        read = sum(tensor.nbytes for tensor in weights.values()) - weights["model.embed_tokens.weight"].nbytes
        decode_steps = len(self.steps) - 1  # every one of them reads all weights
        return {
            "load_s": self.loaded - self.began,
            "compile_s": self.compiled - self.loaded,
            "prefill_s": self.steps[0] - self.compiled,
            "prefill_tokens": sum(map(len, self.args.prompts)),
            "decode_s": decode_s,
            "decode_tokens": decode_tokens,
            "decode_tokens_per_s": decode_tokens / decode_s if decode_s else 0.0,
            "weight_gb_per_s": self.args.tp * read * decode_steps / decode_s / 1e9 if decode_s else 0.0,
            "peak_rss_bytes": peak_memory(),
        }

    def print(self, model: nn.Module, completions: list[list[int]]) -> None:
        """Prints the result on stdout and, unless it is JSON, the timings on stderr."""
        if self.rank != 0:
            return
        timings = self.timings(completions)
        if self.args.json:
            eos = [] if self.args.ignore_eos else model.config.eos_token_id
            rows = []
            for prompt, ids in zip(self.args.prompts, completions, strict=True):
                reason = "eos" if ids[-1] in eos else "length"
                row = {"prompt": self.decode(prompt), "prompt_ids": prompt, "ids": ids, "text": self.decode(ids)}
                rows.append(row | {"finish_reason": reason})
            config = {"device": self.args.device, "attn": self.args.attn}
            config |= asdict(model.config) | asdict(model.neuron_config)
            print(json.dumps({"completions": rows, "timings": timings, "config": config}, indent=2))
            return
        texts = []
        for prompt, ids in zip(self.args.prompts, completions, strict=True):
            texts.append(self.decode(prompt + ids))
        print("\n\n".join(texts)[len(self.streamed) :])
        figures = (f"{name} {value:.4g}" for name, value in timings.items())
        print(f"on {self.args.device}:", *figures, file=sys.stderr)


def notices(args: argparse.Namespace) -> list[str]:
    """What the user of this run may not expect, a line each."""
    lines = []
    slots = args.sequence_length or NeuronConfig.from_pretrained(args.ckpt).sequence_length
    positions = json.loads(Path(args.ckpt, "config.json").read_text()).get("max_position_embeddings", slots)
    if slots > positions:
        lines.append(f"the cache has {slots:,} slots, this model {positions:,} positions: text beyond them may be poor")
    longest = max(map(len, args.prompts))
    if longest > LONG_PROMPT and args.device == "cpu" and args.attn == "eager":
        slow = f"a prompt of {longest:,} tokens is slow with eager attention"
        lines.append(f"{slow}: --attn sdpa takes a fraction of the time")
    return lines


def peak_memory() -> int:
    """The largest memory of this process so far, in bytes."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024  # macOS counts bytes, Linux KiB

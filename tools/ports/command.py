"""What ports of Llama compute, in a file that an audit reads: `python -m tools.ports`.

    python -m tools.ports hf --hf ./Llama-3.2-1B --device cuda --out ./hf-on-cuda
    python -m tools.audit --hf ./Llama-3.2-1B --captured ./hf-on-cuda/capture.safetensors

The ports are HF's own file on a device (`hf.py`), and those of NxDI, Optimum Neuron and two of AWS's examples, each
from its own sources. OUT/capture.safetensors has the names and shapes of `tools.capture`. `common.py` has what a port
of your own needs to write such a file.
"""

from __future__ import annotations

import argparse
from importlib import import_module

from checkpoint.config import DTYPES, llama_config, read_config
from convert_weights import user_path
from llama_neuron import UsageError, integers, positive_int
from tools.audit.command import read_prompts
from tools.audit.oracle import stored_dtype

# a port's module in this folder, imported only if it is asked for, and the driver there
PORTS = {
    "hf": ("hf", "capture"),
    "nxdi": ("nxdi", "capture"),
    "optimum": ("optimum", "capture"),
    "example": ("meta", "capture_example"),
    "experimental": ("meta", "capture_experimental"),
}
HELP = {
    "hf": "HF's own file, on any device that torch knows",
    "nxdi": "NxD Inference",
    "optimum": "Optimum Neuron",
    "example": "the Llama of NxD's examples",
    "experimental": "the experimental Llama of NxD Inference",
}


def parse_args(words: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="What a port computes, for tools.audit.", usage=argparse.SUPPRESS)
    ports = parser.add_subparsers(dest="port", required=True, metavar="PORT")
    for port, meaning in HELP.items():
        own = ports.add_parser(port, help=meaning, description=meaning, usage=argparse.SUPPRESS)
        add = own.add_argument
        add("--hf", type=user_path, required=True, metavar="DIR", help="the HF checkpoint")
        add("--tp", type=positive_int, default=1, metavar="N", help="tensor-parallel ranks (%(default)s)")
        add("--device", default="cpu", metavar="D", help="default: %(default)s")
        add("--dtype", choices=DTYPES, help="default: the checkpoint's")
        add("--prompt", dest="prompts", action="append", metavar="TEXT", help="repeat for a batch; default: random ids")
        add("--prompt-ids", dest="prompts", action="append", type=integers, metavar="1,2,3", help="instead of text")
        add("--max-new-tokens", type=positive_int, default=8, metavar="M", help="default: %(default)s")
        add("--out", type=user_path, required=True, metavar="DIR", help="folder for capture.safetensors")
        if port == "hf":
            add("--attn", default="eager", metavar="NAME", help="HF's attn_implementation (%(default)s)")
            add("--compile", dest="compiled", action="store_true", help="torch.compile, with HF's static cache")
        own.set_defaults(tokens=64)  # of a random prompt, as for tools.audit
    return parser.parse_args(words)


def run(args: argparse.Namespace) -> None:
    """Captures what `args` ask for. Raises UsageError if --out, the checkpoint or the prompts are wrong, or if the port
    cannot run as asked."""
    if args.out.exists() and not args.out.is_dir():
        raise UsageError(f"--out {args.out} is not a folder: name another one")
    config = llama_config(read_config(args.hf))
    prompts = read_prompts(args, config.vocab_size)
    dtype = args.dtype or str(stored_dtype(args.hf)).removeprefix("torch.")
    settings = {"prompts": prompts, "new_tokens": args.max_new_tokens, "dtype": dtype}
    settings |= {"tp": args.tp, "device": args.device}
    if args.port == "hf":
        settings |= {"attn": args.attn, "compiled": args.compiled}
    module, function = PORTS[args.port]
    capture = getattr(import_module(f"tools.ports.{module}"), function)
    capture(args.hf, args.out, **settings)


def main() -> None:
    run(parse_args())

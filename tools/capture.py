"""What a model computes on its way to the logits, in one file that an audit reads: `python -m tools.capture`.

    python -m tools.capture --ckpt ./weights --prompt "The capital of France is" --out capture.safetensors

For B prompts, the longest of P tokens, and M new tokens each, the file holds, at the P+M-1 positions that were fed:

    ids                         int64 [B,P+M]: prompts and new tokens; an EOS token does not end a text
    logits                      float32 [B,P+M-1,V]
    greedy                      int32 [B,P+M-1]: the token that the model's own greedy choice takes there
    hidden_states.0 to .L       [B,P+M-1,E], as all below in the model's dtype: the embedding, and each layer's output
    final_norm                  [B,P+M-1,E]
    layers.N.q, layers.N.heads  [B,P+M-1,H,D]: q after the rotary embedding; attention's output before o_proj
    layers.N.k, layers.N.v      [B,P+M-1,K,D]: k after the rotary embedding
    layers.N.attention, .mlp    [B,P+M-1,E]: a block's output before it is added

Heads are HF's, in HF's order: ranks are put together, copies and heads of zeros are gone. Shorter rows end in zeros.
The metadata are versions, dtype, tp, device, and prompt_tokens, a JSON list; and differing, a JSON list of lines, if
ranks hold different copies of a head.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import replace
from importlib import metadata
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from checkpoint.output import replacing, write_tensors
from convert_weights import user_path
from launch.command import run_command
from llama_neuron import (
    Backend,
    LlamaConfig,
    LlamaForCausalLM,
    NeuronConfig,
    UsageError,
    generate,
    integers,
    load_model,
    load_nxd,
    positive_int,
    shard_heads,
    start,
)

SHARDED = ("q", "heads", "k", "v")  # a rank has some of the heads
OF_LAYER = (*SHARDED, "attention", "mlp")
PACKAGES = ("torch", "torch-xla", "torch-neuronx", "neuronx-distributed", "neuronx-cc")  # that decide what is computed


class CaptureModel(LlamaForCausalLM):
    """`LlamaForCausalLM` that returns what it computes on the way. No forward changes: the cache is given k and v, the
    attention q, and hooks see what modules return."""

    def __init__(self, config: LlamaConfig, neuron: NeuronConfig, backend: Backend) -> None:
        seen: dict[str, list[Tensor]] = {kind: [] for kind in ("final_norm", "hidden_states", *OF_LAYER)}

        def attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor, scaling: float) -> Tensor:
            y = backend.attention(q, k, v, mask, scaling)
            seen["q"].append(q)
            seen["heads"].append(y)
            return y

        class Cache(backend.KVCache):
            def update(self, k: Tensor, v: Tensor, position_ids: Tensor, kv_length: int) -> tuple[Tensor, Tensor]:
                seen["k"].append(k)
                seen["v"].append(v)
                return super().update(k, v, position_ids, kv_length)

        def record(module: nn.Module, kind: str) -> None:
            module.register_forward_hook(lambda module, args, output: seen[kind].append(output))

        super().__init__(config, neuron, replace(backend, KVCache=Cache, attention=attention))
        self.seen = seen
        record(self.model.norm, "final_norm")
        record(self.model.embed_tokens, "hidden_states")
        for layer in self.model.layers:
            record(layer, "hidden_states")
            record(layer.self_attn, "attention")
            record(layer.mlp, "mlp")

    def forward(
        self, input_ids: Tensor, position_ids: Tensor, last: Tensor | None = None, kv_length: int | None = None
    ) -> list[Tensor]:
        """What `output_names` lists, on every rank; q, heads, k and v as [B,T,nD], the heads of all ranks side by side.
        `last` is ignored: NxD's graphs are called with it."""
        outputs = [super().forward(input_ids, position_ids, kv_length=kv_length)]
        normed = self.seen["final_norm"][0]  # B T E
        outputs.append(self.greedy(normed.flatten(0, 1)).view(input_ids.shape))
        for kind, tensors in self.seen.items():
            for x in tensors:
                if kind in SHARDED:  # B n T D
                    x = self.gather(x.transpose(1, 2).flatten(2))
                outputs.append(x)
            tensors.clear()
        return outputs


def output_names(layers: int) -> list[str]:
    """The file's names of what a CaptureModel returns."""
    names = ["logits", "greedy", "final_norm"]
    names += [f"hidden_states.{number}" for number in range(layers + 1)]
    for kind in OF_LAYER:
        names += [f"layers.{layer}.{kind}" for layer in range(layers)]
    return names


class Recorder(nn.Module):
    """What `generate` calls in place of a model: keeps what a CaptureModel returns, and chooses the token that `texts`
    [B][P+M] go on with or, if there are none, the greedy one."""

    def __init__(self, model: nn.Module, texts: list[list[int]]) -> None:
        super().__init__()
        self.model = model
        self.texts = texts
        self.calls: list[list[Tensor]] = []
        self.config = model.config
        self.neuron_config = model.neuron_config
        self.static_shapes = model.static_shapes
        self.device = model.device

    def forward(self, input_ids: Tensor, position_ids: Tensor, last: Tensor, **kv_length: int) -> Tensor:
        outputs = [x.cpu() for x in self.model(input_ids, position_ids, last, **kv_length)]
        self.calls.append(outputs)
        choices = outputs[1][torch.arange(len(last)), last.cpu()].long()  # B
        for row, text in enumerate(self.texts):
            position = int(position_ids[row, last[row]]) + 1
            if position < len(text):  # else this is a chunk after the end of the row's prompt, and no choice
                choices[row] = text[position]
        return choices


def load(ckpt: str | Path, rank: int, device: str, batch_size: int) -> nn.Module:
    """A CaptureModel, or graphs of it, as `llama_neuron.py` runs them on this device."""
    if device == "nxd":
        return load_nxd(ckpt, batch_size=batch_size, model_class=CaptureModel)
    return load_model(ckpt, rank, batch_size=batch_size, device=device, model_class=CaptureModel)


def versions(packages: Iterable[str]) -> str:
    """The packages that are installed, and their versions."""
    found = []
    for name in packages:
        with suppress(metadata.PackageNotFoundError):
            found.append(f"{name} {metadata.version(name)}")
    return ", ".join(found)


def are_copies(x: Tensor, y: Tensor) -> bool:
    """Whether two ranks' tensors of one head are equal but for rounding: ranks may add a product in another order."""
    if torch.allclose(x, y, 0, 0, equal_nan=True):
        return True
    return x.is_floating_point() and bool((x - y).norm() <= 4 * torch.finfo(x.dtype).eps * y.norm())


def join_heads(captured: dict[str, Tensor], config: LlamaConfig, tp: int) -> list[str]:
    """Heads of all ranks [B,P,nD] become HF's [B,P,H,D] or [B,P,K,D]. Says which differ from their copies, a line for
    each head and rank."""
    ranks = shard_heads(config.num_attention_heads, config.num_key_value_heads, tp)
    query = [head for heads, _ in ranks for head in heads]
    key = [head for _, heads in ranks for head in heads]
    sharded = {"q": query, "heads": query, "k": key, "v": key}
    differing = []
    for name, x in captured.items():
        kind = name.rpartition(".")[2]
        if kind not in sharded:
            continue
        numbers = sharded[kind]  # HF's numbers of the n heads; None is a head of zeros
        heads_per_rank = len(numbers) // tp
        x = x.unflatten(-1, (len(numbers), -1))  # B P n D
        heads = x[:, :, [numbers.index(head) for head in sorted({*numbers} - {None})]]
        captured[name] = heads
        for place, head in enumerate(numbers):
            if head is not None and not are_copies(x[:, :, place], heads[:, :, head]):
                rank = place // heads_per_rank
                first = numbers.index(head) // heads_per_rank
                differing.append(f"{name}: the copies of head {head} differ, rank {rank} from rank {first}")
    return differing


def capture(
    ckpt: str | Path, prompts: list[list[int]], new_tokens: int, *, rank=0, device="cpu", forced=None, differing=None
) -> dict[str, Tensor]:
    """The tensors of the file, on the CPU. Every rank calls this and gets the same; device "nxd" is one process.

    `forced` [B][new_tokens]: ids that are fed, and stand in `ids`, in place of the greedy choices. `differing`: a list
    that gets the lines of `join_heads`. Raises UsageError as `load_model` and `generate` do, and if the new tokens do
    not fit.
    """
    neuron, length = NeuronConfig.from_pretrained(ckpt), max(map(len, prompts)) + new_tokens
    if length > neuron.sequence_length:
        room = f"{ckpt} has room for {neuron.sequence_length} tokens"
        raise UsageError(f"--max-new-tokens {new_tokens}: {room}, convert it with --sequence-length {length}")
    model = load(ckpt, rank, device, max(neuron.batch_size, len(prompts)))
    texts = []
    if forced is not None:
        texts = [prompt + new for prompt, new in zip(prompts, forced, strict=True)]
    recorder = Recorder(model, texts)
    completions = generate(recorder, prompts, new_tokens, [])

    texts = [torch.tensor(prompt + new) for prompt, new in zip(prompts, completions, strict=True)]
    captured = {"ids": pad_sequence(texts, batch_first=True)}
    names = output_names(model.config.num_hidden_layers)
    for name, outputs in zip(names, zip(*recorder.calls, strict=True), strict=True):
        x = torch.cat(outputs, dim=1)  # prompts, padded to one length, then new tokens
        padded = x.shape[1] - (new_tokens - 1)
        rows = [torch.cat((x[row, : len(prompt)], x[row, padded:])) for row, prompt in enumerate(prompts)]
        captured[name] = pad_sequence(rows, batch_first=True)
    found = join_heads(captured, model.config, neuron.tp_degree)
    if differing is not None:
        differing += found
    return captured


def save(args: argparse.Namespace, rank: int) -> None:
    """The work of one rank."""
    forced = args.forced_ids
    if forced is not None and [len(ids) for ids in forced] != [args.max_new_tokens] * len(args.prompts):
        raise UsageError(f"--forced-ids: give --max-new-tokens {args.max_new_tokens} ids for each prompt")
    differing: list[str] = []
    tensors = capture(
        args.ckpt,
        args.prompts,
        args.max_new_tokens,
        rank=rank,
        device=args.device,
        forced=forced,
        differing=differing,
    )
    if rank == 0:
        if differing:
            print(f"capture.py: {differing[0]} (first of {len(differing)})", file=sys.stderr)
        neuron = NeuronConfig.from_pretrained(args.ckpt)
        facts = {"versions": versions(PACKAGES), "dtype": neuron.torch_dtype, "tp": str(neuron.tp_degree)}
        facts |= {"device": args.device, "prompt_tokens": json.dumps([len(prompt) for prompt in args.prompts])}
        if differing:
            facts["differing"] = json.dumps(differing)
        with replacing(args.out) as file:
            write_tensors(file, tensors.items(), len(tensors), facts)


def main() -> None:
    parser = argparse.ArgumentParser(description="Writes what a model computes to a file.", usage=argparse.SUPPRESS)
    add = parser.add_argument
    add("--ckpt", required=True, type=os.path.expanduser, metavar="DIR", help="what convert_weights.py wrote")
    add("--tp", type=positive_int, metavar="N", help="tensor-parallel ranks, as converted")
    add("--device", default="auto", help="as for llama_neuron.py; default: what is installed")
    add("--prompt", dest="prompts", action="append", metavar="TEXT", help="repeat for a batch; default: stdin")
    add("--prompt-ids", dest="prompts", action="append", type=integers, metavar="1,2,3", help="instead of text")
    add("--max-new-tokens", type=positive_int, default=8, metavar="M", help="default: %(default)s")
    forced = "M ids that are fed in place of the greedy choices, for each prompt"
    add("--forced-ids", action="append", type=integers, metavar="1,2,3", help=forced)
    add("--out", type=user_path, required=True, metavar="FILE", help="safetensors file to write")
    parser.set_defaults(batch_size=None, sequence_length=None, compile=False, timeout=60)
    args = parser.parse_args()
    if not args.out.parent.is_dir() or args.out.is_symlink() or (args.out.exists() and not args.out.is_file()):
        raise UsageError(f"--out {args.out} cannot be written: name a file in a directory that exists")
    start(args, save)


if __name__ == "__main__":
    run_command(main)

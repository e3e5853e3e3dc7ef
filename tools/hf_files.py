"""The files of a Hugging Face checkpoint, opened for `convert_weights.py`: JSON, tensors, tokenizer; and what only HF's
own libraries know: rare rope types, and which settings of `generate` change a greedy search."""

from __future__ import annotations

import json
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor

from llama_neuron import UsageError

# keys of generation_config.json that change a greedy search in HF, with the values that change nothing
NEUTRAL = {"repetition_penalty": 1.0, "encoder_repetition_penalty": 1.0, "guidance_scale": 1.0, "num_beams": 1}
NEUTRAL |= {"min_length": 0, "min_new_tokens": 0, "no_repeat_ngram_size": 0, "encoder_no_repeat_ngram_size": 0}
NEUTRAL |= dict.fromkeys(("suppress_tokens", "begin_suppress_tokens", "bad_words_ids", "sequence_bias"))
NEUTRAL |= dict.fromkeys(("forced_bos_token_id", "forced_eos_token_id", "exponential_decay_length_penalty"))
NEUTRAL |= dict.fromkeys(("stop_strings", "watermarking_config"))


def require(condition: object, message: str) -> None:
    if not condition:
        raise UsageError(message)


def say(message: str) -> None:
    """Tells the user what is done in another way than the checkpoint asks for."""
    print(f"convert_weights.py: {message}", file=sys.stderr)


def read_json(path: Path) -> dict:
    """The object in a JSON file. Raises UsageError if there is none."""
    try:
        value = json.loads(path.read_text())
    except FileNotFoundError:
        raise UsageError(f"{path} not found: name a directory that holds a Llama checkpoint") from None
    except (OSError, ValueError, RecursionError) as error:
        raise UsageError(f"{path} cannot be read as JSON: {error}") from None
    require(isinstance(value, dict), f"{path} holds no JSON object")
    return value


class Checkpoint:
    """The tensors of an HF checkpoint, read slice by slice, under HF's names. Made by `open_checkpoint`."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.slices: dict = {}  # name -> safetensors' PySafeSlice, or a Tensor of a .bin file

    def add(self, file: Path) -> None:
        """Adds a file's tensors; a name without `model.` gets it. Raises UsageError if the file is no checkpoint."""
        try:
            if file.suffix == ".bin":  # files from before torch 1.6 are no zip files, and cannot be memory-mapped
                tensors = torch.load(file, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(file))
                tensors = {name: tensor.detach() for name, tensor in tensors.items() if isinstance(tensor, Tensor)}
            else:
                handle = safe_open(file, "pt")
                tensors = {name: handle.get_slice(name) for name in handle.keys()}
        except FileNotFoundError:
            raise UsageError(f"{file} not found: the checkpoint is incomplete, download it again") from None
        except Exception as error:  # whatever the two libraries raise for a damaged file
            reason = str(error).partition("\n")[0]
            raise UsageError(f"{file} cannot be read, download it or save it again: {reason}") from None
        for name, tensor in tensors.items():
            name = name.removeprefix("model.")
            name = name if name.startswith("lm_head.") else f"model.{name}"
            require(name not in self.slices, f"{file}: {name} is there twice, save the checkpoint again")
            self.slices[name] = tensor

    def shape(self, name: str) -> tuple[int, ...]:
        tensor = self.slices[name]
        return tuple(tensor.shape if isinstance(tensor, Tensor) else tensor.get_shape())

    def get(self, name: str, dim: int = 0, start: int = 0, stop: int | None = None) -> Tensor:
        """[start:stop] of a tensor along `dim` (0 or 1)."""
        index = slice(start, stop)
        return self.slices[name][index] if dim == 0 else self.slices[name][:, index]


def ignored_settings(settings: dict) -> list[str]:
    """The keys in `settings` of `generate` that HF obeys in greedy search, and `llama_neuron.generate` does not."""
    return [key for key, neutral in NEUTRAL.items() if (settings.get(key) or neutral) != neutral]


def rope_tensors(rope: dict, head_dim: int, positions: int) -> tuple[Tensor, float]:
    """inv_freq [D/2] and attention scaling of yarn, longrope and dynamic, by transformers' own `ROPE_INIT_FUNCTIONS`.
    Raises UsageError without transformers."""
    kind, theta = rope["rope_type"], rope["rope_theta"]
    try:
        import transformers
        from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS
    except ImportError:
        raise UsageError(f"rope_type {kind!r} is computed by transformers: pip install transformers") from None
    if kind == "longrope":  # else transformers 4 takes its ratio to the original length for the factor
        positions = rope["original_max_position_embeddings"]
    config = transformers.LlamaConfig(
        hidden_size=head_dim,
        num_attention_heads=1,  # transformers 5 wants the heads to divide hidden_size
        head_dim=head_dim,
        max_position_embeddings=positions,
        rope_theta=theta,
        rope_scaling={key: value for key, value in rope.items() if key != "rope_theta"},
    )
    return ROPE_INIT_FUNCTIONS[kind](config, torch.device("cpu"))


def read_tokenizer(hf: Path) -> Callable[[Path], object]:
    """A function that writes tokenizer.json into a directory, so that a prompt's ids are HF's: as transformers'
    AutoTokenizer saves it, which knows of added and special tokens that stand in other files; without transformers, as
    it is. Truncation and padding are left out. Raises UsageError for a broken tokenizer.json."""
    path = hf / "tokenizer.json"
    try:
        from transformers import AutoTokenizer

        tokenizer = AutoTokenizer.from_pretrained(hf, trust_remote_code=False, local_files_only=True)
        tokenizer.backend_tokenizer.no_truncation()
        tokenizer.backend_tokenizer.no_padding()
        return lambda out: tokenizer.save_pretrained(out, legacy_format=False)
    except Exception as error:  # transformers raises nearly all kinds
        reason = str(error).strip().partition("\n")[0]
    if not path.exists():
        say(f"{hf} has no tokenizer that can be read ({reason}): give prompts by --prompt-ids")
        return lambda out: None
    from tokenizers import Tokenizer

    try:
        plain = Tokenizer.from_file(str(path))
    except Exception as error:  # the class that it raises
        raise UsageError(f"{path} cannot be read, save it again with transformers: {error}") from None
    say(f"{path} is taken as it is, transformers cannot read it: {reason}")
    plain.no_truncation()
    plain.no_padding()
    return lambda out: plain.save(str(out / "tokenizer.json"))

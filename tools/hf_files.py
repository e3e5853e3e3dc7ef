"""The files of a Hugging Face checkpoint, opened for `convert_weights.py`: JSON, tensors, tokenizer; and what only HF's
own libraries know: rare rope types, and which settings of `generate` change a greedy search."""

from __future__ import annotations

import json
import reprlib
import stat
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor

from llama_neuron import LlamaConfig, RotaryEmbedding, UsageError

TEXTS, LARGEST = (".json", ".jinja", ".model", ".txt"), 2**26  # the largest tokenizer.json so far has 33 MB
DEEPEST = 32  # lists and objects inside each other

# safetensors' names of the dtypes that a weight may have
DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}

# keys of generation_config.json that change a greedy search in HF, with the values that change nothing
NEUTRAL = {"repetition_penalty": 1.0, "encoder_repetition_penalty": 1.0, "guidance_scale": 1.0, "num_beams": 1}
NEUTRAL |= {"min_length": 0, "min_new_tokens": 0, "no_repeat_ngram_size": 0, "encoder_no_repeat_ngram_size": 0}
NEUTRAL |= dict.fromkeys(("suppress_tokens", "begin_suppress_tokens", "bad_words_ids", "sequence_bias"))
NEUTRAL |= dict.fromkeys(("forced_bos_token_id", "forced_eos_token_id", "exponential_decay_length_penalty"))
NEUTRAL |= dict.fromkeys(("stop_strings", "watermarking_config"))

SHORTENED = reprlib.Repr()  # what a file says may be long, and deep
SHORTENED.maxstring = SHORTENED.maxother = 100
show = SHORTENED.repr


def require(condition: object, message: str) -> None:
    if not condition:
        raise UsageError(message)


def say(message: str) -> None:
    """Tells the user what is done in another way than the checkpoint asks for."""
    message = "".join(c if c.isprintable() else "?" for c in message)  # files may say anything
    print(f"convert_weights.py: {message}", file=sys.stderr)


# ---- JSON


def check_file(path: Path) -> None:
    """Raises UsageError for what might never end, or fill the memory: a FIFO, a device, a text beyond LARGEST."""
    try:
        found = path.stat()
    except FileNotFoundError:  # or a link to nothing
        return
    except OSError as error:
        raise UsageError(f"{path} cannot be read: {error.strerror}") from None
    require(stat.S_ISREG(found.st_mode) or stat.S_ISDIR(found.st_mode), f"{path} is no regular file: remove it")
    fits = path.suffix not in TEXTS or found.st_size <= LARGEST
    require(fits, f"{path} has {found.st_size:,} bytes, the most that is read is {LARGEST:,}: it is no such file")


def check_files(directory: Path) -> None:
    """`check_file` for all of them, since the tokenizers of transformers open many."""
    for path in [*directory.glob("*"), *directory.glob("additional_chat_templates/*")]:
        check_file(path)


def read_json(path: Path) -> dict:
    """The object in a JSON file. Raises UsageError if there is none, or if it is nested deeper than DEEPEST."""
    check_file(path)
    try:
        value = json.loads(path.read_bytes())
    except FileNotFoundError:
        raise UsageError(f"{path} not found: name a directory that holds a Llama checkpoint") from None
    except (OSError, ValueError, RecursionError) as error:
        raise UsageError(f"{path} cannot be read as JSON: {error}") from None
    require(isinstance(value, dict), f"{path} holds no JSON object")
    level = [value]
    for _ in range(DEEPEST):
        lists = [part for part in level if isinstance(part, list)]
        lists += [part.values() for part in level if isinstance(part, dict)]
        level = [part for parts in lists for part in parts]
    require(not level, f"{path} is nested too deeply: correct it")
    return value


# ---- tensors


class Checkpoint:
    """The tensors of an HF checkpoint, read slice by slice, under HF's names. Made by `open_files`."""

    def __init__(self, directory: Path, allow_non_finite: bool = False) -> None:
        self.directory, self.allow_non_finite = directory, allow_non_finite
        self.slices: dict = {}  # name -> safetensors' PySafeSlice, or a Tensor of a .bin file
        self.dtype: torch.dtype | None = None  # what `get` converts to; None: what is stored
        self.non_finite: set[str] = set()  # names that the user was told of

    def add(self, file: Path) -> None:
        """Adds a file's tensors; a name without `model.` gets it. Raises UsageError if the file is no checkpoint."""
        check_file(file)
        try:
            tensors = read_bin(file) if file.suffix == ".bin" else read_safetensors(file)
        except FileNotFoundError:
            raise UsageError(f"{file} not found: the checkpoint is incomplete, download it again") from None
        except Exception as error:  # whatever the two libraries raise for a damaged file
            reason = str(error).partition("\n")[0]
            if "weights_only" in str(error):  # torch's advice is to run it
                reason = "it holds more than tensors, and code in a checkpoint is never run"
            raise UsageError(f"{file} cannot be read, download it or save it again: {reason}") from None
        require(tensors, f"{file} holds no tensors by name: download it or save it again")
        for name, tensor in tensors.items():
            name = name.removeprefix("model.")
            name = name if name.startswith("lm_head.") else f"model.{name}"
            require(name not in self.slices, f"{file}: {show(name)} is there twice, save the checkpoint again")
            self.slices[name] = tensor

    def shape(self, name: str) -> tuple[int, ...]:
        tensor = self.slices[name]
        return tuple(tensor.shape if isinstance(tensor, Tensor) else tensor.get_shape())

    def stored_dtype(self, name: str) -> torch.dtype | str:
        """A safetensors dtype that no weight may have is given by its name there."""
        tensor = self.slices[name]
        return tensor.dtype if isinstance(tensor, Tensor) else DTYPES.get(tensor.get_dtype(), tensor.get_dtype())

    def get(self, name: str, dim: int = 0, start: int = 0, stop: int | None = None) -> Tensor:
        """[start:stop] of a tensor along `dim` (0 or 1), in `self.dtype`; a view of the file, if that is its dtype."""
        index = slice(start, stop)
        tensor = self.slices[name][index] if dim == 0 else self.slices[name][:, index]
        return tensor.to(self.dtype or tensor.dtype)

    def checked(self, tensor: Tensor, *names: str) -> Tensor:
        """The same, contiguous. Raises UsageError if a number in it is NaN or infinite, unless these are allowed; names
        the tensor that it comes from, one of `names`."""
        tensor = tensor.contiguous()
        # a sum is finite only if all its terms are, and takes a hundredth of the time
        if not tensor.sum().isfinite() and not tensor.isfinite().all():
            for name in names:
                self.report_non_finite(name)
        return tensor

    def equal(self, one: str, other: str) -> bool:
        """Whether two tensors hold the same numbers. Few of their rows are read at a time."""
        if self.shape(one) != self.shape(other):
            return False
        for row in range(0, self.shape(one)[0], 4096):
            rows = [self.get(name, 0, row, row + 4096).float() for name in (one, other)]
            if not torch.allclose(*rows, rtol=0, atol=0, equal_nan=True):
                return False
        return True

    def report_non_finite(self, name: str) -> None:
        """Says that a tensor holds numbers that are not finite, or raises UsageError."""
        stored = self.slices[name][:]
        if stored.to(self.dtype).isfinite().all():
            return
        found, remedy = "NaN or infinite numbers", "download it again"
        if stored.isfinite().all():
            found, remedy = f"numbers beyond {str(self.dtype).removeprefix('torch.')}", "--dtype float32 keeps them"
        text = f"{self.directory}: {name} holds {found}"
        require(self.allow_non_finite, f"{text}: {remedy}, --allow-non-finite converts it as it is")
        if name not in self.non_finite:
            say(f"{text}, converted as it is")
            self.non_finite.add(name)


def open_files(directory: Path, allow_non_finite: bool) -> Checkpoint:
    """Opens model.safetensors, its index, pytorch_model.bin, or its index. Raises UsageError if there is none of these,
    or if files are missing or damaged."""
    checkpoint = Checkpoint(directory, allow_non_finite)
    for name in ("model.safetensors", "pytorch_model.bin"):
        index, files = directory / f"{name}.index.json", [name]
        if not (directory / name).exists():
            weight_map = read_json(index).get("weight_map") if index.exists() else {}
            files = list(weight_map.values()) if isinstance(weight_map, dict) else [weight_map]
        for file in files:  # a plain name: no folder, no way up; a symbolic link is the user's own
            plain = isinstance(file, str) and Path(file).name == file and file not in ("", "..") and file.isprintable()
            require(plain, f"{index}: weight_map must hold names of files beside it, not {show(file)}")
        for file in sorted(set(files)):
            checkpoint.add(directory / file)
        if checkpoint.slices:
            return checkpoint
    raise UsageError(f"{directory} has no model.safetensors, pytorch_model.bin or index of them: download it again")


def read_safetensors(file: Path) -> dict:
    handle = safe_open(file, "pt")
    return {name: handle.get_slice(name) for name in handle.keys()}


def read_bin(file: Path) -> dict[str, Tensor]:
    """The tensors of a file of `torch.save`; what else it holds is left out. Code in it is refused, not run."""
    # files from before torch 1.6 are no zip files, and cannot be memory-mapped
    loaded = torch.load(file, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(file))
    tensors = {}
    for name, tensor in loaded.items():
        if isinstance(name, str) and isinstance(tensor, Tensor):
            plain = tensor.layout == torch.strided and tensor.device.type == "cpu" and not tensor.is_nested
            require(plain, f"{show(name)} is no plain tensor")
            # a view that repeats a few numbers may say that it has any size
            require(tensor.nbytes <= tensor.untyped_storage().nbytes(), f"{show(name)} is larger than what is stored")
            tensors[name] = tensor.detach()
    return tensors


# ---- what only HF's libraries know


def ignored_settings(settings: dict) -> list[str]:
    """The keys in `settings` of `generate` that HF obeys in greedy search, and `llama_neuron.generate` does not."""
    return [key for key, neutral in NEUTRAL.items() if (settings.get(key) or neutral) != neutral]


def read_eos(hf: Path, raw: dict) -> list[int]:
    """The EOS ids at which HF's `generate` stops: those of generation_config.json, also if it names none, since the
    greedy ids have to be HF's; without that file, or if it is broken, those of config.json."""
    path, settings = hf / "config.json", raw
    check_file(hf / "generation_config.json")
    if (hf / "generation_config.json").exists():
        try:
            settings = read_json(hf / "generation_config.json")
            path = hf / "generation_config.json"
        except UsageError as error:
            say(f"{error}: config.json counts, as in HF")
    ignored = ignored_settings(settings)
    if ignored:
        say(f"{path} asks for {', '.join(ignored)}: ignored here, HF obeys them in greedy search too")
    eos = settings.get("eos_token_id")
    if not isinstance(eos, list):
        eos = [] if eos is None else [eos]
    ids = all(type(token) is int for token in eos)
    require(ids, f"{path}: eos_token_id {show(eos)} must be token ids")
    return eos


def rotary_tensors(hf: Path, config: dict, llama: LlamaConfig) -> dict[str, Tensor]:
    """What shards of yarn, longrope and dynamic hold: inv_freq [D/2] and attention scaling [1], by transformers' own
    `ROPE_INIT_FUNCTIONS`. Puts the attention_factor of the first two into `config`, HF's, so that HF computes the same.
    Raises UsageError without transformers, or if frequencies of any type are not finite."""
    rope, positions = config["rope_parameters"], config["max_position_embeddings"]
    kind = rope["rope_type"]
    mistake = f"{hf}/config.json: the parameters of rope_type {kind!r} give no finite frequencies, correct them"
    if kind in ("default", "linear", "llama3"):
        require(RotaryEmbedding(llama).inv_freq.isfinite().all(), mistake)
        return {}
    try:
        import transformers
        from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS
    except ImportError:
        raise UsageError(f"rope_type {kind!r} is computed by transformers: pip install transformers") from None
    if kind == "longrope":  # else transformers 4 takes its ratio to the original length for the factor
        positions = rope["original_max_position_embeddings"]
    try:
        settings = transformers.LlamaConfig(
            hidden_size=llama.head_dim,
            num_attention_heads=1,  # transformers 5 wants the heads to divide hidden_size
            head_dim=llama.head_dim,
            max_position_embeddings=positions,
            rope_theta=rope["rope_theta"],
            rope_scaling={key: value for key, value in rope.items() if key != "rope_theta"},
        )
        inv_freq, scaling = ROPE_INIT_FUNCTIONS[kind](settings, torch.device("cpu"))
    except Exception as error:  # a division by zero, a logarithm of 0
        raise UsageError(f"{mistake}: {error}") from None
    tensors = {
        "model.rotary_emb.inv_freq": inv_freq.float(),
        "model.rotary_emb.attention_scaling": torch.tensor([scaling]),
    }
    require(all(tensor.isfinite().all() for tensor in tensors.values()), mistake)
    if kind != "dynamic":
        rope["attention_factor"] = config["rope_scaling"]["attention_factor"] = float(scaling)
    return {"model.rotary_emb.inv_freq": inv_freq, "model.rotary_emb.attention_scaling": torch.tensor([scaling])}


def read_tokenizer(hf: Path) -> Callable[[Path], object]:
    """A function that writes tokenizer.json into a directory, so that a prompt's ids are HF's: as transformers'
    AutoTokenizer saves it, which knows of added and special tokens that stand in other files; without transformers, as
    it is. Truncation and padding are left out. Raises UsageError for a broken tokenizer.json."""
    check_files(hf)
    path = hf / "tokenizer.json"
    try:
        from transformers import AutoTokenizer

        tokenizer = AutoTokenizer.from_pretrained(hf, trust_remote_code=False, local_files_only=True)
        tokenizer.backend_tokenizer.no_truncation()
        tokenizer.backend_tokenizer.no_padding()
        return lambda out: tokenizer.save_pretrained(out, legacy_format=False, save_jinja_files=False)
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

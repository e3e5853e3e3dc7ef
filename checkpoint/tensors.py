"""The weights of a Hugging Face checkpoint, read slice by slice and checked."""

from __future__ import annotations

import os
import zipfile
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor

from checkpoint.config import MERGE, STORED, expected_shapes
from checkpoint.files import check_file, read_json, reason, say, show
from checkpoint.names import WITHOUT_EFFECT, WRAPPERS, hf_name, keys_of, show_names, what_helps, wrappers_in
from llama_neuron import LlamaConfig, LlamaRotaryEmbedding, UsageError

# safetensors' names of the dtypes that a weight may have
STORED_DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


class Checkpoint:
    """The tensors of an HF checkpoint, read slice by slice, under HF's names. Made by `open_files`."""

    def __init__(self, directory: Path, allow_non_finite: bool = False) -> None:
        self.directory = directory
        self.allow_non_finite = allow_non_finite
        self.slices: dict = {}  # HF's name -> safetensors' PySafeSlice, or a Tensor of a .bin file
        self.given: dict[str, str] = {}  # HF's name -> the name in the file
        self.non_finite: set[str] = set()  # names that the user was told of

    def add(self, file: Path) -> None:
        """Adds a file's tensors. Raises UsageError if the file is no checkpoint."""
        check_file(file, is_weights=True)
        if not file.exists():
            raise UsageError(f"{file} not found: the checkpoint is incomplete, download it again")
        try:
            tensors = read_bin(file) if file.suffix == ".bin" else read_safetensors(file)
        except OSError as error:  # the file is there, and was opened before
            raise OSError(f"{file} cannot be read: {reason(error)}") from None
        except Exception as error:  # whatever the two libraries raise for a damaged file
            why = reason(error)
            if "Unsupported operand" in str(error):
                why = "it was not written by torch.save"
            elif "weights_only" in str(error):  # torch's advice is to run it
                why = "it holds more than tensors, and code in a checkpoint is never run"
            raise UsageError(f"{file} cannot be read, download it or save it again: {why}") from None
        if not tensors:
            raise UsageError(f"{file} holds no tensors by name: download it or save it again")
        for given, tensor in tensors.items():
            name = hf_name(given)
            if name in self.slices:
                twice = f"{show(self.given[name])} and {show(given)}"
                raise UsageError(f"{file}: {twice} are one tensor to HF, {show(name)}: save the checkpoint again")
            self.slices[name] = tensor
            self.given[name] = given

    def shape(self, name: str) -> tuple[int, ...]:
        tensor = self.slices[name]
        return tuple(tensor.shape if isinstance(tensor, Tensor) else tensor.get_shape())

    def stored_dtype(self, name: str) -> torch.dtype | str:
        """A safetensors dtype that no weight may have is given by its name there."""
        tensor = self.slices[name]
        return tensor.dtype if isinstance(tensor, Tensor) else STORED_DTYPES.get(tensor.get_dtype(), tensor.get_dtype())

    def get(
        self,
        name: str,
        dtype: torch.dtype | None = None,
        dim: int = 0,
        start: int = 0,
        stop: int | None = None,
    ) -> Tensor:
        """[start:stop] of a tensor along `dim` (0 or 1), in `dtype`; None: as stored, a view of the file."""
        index = slice(start, stop)
        tensor = self.slices[name][index] if dim == 0 else self.slices[name][:, index]
        return tensor.to(dtype or tensor.dtype)

    def checked(self, tensor: Tensor, *names: str) -> Tensor:
        """The same values, contiguous. Raises UsageError if one of them is NaN or infinite, unless these are allowed;
        names the tensor that it comes from, one of `names`."""
        tensor = tensor.contiguous()
        # a sum is finite only if all its terms are, and takes a hundredth of the time
        if not tensor.sum().isfinite() and not tensor.isfinite().all():
            for name in names:
                self.report_non_finite(name, tensor.dtype)
        return tensor

    def equal(self, one: str, other: str) -> bool:
        """Whether two tensors hold the same numbers. Few of their rows are read at a time."""
        if self.shape(one) != self.shape(other):
            return False
        for row in range(0, self.shape(one)[0], 4096):
            rows = [self.get(name, torch.float64, 0, row, row + 4096) for name in (one, other)]
            if not torch.allclose(*rows, rtol=0, atol=0, equal_nan=True):
                return False
        return True

    def report_non_finite(self, name: str, dtype: torch.dtype) -> None:
        """Says that a tensor holds values that are not finite in `dtype`, or raises UsageError."""
        stored = self.slices[name][:]
        if stored.to(dtype).isfinite().all():
            return
        found = "NaN or infinite numbers"
        remedy = "download it again"
        if stored.isfinite().all():
            found = f"numbers beyond {str(dtype).removeprefix('torch.')}"
            remedy = "--dtype float32 keeps them" if stored.float().isfinite().all() else "scale them"
        text = f"{self.directory}: {name} holds {found}"
        if not self.allow_non_finite:
            raise UsageError(f"{text}: {remedy}, --allow-non-finite converts it as it is")
        if name not in self.non_finite:
            say(f"{text}, converted as it is")
            self.non_finite.add(name)


def open_files(directory: Path, raw: dict, allow_non_finite: bool) -> Checkpoint:
    """Opens the weights that config.json names, else model.safetensors, its index, pytorch_model.bin, or its index.
    Raises UsageError if there is none of these, or if files are missing or damaged."""
    checkpoint = Checkpoint(directory, allow_non_finite)
    key = "transformers_weights"
    named = raw.get(key)
    if named is not None:
        check_name(named, f"{directory}/config.json: {key}", (".safetensors", ".safetensors.index.json"))
    for name in ("model.safetensors", "pytorch_model.bin") if named is None else (named,):
        index = directory / f"{name.removesuffix('.index.json')}.index.json"
        is_file = name != index.name and os.path.lexists(directory / name)
        for file in [name] if is_file else files_in(index):
            checkpoint.add(directory / file)
        if checkpoint.slices:
            wrappers = {wrapper for given in checkpoint.given.values() for wrapper in wrappers_in(given)}
            for wrapper in sorted(wrappers):
                say(f"{directory}: {wrapper!r}, of {WRAPPERS[wrapper]}, is taken off the names of tensors")
            return checkpoint
    if named is not None:
        raise UsageError(f"{directory} has no {named}, which config.json names: correct {key} there")
    found = instead_of_weights(directory)
    raise UsageError(f"{directory} has no model.safetensors, pytorch_model.bin or index of them{found}")


def files_in(index: Path) -> list[str]:
    """The names of the files in an index, in order; none if there is no index."""
    if not os.path.lexists(index):
        return []
    weight_map = read_json(index).get("weight_map")
    files = list(weight_map.values()) if isinstance(weight_map, dict) else [weight_map]
    for file in files:
        check_name(file, f"{index}: weight_map")
    return sorted(set(files))


def check_name(file: object, where: str, suffixes: tuple[str, ...] = ("",)) -> None:
    """Raises UsageError unless it is a plain name: no folder, no way up. A symbolic link is the user's own."""
    is_name = isinstance(file, str) and file.endswith(suffixes) and file.isprintable()
    if not is_name or Path(file).name != file or file in ("", ".."):
        raise UsageError(f"{where} must hold names of files beside it, not {show(file)}")


def instead_of_weights(directory: Path) -> str:
    """What lies in a directory without weights that can be read, and what helps."""
    suffixes = (".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".gguf", ".h5", ".msgpack", ".distcp")
    found = sorted(path.name for path in directory.iterdir() if path.suffix in suffixes)
    if not found:
        return ": download it again"
    if any(name.startswith("adapter_") for name in found):
        remedy = MERGE
    elif any("-of-" in name for name in found):
        remedy = "download the index too, which says what is in which file"
    else:
        remedy = "download it again, or save the model with save_pretrained of transformers"
    return f", but {show(found)}: {remedy}"


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
            if tensor.layout != torch.strided or tensor.device.type != "cpu" or tensor.is_nested:
                raise UsageError(f"{show(name)} is not a plain tensor")
            # a view that repeats a few values may say that it has any size
            if tensor.nbytes > tensor.untyped_storage().nbytes():
                raise UsageError(f"{show(name)} is larger than what is stored")
            tensors[name] = tensor.detach()
    return tensors


# ---- which tensors there are


def open_checkpoint(directory: str | Path, config: LlamaConfig, allow_non_finite: bool = False) -> Checkpoint:
    """Opens an HF checkpoint without reading weights. Raises UsageError, naming the file or tensors, if there is none
    or it does not match the config."""
    raw = read_json(Path(directory, "config.json"))
    checkpoint = open_files(Path(directory), raw, allow_non_finite)
    check_names(checkpoint, config, raw)
    check_tensors(checkpoint, config)
    return checkpoint


def check_names(checkpoint: Checkpoint, config: LlamaConfig, raw: dict) -> None:
    """Raises UsageError for missing and unknown tensors. Reports missing biases that it fills with zeros, as HF does,
    and leaves out tensors that have no effect, and says so."""
    source = checkpoint.directory
    slices = checkpoint.slices
    expected = expected_shapes(config)
    tied = ("lm_head.weight", "model.embed_tokens.weight")
    missing = [name for name in expected if name not in slices]
    if config.tie_word_embeddings and tied[0] in slices:
        missing = [name for name in missing if name != tied[1]]
    unknown = [name for name in slices if name not in expected and not (config.tie_word_embeddings and name in tied)]
    without_effect = [name for name in unknown if WITHOUT_EFFECT.search(name)]
    filled = [name for name in missing if name.endswith("o_proj.bias")]
    if missing == filled and unknown == without_effect:
        if filled:
            say(f"{source}: o_proj.bias is missing; using zeros, as HF does")
        for name in filled:
            slices[name] = torch.zeros(expected[name])
        if without_effect:
            names = sorted(checkpoint.given[name] for name in without_effect)
            say(f"{source}: ignoring tensors that have no effect: {show(names)}")
        for name in without_effect:
            del slices[name]
        return
    given = list(checkpoint.given.values())
    unknown = sorted(checkpoint.given[name] for name in unknown if missing or name not in without_effect)
    remedy = what_helps(given, missing, unknown, config, raw)
    found = []
    if missing:
        found.append(f"missing tensors: {show_names(missing)}")
    if unknown:
        found.append(f"unexpected tensors: {show_names(unknown)}")
    raise UsageError(f"{source}: {'; '.join(found)}; {remedy}")


def check_tensors(checkpoint: Checkpoint, config: LlamaConfig) -> None:
    """Raises UsageError for tensors of another dtype or shape, and for a tied lm_head that is not the embedding."""
    source = checkpoint.directory
    slices = checkpoint.slices
    embedding = "model.embed_tokens.weight"
    head = "lm_head.weight"
    for name in slices:
        dtype = str(checkpoint.stored_dtype(name)).removeprefix("torch.")
        if dtype not in STORED:
            raise UsageError(f"{source}: {name} is of dtype {dtype}, save it again as one of {', '.join(STORED)}")
    if config.tie_word_embeddings and head in slices:
        # HF ties them whatever the file holds; if it holds two different ones, either it or config.json is wrong
        if embedding in slices and not checkpoint.equal(head, embedding):
            raise UsageError(f"{source}: {head} is not {embedding}: set tie_word_embeddings to false")
        slices[embedding] = slices.pop(head)
    for name, shape in expected_shapes(config).items():
        found = checkpoint.shape(name)
        if found != shape:
            asked = f"{list(shape)} ({keys_of(name, config)})"
            raise UsageError(f"{source}: {name} has shape {show(list(found))}, {source}/config.json asks for {asked}")


def rotary_tensors(hf: Path, config: dict, llama: LlamaConfig) -> tuple[dict[str, Tensor], float]:
    """What shards of yarn, longrope and dynamic hold: inv_freq [D/2] and attention scaling [1], float32, computed by
    transformers' own `ROPE_INIT_FUNCTIONS`; nothing for other rope types. Then the scaling in full precision. Raises
    UsageError without transformers, or if frequencies of any type are not finite."""
    rope = config["rope_parameters"]
    positions = config["max_position_embeddings"]
    kind = rope["rope_type"]
    mistake = f"{hf}/config.json: the parameters of rope_type {kind!r} give no finite frequencies, correct them"
    if kind in ("default", "linear", "llama3"):
        if not LlamaRotaryEmbedding(llama).inv_freq.isfinite().all():
            raise UsageError(mistake)
        return {}, 1.0
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
    if not all(tensor.isfinite().all() for tensor in tensors.values()):
        raise UsageError(mistake)
    return tensors, float(scaling)

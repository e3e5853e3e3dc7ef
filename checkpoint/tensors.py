"""The weights of a Hugging Face checkpoint, read slice by slice and checked."""

from __future__ import annotations

import zipfile
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor

from checkpoint.config import DTYPES, expected_shapes
from checkpoint.files import check_file, read_json, say, show
from llama_neuron import LlamaConfig, LlamaRotaryEmbedding, UsageError

# safetensors' names of the dtypes that a weight may have
STORED_DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


class Checkpoint:
    """The tensors of an HF checkpoint, read slice by slice, under HF's names. Made by `open_files`."""

    def __init__(self, directory: Path, allow_non_finite: bool = False) -> None:
        self.directory = directory
        self.allow_non_finite = allow_non_finite
        self.slices: dict = {}  # name -> safetensors' PySafeSlice, or a Tensor of a .bin file
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
        if not tensors:
            raise UsageError(f"{file} holds no tensors by name: download it or save it again")
        for name, tensor in tensors.items():
            name = name.removeprefix("model.")
            name = name if name.startswith("lm_head.") else f"model.{name}"
            if name in self.slices:
                raise UsageError(f"{file}: {show(name)} is there twice, save the checkpoint again")
            self.slices[name] = tensor

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
            rows = [self.get(name, torch.float32, 0, row, row + 4096) for name in (one, other)]
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
            remedy = "--dtype float32 keeps them"
        text = f"{self.directory}: {name} holds {found}"
        if not self.allow_non_finite:
            raise UsageError(f"{text}: {remedy}, --allow-non-finite converts it as it is")
        if name not in self.non_finite:
            say(f"{text}, converted as it is")
            self.non_finite.add(name)


def open_files(directory: Path, allow_non_finite: bool) -> Checkpoint:
    """Opens model.safetensors, its index, pytorch_model.bin, or its index. Raises UsageError if there is none of these,
    or if files are missing or damaged."""
    checkpoint = Checkpoint(directory, allow_non_finite)
    for name in ("model.safetensors", "pytorch_model.bin"):
        index = directory / f"{name}.index.json"
        files = [name]
        if not (directory / name).exists():
            weight_map = read_json(index).get("weight_map") if index.exists() else {}
            files = list(weight_map.values()) if isinstance(weight_map, dict) else [weight_map]
        for file in files:  # a plain name: no folder, no way up; a symbolic link is the user's own
            if not isinstance(file, str) or Path(file).name != file or file in ("", "..") or not file.isprintable():
                raise UsageError(f"{index}: weight_map must hold names of files beside it, not {show(file)}")
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
    checkpoint = open_files(Path(directory), allow_non_finite)
    check_tensors(checkpoint, config)
    return checkpoint


def check_tensors(checkpoint: Checkpoint, config: LlamaConfig) -> None:
    """Raises UsageError for missing, misshapen and unknown tensors. Reports missing biases that it fills with zeros, as
    HF does, and tensors that have no effect."""
    source = checkpoint.directory
    slices = checkpoint.slices
    expected = expected_shapes(config)
    embedding = "model.embed_tokens.weight"
    head = "lm_head.weight"
    for name in slices:
        dtype = str(checkpoint.stored_dtype(name)).removeprefix("torch.")
        if dtype not in DTYPES and (name == head or name in expected):
            raise UsageError(f"{source}: {name} is of dtype {dtype}, save it again as one of {', '.join(DTYPES)}")
    if config.tie_word_embeddings and head in slices:
        # HF ties them whatever the file holds; if it holds two different ones, either it or config.json is wrong
        if embedding in slices and not checkpoint.equal(head, embedding):
            raise UsageError(f"{source}: {head} is not {embedding}: set tie_word_embeddings to false")
        slices[embedding] = slices.pop(head)
    missing = [name for name in expected if name not in slices]
    if missing and all(name.endswith("o_proj.bias") for name in missing):
        say(f"{source}: o_proj.bias is missing; using zeros, as HF does")
        for name in missing:
            slices[name] = torch.zeros(expected[name])
        missing = []
    if missing:
        raise UsageError(f"{source}: missing tensors, download it again: {missing[:4]}")
    for name, shape in expected.items():
        found = checkpoint.shape(name)
        if found != shape:
            raise UsageError(f"{source}: {name} has shape {show(list(found))}, config.json asks for {list(shape)}")
    unknown = sorted(set(slices) - set(expected))
    leftovers = [name for name in unknown if ".rotary_emb." in name or name.endswith("original_inv_freq")]
    if leftovers:
        say(f"{source}: ignoring tensors that have no effect: {show(leftovers)}")
    unknown = [name for name in unknown if name not in leftovers]
    if unknown:
        raise UsageError(f"{source}: unexpected tensors: {show(unknown)}")


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

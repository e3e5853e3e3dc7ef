"""What `tools.benchmark` compares: each competitor is an entry of COMPETITORS, at the end of this file.

An entry says its name, which groups of the benchmark it joins, its color in charts, why it is missing here (if it is),
what it reads, and how it is timed. All of them get the same random prompts, and make as many tokens.
"""

from __future__ import annotations

import logging
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib.util import find_spec
from itertools import chain
from pathlib import Path

import torch
import torch.multiprocessing as mp
from torch import Tensor

from checkpoint.config import expected_shapes, llama_config, read_config
from checkpoint.tensors import open_checkpoint
from convert_weights import convert
from cpu.compiled import check as check_compiler
from launch.compiled import compile_decode
from launch.shared_memory import start_ranks
from llama_neuron import LlamaConfig, backend_for, generate, load_model

Tick = Callable[[], None]
Seconds = dict[str, float]  # prefill_s, and step_s: the mean of the decoding steps


@dataclass(frozen=True)
class Case:
    """A competitor at one setting: each row of the batch reads `prompt` tokens, makes a first one, and `new` more."""

    system: str
    dtype: str = "bfloat16"
    batch: int = 1
    prompt: int = 128
    new: int = 64
    cache: int = 512

    def prompts(self, vocab_size: int) -> list[list[int]]:
        generator = torch.Generator().manual_seed(0)
        return torch.randint(vocab_size, (self.batch, self.prompt), generator=generator).tolist()


@dataclass(frozen=True)
class Files:
    hf: Path  # the checkpoint
    folder: Path  # for what is made of it
    gpt_fast: Path | None  # a checkout


def timed(run: Callable[[Tick], object], warmups: int = 1) -> Seconds:
    """The times of the last of several runs. A run calls its argument after each step; the first step is prefill."""
    clock: list[float] = []

    def tick() -> None:
        clock.append(time.perf_counter())

    for _ in range(warmups + 1):
        clock.clear()
        tick()
        run(tick)
    return {"prefill_s": clock[1] - clock[0], "step_s": (clock[-1] - clock[1]) / (len(clock) - 2)}


@dataclass(frozen=True)
class Competitor:
    """One that reads the HF checkpoint. Each kind adds `time(case, files) -> Seconds`, called in a new process."""

    name: str
    groups: tuple[str, ...]
    color: str
    compiled: bool = False

    def missing(self, files: Files) -> str | None:
        """Why it cannot be measured here."""
        try:
            if self.compiled:
                check_compiler()
        except OSError as error:
            return str(error)
        return None

    def source(self, case: Case, files: Files) -> Path:
        """What it reads, made first if it is not there."""
        return files.hf


@dataclass(frozen=True)
class LlamaNeuron(Competitor):
    attn: str = "eager"
    tp: int = 1

    def source(self, case: Case, files: Files) -> Path:
        ckpt = files.folder / f"{case.dtype}-tp{self.tp}"
        if not ckpt.exists():
            convert(files.hf, ckpt, tp_degree=self.tp, dtype=case.dtype)
        return ckpt

    def time(self, case: Case, files: Files) -> Seconds:
        ckpt = self.source(case, files)
        backend = backend_for("cpu", self.attn)
        seconds = mp.get_context("fork").SimpleQueue()

        def work(rank: int) -> None:
            model = load_model(ckpt, rank, batch_size=case.batch, sequence_length=case.cache, backend=backend)
            if self.compiled:
                compile_decode(model)
            prompts = case.prompts(model.config.vocab_size)
            found = timed(lambda tick: generate(model, prompts, case.new + 1, [], lambda completions: tick()))
            if rank == 0:
                seconds.put(found)

        if self.tp == 1:
            work(0)
        else:
            start_ranks(work, self.tp)
        return seconds.get()


@dataclass
class Streamer:
    """For HF's `generate`, which puts the prompts [B,T] first, and then the tokens [B] of each step."""

    tick: Tick

    def put(self, value: Tensor) -> None:
        if value.dim() == 1:
            self.tick()

    def end(self) -> None: ...


@dataclass(frozen=True)
class HuggingFace(Competitor):
    attn: str = "sdpa"
    cache: str = "dynamic"

    def time(self, case: Case, files: Files) -> Seconds:
        from transformers import GenerationConfig, LlamaForCausalLM

        dtype = getattr(torch, case.dtype)
        model = LlamaForCausalLM.from_pretrained(files.hf, dtype=dtype, attn_implementation=self.attn).eval()
        # in place of the checkpoint's own, which may end the text early
        model.generation_config = GenerationConfig(max_new_tokens=case.new + 1, cache_implementation=self.cache)
        if self.compiled:
            model.forward = torch.compile(model.forward)
        ids = torch.tensor(case.prompts(model.config.vocab_size))
        warmups = 2 if self.compiled else 1  # the second run may compile once more
        return timed(lambda tick: model.generate(ids, streamer=Streamer(tick)), warmups)


@dataclass(frozen=True)
class LlamaCpp(Competitor):
    def missing(self, files: Files) -> str | None:
        if find_spec("llama_cpp") and find_spec("gguf"):
            return None
        return "llama_cpp or gguf cannot be imported"

    def source(self, case: Case, files: Files) -> Path:
        file = files.folder / f"{case.dtype}.gguf"
        if not file.exists():
            write_gguf(files.hf, file, case.dtype)
        return file

    def time(self, case: Case, files: Files) -> Seconds:
        run = open_llama_cpp(self.source(case, files), case)
        prompts = case.prompts(llama_config(read_config(files.hf)).vocab_size)
        return timed(lambda tick: run(prompts, tick))


def open_llama_cpp(file: Path, case: Case) -> Callable[[list[list[int]], Tick], list[list[int]]]:
    """Greedy decoding by its C functions, with their defaults: run(prompts, tick) gives the new tokens of each prompt.
    The rows of a batch are sequences of one context, and every step is one call for all of them."""
    import llama_cpp as lib
    import numpy as np

    logging.getLogger("llama-cpp-python").setLevel(logging.ERROR)  # it prints all that llama.cpp reports
    model = lib.llama_model_load_from_file(str(file).encode(), lib.llama_model_default_params())
    params = lib.llama_context_default_params()
    params.n_seq_max = case.batch
    params.n_ctx = case.batch * case.cache
    params.n_batch = case.batch * case.prompt  # all prompts in one call, which computes 512 tokens (n_ubatch) at a time
    params.n_threads = params.n_threads_batch = torch.get_num_threads()
    context = lib.llama_init_from_model(model, params)
    if not context:
        raise RuntimeError(f"llama.cpp cannot load {file}")
    shape = (case.batch, lib.llama_vocab_n_tokens(lib.llama_model_get_vocab(model)))
    batch = lib.llama_batch_init(params.n_batch, 0, 1)

    def step(rows: list[list[int]], position: int) -> list[int]:
        """The next token of every row, after these, the first of which are at `position`."""
        length = len(rows[0])
        batch.n_tokens = len(rows) * length
        for index, token in enumerate(chain(*rows)):
            row, offset = divmod(index, length)
            batch.token[index] = token
            batch.pos[index] = position + offset
            batch.n_seq_id[index] = 1
            batch.seq_id[index][0] = row
            batch.logits[index] = offset == length - 1
        code = lib.llama_decode(context, batch)
        if code != 0:
            raise RuntimeError(f"llama_decode failed with code {code}")
        return np.ctypeslib.as_array(lib.llama_get_logits(context), shape).argmax(-1).tolist()

    def run(prompts: list[list[int]], tick: Tick) -> list[list[int]]:
        lib.llama_memory_clear(lib.llama_get_memory(context), True)
        steps = [step(prompts, 0)]
        tick()
        for position in range(case.prompt, case.prompt + case.new):
            steps.append(step([[token] for token in steps[-1]], position))
            tick()
        return [list(row) for row in zip(*steps, strict=True)]

    return run


@dataclass(frozen=True)
class GptFast(Competitor):
    """Its `Transformer`, and its way of decoding: prefill and one token as two functions, of which `--compile` compiles
    the second."""

    def missing(self, files: Files) -> str | None:
        return super().missing(files) if files.gpt_fast else "no --gpt-fast"

    @torch.inference_mode()
    def time(self, case: Case, files: Files) -> Seconds:
        model = load_gpt_fast(case, files)
        ids = torch.tensor(case.prompts(model.config.vocab_size))

        def one_token(tokens: Tensor, positions: Tensor) -> Tensor:
            return model(tokens, positions)[:, -1].argmax(-1, keepdim=True)

        decode = torch.compile(one_token, fullgraph=True) if self.compiled else one_token

        def run(tick: Tick) -> None:
            tokens = one_token(ids, torch.arange(case.prompt))
            tick()
            for position in range(case.prompt, case.prompt + case.new):
                tokens = decode(tokens.clone(), torch.tensor([position]))
                tick()

        return timed(run)


# ---- the checkpoint for llama.cpp and gpt-fast


def interleaved(hf: Path, config: LlamaConfig) -> Iterator[tuple[str, Tensor]]:
    """HF's tensors, with the rows of q and k in the order of llama.cpp's and gpt-fast's rotary embedding, which rotates
    neighbours. HF rotates halves."""
    checkpoint = open_checkpoint(hf, config)
    for name in expected_shapes(config):
        tensor = checkpoint.get(name)
        for key, heads in (("q_proj", config.num_attention_heads), ("k_proj", config.num_key_value_heads)):
            if key in name:
                tensor = tensor.unflatten(0, (heads, 2, -1)).transpose(1, 2).flatten(0, 2)
        yield name, tensor


def write_gguf(hf: Path, file: Path, dtype: str) -> None:
    """llama.cpp's file, for its speed: without tokenizer and rope scaling."""
    import gguf

    completed = read_config(hf)
    config = llama_config(completed)
    writer = gguf.GGUFWriter(file, "llama")
    writer.add_context_length(completed["max_position_embeddings"])
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(config.head_dim)
    writer.add_value_length(config.head_dim)
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(config.vocab_size)
    writer.add_tokenizer_model("none")
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, config.num_hidden_layers)
    for name, tensor in interleaved(hf, config):
        its = names.get_name(name, try_suffixes=(".weight", ".bias"))
        if tensor.ndim == 1 or dtype == "float32":
            writer.add_tensor(its, tensor.float().numpy())
        else:
            raw = tensor.bfloat16().contiguous().view(torch.uint8).numpy()
            writer.add_tensor(its, raw, raw_dtype=gguf.GGMLQuantizationType.BF16)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


GPT_FAST_NAMES = {
    "model.": "",
    "embed_tokens": "tok_embeddings",
    "lm_head": "output",
    "self_attn": "attention",
    "q_proj": "wq",
    "k_proj": "wk",
    "v_proj": "wv",
    "o_proj": "wo",
    "mlp": "feed_forward",
    "gate_proj": "w1",
    "up_proj": "w3",
    "down_proj": "w2",
    "input_layernorm": "attention_norm",
    "post_attention_layernorm": "ffn_norm",
}


def load_gpt_fast(case: Case, files: Files) -> torch.nn.Module:
    sys.path.insert(0, str(files.gpt_fast))
    from model import ModelArgs, Transformer

    config = llama_config(read_config(files.hf))
    rope = config.rope_parameters
    args = ModelArgs(
        block_size=case.cache,
        vocab_size=config.vocab_size,
        n_layer=config.num_hidden_layers,
        n_head=config.num_attention_heads,
        n_local_heads=config.num_key_value_heads,
        dim=config.hidden_size,
        intermediate_size=config.intermediate_size,
        rope_base=rope["rope_theta"],
        norm_eps=config.rms_norm_eps,
        rope_scaling=rope if rope["rope_type"] == "llama3" else None,
    )
    state = {}
    for name, tensor in interleaved(files.hf, config):
        for hfs, its in GPT_FAST_NAMES.items():
            name = name.replace(hfs, its)
        state[name] = tensor.to(getattr(torch, case.dtype))
    state.setdefault("output.weight", state["tok_embeddings.weight"])
    with torch.device("meta"):
        model = Transformer(args)
    model.load_state_dict(state, assign=True)
    model.setup_caches(case.batch, case.cache)
    return model


# ---- all of them, in the order of the tables

BATCH = ("bf16", "fp32", "batch")
LENGTH = (*BATCH, "length")
CACHE = (*LENGTH, "cache")
ENTRIES = (  # blue is ours
    LlamaNeuron("llama_neuron eager", CACHE, "#7aa6de"),
    LlamaNeuron("llama_neuron sdpa", CACHE, "#2f74c0", attn="sdpa"),
    LlamaNeuron("llama_neuron flash", LENGTH, "#8a63c9", attn="flash"),
    LlamaNeuron("llama_neuron compile", CACHE, "#0b2f6b", compiled=True, attn="sdpa"),
    LlamaNeuron("llama_neuron eager, tp 2", BATCH, "#7ccfda", tp=2),
    LlamaNeuron("llama_neuron compile, tp 2", LENGTH, "#12a0b5", compiled=True, attn="sdpa", tp=2),
    HuggingFace("HF sdpa", LENGTH, "#d9541e"),
    HuggingFace("HF eager", BATCH, "#eda06a", attn="eager"),
    HuggingFace("HF static", ("bf16",), "#e3bd6b", cache="static"),
    HuggingFace("HF static compile", ("bf16",), "#a3360f", cache="static", compiled=True),
    LlamaCpp("llama.cpp", LENGTH, "#2e8b3d"),
    GptFast("gpt-fast eager", ("bf16",), "#b0a08c"),
    GptFast("gpt-fast compile", ("bf16",), "#75654f", compiled=True),
)
COMPETITORS = {entry.name: entry for entry in ENTRIES}
BASELINE = "HF sdpa"  # what ratios are taken against

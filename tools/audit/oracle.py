"""Hugging Face's Llama as the oracle of an audit: what it computes on the way to the logits, and what each of its
steps would give from other inputs.

Names are those of `tools.capture`, for one text, without B: P positions, E hidden size, H query heads, K key/value
heads, D head_dim, V vocabulary.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from checkpoint.config import llama_config, read_config
from checkpoint.tensors import open_checkpoint
from llama_neuron import UsageError

EXACT = {
    torch.bfloat16: torch.float32,
    torch.float16: torch.float32,
    torch.float32: torch.float64,
}
# a layer's steps in the order of the data; the optional ones are compared if a capture has them
STEPS = ("input_layernorm", "q_proj", "k_proj", "q", "k", "v", "heads", "attention", "post_attention_layernorm", "mlp")
OPTIONAL = ("input_layernorm", "q_proj", "k_proj", "post_attention_layernorm")


def stored_dtype(hf: Path) -> torch.dtype:
    """The dtype of a checkpoint's tensors."""
    config = llama_config(read_config(hf))
    checkpoint = open_checkpoint(hf, config)
    first_name = next(iter(checkpoint.slices))
    return checkpoint.get(first_name, stop=1).dtype


def load_hf(hf: Path, dtype: torch.dtype) -> nn.Module:
    """HF's `LlamaForCausalLM` of a checkpoint, with eager attention. Weights that have this dtype in the file are
    mapped, not read. Raises UsageError if HF cannot load it."""
    import transformers

    transformers.logging.disable_progress_bar()
    try:
        model = transformers.LlamaForCausalLM.from_pretrained(hf, dtype=dtype, attn_implementation="eager")
    except Exception as error:  # transformers raises nearly all kinds
        reason = str(error).strip().partition("\n")[0]
        raise UsageError(f"--hf {hf}: transformers cannot load it: {reason}") from None
    return model.eval()


@contextmanager
def tapped(model: nn.Module) -> Iterator[dict[str, list[Tensor]]]:
    """What the modules of HF's model return while it runs: name -> one tensor [1,T,...] of each call."""
    seen: dict[str, list[Tensor]] = defaultdict(list)
    hooks = []

    def record(name: str, module: nn.Module, part: int | None = None) -> None:
        def keep(module: nn.Module, args: tuple, output: object) -> None:
            seen[name].append(output if part is None else output[part])

        hooks.append(module.register_forward_hook(keep))

    def record_input(name: str, module: nn.Module) -> None:
        def keep(module: nn.Module, args: tuple) -> None:
            seen[name].append(args[0])

        hooks.append(module.register_forward_pre_hook(keep))

    record("cos", model.model.rotary_emb, 0)
    record("sin", model.model.rotary_emb, 1)
    record("hidden_states.0", model.model.embed_tokens)
    record("final_norm", model.model.norm)
    for number, layer in enumerate(model.model.layers):
        prefix = f"layers.{number}."
        attention = layer.self_attn
        record(f"hidden_states.{number + 1}", layer)
        record(prefix + "input_layernorm", layer.input_layernorm)
        record(prefix + "q_proj", attention.q_proj)
        record(prefix + "k_proj", attention.k_proj)
        record(prefix + "v", attention.v_proj)
        record_input(prefix + "heads", attention.o_proj)
        record(prefix + "attention", attention, 0)
        record(prefix + "post_attention_layernorm", layer.post_attention_layernorm)
        record(prefix + "mlp", layer.mlp)
    try:
        yield seen
    finally:
        for hook in hooks:
            hook.remove()


@torch.inference_mode()
def run_hf(
    model: nn.Module,
    prompt: list[int],
    new_tokens: int,
    forced: list[int] | None = None,
) -> dict[str, Tensor]:
    """HF's own `generate`: the prompt, then each new token fed back; greedy, or the tokens of `forced`.

    `ids` int64 [P+M]; at the P+M-1 positions that were fed: logits, and all that `tapped` sees, with heads apart
    [P+M-1,H,D] and q, k after the rotary embedding, in the model's dtype.
    """
    import transformers
    from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

    def allowed(row: int, text: Tensor) -> list[int]:
        return [forced[len(text) - len(prompt)]]

    model.generation_config.eos_token_id = None  # a text does not end
    settings = transformers.GenerationConfig(
        do_sample=False,
        max_new_tokens=new_tokens,
        pad_token_id=0,
        output_logits=True,
        return_dict_in_generate=True,
    )
    force = {}
    if forced is not None:
        force["prefix_allowed_tokens_fn"] = allowed
    ids = torch.tensor([prompt])
    attention_mask = torch.ones_like(ids)
    with tapped(model) as seen:
        out = model.generate(ids, settings, attention_mask=attention_mask, **force)
    tensors = {}
    for name, outputs in seen.items():
        tensors[name] = torch.cat(outputs, dim=1)[0]  # P+M-1 ...
        if name.endswith((".q_proj", ".k_proj", ".v", ".heads")):
            tensors[name] = tensors[name].unflatten(-1, (-1, model.config.head_dim))  # P+M-1 n D
    cos = tensors.pop("cos")
    sin = tensors.pop("sin")
    for number in range(len(model.model.layers)):
        prefix = f"layers.{number}."
        q = tensors[prefix + "q_proj"]
        k = tensors[prefix + "k_proj"]
        q, k = apply_rotary_pos_emb(q, k, cos, sin)
        tensors[prefix + "q"] = q
        tensors[prefix + "k"] = k
    prefill = model.lm_head(seen["final_norm"][0])[0]  # `generate` asks HF's forward for the last position only
    tensors["logits"] = torch.cat([prefill, *out.logits[1:]]).float()
    tensors["ids"] = out.sequences[0]
    return tensors


@contextmanager
def in_dtype(module: nn.Module, dtype: torch.dtype) -> Iterator[None]:
    """Weights in another dtype for a while: memory holds one layer of them, never the model."""
    kept = {name: parameter.data for name, parameter in module.named_parameters()}
    for parameter in module.parameters():
        parameter.data = parameter.data.to(dtype)
    yield
    for name, parameter in module.named_parameters():
        parameter.data = kept[name]


def attend(
    module: nn.Module,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None = None,
    **changed,
) -> Tensor:
    """HF's `eager_attention_forward` of one text: q [P,H,D], k and v [P,K,D] -> [P,H,D]. `mask` [P,P], bool, says who
    sees whom; the default is causal. `changed` replaces arguments such as `scaling`."""
    from transformers.models.llama.modeling_llama import eager_attention_forward

    if mask is None:
        mask = torch.ones(len(q), len(k), dtype=torch.bool).tril()
    lowest = torch.finfo(q.dtype).min
    bias = torch.zeros(mask.shape, dtype=q.dtype)
    bias = bias.masked_fill(~mask, lowest)
    q = q.transpose(0, 1)[None]  # 1 H P D
    k = k.transpose(0, 1)[None]
    v = v.transpose(0, 1)[None]
    options = {"scaling": module.scaling, **changed}
    output, _ = eager_attention_forward(module, q, k, v, bias[None, None], **options)
    return output[0]


def widen(mask: Tensor, x: Tensor) -> Tensor:
    """A mask of the first dimensions of x, with as many dimensions as x."""
    missing = x.dim() - mask.dim()
    return mask[(..., *[None] * missing)]


@dataclass(frozen=True)
class Seen:
    """What a subject has: tensors [P,...], and where they were captured, bool [P] or [P,heads]."""

    tensors: dict[str, Tensor]
    where: dict[str, Tensor]

    def fill(self, name: str, value: Tensor) -> Tensor:
        """The subject's values, and `value` where it has none."""
        if name not in self.tensors:
            return value
        mask = widen(self.where[name], value)
        own = self.tensors[name].to(value)
        return torch.where(mask, own, value)


class Walk:
    """One text on its way through HF's modules in exact arithmetic. Each step starts from what `given` has of the step
    before, or else from that step's own result: with nothing given it is HF's model itself."""

    def __init__(self, ids: Tensor, given: Seen) -> None:
        self.ids = ids
        self.given = given
        self.own: dict[str, Tensor] = {}

    def take(self, name: str, value: Tensor) -> Tensor:
        self.own[name] = value
        return self.given.fill(name, value)

    def embed(self, model: nn.Module) -> None:
        self.hidden = self.take("hidden_states.0", model.embed_tokens(self.ids))  # P E
        positions = torch.arange(len(self.ids))[None]
        self.cos, self.sin = model.rotary_emb(self.hidden, positions)  # 1 P D

    def through(self, layer: nn.Module, number: int) -> None:
        from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

        attention = layer.self_attn
        prefix = f"layers.{number}."

        def project(linear: nn.Module, x: Tensor) -> Tensor:
            return linear(x).unflatten(-1, (-1, attention.head_dim))  # P n D

        normed = layer.input_layernorm(self.hidden)
        normed = self.take(prefix + "input_layernorm", normed)
        q = self.take(prefix + "q_proj", project(attention.q_proj, normed))
        k = self.take(prefix + "k_proj", project(attention.k_proj, normed))
        v = self.take(prefix + "v", project(attention.v_proj, normed))
        q, k = apply_rotary_pos_emb(q, k, self.cos[0], self.sin[0])
        q = self.take(prefix + "q", q)
        k = self.take(prefix + "k", k)
        heads = attend(attention, q, k, v)  # P H D
        heads = self.take(prefix + "heads", heads)
        attended = attention.o_proj(heads.flatten(-2))  # P E
        attended = self.take(prefix + "attention", attended)
        hidden = self.hidden + attended
        normed = layer.post_attention_layernorm(hidden)
        normed = self.take(prefix + "post_attention_layernorm", normed)
        mlp = self.take(prefix + "mlp", layer.mlp(normed))
        hidden = hidden + mlp
        self.hidden = self.take(f"hidden_states.{number + 1}", hidden)

    def finish(self, model: nn.Module) -> None:
        normed = self.take("final_norm", model.model.norm(self.hidden))
        self.take("logits", model.lm_head(normed))


@torch.inference_mode()
def exact_steps(
    model: nn.Module,
    ids: Tensor,
    givens: list[Seen],
    dtype: torch.dtype,
) -> list[dict[str, Tensor]]:
    """Each step of the text `ids` [P] in `dtype`, from what each of `givens` has for its inputs: name -> [P,...]. With
    nothing given they are HF's model in that dtype."""
    texts = [Walk(ids, given) for given in givens]
    inner = model.model
    with in_dtype(inner.embed_tokens, dtype):
        for text in texts:
            text.embed(inner)
    for number, layer in enumerate(inner.layers):
        with in_dtype(layer, dtype):
            for text in texts:
                text.through(layer, number)
    with in_dtype(inner.norm, dtype), in_dtype(model.lm_head, dtype):
        for text in texts:
            text.finish(model)
    return [text.own for text in texts]

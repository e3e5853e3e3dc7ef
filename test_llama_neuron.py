"""Numerics: `llama_neuron.py` and `convert_weights.py` against Hugging Face, bit for bit where that is possible.

The oracle is transformers' own Llama on the same checkpoint, and shards that NxD made. How checkpoints, processes and
HF's greedy search are made is in `conftest.py`; what is not numerics is in `tests/`. `python test_llama_neuron.py`
renews the frozen numbers, from HF.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import Tensor

from conftest import FAMILIES, LLAMA3_ROPE, ROOT, TINY, command, hf_generate, hf_greedy, hf_model
from convert_weights import Checkpoint, convert, expected_shapes, llama_config, read_config, shard_checkpoint
from llama_neuron import (
    ATTENTION,
    LlamaConfig,
    LlamaForCausalLM,
    NeuronConfig,
    NeuronKVCache,
    Parts,
    eager_attention_forward,
    flash_attention_forward,
    generate,
    load_model,
    shard_path,
)

FROZEN = ROOT / "tests" / "frozen.json"
GOLDEN = ROOT / "tests" / "golden"
TOLERANCE = 2e-5  # of the largest logit, in float32
NEW_TOKENS = 17  # so that 16 are fed back
PROMPTS = [[5, 11, 2, 60, 33, 47, 3], [7, 1, 40]]


# ---- logits and ids


@torch.inference_mode()
def greedy_logits(model: LlamaForCausalLM, prompt: list[int], new_tokens: int, row: int = 0) -> tuple[Tensor, list]:
    """The model's own logits [P+M-1,V] of a prompt in `row` of the batch and of every new token fed back, and the M new
    ids, as `hf_greedy` has them."""
    ids, start, logits, new = prompt, 0, [], []
    for _ in range(new_tokens):
        rows = torch.zeros(model.neuron_config.batch_size, len(ids), dtype=torch.int32)
        rows[row] = torch.tensor(ids)
        positions = torch.arange(start, start + len(ids), dtype=torch.int32).expand_as(rows)
        logits.append(model(rows, positions, length=start + len(ids))[row])
        start += len(ids)
        ids = [int(logits[-1][-1].argmax())]
        new += ids
    return torch.cat(logits), new


def run_ours(rank: int, ckpt: Path, attn: str) -> list[tuple]:
    """(logits, new ids) of each of PROMPTS, the ids being also those of `generate` with both in one batch."""
    parts = Parts.of_device("cpu", attn)
    model = load_model(ckpt, rank, batch_size=3, sequence_length=64, parts=parts)
    ids = generate(model, PROMPTS, NEW_TOKENS, [])
    results = []
    for row, prompt in enumerate(PROMPTS):
        logits, new = greedy_logits(model, prompt, NEW_TOKENS, row)
        assert new == ids[row]  # argmax of gathered logits, and the choice that ranks make together
        results.append((logits.numpy(), new))
    return results


def assert_like_hf(results: list, hf) -> None:
    """Every rank has HF's ids, and HF's logits within TOLERANCE. Prints how far off they are (see them with -rP)."""
    worst = 0.0
    for rank in results:
        for prompt, (logits, new) in zip(PROMPTS, rank, strict=True):
            expected, expected_ids = hf_greedy(hf, prompt, NEW_TOKENS)
            worst = max(worst, float((torch.from_numpy(logits) - expected).abs().max() / expected.abs().max()))
            assert new == expected_ids
    print(f"off by {worst:.1e} of the largest logit")
    assert worst < TOLERANCE


@pytest.mark.parametrize("tp", [1, 2, 4])
@pytest.mark.parametrize("family", FAMILIES)
def test_float32_logits_and_ids_are_hfs(
    family: str, tp: int, hf_checkpoint: Callable, converted: Callable, on_ranks: Callable
) -> None:
    results = on_ranks(tp, run_ours, converted(family, tp), "eager")
    assert_like_hf(results, hf_model(hf_checkpoint(family), torch.float32))


@pytest.mark.parametrize("attn", ["sdpa", "flash"])
@pytest.mark.parametrize("family", ["smollm2", "llama-3.1", "odd sizes"])
@pytest.mark.parametrize("tp", [1, 2])
def test_other_forms_of_attention_compute_the_same(
    attn: str, tp: int, family: str, hf_checkpoint: Callable, converted: Callable, on_ranks: Callable
) -> None:
    results = on_ranks(tp, run_ours, converted(family, tp), attn)
    assert_like_hf(results, hf_model(hf_checkpoint(family), torch.float32))


@pytest.mark.parametrize("tp", [1, 2, 4])
@pytest.mark.parametrize("family", ["smollm2", "odd sizes"])
def test_vocab_parallel_computes_the_same(
    family: str, tp: int, hf_checkpoint: Callable, converted: Callable, on_ranks: Callable
) -> None:
    results = on_ranks(tp, run_ours, converted(family, tp, vocab_parallel=True), "eager")
    assert_like_hf(results, hf_model(hf_checkpoint(family), torch.float32))


# Without bfloat16 instructions torch adds up a product in an order that depends on its shape, so that a fused product
# and HF's separate ones may round differently. There bits become a bound: bfloat16's own distance from float32.
HAS_BFLOAT16 = torch.cpu._is_avx512_bf16_supported()


def assert_same(mine: Tensor, hfs: Tensor, what: str) -> None:
    if HAS_BFLOAT16:
        assert torch.equal(mine, hfs), f"{what} differs"
    else:
        assert (mine - hfs).abs().max() <= 0.05 * hfs.abs().max(), f"{what} differs by more than rounding"


@torch.inference_mode()
def assert_same_bits(hf_path: Path, ckpt: Path, batch: int, prompt_length: int, steps: int) -> None:
    """Every layer's hidden state and every logit equal HF's in bfloat16, in prefill and in `steps` of decode."""
    hf = hf_model(hf_path, torch.bfloat16)
    ours = load_model(ckpt, batch_size=batch, sequence_length=512)
    seen: list[Tensor] = []
    for module in [*ours.model.layers, ours.model.norm]:
        module.register_forward_hook(lambda module, args, output: seen.append(output))
    torch.manual_seed(0)
    prompt = torch.randint(hf.config.vocab_size, (batch, prompt_length))
    out = hf_generate(hf, prompt, steps + 1)
    texts, start = out.sequences, 0
    for step in range(steps + 1):
        stop = prompt_length + step
        positions = torch.arange(start, stop, dtype=torch.int32).expand(batch, -1)
        seen.clear()
        logits = ours(texts[:, start:stop].int(), positions, length=stop)
        # HF's last hidden state is the normed one; its last layer's own output it does not show
        for number, (hfs, mine) in enumerate(zip(out.hidden_states[step][1:-1], seen, strict=False)):
            assert_same(mine, hfs, f"step {step}: layer {number}")
        assert_same(seen[-1], out.hidden_states[step][-1], f"step {step}: the last norm")
        expected = hf(prompt, use_cache=False).logits.float() if step == 0 else out.logits[step][:, None]
        assert_same(logits, expected, f"step {step}: logits")
        start = stop


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("prompt_length", [5, 40])
@pytest.mark.parametrize("family", FAMILIES)
def test_bfloat16_has_hfs_bits(
    family: str, prompt_length: int, batch: int, hf_checkpoint: Callable, converted: Callable
) -> None:
    ckpt = converted(family, dtype="bfloat16")
    assert_same_bits(hf_checkpoint(family), ckpt, batch, prompt_length, steps=16)


@pytest.mark.parametrize("settings", [{"prefill_chunk_size": 16}, {"context_encoding_buckets": [32, 56]}, {}])
@pytest.mark.parametrize("attn", ATTENTION)
def test_chunks_and_buckets_compute_the_same(
    settings: dict, attn: str, hf_checkpoint: Callable, converted: Callable
) -> None:
    ckpt = converted("llama-3.1", sequence_length=128, **settings)
    parts = Parts(cache=NeuronKVCache, attention=ATTENTION[attn])  # static shapes, as on a Neuron device
    model = load_model(ckpt, batch_size=2, parts=parts)
    hf = hf_model(hf_checkpoint("llama-3.1"), torch.float32)
    prompts = torch.randint(96, (2, 50), generator=torch.Generator().manual_seed(0)).tolist()
    prompts[1] = prompts[1][:9]
    expected = [hf_greedy(hf, prompt, NEW_TOKENS) for prompt in prompts]
    assert generate(model, prompts, NEW_TOKENS, []) == [ids for _, ids in expected]
    # the first chunks of the longer prompt, then the rest, against the whole cache
    chunks = []
    with torch.inference_mode():
        for start, stop in ((0, 16), (16, 32), (32, 50)):
            positions = torch.arange(start, stop, dtype=torch.int32).expand(2, -1)
            ids = torch.tensor([prompts[0][start:stop]] * 2, dtype=torch.int32)
            chunks.append(model(ids, positions)[0])
    logits, hfs = torch.cat(chunks), expected[0][0][:50]
    assert (logits - hfs).abs().max() < TOLERANCE * hfs.abs().max()


def test_a_text_ends_at_eos_or_where_the_cache_is_full(hf_checkpoint: Callable, converted: Callable) -> None:
    _, ids = hf_greedy(hf_model(hf_checkpoint("llama-3"), torch.float32), PROMPTS[0], NEW_TOKENS)
    model = load_model(converted("llama-3"), batch_size=2, sequence_length=20)
    eos = ids[4]
    assert generate(model, PROMPTS[:1], NEW_TOKENS, [eos, 95])[0] == ids[: ids.index(eos) + 1]
    full = generate(model, PROMPTS, 99, [])
    assert [len(prompt) + len(new) for prompt, new in zip(PROMPTS, full, strict=True)] == [20, 20]
    assert full[0] == ids[:13]


# ---- flash attention


@pytest.mark.parametrize("groups", [1, 3])
@pytest.mark.parametrize(
    ("start", "tokens", "slots"), [(0, 700, 700), (0, 40, 1100), (600, 300, 1024), (1300, 1, 1400)]
)
def test_flash_attention_is_eager_attention_without_the_scores(
    groups: int, start: int, tokens: int, slots: int
) -> None:
    """Prefill, a static cache, a chunk and a step of decoding, over one to three blocks. In float64 the oracle is
    torch's own attention; bfloat16 is no further from it than eager is."""
    generator = torch.Generator().manual_seed(tokens)
    q = torch.randn(2, 2 * groups, tokens, 32, generator=generator) * 3
    k, v = torch.randn(2, 2, 2, slots, 32, generator=generator)
    mask = torch.arange(slots) <= (start + torch.arange(tokens))[None, :, None].expand(2, -1, 1)
    scaling = 32**-0.5
    wide = [x.double() for x in (q, k, v)]
    expected = torch.nn.functional.scaled_dot_product_attention(
        *wide, attn_mask=mask[:, None], scale=scaling, enable_gqa=True
    )
    assert (flash_attention_forward(q, k, v, mask, scaling) - expected).abs().max() < 2e-6 * expected.abs().max()
    narrow = [x.bfloat16() for x in (q, k, v)]
    flash, eager = (
        (form(*narrow, mask, scaling).double() - expected).norm()
        for form in (flash_attention_forward, eager_attention_forward)
    )
    assert flash <= eager


# ---- rotary embedding

ROPES = {
    "default": {},
    "linear": {"factor": 4.0},
    "dynamic": {"factor": 2.0},
    "llama3": LLAMA3_ROPE | {"original_max_position_embeddings": 8192},
    "yarn": {"factor": 4.0, "original_max_position_embeddings": 64, "beta_fast": 16.0},
    "longrope": {
        "short_factor": [1.0 + i / 8 for i in range(16)],
        "long_factor": [2.0 + i for i in range(16)],
        "factor": 4.0,
        "original_max_position_embeddings": 64,
    },
}


@pytest.mark.parametrize("form", ["transformers 4", "transformers 4 with type", "transformers 5"])
@pytest.mark.parametrize("rope_type", ROPES)
def test_rotary_embedding_is_transformers_own(rope_type: str, form: str, tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

    rope, theta = {"rope_type": rope_type, **ROPES[rope_type]}, 5e5
    raw = TINY | {"head_dim": 32, "model_type": "llama", "num_hidden_layers": 1, "rope_theta": theta}
    if form == "transformers 5":
        raw["rope_parameters"] = rope | {"rope_theta": theta}
    else:
        key = "type" if form.endswith("type") else "rope_type"
        raw["rope_scaling"] = {key: rope_type, **ROPES[rope_type]}
    model = load_model(convert_random(raw, tmp_path))
    positions = torch.arange(min(256, model.neuron_config.max_sequence_length or 256))[None]
    if rope_type == "longrope":  # transformers 4 reads the original length here only
        raw["original_max_position_embeddings"] = 64
    hf_config = transformers.LlamaConfig(**raw | {"rope_scaling": rope})
    theirs = LlamaRotaryEmbedding(hf_config)
    for dtype in (torch.float32, torch.bfloat16):
        x = torch.zeros(1, dtype=dtype)
        for mine, expected in zip(model.model.rotary_emb(x, positions.int()), theirs(x, positions), strict=True):
            assert torch.equal(mine.squeeze(1), expected)


def convert_random(raw: dict, folder: Path, seed: int = 0, **flags: object) -> Path:
    """A random float32 checkpoint of a config.json, made of torch's seeded numbers alone, and converted."""
    (folder / "config.json").write_text(json.dumps(raw))
    shapes = sorted(expected_shapes(llama_config(read_config(folder))).items())
    generator = torch.Generator().manual_seed(seed)
    weights = {name: torch.randn(shape, generator=generator) * 0.2 for name, shape in shapes}
    save_file(weights, folder / "model.safetensors")
    convert(folder, folder / "weights", **flags)
    return folder / "weights"


# ---- the converter


@pytest.mark.parametrize("tp", [1, 2, 4, 8])
@pytest.mark.parametrize("model", ["gqa8q2kv", "hd16_8q2kv", "mha8", "pad6q2kv"])
def test_shards_are_those_that_nxd_makes(model: str, tp: int, tmp_path: Path) -> None:
    """Bit for bit. nxd_shards.json holds digests of what NxD core 0.18's own `shard_checkpoint` made of the checkpoint
    beside it through NxDI's Llama with fused QKV: the first 16 digits of the SHA-256 of each tensor's bytes."""
    theirs = json.loads((GOLDEN / model / "nxd_shards.json").read_text())[f"tp{tp}"]["ranks"]
    convert(GOLDEN / model, tmp_path, tp_degree=tp)
    for rank in range(tp):
        ours = {}
        for name, tensor in load_file(shard_path(tmp_path, rank)).items():
            name = name.removeprefix("model.").replace("self_attn.Wqkv", "self_attn.qkv_proj.Wqkv")
            name = name.replace("self_attn.o_proj", "self_attn.o_proj.o_proj")
            ours[name] = hashlib.sha256(tensor.numpy().tobytes()).hexdigest()[:16]
        # the rank inside attention is for NxDI's own use
        expected = {name: digest for name, digest in theirs[rank].items() if "self_attn.rank_util" not in name}
        assert ours == expected


def numbered(*shape: int, first: int) -> Tensor:
    """No two entries alike, none of them zero."""
    return torch.arange(first, first + torch.Size(shape).numel(), dtype=torch.float32).view(shape) + 1


@settings(max_examples=200, deadline=None)
@given(
    kv_heads=st.integers(1, 6),
    group=st.integers(1, 5),
    head_dim=st.sampled_from([2, 4]),
    tp=st.integers(1, 9),
    inner=st.integers(1, 20),
    vocabulary=st.integers(1, 30),
    vocab_parallel=st.booleans(),
)
def test_shards_put_together_give_the_hf_tensors_back(
    kv_heads: int, group: int, head_dim: int, tp: int, inner: int, vocabulary: int, vocab_parallel: bool
) -> None:
    """Not through `shard_heads`: heads are recognized by their values."""
    hidden, heads = 6, kv_heads * group
    config = LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=hidden,
        intermediate_size=inner,
        num_hidden_layers=1,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        head_dim=head_dim,
        hidden_act="silu",
        rms_norm_eps=1e-6,
        rope_parameters={"rope_type": "default", "rope_theta": 1e4},
        attention_bias=True,
        mlp_bias=True,
        tie_word_embeddings=False,
        eos_token_id=[],
    )
    neuron = NeuronConfig(tp_degree=tp, torch_dtype="float32", vocab_parallel=vocab_parallel)
    layer, size = "model.layers.0", (heads + 2 * kv_heads) * head_dim
    hf = {
        "model.embed_tokens.weight": numbered(vocabulary, hidden, first=0),
        "lm_head.weight": numbered(vocabulary, hidden, first=5000),
        "model.norm.weight": numbered(hidden, first=0),
        f"{layer}.input_layernorm.weight": numbered(hidden, first=10),
        f"{layer}.post_attention_layernorm.weight": numbered(hidden, first=20),
        f"{layer}.self_attn.o_proj.weight": numbered(hidden, heads * head_dim, first=0),
        f"{layer}.self_attn.o_proj.bias": numbered(hidden, first=0),
        f"{layer}.mlp.gate_proj.weight": numbered(inner, hidden, first=0),
        f"{layer}.mlp.gate_proj.bias": numbered(inner, first=0),
        f"{layer}.mlp.up_proj.weight": numbered(inner, hidden, first=7000),
        f"{layer}.mlp.up_proj.bias": numbered(inner, first=100),
        f"{layer}.mlp.down_proj.weight": numbered(hidden, inner, first=0),
        f"{layer}.mlp.down_proj.bias": numbered(hidden, first=30),
    }
    qkv = numbered(size, hidden, first=0)
    parts = [heads * head_dim, kv_heads * head_dim, kv_heads * head_dim]
    for name, weight, bias in zip("qkv", qkv.split(parts), numbered(size, first=0).split(parts), strict=True):
        hf |= {f"{layer}.self_attn.{name}_proj.weight": weight, f"{layer}.self_attn.{name}_proj.bias": bias}
    checkpoint = Checkpoint(Path("in memory"))
    checkpoint.slices = hf
    shards = [shard_checkpoint(checkpoint, config, neuron, rank) for rank in range(tp)]

    def joined(name: str, dim: int, length: int) -> Tensor:
        whole = torch.cat([shard[name] for shard in shards], dim)
        padding = whole.narrow(dim, length, whole.shape[dim] - length)
        fill = torch.finfo(torch.float32).min if name.endswith("bias") else 0.0
        assert (padding == fill).all() and padding.shape[dim] < tp
        return whole.narrow(dim, 0, length)

    sharded = {
        "model.embed_tokens.weight": (0, vocabulary) if vocab_parallel else (1, hidden),
        "lm_head.weight": (0, vocabulary),
        f"{layer}.mlp.down_proj.weight": (1, inner),
    }
    sharded |= {f"{layer}.mlp.{n}_proj.{kind}": (0, inner) for n in ("gate", "up") for kind in ("weight", "bias")}
    for name, (dim, length) in sharded.items():
        assert torch.equal(joined(name, dim, length), hf[name]), name
    for name in (n for n in hf if n.endswith(("norm.weight", "o_proj.bias", "down_proj.bias"))):
        assert all(torch.equal(shard[name], hf[name]) for shard in shards), name
    assert [shard["rank_util.rank"].tolist() for shard in shards] == [[rank] for rank in range(tp)]

    found = []
    for shard in shards:
        weight = shard[f"{layer}.self_attn.Wqkv.weight"].unflatten(0, (-1, head_dim))  # heads D E
        bias = shard[f"{layer}.self_attn.Wqkv.bias"].unflatten(0, (-1, head_dim))
        columns = shard[f"{layer}.self_attn.o_proj.weight"].unflatten(1, (-1, head_dim))  # E heads D
        slots = columns.shape[1]
        local = (len(weight) - slots) // 2
        for slot in range(slots):
            if not weight[slot].any():  # a head of padding: nothing goes in, and nothing comes out
                assert not bias[slot].any() and not columns[:, slot].any()
                continue
            head = int(weight[slot, 0, 0] - 1) // (hidden * head_dim)
            found.append(head)
            for kind, got in (("weight", weight), ("bias", bias)):
                rows = {n: hf[f"{layer}.self_attn.{n}_proj.{kind}"].unflatten(0, (-1, head_dim)) for n in "qkv"}
                kv = slot // (slots // local)
                assert torch.equal(got[slot], rows["q"][head])
                assert torch.equal(got[slots + kv], rows["k"][head // group])
                assert torch.equal(got[slots + local + kv], rows["v"][head // group])
            expected = hf[f"{layer}.self_attn.o_proj.weight"].unflatten(1, (-1, head_dim))[:, head]
            assert torch.equal(columns[:, slot], expected)
    assert sorted(found) == list(range(heads))


# ---- frozen numbers

FROZEN_CONFIG = TINY | {"model_type": "llama", "num_hidden_layers": 2, "num_key_value_heads": 2, "vocab_size": 48}
FROZEN_CONFIG |= {"dtype": "float32", "rope_scaling": FAMILIES["llama-3.1"]["rope_scaling"]}


def test_frozen_numbers(tmp_path: Path) -> None:
    """Needs no transformers: HF's logits and ids of a seeded model, as `python test_llama_neuron.py` wrote them."""
    frozen = json.loads(FROZEN.read_text())
    model = load_model(convert_random(FROZEN_CONFIG, tmp_path, seed=2024), sequence_length=32)
    logits, ids = greedy_logits(model, frozen["prompt"], len(frozen["ids"]))
    expected = torch.tensor(frozen["logits"])
    assert ids == frozen["ids"]
    assert (logits - expected).abs().max() < TOLERANCE * expected.abs().max()


# ---- the real SmolLM2


@pytest.mark.slow
@pytest.mark.parametrize(("batch", "prompt_length"), [(1, 5), (1, 172), (3, 7), (3, 100)])
def test_smollm2_in_bfloat16_has_hfs_bits(smollm2: Path, batch: int, prompt_length: int, tmp_path: Path) -> None:
    convert(smollm2, tmp_path)
    assert_same_bits(smollm2, tmp_path, batch, prompt_length, steps=64)


@pytest.mark.slow
@pytest.mark.parametrize(("tp", "dtype"), [(1, "bfloat16"), (1, "float32"), (2, "float32"), (3, "float32")])
def test_smollm2_as_a_user_runs_it_has_hfs_ids(smollm2: Path, tp: int, dtype: str, tmp_path: Path) -> None:
    """In float32 with more ranks, because there bfloat16's rounding depends on tp, and two tokens may be that near."""
    assert command("convert_weights.py", "--hf", smollm2, "--out", tmp_path, "--tp", tp, "--dtype", dtype).stdout == ""
    flags = ("--json", "--max-new-tokens", 24, "--ignore-eos", "--prompt", "The capital of France is")
    ran = command("llama_neuron.py", "--ckpt", tmp_path, "--tp", tp, *flags)
    assert ran.returncode == 0, ran.stderr
    (completion,) = json.loads(ran.stdout)["completions"]
    assert re.match(r" Paris\b", completion["text"])
    assert completion["ids"] == hf_greedy(hf_model(smollm2, getattr(torch, dtype)), completion["prompt_ids"], 24)[1]


if __name__ == "__main__":
    import tempfile

    with tempfile.TemporaryDirectory() as folder:
        prompt = [3, 17, 29, 8, 41]
        convert_random(FROZEN_CONFIG, Path(folder), seed=2024)
        logits, ids = hf_greedy(hf_model(Path(folder), torch.float32), prompt, 8)
    FROZEN.write_text(json.dumps({"prompt": prompt, "ids": ids, "logits": logits.tolist()}) + "\n")

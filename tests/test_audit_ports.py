"""tools.audit and ports that others wrote. The ways in which their roundings differ from Hugging Face's raise no alarm,
at tp 1 to 16. Defects that were seen in them, and siblings of those, are found and named, in whole captures and in
captures of a part of the places: there, the step may also be said to be one of those that were not seen."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import tests.test_audit as planting
from tests.test_audit import FREQS, MASK, ROW_BIAS, WRITE, Defect, Edits, layer_tensor, meta_layout, report_of

subject = planting.subject  # the fixture

# ---- roundings that ports have: what stands in llama_neuron.py, and what instead

COLUMN = """    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight, self.bias)
"""
LATE_BIAS = """    def forward(self, x: Tensor) -> Tensor:
        y = F.linear(x, self.weight)
        return y if self.bias is None else y + self.bias
"""
ROW = "            return F.linear(x, self.weight, self.bias)\n"
PARTIAL_SUM = "        partial_result = F.linear(x, self.weight).float()\n"
NORMED = "        return self.weight * hidden_states.to(input_dtype)\n"
COS_SIN = "        return cos.to(x.dtype), sin.to(x.dtype)\n"
ROTATED = "    return q_embed, k_embed\n"
SOFTMAX = "    attn_weights = F.softmax(attn_weights, dim=-1, dtype=torch.float32).to(query.dtype)\n"
HEADS = "    attn_output = torch.matmul(attn_weights.view(B, K, -1, S), value)  # B K G*T D\n"
EXPONENTIALS = """    attn_weights = attn_weights.float()
    attn_weights = torch.exp(attn_weights - attn_weights.amax(-1, keepdim=True))
    total = attn_weights.sum(-1)
"""
DIVIDED_LATE = """    attn_output = torch.matmul(attn_weights.to(query.dtype).view(B, K, -1, S), value)
    attn_output = (attn_output / total.view(B, K, -1, 1)).to(query.dtype)
"""
IN_TWO_PARTS = """    attn_weights = attn_weights.view(B, K, -1, S)
    own = torch.arange(S) == mask.sum(-1, keepdim=True) - 1  # B T S: the token's own slot
    own = own[:, None].repeat(1, 1, H // K, 1)  # B 1 G*T S
    attn_output = torch.matmul(attn_weights.masked_fill(own, 0), value)
    attn_output = attn_output + torch.matmul(attn_weights.masked_fill(~own, 0), value)
"""
ROUNDINGS: dict[str, Edits] = {
    "the norm is cast after the weight": (
        (NORMED, "        return (self.weight.float() * hidden_states).to(input_dtype)\n"),
    ),
    "the rotary embedding is in float32": (
        (COS_SIN, "        return cos, sin\n"),
        (ROTATED, "    return q_embed.to(q.dtype), k_embed.to(k.dtype)\n"),
    ),
    "the token's own slot is added apart": ((HEADS, IN_TWO_PARTS),),
    "softmax is divided after the product": ((SOFTMAX, EXPONENTIALS), (HEADS, DIVIDED_LATE)),
    "ranks add in the model's dtype": ((PARTIAL_SUM, PARTIAL_SUM.replace(".float()", "")),),
    "a bias is added after rounding": ((COLUMN, LATE_BIAS),),
}
NOT_TOGETHER = "the token's own slot is added apart"  # it changes the line that dividing late changes
TOGETHER = tuple(edit for name, edits in ROUNDINGS.items() if name != NOT_TOGETHER for edit in edits)
FAMILIES = ("llama-3.1", "odd sizes")  # the second has biases, and heads that no tp divides
ALONE = []
for name in ROUNDINGS:
    for family in FAMILIES:
        for tp in (1, 2, 4):
            changes_nothing = (tp == 1 and "ranks" in name) or (family == "llama-3.1" and "bias" in name)
            if not changes_nothing:
                ALONE.append((name, family, tp))


def assert_no_alarm(subject: Callable, edits: Edits, **settings: object) -> None:
    port = Defect("none", "", "", edits, prompts=(24, 17), **settings)
    report = report_of(*subject(port))
    assert report["passed"], (report["verdict"], report["causes"])
    assert not report["bitwise"]  # it does round differently


@pytest.mark.parametrize(("rounding", "family", "tp"), ALONE)
def test_a_rounding_that_ports_have_is_no_alarm(rounding: str, family: str, tp: int, subject: Callable) -> None:
    assert_no_alarm(subject, ROUNDINGS[rounding], family=family, tp=tp)


MANY_RANKS = [pytest.param(tp, marks=pytest.mark.slow) for tp in (8, 16)]


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
@pytest.mark.parametrize("tp", [1, 2, 4, *MANY_RANKS])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_port_with_all_of_these_roundings_is_no_alarm(family: str, tp: int, dtype: str, subject: Callable) -> None:
    assert_no_alarm(subject, TOGETHER, family=family, tp=tp, dtype=dtype)


# ---- defects


@dataclass(frozen=True)
class Planted(Defect):
    position: int | None = None  # the first wrong one
    seen: str = ".*"  # a regular expression of the tensors that are captured


HIDDEN = r"hidden_states\.\d+"
STREAM = rf"{HIDDEN}|layers\.\d+\.(attention|mlp)"
LOGITS = "logits"
NOT_SEEN = "between .* not seen"


def on_rank_1(layer: int, name: str, change: Callable[[torch.Tensor], torch.Tensor]) -> Callable[[list[dict]], None]:
    """A change of one tensor of rank 1's shard."""

    def apply(ranks: list[dict]) -> None:
        x = layer_tensor(ranks, layer, name)[1]
        x.copy_(change(x))

    return apply


def swap(first: torch.Tensor, second: torch.Tensor) -> None:
    kept = first.clone()
    first.copy_(second)
    second.copy_(kept)


def exchange(layer: int, name: str) -> Callable[[list[dict]], None]:
    """Ranks 0 and 1 have each other's part of a weight."""

    def apply(ranks: list[dict]) -> None:
        first, second = layer_tensor(ranks, layer, name)
        swap(first, second)

    return apply


def gate_for_up(ranks: list[dict]) -> None:
    """Rank 1 has its parts of gate_proj and up_proj in each other's place."""
    gates = layer_tensor(ranks, 1, "mlp.gate_proj.weight")
    ups = layer_tensor(ranks, 1, "mlp.up_proj.weight")
    swap(gates[1], ups[1])


def cut_gate_up(ranks: list[dict]) -> None:
    """gate_proj and up_proj as one weight, whose rows are cut into as many parts as there are ranks: rank 0 has all of
    gate_proj, and takes its second half for up_proj."""
    gates = layer_tensor(ranks, 1, "mlp.gate_proj.weight")
    ups = layer_tensor(ranks, 1, "mlp.up_proj.weight")
    quarters = torch.cat([*gates, *ups]).chunk(4)
    for x, quarter in zip((gates[0], ups[0], gates[1], ups[1]), quarters, strict=True):
        x.copy_(quarter)


def int4(x: torch.Tensor) -> torch.Tensor:
    """Groups of 16 columns with a scale each."""
    groups = x.float().unflatten(-1, (-1, 16))
    scale = groups.abs().amax(-1, keepdim=True) / 7
    return ((groups / scale).round() * scale).flatten(-2).to(x)


def int4_down_proj(ranks: list[dict]) -> None:
    for x in layer_tensor(ranks, 1, "mlp.down_proj.weight"):
        x.copy_(int4(x))


def int4_everywhere(ranks: list[dict]) -> None:
    for tensors in ranks:
        for name, x in tensors.items():
            if name.endswith("proj.weight") or "Wqkv" in name:
                x.copy_(int4(x))


def in_bfloat16(ranks: list[dict]) -> None:
    for tensors in ranks:
        for x in tensors.values():
            if x.is_floating_point():
                x.copy_(x.bfloat16())


def fp8_rows_of_k(ranks: list[dict]) -> None:
    """llama-3.1 at tp 1: 8 query heads, 2 key heads and 2 value heads of 8."""
    for x in layer_tensor(ranks, 1, "self_attn.Wqkv.weight"):
        k = x[64:80].float()
        scale = k.abs().amax(-1, keepdim=True) / 448
        x[64:80] = ((k / scale).to(torch.float8_e4m3fn).float() * scale).to(x)


def norm_of_layer_0(ranks: list[dict]) -> None:
    for tensors in ranks:
        tensors["model.layers.1.input_layernorm.weight"] = tensors["model.layers.0.input_layernorm.weight"].clone()


def norm_of_layer_2_at_the_end(ranks: list[dict]) -> None:
    for tensors in ranks:
        tensors["model.norm.weight"] = tensors["model.layers.2.input_layernorm.weight"].clone()


def noise(ranks: list[dict]) -> None:
    """Another revision of all weights: 5% of their size."""
    generator = torch.Generator().manual_seed(7)
    for x in ranks[0].values():
        if x.dim() == 2:
            x += (0.05 * x.float().std() * torch.randn(x.shape, generator=generator)).to(x)


def no_lm_head(ranks: list[dict]) -> None:
    ranks[1]["lm_head.weight"].zero_()


def tie_lm_head(ranks: list[dict]) -> None:
    for tensors in ranks:
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()


def no_rows_of_rank_1(ranks: list[dict]) -> None:
    ranks[1]["model.embed_tokens.weight"].zero_()


IS_DECODE = "(position_ids.shape[1] == 1)"
SUMMED = "    return torch.ops._c10d_functional.wait_tensor(summed)"
LOST = """    summed = torch.ops._c10d_functional.wait_tensor(summed)
    return x if dist.get_rank() == 1 else summed"""
INPUT_NORM = "        residual = hidden_states\n        hidden_states = self.input_layernorm(hidden_states)\n"
NORM_FIRST = "        hidden_states = self.input_layernorm(hidden_states)\n        residual = hidden_states\n"
LINEAR_ROPE = '            inv_freq = inv_freq / rope["factor"]\n'
KEPT_FREQUENCIES = '        self.register_buffer("inv_freq", inv_freq)\n'
ORIGINAL = '    original = rope["original_max_position_embeddings"]\n'
ALL_LOGITS = "        return logits[..., : self.config.vocab_size].float()\n"
MLP = "        return self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x))\n"
EMBED = "        hidden_states = self.embed_tokens(input_ids)  # B T E\n"
LAYER = "            hidden_states = layer(hidden_states, cos, sin, mask, position_ids)\n"
LAST = "        return self.norm(hidden_states)\n"
ADDED = "        hidden_states = residual + hidden_states\n"
WRITE_K = "        self.k[row, :, position_ids] = k.transpose(1, 2)\n"
WRITE_V = "        self.v[row, :, position_ids] = v.transpose(1, 2)\n"
TO_ROTATE = "    q_embed = (q * cos) + (rotate_half(q) * sin)\n"
SCALED = "    attn_weights = torch.matmul(query, key.transpose(2, 3)) * scaling  # B K G*T S\n"


def instead(text: str, part: str, other: str) -> tuple[str, str]:
    """An edit of a part of a text."""
    assert part in text
    return text, text.replace(part, other)


PLANTED = [
    # on one rank, or between ranks
    Planted("gate and up are swapped on rank 1", r"layers\.1\.mlp", "swapped.*rank 1", change=gate_for_up),
    Planted(
        "gate and up are swapped on rank 1, hidden states",
        r"layers\.1\.residual",
        "swapped.*rank 1",
        change=gate_for_up,
        seen=HIDDEN,
    ),
    Planted("rows of gate and up are cut across ranks", r"layers\.1\.mlp", "fused|cut", change=cut_gate_up),
    Planted(
        "down_proj's columns are exchanged",
        r"layers\.1\.mlp",
        "columns of down_proj are (exchanged|on ranks that are off)",
        change=exchange(1, "mlp.down_proj.weight"),
    ),
    Planted(
        "down_proj's columns are exchanged, hidden states",
        r"layers\.1\.residual",
        "columns of down_proj are (exchanged|on ranks that are off)",
        change=exchange(1, "mlp.down_proj.weight"),
        seen=HIDDEN,
    ),
    Planted(
        "o_proj's columns are exchanged",
        r"layers\.1\.attention",
        "columns of o_proj are exchanged|heads that are off by 4",
        change=exchange(1, "self_attn.o_proj.weight"),
    ),
    Planted(
        "the all-reduce is lost on rank 1",
        r"layers\.0\.mlp",
        "rank 1 did not get the sum after attention",
        ((SUMMED, LOST),),
    ),
    Planted(
        "the all-reduce is lost on all ranks, hidden states",
        r"layers\.0\.residual",
        "the all-reduce is missing",
        ((SUMMED, "    return x"),),
        seen=HIDDEN,
    ),
    Planted("lm_head is zero on rank 1", "logits", "rank 1's slice of the vocabulary is zeros", change=no_lm_head),
    Planted(
        "the embedding's rows are zero on rank 1",
        "embedding",
        "rank 1's part of the vocabulary is zeros",
        change=no_rows_of_rank_1,
        settings=(("vocab_parallel", True),),
    ),
    Planted(
        "the bias of gate_proj is left out on rank 1",
        r"layers\.1\.mlp",
        r"bias of mlp\.gate_proj is left out, on rank 1",
        change=on_rank_1(1, "mlp.gate_proj.bias", torch.zeros_like),
        family="granite-code",
    ),
    Planted(
        "a bias is added once per rank, hidden states",
        r"layers\.0\.residual",
        "bias of (self_attn.o_proj|mlp.down_proj) is added 2 times",
        ((ROW_BIAS, ROW_BIAS.replace("+ self.bias", "+ get_tensor_model_parallel_size() * self.bias")),),
        family="granite-code",
        seen=HIDDEN,
    ),
    # weights
    Planted("down_proj is in int4", r"layers\.1\.mlp", "down_proj is rounded to int4.*16", change=int4_down_proj),
    Planted("all weights are in int4", r"layers\.0\.q", "int4.*16", change=int4_everywhere, tp=1),
    Planted("all weights are in int4, stream", r"layers\.0\.attention", "int4", change=int4_everywhere, seen=STREAM),
    Planted("k_proj is in fp8 by rows", r"layers\.1\.k", "k_proj is rounded to fp8.*rows", change=fp8_rows_of_k, tp=1),
    Planted(
        "all weights are bfloat16's",
        "embedding",
        "embed_tokens is rounded to bfloat16",
        change=in_bfloat16,
        dtype="float32",
    ),
    Planted("another revision of all weights", r"embedding|layers\.0\.q", "another revision", change=noise, tp=1),
    Planted("the embedding is lm_head", "logits", "embedding is taken for lm_head", change=tie_lm_head, tp=1),
    Planted(
        "the norm of layer 0 in layer 1",
        r"layers\.1\.q",
        "the weight of input_layernorm of layer 0 in RMSNorm",
        change=norm_of_layer_0,
    ),
    Planted(
        "the final norm is layer 2's",
        "final_norm",
        "the weight of .*input_layernorm",
        change=norm_of_layer_2_at_the_end,
    ),
    # the rotary embedding
    Planted(
        "the rotary embedding is applied twice",
        r"layers\.0\.q",
        "applied twice",
        (instead(FREQS, "self.inv_freq", "self.inv_freq * 2"),),
        position=1,
    ),
    Planted(
        "half of the pairs are rotated",
        r"layers\.0\.q",
        "first 4 of 8 pairs",
        ((KEPT_FREQUENCIES, f"        inv_freq[4:] = 0\n{KEPT_FREQUENCIES}"),),
        family="head_dim",
        position=1,
    ),
    Planted(
        "theta is 123456",
        r"layers\.0\.q",
        r"another theta.* (12\d{4}|1\.2\d*e\+05),",
        (('inv_freq = 1.0 / rope["rope_theta"] ** exponent', "inv_freq = 1.0 / 123456**exponent"),),
        family="llama-3",
    ),
    Planted(
        "the original length of llama3's scaling is four times as long",
        r"layers\.0\.q",
        "original_max_position_embeddings.* 256 for 64",
        (instead(ORIGINAL, "rope[", "4 * rope["),),
        prompts=(60,),
    ),
    Planted(
        "linear scaling is left out",
        r"layers\.0\.q",
        "rope scaling of config.json is left out",
        ((LINEAR_ROPE, "            pass\n"),),
        family="deepseek-coder",
        position=1,
    ),
    Planted(
        "linear scaling is left out, logits",
        "logits",
        "rope scaling of config.json is left out",
        ((LINEAR_ROPE, "            pass\n"),),
        family="deepseek-coder",
        seen=LOGITS,
    ),
    Planted(
        "positions start again at 64",
        r"layers\.0\.q",
        "start again at 64|off by -64 from position 64 on",
        (instead(FREQS, "position_ids[", "(position_ids % 64)["),),
        prompts=(100,),
        position=64,
    ),
    Planted(
        "the decode position is off by one, hidden states",
        r"layers\.0\.residual",
        r"positions that are off by \+1",
        (instead(FREQS, "position_ids[", f"(position_ids + int({IS_DECODE}))["),),
        step=1,
        seen=HIDDEN,
    ),
    Planted(
        "cos and sin are swapped",
        r"layers\.0\.q",
        "cos and sin are swapped",
        (instead(COS_SIN, "cos.to(x.dtype), sin.to(x.dtype)", "sin.to(x.dtype), cos.to(x.dtype)"),),
    ),
    Planted(
        "q and k are in Meta's layout, hidden states", r"layers\.0\.residual", "Meta", change=meta_layout, seen=HIDDEN
    ),
    # masks and caches
    Planted(
        "a window of 64",
        r"layers\.0\.heads",
        "the last 64 only",
        ((MASK, "mask = (slots <= position_ids[..., None]) & (slots > position_ids[..., None] - 64)"),),
        prompts=(100,),
    ),
    Planted(
        "a window of 16, hidden states",
        r"layers\.0\.residual",
        "the last 16 only",
        ((MASK, "mask = (slots <= position_ids[..., None]) & (slots > position_ids[..., None] - 16)"),),
        prompts=(40,),
        seen=HIDDEN,
    ),
    Planted(
        "attention in chunks of 32",
        r"layers\.0\.heads",
        "chunks of 32",
        ((MASK, "mask = (slots <= position_ids[..., None]) & (slots // 32 == position_ids[..., None] // 32)"),),
        prompts=(80,),
        position=32,
    ),
    Planted(
        "decoding does not see the first token",
        r"layers\.0\.heads",
        "first token|slot 0",
        ((MASK, f"mask = (slots <= position_ids[..., None]) & (slots >= int({IS_DECODE}))"),),
        step=1,
    ),
    Planted(
        "values are written one slot too far",
        r"layers\.0\.heads",
        "values.* one slot too far",
        (
            instead(
                WRITE, WRITE_V, WRITE_V.replace("position_ids", "(position_ids + 1).clamp(max=self.v.shape[2] - 1)")
            ),
        ),
        position=0,
    ),
    Planted(
        "from slot 26 on the cache is written one slot too far",
        r"layers\.0\.heads",
        "(?=.* one slot too far).*from (slot|position) 26 on",
        (instead(WRITE, WRITE_K, f"        position_ids = position_ids + (position_ids >= 26)\n{WRITE_K}"),),
        step=3,
    ),
    Planted(
        "decoding writes to the other row's cache",
        r"layers\.0\.heads",
        "another row's (tokens|cache)",
        (instead(WRITE, WRITE_K, f"        k, v = (k.flip(0), v.flip(0)) if {IS_DECODE} else (k, v)\n{WRITE_K}"),),
        prompts=(24, 15),
        step=1,
    ),
    # scores
    Planted(
        "scores are clipped at 4",
        r"layers\.0\.heads",
        "scores are clipped at (3.9|4)",
        ((SCALED, f"{SCALED}    attn_weights = attn_weights.clamp(-4, 4)\n"),),
    ),
    Planted(
        "q and k are normed by heads",
        r"layers\.0\.q",
        "q and k are normed by heads",
        ((TO_ROTATE, f"    q, k = (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True)) for x in (q, k))\n{TO_ROTATE}"),),
        position=0,
    ),
    # sums
    Planted(
        "the residual is the normed input",
        r"layers\.0\.(mlp|residual)",
        "residual is taken after input_layernorm",
        ((INPUT_NORM, NORM_FIRST),),
    ),
    Planted(
        "attention's output is scaled",
        r"layers\.0\.(mlp|residual)",
        "attention's output is scaled by 0.2",
        ((ADDED, "        hidden_states = residual + 0.22 * hidden_states\n"),),
    ),
    Planted(
        "the last layer's output is dropped",
        "final_norm",
        "the final norm gets hidden_states.2|last layer",
        ((LAYER, f"            before = hidden_states\n{LAYER}"), (LAST, "        return self.norm(before)\n")),
    ),
    Planted(
        "the MLP is off by 1.2 at one of 240 positions",
        r"layers\.0\.mlp",
        r"a scale: the right values times 1\.2|1\.(19|2)",
        (
            (
                MLP,
                "        x = self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x))\n"
                "        x[:, 200:201] *= 1.2\n"
                "        return x\n",
            ),
        ),
        prompts=(240,),
        position=200,
        tp=1,
    ),
    Planted(
        "one id is another one",
        "embedding",
        "other ids are looked up at positions 9",
        ((EMBED, f"        input_ids = torch.where(position_ids == 9, 3, input_ids)\n{EMBED}"),),
        position=9,
    ),
    # logits
    Planted(
        "logits are capped at 25",
        "logits",
        "capped at 25 ",
        ((ALL_LOGITS, "        return 25 * torch.tanh(logits[..., : self.config.vocab_size].float() / 25)\n"),),
    ),
    Planted(
        "logits are of the position before",
        "logits",
        "logits are of the position 1 before",
        ((ALL_LOGITS, "        logits = logits[:, [0, *range(logits.shape[1] - 1)]]\n" + ALL_LOGITS),),
        position=1,
    ),
]


def part_of(captured: Path, seen: str) -> Path:
    """The same capture with ids and some of the tensors."""
    tensors = load_file(captured)
    kept = {name: x for name, x in tensors.items() if name == "ids" or re.fullmatch(seen, name)}
    part = captured.with_name("part.safetensors")
    save_file(kept, part, safe_open(captured, "pt").metadata())
    return part


@pytest.mark.parametrize("defect", PLANTED, ids=lambda defect: defect.name)
def test_a_defect_of_a_port_is_found_and_no_other_cause_named(defect: Planted, subject: Callable) -> None:
    hf, captured = subject(defect)
    cause = defect.cause
    if defect.seen != ".*":
        captured = part_of(captured, defect.seen)
        cause = f"{cause}|{NOT_SEEN}"
    report = report_of(hf, captured)
    assert not report["passed"]
    assert re.fullmatch(defect.place, report["first"]["place"]), report["verdict"]
    if defect.step is not None:
        assert report["first"]["step"] == defect.step, report["verdict"]
    if defect.position is not None:
        assert report["first"]["position"] == defect.position, report["verdict"]
    assert re.search(cause, report["causes"][0]["meaning"]), report["causes"]

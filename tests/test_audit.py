"""tools.audit: it passes clean subjects, and finds what it is for: defects that are planted in a copy of the subject,
one at a time. A defect is a change of the source, or of a shard's tensors."""

from __future__ import annotations

import importlib
import itertools
import json
import re
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from checkpoint.output import replacing, write_tensors
from checkpoint.seal import seal_of
from launch.command import run_command
from llama_neuron import UsageError, shard_heads
from tests.helpers import ROOT, command, hf_model
from tests.test_captured import PROMPTS as CAPTURED_PROMPTS
from tests.test_captured import generated, hf_tensors, nxdi_folder, nxdi_modules, vllm_folder
from tools.audit.command import as_json, audit, main, parse_args, table
from tools.audit.oracle import load_hf, run_hf

NEW = 6
SUBJECT = re.compile(r"llama_neuron|convert_weights|tools\.capture|(checkpoint|launch)(\..*)?")  # its modules
Edits = tuple[tuple[str, str], ...]  # of llama_neuron.py or convert_weights.py: what stands there, and what instead


@contextmanager
def planted(edits: Edits) -> Iterator[None]:
    """The subject's modules are copies with these edits."""
    saved = {name: module for name, module in sys.modules.items() if SUBJECT.fullmatch(name)}
    for name in saved:
        del sys.modules[name]
    sources = {name: (ROOT / f"{name}.py").read_text() for name in ("llama_neuron", "convert_weights")}
    try:
        for old, new in edits:
            places = [name for name, source in sources.items() if old in source]
            assert len(places) == 1 and sources[places[0]].count(old) == 1, f"not once in the sources: {old}"
            sources[places[0]] = sources[places[0]].replace(old, new)
        for name, source in sources.items():
            module = sys.modules[name] = ModuleType(name)
            module.__file__ = str(ROOT / f"{name}.py")
            exec(compile(source, module.__file__, "exec"), module.__dict__)
        yield
    finally:
        for name in [*filter(SUBJECT.fullmatch, sys.modules)]:
            del sys.modules[name]
        sys.modules.update(saved)


def run_subject(rank: int, edits: Edits, ckpt: Path, prompts: list, forced: list, out: Path) -> None:
    """Writes what tools.capture writes of the planted subject."""
    with planted(edits):
        tool = importlib.import_module("tools.capture")
        tensors = tool.capture(ckpt, prompts, NEW, rank=rank, forced=forced)
    if rank == 0:
        facts = {"prompt_tokens": json.dumps([len(prompt) for prompt in prompts])}
        neuron = json.loads((ckpt / "neuron_config.json").read_text())
        save_file(tensors, out, facts | {"dtype": neuron["torch_dtype"], "tp": str(neuron["tp_degree"])})


@dataclass(frozen=True)
class Defect:
    name: str
    place: str  # a regular expression of the place that is named
    cause: str  # of the cause
    edits: Edits = ()
    change: Callable[[list[dict]], None] | None = None  # of the tensors of all ranks
    family: str = "llama-3.1"
    dtype: str = "bfloat16"
    tp: int = 2
    prompts: tuple[int, ...] = (24,)  # lengths
    step: int | None = 0  # the first step that is wrong: 0 is prefill
    settings: tuple[tuple[str, object], ...] = ()  # of the conversion


def layer_tensor(ranks: list[dict], layer: int, name: str) -> list[torch.Tensor]:
    return [tensors[f"model.layers.{layer}.{name}"] for tensors in ranks]


def swap_layers(ranks: list[dict]) -> None:
    for tensors in ranks:
        for name in [name for name in tensors if name.startswith("model.layers.0.")]:
            other = name.replace("layers.0.", "layers.1.")
            tensors[name], tensors[other] = tensors[other], tensors[name]


def neighbours_o_proj(ranks: list[dict]) -> None:
    for tensors in ranks:
        tensors["model.layers.1.self_attn.o_proj.weight"] = tensors["model.layers.2.self_attn.o_proj.weight"].clone()


def stale_shard(ranks: list[dict]) -> None:
    generator = torch.Generator().manual_seed(7)
    for name, x in ranks[1].items():
        if "layers.1." in name and x.dim() == 2:
            x += 0.02 * torch.randn(x.shape, generator=generator).to(x)


def other_lm_head(ranks: list[dict]) -> None:
    generator = torch.Generator().manual_seed(7)
    for tensors in ranks:
        x = tensors["lm_head.weight"]
        x += 0.02 * torch.randn(x.shape, generator=generator).to(x)


def swap_k_v_on_rank_1(ranks: list[dict]) -> None:
    """llama-3.1: a rank has 4 query heads, 1 key head and 1 value head of 8."""
    for name, x in ranks[1].items():
        if "layers.1.self_attn.Wqkv" in name:
            x[32:40], x[40:48] = x[40:48].clone(), x[32:40].clone()


def rotate_query_heads_of_rank_1(ranks: list[dict]) -> None:
    for name, x in ranks[1].items():
        if "layers.2.self_attn.Wqkv" in name:
            x[:32] = x[:32].roll(8, 0)


def meta_layout(ranks: list[dict]) -> None:
    for tensors in ranks:
        for name, x in tensors.items():
            if "Wqkv.weight" in name:
                x[:40] = x[:40].unflatten(0, (-1, 2, 4)).transpose(1, 2).flatten(0, 2)


def fp8_gate(ranks: list[dict]) -> None:
    for x in layer_tensor(ranks, 1, "mlp.up_proj.weight"):
        x.copy_(x.to(torch.float8_e4m3fn).to(x))


def no_o_proj_bias(ranks: list[dict]) -> None:
    for tensors in ranks:
        for name, x in tensors.items():
            if name.endswith("o_proj.bias"):
                x.zero_()


NORM = "        hidden_states = hidden_states.to(torch.float32)\n"
WEIGHTS = "    attn_weights = F.softmax(attn_weights, dim=-1, dtype=torch.float32).to(query.dtype)\n"
WEIGHTS_16 = """    attn_weights = torch.exp(attn_weights - attn_weights.amax(-1, keepdim=True))
    attn_weights = attn_weights / attn_weights.sum(-1, keepdim=True)
"""
WEIGHTS_NAN = f"""    overflows = attn_weights <= -3e38
{WEIGHTS}    attn_weights = torch.where(overflows, torch.nan, attn_weights)
"""
MASK = "mask = slots <= position_ids[..., None]"
FREQS = "freqs = position_ids[..., None].float() * self.inv_freq  # B T D/2"
ROW_BIAS = "        return y if self.bias is None else y + self.bias"
WRITE = """        self.k[row, :, position_ids] = k.transpose(1, 2)
        self.v[row, :, position_ids] = v.transpose(1, 2)
"""
ROWS = "        ids = torch.tensor([(row + [0] * stop)[start:stop] for row in rows])  # B T"
CONVERTED = "        kv_heads = [*(head // group for head in range(num_heads)), *padding]\n"

DEFECTS = [
    # fixed upstream at some time
    Defect(
        "KV heads are tiled where heads are converted to MHA",
        r"layers\.0\.heads",
        "tiled|other KV heads",
        ((CONVERTED, "        kv_heads = [*(head % num_kv_heads for head in range(num_heads)), *padding]\n"),),
        family="smollm2",
    ),
    Defect(
        "K and V are cropped where heads are converted to MHA",
        r"layers\.0\.(k|v|heads)",
        "other KV heads.*zeros",
        ((CONVERTED, "        kv_heads = [*range(num_kv_heads)] + [None] * (len(query_heads) - num_kv_heads)\n"),),
        family="smollm2",
    ),
    Defect(
        "padded columns of lm_head are not masked",
        "logits",
        "padding is not masked",
        (("torch.where(is_real, logits, -1e9).max(dim=-1)", "logits.max(dim=-1)"),),
        family="negative logits",
    ),
    Defect(
        "the decode mask is off by one",
        r"layers\.0\.heads",
        "mask is off by one.*does not see itself|written one slot",
        ((MASK, "mask = slots <= position_ids[..., None] - int(position_ids.shape[1] == 1)"),),
        step=1,
    ),
    Defect(
        "the decode position is off by one",
        r"layers\.0\.q",
        r"positions that are off by \+1",
        ((FREQS, "freqs = (position_ids + int(position_ids.shape[1] == 1))[..., None].float() * self.inv_freq"),),
        step=1,
    ),
    Defect(
        "prompts are padded on the left",
        "embedding",
        "padded on the left",
        ((ROWS, "        ids = torch.tensor([([0] * (longest - len(row)) + row)[start:stop] for row in rows])"),),
        prompts=(24, 19),
    ),
    Defect(
        "slots of padding are attended to",
        r"layers\.0\.heads",
        "slots that are not the text's|padding",
        ((MASK, "mask = slots <= position_ids[..., None].clamp(min=24 * (position_ids.shape[1] == 1))"),),
        prompts=(24, 15),
        step=1,
    ),
    Defect(
        "masked scores are finfo.min, where exp gives NaN",
        r"layers\.0\.heads",
        "NaN",
        (
            ("hidden = max(-1e9, torch.finfo(query.dtype).min / 2)", "hidden = torch.finfo(query.dtype).min"),
            (WEIGHTS, WEIGHTS_NAN),
        ),
    ),
    Defect("RMSNorm in bfloat16", r"layers\.\d\.(q|k|v|mlp)|final_norm", "RMSNorm in bfloat16", ((NORM, ""),), tp=1),
    Defect(
        "softmax in bfloat16",
        r"layers\.\d\.heads",
        "softmax in bfloat16",
        ((WEIGHTS, WEIGHTS_16),),
        prompts=(120,),
        tp=1,
    ),
    Defect(
        "positions of the rotary embedding in bfloat16",
        r"layers\.0\.q",
        "rotary angles in bfloat16",
        ((FREQS, "freqs = (position_ids[..., None].bfloat16() * self.inv_freq.bfloat16()).float()"),),
        prompts=(120,),
    ),
    # what else goes wrong
    Defect(
        "another eps",
        r"layers\.0\.q",
        "another eps.*0.01",
        (("self.variance_epsilon = eps", "self.variance_epsilon = 1e-2"),),
    ),
    Defect(
        "another theta",
        r"layers\.0\.q",
        "another theta.*10000",
        (('inv_freq = 1.0 / rope["rope_theta"] ** exponent', "inv_freq = 1.0 / 1e4**exponent"),),
        family="llama-3",
    ),
    Defect(
        "llama3's scaling of the frequencies is left out",
        r"layers\.0\.q",
        "rope scaling of config.json is left out",
        (("            inv_freq = compute_llama3_parameters(inv_freq, rope)", "            pass"),),
        prompts=(40,),
    ),
    Defect("q and k are in Meta's layout", r"layers\.0\.q", "Meta", change=meta_layout),
    Defect(
        "query heads meet KV heads in the order of tiles",
        r"layers\.0\.heads",
        "tiled",
        (
            (
                "    query = query.reshape(B, K, -1, D)",
                "    query = query.unflatten(1, (-1, K)).transpose(1, 2).flatten(1, 2)\n"
                "    query = query.reshape(B, K, -1, D)",
            ),
            (
                "    return attn_output.view(B, H, T, D)\n",
                "    attn_output = attn_output.view(B, H, T, D)\n"
                "    return attn_output.unflatten(1, (K, -1)).transpose(1, 2).flatten(1, 2)\n",
            ),
        ),
        tp=1,
    ),
    Defect("K and V are swapped on one rank", r"layers\.1\.k", "holds v|swapped", change=swap_k_v_on_rank_1),
    Defect(
        "query heads of one rank are rotated by one",
        r"layers\.2\.q",
        "another order",
        change=rotate_query_heads_of_rank_1,
    ),
    Defect(
        "gate and up are swapped",
        r"layers\.0\.mlp",
        "gate_proj and up_proj are swapped",
        (("self.act_fn(self.gate_proj(x)) * self.up_proj(x)", "self.act_fn(self.up_proj(x)) * self.gate_proj(x)"),),
    ),
    Defect("o_proj is that of the next layer", r"layers\.1\.attention", "that of layer 2", change=neighbours_o_proj),
    Defect("two layers are swapped", r"layers\.0\.(q|input_layernorm)", "those of layer 1", change=swap_layers),
    Defect("lm_head is of another revision", "logits", "another weight|revision", change=other_lm_head),
    Defect(
        "a bias is dropped",
        r"layers\.0\.attention",
        "bias of self_attn.o_proj is left out",
        change=no_o_proj_bias,
        family="granite-code",
    ),
    Defect(
        "a bias is added once per rank",
        r"layers\.0\.attention",
        "bias of self_attn.o_proj is added 2 times",
        ((ROW_BIAS, "        return y if self.bias is None else y + get_tensor_model_parallel_size() * self.bias"),),
        family="granite-code",
    ),
    Defect("one rank's shard is stale", r"layers\.1\.q", "another weight|revision", change=stale_shard),
    Defect(
        "a cache slot is written one too far",
        r"layers\.0\.heads",
        "one slot too far",
        ((WRITE, WRITE.replace(":, position_ids]", ":, (position_ids + 1).clamp(max=self.k.shape[2] - 1)]")),),
    ),
    Defect("gelu for silu", r"layers\.0\.mlp", "another activation: gelu", (('"silu": F.silu', '"silu": F.gelu'),)),
    Defect("a weight is rounded to fp8", r"layers\.1\.mlp", "up_proj is rounded to fp8", change=fp8_gate),
    # not on anybody's list
    Defect(
        "the scaling of scores is applied twice",
        r"layers\.0\.heads",
        "scores are scaled by 0.125",
        (("self.scaling = self.head_dim**-0.5", "self.scaling = 1 / self.head_dim"),),
    ),
    Defect(
        "the all-reduce after attention is missing",
        r"layers\.0\.attention",
        "only rank 0 is in the sum: the all-reduce is missing",
        (("    return torch.ops._c10d_functional.wait_tensor(summed)", "    return x"),),
    ),
    Defect(
        "rotate_half turns neighbours",
        r"layers\.0\.q",
        "takes neighbours",
        (
            (
                "    x1 = x[..., : x.shape[-1] // 2]\n    x2 = x[..., x.shape[-1] // 2 :]\n",
                "    x1 = x[..., ::2]\n    x2 = x[..., 1::2]\n",
            ),
            ("    return torch.cat((-x2, x1), dim=-1)", "    return torch.stack((-x2, x1), dim=-1).flatten(-2)"),
        ),
    ),
    Defect(
        "the norm's weight is 1 + weight",
        r"layers\.0\.q",
        "1 \\+ weight",
        (
            (
                "return self.weight * hidden_states.to(input_dtype)",
                "return (1 + self.weight) * hidden_states.to(input_dtype)",
            ),
        ),
    ),
    Defect(
        "the MLP's residual is the layer's input",
        r"layers\.0\.residual",
        "attention's output is not added",
        (
            ("        return residual + hidden_states\n", "        return layer_input + hidden_states\n"),
            (
                "        residual = hidden_states\n        hidden_states = self.input",
                "        residual = layer_input = hidden_states\n        hidden_states = self.input",
            ),
        ),
    ),
    Defect(
        "in decoding a step sees an empty slot",
        r"layers\.0\.heads",
        "not written yet",
        (
            (MASK, "mask = slots <= position_ids[..., None] + int(position_ids.shape[1] == 1)"),
            ("kv_length = int(next_position.max()) + 1", "kv_length = int(next_position.max()) + 2"),
        ),
        dtype="float32",
        step=1,
    ),
    Defect(
        "a window of eight positions",
        r"layers\.0\.heads",
        "the last 8 only",
        ((MASK, "mask = (slots <= position_ids[..., None]) & (slots > position_ids[..., None] - 8)"),),
    ),
    Defect(
        "embeddings are scaled",
        r"layers\.0\.mlp",
        "residual stream that is scaled by the root of the hidden size",
        (
            (
                "        hidden_states = self.embed_tokens(input_ids)  # B T E",
                "        hidden_states = self.embed_tokens(input_ids) * 8",
            ),
        ),
    ),
]


@pytest.fixture(scope="module")
def subject(hf_checkpoint: Callable, converted: Callable, on_ranks: Callable, tmp_path_factory: pytest.TempPathFactory):
    """subject(defect): the HF directory, and the file that tools.capture writes of the planted subject."""
    texts: dict[tuple, list] = {}

    def hf_texts(family: str, dtype: str, lengths: tuple[int, ...]) -> list[tuple[list[int], list[int]]]:
        key = family, dtype, lengths
        if key not in texts:
            model = load_hf(hf_checkpoint(family), getattr(torch, dtype))
            texts[key] = []
            for length in lengths:
                generator = torch.Generator().manual_seed(length)
                prompt = torch.randint(model.config.vocab_size, (length,), generator=generator).tolist()
                texts[key].append((prompt, run_hf(model, prompt, NEW)["ids"][length:].tolist()))
        return texts[key]

    def make(defect: Defect) -> tuple[Path, Path]:
        folder = tmp_path_factory.mktemp("defect")
        ckpt, hf = folder / "ckpt", hf_checkpoint(defect.family)
        with planted(defect.edits):
            settings = {"tp_degree": defect.tp, "dtype": defect.dtype} | dict(defect.settings)
            importlib.import_module("convert_weights").convert(hf, ckpt, **settings)
        if defect.change:
            files = sorted(ckpt.glob("tp*.safetensors"))
            metadata = [safe_open(file, "pt").metadata() for file in files]
            ranks = []
            for file in files:
                ranks.append({name: x.clone() for name, x in load_file(file).items()})
            defect.change(ranks)
            for path, tensors, facts in zip(files, ranks, metadata, strict=True):
                wide_first = sorted(tensors.items(), key=lambda item: -item[1].itemsize)
                with replacing(path) as file:
                    write_tensors(file, wide_first, len(tensors), facts, seal_of)
        prompts, forced = zip(*hf_texts(defect.family, defect.dtype, defect.prompts), strict=True)
        out = folder / "capture.safetensors"
        on_ranks(defect.tp, run_subject, defect.edits, ckpt, list(prompts), list(forced), out)
        return hf, out

    return make


def report_of(hf: Path, captured: Path, *flags: str) -> dict:
    return as_json(audit(parse_args(["--hf", str(hf), "--captured", str(captured), *flags])))


@pytest.mark.parametrize("defect", DEFECTS, ids=lambda defect: defect.name)
def test_a_planted_defect_is_found_and_its_cause_named(defect: Defect, subject: Callable) -> None:
    report = report_of(*subject(defect))
    assert not report["passed"]
    assert re.fullmatch(defect.place, report["first"]["place"]), report["verdict"]
    if defect.step is not None:
        assert report["first"]["step"] == defect.step, report["verdict"]
    assert re.search(defect.cause, report["causes"][0]["meaning"]), report["causes"]


FAMILIES = ("llama-2", "llama-3", "llama-3.1", "llama-3.2", "smollm2", "granite-code", "head_dim", "odd sizes")
CLEAN = list(itertools.product(FAMILIES, (1, 2, 4), ("bfloat16", "float32")))
CLEAN += itertools.product(("llama-3", "odd sizes"), (1, 2, 4), ("float16",))


@pytest.mark.parametrize(("family", "tp", "dtype"), CLEAN)
def test_a_clean_subject_passes(family: str, tp: int, dtype: str, subject: Callable) -> None:
    clean = Defect("none", "", "", family=family, tp=tp, dtype=dtype, prompts=(24, 17))
    report = report_of(*subject(clean))
    assert report["passed"], (report["verdict"], report["causes"])


# ---- other captures


@pytest.mark.parametrize("stack", ["nxdi", "vllm"])
def test_a_folder_of_another_stack_is_audited(stack: str, hf_checkpoint: Callable, tmp_path: Path) -> None:
    """HF's own tensors in another stack's files pass, and a change in one of them is found."""
    hf = hf_checkpoint("llama-3")
    texts = [hf_tensors(hf_model(hf, torch.float32), prompt) for prompt in CAPTURED_PROMPTS]
    folder = tmp_path / "capture"
    if stack == "nxdi":
        nxdi_folder(folder, texts, shard_heads(8, 2, 1), nxdi_modules(3))
        generated(folder, texts)
        file = folder / "captured_tensors_tkg_step_3_module_layers.1.mlp_output.pt"
    else:
        vllm_folder(folder, texts, shard_heads(8, 2, 1), 1)
        generated(folder, texts)
        file = next(folder.glob("dp0/decode_b*_1/model.layers.1.mlp/rank0.pt"))
    clean = report_of(hf, folder)
    assert clean["passed"], clean["verdict"]
    assert "layers.0.mlp" not in clean["not_seen"]
    torch.save(1.5 * torch.load(file), file)
    report = report_of(hf, folder)
    assert (report["first"]["place"], report["first"]["phase"]) == ("layers.1.mlp", "decode")
    assert re.search("a scale: the right values times 1.5", report["causes"][0]["meaning"])


def test_what_is_not_seen_is_listed_and_counts_nowhere(subject: Callable, tmp_path: Path) -> None:
    hf, captured = subject(Defect("none", "", "", tp=1))
    tensors, facts = load_file(captured), safe_open(captured, "pt").metadata()
    kept = {name: x for name, x in tensors.items() if not name.startswith("layers.1.")}
    part = tmp_path / "part.safetensors"
    save_file(kept, part, facts)
    report = report_of(hf, part)
    missing = ["q", "k", "v", "heads", "attention", "mlp"]
    assert report["passed"]
    assert report["not_seen"] == [f"layers.1.{kind}" for kind in missing]
    assert "6 not seen" in report["verdict"]


def test_bounds_by_name_come_before_the_built_in_ones(subject: Callable) -> None:
    hf, captured = subject(Defect("none", "", ""))
    strict = report_of(hf, captured, "--bound", r"layers\.1\.mlp=0.1")
    assert strict["first"]["place"] == "layers.1.mlp"
    wrong = subject(next(defect for defect in DEFECTS if defect.name == "gelu for silu"))
    assert not report_of(*wrong)["passed"]


# ---- the command


def test_the_command_audits_a_conversion_on_two_ranks(
    hf_checkpoint: Callable, converted: Callable, tmp_path: Path
) -> None:
    hf, ckpt = hf_checkpoint("llama-3"), converted("llama-3", 2, dtype="bfloat16")
    page, chart = tmp_path / "audit.html", tmp_path / "audit.png"
    words = ["--hf", hf, "--ckpt", ckpt, "--tp", 2, "--device", "cpu"]
    words += ["--prompt-ids", "5,11,2,60,33", "--prompt-ids", "7,1,40", "--new", 4]
    ran = command("-m", "tools.audit", *words, "--html", page, "--plot", chart)
    assert ran.returncode == 0, ran.stderr
    lines = ran.stdout.splitlines()
    assert lines[-1].startswith("passed: rounds as Hugging Face does at 24 places")
    assert sum(line.startswith("layers.2.heads") for line in lines) == 2  # prefill and decode
    assert lines[-1].split(";")[0] in page.read_text()
    assert chart.read_bytes()[:4] == b"\x89PNG"


def test_a_failed_audit_exits_with_1_and_prints_json_that_parses(subject: Callable) -> None:
    hf, captured = subject(next(defect for defect in DEFECTS if "finfo" in defect.name))
    ran = command("-m", "tools.audit", "--hf", hf, "--captured", captured, "--json")
    assert ran.returncode == 1, ran.stderr
    report = json.loads(ran.stdout, parse_constant=pytest.fail)  # NaN is no JSON
    assert report["first"]["place"] == "layers.0.heads"
    rows = [row for row in report["places"] if row["place"] == "layers.0.heads"]
    assert rows[0]["own_r"] == "nan"
    text = table(audit(parse_args(["--hf", str(hf), "--captured", str(captured)])))
    assert text.splitlines()[-1] == report["verdict"]


@pytest.mark.slow
def test_smollm2_is_bitwise_equal_on_one_rank_and_rounds_as_hf_does_on_two(
    smollm2: Path, smollm2_converted: Callable
) -> None:
    prompt = ["--hf", smollm2, "--device", "cpu", "--prompt", "The capital of France is"]
    one = command("-m", "tools.audit", *prompt, "--ckpt", smollm2_converted(1, "bfloat16"))
    assert one.returncode == 0, one.stdout + one.stderr
    if torch.cpu._is_avx512_bf16_supported():
        assert "passed: bitwise equal to Hugging Face in bfloat16 at 213 places" in one.stdout
    two = command("-m", "tools.audit", *prompt, "--ckpt", smollm2_converted(2, "bfloat16"))
    assert two.returncode == 0, two.stdout + two.stderr


MISTAKES = {
    "no subject": ([], "one of the arguments --ckpt --captured is required"),
    "no capture": (["--captured", "nowhere"], "nowhere is no capture"),
    "no conversion": (["--ckpt", "nowhere"], "--ckpt nowhere: it is not a complete conversion"),
    "no number": (["--captured", "nowhere", "--bound", "mlp"], "'mlp' is not REGEX=NUMBER"),
    "no expression": (["--captured", "nowhere", "--bound", "(=1"], "'(=1' is not REGEX=NUMBER"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_ends_in_one_line(
    mistake: str, hf_checkpoint: Callable, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    words, message = MISTAKES[mistake]
    monkeypatch.setattr(sys, "argv", ["audit.py", "--hf", str(hf_checkpoint("llama-3")), *words])
    with pytest.raises(SystemExit) as ended:
        run_command(main)
    assert ended.value.code == 2
    assert message in capsys.readouterr().err.splitlines()[-1]


def test_another_dtype_than_the_subjects_is_refused(hf_checkpoint: Callable, converted: Callable) -> None:
    ckpt = converted("llama-3", 1, dtype="bfloat16")
    words = ["--hf", str(hf_checkpoint("llama-3")), "--ckpt", str(ckpt), "--dtype", "float32"]
    with pytest.raises(UsageError, match=r"--dtype float32: --ckpt .* is in bfloat16"):
        audit(parse_args(words))

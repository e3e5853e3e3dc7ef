"""Frozen numbers: what Hugging Face computes for eight small Llamas in two dtypes, so that a change in numerics shows
on a machine without transformers, and where it begins.

    python -m tests.frozen    # remakes tests/frozen.json; takes its numbers from HF alone

Each line of the file is a family of `helpers.FAMILIES` in a dtype: the ids of a greedy search, and of each place of
`tools.audit`, in prefill and in decoding,

- the distance of HF in this dtype from HF in the next wider one: the largest difference of two numbers, relative to
  the root mean square. It bounds what is asked for where the same bits are not.
- the norm.
- some of the numbers, in as many digits as tell two numbers of the dtype apart.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from checkpoint.config import expected_shapes, llama_config, read_config
from tests import helpers
from tools.audit.judge import MODULES, layer_and_kind, place_names
from tools.audit.oracle import EXACT, OPTIONAL, load_hf, run_hf

FILE = Path(__file__).with_suffix(".json")
FAMILIES = ("llama-2", "llama-3", "llama-3.1", "llama-3.2", "smollm2", "granite-code", "head_dim", "odd sizes")
DIGITS = {"float32": 9, "bfloat16": 4}
PROMPT, NEW_TOKENS = [5, 11, 2, 60, 33, 47, 3, 64, 29, 8, 41], 7
PHASES = {"prefill": slice(0, len(PROMPT)), "decode": slice(len(PROMPT), None)}
MARGIN = 4  # distances: two models that round as HF does are two of them apart at most, give or take

# ---- checkpoints


def random_checkpoint(raw: dict, folder: Path, seed: int = 0) -> Path:
    """Writes a float32 checkpoint of a config.json in the layout of HF's files, by torch alone: uniform numbers with a
    standard deviation of 0.2, norms around 1. `torch.rand` has the same bits on every CPU, `torch.randn` has not."""
    (folder / "config.json").write_text(json.dumps(raw))
    shapes = expected_shapes(llama_config(read_config(folder)))
    generator, weights = torch.Generator().manual_seed(seed), {}
    for name, shape in sorted(shapes.items()):
        mean = float(name.endswith("norm.weight"))
        weights[name] = mean + 0.7 * (torch.rand(shape, generator=generator) - 0.5)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def family_checkpoint(family: str, folder: Path, **changes: object) -> Path:
    """That of a family; its seed is its name's."""
    raw = helpers.TINY | helpers.FAMILIES[family] | {"model_type": "llama", "dtype": "float32"} | changes
    return random_checkpoint(raw, folder, seed=sum(map(ord, family)))


# ---- the numbers


def walk(tensors: dict[str, Tensor]) -> Iterator[tuple[str, str, Tensor]]:
    """Place, phase and tensor [P,...] of a capture, or of HF, in the order of the data."""
    for place, name in place_names(helpers.TINY["num_hidden_layers"]).items():
        if layer_and_kind(place)[1] not in OPTIONAL:
            for phase, part in PHASES.items():
                yield place, phase, tensors[name][part]


def numbers(x: Tensor, place: str, dtype: str) -> list[float]:
    """The norm of a place, and 16 of the logits or 3 of its other numbers, evenly spread."""
    step = x.numel() // (16 if place == "logits" else 3)
    values = x.flatten()[step // 2 :: step].tolist()
    texts = [f"{x.double().norm():.9g}"] + [f"{value:.{DIGITS[dtype]}g}" for value in values]
    return [float(text) for text in texts]


def freeze(family: str, dtype: str) -> dict:
    """A line of the file."""
    kind = getattr(torch, dtype)
    with tempfile.TemporaryDirectory() as folder:
        hf = family_checkpoint(family, Path(folder))
        run = run_hf(load_hf(hf, kind), PROMPT, NEW_TOKENS)
        ids = run["ids"].tolist()[len(PROMPT) :]
        wide = run_hf(load_hf(hf, EXACT[kind]), PROMPT, NEW_TOKENS, forced=ids)
    line: dict = {"ids": ids}
    for (place, phase, x), (_, _, exact) in zip(walk(run), walk(wide), strict=True):
        largest, size = (x.double() - exact).abs().max(), x.double().pow(2).mean().sqrt()
        distance = float(f"{largest / size:.2g}")
        line.setdefault(place, {})[phase] = [distance, *numbers(x, place, dtype)]
    return line


def compare(line: dict, tensors: dict[str, Tensor], dtype: str, same_bits: bool) -> list[dict]:
    """Rows of a table: how far a place is from its frozen numbers, the norm relative to itself, others to their root
    mean square; and the bound, 0 if the same bits are asked for."""
    rows = []
    for place, phase, x in walk(tensors):
        distance, *frozen = line[place][phase]
        found, frozen = torch.tensor([numbers(x, place, dtype), frozen], dtype=torch.float64)
        size = torch.full_like(frozen, frozen[0] / x.numel() ** 0.5)
        size[0] = frozen[0]
        difference = float(((found - frozen).abs() / size).max())  # NaN stays NaN
        bound = 0.0 if same_bits else MARGIN * distance
        row = {"place": place, "phase": phase, "difference": difference, "bound": bound}
        rows.append(row | {"ok": difference <= bound})
    greedy = tensors["greedy"][len(PROMPT) - 1 :].tolist()
    other = sum(mine != theirs for mine, theirs in zip(greedy, line["ids"], strict=True)) / len(greedy)
    bound = 0.0 if same_bits or dtype == "float32" else 1.0  # rounding may decide
    rows.append({"place": "greedy ids", "phase": "decode", "difference": other, "bound": bound, "ok": other <= bound})
    return rows


def table(rows: list[dict], title: str) -> str:
    """Rows as `tools.audit` prints its own, and the first that is out of bounds."""
    lines = [title, f"{'place':34}{'phase':8} {'difference':>11}{'bound':>9}"]
    for row in rows:
        mark = "" if row["ok"] else "  out of bounds"
        lines.append(f"{row['place']:34}{row['phase']:8} {row['difference']:11.2g}{row['bound']:9.2g}{mark}")
    failed = [row for row in rows if not row["ok"]]
    if failed:
        first = failed[0]
        layer, kind = layer_and_kind(first["place"])
        module = MODULES.get(kind, "the greedy choice")
        if layer is not None:
            module = f"layer {layer}, {module}"
        lines.append(f"FAILED at {module} ({first['place']}), {first['phase']}: first of {len(failed)} out of bounds")
    return "\n".join(lines)


def instructions() -> str:
    """What adds up bfloat16 products here. Another kind may add in another order."""
    if torch.cpu._is_amx_tile_supported():
        return "AMX"
    return "AVX512_BF16" if torch.cpu._is_avx512_bf16_supported() else "none of bfloat16"


def main() -> None:
    torch.set_num_threads(1)
    made = {"command": "python -m tests.frozen", "instructions": instructions()}
    made |= {"torch": torch.__version__.partition("+")[0], "transformers": version("transformers")}
    entries = {"made": made}
    for family in FAMILIES:
        for dtype in DIGITS:
            entries[f"{family} {dtype}"] = freeze(family, dtype)
    lines = [f"{json.dumps(key)}: {json.dumps(entry, separators=(',', ':'))}" for key, entry in entries.items()]
    FILE.write_text("{\n" + ",\n".join(lines) + "\n}\n")


if __name__ == "__main__":
    main()

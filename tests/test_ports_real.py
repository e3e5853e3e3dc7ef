"""The ports that docs/ports.md is about, from their own sources: a part of its tables and of its list of defects.

    NXD_SRC=neuronx-distributed/src NXDI_SRC=neuronx-distributed-inference/src OPTIMUM_SRC=optimum-neuron \\
        EXAMPLE_SRC=neuronx-distributed/examples/inference/llama python -m pytest tests/test_ports_real.py

A port without its variable is skipped, and so is everything under transformers 5: they need transformers 4.57, and
boto3, tenacity, protobuf, accelerate and, for Optimum Neuron, optimum. A defect that a later version of a port has
mended fails here: then docs/ports.md is to be changed.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from llama_neuron import UsageError
from tests.helpers import FAMILIES, TINY, command, hf_model
from tools.ports.command import PORTS

transformers = pytest.importorskip("transformers")
if find_spec("transformers.utils.fx") is None:
    pytest.skip("the ports need transformers 4.57", allow_module_level=True)

NEEDED = {
    "nxdi": ("NXD_SRC", "NXDI_SRC"),
    "optimum": ("NXD_SRC", "OPTIMUM_SRC"),
    "example": ("NXD_SRC", "EXAMPLE_SRC"),
    "experimental": ("NXD_SRC", "NXDI_SRC"),
}
PROMPTS = [[5, 11, 2, 60, 33, 47, 3], [7, 1, 40]]
NEW = 4


def check_sources(port: str) -> None:
    for variable in NEEDED[port]:
        if variable not in os.environ:
            pytest.skip(f"{variable} is not set")


def capture(port: str, hf: Path, out: Path, *, tp: int = 1, dtype: str = "float32") -> dict[str, Tensor]:
    check_sources(port)
    module, function = PORTS[port]
    driver = getattr(import_module(f"tools.ports.{module}"), function)
    driver(hf, out, prompts=PROMPTS, new_tokens=NEW, tp=tp, device="cpu", dtype=dtype)
    return load_file(out / "capture.safetensors")


@torch.inference_mode()
def exact(hf: Path, ids: Tensor) -> Tensor:
    """HF's logits [B,M,V] in float64, of the ids that a port was fed."""
    model = hf_model(hf, torch.float64)
    rows = []
    for prompt, row in zip(PROMPTS, ids, strict=True):
        length = len(prompt) + NEW - 1
        rows.append(model(row[None, :length]).logits[0, -NEW:])
    return torch.stack(rows)


def error(captured: dict[str, Tensor], hf: Path) -> float:
    """How far a port's logits are from HF's, in the size of HF's."""
    logits = exact(hf, captured["ids"])
    return float((captured["logits"] - logits).norm() / logits.norm())


RIGHT = [
    ("nxdi", "llama-3.2", 1),
    ("nxdi", "llama-3", 4),
    ("nxdi", "granite-code", 2),
    ("nxdi", "smollm2", 3),
    ("optimum", "llama-3.1", 2),
    ("optimum", "smollm2", 2),
    ("example", "smollm2", 1),
    ("experimental", "smollm2", 1),
]


@pytest.mark.slow
@pytest.mark.parametrize(("port", "family", "tp"), RIGHT)
def test_a_port_computes_what_hf_does(port: str, family: str, tp: int, hf_checkpoint: Callable, tmp_path: Path) -> None:
    hf = hf_checkpoint(family)
    captured = capture(port, hf, tmp_path, tp=tp)
    assert error(captured, hf) < 1e-5
    assert captured["logits"].argmax(-1).tolist() == [
        row[len(prompt) : len(prompt) + NEW].tolist() for prompt, row in zip(PROMPTS, captured["ids"], strict=True)
    ]
    layers = TINY["num_hidden_layers"]
    config = transformers.AutoConfig.from_pretrained(hf)
    for number in range(layers):
        assert captured[f"layers.{number}.q"].shape[2:] == (config.num_attention_heads, config.head_dim)
        assert captured[f"layers.{number}.k"].shape[2:] == (config.num_key_value_heads, config.head_dim)


@pytest.mark.slow
@pytest.mark.parametrize("port", ["nxdi", "optimum"])
def test_ranks_in_bfloat16_round_as_hf_does(port: str, hf_checkpoint: Callable, tmp_path: Path) -> None:
    hf = hf_checkpoint("llama-3")
    assert error(capture(port, hf, tmp_path, tp=2, dtype="bfloat16"), hf) < 0.05


FAILS = [
    ("nxdi", "smollm2", 2, "split_with_sizes"),  # KV heads are padded as if they were not copied yet
    ("optimum", "llama-3.2", 1, "split_with_sizes"),  # KV heads are padded as if they were copied
    ("optimum", "smollm2", 1, "split_with_sizes"),
    ("optimum", "head_dim", 2, "must match the size of tensor b"),  # the rotary embedding has hidden_size / heads
    (
        "example",
        "tinyllama",
        2,
        "(expected shape|IndexError)",
    ),  # fewer ranks than KV heads; each rank has its own error
    ("example", "smollm2", 2, "not evenly divisible"),
    ("experimental", "tinyllama", 2, "expected shape"),
    ("experimental", "smollm2", 2, "no attribute 'n_heads'"),
]


@pytest.mark.slow
@pytest.mark.parametrize(("port", "family", "tp", "reason"), FAILS)
def test_a_layout_that_a_port_cannot_load_is_one_line(
    port: str, family: str, tp: int, reason: str, hf_checkpoint: Callable, tmp_path: Path
) -> None:
    with pytest.raises(UsageError, match="the port raises .*" + reason) as raised:
        capture(port, hf_checkpoint(family), tmp_path / "out", tp=tp)
    assert "\n" not in str(raised.value)
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_the_command_says_what_a_port_raised_and_ends_with_2(hf_checkpoint: Callable, tmp_path: Path) -> None:
    check_sources("nxdi")
    ended = command("-m", "tools.ports", "nxdi", "--hf", hf_checkpoint("smollm2"), "--tp", 2, "--out", tmp_path / "out")
    assert ended.returncode == 2
    assert "error: the port raises RuntimeError: split_with_sizes" in ended.stderr.splitlines()[-1]


WRONG = [
    ("optimum", "granite-code"),  # attention_bias is ignored
    ("example", "llama-3"),  # lm_head is overwritten with the embedding
    ("example", "llama-3.2"),  # the rope scaling is ignored
    ("experimental", "llama-3"),
    ("experimental", "llama-3.2"),
]


@pytest.mark.slow
@pytest.mark.parametrize(("port", "family"), WRONG)
def test_what_a_port_gets_wrong_without_a_word(port: str, family: str, hf_checkpoint: Callable, tmp_path: Path) -> None:
    hf = hf_checkpoint(family)
    assert error(capture(port, hf, tmp_path), hf) > 0.1


@pytest.mark.slow
@pytest.mark.parametrize("port", ["nxdi", "optimum"])
def test_the_last_ids_of_a_vocabulary_that_is_padded_are_masked(
    port: str, hf_checkpoint: Callable, tmp_path: Path
) -> None:
    """67 ids on 2 ranks: id 66 can never be chosen. The others are right."""
    hf = hf_checkpoint("negative logits")
    captured = capture(port, hf, tmp_path, tp=2)
    masked = captured["logits"] < -1e30
    assert masked.nonzero()[:, -1].unique().tolist() == [FAMILIES["negative logits"]["vocab_size"] - 1]
    logits = exact(hf, captured["ids"])
    kept = torch.where(masked, logits, captured["logits"])
    assert (kept - logits).norm() < 1e-5 * logits.norm()


@pytest.mark.slow
@pytest.mark.parametrize("port", ["nxdi", "optimum"])
def test_theta_in_the_form_of_transformers_5_is_read_as_10000(
    port: str, hf_checkpoint: Callable, tmp_path: Path
) -> None:
    """With the config of transformers 5 the ports compute what HF computes with theta 1e4."""
    hf = hf_checkpoint("llama-3")
    folders = {}
    for name, change in {"new": "rope_parameters", "low": "rope_theta"}.items():
        folders[name] = tmp_path / name
        folders[name].mkdir()
        (folders[name] / "model.safetensors").symlink_to(hf / "model.safetensors")
        config = json.loads((hf / "config.json").read_text())
        theta = config.pop("rope_theta")
        config.pop("rope_scaling", None)
        config[change] = 1e4 if name == "low" else {"rope_type": "default", "rope_theta": theta}
        (folders[name] / "config.json").write_text(json.dumps(config))
    captured = capture(port, folders["new"], tmp_path / "out")
    assert error(captured, hf) > 0.1
    assert error(captured, folders["low"]) < 1e-5

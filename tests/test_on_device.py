"""The model on a Neuron device against Hugging Face on the CPU: `python -m pytest -m neuron`.

These tests run where `--device auto` takes nxd or neuron, and this host has /dev/neuron* or torch knows an accelerator:
packages alone, on a host that only builds, are not enough. Each conversion means new graphs, so on a device they take
as long as its compiler does. No NeuronCore has run them yet.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from llama_neuron import choose_device
from tests.helpers import command, hf_greedy, hf_model
from tools.doctor import neuron_cores

DEVICE = choose_device("auto")
HAS_DEVICE = DEVICE != "cpu" and (any(Path("/dev").glob("neuron[0-9]*")) or torch.accelerator.is_available())
pytestmark = [pytest.mark.neuron, pytest.mark.skipif(not HAS_DEVICE, reason="no Neuron device here")]

PROMPTS, NEW_TOKENS = [[5, 11, 2, 60, 33, 47, 3], [7, 1, 40]], 8
SHAPE = {"batch_size": len(PROMPTS), "sequence_length": 64}
# heads/KV heads 8/2 (at tp 8 with copies), 9/3 (at tp 2 with copies and padding), 6/3 (with biases and odd sizes)
FAMILIES = ["llama-3.1", "smollm2", "odd sizes"]


def generate(ckpt: Path, **variables: str) -> dict:
    """The JSON of the command."""
    prompts = [f"--prompt-ids={','.join(map(str, prompt))}" for prompt in PROMPTS]
    flags = ["--ckpt", ckpt, "--device", "auto", *prompts, "--max-new-tokens", NEW_TOKENS, "--ignore-eos", "--json"]
    done = command("llama_neuron.py", *flags, **variables)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def ids_of(result: dict) -> list[list[int]]:
    return [row["ids"] for row in result["completions"]]


@pytest.fixture(scope="module")
def cores() -> int:
    return neuron_cores() or torch.accelerator.device_count() or 1


@pytest.mark.parametrize("tp", [1, 2, 8])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_batch_of_two_gets_hfs_ids(
    family: str, tp: int, cores: int, hf_checkpoint: Callable, converted: Callable
) -> None:
    if tp > cores:
        pytest.skip(f"{cores} NeuronCores are here")
    hf = hf_model(hf_checkpoint(family), torch.float32)
    result = generate(converted(family, tp, **SHAPE))
    assert result["config"]["device"] == DEVICE
    assert ids_of(result) == [hf_greedy(hf, prompt, NEW_TOKENS)[1] for prompt in PROMPTS]


@pytest.mark.parametrize("tp", [1, 2])
def test_an_audit_passes(tp: int, cores: int, hf_checkpoint: Callable, converted: Callable) -> None:
    """Of every tensor that `tools.capture` sees on the device, in float32."""
    if tp > cores:
        pytest.skip(f"{cores} NeuronCores are here")
    prompts = [f"--prompt-ids={','.join(map(str, prompt))}" for prompt in PROMPTS]
    flags = ["--hf", hf_checkpoint("llama-3.1"), "--ckpt", converted("llama-3.1", tp, **SHAPE), *prompts]
    done = command("-m", "tools.audit", *flags, "--new", NEW_TOKENS)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.splitlines()[-1].startswith("passed: ")


def test_a_second_start_compiles_nothing(converted: Callable, tmp_path: Path) -> None:
    """It adds nothing to what the first one kept, and its first call is faster."""
    folders = {"TORCHINDUCTOR_CACHE_DIR": "code", "TORCH_NEURONX_NEFF_CACHE_DIR": "neff"}
    variables = {name: str(tmp_path / folder) for name, folder in folders.items()}
    first = generate(converted("smollm2", **SHAPE), **variables)
    kept = {path for path in tmp_path.rglob("*") if path.is_file()}
    if not kept:
        pytest.skip("this device keeps no graphs here")
    second = generate(converted("smollm2", **SHAPE), **variables)
    assert {path for path in tmp_path.rglob("*") if path.is_file()} == kept
    assert ids_of(second) == ids_of(first)
    seconds = [result["timings"]["compile_s"] + result["timings"]["prefill_s"] for result in (first, second)]
    assert seconds[1] < seconds[0]

"""tools.doctor on a healthy CPU, with a planted fault, and with packages and commands that raise, crash or hang."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.helpers import ROOT, command
from tools.doctor import execute, neuron_cores

STEPS = ["--device cpu", "Hugging Face", "convert, tp 1", "convert, tp 2", "run on cpu, tp 1", "logits on cpu, tp 1"]
STEPS += ["audit of cpu, tp 1", "run on cpu, tp 2"]


def write_package(folder: Path, name: str, source: str) -> None:
    (folder / name).mkdir(parents=True)
    (folder / name / "__init__.py").write_text(source)


# ---- a healthy CPU


@pytest.fixture(scope="module")
def healthy(tmp_path_factory: pytest.TempPathFactory) -> subprocess.CompletedProcess:
    """The doctor's JSON on the CPU, where one variable is set and two packages break."""
    folder = tmp_path_factory.mktemp("packages")
    write_package(folder, "neuronx_distributed", "raise ImportError('libnrt.so.1: cannot open shared object file')")
    write_package(folder, "torch_neuronx", "import os; os.abort()")
    variables = {"PYTHONPATH": str(folder), "NEURON_RT_STOCHASTIC_ROUNDING_EN": "1"}
    return command("-m", "tools.doctor", "--device", "cpu", "--json", **variables)


@pytest.mark.slow
def test_on_a_healthy_cpu_every_step_is_right(healthy: subprocess.CompletedProcess) -> None:
    pytest.importorskip("transformers")
    assert (healthy.returncode, healthy.stderr) == (0, "")
    found = json.loads(healthy.stdout)
    assert (found["passed"], found["device"]) == (True, "cpu")
    steps = [step for step in STEPS if "tp 2" not in step or os.cpu_count() > 1]
    assert [(step["name"], step["ok"]) for step in found["steps"]] == [(name, True) for name in steps]
    assert found["versions"]["torch"].startswith("2.")


@pytest.mark.slow
def test_a_variable_that_is_set_is_reported_with_what_it_does(healthy: subprocess.CompletedProcess) -> None:
    found = json.loads(healthy.stdout)["environment"]
    expected = "1 (1: rounds at random, so that results do not repeat)"
    assert found["NEURON_RT_STOCHASTIC_ROUNDING_EN"] == expected


@pytest.mark.slow
def test_packages_that_raise_or_crash_when_imported_are_reported(healthy: subprocess.CompletedProcess) -> None:
    found = json.loads(healthy.stdout)["paths"]
    raised = "import neuronx_distributed: ImportError: libnrt.so.1: cannot open shared object file (exit code 1)"
    assert raised in found["--device nxd"]
    assert "import torch_neuronx: nothing on stderr (ended by SIGABRT)" in found["--device neuron"]
    assert "no torch_xla" in found["--device nxd"]


# ---- faults


@pytest.mark.slow
def test_a_wrong_rotary_sign_is_found_although_the_runtime_crashes(tmp_path: Path) -> None:
    """In a copy of the repository, on a host where `import torch` dies while it loads TorchNeuron."""
    pytest.importorskip("transformers")
    copy, packages = tmp_path / "copy", tmp_path / "packages"
    ignored = shutil.ignore_patterns(".*", "__pycache__", "tests", "docs")
    shutil.copytree(ROOT, copy, ignore=ignored)
    source = (copy / "llama_neuron.py").read_text()
    right = "torch.cat((-x2, x1), dim=-1)"
    assert source.count(right) == 1
    (copy / "llama_neuron.py").write_text(source.replace(right, "torch.cat((x2, x1), dim=-1)"))
    write_package(packages, "torch_neuronx", "import os; os.abort()")
    (packages / "torch_neuronx-1.0.dist-info").mkdir()
    (packages / "torch_neuronx-1.0.dist-info" / "METADATA").write_text("Name: torch-neuronx\nVersion: 1.0\n")
    entry_point = "[torch.backends]\ntorch_neuronx = torch_neuronx:autoload\n"
    (packages / "torch_neuronx-1.0.dist-info" / "entry_points.txt").write_text(entry_point)

    line = [sys.executable, "-m", "tools.doctor"]
    variables = os.environ | {"PYTHONPATH": str(packages)}
    done = subprocess.run(line, cwd=copy, env=variables, capture_output=True, text=True, timeout=300)
    assert (done.returncode, done.stderr) == (1, "")
    verdicts = dict(row.split(": ", 1) for row in done.stdout.splitlines() if not row.startswith("paths"))
    assert "torch-neuronx 1.0" in verdicts["versions"]
    assert verdicts["--device auto"].startswith("FAILED: nothing on stderr (ended by SIGABRT)")
    assert verdicts["convert, tp 1"].startswith("ok")
    assert verdicts["run on cpu, tp 1"].startswith("FAILED: other ids than Hugging Face")
    assert verdicts["logits on cpu, tp 1"].startswith("FAILED: within ")
    assert verdicts["audit of cpu, tp 1"].startswith("FAILED: at layer 0, ")
    failed = ["--device auto", "run on cpu, tp 1", "logits on cpu, tp 1", "audit of cpu, tp 1"]
    assert verdicts["verdict"].startswith(f"FAILED: {'; '.join(failed)}")


def test_a_command_that_hangs_is_ended_with_all_that_it_has_started() -> None:
    began = time.perf_counter()
    ran = execute(["bash", "-c", "sleep 543 & echo $!; wait"], 1)
    assert (ran.code, ran.error()) == (None, "no end after 1 s")
    assert time.perf_counter() - began < 10
    for _ in range(50):  # the system may take a moment to forget it
        if not Path("/proc", ran.out.strip()).exists():
            return
        time.sleep(0.1)
    raise AssertionError(f"process {ran.out.strip()} is still there")


TORCHRUN = """
[rank0]: Traceback (most recent call last):
[rank0]:   File "llama_neuron.py", line 1, in <module>
[rank0]: RuntimeError: the process group takes tensors on neuron, not on cpu
torch.distributed.elastic.multiprocessing.errors.ChildFailedError:
============================================================
"""
ENDS = {
    "a user's mistake": ("x.py: error: give --tp\n", "x.py: error: give --tp (exit code 3)"),
    "a traceback": ("Traceback\n  File\nOSError: no\x1b[31m disk\n", "OSError: no [31m disk (exit code 3)"),
    "a traceback with advice": (
        "RuntimeError: neuron\n\nSet TORCHDYNAMO_VERBOSE=1\n",
        "RuntimeError: neuron (exit code 3)",
    ),
    "torchrun": (
        TORCHRUN,
        "[rank0]: RuntimeError: the process group takes tensors on neuron, not on cpu (exit code 3)",
    ),
    "words": ("first\nlast\n", "last (exit code 3)"),
    "silence": ("", "nothing on stderr (exit code 3)"),
}


@pytest.mark.parametrize("end", ENDS)
def test_of_what_a_command_says_the_error_is_kept(end: str) -> None:
    stderr, expected = ENDS[end]
    script = f"import sys; sys.stderr.write({stderr!r}); sys.exit(3)"
    assert execute([sys.executable, "-c", script]).error() == expected


# ---- flags, cores


def test_a_wrong_flag_ends_in_one_line_and_exit_code_2() -> None:
    done = command("-m", "tools.doctor", "--device", "nueron")
    assert (done.returncode, done.stdout) == (2, "")
    assert "argument --device: invalid choice: 'nueron'" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize(
    ("name", "value", "cores"),
    [
        ("NEURON_RT_NUM_CORES", "4", 4),
        ("NEURON_RT_VISIBLE_CORES", "3", 1),
        ("NEURON_RT_VISIBLE_CORES", "0,2-5", 5),
        ("NEURON_RT_VISIBLE_CORES", "all", None),
    ],
)
def test_cores_are_those_that_the_environment_leaves(
    name: str, value: str, cores: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", "")
    monkeypatch.setenv(name, value)
    assert neuron_cores() == cores


def test_else_cores_are_those_that_neuron_ls_lists(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    devices = [{"neuron_device": number, "nc_count": 4, "memory_size": 103079215104} for number in range(2)]
    (tmp_path / "neuron-ls").write_text(f"#!/bin/sh\n[ $1 = -j ] && echo '{json.dumps(devices)}'\n")
    (tmp_path / "neuron-ls").chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert neuron_cores() == 8
    (tmp_path / "neuron-ls").write_text("#!/bin/sh\necho 'no driver' >&2\nexit 1\n")
    assert neuron_cores() is None

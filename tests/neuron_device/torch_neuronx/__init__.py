"""A stand-in for TorchNeuron, for tests on a machine without a Neuron device.

With the folder above this one on PYTHONPATH, `import torch` finds a device `neuron`, a process group `neuron` and a
`torch.compile` backend `neuron`, as it does where AWS's package is installed. They obey what AWS's documents say, here
with their titles:

- A device's memory is apart from the CPU's, and a host has several devices, of which each process chooses one.
- The process group takes tensors of the device alone, and exists before the device is used ("How to use
  torch.distributed on Neuron"). It may be part of "cpu:gloo,neuron:neuron", as in vLLM Neuron.
- Graphs have static shapes ("torch.compile backend reference"), known operators, and outputs that alias the inputs
  which are written to ("Aliasing output rewrite pass"); see `compiler.py`.
- Operators run outside of graphs too ("What is TorchNeuron?"). They are counted.

It is no evidence about neuronx-cc, the runtime, or numerics on a NeuronCore: operators are those of the CPU.

Environment: STAND_IN_DEVICE is another name for the device, whose process group is then called NAMEccl, as CUDA's is
nccl. STAND_IN_REPORT is a folder in which each process that has compiled or used a device writes `RANK.json`.
"""

import atexit
import fcntl
import hashlib
import json
import os
import subprocess
import sys
import sysconfig
import types
from importlib.machinery import ExtensionFileLoader
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path

import torch
import torch.distributed as dist

DEVICE = os.environ.get("STAND_IN_DEVICE", "neuron")
GROUP = DEVICE if DEVICE == "neuron" else f"{DEVICE}ccl"
SOURCE = Path(__file__).with_name("neuron_device.cpp")
graphs: list[dict] = []  # what `compiler.py` says of each graph


def build() -> Path:
    """The library of SOURCE for this Python and torch. It is compiled once: other processes wait for the first."""
    digest = hashlib.sha256(SOURCE.read_bytes() + f"{sys.version} {torch.__version__}".encode()).hexdigest()[:16]
    cache = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache"), "neuron_device")
    library = cache / digest / "neuron_device.so"
    library.parent.mkdir(parents=True, exist_ok=True)
    with open(library.with_suffix(".lock"), "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not library.exists():
            home, unfinished = Path(torch.__file__).parent, library.with_suffix(".unfinished")
            headers = home / "include", home / "include/torch/csrc/api/include", sysconfig.get_path("include")
            line = [
                os.environ.get("CXX", "g++"),
                "-std=c++20",
                "-O1",
                "-shared",
                "-fPIC",
                "-w",
                "-o",
                unfinished,
                SOURCE,
            ]
            line += [f"-I{folder}" for folder in headers]
            line += [f"-L{home / 'lib'}", "-lc10", "-ltorch_cpu", "-ltorch", "-ltorch_python"]
            subprocess.run(line, check=True)
            unfinished.rename(library)
    return library


def load(library: Path) -> types.ModuleType:
    """The module in a library."""
    spec = spec_from_file_location("neuron_device", library, loader=ExtensionFileLoader("neuron_device", str(library)))
    module = module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


native = load(build())


def make_group(store: dist.Store, rank: int, size: int, timeout: object) -> dist.Backend:
    return native.make_group(dist.ProcessGroupGloo(store, rank, size, timeout), GROUP)


def write_report() -> None:
    """What this process did with the device, for the tests."""
    report = {"device": native.current_device(), "graphs": graphs, "eager": native.eager()}
    if graphs or report["eager"]:
        Path(os.environ["STAND_IN_REPORT"], f"{os.environ.get('RANK', 0)}.json").write_text(json.dumps(report))


def autoload() -> None:
    """torch calls it when it is imported (entry point torch.backends)."""
    torch.utils.rename_privateuse1_backend(DEVICE)
    device = types.ModuleType(f"torch.{DEVICE}")
    device.is_available = lambda: True
    device.device_count = native.device_count
    device.current_device = native.current_device
    device.set_device = torch.accelerator.set_device_index
    device._is_in_bad_fork = lambda: False
    device.manual_seed_all = lambda seed: None
    torch._register_device_module(DEVICE, device)
    dist.Backend.register_backend(GROUP, make_group, devices=[DEVICE])
    if "STAND_IN_REPORT" in os.environ:
        atexit.register(write_report)

"""Runs AWS's NxD core (github.com/aws-neuron/neuronx-distributed, open source) on a CPU.

Set NXD_SRC to the `src` folder of its checkout. The closed packages that it imports are answered by the stand-ins in
`closed`, unless the real ones are installed. torch_xla is the real one, on which torch-neuronx is built.

    CLOSED  what stands in for the real packages, or None if they are installed
    PATHS   what a command needs in PYTHONPATH
"""

from __future__ import annotations

import os
import sys
from importlib.util import find_spec
from pathlib import Path

# Read when torch_xla is imported: AWS's default, where torch_xla's own is 0; its device; compilation in half the time;
# and how many graphs it keeps, each of which holds many of the memory maps that a process may have
os.environ.setdefault("XLA_DISABLE_FUNCTIONALIZATION", "1")
os.environ.setdefault("PJRT_DEVICE", "CPU")
os.environ.setdefault("XLA_FLAGS", "--xla_llvm_disable_expensive_passes=true")
os.environ.setdefault("XLA_COMPILATION_CACHE_SIZE", "16")

PATHS = list(filter(None, os.environ.get("NXD_SRC", "").split(os.pathsep)))
CLOSED = None
if PATHS and find_spec("torch_neuronx") is None:
    CLOSED = Path(__file__).with_name("closed")
    PATHS.append(str(CLOSED))
sys.path += PATHS

"""`NxDModel.save` and `load` without TorchScript, which can hold AWS's SPMDModel, written in C++, and not ours.

In place of a script there is a pickle with what NxD's `load` reads of it.
"""

from __future__ import annotations

import pickle
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import patch

import torch
from torch import nn

KEPT = ("world_size", "layout_transformer", "model_params", "reserved_example_inputs", "reserved_example_outputs")
KEPT += ("input_shape_map", "spmd_models", "weights", "states")
load_script = torch.jit.load


class Saved(SimpleNamespace):
    """What `torch.jit.load` returns of it."""

    def save(self, path: str, _extra_files: object = None) -> None:
        Path(path).write_bytes(pickle.dumps(self))


def script(module: nn.Module) -> Saved:
    from neuronx_distributed.trace.nxd_model.utils import get_dtype_enum

    model = module.nxd_model
    kept = SimpleNamespace(original_name="NxDModel", **{name: getattr(model, name) for name in KEPT})
    states = model.state_initializer
    dtypes = {name: get_dtype_enum(dtype) for name, dtype in states.dtypes.items()}
    kept.state_initializer = SimpleNamespace(shapes=states.shapes, dtypes=dtypes)
    metadata = {"flattener_metadata": module.flattener_metadata, "packer_metadata": module.packer_metadata}
    return Saved(original_name="TorchScriptNxDModel", nxd_model=kept, **metadata)


@contextmanager
def scripting() -> Iterator[None]:
    with patch("torch.jit.script", script):
        yield


def load(path: str, *args: object, **settings: object) -> object:
    content = Path(path).read_bytes()
    if content.startswith(b"PK"):  # TorchScript is a zip file
        return load_script(path, *args, **settings)
    return pickle.loads(content)


torch.jit.load = load

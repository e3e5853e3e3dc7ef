"""Compiled code that is kept from one run to the next, and the processes that make it.

Loading code means running it, so it has to be this user's own: its folder and files must belong to this user, and
nobody else may write there. A file's name ends with a digest of its content; a damaged file is not found, and is made
again.
"""

from __future__ import annotations

import hashlib
import inspect
import os
import shutil
import signal
import stat
import tempfile
from collections.abc import Callable
from functools import partial
from hashlib import sha256
from pathlib import Path

import torch.distributed as dist
from torch import nn

import llama_neuron
from launch.ranks import die_with_parent, fork

OTHER_FOLDER = "name a folder of your own by TORCHINDUCTOR_CACHE_DIR"


def is_own(path: Path) -> bool:
    """Whether a file or folder is this user's, and nobody else's to write."""
    status = path.lstat()
    shared = stat.S_ISLNK(status.st_mode) or status.st_mode & (stat.S_IWGRP | stat.S_IWOTH)
    return status.st_uid == os.geteuid() and not shared


def open_folder(folder: str | Path | None) -> Path:
    """The folder, made if it is not there. None stands for $TORCHINDUCTOR_CACHE_DIR, or ~/.cache/llama_neuron.

    Raises OSError if it cannot be made or somebody else may write there.
    """
    folder = Path(folder or os.environ.get("TORCHINDUCTOR_CACHE_DIR") or "~/.cache/llama_neuron")
    try:
        folder = folder.expanduser().resolve()
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    except (OSError, RuntimeError) as error:  # RuntimeError: there is no home
        kind = type(error) if isinstance(error, OSError) else OSError
        raise kind(f"{folder} cannot hold compiled code ({error}): {OTHER_FOLDER}") from None
    if not is_own(folder):
        fix = f"`chmod go-w {folder}`, or {OTHER_FOLDER}"
        raise OSError(f"{folder} is for compiled code, and others may write there: {fix}")
    return folder


def parts(file: Path) -> list[Path]:
    """A file and what AOTInductor wrote beside it, if it did."""
    return [part for part in (file.with_suffix(".json"), file) if part.exists()]


class Kept:
    """A piece of code in a folder (see `open_folder`), by a name that says what it depends on."""

    def __init__(self, name: str, folder: str | Path | None = None) -> None:
        self.name = name
        self.folder = open_folder(folder)

    def named(self, file: Path) -> str:
        """The name with a digest of the content."""
        content = hashlib.sha256()
        for part in parts(file):
            content.update(part.read_bytes())
        return f"{self.name}-{content.hexdigest()[:16]}"

    def find(self) -> Path | None:
        """The file, if it is this user's and as it was made. Any other of this name is removed."""
        for file in sorted(self.folder.glob(f"{self.name}-*")):
            if file.suffix == ".json":
                continue
            if all(map(is_own, parts(file))) and file.stem == self.named(file):
                return file
            file.unlink(missing_ok=True)
        return None

    def keep(self, made: Path) -> None:
        """Moves a file, made on the same disk, to where `find` finds it."""
        name = self.named(made)
        for part in parts(made):  # the file itself is the last: where it is, all is
            part.chmod(0o600)
            os.replace(part, self.folder / f"{name}{part.suffix}")

    def save(self, write: Callable[[str], object]) -> None:
        """Keeps what write(path) writes."""
        made = self.folder / f"{self.name}.pt"
        write(str(made))
        self.keep(made)


# ---- code of cpu/


def find_or_make(jobs: dict[str, Callable[[str], Path]], folder: str | Path | None = None) -> list[Path]:
    """A file of code for each name: the one that is kept, else what `jobs[name]` makes in a folder that it is given, in
    a process of its own, with which the compiler's memory goes. Every rank of a process group calls this; rank 0
    compiles. Raises OSError if `folder` (see `open_folder`) cannot be used, ValueError for ranks over gloo, and what a
    job raises."""
    if dist.is_initialized() and dist.get_backend() == "gloo":
        raise ValueError("compiled code would wait for gloo forever, because it holds Python's lock: use shared_memory")
    kept = [Kept(name, folder) for name in jobs]
    missing = [code for code in kept if code.find() is None]
    if missing and (not dist.is_initialized() or dist.get_rank() == 0):
        try:
            with tempfile.TemporaryDirectory(dir=open_folder(folder)) as scratch:
                fork(partial(compile_file, missing, jobs, scratch), len(missing), name="compiler")
        except OSError as error:
            if error.errno is None:  # it is one of ours, which say what to set
                raise
            raise OSError(f"compiled code cannot be kept ({error}): {OTHER_FOLDER}, with room in it") from None
    if dist.is_initialized():
        dist.barrier()
    return [code.find() for code in kept]


def compile_file(missing: list[Kept], jobs: dict[str, Callable[[str], Path]], scratch: str, number: int) -> None:
    """Does one of the jobs, in a process of its own."""
    os.setpgid(0, 0)
    signal.signal(signal.SIGTERM, partial(abandon, scratch))
    die_with_parent(signal.SIGTERM)
    os.environ["TMPDIR"] = os.environ["TORCHINDUCTOR_CACHE_DIR"] = scratch  # for the compiler's temporary files
    tempfile.tempdir = None
    code = missing[number]
    code.keep(jobs[code.name](scratch))


def abandon(scratch: str, *_: object) -> None:
    """Ends a compilation that nobody waits for, with the compiler's processes and files."""
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    os.killpg(0, signal.SIGTERM)
    shutil.rmtree(scratch, ignore_errors=True)
    os._exit(1)


# ---- graphs of NxD


def compile_once(compile_nxd: Callable[..., nn.Module], arguments: tuple) -> nn.Module:
    """What compile_nxd(*arguments) makes, or the file of an earlier run that made the same. The name depends on
    everything that the graphs do: the arguments, the source of the model, the platform and torch-neuronx's version."""
    import torch_neuronx
    from neuronx_distributed import NxDModel

    config, neuron, backend, model_class, compiler_args = arguments
    platform = (torch_neuronx.utils.get_platform_target(), torch_neuronx.__version__)
    sources = (inspect.getsource(model_class), Path(llama_neuron.__file__).read_text())
    depends_on = repr((config, neuron, backend.attention.__name__, compiler_args, platform, sources))
    kept = Kept(f"nxd-{sha256(depends_on.encode()).hexdigest()[:12]}")
    file = kept.find()
    if file is not None:
        return NxDModel.load(str(file))
    compiled = compile_nxd(*arguments)
    kept.save(compiled.save)
    return compiled

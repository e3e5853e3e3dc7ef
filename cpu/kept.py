"""Compiled code that is kept from one run to the next. To load it is to run it, so it has to be this user's own.

Its folder and files must belong to this user, and nobody else may write there. The name of a file ends with a digest of
its content: what is damaged is not found, and made again.
"""

from __future__ import annotations

import hashlib
import os
import stat
from collections.abc import Callable
from pathlib import Path


def is_own(path: Path) -> bool:
    """Whether a file or folder is this user's, and nobody else's to write."""
    status = path.lstat()
    shared = stat.S_ISLNK(status.st_mode) or status.st_mode & (stat.S_IWGRP | stat.S_IWOTH)
    return status.st_uid == os.geteuid() and not shared


def open_folder(folder: str | Path | None) -> Path:
    """The folder, made if it is not there. None stands for $TORCHINDUCTOR_CACHE_DIR, or ~/.cache/llama_neuron.

    Raises OSError if it cannot be made or somebody else may write there.
    """
    if folder is None:
        folder = os.environ.get("TORCHINDUCTOR_CACHE_DIR", "~/.cache/llama_neuron")
    folder = Path(folder).expanduser().resolve()
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    if not is_own(folder):
        fix = f"`chmod go-w {folder}`, or name a folder of your own by TORCHINDUCTOR_CACHE_DIR"
        raise OSError(f"{folder} is for compiled code, and others may write there: {fix}")
    return folder


def parts(file: Path) -> list[Path]:
    """A file and what AOTInductor wrote beside it, if it did."""
    return [part for part in (file.with_suffix(".json"), file) if part.exists()]


class Kept:
    """A piece of code in a folder (see `open_folder`), by a name that says what it depends on."""

    def __init__(self, name: str, folder: str | Path | None = None) -> None:
        self.name, self.folder = name, open_folder(folder)

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

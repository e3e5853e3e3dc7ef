"""Files that are written: whole or not at all, never through a link, with the mode that the umask says; and the
directory of a conversion, which one process at a time may fill."""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import re
import secrets
import signal
import stat
import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

import torch
from torch import Tensor

from llama_neuron import UsageError

RECORD = ".conversion"  # in a conversion's directory: the names of all that was written there, one a line
TEMPORARY = re.compile(r"\.(.+)\.[0-9a-f]{8}\.tmp")

# safetensors' names
DTYPES = {torch.int64: "I64", torch.int32: "I32", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}


@contextmanager
def replacing(path: Path) -> Iterator[BinaryIO]:
    """A new file, which takes the place of `path` once the block has ended without an error.

    Until then it lies beside it, under a name that nobody can guess; mode x is O_EXCL, which follows no link. Raises
    UsageError if `path` is a link, a directory or a device, OSError naming `path` if it cannot be written.
    """
    if os.path.lexists(path) and not stat.S_ISREG(path.lstat().st_mode):
        raise UsageError(f"{path} cannot be written, it is not a regular file: name another one, or remove it")
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")
    try:
        with temporary.open("xb") as file:
            yield file
        temporary.replace(path)
    except OSError as error:
        raise OSError(f"{path} cannot be written: {error}") from None
    finally:
        temporary.unlink(missing_ok=True)


def write(path: Path, writer: Callable[[Path], object]) -> None:
    """The same by a function that writes to a path."""
    with replacing(path) as file:
        writer(Path(file.name))


def write_tensors(
    file: BinaryIO,
    tensors: Iterable[tuple[str, Tensor]],
    at_most: int,
    metadata: dict[str, str],
    seal: Callable[[dict[str, str], list[tuple]], str] | None = None,
    signals: list[int] | tuple = (),
) -> None:
    """Writes a safetensors file of at most so many tensors, in their order; those of wider dtypes have to come first,
    so that each begins at a multiple of its width. Memory holds two of them, not all. Raises KeyboardInterrupt before
    the next one if there are `signals`.

    The header needs every shape, so it is written last, into a space that is kept free for it. With `seal`, the
    metadata get what seal(metadata, table of names, dtypes and shapes) gives, which `check_seal` compares, and
    data_sha256, the digest of all values, for `tools.verify`.
    """
    space = 64 * (64 + 4 * at_most)  # bytes: a tensor's entry has fewer than 256
    header = {}
    table = []
    digest = hashlib.sha256()
    end = 0
    file.seek(space)
    jobs: list[Future] = []
    with ThreadPoolExecutor(2) as pool:
        for name, tensor in tensors:  # the next one is made while the one before is written
            if signals:
                raise KeyboardInterrupt
            data = memoryview(tensor.contiguous().view(-1).view(torch.uint8).numpy())
            dtype = DTYPES[tensor.dtype]
            shape = list(tensor.shape)
            start = end
            end = start + len(data)
            header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [start, end]}
            table.append((name, dtype, shape))
            for job in jobs:
                job.result()
            jobs = [pool.submit(file.write, data), pool.submit(digest.update, data)]
        for job in jobs:
            job.result()
    if seal is not None:
        metadata = metadata | {"data_sha256": digest.hexdigest(), "seal": seal(metadata, table)}
    text = json.dumps({"__metadata__": metadata} | header).encode()
    assert len(text) <= space - 8, "more tensors than announced"
    file.seek(0)
    file.write((space - 8).to_bytes(8, "little") + text.ljust(space - 8))


@contextmanager
def claim(out: Path, names: set[str], source: Path) -> Iterator[list[int]]:
    """Makes the directory `out` this process's own until the block ends, for a conversion of `source` that writes
    files of these names. What earlier conversions have left there, by their record, is removed first; what this one
    wrote is removed if the block ends with an error; so is `out`, if it is new. The block gets a list of the signals
    (SIGTERM, Ctrl-C) that have come, and ends itself.

    Raises UsageError if `out` holds other files, holds files of `source`, or is another process's. The lock is on the
    record, and ends with the process.
    """
    new = not os.path.exists(out)
    try:
        out.mkdir(parents=True, exist_ok=True)
        found = os.listdir(out)
    except OSError as error:
        raise UsageError(f"--out {out}: {error.strerror}, name another directory") from None
    if found and RECORD not in found:
        raise UsageError(f"--out {out} holds files that are not a conversion: name a new or an empty directory")
    opened = os.open(out / RECORD, os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_NOFOLLOW | os.O_NONBLOCK, 0o666)
    with os.fdopen(opened, "r+b") as record, deferred_signals() as signals:
        if not stat.S_ISREG(os.fstat(opened).st_mode):
            raise UsageError(f"--out {out}/{RECORD} is not a regular file: name another directory")
        try:
            fcntl.flock(opened, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UsageError(f"--out {out}: another conversion is writing there, wait for its end") from None
        except OSError as error:  # of a file system without locks
            raise OSError(f"--out {out} cannot be locked, convert to another disk and copy: {error}") from None
        before = set(os.fsdecode(record.read(2**20)).splitlines())
        inputs = {(path.stat().st_dev, path.stat().st_ino) for path in source.iterdir() if os.path.exists(path)}
        for path in out.iterdir():
            if path.name in before and (path.lstat().st_dev, path.lstat().st_ino) in inputs:
                raise UsageError(f"--out {path} is a file of {source}: name another directory")
            if path.name in names - before:
                raise UsageError(f"--out {path} is not from a conversion: move it, or name another directory")
        lines = ["", *sorted(names - before)]  # on a new line, even if the one before was cut off
        record.write(os.fsencode("\n".join(lines)))
        record.flush()
        remove(out, before)
        try:
            yield signals
        except BaseException:
            remove(out, names)
            if new:
                (out / RECORD).unlink()
                with suppress(OSError):  # if something else was put there
                    out.rmdir()
            raise


@contextmanager
def deferred_signals() -> Iterator[list[int]]:
    """A list of the signals that have come. Python would raise KeyboardInterrupt wherever it is, and in the middle of a
    library that can become any other error."""
    signals: list[int] = []
    handlers = {}
    if threading.current_thread() is threading.main_thread():  # others can set no handler, and get no signal
        for number in (signal.SIGINT, signal.SIGTERM):
            handlers[number] = signal.signal(number, lambda number, frame: signals.append(number))
    try:
        yield signals
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)


def remove(out: Path, names: set[str]) -> None:
    """Removes files and links of these names, and what was to become one of them; neuron_config.json first, so that
    what is left never looks complete."""
    (out / "neuron_config.json").unlink(missing_ok=True)
    for path in out.iterdir():
        temporary = TEMPORARY.fullmatch(path.name)
        name = temporary[1] if temporary else path.name
        if name in names and not stat.S_ISDIR(path.lstat().st_mode):
            path.unlink()

"""Whether the shards of a conversion still hold what was written: `python -m tools.verify DIR` reads all of them.

`llama_neuron.py` compares names, shapes and JSON files whenever it starts (`check_seal`). Here the values are
compared too, with the digest that the conversion put into each shard. On a host that has only some ranks' shards, those
are read.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from checkpoint.seal import check_seal, read_settings, refusing
from llama_neuron import NeuronConfig, UsageError, shard_path


def check_values(path: Path) -> int:
    """Reads a shard, and returns its bytes. Raises UsageError if its values are not those that were written."""
    digest = hashlib.sha256()
    block = memoryview(bytearray(2**22))
    with path.open("rb") as file:
        header = json.loads(file.read(int.from_bytes(file.read(8), "little")))
        while size := file.readinto(block):
            digest.update(block[:size])
    written = (header.get("__metadata__") or {}).get("data_sha256")
    if written is None:
        raise UsageError(f"{path} has no digest of its values: convert_weights.py did not write it")
    if digest.hexdigest() != written:
        raise UsageError(f"{path} was modified after the conversion (the digest of its values differs): convert again")
    return path.stat().st_size


def verify(ckpt: str | Path) -> tuple[list[Path], int]:
    """The shards of a conversion that are here, and their bytes, once all of them have been read and are as they were
    written. Raises UsageError if not."""
    with refusing(Path(ckpt)):
        tp = read_settings(Path(ckpt))["tp_degree"]
    ranks = [rank for rank in range(tp) if shard_path(ckpt, rank).exists()]
    check_seal(ckpt, ranks or [0])  # which names the first, if there is none
    shards = [shard_path(ckpt, rank) for rank in ranks]
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        return shards, sum(pool.map(check_values, shards))


def main() -> None:
    parser = argparse.ArgumentParser(description="Reads all of a conversion, and compares.", usage=argparse.SUPPRESS)
    parser.add_argument("ckpt", metavar="DIR", help="what convert_weights.py wrote")
    ckpt = parser.parse_args().ckpt
    start = time.perf_counter()
    shards, size = verify(ckpt)
    rate = size / (time.perf_counter() - start) / 1e9
    tp = NeuronConfig.from_pretrained(ckpt).tp_degree
    print(f"{ckpt}: {len(shards)} of {tp} shards are here, {size / 1e9:.3f} GB, as converted ({rate:.2f} GB/s)")

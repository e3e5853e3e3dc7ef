"""Whether the shards of a conversion still hold what was written: `python -m tools.verify DIR` reads all of them.

`llama_neuron.py` compares names, shapes and all small files whenever it starts (`check_seal`). Here the numbers are
compared too, with the digest that the conversion put into each shard. On a host that has some ranks' shards only, these
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

from llama_neuron import NeuronConfig, UsageError, check_seal, run_command, shard_path


def check_numbers(path: Path) -> int:
    """Reads a shard, and returns its bytes. Raises UsageError if its numbers are not those that were written."""
    digest, block = hashlib.sha256(), memoryview(bytearray(2**22))
    with path.open("rb") as file:
        header = json.loads(file.read(int.from_bytes(file.read(8), "little")))
        while size := file.readinto(block):
            digest.update(block[:size])
    if digest.hexdigest() != header["__metadata__"]["data_sha256"]:
        raise UsageError(f"{path} was changed after the conversion (its numbers' digest differs): convert again")
    return path.stat().st_size


def verify(ckpt: str | Path) -> tuple[list[Path], int]:
    """The shards of a conversion that are here, and their bytes, once all of them have been read and are as they were
    written. Raises UsageError if not."""
    check_seal(ckpt, [])
    tp = NeuronConfig.from_pretrained(ckpt).tp_degree
    ranks = [rank for rank in range(tp) if shard_path(ckpt, rank).exists()]
    check_seal(ckpt, ranks or [0])
    shards = [shard_path(ckpt, rank) for rank in ranks]
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        return shards, sum(pool.map(check_numbers, shards))


def main() -> None:
    parser = argparse.ArgumentParser(description="Reads all of a conversion, and compares.", usage=argparse.SUPPRESS)
    parser.add_argument("ckpt", metavar="DIR", help="what convert_weights.py wrote")
    ckpt = parser.parse_args().ckpt
    start = time.perf_counter()
    shards, size = verify(ckpt)
    rate = size / (time.perf_counter() - start) / 1e9
    tp = NeuronConfig.from_pretrained(ckpt).tp_degree
    print(f"{ckpt}: {len(shards)} of {tp} shards are here, {size / 1e9:.3f} GB, as converted ({rate:.2f} GB/s)")


if __name__ == "__main__":
    run_command(main)

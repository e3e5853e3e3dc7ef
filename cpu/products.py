"""Products with a weight, as a CPU does them best.

Of few rows by `products.cpp`, which is compiled for this CPU and reads weights at memory's pace. Of many rows by torch:
in float32, if the CPU has no instructions for bfloat16.
"""

from __future__ import annotations

import ctypes
import os
import re
import subprocess
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

SOURCE = Path(__file__).with_suffix(".cpp")
FLAGS = ("-std=c++17", "-O3", "-march=native", "-fopenmp", "-shared", "-fPIC", "-w")  # GCC 12 warns of its own headers
FEW = 8  # rows; torch's product of more is faster
DTYPES = {torch.float16: 5, torch.float32: 6, torch.bfloat16: 15}  # c10::ScalarType

# ---- few rows

NAME = "cpu_products::few_rows_linear"
torch.library.define(NAME, "(Tensor x, Tensor weight) -> Tensor")


@torch.library.register_fake(NAME)
def like_few_rows_linear(x: Tensor, weight: Tensor) -> Tensor:
    """What a graph knows of the product."""
    return x.new_empty(*x.shape[:-1], len(weight), dtype=torch.float32)


few_rows_linear = torch.ops.cpu_products.few_rows_linear.default
# how ahead-of-time code declares and calls it
C_SHIM = "AOTITorchError aoti_torch_cpu_few_rows_linear(AtenTensorHandle, AtenTensorHandle, AtenTensorHandle*)"


def are_few(x: Tensor, weight: Tensor) -> bool:
    """Whether x [...,E] and weight [N,E] are what `few_rows_linear` multiplies."""
    return x.numel() <= FEW * x.shape[-1] and x.dtype == weight.dtype in DTYPES and weight.is_contiguous()


def compiler() -> str:
    """The C++ compiler's command."""
    return os.environ.get("CXX", "g++")


def compiler_failed(output: str) -> OSError:
    """What to raise if the compiler has failed: its first complaint that tells why, and what to set."""
    complaint = re.search(r".*(?:no space left|error).*", output, re.IGNORECASE)
    reason = complaint[0].strip() if complaint else "it says nothing"
    fix = "give it room, set TORCHINDUCTOR_CACHE_DIR to another folder, or CXX to another compiler"
    return OSError(f"the C++ compiler {compiler()} failed ({reason}): {fix}")


def compile_products(scratch: str) -> Path:
    """The library, in a folder. Raises OSError if the compiler fails."""
    home = Path(torch.__file__).parent
    made = Path(scratch, "products.so")
    torchs = "-I", home / "include", "-L", home / "lib", "-ltorch_cpu"
    line = [compiler(), *FLAGS, "-o", made, SOURCE, *torchs]
    ran = subprocess.run(line, capture_output=True, text=True, errors="replace")
    if ran.returncode != 0:
        raise compiler_failed(ran.stderr)
    return made


def load(file: Path) -> Callable[[Tensor, Tensor], Tensor]:
    """Loads the library, also for ahead-of-time code that is loaded later.

    Returns the product: x [...,E], weight [N,E] of one dtype in DTYPES -> float32 [...,N]. Raises OSError if it cannot
    be loaded.
    """
    try:
        library = ctypes.CDLL(str(file), mode=ctypes.RTLD_GLOBAL)
    except OSError as error:  # of a disk that is mounted noexec
        fix = "set TORCHINDUCTOR_CACHE_DIR to a folder whose disk allows that"
        raise OSError(f"compiled code cannot be executed ({error}): {fix}") from None
    function = library.few_rows_linear
    pointer = ctypes.c_void_p
    size = ctypes.c_int64
    function.argtypes = pointer, pointer, pointer, size, size, size, ctypes.c_int32
    function.restype = None

    def product(x: Tensor, weight: Tensor) -> Tensor:
        x = x.contiguous()
        y = like_few_rows_linear(x, weight)
        N, E = weight.shape
        function(x.data_ptr(), weight.data_ptr(), y.data_ptr(), x.numel() // E, E, N, DTYPES[x.dtype])
        return y

    return product


# ---- many rows


class InFloat32(TorchFunctionMode):
    """Products of narrow dtypes, with a weight and in `F.scaled_dot_product_attention`, in float32, and rounded."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if function is F.linear and args[0].dtype != torch.float32:
            return linear_in_float32(*args, **kwargs)
        if function is F.scaled_dot_product_attention:
            q, k, v = (x.float() for x in args)
            return function(q, k, v, **kwargs).to(args[0].dtype)
        return function(*args, **kwargs)


def linear_in_float32(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """The weight is widened 512 rows at a time, which stay in cache: 128 rows by [1536,576] take 1.1 ms where
    `F.linear` takes 8.3 without instructions for bfloat16."""
    wide = x.float()
    y = torch.cat([F.linear(wide, rows.float()) for rows in weight.split(512)], dim=-1)
    return (y if bias is None else y + bias).to(x.dtype)


def many_rows() -> TorchFunctionMode | nullcontext:
    """For modules that get many rows: a context in which their products are fast. It changes what an x86 computes that
    has no instructions for bfloat16, or is told by ATEN_CPU_CAPABILITY to leave them."""
    capabilities = torch.cpu.get_capabilities()
    used = torch.backends.cpu.get_cpu_capability()
    lacks = capabilities.get("architecture") == "x86_64" and not (capabilities["avx512_bf16"] and "AVX512" in used)
    return InFloat32() if lacks else nullcontext()

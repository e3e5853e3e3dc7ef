"""Ahead-of-time compiled code for modules that get one row, so that their products read weights at memory's pace.

    compiled.compile_one_row(run, [model.layers, [model.lm_head]], key, folder)

The modules have no branch for it. torch.export traces the first module of a group as a function of its weights and
caches, a decomposition table swaps its products, and AOTInductor makes a library of it that serves the whole group.
"""

from __future__ import annotations

import hashlib
import inspect
import os
import shutil
import signal
import sys
import tempfile
import threading
import warnings
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor, nn

from cpu.kept import Kept, open_folder
from cpu.ranks import die_with_parent, fork


def check() -> None:
    """Raises OSError, in one line, if nothing can be compiled here."""
    if torch.__version__ < "2.13":
        raise OSError(f"ahead-of-time code needs torch 2.13, this is {torch.__version__}")
    compiler = os.environ.get("CXX", "g++")
    if shutil.which(compiler) is None:
        raise OSError(f"ahead-of-time code needs a C++ compiler, {compiler} is not there: install g++ or set CXX")


# ---- products of one row
#
# As multiply and sum in float32, which Inductor fuses with what comes before and after. What a function here declines
# by NotImplemented stays torch's own product.


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x [...,E] of one row, weight [N,E] -> [...,N]. Reads 27 to 31 GB/s of weights; `F.linear` 12 to 17."""
    size = x.shape[-1]
    if x.numel() != size:
        return NotImplemented
    # Inductor adds up more than 4096 numbers by cascades, at half the rate: a longer row is summed in pieces. Of long
    # rows, two halves of the weight are read at one time. Both: 67 -> 52 ms for a token of Llama-3.2-1B's shape
    pieces = next(n for n in range(1, size + 1) if size % n == 0 and size <= 4096 * n)
    sums = []
    for half in weight.chunk(2 if size >= 2048 else 1):
        products = (x[..., None, :].float() * half.float()).unflatten(-1, (pieces, -1))
        sums.append(products.sum(-1).sum(-1))
    y = torch.cat(sums, dim=-1)
    if bias is not None:
        y = y + bias
    return y.to(x.dtype)


def matmul(a: Tensor, b: Tensor) -> Tensor:
    """The products in attention for one new token: a [B,K,G,N], b [B,K,N,M] -> [B,K,G,M]."""
    if a.dim() != 4 or b.dim() != 4:
        return NotImplemented
    if b.stride(-1) == 1:  # weights @ values
        y = (a[..., None].float() * b[:, :, None].float()).sum(-2)
    else:  # queries @ keys: a transposed view, keys lie in memory as rows
        y = (a[..., None, :].float() * b.transpose(2, 3)[:, :, None].float()).sum(-1)
    return y.to(a.dtype)


def attention(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None, *rest: object, scale=None, enable_gqa=False
) -> Tensor:
    """`F.scaled_dot_product_attention` of one new token: q [B,H,1,D], k and v [B,K,S,D], mask bool [B,1,1,S]."""
    if q.shape[2] != 1 or mask is None or mask.dtype != torch.bool or scale is None or rest:
        return NotImplemented
    grouped = q.reshape(*k.shape[:2], -1, q.shape[-1])  # B K G D
    scores = torch.where(mask, matmul(grouped, k.transpose(2, 3)) * scale, -torch.inf)
    weights = torch.softmax(scores, dim=-1, dtype=torch.float32).to(q.dtype)
    return matmul(weights, v).reshape(q.shape)


ONE_ROW = {
    torch.ops.aten.linear.default: linear,
    torch.ops.aten.matmul.default: matmul,
    torch.ops.aten.scaled_dot_product_attention.default: attention,
}


# ---- compilation


class Stateless(nn.Module):
    """A module as a function of its weights and buffers too."""

    def __init__(self, module: nn.Module, float32: bool) -> None:
        super().__init__()
        self.call = partial(torch.func.functional_call, module)  # not as a submodule, which has weights of its own
        self.float32 = float32

    def forward(self, state: dict[str, Tensor], inputs: tuple[Tensor, ...]) -> Tensor:
        y = self.call(state, inputs)
        return y.float() if self.float32 else y  # Inductor drops a rounding before float()


def example_arguments(module: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[tuple, torch.export.ShapesCollection]:
    """What a module is compiled for, (state, inputs), and which dimensions of that may have any length.

    The example has 512 cache slots and a mask of 256: numbers that differ, or torch would take them for one, and for
    which Inductor uses threads and vectors. With 4 and 2, a token after 1500 others takes 1.09 x the time.
    """
    any_length = torch.export.ShapesCollection()

    def resize(x: Tensor, dim: int, length: int, name: str) -> Tensor:
        shape = list(x.shape)
        shape[dim] = length
        example = x.new_ones(shape)
        any_length[example] = {dim: torch.export.Dim(name)}  # with a name, code that holds for some lengths is refused
        return example

    state = dict(module.named_parameters())
    for name, buffer in module.named_buffers():
        state[name] = resize(buffer, 2, 512, "slots") if buffer.dim() == 4 else buffer
    rows = []
    for x in inputs:
        rows.append(resize(x, x.dim() - 1, 256, "length") if x.dtype == torch.bool else x.contiguous())
    return (state, tuple(rows)), any_length


def code_name(module: nn.Module, arguments: tuple, *depends_on: object) -> str:
    """A name that changes with all that the code of a module depends on."""
    state, inputs = arguments
    sources = {Path(__file__)}
    for part in module.modules():
        if not type(part).__module__.startswith("torch."):
            sources.add(Path(inspect.getsourcefile(type(part))))
    machine = torch.__version__, torch.cpu.get_capabilities(), torch.get_num_threads()
    group = ()
    if dist.is_initialized():
        group = dist.get_world_size(), dist.group.WORLD.group_name  # constants in the code
    tensors = [(name, x.shape, x.stride(), x.dtype) for name, x in [*state.items(), *enumerate(inputs)]]
    texts = [source.read_text() for source in sorted(sources)]
    digest = hashlib.sha256(repr((depends_on, machine, group, tensors, texts)).encode()).hexdigest()
    return f"{type(module).__name__}-{digest[:16]}"


def compile_file(jobs: list[tuple], scratch: str, number: int) -> None:
    """Compiles one of the jobs, in a process of its own, with which the memory for it goes."""
    os.setpgid(0, 0)
    signal.signal(signal.SIGTERM, partial(abandon, scratch))
    die_with_parent(signal.SIGTERM)
    stateless, arguments, dynamic_shapes, kept = jobs[number]
    options = {
        # a normed row is kept, not computed again for every row of each weight: 0.9 x the time of a token
        "realize_reads_threshold": 1,
        "realize_opcount_threshold": 8,
        "cpp.threads": torch.get_num_threads(),
        "cpp.vec_isa_ok": True,  # what the CPU says of its vectors is believed, not tried in six processes
        "aot_inductor.precompile_headers": False,  # which would pay from the third file on
        "aot_inductor.output_path": scratch,
    }
    os.environ["TMPDIR"] = os.environ["TORCHINDUCTOR_CACHE_DIR"] = scratch  # for the compiler's temporary files
    tempfile.tempdir = None
    torch.set_num_threads(1)  # the other threads were not forked
    if "tqdm" in sys.modules:  # torch.fx draws a bar, and a thread of the parent may have held its lock at the fork
        sys.modules["tqdm"].tqdm.set_lock(threading.RLock())
    warnings.simplefilter("ignore", FutureWarning)  # torch's, about itself
    with torch.no_grad():
        program = torch.export.export(stateless, arguments, dynamic_shapes=dynamic_shapes)
        graph = program.run_decompositions(ONE_ROW).module()
        made = Path(torch._inductor.aot_compile(graph, arguments, options=options))
    kept.keep(made)


def abandon(scratch: str, *_: object) -> None:
    """Ends a compilation that nobody waits for, with the compiler's processes and files."""
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    os.killpg(0, signal.SIGTERM)
    shutil.rmtree(scratch, ignore_errors=True)
    os._exit(1)


def compiled_forward(
    code: Callable, state: list[Tensor], row: Tensor, eager: Callable, x: Tensor, *inputs: Tensor
) -> Tensor:
    """What the forward of a module becomes."""
    if x.numel() != row.numel():
        return eager(x, *inputs)
    rest = [other.contiguous() for other in inputs]  # code does not look at strides
    y = code([*state, x.contiguous().view(row.shape), *rest])[0]
    return y.view(*x.shape[:-1], -1)


def compile_one_row(
    run: Callable[[], object],
    groups: Sequence[Sequence[nn.Module]],
    key: str,
    folder: str | Path | None = None,
    float32: Sequence[nn.Module] = (),
) -> None:
    """Gives modules a forward that runs compiled code if it gets as many numbers as in `run`, else their own.

    `run` calls the whole model once, with one row (one new token) of each sequence in the batch. A group holds modules
    of one architecture, which share the code of the first. A module takes tensors by position and returns one, shaped
    like the first of them but for the last dimension. Any length may come for dimension 2 of 4-D buffers (caches, which
    are written in place) and for the last dimension of bool inputs (masks); other shapes, and dtypes, stay as in `run`.
    Modules in `float32` return float32, without a rounding to their own dtype. In a batch, linear layers stay torch's.

    Code is kept in `folder` (None: `kept.open_folder` says where), named by a digest of `key` (say what it depends on
    beside shapes and the modules' source files), and compiled if it is not there or not to be trusted (`Kept.find`).
    Every rank of a process group calls this; rank 0 compiles.

    Raises OSError if the folder cannot be written or others may write there, or nothing can be compiled (`check`),
    ValueError for ranks over gloo, and what the compiler raises.
    """
    if dist.is_initialized() and dist.get_backend() == "gloo":
        raise ValueError("compiled code would wait for gloo forever, it holds Python's lock: use cpu.shared_memory")
    recorded: dict[nn.Module, tuple[Tensor, ...]] = {}
    hooks = [group[0].register_forward_pre_hook(recorded.__setitem__) for group in groups]
    with torch.no_grad():
        run()
    for hook in hooks:
        hook.remove()

    codes, jobs = [], []
    for number, (first, *_) in enumerate(groups):
        arguments, dynamic_shapes = example_arguments(first, recorded[first])
        kept = Kept(code_name(first, arguments, key, number, first in float32), folder)
        codes.append(kept)
        if kept.find() is None:
            jobs.append((Stateless(first, first in float32), arguments, dynamic_shapes, kept))
    if jobs and (not dist.is_initialized() or dist.get_rank() == 0):
        check()
        with tempfile.TemporaryDirectory(dir=open_folder(folder)) as scratch:
            fork(partial(compile_file, jobs, scratch), len(jobs), name="compiler")
    if dist.is_initialized():
        dist.barrier()

    for group, kept in zip(groups, codes, strict=True):
        # the class beneath torch._inductor.aoti_load_package, which would import the compiler: 2 s and 120 MB
        code = torch._C._aoti.AOTIModelContainerRunnerCpu(str(kept.find()), 1).run
        row = recorded[group[0]][0]
        for module in group:
            state = [*module.parameters(), *module.buffers()]
            module.forward = partial(compiled_forward, code, state, row, module.forward)

"""Ahead-of-time compiled code for modules that get one row, so that their products read weights at memory's pace.

    compiled.compile_one_row(run, model.layers, key, find_or_make, heads=[model.lm_head])

The modules have no branch for it. torch.export traces the first of the layers as a function of its weights and caches,
a decomposition table swaps its products, and AOTInductor makes a library of it that serves all layers. A head is a
single product, and calls that of `products.cpp`.
"""

from __future__ import annotations

import inspect
import shutil
import sys
import threading
import warnings
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial, partialmethod
from hashlib import sha256
from pathlib import Path

import torch
from torch import Tensor, nn

from cpu import products


def check() -> None:
    """Raises OSError, in one line, if nothing can be compiled here."""
    if torch.__version__ < "2.13":
        raise OSError(f"ahead-of-time code needs torch 2.13, this is {torch.__version__}")
    compiler = products.compiler()
    if shutil.which(compiler) is None:
        raise OSError(f"ahead-of-time code needs a C++ compiler, {compiler} is not there: install g++ or set CXX")


# ---- products of one row
#
# Those with a weight are `products.few_rows_linear`. Those in attention become multiply and sum in float32, which
# Inductor fuses with what comes before and after. What a function here declines by NotImplemented stays torch's own.


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x [...,E] of few rows, weight [N,E] -> [...,N]. The bias is added before the sum is rounded."""
    if not products.are_few(x, weight):
        return NotImplemented
    y = products.few_rows_linear(x.contiguous(), weight)
    return (y if bias is None else y + bias).to(x.dtype)


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


DECOMPOSITIONS = {
    torch.ops.aten.linear.default: linear,
    torch.ops.aten.matmul.default: matmul,
    torch.ops.aten.scaled_dot_product_attention.default: attention,
}


# ---- compilation


class Stateless(nn.Module):
    """A module as a function of its weights and buffers too."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.call = partial(torch.func.functional_call, module)  # not as a submodule, which has weights of its own

    def forward(self, state: dict[str, Tensor], inputs: tuple[Tensor, ...]) -> Tensor:
        return self.call(state, inputs)


def example_arguments(
    module: nn.Module, inputs: tuple[Tensor, ...]
) -> tuple[tuple[dict[str, Tensor], tuple[Tensor, ...]], list[tuple[Tensor, int, str]]]:
    """What a module is compiled for, (state, inputs), and which dimensions of that may have any length.

    The example has 512 cache slots and a mask of 256: numbers that differ, or torch would take them for one, and for
    which Inductor uses threads and vectors. With 4 and 2, a token after 1500 others takes 1.09 x the time.
    """
    any_length = []

    def resize(x: Tensor, dim: int, length: int, name: str) -> Tensor:
        shape = list(x.shape)
        shape[dim] = length
        example = x.new_ones(shape)
        any_length.append((example, dim, name))
        return example

    state = dict(module.named_parameters())
    for name, buffer in module.named_buffers():
        state[name] = resize(buffer, 2, 512, "slots") if buffer.dim() == 4 else buffer
    rows = []
    for x in inputs:
        rows.append(resize(x, x.dim() - 1, 256, "length") if x.dtype == torch.bool else x.contiguous())
    return (state, tuple(rows)), any_length


def machine() -> tuple:
    """What all code depends on."""
    return torch.__version__, torch.cpu.get_capabilities()


def code_name(module: nn.Module, arguments: tuple, key: str) -> str:
    """A name that changes with all that the code of a module depends on."""
    state, inputs = arguments
    sources = {Path(__file__), Path(products.__file__)}
    for part in module.modules():
        if not type(part).__module__.startswith("torch."):
            sources.add(Path(inspect.getsourcefile(type(part))))
    tensors = [(name, x.shape, x.stride(), x.dtype) for name, x in [*state.items(), *enumerate(inputs)]]
    return named(type(module).__name__, sources, key, torch.get_num_threads(), tensors)


def named(name: str, sources: Iterable[Path], *depends_on: object) -> str:
    """A name with a digest of source files, the machine and all else that code depends on."""
    texts = [source.read_text() for source in sorted(sources)]
    return f"{name}-{sha256(repr((depends_on, machine(), texts)).encode()).hexdigest()[:16]}"


def compile_module(module: nn.Module, arguments: tuple, any_length: list[tuple], scratch: str) -> Path:
    """Makes a module's code in a folder, for what `example_arguments` gives. Raises OSError if the compiler fails."""
    check()
    from torch._inductor.cpp_builder import CppBuilder
    from torch._inductor.cpu_vec_isa import VecISA
    from torch._inductor.exc import CppCompileError, InductorError

    options = {
        # a normed row is kept, not computed again for every row of each weight: 0.9 x the time of a token
        "realize_reads_threshold": 1,
        "realize_opcount_threshold": 8,
        "cpp.threads": torch.get_num_threads(),
        "aot_inductor.custom_ops_to_c_shims": {products.few_rows_linear: [products.C_SHIM]},
        "aot_inductor.compile_wrapper_opt_level": "O0",  # 2 s less, and no slower
        "aot_inductor.enable_line_tables": False,  # 0.7 s less
        "aot_inductor.precompile_headers": False,  # which would pay from the third file on
        "aot_inductor.output_path": scratch,
    }
    VecISA.check_build = lambda *_: True  # what the CPU says of its vectors is believed: six trials would take 3 s
    CppBuilder.build = partialmethod(build_beside, CppBuilder.build, ThreadPoolExecutor(1), [])  # 2.5 s less
    torch.set_num_threads(1)  # the other threads were not forked
    if "tqdm" in sys.modules:  # torch.fx draws a bar, and a thread of the parent may have held its lock at the fork
        sys.modules["tqdm"].tqdm.set_lock(threading.RLock())
    warnings.simplefilter("ignore", FutureWarning)  # torch's, about itself
    shapes = torch.export.ShapesCollection()
    for example, dim, name in any_length:
        shapes[example] = {dim: torch.export.Dim(name)}  # with a name, code that holds for some lengths is refused
    with torch.no_grad():
        program = torch.export.export(Stateless(module), arguments, dynamic_shapes=shapes)
        graph = program.run_decompositions(DECOMPOSITIONS).module()
        try:
            return Path(torch._inductor.aot_compile(graph, arguments, options=options))
        except InductorError as error:  # around whatever went wrong
            if isinstance(error.inner_exception, CppCompileError):
                raise products.compiler_failed(error.inner_exception.output) from None
            if isinstance(error.inner_exception, OSError):
                raise error.inner_exception from None
            raise


def compile_library(scratch: str) -> Path:
    """Makes the library of products in a folder."""
    check()
    return products.compile_products(scratch)


def build_beside(builder: object, build: Callable, pool: ThreadPoolExecutor, jobs: list[Future]) -> None:
    """Inductor's `CppBuilder.build`, for whose largest file, the wrapper, only the linker waits."""
    target = builder.get_target_file_path()
    if target.endswith(".wrapper.o"):
        jobs.append(pool.submit(build, builder))
    else:
        if not target.endswith(".o"):
            jobs.pop().result()
        build(builder)


# ---- what the forward of a module becomes


def layer_forward(
    code: Callable, state: list[Tensor], row: Tensor, eager: Callable, x: Tensor, *inputs: Tensor
) -> Tensor:
    """Compiled code for as many numbers as in `row`, else the module's own forward."""
    if x.numel() != row.numel():
        with products.many_rows():
            return eager(x, *inputs)
    rest = [other.contiguous() for other in inputs]  # code does not look at strides
    y = code([*state, x.contiguous().view(row.shape), *rest])[0]
    return y.view(*x.shape[:-1], -1)


def head_forward(product: Callable, weight: Tensor, eager: Callable, x: Tensor) -> Tensor:
    """The product of few rows, else the module's own forward, in float32."""
    return product(x, weight) if products.are_few(x, weight) else eager(x).float()


def compile_one_row(
    run: Callable[[], object],
    layers: Sequence[nn.Module],
    key: str,
    find_or_make: Callable[[dict[str, Callable[[str], Path]]], list[Path]],
    heads: Sequence[nn.Module] = (),
) -> None:
    """Gives layers a forward that runs compiled code if it gets as many numbers as in `run`, else their own.

    `run` calls the whole model once, with one row (one new token) of each sequence in the batch. The layers are of one
    architecture and share the code of the first. A layer takes tensors by position and returns one, shaped like the
    first of them but for the last dimension. Any length may come for dimension 2 of 4-D buffers (caches, which are
    written in place) and for the last dimension of bool inputs (masks); other shapes, and dtypes, stay as in `run`.
    Heads are linear modules without bias. They return float32, without a rounding to their own dtype.

    `find_or_make({name: make})` returns a file of code for each name; make(folder) compiles it there. A name has a
    digest of everything that its code depends on: shapes, the modules' source files, this machine and `key`, which
    stands for the rest. Raises OSError if nothing can be compiled (`check`), and what find_or_make raises.
    """
    first = layers[0]
    recorded = []
    hook = first.register_forward_pre_hook(lambda module, inputs: recorded.append(inputs))
    with torch.no_grad():
        run()
    hook.remove()

    arguments, any_length = example_arguments(first, recorded[0])
    layer_name = code_name(first, arguments, key)
    library_name = named("products", [Path(products.__file__), products.SOURCE])
    layer_file, library = find_or_make(
        {
            layer_name: partial(compile_module, first, arguments, any_length),
            library_name: compile_library,
        }
    )
    product = products.load(library)  # before the code that calls it
    # the class beneath torch._inductor.aoti_load_package, which would import the compiler: 2 s and 120 MB
    code = torch._C._aoti.AOTIModelContainerRunnerCpu(str(layer_file), 1).run
    for module in layers:
        state = [*module.parameters(), *module.buffers()]
        module.forward = partial(layer_forward, code, state, recorded[0][0], module.forward)
    for head in heads:
        head.forward = partial(head_forward, product, head.weight, head.forward)

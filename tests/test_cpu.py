"""`cpu/`, with toy modules: the process group against what torch stacks and sums, compiled code against eager code."""

import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
import torch.nn.functional as F
from torch import Tensor, nn
from torch.torch_version import TorchVersion
from torch.utils._python_dispatch import TorchDispatchMode

from cpu import compiled, products
from launch import shared_memory
from launch.kept import Kept, find_or_make
from tests.helpers import command
from tests.test_ranks import processes_below, runs

# ---- ranks


def fork_ranks(process: int, work: Callable, ranks: int, args: tuple) -> None:
    torch.set_num_threads(1)
    shared_memory.start_ranks(lambda rank: work(rank, ranks, *args), ranks)


def on_ranks(ranks: int, work: Callable, *args: object) -> None:
    """work(rank, ranks, *args) on ranks that are forked from a process that has computed nothing, as a command's are.

    Raises what a rank raises.
    """
    parent = mp.start_processes(fork_ranks, (work, ranks, args), join=False, start_method="forkserver")
    done = parent.join(300)
    if not done:
        parent.processes[0].kill()  # and with it the ranks, see torch.multiprocessing
    assert done, "a rank waits forever"


SLOT = shared_memory.SLOT
LARGE = ((3, 240_007), torch.float32)  # of three pieces, the last of them short
FULL = ((SLOT // 2,), torch.bfloat16)  # just one piece
SMALL = [((1, 1, 7), torch.float32), ((2, 5), torch.bfloat16), ((4,), torch.int64), ((), torch.float16)]


def numbers(rank: int, turn: int, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """What a rank sends in a turn: whole numbers, so small that sums of them are exact in bfloat16."""
    values = torch.arange(torch.Size(shape).numel()) + 31 * rank + 7 * turn
    return (values % 85 - 42).to(dtype).view(shape)


def exchange_in_turns(rank: int, ranks: int) -> None:
    for turn in range(200):
        if (turn + rank) % 10 == 0:
            time.sleep(0.002)  # so that each rank is late at some time, and the others are one exchange ahead of it
        for shape, dtype in SMALL if turn % 20 else [*SMALL, FULL, LARGE]:
            x = numbers(rank, turn, shape, dtype)
            everyone = [numbers(sender, turn, shape, dtype) for sender in range(ranks)]
            gathered = [torch.empty_like(x) for _ in range(ranks)]
            dist.all_gather(gathered, x)
            assert all(map(torch.equal, gathered, everyone)), (turn, shape, dtype)
            dist.all_reduce(x)
            assert torch.equal(x, torch.stack(everyone).sum(0, dtype=dtype)), (turn, shape, dtype)


def test_late_ranks_gather_and_sum_what_torch_does() -> None:
    on_ranks(3, exchange_in_turns)


def exchange_strided(rank: int, ranks: int) -> None:
    for shape, dtype in [((2, 5), torch.bfloat16), ((64, 4099), torch.float32)]:  # of two pieces
        everyone = [numbers(sender, 0, shape, dtype).T for sender in range(ranks)]
        x = everyone[rank]
        assert not x.is_contiguous()
        gathered = [torch.empty_like(x) for _ in range(ranks)]
        dist.all_gather(gathered, x)
        assert all(map(torch.equal, gathered, everyone))
        root = x.clone()
        dist.broadcast(root, src=1)
        assert torch.equal(root, everyone[1])
        summed = x.clone()
        dist.all_reduce(summed)
        assert torch.equal(summed, torch.stack(everyone).sum(0))


def test_tensors_that_are_not_contiguous_keep_their_order() -> None:
    on_ranks(3, exchange_strided)


def sum_random(rank: int, ranks: int, dtype: torch.dtype) -> None:
    x = torch.randn(1000, generator=torch.Generator().manual_seed(rank)).to(dtype)
    everyone = x.new_empty(ranks, 1000)
    dist.all_gather_single(everyone, x)
    bound = ranks * torch.finfo(dtype).eps * everyone.double().abs().sum(0)
    dist.all_reduce(x)
    assert ((x.double() - everyone.double().sum(0)).abs() <= bound).all()
    sums = x.new_empty(ranks, 1000)
    dist.all_gather_single(sums, x)
    assert all(torch.equal(other, x) for other in sums)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_sums_have_the_same_bits_on_every_rank(dtype: torch.dtype) -> None:
    on_ranks(3, sum_random, dtype)


def meet(rank: int, ranks: int, flag: Path) -> None:
    objects = [{"rank": rank}, "x" * rank]
    dist.broadcast_object_list(objects, src=1)
    assert objects == [{"rank": 1}, "x"]
    if rank == 0:
        time.sleep(0.3)
        flag.touch()
    start = time.process_time()
    dist.barrier()
    assert flag.exists()
    assert time.process_time() - start < 0.2  # a rank that waits leaves its core to the one that works
    dist.all_reduce(torch.ones(3))  # and what follows is not confused
    dist.barrier()


def test_a_barrier_holds_all_ranks_until_the_last(tmp_path: Path) -> None:
    on_ranks(3, meet, tmp_path / "flag")


def take_largest(rank: int, ranks: int) -> None:
    dist.all_reduce(torch.ones(2), op=dist.ReduceOp.MAX)


def test_another_reduction_than_a_sum_is_refused() -> None:
    with pytest.raises(mp.ProcessRaisedException, match="NotImplementedError: ranks that share memory can add up"):
        on_ranks(2, take_largest)


def leave_others_alone(rank: int, ranks: int) -> None:
    if rank == 1:
        sys.exit(7)
    dist.all_reduce(torch.ones(2))


def test_a_rank_that_exits_ends_the_others_and_gives_its_code() -> None:
    with pytest.raises(mp.ProcessExitedException, match="exit code 7"):
        on_ranks(3, leave_others_alone)


# ---- compiled code


class Attention(nn.Module):
    """Grouped-query attention with a cache that is written in place: 6 query heads, 2 KV heads of 8 numbers."""

    def __init__(self, slots: int, batch: int, fused: bool, dtype: torch.dtype) -> None:
        super().__init__()
        self.fused = fused
        self.norm = nn.RMSNorm(24, dtype=dtype)
        self.qkv = nn.Linear(24, 80, dtype=dtype)
        self.out = nn.Linear(48, 24, bias=False, dtype=dtype)
        self.register_buffer("k", torch.zeros(batch, 2, slots, 8, dtype=dtype))
        self.register_buffer("v", torch.zeros(batch, 2, slots, 8, dtype=dtype))

    def forward(self, x: Tensor, mask: Tensor, positions: Tensor) -> Tensor:
        B, T, _ = x.shape
        q, k, v = self.qkv(self.norm(x)).view(B, T, 10, 8).transpose(1, 2).split((6, 2, 2), dim=1)
        row = torch.arange(B)[:, None]
        self.k[row, :, positions] = k.transpose(1, 2)
        self.v[row, :, positions] = v.transpose(1, 2)
        k, v = self.k[:, :, : mask.shape[-1]], self.v[:, :, : mask.shape[-1]]
        if self.fused:
            y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask[:, None], scale=0.3, enable_gqa=True)
        else:
            scores = torch.matmul(q.reshape(B, 2, 3 * T, 8), k.transpose(2, 3)) * 0.3
            scores = torch.where(mask[:, None, None], scores.view(B, 2, 3, T, -1), -1e9)
            weights = F.softmax(scores, dim=-1, dtype=torch.float32).to(q.dtype)
            y = torch.matmul(weights.view(B, 2, 3 * T, -1), v)
        return x + self.out(y.reshape(B, 6, T, 8).transpose(1, 2).reshape(B, T, 48))


def keep_in(folder: Path) -> Callable:
    """What `compile_one_row` asks for its code, which is kept in a folder."""
    return partial(find_or_make, folder=folder)


class Toy(nn.Module):
    """Two layers and a head; called with x [B,T,24] for the positions from `start` on, it reads `length` slots."""

    def __init__(self, slots: int, batch: int = 1, fused: bool = False, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.ModuleList(Attention(slots, batch, fused, dtype) for _ in range(2))
        self.head = nn.Linear(24, 50, bias=False, dtype=dtype)
        self.example = torch.zeros(batch, 1, 24, dtype=dtype)

    @torch.no_grad()
    def forward(self, x: Tensor, start: int, length: int) -> Tensor:
        positions = torch.arange(start, start + x.shape[1], dtype=torch.int32).expand(x.shape[:2])
        mask = torch.arange(length) <= positions[..., None]
        for layer in self.layers:
            x = layer(x, mask, positions)
        return self.head(x).float()

    def compile(self, folder: Path) -> "Toy":
        run, fused = partial(self, self.example, start=0, length=1), self.layers[0].fused
        compiled.compile_one_row(run, self.layers, f"toy {fused}", keep_in(folder), heads=[self.head])
        return self


@pytest.mark.parametrize(
    ("batch", "fused", "slots", "prompt"),
    [
        (1, False, 600, 5),
        (1, False, 600, 500),  # a text that outgrows any example
        (1, False, 600, 1),  # a prompt of one row is read by compiled code
        (1, False, 2, 1),  # a cache that is as long as the text
        (1, True, 600, 5),
        (1, True, 2, 1),
        (2, False, 600, 5),
        (2, False, 2, 1),  # positions of a batch are one number, expanded: strides that code does not know
    ],
)
def test_compiled_rows_are_eager_rows_at_every_length(
    batch: int, fused: bool, slots: int, prompt: int, code: Path
) -> None:
    ours, eager = Toy(slots, batch, fused).compile(code), Toy(slots, batch, fused)
    files = {path.name for path in code.iterdir()}
    assert len([name for name in files if name.startswith("Attention-")]) <= 3  # a code serves every length
    x = torch.randn(batch, slots, 24, generator=torch.Generator().manual_seed(1))
    steps = [(0, prompt), *((token, token + 1) for token in range(prompt, min(slots, prompt + 40)))]
    for start, stop in steps:
        expected = eager(x[:, start:stop], start, length=stop)
        torch.testing.assert_close(ours(x[:, start:stop], start, length=stop), expected, rtol=0, atol=1e-5)
    for mine, theirs in zip(ours.buffers(), eager.buffers(), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=0, atol=1e-5)
        assert torch.count_nonzero(mine[:, :, : steps[-1][1]]) == mine[:, :, : steps[-1][1]].numel()


class Products(TorchDispatchMode):
    """Collects torch's own products. Those of compiled code are loops of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: set[str] = set()

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        self.seen |= {op.overloadpacket.__name__} & {"mm", "addmm", "bmm"}
        return op(*args, **(kwargs or {}))


def test_layers_share_code_and_have_their_own_weights(code: Path) -> None:
    ours, eager, x = Toy(9).compile(code), Toy(9), torch.randn(1, 1, 24)
    assert not torch.equal(ours.layers[0].qkv.weight, ours.layers[1].qkv.weight)
    with Products() as torchs:
        expected = eager(x, 0, length=1)
    with Products() as compileds:
        y = ours(x, 0, length=1)
    torch.testing.assert_close(y, expected, rtol=0, atol=1e-5)
    assert torchs.seen == {"mm", "addmm", "bmm"} and compileds.seen == set()


class Block(nn.Linear):
    """A layer and a head in one: the layer's code is small."""

    def __init__(self, dtype: torch.dtype = torch.bfloat16) -> None:
        torch.manual_seed(0)
        super().__init__(24, 50, dtype=dtype)
        self.head = nn.Linear(50, 24, bias=False, dtype=dtype)
        self.x = torch.randn(1, 1, 24, dtype=dtype)

    def compile(self, key: str, folder: Path) -> None:
        compiled.compile_one_row(partial(self, self.x), [self], key, keep_in(folder), heads=[self.head])


def test_a_head_is_not_rounded_to_its_weights_dtype(code: Path) -> None:
    block = Block()
    block.compile("block", code)
    x = torch.randn(1, 1, 50).bfloat16()
    y = block.head(x)
    assert y.dtype == torch.float32
    expected = F.linear(x.double(), block.head.weight.double())
    torch.testing.assert_close(y.double(), expected, rtol=0, atol=1e-6)
    assert block.head(torch.cat([x] * 9)).dtype == torch.float32


def test_another_key_or_dtype_is_other_code(code: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Modules may differ in a function only: no shape, no source file. What is not kept needs a compiler, and fails."""
    Block().compile("block", code)
    monkeypatch.setenv("CXX", "no-such-compiler")
    Block().compile("block", code)
    for key, dtype in (("another block", torch.bfloat16), ("block", torch.float32)):
        with pytest.raises(OSError, match=r"needs a C[+][+] compiler"):
            Block(dtype).compile(key, code)


@pytest.mark.parametrize(
    ("rows", "dtype", "own"),
    [(1, torch.bfloat16, True), (8, torch.float32, True), (9, torch.float32, False), (1, torch.float64, False)],
)
def test_products_of_few_rows_are_our_own(rows: int, dtype: torch.dtype, own: bool) -> None:
    module, x = nn.Linear(8, 4, dtype=dtype), torch.randn(rows, 1, 8, dtype=dtype)
    program = torch.export.export(module, (x,)).run_decompositions(compiled.DECOMPOSITIONS)
    targets = {node.target for node in program.graph.nodes}
    assert (torch.ops.aten.linear.default in targets) != own
    assert (products.few_rows_linear in targets) == own


@pytest.fixture(scope="session")
def product(tmp_path_factory: pytest.TempPathFactory) -> Callable[[Tensor, Tensor], Tensor]:
    return products.load(products.compile_products(str(tmp_path_factory.mktemp("products"))))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize(("N", "E"), [(1, 1), (7, 31), (5, 33), (6, 64), (101, 577), (3, 8192)])
@pytest.mark.parametrize("rows", [1, 3, 4, 5, 8])
def test_products_are_exact_but_for_float32_sums(
    rows: int, N: int, E: int, dtype: torch.dtype, product: Callable
) -> None:
    torch.manual_seed(0)
    x, weight = torch.randn(rows, 1, E).to(dtype), torch.randn(N, E).to(dtype)
    y = product(x, weight)
    assert y.dtype == torch.float32 and y.shape == (rows, 1, N)
    bound = 1e-6 * F.linear(x.double().abs(), weight.double().abs())  # 8 units of float32, of the sum of magnitudes
    assert ((y.double() - F.linear(x.double(), weight.double())).abs() <= bound).all()


def test_a_product_takes_rows_with_any_strides(product: Callable) -> None:
    x, weight = torch.randn(24, 3), torch.randn(5, 24)
    torch.testing.assert_close(product(x.T, weight), x.T @ weight.T, rtol=0, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("rows", "N", "bias"), [(9, 1300, True), (200, 512, False)])
def test_many_rows_in_float32_are_rounded_once(rows: int, N: int, bias: bool, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    x, linear = torch.randn(2, rows, 40).to(dtype), nn.Linear(40, N, bias, dtype=dtype)
    with products.InFloat32():
        y = linear(x)
    expected = F.linear(x.float(), linear.weight.float(), linear.bias.float() if bias else None)
    assert y.dtype == dtype
    torch.testing.assert_close(y.float(), expected, rtol=torch.finfo(dtype).eps, atol=1e-5)


def test_attention_in_float32_is_rounded_once() -> None:
    torch.manual_seed(0)
    q, k, v = (torch.randn(2, heads, 30, 16).bfloat16() for heads in (6, 2, 2))
    mask = torch.ones(30, 30, dtype=torch.bool).tril()
    call = partial(F.scaled_dot_product_attention, attn_mask=mask, scale=0.3, enable_gqa=True)
    with products.InFloat32():
        y = call(q, k, v)
    assert y.dtype == torch.bfloat16
    torch.testing.assert_close(y.double(), call(q.double(), k.double(), v.double()), rtol=2**-8, atol=1e-5)


@pytest.mark.parametrize(("used", "mode"), [("avx2", "InFloat32"), ("avx512", "nullcontext")])
def test_a_cpu_that_leaves_bfloat16_instructions_multiplies_many_rows_in_float32(used: str, mode: str) -> None:
    if not torch.cpu.get_capabilities().get("avx512_bf16"):
        pytest.skip("this CPU has none to leave")
    ran = command(
        "-c", "from cpu import products; print(type(products.many_rows()).__name__)", ATEN_CPU_CAPABILITY=used
    )
    assert (ran.stdout, ran.stderr) == (f"{mode}\n", "")


RUN_KEPT = """
import sys, torch
from pathlib import Path
from test_cpu import Toy
torch.set_num_threads(1)
toy = Toy(9).compile(Path(sys.argv[1]))
y = toy(torch.ones(1, 1, 24), 0, length=1)
print(float((y - Toy(9)(torch.ones(1, 1, 24), 0, length=1)).abs().max()) < 1e-5, "torch._inductor" in sys.modules)
"""


def test_code_that_was_kept_is_used_without_the_compiler(code: Path) -> None:
    Toy(9).compile(code)
    paths = os.pathsep.join(map(str, (Path(__file__).parent, Path(__file__).parents[1])))
    environment = os.environ | {"PYTHONPATH": paths, "CXX": "no-such-compiler"}
    run = [sys.executable, "-c", RUN_KEPT, str(code)]
    ran = subprocess.run(run, capture_output=True, text=True, env=environment)
    assert (ran.stdout, ran.returncode) == ("True False\n", 0), ran.stderr


# ---- which code is trusted


def kept(folder: Path, content: bytes = b"code", companion: bytes | None = None) -> Path:
    """A file as `keep` leaves it, in a folder as `open_folder` makes it."""
    made = Kept("Layer-1", folder)
    (folder / "made.so").write_bytes(content)
    if companion is not None:
        (folder / "made.json").write_bytes(companion)
    made.keep(folder / "made.so")
    file = made.find()
    assert file is not None and file.read_bytes() == content
    return file


def others_may_write(file: Path) -> None:
    file.chmod(0o620)


def is_anothers(file: Path) -> None:
    if os.geteuid() != 0:
        pytest.skip("only root can give files away")
    os.chown(file, 1, 1)


def is_a_link(file: Path) -> None:
    file.rename(file.with_name("elsewhere"))
    file.symlink_to("elsewhere")


def is_cut(file: Path) -> None:
    os.truncate(file, 2)


def is_of_another_name(file: Path) -> None:
    file.rename(file.with_name("Layer-1-0123456789abcdef.so"))


def has_another_companion(file: Path) -> None:
    file.with_suffix(".json").write_bytes(b"[]")


SPOILERS = [others_may_write, is_anothers, is_a_link, is_cut, is_of_another_name, has_another_companion]


@pytest.mark.parametrize("spoil", SPOILERS)
def test_code_that_others_may_have_written_or_that_is_damaged_is_removed(spoil: Callable, tmp_path: Path) -> None:
    spoil(kept(tmp_path / "code", companion=b"{}"))
    assert Kept("Layer-1", tmp_path / "code").find() is None
    assert list((tmp_path / "code").glob("*.so")) == []


def test_code_is_kept_where_and_as_only_its_user_may_write(tmp_path: Path) -> None:
    before = os.umask(0)
    try:
        file = kept(tmp_path / "new" / "code", companion=b"{}")
    finally:
        os.umask(before)
    modes = [path.stat().st_mode & 0o777 for path in (file.parent, file, file.with_suffix(".json"))]
    assert modes == [0o700, 0o600, 0o600]


@pytest.mark.parametrize("spoil", [others_may_write, is_anothers])
def test_a_folder_in_which_others_may_write_is_refused(spoil: Callable, tmp_path: Path) -> None:
    folder = kept(tmp_path / "code").parent
    spoil(folder)
    with pytest.raises(OSError, match=rf"^{folder} is for compiled code, and .*: `chmod go-w {folder}`, or name"):
        Toy(9).compile(folder)


def test_damaged_files_are_compiled_again(code: Path, tmp_path: Path) -> None:
    Block().compile("block", code)
    kinds = "Block", "products"
    for file in (file for kind in kinds for file in code.glob(f"{kind}-*")):
        os.truncate(shutil.copy(file, tmp_path), file.stat().st_size // 2)
    block = Block()
    expected = block(block.x)
    block.compile("block", tmp_path)
    torch.testing.assert_close(block(block.x), expected, rtol=2**-8, atol=0)
    for kind in kinds:
        (name,) = {file.stem.rpartition("-")[0] for file in tmp_path.glob(f"{kind}-*.so")}
        assert Kept(name, tmp_path).find() is not None


def compile_alone(process: int, folder: Path) -> None:
    torch.set_num_threads(1)
    Block().compile("block", folder)


def test_a_compilation_whose_process_is_killed_leaves_no_process_and_no_file(tmp_path: Path) -> None:
    killed = mp.start_processes(compile_alone, (tmp_path,), join=False, start_method="forkserver").processes[0]
    while len(compilers := processes_below(killed.pid)) < 2:  # with the one for C++
        assert killed.is_alive()
        time.sleep(0.01)
    killed.kill()
    killed.join()
    until = time.monotonic() + 5
    while any(map(runs, compilers)) or list(tmp_path.iterdir()):
        assert time.monotonic() < until
        time.sleep(0.01)


# ---- code that sums and gathers


class Sharded(nn.Module):
    """A rank's slice of a product over columns, then one over rows; the second part is gathered."""

    def __init__(self, rank: int, ranks: int) -> None:
        super().__init__()
        torch.manual_seed(0)
        up, down = torch.randn(ranks * 4, 6), torch.randn(6, ranks * 4)
        self.whole = up, down
        self.up = nn.Parameter(up.chunk(ranks)[rank].clone(), requires_grad=False)
        self.down = nn.Parameter(down.chunk(ranks, dim=1)[rank].contiguous(), requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        ops, group = torch.ops._c10d_functional, dist.group.WORLD
        y = F.relu(F.linear(x, self.up))
        summed = ops.wait_tensor(ops.all_reduce(F.linear(y, self.down), "sum", group.group_name))
        gathered = ops.wait_tensor(ops.all_gather_into_tensor(y, group.size(), group.group_name))
        return torch.cat((summed, *gathered.chunk(group.size())), dim=-1)


def compile_sharded(rank: int, ranks: int, folder: Path) -> None:
    module = Sharded(rank, ranks)
    x = torch.randn(1, 6, generator=torch.Generator().manual_seed(1))
    up, down = module.whole
    y = F.relu(F.linear(x, up))
    expected = torch.cat((F.linear(y, down), y), dim=-1)
    torch.testing.assert_close(module(x), expected, rtol=0, atol=1e-5)
    compiled.compile_one_row(partial(module, x), [module], "sharded", keep_in(folder))
    for _ in range(50):
        torch.testing.assert_close(module(x), expected, rtol=0, atol=1e-5)


def test_collectives_are_ops_of_compiled_code(code: Path) -> None:
    on_ranks(2, compile_sharded, code)


# ---- refusals


@pytest.fixture
def gloo_group() -> Iterator[None]:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def test_ranks_that_exchange_over_gloo_are_refused(gloo_group: None, code: Path) -> None:
    with pytest.raises(ValueError, match="would wait for gloo forever"):
        Toy(9).compile(code)


class HalfAsLong(nn.Module):
    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        return x + sum(part.sum() for part in mask.split(100, dim=-1))


def test_code_that_would_depend_on_a_length_is_refused(code: Path) -> None:
    module, x, mask = HalfAsLong(), torch.zeros(1, 3), torch.ones(1, 1, 5, dtype=torch.bool)
    with pytest.raises(Exception, match=r"Not all values of length = .* satisfy"):
        compiled.compile_one_row(lambda: module(x, mask), [module], "", keep_in(code))


def test_a_folder_that_cannot_be_made_is_an_os_error(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(FileExistsError, match="file"):
        Toy(9).compile(tmp_path / "file")


def test_without_a_compiler_nothing_is_made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", "no-such-compiler")
    with pytest.raises(OSError, match=r"needs a C[+][+] compiler"):
        Toy(9).compile(tmp_path)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("compiler", ["no-such-compiler", None])
def test_check_asks_for_a_compiler(compiler: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    compiled.check()
    if compiler:
        monkeypatch.setenv("CXX", compiler)
    else:
        monkeypatch.delenv("CXX", raising=False)
        monkeypatch.setenv("PATH", str(tmp_path))
    line = (
        f"ahead-of-time code needs a C[+][+] compiler, {compiler or 'g[+][+]'} is not there: install g[+][+] or set CXX"
    )
    with pytest.raises(OSError, match=f"^{line}$"):
        compiled.check()


def test_check_asks_for_a_newer_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "__version__", TorchVersion("2.9.1+cpu"))
    with pytest.raises(OSError, match=r"^ahead-of-time code needs torch 2.13, this is 2.9.1[+]cpu$"):
        compiled.check()

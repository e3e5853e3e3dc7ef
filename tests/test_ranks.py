"""Ranks that are killed, stopped or interrupted: one line says so, the whole run ends, and nothing of it is left."""

import json
import multiprocessing.util
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from tokenizers import Tokenizer
from tokenizers.models import WordLevel

from convert_weights import convert
from launch.ranks import fork
from tests.helpers import ROOT

COMMAND = "llama_neuron.py"
TORCHRUN = (sys.executable, "-m", "torch.distributed.run")
NEW_USER = () if os.geteuid() == 0 else ("--user", "--map-root-user")  # what unshare(1) needs to make namespaces


def mounting(options: str, folder: str) -> tuple[str, ...]:
    """What a command starts with that has a file system of its own, with these options of tmpfs, at a folder."""
    script = f'mount -t tmpfs -o {options} tmpfs {folder} && exec "$@"'
    prefix = ("unshare", *NEW_USER, "--mount", "sh", "-c", script, "sh")
    if shutil.which("unshare") is None or subprocess.run((*prefix, "true"), capture_output=True).returncode != 0:
        pytest.skip("no mount namespaces here")
    return prefix


# ---- processes that fork


def in_process(number: int, act: Callable[[], object]) -> Callable[[int], None]:
    """Work in which one process acts, and the others go on for long."""

    def work(own: int) -> None:
        if own == number:
            act()
        time.sleep(60)

    return work


class OddError(Exception):
    """It cannot be pickled."""

    def __init__(self, first: int, second: int) -> None:
        super().__init__(f"{first} and {second}")


def fail(error: BaseException) -> None:
    raise error


def killed_by(signal_number: int) -> Callable[[], None]:
    return lambda: os.kill(os.getpid(), signal_number)


NO_SHARD = FileNotFoundError(2, "No such file", "shard")


@pytest.mark.parametrize(
    ("act", "error", "says"),
    [
        (killed_by(signal.SIGKILL), ChildProcessError, "rank 1 was killed by signal 9 (out of memory?)"),
        (killed_by(signal.SIGXCPU), ChildProcessError, "rank 1 was killed by signal 24 (CPU time limit exceeded)"),
        (lambda: os._exit(3), ChildProcessError, "rank 1 ended with exit code 3"),
        (lambda: sys.exit(7), SystemExit, "7"),
        (lambda: fail(NO_SHARD), FileNotFoundError, "[Errno 2] No such file: 'shard'"),
        (lambda: fail(OddError(1, 2)), RuntimeError, "OddError: 1 and 2"),
        (lambda: fail(ValueError("x" * 100_000)), ValueError, "x" * 100_000),  # more than a pipe takes at one time
    ],
    ids=["killed", "limited", "exit", "sys.exit", "OSError", "not picklable", "long"],
)
def test_what_ends_a_process_is_raised_and_ends_the_others(
    act: Callable, error: type[BaseException], says: str
) -> None:
    began, others = time.monotonic(), multiprocessing.active_children()  # ranks of other tests
    with pytest.raises(error) as raised:
        fork(in_process(1, act), 3)
    assert str(raised.value) == says
    assert time.monotonic() - began < 5
    assert set(multiprocessing.active_children()) == set(others)


def test_a_process_that_has_hardly_begun_ends_in_spite_of_its_parents_handler() -> None:
    slow, before = threading.Event(), signal.signal(signal.SIGTERM, lambda *_: None)
    multiprocessing.util.register_after_fork(slow, lambda _: time.sleep(3))  # forgotten with `slow`
    began = time.monotonic()
    try:
        with pytest.raises(ChildProcessError, match="has not answered for 1 s"):
            fork(lambda number: time.sleep(60), 1, timeout=1)
    finally:
        signal.signal(signal.SIGTERM, before)
    assert 3 < time.monotonic() - began < 5


def test_a_stopped_process_is_named_when_it_has_been_silent_for_too_long() -> None:
    began, others = time.monotonic(), multiprocessing.active_children()
    with pytest.raises(ChildProcessError, match=r"^compiler 2 has not answered for 2 s$"):
        fork(in_process(2, lambda: os.kill(os.getpid(), signal.SIGSTOP)), 3, timeout=2, name="compiler")
    assert 2 < time.monotonic() - began < 7
    assert set(multiprocessing.active_children()) == set(others)


def test_a_process_that_only_works_for_longer_than_the_timeout_is_not_silent() -> None:
    began = time.monotonic()
    fork(lambda number: time.sleep(3), 2, timeout=2)
    assert time.monotonic() - began > 3


# ---- the command


def convert_long(hf: Path, folder: Path) -> Path:
    """A conversion for two ranks, with a tokenizer and a cache that takes minutes to fill."""
    copy = shutil.copytree(hf, folder / "hf")
    tokenizer = Tokenizer(WordLevel({f"w{number}": number for number in range(96)}, unk_token="w0"))
    tokenizer.save(str(copy / "tokenizer.json"))
    (copy / "tokenizer_config.json").write_text('{"tokenizer_class": "PreTrainedTokenizerFast"}')
    config = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps(config | {"max_position_embeddings": 30_000}))
    convert(copy, folder / "tp2", tp_degree=2, sequence_length=30_000)
    return folder / "tp2"


@pytest.fixture(scope="module")
def endless(hf_checkpoint: Callable, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return convert_long(hf_checkpoint("llama-3"), tmp_path_factory.mktemp("endless"))


def processes_below(pid: int) -> list[int]:
    """The descendants of a process, children first and in the order of their start."""
    parents = {}
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            parents[int(folder.name)] = int((folder / "stat").read_text().rpartition(")")[2].split()[1])
        except OSError:
            continue
    found = sorted(child for child, parent in parents.items() if parent == pid)
    return found + [below for child in found for below in processes_below(child)]


def runs(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


class Run:
    """A command that generates text for minutes, unless flags say otherwise."""

    timeout = 3  # seconds, as --timeout

    def __init__(self, launcher: tuple, ckpt: Path, *flags: object, **environment: str) -> None:
        flags = ("--prompt-ids", "7,8", "--max-new-tokens", 29_000, "--timeout", self.timeout, *flags)
        line = [*map(str, (*launcher, ROOT / COMMAND, "--ckpt", ckpt, *flags))]
        environment = os.environ | {"OMP_NUM_THREADS": "1"} | environment
        pipe = subprocess.PIPE
        self.process = subprocess.Popen(
            line, stdout=pipe, stderr=pipe, text=True, env=environment, start_new_session=True
        )
        self.torchrun, self.ranks = "torch.distributed.run" in line, []

    def look(self) -> None:
        """Finds the processes of the ranks."""
        self.ranks = processes_below(self.process.pid)

    def wait_for_text(self) -> None:
        assert self.process.stdout.read(1), self.process.stderr.read()
        self.look()

    def stop(self) -> None:
        for pid in filter(runs, (self.process.pid, *self.ranks)):
            os.kill(pid, signal.SIGKILL)
        self.process.wait()

    def end(self) -> tuple[int, list[str], float]:
        """Exit code, the lines that the command said on stderr, seconds until all processes were gone."""
        began = time.monotonic()
        try:
            _, err = self.process.communicate(timeout=30)
            while any(map(runs, self.ranks)) and time.monotonic() - began < 30:
                time.sleep(0.02)
            seconds = time.monotonic() - began
        finally:
            self.stop()
        lines = [line for line in err.splitlines() if line.startswith(COMMAND)]
        assert self.torchrun or lines == err.splitlines()
        return self.process.returncode, lines, seconds


def shared_memory(run: Run) -> list[Path]:
    """torch's files of it, which have the number of their process in their names."""
    files: list[Path] = []
    for pid in (run.process.pid, *run.ranks):
        files += Path("/dev/shm").glob(f"torch_{pid}_*")
    return files


def kill_rank(number: int, signal_number: int) -> Callable[[Run], None]:
    return lambda run: os.kill(run.ranks[number], signal_number)


def kill_launcher(run: Run) -> None:
    run.process.kill()


def interrupt(run: Run) -> None:
    os.killpg(run.process.pid, signal.SIGINT)  # as a terminal does


KILLED = f"{COMMAND}: error: rank 1 was killed by signal 9 (out of memory?)"
SILENT = f"{COMMAND}: error: rank 1 has not answered for {Run.timeout} s"
INTERRUPTED = f"{COMMAND}: error: interrupted"


@pytest.mark.parametrize(
    ("fault", "code", "lines", "limit"),
    [
        (kill_rank(1, signal.SIGKILL), 1, [KILLED], 5),
        (kill_rank(1, signal.SIGSTOP), 1, [SILENT], Run.timeout + 5),
        (interrupt, 130, [INTERRUPTED], 5),
        (kill_launcher, -9, [], 5),
    ],
    ids=["killed", "stopped", "Ctrl-C", "launcher killed"],
)
def test_a_fault_ends_the_run_in_one_line_and_leaves_nothing(
    fault: Callable[[Run], None], code: int, lines: list[str], limit: float, endless: Path, tmp_path: Path
) -> None:
    run = Run((sys.executable,), endless, TMPDIR=str(tmp_path))
    run.wait_for_text()
    assert len(run.ranks) == 2
    fault(run)
    *said, seconds = run.end()
    print(f"{seconds:.1f} s")
    assert said == [code, lines]
    assert seconds < limit
    assert shared_memory(run) == []
    assert list(tmp_path.iterdir()) == []


DIED = f"{COMMAND}: error: rank 0 died (out of memory?)"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("fault", "lines", "limit"),
    [
        (kill_rank(0, signal.SIGKILL), [DIED], 5),
        (kill_rank(1, signal.SIGSTOP), [SILENT], Run.timeout + 5),
        (kill_launcher, [], 5),
    ],
    ids=["killed", "stopped", "launcher killed"],
)
def test_a_fault_ends_ranks_of_torchrun_in_one_line(
    fault: Callable[[Run], None], lines: list[str], limit: float, endless: Path
) -> None:
    run = Run((*TORCHRUN, "--nproc-per-node", 2), endless)
    run.wait_for_text()
    fault(run)
    code, said, seconds = run.end()
    print(f"{seconds:.1f} s")
    assert code != 0 and said == lines
    assert seconds < limit


@pytest.mark.slow
@pytest.mark.parametrize(
    ("flag", "says"),
    [
        (
            ("--prompt-ids", "96"),
            "prompt 1 holds token id 96 at place 1: this model has 0 to 95, and needs its own tokenizer",
        ),
        (("--tp", "x"), "argument --tp: 'x' is not a positive integer up to 2^24"),
    ],
    ids=["tokens", "flag"],
)
def test_a_mistake_is_said_by_one_rank_of_torchrun(converted: Callable, flag: tuple[str, str], says: str) -> None:
    torchrun = (*TORCHRUN, "--nproc-per-node", "4", str(ROOT / COMMAND))
    flags = ("--ckpt", str(converted("llama-2", 4)), *flag)
    ran = subprocess.run((*torchrun, *flags), capture_output=True, text=True, timeout=100)
    said = [line for line in ran.stderr.splitlines() if line.startswith(COMMAND)]
    assert said == [f"{COMMAND}: error: {says}"]

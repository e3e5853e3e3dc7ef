"""Hosts unlike the one that the tests run on.

Two hosts are two network namespaces with an address each and a cable between them. A namespace is that of a process
that sleeps, and goes with it. From there nothing else can be reached. A container with little shared memory is a mount
namespace. A laptop is a process that has nothing of what Linux alone has.
"""

import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.helpers import ROOT, command, hf_greedy, hf_model
from tests.test_ranks import COMMAND, NEW_USER, TORCHRUN, Run, convert_long, mounting

pytestmark = pytest.mark.slow
ADDRESSES = ("10.77.0.1", "10.77.0.2")
PROMPT, NEW = [7, 8], 20


class Hosts:
    """Two processes that sleep, each with a network and a host name of its own."""

    def __init__(self, *new_user: str) -> None:
        self.sleepers: list[subprocess.Popen] = []
        self.enter = ("--user", "--preserve-credentials") if new_user else ()
        try:
            self.sleep("unshare", *new_user, "--net", "--uts")
            self.sleep(*self.on(0), "unshare", "--net", "--uts")
            self.run(0, f"ip link add name eth0 type veth peer name eth0 netns {self.pid(1)}")
            for number, address in enumerate(ADDRESSES):
                self.run(number, f"ip address add {address}/24 dev eth0")
                self.run(number, "ip link set lo up")
                self.run(number, "ip link set eth0 up")
                self.run(number, "hostname localhost")
        except BaseException:
            self.close()
            raise

    def sleep(self, *prefix: str) -> None:
        sleeper = subprocess.Popen((*prefix, "sleep", "300"), stderr=subprocess.PIPE, text=True)
        self.sleepers.append(sleeper)
        while Path(f"/proc/{sleeper.pid}/comm").read_text() != "sleep\n":
            if sleeper.poll() is not None:
                raise OSError(sleeper.stderr.read().strip())
            time.sleep(0.01)

    def pid(self, number: int) -> str:
        return str(self.sleepers[number].pid)

    def on(self, number: int) -> tuple[str, ...]:
        """What a command on a host starts with."""
        return ("nsenter", "--target", self.pid(number), *self.enter, "--net", "--uts")

    def run(self, number: int, command: str) -> None:
        ran = subprocess.run((*self.on(number), *command.split()), capture_output=True, text=True)
        if ran.returncode != 0:
            raise OSError(ran.stderr.strip())

    def close(self) -> None:
        for sleeper in self.sleepers:
            sleeper.kill()
            sleeper.wait()


@pytest.fixture
def hosts() -> Iterator[Hosts]:
    try:
        both = Hosts(*NEW_USER)
    except OSError as error:
        pytest.skip(f"no network namespaces here: {error}")
    yield both
    both.close()


@pytest.fixture(scope="module")
def endless(hf_checkpoint: Callable, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return convert_long(hf_checkpoint("llama-3"), tmp_path_factory.mktemp("endless"))


@pytest.fixture
def start(hosts: Hosts, endless: Path, tmp_path: Path) -> Iterator[Callable[..., list[Run]]]:
    """start(*flags, no_interface=None): one rank on each host, which has no other shard; both processes of torchrun.

    A host without the name of its interface goes by its own name.
    """
    runs: list[Run] = []

    def start_both(*flags: object, no_interface: int | None = None) -> list[Run]:
        for number in range(2):
            ckpt = shutil.copytree(endless, tmp_path / f"host{number}")
            (ckpt / f"tp{1 - number}_sharded_checkpoint.safetensors").unlink()
            where = ("--nnodes", 2, "--node-rank", number, "--nproc-per-node", 1, "--master-addr", ADDRESSES[0])
            environment = {} if number == no_interface else {"GLOO_SOCKET_IFNAME": "eth0"}
            runs.append(Run((*hosts.on(number), *TORCHRUN, *where), ckpt, *flags, **environment))
        return runs

    yield start_both
    for run in runs:
        run.stop()


def test_two_hosts_with_a_shard_each_give_the_ids_of_hf(start: Callable, hf_checkpoint: Callable) -> None:
    _, ids = hf_greedy(hf_model(hf_checkpoint("llama-3"), torch.float32), PROMPT, NEW)
    first, second = start("--max-new-tokens", NEW)
    text = first.process.stdout.read()
    assert text == " ".join(f"w{number}" for number in PROMPT + ids) + "\n"
    assert second.process.stdout.read() == ""
    assert [run.end()[0] for run in (first, second)] == [0, 0]


def test_a_cut_cable_ends_both_hosts_in_one_line_each(hosts: Hosts, start: Callable) -> None:
    first, second = start()
    first.wait_for_text()
    second.look()
    hosts.run(0, "ip link set eth0 down")
    cut = time.monotonic()
    for run, other in ((first, 1), (second, 0)):
        code, said, _ = run.end()
        assert code != 0
        assert said == [f"llama_neuron.py: error: rank {other} has not answered for {Run.timeout} s"]
    assert time.monotonic() - cut < Run.timeout + 5


@pytest.mark.parametrize("number", [0, 1])
def test_a_host_whose_name_is_its_loopback_says_which_variable_to_set(start: Callable, number: int) -> None:
    runs = start(no_interface=number)
    for run in runs:
        run.look()
    _, (mistake,), _ = runs[number].end()
    _, others, _ = runs[1 - number].end()
    assert "the name of this host, localhost, is" in mistake and "set GLOO_SOCKET_IFNAME to" in mistake
    assert others == [f"llama_neuron.py: error: rank {number} failed: its host says why"]


# ---- a container


@pytest.mark.parametrize(
    ("tp", "options", "says"),
    [
        (32, "size=64m", ""),  # Docker's default
        (2, "size=1m", ""),
        (32, "size=1m", "32 ranks need 4096 KiB of /dev/shm"),
        (2, "ro", "2 ranks need 16 KiB of /dev/shm"),
    ],
)
def test_ranks_need_little_of_dev_shm_and_say_so_if_it_is_not_there(
    tp: int, options: str, says: str, converted: Callable, hf_checkpoint: Callable
) -> None:
    flags = ("--ckpt", str(converted("llama-3", tp)), "--prompt-ids", "7,8", "--json")
    line = [*mounting(options, "/dev/shm"), sys.executable, str(ROOT / COMMAND), *flags]
    ran = subprocess.run(line, capture_output=True, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"}, timeout=300)
    if not says:
        assert ran.returncode == 0, ran.stderr
        _, ids = hf_greedy(hf_model(hf_checkpoint("llama-3"), torch.float32), PROMPT, 64)
        assert json.loads(ran.stdout)["completions"][0]["ids"] == ids
    else:
        assert (ran.returncode, ran.stdout, ran.stderr.count("\n")) == (1, "", 1), ran.stderr
        assert says in ran.stderr and "--shm-size" in ran.stderr


# ---- a laptop

# The standard library, torch and psutil decide by sys.platform which of their files they import: that comes first.
WITHOUT_LINUX = """
import contextlib, fcntl, os, resource, sys, sysconfig, urllib.request
sysconfig.get_config_vars()
with contextlib.suppress(ImportError):
    import psutil
for name in ("eventfd", "memfd_create", "pidfd_open", "posix_fallocate", "sched_getaffinity", "sched_setaffinity",
             "sched_yield", "splice"):
    if hasattr(os, name):
        delattr(os, name)
for name in dir(fcntl):
    if name.startswith(("F_ADD_SEALS", "F_OFD", "F_SETPIPE", "F_GETPIPE", "F_NOTIFY")):
        delattr(fcntl, name)
del resource.prlimit
sys.platform = "darwin"


def refuse(event, arguments):
    if event == "os.fork":
        raise RuntimeError("fork is not safe here")
    if event == "open" and str(arguments[0]).startswith(("/proc", "/dev/shm", "/sys")):
        raise FileNotFoundError(2, "No such file or directory", arguments[0])


sys.addaudithook(refuse)
"""


def test_a_laptop_without_what_linux_alone_has_converts_runs_captures_and_audits(
    hf_checkpoint: Callable, tmp_path: Path
) -> None:
    (tmp_path / "sitecustomize.py").write_text(WITHOUT_LINUX)
    hf = hf_checkpoint("llama-3")
    _, ids = hf_greedy(hf_model(hf, torch.float32), PROMPT, 8)
    prompt = ("--prompt-ids", "7,8")

    def run(*arguments: object) -> subprocess.CompletedProcess:
        return command(*arguments, PYTHONPATH=str(tmp_path), OMP_NUM_THREADS="1")

    for tp in (1, 2):
        out = tmp_path / f"tp{tp}"
        captured = tmp_path / f"{tp}.safetensors"
        for arguments in (
            ("convert_weights.py", "--hf", hf, "--out", out, "--tp", tp),
            ("-m", "tools.verify", out),
            ("-m", "tools.capture", "--ckpt", out, *prompt, "--out", captured),
            ("-m", "tools.audit", "--hf", hf, "--ckpt", out, *prompt),
        ):
            ran = run(*arguments)
            assert ran.returncode == 0, ran.stderr
        assert load_file(captured)["ids"].tolist() == [PROMPT + ids]
        ran = run(COMMAND, "--ckpt", out, *prompt, "--max-new-tokens", 8, "--json")
        assert json.loads(ran.stdout)["completions"][0]["ids"] == ids, ran.stderr
    ran = run(COMMAND, "--ckpt", tmp_path / "tp1", *prompt, "--compile")
    assert (ran.returncode, ran.stderr.count("\n")) == (2, 1) and "--compile is for a CPU, on Linux" in ran.stderr


def test_ranks_without_shared_memory_need_no_name_of_their_host(
    converted: Callable, hf_checkpoint: Callable, tmp_path: Path
) -> None:
    """A laptop's name often does not resolve; the file alone starts its ranks as a laptop does."""
    shutil.copy(ROOT / COMMAND, tmp_path)
    named = ("unshare", *NEW_USER, "--uts", "sh", "-c", 'hostname no-such-host.invalid && exec "$@"', "sh")
    flags = ("--ckpt", str(converted("llama-3", 2)), "--prompt-ids", "7,8", "--max-new-tokens", "8")
    line = [*named, sys.executable, "-u", str(tmp_path / COMMAND), *flags]
    ran = subprocess.run(line, capture_output=True, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"}, timeout=60)
    _, ids = hf_greedy(hf_model(hf_checkpoint("llama-3"), torch.float32), PROMPT, 8)
    assert (ran.returncode, ran.stdout) == (0, f"{ids}\n"), ran.stderr

"""Ranks on two hosts: two network namespaces with an address each and a cable between them, made by these tests.

A namespace is that of a process that sleeps, and goes with it. From there nothing else can be reached.
"""

import os
import shutil
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from tests.helpers import hf_greedy, hf_model
from tests.test_ranks import TORCHRUN, Run, convert_long

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
        both = Hosts(*(() if os.geteuid() == 0 else ("--user", "--map-root-user")))
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

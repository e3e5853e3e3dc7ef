"""Ranks that end together, if torchrun has started them, on one host or several.

    join(timeout)  # in each rank, in place of init_process_group

Rank 0 listens to all others, and they to rank 0, as `launch/ranks.py` does for ranks that were forked.
"""

from __future__ import annotations

import atexit
import ipaddress
import os
import secrets
import signal
import socket
import sys
import threading
import time
from contextlib import suppress
from datetime import timedelta
from multiprocessing.connection import Connection, wait
from pathlib import Path
from types import TracebackType

import torch.distributed as dist

from launch.ranks import BEAT, DONE, FAILED, GRACE, Listener, Sender, die_with_parent, no_answer
from llama_neuron import is_under_torchrun

FAILURE = "failed: its host says why"


def program() -> str:
    """The command's name in its messages: its package's, where `python -m` runs a __main__.py."""
    path = Path(sys.argv[0])
    return f"{path.parent.name}.py" if path.name == "__main__.py" else path.name


def complain(what: str) -> None:
    """One line, as the command itself would say it."""
    print(f"{program()}: error: {what}", file=sys.__stderr__, flush=True)


def may_speak() -> bool:
    """Whether this process, which is about to end with an error, says why: of torchrun's ranks on a host, the first."""
    if not is_under_torchrun():
        return True
    try:
        return agents_store(GRACE).add(f"spoken/{os.environ['GROUP_RANK']}", 1) == 1
    except RuntimeError:  # it is gone
        return os.environ["LOCAL_RANK"] == "0"


def agents_store(timeout: float) -> dist.Store:
    """What the ranks of all hosts can read and write, in the process of torchrun on the first host."""
    address = os.environ["MASTER_ADDR"]
    port = int(os.environ["MASTER_PORT"])
    store = dist.TCPStore(address, port, timeout=timedelta(seconds=timeout), wait_for_workers=False)
    return dist.PrefixStore(f"ranks/{os.environ['TORCHELASTIC_RESTART_COUNT']}", store)


def gloo_address() -> str:
    """The address that gloo gives to other hosts: the first of this host's name that is its own, else the loopback."""
    with suppress(OSError):
        for family, kind, _, _, address in socket.getaddrinfo(socket.gethostname(), 0, type=socket.SOCK_STREAM):
            with suppress(OSError), socket.socket(family, kind) as probe:
                probe.bind(address)
                return address[0]
    return "127.0.0.1"


def check_address() -> None:
    """Raises OSError if there are other hosts, and gloo would send them to their own loopback."""
    several_hosts = os.environ["WORLD_SIZE"] != os.environ["LOCAL_WORLD_SIZE"]
    if not several_hosts or "GLOO_SOCKET_IFNAME" in os.environ:
        return
    address = gloo_address()
    if ipaddress.ip_address(address).is_loopback:
        lead = f"the name of this host, {socket.gethostname()}, is {address}, where no other host finds it"
        raise OSError(f"{lead}: set GLOO_SOCKET_IFNAME to the network interface that leads to them")


def join(timeout: float) -> None:
    """Makes torchrun's ranks one process group, over gloo, that ends as one.

    A rank that has destroyed the group may end. Any other end of a rank ends all of them, with exit code 1: within
    seconds if it dies, after `timeout` seconds if it is not heard. On each host one rank says so on stderr.

    Raises OSError if rank 0 is out of reach, or this host is for others (`check_address`).
    """
    die_with_parent()
    ties = Ties(timeout)
    atexit.register(ties.leave)
    sys.excepthook = ties.explain
    ties.start()
    ties.complete.wait()
    check_address()
    dist.init_process_group("gloo", timeout=timedelta(seconds=timeout))
    ties.joined = True


class Ties(threading.Thread):
    """Listens to the other ranks, and ends this one with them. Rank 0 listens to all, and tells the others."""

    def __init__(self, timeout: float) -> None:
        super().__init__(daemon=True)
        self.timeout = timeout
        self.joined = False
        self.complete = threading.Event()
        names = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "GROUP_RANK")
        self.rank, ranks, local_rank, local_ranks, self.host = (int(os.environ[name]) for name in names)
        first = self.rank - local_rank
        self.here = range(first, first + local_ranks)  # the ranks on this host
        self.places: dict[int, tuple[int, int]] = {}  # host and process id of ranks
        self.sender = Sender()
        self.server = None
        self.listener = Listener([0] if self.rank else range(1, ranks), timeout)
        if self.rank == 0:
            self.listen()
        else:
            self.connect()
        self.sender.start()

    def listen(self) -> None:
        """Rank 0: opens a port for the others, and tells them by torchrun's store."""
        if socket.has_dualstack_ipv6():
            self.server = socket.create_server(("", 0), family=socket.AF_INET6, dualstack_ipv6=True)
        else:
            self.server = socket.create_server(("", 0))
        self.secret = secrets.token_hex()
        agents_store(self.timeout).set("rank0", f"{self.server.getsockname()[1]} {self.secret} {os.getpid()}")

    def accept(self) -> None:
        """Rank 0: adds a line to whoever knows the secret."""
        connected, _ = self.server.accept()
        connected.settimeout(GRACE)
        try:
            secret, *numbers = connected.recv(256).decode().split()
            rank, host, pid = map(int, numbers)
        except (OSError, ValueError):
            return
        if secrets.compare_digest(secret, self.secret):
            self.add(connected, rank, host, pid)

    def connect(self) -> None:
        """Other ranks: makes the line to rank 0."""
        store = agents_store(self.timeout)
        until = time.monotonic() + self.timeout
        while not store.check(["rank0"]):
            if time.monotonic() > until:
                raise ChildProcessError(f"rank 0 {no_answer(self.timeout)}")
            time.sleep(0.05)
        port, secret, pid = store.get("rank0").decode().split()
        address = os.environ["MASTER_ADDR"]
        try:
            connected = socket.create_connection((address, int(port)), self.timeout)
            connected.sendall(f"{secret} {self.rank} {self.host} {os.getpid()}".encode())
        except OSError as error:
            raise OSError(f"rank {self.rank} cannot reach port {port} of {address} ({error}): open it") from None
        self.add(connected, 0, 0, int(pid))

    def add(self, connected: socket.socket, rank: int, host: int, pid: int) -> None:
        connected.settimeout(None)
        line = Connection(connected.detach())
        self.listener.lines[line] = rank
        self.places[rank] = (host, pid)
        self.sender.lines.append(line)

    def run(self) -> None:
        others = [self.server] if self.server is not None else []
        while self.listener.silence:
            if len(self.listener.lines) == len(self.listener.silence):
                self.complete.set()
            for rank, message in self.listener.hear(*others):
                self.answer(rank, message)
            for rank in self.listener.silent():
                self.end(rank, no_answer(self.timeout))
            if wait(others, 0):
                self.accept()
        self.complete.set()

    def answer(self, rank: int, message: bytes | None) -> None:
        if message == DONE:
            self.listener.forget(rank)
        elif message == FAILED:
            self.end(rank, FAILURE)
        elif message is None:
            self.end(rank, "died (out of memory?)")
        else:  # rank 0 tells what it has heard of another
            other, host, pid, what = message.decode().split(" ", 3)
            self.places[int(other)] = int(host), int(pid)
            self.end(int(other), what)

    def end(self, rank: int, what: str) -> None:
        """Ends this process, because something happened to a rank."""
        host, pid = self.places.get(rank, (-1, 0))
        spoke = rank in self.here and what == FAILURE
        if self.rank == min({*self.here} - {rank}, default=rank):
            if not spoke:
                complain(f"rank {rank} {what}")
            if host == self.host and what == no_answer(self.timeout):
                os.kill(pid, signal.SIGKILL)  # torchrun would wait for it
        if self.rank == 0:
            self.sender.outbox.put(f"{rank} {host} {pid} {what}".encode())
            time.sleep(BEAT)  # until that is sent
        os._exit(1)

    def explain(self, kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
        """sys.excepthook: an error here may be no more than the echo of another rank's end, which `run` will name."""
        self.join(GRACE)
        if not may_speak():
            return
        if "timed out" in str(error).lower():
            complain(f"the ranks have waited {self.timeout:g} s for one that is busy: raise --timeout")
        else:
            sys.__excepthook__(kind, error, trace)

    def leave(self) -> None:
        """At exit: says whether the others may go on without this rank."""
        done = self.joined and not dist.is_initialized()
        self.sender.outbox.put(DONE if done else FAILED)
        self.sender.join(GRACE)

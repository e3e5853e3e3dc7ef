"""Ranks that end together: if one dies or is stopped, one line says so and the whole run ends.

    fork(work, count, timeout)  # makes processes, and listens to them

Every rank sends a beat twice a second, from a thread of its own. So whoever computes, loads or compiles for long is
heard, and no collective has to look at a clock. `launch/torchrun.py` does the same for ranks that torchrun has started.
"""

from __future__ import annotations

import os
import pickle
import queue
import signal
import threading
import time
import traceback
from collections.abc import Callable, Iterable
from multiprocessing.connection import Connection, wait

import torch.multiprocessing as mp

BEAT = 0.5  # seconds between two beats
GRACE = 5.0  # seconds that a process has to end, or to hear why it should
# the last message of a rank is one of these
DONE = b"done"
FAILED = b"failed"


def die_with_parent(signal_number: int = signal.SIGKILL) -> None:
    """Has the system send this process a signal if its parent ends (prctl(2), on Linux)."""
    mp._prctl_pr_set_pdeathsig(signal_number)


class Sender(threading.Thread):
    """The one that writes to `lines`: what is in the outbox, and a beat whenever that was empty for a while."""

    def __init__(self, lines: Iterable[Connection] = ()) -> None:
        super().__init__(daemon=True)
        self.lines = [*lines]
        self.outbox = queue.SimpleQueue()

    def run(self) -> None:
        message = b""
        while message not in (DONE, FAILED):
            try:
                message = self.outbox.get(timeout=BEAT)
            except queue.Empty:
                message = b""
            for line in [*self.lines]:
                try:
                    line.send_bytes(message)
                except OSError:
                    self.lines.remove(line)  # why it is closed, the listener finds out


class Listener:
    """Hears what ranks send over lines, and counts for how long each has been silent."""

    def __init__(self, ranks: Iterable[int], timeout: float) -> None:
        self.lines: dict[Connection, int] = {}
        self.silence = dict.fromkeys(ranks, 0.0)
        self.timeout = timeout  # seconds

    def hear(self, *others: object) -> list[tuple[int, bytes | None]]:
        """(rank, message) for each message that is no beat, None for a line that was closed.

        Waits until there is something, also at one of `others`, but no longer than a beat takes.
        """
        began = time.monotonic()
        ready = wait([*self.lines, *others], BEAT)
        waited = min(time.monotonic() - began, BEAT)  # while this process was stopped itself, it heard nobody
        for rank in self.silence:
            self.silence[rank] += waited
        heard = []
        for line in [line for line in ready if line in self.lines]:
            rank = self.lines[line]
            self.silence[rank] = 0.0
            try:
                message = line.recv_bytes()
            except (EOFError, OSError):
                message = None
                del self.lines[line]
            if message != b"":
                heard.append((rank, message))
        return heard

    def forget(self, rank: int) -> None:
        """It has ended, as it should."""
        del self.silence[rank]
        self.lines = {line: other for line, other in self.lines.items() if other != rank}

    def silent(self) -> list[int]:
        return [rank for rank, seconds in self.silence.items() if seconds >= self.timeout]


def no_answer(timeout: float) -> str:
    return f"has not answered for {timeout:g} s"


# ---- ranks of this process


class InOtherProcess(Exception):
    """The traceback of an exception that was raised in a forked process, as the cause of it."""

    def __str__(self) -> str:
        return f"\n{self.args[0]}"


def fork(work: Callable[[int], None], count: int, timeout: float = 60.0, name: str = "rank") -> None:
    """Calls work(number) in `count` forked processes, and waits for them. None is left, however this ends.

    Call it before anything is computed: threads are not forked. Raises what `work` raised first, in the words of
    RuntimeError if it cannot be pickled, SystemExit too. Raises ChildProcessError if a process is killed, or has been
    silent for `timeout` seconds; it says "`name` 1", and what happened. Ctrl-C is answered here, not in the processes.
    """
    context = mp.get_context("fork")
    listener = Listener(range(count), timeout)
    processes = {}
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})  # until a process has dropped our handler of it
    try:
        for number in range(count):
            line, sends = context.Pipe(duplex=False)
            process = context.Process(target=run_forked, args=(work, number, sends, os.getpid()))
            process.start()
            sends.close()
            listener.lines[line] = number
            processes[number] = process
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
        while processes:
            for _, message in listener.hear(*(process.sentinel for process in processes.values())):
                if message is not None:
                    error, trace = pickle.loads(message)
                    raise error from InOtherProcess(trace)
            for number, process in [*processes.items()]:
                exit_code = process.exitcode
                if exit_code == 0:
                    listener.forget(number)
                    del processes[number]
                elif exit_code is not None:
                    raise ChildProcessError(f"{name} {number} {ending(exit_code)}")
            for number in listener.silent():
                raise ChildProcessError(f"{name} {number} {no_answer(timeout)}")
    finally:
        for process in processes.values():
            process.terminate()
        for process in processes.values():
            if process.exitcode is None:
                os.kill(process.pid, signal.SIGCONT)  # one that is stopped is terminated only then
            process.join(GRACE)
            process.kill()
            process.join()
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def ending(exit_code: int) -> str:
    """What happened to a process, by multiprocessing's exit code."""
    if exit_code >= 0:
        return f"ended with exit code {exit_code}"
    reason = "out of memory?" if exit_code == -signal.SIGKILL else signal.strsignal(-exit_code)
    return f"was killed by signal {-exit_code} ({reason})"


def run_forked(work: Callable[[int], None], number: int, line: Connection, parent: int) -> None:
    """One of the processes of `fork`."""
    die_with_parent()
    if os.getppid() != parent:
        os._exit(1)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGTERM})
    sender = Sender([line])
    sender.start()
    try:
        work(number)
    except BaseException as error:
        trace = traceback.format_exc()
        try:
            message = pickle.dumps((error, trace))
            pickle.loads(message)
        except Exception:
            message = pickle.dumps((RuntimeError(f"{type(error).__name__}: {error}"), trace))
        sender.outbox.put(message)
        while True:  # until the parent, which has read it, ends this process
            signal.pause()

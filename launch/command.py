"""What a command says when it ends with an error: one line on stderr, and an exit code."""

from __future__ import annotations

import io
import sys
from collections.abc import Callable
from typing import NoReturn

from launch.torchrun import may_speak, program
from llama_neuron import UsageError


def run_command(main: Callable[[], None]) -> None:
    """Runs a command and reports a failure in one line: user errors exit with 2, I/O and rank failures with 1, Ctrl-C
    with 130. Characters that stdout cannot show become "?".

    Every other error is shown whole: it may be one in the model, or the ImportError of a broken Neuron installation. So
    whoever asks the machine for something (memory, a compiler, a folder) turns the failure into an OSError that names
    what to set.
    """
    try:
        if sys.stdout is None:  # the next file opened would become stdout
            raise OSError("stdout is closed: redirect it, to /dev/null if need be")
        if isinstance(sys.stdout, io.TextIOWrapper):  # and not a test's or a notebook's
            sys.stdout.reconfigure(errors="replace")  # it may be ASCII
        main()
        print(end="", flush=True)
    except (UsageError, OSError, KeyboardInterrupt) as error:
        fail(error)
    except RuntimeError as error:
        if "can't allocate memory" not in str(error):  # torch's allocator on a CPU has no class of its own
            raise
        fail(UsageError("the model does not fit in memory: lower --batch-size or --sequence-length"))


def fail(error: BaseException) -> NoReturn:
    """Says why a command ends, and ends it."""
    if may_speak():
        text = str(error) or "interrupted"
        # the message may quote an untrusted file
        text = "".join(character if character.isprintable() else "?" for character in text)
        print(f"{program()}: error: {text}", file=sys.stderr)
    if isinstance(error, UsageError):
        sys.exit(2)
    if isinstance(error, KeyboardInterrupt):
        sys.exit(130)
    sys.stdout = None  # exiting would flush it and fail again
    sys.exit(1)

"""Stand-in for the compiler: what it makes of a graph is the graph."""

from tools.ports.closed.inert import attribute as __getattr__  # noqa: F401


def neuron_xla_compile(module_bytes: bytes, compiler_flags: str, **settings: object) -> bytes:
    return module_bytes

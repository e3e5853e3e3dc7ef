"""Answers imports of AWS's kernels, which NxD imports and a Llama without kernels never calls.

A name for which there is no file is `Inert`: it can be a decorator, a default, an annotation or a base class, and that
is all.
"""

from __future__ import annotations

import importlib.abc
import importlib.machinery
import sys
from types import ModuleType


class InertType(type):
    """Every attribute and item of `Inert` is `Inert` again."""

    def __getattr__(cls, name: str) -> type:
        return attribute(name)

    def __getitem__(cls, index: object) -> type:
        return cls


class Inert(metaclass=InertType):
    def __new__(cls, *decorated: object, **settings: object) -> object:
        return decorated[0] if decorated else cls


def attribute(name: str) -> type:
    """The `__getattr__` of a module: any name but Python's own."""
    if name.startswith("__"):
        raise AttributeError(name)
    return Inert


class InertModules(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Comes after the finder that looks on the disk, so a module that has a file is that file."""

    def __init__(self, package: str, known: dict[str, dict[str, object]]) -> None:
        self.package = package
        self.known = known

    def find_spec(self, name: str, path: object = None, target: object = None) -> importlib.machinery.ModuleSpec | None:
        if name == self.package or name.startswith(f"{self.package}."):
            return importlib.machinery.ModuleSpec(name, self, is_package=True)
        return None

    def exec_module(self, module: ModuleType) -> None:
        module.__getattr__ = attribute
        vars(module).update(self.known.get(module.__name__, {}))


def answer_for(package: str, known: dict[str, dict[str, object]] | None = None) -> None:
    """`package` and its submodules can be imported from here on, and have every attribute.

    `known`: by the names of modules, attributes that are more than inert."""
    sys.meta_path.append(InertModules(package, known or {}))
    if package in sys.modules:
        sys.modules[package].__getattr__ = attribute

"""Imports go one way: from the tools to the commands, from the commands to the model, and from the model to nothing."""

import ast
from pathlib import Path

import pytest

from tests.helpers import ROOT

OURS = {"checkpoint", "convert_weights", "cpu", "launch", "llama_neuron", "test_llama_neuron", "tests", "tools"}

# where a file is, and what of this project it may import
ALLOWED = {
    "llama_neuron.py": {"checkpoint", "launch", "llama_neuron"},  # inside of functions, see below
    "convert_weights.py": {"checkpoint", "launch", "llama_neuron"},
    "checkpoint": {"checkpoint", "llama_neuron"},
    "launch": {"cpu", "launch", "llama_neuron"},
    "cpu": {"cpu"},
    "tools": {"checkpoint", "convert_weights", "cpu", "launch", "llama_neuron", "tools"},
}


def files(place: str) -> list[Path]:
    path = ROOT / place
    return [path] if path.is_file() else sorted(path.rglob("*.py"))


def imports(tree: ast.AST) -> set[str]:
    """The top-level names of this project that are imported anywhere below a node."""
    names: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute here"
            names.add(node.module)
    return {name.partition(".")[0] for name in names} & OURS


@pytest.mark.parametrize("place", ALLOWED)
def test_imports_go_one_way(place: str) -> None:
    assert files(place)
    for file in files(place):
        assert imports(ast.parse(file.read_text())) <= ALLOWED[place], file


def test_llama_neuron_imports_nothing_of_this_project_when_it_is_imported() -> None:
    tree = ast.parse((ROOT / "llama_neuron.py").read_text())
    for statement in tree.body:
        is_main = isinstance(statement, ast.If) and "__main__" in ast.unparse(statement.test)
        if not isinstance(statement, ast.FunctionDef | ast.ClassDef) and not is_main:
            assert imports(statement) == set(), ast.unparse(statement)


def test_nothing_at_the_top_imports_from_tools() -> None:
    """Tests may: `test_llama_neuron.py` is one."""
    top = {file.name for file in ROOT.glob("*.py")} - {"test_llama_neuron.py"}
    assert top == {"conftest.py", "convert_weights.py", "llama_neuron.py"}
    for name in top:
        assert "tools" not in imports(ast.parse((ROOT / name).read_text())), name


def test_every_folder_of_python_files_is_a_package() -> None:
    """Without an `__init__.py`, a package with the same name anywhere on sys.path would be imported in its place. The
    stand-ins for closed packages are in a folder that is put on sys.path itself."""
    for folder in ("checkpoint", "cpu", "launch", "tests", "tools"):
        for inner in {file.parent for file in (ROOT / folder).rglob("*.py")} - {ROOT / "tests/nxd/closed"}:
            assert (inner / "__init__.py").exists(), inner

"""No import cycle: the graph of all imports in src/involution, those inside functions too, is acyclic."""

import ast
from collections.abc import Iterator
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1] / "src" / "involution"


def modules(root: Path) -> dict[str, Path]:
    """Every module's file by its dotted name."""
    files = {}
    for file in root.rglob("*.py"):
        parts = (root.name, *file.relative_to(root).with_suffix("").parts)
        files[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = file
    return files


def imported(name: str, file: Path, known: set[str]) -> Iterator[str]:
    """The modules among `known` that a module names in an import statement anywhere in its file.

    An import of a submodule also runs its packages' `__init__`. Those edges are left out: every package that imports
    its submodules would be a cycle. An `__init__` that is named itself is an edge.
    """
    package = name.split(".") if file.name == "__init__.py" else name.split(".")[:-1]
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name in known)
        elif isinstance(node, ast.ImportFrom):
            start = package[: len(package) - node.level + 1] if node.level else []
            base = ".".join([*start, *([node.module] if node.module else [])])
            for alias in node.names:
                if f"{base}.{alias.name}" in known:
                    yield f"{base}.{alias.name}"
                elif base in known:
                    yield base


def graph(root: Path) -> dict[str, set[str]]:
    """The modules that every module imports."""
    files = modules(root)
    return {name: set(imported(name, file, set(files))) - {name} for name, file in files.items()}


def test_imports_are_acyclic() -> None:
    edges = graph(ROOT)
    assert len(edges) > 100
    assert "involution.ops.registration" in edges["involution.ops.functional"]
    try:
        TopologicalSorter(edges).prepare()
    except CycleError as error:
        pytest.fail(" -> ".join(reversed(error.args[1])))


def test_a_cycle_through_a_function_is_found(tmp_path: Path) -> None:
    package = tmp_path / "package"
    package.mkdir()
    (package / "__init__.py").write_text("from . import first\n")
    (package / "first.py").write_text("from .second import x\n")
    (package / "second.py").write_text("def x():\n    from package import third\n")
    (package / "third.py").write_text("")
    TopologicalSorter(graph(package)).prepare()
    (package / "third.py").write_text("def y():\n    import package.first\n")
    with pytest.raises(CycleError):
        TopologicalSorter(graph(package)).prepare()

"""The house keeps its order: imports run one way, and no shared file names a method or benchmark.

The arrows are those of docs/design.md; they are read from the source, imports inside functions too.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from eval.benchmarks.registry import BENCHMARKS

ROOT = Path(__file__).parent.parent

LIBRARY: dict[str, int] = {
    "errors": 0,
    "heads": 0,
    "models": 1,
    "prompts": 1,
    "method": 2,
    "primitives": 2,
    "methods": 3,
    "engine": 4,
    "patch": 5,
    "integrations": 6,
}
"""Rooms of vlm_patch by floor: a room imports from its own floor or from lower ones."""

EVALUATION: dict[str, int] = {
    "errors": 0,
    "schema": 0,
    "benchmarks": 1,
    "pocket": 2,
    "runs": 3,
    "reports": 4,
    "studies": 5,
    "support": 5,
    "speed": 6,
    "cli": 7,
    "__main__": 8,
}


def sources(package: str) -> list[Path]:
    return sorted((ROOT / package).rglob("*.py"))


def module(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imports(path: Path) -> Iterator[str]:
    """Full names of what a file imports, `from a import b` as `a.b`."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            own = module(path).split(".")
            package = own if path.name == "__init__.py" else own[:-1]
            base = package[: len(package) - node.level + 1] if node.level else []
            start = ".".join([*base, *([node.module] if node.module else [])])
            yield from (f"{start}.{alias.name}" for alias in node.names)


@pytest.mark.parametrize("package", ["vlm_patch", "eval"])
def test_packages_import_downwards(package: str) -> None:
    allowed = {"vlm_patch": {"eval", "tests"}, "eval": {"tests"}}[package]
    wrong = [
        f"{path.relative_to(ROOT)} imports {name}"
        for path in sources(package)
        for name in imports(path)
        if name.split(".")[0] in allowed
    ]
    assert not wrong


@pytest.mark.parametrize(("package", "floors"), [("vlm_patch", LIBRARY), ("eval", EVALUATION)])
def test_rooms_import_downwards(package: str, floors: dict[str, int]) -> None:
    wrong = []
    for path in sources(package):
        room = path.relative_to(ROOT / package).parts[0].removesuffix(".py")
        if room == "__init__":
            continue
        for name in imports(path):
            parts = name.split(".")
            if parts[0] != package or len(parts) < 2 or parts[1] not in floors:
                continue
            if floors[parts[1]] > floors[room]:
                wrong.append(f"{path.relative_to(ROOT)} imports {name}")
    assert not wrong


@pytest.mark.parametrize("package", ["vlm_patch", "eval"])
def test_no_module_imports_itself_in_a_circle(package: str) -> None:
    names = {module(path) for path in sources(package)}

    def targets(path: Path) -> set[str]:
        found = {name if name in names else name.rpartition(".")[0] for name in imports(path)}
        return (found & names) - {package}

    graph = {module(path): targets(path) for path in sources(package)}
    settled: set[str] = set()

    def visit(name: str, way: tuple[str, ...]) -> None:
        assert name not in way, f"a circle: {' -> '.join([*way[way.index(name) :], name])}"
        if name not in settled:
            for target in sorted(graph[name] - {name}):
                visit(target, (*way, name))
            settled.add(name)

    for name in sorted(graph):
        visit(name, ())


def words(path: Path) -> set[str]:
    """Every name, attribute and text constant of a file, but for its docstrings."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    documented = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    docs = {
        id(node.body[0].value)
        for node in ast.walk(tree)
        if isinstance(node, documented) and node.body and isinstance(node.body[0], ast.Expr)
    }
    found: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Name):
            found.add(node.id)
        elif isinstance(node, ast.Attribute):
            found.add(node.attr)
        elif (
            isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in docs
        ):
            found.add(node.value)
    return found


MAY_NAME = ("benchmarks", "pocket", "studies/demo.py", "support/tiny_text.py")
"""The benchmarks and their registry, the demo and its world, which show two, and a list of words in
which a chair is a chair."""


def parts_of_names(path: Path) -> set[str]:
    """What the names and texts of a file are made of: chair_s is chair and s."""
    split = (re.split(r"[^a-z0-9]+", word.lower()) for word in words(path))
    return {part for parts in split for part in parts}


def test_no_shared_file_of_eval_names_a_benchmark() -> None:
    names = {re.sub(r"[^a-z0-9]", "", name) for name in BENCHMARKS}
    assert {"chair", "pope", "amber", "mmvp"} < names
    wrong = [
        f"{path.relative_to(ROOT)} names {found}"
        for path in sources("eval")
        if not path.relative_to(ROOT / "eval").as_posix().startswith(MAY_NAME)
        if (found := names & parts_of_names(path))
    ]
    assert not wrong


def test_a_benchmark_is_named_in_its_own_files_only() -> None:
    """In `benchmarks` the registry names all; POPE and Object HalBench build on CHAIR."""
    room, wrong = ROOT / "eval" / "benchmarks", []
    builds_on = {"pope": {"chair"}, "object_halbench": {"chair"}}
    for name in (name.replace("-", "_") for name in BENCHMARKS):
        for path in sources("eval/benchmarks"):
            own = path.relative_to(room).parts[0].removesuffix(".py")
            if own in ("registry", name) or name in builds_on.get(own, ()):
                continue
            if any(f"eval.benchmarks.{name}" in imported for imported in imports(path)):
                wrong.append(f"{path.relative_to(ROOT)} imports {name}")
    assert not wrong

"""The tests that take a GPU are collected, say what they prove, and call only what exists, as it can be called."""

import ast
import importlib
import inspect
import subprocess
import sys
from pathlib import Path

import pytest

FOLDER = Path(__file__).parents[1] / "gpu"
FILES = sorted(FOLDER.glob("*.py"))
PACKAGE = "tests.gpu"


def imported(tree: ast.Module) -> dict[str, object]:
    """Name -> what `from MODULE import NAME` gives, for all of a file's; fails where there is no such name."""
    found: dict[str, object] = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom):
            dots = "." * node.level
            module = importlib.import_module(f"{dots}{node.module}", package=PACKAGE if dots else None)
            for alias in node.names:
                assert hasattr(module, alias.name), f"{module.__name__} has no {alias.name}"
                found[alias.asname or alias.name] = getattr(module, alias.name)
    return found


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.name)
def test_they_call_only_functions_that_exist_with_arguments_that_these_take(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(str(Path(__file__).parents[2]))
    tree = ast.parse(path.read_text())
    names = imported(tree)
    for node in ast.walk(tree):
        if not (isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in names):
            continue
        if any(isinstance(a, ast.Starred) for a in node.args) or any(k.arg is None for k in node.keywords):
            continue
        keywords = {str(keyword.arg): None for keyword in node.keywords}
        try:
            inspect.signature(names[node.func.id]).bind(*node.args, **keywords)  # type: ignore[arg-type]
        except TypeError as error:
            raise AssertionError(f"{path.name}, line {node.lineno}: {ast.unparse(node)}: {error}") from None


def test_each_says_what_it_proves() -> None:
    tests = [
        node
        for path in FILES
        for node in ast.parse(path.read_text()).body
        if isinstance(node, ast.FunctionDef) and node.name.startswith("test_")
    ]
    assert len(tests) >= 18
    assert [test.name for test in tests if "Proves" not in (ast.get_docstring(test) or "")] == []


def test_they_are_collected_and_skipped_with_the_reason() -> None:
    command = [sys.executable, "-m", "pytest", "tests/gpu", "-rs"]
    result = subprocess.run(command, cwd=FOLDER.parents[1], capture_output=True, text=True, timeout=120, check=False)
    if "skipped" not in result.stdout:
        pytest.skip("there is a GPU: they run")
    assert "run `make test-gpu` where there is one" in result.stdout and result.returncode == 0, result.stdout
    assert "failed" not in result.stdout and "error" not in result.stdout

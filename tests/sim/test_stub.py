"""torchext/_sim.pyi has the names and parameters of the extension module torchext._sim."""

from __future__ import annotations

import ast
import re
from pathlib import Path

from torchext import _sim

STUB = Path(_sim.__file__).with_name("_sim.pyi")


def declared(body: list[ast.stmt]) -> dict[str, ast.stmt]:
    return {node.name: node for node in body if isinstance(node, ast.FunctionDef | ast.ClassDef)}


def public(scope: object) -> set[str]:
    return {name for name in vars(scope) if not name.startswith("_")}


def parameters(function: ast.FunctionDef) -> list[str]:
    positional = [*function.args.posonlyargs, *function.args.args]
    return [a.arg for a in positional if a.arg != "self"]


def signature_parameters(function: object) -> list[str]:
    """The parameters in pybind11's docstring: `arg0`, `arg1`, ... if the binding names none."""
    first = (getattr(function, "__doc__", None) or "").splitlines()[0]
    return [name for name in re.findall(r"(\w+): (?=\S)", first) if name != "self"]


def test_names():
    stub = declared(ast.parse(STUB.read_text()).body)
    assert set(stub) == public(_sim)
    for name, node in stub.items():
        scope = getattr(_sim, name)
        if isinstance(node, ast.ClassDef) and not issubclass(scope, Exception):
            methods = {member for member in declared(node.body) if not member.startswith("_")}
            assert methods == public(scope), name


def test_parameters():
    checked = 0
    for name, node in declared(ast.parse(STUB.read_text()).body).items():
        scope = getattr(_sim, name)
        functions = [(node, scope)]
        if isinstance(node, ast.ClassDef):
            functions = [
                (member, vars(scope)[key])
                for key, member in declared(node.body).items()
                if not issubclass(scope, Exception) and not isinstance(vars(scope)[key], property)
            ]
        for declaration, function in functions:
            assert isinstance(declaration, ast.FunctionDef)
            actual = signature_parameters(function)
            expected = parameters(declaration)
            assert len(actual) == len(expected), (name, declaration.name)
            if not any(re.fullmatch(r"arg\d+", a) for a in actual):
                assert actual == expected, (name, declaration.name)
            checked += 1
    assert checked > 15

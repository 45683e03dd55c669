"""The stub says what the compiled module has."""

from __future__ import annotations

import ast
from pathlib import Path

import edgemoe
from edgemoe import _native


def public(names: list[str]) -> set[str]:
    return {name for name in names if not name.startswith("_")}


def test_the_stub_names_what_the_module_has() -> None:
    stub = ast.parse((Path(edgemoe.__file__).parent / "_native.pyi").read_text())
    classes = {node.name: node for node in stub.body if isinstance(node, ast.ClassDef)}
    functions = {node.name for node in stub.body if isinstance(node, ast.FunctionDef)}
    assert public(dir(_native)) == set(classes) | functions
    for name, node in classes.items():
        members = [item.name for item in node.body if isinstance(item, ast.FunctionDef)]
        assert public(dir(getattr(_native, name))) == public(members)

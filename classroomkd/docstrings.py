"""Extract descriptions of options from docstrings without importing the source."""

from __future__ import annotations

import ast
import inspect
import re
from functools import cache
from pathlib import Path


@cache
def module(file: Path) -> ast.Module:
    """The parsed source of a module."""
    return ast.parse(file.read_text(encoding="utf-8"))


def definition(file: Path, name: str) -> ast.ClassDef | ast.FunctionDef:
    """The class or function ``name`` of a module."""
    return next(
        node
        for node in module(file).body
        if isinstance(node, ast.ClassDef | ast.FunctionDef) and node.name == name
    )


def summary(node: ast.Module | ast.ClassDef | ast.FunctionDef) -> str:
    """The first paragraph of a docstring as one line."""
    return _joined((ast.get_docstring(node) or "").partition("\n\n")[0])


def fields(node: ast.ClassDef) -> dict[str, str]:
    """Each annotated field of a class with the docstring below it, or an empty string."""
    meanings: dict[str, str] = {}
    for field, below in zip(node.body, [*node.body[1:], None], strict=True):
        if isinstance(field, ast.AnnAssign) and isinstance(field.target, ast.Name):
            meanings[field.target.id] = _joined(inspect.cleandoc(_text(below)))
    return meanings


def arguments(node: ast.ClassDef | ast.FunctionDef) -> dict[str, str]:
    """The description of each argument in the section "Args:" of a docstring."""
    lines = (ast.get_docstring(node) or "").partition("\nArgs:\n")[2].splitlines()
    meanings: dict[str, str] = {}
    names: list[str] = []
    for line in lines:
        if line and not line.startswith(" "):  # the next section
            break
        if begins := re.match(r" {4}(\w[\w*, ]*): (.*)", line):
            names = begins[1].split(", ")
            meanings |= dict.fromkeys(names, begins[2])
        elif names and line:
            meanings |= {name: f"{meanings[name]} {line.strip()}" for name in names}
    return meanings


def _text(node: ast.stmt | None) -> str:
    """The value of a string statement, else an empty string."""
    if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant):
        return node.value.value if isinstance(node.value.value, str) else ""
    return ""


def _joined(text: str) -> str:
    return " ".join(text.split())

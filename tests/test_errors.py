"""Foreign errors in one line."""

from __future__ import annotations

import ast
import pathlib

import pytest

from tap_deploy.errors import first_line

PROJECT = pathlib.Path(__file__).parent.parent
PRODUCT = ("tap_deploy", "export", "engines", "benchmarks", "scripts")


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (RuntimeError("no kernel\nlong trace"), "no kernel"),
        (RuntimeError("\n  \n no kernel "), "no kernel"),
        (RuntimeError(""), "RuntimeError"),
        (MemoryError(), "MemoryError"),
        (OSError("\n"), "OSError"),
    ],
)
def test_the_first_line_of_an_error_says_something(error, line):
    assert first_line(error) == line


def test_nothing_else_takes_a_first_line_out_of_an_error():
    """``splitlines()[0]`` raises IndexError where there is no text."""
    found = []
    for path in (path for folder in PRODUCT for path in (PROJECT / folder).rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_bytes())):
            if (
                isinstance(node, ast.Subscript)
                and isinstance(node.value, ast.Call)
                and isinstance(node.value.func, ast.Attribute)
                and node.value.func.attr == "splitlines"
            ):
                found.append(f"{path}:{node.lineno}")
    assert found == []

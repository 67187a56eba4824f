"""Modules of examples/, which is no package: its folders are copied into containers."""

from __future__ import annotations

import importlib.util
import pathlib
import sys
from typing import Any

EXAMPLES = pathlib.Path(__file__).parents[1] / "examples"


def load(folder: str, name: str) -> Any:
    """Load ``examples/FOLDER/NAME.py`` anew, as a module of that name."""
    path = EXAMPLES / folder / f"{name}.py"
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module

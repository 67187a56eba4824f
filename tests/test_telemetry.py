"""The telemetry of onnxruntime and OpenVINO stays off, whoever imports them."""

from __future__ import annotations

import ast
import os
import subprocess
import sys

import pytest

from tests.test_errors import PRODUCT, PROJECT

SESSIONS = PROJECT / "tap_deploy" / "sessions"
PREDICT = (
    "import sys; from tap_deploy import TapPredictor\n"
    "with TapPredictor.from_bundle(sys.argv[1]) as predictor:\n"
    "    predictor.predict(sys.argv[2], points=[[[9, 9, 1]]])\n"
)
DOCTOR = "from tap_deploy.cli import main; main(['doctor', '--json'])"
COUNT = (
    "import sys; from tap_deploy.engines.verdict.kernels import *; "
    "kernels_in_onnxruntime(sys.argv[3])"
)

EXTRAS = "from tap_deploy.console.extras import require_quantize_extra as check; check()"


def imported_names(node):
    """Names of modules that a node imports."""
    match node:
        case ast.Import(names=names):
            return [alias.name for alias in names]
        case ast.ImportFrom(module=module):
            return [module or ""]
        case ast.Call(func=function, args=[ast.Constant(value=str(name)), *_]):
            called = getattr(function, "attr", getattr(function, "id", ""))
            return [name] if called in ("import_module", "__import__", "load_module") else []
    return []


@pytest.mark.parametrize(("package", "folder"), [("onnxruntime", "ort"), ("openvino", "openvino")])
def test_one_place_imports_the_backend(package, folder):
    found = {
        path
        for folder in PRODUCT
        for path in (PROJECT / folder).rglob("*.py")
        for node in ast.walk(ast.parse(path.read_bytes()))
        if any(name.partition(".")[0] == package for name in imported_names(node))
    }
    assert found == {SESSIONS / folder / "session.py"}


def run(home, code, *arguments, **variables):
    hidden = ("ORT_DISABLE_TELEMETRY", "XDG_CACHE_HOME")
    environment = {name: value for name, value in os.environ.items() if name not in hidden}
    return subprocess.run(
        [sys.executable, "-c", code, *map(str, arguments)],
        capture_output=True,
        text=True,
        check=True,
        env={**environment, "HOME": str(home), **variables},
        cwd=PROJECT,
    ).stdout


@pytest.mark.parametrize(
    "code", [PREDICT, DOCTOR, COUNT, EXTRAS], ids=["predict", "doctor", "engines", "quantize"]
)
def test_nothing_appears_in_the_home_folder(tmp_path, micro_bundle, photo, code):
    graph = micro_bundle.variant("fp32").path("prompt_decoder")
    run(tmp_path, code, micro_bundle.path, photo, graph)
    assert list(tmp_path.rglob("*")) == []


@pytest.mark.parametrize("package", ["tap_deploy.export", "tap_deploy.engines"])
def test_it_is_off_before_others_import_onnxruntime(tmp_path, package):
    code = f"import os, {package}; print(os.environ['ORT_DISABLE_TELEMETRY'])"
    assert run(tmp_path, code) == "1\n"


def test_what_the_user_chose_stays(tmp_path):
    code = (
        "import os; from tap_deploy.sessions.ort.session import import_onnxruntime\n"
        "import_onnxruntime(); print(os.environ['ORT_DISABLE_TELEMETRY'])"
    )
    assert run(tmp_path, code, ORT_DISABLE_TELEMETRY="0") == "0\n"

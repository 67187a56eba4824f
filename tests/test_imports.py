"""The cost and content of `import tap_deploy`."""

from __future__ import annotations

import subprocess
import sys

import pytest

import tap_deploy

HEAVY = (
    "jinja2",
    "torch",
    "onnx",
    "onnx_ir",
    "onnxruntime",
    "onnxscript",
    "rasterio",
    "tensorrt",
    "tensorrt_rtx",
)
# Where they are installed, older versions of Pillow look at these.
PILLOW_MAY_LOAD = {"cffi", "_cffi_backend", "defusedxml", "olefile"}

MENU = {
    "Bundle",
    "EncodedImage",
    "PictureFile",
    "Prompts",
    "Regions",
    "TapConfig",
    "TapError",
    "TapPredictor",
    "VerificationError",
    "Vocabulary",
    "__version__",
}


def modules_after(statement):
    code = f"import sys; {statement}; print(*sorted(sys.modules))"
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    )
    return set(result.stdout.split())


def test_menu():
    assert set(tap_deploy.__all__) == MENU
    for name in MENU:
        assert hasattr(tap_deploy, name)


@pytest.mark.parametrize(
    "statement",
    [
        "import tap_deploy",
        "import tap_deploy.cli",
        "import tap_deploy.cli.run, tap_deploy.cli.verify, tap_deploy.cli.inspect",
        "import tap_deploy.cli.export, tap_deploy.cli.doctor.doctor, tap_deploy.cli.build",
        "import tap_deploy.cli.quantize, tap_deploy.cli.verdict, tap_deploy.cli.bench",
        "import tap_deploy.cli.evaluate.protocols, tap_deploy.cli.evaluate.demo",
        "import tap_deploy.bundle.plans, tap_deploy.engines.build.bundle_build",
        "import tap_deploy.engines.build.emit",
        "import tap_deploy.engines",
        "import tap_deploy.report.verification",
    ],
)
def test_light_imports(statement):
    assert not modules_after(statement) & set(HEAVY)


def test_a_predictor_loads_no_package_metadata():
    """It takes the email package, sockets and 10 ms; only doctor and error messages need it."""
    others = modules_after("import numpy, PIL.Image, PIL.PngImagePlugin, concurrent.futures.thread")
    loaded = modules_after("from tap_deploy import TapPredictor") - others
    assert not loaded & {"importlib.metadata", "email", "socket"}


def test_running_needs_no_torch_and_no_onnx(micro_bundle, photo):
    statement = (
        "import tap_deploy; p = tap_deploy.TapPredictor.from_bundle("
        f"{str(micro_bundle.path)!r}); p.predict({str(photo)!r}, points=[[[9, 9, 1]]])"
    )
    loaded = modules_after(statement)
    assert "onnxruntime" in loaded
    assert not loaded & {"torch", "onnx", "onnx_ir", "onnxscript"}


def test_export_and_engines_do_not_know_each_other():
    pytest.importorskip("torch")
    exported = modules_after("import tap_deploy.export.bundle_export")
    assert not {name for name in exported if name.startswith("tap_deploy.engines")}
    engines = modules_after("import tap_deploy.engines.build.bundle_build")
    assert not {name for name in engines if name.startswith(("tap_deploy.export", "torch"))}


def test_the_import_alone_loads_nothing():
    """Not even numpy, so the import costs one small file on every machine."""
    added = modules_after("import tap_deploy") - modules_after("pass")
    ours = {name for name in added if name.split(".")[0] == "tap_deploy"}
    assert ours == {"tap_deploy"}
    third_party = {name.split(".")[0] for name in added - ours} - set(sys.stdlib_module_names)
    assert not third_party


def test_the_menu_alone_brings_numpy_and_pillow_and_no_more():
    menu = ", ".join(sorted(MENU))
    added = modules_after(f"from tap_deploy import {menu}") - modules_after("pass")
    third_party = {name.split(".")[0] for name in added} - set(sys.stdlib_module_names)
    assert third_party - PILLOW_MAY_LOAD == {"numpy", "PIL", "tap_deploy"}


def test_what_is_asked_for_is_what_its_module_holds():
    for name in MENU - {"__version__"}:
        value = getattr(tap_deploy, name)
        assert getattr(sys.modules[value.__module__], name) is value
        assert name in dir(tap_deploy)
    with pytest.raises(AttributeError, match="no attribute 'TapPredicter'"):
        tap_deploy.TapPredicter  # noqa: B018

"""Nothing that runs a model imports network code or opens a socket."""

from __future__ import annotations

import ast
import json
import subprocess
import sys

import pytest

from tests.test_errors import PRODUCT, PROJECT
from tests.test_telemetry import imported_names

# What can open a connection; ``urllib.parse`` and the like cannot.
NETWORK = (
    *("aiohttp", "asyncio", "ftplib", "http.client", "http.server", "httpx", "imaplib", "poplib"),
    *("requests", "smtplib", "socket", "socketserver", "ssl", "telnetlib", "urllib.request"),
    *("urllib3", "websocket", "websockets", "xmlrpc.client"),
    *("hf_xet", "httpx2", "huggingface_hub"),  # only for the model hub
)

# Prints the events of sockets, the sockets that are open at the end (those of libraries in C, too),
# and for each module of the network the first file, outside the standard library, that led to it.
PROGRAM = """
import json, os, sys, sysconfig

events, brought = [], {}
standard = tuple({sysconfig.get_path(name) for name in ("stdlib", "platstdlib")})

def watch(event, values):
    if event.startswith(("socket.", "urllib.", "http.client.", "ftplib.", "smtplib.")):
        events.append(event)
    if event == "import" and values[0] in NETWORK:
        frame, found = sys._getframe(1), "the standard library"
        while frame is not None:
            file = frame.f_code.co_filename
            if "site-packages" in file or not file.startswith((*standard, "<frozen")):
                found = file
                break
            frame = frame.f_back
        brought.setdefault(values[0], found)

NETWORK = json.loads(sys.argv[1])
assert not set(NETWORK) & set(sys.modules), "the interpreter has loaded it already"
sys.addaudithook(watch)
exec(sys.argv[2])
descriptors = [f"/proc/self/fd/{name}" for name in os.listdir("/proc/self/fd")]
opened = [os.readlink(path) for path in descriptors if os.path.lexists(path)]
loaded = {name: file for name, file in brought.items() if name in sys.modules}
print(json.dumps([events, [name for name in opened if name.startswith("socket:")], loaded]))
"""

COMMAND = """
from tap_deploy.cli import main
try:
    main(sys.argv[3:])
except SystemExit as ended:
    assert not ended.code, ended.code
"""
PREDICT = """
from tap_deploy import TapPredictor
with TapPredictor.from_bundle(sys.argv[3]) as predictor:
    predictor.predict(sys.argv[4], points=[[[9, 9, 1]]])
"""


def watched(code, *arguments):
    """Run code in a process; returns module of the network -> file that led to it."""
    words = [sys.executable, "-c", PROGRAM, json.dumps(NETWORK), code, *map(str, arguments)]
    result = subprocess.run(words, capture_output=True, text=True, cwd=PROJECT)
    assert result.returncode == 0, result.stderr
    events, sockets, brought = json.loads(result.stdout.splitlines()[-1])
    assert events == sockets == []
    ours = {name: file for name, file in brought.items() if "site-packages" not in file}
    assert not ours, f"brought by this project: {ours}"
    return brought


def test_the_watch_sees_imports_and_sockets():
    code = "import urllib.request, socket; socket.socket(); keep = socket.socketpair()"
    words = [sys.executable, "-c", PROGRAM, json.dumps(NETWORK), code]
    result = subprocess.run(words, capture_output=True, text=True, check=True)
    events, sockets, brought = json.loads(result.stdout)
    assert "socket.__new__" in events and len(sockets) == 2
    assert {"urllib.request", "http.client", "socket"} <= brought.keys()


def test_the_project_imports_none_but_for_the_server():
    """Neither when it is loaded nor later."""
    found = {
        (path.name, name)
        for folder in PRODUCT
        for path in (PROJECT / folder).rglob("*.py")
        if not {"server", "serve"} & set(path.parts)  # the server, and its benchmark
        for node in ast.walk(ast.parse(path.read_bytes()))
        for name in imported_names(node)
        if name in NETWORK
    }
    assert found == set()


@pytest.mark.parametrize("code", ["import tap_deploy", PREDICT], ids=["import", "predict"])
def test_the_library(micro_bundle, photo, code):
    assert watched(code, micro_bundle.path, photo) == {}


@pytest.mark.parametrize("command", ["run", "verify", "selftest", "inspect"])
def test_commands_on_a_bundle(bundle, photo, command):
    options = [photo, "--point", "9,9"] if command == "run" else []
    assert watched(COMMAND, command, bundle.path, *options) == {}


def test_export(tmp_path, assets):
    """PyTorch imports network code itself, for ``torch.hub``; nobody calls it."""
    pytest.importorskip("torch")
    pytest.importorskip("onnx")
    options = ["--config", assets["config"], "--synthetic-weights", "0", "-o", tmp_path / "bundle"]
    brought = watched(COMMAND, "export", *options)
    packages = {file.rpartition("site-packages/")[2].split("/")[0] for file in brought.values()}
    assert packages <= {"torch", "onnx", "onnxscript", "onnx_ir", "sympy", "networkx"}

"""``tap-export serve`` as a process: start, self-test, end; and what it refuses."""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator

import pytest

pytest.importorskip("fastapi")

from tap_deploy.bundle.bundle import Bundle
from tap_deploy.graphs import PROMPT_DECODER
from tests.commands import invoke
from tests.served import Served

COMMAND = [sys.executable, "-m", "tap_deploy", "serve"]


@contextlib.contextmanager
def started(bundle: Bundle, *options: object) -> Iterator[tuple[subprocess.Popen[str], Served]]:
    command = [*COMMAND, str(bundle.path), "--port", "0", *map(str, options)]
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        try:
            assert process.stdout is not None and process.stderr is not None
            line = process.stdout.readline()
            found = re.fullmatch(rf"serving {re.escape(str(bundle.path))} on (http://.*)\n", line)
            assert found, line or process.stderr.read()
            yield process, Served(found[1], None)  # type: ignore[arg-type]
        finally:
            process.kill()


def test_it_serves_until_sigterm(bundle, pictures):
    picture = (pictures / "a.png").read_bytes()
    before = (bundle.path / "manifest.json").read_bytes()
    with started(bundle, "--workers", 1, "--cache-mb", 1, "--threads", 1) as (process, server):
        image_id = server.upload(picture)
        answer = server.ask(
            "POST", f"/v1/images/{image_id}/regions", {"prompts": [{"points": [[9, 9, 1]]}]}
        )
        assert answer.status == 200 and answer.json()["regions"][0]["concepts"]
        assert b"<!doctype html>" in server.ask("GET", "/").body
        process.send_signal(signal.SIGTERM)
        assert process.wait(60) == 0
        lines = [json.loads(line) for line in process.stderr.read().splitlines()]
        assert [line["message"] for line in lines].count("request") == 3
    assert (bundle.path / "manifest.json").read_bytes() == before


def test_a_token_file(bundle, tmp_path):
    file = tmp_path / "token"
    file.write_text("a-token-of-sixteen-letters\n", "utf-8")
    with started(bundle, "--host", "0.0.0.0", "--token-file", file) as (process, server):
        local = Served(f"http://127.0.0.1:{server.port}", None)
        assert local.ask("GET", "/v1/model").status == 401
        headers = {"authorization": "Bearer a-token-of-sixteen-letters"}
        assert local.ask("GET", "/v1/model", headers=headers).status == 200
        process.send_signal(signal.SIGINT)
        assert process.wait(60) == 0


def refused(*arguments: object) -> tuple[int, str]:
    """The exit code and the last line on stderr of a server that does not start."""
    result = subprocess.run(
        [*COMMAND, *map(str, arguments)], capture_output=True, text=True, timeout=120
    )
    return result.returncode, result.stderr.splitlines()[-1]


def test_a_bundle_that_computes_wrong_values_is_not_served(bundle):
    code = (
        "import sys; from tap_deploy.sessions.ort import session; from tap_deploy.cli import main\n"
        "run = session.OnnxRuntimeSession.run\n"
        "def spoiled(self, *arguments, **options):\n"
        "    outputs = run(self, *arguments, **options)\n"
        f"    if self.spec.name == {PROMPT_DECODER!r}:\n"
        "        outputs['iou_predictions'] = outputs['iou_predictions'] + 1\n"
        "    return outputs\n"
        "session.OnnxRuntimeSession.run = spoiled\n"
        "main(sys.argv[1:])\n"
    )
    command = [sys.executable, "-c", code, "serve", str(bundle.path), "--port", "0"]
    result = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert result.returncode == 1 and result.stdout == ""
    last = result.stderr.splitlines()[-1]
    assert last.startswith("error: bundle") and "fails its self-test" in last
    assert "marked" not in last and Bundle.open(bundle.path)


def test_what_it_refuses(micro_bundle, tmp_path):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        code, line = refused(micro_bundle.path, "--port", port)
        assert code == 2 and f"127.0.0.1, port {port}, cannot be listened on" in line
    code, line = refused(tmp_path / "nothing")
    assert code == 2 and "is not a folder" in line
    code, line = refused(micro_bundle.path, "--host", "0.0.0.0")
    assert code == 2 and "--token-file FILE, or --without-token" in line


def test_a_token_file_that_is_no_token(micro_bundle, tmp_path):
    (tmp_path / "empty").write_text("")
    result = invoke("serve", micro_bundle.path, "--token-file", tmp_path / "empty")
    assert result.exit_code == 2 and "the token has 0 characters" in result.stderr
    result = invoke("serve", micro_bundle.path, "--token-file", tmp_path / "none")
    assert result.exit_code == 2 and "cannot be read" in result.stderr


@pytest.mark.parametrize("missing", ["fastapi", "uvicorn", "prometheus_client"])
def test_without_the_extra(micro_bundle, missing):
    code = f"import sys; sys.modules[{missing!r}] = None; from tap_deploy.cli import main; main()"
    command = [sys.executable, "-c", code, "serve", str(micro_bundle.path)]
    result = subprocess.run(command, capture_output=True, text=True, env=os.environ.copy())
    assert result.returncode == 2
    assert 'pip install "tap-deploy[serve]' in result.stderr.splitlines()[-1]

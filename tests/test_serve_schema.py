"""Requests that schemathesis makes from the OpenAPI description: every answer is as described."""

from __future__ import annotations

import os
import pathlib
import subprocess
import sys

import pytest

pytest.importorskip("fastapi")
pytest.importorskip("schemathesis")

from tap_deploy.predictor import TapPredictor
from tests.served import served

ROOT = pathlib.Path(__file__).parents[1]


def test_schemathesis_finds_nothing(micro_bundle, tmp_path):
    """Examples, edges of the schema, random requests, and sequences of them."""
    with served(lambda: TapPredictor.from_bundle(micro_bundle.path)) as server:
        command = [
            sys.executable,
            "-m",
            "schemathesis.cli",
            "--config-file",
            str(ROOT / "tests/schemathesis.toml"),
        ]
        command += ["run", f"{server.address}/openapi.json", "--max-examples", "10", "--seed", "1"]
        command += ["--generation-database", "none", "--no-color"]
        result = subprocess.run(
            command,
            capture_output=True,
            text=True,
            cwd=tmp_path,  # it keeps files there
            env=os.environ
            | {"SCHEMATHESIS_HOOKS": "tests.schemathesis_hooks", "PYTHONPATH": str(ROOT)},
        )
        assert result.returncode == 0, result.stdout + result.stderr
        assert "Tested: 13" in result.stdout and "passed" in result.stdout
        metrics = server.ask("GET", "/metrics").body.decode()
    for route in ("images", "images/{image_id}/regions", "images/{image_id}/everything", "regions"):
        for status in (200, 422):
            status = 201 if (route, status) == ("images", 200) else status
            assert f'tap_requests_total{{route="/v1/{route}",status="{status}"}}' in metrics
    for status in (200, 422):
        assert f'route="/v2/models/tap/infer",status="{status}"' in metrics
    assert 'status="500"' not in metrics

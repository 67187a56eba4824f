"""Pictures for schemathesis, which cannot make any; see ``tests/test_serve_schema.py``."""

from __future__ import annotations

import io

import schemathesis
from hypothesis import strategies as st
from PIL import Image


def _picture(mode: str, width: int, height: int, kind: str) -> bytes:
    content = io.BytesIO()
    Image.new(mode, (width, height), 90).save(content, kind)
    return content.getvalue()


PICTURES = [
    _picture("RGB", 40, 30, "PNG"),
    _picture("L", 9, 64, "JPEG"),
    _picture("P", 64, 64, "GIF"),
]


@schemathesis.hook
def before_call(context, case, kwargs):
    """Search few points: a search takes seconds with the points of the default."""
    body = case.body
    if isinstance(body, dict) and case.path.endswith("/everything"):
        points = body.get("points_per_side", 32)
        if type(points) in (int, float) and 4 < points <= 64:
            body["points_per_side"] = 4


schemathesis.openapi.format("binary", st.sampled_from([*PICTURES, PICTURES[0][:60], b"no picture"]))

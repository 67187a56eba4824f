"""Skips tests whose requirements other than Python packages are missing, with the reason."""

from __future__ import annotations

import importlib.util
import os
import shutil

import pytest

from tap_deploy.errors import InputError


def font_is_missing() -> bool:
    from tap_deploy.training.scenes.emoji import emoji_font_path

    try:
        emoji_font_path()
    except InputError:
        return True
    return False


needs_photographs = pytest.mark.skipif(
    importlib.util.find_spec("skimage") is None,
    reason='the backgrounds need scikit-image: pip install "tap-deploy[train]"',
)
needs_font = pytest.mark.skipif(
    font_is_missing(), reason="the objects need apt-get install fonts-noto-color-emoji"
)
BROWSER = shutil.which("chromium") or shutil.which("google-chrome")
needs_browser = pytest.mark.skipif(
    BROWSER is None and os.environ.get("TAP_REQUIRE_BROWSER") != "1",  # set by .ci/run
    reason="the layout of pages needs a browser: apt-get install chromium",
)

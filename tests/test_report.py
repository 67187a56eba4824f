"""HTML reports: every row is there, values are escaped, nothing is loaded, narrow screens fit."""

from __future__ import annotations

import base64
import dataclasses
import io
import json
import pathlib
import sys
from typing import Any

import numpy as np
import pytest
from PIL import Image

pytest.importorskip("jinja2")
from needs import BROWSER, needs_browser

from tap_deploy.errors import MissingDependencyError
from tap_deploy.report import page as report_page
from tap_deploy.report.charts import LogAxis, histogram_from_counts, paired_bars
from tap_deploy.report.mask_pictures import BOTH, ONLY_HERE, ONLY_REFERENCE, mask_pictures
from tap_deploy.report.page import page_from_template, plain
from tap_deploy.report.verification import html_from_verification
from tests.pages import Page, overflows

HOSTILE = """<script>alert("1")</script>'"&<img src=x onerror=alert(2)>"""
VERDICT = pathlib.Path(__file__).parents[1] / "benchmarks/results/int8-tap_demo-2026-11-26.json"
LONG = "blocks.11.attn.qkv/" * 12 + "MatMul_with_a_very_long_name_without_any_space"


def check(index: int, passed: bool | None, **changes: Any) -> dict[str, Any]:
    values: dict[str, Any] = {
        "graph": "prompt_decoder",
        "tensor": f"tensor_{index}",
        "sample": "points 2 x 3",
        "stage": ("isolated", "chained")[index % 2],
        "shape": [2, 4, 256, 256],
        "max_abs": 1.5e-4,
        "max_rel": 2.5e-5,
        "mean_abs": 3.5e-6,
        "mean_rel": 4.5e-6,
        "cosine": 0.999999,
        "nan": 0,
        "inf": 0,
        "tolerance": None if passed is None else 1e-3,
        "relative": True,
        "mean_tolerance": 4e-3,
        "passed": passed,
        "note": "",
    }
    return values | changes


def region_masks() -> tuple[Any, Any, Any]:
    """A picture, the mask of the reference, and one that is moved and has a hole."""
    y, x = np.mgrid[:240, :320]
    image = np.stack([x * 255 // 320, y * 255 // 240, (x + y) % 256], axis=2).astype(np.uint8)
    reference = (x - 150) ** 2 + (y - 110) ** 2 < 60**2
    actual = ((x - 160) ** 2 + (y - 112) ** 2 < 58**2) & ~((abs(x - 150) < 9) & (abs(y - 100) < 9))
    return image, reference, actual


def verification(**changes: Any) -> dict[str, Any]:
    """A failed verification in which everything is present."""
    values: dict[str, Any] = {
        "title": "tap_demo: fp16 on onnxruntime against PyTorch",
        "passed": False,
        "sentence": "FAILED: 2 of 7 checks, first semantic_tokens (points 2 x 3)",
        "checks": [
            check(0, True),
            check(1, None),
            check(2, False, note="first difference at [0, 1, 17]"),
            check(3, True, relative=False, mean_tolerance=None),
            check(4, False, max_abs=None, max_rel=None, mean_abs=None, cosine=None, nan=7, inf=2),
        ],
        "stages": [
            {"tensor": name, "isolated": one, "chained": two, "growth": growth, "sentence": words}
            for name, one, two, growth, words in (
                ("image_embeddings", 2.1e-4, 2.1e-4, 1.0, "enters here"),
                ("low_res_masks", 1.2e-4, 9.7e-4, 8.08, "grows"),
                ("semantic_tokens", 3e-5, 3.1e-3, 103.3, "grows most"),
                ("logits", 0.0, None, None, "not chained"),
            )
        ],
        "stages_sentence": "Error enters in the image encoder, and grows 103 times in the prompts.",
        "histograms": [
            {
                "tensor": "image_embeddings",
                "stage": "isolated",
                "edges": [-8 + 0.25 * i for i in range(25)],
                "counts": [1, 0, *(round(9000 * 2.7 ** -((i - 12) ** 2 / 9)) for i in range(22))],
                "zeros": 12345,
            },
            {"tensor": "ids", "stage": "chained", "edges": [], "counts": [], "zeros": 38},
            {
                "tensor": "logits",
                "stage": "chained",
                "edges": [-4.6, -4.4, -4.2],
                "counts": [3, 9],
                "zeros": 0,
            },
        ],
        "masks": {
            "regions": 40,
            "iou_mean": 0.9912,
            "iou_worst": 0.7654,
            "boundary_f_mean": 0.98,
            "boundary_f_worst": 0.61,
            "floor": 0.97,
            "passed": True,
            "sentence": "masks agree to 0.9912",
        },
        "names": {
            "regions": 40,
            "top1": 0.9,
            "top5": 0.975,
            "passed": False,
            "sentence": "4 of 40 regions have another name",
        },
        "captions": {
            "regions": 40,
            "identical": 38,
            "passed": None,
            "sentence": "38 of 40 captions are identical",
            "first_differences": [
                {
                    "region": region,
                    "step": 4,
                    "expected": "dog",
                    "actual": "cat",
                    "margin": margin,
                    "near_tie": margin < 0.1,
                }
                for region, margin in ((3, 0.004), (17, 1.75))
            ],
        },
        "worst": [
            {
                "title": f"region {index} of picture.png",
                "iou": 0.7654,
                "boundary_f": 0.61,
                **dataclasses.asdict(mask_pictures(*region_masks())),
                "reference_text": "a brown dog on a bench",
                "actual_text": "a cat",
            }
            for index in range(2)
        ],
        "bisect": {
            "graph": "image_encoder",
            "node": "blocks.3.mlp.fc1/MatMul",
            "op_type": "MatMul",
            "tensor": "blocks.3.mlp.fc1_out",
            "error": 0.25,
            "tolerance": 0.0098,
            "sentence": "blocks.3.mlp.fc1/MatMul is the first whose output is off.",
        },
        "conditions": {
            "date": "2026-11-27T11:00:00+00:00",
            "cpu": "AMD EPYC",
            "versions": {"onnxruntime": "1.32.0", "numpy": "2.4.6"},
            "backend": "onnxruntime",
            "precision": "fp16",
            "bundle": "bundles/tap_demo",
            "samples": ["points 2 x 3", "boxes 1 x 2"],
        },
    }
    return values | changes


def passed_verification(**changes: Any) -> dict[str, Any]:
    """What is left when nothing differs, and the bundle has no concepts."""
    captions = verification()["captions"] | {"passed": True, "first_differences": []}
    changes = {"captions": captions, "masks": verification()["masks"]} | changes
    nothing: dict[str, Any] = {"worst": [], "histograms": [], "stages": []}
    return verification(
        passed=True,
        sentence="PASSED: 2 comparisons",
        checks=[check(0, True), check(1, True)],
        **{"stages_sentence": "", "names": None, "bisect": None} | nothing | changes,
    )


def many_checks() -> dict[str, Any]:
    checks = [
        check(
            index, index % 3 != 1, tensor=f"{LONG}_{index}", sample=LONG, note=f"{LONG} {HOSTILE}"
        )
        for index in range(200)
    ]
    stages = [stage | {"tensor": LONG} for stage in verification()["stages"]]
    return verification(checks=checks, stages=stages, title=LONG, sentence=f"{LONG} {HOSTILE}")


PAGES = {"failed": verification(), "passed": passed_verification(), "many": many_checks()}


def with_hostile_texts(value: Any) -> Any:
    """Replace every text and every key that is shown, except where the page branches on it."""
    if isinstance(value, dict):
        return {key: with_hostile_texts(item) for key, item in value.items()}
    if isinstance(value, list):
        return [with_hostile_texts(item) for item in value]
    return HOSTILE if isinstance(value, str) else value


@pytest.mark.parametrize("kind", PAGES)
def test_every_check_has_a_row_and_failures_come_first(kind):
    report = PAGES[kind]
    json.dumps(report, allow_nan=False)
    page = Page(html_from_verification(report))
    rows = [row for row in page.rows if len(row) == 11][1:]
    found = [row[0].partition("prompt_decoder")[0] for row in rows]
    assert sorted(found) == sorted(check["tensor"] for check in report["checks"])
    states = [row[1].strip() for row in rows]
    count = {state: states.count(state) for state in states}
    in_order = ("[✗] failed", "[✓] passed", "[-] measured")
    assert states == [state for state in in_order for _ in range(count.get(state, 0))]
    assert ("[✗]" in page.text) is not report["passed"]


def test_a_failed_page_says_everything():
    page = Page(html_from_verification(verification()))
    words = " ".join(page.text.split())
    for part in (
        "[✗] FAILED: 2 of 7 checks",
        "2 of 5 failed, 2 passed, 1 measured without a tolerance",
        "max rel ≤ 1.00e-03 mean rel ≤ 4.00e-03",
        "max abs ≤ 1.00e-03",
        "2 x 4 x 256 x 256",
        "first difference at [0, 1, 17]",
        "grows 103 times",
        "103.30 x",
        "12,345 elements without any error",
        "no element differs (38)",
        "[✓] passed masks agree to 0.9912",
        "4 of 40 regions have another name",
        "[-] measured 38 of 40",
        "mask IoU 0.7654, boundary F 0.6100",
        "this bundle: a cat",
        "blocks.3.mlp.fc1/MatMul is the first",
        "onnxruntime: 1.32.0, numpy: 2.4.6",
    ):
        assert part in words, part
    differences = [row for row in page.rows if len(row) == 6 and row[1] == "4"]
    assert [row[-1] for row in differences] == ["no", "yes"]
    assert ["boundary F, worst region", "0.61"] in page.rows
    assert len(page.attributes("img")) == 6
    bars = [rect for rect in page.attributes("rect") if str(rect.get("x")).endswith("%")]
    bins = [count for found in verification()["histograms"] for count in found["counts"] if count]
    assert len(bars) == 6 + len(bins)


def test_what_is_missing_leaves_no_empty_section():
    page = Page(html_from_verification(passed_verification(captions=None, masks=None)))
    headings = [attributes["id"] for attributes in page.attributes("h2")]
    assert headings == ["checks", "conditions"]
    nothing = Page(html_from_verification(passed_verification() | {"checks": [], "passed": False}))
    assert "0 of 0 failed" in nothing.text and "[✗] failed" in nothing.text


def test_hostile_texts_stay_texts():
    text = html_from_verification(with_hostile_texts(verification()) | {"conditions": {HOSTILE: 1}})
    page = Page(text)
    assert page.text.count(HOSTILE) > 30
    assert "default-src 'none'" in str(page.attributes("meta")[-1]["content"])


def test_a_value_that_the_template_lacks_is_an_error():
    jinja2 = pytest.importorskip("jinja2")
    report = verification()
    del report["checks"][0]["note"]
    with pytest.raises(jinja2.UndefinedError, match="note"):
        html_from_verification(report)


def test_without_jinja2_the_extra_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "jinja2", None)
    monkeypatch.setattr(report_page, "_environment", report_page._environment.__wrapped__)
    with pytest.raises(MissingDependencyError) as error:
        page_from_template("verification.html", {})
    assert str(error.value) == (
        'jinja2 is not installed; an HTML report needs it: pip install "tap-deploy[report]"'
    )


def test_json_values_are_read_as_text():
    assert plain({"a": [1, 2.5], "b": None, "c": True, "d": {}}) == "a: 1, 2.5, b: -, c: yes, d: -"


def test_an_axis_has_decades_or_its_ends():
    assert [text for _, text in LogAxis(low=-8.2, high=-1.5).ticks] == [
        *("1e-8", "1e-6", "1e-4", "1e-2")
    ]
    assert [text for _, text in LogAxis(low=-4.6, high=-4.2).ticks] == ["2.5e-05", "6.3e-05"]
    positions = [place for place, _ in LogAxis(low=0, high=2).ticks]
    assert positions == [9, 50, 91]


def test_bars_lie_on_the_axis_and_a_single_element_is_visible():
    found = histogram_from_counts([-3, -2, -1, 0], [1_000_000, 0, 1])
    assert found is not None
    first, last = found.bars
    assert (first.height, last.height) == (96, 1.5)
    assert first.x == 9 and last.x + last.width == pytest.approx(91)
    chart = paired_bars([("a", 1e-3, 1e-1), ("b", 0.0, None)])
    assert (chart.axis.low, chart.axis.high) == (-4, -1)
    (_, one, two), (_, nothing, missing) = chart.rows
    assert one and two and two.width == pytest.approx(3 * one.width, abs=0.01)
    assert nothing is missing is None
    assert paired_bars([("a", 0.0, None)]).axis == LogAxis(low=-1, high=0)


def opened(png: str) -> Any:
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(png))).convert("RGB"))


def test_the_difference_has_a_colour_for_each_mask():
    image, reference, actual = region_masks()
    found = mask_pictures(image, reference, actual)
    difference = opened(found.difference_png)
    for color, mask in (
        (ONLY_REFERENCE, reference & ~actual),
        (ONLY_HERE, actual & ~reference),
        (BOTH, reference & actual),
    ):
        assert np.count_nonzero((difference == color).all(axis=2)) == np.count_nonzero(mask)
    assert not np.array_equal(opened(found.reference_png), opened(found.actual_png))


@pytest.mark.parametrize(("side", "longest"), [(9, 200), (2000, 400)])
def test_pictures_are_cut_and_scaled_to_be_readable(side, longest):
    image = np.zeros((3000, 2500, 3), np.uint8)
    reference = np.zeros((3000, 2500), np.bool_)
    reference[400 : 400 + side, 300 : 300 + side] = True
    found = mask_pictures(image, reference, np.zeros_like(reference))
    for png in dataclasses.astuple(found):
        assert 0.85 * longest <= max(opened(png).shape) <= longest


def test_two_empty_masks_show_the_picture():
    image, reference, _ = region_masks()
    found = mask_pictures(image, np.zeros_like(reference), np.zeros_like(reference))
    assert np.array_equal(opened(found.reference_png), image)


@needs_browser
def test_pages_fit_a_phone_and_a_desktop(tmp_path):
    """In a browser; tables scroll inside the page. The last page shows what would be found."""
    from tap_deploy.engines.verdict.report_html import html_from_report

    texts = [html_from_verification(report) for report in PAGES.values()]
    texts.append(html_from_report(json.loads(VERDICT.read_text("utf-8"))))
    wide = "<p style='width: 2000px'>wide</p><script>console.log('spoke')</script>"
    found, console = overflows(BROWSER, tmp_path, [*texts, wide], widths=(360, 1280))
    assert found[:-1] == [[0, 0]] * len(texts)
    assert min(found[-1]) > 700
    assert console == ["spoke", "spoke", "measured"]

"""Reports of benchmarks: figures, roofline, regressions, table, plot; from numbers made by hand."""

from __future__ import annotations

import copy
import json
import xml.etree.ElementTree as ET

import pytest

from tap_deploy.bench.ceilings import Ceilings
from tap_deploy.bench.plot import save_plot, stage_parts, svg, whole_calls
from tap_deploy.bench.regression import (
    changes,
    mismatches,
    remarks,
    require_no_regression,
)
from tap_deploy.bench.report import SCHEMA, VERSION, load_report, save_report
from tap_deploy.bench.roofline import roofline
from tap_deploy.bench.table import describe, latency_table, warnings
from tap_deploy.bench.tasks import CAPTION, DECODE, ENCODE, END_TO_END, Task, figures
from tap_deploy.config import VARIANTS
from tap_deploy.engines.estimate.work import graph_works
from tap_deploy.errors import InputError, VerificationError
from tap_deploy.timing import Latency, Ratio

SUBJECT, OTHER = "onnxruntime fp32", "torch"


def nothing():
    return None


def task_of(kind, prompts=1, tokens=0, **changes):
    return Task(kind=kind, prompts=prompts, tokens=tokens, call=nothing, **changes)


def row_of(task, *seconds_of):
    """A row of the report: durations of the subject, then of the other candidate."""
    names = (SUBJECT, OTHER)[: len(seconds_of)]
    seconds = dict(zip(names, seconds_of, strict=True))
    ratios = {name: Ratio.of(seconds[name], seconds[SUBJECT]) for name in names[1:]}
    return {
        "row": task.key,
        "candidates": {
            name: figures(task, Latency.from_seconds(found)) for name, found in seconds.items()
        },
        "ratios": {
            name: {
                "median": ratio.median,
                "low": ratio.low,
                "high": ratio.high,
                "pairs": ratio.pairs,
                "spread": ratio.spread,
                "is_undecided": ratio.is_undecided,
            }
            for name, ratio in ratios.items()
        },
    }


@pytest.fixture
def report():
    rows = [
        row_of(task_of(ENCODE), [0.1] * 10, [0.2] * 10),
        row_of(task_of(DECODE, 4), [0.04] * 10, [0.06] * 10),
        row_of(task_of(CAPTION, 4, 9), [0.04] * 10, [0.06] * 10),
        row_of(task_of(END_TO_END, 4, 9), [0.2] * 10, [0.5] * 10),
    ]
    candidate = {"precision": "fp32", "details": {}, "start_up": None}
    return {
        "schema": SCHEMA,
        "version": VERSION,
        "subject": SUBJECT,
        "conditions": {
            "date": "2026-11-27T00:00:00+00:00",
            "machine": {"title": "a & b", "cpu": "x", "jetson": None},
            "model": "tap_micro",
            "weights": "w",
            "backend": "onnxruntime",
            "precision": "fp32",
            "variant": "fp32",
            "provider": None,
            "settings": {
                "workload": "stage",
                "threads": 2,
                "tokens": None,
                "picture": [64, 64],
                "cuda_graphs": None,
                "zero_copy": None,
            },
            "versions": {"numpy": "2.0"},
            "gpu_before": {},
        },
        "candidates": {SUBJECT: candidate, OTHER: candidate},
        "ceilings": None,
        "ceilings_problem": None,
        "memory": {
            "peak_rss_bytes": 10**8,
            "gpu_used_before": "300 MiB",
            "gpu_used_after": "900 MiB",
        },
        "rows": rows,
    }


def test_figures_of_stages():
    latency = Latency.from_seconds([0.1, 0.1, 0.4])  # mean 200 ms, median 100 ms
    encode = figures(task_of(ENCODE), latency)
    assert encode["images_per_second"] == pytest.approx(5)
    assert "regions_per_second" not in encode
    decode = figures(task_of(DECODE, 3), latency)
    assert decode["regions_per_second"] == pytest.approx(15)
    caption = figures(task_of(CAPTION, 3, 4), latency)
    assert caption["microseconds_per_step"] == pytest.approx(20_000)  # the prefix is a step as well
    assert caption["tokens_per_second"] == pytest.approx(60)
    assert caption["stage"] == "caption P=3, 4 tokens"
    stream = figures(task_of("stream", 5, 4, pictures=30), latency)
    assert (stream["images_per_second"], stream["regions_per_second"]) == (
        pytest.approx(150),
        pytest.approx(750),
    )
    assert stream["stage"] == "stream 30 images, P=5, 4 tokens"


def test_gpu_time_is_apart_from_host_time():
    values = figures(task_of(ENCODE), Latency.from_seconds([0.1, 0.1]), [70.0, 80.0])
    assert values["gpu"]["median_ms"] == pytest.approx(75)
    assert values["host_ms"] == pytest.approx(25)


def test_roofline_of_a_call():
    config = VARIANTS["tap_vit_b"]
    ceilings = Ceilings(by="", flops={"fp32": 1e12}, bytes_per_second=1e11)
    works = graph_works(config, prompts=1, points=2, slots=19)
    encode = roofline(config, task_of(ENCODE), "fp32", ceilings)
    assert encode.gflop == pytest.approx(works["image_encoder"].flops / 1e9)
    assert encode.compute_ms == pytest.approx(encode.gflop)  # at 1 TFLOP/s
    assert encode.memory_ms == pytest.approx(encode.megabytes / 100)  # at 100 GB/s
    assert encode.roofline_ms == encode.compute_ms
    assert encode.shared(2 * encode.compute_ms)["share"] == pytest.approx(0.5)
    caption = roofline(config, task_of(CAPTION, 1, 37), "fp32", ceilings)
    assert caption.gflop == pytest.approx(38 * works["text_decoder"].flops / 1e9)
    assert caption.shared(1.0)["limited_by"] == "bandwidth"  # 38 readings of the weights
    whole = roofline(config, task_of(END_TO_END, 1, 37), "fp32", ceilings)
    decode = roofline(config, task_of(DECODE), "fp32", ceilings)
    parts = (encode, decode, caption)
    assert whole.roofline_ms == pytest.approx(sum(part.roofline_ms for part in parts))
    without = roofline(config, task_of(END_TO_END), "fp32", ceilings)
    assert without.gflop == pytest.approx(encode.gflop + decode.gflop)
    assert roofline(config, task_of(ENCODE), "int8", ceilings) is None


def test_best_ceilings():
    one = Ceilings(by="x", flops={"fp32": 1.0, "bf16": 5.0}, bytes_per_second=3.0)
    other = Ceilings(by="x", flops={"fp32": 2.0, "bf16": 4.0}, bytes_per_second=2.0)
    expected = Ceilings(by="x", flops={"fp32": 2.0, "bf16": 5.0}, bytes_per_second=3.0)
    assert Ceilings.best(one, other) == expected


def test_a_report_loads_as_it_was_saved(report, tmp_path):
    save_report(report, tmp_path / "report.json")
    assert load_report(tmp_path / "report.json") == report
    text = json.dumps(report)
    assert "0.2, 0.2" not in text  # no single calls


@pytest.mark.parametrize("content", ["{", "[]", "{}", f'{{"schema": "{SCHEMA}", "version": 99}}'])
def test_other_files_are_refused(content, tmp_path):
    (tmp_path / "report.json").write_text(content, "utf-8")
    with pytest.raises(InputError, match="report"):
        load_report(tmp_path / "report.json")


def slower(report, factor):
    other = copy.deepcopy(report)
    for row in other["rows"]:
        row["candidates"][SUBJECT]["latency"]["median_ms"] *= factor
    return other


def test_slowdown_is_that_of_the_medians(report):
    found = changes(slower(report, 1.25), report)
    assert [change.row for change in found] == [row["row"] for row in report["rows"]]
    assert [change.slowdown for change in found] == [pytest.approx(0.25)] * 4
    assert str(found[0]) == "encode 1 image 100.00 -> 125.00 ms (+25.0 %)"


def test_a_regression(report):
    assert len(require_no_regression(slower(report, 1.04), report, 0.05)) == 4
    with pytest.raises(
        VerificationError, match=r"more than 5 %: encode 1 image .*\+6\.0 %"
    ) as info:
        require_no_regression(slower(report, 1.06), report, 0.05)
    assert info.value.exit_code == 1


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        (("machine", "title"), "other", "machine.title: a & b, now other"),
        (("settings", "threads"), 3, "settings.threads: 2, now 3"),
        (("precision",), "int8", "precision: fp32, now int8"),
        (("settings", "cuda_graphs"), True, "settings.cuda_graphs: None, now True"),
        (
            ("machine", "jetson"),
            {"power_mode": {"name": "15W"}},
            "machine.jetson.power_mode.name: None, now 15W",
        ),
    ],
)
def test_other_conditions_are_not_comparable(report, path, value, message):
    other = copy.deepcopy(report)
    place = other["conditions"]
    for key in path[:-1]:
        place = place[key]
    place[path[-1]] = value
    assert mismatches(other, report) == [message]
    with pytest.raises(InputError, match="the saved run is not comparable") as info:
        require_no_regression(other, report, 0.05)
    assert info.value.exit_code == 2


def test_other_captions_are_other_work(report):
    other = copy.deepcopy(report)
    other["rows"][2]["candidates"][SUBJECT]["tokens"] = 12
    assert mismatches(other, report) == ["caption tokens of caption P=4: 9, now 12"]
    other["rows"] = [row_of(task_of(DECODE, 9), [1.0, 1.0])]
    assert mismatches(other, report)[0].startswith("rows: encode 1 image, ")


def test_other_versions_are_remarked(report):
    other = copy.deepcopy(report)
    other["conditions"]["versions"] = {"numpy": "2.1", "torch": "3"}
    other["conditions"]["gpu_before"] = {"clocks.max.sm": "1980 MHz"}
    assert mismatches(other, report) == []
    assert remarks(other, report) == [
        "gpu_before.clocks.max.sm: None, now 1980 MHz",
        "numpy: 2.0, now 2.1",
        "torch: None, now 3",
    ]
    text = describe(other, {"FILE": report})
    assert "note: other conditions than FILE: " in text
    assert "GPU memory 300 MiB before, 900 MiB after" in text


def test_the_table(report):
    lines = latency_table(report).splitlines()
    assert lines[0].endswith("| time / onnxruntime fp32 (IQR) |")
    assert lines[2].startswith(
        "| encode 1 image | onnxruntime fp32 | 10 | 100.00 | 100.00 | 100.00 |"
    )
    assert lines[3].endswith("| 2.00 (2.00 to 2.00) |")
    assert len(lines) == 2 + 8
    assert len({line.count("|") for line in lines}) == 1


def test_a_noisy_machine_is_said_to_be(report):
    assert list(warnings(report)) == []
    noisy = row_of(task_of(DECODE, 7), [1.0] * 12, [0.5, 1.0, 2.0] * 4)
    report["rows"].append(noisy)
    assert list(warnings(report)) == [
        "the machine was too noisy to say whether torch is faster or slower: decode P=7",
        "the machine was not idle: 1 of 10 latencies vary by more than 2.5 % (cv); read the "
        "ratios, not the milliseconds",
    ]
    report["ceilings_problem"] = "no torch"
    assert list(warnings(report))[-1] == "no share of the roofline: no torch"


def test_a_few_calls_say_little(report):
    report["rows"].append(row_of(task_of(DECODE, 7), [1.0] * 3, [1.0] * 3))
    assert list(warnings(report)) == ["only 3 calls per candidate; percentiles and spreads need 10"]


def test_the_plot_is_xml_with_the_numbers(report, tmp_path):
    assert whole_calls(report) == {SUBJECT: [(4, pytest.approx(200))], OTHER: [(4, 500)]}
    (parts,) = stage_parts(report).values()
    assert [(part.stage, part.ms, part.share) for part in parts] == [
        ("encode", pytest.approx(100), pytest.approx(0.5)),
        ("decode", pytest.approx(40), pytest.approx(0.2)),
        ("caption", pytest.approx(40), pytest.approx(0.2)),
        ("rest", pytest.approx(20), pytest.approx(0.1)),
    ]
    save_plot(report, tmp_path / "plot.svg")
    root = ET.parse(tmp_path / "plot.svg").getroot()
    assert root.tag == "{http://www.w3.org/2000/svg}svg"
    texts = [element.text for element in root.iter() if element.text and element.text.strip()]
    assert "tap_micro on a & b, 2026-11-27" in texts
    assert {"50 %", "20 %", "10 %", "P=4", "onnxruntime fp32", "torch", "500.0"} <= set(texts)
    widths = [
        float(element.get("width"))
        for element in root.iter("{http://www.w3.org/2000/svg}rect")
        if len(element)  # a bar has a title
    ]
    assert sum(widths) == pytest.approx(960 - 40 - 520, abs=0.3)
    assert widths[0] == pytest.approx(sum(widths) / 2, abs=0.3)


def test_stages_that_take_longer_alone_are_shares_of_their_sum(report):
    report["rows"][3] = row_of(task_of(END_TO_END, 4, 9), [0.1, 0.1])
    (parts,) = stage_parts(report).values()
    assert sum(part.share for part in parts) == pytest.approx(1)
    assert parts[-1].ms == 0


def test_several_numbers_of_regions_make_lines(report):
    report["rows"] = [
        row_of(task_of("vg", 47, 9), [0.2] * 10, [0.5] * 10),
        row_of(task_of("lvis", 166, 9), [0.3] * 10, [0.9] * 10),
    ]
    root = ET.fromstring(svg(report))
    titles = [title.text for title in root.iter("{http://www.w3.org/2000/svg}title")]
    assert {"onnxruntime fp32: 200.00 ms", "torch: 900.00 ms"} <= set(titles)


def test_a_single_workload_has_one_diagram(report):
    report["rows"] = [row_of(task_of("vg", 47, 9), [0.2, 0.2], [0.5, 0.5])]
    assert stage_parts(report) == {}
    root = ET.fromstring(svg(report))
    texts = [element.text for element in root.iter("{http://www.w3.org/2000/svg}text")]
    assert texts[2:] == ["onnxruntime fp32", "200.0", "torch", "500.0"]

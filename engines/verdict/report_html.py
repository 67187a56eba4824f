"""The report as a self-contained HTML page."""

from __future__ import annotations

import html
from collections.abc import Iterable, Mapping
from typing import Any

from tap_deploy.engines.verdict.tally import evaluated_on
from tap_deploy.engines.verdict.verdict import FLOAT
from tap_deploy.precisions import INT8

_STYLE = """
:root { color-scheme: light dark; }
body { font: 16px/1.5 system-ui, sans-serif; max-width: 72rem; margin: 2rem auto; padding: 0 1rem; }
table { border-collapse: collapse; margin: 1rem 0; }
th, td { padding: .3rem .8rem; text-align: right; border-bottom: 1px solid #8886; }
th:first-child, td:first-child { text-align: left; }
thead th { vertical-align: bottom; }
.verdict { padding: .8rem 1rem; border-left: .4rem solid; font-size: 1.1rem; }
.passed { border-color: #2a8a3e; } .failed { border-color: #c0392b; }
.scroll { overflow-x: auto; }
small, .note { color: #777; }
"""
_NONE = "-"


def html_from_report(report: Mapping[str, Any]) -> str:
    """Return the report as an HTML document.

    Args:
        report: report from ``record.report_from_verdict``.
    """
    title = f"INT8 verdict: {report['model']} ({report['variant']}, {report['backend']})"
    parts = [
        f"<h1>{_text(title)}</h1>",
        _verdict(report),
        "<h2>Graph by graph</h2>",
        _sentences(report["graphs"]),
        _agreement_table(report),
        _cost_table(report),
        _captions_table(report),
        _noise_table(report),
        *_optional(report),
        "<h2>Data and conditions</h2>",
        _pairs(report.get("data", {})),
        _pairs(report.get("made", {})),
        _pairs(report["conditions"]),
    ]
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        f"<title>{_text(title)}</title><style>{_STYLE}</style></head>\n"
        f"<body>\n{chr(10).join(parts)}\n</body></html>\n"
    )


def _verdict(report: Mapping[str, Any]) -> str:
    state = "passed" if report["passed"] else "failed"
    mix = ", ".join(f"{graph}: {variant}" for graph, variant in report["mix"].items())
    return (
        f'<p class="verdict {state}"><strong>{_text(report["sentence"])}</strong></p>'
        f"<p>Graphs of <code>precision=int8</code>: {_text(mix)}.</p>"
    )


def _sentences(graphs: Mapping[str, Any]) -> str:
    items = "".join(f"<li>{_text(graph['sentence'])}</li>" for graph in graphs.values())
    return f"<ul>{items}</ul>"


def _subjects(report: Mapping[str, Any]) -> dict[str, Mapping[str, Any]]:
    """Return the agreement of each table row by the row's name."""
    rows = {f"{n} alone": graph["agreement"] for n, graph in report["graphs"].items()}
    rows["everything in INT8"] = report["whole"]["everything_int8"]
    rows["best mix"] = report["whole"]["agreement"]
    return rows


def _agreement_table(report: Mapping[str, Any]) -> str:
    floors = report["floors"]
    head = ["agreement with fp32", "mask IoU", "worst 5 %", "same mask token"]
    head += ["concept top-1", "identical captions", "equal tokens", "IoU prediction drift"]
    rows = [
        [
            name,
            _number(found["mask_iou"]),
            _number(found["mask_iou_worst"]),
            _percent(found["same_mask_token"]),
            _percent(found["concept_top1"]),
            _percent(found["captions"]["identical"]),
            _percent(found["captions"]["tokens_equal"]),
            _number(found["iou_drift"]),
        ]
        for name, found in _subjects(report).items()
    ]
    least = ["at least", _number(floors["mask_iou"]), "", "", _percent(floors["concept_top1"])]
    rows.append([*least, _percent(floors["captions_identical"]), "", ""])
    count = report["whole"]["agreement"]
    note = f"{evaluated_on(count['regions'], count['images'])}."
    return _table(head, rows) + f'<p class="note">{_text(note)}</p>'


def _captions_table(report: Mapping[str, Any]) -> str:
    head = ["captions that differ", "number", "first divergence, median position"]
    head += ["median logit margin", "largest logit margin"]
    rows = [
        [
            name,
            str(found["captions"]["divergences"]),
            _number(found["captions"]["median_position"], 1),
            _number(found["captions"]["median_margin"], 3),
            _number(found["captions"]["largest_margin"], 3),
        ]
        for name, found in _subjects(report).items()
    ]
    note = "A margin near 0 is a near-tie of the two tokens in the fp32 model."
    return _table(head, rows) + f'<p class="note">{note}</p>'


def _cost_table(report: Mapping[str, Any]) -> str:
    timed = {n: graph["latency_ms"] for n, graph in report["graphs"].items()}
    timed["whole"] = report["whole"]["latency_ms"]
    names = list(dict.fromkeys(name for latency in timed.values() for name in latency))
    titles = {INT8: "INT8", FLOAT: report["float_variant"]}
    head = ["cost", *(f"{titles.get(name, name)}, median ms (cv)" for name in names)]
    head += ["speedup of INT8", "MB INT8", f"MB {report['float_variant']}"]
    head += ["integer kernels"]
    rows = []
    for name, latency in timed.items():
        graph = report["graphs"].get(name, report["whole"])
        rows.append(
            [
                name,
                *(_latency(latency.get(candidate)) for candidate in names),
                _NONE if graph["speedup"] is None else f"{graph['speedup']:.2f} x",
                *(_megabytes(graph[key]) for key in ("int8_bytes", "float_bytes")),
                graph["int8_kernels_summary"],
            ]
        )
    return _table(head, rows)


def _noise_table(report: Mapping[str, Any]) -> str:
    subjects = _subjects(report)
    tensors = list(next(iter(subjects.values()))["sqnr_db"])
    head = ["signal-to-quantization-noise ratio, dB", *tensors]
    rows = [
        [name, *(_number(found["sqnr_db"][tensor], 1) for tensor in tensors)]
        for name, found in subjects.items()
    ]
    return _table(head, rows)


def _optional(report: Mapping[str, Any]) -> list[str]:
    """Return the sections on mixed precision, budget and SmoothQuant, if present."""
    parts = []
    if mixed := report.get("mixed_precision"):
        parts += ["<h2>Mixed precision</h2>", _ranking(mixed)]
    if budget := report.get("budget"):
        parts.append(f"<p>{_text(budget['sentence'])}</p>")
    if smooth := report.get("smoothquant"):
        head = ["SmoothQuant", "noise share before", "after", "smoothed"]
        rows = [
            [
                f"{graph}: {choice['norm']}",
                f"{choice['error']:.2e}",
                f"{choice['smoothed_error']:.2e}",
                "yes" if choice["kept"] else "no",
            ]
            for graph, choices in smooth.items()
            for choice in choices
        ]
        parts += ["<h2>SmoothQuant</h2>", _table(head, rows)]
    return parts


def _ranking(mixed: Mapping[str, Any]) -> str:
    excluded = {
        (graph, block) for graph, blocks in mixed.get("exclude", {}).items() for block in blocks
    }
    if not mixed.get("ranking"):
        names = ", ".join(f"{graph} {block}" for graph, block in sorted(excluded)) or "nothing"
        return f"<p>Kept in float: {_text(names)}.</p>"
    head = ["block, quantized alone", "share of budget", "mask IoU", "concept top-1"]
    head += ["equal tokens", "worst SQNR, dB", "kept in float"]
    rows = [
        [
            f"{block['graph']}: {block['block']}",
            _number(block["budget_use"], 2),
            _number(block["mask_iou"]),
            _percent(block["concept_top1"]),
            _percent(block["caption_tokens"]),
            _number(block["worst_sqnr_db"], 1),
            "yes" if (block["graph"], block["block"]) in excluded else "",
        ]
        for block in mixed["ranking"]
    ]
    return _table(head, rows)


def _table(head: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    first = "".join(f"<th>{_text(cell)}</th>" for cell in head)
    body = "".join(f"<tr>{''.join(f'<td>{_text(cell)}</td>' for cell in row)}</tr>" for row in rows)
    table = f"<table><thead><tr>{first}</tr></thead><tbody>{body}</tbody></table>"
    return f'<div class="scroll">{table}</div>'


def _pairs(values: Mapping[str, Any]) -> str:
    rows = "".join(
        f"<tr><td>{_text(key)}</td><td>{_text(value)}</td></tr>" for key, value in values.items()
    )
    return f"<table><tbody>{rows}</tbody></table>" if rows else ""


def _latency(latency: Mapping[str, Any] | None) -> str:
    if latency is None:
        return _NONE
    noisy = ", noisy" if latency["is_noisy"] else ""
    return f"{latency['median_ms']:.3g} ({latency['cv']:.1%}{noisy})"


def _number(value: float | None, digits: int = 4) -> str:
    return _NONE if value is None else f"{value:.{digits}f}"


def _percent(value: float | None) -> str:
    return _NONE if value is None else f"{value:.1%}"


def _megabytes(value: int | None) -> str:
    return _NONE if value is None else f"{value / 1e6:.2f}"


def _text(value: Any) -> str:
    return html.escape(str(value))

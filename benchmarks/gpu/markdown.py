"""Makes the tables of docs/benchmarks.md from a report."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

LATENCY, TORCH, HOST = "latency", "torch", "host"
# Precision of ours -> precision of PyTorch to compare with; for int8 it is PyTorch's fastest.
BESIDE = {"fp16": "fp16", "tf32": "tf32", "fp32": "fp32", "int8": "fp16"}
HEADS = (
    *("stage", "CUDA graphs, median ms", "p90", "p99", "cv"),
    *("without, ms", "per s", "µs per step"),
)


def markdown(report: dict[str, Any]) -> str:
    """Return a report as Markdown."""
    notes = {step["step"]: step["notes"] for step in report.get("steps", [])}
    parts = [_machine(report, notes), _steps(report)]
    for name in [name for name in notes if name.split("-")[0] == LATENCY]:
        parts += _latency(name.removeprefix(f"{LATENCY}-"), notes)
    parts += _host(notes)
    return "\n\n".join(part for part in parts if part)


def _machine(report: dict[str, Any], notes: dict[str, dict[str, Any]]) -> str:
    versions = notes.get("versions", {})
    ceilings = notes.get("ceilings", {}).get("values", {})
    lines = [f"{report.get('date')}: {versions.get('headline', 'unknown machine')}"]
    lines += [str(versions[name]) for name in ("cuda", "torch", "cupy") if name in versions]
    lines += [f"ceilings: {', '.join(f'{n} {v}' for n, v in ceilings.items())}"] * bool(ceilings)
    lines.append(str(report.get("scope", "")))
    return "\n".join(f"- {line}" for line in lines if line)


def _steps(report: dict[str, Any]) -> str:
    rows = [
        (step["step"], step["status"], f"{step['seconds']:.1f}", _told(step))
        for step in report.get("steps", [])
    ]
    return _table(("step", "status", "s", ""), rows)


def _told(step: dict[str, Any]) -> str:
    told = str(step["reason"] or step["notes"].get("headline", ""))
    return told.replace("|", "/")[:160]


def _latency(name: str, notes: dict[str, dict[str, Any]]) -> list[str]:
    stages = notes[f"{LATENCY}-{name}"].get("stages", [])
    if not stages:
        return []
    other = BESIDE.get(name, "fp16")
    torch = {s["stage"]: s["latency"] for s in notes.get(f"{TORCH}-{other}", {}).get("stages", [])}
    without = {s["stage"]: s["latency"] for s in stages if not s["cuda_graphs"]}
    rows = []
    for stage in (stage for stage in stages if stage["cuda_graphs"]):
        row = _row(stage, without.get(stage["stage"]))
        if torch:
            row += _beside(stage, torch.get(stage["stage"]))
        rows.append(row)
    heads = HEADS + ((f"PyTorch {other}, ms", "ratio") if torch else ())
    share = notes[f"{LATENCY}-{name}"].get("encoder_share_of_gemm")
    note = f"The encoder reaches {100 * share:.0f} % of the measured peak." if share else ""
    return [f"### tap_vit_b {name}", _table(heads, rows), note]


def _row(stage: dict[str, Any], without: dict[str, Any] | None) -> tuple[str, ...]:
    latency = stage["latency"]
    per_second = stage.get("images_per_second") or stage.get("regions_per_second") or 0.0
    step = stage.get("microseconds_per_step")
    return (
        stage["stage"],
        *(f"{latency[key]:.2f}" for key in ("median_ms", "p90_ms", "p99_ms")),
        f"{100 * latency['cv']:.1f} %",
        "" if without is None else f"{without['median_ms']:.2f}",
        f"{per_second:.0f}",
        "" if step is None else f"{step:.0f}",
    )


def _beside(stage: dict[str, Any], torch: dict[str, Any] | None) -> tuple[str, ...]:
    if torch is None:
        return ("", "")
    ratio = torch["median_ms"] / stage["latency"]["median_ms"]
    return (f"{torch['median_ms']:.2f}", f"{ratio:.2f}")


def _host(notes: dict[str, dict[str, Any]]) -> list[str]:
    columns = {name: n.get("values", {}) for name, n in notes.items() if name.startswith(HOST)}
    tasks = list(dict.fromkeys(task for values in columns.values() for task in values))
    if not tasks:
        return []
    rows = [
        (task, *(f"{v[task]:.2f}" if task in v else "" for v in columns.values())) for task in tasks
    ]
    return ["### Host, median ms", _table(("task", *columns), rows)]


def _table(heads: tuple[str, ...], rows: Sequence[tuple[str, ...]]) -> str:
    lines = [heads, ("---",) * len(heads), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines) if rows else ""

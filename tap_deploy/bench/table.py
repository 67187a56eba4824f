"""The report as text: a Markdown table of latencies, start-up, conditions, warnings."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from tap_deploy.bench.regression import Change, changes, mismatches, remarks
from tap_deploy.timing import MIN_ITERATIONS, NOISY_CV

PERCENTILES = ("min_ms", "mean_ms", "median_ms", "p90_ms", "p95_ms", "p99_ms", "max_ms")
HEADS = (
    *("task", "candidate", "calls", "min ms", "mean", "median", "p90", "p95", "p99", "max", "cv"),
    *("GPU ms", "host ms", "images/s", "regions/s", "µs/step", "tokens/s", "roofline"),
    "time / {subject} (IQR)",
)


def describe(report: Mapping[str, Any], saved: Mapping[str, Mapping[str, Any]]) -> str:
    """Return a report as text.

    Args:
        report: the report of this run.
        saved: name -> report of an earlier run to compare with.
    """
    parts = [latency_table(report), start_up_table(report), "\n".join(_conditions(report))]
    parts += ["\n".join(_compared(report, name, other)) for name, other in saved.items()]
    warned = "\n".join(f"warning: {line}" for line in warnings(report))
    return "\n\n".join(part for part in (*parts, warned) if part)


def latency_table(report: Mapping[str, Any]) -> str:
    """Return the Markdown table of rows and candidates, without empty columns."""
    subject = report["subject"]
    rows = []
    for row in report["rows"]:
        for name, values in row["candidates"].items():
            ratio = row["ratios"].get(name)
            rows.append((values["stage"], name, *_figures(values), _ratio(ratio)))
    heads = [head.format(subject=subject) for head in HEADS]
    return markdown(*_without_empty(heads, rows))


def start_up_table(report: Mapping[str, Any]) -> str:
    """Return the Markdown table of start-up and memory; empty if they were not measured."""
    heads = ("candidate", "precision", "start-up s", "first region s", "peak memory MB")
    rows = []
    for name, values in report["candidates"].items():
        found = values["start_up"]
        if found is not None:
            cells = [f"{found[key]:.2f}" for key in ("start_up_s", "first_region_s")]
            memory = f"{found['peak_rss_bytes'] / 1e6:.0f}"
            rows.append((name, values["precision"], *cells, memory))
    return markdown(heads, rows) if rows else ""


def warnings(report: Mapping[str, Any]) -> Iterator[str]:
    """Yield what makes the figures doubtful."""
    for other in [name for name in report["candidates"] if name != report["subject"]]:
        ratios = {row["row"]: row["ratios"].get(other) for row in report["rows"]}
        undecided = [row for row, ratio in ratios.items() if ratio and ratio["is_undecided"]]
        if undecided:
            yield (
                f"the machine was too noisy to say whether {other} is faster or slower: "
                f"{', '.join(undecided)}"
            )
    fewest = min(
        values["latency"]["iterations"]
        for row in report["rows"]
        for values in row["candidates"].values()
    )
    if fewest < MIN_ITERATIONS:
        yield f"only {fewest} calls per candidate; percentiles and spreads need {MIN_ITERATIONS}"
    figures = [values for row in report["rows"] for values in row["candidates"].values()]
    noisy = sum(values["is_noisy"] for values in figures)
    if noisy:
        yield (
            f"the machine was not idle: {noisy} of {len(figures)} latencies vary by more than "
            f"{100 * NOISY_CV:g} % (cv); read the ratios, not the milliseconds"
        )
    board = report["conditions"]["machine"]["jetson"]
    clock = board["gpu_clock"] if board else None
    if clock and clock["min_hz"] != clock["max_hz"]:
        yield "the GPU clock is not locked; lock it: sudo jetson_clocks"
    if report["ceilings_problem"]:
        yield f"no share of the roofline: {report['ceilings_problem']}"


def markdown(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Return a Markdown table."""
    lines = [heads, ("---",) * len(heads), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _figures(values: Mapping[str, Any]) -> tuple[str, ...]:
    latency, bound = values["latency"], values.get("roofline")
    on_gpu = values["gpu"]["median_ms"] if "gpu" in values else None
    share = f"{100 * bound['share']:.0f} % ({bound['limited_by']})" if bound else ""
    return (
        str(latency["iterations"]),
        *(f"{latency[name]:.2f}" for name in PERCENTILES),
        f"{100 * latency['cv']:.1f} %",
        _number(on_gpu, 2),
        _number(values.get("host_ms"), 2),
        _number(values.get("images_per_second"), 1),
        _number(values.get("regions_per_second"), 1),
        _number(values.get("microseconds_per_step"), 0),
        _number(values.get("tokens_per_second"), 0),
        share,
    )


def _number(value: float | None, decimals: int) -> str:
    return "" if value is None else f"{value:.{decimals}f}"


def _ratio(ratio: Mapping[str, float] | None) -> str:
    if ratio is None:
        return ""
    return f"{ratio['median']:.2f} ({ratio['low']:.2f} to {ratio['high']:.2f})"


def _without_empty(
    heads: Sequence[str], rows: Sequence[Sequence[str]]
) -> tuple[list[str], list[list[str]]]:
    kept = [i for i in range(len(heads)) if any(row[i] for row in rows)]
    return [heads[i] for i in kept], [[row[i] for i in kept] for row in rows]


def _conditions(report: Mapping[str, Any]) -> Iterator[str]:
    values = report["conditions"]
    machine, settings, board = values["machine"], values["settings"], values["machine"]["jetson"]
    yield (
        f"{values['date']}, {machine['title']}, {values['model']} ({values['weights']}), "
        f"{values['variant']} graphs"
    )
    yield ", ".join(f"{name} {version}" for name, version in values["versions"].items())
    width, height = settings["picture"]
    threads = f", {settings['threads']} threads" if settings["threads"] else ""
    graphs = ", CUDA graphs" if settings["cuda_graphs"] else ""
    yield (
        f"workload {settings['workload']}, batch 1, pictures of {width} x {height}{threads}{graphs}"
        f", captions of at most {settings['tokens'] or 'the maximum number of'} tokens"
    )
    for name, candidate in report["candidates"].items():
        told = ", ".join(f"{key} {value}" for key, value in candidate["details"].items())
        yield f"{name}: {told}"
    if values["gpu_before"]:
        yield ", ".join(f"{name} {value}" for name, value in values["gpu_before"].items())
    if board is not None:
        mode = board["power_mode"]["name"] if board["power_mode"] else "unknown"
        yield f"power mode {mode}, GPU clock {board['gpu_clock']}"
    ceilings = report["ceilings"]
    if ceilings is not None:
        flops = ", ".join(
            f"{name} {value / 1e9:.0f} GFLOP/s" for name, value in ceilings["flops"].items()
        )
        yield (
            f"ceilings by {ceilings['by']}: {flops}, copies "
            f"{ceilings['bytes_per_second'] / 1e9:.1f} GB/s"
        )
    memory = report["memory"]
    if memory["gpu_used_after"]:
        yield f"GPU memory {memory['gpu_used_before']} before, {memory['gpu_used_after']} after"
    yield f"peak memory of this process {memory['peak_rss_bytes'] / 1e6:.0f} MB"


def _compared(report: Mapping[str, Any], name: str, saved: Mapping[str, Any]) -> Iterator[str]:
    different = mismatches(report, saved)
    if different:
        yield f"warning: {name} is not comparable: {'; '.join(different)}"
        return
    found: list[Change] = changes(report, saved)
    yield f"against {name}: {'; '.join(map(str, found))}"
    noted = remarks(report, saved)
    if noted:
        yield f"note: other conditions than {name}: {'; '.join(noted)}"

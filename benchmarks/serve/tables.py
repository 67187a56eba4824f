"""The figures as Markdown."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from tap_deploy.bench.table import markdown

Rows = Sequence[Mapping[str, Any]]


def throughput_table(rows: Rows) -> str:
    """Return a row for each kind of work, number of clients and server."""
    heads = ("work", "clients", "server", "requests/s", "ratio to direct calls (IQR)")
    heads += ("p50, ms", "p95", "p99", "regions per graph call")
    return markdown(
        heads,
        [
            (
                row["work"],
                str(row["clients"]),
                row["server"],
                f"{row['requests_per_s']:.1f}",
                _ratio(row["ratio"]),
                *_latency(row["latency"]),
                ", ".join(f"{name} {n:.1f}" for name, n in row["regions_per_call"].items()),
            )
            for row in rows
        ],
    )


def overload_table(figures: Mapping[str, Any]) -> str:
    """Return a row for each figure of the overload."""
    memory, differences = figures["memory"], figures["differences"]
    rows = [
        ("possible, requests/s", f"{figures['possible_per_s']:.1f}"),
        ("offered, requests/s", f"{figures['offered_per_s']:.1f}"),
        ("sent, requests/s", f"{figures['sent_per_s']:.1f}"),
        ("answered, requests/s", f"{figures['answered_per_s']:.1f}"),
        ("statuses", _counts(figures["statuses"])),
        ("Retry-After, s", _counts(figures["retry_after_s"])),
        ("p50, p95, p99 of the answered, ms", ", ".join(_latency(figures["latency"]))),
        ("answers compared with the predictor's", str(differences["answers"])),
        (
            "other masks, names, captions",
            ", ".join(str(differences[name]) for name in ("masks", "names", "captions")),
        ),
        ("memory", _memory(memory)),
    ]
    return markdown(("overload", ""), rows)


def attack_table(rows: Rows) -> str:
    """Return a row for each attack."""
    heads = ("attack", "p50 of the honest client, ms: before, during", "p95", "its statuses")
    heads += ("gone after, s", "files before, after", "threads before, after", "memory")
    return markdown(
        heads,
        [
            (
                row["name"],
                *_pairs(row),
                _counts(row["statuses"]),
                _seconds(row),
                *(f"{row['before'][name]}, {row['after'][name]}" for name in ("files", "threads")),
                _memory(row["memory"]) if "memory" in row else "",
            )
            for row in rows
        ],
    )


def _pairs(row: Mapping[str, Any]) -> list[str]:
    both = [row["quiet"], row["latency"]]
    return [
        ", ".join("none" if each is None else f"{each[name]:.0f}" for each in both)
        for name in ("median_ms", "p95_ms")
    ]


def _seconds(row: Mapping[str, Any]) -> str:
    parts = [row.get(name) for name in ("longest_s", "freed_after_s")]
    known = [part for part in parts if part is not None]
    return f"{sum(known):.1f}" if known else ""


def _ratio(ratio: Mapping[str, float]) -> str:
    return f"{ratio['median']:.2f} ({ratio['low']:.2f} to {ratio['high']:.2f})"


def _latency(latency: Mapping[str, float] | None) -> list[str]:
    names = ("median_ms", "p95_ms", "p99_ms")
    return ["none" if latency is None else f"{latency[name]:.0f}" for name in names]


def _counts(counts: Mapping[str, int]) -> str:
    return ", ".join(f"{count} x {name}" for name, count in counts.items())


def _memory(memory: Mapping[str, float]) -> str:
    sizes = [memory[name] / 1e6 for name in ("first_bytes", "last_bytes", "most_bytes")]
    return (
        f"{sizes[0]:.0f} to {sizes[1]:.0f} MB ({100 * memory['share']:+.1f} %), at most "
        f"{sizes[2]:.0f}; {memory['slope_bytes_per_minute'] / 1e6:+.1f} MB a minute"
    )

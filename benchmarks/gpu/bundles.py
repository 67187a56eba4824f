"""Steps: the bundles, from a prepared folder, or exported here if the packages are installed."""

from __future__ import annotations

import shutil

from benchmarks.gpu.context import MICRO, VIT_B, Context, Notes, Skipped
from benchmarks.gpu.machine import missing
from benchmarks.gpu.steps import EXPORT
from tap_deploy.bundle.bundle import Bundle


def run_micro(context: Context, notes: Notes) -> None:
    """Put the micro bundle into the work folder, which tests may modify."""
    target = context.work / MICRO
    if context.prepared is not None:
        shutil.copytree(context.prepared / MICRO, target)
    else:
        _require_export(MICRO)
        from benchmarks.gpu.micro import make_micro

        make_micro(context.project / "tests" / "data", target)
    _describe(Bundle.open(target), notes)


def run_vit_b(context: Context, notes: Notes) -> None:
    """Put a bundle of the published size with synthetic weights into the work folder."""
    target = context.work / VIT_B
    if context.prepared is not None:
        from benchmarks.gpu.strip import restore_bundle

        restore_bundle(context.prepared / VIT_B, target)
    else:
        _require_export(VIT_B)
        from benchmarks.gpu.prepare import make_vit_b

        make_vit_b(target, lambda text: print(text, flush=True))
    _describe(Bundle.open(target), notes)


def _require_export(name: str) -> None:
    reason = missing(EXPORT)
    if reason is not None:
        raise Skipped(
            f"{reason}; make the {name} bundle on another machine, see --prepare and --bundle"
        )


def _describe(bundle: Bundle, notes: Notes) -> None:
    notes.put("precisions", list(bundle.manifest.graphs))
    notes.put("bytes", sum(record.size_bytes for record in bundle.manifest.files.values()))
    notes.put(
        "headline",
        f"{bundle.manifest.model}, {', '.join(bundle.manifest.graphs)}, "
        f"{notes.values['bytes'] / 1e6:.0f} MB",
    )

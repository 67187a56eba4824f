"""Progress bars on stderr, if it is a terminal."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterator

import click

PERCENT = 100


def clear_line() -> None:
    """Clear the line of a progress bar before other output; the bar redraws itself."""
    if sys.stderr.isatty():
        click.echo("\r\x1b[K", nl=False, err=True)


@contextlib.contextmanager
def stage_bar(label: str, stages: int) -> Iterator[Callable[[str], None]]:
    """Yield a function to call before each of ``stages`` stages, with its name."""
    if not sys.stderr.isatty():
        yield lambda stage: None
        return
    bar = click.progressbar(
        length=stages,
        label=label,
        file=sys.stderr,
        item_show_func=lambda stage: stage or "",
        show_eta=False,
    )
    with bar:
        begun = False

        def begin(stage: str) -> None:
            nonlocal begun
            bar.current_item = stage  # update() shows no item for the first, unfinished step
            bar.update(1 if begun else 0, stage)
            bar.render_progress()
            begun = True

        yield begin
        bar.update(max(0, stages - bar.pos))


@contextlib.contextmanager
def share_bar(label: str) -> Iterator[Callable[[float, str], None]]:
    """Yield a function to call with the finished share, 0 to 1, and the current item."""
    if not sys.stderr.isatty():
        yield lambda share, item: None
        return
    bar = click.progressbar(
        length=PERCENT, label=label, file=sys.stderr, item_show_func=lambda item: item or ""
    )
    with bar:

        def show(share: float, item: str) -> None:
            bar.update(max(0, round(share * PERCENT) - bar.pos), item)  # never backwards
            bar.render_progress()

        yield show
        bar.update(max(0, PERCENT - bar.pos))

"""``tap-export serve``: a bundle over HTTP, with a page to click on."""

from __future__ import annotations

import dataclasses
import logging
import pathlib
from collections.abc import Callable

import click

from tap_deploy.bundle.bundle import Bundle
from tap_deploy.cli.selftest import selftest_subject
from tap_deploy.console.extras import require_serve_extra
from tap_deploy.console.options import FILE, bundle_argument, option_group, runtime_options
from tap_deploy.errors import InputError, VerificationError
from tap_deploy.predictor import TapPredictor
from tap_deploy.server.options import MIB, ServeOptions
from tap_deploy.sessions.opening import pipeline_from_bundle, sessions_from_bundle
from tap_deploy.sessions.options import MAX_CONTEXTS, DeviceOptions
from tap_deploy.sessions.run_on import RunOn
from tap_deploy.storage.regular_files import read_text
from tap_deploy.verify.selftest import run_selftest

logger = logging.getLogger(__name__)


def _options(
    *, max_body_mb: int, cache_mb: int, token_file: pathlib.Path | None, **values: object
) -> ServeOptions:
    """Return the options of the server.

    Raises:
        InputError: the file of the token cannot be read, or an option is invalid.
    """
    return ServeOptions(
        max_body_bytes=max_body_mb * MIB,
        cache_bytes=cache_mb * MIB,
        token=None if token_file is None else _read_token(token_file),
        **values,  # type: ignore[arg-type]  # click has checked them
    )


def _read_token(path: pathlib.Path) -> str:
    try:
        return read_text(path).strip()
    except (OSError, UnicodeDecodeError) as exc:
        raise InputError(f"token file {path} cannot be read: {exc}") from exc


listen_options = option_group(
    "options",
    _options,
    click.option("--host", default="127.0.0.1", show_default=True, help="Address to listen on."),
    click.option(
        "--port",
        type=click.IntRange(0, 65535),
        default=8000,
        show_default=True,
        help="Port to listen on; 0 for any free one.",
    ),
    click.option(
        "--token-file",
        type=FILE,
        help="File with the token that clients send: Authorization: Bearer TOKEN.",
    ),
    click.option(
        "--without-token",
        is_flag=True,
        help="Let everybody in who can reach --host, even from other machines.",
    ),
    click.option(
        "--workers",
        type=click.IntRange(1, MAX_CONTEXTS),
        default=2,
        show_default=True,
        help="Graph calls that run at the same time: threads on the CPU, contexts on a GPU.",
    ),
    click.option(
        "--max-batch",
        type=click.IntRange(min=1),
        default=32,
        show_default=True,
        help="Regions that share a graph call.",
    ),
    click.option(
        "--max-wait-ms",
        type=click.FloatRange(min=0),
        default=2.0,
        show_default=True,
        help="How long a request waits for others to share its graph calls.",
    ),
    click.option(
        "--max-queue",
        "max_pending",
        type=click.IntRange(min=1),
        default=64,
        show_default=True,
        help="Requests that wait or run; further ones get a 429.",
    ),
    click.option(
        "--max-pixels",
        type=click.IntRange(min=1),
        default=50_000_000,
        show_default=True,
        help="Largest picture to decode.",
    ),
    click.option(
        "--max-body-mb",
        type=click.IntRange(min=1),
        default=32,
        show_default=True,
        help="Largest body of a request, in MiB.",
    ),
    click.option(
        "--cache-mb",
        type=click.IntRange(min=1),
        default=512,
        show_default=True,
        help="Memory for encoded pictures, in MiB; 4 MiB each with the published models.",
    ),
    click.option(
        "--timeout-s",
        type=click.FloatRange(min=0, min_open=True),
        default=60.0,
        show_default=True,
        help="Longest time of a request, in seconds.",
    ),
)


@click.command("serve")
@bundle_argument
@listen_options
@runtime_options
def serve_command(bundle: str, options: ServeOptions, run_on: RunOn) -> None:
    """Serve BUNDLE over HTTP, with a page to click on.

    The server answers once the golden samples of BUNDLE have passed on this machine. At SIGTERM or
    Ctrl-C, it finishes what it has accepted. Logs are JSON lines on stderr.
    """
    require_serve_extra()
    from tap_deploy.server.running import serve
    from tap_deploy.server.service import ServedModel, Service

    opened = Bundle.open(bundle)
    model = ServedModel(
        name=opened.manifest.model, backend=run_on.mark_name, precision=run_on.precision
    )
    service = Service(
        lambda: _tested_predictor(opened, run_on, options, lambda: service.require_wanted()),
        model,
        options,
    )
    serve(service, lambda address: click.echo(f"serving {bundle} on {address}"))


def _tested_predictor(
    bundle: Bundle, run_on: RunOn, options: ServeOptions, on_step: Callable[[], None]
) -> TapPredictor:
    """Test the graphs of a bundle on the golden samples, and load them; call ``on_step`` often.

    Raises:
        TapError: they fail and ``run_on.allow_failed`` is off, or they cannot be loaded.
    """
    subject = dataclasses.replace(selftest_subject(bundle, run_on), keeps_marks=False)
    result = run_selftest(
        subject,
        lambda: sessions_from_bundle(bundle, run_on),
        load_pipeline=lambda: pipeline_from_bundle(bundle, run_on),
        on_check=lambda _: on_step(),
    )
    try:
        result.require()
    except VerificationError as exc:
        if not run_on.allow_failed:
            raise
        logger.warning("%s", exc)
    predictor = TapPredictor.from_bundle(
        bundle.path,
        device_options=DeviceOptions(contexts=options.workers),
        check_hashes=False,  # they were checked for the self-test
        **dataclasses.asdict(run_on),
    )
    on_step()
    predictor.warm_up()
    return predictor

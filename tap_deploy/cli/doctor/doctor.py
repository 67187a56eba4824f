"""``tap-export doctor``: prints what this machine has, what it lacks, and how to fix it."""

from __future__ import annotations

import dataclasses
import json

import click

from tap_deploy import __version__
from tap_deploy.cli.doctor.board_checks import board_checks
from tap_deploy.cli.doctor.finding import Finding, missing_for
from tap_deploy.cli.doctor.machine_checks import machine_checks
from tap_deploy.cli.doctor.packages import USES
from tap_deploy.console.options import json_option
from tap_deploy.machine.state import MachineState, machine_state, state_as_dict

_STYLES = {"ok": "green", "missing": "red", "warning": "yellow"}


def diagnose(state: MachineState) -> list[Finding]:
    """Return findings on Python, packages, GPU, disk, memory and, on a Jetson, the board.

    Python and its packages are always those of this process.
    """
    return [*machine_checks(state), *board_checks(state)]


@click.command("doctor")
@json_option
@click.option(
    "--for",
    "use",
    type=click.Choice(USES),
    help="Exit with code 2 if anything this use needs is missing.",
)
@click.pass_context
def doctor_command(context: click.Context, as_json: bool, use: str | None) -> None:
    """Show what is installed or missing, and how to fix it."""
    state = machine_state()
    findings = diagnose(state)
    missing = {name: missing_for(name, findings) for name in USES}
    if as_json:
        report = {
            "version": __version__,
            "machine": state_as_dict(state),
            "missing": missing,
            "checks": [dataclasses.asdict(finding) for finding in findings],
        }
        click.echo(json.dumps(report, indent=2))
    else:
        _print_report(findings, missing)
    if use and missing[use]:
        context.exit(2)


def _print_report(findings: list[Finding], missing: dict[str, list[str]]) -> None:
    width = max(len(finding.name) for finding in findings)
    for finding in findings:
        status = click.style(f"{finding.status:<8}", fg=_STYLES[finding.status])
        click.echo(f"{status} {finding.name:<{width}} {finding.detail}")
        if finding.remedy:
            click.echo(f"{'':{width + 10}}for {finding.required_for}: {finding.remedy}")
    for use, names in missing.items():
        click.echo(f"{use + ':':<10}{'missing ' + ', '.join(names) if names else 'ready'}")

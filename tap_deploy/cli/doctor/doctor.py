"""``tap-export doctor``: what this machine has, what it lacks, and the command that mends it."""

from __future__ import annotations

import dataclasses
import json

import click

from tap_deploy import __version__
from tap_deploy.cli.doctor.board_checks import board_checks
from tap_deploy.cli.doctor.finding import Check, missing_for
from tap_deploy.cli.doctor.machine_checks import machine_checks
from tap_deploy.cli.doctor.packages import USES
from tap_deploy.machine.state import MachineState, machine_state, state_as_dict

_STYLES = {"ok": "green", "missing": "red", "warning": "yellow"}


def diagnose(state: MachineState) -> list[Check]:
    """Judge Python, packages, GPU, disk, memory and, on a Jetson, the board.

    Python and its packages are always those of this process.
    """
    return [*machine_checks(state), *board_checks(state)]


@click.command("doctor")
@click.option("--json", "as_json", is_flag=True, help="Print the checks as JSON.")
@click.option(
    "--for", "use", type=click.Choice(USES), help="Exit with 2 if this use lacks something."
)
@click.pass_context
def doctor_command(context: click.Context, as_json: bool, use: str | None) -> None:
    """Show what is installed, what is missing, and the command that mends it."""
    state = machine_state()
    checks = diagnose(state)
    missing = {name: missing_for(name, checks) for name in USES}
    if as_json:
        report = {
            "version": __version__,
            "machine": state_as_dict(state),
            "missing": missing,
            "checks": [dataclasses.asdict(check) for check in checks],
        }
        click.echo(json.dumps(report, indent=2))
    else:
        _print_report(checks, missing)
    if use and missing[use]:
        context.exit(2)


def _print_report(checks: list[Check], missing: dict[str, list[str]]) -> None:
    for check in checks:
        status = click.style(f"{check.status:<8}", fg=_STYLES[check.status])
        click.echo(f"{status} {check.name:<16} {check.detail}")
        if check.remedy:
            click.echo(f"{'':26}for {check.required_for}: {check.remedy}")
    for use, names in missing.items():
        click.echo(f"{use:<9}{'is missing ' + ', '.join(names) if names else 'is ready'}")

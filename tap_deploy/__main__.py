"""Runs the command line as ``python -m tap_deploy``, for when ``tap-export`` is not on PATH."""

from tap_deploy.cli import main

main(prog_name="tap-export")

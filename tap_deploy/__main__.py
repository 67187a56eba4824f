"""``python -m tap_deploy``: the command line, where ``tap-export`` is not on the path."""

from tap_deploy.cli import main

main(prog_name="tap-export")

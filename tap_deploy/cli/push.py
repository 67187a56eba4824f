"""``tap-export push``: publishes a bundle on the model hub."""

from __future__ import annotations

import json

import click

from tap_deploy.bundle.bundle import Bundle
from tap_deploy.bundle.manifest import MANIFEST_NAME
from tap_deploy.console.options import bundle_argument, json_option
from tap_deploy.errors import InputError
from tap_deploy.hub.push import PushOptions, push_files
from tap_deploy.hub_address import HubAddress


@click.command("push")
@bundle_argument
@click.argument("repository", metavar="OWNER/NAME")
@click.option("--private", is_flag=True, help="Make a repository that only its owners may read.")
@click.option("--revision", metavar="BRANCH", help="Branch to push to. Default: the main one.")
@click.option("--message", help="Message of the commit. Default: which model it is.")
@json_option
def push_command(
    bundle: str,
    repository: str,
    private: bool,
    revision: str | None,
    message: str | None,
    as_json: bool,
) -> None:
    """Publish BUNDLE on the model hub, after checking its hashes; print its address.

    Sends the files that its manifest lists, in one commit: no engines, which are for one machine
    only. Makes the repository if there is none. Before you publish, see the terms of the weights.

    Needs a token that may write, in HF_TOKEN or from "hf auth login", and "tap-deploy[hub]".
    """
    if HubAddress.parse(f"hf://{repository}").revision is not None:
        raise InputError(f"pass the branch of {repository!r} with --revision BRANCH")
    opened = Bundle.open(bundle)
    manifest = opened.manifest
    options = PushOptions(
        repository=repository,
        private=private,
        branch=revision,
        message=message or f"Bundle of {manifest.model}",
    )
    names = (*manifest.files, MANIFEST_NAME)
    address, url = push_files(opened.path, names, options)
    result = {
        "bundle": str(address),
        "url": url,
        "files": len(names),
        "size_bytes": sum((opened.path / name).stat().st_size for name in names),
    }
    click.echo(json.dumps(result, indent=2) if as_json else result["bundle"])

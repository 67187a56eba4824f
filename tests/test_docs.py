"""The documentation: links, paths, modules and commands that it names exist."""

from __future__ import annotations

import importlib
import pathlib
import pkgutil
import re
import shlex

import click
import pytest

from tap_deploy.cli import COMMANDS
from tap_deploy.cli.lazy_group import LazyGroup

ROOT = pathlib.Path(__file__).parent.parent
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted(ROOT.glob("docs/*.md"))]
PAGES += sorted(ROOT.glob("examples/*/README.md"))

pages = pytest.mark.parametrize("page", PAGES, ids=lambda page: f"{page.parent.name}/{page.name}")


def anchors(page: pathlib.Path) -> set[str]:
    """The anchors of a page, as GitHub makes them from headings."""
    prose = re.sub(r"```.*?```", "", page.read_text("utf-8"), flags=re.DOTALL)
    titles = re.findall(r"^#+ (.*)$", prose, re.M)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


@pages
def test_links_lead_somewhere(page):
    for link in re.findall(r"\]\(([^)\s]+)\)", page.read_text("utf-8")):
        if not link.startswith("https://"):
            path, _, anchor = link.partition("#")
            target = page.parent / path if path else page
            assert target.exists(), link
            assert not anchor or anchor in anchors(target), link


@pages
def test_paths_exist(page):
    folders = "tap_deploy|export|engines|benchmarks|examples|scripts|tests|docs"
    pattern = rf"(?<![\w./-])(?:{folders})/[\w./-]*[\w/](?![<\w*])"
    found = re.findall(pattern, page.read_text("utf-8"))
    assert [path for path in found if not (ROOT / path).exists()] == []


@pages
def test_modules_and_their_names_exist(page):
    pytest.importorskip("torch")
    text = page.read_text("utf-8")
    names = set(re.findall(r"(?<![\w./])(?:tap_deploy|benchmarks)(?:\.(?!md)\w+)+(?![\w/])", text))
    for module, imported in re.findall(r"^from (tap_deploy[\w.]*) import (.+)$", text, re.M):
        names |= {f"{module}.{name.strip()}" for name in imported.split(",")}
    for name in names:
        pkgutil.resolve_name(name)


def command_of(words: list[str]) -> click.Command:
    """The command that words of a command line name, also one of a group."""
    module, attribute = COMMANDS[words[0]]
    command: click.Command = getattr(importlib.import_module(module), attribute)
    if isinstance(command, LazyGroup) and len(words) > 1:
        found = command.get_command(click.Context(command), words[1])
        assert found is not None, words
        return found
    return command


@pages
def test_commands_and_their_options_exist(page):
    text = page.read_text("utf-8")
    blocks = re.findall(r"```bash\n(.*?)```", text, re.DOTALL)
    blocks += re.findall(r"(?:^    .*\n)+", text, re.M)
    lines = "\n".join(blocks).replace("\\\n", " ").splitlines()
    lines += re.findall(r"`(tap-export [^`\n]+)`", text)
    for line in lines:
        if found := re.search(r"(?:^|\| )tap-export (.*)", line.strip()):
            words = shlex.split(found[1].split(" > ")[0], comments=True)
            command = command_of(words)
            known = {o for p in command.params for o in (*p.opts, *p.secondary_opts)}
            used = {word.split("=")[0] for word in words if word.startswith("--")}
            assert used <= known | {"--help"}, line

"""Checks that hold for every HTML page."""

from __future__ import annotations

import html.parser
import json
import pathlib
import re
import subprocess
from collections.abc import Sequence

VOID = {"base", "br", "embed", "img", "link", "meta"}
LOADING = {"script", "link", "iframe", "object", "embed", "base", "form", "audio", "video", "style"}


class Page(html.parser.HTMLParser):
    """A parsed page: its elements, its rows of cells, and its text.

    Fails if an element is not closed, or if the page loads anything or runs a script.
    """

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.rows: list[list[str]] = []
        self.text = ""
        self._open: list[str] = []
        assert text.startswith("<!doctype html>\n")
        self.feed(text)
        self.close()
        assert not self._open, self._open
        ids = [attributes["id"] for _, attributes in self.tags if "id" in attributes]
        assert len(ids) == len(set(ids))
        for tag, attributes in self.tags:
            for name, value in attributes.items():
                assert not name.startswith("on"), (tag, name)
                if name == "src":
                    assert tag == "img" and str(value).startswith("data:image/png;base64,")
                if name == "href":
                    assert tag == "a" and str(value)[:1] == "#" and str(value)[1:] in ids
        assert [tag for tag, _ in self.tags if tag in LOADING] == ["style"]
        assert "@import" not in text and "url(" not in text and "://" not in text

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        assert len({name for name, _ in attrs}) == len(attrs), tag
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self._open.append(tag)
        if tag == "tr":
            self.rows.append([])
        if tag in ("th", "td"):
            self.rows[-1].append("")

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        if tag not in VOID:
            assert self._open.pop() == tag, tag

    def handle_data(self, data: str) -> None:
        if "style" in self._open:
            return
        self.text += data
        if {"th", "td"} & set(self._open):
            self.rows[-1][-1] += data

    def attributes(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.tags if name == tag]


MEASURE = """<!doctype html><meta charset="utf-8"><body><script>
const pages = PAGES, widths = WIDTHS, found = [];
const done = pages.flatMap((text, page) => widths.map((width, column) => new Promise(measured => {
  const frame = document.createElement("iframe");
  frame.style = `width: ${width}px; height: 800px; border: 0`;
  frame.srcdoc = text;
  frame.onload = () => {
    const root = frame.contentDocument.documentElement;
    (found[page] ??= [])[column] = root.scrollWidth - root.clientWidth;
    measured();
  };
  document.body.append(frame);
})));
Promise.all(done).then(() => {
  console.log("measured");
  document.body.textContent = `found ${JSON.stringify(found)}`;
});
</script>"""


def overflows(
    browser: str, folder: pathlib.Path, pages: Sequence[str], widths: Sequence[int]
) -> tuple[list[list[int]], list[str]]:
    """Show pages in a headless browser, each in frames of some widths.

    Returns:
        By page and width, the pixels by which the page is wider than its frame, and what all pages
        wrote to the console.
    """
    text = json.dumps(list(pages)).replace("<", "\\u003c")
    measure = MEASURE.replace("PAGES", text, 1).replace("WIDTHS", str(list(widths)), 1)
    (folder / "measure.html").write_text(measure, "utf-8")
    # The sandbox cannot be had in most containers; these pages are ours.
    command = [browser, "--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage"]
    command += [f"--user-data-dir={folder / 'profile'}", "--enable-logging=stderr", "--dump-dom"]
    command += ["--virtual-time-budget=30000", (folder / "measure.html").as_uri()]
    shown = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
    match = re.search(r"found (\[.*\])", shown.stdout)
    assert match, shown.stdout[-500:] + shown.stderr[-2000:]
    return json.loads(match[1]), re.findall(r':CONSOLE[^"]*"(.*)", source', shown.stderr)

"""Drives the page of ``tap-export serve`` in a headless browser, as a person does."""

from __future__ import annotations

import contextlib
import json
import pathlib
from collections.abc import Iterator
from typing import Any

from playwright.sync_api import Browser, Page, Playwright, expect

from tests.needs import BROWSER

Place = tuple[float, float]  # x, y in pixels of the picture

# The sandbox cannot be had in most containers; the page is ours. The camera shows a test picture.
ARGUMENTS = [
    "--no-sandbox",
    "--disable-dev-shm-usage",
    "--use-fake-device-for-media-stream",
    "--use-fake-ui-for-media-stream",
]
WATCH_CAPTIONS = """
window.captions = [];
window.announced = [];
new MutationObserver(changes => {
  for (const { target, addedNodes } of changes) {
    const texts = { caption: captions, unseen: announced }[target.className];
    for (const node of addedNodes) if (node.data) texts?.push(node.data);
  }
}).observe(document.body, { subtree: true, childList: true });
"""


def launch(playwright: Playwright) -> Browser:
    return playwright.chromium.launch(executable_path=BROWSER, args=ARGUMENTS)


class Visit:
    """A page of the server in its own browser context, and everything it has said or asked for.

    ``refusals`` are the statuses of answers that a test expects: the browser logs each as an error.
    """

    def __init__(self, browser: Browser, address: str, **context: Any) -> None:
        self.address = address
        self.refusals: set[int] = set()
        self.context = browser.new_context(
            **{"viewport": {"width": 1280, "height": 800}, "reduced_motion": "reduce"} | context
        )
        self.page: Page = self.context.new_page()
        self.protocol = self.context.new_cdp_session(self.page)
        self.page.set_default_timeout(10_000)
        self.requests: list[Any] = []
        self.said: list[str] = []
        # From now on, or a click can be faster than expect_file_chooser, and open a real dialog.
        self.page.on("filechooser", lambda chooser: None)
        self.page.on("request", lambda request: self.requests.append(request))
        self.page.on("console", lambda message: self.said.append(message.text))
        self.page.on("pageerror", lambda error: self.said.append(str(error)))

    def go(self) -> Visit:
        self.page.goto(self.address)
        expect(self.page.locator("#model")).to_contain_text("tap_demo")
        self.page.evaluate(WATCH_CAPTIONS)
        return self

    def leave(self) -> None:
        """Close the page, which must not have asked anybody else nor complained."""
        self.context.close()
        urls = [each.url for each in self.requests if not each.url.startswith("blob:")]
        assert [url for url in urls if not url.startswith(f"{self.address}/")] == []
        expected = tuple(f"status of {status}" for status in self.refusals)
        assert [text for text in self.said if not any(each in text for each in expected)] == []

    def open(self, picture: pathlib.Path) -> None:
        """Choose a picture in the file dialog, and wait until the server has it."""
        with self.page.expect_file_chooser() as chooser, self.uploaded():
            self.page.get_by_role("button", name="Open").click()
            chooser.value.set_files(picture)

    @contextlib.contextmanager
    def uploaded(self) -> Iterator[None]:
        """Wait for the upload that the block causes."""
        with self.page.expect_response(lambda answer: answer.url.endswith("/v1/images")) as answer:
            yield
        assert answer.value.status == 201
        expect(self.page.locator("#frame")).to_be_visible()

    def screen(self, place: Place) -> Place:
        """Return where a pixel of the picture is on the screen."""
        shown = self.page.locator("#frame").bounding_box()
        assert shown is not None
        size = self.page.locator("#photo").evaluate("i => [i.naturalWidth, i.naturalHeight]")
        return (
            shown["x"] + place[0] / size[0] * shown["width"],
            shown["y"] + place[1] / size[1] * shown["height"],
        )

    def tool(self, name: str) -> None:
        self.page.locator("label", has=self.page.get_by_role("radio", name=name)).click()

    def click(self, place: Place, key: str | None = None) -> None:
        """Click on the picture with the mouse, while a key is held."""
        with self.held(key):
            self.page.mouse.click(*self.screen(place))

    def drag(self, *places: Place) -> None:
        """Press the mouse at the first place, and release it at the last."""
        self.page.mouse.move(*self.screen(places[0]))
        self.page.mouse.down()
        for place in places[1:]:
            self.page.mouse.move(*self.screen(place))
        self.page.mouse.up()

    @contextlib.contextmanager
    def held(self, key: str | None) -> Iterator[None]:
        if key is not None:
            self.page.keyboard.down(key)
        yield
        if key is not None:
            self.page.keyboard.up(key)

    def regions(self, count: int) -> list[dict[str, str]]:
        """Wait for as many regions with finished captions; return what the list says of them."""
        items = self.page.locator("#regions > li")
        expect(items).to_have_count(count)
        expect(self.page.locator("#regions > .writing")).to_have_count(0)
        parts = ("number", "name", "probability", "caption")
        return [
            {part: item.locator(f".{part}").inner_text() for part in parts} for item in items.all()
        ]

    def names(self, count: int) -> list[str]:
        return [region["name"] for region in self.regions(count)]

    def button(self, name: str) -> Any:
        return self.page.get_by_role("button", name=name)

    def prompts(self) -> list[dict[str, Any]]:
        """Return the prompt of every question so far."""
        asked = [each for each in self.requests if each.url.endswith("/regions")]
        return [json.loads(each.post_data)["prompts"][0] for each in asked]

    def download(self, name: str, folder: pathlib.Path) -> pathlib.Path:
        with self.page.expect_download() as download:
            self.button(name).click()
        path = folder / download.value.suggested_filename
        download.value.save_as(path)
        return path

    def touch(self, kind: str, *places: Place) -> None:
        """Send a raw touch event with a finger at each place of the picture; none ends it."""
        points = [dict(zip("xy", self.screen(place), strict=True)) for place in places]
        event = {"type": f"touch{kind}", "touchPoints": points}
        self.protocol.send("Input.dispatchTouchEvent", event)

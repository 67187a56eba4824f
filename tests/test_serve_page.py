"""The page of ``tap-export serve`` in a browser, against the real server and the demo model."""

from __future__ import annotations

import itertools
import json
import pathlib
import re
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
from PIL import Image

from tap_deploy.demo_model import Sample, load_samples
from tap_deploy.masks import mask_from_rle, rle_from_mask
from tap_deploy.predictor import TapPredictor
from tap_deploy.prompts import Prompts
from tests.needs import needs_browser

sync_api = pytest.importorskip("playwright.sync_api")
pytest.importorskip("fastapi")

from playwright.sync_api import expect

from tests.browsers import Visit, launch
from tests.served import Served, served

pytestmark = [
    needs_browser,
    pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning"),  # pycocotools
]

TOKEN = "a-token-of-enough-letters"
SAMPLES = load_samples()
RABBIT, EXTINGUISHER, MONKEY = (region.points for region in SAMPLES[0].regions)


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with sync_api.sync_playwright() as playwright:
        browser = launch(playwright)
        yield browser
        browser.close()


@pytest.fixture(scope="module")
def server(demo_bundle: Any) -> Iterator[Served]:
    with served(lambda: TapPredictor.from_bundle(demo_bundle.path)) as running:
        yield running


@pytest.fixture(scope="module")
def strict_server(demo_bundle: Any) -> Iterator[Served]:
    """A server that asks for a token and takes small pictures only."""
    limits = {"max_pixels": 500_000, "max_body_bytes": 200_000}
    with served(
        lambda: TapPredictor.from_bundle(demo_bundle.path), token=TOKEN, **limits
    ) as running:
        yield running


@pytest.fixture
def visits(browser: Any, server: Served) -> Iterator[Callable[..., Visit]]:
    """Open pages of a server; options are those of a browser context."""
    opened: list[Visit] = []

    def visit(of: Served = server, **context: Any) -> Visit:
        opened.append(Visit(browser, of.address, **context))
        return opened[-1]

    yield visit
    for each in opened:
        each.leave()


@pytest.fixture
def visit(visits: Callable[..., Visit]) -> Visit:
    """A page with the first sample."""
    visit = visits().go()
    visit.open(SAMPLES[0].picture)
    return visit


def draw(visit: Visit, sample: Sample) -> None:
    """Ask for the regions of a sample with the mouse."""
    for region in sample.regions:
        visit.tool(region.prompt.capitalize())
        if region.prompt == "point":
            visit.click(region.points[0])
        else:
            visit.drag(*region.points)


def test_a_click_a_box_and_a_sketch_get_the_right_answers(visits, server):
    visit = visits().go()
    answers = []
    for sample in SAMPLES:
        visit.open(sample.picture)
        draw(visit, sample)
        found = visit.regions(3)
        assert [each["name"] for each in found] == [region.name for region in sample.regions]
        assert [each["number"] for each in found] == ["1", "2", "3"]
        answers += [(each["probability"], each["caption"]) for each in found]
    pictures = [sample.picture for sample in SAMPLES for _ in sample.regions]
    expected = [
        server.service.predictor.predict(picture, prompts=prompts_of(asked)).to_dict()["regions"][0]
        for picture, asked in zip(pictures, visit.prompts(), strict=True)
    ]
    assert answers == [
        (f"{each['concepts'][0]['probability']:.0%}", each["caption"]) for each in expected
    ]


def prompts_of(asked: dict[str, Any]) -> Prompts:
    if "sketch" in asked:
        return Prompts.from_sketches([asked["sketch"]])
    if "box" in asked:
        return Prompts.from_boxes([asked["box"]])
    return Prompts.from_points([asked["points"]])


def test_a_caption_grows_word_by_word_and_is_announced_once(visit):
    visit.click(RABBIT[0])
    (region,) = visit.regions(1)
    written = visit.page.evaluate("captions")
    assert len(written) > 3
    assert written[-1] == region["caption"]
    assert all(later.startswith(earlier) for earlier, later in itertools.pairwise(written))
    assert visit.page.evaluate("announced") == [
        f"Region 1: rabbit, {region['probability']}. {region['caption']}"
    ]


def test_a_selected_region_is_refined_by_keys_and_by_buttons(visit):
    visit.click(RABBIT[0])
    visit.regions(1)
    visit.click((104, 215), "Alt")
    visit.regions(1)
    visit.click((160, 244), "Shift")
    visit.regions(1)
    visit.tool("Leave out")
    visit.click((30, 30))
    visit.tool("Add")
    visit.click((120, 200))
    assert visit.names(1) == ["rabbit"]
    labels = [[label for _, _, label in prompt["points"]] for prompt in visit.prompts()]
    assert labels == [[1], [1, 1], [1, 1, 0], [1, 1, 0, 0], [1, 1, 0, 0, 1]]
    place = visit.prompts()[-1]["points"][1]
    assert place[:2] == pytest.approx((104, 215), abs=0.5)
    visit.tool("New")
    visit.drag(MONKEY[0], MONKEY[0])
    assert visit.names(2) == ["rabbit", "monkey"]


def test_boxes_and_sketches_are_refined_with_points(visit):
    draw(visit, SAMPLES[0])
    visit.regions(3)
    visit.tool("Point")
    visit.click((30, 30), "Shift")
    visit.regions(3)
    visit.button("2 fire extinguisher").click()
    visit.click((225, 120), "Alt")
    assert visit.names(3) == ["rabbit", "fire extinguisher", "monkey"]
    sketched, boxed = visit.prompts()[-2:]
    assert [label for _, _, label in sketched["points"]] == [1] * 9 + [0]
    assert boxed["box"] == pytest.approx([211, 96, 239, 156], abs=0.5)
    assert [label for _, _, label in boxed["points"]] == [1]


def test_shift_without_a_region_is_said(visit):
    visit.click(RABBIT[0], "Shift")
    expect(visit.page.get_by_role("alert")).to_contain_text("No region is selected")
    assert visit.prompts() == []


def test_undo_redo_remove_and_clear(visit):
    for place in (RABBIT[0], MONKEY[3]):
        visit.click(place)
    assert visit.names(2) == ["rabbit", "monkey"]
    visit.button("Undo").click()
    assert visit.names(1) == ["rabbit"]
    visit.button("Redo").click()
    assert visit.names(2) == ["rabbit", "monkey"]
    visit.button("Remove region 1").click()
    assert visit.names(1) == ["monkey"]
    expect(visit.button("2 monkey")).to_be_focused()
    visit.page.keyboard.press("Control+z")
    assert visit.names(2) == ["rabbit", "monkey"]
    visit.button("Clear all").click()
    visit.regions(0)
    visit.page.keyboard.press("Control+z")
    visit.page.keyboard.press("Control+Shift+z")
    visit.regions(0)
    expect(visit.button("Clear all")).to_be_disabled()
    expect(visit.button("PNG")).to_be_disabled()


def test_everything_takes_the_place_of_the_list_and_undo_brings_it_back(visit):
    visit.click(RABBIT[0])
    visit.regions(1)
    visit.button("Everything").click()
    expect(visit.button("Everything")).to_be_visible(timeout=20_000)
    found = visit.regions(visit.page.locator("#regions > li").count())
    assert {"rabbit", "monkey", "fire extinguisher"} <= {each["name"] for each in found}
    assert all(each["caption"] for each in found)
    assert [each["number"] for each in found] == [str(n + 1) for n in range(len(found))]
    visit.button("Undo").click()
    assert visit.names(1) == ["rabbit"]


def test_everything_can_be_stopped(visit):
    routes = hold(visit, "**/everything")
    visit.button("Everything").click()
    expect(visit.page.get_by_role("progressbar")).to_be_visible()
    visit.button("Stop").click()
    expect(visit.button("Everything")).to_be_visible()
    expect(visit.page.get_by_role("progressbar")).to_be_hidden()
    expect(visit.page.get_by_role("alert")).to_have_count(0)
    let_go(visit, routes)
    odd = 'event: regions\ndata: {"regions": [{}]}\n\n'
    visit.page.route("**/everything", lambda route: route.fulfill(status=200, body=odd))
    with visit.page.expect_event("pageerror"):  # not for the user, but it ends the search
        visit.button("Everything").click()
    expect(visit.button("Everything")).to_be_visible()
    visit.said.clear()


def hold(visit: Visit, pattern: str) -> list[Any]:
    """Let no request through, and no answer back; returns the list of those that are held."""
    routes: list[Any] = []
    visit.page.route(pattern, lambda route: routes.append(route))
    return routes


def let_go(visit: Visit, routes: list[Any]) -> None:
    for route in routes:
        route.abort()
    visit.page.unroute_all()


def test_escape_gives_up_a_question_and_a_stroke(visit):
    routes = hold(visit, "**/regions")
    visit.click(RABBIT[0])
    expect(visit.page.locator("#regions > li")).to_have_count(1)
    visit.page.keyboard.press("Escape")
    visit.regions(0)
    expect(visit.button("Undo")).to_be_disabled()
    visit.click(RABBIT[0])
    visit.click((104, 215), "Alt")
    visit.page.keyboard.press("Escape")  # both questions
    visit.regions(0)
    expect(visit.button("Undo")).to_be_disabled()
    let_go(visit, routes)
    visit.tool("Box")
    visit.page.mouse.move(*visit.screen((10, 10)))
    visit.page.mouse.down()
    visit.page.mouse.move(*visit.screen((90, 90)))
    visit.page.keyboard.press("Escape")
    visit.page.mouse.up()
    visit.regions(0)


def test_a_region_is_refined_before_its_answer_comes(visit):
    visit.refusals.add(422)
    routes: list[Any] = []

    def answer(route: Any) -> None:
        routes.append(route)
        if len(routes) == 2:
            route.fulfill(status=422, body='{"detail": "points[1] is wrong"}')
        if len(routes) == 4:
            routes[2].fulfill(body=routes[2].fetch().text())  # complete before the last begins
            route.continue_()

    visit.page.route("**/regions", answer)
    visit.click(RABBIT[0])
    visit.click((104, 215), "Alt")
    expect(visit.page.get_by_role("alert")).to_have_text("points[1] is wrong")
    routes[0].continue_()  # the region before is back
    (first,) = visit.regions(1)
    visit.click((104, 215), "Alt")
    visit.click((120, 200), "Alt")
    (last,) = visit.regions(1)
    assert visit.page.evaluate("announced") == [  # nothing of the one in between
        f"Region 1: rabbit, {region['probability']}. {region['caption']}"
        for region in (first, last)
    ]


def test_the_mask_of_the_answer_is_drawn_in_its_place(visit, tmp_path):
    visit.click(RABBIT[0])
    visit.regions(1)
    visit.page.keyboard.press("Escape")  # without the outline of the selected one
    picture = visit.page.evaluate(
        """async () => {
          await new Promise(requestAnimationFrame);
          const { width, height } = overlay;
          const square = new OffscreenCanvas(256, 256).getContext("2d");
          square.drawImage(overlay, 0, 0, width, height, 0, 0, 256, 256);
          const { data } = square.getImageData(0, 0, 256, 256);
          return Array.from({ length: 256 * 256 }, (_, at) => data[4 * at + 3]);
        }"""
    )
    drawn = np.array(picture).reshape(256, 256) > 60  # opacity: masks are half transparent
    answer = json.loads(visit.download("JSON", tmp_path).read_text())
    mask = mask_from_rle(answer["regions"][0]["segmentation"])
    assert (drawn & mask).sum() / (drawn | mask).sum() > 0.95


@pytest.mark.parametrize("step", [1, 3])
def test_outlines_enclose_exactly_the_pixels_of_a_mask(visit, step):
    random = np.random.default_rng(5)
    masks = [random.random((23, 31)) < share for share in (0.03, 0.4, 0.6, 0.97)]
    masks += [np.ones((23, 31), np.bool_), np.zeros((23, 31), np.bool_)]
    half = step // 2
    for mask in masks:
        inside = visit.page.evaluate(
            """async ({ rle, step, places }) => {
              const { outlineOf } = await import("/page/masks.js");
              const path = outlineOf(rle, step);
              const context = document.createElement("canvas").getContext("2d");
              return places.map(([x, y]) => context.isPointInPath(path, x, y, "evenodd"));
            }""",
            {
                "rle": rle_from_mask(mask),
                "step": step,
                "places": [
                    (x - half + step / 2, y - half + step / 2)
                    for y in range(half, 23, step)
                    for x in range(half, 31, step)
                ],
            },
        )
        sampled = mask[half::step, half::step]
        np.testing.assert_array_equal(np.reshape(inside, sampled.shape), sampled)


def test_downloads_are_a_picture_a_data_set_and_json(visit, tmp_path):
    draw(visit, SAMPLES[0])
    visit.regions(3)
    expected = [region.name for region in SAMPLES[0].regions]
    with (
        Image.open(visit.download("PNG", tmp_path)) as drawn,
        Image.open(SAMPLES[0].picture) as bare,
    ):
        assert (drawn.format, drawn.size) == ("PNG", (1024, 1024))
        change = np.abs(
            np.asarray(drawn.convert("RGB"), np.float32)
            - np.asarray(bare.convert("RGB").resize(drawn.size), np.float32)
        ).max(axis=2)
    rabbit = np.asarray(Image.fromarray(SAMPLES[0].regions[0].mask).resize((1024, 1024)))
    assert (change[rabbit] > 20).mean() > 0.9
    assert (change[:256, :256] > 20).mean() < 0.01  # where nothing was found
    check_coco(visit.download("COCO", tmp_path), expected)
    answer = json.loads(visit.download("JSON", tmp_path).read_text())
    assert answer["image"] == {"file_name": "1.png", "height": 256, "width": 256}
    assert [each["concepts"][0]["name"] for each in answer["regions"]] == expected
    assert [set(each["prompt"]) for each in answer["regions"]] == [{"points"}, {"box"}, {"sketch"}]
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "1.coco.json",
        "1.regions.json",
        "1.regions.png",
    ]


def check_coco(path: pathlib.Path, names: list[str]) -> None:
    coco_api = pytest.importorskip("pycocotools.coco")
    coco = coco_api.COCO(path)
    assert [coco.cats[number]["name"] for number in sorted(coco.cats)] == names
    for annotation, region in zip(coco.anns.values(), SAMPLES[0].regions, strict=True):
        mask = coco.annToMask(annotation).astype(np.bool_)
        np.testing.assert_array_equal(mask, mask_from_rle(annotation["segmentation"]))
        assert annotation["area"] == mask.sum()
        assert (mask & region.mask).sum() / (mask | region.mask).sum() > 0.6
        assert annotation["caption"] == region.caption


def test_a_picture_is_pasted(visits):
    visit = visits(permissions=["clipboard-read", "clipboard-write"]).go()
    visit.page.evaluate(
        """async bytes => {
          const blob = new Blob([new Uint8Array(bytes)], { type: "image/png" });
          await navigator.clipboard.write([new ClipboardItem({ "image/png": blob })]);
        }""",
        list(SAMPLES[1].picture.read_bytes()),
    )
    with visit.uploaded():
        visit.page.keyboard.press("Control+v")
    visit.click(SAMPLES[1].regions[0].points[0])
    assert visit.names(1) == [SAMPLES[1].regions[0].name]


def test_a_picture_is_dropped_and_other_files_are_refused(visits, tmp_path):
    visit = visits().go()
    (tmp_path / "notes.txt").write_text("no picture")
    (tmp_path / "broken.png").write_bytes(b"no picture either")

    def drop(path: pathlib.Path) -> None:
        data = {"items": [], "files": [str(path)], "dragOperationsMask": 1}
        for kind in ("dragEnter", "dragOver", "drop"):
            place = {"type": kind, "x": 400, "y": 400, "data": data}
            visit.protocol.send("Input.dispatchDragEvent", place)

    drop(tmp_path / "notes.txt")
    expect(visit.page.get_by_role("alert")).to_contain_text("not a picture")
    drop(tmp_path / "broken.png")
    expect(visit.page.get_by_role("alert")).to_contain_text("broken.png cannot be shown")
    with visit.uploaded():
        drop(SAMPLES[2].picture)
    expect(visit.page.get_by_role("alert")).to_have_count(0)
    visit.click(SAMPLES[2].regions[0].points[0])
    assert visit.names(1) == [SAMPLES[2].regions[0].name]


def test_the_picture_that_was_chosen_last_is_shown(visits):
    visit = visits().go()
    visit.page.evaluate(
        """() => {
          const { decode } = HTMLImageElement.prototype;
          const held = new Promise(resolve => { window.letGo = resolve; });
          HTMLImageElement.prototype.decode = function () {
            HTMLImageElement.prototype.decode = decode; // that of the first picture takes longer
            return (window.decoded = held.then(() => decode.call(this)));
          };
        }"""
    )
    visit.page.set_input_files("#file", SAMPLES[0].picture)
    visit.open(SAMPLES[1].picture)
    visit.page.evaluate("letGo(), decoded.then(() => new Promise(requestAnimationFrame))")
    expect(visit.page.locator("#frame")).to_have_attribute("aria-label", re.compile("2.png"))
    assert len([each for each in visit.requests if each.url.endswith("/v1/images")]) == 1


def test_the_camera_takes_a_picture(visits):
    visit = visits().go()
    visit.button("Camera").click()
    dialog = visit.page.get_by_role("dialog", name="Camera")
    expect(dialog).to_be_visible()
    expect(visit.page.locator("video")).to_have_js_property("readyState", 4)
    dialog.get_by_role("button", name="Cancel").click()
    expect(visit.page.locator("#frame")).to_be_hidden()
    visit.button("Camera").click()
    with visit.uploaded():
        dialog.get_by_role("button", name="Take picture").click()
    label = visit.page.locator("#frame").get_attribute("aria-label")
    assert label is not None and label.startswith("Picture camera.jpg, ")
    assert visit.page.evaluate("document.querySelector('video').srcObject") is None


def test_a_missing_camera_is_said(visits):
    visit = visits().go()
    visit.page.evaluate(
        """void (navigator.mediaDevices.getUserMedia = async () => {
          throw new DOMException("Requested device not found", "NotFoundError");
        })"""
    )
    visit.button("Camera").click()
    expect(visit.page.get_by_role("alert")).to_contain_text("There is no camera on this device.")
    visit.page.evaluate("Object.defineProperty(navigator, 'mediaDevices', { value: undefined })")
    visit.button("Camera").click()
    expect(visit.page.get_by_role("alert")).to_contain_text("https")


def test_the_keyboard_alone_is_enough(visits, tmp_path):
    visit = visits().go()
    keys = visit.page.keyboard
    keys.press("Tab")
    expect(visit.button("Open")).to_be_focused()
    with visit.page.expect_file_chooser() as chooser, visit.uploaded():
        keys.press("Enter")
        chooser.value.set_files(SAMPLES[0].picture)
    expect(visit.page.locator("#frame")).to_be_focused()
    expect(visit.page.locator("#keys")).to_be_visible()

    def walk(across: int, down: int) -> None:
        for key, times in (
            ("ArrowRight", across), ("ArrowLeft", -across), ("ArrowDown", down), ("ArrowUp", -down),
        ):  # fmt: skip
            for _ in range(times // 26):
                keys.press(f"Shift+{key}")
            for _ in range(max(0, times) % 26 // 3):
                keys.press(key)

    walk(120 - 128, 223 - 128)  # from the middle of the picture to the rabbit
    keys.press("Enter")
    assert visit.names(1) == ["rabbit"]
    keys.press("Shift+Enter")
    visit.regions(1)
    assert [label for _, _, label in visit.prompts()[-1]["points"]] == [1, 0]
    keys.press("Control+z")
    keys.press("b")
    walk(211 - 120, 96 - 223)
    keys.press("Enter")
    walk(239 - 211, 156 - 96)
    keys.press("Enter")
    assert visit.names(2) == ["rabbit", "fire extinguisher"]
    keys.press("s")
    walk(-60, 30)
    keys.press("Enter")
    walk(-20, 50)
    keys.press("Enter")
    assert visit.names(3)[2] == "monkey"
    keys.press("Delete")
    assert visit.names(2) == ["rabbit", "fire extinguisher"]
    for _ in range(3):  # past the remove button of the first region
        keys.press("Tab")
    expect(visit.button("2 fire extinguisher")).to_be_focused()
    for _ in range(4):
        keys.press("Tab")
    expect(visit.button("JSON")).to_be_focused()


def test_fingers_tap_draw_and_zoom(visits):
    visit = visits(viewport={"width": 390, "height": 844}, has_touch=True, is_mobile=True).go()
    visit.open(SAMPLES[0].picture)
    visit.page.touchscreen.tap(*visit.screen(RABBIT[0]))
    assert visit.names(1) == ["rabbit"]
    visit.tool("Box")
    visit.touch("Start", EXTINGUISHER[0])
    visit.touch("Move", EXTINGUISHER[1])
    visit.touch("End")
    assert visit.names(2) == ["rabbit", "fire extinguisher"]
    visit.tool("Sketch")
    visit.touch("Start", MONKEY[0])
    for place in MONKEY[1:]:
        visit.touch("Move", place)
    visit.touch("End")
    assert visit.names(3) == ["rabbit", "fire extinguisher", "monkey"]
    visit.touch("Start", (100, 120))
    visit.touch("Start", (100, 120), (140, 120))
    for spread in (10, 30, 60):
        visit.touch("Move", (100 - spread, 120), (140 + spread, 120))
    visit.touch("End")
    assert visit.page.evaluate("visualViewport.scale") > 1.3
    visit.regions(3)


def test_no_width_scrolls_sideways(visits):
    visit = visits().go()
    for opened in (False, True):
        if opened:
            visit.open(SAMPLES[0].picture)
            draw(visit, SAMPLES[0])
            visit.regions(3)
        for width in (320, 390, 545, 700, 897, 1000, 1280, 1920):
            visit.page.set_viewport_size({"width": width, "height": 800})
            root = "document.documentElement"
            assert visit.page.evaluate(f"{root}.scrollWidth - {root}.clientWidth") == 0, width
            if opened:
                shown = visit.page.locator("#frame").bounding_box()
                assert shown["width"] == pytest.approx(shown["height"], abs=1)
                assert shown["width"] > 250
                assert shown["x"] >= 0 and shown["x"] + shown["width"] <= width


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_the_page_is_dark_where_the_system_is(visits, scheme):
    visit = visits(color_scheme=scheme).go()
    style = "getComputedStyle(document.body)"
    ground, text = (
        visit.page.evaluate(f"Number({style}.{name}.match(/[0-9]+/)[0])")  # red
        for name in ("backgroundColor", "color")
    )
    assert (ground > 200 and text < 60) if scheme == "light" else (ground < 60 and text > 200)


def test_targets_are_large_enough_for_fingers(visits):
    visit = visits(viewport={"width": 320, "height": 640}, has_touch=True, is_mobile=True).go()
    visit.open(SAMPLES[0].picture)
    visit.page.touchscreen.tap(*visit.screen(RABBIT[0]))
    visit.regions(1)
    for target in visit.page.locator("button:visible, label:visible").all():
        box = target.bounding_box()
        assert box is not None and min(box["width"], box["height"]) >= 44, target


def test_everything_has_a_name_for_a_screen_reader(visit):
    draw(visit, SAMPLES[0])
    visit.regions(3)
    nodes = visit.protocol.send("Accessibility.getFullAXTree")["nodes"]
    seen = [(node["role"]["value"], node["name"]["value"]) for node in nodes if not node["ignored"]]
    controls = {"button", "radio", "textbox", "application", "main", "complementary", "region"}
    assert [role for role, name in seen if role in controls - {"main"} and not name] == []
    roles = [role for role, _ in seen]
    assert {"banner", "main", "complementary", "list", "status", "application"} <= set(roles)
    assert roles.count("listitem") == 3
    assert any(
        role == "button" and name.startswith("3 monkey ") and "brown monkey" in name
        for role, name in seen
    )


def test_a_full_queue_is_asked_again_after_the_time_it_names(visit):
    visit.refusals.add(429)
    answers = iter((0, 1))

    def refuse(route: Any) -> None:
        if next(answers, None) is None:
            route.continue_()
        else:
            problem = json.dumps({"status": 429, "detail": "the queue is full"})
            route.fulfill(status=429, headers={"Retry-After": "1"}, body=problem)

    visit.page.route("**/regions", refuse)
    visit.click(RABBIT[0])
    expect(visit.page.locator("#status")).to_have_text("The server is busy; trying again in 1 s.")
    assert visit.names(1) == ["rabbit"]
    assert len(visit.prompts()) == 3
    expect(visit.page.locator("#status")).to_have_text("")


def test_a_model_that_is_not_ready_is_waited_for(visits):
    visit = visits()
    visit.refusals.add(503)
    starting = iter((0,))

    def answer(route: Any) -> None:
        if next(starting, None) is None:
            route.continue_()
        else:
            route.fulfill(status=503, headers={"Retry-After": "1"}, body="{}")

    visit.page.route("**/v1/model", answer)
    visit.page.goto(visit.address)
    expect(visit.page.locator("#status")).to_contain_text("cannot answer yet; trying again in 1 s")
    expect(visit.page.locator("#model")).to_have_text("tap_demo, onnxruntime fp32")
    expect(visit.page.locator("#status")).to_have_text("")


def test_a_picture_that_the_server_has_dropped_is_sent_again(visit, server):
    visit.refusals.add(404)
    visit.click(EXTINGUISHER[0])
    visit.regions(1)
    (asked,) = [each.url for each in visit.requests if each.url.endswith("/regions")]
    path = asked.removeprefix(server.address).removesuffix("/regions")
    assert server.ask("DELETE", path).status == 204
    for place in (RABBIT[0], MONKEY[3]):
        visit.click(place)
    assert visit.names(3)[1:] == ["rabbit", "monkey"]
    uploads = [each for each in visit.requests if each.url.endswith("/v1/images")]
    assert len(uploads) == 2


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        ({"status": 422, "body": '{"detail": "points[0] is wrong"}'}, "points[0] is wrong"),
        ({"status": 500, "body": "<html>"}, "The server answered with status 500."),
        ({"status": 200, "body": ""}, "The answer of the server broke off; try again."),
    ],
)
def test_a_failure_is_one_line_and_leaves_no_region(visit, answer, message):
    visit.refusals.add(answer["status"])
    visit.page.route("**/regions", lambda route: route.fulfill(**answer))
    visit.click(RABBIT[0])
    expect(visit.page.get_by_role("alert")).to_have_text(message)
    visit.regions(0)
    visit.page.unroute_all()
    visit.click(RABBIT[0])
    assert visit.names(1) == ["rabbit"]
    expect(visit.page.get_by_role("alert")).to_have_count(0)


def test_an_answer_that_ends_at_the_deadline_is_kept_as_far_as_it_came(visit):
    message = "not done within 60 s; ask for less"

    def cut(route: Any) -> None:
        begun = route.fetch().text().split("\n\n")[:2]  # the regions, and a word of the caption
        error = "event: error\ndata: " + json.dumps({"status": 504, "detail": message})
        route.fulfill(status=200, body="\n\n".join([*begun, error, ""]))

    visit.page.route("**/regions", cut)
    visit.click(RABBIT[0])
    expect(visit.page.get_by_role("alert")).to_have_text(message)
    (region,) = visit.regions(1)
    assert region["name"] == "rabbit"
    assert region["caption"].endswith("…")


def test_a_picture_above_the_limits_is_shrunk_if_the_user_agrees(visits, strict_server, tmp_path):
    Image.open(SAMPLES[0].picture).convert("RGB").resize((1200, 900)).save(tmp_path / "large.png")
    visit = visits(strict_server)
    visit.page.goto(visit.address)
    enter(visit, TOKEN)
    visit.page.set_input_files("#file", tmp_path / "large.png")
    dialog = visit.page.get_by_role("dialog", name="This picture is too large for the server")
    expect(dialog).to_contain_text("large.png has 1.1 megapixels; the server takes 0.5.")
    dialog.get_by_role("button", name="Cancel").click()
    expect(visit.page.locator("#frame")).to_be_hidden()
    visit.page.set_input_files("#file", tmp_path / "large.png")
    expect(dialog).to_be_visible()
    with visit.uploaded():
        visit.page.set_input_files("#file", SAMPLES[0].picture)  # the user has changed their mind
    expect(dialog).to_be_hidden()
    visit.page.set_input_files("#file", tmp_path / "large.png")
    with visit.uploaded():
        dialog.get_by_role("button", name="Shrink and send").click()
    size = visit.page.locator("#photo").evaluate(
        "image => [image.naturalWidth, image.naturalHeight]"
    )
    assert size[0] * size[1] <= 500_000
    assert size[0] / size[1] == pytest.approx(4 / 3, rel=0.01)
    visit.click((RABBIT[0][0] / 256 * size[0], RABBIT[0][1] / 256 * size[1]))
    assert visit.names(1) == ["rabbit"]


def enter(visit: Visit, *tokens: str) -> None:
    """Enter tokens, of which the last is right."""
    visit.refusals.add(401)
    dialog = visit.page.get_by_role("dialog", name="This server asks for a token")
    for attempt, token in enumerate(tokens):
        expect(dialog.get_by_role("alert")).to_have_count(min(attempt, 1))
        dialog.get_by_label("Token").fill(token)
        visit.page.keyboard.press("Enter")
    expect(visit.page.locator("#model")).to_contain_text("tap_demo")


def test_coordinates_are_those_of_the_upright_picture(visits, tmp_path):
    with Image.open(SAMPLES[0].picture) as picture:
        turned = picture.convert("RGB").crop((60, 0, 256, 256)).transpose(Image.Transpose.ROTATE_90)
    exif = Image.Exif()
    exif[0x0112] = 6  # shown after a quarter turn clockwise
    turned.save(tmp_path / "turned.jpg", quality=97, exif=exif)
    visit = visits().go()
    visit.open(tmp_path / "turned.jpg")
    visit.click((RABBIT[0][0] - 60, RABBIT[0][1]))
    assert visit.names(1) == ["rabbit"]


def test_a_server_with_a_token_is_asked_with_it(visits, strict_server):
    visit = visits(strict_server)
    visit.page.goto(visit.address)
    visit.button("Cancel").click()
    expect(visit.page.get_by_role("alert")).to_contain_text("a token; try again to enter one.")
    visit.page.set_input_files("#file", SAMPLES[0].picture)
    with visit.uploaded():
        enter(visit, "a-wrong-token-of-letters", TOKEN)
    visit.click(RABBIT[0])
    assert visit.names(1) == ["rabbit"]
    assert visit.page.evaluate("localStorage.length + sessionStorage.length") == 0
    assert visit.context.cookies() == []

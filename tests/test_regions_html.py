"""What a notebook shows for regions: a picture within bounds, and a table; never an error."""

from __future__ import annotations

import base64
import dataclasses
import html.parser
import io
import os
import pathlib

import numpy as np
import pytest
from PIL import Image

from tap_deploy.prompts import Prompts
from tap_deploy.regions import Regions
from tap_deploy.visualize import notebook
from tap_deploy.visualize.colors import color_of
from tests.made_regions import HEIGHT, WIDTH, empty, made_up, with_masks, with_rles


class Cell(html.parser.HTMLParser):
    """The parts of a cell's output: pictures, rows of the table, all text."""

    def __init__(self, regions: Regions) -> None:
        super().__init__()
        self.source = regions._repr_html_()
        self.source.encode()  # or the notebook could not be saved
        self.tags: list[str] = []
        self.pictures: list[Image.Image] = []
        self.rows: list[list[str]] = []
        self.text = ""
        self.feed(self.source)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        if tag == "img":
            kind, data = str(dict(attrs)["src"]).split(",", 1)
            assert kind == "data:image/jpeg;base64"
            self.pictures.append(Image.open(io.BytesIO(base64.b64decode(data))))
        elif tag == "tr":
            self.rows.append([])
        elif tag in ("td", "th"):
            self.rows[-1].append("")

    def handle_data(self, data: str) -> None:
        self.text += data
        if self.rows and self.rows[-1]:
            self.rows[-1][-1] += data


def on_file(regions: Regions, path: str | os.PathLike[str]) -> Regions:
    return dataclasses.replace(regions, image_path=os.fspath(path))


def written(path: pathlib.Path, width: int = WIDTH, height: int = HEIGHT) -> pathlib.Path:
    Image.new("RGB", (width, height), (10, 120, 30)).save(path)
    return path


def is_near(picture: Image.Image, place: tuple[float, float], color: tuple[int, ...]) -> bool:
    found = np.asarray(picture)[round(place[1]), round(place[0])].astype(int)
    return bool((np.abs(found - color) < 25).all())


@pytest.mark.parametrize("change", [lambda regions: regions, with_rles])
def test_a_cell_shows_the_picture_and_a_table(tmp_path, change):
    cell = Cell(on_file(change(made_up()), written(tmp_path / "a.png")))
    [picture] = cell.pictures
    scale = 16  # the largest, as the picture is tiny
    assert picture.size == (WIDTH * scale, HEIGHT * scale)
    assert is_near(picture, (25 * scale, 15 * scale), (10, 120, 30))  # the picture
    tinted = np.array([10, 120, 30]) * 0.58 + np.array(color_of(0)) * 0.42
    assert is_near(picture, (13.5 * scale, 8.5 * scale), tuple(tinted))  # the mask on it
    assert cell.rows == [
        ["region", "name", "probability", "IoU", "caption"],
        ["■ 0", "Bär", "0.75", "0.90", "a brown bear"],
        ["■ 1", "cup", "0.50", "0.25", "a cup"],
    ]
    assert f"a.png: {WIDTH} x {HEIGHT} pixels" in cell.text
    assert "masks only" not in cell.text


def test_a_turned_photograph_is_upright(tmp_path):
    photo = Image.new("RGB", (HEIGHT, WIDTH), "red")
    photo.paste("blue", (0, 0, HEIGHT, 5))
    exif = Image.Exif()
    exif[0x0112] = 6  # the top is at the right
    photo.save(tmp_path / "a.png", exif=exif)
    [picture] = Cell(on_file(made_up(), tmp_path / "a.png")).pictures
    assert picture.size == (WIDTH * 16, HEIGHT * 16)
    assert is_near(picture, (27 * 16, 15 * 16), (0, 0, 255))


def test_a_grey_picture_is_converted_as_on_reading(tmp_path):
    Image.new("L", (WIDTH, HEIGHT), 90).save(tmp_path / "a.png")
    [picture] = Cell(on_file(made_up(), tmp_path / "a.png")).pictures
    assert is_near(picture, (25 * 16, 15 * 16), (90, 90, 90))


def no_file(folder: pathlib.Path) -> tuple[str | None, str]:
    return None, "the picture was not a file"


def gone(folder: pathlib.Path) -> tuple[str | None, str]:
    return str(folder / "gone.png"), "the file is not there"


def impossible(folder: pathlib.Path) -> tuple[str | None, str]:
    return "a\0b.png", "the file is not there"


def pipe(folder: pathlib.Path) -> tuple[str | None, str]:
    os.mkfifo(folder / "pipe.png")  # opening it would wait for a writer
    return str(folder / "pipe.png"), "the file is not there"


def other_size(folder: pathlib.Path) -> tuple[str | None, str]:
    return str(written(folder / "a.png", 31, 7)), "the file has 31 x 7 pixels now"


def broken(folder: pathlib.Path) -> tuple[str | None, str]:
    path = written(folder / "a.png")
    path.write_bytes(path.read_bytes()[:60])
    return str(path), "a.png' cannot be decoded"


@pytest.mark.parametrize("place", [no_file, gone, impossible, pipe, other_size, broken])
def test_without_the_picture_masks_are_on_squares(tmp_path, place):
    path, note = place(tmp_path)
    cell = Cell(dataclasses.replace(made_up(), image_path=path))
    [picture] = cell.pictures
    assert picture.size == (WIDTH * 16, HEIGHT * 16)
    greys = np.asarray(picture)[-100:-20, -100:-20].reshape(-1, 3).astype(int)
    assert np.ptp(greys, axis=1).max() < 5
    assert {round(value / 12) * 12 for value in greys[:, 0]} >= {204, 228}
    assert note in cell.text
    assert len(cell.rows) == 3


def test_a_large_picture_is_shrunk_with_its_masks(tmp_path):
    masks = np.zeros((1, 3000, 4000), np.bool_)
    masks[0, 1000:2000, 500:1500] = True
    noise = np.random.default_rng(0).integers(0, 255, (3000, 4000, 3), np.uint8)
    Image.fromarray(noise).save(tmp_path / "a.jpg", quality=60)
    prompts = Prompts.from_boxes([[500, 1000, 1500, 2000]])
    regions = dataclasses.replace(with_masks(masks), prompts=prompts)
    regions = on_file(regions, tmp_path / "a.jpg")
    cell = Cell(regions)
    [picture] = cell.pictures
    assert picture.size == (1024, 768)
    assert len(cell.source) < 2_000_000  # of noise, which no photograph is worse than
    flat = np.asarray(
        Cell(dataclasses.replace(regions, image_path=None)).pictures[0].convert("RGB")
    ).astype(int)
    colored = np.abs(flat[..., 0] - flat[..., 2]) > 40
    xs = np.flatnonzero(colored[300:480].any(axis=0))  # rows through the mask, without labels
    assert xs.min() == pytest.approx(500 * 0.256, abs=4)
    assert xs.max() == pytest.approx(1500 * 0.256, abs=4)


def test_more_regions_than_fit_are_counted(monkeypatch):
    monkeypatch.setattr(notebook, "MAX_REGIONS", 2)
    masks = np.zeros((3, HEIGHT, WIDTH), np.bool_)
    masks[:, 2:6, 3:9] = True
    for regions in (with_masks(masks), with_rles(with_masks(masks))):
        cell = Cell(regions)
        assert "the first 2 of 3 regions" in cell.text
        assert len(cell.rows) == 3
        assert len(cell.pictures) == 1


def test_texts_of_a_model_are_no_html():
    name, caption = "<script>alert(1)</script>", 'a "b" & <img src=x onerror=alert(1)>'
    regions = made_up(
        concepts=[[(name, 0.5)], [("cup", 0.5)]],
        captions=[caption, "half a pair \ud83d"],
        image_path="<b>.png",
    )
    cell = Cell(regions)
    assert cell.rows[1][1] == name
    assert cell.rows[1][4] == caption
    assert cell.rows[2][4] == r"half a pair \ud83d"
    assert not {"script", "b"} & set(cell.tags)
    assert len(cell.pictures) == 1


def test_columns_that_nobody_computed_are_left_out():
    regions = made_up(concepts=None, captions=None, caption_ids=None)
    assert Cell(regions).rows == [["region", "IoU"], ["■ 0", "0.90"], ["■ 1", "0.25"]]


def test_regions_without_masks_show_their_prompts():
    cell = Cell(made_up(masks=None, low_res_masks=None))
    assert len(cell.pictures) == 1
    assert len(cell.rows) == 3


def test_no_regions_are_a_picture_without_a_table(tmp_path):
    cell = Cell(on_file(empty(), written(tmp_path / "a.png")))
    assert len(cell.pictures) == 1
    assert not cell.rows


def test_a_failure_to_draw_leaves_the_table(monkeypatch):
    def fail(*arguments: object) -> None:
        raise MemoryError("no room <here>")

    monkeypatch.setattr(notebook, "draw_regions", fail)
    cell = Cell(made_up())
    assert "not drawn: no room <here>" in cell.text
    assert not cell.pictures
    assert len(cell.rows) == 3

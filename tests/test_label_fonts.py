"""Labels in any script: fonts, order of letters, and line breaks."""

from __future__ import annotations

import logging
import os
import pathlib
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import pytest
from fontTools.fontBuilder import FontBuilder
from fontTools.pens.ttGlyphPen import TTGlyphPen
from fontTools.ttLib import TTFont
from fontTools.ttLib.tables.TupleVariation import TupleVariation
from PIL import Image, ImageDraw, ImageFont, features

from tap_deploy.errors import InputError
from tap_deploy.machine.host import CommandResult
from tap_deploy.prompts import Prompts
from tap_deploy.visualize import fonts, typeface
from tap_deploy.visualize.colors import color_of
from tap_deploy.visualize.fonts import (
    DEFAULT_FONT,
    FontFile,
    font_from_path,
    has_glyph,
    system_fonts,
)
from tap_deploy.visualize.labels import Label, LabelStyle, LabelTexts
from tap_deploy.visualize.typeface import Typeface
from tap_deploy.visualize.writing import cleaned, clusters, pieces
from tests.test_visualize import regions_for

needs_raqm = pytest.mark.skipif(
    not features.check_feature("raqm"), reason="Raqm needs apt-get install libfribidi0"
)
PIXELS = 20
EM = 1000
TALL, SHORT = 700, 300  # of the bars that letters of made fonts are


def made_font(
    path: pathlib.Path,
    letters: str,
    *,
    heights: Sequence[int] = (TALL,),
    box: int = 900,
    extra: str = "",
) -> FontFile:
    """Write a font whose letters are bars, an em wide; ``box`` is the height of a missing one."""
    names = [f"letter{ord(letter):x}" for letter in letters]
    glyphs = {".notdef": bar(box, width=400), **dict.fromkeys(names, bar(heights[0]))}
    for name, height in zip(names, heights, strict=False):
        glyphs[name] = bar(height)
    builder = builder_for(glyphs, dict(zip(map(ord, letters), names, strict=True)))
    if extra:
        builder.addOpenTypeFeatures(extra)
    builder.save(path)
    return FontFile(str(path))


def bar(height: int, width: int = EM) -> Any:
    pen = TTGlyphPen(None)
    if height:
        pen.moveTo((0, 0))
        for point in ((0, height), (width, height), (width, 0)):
            pen.lineTo(point)
        pen.closePath()
    return pen.glyph()


def builder_for(glyphs: dict[str, Any], characters: dict[int, str]) -> FontBuilder:
    builder = FontBuilder(EM, isTTF=True)
    builder.setupGlyphOrder(list(glyphs))
    builder.setupCharacterMap(characters)
    builder.setupGlyf(glyphs)
    builder.setupHorizontalMetrics(dict.fromkeys(glyphs, (EM, 0)))
    builder.setupHorizontalHeader(ascent=800, descent=-200)
    builder.setupNameTable({"familyName": "Made", "styleName": "Regular"})
    builder.setupOS2()
    builder.setupPost()
    return builder


@pytest.fixture(autouse=True)
def _fresh() -> Iterator[None]:
    """Clear the caches of fonts and warnings before and after each test."""
    remembered = (
        fonts.open_font,
        fonts.has_glyph,
        fonts.system_fonts,
        typeface._file_with,
        typeface._warn_of_glyphs,
        typeface._warn_of_shapes,
    )
    for function in remembered:
        function.cache_clear()
    yield
    for function in remembered:
        function.cache_clear()


@pytest.fixture
def install(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Let the system have these fonts, and no other."""

    def install(*files: FontFile) -> None:
        monkeypatch.setattr(typeface, "system_fonts", lambda: files)

    return install


def drawn(text: str, face: Typeface, *, leftward: bool = False) -> np.ndarray:
    """Return a line as it is drawn, uint8 [40, 200]; what stands on the baseline ends in row 27."""
    picture = Image.new("L", (200, 40))
    face.draw(ImageDraw.Draw(picture), (0, 20), text, 255, leftward=leftward)
    return np.asarray(picture)


def bars(pixels: np.ndarray, count: int) -> list[int]:
    """Return the height of each of so many letters of a made font, pixels, from left to right."""
    return [int((pixels[:, PIXELS * i + PIXELS // 2] > 127).sum()) for i in range(count)]


def heights(*units: int) -> list[int]:
    return [unit * PIXELS // EM for unit in units]


def test_plain_english_looks_as_pillow_draws_it_and_no_font_is_looked_up(monkeypatch):
    monkeypatch.setattr(typeface, "system_fonts", lambda: pytest.fail("looked up"))
    font = ImageFont.load_default(PIXELS)
    expected = Image.new("L", (200, 40))
    ImageDraw.Draw(expected).text((0, 20), "a cup, 0.97…", 255, font, anchor="lm")
    np.testing.assert_array_equal(drawn("a cup, 0.97…", Typeface(PIXELS)), np.asarray(expected))
    assert Typeface(PIXELS).length("a cup") == font.getlength("a cup")


def test_what_pillows_font_lacks_comes_from_the_first_font_that_has_it(tmp_path, install):
    lacking = made_font(tmp_path / "a.ttf", "Ж")
    having = made_font(tmp_path / "b.ttf", "杯子", heights=(TALL, SHORT))
    install(lacking, having, made_font(tmp_path / "c.ttf", "杯子", heights=(SHORT, TALL)))
    face = Typeface(PIXELS)
    assert bars(drawn("杯子", face), 2) == heights(TALL, SHORT)
    alone = ImageFont.load_default(PIXELS)
    mixed = drawn("cup 杯", face)
    start = round(alone.getlength("cup "))
    np.testing.assert_array_equal(mixed[:, :start], drawn("cup ", face)[:, :start])
    assert face.length("cup 杯") == alone.getlength("cup ") + PIXELS


def test_letters_of_a_text_look_alike_where_one_font_has_them(tmp_path, install):
    install(made_font(tmp_path / "a.ttf", "é"), made_font(tmp_path / "b.ttf", "café"))
    assert bars(drawn("café", Typeface(PIXELS)), 4) == heights(TALL, TALL, TALL, TALL)
    # Signs do not decide: these letters stay as they are.
    install(made_font(tmp_path / "c.ttf", "☕cup", heights=(TALL,)))
    typeface._file_with.cache_clear()
    assert (
        Typeface(PIXELS).length("cup☕") == ImageFont.load_default(PIXELS).getlength("cup") + PIXELS
    )


def test_fonts_that_cannot_be_read_are_passed_over(tmp_path, install, caplog):
    (tmp_path / "text.ttf").write_text("no font", "utf-8")
    good = made_font(tmp_path / "good.ttf", "杯")
    whole = pathlib.Path(good.path).read_bytes()
    (tmp_path / "cut.ttf").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "later").mkdir()
    names = ("text.ttf", "cut.ttf", "later", "none.ttf")
    install(*(FontFile(str(tmp_path / name)) for name in names), good)
    assert bars(drawn("杯", Typeface(PIXELS)), 1) == heights(TALL)
    assert not caplog.records


@needs_raqm
def test_a_font_whose_damage_shows_late_is_passed_over(tmp_path, install):
    # Each letter can be drawn; together they make a glyph that is cut off.
    damaged = made_font(
        tmp_path / "damaged.ttf",
        "杯子大",
        extra="feature liga { sub letter676f by letter5927; } liga;",
    )
    data = bytearray(pathlib.Path(damaged.path).read_bytes())
    with TTFont(damaged.path) as font:
        start = font.reader.tables["glyf"].offset + font["loca"][font.getGlyphID("letter5927")]
    data[start : start + 2] = (30000).to_bytes(2, "big")  # outlines in this glyph
    pathlib.Path(damaged.path).write_bytes(data)
    assert has_glyph(damaged, "杯")
    assert not has_glyph(damaged, "大")
    install(damaged, made_font(tmp_path / "good.ttf", "杯子", heights=(SHORT, SHORT)))
    style = LabelStyle.for_picture(400, 300)
    label = Label.fitted(LabelTexts(title="杯子", detail="", caption=""), style)
    pixels = label.plate(color_of(0), style).convert("L")
    column = np.asarray(pixels)[:, style.stripe + style.padding + 2]
    assert np.count_nonzero(column > 200) == 3  # a short bar in the good one


@pytest.mark.parametrize("box", [0, 900])
def test_a_glyph_is_told_from_the_box_of_a_missing_one(tmp_path, box):
    file = made_font(tmp_path / "a.ttf", "杯大", heights=(TALL, 0), box=box)
    assert has_glyph(file, "杯")
    assert not has_glyph(file, "大")  # there is a glyph, and nothing in it
    assert not has_glyph(file, "子")
    assert has_glyph(DEFAULT_FONT, "a")
    assert not has_glyph(DEFAULT_FONT, "é")


def test_a_font_of_the_caller_comes_first(tmp_path, install):
    install(made_font(tmp_path / "system.ttf", "杯"))
    file = font_from_path(made_font(tmp_path / "own.ttf", "cup", heights=(SHORT,) * 3).path)
    face = Typeface(PIXELS, file)
    assert bars(drawn("cup", face), 3) == heights(SHORT, SHORT, SHORT)
    assert bars(drawn("杯", face), 1) == heights(TALL)
    assert face.length("x") == ImageFont.load_default(PIXELS).getlength("x")


def test_a_font_of_the_caller_that_is_none_is_refused(tmp_path, monkeypatch):
    (tmp_path / "text.ttf").write_text("no font", "utf-8")
    # A font of that name where Pillow would look for one.
    monkeypatch.setenv("XDG_DATA_DIRS", str(tmp_path / "share"))
    (tmp_path / "share" / "fonts").mkdir(parents=True)
    made_font(tmp_path / "share" / "fonts" / "text.ttf", "a")
    reasons = {"text.ttf": "unknown file format", "none.ttf": r"\[Errno 2\] No such file.*"}
    for name, reason in reasons.items():
        with pytest.raises(
            InputError, match=f"{name} cannot be read: {reason}; expected a"
        ) as error:
            LabelStyle.for_picture(64, 64, font_from_path(tmp_path / name))
        assert "\n" not in str(error.value)


def test_overlays_are_labelled_in_the_font_of_the_caller(tmp_path):
    own = made_font(tmp_path / "own.ttf", "region 0", heights=(SHORT,) * 8).path
    regions = regions_for(Prompts.from_boxes([[300, 200, 390, 290]]), 300, 400)
    grey = np.full((300, 400, 3), 128, np.uint8)
    usual, special = regions.visualize(grey), regions.visualize(grey, font=own)
    assert (np.asarray(usual) != np.asarray(special)).any()
    with pytest.raises(InputError, match=r"none\.ttf cannot be read"):
        regions.visualize(grey, font=tmp_path / "none.ttf")


def test_a_variable_font_is_drawn_in_its_regular_weight(tmp_path, install):
    builder = builder_for({".notdef": bar(0), "letter": bar(100)}, {ord("杯"): "letter"})
    instances = [(100, "Thin"), (400, "Regular"), (900, "Black")]
    builder.setupFvar(
        [("wght", 100, 100, 900, "Weight")],
        [{"location": {"wght": weight}, "stylename": name} for weight, name in instances],
    )
    taller = [(0, 0), (0, 800), (0, 800), (0, 0), *[(0, 0)] * 4]  # four points, four of metrics
    builder.setupGvar({"letter": [TupleVariation({"wght": (0, 1, 1)}, taller)]})
    builder.save(tmp_path / "variable.ttf")
    for index, height in ((0, 400), (3 << 16, 900)):  # the second as fontconfig names an instance
        install(FontFile(str(tmp_path / "variable.ttf"), index))
        typeface._file_with.cache_clear()
        assert bars(drawn("杯", Typeface(PIXELS)), 1) == heights(height)


@pytest.mark.parametrize(
    ("text", "kind", "package"),
    [
        ("杯子", "Chinese characters", "fonts-noto-cjk"),
        ("，", "Chinese characters", "fonts-noto-cjk"),  # noqa: RUF001
        ("カップ", "Japanese characters", "fonts-noto-cjk"),
        ("컵", "Korean characters", "fonts-noto-cjk"),
        ("чашка", "Cyrillic characters", "fonts-noto-core"),
        ("ถ้วย", "Thai characters", "fonts-noto-core"),
        ("café", "Latin characters", "fonts-noto-core"),
        ("–", "punctuation marks", "fonts-noto-core"),  # noqa: RUF001
        ("☕", "symbols", "fonts-symbola"),
    ],
)
def test_a_warning_names_the_package_that_is_missing_once(install, caplog, text, kind, package):
    install()
    for _ in range(2):
        assert drawn(f"a {text} b", Typeface(PIXELS)).any()
    messages = [r.getMessage() for r in caplog.records if "FriBidi" not in r.getMessage()]
    assert messages == [
        f"labels cannot show {kind}: no installed font has them; apt-get install {package}, "
        "or pass a font file that has them"
    ]
    assert {record.levelno for record in caplog.records} == {logging.WARNING}


@pytest.mark.parametrize(
    "text",
    [
        "a\x00b\x1b[0m",
        "\ufeffcup\u200b",
        "\ud800",
        "\u202eab",
        "e\u0301",
        "x\ufe0f",
        "a\u200db",
        "\u0301",
    ],
)
def test_characters_for_programs_are_not_drawn(install, caplog, text):
    install()
    style = LabelStyle.for_picture(400, 300)
    label = Label.fitted(LabelTexts(title=text, detail="", caption=text), style)
    label.plate(color_of(0), style)
    missing = [r for r in caplog.records if "cannot show" in r.getMessage()]
    assert len(missing) == (text in ("e\u0301", "\u0301"))  # these are marks that one sees
    assert cleaned("a\x00\u202e\ufeff\ud800b\u2028 \x07 c\n") == "ab c"


def test_marks_stay_with_their_letter_and_what_no_font_has_of_them_is_left_out(tmp_path, install):
    assert clusters("กี่ a👩\u200d👩b") == ["กี่ ", "a", "👩\u200d👩", "b"]
    install(made_font(tmp_path / "a.ttf", "ก"))
    face = Typeface(PIXELS)
    np.testing.assert_array_equal(drawn("กี", face), drawn("ก", face))


@needs_raqm
def test_leftward_letters_stand_in_reading_order_beside_letters_of_another_font(tmp_path, install):
    install(made_font(tmp_path / "hebrew.ttf", "אב ", heights=(TALL, SHORT, 0)))
    face = Typeface(PIXELS)
    assert bars(drawn("אב", face, leftward=True), 2) == heights(SHORT, TALL)
    assert bars(drawn("אב", face), 2) == heights(SHORT, TALL)
    for text, leftward, at_the_left in (
        ("cup אב", False, False),
        ("אב cup", False, True),
        ("cup אב", True, True),
        ("אב cup", True, False),
    ):
        start = 0 if at_the_left else round(face.length(text)) - 2 * PIXELS
        pixels = drawn(text, face, leftward=leftward)
        assert bars(pixels[:, start:], 2) == heights(SHORT, TALL)


@needs_raqm
def test_a_line_in_one_font_is_read_as_its_paragraph_is(tmp_path, install):
    letters = (TALL, SHORT, 500, 200)
    install(made_font(tmp_path / "a.ttf", "אבγδ", heights=letters))
    face = Typeface(PIXELS)
    hebrew, greek = heights(SHORT, TALL), heights(500, 200)
    for text in ("אבγδ", "γδאב"):
        starts_in_hebrew = text.startswith("א")
        assert bars(drawn(text, face), 4) == (
            hebrew + greek if starts_in_hebrew else greek + hebrew
        )
        leftward = bars(drawn(text, face, leftward=True), 4)
        assert leftward == (greek + hebrew if starts_in_hebrew else hebrew + greek)


@needs_raqm
def test_lines_of_a_leftward_caption_end_at_the_right(tmp_path, install):
    install(made_font(tmp_path / "a.ttf", "אב"))
    style = LabelStyle.for_picture(400, 300)
    texts = LabelTexts(title="a long title of it", detail="", caption="אב")
    label = Label.fitted(texts, style)
    pixels = np.asarray(label.plate(color_of(0), style).convert("L"))
    first, second = np.split(pixels, 2)
    assert label.lines == ("אב",)
    assert first[:, 10:40].max() > 200
    assert second[:, 10:40].max() < 100
    assert second[:, -30:].max() > 200


def test_without_raqm_a_warning_says_so(tmp_path, install, caplog, monkeypatch):
    install(made_font(tmp_path / "a.ttf", "אב"))
    monkeypatch.setattr(features, "check_feature", lambda name: False)
    assert drawn("אב\u200d", Typeface(PIXELS), leftward=True).any()
    assert [r.getMessage().split("; ")[-1] for r in caplog.records] == [
        "apt-get install libfribidi0"
    ]


def test_tall_letters_make_room_for_themselves_up_to_a_bound(tmp_path, install):
    install(made_font(tmp_path / "a.ttf", "杯子大", heights=(TALL, 1100, 9000)))
    style = LabelStyle.for_picture(400, 300)
    height = {
        title: Label.fitted(LabelTexts(title=title, detail="", caption=""), style).height
        for title in ("cup", "杯", "子", "大")
    }
    assert height["cup"] == height["杯"] < height["子"] < height["大"]
    assert height["大"] < 2 * height["cup"]
    label = Label.fitted(LabelTexts(title="子", detail="", caption="子"), style)
    lines = label.plate(color_of(0), style).convert("L")
    rows = np.asarray(lines)[:, style.stripe + style.padding + 2] > 200
    assert np.diff(rows.astype(int)).tolist().count(1) == 2  # two bars that do not touch
    assert not rows[0]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("a white cup", ["a", " white", " cup"]),
        ("杯子。", ["杯", "子。"]),
        ("「杯」（大）", ["「杯」", "（大）"]),  # noqa: RUF001
        ("的Sony杯", ["的", "Sony", "杯"]),
        ("ちょっとコーヒー", ["ちょっ", "と", "コー", "ヒー"]),
        ("빨간 컵", ["빨간", " 컵"]),
        ("เขาดี", ["เขา", "ดี"]),
        ("", []),
    ],
)
def test_lines_may_end_between_characters_where_no_spaces_are_written(text, expected):
    assert pieces(text) == expected


def test_a_chinese_caption_fills_its_lines(tmp_path, install):
    caption = "一只猫。" * 12
    install(made_font(tmp_path / "a.ttf", "一只猫。…"))
    style = LabelStyle.for_picture(400, 300)
    label = Label.fitted(LabelTexts(title="猫", detail="", caption=caption), style)
    assert len(label.lines) == 3
    assert caption.startswith("".join(label.lines).removesuffix("…"))
    assert not any(line.startswith("。") for line in label.lines)
    assert label.lines[-1].endswith("…")
    room = style.max_width - 2 * style.padding - style.stripe
    assert all(room - 2 * PIXELS < style.font.length(line) <= room for line in label.lines)


def test_fontconfig_says_which_fonts_there_are(monkeypatch):
    output = "/a/Noto|Sans.ttc|2\n/b/variable.ttf|131072\n/c/LastResort.otf|0\nnonsense\n"
    commands = []

    def run(command: Sequence[str]) -> CommandResult:
        commands.append(list(command))
        return CommandResult(output=output)

    monkeypatch.setattr(fonts, "run_command", run)
    expected = (FontFile("/a/Noto|Sans.ttc", 2), FontFile("/b/variable.ttf", 131072))
    assert system_fonts() == system_fonts() == expected
    assert [command[0] for command in commands] == ["fc-match"]


def test_without_fontconfig_folders_are_searched(tmp_path, monkeypatch):
    monkeypatch.setattr(fonts, "run_command", lambda command: CommandResult(problem="not found"))
    monkeypatch.setattr(fonts, "_FOLDERS", (str(tmp_path / "none"), "~/.fonts"))
    monkeypatch.setenv("HOME", str(tmp_path))
    folder = tmp_path / ".fonts" / "truetype"
    folder.mkdir(parents=True)
    for name in ("A-Bold.ttf", "B.TTC", "Sans.otf", "readme.txt"):
        (folder / name).touch()
    found = [os.path.relpath(file.path, folder) for file in system_fonts()]
    assert found == ["Sans.otf", "B.TTC", "A-Bold.ttf"]


WRITINGS = {
    "Chinese": "一只棕色的兔子坐在草地上，旁边有一个红色的灭火器。",  # noqa: RUF001
    "Japanese": "草の上に座っているウサギ",
    "Korean": "풀밭에 앉아 있는 갈색 토끼",
    "Cyrillic": "коричневый кролик сидит на траве",
    "Greek": "ένα καφέ κουνέλι κάθεται στο γρασίδι",
    "Arabic": "أرنب بني يجلس على العشب ومعه كاميرا Sony 35",
    "Hebrew": "ארנב חום יושב על הדשא",
    "Thai": "กระต่ายสีน้ำตาลนั่งอยู่บนหญ้าที่นี่",
    "Devanagari": "घास पर बैठा एक भूरा खरगोश",
}


def without_fonts(reason):
    """Skip a test for lack of a font; fail where ``.ci/run`` has installed what it needs."""
    if os.environ.get("TAP_REQUIRE_FONTS") == "1":
        pytest.fail(reason)
    pytest.skip(f"{reason}; .ci/run names packages that have")


@pytest.mark.parametrize("writing", WRITINGS)
def test_fonts_of_this_machine_write(writing, caplog):
    text = WRITINGS[writing]
    letter = text[0]
    if not any(has_glyph(file, letter) for file in system_fonts()):
        without_fonts(f"no font has {writing} letters")
    style = LabelStyle.for_picture(1024, 1024)
    label = Label.fitted(LabelTexts(title=text.split()[0], detail="", caption=text), style)
    assert label.plate(color_of(0), style).size == (label.width, label.height)
    said = "".join(label.lines) if " " not in text else " ".join(label.lines)
    assert said == cleaned(text)
    assert not caplog.records


@needs_raqm
def test_arabic_letters_join():
    if not any(has_glyph(file, "ب") for file in system_fonts()):
        without_fonts("no font has Arabic letters")
    face = Typeface(PIXELS)
    assert face.length("ببب") < 2.5 * face.length("ب")

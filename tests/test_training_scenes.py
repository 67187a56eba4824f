"""Scenes: the labels match the pictures."""

from __future__ import annotations

import importlib.util
import itertools
import pickle
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner
from needs import needs_font, needs_photographs
from PIL import Image

from tap_deploy.errors import InputError, MissingDependencyError
from tap_deploy.training.scenes import backgrounds, photographs
from tap_deploy.training.scenes.backgrounds import SPLITS, TEXTURES, Backgrounds
from tap_deploy.training.scenes.captions import PLACES, CaptionParts
from tap_deploy.training.scenes.colors import COLOR_WORDS, color_shares
from tap_deploy.training.scenes.contact_sheet import contact_sheet, main
from tap_deploy.training.scenes.emoji import FONT_VARIABLE, emoji_font_path, load_glyphs
from tap_deploy.training.scenes.emoji_names import CHARACTERS, OBJECT_NAMES
from tap_deploy.training.scenes.photographs import PHOTOGRAPHS, load_photographs
from tap_deploy.training.scenes.scenes import Scene, SceneGenerator, SceneObject

SEEDS = range(60)


@pytest.fixture(scope="module")
def generators() -> dict[str, SceneGenerator]:
    return {split: SceneGenerator(split) for split in SPLITS}


@pytest.fixture(scope="module")
def scenes(generators: dict[str, SceneGenerator]) -> list[Scene]:
    return [generators[split].scene(seed) for split in SPLITS for seed in SEEDS]


@pytest.fixture(scope="module")
def objects(scenes: list[Scene]) -> list[tuple[Scene, SceneObject, CaptionParts]]:
    return [(s, item, item.parts) for s in scenes for item in s.objects]


@needs_font
@needs_photographs
class TestScenes:
    def test_shapes_and_labels(self, scenes):
        for scene in scenes:
            assert scene.image.shape == (256, 256, 3) and scene.image.dtype == np.uint8
            assert 1 <= len(scene.objects) <= 6
            assert len({item.name for item in scene.objects}) == len(scene.objects)
            for item in scene.objects:
                assert item.mask.shape == (256, 256) and item.mask.dtype == np.bool_
                assert item.mask.sum() >= 100
                assert item.name == OBJECT_NAMES[item.name_index]
        assert {len(scene.objects) for scene in scenes} == set(range(1, 7))

    def test_masks_share_no_pixel_and_boxes_fit_them(self, scenes):
        for scene in scenes:
            assert np.sum([item.mask for item in scene.objects], axis=0).max() <= 1
            for item in scene.objects:
                rows, columns = np.nonzero(item.mask)
                box = [columns.min(), rows.min(), columns.max() + 1, rows.max() + 1]
                assert item.box.dtype == np.float32
                assert item.box.tolist() == box

    def test_objects_are_of_the_sizes_that_were_meant(self, objects):
        sides = [
            max(item.box[2] - item.box[0], item.box[3] - item.box[1]) for _, item, _ in objects
        ]
        assert 30 < min(sides) < 60 and 130 < max(sides) <= 142

    def test_the_same_seed_gives_the_same_scene_in_any_order(self, generators, scenes):
        again = SceneGenerator("train").scene(7)
        assert again.seed == 7 and again.split == "train"
        np.testing.assert_array_equal(again.image, scenes[7].image)
        for item, other in zip(again.objects, scenes[7].objects, strict=True):
            assert item.caption == other.caption
            np.testing.assert_array_equal(item.mask, other.mask)

    def test_seeds_and_splits_differ(self, scenes):
        pictures = {scene.image.tobytes() for scene in scenes}
        assert len(pictures) == len(scenes)
        contents = [[item.name for item in scene.objects] for scene in scenes]
        assert sum(contents[seed] == contents[seed + len(SEEDS)] for seed in SEEDS) <= 2

    def test_sizes_and_places_are_told_right(self, objects):
        for _, item, parts in objects:
            x0, y0, x1, y1 = item.box.tolist()
            side = max(x1 - x0, y1 - y0)
            assert parts.size == ("small" if side < 77 else "large" if side > 107 else "")
            if parts.place:
                down, across = int((y0 + y1) / 2 * 3 / 256), int((x0 + x1) / 2 * 3 / 256)
                assert parts.place == PLACES[down][across]

    def test_neighbours_are_told_right(self, objects):
        told = 0
        for scene, item, parts in objects:
            grown = item.box + np.array([-10, -10, 10, 10])
            near = [
                other
                for other in scene.objects
                if other is not item
                and (grown[:2] < other.box[2:]).all()
                and (other.box[:2] < grown[2:]).all()
            ]
            assert bool(parts.relation) == (len(near) == 1), item.caption
            if parts.relation:
                told += 1
                (other,) = near
                assert parts.neighbor == other.name
                right, down = ((item.box - other.box).reshape(2, 2).sum(axis=0) / 2).tolist()
                assert {"left of": -right, "right of": right, "above": -down, "below": down}[
                    parts.relation
                ] == max(abs(right), abs(down))
        assert 0.2 < told / len(objects) < 0.6

    def test_colors_are_those_of_the_visible_pixels(self, objects):
        told = [
            (scene.image[item.mask], parts.color) for scene, item, parts in objects if parts.color
        ]
        assert len(told) > 0.3 * len(objects)
        for pixels, color in told:
            shares = color_shares(pixels)
            assert shares[COLOR_WORDS.index(color)] == shares.max() >= 0.45

    def test_whether_a_color_is_told_depends_on_the_object_alone(self, objects):
        told = {}
        for _, item, parts in objects:
            if item.name not in ("apple", "fish"):  # two glyphs each
                assert told.setdefault(item.name, bool(parts.color)) == bool(parts.color)
        assert 0.3 < np.mean(list(told.values())) < 0.8

    def test_masks_end_where_the_picture_changes(self):
        """Same layout, other background: what differs is outside the masks."""
        first, second = SceneGenerator("train"), SceneGenerator("train")
        for generator, level in ((first, 60), (second, 190)):
            generator._backgrounds = Plain(level)
        agreement = []
        for seed in range(12):
            one, other = first.scene(seed), second.scene(seed)
            if [x.caption for x in one.objects] == [x.caption for x in other.objects]:
                inside = np.any([item.mask for item in one.objects], axis=0)
                unlike = abs(one.image.astype(int) - other.image).max(axis=2) < 65  # half of 130
                agreement.append((inside & unlike).sum() / (inside | unlike).sum())
        assert len(agreement) > 6
        assert min(agreement) > 0.93 and np.mean(agreement) > 0.97

    def test_every_object_turns_up(self, generators):
        names = {
            item.name
            for seed in range(1000, 1250)
            for item in generators["train"].scene(seed).objects
        }
        assert len(names) > 0.98 * len(OBJECT_NAMES)

    def test_another_size_of_picture(self):
        scene = SceneGenerator("test", image_size=384).scene(3)
        assert scene.image.shape == (384, 384, 3)
        sides = [max(item.box[2:] - item.box[:2]) for item in scene.objects]
        assert max(sides) > 80

    def test_generators_can_be_sent_to_workers(self, generators, scenes):
        copy = pickle.loads(pickle.dumps(generators["train"]))
        np.testing.assert_array_equal(copy.scene(2).image, scenes[2].image)

    def test_wrong_arguments(self, generators):
        with pytest.raises(InputError, match="unknown split 'dev'; expected one of train"):
            SceneGenerator("dev")
        with pytest.raises(InputError, match="image_size is 100; expected at least 128"):
            SceneGenerator("train", image_size=100)
        with pytest.raises(InputError, match="seed is -1"):
            generators["train"].scene(-1)

    def test_the_contact_sheet(self, tmp_path):
        output = tmp_path / "sheet.png"
        result = CliRunner().invoke(main, ["--count", "6", "-o", str(output)])
        assert result.exit_code == 0 and "6 scenes of split test" in result.output
        with Image.open(output) as sheet:
            pixels = np.asarray(sheet)
        scene = SceneGenerator("test").scene(0)
        left = np.asarray(Image.fromarray(scene.image).resize((320, 320), Image.Resampling.BICUBIC))
        np.testing.assert_array_equal(pixels[:320, :320], left)
        assert (pixels[:320, 320:640] != left).any()
        with pytest.raises(InputError, match="no scenes"):
            contact_sheet([])


class Plain:
    """A uniform grey background."""

    def __init__(self, level: int) -> None:
        self.level = level

    def draw(self, rng: np.random.Generator, size: int) -> np.ndarray:
        return np.full((size, size, 3), self.level, np.uint8)


def test_no_background_is_in_two_splits():
    for one, other in itertools.combinations(SPLITS, 2):
        assert not set(TEXTURES[one]) & set(TEXTURES[other])
        assert not set(PHOTOGRAPHS[one]) & set(PHOTOGRAPHS[other])
    assert tuple(PHOTOGRAPHS) == SPLITS


def test_every_photograph_is_listed_with_its_licence():
    rows = [line for line in (photographs.__doc__ or "").splitlines() if line.startswith("| `")]
    listed = {row.split("`")[1] for row in rows}
    assert listed == set(itertools.chain(*PHOTOGRAPHS.values()))
    assert all("CC0" in row or "public domain" in row for row in rows)


@needs_photographs
@pytest.mark.parametrize("split", SPLITS)
def test_backgrounds_fill_the_picture(split):
    drawn = [Backgrounds(split).draw(np.random.default_rng(seed), 128) for seed in range(12)]
    assert all(each.shape == (128, 128, 3) and each.dtype == np.uint8 for each in drawn)
    assert len({each.tobytes() for each in drawn}) == len(drawn)


@pytest.mark.parametrize(
    "texture", [*itertools.chain(*TEXTURES.values())], ids=lambda t: t.__name__
)
def test_textures_stay_in_their_range_and_vary(texture):
    fields = [texture(np.random.default_rng(seed), 128) for seed in range(8)]
    for field in fields:
        assert field.shape == (128, 128) and field.dtype == np.float32
        assert 0 <= field.min() < field.max() <= 1
    assert abs(fields[0] - fields[1]).max() > 0.1
    np.testing.assert_array_equal(fields[0], texture(np.random.default_rng(0), 128))


def test_photographs_that_are_not_installed(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(
        MissingDependencyError, match=r'coffee.png.*pip install "tap-deploy\[train\]"'
    ):
        load_photographs("test")
    with pytest.raises(MissingDependencyError):
        backgrounds.Backgrounds("test")


@needs_font
def test_every_glyph_is_a_picture_in_colour():
    glyphs = load_glyphs()
    assert [glyph.name for glyph in glyphs] == list(CHARACTERS.values())
    assert {glyph.name for glyph in glyphs} == set(OBJECT_NAMES)
    assert len({glyph.pixels.tobytes() for glyph in glyphs}) == len(glyphs)
    for glyph in glyphs:
        assert glyph.pixels.dtype == np.uint8 and 80 <= max(glyph.pixels.shape[:2]) <= 136
        solid = glyph.pixels[..., 3] >= 128
        assert solid.mean() > 0.2
        assert glyph.pixels[solid][:, :3].std(axis=0).max() > 5


def test_a_missing_font(monkeypatch, tmp_path):
    monkeypatch.setenv(FONT_VARIABLE, str(tmp_path / "none.ttf"))
    with pytest.raises(
        InputError, match=r"none.ttf; apt-get install fonts-noto-color-emoji, or set"
    ):
        load_glyphs()


def test_a_file_that_is_no_font(monkeypatch, tmp_path):
    path = tmp_path / "text.ttf"
    path.write_text("no font", "utf-8")
    monkeypatch.setenv(FONT_VARIABLE, str(path))
    with pytest.raises(InputError, match=r"font .*text.ttf cannot be used at 109 pixels; apt-get"):
        load_glyphs()


@needs_font
def test_a_character_that_the_font_lacks():
    with pytest.raises(InputError, match=r"has no colour bitmap for 'ᚠ' \(apple\)"):
        load_glyphs({"ᚠ": "apple"})


@needs_font
def test_the_font_can_be_elsewhere(monkeypatch, tmp_path):
    copy = tmp_path / "emoji.ttf"
    copy.symlink_to(emoji_font_path())
    monkeypatch.setenv(FONT_VARIABLE, str(copy))
    assert emoji_font_path() == Path(copy)
    (glyph,) = load_glyphs({"\N{AUTOMOBILE}": "car"})
    assert glyph.any_color and glyph.name_index == OBJECT_NAMES.index("car")

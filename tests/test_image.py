"""Pictures: what is read, what is refused, and the model frame against golden data."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from tap_deploy.errors import InputError
from tap_deploy.image import Frame, frame_image, load_image, model_image
from tests.pictures import message_of, png_of, random_rgb

GOLDEN = Path(__file__).parent / "data" / "tap_micro_outputs.npz"

rgb = pytest.fixture(random_rgb)


def test_a_file_a_pil_image_and_an_array_give_the_same_pixels(
    rgb: np.ndarray, tmp_path: Path
) -> None:
    path = tmp_path / "picture.png"
    Image.fromarray(rgb).save(path)
    for source in (path, str(path), Image.fromarray(rgb), rgb, np.asfortranarray(rgb)):
        loaded = load_image(source)
        assert loaded.dtype == np.uint8
        assert loaded.flags.c_contiguous
        np.testing.assert_array_equal(loaded, rgb)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_is_applied(rgb: np.ndarray, tmp_path: Path, orientation: int) -> None:
    upright = [
        rgb,
        rgb[:, ::-1],
        rgb[::-1, ::-1],
        rgb[::-1],
        rgb.transpose(1, 0, 2),
        np.rot90(rgb, -1),
        rgb[::-1, ::-1].transpose(1, 0, 2),
        np.rot90(rgb),
    ][orientation - 1]
    exif = Image.Exif()
    exif[0x0112] = orientation
    path = tmp_path / "turned.png"
    Image.fromarray(rgb).save(path, exif=exif)
    np.testing.assert_array_equal(load_image(path), upright)
    with Image.open(path) as picture:
        np.testing.assert_array_equal(load_image(picture), upright)


def test_broken_exif_does_not_make_a_picture_unreadable(rgb: np.ndarray, tmp_path: Path) -> None:
    path = tmp_path / "picture.png"
    Image.fromarray(rgb).save(path, exif=b"Exif\0\0II*\0\xff\xff\xff\xff")
    np.testing.assert_array_equal(load_image(path), rgb)


def test_the_first_frame_of_an_animation_is_taken(tmp_path: Path) -> None:
    frames = [Image.new("RGB", (8, 6), color) for color in ("red", "blue")]
    path = tmp_path / "animation.png"
    frames[0].save(path, save_all=True, append_images=frames[1:])
    assert load_image(path)[0, 0].tolist() == [255, 0, 0]


@pytest.mark.parametrize(
    ("mode", "word"),
    [
        ("1", "black and white"),
        ("L", "greyscale"),
        ("LA", "greyscale with alpha"),
        ("P", "palette"),
        ("RGBA", "alpha"),
        ("CMYK", "CMYK"),
        ("YCbCr", "YCbCr"),
    ],
)
def test_other_modes_are_refused_unless_converted(mode: str, word: str) -> None:
    picture = Image.new(mode, (6, 5))
    message = message_of(picture)
    assert word in message
    assert "convert=True (--convert)" in message
    assert load_image(picture, convert=True).shape == (5, 6, 3)


@pytest.mark.parametrize("mode", ["I", "F", "I;16", "I;16B"])
def test_more_than_8_bits_are_refused_unless_converted(mode: str) -> None:
    picture = Image.new(mode, (6, 5))
    assert "8 bits" in message_of(picture)
    assert load_image(picture, convert=True).shape == (5, 6, 3)


def test_a_16_bit_rgb_png_is_refused_although_pillow_calls_it_rgb() -> None:
    rows = b"".join(b"\0" + b"\x12\x34" * 3 * 4 for _ in range(4))
    assert "16 bits per channel" in message_of(png_of(4, 4, 16, 3, rows))


def test_alpha_is_laid_on_white() -> None:
    picture = Image.new("RGBA", (4, 4), (200, 100, 0, 0))
    picture.putpixel((0, 0), (200, 100, 0, 255))
    picture.putpixel((1, 0), (200, 100, 0, 128))
    rgb = load_image(picture, convert=True)
    assert rgb[0, 0].tolist() == [200, 100, 0]
    assert rgb[3, 3].tolist() == [255, 255, 255]
    np.testing.assert_allclose(rgb[0, 1], [227, 177, 127], atol=1)
    np.testing.assert_array_equal(load_image(np.asarray(picture), convert=True), rgb)


def test_a_transparent_colour_counts_as_alpha() -> None:
    picture = Image.new("RGB", (4, 4), (1, 2, 3))
    picture.info["transparency"] = (1, 2, 3)
    assert "transparent" in message_of(picture)
    assert load_image(picture, convert=True)[0, 0].tolist() == [255, 255, 255]


@pytest.mark.parametrize("shape", [(5, 6), (5, 6, 1)])
def test_greyscale_arrays_are_refused_unless_converted(shape: tuple[int, ...]) -> None:
    grey = np.arange(30, dtype=np.uint8).reshape(shape)
    assert "greyscale" in message_of(grey)
    rgb = load_image(grey, convert=True)
    np.testing.assert_array_equal(rgb, np.repeat(grey.reshape(5, 6, 1), 3, axis=2))


@pytest.mark.parametrize(
    ("array", "word"),
    [
        (np.zeros((0, 4, 3), np.uint8), "empty"),
        (np.zeros((1, 1, 3), np.uint8), "1 x 1"),
        (np.zeros((9, 1, 3), np.uint8), "1 x 9"),
        (np.full((5, 6, 3), -1, np.int16), "int16"),
        (np.full((5, 6, 3), 2, np.float32), "float32"),
        (np.zeros((5, 6, 3), np.complex64), "complex64"),
        (np.zeros((5, 6, 3), np.bool_), "bool"),
        (np.zeros((3, 5, 6), np.uint8), "transpose"),
        (np.zeros((1, 5, 6, 3), np.uint8), "[1, 5, 6, 3]"),
        (np.zeros((5, 6, 5), np.uint8), "[5, 6, 5]"),
        (np.zeros((1, 5, 6), np.uint8), "[1, 5, 6]"),
        (np.zeros(6, np.uint8), "[6]"),
        (None, "NoneType"),
        (b"bytes", "bytes"),
        ([[0, 0, 0]], "list"),
    ],
)
@pytest.mark.parametrize("convert", [False, True])
def test_what_is_no_8_bit_picture_is_refused(array: Any, word: str, convert: bool) -> None:
    assert word in message_of(array, convert=convert)


@pytest.mark.parametrize("dtype", [np.uint16, np.float32])
def test_arrays_of_other_types_are_refused_unless_converted(dtype: Any) -> None:
    array = np.ones((5, 6, 3), dtype)
    assert np.dtype(dtype).name in message_of(array)
    assert load_image(array, convert=True).dtype == np.uint8


def test_rgba_arrays_are_refused() -> None:
    assert "alpha" in message_of(np.zeros((5, 6, 4), np.uint8))


def test_a_missing_file_a_folder_and_a_text_are_refused(tmp_path: Path) -> None:
    assert "does not exist" in message_of(tmp_path / "missing.png")
    assert "does not exist" in message_of("")
    assert "cannot be opened" in message_of(tmp_path)
    (tmp_path / "text.jpg").write_text("not a picture")
    (tmp_path / "empty.jpg").write_bytes(b"")
    assert "not a picture" in message_of(tmp_path / "text.jpg")
    assert "not a picture" in message_of(tmp_path / "empty.jpg")


@pytest.mark.parametrize("suffix", ["jpg", "png", "webp", "tiff"])
def test_a_truncated_picture_is_refused(rgb: np.ndarray, tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"short.{suffix}"
    Image.fromarray(rgb).save(path)
    content = path.read_bytes()
    path.write_bytes(content[: len(content) * 2 // 3])
    assert f"short.{suffix}" in message_of(path)


@pytest.mark.parametrize("limit", [500, 250])  # Pillow warns at once, refuses at twice the limit
def test_a_decompression_bomb_is_refused(
    rgb: np.ndarray, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, limit: int
) -> None:
    path = tmp_path / "bomb.png"
    Image.fromarray(rgb).save(path)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", limit)
    message = message_of(path)
    assert f"600 pixels; expected at most {limit}" in message
    assert "max_pixels= (--max-pixels)" in message


@pytest.mark.parametrize("side", [10_000, 20_000])
def test_a_picture_that_pillow_warns_of_is_one_line(tmp_path: Path, side: int) -> None:
    path = tmp_path / "large.png"
    path.write_bytes(png_of(side, side, 8, 3, b""))
    code = (
        "import sys, tap_deploy.errors, tap_deploy.image\n"
        "try: tap_deploy.image.load_image(sys.argv[1])\n"
        "except tap_deploy.errors.InputError as exc: print(exc)"
    )
    # A process of its own: pytest turns warnings into errors, Python prints them.
    command = [sys.executable, "-W", "default", "-c", code, str(path)]
    result = subprocess.run(command, capture_output=True, text=True, check=True)
    assert result.stderr == ""
    assert result.stdout.count("\n") == 1
    assert f"large.png' decodes to {side**2} pixels" in result.stdout
    assert f"expected at most {Image.MAX_IMAGE_PIXELS}; shrink it" in result.stdout


def test_the_limit_itself_is_allowed_and_none_means_no_limit(
    rgb: np.ndarray, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "picture.png"
    Image.fromarray(rgb).save(path)
    for limit in (600, None):
        monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", limit)
        np.testing.assert_array_equal(load_image(path), rgb)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 599)
    assert "600 pixels; expected at most 599" in message_of(path)


def test_a_closed_picture_is_refused(rgb: np.ndarray, tmp_path: Path) -> None:
    path = tmp_path / "picture.png"
    Image.fromarray(rgb).save(path)
    with Image.open(path) as picture:
        pass
    assert "whose file was closed before its pixels were read; pass the path" in message_of(picture)
    loaded = Image.open(path)
    loaded.load()
    loaded.close()
    assert "was closed" in message_of(loaded)
    with Image.open(path) as picture:
        picture.load()
    np.testing.assert_array_equal(load_image(picture), rgb)


def test_model_image_equals_the_golden_one() -> None:
    with np.load(GOLDEN) as golden:
        for index in range(2):
            bgr = golden[f"image_bgr_{index}"]
            image, frame = model_image(np.ascontiguousarray(bgr[..., ::-1]), 512)
            np.testing.assert_array_equal(image[0], golden["model_image"][index])
            assert image.dtype == np.uint8
            scaled = [frame.scaled_height, frame.scaled_width]
            assert scaled == golden["scaled_hw"][index].tolist()
            assert np.float32(frame.scale) == golden["scale"][index, 0]
            assert (frame.height, frame.width) == bgr.shape[:2]


def test_the_padding_stands_at_the_bottom_and_the_right(rgb: np.ndarray) -> None:
    image, frame = model_image(rgb, 64)
    assert (frame.scaled_height, frame.scaled_width) == (43, 64)
    assert (image[0, 43:] == (103, 116, 123)).all()
    tall, _ = model_image(np.ascontiguousarray(rgb.transpose(1, 0, 2)), 64)
    assert (tall[0, :, 43:] == (103, 116, 123)).all()


def test_a_picture_of_the_frame_size_passes_unchanged() -> None:
    rgb = np.random.default_rng(1).integers(0, 256, (64, 64, 3), np.uint8)
    image, frame = model_image(rgb, 64)
    np.testing.assert_array_equal(image[0], rgb[..., ::-1])
    assert frame.scale == 1.0


@pytest.mark.parametrize(
    ("height", "width", "scale", "scaled"),
    [
        (512, 512, 2.0, (1024, 1024)),
        (3000, 3001, 1024 / 3000, (1024, 1024)),  # rounds into the frame: scaled by the short side
        (3000, 3002, 1024 / 3002, (1023, 1024)),
        (600, 400, 1024 / 600, (1024, 683)),
        (2, 3000, 1024 / 3000, (1, 1024)),
    ],
)
def test_the_scale_rule(height: int, width: int, scale: float, scaled: tuple[int, int]) -> None:
    frame = Frame.for_image(height, width, 1024)
    assert frame.scale == scale
    assert (frame.scaled_height, frame.scaled_width) == scaled
    assert frame == Frame.for_image(height, width, 1024)


@pytest.mark.parametrize(("height", "width"), [(2, 5000), (5000, 2), (0, 5), (5, 0)])
def test_a_frame_for_nothing_is_refused(height: int, width: int) -> None:
    with pytest.raises(InputError, match=f"{width} x {height}"):
        Frame.for_image(height, width, 1024)


@pytest.mark.parametrize("orientation", [1, 6])
def test_framing_at_once_gives_what_loading_and_framing_give(
    rgb: np.ndarray, tmp_path: Path, orientation: int
) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    path = tmp_path / "turned.jpg"
    Image.fromarray(rgb).save(path, exif=exif)
    with Image.open(path) as picture:
        for source in (path, str(path), picture, rgb):
            before = load_image(source)
            expected, frame = model_image(before, 64)
            found, found_frame = frame_image(source, 64)
            np.testing.assert_array_equal(found, expected)
            assert found_frame == frame
            assert found.flags.writeable
            np.testing.assert_array_equal(load_image(source), before)


def test_framing_refuses_what_loading_refuses(tmp_path: Path) -> None:
    for source in (Image.new("L", (6, 5)), np.zeros((5, 6), np.uint8), tmp_path / "no.jpg", None):
        with pytest.raises(InputError) as expected:
            load_image(source)  # type: ignore[arg-type]
        with pytest.raises(InputError) as found:
            frame_image(source, 64)  # type: ignore[arg-type]
        assert str(found.value) == str(expected.value)

"""Picture sources (paths, bytes, files, PIL images), limits, texts and orientations."""

from __future__ import annotations

import io
import logging
import os
import pathlib
import struct
import subprocess
import sys
import threading
import tracemalloc
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image, ImageOps, PngImagePlugin, WebPImagePlugin

from tap_deploy import PictureFile
from tap_deploy.errors import InputError
from tap_deploy.image import frame_image, load_image
from tap_deploy.pictures.layout import layout_of
from tap_deploy.pictures.opening import open_picture
from tap_deploy.pictures.png_chunks import without_texts
from tap_deploy.pictures.source import ReadOptions, name_of
from tests.pictures import message_of, png_chunk, png_of, random_rgb

ORIENTATION = 0x0112

rgb = pytest.fixture(random_rgb)


@pytest.fixture
def path(rgb: np.ndarray, tmp_path: Path) -> Path:
    path = tmp_path / "picture.png"
    Image.fromarray(rgb).save(path)
    return path


def saved(picture: Image.Image, kind: str = "PNG", **options: Any) -> bytes:
    content = io.BytesIO()
    picture.save(content, kind, **options)
    return content.getvalue()


def turned_by(orientation: int) -> Image.Exif:
    exif = Image.Exif()
    exif[ORIENTATION] = orientation
    return exif


# Bytes and files


@pytest.mark.parametrize("kind", [bytes, bytearray, memoryview, io.BytesIO])
def test_bytes_are_a_picture(rgb: np.ndarray, path: Path, kind: Any) -> None:
    np.testing.assert_array_equal(load_image(kind(path.read_bytes())), rgb)
    np.testing.assert_array_equal(
        frame_image(kind(path.read_bytes()), 64)[0], frame_image(path, 64)[0]
    )


@pytest.mark.parametrize("suffix", ["png", "jpg", "tif", "webp", "jp2", "bmp", "gif", "ppm"])
def test_every_format_is_read_from_bytes_as_from_its_path(tmp_path: Path, suffix: str) -> None:
    source = Image.fromarray(np.arange(900, dtype=np.uint8).reshape(30, 10, 3))
    path = tmp_path / f"picture.{suffix}"
    source.save(path)
    with Image.open(path) as opened:
        expected = np.asarray(opened.convert("RGB"))
    for given in (path, path.read_bytes()):
        np.testing.assert_array_equal(load_image(given, convert=True), expected)


def test_a_file_is_read_from_where_it_stands_and_stays_open(rgb: np.ndarray, path: Path) -> None:
    with path.open("rb") as file:
        np.testing.assert_array_equal(load_image(file), rgb)
        assert not file.closed
    with io.BytesIO(b"a header" + path.read_bytes()) as file:
        file.seek(8)
        np.testing.assert_array_equal(load_image(file), rgb)
        assert not file.closed
        assert "is empty" in message_of(file)


def test_a_pipe_is_a_picture(rgb: np.ndarray, path: Path) -> None:
    code = "import sys, tap_deploy.image as i; print(i.load_image(sys.stdin.buffer).sum())"
    with subprocess.Popen(["cat", str(path)], stdout=subprocess.PIPE) as cat:
        command = [sys.executable, "-c", code]
        result = subprocess.run(command, stdin=cat.stdout, capture_output=True, check=True)
    assert int(result.stdout) == rgb.sum()


def test_messages_name_what_was_given(tmp_path: Path) -> None:
    assert "image from bytes is not a picture" in message_of(b"no picture")
    assert "image from a file object is not a picture" in message_of(io.BytesIO(b"no picture"))
    (tmp_path / "no.png").write_text("no picture")
    with (tmp_path / "no.png").open("rb") as file:
        assert f"image '{tmp_path / 'no.png'}' is not a picture" in message_of(file)
    with (tmp_path / "no.png").open() as file:
        assert "open it in binary mode" in message_of(file)
    assert "cannot be opened" in message_of(file)  # it is closed
    for mode in ("wb", "w", "ab"):
        with (tmp_path / "no.png").open(mode) as file:
            assert "is not open for reading; open it with 'rb'" in message_of(file)
    assert "is empty" in message_of(b"")
    assert "is empty" in message_of(PictureFile(source=b""))
    assert name_of(PictureFile(source=Path("a.png"))) == "image 'a.png'"
    assert name_of(np.zeros((2, 2, 3))) == "image"


def test_the_reason_of_the_format_is_told(path: Path) -> None:
    content = bytearray(saved(Image.new("RGB", (8, 8)), "JPEG"))
    content[content.index(b"\xff\xc0") + 4] = 12  # bits
    assert "as JPEG: cannot handle 12-bit layers" in message_of(bytes(content))


# Options that travel with a picture


def test_a_picture_file_brings_its_options(path: Path, rgb: np.ndarray) -> None:
    grey = Image.fromarray(rgb[..., 0])
    assert "greyscale" in message_of(PictureFile(source=grey))
    expected = np.repeat(rgb[..., :1], 3, axis=2)
    np.testing.assert_array_equal(load_image(PictureFile(source=grey, convert=True)), expected)
    swapped = PictureFile(source=path, bands=[3, 2, 1])  # type: ignore[arg-type]
    np.testing.assert_array_equal(load_image(swapped), rgb[..., ::-1])
    np.testing.assert_array_equal(load_image(swapped, convert=True), rgb[..., ::-1])
    np.testing.assert_array_equal(
        frame_image(swapped, 64)[0], frame_image(rgb[..., ::-1].copy(), 64)[0]
    )
    assert "at most 599" in message_of(PictureFile(source=path, max_pixels=599))


@pytest.mark.parametrize("max_pixels", [0, -1, 1.5, "9", True])
def test_a_limit_is_a_number(path: Path, max_pixels: Any) -> None:
    assert "max_pixels is" in message_of(path, max_pixels=max_pixels)


# Limits


def test_a_limit_of_ones_own(
    path: Path, rgb: np.ndarray, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Pillow warns above its limit, which is an error here, and raises above twice the limit."""
    picture = Image.fromarray(rgb)
    for limit in (599, 299, 10):
        monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", limit)
        for kind in ("PNG", "JPEG", "TIFF", "BMP", "PPM", "JPEG2000"):
            content = saved(picture, kind)
            assert f"600 pixels; expected at most {limit};" in message_of(content)
            assert "max_pixels= (--max-pixels)" in message_of(content)
            assert load_image(content, max_pixels=600).shape == rgb.shape
            assert "at most 599" in message_of(content, max_pixels=599)
        tiled = saved(picture, "TIFF", compression="tiff_deflate")
        assert load_image(tiled, max_pixels=600).shape == rgb.shape


def test_a_jpeg_with_more_pictures_in_it_has_the_same_limit(
    rgb: np.ndarray, monkeypatch: pytest.MonkeyPatch
) -> None:
    picture = Image.fromarray(rgb)
    content = saved(picture, "MPO", save_all=True, append_images=[picture])
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 299)
    assert load_image(content, max_pixels=600).shape == rgb.shape


def test_the_limit_of_the_process_is_left_alone(path: Path, rgb: np.ndarray) -> None:
    """Limits of threads do not affect each other or that of Pillow."""
    before = Image.MAX_IMAGE_PIXELS
    outcomes: dict[int, list[bool]] = {limit: [] for limit in (599, 600)}
    start = threading.Barrier(len(outcomes))

    def read(limit: int) -> None:
        start.wait()
        for _ in range(50):
            try:
                load_image(path, max_pixels=limit)
                outcomes[limit].append(True)
            except InputError:
                outcomes[limit].append(False)
            assert before == Image.MAX_IMAGE_PIXELS

    threads = [threading.Thread(target=read, args=(limit,)) for limit in outcomes]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert outcomes == {599: [False] * 50, 600: [True] * 50}


# Texts and profiles


def png_with(content: bytes, *chunks: tuple[bytes, bytes], last: bool = False) -> bytes:
    """Put chunks behind IHDR, or before IEND."""
    made = b"".join(png_chunk(kind, data) for kind, data in chunks)
    place = len(content) - 12 if last else 33
    return content[:place] + made + content[place:]


@pytest.mark.parametrize("last", [False, True])
@pytest.mark.parametrize(
    ("kind", "head"),
    [(b"iCCP", b"profile\0\0"), (b"zTXt", b"Comment\0\0"), (b"iTXt", b"Comment\0\1\0\0\0")],
)
def test_a_large_text_or_profile_of_a_png_does_not_matter(
    path: Path, rgb: np.ndarray, kind: bytes, head: bytes, last: bool
) -> None:
    limit = PngImagePlugin.MAX_TEXT_CHUNK
    chunk = (kind, head + zlib.compress(bytes(2 * limit)))
    content = png_with(path.read_bytes(), chunk, last=last)
    if not (kind == b"iCCP" and last):
        with (
            pytest.raises(ValueError, match=r"(?i)too large"),
            Image.open(io.BytesIO(content)) as im,
        ):
            im.load()
    np.testing.assert_array_equal(load_image(content), rgb)
    assert limit == PngImagePlugin.MAX_TEXT_CHUNK


def test_many_texts_of_a_png_do_not_matter(
    path: Path, rgb: np.ndarray, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(PngImagePlugin, "MAX_TEXT_MEMORY", 100)
    chunks = [(b"tEXt", b"Comment\0" + bytes([65]) * 60)] * 3
    np.testing.assert_array_equal(load_image(png_with(path.read_bytes(), *chunks)), rgb)


def test_what_a_png_says_about_its_colours_stays(rgb: np.ndarray) -> None:
    profile = (b"iCCP", b"profile\0\0" + zlib.compress(bytes(9)))
    palette = Image.fromarray(rgb).quantize(4)
    content = saved(palette, transparency=0)
    found = load_image(png_with(content, profile, (b"sBIT", b"\5\5\5")), convert=True)
    np.testing.assert_array_equal(found, load_image(content, convert=True))
    assert (found == 255).all(axis=2).any()
    turned = saved(Image.fromarray(rgb), exif=turned_by(3))
    np.testing.assert_array_equal(load_image(png_with(turned, profile)), rgb[::-1, ::-1])
    short = png_with(saved(Image.fromarray(rgb)), profile)[:-100]
    assert "cannot be decoded" in message_of(short)


@pytest.mark.parametrize("size", [0, 2 * PngImagePlugin.MAX_TEXT_CHUNK])
def test_texts_that_tell_the_orientation_are_read_however_large(rgb: np.ndarray, size: int) -> None:
    xmp = b'<x:xmpmeta tiff:Orientation="3"/>' + bytes([32]) * size
    raw = turned_by(3).tobytes()
    lines = b"\nexif\n%8d\n" % len(raw) + raw.hex().encode() + b"\n" + bytes([10]) * size
    content = saved(Image.fromarray(rgb))
    for chunk in (
        (b"iTXt", b"XML:com.adobe.xmp\0\1\0\0\0" + zlib.compress(xmp)),
        (b"iTXt", b"XML:com.adobe.xmp\0\0\0\0\0" + xmp),
        (b"zTXt", b"Raw profile type exif\0\0" + zlib.compress(lines)),
        (b"tEXt", b"Raw profile type exif\0" + lines),
    ):
        np.testing.assert_array_equal(load_image(png_with(content, chunk)), rgb[::-1, ::-1])


@pytest.mark.parametrize("kind", ["JPEG", "WEBP", "TIFF"])
def test_large_profiles_and_texts_of_other_formats_do_not_matter(kind: str) -> None:
    profile = np.random.default_rng(0).bytes(5 << 20)
    picture = Image.new("RGB", (8, 6), "red")
    options: dict[str, Any] = {"JPEG": {"comment": bytes(60_000)}}.get(kind, {})
    found = load_image(saved(picture, kind, icc_profile=profile, **options))
    assert found.shape == (6, 8, 3)


# Upright


def test_what_was_made_of_an_opened_picture_is_taken_as_it_is(rgb: np.ndarray) -> None:
    content = saved(Image.fromarray(rgb), exif=turned_by(6))
    upright = np.rot90(rgb, -1)
    with Image.open(io.BytesIO(content)) as opened:
        np.testing.assert_array_equal(load_image(opened), upright)
        made = {
            "rotate": (opened.rotate(-90, expand=True), upright),
            "transpose": (opened.transpose(Image.Transpose.ROTATE_270), upright),
            "exif_transpose": (ImageOps.exif_transpose(opened), upright),
            "copy": (opened.copy(), rgb),
            "convert": (opened.convert("RGBA").convert("RGB"), rgb),
            "crop": (opened.crop((0, 0, 30, 20)), rgb),
        }
        for name, (picture, expected) in made.items():
            np.testing.assert_array_equal(load_image(picture), expected, err_msg=name)
            np.testing.assert_array_equal(
                frame_image(picture, 64)[0], frame_image(np.ascontiguousarray(expected), 64)[0]
            )
        assert opened.rotate(-90).getexif()[ORIENTATION] == 6  # the tag alone would mislead


def test_a_turn_that_is_not_made_is_told_once(
    rgb: np.ndarray, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "tap_deploy")
    for orientation, count in ((6, 1), (1, 0)):
        content = saved(Image.fromarray(rgb), "JPEG", exif=turned_by(orientation))
        with Image.open(io.BytesIO(content)) as opened:
            for read in (load_image, lambda source: frame_image(source, 64)):
                caplog.clear()
                read(opened)
                read(ImageOps.exif_transpose(opened))
                assert not caplog.messages
                read(opened.convert("RGB"))
                note = "image: EXIF orientation not applied; the pixels may be upright already"
                assert caplog.messages == [note] * count


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "TIFF", "WEBP"])
def test_an_opened_picture_is_turned_once(kind: str) -> None:
    picture = Image.new("RGB", (40, 20), "red")
    content = saved(picture, kind, exif=turned_by(6))
    assert load_image(content).shape == (40, 20, 3)
    with Image.open(io.BytesIO(content)) as opened:
        assert load_image(opened).shape == (40, 20, 3)
        opened.load()
        assert load_image(opened).shape == (40, 20, 3)
    with Image.open(io.BytesIO(content)) as opened:
        ImageOps.exif_transpose(opened, in_place=True)
        assert opened.size == (20, 40)
        assert load_image(opened).shape == (40, 20, 3)
    if kind != "TIFF":  # Pillow turns these itself
        with Image.open(io.BytesIO(content)) as opened:
            del opened.getexif()[ORIENTATION]  # the owner knows better
            assert load_image(opened).shape == (20, 40, 3)


def test_paths_of_all_kinds(path: Path, rgb: np.ndarray) -> None:
    class Named(os.PathLike[str]):
        def __fspath__(self) -> str:
            return str(path)

    for source in (path, str(path), Named(), pathlib.PurePath(path)):
        np.testing.assert_array_equal(load_image(source), rgb)
    assert "cannot be opened" in message_of("zero\0byte.png")


def test_a_pipe_given_by_its_path(path: Path, rgb: np.ndarray) -> None:
    reader, writer = os.pipe()
    try:
        with open(writer, "wb") as file:
            file.write(path.read_bytes())
        np.testing.assert_array_equal(load_image(f"/dev/fd/{reader}"), rgb)
    finally:
        os.close(reader)


# Broken and hostile files


@pytest.mark.parametrize(
    "text", [b"iTXtXML:com.adobe.xmp\0\0\0\0\0", b"tEXtRaw profile type exif\0"]
)
def test_texts_beyond_what_pillow_takes_are_one_clear_line(
    path: Path, monkeypatch: pytest.MonkeyPatch, text: bytes
) -> None:
    monkeypatch.setattr(PngImagePlugin, "MAX_TEXT_MEMORY", 2 << 20)
    chunk = (text[:4], text[4:] + bytes([32]) * (3 << 20))
    message = message_of(png_with(path.read_bytes(), chunk))
    assert "its EXIF or XMP texts take 3 MB; expected at most 2; save it without" in message


def test_the_head_of_a_png_that_was_cut_is_one_clear_line(path: Path) -> None:
    content = path.read_bytes()
    for size in range(1, 60):
        message = message_of(content[:size])
        assert "unpack" not in message
        assert "buffer" not in message
        assert "truncated" in message or "Truncated" in message or "not a picture" in message


DRAWINGS = {
    "EPS": b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n%%EndComments\n",
    "WMF": b"\xd7\xcd\xc6\x9a\0\0" + struct.pack("<4hH", 0, 0, 10, 10, 72) + bytes(64),
    "EMF": struct.pack("<8I", 1, 108, 0, 0, 9, 9, 0, 0) + bytes(8) + b" EMF" + bytes(100),
}


@pytest.mark.parametrize("content", DRAWINGS.values(), ids=DRAWINGS.keys())
def test_drawings_are_not_opened(content: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    """Pillow starts Ghostscript for EPS."""
    told = "is a vector graphic (EPS, WMF or EMF); expected pixels; convert it to PNG first"
    kind = "EPS" if content.startswith(b"%") else "WMF"
    if kind == "EPS":
        with Image.open(io.BytesIO(content)) as opened:
            assert told in message_of(opened, convert=True)
    Image.init()

    def refuse(*_: Any) -> None:
        raise AssertionError("its plugin reads it")

    monkeypatch.setitem(Image.OPEN, kind, (refuse, Image.OPEN[kind][1]))
    assert told in message_of(content)


class Counted(io.BytesIO):
    """A file that counts the bytes read from it."""

    reads = asked = 0

    def read(self, size: int | None = -1, /) -> bytes:
        wanted = len(self.getvalue()) if size is None or size < 0 else size
        self.reads, self.asked = self.reads + 1, self.asked + wanted
        return super().read(size)


def test_texts_of_a_png_unpack_to_little(rgb: np.ndarray) -> None:
    lines = b"\nexif\n%8d\n" % len(turned_by(3).tobytes()) + turned_by(3).tobytes().hex().encode()
    limit = PngImagePlugin.MAX_TEXT_CHUNK
    packed = zlib.compress(lines + b"\n" * 4 * limit)
    chunk = (b"zTXt", b"Raw profile type exif\0\0" + packed)
    content = png_with(saved(Image.fromarray(rgb)), *[chunk] * 5)
    assert len(without_texts(io.BytesIO(content)).read()) < len(content) + limit + 100
    np.testing.assert_array_equal(load_image(content), rgb[::-1, ::-1])


def test_chunks_of_a_png_take_no_memory_of_their_own(path: Path) -> None:
    end = struct.pack(">I4s", 0xFFFFFFFF, b"prIv")
    content = path.read_bytes()[:-12]
    text = png_chunk(b"tEXt", b"Comment\0")
    file = Counted(content + text + end)
    without_texts(file)
    assert file.asked < 3 * len(content)
    many = io.BytesIO(content + png_chunk(b"prIv", b"") * 20_000)
    tracemalloc.start()
    try:
        without_texts(many)
        assert tracemalloc.get_traced_memory()[1] < 200_000
    finally:
        tracemalloc.stop()


def test_a_png_that_cannot_be_read_on_is_one_line(path: Path) -> None:
    class Failing(io.BytesIO):
        def seek(self, offset: int, whence: int = 0, /) -> int:
            if whence == io.SEEK_END:
                raise OSError("the disk is gone")
            return super().seek(offset, whence)

    with pytest.raises(InputError, match="image cannot be opened: the disk is gone"):
        open_picture(Failing(path.read_bytes()), "image", ReadOptions())


BOXES = {
    "shorter than their head": struct.pack(">I4sQ4s4x", 1, b"av1C", 12, b"free"),
    "in one another": struct.pack(">I4s", 8, b"ipco"),
    "many": struct.pack(">I4s", 8, b"free"),
}


@pytest.mark.parametrize("box", BOXES.values(), ids=BOXES.keys())
@pytest.mark.parametrize("head", [b"\0\0\0\x10ftypavif\0\0\0\0", b"\0\0\0\x0cjP  \r\n\x87\n"])
def test_boxes_are_read_once_and_not_without_end(head: bytes, box: bytes) -> None:
    file = Counted(head + box.replace(b"ipco", b"ipco" if b"avif" in head else b"jp2h") * 50_000)
    layout_of(file)
    assert file.reads < 3000
    assert file.asked < 2 * len(file.getvalue())


@pytest.mark.parametrize("kind", ["WEBP", "ICO"])
@pytest.mark.skipif(
    not hasattr(WebPImagePlugin, "_get_size"), reason="this Pillow reads WebP of any size"
)
def test_formats_that_keep_the_limit_of_the_process_say_so(
    rgb: np.ndarray, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    content = saved(Image.fromarray(rgb), kind, **({"sizes": [(30, 20)]} if kind == "ICO" else {}))
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 299)
    message = message_of(content, max_pixels=600, convert=True)
    assert "600 pixels" in message
    assert "its own limit of 2 x PIL.Image.MAX_IMAGE_PIXELS, regardless of max_pixels" in message
    assert "save it as PNG or TIFF" in message


def test_a_picture_that_takes_more_memory_than_there_is(path: Path) -> None:
    resource = pytest.importorskip("resource")
    code = (
        "import resource, sys, tap_deploy.errors, tap_deploy.image\n"
        "tap_deploy.image.load_image(sys.argv[1])\n"
        "used = int(open('/proc/self/statm').read().split()[0]) * resource.getpagesize()\n"
        "resource.setrlimit(resource.RLIMIT_AS, (used + 50_000_000,) * 2)\n"
        "try: tap_deploy.image.load_image(sys.stdin.buffer)\n"
        "except tap_deploy.errors.InputError as exc: print(exc)"
    )
    assert resource.RLIMIT_AS
    large = png_of(9000, 9000, 8, 3, b"")
    command = [sys.executable, "-c", code, str(path)]
    result = subprocess.run(command, input=large, capture_output=True, check=True)
    assert b"image '<stdin>' needs more memory than is free" in result.stdout

"""Pictures with more than 8 bits per channel or many bands: rejected, or converted."""

from __future__ import annotations

import base64
import io
import logging
import struct
import sys
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from tap_deploy.errors import InputError, MissingDependencyError, TapError
from tap_deploy.image import load_image
from tap_deploy.pictures import scaling as picture_scaling
from tests.pictures import HEIGHT, WIDTH, deep_png, message_of, png_chunk

rasterio = pytest.importorskip("rasterio")


def samples(count: int = 3, bits: int = 16, dtype: Any = np.uint16) -> np.ndarray:
    """``[B, H, W]`` of which the largest has all bits set."""
    rng = np.random.default_rng(0)
    found = rng.integers(0, 1 << bits, (count, HEIGHT, WIDTH), np.uint32).astype(dtype)
    found[:, 0, 0] = (1 << bits) - 1
    return found


def write_raster(path: Path, array: np.ndarray, driver: str = "GTiff", **options: Any) -> Path:
    profile = {"count": len(array), "height": array.shape[1], "width": array.shape[2]}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", rasterio.errors.NotGeoreferencedWarning)
        with rasterio.open(
            path, "w", driver=driver, dtype=array.dtype, **profile, **options
        ) as dataset:
            dataset.write(array)
    return path


def scaled(array: np.ndarray, white: int) -> np.ndarray:
    return np.floor(np.moveaxis(array, 0, 2) * (255 / white) + 0.5).astype(np.uint8)


TIFF_LAYOUTS = [
    {"interleave": "pixel"},
    {"interleave": "band"},
    {"interleave": "band", "tiled": True, "blockxsize": 16, "blockysize": 16},
    {"interleave": "pixel", "tiled": True, "blockxsize": 16, "blockysize": 16},
    {"interleave": "band", "ENDIANNESS": "BIG"},
    {"interleave": "band", "compress": "lzw"},
    {
        "interleave": "band",
        "compress": "deflate",
        "tiled": True,
        "blockxsize": 16,
        "blockysize": 16,
    },
    {"interleave": "pixel", "BIGTIFF": "YES"},
]


@pytest.mark.parametrize("options", TIFF_LAYOUTS)
@pytest.mark.parametrize("photometric", ["RGB", "MINISBLACK"])
def test_a_deep_tiff_of_any_layout(tmp_path: Path, options: Any, photometric: str) -> None:
    array = samples()
    path = write_raster(tmp_path / "deep.tif", array, photometric=photometric, **options)
    assert "deep.tif' has 16 bits per channel" in message_of(path)
    assert "convert=True (--convert)" in message_of(path)
    np.testing.assert_array_equal(load_image(path, convert=True), scaled(array, 65535))


@pytest.mark.parametrize("options", TIFF_LAYOUTS)
def test_a_plain_tiff_of_any_layout_is_read_as_ever(tmp_path: Path, options: Any) -> None:
    array = samples(bits=8, dtype=np.uint8)
    path = write_raster(tmp_path / "plain.tif", array, photometric="RGB", **options)
    np.testing.assert_array_equal(load_image(path), np.moveaxis(array, 0, 2))


@pytest.mark.parametrize("bits", [8, 11, 12, 14, 16])
def test_the_scale_is_that_of_the_bits_in_use(tmp_path: Path, bits: int) -> None:
    array = samples(bits=bits)
    path = write_raster(tmp_path / "deep.tif", array, photometric="RGB")
    np.testing.assert_array_equal(load_image(path, convert=True), scaled(array, (1 << bits) - 1))


def test_a_depth_that_the_file_states_is_the_scale(tmp_path: Path) -> None:
    array = samples(bits=10)  # a dark picture of 12 bits
    for name, options in {
        "deep.tif": {"nbits": 12},
        "deep.jp2": {"driver": "JP2OpenJPEG", "nbits": 12, "quality": 100, "reversible": "yes"},
    }.items():
        path = write_raster(tmp_path / name, array, **options)
        assert "12 bits" in message_of(path)
        np.testing.assert_array_equal(load_image(path, convert=True), scaled(array, 4095))


def test_12_bits_in_a_jpeg_2000_of_16(tmp_path: Path) -> None:
    array = samples(bits=12)
    options = {"driver": "JP2OpenJPEG", "quality": 100, "reversible": "yes"}
    for name in ("deep.jp2", "deep.j2k"):
        path = write_raster(tmp_path / name, array, **options)
        assert "16 bits" in message_of(path)
        np.testing.assert_array_equal(load_image(path, convert=True), scaled(array, 4095))


def test_deep_png(tmp_path: Path) -> None:
    for count in (1, 2, 3, 4):
        array = samples(count)
        if count in (2, 4):
            array[-1] = 65535  # opaque
        path = tmp_path / f"{count}.png"
        path.write_bytes(deep_png(array))
        assert "bits per channel" in message_of(path)
        colours = scaled(array[: count - 1 + count % 2], 65535)
        expected = np.broadcast_to(colours, (HEIGHT, WIDTH, 3))
        np.testing.assert_array_equal(load_image(path, convert=True), expected)


def test_deep_alpha_is_laid_on_white(tmp_path: Path) -> None:
    array = samples(4, bits=12)
    array[3] = 0
    array[3, 5] = 4095
    (tmp_path / "alpha.png").write_bytes(deep_png(array))
    write_raster(tmp_path / "alpha.tif", array, photometric="RGB", alpha="YES")
    for name in ("alpha.png", "alpha.tif"):
        rgb = load_image(tmp_path / name, convert=True)
        assert (rgb[[0, 1, 19]] == 255).all()
        np.testing.assert_array_equal(rgb[5], scaled(array[:3], 4095)[5])


def test_the_transparent_colour_of_a_deep_png_becomes_white(tmp_path: Path) -> None:
    for count in (1, 3):
        array = np.clip(samples(count), 2, None)
        array[:, 7, 8] = np.arange(count) + 1
        chunk = png_chunk(b"tRNS", struct.pack(f">{count}H", *array[:, 7, 8]))
        path = tmp_path / f"{count}.png"
        path.write_bytes(deep_png(array, chunk))
        rgb = load_image(path, convert=True)
        assert rgb[7, 8].tolist() == [255, 255, 255]
        assert (rgb == 255).all(axis=2).sum() == 1 + (array == 65535).all(axis=0).sum()


def test_deep_netpbm(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "tap_deploy")
    note = f"image '{tmp_path / 'deep.ppm'}': samples scaled from 0..4095 to 0..255"
    array = samples(bits=12)
    pixels = np.moveaxis(array, 0, 2).astype(">u2").tobytes()
    path = tmp_path / "deep.ppm"
    path.write_bytes(b"P6 # a comment\n30 20\n4095\n" + pixels)
    assert "12 bits" in message_of(path)
    np.testing.assert_allclose(load_image(path, convert=True), scaled(array, 4095), atol=1)
    path.write_bytes(b"P5\n30 20\n4095\n" + array[0].astype(">u2").tobytes())
    assert "12 bits" in message_of(path)
    grey = np.repeat(scaled(array[:1], 4095), 3, axis=2)
    np.testing.assert_array_equal(load_image(path, convert=True), grey)
    assert caplog.messages == [note, note]


def test_deep_sgi_psd_and_dds_are_refused(tmp_path: Path) -> None:
    array = samples()
    head = struct.pack(">HBBHHHHII", 474, 0, 2, 3, WIDTH, HEIGHT, 3, 0, 65535).ljust(512, b"\0")
    (tmp_path / "deep.sgi").write_bytes(head + array[:, ::-1].astype(">u2").tobytes())
    head = b"8BPS" + struct.pack(">H6xHIIHH", 1, 3, HEIGHT, WIDTH, 16, 3) + bytes(14)
    (tmp_path / "deep.psd").write_bytes(head + array.astype(">u2").tobytes())
    fields = [124, 0x1007, HEIGHT, WIDTH, 0, 0, 0, *[0] * 11, 32, 4]
    head = b"DDS " + struct.pack("<20I", *fields) + b"DX10" + bytes(40)
    (tmp_path / "deep.dds").write_bytes(head + struct.pack("<5I", 95, 3, 0, 1, 0) + bytes(640))
    masks = struct.pack("<4I", 0x3FF00000, 0xFFC00, 0x3FF, 0)
    head = b"DDS " + struct.pack("<22I", *fields[:-1], 0x40, 0, 32) + masks + bytes(20)
    (tmp_path / "ten.dds").write_bytes(head + bytes(WIDTH * HEIGHT * 4))
    for name, bits in {"deep.sgi": 16, "deep.psd": 16, "deep.dds": 16, "ten.dds": 10}.items():
        assert f"{bits} bits per channel" in message_of(tmp_path / name)
        assert "save it as PNG or TIFF" in message_of(tmp_path / name, convert=True)


AVIF_OF_10_BITS = base64.b85decode(  # 8 x 8 pixels of (1023, 512, 100)
    "0000WW^{RQVRmU|00000VRmU|ZE0pPZE0a<O+hh10002%ZDn*}000000000XXk=`10000000000aA{+70000000000"
    "00000000004sdC7Z2$lO000310016oY;R)#0000)000310RR910RR926951J9RL6TC~0YKW&i*H00031000_kZf0cy"
    "000000RRADb}%tRZ)|UJ00000YH4tCZ~y=ROKEUpZvX%Q6lrsCWdHyG000002mk;82mk;85O8UDX#fBK00RmN3IG5A"
    "3}JRLLxCVb000006Ju{|a&BX6cmM(b0ssJj0000NX>e^}0000000001009I60)qqq001RzWMOm?015~=2*2k70sxRQ"
    "4-fzV1}l(_=MG*sxhtFG"
)


def test_deep_avif(caplog: pytest.LogCaptureFixture) -> None:
    pytest.importorskip("PIL._avif", reason="this Pillow has no AVIF")
    caplog.set_level(logging.INFO, "tap_deploy")
    assert "10 bits per channel" in message_of(AVIF_OF_10_BITS)
    rgb = load_image(AVIF_OF_10_BITS, convert=True)
    np.testing.assert_allclose(rgb, np.broadcast_to([255, 128, 25], (8, 8, 3)), atol=1)
    assert "image from bytes: samples scaled from 0..1023 to 0..255" in caplog.messages
    flags = AVIF_OF_10_BITS.index(b"av1C") + 4 + 2
    twelve = bytearray(AVIF_OF_10_BITS)
    twelve[flags] |= 0x20
    assert "12 bits per channel" in message_of(twelve)
    plain = io.BytesIO()
    Image.new("RGB", (8, 8), "red").save(plain, "AVIF")
    assert load_image(plain.getvalue()).shape == (8, 8, 3)


@pytest.mark.parametrize("convert", [False, True])
def test_few_bits_in_many_bands_are_no_garbage(tmp_path: Path, convert: bool) -> None:
    array = samples(bits=4, dtype=np.uint8)
    path = write_raster(tmp_path / "few.tif", array, photometric="RGB", nbits=4)
    if convert:
        np.testing.assert_array_equal(load_image(path, convert=True), scaled(array, 15))
    else:
        assert "4 bits per channel" in message_of(path)


def test_signed_samples(tmp_path: Path) -> None:
    array = samples(bits=12, dtype=np.int16)
    path = write_raster(tmp_path / "signed.tif", array, photometric="RGB")
    assert "16 bits" in message_of(path)
    np.testing.assert_array_equal(load_image(path, convert=True), scaled(array, 4095))
    array[1, 2, 3] = -1
    write_raster(path, array, photometric="RGB")
    message = message_of(path, convert=True)
    assert "samples from -1 to 4095 (int16)" in message
    bytes_below_0 = write_raster(tmp_path / "bytes.tif", array[:1].astype(np.int8))
    assert message_of(bytes_below_0)


def test_floats(tmp_path: Path) -> None:
    array = np.random.default_rng(0).random((3, HEIGHT, WIDTH), np.float32)
    path = write_raster(tmp_path / "float.tif", array)
    assert "32 bits" in message_of(path)
    np.testing.assert_array_equal(load_image(path, convert=True), scaled(array, 1))
    array[0, 0, 0] = 1.5
    write_raster(path, array)
    assert "floats of 0..1" in message_of(path, convert=True)


def on_white(premultiplied: np.ndarray, white: int) -> np.ndarray:
    """``[B, H, W]``, the last one alpha"""
    return scaled(premultiplied[:-1].astype(float) + white - premultiplied[-1], white)


@pytest.mark.parametrize("bits", [8, 12, 16])
@pytest.mark.parametrize("count", [2, 4])
def test_colours_that_are_multiplied_by_alpha(tmp_path: Path, bits: int, count: int) -> None:
    tifffile = pytest.importorskip("tifffile")
    white = (1 << bits) - 1
    array = samples(count, bits).astype(float)
    array[-1] = np.linspace(0, white, HEIGHT * WIDTH).reshape(HEIGHT, WIDTH)
    array = np.rint(array)
    array[:-1] = np.rint(array[:-1] * array[-1] / white / 4)  # dark: of fewer bits than alpha
    path = tmp_path / "alpha.tif"
    tifffile.imwrite(
        path,
        np.moveaxis(array, 0, 2).astype(np.uint8 if bits == 8 else np.uint16),
        photometric="rgb" if count == 4 else "minisblack",
        planarconfig="contig",
        extrasamples=["assocalpha"],
    )
    message_of(path)
    expected = np.broadcast_to(on_white(array, white), (HEIGHT, WIDTH, 3))
    # Pillow divides 8-bit colours by alpha, and rounds.
    np.testing.assert_allclose(load_image(path, convert=True), expected, atol=1)


def test_a_jpeg_2000_may_have_colours_multiplied_by_alpha(tmp_path: Path) -> None:
    content = io.BytesIO()
    Image.new("RGBA", (8, 8), (60, 30, 0, 100)).save(content, "JPEG2000")
    broken = bytearray(content.getvalue())
    alpha = broken.index(struct.pack(">3H", 3, 1, 0))  # channel, type, association
    broken[alpha + 3] = 2
    assert "RGB with alpha" in message_of(broken)
    rgb = load_image(broken, convert=True)
    np.testing.assert_array_equal(rgb[0, 0], [60 + 155, 30 + 155, 155])


@pytest.mark.parametrize("count", [1, 3])
def test_gaps_of_8_bits_are_as_white_as_deep_ones(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, count: int
) -> None:
    caplog.set_level(logging.INFO, "tap_deploy")
    array = np.clip(samples(count, 8, np.uint8), 1, None)
    array[:, 3, 4:10] = 0
    array[0, 9, 9] = 0 if count > 1 else 1  # in one band only
    path = write_raster(
        tmp_path / "plain.tif", array, nodata=0, photometric="RGB" if count == 3 else "MINISBLACK"
    )
    expected = np.array(np.broadcast_to(np.moveaxis(array, 0, 2), (HEIGHT, WIDTH, 3)))
    if count == 3:
        np.testing.assert_array_equal(load_image(path), expected)
    expected[3, 4:10] = 255
    with Image.open(path) as opened:
        for source in (path, opened):
            caplog.clear()
            np.testing.assert_array_equal(load_image(source, convert=True), expected)
            assert "1.0% of the pixels have no data and became white" in caplog.text
    if count == 3:
        reversed_bands = load_image(path, convert=True, bands=(3, 2, 1))
        np.testing.assert_array_equal(reversed_bands, expected[..., ::-1])
    inverted = write_raster(tmp_path / "m.tif", array[:1], nodata=0, photometric="MINISWHITE")
    assert (load_image(inverted, convert=True)[3, 4:10] == 255).all()
    negative = 255 - array[:1]
    inverted = write_raster(tmp_path / "m.tif", negative, nodata=255, photometric="MINISWHITE")
    assert (load_image(inverted, convert=True)[3, 4:10] == 255).all()


@pytest.mark.parametrize("convert", [False, True])
def test_gaps_of_many_bands_are_white_with_convert_only(tmp_path: Path, convert: bool) -> None:
    array = np.clip(samples(5, 8, np.uint8), 1, None)
    array[:, 3, 4:10] = 0
    path = write_raster(tmp_path / "scene.tif", array, nodata=0)
    found = load_image(path, bands=(3, 2, 1), convert=convert)
    assert (found[3, 4:10] == (255 if convert else 0)).all()


# What Pillow does not decode


def plain_rasters(folder: Path, array: np.ndarray) -> list[Path]:
    """Files of 8 bits that only GDAL reads: `array` is uint8 [B, H, W]."""
    lossless = {"driver": "JP2OpenJPEG", "quality": 100, "reversible": "yes"}
    big: dict[str, Any] = {"BIGTIFF": "YES", "ENDIANNESS": "BIG"}
    if len(array) == 3:
        big["photometric"] = "RGB"
    # GDAL calls three bands of a JPEG 2000 grey.
    made = [write_raster(folder / "big.tif", array, **big)]
    return [*made, write_raster(folder / "plain.jp2", array, **lossless)]


def pillow_decodes(path: Path) -> bool:
    """Whether this version of Pillow decodes it."""
    try:
        with Image.open(path) as picture:
            picture.load()
    except OSError:
        return False
    return True


def test_what_pillow_does_not_decode_is_read_by_rasterio(tmp_path: Path) -> None:
    array = samples(bits=8, dtype=np.uint8)
    for path in plain_rasters(tmp_path, array):
        rgb = np.moveaxis(array, 0, 2)
        np.testing.assert_array_equal(load_image(path), rgb)
        np.testing.assert_array_equal(load_image(path, bands=(3, 2, 1)), rgb[..., ::-1])
        np.testing.assert_array_equal(load_image(path.read_bytes(), convert=True), rgb)
        assert "at most 599" in message_of(path, max_pixels=599)
    if not pillow_decodes(path):
        with Image.open(path) as opened:
            assert "if it is intact, pass the file itself" in message_of(opened)
    for path in plain_rasters(tmp_path, array[:1]):
        assert "is greyscale" in message_of(path)
        grey = np.repeat(array[0, ..., None], 3, axis=2)
        np.testing.assert_array_equal(load_image(path, convert=True), grey)


def test_deep_and_many_bands_in_a_big_endian_bigtiff(tmp_path: Path) -> None:
    options = {"BIGTIFF": "YES", "ENDIANNESS": "BIG"}
    path = write_raster(tmp_path / "big.tif", samples(), photometric="RGB", **options)
    assert "16 bits" in message_of(path)
    np.testing.assert_array_equal(load_image(path, convert=True), scaled(samples(), 65535))
    path = write_raster(tmp_path / "many.tif", samples(5, 8, np.uint8), **options)
    assert "5 bands; choose" in message_of(path)
    palette = write_raster(
        tmp_path / "palette.tif", samples(1, 8, np.uint8), photometric="PALETTE", **options
    )
    assert "has colour mode P" in message_of(palette, convert=True)


def test_what_only_rasterio_decodes_names_the_extra(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    paths = plain_rasters(tmp_path, samples(bits=8, dtype=np.uint8))
    monkeypatch.setitem(sys.modules, "rasterio.io", None)
    for path in [path for path in paths if path.suffix == ".tif" or not pillow_decodes(path)]:
        with pytest.raises(TapError, match=r'pip install "tap-deploy\[raster\]"'):
            load_image(path)


@pytest.mark.parametrize("name", ["plain.jp2", "big.tif", "plain.tif"])
def test_a_raster_of_8_bits_that_was_cut_is_refused(tmp_path: Path, name: str) -> None:
    array = samples(bits=8, dtype=np.uint8)
    plain_rasters(tmp_path, array)
    write_raster(tmp_path / "plain.tif", array, photometric="RGB")
    content = (tmp_path / name).read_bytes()
    for share in (2, 3, 50):
        assert "truncated or corrupt" in message_of(content[: len(content) * (share - 1) // share])


def test_gaps_become_white_and_are_counted(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "tap_deploy")
    signed = samples(bits=12, dtype=np.int16)
    signed[:, 3, 4:10] = -9999
    signed[0, 9, 9] = -9999  # in one band only: no gap, and no reason to refuse
    floats = np.random.default_rng(0).random((3, HEIGHT, WIDTH), np.float32)
    floats[1, 3, 4:10] = np.nan
    write_raster(tmp_path / "signed.tif", signed, nodata=-9999)
    write_raster(tmp_path / "floats.tif", floats)
    for name in ("signed.tif", "floats.tif"):
        caplog.clear()
        rgb = load_image(tmp_path / name, convert=True)
        assert (rgb[3, 4:10] == 255).all()
        assert (rgb == 255).all(axis=2).sum() < 9
        assert "1.0% of the pixels have no data" in caplog.text
    assert load_image(tmp_path / "signed.tif", convert=True)[9, 9, 0] == 0


def test_white_may_be_zero(tmp_path: Path) -> None:
    array = samples(1)
    path = write_raster(tmp_path / "xray.tif", array, photometric="MINISWHITE")
    expected = 255 - np.repeat(scaled(array, 65535), 3, axis=2)
    np.testing.assert_array_equal(load_image(path, convert=True), expected)


def test_bands_are_chosen_and_counted_from_1(tmp_path: Path) -> None:
    deep, plain = samples(6, bits=11), samples(6, bits=8, dtype=np.uint8)
    for array, white, convert in [(deep, 2047, True), (plain, 255, False)]:
        for interleave in ("band", "pixel"):
            path = write_raster(tmp_path / "scene.tif", array, interleave=interleave)
            message = message_of(path)
            assert "has 6 bands; choose" in message
            assert message.endswith("bands=(3, 2, 1) (--bands 3,2,1)") != convert
            assert message_of(path, convert=True).endswith("bands=(3, 2, 1) (--bands 3,2,1)")
            message = message_of(path, bands=(7, 1, 2), convert=True)
            assert message.endswith("has no band 7; it has bands 1 to 6")
            found = load_image(path, convert=convert, bands=(4, 3, 2))
            np.testing.assert_array_equal(found, scaled(array[[3, 2, 1]], white))
    assert "bits per channel" in message_of(
        write_raster(tmp_path / "scene.tif", deep), bands=(4, 3, 2)
    )


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16])
def test_a_fourth_band_without_a_meaning_has_to_be_chosen(tmp_path: Path, dtype: Any) -> None:
    array = samples(4, bits=8, dtype=dtype)
    files = {
        "unspecified.tif": {"photometric": "RGB", "alpha": "UNSPECIFIED"},
        "grey.tif": {"photometric": "MINISBLACK"},
        "planar.tif": {"photometric": "MINISBLACK", "interleave": "band"},
        "infrared.jp2": {"driver": "JP2OpenJPEG", "quality": 100, "reversible": "yes"},
    }
    for name, options in files.items():
        path = write_raster(tmp_path / name, array, **options)
        assert "has 4 bands; choose" in message_of(path, convert=True)
        found = load_image(path, convert=True, bands=(4, 1, 2))
        np.testing.assert_array_equal(found, scaled(array[[3, 0, 1]], 255))


def test_a_jpeg_2000_says_which_band_is_alpha(tmp_path: Path) -> None:
    Image.new("RGBA", (8, 8), (255, 0, 0, 0)).save(tmp_path / "alpha.jp2")
    assert (load_image(tmp_path / "alpha.jp2", convert=True) == 255).all()
    Image.new("RGBA", (8, 8), (255, 0, 0, 0)).save(tmp_path / "alpha.j2k", no_jp2=True)
    assert "has 4 bands" in message_of(tmp_path / "alpha.j2k", convert=True)


def test_bands_of_what_pillow_reads(tmp_path: Path) -> None:
    array = samples(4, bits=8, dtype=np.uint8)
    rgba = np.ascontiguousarray(np.moveaxis(array, 0, 2))
    Image.fromarray(rgba).save(tmp_path / "rgba.png")
    for source in (tmp_path / "rgba.png", Image.fromarray(rgba), rgba):
        np.testing.assert_array_equal(load_image(source, bands=(4, 2, 1)), rgba[..., [3, 1, 0]])
        assert "has no band 5; it has bands 1 to 4" in message_of(source, bands=(5, 2, 1))
    grey = array[0]
    deep = deep_png(samples(1))
    for source in (grey, Image.fromarray(grey)):
        told = "has no band 3; it has 1 band; leave out bands"
        assert told in message_of(source, bands=(3, 2, 1))
    assert told in message_of(deep, bands=(3, 2, 1), convert=True)
    path = write_raster(tmp_path / "grey.tif", samples(1))
    assert told in message_of(path, bands=(3, 2, 1), convert=True)
    two = write_raster(tmp_path / "two.tif", samples(2))
    assert "2 bands; choose those of" in message_of(two, convert=True)
    assert message_of(two, convert=True).endswith("bands=(1, 1, 1) (--bands 1,1,1)")
    palette = Image.new("P", (6, 5))
    assert "a palette picture" in message_of(palette, bands=(1, 1, 1))


@pytest.mark.parametrize(
    "bands", [(1, 2), (0, 1, 2), (1, 2, 3, 4), (1, 2, 2.5), (True, 1, 1), (), 5]
)
def test_bands_are_three_numbers_from_1(bands: Any) -> None:
    assert "expected the numbers of the red, green and blue" in message_of(
        np.zeros((5, 6, 3), np.uint8), bands=bands
    )


@pytest.mark.parametrize("convert", [False, True])
@pytest.mark.parametrize("count", [3, 5, 32])
def test_an_array_with_its_bands_first_is_refused(count: int, convert: bool) -> None:
    planar = np.zeros((count, 99, 98), np.uint8)
    message = message_of(planar, bands=(3, 2, 1), convert=convert)
    assert f"image is an array [{count}, 99, 98]" in message
    assert ".transpose(1, 2, 0)" in message
    assert load_image(planar.transpose(1, 2, 0), bands=(3, 2, 1)).shape == (99, 98, 3)
    assert load_image(np.zeros((5, 99, 4), np.uint8), bands=(3, 2, 1)).shape == (5, 99, 3)
    assert load_image(np.zeros((60, 50, 224), np.uint8), bands=(9, 8, 7)).shape == (60, 50, 3)


def test_arrays_of_other_types_are_scaled_by_the_same_rule() -> None:
    array = np.moveaxis(samples(6, bits=12), 0, 2)
    assert "uint16" in message_of(array[..., :3])
    expected = scaled(np.moveaxis(array, 2, 0)[:3], 4095)
    np.testing.assert_array_equal(load_image(array[..., :3], convert=True), expected)
    np.testing.assert_array_equal(
        load_image(array, convert=True, bands=(3, 2, 1)), expected[..., ::-1]
    )


@pytest.mark.parametrize("mode", ["I;16", "I", "F"])
def test_deep_greys_in_memory(mode: str) -> None:
    values = np.arange(600).reshape(HEIGHT, WIDTH) * 6
    array = values.astype({"I;16": "u2", "I": "i4", "F": "f4"}[mode])
    grey = Image.fromarray(array / np.float32(4095) if mode == "F" else array)
    assert "more than 8 bits" in message_of(grey)
    found = load_image(grey, convert=True)
    np.testing.assert_allclose(found[..., 0], scaled(values[None], 4095)[..., 0], atol=mode == "F")


def test_an_opened_picture_is_judged_by_its_file(tmp_path: Path) -> None:
    array = samples()
    write_raster(tmp_path / "deep.tif", array, photometric="RGB", interleave="band")
    (tmp_path / "deep.png").write_bytes(deep_png(array))
    write_raster(tmp_path / "deep.jp2", array, "JP2OpenJPEG", quality=100, reversible="yes")
    for name in ("deep.tif", "deep.png", "deep.jp2"):
        for source in (tmp_path / name, io.BytesIO((tmp_path / name).read_bytes())):
            with Image.open(source) as picture:
                position = picture.fp.tell()
                assert "16 bits" in message_of(picture)
                assert picture.fp.tell() == position
                found = load_image(picture, convert=True)
                np.testing.assert_array_equal(found, scaled(array, 65535))
                if picture.format != "JPEG2000":  # Pillow cannot decode this one
                    assert picture.getpixel((0, 0)) == (255, 255, 255)  # it can still be used
    tiff = io.BytesIO((tmp_path / "deep.tif").read_bytes())
    png = io.BytesIO((tmp_path / "deep.png").read_bytes())
    for source in (tmp_path / "deep.png", tiff, png):
        with Image.open(source) as picture:
            picture.load()
            assert "16 bits" in message_of(picture)
            assert "pass the file itself" in message_of(picture, convert=True)


@pytest.mark.parametrize("orientation", [3, 6])
def test_a_deep_picture_is_turned_upright(tmp_path: Path, orientation: int) -> None:
    tifffile = pytest.importorskip("tifffile")
    array = samples()
    exif = Image.Exif()
    exif[0x0112] = orientation
    png = tmp_path / "turned.png"
    png.write_bytes(deep_png(array, png_chunk(b"eXIf", exif.tobytes()[6:])))
    tiff = tmp_path / "turned.tif"
    tag = (0x0112, "H", 1, orientation, True)
    tifffile.imwrite(tiff, array, photometric="rgb", planarconfig="separate", extratags=[tag])
    turned = np.rot90(scaled(array, 65535), {3: 2, 6: -1}[orientation])
    for path in (png, tiff):
        np.testing.assert_array_equal(load_image(path, convert=True), turned)
        with Image.open(path) as picture:
            np.testing.assert_array_equal(load_image(picture, convert=True), turned)


def test_broken_exif_does_not_make_a_deep_picture_unreadable() -> None:
    array = samples()
    for exif in (b"garbage", b"II*\0\xff\xff\xff\x7f", b""):
        content = deep_png(array, png_chunk(b"eXIf", exif))
        np.testing.assert_array_equal(load_image(content, convert=True), scaled(array, 65535))


@pytest.mark.parametrize("tag", [258, 277])  # BitsPerSample, SamplesPerPixel
@pytest.mark.parametrize("kind", [2, 7, 11])  # ASCII, UNDEFINED, FLOAT
def test_tags_of_another_type_are_no_defect_of_ours(tag: int, kind: int) -> None:
    content = io.BytesIO()
    Image.new("L", (6, 5)).save(content, "TIFF", tiffinfo={277: 1})
    broken = bytearray(content.getvalue())
    broken[broken.index(struct.pack("<HH", tag, 3)) + 2] = kind
    message_of(bytes(broken), bands=(1, 1, 2))
    with Image.open(content) as picture:
        picture.tag_v2.tagtype[tag] = kind
        picture.tag_v2[tag] = {2: "x", 7: b"\x08", 11: 1.5}[kind]
        assert load_image(picture, convert=True).shape == (5, 6, 3)


@pytest.mark.parametrize("dtype", [np.complex64, np.int16])
def test_a_stated_white_does_not_excuse_samples_that_cannot_be_scaled(dtype: Any) -> None:
    with pytest.raises(InputError, match="expected integers from 0"):
        picture_scaling.scaled(np.full((1, 5, 6), -1, dtype), "image", mode="L", white=4095)


def test_alpha_has_the_stated_scale(tmp_path: Path) -> None:
    array = np.full((2, HEIGHT, WIDTH), 0, np.uint16)
    array[1] = 2047  # half of 12 bits
    path = write_raster(tmp_path / "alpha.tif", array, nbits=12, alpha="YES")
    assert load_image(path, convert=True)[0, 0].tolist() == [128, 128, 128]


def test_a_raster_leaves_the_warning_filters_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Filters are process-wide: two threads that change and restore them may leave them changed."""
    path = write_raster(tmp_path / "deep.tif", samples(), photometric="RGB")

    def refuse(*_: Any, **__: Any) -> None:
        raise AssertionError("the filters of the process are changed")

    with monkeypatch.context() as patch:
        patch.setattr(warnings, "catch_warnings", refuse)
        load_image(path, convert=True)  # a warning would be an error here


def test_a_note_says_the_range(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "tap_deploy")
    path = write_raster(tmp_path / "deep.tif", samples(bits=11), photometric="RGB")
    load_image(path, convert=True)
    assert f"image '{path}': samples scaled from 0..2047 to 0..255" in caplog.messages
    caplog.clear()
    load_image(np.zeros((5, 6), np.uint8), convert=True)
    assert not caplog.messages


def test_without_the_extra_the_message_has_the_command(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write_raster(tmp_path / "deep.tif", samples(), photometric="RGB")
    monkeypatch.setitem(sys.modules, "rasterio.io", None)
    with pytest.raises(MissingDependencyError, match=r'pip install "tap-deploy\[raster\]"'):
        load_image(path, convert=True)
    assert "16 bits" in message_of(path)  # needs no GDAL to be refused


def test_a_broken_raster_is_one_line(tmp_path: Path) -> None:
    path = write_raster(tmp_path / "deep.tif", samples(), photometric="RGB")
    path.write_bytes(path.read_bytes()[:-500])
    message = message_of(path, convert=True)
    assert "deep.tif' cannot be decoded: TIFF" in message  # GDAL's own reason
    assert "See previous" not in message
    path.write_bytes(path.read_bytes()[:100])
    for message in (message_of(path, convert=True), message_of(path)):
        assert "deep.tif' cannot be" in message
        assert ".tif: " not in message


def test_a_raster_of_another_format_is_not_opened(tmp_path: Path) -> None:
    """A file that is not a TIFF is not opened, although GDAL supports its format."""
    secret = write_raster(tmp_path / "secret.tif", samples(), photometric="RGB")
    virtual = f'<VRTDataset rasterXSize="30" rasterYSize="20"><VRTRasterBand dataType="UInt16" \
band="1"><SimpleSource><SourceFilename>{secret}</SourceFilename></SimpleSource></VRTRasterBand>\
</VRTDataset>'
    (tmp_path / "picture.tif").write_text(virtual)
    assert "not a picture" in message_of(tmp_path / "picture.tif", convert=True, bands=(1, 1, 1))


def test_the_limit_holds_for_rasters(tmp_path: Path) -> None:
    path = write_raster(tmp_path / "deep.tif", samples(), photometric="RGB")
    assert "600 pixels; expected at most 599" in message_of(path, convert=True, max_pixels=599)
    load_image(path, convert=True, max_pixels=600)


def test_the_limit_holds_for_what_a_raster_is_unpacked_in(tmp_path: Path) -> None:
    """A small file may have tiles of gigabytes."""
    options: Any = {"tiled": True, "blockxsize": 32, "blockysize": 32, "interleave": "pixel"}
    path = write_raster(tmp_path / "tiles.tif", samples(), **options)
    assert "1024 pixels; expected at most 1023" in message_of(path, convert=True, max_pixels=1023)
    load_image(path, convert=True, max_pixels=1024)
    write_raster(path, samples(9), **options)
    asked: Any = {"convert": True, "bands": (1, 2, 3)}
    assert "3072 pixels; expected at most 3071" in message_of(path, max_pixels=3071, **asked)
    load_image(path, max_pixels=3072, **asked)
    write_raster(path, samples(9), **{**options, "interleave": "band"})
    load_image(path, max_pixels=1024, **asked)

"""Reads the sample layout (bits, bands, colours) from a picture's header, without decoding.

Pillow's modes do not give this: on reading, Pillow truncates many pictures of more than 8 bits to
``RGB``, shifts the samples of others, and drops bands that it does not use.
"""

from __future__ import annotations

import dataclasses
import io
import re
import struct
from collections.abc import Iterator, Mapping
from typing import IO, Any

from PIL import ExifTags, TiffImagePlugin

from tap_deploy.pictures.png_chunks import SIGNATURE as PNG

MAX_BITS = 8
UNSIGNED, SIGNED, FLOAT = 1, 2, 3  # as in TIFF's SampleFormat
# Reader of samples that are not 8-bit.
PILLOW, RASTERIO, NOBODY = "Pillow", "rasterio", "nobody"
BAND_MODES = ("L", "LA", "RGB", "RGBA", "CMYK")  # modes whose channels are the bands of the file

_BIG_ENDIAN_BIGTIFF = b"MM\0+"  # Pillow parses it as a classic TIFF and fails
_TIFF = (b"II*\0", b"MM\0*", b"II+\0", _BIG_ENDIAN_BIGTIFF)
_JPEG2000 = (b"\0\0\0\x0cjP  \r\n\x87\n", b"\xff\x4f\xff\x51")
_TIFF_COLOURS = {0: "L", 1: "L", 2: "RGB", 3: "P", 5: "CMYK", 6: "YCbCr", 8: "LAB"}
_PNG_MODES = {0: "L", 2: "RGB", 3: "P", 4: "LA", 6: "RGBA"}  # by colour type
_OTHER_COLOURS = {12: "CMYK", 14: "LAB", 18: "YCbCr"}  # by JPEG 2000's EnumCS
# Values of TIFF's ExtraSamples and of JPEG 2000's channel definitions.
_TIFF_PREMULTIPLIED, _JPEG2000_PREMULTIPLIED = 1, 2
_ALPHA = (1, 2)
_GDAL_NO_DATA = 42113  # TIFF tag
_MAX_BOXES = 1000  # boxes read per file; typical files have a few dozen
_HDR_TEXTURES = (94, 95, 96)  # DXGI formats BC6H: float16


@dataclasses.dataclass(frozen=True, kw_only=True)
class Layout:
    """The sample layout of a picture.

    Attributes:
        bits: bits of the deepest sample.
        kind: ``UNSIGNED``, ``SIGNED`` or ``FLOAT``.
        reader: reader of samples with more than 8 bits: ``PILLOW``, ``RASTERIO`` or ``NOBODY``.
        driver: GDAL driver of the format; empty unless ``reader`` is ``RASTERIO``.
        bands: samples per pixel; 0 if rasterio is not needed.
        mode: meaning of the bands as a Pillow mode: ``L``, ``LA``, ``RGB``, ``RGBA``, ``CMYK``, …;
            None if the file leaves the meaning of a band open.
        white: sample value of white, if the file states it.
        no_data: sample value of pixels without data in a TIFF; None without such a value.
        premultiplied: the colours are multiplied by alpha.
        pillow_reads: Pillow can read the file if its samples have 8 bits.
        white_is_zero: 0 is white, and the largest sample is black.
        orientation: EXIF orientation of a TIFF, 1..8.
    """

    bits: int
    kind: int = UNSIGNED
    reader: str = PILLOW
    driver: str = ""
    bands: int = 0
    mode: str | None = ""
    white: int | None = None
    no_data: float | None = None
    premultiplied: bool = False
    pillow_reads: bool = True
    white_is_zero: bool = False
    orientation: int = 1

    @property
    def is_deep(self) -> bool:
        """Whether the samples must be scaled to 8 bits by this package, as Pillow does not."""
        few_bits = self.bits < MAX_BITS and self.bands > 1  # Pillow unpacks a single band only
        return self.bits > MAX_BITS or self.kind != UNSIGNED or few_bits


def layout_of(file: IO[bytes]) -> Layout | None:
    """Return the layout of a file; None if Pillow's mode is sufficient or the header is corrupt."""
    file.seek(0)
    head = file.read(512)
    try:
        for place, signatures, read in _READERS:
            if head.startswith(signatures, place):
                return read(file, head)
        return None
    except Exception:  # corrupt headers raise anything; Pillow reports the fault later
        return None
    finally:
        file.seek(0)


def unclear_bands(name: str, count: int, needs_convert: bool = False) -> str:
    """Return the error message for a raster whose bands must be chosen by the caller."""
    bands = "3, 2, 1" if count >= 3 else "1, 1, 1"
    return (
        f"{name} has {_bands(count)}; choose those of red, green and blue, counted from 1, such as "
        f"bands=({bands}) (--bands {bands.replace(' ', '')})"
        f"{', with convert=True (--convert)' if needs_convert else ''}"
    )


def no_such_band(name: str, count: int, band: int) -> str:
    """Return the error message for a band that the picture does not have."""
    if count == 1:
        return f"{name} has no band {band}; it has 1 band; leave out bands (--bands)"
    return f"{name} has no band {band}; it has bands 1 to {count}"


def _bands(count: int) -> str:
    return f"{count} band{'s' if count != 1 else ''}"


def tiff_layout(tags: Mapping[int, Any]) -> Layout | None:
    """Return the layout from the tags of a TIFF frame (``tag_v2``); None if they are corrupt."""
    try:
        return _of_tags(tags)
    except Exception:  # tag values may have any type
        return None


def _of_tags(tags: Mapping[int, Any]) -> Layout:
    photometric = tags.get(TiffImagePlugin.PHOTOMETRIC_INTERPRETATION, 1)
    bits = int(max(tags.get(TiffImagePlugin.BITSPERSAMPLE, (1,))))
    formats = set(tags.get(TiffImagePlugin.SAMPLEFORMAT, (UNSIGNED,)))
    extra = tags.get(TiffImagePlugin.EXTRASAMPLES, ())
    colours = _TIFF_COLOURS.get(photometric)
    three = 3 if photometric in (2, 6) else 1  # JPEG in TIFF may omit SamplesPerPixel
    bands = int(tags.get(TiffImagePlugin.SAMPLESPERPIXEL, three))
    has_alpha = len(extra) == 1 and extra[0] in _ALPHA
    if colours == "L" and bands == 3 and bits > MAX_BITS:
        colours = "RGB"  # GDAL writes three-band files with this photometric value
    return Layout(
        bits=bits,
        bands=bands,
        mode=_mode(colours, bands, has_alpha),
        kind=next((kind for kind in (FLOAT, SIGNED) if kind in formats), UNSIGNED),
        reader=RASTERIO,
        driver="GTiff",
        no_data=_no_data(tags),
        premultiplied=has_alpha and extra[0] == _TIFF_PREMULTIPLIED,
        white_is_zero=photometric == 0,
        orientation=tags.get(ExifTags.Base.Orientation, 1),
    )


def _no_data(tags: Mapping[int, Any]) -> float | None:
    try:
        return float(tags[_GDAL_NO_DATA].strip("\0 "))
    except (KeyError, ValueError, AttributeError):  # missing, or not a number
        return None


def _mode(colours: str | None, bands: int, has_alpha: bool) -> str | None:
    counts = {"L": 1, "P": 1, "RGB": 3, "YCbCr": 3, "LAB": 3, "CMYK": 4}
    if colours is None or bands != counts[colours] + has_alpha:
        return None
    return colours + "A" * has_alpha


def _tiff(file: IO[bytes], head: bytes) -> Layout:
    start, is_big = head[: 16 if b"+" in head[2:4] else 8], head.startswith(_BIG_ENDIAN_BIGTIFF)
    if is_big:  # Pillow accepts only the little-endian magic; the prefix gives the byte order
        start = b"II+\0" + start[4:]
    directory = TiffImagePlugin.ImageFileDirectory_v2(start, prefix=head[:2])
    file.seek(directory.next)
    directory.load(file)
    return dataclasses.replace(_of_tags(directory), pillow_reads=not is_big)


def _png(file: IO[bytes], head: bytes) -> Layout:
    bits, mode = head[24], _PNG_MODES[head[25]]
    if bits <= MAX_BITS or mode == "L":  # Pillow has a deep mode for grey
        return Layout(bits=bits)
    return Layout(bits=bits, reader=RASTERIO, driver="PNG", bands=len(mode), mode=mode)


def _jpeg2000(file: IO[bytes], head: bytes) -> Layout | None:
    colours, alpha, premultiplied = "", False, False
    start = 0
    if not head.startswith(_JPEG2000[1]):
        for kind, begin, end in _boxes(file, 0, _size(file), {b"jp2h": 0}):
            if kind == b"pclr":
                return None  # with a palette, the samples are indices
            if kind == b"colr":
                colours = colours or _jpeg2000_colours(_bytes(file, begin, min(begin + 7, end)))
            if kind == b"cdef":
                kinds = _channel_kinds(_bytes(file, begin, end))
                alpha = any(kind in _ALPHA for kind in kinds)
                premultiplied = _JPEG2000_PREMULTIPLIED in kinds
            if kind == b"jp2c":
                start = begin
                break
    siz = _bytes(file, start + 4, start + 42)
    bands = struct.unpack(">H", siz[36:38])[0]
    depths = _bytes(file, start + 42, start + 42 + 3 * bands)[::3]
    if not colours:  # GDAL labels three bands as grey unless told otherwise
        colours = "L" if bands - alpha == 1 else "RGB"
    return Layout(
        bits=max((depth & 0x7F) + 1 for depth in depths),
        bands=bands,
        mode=_mode(colours, bands, alpha),
        kind=SIGNED if any(depth & 0x80 for depth in depths) else UNSIGNED,
        reader=RASTERIO,
        driver="JP2OpenJPEG",
        premultiplied=premultiplied,
        pillow_reads=not premultiplied,  # Pillow does not undo the multiplication
    )


def _jpeg2000_colours(box: bytes) -> str:
    method, number = box[0], struct.unpack(">I", box[3:7])[0]
    return _OTHER_COLOURS.get(number, "") if method == 1 else ""


def _channel_kinds(box: bytes) -> list[int]:
    count = struct.unpack(">H", box[:2])[0]
    return [struct.unpack_from(">H", box, 4 + 6 * i)[0] for i in range(count)]


def _avif(file: IO[bytes], head: bytes) -> Layout | None:
    containers = {b"meta": 4, b"iprp": 0, b"ipco": 0}
    flags = 0
    for kind, begin, end in _boxes(file, 0, _size(file), containers):
        if kind == b"av1C":
            flags |= _bytes(file, begin, end)[2]
    return Layout(bits=8 if not flags & 0x40 else 12 if flags & 0x20 else 10)


def _ppm(file: IO[bytes], head: bytes) -> Layout | None:
    fields = re.sub(rb"#[^\r\n]*", b"", head).split()
    white = int(fields[3])
    return Layout(bits=white.bit_length(), white=white)


def _sgi(file: IO[bytes], head: bytes) -> Layout:
    return Layout(bits=8 * head[3], reader=NOBODY)


def _psd(file: IO[bytes], head: bytes) -> Layout:
    return Layout(bits=struct.unpack(">H", head[22:24])[0], reader=NOBODY)


def _dds(file: IO[bytes], head: bytes) -> Layout:
    flags, code = struct.unpack("<I4s", head[80:88])
    bits, kind = MAX_BITS, UNSIGNED  # unless the file says more
    if code == b"DX10" and struct.unpack("<I", head[128:132])[0] in _HDR_TEXTURES:
        bits, kind = 16, FLOAT
    elif flags & 0x40:  # uncompressed: one bit mask per channel
        bits = max(mask.bit_count() for mask in struct.unpack("<4I", head[92:108]))
    return Layout(bits=bits, kind=kind, reader=NOBODY)


_READERS = (
    (0, PNG, _png),
    (0, _TIFF, _tiff),
    (0, _JPEG2000, _jpeg2000),
    (4, (b"ftypavif", b"ftypavis", b"ftypmif1", b"ftypmsf1"), _avif),
    (0, (b"P2", b"P3", b"P5", b"P6"), _ppm),
    (0, b"\x01\xda", _sgi),
    (0, b"8BPS", _psd),
    (0, b"DDS ", _dds),
)


def _boxes(
    file: IO[bytes], start: int, end: int, containers: Mapping[bytes, int]
) -> Iterator[tuple[bytes, int, int]]:
    """Yield kind, begin and end of the contents of each box; descend into containers.

    Args:
        file: the file.
        start: offset of the first box, bytes.
        end: offset after the last box, bytes.
        containers: kind of container -> bytes before its first inner box.
    """
    for _ in range(_MAX_BOXES):
        if start + 8 > end:
            return
        size, kind = struct.unpack(">I4s", _bytes(file, start, start + 8))
        begin = start + 8
        if size == 1:
            size, begin = struct.unpack(">Q", _bytes(file, begin, begin + 8))[0], begin + 8
        stop = min(start + size, end) if size else end
        if stop < begin:
            return
        if kind in containers:
            start = begin + containers[kind]
        else:
            yield kind, begin, stop
            start = stop


def _bytes(file: IO[bytes], begin: int, end: int) -> bytes:
    file.seek(begin)
    return file.read(end - begin)


def _size(file: IO[bytes]) -> int:
    return file.seek(0, io.SEEK_END)

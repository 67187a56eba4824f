"""Strips text chunks and the colour profile from a PNG; Pillow rejects files with large ones."""

from __future__ import annotations

import contextlib
import io
import struct
import zlib
from collections.abc import Iterator
from typing import IO

from PIL import PngImagePlugin

SIGNATURE = b"\x89PNG\r\n\x1a\n"
_LIMITED = (b"iCCP", b"tEXt", b"zTXt", b"iTXt")
# Keywords of texts that may hold the EXIF orientation, as Image.getexif reads them.
_ORIENTATION = (b"Raw profile type exif", b"Raw profile type APP1", b"XML:com.adobe.xmp")


def without_texts(file: IO[bytes]) -> IO[bytes]:
    """Return an in-memory PNG without texts and profile; the file itself if it has neither.

    Texts that may hold the orientation are kept. They are stored uncompressed, for which Pillow's
    limit is larger. Only the first text per keyword is kept, cut at Pillow's limit for compressed
    texts: a small file may contain many, and each may expand to 1000 times its size.

    Raises:
        ValueError: the kept texts exceed Pillow's limit.
    """
    if not any(kind in _LIMITED for kind, _, _ in _chunks(file)):
        file.seek(0)
        return file
    kept = io.BytesIO()
    kept.write(SIGNATURE)
    wanted, size = set(_ORIENTATION), 0
    for kind, start, end in _chunks(file):
        file.seek(start)
        if kind not in _LIMITED:
            kept.write(file.read(end - start))
        elif kind != b"iCCP":
            size += kept.write(_text(kind, file.read(end - start)[8:-4], wanted))
            if size > PngImagePlugin.MAX_TEXT_MEMORY:
                raise ValueError(
                    f"its EXIF or XMP texts take {size >> 20} MB; expected at most "
                    f"{PngImagePlugin.MAX_TEXT_MEMORY >> 20}; save it without metadata"
                )
    kept.seek(0)
    return kept


def _chunks(file: IO[bytes]) -> Iterator[tuple[bytes, int, int]]:
    """Yield kind, start and end of each chunk; the last one may be truncated."""
    size = file.seek(0, io.SEEK_END)
    start = len(SIGNATURE)
    while True:
        file.seek(start)
        head = file.read(8)
        if not head:
            return
        # A truncated chunk header is passed on unchanged, so that Pillow reports it.
        length, kind = struct.unpack(">I4s", head) if len(head) == 8 else (0, b"")
        end = min(start + 12 + length, size)
        yield kind, start, end
        if kind == b"IEND":
            return
        start = end


def _text(kind: bytes, data: bytes, wanted: set[bytes]) -> bytes:
    """Return a wanted text chunk, uncompressed, and remove its keyword; b"" for other chunks."""
    keyword, _, rest = data.partition(b"\0")
    if keyword not in wanted:
        return b""
    wanted.remove(keyword)
    with contextlib.suppress(zlib.error, ValueError, IndexError):  # drop corrupt texts
        if kind == b"zTXt":
            return _chunk(b"tEXt", keyword + b"\0" + _decompressed(rest[1:]))
        if kind == b"iTXt" and rest[0] == 1:
            language, translated, text = rest[2:].split(b"\0", 2)
            words = b"\0".join((keyword, b"\0\0" + language, translated, _decompressed(text)))
            return _chunk(b"iTXt", words)
        return _chunk(kind, data)
    return b""


def _decompressed(data: bytes) -> bytes:
    return zlib.decompressobj().decompress(data, PngImagePlugin.MAX_TEXT_CHUNK)


def _chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

"""PNG without its texts and colour profile: Pillow refuses a picture if those are large."""

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
# Texts that may hold the orientation, as Image.getexif knows them.
_ORIENTATION = (b"Raw profile type exif", b"Raw profile type APP1", b"XML:com.adobe.xmp")


def without_texts(file: IO[bytes]) -> IO[bytes]:
    """Return a PNG without texts and profile, in memory; the file itself if it has neither.

    Texts that may tell the orientation are kept, uncompressed: on those Pillow's limit is wider.
    The first of each keyword is, up to what Pillow takes of a compressed one: a small file may
    hold many, and each may unpack to a thousand times its size.

    Raises:
        ValueError: the texts that are kept are larger than Pillow takes.
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
    """Yield kind, start and end of each chunk; the last one may be cut short."""
    size = file.seek(0, io.SEEK_END)
    start = len(SIGNATURE)
    while True:
        file.seek(start)
        head = file.read(8)
        if not head:
            return
        # A file that was cut within the head keeps what is there, for Pillow to judge.
        length, kind = struct.unpack(">I4s", head) if len(head) == 8 else (0, b"")
        end = min(start + 12 + length, size)
        yield kind, start, end
        if kind == b"IEND":
            return
        start = end


def _text(kind: bytes, data: bytes, wanted: set[bytes]) -> bytes:
    """Return a text chunk, uncompressed, and strike its keyword off; nothing for others."""
    keyword, _, rest = data.partition(b"\0")
    if keyword not in wanted:
        return b""
    wanted.remove(keyword)
    with contextlib.suppress(zlib.error, ValueError, IndexError):  # broken texts tell nothing
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

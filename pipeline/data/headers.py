"""What an image file says of itself, read before any of it is inflated.

A few bytes can ask for gigabytes or hours: by the image's size, a PNG chunk's length, the tiles of a TIFF or JPEG 2000,
the scans of a JPEG. They are refused here, as is what has no gray or RGB pixels, with a message that says what it is.
"""

import io
import math
import struct
from collections.abc import Callable
from typing import Literal, NamedTuple

from PIL import ExifTags, Image, ImageFile, UnidentifiedImageError
from PIL.TiffImagePlugin import (
    BITSPERSAMPLE,
    PHOTOMETRIC_INTERPRETATION,
    PLANAR_CONFIGURATION,
    SAMPLEFORMAT,
    SAMPLESPERPIXEL,
    TILELENGTH,
    TILEWIDTH,
    ImageFileDirectory_v2,
    TiffImageFile,
)

MAX_PIXELS = 100_000_000  # a 100-megapixel camera; 300 MB once decoded, up to 2 GB on the way there
PIL_FORMATS = ("JPEG", "WEBP", "GIF", "BMP", "TIFF", "PPM", "JPEG2000", "AVIF")  # for EPS it would start a program

_MAX_SCANS = 100  # of a JPEG: encoders make 10 to 20, each costs a pass over the whole image
_MAX_TILE = 2**24  # pixels; a TIFF's tile is decoded whole, however small the image
_MAX_TILES = 2**14  # of a JPEG 2000 file, times its components; the decoder takes 9 kB for each before it reads one
_SOF = frozenset(range(0xC0, 0xD0)) - {0xC4, 0xC8, 0xCC}  # start-of-frame markers of a JPEG
_PROGRESSIVE = frozenset({0xC2, 0xC6, 0xCA, 0xCE})
_MAX_SAMPLE_VALUE = 281  # TIFF's tag
_NUMBERS = {1: "uint", 2: "int", 3: "float", 4: "undefined", 5: "complex int", 6: "complex float"}


class UndecodableError(Exception):
    """These bytes are no image that can be used; the message is the reason."""


class Header(NamedTuple):
    """What decoding has to know."""

    height: int
    width: int
    kind: str  # the format's name, for messages
    reader: Literal["opencv", "opencv-unchanged", "pil"]  # unchanged: with 16 bits and alpha
    largest: int = 0  # that a sample can be, by the file's word; 0: it does not say
    alpha: bool = True  # a fourth channel is alpha
    key: int | None = None  # the gray level that stands for transparent
    white_is_zero: bool = False  # where PIL leaves it so, in gray of 16 bits
    orientation: int = 1  # EXIF's, where OpenCV does not see to it


def read_header(data: bytes | memoryview) -> Header:
    """UndecodableError for what cannot be an image or would take too much."""
    if len(data) == 0:
        raise UndecodableError("empty file")
    head = bytes(data[:32])
    if head[:2] == b"\xff\xd8":
        header = _jpeg(bytes(data))
    elif head[:8] == b"\x89PNG\r\n\x1a\n" and len(head) >= 26:
        header = _png(head, data)
    else:
        header = _by_pil(data)
    if header.height * header.width > MAX_PIXELS:
        raise UndecodableError(f"{header.width} x {header.height} pixels; at most {MAX_PIXELS:,} are decoded")
    return header


def orientation_of(read_exif: Callable[[], Image.Exif]) -> int:
    """1 (upright) where it cannot be read: as OpenCV has it."""
    try:
        return int(read_exif().get(ExifTags.Base.Orientation, 1))
    except Exception:  # noqa: BLE001  what PIL's readers raise at damage is anything
        return 1


def _png(head: bytes, data: bytes | memoryview) -> Header:
    width, height, depth, colour = struct.unpack(">IIBB", head[16:26])
    if depth not in (1, 2, 4, 8, 16):
        raise UndecodableError(f"PNG of {depth} bits a sample")
    chunks = _png_chunks(data)
    if depth != 16 and colour in (0, 2, 3) and b"tRNS" not in chunks:
        return Header(height, width, "PNG", "opencv")
    significant = bytes(data[chunks[b"sBIT"]]) if b"sBIT" in chunks and depth == 16 else b""
    key = None
    if b"tRNS" in chunks and colour == 0:  # the one transparency that OpenCV does not turn into alpha
        level = int.from_bytes(data[chunks[b"tRNS"]][:2], "big") & (2**depth - 1)
        key = level if depth == 16 else level * 255 // (2**depth - 1)
    orientation = orientation_of(lambda: _exif(bytes(data[chunks[b"eXIf"]])))  # KeyError: there is none
    bits = max(significant[: 3 if colour in (2, 6) else 1], default=0)
    largest = 2**bits - 1 if bits <= 16 else 0
    return Header(height, width, "PNG", "opencv-unchanged", largest, key=key, orientation=orientation)


def _png_chunks(data: bytes | memoryview) -> dict[bytes, slice]:
    """Kind and place of each chunk. Of whatever length one claims to be, OpenCV takes that much memory first: 4 GiB."""
    position, chunks = 8, {}
    while position + 12 <= len(data):
        length, kind = struct.unpack_from(">I4s", data, position)
        chunks[kind] = slice(position + 8, position + 8 + length)
        position += length + 12
        if kind == b"IEND" and position <= len(data):
            return chunks
    raise UndecodableError("PNG without its end: truncated, or a chunk's length is damaged")


def _exif(data: bytes) -> Image.Exif:
    exif = Image.Exif()
    exif.load(b"Exif\0\0" + data)
    return exif


def _jpeg(data: bytes) -> Header:
    position = 2
    while position + 9 < len(data):
        marker = data[position + 1]
        if data[position] != 0xFF:
            break
        if marker == 0xFF:  # fill byte
            position += 1
            continue
        if marker in _SOF:
            return _jpeg_frame(data, position)
        position += 2 + int.from_bytes(data[position + 2 : position + 4], "big")
    raise UndecodableError("JPEG without a frame header")


def _jpeg_frame(data: bytes, position: int) -> Header:
    bits, height, width, components = struct.unpack(">BHHB", data[position + 4 : position + 10])
    if bits != 8:
        raise UndecodableError(f"JPEG of {bits} bits a sample; those of 8 are read")
    if not height or not width:
        raise UndecodableError(f"JPEG of {width} x {height} pixels")
    if data.rfind(b"\xff\xd9", position) < 0:  # libjpeg would fill the missing part with gray
        raise UndecodableError("JPEG without its end: truncated")
    if data[position + 1] in _PROGRESSIVE and (scans := data.count(b"\xff\xda", position)) > _MAX_SCANS:
        raise UndecodableError(f"JPEG of {scans} scans; at most {_MAX_SCANS} are decoded")
    # OpenCV ignores Adobe's inversion of CMYK
    return Header(height, width, "JPEG", "pil" if components == 4 else "opencv")


def _by_pil(data: bytes | memoryview) -> Header:
    try:
        with Image.open(io.BytesIO(data), formats=PIL_FORMATS) as image:
            if isinstance(image, TiffImageFile):
                return _tiff(image)
            if image.format == "JPEG2000":
                return _jpeg2000(bytes(data))
            return _ppm(image) if image.format == "PPM" else _simple(image)
    except UndecodableError:
        raise
    except UnidentifiedImageError as error:
        raise UndecodableError(_unidentified(data)) from error
    except Exception as error:  # what PIL's readers raise at damage is anything
        raise UndecodableError(f"unreadable header: {error}") from error


def _unidentified(data: bytes | memoryview) -> str:
    try:
        return _no_pixels(_tiff_tags(data))
    except Exception:  # noqa: BLE001  it is no TIFF, or one without a readable header
        return f"no image format that is known here: begins with {bytes(data[:8])!r}"


def _simple(image: Image.Image) -> Header:
    return Header(image.height, image.width, str(image.format), "pil")


def _ppm(image: ImageFile.ImageFile) -> Header:
    if image.mode == "F":
        raise UndecodableError("PFM, of floats: their range is unknown; gray or RGB of 8 or 16 unsigned bits works")
    arguments = image.tile[0].args  # of PIL's decoder: a mode alone, or with the largest value, to which it scales
    largest = arguments[1] if isinstance(arguments, tuple) else 0
    if image.mode == "RGB" and largest == 65535:  # PIL would drop the low bytes
        return _simple(image)._replace(reader="opencv-unchanged")
    return _simple(image)._replace(largest=65535 if 255 < largest < 65535 else 0)


def _jpeg2000(data: bytes) -> Header:
    """By the codestream, which the decoder goes by; the header of the file around it may say another size."""
    start = data.find(b"\xff\x4f\xff\x51")
    right, bottom, left, top, tile_width, tile_height, tiles_left, tiles_top, components = struct.unpack_from(
        ">8IH", data, start + 8
    )
    tiles = math.ceil((right - tiles_left) / tile_width) * math.ceil((bottom - tiles_top) / tile_height)
    if tiles * components > _MAX_TILES:
        raise UndecodableError(f"JPEG 2000 of {tiles} tiles, {components} components; at most {_MAX_TILES} in all")
    bits = (data[start + 42] & 0x7F) + 1
    return Header(bottom - top, right - left, "JPEG 2000", "pil", 65535 if bits < 16 else 0)  # PIL scales to 16 bits


def _tiff(image: TiffImageFile) -> Header:
    tags = image.tag_v2
    if image.mode in ("I", "F"):
        raise UndecodableError(_no_pixels(tags))
    tile = tags.get(TILEWIDTH, 0) * tags.get(TILELENGTH, 0)
    if tile > max(_MAX_TILE, 4 * image.height * image.width):
        raise UndecodableError(f"TIFF of {image.width} x {image.height} pixels in tiles of {tile:,}")
    bits = _values(tags, BITSPERSAMPLE, 1)
    largest = int(max(_values(tags, _MAX_SAMPLE_VALUE, 0)))
    header = _simple(image)._replace(largest=largest if bits[0] == 16 else 2 ** bits[0] - 1)
    if image.mode in ("RGB", "RGBA", "RGBX") and set(bits) == {16} and _values(tags, PLANAR_CONFIGURATION, 1) == (1,):
        return header._replace(reader="opencv-unchanged", alpha=image.mode == "RGBA")  # PIL would drop the low bytes
    return header._replace(white_is_zero=_values(tags, PHOTOMETRIC_INTERPRETATION, 1) == (0,))


def _tiff_tags(data: bytes | memoryview) -> ImageFileDirectory_v2:
    """Of the first image in the file."""
    file = io.BytesIO(data)
    head = file.read(8)
    tags = ImageFileDirectory_v2(head + file.read(8) if head[2] == 43 else head)  # 43: BigTIFF
    file.seek(tags.next)
    tags.load(file)
    return tags


def _values(tags: ImageFileDirectory_v2, tag: int, default: int) -> tuple[int, ...]:
    value = tags.get(tag, default)
    return value if isinstance(value, tuple) else (value,)


def _no_pixels(tags: ImageFileDirectory_v2) -> str:
    """What a TIFF is that PIL does not take for an image."""
    bands = tags.get(SAMPLESPERPIXEL, 1)
    kinds = {
        f"{_NUMBERS.get(kind, 'unknown ')}{bits}"
        for kind, bits in zip(_values(tags, SAMPLEFORMAT, 1), _values(tags, BITSPERSAMPLE, 1), strict=False)
    }
    return (
        f"TIFF of {bands} band{'' if bands == 1 else 's'} ({', '.join(sorted(kinds))}), photometric interpretation "
        f"{tags.get(PHOTOMETRIC_INTERPRETATION, 'unsaid')}: not gray or RGB pixels of 8 or 16 unsigned bits; choose "
        "one band or three and convert them, e.g. to RGB of 8 bits"
    )

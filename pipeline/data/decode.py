"""Bytes of an image file -> RGB pixels, with the cases that real image sets hold.

Gray, palette, alpha (dropped), 16-bit, CMYK and EXIF-rotated files come out as upright 8-bit RGB. OpenCV decodes
(libjpeg-turbo underneath, 1.7x PIL's speed); PIL takes what OpenCV gets wrong or does not know. Sizes are read
from the header first, so a decompression bomb is refused before a byte of it is inflated.
"""

import io
import struct

import cv2
import numpy as np
from numpy.typing import NDArray
from PIL import ExifTags, Image, UnidentifiedImageError
from PIL.TiffImagePlugin import BITSPERSAMPLE, TiffImageFile

MAX_PIXELS = 100_000_000  # a 100-megapixel camera; 300 MB once decoded

_REDUCED = {1: cv2.IMREAD_COLOR_RGB, 2: cv2.IMREAD_REDUCED_COLOR_2, 4: cv2.IMREAD_REDUCED_COLOR_4}
_REDUCED[8] = cv2.IMREAD_REDUCED_COLOR_8
_PIL_FORMATS = ("JPEG", "WEBP", "GIF", "BMP", "TIFF", "PPM", "JPEG2000", "AVIF")  # for EPS it would start a program
_UPRIGHT = {  # what undoes an orientation
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
_SOF = frozenset(range(0xC0, 0xD0)) - {0xC4, 0xC8, 0xCC}  # start-of-frame markers of a JPEG


class UndecodableError(Exception):
    """These bytes are no image that can be used; the message is the reason."""


def decode(data: bytes | memoryview, min_crop_area: float = 0.0, size: int = 0) -> NDArray[np.uint8]:
    """Decode to (H, W, 3) uint8 RGB, upright.

    With ``size``, a JPEG may come out at 1/2, 1/4 or 1/8 (by scaled DCT, an antialiased reduction), as long as a
    square crop of the share ``min_crop_area`` of the image keeps at least ``size`` pixels a side.
    Raises UndecodableError with the reason.
    """
    if len(data) == 0:
        raise UndecodableError("empty file")
    height, width, kind = _header(data)
    if height * width > MAX_PIXELS:
        raise UndecodableError(f"{width} x {height} pixels; at most {MAX_PIXELS:,} are decoded")
    if kind == "pil":
        return _decode_pil(data)
    reduction = 1
    while kind == "jpeg" and size and reduction < 8:
        if min_crop_area * height * width < (2 * reduction * size) ** 2:
            break
        reduction *= 2
    try:
        image = cv2.imdecode(np.frombuffer(data, np.uint8), _REDUCED[reduction])
    except cv2.error as error:
        raise UndecodableError(f"damaged {kind}: {error.err}") from error
    if image is None:
        raise UndecodableError(f"damaged {kind}")
    if reduction > 1:  # OpenCV has no RGB flavour of the reduced modes
        cv2.cvtColor(image, cv2.COLOR_BGR2RGB, dst=image)
    pixels: NDArray[np.uint8] = np.asarray(image)
    return pixels


def _header(data: bytes | memoryview) -> tuple[int, int, str]:
    """(height, width, "jpeg" | "png" | "pil") without decoding."""
    head = bytes(data[:32])
    if head[:2] == b"\xff\xd8":
        return _jpeg_header(bytes(data))
    if head[:8] == b"\x89PNG\r\n\x1a\n" and len(head) >= 24:
        width, height = struct.unpack(">II", head[16:24])
        _check_png_chunks(data)
        return height, width, "png"
    try:
        with Image.open(io.BytesIO(data), formats=_PIL_FORMATS) as image:
            return image.height, image.width, "pil"
    except UnidentifiedImageError as error:
        raise UndecodableError(f"no image format that is known here: begins with {head[:8]!r}") from error
    except Exception as error:  # what PIL's readers raise at damage is anything
        raise UndecodableError(f"unreadable header: {error}") from error


def _check_png_chunks(data: bytes | memoryview) -> None:
    """Of whatever length a chunk claims to be, OpenCV takes that much memory first: up to 4 GiB."""
    position = 8
    while position + 12 <= len(data):
        length, kind = struct.unpack_from(">I4s", data, position)
        position += length + 12
        if kind == b"IEND" and position <= len(data):
            return
    raise UndecodableError("PNG without its end: truncated, or a chunk's length is damaged")


def _jpeg_header(data: bytes) -> tuple[int, int, str]:
    position = 2
    while position + 9 < len(data):
        marker = data[position + 1]
        if data[position] != 0xFF:
            break
        if marker == 0xFF:  # fill byte
            position += 1
            continue
        if marker in _SOF:
            height, width, components = struct.unpack(">HHB", data[position + 5 : position + 10])
            if not height or not width:
                raise UndecodableError(f"JPEG of {width} x {height} pixels")
            if data.rfind(b"\xff\xd9", position) < 0:  # libjpeg would fill the missing part with gray
                raise UndecodableError("JPEG without its end: truncated")
            return height, width, "pil" if components == 4 else "jpeg"  # CMYK: OpenCV ignores Adobe's inversion
        position += 2 + int.from_bytes(data[position + 2 : position + 4], "big")
    raise UndecodableError("JPEG without a frame header")


def _decode_pil(data: bytes | memoryview) -> NDArray[np.uint8]:
    try:
        with Image.open(io.BytesIO(data), formats=_PIL_FORMATS) as image:
            if image.mode in ("I", "F") and image.format != "PPM":
                raise UndecodableError(
                    f"numbers of unknown range (PIL's mode {image.mode}); gray files of 8 or 16 unsigned bits work"
                )
            image.load()  # which turns a TIFF upright and says so in its EXIF
            turn = _UPRIGHT.get(_orientation(image))
            upright = image if turn is None else image.transpose(turn)
            if image.mode.startswith("I"):
                # PIL would clip these at 255, to white. A TIFF may have 12 bits; PIL scales a PGM's to 16
                bits = int(image.tag_v2[BITSPERSAMPLE][0]) if isinstance(image, TiffImageFile) else 16
                return (np.asarray(upright)[..., None] >> (bits - 8)).astype(np.uint8).repeat(3, axis=2)
            return np.asarray(upright.convert("RGB"))
    except UndecodableError:
        raise
    except Exception as error:  # what PIL's readers raise at damage is anything
        raise UndecodableError(f"damaged image: {error}") from error


def _orientation(image: Image.Image) -> int:
    """EXIF's, 1 (upright) where it cannot be read: as OpenCV has it."""
    try:
        return int(image.getexif().get(ExifTags.Base.Orientation, 1))
    except Exception:  # noqa: BLE001  what PIL's readers raise at damage is anything
        return 1

"""Bytes of an image file -> RGB pixels, with the cases that real image sets hold.

Gray, palette, CMYK and EXIF-rotated files come out as upright 8-bit RGB. What is transparent is laid on white: the
colours under it are whatever the program left there, often black, and drawings and logos are made for white paper.

Of 16 bits the high 8 of those in use are kept. How many are in use the file may say (PNG's sBIT, TIFF's BitsPerSample
and MaxSampleValue, a PGM's maxval); else it is the least of 8, 10, 12, 14 and 16 that holds the image's largest value,
for sensors of 10 to 14 bits are stored in 16. So an image whose values all are below 1/4 of the range comes out
brighter; write MaxSampleValue or sBIT where that must not be.

OpenCV decodes (libjpeg-turbo underneath, 1.7x PIL's speed); PIL takes what OpenCV gets wrong or does not know.
"""

import io

import cv2
import numpy as np
from numba import uint8, uint32
from numpy.typing import NDArray
from PIL import Image

from pipeline.data.compiled import compiled
from pipeline.data.headers import PIL_FORMATS, Header, UndecodableError, orientation_of, read_header

_REDUCED = {1: cv2.IMREAD_COLOR_RGB, 2: cv2.IMREAD_REDUCED_COLOR_2, 4: cv2.IMREAD_REDUCED_COLOR_4}
_REDUCED[8] = cv2.IMREAD_REDUCED_COLOR_8
_UPRIGHT = {  # what undoes an orientation
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
_DEPTHS = (8, 10, 12, 14, 16)  # bits of sensors, and of what is stored in 16


def decode(data: bytes | memoryview, min_crop_area: float = 0.0, size: int = 0) -> NDArray[np.uint8]:
    """Decode to (H, W, 3) uint8 RGB, upright.

    With ``size``, a JPEG may come out at 1/2, 1/4 or 1/8 (by scaled DCT, an antialiased reduction), as long as a
    square crop of the share ``min_crop_area`` of the image, and the image's shorter side, keep at least ``size`` pixels
    a side. Raises UndecodableError with the reason.
    """
    header = read_header(data)
    if header.reader == "pil":
        return _decode_pil(data, header)
    if header.reader == "opencv-unchanged":
        return _decode_unchanged(data, header)
    reduction = 1
    while header.kind == "JPEG" and size and reduction < 8:
        area, shorter = header.height * header.width, min(header.height, header.width)
        if min_crop_area * area < (2 * reduction * size) ** 2 or shorter < 2 * reduction * size:
            break
        reduction *= 2
    pixels = _decode_opencv(data, _REDUCED[reduction], header)
    if reduction > 1:  # OpenCV has no RGB flavour of the reduced modes
        cv2.cvtColor(pixels, cv2.COLOR_BGR2RGB, dst=pixels)
    return pixels


def _decode_opencv(data: bytes | memoryview, flags: int, header: Header) -> NDArray[np.uint8]:
    try:
        image = cv2.imdecode(np.frombuffer(data, np.uint8), flags)
    except cv2.error as error:
        raise UndecodableError(f"damaged {header.kind}: {error.err}") from error
    if image is None:
        raise UndecodableError(f"damaged {header.kind}")
    return np.asarray(image)


def _decode_unchanged(data: bytes | memoryview, header: Header) -> NDArray[np.uint8]:
    """What has 16 bits or alpha."""
    samples = _decode_opencv(data, cv2.IMREAD_UNCHANGED, header)  # (H, W), or BGR, or BGRA
    clear = samples == header.key if header.key is not None else None
    levels = _levels(samples, header.largest)
    if levels.ndim == 2:
        pixels = np.asarray(cv2.cvtColor(levels, cv2.COLOR_GRAY2RGB), np.uint8)
    elif levels.shape[2] == 4 and header.alpha:
        cv2.cvtColor(levels, cv2.COLOR_BGRA2RGBA, dst=levels)
        pixels = _on_white(levels)
    else:
        code = cv2.COLOR_BGRA2RGB if levels.shape[2] == 4 else cv2.COLOR_BGR2RGB
        pixels = np.asarray(cv2.cvtColor(levels, code), np.uint8)
    if clear is not None:
        pixels[clear] = 255
    turn = _UPRIGHT.get(header.orientation)
    return pixels if turn is None else np.asarray(Image.fromarray(pixels).transpose(turn))


def _levels(samples: NDArray[np.integer], largest: int = 0) -> NDArray[np.uint8]:
    """8 bits of each sample (H, W) or (H, W, C); alpha has a depth of its own."""
    if samples.dtype == np.uint8:
        return samples.astype(np.uint8, copy=False)
    levels = np.empty(samples.shape, np.uint8)
    colours = (..., slice(3)) if samples.ndim == 3 else ...
    np.right_shift(samples[colours], _depth(samples[colours], largest) - 8, out=levels[colours], casting="unsafe")
    if samples.ndim == 3 and samples.shape[2] == 4:
        levels[..., 3] = _levels(samples[..., 3])
    return levels


def _depth(samples: NDArray[np.integer], largest: int) -> int:
    """How many bits are in use, at least 8; ``largest``: what a sample can be by the file's word, or 0."""
    found = int(samples.max())
    if largest:  # one that is larger after all was scaled to 16 bits, as PNG demands of sBIT
        return max(largest.bit_length(), 8) if found <= largest else 16
    return next(depth for depth in _DEPTHS if found < 1 << depth)


def _on_white(pixels: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """(H, W, 4) RGBA, the colours not multiplied by alpha -> (H, W, 3)."""
    height, width, _ = pixels.shape
    opaque = np.empty((height, width, 3), np.uint8)
    _lay_on_white(pixels.reshape(-1, 4), opaque.reshape(-1, 3))
    return opaque


@compiled("Array(uint8, 2, 'C', readonly=True)", "uint8[:, ::1]")
def _lay_on_white(rgba: NDArray[np.uint8], rgb: NDArray[np.uint8]) -> None:
    """Rounded; alpha 255 changes nothing."""
    for i in range(len(rgba)):
        alpha = uint32(rgba[i, 3])
        white = uint32(255 * (255 - alpha) + 127)
        for channel in range(3):
            rgb[i, channel] = uint8((uint32(rgba[i, channel]) * alpha + white) // uint32(255))


def _decode_pil(data: bytes | memoryview, header: Header) -> NDArray[np.uint8]:
    try:
        with Image.open(io.BytesIO(data), formats=PIL_FORMATS) as image:
            image.load()  # which turns a TIFF upright and says so in its EXIF
            turn = _UPRIGHT.get(orientation_of(image.getexif))
            upright = image if turn is None else image.transpose(turn)
        if upright.mode.startswith("I"):  # PIL would clip these at 255, to white
            gray = _levels(np.asarray(upright), header.largest)
            return (~gray if header.white_is_zero else gray)[..., None].repeat(3, axis=2)
        if upright.has_transparency_data:
            return _on_white(np.asarray(upright.convert("RGBA")))
        return np.asarray(upright if upright.mode == "RGB" else upright.convert("RGB"))
    except Exception as error:  # what PIL's readers raise at damage is anything
        raise UndecodableError(f"damaged image: {error}") from error

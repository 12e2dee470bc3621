"""Pixels as people mean them: transparent drawings, 10 to 14 bits in files of 16, and TIFFs that are no pictures."""

import io
import struct
import zlib
from collections.abc import Callable

import cv2
import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image, ImageOps

from pipeline.data.decode import decode
from pipeline.data.headers import UndecodableError
from tests.data.images import jpeg, photo

PHOTO = photo(40, 30)
Tags = dict[int, tuple[str, tuple[int, ...]]]  # number: its type in struct's letters, its values


def encoded(image: Image.Image, kind: str, **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)  # type: ignore[arg-type]
    return buffer.getvalue()


def opencv(kind: str, pixels: NDArray[np.integer]) -> bytes:
    """By OpenCV, which writes 16 bits a channel; ``pixels`` are gray, RGB or RGBA."""
    order = [2, 1, 0, 3][: pixels.shape[2]] if pixels.ndim == 3 else ...
    return bytes(cv2.imencode(f".{kind}", pixels[..., order] if pixels.ndim == 3 else pixels)[1])


def with_chunk(png: bytes, kind: bytes, content: bytes) -> bytes:
    """Behind the header."""
    return (
        png[:33]
        + struct.pack(">I", len(content))
        + kind
        + content
        + struct.pack(">I", zlib.crc32(kind + content))
        + png[33:]
    )


def tiff(pixels: NDArray[np.generic], **extra: tuple[str, tuple[int, ...]]) -> bytes:
    """(H, W) or (H, W, bands), uncompressed in one strip; ``extra``: t<tag>=(struct's letter, values)."""
    pixels = pixels[..., None] if pixels.ndim == 2 else pixels
    height, width, bands = pixels.shape
    data, number = pixels.tobytes(), {"u": 1, "i": 2, "f": 3}[pixels.dtype.kind]
    tags: Tags = {
        256: ("I", (width,)),
        257: ("I", (height,)),
        258: ("H", (8 * pixels.itemsize,) * bands),
        259: ("H", (1,)),
        262: ("H", (2 if bands == 3 else 1,)),
        273: ("I", (8,)),
        277: ("H", (bands,)),
        278: ("I", (height,)),
        279: ("I", (len(data),)),
        339: ("H", (number,) * bands),
    }
    tags |= {int(name[1:]): value for name, value in extra.items()}
    entries, outside = b"", b""
    for tag, (letter, values) in sorted(tags.items()):
        packed = struct.pack(f"<{len(values)}{letter}", *values)
        if len(packed) > 4:
            place = 8 + len(data) + 2 + 12 * len(tags) + 4 + len(outside)
            packed, outside = struct.pack("<I", place), outside + packed
        entries += struct.pack("<HHI", tag, {"H": 3, "I": 4}[letter], len(values)) + packed.ljust(4, b"\0")
    return (
        struct.pack("<2sHI", b"II", 42, 8 + len(data))
        + data
        + struct.pack("<H", len(tags))
        + entries
        + bytes(4)
        + outside
    )


# --- alpha -----------------------------------------------------------------------------------------------------------


def on_white(data: bytes) -> NDArray[np.uint8]:
    """PIL's."""
    with Image.open(io.BytesIO(data)) as image:
        layer = ImageOps.exif_transpose(image).convert("RGBA")
        return np.asarray(Image.alpha_composite(Image.new("RGBA", layer.size, "white"), layer).convert("RGB"))


def see_through() -> Image.Image:
    """Alpha of all levels; where it is 0 the colour is black, as most programs leave it."""
    alpha = np.arange(40 * 30).reshape(40, 30) % 256
    return Image.fromarray(np.dstack([PHOTO * (alpha > 0)[..., None], alpha]).astype(np.uint8))


ROTATED = Image.Exif()
ROTATED[0x0112] = 6
CLEAR = see_through()
PALETTE = CLEAR.convert("RGB").quantize(16)
TRANSPARENT = {
    "RGBA PNG": encoded(CLEAR, "PNG"),
    "RGBA PNG, rotated by its EXIF": encoded(CLEAR, "PNG", exif=ROTATED),
    "RGBA PNG of 16 bits": opencv("png", np.asarray(CLEAR).astype(np.uint16) * 257),
    "gray PNG with alpha": encoded(CLEAR.convert("LA"), "PNG"),
    "gray PNG with a transparent level": encoded(
        CLEAR.convert("L"), "PNG", transparency=int(np.asarray(CLEAR.convert("L"))[9, 9])
    ),
    "1-bit PNG with a transparent level": encoded(CLEAR.convert("1"), "PNG", transparency=0),
    "RGB PNG with a transparent colour": encoded(CLEAR.convert("RGB"), "PNG", transparency=(0, 0, 0)),
    "palette PNG with a transparent entry": encoded(PALETTE, "PNG", transparency=3),
    "palette PNG with alpha": encoded(PALETTE, "PNG", transparency=bytes(range(0, 256, 16))),
    "palette PNG of 4 bits": encoded(PALETTE, "PNG", transparency=2, bits=4),
    "GIF": encoded(PALETTE, "GIF", transparency=3),
    "animated GIF": encoded(PALETTE, "GIF", transparency=3, save_all=True, append_images=[PALETTE.rotate(180)]),
    "WebP": encoded(CLEAR, "WEBP", lossless=True, exact=True),
    "animated WebP": encoded(CLEAR, "WEBP", lossless=True, save_all=True, append_images=[CLEAR.rotate(180)]),
    "TIFF": encoded(CLEAR, "TIFF"),
    "TIFF, premultiplied": tiff(np.asarray(CLEAR.convert("RGBa")), t262=("H", (2,)), t338=("H", (1,))),
    "TIFF of 16 bits": opencv("tiff", np.asarray(CLEAR).astype(np.uint16) * 257),
    "JPEG 2000": encoded(CLEAR, "JPEG2000"),
    "AVIF": encoded(CLEAR, "AVIF"),
}


@pytest.mark.parametrize("name", TRANSPARENT)
def test_what_is_transparent_is_white(name: str) -> None:
    ours, expected = decode(TRANSPARENT[name]), on_white(TRANSPARENT[name])
    assert ours.shape == expected.shape
    assert np.abs(ours.astype(int) - expected).max() <= 1, "rounding"
    assert (expected == 255).all(axis=2).any()


def test_the_transparent_level_of_a_gray_png_of_16_bits_is_white() -> None:
    """PIL does not know of it."""
    gray = PHOTO[..., 0].astype(np.uint16) * 257
    pixels = decode(with_chunk(opencv("png", gray), b"tRNS", struct.pack(">H", gray[5, 6])))
    assert (pixels == np.where(gray == gray[5, 6], 255, PHOTO[..., 0])[..., None]).all()


@pytest.mark.parametrize("kind", ["PNG", "TIFF", "WEBP"])
def test_where_alpha_is_255_pixels_are_what_they_are_without(kind: str) -> None:
    image = Image.fromarray(PHOTO)
    options = {"lossless": True} if kind == "WEBP" else {}
    assert (decode(encoded(image.convert("RGBA"), kind, **options)) == PHOTO).all()
    assert (decode(encoded(image, kind, **options)) == PHOTO).all()


# --- bits ------------------------------------------------------------------------------------------------------------


DEEP: dict[str, Callable[[NDArray[np.uint16]], bytes]] = {
    "gray PNG": lambda deep: opencv("png", deep[..., 0]),
    "RGB PNG": lambda deep: opencv("png", deep),
    "RGBA PNG": lambda deep: opencv("png", np.dstack([deep, np.full(deep.shape[:2], 65535)]).astype(np.uint16)),
    "gray TIFF": lambda deep: encoded(Image.fromarray(deep[..., 0]), "TIFF"),
    "big-endian TIFF": lambda deep: encoded(Image.fromarray(deep[..., 0].astype(">u2")), "TIFF"),
    "RGB TIFF": lambda deep: opencv("tiff", deep),
    "RGB TIFF, LZW": lambda deep: bytes(cv2.imencode(".tiff", deep[..., ::-1], [cv2.IMWRITE_TIFF_COMPRESSION, 5])[1]),
    "TIFF of RGB and infrared": lambda deep: tiff(np.dstack([deep, deep[..., 1]]), t262=("H", (2,)), t338=("H", (0,))),
    "PGM": lambda deep: opencv("pgm", deep[..., 0]),
    "PPM": lambda deep: opencv("ppm", deep),
    "gray JPEG 2000": lambda deep: encoded(Image.fromarray(deep[..., 0]), "JPEG2000"),
}


def of_bits(bits: int) -> NDArray[np.uint16]:
    """PHOTO in the high 8 of ``bits``, with its brightest pixel at the end of the range."""
    deep = PHOTO.astype(np.uint16) << (bits - 8)
    deep[0, 0] = 2**bits - 1
    return deep


@pytest.mark.parametrize("bits", [8, 10, 12, 14, 16])
@pytest.mark.parametrize("name", DEEP)
def test_sensors_bits_in_a_file_of_16(name: str, bits: int) -> None:
    pixels = decode(DEEP[name](of_bits(bits)))
    expected = PHOTO.copy() if "gray" not in name and name not in ("PGM", "big-endian TIFF") else PHOTO[..., [0, 0, 0]]
    expected[0, 0] = 255
    assert (pixels == expected).all()


@pytest.mark.parametrize("orientation", range(1, 9))
def test_an_rgb_tiff_of_16_bits_is_upright(orientation: int) -> None:
    data = tiff(of_bits(12), t274=("H", (orientation,)))
    with Image.open(io.BytesIO(tiff(PHOTO, t274=("H", (orientation,))))) as image:
        expected = np.array(ImageOps.exif_transpose(image))
    pixels = decode(data)
    assert pixels.shape == expected.shape
    assert (pixels != expected).any(axis=2).sum() <= 1, "the pixel at the end of the range"


def dark(value: int) -> NDArray[np.uint16]:
    return np.full((9, 7), value, np.uint16)


@pytest.mark.parametrize(
    ("data", "level"),
    [
        (opencv("png", dark(1000)), 1000 >> 2),
        (with_chunk(opencv("png", dark(1000)), b"sBIT", b"\x0c"), 1000 >> 4),
        (with_chunk(opencv("png", dark(1000)), b"sBIT", b"\x10"), 1000 >> 8),
        (with_chunk(opencv("png", dark(1000 << 4)), b"sBIT", b"\x0c"), 1000 >> 4),  # scaled, as PNG demands
        (with_chunk(opencv("png", dark(1000)), b"sBIT", b"\xff"), 1000 >> 2),  # nonsense says nothing
        (tiff(dark(1000)), 1000 >> 2),
        (tiff(dark(1000), t281=("H", (4095,))), 1000 >> 4),
        (tiff(dark(1000), t281=("H", (65535,))), 1000 >> 8),
        (tiff(np.dstack([dark(1000)] * 3), t281=("H", (4095,) * 3)), 1000 >> 4),
        (tiff(dark(1000), t262=("H", (0,)), t281=("H", (4095,))), 255 - (1000 >> 4)),  # white is zero
        (b"P5 1 1 4095\n" + struct.pack(">H", 1000), 1000 >> 4),
        (b"P6 1 1 4095\n" + struct.pack(">3H", *[1000] * 3), 1000 >> 4),
        (b"P5 1 1 65535\n" + struct.pack(">H", 1000), 1000 >> 2),
    ],
    ids=lambda value: value if isinstance(value, int) else "",
)
def test_a_file_s_word_on_its_bits_counts(data: bytes, level: int) -> None:
    assert (decode(data) == level).all()


# --- what is no picture ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (
            tiff(np.zeros((5, 4, 13), np.float32)),
            r"^TIFF of 13 bands \(float32\), .*: not gray or RGB pixels .* 8 bits$",
        ),
        (tiff(np.zeros((5, 4, 13), np.uint16)), r"TIFF of 13 bands \(uint16\)"),
        (tiff(np.zeros((5, 4, 6), np.uint8)), r"TIFF of 6 bands \(uint8\)"),
        (tiff(np.zeros((5, 4, 3), np.float32)), r"TIFF of 3 bands \(float32\)"),
        (tiff(np.zeros((5, 4), np.float64)), r"TIFF of 1 band \(float64\)"),
        (tiff(np.zeros((5, 4), np.float16)), r"TIFF of 1 band \(float16\)"),
        (tiff(np.zeros((5, 4), np.int16)), r"TIFF of 1 band \(int16\)"),
        (tiff(np.zeros((5, 4), np.uint32)), r"TIFF of 1 band \(uint32\)"),
        (b"Pf 1 1 -1.0\n" + struct.pack("<f", 0.5), "PFM, of floats"),
        (jpeg(PHOTO).replace(b"\xff\xc0\0\x11\x08", b"\xff\xc1\0\x11\x0c"), "JPEG of 12 bits a sample"),
    ],
    ids=lambda value: "" if isinstance(value, bytes) else value,
)
def test_what_has_no_pixels_says_what_it_is(data: bytes, reason: str) -> None:
    with pytest.raises(UndecodableError, match=reason):
        decode(data)


def test_avif_and_jpeg_by_other_names() -> None:
    """The name's ending plays no part: .jfif and .jpe are JPEG's."""
    for kind in ("AVIF", "JPEG"):
        data = encoded(Image.fromarray(PHOTO), kind)
        assert np.abs(decode(data).astype(int) - on_white(data)).mean() < 1

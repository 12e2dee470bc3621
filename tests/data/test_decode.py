"""What image sets really hold: PIL is the oracle, and what cannot be used is refused with the reason."""

import io
import resource
import struct
import zlib

import cv2
import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image, ImageOps

from pipeline.data.decode import decode
from pipeline.data.headers import UndecodableError
from tests.data.images import jpeg, photo, png


def encoded(image: Image.Image, kind: str, **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)  # type: ignore[arg-type]
    return buffer.getvalue()


def oracle(data: bytes) -> NDArray[np.uint8]:
    with Image.open(io.BytesIO(data)) as image:
        return np.asarray(ImageOps.exif_transpose(image).convert("RGB"))


RGB = Image.fromarray(photo(60, 80))


def with_orientation(orientation: int, kind: str = "JPEG", mode: str = "RGB") -> bytes:
    exif = Image.Exif()
    exif[0x0112] = orientation
    return encoded(RGB.convert(mode), kind, quality=95, exif=exif)


FILES = {
    "jpeg": encoded(RGB, "JPEG", quality=90),
    "progressive jpeg": encoded(RGB, "JPEG", quality=90, progressive=True),
    "gray jpeg": encoded(RGB.convert("L"), "JPEG"),
    "cmyk jpeg": encoded(RGB.convert("CMYK"), "JPEG", quality=95),
    "png": encoded(RGB, "PNG"),
    "gray png": encoded(RGB.convert("L"), "PNG"),
    "png with alpha": encoded(RGB.convert("RGBA"), "PNG"),
    "palette png": encoded(RGB.convert("P"), "PNG"),
    "1-bit png": encoded(RGB.convert("1"), "PNG"),
    "webp": encoded(RGB, "WEBP", lossless=True),
    "gif": encoded(RGB.convert("P"), "GIF"),
    "bmp": encoded(RGB, "BMP"),
    "tiff": encoded(RGB, "TIFF"),
    "1 x 1 png": encoded(RGB.resize((1, 1)), "PNG"),
    "1 x 1 jpeg": encoded(RGB.resize((1, 1)), "JPEG"),
    **{f"exif orientation {n}": with_orientation(n) for n in range(1, 9)},
    **{f"{kind} of orientation {n}": with_orientation(n, kind) for kind in ("WEBP", "TIFF") for n in range(1, 9)},
    **{f"cmyk of orientation {n}": with_orientation(n, mode="CMYK") for n in range(1, 9)},
    "png with more behind its end": encoded(RGB, "PNG") + bytes(300),
}


@pytest.mark.parametrize("name", FILES)
def test_decodes_as_pil_does(name: str) -> None:
    ours, expected = decode(FILES[name]), oracle(FILES[name])
    assert ours.shape == expected.shape
    assert ours.dtype == np.uint8
    assert np.abs(ours.astype(int) - expected).mean() < 1.0


def test_16_bit_keeps_the_high_byte() -> None:
    deep = (photo(20, 30).astype(np.uint16) << 8) + 77
    assert np.array_equal(decode(cv2.imencode(".png", deep[..., ::-1])[1].tobytes()), photo(20, 30))
    gray = np.ascontiguousarray(deep[..., 0])
    assert np.array_equal(decode(cv2.imencode(".png", gray)[1].tobytes())[..., 1], photo(20, 30)[..., 0])
    for kind, deep_gray in (("TIFF", gray), ("TIFF", gray.astype(">u2")), ("PPM", gray), ("JPEG2000", gray)):
        decoded = decode(encoded(Image.fromarray(deep_gray), kind))
        assert np.array_equal(decoded, photo(20, 30)[..., [0, 0, 0]]), kind


def test_a_tiff_of_12_bits_keeps_the_high_8() -> None:
    data = bytes.fromhex("123fff8007f0")  # 0x123, 0xFFF, 0x800, 0x7F0
    tags = {256: 2, 257: 2, 258: 12, 259: 1, 262: 1, 273: 8, 277: 1, 278: 2, 279: len(data)}
    directory = b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in tags.items())
    tiff = struct.pack("<2sHI", b"II", 42, 8 + len(data)) + data + struct.pack("<H", len(tags)) + directory + bytes(4)
    assert decode(tiff)[..., 0].tolist() == [[0x12, 0xFF], [0x80, 0x7F]]


def bomb(width: int, height: int) -> bytes:
    """A small PNG file that says it is huge."""
    header = b"IHDR" + struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    rest = png(photo(8, 8))[33:]
    return b"\x89PNG\r\n\x1a\n" + struct.pack(">I", 13) + header + struct.pack(">I", zlib.crc32(header)) + rest


def lying_jpeg() -> bytes:
    data = bytearray(jpeg(photo(16, 16)))
    frame = data.index(b"\xff\xc0")
    data[frame + 5 : frame + 9] = struct.pack(">HH", 60_000, 60_000)
    return bytes(data)


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"", "empty file"),
        (b"GARBAGE" * 20, "no image format that is known"),
        (b"\xff\xd8", "without a frame header"),
        (jpeg(photo(60, 80))[:900], "truncated"),
        (png(photo(60, 80))[:900], "truncated"),
        (bomb(30_000, 30_000), "30000 x 30000 pixels; at most"),
        (lying_jpeg(), "60000 x 60000 pixels; at most"),
        (encoded(RGB, "WEBP")[:200], "unreadable|damaged"),
        (encoded(RGB, "TIFF")[:2000], "image|header"),
        (encoded(Image.fromarray(np.full((9, 9), 70_000, np.int32)), "TIFF"), r"TIFF of 1 band \(int32\), .* 16"),
        (encoded(Image.fromarray(np.full((9, 9), 0.5, np.float32)), "TIFF"), r"TIFF of 1 band \(float32\), .* 16"),
    ],
    ids=[
        "empty",
        "garbage",
        "2 bytes",
        "cut jpeg",
        "cut png",
        "bomb",
        "lying jpeg",
        "cut webp",
        "cut tiff",
        "32 bits",
        "floats",
    ],
)
def test_what_cannot_be_used_says_why(data: bytes, reason: str) -> None:
    with pytest.raises(UndecodableError, match=reason):
        decode(data)


def test_exif_that_makes_no_sense_is_passed_over() -> None:
    """Its orientation still counts. PIL's own exif_transpose fails at such a width, which is a text."""
    width = struct.pack(">HHII", 0x100, 2, 6, 38)
    tiff = b"MM\0*\0\0\0\x08\0\x02" + width + struct.pack(">HHIHH", 0x112, 3, 1, 6, 0) + bytes(4) + b"hello\0"
    data = encoded(RGB.convert("CMYK"), "JPEG", quality=95, exif=b"Exif\0\0" + tiff)
    with pytest.raises(struct.error):
        oracle(data)
    assert (decode(data) == decode(with_orientation(6, mode="CMYK"))).all()


SMALL = RGB.resize((24, 18))
DEEP = np.asarray(SMALL).astype(np.uint16) << 4
ROTATED = Image.Exif()
ROTATED[0x0112] = 6
SOUND = {
    "PNG": encoded(SMALL, "PNG", exif=ROTATED),
    "PNG with alpha": encoded(SMALL.convert("RGBA"), "PNG", exif=ROTATED),
    "palette PNG with a transparent entry": encoded(SMALL.quantize(16), "PNG", transparency=3),
    "gray PNG with a transparent level": encoded(SMALL.convert("L"), "PNG", transparency=90),
    "PNG of 16 bits": bytes(cv2.imencode(".png", DEEP)[1]),
    "JPEG": encoded(SMALL, "JPEG", exif=ROTATED),
    "progressive JPEG": encoded(SMALL, "JPEG", progressive=True),
    "CMYK": encoded(SMALL.convert("CMYK"), "JPEG", exif=ROTATED),
    "WebP": encoded(SMALL, "WEBP", exif=ROTATED),
    "GIF": encoded(SMALL.convert("P"), "GIF"),
    "BMP": encoded(SMALL, "BMP"),
    "TIFF": encoded(SMALL, "TIFF", exif=ROTATED),
    "TIFF of 16 bits": bytes(cv2.imencode(".tiff", DEEP)[1]),
    "gray TIFF of 16 bits": encoded(Image.fromarray(DEEP[..., 0]), "TIFF"),
    "PPM": encoded(SMALL, "PPM"),
    "PPM of 16 bits": bytes(cv2.imencode(".ppm", DEEP)[1]),
    "JPEG 2000": encoded(SMALL, "JPEG2000"),
    "AVIF": encoded(SMALL, "AVIF", exif=ROTATED),
}


@pytest.mark.filterwarnings("ignore")  # PIL's, of TIFFs and of large sizes
@pytest.mark.parametrize("name", SOUND)
def test_damage_anywhere_is_never_another_error(name: str) -> None:
    """Bytes changed and ends cut at random: it decodes, or it is undecodable, for a stated reason."""
    data, random, refused = SOUND[name], np.random.default_rng(0), 0
    for _ in range(1500):
        damaged = bytearray(data)
        for place in random.integers(0, min(len(data), 300), random.integers(1, 4)):
            at_end = random.random() < 0.5 and "TIFF" in name  # where their tags are
            damaged[len(data) - 1 - place if at_end else place] = random.choice([0, 255, *random.integers(0, 256, 2)])
        try:
            pixels = decode(bytes(damaged[: len(data) if random.random() < 0.8 else random.integers(1, len(data))]))
            assert pixels.ndim == 3
            assert pixels.dtype == np.uint8
        except UndecodableError:
            refused += 1
    assert refused > 100


@pytest.mark.parametrize("data", [b"P5\n16 \xff24\n255\n", b"P6", b"\0\0\0\x0cjP  \r\n\x87\n" + bytes(8)])
def test_headers_that_pil_s_readers_choke_on_are_undecodable(data: bytes) -> None:
    with pytest.raises(UndecodableError):
        decode(data)


@pytest.mark.parametrize("length", [0x7FFFFFFF, 0xFFFFFFFF])
def test_a_png_chunk_that_claims_gigabytes_is_refused_before_they_are_taken(length: int) -> None:
    data = bytearray(png(photo(8, 8)))
    data[33:37] = struct.pack(">I", length)  # of what follows IHDR
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(UndecodableError, match="a chunk's length is damaged"):
        decode(bytes(data))
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 2**18, "KiB"


def test_a_damaged_png_is_refused() -> None:
    data = bytearray(png(photo(60, 80)))
    data[len(data) // 2] ^= 0xFF
    with pytest.raises(UndecodableError, match="damaged"):
        decode(bytes(data))


@pytest.mark.parametrize(("side", "expected"), [(447, 447), (448, 224), (895, 448), (1792, 224)])
def test_large_jpegs_come_reduced_as_far_as_the_views_allow(side: int, expected: int) -> None:
    image = decode(jpeg(photo(side, side)), min_crop_area=1.0, size=224)
    assert image.shape == (expected, expected, 3)
    full = cv2.resize(photo(side, side), (expected, expected), interpolation=cv2.INTER_AREA)
    assert np.abs(image.astype(int) - full).mean() < 6, "the same picture, JPEG's loss apart"


def test_small_crops_forbid_the_reduction() -> None:
    assert decode(jpeg(photo(600, 600)), min_crop_area=0.08, size=224).shape == (600, 600, 3)

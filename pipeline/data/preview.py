"""A picture of what augmentation does."""

from collections.abc import Sequence

import cv2
import numpy as np
from numpy.typing import NDArray

from pipeline.data.loader import Loader, read_images
from pipeline.data.manifest import Manifest
from pipeline.data.views import View

_GAP = 2  # pixels


def view_grid(manifest: Manifest, views: Sequence[View], image_size: int, seed: int, rows: int) -> bytes:
    """A PNG: a row per image of the first batch, the centre crop first, then the views that a run would see.

    ValueError where the training split has fewer images than ``rows``.
    """
    loader = Loader(manifest, "train", views, image_size=image_size, global_batch_size=rows, seed=seed)
    batch = next(iter(loader.batches(0, 1)))
    originals: dict[int, NDArray[np.uint8]] = {}
    for ids, images, _ in read_images(manifest, "train", image_size):
        originals |= {int(i): x.numpy() for i, x in zip(ids, images, strict=True) if i in batch.sample_ids}
        if len(originals) == rows:
            break
    columns: list[Sequence[NDArray[np.uint8]]] = [[originals[int(i)] for i in batch.sample_ids]]
    columns += [list(view.numpy()) for view in batch.views]
    cell = max(column[0].shape[-1] for column in columns) + _GAP
    grid = np.full((rows * cell, len(columns) * cell, 3), 255, np.uint8)
    for x, column in enumerate(columns):
        for y, image in enumerate(column):
            size = image.shape[-1]
            grid[y * cell : y * cell + size, x * cell : x * cell + size] = image.transpose(1, 2, 0)
    return cv2.imencode(".png", grid[..., ::-1])[1].tobytes()

"""A picture of what augmentation does."""

from collections.abc import Sequence

import cv2
import numpy as np

from pipeline.data.decode import decode
from pipeline.data.fetch import open_fetch
from pipeline.data.loader import Loader, centre_crop
from pipeline.data.manifest import Manifest
from pipeline.data.plan import Run
from pipeline.data.reader import SampleReader
from pipeline.data.views import View
from pipeline.errors import UserError

_GAP = 2  # pixels


def view_grid(manifest: Manifest, views: Sequence[View], image_size: int, seed: int, rows: int) -> bytes:
    """A PNG: a row per image of the first batch, the centre crop first, then the views that a run would see.

    UserError where the training split has fewer images than ``rows``.
    """
    samples = manifest.split("train")
    if rows > samples.num_samples:
        raise UserError(f"{rows} rows are more than the {samples.num_samples} images of the training split")
    loader = Loader(manifest, "train", views, image_size=image_size, global_batch_size=rows, seed=seed)
    batch = next(iter(loader.batches(0, 1)))
    reader = SampleReader(manifest, samples, open_fetch(manifest))
    payloads = (reader.read_run(Run(int(i), 1)).payload(0) for i in batch.sample_ids)
    columns = [[centre_crop(decode(payload), image_size) for payload in payloads]]
    columns += [list(view.permute(0, 2, 3, 1).numpy()) for view in batch.views]
    cell = max(len(column[0]) for column in columns) + _GAP
    grid = np.full((rows * cell, len(columns) * cell, 3), 255, np.uint8)
    for x, column in enumerate(columns):
        for y, image in enumerate(column):
            grid[y * cell : y * cell + len(image), x * cell : x * cell + len(image)] = image
    return cv2.imencode(".png", grid[..., ::-1])[1].tobytes()

"""Colour on the device against colour in the loader: the same draws, the same pictures up to rounding."""

from pathlib import Path

import numpy as np
import pytest
import torch

from pipeline.data.device_views import DeviceColour, colour
from pipeline.data.loader import Loader, normalize
from pipeline.data.views import RECIPES, UNIFORMS_PER_VIEW, View, augment_colour
from tests.data.images import photo, write_photos


@pytest.mark.parametrize("recipe", ["simclr", "moco-v1", "moco-v2", "byol", "simclr-small"])
@pytest.mark.parametrize("side", [96, 224])
def test_every_image_is_coloured_as_the_loader_would(recipe: str, side: int) -> None:
    uniforms = np.random.default_rng(0).random((24, UNIFORMS_PER_VIEW))
    images = np.stack([photo(side, side, seed=i % 6) for i in range(24)])
    for view in RECIPES[recipe]:
        crops = torch.from_numpy(images).permute(0, 3, 1, 2)
        ours = colour(crops, view, torch.from_numpy(uniforms).float()).permute(0, 2, 3, 1).numpy()
        expected = np.stack([augment_colour(x, view, u) for x, u in zip(images, uniforms.tolist(), strict=True)])
        differences = np.abs(ours - expected.astype(float)).mean(axis=(1, 2, 3))
        assert differences.mean() < 1.0
        assert differences.max() < 4.0, "an 8-bit hue whose error the contrast doubles"


def test_one_operation_at_a_time_is_within_one_of_255() -> None:
    none = {"jitter": 0, "grayscale": 0, "blur": 0}
    for view in (
        View(**none | {"jitter": 1}, contrast=0, saturation=0, hue=0),
        View(**none | {"jitter": 1}, brightness=0, saturation=0, hue=0),
        View(**none | {"jitter": 1}, brightness=0, contrast=0, hue=0),
        View(**none | {"jitter": 1}, brightness=0, contrast=0, saturation=0),
        View(**none | {"grayscale": 1}),
        View(**none | {"blur": 1}),
        View(**none, solarize=1),
    ):
        uniforms = np.random.default_rng(1).random((12, UNIFORMS_PER_VIEW))
        images = np.stack([photo(96, 96, seed=i % 6) for i in range(12)])
        ours = colour(torch.from_numpy(images).permute(0, 3, 1, 2), view, torch.from_numpy(uniforms).float())
        expected = np.stack([augment_colour(x, view, u) for x, u in zip(images, uniforms.tolist(), strict=True)])
        assert np.abs(ours.permute(0, 2, 3, 1).numpy() - expected.astype(float)).mean() < 1.0


def test_a_loader_that_only_crops_and_the_device_give_the_loader_s_batch(tmp_path: Path) -> None:
    """Through the public path, at a step of the second epoch and for the second rank of two."""
    manifest = write_photos(str(tmp_path), 60)
    views, mean, std = RECIPES["byol"], (0.5, 0.4, 0.3), (0.2, 0.3, 0.4)

    def batch(with_colour: bool) -> list[torch.Tensor]:
        loader = Loader(
            manifest, "train", views, image_size=32, global_batch_size=20, seed=3, rank=1, world_size=2,
            colour=with_colour,
        )  # fmt: skip
        return next(iter(loader.batches(4, 5))).views

    device = DeviceColour(views, image_size=32, global_batch_size=20, seed=3, steps_per_epoch=3, mean=mean, std=std)
    for ours, theirs in zip(device(batch(False), 4, first_row=10), batch(True), strict=True):
        assert ours.dtype == torch.float32
        difference = (ours - normalize(theirs, mean, std)).abs() * torch.tensor(std).view(1, 3, 1, 1) * 255
        assert difference.mean() < 1.0

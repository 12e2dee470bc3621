"""Colour on the device against colour in the loader: the same draws, the same pictures up to rounding."""

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from pipeline.data import augment
from pipeline.data.augment import UNIFORMS_PER_VIEW
from pipeline.data.batch import Batch
from pipeline.data.device_views import DeviceColour, colour, compiled_colour, strengths
from pipeline.data.loader import Loader, normalize
from pipeline.data.views import RECIPES, View
from tests.data.images import photo, write_photos

AS_IS = torch.ones(1, 3, 1, 1), torch.zeros(1, 3, 1, 1)


def crops_and_draws(count: int, side: int) -> tuple[Tensor, Tensor]:
    images = np.stack([photo(side, side, seed=i % 6) for i in range(count)])
    uniforms = np.random.default_rng(0).random((count, UNIFORMS_PER_VIEW))
    return torch.from_numpy(images).permute(0, 3, 1, 2), torch.from_numpy(uniforms).float()


def differences(view: View, count: int, side: int) -> Tensor:
    """Mean |device - loader| of each image, of 255."""
    crops, u = crops_and_draws(count, side)
    ours = colour(crops, strengths(view, side, u), *AS_IS)
    theirs = crops.clone(memory_format=torch.contiguous_format)
    for planes, each in zip(theirs.numpy(), u.tolist(), strict=True):
        augment.colour(planes, view, each)
    return (ours - theirs).abs().mean(dim=(1, 2, 3))


@pytest.mark.parametrize("recipe", ["simclr", "moco-v1", "moco-v2", "byol", "simclr-small"])
@pytest.mark.parametrize("side", [96, 224])
def test_every_image_is_coloured_as_the_loader_would(recipe: str, side: int) -> None:
    for view in RECIPES[recipe]:
        assert differences(view, 24, side).max() < 0.5


def test_one_operation_at_a_time_is_within_half_a_level() -> None:
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
        assert differences(view, 12, 96).max() < 0.2, view


# An affine view, RandAugment and two sizes: geometry stays with the loader, before the colour as in torchvision.
VIEWS = (*RECIPES["byol"], View(affine=1, randaugment=2, size=24))
MEAN, STD = (0.5, 0.4, 0.3), (0.2, 0.3, 0.4)


def batches(url: Path, colour: bool, start: int, end: int, num_workers: int = 0) -> list[Batch]:
    """Of the second rank of two; three steps are an epoch."""
    loader = Loader(
        write_photos(str(url), 60), "train", VIEWS, image_size=32, global_batch_size=20, seed=3, rank=1, world_size=2,
        num_workers=num_workers, colour=colour,
    )  # fmt: skip
    return list(loader.batches(start, end))


def test_a_loader_that_only_crops_and_the_device_give_the_loader_s_batch(tmp_path: Path) -> None:
    device = DeviceColour(VIEWS, MEAN, STD, torch.device("cpu"))
    [crops], [coloured] = (batches(tmp_path, each, 4, 5) for each in (False, True))
    assert crops.draws is not None
    assert coloured.draws is None
    for ours, theirs in zip(device(crops.views, crops.draws), coloured.views, strict=True):
        assert ours.dtype == torch.float32
        difference = (ours - normalize(theirs, MEAN, STD)).abs() * torch.tensor(STD).view(1, 3, 1, 1) * 255
        assert difference.mean() < 0.5


def test_a_resumed_loader_gives_the_device_the_same_crops_and_draws(tmp_path: Path) -> None:
    undisturbed = batches(tmp_path, False, 0, 6)
    resumed = batches(tmp_path, False, 4, 6, num_workers=2)
    for ours, theirs in zip(resumed, undisturbed[4:], strict=True):
        assert ours.draws is not None and theirs.draws is not None  # noqa: PT018
        for a, b in zip([*ours.views, ours.draws], [*theirs.views, theirs.draws], strict=True):
            assert torch.equal(a, b)


@pytest.mark.heavy  # compiles for half a minute
def test_compiled_it_is_one_graph_with_the_same_result() -> None:
    crops, u = crops_and_draws(4, 32)
    view = View(solarize=0.5)
    arguments = crops, strengths(view, 32, u), *AS_IS
    difference = (compiled_colour()(*arguments) - colour(*arguments)).abs()
    assert difference.mean() < 0.01, "fused multiply-adds may turn a truncation of 1 in 1,000"

"""Views against torchvision: the same parameters, mean |difference| below 1 of 255, by operation and whole."""

import math
import subprocess
import sys
from collections.abc import Callable

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from pydantic import ValidationError
from sklearn.datasets import load_sample_image
from torchvision.transforms import RandAugment, RandomResizedCrop
from torchvision.transforms import functional as F
from torchvision.transforms.functional import InterpolationMode
from torchvision.transforms.v2 import functional as F2

from pipeline.data import augment, colour, randaugment
from pipeline.data.augment import Augmenter, crop_box
from pipeline.data.resize import resized_crop
from pipeline.data.views import RECIPES, View
from pipeline.methods.base import MethodConfig
from tests.data.images import photo

SIZES = [(300, 400), (224, 224), (97, 60)]


def tensor(image: NDArray[np.uint8]) -> torch.Tensor:
    return torch.from_numpy(image.copy()).permute(2, 0, 1)


def done(operation: Callable[..., None], image: NDArray[np.uint8], *arguments: float) -> NDArray[np.uint8]:
    """What an operation of colour.py, which works on planes and in place, makes of (H, W, 3)."""
    planes = np.ascontiguousarray(image.transpose(2, 0, 1))
    operation(planes, *arguments)
    return planes.transpose(1, 2, 0)


def drawn(image: NDArray[np.uint8], view: View, size: int, u: list[float]) -> NDArray[np.uint8]:
    """The view (size, size, 3) by a row of uniforms."""
    augmenter = Augmenter([view.model_copy(update={"count": 1})], size)
    planes, others = (np.full((3, size, size), before, np.uint8) for before in (0, 255))
    for into in (planes, others):
        augmenter(image, np.array(u), [into])
    assert (planes == others).all(), "every pixel is drawn"
    return planes.transpose(1, 2, 0)


def difference(ours: NDArray[np.uint8], oracle: torch.Tensor) -> float:
    """Mean |difference|, of 255."""
    assert ours.shape == oracle.permute(1, 2, 0).shape
    return float(np.abs(ours.astype(int) - oracle.permute(1, 2, 0).numpy().astype(int)).mean())


PHOTOS = {name: load_sample_image(f"{name}.jpg") for name in ("china", "flower")} | {"drawn": photo(900, 1100, seed=1)}


@pytest.mark.parametrize("target", [(224, 224), (96, 96), (32, 32), (28, 28), (512, 700), (8, 8), (5, 300)])
@pytest.mark.parametrize("name", PHOTOS)
def test_resized_crops(name: str, target: tuple[int, int]) -> None:
    """Boxes of every size and shape, of photos with fine detail; what remains is how the levels are rounded."""
    image, random = PHOTOS[name], np.random.default_rng(0)
    before = image.copy()
    boxes = [(0, 0, *image.shape[:2]), (10, 20, 1, 1), (7, 3, 300, 2), (0, 1, 3, 400), (30, 40, 96, 96)]
    for _ in range(12):
        height, width = (int(random.integers(1, side + 1)) for side in image.shape[:2])
        top, left = (int(random.integers(0, a - b + 1)) for a, b in zip(image.shape, (height, width), strict=False))
        boxes.append((top, left, height, width))
    for box in boxes:
        ours = resized_crop(image, *box, target)
        oracle = F2.resized_crop(tensor(image), *box, list(target), antialias=True)
        assert difference(ours, oracle) < 0.3
        assert np.abs(ours.astype(int) - oracle.permute(1, 2, 0).numpy()).max() <= 2
    assert (image == before).all()


def test_a_box_of_the_target_s_size_is_copied() -> None:
    image = photo(50, 60)
    assert (resized_crop(image, 7, 9, 32, 24, (32, 24)) == image[7:39, 9:33]).all()
    assert (resized_crop(image[:, ::-1], 7, 9, 32, 24, (32, 24)) == image[:, ::-1][7:39, 9:33]).all()


@pytest.mark.parametrize("factor", [0.2, 0.7, 1.0, 1.3, 1.8])
def test_colours(factor: float) -> None:
    for seed, size in enumerate(SIZES):
        image = photo(*size, seed=seed)
        x = tensor(image)
        assert difference(done(colour.adjust_brightness, image, factor), F.adjust_brightness(x, factor)) < 0.001
        assert difference(done(colour.adjust_contrast, image, factor), F.adjust_contrast(x, factor)) < 0.001
        assert difference(done(colour.adjust_saturation, image, factor), F.adjust_saturation(x, factor)) < 0.001
        assert difference(done(colour.to_gray, image), F.rgb_to_grayscale(x, 3)) < 0.001
        assert difference(done(colour.solarize, image), F.solarize(x, 128)) == 0


def test_where_nothing_compiled_can_be_kept_each_process_compiles() -> None:
    """As in a container whose file system is read-only."""
    made = subprocess.run(
        [sys.executable, "-c", _NOWHERE_TO_KEEP], input=photo(50, 50).tobytes(), capture_output=True, timeout=120
    )
    assert made.stdout == done(colour.adjust_hue, photo(50, 50), 0.1).tobytes(), made.stderr.decode()


_NOWHERE_TO_KEEP = """
import sys
import numpy as np
from numba.core.caching import CacheImpl
CacheImpl._locator_classes = []
from pipeline.data import colour
planes = np.frombuffer(sys.stdin.buffer.read(), np.uint8).reshape(50, 50, 3).transpose(2, 0, 1).copy()
colour.adjust_hue(planes, 0.1)
sys.stdout.buffer.write(planes.transpose(1, 2, 0).tobytes())
"""


@pytest.mark.parametrize("shift", [-0.2, -0.05, 0.0, 0.1, 0.4, 0.5])
def test_hue(shift: float) -> None:
    image = photo(224, 224)
    assert difference(done(colour.adjust_hue, image, shift), F.adjust_hue(tensor(image), shift)) < 0.001


def test_hue_is_one_level_off_at_most() -> None:
    """At all shifts, on photos, noise and gray; and seldom."""
    shifts = [*np.linspace(-0.5, 0.5, 41), 1 / 6, -1 / 3, 1e-9, -1e-9]
    noise = np.random.default_rng(0).integers(0, 256, (64, 48, 3), np.uint8)
    flat = np.repeat(noise[..., :1], 3, axis=2)
    for image in (photo(224, 224), photo(97, 60, seed=1), noise, flat):
        differences = []
        for shift in shifts:
            oracle = F.adjust_hue(tensor(image), shift).permute(1, 2, 0).numpy().astype(int)
            differences.append(np.abs(done(colour.adjust_hue, image, shift).astype(int) - oracle))
        assert max(difference.max() for difference in differences) <= 1
        assert np.mean([difference.mean() for difference in differences]) < 0.001
    assert (done(colour.adjust_hue, noise, 0.0) == noise).all()


@pytest.mark.parametrize("sigma", [0.1, 0.3, 0.5, 1.0, 1.5, 2.0])
def test_blur(sigma: float) -> None:
    for side, kernel in ((224, 23), (96, 9)):
        image = photo(side, side)
        oracle = F.gaussian_blur(tensor(image), [kernel] * 2, [sigma] * 2)
        assert difference(done(colour.blur, image, sigma), oracle) < 0.5


@pytest.mark.parametrize(("rotate", "shear"), [(0, 0), (20, 0), (-33, 0), (0, 15), (12, -20), (90, 10)])
def test_affine(rotate: float, shear: float) -> None:
    image = photo(128, 96)
    oracle = F.affine(tensor(image), rotate, [0, 0], 1.0, [shear, 0], InterpolationMode.BILINEAR)
    assert difference(augment.affine(image, rotate, shear), oracle) < 1


def uniforms(view: View, seed: int) -> list[float]:
    return np.random.default_rng(seed).random(augment.UNIFORMS_PER_VIEW).tolist()


@pytest.mark.parametrize("seed", range(24))
@pytest.mark.parametrize("recipe", ["simclr", "moco-v1", "moco-v2", "byol", "swav", "simclr-small"])
def test_a_whole_view_is_torchvision_s_with_the_same_draws(recipe: str, seed: int) -> None:
    """Everything in sequence; what remains is the rounding of the crop, 0.3 of 255, times the contrast."""
    view = RECIPES[recipe][seed % len(RECIPES[recipe])]
    size = view.size or (32 if recipe == "simclr-small" else 224)
    image = photo(*((32, 32) if size == 32 else (300, 400)), seed=seed % 5)
    u = uniforms(view, seed)
    top, left, height, width = crop_box(view, *image.shape[:2], u)
    x = F2.resized_crop(tensor(image), top, left, height, width, [size, size], antialias=True)
    if u[22] < view.flip:
        x = F.hflip(x)
    if u[23] < view.jitter:
        low = [max(0, 1 - s) for s in (view.brightness, view.contrast, view.saturation)]
        high = [1 + s for s in (view.brightness, view.contrast, view.saturation)]
        b, c, s = (lo + (hi - lo) * v for lo, hi, v in zip(low, high, u[24:27], strict=True))
        operations = [
            lambda x: F.adjust_brightness(x, b),
            lambda x: F.adjust_contrast(x, c),
            lambda x: F.adjust_saturation(x, s),
            lambda x: F.adjust_hue(x, view.hue * (2 * u[27] - 1)),
        ]
        for index in augment.ORDERS[int(u[28] * 24)]:
            x = operations[index](x)
    if u[29] < view.grayscale:
        x = F.rgb_to_grayscale(x, 3)
    if u[30] < view.blur:
        sigma = view.blur_sigma[0] + (view.blur_sigma[1] - view.blur_sigma[0]) * u[31]
        x = F.gaussian_blur(x, [size // 10 | 1] * 2, [sigma] * 2)
    if u[32] < view.solarize:
        x = F.solarize(x, 128)
    assert difference(drawn(image, view, size, u), x) < 1


def test_crops_are_distributed_as_torchvision_s() -> None:
    """Areas, ratios and positions of 4,000 crops: Kolmogorov-Smirnov distance below the 0.1 % critical value."""
    view, height, width, n = View(), 300, 400, 4000
    torch.manual_seed(0)
    image = torch.empty(3, height, width)
    theirs = np.array([RandomResizedCrop.get_params(image, (0.08, 1.0), (3 / 4, 4 / 3)) for _ in range(n)])
    ours = np.array([crop_box(view, height, width, uniforms(view, seed)) for seed in range(n)])
    critical = 1.95 * math.sqrt(2 / n)
    for statistic in (
        lambda box: box[:, 2] * box[:, 3],
        lambda box: box[:, 3] / box[:, 2],
        lambda box: box[:, 0] / np.maximum(height - box[:, 2], 1),
        lambda box: box[:, 1] / np.maximum(width - box[:, 3], 1),
    ):
        grid = np.sort(np.concatenate([statistic(ours), statistic(theirs)]))
        cdfs = [np.searchsorted(np.sort(statistic(boxes)), grid, side="right") / n for boxes in (ours, theirs)]
        assert np.abs(cdfs[0] - cdfs[1]).max() < critical


def test_operations_come_as_often_as_configured() -> None:
    """A black and white image tells flips, a gray one solarisation; 2,000 draws, five standard deviations."""
    view = View(crop_scale=(1, 1), crop_ratio=(1, 1), jitter=0, grayscale=0, blur=0, solarize=0.2)
    image = np.zeros((16, 16, 3), np.uint8)
    image[:, :8] = 100  # below the threshold, so solarisation leaves both levels
    image[0, :] = 200
    out = [drawn(image, view, 16, uniforms(view, seed)) for seed in range(2000)]
    flips = sum(int(x[8, 0, 0] == 0) for x in out)
    solarized = sum(int(x[0, 0, 0] == 55) for x in out)
    assert abs(flips - 1000) < 5 * math.sqrt(2000 * 0.25)
    assert abs(solarized - 400) < 5 * math.sqrt(2000 * 0.16)


@pytest.mark.parametrize("name", randaugment.OPERATIONS)
@pytest.mark.parametrize("sign", [-1.0, 1.0])
@pytest.mark.parametrize("magnitude", [0, 9, 20, 30])
def test_randaugment_s_operations(name: str, sign: float, magnitude: int) -> None:
    from torchvision.transforms.autoaugment import _apply_op

    image = photo(120, 150, seed=3)
    space = RandAugment()._augmentation_space(31, (120, 150))
    strengths, signed = space[name]
    strength = float(strengths[magnitude]) if strengths.ndim else 0.0
    oracle = _apply_op(tensor(image), name, sign * strength if signed else strength, InterpolationMode.NEAREST, None)
    assert difference(randaugment.OPERATIONS[name](image, magnitude / 30, sign), oracle) < 1.0


def test_randaugment_draws_every_operation() -> None:
    image = photo(32, 32)
    view = RECIPES["randaugment"][0]
    assert len({drawn(image, view, 32, uniforms(view, seed)).tobytes() for seed in range(50)}) > 45
    met = {list(randaugment.OPERATIONS)[int(u * len(randaugment.OPERATIONS))] for u in np.linspace(0, 0.9999, 100)}
    assert met == set(randaugment.OPERATIONS)


def test_the_source_image_is_left_alone() -> None:
    image = photo(40, 40)
    before = image.copy()
    augmenter = Augmenter(RECIPES["byol"], 40)
    into = list(np.empty((2, 3, 40, 40), np.uint8))
    for seed in range(30):
        augmenter(image, np.random.default_rng(seed).random(augmenter.num_uniforms), into)
    assert np.array_equal(image, before)


@pytest.mark.parametrize("shape", [(1, 1), (1, 50), (50, 1), (2, 3), (9, 4000)])
def test_images_of_any_shape_become_views(shape: tuple[int, int]) -> None:
    image = photo(*shape)
    for seed in range(20):
        view = RECIPES["simclr"][0]
        assert drawn(image, view, 24, uniforms(view, seed)).shape == (24, 24, 3)


def test_recipes_by_name_and_what_is_wrong_is_named() -> None:
    assert MethodConfig.model_validate({"name": "simclr", "views": "byol"}).views == RECIPES["byol"]
    assert MethodConfig.model_validate({"name": "simclr", "views": [{"count": 2}]}).views == RECIPES["simclr"]
    assert [sum(v.count for v in RECIPES[name]) for name in ("simclr", "byol", "swav")] == [2, 2, 8]
    for bad, words in (
        ("nope", "recipes are simclr"),
        ([{"crop_scale": [0.5, 0.1]}], r"crop_scale=\(0.5, 0.1\)"),
        ([{"blur_sigma": [0, 1]}], "blur_sigma"),
        ([{"hue": 0.6}], "0.5"),
    ):
        with pytest.raises(ValidationError, match=words):
            MethodConfig.model_validate({"name": "simclr", "views": bad})

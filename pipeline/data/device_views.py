"""Colour jitter, gray, blur, solarisation and normalisation of whole batches on their device.

For a loader that only crops (``Loader(colour=False)``): a GPU does the rest of the augmentation, which is most of it,
and a core feeds twice the images. The draws are rows of the same table of uniforms, so a batch looks as it does when
the loader's workers colour it, up to rounding. Everything is one sequence of pointwise operations and one separable
convolution per batch, without a loop over images and without a wait for the device.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from pipeline.data import views as cpu
from pipeline.data.plan import uniform_rows
from pipeline.data.views import Augmenter, View

_LUMA = (0.299, 0.587, 0.114)
_HUE_OPERATION = 3  # in ORDERS: brightness, contrast, saturation, hue


class DeviceColour:
    """uint8 crops of one rank -> normalised float views."""

    def __init__(
        self,
        views: Sequence[View],
        *,
        image_size: int,
        global_batch_size: int,
        seed: int,
        steps_per_epoch: int,
        mean: Sequence[float],
        std: Sequence[float],
    ) -> None:
        augmenter = Augmenter(views, image_size, colour=False)
        self._views = augmenter.views
        self._width = augmenter.num_uniforms
        self._global_batch_size = global_batch_size
        self._seed = seed
        self._steps_per_epoch = steps_per_epoch
        self._mean, self._std = list(mean), list(std)

    def __call__(self, crops: list[Tensor], step: int, first_row: int = 0) -> list[Tensor]:
        """``crops``: (n, 3, S, S) uint8 per view, rows [first_row, first_row + n) of global ``step``."""
        epoch, local = divmod(step, self._steps_per_epoch)
        position = local * self._global_batch_size + first_row
        n = len(crops[0])
        table = uniform_rows(self._seed, epoch, position, n, self._width).reshape(n, len(self._views), -1)
        uniforms = torch.from_numpy(table).float().to(crops[0].device, non_blocking=True)
        shift = torch.tensor(self._mean, device=uniforms.device).view(1, 3, 1, 1) * 255
        scale = 1 / (torch.tensor(self._std, device=uniforms.device).view(1, 3, 1, 1) * 255)
        return [
            (colour(crop, view, uniforms[:, index]) - shift) * scale
            for index, (crop, view) in enumerate(zip(crops, self._views, strict=True))
        ]


def colour(crops: Tensor, view: View, u: Tensor) -> Tensor:
    """(n, 3, S, S) uint8 and (n, UNIFORMS_PER_VIEW) -> (n, 3, S, S) float32, whole numbers in [0, 255]."""
    x = crops.float()
    x = _jitter(x, view, u)
    x = torch.where(_mask(u[:, cpu.GRAYSCALE] < view.grayscale), _gray(x).round().expand_as(x), x)
    if view.blur:
        low, high = view.blur_sigma
        sigma = low + (high - low) * u[:, cpu.SIGMA]
        sigma = torch.where(u[:, cpu.BLUR] < view.blur, sigma, 1e-3)  # 1e-3: the kernel of no blur
        x = _blur(x, sigma, high).round()
    return torch.where(_mask(u[:, cpu.SOLARIZE] < view.solarize) & (x >= 128), 255 - x, x)


def _jitter(x: Tensor, view: View, u: Tensor) -> Tensor:
    """Each image's four operations in its own order.

    The first three are x -> f x + (1 - f) * (0, mean of gray, gray): one pass with coefficients by image.
    """
    if not view.jitter:
        return x
    orders = torch.tensor(cpu.ORDERS, device=x.device)[(u[:, cpu.ORDER] * len(cpu.ORDERS)).long()]  # (n, 4)
    active = u[:, cpu.JITTER] < view.jitter
    factors = torch.stack(
        [
            _factor(view.brightness, u[:, cpu.BRIGHTNESS]),
            _factor(view.contrast, u[:, cpu.CONTRAST]),
            _factor(view.saturation, u[:, cpu.SATURATION]),
            torch.ones_like(u[:, cpu.HUE]),
        ],
        dim=1,
    )
    turn = torch.where(active, view.hue * (2 * u[:, cpu.HUE] - 1), 0.0)
    for place in range(4):
        operation = orders[:, place]
        factor = factors.gather(1, operation[:, None])[:, 0]
        factor = torch.where(active, factor, 1.0)[:, None, None, None]
        gray = _gray(x)
        mean = gray.mean(dim=(2, 3), keepdim=True)
        other = torch.where(_mask(operation == 1), mean, torch.where(_mask(operation == 2), gray, 0.0))
        x = (factor * x + (1 - factor) * other + 1e-3).clamp(0, 255).floor()  # as on the CPU, and in torchvision
        if view.hue:
            x = torch.where(_mask((operation == _HUE_OPERATION) & active), _turn_hue(x, turn).round(), x)
    return x


def _factor(strength: float, u: Tensor) -> Tensor:
    low = max(0.0, 1.0 - strength)
    return low + (1.0 + strength - low) * u


def _turn_hue(x: Tensor, turn: Tensor) -> Tensor:
    """RGB -> HSV, hue + turn (n,) of a circle, -> RGB, without branches: channel k is V - C clamp(|h6 - k| ...)."""
    value, smallest = x.amax(1, keepdim=True), x.amin(1, keepdim=True)
    chroma = value - smallest
    r, g, b = x.split(1, dim=1)
    safe = chroma.clamp(min=1e-6)
    sixth = torch.where(
        value == r, (g - b) / safe, torch.where(value == g, (b - r) / safe + 2, (r - g) / safe + 4)
    ) + 6 * turn.view(-1, 1, 1, 1)
    places = torch.tensor([5.0, 3.0, 1.0], device=x.device).view(1, 3, 1, 1)
    k = (places + sixth).remainder(6)
    return value - chroma * torch.minimum(k, 4 - k).clamp(0, 1)


def _gray(x: Tensor) -> Tensor:
    """(n, 1, S, S)."""
    r, g, b = x.split(1, dim=1)
    return _LUMA[0] * r + _LUMA[1] * g + _LUMA[2] * b


def _blur(x: Tensor, sigma: Tensor, largest: float) -> Tensor:
    """Gaussian blur with a sigma (n,) for each image, by two depthwise convolutions over all images at once."""
    n, channels, height, width = x.shape
    radius = min((height // 10 | 1) // 2, math.ceil(3 * largest))
    radius = max(radius, 1)
    at = torch.arange(-radius, radius + 1, device=x.device, dtype=x.dtype)
    cut = (3 * sigma).ceil().clamp(max=radius)[:, None]  # as on the CPU, a narrow kernel ends at 3 sigma
    kernel = torch.exp(-0.5 * (at / sigma[:, None]) ** 2) * (at.abs() <= cut)
    kernel = (kernel / kernel.sum(1, keepdim=True)).repeat_interleave(channels, 0)  # (n * 3, taps)
    x = F.pad(x, [radius] * 4, mode="reflect").reshape(1, n * channels, height + 2 * radius, width + 2 * radius)
    x = F.conv2d(x, kernel[:, None, None, :], groups=n * channels)
    x = F.conv2d(x, kernel[:, None, :, None], groups=n * channels)
    return x.reshape(n, channels, height, width)


def _mask(condition: Tensor) -> Tensor:
    return condition.view(-1, 1, 1, 1)

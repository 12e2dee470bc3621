"""Colour jitter, gray, blur, solarisation and normalisation of whole batches on their device.

For a loader that only crops (``Loader(colour=False)``): a GPU does the rest of the augmentation, and a core feeds
1.35x the images. The batch brings the loader's draws, so it looks as it does when the loader's workers colour it, up
to rounding. ``colour`` is pointwise but for the means of contrast and one separable blur: no loop over images, no
shape or branch that depends on data, no wait for the device, so torch.compile fuses it whole.
"""

import functools
import importlib.util
import math
import os
import shutil
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from pipeline.data import augment as cpu
from pipeline.data.colour import HUE_SCALE, LUMA
from pipeline.data.views import View


class Strengths(NamedTuple):
    """What is done to each of n images: computed on the CPU, where the draws are, and small."""

    jitter: Tensor  # (4, 4, n): by place in the order, shares of image, mean, gray, and hue's turn; (0, 4, n): none
    grayscale: Tensor  # (n,) bool
    blur: Tensor  # (n, taps) kernels; one tap: no view is blurred
    solarize: Tensor  # (n,) bool

    def to(self, device: torch.device) -> "Strengths":
        """To ``device``, without waiting."""
        return Strengths(*(each.to(device, non_blocking=True) for each in self))


def strengths(view: View, size: int, u: Tensor) -> Strengths:
    """``u``: (n, UNIFORMS_PER_VIEW), as pipeline/data/augment.py reads them."""
    jitter, kernels = torch.empty(0, 4, len(u)), torch.ones(len(u), 1)
    if view.jitter:
        active = u[:, cpu.JITTER] < view.jitter
        factors = torch.stack(
            [
                _factor(view.brightness, u[:, cpu.BRIGHTNESS]),
                _factor(view.contrast, u[:, cpu.CONTRAST]),
                _factor(view.saturation, u[:, cpu.SATURATION]),
                torch.ones_like(u[:, cpu.HUE]),
            ]
        )
        factors = torch.where(active, factors, 1.0)
        shares = torch.zeros(4, *factors.shape)  # (of image, mean, gray and the turn; operation; n)
        shares[0] = factors
        shares[1, 1], shares[2, 2] = 1 - factors[1], 1 - factors[2]
        shares[3, 3] = torch.where(active, view.hue * (2 * u[:, cpu.HUE] - 1), 0.0)
        orders = torch.tensor(cpu.ORDERS)[(u[:, cpu.ORDER] * len(cpu.ORDERS)).long()].T  # (place, n)
        jitter = shares.gather(1, orders.expand(4, -1, -1)).transpose(0, 1)
    if view.blur:
        low, high = view.blur_sigma
        sigma = low + (high - low) * u[:, cpu.SIGMA]
        sigma = torch.where(u[:, cpu.BLUR] < view.blur, sigma, 1e-3)[:, None]  # 1e-3: the kernel of no blur
        radius = max(min((size // 10 | 1) // 2, math.ceil(3 * high)), 1)
        at = torch.arange(-radius, radius + 1)
        cut = (3 * sigma).ceil().clamp(max=radius)  # as on the CPU, a narrow kernel ends at 3 sigma
        kernels = torch.exp(-0.5 * (at / sigma) ** 2) * (at.abs() <= cut)
        kernels = kernels / kernels.sum(1, keepdim=True)
    return Strengths(jitter, u[:, cpu.GRAYSCALE] < view.grayscale, kernels, u[:, cpu.SOLARIZE] < view.solarize)


class DeviceColour:
    """uint8 crops on ``device`` -> normalised floats; compiled on CUDA."""

    def __init__(
        self, views: Sequence[View], mean: Sequence[float], std: Sequence[float], device: torch.device
    ) -> None:
        self._views = [view for view in views for _ in range(view.count)]
        self._scale = torch.tensor([1 / (255 * s) for s in std], device=device).view(1, 3, 1, 1)
        self._shift = torch.tensor([-m / s for m, s in zip(mean, std, strict=True)], device=device).view(1, 3, 1, 1)
        self._colour = compiled_colour() if device.type == "cuda" and _can_compile() else colour

    def __call__(self, crops: Sequence[Tensor], draws: Tensor) -> list[Tensor]:
        """``crops``: (n, 3, S, S) uint8 per view; ``draws``: (n, views, UNIFORMS_PER_VIEW) on the CPU."""
        views = []
        for crop, view, u in zip(crops, self._views, draws.unbind(1), strict=True):
            views.append(
                self._colour(crop, strengths(view, crop.shape[-1], u).to(crop.device), self._scale, self._shift)
            )
        return views


def colour(crops: Tensor, strengths: Strengths, scale: Tensor, shift: Tensor) -> Tensor:
    """(n, 3, S, S) uint8 -> float32 (n, 3, S, S), whole numbers in [0, 255] times ``scale`` plus ``shift``."""
    jitter, grayscale, blur, solarize = strengths
    x = crops.float()
    for place in jitter.unbind():
        of_image, of_mean, of_gray, turn = (each.view(-1, 1, 1, 1) for each in place.unbind())
        gray = _gray(x)
        x = of_image * x + of_mean * gray.mean(dim=(2, 3), keepdim=True) + of_gray * gray
        x = _turn_hue((x + 1e-3).clamp(0, 255).floor(), turn)  # truncated as on the CPU, and in torchvision
    x = torch.where(grayscale.view(-1, 1, 1, 1), _gray(x), x)
    if blur.shape[1] > 1:
        x = _blur(x, blur).round()
    x = torch.where(solarize.view(-1, 1, 1, 1), torch.minimum(x, 255 - x), x)
    return torch.addcmul(shift, x, scale)


@functools.cache
def compiled_colour() -> Callable[[Tensor, Strengths, Tensor, Tensor], Tensor]:
    """``colour`` as few fused kernels; compiled at the first call with each shape, for some seconds."""
    return torch.compile(colour, fullgraph=True, dynamic=False)


def _can_compile() -> bool:
    """Whether Triton is there, and the C compiler that it builds its launchers with; slim images have none."""
    compilers = (os.environ.get("CC", ""), "clang", "gcc")
    return importlib.util.find_spec("triton") is not None and any(map(shutil.which, compilers))


def _factor(strength: float, u: Tensor) -> Tensor:
    low = max(0.0, 1.0 - strength)
    return low + (1.0 + strength - low) * u


def _turn_hue(x: Tensor, turn: Tensor) -> Tensor:
    """RGB -> HSV, hue + turn (n, 1, 1, 1) of a circle, -> RGB, without branches: V - C clamp(min(k, 4 - k), 0, 1).

    Whole numbers in and out; no turn changes nothing.
    """
    value, smallest = x.amax(1, keepdim=True), x.amin(1, keepdim=True)
    chroma = value - smallest
    r, g, b = x.split(1, dim=1)
    safe = chroma.clamp(min=1e-6)
    from_green = torch.where(value == g, (b - r) / safe + 2, (r - g) / safe + 4)
    sixth = torch.where(value == r, (g - b) / safe, from_green) + 6 * turn
    channels = []
    for start in (5, 3, 1):  # red, green, blue
        k = (start + sixth).remainder(6)
        channels.append(value - chroma * torch.minimum(k, 4 - k).clamp(0, 1))
    return (torch.cat(channels, dim=1) * HUE_SCALE).clamp(min=0).floor()


def _gray(x: Tensor) -> Tensor:
    """(n, 1, S, S), truncated."""
    r, g, b = x.split(1, dim=1)
    return (LUMA[0] * r + LUMA[1] * g + LUMA[2] * b + 1e-3).floor()


def _blur(x: Tensor, kernels: Tensor) -> Tensor:
    """Each image by its own kernel (n, taps), by two depthwise convolutions over all images at once."""
    n, channels, height, width = x.shape
    radius = kernels.shape[1] // 2
    weights = kernels.repeat_interleave(channels, 0)  # (n * 3, taps)
    x = F.pad(x, [radius] * 4, mode="reflect").reshape(1, n * channels, height + 2 * radius, width + 2 * radius)
    x = F.conv2d(x, weights[:, None, None, :], groups=n * channels)
    x = F.conv2d(x, weights[:, None, :, None], groups=n * channels)
    return x.reshape(n, channels, height, width)

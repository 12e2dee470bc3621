"""Colour jitter, gray, blur and solarisation of one view, in place: torchvision's arithmetic, compiled.

A view is (3, S, S) uint8 here, a plane per channel: so the compiler takes 16 pixels at a time, at 1.6x (contrast) to 5x
(hue) the speed of the same by OpenCV's calls. As in torchvision all is float32 and truncated, and nothing is reordered
or fused: the levels are torchvision's own.
"""

import math
from typing import Any

import cv2
import numba
import numpy as np
from numba import float32, int32, uint8, uint32
from numpy.typing import NDArray

from pipeline.data.compiled import compiled

Planes = NDArray[np.uint8]  # (3, S, S), contiguous

LUMA = (0.2989, 0.587, 0.114)  # ITU-R 601, rounded as torchvision's
HUE_SCALE = 255.999 / 255  # torchvision goes from [0, 1] back to uint8 so, truncating


@numba.njit
def _level(value: Any) -> Any:
    """Clipped and truncated."""
    return uint8(int32(min(max(value, float32(0)), float32(255))))


@numba.njit
def _luma(r: Any, g: Any, b: Any) -> Any:
    """Truncated, an int32."""
    return int32(float32(LUMA[0]) * float32(r) + float32(LUMA[1]) * float32(g) + float32(LUMA[2]) * float32(b))


@compiled("uint8[:, :, ::1]", "float32")
def adjust_brightness(planes: Planes, factor: float) -> None:
    """``factor`` x, clipped."""
    x = planes.reshape(-1)
    for i in range(x.size):
        x[i] = _level(float32(x[i]) * factor)


@compiled("uint8[:, :, ::1]", "float64")
def adjust_contrast(planes: Planes, factor: float) -> None:
    """Away from (or towards) the mean of the gray image."""
    r, g, b = planes.reshape(3, -1)
    total = uint32(0)  # of up to 16 million pixels
    for i in range(r.size):
        total = uint32(total + uint32(_luma(r[i], g[i], b[i])))
    share, offset = float32(factor), float32(1 - factor) * float32(total / r.size)
    x = planes.reshape(-1)
    for i in range(x.size):
        x[i] = _level(share * float32(x[i]) + offset)


@compiled("uint8[:, :, ::1]", "float64")
def adjust_saturation(planes: Planes, factor: float) -> None:
    """Away from (or towards) the gray image."""
    r, g, b = planes.reshape(3, -1)
    share, rest = float32(factor), float32(1 - factor)
    for i in range(r.size):
        gray = rest * float32(_luma(r[i], g[i], b[i]))
        r[i] = _level(share * float32(r[i]) + gray)
        g[i] = _level(share * float32(g[i]) + gray)
        b[i] = _level(share * float32(b[i]) + gray)


@compiled("uint8[:, :, ::1]")
def to_gray(planes: Planes) -> None:
    """Three equal planes."""
    r, g, b = planes.reshape(3, -1)
    for i in range(r.size):
        r[i] = g[i] = b[i] = uint8(_luma(r[i], g[i], b[i]))


def adjust_hue(planes: Planes, shift: float) -> None:
    """Turn the hue by ``shift`` of a full circle."""
    sextants = shift % 1 * 6
    _turn_hue(planes, int(sextants), sextants % 1)


@numba.njit
def _turned(low: Any, chroma: Any, above: Any) -> Any:
    return uint8(int32(float32(HUE_SCALE) * (low + min(max(above, float32(0)), chroma))))


@compiled("uint8[:, :, ::1]", "int32", "float32")
def _turn_hue(planes: Planes, sextants: int, share: float) -> None:
    """Turn the hue by whole ``sextants`` and a ``share`` of one; no HSV, so nothing is divided.

    Between the least (m) and the largest (m + C) of a pixel's channels each follows the hue on a trapezoid: up for one
    sextant, flat for two, down for one, flat for two. So a turn by a share f of a sextant makes of red

        m + clip(R - G + (C (1 - f) if G > B else C f), 0, C)

    and of green and blue the same with the channels' names moved on. A turn by a whole sextant moves them on by one and
    swaps the signs of all differences.
    """
    r, g, b = planes.reshape(3, -1)
    sign = float32(1 - 2 * (sextants % 2))
    moved = sextants % 3
    rest = float32(1) - share
    for i in range(r.size):
        low = float32(min(min(r[i], g[i]), b[i]))
        chroma = float32(max(max(r[i], g[i]), b[i])) - low
        from_g = sign * (float32(r[i]) - float32(g[i]))
        from_b = sign * (float32(g[i]) - float32(b[i]))
        from_r = sign * (float32(b[i]) - float32(r[i]))
        first = _turned(low, chroma, from_g + chroma * (rest if from_b > 0 else share))
        second = _turned(low, chroma, from_b + chroma * (rest if from_r > 0 else share))
        third = _turned(low, chroma, from_r + chroma * (rest if from_g > 0 else share))
        r[i] = first if moved == 0 else second if moved == 1 else third
        g[i] = second if moved == 0 else third if moved == 1 else first
        b[i] = third if moved == 0 else first if moved == 1 else second


def blur(planes: Planes, sigma: float) -> None:
    """Gaussian blur with SimCLR's kernel, a tenth of the image's side, cut at 3 sigma (what is beyond is < 0.3 %)."""
    side = max(planes.shape[1] // 10 | 1, 3)
    kernel = cv2.getGaussianKernel(min(side, 2 * math.ceil(3 * sigma) + 1), sigma, cv2.CV_32F)
    for plane in planes:
        cv2.sepFilter2D(plane, -1, kernel, kernel, dst=plane)  # border: reflect-101, as torchvision


def solarize(planes: Planes) -> None:
    """Inverted from 128 on."""
    np.minimum(planes, ~planes, out=planes)

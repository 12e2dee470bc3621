"""Antialiased bilinear resizing, PIL's and torchvision's: convolution with a triangle that widens with the reduction.

Each pass works on whole rows, 8 pixels at a time: the columns' pass is the rows' on the transposed image. As quick as
OpenCV's sepFilter2D + resize, which approximate it (0.8 of 255 away on a photo with fine detail, 1.8 at 32 px), at
224 px, and 6x quicker at 96 px and below.
"""

from typing import Any

import cv2
import numba
import numpy as np
from numba import float32, int32, uint8
from numpy.typing import NDArray

from pipeline.data.compiled import compiled

Pixels = NDArray[Any]  # uint8 (H, W, 3) RGB; OpenCV's stubs promise any number


def resized_crop(image: Pixels, top: int, left: int, height: int, width: int, size: tuple[int, int]) -> Pixels:
    """The box of ``image`` (H, W, 3), resized to ``size``: (height, width, 3)."""
    rows, columns = size
    flat = np.ascontiguousarray(image).reshape(len(image), -1)
    upright = np.empty((rows, width, 3), np.uint8)
    _resize_rows(flat, top, left * 3, height, upright.reshape(rows, -1))
    turned = np.empty((columns, rows, 3), np.uint8)
    _resize_rows(cv2.transpose(upright).reshape(width, -1), 0, 0, width, turned.reshape(columns, -1))
    return cv2.transpose(turned)


@numba.njit
def _triangle(distance: float) -> float:
    return max(1.0 - abs(distance), 0.0)


@compiled("Array(uint8, 2, 'C', readonly=True)", "int64", "int64", "int64", "uint8[:, ::1]")
def _resize_rows(image: NDArray[np.uint8], top: int, left: int, height: int, into: NDArray[np.uint8]) -> None:
    """``height`` rows from ``top`` on and as many bytes of each from ``left`` on as ``into`` (n, bytes) has."""
    count, width = into.shape
    scale = height / count
    reach = max(scale, 1.0)
    sums = np.empty(width, np.float32)
    for row in range(count):
        centre = (row + 0.5) * scale
        low, high = max(int(centre - reach + 0.5), 0), min(int(centre + reach + 0.5), height)
        total = 0.0
        for near in range(low, high):
            total += _triangle((near + 0.5 - centre) / reach)
        sums[:] = float32(0.5)
        for near in range(low, high, 2):  # two rows at a time halve the traffic with the sums
            first = float32(_triangle((near + 0.5 - centre) / reach) / total)
            second = float32(_triangle((near + 1.5 - centre) / reach) / total) if near + 1 < high else float32(0)
            a = image[top + near, left : left + width]
            b = image[top + min(near + 1, high - 1), left : left + width]
            for x in range(width):
                sums[x] += first * float32(a[x]) + second * float32(b[x])
        for x in range(width):
            into[row, x] = uint8(int32(sums[x]))

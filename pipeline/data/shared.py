"""Arrays that processes share through an anonymous file descriptor.

A memfd has no name, so nothing is left in /dev/shm however a process dies, and it is not bound by that mount's
size, which containers set to 64 MiB.
"""

import mmap
import os
import tempfile
from typing import Any

import numpy as np
from numpy.typing import NDArray

Layout = list[tuple[tuple[int, ...], str]]  # (shape, dtype) of each array

_ALIGNMENT = 64


def allocate(layout: Layout) -> int:
    """A file descriptor, to be closed by the caller, that holds zeroed arrays of this layout."""
    size = max(sum(_padded(*each) for each in layout), mmap.PAGESIZE)
    if hasattr(os, "memfd_create"):
        fd = os.memfd_create("parallax")
    else:  # macOS
        with tempfile.TemporaryFile() as file:
            fd = os.dup(file.fileno())
    os.ftruncate(fd, size)
    return fd


def attach(fd: int, layout: Layout) -> list[NDArray[Any]]:
    """The arrays behind a descriptor; they stay valid after it is closed."""
    memory = mmap.mmap(fd, 0)
    arrays, offset = [], 0
    for shape, dtype in layout:
        arrays.append(np.ndarray(shape, dtype, memory, offset))
        offset += _padded(shape, dtype)
    return arrays


def _padded(shape: tuple[int, ...], dtype: str) -> int:
    return -(-int(np.prod(shape)) * np.dtype(dtype).itemsize // _ALIGNMENT) * _ALIGNMENT

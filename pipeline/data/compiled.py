"""How the functions that touch every pixel are compiled.

Numba compiles for the processor it finds, once on a machine (1 s, kept in ``__pycache__`` or in the user's cache).
Nothing is reordered or fused, so every processor computes the same levels.
"""

import functools
from collections.abc import Callable

import numba


def compiled(*arguments: str) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """For these types and no others, when the module is imported."""

    def compiled_for_them(function: Callable[..., None]) -> Callable[..., None]:
        compiler = functools.partial(numba.njit, f"void({', '.join(arguments)})", nogil=True, error_model="numpy")
        try:
            return compiler(cache=True)(function)
        except RuntimeError:  # neither this folder nor the home can be written to: every process compiles for itself
            return compiler()(function)

    return compiled_for_them

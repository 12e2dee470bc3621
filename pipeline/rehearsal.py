"""A graph run on shapes instead of numbers, to see what a batch would cost before anything is allocated.

The operators of ``model.pt2`` are harmless one by one, but a few of them ask for terabytes (``aten.ones``, a padding of
10**9) or for days of products.
"""

import operator
from typing import Any

import torch
from torch import Tensor, fx
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils import _pytree
from torch.utils.flop_counter import FlopCounterMode

# Of all values held at a time, for an image: 128 MiB and 200 times its own bytes. swin_tiny at 224 px has 11 MB, which
# is 18 times the image.
_MAX_BYTES, _MAX_GROWTH = 128 << 20, 200
_MAX_FLOP = 3e13  # for an image; ViT-g/14 at 518 px has 4e12
_MAX_SCALAR = 2**63


class OverrunError(Exception):
    """A batch would cost more than that of an encoder."""


def rehearse(program: fx.GraphModule, images: Tensor) -> None:
    """Run ``program`` on the shape of ``images``. OverrunError beyond the limits; what torch raises in a broken graph.

    It takes about half as long as loading the program, and no memory.
    """
    shapes = FakeTensorMode(allow_fallback_kernels=False, allow_non_fake_inputs=True)
    max_bytes = len(images) * _MAX_BYTES + images.nbytes * _MAX_GROWTH
    with torch.no_grad(), shapes, FlopCounterMode(display=False) as counter:
        _Rehearsal(program, max_bytes).run(shapes.from_tensor(images))
    if (flop := counter.get_total_flops()) > len(images) * _MAX_FLOP:
        raise OverrunError(f"it would take {flop / len(images):.1e} FLOP an image, more than {_MAX_FLOP:.0e}")


class _Rehearsal(fx.Interpreter):
    """Adds up what the operators' results take, a view as much as a copy, until their last use."""

    def __init__(self, program: fx.GraphModule, max_bytes: int) -> None:
        super().__init__(program)
        self._max_bytes = max_bytes
        self._held: dict[fx.Node, int] = {}
        self._total = 0

    def run_node(self, n: fx.Node) -> Any:
        result = super().run_node(n)
        if n.op == "call_function" and n.target is not operator.getitem:
            self._held[n] = sum(map(_cost, _pytree.tree_leaves(result)))
            self._total += self._held[n]
        if self._total > self._max_bytes:
            raise OverrunError(f"{n.name} would hold {self._total:.1e} bytes, more than {self._max_bytes:.1e}")
        for unused in self.user_to_last_uses.get(n, ()):
            self._total -= self._held.pop(unused, 0)
        return result


def _cost(value: Any) -> int:
    """Bytes of a tensor. OverrunError for a whole number that is no size."""
    if isinstance(value, int) and abs(value) >= _MAX_SCALAR:
        raise OverrunError(f"a size of {value.bit_length()} bits")
    return value.numel() * value.element_size() if isinstance(value, Tensor) else 0

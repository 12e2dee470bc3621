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

_MAX_IMAGE_BYTES = 256 << 20  # of all values held at a time; resnet50 at 224 px has 10 MB, a batch shares its weights
_MAX_IMAGE_FLOP = 1e13  # ViT-g/14 at 518 px has 3.6e12
_MAX_SCALAR = 2**63


class OverrunError(Exception):
    """A batch would cost more than that of an encoder."""


def rehearse(program: fx.GraphModule, images: Tensor) -> None:
    """Run ``program`` on the shape of ``images``. OverrunError beyond the limits; what torch raises in a broken graph.

    It takes 1 ms an operator, and no memory.
    """
    shapes = FakeTensorMode(allow_fallback_kernels=False, allow_non_fake_inputs=True)
    with torch.no_grad(), shapes, FlopCounterMode(display=False) as counter:
        _Rehearsal(program, len(images) * _MAX_IMAGE_BYTES).run(shapes.from_tensor(images))
    if counter.get_total_flops() > len(images) * _MAX_IMAGE_FLOP:
        raise OverrunError(f"it takes {counter.get_total_flops() / len(images):.1e} FLOP an image")


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

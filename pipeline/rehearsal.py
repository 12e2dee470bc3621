"""A graph run on shapes instead of numbers, to see what a batch would cost before anything is allocated.

The operators of ``model.pt2`` are harmless one by one, but a few of them ask for terabytes (``aten.ones``, a padding of
10**9), for days of products, or for a loop of 10**7 steps (``aten.rnn_tanh``).
"""

import operator
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, fx
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils import _pytree
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

# Of all values held at a time, for an image: 128 MiB and 200 times its own bytes. swin_tiny at 224 px has 11 MB, which
# is 18 times the image.
_MAX_BYTES, _MAX_GROWTH = 128 << 20, 200
_MAX_FLOP = 3e13  # for an image; ViT-g/14 at 518 px has 4e12
_MAX_CALLS = 20_000  # of operators, 0.3 ms each, and parts that they cut; levit_128 has 1,287
_MAX_SCALAR = 2**63


class OverrunError(Exception):
    """A batch would cost more than that of an encoder."""


def rehearse(program: fx.GraphModule, images: Tensor) -> None:
    """Run ``program`` on the shape of ``images``. OverrunError beyond the limits; what torch raises in a broken graph.

    It takes about half as long as loading the program, and no memory.
    """
    shapes = FakeTensorMode(allow_fallback_kernels=False, allow_non_fake_inputs=True)
    max_bytes = len(images) * _MAX_BYTES + images.nbytes * _MAX_GROWTH
    # The counter is the outermost, because it takes composite operators apart and the others see the parts.
    with torch.no_grad(), shapes, _CallLimit(), FlopCounterMode(display=False) as counter:
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

    def call_function(self, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Python's operators take numbers only: what they make of lists, strings and tensors is not added up."""
        if isinstance(target, torch._ops.OpOverload):
            if _gives_list(target) and target.overloadpacket not in _CUTS:
                raise OverrunError(f"{target} gives any number of tensors; encoders cut theirs by unbind, split, chunk")
        else:
            taken = args[1:] if target is operator.getitem and isinstance(args[0], tuple | list) else args
            if not all(isinstance(each, int | float) for each in taken):
                raise OverrunError(f"{target.__name__} of {', '.join(type(each).__name__ for each in taken)}")
        return super().call_function(target, args, kwargs)

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


class _CallLimit(TorchDispatchMode):
    """OverrunError for an operator that calls others without end, or gives parts without end."""

    def __init__(self) -> None:
        super().__init__()
        self._calls = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        self._calls += 1 + _num_parts(func, *args)
        if self._calls > _MAX_CALLS:
            raise OverrunError(f"{func} would be one of more than {_MAX_CALLS} operators or their results")
        return func(*args, **(kwargs or {}))


_CUTS = {torch.ops.aten.unbind, torch.ops.aten.split, torch.ops.aten.split_with_sizes, torch.ops.aten.chunk}


def _gives_list(func: torch._ops.OpOverload) -> bool:
    return any(isinstance(each.type, torch.ListType) for each in func._schema.returns)


def _num_parts(func: torch._ops.OpOverload, *args: Any) -> int:
    """How many tensors ``func`` cuts its input into; ``chunk`` is seen as ``split``."""
    match func.overloadpacket, args:
        case torch.ops.aten.unbind, (tensor, *dim):
            return int(tensor.shape[dim[0] if dim else 0])
        case torch.ops.aten.split, (tensor, size, *dim):
            return int(tensor.shape[dim[0] if dim else 0] // max(size, 1))
        case torch.ops.aten.split_with_sizes, (_, sizes, *_):
            return len(sizes)
    return 0


def _cost(value: Any) -> int:
    """Bytes of a tensor. OverrunError for a whole number that is no size."""
    if isinstance(value, int) and abs(value) >= _MAX_SCALAR:
        raise OverrunError(f"a size of {value.bit_length()} bits")
    return value.numel() * value.element_size() if isinstance(value, Tensor) else 0

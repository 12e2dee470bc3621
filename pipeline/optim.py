"""Optimizers for large batches: LARS in its published form, learning-rate scaling, parameter groups, EMA.

LARS (You et al. 2017, arXiv:1708.03888) scales each weight's gradient by q = eta * |w| / |g + wd * w|. It is SGD with
dampening 1 - q, so on the CPU each weight is one pass of torch's fused SGD: 1.7x as fast as timm's and lightly's. The
update does not depend on the gradient's scale, so neither may its precision: see ``_fused_sgd`` and ``_norms``.
"""

import math
from collections.abc import Callable, Iterable
from typing import Annotated, Any, Literal

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.optim import SGD, AdamW, Optimizer

from pipeline.errors import DeterministicError
from pipeline.section import Section

Share = Annotated[float, Field(ge=0, lt=1)]


class OptimError(DeterministicError):
    """``optim`` names what the method does not have."""


class OptimConfig(Section):
    """How the weights move. The defaults are SimCLR's: LARS, 0.3 * B / 256, 10 epochs of warm-up, then cosine."""

    name: Literal["lars", "sgd", "adamw"] = "lars"
    lr: float = Field(default=0.3, gt=0)  # base; the peak is lr x B/256, lr x sqrt(B) or lr
    lr_scaling: Literal["linear", "sqrt", "none"] = "linear"
    end_lr: float = Field(default=0.0, ge=0)  # where the cosine ends, as a share of the peak
    warmup_epochs: float = Field(default=10, ge=0)  # less than train.epochs
    weight_decay: float = Field(default=1e-6, ge=0)
    decay_biases: bool = False  # also decay biases and norms, as MoCo v1/v2, SimSiam and MoCo v3's ViTs do
    momentum: Share = 0.9  # lars, sgd
    betas: tuple[Share, Share] = (0.9, 0.999)  # adamw
    bias_lr: float = Field(default=1.0, gt=0)  # learning rate of biases and norms, as a share (Barlow Twins: 7.5e-4)
    constant_lr: tuple[str, ...] = ()  # submodules that stay at the peak, e.g. [predictor] (SimSiam)
    trust_coefficient: float = Field(default=0.001, gt=0)  # lars: eta
    trust_form: Literal["published", "timm"] = "published"  # eta|w|/|g + wd w|, or eta|w|/(|g| + wd|w| + 1e-8)
    lr_in_momentum: bool = False  # lars: the buffer holds lr * update, as TensorFlow SimCLR's does


def peak_lr(config: OptimConfig, global_batch_size: int) -> float:
    """The learning rate after warm-up. Both of SimCLR's rules, 0.3 * B/256 and 0.075 * sqrt(B), give 4.8 at 4096."""
    scale = {"linear": global_batch_size / 256, "sqrt": math.sqrt(global_batch_size), "none": 1.0}
    return config.lr * scale[config.lr_scaling]


def check_constant_lr(module: nn.Module, config: OptimConfig) -> None:
    """OptimError unless each name in ``config.constant_lr`` is a submodule with parameters to train."""
    children = [name for name, child in module.named_children() if any(p.requires_grad for p in child.parameters())]
    for name in config.constant_lr:
        if name not in children:
            raise OptimError(
                f"optim.constant_lr names {name!r}; the submodules of this method that are trained are "
                f"{', '.join(children)}"
            )


def build_optimizer(module: nn.Module, config: OptimConfig, peak: float) -> Optimizer:
    """The optimizer over the parameters of ``module`` that require a gradient; biases and norms apart.

    Args:
        peak: the learning rate after warm-up, ``peak_lr(config, global_batch_size)``; groups in
            ``config.constant_lr`` stay there, ``set_lr`` moves the others.

    Raises:
        OptimError: a name in ``config.constant_lr`` is no submodule.
    """
    check_constant_lr(module, config)
    groups = []
    for constant in (False, True):
        parameters = [
            parameter
            for name, parameter in module.named_parameters()
            if parameter.requires_grad and (name.split(".")[0] in config.constant_lr) == constant
        ]
        weights = [p for p in parameters if p.ndim > 1]
        biases = [p for p in parameters if p.ndim <= 1]  # and norms: out of LARS's adaptation, by default of decay
        for members, decay, scale, adapt in (
            (weights, config.weight_decay, 1.0, True),
            (biases, config.weight_decay if config.decay_biases else 0.0, config.bias_lr, False),
        ):
            if members:
                groups.append(
                    {
                        "params": members,
                        "weight_decay": decay,
                        "lr": peak * scale,
                        "lr_scale": scale,
                        "constant_lr": constant,
                        "adapt": adapt,
                    }
                )
    if config.name == "adamw":
        return AdamW(groups, lr=peak, betas=config.betas, fused=True)
    if config.name == "sgd":
        return SGD(groups, lr=peak, momentum=config.momentum, fused=True)
    return LARS(
        groups,
        lr=peak,
        momentum=config.momentum,
        trust_coefficient=config.trust_coefficient,
        trust_form=config.trust_form,
        lr_in_momentum=config.lr_in_momentum,
    )


def set_lr(optimizer: Optimizer, lr: float) -> None:
    """Give every group the learning rate of this step, times its share; constant groups keep theirs."""
    for group in optimizer.param_groups:
        if not group["constant_lr"]:
            group["lr"] = lr * group["lr_scale"]


@torch.no_grad()
def match_layouts_(optimizer: Optimizer) -> None:
    """Lay out each state tensor as its parameter is, e.g. after a run resumes with ``channels_last`` switched.

    torch's fused kernels walk raw memory, and without a warning mix up the elements of tensors that differ in layout.
    """
    for parameter, state in optimizer.state.items():
        for name, value in state.items():
            if isinstance(value, Tensor) and value.shape == parameter.shape:
                state[name] = _laid_out_like(value, parameter)


@torch.no_grad()
def ema_update_(pairs: Iterable[tuple[nn.Module, nn.Module]], decay: float) -> None:
    """momentum <- decay * momentum + (1 - decay) * online, for the parameters of each (online, momentum) pair.

    Buffers are left alone: a momentum encoder keeps its own BatchNorm statistics. Call it after the
    optimizer's step (BYOL), one fused pass: 3 to 4x a Python loop, at the speed of a flat lerp.
    """
    online: list[Tensor] = []
    momentum: list[Tensor] = []
    for online_module, momentum_module in pairs:
        online += list(online_module.parameters())
        momentum += list(momentum_module.parameters())
    if online:
        torch._foreach_lerp_(momentum, online, 1 - decay)


class LARS(Optimizer):
    """Layer-wise adaptive rate scaling with heavy-ball momentum.

    ``v <- m*v + q*(g + wd*w)``, ``w <- w - lr*v``, where q is 1 for groups with ``adapt=False`` and for weights
    of which either norm is 0. ``trust_form="published"``: q = eta*|w| / |g + wd*w| (SimCLR, BYOL, Barlow Twins,
    VICReg); ``"timm"``: q = eta*|w| / (|g| + wd*|w| + 1e-8) (apex, lightly). With ``lr_in_momentum`` the buffer
    accumulates lr*q*(g + wd*w) (TensorFlow SimCLR); both agree while the learning rate is constant.
    """

    def __init__(
        self,
        params: Any,
        lr: float,
        momentum: float = 0.9,
        weight_decay: float = 0.0,
        trust_coefficient: float = 0.001,
        trust_form: Literal["published", "timm"] = "published",
        lr_in_momentum: bool = False,
    ) -> None:
        defaults = {
            "lr": lr,
            "momentum": momentum,
            "weight_decay": weight_decay,
            "trust_coefficient": trust_coefficient,
            "trust_form": trust_form,
            "lr_in_momentum": lr_in_momentum,
            "adapt": True,
        }
        super().__init__(params, defaults)

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One update from the gradients at hand, or from those that ``closure`` makes; its loss, or None.

        Gradients are not changed.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            weights = [w for w in group["params"] if w.grad is not None]
            if not weights:
                continue
            gradients = [_laid_out_like(w.grad, w) for w in weights if w.grad is not None]
            buffers = [self._buffer(w) for w in weights]
            if not group["adapt"]:
                _fused_sgd(weights, gradients, buffers, group, ratio=1.0)
            elif weights[0].device.type == "cpu":
                for weight, gradient, buffer in zip(weights, gradients, buffers, strict=True):
                    ratio = _trust_ratio(*_norms(weight, gradient, group), group)
                    _fused_sgd([weight], [gradient], [buffer], group, ratio)
            else:
                _foreach_lars(weights, gradients, buffers, group)
        return loss

    def _buffer(self, weight: Tensor) -> Tensor:
        state = self.state[weight]
        if "momentum_buffer" not in state:
            state["momentum_buffer"] = torch.zeros_like(weight)
        buffer: Tensor = state["momentum_buffer"]
        return buffer


SMALLEST_SCALE = 2.0**-29  # of gradients in a fused step: 1 - (1 - s), in float64, is off by 2**-53: 6e-8 of s


def _fused_sgd(
    weights: list[Tensor], gradients: list[Tensor], buffers: list[Tensor], group: dict[str, Any], ratio: float
) -> None:
    """v <- m*v + s*(g + wd*w), w <- w - lr*v in one pass, where s = ratio (times lr when the buffer holds it).

    torch takes s as a dampening, 1 - s. What is left of a small s by that is too little: s is put into the gradients.
    """
    lr, decay, inside = group["lr"], group["weight_decay"], group["lr_in_momentum"]
    scale = ratio * lr if inside else ratio
    if 0 < scale < SMALLEST_SCALE:
        gradients = [g.add(w, alpha=decay).mul_(scale) for g, w in zip(gradients, weights, strict=True)]
        scale, decay = 1.0, 0.0
    torch._fused_sgd_(
        weights,
        gradients,
        buffers,
        weight_decay=decay,
        momentum=group["momentum"],
        lr=1.0 if inside else lr,
        dampening=1 - scale,
        nesterov=False,
        maximize=False,
        is_first_step=False,  # buffers start at zero: the first step is dampened like every other
    )


CHUNK = 131072  # 512 KiB each of weight and gradient: three dot products read them from the cache


def _laid_out_like(x: Tensor, like: Tensor) -> Tensor:
    """``x`` in the memory layout of ``like``, which torch's fused kernels take for granted; mostly ``x`` itself."""
    strides = [[s for s, n in zip(t.stride(), t.shape, strict=True) if n > 1] for t in (x, like)]
    return x if strides[0] == strides[1] else torch.empty_like(like).copy_(x)


def _flat(x: Tensor) -> Tensor:
    """The elements of a dense tensor in the order of its memory; flatten() would copy channels_last weights."""
    return x.as_strided((x.numel(),), (1,))


def _norms(weight: Tensor, gradient: Tensor, group: dict[str, Any]) -> tuple[float, float]:
    """|w| and |g + wd*w| (|g| in timm's form), from w.w, g.g and g.w in one pass over memory.

    torch's own norm of 2 million float32 is off by 3e-5; these dot products, summed in float64 over chunks, are by
    1e-7. Where squares leave float32's range (1e-38 to 3e38) or the sum cancels, all is done in float64.
    """
    decay = group["weight_decay"] if group["trust_form"] == "published" else 0.0
    ww = gg = gw = 0.0
    for w, g in zip(_flat(weight).split(CHUNK), _flat(gradient).split(CHUNK), strict=True):
        if w.dtype.itemsize < 4:  # 16 bits have neither the digits nor, in float16, the range
            w, g = w.float(), g.float()
        gw += float(torch.dot(g, w)) if decay else 0.0  # first: it reads both from memory at once
        ww += float(torch.dot(w, w))
        gg += float(torch.dot(g, g))
    square = gg + 2 * decay * gw + decay**2 * ww  # |g + wd*w|^2
    smallest = 1e-30 * weight.numel()  # of less the squares below 1e-38, which are lost, could be a digit
    cancelled = square < 1e-2 * (gg + decay**2 * ww)  # the expansion has lost its digits
    if min(ww, gg) > smallest and max(ww, gg) < math.inf and not cancelled:
        return math.sqrt(ww), math.sqrt(square)
    wide, update = weight.double(), gradient.double().add(weight, alpha=decay)
    return float(torch.linalg.vector_norm(wide)), float(torch.linalg.vector_norm(update))


def _trust_ratio(w_norm: float, norm: float, group: dict[str, Any]) -> float:
    """q, from |w| and |g + wd*w|, or |g| in timm's form; 1 where either is 0."""
    if not w_norm or not norm:
        return 1.0
    divisor = norm + group["weight_decay"] * w_norm + 1e-8 if group["trust_form"] == "timm" else norm
    ratio: float = group["trust_coefficient"] * w_norm / divisor
    return ratio


def _foreach_lars(weights: list[Tensor], gradients: list[Tensor], buffers: list[Tensor], group: dict[str, Any]) -> None:
    """The same update by multi-tensor kernels, which take all weights at once.

    The ratios go through the host, which has just waited for the loss: on the device, multiplying each update by a
    tensor of its own would be a launch per weight.
    """
    updates = list(torch._foreach_add(gradients, weights, alpha=group["weight_decay"]))
    measured = [*weights, *(gradients if group["trust_form"] == "timm" else updates)]
    norms = torch.stack(torch._foreach_norm(measured, dtype=torch.float64)).tolist()
    pairs = zip(norms[: len(weights)], norms[len(weights) :], strict=True)
    torch._foreach_mul_(updates, [_trust_ratio(*pair, group) for pair in pairs])
    _fused_sgd(weights, updates, buffers, {**group, "weight_decay": 0.0}, ratio=1.0)

"""A training step and its parts against lightly, timm and physical floors: one thread, process CPU time.

    python -m tests.benchmarks.step [--quick] [--only lars,ema]

Every figure is a ratio of two things done in turn in this run, the median over the repetitions. ``x_vs_peer`` is the
peer's cost over ours (2 = twice as fast, or half the memory); ``lars_vs_floor`` is our time over that of the floor
(fused SGD and the norms alone), ``ema_vs_lerp`` over that of one flat lerp. Progress goes to stderr; the last line of
stdout is one JSON object.
"""

import argparse
import copy
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Literal

import timm
import timm.optim
import torch
import torch.nn.functional as F
from lightly.loss import NegativeCosineSimilarity, NTXentLoss
from lightly.models.modules import BYOLPredictionHead, BYOLProjectionHead, MoCoProjectionHead, SimCLRProjectionHead
from lightly.models.utils import deactivate_requires_grad, update_momentum
from lightly.utils import lars as lightly_lars
from torch import Tensor, nn

from pipeline.config import TrainConfig
from pipeline.data.batch import Batch
from pipeline.losses.infonce import info_nce
from pipeline.losses.ntxent import ntxent
from pipeline.methods.base import method_class
from pipeline.models.backbone import Backbone, BackboneConfig
from pipeline.optim import LARS, OptimConfig, build_optimizer, ema_update_
from pipeline.train import Hyperparameters, prepare, train_step

Work = Callable[[], object]


def cost(work: Work) -> float:
    """Seconds of CPU time of this process."""
    start = time.process_time()
    work()
    return time.process_time() - start


def ratio(peer: Work, ours: Work, repetitions: int) -> float:
    """The median of peer / ours, in turn; one untimed round first."""
    peer(), ours()
    ratios = []
    for _ in range(repetitions):
        theirs = cost(peer)
        ratios.append(theirs / cost(ours))
    return statistics.median(ratios)


def note(text: str) -> None:
    """What a reader of the figures should know of this machine."""
    print(text, file=sys.stderr, flush=True)


# --- optimizer and EMA, on ResNet-50's parameters -------------------------------------------------------------------


def _resnet50() -> list[nn.Parameter]:
    model = timm.create_model("resnet50", num_classes=0)
    for parameter in model.parameters():
        parameter.grad = torch.randn_like(parameter) * 1e-3
    return list(model.parameters())


def _groups(parameters: list[nn.Parameter], **extra: object) -> list[dict[str, object]]:
    weights, biases = [p for p in parameters if p.ndim > 1], [p for p in parameters if p.ndim <= 1]
    return [{"params": weights, "weight_decay": 1e-6}, {"params": biases, "weight_decay": 0.0, **extra}]


def bench_lars(repetitions: int) -> dict[str, float]:
    """A LARS step; the floor is torch's fused SGD plus |w| and |g| of each weight."""
    parameters = _resnet50()
    ours = LARS(_groups(parameters, adapt=False), lr=0.1)
    in_timm = timm.optim.Lars(_groups(parameters), lr=0.1, momentum=0.9)
    in_lightly = lightly_lars.LARS(_groups(parameters), lr=0.1, momentum=0.9)
    sgd = torch.optim.SGD(_groups(parameters), lr=0.1, momentum=0.9, fused=True)

    def floor() -> None:
        with torch.no_grad():
            for p in parameters:
                if p.ndim > 1:
                    torch.linalg.vector_norm(p)
                    torch.linalg.vector_norm(p.grad)
        sgd.step()

    return {
        "lars_vs_timm": ratio(in_timm.step, ours.step, repetitions),
        "lars_vs_lightly": ratio(in_lightly.step, ours.step, repetitions),
        "lars_vs_floor": 1 / ratio(floor, ours.step, repetitions),
    }


def bench_ema(repetitions: int) -> dict[str, float]:
    """Moving a momentum ResNet-50; the loop is MoCo's and BYOL's, as released.

    The floor, one flat lerp, bounds the gain over the loop: 2.9x to 3.3x on a Xeon, 4.1x on AMD Zen 4. Walking the
    modules for their parameters is 5 % of ours. As a step of torch's fused SGD, with a negative rate and decay, it
    would be 1.16x as fast on the Xeon: 2 ms that are not worth the riddle, for a step takes seconds there.
    """
    online = timm.create_model("resnet50", num_classes=0)
    momentum = copy.deepcopy(online).requires_grad_(False)
    flat, flat_online = (torch.randn(sum(p.numel() for p in online.parameters())) for _ in range(2))

    def loop() -> None:
        for p, m in zip(online.parameters(), momentum.parameters(), strict=True):
            m.data = m.data * 0.99 + p.data * (1.0 - 0.99)

    def ours() -> None:
        ema_update_([(online, momentum)], 0.99)

    def lerp() -> None:
        flat.lerp_(flat_online, 0.01)

    note(f"the flat lerp itself is {ratio(loop, lerp, repetitions):.2f}x as fast as the loop on this machine")
    return {
        "ema_vs_loop": ratio(loop, ours, repetitions),
        "ema_vs_lightly": ratio(lambda: update_momentum(online, momentum, 0.99), ours, repetitions),
        "ema_vs_lerp": 1 / ratio(lerp, ours, repetitions),
    }


# --- losses ----------------------------------------------------------------------------------------------------------


def bench_ntxent(repetitions: int) -> dict[str, float]:
    """Forward and backward at N = 4,096 x 128. bf16: under autocast; lightly in float32 both times."""
    z1, z2 = (torch.randn(4096, 128, requires_grad=True) for _ in range(2))
    lightly = NTXentLoss(0.1)

    def ours_bf16() -> None:
        with torch.autocast("cpu", torch.bfloat16):
            loss = ntxent(z1, z2, 0.1)
        loss.backward()

    def peer() -> None:
        lightly(z1, z2).backward()

    return {
        "ntxent_fp32_vs_lightly": ratio(peer, lambda: ntxent(z1, z2, 0.1).backward(), repetitions),
        "ntxent_bf16_vs_lightly": ratio(peer, ours_bf16, repetitions),
        "ntxent_peak_vs_lightly": _peak_mib("NTXentLoss(0.1)(z1, z2)") / _peak_mib("ntxent(z1, z2, 0.1)"),
    }


_PEAK = """
import re, torch
from lightly.loss import NTXentLoss
from pipeline.losses.ntxent import ntxent
torch.set_num_threads(1)
z1, z2 = torch.randn(2, 64, 128).requires_grad_().unbind()
({loss}).backward()
z1, z2 = torch.randn(2, 4096, 128).requires_grad_().unbind()
def kib(key):
    return int(re.search(key + r":\\s+(\\d+)", open("/proc/self/status").read())[1])
open("/proc/self/clear_refs", "w").write("5")  # the peak so far (imports) is forgotten
before = kib("VmRSS")
({loss}).backward()
print((kib("VmHWM") - before) / 1024)
"""


def _peak_mib(loss: str) -> float:
    """The growth of a fresh process's peak memory during one forward and backward."""
    run = subprocess.run([sys.executable, "-c", _PEAK.format(loss=loss)], capture_output=True, text=True, check=True)
    return float(run.stdout.split()[-1])


def bench_queue(repetitions: int) -> dict[str, float]:
    """MoCo's loss, B = 256 queries against K = 65,536 keys of 128, forward and backward."""
    size, dim, batch = 65536, 128, 256
    queue = F.normalize(torch.randn(size, dim), dim=1)
    query, positive = torch.randn(batch, dim, requires_grad=True), F.normalize(torch.randn(batch, dim), dim=1)
    lightly = NTXentLoss(0.2, memory_bank_size=(size, dim))

    def ours(negatives: Tensor) -> None:
        info_nce(F.normalize(query, dim=1), positive, negatives, 0.2).backward()

    def peer() -> None:
        lightly(query, positive).backward()

    half = queue.bfloat16()
    return {
        "queue_loss_vs_lightly": ratio(peer, lambda: ours(queue), repetitions),
        "queue_loss_bf16_vs_lightly": ratio(peer, lambda: ours(half), repetitions),
    }


# --- whole steps -----------------------------------------------------------------------------------------------------

BATCH = 32


def _backbone() -> Backbone:
    """ResNet-18 with the CIFAR stem; both sides train the same network."""
    return Backbone(BackboneConfig(name="resnet18", stem="cifar", image_size=32))


def _our_step(name: str, config: TrainConfig, **settings: object) -> Work:
    cls = method_class(name)
    method = cls(_backbone(), cls.Config.model_validate({"name": name, **settings})).train()
    optimizer = build_optimizer(method, OptimConfig(name="lars"), peak=0.1)
    model = prepare(method, config)
    format_ = torch.channels_last if config.channels_last else torch.contiguous_format
    views = [torch.randn(BATCH, 3, 32, 32).contiguous(memory_format=format_) for _ in range(2)]
    batch = Batch(views, torch.arange(BATCH))
    return lambda: train_step(model, method, optimizer, batch, Hyperparameters(lr=0.1, ema_decay=0.99), config)


class _LightlyStep:
    """The same step as lightly's examples write it, from lightly's parts."""

    def __init__(self, name: str) -> None:
        self.name, self.backbone = name, _backbone().train()
        self.views = [torch.randn(BATCH, 3, 32, 32) for _ in range(2)]
        trained: list[nn.Module] = [self.backbone]
        if name == "simclr":
            self.head: nn.Module = SimCLRProjectionHead(512, 512, 128)
            self.criterion: nn.Module = NTXentLoss(0.1)
        elif name == "byol":
            self.head, self.predictor = BYOLProjectionHead(512, 4096, 256), BYOLPredictionHead(256, 4096, 256)
            self.criterion = NegativeCosineSimilarity()
            trained.append(self.predictor)
        else:
            self.head = MoCoProjectionHead(512, 512, 128)
            self.criterion = NTXentLoss(0.2, memory_bank_size=(65536, 128))
        if name != "simclr":
            self.momentum_backbone, self.momentum_head = copy.deepcopy(self.backbone), copy.deepcopy(self.head)
            deactivate_requires_grad(self.momentum_backbone)
            deactivate_requires_grad(self.momentum_head)
        trained.append(self.head)
        parameters = [p for module in trained for p in module.parameters()]
        self.optimizer = lightly_lars.LARS(_groups(parameters), lr=0.1, momentum=0.9)

    def __call__(self) -> None:
        if self.name != "simclr":
            update_momentum(self.backbone, self.momentum_backbone, m=0.99)
            update_momentum(self.head, self.momentum_head, m=0.99)
        x1, x2 = self.views
        if self.name == "simclr":
            loss = self.criterion(self.head(self.backbone(x1)), self.head(self.backbone(x2)))
        elif self.name == "byol":
            p1, p2 = (self.predictor(self.head(self.backbone(x))) for x in (x1, x2))
            with torch.no_grad():
                z1, z2 = (self.momentum_head(self.momentum_backbone(x)) for x in (x1, x2))
            loss = 0.5 * (self.criterion(p1, z2) + self.criterion(p2, z1))
        else:
            query = self.head(self.backbone(x1))
            with torch.no_grad():
                key = self.momentum_head(self.momentum_backbone(x2))
            loss = self.criterion(query, key)
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()


def fastest_settings(repetitions: int) -> TrainConfig:
    """The memory format and precision in which this CPU passes ResNet-18 forward and backward fastest.

    bf16 gains 2x on AMD Zen 4 and where there is AMX; a Xeon without has no faster arithmetic for it and loses.
    What is left there is bounded by the convolutions, 85 % of the step: both sides compute most of them at 90-110 % of
    the speed of a large matrix product.
    """
    gains: dict[tuple[bool, Literal["float32", "bf16"]], float] = {(False, "float32"): 1.0}
    peer = _forward_backward(channels_last=False, precision="float32")
    for channels_last, precision in ((True, "float32"), (False, "bf16"), (True, "bf16")):
        gains[channels_last, precision] = ratio(peer, _forward_backward(channels_last, precision), repetitions)
    best = max(gains, key=lambda settings: gains[settings])
    for (channels_last, precision), gain in gains.items():
        chosen = "  <- used" if (channels_last, precision) == best else ""
        note(f"ResNet-18 {precision}{', channels_last' if channels_last else ''}: {gain:.2f}x{chosen}")
    note(f"bf16 / float32, both channels_last: {gains[True, 'bf16'] / gains[True, 'float32']:.2f}x")
    return TrainConfig(channels_last=best[0], precision=best[1])


def _forward_backward(channels_last: bool, precision: str) -> Work:
    format_ = torch.channels_last if channels_last else torch.contiguous_format
    backbone, x = _backbone().to(memory_format=format_), torch.randn(BATCH, 3, 32, 32).to(memory_format=format_)

    def work() -> None:
        with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"):
            features = backbone(x)
        features.float().square().mean().backward()

    return work


def bench_step(repetitions: int) -> dict[str, float]:
    """ResNet-18 at 32 px, batch 32: forward, backward, update, EMA."""
    config = fastest_settings(repetitions)
    ours = {
        "simclr": _our_step("simclr", config),
        "byol": _our_step("byol", config),
        "moco": _our_step("moco_v2", config, queue_dtype="bfloat16"),
    }
    return {f"step_{name}_vs_lightly": ratio(_LightlyStep(name), step, repetitions) for name, step in ours.items()}


BENCHMARKS = {  # repetitions: full, quick
    "lars": (bench_lars, 15, 5),
    "ema": (bench_ema, 15, 5),
    "ntxent": (bench_ntxent, 5, 1),
    "queue": (bench_queue, 9, 3),
    "step": (bench_step, 5, 1),
}


def main() -> None:
    """Run what was asked for and print the JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="under a minute; fewer repetitions")
    parser.add_argument("--only", default=",".join(BENCHMARKS), help=f"some of {', '.join(BENCHMARKS)}")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    figures: dict[str, float] = {}
    for name in arguments.only.split(","):
        bench, full, quick = BENCHMARKS[name]
        figures |= {key: round(value, 3) for key, value in bench(quick if arguments.quick else full).items()}
        note(f"{name} {figures}")
    print(json.dumps(figures))


if __name__ == "__main__":
    main()

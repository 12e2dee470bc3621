"""The same run at W = 1, 2 and 4 ranks, for every method: what agrees, and how closely, as a table.

    python -m tests.methods.invariance      # prints the table in Markdown

A run is 20 optimizer steps on the same global batches with the optimizer of the method's shipped recipe. An entry is
the largest difference between W ranks and one process, relative to the norm of the tensors compared.
"""

import functools
import sys
from collections.abc import Callable
from pathlib import Path

import torch
import yaml
from torch import Tensor

from pipeline import distributed
from pipeline.data.batch import Batch
from pipeline.methods.base import Method, method_class, method_names
from pipeline.models.backbone import BackboneConfig, random_backbone
from pipeline.optim import OptimConfig, build_optimizer, ema_update_, set_lr
from tests import gloo

STEPS, GLOBAL_BATCH = 20, 16
BACKBONE = BackboneConfig(name="resnet18", args={"layers": [1, 1, 1, 1], "channels": [8, 16, 16, 32]}, image_size=32)
SMALL = {  # widths that keep 20 steps of 8 methods at 3 world sizes within seconds
    "projection_dim": 16,
    "projection_hidden_dim": 32,
    "hidden_dim": 32,
    "predictor_hidden_dim": 8,
    "num_samples": 50,
    "num_negatives": 30,
    "queue_size": 40,  # not a multiple of the batch, so that it wraps around inside one
}
LR = {"lars": 0.3, "sgd": 0.02}
CONFIGS = Path(__file__).parents[2] / "configs" / "pretrain"


def small_method(name: str, **settings: object) -> Method:
    """The method with narrow heads around a narrow ResNet-10."""
    cls = method_class(name)
    values = {key: value for key, value in SMALL.items() if key in cls.Config.model_fields}
    backbone = random_backbone(BACKBONE, seed=0)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        return cls(backbone, cls.Config.model_validate({"name": name, **values, **settings}))


def batch(step: int, dtype: torch.dtype) -> Batch:
    """This rank's slice of the global batch at ``step``: two views that share most of their content."""
    generator = torch.Generator().manual_seed(step)
    images = torch.randn(GLOBAL_BATCH, 3, 32, 32, generator=generator, dtype=torch.float64)
    views = [images + 0.3 * torch.randn(images.shape, generator=generator, dtype=torch.float64) for _ in range(2)]
    ids = torch.arange(GLOBAL_BATCH)
    rank, world = distributed.rank(), distributed.world_size()
    return Batch([view.to(dtype).chunk(world)[rank] for view in views], ids.chunk(world)[rank])


def train(
    name: str,
    dtype: torch.dtype,
    steps: int,
    serve: Callable[[Method], None] = lambda method: None,
    **settings: object,
) -> dict[str, dict[str, Tensor]]:
    """A run on this rank: losses of all steps, the last gradients, and the state at the end, by group."""
    method = distributed.convert_global_bn(small_method(name, **settings).to(dtype))
    recipe = yaml.safe_load((CONFIGS / f"{name}-resnet50-224.yaml").read_text())["optim"]
    config = OptimConfig.model_validate(recipe)
    optimizer = build_optimizer(method, config, LR[config.name])
    model = distributed.data_parallel(method)
    losses = []
    serve(method)
    for step in range(steps):
        set_lr(optimizer, LR[config.name] * (step + 1) / steps)
        optimizer.zero_grad()
        loss, _ = model(batch(step, dtype))
        loss.backward()
        optimizer.step()
        ema_update_(method.momentum_pairs(), 0.9)
        losses.append(distributed.all_reduce_mean(loss))
    groups: dict[str, dict[str, Tensor]] = {
        "loss": {"loss": torch.stack(losses)},
        "gradient": {n: p.grad for n, p in method.named_parameters() if p.grad is not None},
        "weights": {n: p.detach() for n, p in method.named_parameters() if p.requires_grad},
        "BN statistics": {n: b for n, b in method.named_buffers() if "running" in n},
        "momentum encoder": {n: p for n, p in method.named_parameters() if n.startswith("momentum_")},
        "negatives": {
            name: value
            for name, value in method.state_dict().items()
            if name.startswith(("queue.", "bank.")) and not name.endswith("_extra_state")  # a seed of 62 bits
        },
    }
    return {group: tensors for group, tensors in groups.items() if tensors}


def difference(actual: dict[str, Tensor], expected: dict[str, Tensor]) -> float:
    """The norm of the difference of all tensors together, relative to the norm of the expected ones."""
    assert actual.keys() == expected.keys()
    gap = sum(float((actual[name].double() - expected[name].double()).square().sum()) for name in expected)
    return (gap / sum(float(value.double().square().sum()) for value in expected.values())) ** 0.5


def differences(name: str, world: int, dtype: torch.dtype, steps: int = STEPS) -> dict[str, float]:
    """By group, the largest difference of any of ``world`` ranks from one process."""
    expected = _one_process(name, dtype, steps)
    ranks = gloo.run(world, train, name, dtype, steps)
    return {group: max(difference(rank[group], expected[group]) for rank in ranks) for group in expected}


@functools.cache
def _one_process(name: str, dtype: torch.dtype, steps: int) -> dict[str, dict[str, Tensor]]:
    return train(name, dtype, steps)


GROUPS = ["loss", "gradient", "weights", "BN statistics", "momentum encoder", "negatives"]


def table() -> str:
    """All methods, W = 2 and 4 against 1, float64 after 20 steps and float32 after one."""
    rows = [
        f"Largest relative difference of 2 and 4 ranks from one process: float64 after {STEPS} optimizer steps "
        "(float32 after one).",
        "",
        "| method | " + " | ".join(GROUPS) + " |",
        "|---" * (len(GROUPS) + 1) + "|",
    ]
    for name in method_names():
        double, single = (
            [differences(name, world, dtype, steps) for world in (2, 4)]
            for dtype, steps in ((torch.float64, STEPS), (torch.float32, 1))
        )
        cells = [
            f"{max(gaps[group] for gaps in double):.0e} ({max(gaps[group] for gaps in single):.0e})"
            if group in double[0]
            else ""
            for group in GROUPS
        ]
        rows.append(f"| {name} | " + " | ".join(cells) + " |")
        print(rows[-1], file=sys.stderr)
    return "\n".join(rows)


if __name__ == "__main__":
    print(table())

"""It learns: each method on 4,000 real digits against raw pixels, random init and lightly's parts, several seeds.

    python -m tests.benchmarks.learns [--seeds 3] [--epochs 8] [--methods simclr,byol] [--no-peers]

Both sides see the same batches of views, train the same network with the same optimizer and schedule, and are
evaluated alike: weighted kNN and linear probe on 1,000 digits not trained on. lightly has no MoCo v1, v2 and v3 apart:
its MoCo is compared with v2. Progress goes to stderr; stdout is the table in Markdown and one JSON object.
"""

import argparse
import copy
import json
import statistics
import sys
import tempfile
from collections.abc import Callable

import torch
from lightly.loss import BarlowTwinsLoss, NegativeCosineSimilarity, NTXentLoss, VICRegLoss
from lightly.models import modules
from lightly.models.modules import heads as vicreg_heads
from torch import Tensor, nn

from pipeline import schedules
from pipeline.config import Config, load_config, override
from pipeline.data.batch import Batch
from pipeline.data.manifest import Manifest
from pipeline.evaluate.report import evaluate_encoder
from pipeline.methods.base import Method, method_names
from pipeline.models.backbone import Backbone
from pipeline.models.momentum import momentum_copy
from pipeline.optim import build_optimizer, ema_update_, peak_lr, set_lr
from pipeline.preflight import prepare_data
from pipeline.train import build_method, make_loader, to_device

WIDTHS = {"hidden_dim": 512, "predictor_hidden_dim": 128}  # of the heads, where a method has the setting
SETTINGS: dict[str, list[str]] = {
    "simclr": ["method.temperature=0.2"],
    "moco_v1": ["method.temperature=0.2", "method.queue_size=2048", "method.ema_decay=0.99"],
    "moco_v2": ["method.temperature=0.2", "method.queue_size=2048", "method.ema_decay=0.99"],
    "moco_v3": ["method.temperature=0.2", "method.projection_dim=128", "method.ema_decay=0.98"],
    "byol": ["method.projection_dim=128", "method.ema_decay=0.98"],
    "simsiam": ["method.projection_dim=512", "optim.constant_lr=[predictor]"],
    "vicreg": ["method.projection_dim=512", "optim.lr=0.02"],
    "barlow": ["method.projection_dim=512", "method.redundancy_weight=0.02", "optim.lr=0.02"],
}
DEVICE = torch.device("cpu")


def config_of(name: str, seed: int, epochs: int, folder: str) -> Config:
    """The quickstart with another method: half as wide, its views, one SGD for both sides."""
    quickstart = load_config(
        "configs/quickstart.yaml",
        [
            f"storage.url={folder}",
            f"seed={seed}",
            f"train.epochs={epochs}",
            "model.args={channels: [16, 32, 64, 128]}",
            "optim={name: sgd, lr: 0.1, weight_decay: 1.0e-4, warmup_epochs: 1}",
            "data.loader_workers=0",
            "cluster.num_workers=1",
        ],
    )
    views = json.dumps([view.model_dump(mode="json") for view in quickstart.method.views])
    return override(quickstart, [f"method={{name: {name}, views: {views}}}", *SETTINGS[name], *_widths(name)])


def _widths(name: str) -> list[str]:
    fields = {"byol": ["hidden_dim"], "moco_v3": ["hidden_dim"], "simsiam": ["predictor_hidden_dim"]}
    return [f"method.{field}={WIDTHS[field]}" for field in fields.get(name, [])]


class LightlyMethod(nn.Module):
    """The method from lightly's heads and loss, in the form in which its examples combine them."""

    def __init__(self, name: str, backbone: Backbone) -> None:
        super().__init__()
        self.name, self.backbone = name, backbone
        width = backbone.feature_dim
        heads: dict[str, Callable[[], nn.Module]] = {
            "simclr": lambda: modules.SimCLRProjectionHead(width, width, 128),
            "moco_v2": lambda: modules.MoCoProjectionHead(width, width, 128),
            "byol": lambda: modules.BYOLProjectionHead(width, 512, 128),
            "simsiam": lambda: modules.SimSiamProjectionHead(width, 512, 512),
            "vicreg": lambda: vicreg_heads.VICRegProjectionHead(width, 512, 512, num_layers=3),
            "barlow": lambda: modules.BarlowTwinsProjectionHead(width, 512, 512),
        }
        losses: dict[str, Callable[[], nn.Module]] = {
            "simclr": lambda: NTXentLoss(0.2),
            "moco_v2": lambda: NTXentLoss(0.2, memory_bank_size=(2048, 128)),
            "byol": NegativeCosineSimilarity,
            "simsiam": NegativeCosineSimilarity,
            "vicreg": VICRegLoss,
            "barlow": lambda: BarlowTwinsLoss(lambda_param=0.02),
        }
        self.head, self.criterion = heads[name](), losses[name]()
        if name == "byol":
            self.predictor: nn.Module = modules.BYOLPredictionHead(128, 512, 128)
        elif name == "simsiam":
            self.predictor = modules.SimSiamPredictionHead(512, 128, 512)
        if name in ("byol", "moco_v2"):
            self.momentum_backbone, self.momentum_head = momentum_copy(self.backbone), momentum_copy(self.head)

    def forward(self, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        x1, x2 = batch.views
        if self.name == "moco_v2":
            query = self.head(self.backbone(x1))
            with torch.no_grad():
                key = self.momentum_head(self.momentum_backbone(x2))
            return self.criterion(query, key), {}
        z1, z2 = (self.head(self.backbone(x)) for x in (x1, x2))
        if self.name == "byol":
            p1, p2 = self.predictor(z1), self.predictor(z2)
            with torch.no_grad():
                t1, t2 = (self.momentum_head(self.momentum_backbone(x)) for x in (x1, x2))
            # lightly averages -cos, BYOL sums 2 - 2 cos: the same optimum, so the loss is put on BYOL's scale
            return 2 * (self.criterion(p1, t2) + self.criterion(p2, t1)), {}
        if self.name == "simsiam":
            p1, p2 = self.predictor(z1), self.predictor(z2)
            return 0.5 * (self.criterion(p1, z2.detach()) + self.criterion(p2, z1.detach())), {}
        return self.criterion(z1, z2), {}

    def momentum_pairs(self) -> list[tuple[nn.Module, nn.Module]]:
        if self.name not in ("byol", "moco_v2"):
            return []
        return [(self.backbone, self.momentum_backbone), (self.head, self.momentum_head)]


def train(method: Method | LightlyMethod, config: Config, batches: list[Batch]) -> None:
    """The schedule of ``pipeline.train`` over batches that both sides share."""
    optimizer = build_optimizer(method, config.optim, peak_lr(config.optim, config.train.global_batch_size))
    steps_per_epoch = len(batches) // config.train.epochs
    decay = getattr(config.method, "ema_decay", 0.0)
    decay_end = getattr(config.method, "ema_decay_end", decay)
    method.train()
    for step, batch in enumerate(batches):
        peak = peak_lr(config.optim, config.train.global_batch_size)
        set_lr(
            optimizer,
            schedules.warmup_cosine(step, warmup_steps=steps_per_epoch, total_steps=len(batches), peak=peak),
        )
        loss, _ = method(to_device(batch, config, DEVICE))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        ema_update_(
            method.momentum_pairs(), schedules.cosine(step, total_steps=len(batches), start=decay, end=decay_end)
        )


def scores(backbone: Backbone, config: Config, manifest: Manifest, *, baselines: bool) -> dict[str, float]:
    """knn and linear accuracy, in percent, by representation."""
    report = evaluate_encoder(
        backbone,
        manifest,
        config=config.evaluate,
        mean=config.data.mean,
        std=config.data.std,
        seed=config.seed,
        device=DEVICE,
        baselines=baselines,
    )
    kept = {key: 100 * value for key, value in report.metrics().items() if key.split("/")[0] in ("knn", "linear")}
    return kept


def main() -> None:
    """Train, evaluate, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--epochs", type=int, default=8)
    parser.add_argument("--methods", default=",".join(method_names()))
    parser.add_argument("--no-peers", action="store_true")
    arguments = parser.parse_args()
    results: dict[str, dict[str, list[float]]] = {}

    def record(row: str, values: dict[str, float]) -> None:
        for key, value in values.items():
            metric, representation = key.split("/")
            name = row if representation == "encoder" else representation
            results.setdefault(name, {}).setdefault(metric, []).append(value)
        print(row, values, file=sys.stderr)

    with tempfile.TemporaryDirectory() as folder:
        for seed in range(arguments.seeds):
            base = config_of("simclr", seed, arguments.epochs, folder)
            manifest = prepare_data(base)
            loader = make_loader(base, manifest)
            batches = list(loader.batches(0, arguments.epochs * loader.steps_per_epoch))
            for index, name in enumerate(arguments.methods.split(",")):
                config = config_of(name, seed, arguments.epochs, folder)
                ours = build_method(config)
                peer_backbone = copy.deepcopy(ours.backbone)
                train(ours, config, batches)
                record(name, scores(ours.backbone, config, manifest, baselines=index == 0))
                if name not in ("moco_v1", "moco_v3") and not arguments.no_peers:
                    torch.manual_seed(seed)
                    peer = LightlyMethod(name, peer_backbone)
                    train(peer, config, batches)
                    record(f"{name} (lightly)", scores(peer.backbone, config, manifest, baselines=False))
    print("| encoder | kNN, % | linear probe, % |\n|---|---|---|")
    for row, metrics in results.items():
        cells = [f"{statistics.mean(v):.1f} ± {statistics.pstdev(v):.1f}" for v in metrics.values()]
        print(f"| {row} | " + " | ".join(cells) + " |")
    print(json.dumps({row: {m: [round(x, 2) for x in v] for m, v in ms.items()} for row, ms in results.items()}))


if __name__ == "__main__":
    main()

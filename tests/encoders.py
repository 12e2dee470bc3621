"""A small encoder, exported as a real one is; the tests of export, registry and embedding share it."""

import hashlib
import shutil
from pathlib import Path
from typing import Literal

import torch

from pipeline.export import BundleManifest, export_encoder
from pipeline.model_card import ModelCard, Score
from pipeline.models.backbone import Backbone, BackboneConfig, random_backbone

MEAN, STD = (0.5, 0.4, 0.3), (0.2, 0.25, 0.3)
CARD = ModelCard(
    run_id="tiny-0123456789",
    method="simclr",
    hyperparameters={"method.temperature": "0.2", "optim.name": "lars"},
    data_digest="d" * 64,
    git_sha="a" * 40,
    metrics=(Score(metric="knn", encoder=0.9, raw_pixels=0.8, random_init=0.7), Score(metric="rank_me", encoder=31.5)),
)


def tiny_backbone(seed: int = 0, stem: Literal["imagenet", "cifar"] = "imagenet") -> Backbone:
    """ResNet-18 with 8 to 64 channels at 28 px, its BN statistics moved off their initial values."""
    config = BackboneConfig(name="resnet18", args={"channels": [8, 16, 32, 64]}, stem=stem, image_size=28)
    backbone = random_backbone(config, seed)
    backbone.train()(torch.randn(16, 3, 28, 28, generator=torch.Generator().manual_seed(seed)))
    return backbone.eval()


def golden_images() -> torch.Tensor:
    """(4, 3, 28, 28) uint8."""
    generator = torch.Generator().manual_seed(1)
    return torch.randint(0, 256, (4, 3, 28, 28), dtype=torch.uint8, generator=generator)


def export_tiny(folder: Path, backbone: Backbone | None = None) -> Path:
    """``folder``, holding the exported encoder."""
    export_encoder(backbone or tiny_backbone(), folder, mean=MEAN, std=STD, golden_images=golden_images(), card=CARD)
    return folder


def of_another_run(bundle: Path, folder: Path, run_id: str) -> Path:
    """The same files under the name of another run: another encoder to the registry, without another export."""
    shutil.copytree(bundle, folder)
    manifest = BundleManifest.model_validate_json((folder / "card.json").read_text())
    renamed = manifest.model_copy(update={"card": manifest.card.model_copy(update={"run_id": run_id})})
    (folder / "card.json").write_text(renamed.model_dump_json())
    return folder


def with_digests(bundle: Path) -> Path:
    """``bundle``, whose card now vouches for the files as they are."""
    manifest = BundleManifest.model_validate_json((bundle / "card.json").read_text())
    files = {name: hashlib.sha256((bundle / name).read_bytes()).hexdigest() for name in manifest.files}
    (bundle / "card.json").write_text(manifest.model_copy(update={"files": files}).model_dump_json())
    return bundle

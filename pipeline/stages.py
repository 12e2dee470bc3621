"""What follows training: the encoder is evaluated beside its baselines, then exported with its model card."""

from pathlib import Path
from tempfile import TemporaryDirectory

import torch

from pipeline.config import Config
from pipeline.data.loader import read_images
from pipeline.data.manifest import Manifest
from pipeline.evaluate.report import EvaluationReport, evaluate_encoder
from pipeline.export import export_encoder
from pipeline.model_card import ModelCard
from pipeline.models.backbone import Backbone
from pipeline.quarantine import read_quarantine
from pipeline.runs import Run
from pipeline.train import build_method, restore_method

_GOLDEN_IMAGES = 4


def evaluate_and_export(config: Config, manifest: Manifest, *, device: torch.device, git_sha: str) -> EvaluationReport:
    """Evaluate the run's last checkpoint, write ``encoder/`` and then ``report.json`` into the run's folder."""
    run = Run(config, manifest.digest)
    encoder = trained_encoder(run)
    report = evaluate_encoder(
        encoder.to(device),
        manifest,
        config=config.evaluate,
        mean=config.data.mean,
        std=config.data.std,
        seed=config.seed,
        device=device,
        max_bad_share=config.data.max_bad_share,
    )
    card = ModelCard(
        run_id=run.id,
        method=config.method.name,
        hyperparameters=config.flat(),
        data_digest=manifest.digest,
        git_sha=git_sha,
        metrics=report.table_rows(),
    )
    with TemporaryDirectory(prefix="parallax-export-") as folder:
        out = Path(folder) / "encoder"
        export_encoder(
            encoder.cpu(),
            out,
            mean=config.data.mean,
            std=config.data.std,
            golden_images=_golden_images(config, manifest),
            card=card,
        )
        run.save_encoder(out)
    run.save_report(report, read_quarantine(run.checkpoints))
    return report


def trained_encoder(run: Run) -> Backbone:
    """The backbone of the run's last checkpoint, on the CPU, in eval mode."""
    step = run.checkpoints.latest_step()
    if step is None:
        raise FileNotFoundError(f"{run.checkpoints.url} holds no checkpoint; train the run first")
    method = build_method(run.config)
    restore_method(run.checkpoints.load(step), method, run.config)
    return method.backbone.eval()


def _golden_images(config: Config, manifest: Manifest) -> torch.Tensor:
    split = "validation" if "validation" in manifest.splits else "train"
    size, max_bad = config.model.image_size, config.data.max_bad_share
    _, images, _ = next(read_images(manifest, split, size, batch_size=_GOLDEN_IMAGES, max_bad_share=max_bad))
    return images

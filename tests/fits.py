"""A run of ``fit`` in the test's own process, or in a rank of ``gloo``."""

import torch

from pipeline.checkpoint import CheckpointStore
from pipeline.config import Config
from pipeline.data.manifest import Manifest
from pipeline.methods.base import Method
from pipeline.progress import Progress
from pipeline.train import fit


def run(config: Config, store_url: str, until: int | None = None) -> tuple[Method | None, list[Progress]]:
    """The trained method and the reports; ``until`` raises in that step's report, as a kill would: then no method."""
    reports: list[Progress] = []

    def report(progress: Progress) -> None:
        reports.append(progress)
        if progress.step == until:
            raise KeyboardInterrupt

    store = CheckpointStore(store_url, "run")
    try:
        return fit(config, Manifest.load(config.shards_url), store, device=torch.device("cpu"), report=report), reports
    except KeyboardInterrupt:
        return None, reports

"""The score that a sweep ranks trials by: weighted kNN on a split that neither trains nor is in the final report.

Taken while the run trains, without a trace in it: eval mode, no gradient, no random number. Which images form a forward
pass is fixed and ranks take whole passes, so for given weights the score is the same, bit for bit, at any world size.
"""

import logging
from dataclasses import asdict, dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from pipeline import distributed, storage
from pipeline.checkpoint import CheckpointStore
from pipeline.config import Config
from pipeline.data.assemble import BadSample, BadSamplesError, list_of
from pipeline.data.loader import normalize, read_blocks
from pipeline.data.manifest import Manifest
from pipeline.evaluate.config import SelectionConfig
from pipeline.evaluate.knn import knn_predict
from pipeline.evaluate.report import NonFiniteFeaturesError, eval_mode, evenly
from pipeline.models.backbone import Backbone
from pipeline.progress import Progress

METRIC = "selection/knn"
_NAME = "selection.json"


@dataclass(frozen=True)
class Scored:
    """What a run was worth after ``step`` optimizer steps."""

    step: int
    epochs: int  # done
    knn: float  # share of the selection images whose class was predicted
    loss: float  # of that step, to see how little it says


class Selection:
    """Scores the encoder at the ends of epochs, where the config asks for it."""

    def __init__(self, config: Config, manifest: Manifest, steps_per_epoch: int, checkpoints: CheckpointStore) -> None:
        """``checkpoints``: beside which the scores are kept, for who missed the reports."""
        self._config = config
        self._manifest = manifest
        self._steps_per_epoch = steps_per_epoch
        self._checkpoints = checkpoints
        self._bad: set[int] = set()

    def after(self, step: int, backbone: Backbone, device: torch.device) -> dict[str, Tensor]:
        """{"selection/knn": share predicted correctly}, equal on all ranks; {} where nothing is due.

        A collective; ``backbone`` is left as it was. Raises on all ranks: BadSamplesError if more than
        data.max_bad_share of the images are none, NonFiniteFeaturesError.
        """
        selection = self._config.evaluate.selection
        epochs, rest = divmod(step, self._steps_per_epoch)
        if selection is None or rest or (epochs % selection.every_epochs and epochs < self._config.train.epochs):
            return {}
        with eval_mode([backbone]), torch.no_grad():  # inference mode would leave its tensors in a model's caches
            return {METRIC: self._accuracy(selection, backbone, device)}

    def keep(self, progress: Progress) -> None:
        """Write the score of a report down, if it has one. For rank 0."""
        if METRIC not in progress.metrics:
            return
        epochs, metrics = progress.step // self._steps_per_epoch, progress.metrics
        scored = Scored(progress.step, epochs, knn=metrics[METRIC], loss=metrics["loss"])
        others = [row for row in read_scores(self._checkpoints) if row.step < scored.step]
        self._checkpoints.write_rows(_NAME, map(asdict, [*others, scored]))

    def _accuracy(self, selection: SelectionConfig, backbone: Backbone, device: torch.device) -> Tensor:
        known, asked = _labelled(self._manifest, "train"), _labelled(self._manifest, selection.split)
        known = known[evenly(len(known), selection.bank_images)]
        bank_blocks, bank_bad = self._encode("train", known, backbone, device)
        blocks, bad = self._encode(selection.split, asked, backbone, device)
        self._check(distributed.all_gather_items(bank_bad + bad), len(known) + len(asked))

        # a rank without a pass has nothing to concatenate but these
        no_ids = torch.empty(0, dtype=torch.int64, device=device)
        parts = [(no_ids, torch.empty(0, backbone.feature_dim, device=device)), *bank_blocks]
        bank_labels = self._labels(distributed.all_gather_ragged(torch.cat([ids for ids, _ in parts])))
        bank = distributed.all_gather_ragged(torch.cat([features for _, features in parts]))
        if not bank.isfinite().all():
            raise NonFiniteFeaturesError(
                "the encoder's features are not finite: its weights or BatchNorm statistics have diverged; try a "
                "smaller optim.lr, or more optim.warmup_epochs"
            )
        hits = torch.zeros(2, dtype=torch.int64, device=device)  # (correct, all)
        for query_ids, features in blocks:
            predicted = knn_predict(
                features,
                bank,
                bank_labels,
                k=min(selection.knn_k, len(bank)),
                num_classes=int(bank_labels.max()) + 1,
                temperature=selection.knn_temperature,
            )
            hits += torch.stack([(predicted == self._labels(query_ids)).sum(), hits.new_tensor(len(query_ids))])
        correct, total = distributed.all_reduce_sum(hits)
        return correct.double() / total

    def _labels(self, ids: Tensor) -> Tensor:
        return torch.from_numpy(self._manifest.samples.label[ids.cpu().numpy()]).to(ids)

    def _encode(
        self, split: str, ids: NDArray[np.int64], backbone: Backbone, device: torch.device
    ) -> tuple[list[tuple[Tensor, Tensor]], list[BadSample]]:
        """This rank's part of ``ids``, in order: (ids (n,), features (n, D)) of each forward pass; what is no image."""
        data = self._config.data
        blocks = np.split(ids, range(0, len(ids), self._config.evaluate.batch_size)[1:])
        mine = np.array_split(np.arange(len(blocks)), distributed.world_size())[distributed.rank()]
        reading = read_blocks(
            self._manifest, split, [blocks[i] for i in mine], backbone.config.image_size, mirror=data.mirror
        )
        encoded: list[tuple[Tensor, Tensor]] = []
        bad: list[BadSample] = []
        for good, images, undecodable in reading:
            bad += undecodable
            inputs = normalize(images.to(device), data.mean, data.std).contiguous(memory_format=torch.channels_last)
            features = backbone.forward(inputs)  # not by a call, which train.compile would compile once more
            encoded.append((good.to(device), features))
        return encoded, bad

    def _check(self, bad: list[BadSample], images: int) -> None:
        share = self._config.data.max_bad_share
        if len(bad) > share * images:
            raise BadSamplesError(
                f"{len(bad)} of the {images} images that evaluate.selection reads cannot be decoded, more than "
                f"data.max_bad_share={share:g} allows:\n{list_of(bad)}"
            )
        new = [sample for sample in bad if sample.sample_id not in self._bad]
        self._bad.update(sample.sample_id for sample in new)
        if new and distributed.rank() == 0:
            logging.getLogger(__name__).warning(
                "%d images that evaluate.selection reads cannot be decoded and are left out:\n%s",
                len(new),
                list_of(new),
            )


def read_scores(checkpoints: CheckpointStore) -> tuple[Scored, ...]:
    """The scores that a run has left beside its checkpoints, by step; empty if there are none.

    StorageError where they are damaged, CheckpointError where they are another run's.
    """
    try:
        return tuple(Scored(**row) for row in checkpoints.read_rows(_NAME))
    except (ValueError, TypeError) as error:
        raise storage.StorageError(
            f"{storage.join(checkpoints.url, _NAME)} is damaged ({error}); restore it, or delete it: then the scores "
            "of the epochs done are missing"
        ) from error


def _labelled(manifest: Manifest, split: str) -> NDArray[np.int64]:
    samples = manifest.split(split)
    return samples.id[samples.label >= 0]

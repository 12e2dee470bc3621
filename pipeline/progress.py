"""Live progress for a person: a bar on a terminal, one line every log step elsewhere."""

import sys
from dataclasses import dataclass, field
from typing import Any, TextIO

from tqdm import tqdm


@dataclass(frozen=True)
class Progress:
    """Where a run stands after ``step`` optimizer steps. ``metrics`` are means over ranks."""

    step: int
    total_steps: int
    epoch: int
    images_per_s: float  # source images over all ranks, since the last report
    data_wait: float  # share of the time since the last report that rank 0 waited for data
    metrics: dict[str, float] = field(default_factory=dict)
    bad_samples: int = 0  # images that could not be decoded and were replaced, since the run's first step

    @property
    def logged(self) -> dict[str, float]:
        """Metric name -> value, for a tracker."""
        return {
            **{f"train/{name}": value for name, value in self.metrics.items()},
            "train/epoch": float(self.epoch),
            "speed/images_per_s": self.images_per_s,
            "speed/data_wait": self.data_wait,
            "data/bad_samples": float(self.bad_samples),
        }


class ProgressDisplay:
    """Shows ``Progress`` reports on ``stream``."""

    def __init__(self, global_batch_size: int, stream: TextIO = sys.stderr) -> None:
        self._global_batch_size = global_batch_size
        self._stream = stream
        self._bar: tqdm[Any] | None = None
        self._scored = ""

    def show(self, progress: Progress) -> None:
        """One report: moves the bar, or prints a line."""
        facts = (
            f"loss {progress.metrics.get('loss', float('nan')):.4f}  "
            f"{progress.images_per_s:,.0f} images/s  waiting for data {progress.data_wait:.0%}"
        )
        if "selection/knn" in progress.metrics:
            self._scored = f"  selection kNN {progress.metrics['selection/knn']:.1%}"
            facts += self._scored
        elif self._stream.isatty():  # a bar keeps showing the last score
            facts += self._scored
        if not self._stream.isatty():
            left = progress.total_steps - progress.step
            eta_s = left * self._global_batch_size / progress.images_per_s if progress.images_per_s else 0.0
            self._stream.write(
                f"step {progress.step}/{progress.total_steps}  epoch {progress.epoch}  {facts}  ETA {_clock(eta_s)}\n"
            )
            self._stream.flush()
            return
        if self._bar is None:
            self._bar = tqdm(total=progress.total_steps, initial=progress.step, unit="step", file=self._stream)
        self._bar.update(progress.step - self._bar.n)
        self._bar.set_postfix_str(facts)

    def note(self, text: str) -> None:
        """One line beside the bar."""
        tqdm.write(text, file=self._stream)

    def close(self) -> None:
        """Ends the bar's line."""
        if self._bar is not None:
            self._bar.close()
            self._bar = None


def _clock(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"

"""A sweep for a person who watches: the table, redrawn on a terminal, one line per score elsewhere."""

import shutil
import sys
import threading
import time
from typing import TextIO

from pipeline.progress import Progress
from pipeline.sweep.report import short_names, table, text_of
from pipeline.sweep.results import RunResult, SweepResults

_REDRAW_S = 0.5
_UP, _CLEAR = "\x1b[{}A", "\x1b[J"


class SweepDisplay:
    """Shows each new state on ``stream``."""

    def __init__(self, stream: TextIO = sys.stderr) -> None:
        self._stream = stream
        self._lock = threading.Lock()  # results come from Tune's loop, progress from the inbox's thread
        self._results: SweepResults | None = None
        self._progress: dict[str, Progress] = {}
        self._told: dict[tuple[str, int], tuple[int, str]] = {}
        self._lines, self._drawn = 0, 0.0

    def show(self, results: SweepResults) -> None:
        """The state of the sweep."""
        with self._lock:
            self._results = results
            if self._stream.isatty():
                self._draw(force=True)
            else:
                self._tell()

    def progress(self, run_id: str, progress: Progress) -> None:
        """How far a run is between two scores."""
        with self._lock:
            self._progress[run_id] = progress
            if self._stream.isatty():
                self._draw()

    def note(self, text: str) -> None:
        """One line that stays."""
        with self._lock:
            self._erase()
            self._stream.write(text + "\n")
            self._draw(force=True)

    def close(self) -> None:
        """Take the live table away; the caller prints the final one."""
        with self._lock:
            self._erase()
            self._results = None

    def _tell(self) -> None:
        assert self._results is not None
        names = short_names([key.key for key in self._results.keys])
        for run in self._results.runs:
            epoch = run.scores[-1].epoch if run.scores else 0
            if self._told.get((run.trial, run.seed)) == (epoch, run.status):
                continue
            self._told[run.trial, run.seed] = epoch, run.status
            values = "  ".join(f"{names.get(key, key)} {text_of(value)}" for key, value in run.values.items())
            score = "starting" if run.status == "running" else "no score"
            if run.scores:
                score = f"kNN {run.scores[-1].knn:.1%}  loss {run.scores[-1].loss:.3f}"
            self._stream.write(
                f"{run.trial}  seed {run.seed}  epoch {epoch}/{self._results.epochs}  {score}  {values}"
                + ("" if run.status == "running" else f"  {run.outcome}")
                + "\n"
            )
        self._stream.flush()

    def _draw(self, force: bool = False) -> None:
        now = time.monotonic()
        if self._results is None or not (force or now - self._drawn > _REDRAW_S) or not self._stream.isatty():
            return
        columns, rows = shutil.get_terminal_size()
        running = [run for run in self._results.runs if run.status == "running"]
        below = [self._line(run) for run in running]
        lines = table(self._results).splitlines()[: max(rows - len(below) - 3, 2)]
        text = [line[: columns - 1] for line in [*lines, "", *below]]
        self._erase()
        self._stream.write("\n".join(text) + "\n")
        self._stream.flush()
        self._lines, self._drawn = len(text), now

    def _line(self, run: RunResult) -> str:
        progress = self._progress.get(run.run_id)
        name = f"{run.trial} seed {run.seed}"
        if progress is None:
            return f"{name}: starting"
        loss = progress.metrics.get("loss", float("nan"))
        step = f"step {progress.step}/{progress.total_steps}"
        return f"{name}: {step}  loss {loss:.3f}  {progress.images_per_s:,.0f} images/s"

    def _erase(self) -> None:
        if self._lines:
            self._stream.write(_UP.format(self._lines) + _CLEAR)
            self._lines = 0

"""What a sweep costs beside the same runs by hand, and what ASHA saves of a full grid, on MNIST digits.

    python -m tests.benchmarks.sweep [--quick]

``overhead``: wall time of ``python -m jobs.sweep`` over 4 trials / of ``python -m jobs.pretrain`` 4 times, one after
another, the commands a person would type: below 1 the sweep wins, by trials side by side, one start of Ray and one
final evaluation instead of 4. ``asha_early_saving`` and ``asha_late_saving``: the share of the grid's epochs that ASHA
did not run, from the first epoch on (as shipped) and from a third of the epochs on; ``*_best``: the best scores.
``asha_saving``: at equal best score, so the larger of those whose best is the grid's, or 0. Trials of one worker, so a
machine of 2 cores runs 2. The last line is one JSON object. About 30 minutes on 2 idle cores; --quick: fewer and
shorter trials, 12 minutes, for the starts of processes cannot be shortened.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from pipeline.sweep.results import SweepResults

CONFIG = "configs/sweep/digits-moco.yaml"
PAIRS = "{method.temperature: {grid: [0.1, 0.5]}, method.ema_decay: {grid: [0.9, 0.99]}}"


def seconds(module: str, *arguments: str) -> float:
    """Wall time of a command that has to succeed."""
    started = time.monotonic()
    subprocess.run(
        [sys.executable, "-m", module, *arguments],
        check=True,
        stdout=sys.stderr,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    return time.monotonic() - started


def results(folder: Path) -> SweepResults:
    """Of the one sweep in ``folder``."""
    (path,) = (folder / "sweeps").glob("*/results.json")
    return SweepResults.model_validate_json(path.read_text())


def by_hand(swept: SweepResults, folder: Path) -> float:
    """Wall time of the sweep's runs as jobs of their own, whose storage is new."""
    total = 0.0
    for run in swept.runs:
        base = folder / f"{run.trial}.yaml"
        base.write_text(swept.base)
        values = [f"{key}={json.dumps(value)}" for key, value in run.values.items()]
        total += seconds(
            "jobs.pretrain", str(base), *values, f"name={run.trial}", f"storage.url={folder}/{run.trial}",
            "data.shards=" + str(next((folder.parent / "grid4" / "shards").iterdir())),
        )  # fmt: skip
    return total


def epochs_of(swept: SweepResults) -> int:
    """All epochs that were run."""
    return sum(len(run.scores) for run in swept.runs)


def best_of(swept: SweepResults) -> float:
    """The best trial's score."""
    best = swept.best()
    assert best is not None
    assert best.knn is not None
    return best.knn


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true")
    quick = parser.parse_args().quick
    epochs = 3 if quick else 9
    space = [f"sweep.space={PAIRS}"] if quick else []
    with tempfile.TemporaryDirectory(prefix="parallax-sweep-") as temporary:
        root = Path(temporary)

        def sweep(name: str, *arguments: str) -> float:
            print(f"sweep {name}", file=sys.stderr)
            return seconds("jobs.sweep", CONFIG, f"storage.url={root / name}", f"train.epochs={epochs}", *arguments)

        sweep_s = sweep("grid4", f"sweep.space={PAIRS}", "sweep.scheduler={name: none}")
        (root / "hand").mkdir()
        hand_s = by_hand(results(root / "grid4"), root / "hand")
        if not quick:
            sweep("grid", "sweep.scheduler={name: none}")
        grid = results(root / ("grid4" if quick else "grid"))
        figures = {
            "overhead": sweep_s / hand_s,
            "sweep_s": sweep_s,
            "hand_s": hand_s,
            "asha_saving": 0.0,
            "grid_best": best_of(grid),
        }
        late = f"sweep.scheduler={{name: asha, grace_epochs: {epochs // 3}, reduction: 2}}"
        for name, arguments in {"asha_early": [], "asha_late": [late]}.items():
            sweep(name, *space, *arguments)
            asha = results(root / name)
            saving = 1 - epochs_of(asha) / epochs_of(grid)
            figures |= {f"{name}_saving": saving, f"{name}_best": best_of(asha)}
            if best_of(asha) >= best_of(grid):
                figures["asha_saving"] = max(figures["asha_saving"], saving)
    print(json.dumps({key: round(value, 4) for key, value in figures.items()}))


if __name__ == "__main__":
    main()

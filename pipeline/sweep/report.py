"""What a sweep tells: the table of its trials, what early scores and losses said about the end, the best config.

Trials rank by mean kNN on the selection split. Where two differ by no more than the standard deviation over their seeds
they share a rank: another set of seeds might have swapped them.
"""

import json
from dataclasses import dataclass

import numpy as np
from scipy.stats import spearmanr

from pipeline.config import Config, dump, override
from pipeline.errors import UserError
from pipeline.sweep.config import overrides
from pipeline.sweep.results import SweepResults, TrialResult

_OUTCOME_CHARACTERS = 70
_NAME_CHARACTERS = 41  # of a run


class NoBestError(UserError):
    """Not one trial of the sweep has finished."""


@dataclass(frozen=True)
class RankCorrelation:
    """Spearman's rho over finished trials, each the mean over its seeds; NaN where one side does not vary."""

    rho: float
    points: int


def rank_correlation(xs: list[float], ys: list[float]) -> RankCorrelation | None:
    """None with fewer than 3 points: any two are in order, or in reverse."""
    if len(xs) < 3:
        return None
    constant = len(set(xs)) == 1 or len(set(ys)) == 1
    return RankCorrelation(float("nan") if constant else float(spearmanr(xs, ys).statistic), len(xs))


def early_and_final(results: SweepResults, epoch: int) -> RankCorrelation | None:
    """Of kNN after ``epoch`` epochs with kNN at the end: does a scheduler that stops there stop the right ones?

    Only trials that finished have an end, so a scheduler's own choice narrows the range; a full grid tells more.
    """
    finished = _finished(results)
    early = [trial.knn_at(epoch) for trial in finished]
    pairs = [
        (x, trial.knn) for x, trial in zip(early, finished, strict=True) if x is not None and trial.knn is not None
    ]
    return rank_correlation([x for x, _ in pairs], [y for _, y in pairs])


def loss_and_knn(results: SweepResults) -> RankCorrelation | None:
    """Of the loss with kNN, both at the end: near -1 if the loss could rank trials, and it cannot."""
    pairs = [(t.loss, t.knn) for t in _finished(results) if t.loss is not None and t.knn is not None]
    return rank_correlation([x for x, _ in pairs], [y for _, y in pairs])


def table(results: SweepResults) -> str:
    """A line per trial, the best first, what failed last; ``1=`` is a rank shared within the seeds' spread."""
    keys = [key.key for key in results.keys]
    names = short_names(keys)
    head = ["rank", "trial", *(names[key] for key in keys), "kNN", "+-", "seeds", "epochs", "loss", "status"]
    ranks = _ranks(_finished(results))
    rows = [
        [
            ranks.get(trial.trial, "-"),
            trial.trial,
            *(text_of(trial.values[key]) if key in trial.values else "-" for key in keys),
            "-" if trial.knn is None else f"{trial.knn:.1%}",
            "-" if trial.spread is None else f"{100 * trial.spread:.1f}",
            str(len(trial.runs)),
            f"{trial.epoch}/{results.epochs}",
            "-" if trial.loss is None else f"{trial.loss:.3f}",
            _shortened(trial.outcome),
        ]
        for trial in results.trials()
    ]
    widths = [max(map(len, column)) for column in zip(head, *rows, strict=True)]
    return "\n".join(
        "  ".join([*(cell.rjust(width) for cell, width in zip(row[:-1], widths[:-1], strict=True)), row[-1]])
        for row in [head, *rows]
    )


def summary(results: SweepResults, early_epoch: int | None = None) -> str:
    """The table and below it what to make of it. ``early_epoch``: the scheduler's first rung, if there is one."""
    lines = [
        table(results),
        "",
        f"kNN: accuracy on the split {results.split!r}, mean over seeds; +-: their standard deviation",
    ]
    finished, tied = _finished(results), tied_with_best(results)
    if len(tied) > 1:
        lines.append(f"a tie: {', '.join(tied)} differ by no more than the spread over their seeds")
    if finished and all(trial.spread is None for trial in finished):
        lines.append("one seed each: differences within the noise between seeds rank nothing; sweep.seeds=3 shows it")
    if early_epoch is not None:
        early = _rho(early_and_final(results, early_epoch))
        lines.append(f"rank correlation of kNN after epoch {early_epoch} with the final: {early}")
    lines.append(f"rank correlation of the final loss with the final kNN: {_rho(loss_and_knn(results))}")
    if results.final is not None:
        final = results.final
        lines.append(
            f"best run, {final.trial} with seed {final.seed}: {final.selection_knn:.1%} on {results.split!r}, which "
            f"chose it, {final.validation_knn:.1%} on validation, which did not"
        )
    return "\n".join(lines)


def best_config(results: SweepResults, base: Config) -> str:
    """YAML of ``base`` under the best trial's values and a name of its own, with its lineage as comments.

    ``python -m jobs.pretrain`` takes it as it is. NoBestError if no trial has finished.
    """
    best = results.best()
    if best is None or best.knn is None:
        outcomes = "; ".join(f"{trial.trial} {trial.outcome}" for trial in results.trials()) or "none was begun"
        raise NoBestError(f"sweep {results.sweep_id} has no finished trial to take a config from: {outcomes}")
    config = override(
        base,
        [
            *overrides(best.values),
            f"name={base.name[: _NAME_CHARACTERS - len('-best')].rstrip('-')}-best",
        ],
    )
    finished, all_of_them = len(_finished(results)), len(results.trials())
    spread = "" if best.spread is None else f" +- {100 * best.spread:.1f}"
    lineage = [
        f"The best of {all_of_them} trials of sweep {results.sweep_id}, {finished} of which ran to the end:",
        f"{best.knn:.1%}{spread} weighted kNN on the split {results.split!r} after {results.epochs} epochs.",
        f"Trial {best.trial}: {', '.join(f'{key}={text_of(value)}' for key, value in best.values.items())}",
        f"Runs: {', '.join(run.run_id for run in best.runs)}",
        *([f"MLflow: run {results.mlflow_run_id} at {results.tracking_uri}"] if results.mlflow_run_id else []),
        "",
        "  python -m jobs.pretrain <this file>",
    ]
    return "".join(f"# {line}".rstrip() + "\n" for line in lineage) + "\n" + dump(config)


def tied_with_best(results: SweepResults) -> list[str]:
    """The trials of the first rank: the best, then those that are no worse within the spread over their seeds."""
    return [trial for trial, rank in _ranks(_finished(results)).items() if rank in ("1", "1=")]


def short_names(keys: list[str]) -> dict[str, str]:
    """``method.temperature`` -> ``temperature``, unless two keys end alike."""
    tails = [key.rpartition(".")[2] for key in keys]
    return {key: tail if tails.count(tail) == 1 else key for key, tail in zip(keys, tails, strict=True)}


def text_of(value: object) -> str:
    """A searched value in a few characters."""
    return f"{value:.6g}" if isinstance(value, float) else value if isinstance(value, str) else json.dumps(value)


def _finished(results: SweepResults) -> list[TrialResult]:
    return [trial for trial in results.trials() if trial.status == "finished"]


def _ranks(finished: list[TrialResult]) -> dict[str, str]:
    """Trial -> rank, of trials in their order; those within the spread of a group's first belong to it."""
    groups: list[list[TrialResult]] = []
    for trial in finished:
        first = groups[-1][0] if groups else trial
        near = (first.knn or 0.0) - (trial.knn or 0.0) <= max(first.spread or 0.0, trial.spread or 0.0)
        if groups and near:
            groups[-1].append(trial)
        else:
            groups.append([trial])
    starts = np.cumsum([1, *map(len, groups)]).tolist()
    return {
        trial.trial: f"{start}=" if len(group) > 1 else str(start)
        for start, group in zip(starts, groups, strict=False)
        for trial in group
    }


def _shortened(outcome: str) -> str:
    return outcome if len(outcome) <= _OUTCOME_CHARACTERS else outcome[: _OUTCOME_CHARACTERS - 3].rstrip() + "..."


def _rho(correlation: RankCorrelation | None) -> str:
    if correlation is None:
        return "fewer than 3 finished trials"
    if np.isnan(correlation.rho):
        return f"undefined, all are the same ({correlation.points} trials)"
    return f"{correlation.rho:+.2f} ({correlation.points} trials)"

"""Sweeps as they end up in results.json, made by hand."""

from pipeline.sweep.results import EpochScore, RunResult, Scale, SearchedKey, Status, SweepResults

TEMPERATURE, DECAY = "method.temperature", "method.ema_decay"


def one_run(
    trial: int,
    values: dict[str, float | str],
    knn: float,
    *,
    seed: int = 0,
    epochs: int = 9,
    status: Status = "finished",
    reason: str = "",
    loss: float = 4.0,
) -> RunResult:
    """Scores rise to ``knn`` at ``epochs``; the loss falls to ``loss``."""
    scores = tuple(
        EpochScore(epoch=e, knn=knn * (1 - 0.5**e) / (1 - 0.5**epochs), loss=loss + 1 / e - 1 / epochs)
        for e in range(1, epochs + 1)
    )
    return RunResult(
        trial=f"t{trial:03d}", seed=seed, values={**values}, status=status, reason=reason, scores=scores,
        run_id=f"toy-{trial:03d}-{seed}",
    )  # fmt: skip


def sweep(runs: list[RunResult], keys: dict[str, Scale], epochs: int = 9) -> SweepResults:
    return SweepResults(
        sweep_id="toy-0123456789",
        base="",
        epochs=epochs,
        keys=tuple(SearchedKey(key=key, scale=scale) for key, scale in keys.items()),
        split="selection",
        mlflow_run_id="abc",
        tracking_uri="sqlite:///m.db",
        runs=tuple(runs),
    )

"""Sweep any keys of a pretraining config: many runs, ranked by what their encoders are worth.

    python -m jobs.sweep configs/sweep/digits-moco.yaml [key.sub=value ...] [sweep.trials=8 ...] [--dry-run]

Submitting the same sweep again takes it up where it ended, or says that it is complete; --resume refuses to begin.
"""

import itertools
import shlex
import time
from pathlib import Path
from tempfile import TemporaryDirectory

from pipeline import storage
from pipeline.arguments import JobParser
from pipeline.cluster.startup import check_startup
from pipeline.data.manifest import Manifest
from pipeline.errors import explained
from pipeline.preflight import prepare_data
from pipeline.provenance import git_sha
from pipeline.registry.register import register_run
from pipeline.registry.sweeps import SweepTracker
from pipeline.registry.tracking import Tracker, probe
from pipeline.runs import Run
from pipeline.storage import probe_writable
from pipeline.sweep.config import Sweep, load_sweep, overrides
from pipeline.sweep.display import SweepDisplay
from pipeline.sweep.ledger import Ledger
from pipeline.sweep.plots import heat_map, parallel_coordinates
from pipeline.sweep.report import best_config, summary
from pipeline.sweep.results import Final, SweepFolder, SweepResults
from pipeline.sweep.space import SweepError


def main() -> None:
    """Parse the command line, run what is not done yet, say which configuration is best."""
    parser = JobParser(__doc__)
    parser.add_argument("sweep", help="a YAML file, e.g. configs/sweep/digits-moco.yaml")
    parser.add_argument(
        "overrides", nargs="*", metavar="override", help="of the base, train.epochs=5; of the sweep, sweep.trials=8"
    )
    parser.add_argument("--dry-run", action="store_true", help="check everything, list the trials, run nothing")
    parser.add_argument("--resume", action="store_true", help="go on with a sweep that was begun, or fail")
    arguments = parser.read()
    with explained():
        sweep = load_sweep(arguments.sweep, arguments.overrides)
        base = sweep.base
        probe_writable(base.storage.url)
        probe(base.tracking_uri, base.tracking.experiment, rehearse=arguments.dry_run)
        manifest = prepare_data(base)
        sweep = sweep.for_data(manifest)
        sweep_id = sweep.config.sweep_id(base, manifest.digest)
        folder = SweepFolder(base.storage.url, sweep_id)
        results = folder.results()
        if arguments.resume and results is None:
            raise SweepError(f"{folder.url} holds no sweep to resume; leave out --resume to begin this one")
        if arguments.dry_run:
            print_plan(sweep, sweep_id)
        elif results is not None and results.final is not None:
            print(f"{sweep_id} is complete already; change the sweep, or its name, to run another one.\n")
            print_summary(sweep, folder, results)
        else:
            run(sweep, sweep_id, manifest, folder, results)


def run(sweep: Sweep, sweep_id: str, manifest: Manifest, folder: SweepFolder, results: SweepResults | None) -> None:
    """The trials, then what becomes of the best of them."""
    # Ray takes 3 s to import; a mistake in the config should not cost them
    from pipeline.cluster.connection import connected
    from pipeline.cluster.inbox import Report, WorkerFailure, WorkerWaiting
    from pipeline.cluster.sweep import run_sweep

    started, base = time.monotonic(), sweep.base
    with Tracker(base.tracking_uri, base.tracking.experiment, sweep_id) as tracker:
        tracker.log_config(sweep.flat())
        tracker.log_dataset(manifest.url, manifest.digest)
        results = results or sweep.no_results(sweep_id)
        print(f"sweep {sweep_id}: " + ("going on" if results.runs else "starting"))
        print(f"  tracking  {base.tracking_uri} (from {base.tracking_source})", flush=True)
        display = SweepDisplay()
        runs = SweepTracker(tracker, sweep_id, sweep.config_of, manifest)

        def on_report(run_id: str, report: Report) -> None:
            if isinstance(report, WorkerFailure):
                display.note(f"{run_id}: rank {report.rank} failed: {report.reason.splitlines()[0]}")
            elif isinstance(report, WorkerWaiting):
                display.note(f"{run_id}: rank {report.rank} is {report.line}")
            else:
                display.progress(run_id, report)
                runs.log(run_id, report)

        ledger = Ledger(folder, results, open_run=runs.begin, close_run=runs.end, on_change=display.show)
        ledger.update(mlflow_run_id=tracker.mlflow_run_id, tracking_uri=base.tracking_uri)
        with connected(base.cluster, {"storage.url": base.storage.url, "data.shards": base.shards_url}):
            try:
                run_sweep(sweep, sweep_id, manifest, folder_url=folder.url, ledger=ledger, on_report=on_report)
            finally:
                display.close()
            keep_best(sweep, manifest, folder, ledger)
        with TemporaryDirectory(prefix="parallax-sweep-") as temporary:
            for name, content in pictures(sweep, ledger.results).items():
                folder.write(name, content)
                (Path(temporary) / name).write_bytes(content)
                tracker.log_artifact(Path(temporary) / name)
    print_summary(sweep, folder, ledger.results, time.monotonic() - started)


def keep_best(sweep: Sweep, manifest: Manifest, folder: SweepFolder, ledger: Ledger) -> None:
    """Evaluate the best trial's encoder on the validation split, register it, write its config."""
    from pipeline.cluster import trainer

    results = ledger.results
    folder.write("best.yaml", best_config(results, sweep.base).encode())
    best = results.best()
    assert best is not None, "best_config would have refused"
    chosen = best.runs[0]
    config = sweep.config_of(chosen)
    run = Run(config, manifest.digest)
    print(f"evaluating and exporting the encoder of {best.trial}", flush=True)
    trainer.evaluate(config, manifest, git_sha())
    report = run.report()
    assert report is not None, "the evaluation ended without a report"
    scores = report.report.metrics()
    tags = {
        "parallax.sweep_id": results.sweep_id,
        "parallax.sweep_mlflow_run_id": results.mlflow_run_id,
        "parallax.trial": best.trial,
    }
    entry = register_run(run, chosen.mlflow_run_id or results.mlflow_run_id, tags)
    ledger.update(
        final=Final(
            trial=best.trial,
            seed=chosen.seed,
            run_id=run.id,
            selection_knn=chosen.scores[-1].knn,
            validation_knn=scores["knn/encoder"],
            validation_linear=scores.get("linear/encoder"),
            doubts=report.report.doubts(),
            encoder=f"models:/{entry.name}@{entry.alias}",
            model_uri=entry.model_uri,
            version=entry.version,
        )
    )


def pictures(sweep: Sweep, results: SweepResults) -> dict[str, bytes]:
    """File name -> content of what shows the whole sweep."""
    files = {
        "results.json": results.model_dump_json(indent=1).encode(),
        "summary.txt": (summary(results, sweep.config.first_rung()) + "\n").encode(),
        "parallel-coordinates.png": parallel_coordinates(results),
    }
    scored = [run.values.keys() for run in results.runs if run.scores]
    pairs = itertools.combinations([searched.key for searched in results.keys], 2)
    if axes := next((pair for pair in pairs if any(set(pair) <= keys for keys in scored)), None):
        files["heat-map.png"] = heat_map(results, *axes)
    return files


def print_plan(sweep: Sweep, sweep_id: str) -> None:
    """What the sweep would run."""
    config, cluster = sweep.config, sweep.base.cluster
    ray = check_startup(cluster, cluster.num_workers * config.seeds)
    print(f"dry run of {sweep_id}: everything is in place, nothing was trained")
    print(f"  tracking {sweep.base.tracking_uri} (from {sweep.base.tracking_source})")
    print(f"  searcher {config.searcher}, scheduler {config.scheduler.name}, {config.seeds} seeds, ", end="")
    print(f"{sweep.base.train.epochs} epochs of {sweep.steps_per_epoch(sweep.base)} steps")
    print(f"  ray {ray}")
    if config.searcher == "tpe":
        print(f"  {config.trials} trials, each chosen by what came before")
        return
    for number, values in enumerate(config.configurations(sweep.base)):
        print(f"  t{number:03d}  " + "  ".join(overrides(values)))


def print_summary(sweep: Sweep, folder: SweepFolder, results: SweepResults, seconds: float | None = None) -> None:
    """The table, and where everything is."""
    assert results.final is not None, "the sweep ended without a best trial"
    print(f"""\
{summary(results, sweep.config.first_rung())}

{"-" * 78}
{results.sweep_id} is complete{f" after {seconds / 60:.1f} min" if seconds is not None else ""}
  best      {results.final.trial}: {storage.join(folder.url, "best.yaml")}
  encoder   {results.final.encoder}  (version {results.final.version}, in {results.tracking_uri})
  pictures  {folder.url}
{"".join(f"  warning   {doubt}{chr(10)}" for doubt in results.final.doubts)}\
  again     python -m jobs.pretrain {shlex.quote(storage.join(folder.url, "best.yaml"))} seed=1
{"-" * 78}""")


if __name__ == "__main__":
    main()

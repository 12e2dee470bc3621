"""Pretrain an encoder: shards -> Ray Train -> evaluation -> registry.

    python -m jobs.pretrain configs/quickstart.yaml [key.sub=value ...] [--dry-run]

Submitting the same config again resumes it, or says that it is complete.
"""

import shlex
import time

import torch

from pipeline.arguments import JobParser
from pipeline.cluster.startup import check_startup
from pipeline.config import Config, load_config
from pipeline.data.manifest import Manifest
from pipeline.errors import explained
from pipeline.preflight import check_method, dry_run, prepare_data
from pipeline.progress import ProgressDisplay
from pipeline.provenance import git_sha
from pipeline.registry.register import register_run, registered
from pipeline.registry.tracking import Tracker, probe
from pipeline.runs import Registration, Run, RunReport
from pipeline.storage import probe_writable


def main() -> None:
    """Parse the command line, run what is not complete yet, say where everything is."""
    parser = JobParser(__doc__)
    parser.add_argument("config", help="a YAML file, e.g. configs/quickstart.yaml")
    parser.add_argument(
        "overrides", nargs="*", metavar="override", help="train.epochs=5, or configs/models/<name>.yaml"
    )
    parser.add_argument("--dry-run", action="store_true", help="check everything, try one batch, train nothing")
    arguments = parser.read()
    with explained():
        config = load_config(arguments.config, arguments.overrides)
        check_method(config)
        probe_writable(config.storage.url)
        probe(config.tracking_uri, config.tracking.experiment, rehearse=arguments.dry_run)
        manifest = prepare_data(config)
        run = Run(config, manifest.digest)
        if arguments.dry_run:
            print_plan(config, manifest, run)
        else:
            pretrain(config, manifest, run)


def pretrain(config: Config, manifest: Manifest, run: Run) -> None:
    """Each stage leaves a mark in the run's folder; what is marked is not done twice."""
    registration, report = registered(run), run.report()
    if registration is not None and report is not None:
        print(f"{run.id} is complete already; change the config, or its name, to train another encoder.\n")
        print_summary(config, manifest, run, report, registration)
        return

    started = time.monotonic()
    run.save_config()
    with Tracker(config.tracking_uri, config.tracking.experiment, run.id) as tracker:
        tracker.log_config(config.flat())
        tracker.log_dataset(manifest.url, manifest.digest)
        if report is None:
            train_and_evaluate(config, manifest, run, tracker)
            report = run.report()
        assert report is not None, "the evaluation ended without a report"
        tracker.log_final(report.report.metrics())
        with run.local_report() as path:
            tracker.log_artifact(path)
        print(f"\nEvaluation on the validation split:\n{report.report.table()}\n")
        registration = register_run(run, tracker.mlflow_run_id, tags={})
    print_summary(config, manifest, run, report, registration, seconds=time.monotonic() - started)


def train_and_evaluate(config: Config, manifest: Manifest, run: Run, tracker: Tracker) -> None:
    """The two stages that need the cluster."""
    from pipeline.cluster import (
        trainer,  # Ray takes 3 s to import; a mistake in the config should not cost them
    )
    from pipeline.cluster.connection import connected
    from pipeline.cluster.inbox import Report, WorkerFailure, WorkerWaiting

    done = run.checkpoints.latest_step()
    print(f"run {run.id}: " + (f"resuming after step {done}" if done else "starting"), flush=True)
    print(
        f"  {manifest.split('train').num_samples:,} training images, {config.cluster.num_workers} workers\n"
        f"  tracking  {config.tracking_uri} (from {config.tracking_source})",
        flush=True,
    )
    display = ProgressDisplay(config.train.global_batch_size)

    def on_report(report: Report) -> None:
        if isinstance(report, WorkerFailure):
            display.note(f"rank {report.rank} failed, the group restarts: {report.reason.splitlines()[0]}")
        elif isinstance(report, WorkerWaiting):
            display.note(f"rank {report.rank} is {report.line}")
        else:
            display.show(report)
            tracker.log(report.step, report.logged)

    with connected(config.cluster, {"storage.url": config.storage.url, "data.shards": config.shards_url}):
        try:
            trainer.pretrain(config, manifest, mlflow_run_id=tracker.mlflow_run_id, on_report=on_report)
        finally:
            display.close()
        print("evaluating and exporting the encoder", flush=True)
        trainer.evaluate(config, manifest, git_sha())


def print_plan(config: Config, manifest: Manifest, run: Run) -> None:
    """What a run would do, after one batch was tried in this process."""
    ray = check_startup(config.cluster, config.cluster.num_workers)
    tried = dry_run(config, manifest, torch.device("cpu"))
    cluster, batch = config.cluster, config.train.global_batch_size
    print(f"""\
dry run of {run.id}: everything is in place, nothing was trained
  data      {manifest.url}
            {", ".join(f"{name}: {manifest.split(name).num_samples:,}" for name in manifest.splits)} images
  model     {config.method.name} around {config.model.name} at {config.model.image_size} px, \
{tried.parameters / 1e6:.2f} M parameters
  training  {config.train.epochs} epochs of {tried.steps_per_epoch} steps, global batch {batch} \
= {cluster.num_workers} workers x {batch // cluster.num_workers}
  one batch {tried.rows} images: loaded in {tried.load_s:.2f} s, loss {tried.loss:.4f}, step {tried.step_s:.2f} s
  ray       {ray}
  storage   {run.url}
  tracking  {config.tracking_uri} (from {config.tracking_source})
  registry  {config.registry.model_name}@{config.registry.alias}
  state     {f"would resume after step {step}" if (step := run.checkpoints.latest_step()) else "would start"}""")


def print_summary(
    config: Config,
    manifest: Manifest,
    run: Run,
    report: RunReport,
    entry: Registration,
    seconds: float | None = None,
) -> None:
    """Where everything is, what was wrong with the data, and what to type next."""
    model = f"models:/{entry.name}@{entry.alias}"
    is_server = entry.tracking_uri.startswith("http")
    bad, images = len(report.quarantine), manifest.split("train").num_samples
    replaced = f"{bad:,} of {images:,} training images could not be decoded and were replaced; see {run.report_url}"
    doubts = "".join(f"  warning   {doubt}\n" for doubt in report.report.doubts())
    quote = shlex.quote
    browse = entry.tracking_uri if is_server else f"mlflow ui --backend-store-uri {quote(entry.tracking_uri)}"
    print(f"""\
{"-" * 78}
{run.id} is complete{f" after {seconds / 60:.1f} min" if seconds is not None else ""}
  encoder   {model}  (version {entry.version}, {entry.model_uri})
  files     {run.encoder_url}
  metrics   {browse}
{f"  bad data  {replaced}{chr(10)}" if bad else ""}\
{doubts}\
  next      python -m jobs.embed --model {quote(model)} \\
              --tracking-uri {quote(entry.tracking_uri)} \\
              --data {quote(config.shards_url)} --out {quote(f"{config.storage.url}/embeddings")}
{"-" * 78}""")


if __name__ == "__main__":
    main()

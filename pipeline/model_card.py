"""The model card: what an encoder is, how to load it, what it was measured to be worth, and where it stops.

The Python snippets run verbatim inside the folder of a pulled registry entry; tests/test_model_card.py does that.
"""

from collections.abc import Sequence

from pydantic import BaseModel, ConfigDict, field_validator

from pipeline.evaluate.intervals import Interval
from pipeline.secrets import without_secret_values


class Score(BaseModel):
    """One metric of the encoder beside the same metric of the two baselines; None = not measured."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    metric: str  # e.g. knn
    encoder: float
    raw_pixels: float | None = None
    random_init: float | None = None
    intervals: dict[str, Interval] = {}  # of an accuracy: 95 % interval by representation
    over_raw_pixels: Interval | None = None  # 95 % interval of the encoder's accuracy less that of raw pixels

    def doubt(self) -> str:
        """What to say of an encoder that raw pixels may equal; "" where it is better than they are, or not compared."""
        if self.over_raw_pixels is None or self.raw_pixels is None or self.over_raw_pixels[0] > 0:
            return ""
        low, high = self.over_raw_pixels
        return (
            f"{self.metric}: the encoder is not shown to be better than raw pixels: {self.encoder:.1%} against "
            f"{self.raw_pixels:.1%}, a difference of {100 * low:+.1f} to {100 * high:+.1f} points (95% interval)"
        )


class ModelCard(BaseModel):
    """Where an encoder comes from."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    run_id: str
    method: str
    hyperparameters: dict[str, str]  # dotted key -> value
    data_digest: str  # the manifest's
    git_sha: str
    metrics: tuple[Score, ...]

    _without_secrets = field_validator("hyperparameters")(without_secret_values)


_FINE_TUNE = "`num_classes=10` adds a head; `pretrained=True` is needed, without it the weights are random"
_LOAD = 'encoder = timm.create_model("local-dir:extra_files", pretrained=True).eval()'
_FINE_TUNE_CIFAR = (
    "`num_classes=10` adds a head, and `load_checkpoint(..., strict=False)` leaves it random; the two lines in the "
    "middle are the stem for small images, which timm has no argument for"
)
_LOAD_CIFAR = """\
encoder = timm.create_model("local-dir:extra_files")
encoder.conv1 = torch.nn.Conv2d(3, {width}, kernel_size=3, padding=1, bias=False)
encoder.maxpool = torch.nn.Identity()
timm.models.load_checkpoint(encoder.eval(), "extra_files/model.safetensors")"""


def render(
    card: ModelCard,
    *,
    architecture: str,
    stem_width: int | None,
    feature_dim: int,
    parameters: int,
    image_size: int,
    resized_side: int,
    mean: Sequence[float],
    std: Sequence[float],
    golden_sha256: str,
    tolerance: float,
) -> str:
    """The card as Markdown. ``stem_width``: channels of a CIFAR stem, which timm has no argument for; else None."""
    metrics = "\n".join(
        f"| {score.metric} | "
        + " | ".join(_cell(score, name) for name in ("encoder", "raw_pixels", "random_init"))
        + " |"
        for score in card.metrics
    )
    doubts = "".join(f"\n**Not better than raw pixels?** {doubt}.\n" for s in card.metrics if (doubt := s.doubt()))
    note, load = (_FINE_TUNE, _LOAD) if stem_width is None else (_FINE_TUNE_CIFAR, _LOAD_CIFAR.format(width=stem_width))
    hyperparameters = "\n".join(f"| `{key}` | `{value}` |" for key, value in sorted(card.hyperparameters.items()))
    return f"""\
---
library_name: timm
pipeline_tag: image-feature-extraction
tags: [self-supervised, {card.method}]
---
# {architecture}{"" if stem_width is None else " with a stem for small images"}, pretrained with {card.method}

An image encoder, trained without labels: RGB images of {image_size} x {image_size} pixels to embeddings of \
{feature_dim} float32, {parameters / 1e6:.2f} M parameters.

| | |
|---|---|
| run | `{card.run_id}` |
| method | {card.method} |
| data (manifest digest) | `{card.data_digest}` |
| code (git) | `{card.git_sha}` |
| golden embedding (SHA-256 of golden.npz) | `{golden_sha256}` |

## Load it

None of this needs the code that trained it. Get the registry entry and enter its folder:

```sh
mlflow artifacts download -u models:/<name>@<alias> -d encoder && cd encoder
```

With torch and mlflow, no other package:

```python
import json
import os

os.environ["MLFLOW_ALLOW_PICKLE_DESERIALIZATION"] = "false"
import mlflow.pytorch
import numpy as np
import torch

config = json.load(open("extra_files/config.json"))["pretrained_cfg"]
mean, std = (torch.tensor(config[key]).view(3, 1, 1) for key in ("mean", "std"))
golden = np.load("extra_files/golden.npz", allow_pickle=False)
images = torch.from_numpy(golden["images"])  # uint8 (N, 3, {image_size}, {image_size}); yours go here

encoder = mlflow.pytorch.load_model(".")
with torch.inference_mode():
    embeddings = encoder((images / 255 - mean) / std)  # float32 (N, {feature_dim})

expected = torch.from_numpy(golden["embeddings"])
error = (embeddings - expected).norm(dim=1) / expected.norm(dim=1)
assert error.max() < {tolerance:g}, "not the encoder this card describes"
```

With timm, to fine-tune ({note}):

```python
import numpy as np
import timm
import torch

{load}
config = encoder.pretrained_cfg
mean, std = (torch.tensor(config[key]).view(3, 1, 1) for key in ("mean", "std"))
golden = np.load("extra_files/golden.npz", allow_pickle=False)
with torch.inference_mode():
    embeddings = encoder((torch.from_numpy(golden["images"]) / 255 - mean) / std)

expected = torch.from_numpy(golden["embeddings"])
error = (embeddings - expected).norm(dim=1) / expected.norm(dim=1)
assert error.max() < {tolerance:g}, "not the encoder this card describes"
```

**Safety.** model.safetensors and golden.npz hold numbers only. model.pt2 is a program: the variable above makes MLflow
refuse pickled objects in it, but torch also evaluates size expressions and guards that the file holds as Python. Load
model.pt2 from registries you trust, and take the safetensors otherwise; `python -m jobs.pull` (parallax-ssl) refuses a
model.pt2 that holds anything but tensors and tensor arithmetic.

## Preprocessing

Upright (EXIF orientation applied) RGB of 8 bits, shorter side resized to {resized_side}, centre crop of \
{image_size} x {image_size}, bilinear with antialiasing; `x / 255`, then `(x - mean) / std` with

- mean `{list(mean)}`
- std `{list(std)}`

Lay transparent images on white first, as in training. `convert("RGB")` of PIL drops the alpha and shows what lies under
it, often black:

```python
from PIL import Image


def opaque(image: Image.Image) -> Image.Image:
    if not image.has_transparency_data:
        return image.convert("RGB")
    image = image.convert("RGBA")
    return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")
```

## Measured

On the validation split of the data above, the encoder frozen; both baselines were measured in the same run. In brackets
95 % intervals over images. kNN compares features after the mean of the training images is taken off, raw pixels after
that or after each image's own mean, whichever is better.

| metric | this encoder | raw pixels | random initialisation |
|---|---|---|---|
{metrics}
{doubts}
## Limits

- Trained on the data of the digest above and measured on its validation split; elsewhere it is unmeasured.
- It learnt to ignore what its augmentations change: see `method.views` below. What depends on colour, orientation or
  scale may be lost.
- model.pt2 accepts any batch size, but only {image_size} x {image_size} pixels, in float32.
- Learnt from images without labels, it carries their biases; nothing was done to remove them.

## Hyper-parameters

| key | value |
|---|---|
{hyperparameters}
"""


def _cell(score: Score, representation: str) -> str:
    value, interval = getattr(score, representation), score.intervals.get(representation)
    if value is None:
        return "-"
    return f"{value:.4f}" + (f" ({interval[0]:.4f} to {interval[1]:.4f})" if interval else "")

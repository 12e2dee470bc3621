"""An encoder leaves Parallax as files that need none of its code, no pickle, and prove themselves on load.

::

    model.pt2          the graph and its weights (torch.export): needs torch, any batch size
    model.safetensors  the weights, and config.json the architecture: ``timm.create_model("local-dir:<folder>")``,
                       and the lines of the card where ``stem`` is cifar
    golden.npz         a few uint8 images and the embeddings they must give
    card.json          where the encoder comes from; README.md says the same to people

The golden embeddings are not a nicety: ``timm.create_model("local-dir:...")`` without ``pretrained=True`` gives random
weights without a word, and a wrong mean or channel order looks just as healthy.
"""

import hashlib
import io
import json
import os
import shutil
import tempfile
import zipfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple, TypeVar

import numpy as np
import safetensors.torch
import timm
import torch
from numpy.lib import format as npy
from pydantic import BaseModel, ConfigDict, Field, FiniteFloat, PositiveInt, ValidationError
from torch import Tensor, nn

from pipeline.archive import check_stored, first_line, load_archive
from pipeline.data.loader import shorter_side
from pipeline.errors import UserError, first_problem
from pipeline.model_card import ModelCard, render
from pipeline.models.backbone import Backbone, create_timm_model, replace_stem

# Largest relative L2 error of an embedding. Float32 on another CPU is off by 1e-6 to 1e-5, TF32 on a GPU by
# up to 2e-3; wrong weights by about 1, a wrong mean or std by more than 5e-2.
GOLDEN_TOLERANCE = 5e-3
_MAX_JSON_BYTES = 4 << 20  # card.json has 10 kB


_Json = TypeVar("_Json", bound=BaseModel)
_Std = Annotated[float, Field(gt=0, allow_inf_nan=False)]


class ExportError(UserError):
    """The files of an encoder do not give the embeddings they promise, or are not all there."""


class Preprocessing(NamedTuple):
    """What an encoder expects: RGB, ``data.loader.centre_crop``, x / 255, then (x - mean) / std."""

    image_size: int  # pixels
    mean: tuple[float, float, float]
    std: tuple[float, float, float]

    def __call__(self, images: Tensor) -> Tensor:
        """uint8 (N, 3, S, S) -> float32, on the images' device."""
        mean, std = (torch.tensor(c, device=images.device).view(3, 1, 1) for c in (self.mean, self.std))
        return (images / 255 - mean) / std


def export_encoder(
    backbone: Backbone,
    out_dir: Path,
    *,
    mean: Sequence[float],
    std: Sequence[float],
    golden_images: Tensor | np.ndarray[Any, Any],
    card: ModelCard,
) -> None:
    """Write the files above into ``out_dir``, replacing what is there; all of them or none.

    ``golden_images``: uint8 (N, 3, S, S). Before the folder appears under its name, model.pt2 and the
    safetensors are loaded from it the way a consumer loads them, and must give the golden embeddings.
    """
    images = torch.as_tensor(golden_images)
    size = backbone.config.image_size
    if images.dtype != torch.uint8 or images.shape[1:] != (3, size, size):
        raise ValueError(f"golden images are uint8 (N, 3, {size}, {size}), not {images.dtype} {tuple(images.shape)}")
    preprocessing = Preprocessing(size, tuple(mean), tuple(std))  # type: ignore[arg-type]
    net = create_timm_model(backbone.config)  # fresh, so that global BN exports as plain BN and every key is checked
    net.load_state_dict(backbone.net.state_dict())  # copies to the CPU and to float32
    net.eval().requires_grad_(False)

    out_dir = out_dir.absolute()
    out_dir.parent.mkdir(parents=True, exist_ok=True)
    folder = Path(tempfile.mkdtemp(prefix=f".{out_dir.name}-", dir=out_dir.parent))
    try:
        _write_archive(net, folder / "model.pt2", size)
        weights = {name: tensor.contiguous() for name, tensor in net.state_dict().items()}
        safetensors.torch.save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
        (folder / "config.json").write_text(json.dumps(_timm_config(backbone, net, preprocessing), indent=1))
        with torch.inference_mode():
            embeddings = net(preprocessing(images))
        np.savez(folder / "golden.npz", images=images.numpy(), embeddings=embeddings.numpy())
        check_golden(load_archive(folder / "model.pt2"), folder)
        check_golden(load_with_timm(folder), folder)
        files = {name: sha256(folder / name) for name in LOADED}
        manifest = BundleManifest(card=card, files=files)
        (folder / "card.json").write_text(manifest.model_dump_json(indent=1))
        (folder / "README.md").write_text(
            render(
                card,
                architecture=backbone.config.name,
                stem_width=net.conv1.out_channels if backbone.config.stem == "cifar" else None,  # type: ignore[union-attr, arg-type]
                feature_dim=embeddings.shape[1],
                parameters=sum(p.numel() for p in net.parameters()),
                image_size=size,
                resized_side=shorter_side(size),
                mean=preprocessing.mean,
                std=preprocessing.std,
                golden_sha256=files["golden.npz"],
                tolerance=GOLDEN_TOLERANCE,
            )
        )
        for path, mode in [(folder, 0o755), *((file, 0o644) for file in folder.iterdir())]:
            path.chmod(mode)  # mkdtemp and safetensors write for the owner's eyes only
        if out_dir.exists():
            shutil.rmtree(out_dir)
        os.rename(folder, out_dir)
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        raise


LOADED = ("model.pt2", "model.safetensors", "config.json", "golden.npz")
BUNDLE_FILES = (*LOADED, "card.json", "README.md")


class BundleManifest(BaseModel):
    """``card.json``: the card, and the SHA-256 of each file that is loaded."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    card: ModelCard
    files: dict[str, str]

    @property
    def digest(self) -> str:
        """What makes it this encoder and no other: the run, the weights, the architecture and preprocessing.

        model.pt2 is left out: torch.export writes the same graph in other bytes each time.
        """
        parts = [self.card.run_id, self.files["model.safetensors"], self.files["config.json"]]
        return hashlib.sha256("\n".join(parts).encode()).hexdigest()


def check_bundle(folder: Path) -> BundleManifest:
    """Read ``card.json`` and compare every file with it; ExportError names the one that is missing or damaged."""
    if not (folder / "card.json").exists():
        raise ExportError(f"{folder} has no card.json, so it is not an exported encoder")
    manifest = _read_json(folder / "card.json", BundleManifest)
    if manifest.files.keys() != {*LOADED}:
        raise ExportError(
            f"{folder / 'card.json'} is damaged: it lists the files {', '.join(manifest.files) or 'none'}, not "
            f"{', '.join(LOADED)}; export the encoder again"
        )
    for name in BUNDLE_FILES:
        path = folder / name
        if not path.is_file():
            raise ExportError(f"{path} is missing; export the encoder again")
        if name in LOADED and (found := sha256(path)) != manifest.files[name]:
            raise ExportError(f"{path} is damaged: SHA-256 {found}, card.json says {manifest.files[name]}")
    _read_json(folder / "config.json", _TimmConfig)
    _check_safetensors(folder / "model.safetensors")
    read_golden(folder / "golden.npz")
    return manifest


class _Pretrained(BaseModel):
    """The part of timm's ``pretrained_cfg`` that says what the input is."""

    input_size: tuple[Literal[3], PositiveInt, PositiveInt]
    mean: tuple[FiniteFloat, FiniteFloat, FiniteFloat]
    std: tuple[_Std, _Std, _Std]


class _TimmConfig(BaseModel):
    """What is read of ``config.json``."""

    stem: Literal["imagenet", "cifar"]
    pretrained_cfg: _Pretrained


def read_preprocessing(folder: Path) -> Preprocessing:
    """What ``config.json`` says about the input. ExportError if it is damaged."""
    config = _read_json(folder / "config.json", _TimmConfig).pretrained_cfg
    return Preprocessing(config.input_size[-1], config.mean, config.std)


def load_with_timm(folder: Path) -> nn.Module:
    """The encoder from config.json and model.safetensors, by the lines that its card shows; in eval mode."""
    if _read_json(folder / "config.json", _TimmConfig).stem == "imagenet":
        model: nn.Module = timm.create_model(f"local-dir:{folder}", pretrained=True)
    else:
        model = timm.create_model(f"local-dir:{folder}")
        replace_stem(model)
        timm.models.load_checkpoint(model, str(folder / "model.safetensors"))
    return model.eval()


def check_golden(encode: Callable[[Tensor], Tensor], folder: Path, device: torch.device | None = None) -> None:
    """Raise ExportError unless ``encode`` reproduces the embeddings in ``folder``/golden.npz."""
    images, expected = read_golden(folder / "golden.npz")
    preprocessing = read_preprocessing(folder)
    if images.shape[2:] != (preprocessing.image_size,) * 2:
        raise ExportError(
            f"{folder / 'config.json'} says {preprocessing.image_size} px, and the golden images are "
            f"{tuple(images.shape)}; the files do not belong together"
        )
    try:
        with torch.inference_mode():
            found = encode(preprocessing(images.to(device))).float().cpu()
    except UserError:
        raise
    except Exception as error:  # whatever the operators of a foreign graph stumble over
        raise ExportError(
            f"the encoder in {folder} cannot encode its golden images {tuple(images.shape)}: {first_line(error)}"
        ) from error
    if found.shape != expected.shape:
        raise ExportError(
            f"the encoder in {folder} gives {tuple(found.shape)}, its golden embedding is {tuple(expected.shape)}"
        )
    distance = ((found - expected).norm(dim=1) / expected.norm(dim=1).clamp_min(1e-12)).max().item()
    if not distance <= GOLDEN_TOLERANCE:  # NaN fails too
        raise ExportError(
            f"the encoder in {folder} does not reproduce its golden embedding: relative error {distance:.2g}, "
            f"at most {GOLDEN_TOLERANCE:g} is rounding; the files do not belong together, or were damaged"
        )


def _read_json(path: Path, kind: type[_Json]) -> _Json:
    try:
        if (size := path.stat().st_size) > _MAX_JSON_BYTES:
            raise ExportError(f"{path} is damaged: it has {size} bytes, more than {_MAX_JSON_BYTES}")
        return kind.model_validate_json(path.read_bytes())
    except OSError as error:
        raise ExportError(f"{path} is damaged: {error.strerror}; export the encoder again") from error
    except ValidationError as error:
        raise ExportError(f"{path} is damaged: {first_problem(error)}; export the encoder again") from error


def _check_safetensors(path: Path) -> None:
    """ExportError unless the header describes the bytes behind it: each tensor's once, without gaps."""
    try:
        with safetensors.safe_open(path, framework="pt"):
            pass
    except safetensors.SafetensorError as error:
        raise ExportError(f"{path} is damaged: {first_line(error)}; export the encoder again") from error


def read_golden(path: Path) -> tuple[Tensor, Tensor]:
    """uint8 (N, 3, S, S) images and their float32 (N, D) embeddings, N > 0. ExportError if there is anything else."""
    try:
        with zipfile.ZipFile(path) as archive:
            check_stored(archive, path.stat().st_size)
            images = _read_npy(archive.read("images.npy"))
            embeddings = _read_npy(archive.read("embeddings.npy"))
    except Exception as error:  # what zipfile and NumPy stumble over has any type
        raise ExportError(f"{path} is damaged: {first_line(error)}; export the encoder again") from error
    is_whole = images.ndim == 4 and images.shape[1] == 3 and embeddings.ndim == 2 and 0 < len(images) == len(embeddings)
    if not is_whole or (images.dtype, embeddings.dtype) != (np.uint8, np.float32):
        raise ExportError(
            f"{path} is damaged: it holds images {images.dtype} {images.shape} and embeddings {embeddings.dtype} "
            f"{embeddings.shape}, not uint8 (N, 3, S, S) and float32 (N, D); export the encoder again"
        )
    return torch.from_numpy(images.copy()), torch.from_numpy(embeddings.copy())


def _read_npy(content: bytes) -> np.ndarray[Any, Any]:
    """The array over ``content``. ``np.load`` would allocate what the header says before it looks for it."""
    file = io.BytesIO(content)
    if npy.read_magic(file) != (1, 0):
        raise ValueError("an array of another version than 1.0")
    shape, is_fortran, dtype = npy.read_array_header_1_0(file)
    return np.frombuffer(content, dtype, offset=file.tell()).reshape(shape, order="F" if is_fortran else "C")


def _write_archive(net: nn.Module, path: Path, size: int) -> None:
    # Traced at batch 2 (1 would be frozen); zeros in one element's storage, because the example is stored too.
    example = torch.zeros(1).expand(2, 3, size, size)
    program = torch.export.export(net, (example,), dynamic_shapes=({0: torch.export.Dim("batch", min=1)},))
    for node in program.graph.nodes:
        node.meta.pop("stack_trace", None)  # paths of the machine that exported it
    torch.export.save(program, path)


def _timm_config(backbone: Backbone, net: nn.Module, preprocessing: Preprocessing) -> dict[str, Any]:
    default: dict[str, Any] = net.pretrained_cfg  # type: ignore[assignment]
    return {
        "architecture": backbone.config.name,
        "num_classes": 0,
        "num_features": backbone.feature_dim,
        "model_args": backbone.config.args,
        "stem": backbone.config.stem,  # cifar: a 3x3 convolution of stride 1, no max-pool; timm has no argument for it
        "pretrained_cfg": {
            "input_size": [3, preprocessing.image_size, preprocessing.image_size],
            "fixed_input_size": default.get("fixed_input_size", False),
            "interpolation": "bilinear",
            "crop_pct": preprocessing.image_size / shorter_side(preprocessing.image_size),
            "crop_mode": "center",
            "mean": preprocessing.mean,
            "std": preprocessing.std,
            "num_classes": 0,
            "pool_size": None,
            # With these a consumer fine-tunes by create_model(..., num_classes=10) or in_chans=1.
            "first_conv": default.get("first_conv") if backbone.config.stem == "imagenet" else "conv1",
            "classifier": default.get("classifier"),
        },
    }


def sha256(path: Path) -> str:
    """Of a file's content, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()

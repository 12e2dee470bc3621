"""The typed configuration of a run: YAML, ``key.sub=value`` overrides, validation, all before Ray starts.

An override can also be a YAML file: any of configs/pretrain with any of configs/models is a run.
Each module declares the part it reads (``View``, ``BackboneConfig``, ``OptimConfig`` ...); this one
composes them. Dotted keys are the one currency of the command line, the sweep's search space and the MLflow parameters.
Where the config has a text the value of an override is the text as it was typed; elsewhere it is YAML without comments.
Every config is frozen; derive one with ``override(config, ["method.temperature=0.1"])``.
"""

import difflib
import hashlib
import json
import math
import re
from collections.abc import Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, Literal, Self, Union, get_args, get_origin

import yaml
from pydantic import (
    BaseModel,
    Field,
    SerializeAsAny,
    ValidationError,
    ValidationInfo,
    field_validator,
    model_validator,
)

from pipeline import storage
from pipeline.data.assemble import MAX_BAD_SHARE
from pipeline.data.mirror import MirrorConfig
from pipeline.data.sources import SourceError, check_hold_out
from pipeline.errors import UserError
from pipeline.evaluate.config import EvaluateConfig
from pipeline.methods.base import MethodConfig, method_class, method_names
from pipeline.models.backbone import BackboneConfig
from pipeline.negatives.config import NegativesConfig
from pipeline.optim import OptimConfig
from pipeline.registry.address import RegistryError, choose, default_uri, normalized, source_of
from pipeline.section import Section


class ConfigError(UserError):
    """The configuration is wrong; the message names the key, the value, the rule and values that work."""


class StorageConfig(Section):
    """Where everything durable goes. Credentials and endpoints come from the environment (AWS_*), never from here."""

    url: str = ".parallax"  # a folder or any fsspec URL, e.g. s3://bucket/prefix


class DataConfig(Section):
    """Which shards to read. With ``source``, shards that are not there yet are written from that image set."""

    source: str | None = None
    hold_out: dict[str, float] = Field(default_factory=dict)  # {selection: 0.2}: a share of source's train split
    shards: str = ""  # URL of the folder that holds manifest.json; "" = <storage.url>/shards/<source>[-selection-0.2]
    mean: tuple[float, float, float] = (0.485, 0.456, 0.406)  # ImageNet's, as timm's default
    std: tuple[float, float, float] = (0.229, 0.224, 0.225)
    loader_workers: int = Field(default=2, ge=0, le=128)  # processes per rank; 0 = in the training process
    colour_on: Literal["auto", "cpu", "device"] = "auto"  # cpu: the loader's workers; auto: the device if it is a GPU
    max_bad_share: float = Field(default=MAX_BAD_SHARE, ge=0, le=1)  # of samples that cannot be decoded
    mirror: MirrorConfig | None = None  # keep what is read on every node's disk: {folder: /mnt/nvme, max_gib: 500}

    @field_validator("mean", "std")
    @classmethod
    def _of_pixels_from_0_to_1(cls, value: tuple[float, ...], info: ValidationInfo) -> tuple[float, ...]:
        name = str(info.field_name)
        if not all(0 <= x <= 1 for x in value) or (name == "std" and not all(value)):
            of_bytes = f"; as shares of 255 yours are {[round(x / 255, 4) for x in value]}" if max(value) > 1 else ""
            raise ValueError(
                f"pixels are from 0 to 1, so each {name} must be {'above' if name == 'std' else 'at least'} 0 and at "
                f"most 1; the default is {list(cls.model_fields[name].default)}{of_bytes}"
            )
        return value

    @model_validator(mode="after")
    def _can_hold_out(self) -> Self:
        if self.hold_out and self.source is None:
            raise ValueError(
                f"hold_out={self.hold_out} is cut when shards are written from data.source, which is not set; shards "
                "of your own get such a split by `python -m jobs.write_shards ... --hold-out selection=0.1`"
            )
        try:
            check_hold_out(self.hold_out)
        except SourceError as error:
            raise ValueError(f"hold_out: {error}") from error
        return self


class TrainConfig(Section):
    """How long, in what batches; the number of workers matters only without statistics over the global batch."""

    epochs: int = Field(default=100, ge=1)
    global_batch_size: int = Field(default=256, ge=2)  # samples over all ranks
    global_bn: bool = True  # BatchNorm statistics over the global batch
    bn_ranks_per_group: int | None = Field(default=None, ge=1)  # over groups of so many ranks instead
    micro_batches: int = Field(default=1, ge=1)  # passes per step and rank: exact, or refused
    precision: Literal["float32", "bf16"] = "float32"  # bf16: autocast of the forward pass; weights stay float32
    channels_last: bool = False  # memory format of images and convolutions; the same result up to rounding
    compile: bool = False  # torch.compile the backbone: on CPUs 30-240 s at the start for at most 5 %
    diagnose_every_steps: int = Field(default=100, ge=1)  # std, RankMe, alignment, uniformity of the embeddings
    on_collapse: Literal["warn", "stop"] = "warn"
    checkpoint_every_steps: int = Field(default=500, ge=1)
    keep_checkpoints: int = Field(default=2, ge=1)
    log_every_steps: int = Field(default=10, ge=1)


class ClusterConfig(Section):
    """What Ray is asked for. None of it changes the result, only where and how fast it is computed."""

    address: str | None = None  # None: $RAY_ADDRESS if set, else a Ray of our own that ends with the job
    num_workers: int = Field(default=2, ge=1)  # ranks
    cpus_per_worker: float = Field(default=1, gt=0)
    gpus_per_worker: float = Field(default=0, ge=0)
    max_failures: int = Field(default=3, ge=-1)  # worker-group restarts before the run fails; -1 = no limit
    env: dict[str, str] = Field(default_factory=dict)  # for the workers; never secrets, the jobs API shows it

    @field_validator("gpus_per_worker")
    @classmethod
    def _whole_or_shared(cls, gpus: float) -> float:
        if gpus > 1 and gpus % 1:
            raise ValueError(
                f"a worker has whole GPUs or a share of one: {gpus // 1:g}, {gpus // 1 + 1:g}, or e.g. 0.5"
            )
        return gpus


class TrackingConfig(Section):
    """The MLflow server, or a sqlite file in whose URI %XX is an escape. "" = MLFLOW_TRACKING_URI, and without that
    sqlite:///<./.parallax or the storage folder>/mlflow.db."""

    uri: str = ""
    experiment: str = Field(default="parallax", min_length=1, max_length=500)

    @field_validator("uri")
    @classmethod
    def _names_a_place(cls, uri: str) -> str:
        try:
            return normalized(uri) if uri else ""
        except RegistryError as error:
            raise ValueError(str(error)) from error


class RegistryConfig(Section):
    """Under which name the encoder is registered, and which alias then points at it."""

    model_name: str = Field(default="parallax-encoder", max_length=200)
    alias: str = Field(default="champion", max_length=200)

    @field_validator("model_name")
    @classmethod
    def _is_a_name_everywhere(cls, name: str) -> str:
        if not re.fullmatch(r"[A-Za-z0-9_][A-Za-z0-9_.-]*", name):
            raise ValueError(
                "a model's name stands in models:/<name>@<alias> and in paths, so it has letters, digits, '_', '.' and "
                "'-' and begins with none of the last two; e.g. parallax-encoder"
            )
        return name

    @field_validator("alias")
    @classmethod
    def _not_reserved(cls, alias: str) -> str:
        if not re.fullmatch(r"[A-Za-z0-9_-]+", alias):
            raise ValueError("an alias has letters, digits, '_' and '-'; e.g. champion")
        if alias.lower() == "latest" or re.fullmatch(r"[vV]\d+", alias):
            raise ValueError(f"MLflow reserves the alias {alias!r}; use a word such as 'champion' or 'candidate'")
        return alias


class Config(Section):
    """One pretraining run."""

    name: str = Field(default="", pattern=r"^([a-z0-9][a-z0-9-]{0,40})?$")  # "" = <method>-<model>-<image size>
    seed: int = Field(default=0, ge=0, lt=2**63)  # seeds derived from it fit torch's 64 bits
    storage: StorageConfig = StorageConfig()
    data: DataConfig = DataConfig()
    model: BackboneConfig = BackboneConfig()
    method: SerializeAsAny[MethodConfig]
    negatives: NegativesConfig = NegativesConfig()
    optim: OptimConfig = OptimConfig()
    train: TrainConfig = TrainConfig()
    evaluate: EvaluateConfig = EvaluateConfig()
    cluster: ClusterConfig = ClusterConfig()
    tracking: TrackingConfig = TrackingConfig()
    registry: RegistryConfig = RegistryConfig()

    @field_validator("method", mode="before")
    @classmethod
    def _typed_by_name(cls, value: Any) -> Any:
        """``method.name`` picks the file in pipeline/methods, and that file's Config validates the rest."""
        if isinstance(value, dict):
            if "name" not in value:
                raise ValueError("method.name is missing; e.g. method: {name: simclr}")
            return method_class(str(value["name"])).Config.model_validate(value)
        return value

    @model_validator(mode="after")
    def _batch_divides(self) -> Self:
        batch, workers = self.train.global_batch_size, self.cluster.num_workers
        if batch % workers:
            raise ValueError(
                f"train.global_batch_size={batch} does not divide by cluster.num_workers={workers}; "
                f"batch sizes that work: {batch - batch % workers}, {batch - batch % workers + workers}; "
                f"worker counts that work: {', '.join(str(w) for w in range(1, min(batch, 64) + 1) if batch % w == 0)}"
            )
        if batch // workers % self.train.micro_batches:
            raise ValueError(
                f"train.micro_batches={self.train.micro_batches} does not divide the {batch // workers} samples of a "
                f"rank; what divides: {', '.join(str(n) for n in range(1, 65) if batch // workers % n == 0)}"
            )
        return self

    @model_validator(mode="after")
    def _warmup_ends(self) -> Self:
        warmup, epochs = self.optim.warmup_epochs, self.train.epochs
        if warmup >= epochs:
            raise ValueError(
                f"optim.warmup_epochs={warmup:g} lasts for all of train.epochs={epochs}: the run would end at its "
                f"largest learning rate, before the cosine begins; use optim.warmup_epochs={epochs / 10:g} or 0, or "
                f"train.epochs >= {math.floor(warmup) + 1}"
            )
        return self

    @model_validator(mode="after")
    def _batchnorm_groups_divide(self) -> Self:
        group, workers = self.train.bn_ranks_per_group, self.cluster.num_workers
        if self.train.global_bn and group is not None and workers % group:
            raise ValueError(
                f"train.bn_ranks_per_group={group} does not divide cluster.num_workers={workers}; groups that do: "
                f"{', '.join(str(n) for n in range(1, workers + 1) if workers % n == 0)}"
            )
        if self.batchnorm_samples < 2:
            setting = "train.global_bn=false" if not self.train.global_bn else f"train.bn_ranks_per_group={group}"
            raise ValueError(
                f"{setting} leaves BatchNorm {self.batchnorm_samples} sample of train.global_batch_size="
                f"{self.train.global_batch_size} on cluster.num_workers={workers}, and it takes statistics over at "
                f"least 2; use train.global_bn=true without groups, or train.global_batch_size >= {2 * workers}"
            )
        return self

    @property
    def batchnorm_samples(self) -> int:
        """How many samples BatchNorm takes its statistics over."""
        workers = self.cluster.num_workers
        group = (self.train.bn_ranks_per_group or workers) if self.train.global_bn else 1
        return self.train.global_batch_size // workers * group

    @model_validator(mode="after")
    def _method_fits_the_model(self) -> Self:
        self.method.check(self.model)
        return self

    @model_validator(mode="after")
    def _negatives_fit(self) -> Self:
        batch, queue = self.train.global_batch_size, getattr(self.method, "queue_size", None)
        if queue is not None and queue < batch:
            raise ValueError(
                f"method.queue_size={queue} does not hold the {batch} keys of a global batch; "
                f"use method.queue_size >= {batch} or train.global_batch_size <= {queue}"
            )
        has_bank = hasattr(self.method, "bank_dtype")
        if queue is None and not has_bank and self.negatives.backend == "service":
            raise ValueError(
                f"negatives.backend=service serves a momentum queue or a memory bank, and method.name="
                f"{self.method.name} has neither; use negatives.backend=local, or method.name=moco_v2 or npid"
            )
        stale = self.negatives.max_staleness
        if has_bank and stale:
            raise ValueError(
                f"negatives.max_staleness={stale} is for queues: a slot that is read is always that of the last step; "
                "use negatives.max_staleness=0"
            )
        if queue is not None and queue < (stale + 1) * batch:
            raise ValueError(
                f"method.queue_size={queue} is less than the {stale + 1} global batches of {batch} keys that a replica "
                f"may be behind; use negatives.max_staleness <= {queue // batch - 1} or method.queue_size >= "
                f"{(stale + 1) * batch}"
            )
        return self

    @property
    def shards_url(self) -> str:
        """Where the shards are, or will be written."""
        held_out = "".join(f"-{split}-{share:g}" for split, share in sorted(self.data.hold_out.items()))
        folder = f"{storage.folder_name(self.data.source or self.name)}{held_out}"
        return self.data.shards or storage.join(self.storage.url, "shards", folder)

    @property
    def tracking_uri(self) -> str:
        """The MLflow URI, never empty. ``load_config`` has fixed it, so that no worker looks at its own environment."""
        return self.tracking.uri or default_uri(self.storage.url)

    @property
    def tracking_source(self) -> str:
        """What ``load_config`` took the MLflow URI from: tracking.uri, MLFLOW_TRACKING_URI or the default."""
        return source_of(self.tracking_uri, "tracking.uri", default_uri(self.storage.url))

    def run_id(self, manifest_digest: str) -> str:
        """The run's name: ``<name>-<hash>`` of what determines the weights, so submitting it again resumes it.

        The cluster, the loader's workers, logging, tracking and evaluation are left out: none of them changes the
        weights, but for the number of workers where BatchNorm's statistics are not global. Nor does data.colour_on but
        by rounding, as another kind of device would: the draws are the same and pixels differ by less than 1 of 255,
        so a run may go on where colour is computed elsewhere.
        """
        determining = self.model_dump(mode="json", include={"seed", "model", "method", "optim"})
        determining["data"] = {
            "digest": manifest_digest,
            **self.data.model_dump(mode="json", include={"mean", "std"}),
        }
        determining["train"] = self.train.model_dump(
            mode="json", include={"epochs", "global_batch_size", "global_bn", "bn_ranks_per_group", "precision"}
        )
        if not self.train.global_bn or self.train.bn_ranks_per_group:
            determining["train"]["bn_samples"] = self.batchnorm_samples
        if self.negatives.max_staleness:  # without it both backends have the same trajectory
            determining["negatives"] = {"max_staleness": self.negatives.max_staleness}
        text = json.dumps(determining, sort_keys=True)
        return f"{self.name}-{hashlib.sha256(text.encode()).hexdigest()[:10]}"

    def flat(self) -> dict[str, str]:
        """Dotted key -> value as text, for MLflow."""
        return dict(_flatten(self.model_dump(mode="json")))


def load_config(path: str | Path, overrides: list[str] | None = None) -> Config:
    """Read YAML, apply overrides from left to right, validate. ConfigError on anything wrong.

    An override is ``key.sub=value``, or another YAML file: the keys of its sections replace those of the file before,
    whole, so that ``model: {args: {}}`` takes back the arguments of another architecture.
    """
    overrides = overrides or []
    origin = " + ".join([str(path), *(item for item in overrides if _is_file(item))])
    config = _validated(_apply(read_mapping(path), overrides), origin)
    address = choose(config.tracking.uri, "tracking.uri", default_uri(config.storage.url))
    values = config.model_dump(mode="json")
    return _validated({**values, "tracking": {**values["tracking"], "uri": address.uri}}, address.source)


def override(config: Config, overrides: list[str]) -> Config:
    """A copy of ``config`` with the same overrides as ``load_config`` takes, and everything validated again."""
    return _validated(_apply(config.model_dump(mode="json"), overrides), "the derived config")


def dump(config: Config) -> str:
    """YAML that ``load_config`` reads back to an equal config."""
    return yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False)


def _is_file(override: str) -> bool:
    return "=" not in override and override.endswith((".yaml", ".yml"))


def read_mapping(path: str | Path, shipped_in: str = "configs", example: str = "'name: my-run'") -> dict[str, Any]:
    """What a YAML file or object holds. ConfigError if it is no mapping; without the file, it lists ``shipped_in``."""
    try:
        text = storage.read_bytes(str(path)) if storage.is_remote(str(path)) else Path(path).read_bytes()
        values = load_yaml(text)
    except OSError as error:
        shipped = ", ".join(str(p) for p in sorted(Path(shipped_in).rglob("*.yaml"))) or f"none found in ./{shipped_in}"
        raise ConfigError(f"cannot read {path}: {error.strerror}; configs here: {shipped}") from error
    except yaml.YAMLError as error:
        raise ConfigError(f"{path} is not valid YAML: {error}") from error
    if not isinstance(values, dict):
        raise ConfigError(f"{path} must hold a mapping such as {example}, not {type(values).__name__}")
    return values


# What only YAML 1.1 reads into a text: octal 010, base 60 as in 1:30, dates.
_OLD_SCALAR = re.compile(r"[-+]?0[0-7_]+|[-+]?[0-9_]+(:[0-9]+)+(\.[0-9_]*)?|[0-9]{4}-[0-9]{1,2}-[0-9]{1,2}.*")


class _Loader(yaml.SafeLoader):
    """Refuses a key that a mapping holds twice: the last one would win without a word. 010 is ten, not eight."""

    def resolve(self, kind: Any, value: Any, implicit: Any) -> Any:
        if kind is yaml.ScalarNode and implicit[0] and _OLD_SCALAR.fullmatch(value):
            return self.DEFAULT_SCALAR_TAG
        return super().resolve(kind, value, implicit)

    def compose_mapping_node(self, anchor: Any) -> yaml.MappingNode:
        node: yaml.MappingNode = super().compose_mapping_node(anchor)
        keys = [key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode)]
        if twice := [key for key in keys if keys.count(key) > 1]:
            raise yaml.MarkedYAMLError(
                problem=f"a mapping holds the key {twice[0]!r} twice; write what is below both below one",
                problem_mark=node.start_mark,
            )
        return node


def load_yaml(text: str | bytes) -> Any:
    """What YAML holds; yaml.YAMLError also where a key is there twice, or an alias stands for what it is part of."""
    try:
        values = yaml.load(text, _Loader)
    except (ValueError, RecursionError) as error:  # of int() beyond 4,300 digits, of brackets in brackets
        raise yaml.YAMLError(f"it is too long or too deep to read: {error}") from error
    try:
        json.dumps(values, default=str, skipkeys=True)
    except ValueError as error:
        raise yaml.YAMLError("an alias (*name) stands for what it is part of, without an end; write values") from error
    return values


def parse_argument(text: str, kind: Any) -> Any:
    """What ``text`` means after ``key=`` for a key of this type: itself where the key is a text, or what stands between
    its quotes; else YAML, in which a comment is a yaml.YAMLError: a command line has none."""
    if not _is_text(kind):
        return _without_comments(text)
    if NoneType in _members(kind) and text in ("", "null", "~"):
        return None
    if len(text) > 1 and text[0] == text[-1] and text[0] in "'\"":
        try:
            quoted = _without_comments(text)
        except yaml.YAMLError:
            return text
        return quoted if isinstance(quoted, str) else text
    return text


def _without_comments(text: str) -> Any:
    end = 0
    for token in yaml.scan(text, _Loader):
        if text[end : token.start_mark.index].strip():
            raise yaml.YAMLError("'#' after a space begins a comment; put it between quotes")
        end = token.end_mark.index
    return load_yaml(text)


def key_type(section: Any, path: Sequence[str], values: Mapping[str, Any]) -> Any:
    """The type of the key at ``path`` below ``section``; None if there is no such key. ``values`` names the method."""
    for part in path:
        section = next((found for member in _members(section) if (found := _child(member, part))), None)
        if section is MethodConfig:
            section = _method_config(values)
    return section


def _child(section: Any, part: str) -> Any:
    if isinstance(section, type) and issubclass(section, BaseModel):
        return section.model_fields[part].annotation if part in section.model_fields else None
    if get_origin(section) is dict:
        return get_args(section)[1]
    return get_args(section)[0] if get_origin(section) in (list, tuple) else None


def _method_config(values: Mapping[str, Any]) -> type[MethodConfig]:
    method = values.get("method")
    name = method.get("name") if isinstance(method, Mapping) else None
    return method_class(name).Config if name in method_names() else MethodConfig


def _members(kind: Any) -> tuple[Any, ...]:
    """Those of a union; of another type itself."""
    return get_args(kind) if get_origin(kind) in (Union, UnionType) else (kind,)


def _is_text(kind: Any) -> bool:
    """Whether values of this type are texts, or None."""
    members = [member for member in _members(kind) if member is not NoneType]
    words = [word for member in members for word in (get_args(member) if get_origin(member) is Literal else [member])]
    return all(word is str or isinstance(word, str) for word in words)


def _merge(values: dict[str, Any], other: dict[str, Any]) -> dict[str, Any]:
    """``other`` over ``values``, section by section; within a section a key replaces a key."""
    merged = dict(values)
    for section, keys in other.items():
        both = isinstance(keys, dict) and isinstance(values.get(section), dict)
        merged[section] = {**values[section], **keys} if both else keys
    return merged


def _apply(values: dict[str, Any], overrides: list[str]) -> dict[str, Any]:
    for item in overrides:
        if _is_file(item):
            values = _merge(values, read_mapping(item))
            continue
        key, separator, text = item.partition("=")
        if not separator or not key:
            raise ConfigError(f"override {item!r} is not key.sub=value; e.g. train.epochs=10, or a YAML file")
        parts = key.split(".")
        node: Any = values
        for depth, (part, child) in enumerate(pairwise(parts)):
            if isinstance(node, dict) and node.get(part) is None:
                node[part] = _default_list(values, parts[: depth + 1]) if child.isdecimal() else {}
            node = _step_into(node, part, key)
        last = parts[-1]
        try:
            value = parse_argument(text, key_type(Config, parts, values))
        except yaml.YAMLError as error:
            raise ConfigError(f"override {item!r}: {text!r} is not a YAML value: {error}") from error
        if isinstance(node, list):
            node[_index(node, last, key)] = value
        elif isinstance(node, dict):
            node[last] = value
        else:
            raise ConfigError(f"override {key!r}: {'.'.join(parts[:-1])} is a value, it has no key {last!r}")
    return values


def _step_into(node: Any, part: str, key: str) -> Any:
    if isinstance(node, list):
        return node[_index(node, part, key)]
    if not isinstance(node, dict):
        raise ConfigError(f"override {key!r}: {part!r} lies below a plain value")
    return node[part]


def _default_list(values: dict[str, Any], path: list[str]) -> Any:
    """The list that ``path`` has by default: ``method.views.0.flip=0.5`` works without views in the YAML."""
    node: Any = _validated(values, "the config before its overrides").model_dump(mode="json")
    for part in path:
        node = node.get(part, [])
    return node


def _index(node: list[Any], part: str, key: str) -> int:
    if not part.isdecimal() or int(part) >= len(node):
        raise ConfigError(f"override {key!r}: the list has the indices 0 to {len(node) - 1}, not {part!r}")
    return int(part)


def _validated(values: dict[str, Any], origin: str) -> Config:
    try:
        config = Config.model_validate(values)
    except ValidationError as error:
        raise ConfigError(_explain(error, values, origin)) from error
    # Workers run in other folders: make local paths absolute once, here.
    return config.model_copy(
        update={
            "name": config.name or _default_name(config),
            "storage": StorageConfig(url=storage.resolve(config.storage.url)),
            "data": config.data.model_copy(
                update={"shards": storage.resolve(config.data.shards) if config.data.shards else ""}
            ),
        }
    )


def _default_name(config: Config) -> str:
    """E.g. moco-v3-vit-small-224."""
    architecture = re.sub(r"_patch.*", "", config.model.name)
    text = f"{config.method.name}-{architecture}-{config.model.image_size}"
    return re.sub(r"[^a-z0-9]+", "-", text)[:41]


def _explain(error: ValidationError, values: dict[str, Any], origin: str) -> str:
    lines = [f"{origin} is not valid:"]
    for problem in error.errors():
        path = [str(part) for part in problem["loc"]]
        message = problem["msg"].removeprefix("Value error, ")
        if problem["type"] == "extra_forbidden":
            allowed = _keys_at(path[:-1], values)
            close = difflib.get_close_matches(path[-1], allowed, n=1)
            hint = f"did you mean {close[0]!r}? " if close else ""
            message = f"no such key; {hint}keys here: {', '.join(allowed)}"
        elif problem["type"] != "missing" and not isinstance(problem["input"], dict | BaseModel):
            message += f" (got {problem['input']!r})"
        lines.append("  - " + (f"{'.'.join(path)}: {message}" if path else message))
    return "\n".join(lines)


def _keys_at(path: list[str], values: dict[str, Any]) -> list[str]:
    kinds = _members(key_type(Config, path, values))
    return list(next(kind for kind in kinds if isinstance(kind, type) and issubclass(kind, BaseModel)).model_fields)


def _flatten(value: Any, prefix: str = "") -> list[tuple[str, str]]:
    if isinstance(value, dict):
        return [pair for k, v in value.items() for pair in _flatten(v, f"{prefix}.{k}" if prefix else str(k))]
    if isinstance(value, list) and any(isinstance(v, dict) for v in value):
        return [pair for i, v in enumerate(value) for pair in _flatten(v, f"{prefix}.{i}")]
    return [(prefix, value if isinstance(value, str) else json.dumps(value))]

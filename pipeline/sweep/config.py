"""The typed configuration of a sweep: a base config, the keys to search, how to search, when to stop a trial.

::

    base: ../pretrain/moco_v2-resnet50-224.yaml  # relative to this file; a list of files is merged from left to right
    set: {train.epochs: 100}                     # overrides of the base, for all trials
    space:
      method.temperature: {log_uniform: [0.05, 1.0]}
      method.ema_decay: {one_minus_log_uniform: [0.9, 0.9999]}
    searcher: tpe
    scheduler: {name: asha, grace_epochs: 10}
    trials: 24

Any key that changes the weights can be searched. Everything is checked against the base before a cluster starts: both
ends of each range and some of its inside, each choice, and for grid and random every trial. A range of a key that
counts, as method.projection_dim does, gives integers. The values of trial i depend on (seed, i) alone.
"""

import hashlib
import itertools
import json
import math
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, Literal, NamedTuple, Self

import numpy as np
import yaml
from pydantic import Field, JsonValue, ValidationError, model_validator

from pipeline.config import Config, dump, key_type, load_config, override, parse_argument, read_mapping
from pipeline.data.manifest import Manifest
from pipeline.errors import UserError
from pipeline.preflight import check_batch, check_method
from pipeline.section import Section
from pipeline.sweep.results import RunResult, SearchedKey, SweepResults
from pipeline.sweep.space import MISSING, Entry, SweepError, is_whole, lookup, matches

Values = dict[str, JsonValue]  # dotted key -> value: one configuration
Choose = Callable[[str, Entry], float]  # a coordinate for a key: see space.py


class NoScheduler(Section):
    """Every trial runs to its last epoch."""

    name: Literal["none"] = "none"


class Asha(Section):
    """Asynchronous successive halving (Li et al. 2020, arXiv:1810.05934): at ``grace_epochs`` and at every
    ``reduction``-fold of it a trial goes on if it is among the best 1/``reduction`` of those that came as far."""

    name: Literal["asha"]
    grace_epochs: int = Field(default=1, ge=1)
    reduction: float = Field(default=3, gt=1)


class Pbt(Section):
    """Population based training (Jaderberg et al. 2017, arXiv:1711.09846): every ``every_epochs`` a trial of the worst
    ``quantile`` takes the weights of one of the best, and its values multiplied by 0.8 or 1.2, or drawn anew."""

    name: Literal["pbt"]
    every_epochs: int = Field(ge=1)
    quantile: float = Field(default=0.25, gt=0, le=0.5)
    resample: float = Field(default=0.25, ge=0, le=1)  # how often a value is drawn anew


class SweepConfig(Section):
    """One sweep."""

    name: str = Field(pattern=r"^[a-z0-9][a-z0-9-]{0,19}$")
    base: tuple[str, ...]  # files of a pretraining config
    set: dict[str, JsonValue] = Field(default_factory=dict)
    space: dict[str, Entry] = Field(min_length=1)
    searcher: Literal["grid", "random", "tpe"] = "random"
    scheduler: NoScheduler | Asha | Pbt = Field(default=NoScheduler(), discriminator="name")
    trials: int | None = Field(default=None, ge=1)  # configurations; a grid has as many as it has
    seeds: int = Field(default=1, ge=1)  # runs per configuration, which is ranked by their mean
    seed: int = Field(default=0, ge=0)  # of what the searcher draws
    max_concurrent: int | None = Field(default=None, ge=1)  # trials at a time; None: as many as the cluster holds

    @model_validator(mode="before")
    @classmethod
    def _as_short_as_it_is_written(cls, data: Any) -> Any:
        """One base is a list of one, and a bare ``scheduler: asha`` its name."""
        if isinstance(data, dict) and isinstance(data.get("base"), str):
            data = {**data, "base": [data["base"]]}
        if isinstance(data, dict) and "scheduler" in data:
            data = {**data, "scheduler": _named(data["scheduler"])}
        return data

    @model_validator(mode="after")
    def _fits_together(self) -> Self:
        ranges = [key for key, entry in self.space.items() if entry.bounds is not None]
        if self.searcher == "grid":
            if ranges:
                raise ValueError(
                    f"searcher=grid cannot enumerate the range of {ranges[0]}; list its values, e.g. {{grid: [0.1, "
                    "0.2]}, or use searcher=random or tpe"
                )
            if self.trials is not None:
                raise ValueError("searcher=grid tries every combination; leave out trials, or use searcher=random")
        elif self.trials is None:
            raise ValueError(f"searcher={self.searcher} needs to know how many configurations to try, e.g. trials: 16")
        if self.scheduler.name == "pbt":
            if self.searcher != "random" or self.seeds != 1 or not ranges:
                raise ValueError(
                    "scheduler=pbt perturbs the values of running trials: it needs searcher=random, seeds=1 and at "
                    "least one range, e.g. method.temperature: {log_uniform: [0.05, 1]}"
                )
            if coupled := [key for key in ranges if self.space[key].scale_one_minus is not None]:
                raise ValueError(
                    f"scheduler=pbt cannot perturb {coupled[0]}, which follows another key; give its scale_one_minus "
                    "as one number"
                )
            if self.trials is not None and self.trials < 2:
                raise ValueError("scheduler=pbt needs a population; use trials >= 4")
        return self

    def sweep_id(self, base: Config, manifest_digest: str) -> str:
        """``<name>-<hash>`` of what determines the results, so submitting the sweep again resumes it."""
        determining = self.model_dump(
            mode="json", include={"space", "searcher", "scheduler", "trials", "seeds", "seed"}, by_alias=True
        )
        determining["base"] = base.run_id(manifest_digest).rsplit("-", 1)[-1]
        determining["selection"] = base.model_dump(mode="json")["evaluate"]["selection"]
        text = json.dumps(determining, sort_keys=True)
        return f"{self.name}-{hashlib.sha256(text.encode()).hexdigest()[:10]}"

    def keys(self) -> tuple[SearchedKey, ...]:
        """The axes."""
        return tuple(SearchedKey(key=key, scale=entry.scale) for key, entry in self.space.items())

    def first_rung(self) -> int | None:
        """The epoch at which the scheduler decides first; None if it never does."""
        return self.scheduler.grace_epochs if isinstance(self.scheduler, Asha) else None

    def resolve(self, base: Mapping[str, Any], choose: Choose) -> Values:
        """The values of the keys that apply, in the order of the space; ``base`` is the base config as a mapping."""
        values: Values = {}
        for key, entry in self.space.items():
            if all(matches(lookup(other, values, base), wanted) for other, wanted in entry.when.items()):
                driver = lookup(entry.with_key, values, base) if entry.with_key else None
                values[key] = entry.value(choose(key, entry), driver, is_whole(key, values, base))
        return values

    def configurations(self, base: Config) -> list[Values]:
        """The values of every trial of searcher=grid or random, in order."""
        plain = base.model_dump(mode="json")
        if self.searcher == "grid":
            found = [self.resolve(plain, lambda key, _, at=at: at[key]) for at in self._combinations()]  # type: ignore[misc]
            return list({json.dumps(values): values for values in found}.values())  # conditions make some equal
        return [self.draw(plain, trial) for trial in range(self.trials or 0)]

    def draw(self, base: Mapping[str, Any], trial: int) -> Values:
        """The random values of one trial."""
        places = {key: place for place, key in enumerate(self.space)}

        def choose(key: str, entry: Entry) -> float:
            return entry.quantile(np.random.default_rng([self.seed, trial, places[key]]).random())

        return self.resolve(base, choose)

    def _combinations(self) -> Iterator[dict[str, float]]:
        for coordinates in itertools.product(*(entry.ends() for entry in self.space.values())):
            yield dict(zip(self.space, coordinates, strict=True))


class Sweep(NamedTuple):
    """A sweep that was checked, and the config that its trials vary."""

    config: SweepConfig
    base: Config
    train_images: int | None = None  # None until ``for_data``

    def for_data(self, manifest: Manifest) -> "Sweep":
        """The sweep over these shards; UserError if a trial's batch, or bank, does not fit them, or if they have no
        labelled validation images, which the best trial is measured on in the end."""
        has_validation = "validation" in manifest.splits
        if not has_validation or not (manifest.split("validation").label >= 0).any():
            lacks = "of the split 'validation' has a label" if has_validation else "is of a split 'validation'"
            raise SweepError(
                f"a sweep measures its best trial on labelled validation images, and none at {manifest.url} {lacks} "
                f"(splits: {', '.join(manifest.splits)}); write shards with some, from a folder with `python -m "
                "jobs.write_shards folder:<images> <url> --validation-share 0.05 --hold-out selection=0.1`"
            )
        if self.config.searcher == "tpe":  # its trials are not known yet
            plain = self.base.model_dump(mode="json")
            space = self.config.space.items()
            candidates = [config for key, entry in space for config in _candidates(self, plain, key, entry)]
        else:
            candidates = [override(self.base, overrides(values)) for values in self.config.configurations(self.base)]
        for candidate in candidates:
            check_batch(candidate, manifest)
        sweep = self._replace(train_images=manifest.split("train").num_samples)
        once_an_epoch = min(self.base.train.diagnose_every_steps, sweep.steps_per_epoch(self.base))
        return sweep._replace(base=override(self.base, [f"train.diagnose_every_steps={once_an_epoch}"]))

    def steps_per_epoch(self, config: Config) -> int:
        """Of one of its runs."""
        assert self.train_images is not None, "for_data says how many images there are"
        return self.train_images // config.train.global_batch_size

    def trial_config(self, name: str, values: Values, seed: int) -> Config:
        """The pretraining config of one run; ``name`` keeps the runs of different sweeps apart."""
        config = override(self.base, [*overrides(values), f"name={name}", f"seed={seed}"])
        scheduler = self.config.scheduler
        if not isinstance(scheduler, Pbt):
            return config
        # Every checkpoint that another trial may begin with is written, and none is dropped before the end.
        steps = scheduler.every_epochs * self.steps_per_epoch(config)
        keep = config.train.epochs // scheduler.every_epochs + 1
        return override(config, [f"train.checkpoint_every_steps={steps}", f"train.keep_checkpoints={keep}"])

    def objection(self, values: Values, manifest: Manifest) -> str | None:
        """Why no run can have these values, in one line; None if one can. Ends of ranges are fine each by itself, and
        what TPE or PBT makes of them is known only when it is drawn."""
        try:
            config = override(self.base, overrides(values))
            check_batch(config, manifest)
            check_method(config)
        except UserError as error:
            first, *rest = str(error).splitlines()
            return "; ".join(line.removeprefix("  - ") for line in rest or [first])
        return None

    def perturbed(self, values: Values, random: np.random.Generator) -> Values:
        """What PBT makes of a good trial's values: ranges x 0.8 or x 1.2 or drawn anew, the rest as it is."""
        scheduler = self.config.scheduler
        assert isinstance(scheduler, Pbt), "only PBT perturbs"

        def choose(key: str, entry: Entry) -> float:
            if entry.bounds is None and key in values:
                return entry.listed.index(values[key]) if entry.listed is not None else 0.0
            if key not in values or random.random() < scheduler.resample:
                return entry.quantile(random.random())
            return entry.rounded(entry.coordinate(values[key]) * random.choice([0.8, 1.2]))

        return self.config.resolve(self.base.model_dump(mode="json"), choose)

    def config_of(self, run: RunResult) -> Config:
        """The config of a run that is known by its results."""
        return self.trial_config(run.run_id.rpartition("-")[0], run.values, run.seed)

    def seeds(self) -> list[int]:
        """The seed of each run of a trial."""
        return [self.base.seed + i for i in range(self.config.seeds)]

    def no_results(self, sweep_id: str) -> SweepResults:
        """What is known before the first trial."""
        selection = self.base.evaluate.selection
        assert selection is not None, "load_sweep gives the base one"
        return SweepResults(
            sweep_id=sweep_id, base=dump(self.base), epochs=self.base.train.epochs, keys=self.config.keys(),
            split=selection.split,
        )  # fmt: skip

    def flat(self) -> dict[str, str]:
        """Dotted key -> value as text, for MLflow: the sweep's own keys and the base's."""
        own = self.config.model_dump(mode="json", by_alias=True, exclude_defaults=True, exclude={"base", "set"})
        return {f"sweep.{key}": json.dumps(value) for key, value in own.items()} | self.base.flat()


def load_sweep(path: str | Path, arguments: list[str] | None = None) -> Sweep:
    """Read and check a sweep. An argument overrides the base as ``load_config`` takes it, or is ``sweep.key=value``.

    SweepError or ConfigError on anything wrong.
    """
    arguments = arguments or []
    values = {"name": Path(path).stem, **read_mapping(path, "configs/sweep", "'base: ...' and 'space: ...'")}
    for argument in arguments:
        if argument.startswith("sweep."):
            _set(values, argument)
    try:
        config = SweepConfig.model_validate(values)
    except ValidationError as error:
        raise SweepError(_explain(error, str(path))) from error
    files = [str(Path(path).parent / file) for file in config.base]
    of_base = [argument for argument in arguments if not argument.startswith("sweep.")]
    base = load_config(files[0], [*files[1:], *overrides(config.set), *of_base])
    forced = ["train.on_collapse=stop"] + ([] if base.evaluate.selection else ["evaluate.selection={}"])
    sweep = Sweep(config, override(base, forced))
    check(sweep)
    return sweep


def overrides(values: Mapping[str, JsonValue]) -> list[str]:
    """``key=value`` as the command line takes them."""
    return [f"{key}={_yaml(value)}" for key, value in values.items()]


def check(sweep: Sweep) -> None:
    """SweepError unless every value of the space makes a config that is valid and trains other weights."""
    config, base = sweep.config, sweep.base
    plain = base.model_dump(mode="json")
    check_method(base)
    _check_epochs(config, base)
    above: list[str] = []
    for key, entry in config.space.items():
        if key in ("name", "seed", "train.epochs"):
            raise SweepError(
                f"space.{key} cannot be searched: "
                + ("trials are compared at the same epoch" if key == "train.epochs" else "use seeds: <runs per trial>")
            )
        for other in [*entry.when, *([entry.with_key] if entry.with_key else [])]:
            searched = [upper for upper in config.space if f"{other}.".startswith(f"{upper}.")]
            if set(searched) - set(above) or (not searched and lookup(other, {}, plain) is MISSING):
                where = f"below it; list {other} first" if searched else "neither in the space nor in the base config"
                raise SweepError(f"space.{key} refers to {other}, which is {where}")
        _check_entry(sweep, plain, key, entry)
        above.append(key)
    if config.searcher != "tpe":
        for number, values in enumerate(config.configurations(base)):
            try:
                check_method(override(base, overrides(values)))
            except UserError as error:
                raise SweepError(f"trial t{number:03d} ({', '.join(overrides(values))}): {error}") from error


def _check_epochs(config: SweepConfig, base: Config) -> None:
    scheduler, epochs = config.scheduler, base.train.epochs
    if isinstance(scheduler, Asha) and scheduler.grace_epochs >= epochs:
        raise SweepError(
            f"scheduler.grace_epochs={scheduler.grace_epochs} leaves ASHA nothing to stop in train.epochs={epochs}; "
            "use fewer, more epochs, or scheduler: {name: none}"
        )
    if isinstance(scheduler, Pbt) and scheduler.every_epochs >= epochs:
        raise SweepError(
            f"scheduler.every_epochs={scheduler.every_epochs} leaves PBT nothing to perturb in train.epochs={epochs}; "
            "use fewer, or more epochs"
        )
    every = base.evaluate.selection.every_epochs if base.evaluate.selection else 1
    first = getattr(scheduler, "grace_epochs", getattr(scheduler, "every_epochs", every))
    if first % every:
        raise SweepError(
            f"evaluate.selection.every_epochs={every} gives scheduler.name={scheduler.name} no score at epoch {first}, "
            "where it decides first; use every_epochs=1"
        )


def _check_entry(sweep: Sweep, plain: Mapping[str, Any], key: str, entry: Entry) -> None:
    run_ids = set()
    try:
        for candidate in _candidates(sweep, plain, key, entry):
            check_method(candidate)
            run_ids.add(candidate.run_id(""))
    except UserError as error:
        raise SweepError(f"space.{key}: {error}") from error
    varied = len(entry.ends()) > 1
    if varied and len(run_ids) == 1:
        raise SweepError(
            f"space.{key}: different values of {key} train the same weights, so there is nothing to search; keys that "
            "do are those of model, method and optim, and of train the batch size, BatchNorm and precision"
        )


def _candidates(sweep: Sweep, plain: Mapping[str, Any], key: str, entry: Entry) -> Iterator[Config]:
    """The base under each probed value of one key, where the key applies."""
    conditions: Values = {}
    for other, wanted in entry.when.items():
        conditions |= _where(sweep.config, plain, other, wanted)
    for coordinate in entry.probes():
        for driver in _drivers(sweep.config, plain, entry):
            given = conditions if entry.with_key is None else {**conditions, entry.with_key: driver}
            value = entry.value(coordinate, driver, is_whole(key, given, plain))
            yield override(sweep.base, overrides({**given, key: value}))


def _where(config: SweepConfig, plain: Mapping[str, Any], other: str, wanted: JsonValue) -> Values:
    """Values under which ``other`` is as ``wanted``: of a listed key around it, if there is one."""
    for key, entry in config.space.items():
        for value in entry.listed or ():
            if other.startswith(f"{key}.") and matches(lookup(other, {key: value}, plain), wanted):
                return {key: value}
    return {other: wanted[0] if isinstance(wanted, list) else wanted}


def _drivers(config: SweepConfig, plain: Mapping[str, Any], entry: Entry) -> list[JsonValue]:
    """The values of the key that an entry is coupled to: the ends of its range, or what the base has."""
    if entry.with_key is None:
        return [None]
    other = config.space.get(entry.with_key)
    if other is None or other.with_key is not None:
        value = lookup(entry.with_key, {}, plain)
        return [] if value is MISSING else [value]
    return [other.value(coordinate) for coordinate in other.ends()]


def _yaml(value: JsonValue) -> str:
    return yaml.safe_dump(value, default_flow_style=True, width=math.inf).removesuffix("...\n").strip()


def _set(values: dict[str, Any], argument: str) -> None:
    """``sweep.trials=4``, ``sweep.scheduler.grace_epochs=2``. Another ``sweep.scheduler.name`` is another scheduler,
    without the keys of the one before."""
    key, separator, text = argument.removeprefix("sweep.").partition("=")
    if not separator or not key:
        raise SweepError(f"{argument!r} is not sweep.key=value; e.g. sweep.trials=8")
    section, _, rest = key.partition(".")
    try:
        value = parse_argument(text, key_type(SweepConfig, [section, rest] if rest else [section], values))
    except yaml.YAMLError as error:
        raise SweepError(f"{argument!r}: {text!r} is not a YAML value: {error}") from error
    before = _named(values[section]) if section == "scheduler" and section in values else values.get(section) or {}
    if not rest:
        values[section] = value
    elif not isinstance(before, dict):
        raise SweepError(f"{argument!r}: sweep.{section} is {before!r}, which has no key {rest!r}")
    elif key == "scheduler.name" and before.get("name") != value:
        values[section] = {"name": value}
    else:
        values[section] = {**before, rest: value}


def _named(scheduler: Any) -> Any:
    return {"name": scheduler} if isinstance(scheduler, str) else scheduler


def _explain(error: ValidationError, origin: str) -> str:
    lines = [f"{origin} is not a sweep:"]
    for problem in error.errors():
        path = ".".join(str(part) for part in problem["loc"])
        message = problem["msg"].removeprefix("Value error, ")
        if problem["type"] == "extra_forbidden":
            model = Entry if problem["loc"][0] == "space" else SweepConfig
            names = [field.alias or name for name, field in model.model_fields.items()]
            message = (
                f"no such key; keys here: {', '.join(names)}" if problem["loc"][0] != "scheduler" else "no such key"
            )
        lines.append(f"  - {path}: {message}" if path else f"  - {message}")
    return "\n".join(lines)

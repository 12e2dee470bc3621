"""The values that a searched key may take, and how a searcher's coordinate becomes one of them.

A coordinate is what a searcher moves in: an index into a list, a number, or 1 - the value of a decay, so that a uniform
draw, a Parzen estimator and a factor of 1.2 mean the same for each kind.
"""

import json
import math
from collections.abc import Mapping
from typing import Any, Self

from pydantic import ConfigDict, Field, JsonValue, model_validator

from pipeline.errors import UserError
from pipeline.section import Section
from pipeline.sweep.results import Scale

_KINDS = ("grid", "choice", "uniform", "log_uniform", "one_minus_log_uniform", "scale_one_minus")
_DIGITS = 4  # significant ones of a drawn number: enough to tell trials apart, few enough to read
_WITHIN = (1 / 3, 1 / 2, 0.7)  # shares of a range


class SweepError(UserError):
    """The sweep cannot run as written; the message names the key, the value, the rule and values that work."""


class Entry(Section):
    """The values that one key may take: exactly one of the kinds, and when it applies.

    ``scale_one_minus`` is for a decay m whose 1 - m is to grow with another key, usually the batch size (BYOL,
    arXiv:2006.07733): ``{scale_one_minus: 0.004, with: train.global_batch_size, at: 4096}`` is 1 - 0.004 * B / 4096.
    """

    model_config = ConfigDict(populate_by_name=True)

    grid: tuple[JsonValue, ...] | None = None  # values in order
    choice: tuple[JsonValue, ...] | None = None  # values without an order
    uniform: tuple[float, float] | None = None
    log_uniform: tuple[float, float] | None = None
    one_minus_log_uniform: tuple[float, float] | None = None  # 0.9 to 0.9999: 1 - value is log-uniform
    scale_one_minus: float | tuple[float, float] | None = None  # 1 - value at ``at``; a pair is searched, log-uniform
    with_key: str | None = Field(default=None, alias="with")
    at: float | None = Field(default=None, gt=0)
    when: dict[str, JsonValue] = Field(default_factory=dict)  # only where these keys have this value, or one of a list

    @model_validator(mode="after")
    def _is_one_kind(self) -> Self:
        kinds = [kind for kind in _KINDS if getattr(self, kind) is not None]
        if len(kinds) != 1:
            raise ValueError(f"{' and '.join(kinds) or 'nothing'} given; give exactly one of {', '.join(_KINDS)}")
        if self.listed is not None:
            texts = [json.dumps(value) for value in self.listed]
            if not texts or len(set(texts)) < len(texts):
                raise ValueError(f"{kinds[0]} needs one or more different values, not [{', '.join(texts)}]")
        elif self.bounds is not None:
            low, high = self.bounds
            if not low < high < math.inf:
                raise ValueError(
                    f"{kinds[0]}={list(self._pair)} is empty; the first of two numbers must be the smaller"
                )
            if self.is_log and low <= 0:
                rule = "both below 1" if self.one_minus_log_uniform else "both above 0"
                raise ValueError(f"{kinds[0]}={list(self._pair)} has no logarithm; it needs two numbers, {rule}")
        coupled = self.scale_one_minus is not None
        if coupled != (self.with_key is not None) or coupled != (self.at is not None):
            raise ValueError(
                "scale_one_minus, with and at belong together, e.g. {scale_one_minus: 0.004, with: "
                "train.global_batch_size, at: 4096}"
            )
        return self

    @property
    def listed(self) -> tuple[JsonValue, ...] | None:
        """The values of a grid or a choice."""
        return self.grid if self.grid is not None else self.choice

    @property
    def _pair(self) -> tuple[float, float]:
        pair = self.uniform or self.log_uniform or self.one_minus_log_uniform or self.scale_one_minus
        return pair if isinstance(pair, tuple) else (0.0, 0.0)

    @property
    def bounds(self) -> tuple[float, float] | None:
        """Between which coordinates it is searched; None for listed and fixed ones."""
        if self.one_minus_log_uniform is not None:
            low, high = self.one_minus_log_uniform
            return _rounded(1 - high), _rounded(1 - low)
        if self.listed is not None or isinstance(self.scale_one_minus, float):
            return None
        return self._pair

    @property
    def is_log(self) -> bool:
        """Whether the coordinate is searched by its logarithm."""
        return self.uniform is None and self.bounds is not None

    @property
    def scale(self) -> Scale:
        """Of a plot's axis."""
        if self.one_minus_log_uniform is not None or self.scale_one_minus is not None:
            return "one_minus_log"
        if self.log_uniform is not None:
            return "log"
        return "categories" if self.listed is not None else "linear"

    def quantile(self, share: float) -> float:
        """The coordinate below which ``share`` of the space lies, 0 <= share < 1."""
        if self.listed is not None:
            return int(share * len(self.listed))
        if self.bounds is None:
            return 0.0
        low, high = self.bounds
        return self.rounded(low * (high / low) ** share if self.is_log else low + (high - low) * share)

    def rounded(self, coordinate: float) -> float:
        """To few digits, within the range."""
        low, high = self.bounds or (coordinate, coordinate)
        return min(max(_rounded(coordinate), low), high)

    def ends(self) -> list[float]:
        """Every listed value, both ends of a range."""
        return [float(i) for i in range(len(self.listed))] if self.listed is not None else list(self.bounds or [0.0])

    def probes(self) -> list[float]:
        """The coordinates that are checked: the ends, and within a range some of which one is no integer."""
        return self.ends() + ([] if self.bounds is None else [self.quantile(share) for share in _WITHIN])

    def value(self, coordinate: float, driver: JsonValue = None, whole: bool = False) -> JsonValue:
        """What the key is set to at a coordinate: an index into a list, a number, or 1 - the value.

        ``driver``: what the key ``with`` has. ``whole``: the key counts something, and within a range from
        integer to integer a number is rounded to one. SweepError if the result is no decay.
        """
        if self.listed is not None:
            return self.listed[int(coordinate)]
        if self.scale_one_minus is None:
            if self.one_minus_log_uniform is not None:
                return round(1 - coordinate, 12)
            return round(coordinate) if whole and all(end.is_integer() for end in self._pair) else coordinate
        if isinstance(driver, bool) or not isinstance(driver, int | float):
            raise SweepError(f"with={self.with_key} must name a number, and it is {driver!r}")
        reference = self.scale_one_minus if isinstance(self.scale_one_minus, float) else coordinate
        scaled = reference * driver / (self.at or 1)
        if not 0 <= scaled <= 1:
            raise SweepError(
                f"scale_one_minus={reference:g} becomes {scaled:g} at {self.with_key}={driver}, and "
                f"1 - {scaled:g} is no decay; use a scale of at most {reference / scaled:.3g}"
            )
        return round(1 - scaled, 12)

    def coordinate(self, value: JsonValue) -> float:
        """The inverse of ``value``, for a range without coupling."""
        assert isinstance(value, int | float), f"{value!r} is of no range"
        return _rounded(1 - value) if self.one_minus_log_uniform is not None else float(value)


MISSING: Any = object()


def lookup(key: str, values: Mapping[str, Any], base: Mapping[str, Any]) -> Any:
    """What ``key`` is in a configuration: chosen, part of something chosen, or the base's; MISSING if nowhere."""
    parts = key.split(".")
    for cut in range(len(parts), 0, -1):
        if (chosen := ".".join(parts[:cut])) in values:
            return _descend(values[chosen], parts[cut:])
    return _descend(base, parts)


def is_whole(key: str, values: Mapping[str, Any], base: Mapping[str, Any]) -> bool:
    """Whether ``key`` counts something: a config dumps its float fields as floats."""
    return type(lookup(key, values, base)) is int


def _descend(node: Any, parts: list[str]) -> Any:
    for part in parts:
        if isinstance(node, Mapping) and part in node:
            node = node[part]
        elif isinstance(node, list | tuple) and part.isdecimal() and int(part) < len(node):
            node = node[int(part)]
        else:
            return MISSING
    return node


def matches(value: Any, wanted: JsonValue) -> bool:
    return value in wanted if isinstance(wanted, list) else value == wanted


def _rounded(number: float) -> float:
    return float(f"{number:.{_DIGITS}g}")

"""The pictures of a sweep as PNG bytes: a map over two keys, and parallel coordinates over all.

Axes are spaced as the space is searched: logs of a temperature, logs of 1 - value of an EMA decay, but their ticks are
the values themselves. cividis reads the same to every eye, and in grey.
"""

import io
import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from matplotlib import colormaps
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Normalize
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Rectangle
from matplotlib.ticker import MaxNLocator
from pydantic import JsonValue

from pipeline.errors import UserError
from pipeline.sweep.report import short_names, text_of, tied_with_best
from pipeline.sweep.results import Scale, SweepResults, TrialResult

_COLOURS = "cividis"
_DPI = 150  # 8 inches are 1200 px: sharp at the 830 px that a README has
_FAILED = ("collapsed", "diverged", "failed")
_MAX_GRID = 12  # values per axis that a grid is drawn for
_MARGIN = 0.08  # of an axis, on both sides of its points
_GREY, _EMPTY = "0.55", (0.93, 0.93, 0.93, 1.0)
_DOTTED, _DASHED = (0, (1, 1.2)), (0, (4, 3))


class PlotError(UserError):
    """The sweep has nothing that could be drawn this way."""


@dataclass(frozen=True)
class _Range:
    """From the lowest to the highest kNN of trials."""

    low: float
    high: float

    def share(self, knn: float) -> float:
        """0 at the lowest, 1 at the highest."""
        return (knn - self.low) / (self.high - self.low)

    def of(self, knn: float) -> tuple[float, float, float, float]:
        """RGBA in [0, 1]; what lies outside has the colour of the end."""
        return colormaps[_COLOURS](min(max(self.share(knn), 0.0), 1.0))


class KeyAxis:
    """Where the values of a searched key lie on an axis, and what its ticks say."""

    def __init__(self, key: str, name: str, scale: Scale, values: Sequence[JsonValue]) -> None:
        self.key, self.scale = key, scale
        self.label = {
            "log": f"{name} (log scale)",
            "one_minus_log": f"{name} (log scale of 1 - value)",
        }.get(scale, name)
        numbers = all(isinstance(value, int | float) and not isinstance(value, bool) for value in values)
        self._order = (
            None if numbers and scale != "categories" else sorted({text_of(v) for v in values}, key=_by_number)
        )
        self.values = sorted({self.place(value): value for value in values}.items())

    def place(self, value: JsonValue) -> float:
        """Where ``value`` lies."""
        if self._order is not None:
            return float(self._order.index(text_of(value)))
        assert isinstance(value, int | float)
        if self.scale == "log":
            return math.log10(value)
        return -math.log10(1 - value) if self.scale == "one_minus_log" else float(value)

    def ticks(self) -> list[tuple[float, str]]:
        """(place, text): every value if they are few and apart, else round ones around those tried."""
        every = [(place, text_of(value)) for place, value in self.values]
        low, high = every[0][0], every[-1][0]
        apart = all(b - a >= (high - low) / _MAX_GRID for (a, _), (b, _) in itertools.pairwise(every))
        if self._order is not None or apart:
            return every
        low, high = low - _MARGIN * (high - low), high + _MARGIN * (high - low)
        if self.scale == "linear":
            return _round_ticks(low, high)
        sign = -1 if self.scale == "one_minus_log" else 1
        decades = range(math.floor(min(sign * low, sign * high)) - 1, math.ceil(max(sign * low, sign * high)) + 1)
        numbers = [m * 10.0**decade for decade in decades for m in (1, 2, 5)]
        values = [number if sign > 0 else round(1 - number, 12) for number in numbers if sign > 0 or number < 1]
        found = sorted((self.place(value), text_of(value)) for value in values if low <= self.place(value) <= high)
        return found if len(found) > 1 else [every[0], every[-1]]


def heat_map(results: SweepResults, x_key: str, y_key: str) -> bytes:
    """Mean kNN over two searched keys: cells if the trials form a grid, points if they don't.

    Where several trials share a place because of other keys, the best is shown. PlotError without a score.
    """
    x, y = _axes(results, x_key, y_key)
    trials = [trial for trial in results.trials() if x_key in trial.values and y_key in trial.values]
    places: dict[tuple[float, float], TrialResult] = {}
    for trial in trials:  # the best comes first
        places.setdefault((x.place(trial.values[x_key]), y.place(trial.values[y_key])), trial)
    colour = _colour_range(list(places.values()))
    columns, rows = len(x.values), len(y.values)
    is_grid = max(columns, rows) <= _MAX_GRID and len(places) >= 0.5 * columns * rows

    figure = Figure(figsize=(8, 5), layout="constrained")
    axes = figure.add_subplot()
    draw = _draw_cells if is_grid else _draw_points
    draw(axes, x, y, places, colour, tied_with_best(results))
    _label(axes, x, y)
    shown = [trial.knn for trial in places.values() if trial.knn is not None and trial.status not in _FAILED]
    below = "min" if min(shown) < colour.low else "neither"
    mappable = ScalarMappable(Normalize(colour.low, colour.high), _COLOURS)
    bar = figure.colorbar(mappable, ax=axes, format=lambda value, _: f"{100 * value:.3g}%", pad=0.02, extend=below)
    bar.set_label(_score_label(results), fontsize=11)
    _legend(figure, list(places.values()), results, "cells" if is_grid else "points")
    return _png(figure)


def parallel_coordinates(results: SweepResults) -> bytes:
    """A line per trial across an axis per searched key, coloured by its mean kNN, which is the last axis.

    A line passes by the axes of keys that the trial does not have. PlotError without a score.
    """
    trials = results.trials()
    colour, heights_of = _colour_range(trials), _range(trials)
    axes_of = _axes(results, *(key.key for key in results.keys if any(key.key in trial.values for trial in trials)))
    figure = Figure(figsize=(max(8.0, 1.7 * (len(axes_of) + 1)), 4.6), layout="constrained")
    axes = figure.add_subplot()
    last = len(axes_of)
    for trial in reversed(trials):  # the best is drawn last, over the others
        places, heights = _line(trial, axes_of)
        if trial.status in _FAILED or trial.knn is None:
            axes.plot(places, heights, color=_GREY, linewidth=1.2, linestyle=_DASHED)
            axes.plot(places[-1], heights[-1], "x", color="0.25", markersize=7, markeredgewidth=1.8)
            continue
        places, heights = [*places, last], [*heights, heights_of.share(trial.knn)]
        style = _DOTTED if trial.status != "finished" else "-"
        axes.plot(places, heights, color=colour.of(trial.knn), linewidth=2.2, linestyle=style)
        if trial == results.best():
            axes.plot(places, heights, color="black", linewidth=5, zorder=1.9)
    percents = _round_ticks(100 * heights_of.low, 100 * heights_of.high)
    score_ticks = [(heights_of.share(percent / 100), f"{text}%") for percent, text in percents]
    for place, ticks in enumerate([*([(_at(a, p), t) for p, t in a.ticks()] for a in axes_of), score_ticks]):
        axes.axvline(place, color="0.2", linewidth=1, zorder=1)
        for height, text in ticks:
            axes.plot([place - 0.012, place + 0.012], [height] * 2, color="0.2", linewidth=1)
            axes.annotate(
                text, (place, height), (6, 0), textcoords="offset points", va="center", fontsize=9, zorder=5,
                bbox={"boxstyle": "round,pad=0.12", "facecolor": "white", "edgecolor": "none", "alpha": 0.8},
            )  # fmt: skip
    labels = [*(axis.label.replace(" (", "\n(") for axis in axes_of), _score_label(results).replace(" on", "\non")]
    axes.set_xticks(range(last + 1), labels)
    axes.set_yticks([])
    axes.set_ylim(-1.2 * _MARGIN, 1 + 1.2 * _MARGIN)
    axes.set_xlim(-0.1, last + 0.35)
    axes.tick_params(axis="x", length=0, pad=8)
    for spine in axes.spines.values():
        spine.set_visible(False)
    _legend(figure, trials, results, "lines")
    return _png(figure)


def _axes(results: SweepResults, *keys: str) -> list[KeyAxis]:
    scales = {key.key: key.scale for key in results.keys}
    names = short_names(list(scales))
    axes = []
    for key in keys:
        values = [run.values[key] for run in results.runs if key in run.values]
        if key not in scales or not values:
            raise PlotError(f"the sweep did not search {key!r}; keys with values: {', '.join(scales)}")
        axes.append(KeyAxis(key, names[key], scales[key], values))
    return axes


def _line(trial: TrialResult, axes_of: Sequence[KeyAxis]) -> tuple[list[int], list[float]]:
    """Which axes a trial meets, and where."""
    met = [(place, axis) for place, axis in enumerate(axes_of) if axis.key in trial.values]
    return [place for place, _ in met], [_at(axis, axis.place(trial.values[axis.key])) for _, axis in met]


def _range(trials: Sequence[TrialResult]) -> _Range:
    scores = [trial.knn for trial in trials if trial.knn is not None and trial.status not in _FAILED]
    if not scores:
        raise PlotError("not one trial has a score that could be drawn; see why in the table")
    margin = 0.0 if max(scores) > min(scores) else 0.005
    return _Range(min(scores) - margin, max(scores) + margin)


def _colour_range(trials: Sequence[TrialResult]) -> _Range:
    """Of the finished: the early scores of the stopped would take most of the colours, and compare with none."""
    finished = [trial for trial in trials if trial.status == "finished"]
    return _range(finished if len(finished) > 1 else trials)


def _draw_cells(
    axes: Axes, x: KeyAxis, y: KeyAxis, places: dict[tuple[float, float], TrialResult], colour: _Range, tied: list[str]
) -> None:
    x_edges, y_edges = _edges([p for p, _ in x.values]), _edges([p for p, _ in y.values])
    columns, rows = ({place: i for i, (place, _) in enumerate(axis.values)} for axis in (x, y))
    size = next(points for count, points in ((6, 11), (9, 8.5), (_MAX_GRID, 7)) if len(columns) <= count)
    for (place_x, place_y), trial in places.items():
        left, right = x_edges[columns[place_x] :][:2]
        bottom, top = y_edges[rows[place_y] :][:2]
        corner, width, height = (left, bottom), right - left, top - bottom
        failed = trial.status in _FAILED or trial.knn is None
        fill = _EMPTY if trial.knn is None or failed else colour.of(trial.knn)
        cell = Rectangle(corner, width, height, facecolor=fill, edgecolor="white", linewidth=1.5)
        if trial.status != "finished":
            cell.set(hatch="xx" if failed else "//", edgecolor="0.75" if failed else "white")
        axes.add_patch(cell)
        early = "" if failed or trial.status == "finished" else f"\nepoch {trial.epoch}"
        text = trial.status if failed else f"{trial.knn:.1%}{early}"
        axes.text(
            left + width / 2, bottom + height / 2, text, ha="center", va="center", fontsize=size,
            color="white" if _luminance(fill) < 0.45 else "black",
            fontweight="bold" if trial.trial in tied[:1] else "normal",
            bbox=None if trial.status == "finished" else {"facecolor": fill, "edgecolor": "none", "pad": 1.5},
        )  # fmt: skip
        if trial.trial in tied:
            border = 3.0 if trial.trial == tied[0] else 1.2
            inset = Rectangle(corner, width, height, fill=False, edgecolor="black", linewidth=border, zorder=2 + border)
            axes.add_patch(inset)
    axes.set_xlim(x_edges[0], x_edges[-1])
    axes.set_ylim(y_edges[0], y_edges[-1])


def _draw_points(
    axes: Axes, x: KeyAxis, y: KeyAxis, places: dict[tuple[float, float], TrialResult], colour: _Range, tied: list[str]
) -> None:
    for place, trial in reversed(places.items()):  # the best over the others
        if trial.status in _FAILED or trial.knn is None:
            axes.plot(*place, "x", color="0.25", markersize=9, markeredgewidth=2.2)
            continue
        marker = "o" if trial.status == "finished" else "s"
        edge, width = ("black", 3.0 if trial.trial == tied[0] else 1.6) if trial.trial in tied else (_GREY, 0.8)
        axes.scatter(*place, s=170, marker=marker, color=[colour.of(trial.knn)], edgecolors=edge, linewidths=width)
    axes.grid(color="0.9")
    axes.set_axisbelow(True)
    axes.margins(_MARGIN)


def _label(axes: Axes, x: KeyAxis, y: KeyAxis) -> None:
    for axis, set_ticks in ((x, axes.set_xticks), (y, axes.set_yticks)):
        ticks = axis.ticks()
        set_ticks([place for place, _ in ticks], [text for _, text in ticks])
    axes.set_xlabel(x.label, fontsize=11)
    axes.set_ylabel(y.label, fontsize=11)
    axes.tick_params(labelsize=10)


def _score_label(results: SweepResults) -> str:
    seeds = max(len(trial.runs) for trial in results.trials())
    return f"kNN accuracy on {results.split!r}" + (f", mean of {seeds} seeds" if seeds > 1 else "")


def _legend(
    figure: Figure, trials: Sequence[TrialResult], results: SweepResults, kind: Literal["cells", "points", "lines"]
) -> None:
    """Only what is there to be explained."""
    statuses = {trial.status for trial in trials}
    tied = tied_with_best(results)
    explained = {
        "best": bool(tied),
        "tied with it": len(tied) > 1 and kind != "lines",
        f"stopped before epoch {results.epochs}": bool(statuses & {"stopped", "running"}),
        " or ".join(status for status in _FAILED if status in statuses): bool(statuses & {*_FAILED}),
    }
    cell: dict[str, Any] = {"xy": (0, 0), "width": 1, "height": 1}
    dot: dict[str, Any] = {"xdata": [], "ydata": [], "linestyle": "none", "markerfacecolor": "0.85", "markersize": 10}
    line: dict[str, Any] = {"xdata": [], "ydata": [], "color": _GREY, "linewidth": 2.2}
    handles: dict[str, list[Artist]] = {
        "cells": [
            Rectangle(**cell, fill=False, edgecolor="black", linewidth=3),
            Rectangle(**cell, fill=False, edgecolor="black", linewidth=1.2),
            Rectangle(**cell, facecolor=_GREY, edgecolor="white", hatch="//"),
            Rectangle(**cell, facecolor=_EMPTY, edgecolor="0.75", hatch="xx"),
        ],
        "points": [
            Line2D(**dot, marker="o", markeredgecolor="black", markeredgewidth=3),
            Line2D(**dot, marker="o", markeredgecolor="black", markeredgewidth=1.6),
            Line2D(**dot, marker="s", markeredgecolor=_GREY),
            Line2D(**dot, marker="x", markeredgecolor="0.25", markeredgewidth=2),
        ],
        "lines": [
            Line2D(**{**line, "color": "black", "linewidth": 4.5}),
            Line2D(**line),
            Line2D(**line, linestyle=_DOTTED),
            Line2D(**{**line, "linewidth": 1.2}, linestyle=_DASHED, marker="x", markeredgecolor="0.25"),
        ],
    }
    rows = zip(handles[kind], explained.items(), strict=True)
    shown = [(handle, text) for handle, (text, is_there) in rows if is_there]
    figure.legend(
        [handle for handle, _ in shown], [text for _, text in shown],
        loc="outside upper center", ncols=4, frameon=False, fontsize=10,
    )  # fmt: skip


def _edges(places: list[float]) -> list[float]:
    """(n + 1) edges of n cells, half-way between neighbours."""
    if len(places) == 1:
        return [places[0] - 0.5, places[0] + 0.5]
    middles = [(a + b) / 2 for a, b in itertools.pairwise(places)]
    return [2 * places[0] - middles[0], *middles, 2 * places[-1] - middles[-1]]


def _at(axis: KeyAxis, place: float) -> float:
    """A place as a share of the axis."""
    low, high = axis.values[0][0], axis.values[-1][0]
    return 0.5 if high == low else (place - low) / (high - low)


def _round_ticks(low: float, high: float) -> list[tuple[float, str]]:
    """(number, text) of about five round numbers from ``low`` to ``high``."""
    numbers = map(float, MaxNLocator(5, steps=[1, 2, 2.5, 5, 10]).tick_values(low, high))
    return [(number, f"{number:.4g}") for number in numbers if low <= number <= high]


def _by_number(text: str) -> tuple[float, str]:
    """Numbers in their order, then words."""
    try:
        return float(text), text
    except ValueError:
        return math.inf, text


def _luminance(rgba: tuple[float, float, float, float]) -> float:
    red, green, blue, _ = rgba
    return 0.299 * red + 0.587 * green + 0.114 * blue


def _png(figure: Figure) -> bytes:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=_DPI)
    return buffer.getvalue()

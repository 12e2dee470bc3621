"""The pictures: cells have the colours of their scores, axes are spaced as searched, what cannot be drawn is said."""

import cv2
import numpy as np
import pytest
from matplotlib import colormaps
from numpy.typing import NDArray

from pipeline.sweep.plots import KeyAxis, PlotError, heat_map, parallel_coordinates
from pipeline.sweep.results import RunResult
from tests.sweep.sweeps import DECAY, TEMPERATURE, one_run, sweep

TEMPERATURES, DECAYS = (0.05, 0.1, 0.2), (0.9, 0.99)
KEYS = {TEMPERATURE: "log", DECAY: "one_minus_log"}


def grid() -> list[RunResult]:
    """80 to 84 % and one that failed with the highest score of all."""
    places = [(t, m) for m in DECAYS for t in TEMPERATURES]
    runs = [one_run(i, {TEMPERATURE: t, DECAY: m}, 0.80 + 0.01 * i) for i, (t, m) in enumerate(places)]
    return [*runs[:5], runs[5].model_copy(update={"status": "diverged"})]


def pixels(png: bytes) -> NDArray[np.uint8]:
    """(H, W, 3) RGB."""
    image = cv2.imdecode(np.frombuffer(png, np.uint8), cv2.IMREAD_COLOR)
    assert image is not None
    return image[..., ::-1]


def count(image: NDArray[np.uint8], share: float) -> int:
    """Pixels of the colour at ``share`` of the map; to 1 of 255."""
    colour = np.array(colormaps["cividis"](share)[:3]) * 255
    return int((np.abs(image - colour) < 1).all(axis=-1).sum())


def test_each_cell_of_a_grid_has_the_colour_of_its_score() -> None:
    image = pixels(heat_map(sweep(grid(), KEYS), TEMPERATURE, DECAY))
    assert image.shape == (750, 1200, 3)
    cell = 1200 * 750 // 12
    areas = [count(image, share) for share in (0.0, 0.25, 0.5, 0.75, 1.0)]
    assert min(areas) > 0.5 * cell, areas
    assert count(image, 0.875) < 0.1 * cell, "the failed one, whose score is the highest, has none"


def test_scattered_trials_become_points() -> None:
    random = np.random.default_rng(0)
    runs = [
        one_run(i, {TEMPERATURE: float(t), DECAY: 1 - 10 ** float(m)}, 0.8 + 0.01 * i)
        for i, (t, m) in enumerate(zip(10 ** random.uniform(-1, 0, 12), random.uniform(-4, -1, 12), strict=True))
    ]
    image = pixels(heat_map(sweep(runs, KEYS), TEMPERATURE, DECAY))
    assert 200 < count(image, 5 / 11) < 2000, "a dot"


def test_what_was_stopped_takes_no_colours_from_what_finished() -> None:
    stopped = [run.model_copy(update={"status": "stopped", "scores": run.scores[:1]}) for run in grid()[:2]]
    image = pixels(heat_map(sweep([*stopped, *grid()[2:]], KEYS), TEMPERATURE, DECAY))
    assert all(count(image, share) > 20_000 for share in (0.5, 1.0)), "82, 83, 84 % span the map"


def test_parallel_coordinates_draw_every_trial_in_its_colour() -> None:
    image = pixels(parallel_coordinates(sweep(grid(), {**KEYS})))
    assert image.shape[1] == 1200
    assert all(count(image, share) > 500 for share in (0.0, 0.25, 0.5, 0.75, 1.0))


def test_trials_without_some_keys_are_drawn_past_their_axes() -> None:
    only_one = one_run(6, {TEMPERATURE: 0.1}, 0.86)
    image = pixels(parallel_coordinates(sweep([*grid(), only_one], {**KEYS, "optim.lr": "log"})))
    assert count(image, 1.0) > 500


@pytest.mark.parametrize("epochs", [1, 9])
def test_one_trial_can_be_drawn(epochs: int) -> None:
    results = sweep([one_run(0, {TEMPERATURE: 0.1, DECAY: 0.99}, 0.5, epochs=epochs, status="running")], KEYS)
    assert pixels(heat_map(results, TEMPERATURE, DECAY)).std() > 0
    assert pixels(parallel_coordinates(results)).std() > 0


@pytest.mark.parametrize(
    ("scale", "values", "ticks"),
    [
        ("categories", ["sgd", "lars", "sgd"], ["lars", "sgd"]),
        ("categories", [256, 1024, 64], ["64", "256", "1024"]),
        ("categories", [True, False], ["false", "true"]),
        ("log", [0.1, 0.4, 0.2], ["0.1", "0.2", "0.4"]),
        ("log", [0.051, 0.052, 0.3, 0.95], ["0.05", "0.1", "0.2", "0.5", "1"]),
        ("log", [0.11, 0.12, 0.1205, 0.13], ["0.11", "0.13"]),
        ("one_minus_log", [0.999, 0.9, 0.99], ["0.9", "0.99", "0.999"]),
        ("one_minus_log", [0.9, 0.9001, 0.99], ["0.9", "0.95", "0.98", "0.99"]),
        ("linear", [0.0, 0.01, 0.33, 1.0], ["0", "0.25", "0.5", "0.75", "1"]),
    ],
)
def test_ticks_are_values_in_their_order(scale: str, values: list[object], ticks: list[str]) -> None:
    axis = KeyAxis("a.b", "b", scale, values)  # type: ignore[arg-type]
    assert [text for _, text in axis.ticks()] == ticks
    places = [place for place, _ in axis.ticks()]
    assert places == sorted(places)


def test_logs_space_the_axes() -> None:
    temperature = KeyAxis(TEMPERATURE, "temperature", "log", [0.1, 0.2, 0.4])
    assert temperature.place(0.4) - temperature.place(0.2) == pytest.approx(
        temperature.place(0.2) - temperature.place(0.1)
    )
    decay = KeyAxis(DECAY, "ema_decay", "one_minus_log", [0.9, 0.99, 0.999])
    assert decay.place(0.999) - decay.place(0.99) == pytest.approx(decay.place(0.99) - decay.place(0.9))


def test_what_cannot_be_drawn_is_said() -> None:
    with pytest.raises(PlotError, match=r"did not search 'optim\.lr'; .* method\.temperature, method\.ema_decay"):
        heat_map(sweep(grid(), KEYS), TEMPERATURE, "optim.lr")
    failed = sweep([run.model_copy(update={"status": "failed"}) for run in grid()], KEYS)
    with pytest.raises(PlotError, match="not one trial has a score"):
        heat_map(failed, TEMPERATURE, DECAY)
    with pytest.raises(PlotError, match="not one trial has a score"):
        parallel_coordinates(failed)

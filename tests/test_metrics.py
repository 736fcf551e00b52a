"""Metrics give the numbers that one gets by hand, and intervals hold what they promise."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from vitviz.evaluation.metrics import (
    Bootstrap,
    Interval,
    area_under,
    average_precision,
    best_miou,
    bootstrap,
    energy_inside,
    pointing_game,
    rank_correlation,
    specificity,
)

# Hottest to coldest: on, off, on, off.
MAP = np.array([[4.0, 3.0], [2.0, 1.0]])
MASK = np.array([[True, False], [True, False]])

maps = st.tuples(st.integers(0, 2**32 - 1), st.integers(2, 9), st.integers(2, 9))


def drawn(case: tuple[int, int, int]) -> tuple[NDArray[np.float64], NDArray[np.bool_]]:
    """Draw a map with ties and a mask with both kinds of pixels."""
    seed, rows, cols = case
    generator = np.random.default_rng(seed)
    mask = generator.random((rows, cols)) < 0.4
    mask.flat[:2] = (True, False)
    return generator.integers(-3, 4, (rows, cols)).astype(float), mask


# Ranks


@pytest.mark.parametrize(
    ("one", "other", "expected"),
    [
        ([[1.0, 2], [3, 4]], [[-9.0, 0], [0.5, 7]], 1.0),
        ([[1.0, 2], [3, 4]], [[4.0, 3], [2, 1]], -1.0),
        # Ranks 1 2 3 4 5 and 2 1 4 3 5: 1 - 6 * 4 / (5 * 24).
        ([[1.0, 2, 3, 4, 5]], [[20.0, 10, 40, 30, 50]], 0.8),
        # Ranks 1.5 1.5 3 4 and 1 2 3 4: 4.5 / sqrt(4.5 * 5).
        ([[7.0, 7, 8, 9]], [[1.0, 2, 3, 4]], 4.5 / np.sqrt(22.5)),
    ],
)
def test_rank_correlation_is_the_hand_made_number(
    one: list[list[float]], other: list[list[float]], expected: float
) -> None:
    assert rank_correlation(np.array(one), np.array(other)) == pytest.approx(expected)
    assert rank_correlation(np.array(other), np.array(one)) == pytest.approx(expected)


def test_constant_map_has_no_rank_correlation() -> None:
    assert np.isnan(rank_correlation(np.ones((2, 2)), MAP))


@given(case=maps)
def test_rank_correlation_looks_at_the_order_alone(case: tuple[int, int, int]) -> None:
    one, mask = drawn(case)
    other = one + mask
    expected = rank_correlation(one, other)
    for changed in (np.exp(other), 3 * other - 8):
        np.testing.assert_allclose(rank_correlation(one, changed), expected)


# Areas


@pytest.mark.parametrize(
    ("curve", "shares", "area"),
    [
        ([1.0, 0.0], [0.0, 1.0], 0.5),
        ([0.3, 0.3, 0.3], [0.1, 0.5, 0.9], 0.24),
        ([1.0, 0.5, 0.25], [0.0, 0.1, 0.5], 0.075 + 0.15),
        # hits of ViT-B/16 at 0, 10, ... 90 % removed: 0.1 * (sum - (first + last) / 2)
        ([0.8, 0.7, 0.6, 0.5, 0.4, 0.3, 0.2, 0.1, 0.1, 0.0], np.arange(10) / 10, 0.33),
    ],
)
def test_area_of_a_hand_made_curve_is_the_hand_made_number(
    curve: list[float], shares: list[float], area: float
) -> None:
    assert area_under(curve, shares) == pytest.approx(area)


def test_areas_of_many_curves_at_once_are_those_of_each() -> None:
    curves = np.random.default_rng(0).random((3, 2, 5))
    shares = np.array([0.0, 0.2, 0.3, 0.7, 1.0])
    areas = area_under(curves, shares)
    assert areas.shape == (3, 2)
    for index in np.ndindex(3, 2):
        assert areas[index] == pytest.approx(float(area_under(curves[index], shares)))


# Localisation


def test_metrics_of_a_hand_made_map_are_the_hand_made_numbers() -> None:
    assert pointing_game(MAP, MASK) == 1
    assert energy_inside(MAP, MASK) == pytest.approx(6 / 10)
    assert average_precision(MAP, MASK) == pytest.approx((1 / 1 + 2 / 3) / 2)
    # at 4: object 1/2, background 2/3
    assert best_miou(MAP, MASK) == pytest.approx((1 / 2 + 2 / 3) / 2)


def test_mask_as_a_map_is_perfect() -> None:
    found = MASK.astype(float)
    assert pointing_game(found, MASK) == energy_inside(found, MASK) == 1
    assert average_precision(found, MASK) == best_miou(found, MASK) == 1


def test_the_opposite_of_the_mask_is_as_bad_as_can_be() -> None:
    found = 1 - MASK.astype(float)
    assert pointing_game(found, MASK) == energy_inside(found, MASK) == 0
    assert average_precision(found, MASK) == 0.5  # the share of the object, all pixels taken
    assert best_miou(found, MASK) == 0.25  # nothing predicted, or all: one IoU is ½, the other 0


@given(maps)
def test_constant_map_scores_the_object_s_share_of_the_area(case: tuple[int, int, int]) -> None:
    _, mask = drawn(case)
    for level in (0.0, 5.0, -1.0):
        flat = np.full(mask.shape, level)
        for metric in (pointing_game, energy_inside, average_precision):
            assert metric(flat, mask) == pytest.approx(mask.mean())


@given(maps)
def test_order_metrics_do_not_depend_on_the_scale(case: tuple[int, int, int]) -> None:
    found, mask = drawn(case)
    for metric in (pointing_game, average_precision, best_miou):
        assert metric(np.exp(found) * 7 - 2, mask) == pytest.approx(metric(found, mask))


@given(maps)
def test_average_precision_is_what_its_definition_says(case: tuple[int, int, int]) -> None:
    found, mask = drawn(case)
    total, recall = 0.0, 0.0
    for level in sorted(set(found.flat), reverse=True):
        picked = found >= level
        right = (picked & mask).sum()
        total += (right / mask.sum() - recall) * right / picked.sum()
        recall = right / mask.sum()
    assert average_precision(found, mask) == pytest.approx(total)


@given(maps)
def test_best_miou_is_what_trying_every_threshold_gives(case: tuple[int, int, int]) -> None:
    found, mask = drawn(case)

    def iou(one: NDArray[np.bool_], other: NDArray[np.bool_]) -> float:
        either = (one | other).sum()
        return float((one & other).sum() / either) if either else 1.0

    levels = [*set(found.flat), np.inf]
    tried = [(iou(found >= t, mask) + iou(found < t, ~mask)) / 2 for t in levels]
    assert best_miou(found, mask) == pytest.approx(max(tried))


@given(maps)
def test_energy_counts_what_is_positive_only(case: tuple[int, int, int]) -> None:
    found, mask = drawn(case)
    found.flat[0] = 1.0
    positive = np.where(found > 0, found, 0)
    assert energy_inside(found, mask) == pytest.approx(positive[mask].sum() / positive.sum())


def test_white_noise_scores_the_object_s_share_of_the_area() -> None:
    generator = np.random.default_rng(1)
    mask = np.zeros((64, 64), dtype=bool)
    mask[10:40, 20:50] = True
    found = [generator.random(mask.shape) for _ in range(400)]
    for metric, within in ((energy_inside, 0.005), (average_precision, 0.01), (pointing_game, 0.1)):
        scores = [metric(each, mask) for each in found]
        assert np.mean(scores) == pytest.approx(mask.mean(), abs=within), metric


def test_specificity_is_the_share_among_the_objects() -> None:
    found = np.array([[3.0, 1.0, 9.0], [-5.0, 0.0, 2.0]])
    asked = np.array([[True, False, False], [True, False, False]])
    objects = np.array([[True, True, False], [True, True, False]])
    assert specificity(found, asked, objects) == pytest.approx(3 / 4)
    assert specificity(-np.ones((2, 3)), asked, objects) == pytest.approx(1 / 2)


# Intervals


@pytest.mark.slow
@pytest.mark.parametrize("samples", [150, pytest.param(400, marks=pytest.mark.long)])
def test_interval_covers_the_true_mean_as_often_as_it_says(samples: int) -> None:
    generator = np.random.default_rng(2)
    covered = []
    for number in range(samples):
        sample = generator.beta(1, 4, size=(60, 1))  # skewed and between 0 and 1, as scores are
        interval = bootstrap(sample, range(60), resamples=400, seed=number).interval(0)
        covered.append(interval.low <= 1 / 5 <= interval.high)
    assert 0.90 <= np.mean(covered) <= 0.99


@pytest.mark.slow
@pytest.mark.parametrize("samples", [120, pytest.param(300, marks=pytest.mark.long)])
def test_interval_of_several_cases_an_image_covers_as_often_as_it_says(samples: int) -> None:
    """Cases of one image are nearly copies: taken for images, intervals would be half as wide."""
    generator = np.random.default_rng(3)
    covered, covered_if_apart = [], []
    for number in range(samples):
        image = np.repeat(np.arange(40), 4)
        sample = generator.normal(size=40)[image, None] + 0.1 * generator.normal(size=(160, 1))
        together = bootstrap(sample, image, resamples=300, seed=number).interval(0)
        apart = bootstrap(sample, range(160), resamples=300, seed=number).interval(0)
        covered.append(together.low <= 0 <= together.high)
        covered_if_apart.append(apart.low <= 0 <= apart.high)
    assert 0.90 <= np.mean(covered) <= 0.99
    assert np.mean(covered_if_apart) < 0.8


def test_difference_is_paired() -> None:
    """Images differ much, methods little: only on the same images does the difference show."""
    generator = np.random.default_rng(4)
    images = generator.normal(size=(50, 1)) + np.array([[0.0, 0.1]])
    images += 0.05 * generator.normal(size=images.shape)
    drawn = bootstrap(images, range(50), seed=0)
    difference = drawn.difference(1, 0)
    assert difference.mean == pytest.approx(drawn.means[1] - drawn.means[0])
    assert 0 < difference.low < difference.mean < difference.high
    assert drawn.interval(0).high > drawn.interval(1).low  # apart, they overlap


def test_difference_to_itself_is_nothing() -> None:
    drawn = bootstrap(np.random.default_rng(5).random((20, 2)), range(20))
    difference = drawn.difference(1, 1)
    assert (difference.mean, difference.low, difference.high) == (0, 0, 0)


def test_values_that_are_missing_do_not_count() -> None:
    drawn = bootstrap([[1.0, np.nan], [3.0, 5.0], [2.0, 7.0]], range(3))
    assert drawn.means.tolist() == [2, 6]
    both = drawn.interval(1)
    assert both.low == 5
    assert both.high == 7


def test_column_that_one_image_has_is_without_interval() -> None:
    drawn = bootstrap([[1.0, 4.0], [3.0, np.nan]], [0, 1])
    assert np.isfinite(drawn.interval(0).low)
    assert drawn.interval(1).mean == 4
    assert np.isnan(drawn.interval(1).low)


def test_nothing_has_no_mean() -> None:
    assert np.isnan(bootstrap(np.zeros((0, 1)), []).interval(0).mean)


def test_one_image_has_a_mean_and_no_interval() -> None:
    interval = bootstrap([[1.0], [3.0]], [7, 7]).interval(0)
    assert interval.mean == 2
    assert np.isnan([interval.low, interval.high]).all()


@settings(max_examples=20)
@given(st.integers(0, 1000))
def test_seed_decides_the_interval(seed: int) -> None:
    sample = np.random.default_rng(6).random((12, 1))
    first, again, other = (
        bootstrap(sample, range(12), resamples=50, seed=each).interval(0)
        for each in (seed, seed, seed + 1)
    )
    assert first == again
    assert (first.low, first.high) != (other.low, other.high)


@pytest.mark.slow
def test_interval_is_the_middle_95_per_cent_of_the_replicates() -> None:
    drawn = Bootstrap(means=np.array([3.0]), replicates=np.arange(1001.0)[None])
    assert drawn.interval((0,)) == Interval(mean=3, low=pytest.approx(25), high=pytest.approx(975))


def test_each_resample_draws_as_many_images_as_there_are() -> None:
    means = bootstrap([[0.0], [1.0]], [0, 1], resamples=2000).replicates[0]
    counts = [np.count_nonzero(means == value) for value in (0, 0.5, 1)]
    assert sum(counts) == 2000
    assert counts == pytest.approx([500, 1000, 500], rel=0.15)


def test_object_that_fills_the_image_is_found_in_full() -> None:
    everywhere = np.ones((3, 4), bool)
    assert best_miou(np.arange(12.0).reshape(3, 4), everywhere) == 1

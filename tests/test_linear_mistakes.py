"""Mistakes that relevance and evidence could have made, each planted to see it caught.

A mistake is caught when the package's maps are further from the mistaken reference than the
tolerance under which they equal the right one (test_mathematics).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest

from comparison import (
    CLASSIC,
    EVIDENCE,
    RELEVANCE,
    SHARED_EVIDENCE,
    TOLERANCE,
    LinearSetting,
    distance,
    found,
    linear_by_hand,
)
from linear_oracles import SHARED as SHARED_RULES
from linear_oracles import STEPS, ImageTrace, Rules, contribution, speaking
from linear_oracles import VALUE as VALUE_RULES
from oracles import Array, class_token
from tiny import CASES, TinyCase

pytestmark = pytest.mark.usefixtures("one_thread")
BY_NAME = {str(case): case for case in CASES}
PLAIN, AVERAGED = BY_NAME["class-token"], BY_NAME["average-beside-class-token"]
Mistaken = Callable[[], Array]


def _constant(x):  # type: ignore[no-untyped-def]
    return x.detach()


def _variable(x):  # type: ignore[no-untyped-def]
    return x


def _rules(setting: LinearSetting, **wrong: object) -> tuple[LinearSetting, Mistaken]:
    right = SHARED_RULES if setting is SHARED_EVIDENCE else VALUE_RULES
    rules: Rules = replace(right, **wrong)  # type: ignore[arg-type]
    return setting, lambda: linear_by_hand(PLAIN, setting, rules=rules)


def _steps(
    setting: LinearSetting, case: TinyCase = PLAIN, **wrong: object
) -> tuple[LinearSetting, Mistaken]:
    steps = replace(STEPS, **wrong)  # type: ignore[arg-type]
    return setting, lambda: linear_by_hand(case, setting, steps=steps)


def _relu_outside(attention: Array, gradient: Array) -> Array:
    return np.maximum((attention * gradient).mean(axis=0), 0)


def _gradient_alone(attention: Array, gradient: Array) -> Array:
    return np.maximum(gradient, 0).mean(axis=0)


def _unweighed(values: Array, projection: Array, bias: Array) -> Array:
    return np.ones(values.shape[1])


def _unprojected(values: Array, projection: Array, bias: Array) -> Array:
    return np.linalg.norm(values, axis=(0, 2))


def _biased(values: Array, projection: Array, bias: Array) -> Array:
    joined = values.swapaxes(0, 1).reshape(values.shape[1], -1)
    return np.linalg.norm(joined @ projection.T + bias, axis=1)


def _mean_of_heads(values: Array, projection: Array, bias: Array) -> Array:
    width = values.shape[2]
    heads = [
        np.linalg.norm(head @ projection[:, index * width : (index + 1) * width].T, axis=1)
        for index, head in enumerate(values)
    ]
    return np.mean(heads, axis=0)


def _unsigned_start(image: ImageTrace) -> Array:
    start = np.abs(contribution(image.tokens[-1], image.token_gradients[-1]))
    return start / start.sum()


def _start_before_the_last_block(image: ImageTrace) -> Array:
    start = np.maximum(contribution(image.tokens[-2], image.token_gradients[-2]), 0)
    return start / max(start.sum(), 1e-300)


def _start_as_the_gradient(image: ImageTrace) -> Array:
    start = np.maximum(image.token_gradients[-1].sum(axis=1), 0)
    return start / max(start.sum(), 1e-300)


MISTAKES = {
    "deviation is no constant": _rules(RELEVANCE, deviation=_variable),
    "deviation is no constant, evidence": _rules(EVIDENCE, deviation=_variable),
    "mean is a constant": _rules(RELEVANCE, mean=_constant),
    "mean is a constant, evidence": _rules(EVIDENCE, mean=_constant),
    "gate is the derivative": _rules(RELEVANCE, gate=_variable),
    "gate is the derivative, evidence": _rules(EVIDENCE, gate=_variable),
    "probabilities are no constants": _rules(EVIDENCE, shares=(1, 1, 1)),
    "probabilities are no constants, relevance": _rules(RELEVANCE, shares=(1, 1, 1)),
    "values and scores halved alike": _rules(SHARED_EVIDENCE, shares=(0.5, 0.5, 0.5)),
    "nothing shared": _rules(SHARED_EVIDENCE, shares=(0, 0, 1)),
    "relu outside of the mean": _steps(RELEVANCE, fuse=_relu_outside),
    "relu outside of the mean, classic": _steps(CLASSIC, fuse=_relu_outside),
    "gradient without attention": _steps(CLASSIC, fuse=_gradient_alone),
    "values not weighed": _steps(RELEVANCE, value_norms=_unweighed),
    "values not projected": _steps(RELEVANCE, value_norms=_unprojected),
    "projection with its bias": _steps(RELEVANCE, value_norms=_biased),
    "norms of heads averaged": _steps(RELEVANCE, value_norms=_mean_of_heads),
    "start not divided by its sum": _steps(RELEVANCE, start=speaking),
    "start without its sign": _steps(RELEVANCE, AVERAGED, start=_unsigned_start),
    "start before the last block": _steps(RELEVANCE, start=_start_before_the_last_block),
    "start without the tokens": _steps(RELEVANCE, AVERAGED, start=_start_as_the_gradient),
    "one block too many": _steps(RELEVANCE, first_block=lambda blocks: blocks // 2 - 1),
    "one block too few": _steps(RELEVANCE, first_block=lambda blocks: blocks // 2 + 1),
    "residual forgotten": _steps(RELEVANCE, carry=lambda r, fused: r @ fused),
    "attention turned": _steps(RELEVANCE, carry=lambda r, fused: r + r @ fused.T),
    "evidence without its sign": _steps(
        EVIDENCE, contribution=lambda x, g: np.abs(contribution(x, g))
    ),
    "gradient without the tokens": _steps(EVIDENCE, contribution=lambda x, g: g.sum(axis=1)),
    "last output counted too": _steps(
        EVIDENCE, AVERAGED, block_inputs=lambda image: range(len(image.attention) + 1)
    ),
    "first input left out": _steps(
        EVIDENCE, block_inputs=lambda image: range(1, len(image.attention))
    ),
    "another class": (
        EVIDENCE,
        lambda: linear_by_hand(PLAIN, EVIDENCE, classes=PLAIN.classes[::-1]),
    ),
    "first row read": (
        CLASSIC,
        lambda: linear_by_hand(AVERAGED, CLASSIC, readout=class_token(AVERAGED.tokens)),
    ),
}


OF_AVERAGED = {
    *("start without its sign", "start without the tokens", "last output counted too"),
    "first row read",
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_mistake_is_caught(mistake: str) -> None:
    setting, mistaken = MISTAKES[mistake]
    wrong = mistaken()
    case = AVERAGED if mistake in OF_AVERAGED else PLAIN
    assert distance(linear_by_hand(case, setting), found(case, setting)).max() <= TOLERANCE
    assert distance(found(case, setting), wrong).max() > 10 * TOLERANCE

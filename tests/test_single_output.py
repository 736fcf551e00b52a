"""Heads with one output: yes or no, and the score is how much yes."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import vitviz
from tiny import CASES
from vitviz.models.model import Model, load_model

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def single() -> Model:
    module = next(case for case in CASES if case.name == "class-token").build()
    torch.manual_seed(3)
    module.head = torch.nn.Linear(48, 1)
    return load_model(module, device="cpu")


def _images(count: int) -> list[np.ndarray]:
    return list(np.random.default_rng(0).integers(0, 256, (count, 40, 40, 3), dtype=np.uint8))


def test_score_is_a_sigmoid_and_that_is_said(single: Model) -> None:
    assert single.score_kind == "sigmoid"
    assert any("one output" in note and "sigmoid" in note for note in single.notes)
    scores = [vitviz.rollout(single, [each])[0].predictions[0].score for each in _images(3)]
    assert all(0 < score < 1 for score in scores)
    assert len(set(scores)) == 3


def test_evaluation_tells_methods_apart(single: Model) -> None:
    curves = vitviz.evaluate(single, _images(6), methods=["rollout"], resamples=20).methods
    assert len({each.probability.tobytes() for each in curves}) == len(curves)
    assert all(each.probability.std() > 0 for each in curves)
    assert any(each.accuracy.min() < 1 for each in curves)

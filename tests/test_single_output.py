"""Heads with one output: yes or no, and the score is how much yes."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import vitviz
from tiny import CASES
from vitviz.errors import LabelError
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
    assert len({each.score.tobytes() for each in curves}) == len(curves)
    assert all(each.score.std() > 0 for each in curves)
    assert any(each.accuracy.min() < 1 for each in curves)


@pytest.mark.filterwarnings("ignore:no heat at all")  # of random weights, some say no
def test_the_one_output_is_named(single: Model) -> None:
    for name in ("grad_rollout", "relevance", "evidence"):
        (made,) = getattr(vitviz, name)(single, _images(1))
        assert (made.class_index, made.class_label) == (0, "output")
        assert made.caption == f"{name.replace('_', '-')}: output ({made.class_score:.0%})"
    assert vitviz.evidence(single, _images(1), classes="output")[0].request == "c0"
    assert any("maps show what raises it" in note for note in single.notes)


def test_the_one_output_can_be_turned_round_and_has_no_other(single: Model) -> None:
    (up,) = vitviz.evidence(single, _images(1))
    (down,) = vitviz.evidence(single, _images(1), target=lambda y: -y[:, 0])
    np.testing.assert_allclose(up.relevance, -down.relevance, atol=1e-6)
    with pytest.raises(LabelError, match="one output, so there is no other to compare it with"):
        vitviz.relevance(single, _images(1), versus="top1")
    with pytest.raises(LabelError, match="one output, class 0"):
        vitviz.relevance(single, _images(1), classes=1)

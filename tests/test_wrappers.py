"""Models in the wrappers and contexts of torch: taken as the model inside, or told what to pass."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import vitviz
from tiny import CASES
from vitviz.errors import UnsupportedModelError
from vitviz.models.model import Model, load_model

pytestmark = pytest.mark.usefixtures("one_thread")

PLAIN = next(case for case in CASES if case.name == "class-token")
IMAGE = np.random.default_rng(0).integers(0, 256, (32, 32, 3), dtype=np.uint8)
METHODS = (vitviz.rollout, vitviz.relevance)


def _maps(model: Model) -> list[np.ndarray]:
    return [method(model, [IMAGE])[0].relevance for method in METHODS]


@pytest.fixture(scope="module")
def expected() -> list[np.ndarray]:
    return _maps(load_model(PLAIN.build(), device="cpu"))


def _assert_same(model: nn.Module, expected: list[np.ndarray]) -> None:
    for found, wanted in zip(_maps(load_model(model, device="cpu")), expected, strict=True):
        np.testing.assert_array_equal(found, wanted)


class Wrapper(nn.Module):
    def __init__(self, *models: nn.Module) -> None:
        super().__init__()
        self.inner = nn.ModuleList(models)

    def forward(self, images: Tensor) -> Tensor:
        return self.inner[0](images)


class OwnHead(Wrapper):
    def __init__(self, *models: nn.Module) -> None:
        super().__init__(*models)
        self.head = nn.Linear(7, 2)


@pytest.mark.parametrize(
    "wrap",
    [torch.compile, nn.DataParallel, nn.Sequential, Wrapper, lambda m: Wrapper(torch.compile(m))],
)
def test_model_inside_a_wrapper_is_taken(
    wrap: Callable[[nn.Module], nn.Module], expected: list[np.ndarray]
) -> None:
    _assert_same(wrap(PLAIN.build()), expected)


def test_model_compiled_in_place_runs_as_written_and_stays_compiled(
    expected: list[np.ndarray],
) -> None:
    model = PLAIN.build()
    model.compile()
    model.blocks[0].compile()
    before = model._compiled_call_impl
    _assert_same(model, expected)
    assert model._compiled_call_impl is before
    assert model.blocks[0]._compiled_call_impl


def test_wrapper_of_two_models_or_with_a_head_says_what_to_pass() -> None:
    with pytest.raises(UnsupportedModelError, match=r"2 models .*inner\.0, inner\.1.*pass one"):
        load_model(Wrapper(PLAIN.build(), PLAIN.build()), device="cpu")
    with pytest.raises(UnsupportedModelError, match=r"head\.weight.*pass inner\.0"):
        load_model(OwnHead(PLAIN.build()), device="cpu")


def _answering(answer: Callable[[Tensor], object]) -> nn.Module:
    model = PLAIN.build()
    kind = type(model)
    own = type("Answering", (kind,), {"forward": lambda self, x: answer(kind.forward(self, x))})
    model.__class__ = own
    return model


@pytest.mark.parametrize(
    "answer",
    [lambda y: {"logits": y, "features": y[:, :3]}, lambda y: {"y": y}, lambda y: (y,)],
)
def test_logits_are_taken_out_of_what_a_model_gives(
    answer: Callable[[Tensor], object], expected: list[np.ndarray]
) -> None:
    _assert_same(_answering(answer), expected)


@pytest.mark.parametrize("answer", [lambda y: (y, y), lambda y: {"a": y, "b": y}, lambda y: None])
def test_answer_without_telling_logits_is_refused(answer: Callable[[Tensor], object]) -> None:
    with pytest.raises(UnsupportedModelError, match="expected one tensor of logits"):
        load_model(_answering(answer), device="cpu")


def test_contexts_of_torch_change_nothing(expected: list[np.ndarray]) -> None:
    with torch.inference_mode():
        made = PLAIN.build()
    _assert_same(made, expected)
    for context in (torch.inference_mode(), torch.autocast("cpu", torch.bfloat16)):
        with context:
            _assert_same(PLAIN.build(), expected)
    with torch.inference_mode():
        loaded = load_model(PLAIN.build(), device="cpu")
    for found, wanted in zip(_maps(loaded), expected, strict=True):
        np.testing.assert_array_equal(found, wanted)

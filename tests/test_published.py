"""LeGrad and Grad-CAM: as their papers say, by hand in float64, and mistakes seen."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any
from unittest.mock import patch

import numpy as np
import pytest
import torch
from torch import Tensor

import vitviz
from comparison import TOLERANCE, distance, loaded
from fixtures_io import picture, tiny_model, tiny_module
from oracles import Array
from tiny import CASES, TinyCase
from vitviz.errors import OptionError, UnsupportedModelError
from vitviz.explaining.batch import explain_batch
from vitviz.methods.table import METHODS, PUBLISHED, named_method, variants
from vitviz.models.model import load_model

pytestmark = pytest.mark.usefixtures("one_thread")

each_case = pytest.mark.parametrize("case", CASES, ids=str)


@dataclass(frozen=True, kw_only=True)
class Parts:
    """What a forward pass of a float64 copy gave, attention written out.

    Attributes:
        attention: A_l (batch, heads, queries, keys).
        tokens: What leaves each block (batch, tokens, channels).
        normed: What leaves norm1 of the last block.
        logits: (batch, classes).
        model: The copy.
    """

    attention: list[Tensor]
    tokens: list[Tensor]
    normed: Tensor
    logits: Tensor
    model: Any


def parts_of(case: TinyCase) -> Parts:
    """Run a float64 copy whose attention is not fused."""
    model = copy.deepcopy(case.build()).double()
    attention: list[Tensor] = []
    tokens: list[Tensor] = []
    normed: list[Tensor] = []
    softmax = Tensor.softmax

    def watched(scores: Tensor, dim: int) -> Tensor:
        attention.append(softmax(scores, dim=dim))
        return attention[-1]

    for block in model.blocks:
        block.attn.fused_attn = False
        block.register_forward_hook(lambda block, inputs, output: tokens.append(output))
    model.blocks[-1].norm1.register_forward_hook(lambda norm, inputs, output: normed.append(output))
    with patch.object(Tensor, "softmax", watched):
        logits = model(case.images().double())
    return Parts(attention=attention, tokens=tokens, normed=normed[0], logits=logits, model=model)


def gradient(score: Tensor, of: Tensor) -> Tensor:
    (found,) = torch.autograd.grad(score, [of], retain_graph=True)
    return found


def positive(gradients: Tensor) -> Tensor:
    """Mean over heads and queries of what is positive (batch, keys)."""
    return gradients.clamp(min=0).mean(dim=1).mean(dim=1)


def legrad(parts: Parts, class_index: int) -> Tensor:
    """Equations 4 to 8 of Bousselham et al. 2024, all layers."""
    maps = []
    for attention, tokens in zip(parts.attention, parts.tokens, strict=True):
        score = parts.model.forward_head(parts.model.norm(tokens))[:, class_index].sum()
        maps.append(positive(gradient(score, attention)))
    return sum(maps[1:], start=maps[0]) / len(maps)


def gradcam(parts: Parts, class_index: int, prefix: int) -> Tensor:
    """Equations 1 and 2 of Selvaraju et al. 2017, patch tokens in the place of pixels."""
    score = parts.logits[:, class_index].sum()
    weights = gradient(score, parts.normed)[:, prefix:].mean(dim=1)
    return torch.einsum("btc,bc->bt", parts.normed, weights).clamp(min=0)


def on_grid(case: TinyCase, tokens: Tensor) -> Array:
    return tokens[:, case.prefix_tokens :].detach().reshape(-1, *case.grid).numpy()


def by_hand(case: TinyCase, name: str) -> Array:
    """Compute maps (batch, maps, rows, cols) of the two classes of a case."""
    parts = parts_of(case)
    return np.stack(
        [
            on_grid(
                case,
                legrad(parts, index)
                if name == "legrad"
                else gradcam(parts, index, case.prefix_tokens),
            )
            for index in case.classes
        ],
        axis=1,
    )


def found(case: TinyCase, name: str) -> Array:
    classes = torch.tensor([case.classes] * 3)
    maps = explain_batch(
        loaded(case), case.images(), named_method(name).method, class_indices=classes
    )
    return np.asarray(maps.relevance, np.float64)


@each_case
@pytest.mark.parametrize("name", PUBLISHED)
def test_map_equals_the_one_by_hand(case: TinyCase, name: str) -> None:
    assert distance(found(case, name), by_hand(case, name)).max() <= TOLERANCE


def _all_of_one_score(parts: Parts, class_index: int) -> Tensor:
    """Take the model's logit in all layers."""
    score = parts.logits[:, class_index].sum()
    return sum(positive(gradient(score, each)) for each in parts.attention) / len(parts.attention)


def _last_layer(parts: Parts, class_index: int) -> Tensor:
    return positive(gradient(parts.logits[:, class_index].sum(), parts.attention[-1]))


def _of_each(change: Callable[[Tensor, Tensor], Tensor]) -> Callable[[Parts, int], Tensor]:
    def mistaken(parts: Parts, class_index: int) -> Tensor:
        maps = [
            change(
                gradient(
                    parts.model.forward_head(parts.model.norm(tokens))[:, class_index].sum(),
                    attention,
                ),
                attention,
            )
            for attention, tokens in zip(parts.attention, parts.tokens, strict=True)
        ]
        return sum(maps[1:], start=maps[0]) / len(maps)

    return mistaken


def _without_norm(parts: Parts, class_index: int) -> Tensor:
    maps = [
        positive(gradient(parts.model.forward_head(tokens)[:, class_index].sum(), attention))
        for attention, tokens in zip(parts.attention, parts.tokens, strict=True)
    ]
    return sum(maps[1:], start=maps[0]) / len(maps)


LEGRAD_MISTAKES: dict[str, Callable[[Parts, int], Tensor]] = {
    "the-model's-logit-in-all-layers": _all_of_one_score,
    "last-layer-alone": _last_layer,
    "heads-averaged-before-the-clamp": _of_each(
        lambda gradients, _: gradients.mean(dim=1).clamp(min=0).mean(dim=1)
    ),
    "no-clamp": _of_each(lambda gradients, _: gradients.mean(dim=(1, 2))),
    "attention-times-gradient": _of_each(lambda gradients, a: positive(gradients * a)),
    "queries-for-keys": _of_each(lambda gradients, _: positive(gradients.transpose(2, 3))),
    "class-token's-row-alone": _of_each(
        lambda gradients, _: gradients.clamp(min=0).mean(dim=1)[:, 0]
    ),
    "no-norm": _without_norm,
}


@pytest.mark.parametrize("mistake", LEGRAD_MISTAKES)
def test_mistaken_legrad_is_seen(mistake: str) -> None:
    # Where patches are averaged, their norm comes behind the pooling.
    name = "class-token" if mistake == "no-norm" else "average-beside-class-token"
    case = next(each for each in CASES if each.name == name)
    parts = parts_of(case)
    wrong = np.stack(
        [on_grid(case, LEGRAD_MISTAKES[mistake](parts, index)) for index in case.classes], axis=1
    )
    assert distance(found(case, "legrad"), wrong).min() > 100 * TOLERANCE


def _cam(parts: Parts, class_index: int, prefix: int, **change: Any) -> Tensor:
    score = parts.logits[:, class_index].sum()
    of = change.get("of", parts.normed)
    weights = gradient(score, of)[:, change.get("averaged", slice(prefix, None))].mean(dim=1)
    cam = torch.einsum("btc,bc->bt", of, weights)
    return cam if change.get("signed") else cam.clamp(min=0)


@pytest.mark.parametrize(
    "change",
    [
        lambda parts, prefix: {"averaged": slice(None)},
        lambda parts, prefix: {"averaged": slice(0, 1)},
        lambda parts, prefix: {"signed": True},
        lambda parts, prefix: {"of": parts.tokens[-2]},
        lambda parts, prefix: {"of": parts.tokens[-1]},
    ],
    ids=["prefix-averaged-too", "class-token-alone", "no-relu", "block-input", "block-output"],
)
def test_mistaken_gradcam_is_seen(change: Callable[[Parts, int], dict[str, Any]]) -> None:
    case = next(each for each in CASES if each.name == "registers")
    parts, prefix = parts_of(case), case.prefix_tokens
    wrong = np.stack(
        [
            on_grid(case, _cam(parts, index, prefix, **change(parts, prefix)))
            for index in case.classes
        ],
        axis=1,
    )
    assert distance(found(case, "gradcam"), wrong).max() > 100 * TOLERANCE


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_methods_are_measured_where_they_are_named(name: str) -> None:
    assert name not in variants()
    assert name not in METHODS
    done = vitviz.evaluate(tiny_model(), [picture(64, 64)], methods=[name, f"{name}@2"])
    assert [each.name for each in done.methods[2:]] == [name, f"{name}@2"]
    assert not done.failed
    assert "class_correlation" in done.measurements[0].cases[0].scores[name]


@pytest.mark.parametrize("name", PUBLISHED)
def test_difference_of_two_classes_is_explained(name: str) -> None:
    case = CASES[0]
    first, second = case.classes
    pairs = torch.tensor([[[first, second]]] * 3)
    method = named_method(name).method
    maps = np.asarray(
        explain_batch(loaded(case), case.images(), method, class_indices=pairs).relevance
    )
    swapped = copy.deepcopy(case.build())
    with torch.no_grad():  # a model whose first class is that difference
        swapped.head.weight[first] -= swapped.head.weight[second]
        swapped.head.bias[first] -= swapped.head.bias[second]
    model = load_model(swapped, device="cpu")
    given = torch.tensor([[first]] * 3)
    expected = explain_batch(model, case.images(), method, class_indices=given).relevance
    np.testing.assert_allclose(maps, expected, rtol=1e-3, atol=1e-5 * float(expected.max()))


@pytest.mark.parametrize("name", PUBLISHED)
def test_model_is_left_as_it_was(name: str) -> None:
    case = CASES[0]
    model = loaded(case)
    explain_batch(model, case.images(), named_method(name).method)
    for part in model.module.modules():
        assert not part._forward_hooks
        assert not part._forward_pre_hooks


def test_models_without_what_a_method_reads_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    model = load_model(tiny_module(), device="cpu")
    del model.module.blocks[-1].norm1  # type: ignore[union-attr,index]
    with pytest.raises(OptionError, match="gradcam looks at norm1 of the last block"):
        vitviz.evaluate(model, [picture(64, 64)], methods=["gradcam"])
    monkeypatch.setattr("vitviz.models.structure.token_head", lambda module: None)
    with pytest.raises(OptionError, match=r"legrad reads.*has none that works alone"):
        vitviz.evaluate(tiny_model(), [picture(64, 64)], methods=["legrad"])


def test_head_that_gives_other_logits_than_the_model_is_refused() -> None:
    module = tiny_module()
    head = module.forward_head  # type: ignore[union-attr]
    module.forward = lambda images: 2 * head(module.forward_features(images))  # type: ignore
    model = load_model(module, device="cpu")
    with pytest.raises(UnsupportedModelError, match="no head that gives the model's own logits"):
        vitviz.evaluate(model, [picture(64, 64)], methods=["legrad"])

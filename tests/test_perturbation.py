"""Taking parts of images away gives the curves that one gets by hand."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from fixtures_io import SIZE, tiny_model
from vitviz.evaluation.metrics import area_under
from vitviz.evaluation.perturbation import (
    PERTURBATIONS,
    Curves,
    Perturbation,
    Untouched,
    _curves,
    _removals,
    measure_curves,
    rank_parts,
    seen_size,
    upsample,
)
from vitviz.models.labels import Labels
from vitviz.models.model import Model
from vitviz.models.preprocessing import Preprocessing
from vitviz.models.tokens import Readout, TokenLayout
from vitviz.options import Convention

pytestmark = pytest.mark.usefixtures("one_thread")

GRID, PATCH = (2, 5), 4
WEIGHTS = torch.tensor([[5.0, -2.0, 1.0, 0.5, 3.0], [-4.0, 2.0, -1.0, 4.0, -3.0]])
PATCHES = Perturbation(shares=(0.1, 0.5, 0.9), unit="patches", fill="mean", averaged=True)


class Linear(nn.Module):
    """Reads logits off the mean of the red channel in each patch: Σ w x for class 0, 1 for 1."""

    def __init__(self) -> None:
        super().__init__()
        self.weights = nn.Parameter(WEIGHTS)

    def forward(self, images: Tensor) -> Tensor:
        cells = nn.functional.avg_pool2d(images[:, :1, : 2 * PATCH, : 5 * PATCH], PATCH)[:, 0]
        score = (cells * self.weights).sum(dim=(1, 2))
        return torch.stack([score, torch.ones_like(score)], dim=1)


def linear_model() -> Model:
    return Model(
        module=Linear(),
        name="linear",
        weights="by hand",
        layout=TokenLayout(
            class_tokens=0,
            distillation_tokens=0,
            register_tokens=0,
            grid=GRID,
            blocks=1,
            readout=Readout.PATCH_AVERAGE,
        ),
        preprocessing=Preprocessing(
            size=(8, 20),
            mean=(0.5, 0.4, 0.3),
            std=(0.25, 0.5, 0.5),
            interpolation="bicubic",
            crop_pct=1.0,
            patch=(PATCH, PATCH),
        ),
        labels=Labels(),
        num_classes=2,
        multi_label=True,
    )


def curves_of(
    relevance: Tensor,
    perturbation: Perturbation = PATCHES,
    *,
    images: Tensor | None = None,
    ties: Tensor | None = None,
    target: int = 0,
    batch_size: int = 4,
) -> list[Curves]:
    model = linear_model()
    images = torch.ones(len(relevance), 3, 8, 20) if images is None else images
    count = len(images)
    batch = Untouched(
        images=images,
        logits=model.module(images).detach(),
        classes=torch.zeros(count, dtype=torch.int64),
        targets=torch.full((count,), target),
        ties=torch.arange(10.0).view(1, *GRID).expand(count, -1, -1) if ties is None else ties,
    )
    return measure_curves(model, batch, relevance, perturbation, batch_size)


def sigmoid(values: list[float]) -> pytest.approx:
    return pytest.approx(1 / (1 + np.exp(-np.array(values))), abs=1e-6)


def test_curves_of_a_linear_model_are_those_made_by_hand() -> None:
    """Weights from the highest: 5 4 3 2 1 .5 -1 -2 -3 -4; their sum is 5.5."""
    (curves,) = curves_of(WEIGHTS[None])
    assert curves.score[0] == sigmoid([0.5, -9.5, -4.0])  # without 5; the best 5; all but -4
    assert curves.score[1] == sigmoid([9.5, 15.0, 5.0])  # without -4; the best 5; 5 alone
    assert curves.accuracy[0].tolist() == [0, 0, 0]  # the other class has logit 1
    assert curves.accuracy[1].tolist() == [1, 1, 1]


def test_symmetric_relevance_gain_is_the_one_made_by_hand() -> None:
    """Of ten parts, each step takes one; in float64, part by part."""
    convention = PERTURBATIONS[Convention.SRG]
    (curves,) = curves_of(WEIGHTS[None], convention)
    ranked = sorted(WEIGHTS.flatten().tolist(), reverse=True)
    most = [sum(ranked[removed:]) for removed in range(11)]
    least = [sum(ranked[: 10 - removed]) for removed in range(11)]
    assert most == [5.5, 0.5, -3.5, -6.5, -8.5, -9.5, -10, -9, -7, -4, 0]
    assert curves.score.tolist() == [pytest.approx(most), pytest.approx(least)]
    gain = sum(
        (least[step] - most[step] + least[step + 1] - most[step + 1]) / 2 / 10 for step in range(10)
    )
    mif, lif = convention.area(curves.score)
    assert lif - mif == pytest.approx(gain) == pytest.approx(16.45)


def test_symmetric_relevance_gain_fills_with_the_mean_colour_and_patches_alone() -> None:
    convention = PERTURBATIONS[Convention.SRG]
    assert convention.color(linear_model().preprocessing).tolist() == [0, 0, 0]
    assert convention.unit == "patches"
    assert convention.shares == pytest.approx([step / 10 for step in range(11)])


def test_symmetric_relevance_gain_of_two_classes_is_of_the_difference_of_their_logits() -> None:
    model, images = linear_model(), torch.ones(1, 3, 8, 20)
    batch = Untouched(
        images=images,
        logits=model.module(images).detach(),
        classes=torch.tensor([0]),
        targets=torch.tensor([0]),
        ties=torch.arange(10.0).view(1, *GRID),
        versus=torch.tensor([1]),
    )
    convention = PERTURBATIONS[Convention.SRG]
    (pair,) = measure_curves(model, batch, WEIGHTS[None], convention, 4)
    (alone,) = curves_of(WEIGHTS[None], convention)
    assert pair.score == pytest.approx(alone.score - 1)  # the other logit is 1


def test_right_class_may_be_another_than_the_one_explained() -> None:
    (curves,) = curves_of(WEIGHTS[None], target=1)
    assert curves.score[0] == sigmoid([0.5, -9.5, -4.0])
    assert curves.accuracy.tolist() == [[1, 1, 1], [0, 0, 0]]


def test_weights_themselves_are_the_best_map_there_is() -> None:
    generator = torch.Generator().manual_seed(0)
    others = torch.randn(60, *GRID, generator=generator)
    best, *rest = curves_of(torch.cat([WEIGHTS[None], others]))
    areas = [PATCHES.area(each.score) for each in rest]
    deletion, insertion = PATCHES.area(best.score)
    assert all(deletion <= area[0] and insertion >= area[1] for area in areas)


def test_order_alone_matters() -> None:
    one, other = curves_of(torch.stack([WEIGHTS, torch.exp(WEIGHTS) - 9]))
    assert np.array_equal(one.score, other.score)


@pytest.mark.parametrize("batch_size", [1, 3, 64])
def test_batches_do_not_change_curves(batch_size: int) -> None:
    relevance = torch.randn(5, *GRID, generator=torch.Generator().manual_seed(1))
    images = torch.rand(5, 3, 8, 20, generator=torch.Generator().manual_seed(2))
    alone = [curves_of(relevance[i : i + 1], images=images[i : i + 1])[0].score for i in range(5)]
    together = curves_of(relevance, images=images, batch_size=batch_size)
    assert np.allclose(alone, [each.score for each in together], atol=1e-6)


def test_images_are_left_as_they_are() -> None:
    images = torch.rand(2, 3, 8, 20)
    before = images.clone()
    curves_of(torch.rand(2, *GRID), images=images)
    assert torch.equal(images, before)


def test_map_that_is_the_same_everywhere_scores_as_the_one_that_ties_go_by() -> None:
    ties = torch.rand(1, *GRID, generator=torch.Generator().manual_seed(3))
    for perturbation in PERTURBATIONS.values():
        (flat,) = curves_of(torch.full((1, *GRID), 2.0), perturbation, ties=ties)
        (random,) = curves_of(ties, perturbation, ties=ties)
        assert np.array_equal(flat.score, random.score)


def test_ties_are_broken_among_equals_only() -> None:
    relevance = torch.tensor([[1.0, 0.0, 1.0, 0.0, 2.0]])
    ties = torch.tensor([[0.1, 0.9, 0.3, 0.2, 0.0]])
    assert rank_parts(relevance, ties).tolist() == [[2, 3, 1, 4, 0]]


def test_black_is_zero_before_normalisation() -> None:
    """Red 0 is -2 after normalisation here, so a removed weight counts -2 times."""
    black = replace(PATCHES, shares=(0.1,), fill="black")
    (curves,) = curves_of(WEIGHTS[None], black)
    assert curves.score[0] == sigmoid([5.5 - 5 - 2 * 5])


def test_untouched_image_may_be_the_curve_s_first_point() -> None:
    (curves,) = curves_of(WEIGHTS[None], replace(PATCHES, shares=(0.0, 0.5)))
    assert curves.score[0] == sigmoid([5.5, -9.5])
    assert curves.score[1] == sigmoid([5.5, 15.0])


def test_finer_map_is_averaged_over_each_patch() -> None:
    fine = WEIGHTS.repeat_interleave(3, 0).repeat_interleave(3, 1)
    fine = fine + torch.tensor([[-9.0, 0.0, 9.0]]).repeat(6, 5)  # evens out in each patch
    (finer,), (plain,) = curves_of(fine[None]), curves_of(WEIGHTS[None])
    assert np.array_equal(finer.score, plain.score)


def test_pixels_go_by_the_interpolated_map() -> None:
    """Of 160 pixels, 16 go: of a map with one peak, those around its middle."""
    peak = torch.zeros(1, *GRID)
    peak[0, 0, 2] = 1
    height = upsample(peak, (8, 20))[0]
    gone = height >= height.flatten().sort(descending=True).values[15]
    images = torch.ones(1, 3, 8, 20)
    cells = nn.functional.avg_pool2d((~gone)[None].float(), PATCH)
    (curves,) = curves_of(peak, replace(PATCHES, shares=(0.1,), unit="pixels"), images=images)
    assert int(gone.sum()) == 16
    assert curves.score[0] == sigmoid([float((cells[0] * WEIGHTS).sum())])


def test_pixels_that_no_token_sees_stay() -> None:
    assert seen_size((11, 20), (4, 4)) == (8, 20)
    images = torch.ones(1, 3, 11, 20)
    seen: list[Tensor] = []
    model = linear_model()
    forward = model.module.forward
    model.module.forward = lambda each: seen.append(each.clone()) or forward(each)
    batch = Untouched(
        images=images,
        logits=forward(images).detach(),
        classes=torch.tensor([0]),
        targets=torch.tensor([0]),
        ties=torch.rand(1, *GRID),
    )
    measure_curves(model, batch, WEIGHTS[None], replace(PATCHES, shares=(0.999,)), 9)
    changed = (torch.cat(seen) != images).any(dim=1)
    assert changed[:, :8].any()
    assert not changed[:, 8:].any()


def test_upsampled_map_keeps_rows_and_columns_apart() -> None:
    relevance = torch.zeros(1, 2, 3)
    relevance[0, 1, 0] = 1
    row, col = divmod(int(upsample(relevance, (20, 60)).argmax()), 60)
    assert row >= 10
    assert col < 20


def literal_chefer(
    model: Model, pixels: Tensor, relevance: Tensor, ties: Tensor, target: int, *, negative: bool
) -> tuple[list[float], float]:
    """Follow Chefer et al. 2021 step by step, with one image and loops.

    Pixels (3, height, width) in [0, 1] are set to 0 where the map, bilinearly grown to them, is
    highest (for negative perturbation, where its opposite is), normalised after that, and
    classified; the area takes in the untouched image and ends at 90 %. Which of several equal
    pixels goes first, topk leaves open: it is the tie map's order here.
    """
    size = pixels.shape[1:]
    grown, between = (
        nn.functional.interpolate(each[None, None], size, mode="bilinear").flatten()
        for each in (relevance, ties)
    )
    ranked = sorted(range(grown.numel()), key=lambda pixel: (-grown[pixel], -between[pixel], pixel))
    order = ranked[::-1] if negative else ranked
    wanted = -grown if negative else grown
    mean, std = (
        torch.tensor(each).view(3, 1, 1)
        for each in (model.preprocessing.mean, model.preprocessing.std)
    )
    hits = []
    for step in (0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9):
        gone = order[: int(grown.numel() * step)]
        assert torch.equal(wanted[gone], wanted.topk(len(gone)).values)
        darkened = pixels.clone().flatten(1)
        darkened[:, gone] = 0
        with torch.no_grad():
            logits = model.module(((darkened.view(3, *size) - mean) / std)[None])
        hits.append(float(logits[0].argmax() == target))
    area = sum((a + b) / 2 * 0.1 for a, b in zip(hits, hits[1:], strict=False))
    return hits, area


@pytest.mark.slow
def test_chefer2021_is_what_its_authors_do() -> None:
    model, generator = tiny_model(), torch.Generator().manual_seed(4)
    perturbation = PERTURBATIONS[Convention.CHEFER2021]
    pixels = torch.rand(6, 3, SIZE, SIZE, generator=generator)
    relevance = torch.randn(6, 4, 4, generator=generator)
    mean, std = (
        torch.tensor(each).view(1, 3, 1, 1)
        for each in (model.preprocessing.mean, model.preprocessing.std)
    )
    images = (pixels - mean) / std
    with torch.no_grad():
        logits = model.module(images)
    targets = logits.argmax(dim=1)
    targets[5] = (targets[5] + 1) % 7  # one that the model gets wrong
    batch = Untouched(
        images=images,
        logits=logits,
        classes=logits.argmax(dim=1),
        targets=targets,
        ties=torch.rand(6, 4, 4, generator=generator),
    )
    found = measure_curves(model, batch, relevance, perturbation, 16)
    seen = set()
    for number, curves in enumerate(found):
        areas = perturbation.area(curves.accuracy)
        for order, negative in enumerate((False, True)):
            known = (pixels[number], relevance[number], batch.ties[number], int(targets[number]))
            hits, area = literal_chefer(model, *known, negative=negative)
            assert curves.accuracy[order].tolist() == hits
            assert areas[order] == pytest.approx(area)
            seen.add(tuple(hits))
    assert len(seen) > 4  # the curves are no trivial ones


def test_conventions_sum_up_as_they_say() -> None:
    chefer, ours = PERTURBATIONS[Convention.CHEFER2021], PERTURBATIONS[Convention.VITVIZ]
    assert chefer.area(np.ones(10)) == pytest.approx(0.9)
    assert chefer.area(np.arange(10.0)) == pytest.approx(area_under(np.arange(10), chefer.shares))
    assert ours.area(np.full(9, 0.3)) == pytest.approx(0.3)


def test_right_is_what_has_the_highest_logit_though_scores_saturate() -> None:
    logits = torch.tensor([20.0, 30.0, -5.0]).expand(1, 2, 1, 3)
    assert len(set(logits.sigmoid()[0, 0, 0].tolist())) == 2
    nothing = torch.zeros(1, 3, 8, 20)
    for target, right in ((0, 0), (1, 1), (2, 0)):
        batch = Untouched(
            images=nothing,
            logits=logits[:, 0, 0],
            classes=torch.tensor([1]),
            targets=torch.tensor([target]),
            ties=torch.zeros(1, *GRID),
        )
        (curves,) = _curves(logits.sigmoid(), logits, batch)
        assert curves.accuracy.tolist() == [[right], [right]]


@pytest.mark.parametrize(
    ("parts", "share", "count"), [(180, 0.7, 126), (100, 0.29, 29), (9, 0.5, 4)]
)
def test_share_of_parts_that_goes_is_the_one_that_is_meant(
    parts: int, share: float, count: int
) -> None:
    removals = _removals(replace(PATCHES, shares=(share,)), parts).tolist()
    assert removals == [[0, count], [parts - count, parts]]

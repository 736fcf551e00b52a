"""The bundled model looks where it should, and the engine shows it."""

from __future__ import annotations

import functools
import json
import sys
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import vitviz
import vitviz.methods.forward
from tests.demo_model import CLASSES, evaluate
from tests.demo_model.evaluate import FIRST_SEED, Figures, measure
from tests.demo_model.scenes import Scene, paint_scene
from vitviz.evaluation.metrics import average_precision, specificity
from vitviz.evaluation.perturbation import upsample
from vitviz.explaining.explanation import Explanation

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("one_thread")]

SAMPLES = Path(__file__).parents[1] / "sample_images" / "scenes"


@functools.cache
def demo() -> vitviz.Model:
    return vitviz.load_model("demo", device="cpu")


@functools.cache
def unseen_scene(index: int) -> Scene:
    return paint_scene(FIRST_SEED + index)


def scenes(count: int) -> list[Scene]:
    return [unseen_scene(index) for index in range(count)]


@pytest.fixture(scope="module", params=[150, pytest.param(500, marks=pytest.mark.long)])
def figures(request: pytest.FixtureRequest) -> Figures:
    return measure(demo(), scenes(request.param))


def test_demo_says_what_it_is() -> None:
    model = demo()
    assert (model.name, model.weights) == ("demo", "bundled")
    assert model.labels.names == CLASSES
    assert not model.labels.assumed
    assert model.score_kind == "sigmoid"
    assert model.layout.blocks == 12
    assert model.layout.grid == (12, 12)
    assert model.layout.described_prefix() == "1 class"


def test_weights_are_small_and_in_half_precision() -> None:
    file = Path(vitviz.__file__).parent / "demo" / "demo.safetensors"
    assert file.stat().st_size <= 4e6
    header = file.read_bytes()
    described = json.loads(header[8 : 8 + int.from_bytes(header[:8], "little")])
    described.pop("__metadata__", None)
    assert {tensor["dtype"] for tensor in described.values()} == {"F16"}


def test_labels_are_all_right_on_unseen_scenes(figures: Figures) -> None:
    assert figures.exact >= 0.95, asdict(figures)


def test_grad_rollout_points_at_the_class_asked_for(figures: Figures) -> None:
    assert figures.maps >= 1.4 * figures.scenes
    assert figures.asked >= 0.90, asdict(figures)
    assert figures.other <= 0.03, asdict(figures)


def test_rollout_lies_on_the_objects_more_than_their_area_says(figures: Figures) -> None:
    assert figures.energy >= 1.2, asdict(figures)


def test_gradients_of_the_blocks_in_reverse_order_fail_clearly(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    right = vitviz.methods.forward.output_gradients

    def reversed_gradients(*args: Any, **kwargs: Any) -> Any:
        return right(*args, **kwargs)[::-1]

    monkeypatch.setattr(vitviz.methods.forward, "output_gradients", reversed_gradients)
    mistaken = measure(demo(), scenes(60))
    assert mistaken.asked <= 0.85, asdict(mistaken)


@functools.cache
def located(
    method: Callable[..., list[Explanation]], count: int, **options: Any
) -> dict[str, float]:
    """Mean average precision, and specificity in scenes of several objects, of unseen scenes."""
    precision, specific = [], []
    for class_index in range(len(CLASSES)):
        showing = [scene for scene in scenes(count) if scene.labels[class_index]]
        images = [scene.image for scene in showing]
        for scene, found in zip(
            showing, method(demo(), images, classes=[class_index], **options), strict=True
        ):
            mask = scene.mask[2::4, 2::4]
            asked, objects = mask == class_index + 1, mask > 0
            relevance = upsample(torch.from_numpy(found.relevance)[None], mask.shape)[0].numpy()
            precision.append(average_precision(relevance, asked))
            if np.count_nonzero(scene.labels) > 1:
                specific.append(specificity(relevance, asked, objects))
    return {"precision": float(np.mean(precision)), "specificity": float(np.mean(specific))}


@pytest.mark.parametrize("count", [12, pytest.param(30, marks=pytest.mark.long)])
def test_relevance_and_refined_maps_outline_objects_better_than_grad_rollout(count: int) -> None:
    plain = located(vitviz.grad_rollout, count)["precision"]
    better = {
        "relevance": located(vitviz.relevance, count)["precision"],
        "relevance@2": located(vitviz.relevance, count, refine=2)["precision"],
        "evidence@2": located(vitviz.evidence, count, refine=2)["precision"],
    }
    assert min(better.values()) > plain, (plain, better)
    assert better["relevance"] < better["relevance@2"]


def test_evidence_keeps_to_the_class_more_than_grad_rollout() -> None:
    plain, signed = located(vitviz.grad_rollout, 30), located(vitviz.evidence, 30)
    assert signed["specificity"] >= 0.9
    assert signed["specificity"] > plain["specificity"]


def test_scenes_are_the_same_for_the_same_seed_and_differ_for_others() -> None:
    first, again, other = paint_scene(3), paint_scene(3), paint_scene(4)
    assert np.array_equal(first.image, again.image)
    assert np.array_equal(first.mask, again.mask)
    assert not np.array_equal(first.image, other.image)


def test_masks_show_every_object_of_a_scene() -> None:
    for scene in scenes(50):
        shown = set(np.unique(scene.mask)) - {0}
        assert shown == {item.class_index + 1 for item in scene.objects}
        assert 1 <= len(scene.objects) <= 3


@pytest.mark.parametrize("path", sorted(SAMPLES.glob("*.png")), ids=lambda path: path.stem)
def test_sample_scenes_show_what_their_names_say(path: Path) -> None:
    mask = np.asarray(Image.open(path.parent / ".masks" / path.name))
    named = {CLASSES.index(word) + 1 for word in path.stem.split("-")}
    assert set(np.unique(mask)) - {0} == named
    assert mask.shape == (384, 384)


def test_a_run_over_the_samples_does_not_take_the_masks() -> None:
    from vitviz.images.sources import find_sources

    found, _ = find_sources([str(SAMPLES)])
    assert [source.path for source in found] == sorted(SAMPLES.glob("*.png"))
    assert 8 <= len(found) <= 12


@pytest.mark.parametrize("heat", [0.5, 0.0])
def test_map_that_is_the_same_everywhere_has_the_energy_of_chance(heat: float) -> None:
    relevance = np.full((12, 12), heat, np.float32)
    assert evaluate._energy(relevance, unseen_scene(0).mask) == pytest.approx(1)


def test_figures_are_printed_as_they_are_measured(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["evaluate", "--scenes", "12"])
    monkeypatch.setenv("COLUMNS", "100")
    evaluate.main()
    said = " ".join(capsys.readouterr().out.split())
    expected = measure(demo(), scenes(12))
    assert f"all labels right (12 scenes) │ {expected.exact:.1%}" in said
    assert f"points at the class ({expected.maps} maps) │ {expected.asked:.1%}" in said
    assert f"energy on objects / area │ {expected.energy:.2f}" in said


def test_scenes_of_one_object_ask_for_no_class() -> None:
    single = [each for each in scenes(50) if len(each.objects) == 1][:2]
    found = measure(demo(), single)
    assert (found.scenes, found.maps, found.asked, found.other) == (2, 0, 0, 0)

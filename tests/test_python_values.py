"""What Python users give: images and folders, numbers of every kind."""

from __future__ import annotations

import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import vitviz
from fixtures_io import NAME, SIZE, picture, save_pictures, tiny_model, tiny_module
from vitviz import api, python_words
from vitviz.errors import ImageError, OptionError, SourceError, VitvizError
from vitviz.explaining.explanation import Caveat
from vitviz.models.model import load_model
from vitviz.options import HeadFusion, Outliers, PictureOptions

pytestmark = pytest.mark.usefixtures("one_thread")


# Images in Python


def test_folder_in_python_is_taken_as_on_the_command_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    save_pictures(tmp_path, ["p/b.png", "p/a.png", "p/q/c.png", "p/.d.png", "e.png"])
    names = ["p/a.png", "p/b.png", "p/q/c.png"]
    for images in ("p", Path("p"), ["p"], [Path("p")]):
        maps = vitviz.rollout(tiny_model(), images)
        assert [str(each.sample.source.path) for each in maps] == names
    mixed = vitviz.rollout(tiny_model(), ["e.png", "p", picture(64, 64)])
    assert len(mixed) == 5
    measured = vitviz.evaluate(tiny_model(), "p", methods=["rollout"], resamples=5)
    assert measured.images == 3
    (tmp_path / "empty").mkdir()
    with pytest.raises(SourceError, match="no images in empty"):
        vitviz.rollout(tiny_model(), ["empty"])
    (alone,) = vitviz.rollout(tiny_model(), "e.png")
    assert str(alone.source) == "e.png"


def test_bad_image_loses_no_other_where_it_is_to_be_skipped(tmp_path: Path) -> None:
    save_pictures(tmp_path, ["a.png", "b.png"])
    (tmp_path / "bad.png").write_bytes(b"bad")
    images = [tmp_path / name for name in ("a.png", "bad.png", "gone.png", "b.png")]
    with pytest.warns(UserWarning, match=r"2 images failed and were left out.* .*bad\.png: "):
        maps = vitviz.rollout(tiny_model(), images, errors="skip")
    assert [each.sample.source.path.name for each in maps] == ["a.png", "b.png"]
    with pytest.raises(ImageError, match="bad"):
        vitviz.rollout(tiny_model(), images)
    with pytest.raises(OptionError, match="errors is 'ignore'"):
        vitviz.rollout(tiny_model(), images, errors="ignore")


def test_outlier_tokens_are_told_of_once_a_process(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(python_words, "_told", set())
    explained = api.explaining.explain_samples

    def with_outliers(*arguments: Any, **options: Any) -> Any:
        for item in explained(*arguments, **options):
            maps = [
                replace(each, diagnostics=replace(each.diagnostics, outlier_share=0.2))
                for each in item.maps
            ]
            yield replace(item, maps=tuple(maps))

    monkeypatch.setattr(api.explaining, "explain_samples", with_outliers)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for seed in range(3):
            vitviz.rollout(tiny_model(), [picture(64, 64, seed=seed)])
    told = [str(each.message) for each in caught]
    assert len([text for text in told if text.startswith(Caveat.OUTLIERS.value[0])]) == 1


# Values in Python


@pytest.mark.parametrize(
    "classes",
    [
        *(3, np.int64(3), np.uint8(3), torch.tensor(3), np.array(3), 3.0, np.float32(3), "3"),
        *([3], np.array([3]), torch.tensor([3]), (np.int64(3),), {3}, range(3, 4), "c 3"[2:]),
    ],
    ids=repr,
)
def test_class_may_be_any_kind_of_whole_number(classes: Any) -> None:
    (found,) = vitviz.grad_rollout(tiny_model(), [picture(64, 64)], classes=classes)
    assert found.class_index == 3


@pytest.mark.parametrize(
    "options",
    [
        *({"refine": 2.0}, {"refine": np.int64(2)}, {"discard": np.float32(0.5)}, {"discard": 0}),
        *({"start_layer": torch.tensor(1)}, {"batch_size": np.int8(2)}, {"batch_size": 1.0}),
        *({"head_fusion": "mean"}, {"head_fusion": HeadFusion.MIN}),
        {"pictures": PictureOptions(alpha=np.float32(0.5), max_size=64.0)},  # type: ignore[arg-type]
    ],
    ids=repr,
)
def test_numbers_of_other_kinds_are_taken(options: dict[str, Any]) -> None:
    (found,) = vitviz.rollout(tiny_model(), [picture(64, 64)], **options)
    assert found.relevance.any()
    assert all(type(value) in (int, float, str) for value in found.method.to_record().values())
    assert found.overlay().size == (64, 64)


@pytest.mark.parametrize("wrong", ["x", None, [], {}, object(), b"1", 1.5, float("nan"), True])
@pytest.mark.parametrize("name", ["refine", "start_layer", "classes", "batch_size", "discard"])
def test_values_of_no_use_are_refused_by_name(name: str, wrong: Any) -> None:
    if (name, wrong) == ("batch_size", None) or (name, wrong) in [("classes", []), ("classes", {})]:
        return
    with pytest.raises(VitvizError, match=name if wrong != "x" or name != "classes" else "class"):
        vitviz.grad_rollout(tiny_model(), [picture(64, 64)], **{name: wrong})


def test_size_may_be_one_number() -> None:
    for size in (96, np.int64(96), 96.0, [96, 96], (np.int16(96), 96)):
        with pytest.raises(OptionError, match="taken as it is"):
            load_model(tiny_module(), img_size=size)  # type: ignore[arg-type]
    for size in ("96", 0, (1, 2, 3), 9.5, []):
        with pytest.raises(OptionError, match="img_size is"):
            vitviz.load_model(NAME, img_size=size)  # type: ignore[arg-type]


def test_numbers_of_other_kinds_are_taken_by_evaluate() -> None:
    images = [picture(SIZE, SIZE), picture(SIZE, SIZE, seed=1)]
    found = vitviz.evaluate(
        *(tiny_model(), images),
        methods="rollout",  # type: ignore[arg-type]
        target=torch.tensor(3),  # type: ignore[arg-type]
        truth=torch.tensor([3, 4]),  # type: ignore[arg-type]
        seed=np.int64(1),  # type: ignore[arg-type]
        resamples=5.0,  # type: ignore[arg-type]
    )
    assert found.images == 2


@pytest.mark.parametrize("place", [3, "3,3", (1,), (1, 2, 3), (1, 99)])
def test_odd_patches_are_refused(place: Any) -> None:
    with pytest.raises(OptionError, match="query is|query "):
        vitviz.attention(tiny_model(), picture(64, 64), query=place)
    with pytest.raises(OptionError, match="patch is"):
        vitviz.similarity(tiny_model(), picture(64, 64), place)


def test_what_is_no_model_is_refused() -> None:
    for model in (5, Path("folder"), b"deit_tiny"):
        with pytest.raises(OptionError, match="model is .*; give a name"):
            vitviz.load_model(model)  # type: ignore[arg-type]


def test_shape_of_what_is_no_image_is_told() -> None:
    with pytest.raises(ImageError, match=r"expected \(height, width, 3\).*, and got \(3, 96, 96\)"):
        vitviz.rollout(tiny_model(), np.zeros((3, 96, 96), np.uint8))


def test_pictures_are_told_by_words() -> None:
    options = PictureOptions(colormap="viridis", outliers="show", kinds=("panel",))  # type: ignore[arg-type]
    (drawn,) = vitviz.rollout(tiny_model(), picture(64, 64), pictures=options)
    assert drawn.overlay().size == (64, 64)
    assert options.outliers is Outliers.SHOW
    with pytest.raises(OptionError, match="'rainbow' is not one of"):
        PictureOptions(colormap="rainbow")  # type: ignore[arg-type]


def test_scale_may_be_an_array() -> None:
    assert PictureOptions(scale=np.array([0, 10])).scale == PictureOptions(scale="0:10").scale  # type: ignore[arg-type]


@pytest.mark.parametrize("methods", [3, [3], ["rollout", None]])
def test_methods_are_named(methods: Any) -> None:
    for function in (vitviz.compare, vitviz.evaluate):
        with pytest.raises(OptionError, match="methods is .*give the name of a method"):
            function(tiny_model(), picture(64, 64), methods=methods)

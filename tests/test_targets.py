"""What maps are about beside a class: the difference of two, or a score of the user's own."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor
from typer.testing import CliRunner

import vitviz
from comparison import (
    BALANCED,
    EVIDENCE,
    GRADIENTS,
    LINEAR,
    SHARED_EVIDENCE,
    TOLERANCE,
    AnySetting,
    LinearSetting,
    by_hand,
    distance,
    found,
    linear_by_hand,
    loaded,
    reference,
    traced,
)
from fixtures_io import Shell
from fixtures_methods import make_method
from oracles import Array
from tiny import CASES, TinyCase
from vitviz.cli.app import app
from vitviz.errors import LabelError, OptionError
from vitviz.explaining.batch import class_requests, explain_batch
from vitviz.explaining.explanation import Caveat
from vitviz.methods.method import Method
from vitviz.methods.relevance import Relevance
from vitviz.models.labels import Labels, parse_requests
from vitviz.models.model import load_model
from vitviz.runs.provenance import read_provenance

pytestmark = pytest.mark.usefixtures("one_thread")

FAR = 100 * TOLERANCE
OTHER = 0  # the class compared with; no case explains it by number
SCENE = Path(__file__).parents[1] / "sample_images" / "scenes" / "star-ring.png"

each_case = pytest.mark.parametrize("case", CASES, ids=str)
each_setting = pytest.mark.parametrize("setting", [*GRADIENTS, *LINEAR], ids=str)


def versus(setting: AnySetting, case: TinyCase, other: str = str(OTHER)) -> Method:
    """Ask for the classes by number, less another."""
    return replace(setting.options(tuple(map(str, case.classes))), versus=other)


def maps_of(case: TinyCase, method: Method, **others: Any) -> Array:
    return np.asarray(
        explain_batch(loaded(case), case.images(), method, **others).relevance, np.float64
    )


def difference_by_hand(case: TinyCase, setting: AnySetting, other: int = OTHER) -> Array:
    """Compute the maps (batch, 2, rows, cols) of y_c − y_other from the formulas."""
    if isinstance(setting, LinearSetting):
        return linear_by_hand(case, setting, versus=other)[:, :2]
    count = len(traced(case).logits)
    pairs = [([index] * count, [other] * count) for index in case.classes]
    gradients = [traced(case).gradients(*pair) for pair in pairs]
    return by_hand(case, setting, gradient_sets=gradients)


@each_setting
@each_case
def test_map_of_a_difference_equals_reference(case: TinyCase, setting: AnySetting) -> None:
    error = distance(maps_of(case, versus(setting, case)), difference_by_hand(case, setting))
    assert error.shape == (3, 2)
    assert error.max() <= TOLERANCE


@pytest.mark.parametrize("setting", [EVIDENCE, SHARED_EVIDENCE, *BALANCED], ids=str)
@each_case
def test_evidence_of_a_difference_is_the_difference_of_evidence(
    case: TinyCase, setting: LinearSetting
) -> None:
    of_classes = found(case, setting)[:, :2]
    of_other = maps_of(case, setting.options((str(OTHER),)))
    error = distance(maps_of(case, versus(setting, case)), of_classes - of_other)
    assert error.max() <= TOLERANCE


def _without_other(case: TinyCase, setting: AnySetting) -> Array:
    return reference(case, setting)[:, :2]


def _sum(case: TinyCase, setting: AnySetting) -> Array:
    """Add the other logit: a sign forgotten."""
    count = len(traced(case).logits)
    trace = traced(case)
    sets = [
        [
            2 * own - less
            for own, less in zip(
                trace.gradients([index] * count),
                trace.gradients([index] * count, [OTHER] * count),
                strict=True,
            )
        ]
        for index in case.classes
    ]
    return by_hand(case, setting, gradient_sets=sets)


def _turned_round(case: TinyCase, setting: AnySetting) -> Array:
    count = len(traced(case).logits)
    if isinstance(setting, LinearSetting):
        turned = [
            linear_by_hand(case, setting, classes=(OTHER, OTHER), versus=index)[:, 0]
            for index in case.classes
        ]
        return np.stack(turned, axis=1)
    pairs = [([OTHER] * count, [index] * count) for index in case.classes]
    return by_hand(case, setting, gradient_sets=[traced(case).gradients(*pair) for pair in pairs])


def _difference_of_maps(case: TinyCase, setting: AnySetting) -> Array:
    """Subtract maps, which are no linear functions of the logit but in evidence."""
    if isinstance(setting, LinearSetting):
        other = linear_by_hand(case, setting, classes=(OTHER, OTHER))[:, :1]
    else:
        count = len(traced(case).logits)
        other = by_hand(case, setting, gradient_sets=[traced(case).gradients([OTHER] * count)])
    return reference(case, setting)[:, :2] - other


@pytest.mark.usefixtures("large")
@pytest.mark.parametrize(
    ("mistake", "settings"),
    [
        (_without_other, (*GRADIENTS, *LINEAR)),
        (_turned_round, (*GRADIENTS, *LINEAR)),
        (_sum, GRADIENTS),
        (_difference_of_maps, (*GRADIENTS, *LINEAR[:2])),
    ],
)
def test_mistakes_are_far_from_the_package(
    mistake: Callable[[TinyCase, AnySetting], Array], settings: tuple[AnySetting, ...]
) -> None:
    for setting in settings:
        seen = [
            distance(maps_of(case, versus(setting, case)), mistake(case, setting)).max() > FAR
            for case in CASES[::3]
        ]
        assert sum(seen) >= len(seen) - 1, setting


@pytest.mark.parametrize("setting", [GRADIENTS[1], *LINEAR], ids=str)
@pytest.mark.parametrize("sign", [1, 0, -1])
def test_planted_sign_is_seen(
    setting: AnySetting, sign: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The package with the other logit taken away is right, and left out or added it is not."""

    def scores(output: Tensor, classes: Tensor, requests: object) -> Tensor:
        own, other = (output.gather(1, each) for each in classes.unbind(dim=2))
        return own - sign * other

    monkeypatch.setattr("vitviz.explaining.batch.scores_of", scores)
    errors = [
        distance(maps_of(case, versus(setting, case)), difference_by_hand(case, setting)).max()
        for case in CASES[:3]
    ]
    assert (max(errors) <= TOLERANCE) == (sign == 1)


@each_setting
def test_ranks_of_each_image_are_compared(setting: AnySetting) -> None:
    case = next(case for case in CASES if len(set(traced(case).top_class())) > 1)
    method = replace(setting.options(("top1",)), versus="top2")
    best = np.argsort(-traced(case).logits, axis=1)
    whole = maps_of(case, method)
    for image, (first, second) in enumerate(best[:, :2].tolist()):
        asked = replace(setting.options((str(first),)), versus=str(second))
        assert distance(whole[[image]], maps_of(case, asked)[[image]]).max() <= 1e-5


@pytest.mark.parametrize("setting", [GRADIENTS[1], *LINEAR], ids=str)
def test_refined_maps_keep_the_ranks_of_the_untouched_image(setting: AnySetting) -> None:
    case = CASES[-1]
    best = np.argsort(-traced(case).logits, axis=1)
    ranked = replace(setting.options(("top1",)), versus="top2", refine=2)
    whole = maps_of(case, ranked, at_once=5)
    for image, (first, second) in enumerate(best[:, :2].tolist()):
        asked = replace(setting.options((str(first),)), versus=str(second), refine=2)
        assert distance(whole[[image]], maps_of(case, asked)[[image]]).max() <= 1e-5


@each_setting
def test_pairs_can_be_given_for_each_image(setting: AnySetting) -> None:
    case = CASES[0]
    pairs = torch.tensor([[[2, 0]], [[5, 0]], [[0, 2]]])
    given = maps_of(case, setting.options(), class_indices=pairs)
    for image, ((own, other),) in enumerate(pairs.tolist()):
        asked = replace(setting.options((str(own),)), versus=str(other))
        assert distance(given[[image]], maps_of(case, asked)[[image]]).max() <= 1e-5


@each_setting
@pytest.mark.parametrize("case", CASES[::4], ids=str)
def test_class_that_is_its_own_other_gives_nothing(case: TinyCase, setting: AnySetting) -> None:
    best = traced(case).top_class()[0]
    method = replace(setting.options(("top1",)), versus=str(best))
    assert not maps_of(case, method)[0].any()


@each_setting
@pytest.mark.parametrize("case", CASES[::4], ids=str)
def test_target_of_ones_own_equals_the_difference(case: TinyCase, setting: AnySetting) -> None:
    method = setting.options()
    requests = class_requests(loaded(case), method, lambda y: y[:, case.classes[0]] - y[:, OTHER])
    own = maps_of(case, method, requests=requests)
    assert distance(own, difference_by_hand(case, setting)[:, :1]).max() <= TOLERANCE


@pytest.mark.parametrize("setting", [GRADIENTS[0], *LINEAR], ids=str)
def test_target_need_not_be_linear(setting: AnySetting) -> None:
    """∂p_c = p_c (∂y_c − Σ p_k ∂y_k): each image gets its own factors."""
    case, method = CASES[0], setting.options()
    logits = torch.from_numpy(traced(case).logits)
    chances = logits.softmax(dim=1)
    weights = chances[:, 2:3] * (torch.eye(7)[2] - chances)
    requests = class_requests(loaded(case), method, lambda y: y.softmax(dim=1)[:, 2])
    whole = maps_of(case, method, requests=requests)
    for image, weight in enumerate(weights.float()):
        linear = class_requests(loaded(case), method, lambda y, w=weight: (y * w).sum(dim=1))
        alone = maps_of(case, method, requests=linear)
        assert distance(whole[[image]], alone[[image]]).max() <= TOLERANCE


def _pictures(count: int = 3) -> list[np.ndarray]:
    return list(np.random.default_rng(0).integers(0, 256, (count, 40, 40, 3), dtype=np.uint8))


def margin(logits: Tensor) -> Tensor:
    return logits[:, 2] - logits[:, 0]


def test_python_takes_both() -> None:
    model, pictures = loaded(CASES[0]), _pictures()
    pairs = vitviz.evidence(model, pictures, classes=2, versus=0)
    own = vitviz.evidence(model, pictures, target=margin)
    for pair, mine in zip(pairs, own, strict=True):
        np.testing.assert_allclose(pair.relevance, mine.relevance, atol=1e-5)
        assert (pair.request, pair.class_index, pair.versus_index) == ("c2-vs-c0", 2, 0)
        assert (mine.request, mine.class_index, mine.versus_index) == ("margin", None, None)
        chances = {each.class_index: each.score for each in pair.predictions}
        assert mine.class_score == pytest.approx(
            float(np.log(pair.class_score / pair.versus_score)), abs=1e-4
        )
        assert chances.get(2, pair.class_score) == pair.class_score
        assert pair.caption.startswith("evidence: class 2 (")
        assert " versus class 0 (" in pair.caption
        assert mine.caption == f"evidence: margin ({mine.class_score:.3g})"
    assert vitviz.evidence(model, pictures[:1], target=lambda y: y[:, 1])[0].request == "target"


@pytest.mark.parametrize(
    ("target", "said"),
    [
        (lambda y: y[:, 1].sum(), r"makes \(\) of \(2, 7\)"),
        (lambda y: y, r"makes \(2, 7\) of"),
        (lambda y: y.argmax(dim=1), "no gradient"),
        (lambda y: y.detach()[:, 1], "no gradient"),
        (lambda y: torch.ones(2, requires_grad=True), "no gradient"),
        (lambda y: y[:, 1] - y[:, 1].mean(), "mixes the images"),
        (lambda y: [1.0, 2.0], "gives list"),
        (3, "target is 3; give a function"),
    ],
)
def test_target_that_is_none_is_refused_in_one_line(target: Any, said: str) -> None:
    with pytest.raises(OptionError, match=said) as refusal:
        vitviz.relevance(loaded(CASES[0]), _pictures(1), target=target)
    assert "\n" not in str(refusal.value)


def test_target_stands_alone() -> None:
    model = loaded(CASES[0])
    for others in ({"classes": 2}, {"versus": 2}):
        with pytest.raises(OptionError, match="leave classes and versus out"):
            vitviz.relevance(model, _pictures(1), target=margin, **others)
    with pytest.raises(TypeError, match="target"):
        vitviz.rollout(model, _pictures(1), target=margin)
    with pytest.raises(TypeError, match="versus"):
        vitviz.attention(model, _pictures(1), versus=1)


LABELS = Labels(names=("cat, tabby", "dog", "fox"))


def test_other_class_is_part_of_the_name() -> None:
    def keys(*words: str, other: str) -> list[str]:
        return [each.key for each in parse_requests(words, LABELS, 3, other)]

    assert keys("dog", other="tabby") == ["c1-vs-c0"]
    assert keys("dog", "2", other="0") == ["c1-vs-c0", "c2-vs-c0"]
    assert keys("top1", other="top2") == ["top1-vs-top2"]
    assert keys("top2", other="fox") == ["top1-vs-c2", "top2-vs-c2"]


@pytest.mark.parametrize(
    ("word", "other", "said"),
    [
        ("dog", "1", "--versus 1 is a class that --class asks for"),
        ("top2", "top1", "--versus top1 is a class that --class asks for"),
        ("dog", "wolf", "--versus 'wolf' is no label"),
        ("dog", "3", "--versus 3 is outside this model's classes 0 … 2"),
        ("dog", "top4", "--versus top4, but this model has 3 classes"),
    ],
)
def test_other_class_that_is_none_is_refused(word: str, other: str, said: str) -> None:
    with pytest.raises(LabelError) as refusal:
        parse_requests([word], LABELS, 3, other)
    assert said in str(refusal.value)


@pytest.fixture
def shell(capfdbinary: Any, monkeypatch: pytest.MonkeyPatch) -> Shell:
    return Shell(capfdbinary, monkeypatch)


def _run(*words: str) -> Any:
    return CliRunner().invoke(app, [*words, "-m", "demo", "--device", "cpu"])


@pytest.mark.slow
@pytest.mark.parametrize("method", ["grad-rollout", "relevance", "evidence"])
def test_command_writes_names_records_and_provenance(method: str, tmp_path: Path) -> None:
    words = (method, str(SCENE), "--class", "star", "--versus", "ring", "-o", str(tmp_path))
    told = _run(*words, "--save", "npy", "--save", "panel", "--json")
    assert told.exit_code == 0, told.output
    record = json.loads(told.stdout)
    (array, picture) = (Path(each["path"]) for each in record["outputs"])
    assert array.name == f"star-ring.png.{method}.c0-vs-c1.npy"
    for each in record["outputs"]:
        assert (each["class_index"], each["class_label"]) == (0, "star")
        assert (each["versus_index"], each["versus_label"]) == (1, "ring")
    assert record["run"]["options"]["class"] == ["star"]
    assert record["run"]["options"]["versus"] == "ring"
    made = read_provenance(picture)
    assert made is not None
    assert (made.versus_index, made.versus_label) == (1, "ring")
    with Image.open(SCENE) as scene:
        pixels = np.asarray(scene.convert("RGB"))
    function = getattr(vitviz, method.replace("-", "_"))
    (mine,) = function(load_model("demo", device="cpu"), [pixels], classes="star", versus="ring")
    np.testing.assert_allclose(np.load(array), mine.relevance, atol=1e-6)
    assert mine.caption.startswith(f"{method}: star (")
    assert " versus ring (" in mine.caption
    again = _run(*words, "--save", "npy", "--save", "panel", "--json", "--skip-existing")
    skipped = json.loads(again.stdout)
    assert skipped["status"] == "skipped"
    assert skipped["outputs"] == record["outputs"]
    other = _run(*words[:-3], "cross", "-o", str(tmp_path), "--save", "npy", "--skip-existing")
    assert "c0-vs-" in other.stdout
    assert "1 written" in other.stderr


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("--class", "star", "--versus", "0"), "--versus 0 is a class that --class asks for"),
        (("--versus", "wolf"), "--versus 'wolf' is no label of this model"),
    ],
)
def test_other_class_that_is_none_ends_in_one_line(
    words: tuple[str, ...], said: str, tmp_path: Path, shell: Shell
) -> None:
    places = ("-m", "demo", "--device", "cpu", "-o", tmp_path)
    told = shell("evidence", SCENE, *words, *places)
    assert told.code == 2
    assert said in told.complaints[-1]
    assert not told.out
    assert shell("rollout", SCENE, "--versus", "ring", *places).code == 2


def test_class_of_each_sample_is_compared_too() -> None:
    model, pictures = loaded(CASES[0]), _pictures(3)
    method = make_method("evidence", versus="0")
    samples = vitviz.load_samples(model, pictures)
    classes = [2, 5, 2]
    made = vitviz.explain_samples(model, samples, method, class_indices=classes)
    for item, picture, index in zip(made, pictures, classes, strict=True):
        (alone,) = vitviz.evidence(model, [picture], classes=index, versus=0)
        assert item.maps[0].request == alone.request == f"c{index}-vs-c0"
        np.testing.assert_allclose(item.maps[0].relevance, alone.relevance, atol=1e-5)


def test_nothing_is_said_of_another_class_where_none_is_asked_for(tmp_path: Path) -> None:
    told = _run("evidence", str(SCENE), "-o", str(tmp_path), "--json")
    assert "versus" not in told.stdout
    assert b"versus" not in next(tmp_path.rglob("*.png")).read_bytes()


def test_evidence_of_two_shapes_points_at_both() -> None:
    """Red on the star, blue on the ring: what is there for one is there against the other."""
    model = load_model("demo", device="cpu")
    (pair,) = vitviz.evidence(model, [SCENE], classes="star", versus="ring")
    star, ring = vitviz.evidence(model, [SCENE], classes=["star", "ring"])
    np.testing.assert_allclose(
        pair.relevance, star.relevance - ring.relevance, atol=1e-4 * np.ptp(pair.relevance)
    )
    assert np.unravel_index(pair.relevance.argmin(), pair.relevance.shape) == np.unravel_index(
        ring.relevance.argmax(), ring.relevance.shape
    )


def test_class_compared_with_itself_is_warned_of() -> None:
    model = load_model("demo", device="cpu")
    best = vitviz.rollout(model, [SCENE])[0].predictions[0].class_index
    with pytest.warns(UserWarning, match=Caveat.SAME.value[1]):
        (nothing,) = vitviz.relevance(model, [SCENE], versus=best)
    assert nothing.caveats() == [Caveat.SAME]
    assert not nothing.relevance.any()


def test_evaluation_measures_the_two_alone() -> None:
    model, pictures = loaded(CASES[0]), _pictures(5)
    made = vitviz.evaluate(
        model, pictures, methods=["evidence"], target=2, versus=0, convention="chefer2021"
    )
    for picture, measured in zip(pictures, made.measurements, strict=True):
        (case,) = measured.cases
        assert (case.class_index, case.versus_index) == (2, 0)
        y = vitviz.evidence(model, [picture], target=margin)[0].class_score
        curves = case.curves["evidence"]
        assert curves.score[:, 0] == pytest.approx(1 / (1 + np.exp(-y)), abs=1e-5)
        np.testing.assert_array_equal(curves.accuracy, curves.score > 0.5)
    record = made.to_dict()
    assert record["options"]["versus"] == "0"
    assert record["cases"][0]["versus_index"] == 0
    assert "compared with 0" in record["convention"]["in_words"]["class"]
    assert "rather than 0" in record["convention"]["in_words"]["deletion"]
    plain = vitviz.evaluate(model, pictures, methods=["evidence"], target=2, resamples=20)
    assert "versus" not in json.dumps({**plain.to_dict(), "methods": {}})


def test_evaluation_explains_the_two_with_every_method(monkeypatch: pytest.MonkeyPatch) -> None:
    import vitviz.explaining.samples as explaining

    model, pictures, seen = loaded(CASES[0]), _pictures(2), []
    real = explaining.explain_batch

    def explain(*words: Any, **others: Any) -> Any:
        maps = real(*words, **others)
        seen.append(None if maps.targets is None else maps.targets.tolist())
        return maps

    monkeypatch.setattr(explaining, "explain_batch", explain)
    vitviz.evaluate(model, pictures, methods=["rollout", "relevance"], target=5, versus="top1")
    best = [each.predictions[0].class_index for each in vitviz.rollout(model, pictures)]
    assert [[[5, index]] for index in best] in seen
    assert None in seen


def test_evaluation_names_images_whose_two_classes_are_one() -> None:
    model, pictures = loaded(CASES[0]), _pictures(3)
    best = vitviz.rollout(model, pictures[:1])[0].predictions[0].class_index
    made = vitviz.evaluate(model, pictures, methods=["rollout"], versus=best, resamples=20)
    assert f"class {best} compared with itself" in str(made.measurements[0].error)
    with pytest.raises(LabelError, match="a class less itself is nothing"):
        vitviz.evaluate(model, pictures, target=best, versus=best)


def test_evaluate_takes_it_on_the_command_line() -> None:
    told = _run(
        *("evaluate", str(SCENE), "--class", "star", "--versus", "ring", "--methods", "evidence"),
        "--json",
    )
    assert told.exit_code == 0, told.output
    record = json.loads(told.stdout)
    assert record["options"]["versus"] == "ring"
    assert record["cases"][0]["versus_label"] == "ring"


def test_target_is_no_part_of_a_method() -> None:
    assert "target" not in Relevance().to_record()
    assert "versus" not in Relevance(versus="2").to_record()

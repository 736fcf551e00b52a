"""Methods side by side: right where the answer is known, reproducible, and told as promised."""

from __future__ import annotations

import csv
import importlib.util
import io
import json
import re
from dataclasses import replace
from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from matplotlib import rc_context, rcParams
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from matplotlib.pyplot import get_fignums
from PIL import Image
from torch import Tensor

import vitviz
from fixtures_io import (
    LABELS,
    NAME,
    ROOT,
    SIZE,
    Run,
    Shell,
    picture,
    save_pictures,
    save_tiny,
    tiny_model,
    tiny_module,
)
from tests.demo_model import CLASSES as DEMO_CLASSES
from vitviz.cli import reporter as reporting
from vitviz.errors import LabelError, OptionError, OutputError, UnsupportedModelError
from vitviz.evaluation import measuring as examination
from vitviz.evaluation import plot
from vitviz.evaluation.files import draw_curves
from vitviz.evaluation.options import EvaluationOptions
from vitviz.evaluation.perturbation import PERTURBATIONS
from vitviz.evaluation.summary import CSV_HEADER, METRICS, Evaluation
from vitviz.explaining import samples as explaining
from vitviz.explaining.batch import BatchMaps, explain_batch
from vitviz.images.sources import Source
from vitviz.methods.table import named_method, variants
from vitviz.models.model import Model, load_model
from vitviz.options import Convention
from vitviz.runs.provenance import read_provenance

pytestmark = pytest.mark.usefixtures("one_thread")

SCENES = ROOT / "sample_images" / "scenes"
MASKS = SCENES / ".masks"


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Options that choose the tiny model, and few methods and resamples."""
    folder = tmp_path_factory.mktemp("kept")
    weights, labels = save_tiny(folder / "tiny.safetensors"), folder / "labels.txt"
    labels.write_text("\n".join(LABELS), encoding="utf-8")
    model = ["-m", NAME, "--img-size", str(SIZE), "--weights", str(weights)]
    few = ["--methods", "rollout", "--methods", "grad-rollout", "--bootstrap", "50"]
    return [*model, "--labels", str(labels), "--device", "cpu", *few]


@cache
def demo() -> Model:
    return vitviz.load_model("demo", device="cpu")


def mean(found: Evaluation, method: str, metric: str) -> float:
    (method,) = (each for each in found.methods if each.name == method)
    return method.summaries[metric].interval.mean


def pictures(count: int) -> list[Image.Image]:
    return [picture(SIZE, SIZE, seed=seed) for seed in range(count)]


def corner_masks(count: int) -> list[np.ndarray[Any, Any]]:
    """A quarter of each image is object."""
    masks = [np.zeros((SIZE, SIZE), dtype=np.uint8) for _ in range(count)]
    for number, mask in enumerate(masks):
        row, col = (SIZE // 2 * (number >> bit & 1) for bit in (0, 1))
        mask[row : row + SIZE // 2, col : col + SIZE // 2] = 1
    return masks


# What must come out


@pytest.mark.slow
def test_mask_as_a_map_beats_everything(monkeypatch: pytest.MonkeyPatch) -> None:
    """In the place of rollout's, maps are given that show the object asked for, and no more."""
    scores: dict[str, list[dict[str, float]]] = {}
    for path in sorted(SCENES.glob("*.png"))[:4]:
        values = np.asarray(Image.open(MASKS / path.name))
        for value in np.unique(values[values > 0]).tolist():
            mask = values == value
            share = mask.reshape(12, 32, 12, 32).mean(axis=(1, 3))  # of each patch
            monkeypatch.setattr(explaining, "explain_batch", showing(share))
            found = vitviz.evaluate(
                demo(), [path], methods=["rollout", "evidence"], masks=[mask], target=value - 1
            )
            for name, of_map in found.measurements[0].cases[0].scores.items():
                scores.setdefault(name, []).append(dict(of_map))
    assert len(scores["rollout"]) > 8
    for metric in METRICS:
        if metric.name in ("specificity", "class_correlation"):  # one mask at a time, one map
            continue
        best, *others = (
            np.mean([each[metric.name] for each in scores[name]]) * (-1 if metric.lower else 1)
            for name in ("rollout", "random", "centre", "evidence")
        )
        rivals = (
            others if metric.table == "localisation" else others[:2]
        )  # the model's own view is its own
        assert best > max(rivals), metric.name
    assert mean_of(scores["rollout"], "pointing") >= 0.9  # a patch is wider than a ring's line
    assert mean_of(scores["rollout"], "average_precision") > 0.8


def showing(share: np.ndarray[Any, Any]) -> Any:
    """Make an ``explain_batch`` that shows one map in the place of rollout's."""

    def explain(model: Model, images: Tensor, options: Any, **others: Any) -> BatchMaps:
        found = explain_batch(model, images, options, **others)
        if options != variants()["rollout"]:
            return found
        given = torch.from_numpy(share).float().expand_as(found.relevance)
        return replace(found, relevance=given)

    return explain


def mean_of(scores: list[dict[str, float]], metric: str) -> float:
    return float(np.mean([each[metric] for each in scores]))


@pytest.mark.slow
def test_random_map_scores_what_a_random_map_must() -> None:
    found = vitviz.evaluate(
        tiny_model(), pictures(60), methods=["rollout"], masks=corner_masks(60), resamples=500
    )
    assert found.masked == 60
    random = found.methods[0]
    assert random.name == "random"
    for metric, within in (("energy", 0.02), ("pointing", 0.15)):
        assert random.summaries[metric].interval.mean == pytest.approx(0.25, abs=within)
    difference = random.summaries["difference"].interval
    assert difference.low < 0 < difference.high


@pytest.mark.slow
def test_class_specific_maps_fall_on_the_object_asked_for() -> None:
    paths = sorted(SCENES.glob("*.png"))[:5]
    found = vitviz.evaluate(
        demo(), paths, methods=["rollout", "evidence"], masks=MASKS, target="mask"
    )
    cases = [case for each in found.measurements for case in each.cases]
    assert len(cases) > 10
    asked = [1 / len(each.cases) for each in found.measurements for _ in each.cases]
    assert mean(found, "rollout", "specificity") == pytest.approx(np.mean(asked))  # knows no class
    assert mean(found, "evidence", "specificity") > 0.9
    for measurement in found.measurements:
        named = {DEMO_CLASSES[each.class_index] for each in measurement.cases}
        assert named == set(measurement.source.path.stem.split("-"))
        assert len({case.scores["rollout"]["deletion"] for case in measurement.cases}) > 1


def test_known_class_is_explained_by_all_methods() -> None:
    """The scores of forced classes are those of the same classes asked for in words."""
    drawn = torch.Generator().manual_seed(0)
    model, images = tiny_model(), torch.randn(5, 3, SIZE, SIZE, generator=drawn)
    classes = torch.tensor([[4], [0], [6], [1], [1]])
    for name in ("grad-rollout", "relevance", "evidence"):
        forced = explain_batch(model, images, named_method(name).method, class_indices=classes)
        assert torch.equal(forced.class_indices, classes)
        for row, class_index in enumerate(classes[:, 0].tolist()):
            asked = replace(named_method(name).method, classes=(str(class_index),))
            alone = explain_batch(model, images[row : row + 1], asked).relevance[0, 0]
            assert torch.allclose(forced.relevance[row, 0], alone, atol=1e-5 * float(alone.max()))


def test_same_seed_gives_the_same_numbers_and_another_does_not() -> None:
    def numbers(seed: int, batch_size: int | None = None) -> list[float]:
        found = vitviz.evaluate(
            tiny_model(),
            pictures(5),
            methods=["rollout"],
            masks=corner_masks(5),
            seed=seed,
            batch_size=batch_size,
            resamples=50,
        )
        return [
            value
            for method in found.methods
            for summary in method.summaries.values()
            for value in (summary.interval.mean, summary.interval.low, summary.interval.high)
        ]

    first = numbers(3)
    assert first == numbers(3)
    assert numbers(3, batch_size=2) == pytest.approx(first, abs=1e-5)
    assert numbers(4) != first


@pytest.mark.slow
def test_random_map_hangs_on_the_image_and_not_on_its_place() -> None:
    def energies(images: list[Image.Image]) -> list[float]:
        masks = [corner_masks(1)[0]] * len(images)
        found = vitviz.evaluate(tiny_model(), images, methods=["rollout"], masks=masks)
        return [each.cases[0].scores["random"]["energy"] for each in found.measurements]

    images = pictures(4)
    assert energies(images) == energies(images[::-1])[::-1]
    assert len(set(energies(images))) == 4


# Masks, classes, truth


def test_localisation_counts_the_images_that_have_a_mask() -> None:
    masks: list[Any] = corner_masks(5)
    masks[1], masks[3] = None, np.zeros((SIZE, SIZE), dtype=np.uint8)
    found = vitviz.evaluate(tiny_model(), pictures(5), methods=["rollout"], masks=masks)
    assert (found.images, found.masked, found.failed) == (5, 3, ())
    counts = {name: each.images for name, each in found.methods[2].summaries.items()}
    assert counts["deletion"] == 5
    assert counts["energy"] == 3
    assert "specificity" not in counts


def test_truth_is_what_counts_as_right() -> None:
    model, images = tiny_model(), pictures(6)
    predicted = [
        each.cases[0].class_index
        for each in vitviz.evaluate(model, images, methods=["rollout"]).measurements
    ]
    wrong = [(each + 1) % 7 for each in predicted]
    options: dict[str, Any] = {"methods": ["grad-rollout"], "convention": "chefer2021"}
    plain = vitviz.evaluate(model, images, **options)
    for method in plain.methods:
        assert method.accuracy[:, 0].tolist() == [1, 1]  # untouched, the prediction is right
    mistaken = vitviz.evaluate(model, images, truth=wrong, **options)
    for method, before in zip(mistaken.methods, plain.methods, strict=True):
        assert method.accuracy[:, 0].tolist() == [0, 0]
        assert np.array_equal(method.score, before.score)  # maps explain as before
    asked = vitviz.evaluate(model, images, truth=wrong, target="truth", **options)
    assert [each.cases[0].class_index for each in asked.measurements] == wrong
    assert "true class" in asked.explanations["positive"]
    assert "class explained" in plain.explanations["positive"]


@pytest.mark.parametrize("fit", ["squash", "crop", "native"])
def test_images_and_masks_of_many_shapes_go_together(fit: str) -> None:
    model = load_model(tiny_module(dynamic_img_size=True), device="cpu")
    images = [picture(*size, seed=0) for size in ((50, 90), (90, 50), (70, 70), (50, 90))]
    masks = []
    for image in images:
        mask = np.zeros((image.height, image.width), dtype=np.uint8)
        mask[: image.height // 2] = 1
        masks.append(mask)
    found = vitviz.evaluate(model, images, methods=["rollout", "relevance@2"], masks=masks, fit=fit)
    assert not found.failed
    assert found.masked == 4
    first, *_, last = (each.cases[0] for each in found.measurements)
    for name, scores in first.scores.items():
        assert last.scores[name] == pytest.approx(scores, abs=1e-5)


def test_overflow_fails_the_image_and_names_the_method(monkeypatch: pytest.MonkeyPatch) -> None:
    def explain(model: Model, images: Tensor, options: Any, **others: Any) -> BatchMaps:
        found = explain_batch(model, images, options, **others)
        if options == named_method("grad-rollout").method:
            found.relevance[1] = float("nan")
        return found

    monkeypatch.setattr(explaining, "explain_batch", explain)
    found = vitviz.evaluate(tiny_model(), pictures(3), methods=["rollout", "grad-rollout"])
    (failed,) = found.failed
    assert failed.source.key == "image 1"
    assert "not finite with grad-rollout" in str(failed.error)
    assert found.images == 2


def test_short_memory_halves_the_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model()
    forward = model.module.forward

    def run_short(batch: Tensor) -> Tensor:
        if len(batch) > 2:
            torch.empty(1 << 46)
        return forward(batch)  # type: ignore[no-any-return]

    plain = vitviz.evaluate(model, pictures(5), methods=["rollout"])
    monkeypatch.setattr(model.module, "forward", run_short)
    with pytest.warns(UserWarning, match="not enough memory"):
        short = vitviz.evaluate(model, pictures(5), methods=["rollout"], batch_size=5)
    assert not short.failed
    assert mean(short, "rollout", "deletion") == pytest.approx(mean(plain, "rollout", "deletion"))


# What does not fit


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"methods": ("lime",)}, "lime is unknown; choose among rollout.*legrad, gradcam"),
        ({"methods": ("rollout@",)}, "rollout@ is unknown"),
        ({"methods": ("rollout@0",)}, "--refine is 0"),
        ({"seed": -1}, "--seed is -1"),
        ({"resamples": 0}, "--bootstrap is 0"),
        ({"batch_size": 0}, "--batch-size is 0"),
    ],
)
def test_options_outside_their_range_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(OptionError, match=message):
        EvaluationOptions(**options)


@pytest.mark.parametrize(
    ("target", "error", "message"),
    [
        ("top3", OptionError, "several classes"),
        ("mask", OptionError, "nothing to go by"),
        ("truth", OptionError, "nothing to go by"),
        ("7", LabelError, "outside"),
        ("nonsense", LabelError, "^target"),
        ([3, 5], OptionError, r"target is \[3, 5\]; give one index"),
        ([], OptionError, "target is"),
    ],
)
def test_class_that_cannot_be_explained_is_refused(
    target: Any, error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        vitviz.evaluate(tiny_model(), pictures(1), target=target)


def test_numbers_of_images_and_masks_must_agree() -> None:
    with pytest.raises(OptionError, match="2 images, 1 masks"):
        vitviz.evaluate(tiny_model(), pictures(2), masks=corner_masks(1))


def test_model_without_a_head_has_no_score_to_measure_by() -> None:
    model = load_model(tiny_module(classes=0), device="cpu")
    with pytest.raises(OptionError, match="no classification head"):
        vitviz.evaluate(model, pictures(1))


def test_commas_part_methods() -> None:
    options = EvaluationOptions(methods=("evidence, rollout@2", "relevance"))
    assert options.methods == ("evidence", "rollout@2", "relevance")


def test_baselines_are_always_there_and_methods_that_suit_by_default() -> None:
    options = EvaluationOptions(methods=("evidence", "evidence"))
    assert examination.method_names(tiny_model(), options) == ("random", "centre", "evidence")
    all_of_them = examination.method_names(tiny_model(), EvaluationOptions())
    assert all_of_them == ("random", "centre", *variants())


# The command


def columns(done: Run) -> list[str]:
    return done.out.decode().splitlines()


def test_table_names_methods_metrics_and_conventions(shell: Shell, tiny: list[str]) -> None:
    save_pictures(Path("p"), ["a.png", "b.png", "c.png"])
    done = shell("evaluate", "p", "--explain", *tiny)
    assert done.code == 0
    lines = columns(done)
    assert max(map(len, lines)) <= 80
    assert not any(line != line.rstrip() for line in lines)
    text = done.out.decode()
    for word in ("random", "centre", "rollout", "grad-rollout", "deletion", "cost", "Faithfulness"):
        assert word in text
    assert "10, 20, 30, 40, 50, 60, 70, 80, 90 % of the patches" in text
    assert "bootstrap" in text
    assert "Localisation" not in text
    assert done.err.splitlines()[0].startswith("Using ")
    assert "3 measured, 0 failed" in done.err


def test_table_of_one_image_has_means_and_no_intervals(shell: Shell, tiny: list[str]) -> None:
    save_pictures(Path("p"), ["a.png"])
    text = shell("evaluate", "p", *tiny).out.decode()
    scores = text[text.index("random") : text.index("Class sensitivity")]
    assert scores.count("rollout") == 2
    assert scores.count(".") > 20
    assert not {"–", "?"} & set(scores)
    assert "nan" not in scores


def test_json_is_one_document_with_everything(shell: Shell, tiny: list[str]) -> None:
    save_pictures(Path("p"), ["a.png", "b.png", "c.png"])
    done = shell("evaluate", "p", "--json", *tiny)
    (document,) = done.records
    assert document["images"] == 3
    assert document["failed"] == []
    assert document["convention"]["name"] == "vitviz"
    assert document["convention"]["shares"][0] == 0.1
    assert set(document["methods"]) == {"random", "centre", "rollout", "grad-rollout"}
    rollout = document["methods"]["rollout"]
    assert rollout["cost"] > 0
    assert rollout["options"]["discard"] == 0.9
    deletion = rollout["metrics"]["deletion"]
    assert deletion["low"] <= deletion["mean"] <= deletion["high"]
    assert set(deletion["versus"]) == {"random", "centre"}
    curve = rollout["curves"]["probability"]["most_relevant_first"]
    assert len(curve) == 9
    area = float(np.sum((np.array(curve)[1:] + np.array(curve)[:-1]) / 2) * 0.1 / 0.8)
    assert deletion["mean"] == pytest.approx(area)
    assert document["versions"]["vitviz"] == vitviz.__version__
    assert len(document["weights"]["sha256"]) == 64
    assert [each["source"] for each in document["cases"]] == ["p/a.png", "p/b.png", "p/c.png"]


def test_csv_has_a_line_for_each_map_whose_means_are_the_table_s(
    shell: Shell, tiny: list[str]
) -> None:
    save_pictures(Path("p"), ["a.png", "b.png"])
    done = shell("evaluate", "p", "--json", "--csv", "out/n.csv", *tiny)
    assert done.code == 0
    text = Path("out/n.csv").read_text(encoding="utf-8")
    rows = list(csv.DictReader(io.StringIO(text)))
    assert text.splitlines()[0] == CSV_HEADER
    assert [(row["source"], row["method"]) for row in rows] == [
        (f"p/{name}.png", method)
        for name in "ab"
        for method in ("random", "centre", "rollout", "grad-rollout")
    ]
    assert all(row["energy"] == "" for row in rows)
    means = done.records[0]["methods"]["rollout"]["metrics"]
    found = [float(row["deletion"]) for row in rows if row["method"] == "rollout"]
    assert np.mean(found) == pytest.approx(means["deletion"]["mean"])


@pytest.mark.slow
def test_plot_is_a_picture_that_vitviz_knows_as_its_own(shell: Shell, tiny: list[str]) -> None:
    save_pictures(Path("p"), ["a.png"])
    assert shell("evaluate", "p", "--plot", "p/curves.png", *tiny).code == 0
    with Image.open("p/curves.png") as plot:
        pixels = np.asarray(plot.convert("RGB"))
    assert pixels.shape[1] > pixels.shape[0] > 300
    assert len(np.unique(pixels.reshape(-1, 3), axis=0)) > 50
    found = read_provenance(Path("p/curves.png"))
    assert found is not None
    assert found.recipe["command"] == "evaluate"
    done = shell("evaluate", "p", "--plot", "p/curves.png", "--json", *tiny)  # no source of it
    assert done.code == 0
    assert done.records[0]["images"] == 1


@pytest.mark.parametrize("option", ["--csv", "--plot"])
def test_file_of_others_is_never_overwritten(shell: Shell, tiny: list[str], option: str) -> None:
    save_pictures(Path("p"), ["a.png"])
    mine = Path("mine.png")
    mine.write_text("source,notes\na,b\n", encoding="utf-8")
    done = shell("evaluate", "p", option, "mine.png", *tiny)
    assert done.code == 2
    assert done.out == b""
    assert "mine.png already exists" in done.err
    assert mine.read_text(encoding="utf-8") == "source,notes\na,b\n"


def test_own_table_is_replaced(shell: Shell, tiny: list[str]) -> None:
    save_pictures(Path("p"), ["a.png"])
    table = Path("n.csv")
    table.write_text(f"{CSV_HEADER}\nold\n", encoding="utf-8")
    assert shell("evaluate", "p", "--csv", "n.csv", *tiny).code == 0
    assert "old" not in table.read_text(encoding="utf-8")
    assert {path.name for path in Path().iterdir()} == {"p", "n.csv"}


def test_bad_image_is_named_and_the_others_are_measured(shell: Shell, tiny: list[str]) -> None:
    save_pictures(Path("p"), ["a.png", "c.png"])
    alone = shell("evaluate", "p", "--json", *tiny).records[0]
    Path("p/b.png").write_bytes(b"no image")
    done = shell("evaluate", "p", "gone.jpg", "--json", *tiny)
    assert done.code == 1
    (document,) = done.records
    assert [each["source"] for each in document["failed"]] == ["p/b.png", "gone.jpg"]
    assert "p/b.png" in done.err
    assert "2 measured, 2 failed" in done.err
    for name, method in document["methods"].items():
        expected = alone["methods"][name]["metrics"]["deletion"]["mean"]
        assert method["metrics"]["deletion"]["mean"] == pytest.approx(expected, abs=1e-5)


def test_nothing_but_bad_images_gives_no_table(shell: Shell, tiny: list[str]) -> None:
    Path("a.png").touch()
    done = shell("evaluate", "a.png", "--csv", "n.csv", "--plot", "c.png", *tiny)
    assert (done.code, done.out) == (1, b"")
    assert not Path("n.csv").exists()
    assert not Path("c.png").exists()
    document = shell("evaluate", "a.png", "--json", *tiny).records[0]
    assert document["images"] == 0


def test_masks_are_found_by_name_and_a_bad_one_fails_its_image(
    shell: Shell, tiny: list[str]
) -> None:
    save_pictures(Path("p"), ["a.png", "b.png", "c.png"])
    save_pictures(Path("m"), ["b.png"])  # in colour: no mask
    mask = np.zeros((48, 64), dtype=np.uint8)
    mask[:, 32:] = 255
    Image.fromarray(mask).save("m/a.png")
    done = shell("evaluate", "p", "--masks", "m", "--json", *tiny)
    (document,) = done.records
    assert done.code == 1
    assert (document["images"], document["masked"]) == (2, 1)
    assert "RGB" in document["failed"][0]["error"]
    energy = document["methods"]["random"]["metrics"]["energy"]
    assert energy["images"] == 1
    assert energy["low"] is energy["high"] is None  # nothing can be said of one image
    table = shell("evaluate", "p", "--masks", "m", *tiny).out.decode()
    assert "Localisation, 1 image with masks" in table


def test_class_of_each_mask_needs_masks_that_name_classes(shell: Shell, tiny: list[str]) -> None:
    save_pictures(Path("p"), ["a.png", "b.png", "c.png"])
    Path("m").mkdir()
    for name, value in (("a", 4), ("b", 255)):
        mask = np.zeros((48, 64), dtype=np.uint8)
        mask[:, 32:] = value
        Image.fromarray(mask).save(f"m/{name}.png")
    done = shell("evaluate", "p", "--masks", "m", "--class", "mask", "--json", *tiny)
    (document,) = done.records
    assert [each["class_index"] for each in document["cases"]] == [3]
    assert document["cases"][0]["class_label"] == "tabby, tabby cat"
    reasons = [each["error"] for each in document["failed"]]
    assert "values from 255 to 255" in reasons[0]
    assert "no mask that names a class" in reasons[1]


def test_true_classes_come_from_a_file(shell: Shell, tiny: list[str]) -> None:
    save_pictures(Path("p"), ["a.png", "b.png"])
    Path("truth.txt").write_text("a.png 5\n", encoding="utf-8")
    words = ["--truth", "truth.txt", "--class", "truth", "--json"]
    done = shell("evaluate", "p", *words, *tiny)
    (document,) = done.records
    assert [(each["class_index"], each["truth"]) for each in document["cases"]] == [(5, 5)]
    assert "no true class" in document["failed"][0]["error"]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--methods", "lime"], "lime is unknown"),
        (["--masks", "gone"], "gone is not a folder"),
        (["--masks", "p/q"], "no PNG of the name"),
        (["--truth", "gone"], "cannot be read"),
        (["--class", "mask"], "nothing to go by"),
        (["--convention", "rise"], "rise"),
        (["--bootstrap", "0"], "--bootstrap is 0"),
        (["--class", "sky", "--class", "3"], "--class is given 2 times"),
        (["--csv", "x.png", "--plot", "./x.png"], "--csv and --plot are both x.png"),
        (["--plot", "x.jpg"], "--plot is x.jpg, but a plot is a PNG"),
    ],
)
def test_mistakes_exit_2_and_say_what_is_wrong(
    shell: Shell, tiny: list[str], words: list[str], message: str
) -> None:
    save_pictures(Path("p"), ["a.png"])
    Path("p/q").mkdir()
    done = shell("evaluate", "p", *tiny, *words)
    assert (done.code, done.out) == (2, b"")
    assert message in done.err


@pytest.mark.slow
def test_conventions_differ(shell: Shell, tiny: list[str]) -> None:
    save_pictures(Path("p"), ["a.png", "b.png"])
    ours, chefers = (
        shell("evaluate", "p", "--convention", name, "--json", *tiny).records[0]
        for name in ("vitviz", "chefer2021")
    )
    assert chefers["convention"]["shares"] == [0.0, *ours["convention"]["shares"]]
    assert chefers["convention"]["unit"] == "pixels"
    assert chefers["convention"]["fill"] == "black"
    curve = chefers["methods"]["rollout"]["curves"]["accuracy"]["most_relevant_first"]
    positive = chefers["methods"]["rollout"]["metrics"]["positive"]["mean"]
    assert positive == pytest.approx(
        sum((a + b) / 20 for a, b in zip(curve, curve[1:], strict=False))
    )


@pytest.mark.slow
def test_symmetric_relevance_gain_is_told_by_its_names(shell: Shell, tiny: list[str]) -> None:
    save_pictures(Path("p"), ["a.png", "b.png"])
    words = ["evaluate", "p", "--convention", "srg", *tiny]
    text = shell(*words).out.decode()
    document = shell(*words, "--json").records[0]
    header = text[text.index("Faithfulness") :].splitlines()[1].split()
    assert header == ["method", "MIF", "LIF", "SRG", "positive", "negative", "cost"]
    assert "deletion" not in text
    rollout = document["methods"]["rollout"]
    curves = rollout["curves"]["logit"]
    most, least = (
        np.array(curves[order]) for order in ("most_relevant_first", "least_relevant_first")
    )
    assert len(most) == len(least) == 11
    assert most[[0, -1]].tolist() == least[[0, -1]].tolist()  # the whole image, and nothing of it
    gain = float(np.sum((least - most)[1:-1])) / 10
    assert rollout["metrics"]["difference"]["mean"] == pytest.approx(gain, abs=1e-5)
    assert document["convention"]["in_words"]["SRG"] == "LIF less MIF"
    assert shell(*words, "--plot", "c.png").code == 0


@pytest.mark.slow
def test_interval_marks_are_those_of_the_differences() -> None:
    found = vitviz.evaluate(demo(), sorted(SCENES.glob("*.png"))[:5], methods=["evidence"])
    for method in found.methods:
        for metric in METRICS:
            summary = method.summaries.get(metric.name)
            if summary is None:
                continue
            assert method.name not in summary.versus
            beaten = [
                each.high < 0 if metric.lower else each.low > 0 for each in summary.versus.values()
            ]
            assert summary.better is all(beaten)
    assert found.methods[2].summaries["deletion"].better


@pytest.mark.slow
def test_difference_to_the_best_method_is_that_of_the_same_images() -> None:
    methods = ["rollout", "grad-rollout", "evidence"]
    found = vitviz.evaluate(demo(), sorted(SCENES.glob("*.png"))[:6], methods=methods, masks=MASKS)
    of_methods = {each.name: each.summaries for each in found.methods}
    for metric in METRICS:
        means = {
            name: summaries[metric.name].interval.mean
            for name, summaries in of_methods.items()
            if metric.name in summaries
        }
        own = {name: means[name] for name in methods if name in means}
        if not own:
            continue
        best = (min if metric.lower else max)(own, key=lambda name: own[name])
        for name in means:
            summary = of_methods[name][metric.name]
            if name == best:
                assert summary.versus_best == {}
                assert summary.near_best
                continue
            (found_best, interval), *others = summary.versus_best.items()
            assert (found_best, others) == (best, [])
            assert interval.mean == pytest.approx(means[name] - means[best])
            assert interval.low <= interval.mean <= interval.high
            assert summary.near_best is (interval.low <= 0 <= interval.high)
    assert not of_methods["rollout"]["difference"].near_best
    record = found.to_dict()["methods"]["rollout"]["metrics"]["difference"]["versus_best"]
    assert record["evidence"]["high"] < 0


def test_table_marks_what_is_not_told_apart_from_the_best(shell: Shell, tiny: list[str]) -> None:
    save_pictures(Path("p"), ["a.png", "b.png", "c.png"])
    text = shell("evaluate", "p", *tiny).out.decode()
    document = shell("evaluate", "p", "--json", *tiny).records[0]
    for name, method in document["methods"].items():
        line = next(line for line in text.splitlines() if line.startswith(f"{name} "))
        cells = dict(zip(("deletion", "insertion"), line.split()[1:], strict=False))
        for metric, cell in cells.items():
            of_best = method["metrics"][metric]["versus_best"].values()
            near = all(each["low"] <= 0 <= each["high"] for each in of_best)
            assert cell.endswith("=") is near
    assert "Neither mark is corrected" in text
    assert "the blob in the" not in text
    Path("m").mkdir()
    mask = np.zeros((48, 64), dtype=np.uint8)
    mask[:, 32:] = 1
    Image.fromarray(mask).save("m/a.png")
    with_masks = shell("evaluate", "p", "--masks", "m", *tiny).out.decode()
    assert "centre alone points well" in with_masks
    assert max(map(len, with_masks.splitlines())) <= 80


# How much maps hang on the class


def by_hand_correlation(one: np.ndarray[Any, Any], other: np.ndarray[Any, Any]) -> float:
    """Correlate ranks in float64, each counted by comparing a cell with all others."""
    ranks = []
    for each in (one.astype(float).ravel(), other.astype(float).ravel()):
        below = (each[:, None] > each).sum(axis=1)
        ranks.append(below + ((each[:, None] == each).sum(axis=1) + 1) / 2)
    return float(np.corrcoef(*ranks)[0, 1])


@pytest.mark.parametrize("target", ["top1", 2])
def test_class_sensitivity_compares_with_the_best_of_the_other_classes(target: str | int) -> None:
    model, images = tiny_model(), pictures(4)
    methods = ["rollout", "grad-rollout", "evidence", "evidence@2"]
    found = vitviz.evaluate(model, images, methods=methods, target=target)
    for image, measurement in zip(images, found.measurements, strict=True):
        (case,) = measurement.cases
        (best, second) = (
            each.class_index for each in vitviz.evidence(model, [image])[0].predictions[:2]
        )
        assert case.class_index == (best if target == "top1" else target)
        rival = second if case.class_index == best else best
        pairs = {
            "grad-rollout": vitviz.grad_rollout(model, [image], classes=[case.class_index, rival]),
            "evidence": vitviz.evidence(model, [image], classes=[case.class_index, rival]),
            "evidence@2": vitviz.evidence(
                model, [image], classes=[case.class_index, rival], refine=2
            ),
        }
        for name, (own, other) in pairs.items():
            expected = by_hand_correlation(own.relevance, other.relevance)
            assert case.scores[name]["class_correlation"] == pytest.approx(expected, abs=0.02)
        for name in ("random", "centre", "rollout"):
            assert "class_correlation" not in case.scores[name]
    assert found.metrics[-1].name == "class_correlation"
    assert found.methods[-1].summaries["class_correlation"].images == 4


def test_class_sensitivity_is_left_out_where_there_is_no_other_class() -> None:
    pair = vitviz.evaluate(tiny_model(), pictures(2), methods=["evidence"], target=1, versus=2)
    single = load_model(tiny_module(classes=1), device="cpu")
    alone = vitviz.evaluate(single, pictures(2), methods=["evidence"])
    for found in (pair, alone):
        assert "class_correlation" not in found.methods[-1].summaries
        assert "correlation" not in found.explanations


def test_map_of_nothing_has_no_class_sensitivity(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(explaining, "explain_batch", showing(np.zeros((1, 1))))
    as_rollout = {"rollout": named_method("evidence").method}
    monkeypatch.setattr("test_evaluation.variants", lambda: as_rollout)
    found = vitviz.evaluate(tiny_model(), pictures(2), methods=["evidence"])
    assert not found.failed
    assert "class_correlation" not in found.methods[-1].summaries


def test_table_of_class_sensitivity_lists_methods_that_explain_a_class(
    shell: Shell, tiny: list[str]
) -> None:
    save_pictures(Path("p"), ["a.png", "b.png", "c.png"])
    text = shell("evaluate", "p", "--explain", *tiny).out.decode()
    table = text[text.index("Class sensitivity") : text.index("* better")]
    assert "grad-rollout" in table
    assert "correlation" in table
    assert not {"random", "centre"} & set(table.split())
    assert not re.search(r"^rollout", table, re.MULTILINE)
    assert "the lower, the more a method is sensitive" in " ".join(text.split())


@pytest.mark.slow
def test_native_shapes_go_with_masks_of_any_size(tmp_path: Path) -> None:
    white = np.zeros((683, 1366, 3), dtype=np.uint8)
    white[300:, 500:] = 255
    Image.fromarray(white).save(tmp_path / "a.jpg", quality=95)
    model = vitviz.load_model("demo", device="cpu", fit="native")
    masks = [(white[::step, ::step, 0] > 0).astype(np.uint8) for step in (1, 2, 3)]
    found = vitviz.evaluate(
        model, [tmp_path / "a.jpg"] * 3, methods=["rollout"], masks=masks, fit="native"
    )
    assert not found.failed
    scores = [each.cases[0].scores["rollout"]["energy"] for each in found.measurements]
    assert scores == pytest.approx([scores[0]] * 3, abs=0.02)


@pytest.mark.parametrize("layer", [torch.nn.Sigmoid(), torch.nn.Softmax(dim=-1)], ids=str)
def test_model_that_gives_probabilities_is_refused_where_logits_are_needed(
    layer: torch.nn.Module,
) -> None:
    module = tiny_module()
    module.head = torch.nn.Sequential(module.head, layer)  # type: ignore[arg-type]
    model = load_model(module, device="cpu")
    assert vitviz.grad_rollout(model, pictures(1))[0].relevance.any()
    for explain in (vitviz.relevance, vitviz.evidence, vitviz.evaluate):
        with pytest.raises(UnsupportedModelError, match="gives probabilities"):
            explain(model, pictures(1))


def test_model_object_in_training_is_measured_as_in_evaluation() -> None:
    module = tiny_module(proj_drop_rate=0.5)
    expected = vitviz.evaluate(load_model(module, device="cpu"), pictures(2), methods=["rollout"])
    model = load_model(module.train(), device="cpu")
    found = vitviz.evaluate(model, pictures(2), methods=["rollout"])
    assert mean(found, "rollout", "deletion") == mean(expected, "rollout", "deletion")
    assert module.training


def test_python_takes_images_and_classes_of_the_model() -> None:
    for index in (-1, len(LABELS)):
        with pytest.raises(LabelError, match=f"is {index}, but.*from 0 to 6"):
            vitviz.evaluate(tiny_model(), pictures(1), truth=[index])
    for image in (picture(SIZE, SIZE), np.asarray(picture(SIZE, SIZE))):
        assert vitviz.evaluate(tiny_model(), image, methods=["rollout"], resamples=5).images == 1
    found = vitviz.evaluate(
        tiny_model(), pictures(1), truth=np.array([3]), target="truth", methods=["rollout"]
    )
    assert json.loads(json.dumps(found.to_dict()))["cases"][0]["truth"] == 3


def test_path_with_dots_leads_to_no_mask_but_its_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_pictures(tmp_path, ["cat.png"])
    for folder in ("masks", "here"):
        (tmp_path / folder).mkdir()
    monkeypatch.chdir(tmp_path / "here")
    with pytest.raises(OptionError, match="no PNG of the name"):
        vitviz.evaluate(tiny_model(), ["../cat.png"], masks="../masks")


def test_files_are_saved_though_nothing_can_be_told(
    shell: Shell, tiny: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    save_pictures(Path("p"), ["a.png"])

    def full(*_: Any) -> None:
        raise OutputError("no room")

    monkeypatch.setattr(reporting.Reporter, "write", full)
    done = shell("evaluate", "p", "--csv", "n.csv", "--plot", "c.png", *tiny)
    assert done.code == 1
    assert Path("n.csv").exists()
    assert Path("c.png").exists()


# The plot


def drawn(monkeypatch: pytest.MonkeyPatch, found: Evaluation) -> Figure:
    """Return the figure behind an evaluation's plot."""
    figures: list[Figure] = []

    def kept(*words: Any) -> Figure:
        figures.append(draw_figure(*words))
        return figures[-1]

    draw_figure = plot.draw_figure
    monkeypatch.setattr(plot, "draw_figure", kept)
    draw_curves(found)
    (figure,) = figures
    return figure


@pytest.mark.parametrize("convention", ["vitviz", "chefer2021"])
def test_plot_shows_the_curves_of_each_method_and_their_numbers(
    monkeypatch: pytest.MonkeyPatch, convention: str
) -> None:
    found = vitviz.evaluate(
        tiny_model(), pictures(2), methods=["rollout", "grad-rollout"], convention=convention
    )
    figure = drawn(monkeypatch, found)
    deletion, insertion, legend = figure.axes
    assert figure.get_suptitle() == f"{found.settings['model']}, 2 images"
    assert deletion.get_title(loc="left") == "Deletion: lower is better"
    assert insertion.get_title(loc="left") == "Insertion: higher is better"
    unit = {"vitviz": "patches", "chefer2021": "pixels"}[convention]
    assert deletion.get_xlabel() == f"% of {unit} removed, most relevant first"
    assert insertion.get_xlabel() == f"% of {unit} shown, most relevant first"
    assert deletion.get_ylim() == insertion.get_ylim()
    removed = 100 * np.array(PERTURBATIONS[Convention(convention)].shares)
    names = [method.name for method in found.methods]
    for axes, x in ((deletion, removed), (insertion, 100 - removed[::-1])):
        assert [text.get_text() for text in axes.texts] == [
            "softmax probability of the class explained"
        ]
        assert [line.get_label() for line in axes.lines] == names
        for line, method in zip(axes.lines, found.methods, strict=True):
            y = method.score[0] if axes is deletion else method.score[1][::-1]
            np.testing.assert_allclose(line.get_xdata(), x)
            np.testing.assert_allclose(line.get_ydata(), y)
            assert max(y) <= axes.get_ylim()[1]
    told = [text.get_text() for text in legend.texts]
    assert told[:2] == ["deletion", "insertion"]
    rows = [told[start : start + 3] for start in range(2, len(told), 3)]
    for row, method in zip(rows, found.methods, strict=True):
        means = [method.summaries[name].interval.mean for name in ("deletion", "insertion")]
        assert row == [method.name, *(f"{each:.3f}" for each in means)]


def test_baselines_are_dashed_and_grey_and_methods_are_neither(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    found = vitviz.evaluate(tiny_model(), pictures(1), methods=["rollout", "grad-rollout"])
    figure = drawn(monkeypatch, found)
    for axes in figure.axes:  # the legend's, too
        colors = []
        for line, method in zip(axes.lines, found.methods, strict=True):
            red, green, blue = to_rgb(line.get_color())
            assert (line.get_linestyle() == "--") is method.is_baseline
            assert (max(red, green, blue) - min(red, green, blue) < 0.1) is method.is_baseline
            colors.append(line.get_color())
        assert len(set(colors)) == len(colors)
        assert colors == [line.get_color() for line in figure.axes[0].lines]
        methods = [
            color for color, each in zip(colors, found.methods, strict=True) if not each.is_baseline
        ]
        assert methods == ["#d55e00", "#0072b2"]  # Okabe and Ito's


def test_plot_is_the_same_to_the_pixel_whatever_the_style_of_others() -> None:
    found = vitviz.evaluate(tiny_model(), pictures(1), methods=["rollout"])
    pixels = draw_curves(found)
    with rc_context({"font.size": 20, "axes.facecolor": "black", "savefig.dpi": 30}):
        before = dict(rcParams)
        assert np.array_equal(draw_curves(found), pixels)
        assert dict(rcParams) == before
    assert not get_fignums()


def test_name_of_a_model_is_no_formula_and_may_have_letters_that_no_font_has() -> None:
    x = np.linspace(0, 1, 3)
    panels = [plot.Panel(heading="", label="", column="", x=x, curves=[x]) for _ in range(2)]
    entries = [plot.Entry(name="rollout", numbers=("0.1", "0.2"))]
    assert plot.draw_pixels("a$_{b$ 模型, 1 images", "", panels, entries).shape[2] == 3


def test_legend_of_many_methods_has_room_for_each() -> None:
    x = np.linspace(0, 1, 3)
    panels = [plot.Panel(heading="", label="", column="", x=x, curves=[x] * 40) for _ in range(2)]
    entries = [plot.Entry(name=f"m{number}", numbers=("0.1", "0.2")) for number in range(40)]
    figure = plot.draw_figure("", "", panels, entries)
    figure.draw_without_rendering()
    *_, legend = figure.axes
    names = [text.get_window_extent() for text in legend.texts if text.get_text().startswith("m")]
    assert len(names) == 40
    assert not any(upper.overlaps(lower) for upper, lower in pairwise(names))


def test_many_methods_have_a_colour_each() -> None:
    assert len(set(plot._colors([False] * 16))) == 16


def test_plot_without_matplotlib_is_refused_before_any_work(
    shell: Shell, tiny: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    save_pictures(Path("p"), ["a.png"])
    known = importlib.util.find_spec

    def find_spec(name: str, *others: Any) -> Any:
        return None if name == "matplotlib" else known(name, *others)

    monkeypatch.setattr("vitviz.evaluation.options.find_spec", find_spec)
    monkeypatch.setattr("vitviz.models.model.load_model", None)
    done = shell("evaluate", "p", "--plot", "c.png", *tiny)
    assert (done.code, done.out) == (2, b"")
    assert "pip install 'vitviz[plot]'" in done.err
    assert not Path("c.png").exists()


def test_what_was_measured_before_an_interruption_is_told(
    shell: Shell, tiny: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    save_pictures(Path("p"), ["a.png", "b.png", "c.png"])
    plain = shell("evaluate", "p/a.png", "--json", *tiny).records[0]
    runs = []

    def explain(model: Model, images: Tensor, *others: Any, **more: Any) -> BatchMaps:
        runs.append(len(images))
        if len(runs) > 5:  # two methods, each twice, and one of them for another class
            raise SystemExit(130)
        return explain_batch(model, images, *others, **more)

    monkeypatch.setattr(explaining, "explain_batch", explain)
    words = ["--batch-size", "1", "--csv", "n.csv", "--json"]
    done = shell("evaluate", "p", *words, *tiny)
    assert done.code == 130
    (document,) = done.records
    assert document["images"] == 1
    assert [each["source"] for each in document["cases"]] == ["p/a.png"]
    for method, scores in plain["cases"][0]["scores"].items():
        assert document["cases"][0]["scores"][method] == pytest.approx(scores, abs=1e-4)
    assert "1 measured, 0 failed, 2 not done" in done.err
    assert len(Path("n.csv").read_text(encoding="utf-8").splitlines()) == 1 + 4


def test_progress_is_told_in_parts_of_images_and_comes_to_all_of_them() -> None:
    parts: list[float] = []
    masks = corner_masks(3)
    masks[1][0, 0], masks[1][0, 1] = 3, 4  # of several classes
    subjects = [
        examination.AnnotatedImage(source=Source(path=Path(str(number)), key=str(number)), **each)
        for number, each in enumerate(
            {"image": image, "mask": mask} for image, mask in zip(pictures(3), masks, strict=True)
        )
    ]
    options = EvaluationOptions(methods=("rollout", "evidence"), target="mask", batch_size=2)
    found = list(examination.measure(tiny_model(), subjects, options, advance=parts.append))
    assert [len(each.cases) for each in found] == [1, 3, 1]
    assert sum(parts) == pytest.approx(3)
    assert max(parts) < 0.3

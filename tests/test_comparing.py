"""``compare``: several methods and classes of an image on one sheet."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import timm
from PIL import Image

import vitviz
from fixtures_io import ROOT, Shell, picture, places, tiny_model
from vitviz.api import explain
from vitviz.errors import OptionError
from vitviz.explaining.passes import shared_passes
from vitviz.methods.comparison import Comparison
from vitviz.methods.table import PUBLISHED, named_method, variants
from vitviz.options import OutputKind, PictureOptions
from vitviz.runs.provenance import read_provenance

pytestmark = pytest.mark.usefixtures("one_thread")

SCENE = ROOT / "sample_images/scenes/star-ring.png"
CLASSES = ["--class", "star", "--class", "ring"]


@pytest.fixture
def shell(shell: Shell, tmp_path: Path) -> Shell:
    (tmp_path / "scene.png").write_bytes(SCENE.read_bytes())
    return shell


def test_sheet_has_classes_as_rows_and_methods_as_columns(shell: Shell) -> None:
    done = shell("compare", "-m", "demo", "scene.png", *CLASSES, "--max-size", "96")
    assert done.code == 0
    assert done.paths == ["vitviz-out/scene.png.compare.panel.png"]
    sheet = np.asarray(Image.open(done.paths[0]))
    model, pictures = vitviz.load_model("demo"), PictureOptions(max_size=96)
    rollout, *relevance = (
        np.asarray(each.overlay())
        for each in (
            *vitviz.rollout(model, ["scene.png"], pictures=pictures),
            *vitviz.relevance(model, ["scene.png"], classes=["star", "ring"], pictures=pictures),
        )
    )
    evidence = [
        np.asarray(each.overlay())
        for each in vitviz.evidence(
            model, ["scene.png"], classes=["star", "ring"], pictures=pictures
        )
    ]
    original = np.asarray(vitviz.rollout(model, ["scene.png"], pictures=pictures)[0].sample.picture)
    (tops, lefts) = zip(*places(sheet, original), strict=True)
    assert set(lefts) == {0}
    assert len(tops) == 2
    assert places(sheet, rollout) == [(tops[0], 96 + 8)]
    for column, maps in ((2, relevance), (3, evidence)):
        for top, each in zip(tops, maps, strict=True):
            assert places(sheet, each) == [(top, column * (96 + 8))]
    assert sheet.shape[1] == 4 * 96 + 3 * 8


def test_methods_can_be_repeated_or_parted_by_commas() -> None:
    made = Comparison.of(("relevance, evidence", "rollout@2", "evidence"), ("top2",))
    assert [each.name for each in made.columns] == ["relevance", "evidence", "rollout@2"]
    assert [getattr(each.method, "classes", None) for each in made.columns] == [
        *(("top2",), ("top2",), None)
    ]
    assert made.refine == 2


@pytest.mark.parametrize(
    ("names", "passes"),
    [
        ("rollout,relevance,evidence", [["relevance", "rollout"], ["evidence"]]),
        ("relevance,evidence-plain,rollout", [["relevance", "evidence-plain", "rollout"]]),
        (
            "rollout,grad-rollout,relevance-classic",
            [["grad-rollout", "relevance-classic", "rollout"]],
        ),
        ("evidence,rollout@2,relevance@2", [["evidence"], ["relevance@2", "rollout@2"]]),
        ("gradcam,grad-rollout", [["gradcam"], ["grad-rollout"]]),
    ],
)
def test_methods_share_a_forward_pass_where_their_way_back_is_the_same(
    names: str, passes: list[list[str]]
) -> None:
    model, made = tiny_model(), [named_method(name) for name in names.split(",")]
    called = {id(each.method): each.name for each in made}
    found = shared_passes(model, [each.method for each in made])
    assert [[called[id(each)] for each in one] for one in found] == passes
    images: list[int] = []
    hook = model.module.register_forward_hook(lambda _, given, __: images.append(len(given[0])))
    with hook:
        vitviz.compare(model, picture(60, 60), methods=names)
    assert sum(images) == sum(4 if "@2" in one[0] else 1 for one in passes)


@pytest.mark.filterwarnings("ignore:no heat at all")
@pytest.mark.parametrize("versus", [None, "top2"])
def test_maps_are_those_of_each_method_alone(versus: str | None) -> None:
    model, classes = tiny_model(), ["top1", "1"]
    names = [*variants(), *PUBLISHED, "relevance@2", "rollout@2"]
    images = [np.asarray(picture(50, 40, seed=seed)) for seed in range(3)]
    sheets = vitviz.compare(model, images, methods=names, classes=classes, versus=versus)
    for name in names:
        method = named_method(name).method
        if method.explains_class:
            method = replace(method, classes=tuple(classes), versus=versus)  # type: ignore[call-arg]
        together = [each for sheet in sheets for each in dict(sheet.columns)[name]]
        for one, other in zip(explain(model, images, method), together, strict=True):
            np.testing.assert_allclose(other.relevance, one.relevance, rtol=1e-4, atol=1e-6)
            assert (other.subject, other.request) == (one.subject, one.request)
            assert other.predictions == one.predictions
            numbers, expected = (
                {name: number for name, number in known.items() if number is not None}
                for known in (other.diagnostics.to_record(), one.diagnostics.to_record())
            )
            assert numbers == pytest.approx(expected, rel=1e-3, abs=1e-6)


def test_sheet_of_two_classes_compared_says_so(shell: Shell) -> None:
    words = ["--class", "star", "--versus", "ring", "--methods", "relevance", "--json"]
    done = shell("compare", "-m", "demo", "scene.png", *words)
    (record,) = done.records
    assert record["run"]["options"]["versus"] == "ring"
    (sheet,) = vitviz.compare(
        vitviz.load_model("demo"), "scene.png", methods="relevance", classes="star", versus="ring"
    )
    assert sheet.columns[0][1][0].subject.startswith("star (100%) versus ring")
    drawn = np.asarray(Image.open(record["outputs"][0]["path"]))
    np.testing.assert_array_equal(np.asarray(sheet.panel()), drawn)


def test_hierarchical_model_is_compared_with_methods_that_suit_it() -> None:
    module = timm.create_model(
        "swin_tiny_patch4_window7_224", num_classes=3, embed_dim=24, depths=(1, 1, 1, 1)
    )
    model = vitviz.load_model(module, device="cpu")
    (sheet,) = vitviz.compare(model, SCENE, methods=["evidence", "evidence-plain"])
    assert [name for name, _ in sheet.columns] == ["evidence", "evidence-plain"]
    with pytest.raises(vitviz.VitvizError, match="or use evidence"):
        vitviz.compare(model, SCENE)


@pytest.mark.usefixtures("census")
def test_comparison_that_suits_no_model_is_refused_before_its_weights_are_missed(
    shell: Shell,
) -> None:
    done = shell("compare", "-m", "swin_tiny_patch4_window7_224", "scene.png")
    assert done.code == 2
    assert "or use evidence" in done.err


@pytest.mark.parametrize("words", [("nosuch",), (",",), ("attention",), ()])
def test_unknown_method_is_refused(words: tuple[str, ...]) -> None:
    with pytest.raises(OptionError, match="--methods"):
        Comparison.of(words, ("top1",))


def test_class_to_compare_with_is_refused_where_no_method_explains_one() -> None:
    with pytest.raises(OptionError, match="--versus is about classes, which rollout does not"):
        Comparison.of(("rollout",), ("top1",), "star")


def test_sheets_in_a_grid_have_no_colour_bar_but_their_own() -> None:
    (sheet,) = vitviz.compare(tiny_model(), picture(60, 60), methods="rollout")
    assert sheet.cell(OutputKind.OVERLAY, "").bar is None


def test_method_of_a_similar_name_is_offered() -> None:
    with pytest.raises(
        OptionError, match=r"--methods rolout is unknown \(did you mean rollout\?\)"
    ):
        Comparison.of(("rolout",), ("top1",))


def test_record_tells_of_methods_classes_and_predictions(shell: Shell) -> None:
    options = ["--methods", "relevance,evidence@2", "--json"]
    done = shell("compare", "-m", "demo", "scene.png", *CLASSES, *options)
    (record,) = done.records
    assert record["run"]["method"] == "compare"
    assert list(record["run"]["options"]["methods"]) == ["relevance", "evidence@2"]
    assert record["run"]["options"]["methods"]["evidence@2"]["refine"] == 2
    assert record["run"]["options"]["classes"] == ["star", "ring"]
    assert {each["class_label"] for each in record["predictions"][:2]} == {"star", "ring"}
    (output,) = record["outputs"]
    assert (output["kind"], output["class_index"]) == ("panel", None)
    found = read_provenance(Path(output["path"]))
    assert found is not None
    assert found.recipe["options"]["classes"] == ["star", "ring"]


@pytest.mark.slow
def test_sheet_of_the_same_recipe_alone_is_skipped(shell: Shell) -> None:
    call = ["compare", "-m", "demo", "scene.png", "--skip-existing", "--json"]
    statuses = []
    for extra in ([], [], CLASSES, CLASSES, [*CLASSES, "--methods", "rollout"], ["--scale=0:9"]):
        (record,) = shell(*call, *extra).records
        statuses.append(record["status"])
    assert statuses == ["written", "skipped", "written", "skipped", "written", "written"]


def test_image_that_fails_leaves_the_others(shell: Shell) -> None:
    Path("broken.png").write_bytes(b"\x89PNG broken")
    picture(30, 40).save("other.png")
    done = shell("compare", "-m", "demo", "broken.png", "scene.png", "other.png")
    assert done.code == 1
    assert [Path(path).name for path in done.paths] == [
        *("scene.png.compare.panel.png", "other.png.compare.panel.png")
    ]
    assert "failed: broken.png" in done.err


def test_methods_of_no_class_need_no_class(shell: Shell) -> None:
    done = shell("compare", "-m", "demo", "scene.png", "--methods", "rollout")
    assert done.code == 0
    sheet = np.asarray(Image.open(done.paths[0]))
    assert sheet.shape[1] == 2 * 384 + 8


def test_class_that_is_none_is_a_usage_error(shell: Shell) -> None:
    done = shell("compare", "-m", "demo", "scene.png", "--class", "unicorn")
    assert done.code == 2
    assert "unicorn" in done.err
    assert not list(Path().rglob("*.compare.panel.png"))
